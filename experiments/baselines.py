"""What one would try first on ready-made embeddings: libraries' classifiers that learn from the texts and label photos.

    python experiments/baselines.py --features FILE.npz --output D        10 minutes on two cores

Same texts and photos as `python adapter_rp.py --features FILE.npz`. A noisy copy of the texts has Gaussian noise of
--noise-std times the mean text norm, as RP's, but drawn once; RP draws anew in every step. Writes D/baselines.json.
"""
import argparse
import itertools
import platform
import shlex
import sys
import time
import warnings
from pathlib import Path

import torch
from sklearn.neural_network import MLPClassifier

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adapter_rp as rp
import data
import metrics
import run
from baselines import linear_probe  # the repository's baselines.py


def with_copies(texts, labels, count, noise_std, seed):
    """Texts [N, D] and behind them noisy copies -> ([N (1 + count), D], their labels)"""
    generator = torch.Generator().manual_seed(seed)
    norm = texts.norm(dim=-1).mean().item()
    copies = [rp.perturb_fused(texts, noise_std, "gaussian", norm, generator) for _ in range(count)]
    return torch.cat([texts, *copies]), labels.repeat(1 + count, 1)


def logistic_regression(texts, labels, images, seed, strength):
    """A classifier a label on unit embeddings, equal to scikit-learn's LogisticRegression(C=strength) -> [M, C]"""
    return linear_probe(texts, labels, images, strength).numpy()


def network(texts, labels, images, seed, epochs):
    """scikit-learn's MLPClassifier as wide as RP's adapter, all else its defaults -> scores [M, C]"""
    library = MLPClassifier(2 * texts.shape[1], max_iter=epochs, random_state=seed)
    library.fit(texts.numpy(), labels.numpy())
    return library.predict_proba(images.numpy())


FITS = (("logistic regression, C=1", logistic_regression, 1), ("logistic regression, C=100", logistic_regression, 100),
        ("MLPClassifier, 10 epochs", network, 10))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", required=True)
    parser.add_argument("--noise-std", type=float, default=0.15)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/baselines"))
    options = parser.parse_args(argv)
    began = time.time()
    warnings.filterwarnings("ignore", "Stochastic Optimizer")  # that it could go on learning
    arrays = data.load_features(options.features)
    rows = (arrays["text_labels"] == 1).any(1)
    texts = torch.from_numpy(arrays["text_embeddings"][rows])
    labels = torch.from_numpy(arrays["text_labels"][rows].clip(0))
    images = torch.from_numpy(arrays["image_embeddings"])
    runs = []
    for (title, fit, setting), count in itertools.product(FITS, (0, 1, 4)):
        name = f"{title}, {count} noisy copies"
        seeds = options.seed
        if fit is logistic_regression and count == 0:
            seeds = seeds[:1]  # which change nothing
        for seed in seeds:
            given = with_copies(texts, labels, count, options.noise_std, seed)
            scores = fit(*given, images, seed, setting)
            mAP = metrics.mean_average_precision(scores, arrays["image_labels"])
            runs.append({"name": name, "seed": seed, "mAP": mAP})
            print(f"{name:<50}seed {seed}{mAP:8.2f}", flush=True)
    data.write_json(options.output / "baselines.json", {
        "command": shlex.join(["python", *sys.argv]),
        "commit": run.commit(),
        "seconds": time.time() - began,
        "device": platform.processor() or platform.machine(),
        "texts": len(texts),
        "photos": len(images),
        "runs": runs})


if __name__ == "__main__":
    with run.exit_codes("baselines.py") as arguments:
        main(arguments)
