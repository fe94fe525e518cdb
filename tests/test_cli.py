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
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

import embed
import run
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


TINY = {RP: "--text-count 300 --limit 130 --epochs 2 --seed 0 1 --noise-std 0.15 0",
        SSPA: "--tune-image none --limit 130 --epochs 2 --seed 0 1"}
LONG = {RP: "--features {f}/features.npz --epochs 150 --seed 0 1 --noise-std 0.15 0",
        SSPA: "--tune-image none --limit 130 --epochs 6 --seed 0 1"}


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

OPTIONS = """dataset data-root policy labels unseen limit no-probe backbone pretrained resolution precision gpu cpu
    seed epochs batch-size lr impl workers cache output overwrite save-all checkpoint predict tags html score-floor
    threshold top-k quiet gamma-neg clip focal-gradient"""
OWN_OPTIONS = {RP: "features texts text-count noise-law noise-std normalize adapter head loss",
               SSPA: """descriptions photo-count tune-image context-length attention-scale no-dsf fusion
               quaternion-layers alignment no-gate aggregator temperature
               branches regional-weight prompt-lr image-lr-factor ema ablate explain"""}


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


REFUSED = {  # why somebody types it, words, what the answer must hold
    RP: [("a script divided by zero", "--lr nan", "--lr nan: must be"), ("a comma", "--lr 0,1", "--lr: invalid float"),
         ("the most there is", "--noise-std inf", "--noise-std inf: must be"), ("no value", "--lr", "--lr: expected"),
         ("written in two ways", "--noise-std 0.1 1e-1", "--noise-std 0.1 0.1: a value stands twice"),
         ("any", "--seed -1", "--seed -1: must be at least 0"), ("percent", "--threshold 50", "--threshold 50.0: must"),
         ("its own", "--resolution 0", "--resolution 0: must"), ("any size", "--resolution 65", "multiple of 8"),
         ("all labels", "--top-k 0", "--top-k 0: must"), ("every core", "--workers -1", "--workers -1: "),
         ("another set's", "--policy difficult=ignore", "--policy difficult=ignore: scenes takes none"),
         ("no such value", "--dataset voc2007 --backbone scenes --policy difficult=no", "takes difficult=ignore"),
         ("not ours", "--dataset imagenet", "choose from 'scenes', 'voc2007'"), ("shortened", "--data x", "s: --data"),
         ("a machine without", "--gpu 99", "GPU 99: this machine has"), ("at odds", "--gpu 0 --cpu", "leave one out"),
         ("of old", "--precision fp16", "'fp32', 'bf16'"), ("digits swapped", "--backbone ViT-B-61", "ViT-B-16"),
         ("no such weights", "--backbone ViT-S-32-alt --pretrained openai", "--pretrained openai: "),
         ("not fetched", "--dataset voc2007 --backbone scenes --data-root {f}", "VOCtrainval_06-Nov-2007.tar"),
         ("which", "--labels {f}/few.txt --pretrained laion", "--pretrained laion: of which CLIP? add --backbone NAME"),
         ("all at once", "--predict {f}/photos", "train one, then add --checkpoint"),
         ("no encoder", "--features {f}/features.npz --checkpoint {rp} --predict x", "leave --texts and --predict out"),
         ("labels it lacks", "--features {f}/features.npz --labels {f}/few.txt", "--labels names 'sun', which"),
         ("renamed", "--difficult ignore", "now --policy difficult=VALUE"),
         ("implied", "--eval-only", "--checkpoint alone scores"),
         ("no photos", "--checkpoint {rp} --predict {f}/photos/empty", "no photo in this folder; photos end in .jpg"),
         ("misspelt", "--checkpoint {rp} --predict {f}/nowhere", "{f}/nowhere: no such file or folder"),
         ("reordered", "--checkpoint {rp} --labels {f}/reversed.txt --predict {f}", "label 1 is 'sun' there"),
         ("another encoder", "--checkpoint {rp} --resolution 128", "same --backbone, --pretrained and --resolution"),
         ("no folder", "--output {f}/few.txt", "--output {f}/few.txt"), ("forbidden", "--output /proc/x", "/proc/x")],
    SSPA: [("no softness", "--temperature 0", "must be above 0"), ("a file", "--output {f}/few.txt/x", "{f}/few.txt"),
           ("for ever", "--ema 1", "and below 1"), ("misspelt", "--ablate 'no DFS'", "'knowledge prompts only'"),
           ("no room for labels", "--context-length 38", "--context-length 38: this CLIP reads 40 tokens"),
           ("all at once", "--explain {f}/photos", "--explain looks into a trained model (--checkpoint FILE)"),
           ("of a trained one", "--checkpoint {sspa} --ablate", "--ablate trains new ones"),
           ("renamed", "--no-descriptions", "now --descriptions none"), ("the other's", "--texts x", "s: --texts x"),
           ("a label without photos", "--labels {f}/foreign.txt", "'zebra' is no label of scenes"),
           ("another set", "--checkpoint {sspa} --dataset voc2007", "VOCtest_06-Nov-2007.tar"),
           ("not of the set", "--checkpoint {sspa} --labels {f}/foreign.txt", "'zebra' is no label of scenes"),
           ("no photos", "--checkpoint {sspa} --explain {f}/photos/empty", "no photo in this folder; photos end in")]}


@pytest.mark.parametrize("script, reason, words, answer", [(name, *case) for name in REFUSED for case in REFUSED[name]])
def test_refused(command, place, trained, tmp_path, script, reason, words, answer):
    files = {"f": place, "rp": trained[RP].checkpoint, "sspa": trained[SSPA].checkpoint}
    places = (place, tmp_path, trained[script].folder)
    before = [content_of(folder) for folder in places]
    stdout, stderr = command(script, words.format(**files), expect=2, folder=tmp_path)
    assert stderr.count("\n") == 1 and answer.format(**files) in stderr and stdout == ""
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
            _, stderr = command(script, LONG[script].format(f=place), more, "--output", folder, expect=2)
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
    words = (SSPA, "--limit 64 --batch-size 8 --epochs 2 --output", tmp_path)
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
    "--pretrained clip.safetensors": (RP, scenes.CHECKPOINT.read_bytes(), "take assets/scenes_clip.safetensors of"),
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
    check_refused(command, (script, "--limit 20", more, option, file), file, odd, remedy)
    command(script, "--limit 20", more, option, file, "--output", tmp_path / "out")


# --- folders, ends ----------------------------------------------------------------------------------------------------

@BOTH
def test_folder_belongs_to_its_settings(command, trained, tmp_path, script):
    """The same again prints the result (running options aside); others are refused by name; --overwrite begins anew."""
    folder = shutil.copytree(trained[script].folder, tmp_path / "run")
    words, before = (script, TINY[script], "--output", folder), content_of(folder)
    again = command(*words, "--threshold 0.3 --top-k 2 --workers 0 --quiet")
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
        words = (script, TINY[script], f"--limit 20 --epochs 1 --{option}", tmp_path / "file.jsonl")
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
@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_cpu"])
def test_ctrl_c_while_importing(script, library):
    for _ in range(5):  # an import may swallow the signal
        process = subprocess.Popen([sys.executable, REPOSITORY / script, "--help"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
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
    running.wait_for(lambda: in_training(tmp_path))
    os.kill(running.process.pid, signal.SIGINT)
    assert running.end(130)[1] == f"{script}: interrupted; the same command goes on from the last saved epoch\n"


@BOTH
def test_nowhere_to_write(command, trained, place, tmp_path, script):
    """A full standard output; one that head has closed, which is no mistake; a full disk, and then room again."""
    tags = ("--checkpoint", trained[script].checkpoint, "--predict", place / "photos", "--output", tmp_path / "tags")
    for words in ((script, TINY[script], "--output", trained[script].folder), (script, *tags)):
        assert "standard output: No space left on device; free" in command(*words, stdout="/dev/full", expect=2)[1]
        assert "Broken" not in command(*words, stdout=None)[1]
    words = (script, TINY[script], "--output", tmp_path / "run")
    assert f"cannot write {tmp_path / 'run'}" in command(*words, full_at=20_000, expect=2)[1]
    assert not list((tmp_path / "run").glob(".*partial")) and command(*words)[0] == trained[script].stdout


# --- what a run leaves, and what it is good for -----------------------------------------------------------------------

@BOTH
def test_record(trained, whole, script):
    result, stdout = result_of(trained[script].folder), trained[script].stdout
    runs = [run for run in result["runs"] if run.get("noise_std", 0.15) == 0.15]
    settings = [(run["seed"], run.get("noise_std", run.get("ablation"))) for run in result["runs"]]
    assert settings == {RP: [(0, 0.15), (0, 0), (1, 0.15), (1, 0)], SSPA: [(0, "none"), (1, "none")]}[script]
    assert result["mAP"] == pytest.approx(statistics.mean(run["mAP"] for run in runs))
    assert result["mAP_std"] == pytest.approx(statistics.stdev(run["mAP"] for run in runs))
    classes, truth = result["per_class"], sum(np.array(scenes.labels_of("test", row)) for row in range(130))
    assert [(entry["name"], entry["positives"]) for entry in classes] == list(zip(scenes.NAMES, truth, strict=True))
    assert statistics.mean(entry["ap"] for entry in classes) == pytest.approx(result["mAP"])
    given = [result[key] for key in ("method", "dataset", "backbone", "impl", "finished")]
    assert given == [{RP: "rp", SSPA: "sspa"}[script], "scenes", "scenes", "fused", True]
    assert result["command"].startswith(f"python {script} {TINY[script]} --output ")
    assert re.fullmatch("[0-9a-f]{40}[+]?|unknown", result["commit"]) and 0 < result["seconds"] < 100
    assert f"{result['mAP']:.2f} ±{result['mAP_std']:.2f}" in stdout and f"{result['zero_shot_mAP']:.2f}" in stdout
    assert {"policy", "versions", "device", "peak_memory_mib", "config"} <= set(result)
    assert result_of(whole[script])["dataset"] == {RP: "features", SSPA: "scenes"}[script]


@BOTH
def test_checkpoint_scores_as_its_training_did(command, trained, tmp_path, script):
    words = (script, "--limit 130 --checkpoint", trained[script].checkpoint, "--output", tmp_path)
    stdout, stderr = command(*words, "--gamma-neg 3")
    result, first = result_of(tmp_path), result_of(trained[script].folder)
    assert result["runs"][0]["ap"] == pytest.approx(first["runs"][0]["ap"], abs=1e-6)
    assert result["zero_shot_mAP"] == first["zero_shot_mAP"] and "was made with its own --gamma-neg" in stderr
    assert command(*words)[0] == stdout


@BOTH
def test_labels_never_trained_on(command, place, tmp_path, script):
    """Left out, labels are not learnt but scored, by the run and by its checkpoint; new words tag photos."""
    words = (script, TINY[script].replace("--limit 130", "--limit 300"), "--head label-embedding" * (script == RP))
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
    command(script, "--limit 300 --output", tmp_path / "again", "--checkpoint", checkpoint)
    assert result_of(tmp_path / "again")["runs"][0]["ap"] == pytest.approx(result["runs"][0]["ap"], abs=1e-4)
    more = ("--labels", tmp_path / "words.txt", "--predict", place / "photos", "--output", tmp_path / "tags")
    stdout, stderr = command(script, "--checkpoint", checkpoint, *more)
    assert all(set(json.loads(line)["scores"]) == {"cup", "mug"} for line in stdout.splitlines())
    assert ("never trained on cup, mug" in stderr) == (script == SSPA)
    assert "--unseen dragon: must" in command(*words, "--unseen dragon", expect=2)[1]


def test_words_alone_are_not_scored(command, place, tmp_path):
    """A list of one's own words is not scored on drawn pictures unasked, though scenes knows them all."""
    stdout, _ = command(RP, "--text-count 60 --epochs 1 --labels", place / "few.txt", "--output", tmp_path)
    assert stdout.startswith("2 labels; scenes;") and "nothing to score" in stdout
    assert result_of(tmp_path)["photo_count"] == 0 and result_of(tmp_path)["mAP"] is None


def page_of(path):
    """[(photo, scores), ...] that a page shows"""
    content, = re.findall("^const .* = (.*);$", path.read_text(), re.MULTILINE)[:1]
    return [(photo["name"], dict(photo["scores"])) for photo in json.loads(content)["photos"]]


@BOTH
def test_tags_and_explanations(command, trained, place, tmp_path, script):
    """A JSON line a photo, whatever bytes its name has; what cannot be read is named; pictures."""
    words = (script, "--checkpoint", trained[script].checkpoint, "--output", tmp_path, "--predict", place / "photos")
    stdout, stderr = command(*words, "--top-k 2 --html", tmp_path / "page.html")
    assert "the scenes toy here" in stderr and "cannot write /proc/x" in command(*words, "--html /proc/x", expect=2)[1]
    two = [json.loads(line) for line in stdout.splitlines()]
    assert page_of(tmp_path / "page.html") == [(line["photo"], line["scores"]) for line in two]
    assert [line["photo"] for line in two] == sorted(map(str, (place / "photos").glob("[!t]*.*g")))
    assert stderr.count("torn.jpg: cannot be read (") == 1 and min(Image.open(tmp_path / "predictions.png").size) > 200
    middle = two[0]["scores"][two[0]["labels"][1]] - 0.01
    above = [json.loads(line) for line in command(*words, f"--threshold {middle}")[0].splitlines()]
    for other, line in zip(two, above, strict=True):
        scores = list(line["scores"].values())
        assert set(line) == {"photo", "labels", "scores"} and set(line["scores"]) == set(scenes.NAMES)
        assert scores == sorted(scores, reverse=True) and 0 <= scores[-1] < scores[0] <= 1
        assert other["labels"] == list(other["scores"]) == list(line["scores"])[:2]
        assert line["labels"] == [name for name, score in line["scores"].items() if score >= middle]
    few = json.loads(command(*words, f"--score-floor {middle}")[0].splitlines()[0])
    assert few["scores"] == {name: score for name, score in above[0]["scores"].items() if score >= round(middle, 4)}
    if script == SSPA:
        stdout, _ = command(script, *words[1:5], "--explain", place / "photos")
        sheets = sorted((tmp_path / "explain").iterdir())
        assert stdout.splitlines() == list(map(str, sheets)) and len(sheets) == 3
        assert all(len(np.unique(np.asarray(Image.open(sheet)))) > 50 for sheet in sheets)


@pytest.mark.parametrize("words", ["--tune-image none", "--tune-image full"])
def test_two_processes_learn_what_one_learns(start, command, tmp_path, words):
    """As torchrun starts them, each with its rank; only the first speaks and writes. Sums differ by rounding."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = (SSPA, words, "--limit 40 --batch-size 9 --epochs 2 --cache", tmp_path / "cache", "--output")
    both = [start(*words, tmp_path / "two", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, **meeting)
            for rank in "01"]
    _, (stdout, stderr) = [running.end() for running in both]
    assert stdout == "" and not [line for line in stderr.splitlines() if not line.startswith("[")]
    command(*words, tmp_path / "one")
    one, two = (result_of(tmp_path / name)["runs"][0] for name in ("one", "two"))
    assert two["ap"] == pytest.approx(one["ap"], abs=0.5) and two["mAP"] == pytest.approx(one["mAP"], abs=0.05)


@BOTH
def test_tags_file(start, command, trained, cache, tmp_path, script):
    """Cut anywhere, as a killed run leaves it, --tags goes on to the lines of an undisturbed run. A new photo and a
    changed one are tagged, a vanished one is named. Two processes give the lines of one."""
    photos, whole = tmp_path / "photos", tmp_path / "whole.jsonl"
    photos.mkdir()
    for number in range(150):
        Image.new("RGB", (20, 20), (number, 255 - number, 7)).save(photos / f"{number:03d}.png")
    words = (script, "--checkpoint", trained[script].checkpoint, "--output", tmp_path, "--predict", photos)
    lines = command(*words)[0].splitlines(True)
    assert command(*words, "--tags", whole)[0] == "" and len(lines) == 150
    content = whole.read_bytes()
    assert [json.loads(line) | {"size": 0, "time": 0} for line in lines] == [
        json.loads(line) | {"size": 0, "time": 0} for line in content.splitlines()]
    for cut in np.random.default_rng(0).integers(0, len(content), 3):
        whole.write_bytes(content[:cut])
        assert f": {content[:cut].count(10)} of 150 photos" in command(*words, "--tags", whole)[1]
        assert whole.read_bytes() == content
    (photos / "000.png").unlink()
    for name in ("001.png", "200.png"):
        Image.new("RGB", (30, 20)).save(photos / name)
    assert "1 photos are gone, their lines stay (first: " in command(*words, "--tags", whole)[1]
    more = [json.loads(line) for line in whole.read_bytes()[len(content):].splitlines()]
    assert [Path(line["photo"]).name for line in more] == ["001.png", "200.png"]
    assert whole.read_bytes().startswith(content)
    command(*words, "--html", tmp_path / "page.html", "--tags", whole)  # nothing is left to tag, and all is on the page
    shown = page_of(tmp_path / "page.html")
    assert len(shown) == 151 and shown[1] == (str(photos / "001.png"), more[0]["scores"])
    lines = command(*words, "--html", tmp_path / "page.html")[0]
    shown = page_of(tmp_path / "page.html")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words += ("--html", tmp_path / "two.html", "--cache", cache)
    both = [start(*words, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, **meeting) for rank in "01"]
    ends = [running.end() for running in both]
    assert (ends[0][0], ends[1][0]) == (lines, "") and not list(tmp_path.glob(".tags*"))
    assert page_of(tmp_path / "two.html") == shown


def test_a_line_is_there_before_the_next_photos(capsys, tmp_path):
    """What was scored is printed before more is asked for; head leaves early."""
    config, photos = run.parse(run.Options, [], ""), [("test", index) for index in range(3)]

    def scored(some):
        for row in range(3):
            yield np.array([row]), np.array([[0.5, 0.1 * row]])
            assert len(capsys.readouterr().out.splitlines()) == 1 and (tmp_path / "predictions.png").is_file()
    run.tag(config, photos, ["sun", "moon"], scored, tmp_path)


def test_torchrun(trained, cache, tmp_path):
    """The adapter learns in the first process, so nothing at all differs."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", REPOSITORY / RP]
    words += [*shlex.split(TINY[RP]), "--cpu", "--cache", cache, "--output", tmp_path / "run"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout == trained[RP].stdout, done.stderr
    assert outcome(tmp_path / "run") == outcome(trained[RP].folder)


def test_running_options(start, command, place, tmp_path):
    """Workers and cache change no number; a damaged cache file is made anew; bars on a terminal, unless --quiet."""
    words = (SSPA, "--tune-image none --limit 40 --epochs 2 --overwrite --output", tmp_path / "run")
    cache = tmp_path / "cache"
    command(*words, "--cache", cache, "--workers 0")
    first, files = outcome(tmp_path / "run"), list(cache.iterdir())
    command(*words, "--workers 3 --cache", tmp_path / "another cache")
    assert outcome(tmp_path / "run") == first
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
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
