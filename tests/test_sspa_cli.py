"""sspa.py as people run it: what it learns, what it leaves behind, several processes, and one clear line for every mistake."""
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
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import data
import scenes
import sspa
from conftest import REPOSITORY

FROZEN = ["--tune-image", "none"]
TINY = [*FROZEN, "--limit", 130, "--epochs", 2]


def result_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def scenes_run(command, tmp_path_factory):
    """One finished run on a part of the scenes, two seeds."""
    folder = tmp_path_factory.mktemp("run")
    return folder, command("sspa.py", *FROZEN, "--limit", 5000, "--epochs", 8, "--seed", 0, 1, "--output", folder)


@pytest.fixture(scope="module")
def tiny_run(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    command("sspa.py", *TINY, "--output", folder)
    return folder


# --- it learns --------------------------------------------------------------------------------------------------------

def test_scenes_beats_zero_shot(scenes_run):
    """A quarter of the pictures and less than half of the epochs of a full run; on the same 2,000 test pictures as every other number."""
    result = result_of(scenes_run[0])
    assert result["photo_count"] == 2000 and result["train_count"] == 5000
    for run in result["runs"]:
        assert run["mAP"] > result["zero_shot_mAP"] + 3, (run["mAP"], result["zero_shot_mAP"])
        assert run["mAP_regional"] > run["mAP_global"]


def test_record(scenes_run):
    folder, done = scenes_run
    result = result_of(folder)
    for key in ("method", "dataset", "backbone", "impl", "command", "commit", "seconds", "mAP", "mAP_std", "zero_shot_mAP", "runs", "per_class", "policy", "versions", "device", "peak_memory_mib", "config", "texts"):
        assert key in result
    assert (result["method"], result["dataset"], len(result["runs"]), len(result["per_class"])) == ("sspa", "scenes", 2, 18)
    assert [(run["seed"], run["ablation"]) for run in result["runs"]] == [(0, "none"), (1, "none")]
    assert result["mAP"] == pytest.approx(np.mean([r["mAP"] for r in result["runs"]])) and result["mAP_std"] == pytest.approx(np.std([r["mAP"] for r in result["runs"]], ddof=1))
    assert f"{result['mAP']:.2f}" in done.stdout and f"{result['zero_shot_mAP']:.2f}" in done.stdout and "image tower frozen" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.safetensors", "log.jsonl", "metrics.json"]
    assert len((folder / "log.jsonl").read_text().splitlines()) == 16
    assert not any(name.startswith("clip.") for name in load_file(folder / "checkpoint.safetensors"))


def test_asked_again_and_evaluated_again(scenes_run, command, tmp_path):
    folder, done = scenes_run
    words = [*FROZEN, "--limit", 5000, "--epochs", 8, "--seed", 0, 1, "--output", folder]
    again = command("sspa.py", *words)
    assert again.stdout == done.stdout and "is finished; --overwrite redoes it" in again.stderr
    assert "holds a finished run with other settings" in command("sspa.py", *words, "--temperature", 0.2, expect=2).stderr
    other = command("sspa.py", "--eval-only", "--checkpoint", folder / "checkpoint.safetensors", "--output", tmp_path, "--fusion", "sum")
    assert "was made with its own --fusion; what the command line says of it is not used" in other.stderr
    assert result_of(tmp_path)["mAP"] == pytest.approx(result_of(folder)["runs"][0]["mAP"], abs=1e-3)


def test_predict_and_explain(scenes_run, command, tmp_path):
    """JSON lines as in RP; a picture and a table of gates for every photo; greyscale, CMYK, 1 x 1000 pixels and animated files among them."""
    photos = tmp_path / "photos"
    photos.mkdir()
    picture = scenes.picture("test", 0)[0]
    picture.save(photos / "a.png")
    picture.convert("L").save(photos / "b.jpg")
    picture.convert("CMYK").save(photos / "c.jpg")
    picture.save(photos / "d.gif", save_all=True, append_images=[scenes.picture("test", 1)[0]])
    picture.resize((1, 1000)).save(photos / "e.png")
    (photos / "torn.jpg").write_bytes((photos / "b.jpg").read_bytes()[:700])
    checkpoint = scenes_run[0] / "checkpoint.safetensors"
    done = command("sspa.py", "--checkpoint", checkpoint, "--predict", photos, "--output", tmp_path / "out", "--top-k", 2)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["photo"] for line in lines] == [str(photos / name) for name in ("a.png", "b.jpg", "c.jpg", "d.gif", "e.png")]
    for line in lines:
        values = list(line["scores"].values())
        assert line["labels"] == list(line["scores"])[:2] and values == sorted(values, reverse=True) and set(line["scores"]) == set(scenes.NAMES)
    assert "torn.jpg" in done.stderr and (tmp_path / "out/predictions.png").is_file()
    done = command("sspa.py", "--checkpoint", checkpoint, "--explain", photos, "--output", tmp_path / "out")
    assert done.stdout.count("V-to-S gate %") == 5 and "torn.jpg" in done.stderr
    assert "scenes toy here" in done.stderr
    drawn = sorted(path.name for path in (tmp_path / "out/explain").iterdir())
    assert drawn == ["000_a.png", "001_b.png", "002_c.png", "003_d.png", "004_e.png"]
    with Image.open(tmp_path / "out/explain/000_a.png") as sheet:
        assert min(sheet.size) > 3 * sspa.TILE and len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 1000
    rows = re.findall(r"^(\w+) +([\d.]+) +([\d.]+)$", done.stdout.split(str(photos / "b.jpg"))[0], re.M)
    assert len(rows) == 10 and {name: float(score) for name, score, _ in rows} == pytest.approx({name: 100 * lines[0]["scores"][name] for name, _, _ in rows}, abs=0.06)


def test_similarity_maps_find_things(scenes_run):
    """The map after GDMA of a picture's own label differs from picture to picture, and lies in -1..1; gates lie in 0..1."""
    device = torch.device("cpu")
    config, clip, stored = sspa.open_checkpoint(sspa.set_up(sspa.parse(["--cpu", "--cache", ""]))[0], scenes_run[0] / "checkpoint.safetensors", device)
    model = sspa.restore(config, clip, stored, device)
    images = torch.stack([data.load_photo(clip, ("test", n)) for n in range(8)])
    with torch.no_grad():
        prediction = model(images, explain=True)
    assert prediction.similarity.abs().max() <= 1 + 1e-5 and prediction.similarity.std(0).mean() > 0.01
    torch.testing.assert_close(prediction.filtering.sum(-1), torch.ones(8, 18))
    for gate in (prediction.label_gate, prediction.region_gate):
        assert 0 < gate.min() and gate.max() < 1


# --- the same result, another way -------------------------------------------------------------------------------------

def tensors_agree(one, two, typical=1e-4, worst=5e-3):
    """AdamW gives a gradient that is near zero (the bias of attention keys, to which softmax is blind) steps of full size whatever its sign: so the
    worst entry may differ by a learning rate (6e-3), and a tensor of a few entries has no typical one. Elsewhere the typical entry differs by rounding,
    which another processor makes larger; a learning rate 2 percent larger changes some tensor five times as much."""
    one, two = load_file(one / "checkpoint.safetensors"), load_file(two / "checkpoint.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        difference = (one[name] - two[name]).abs()
        assert difference.max() < worst and (difference.numel() < 100 or difference.median() < typical), (name, difference.median(), difference.max())


@pytest.mark.parametrize("words", [("--impl", "reference"), ("--accumulate", 3), ("--cache-limit", 0), ("--workers", 1)])
def test_same_result_another_way(tiny_run, command, tmp_path, words):
    """Plain formulas; a batch in three parts; photos encoded anew in every epoch. (Cached features are rounded to half precision.)"""
    done = command("sspa.py", *TINY, *words, "--output", tmp_path)
    tensors_agree(tiny_run, tmp_path, *((2e-3, 5e-2) if "--cache-limit" in words else ()))
    assert result_of(tmp_path)["mAP"] == pytest.approx(result_of(tiny_run)["mAP"], abs=0.3)
    assert ("encoded anew in every epoch" in done.stderr) == ("--cache-limit" in words)


@pytest.mark.parametrize("words", [FROZEN, ["--tune-image", "full"]], ids=["frozen", "tuned"])
def test_two_processes_learn_what_one_learns(command, cache, tmp_path, words):
    """torchrun, PyTorch's DistributedDataParallel: same photos in every global batch, the same weights within rounding, one output."""
    scenes.picture("test", 0)[0].save(tmp_path / "photo.png")
    words = [*map(str, words), "--limit", "130", "--epochs", "2", "--batch-size", "33", "--accumulate", "2", "--predict", str(tmp_path / "photo.png")]  # one photo, two processes
    first = command("sspa.py", *words, "--output", tmp_path / "one")
    several = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(REPOSITORY / "sspa.py"), *words, "--cpu", "--cache", str(tmp_path / "cache"),
                              "--output", str(tmp_path / "two")], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert several.returncode == 0, several.stderr
    tensors_agree(tmp_path / "one", tmp_path / "two")
    one, two = (result_of(tmp_path / name) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2) and two["mAP"] == pytest.approx(one["mAP"], abs=0.3)
    one_photo, same_photo = json.loads(first.stdout)["scores"], json.loads(several.stdout)["scores"]
    assert same_photo == pytest.approx(one_photo, abs=0.02)
    assert one["photo_count"] == two["photo_count"] == 130 and one["zero_shot_mAP"] == pytest.approx(two["zero_shot_mAP"], abs=1e-3)


def test_tuned_tower_changes_and_is_kept(command, tmp_path):
    words = ["--limit", 130, "--epochs", 2, "--image-lr-factor", 1]
    done = command("sspa.py", *words, "--output", tmp_path)
    assert "image tower tuned" in done.stdout
    stored, original = load_file(tmp_path / "checkpoint.safetensors"), data.load_clip("scenes").model.visual.state_dict()
    assert (stored["clip.visual.conv1.weight"] - original["conv1.weight"]).abs().max() > 1e-4
    assert not any(name.startswith("clip.") and not name.startswith("clip.visual.") for name in stored)
    # with an empty cache: the zero-shot line must still be that of the untouched CLIP
    again = subprocess.run([sys.executable, str(REPOSITORY / "sspa.py"), "--eval-only", "--checkpoint", str(tmp_path / "checkpoint.safetensors"), "--limit", "130", "--cpu", "--cache", str(tmp_path / "fresh"),
                            "--output", str(tmp_path / "again")], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    for key in ("mAP", "zero_shot_mAP"):
        assert result_of(tmp_path / "again")[key] == pytest.approx(result_of(tmp_path)[key], abs=1e-3)


@pytest.mark.parametrize("words", [("--precision", "bf16"), ("--batch-size", 1, "--limit", 20), ("--attention-scale", 0, "--projection-init", "uniform", "--context-init", "random", "--context-length", 7), ("--ema", 0, "--warm-up", 0),
                                   ("--quaternion-readout", "mean", "--quaternion-layers", 1, "--quaternion-axes", "gkc"), ("--quaternion-activation", "tanh", "--quaternion-hidden", 0.3)], ids=str)
def test_other_settings_run(command, tmp_path, words):
    command("sspa.py", *TINY, *words, "--output", tmp_path)
    assert 0 < result_of(tmp_path)["mAP"] < 100


def test_ablations(command, tmp_path):
    words = [*FROZEN, "--limit", 130, "--epochs", 1, "--seed", 0, 1, "--output", tmp_path]
    done = command("sspa.py", *words, "--ablate", "no DSF", "max aggregator", "global branch only", "no LLM description")
    runs = result_of(tmp_path)["runs"]
    assert [(run["ablation"], run["seed"]) for run in runs] == [(name, seed) for name in ("none", "no DSF", "max aggregator", "global branch only", "no LLM description") for seed in (0, 1)]
    assert all(name in done.stdout for name in ("no DSF", "max aggregator", "global branch only", "no LLM description")) and done.stdout.count("±") == 5
    by_name = {(run["ablation"], run["seed"]): run for run in runs}
    assert len({run["mAP"] for run in runs}) == 10 and by_name["global branch only", 0]["mAP_regional"] is None
    assert by_name["global branch only", 0]["parameters"] == 2 * 2 * 96 // 2 * 2 + 2 and by_name["no DSF", 0]["parameters"] < by_name["none", 0]["parameters"]


def test_every_ablation_changes_its_flag():
    base = sspa.parse(["--cpu"])
    for name, changes in sspa.ABLATIONS.items():
        words = [word for field, value in changes.items() for word in ([f"--{field.replace('_', '-')}"] + ([] if value is True else [value]))]
        changed = sspa.parse(["--cpu", *words])
        assert changed == sspa.dataclasses.replace(base, **changes) and changed != base, name


# --- real photos, real trouble ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [(), FROZEN], ids=["tuned", "frozen"])
def test_voc2007_real_files_random_weights(command, tmp_path, shared, words):
    """Mechanics only: the weights are random."""
    command("sspa.py", "--dataset", "voc2007", "--data-root", shared, "--backbone", "ViT-B-32", "--pretrained", "none", "--limit", 12, "--epochs", 1, "--batch-size", 6, *words, "--output", tmp_path)
    result = result_of(tmp_path)
    assert result["photo_count"] == 12 and "difficult=ignore" in result["policy"] and result["label_count"] == 20 and result["config"]["lr"] == 5e-5


def voc_tree(root, count=8):
    """A VOC2007 tree of scenes pictures; every second photo shows a boat, the third file is torn, photo 4 has no object at all."""
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    for split, start in (("trainval", 0), ("test", count)):
        ids = [f"{n:06d}" for n in range(start, start + count)]
        (base / f"ImageSets/Main/{split}.txt").write_text("\n".join(ids))
        for n, image_id in enumerate(ids):
            scenes.picture("train", start + n)[0].save(base / f"JPEGImages/{image_id}.jpg")
            names = [] if n == 4 else ["boat"] * (n % 2) + ["car"]
            (base / f"Annotations/{image_id}.xml").write_text("<annotation>" + "".join(f"<object><name>{name}</name><difficult>0</difficult></object>" for name in names) + "</annotation>")
        torn = base / f"JPEGImages/{ids[3]}.jpg"
        torn.write_bytes(torn.read_bytes()[:600])


@pytest.mark.parametrize("words", [("--tune-image", "full"), FROZEN, (*FROZEN, "--cache-limit", 0)], ids=str)
def test_torn_photos_and_absent_labels_in_training(command, tmp_path, words):
    """A torn JPEG in training and in test is named and left out; a batch without any label, labels without a positive, and one photo a step do no harm."""
    voc_tree(tmp_path)
    done = command("sspa.py", "--dataset", "voc2007", "--data-root", tmp_path, "--backbone", "scenes", "--epochs", 2, "--batch-size", 1, *words, "--output", tmp_path / "out")
    result = result_of(tmp_path / "out")
    assert result["photo_count"] == 7 and done.stderr.count("000011.jpg") >= 1 and done.stderr.count("000003.jpg") == 1
    assert [entry["ap"] is not None for entry in result["per_class"]] == [entry["positives"] > 0 for entry in result["per_class"]]


def test_descriptions_with_holes(command, tmp_path):
    table = {**{name: f"{name} is a thing." for name in scenes.NAMES}, "moon": "  ", "unicorn": "Unicorn is not here."}
    del table["sun"]
    (tmp_path / "d.json").write_text(json.dumps({"descriptions": table}))
    done = command("sspa.py", *TINY, "--descriptions", tmp_path / "d.json", "--output", tmp_path / "out")
    assert "no description of sun, moon (2 of 18 labels); the template stands alone there" in done.stderr and done.stderr.count("template stands alone") == 1
    assert "1 descriptions of other labels not used (unicorn)" in done.stderr
    texts = result_of(tmp_path / "out")["texts"]
    assert texts[0] == "A photo of a sun." and "is a thing. A photo of a" in texts[2]


def test_interrupt_and_resume(command, cache, tmp_path):
    """Ctrl-C in the second of two seeds, then the same command: the same weights and numbers as an undisturbed run."""
    words = [*FROZEN, "--limit", "500", "--epochs", "12", "--seed", "0", "1"]
    full = [sys.executable, str(REPOSITORY / "sspa.py"), *words, "--cpu", "--cache", cache, "--output", str(tmp_path / "stopped")]
    process = subprocess.Popen(full, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "RESUME_SECONDS": "0"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a suite run in the background would hand down "ignore"
    deadline = time.time() + 180
    while not ((tmp_path / "stopped/runs.json").is_file() and (tmp_path / "stopped/resume.pt").is_file()) and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr and not (tmp_path / "stopped/metrics.json").exists()
    again = command("sspa.py", *words, "--output", tmp_path / "stopped")
    assert "going on after epoch" in again.stderr and "SSPA, seed 0" not in again.stderr
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["checkpoint.safetensors", "log.jsonl", "metrics.json"]
    command("sspa.py", *words, "--output", tmp_path / "whole")
    tensors_agree(tmp_path / "stopped", tmp_path / "whole", 2e-3, 5e-2)
    for one, two in zip(result_of(tmp_path / "stopped")["runs"], result_of(tmp_path / "whole")["runs"]):
        assert one["mAP"] == pytest.approx(two["mAP"], abs=0.3)
    assert len((tmp_path / "stopped/log.jsonl").read_text().splitlines()) == 24


def test_divergence_keeps_the_last_good_weights(command, tmp_path, monkeypatch, cache):
    done = command("sspa.py", *TINY, "--lr", 1e30, "--prompt-lr", 1e30, "--output", tmp_path / "at_once", expect=3)
    assert "training diverged in epoch 1" in done.stderr and "lower --lr" in done.stderr and not (tmp_path / "at_once/metrics.json").exists()
    # a loss that becomes NaN in the third epoch of four
    forward, calls = sspa.SSPA.forward, []

    def poisoned(self, features, targets=None, **other):
        calls.append(targets is not None)
        loss = forward(self, features, targets, **other)
        return loss * float("nan") if sum(calls) > 5 and targets is not None else loss
    monkeypatch.setattr(sspa.SSPA, "forward", poisoned)
    monkeypatch.setattr(sspa, "RESUME_SECONDS", 0)
    folder = tmp_path / "later"
    with pytest.raises(sspa.Diverged, match=r"diverged in epoch 3 .* the weights after epoch \d are kept in .*last_good.safetensors"):
        sspa.main([*map(str, TINY), "--epochs", "4", "--cpu", "--cache", cache, "--output", str(folder)])
    assert not (folder / "metrics.json").exists() and all(t.isfinite().all() for t in load_file(folder / "last_good.safetensors").values())
    monkeypatch.undo()
    command("sspa.py", "--eval-only", "--checkpoint", folder / "last_good.safetensors", "--limit", 130)


def test_checkpoint_says_what_it_is(tiny_run):
    with safe_open(str(tiny_run / "checkpoint.safetensors"), "pt") as stored:
        metadata = stored.metadata()
    assert json.loads(metadata["names"]) == scenes.NAMES and json.loads(metadata["texts"])[0].endswith("A photo of a sun.") and json.loads(metadata["settings"])["epochs"] == 2


# --- mistakes ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, tiny_run):
    folder = tmp_path_factory.mktemp("mistakes")
    for name, content in (("empty.txt", "\n"), ("twice.txt", "sun\nmoon\nSun\n"), ("reversed.txt", "\n".join(reversed(scenes.NAMES))), ("few.txt", "sun\nmoon\n"), ("foreign.txt", "sun\nzebra\n"), ("file", ""),
                          ("list.json", "[1]"), ("none.json", '{"descriptions": {"zebra": "Zebra is striped."}}'), ("torn.json", '{"desc'), ("numbers.json", '{"sun": 3}')):
        (folder / name).write_text(content)
    (folder / "no_photos").mkdir()
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    scenes.picture("test", 0)[0].save(folder / "fine.png")
    (folder / "bad.safetensors").write_bytes(b"\0" * 20)
    (folder / "checkpoint.safetensors").write_bytes((tiny_run / "checkpoint.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize("words, message", [
    ("--labels {f}/missing.txt", "no such file"), ("--labels {f}/empty.txt", "holds no label"), ("--labels {f}/twice.txt", "'Sun' stands twice"), ("--labels {f}/foreign.txt", "'zebra' is no label of scenes"),
    ("--descriptions {f}/missing.json", "no such file"), ("--descriptions {f}/torn.json", "not valid JSON"), ("--descriptions {f}/list.json", "must be {{"), ("--descriptions {f}/numbers.json", "must be {{"),
    ("--descriptions {f}/none.json", "describes none of the 18 labels"), ("--backbone ViT-B-61", "did you mean ViT-B-16"), ("--dataset voc2007 --data-root {f} --backbone ViT-B-32 --pretrained none", "VOCtrainval_06-Nov-2007.tar"),
    ("--checkpoint {f}/checkpoint.safetensors --labels {f}/reversed.txt --predict {f}/fine.png", "another order of them (label 1 is 'sun' there and 'ball' here)"),
    ("--checkpoint {f}/checkpoint.safetensors --labels {f}/few.txt --eval-only", "it has 18 labels, not 2"), ("--checkpoint {f}/checkpoint.safetensors --eval-only --dataset voc2007", "other labels"),
    ("--checkpoint {f}/checkpoint.safetensors --backbone ViT-B-32 --pretrained none --predict {f}/fine.png", "trained on scenes, not on ViT-B-32"), ("--checkpoint {f}/bad.safetensors --eval-only", "cannot be read"),
    ("--checkpoint {f}/checkpoint.safetensors", "needs --eval-only, --predict PATH or --explain PATH"), ("--eval-only", "needs --checkpoint"), ("--checkpoint x --ablate", "leave --ablate out"),
    ("--checkpoint {f}/checkpoint.safetensors --predict {f}/torn.jpg", "no photo could be read"), ("--checkpoint {f}/checkpoint.safetensors --explain {f}/torn.jpg", "no photo could be read"),
    ("--predict {f}/no_photos", "no photo in this folder"), ("--explain {f}/nowhere", "no such file or folder"), ("--output {f}/file", "is a file, not a folder"), ("--output {f}/file/under", "cannot write"),
    ("--seed 1 1", "not repeat"), ("--epochs 0", "1 or more"), ("--accumulate 0", "1 or more"), ("--limit 0", "1 or more"), ("--temperature 0", "above 0"), ("--prior 1", "between 0 and 1"), ("--ema 1", "0..1"), ("--lr 0", "above 0"),
    ("--resolution 65", "multiple of 8, the patch size"), ("--backbone RN50 --pretrained none --resolution 225", "multiple of 32"), ("--context-length 40", "leave room for the label"), ("--ablate nothing", "choose among"),
    ("--ablate --no-gate", "leave the flags of single ablations out"), ("--branches global --explain {f}/torn.jpg", "draws the regional branch"), ("--precision fp16", "needs a GPU"), ("--gamma-neg nan", "0 or more")])
def test_mistakes_in_one_line(mistakes, words, message, tmp_path, monkeypatch, capsys, cache):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.UsageError) as caught:
        sspa.main(words.format(f=mistakes).split() + ["--cpu", "--cache", cache, *([] if "--checkpoint" in words else FROZEN if "--ablate" not in words else [])])
    assert message.replace("{{", "{") in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("runs/*/*/metrics.json"))


def test_exit_codes_of_the_real_script(command, mistakes):
    assert "--gpu 7: this machine has" in command("sspa.py", "--gpu", 7, expect=2).stderr
    missing = command("sspa.py", "--labels", mistakes / "missing.txt", expect=2)
    assert missing.stdout == "" and missing.stderr.count("\n") == 1 and missing.stderr.startswith("sspa.py: label file")
    command("sspa.py", "--dataset", "imagenet", expect=2)


def test_help_and_readme(command):
    shown = command("sspa.py", "--help").stdout
    for name in (field.name for field in sspa.dataclasses.fields(sspa.Config)):
        assert "--" + name.replace("_", "-") in shown
    readme = (REPOSITORY / "README.md").read_text()
    commands = re.findall(r"^\s*(python sspa\.py.*?)(?:\s{2,}.*)?$", readme, re.M)
    assert len(commands) >= 3
    for line in commands:
        if not line.endswith("--help"):
            sspa.parse(shlex.split(line)[2:])
    # "Check this against the PDF" names every numbered choice of the script
    section = readme.split("## Check this against the PDF")[1].split("\n## ")[0]
    for number in range(1, 15):
        assert re.search(rf"\bD{number}\b", section) and re.search(rf"^ {{4}}D{number}\s", sspa.__doc__, re.M), f"D{number}"
