"""Are SSPA's maps true? Each map of each present label is scored against the boxes that a dataset's owners publish.

    python experiments/localize.py --checkpoint runs/demo/sspa/checkpoint.safetensors --output runs/maps
    python experiments/localize.py --checkpoint runs/sspa/scenes/checkpoints --output runs/maps --test-count 400
    python experiments/localize.py --checkpoint FILE --dataset coco2014 --data-root D --gpu 0 --output runs/maps

Half a minute for 2,000 scenes on two cores. A folder of checkpoints (sspa.py --save-all) is averaged over seeds.
All others are options of sspa.py. The --output folder gets localize.json, which also names photos of median score.

Scored are the present labels with a clear box (VOC's difficult things and COCO's crowds are not clear) of which at
least half is in the square that CLIP sees. Maps are compared at 64 x 64 points, upsampled bilinearly.
- pointing game (Zhang et al., Excitation Backprop, ECCV 2016): a hit if the map's highest point is in a box of the
  label, or within 15 pixels of one at 224, whatever the resolution; equally high points share the hit. Percent of hits,
  averaged over labels as in that paper. "things": averaged over all things instead; small, medium, large: of those, by
  the largest box, with COCO's limits (32 x 32 and 96 x 96 pixels of the photo).
- pixel AP: average precision of points in the boxes against the others; those in boxes that are not clear are left out.
- absent: how often a label drawn from those not in the photo peaks as high as the present one; 50 is chance.
"""
import argparse
import platform
import shlex
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adapter_rp as rp
import data
import datasets
import explain
import metrics
import run
import sspa
from data import UsageError

POINTS = 64            # a side of the square
TOLERANCE = 15 / 224   # of the pointing game, in sides of the square
SIZES = (32 ** 2, 96 ** 2)  # pixels of the smallest medium box and of the smallest large one
CHANCE = "chance (share of area)"
CENTRE = "always the centre"
COLUMNS = ("pointing", "things", "small", "medium", "large", "pixel AP", "absent")  # of the printed table
ABLATED = ("no_dsf", "fusion", "alignment", "no_gate", "aggregator", "branches", "descriptions")


# --- maps -------------------------------------------------------------------------------------------------------------
def maps_of(tagger, class_prompts, x0, X, rows, labels):
    """Maps of K pairs of a photo (rows [K]) and a label (labels [K]). class_prompts: [C, d], unit; x0: [B, d]; X:
    [B, M, d] -> {name: float [K, M]}, without those that the model lacks"""
    model = tagger.model
    unit_X = F.normalize(X.float(), dim=-1)
    with torch.no_grad():
        prediction = model(x0, X, prompts=tagger.prompts)
        maps = {"zero-shot cosine of regions": class_prompts @ unit_X.mT, **explain.maps_of(model, prediction, unit_X)}
    maps = {name: values[rows, labels] for name, values in maps.items()}
    if model.config.branches != "global":
        gradients = [explain.gradient_map(model, tagger.prompts, x0[some], X[some], of_some)
                     for some, of_some in zip(rows.split(64), labels.split(64), strict=True)]
        maps["gradient x region"] = torch.cat(gradients)
    side = torch.linspace(-1, 1, POINTS)
    centre = -torch.hypot(side, side[:, None]).flatten().expand(len(rows), -1)
    return {CHANCE: 0 * centre, CENTRE: centre, **maps}


# --- scores -----------------------------------------------------------------------------------------------------------
def targets_of(boxes):
    """Boxes of one label, rows of datasets.in_view -> (marks int8 [P, P]: 1 in a clear box, -1 in another, else 0;
    near bool [P, P]: in or within TOLERANCE of any)"""
    at = (np.arange(POINTS) + 0.5) / POINTS
    marks = np.zeros((POINTS, POINTS), np.int8)
    near = np.zeros((POINTS, POINTS), bool)
    for _, left, top, right, bottom, clear in boxes[np.argsort(boxes[:, 5])]:        # clear ones last
        across = np.maximum(left - at, at - right)
        down = np.maximum(top - at, at - bottom)
        marks[np.ix_(down <= 0, across <= 0)] = 1 if clear else -1
        near |= np.hypot(across.clip(0)[None], down.clip(0)[:, None]) <= TOLERANCE
    return marks, near


def judged(maps, marks, near):
    """maps: float [K, M], M regions or points of a square row by row; marks, near: [K, P, P] of targets_of
    -> float [K, 2]: hit 0..1 of the pointing game, pixel AP"""
    count, regions = maps.shape
    side = round(regions ** 0.5)
    coarse = maps.float().view(count, 1, side, side)
    fine = F.interpolate(coarse, (POINTS, POINTS), mode="bilinear").flatten(1).cpu().numpy()
    highest = fine == fine.max(1, keepdims=True)
    hits = (highest & near.reshape(count, -1)).sum(1) / highest.sum(1)
    ap = metrics.average_precision(fine.T, marks.reshape(count, -1).T)
    return np.column_stack([hits, ap])


def questions(photo, truth, names, row):
    """A photo's labels to score -> [(row, label, an absent label, marks, near, pixels of its largest clear box), ...],
    how many things the crop cuts off. truth: int8 [C]; row seeds the draw of absent labels. Raises UsageError."""
    places = datasets.boxes_of(photo, names)
    if places is None:
        raise UsageError(f"photo {photo}: no boxes are known; use scenes, voc2007 or coco2014")
    boxes, kept = datasets.in_view(*places)
    pixels = datasets.area(places[0][kept, 1:5])
    if isinstance(photo, tuple):
        boxes[:, 5] = 1  # hidden things of a drawn scene are scored, since they are labelled
    absent = np.flatnonzero(truth == 0)
    draw = np.random.default_rng([0, row])
    asked = []
    for label in np.flatnonzero(truth == 1):
        own = boxes[:, 0] == label
        clear = own & (boxes[:, 5] == 1)
        if clear.any() and len(absent):
            marks, near = targets_of(boxes[own])
            asked.append((row, label, draw.choice(absent), marks, near, pixels[clear].max()))
    return asked, int((~kept).sum())


def answers(tagger, class_prompts, x0, X, first, asked):
    """asked: K questions about photos; first: the photos' row that is row 0 of x0 and X -> {map: [K, 3]: hit, pixel AP,
    whether the absent label peaks as high}"""
    photos, present, absent, marks, near, _ = (np.array(column) for column in zip(*asked, strict=True))
    count = len(asked)
    rows = torch.from_numpy(np.tile(photos - first, 2)).to(X.device)
    labels = torch.from_numpy(np.concatenate([present, absent])).to(X.device)
    values = {}
    for name, maps in maps_of(tagger, class_prompts, x0, X, rows, labels).items():
        peaks = maps.amax(1).cpu().numpy()
        as_high = np.heaviside(peaks[count:] - peaks[:count], 0.5)
        values[name] = np.column_stack([judged(maps[:count], marks, near), as_high])
    return values


def score(tagger, photos, names):
    """-> {map: float [K, 3] of answers}, labels [K], photos' rows [K], pixels [K], things cut off"""
    config = tagger.config
    clip = tagger.clip
    class_prompts = F.normalize(rp.embed_prompts(clip, names, config.cache), dim=-1).to(clip.device)
    found = defaultdict(list)
    asked = []
    cut = 0
    batches = torch.arange(len(photos.photos)).split(32)
    for batch, (x0, X, truth) in zip(batches, sspa.batches_of(config, clip, photos, batches), strict=True):
        fresh = []
        rows = batch.tolist()
        for row, marks in zip(rows, truth.cpu().numpy(), strict=True):
            more, lost = questions(photos.photos[row], marks, names, row)
            fresh += more
            cut += lost
        if fresh:
            for name, values in answers(tagger, class_prompts, x0, X, rows[0], fresh).items():
                found[name].append(values)
            asked += fresh
    if not asked:
        raise UsageError("no label of these photos has a box that CLIP sees; use more photos or another --dataset")
    found = {name: np.concatenate(values) for name, values in found.items()}
    rows, labels, *_, pixels = zip(*asked, strict=True)
    return found, np.array(labels), np.array(rows), np.array(pixels), cut


def summary(values, labels, pixels):
    """values: [K, 3] of answers -> the columns of the table in percent; None for a size that no thing has"""
    of_labels = [values[labels == label].mean(0) for label in np.unique(labels)]
    pointing, ap, absent = 100 * np.mean(of_labels, 0)
    numbers = {"pointing": pointing, "pixel AP": ap, "absent": absent, "things": 100 * values[:, 0].mean()}
    size_of = np.digitize(pixels, SIZES)
    for number, size in enumerate(("small", "medium", "large")):
        hits = values[size_of == number, 0]
        numbers[size] = None
        if len(hits):
            numbers[size] = 100 * hits.mean()
    return numbers


def examples(found, rows, photos):
    """The photos with the median of the mean pixel AP of the two maps that explain.py draws: of all photos, and of
    those where DSF's attention misses a thing -> {"median": photo, "miss": photo}"""
    shown = [found[name] for name in ("DSF attention", "similarity after GDMA") if name in found]
    ap = np.mean([values[:, 1] for values in shown], 0)
    ap_of_photo = {row: ap[rows == row].mean() for row in np.unique(rows)}
    ranked = sorted(ap_of_photo, key=ap_of_photo.get)
    missed = set(rows[shown[0][:, 0] < 0.5])
    choices = {"median": ranked, "miss": [row for row in ranked if row in missed]}
    return {name: str(photos[some[len(some) // 2]]) for name, some in choices.items() if some}


# --- main -------------------------------------------------------------------------------------------------------------
def title_of(config):
    """SSPA, and the options of an ablation: "SSPA --fusion knowledge" """
    title = "SSPA"
    whole = sspa.Config()
    for name in ABLATED:
        value = getattr(config, name)
        if value != getattr(whole, name):
            title += f" {run.flag_of(name)} {value}".removesuffix(" True")
    return title


def localize(config, path, device):
    """The results of one checkpoint -> dict"""
    tensors, metadata = run.read_checkpoint(path, "sspa")
    config = run.as_trained(config, metadata)
    names = sspa.names_of(config)
    found = data.load_photos(config.dataset, config.data_root, "test", config.test_count, config.policy)
    clip = run.load_clip(config, device)
    kept = sspa.features_are_kept(config, clip, len(found.photos))
    photos = sspa.with_features(config, clip, found, names, kept)
    tagger = sspa.Tagger(config, path, tensors, metadata, clip, names)  # a tuned tower takes the place of clip's
    values, labels, rows, pixels, cut = score(tagger, photos, names)
    maps = {name: summary(some, labels, pixels) for name, some in values.items()}
    return {"title": title_of(config), "seed": metadata["seed"], "checkpoint": str(path), "dataset": config.dataset,
            "asked": len(rows), "photos": len(photos.photos), "cut off": cut,
            "examples": examples(values, rows, photos.photos), "maps": maps}


def printed(models):
    """Prints the table, mean and sample standard deviation over seeds."""
    first = models[0]
    seeds = " ".join(str(model["seed"]) for model in models)
    print(f"{first['title']}: {first['dataset']}, {first['photos']:,} photos, {first['asked']:,} things asked for, "
          f"{first['cut off']} cut off; seeds {seeds}\n")
    print(f"{'percent':<30}" + "".join(f"{column:>14}" for column in COLUMNS))
    for name in first["maps"]:
        line = f"{name:<30}"
        for column in COLUMNS:
            numbers = [model["maps"][name][column] for model in models]
            cell = "-"
            if None not in numbers:
                mean, deviation = run.spread(numbers)
                cell = f"{mean:.1f}"
                if len(models) > 1:
                    cell += f" ±{deviation:.1f}"
            line += f"{cell:>14}"
        print(line)
    print(f"seed {first['seed']}, photos of median score: {first['examples']}\n")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    own, words = parser.parse_known_args(argv)
    began = time.time()
    config = run.parse(sspa.Config, words, "", "")
    device = run.set_up(config)
    paths = sorted(own.checkpoint.glob("*.safetensors")) or [own.checkpoint]
    models = [localize(config, path, device) for path in paths]
    for title in dict.fromkeys(model["title"] for model in models):
        printed([model for model in models if model["title"] == title])
    data.write_json(own.output / "localize.json", {
        "command": shlex.join(["python", "experiments/localize.py", *argv]), "commit": run.commit(), "models": models,
        "device": platform.processor() or platform.machine(), "seconds": round(time.time() - began, 1)})


if __name__ == "__main__":
    with run.exit_codes("localize.py") as arguments:
        main(arguments)
