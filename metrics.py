"""Metrics of multi-label recognition for many classes at once; scikit-learn is the oracle in the tests.

N images, C labels. Scores are any real numbers for average precision, 0 to 1 for the F1 family. Labels are 1 present, 0
absent, -1 ignored (left out of that class only); VOC's own files use other marks (1, -1 absent, 0 difficult): convert
them first. Fractions in average_precision, brier_score and thresholds, counts in reliability, percent elsewhere.

>>> import numpy as np, metrics
>>> scores, labels = np.array([[0.9, 0.2], [0.8, 0.7], [0.1, 0.6]]), np.array([[1, 0], [0, 1], [1, -1]])
>>> metrics.mean_average_precision(scores, labels)
91.66666666666666

Definitions (field): average precision as scikit-learn's average_precision_score; the interpolated variant of the VOC
2012 devkit; CP, CR, CF1, OP, OR, OF1 as in CNN-RNN (Wang et al., CVPR 2016) and its followers; attribute metrics as in
RAP (Li et al., 2016).
"""
import warnings

import numpy as np

BLOCK = 2 ** 22  # entries of scores sorted at once, so that memory stays bounded when N x C is large


def _checked(scores, labels):
    scores = np.asarray(scores)
    labels = np.asarray(labels)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must both be [N, C]; got {scores.shape} and {labels.shape}")
    for array in (scores, labels):
        if array.dtype.kind not in "biuf":  # bool, integers, floats
            raise ValueError(f"scores and labels must be real numbers; got an array of {array.dtype}")
    if not scores.size:
        return scores, labels
    if not (np.isfinite(scores.min()) and np.isfinite(scores.max())):  # no copy of a large array
        raise ValueError(f"scores hold {(~np.isfinite(scores)).sum()} values that are not finite")
    fractional = labels.dtype.kind == "f" and (labels != np.round(labels)).any()
    if fractional or labels.min() < -1 or labels.max() > 1:
        raise ValueError("labels must be 1 (present), 0 (absent) or -1 (ignored)")
    if labels.min() == -1:
        lowest = labels.min(0)
        highest = labels.max(0)
        has_zero = (labels == 0).any(0)
        if ((lowest == -1) & (highest == 1) & ~has_zero).any():
            warnings.warn("a class has labels 1 and -1 but no 0: here -1 is ignored and 0 absent", stacklevel=3)
    return scores, labels


def _check_range(scores):
    if scores.size and not 0 <= scores.min() <= scores.max() <= 1:  # nan, too
        raise ValueError("scores must be from 0 to 1 here; take the sigmoid of logits")


def _predicted(scores, threshold, top_k=None):
    if top_k is not None:
        return _strongest(scores, top_k)
    _check_range(scores)
    return scores > threshold


def _strongest(scores, top_k):
    """The top_k highest scores of each image, ties: the lower label index first -> bool [N, C]"""
    classes = scores.shape[1]
    if not 1 <= top_k <= classes:
        raise ValueError(f"top_k must lie in 1..{classes}, got {top_k}")
    ascending = np.argsort(scores[:, ::-1], axis=1, kind="stable")  # of equal scores the last label first
    predicted = np.zeros(scores.shape, bool)
    np.put_along_axis(predicted, classes - 1 - ascending[:, -top_k:], True, axis=1)
    return predicted


def average_precision(scores, labels, interpolated=False):
    """Average precision of every class: the mean, over its positives, of the precision at the positive's score.

    scores: [N, C] real; labels: [N, C] of 1, 0, -1. Tied scores are one threshold, so the order of rows never matters.
    interpolated: precision at a positive is replaced by the largest precision at that score or any lower one (VOC
    2010-2012 devkit). Returns float64 [C], fractions; nan where a class has no positive. Raises ValueError for other
    shapes or values, and for scores that are not finite.

    AP = 1/P sum over positives i of  #(positives >= s_i) / #(all >= s_i).
    """
    scores, labels = _checked(scores, labels)
    count, classes = scores.shape
    result = np.full(classes, np.nan)
    width = max(1, BLOCK // max(1, count))
    for start in range(0, classes, width):
        # one row a class, so that sorting runs along memory
        block = np.ascontiguousarray(scores[:, start:start + width].T)
        marks = np.ascontiguousarray(labels[:, start:start + width].T)
        for row in range(len(block)):
            result[start + row] = _average_precision_of_class(block[row], marks[row], interpolated)
    return result


def _average_precision_of_class(scores, labels, interpolated):
    """scores, labels: [N] -> float. Only values are sorted, and the positives' ranks are found by bisection."""
    positives = np.sort(scores[labels == 1])
    if not len(positives):
        return np.nan
    known = np.sort(scores[labels >= 0])
    positives_above = len(positives) - np.searchsorted(positives, positives)  # [P], counts the positive itself
    all_above = len(known) - np.searchsorted(known, positives)
    precision = positives_above / all_above
    if interpolated:
        precision = np.maximum.accumulate(precision)  # positives ascend in score: best precision at this recall or more
    return precision.mean()


def mean_average_precision(scores, labels, interpolated=False):
    """Unweighted mean of average_precision over the classes that have a positive. Percent; nan if none has."""
    values = average_precision(scores, labels, interpolated)
    return 100 * _mean(values[~np.isnan(values)])


def _mean(values):
    if not len(values):
        return float("nan")
    return float(values.mean())


def _ratio(part, whole):
    """part / whole, counts of any shape; 0 where the whole is 0"""
    return part / np.maximum(whole, 1)


def _f1(precision, recall):
    if precision + recall > 0:
        return 2 * precision * recall / (precision + recall)
    return 0.0


def _percent(**fractions):
    return {name: 100 * float(value) for name, value in fractions.items()}


def multilabel_f1(scores, labels, threshold=0.5, top_k=None):
    """Per-class and overall precision, recall and F1, in percent.

    scores: [N, C] in 0..1; labels: [N, C] of 1, 0, -1. Predicted: scores > threshold (a number, or [C], one per class),
    or, if top_k is given, the top_k highest of each image (ties: the lower label index first). Ignored entries are
    neither right nor wrong, but take their place among the top_k. Returns dict CP CR CF1 OP OR OF1. CP, CR: means over
    classes of TP/(TP+FP) and TP/(TP+FN), 0 where undefined, as in RAM's public code; classes ignored everywhere are
    left out. CF1: harmonic mean of CP and CR, which is not the mean of F1s (macro_f1). OP, OR, OF1: the same of TP, FP
    and FN summed over classes; OR is nan without any positive. Raises ValueError for other shapes or values, or top_k
    outside 1..C.
    """
    scores, labels = _checked(scores, labels)
    predicted = _predicted(scores, threshold, top_k)
    hit = (predicted & (labels == 1)).sum(0)  # [C], like the next three
    claimed = (predicted & (labels >= 0)).sum(0)
    present = (labels == 1).sum(0)
    known = (labels >= 0).any(0)
    CP = _mean(_ratio(hit, claimed)[known])
    CR = _mean(_ratio(hit, present)[known])
    OP = _ratio(hit.sum(), claimed.sum())
    OR = np.nan
    if present.any():
        OR = hit.sum() / present.sum()
    return _percent(CP=CP, CR=CR, CF1=_f1(CP, CR), OP=OP, OR=OR, OF1=_f1(OP, OR))


def attribute_metrics(scores, labels, threshold=0.5):
    """Pedestrian-attribute metrics, in percent: dict mA, accuracy, precision, recall, F1.

    scores: [N, C] in 0..1; labels: [N, C] of 1, 0, -1. mA: mean over attributes of (TPR + TNR) / 2; an attribute
    without positives or without negatives is left out of it. The other four are per image, averaged over images:
    |G and P| / |G or P|, / |P|, / |G| (0 where the divisor is 0); F1 is the harmonic mean of the averaged precision and
    recall. Ignored entries count nowhere. Raises ValueError for other shapes or values.
    """
    scores, labels = _checked(scores, labels)
    present = labels == 1
    absent = labels == 0
    predicted = _predicted(scores, threshold) & (labels >= 0)
    hit = predicted & present

    # mA, over attributes
    positives = present.sum(0)
    negatives = absent.sum(0)
    true_positive_rate = _ratio(hit.sum(0), positives)
    true_negative_rate = _ratio((absent & ~predicted).sum(0), negatives)
    balanced = (true_positive_rate + true_negative_rate) / 2
    mA = _mean(balanced[(positives > 0) & (negatives > 0)])

    # the others, over images
    hits = hit.sum(1)
    accuracy = _mean(_ratio(hits, (predicted | present).sum(1)))
    precision = _mean(_ratio(hits, predicted.sum(1)))
    recall = _mean(_ratio(hits, present.sum(1)))
    return _percent(mA=mA, accuracy=accuracy, precision=precision, recall=recall, F1=_f1(precision, recall))


def macro_f1(scores, labels, threshold=0.5):
    """Mean over classes of F1 = 2 TP / (predicted + present), as scikit-learn's macro average; percent.

    scores: [N, C] in 0..1; labels: [N, C] of 1, 0, -1; threshold: a number, or [C]. Classes ignored everywhere are left
    out; one that is neither predicted nor present has F1 0. Raises ValueError for other shapes or values.
    """
    scores, labels = _checked(scores, labels)
    predicted = _predicted(scores, threshold) & (labels >= 0)
    present = labels == 1
    hits = (predicted & present).sum(0)
    known = (labels >= 0).any(0)
    return 100 * _mean(_ratio(2 * hits, predicted.sum(0) + present.sum(0))[known])


def reliability(probabilities, labels, bins=15):
    """How often labels of a given probability are present, over all known entries, in bins of equal width.

    probabilities: [N, C] in 0..1; labels: [N, C] of 1, 0, -1 -> [3, bins + 1]: entries, sum of their probabilities, how
    many are present; the last bin holds probabilities of exactly 1. Raises ValueError for other shapes or values.
    """
    probabilities, labels = _checked(probabilities, labels)
    _check_range(probabilities)
    known = labels >= 0
    probabilities = probabilities[known]
    place = np.digitize(probabilities, np.linspace(0, 1, bins + 1)) - 1
    return np.stack([np.bincount(place, weights, bins + 1) for weights in (None, probabilities, labels[known])])


def calibration_error(probabilities, labels, bins=15):
    """Expected calibration error, percent: mean over bins of |mean probability - share present|, weighted by entries,
    as torchmetrics' binary_calibration_error with norm l1 over all entries. Arguments and errors: see reliability"""
    entries, said, present = reliability(probabilities, labels, bins)
    return 100 * float(_ratio(np.abs(said - present).sum(), entries.sum()))


def brier_score(probabilities, labels):
    """Mean squared difference of probability and label over all known entries; a fraction, 0 is best. Arguments and
    errors: see reliability"""
    probabilities, labels = _checked(probabilities, labels)
    _check_range(probabilities)
    return _mean(((probabilities - labels) ** 2)[labels >= 0])


def expected_f1_thresholds(probabilities):
    """For each class the threshold with the highest expected F1 on these images; no label is used.

    probabilities: [N, C] in 0..1 -> float64 [C]. If the k likeliest images are tagged, F(k) = 2 (sum of their
    probabilities) / (k + sum of all). One more raises F if its p > F / 2, so the best set is all p > max F / 2. Where
    all are 0 the threshold is 1. Raises ValueError for other values or shapes. Field: Ye et al. 2012; Lipton et al.
    2014.
    """
    probabilities, _ = _checked(probabilities, np.zeros_like(probabilities))
    _check_range(probabilities)
    highest_first = -np.sort(-probabilities.astype(float), axis=0)
    tagged = np.arange(1, len(highest_first) + 1)[:, None]
    expected = 2 * highest_first.cumsum(0) / (tagged + highest_first.sum(0))
    best = expected.max(0, initial=0)
    return np.where(best > 0, best / 2, 1.0)
