"""Where SSPA saw a photo's strongest labels, one picture per photo: python explain.py CHECKPOINT PHOTOS...

One row per label: its similarity to every region after GDMA, DSF's attention, boxes where they are known; beside them
the photo as CLIP saw it, the S-to-V gate over it and the V-to-S gates of the ten likeliest labels, averaged over
channels. The maps that experiments/localize.py scores are here, too. B photos, C labels, M regions, d width.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import datasets
import embed
import pictures
import run
import sspa
import tag
from data import UsageError


def maps_of(model, prediction, X):
    """Maps of every label over the regions. prediction: of model(x0, X); X: [B, M, d], unit length
    -> {name: [B, C, M]}, without the maps of parts that the model lacks"""
    maps = {}
    if prediction.filtering is not None:
        maps["DSF attention"] = prediction.filtering
    T_fn = F.normalize(prediction.label_features, dim=-1)
    X_fn = F.normalize(prediction.region_features, dim=-1)
    maps["similarity after GDMA"] = T_fn @ X_fn.mT
    if model.s_to_v is not None:
        maps["S-to-V attention"] = model.s_to_v.attention(X, prediction.T_uf).mT  # each region's sums to 1
    if model.v_to_s is not None:
        maps["V-to-S attention"] = model.v_to_s.attention(prediction.T_uf, X)
    return maps


def gradient_map(model, prompts, x0, X, labels):
    """The regional logit's gradient with respect to each unit region, times the region. prompts: model.prompts();
    x0: [B, d]; X: [B, M, d]; labels: [B], one a photo -> [B, M]"""
    X = F.normalize(X.float(), dim=-1).requires_grad_()  # in model.forward the slope along a region is zero
    T_ca, _ = model.filter(prompts[1], X)
    T_uf = model.fuse(model.knowledge, T_ca, F.normalize(x0, dim=-1))
    T_fn, X_fn, _, _ = model.align(T_uf, X)
    logits = model.regional_logits(T_fn, X_fn)
    gradient, = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), X)
    return (gradient * X).sum(-1).detach()


@torch.no_grad()
def explain(model, path, image, top_k, target):
    """Writes one photo's picture to target. model: tag.Model of SSPA; image: [3, H, W], as CLIP sees it"""
    clip = model.clip
    network = model.tagger.model
    with embed.autocast(clip.device, clip.precision):
        x0, X = sspa.image_features(clip.model.visual, image[None].to(clip.device))
        prediction = network(x0, X, prompts=model.tagger.prompts)
    branches = network.config.branches
    scores = sspa.branch_scores(branches, prediction.global_logits, prediction.regional_logits)
    scores = to_numpy(sspa.probabilities_of(network.config, scores))
    strongest = np.argsort(-scores, kind="stable")[:top_k]
    unit_regions = F.normalize(X.float(), dim=-1)
    found = maps_of(network, prediction, unit_regions)
    maps = [(name, to_numpy(found[name])) for name in ("similarity after GDMA", "DSF attention") if name in found]
    label_gate = mean_channel(prediction.label_gate)
    region_gate = mean_channel(prediction.region_gate)
    boxes = ()
    places = datasets.boxes_of(path, model.labels)
    if places is not None:
        boxes, _ = datasets.in_view(*places)
    seen = pictures.as_seen(image.numpy(), clip.preprocess.transforms[-1])
    pictures.explanation(target, path.name, seen, model.labels, scores, strongest, maps, region_gate, label_gate, boxes)


def to_numpy(values):
    """[1, ...] on any device -> float32 [...]"""
    return values[0].float().cpu().numpy()


def mean_channel(gate):
    """[..., d] or None -> numpy [...] or None"""
    if gate is None:
        return None
    return to_numpy(gate).mean(-1)


def main(argv):
    parser = run.Parser(description="Draw where a trained SSPA saw the strongest labels of photos.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint.safetensors of sspa.py")
    add("photos", nargs="+", metavar="PHOTOS", help="files or folders")
    add("--labels", metavar="FILE", help="labels to use instead of those it was trained on, one a line")
    add("--top-k", type=run.COUNT, default=3, metavar="K", help="number of labels per photo (default: 3)")
    add("--output", default="explain", metavar="DIR", help="folder of pictures (default: explain)")
    tag.add_running(parser)
    options = parser.parse_args(argv)
    model, photos = tag.open_model(options)
    if not isinstance(model.tagger, sspa.Tagger):
        raise UsageError(f"checkpoint {options.checkpoint}: an RP model, which has no regions; pass one of sspa.py")
    if model.tagger.config.branches == "global":
        raise UsageError("explain.py draws the regional branch; pass a model trained without --branches global")
    decoded = embed.decoded(model.clip, photos, [[row] for row in range(len(photos))], options.workers)
    drawn = 0
    for path, (images, readable) in zip(photos, decoded, strict=True):
        if readable.all():
            target = Path(options.output) / f"{drawn:03d}_{path.stem[:60]}.png"
            explain(model, path, images[0], options.top_k, target)
            print(target)
            drawn += 1
    if not drawn:
        raise UsageError("no photo could be read; check the files named above")


if __name__ == "__main__":
    with run.exit_codes("explain.py") as arguments:
        main(arguments)
