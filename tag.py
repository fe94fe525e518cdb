"""Tags for photos of one's own, by a trained checkpoint of either method.

    python tag.py runs/rp/scenes/checkpoint.safetensors photos/        tags/tags.jsonl, tags/contact_sheet.png
    python tag.py CHECKPOINT PHOTOS... --html --threshold 0.6          and tags/tags.html, a page to look through them
    python tag.py CHECKPOINT PHOTOS... --stdout                        a line a photo as soon as it is done, no files

A photo gives a JSON line: {"photo": path, "labels": [tags, strongest first], "scores": {label: 0 to 1}}. Scores are
cached a photo a row, so the same command after a kill, with more photos or with another threshold computes only what
is new. In Python:

    model = tag.load("checkpoint.safetensors")
    model.labels                                      # C names
    model.scores(["photo.jpg", image, tensor])        # float64 [3, C] in 0..1
"""
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import adapter_rp
import data
import embed
import pictures
import run
import sspa
from data import UsageError, say

ANY_NAME = {"encoding": "utf-8", "errors": "surrogateescape"}  # names of files are bytes


class Model:
    """A trained model of either method."""

    def __init__(self, tagger, labels):
        self.tagger = tagger
        self.clip = tagger.clip
        self.labels = labels

    def scores(self, photos):
        """photos: PIL images, paths, or tensors [3, H, W] as self.clip.preprocess gives them, N in all
        -> numpy float64 [N, C] in 0..1. Raises UsageError for a path that cannot be read."""
        scores = [np.zeros((0, len(self.labels)))]
        for start in range(0, len(photos), embed.BATCH):
            images = torch.stack([self.as_tensor(photo) for photo in photos[start:start + embed.BATCH]])
            with torch.no_grad(), embed.autocast(self.clip.device, self.clip.precision):
                features = self.tagger.encode(images.to(self.clip.device))
            scores.append(self.tagger.scores_of(features).cpu().numpy())
        return np.concatenate(scores)

    def as_tensor(self, photo):
        if isinstance(photo, torch.Tensor):
            return photo
        if isinstance(photo, str | Path):
            return embed.load_photo(self.clip, photo)
        return self.clip.preprocess(photo.convert("RGB"))


def load(checkpoint, device="cpu", labels=None, cache=None, precision="fp32"):
    """A checkpoint.safetensors of adapter_rp.py or sspa.py -> Model. labels: others than it was trained on, where the
    method can. Raises UsageError."""
    stored, metadata = run.read_checkpoint(checkpoint)
    method = adapter_rp if metadata["method"] == "rp" else sspa
    config = run.as_trained(method.Config(), metadata)
    if metadata["encoder_key"] == "features":
        raise UsageError(f"checkpoint {checkpoint}: trained on {metadata['encoder']}, for whose encoder there is no "
                         "code here that takes photos; train with --backbone")
    config.cache = cache
    config.precision = precision
    clip = run.load_clip(config, torch.device(device))
    labels = labels or metadata["names"]
    return Model(method.Tagger(config, checkpoint, stored, metadata, clip, labels), labels)


# --- the command line -------------------------------------------------------------------------------------------------
def parse(argv):
    parser = run.Parser(description="Tag photos with a trained checkpoint of adapter_rp.py or sspa.py.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("photos", nargs="+", metavar="PHOTOS", help="files or folders")
    add("--labels", metavar="FILE", help="other labels than it was trained on, one a line, where the method can")
    add("--threshold", type=float, default=0.5, metavar="T", help="a label above this score is a tag (default: 0.5)")
    add("--top-k", type=run.COUNT, metavar="K", help="the K strongest labels are the tags, whatever their scores")
    add("--output", default="tags", metavar="DIR", help="folder of results (default: tags)")
    add("--stdout", action="store_true", help="write the lines to standard output as photos are done, and no files")
    add("--html", action="store_true", help="a page to look through the photos, too")
    add_running(parser)
    options = parser.parse_args(argv)
    if not 0 <= options.threshold <= 1:
        raise UsageError(f"--threshold {options.threshold:g}: must be from 0 to 1")
    return options


def add_running(parser):
    """The options that the methods have, too."""
    for field in run.options_of(run.Options):
        if field.name in ("gpu", "cpu", "cache", "workers", "quiet"):
            run.add_option(parser, field)
    parser.set_defaults(cache="runs/cache")


def open_model(options):
    """-> (Model, photos: list of Path). What is missing is said before anything is computed. Raises UsageError."""
    photos = [photo for path in options.photos for photo in data.list_photos(path)]
    labels = None
    if options.labels:
        labels = data.read_labels(options.labels)
    options.precision = None
    device = run.set_up(options)
    model = load(options.checkpoint, device, labels, options.cache, options.precision)
    if model.clip.name == "scenes":
        say("CLIP is the scenes toy here, trained on drawn pictures: what it says of photographs means nothing")
    return model, photos


def scored(model, photos, options):
    """-> iterator over (photo, scores [C]) of the photos that can be read"""
    tagger = model.tagger
    rows = embed.encode_photos(model.clip, photos, tagger.encoder, tagger.encode, options.cache, options.workers,
                               options.quiet)
    count = 0
    for row, features in rows:
        if features is not None:
            count += 1
            one = {name: tensor[None] for name, tensor in features.items()}
            yield photos[row], tagger.scores_of(one)[0].cpu().numpy()
    if not count:
        raise UsageError("no photo could be read; check the files named above")


def tags_of(scores, options):
    """Indices of the labels that become tags, strongest first."""
    order = np.argsort(-scores, kind="stable")
    if options.top_k:
        return order[:options.top_k]
    return order[scores[order] > options.threshold]


def line_of(photo, scores, labels, options):
    """The JSON line of a photo"""
    order = np.argsort(-scores, kind="stable")[:options.top_k]
    line = {"photo": str(photo), "labels": [labels[label] for label in tags_of(scores, options)],
            "scores": {labels[label]: round(float(scores[label]), 4) for label in order}}
    return json.dumps(line, ensure_ascii=False) + "\n"


def write_files(model, photos, options):
    """DIR/tags.jsonl, contact_sheet.png and, with --html, tags.html; what was there is replaced at the end alone."""
    folder = Path(options.output)
    lock = data.hold(folder / ".lock", f"--output {folder}")
    partial = folder / "tags.jsonl.partial"
    counts = Counter()
    total = 0
    without = 0
    seen = []  # on the contact sheet
    seen_scores = []
    lines = []  # of the page
    with open(partial, "w", **ANY_NAME) as file:
        for photo, scores in scored(model, photos, options):
            line = line_of(photo, scores, model.labels, options)
            file.write(line)
            tags = json.loads(line)["labels"]
            counts.update(tags)
            total += 1
            without += not tags
            if len(seen) < pictures.SHEET:
                seen.append(photo)
                seen_scores.append(scores)
            if len(lines) < pictures.PAGE:
                lines.append(line)
            if total % embed.BATCH == 0:
                file.flush()
    written = [partial.replace(folder / "tags.jsonl")]
    tags = [tags_of(scores, options) for scores in seen_scores]
    sheet = folder / "contact_sheet.png"
    written.append(pictures.contact_sheet(seen, model.labels, np.stack(seen_scores), tags, sheet))
    if options.html:
        threshold = -1 if options.top_k else options.threshold
        written.append(pictures.page(folder / "tags.html", lines, total, threshold, options.top_k))
    lock.release()
    report(counts, total, without, written)


def report(counts, total, without, written):
    """What a person wants to know at the end."""
    print(f"{total:,} photos tagged, {without:,} of them with no label\n")
    for label, count in counts.most_common():
        print(f"{label[:40]:<42}{count:>8,}")
    print("\nin " + ", ".join(map(str, written)))


def main(argv):
    options = parse(argv)
    model, photos = open_model(options)
    if run.RANK > 0:  # under torchrun the processes share out the photos; the first one writes
        for _ in scored(model, photos, options):
            pass
    elif options.stdout:
        for photo, scores in scored(model, photos, options):
            sys.stdout.write(line_of(photo, scores, model.labels, options))
            sys.stdout.flush()
    else:
        write_files(model, photos, options)


if __name__ == "__main__":
    with run.exit_codes("tag.py") as arguments:
        main(arguments)
