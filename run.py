"""What a run is, once for both methods: options, device, output folder, resume, checkpoint, record, exit codes.

A script extends Options by its own dataclass and does its work inside exit_codes, which turns every way to fail into
one line. A folder belongs to one set of settings; it is locked while a run writes it, and nothing in it is moved aside.
"""
import os
import sys


def _interrupted(kind, error, trace):
    """Ctrl-C while torch is still being imported: one line, as later on."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _interrupted

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import operator
import platform
import resource
import shlex
import subprocess
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as to_safetensors

import data
import embed
import metrics
import pictures
from data import UsageError, say

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's; else one process
RESUME_SECONDS = float(os.environ.get("RESUME_SECONDS", 5))  # between saves of resume.pt


class Diverged(Exception):
    """The loss is no longer a number."""


# --- options ----------------------------------------------------------------------------------------------------------
RANGE = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}


def option(default, text, group="method", **words):
    """A field that becomes --its-name. group: its heading in --help (running options do not decide a result); words:
    its range (above, at_least, below, at_most), and what argparse.add_argument takes."""
    about = {"group": group, "help": text, "limits": {word: words.pop(word) for word in RANGE if word in words}}
    return dataclasses.field(default=default, metadata={**about, "argparse": words})


@dataclass
class Options:
    dataset: str = option("scenes", "labelled photos", "data", choices=data.DATASETS)
    data_root: str = option("data", "folder that holds the datasets", "data", metavar="DIR")
    policy: tuple = option((), "treatment of doubtful labels, or of splits, such as difficult=negative (a wrong one is "
                           "answered by the dataset's list)", "data", nargs="+", metavar="NAME=VALUE")
    labels: str = option(None, "label file, one name a line (default: the dataset's own)", "data", metavar="FILE")
    unseen: tuple = option((), "labels that training does not see and that are scored beside the others", "data",
                           nargs="+", metavar="LABEL")
    limit: int = option(None, "only the first N training texts or photos, test photos", "data", at_least=1, metavar="N")
    no_probe: bool = option(False, "no linear probe beside the result", "data")
    backbone: str = option(None, "open_clip's name, or scenes (default: scenes for scenes, else ViT-B-16)", "CLIP")
    pretrained: str = option(None, "open_clip's tag, a file, or none: random (default: openai)", "CLIP", metavar="FILE")
    resolution: int = option(None, "pixels (default: the backbone's own)", "CLIP", at_least=1)
    precision: str = option(None, "CLIP's numbers; losses are fp32 (default: bf16 on a GPU, else fp32)", "CLIP",
                            choices=("fp32", "bf16"))
    lr: float = option(None, "learning rate", above=0)
    epochs: int = option(None, "passes over the training data", at_least=1)
    batch_size: int = option(None, "rows an optimiser step", at_least=1)
    seed: tuple = option((0,), "starts all random draws; one or more", nargs="+", type=int, at_least=0, below=2 ** 40)
    impl: str = option("fused", "fast paths, or the plain formulas", choices=("fused", "reference"))
    gpu: int = option(None, "GPU number (default: 0 if there is one)", "running", at_least=0, metavar="N")
    cpu: bool = option(False, "run on the CPU", "running")
    workers: int = option(None, "processes that decode photos (default: as many as cores, at most 16)", "running",
                          at_least=0, metavar="N")
    cache: str = option("runs/cache", "folder of cached features", "running", metavar="DIR")
    output: str = option(None, "folder of results (default: runs/<method>/<dataset>)", "running", metavar="DIR")
    overwrite: bool = option(False, "begin anew in a folder that holds a run", "running")
    save_all: bool = option(False, "keep every model, not the first seed's alone, in checkpoints/", "running")
    checkpoint: str = option(None, "a trained model: it is scored, or used by --predict", "running", metavar="FILE")
    predict: tuple = option((), "photos or folders that --checkpoint shall tag: a JSON line each on stdout, and a "
                            "contact sheet", "running", nargs="+", metavar="PATH")
    tags: str = option(None, "a file at whose end --predict writes its lines; photos whose line is there are left out",
                       "running", metavar="JSONL")
    html: str = option(None, "a page to look through what --predict tagged: thumbnails, tags, filters", "running",
                       metavar="FILE")
    score_floor: float = option(0.0, "scores below it are left out of the lines", "running", at_least=0, at_most=1)
    threshold: float = option(0.5, "a label becomes a tag above this score", "running", at_least=0, at_most=1)
    top_k: int = option(None, "the K strongest labels alone become tags", "running", at_least=1, metavar="K")
    quiet: bool = option(False, "no progress bar", "running")
    given: tuple = ()  # names of the options that stood on the command line


MOVED = {  # what became of options that earlier versions had
    **{f"--{name.replace('_', '-')}": f"now --policy {name}=VALUE"
       for name in ("difficult", "unlabelled", "validation", "partition", "split_seed")},
    "--captions": "now --texts FILE", "--no-descriptions": "now --descriptions none",
    "--eval-only": "no longer needed: --checkpoint alone scores", "--accumulate": "gone: lower --batch-size",
    "--download": "now a command: python -c \"import embed; embed.download_voc2007('data')\"",
}


def options_of(kind):
    return [field for field in dataclasses.fields(kind) if field.metadata]


def flag_of(name):
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message}; --help lists the options")


def parse(kind, argv, description, epilog=""):
    """kind: dataclass that extends Options; argv: words -> kind. Raises UsageError for words that make no sense."""
    for flag in (word.partition("=")[0] for word in argv):
        if flag in MOVED:
            raise UsageError(f"{flag} is {MOVED[flag]}")
    parser = _Parser(description=description, epilog=epilog, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups = {name: parser.add_argument_group(name) for name in ("method", "data", "CLIP", "running")}
    for field in options_of(kind):
        words, default = dict(field.metadata["argparse"]), field.default
        if field.type is bool:
            words["action"] = "store_true"
        else:
            words.setdefault("type", field.type if field.type in (int, float) else str)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = field.metadata["help"] + (f" (default: {shown})" if shown not in (None, False, "") else "")
        groups[field.metadata["group"]].add_argument(flag_of(field.name), help=text.replace("%", "%%"), **words)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    config = kind(**given, given=tuple(given))
    for field in options_of(kind):
        check_range(field, getattr(config, field.name))
    if config.predict and not config.checkpoint:
        raise UsageError("--predict uses a trained model: train one, then add --checkpoint DIR/checkpoint.safetensors")
    backbone = config.backbone or ("scenes" if config.dataset == "scenes" else "ViT-B-16")
    settled = config.backbone or config.checkpoint or config.pretrained in (None, "none")
    if backbone == "scenes" and not settled:
        raise UsageError(f"--pretrained {config.pretrained}: of which CLIP? add --backbone NAME, or leave it out")
    return dataclasses.replace(config, backbone=backbone)


def check_range(field, value):
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    limits = field.metadata["limits"]
    for one in values:
        finite = not isinstance(one, float) or math.isfinite(one)
        if not finite or not all(RANGE[word](one, limit) for word, limit in limits.items()):
            wanted = " and ".join(f"{word.replace('_', ' ')} {limit:g}" for word, limit in limits.items()) or "finite"
            raise UsageError(f"{flag_of(field.name)} {one}: must be {wanted}")
    if len(set(values)) < len(values):
        raise UsageError(f"{flag_of(field.name)} {' '.join(map(str, values))}: a value stands twice")


def known_columns(config, names):
    """Columns of the labels that training may see, all but --unseen -> list of int. Raises UsageError."""
    columns = [column for column, name in enumerate(names) if name not in config.unseen]
    if odd := [name for name in config.unseen if name not in names] or not columns and names:
        raise UsageError(f"--unseen {odd[0]}: must leave some out of the labels {', '.join(names[:30])}, and not all")
    return columns


def settings_of(config, **more):
    """What decides a result: options other than the running ones, content of files and datasets. JSON values."""
    deciding = [field for field in options_of(config) if field.metadata["group"] != "running"]
    values = {field.name: getattr(config, field.name) for field in deciding}
    for name in (field.name for field in deciding if field.metadata["argparse"].get("metavar") == "FILE"):
        if values[name] and Path(values[name]).is_file():
            values[f"content of {name}"] = data.digest(values[name])
    values["content of the dataset"] = data.identity(config.dataset, config.data_root)
    return json.loads(json.dumps({**values, **more}))


# --- device -----------------------------------------------------------------------------------------------------------
def set_up(config):
    """The device and, under torchrun, the process group -> (config with its precision, device)"""
    count, number = torch.cuda.device_count(), config.gpu
    if number is not None and (config.cpu or WORLD > 1):
        raise UsageError("--gpu excludes --cpu, and torchrun, which gives every process its own; leave one out")
    if number is None and count and not config.cpu:
        number = int(os.environ.get("LOCAL_RANK", 0))
    if number is not None and number >= count:
        raise UsageError(f"GPU {number}: this machine has {count} that PyTorch can use; choose another, or --cpu")
    device = torch.device("cpu") if number is None else torch.device("cuda", number)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
    if RANK > 0:  # a mistake is said once, by the first process
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
    if number is None and not config.cpu:
        say("no GPU found: running on the CPU")
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return dataclasses.replace(config, precision=config.precision or ("bf16" if bf16 else "fp32")), device


def load_clip(config, device):
    return embed.load_clip(config.backbone, config.pretrained, device, config.precision, config.resolution)


def part():
    """Under torchrun: from here on the first process works alone -> whether this is one of the others"""
    if dist.is_initialized():
        dist.destroy_process_group()
    return RANK > 0


# --- output folder ----------------------------------------------------------------------------------------------------
def read_result(path):
    """metrics.json -> dict. Raises UsageError for a file of another form."""
    def read(path):
        result = json.loads(path.read_text("utf-8"))
        forms = (("settings", dict), ("runs", list), ("finished", bool))
        fits = all(isinstance(result[name], form) for name, form in forms)
        if not fits or not all("seed" in one for one in result["runs"]):
            raise ValueError("not the form that a run writes")
        return result
    return data.read_stored(path, "result", read, "delete it, or add --overwrite to begin anew")


def open_folder(config, folder, settings):
    """Lock a run's folder and look at what it holds -> (None, a part of the result or all of it; the lock, to be kept).

    Raises UsageError where another process writes it, it holds a run with other settings, or it cannot be written.
    """
    lock = data.hold(folder / ".lock", f"--output {folder}") if RANK == 0 else None
    if config.overwrite or not (folder / "metrics.json").is_file():
        return None, lock
    result = read_result(folder / "metrics.json")
    then = result["settings"]
    other = [f"{name} {then.get(name)}, not {settings.get(name)}" for name in {**then, **settings}
             if then.get(name) != settings.get(name)]
    if other:
        raise UsageError(f"--output {folder} holds a run with other settings ({'; '.join(other)}); choose another "
                         "--output, or add --overwrite to begin anew")
    return result, lock


def begin(folder, result):
    """Just before training: the folder becomes this run's, and what another one left there goes. result: the record."""
    if RANK == 0:
        for name in ("metrics.json", "resume.pt", "checkpoint.safetensors", "log.jsonl"):
            (folder / name).unlink(missing_ok=True)
    write_result(folder, result)


def write_result(folder, result, log=()):
    """metrics.json, and for each epoch of a seed that is done a line in log.jsonl -> the result as it is stored"""
    if RANK == 0:
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in log)
        data.write_json(folder / "metrics.json", result)
        if log:
            (folder / "resume.pt").unlink(missing_ok=True)
    if dist.is_initialized():
        dist.barrier()
    return read_result(folder / "metrics.json")


# --- resume and checkpoint --------------------------------------------------------------------------------------------
def fill(tensors, stored):
    """Copy stored {name: tensor} into tensors of the same names and shapes. Raises ValueError."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in some.items()} for some in (tensors, stored)]
    if shapes[0] != shapes[1]:
        raise ValueError("its tensors do not fit its settings")
    if bad := [name for name, tensor in stored.items() if not tensor.isfinite().all()]:
        raise ValueError(f"its {bad[0]} is not finite")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])


OWN_CHECKPOINT = "pass a checkpoint.safetensors that this script wrote"


def save_resume(path, key, tensors, optimiser, log):
    stream = BytesIO()
    torch.save({"key": key, "tensors": tensors, "optimiser": optimiser.state_dict(), "log": log}, stream)
    data.write_atomically(path, stream.getvalue())


def load_resume(path, key, tensors, optimiser):
    """Copy what save_resume kept for this key into tensors and optimiser -> log, one entry an epoch done, [] if nothing
    was kept. Raises UsageError for a damaged file."""
    def read(path):
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception:  # torch raises many kinds, and advises to load what must not be loaded
            raise ValueError("is damaged") from None
        if state["key"] != key:
            return []
        fill(tensors, state["tensors"])
        optimiser.load_state_dict(state["optimiser"])
        return list(state["log"])
    if not path.is_file():
        return []
    log = data.read_stored(path, "half-trained model", read, "delete it to train this seed anew")
    if log:
        say(f"{path.parent}: going on after epoch {len(log)}")
    return log


def save_checkpoints(config, folder, number, title, method, tensors, **metadata):
    """A run's learned tensors; class order, settings, encoder ... as JSON in the file's metadata. The first run's are
    checkpoint.safetensors, with --save-all each run's are checkpoints/<its title>.safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {name: json.dumps(value) for name, value in {"method": method, "title": title, **metadata}.items()}
    paths = [folder / "checkpoint.safetensors"] * (number == 0)
    for path in paths + [folder / "checkpoints" / f"{title}.safetensors"] * config.save_all:
        data.write_atomically(path, to_safetensors(tensors, metadata))


def read_checkpoint(path, method):
    """-> (tensors, metadata: dict with names, settings, encoder, encoder_key). Raises UsageError for any other file."""
    def read(path):
        with safe_open(str(path), "pt") as stored:
            metadata = {name: json.loads(value) for name, value in (stored.metadata() or {}).items()}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no dict)
        forms = (("names", list), ("settings", dict), ("encoder", str), ("encoder_key", str))
        if metadata.get("method") != method or not all(isinstance(metadata[name], form) for name, form in forms):
            raise ValueError("it holds no model of this script")
        return tensors, metadata
    return data.read_stored(path, "checkpoint", read, OWN_CHECKPOINT)


def use_weights(path, tensors, stored):
    """fill, with what a checkpoint held. Raises UsageError."""
    data.read_stored(path, "checkpoint", lambda _: fill(tensors, stored), OWN_CHECKPOINT)


def as_trained(config, path, settings):
    """How a model was made is its checkpoint's to say; what it is used on, the command line's. -> config"""
    own = [field.name for field in options_of(config) if field.metadata["group"] in ("method", "CLIP")]
    made = {name: settings[name] for name in own if name in settings and name not in ("impl", "precision")}
    if "dataset" not in config.given:
        made |= {name: settings[name] for name in ("dataset", "data_root", "policy") if name not in config.given}
    made = {name: tuple(value) if isinstance(value, list) else value for name, value in made.items()}
    for name in ("backbone", "pretrained", "resolution"):  # weights may have moved; that they are the same is checked
        if name in config.given:
            del made[name]
    if ignored := [flag_of(name) for name in config.given if name in made and getattr(config, name) != made[name]]:
        say(f"{path} was made with its own {', '.join(ignored)}; what the command line says of it is not used")
    return dataclasses.replace(config, **made)


def check_fits(path, metadata, names, encoder, encoder_key):
    """A checkpoint is used with its own labels in their order, and with its own encoder. Raises UsageError."""
    if names != metadata["names"]:
        pairs = enumerate(zip(metadata["names"], names, strict=False), 1)
        other = [f"label {number} is '{there}' there and '{here}' here"
                 for number, (there, here) in pairs if there != here]
        other.append(f"it has {len(metadata['names'])} labels, not {len(names)}")
        raise UsageError(f"checkpoint {path}: trained for other labels or another order of them ({other[0]}); pass the "
                         "--dataset and --labels it was trained with")
    if encoder_key != metadata["encoder_key"]:
        raise UsageError(f"checkpoint {path}: trained on {metadata['encoder']}, not on {encoder} as it is here; pass "
                         "the same --backbone, --pretrained and --resolution (or --features)")


# --- baselines --------------------------------------------------------------------------------------------------------
# C of scikit-learn, for all data. Cross-validated in 5 parts on the 20,000 training pictures of scenes, 10 gives 66.95
PROBE_STRENGTH = 100.0  # mAP, 100 gives 67.16, and more at most 67.19; on the first 4,000 it is 65.57, 65.33 and less
PROBE_LIMIT = 8e9  # training rows x width x labels; half of it takes a minute or two on two cores


def linear_probe(features, labels, images, strength=PROBE_STRENGTH):
    """Logistic regression, a label at a time, as scikit-learn's LogisticRegression(C=strength) on unit features.

    features: [N, D] with labels [N, C], -1 left out; images: [M, D] -> logits float64 [M, C]. All labels at once, by
    L-BFGS in coordinates u in which no direction is steeper than another: p (1 - p) <= 1/4, so the loss's second
    derivative is at most penalty + x x^T / 4.
    """
    x, new = (F.pad(F.normalize(rows.double().cpu(), dim=-1), (0, 1), value=1) for rows in (features, images))
    penalty = torch.full(x.shape[1:], 1 / strength, dtype=torch.float64)
    penalty[-1] = 0  # the intercept is free
    factor = torch.linalg.cholesky(x.mT @ x / 4 + penalty.diag())
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=torch.float64), upper=False).mT
    x, present, known = x @ inverse, (labels == 1).double(), (labels >= 0).double()
    u = torch.zeros(len(factor), labels.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([u], max_iter=1000, tolerance_grad=1e-3, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        total = F.binary_cross_entropy_with_logits(x @ u, present, known, reduction="sum")
        total = total + (penalty[:, None] * (inverse @ u) ** 2).sum() / 2
        total.backward()
        return total.detach()
    optimiser.step(loss)
    return new @ (inverse @ u).detach()


def baselines(config, prompts, images, truth, features=None, labels=None):
    """What somebody would try first: zero-shot, the cosine with the prompts [C, D]; and the linear probe, learnt from
    features [N, D] with labels [N, C], if there are any. images: [M, D]; truth: numpy [M, C] -> dict for the record"""
    cosine, probe = (F.normalize(images, dim=-1) @ F.normalize(prompts, dim=-1).T).numpy(), None
    if features is not None and not (config.no_probe or config.unseen):  # it would learn what is to be left out
        if features.shape[0] * features.shape[1] * len(prompts) <= PROBE_LIMIT:
            probe = metrics.mean_average_precision(linear_probe(features, labels, images).numpy(), truth)
        else:
            say(f"no linear probe: {len(features):,} x {features.shape[1]} features, {len(prompts):,} labels take long")
    return {"zero_shot_mAP": metrics.mean_average_precision(cosine, truth), "linear_probe_mAP": probe,
            "zero_shot_ap": (100 * metrics.average_precision(cosine, truth)).tolist()}


# --- results ----------------------------------------------------------------------------------------------------------
def measure(logits, scores, truth):
    """What is recorded of one run. logits [N, C] rank, scores [N, C] are thresholded; truth [N, C] -> dict, percent"""
    if not np.isfinite(logits).all():
        raise Diverged("the scores of the test photos are not finite; lower --lr")
    return {"mAP": metrics.mean_average_precision(logits, truth),
            "mAP_interpolated": metrics.mean_average_precision(logits, truth, interpolated=True),
            "threshold_0.5": metrics.multilabel_f1(scores, truth),
            "top_3": metrics.multilabel_f1(scores, truth, top_k=min(3, truth.shape[1])),
            "attributes": metrics.attribute_metrics(scores, truth),
            "ap": (100 * metrics.average_precision(logits, truth)).tolist()}


def spread(values):
    """(mean, sample standard deviation; 0 for one value)"""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def commit():
    """The git commit this file is at, "+" when the tree has changes, "unknown" outside a repository."""
    def git(*words):
        words = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def record(method, config, argv, settings, device, seconds, names, truth, runs, chosen, finished, baselines, trained,
           **more):
    """The content of metrics.json. runs: dicts of measure with seed and setting; chosen: those of the main setting;
    truth: labels of the test photos [N, C], or None without any, as are baselines: what baselines() gave; trained:
    label names that were learnt; more: what the method adds."""
    beside = {"zero_shot_mAP": None, "linear_probe_mAP": None, "zero_shot_ap": [None] * len(names)} | (baselines or {})
    scored = [run for run in chosen if "mAP" in run]
    mean, std = spread([np.nan if run["mAP"] is None else run["mAP"] for run in scored]) if scored else (None, None)
    ap = np.array([run["ap"] for run in scored], float).mean(0) if scored else []
    of_prompts = beside.pop("zero_shot_ap")
    per_class = [{"name": name, "positives": int((truth[:, column] == 1).sum()), "ap": float(ap[column]),
                  "zero_shot_ap": of_prompts[column], "trained": name in trained}
                 for column, name in enumerate(names) if scored]
    on_gpu = device.type == "cuda"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "method": method, "dataset": config.dataset, "impl": config.impl, "commit": commit(), "mAP": mean,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *argv]), "seconds": round(seconds, 2), "mAP_std": std,
        "seeds": [run["seed"] for run in chosen], "runs": runs, "per_class": per_class, "label_count": len(names),
        "photo_count": 0 if truth is None else len(truth), **beside, **more, "settings": settings, "finished": finished,
        "config": {field.name: getattr(config, field.name) for field in options_of(config)}, "processes": WORLD,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "peak_memory_mib": round((torch.cuda.max_memory_allocated(device) if on_gpu else peak) / 2 ** 20),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


def report(result, trained, row_of):
    """Print a result as a person reads it. trained: from what it learnt; row_of: run -> what its row is called"""
    tested = f"{result['dataset']}: {result['photo_count']:,} test photos, " * bool(result["photo_count"])
    print(f"{tested}{result['label_count']:,} labels; {result['backbone']}; {trained}; {len(result['seeds'])} seed"
          + "s" * (len(result["seeds"]) > 1))
    if result["zero_shot_mAP"] is None:
        print("(no test photos for these labels: nothing to score; --dataset names a set that has them)")
        return
    print(f"\n{'':<34}{'mAP %':>14}{'CF1 %':>8}{'OF1 %':>8}\n{'zero-shot (cosine)':<34}{result['zero_shot_mAP']:8.2f}")
    if result["linear_probe_mAP"] is not None:
        print(f"{'linear probe of its training data':<34}{result['linear_probe_mAP']:8.2f}")
    for row in dict.fromkeys(map(row_of, result["runs"])):
        runs = [run for run in result["runs"] if row_of(run) == row]
        mean, std = spread([np.nan if run["mAP"] is None else run["mAP"] for run in runs])
        f1 = "".join(f"{np.mean([run['threshold_0.5'][name] for run in runs]):8.1f}" for name in ("CF1", "OF1"))
        print(f"{row:<34}{mean:8.2f}" + (f" ±{std:4.2f}" if len(runs) > 1 else " " * 6) + f1)
    if not all(entry["trained"] for entry in result["per_class"]):
        for learnt, word in ((True, "trained on"), (False, "never trained on")):
            some = [label for label in result["per_class"] if label["trained"] == learnt and label["positives"]]
            own, zero_shot = (np.mean([label[key] for label in some]) for key in ("ap", "zero_shot_ap"))
            print(f"  {len(some)} labels {word}: mAP {own:.2f}, zero-shot {zero_shot:.2f}")


def photos_of(config, paths):
    """Photos of one's own, which a model is used on -> list of Paths. Raises UsageError."""
    photos = [photo for path in paths for photo in data.list_photos(path)]
    if config.backbone == "scenes":
        say("CLIP is the scenes toy here, trained on drawn pictures: what it says of photographs means nothing")
    return photos


def tag(config, photos, names, scored, folder):
    """A JSON line a photo, strongest label first, as soon as its scores are there: on stdout, or at the end of --tags,
    where photos whose line is there are left out. predictions.png in the folder shows the first 48. Under torchrun each
    process tags every n-th block into a file of its own, which the first joins in the end.

    scored: photos -> iterator over (indices of a block's readable photos, scores [b, C] in 0..1). Raises UsageError.
    """
    out, photos, stamp_of, _lock = open_tags(Path(config.tags), photos) if config.tags else (
        sys.stdout, photos, lambda photo: {}, None)
    threshold = -1 if config.top_k else config.threshold
    if config.html and RANK == 0:  # a page that cannot be written is not found out after the work
        pictures.page(config.html, [], 0, threshold)
    mine = [index for index in range(len(photos)) if index // embed.PHOTOS % WORLD == RANK]
    shown, own, count = [], open(folder / f".tags.{RANK}", "w", **ANY_NAME) if WORLD > 1 else out, 0  # noqa: SIM115
    for rows, scores in scored([photos[index] for index in mine]) if mine else ():
        found, orders = [photos[mine[row]] for row in rows], np.argsort(-scores, axis=1, kind="stable")
        tags = [order[row[order] > threshold][:config.top_k] for order, row in zip(orders, scores, strict=True)]
        if not count and found and RANK == 0:  # before the lines: head leaves early
            say(f"contact sheet: {pictures.contact_sheet(found, names, scores, tags, folder / 'predictions.png')}"
                + (f" (the first 48 of {len(photos)} photos)" if len(photos) > 48 else ""))
        for row, photo, of_photo, order, chosen in zip(rows, found, scores, orders, tags, strict=True):
            line = {"photo": str(photo), "labels": [names[label] for label in chosen],
                    "scores": {names[label]: round(float(of_photo[label]), 4) for label in order[:config.top_k]
                               if of_photo[label] >= config.score_floor}}
            line = json.dumps(line | stamp_of(photo), ensure_ascii=False) + "\n"
            own.write(f"{mine[row]} " * (WORLD > 1) + line)
            shown += [line] * (len(shown) < pictures.PAGE)
        own.flush()
        count += len(found)
    if WORLD > 1:
        own.close()
        dist.barrier()
        shown = []
        for part in [folder / f".tags.{rank}" for rank in range(WORLD)] * (RANK == 0):
            with open(part, **ANY_NAME) as file:
                shown += [line.split(" ", 1) for line in file]
            part.unlink()
        shown = [line for _, line in sorted(shown, key=lambda line: int(line[0]))]
        out.writelines(shown)
        count = len(shown)
    elif photos and not count:
        raise UsageError("no photo could be read; check the files named above")
    if config.html and RANK == 0:
        if config.tags:
            out.flush()
            with open(config.tags, **ANY_NAME) as file:  # the last line of a photo that was changed
                shown = list({json.loads(line)["photo"]: line for line in file}.values())
            count = len(shown)
        say(f"page: {pictures.page(config.html, shown, count, threshold, config.top_k)}")


ANY_NAME = {"encoding": "utf-8", "errors": "surrogateescape"}  # names of files are bytes


def open_tags(path, photos):
    """--tags, without a torn last line -> (file to append to, photos without a line, what a line says besides, lock)"""
    def read(path):
        content = path.read_bytes()
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
        lines = content[:content.rfind(b"\n") + 1].decode("utf-8", "surrogateescape").split("\n")[:-1]
        return {line["photo"]: {"size": line["size"], "time": line["time"]} for line in map(json.loads, lines)}

    def stamp_of(photo):
        status = photo.stat()
        return {"size": status.st_size, "time": status.st_mtime_ns}
    lock = data.hold(path, f"--tags {path}") if RANK == 0 else None
    done = data.read_stored(path, "tags", read, "give --tags another file")
    left = [photo for photo in photos if done.get(str(photo)) != stamp_of(photo)]
    say(f"{path}: {len(photos) - len(left):,} of {len(photos):,} photos have their lines")
    if gone := [photo for photo in done if not Path(photo).exists()]:
        say(f"{path}: {len(gone):,} photos are gone, their lines stay (first: {gone[0]})")
    return open(path, "a", **ANY_NAME), left, stamp_of, lock


# --- exit codes -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def exit_codes(script):
    """Ends the process: 0 done, 2 a mistake or missing data, 3 diverged, 130 interrupted; one line says why."""
    # the focused loss makes gradients whose squares are below 1e-38; on a CPU such numbers make steps many times slower
    torch.set_flush_denormal(True)
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # photo names of any bytes, labels of any script
    code, why = 2, None
    try:
        yield sys.argv[1:]
        sys.stdout.flush()
        code = 0
    except UsageError as error:
        why = str(error)
    except Diverged as error:
        code, why = 3, str(error)
    except KeyboardInterrupt:
        code, why = 130, "interrupted; the same command goes on from the last saved epoch"
    except BrokenPipeError:  # | head: nothing more is wanted
        code = 0
    except OSError as error:  # a full disk or standard output, a folder without permission
        why = f"{error.filename or 'standard output'}: {error.strerror or error}; free space, or choose another place"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        why = "not enough memory; lower --batch-size, --limit or --resolution"
    if dist.is_initialized():
        dist.destroy_process_group()
    if why:
        say(f"{script}: {why}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # what could not be written is not tried again
    sys.exit(code)
