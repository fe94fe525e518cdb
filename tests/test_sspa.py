"""sspa.py: fast paths against the formulas, formulas by hand, counted work, where labels are seen, what every option does,
and learning itself."""
import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

import adapter_rp
import data
import embed
import metrics
import pictures
import run
import scenes
import sspa
from test_adapter_rp import (EXPONENTS, called_pairs, deciding_options, leaf, marked_constants, outcome, same, saved_bytes,
                             targets_of, with_constant_changed, words_with, write_files)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def config_of(*words):
    config = run.parse(sspa.Config, ["--quiet", "--workers", "0", *words], "")
    return dataclasses.replace(config, lr=config.lr or 6e-3, precision="fp32", tune_image=config.tune_image or "none")


@pytest.mark.parametrize("name", ["encode_prompts", "quaternion_linear", "asymmetric_loss", "soft_aggregate"])
def test_reference_and_fused_have_one_signature(name):
    assert inspect.signature(getattr(sspa, f"{name}_reference")) == inspect.signature(getattr(sspa, f"{name}_fused"))


# --- image encoder ----------------------------------------------------------------------------------------------------

def self_attending(clip):
    """A ResNet's random attention pool looks everywhere alike; here each position looks at what is like itself."""
    if pool := getattr(clip.model.visual, "attnpool", None):
        for projection in (pool.q_proj, pool.k_proj):
            torch.nn.init.eye_(projection.weight).mul_(20)
        torch.nn.init.normal_(pool.positional_embedding, generator=torch.Generator().manual_seed(0))
    return clip


@pytest.mark.parametrize("backbone, resolution, regions", [("scenes", None, 64), ("scenes", 96, 144), ("tiny-ViT", None, 16),
                                                           ("tiny-ResNet", None, 16), ("tiny-ResNet", 192, 36)])
def test_global_feature_is_open_clips_own(files, backbone, resolution, regions):
    """x0 is what encode_image gives, at every resolution; as many regions as patches or cells, and not all alike."""
    clip = self_attending(embed.load_clip(backbone, None if backbone == "scenes" else "none", resolution=resolution))
    images = torch.stack([embed.load_photo(clip, ("test", index)) for index in range(2)])
    with torch.no_grad():
        x0, X = sspa.image_features(clip.model.visual, images)
        torch.testing.assert_close(x0, clip.model.encode_image(images), rtol=1e-4, atol=1e-5)
    assert X.shape == (2, regions, x0.shape[1]) and X.std(1).mean() > 0.01 * X.std()


@pytest.mark.parametrize("backbone, side", [("scenes", 8), ("tiny-ViT", 4), ("tiny-ResNet", 4)])
def test_a_patch_is_seen_where_it_is(files, tmp_path, backbone, side):
    """A dark patch at a quarter of the height, three quarters of the width (a mirrored, flipped or transposed map would
    put it elsewhere). The region there changes most; and a model whose label and attentions ask for that region's feature
    shows it there in all three maps of --explain's picture."""
    clip = self_attending(embed.load_clip(backbone, None if backbone == "scenes" else "none"))
    row, column, cell = side // 4, side - 2, clip.image_size[0] // side
    pixels = np.full((2, side * cell, side * cell, 3), 128, np.uint8)
    pixels[1, row * cell:(row + 1) * cell, column * cell:(column + 1) * cell] = 0
    for name, picture in zip(("plain.png", "patch.png"), pixels, strict=True):
        Image.fromarray(picture).save(tmp_path / name)
    images = torch.stack([embed.load_photo(clip, tmp_path / name) for name in ("plain.png", "patch.png")])
    with torch.no_grad():
        plain, patch = sspa.image_features(clip.model.visual, images)[1]
    there = int((patch - plain).norm(dim=-1).argmax())
    assert there == row * side + column

    config = config_of("--fusion", "sum", "--alignment", "s-to-v", "--cpu")
    words, feature = torch.zeros(4, clip.model.token_embedding.embedding_dim), F.normalize(patch[there], dim=0)
    labels = sspa.Labels(["patch"], ["patch"], clip.tokenizer(["X X X X patch."]), feature[None], words)
    model = sspa.SSPA(config, clip.model, labels, 0)
    with torch.no_grad():
        model.dsf.bias.copy_(20 * feature)
        model.directions["s-to-v"].gate_query.copy_(feature[:, None].expand(-1, len(feature)))
        model.directions["s-to-v"].gate_attended.zero_()
    sspa.explain(dataclasses.replace(config, explain=(tmp_path / "patch.png",)), clip, model, ["patch"], CPU, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "explain/000_patch.png"), np.float32)
    photo = scipy.ndimage.center_of_mass(sheet.max(-1) < 8)  # all else on the sheet is brighter
    warmth = sheet[..., 0] - sheet[..., 2]  # the photo is grey, and the map orange
    spots, count = scipy.ndimage.label(warmth > 0.98 * warmth.max())
    found = np.array(scipy.ndimage.center_of_mass(spots > 0, spots, range(1, count + 1))) - photo
    pitch = pictures.TILE + pictures.GAP
    beside, below = found[np.abs(found[:, 0]) < pitch / 2], found[np.abs(found[:, 1]) < pitch / 2]
    assert count == 3 and len(below) == 1, found
    near = pictures.TILE / side / 3
    assert np.abs(beside - [[0, pitch], [0, 2 * pitch]]).max() < near, found  # similarity, DSF attention
    assert abs(below[0, 1]) < near and pitch < below[0, 0] < pitch + 60, found  # S-to-V gate; lines of text between


# --- KAP, CAP, global prompts, DSF ------------------------------------------------------------------------------------

def test_knowledge_texts(capsys):
    clip = embed.load_clip("scenes")
    texts = sspa.knowledge_texts(clip, ["boat", "cup"], {"boat": "Boat is a hull."})
    assert texts == ["Boat is a hull. A photo of a boat.", "A photo of a cup."] and not capsys.readouterr().err
    long, = sspa.knowledge_texts(clip, ["boat"], {"boat": "word " * 100})
    assert long.endswith("word A photo of a boat.") and len(clip.tokenizer.encode(long)) + 2 == clip.tokenizer.context_length
    assert "1 descriptions cut to 40 tokens: boat" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["scenes", "voc2007", "coco2014"])
def test_shipped_descriptions_fit(dataset, capsys):
    """A sentence a label, in the manner of the figure, within CLIP's 77 tokens together with the template."""
    content, names = json.loads((data.ASSETS / f"descriptions/{dataset}.json").read_text()), data.label_names(dataset)
    assert list(content["descriptions"]) == names and "language model" in content["source"]
    tokenizer = embed.import_open_clip().SimpleTokenizer()
    texts = sspa.knowledge_texts(embed.Clip(*[None] * 8)._replace(tokenizer=tokenizer), names, content["descriptions"])
    assert not capsys.readouterr().err
    assert all("often found" in text and text.lower().startswith(name) for name, text in zip(names, texts, strict=True))


@pytest.mark.parametrize("backbone", ["scenes", "tiny-ViT"])
def test_prompts_equal_open_clips_encode_text(files, backbone):
    """With the context set to the embeddings of "a photo of a", both give what encode_text gives for the same words."""
    clip = embed.load_clip(backbone, None if backbone == "scenes" else "none")
    names = ["dog", "potted plant", "hair drier", "a b c d e f g h"]
    words, tokens = (clip.tokenizer([f"{start} {name}." for name in names]) for start in ("a photo of a", "X X X X"))
    with torch.no_grad():
        contexts = clip.model.token_embedding(words[0, 1:5])[None].repeat(3, 1, 1)
        contexts[:2] = contexts[0].flip(0)
        expected = clip.model.encode_text(words)
        for encode in (sspa.encode_prompts_reference, sspa.encode_prompts_fused):
            found = encode(clip.model, contexts, tokens)
            torch.testing.assert_close(found[2], expected, rtol=0, atol=1e-5)
            assert found.shape == (3, *expected.shape) and (found[0] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("backbone", ["scenes", "tiny-ViT"])
@pytest.mark.parametrize("sets, length, names", [(2, 4, ["dog", "traffic light", "x"]), (1, 1, ["a"]),
                                                 (3, 16, ["giraffe", "tv monitor"]), (2, 4, ["very " * 60 + "long"])])
def test_prompts_fused_equal_reference(files, backbone, sets, length, names):
    """Among them one label, one context vector, and a name that is cut at the encoder's length."""
    clip = embed.load_clip(backbone, None if backbone == "scenes" else "none")
    model, tokens = clip.model.double(), clip.tokenizer([" ".join(["X"] * length) + f" {name}." for name in names])
    pair = [lambda contexts, f=f: f(model, contexts, tokens)
            for f in (sspa.encode_prompts_reference, sspa.encode_prompts_fused)]
    contexts = leaf(sets, length, model.token_embedding.embedding_dim, scale=0.1)
    same(*pair, [contexts])
    assert torch.autograd.gradcheck(pair[1], [contexts], fast_mode=True)


def test_prompt_tokens_counted():
    """Tokens that go through the layers' feed-forward parts, COCO's labels: all 40 positions of each, against
    1 + L + C (longest - 1 - L) a set, and in the last layer one a label."""
    clip, names, counted = embed.load_clip("scenes"), data.label_names("coco2014"), []
    tokens, layers, classes = clip.tokenizer([f"X X X X {name}." for name in names]), 2, len(names)
    for block in clip.model.transformer.resblocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: counted.append(inputs[0].shape[:-1].numel()))
    contexts, longest = leaf(2, 4, 96, dtype=torch.float32), int(tokens.argmax(-1).max()) + 1
    sspa.encode_prompts_reference(clip.model, contexts, tokens)
    assert sum(counted) == 2 * layers * classes * 40
    counted.clear()
    sspa.encode_prompts_fused(clip.model, contexts, tokens)
    assert sum(counted) == (layers - 1) * 2 * (5 + classes * (longest - 5)) + 2 * classes


def test_dsf_by_hand():
    """Two regions e1, e2; prompt e2 and a layer that turns it to e1; scale log 3: attention 3/4 and 1/4 = T_ca. With a
    bias of e2 both regions are asked for alike."""
    eye, turn = torch.eye(2, dtype=torch.float64), torch.tensor([[0.0, 1], [1, 0]], dtype=torch.float64)
    for bias, expected in (([0.0, 0], [0.75, 0.25]), ([0.0, 1], [0.5, 0.5])):
        bias, expected = torch.tensor(bias, dtype=torch.float64), torch.tensor([[expected]], dtype=torch.float64)
        for found in sspa.dynamic_semantic_filtering(eye[1:], eye[None], turn, bias, math.log(3)):
            torch.testing.assert_close(found, expected)


# --- QSM --------------------------------------------------------------------------------------------------------------

QUATERNION_LAYERS = [sspa.quaternion_linear_reference, sspa.quaternion_linear_fused]


def hamilton(a, b):
    """The product of two quaternions [4], written out from i^2 = j^2 = k^2 = ijk = -1."""
    (a1, b1, c1, d1), (a2, b2, c2, d2) = a, b
    return torch.stack([a1 * a2 - b1 * b2 - c1 * c2 - d1 * d2, a1 * b2 + b1 * a2 + c1 * d2 - d1 * c2,
                        a1 * c2 - b1 * d2 + c1 * a2 + d1 * b2, a1 * d2 + b1 * c2 - c1 * b2 + d1 * a2])


@pytest.mark.parametrize("layer", QUATERNION_LAYERS)
def test_quaternion_units(layer):
    """The table: weight times input, on the left i, j, k."""
    one, i, j, k = torch.eye(4, dtype=torch.float64)
    table = ((i, i, -one), (j, j, -one), (k, k, -one), (i, j, k), (j, k, i), (k, i, j), (j, i, -k), (k, j, -i), (i, k, -j))
    for weight, given, product in table:
        torch.testing.assert_close(hamilton(weight, given), product)
        found = layer(given[:, None, None].unbind(), *weight[:, None, None])
        torch.testing.assert_close(found[0], product)


@pytest.mark.parametrize("layer", QUATERNION_LAYERS)
def test_quaternion_layer_is_a_sum_of_hamilton_products(layer):
    """Each input quaternion times its weight quaternion, multiplied by hand and summed; |ab| = |a||b|."""
    rows, n, m = 5, 3, 2
    x, weights = leaf(4, rows, n).detach(), leaf(4, n, m, seed=1).detach()
    expected = torch.zeros(rows, 4, m, dtype=torch.float64)
    for row, q, p in np.ndindex(rows, n, m):
        product = hamilton(weights[:, q, p], x[:, row, q])
        assert product.norm() == pytest.approx((weights[:, q, p].norm() * x[:, row, q].norm()).item())
        expected[row, :, p] += product
    torch.testing.assert_close(layer(x.unbind(), *weights), expected.flatten(1))


@pytest.mark.parametrize("B, C, n", [(1, 1, 1), (3, 5, 4), (2, 7, 3)])
@pytest.mark.parametrize("zero", [0, 2, None])
@pytest.mark.parametrize("bias", [True, False])
def test_quaternion_fused_equals_reference(B, C, n, zero, bias):
    """Components that vary with the label, with both, with the image, with nothing; one of them zero."""
    parts = [leaf(C, n), leaf(B, C, n, seed=1), leaf(B, 1, n, seed=2), leaf(n, seed=3)]
    given = [part for place, part in enumerate(parts) if place != zero]
    weights = [leaf(n, 2, seed=seed) for seed in range(4, 8)] + ([leaf(8, seed=8)] if bias else [])

    def with_zero(layer):
        def call(*tensors):
            components = iter(tensors[:len(given)])
            return layer(tuple(None if place == zero else next(components) for place in range(4)), *tensors[len(given):])
        return call
    same(*map(with_zero, QUATERNION_LAYERS), [*given, *weights])
    assert torch.autograd.gradcheck(with_zero(sspa.quaternion_linear_fused), [*given, *weights], fast_mode=True)


def test_quaternion_init_moments():
    """Real weight: variance 2 s^2; each imaginary one 2 s^2 / 3; means 0; squared modulus s^2 chi(4)^2: mean 4 s^2."""
    r, *imaginary = weights = sspa.quaternion_init(600, 400, torch.Generator().manual_seed(0))
    s2, squared = 1 / (2 * 1000), sum(weight ** 2 for weight in weights)
    assert r.var().item() == pytest.approx(2 * s2, rel=0.01)
    for weight in imaginary:
        assert weight.var().item() == pytest.approx(2 * s2 / 3, rel=0.02) and abs(weight.mean().item()) < 1e-3
    assert squared.mean().item() == pytest.approx(4 * s2, rel=0.01)
    assert (squared ** 2).mean().item() == pytest.approx(24 * s2 ** 2, rel=0.02)


# --- GDMA -------------------------------------------------------------------------------------------------------------

ALIGNMENTS = [sspa.gated_alignment_reference, sspa.gated_alignment_fused]


def direction(d, seed, gate=True):
    """Random weights of one direction, in GatedAttention's order."""
    matrices = [leaf(d, d, seed=seed + place, scale=d ** -0.5) for place in range(5 if gate else 3)]
    return [*matrices[:3], leaf(seed=seed + 5), *matrices[3:], *([leaf(d, seed=seed + 6)] if gate else [])]


def aligned(alignment, T, X, *weights):
    """An alignment as a function of tensors alone; eight weights mean that there is no gate."""
    half, pad = len(weights) // 2, [None] * (7 - len(weights) // 2)
    found = alignment(T, X, *(sspa.GatedAttention(*part, *pad) for part in (weights[:half], weights[half:])))
    return tuple(tensor for tensor in found if tensor is not None)


@pytest.mark.parametrize("B, C, M, d", [(2, 3, 7, 5), (1, 1, 1, 4), (2, 1, 6, 3), (3, 6, 1, 3), (2, 9, 4, 3), (2, 5, 5, 6)])
@pytest.mark.parametrize("gate", [True, False])
def test_gated_alignment_fused_equals_reference(B, C, M, d, gate):
    """Fewer labels than regions and more, so that every order of products is met."""
    inputs = [leaf(B, C, d), leaf(B, M, d, seed=1), *direction(d, 10, gate), *direction(d, 20, gate)]
    pair = [lambda *tensors, f=f: aligned(f, *tensors) for f in ALIGNMENTS]
    same(*pair, inputs)
    assert torch.autograd.gradcheck(pair[1], inputs, fast_mode=True)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_gated_alignment_by_hand(alignment):
    """Label e1, region e2; queries and keys say nothing of one region; values turn it to e1 + e2. Gate of channel 1: bias
    log 3, so 3/4; of channel 2: a[2] = 1 weighs -log 3, so 1/4. T_fn = e1 + (3/4, 1/4)."""
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    value, attended = torch.tensor([[0.0, 0], [1, 1]]).double(), torch.tensor([[0.0, 0], [0, -math.log(3)]]).double()
    bias = torch.tensor([math.log(3), 0]).double()
    weights = sspa.GatedAttention(eye, eye, value, torch.tensor(1.0).double(), zero, attended, bias)
    labels, regions, gate, none = alignment(eye[None, :1], eye[None, 1:], weights, None)
    torch.testing.assert_close(gate, torch.tensor([[[0.75, 0.25]]]).double())
    torch.testing.assert_close(labels, torch.tensor([[[1.75, 0.25]]]).double())
    assert torch.equal(regions, eye[None, 1:]) and none is None


def multiplications(function):
    """Multiplications in the matrix products of function(), as PyTorch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def test_multiplications_counted():
    """GDMA with few labels: each side has five d x d products a row, the fused path one a region and nine a label, and one
    more of attention with values. Quaternion layer 1: B C rows of four components, against C + B C + B rows of one."""
    B, C, M, d = 2, 3, 50, 8
    inputs = [leaf(B, C, d), leaf(B, M, d, seed=1), *direction(d, 10), *direction(d, 20)]
    reference, fused = (multiplications(lambda f=f: aligned(f, *inputs)) for f in ALIGNMENTS)
    assert reference == B * (5 * (C + M) * d * d + 4 * C * M * d)
    assert fused == B * ((9 * C + M) * d * d + 5 * C * M * d)
    parts, weights = (None, leaf(C, d), leaf(B, C, d), leaf(B, 1, d)), [leaf(d, d, seed=seed) for seed in range(4)]
    reference, fused = (multiplications(lambda f=f: f(parts, *weights)) for f in QUATERNION_LAYERS)
    assert reference == B * C * 4 * d * 4 * d and fused == (C + B * C + B) * d * 4 * d


# --- losses and the soft aggregator -----------------------------------------------------------------------------------

@pytest.mark.parametrize("exponents", EXPONENTS)
def test_the_two_scripts_hold_the_same_loss(exponents):
    """They never import each other: values and gradients of their copies agree, and so does what is not their defaults."""
    logits, targets = leaf(7, 11, scale=4), targets_of(7, 11)
    same(sspa.asymmetric_loss_reference, sspa.asymmetric_loss_fused, [logits], [targets, *exponents])
    for name in ("asymmetric_loss_reference", "asymmetric_loss_fused"):
        pair = [getattr(script, name) for script in (adapter_rp, sspa)]
        same(*pair, [logits], [targets, *(exponents or (3.0, 0.5, 0.1))], rtol=0, atol=0)
    for name in ("_asymmetric_in_place", "_AsymmetricLoss"):
        assert inspect.getsource(getattr(sspa, name)) == inspect.getsource(getattr(adapter_rp, name))


AGGREGATES = [sspa.soft_aggregate_reference, sspa.soft_aggregate_fused]
LOSSES = [sspa.soft_aggregate_loss_reference, sspa.soft_aggregate_loss_fused]
TEMPERATURE = 0.3


def number(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def aggregate_loss(loss, exponents=()):
    """soft_aggregate_loss_* as a function of what learns, and targets."""
    return lambda T, X, scale, bias, targets: loss(T, X, TEMPERATURE, scale, bias, targets, *exponents)


@pytest.mark.parametrize("block", [1, 20, 37, 2 ** 18])
@pytest.mark.parametrize("B, C, M, d", [(1, 1, 1, 3), (3, 5, 7, 6), (4, 1, 9, 2), (2, 13, 1, 5)])
def test_soft_aggregate_fused_equals_reference(monkeypatch, block, B, C, M, d):
    """Blocks of samples, and of labels; the loss at its default exponents and others; frozen regions."""
    monkeypatch.setattr(sspa, "AGGREGATOR_BLOCK", block)
    T, X, scale, bias, targets = leaf(B, C, d), leaf(B, M, d, seed=1), number(7.0), number(-1.5), targets_of(B, C)
    same(*(lambda T, X, scale, f=f: f(T, X, TEMPERATURE, scale) for f in AGGREGATES), [T, X, scale])
    for exponents in ((), (4.0, 1.0, 0.05)):
        same(*(aggregate_loss(f, exponents) for f in LOSSES), [T, X, scale, bias], [targets])
    fused = aggregate_loss(LOSSES[1])
    assert torch.autograd.gradcheck(lambda *t: fused(*t, targets), [T, X, scale, bias], fast_mode=True)
    frozen = [tensor.detach() for tensor in (X, scale, bias)]
    same(*(lambda T, f=f: aggregate_loss(f)(T, *frozen, targets) for f in LOSSES), [T])
    loss = fused(T, X, scale, bias, targets)
    once = torch.autograd.grad(loss, [T, X], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, [T, X]), tuple(3 * gradient for gradient in once))


@pytest.mark.parametrize("temperature, scale", [(0.07, 1e4), (1e-3, 1e4), (1e3, 1e-3)])
def test_soft_aggregate_extremes(temperature, scale):
    """Logits of +-1e4, features of length 1e6 and 1e-6, a zero region, a softmax that is a maximum or a mean."""
    T, X, scale, bias, targets = leaf(2, 5, 3), leaf(2, 4, 3, seed=1), number(scale), number(0.0), targets_of(2, 5)
    with torch.no_grad():
        T[0, 0], T[0, 1], X[0, 2] = T[0, 0] * 1e6, T[0, 1] * 1e-6, 0
    same(*(lambda *t, f=f: f(t[0], t[1], temperature, t[2]) for f in AGGREGATES), [T, X, scale], rtol=1e-6, atol=1e-7)
    same(*(lambda *t, f=f: f(t[0], t[1], temperature, *t[2:], targets) for f in LOSSES), [T, X, scale, bias],
         rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("aggregator, expected", [("soft", 6.0), ("mean", 4.0), ("max", 8.0)])
def test_aggregators_by_hand(small, impl, aggregator, expected):
    """A label along e1, regions along e1 and e2 of any length: cosines 1 and 0. Temperature 1 / log 3: weights 3/4 and
    1/4; scale 8."""
    model = model_of(small, impl, aggregator=aggregator, temperature=1 / math.log(3))
    label, regions = torch.tensor([[[5.0, 0]]]).double(), torch.tensor([[[2.0, 0], [0, 0.1]]]).double()
    found = model.aggregate(label, regions, model.temperature, 8.0)
    torch.testing.assert_close(found, torch.tensor([[expected]]).double())


def test_fused_keeps_less():
    """Counted bytes for the backward pass: the loss its gradients alone, of the inputs' size; quaternion layer 1 less than
    half, for it concatenates nothing."""
    T, X = leaf(4, 300, 64, dtype=torch.float32), leaf(4, 196, 64, dtype=torch.float32)
    targets, scalars = torch.zeros(4, 300, dtype=torch.int8), (torch.tensor(20.0), torch.tensor(-3.0))
    reference, fused = (saved_bytes(lambda f=f: f(T, X, 0.1, *scalars, targets)) for f in LOSSES)
    assert fused < T.nbytes + X.nbytes + 1000 and reference > 4 * 300 * 196 * 4 * 3
    parts = (None, leaf(80, 64), leaf(16, 80, 64, seed=1), leaf(16, 1, 64, seed=2))
    weights = [leaf(64, 64, seed=seed) for seed in range(4)]
    reference, fused = (saved_bytes(lambda f=f: f(parts, *weights)) for f in QUATERNION_LAYERS)
    assert 2 * fused < reference


# --- the whole --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small():
    """The scenes' CLIP in float64, Labels of five, and three pictures: (clip, labels, images, (x0, X), targets)"""
    clip = embed.load_clip("scenes")
    clip.model.double()
    images = torch.stack([embed.load_photo(clip, ("train", index)) for index in range(3)]).double()
    with torch.no_grad():
        features = sspa.image_features(clip.model.visual, images)
        words = clip.model.token_embedding(clip.tokenizer(["a photo of a"]))[0, 1:5]
    names = scenes.NAMES[:5]
    labels = sspa.Labels(names, names, clip.tokenizer([f"X X X X {name}." for name in names]), leaf(5, 96).detach(), words)
    return clip, labels, images, features, torch.tensor([[1, 0, -1, 0, 1], [0] * 5, [-1] * 5])


def model_of(small, impl="fused", **changes):
    (clip, labels), config = small[:2], dataclasses.replace(config_of(), impl=impl, **changes)
    prompts = [" ".join(["X"] * config.context_length) + f" {name}." for name in labels.names]
    return sspa.SSPA(config, clip.model, labels._replace(tokens=clip.tokenizer(prompts)), 0).double()


CHANGES = [{}, *(change for change in sspa.ABLATIONS.values() if "descriptions" not in change),
           {"attention_scale": 0.0, "quaternion_layers": 3, "context_length": 7}, {"quaternion_layers": 1, "context_length": 1}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_whole_model_fused_equals_reference(small, monkeypatch, changes):
    """Loss, gradients of all that learns, all outputs; one state_dict. The loss is that of the logits, by the formula."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # losses too run in float64 here
    features, targets = small[3:]
    models = [model_of(small, impl, regional_weight=0.7, gamma_neg=3.0, clip=0.05, **changes)
              for impl in ("reference", "fused")]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    losses = [model(*features, targets) for model in models]
    gradients = [dict(zip(model.learned(), torch.autograd.grad(loss, model.learned().values()), strict=True))
                 for model, loss in zip(models, losses, strict=True)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-10)
    assert "branches" in changes or all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    with torch.no_grad():
        one, two = (model(*features) for model in models)
    torch.testing.assert_close([tensor for tensor in two if tensor is not None],
                               [tensor for tensor in one if tensor is not None], rtol=1e-7, atol=1e-9)
    weights = {"both": (1, 0.7), "global": (1, 0), "regional": (0, 0.7)}[changes.get("branches", "both")]
    expected = sum(weight * sspa.asymmetric_loss_reference(logits, targets, 3.0, 0.0, 0.05)
                   for weight, logits in zip(weights, one[:2], strict=True))
    torch.testing.assert_close(losses[0].detach(), expected)


def test_scores_by_hand_and_of_each_picture_alone(small):
    """Logits log 3 and 0: scores 3/4 and 1/2, mean 5/8. What is beside a picture in the batch does not matter."""
    logits = torch.tensor([[math.log(3)]]), torch.tensor([[0.0]])
    for branches, expected in (("both", 0.625), ("global", 0.75), ("regional", 0.5)):
        assert sspa.branch_scores(branches, *logits).item() == pytest.approx(expected)
    model, (x0, X) = model_of(small), small[3]
    with torch.no_grad():
        together, alone = model(x0, X), model(x0[1:2], X[1:2])
    for one, other in zip(together[:4], alone[:4], strict=True):
        torch.testing.assert_close(one[1:2], other, rtol=1e-4, atol=1e-5)


def test_what_learns_and_how_fast():
    """The text tower never; the image tower when tuned, at a tenth; context vectors at their own rate."""
    clip, config = embed.load_clip("scenes"), config_of("--tune-image", "full", "--lr", "0.02", "--prompt-lr", "0.003")
    model = sspa.SSPA(config, clip.model, sspa.labels_of(dataclasses.replace(config, cache=None), clip, ["sun"]), 0)
    images = torch.stack([embed.load_photo(clip, ("train", index)) for index in range(2)])
    model(*sspa.image_features(clip.model.visual, images), torch.tensor([[1], [0]])).backward()
    rates = {id(parameter): group["peak"] for group in sspa.optimiser_of(config, model).param_groups
             for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        kind = "image" if name.startswith("clip.visual.") else "text" if name.startswith("clip.") else name
        rate = rates.get(id(parameter))
        assert rate == {"image": pytest.approx(0.002), "text": None, "contexts": 0.003}.get(kind, 0.02), name
        assert (parameter.grad is None) == (kind == "text") and (rate is None or parameter.grad.isfinite().all()), name


# --- training ---------------------------------------------------------------------------------------------------------

def loaded(cache, *words):
    """(config, clip, inputs) of a command line with a frozen tower."""
    config, clip = config_of("--cache", cache, *words), embed.load_clip("scenes")
    return config, clip, sspa.load_inputs(config, clip, sspa.labels_of(config, clip, sspa.names_of(config)))


def test_training_starts_at_the_prior_and_averages_the_weights(cache, tmp_path):
    """At the start the sigmoid of the mean logit is PRIOR. The model is the average of the weights after each of six steps,
    each decayed by 1/10, 2/11, 0.25, 0.25 ..., the warm-up capped by --ema."""
    config, clip, inputs = loaded(cache, "--limit", "48", "--batch-size", "16", "--epochs", "2", "--ema", "0.25")
    start, after = sspa.SSPA(config, clip.model, inputs.labels, 0), []
    sspa.set_biases(config, clip, start, inputs.train, CPU)
    with torch.no_grad():
        for logits in start(inputs.train.x0, inputs.train.X)[:2]:
            assert torch.sigmoid(logits.mean()).item() == pytest.approx(sspa.PRIOR, rel=1e-4)
    expected = {name: parameter.detach().clone() for name, parameter in start.learned().items()}

    def keep(optimiser, *_):
        after.append({id(p): p.detach().clone() for group in optimiser.param_groups for p in group["params"]})
    hook = register_optimizer_step_post_hook(keep)
    model, _ = sspa.train(config, clip, inputs, 0, CPU, tmp_path, "")
    hook.remove()
    assert len(after) == 6
    for decay, weights in zip((1 / 10, 2 / 11, 0.25, 0.25, 0.25, 0.25), after, strict=True):
        for name, parameter in model.learned().items():
            expected[name] = decay * expected[name] + (1 - decay) * weights[id(parameter)]
    torch.testing.assert_close({name: parameter.detach() for name, parameter in model.learned().items()}, expected)


def test_learning_rate_warms_up_and_falls():
    """5 of 100 steps rise in equal parts; half of it is left at the middle, next to nothing at the end."""
    rates = [sspa.warm_up_then_cosine(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=0.01) and max(rates) == rates[4]
    assert rates[50] == pytest.approx(0.5) and rates[99] < 0.001


def test_impl_switches_everything_and_learns_the_same(monkeypatch, cache, tmp_path):
    called, learned = called_pairs(monkeypatch, sspa), []
    parts = ("encode_prompts", "quaternion_linear", "gated_alignment", "asymmetric_loss", "soft_aggregate",
             "soft_aggregate_loss")
    for impl, other in (("reference", "fused"), ("fused", "reference")):
        config, clip, inputs = loaded(cache, "--limit", "48", "--batch-size", "16", "--epochs", "1", "--impl", impl)
        called.clear()
        model, _ = sspa.train(config, clip, inputs, 0, CPU, tmp_path, impl)
        assert {f"{part}_{impl}" for part in parts} <= called
        assert {name for name in called if name.endswith(other)} <= {"gated_alignment_reference"}  # both are its arrows
        learned.append({name: parameter.detach() for name, parameter in model.learned().items()})
    torch.testing.assert_close(learned[1], learned[0], rtol=2e-3, atol=2e-4)


def test_features_that_are_not_kept_give_the_same(monkeypatch, cache, tmp_path):
    """Beyond CACHE_LIMIT photos are encoded in every epoch: only half precision is lost where features are kept."""
    words, found = ["--tune-image", "none", *USUAL.split(), "--cache", cache], []
    for gib in (sspa.CACHE_LIMIT, 0.0):
        monkeypatch.setattr(sspa, "CACHE_LIMIT", gib)
        found.append(outcome(sspa, words, tmp_path / str(gib)))
    assert found[1]["losses"] != found[0]["losses"] == pytest.approx(found[1]["losses"], rel=1e-3)


# --- options and marked constants -------------------------------------------------------------------------------------

USUAL = "--limit 24 --epochs 2 --batch-size 8"
CHANGED = {  # another value of every option that decides a result
    "dataset": "folder", "data_root": "{}/b", "policy": "split_seed=1", "labels": "{}/labels.txt", "limit": 16,
    "backbone": "tiny-ViT", "pretrained": "none", "resolution": 96, "precision": "bf16", "lr": 2e-3, "epochs": 3,
    "batch_size": 16, "seed": 1, "impl": "reference", "descriptions": "{}/descriptions.json", "tune_image": "full",
    "context_length": 3, "attention_scale": 5, "no_dsf": True, "fusion": "sum", "quaternion_layers": 1,
    "alignment": "v-to-s", "no_gate": True, "aggregator": "mean", "temperature": 0.2, "branches": "regional",
    "gamma_neg": 1, "clip": 0.05, "regional_weight": 2, "prompt_lr": 0.01, "image_lr_factor": 0.5, "ema": 0.1,
    "ablate": "no gate|prompts summed"}
FOLDER = "--dataset folder --data-root {}/a --backbone scenes --descriptions none"
TUNED = "--tune-image full --limit 8 --batch-size 4"
BESIDE = {"dataset": "--data-root {}/a --backbone scenes --descriptions none", "data_root": FOLDER, "policy": FOLDER,
          "backbone": "--pretrained none", "tune_image": TUNED.replace("full", "none"), "image_lr_factor": TUNED,
          "CROP_SCALE": TUNED}  # what it needs


def usual(name, files, cache):
    return f"--tune-image none {USUAL} {BESIDE.get(name, '')} --cache {cache}".format(files).split()


@pytest.mark.parametrize("name", deciding_options(sspa))
def test_every_option_changes_something(name, files, cache, tmp_path):
    words, value = usual(name, files, cache), CHANGED[name]
    changed = words_with(name, value.format(files) if isinstance(value, str) else value)
    assert outcome(sspa, words, tmp_path / "usual") != outcome(sspa, [*words, *changed], tmp_path / "changed")


@pytest.mark.parametrize("name", marked_constants(sspa))
def test_every_marked_constant_changes_something(name, files, cache, tmp_path):
    words, changed = usual(name, files, cache), with_constant_changed(sspa, name, tmp_path)
    assert outcome(sspa, words, tmp_path / "usual") != outcome(changed, words, tmp_path / "changed")


def test_every_ablation_is_another_model_that_learns(files, cache, tmp_path):
    """The full method and all ablations, one run each: no two score alike, and every loss falls from epoch to epoch. Run
    again, nothing differs in the last bit: what the two tests above compare with."""
    words = [*usual("", files, cache), "--epochs", "3"]
    found = outcome(sspa, [*words, "--ablate"], tmp_path / "all")
    assert [one["ablation"] for one in found["runs"]] == ["none", *sspa.ABLATIONS]
    assert len({str(one["ap"]) for one in found["runs"]}) == 1 + len(sspa.ABLATIONS)
    losses = np.array(found["losses"]).reshape(-1, 3)
    assert (losses[:, -1] < losses[:, 0]).all(), losses
    alone = outcome(sspa, words, tmp_path / "alone")
    assert alone["tensors"] == found["tensors"] and alone["runs"] == found["runs"][:1]


# --- it learns --------------------------------------------------------------------------------------------------------

def test_a_thousand_pictures_beat_zero_shot(cache, tmp_path):
    """Three seeds, four epochs, a frozen tower, 400 test pictures (measured: 64.7 to 64.9, zero-shot 63.62, untrained 56.2; regional branch
    15 before training, 59.5 to 59.9 after)."""
    config, clip, test = loaded(cache, "--limit", "400", "--batch-size", "16", "--epochs", "4")
    inputs = loaded(cache, "--limit", "1000")[2]._replace(test=test.test)
    for seed in range(3):
        model, _ = sspa.train(config, clip, inputs, seed, CPU, tmp_path, f"seed {seed}")
        result = sspa.evaluate(config, clip, model, inputs, CPU)
        assert result["mAP"] > test.zero_shot_map + 0.6 and result["mAP_regional"] > 50, result
