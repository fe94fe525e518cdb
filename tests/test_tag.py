"""tag.py and explain.py: what they write, what is cached, what is never replaced; tag.load."""
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from forked import BOTH, RP, SSPA, content_of, read_lines, start_two
from PIL import Image

import embed
import scenes
import tag


def tagged(checkpoint, photos, *words):
    """tag.py in this process, with the cache of the current folder -> lines"""
    tag.main([str(word) for word in (checkpoint, photos, "--cpu", "--quiet", "--cache", "cache", *words)])
    return read_lines(Path("tags/tags.jsonl"))


def is_line_of(line, scores):
    return list(map(line["scores"].get, scenes.NAMES)) == pytest.approx(scores.tolist(), abs=1e-4)


@BOTH
def test_lines(start, trained, place, tmp_path, script):
    """A JSON line a photo, whatever bytes its name has; what cannot be read is named. The tags are the labels above the
    threshold, or the K strongest. Files hold what --stdout streams, and two processes write what one writes."""
    words = ("tag.py", trained[script].checkpoint, place / "photos")
    stdout, stderr = start(*words, "--stdout --threshold 0.4").end()
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert [line["photo"] for line in lines] == sorted(map(str, (place / "photos").glob("[!t]*.*g")))
    assert stderr.count("torn.jpg: cannot be read (") == 1 and "the scenes toy here" in stderr
    for line in lines:
        names = sorted(line["scores"], key=line["scores"].get, reverse=True)
        assert names == list(line["scores"]) and set(names) == set(scenes.NAMES)
        assert line["labels"] == [name for name in names if line["scores"][name] > 0.4]

    start_two(start, *words, "--threshold 0.4 --cache", tmp_path / "cache", "--output", tmp_path)
    for line, other in zip(lines, read_lines(tmp_path / "tags.jsonl"), strict=True):
        assert other["labels"] == line["labels"] and other["scores"] == pytest.approx(line["scores"], abs=1e-4)
    assert min(Image.open(tmp_path / "contact_sheet.png").size) > 200
    stdout, _ = start(*words, "--top-k 2 --html --output", tmp_path).end()
    assert stdout.startswith("3 photos tagged, 0 of them")
    page = (tmp_path / "tags.html").read_text()
    for line, other in zip(lines, read_lines(tmp_path / "tags.jsonl"), strict=True):
        assert other["labels"] == list(other["scores"]) == list(line["scores"])[:2]
        assert f'"scores": {json.dumps(list(other["scores"].items()))}' in page


def test_a_line_is_there_before_the_next_photo(monkeypatch, tmp_path):
    out = tmp_path / "out"

    def scored(model, photos, options):
        for row in range(3):
            assert len(read_lines(out)) == row
            yield "name", np.zeros(1)

    monkeypatch.setattr(tag, "open_model", lambda options: (SimpleNamespace(labels=["sun"]), []))
    monkeypatch.setattr(tag, "scored", scored)
    with open(out, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        tag.main(["checkpoint", "photos", "--stdout"])


@BOTH
def test_only_what_is_new_is_encoded(trained, tmp_path, monkeypatch, script):
    """Again, with another threshold or the folder moved: nothing. A photo more: one. Another model: own scores."""
    counts = []
    decode = embed._decode
    monkeypatch.setattr(embed, "_decode", lambda *words: counts.append(len(words[2])) or decode(*words))
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for row in range(3):
        scenes.picture("test", row)[0].save(f"photos/{row}.png")
    checkpoint = trained[script].checkpoint
    first = tagged(checkpoint, "photos")
    Path("photos").rename("moved")
    moved = tagged(checkpoint, "moved", "--threshold", 0)
    assert [line["scores"] for line in moved] == [line["scores"] for line in first] and counts == [3]
    scenes.picture("test", 3)[0].save("moved/3.png")
    tagged(checkpoint, "moved")
    assert counts == [3, 1]
    second = trained[script].folder / "checkpoints/seed 1.safetensors"
    assert is_line_of(tagged(second, "moved")[0], tag.load(second).scores(["moved/0.png"])[0])


def test_good_tags_are_replaced_at_the_end_only(trained, place, tmp_path, monkeypatch):
    """A run that fails half way, and one in which no photo can be read, leave what was there."""
    monkeypatch.chdir(tmp_path)
    words = (trained[RP].checkpoint, place / "photos", "--html")
    tagged(*words)
    before = content_of(tmp_path / "tags")
    with monkeypatch.context() as patch:
        patch.setattr(tag, "line_of", lambda *words: "{}")
        with pytest.raises(KeyError):
            tagged(*words)
    Path("bad").mkdir()
    shutil.copy(place / "photos/torn.jpg", "bad")
    with pytest.raises(tag.UsageError, match="no photo could be read"):
        tagged(trained[RP].checkpoint, "bad", "--html")
    assert before.items() <= content_of(tmp_path / "tags").items()


@pytest.mark.parametrize("words, answer", [
    ("tag.py nowhere {p}/nowhere", "photos {p}/nowhere: no such file or folder"),
    ("tag.py nowhere {p}", "checkpoint nowhere: no such file"), ("tag.py {p} {p}", "{p}: is a directory; pass a"),
    ("tag.py {p}/a.png {p}", "; pass a checkpoint.safetensors"), ("tag.py {rp} {p}/empty", "photos end in .jpg"),
    ("tag.py {rp} {p} --threshold 50", "--threshold 50: must be from 0 to 1"),
    ("tag.py {rp} {p} --top-k 0", "--top-k: must"), ("tag.py {rp} {p} --workers -1", "--workers: must"),
    ("tag.py {rp} {p} --gpu -1", "--gpu: must"),
    ("explain.py {sspa} {p} --top-k 0", "--top-k: must"), ("explain.py {rp} {p}", "of RP, which has no regions")])
def test_refused(start, trained, place, words, answer):
    files = {"rp": trained[RP].checkpoint, "sspa": trained[SSPA].checkpoint, "p": place / "photos"}
    running = start(*words.format(**files).split())
    assert answer.format(**files) in running.end(2)[1].splitlines()[-1]
    assert set(content_of(running.stderr.parent)) == {running.stdout, running.stderr}


@BOTH
def test_load(trained, place, tmp_path, monkeypatch, script):
    """A path, a picture and a tensor have the scores of the photo's line; nothing is written."""
    monkeypatch.chdir(tmp_path)
    path = place / "photos/a.png"
    model = tag.load(trained[script].checkpoint)
    image = Image.open(path)
    scores = model.scores([path, str(path), image, model.clip.preprocess(image.convert("RGB"))])
    assert scores.shape == (4, 18) and scores.dtype == np.float64 and model.labels == scenes.NAMES
    assert model.scores([]).shape == (0, 18) and not any(tmp_path.iterdir())
    line, = tagged(trained[script].checkpoint, path)
    assert all(is_line_of(line, row) for row in scores)


def test_explain(start, trained, place, tmp_path):
    """A picture a photo that can be read, its path on stdout"""
    stdout, stderr = start("explain.py", trained[SSPA].checkpoint, place / "photos", "--output", tmp_path).end()
    sheets = sorted(tmp_path.iterdir())
    assert stdout.splitlines() == list(map(str, sheets)) and len(sheets) == 3 and "torn.jpg: cannot be" in stderr
    assert min(Image.open(sheets[0]).size) > 600
