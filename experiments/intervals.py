"""95 % intervals by bootstrap over the test photos, from the scores that a run left in scores.safetensors.

That file holds truth int8 [N, C] of 1, 0, -1 (ignored) and float32 [N, C] scores: "zero_shot" and other baselines, and
"seed 0", "seed 1", ... of the method. Runs with equally many test photos share their draws: differences are paired.
Shapes: N photos, C labels, S seeds, W weightings of the photos: WHOLE counts each once, DRAWN are 1,000 draws with
replacement, each THIRD is a random third of them, and REST the photos that are not in it. Percent.
"""
from collections import defaultdict

import numpy as np
import torch
from safetensors.numpy import load_file

import adapter_rp as rp
import metrics

DRAWS = 1000
SPLITS = 200
WHOLE = 0
DRAWN = slice(1, 1 + DRAWS)
THIRD = slice(1 + DRAWS, 1 + DRAWS + SPLITS)
REST = slice(THIRD.stop, None)


def photo_weights(count):
    """How often each of `count` photos counts in each weighting -> float32 [N, W]"""
    draw = np.random.default_rng(0)
    drawn = draw.multinomial(count, np.full(count, 1 / count), DRAWS)
    third = draw.random((SPLITS, count)).argsort(1) < count / 3
    return np.vstack([np.ones(count), drawn, third, ~third]).T.astype(np.float32, order="C")


def weighted_average_precision(scores, truth, weights):
    """metrics.average_precision of a label. scores, truth: [N]; weights: [N, W] -> [W], nan where no positive counts"""
    known = np.flatnonzero(truth >= 0)
    order = known[np.argsort(-scores[known])]
    scores = scores[order]
    positive = truth[order] == 1
    last = np.searchsorted(-scores, -scores[positive], side="right") - 1  # tied scores are one step: its last row
    all_above = weights[order].cumsum(0)[last]                                   # [positives, W]
    own = weights[order[positive]]
    positives_above = own.cumsum(0)[positive.cumsum()[last] - 1]
    precision = positives_above / np.maximum(all_above, 1)
    with np.errstate(invalid="ignore"):
        return (own * precision).sum(0) / own.sum(0)


def weighted_mAP(scores, truth, weights):
    """scores, truth: [N, C]; weights: [N, W] -> [W]"""
    labels = zip(scores.T, truth.T, strict=True)
    return 100 * np.nanmean([weighted_average_precision(*label, weights) for label in labels], 0)


def weighted_macro_f1(predicted, truth, weights):
    """metrics.macro_f1 of what is predicted, bool [N, C] -> [W]"""
    hits = weights.T @ (predicted & (truth == 1))                                # [W, C]
    marked = weights.T @ (1 * (predicted & (truth >= 0)) + (truth == 1))
    known = (truth >= 0).any(0)
    return 100 * (2 * hits / np.maximum(marked, 1))[:, known].mean(1)


def sampled(path, config):
    """config: from the run's metrics.json -> {metric: [S, W]}: mAP, <baseline>_mAP, macro F1 with two kinds of
    threshold. Without a config, for the scores of experiments/baselines.py: {name: [1, W]}, mAP"""
    tensors = load_file(path)
    truth = tensors.pop("truth")
    weights = photo_weights(len(truth))
    values = defaultdict(list)
    for name, scores in tensors.items():
        metric = name
        if name.startswith("seed "):
            metric = "mAP"
        elif config:
            metric = f"{name}_mAP"
        values[metric].append(weighted_mAP(scores, truth, weights))
        if metric != "mAP" or config.get("loss") in ("bce", "ranking"):
            continue
        scores = torch.from_numpy(scores).double()
        if scores.min() < 0:  # RP's are logits
            scores = torch.sigmoid(scores)
        chances = rp.asymmetric_probability(torch.logit(scores), config["gamma_neg"], 0, config["clip"],
                                            config["focal_gradient"]).numpy()
        found = chances > metrics.expected_f1_thresholds(chances)
        values["macro F1, label-free"].append(weighted_macro_f1(found, truth, weights))
        values["macro F1, score > 0.5"].append(weighted_macro_f1(scores.numpy() > 0.5, truth, weights))
    return {name: np.stack(rows) for name, rows in values.items()}


def bounds(values):
    """[W] -> [low, high], the bounds of the 95 % interval over the draws"""
    return np.percentile(values[DRAWN], [2.5, 97.5]).tolist()


def difference(one, other):
    """The difference of two [S, W] -> [mean, its standard error over seeds, low, high]. With equally many seeds the
    error is that of the differences seed by seed, for equal seeds share initial weights and orders of training."""
    values = one.mean(0) - other.mean(0)
    sides = [one, other]
    if len(one) == len(other):
        sides = [one - other]
    variance = 0.0
    for rows in sides:
        if len(rows) > 1:
            variance += rows[:, WHOLE].var(ddof=1) / len(rows)
    return [float(values[WHOLE]), float(variance ** 0.5), *bounds(values)]


def gain_of_chosen(values, default):
    """What the setting with the best mAP on a third of the photos gains over the default on the rest. values: {setting:
    [S, W]}, the default among them -> [mean, standard deviation over thirds]"""
    means = np.array([rows.mean(0) for rows in values.values()])                 # [settings, W]
    best = means[:, THIRD].argmax(0)
    rest = means[:, REST]
    gain = rest[best, range(SPLITS)] - rest[list(values).index(default)]
    return [float(gain.mean()), float(gain.std(ddof=1))]
