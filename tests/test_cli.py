"""The command lines of both methods as people type them: what they refuse, leave behind, survive and give back.

Importing torch and open_clip takes seconds, a tiny run less than one. So a command is a process forked from one that has
imported them (multiprocessing's forkserver), in which the script then runs as python would run it. Where the start itself
is tested, python is called.
"""
import gzip
import io
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
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

import adapter_rp  # noqa: F401 (with sspa: what the forkserver shall have imported)
import embed
import scenes
import sspa  # noqa: F401
from conftest import REPOSITORY

embed.import_open_clip()
RP, SSPA = "adapter_rp.py", "sspa.py"
OURS = [path.stem for path in REPOSITORY.glob("*.py")]
BOTH = pytest.mark.parametrize("script", [RP, SSPA])


# --- a command --------------------------------------------------------------------------------------------------------

def as_script(script, words, folder, stdout, stderr, environment, largest_file):
    """python script words, in a process that has imported torch but nothing of ours. stdout: None is a pipe that nobody
    reads; largest_file: in bytes, a full disk"""
    def no_network(*_):
        raise OSError("tests use no network")
    for number, path in ((1, stdout), (2, stderr)):
        reader, writer = os.pipe() if path is None else (None, os.open(path, os.O_WRONLY | os.O_CREAT))
        os.dup2(writer, number)
        if path is None:
            os.close(reader)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    multiprocessing.set_start_method("fork", force=True)  # of DataLoader's processes, as in a process of its own
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background hands down "ignore"
    socket.getaddrinfo = no_network
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
        self.process.join(120)
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
    """start("sspa.py", "--epochs 2 --output", path) -> Running. Words that begin with -- are split as a shell would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)]))
        multiprocessing.forkserver.set_forkserver_preload([__name__])
        multiprocessing.forkserver.ensure_running()

    def begin(script, *words, folder=None, stdout="stdout", stderr="stderr", largest_file=None, cpu=True, **environment):
        place = tmp_path_factory.mktemp("command")
        words = [part for word in map(str, words) for part in (shlex.split(word) if word[:2] == "--" else [word])]
        words += ["--cache", cache] * ("--cache" not in words) + ["--cpu"] * (cpu and "--gpu" not in words)
        stdout, stderr = stdout and place / stdout, place / stderr  # an absolute path stays what it is
        process = multiprocessing.get_context("forkserver").Process(target=as_script, args=(
            script, words, folder or place, stdout, stderr, environment, largest_file))
        process.start()
        return Running(script, process, stdout, stderr)
    return begin


@pytest.fixture(scope="module")
def command(start):
    """The same, waited for -> (stdout, stderr)"""
    return lambda *words, expect=0, **more: start(*words, **more).end(expect)


def result_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def names_in(folder):
    return {path.name for path in folder.iterdir()} - {".lock"}


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# --- what the commands work on ----------------------------------------------------------------------------------------

TINY = {RP: "--text-count 300 --limit 130 --epochs 2 --seed 0 1 --noise-std 0.15 0",
        SSPA: "--tune-image none --limit 130 --epochs 2 --seed 0 1"}


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
    """{script: (folder of a finished run of two seeds, what it printed)}"""
    folders = {script: tmp_path_factory.mktemp("trained") for script in TINY}
    return {script: (folder, command(script, TINY[script], "--output", folder)[0]) for script, folder in folders.items()}


@pytest.fixture(scope="module")
def checkpoints(trained):
    return {script: folder / "checkpoint.safetensors" for script, (folder, _) in trained.items()}


# --- help -------------------------------------------------------------------------------------------------------------

OPTIONS = """dataset data-root policy labels limit backbone pretrained resolution precision gpu cpu seed epochs batch-size
    lr impl workers cache output overwrite checkpoint predict threshold top-k quiet gamma-neg clip"""
OWN_OPTIONS = {RP: "features texts text-count noise-law noise-std normalize adapter head loss",
               SSPA: """descriptions tune-image context-length attention-scale no-dsf fusion quaternion-layers alignment
               no-gate aggregator temperature branches regional-weight prompt-lr image-lr-factor ema ablate explain"""}


@BOTH
def test_help(script, tmp_path):
    """Every option with its words, the method's first; from anywhere, without open_clip, whose import takes seconds."""
    words = [sys.executable, "-X", "importtime", REPOSITORY / script, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0 and "torch" in done.stderr and "open_clip" not in done.stderr and not any(tmp_path.iterdir())
    explained = dict(re.findall(r"^  --([\w-]+)(?: [^\n]*?\S)??(?:  +|\n +)([^\s-][^\n]*)", done.stdout, re.M))
    assert set(explained) == set(OPTIONS.split() + OWN_OPTIONS[script].split())
    assert all(re.search("[a-z]{2}|choice", words) for words in explained.values()), explained
    groups = [done.stdout.index(f"\n{name}:\n") for name in ("method", "data", "CLIP", "running")]
    assert groups == sorted(groups)


# --- refused command lines --------------------------------------------------------------------------------------------

REFUSED = {  # why somebody types it, words, what the answer must hold
    RP: [("a script divided by zero", "--lr nan", "--lr nan: must be"), ("to train nothing", "--lr 0", "--lr 0.0: must be"),
         ("a comma", "--lr 0,001", "--lr: invalid float value: '0,001'"), ("a forgotten value", "--lr", "--lr: expected"),
         ("the most there is", "--noise-std inf", "--noise-std inf: must be"),
         ("a slip", "--noise-std -0.1", "--noise-std -0.1: must be at least 0"),
         ("written in two ways", "--noise-std 0.1 1e-1", "--noise-std 0.1 0.1: a value stands twice"),
         ("the same again", "--seed 1 1", "--seed 1 1: a value stands twice"), ("any", "--seed -1", "--seed -1: must be"),
         ("percent", "--threshold 50", "--threshold 50.0: must be at least 0 and at most 1"),
         ("all labels", "--top-k 0", "--top-k 0: must be"), ("all of them", "--limit 0", "--limit 0: must be at least 1"),
         ("no training", "--epochs 0", "--epochs 0"), ("all processors", "--workers -1", "--workers -1: must be"),
         ("the backbone's own", "--resolution 0", "--resolution 0"), ("any size", "--resolution 65", "multiple of 8"),
         ("all of a probability", "--clip 1", "--clip 1.0: must be at least 0 and below 1"),
         ("another set's", "--policy difficult=ignore", "--policy difficult=ignore: scenes takes none"),
         ("no such value", "--dataset voc2007 --backbone scenes --policy difficult=no", "takes difficult=ignore, difficult="),
         ("not ours", "--dataset imagenet", "--dataset: invalid choice: 'imagenet' (choose from 'scenes', 'voc2007'"),
         ("shortened", "--data voc2007", "unrecognized arguments: --data"), ("no dashes", "epochs 3", "arguments: epochs 3"),
         ("a machine without", "--gpu 99", "GPU 99: this machine has"), ("at odds", "--gpu 0 --cpu", "leave one out"),
         ("of old", "--precision fp16", "'fp32', 'bf16'"), ("digits swapped", "--backbone ViT-B-61", "ViT-B-16"),
         ("no CLIP", "--backbone ViT-B-16-SigLIP", "--backbone ViT-B-16-SigLIP: "),
         ("no such weights", "--backbone ViT-S-32-alt --pretrained openai", "--pretrained openai: "),
         ("not fetched", "--dataset voc2007 --backbone scenes --data-root {f}", "VOCtrainval_06-Nov-2007.tar"),
         ("unlabelled", "--dataset folder --backbone scenes --data-root {f}", "labels.csv"),
         ("all at once", "--predict {f}/photos", "train one, then add --checkpoint"),
         ("no encoder", "--features {f}/features.npz --checkpoint {rp} --predict x", "leave --texts and --predict out"),
         ("two sources", "--features {f}/features.npz --texts {f}/few.txt", "leave --texts and --predict out"),
         ("labels it lacks", "--features {f}/features.npz --labels {f}/few.txt", "--labels names 'sun', which"),
         ("renamed", "--difficult ignore", "--difficult is now --policy difficult=VALUE"),
         ("merged", "--captions x", "--captions is now --texts FILE"), ("a constant", "--hidden=3", "--hidden is now fixed in"),
         ("implied", "--eval-only", "--eval-only is no longer needed: --checkpoint"),
         ("dropped", "--zero-shot-weight 1", "--zero-shot-weight is gone"),
         ("no photos", "--checkpoint {rp} --predict {f}/photos/empty", "no photo in this folder; photos end in .jpg"),
         ("misspelt", "--checkpoint {rp} --predict {f}/nowhere", "{f}/nowhere: no such file or folder"),
         ("fewer labels", "--checkpoint {rp} --labels {f}/few.txt", "18 labels, not 2); pass the --dataset and --labels"),
         ("reordered", "--checkpoint {rp} --labels {f}/reversed.txt --predict {f}", "'sun' there and 'ball' here"),
         ("another encoder", "--checkpoint {rp} --resolution 128", "the same --backbone, --pretrained and --resolution"),
         ("no folder", "--output {f}/few.txt", "--output {f}/few.txt"), ("below a file", "--output {f}/few.txt/x", "another"),
         ("a folder nobody can make", "--output /proc/x", "--output /proc/x")],
    SSPA: [("no softness", "--temperature 0", "--temperature 0.0: must be above 0"), ("for ever", "--ema 1", "--ema 1.0: must"),
           ("not a number", "--gamma-neg nan", "--gamma-neg nan: must"), ("none", "--context-length 0", "must be at least 1"),
           ("no room for labels", "--context-length 38", "--context-length 38: this CLIP reads 40 tokens"),
           ("misspelt", "--ablate 'no DFS'", "choose from 'knowledge prompts only'"),
           ("twice", "--ablate 'no gate' 'no gate'", "--ablate no gate no gate: a value stands twice"),
           ("one on another", "--ablate 'no gate' --fusion sum", "leave --fusion out"),
           ("all at once", "--explain {f}/photos", "--explain looks into a trained model (--checkpoint FILE)"),
           ("of a trained one", "--checkpoint {sspa} --ablate", "--ablate trains new ones"),
           ("the other method's", "--features {f}/features.npz", "arguments: --features"),
           ("renamed", "--no-descriptions", "--no-descriptions is now --descriptions none"),
           ("a constant", "--prior 0.2", "--prior is now fixed in"), ("dropped", "--accumulate 2", "is gone: lower --batch-size"),
           ("a label without photos", "--labels {f}/foreign.txt", "'zebra' is no label of scenes"),
           ("fewer labels", "--checkpoint {sspa} --labels {f}/few.txt", "18 labels, not 2); pass the --dataset and --labels"),
           ("another set", "--checkpoint {sspa} --dataset voc2007", "'sun' there and 'aeroplane' here"),
           ("another encoder", "--checkpoint {sspa} --resolution 128 --predict {f}/photos", "pass the same --backbone"),
           ("no photos", "--checkpoint {sspa} --explain {f}/photos/empty", "no photo in this folder; photos end in"),
           ("below a file", "--output {f}/few.txt/x", "--output {f}/few.txt/x")]}


@pytest.mark.parametrize("script, reason, words, answer", [(script, *case) for script in REFUSED for case in REFUSED[script]])
def test_refused(command, place, trained, checkpoints, tmp_path, script, reason, words, answer):
    files, before = {"f": place, "rp": checkpoints[RP], "sspa": checkpoints[SSPA]}, content_of(place)
    stdout, stderr = command(script, words.format(**files) if words[:2] == "--" else words, expect=2, folder=tmp_path)
    assert stderr.count("\n") == 1 and answer.format(**files) in stderr and stdout == ""
    assert not content_of(tmp_path) and content_of(place) == before
    assert all(names_in(folder) == {"metrics.json", "log.jsonl", "checkpoint.safetensors"} for folder, _ in trained.values())


# --- killed, resumed, two at once -------------------------------------------------------------------------------------

LONG = {RP: "--features {f}/features.npz --epochs 300 --seed 0 1 --noise-std 0.15 0",
        SSPA: "--tune-image none --limit 130 --epochs 8 --seed 0 1"}


def in_training(folder, scored):
    """Whether a run is between two epochs, after so many scored runs."""
    record, resume = folder / "metrics.json", folder / "resume.pt"
    try:
        return record.stat().st_mtime_ns < resume.stat().st_mtime_ns and scored == sum("mAP" in run for run in result_of(folder)["runs"])
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def whole(start, command, place, tmp_path_factory):
    """{script: (folder of an undisturbed run, what two others said who wanted that folder while it ran)}"""
    found = {}
    for script, words in LONG.items():
        folder, words = tmp_path_factory.mktemp("whole"), words.format(f=place)
        running = start(script, words, "--output", folder, RESUME_SECONDS="0")
        running.wait_for(lambda folder=folder: in_training(folder, 0))
        others = [command(script, words, more, "--output", folder, expect=2)[1] for more in ("--quiet", "--lr 1 --overwrite")]
        assert running.process.is_alive() and not result_of(folder)["finished"]
        running.end()
        found[script] = folder, others
    return found


@pytest.fixture(scope="module")
def killed(start, place, tmp_path_factory):
    """{script: folder of a run killed in training}; SSPA, whose seeds follow one another, in the first and in the second."""
    folders = {script: tmp_path_factory.mktemp("killed") for script in LONG}
    for script, scored in ((RP, 0), (SSPA, 0), (SSPA, 1)):
        running = start(script, LONG[script].format(f=place), "--output", folders[script], RESUME_SECONDS="0")
        running.wait_for(lambda script=script, scored=scored: in_training(folders[script], scored))
        running.process.kill()
        running.process.join()
        assert running.process.exitcode == -signal.SIGKILL and in_training(folders[script], scored)
    return folders


def outcome(folder):
    """What must not differ between two runs of the same settings"""
    result, log = result_of(folder), [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for entry in (*result["runs"], *log):
        entry.pop("seconds", None)
    tensors = load_file(folder / "checkpoint.safetensors")
    return result["runs"], result["per_class"], log, {name: tensor.tolist() for name, tensor in tensors.items()}


@BOTH
def test_killed_and_resumed(command, place, whole, killed, tmp_path, script):
    """SIGKILL in training, then the same command: the run that nobody disturbed, bit for bit."""
    folder = shutil.copytree(killed[script], tmp_path / "resumed")
    before = result_of(folder)
    scored = [run["mAP"] for run in before["runs"] if "mAP" in run]
    assert before["finished"] is False and before["mAP"] == (scored[0] if scored else None)
    _, stderr = command(script, LONG[script].format(f=place), "--output", folder)
    assert re.search("going on after epoch [1-9]", stderr) and "seed 0: mAP" not in stderr
    assert outcome(folder) == outcome(whole[script][0]) and result_of(folder)["finished"]
    assert names_in(folder) == {"metrics.json", "log.jsonl", "checkpoint.safetensors"}


@BOTH
def test_two_at_once(whole, script):
    folder, others = whole[script]
    line = f"{script}: --output {folder}: another run is writing it; wait for it, or choose another folder\n"
    assert others == [line, line] and result_of(folder)["finished"]


@BOTH
def test_what_another_run_left_is_not_gone_on_with(command, place, whole, killed, tmp_path, script):
    """metrics.json deleted, as its own message advises, and then other settings: a run like any other."""
    folder = shutil.copytree(killed[script], tmp_path / "left")
    (folder / "metrics.json").unlink()
    for output in (folder, tmp_path / "fresh"):
        command(script, LONG[script].format(f=place), "--epochs 3 --seed 1 --lr 0.002 --output", output)
    assert outcome(folder) == outcome(tmp_path / "fresh")


# --- bad files --------------------------------------------------------------------------------------------------------

class Bomb:
    """What a pickle may do to whoever loads it"""

    def __reduce__(self):
        return Path.touch, (Path(os.environ["BOMB"]),)


def altered(value, change):
    """The same nested value with change(tensor) in place of every tensor"""
    if isinstance(value, dict):
        return {name: altered(part, change) for name, part in value.items()}
    return change(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def pickled(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def simple_damages(content):
    return {"empty": b"", "torn": content[:2 * len(content) // 3], "text": b"hello", "list": b"[1]", "bytes": b"\xff\xfe\0"}


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    """A pickle that makes a file when it is loaded; none may be there at the end"""
    monkeypatch.setenv("BOMB", str(tmp_path / "went off"))
    yield Bomb()
    assert not (tmp_path / "went off").exists()


@BOTH
@pytest.mark.parametrize("name, remedy", [("metrics.json", "--overwrite"), ("resume.pt", "--quiet")])
def test_damaged_file_of_a_run(command, place, whole, killed, tmp_path, bomb, script, name, remedy):
    folder, words = shutil.copytree(killed[script], tmp_path / "run"), LONG[script].format(f=place)
    damages = simple_damages((folder / name).read_bytes())
    if name == "metrics.json":
        odd = {"runs": {"runs": [1]}, "scores": {"runs": [{}], "finished": True}}
        damages |= {key: json.dumps({**result_of(folder), **values}).encode() for key, values in odd.items()}
    else:
        state = torch.load(folder / name, weights_only=True)
        damages |= {"pickle": pickled({**state, "log": bomb}), "nan": pickled(altered(state, lambda tensor: tensor * np.nan)),
                    "shapes": pickled(altered(state, lambda tensor: tensor[None]))}
    for damage, content in damages.items():
        (folder / name).write_bytes(content)
        before = content_of(folder)
        _, stderr = command(script, words, "--output", folder, expect=2)
        assert stderr.count("\n") == 1 and f" {folder / name}: " in stderr and "; delete it" in stderr, damage
        assert "weights_only" not in stderr and content_of(folder) == before, damage
    if name == "resume.pt":
        (folder / name).unlink()
    command(script, words, remedy, "--output", folder)
    assert outcome(folder) == outcome(whole[script][0])


def archive(arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


TEXTS = "".join(json.dumps({"text": f"a {name} here", "labels": [name]}) + "\n" for name in scenes.NAMES).encode()
INPUTS = {  # option and file: script, its good content, the remedy that is named
    "--labels names.txt": (RP, b"sun\nmoon\n", "(UTF-8|write)"),
    "--texts texts.jsonl": (RP, TEXTS, 'each line must be {"text": ..., "labels": [label names]}'),
    "--texts texts.jsonl.gz": (RP, gzip.compress(TEXTS), 'each line must be {"text": ..., "labels": [label names]}'),
    "--texts captions.json": (RP, json.dumps({"annotations": [{"caption": "a sun"}]}).encode(), "COCO"),
    "--descriptions table.json": (SSPA, json.dumps({"descriptions": {"sun": "A sun is round."}}).encode(), "{"),
    "--features features.npz": (RP, None, "it must be an .npz without pickles of text_embeddings"),
    "--pretrained clip.safetensors": (RP, scenes.CHECKPOINT.read_bytes(), "scenes_clip.py"),
    "--checkpoint rp.safetensors": (RP, None, "pass a checkpoint.safetensors that this script wrote"),
    "--checkpoint sspa.safetensors": (SSPA, None, "pass a checkpoint.safetensors that this script wrote")}


@pytest.mark.parametrize("words", INPUTS)
def test_damaged_input(command, place, checkpoints, tmp_path, bomb, words):
    (option, name), (script, good, remedy) = words.split(), INPUTS[words]
    file, damages = tmp_path / name, {}
    if option == "--features":
        arrays = dict(np.load(place / "features.npz"))
        good = archive(arrays)
        damages = {key: archive({**arrays, "text_embeddings": value}) for key, value in (
            ("pickle", np.array([bomb])), ("nan", arrays["text_embeddings"] * np.nan), ("shapes", arrays["text_labels"]))}
        damages["no labels"] = archive({key: value for key, value in arrays.items() if key != "text_labels"})
    elif option in ("--checkpoint", "--pretrained"):
        good = good or checkpoints[script].read_bytes()
        file.write_bytes(good)
        tensors, metadata = load_file(file), {"method": json.dumps(name.split(".")[0]), "names": "[", "settings": "[1]"}
        damages = {"nan": save(altered(tensors, lambda tensor: tensor * np.nan)), "pickle": pickled(bomb),
                   "the other's": checkpoints[SSPA if script == RP else RP].read_bytes(), "page": b"<html>no such page</html>"}
        if option == "--checkpoint":
            damages |= {"bare": save(tensors), "odd": save(tensors, metadata)}
            with safe_open(file, "pt") as stored:
                damages["shapes"] = save(altered(tensors, lambda tensor: tensor[None]), stored.metadata())
    elif name.startswith("texts"):
        damages = {"number": b'{"text": 3, "labels": []}', "foreign": b'{"text": "a zebra", "labels": ["zebra"]}'}
    simple = simple_damages(good)
    damages |= {key: simple[key] for key in (("empty", "bytes") if option == "--labels" else simple)}
    run = [script, TINY[script], "--limit 20 --epochs 1", option, file]
    for damage, content in damages.items():
        file.write_bytes(content)
        _, stderr = command(*run, expect=2, folder=tmp_path)
        assert stderr.count("\n") == 1 and str(file) in stderr and remedy in stderr, damage
        assert {path.name for path in content_of(tmp_path)} == {name}, damage
    file.write_bytes(good)
    command(*run, "--output", tmp_path / "out")


# --- one rule for output folders --------------------------------------------------------------------------------------

@BOTH
def test_folder_belongs_to_its_settings(command, trained, tmp_path, script):
    """The same again prints the result (running options aside); others are named and refused; --overwrite begins anew."""
    folder, words = shutil.copytree(trained[script][0], tmp_path / "run"), (script, TINY[script])
    before = content_of(folder)
    again = command(*words, "--threshold 0.3 --top-k 2 --workers 0 --quiet --output", folder)
    assert again == (trained[script][1], f"{folder} is finished; --overwrite does it again\n")
    _, stderr = command(*words, "--epochs 3 --clip 0.05 --output", folder, expect=2)
    assert stderr.count("\n") == 1 and "(epochs 2, not 3; clip 0.0, not 0.05)" in stderr and "--overwrite" in stderr
    command(*words, "--overwrite --labels", tmp_path / "none.txt", "--output", folder, expect=2)  # a slip loses nothing
    assert content_of(folder) == before
    command(*words, "--epochs 3 --overwrite --output", folder)
    assert result_of(folder)["config"]["epochs"] == 3 and names_in(folder) == {path.name for path in before}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("script, option", [(RP, "texts"), (RP, "labels"), (SSPA, "descriptions")])
def test_changed_file_is_another_setting(command, tmp_path, script, option):
    file, words = tmp_path / "file.jsonl", (script, TINY[script], "--limit 20 --epochs 1 --output", tmp_path / "run")
    contents = {"texts": (TEXTS, TEXTS + TEXTS), "labels": (b"sun\nmoon", b"moon\nsun"),
                "descriptions": (b'{"sun": "The sun is round."}', b'{"sun": "The sun is hot."}')}[option]
    for expect, content in zip((0, 2), contents, strict=True):
        file.write_bytes(content)
        _, stderr = command(*words, f"--{option}", file, expect=expect)
    assert f"(content of {option} " in stderr


# --- ends -------------------------------------------------------------------------------------------------------------

@BOTH
def test_divergence(command, tmp_path, script):
    _, stderr = command(script, TINY[script], "--lr 1e30 --output", tmp_path, expect=3)
    assert "training diverged in epoch" in stderr and "lower --lr" in stderr and not result_of(tmp_path)["finished"]


@BOTH
@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_cpu"])
def test_ctrl_c_while_importing(script, library):
    for _ in range(5):  # an import may swallow the signal
        process = subprocess.Popen([sys.executable, REPOSITORY / script, "--help"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        while process.poll() is None and library not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
        if process.returncode:
            break
    assert (process.returncode, stderr) == (130, "interrupted\n")


@BOTH
def test_ctrl_c_in_training(start, place, tmp_path, script):
    running = start(script, LONG[script].format(f=place), "--output", tmp_path, RESUME_SECONDS="0")
    running.wait_for(lambda: in_training(tmp_path, 0))
    os.kill(running.process.pid, signal.SIGINT)
    _, stderr = running.end(130)
    assert stderr == f"{script}: interrupted; the same command goes on from the last saved epoch\n"


@BOTH
def test_nowhere_to_write(command, trained, checkpoints, place, tmp_path, script):
    """A full standard output, one that head has closed, a full disk."""
    again, tags = (TINY[script], "--output", trained[script][0]), ("--checkpoint", checkpoints[script], "--predict", place / "photos")
    for words in (again, (*tags, "--output", tmp_path / "tags")):
        _, stderr = command(script, *words, stdout="/dev/full", expect=2)
        assert "standard output: No space left on device; free space" in stderr
        assert "Broken" not in command(script, *words, stdout=None)[1]
    _, stderr = command(script, TINY[script], "--output", tmp_path / "run", largest_file=20_000, expect=2)
    assert "cannot write" in stderr and str(tmp_path / "run") in stderr and not list((tmp_path / "run").glob(".*partial"))
    command(script, TINY[script], "--output", tmp_path / "run")


# --- what is left -----------------------------------------------------------------------------------------------------

@BOTH
def test_record(trained, script):
    folder, stdout = trained[script]
    result, truth = result_of(folder), np.array([scenes.labels_of("test", row) for row in range(130)])
    runs = [run for run in result["runs"] if run.get("noise_std", 0.15) == 0.15]
    assert (result["method"], result["dataset"], result["impl"], result["finished"]) == (script[:-3].removeprefix("adapter_"), "scenes", "fused", True)
    assert [(run["seed"], run.get("noise_std"), run.get("ablation")) for run in result["runs"]] == {
        RP: [(0, 0.15, None), (0, 0, None), (1, 0.15, None), (1, 0, None)], SSPA: [(0, None, "none"), (1, None, "none")]}[script]
    assert result["mAP"] == pytest.approx(statistics.mean(run["mAP"] for run in runs))
    assert result["mAP_std"] == pytest.approx(statistics.stdev(run["mAP"] for run in runs))
    assert [entry["name"] for entry in result["per_class"]] == scenes.NAMES
    assert [entry["positives"] for entry in result["per_class"]] == truth.sum(0).tolist()
    assert statistics.mean(entry["ap"] for entry in result["per_class"]) == pytest.approx(result["mAP"])
    assert shlex.split(result["command"])[:2] == ["python", script] and "--seed 0 1" in result["command"]
    assert re.fullmatch("[0-9a-f]{40}[+]?|unknown", result["commit"]) and result["backbone"] == "scenes"
    assert {"seconds", "zero_shot_mAP", "policy", "versions", "device", "peak_memory_mib", "config"} <= set(result)
    assert f"{result['mAP']:.2f} ±{result['mAP_std']:.2f}" in stdout and f"{result['zero_shot_mAP']:.2f}" in stdout
    assert len((folder / "log.jsonl").read_text().splitlines()) == {RP: 2, SSPA: 4}[script]


@BOTH
def test_checkpoint_scores_as_its_training_did(command, trained, checkpoints, tmp_path, script):
    words, first = (script, "--limit 130 --checkpoint", checkpoints[script], "--output", tmp_path), result_of(trained[script][0])
    stdout, stderr = command(*words, "--gamma-neg 3")
    result = result_of(tmp_path)
    for key in ("mAP", "ap", "top_3"):
        assert result["runs"][0][key] == pytest.approx(first["runs"][0][key], abs=1e-6)
    assert result["zero_shot_mAP"] == first["zero_shot_mAP"] and "was made with its own --gamma-neg" in stderr
    assert command(*words)[0] == stdout


@BOTH
def test_tags(command, checkpoints, place, tmp_path, script):
    """A JSON line a photo, whatever bytes its name has; what cannot be read is named; a picture of all."""
    words = (script, "--checkpoint", checkpoints[script], "--output", tmp_path, "--predict", place / "photos")
    stdout, stderr = command(*words, "--top-k 2")
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert [line["photo"] for line in lines] == sorted(map(str, (place / "photos").glob("[!t]*.*g")))
    assert stderr.count("torn.jpg") == 1 and Image.open(tmp_path / "predictions.png").size > (300, 200)
    for line in lines:
        scores = list(line["scores"].values())
        assert set(line) == {"photo", "labels", "scores"} and set(line["scores"]) == set(scenes.NAMES)
        assert scores == sorted(scores, reverse=True) and 0 <= scores[-1] < scores[0] <= 1
        assert line["labels"] == list(line["scores"])[:2]
    middle = statistics.mean(list(lines[0]["scores"].values())[4:6])
    above = [json.loads(line) for line in command(*words, "--threshold", middle)[0].splitlines()]
    assert len(above[0]["labels"]) == 5 and [line["scores"] for line in above] == [line["scores"] for line in lines]
    assert all(line["labels"] == [name for name in line["scores"] if line["scores"][name] >= middle] for line in above)


def test_explained(command, checkpoints, place, tmp_path):
    stdout, stderr = command(SSPA, "--checkpoint", checkpoints[SSPA], "--explain", place / "photos", "--output", tmp_path)
    sheets = sorted((tmp_path / "explain").iterdir())
    assert stdout.splitlines() == list(map(str, sheets)) and len(sheets) == 3 and stderr.count("torn.jpg") == 1
    assert all(len(np.unique(np.asarray(Image.open(sheet)))) > 50 for sheet in sheets)


def test_labels_never_trained_on(command, tmp_path):
    """The label-embedding head, trained on twelve labels, ranks the other six far above chance, and tags with them."""
    for name, words in (("seen", scenes.NAMES[:12]), ("unseen", scenes.NAMES[12:])):
        (tmp_path / name).write_text("\n".join(words))
    command(RP, "--head label-embedding --text-count 2000 --limit 2000 --output", tmp_path, "--labels", tmp_path / "seen")
    command(RP, "--checkpoint", tmp_path / "checkpoint.safetensors", "--limit 500 --output", tmp_path / "other", "--labels", tmp_path / "unseen")
    result = result_of(tmp_path / "other")
    chance = 100 * statistics.mean(entry["positives"] for entry in result["per_class"]) / 500
    assert [entry["name"] for entry in result["per_class"]] == scenes.NAMES[12:] and result["mAP"] > 2 * chance


# --- other ways to the same -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, words", [(RP, ""), (SSPA, ""), (SSPA, "--tune-image full --seed 0")])
def test_two_processes_do_what_one_does(start, command, tmp_path, script, words):
    """What torchrun starts: each with its rank; only the first speaks and writes. Sums in another order, so rounding."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = (script, TINY[script], words, "--cache", tmp_path / "cache", "--output")
    both = [start(*words, tmp_path / "two", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank,
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in "01"]
    (stdout, stderr), second = [running.end() for running in both]
    one, _ = command(*words, tmp_path / "one")
    assert second == ("", "")
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")


def test_torchrun(trained, cache, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", REPOSITORY / RP]
    words += [*shlex.split(TINY[RP]), "--cpu", "--cache", cache, "--output", tmp_path / "run"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout == trained[RP][1], done.stderr
    assert outcome(tmp_path / "run") == outcome(trained[RP][0])


def test_running_options(start, command, place, trained, tmp_path):
    """Workers and cache change no number; files appear in the cache, a damaged one is made anew; a bar on a terminal."""
    for workers in (0, 3):
        command(SSPA, TINY[SSPA], f"--workers {workers} --cache {tmp_path / str(workers)} --output", tmp_path / f"run{workers}")
        assert outcome(tmp_path / f"run{workers}") == outcome(trained[SSPA][0]) and any((tmp_path / str(workers)).iterdir())
    for file in (tmp_path / "0").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    _, stderr = command(SSPA, TINY[SSPA], "--overwrite --cache", tmp_path / "0", "--output", tmp_path / "run0")
    assert "made anew" in stderr and outcome(tmp_path / "run0") == outcome(trained[SSPA][0])
    if not torch.cuda.is_available():
        assert "no GPU found" in command(RP, "--epochs 1 --features", place / "features.npz", cpu=False)[1]
    for words, bar in (("--quiet", False), ("", True)):
        reader, terminal = os.openpty()
        start(RP, "--epochs 1 --features", place / "features.npz", words, stderr=os.ttyname(terminal)).process.join()
        os.write(terminal, b"end")
        assert (b"training" in os.read(reader, 10_000)) == bar


def test_random_weights_need_no_network(command, tmp_path):
    command(RP, TINY[RP], "--backbone ViT-S-32-alt --pretrained none --limit 5 --text-count 20 --output", tmp_path)
    assert result_of(tmp_path)["backbone"] == "ViT-S-32-alt (none)"
