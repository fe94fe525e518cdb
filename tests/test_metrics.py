"""metrics.py and the linear probe of baselines.py: cases worked by hand, and scikit-learn as the oracle."""
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import normalize

import baselines
import metrics

# --- by hand ----------------------------------------------------------------------------------------------------------

def test_interpolated_average_precision():
    """Ranked labels 0 1 (0 1) 1, the third and fourth tied: precision at the positives 1/2, 2/4, 3/5; the best at that
    recall or more 3/5. In reverse, 1 (1 0) 1 0: 1, 2/3, 3/4; the best 1, 3/4, 3/4."""
    scores = table("5 4 3 3 1; 1 2 3 3 4").T
    labels = table("0 1 0 1 1; 0 1 0 1 1").T
    found = metrics.average_precision(scores, labels, interpolated=True)
    assert found == pytest.approx([3 / 5, (1 + 3 / 4 + 3 / 4) / 3])


def test_mean_leaves_out_classes_without_a_positive():
    """The first class has AP 1/2, the second no positive, the third is ignored everywhere."""
    scores = table("0.1 0.1 0.3; 0.9 0.2 0.4")
    assert metrics.mean_average_precision(scores, table("1 0 -1; 0 0 -1")) == 50
    assert np.isnan(metrics.mean_average_precision(scores, 0 * scores))


@pytest.mark.parametrize("top_k, expected", [
    (None, {"CP": 200 / 3, "CR": 50, "CF1": 400 / 7, "OP": 50, "OR": 200 / 3, "OF1": 400 / 7}),
    (1, {"CP": 100 / 3, "CR": 50 / 3, "CF1": 200 / 9, "OP": 100 / 3, "OR": 100 / 3, "OF1": 100 / 3})])
def test_f1(top_k, expected):
    """Above 0.5: {0}, {1, 2}, {1}; top 1: {0}, {1}, {1}, the first of equal scores. What is -1 counts nowhere: the last
    class is left out. Class 1 is never present: precision 0, recall 0. CF1 is the harmonic mean of CP and CR.
    CP (1 + 0 + 1) / 3, top 1 (1 + 0 + 0) / 3; CR (1/2 + 0 + 1) / 3, (1/2 + 0 + 0) / 3; OP 2/4, 1/3; OR 2/3, 1/3"""
    scores = table("0.9 0.8 0.5 0.9; 0.2 0.7 0.7 0.1; 0.1 0.6 0.1 0.1")
    labels = table("1 -1 0 -1; 0 0 1 -1; 1 0 0 -1")
    assert metrics.multilabel_f1(scores, labels, top_k=top_k) == pytest.approx(expected)


def test_attribute_metrics():
    """Attributes: TPR 1/2, TNR 1; 0, 0; 1, 0; the last two lack positives or negatives.  mA = (3/4 + 0 + 1/2) / 3
    Images: predicted {0, 1}, {2}, {}, {2, 4} of {0}, {1, 2}, {}, {0, 1, 4}; 0.5 is not above 0.5, and -1 is ignored.
    Accuracy (1/2 + 1/2 + 0 + 1/4) / 4, precision (1/2 + 1 + 0 + 1/2) / 4 = 1/2, recall (1 + 1/2 + 0 + 1/3) / 4 = 11/24,
    F1 = 2 * 1/2 * 11/24 / (1/2 + 11/24) = 11/23"""
    scores = table("0.9 0.9 0.9 0 0; 0.1 0.5 0.9 0 0; 0.1 0.1 0.1 0 0; 0.1 0.1 0.9 0 0.9")
    labels = table("1 0 -1 0 -1; 0 1 1 0 -1; 0 -1 -1 0 -1; 1 1 0 -1 1")
    expected = {"mA": 500 / 12, "accuracy": 31.25, "precision": 50, "recall": 1100 / 24, "F1": 1100 / 23}
    with pytest.warns(UserWarning, match="labels 1 and -1 but no 0"):
        assert metrics.attribute_metrics(scores, labels) == pytest.approx(expected)


# --- scikit-learn -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block", [1, 4 * 211, metrics.BLOCK])
def test_average_precision_equals_sklearn(block, monkeypatch):
    """Tied, huge and constant scores; all, one and some positives; one class at a time, four, which does not divide
    their number, and all."""
    monkeypatch.setattr(metrics, "BLOCK", block)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(211, 6)).round(1)
    scores[:, 2] *= 1e300
    scores[:, 3] = 0.25
    labels = rng.choice([1, 0, -1], scores.shape, p=[0.2, 0.7, 0.1])
    labels[:, 0] = 1
    labels[1:, 1] = 0
    found = metrics.average_precision(scores, labels)
    for column, one in enumerate(found):
        known = labels[:, column] >= 0
        assert one == pytest.approx(average_precision_score(labels[known, column], scores[known, column]))


# --- what would be silently wrong -------------------------------------------------------------------------------------

@pytest.mark.parametrize("scores, labels, message", [
    ("0 0", "0; 0", "both be"), ("-inf 0", "0 0", "1 values that are not finite"), ("inf 0", "0 0", "not finite"),
    ("0 0", "2 0", "ignored"), ("0 0", "-2 0", "ignored"), ("0 0", "0.5 0", "ignored")])
@pytest.mark.parametrize("name", ["average_precision", "multilabel_f1", "attribute_metrics"])
def test_refuses(name, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, name)(table(scores), table(labels))


@pytest.mark.parametrize("kind, least", [("uint8", 200), ("int64", 2 ** 60), ("uint64", 2 ** 60)])
def test_takes_any_numbers(kind, least):
    """The minus of an unsigned number wraps around; 2^60 and the numbers above it are one float.
    Ranked labels 1 (ignored) 0 1 0: AP (1 + 2/3) / 2; top 1 finds one of two: F1 2 / 3"""
    scores = np.arange(least, least + 5).astype(kind)[None]
    labels = table("0 1 0 -1 1")
    assert metrics.average_precision(scores.T, labels.T) == pytest.approx([5 / 6])
    assert metrics.multilabel_f1(scores, labels, top_k=1)["OF1"] == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="top_k must lie in 1..5, got 6"):
        metrics.multilabel_f1(scores, labels, top_k=6)


@pytest.mark.parametrize("odd", ["x", b"x", None, 1j, np.datetime64(0, "s")])
def test_wants_real_numbers(odd):
    for scores, labels in (([[odd]], [[1]]), ([[1]], [[odd]])):
        with pytest.raises(ValueError, match="must be real numbers"):
            metrics.average_precision(scores, labels)


@pytest.mark.filterwarnings("error")
def test_ignored_labels_beside_absent_ones_are_not_doubted():
    metrics.average_precision(np.eye(3), table("1 -1 0; -1 -1 1; 0 -1 1"))


def test_memory_is_bounded():
    """Scores of 80 MB need less than half of that in addition."""
    scores = np.random.default_rng(4).random((5000, 4000), dtype=np.float32)
    labels = (scores < 0.001).astype(np.int8)
    tracemalloc.start()
    metrics.average_precision(scores, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < scores.nbytes / 2


# --- zero-shot, linear probe ------------------------------------------------------------------------------------------

def test_zero_shot_plain_and_centred():
    """Unit embeddings (1, 0), (0, 1) of both sides, minus their mean (1/2, 1/2): (1/2, -1/2), (-1/2, 1/2)."""
    prompts, images, expected = (torch.tensor(table(text)) for text in ("2 0; 0 3", "5 0; 0 1", "1 -1; -1 1"))
    found = baselines.zero_shot(prompts, images)
    torch.testing.assert_close(found, {"zero_shot": torch.eye(2).double(), "zero_shot_centred": expected})
    assert "zero_shot_centred" not in baselines.zero_shot(torch.ones(1, 2), torch.ones(3, 2))  # its own mean


@pytest.mark.parametrize("strength", [0.5, 100])
def test_linear_probe_equals_sklearn(strength):
    """Features in a narrow cone, as CLIP's are, of any length; ignored labels are left out of their own column; a label
    without a positive, which scikit-learn refuses, is predicted absent."""
    drawn, images = (4 + torch.randn(450, 15, generator=torch.Generator().manual_seed(5))).split(400)
    features = drawn[:, :12]
    images = images[:, :12]
    labels = (drawn[:, :3] > drawn[:, 12:] + 1).to(torch.int8)
    labels[:150, 1] = -1
    labels[:, 2] = 0
    found = baselines.linear_probe(features, labels, images, strength)
    for column in (0, 1):
        known = labels[:, column] >= 0
        oracle = LogisticRegression(C=strength, tol=1e-8, max_iter=10000)
        oracle.fit(normalize(features[known]), labels[known, column])
        np.testing.assert_allclose(found[:, column], oracle.decision_function(normalize(images)), atol=2e-3)
    assert found[:, 2].isfinite().all() and found[:, 2].max() < -5


@pytest.mark.parametrize("limit, names", [(48, ["linear_probe"]), (47, [])])
def test_linear_probe_is_skipped_where_it_takes_long(limit, names, monkeypatch):
    monkeypatch.setattr(baselines, "PROBE_LIMIT", limit)
    rows = torch.eye(6, 4)
    assert list(baselines.linear_probe_where_quick(rows, rows[:, :2], rows)) == names
