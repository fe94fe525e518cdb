"""SSPA's learning curve beside the linear probe's; the steps and C of a held-out fifth have seen no test picture.

    python experiments/curve.py --seed 0 1 2 --output D        some ten minutes, drawn scenes; options of sspa.py

On 50 to 1,000 labelled pictures, with the image tower frozen, are trained: SSPA with its default number of epochs; SSPA
with the number of steps, and the linear probe with the C, that has the best mAP on a fifth of these pictures after
training on the others; both are then trained on all of them. The seed draws the fifth, too. Prints mAP on the test
pictures, percent, and what was chosen, and writes D/curve.json.
"""
import math
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import tables  # puts the repository on the path

import baselines
import data
import metrics
import run
import sspa

COUNTS = (50, 100, 250, 500, 1000)
STEPS = (75, 150, 300)  # 600 would double the time
STRENGTHS = (0.01, 0.1, 1, 10, 100)  # C of the probe


def main(argv):
    began = time.time()
    words = ["--tune-image", "none", "--lr", "6e-3", *argv]
    config = run.parse(sspa.Config, words, "Learning curves of SSPA and of the linear probe.", "")
    device = run.set_up(config)
    names = sspa.names_of(config)
    clip = run.load_clip(config, device)
    labels = sspa.labels_of(config, clip, names)

    def features(found):
        return sspa.with_features(config, clip, found, names, True)  # from the cache, except the first time

    def sspa_mAP(photos, tested, seed, steps):
        count = len(photos.photos)
        config.epochs = sspa.default_epochs(count, config.batch_size)
        if steps:
            config.epochs = math.ceil(steps / max(1, count // config.batch_size))
        with tempfile.TemporaryDirectory() as folder:
            model = sspa.train(config, clip, labels, photos, seed, Path(folder))
        measures, _ = sspa.evaluate(config, clip, model, tested)
        return measures["mAP"]

    def probe_mAP(photos, tested, seed, strength):
        logits = baselines.linear_probe(photos.x0, photos.labels, tested.x0, strength)
        return metrics.mean_average_precision(logits.numpy(), tested.labels.numpy())

    def best(mAP, candidates, found, seed):
        """The candidate with the best mAP on a fifth of the photos after training on the others"""
        order = np.random.default_rng(seed).permutation(len(found.photos))
        fifth, others = np.split(order, [len(order) // 5])
        tested = features(found.at(fifth))
        learnt = features(found.at(others))
        return max(candidates, key=lambda candidate: mAP(learnt, tested, seed, candidate))

    values = defaultdict(list)
    tested = features(data.load_photos(config.dataset, config.data_root, "test", config.test_count))
    for count in COUNTS:
        found = data.load_photos(config.dataset, config.data_root, "train", count)
        for name, mAP, candidates in (("SSPA, default epochs", sspa_mAP, ()),
                                      ("SSPA, steps by a held-out fifth", sspa_mAP, STEPS),
                                      ("linear probe, C by a held-out fifth", probe_mAP, STRENGTHS)):
            key = f"{name}, {count}"
            for seed in config.seed:
                choice = None
                if candidates:
                    choice = best(mAP, candidates, found, seed)
                values[key].append(mAP(features(found), tested, seed, choice))
                print(f"{key:<44}seed {seed}{values[key][-1]:8.2f}   chosen: {choice}", flush=True)
    path = Path(config.output or "runs/curve") / "curve.json"
    tables.write_values(path, argv, device, began, values=values)


if __name__ == "__main__":
    with run.exit_codes("experiments/curve.py") as arguments:
        main(arguments)
