"""metrics.py against scikit-learn, against cases worked by hand, and its memory."""
import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

import metrics


def sklearn_ap(scores, labels):
    return np.array([average_precision_score(labels[labels[:, c] >= 0, c], scores[labels[:, c] >= 0, c]) if (labels[:, c] == 1).any() else np.nan
                     for c in range(scores.shape[1])])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["plain", "ties", "constant", "one positive", "all positive", "ignored", "huge"])
def test_average_precision_equals_sklearn(kind, dtype):
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(211, 17)), (rng.random((211, 17)) < 0.2).astype(int)
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "constant":
        scores[:] = 0.25
    elif kind == "one positive":
        labels[:] = 0
        labels[rng.integers(0, 211, 17), np.arange(17)] = 1
    elif kind == "all positive":
        labels[:] = 1
    elif kind == "ignored":
        labels[rng.random(labels.shape) < 0.3] = -1
        labels[:, 3] = -1
        labels[:, 4] = 0
    elif kind == "huge":
        scores *= 1e30
    scores = scores.astype(dtype)
    mine = metrics.average_precision(scores, labels)
    assert mine.dtype == np.float64 and mine.shape == (17,)
    np.testing.assert_allclose(mine, sklearn_ap(scores, labels), rtol=0, atol=1e-12)
    shuffled = rng.permutation(211)
    np.testing.assert_array_equal(mine, metrics.average_precision(scores[shuffled], labels[shuffled]))


def test_average_precision_in_blocks(monkeypatch):
    """Blocks that do not divide the classes give the same numbers."""
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=(50, 13)), rng.integers(-1, 2, (50, 13))
    whole = metrics.average_precision(scores, labels)
    monkeypatch.setattr(metrics, "BLOCK", 50 * 4)
    np.testing.assert_array_equal(whole, metrics.average_precision(scores, labels))


def test_interpolated_by_hand():
    """Ranked labels 0 1 0 1 1: precision at the positives 1/2, 2/4, 3/5; the best at that recall or more: 3/5, 3/5, 3/5."""
    scores, labels = np.array([[5.0], [4], [3], [2], [1]]), np.array([[0], [1], [0], [1], [1]])
    assert metrics.average_precision(scores, labels)[0] == pytest.approx((1 / 2 + 2 / 4 + 3 / 5) / 3, abs=1e-15)
    assert metrics.average_precision(scores, labels, interpolated=True)[0] == pytest.approx(3 / 5, abs=1e-15)


def test_interpolated_never_lower_and_against_a_loop():
    rng = np.random.default_rng(2)
    scores, labels = np.round(rng.normal(size=(80, 6)), 1), (rng.random((80, 6)) < 0.3).astype(int)
    for c in range(6):
        points = [((labels[scores[:, c] >= s, c] == 1).mean(), (labels[scores[:, c] >= s, c] == 1).sum()) for s in np.unique(scores[:, c])]
        best = [max(precision for precision, found in points if found >= recall) for recall in range(1, labels[:, c].sum() + 1)]
        assert metrics.average_precision(scores, labels, interpolated=True)[c] == pytest.approx(np.mean(best), abs=1e-12)
    assert (metrics.average_precision(scores, labels, True) >= metrics.average_precision(scores, labels) - 1e-15).all()


def test_mean_leaves_undefined_classes_out():
    scores, labels = np.array([[0.9, 0.1, 0.3], [0.1, 0.2, 0.4]]), np.array([[1, 0, -1], [0, 0, -1]])
    assert np.isnan(metrics.average_precision(scores, labels)[1:]).all()
    assert metrics.mean_average_precision(scores, labels) == 100
    assert np.isnan(metrics.mean_average_precision(scores, np.zeros_like(labels)))


def test_f1_equals_sklearn():
    rng = np.random.default_rng(3)
    scores, labels = rng.random((300, 9)), (rng.random((300, 9)) < 0.25).astype(int)
    scores[:, 2] *= 0.4  # never predicted at 0.5
    mine, predicted = metrics.multilabel_f1(scores, labels), (scores >= 0.5).astype(int)
    CP, CR = (100 * f(labels, predicted, average="macro", zero_division=0) for f in (precision_score, recall_score))
    expected = {"CP": CP, "CR": CR, "CF1": 2 * CP * CR / (CP + CR)}
    expected.update({name: 100 * f(labels, predicted, average="micro") for name, f in (("OP", precision_score), ("OR", recall_score), ("OF1", f1_score))})
    assert mine == pytest.approx(expected, abs=1e-10)


def test_f1_by_hand_with_ignored_and_top_k():
    """Two images, three labels; the -1 counts nowhere. Top 1: image 0 -> label 0 (right), image 1 -> label 1 (wrong).
    Class 0: TP 1, claimed 1, present 1. Class 1: claimed 1, no positive: precision 0, recall undefined. Class 2: present 1, never claimed."""
    scores, labels = np.array([[0.9, 0.8, 0.1], [0.2, 0.7, 0.6]]), np.array([[1, -1, 0], [0, 0, 1]])
    top = metrics.multilabel_f1(scores, labels, top_k=1)
    assert top == pytest.approx({"CP": 100 / 3, "CR": 50, "CF1": 40, "OP": 50, "OR": 50, "OF1": 50})
    assert metrics.multilabel_f1(scores, labels, threshold=0.5) == pytest.approx({"CP": 200 / 3, "CR": 100, "CF1": 80, "OP": 200 / 3, "OR": 100, "OF1": 80})


def test_attribute_metrics_by_hand():
    """Images: P={0,1} G={0}; P={} G={1}. Accuracy (1/2 + 0)/2, precision (1/2 + 0)/2, recall (1 + 0)/2.
    Attribute 0: TPR 1, TNR 1. Attribute 1: TPR 0, TNR 0. mA (1 + 0)/2."""
    scores, labels = np.array([[0.9, 0.9], [0.1, 0.1]]), np.array([[1, 0], [0, 1]])
    assert metrics.attribute_metrics(scores, labels) == pytest.approx({"mA": 50, "accuracy": 25, "precision": 25, "recall": 50, "F1": 100 / 3})


@pytest.mark.parametrize("scores, labels, message", [
    (np.zeros((2, 3)), np.zeros((3, 2)), "both be"), (np.zeros(3), np.zeros(3), "both be"), (np.full((2, 2), np.nan), np.zeros((2, 2)), "finite"),
    (np.full((2, 2), np.inf), np.zeros((2, 2)), "finite"), (np.zeros((2, 2)), np.full((2, 2), 2), "ignored"), (np.zeros((2, 2)), np.full((2, 2), 0.5), "ignored")])
def test_refuses(scores, labels, message):
    for function in (metrics.average_precision, metrics.multilabel_f1, metrics.attribute_metrics):
        with pytest.raises(ValueError, match=message):
            function(scores, labels)
    with pytest.raises(ValueError, match="top_k"):
        metrics.multilabel_f1(np.zeros((2, 3)), np.zeros((2, 3)), top_k=4)


def test_memory_is_bounded_with_ten_thousand_classes():
    """5,000 x 10,000 float32 scores are 200 MB; the extra memory stays under that."""
    rng = np.random.default_rng(4)
    scores = rng.random((5000, 10000), dtype=np.float32)
    labels = (scores < 0.001).astype(np.int8)
    tracemalloc.start()
    values = metrics.average_precision(scores, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.isfinite(values).sum() > 9000
    assert peak < 150 * 2 ** 20, f"{peak / 2 ** 20:.0f} MiB"
