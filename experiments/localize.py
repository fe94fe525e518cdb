"""Are SSPA's maps true? Each map of each present label is scored against the boxes that a dataset's owners publish.

    python experiments/localize.py --checkpoint runs/demo/sspa/checkpoint.safetensors --output runs/maps
    python experiments/localize.py --checkpoint runs/sspa/scenes/checkpoints --output runs/maps --limit 400
    python experiments/localize.py --checkpoint FILE --dataset coco2014 --data-root D --gpu 0 --output runs/maps

Half a minute for 2,000 scenes on two cores. A folder of checkpoints (sspa.py --save-all) is averaged over seeds, in
blocks of rows. Other words are options of sspa.py. DIR gets localize.json (also photos of median score) and a picture.

Asked is for each present label with a clear box (VOC's difficult things and COCO's crowds are not) of which at least
half is in the square that CLIP sees. Maps are compared at 64 x 64 points, upsampled bilinearly.
- pointing game (Zhang et al., Excitation Backprop, ECCV 2016): a hit if the map's highest point is in a box of the
  label, or within 15 pixels of one at 224, whatever the resolution; equally high points share it. Percent of hits,
  averaged over labels as there. "things": over all that was asked; small, medium, large: of those, by the largest box,
  as COCO divides (32 x 32 and 96 x 96 pixels of the photo).
- pixel AP: average precision of points in the boxes against the others; those in boxes that are not clear are left out.
- absent: how often a label drawn from those not in the photo peaks as high as the present one; 50 is chance.
"""
import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import run

# isort: split
import platform
import shlex
import time
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F

import data
import datasets
import embed
import metrics
import sspa
from data import UsageError, say

POINTS = 64            # a side of the square
TOLERANCE = 15 / 224   # of the pointing game, in sides of the square
SIZES = (32 ** 2, 96 ** 2)  # pixels of the smallest medium box, of the smallest large one
CHANCE, CENTRE = "chance (share of area)", "always the centre"
MAPS = ("zero-shot cosine of regions", "DSF attention", "similarity after GDMA", "S-to-V attention", "V-to-S attention",
        "gradient x region")


# --- maps -------------------------------------------------------------------------------------------------------------

def flow(model, prompts, x0, X):
    """SSPA.forward for unit features, with what stands between its arrows -> T_uf, DSF's attention, T_fn, X_fn"""
    T_ca, filtering = model.filter_prompts(prompts[1], X)
    T_uf = model.fuse(model.knowledge, T_ca, x0)
    return T_uf, filtering, *model.align(T_uf, X)[:2]


def maps_of(model, prompts, class_prompts, x0, X, rows, labels):
    """Maps of K pairs of a photo (rows [K]) and a label (labels [K]). class_prompts: [C, d], unit; x0: [B, d]; X:
    [B, M, d] -> {name: float [K, M]}, without those that the model lacks"""
    x0, X = F.normalize(x0.float(), dim=-1), F.normalize(X.float(), dim=-1)
    with torch.no_grad():
        T_uf, filtering, T_fn, X_fn = flow(model, prompts, x0, X)
        found = {"zero-shot cosine of regions": class_prompts @ X.mT, "DSF attention": filtering,
                 "similarity after GDMA": F.normalize(T_fn, dim=-1) @ F.normalize(X_fn, dim=-1).mT}
        for name, asking, asked in (("v-to-s", T_uf, X), ("s-to-v", X, T_uf)):
            if name in model.directions:
                w = model.directions[name]
                attention = torch.softmax(w.log_scale.exp() * (asking @ w.query) @ (asked @ w.key).mT, -1)
                found[f"{name.title().replace('To', 'to')} attention"] = attention if name == "v-to-s" else attention.mT
        found = {name: values[rows, labels] for name, values in found.items() if values is not None}
    if model.config.branches != "global":
        # with respect to the unit features: along a feature that is normalised afterwards nothing changes
        parts = zip(rows.split(64), labels.split(64), strict=True)
        found["gradient x region"] = torch.cat([of_gradient(model, prompts, x0[r], X[r], c) for r, c in parts])
    return found


def of_gradient(model, prompts, x0, X, labels):
    """The regional logit's gradient with respect to each region, times the region: [K, M]"""
    X = X.clone().requires_grad_()
    _, _, T_fn, X_fn = flow(model, prompts, x0, X)
    logits = model.aggregate(T_fn, X_fn, model.temperature, model.regional_log_scale.exp())
    gradient, = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), X)
    return (gradient * X).sum(-1).detach()


# --- scores -----------------------------------------------------------------------------------------------------------

def targets_of(boxes):
    """Boxes of one label, rows of datasets.in_view -> (marks int8 [P, P]: 1 in a clear box, -1 in another, else 0;
    near bool [P, P]: in or within TOLERANCE of any)"""
    at = (np.arange(POINTS) + 0.5) / POINTS
    marks, near = np.zeros((POINTS, POINTS), np.int8), np.zeros((POINTS, POINTS), bool)
    for _, left, top, right, bottom, clear in boxes[np.argsort(boxes[:, 5])]:        # clear ones last
        across, down = np.maximum(left - at, at - right), np.maximum(top - at, at - bottom)
        marks[np.ix_(down <= 0, across <= 0)] = 1 if clear else -1
        near |= np.hypot(across.clip(0)[None], down.clip(0)[:, None]) <= TOLERANCE
    return marks, near


def judged(maps, marks, near):
    """maps: float [K, M], M regions or points of a square row by row; marks, near: [K, P, P] of targets_of
    -> float [K, 2]: hit 0..1 of the pointing game, pixel AP"""
    side = round(maps.shape[1] ** 0.5)
    fine = F.interpolate(torch.as_tensor(maps).float().view(-1, 1, side, side), (POINTS, POINTS), mode="bilinear")
    fine = fine.view(len(maps), -1).cpu().numpy()
    highest, near = fine == fine.max(1, keepdims=True), near.reshape(len(maps), -1)
    hits = (highest & near).sum(1) / highest.sum(1)
    return np.column_stack([hits, metrics.average_precision(fine.T, marks.reshape(len(maps), -1).T)])


def questions(photo, truth, names, row):
    """What is asked of a photo -> [(label, an absent label, marks, near, pixels of its largest clear box), ...], number
    of things that the crop cuts off. truth: int8 [C]; row seeds the draw of absent labels. UsageError: no boxes."""
    if (places := datasets.boxes_of(photo, names)) is None:
        raise UsageError(f"photo {photo}: no boxes are known; use scenes, voc2007 or coco2014")
    boxes, kept = datasets.in_view(*places)
    pixels = (places[0][kept, 3:5] - places[0][kept, 1:3]).prod(1)
    if isinstance(photo, tuple):
        boxes[:, 5] = 1  # what is hidden in a drawn scene is asked for, as it is labelled
    absent, rng, asked = np.flatnonzero(truth == 0), np.random.default_rng([0, row]), []
    for label in np.flatnonzero(truth == 1):
        own = boxes[:, 0] == label
        clear = own & (boxes[:, 5] == 1)
        if clear.any() and len(absent):
            asked.append((label, rng.choice(absent), *targets_of(boxes[own]), pixels[clear].max()))
    return asked, int((~kept).sum())


def score(config, clip, model, inputs):
    """-> {map: float [K, 3]: hit, pixel AP, absent as high}, labels [K], photos' rows [K], pixels [K], things cut"""
    found, labels, rows, pixels, cut, device = defaultdict(list), [], [], [], 0, clip.model.logit_scale.device
    photos, names = inputs.test, inputs.labels.names
    with torch.no_grad():
        prompts = model.prompts()
        class_prompts = embed.embed_texts(clip, [f"a photo of a {name}." for name in names], config.cache).to(device)
    offset = (torch.arange(POINTS) + 0.5) / POINTS - 0.5
    centre = -torch.hypot(offset, offset[:, None]).view(1, -1)
    batches = torch.arange(len(photos.photos)).split(32)
    for batch, (x0, X, truth) in zip(batches, sspa.batches_of(config, clip, photos, batches), strict=True):
        asked = []
        for place, row in enumerate(batch.tolist()):
            more, lost = questions(photos.photos[row], truth[place].cpu().numpy(), names, row)
            asked += [(place, *one) for one in more]
            rows, cut = rows + [row] * len(more), cut + lost
        if not asked:
            continue
        at, present, absent, marks, near, area = (np.array(column) for column in zip(*asked, strict=True))
        labels, pixels, count = labels + present.tolist(), pixels + area.tolist(), len(at)
        pair = (torch.from_numpy(np.concatenate(two)).to(device) for two in ((at, at), (present, absent)))
        maps = {CHANCE: 0 * centre.expand(2 * count, -1), CENTRE: centre.expand(2 * count, -1)}
        maps |= maps_of(model, prompts, F.normalize(class_prompts, dim=-1), x0, X, *pair)
        for name, values in maps.items():
            peaks = values.amax(1).cpu().numpy()
            as_high = (peaks[count:] > peaks[:count]) + 0.5 * (peaks[count:] == peaks[:count])
            found[name].append(np.column_stack([judged(values[:count], marks, near), as_high]))
    if not found:
        raise UsageError("no label of these photos has a box that CLIP sees")
    found = {name: np.concatenate(found[name]) for name in (CHANCE, CENTRE, *MAPS) if name in found}
    return found, np.array(labels), np.array(rows), np.array(pixels), cut


def summary(values, labels, pixels):
    """values: [K, 3] of score -> percent; a size without a thing is None"""
    of_label = [values[labels == label].mean(0) for label in np.unique(labels)]
    numbers = dict(zip(("pointing", "pixel AP", "absent"), 100 * np.mean(of_label, 0), strict=True))
    sizes = {size: np.digitize(pixels, SIZES) == number for number, size in enumerate(("small", "medium", "large"))}
    sizes["things"] = pixels >= 0
    return numbers | {size: 100 * values[some, 0].mean() if some.any() else None for size, some in sizes.items()}


def examples(found, rows, photos):
    """Photos by the mean pixel AP of the two maps that --explain draws: the median of all, and of those where DSF's
    attention misses a thing -> {"median": photo, "miss": photo}"""
    shown = [found[name] for name in ("DSF attention", "similarity after GDMA") if name in found]
    score, hit = np.mean([values[:, 1] for values in shown], 0), shown[0][:, 0]
    of_photo = {row: (score[rows == row].mean(), hit[rows == row].min()) for row in np.unique(rows)}
    ranked = {"median": sorted(of_photo, key=of_photo.get),
              "miss": sorted((row for row in of_photo if of_photo[row][1] < 0.5), key=of_photo.get)}
    return {name: str(photos[some[len(some) // 2]]) for name, some in ranked.items() if some}


# --- main -------------------------------------------------------------------------------------------------------------

def localize(config, path, device):
    """All about one checkpoint -> dict"""
    tensors, metadata = run.read_checkpoint(path, "sspa")
    config, trained = run.as_trained(config, path, metadata["settings"]), metadata["names"]
    names, found, clip = sspa.names_of(config), sspa.find_photos(config, "test"), run.load_clip(config, device)
    run.check_fits(path, metadata, trained, clip.name, clip.key)
    labels = sspa.labels_of(config, clip, names, dict(zip(trained, metadata["texts"], strict=True)))
    inputs = sspa.load_inputs(config, clip, labels, found)
    model = sspa.SSPA(config, clip.model, labels, 0).to(device)
    run.use_weights(path, model.learned(), tensors)
    values, of_label, rows, pixels, cut = score(config, clip, model, inputs)
    title, _, seed = metadata["title"].rpartition(", seed ")
    return {"title": title, "seed": int(seed), "checkpoint": str(path), "dataset": config.dataset, "asked": len(rows),
            "photos": len(inputs.test.photos), "cut off": cut, "examples": examples(values, rows, inputs.test.photos),
            "maps": {name: summary(some, of_label, pixels) for name, some in values.items()}}


def printed(models):
    """A block of rows for each title, mean and spread over its seeds"""
    columns = ("pointing", "things", "small", "medium", "large", "pixel AP", "absent")
    for title in dict.fromkeys(model["title"] for model in models):
        some = [model for model in models if model["title"] == title]
        print(f"{title}: {some[0]['dataset']}, {some[0]['photos']:,} photos, {some[0]['asked']:,} things asked for, "
              f"{some[0]['cut off']} cut off; seeds {' '.join(str(model['seed']) for model in some)}\n\n{'percent':<30}"
              + "".join(f"{column:>14}" for column in columns))
        for name in some[0]["maps"]:
            cells = []
            for column in columns:
                numbers = [model["maps"][name][column] for model in some]
                mean, std = run.spread(numbers) if None not in numbers else (None, None)
                cells.append("-" if mean is None else f"{mean:.1f}" + (f" ±{std:.1f}" if len(some) > 1 else ""))
            print(f"{name:<30}" + "".join(f"{cell:>14}" for cell in cells))
        print(f"seed {some[0]['seed']}, photos of median score: {some[0]['examples']}\n")


def draw(models, path):
    """Hits of each map, bars with one standard deviation over the seeds of the first title."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4), dpi=110)
    axes, some = figure.subplots(), [model for model in models if model["title"] == models[0]["title"]]
    means, stds = zip(*(run.spread([model["maps"][name]["pointing"] for model in some]) for name in some[0]["maps"]),
                      strict=True)
    axes.bar([name.replace(" ", "\n", 1) for name in some[0]["maps"]], means, yerr=stds, capsize=4)
    axes.set(title=f"{some[0]['title']} on {some[0]['dataset']}, {len(some)} seeds", ylabel="pointing game, percent")
    axes.tick_params(axis="x", labelsize=7)
    figure.savefig(path, bbox_inches="tight")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    own, words = parser.parse_known_args(argv)
    config, device = run.set_up(run.parse(sspa.Config, words, ""))
    began, paths = time.time(), list(own.checkpoint.glob("*.safetensors")) or [own.checkpoint]
    paths.sort(key=lambda path: (not path.name.startswith("SSPA"), path.name))
    models = [localize(config, path, device) for path in paths]
    printed(models)
    data.write_json(own.output / "localize.json", {
        "command": shlex.join(["python", "experiments/localize.py", *argv]), "commit": run.commit(), "models": models,
        "device": platform.processor() or platform.machine(), "seconds": round(time.time() - began, 1)})
    if find_spec("matplotlib"):
        draw(models, own.output / "localize.png")
    else:
        say("pip install matplotlib for the picture")


if __name__ == "__main__":
    with run.exit_codes("localize.py") as arguments:
        main(arguments)
