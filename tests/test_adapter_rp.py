"""adapter_rp.py: fast paths against the formulas, formulas by hand, counted work, learning (options: test_sspa.py)."""
import functools
import inspect
import json
import math
import shlex
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import adapter_rp as rp
import data
import embed
import run
import sspa

tensor, LOG3 = functools.partial(torch.tensor, dtype=torch.float64), math.log(3)
torch.set_num_threads(1)  # the shapes of tests are tiny: a second thread would only wait


# --- tools, for test_sspa.py too --------------------------------------------------------------------------------------

def leaf(*shape, seed=0, dtype=torch.float64, scale=1.0):
    """A random tensor that wants a gradient."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * drawn).to(dtype).requires_grad_()


def targets_of(*shape):
    """A tenth of the labels ignored, a quarter present, the others absent: int8 of -1, 1, 0."""
    drawn = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    return torch.where(drawn < 0.1, -1, (drawn < 0.35).int()).to(torch.int8)


def same(reference, fused, inputs, others=(), rtol=1e-9, atol=1e-11, finite_differences=True):
    """Two functions agree in outputs and in the gradients of all inputs, under random gradients from above; inputs stay
    as they are; without gradients the outputs are the same; gradients are those of finite differences."""
    def outputs(function, *given):
        found = function(*given, *others)
        return tuple(tensor for tensor in (found if isinstance(found, tuple) else (found,)) if tensor is not None)
    before, gradients = [tensor.detach().clone() for tensor in inputs], []
    for function in (reference, fused):
        found = outputs(function, *inputs)
        above = [leaf(*tensor.shape, seed=place, dtype=tensor.dtype) for place, tensor in enumerate(found)]
        gradients.append(torch.autograd.grad(found, inputs, above))
        with torch.no_grad():
            torch.testing.assert_close(outputs(fused, *inputs), found, rtol=rtol, atol=atol)
    assert all(gradient.isfinite().all() for gradient in gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=rtol, atol=atol)
    assert all(map(torch.equal, inputs, before))
    assert not finite_differences or torch.autograd.gradcheck(lambda *t: outputs(fused, *t), inputs, fast_mode=True)


def saved_bytes(function):
    """Bytes that autograd keeps for the backward pass of what function() computes."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(kept.values())


def remove(monkeypatch, script, ending, but=""):
    """Whoever still calls one of the script's functions that end like this fails."""
    for name in [name for name in vars(script) if name.endswith(ending) and name != but]:
        monkeypatch.setattr(script, name, None)


load_once = functools.cache(embed.load_clip)


@functools.cache
def outcome(script, words):
    """What a command line computes: learned tensors, every run's results, the zero-shot baseline, the losses."""
    load = embed.load_clip if "full" in words else load_once  # a tuned tower is another one afterwards
    with tempfile.TemporaryDirectory() as folder, mock.patch("embed.load_clip", load):
        script.main([*shlex.split(words), "--cpu", "--quiet", "--workers", "0", "--output", folder])
        result = json.loads(Path(folder, "metrics.json").read_text())
        log, tensors = Path(folder, "log.jsonl").read_text(), load_file(Path(folder, "checkpoint.safetensors"))
    return {"runs": [{**one, "seconds": 0} for one in result["runs"]], "zero-shot": result["zero_shot_mAP"],
            "probe": result["linear_probe_mAP"],
            "losses": [json.loads(line)["loss"] for line in log.splitlines()],
            "tensors": {name: tensor.tolist() for name, tensor in tensors.items()}}


# --- losses -----------------------------------------------------------------------------------------------------------

LOSSES = {name: [getattr(rp, f"{name}_loss_{impl}") for impl in ("reference", "fused")]
          for name in ("asymmetric", "bce", "ranking")}
EXPONENTS = [(), (2, 0, 0), (4, 1, 0.05), (0, 0, 0), (0.5, 0.5, 0), (0.5, 0, 0.1), (1, 2, 0.2), (0, 0, 0.05), (3, 0, 0),
             (4, 0, 0, "stopped"), (2, 1, 0.1, "stopped"), (0, 0.5, 0.05, "stopped"), (0.5, 0, 0, "stopped")]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (17, 23), (3, 5, 11)])
def test_losses_fused_equal_reference(name, shape):
    """At default arguments (the signatures are one, so that the defaults are), also of a transposed tensor."""
    logits, targets = leaf(*shape, scale=3), targets_of(*shape)
    same(*LOSSES[name], [logits], [targets])
    same(*LOSSES[name], [logits.detach().mT.contiguous().mT.requires_grad_()], [targets])
    assert inspect.signature(LOSSES[name][0]) == inspect.signature(LOSSES[name][1])


@pytest.mark.parametrize("script", [rp, sspa])
@pytest.mark.parametrize("exponents", EXPONENTS)
def test_asymmetric_loss_of_both_scripts_and_extreme_logits(monkeypatch, script, exponents):
    """The copies of both scripts agree. Blocks do not divide the logits; +-1e4, and where sigmoids round to 0 or 1."""
    pair = [script.asymmetric_loss_reference, script.asymmetric_loss_fused]
    monkeypatch.setattr(script._AsymmetricLoss, "BLOCK", 10)
    whole = "stopped" not in exponents  # else the gradient is not that of the value
    same(*pair, [leaf(13, 19, scale=3)], [targets_of(13, 19), *exponents], finite_differences=whole)
    same(rp.asymmetric_loss_reference, pair[1], [leaf(7, 9)], [targets_of(7, 9), *(exponents or (3, 1, 0.1))],
         finite_differences=whole)
    extremes = torch.tensor([-1e4, -700, -90, -40, -17, -1e-3, 0, 1e-3, 17, 40, 90, 700, 1e4])
    targets = torch.tensor([1, 0, -1], dtype=torch.int8)[:, None].expand(3, len(extremes))
    for dtype, rtol, atol in ((torch.float32, 2e-5, 1e-5), (torch.float64, 1e-9, 1e-11)):
        logits = extremes.to(dtype).repeat(3, 1).requires_grad_()
        same(*pair, [logits], [targets, *exponents], rtol, atol, finite_differences=False)


@pytest.mark.parametrize("script", [rp, sspa])
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_focusing_weights_and_odd_targets(script, impl):
    """z = log 3, p = 3/4; present, gamma+ 1, and absent, gamma- 2, clip 1/4, q = 1/2. Weights stopped, gradients are
    -(1/4)(1/4) and (1/2)^2 (3/16) / (1/2), else (1/4)(log(3/4) 3/4 - 1/4) and (1/4)(2 + 4 log 2)(3/16). Soft targets,
    single rows are refused; sums of half precision do not overflow."""
    function = getattr(script, f"asymmetric_loss_{impl}")
    for focal, expected in (("stopped", [-1 / 16, 3 / 32]),
                            ("full", [(0.75 * math.log(0.75) - 0.25) / 4, 3 / 64 * (2 + 4 * math.log(2))])):
        logits = torch.full((1, 2), LOG3, dtype=torch.float64, requires_grad=True)
        function(logits, torch.tensor([[1, 0]]), 2.0, 1.0, 0.25, focal).backward()
        assert logits.grad[0].tolist() == pytest.approx(expected)
    for odd in (torch.full((2, 2), 0.5), torch.ones(2, dtype=torch.int8)):
        with pytest.raises(ValueError, match="targets must be integers or bool"):
            function(torch.zeros(odd.shape), odd)
    many = torch.full((512, 1000), 3.0, dtype=torch.float16), torch.zeros(512, 1000, dtype=torch.bool)
    assert function(*many).item() == pytest.approx(function(many[0].double(), many[1]).item(), rel=1e-4)


@pytest.mark.parametrize("impl", [0, 1])
def test_losses_by_hand(impl):
    """z = log 3: p = 3/4. Present, gamma+ 1: -(1/4) log(3/4). Absent, gamma- 2, clip 1/4: q = 1/2, -(1/4) log(1/2).
    Ranking: present 1, absent 0.5 and -3, ignored 9: relu(1 - 1 + 0.5) + relu(1 - 1 - 3). Cross-entropy: PyTorch's."""
    found = LOSSES["asymmetric"][impl](torch.full((1, 3), math.log(3)), torch.tensor([[1, 0, -1]]), 2.0, 1.0, 0.25)
    assert found.item() == pytest.approx(-0.25 * math.log(0.75) - 0.25 * math.log(0.5))
    found = LOSSES["ranking"][impl](torch.tensor([[1, 0.5, -3, 9]]), torch.tensor([[1, 0, 0, -1]]))
    assert found.item() == pytest.approx(0.5)
    logits, targets = leaf(6, 9), targets_of(6, 9).clamp_min(0)
    expected = F.binary_cross_entropy_with_logits(logits, targets.double(), reduction="sum") / 6
    torch.testing.assert_close(LOSSES["bce"][impl](logits, targets), expected)


@pytest.mark.parametrize("block", [1, 13, 2 ** 19])
@pytest.mark.parametrize("runs, batch, hidden, classes", [(1, 1, 1, 1), (1, 5, 3, 11), (3, 4, 6, 7)])
def test_classifier_loss_fused_equals_reference(monkeypatch, runs, batch, hidden, classes, block):
    """Label by label, in chunks that do not divide them, and at once; also under frozen classifiers."""
    monkeypatch.setattr(rp._ClassifierLoss, "BLOCK", block)
    tensors = [leaf(runs, batch, hidden), leaf(runs, classes, hidden, seed=1), leaf(runs, classes, seed=2)]
    targets, pair = targets_of(runs, batch, classes), (rp.classifier_loss_reference, rp.classifier_loss_fused)
    for exponents in ((), (2.0, 1.0, 0.1)):
        same(*pair, tensors, [targets, *exponents])
    same(*pair, tensors, [targets, 2.0, 1.0, 0.1, "stopped"], finite_differences=False)
    same(*pair, tensors[:1], [tensors[1].detach(), tensors[2].detach(), targets])


def test_fused_keeps_an_eighth_at_two_thousand_labels():
    """Counted bytes for the backward pass, inputs aside: gradients alone, where the formula keeps B x C tensors."""
    tensors = [leaf(*shape, dtype=torch.float32) for shape in ((1, 512, 256), (1, 2000, 256), (1, 2000))]
    targets = targets_of(1, 512, 2000)
    inputs = sum(tensor.nbytes for tensor in (*tensors, targets))
    reference = saved_bytes(lambda: rp.classifier_loss_reference(*tensors, targets)) - inputs
    assert 8 * saved_bytes(lambda: rp.classifier_loss_fused(*tensors, targets)) < reference


@pytest.mark.parametrize("law", ["gaussian", "uniform", "sphere", "none"])
def test_noise_is_the_same_and_has_the_stated_size(law):
    """Same generator, same draws; strengths share one. Deviation noise_std * mean_norm, mean 0, and the law's form."""
    pair = [lambda embeddings, std, f=f: f(embeddings, std, law, 5.0, torch.Generator().manual_seed(3))
            for f in (rp.perturb_reference, rp.perturb_fused)]
    for std in (0.0, 0.15, tensor([0.1, 0.2])[:, None, None]):
        same(*pair, [leaf(1, 33, 12)], [std])
        found = [perturb(leaf(1, 33, 12).detach(), std) for perturb in pair]  # where no gradient is wanted
        torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)
    assert found[0].shape == (2, 33, 12)
    noise = pair[1](torch.zeros(4000, 24, dtype=torch.float64), 0.1)
    assert noise.std().item() == pytest.approx(0.5 * (law != "none"), rel=0.01) and abs(noise.mean().item()) < 0.01
    assert (noise.norm(dim=1).std() < 1e-9) == (law in ("sphere", "none"))
    assert (noise.abs().max() <= 0.5 * math.sqrt(3)) == (law in ("uniform", "none"))


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_adapter_is_the_formula(kind):
    """Every run by itself: relu(x W1 + b1) W2 + b2, or x W; label-embedding: 20 cos(x + f(x), label), any labels."""
    x, labels = leaf(2, 4, 6).detach(), leaf(9, 6, seed=1).detach()
    for head in ("per-label", "label-embedding"):
        adapter = rp.Adapter(6, 5, [0, 7], kind, head).double()
        for number, w in enumerate(map(adapter.of_run, range(2))):
            hidden = torch.relu(x[number] @ w["w1"].T + w["b1"]) if kind == "mlp" else x[number]
            expected = hidden @ w["w2"].T + (w["b2"] if kind == "mlp" else 0)
            if head == "label-embedding":  # nine labels, though built for five
                expected = 20 * F.cosine_similarity((x[number] + expected)[:, None], labels[None], dim=-1)
            torch.testing.assert_close(adapter(x, labels)[number], expected)
    start = rp.Adapter(200, 300, [0, 1], kind).w2  # as PyTorch's linear layers: uniform in +-1 / sqrt(fan in)
    assert start.var().item() * 3 * start.shape[2] == pytest.approx(1, rel=0.02) and not torch.equal(*start)


def trained(folder, words):
    """Three epochs on embeddings that are sums of their labels' directions and noise -> Adapter"""
    labels, directions = targets_of(300, 4).clamp_min(0), leaf(4, 10, dtype=torch.float32).detach()
    texts = labels.float() @ directions + 0.3 * leaf(300, 10, seed=1, dtype=torch.float32).detach()
    inputs = rp.Inputs(list("abcd"), directions, texts, labels, None, None, "", "", "", "")
    config = run.parse(rp.Config, f"--quiet --epochs 3 --batch-size 64 {words}".split(), "")
    return rp.train(config, inputs, torch.device("cpu"), folder)[0]


@pytest.mark.parametrize("words", ["", "--head label-embedding", "--adapter linear", "--loss bce", "--loss ranking",
                                   "--normalize", "--noise-law sphere"])
def test_impl_switches_everything_and_learns_the_same(monkeypatch, tmp_path, words):
    learned = []
    for impl, other in (("fused", "_reference"), ("reference", "_fused")):
        with monkeypatch.context() as patch:
            remove(patch, rp, other)
            learned.append(trained(tmp_path, f"--impl {impl} --seed 0 1 {words}").state_dict())
    torch.testing.assert_close(*learned, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_no_noise_draws_nothing(monkeypatch, tmp_path, impl):
    """--noise-std 0 learns what --noise-law none does, without a random number for the noise."""
    drawn, perturb = [], getattr(rp, f"perturb_{impl}")

    def counted(embeddings, noise_std, law, *more):
        drawn.append(law)
        return perturb(embeddings, noise_std, law, *more)
    monkeypatch.setattr(rp, f"perturb_{impl}", counted)
    silent, none = (trained(tmp_path, f"--impl {impl} {words}") for words in ("--noise-std 0", "--noise-law none"))
    assert set(drawn) == {"none"} and all(map(torch.equal, silent.parameters(), none.parameters()))


def test_a_run_learns_the_same_alone_or_beside_others(tmp_path):
    together = trained(tmp_path, "--seed 0 3 --noise-std 0.2 0 0.1")
    for number, (seed, std) in enumerate([(seed, std) for seed in (0, 3) for std in (0.2, 0, 0.1)]):
        alone = trained(tmp_path, f"--seed {seed} --noise-std {std}")
        torch.testing.assert_close(alone.of_run(0), together.of_run(number), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words, over_zero_shot, over_no_noise", [
    ("--seed 0 1 2 --limit 500 --epochs 25", 0.7, 0.5),  # worst with noise 64.0, best without 63.0, zero-shot 62.6
    ("--seed 0 1 --text-count 2000 --epochs 20 --features {}/voc2007_even.npz", 0.5, 2)])  # 65.0, 61.6, 63.9
def test_texts_alone_label_photos_and_noise_helps(request, cache, words, over_zero_shot, over_no_noise):
    """500 sentences and drawn pictures; 2,000 captions, 2,476 photos. The worst seed with noise beats all without."""
    shared = request.getfixturevalue("shared") / "photo_embeddings" if "{}" in words else ""
    result = outcome(rp, f"--noise-std 0.15 0 --batch-size 64 --lr 2e-3 {words} --cache {cache}".format(shared))
    loud, still = ([one["mAP"] for one in result["runs"] if one["noise_std"] == std] for std in (0.15, 0))
    assert min(loud) > result["zero-shot"] + over_zero_shot and min(loud) > max(still) + over_no_noise


def test_a_list_of_one_word_does_not_tag_everything(shared, tmp_path):
    """Sentences that lack the label join, so that most of the photos that are tagged are not just any."""
    texts, labels = data.with_negatives(["A dog."], torch.ones(1, 1, dtype=torch.int8).numpy(), ["dog"])
    assert len(texts) == len(labels) > 1000 and labels.sum() == 1 and not any("dog" in text for text in texts[1:])
    (tmp_path / "dog.txt").write_text("dog")
    words = f"--features {shared}/photo_embeddings/voc2007_even.npz --labels {tmp_path}/dog.txt --epochs 3"
    rp.main([*words.split(), "--cpu", "--quiet", "--output", str(tmp_path / "run")])
    f1 = json.loads((tmp_path / "run/metrics.json").read_text())["runs"][0]["threshold_0.5"]
    assert f1["OP"] > 30 and f1["OR"] > 50  # every photo tagged: precision is 8 percent, the share of photos with a dog
