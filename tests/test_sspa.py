"""sspa.py: fast paths against the formulas, formulas by hand, counted work, where labels are seen, learning. At the end,
for both methods: every option and every marked constant changes something."""
import ast
import functools
import importlib.util
import inspect
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image
from test_adapter_rp import EXPONENTS, leaf, outcome, same, saved_bytes, targets_of, watched
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

import adapter_rp
import data
import embed
import pictures
import run
import scenes
import sspa

CPU, LOG3 = torch.device("cpu"), math.log(3)
tensor = functools.partial(torch.tensor, dtype=torch.float64)


def config_of(words=""):
    config = run.parse(sspa.Config, f"--quiet --workers 0 {words}".split(), "")
    return replace(config, lr=config.lr or 6e-3, precision="fp32", tune_image=config.tune_image or "none")


def load(backbone, **more):
    return embed.load_clip(backbone, None if backbone == "scenes" else "none", **more)


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory):
    """What options point at: two labelled folders of pictures, labels, texts, embeddings; open_clip learns two towers."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for name, first in (("a", 0), ("b", 10)):
        (folder / name).mkdir()
        rows = [f"{index}.png,{index % 2},{index % 3 // 2}" for index in range(first, first + 10)]
        (folder / name / "labels.csv").write_text("\n".join(["file,sun,boat", *rows]))
        for index in range(first, first + 10):
            scenes.picture("test", index)[0].save(folder / name / f"{index}.png")
    (folder / "labels.txt").write_text("sun\nboat\ncar\ntree")
    (folder / "texts.txt").write_text("\n".join(f"a {one} by a {two}" for one in scenes.NAMES for two in scenes.NAMES))
    (folder / "descriptions.json").write_text(json.dumps({name: f"{name} is drawn." for name in scenes.NAMES}))
    features = {"label_names": ["sun", "boat"], "label_embeddings": rng.normal(size=(2, 9))}
    for kind in ("text", "image"):
        features |= {f"{kind}_embeddings": rng.normal(size=(70, 9)), f"{kind}_labels": rng.integers(0, 2, (70, 2))}
    np.savez(folder / "features.npz", **features)
    for name, tower in (("tiny-ViT", {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}),
                        ("tiny-ResNet", {"image_size": 128, "layers": [1, 1, 1, 1], "width": 8})):
        text = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": tower, "text_cfg": text}))
        embed.import_open_clip().add_model_config(folder / f"{name}.json")
    return folder


# --- image encoder ----------------------------------------------------------------------------------------------------

def self_attending(clip):
    """A ResNet's random attention pool looks everywhere alike; now each position looks at what is like itself."""
    if pool := getattr(clip.model.visual, "attnpool", None):
        for projection in (pool.q_proj, pool.k_proj):
            torch.nn.init.eye_(projection.weight).mul_(20)
        torch.nn.init.normal_(pool.positional_embedding, generator=torch.Generator().manual_seed(0))
    return clip


@pytest.mark.parametrize("backbone, resolution, regions", [
    ("scenes", None, 64), ("scenes", 96, 144), ("tiny-ViT", 96, 36), ("tiny-ResNet", None, 16), ("tiny-ResNet", 192, 36)])
def test_global_feature_is_open_clips_own(backbone, resolution, regions):
    """x0 is what encode_image gives, at every resolution; as many regions as patches or cells, and not all alike."""
    clip = self_attending(load(backbone, resolution=resolution))
    images = torch.stack([embed.load_photo(clip, ("test", index)) for index in range(2)])
    with torch.no_grad():
        x0, X = sspa.image_features(clip.model.visual, images)
        torch.testing.assert_close(x0, clip.model.encode_image(images), rtol=1e-4, atol=1e-5)
    assert X.shape == (2, regions, x0.shape[1]) and X.std(1).mean() > 0.01 * X.std()


@pytest.mark.parametrize("backbone, side", [("scenes", 8), ("tiny-ViT", 4), ("tiny-ResNet", 4)])
def test_a_patch_is_seen_where_it_is(tmp_path, backbone, side):
    """A dark patch high up at the right (mirrored, flipped or transposed it is elsewhere). The region there changes most;
    and a model whose label and attentions ask for that region shows it there in all three maps of --explain's picture."""
    clip, row, column = self_attending(load(backbone)), side // 4, side - 2
    pixels = np.full((2, side, side), 128, np.uint8)
    pixels[1, row, column] = 0
    for name, picture in zip("ab", pixels, strict=True):
        Image.fromarray(picture).resize(clip.image_size, Image.Resampling.NEAREST).save(tmp_path / f"{name}.png")
    with torch.no_grad():
        images = torch.stack([embed.load_photo(clip, tmp_path / f"{name}.png") for name in "ab"])
        plain, patch = sspa.image_features(clip.model.visual, images)[1]
    there = int((patch - plain).norm(dim=-1).argmax())
    assert there == row * side + column

    feature, words = F.normalize(patch[there], dim=0), torch.zeros(4, clip.model.token_embedding.embedding_dim)
    labels = sspa.Labels(["patch"], [""], clip.tokenizer(["X X X X patch."]), feature[None], words)
    config = replace(config_of("--fusion sum --alignment s-to-v"), explain=(tmp_path / "b.png",))
    model = sspa.SSPA(config, clip.model, labels, 0)
    with torch.no_grad():
        model.dsf.bias.copy_(20 * feature)
        model.directions["s-to-v"].gate_query.copy_(feature[:, None].expand(-1, len(feature)))
        model.directions["s-to-v"].gate_attended.zero_()
    sspa.explain(config, clip, model, ["patch"], CPU, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "explain/000_b.png"), np.float32)
    photo = scipy.ndimage.center_of_mass(sheet.max(-1) < 8)  # all else on the sheet is brighter
    warmth = sheet[..., 0] - sheet[..., 2]  # the photo is grey, the maps over it orange
    spots, count = scipy.ndimage.label(warmth > 0.98 * warmth.max())
    found = sorted(scipy.ndimage.center_of_mass(spots, spots, range(1, count + 1)), key=lambda place: place[1])
    pitch = pictures.TILE + pictures.GAP  # the gate's map is below, with two lines of text; similarity, DSF's map beside
    expected = [[pitch + 40, 0], [0, pitch], [0, 2 * pitch]]
    np.testing.assert_allclose(np.subtract(found, photo), expected, atol=pictures.TILE / side / 3)


# --- KAP, CAP, global prompts, DSF ------------------------------------------------------------------------------------

PROMPTS = [sspa.encode_prompts_reference, sspa.encode_prompts_fused]


def test_knowledge_texts(capsys):
    clip = load("scenes")
    texts = sspa.knowledge_texts(clip, ["boat", "cup"], {"boat": "Boat is a hull."})
    assert texts == ["Boat is a hull. A photo of a boat.", "A photo of a cup."] and not capsys.readouterr().err
    long, = sspa.knowledge_texts(clip, ["boat"], {"boat": "word " * 100})
    assert long.endswith("word A photo of a boat.") and len(clip.tokenizer.encode(long)) + 2 == 40
    assert "1 descriptions cut to 40 tokens: boat" in capsys.readouterr().err


@pytest.mark.parametrize("backbone", ["scenes", "tiny-ViT"])
def test_prompts_equal_open_clips_encode_text(backbone):
    """With the context set to the embeddings of "a photo of a", both give what encode_text gives for the same words."""
    clip, names = load(backbone), ["dog", "potted plant", "hair drier", "a b c d e f g h"]
    words, tokens = (clip.tokenizer([f"{start} {name}." for name in names]) for start in ("a photo of a", "X X X X"))
    with torch.no_grad():
        context, expected = clip.model.token_embedding(words[0, 1:5]), clip.model.encode_text(words)
        for encode in PROMPTS:
            other, found = encode(clip.model, torch.stack([context.flip(0), context]), tokens)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", ["scenes", "tiny-ViT"])
@pytest.mark.parametrize("sets, length, names", [(2, 4, ["dog", "traffic light", "x"]), (1, 1, ["a"]),
                                                 (3, 16, ["giraffe", "tv monitor"]), (2, 4, ["very " * 60 + "long"])])
def test_prompts_fused_equal_reference(backbone, sets, length, names):
    """Among them one label, one context vector, and a name that is cut at the encoder's length."""
    clip = load(backbone)
    model, tokens = clip.model.double(), clip.tokenizer([f"{'X ' * length}{name}." for name in names])
    contexts = leaf(sets, length, model.token_embedding.embedding_dim, scale=0.1)
    same(*(lambda contexts, f=f: f(model, contexts, tokens) for f in PROMPTS), [contexts])


def test_prompt_tokens_counted():
    """Tokens through the two layers' feed-forward parts, COCO's labels: all 40 positions of each label, against
    1 + L + C (longest - 1 - L) a set in the first and one a label in the last."""
    clip, counted, contexts = load("scenes"), [], leaf(2, 4, 96, dtype=torch.float32)
    tokens = clip.tokenizer([f"X X X X {name}." for name in data.label_names("coco2014")])
    for block in clip.model.transformer.resblocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: counted.append(inputs[0].shape[:-1].numel()))
    sspa.encode_prompts_reference(clip.model, contexts, tokens)
    assert sum(counted) == 2 * 2 * 80 * 40
    counted.clear()
    sspa.encode_prompts_fused(clip.model, contexts, tokens)
    assert sum(counted) == 2 * (5 + 80 * (int(tokens.argmax(-1).max()) + 1 - 5)) + 2 * 80


def test_dsf_by_hand():
    """Regions e1, e2; prompt e2, which the layer turns to e1; scale log 3: attention 3/4, 1/4 = T_ca. A bias of e2 asks
    for both alike."""
    eye = torch.eye(2, dtype=torch.float64)
    for bias, expected in (([0, 0], [[[0.75, 0.25]]]), ([0, 1], [[[0.5, 0.5]]])):
        for found in sspa.dynamic_semantic_filtering(eye[1:], eye[None], eye.flip(0), tensor(bias), LOG3):
            torch.testing.assert_close(found, tensor(expected))


# --- QSM and GDMA -----------------------------------------------------------------------------------------------------

QUATERNION_LAYERS = [sspa.quaternion_linear_reference, sspa.quaternion_linear_fused]
ALIGNMENTS = [sspa.gated_alignment_reference, sspa.gated_alignment_fused]


def hamilton(a, b):
    """The product of two quaternions [4], written out from i^2 = j^2 = k^2 = ijk = -1."""
    (a1, b1, c1, d1), (a2, b2, c2, d2) = a, b
    return torch.stack([a1 * a2 - b1 * b2 - c1 * c2 - d1 * d2, a1 * b2 + b1 * a2 + c1 * d2 - d1 * c2,
                        a1 * c2 - b1 * d2 + c1 * a2 + d1 * b2, a1 * d2 + b1 * c2 - c1 * b2 + d1 * a2])


def test_quaternion_layer_is_a_sum_of_hamilton_products():
    """The table of i, j, k; then each weight quaternion times each input quaternion by hand, from the left, summed."""
    one, i, j, k = torch.eye(4, dtype=torch.float64)
    for a, b, product in ((i, i, -one), (j, j, -one), (k, k, -one), (i, j, k), (j, k, i), (k, i, j), (j, i, -k)):
        torch.testing.assert_close(hamilton(a, b), product)
    x, weights = leaf(4, 5, 3).detach(), leaf(4, 3, 2, seed=1).detach()
    expected = torch.zeros(5, 4, 2, dtype=torch.float64)
    for row, given, made in np.ndindex(5, 3, 2):
        expected[row, :, made] += hamilton(weights[:, given, made], x[:, row, given])
    for layer in QUATERNION_LAYERS:
        torch.testing.assert_close(layer(x.unbind(), *weights), expected.flatten(1))


@pytest.mark.parametrize("B, C, n", [(1, 1, 1), (3, 5, 4), (2, 7, 3)])
@pytest.mark.parametrize("zero", [0, 2])
def test_quaternion_fused_equals_reference(B, C, n, zero):
    """Components that vary with label, with both, with image; one of them zero; with a bias and without."""
    layers = [lambda *t, f=f: f([*t[:zero], None, *t[zero:3]], *t[3:]) for f in QUATERNION_LAYERS]
    inputs = [leaf(C, n), leaf(B, C, n, seed=1), leaf(B, 1, n, seed=2), *(leaf(n, 2, seed=seed) for seed in range(3, 7))]
    same(*layers, inputs)
    same(*layers, [*inputs, leaf(8, seed=8)])


def test_quaternion_init_moments():
    """Real weight: variance 2 s^2; each imaginary one 2 s^2 / 3; means 0; squared modulus s^2 chi(4)^2: mean 4 s^2."""
    r, *imaginary = weights = sspa.quaternion_init(600, 400, torch.Generator().manual_seed(0))
    s2, squared = 1 / (2 * 1000), sum(weight ** 2 for weight in weights)
    assert r.var().item() == pytest.approx(2 * s2, rel=0.01)
    for weight in imaginary:
        assert weight.var().item() == pytest.approx(2 * s2 / 3, rel=0.02) and abs(weight.mean().item()) < 1e-3
    assert squared.mean().item() == pytest.approx(4 * s2, rel=0.01)
    assert (squared ** 2).mean().item() == pytest.approx(24 * s2 ** 2, rel=0.02)


def aligned(alignment):
    """As a function of T, X and the weights of both directions, four each without a gate, seven with one."""
    def call(T, X, *weights):
        half, pad = len(weights) // 2, [None] * (7 - len(weights) // 2)
        return alignment(T, X, *(sspa.GatedAttention(*part, *pad) for part in (weights[:half], weights[half:])))
    return call


def alignment_case(B, C, M, d, gate=True):
    shapes = [(d, d), (d, d), (d, d), (), *([(d, d), (d, d), (d,)] if gate else [])] * 2
    weights = [leaf(*shape, seed=seed, scale=d ** -0.5) for seed, shape in enumerate(shapes, 2)]
    return [leaf(B, C, d), leaf(B, M, d, seed=1), *weights]


@pytest.mark.parametrize("sizes", [(2, 3, 7, 5), (1, 1, 1, 4), (2, 1, 6, 3), (3, 6, 1, 3), (2, 9, 4, 3), (2, 5, 5, 6)])
@pytest.mark.parametrize("gate", [True, False])
def test_gated_alignment_fused_equals_reference(sizes, gate):
    """Fewer labels than regions and more, so that every order of products is met."""
    same(*map(aligned, ALIGNMENTS), alignment_case(*sizes, gate))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_gated_alignment_by_hand(alignment):
    """Label e1 asks the one region, e2, whose value is a = e1 + e2. Gate of channel 1: bias log 3, so 3/4; of channel 2:
    a weighs -log 3, so 1/4. T_fn = e1 + (3/4, 1/4)."""
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    value, attended = tensor([[0, 0], [1, 1]]), tensor([[0, 0], [0, -LOG3]])
    weights = sspa.GatedAttention(eye, eye, value, tensor(1), zero, attended, tensor([LOG3, 0]))
    labels, regions, gate, none = alignment(eye[None, :1], eye[None, 1:], weights, None)
    torch.testing.assert_close(gate, tensor([[[0.75, 0.25]]]))
    torch.testing.assert_close(labels, tensor([[[1.75, 0.25]]]))
    assert torch.equal(regions, eye[None, 1:]) and none is None


def test_multiplications_counted():
    """As PyTorch counts them. GDMA with few labels: five d x d products a row on either side, against nine a label and one
    a region, and one more of attention with values. Quaternion layer 1: B C rows of four components, against C + B C + B
    rows of one."""
    def multiplications(function, *given):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(*given)
        return counter.get_total_flops() // 2
    B, C, M, d = 2, 3, 50, 8
    reference, fused = (multiplications(aligned(f), *alignment_case(B, C, M, d)) for f in ALIGNMENTS)
    assert reference == B * (5 * (C + M) * d * d + 4 * C * M * d)
    assert fused == B * ((9 * C + M) * d * d + 5 * C * M * d)
    components, weights = (None, leaf(C, d), leaf(B, C, d), leaf(B, 1, d)), [leaf(d, d)] * 4
    reference, fused = (multiplications(f, components, *weights) for f in QUATERNION_LAYERS)
    assert reference == B * C * 4 * d * 4 * d and fused == (C + B * C + B) * d * 4 * d


# --- losses and the soft aggregator -----------------------------------------------------------------------------------

AGGREGATES = [sspa.soft_aggregate_reference, sspa.soft_aggregate_fused]
LOSSES = [sspa.soft_aggregate_loss_reference, sspa.soft_aggregate_loss_fused]


@pytest.mark.parametrize("exponents", EXPONENTS)
def test_the_two_scripts_hold_the_same_loss(exponents):
    """They never import each other: values and gradients of their copies agree; only their defaults differ."""
    logits, targets = leaf(7, 11, scale=4), targets_of(7, 11)
    same(sspa.asymmetric_loss_reference, sspa.asymmetric_loss_fused, [logits], [targets, *exponents])
    for name in ("asymmetric_loss_reference", "asymmetric_loss_fused"):
        pair = [getattr(script, name) for script in (adapter_rp, sspa)]
        same(*pair, [logits], [targets, *(exponents or (3.0, 0.5, 0.1))], rtol=0, atol=0)
    for name in ("_asymmetric_in_place", "_AsymmetricLoss"):
        assert inspect.getsource(getattr(sspa, name)) == inspect.getsource(getattr(adapter_rp, name))


@pytest.mark.parametrize("block", [1, 20, 37, 2 ** 18])
@pytest.mark.parametrize("B, C, M, d", [(1, 1, 1, 3), (3, 5, 7, 6), (4, 1, 9, 2), (2, 13, 1, 5)])
@pytest.mark.parametrize("temperature, scale, exponents, long", [
    (0.3, 7.0, (), 1), (0.3, 7.0, (4.0, 1.0, 0.05), 1), (0.07, 1e4, (), 1e6), (1e-3, 1e4, (), 1e-6), (1e3, 1e-3, (), 1e6)])
def test_soft_aggregate_fused_equals_reference(monkeypatch, block, B, C, M, d, temperature, scale, exponents, long):
    """In blocks of samples and of labels, frozen regions too. Extremes: logits of +-1e4, a label of length 1e6 or 1e-6, a
    zero region, a softmax that is a maximum or a mean."""
    monkeypatch.setattr(sspa, "AGGREGATOR_BLOCK", block)
    T, X, scalars, targets = leaf(B, C, d), leaf(B, M, d, seed=1), [tensor(scale), tensor(-1.5)], targets_of(B, C)
    usual = {} if long == 1 else {"rtol": 1e-6, "atol": 1e-7, "finite_differences": False}
    T.data[0, 0] *= long
    X.data[0, M // 2] *= long == 1
    losses = [lambda T, X, *scalars, f=f: f(T, X, temperature, *scalars, targets, *exponents) for f in LOSSES]
    same(*(lambda T, f=f: f(T, X.detach(), *scalars) for f in losses), [T], **usual)
    inputs = [T, X, *(scalar.requires_grad_() for scalar in scalars)]
    same(*losses, inputs, **usual)
    same(*(lambda T, X, scale, f=f: f(T, X, temperature, scale) for f in AGGREGATES), inputs[:3], **usual)


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("aggregator, expected", [("soft", 6), ("mean", 4), ("max", 8)])
def test_aggregators_by_hand(small, impl, aggregator, expected):
    """A label along e1, regions along e1 and e2: cosines 1 and 0. Temperature 1 / log 3: weights 3/4, 1/4; scale 8."""
    model = model_of(small, impl, aggregator=aggregator, temperature=1 / LOG3)
    found = model.aggregate(tensor([[[5, 0]]]), tensor([[[2, 0], [0, 0.1]]]), model.temperature, 8.0)
    torch.testing.assert_close(found, tensor([[expected]]))


def test_fused_keeps_less():
    """Counted bytes for the backward pass: the loss its gradients alone, of the inputs' size; quaternion layer 1 less than
    half, for it concatenates nothing."""
    T, X = leaf(4, 300, 64, dtype=torch.float32), leaf(4, 196, 64, dtype=torch.float32)
    targets, scalars = torch.zeros(4, 300, dtype=torch.int8), (torch.tensor(20.0), torch.tensor(-3.0))
    reference, fused = (saved_bytes(lambda f=f: f(T, X, 0.1, *scalars, targets)) for f in LOSSES)
    assert fused < T.nbytes + X.nbytes + 1000 and reference > 3 * 4 * 300 * 196 * 4
    components, weights = (None, leaf(80, 64), leaf(16, 80, 64), leaf(16, 1, 64)), [leaf(64, 64)] * 4
    reference, fused = (saved_bytes(lambda f=f: f(components, *weights)) for f in QUATERNION_LAYERS)
    assert 2 * fused < reference


# --- the whole, and learning ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small():
    """The scenes' CLIP in float64, Labels of five, and of three pictures (x0, X) and targets"""
    clip, names = load("scenes"), scenes.NAMES[:5]
    images = torch.stack([embed.load_photo(clip, ("train", index)) for index in range(3)]).double()
    clip.model.double()
    with torch.no_grad():
        words = clip.model.token_embedding(clip.tokenizer(["a photo of a"]))[0, 1:5]
        features = sspa.image_features(clip.model.visual, images)
    return clip, sspa.Labels(names, names, None, leaf(5, 96).detach(), words), features, targets_of(3, 5)


def model_of(small, impl="fused", **changes):
    (clip, labels), config = small[:2], replace(config_of(), impl=impl, **changes)
    tokens = clip.tokenizer([f"{'X ' * config.context_length}{name}." for name in labels.names])
    return sspa.SSPA(config, clip.model, labels._replace(tokens=tokens), 0).double()


@pytest.mark.parametrize("changes", [
    {}, *(change for change in sspa.ABLATIONS.values() if "descriptions" not in change),
    {"attention_scale": 0.0, "quaternion_layers": 3, "context_length": 7}, {"quaternion_layers": 1}], ids=str)
def test_whole_model_fused_equals_reference(small, monkeypatch, changes):
    """Loss, gradients of all that learns, all outputs; a picture alone gives the same; the loss is that of the logits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # losses too run in float64 here
    (x0, X), targets, found = *small[2:], []
    for impl in ("reference", "fused"):
        model = model_of(small, impl, regional_weight=0.7, gamma_neg=3.0, clip=0.05, **changes)
        loss, learned = model(x0, X, targets), model.learned()
        gradients = dict(zip(learned, torch.autograd.grad(loss, learned.values()), strict=True))
        with torch.no_grad():
            outputs, alone = ([output for output in model(*given) if output is not None] for given in ((x0, X), (x0[1:2], X[1:2])))
        found.append((loss.detach(), gradients, outputs))
        torch.testing.assert_close([output[1:2] for output in outputs], alone)
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-10)
    assert "branches" in changes or all(gradient.abs().sum() > 0 for gradient in gradients.values())
    weights = {"both": (1, 0.7), "global": (1, 0), "regional": (0, 0.7)}[changes.get("branches", "both")]
    expected = sum(weight * sspa.asymmetric_loss_reference(logits, targets, 3.0, 0.0, 0.05)
                   for weight, logits in zip(weights, outputs, strict=False))
    torch.testing.assert_close(found[0][0], expected)


def test_scores_and_learning_rate_by_hand():
    """Logits log 3 and 0: scores 3/4 and 1/2, mean 5/8. Of 100 steps 5 rise in equal parts; half is left at the middle."""
    for branches, expected in (("both", 0.625), ("global", 0.75), ("regional", 0.5)):
        assert sspa.branch_scores(branches, tensor([LOG3]), tensor([0])).item() == pytest.approx(expected)
    rates = [sspa.warm_up_then_cosine(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=0.01) and max(rates) == rates[4]
    assert rates[50] == pytest.approx(0.5) and rates[99] < 0.001


def test_what_learns_and_how_fast():
    """The text tower never; the image tower when it is tuned, at a tenth; context vectors at their own rate."""
    clip, config = load("scenes"), config_of("--tune-image full --lr 0.02 --prompt-lr 0.003 --cache=")
    model = sspa.SSPA(config, clip.model, sspa.labels_of(config, clip, ["sun"]), 0)
    rates = {id(parameter): group["peak"] for group in sspa.optimiser_of(config, model).param_groups
             for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        kind = "image" if name.startswith("clip.visual.") else "text" if name.startswith("clip.") else name
        expected = {"image": pytest.approx(0.002), "text": None, "contexts": 0.003}.get(kind, 0.02)
        assert rates.get(id(parameter)) == expected and parameter.requires_grad == (kind != "text"), name


def loaded(words):
    """-> (config, clip, inputs), as train wants them"""
    config, clip = config_of(words), load("scenes")
    return config, clip, sspa.load_inputs(config, clip, sspa.labels_of(config, clip, sspa.names_of(config)))


def values(model):
    return {name: parameter.detach() for name, parameter in model.learned().items()}


def test_training_starts_at_the_prior_and_averages_the_weights(cache, tmp_path):
    """At the start the sigmoid of the mean logit is PRIOR. The model is the average of the weights after each of six
    steps, with decays of 1/10, 2/11, 3/12, and of --ema where that is less."""
    config, clip, inputs = loaded(f"--limit 24 --batch-size 8 --epochs 2 --ema 0.25 --cache {cache}")
    start, after = sspa.SSPA(config, clip.model, inputs.labels, 0), []
    sspa.set_biases(config, clip, start, inputs.train, CPU)
    with torch.no_grad():
        for logits in start(inputs.train.x0, inputs.train.X)[:2]:
            assert torch.sigmoid(logits.mean()).item() == pytest.approx(sspa.PRIOR, rel=1e-4)
    hook = register_optimizer_step_post_hook(lambda optimiser, *_: after.append(
        {id(weight): weight.detach().clone() for group in optimiser.param_groups for weight in group["params"]}))
    model, _ = sspa.train(config, clip, inputs, 0, CPU, tmp_path, "")
    hook.remove()
    expected = values(start)
    for decay, weights in zip((1 / 10, 2 / 11, 0.25, 0.25, 0.25, 0.25), after, strict=True):
        for name, parameter in model.learned().items():
            expected[name] = decay * expected[name] + (1 - decay) * weights[id(parameter)]
    torch.testing.assert_close(values(model), expected)


def test_impl_switches_everything_and_learns_the_same(monkeypatch, cache, tmp_path):
    called, learned = watched(monkeypatch, sspa), []
    parts = "encode_prompts quaternion_linear gated_alignment asymmetric_loss soft_aggregate soft_aggregate_loss".split()
    for impl, other in (("reference", "fused"), ("fused", "reference")):
        config, clip, inputs = loaded(f"--limit 24 --batch-size 8 --epochs 1 --impl {impl} --cache {cache}")
        learned.append(values(sspa.train(config, clip, inputs, 0, CPU, tmp_path, impl)[0]))
        names = called()
        assert {f"{part}_{impl}" for part in parts} <= names
        assert {name for name in names if name.endswith(other)} <= {"gated_alignment_reference"}  # both use its arrows
    torch.testing.assert_close(learned[1], learned[0], rtol=2e-3, atol=2e-4)


def test_a_thousand_pictures_beat_zero_shot(cache, tmp_path):
    """Four epochs, 400 test pictures, three seeds. Measured: 64.7 to 64.9, zero-shot 63.62, untrained 56.2; the regional
    branch 15 before training, 59.5 to 59.9 after."""
    config, clip, inputs = loaded(f"--limit 400 --batch-size 16 --epochs 4 --cache {cache}")
    photos, labels, *_ = data.load_photos("scenes", None, "train", 1000)
    x0, X, _ = embed.embed_regions(clip, photos, sspa.image_features, cache, workers=0, quiet=True)
    inputs = inputs._replace(train=sspa.Photos(photos, torch.from_numpy(labels), x0, X, ""))
    for seed in range(3):
        model, _ = sspa.train(config, clip, inputs, seed, CPU, tmp_path, f"seed {seed}")
        result = sspa.evaluate(config, clip, model, inputs, CPU)
        assert result["mAP"] > inputs.zero_shot_map + 0.6 and result["mAP_regional"] > 50, result


# --- both methods: options and marked constants -----------------------------------------------------------------------

CHANGED = {  # another value of every option that decides a result
    "dataset": "folder", "data_root": "{}/b", "policy": "split_seed=1", "labels": "{}/labels.txt", "limit": "16",
    "backbone": "tiny-ViT", "pretrained": "none", "resolution": "96", "precision": "bf16", "lr": "2e-3", "epochs": "3",
    "batch_size": "12", "seed": "1", "impl": "reference", "gamma_neg": "1", "clip": "0.1",
    "features": "{}/features.npz", "texts": "{}/texts.txt", "text_count": "50", "noise_law": "uniform", "noise_std": "0.2",
    "normalize": "", "adapter": "linear", "head": "label-embedding", "loss": "bce",
    "descriptions": "{}/descriptions.json", "tune_image": "full", "context_length": "3", "attention_scale": "5",
    "no_dsf": "", "fusion": "sum", "quaternion_layers": "1", "alignment": "v-to-s", "no_gate": "", "aggregator": "mean",
    "temperature": "0.2", "branches": "regional", "regional_weight": "2", "prompt_lr": "0.01", "image_lr_factor": "0.5",
    "ema": "0.1", "ablate": "'no gate'"}
FOLDER, TUNED = "--dataset folder --data-root {}/a --backbone scenes", "--tune-image full --limit 8 --batch-size 4"
BESIDE = {  # what must stand beside an option or constant for it to matter
    "dataset": "--data-root {}/a --backbone scenes", "data_root": FOLDER, "policy": FOLDER, "backbone": "--pretrained none",
    "tune_image": TUNED.replace("full", "none"), "image_lr_factor": TUNED, "CROP_SCALE": TUNED, "MARGIN": "--loss ranking"}
USUAL = {adapter_rp: "--limit 64 --text-count 60 --epochs 2 --batch-size 16",
         sspa: "--tune-image none --limit 24 --epochs 2 --batch-size 8"}
OPTIONS = [(script, field.name) for script in USUAL for field in run.options_of(script.Config)
           if field.metadata["group"] != "running"]
SOURCES = {script: Path(script.__file__).read_text() for script in USUAL}
CONSTANTS = [(script, name) for script in USUAL for name in re.findall(r"(?m)^([A-Z_]+) = .+?  # choice", SOURCES[script])]


@pytest.mark.parametrize("script, name", OPTIONS)
def test_every_option_changes_something(files, cache, script, name):
    words = f"{USUAL[script]} {BESIDE.get(name, '')} --cache {cache}".format(files)
    assert outcome(script, words) != outcome(script, f"{words} {run.flag_of(name)} {CHANGED[name]}".format(files))


@pytest.mark.parametrize("script, name", CONSTANTS)
def test_every_marked_constant_changes_something(cache, tmp_path, script, name):
    """Edited in its line, as a person does it."""
    line, value = re.search(rf"(?m)^{name} = (.+?)  # ", SOURCES[script]).group(0, 1)
    value = ast.literal_eval(value)
    value = f"{value} Indeed." if isinstance(value, str) else 1.5 * value + 0.1
    (tmp_path / "edited.py").write_text(SOURCES[script].replace(line, f"{name} = {value!r}  # "))
    specification = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    edited = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(edited)
    words = f"{USUAL[script]} {BESIDE.get(name, '')} --cache {cache}"
    assert outcome(script, words) != outcome(edited, words)


def test_nothing_else_changes_anything(monkeypatch, cache):
    """The same command line gives the same to the last bit, which the two tests above rest on. All ablations: the full
    method's result is not touched, no two score alike, every loss falls. Beyond CACHE_LIMIT, photos encoded in every
    epoch give the same but for half precision."""
    for script, usual in USUAL.items():
        words = f"{usual} --cache {cache}"
        once = outcome(script, words)
        assert outcome.__wrapped__(script, words) == once and len(once["losses"]) == 2
    ablated = outcome(sspa, f"{words} --ablate")
    assert ablated["tensors"] == once["tensors"] and ablated["runs"][0] == once["runs"][0]
    assert [one["ablation"] for one in ablated["runs"]] == ["none", *sspa.ABLATIONS]
    assert len({str(one["ap"]) for one in ablated["runs"]}) == 1 + len(sspa.ABLATIONS)
    assert all(last < first for first, last in zip(ablated["losses"][::2], ablated["losses"][1::2], strict=True))
    monkeypatch.setattr(sspa, "CACHE_LIMIT", 0.0)
    streamed = outcome.__wrapped__(sspa, words)["losses"]
    assert once["losses"] != streamed == pytest.approx(once["losses"], rel=1e-3)
