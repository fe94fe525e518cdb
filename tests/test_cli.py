"""The real command line: what it learns, what it leaves behind, and one clear line for every mistake."""
import doctest
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import adapter_rp
import data
import metrics
import scenes
import sspa
from conftest import REPOSITORY


def result_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def mean_map(result, noise_std):
    return np.mean([run["mAP"] for run in result["runs"] if run["noise_std"] == noise_std])


@pytest.fixture(scope="module")
def scenes_run(command, tmp_path_factory):
    """One finished run on the scenes, three seeds, with and without noise."""
    folder = tmp_path_factory.mktemp("run")
    return folder, command("adapter_rp.py", "--noise-std", 0.15, 0, "--seed", 0, 1, 2, "--output", folder)


# --- it learns --------------------------------------------------------------------------------------------------------

def test_scenes_noise_beats_none_and_zero_shot(scenes_run):
    result = result_of(scenes_run[0])
    assert mean_map(result, 0.15) > result["zero_shot_mAP"] + 2.5
    assert mean_map(result, 0.15) > mean_map(result, 0) + 1.5
    assert min(run["mAP"] for run in result["runs"] if run["noise_std"] == 0.15) > max(run["mAP"] for run in result["runs"] if run["noise_std"] == 0)
    shown = next(table for table in json.loads((REPOSITORY / "assets/tables.json").read_text())["tables"] if table["name"] == "rp-law")["rows"][0]
    for noise_std, cell in ((0.15, shown["cells"][0]), (0, shown["cells"][3])):  # what the README prints is what the code gives
        assert shown["label"] == "drawn scenes" and abs(mean_map(result, noise_std) - cell["mean"]) < 0.3


def test_real_photos_noise_and_magnitude(command, tmp_path, shared):
    """2,476 real photos, labelled by an adapter that saw captions only: noise helps, and so does keeping the magnitude."""
    features = shared / "photo_embeddings" / "voc2007_even.npz"
    for name, extra in (("raw", []), ("unit", ["--normalize"])):
        command("adapter_rp.py", "--features", features, "--noise-std", 0.15, 0, "--seed", 0, 1, "--output", tmp_path / name, *extra)
    raw, unit = result_of(tmp_path / "raw"), result_of(tmp_path / "unit")
    assert mean_map(raw, 0.15) > mean_map(raw, 0) + 5
    assert mean_map(raw, 0.15) > raw["zero_shot_mAP"] + 2
    assert mean_map(raw, 0.15) > mean_map(unit, 0.15) + 1


def test_labels_never_trained_on(command, tmp_path):
    """The label-embedding head, trained on twelve labels, ranks the other six far above chance."""
    seen, unseen = scenes.NAMES[:12], scenes.NAMES[12:]
    (tmp_path / "seen.txt").write_text("\n".join(seen))
    (tmp_path / "unseen.txt").write_text("\n".join(unseen))
    command("adapter_rp.py", "--head", "label-embedding", "--labels", tmp_path / "seen.txt", "--output", tmp_path / "run", "--text-count", 3000)
    command("adapter_rp.py", "--eval-only", "--checkpoint", tmp_path / "run/checkpoint.safetensors", "--labels", tmp_path / "unseen.txt", "--output", tmp_path / "eval")
    result = result_of(tmp_path / "eval")
    chance = 100 * np.mean([entry["positives"] for entry in result["per_class"]]) / result["photo_count"]
    assert [entry["name"] for entry in result["per_class"]] == unseen and result["mAP"] > 2 * chance
    refused = command("adapter_rp.py", "--eval-only", "--checkpoint", tmp_path / "run/checkpoint.safetensors", "--backbone", "ViT-B-32", "--pretrained", "none", expect=2)
    assert "trained on embeddings of scenes" in refused.stderr


# --- what it leaves ---------------------------------------------------------------------------------------------------

def test_record(scenes_run):
    folder, done = scenes_run
    result = result_of(folder)
    for key in ("method", "dataset", "backbone", "impl", "command", "commit", "seconds", "mAP", "mAP_std", "zero_shot_mAP", "runs", "per_class", "policy", "versions", "device", "peak_memory_mib", "config"):
        assert key in result
    assert (result["method"], result["dataset"], len(result["runs"]), len(result["per_class"])) == ("rp", "scenes", 6, 18)
    assert result["mAP"] == pytest.approx(mean_map(result, 0.15)) and result["mAP_std"] == pytest.approx(np.std([r["mAP"] for r in result["runs"] if r["noise_std"] == 0.15], ddof=1))
    assert "--noise-std 0.15 0" in result["command"] and f"{result['mAP']:.2f}" in done.stdout and f"{result['zero_shot_mAP']:.2f}" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.safetensors", "log.jsonl", "metrics.json"]
    assert len((folder / "log.jsonl").read_text().splitlines()) == 30
    assert set(load_file(folder / "checkpoint.safetensors")) == {"w1", "b1", "w2", "b2"}


def test_asked_again(scenes_run, command):
    folder, done = scenes_run
    words = ["--noise-std", 0.15, 0, "--seed", 0, 1, 2, "--output", folder]
    before = (folder / "metrics.json").read_bytes()
    again = command("adapter_rp.py", *words)
    assert again.stdout == done.stdout and "is finished; --overwrite redoes it" in again.stderr
    refused = command("adapter_rp.py", *words, "--normalize", expect=2)
    assert "holds a finished run with other settings" in refused.stderr
    assert (folder / "metrics.json").read_bytes() == before


def test_default_folder_keeps_the_older_run(command, tmp_path):
    words = ["--text-count", 200, "--epochs", 1, "--limit", 60]
    command("adapter_rp.py", *words, cwd=tmp_path)
    moved = command("adapter_rp.py", *words, "--adapter", "linear", cwd=tmp_path)
    assert "it is now runs/rp/scenes-1" in moved.stderr
    assert result_of(tmp_path / "runs/rp/scenes")["config"]["adapter"] == "linear" and result_of(tmp_path / "runs/rp/scenes-1")["config"]["adapter"] == "mlp"


def test_eval_only_repeats_the_number(scenes_run, command, tmp_path):
    command("adapter_rp.py", "--eval-only", "--checkpoint", scenes_run[0] / "checkpoint.safetensors", "--output", tmp_path)
    first = result_of(scenes_run[0])["runs"][0]
    assert (first["seed"], first["noise_std"]) == (0, 0.15) and result_of(tmp_path)["mAP"] == pytest.approx(first["mAP"], abs=1e-6)


def test_predict(scenes_run, command, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(3):
        scenes.picture("test", index)[0].save(photos / f"{index}.jpg")
    (photos / "torn.jpg").write_bytes((photos / "0.jpg").read_bytes()[:700])
    done = command("adapter_rp.py", "--checkpoint", scenes_run[0] / "checkpoint.safetensors", "--predict", photos, "--output", tmp_path / "out", "--top-k", 2)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["photo"] for line in lines] == [str(photos / f"{index}.jpg") for index in range(3)]
    for line in lines:
        values = list(line["scores"].values())
        assert line["labels"] == list(line["scores"])[:2] and values == sorted(values, reverse=True) and set(line["scores"]) == set(scenes.NAMES)
    assert "1 of 4 photos could not be read" in done.stderr and "torn.jpg" in done.stderr
    with Image.open(tmp_path / "out" / "predictions.png") as sheet:
        assert min(sheet.size) > 300
    above = command("adapter_rp.py", "--checkpoint", scenes_run[0] / "checkpoint.safetensors", "--predict", photos / "0.jpg", "--output", tmp_path / "out", "--threshold", 0.3)
    (line,) = [json.loads(line) for line in above.stdout.splitlines()]
    assert line["labels"] == [name for name, score in line["scores"].items() if score >= 0.3]


def test_own_words(command, tmp_path):
    """From a list of words to tagged photos, without any text file: trains first, stdout holds the JSON lines only."""
    (tmp_path / "words.txt").write_text("sailboat\nhouse\nred apple\n")
    scenes.picture("test", 5)[0].save(tmp_path / "photo.png")
    done = command("adapter_rp.py", "--labels", tmp_path / "words.txt", "--predict", tmp_path / "photo.png", "--output", tmp_path / "out", "--text-count", 500, "--epochs", 3)
    assert set(json.loads(done.stdout)["scores"]) == {"sailboat", "house", "red apple"}
    assert "template sentences (written by a fixed pattern, not by a language model)" in done.stderr and "nothing to score" in done.stderr
    assert result_of(tmp_path / "out")["mAP"] is None


def test_texts_and_captions(command, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text, "labels": [scenes.NAMES[c] for c in row.nonzero()[0]]}) + "\n" for text, row in zip(*scenes.sentences(400, 2))))
    (tmp_path / "c.txt").write_text("\n".join(scenes.sentences(400, 3)[0]))
    for words in (["--texts", tmp_path / "t.jsonl"], ["--captions", tmp_path / "c.txt"], ["--texts", tmp_path / "t.jsonl", "--held-out-text", 0.25, "--loss", "ranking", "--zero-shot-weight", 0.3]):
        done = command("adapter_rp.py", *words, "--epochs", 4, "--limit", 300, "--output", tmp_path / "out", "--overwrite")
        assert result_of(tmp_path / "out")["text_count"] == 300 and ("text mAP" in done.stdout) == ("--held-out-text" in words)


def test_voc2007_real_files_random_weights(command, tmp_path, shared):
    """Mechanics only: the weights are random."""
    command("adapter_rp.py", "--dataset", "voc2007", "--data-root", shared, "--backbone", "ViT-B-32", "--pretrained", "none", "--limit", 24, "--text-count", 64, "--epochs", 1, "--output", tmp_path)
    result = result_of(tmp_path)
    assert result["photo_count"] == 24 and "difficult=ignore" in result["policy"] and result["label_count"] == 20


# --- interrupted ------------------------------------------------------------------------------------------------------

def test_interrupt_and_resume(command, cache, tmp_path):
    """Ctrl-C in training, then the same command: the same adapter as an undisturbed run."""
    words = ["--limit", "1500", "--epochs", "200", "--batch-size", "128"]
    full = [sys.executable, str(REPOSITORY / "adapter_rp.py"), *words, "--cpu", "--cache", cache, "--output", str(tmp_path / "stopped")]
    process = subprocess.Popen(full, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "RESUME_SECONDS": "0.2"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a suite run in the background would hand down "ignore"
    deadline = time.time() + 120
    while not (tmp_path / "stopped" / "resume.pt").is_file() and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    again = command("adapter_rp.py", *words, "--output", tmp_path / "stopped")
    assert "going on after epoch" in again.stderr and not (tmp_path / "stopped" / "resume.pt").exists()
    command("adapter_rp.py", *words, "--output", tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("stopped", "whole"))
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), two[name].numpy(), rtol=1e-3, atol=1e-4)
    assert result_of(tmp_path / "stopped")["mAP"] == pytest.approx(result_of(tmp_path / "whole")["mAP"], abs=0.05)
    assert len((tmp_path / "stopped" / "log.jsonl").read_text().splitlines()) == 200


def test_resume_file_of_another_run_or_damaged(tmp_path, capsys):
    adapter = adapter_rp.Adapter(4, 2, [0])
    optimiser = adapter_rp.torch.optim.AdamW(adapter.parameters())
    settings, others = (adapter_rp.settings_of(adapter_rp.parse(["--epochs", epochs])) for epochs in ("2", "3"))
    adapter_rp.save_resume(tmp_path / "r.pt", settings, adapter, optimiser, [{"epoch": 1}])
    assert adapter_rp.load_resume(tmp_path / "r.pt", settings, adapter, optimiser) == (1, [{"epoch": 1}])
    assert adapter_rp.load_resume(tmp_path / "r.pt", others, adapter, optimiser) == (0, [])
    assert (tmp_path / "r.pt.old").is_file() and not (tmp_path / "r.pt").exists()
    (tmp_path / "r.pt").write_bytes(b"nonsense")
    assert adapter_rp.load_resume(tmp_path / "r.pt", settings, adapter, optimiser) == (0, [])
    assert capsys.readouterr().err.count("training starts anew") == 2


def test_divergence_is_exit_code_3(command, tmp_path):
    done = command("adapter_rp.py", "--lr", 1e30, "--epochs", 3, "--text-count", 300, "--limit", 300, "--output", tmp_path, expect=3)
    assert "training diverged" in done.stderr and "lower --lr" in done.stderr and not (tmp_path / "metrics.json").exists()


# --- mistakes ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, scenes_run):
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty.txt").write_text("\n")
    (folder / "twice.txt").write_text("sun\nmoon\nSun\n")
    (folder / "reversed.txt").write_text("\n".join(reversed(scenes.NAMES)))
    (folder / "few.txt").write_text("sun\nmoon\n")
    (folder / "unlabelled.jsonl").write_text('{"text": "a sun", "labels": []}\n')
    (folder / "foreign.jsonl").write_text('{"text": "a zebra", "labels": ["zebra"]}\n')
    (folder / "captions.txt").write_text("nothing of interest\n")
    (folder / "broken.npz").write_bytes(b"PK")
    (folder / "no_photos").mkdir()
    (folder / "file").write_text("")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "bad.safetensors").write_bytes(b"\0" * 20)
    (folder / "checkpoint.safetensors").write_bytes((scenes_run[0] / "checkpoint.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize("words, message", [
    ("--labels {f}/none.txt", "no such file"), ("--labels {f}/empty.txt", "holds no label"), ("--labels {f}/twice.txt", "'Sun' stands twice"),
    ("--texts {f}/unlabelled.jsonl", "no usable text"), ("--texts {f}/foreign.jsonl", "label 'zebra' is not in the label list"), ("--texts {f}/none.jsonl", "no such file"),
    ("--captions {f}/captions.txt", "none of its 1 captions"), ("--texts a --captions b", "exclude each other"),
    ("--features {f}/broken.npz", "not a readable .npz"), ("--features {f}/none.npz", "no such file"), ("--features {f}/broken.npz --predict {f}", "not an encoder"),
    ("--backbone ViT-B-61", "did you mean ViT-B-16"), ("--dataset voc2007 --data-root {f} --pretrained none", "VOCtrainval_06-Nov-2007.tar"),
    ("--checkpoint {f}/checkpoint.safetensors --labels {f}/reversed.txt --predict {f}/torn.jpg", "another order of them (label 1 is 'sun' there and 'ball' here)"),
    ("--checkpoint {f}/checkpoint.safetensors --labels {f}/few.txt --eval-only", "it has 18 labels, not 2"), ("--checkpoint {f}/bad.safetensors --eval-only", "cannot be read"),
    ("--checkpoint {f}/none.safetensors --eval-only", "cannot be read"), ("--checkpoint {f}/checkpoint.safetensors", "needs --eval-only or --predict"), ("--eval-only", "needs --checkpoint"),
    ("--checkpoint {f}/checkpoint.safetensors --predict {f}/torn.jpg", "no photo could be read"), ("--predict {f}/no_photos", "no photo in this folder"), ("--predict {f}/nowhere", "no such file or folder"),
    ("--output {f}/file", "is a file, not a folder"), ("--output {f}/file/under", "cannot write"), ("--noise-std -1", "0 or more"), ("--noise-std nan", "0 or more"), ("--seed 1 1", "not repeat"),
    ("--epochs 0", "1 or more"), ("--limit 0", "1 or more"), ("--zero-shot-weight 2", "0..1"), ("--resolution 65", "multiple of 8, the patch size"), ("--lr 0", "above 0")])
def test_mistakes_in_one_line(mistakes, words, message, tmp_path, monkeypatch, capsys, cache):
    monkeypatch.chdir(tmp_path)
    words = words.format(f=mistakes).split() + ["--cpu", "--cache", cache]
    with pytest.raises(data.UsageError) as caught:
        adapter_rp.main(words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("runs/*/*/metrics.json"))


def test_exit_codes_of_the_real_script(command, mistakes):
    assert "--gpu 7: this machine has" in command("adapter_rp.py", "--gpu", 7, expect=2).stderr
    missing = command("adapter_rp.py", "--labels", mistakes / "none.txt", expect=2)
    assert missing.stdout == "" and missing.stderr.count("\n") == 1 and missing.stderr.startswith("adapter_rp.py: label file")
    command("adapter_rp.py", "--dataset", "imagenet", expect=2)


# --- words ------------------------------------------------------------------------------------------------------------

def test_help_is_complete(command):
    shown = command("adapter_rp.py", "--help").stdout
    for name in (field.name for field in adapter_rp.dataclasses.fields(adapter_rp.Config)):
        assert "--" + name.replace("_", "-") in shown
    assert "normalise (if asked), add noise, do not renormalise" in re.sub(r"\s+", " ", shown)


@pytest.mark.parametrize("module", [adapter_rp, sspa, data, metrics, scenes])
def test_docstring_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried >= 3 and failed == 0


def test_readme_commands_exist():
    """Every command line in the README parses."""
    commands = re.findall(r"^\s*(python adapter_rp\.py.*?)(?:\s{2,}.*)?$", (REPOSITORY / "README.md").read_text(), re.M)
    assert len(commands) >= 5
    for line in commands:
        if line.endswith("--help"):
            continue
        adapter_rp.parse(shlex.split(line)[2:])


def test_run_all_says_what_it_can_do():
    shown = subprocess.run(["bash", str(REPOSITORY / "run_all.sh"), "help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "demo" in shown.stdout and "test" in shown.stdout
    assert subprocess.run(["bash", str(REPOSITORY / "run_all.sh"), "dmo"], capture_output=True).returncode == 2
