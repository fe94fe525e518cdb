"""metrics.py and the linear probe of run.py against scikit-learn, against cases worked by hand, and their costs."""
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

import metrics
import run


def sklearn_average_precision(scores, labels):
    known = [(truth[truth >= 0], score[truth >= 0]) for truth, score in zip(labels.T, scores.T, strict=True)]
    return np.array([average_precision_score(*column) if column[0].any() else np.nan for column in known])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_average_precision_equals_sklearn(dtype, monkeypatch):
    """Plain, tied, constant and huge scores with few, one, only, some unknown, no and only unknown positives."""
    rng = np.random.default_rng(0)
    plain, few = rng.normal(size=(211, 5)), (rng.random((211, 5)) < 0.2).astype(int)
    scores = [plain, np.round(plain), np.full_like(plain, 0.25), 1e30 * plain]
    labels = [few, np.eye(211, 5, dtype=int), np.ones_like(few), np.where(plain > 1, -1, few), 0 * few, 0 * few - 1]
    scores, labels = np.repeat(np.stack(scores), 6, axis=0), np.stack(labels * 4)
    scores, labels = (np.hstack(columns) for columns in (scores.astype(dtype), labels))  # every kind with every other
    mine = metrics.average_precision(scores, labels)
    assert mine.dtype == np.float64 and mine.shape == (120,)
    np.testing.assert_allclose(mine, sklearn_average_precision(scores, labels), rtol=0, atol=1e-12)
    shuffled = rng.permutation(211)
    np.testing.assert_array_equal(mine, metrics.average_precision(scores[shuffled], labels[shuffled]))
    monkeypatch.setattr(metrics, "BLOCK", 211 * 7)  # blocks of classes that do not divide them
    np.testing.assert_array_equal(mine, metrics.average_precision(scores, labels))


def test_interpolated_by_hand():
    """Ranked labels 0 1 (0 1) 1, the third and fourth tied: precision at the positives 1/2, 2/4, 3/5; the best at that
    recall or more 3/5. Turned around, 1 1 0 1 0: 2/2, 2/2, 3/4 and nothing better further down."""
    scores = np.array([[5.0, 4, 3, 3, 1], [1, 2, 3, 3, 4]]).T
    labels = np.array([[0, 1, 0, 1, 1]] * 2).T
    expected, interpolated = [(1 / 2 + 2 / 4 + 3 / 5) / 3, (1 + 2 / 3 + 3 / 4) / 3], [3 / 5, (1 + 3 / 4 + 3 / 4) / 3]
    assert metrics.average_precision(scores, labels) == pytest.approx(expected, abs=1e-15)
    assert metrics.average_precision(scores, labels, interpolated=True) == pytest.approx(interpolated, abs=1e-15)


def test_mean_leaves_undefined_classes_out():
    scores, labels = np.array([[0.9, 0.1, 0.3], [0.1, 0.2, 0.4]]), np.array([[1, 0, -1], [0, 0, -1]])
    assert metrics.mean_average_precision(scores, labels) == 100
    assert np.isnan(metrics.mean_average_precision(scores, np.zeros_like(labels)))


def test_f1_equals_sklearn():
    rng = np.random.default_rng(3)
    scores, labels = rng.random((300, 9)), (rng.random((300, 9)) < 0.25).astype(int)
    scores[:, 2] *= 0.4  # never predicted at 0.5
    scores[:100, 4], labels[:, 5] = 0.5, 0  # exactly at the threshold is not above it; a class without a positive
    predicted = (scores > 0.5).astype(int)
    CP, CR = (100 * f(labels, predicted, average="macro", zero_division=0) for f in (precision_score, recall_score))
    OP, OR, OF1 = (100 * f(labels, predicted, average="micro") for f in (precision_score, recall_score, f1_score))
    expected = {"CP": CP, "CR": CR, "CF1": 2 * CP * CR / (CP + CR), "OP": OP, "OR": OR, "OF1": OF1}
    assert metrics.multilabel_f1(scores, labels) == pytest.approx(expected, abs=1e-10)


def test_f1_and_ap_equal_torchmetrics():
    """torchmetrics 1.9.0 gave these: multilabel_average_precision(S, Y, 4, average=None, ignore_index=-1), 0 where
    there is no positive; multilabel_precision and _recall(S, Y, 4, 0.5, "macro", ignore_index=-1) are CP and CR,
    "micro" OP and OR. Its macro F1, the mean of the labels' F1, is 53.33: CF1 is no such mean."""
    scores = np.array([[.9, .5, .3, .2], [.6, .5, .8, .1], [.5, .2, .8, .7], [.1, .9, .4, .6], [.7, .6, .1, .5]])
    labels = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 0, -1, 0], [0, 1, 0, 0], [1, 1, 1, 0]])
    assert metrics.average_precision(scores, labels)[:3] == pytest.approx([0.9166667, 0.9166667, 0.75], abs=1e-6)
    found = metrics.multilabel_f1(scores, labels)
    expected = {"CP": 66.66667, "CR": 45.83333, "OP": 62.5, "OR": 62.5, "OF1": 62.5}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert found["CF1"] == pytest.approx(2 * 66.66667 * 45.83333 / (66.66667 + 45.83333), abs=1e-3)


def test_f1_and_ap_equal_rams():
    """RAM's public code (precision_recall and mAP_class at commit a2553f7, run on this table) gave these: every class
    counts, one without a positive (the last) with 0. Tied scores hang on the order of rows there, so not in class 1."""
    scores = np.array([[.9, .5, .3, .2], [.6, .5, .8, .1], [.5, .2, .8, .7], [.1, .9, .4, .6], [.7, .6, .1, .5]])
    labels = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]])
    found = metrics.multilabel_f1(scores, labels)
    assert [found["CP"], found["CR"]] == pytest.approx([54.1666666, 45.8333333], abs=1e-6)
    assert metrics.average_precision(scores, labels)[[0, 2]] == pytest.approx([0.9166667, 0.45], abs=1e-6)


def test_f1_by_hand_with_ignored_and_top_k():
    """Two images, three labels; the -1 counts nowhere. Top 1: image 0 -> label 0 (right), image 1 -> label 1 (wrong).
    Class 0: TP 1, claimed 1, present 1. Class 1: claimed 1, no positive: precision 0, recall undefined, 0. Class 2:
    present 1, never claimed; at 0.5 it is, and rightly."""
    scores, labels = np.array([[0.9, 0.8, 0.1], [0.2, 0.7, 0.6]]), np.array([[1, -1, 0], [0, 0, 1]])
    top, above = (metrics.multilabel_f1(scores, labels, **how).values() for how in ({"top_k": 1}, {"threshold": 0.5}))
    assert [*top] == pytest.approx([100 / 3, 100 / 3, 100 / 3, 50, 50, 50])  # CP, CR, CF1, OP, OR, OF1
    assert [*above] == pytest.approx([200 / 3, 200 / 3, 200 / 3, 200 / 3, 100, 80])
    with pytest.raises(ValueError, match="top_k must lie in 1..3, got 4"):
        metrics.multilabel_f1(scores, labels, top_k=4)


def test_attribute_metrics_by_hand():
    """Images: P={0,1} G={0}; P={} G={1}. Accuracy (1/2 + 0)/2, precision (1/2 + 0)/2, recall (1 + 0)/2.
    Attribute 0: TPR 1, TNR 1. Attribute 1: TPR 0, TNR 0. mA (1 + 0)/2."""
    scores, labels = np.array([[0.9, 0.9], [0.1, 0.1]]), np.array([[1, 0], [0, 1]])
    expected = {"mA": 50, "accuracy": 25, "precision": 25, "recall": 50, "F1": 100 / 3}
    assert metrics.attribute_metrics(scores, labels) == pytest.approx(expected)


@pytest.mark.parametrize("scores, labels, message", [
    (np.zeros((2, 3)), np.zeros((3, 2)), "both be"), (np.zeros(3), np.zeros(3), "both be"),
    (np.full((2, 2), np.nan), np.zeros((2, 2)), "finite"), (np.full((2, 2), np.inf), np.zeros((2, 2)), "finite"),
    (np.zeros((2, 2)), np.full((2, 2), 2), "ignored"), (np.zeros((2, 2)), np.full((2, 2), 0.5), "ignored")])
@pytest.mark.parametrize("name", ["average_precision", "multilabel_f1", "attribute_metrics"])
def test_refuses(name, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, name)(scores, labels)


def test_what_would_be_silently_wrong():
    """Logits where probabilities are wanted; labels the other way round; the strongest of unsigned scores; labels of
    1 and -1 alone."""
    scores, labels = np.array([[2.0, -1], [0.3, 0.4]]), np.array([[1, 0], [0, 1]])
    for function in (metrics.multilabel_f1, metrics.attribute_metrics):
        with pytest.raises(ValueError, match="take the sigmoid of logits"):
            function(scores, labels)
    metrics.multilabel_f1(scores, labels, top_k=1)
    unsigned = np.array([[0, 9, 200]], np.uint8)
    assert metrics.multilabel_f1(unsigned, np.array([[0, 0, 1]]), top_k=1)["OF1"] == 100
    with pytest.warns(UserWarning, match="labels 1 and -1 but no 0"):
        metrics.average_precision(np.eye(2), np.array([[1, 0], [-1, 1]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.average_precision(np.eye(3), np.array([[1, -1, 0], [-1, -1, 1], [0, -1, 1]]))


def test_memory_is_bounded_with_ten_thousand_classes():
    """5,000 x 10,000 float32 scores are 200 MB; the extra memory stays under that."""
    scores = np.random.default_rng(4).random((5000, 10000), dtype=np.float32)
    labels = (scores < 0.001).astype(np.int8)
    tracemalloc.start()
    metrics.average_precision(scores, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * 2 ** 20, f"{peak / 2 ** 20:.0f} MiB"


@pytest.mark.parametrize("strength", [0.5, 100])
def test_linear_probe_equals_sklearn(strength):
    """Features in a narrow cone, as CLIP's are, of any length; ignored labels are left out of their own column."""
    rng = np.random.default_rng(5)
    features, images = (rng.normal(size=(count, 12)) + 4 for count in (400, 50))
    labels = (features[:, :3] + rng.normal(size=(400, 3)) > [4, 5, 6]).astype(np.int8)
    labels[:150, 1] = -1
    unit, new = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (features, images))
    expected = []
    for column in labels.T:
        oracle = LogisticRegression(C=strength, tol=1e-8, max_iter=10000).fit(unit[column >= 0], column[column >= 0])
        expected.append(oracle.decision_function(new))
    found = run.linear_probe(*map(torch.from_numpy, (features, labels, images)), strength)
    np.testing.assert_allclose(found.numpy(), np.transpose(expected), atol=2e-3)
    without = run.linear_probe(*map(torch.from_numpy, (features, 0 * labels, images)), strength)
    assert without.isfinite().all() and (without < -5).all()  # no positive: scikit-learn refuses, this says no


def test_linear_probe_is_skipped_where_it_takes_long(monkeypatch, capsys):
    rows, truth = torch.eye(6, 4), torch.eye(6, 2, dtype=torch.int8)
    for limit, found in ((48, float), (47, type(None))):
        monkeypatch.setattr(run, "PROBE_LIMIT", limit)
        config = run.parse(run.Options, [], "")
        result = run.baselines(config, torch.eye(2, 4), rows, truth.numpy(), rows, truth)
        assert type(result["linear_probe_mAP"]) is found and result["zero_shot_ap"] == [100, 100]
    assert capsys.readouterr().err == "no linear probe: 6 x 4 features, 2 labels take long\n"
