"""Probabilities that scores imply, and thresholds without labels: docs/probabilities.md, checked by other means."""
from itertools import product

import numpy as np
import pytest
import torch
from conftest import table
from scipy.optimize import brentq

import adapter_rp as rp
import metrics
import run
import sspa

BOTH = pytest.mark.parametrize("method", [rp, sspa])
SETTINGS = [*product((1.0, 2.0, 4.0), (0.0, 1.0), (0.0, 0.05), ("full", "stopped"))]  # gamma-, gamma+, clip


@BOTH
@pytest.mark.parametrize("chance", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_logit_of_smallest_expected_loss_states_the_chance(method, settings, chance):
    """pi l1(z) + (1 - pi) l0(z): its gradient, as training has it, is 0 at z. Below it is negative and above positive,
    as the probability that belongs to a logit never falls (next test)."""
    def slope(z):
        z = torch.tensor([[z]]).double().requires_grad_()
        absent, present = (method.asymmetric_loss_reference(z, torch.tensor([[label]]), *settings) for label in (0, 1))
        return torch.autograd.grad((1 - chance) * absent + chance * present, z)[0].item()

    z = brentq(slope, -2.94, 25, xtol=1e-12)
    assert method.asymmetric_probability(torch.tensor([[z]]), *settings).item() == pytest.approx(chance, abs=1e-6)


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


@pytest.mark.parametrize("method, words, chance", [
    (rp, "--loss bce", 0.5), (rp, "--gamma-neg 0", 0.5), (rp, "", 0.1908), (rp, "--focal-gradient stopped", 0.0588),
    (rp, "--clip 0.05", 0.1276), (sspa, "--gamma-neg 4 --clip 0.05 --focal-gradient stopped", 0.0359)])
def test_a_method_states_chances_by_its_own_loss(method, words, chance):
    """The last, of a score of 1/2: l0' = 0.45^4 / 0.55 / 4 and l1' = -1/2"""
    config = run.parse(method.Config, words.split(), "", "")
    assert method.probabilities_of(config, torch.tensor([[0.5]]).double()).item() == pytest.approx(chance, abs=1e-4)


# --- how good they are ------------------------------------------------------------------------------------------------

def test_measures_by_hand():
    """Of 15 bins one holds 0.1 and 0.13, of which one is present; 0.5 is present, 0.55 and 1 are absent. Ignored labels
    count nowhere. Calibration error: (2 |0.115 - 1/2| + |0.5 - 1| + 0.55 + 1) / 5"""
    chances = table("0.1 0.13 0.5 0.55 1 0.4")
    labels = table("0 1 1 0 0 -1")
    bins = metrics.reliability(chances, labels)
    assert bins[:, [1, 7, 8, 15]] == pytest.approx(table("2 1 1 1; 0.23 0.5 0.55 1; 1 1 0 0"))
    assert bins[0].sum() == 5
    assert metrics.calibration_error(chances, labels) == pytest.approx(20 * (0.77 + 0.5 + 0.55 + 1))
    assert metrics.brier_score(chances, labels) == pytest.approx((0.1 ** 2 + 0.87 ** 2 + 0.5 ** 2 + 0.55 ** 2 + 1) / 5)


def test_macro_f1_by_hand():
    """2 TP / (predicted + present), each label with a threshold of its own: 2 / 3; one that is neither predicted nor
    present: 0; one ignored everywhere is left out. Above 0.5 the first label is predicted only where it is absent."""
    chances = table("0.4 0.2 0.9; 0.6 0.5 0.9; 0.9 0.1 0.9")
    labels = table("1 0 -1; 0 0 -1; -1 0 -1")
    assert metrics.macro_f1(chances, labels, table("0.2 0.5 0.5")) == pytest.approx(100 / 3)
    assert metrics.macro_f1(chances, labels) == 0


@pytest.mark.parametrize("decimals", [1, 2, 15])
@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_thresholds_without_labels_have_the_highest_expected_f1(count, decimals):
    """Against every other threshold, with ties; where nothing is likely at all, nothing is tagged."""
    def expected_f1(p, threshold):
        tagged = p > threshold
        return 2 * p[tagged].sum() / (tagged.sum() + p.sum())

    chances = np.random.default_rng(count).beta(0.5, 2, (count, 40)).round(decimals)
    chances[:, 0] = 0
    thresholds = metrics.expected_f1_thresholds(chances)
    assert thresholds[0] > 0
    for p, threshold in zip(chances.T, thresholds, strict=True):
        if p.any():
            assert expected_f1(p, threshold) == pytest.approx(max(expected_f1(p, other) for other in [0, *p]))


@pytest.mark.parametrize("bad", [np.nan, 1.01, -0.1])
@pytest.mark.parametrize("function", [metrics.multilabel_f1, metrics.attribute_metrics, metrics.brier_score,
                                      metrics.reliability, lambda p, _: metrics.expected_f1_thresholds(p)])
def test_only_probabilities_are_taken(function, bad):
    with pytest.raises(ValueError, match="not finite|take the sigmoid of logits"):
        function(np.array([[0.1, bad]]), np.eye(1, 2))
