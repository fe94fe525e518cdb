"""The command lines as people type them: what they refuse, write, survive and print."""
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import termios
from itertools import count, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Bomb
from forked import BOTH, RP, SSPA, TINY, content_of, outcome_of, read_lines, result_of, start_processes, start_two
from safetensors import safe_open
from safetensors.torch import load_file, save

import adapter_rp
import run
import sspa

FEW = "--tune-image none --train-count 40 --test-count 40 --epochs 2 --batch-size 9"
LONG = {RP: "--text-count 300 --test-count 130 --epochs 600 --seed 0 1",
        SSPA: "--tune-image none --train-count 130 --test-count 130 --epochs 6 --seed 0 1"}


def outcome(folder):
    """What must not differ between two runs with the same settings"""
    log = [line | {"seconds": 0} for line in read_lines(folder / "log.jsonl")]
    return outcome_of(folder), log, result_of(folder)["finished"], sorted(os.listdir(folder))


# --- refused ----------------------------------------------------------------------------------------------------------

OPTIONS = """dataset data-root policy labels unseen train-count test-count no-probe backbone pretrained resolution
    precision gpu cpu seed epochs batch-size lr impl workers cache output overwrite save-all checkpoint tensorboard
    quiet gamma-neg clip focal-gradient """
OWN_OPTIONS = {RP: "features texts text-count noise-law noise-std normalize adapter head loss",
               SSPA: """descriptions tune-image context-length attention-scale no-dsf fusion quaternion-layers
               alignment no-gate aggregator temperature branches regional-weight prompt-lr image-lr-factor ema"""}


@BOTH
def test_help(command, monkeypatch, script):
    """Every option has a help text, the method's first; from any folder, without importing open_clip (seconds)."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    done = command(script, "--help")
    assert "torch" in done.stderr and "open_clip" not in done.stderr
    explained = re.findall(r"^  --([\w-]+)(?: [^\n]*?\S)??(?:  +|\n +)[^\s-][^\n]*[a-z]{2}", done.stdout, re.M)
    assert sorted(explained) == sorted((OPTIONS + OWN_OPTIONS[script]).split())
    assert re.findall(r"(?m)^(\w+):$", done.stdout) == ["options", "method", "data", "CLIP", "running"]


# command | what the answer must hold
REFUSED = """
adapter_rp.py --lr nan | --lr: must be above 0
adapter_rp.py --lr 0,1 | --lr: invalid float
adapter_rp.py --data x | s: --data
adapter_rp.py --seed 1 1 | --seed 1 1: a value is given twice
adapter_rp.py --seed -1 | --seed: must be at least 0
adapter_rp.py --dataset imagenet | choose from 'scenes', 'voc2007'
adapter_rp.py --resolution 65 | multiple of 8
adapter_rp.py --policy difficult=ignore | --policy difficult=ignore: scenes takes none
adapter_rp.py --gpu 99 | GPU 99: this machine has
adapter_rp.py --gpu 0 --cpu | leave one out
adapter_rp.py --backbone ViT-B-61 | open_clip has no model of this name; try ViT-B-16
adapter_rp.py --backbone scene | try scenes
adapter_rp.py --backbone ViT-B-32 --pretrained laion | no such weights of ViT-B-32; try openai
adapter_rp.py --pretrained laion | for which CLIP? add --backbone NAME
adapter_rp.py --backbone ViT-S-32-alt --pretrained openai | --pretrained openai: no file, and open_clip
adapter_rp.py --dataset voc2007 --backbone scenes --data-root {place} | VOCtrainval_06-Nov-2007.tar
adapter_rp.py --features {place}/features.npz --texts x | leave --texts out
adapter_rp.py --features {place}/features.npz --labels {place}/few.txt | --labels names 'sun', which
adapter_rp.py --labels {place}/features.npz | give a UTF-8
adapter_rp.py --labels /dev/null | holds no label
adapter_rp.py --texts /dev/null | none of 0 texts
adapter_rp.py --checkpoint {rp} --labels {place}/reversed.txt | label 1 is 'sun' there
adapter_rp.py --checkpoint {rp} --resolution 128 | same --backbone, --pretrained and --resolution
adapter_rp.py --checkpoint {sspa} | pass a checkpoint.safetensors that adapter_rp.py or sspa.py wrote
adapter_rp.py --unseen sun | add --head label-embedding
adapter_rp.py --tensorboard | pip install tensorboard
adapter_rp.py --output /proc/x | /proc/x
sspa.py --ema 1 | at least 0 and below 1
sspa.py --texts x | s: --texts x
sspa.py --output {place}/few.txt/x | /few.txt
sspa.py --unseen größe | --unseen größe: must be one of the labels
sspa.py --tune-image none --train-count 40 --context-length 38 | --context-length 38: this CLIP reads 40 tokens
sspa.py --labels {place}/foreign.txt | 'zebra' is no label of scenes
sspa.py --descriptions {place}/few.txt | valid JSON
sspa.py --checkpoint {rp} | pass a checkpoint.safetensors that adapter_rp.py or sspa.py wrote
sspa.py --checkpoint {sspa} --dataset voc2007 | VOCtest_06-Nov-2007.tar
tag.py nowhere {place}/nowhere | /nowhere: no such file or folder
tag.py nowhere {place}/photos | checkpoint nowhere: no such file
tag.py {place} {place}/photos | : is a directory; pass a
tag.py {place}/photos/a.png {place}/photos | ; pass a checkpoint.safetensors
tag.py {rp} {place}/photos/empty | photos end in .jpg
tag.py {rp} {place}/photos --threshold 50 | --threshold 50: must be from 0 to 1
tag.py {rp} {place}/photos --threshold auto --stdout | --stdout does not; give a number
tag.py {rp} {place}/photos --threshold nowhere.json | nowhere.json: no such file; give auto, a number
tag.py {rp} {place}/photos --top-k 0 | --top-k: must be at least 1
tag.py {rp} {place}/photos --workers -1 | --workers: must
tag.py {rp} {place}/photos --gpu -1 | --gpu: must
explain.py {sspa} {place}/photos --top-k 0 | --top-k: must be at least 1
"""


def refused(start, *words, **environment):
    """-> the one line that answers a command, which is refused and writes nothing into the current folder"""
    running = start(*words, **environment)
    stdout, stderr = running.end(2)
    assert stdout == "" and stderr.count("\n") == 1
    assert set(content_of(running.stderr.parent)) == {running.stdout, running.stderr}
    return stderr


@pytest.mark.parametrize("row", REFUSED.strip().splitlines())
def test_refused(start, place, trained, row):
    row = row.format(place=place, rp=trained[RP].checkpoint, sspa=trained[SSPA].checkpoint)
    words, answer = row.split(" | ")
    assert answer in refused(start, *words.split())


# --- killed, resumed --------------------------------------------------------------------------------------------------

def in_training(folder, seed=0):
    """Whether some epochs of a seed are saved"""
    log = folder / "log.jsonl"
    return log.is_file() and f'"seed {seed}"' in log.read_text() and (folder / "resume.pt").is_file()


def kill_in_training(running, folder, seed=0):
    running.wait_for(in_training, folder, seed)
    running.process.kill()
    running.end(-signal.SIGKILL)
    assert in_training(folder, seed)


@pytest.fixture(scope="module", params=LONG)
def runs(request, start, tmp_path_factory):
    """The folder of an undisturbed run, and that of one killed while training the first seed, and again the second"""
    words = (request.param, LONG[request.param], "--output")
    whole = tmp_path_factory.mktemp("whole")
    start(*words, whole).end()
    killed = tmp_path_factory.mktemp("killed")
    for seed in (0, 1):
        kill_in_training(start(*words, killed), killed, seed)
    return SimpleNamespace(words=words, whole=whole, killed=killed)


def test_killed_and_resumed(start, runs, tmp_path):
    """SIGKILL in training, then the same command: bit for bit the undisturbed run."""
    folder = shutil.copytree(runs.killed, tmp_path / "resumed")
    before = result_of(folder)
    assert before["finished"] is False and before["mAP"] == before["runs"][0]["mAP"]
    with open(folder / "log.jsonl", "a") as file:  # a torn line, written after the last save
        file.write('{"run": "seed 1", "epoch": 599, "loss": 7}\n{"run": "seed 1", "ep')
    assert re.search("resuming after epoch [1-9]", start(*runs.words, folder).end()[1])
    assert outcome(folder) == outcome(runs.whole)


def test_what_another_run_left_is_not_gone_on_with(start, runs, tmp_path):
    """If metrics.json is deleted, as its own message advises, a run with other settings is like any other."""
    folder = shutil.copytree(runs.killed, tmp_path / "left")
    (folder / "metrics.json").unlink()
    for output in (folder, tmp_path / "fresh"):
        start(*runs.words, output, "--epochs 3 --lr 0.002 --seed 1").end()
    assert outcome(folder) == outcome(tmp_path / "fresh")


# --- bad files --------------------------------------------------------------------------------------------------------

def spoiled(tensors):
    """Tensors with the same names: one not finite, or with another shape"""
    yield {name: tensor * torch.nan for name, tensor in tensors.items()}
    yield {name: tensor.ravel() for name, tensor in tensors.items()}


def check_refused(start, words, file, remedy, *contents):
    """A run that reads a damaged file says so in one line, with what to do, and leaves the file as it is. contents:
    damages beside the usual ones"""
    good = file.read_bytes()
    for content in (b"", b"\xff\xfe\0", good[:2 * len(good) // 3], pickle.dumps(Bomb(), 2), *contents):
        file.write_bytes(content)
        before = content_of(file.parent)
        answer = refused(start, *words)
        assert re.fullmatch(f".* {file}[:,].*; .*{remedy}.*\n", answer) and "weights_only" not in answer, content
        assert content_of(file.parent) == before


@pytest.mark.parametrize("name", ["metrics.json", "resume.pt"])
def test_damaged_file_of_a_run(start, runs, tmp_path, name):
    folder = shutil.copytree(runs.killed, tmp_path / "run")
    contents = [json.dumps(result_of(folder) | {"runs": [{}], "finished": True}).encode()]
    if name == "resume.pt":
        state = torch.load(folder / name, weights_only=True)
        contents = [pickle.dumps([], 4)]  # of which torch warns
        for tensors in spoiled(state["tensors"]):
            torch.save(state | {"tensors": tensors}, tmp_path / "spoiled")
            contents.append((tmp_path / "spoiled").read_bytes())
    check_refused(start, (*runs.words, folder), folder / name, "delete it", *contents)
    (folder / name).unlink()
    start(*runs.words, folder).end()
    assert outcome(folder) == outcome(runs.whole)


def test_damaged_features(start, place, tmp_path):
    file = shutil.copy(place / "features.npz", tmp_path / "file")
    check_refused(start, (RP, "--features", file), file, "it must be an .npz without pickles of text_embeddings")


@BOTH
def test_damaged_checkpoint(start, trained, tmp_path, script):
    file = shutil.copy(trained[script].checkpoint, tmp_path / "file")
    tensors = load_file(file)
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    contents = [save(one, metadata) for one in spoiled(tensors)]
    contents += [save(tensors), save(tensors, metadata | {"settings": "[1]"})]
    check_refused(start, (script, "--checkpoint", file), file, "pass a checkpoint.safetensors that", *contents)


# --- folders, ends ----------------------------------------------------------------------------------------------------

@BOTH
def test_folder_belongs_to_its_settings(start, trained, tmp_path, script):
    """The same again prints the result (running options aside); others are refused by name; --overwrite begins anew."""
    folder = shutil.copytree(trained[script].folder, tmp_path / "run")
    words = (script, TINY[script], "--output", folder)
    before = content_of(folder)
    again = start(*words, "--workers 0 --quiet").end()
    assert again == (trained[script].stdout, f"{folder} is finished; --overwrite does it again\n")
    assert "(epochs 2, not 3; clip 0.0, not 0.05); choose" in refused(start, *words, "--epochs 3 --clip 0.05")
    refused(start, *words, "--overwrite --labels nowhere.txt")  # a slip loses nothing
    assert content_of(folder) == before
    start(*words, "--epochs 3 --overwrite").end()
    assert result_of(folder)["config"]["epochs"] == 3


@pytest.mark.parametrize("script, option", [(adapter_rp, "features"), (adapter_rp, "texts"), (sspa, "labels"),
                                            (sspa, "descriptions"), (sspa, "checkpoint")])
def test_changed_file_is_another_setting(tmp_path, script, option):
    file = tmp_path / "file"
    config = script.Config(**{option: str(file)})
    file.write_text("old")
    before = run.settings_of(config)
    file.write_text("new")
    assert run.settings_of(config) != before


@BOTH
def test_divergence(start, tmp_path, script):
    stderr = start(script, TINY[script], "--lr 1e30 --output", tmp_path).end(3)[1]
    assert "training diverged in epoch" in stderr and "lower --lr (now 1e+30)" in stderr
    assert not result_of(tmp_path)["finished"]


@BOTH
def test_two_at_once_and_ctrl_c(start, tmp_path, script):
    """Another run that wants the folder is refused and deletes nothing; Ctrl-C keeps what is saved."""
    words = (script, LONG[script], "--epochs 9999 --output", tmp_path)
    running = start(*words)
    running.wait_for(in_training, tmp_path)
    answer = refused(start, *words, "--epochs 1 --overwrite", LOCK_SECONDS="0.1")
    assert "another run is writing it; wait for it, or choose" in answer
    os.kill(running.process.pid, signal.SIGINT)
    assert running.end(130)[1] == f"{script}: interrupted; the same command goes on from what is saved (epochs, " \
        "encoded photos in the cache)\n"
    assert in_training(tmp_path)


@BOTH
def test_nowhere_to_write(start, trained, place, tmp_path, script):
    """A full standard output; one that head has closed, which is no error; a full disk, and then space again."""
    again = (script, TINY[script], "--output", trained[script].folder)
    for words in (again, ("tag.py", trained[script].checkpoint, place / "photos", "--stdout")):
        assert "standard output: No space left on device; free" in start(*words, stdout="/dev/full").end(2)[1]
        assert "Broken" not in start(*words, stdout=None).end()[1]
    words = (script, TINY[script], "--output", tmp_path)
    assert f"cannot write {tmp_path}" in start(*words, full_at=20_000).end(2)[1]
    assert not list(tmp_path.glob(".*partial")) and start(*words).end()[0] == trained[script].stdout


# --- what a run leaves, and what it is good for -----------------------------------------------------------------------

@BOTH
def test_what_a_run_leaves(trained, cache, script):
    """The record (that each label has its own numbers is tested in test_sspa.py), a line per epoch and, with
    --save-all, a model per seed; the first seed's is the checkpoint."""
    folder = trained[script].folder
    result = result_of(folder)
    words = f"{TINY[script]} --save-all --output {folder} --cpu"
    given = {"dataset": "scenes", "backbone": "scenes", "impl": "fused", "finished": True, "photo_count": 130,
             "seeds": [0, 1], "command": f"python {script} --cache {cache} {words}"}
    assert given.items() <= result.items() and f"{result['method']}.py" in script
    found = [one["mAP"] for one in result["runs"]]
    ap = np.mean([one["ap"] for one in result["runs"]], 0)
    assert [label["ap"] for label in result["per_class"]] == pytest.approx(ap)
    assert [result["mAP"], result["mAP_std"]] == pytest.approx([ap.mean(), statistics.stdev(found)])
    for part in (f"{result['mAP']:.2f} ±{result['mAP_std']:.2f}", f"{result['zero_shot_mAP']:.2f}"):
        assert part in trained[script].stdout
    assert re.fullmatch("[0-9a-f]{40}[+]?|unknown", result["commit"]) and 0 < result["seconds"] < 100
    assert {"versions", "device", "threads", "peak_memory_mib"} <= set(result)

    lines = read_lines(folder / "log.jsonl")
    assert [(line["run"], line["epoch"]) for line in lines] == [*product(["seed 0", "seed 1"], [1, 2])]
    assert all(line["loss"] > 0 and line["seconds"] >= 0 for line in lines) and lines[0]["lr"] > lines[1]["lr"]
    first, second = sorted((folder / "checkpoints").iterdir())
    assert trained[script].checkpoint.read_bytes() == first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize("script, option", [(RP, "--adapter linear"), (SSPA, "--temperature 0.5")])
def test_checkpoint_scores_as_its_training_did(start, trained, tmp_path, script, option):
    words = (script, "--checkpoint", trained[script].checkpoint)
    stdout, stderr = start(*words, option, "--output", tmp_path).end()
    result = result_of(tmp_path)
    first = result_of(trained[script].folder)
    assert result["runs"][0]["ap"] == pytest.approx(first["runs"][0]["ap"], abs=1e-6)
    assert result["zero_shot_mAP"] == first["zero_shot_mAP"] and f"was made with its own {option[:9]}" in stderr
    assert start(*words).end()[0] == stdout


@pytest.mark.parametrize("script, more", [(RP, "--head label-embedding"), (SSPA, "")])
def test_labels_never_trained_on(start, place, tmp_path, script, more):
    """Labels held out by --unseen are not trained on but scored, by the run and by its checkpoint; so are other labels
    that a checkpoint was not trained on, beside its own or alone; new names tag photos."""
    words = (script, TINY[script], more, "--output")
    checkpoint = tmp_path / "run/checkpoint.safetensors"
    of_seen = tmp_path / "seen/checkpoint.safetensors"
    start(*words, tmp_path / "seen", "--labels", place / "seen.txt").end()
    stdout, _ = start(*words, tmp_path / "run", "--unseen cup ball").end()
    # texts of other lengths beside them: other rounding
    torch.testing.assert_close(load_file(checkpoint), load_file(of_seen), atol=1e-5, rtol=1e-4)
    result = result_of(tmp_path / "run")
    new = [label["ap"] for label in result["per_class"][-2:]]
    assert result["linear_probe_mAP"] is None  # which would learn them
    assert f"2 labels never trained on: mAP {np.mean(new):.2f}, zero-shot" in stdout
    others = "--dataset scenes --test-count 130"
    for path, words in ((checkpoint, ""), (of_seen, others)):
        start(script, words, "--output", path.with_name("again"), "--checkpoint", path).end()
        again = result_of(path.with_name("again"))
        assert [label["trained"] for label in again["per_class"]] == 16 * [True] + 2 * [False]
        assert again["runs"][0]["ap"] == pytest.approx(result["runs"][0]["ap"], abs=0.1)
    stdout, _ = start(script, others, "--labels", place / "new.txt", "--checkpoint", checkpoint).end()
    assert "2 labels never trained on" in stdout and "labels trained on" not in stdout and "nan" not in stdout
    stdout, stderr = start("tag.py", checkpoint, place / "photos", "--stdout --labels", place / "foreign.txt").end()
    assert [set(json.loads(line)["probabilities"]) for line in stdout.splitlines()] == 3 * [{"cup", "zebra"}]
    assert ("never trained on cup, zebra" in stderr) == (script == SSPA)
    assert ("probabilities may be far off" in stderr) == (script == RP)


def test_words_alone_are_not_scored(start, place, tmp_path):
    """The user's own labels are not scored on drawn pictures unless asked, though scenes has them all."""
    stdout, _ = start(RP, "--text-count 60 --epochs 1 --labels", place / "few.txt", "--output", tmp_path).end()
    assert stdout.startswith("2 labels; scenes;") and "nothing to score" in stdout
    assert result_of(tmp_path)["photo_count"] == 0 and result_of(tmp_path)["mAP"] is None


@pytest.mark.parametrize("script, words", [(RP, TINY[RP]), (SSPA, FEW), (SSPA, FEW + " --tune-image full")])
def test_two_processes_learn_what_one_learns(start, tmp_path, script, words):
    """Two processes as torchrun starts them: only the first prints and writes. Sums differ by rounding."""
    words = (script, words, "--cache", tmp_path / "cache", "--output")
    start_two(start, *words, tmp_path / "two")
    start(*words, tmp_path / "one").end()
    one = result_of(tmp_path / "one")
    two = result_of(tmp_path / "two")
    assert two["mAP"] == pytest.approx(one["mAP"], abs=0.05)
    assert two["runs"][0]["ap"] == pytest.approx(one["runs"][0]["ap"], abs=0.5)


@pytest.mark.parametrize("bad", [0, 1])
def test_one_of_two_processes_fails(start, trained, place, tmp_path, bad):
    """Both end, with their number in the message; the other, which torchrun would end sooner, reports the loss."""
    (tmp_path / "few.json").write_text('{"sun": 0.5}')
    words = ("tag.py", trained[RP].checkpoint, place / "photos", "--cache", tmp_path / "cache", "--output", tmp_path)
    of_each = [words, words]
    of_each[bad] = (*words, "--threshold", tmp_path / "few.json")
    processes = start_processes(start, *of_each)
    for rank, why in ((bad, "--threshold: the file has no number for 'moon'"), (1 - bad, "another process has ended")):
        assert f"tag.py: process {rank} of 2: {why}" in processes[rank].end(2)[1]


def test_more_processes_than_photos(start, trained, place, tmp_path):
    """A torn photo of any name and a good one, into a new folder; a cache that one process cannot write."""
    torn = tmp_path / os.fsdecode(b"torn \xff.png")
    torn.write_bytes((place / "photos/a.png").read_bytes()[:700])
    words = ("tag.py", trained[RP].checkpoint, torn, place / "photos/a.png", "--output", tmp_path / "new/folder")
    good = (*words, "--cache", tmp_path / "cache")
    first, _, third = start_processes(start, good, good, (*words, "--cache /proc/x"))
    stderr = first.end()[1]
    assert stderr.count("torn \\udcff.png: cannot be read") == stderr.count("could not be read; they") == 1
    assert len(read_lines(tmp_path / "new/folder/tags.jsonl")) == 1
    assert "process 2: cache /proc/x/features.sqlite: continuing without it (" in third.end()[1]


def test_torchrun(place, tmp_path):
    """What happens to all processes alike is reported once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               REPOSITORY / "tag.py", "nowhere", place / "photos", "--cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.count("tag.py: process ") == 1
    assert "tag.py: process 0 of 2: checkpoint nowhere: no such file; pass a" in done.stderr


@pytest.mark.parametrize("words, code", [("llm_text.py sentences --count 9 --labels labels.txt --report", 0),
                                         ("datasets.py --check folder --data-root .", 2)])
def test_labels_of_any_script_into_any_pipe(command, tmp_path, words, code):
    """forked.py does the same with the methods. A photo whose name is not UTF-8 is named on stderr."""
    name = os.fsdecode(b"caf\xe9 \xff.png")
    (tmp_path / "labels.txt").write_text("größe\n日本", "utf-8")
    (tmp_path / "labels.csv").write_text("file,größe,日本,split\na.png,1,0,train\n名.png,0,1,test\n", "utf-8")
    for photo in ("a.png", "名.png", name):
        (tmp_path / photo).touch()
    done = command(*words.split(), expect=code, cwd=tmp_path)
    assert "größe" in done.stdout and "日本" in done.stdout
    assert code == 0 or "名.png cannot be read" in done.stderr and "\\udcff.png)" in done.stderr


@pytest.mark.parametrize("quiet", ["", "--quiet"])
def test_what_is_said_of_progress(start, place, tmp_path, monkeypatch, capsys, quiet):
    """A bar on a terminal; elsewhere a plain line a minute, and here every look at the clock takes a minute; nothing
    with --quiet."""
    words = f"--epochs 1 --features {place}/features.npz --output {tmp_path} --overwrite {quiet}"
    reader, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    start(RP, words, stderr=os.ttyname(terminal)).process.join()
    os.write(terminal, b"end")
    monkeypatch.setattr("time.time", count(step=61).__next__)
    adapter_rp.main(shlex.split(words))
    stderr = capsys.readouterr().err
    assert torch.cuda.is_available() or "no GPU found" in stderr
    assert ("training seed 0: epoch 1 of 1\n" in stderr) != bool(quiet)
    assert (b"training" in os.read(reader, 10_000)) != bool(quiet)
