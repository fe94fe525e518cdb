"""The command lines of both methods as people type them: what they refuse, leave behind, survive and give back."""
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import BOTH, REPOSITORY, RP, SSPA, TINY, content_of, read_lines, result_of, start_two
from safetensors import safe_open
from safetensors.torch import load_file, save

import data
import run
import scenes

FEW = "--tune-image none --train-count 40 --test-count 40 --epochs 2 "
LONG = {RP: "--features {f}/features.npz --epochs 600 --seed 0 1",
        SSPA: "--tune-image none --train-count 130 --test-count 130 --epochs 6 --seed 0 1"}


def outcome(folder):
    """What must not differ between two runs of the same settings"""
    result = result_of(folder)
    log = read_lines(folder / "log.jsonl")
    for entry in log:
        entry.pop("seconds")
    tensors = {name: tensor.tolist() for name, tensor in load_file(folder / "checkpoint.safetensors").items()}
    return result["runs"], result["per_class"], log, tensors, sorted(path.name for path in content_of(folder))


# --- refused ----------------------------------------------------------------------------------------------------------

OPTIONS = """dataset data-root policy labels unseen train-count test-count no-probe backbone pretrained resolution
    precision gpu cpu seed epochs batch-size lr impl workers cache output overwrite save-all checkpoint tensorboard
    quiet gamma-neg clip focal-gradient """
OWN_OPTIONS = {RP: "features texts text-count noise-law noise-std normalize adapter head loss",
               SSPA: """descriptions tune-image context-length attention-scale no-dsf fusion quaternion-layers
               alignment no-gate aggregator temperature branches regional-weight prompt-lr image-lr-factor ema"""}


@BOTH
def test_help(script, tmp_path):
    """Every option with its words, the method's first; from anywhere, without open_clip, whose import takes seconds."""
    words = [sys.executable, "-X", "importtime", REPOSITORY / script, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0 and "torch" in done.stderr and "open_clip" not in done.stderr
    explained = re.findall(r"^  --([\w-]+)(?: [^\n]*?\S)??(?:  +|\n +)[^\s-][^\n]*[a-z]{2}", done.stdout, re.M)
    assert sorted(explained) == sorted((OPTIONS + OWN_OPTIONS[script]).split()) and not any(tmp_path.iterdir())
    groups = [done.stdout.index(f"\n{name}:\n") for name in ("method", "data", "CLIP", "running")]
    assert groups == sorted(groups)


REFUSED = {  # words, what the answer must hold
    RP: [("--lr nan", "--lr: must be above 0"), ("--lr 0,1", "--lr: invalid float"), ("--data x", "s: --data"),
         ("--seed 1 1", "--seed 1 1: a value stands twice"), ("--seed -1", "--seed: must be at least 0"),
         ("--dataset imagenet", "choose from 'scenes', 'voc2007'"), ("--resolution 65", "multiple of 8"),
         ("--policy difficult=ignore", "--policy difficult=ignore: scenes takes none"),
         ("--gpu 99", "GPU 99: this machine has"), ("--gpu 0 --cpu", "leave one out"),
         ("--backbone ViT-B-61", "ViT-B-16"), ("--pretrained laion", "of which CLIP? add --backbone NAME"),
         ("--backbone ViT-S-32-alt --pretrained openai", "--pretrained openai: "),
         ("--dataset voc2007 --backbone scenes --data-root {f}", "VOCtrainval_06-Nov-2007.tar"),
         ("--features {f}/features.npz --texts x", "leave --texts out"),
         ("--features {f}/features.npz --labels {f}/few.txt", "--labels names 'sun', which"),
         ("--checkpoint {rp} --labels {f}/reversed.txt", "label 1 is 'sun' there"),
         ("--checkpoint {rp} --resolution 128", "same --backbone, --pretrained and --resolution"),
         ("--unseen sun", "add --head label-embedding"), ("--tensorboard", "pip install tensorboard"),
         ("--output /proc/x", "/proc/x")],
    SSPA: [("--ema 1", "must be at least 0 and below 1"), ("--texts x", "s: --texts x"),
           ("--output {f}/few.txt/x", "/few.txt"),
           ("--unseen dragon", "--unseen dragon: must be one of the labels"),
           (FEW + "--context-length 38", "--context-length 38: this CLIP reads 40 tokens"),
           ("--labels {f}/foreign.txt", "'zebra' is no label of scenes"),
           ("--checkpoint {sspa} --dataset voc2007", "VOCtest_06-Nov-2007.tar")]}


@pytest.mark.parametrize("script, words, answer", [(name, *case) for name in REFUSED for case in REFUSED[name]])
def test_refused(start, place, trained, script, words, answer):
    files = {"f": place, "rp": trained[RP].checkpoint, "sspa": trained[SSPA].checkpoint}
    running = start(script, words.format(**files))
    stdout, stderr = running.end(2)
    assert stderr.count("\n") == 1 and answer in stderr and stdout == ""
    assert set(content_of(running.stderr.parent)) == {running.stdout, running.stderr}


# --- killed, resumed, two at once -------------------------------------------------------------------------------------

def in_training(folder, scored=0):
    """Whether some epochs of a run are saved, after so many scored seeds"""
    try:
        is_newer = (folder / "metrics.json").stat().st_mtime_ns < (folder / "resume.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return False
    return is_newer and len(result_of(folder)["runs"]) == scored


def kill_in_training(running, folder, scored=0):
    running.wait_for(partial(in_training, folder, scored))
    running.process.kill()
    running.process.join()
    assert running.process.exitcode == -signal.SIGKILL and in_training(folder, scored)


@pytest.fixture(scope="module")
def whole(start, place, tmp_path_factory):
    """{script: folder of an undisturbed run}; others want the same folder while it runs, and are refused"""
    folders = {script: tmp_path_factory.mktemp("whole") for script in LONG}
    runs = []
    others = []
    for script, folder in folders.items():
        words = (script, LONG[script].format(f=place), "--output", folder)
        running = start(*words, RESUME_SECONDS="0")
        running.wait_for(partial(in_training, folder))
        os.kill(running.process.pid, signal.SIGSTOP)  # while the others try
        assert read_lines(folder / "log.jsonl")[0]["epoch"] == 1  # not only at the end
        runs.append(running)
        others.append(start(*words, "--lr 1 --overwrite", LOCK_SECONDS="0.1"))
    for running, other in zip(runs, others, strict=True):
        stderr = other.end(2)[1]
        assert stderr.count("\n") == 1 and "another run is writing it; wait for it, or choose" in stderr
        os.kill(running.process.pid, signal.SIGCONT)
        running.end()
    return folders


@pytest.fixture(scope="module")
def killed(start, place, tmp_path_factory):
    """{script: folder of a run killed in the training of the first seed, and again in that of the second}"""
    folders = {script: tmp_path_factory.mktemp("killed") for script in LONG}
    for script, folder in folders.items():
        for scored in (0, 1):
            words = (script, LONG[script].format(f=place), "--output", folder)
            kill_in_training(start(*words, RESUME_SECONDS="0"), folder, scored)
    return folders


@BOTH
def test_killed_and_resumed(start, place, whole, killed, tmp_path, script):
    """SIGKILL in training, then the same command: the run that nobody disturbed, bit for bit."""
    folder = shutil.copytree(killed[script], tmp_path / "resumed")
    before = result_of(folder)
    assert before["finished"] is False and before["mAP"] == before["runs"][0]["mAP"]
    with open(folder / "log.jsonl", "a") as file:  # what was written after the last save, and cut
        file.write('{"run": "seed 1", "epoch": 599, "loss": 7}\n{"run": "seed 1", "ep')
    stderr = start(script, LONG[script].format(f=place), "--output", folder).end()[1]
    assert re.search("going on after epoch [1-9]", stderr)
    assert outcome(folder) == outcome(whole[script]) and result_of(folder)["finished"]


def test_killed_while_photos_are_decoded(start, tmp_path):
    """Processes that decode photos do not keep a folder from its next run when the one they work for is killed."""
    words = (SSPA, FEW, "--tune-image full --batch-size 4 --output", tmp_path)
    running = start(*words, RESUME_SECONDS="0")
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
    running.wait_for(lambda: in_training(tmp_path) and children.read_text())
    kill_in_training(running, tmp_path)
    assert "going on after epoch" in start(*words).end()[1]


@BOTH
def test_what_another_run_left_is_not_gone_on_with(start, place, killed, tmp_path, script):
    """metrics.json deleted, as its own message advises, and then other settings: a run like any other."""
    folder = shutil.copytree(killed[script], tmp_path / "left")
    (folder / "metrics.json").unlink()
    for output in (folder, tmp_path / "fresh"):
        start(script, LONG[script].format(f=place), "--epochs 3 --lr 0.002 --seed 1 --output", output).end()
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
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return change(value)
    return value


def to_nan(tensor):
    return tensor * np.nan


def check_refused(start, words, file, odd, remedy, simple=("empty", "torn", "text", "bytes")):
    """A run that reads a damaged file says so in one line, with what to do, and leaves the file as it is. odd: {name:
    function that writes the file} beside the simple damages."""
    good = file.read_bytes()
    contents = {"empty": b"", "torn": good[:2 * len(good) // 3], "text": b"hello", "bytes": b"\xff\xfe\0"}
    for damage in (*simple, *odd):
        if damage in odd:
            odd[damage](file)
        else:
            file.write_bytes(contents[damage])
        before = content_of(file.parent)
        stderr = start(*words, BOMB=os.environ.get("BOMB", "")).end(2)[1]
        assert stderr.count("\n") == 1 and re.search(f" {file}[:,].*; .*({remedy})", stderr), damage
        assert "weights_only" not in stderr and content_of(file.parent) == before, damage
    file.write_bytes(good)


@BOTH
@pytest.mark.parametrize("name", ["metrics.json", "resume.pt"])
def test_damaged_file_of_a_run(start, place, whole, killed, tmp_path, bomb, script, name):
    folder = shutil.copytree(killed[script], tmp_path / "run")
    words = [script, LONG[script].format(f=place), "--output", folder]
    if name == "metrics.json":
        content = json.dumps({**result_of(folder), "runs": [{}], "finished": True})
        odd = {"runs": lambda file: file.write_text(content)}
        words.append("--overwrite")
    else:
        state = torch.load(folder / name, weights_only=True)
        odd = {"pickle": partial(torch.save, {**state, "log": bomb}),
               "nan": partial(torch.save, altered(state, to_nan)),
               "shapes": partial(torch.save, altered(state, torch.Tensor.ravel))}
    check_refused(start, words[:4], folder / name, odd, "delete it")
    (folder / "resume.pt").unlink()
    start(*words).end()  # what the lines advise
    assert outcome(folder) == outcome(whole[script])


TEXTS = "".join(json.dumps({"text": f"a {name} here", "labels": [name]}) + "\n" for name in scenes.NAMES)
INPUTS = {  # option and file: script, what is good, the remedy
    "--labels names.txt": (RP, "sun\nmoon\n", "give a UTF-8|write"),
    "--texts texts.jsonl": (RP, TEXTS, "each line must be|check both|give a UTF-8"),
    "--descriptions table.json": (SSPA, '{"descriptions": {"sun": "A sun is round."}}', "must be|valid JSON|UTF-8"),
    "--features features.npz": (RP, None, "it must be an .npz without pickles of text_embeddings"),
    "--checkpoint rp.safetensors": (RP, None, "pass a checkpoint.safetensors that adapter_rp.py or sspa.py wrote"),
    "--checkpoint sspa.safetensors": (SSPA, None, "pass a checkpoint.safetensors that adapter_rp.py or sspa.py wrote")}


@pytest.mark.parametrize("case", INPUTS)
def test_damaged_input(start, place, trained, tmp_path, bomb, case):
    option, name = case.split()
    script, good, remedy = INPUTS[case]
    file = tmp_path / name
    simple = ("empty", "torn", "text", "bytes")
    odd = {}
    if option == "--features":
        arrays = dict(np.load(place / name))
        text = arrays["text_embeddings"]
        for damage, value in {"pickle": np.array([bomb]), "nan": to_nan(text), "shapes": text[1:]}.items():
            odd[damage] = partial(np.savez, **{**arrays, "text_embeddings": value})
        shutil.copy(place / name, file)
    elif option == "--checkpoint":
        shutil.copy(trained[script].checkpoint, file)
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
        tensors = load_file(file)
        contents = {"nan": save(altered(tensors, to_nan), metadata), "bare": save(tensors),
                    "shapes": save(altered(tensors, torch.Tensor.ravel), metadata),
                    "settings": save(tensors, {**metadata, "settings": "[1]"}),
                    "other": trained[SSPA if script == RP else RP].checkpoint.read_bytes()}
        odd = {damage: lambda file, content=content: file.write_bytes(content) for damage, content in contents.items()}
        odd["pickle"] = partial(torch.save, bomb)
    else:
        file.write_text(good)
        if option == "--labels":  # to it the others are names
            simple = ("empty", "bytes")
    few = {RP: "--text-count 60 --test-count 20", SSPA: FEW}
    words = (script, few[script], option, file)
    check_refused(start, words, file, odd, remedy, simple)
    start(*words, "--output", tmp_path / "out").end()


# --- folders, ends ----------------------------------------------------------------------------------------------------

@BOTH
def test_folder_belongs_to_its_settings(start, trained, tmp_path, script):
    """The same again prints the result (running options aside); others are refused by name; --overwrite begins anew."""
    folder = shutil.copytree(trained[script].folder, tmp_path / "run")
    words = (script, TINY[script], "--output", folder)
    before = content_of(folder)
    again = start(*words, "--workers 0 --quiet").end()
    assert again == (trained[script].stdout, f"{folder} is finished; --overwrite does it again\n")
    stderr = start(*words, "--epochs 3 --clip 0.05").end(2)[1]
    assert stderr.count("\n") == 1 and "(epochs 2, not 3; clip 0.0, not 0.05)" in stderr and "--overwrite" in stderr
    for slip in ("--labels nowhere.txt", "--tensorboard"):  # loses nothing
        start(*words, "--overwrite", slip).end(2)
    assert content_of(folder) == before
    start(*words, "--epochs 3 --overwrite").end()
    assert result_of(folder)["config"]["epochs"] == 3


@pytest.mark.parametrize("script, option, old, new", [
    (RP, "texts", TEXTS, TEXTS * 2), (RP, "labels", "sun\nmoon", "moon\nsun"),
    (SSPA, "descriptions", '{"sun": "The sun is round."}', '{"sun": "The sun is hot."}')])
def test_changed_file_is_another_setting(start, tmp_path, script, option, old, new):
    words = (script, TINY[script], f"--test-count 20 --epochs 1 --{option}", tmp_path / "file.jsonl", "--output")
    (tmp_path / "file.jsonl").write_text(old)
    start(*words, tmp_path / "run").end()
    (tmp_path / "file.jsonl").write_text(new)
    assert f"(content of {option} " in start(*words, tmp_path / "run").end(2)[1]


@BOTH
def test_divergence(start, tmp_path, script):
    stderr = start(script, TINY[script], "--lr 1e30 --output", tmp_path).end(3)[1]
    assert "training diverged in epoch" in stderr and "lower --lr (now 1e+30)" in stderr
    assert not result_of(tmp_path)["finished"]


@BOTH
def test_ctrl_c_in_training(start, place, tmp_path, script):
    running = start(script, LONG[script].format(f=place), "--output", tmp_path, RESUME_SECONDS="0")
    running.wait_for(partial(in_training, tmp_path))
    os.kill(running.process.pid, signal.SIGINT)
    assert running.end(130)[1] == f"{script}: interrupted; the same command goes on from the last saved epoch\n"


@BOTH
def test_nowhere_to_write(start, trained, place, tmp_path, script):
    """A full standard output; one that head has closed, which is no mistake; a full disk, and then room again."""
    tags = ("tag.py", trained[script].checkpoint, place / "photos")
    for words in ((script, TINY[script], "--output", trained[script].folder), tags, (*tags, "--stdout")):
        assert "standard output: No space left on device; free" in start(*words, stdout="/dev/full").end(2)[1]
        assert "Broken" not in start(*words, stdout=None).end()[1]
    words = (script, TINY[script], "--output", tmp_path)
    assert f"cannot write {tmp_path}" in start(*words, full_at=20_000).end(2)[1]
    assert not list(tmp_path.glob(".*partial")) and start(*words).end()[0] == trained[script].stdout


# --- what a run leaves, and what it is good for -----------------------------------------------------------------------

@BOTH
def test_record(trained, script):
    result = result_of(trained[script].folder)
    stdout = trained[script].stdout
    found = [run["mAP"] for run in result["runs"]]
    assert [run["seed"] for run in result["runs"]] == result["seeds"] == [0, 1]
    assert result["mAP"] == pytest.approx(statistics.mean(found))
    assert result["mAP_std"] == pytest.approx(statistics.stdev(found))
    counts = data.load_photos("scenes", None, "test", 130).labels.sum(0)
    classes = result["per_class"]
    assert [(one["name"], one["positives"]) for one in classes] == list(zip(scenes.NAMES, counts, strict=True))
    assert statistics.mean(one["ap"] for one in classes) == pytest.approx(result["mAP"])
    given = [result[key] for key in ("method", "dataset", "backbone", "impl", "finished", "photo_count")]
    assert given == [{RP: "rp", SSPA: "sspa"}[script], "scenes", "scenes", "fused", True, 130]
    assert result["command"].startswith(f"python {script} {TINY[script]} --save-all --output ")
    assert re.fullmatch("[0-9a-f]{40}[+]?|unknown", result["commit"]) and 0 < result["seconds"] < 100
    assert f"{result['mAP']:.2f} ±{result['mAP_std']:.2f}" in stdout and f"{result['zero_shot_mAP']:.2f}" in stdout
    assert {"policy", "versions", "device", "threads", "peak_memory_mib", "config", "linear_probe_mAP"} <= set(result)


@BOTH
def test_log_and_checkpoints(trained, script):
    """A line an epoch and, with --save-all, a model a seed; the first seed's is the checkpoint."""
    folder = trained[script].folder
    lines = read_lines(folder / "log.jsonl")
    assert [f"{line['run']}, {line['epoch']}" for line in lines] == ["seed 0, 1", "seed 0, 2", "seed 1, 1", "seed 1, 2"]
    assert all(line["loss"] > 0 and line["seconds"] >= 0 for line in lines) and lines[0]["lr"] > lines[1]["lr"]
    first, second = sorted((folder / "checkpoints").iterdir())
    assert (first.name, second.name) == ("seed 0.safetensors", "seed 1.safetensors")
    assert trained[script].checkpoint.read_bytes() == first.read_bytes() != second.read_bytes()


@BOTH
def test_checkpoint_scores_as_its_training_did(start, trained, tmp_path, script):
    words = (script, "--checkpoint", trained[script].checkpoint)
    stdout, stderr = start(*words, "--gamma-neg 3 --output", tmp_path).end()
    result = result_of(tmp_path)
    first = result_of(trained[script].folder)
    assert result["runs"][0]["ap"] == pytest.approx(first["runs"][0]["ap"], abs=1e-6)
    assert result["zero_shot_mAP"] == first["zero_shot_mAP"] and "was made with its own --gamma-neg" in stderr
    assert start(*words).end()[0] == stdout


@BOTH
def test_labels_never_trained_on(start, place, tmp_path, script):
    """Left out, labels are not learnt but scored, by the run and by its checkpoint; new words tag photos."""
    words = [script, TINY[script].replace("130", "300")]
    if script == RP:
        words.append("--head label-embedding")
    (tmp_path / "seen.txt").write_text("\n".join(name for name in scenes.NAMES if name not in ("boat", "cup")))
    (tmp_path / "words.txt").write_text("cup\nmug\n")
    start(*words, "--labels", tmp_path / "seen.txt", "--output", tmp_path / "seen").end()
    stdout, _ = start(*words, "--unseen boat cup --output", tmp_path / "run").end()
    checkpoint = tmp_path / "run/checkpoint.safetensors"
    learnt = [load_file(tmp_path / name / "checkpoint.safetensors") for name in ("seen", "run")]
    torch.testing.assert_close(*learnt, atol=1e-5, rtol=1e-4)  # texts of other lengths beside them: other rounding
    result = result_of(tmp_path / "run")
    new = [label for label in result["per_class"] if not label["trained"]]
    assert [label["name"] for label in new] == ["boat", "cup"]
    assert result["linear_probe_mAP"] is None  # which would learn them
    assert f"2 labels never trained on: mAP {statistics.mean(label['ap'] for label in new):.2f}, zero-shot" in stdout
    start(script, "--output", tmp_path / "again", "--checkpoint", checkpoint).end()
    assert result_of(tmp_path / "again")["runs"][0]["ap"] == pytest.approx(result["runs"][0]["ap"], abs=1e-4)
    more = ("--labels", tmp_path / "words.txt", "--stdout")
    stdout, stderr = start("tag.py", checkpoint, place / "photos", *more).end()
    assert all(set(json.loads(line)["scores"]) == {"cup", "mug"} for line in stdout.splitlines())
    assert ("never trained on cup, mug" in stderr) == (script == SSPA)


def test_words_alone_are_not_scored(start, place, tmp_path):
    """A list of one's own words is not scored on drawn pictures unasked, though scenes knows them all."""
    stdout, _ = start(RP, "--text-count 60 --epochs 1 --labels", place / "few.txt", "--output", tmp_path).end()
    assert stdout.startswith("2 labels; scenes;") and "nothing to score" in stdout
    assert result_of(tmp_path)["photo_count"] == 0 and result_of(tmp_path)["mAP"] is None


@pytest.mark.parametrize("script, words", [(RP, TINY[RP]), (SSPA, FEW + "--batch-size 9"),
                                           (SSPA, FEW + "--batch-size 9 --tune-image full")])
def test_two_processes_learn_what_one_learns(start, tmp_path, script, words):
    """As torchrun starts them; only the first speaks and writes. Sums differ by rounding."""
    words = (script, words, "--cache", tmp_path / "cache", "--output")
    start_two(start, *words, tmp_path / "two")
    start(*words, tmp_path / "one").end()
    one = result_of(tmp_path / "one")
    two = result_of(tmp_path / "two")
    assert two["mAP"] == pytest.approx(one["mAP"], abs=0.05)
    assert two["runs"][0]["ap"] == pytest.approx(one["runs"][0]["ap"], abs=0.5)


def test_running_options(start, tmp_path):
    """Workers and cache change no number."""
    folder = tmp_path / "run"
    words = (SSPA, FEW, "--tune-image full --batch-size 8 --overwrite --output", folder)
    start(*words, "--workers 0").end()
    first = outcome(folder)
    start(*words, "--workers 3 --cache", tmp_path / "cache").end()
    assert outcome(folder) == first


def test_what_is_said_of_progress(start, place, tmp_path, monkeypatch, capsys):
    """A bar on a terminal; elsewhere a plain line now and then; nothing with --quiet."""
    words = (RP, "--epochs 1 --features", place / "features.npz")
    if not torch.cuda.is_available():
        assert start(*words).end()[1] == "" and "no GPU found" in start(*words, cpu=False).end()[1]
    monkeypatch.setattr(run, "PLAIN_SECONDS", -1)
    for quiet, expected in ((False, "training seed 3: epoch 1 of 2\n"), (True, "")):
        run.Progress(run.Options(epochs=2, quiet=quiet), tmp_path, "seed 3", 5, {}, None).step()
        assert capsys.readouterr().err == expected
        reader, terminal = os.openpty()
        termios.tcsetwinsize(terminal, (24, 80))
        start(*words, "--quiet" if quiet else "", stderr=os.ttyname(terminal)).process.join()
        os.write(terminal, b"end")
        assert (b"training" in os.read(reader, 10_000)) != quiet
