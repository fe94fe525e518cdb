"""The command lines of both methods as people type them: what they refuse, leave behind, survive and give back.

Importing torch and open_clip takes seconds, a tiny run less than one. So a command is a process forked from one that
has imported them (multiprocessing's forkserver), in which the script then runs as python would run it. Where the start
itself is tested, python is called.
"""
import functools
import gzip
import json
import multiprocessing.forkserver
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from safetensors import safe_open
from safetensors.torch import load_file, save

import data
import embed
import scenes
import sspa  # noqa: F401 (what the forkserver shall have imported)

embed.import_open_clip()
RP, SSPA = "adapter_rp.py", "sspa.py"
OURS = [path.stem for path in REPOSITORY.glob("*.py")]
BOTH = pytest.mark.parametrize("script", [RP, SSPA])


# --- a command --------------------------------------------------------------------------------------------------------

def as_script(script, words, folder, stdout, stderr, environment, full_at):
    """python script words, in a process that has imported torch but nothing of ours. stdout: None is a pipe that
    nobody reads; full_at: bytes in a file, as on a full disk."""
    for number, path in ((1, stdout), (2, stderr)):
        reader, writer = os.pipe() if path is None else (None, os.open(path, os.O_WRONLY | os.O_CREAT))
        os.dup2(writer, number)
        if path is None:
            os.close(reader)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    if full_at:
        resource.setrlimit(resource.RLIMIT_FSIZE, (full_at, full_at))
    multiprocessing.set_start_method("fork", force=True)  # of DataLoader's processes, as in a process of its own
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background hands down "ignore"
    socket.getaddrinfo = None  # tests use no network
    os.environ.update(environment)
    os.chdir(folder)
    for name in OURS:
        sys.modules.pop(name, None)
    sys.argv = [str(REPOSITORY / script), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Running(NamedTuple):
    script: str
    process: multiprocessing.Process
    stdout: Path
    stderr: Path

    def end(self, expect=0):
        """-> (stdout, stderr). A command that ends otherwise than well says why in the last line."""
        self.process.join(60)
        self.process.kill()
        stdout, stderr = (path.read_text("utf-8", "surrogateescape") if path and path.is_file() else ""
                          for path in (self.stdout, self.stderr))
        told = f"exit code {self.process.exitcode}\n{stdout}\n{stderr}"
        assert self.process.exitcode == expect and "Traceback" not in stderr, told
        assert not expect or stderr.splitlines()[-1].startswith(f"{self.script}: "), told
        return stdout, stderr

    def wait_for(self, condition):
        deadline = time.monotonic() + 100
        while not condition():
            assert self.process.is_alive() and time.monotonic() < deadline, self.stderr.read_text()
            time.sleep(0.005)


@pytest.fixture(scope="module")
def start(cache, tmp_path_factory):
    """start("sspa.py", "--epochs 2 --output", path) -> Running. Words are split as a shell would, paths are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)]))
        multiprocessing.forkserver.set_forkserver_preload([__name__])
        multiprocessing.forkserver.ensure_running()

    def begin(script, *words, folder=None, stdout="stdout", stderr="stderr", full_at=None, cpu=True, **environment):
        place = tmp_path_factory.mktemp("command")
        words = [part for word in words for part in ([str(word)] if isinstance(word, Path) else shlex.split(word))]
        words += ["--cache", cache] * ("--cache" not in words) + ["--cpu"] * (cpu and "--gpu" not in words)
        stdout, stderr = stdout and place / stdout, place / stderr  # an absolute path stays what it is
        process = multiprocessing.get_context("forkserver").Process(target=as_script, args=(
            script, words, folder or place, stdout, stderr, environment, full_at))
        process.start()
        return Running(script, process, stdout, stderr)
    return begin


@pytest.fixture(scope="module")
def command(start):
    """The same, waited for -> (stdout, stderr)"""
    return lambda *words, expect=0, **more: start(*words, **more).end(expect)


def result_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def outcome(folder):
    """What must not differ between two runs of the same settings"""
    result, log = result_of(folder), [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for entry in (*result["runs"], *log):
        entry.pop("seconds", None)
    tensors = {name: tensor.tolist() for name, tensor in load_file(folder / "checkpoint.safetensors").items()}
    return result["runs"], result["per_class"], log, tensors, sorted(path.name for path in content_of(folder))


TINY = {RP: "--text-count 300 --test-count 130 --epochs 2 --seed 0 1",
        SSPA: "--tune-image none --train-count 130 --test-count 130 --epochs 2 --seed 0 1"}
LONG = {RP: "--features {f}/features.npz --epochs 500 --seed 0 1",
        SSPA: "--tune-image none --train-count 130 --test-count 130 --epochs 6 --seed 0 1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder: features of four labels, photos with odd names and a torn one, label lists."""
    place, draw = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    centres = draw.normal(size=(4, 16))
    arrays = {"label_names": ["cat", "dog", "bus", "tree"], "label_embeddings": centres}
    for name, count in (("text", 240), ("image", 80)):
        arrays[f"{name}_labels"] = marks = (draw.random((count, 4)) < 0.4).astype(np.int8)
        arrays[f"{name}_embeddings"] = marks @ centres + draw.normal(size=(count, 16))
    np.savez(place / "features.npz", **arrays)
    (place / "photos" / "empty").mkdir(parents=True)
    for row, name in enumerate((b"a.png", b"caf\xe9 \xff.png", "ü, 1.jpg".encode())):
        scenes.picture("test", row)[0].save(os.fsdecode(os.fsencode(place / "photos") + b"/" + name))
    (place / "photos/torn.jpg").write_bytes((place / "photos/ü, 1.jpg").read_bytes()[:700])
    for name, words in (("few", ["sun", "moon"]), ("foreign", ["sun", "zebra"]), ("reversed", scenes.NAMES[::-1])):
        (place / f"{name}.txt").write_text("\n".join(words))
    return place


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """{script: a finished run of two seeds}"""
    runs = {script: SimpleNamespace(folder=tmp_path_factory.mktemp("trained")) for script in TINY}
    for script, one in runs.items():
        one.checkpoint = one.folder / "checkpoint.safetensors"
        one.stdout, _ = command(script, TINY[script], "--output", one.folder)
    return runs


# --- refused ----------------------------------------------------------------------------------------------------------

OPTIONS = """dataset data-root policy labels unseen train-count test-count no-probe backbone pretrained resolution
    precision gpu cpu seed epochs batch-size lr impl workers cache output overwrite save-all checkpoint tensorboard
    quiet gamma-neg clip focal-gradient"""
OWN_OPTIONS = {RP: "features texts text-count noise-law noise-std normalize adapter head loss",
               SSPA: """descriptions tune-image context-length attention-scale no-dsf fusion quaternion-layers
               alignment no-gate aggregator temperature branches regional-weight prompt-lr image-lr-factor ema"""}


@BOTH
def test_help(script, tmp_path):
    """Every option with its words, the method's first; from anywhere, without open_clip, whose import takes seconds."""
    words = [sys.executable, "-X", "importtime", REPOSITORY / script, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0 and "torch" in done.stderr and "open_clip" not in done.stderr
    explained = dict(re.findall(r"^  --([\w-]+)(?: [^\n]*?\S)??(?:  +|\n +)([^\s-][^\n]*)", done.stdout, re.M))
    assert set(explained) == set(OPTIONS.split() + OWN_OPTIONS[script].split()) and not any(tmp_path.iterdir())
    assert all(re.search("[a-z]{2}", words) for words in explained.values())
    groups = [done.stdout.index(f"\n{name}:\n") for name in ("method", "data", "CLIP", "running")]
    assert groups == sorted(groups)


REFUSED = {  # words, what the answer must hold
    RP: [("--lr nan", "--lr nan: must be"), ("--lr 0,1", "--lr: invalid float"), ("--lr", "--lr: expected"),
         ("--noise-std inf", "--noise-std inf: must be"), ("--seed 1 1", "--seed 1 1: a value stands twice"),
         ("--seed -1", "--seed -1: must be at least 0"), ("--resolution 65", "multiple of 8"),
         ("--workers -1", "--workers -1: must be"), ("--dataset imagenet", "choose from 'scenes', 'voc2007'"),
         ("--policy difficult=ignore", "--policy difficult=ignore: scenes takes none"), ("--data x", "s: --data"),
         ("--gpu 99", "GPU 99: this machine has"), ("--gpu 0 --cpu", "leave one out"),
         ("--precision fp16", "'fp32', 'bf16'"), ("--backbone ViT-B-61", "ViT-B-16"),
         ("--backbone ViT-S-32-alt --pretrained openai", "--pretrained openai: "),
         ("--dataset voc2007 --backbone scenes --data-root {f}", "VOCtrainval_06-Nov-2007.tar"),
         ("--labels {f}/few.txt --pretrained laion", "--pretrained laion: of which CLIP? add --backbone NAME"),
         ("--features {f}/features.npz --texts x", "leave --texts out"),
         ("--features {f}/features.npz --labels {f}/few.txt", "--labels names 'sun', which"),
         ("--checkpoint {rp} --labels {f}/reversed.txt", "label 1 is 'sun' there"),
         ("--checkpoint {rp} --resolution 128", "same --backbone, --pretrained and --resolution"),
         ("--checkpoint {sspa}", "it holds no model of this script"),
         ("--tensorboard", "pip install tensorboard"), ("--unseen sun", "add --head label-embedding"),
         ("--output {f}/few.txt", "{f}/few.txt"), ("--output /proc/x", "/proc/x")],
    SSPA: [("--temperature 0", "must be above 0"), ("--ema 1", "and below 1"), ("--texts x", "s: --texts x"),
           ("--output {f}/few.txt/x", "{f}/few.txt"), ("--unseen dragon", "--unseen dragon: must be one of the labels"),
           ("--context-length 38", "--context-length 38: this CLIP reads 40 tokens"),
           ("--labels {f}/foreign.txt", "'zebra' is no label of scenes"),
           ("--checkpoint {sspa} --dataset voc2007", "VOCtest_06-Nov-2007.tar")]}


@pytest.mark.parametrize("script, words, answer", [(name, *case) for name in REFUSED for case in REFUSED[name]])
def test_refused(command, place, trained, tmp_path, script, words, answer):
    files = {"f": place, "rp": trained[RP].checkpoint, "sspa": trained[SSPA].checkpoint}
    places = (place, tmp_path, trained[script].folder)
    before = [content_of(folder) for folder in places]
    stdout, stderr = command(script, words.format(**files), expect=2, folder=tmp_path)
    assert answer.format(**files) in stderr.splitlines()[-1] and stdout == ""
    assert stderr.count("\n") == 1
    assert [content_of(folder) for folder in places] == before


# --- killed, resumed, two at once -------------------------------------------------------------------------------------

def in_training(folder, scored=0):
    """Whether some epochs of a run are saved, after so many scored runs"""
    try:
        record, resume = ((folder / name).stat().st_mtime_ns for name in ("metrics.json", "resume.pt"))
        return record < resume and scored == sum("mAP" in run for run in result_of(folder)["runs"])
    except FileNotFoundError:
        return False


def kill_in_training(running, folder, scored=0, decoding=False):
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
    running.wait_for(lambda: in_training(folder, scored) and (not decoding or children.read_text()))
    running.process.kill()
    running.process.join()
    assert running.process.exitcode == -signal.SIGKILL and in_training(folder, scored)


@pytest.fixture(scope="module")
def whole(start, command, place, tmp_path_factory):
    """{script: folder of an undisturbed run}, in which two others wanted the same folder while it ran"""
    folders = {script: tmp_path_factory.mktemp("whole") for script in LONG}
    for script, folder in folders.items():
        running = start(script, LONG[script].format(f=place), "--output", folder, RESUME_SECONDS="0")
        running.wait_for(lambda folder=folder: in_training(folder))
        for more in ("--quiet", "--lr 1 --overwrite"):
            _, stderr = command(script, LONG[script].format(f=place), more, "--output", folder, expect=2,
                                LOCK_SECONDS="0.1")
            assert stderr.count("\n") == 1 and f"{folder}: another run is writing it; wait for it, or choose" in stderr
        assert running.process.is_alive() and not result_of(folder)["finished"]
        running.end()
    return folders


@pytest.fixture(scope="module")
def killed(start, place, tmp_path_factory):
    """{script: folder of a run killed in training}; SSPA, whose seeds follow one another, in the first and second"""
    folders = {script: tmp_path_factory.mktemp("killed") for script in LONG}
    for script, scored in ((RP, 0), (SSPA, 0), (SSPA, 1)):
        running = start(script, LONG[script].format(f=place), "--output", folders[script], RESUME_SECONDS="0")
        kill_in_training(running, folders[script], scored)
    return folders


@BOTH
def test_killed_and_resumed(command, place, whole, killed, tmp_path, script):
    """SIGKILL in training, then the same command: the run that nobody disturbed, bit for bit."""
    folder = shutil.copytree(killed[script], tmp_path / "resumed")
    before, scored = result_of(folder), {RP: 0, SSPA: 1}[script]
    assert before["finished"] is False and before["mAP"] == (before["runs"][0]["mAP"] if scored else None)
    _, stderr = command(script, LONG[script].format(f=place), "--output", folder)
    assert re.search("going on after epoch [1-9]", stderr) and "seed 0: mAP" not in stderr
    assert outcome(folder) == outcome(whole[script]) and result_of(folder)["finished"]


def test_killed_while_photos_are_decoded(start, command, tmp_path):
    """Processes that decode photos do not keep a folder from its next run when the one they work for is killed."""
    words = (SSPA, "--train-count 64 --test-count 64 --batch-size 8 --epochs 2 --output", tmp_path)
    kill_in_training(start(*words, RESUME_SECONDS="0"), tmp_path, decoding=True)
    assert "going on after epoch" in command(*words)[1]


@BOTH
def test_what_another_run_left_is_not_gone_on_with(command, place, killed, tmp_path, script):
    """metrics.json deleted, as its own message advises, and then other settings: a run like any other."""
    folder = shutil.copytree(killed[script], tmp_path / "left")
    (folder / "metrics.json").unlink()
    for output in (folder, tmp_path / "fresh"):
        command(script, LONG[script].format(f=place), "--epochs 3 --lr 0.002 --output", output)
    assert outcome(folder) == outcome(tmp_path / "fresh")


# --- bad files --------------------------------------------------------------------------------------------------------

class Bomb:
    """What a pickle may do to whoever loads it: make the file that the environment names"""

    def __reduce__(self):
        return Path.touch, (Path(os.environ["BOMB"]),)


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "went off"))
    yield Bomb()
    assert not (tmp_path / "went off").exists()


def altered(value, change):
    """The same nested value with change(tensor) in place of every tensor of floats"""
    if isinstance(value, dict):
        return {name: altered(part, change) for name, part in value.items()}
    return change(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check_refused(command, words, file, odd, remedy):
    """A run that reads a damaged file says so in one line, with what to do, and leaves all as it is. odd: damages
    beside the simple ones: contents of the file, functions that write it, or None for a simple one that is none"""
    good = file.read_bytes()
    simple = {"empty": b"", "torn": good[:2 * len(good) // 3], "text": b"hello", "list": b"[1]", "bytes": b"\xff\xfe\0"}
    for damage, content in (simple | odd).items():
        if content is not None:
            content(file) if callable(content) else file.write_bytes(content)
            before = content_of(file.parent)
            _, stderr = command(*words, expect=2, folder=file.parent)
            assert stderr.count("\n") == 1 and f" {file}: " in stderr and re.search(f"; .*({remedy})", stderr), damage
            assert "weights_only" not in stderr and content_of(file.parent) == before, damage
    file.write_bytes(good)


@BOTH
@pytest.mark.parametrize("name", ["metrics.json", "resume.pt"])
def test_damaged_file_of_a_run(command, place, whole, killed, tmp_path, bomb, script, name):
    folder = shutil.copytree(killed[script], tmp_path / "run")
    words = (script, LONG[script].format(f=place), "--output", folder)
    if name == "metrics.json":
        odd = {"runs": json.dumps({**result_of(folder), "runs": [{}], "finished": True}).encode()}
    else:
        state = torch.load(folder / name, weights_only=True)
        odd = {"pickle": {**state, "log": bomb}, "nan": altered(state, lambda tensor: tensor * np.nan),
               "shapes": altered(state, lambda tensor: tensor[None])}
        odd = {damage: functools.partial(torch.save, value) for damage, value in odd.items()}
    check_refused(command, words, folder / name, odd, "delete it")
    (folder / name).write_bytes(b"")
    if name == "resume.pt":  # the remedies of both, as their lines put them
        (folder / name).unlink()
    command(*words, "--overwrite" if name == "metrics.json" else "")
    assert outcome(folder) == outcome(whole[script])


TEXTS = "".join(json.dumps({"text": f"a {name} here", "labels": [name]}) + "\n" for name in scenes.NAMES).encode()
INPUTS = {  # option and file: script, what is good, the remedy
    "--labels names.txt": (RP, b"sun\nmoon\n", "give a UTF-8|write"),
    "--texts texts.jsonl.gz": (RP, gzip.compress(TEXTS), "each line must be|check both|give a UTF-8"),
    "--texts captions.json": (RP, b'{"annotations": [{"caption": "a sun"}]}', "COCO|valid JSON|UTF-8"),
    "--descriptions table.json": (SSPA, b'{"descriptions": {"sun": "A sun is round."}}', "must be|valid JSON|UTF-8"),
    "--features features.npz": (RP, None, "it must be an .npz without pickles of text_embeddings"),
    "--pretrained clip.safetensors": (RP, scenes.CHECKPOINT.read_bytes(), "give weights of this very model"),
    "--checkpoint rp.safetensors": (RP, None, "pass a checkpoint.safetensors that this script wrote"),
    "--checkpoint sspa.safetensors": (SSPA, None, "pass a checkpoint.safetensors that this script wrote")}


@pytest.mark.parametrize("case", INPUTS)
def test_damaged_input(command, place, trained, tmp_path, bomb, case):
    (option, name), (script, good, remedy), odd = case.split(), INPUTS[case], {}
    good = good or (place / name if option == "--features" else trained[script].checkpoint).read_bytes()
    file = tmp_path / name
    file.write_bytes(good)
    if option == "--features":
        arrays = dict(np.load(file))
        odd = {"pickle": np.array([bomb]), "nan": arrays["text_embeddings"] * np.nan, "shapes": arrays["text_labels"]}
        odd = {key: functools.partial(np.savez, **{**arrays, "text_embeddings": odd[key]}) for key in odd}
    elif name.endswith("safetensors"):
        with safe_open(file, "pt") as stored:
            tensors, metadata = load_file(file), stored.metadata()
        odd = {"nan": save(altered(tensors, lambda tensor: tensor * np.nan), metadata), "page": b"<html>",
               "shapes": save(altered(tensors, lambda tensor: tensor[None]), metadata),
               "other": trained[SSPA if script == RP else RP].checkpoint.read_bytes(),
               "pickle": functools.partial(torch.save, bomb)}
        if option == "--checkpoint":
            odd |= {"bare": save(tensors), "settings": save(tensors, {**metadata, "settings": "[1]"})}
    elif option == "--labels":  # to it the others are names
        odd = {"torn": None, "text": None, "list": None}
    more = {"--checkpoint": "", "--descriptions": "--tune-image none --epochs 1",
            "--pretrained": "--backbone scenes --epochs 1"}.get(option, "--epochs 1")
    few = {RP: "--test-count 20", SSPA: "--train-count 20 --test-count 20"}[script]
    check_refused(command, (script, few, more, option, file), file, odd, remedy)
    command(script, few, more, option, file, "--output", tmp_path / "out")


# --- folders, ends ----------------------------------------------------------------------------------------------------

@BOTH
def test_folder_belongs_to_its_settings(command, trained, tmp_path, script):
    """The same again prints the result (running options aside); others are refused by name; --overwrite begins anew."""
    folder = shutil.copytree(trained[script].folder, tmp_path / "run")
    words, before = (script, TINY[script], "--output", folder), content_of(folder)
    again = command(*words, "--workers 0 --quiet")
    assert again == (trained[script].stdout, f"{folder} is finished; --overwrite does it again\n")
    _, stderr = command(*words, "--epochs 3 --clip 0.05", expect=2)
    assert stderr.count("\n") == 1 and "(epochs 2, not 3; clip 0.0, not 0.05)" in stderr and "--overwrite" in stderr
    command(*words, "--overwrite --labels", tmp_path / "none.txt", expect=2)  # a slip loses nothing
    assert content_of(folder) == before
    command(*words, "--epochs 3 --overwrite")
    assert result_of(folder)["config"]["epochs"] == 3 and set(content_of(folder)) == set(before)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("script, option, old, new", [
    (RP, "texts", TEXTS, TEXTS * 2), (RP, "labels", b"sun\nmoon", b"moon\nsun"),
    (SSPA, "descriptions", b'{"sun": "The sun is round."}', b'{"sun": "The sun is hot."}')])
def test_changed_file_is_another_setting(command, tmp_path, script, option, old, new):
    for expect, content in ((0, old), (2, new)):
        (tmp_path / "file.jsonl").write_bytes(content)
        words = (script, TINY[script], f"--test-count 20 --epochs 1 --{option}", tmp_path / "file.jsonl")
        _, stderr = command(*words, "--output", tmp_path / "run", expect=expect)
    assert f"(content of {option} " in stderr


@BOTH
def test_divergence(command, tmp_path, script):
    _, stderr = command(script, TINY[script], "--lr 1e30 --output", tmp_path, expect=3)
    assert "training diverged in epoch" in stderr and "lower --lr" in stderr and not result_of(tmp_path)["finished"]
    if script == RP:
        words = (RP, TINY[RP], "--overwrite --noise-std 1e38 --output", tmp_path)
        assert "loss nan); lower --lr (now 0.001) or --noise-std (now 1e+38)" in command(*words, expect=3)[1]


@BOTH
def test_ctrl_c_in_training(start, place, tmp_path, script):
    running = start(script, LONG[script].format(f=place), "--output", tmp_path, RESUME_SECONDS="0")
    running.wait_for(lambda: in_training(tmp_path))
    os.kill(running.process.pid, signal.SIGINT)
    assert running.end(130)[1] == f"{script}: interrupted; the same command goes on from the last saved epoch\n"


@BOTH
def test_nowhere_to_write(command, trained, place, tmp_path, script):
    """A full standard output; one that head has closed, which is no mistake; a full disk, and then room again."""
    tags = ("tag.py", trained[script].checkpoint, place / "photos", "--stdout")
    for words in ((script, TINY[script], "--output", trained[script].folder), tags):
        assert "standard output: No space left on device; free" in command(*words, stdout="/dev/full", expect=2)[1]
        assert "Broken" not in command(*words, stdout=None)[1]
    words = (script, TINY[script], "--output", tmp_path / "run")
    assert f"cannot write {tmp_path / 'run'}" in command(*words, full_at=20_000, expect=2)[1]
    assert not list((tmp_path / "run").glob(".*partial")) and command(*words)[0] == trained[script].stdout


# --- what a run leaves, and what it is good for -----------------------------------------------------------------------

@BOTH
def test_record(trained, whole, script):
    result, stdout = result_of(trained[script].folder), trained[script].stdout
    assert [run["seed"] for run in result["runs"]] == result["seeds"] == [0, 1]
    assert result["mAP"] == pytest.approx(statistics.mean(run["mAP"] for run in result["runs"]))
    assert result["mAP_std"] == pytest.approx(statistics.stdev(run["mAP"] for run in result["runs"]))
    photos, labels = data.load_photos("scenes", None, "test", 130)
    classes = result["per_class"]
    assert [(one["name"], one["positives"]) for one in classes] == list(zip(scenes.NAMES, labels.sum(0), strict=True))
    assert statistics.mean(one["ap"] for one in classes) == pytest.approx(result["mAP"])
    given = [result[key] for key in ("method", "dataset", "backbone", "impl", "finished", "photo_count")]
    assert given == [{RP: "rp", SSPA: "sspa"}[script], "scenes", "scenes", "fused", True, len(photos)]
    assert result["command"].startswith(f"python {script} {TINY[script]} --output ")
    assert re.fullmatch("[0-9a-f]{40}[+]?|unknown", result["commit"]) and 0 < result["seconds"] < 100
    assert f"{result['mAP']:.2f} ±{result['mAP_std']:.2f}" in stdout and f"{result['zero_shot_mAP']:.2f}" in stdout
    assert {"policy", "versions", "device", "threads", "peak_memory_mib", "config", "linear_probe_mAP"} <= set(result)
    assert result_of(whole[script])["dataset"] == {RP: "features", SSPA: "scenes"}[script]


@BOTH
def test_log_has_a_line_an_epoch_at_once(trained, start, place, tmp_path, script):
    lines = [json.loads(line) for line in (trained[script].folder / "log.jsonl").read_text().splitlines()]
    expected = [("seed 0", 1), ("seed 0", 2), ("seed 1", 1), ("seed 1", 2)]
    assert [(line["run"], line["epoch"]) for line in lines] == expected
    assert all(line["loss"] > 0 and line["seconds"] >= 0 and line["lr"] >= 0 for line in lines)
    assert lines[0]["lr"] > lines[1]["lr"]
    running = start(script, LONG[script].format(f=place), "--output", tmp_path)
    running.wait_for(lambda: (tmp_path / "log.jsonl").is_file())
    assert not result_of(tmp_path)["runs"]
    running.end()


@BOTH
def test_checkpoint_scores_as_its_training_did(command, trained, tmp_path, script):
    words = (script, "--checkpoint", trained[script].checkpoint, "--output", tmp_path)
    stdout, stderr = command(*words, "--gamma-neg 3")
    result, first = result_of(tmp_path), result_of(trained[script].folder)
    assert result["runs"][0]["ap"] == pytest.approx(first["runs"][0]["ap"], abs=1e-6)
    assert result["zero_shot_mAP"] == first["zero_shot_mAP"] and "was made with its own --gamma-neg" in stderr
    assert command(*words)[0] == stdout == command(*words[:3])[0]


@BOTH
def test_labels_never_trained_on(command, place, tmp_path, script):
    """Left out, labels are not learnt but scored, by the run and by its checkpoint; new words tag photos."""
    words = (script, TINY[script].replace("130", "300"), "--head label-embedding" * (script == RP))
    (tmp_path / "seen.txt").write_text("\n".join(name for name in scenes.NAMES if name not in ("boat", "cup")))
    (tmp_path / "words.txt").write_text("cup\nmug\n")
    command(*words, "--labels", tmp_path / "seen.txt", "--output", tmp_path / "seen")
    stdout, _ = command(*words, "--unseen boat cup --save-all --output", tmp_path / "run")
    checkpoint, result = tmp_path / "run/checkpoint.safetensors", result_of(tmp_path / "run")
    learnt = [load_file(tmp_path / name / "checkpoint.safetensors") for name in ("seen", "run")]
    torch.testing.assert_close(*learnt, atol=1e-5, rtol=1e-4)  # texts of other lengths beside them: other rounding
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == len(result["runs"]) > 1
    new = [label for label in result["per_class"] if not label["trained"]]
    assert [label["name"] for label in new] == ["boat", "cup"] and len(result["per_class"]) == 18
    assert result["linear_probe_mAP"] is None  # which would learn them
    assert f"2 labels never trained on: mAP {statistics.mean(label['ap'] for label in new):.2f}, zero-shot" in stdout
    command(script, "--output", tmp_path / "again", "--checkpoint", checkpoint)
    assert result_of(tmp_path / "again")["runs"][0]["ap"] == pytest.approx(result["runs"][0]["ap"], abs=1e-4)
    more = ("--labels", tmp_path / "words.txt", "--stdout")
    stdout, stderr = command("tag.py", checkpoint, place / "photos", *more)
    assert all(set(json.loads(line)["scores"]) == {"cup", "mug"} for line in stdout.splitlines())
    assert ("never trained on cup, mug" in stderr) == (script == SSPA)


def test_words_alone_are_not_scored(command, place, tmp_path):
    """A list of one's own words is not scored on drawn pictures unasked, though scenes knows them all."""
    stdout, _ = command(RP, "--text-count 60 --epochs 1 --labels", place / "few.txt", "--output", tmp_path)
    assert stdout.startswith("2 labels; scenes;") and "nothing to score" in stdout
    assert result_of(tmp_path)["photo_count"] == 0 and result_of(tmp_path)["mAP"] is None


@pytest.mark.parametrize("words", ["--tune-image none", "--tune-image full"])
def test_two_processes_learn_what_one_learns(start, command, tmp_path, words):
    """As torchrun starts them, each with its rank; only the first speaks and writes. Sums differ by rounding."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = (SSPA, words, "--train-count 40 --test-count 40 --batch-size 9 --epochs 2", "--cache", tmp_path / "cache",
             "--output")
    both = [start(*words, tmp_path / "two", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, **meeting)
            for rank in "01"]
    _, (stdout, stderr) = [running.end() for running in both]
    assert stdout == "" and not [line for line in stderr.splitlines() if not line.startswith("[")]
    command(*words, tmp_path / "one")
    one, two = (result_of(tmp_path / name)["runs"][0] for name in ("one", "two"))
    assert two["ap"] == pytest.approx(one["ap"], abs=0.5) and two["mAP"] == pytest.approx(one["mAP"], abs=0.05)


def test_torchrun(trained, cache, tmp_path):
    """The adapter learns in the first process, so nothing at all differs."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", REPOSITORY / RP]
    words += [*shlex.split(TINY[RP]), "--cpu", "--cache", cache, "--output", tmp_path / "run"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout == trained[RP].stdout, done.stderr
    assert outcome(tmp_path / "run") == outcome(trained[RP].folder)


def test_running_options(start, command, place, tmp_path):
    """Workers and cache change no number; a damaged cache file is made anew; bars on a terminal, unless --quiet."""
    words = (SSPA, "--tune-image none --train-count 40 --test-count 40 --epochs 2", "--overwrite", "--output",
             tmp_path / "run")
    cache = tmp_path / "cache"
    command(*words, "--cache", cache, "--workers 0")
    first, files = outcome(tmp_path / "run"), list(cache.iterdir())
    command(*words, "--workers 3 --cache", tmp_path / "another cache")
    assert outcome(tmp_path / "run") == first
    for file in files:
        file.write_bytes(b"x" + file.read_bytes()[1:1000])
    assert files and command(*words, "--cache", cache)[1].count("made anew") == len(files)
    assert outcome(tmp_path / "run") == first
    words = (RP, "--epochs 1 --features", place / "features.npz")
    if not torch.cuda.is_available():
        assert command(*words)[1] == "" and "no GPU found" in command(*words, cpu=False)[1]
    for quiet in ("", "--quiet"):
        reader, terminal = os.openpty()
        termios.tcsetwinsize(terminal, (24, 80))
        start(*words, quiet, stderr=os.ttyname(terminal)).process.join()
        os.write(terminal, b"end")
        assert (b"training" in os.read(reader, 10_000)) == (quiet == "")
