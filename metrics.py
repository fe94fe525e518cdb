"""Metrics of multi-label recognition for many classes at once; scikit-learn is the oracle in the tests.

N images, C labels. Scores are any real numbers for average precision, probabilities for the F1 family. Labels are 1
present, 0 absent, -1 ignored (left out of that class only); VOC's own files have it otherwise (1, -1 absent, 0
difficult): turn such labels first. Fractions in average_precision, percent everywhere else.

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


def _check(scores, labels, thresholded=False):
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must both be [N, C]; got {scores.shape} and {labels.shape}")
    if scores.size and not (np.isfinite(scores.min()) and np.isfinite(scores.max())):  # no copy of a large array
        raise ValueError(f"scores hold {int((~np.isfinite(scores)).sum())} values that are not finite")
    in_range = not labels.size or labels.min() >= -1 and labels.max() <= 1
    if not in_range or labels.dtype.kind == "f" and (labels != np.round(labels)).any():
        raise ValueError("labels must be 1 (present), 0 (absent) or -1 (ignored)")
    if thresholded and scores.size and not 0 <= scores.min() <= scores.max() <= 1:
        raise ValueError("scores that are thresholded must be probabilities, 0 to 1; take the sigmoid of logits")
    if labels.size and labels.min() == -1 and (labels.min(0) == -1)[~(labels == 0).any(0) & (labels.max(0) == 1)].any():
        warnings.warn("a class has labels 1 and -1 but no 0: here -1 is ignored and 0 absent", stacklevel=3)
    return scores, labels


def average_precision(scores, labels, interpolated=False):
    """Average precision of every class: the mean, over its positives, of the precision at the positive's score.

    scores: [N, C] real; labels: [N, C] of 1, 0, -1. Tied scores are one threshold, so the order of rows never matters.
    interpolated: precision at a positive becomes the largest precision at that score or any lower one (VOC 2010-2012
    devkit). Returns float64 [C], fractions; nan where a class has no positive. Raises ValueError on other shapes or
    values, and on scores that are not finite.

    AP = 1/P sum over positives i of  #(positives >= s_i) / #(all >= s_i). A block of classes is sorted at once (values
    only, which is what takes the time); then each class's few positives are found in it by bisection.
    """
    scores, labels = _check(scores, labels)
    count, classes = scores.shape
    result = np.full(classes, np.nan)
    width = max(1, BLOCK // max(1, count))
    for start in range(0, classes, width):
        # one row a class, so that sorting and bisecting run along memory; ignored entries sort in front of everything
        block = np.ascontiguousarray(scores[:, start:start + width].T)
        marks = np.ascontiguousarray(labels[:, start:start + width].T)
        ranked = block
        if (marks < 0).any():
            ranked = np.where(marks < 0, -np.inf, block.astype(np.float64))
        ranked = np.sort(ranked, axis=1)
        for offset in range(len(block)):
            positives = np.sort(block[offset][marks[offset] == 1])
            if not len(positives):
                continue
            all_above = count - np.searchsorted(ranked[offset], positives, side="left")
            positives_above = len(positives) - np.searchsorted(positives, positives, side="left")
            precision = positives_above / all_above
            if interpolated:
                # positives ascend in score: the best precision at this recall or more
                precision = np.maximum.accumulate(precision)
            result[start + offset] = precision.mean()
    return result


def mean_average_precision(scores, labels, interpolated=False):
    """Unweighted mean of average_precision over the classes that have a positive. Percent; nan if none has."""
    values = average_precision(scores, labels, interpolated)
    values = values[~np.isnan(values)]
    return float(100 * values.mean()) if len(values) else float("nan")


def _f1(precision, recall):
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def multilabel_f1(scores, labels, threshold=0.5, top_k=None):
    """Per-class and overall precision, recall and F1, in percent.

    scores: [N, C] probabilities; labels: [N, C] of 1, 0, -1. Predicted: scores > threshold, or, if top_k is given, the
    top_k highest of each image (ties: the lower label index first). Ignored entries count nowhere.
    Returns dict CP CR CF1 OP OR OF1. CP, CR: means over classes of TP/(TP+FP) and TP/(TP+FN), 0 where undefined, as in
    RAM's public code; classes ignored everywhere are left out. CF1: harmonic mean of CP and CR, which is not the macro
    F1 of scikit-learn or torchmetrics (a mean of F1s). OP, OR, OF1: of the sums. Raises ValueError on bad shapes or
    values, or top_k outside 1..C.
    """
    scores, labels = _check(scores, labels, thresholded=top_k is None)
    classes = scores.shape[1]
    if top_k is None:
        predicted = scores > threshold
    else:
        if not 1 <= top_k <= classes:
            raise ValueError(f"top_k must lie in 1..{classes}, got {top_k}")
        order = scores.astype(np.result_type(scores, np.float32))  # the minus of an unsigned number wraps around
        predicted = np.zeros(scores.shape, bool)
        np.put_along_axis(predicted, np.argsort(-order, axis=1, kind="stable")[:, :top_k], True, axis=1)
    hit = (predicted & (labels == 1)).sum(0).astype(np.float64)
    claimed = (predicted & (labels >= 0)).sum(0).astype(np.float64)
    present = (labels == 1).sum(0).astype(np.float64)
    known = (labels >= 0).any(0)
    CP, CR = (float((hit / np.maximum(counts, 1))[known].mean()) if known.any() else float("nan")
              for counts in (claimed, present))
    OP = float(hit.sum() / claimed.sum()) if claimed.sum() else 0.0
    OR = float(hit.sum() / present.sum()) if present.sum() else float("nan")
    values = {"CP": CP, "CR": CR, "CF1": _f1(CP, CR), "OP": OP, "OR": OR, "OF1": _f1(OP, OR)}
    return {name: 100 * value for name, value in values.items()}


def attribute_metrics(scores, labels, threshold=0.5):
    """Pedestrian-attribute metrics, in percent: dict mA, accuracy, precision, recall, F1.

    scores: [N, C] probabilities; labels: [N, C] of 1, 0, -1. mA: mean over attributes of (TPR + TNR) / 2; an attribute
    that lacks positives or lacks negatives is left out of it. The other four are per image, averaged over images:
    |G and P| / |G or P|, / |P|, / |G| (0 where the divisor is 0); F1 is the harmonic mean of the averaged precision and
    recall. Ignored entries count nowhere. Raises ValueError as the others.
    """
    scores, labels = _check(scores, labels, thresholded=True)
    present, absent = labels == 1, labels == 0
    predicted = scores > threshold
    positives, negatives = present.sum(0), absent.sum(0)
    defined = (positives > 0) & (negatives > 0)
    true_positive_rate = (predicted & present).sum(0) / np.maximum(positives, 1)
    true_negative_rate = (~predicted & absent).sum(0) / np.maximum(negatives, 1)
    mA = float((true_positive_rate + true_negative_rate)[defined].mean() / 2) if defined.any() else float("nan")

    predicted = predicted & (labels >= 0)
    both, either = (predicted & present).sum(1), (predicted | present).sum(1)
    accuracy = float((both / np.maximum(either, 1)).mean())
    precision = float((both / np.maximum(predicted.sum(1), 1)).mean())
    recall = float((both / np.maximum(present.sum(1), 1)).mean())
    values = {"mA": mA, "accuracy": accuracy, "precision": precision, "recall": recall, "F1": _f1(precision, recall)}
    return {name: 100 * value for name, value in values.items()}
