"""Baselines for RP: library classifiers that are trained on the same texts and label the same photos.

    python experiments/baselines.py --features FILE.npz --output D    some minutes; options of adapter_rp.py
    python experiments/baselines.py --output D                        the drawn scenes

A noisy copy of the texts has Gaussian noise of --noise-std times the mean text norm, like RP's, but drawn once; RP
draws anew in every step. C by a fifth: the C with the best mAP on a fifth of the texts after training on the others;
with it the classifier is then trained on all; no photo takes part. C by the test photos: the C with the best mAP on the
very photos that it is scored on, so the most that any choice among STRENGTHS could give. Writes D/baselines.json, and
the scores of logistic regression to D/scores.safetensors.
"""
import time
import warnings
from collections import defaultdict
from pathlib import Path

import tables  # puts the repository on the path
import torch
from sklearn.neural_network import MLPClassifier

import adapter_rp as rp
import metrics
import run
from baselines import linear_probe  # the repository's baselines.py

STRENGTHS = (0.01, 0.1, 1, 10, 100)


def with_copies(texts, labels, count, noise_std, seed):
    """Texts [N, D], followed by noisy copies -> ([N (1 + count), D], their labels)"""
    generator = torch.Generator().manual_seed(seed)
    norm = texts.norm(dim=-1).mean().item()
    copies = [rp.perturb_fused(texts, noise_std, "gaussian", norm, generator) for _ in range(count)]
    return torch.cat([texts, *copies]), labels.repeat(1 + count, 1)


def logistic_regression(inputs, texts, labels, seed, strength):
    """A classifier per label on unit embeddings, equal to scikit-learn's LogisticRegression(C=strength) -> scores, C"""
    def best(given, labels, photos, truth):
        return max(STRENGTHS, key=lambda strength: metrics.mean_average_precision(
            linear_probe(given, labels, photos, strength).numpy(), truth))

    if strength == "by a fifth":
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        fifth, others = order.tensor_split([len(order) // 5])
        strength = best(texts[others], labels[others], texts[fifth], labels[fifth].numpy())
    if strength == "by the test photos":
        strength = best(texts, labels, inputs.image_embeddings, inputs.image_labels)
    return linear_probe(texts, labels, inputs.image_embeddings, strength).numpy(), strength


def network(inputs, texts, labels, seed, epochs):
    """scikit-learn's MLPClassifier, as wide as RP's adapter, otherwise with its defaults -> scores [M, C], epochs"""
    library = MLPClassifier(2 * texts.shape[1], max_iter=epochs, random_state=seed)
    library.fit(texts.numpy(), labels.numpy())
    return library.predict_proba(inputs.image_embeddings.numpy()), epochs


ROWS = (  # title, how it learns, C or epochs, noisy copies
    ("logistic regression, C by a fifth", logistic_regression, "by a fifth", 0),
    ("logistic regression, C by the test photos", logistic_regression, "by the test photos", 0),
    ("logistic regression, C=1", logistic_regression, 1, 0),
    ("logistic regression, C=100", logistic_regression, 100, 4),
    ("MLPClassifier, 10 epochs", network, 10, 0),
    ("MLPClassifier, 10 epochs", network, 10, 4))


def main(argv):
    began = time.time()
    config = run.parse(rp.Config, ["--seed", "0", "1", *argv], "Library classifiers beside RP.", "")
    device = run.set_up(config)
    folder = Path(config.output or "runs/baselines")
    warnings.filterwarnings("ignore", "Stochastic Optimizer")  # scikit-learn warns that training has not converged
    names = rp.names_of(config)
    inputs = rp.load_inputs(config, names) if config.features else rp.embed_inputs(config, device, names)
    texts = inputs.text_embeddings
    labels = inputs.text_labels.clamp_min(0)
    values = defaultdict(list)
    chosen = {}
    kept = {"truth": torch.from_numpy(inputs.image_labels)}
    for title, fit, setting, count in ROWS:
        name = f"{title}, {count} noisy copies"
        seeds = config.seed
        if fit is logistic_regression:
            seeds = seeds[:1]  # other seeds change little
        for seed in seeds:
            given = with_copies(texts, labels, count, config.noise_std, seed)
            scores, chosen[name] = fit(inputs, *given, seed, setting)
            values[name].append(metrics.mean_average_precision(scores, inputs.image_labels))
            print(f"{name:<60}{chosen[name]:>5}   seed {seed}{values[name][-1]:8.2f}", flush=True)
        if fit is logistic_regression:
            kept[name] = torch.from_numpy(scores).float()
    run.write_scores(folder, kept)
    tables.write_values(folder / "baselines.json", argv, device, began, values=values, chosen=chosen)


if __name__ == "__main__":
    with run.exit_codes("experiments/baselines.py") as arguments:
        main(arguments)
