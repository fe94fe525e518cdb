"""What both methods share of a run: options, device, output folder, progress, checkpoint, record, exit codes.

A script extends Options by its own dataclass and does its work inside exit_codes, which reports a failure in one line.
An output folder belongs to one set of settings and is locked while a run writes it.
"""
import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from tqdm import tqdm

import data
import embed
import metrics
from data import UsageError, say

RANK = int(os.environ.get("RANK", 0))  # torchrun's numbers; without it one process
WORLD = int(os.environ.get("WORLD_SIZE", 1))
PLAIN_SECONDS = 60  # between progress lines where stderr is no terminal
END_SECONDS = float(os.environ.get("END_SECONDS", 5))  # when one process has ended, torchrun ends the others sooner
LOST = "another process has ended, or cannot be reached; its own line, or torchrun's, says why"
FIRST_TRIES = {"zero_shot": "zero-shot (cosine)", "zero_shot_centred": "zero-shot, both sides centred",
               "linear_probe": "linear probe of its training data"}  # scores of baselines.py: title of their row


class Diverged(Exception):
    """The loss, a weight or a test score is no longer finite. The message says what to lower."""


# --- options ----------------------------------------------------------------------------------------------------------
def number(kind, wanted, at_least=-math.inf, above=-math.inf, below=math.inf):
    """A type for argparse: a number within limits. kind: int or float; wanted: the limits in words -> str to number"""
    def convert(word):
        value = kind(word)
        if not (value >= at_least and above < value < below):  # nan, too
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {word}")
        return value
    convert.__name__ = kind.__name__  # argparse names it where a word is no number
    return convert


# types of options, here and in the methods
COUNT = number(int, "at least 1", at_least=1)
WHOLE = number(int, "at least 0", at_least=0)
SEED = number(int, "at least 0 and below 2^40", at_least=0, below=2 ** 40)
POSITIVE = number(float, "above 0", above=0)
NOT_NEGATIVE = number(float, "at least 0", at_least=0)
SHARE = number(float, "at least 0 and below 1", at_least=0, below=1)


def option(default, text, group="method", **words):
    """A field that becomes --its-name. group: its heading in --help (of the running options only --checkpoint decides
    a result); words: what argparse.add_argument takes."""
    return dataclasses.field(default=default, metadata={"help": text, "group": group, "words": words})


@dataclass
class Options:
    dataset: str = option("scenes", "labelled photos", "data", choices=data.DATASETS)
    data_root: str = option("data", "folder that holds the datasets", "data", metavar="DIR")
    policy: tuple = option((), "how doubtful labels and splits are treated, such as difficult=negative (a wrong one "
                           "prints the dataset's list)", "data", nargs="+", metavar="NAME=VALUE")
    labels: str = option(None, "label file, one name a line (default: the dataset's own)", "data", metavar="FILE")
    unseen: tuple = option((), "labels held out of training, and scored beside the others", "data",
                           nargs="+", metavar="LABEL")
    train_count: int = option(None, "train on N photos (RP: texts of a file), drawn by a fixed seed; a larger N only "
                              "adds to them", "data", type=COUNT, metavar="N")
    test_count: int = option(None, "score N test photos, drawn likewise", "data", type=COUNT, metavar="N")
    no_probe: bool = option(False, "no linear probe beside the result", "data")
    backbone: str = option(None, "open_clip's name, or scenes (default: scenes for scenes, else ViT-B-16)", "CLIP")
    pretrained: str = option(None, "weights: open_clip's tag, a file, or none: random (default: openai; a backbone "
                             "local-dir:FOLDER or hf-hub:NAME brings its own)", "CLIP", metavar="FILE")
    resolution: int = option(None, "image side in pixels (default: the backbone's own)", "CLIP", type=COUNT)
    precision: str = option(None, "precision of CLIP; losses are fp32 (default: bf16 on a GPU, else fp32)", "CLIP",
                            choices=("fp32", "bf16"))
    lr: float = option(None, "learning rate", type=POSITIVE)
    epochs: int = option(None, "passes over the training data", type=COUNT)
    batch_size: int = option(None, "rows an optimiser step", type=COUNT)
    seed: tuple = option((0,), "random seeds, a training for each (default: 0)", nargs="+", type=SEED)
    impl: str = option("fused", "fused: the fast paths; reference: the plain formulas", choices=("fused", "reference"))
    gpu: int = option(None, "GPU number (default: 0 if there is one)", "running", type=WHOLE, metavar="N")
    cpu: bool = option(False, "run on the CPU", "running")
    workers: int = option(None, "processes that decode photos (default: as many as cores, at most 16)", "running",
                          type=WHOLE, metavar="N")
    cache: str = option("runs/cache", "folder of cached features", "running", metavar="DIR")
    output: str = option(None, "folder of results (default: runs/<method>/<dataset>)", "running", metavar="DIR")
    overwrite: bool = option(False, "start again in a folder that holds a run", "running")
    save_all: bool = option(False, "save every seed's model in checkpoints/, not only the first one's", "running")
    checkpoint: str = option(None, "score this trained model on the test photos instead of training", "running",
                             metavar="FILE")
    tensorboard: bool = option(False, "also write the values of log.jsonl for TensorBoard", "running")
    quiet: bool = option(False, "no progress bar", "running")
    given: tuple = ()  # names of the options given on the command line


def options_of(kind):
    return [field for field in dataclasses.fields(kind) if field.metadata]


def flag_of(name):
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Raises UsageError for mistakes on the command line, and takes no abbreviated options."""

    def __init__(self, **words):
        super().__init__(allow_abbrev=False, **words)

    def error(self, message):
        raise UsageError(f"{message}; --help lists the options")


def parse(kind, argv, description, epilog):
    """The command line -> an instance of kind, a dataclass that extends Options. argv: its words. Raises UsageError."""
    parser = Parser(description=description, epilog=epilog, argument_default=argparse.SUPPRESS)
    groups = {name: parser.add_argument_group(name) for name in ("method", "data", "CLIP", "running")}
    for field in options_of(kind):
        add_option(groups[field.metadata["group"]], field)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
            if len(set(value)) < len(value):
                raise UsageError(f"{flag_of(name)} {' '.join(map(str, value))}: a value is given twice; remove one")
    config = kind(**given, given=tuple(given))
    if config.tensorboard and find_spec("tensorboard") is None:
        raise UsageError("--tensorboard: pip install tensorboard, or leave it out")
    if config.backbone is None:
        if config.dataset == "scenes" and config.pretrained not in (None, "none") and not config.checkpoint:
            raise UsageError(f"--pretrained {config.pretrained}: for which CLIP? add --backbone NAME, or leave it out")
        config.backbone = "scenes" if config.dataset == "scenes" else "ViT-B-16"
    return config


def add_option(group, field):
    words = dict(field.metadata["words"])
    text = field.metadata["help"]
    if field.type is bool:
        words["action"] = "store_true"
    elif field.type is not tuple and field.default is not None:
        text += f" (default: {field.default})"
    group.add_argument(flag_of(field.name), help=text, **words)


def without_unseen(config, names):
    """The labels to train on, all but --unseen -> list of str. Raises UsageError."""
    for name in config.unseen:
        if name not in names:
            raise UsageError(f"--unseen {name}: must be one of the labels {', '.join(names[:30])}")
    trained = [name for name in names if name not in config.unseen]
    if not trained:
        raise UsageError("--unseen: leaves no label to train on; name fewer")
    return trained


def settings_of(config):
    """What decides a result: all but the running options (--checkpoint counts), and digests of files and datasets
    -> dict of JSON values"""
    settings = {"content of the dataset": data.identity(config.dataset, config.data_root)}
    for field in options_of(config):
        value = getattr(config, field.name)
        decides = field.metadata["group"] != "running" or field.name == "checkpoint"
        if not decides:
            continue
        settings[field.name] = value
        if field.metadata["words"].get("metavar") == "FILE" and value and Path(value).is_file():
            settings[f"content of {field.name}"] = data.digest(value)
    return json.loads(json.dumps(settings))


# --- device -----------------------------------------------------------------------------------------------------------
def set_up(config):
    """Chooses the device, joins torchrun's process group, and sets config.precision where it is not given
    -> torch.device. Raises UsageError."""
    if config.gpu is not None and (config.cpu or WORLD > 1):
        raise UsageError("--gpu does not go with --cpu or torchrun, which gives each process a GPU; leave one out")
    count = torch.cuda.device_count()
    number = config.gpu
    if number is None and count and not config.cpu:
        number = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    precision = "fp32"
    if number is not None:
        if number >= count:
            raise UsageError(f"GPU {number}: this machine has {count} that PyTorch can use; choose another, or --cpu")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            precision = "bf16"
    config.precision = config.precision or precision

    if WORLD > 1:
        backend = "gloo" if number is None else "nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    if number is None and not config.cpu:
        say("no GPU found: running on the CPU")
    return device


def load_clip(config, device):
    return embed.load_clip(config.backbone, config.pretrained, device, config.precision, config.resolution)


# --- output folder ----------------------------------------------------------------------------------------------------
HELD = []  # locks, until the process ends


def open_folder(config, default):
    """Locks the run's folder -> (folder, its record: {} for a new run). Scoring a --checkpoint without --output needs
    no folder: (None, {}). Raises UsageError if another process is writing it or it holds a run with other settings."""
    if config.checkpoint and not config.output:
        return None, {}
    folder = Path(config.output or default)
    if RANK == 0:
        HELD.append(data.hold(folder / ".lock", f"--output {folder}"))
    path = folder / "metrics.json"
    if config.overwrite or not path.is_file():
        return folder, {}
    with data.reading(path, "result", "delete it, or add --overwrite to start again"):
        record = json.loads(path.read_text("utf-8"))
        then = dict(record["config"])
        finished = record["finished"]
        record["runs"] = [one for one in record["runs"] if one["seed"] in config.seed]
    if config.epochs is None:  # the default depends on the number of photos
        config.epochs = record.get("default_epochs")
    now = settings_of(config)
    differ = [f"{name} {then.get(name)}, not {now.get(name)}" for name in then | now if then.get(name) != now.get(name)]
    if differ:
        raise UsageError(f"--output {folder} holds a run with other settings ({'; '.join(differ)}); choose another "
                         "--output, or add --overwrite to start again")
    if finished:
        say(f"{folder} is finished; --overwrite does it again")
    return folder, record


def begin(folder, record):
    """Call just before training: deletes the previous run's files and writes the new record."""
    if folder and RANK == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for name in ("metrics.json", "scores.safetensors", "resume.pt", "checkpoint.safetensors", "log.jsonl"):
            (folder / name).unlink(missing_ok=True)
        data.write_json(folder / "metrics.json", record)


def earlier_scores(folder):
    """What end_seed saved before this run was interrupted -> {name: [M, C]}. Raises UsageError for a damaged file."""
    path = folder / "scores.safetensors"
    if not path.is_file():
        return {}
    with data.reading(path, "scores", "delete it to do without them, or add --overwrite to start again"):
        return load_file(path)


def end_seed(folder, record, began, scores):
    """Writes metrics.json, with the last seed of record["runs"] and the means over all, and scores.safetensors. began:
    start time of the script; scores: {name: tensor [M, C]}, empty without test photos"""
    runs = record["runs"]
    record["seconds"] = round(time.time() - began, 2)
    record["peak_memory_mib"] = peak_memory_mib()
    record["finished"] = len(runs) == len(record["seeds"])
    if "mAP" in runs[0]:
        record["mAP"], record["mAP_std"] = spread([one["mAP"] for one in runs])
        for column, label in enumerate(record["per_class"]):
            label["ap"], _ = spread([one["ap"][column] for one in runs])
    if folder and RANK == 0:
        if scores:
            write_scores(folder, scores)
        data.write_json(folder / "metrics.json", record)
        (folder / "resume.pt").unlink(missing_ok=True)


def write_scores(folder, scores):
    """Writes scores.safetensors. scores: as in end_seed"""
    content = {name: tensor.contiguous() for name, tensor in scores.items()}  # as safetensors wants them
    data.write_atomically(folder / "scores.safetensors", to_safetensors(content))


# --- progress of a training -------------------------------------------------------------------------------------------
class Progress:
    """A training's log.jsonl, resume.pt after every epoch but the last, and its progress bar."""

    def __init__(self, config, folder, title, steps, tensors, optimiser):
        """title: names the run; steps: in an epoch; tensors: {name: tensor} of all that training changes. What an
        interrupted run saved is copied into tensors and optimiser. Raises UsageError for a damaged resume.pt."""
        self.config = config
        self.folder = folder
        self.title = title
        self.tensors = tensors
        self.optimiser = optimiser
        self.log = []
        if (folder / "resume.pt").is_file():
            self._resume()
        self.epochs_done = len(self.log)
        self.epoch_began = self.said_at = time.time()
        self.bar = tqdm(initial=self.epochs_done * steps, total=config.epochs * steps, desc=f"training {title}",
                        unit="step", disable=config.quiet or RANK > 0 or None)
        self.board = None
        if RANK == 0:
            self._begin_log()
        if config.tensorboard and RANK == 0:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(folder)

    def _begin_log(self):
        """Keeps the lines of earlier seeds, and this seed's up to the last save; drops a killed run's later ones."""
        path = self.folder / "log.jsonl"
        lines = []
        if path.is_file():
            lines = [line for line in path.read_text("utf-8").splitlines() if f'"{self.title}"' not in line]
        lines += [json.dumps(entry) for entry in self.log]
        data.write_atomically(path, "".join(f"{line}\n" for line in lines))

    def _resume(self):
        with data.reading(self.folder / "resume.pt", "half-trained model", "delete it to train this seed anew") as path:
            try:
                with data.without_warnings():  # torch warns about foreign files
                    state = torch.load(path, weights_only=True, map_location="cpu")
            except Exception:  # torch raises many kinds, and advises loading what must not be loaded
                raise ValueError("is damaged") from None
            if state["title"] != self.title:
                return
            fill(self.tensors, state["tensors"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.log = list(state["log"])
        say(f"{self.folder}: resuming after epoch {len(self.log)}")

    def step(self):
        """Call after every step: moves the bar, or, where stderr is no terminal, prints a line a minute."""
        self.bar.update()
        now = time.time()
        if self.bar.disable and not self.config.quiet and now > self.said_at + PLAIN_SECONDS:
            self.said_at = now
            say(f"training {self.title}: epoch {len(self.log) + 1} of {self.config.epochs}")

    def end_epoch(self, loss, lr, remedy):
        """loss: mean over the epoch; lr: learning rate at its end; remedy: what to lower. Raises Diverged."""
        epoch = len(self.log) + 1
        if not math.isfinite(loss) or not all(tensor.isfinite().all() for tensor in self.tensors.values()):
            raise Diverged(f"training diverged in epoch {epoch} (loss {loss}); lower {remedy}")
        now = time.time()
        entry = {"run": self.title, "epoch": epoch, "loss": loss, "lr": lr, "seconds": round(now - self.epoch_began, 3)}
        self.epoch_began = now
        self.log.append(entry)
        self.bar.set_postfix(loss=f"{loss:.3f}")
        if RANK > 0:
            return
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self.board:
            self.board.add_scalar(f"loss/{self.title}", loss, epoch)
            self.board.add_scalar(f"lr/{self.title}", lr, epoch)
            self.board.flush()
        if epoch == self.config.epochs:
            self.bar.close()
        else:
            self._save()

    def _save(self):
        stream = BytesIO()
        state = {"title": self.title, "tensors": self.tensors, "log": self.log}
        torch.save({**state, "optimiser": self.optimiser.state_dict()}, stream)
        data.write_atomically(self.folder / "resume.pt", stream.getvalue())


def fill(tensors, stored):
    """Copies stored {name: tensor} into tensors. Raises ValueError where names or shapes differ, or for nan and inf."""
    for name in tensors.keys() | stored.keys():
        if name not in tensors or name not in stored or tensors[name].shape != stored[name].shape:
            raise ValueError("its tensors do not fit its settings")
        if not stored[name].isfinite().all():
            raise ValueError(f"its {name} is not finite")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])


# --- checkpoint -------------------------------------------------------------------------------------------------------
OWN_CHECKPOINT = "pass a checkpoint.safetensors that adapter_rp.py or sspa.py wrote"


def save_checkpoint(config, folder, seed, tensors, **metadata):
    """Saves a run's learned tensors, with method, names, settings, encoder ... as JSON in the file's metadata, the
    first seed's in checkpoint.safetensors, with --save-all each seed's in checkpoints/seed <seed>.safetensors."""
    if RANK > 0:
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata["seed"] = seed
    content = to_safetensors(tensors, {name: json.dumps(value) for name, value in metadata.items()})
    if seed == config.seed[0]:
        data.write_atomically(folder / "checkpoint.safetensors", content)
    if config.save_all:
        data.write_atomically(folder / "checkpoints" / f"seed {seed}.safetensors", content)


def read_checkpoint(path, method=None):
    """Reads a checkpoint -> (tensors, metadata: dict with method, names, settings, encoder, encoder_key, seed). Raises
    UsageError for any other file, and for one of another method."""
    with data.reading(path, "checkpoint", OWN_CHECKPOINT) as path:
        path.open("rb").close()  # says more plainly than safe_open that it is missing, or a folder
        with safe_open(path, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no dict)
            metadata = {name: json.loads(value) for name, value in (stored.metadata() or {}).items()}
        if metadata.get("method") not in ("rp", "sspa") or method not in (None, metadata["method"]):
            raise ValueError("it holds no model that can be used here")
        for name, kind in {"names": list, "settings": dict, "encoder": str, "encoder_key": str, "seed": int}.items():
            if not isinstance(metadata[name], kind):
                raise ValueError(f"its {name} is of another form")
    return tensors, metadata


def as_trained(config, metadata):
    """config with the options of the checkpoint's training: those of the method always (but --impl), others where the
    command line does not give them, and of these the data options only without --dataset. -> a new config"""
    settings = metadata["settings"]
    changes = {"seed": (metadata["seed"],)}
    for field in options_of(config):
        name = field.name
        group = field.metadata["group"]
        given = name in config.given
        if name not in settings or name in ("impl", "precision", "seed", "checkpoint", "no_probe"):
            continue
        on_other_data = group == "data" and "dataset" in config.given
        if on_other_data or (given and group != "method"):
            continue
        value = settings[name]
        if isinstance(value, list):
            value = tuple(value)
        if given and group == "method" and getattr(config, name) != value:
            say(f"{config.checkpoint} was made with its own {flag_of(name)} {value}; the command line's is ignored")
        changes[name] = value
    return dataclasses.replace(config, **changes)


def check_fits(path, metadata, names, encoder, encoder_key):
    """Raises UsageError unless a checkpoint was trained on these labels in this order, and on this encoder."""
    trained = metadata["names"]
    if names != trained:
        reason = f"it has {len(trained)} labels, not {len(names)}"
        for number, (there, here) in enumerate(zip(trained, names, strict=False), 1):
            if there != here:
                reason = f"label {number} is '{there}' there and '{here}' here"
                break
        raise UsageError(f"checkpoint {path}: trained for other labels or another order of them ({reason}); pass the "
                         "--dataset and --labels it was trained with")
    if encoder_key != metadata["encoder_key"]:
        raise UsageError(f"checkpoint {path}: trained on {metadata['encoder']}, not on {encoder} as it is here; pass "
                         "the same --backbone, --pretrained and --resolution (or --features)")


# --- results ----------------------------------------------------------------------------------------------------------
def measure(logits, scores, probabilities, truth):
    """The metrics of one run -> dict, percent. Tensors [N, C]: logits rank the photos; scores in 0..1 are cut at 0.5
    [field]; probabilities: what the scores imply, or None. truth: numpy [N, C]. Raises Diverged."""
    logits = logits.numpy()
    scores = scores.numpy()
    if not np.isfinite(logits).all():
        raise Diverged("the scores of the test photos are not finite; lower --lr")
    result = {
        "mAP": metrics.mean_average_precision(logits, truth),
        "mAP_interpolated": metrics.mean_average_precision(logits, truth, interpolated=True),
        "threshold_0.5": f1_at(scores, truth, 0.5),
        "top_3": metrics.multilabel_f1(scores, truth, top_k=min(3, truth.shape[1])),
        "attributes": metrics.attribute_metrics(scores, truth),
        "score": calibration(scores, truth),
        "ap": (100 * metrics.average_precision(logits, truth)).tolist(),
    }
    if probabilities is not None:
        probabilities = probabilities.numpy()
        thresholds = metrics.expected_f1_thresholds(probabilities)
        result["label_free"] = f1_at(probabilities, truth, thresholds)
        result["probability"] = calibration(probabilities, truth)
    return result


def f1_at(scores, truth, threshold):
    return {**metrics.multilabel_f1(scores, truth, threshold), "macro F1": metrics.macro_f1(scores, truth, threshold)}


def calibration(scores, truth):
    return {"calibration error": metrics.calibration_error(scores, truth),
            "Brier": 100 * metrics.brier_score(scores, truth), "bins": metrics.reliability(scores, truth).tolist()}


def spread(values):
    """values: numbers, None counts as nan -> (mean, sample standard deviation; 0 for one value)"""
    values = np.array(values, float)
    more_than_one = len(values) > 1
    return float(values.mean()), float(values.std(ddof=int(more_than_one)))


def commit():
    """The git commit of this file, with "+" if the tree has changes; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def new_record(method, config, argv, device, names, trained, scores):
    """metrics.json before the first seed is done. names: all labels; trained: those trained on; scores: {"truth":
    labels of the test photos [M, C], and scores of baselines.py}, empty without test photos -> dict"""
    photo_count = 0
    positives = [None] * len(names)
    zero_shot_ap = [None] * len(names)
    first_tries = {f"{name}_mAP": None for name in FIRST_TRIES}
    if scores:
        truth = scores["truth"].numpy()
        photo_count = len(truth)
        positives = (truth == 1).sum(0).tolist()
        zero_shot_ap = (100 * metrics.average_precision(scores["zero_shot"].numpy(), truth)).tolist()
        for name in FIRST_TRIES.keys() & scores.keys():
            first_tries[f"{name}_mAP"] = metrics.mean_average_precision(scores[name].numpy(), truth)
    per_class = []
    for name, count, ap in zip(names, positives, zero_shot_ap, strict=True):
        per_class.append({"name": name, "positives": count, "ap": None, "zero_shot_ap": ap, "trained": name in trained})
    machine = platform.processor() or platform.machine()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return {
        "method": method,
        "dataset": config.dataset,
        "impl": config.impl,
        "commit": commit(),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *argv]),
        "config": settings_of(config),
        "seeds": list(config.seed),
        "processes": WORLD,
        "threads": torch.get_num_threads(),
        "device": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "label_count": len(names),
        "photo_count": photo_count,
        **first_tries,
        "mAP": None,
        "mAP_std": None,
        "per_class": per_class,
        "runs": [],
        "finished": False,
    }


def peak_memory_mib():
    """Peak memory in MiB, of the GPU where one is used, else of this process; None where it is unknown"""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    if find_spec("resource") is None:  # Windows has none
        return None
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20)


def f1s(runs, group):
    """The end of a row: CF1, OF1 and macro F1, means over runs"""
    CF1, OF1, macro = (spread([one[group][name] for one in runs])[0] for name in ("CF1", "OF1", "macro F1"))
    return f"{CF1:8.1f}{OF1:8.1f}{macro:12.1f}"


def report(record, row, learnt_from):
    """Prints the table of results. row: title of the method's row; learnt_from: its training data, in words"""
    runs = record["runs"]
    seeds = " ".join(map(str, record["seeds"]))
    tested = ""
    if record["photo_count"]:
        tested = f"{record['dataset']}: {record['photo_count']:,} test photos, "
    print(f"{tested}{record['label_count']:,} labels; {record['backbone']}; {learnt_from}; seed {seeds}")
    if record["mAP"] is None:
        print("(no test photos for these labels: nothing to score; pass a --dataset that has them)")
        return
    print(f"\n{'':<34}{'mAP %':>14}{'CF1 %':>8}{'OF1 %':>8}{'macro F1 %':>12}")
    for name, words in FIRST_TRIES.items():
        mAP = record.get(f"{name}_mAP")
        if mAP is not None:
            print(f"{words:<34}{mAP:8.2f}")
    deviation = f" ±{record['mAP_std']:4.2f}" if len(runs) > 1 else ""
    print(f"{row:<34}{record['mAP']:8.2f}{deviation:6}{f1s(runs, 'threshold_0.5')}")
    score_error, _ = spread([one["score"]["calibration error"] for one in runs])
    if "label_free" in runs[0]:
        probability_error, _ = spread([one["probability"]["calibration error"] for one in runs])
        print(f"{'  thresholds without labels':<48}{f1s(runs, 'label_free')}")
        print(f"calibration error: score {score_error:.1f} %, probability {probability_error:.1f} %")
    unseen = ", ".join(label["name"] for label in record["per_class"] if not label["positives"])
    if unseen:
        print(f"no test photo shows: {unseen:.200} (left out of mAP, 0 in CF1 and macro F1)")
    if all(label["trained"] for label in record["per_class"]):
        return
    for trained, words in ((True, "trained on"), (False, "never trained on")):
        some = [one for one in record["per_class"] if one["trained"] == trained and one["positives"]]
        if not some:
            continue
        own = np.mean([one["ap"] for one in some])
        zero_shot = np.mean([one["zero_shot_ap"] for one in some])
        print(f"  {len(some)} labels {words}: mAP {own:.2f}, zero-shot {zero_shot:.2f}")


# --- exit codes -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def exit_codes(script):
    """`with exit_codes(script) as argv:` ends the process with 0 done, 2 user error, missing data, full disk or memory,
    3 diverged, 130 interrupted; one line says why."""
    # the asymmetric loss makes gradients whose squares are below 1e-38, with which a CPU is many times slower
    torch.set_flush_denormal(True)
    data.speak_utf8()
    stderr = sys.stderr
    if RANK > 0:  # the first process speaks for all
        sys.stdout = stderr = open(os.devnull, "w", errors="ignore")  # noqa: SIM115 (for the rest of the process)
    code = 2
    why = None
    try:
        with contextlib.redirect_stderr(stderr):
            yield sys.argv[1:]
        sys.stdout.flush()
        code = 0
    except UsageError as error:
        why = str(error)
    except Diverged as error:
        code = 3
        why = str(error)
    except KeyboardInterrupt:
        code = 130
        if RANK == 0:
            why = "interrupted; the same command goes on from what is saved (epochs, encoded photos in the cache)"
    except BrokenPipeError:  # | head: nothing more is wanted
        code = 0
    except OSError as error:  # a full disk, a folder without permission
        why = f"{error.filename or 'standard output'}: {error.strerror or error}; free space, or choose another place"
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if out_of_memory:
            why = "not enough memory; lower --batch-size, --train-count, --resolution or --workers, where it has them"
        elif isinstance(error, dist.DistError) or "third_party/gloo" in str(error):
            why = LOST
        else:
            raise
    if why and WORLD > 1:
        if RANK > 0 or why == LOST:  # if another process failed, too, torchrun ends this one before it says the same
            time.sleep(END_SECONDS)
        why = f"process {RANK} of {WORLD}: {why}"
    if why:
        say(f"{script}: {why}")
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout = None  # else Python would try again at exit to write what it could not
    sys.exit(code)
