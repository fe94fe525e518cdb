"""Tags your own photos with a trained checkpoint of either method.

    python tag.py runs/rp/scenes/checkpoint.safetensors photos/        tags/tags.jsonl, tags/contact_sheet.png
    python tag.py CHECKPOINT PHOTOS... --html --threshold 0.6          and tags/tags.html, a page to look through them
    python tag.py CHECKPOINT PHOTOS... --csv --xmp                     and tags/tags.csv, and photo.jpg.xmp a photo
    python tag.py CHECKPOINT PHOTOS... --stdout                        a line a photo as soon as it is done, no files

A photo gives a JSON line: {"photo": path, "labels": [tags, likeliest first], "probabilities": {label: 0 to 1}}. A tag
is a label whose probability is above the label's threshold. Without --threshold, and with enough photos, a label's
threshold is the one with the highest expected F1, given the probabilities of these photos; thresholds.json holds them.
What was computed of a photo is cached, so the same command after a kill, with more photos or with other thresholds
computes only what is new. In Python:

    model = tag.load("checkpoint.safetensors")
    model.labels                                             # C names
    model.probabilities(["photo.jpg", image, tensor])        # float64 [3, C]; model.scores: the uncorrected scores
"""
import csv
import io
import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import torch

import adapter_rp
import data
import embed
import metrics
import pictures
import run
import sspa
from data import UsageError, say

ENOUGH = 100  # photos; with as many or more, thresholds are found from their probabilities alone  [choice]
FIXED = 0.3  # threshold of every label with fewer photos, and with --stdout  [choice]


class Model:
    """A trained model of either method."""

    def __init__(self, tagger, labels, to_probabilities):
        """tagger: the method's Tagger; labels: C names; to_probabilities: the method's probabilities_of"""
        self.tagger = tagger
        self.clip = tagger.clip
        self.labels = labels
        self.to_probabilities = to_probabilities

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

    def probabilities(self, photos):
        """The probabilities that the scores imply, float64 [N, C]. Raises UsageError for a model without such."""
        return self.probabilities_of(torch.from_numpy(self.scores(photos)))

    def probabilities_of(self, scores):
        """Scores, float64 tensor [N, C] -> probabilities, numpy [N, C]. Raises UsageError, as probabilities."""
        probabilities = self.to_probabilities(self.tagger.config, scores)
        if probabilities is None:
            raise UsageError("the model was trained with --loss ranking, whose scores imply no probabilities; train it "
                             "with another --loss")
        return probabilities.numpy()

    def as_tensor(self, photo):
        if isinstance(photo, torch.Tensor):
            return photo
        if isinstance(photo, str | Path):
            return embed.load_photo(self.clip, photo)
        return self.clip.preprocess(photo.convert("RGB"))


def load(checkpoint, device="cpu", labels=None, cache=None, precision="fp32"):
    """A checkpoint.safetensors of adapter_rp.py or sspa.py -> Model. labels: names to use instead of those it was
    trained on, where the method can; cache: folder of cached features, or None. Raises UsageError."""
    stored, metadata = run.read_checkpoint(checkpoint)
    method = adapter_rp if metadata["method"] == "rp" else sspa
    config = run.as_trained(method.Config(), metadata)
    if metadata["encoder_key"] == "features":
        raise UsageError(f"checkpoint {checkpoint}: trained on {metadata['encoder']}, made by an encoder that cannot "
                         "be run on photos here; train with --backbone")
    config.cache = cache
    config.precision = precision
    clip = run.load_clip(config, torch.device(device))
    labels = labels or metadata["names"]
    return Model(method.Tagger(config, checkpoint, stored, metadata, clip, labels), labels, method.probabilities_of)


# --- the command line -------------------------------------------------------------------------------------------------
def parse(argv):
    parser = run.Parser(description="Tag photos with a trained checkpoint of adapter_rp.py or sspa.py.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("photos", nargs="+", metavar="PHOTOS", help="files or folders")
    add("--labels", metavar="FILE", help="other labels than it was trained on, one a line, if the model takes any")
    add("--threshold", metavar="T", help="a label above this probability is a tag: a number, a JSON file {label: "
        f"number}}, or auto: found for each label from all photos (default: auto for {ENOUGH} or more, else {FIXED})")
    add("--top-k", type=run.COUNT, metavar="K", help="the K likeliest labels are the tags, whatever the thresholds")
    add("--output", default="tags", metavar="DIR", help="folder of results (default: tags)")
    add("--stdout", action="store_true", help="write the lines to standard output as photos are done; write no files")
    add("--html", action="store_true", help="also write a page to look through the photos")
    add("--csv", action="store_true", help="also write a table: for each photo its tags and each label's probability")
    add("--xmp", action="store_true", help="also write each photo's tags into a sidecar that photo managers read")
    add_running(parser)
    options = parser.parse_args(argv)
    options.threshold = read_threshold(options.threshold)
    if options.threshold == "auto" and options.stdout:
        raise UsageError("--threshold auto looks at all photos before the first line, --stdout does not; give a number")
    if options.stdout:
        if options.html or options.csv or options.xmp:
            raise UsageError("--stdout writes no files; leave it out, or --html, --csv and --xmp")
        if sys.stdout.isatty():
            options.quiet = True  # lines and a bar would share the terminal
    return options


def read_threshold(word):
    """--threshold -> None, "auto", a number, or {label: number}. Raises UsageError."""
    if word in (None, "auto"):
        return word
    try:
        threshold = float(word)
        numbers = [threshold]
    except ValueError:
        with data.reading(word, "--threshold", 'give auto, a number, or a JSON file {"label": number}') as path:
            threshold = dict(json.loads(path.read_text("utf-8")))
            numbers = [float(number) for number in threshold.values()]
    if not all(0 <= number <= 1 for number in numbers):
        raise UsageError(f"--threshold {word}: must be from 0 to 1")
    return threshold


def add_running(parser):
    """Adds the options that are shared with the methods."""
    for field in run.options_of(run.Options):
        if field.name in ("gpu", "cpu", "cache", "workers", "quiet"):
            run.add_option(parser, field)
    parser.set_defaults(cache="runs/cache")


def open_model(options):
    """The model and the photos of the command line -> (Model, list of Path). Raises UsageError for what is missing."""
    photos = [photo for path in options.photos for photo in data.list_photos(path)]
    labels = None
    if options.labels:
        labels = data.read_labels(options.labels)
    options.precision = None
    device = run.set_up(options)
    model = load(options.checkpoint, device, labels, options.cache, options.precision)
    if model.clip.name == "scenes":
        say("CLIP is the scenes toy here, trained on drawn pictures: its tags for photographs are meaningless")
    if getattr(model.tagger.config, "head", None) == "label-embedding":
        say("with --head label-embedding probabilities may be far off (docs/probabilities.md); --top-k needs none")
    return model, photos


def thresholds_for(labels, count, options):
    """Each label's threshold, numpy [C]; None: to be found from the photos. count: of photos. Raises UsageError."""
    threshold = options.threshold
    if threshold is None and (count < ENOUGH or options.stdout):
        threshold = FIXED
        if not options.top_k:
            say(f"labels above a probability of {FIXED} are tags (thresholds are found for {ENOUGH} photos or more, "
                "without --stdout)")
    if threshold in (None, "auto"):
        return None
    if isinstance(threshold, float):
        return np.full(len(labels), threshold)
    for label in labels:
        if label not in threshold:
            raise UsageError(f"--threshold: the file has no number for '{label}'; add one")
    return np.array([threshold[label] for label in labels], float)


def tagged(model, photos, options):
    """-> iterator over (photo, probabilities [C]) of the photos that can be read"""
    tagger = model.tagger
    also = []
    if options.html:
        also = [thumbnails_of(model.clip)]
    rows = embed.encode_photos(model.clip, photos, tagger.encoder, tagger.encode, options.cache, options.workers,
                               options.quiet, also=also)
    count = 0
    for row, features in rows:
        if features is not None:
            count += 1
            one = {name: tensor[None] for name, tensor in features.items()}
            yield photos[row], model.probabilities_of(tagger.scores_of(one))[0]
    if not count:
        raise UsageError("no photo could be read; check the files named above")


def thumbnails_of(clip):
    """-> (encoder, encode) as embed.encode_photos takes them: the square that CLIP sees, as a small JPEG file"""
    normalise = clip.preprocess.transforms[-1]

    def encode(images):
        files = [pictures.as_jpeg(pictures.as_seen(image.numpy(), normalise)) for image in images.cpu()]
        return {"jpeg": [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]}
    return f"thumbnail {clip.key}", encode


def tags_of(probabilities, thresholds, top_k):
    """Indices of the labels that become tags, likeliest first."""
    order = np.argsort(-probabilities, kind="stable")
    if top_k:
        return order[:top_k]
    return order[probabilities[order] > thresholds[order]]


def line_of(photo, probabilities, thresholds, labels, top_k):
    """The JSON line of a photo"""
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    tags = [labels[label] for label in tags_of(probabilities, thresholds, top_k)]
    line = {"photo": str(photo), "labels": tags,
            "probabilities": {labels[label]: round(float(probabilities[label]), 4) for label in order}}
    return json.dumps(line, ensure_ascii=False) + "\n"


def write_files(model, photos, thresholds, options):
    """Writes DIR/tags.jsonl, thresholds.json, contact_sheet.png and what else was asked for. Earlier files are replaced
    only at the end."""
    folder = Path(options.output)
    lock = data.hold(folder / ".lock", f"--output {folder}")
    read = list(tagged(model, photos, options))
    photos = [photo for photo, _ in read]
    probabilities = np.stack([row for _, row in read])
    if thresholds is None:
        found = metrics.expected_f1_thresholds(probabilities)
        thresholds = np.array([float(f"{threshold:.4g}") for threshold in found])  # as the file shows them
    lines = [line_of(photo, row, thresholds, model.labels, options.top_k) for photo, row in read]
    tags = [tags_of(row, thresholds, options.top_k) for row in probabilities]
    names = [[model.labels[label] for label in some] for some in tags]

    by_label = dict(zip(model.labels, thresholds.tolist(), strict=True))
    written = []
    if options.html:  # first, since it takes the longest
        rows = pictures.for_page(probabilities)
        written.append(write_page(folder / "tags.html", model, photos, lines, rows, by_label, options))
    sheet = folder / "contact_sheet.png"
    written.append(pictures.contact_sheet(photos, model.labels, probabilities, tags, sheet))
    written.append(data.write_atomically(folder / "tags.jsonl", "".join(lines)))
    written.append(data.write_json(folder / "thresholds.json", by_label))
    if options.csv:
        table = table_of(photos, names, model.labels, probabilities)
        written.append(data.write_atomically(folder / "tags.csv", table))
    if options.xmp:
        written.append(write_sidecars(photos, names))
    lock.release()
    report(model.labels, probabilities, tags, thresholds)
    print("\nin " + ", ".join(map(str, written)))


def table_of(photos, names, labels, probabilities):
    """The text of tags.csv, with the byte order mark that tells spreadsheets UTF-8. names: for each photo its tags"""
    table = io.StringIO()
    table.write("\ufeff")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["photo", "tags", *labels])
    for photo, some, row in zip(photos, names, probabilities, strict=True):
        writer.writerow([photo, "; ".join(some), *np.round(row, 4)])
    return table.getvalue()


def write_page(path, model, photos, lines, rows, thresholds, options):
    """Writes the page of tagged photos; rows: those of the photos that it shows -> its path"""
    shown = [photos[row] for row in rows]
    found = embed.encode_photos(model.clip, shown, *thumbnails_of(model.clip), options.cache, options.workers,
                                options.quiet, share=False)
    thumbnails = [bytes(thumbnail["jpeg"].numpy()) if thumbnail else b"" for _, thumbnail in found]
    return pictures.page(path, [lines[row] for row in rows], thumbnails, len(photos), thresholds, options.top_k)


def write_sidecars(photos, names):
    """Writes beside each photo.jpg a photo.jpg.xmp with its tags, as digiKam, Lightroom and Immich read them; sidecars
    of other programs stay as they are. names: for each photo its tags -> what was written, in words"""
    template = data.read_text(data.ASSETS / "sidecar.xmp", "template")
    of_others = []
    for photo, some in zip(photos, names, strict=True):
        sidecar = Path(f"{photo}.xmp")
        there = [path for path in (sidecar, photo.with_suffix(".xmp")) if path.is_file()]
        if any(b'xmptk="tag.py"' not in path.read_bytes() for path in there):
            of_others.append(there[0])
            continue
        items = "".join(f"<rdf:li>{escape(name)}</rdf:li>" for name in some)
        data.write_atomically(sidecar, template.replace("TAGS", items))
    if of_others:
        say(f"{len(of_others)} sidecars of other programs are left as they are (first: {of_others[0]})")
    return f"{len(photos) - len(of_others)} sidecars beside the photos"


def report(labels, probabilities, tags, thresholds):
    """Prints how often each label was tagged, with precision and F1 as expected from the probabilities alone."""
    chosen = np.zeros(probabilities.shape, bool)
    for row, some in zip(chosen, tags, strict=True):
        row[some] = True
    without = (~chosen.any(1)).sum()
    print(f"{len(tags):,} photos; {without:,} carry none of these labels\n")
    print(f"{'label':<32}{'photos':>8}{'threshold':>11}{'precision %':>13}{'F1 %':>7}   (both as expected)")
    for label in np.argsort(-chosen.sum(0), kind="stable"):
        p = probabilities[:, label]
        count = chosen[:, label].sum()
        line = f"{labels[label][:31]:<32}{count:8,}{thresholds[label]:11.2f}"
        if count:
            right = p[chosen[:, label]].sum()
            line += f"{100 * right / count:13.0f}{200 * right / (count + p.sum()):7.0f}"
        print(line)
    print("\nPrecision: of the photos with this tag, how many show it. F1: that, and how many of the photos that show "
          "it\nhave the tag, in one number. By the probabilities alone; where checked, F1 was off by 6 and 11 points.")


def main(argv):
    options = parse(argv)
    model, photos = open_model(options)
    thresholds = thresholds_for(model.labels, len(photos), options)
    if run.RANK > 0:  # under torchrun the processes share out the photos; the first one writes
        for _ in tagged(model, photos, options):
            pass
    elif options.stdout:
        for photo, probabilities in tagged(model, photos, options):
            sys.stdout.write(line_of(photo, probabilities, thresholds, model.labels, options.top_k))
            sys.stdout.flush()
    else:
        write_files(model, photos, thresholds, options)


if __name__ == "__main__":
    with run.exit_codes("tag.py") as arguments:
        main(arguments)
