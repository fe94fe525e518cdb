"""What one would try first: libraries' classifiers that learn from the same texts as RP and label the same photos.

    python experiments/baselines.py --features FILE.npz --output D    4 minutes on two cores; options of adapter_rp.py
    python experiments/baselines.py --output D                        the drawn scenes

A noisy copy of the texts has Gaussian noise of --noise-std times the mean text norm, as RP's, but drawn once; RP draws
anew in every step. C by a fifth: the one whose mAP is best on a fifth of the texts after learning from the others, and
which then learns from all; no photo takes part. Writes D/baselines.json.
"""
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

STRENGTHS = (0.1, 1, 10, 100)


def with_copies(texts, labels, count, noise_std, seed):
    """Texts [N, D] and behind them noisy copies -> ([N (1 + count), D], their labels)"""
    generator = torch.Generator().manual_seed(seed)
    norm = texts.norm(dim=-1).mean().item()
    copies = [rp.perturb_fused(texts, noise_std, "gaussian", norm, generator) for _ in range(count)]
    return torch.cat([texts, *copies]), labels.repeat(1 + count, 1)


def logistic_regression(texts, labels, images, seed, strength):
    """A classifier a label on unit embeddings, equal to scikit-learn's LogisticRegression(C=strength) -> [M, C]"""
    return linear_probe(texts, labels, images, strength).numpy()


def best_strength(texts, labels, seed):
    """C by a fifth of the texts"""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    fifth = order[:len(order) // 5]
    others = order[len(order) // 5:]

    def mAP(strength):
        logits = linear_probe(texts[others], labels[others], texts[fifth], strength)
        return metrics.mean_average_precision(logits.numpy(), labels[fifth].numpy())
    return max(STRENGTHS, key=mAP)


def network(texts, labels, images, seed, epochs):
    """scikit-learn's MLPClassifier as wide as RP's adapter, all else its defaults -> scores [M, C]"""
    library = MLPClassifier(2 * texts.shape[1], max_iter=epochs, random_state=seed)
    library.fit(texts.numpy(), labels.numpy())
    return library.predict_proba(images.numpy())


ROWS = (  # title, how it learns, C or epochs, noisy copies
    ("logistic regression, C by a fifth", logistic_regression, None, 0),
    ("logistic regression, C=1", logistic_regression, 1, 0),
    ("logistic regression, C=1", logistic_regression, 1, 4),
    ("logistic regression, C=100", logistic_regression, 100, 0),
    ("logistic regression, C=100", logistic_regression, 100, 4),
    ("MLPClassifier, 10 epochs", network, 10, 0),
    ("MLPClassifier, 10 epochs", network, 10, 4))


def main(argv):
    began = time.time()
    config = run.parse(rp.Config, ["--seed", "0", "1", *argv], "What one would try before RP.", "")
    device = run.set_up(config)
    warnings.filterwarnings("ignore", "Stochastic Optimizer")  # that it could go on learning
    names = rp.names_of(config)
    inputs = rp.load_inputs(config, names) if config.features else rp.embed_inputs(config, device, names)
    texts = inputs.text_embeddings
    labels = inputs.text_labels.clamp_min(0)
    runs = []
    for title, fit, setting, count in ROWS:
        name = f"{title}, {count} noisy copies"
        seeds = config.seed
        if fit is logistic_regression:
            seeds = seeds[:1]  # others change little
        for seed in seeds:
            chosen = setting or best_strength(texts, labels, seed)
            given = with_copies(texts, labels, count, config.noise_std, seed)
            scores = fit(*given, inputs.image_embeddings, seed, chosen)
            mAP = metrics.mean_average_precision(scores, inputs.image_labels)
            runs.append({"name": name, "seed": seed, "setting": chosen, "mAP": mAP})
            print(f"{name:<50}{chosen:>5}   seed {seed}{mAP:8.2f}", flush=True)
    data.write_json(Path(config.output or "runs/baselines") / "baselines.json", {
        "command": " ".join(["python experiments/baselines.py", *argv]),
        "commit": run.commit(),
        "seconds": time.time() - began,
        "device": str(device),
        "texts": len(texts),
        "photos": len(inputs.image_labels),
        "runs": runs})


if __name__ == "__main__":
    with run.exit_codes("experiments/baselines.py") as arguments:
        main(arguments)
