"""sspa.py: every fused path against its reference (outputs and all gradients), formulas by hand, oracles, counted work."""
import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import adapter_rp
import data
import scenes
import sspa


def leaf(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype).requires_grad_()


def flat(output):
    return [t for t in (output if isinstance(output, tuple) else (output,)) if t is not None]


def same(reference, fused, inputs, others=(), rtol=1e-9, atol=1e-11):
    """Outputs, and the gradients of all inputs under random gradients from above."""
    outputs, gradients = [], []
    for function in (reference, fused):
        output = flat(function(*inputs, *others))
        outputs.append([t.detach() for t in output])
        above = [torch.randn(t.shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(t.dtype) for n, t in enumerate(output)]
        gradients.append(torch.autograd.grad([t for t in output if t.requires_grad], inputs, [g for g, t in zip(above, output) if t.requires_grad]))
    for one, two in zip(*outputs, strict=True):
        torch.testing.assert_close(two, one, rtol=rtol, atol=atol)
    for one, two in zip(*gradients, strict=True):
        assert two.isfinite().all()
        torch.testing.assert_close(two, one, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["encode_prompts", "quaternion_linear", "gated_alignment", "asymmetric_loss", "soft_aggregate", "soft_aggregate_loss"])
def test_reference_and_fused_have_one_signature(name):
    assert inspect.signature(getattr(sspa, f"{name}_reference")) == inspect.signature(getattr(sspa, f"{name}_fused"))


# --- image features ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backbone, resolution, regions, width", [("scenes", None, 64, 96), ("scenes", 96, 144, 96), ("ViT-B-32", None, 49, 512), ("ViT-B-32", 448, 196, 512), ("RN50", None, 49, 1024), ("RN50", 448, 196, 1024)])
def test_global_feature_is_open_clips_own(backbone, resolution, regions, width):
    """x0 is encode_image at every resolution; as many regions as patches or cells."""
    clip = data.load_clip(backbone, None if backbone == "scenes" else "none", resolution=resolution)
    if backbone == "RN50":  # its residual branches start at zero; without this every region would be alike
        for name, parameter in clip.model.visual.named_parameters():
            if name.endswith("bn3.weight"):
                torch.nn.init.ones_(parameter)
        clip.model.visual.attnpool.q_proj.weight.data *= 1e4  # random weights attend evenly; sharpen them
    image = data.load_photo(clip, ("test", 0))[None]
    with torch.no_grad():
        x0, X = sspa.image_features(clip.model.visual, image)
        torch.testing.assert_close(x0, clip.model.encode_image(image), rtol=1e-4, atol=1e-5)
    assert X.shape == (1, regions, width) and X.std(1).mean() > 1e-2 * X.std()


def test_resnet_position_embeddings_are_interpolated():
    """From 7 x 7 to 14 x 14: the global position stays, and a constant grid stays constant."""
    open_clip = data.import_open_clip()
    model = open_clip.create_model("RN50", pretrained=None, load_weights=False)
    pool = model.visual.attnpool
    pool.positional_embedding.data[1:] = 3.0
    first = pool.positional_embedding[0].clone()
    data._resize_attention_pool(open_clip, model.visual, 448)
    assert pool.positional_embedding.shape == (197, 2048)
    torch.testing.assert_close(pool.positional_embedding[0], first)
    torch.testing.assert_close(pool.positional_embedding[1:], torch.full((196, 2048), 3.0))


# --- prompts ----------------------------------------------------------------------------------------------------------

COCO_NAMES = list(json.loads((data.ASSETS / "descriptions/coco2014.json").read_text())["descriptions"])


@pytest.mark.parametrize("backbone", ["ViT-B-32", "RN50", "scenes"])
def test_prompts_equal_open_clips_encode_text(backbone):
    """Oracle: with the context set to the embeddings of "a photo of a", both give what encode_text gives for the same words."""
    clip = data.load_clip(backbone, None if backbone == "scenes" else "none")
    names = ["dog", "potted plant", "hair drier", "a b c d e f g h"]
    words = clip.tokenizer([f"a photo of a {name}." for name in names])
    context = clip.model.token_embedding(words[0, 1:5])
    tokens = clip.tokenizer([f"X X X X {name}." for name in names])
    with torch.no_grad():
        expected = clip.model.encode_text(words)
        for function in (sspa.encode_prompts_reference, sspa.encode_prompts_fused):
            torch.testing.assert_close(function(clip.model, context, tokens), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(function(clip.model, context[None].repeat(3, 1, 1), tokens)[2], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sets, length, names", [(2, 4, ["dog", "traffic light", "x"]), (1, 1, ["a"]), (3, 16, ["giraffe", "tv monitor"]), (2, 4, ["very " * 60 + "long"])])
def test_prompts_fused_equal_reference(sets, length, names):
    clip = data.load_clip("scenes")
    model = clip.model.double()
    tokens = clip.tokenizer([" ".join(["X"] * length) + f" {name}." for name in names])
    for shape in ((sets, length, 96), (length, 96)):
        same(lambda c: sspa.encode_prompts_reference(model, c, tokens), lambda c: sspa.encode_prompts_fused(model, c, tokens), [leaf(*shape, scale=0.1)])
    assert torch.autograd.gradcheck(lambda c: sspa.encode_prompts_fused(model, c, tokens), [leaf(1, length, 96, scale=0.1)], fast_mode=True)


def test_prompt_tokens_counted():
    """Tokens that go through the text encoder's layers, counted in its feed-forward parts: 77 C against 1 + L + C (longest - 1 - L) a set."""
    clip = data.load_clip("scenes")
    tokens, counted = clip.tokenizer([f"X X X X {name}." for name in COCO_NAMES]), []
    layers = len(clip.model.transformer.resblocks)
    for block in clip.model.transformer.resblocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: counted.append(inputs[0].shape[:-1].numel()))
    contexts, classes, longest = leaf(2, 4, 96, dtype=torch.float32), len(COCO_NAMES), int(tokens.argmax(-1).max()) + 1
    sspa.encode_prompts_reference(clip.model, contexts, tokens)
    assert sum(counted) == 2 * classes * clip.model.context_length * layers
    counted.clear()
    sspa.encode_prompts_fused(clip.model, contexts, tokens)
    assert sum(counted) == (layers - 1) * 2 * (5 + classes * (longest - 5)) + 2 * classes  # the last layer: end tokens only


# --- KAP, DSF ---------------------------------------------------------------------------------------------------------

def test_knowledge_texts(capsys):
    clip = data.load_clip("scenes")
    texts = sspa.knowledge_texts(clip, ["boat", "cup"], {"boat": "Boat is a hull."}, "description-first")
    assert texts == ["Boat is a hull. A photo of a boat.", "A photo of a cup."]
    assert sspa.knowledge_texts(clip, ["boat"], {"boat": "Boat is a hull."}, "template-first") == ["A photo of a boat. Boat is a hull."]
    assert capsys.readouterr().err == ""
    long, = sspa.knowledge_texts(clip, ["boat"], {"boat": "word " * 100}, "description-first")
    assert long.endswith(" A photo of a boat.") and len(clip.tokenizer.encode(long)) + 2 == clip.tokenizer.context_length
    assert "1 label descriptions shortened to 40 tokens: boat" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["scenes", "voc2007", "coco2014"])
def test_shipped_descriptions(dataset):
    """One sentence a label, in the manner of the figure, within CLIP's 77 tokens together with the template."""
    content = json.loads((data.ASSETS / f"descriptions/{dataset}.json").read_text())
    names, tokenizer = list(data.DATASET_NAMES.get(dataset, COCO_NAMES)), data.import_open_clip().SimpleTokenizer()
    assert "{label}" in content["prompt"] and "language model" in content["source"] and list(content["descriptions"]) == names
    assert dataset != "coco2014" or len(names) == 80
    for name, sentence in content["descriptions"].items():
        assert sentence.lower().startswith(name) and "often found" in sentence and sentence.endswith(".")
        assert len(tokenizer.encode(f"{sentence} A photo of a {name}.")) + 2 <= 77
    assert len(set(content["descriptions"].values())) == len(names)


def test_dsf_by_hand():
    """Two regions e1, e2, a prompt along e1, scale log 3, identity: attention 3/4 and 1/4, so T_ca = (3/4, 1/4)."""
    regions, prompt = torch.eye(2, dtype=torch.float64)[None], torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    filtered, attention = sspa.dynamic_semantic_filtering(prompt, regions, torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), math.log(3))
    torch.testing.assert_close(attention, torch.tensor([[[0.75, 0.25]]], dtype=torch.float64))
    torch.testing.assert_close(filtered, attention)


# --- QSM --------------------------------------------------------------------------------------------------------------

UNITS = [torch.tensor(row, dtype=torch.float64) for row in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])]  # 1, i, j, k


def multiply(a, b):
    """The Hamilton product of two quaternions [4], written out from i^2 = j^2 = k^2 = ijk = -1."""
    a1, b1, c1, d1 = a
    a2, b2, c2, d2 = b
    return torch.stack([a1 * a2 - b1 * b2 - c1 * c2 - d1 * d2, a1 * b2 + b1 * a2 + c1 * d2 - d1 * c2,
                        a1 * c2 - b1 * d2 + c1 * a2 + d1 * b2, a1 * d2 + b1 * c2 - c1 * b2 + d1 * a2])


def quaternion_layers():
    yield from (sspa.quaternion_linear_reference, sspa.quaternion_linear_fused)
    yield lambda x, *w: sspa.quaternion_linear_fused(tuple(x.chunk(4, -1)), *w)


def test_quaternion_units():
    one, i, j, k = UNITS
    for a, b, product in ((i, i, -one), (j, j, -one), (k, k, -one), (i, j, k), (j, k, i), (k, i, j), (j, i, -k), (k, j, -i), (i, k, -j)):
        torch.testing.assert_close(multiply(a, b), product)
        for layer in quaternion_layers():
            torch.testing.assert_close(layer(b, *(w.reshape(1, 1) for w in a)), product)  # weight times input


def test_quaternion_layer_is_a_sum_of_hamilton_products():
    """Oracle: every input quaternion times its weight quaternion, multiplied by hand and summed; and |ab| = |a||b|."""
    n, m, x = 3, 2, leaf(5, 12).detach()
    weights = [leaf(n, m, seed=s).detach() for s in range(1, 5)]
    expected = torch.zeros(5, 4, m, dtype=torch.float64)
    for row in range(5):
        for q in range(n):
            for p in range(m):
                a, b = x[row].view(4, n)[:, q], torch.stack([w[q, p] for w in weights])
                product = multiply(b, a)  # weight times input
                assert product.norm() == pytest.approx((a.norm() * b.norm()).item())
                expected[row, :, p] += product
    for layer in quaternion_layers():
        torch.testing.assert_close(layer(x, *weights), expected.flatten(1))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 4), (2, 7, 3)])
@pytest.mark.parametrize("zero", [0, 2, None])
@pytest.mark.parametrize("bias", [True, False])
def test_quaternion_fused_equals_reference(shape, zero, bias):
    """Components that vary with the label, with both, with the image, with nothing; one of them zero."""
    B, C, n = shape
    parts = [leaf(C, n), leaf(B, C, n, seed=1), leaf(B, 1, n, seed=2), leaf(n, seed=3)]
    weights = [leaf(n, 2, seed=s) for s in range(4, 8)] + ([leaf(8, seed=8)] if bias else [])
    inputs = [part for position, part in enumerate(parts) if position != zero] + weights

    def run(function):
        def call(*tensors):
            tensors = list(tensors)
            x = tuple(None if position == zero else tensors.pop(0) for position in range(4))
            return function(x, *tensors)
        return call
    same(run(sspa.quaternion_linear_reference), run(sspa.quaternion_linear_fused), inputs)
    assert torch.autograd.gradcheck(run(sspa.quaternion_linear_fused), inputs, fast_mode=True)
    whole = leaf(B, C, 4 * n)
    same(sspa.quaternion_linear_reference, sspa.quaternion_linear_fused, [whole, *weights])


def test_quaternion_init_moments():
    """Real weight: variance 2 s^2; each imaginary one about 2 s^2 / 3; means 0; the modulus is s chi(4), so its square averages 4 s^2."""
    r, i, j, k = sspa.quaternion_init(600, 400, torch.Generator().manual_seed(0))
    s2 = 1 / (2 * 1000)
    assert r.var().item() == pytest.approx(2 * s2, rel=0.01)
    for imaginary in (i, j, k):
        assert imaginary.var().item() == pytest.approx(2 * s2 / 3, rel=0.02) and abs(imaginary.mean().item()) < 1e-3
    modulus = r ** 2 + i ** 2 + j ** 2 + k ** 2
    assert modulus.mean().item() == pytest.approx(4 * s2, rel=0.01) and (modulus ** 2).mean().item() == pytest.approx(24 * s2 ** 2, rel=0.02)


# --- GDMA -------------------------------------------------------------------------------------------------------------

def direction(d, seed, gate=True):
    matrices = [leaf(d, d, seed=seed + n, scale=d ** -0.5) for n in range(5)]
    return [*matrices[:3], leaf(seed=seed + 5), *(matrices[3:] + [leaf(d, seed=seed + 6)] if gate else [])]


@pytest.mark.parametrize("B, C, M, d", [(2, 3, 7, 5), (1, 1, 1, 4), (2, 1, 6, 3), (3, 6, 1, 3), (2, 9, 4, 3), (1, 8, 7, 2), (2, 5, 5, 6), (1, 3, 8, 64)])
@pytest.mark.parametrize("gate", [True, False])
def test_gated_alignment_fused_equals_reference(B, C, M, d, gate):
    """Fewer labels than regions and more, so that every order of products is met."""
    features, forth, back = [leaf(B, C, d), leaf(B, M, d, seed=1)], direction(d, 10, gate), direction(d, 20, gate)
    pad = [] if gate else [None] * 3

    def run(function):
        return lambda *t: function(t[0], t[1], sspa.GatedAttention(*t[2:2 + len(forth)], *pad), sspa.GatedAttention(*t[2 + len(forth):], *pad))
    same(run(sspa.gated_alignment_reference), run(sspa.gated_alignment_fused), [*features, *forth, *back])
    assert torch.autograd.gradcheck(lambda *t: tuple(flat(run(sspa.gated_alignment_fused)(*t))), [*features, *forth, *back], fast_mode=True)


def test_gated_alignment_takes_every_order(monkeypatch):
    """With few labels no region is projected by W_K, W_V or W_Q: in the fused path the large operand meets one d x d matrix, the gate's."""
    large = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (large.append(1) if a.shape[-2] == 50 and b.shape[-2:] == (8, 8) else None, matmul(a, b))[1])
    T, X = leaf(2, 3, 8).detach(), leaf(2, 50, 8).detach()
    forth, back = (sspa.GatedAttention(*(w.detach() for w in direction(8, s))) for s in (0, 9))
    sspa.gated_alignment_reference(T, X, forth, back)
    assert len(large) == 5  # k, v of V-to-S; q and both gate products of S-to-V
    large.clear()
    sspa.gated_alignment_fused(T, X, forth, back)
    assert len(large) == 0  # the gate's one product is an addmm over all rows


def test_gated_alignment_by_hand():
    """One region e2, one label e1, identity projections: a = e2; gate weights 0 and bias log 3, so g = 3/4: T_fn = e1 + 3/4 e2."""
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    weights = sspa.GatedAttention(eye, eye, eye, torch.tensor(1.0).double(), zero, zero, torch.full((2,), math.log(3), dtype=torch.float64))
    for function in (sspa.gated_alignment_reference, sspa.gated_alignment_fused):
        labels, regions, gate, none = function(eye[None, :1], eye[None, 1:], weights, None)
        torch.testing.assert_close(labels, torch.tensor([[[1, 0.75]]], dtype=torch.float64))
        torch.testing.assert_close(regions, eye[None, 1:])
        torch.testing.assert_close(gate, torch.full((1, 1, 2), 0.75, dtype=torch.float64))
        assert none is None


# --- losses and the soft aggregator -----------------------------------------------------------------------------------

@pytest.mark.parametrize("exponents", [(), (2.0, 0.0, 0.0), (4.0, 1.0, 0.05), (0.0, 0.0, 0.0), (0.5, 0.5, 0.1)])
def test_the_two_scripts_hold_the_same_loss(exponents):
    """They never import each other; values and gradients of their copies agree, and so does their text."""
    logits, targets = leaf(7, 11, scale=4), torch.randint(-1, 2, (7, 11), generator=torch.Generator().manual_seed(0))
    if exponents:
        for name in ("reference", "fused"):
            same(getattr(adapter_rp, f"asymmetric_loss_{name}"), getattr(sspa, f"asymmetric_loss_{name}"), [logits], [targets, *exponents], rtol=0, atol=0)
    same(sspa.asymmetric_loss_reference, sspa.asymmetric_loss_fused, [logits], [targets, *exponents])
    assert torch.autograd.gradcheck(lambda z: sspa.asymmetric_loss_fused(z, targets, *exponents), [logits])
    for name in ("_asymmetric_in_place", "_power", "_AsymmetricLoss"):
        assert inspect.getsource(getattr(sspa, name)) == inspect.getsource(getattr(adapter_rp, name))


AGGREGATES = {"agg": (sspa.soft_aggregate_reference, sspa.soft_aggregate_fused), "loss": (sspa.soft_aggregate_loss_reference, sspa.soft_aggregate_loss_fused)}


def aggregate_case(B, C, M, d, name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, 2, (B, C), generator=generator).to(torch.int8)
    scalars = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 7.0, -1.5)]
    return [leaf(B, C, d, seed=seed), leaf(B, M, d, seed=seed + 1), *(scalars if name == "loss" else scalars[:2])], [targets] if name == "loss" else []


@pytest.mark.parametrize("name", AGGREGATES)
@pytest.mark.parametrize("block", [1, 20, 37, 2 ** 18])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 3), (3, 5, 7, 6), (4, 1, 9, 2), (2, 13, 1, 5)])
def test_soft_aggregate_fused_equals_reference(monkeypatch, name, block, sizes):
    monkeypatch.setattr(sspa._SoftAggregate, "BLOCK", block)
    inputs, others = aggregate_case(*sizes, name)
    same(*AGGREGATES[name], inputs, others)


@pytest.mark.parametrize("name", AGGREGATES)
def test_soft_aggregate_gradcheck_frozen_parts_and_no_grad(name):
    inputs, others = aggregate_case(2, 3, 5, 4, name)
    reference, fused = AGGREGATES[name]
    assert torch.autograd.gradcheck(lambda *t: fused(*t, *others), inputs)
    frozen = [inputs[0], inputs[1].detach(), 0.07, 20.0, *([-3.0] if name == "loss" else [])]  # plain numbers, constant regions
    (one,), (two,) = (torch.autograd.grad(f(*frozen, *others).sum(), frozen[:1]) for f in (reference, fused))
    torch.testing.assert_close(two, one)
    before = [t.detach().clone() for t in inputs]
    with torch.no_grad():
        torch.testing.assert_close(fused(*inputs, *others), reference(*inputs, *others))
        assert not torch.is_grad_enabled()
    for t, b in zip(inputs, before):
        assert torch.equal(t, b)
    output = fused(*inputs, *others).sum()
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(3 * output, inputs)):
        torch.testing.assert_close(3 * a, b)  # asking twice does not scale twice


@pytest.mark.parametrize("name", AGGREGATES)
def test_soft_aggregate_extremes(name):
    """Logits of +-1e4 (scale 1e4), features of length 1e6 and 1e-6, a region that is zero, a temperature that makes the softmax a maximum."""
    inputs, others = aggregate_case(2, 5, 4, 3, name)
    features = [leaf(2, 5, 3).detach(), leaf(2, 4, 3, seed=1).detach()]
    features[0][0, 0], features[0][0, 1], features[1][0, 2] = features[0][0, 0] * 1e6, features[0][0, 1] * 1e-6, 0
    features = [t.requires_grad_() for t in features]
    for temperature, scale in ((0.07, 1e4), (1e-3, 1e4), (1e3, 1e-3)):
        scalars = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (temperature, scale, 0.0)[:len(inputs) - 2]]
        same(*AGGREGATES[name], [*features, *scalars], others, rtol=1e-6, atol=1e-7)


def test_soft_aggregate_by_hand():
    """A label along e1, regions along e1 and e2 of any length: cosines 1 and 0, temperature 1 / log 3: weights 3/4 and 1/4, scale 8 -> 6."""
    label, regions = torch.tensor([[[5.0, 0]]], dtype=torch.float64), torch.tensor([[[2.0, 0], [0, 0.1]]], dtype=torch.float64)
    for function in AGGREGATES["agg"]:
        torch.testing.assert_close(function(label, regions, 1 / math.log(3), 8.0), torch.tensor([[6.0]], dtype=torch.float64))


def test_in_bfloat16_within_its_precision():
    """Same inputs, rounded to bfloat16: outputs within a few of its steps (2^-8) of the float64 reference."""
    def close(function, reference, inputs, others=()):
        outputs = flat(function(*(t.detach().bfloat16() if t.ndim else t.detach() for t in inputs), *others))
        for mine, exact in zip(outputs, flat(reference(*(t.detach().bfloat16().double() if t.ndim else t.detach() for t in inputs), *others))):
            assert mine.isfinite().all() and (mine.double() - exact).abs().max() <= 0.04 * exact.abs().max()
    inputs, others = aggregate_case(3, 5, 7, 16, "loss")
    close(sspa.soft_aggregate_fused, sspa.soft_aggregate_reference, inputs[:4])
    close(sspa.soft_aggregate_loss_fused, sspa.soft_aggregate_loss_reference, inputs, others)
    run = lambda f: lambda *t: f(t[0], t[1], sspa.GatedAttention(*t[2:9]), sspa.GatedAttention(*t[9:]))
    weights = [w if w.ndim else torch.tensor(0.5).double() for w in direction(16, 3) + direction(16, 30)]
    close(run(sspa.gated_alignment_fused), run(sspa.gated_alignment_reference), [leaf(2, 3, 16), leaf(2, 9, 16, seed=1), *weights])
    run = lambda f: lambda *t: f((None, t[0], t[1], t[2]), *t[3:])
    close(run(sspa.quaternion_linear_fused), run(sspa.quaternion_linear_reference), [leaf(5, 16), leaf(2, 5, 16, seed=1), leaf(2, 1, 16, seed=2), *(leaf(16, 4, seed=s) for s in range(3, 7)), leaf(16, seed=9)])


def saved_bytes(function):
    """Bytes that autograd keeps for the backward pass."""
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()), t)[1], lambda t: t):
        function()
    return sum(seen.values())


def test_fused_saves_memory():
    """Counted bytes: the loss keeps its gradients alone (a third at most); the aggregator nothing of size C x M; quaternion layer 1 no concatenation."""
    T, X, targets = leaf(4, 1000, 64, dtype=torch.float32), leaf(4, 196, 64, dtype=torch.float32), torch.zeros(4, 1000, dtype=torch.int8)
    inputs = T.nbytes + X.nbytes
    aggregate = [saved_bytes(lambda: f(T, X, 0.1, 20.0)) - inputs for f in AGGREGATES["agg"]]
    loss = [saved_bytes(lambda: f(T, X, 0.1, 20.0, -3.0, targets)) - inputs for f in AGGREGATES["loss"]]
    assert aggregate[1] < 1000 and aggregate[0] > 4 * 1000 * 196 * 4 and 3 * loss[1] < loss[0]
    parts, weights = (None, leaf(80, 64), leaf(16, 80, 64), leaf(16, 1, 64)), [leaf(64, 64, seed=s) for s in range(4)]
    quaternion = [saved_bytes(lambda: f(parts, *weights)) for f in (sspa.quaternion_linear_reference, sspa.quaternion_linear_fused)]
    assert 2 * quaternion[1] < quaternion[0]


# --- the whole --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small():
    """A tiny CLIP in float64 and features of two photos: (clip, x0, X, targets, arguments of SSPA)."""
    clip = data.load_clip("scenes")
    clip.model.double()
    images = torch.stack([data.load_photo(clip, ("train", n)) for n in range(3)]).double()
    with torch.no_grad():
        x0, X = sspa.image_features(clip.model.visual, images)
    tokens = clip.tokenizer([f"X X X X {name}." for name in scenes.NAMES[:5]])
    knowledge = torch.randn(5, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return clip, images, (x0, X), torch.tensor([[1, 0, -1, 0, 1], [0] * 5, [-1] * 5]), (clip.model, tokens, knowledge, None)


def model_of(small, impl="fused", **changes):
    config = dataclasses.replace(sspa.parse(["--cpu", "--tune-image", "none"]), impl=impl, **changes)
    return sspa.SSPA(config, *small[4], 0).double().eval()


@pytest.mark.parametrize("changes", [{}, *sspa.ABLATIONS.values(), {"attention_scale": 0.0, "quaternion_readout": "mean", "quaternion_layers": 3, "quaternion_activation": "gelu"}], ids=str)
def test_whole_model_fused_equals_reference(small, monkeypatch, changes):
    """Loss, gradients of everything learned, logits; one state_dict for both. Losses run in float64 here, not in float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    models = [model_of(small, impl, **changes) for impl in ("reference", "fused")]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    losses = [model(small[2], small[3]) for model in models]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-11)
    gradients = [dict(zip(model.learned(), torch.autograd.grad(loss, list(model.learned().values())))) for model, loss in zip(models, losses)]
    assert gradients[0].keys() == gradients[1].keys() and all(g.abs().sum() > 0 for g in gradients[0].values())
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-7, atol=1e-10)
    with torch.no_grad():
        one, two = (model(small[2], explain=True) for model in models)
        for a, b in zip(one, two):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        # the loss is that of the logits
        logits = [z for z in one[:2] if z is not None]
        torch.testing.assert_close(sum(sspa.asymmetric_loss_reference(z, small[3]) for z in logits), losses[0].detach())
        torch.testing.assert_close(sspa.branch_scores(one), sum(torch.sigmoid(z) for z in logits) / len(logits))


def test_a_tuned_tower_gets_gradients_and_a_frozen_one_none(small):
    model = model_of(small)
    assert not any(name.startswith("clip.") for name in model.learned())
    model.clip.visual.requires_grad_(True)
    model.float()
    images, targets = small[1].float(), small[3]
    loss = model(images, targets)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.clip.visual.parameters())
    assert all(p.grad is None for p in model.clip.transformer.parameters())  # the text encoder stays frozen
    frozen = [t.detach() for t in sspa.image_features(model.clip.visual, images)]
    torch.testing.assert_close(loss.detach(), model(tuple(frozen), targets).detach())
    model.clip.visual.requires_grad_(False)
    model.zero_grad()
    small[0].model.double()


def test_logits_do_not_depend_on_the_rest_of_the_batch(small):
    model = model_of(small)
    with torch.no_grad():
        together, alone = model(small[2]), model(tuple(t[1:2] for t in small[2]))
        for a, b in zip(together[:2], alone[:2]):
            torch.testing.assert_close(a[1:2], b, rtol=1e-4, atol=1e-5)


def test_augmented_photo_is_seeded_and_normalised():
    clip = data.load_clip("scenes")
    one, two, other = (data.load_photo(clip, ("train", 0), (np.random.default_rng(seed), 0.5)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other) and one.shape == (3, 64, 64)
    whole = data.load_photo(clip, ("train", 0))
    assert abs(one.mean() - whole.mean()) < 0.3 and isinstance(data.load_photo(clip, "/no/such.jpg"), str)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 128 * 256, np.uint16)).save(tmp_path / "deep.png")
    assert np.unique(np.asarray(data.open_photo(tmp_path / "deep.png"))) == [128]


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (3, 3)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "I;16"])
def test_odd_photos_are_read(tmp_path, size, mode):
    """1 x 1000 pixels, greyscale, CMYK, palette, alpha, 16 bits; plain and augmented."""
    path = tmp_path / ("photo.tif" if mode in ("CMYK", "I;16") else "photo.png")
    Image.new(mode, size).save(path)
    clip = data.load_clip("scenes")
    for augment in (None, (np.random.default_rng(0), 0.5)):
        image = data.load_photo(clip, path, augment)
        assert not isinstance(image, str) and image.shape == (3, 64, 64) and image.isfinite().all()


def test_every_setting_is_read():
    """No dead option: every field of Config is used outside its own declaration."""
    source = inspect.getsource(sspa).split("class Diverged")[1]
    for name in (field.name for field in dataclasses.fields(sspa.Config)):
        assert f"config.{name}" in source or f'"{name}"' in source or f"changed.{name}" in source, name


def test_scripts_do_not_import_each_other():
    for one, other in ((sspa, "adapter_rp"), (adapter_rp, "sspa")):
        assert f"import {other}" not in inspect.getsource(one) and "llm_text" not in [line.split()[1] for line in inspect.getsource(one).splitlines() if line.startswith(("import ", "from "))]
