"""sspa.py: fast paths against the formulas (which test_formulas.py checks), the figure's arrows, training, learning.
For both methods: which label belongs to which photo; every option and every marked constant changes something."""
import inspect
import json
import re
import types
from contextlib import contextmanager
from itertools import product
from unittest import mock

import curve
import pytest
import torch
import torch.nn.functional as F
from forked import result_of
from safetensors.torch import load_file
from test_adapter_rp import leaf, load_once, optimiser_steps, outcome, same, same_under_autocast, targets_of, without

import adapter_rp
import data
import embed
import metrics
import run
import scenes
import sspa


def config_of(words=""):
    words = f"--quiet --workers 0 --tune-image none --lr 6e-3 --precision fp32 {words}"
    return run.parse(sspa.Config, words.split(), "", "")


@pytest.fixture(scope="module", autouse=True)
def files(place):
    """Files that options point to, and a tiny ResNet with random weights for open_clip. Folders of drawn pictures: a;
    b; broken, which is a with two more files, no pictures. Every second one is for training (in b: by its seed)."""
    for name, photos, last in (("a", range(20), "split"), ("b", range(30, 50), ""), ("broken", range(-2, 20), "split")):
        (place / name).mkdir()
        lines = [f"file,sun,boat,{last}"]
        for photo in photos:
            file = place / name / f"{photo}.png"
            file.write_text("no picture")
            if photo >= 0:
                scenes.picture("test", photo)[0].save(file)
            lines.append(f"{photo}.png,{photo // 2 % 2},{photo % 3 % 2},{('train', 'test')[photo % 2]}")
        (place / name / "labels.csv").write_text("\n".join(lines))
    (place / "swapped.txt").write_text("tree\nbus\ndog\ncat")
    (place / "texts.txt").write_text("\n".join(3 * scenes.NAMES))
    (place / "descriptions.json").write_text(json.dumps(dict.fromkeys(scenes.NAMES, "It is drawn.")))
    tower = {"image_size": 128, "layers": [1, 1, 1, 1], "width": 8}
    (place / "tiny.json").write_text(json.dumps({**scenes.CLIP_CONFIG, "vision_cfg": tower}))
    embed.import_open_clip().add_model_config(place / "tiny.json")
    return place


# --- image encoder, KAP -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backbone, resolution, side", [("scenes", 96, 12), ("tiny", 224, 7), ("tiny", 448, 14)])
def test_x0_is_encode_image_and_a_patch_is_seen_where_it_is(backbone, resolution, side):
    """A dark patch at the upper right; mirrored, flipped or transposed it is elsewhere. Its region changes most."""
    clip = embed.load_clip(backbone, "none", resolution=resolution)
    if backbone == "tiny":  # random weights look everywhere alike: at their like now
        pool = clip.model.visual.attnpool
        pool.k_proj.weight.data = 1000 * pool.q_proj.weight.data
        torch.nn.init.orthogonal_(pool.positional_embedding, 16)
    images = torch.zeros(2, 3, side, side)
    images[1, :, 1, side - 2] = -2
    images = F.interpolate(images, resolution)
    with torch.no_grad():
        x0, X = sspa.image_features(clip.model.visual, images)
        torch.testing.assert_close(x0, clip.model.encode_image(images), rtol=1e-4, atol=1e-5)
    assert (X[1] - X[0]).norm(dim=-1).argmax() == side + side - 2


def test_knowledge_texts(capsys):
    clip = load_once()
    texts = sspa.knowledge_texts(clip, ["boat", "cup"], {"boat": "Boat is a hull."})
    assert texts == ["Boat is a hull. A photo of a boat.", "A photo of a cup."]
    long, = sspa.knowledge_texts(clip, ["boat"], {"boat": "word " * 100})
    assert re.fullmatch(r"(word )+A photo of a boat\.", long) and len(clip.tokenizer.encode(long)) + 2 == 40
    assert capsys.readouterr().err == "1 texts cut to 40 tokens: boat\n"


# --- fast paths -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sets, length, names", [(2, 4, ["dog", "traffic light", "x"]), (1, 1, ["a"]),
                                                 (3, 16, ["tv monitor", "very " * 60 + "long"])])
def test_prompts_fused_equal_reference_and_encode_text(sets, length, names):
    """One label, one context vector, a name that is cut. Context vectors that are words' embeddings (the last set here)
    give what open_clip's encode_text gives for these words."""
    clip = embed.load_clip()
    model = clip.model.double()
    tokens = clip.tokenizer([f"{'a ' * length}{name}." for name in names])
    contexts = 0.1 * leaf(sets, length, 96)
    contexts.data[-1] = model.token_embedding(tokens[0, 1:1 + length])
    same(sspa, "encode_prompts", lambda encode, contexts: encode(model, contexts, tokens), [contexts])
    torch.testing.assert_close(sspa.encode_prompts_fused(model, contexts, tokens)[-1], model.encode_text(tokens))


@pytest.mark.parametrize("B, C, n", [(1, 1, 1), (3, 5, 4)])
def test_quaternion_fused_equals_reference(B, C, n):
    """Components of zero, of each label, of both, of each image"""
    def layered(layer, *given):
        return layer([None, *given[:3]], *given[3:])
    weights = [leaf(n, 2, seed=seed) for seed in range(3, 7)]
    same(sspa, "quaternion_linear", layered, [leaf(C, n), leaf(B, C, n), leaf(B, 1, n, seed=2), *weights, leaf(8)])


@pytest.mark.parametrize("B, n, m, d", [(2, 3, 7, 5), (1, 1, 1, 4), (2, 9, 4, 3), (3, 6, 1, 3)])
def test_gated_attention_fused_equals_reference(B, n, m, d):
    """Fewer and more queries than keys, so that both orders of products occur. (Ungated: tested in the whole model.)"""
    gdma = moved(sspa.GatedAttention(d, 2.0, True, "fused", torch.Generator()))
    inputs = [leaf(B, n, d), leaf(B, m, d, seed=1), *gdma.parameters()]
    same(sspa, "gated_attention", lambda attend, x, context, *_: torch.cat(attend(x, context, gdma)), inputs)


@pytest.mark.parametrize("exponents", [(), (4, 1, 0.05), (0, 0, 0), (0.5, 0.5, 0.1), (3, 0, 0, "stopped"),
                                       (0, 0.5, 0.05, "stopped")])
def test_asymmetric_loss_fused_equals_reference(monkeypatch, exponents):
    """Blocks do not divide the logits, which are transposed; +-1e4, and where sigmoids round to 0 or 1."""
    monkeypatch.setattr(sspa, "logits_alive", lambda z: 10)

    def loss(function, z):
        return function(z, targets_of(*z.shape), *exponents)
    logits = [3 * leaf(19, 13).mT]
    same(sspa, "asymmetric_loss", loss, logits, finite_differences="stopped" not in exponents)
    same_under_autocast(sspa, "asymmetric_loss", loss, logits)
    extremes = torch.tensor([-1e4, -90, -17, -1e-3, 0, 1e-3, 17, 90, 1e4]).repeat(19, 1)
    same(sspa, "asymmetric_loss", loss, [extremes.requires_grad_()], 2e-5, 1e-5, finite_differences=False)


@pytest.mark.parametrize("alive", [1, 20, 200, 2 ** 18])
@pytest.mark.parametrize("B, C, M, d", [(1, 1, 1, 3), (3, 13, 7, 6)])
@pytest.mark.parametrize("temperature, scale, long", [(0.3, 4, 1), (0.07, 1e4, 1e6), (1e-3, 1e4, 1e-6),
                                                      (1e3, 1e-3, 1e6)])
def test_soft_aggregate_fused_equals_reference(monkeypatch, alive, B, C, M, d, temperature, scale, long):
    """In blocks of labels or of samples that do not divide their number, and all at once. Extremes: logits of +-1e4, a
    label feature of length 1e6 or 1e-6, a zero region, a softmax that is a maximum or a mean. Label features of each
    image, or the same for all; one bias for all labels, or one each."""
    monkeypatch.setattr(sspa, "cosines_alive", lambda features: alive)

    def aggregated(function, T, X, *more):
        return function(T, X, temperature, *more)

    def loss(function, *given):
        return aggregated(function, *given, targets_of(B, C))
    usual = long == 1
    X = leaf(B, M, d, seed=1)
    if not usual:
        X.data[0, M // 2] = 0
    for T, bias in ((leaf(B, C, d), leaf()), (leaf(C, d), leaf(C))):
        T.data[0] *= long
        inputs = [T, X, scale * leaf(), bias]
        same(sspa, "soft_aggregate", aggregated, inputs[:3], 1e-6, 1e-7, usual)
        same(sspa, "soft_aggregate_loss", loss, inputs, 1e-6, 1e-7, usual)
        if usual:
            same_under_autocast(sspa, "soft_aggregate_loss", loss, inputs)


# --- the whole --------------------------------------------------------------------------------------------------------

X0 = leaf(3, 96)
REGIONS = leaf(3, 10, 96, seed=1)


@pytest.fixture
def clip64(monkeypatch):
    clip = embed.load_clip()
    clip.model.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # losses too run in float64 here
    return clip


def moved(module):
    """A model in float64, with every learned tensor away from its initial value"""
    for place, parameter in enumerate(module.double().parameters()):
        if parameter.requires_grad:
            parameter.data += 0.05 * leaf(*parameter.shape, seed=place).detach()
    return module


def model_of(frozen, words=""):
    config = config_of(f"--cache= {words}")
    return moved(sspa.SSPA(config, frozen.model, sspa.labels_of(config, frozen, scenes.NAMES[:5]), 0))


def unit(features):
    return F.normalize(features, dim=-1)


def test_forward_is_the_figure(clip64):
    """The inputs of a box have unit length; both directions of GDMA start from the features before either."""
    model = model_of(clip64)
    x0 = unit(X0)
    X = unit(REGIONS)
    T_g, E_ca = unit(sspa.encode_prompts_reference(clip64.model, model.contexts, model.tokens))
    T_ca, attention = model.dsf(E_ca, X)
    T_uf = unit(model.qsm(unit(model.knowledge), unit(T_ca), x0))
    T_fn, label_gate = model.v_to_s(T_uf, X)
    X_fn, region_gate = model.s_to_v(X, T_uf)
    s_G = model.global_log_scale.exp() * x0 @ T_g.T + model.global_bias
    s_R = sspa.soft_aggregate_reference(T_fn, X_fn, 0.1, model.regional_log_scale.exp()) + model.regional_bias
    torch.testing.assert_close(model(X0, REGIONS), (s_G, s_R, T_uf, T_fn, X_fn, attention, label_gate, region_gate))


@pytest.mark.parametrize("words", [
    "", "--quaternion-layers 1 --no-gate",
    "--attention-scale 0 --quaternion-layers 3 --context-length 7 --aggregator max",
    "--fusion knowledge --alignment s-to-v --branches global",
    "--fusion context --no-dsf --alignment none --branches regional",
    "--fusion sum --aggregator mean", "--fusion concat --alignment v-to-s"])
def test_whole_model_fused_equals_reference(clip64, words):
    """Loss, gradients, outputs, without the other kind's functions; a picture's own are the same; L = L_G + 0.7 L_R."""
    targets = targets_of(3, 5)
    found = []
    for impl, other in (("reference", "_fused"), ("fused", "_reference")):
        with without(sspa, other):
            model = model_of(clip64, f"{words} --impl {impl} --regional-weight 0.7 --gamma-neg 3 --clip 0.05")
            loss = model(X0, REGIONS, targets)
            gradients = torch.autograd.grad(loss, list(model.learned().values()), materialize_grads=True)
            outputs = model(X0, REGIONS)
            alone = model(X0[1:], REGIONS[1:])
        found.append((loss, gradients, outputs))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(outputs.regional_logits[1:], alone.regional_logits)
    L_G, L_R = [sspa.asymmetric_loss_reference(logits, targets, 3.0, 0.0, 0.05) for logits in outputs[:2]]
    expected = {"both": L_G + 0.7 * L_R, "global": L_G, "regional": 0.7 * L_R}
    torch.testing.assert_close(loss, expected[model.config.branches])


# --- training ---------------------------------------------------------------------------------------------------------

def test_what_learns_and_how_fast():
    """The text tower never learns; the image tower if it is tuned, at a tenth; context vectors at their own rate. All
    that learns has weight decay."""
    clip = embed.load_clip()
    config = config_of("--tune-image full --prompt-lr 0.003")
    model = sspa.SSPA(config, clip.model, sspa.labels_of(config, clip, ["sun"]), 0)
    found = {}
    for group in sspa.optimiser_of(config, model).param_groups:
        found |= dict.fromkeys(group["params"], [group["peak"], group["weight_decay"]])
    peaks = dict.fromkeys(set(model.parameters()) - set(clip.model.parameters()), 6e-3)
    peaks |= dict.fromkeys(clip.model.visual.parameters(), 6e-3 * 0.1) | {model.contexts: 0.003}
    assert found == {parameter: [peak, sspa.WEIGHT_DECAY] for parameter, peak in peaks.items()}


def loaded(clip, words, count):
    """-> config, labels, photos of scenes"""
    config = config_of(words)
    found = data.load_photos("scenes", None, "train", count)
    photos = sspa.with_features(config, clip, found, scenes.NAMES, config.tune_image == "none")
    return config, sspa.labels_of(config, clip, scenes.NAMES), photos


def test_training_starts_at_the_prior_and_averages_the_weights(cache, tmp_path):
    """At the start the sigmoid of the mean logit is PRIOR. The model is the average of the weights after each of six
    steps, with decays of 1/10, 2/11, ..., and of --ema where that is less; the learning rate is the schedule's."""
    clip = load_once()
    config, labels, photos = loaded(clip, f"--batch-size 8 --epochs 2 --lr 0.1 --ema 0.38 --cache {cache}", 24)
    start = sspa.SSPA(config, clip.model, labels, 0)
    sspa.set_biases(config, clip, start, photos)
    for logits in start(photos.x0, photos.X)[:2]:
        assert torch.sigmoid(logits.mean()).item() == pytest.approx(sspa.PRIOR, rel=1e-4)
    with optimiser_steps() as steps:
        model = sspa.train(config, clip, labels, photos, 0, tmp_path)
    expected = list(start.learned().values())
    for place, groups in enumerate(steps):
        assert groups[-1]["lr"] == pytest.approx(0.1 * sspa.warm_up_then_cosine(place, 6))
        decay = min((1 + place) / (10 + place), 0.38)
        for number, group in enumerate(groups):
            expected[number] = decay * expected[number] + (1 - decay) * group["params"][0]
    torch.testing.assert_close(list(model.learned().values()), expected)


def test_every_epoch_has_its_own_order_and_crops(cache, tmp_path):
    clip = embed.load_clip()
    words = f"--tune-image full --batch-size 4 --epochs 2 --cache {cache}"
    config, labels, photos = loaded(clip, words, 8)
    with mock.patch("embed.decoded", wraps=embed.decoded) as decoded:
        for seed in (0, 1):
            sspa.train(config, clip, labels, photos, seed, tmp_path)
    calls = [call.args for call in decoded.call_args_list if call.args[4]]  # without those of set_biases
    assert [call[4] for call in calls] == [*product((0, 1), (0, 1), (0.5,))]
    orders = [tuple(torch.tensor(call[2]).flatten().tolist()) for call in calls]
    assert len(set(orders)) == 4 and all(sorted(order) == [*range(8)] for order in orders)


def test_every_seed_starts_from_the_same_tower(cache):
    words = f"{USUAL[sspa]} {TUNED} --cache {cache} --seed"
    assert outcome(sspa, f"{words} 0 1")["runs"][1] == outcome(sspa, f"{words} 1")["runs"][0]


def test_a_thousand_pictures_beat_zero_shot(cache):
    """Two seeds. Measured: 62.7 to 63.1, zero-shot 61.8; regional branch 47.2 to 53.6, untrained 15.2."""
    words = f"--tune-image none --train-count 1000 --test-count 400 --batch-size 16 --epochs 4 --cache {cache}"
    found = outcome(sspa, f"{words} --seed 0 1 --no-probe")
    for one in found["runs"]:
        assert one["mAP"] > found["zero_shot_mAP"] + 0.6
        assert one["mAP_regional"] > 40


# --- both methods: which label belongs to which photo -----------------------------------------------------------------

USUAL = {adapter_rp: "--test-count 40 --text-count 60 --epochs 2 --batch-size 16",
         sspa: "--tune-image none --train-count 24 --test-count 40 --epochs 2 --batch-size 8"}
TUNED = "--tune-image full --train-count 8 --test-count 8 --batch-size 4"


@pytest.mark.parametrize("script", USUAL)
def test_a_photo_that_cannot_be_read_changes_nothing(files, cache, script):
    words = f"{USUAL[script]} --dataset folder --backbone scenes --cache {cache} --data-root {files}"
    assert outcome(script, f"{words}/broken") == outcome(script, f"{words}/a")


@pytest.mark.parametrize("script", USUAL)
def test_zero_shot_and_the_order_of_labels(files, cache, script):
    """A label's AP by the cosine with "a photo of a {name}.", and its count, wherever --labels puts it."""
    clip = load_once()
    photos, truth = data.load_photos("scenes", None, "test", 40)
    images = unit(embed.embed_photos(clip, photos, cache)[0])
    prompts = unit(embed.embed_texts(clip, [f"a photo of a {name}." for name in scenes.NAMES]))
    ap = metrics.average_precision((images @ prompts.T).numpy(), truth)
    expected = {name: (truth[:, row].sum(), 100 * ap[row]) for row, name in enumerate(scenes.NAMES)}
    words = f"{USUAL[script]} --dataset scenes --labels {files}/reversed.txt --cache {cache}"
    for one in outcome(script, words)["per_class"]:
        assert (one["positives"], one["zero_shot_ap"]) == pytest.approx(expected[one["name"]])


def test_features_in_the_order_of_labels(files):
    words = f"--features {files}/features.npz --epochs 1"
    swapped = outcome(adapter_rp, f"{words} --labels {files}/swapped.txt")["per_class"]
    for one, other in zip(swapped[::-1], outcome(adapter_rp, words)["per_class"], strict=True):
        assert one | {"ap": 0} == other | {"ap": 0}


def test_curve_chooses_on_a_fifth_of_the_training_pictures(cache, tmp_path, monkeypatch):
    """Ten pictures, seeds 0 and 1: all of them by default, then two candidates on eight, tested on the other two."""
    monkeypatch.setattr(curve, "COUNTS", (10,))
    monkeypatch.setattr(curve, "STEPS", (1, 3))
    monkeypatch.setattr(sspa, "default_epochs", lambda *_: 2)
    words = f"--seed 0 1 --test-count 30 --quiet --cpu --workers 0 --cache {cache} --output {tmp_path}"
    with (mock.patch("sspa.train", wraps=sspa.train) as train,
          mock.patch("sspa.evaluate", wraps=sspa.evaluate) as evaluate):
        curve.main(words.split())
    learnt = [set(call.args[3].photos) for call in train.call_args_list]
    tested = [set(call.args[3].photos) for call in evaluate.call_args_list]
    assert [len(photos) for photos in learnt] == [10, 10, 8, 8, 10, 8, 8, 10]
    for some, others in zip(learnt, tested, strict=True):
        assert len(others) == 30 or some | others == learnt[0] and not some & others
    values = json.loads((tmp_path / "curve.json").read_text())["values"]
    assert [len(mAPs) for mAPs in values.values()] == [2, 2, 2]


# --- both methods: what a run leaves ----------------------------------------------------------------------------------

@pytest.fixture
def call(monkeypatch, cache, tmp_path):
    """call(script, "words"): a run in tmp_path, in this process"""
    monkeypatch.setattr(embed, "load_clip", load_once)
    monkeypatch.setattr(data, "hold", lambda *_: None)  # this process has it already

    def run_in(script, words):
        script.main(f"{words} --cpu --quiet --workers 0 --cache {cache} --output {tmp_path}".split())
    return run_in


@contextmanager
def interrupted(epoch):
    """Training is interrupted after so many epochs."""
    ends = [None] * epoch + [KeyboardInterrupt]
    with mock.patch("run.Progress.end_epoch", side_effect=ends), pytest.raises(KeyboardInterrupt):
        yield


@pytest.mark.parametrize("script", USUAL)
def test_scores_are_kept(call, tmp_path, script):
    """Interrupted in the second seed: afterwards every mAP in metrics.json, the first seed's included, can be computed
    from the file. A damaged file is refused before training; --overwrite deletes it."""
    words = f"{USUAL[script]} --seed 0 1"
    with interrupted(2):
        call(script, words)
    file = tmp_path / "scores.safetensors"
    good = file.read_bytes()
    file.write_bytes(b"no scores")
    with pytest.raises(data.UsageError, match=f"scores {file}: .*; delete it"):
        call(script, words)
    file.write_bytes(good)
    call(script, words)
    scores = load_file(file)
    truth = scores.pop("truth")
    assert truth.dtype == torch.int8 and {tensor.dtype for tensor in scores.values()} == {torch.float32}
    record = result_of(tmp_path)
    expected = {f"seed {one['seed']}": one["mAP"] for one in record["runs"]}
    for name in ("zero_shot", "zero_shot_centred", "linear_probe"):
        expected[name] = record[f"{name}_mAP"]
    found = {name: metrics.mean_average_precision(tensor.numpy(), truth.numpy()) for name, tensor in scores.items()}
    assert found == pytest.approx(expected, abs=1e-3)
    with interrupted(0):
        call(script, f"{words} --overwrite")
    assert not file.exists()


@pytest.mark.parametrize("count, epochs", [(1, 150), (127, 150), (500, 22), (512, 20)])
def test_few_photos_get_more_epochs(count, epochs):
    """22 epochs of 7 steps are the fewest of at least 150."""
    assert sspa.default_epochs(count, 64) == epochs


def test_default_epochs_are_recorded_and_gone_on_with(call, tmp_path):
    """A run with as many epochs is the same run, one with another number is not."""
    few = "--tune-image none --train-count 4 --test-count 8"
    with interrupted(0):
        call(sspa, few)
    assert result_of(tmp_path)["config"]["epochs"] == 150
    for words in (few, f"{few} --epochs 150"):
        with interrupted(3):
            call(sspa, words)
    with pytest.raises(data.UsageError, match=r"\(epochs 150, not 20\)"):
        call(sspa, f"{few} --epochs 20")
    with interrupted(0):
        call(sspa, f"{few} --epochs 3 --overwrite")
    with pytest.raises(data.UsageError, match=r"\(epochs 3, not 150\)"):
        call(sspa, few)


# --- both methods: options and marked constants -----------------------------------------------------------------------

# another value of every option that decides a result and of every marked constant | what it takes beside it
CHANGED = """
--dataset folder | --data-root FILES/a --backbone scenes
--data-root FILES/b | --dataset folder --backbone scenes --data-root FILES/a
--policy split_seed=1 | --dataset folder --backbone scenes --data-root FILES/b
--labels FILES/few.txt
adapter_rp --unseen boat | --head label-embedding
--unseen boat
adapter_rp --train-count 16 | --texts FILES/texts.txt
--train-count 16
--test-count 16
--no-probe
--backbone tiny | --pretrained none
--pretrained none
--resolution 96
--precision bf16
--lr 2e-3
--epochs 3
--batch-size 12
--seed 1
--impl reference
--gamma-neg 1
--clip 0.1
--focal-gradient stopped
--features FILES/features.npz
--texts FILES/texts.txt
--text-count 50
--noise-law uniform
--noise-std 0.2
--normalize
--adapter linear
--head label-embedding
--loss bce
--descriptions FILES/descriptions.json
--tune-image full | --train-count 8 --test-count 8 --batch-size 4
--context-length 3
--attention-scale 5
--no-dsf
--fusion sum
--quaternion-layers 1
--alignment v-to-s
--no-gate
--aggregator mean
--temperature 0.2
--branches regional
--regional-weight 2
--prompt-lr 0.01
--image-lr-factor 1 | --tune-image full --train-count 8 --test-count 8 --batch-size 4
--ema 0.1
HIDDEN 0.5
GAMMA_POS 0.5
MARGIN 0.5 | --loss ranking
WEIGHT_DECAY 0.5
PROMPT "{}, drawn"
SCALE 5
PRIOR 0.5
WARM_UP 0.5
CROP_SCALE 0.3 | --tune-image full --train-count 8 --test-count 8 --batch-size 4
"""
DECIDE = []
for script in USUAL:
    DECIDE += [(script, run.flag_of(field.name)) for field in run.options_of(script.Config)
               if field.metadata["group"] != "running"]
    DECIDE += [(script, name) for name in re.findall(r"(?m)^([A-Z_]+) = .+  # cho", inspect.getsource(script))]


@pytest.mark.parametrize("script, name", DECIDE)
def test_every_option_and_every_marked_constant_changes_something(files, cache, script, name):
    """A constant is edited in its line, as a person would do it."""
    row = re.search(rf"(?m)^({script.__name__} )?{name}\b(.*)", CHANGED)[2].replace("FILES", str(files))
    value, _, beside = row.partition("|")
    words = f"{USUAL[script]} {beside} --cache {cache}"
    if name.startswith("--"):
        other = outcome(script, f"{words} {name} {value}")
    else:
        edited = types.ModuleType("edited")
        edited.__file__ = script.__file__
        exec(re.sub(rf"(?m)^{name} = .+?  # ", f"{name} = {value}  # ", inspect.getsource(script)), vars(edited))
        other = outcome(edited, words)
    assert other != outcome(script, words)


@pytest.mark.parametrize("script", USUAL)
def test_nothing_else_changes_anything(monkeypatch, cache, script):
    """A command line gives the same to the last bit, as the tests above assume. Beyond CACHE_LIMIT only half precision
    is lost."""
    words = f"{USUAL[script]} --cache {cache}"
    once = outcome(script, words)
    assert outcome.__wrapped__(script, words) == once
    if script is sspa:
        monkeypatch.setattr(sspa, "CACHE_LIMIT", 0.0)
        streamed = outcome.__wrapped__(sspa, words)["losses"]
        assert once["losses"] != streamed == pytest.approx(once["losses"], rel=1e-3)
