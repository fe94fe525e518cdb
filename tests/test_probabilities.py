"""Probabilities that scores imply, and thresholds without labels: docs/probabilities.md, checked by other means."""
import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, f1_score

import adapter_rp as rp
import metrics
import sspa

BOTH = pytest.mark.parametrize("method", [rp, sspa])
SETTINGS = [(gamma_neg, gamma_pos, clip, focal) for gamma_neg in (1.0, 2.0, 4.0) for gamma_pos in (0.0, 1.0)
            for clip in (0.0, 0.05) for focal in ("full", "stopped")]


@BOTH
@pytest.mark.parametrize("chance", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_logit_of_smallest_expected_loss_states_the_chance(method, settings, chance):
    """pi l1(z) + (1 - pi) l0(z): its gradient, as training has it, is 0 at z; if not stopped, its minimum is there."""
    def expected(z):
        z = torch.full((1, 2), z).double().requires_grad_()
        absent, present = (method.asymmetric_loss_reference(z[:, :1], torch.tensor([[label]]), *settings)
                           for label in (0, 1))
        loss = (1 - chance) * absent + chance * present
        loss.backward()
        return loss.item(), z.grad.sum().item()

    z = brentq(lambda z: expected(z)[1], -2.94, 25, xtol=1e-12)
    assert method.asymmetric_probability(torch.tensor([[z]]), *settings).item() == pytest.approx(chance, abs=1e-6)
    if settings[3] == "full":
        least = minimize_scalar(lambda z: expected(z)[0], (-2.9, z + 1), tol=1e-12)
        assert least.x == pytest.approx(z, abs=1e-4)


@BOTH
@pytest.mark.parametrize("settings", [*SETTINGS, (0.0, 0.0, 0.05, "full")])
def test_chances_are_finite_and_keep_the_ranking(method, settings):
    z = torch.linspace(-40, 40, 4001)
    z[0] = -1e4
    z[-1] = 1e4
    chances = method.asymmetric_probability(torch.stack([z, z], 1).T, *settings)  # of any memory format
    assert chances.dtype == torch.float64 and torch.equal(chances[0], chances[1])
    assert chances[0, 0] == 0 and 0.9 < chances[0, -1] <= 1 and (chances.diff() >= -1e-15).all()


@BOTH
def test_chances_of_plain_cross_entropy_are_the_sigmoid(method):
    z = torch.linspace(-50, 50, 101).double()[None]
    assert torch.allclose(method.asymmetric_probability(z, 0, 0, 0), torch.sigmoid(z), rtol=1e-12, atol=0)


def test_learned_logits_give_the_chances_back():
    """Six kinds of rows; a label is present with its kind's own probability; the classifier learns a logit a kind."""
    chances = torch.tensor([[0.02, 0.1, 0.3, 0.5, 0.7, 0.95]]).T
    draw = torch.Generator().manual_seed(0)
    targets = (torch.rand(6, 2000, generator=draw) < chances).to(torch.int8)
    weight = torch.zeros(1, 6, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")
    hidden = torch.eye(6).repeat_interleave(2000, 0)

    def loss():
        optimiser.zero_grad()
        loss = rp.classifier_loss_fused(hidden, weight, torch.zeros(1), targets.reshape(-1, 1))
        loss.backward()
        return loss
    optimiser.step(loss)
    learned = rp.asymmetric_probability(weight.detach())[0]
    assert learned.tolist() == pytest.approx(targets.double().mean(1).tolist(), abs=1e-3)


@pytest.mark.parametrize("words, chance", [("--loss bce", 0.5), ("--gamma-neg 0", 0.5), ("", 0.1908),
                                           ("--focal-gradient stopped", 0.0588), ("--clip 0.05", 0.1276)])
def test_a_method_states_chances_by_its_own_loss(words, chance):
    config = rp.run.parse(rp.Config, words.split(), "", "")
    assert rp.probabilities_of(config, torch.tensor([[0.5]]).double()).item() == pytest.approx(chance, abs=1e-4)


# --- how good they are ------------------------------------------------------------------------------------------------

@pytest.fixture
def drawn():
    """Probabilities of 3 classes on 400 images, and labels drawn by them, some ignored"""
    draw = np.random.default_rng(0)
    chances = draw.beta(0.5, 1.5, (400, 3))
    labels = (draw.random(chances.shape) < chances).astype(int)
    labels[draw.random(chances.shape) < 0.1] = -1
    return chances, labels


def test_calibration_error_and_brier_score(drawn):
    """scikit-learn's curve, weighted by the entries of its bins; bins where there is none are left out of the curve."""
    chances, labels = drawn
    chances[:200, 0] = 0.999
    p = chances[labels >= 0]
    y = labels[labels >= 0]
    observed, predicted = calibration_curve(y, p, n_bins=15)
    entries = np.histogram(p, 15, (0, 1))[0]
    expected = 100 * np.average(abs(observed - predicted), weights=entries[entries > 0])
    assert metrics.calibration_error(chances, labels) == pytest.approx(expected)
    assert metrics.brier_score(chances, labels) == pytest.approx(brier_score_loss(y, p))


def test_calibration_error_by_hand():
    """Bins: 0.1 and 0.3, of which one is present; 0.5, present; exactly 1, absent.
    (2 |0.2 - 1/2| + 1 |0.5 - 1| + 1 |1 - 0|) / 4; what is ignored counts nowhere"""
    chances = np.array([[0.1, 0.3, 0.5, 1.0, 0.4]])
    labels = np.array([[0, 1, 1, 0, -1]])
    assert metrics.calibration_error(chances, labels, bins=2) == pytest.approx(100 * (0.6 + 0.5 + 1) / 4)
    assert metrics.reliability(chances, labels, bins=2).tolist() == [[2, 1, 1], [0.4, 0.5, 1], [1, 1, 0]]


def test_macro_f1(drawn):
    chances, labels = drawn
    thresholds = np.array([0.1, 0.3, 0.99])
    expected = []
    for column, threshold in enumerate(thresholds):
        known = labels[:, column] >= 0
        expected.append(100 * f1_score(labels[known, column], chances[known, column] > threshold))
    assert metrics.macro_f1(chances, labels, thresholds) == pytest.approx(np.mean(expected))
    assert metrics.macro_f1(chances[:, :1], labels[:, :1], 0.1) == pytest.approx(expected[0])


def expected_f1(p, threshold):
    tagged = p > threshold
    return 2 * p[tagged].sum() / (tagged.sum() + p.sum())


@pytest.mark.parametrize("decimals", [1, 2, 15])
@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_thresholds_without_labels_have_the_highest_expected_f1(count, decimals):
    """Against every other threshold, with ties; where nothing is likely at all, nothing is tagged."""
    chances = np.random.default_rng(count).beta(0.5, 2, (count, 40)).round(decimals)
    chances[:, 0] = 0
    thresholds = metrics.expected_f1_thresholds(chances)
    assert thresholds[0] > 0
    for p, threshold in zip(chances.T, thresholds, strict=True):
        if p.any():
            assert expected_f1(p, threshold) == pytest.approx(max(expected_f1(p, other) for other in [0, *p]))


def test_thresholds_without_labels_find_what_labels_would(drawn):
    """On many images with calibrated probabilities F1 is the expected one, and no single threshold is better."""
    draw = np.random.default_rng(1)
    chances = draw.beta(0.3, [[1, 2, 6]], (20_000, 3))
    labels = (draw.random(chances.shape) < chances).astype(int)
    thresholds = metrics.expected_f1_thresholds(chances)
    found = metrics.macro_f1(chances, labels, thresholds)
    wanted = 100 * np.mean([expected_f1(p, threshold) for p, threshold in zip(chances.T, thresholds, strict=True)])
    assert found == pytest.approx(wanted, abs=1)
    assert found > max(metrics.macro_f1(chances, labels, one) for one in np.linspace(0, 1, 51))


@pytest.mark.parametrize("bad", [np.nan, 1.01, -0.1])
def test_only_probabilities_are_taken(bad):
    for function in (metrics.expected_f1_thresholds, lambda p: metrics.brier_score(p, p > 1)):
        with pytest.raises(ValueError, match="not finite|must be from 0 to 1"):
            function(np.array([[0.1, bad]]))
