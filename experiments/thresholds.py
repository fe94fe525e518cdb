"""How good thresholds without labels are: how many photos they need, and how many labelled photos they are worth.

    python experiments/thresholds.py --features FILE.npz --seed 0 1 2 3 4        two minutes; options of adapter_rp.py

Thresholds are found on photos drawn at random (20 draws a seed) and measured on all test photos; those chosen with
labels are measured on the photos that were not drawn. Writes thresholds.json and prints macro and micro F1, percent.
"""
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import tables  # puts the repository on the path
import torch

import adapter_rp as rp
import metrics
import run

DRAWS = 20
GRID = np.linspace(0, 1, 101)


def chosen_with_labels(probabilities, truth):
    """Best on labelled photos: a common threshold, and each label's own [C]; the common one where no photo shows it."""
    one = max(GRID, key=lambda threshold: f1(probabilities, truth, threshold)[1])
    thresholds = np.full(truth.shape[1], one)
    for column in np.flatnonzero((truth == 1).any(0)):
        p = probabilities[:, [column]]
        y = truth[:, [column]]
        thresholds[column] = max(GRID, key=lambda threshold: metrics.macro_f1(p, y, threshold))
    return one, thresholds


def f1(probabilities, truth, threshold):
    """(macro F1, micro F1), percent"""
    found = run.f1_at(probabilities, truth, threshold)
    return found["macro F1"], found["OF1"]


def expected_f1(probabilities, thresholds):
    """(macro F1, micro F1) as tag.py expects them, percent; no label is used"""
    tagged = probabilities > thresholds
    right = (probabilities * tagged).sum(0)
    both = tagged.sum(0) + probabilities.sum(0)
    return 200 * (right / both).mean(), 200 * right.sum() / both.sum()


def compare(scores, probabilities, truth, draw):
    """One model -> iterator over (name, (macro F1, micro F1))"""
    count = len(truth)
    found = metrics.expected_f1_thresholds
    yield "score above 0.5", f1(scores, truth, 0.5)
    yield "probability above 0.5", f1(probabilities, truth, 0.5)
    yield "one for all labels, no labels used", f1(probabilities, truth, found(probabilities.reshape(-1, 1)))
    best = max(GRID, key=lambda threshold: sum(f1(scores, truth, threshold)))
    yield "one for all labels, the best on these very labels", f1(scores, truth, best)
    thresholds = found(probabilities)
    yield "without labels, from all photos", f1(probabilities, truth, thresholds)
    yield "the same, as expected from probabilities alone", expected_f1(probabilities, thresholds)
    for _ in range(DRAWS):
        order = draw.permutation(count)
        for few in (20, 50, 100, 500):
            yield f"without labels, from {few} photos", f1(probabilities, truth, found(probabilities[order[:few]]))
        for few in (25, 50, 100, 200, 400):
            some = order[:few]
            rest = order[few:]
            one, each = chosen_with_labels(probabilities[some], truth[some])
            yield f"one for all, chosen with {few} labelled photos", f1(probabilities[rest], truth[rest], one)
            yield f"one a label, chosen with {few} labelled photos", f1(probabilities[rest], truth[rest], each)


def main(argv):
    began = time.time()
    config = run.parse(rp.Config, argv, "Thresholds with and without labels.", "")
    device = run.set_up(config)
    folder = Path(config.output or "runs/thresholds")
    names = rp.names_of(config)
    inputs = rp.load_inputs(config, names) if config.features else rp.embed_inputs(config, device, names)
    values = defaultdict(list)
    for seed in config.seed:
        adapter = rp.train(config, inputs, seed, device, folder)
        _, logits = rp.evaluate(config, adapter, inputs, device)
        scores = torch.sigmoid(logits.double())
        probabilities = rp.probabilities_of(config, scores).numpy()
        draw = np.random.default_rng(seed)
        of_seed = defaultdict(list)
        for name, pair in compare(scores.numpy(), probabilities, inputs.image_labels, draw):
            of_seed[name].append(pair)
        for name, pairs in of_seed.items():
            values[name].append(np.mean(pairs, 0).tolist())
    tables.write_values(folder / "thresholds.json", argv, device, began, dataset=inputs.encoder, values=values)
    print(f"{'thresholds':<52}{'macro F1':>16}{'micro F1':>16}")
    for name, pairs in values.items():
        line = f"{name:<52}"
        for column in zip(*pairs, strict=True):
            line += "{:7.1f} ± {:3.1f}".format(*run.spread(column)).rjust(16)
        print(line)


if __name__ == "__main__":
    with run.exit_codes("experiments/thresholds.py") as arguments:
        main(arguments)
