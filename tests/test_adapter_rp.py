"""adapter_rp.py: fast paths against the formulas (which test_formulas.py checks), what training does in each step, and
that it learns. Options and marked constants of both methods: test_sspa.py."""
import inspect
import math
import shlex
import tempfile
from contextlib import contextmanager
from copy import deepcopy
from functools import cache as once
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from forked import outcome_of
from torch.optim.optimizer import register_optimizer_step_post_hook

import adapter_rp as rp
import data
import embed
import run
import sspa

CPU = torch.device("cpu")
torch.set_num_threads(1)  # the shapes of tests are tiny: a second thread would only wait


# --- tools, for test_sspa.py too --------------------------------------------------------------------------------------

def leaf(*shape, seed=0):
    """A random float64 tensor that requires a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def targets_of(*shape):
    """A third of the labels ignored, a third absent, a third present: int8 of -1, 0, 1."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)


def same(script, name, call, inputs, rtol=1e-9, atol=1e-11, finite_differences=True):
    """name_reference and name_fused agree in the tensor that call(function, *inputs) returns, and in the gradients of
    all inputs, for a random gradient of the output; inputs are not changed; without gradients the output is the same;
    gradients equal finite differences."""
    reference = partial(call, getattr(script, f"{name}_reference"))
    fused = partial(call, getattr(script, f"{name}_fused"))
    before = [tensor.clone() for tensor in inputs]
    found = fused(*inputs)
    expected = reference(*inputs)
    above = leaf(*expected.shape).to(expected.dtype)
    gradients = torch.autograd.grad(found, inputs, above)
    expected_gradients = torch.autograd.grad(expected, inputs, above)
    with torch.no_grad():
        alone = fused(*inputs)
    for one, other in ((found, expected), (alone, expected), (gradients, expected_gradients)):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
    assert all(tensor.isfinite().all() for tensor in (found, *gradients))
    assert all(map(torch.equal, inputs, before))
    if finite_differences:
        assert torch.autograd.gradcheck(fused, inputs, fast_mode=True)


def same_under_autocast(script, name, call, inputs):
    inputs = [tensor.float() for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        same(script, name, call, inputs, 2e-2, 2e-2, finite_differences=False)


@contextmanager
def without(script, ending):
    """Makes every function of the script fail whose name ends like this."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(vars(script)):
            if name.endswith(ending):
                patch.setattr(script, name, None)
        yield


@contextmanager
def optimiser_steps():
    """-> list of the optimiser's param_groups after every step: values, learning rate, weight decay"""
    steps = []
    hook = register_optimizer_step_post_hook(lambda optimiser, *_: steps.append(deepcopy(optimiser.param_groups)))
    yield steps
    hook.remove()


load_once = once(embed.load_clip)


@once
def outcome(script, words):
    """forked.outcome_of a command line"""
    load = embed.load_clip if "full" in words else load_once  # training changes a tuned tower
    with tempfile.TemporaryDirectory() as folder, mock.patch("embed.load_clip", load):
        script.main(shlex.split(f"{words} --cpu --quiet --workers 0 --output {folder}"))
        return outcome_of(Path(folder))


# --- fast paths -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("exponents", [(), (2.0, 1.0, 0.1), (0.5, 0.5, 0.0), (2.0, 1.0, 0.1, "stopped")])
@pytest.mark.parametrize("alive", [1, 13, 2 ** 18])
@pytest.mark.parametrize("batch, hidden, classes", [(5, 3, 11), (1, 1, 1)])
def test_classifier_loss_fused_equals_reference(monkeypatch, exponents, alive, batch, hidden, classes):
    """One label at a time, in chunks that do not divide their number, and all at once."""
    monkeypatch.setattr(rp, "logits_alive", lambda hidden: alive)
    inputs = [leaf(batch, hidden), leaf(classes, hidden, seed=1), leaf(classes, seed=2)]

    def loss(function, *given):
        return function(*given, targets_of(batch, classes), *exponents)
    same(rp, "classifier_loss", loss, inputs, finite_differences="stopped" not in exponents)
    same_under_autocast(rp, "classifier_loss", loss, inputs)


def test_loss_stands_twice_and_is_the_same():
    for name in ("asymmetric_loss_and_gradient", "check_targets"):
        assert inspect.getsource(getattr(rp, name)) == inspect.getsource(getattr(sspa, name))


@pytest.mark.parametrize("law", ["gaussian", "uniform", "sphere", "none"])
def test_noise_is_the_same(law):
    """Same generator, same draws, even if no gradient is required."""
    def noisy(perturb, x):
        return perturb(x, 0.15, law, 5.0, torch.Generator().manual_seed(3))
    same(rp, "perturb", noisy, [leaf(33, 12)])
    with pytest.raises(ValueError, match="unknown noise law 'pink'"):
        rp.perturb_fused(leaf(1, 2), 0.1, "pink", 5.0, None)


# --- training ---------------------------------------------------------------------------------------------------------

LABELS = targets_of(300, 4).clamp_min(0)
DIRECTIONS = leaf(4, 10).detach().float()
TEXTS = LABELS.float() @ DIRECTIONS + 0.3 * leaf(300, 10, seed=1).detach().float()
INPUTS = rp.Inputs(DIRECTIONS, TEXTS, LABELS, 8 * TEXTS, LABELS.numpy(), "", "", "", "")


def config_of(words):
    return run.parse(rp.Config, f"--quiet --epochs 2 --batch-size 150 {words}".split(), "", "")


def train(folder, words, seed=0):
    return rp.train(config_of(words), INPUTS, seed, CPU, Path(tempfile.mkdtemp(dir=folder)))


@pytest.mark.parametrize("words", ["", "--head label-embedding", "--adapter linear", "--loss bce", "--loss ranking",
                                   "--normalize"])
def test_impl_switches_everything_and_learns_the_same(tmp_path, words):
    with without(rp, "_reference"):
        fused = train(tmp_path, f"--impl fused {words}")
    with without(rp, "_fused"):
        plain = train(tmp_path, f"--impl reference {words}")
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=2e-4, atol=2e-5)


def given(folder, words, seed=0):
    """What the adapter is given in every step [4, 150, 10]"""
    with mock.patch("adapter_rp.text_loss", wraps=rp.text_loss) as loss:
        train(folder, f"--impl reference {words}", seed)
    return torch.stack([call.args[2] for call in loss.call_args_list])


def test_every_step_has_its_own_noise_and_every_epoch_its_own_order(tmp_path):
    """Two seeds, two epochs, two steps per epoch; every epoch contains all texts."""
    texts = torch.cat([given(tmp_path, "--noise-std 0"), given(tmp_path, "--noise-law none", 1)])
    noise = torch.cat([given(tmp_path, ""), given(tmp_path, "", 1)]) - texts
    assert len(noise[:, 0, 0].round(decimals=3).unique()) == 8
    orders = texts[..., 0].view(4, 300)
    assert len(orders.unique(dim=0)) == 4
    assert torch.equal(orders.sort().values, TEXTS[:, 0].sort().values.expand(4, -1))


def test_normalize(tmp_path):
    """Texts and images have length 1; the noise is relative to that, and the sum is not normalised again."""
    texts = given(tmp_path, "--normalize --noise-std 0")
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(4, 150))
    noise = given(tmp_path, "--normalize") - texts
    assert noise.std() == pytest.approx(0.15, rel=0.05)
    adapter = rp.Adapter(10, 4, 0)
    shorter = INPUTS._replace(image_embeddings=TEXTS)
    found = [rp.evaluate(config_of("--normalize"), adapter, inputs, CPU) for inputs in (INPUTS, shorter)]
    assert found[0][0] == found[1][0]


@pytest.mark.parametrize("seen, kept", [(5, 5), (4, 7)])
def test_texts_of_unseen_labels_are_trained_on_where_labels_are_few(seen, kept):
    """Seven texts with a label each: those without a trained label are left out, unless labels are fewer than FEW."""
    inputs = INPUTS._replace(label_embeddings=torch.eye(7), text_embeddings=torch.eye(7),
                             text_labels=torch.eye(7, dtype=torch.int8))
    found = rp.only_labels(inputs, list(range(seen)))
    assert found.text_labels.shape == (kept, seen) and len(found.text_embeddings) == kept


def test_learning_rate_and_weight_decay(tmp_path):
    """0.01 (1 + cos(pi step / 4)) / 2 in four steps; every tensor decays."""
    with optimiser_steps() as steps:
        adapter = train(tmp_path, "--lr 0.01")
    for step, (group,) in enumerate(steps):
        assert group["lr"] == pytest.approx(0.01 * (1 + math.cos(math.pi * step / 4)) / 2)
        assert group["weight_decay"] == rp.WEIGHT_DECAY
    assert len(steps) == 4
    assert len(group["params"]) == len(adapter.state_dict())


@pytest.mark.parametrize("words, over_zero_shot, over_no_noise", [
    ("--seed 0 1 2 --text-count 500 --test-count 500 --epochs 25", 0.7, 0.5),
    ("--seed 0 1 --train-count 2000 --epochs 20 --features {}/voc2007_even.npz", 0.5, 2)])
def test_texts_alone_label_photos_and_noise_helps(request, cache, words, over_zero_shot, over_no_noise):
    """500 sentences and drawn pictures; 2,000 captions, 2,476 photos. The worst seed with noise beats all without."""
    if "{}" in words:
        words = words.format(request.getfixturevalue("shared") / "photo_embeddings")
    words += f" --batch-size 64 --lr 2e-3 --cache {cache} --noise-std"
    loud = outcome(rp, f"{words} 0.15")
    worst = min(one["mAP"] for one in loud["runs"])
    best = max(one["mAP"] for one in outcome(rp, f"{words} 0")["runs"])
    assert worst > loud["zero_shot_mAP"] + over_zero_shot
    assert worst > best + over_no_noise


def test_a_list_of_one_word_does_not_tag_everything(shared, tmp_path):
    """Sentences without the label are trained on too, so that the label does not go to every photo."""
    texts, labels = data.with_negatives(["A dog."], LABELS[:1, :1].numpy(), ["dog"])
    assert len(texts) == len(labels) > 1000
    assert not any("dog" in text for text in texts[1:])
    (tmp_path / "dog.txt").write_text("dog")
    words = f"--features {shared}/photo_embeddings/voc2007_even.npz --labels {tmp_path}/dog.txt --epochs 3"
    f1 = outcome(rp, words)["runs"][0]["threshold_0.5"]
    assert f1["OP"] > 30 and f1["OR"] > 50  # every photo tagged: precision is 8 percent, the share of photos with a dog
