"""tag.py and explain.py: what they write, what is cached, what is never replaced; tag.load."""
import json
import os
import sqlite3

import numpy as np
import pytest
from PIL import Image

import adapter_rp
import embed
import scenes
import sspa
import tag
from data import UsageError

BOTH = pytest.mark.parametrize("script", ["adapter_rp", "sspa"])
NAMES = sorted(["a.png", "ü, 1.jpg", os.fsdecode(b"caf\xe9.png")])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures with odd names, and a torn one."""
    folder = tmp_path_factory.mktemp("photos")
    for row, name in enumerate(NAMES):
        scenes.picture("test", row)[0].save(folder / name)
    (folder / "torn.jpg").write_bytes((folder / "ü, 1.jpg").read_bytes()[:700])
    return folder


@pytest.fixture(scope="module")
def checkpoints(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    usual = f"--cpu --quiet --workers 0 --epochs 2 --cache {cache} --test-count 20".split()
    adapter_rp.main([*usual, "--text-count", "200", "--output", str(folder / "adapter_rp")])
    sspa.main([*usual, "--tune-image", "none", "--train-count", "64", "--output", str(folder / "sspa")])
    return {script: folder / script / "checkpoint.safetensors" for script in ("adapter_rp", "sspa")}


def tagged(checkpoint, photos, output, *words):
    """Runs tag.py -> its lines"""
    words = [checkpoint, photos, "--output", output, "--cpu", "--quiet", "--workers", "0", *words]
    tag.main([str(word) for word in words])
    return lines_in(output)


def lines_in(folder):
    text = (folder / "tags.jsonl").read_text("utf-8", "surrogateescape")
    return [json.loads(line) for line in text.splitlines()]


@BOTH
def test_lines(checkpoints, photos, tmp_path, capsys, script):
    """A line a photo, whatever bytes its name has; the torn photo is named; tags are the labels above the threshold,
    or the K strongest."""
    usual = ("--cache", tmp_path / "cache")
    lines = tagged(checkpoints[script], photos, tmp_path, *usual, "--threshold", 0.4)
    assert [line["photo"] for line in lines] == [str(photos / name) for name in NAMES]
    said = capsys.readouterr()
    assert "torn.jpg: cannot be read" in said.err and "3 photos tagged" in said.out
    for line in lines:
        scores = list(line["scores"].values())
        assert set(line["scores"]) == set(scenes.NAMES) and scores == sorted(scores, reverse=True)
        assert line["labels"] == [name for name, score in line["scores"].items() if score > 0.4]
    two = tagged(checkpoints[script], photos, tmp_path, *usual, "--top-k", 2, "--html")
    for line, other in zip(lines, two, strict=True):
        assert other["labels"] == list(other["scores"]) == list(line["scores"])[:2]
    page = (tmp_path / "tags.html").read_text()
    assert all(json.dumps(name)[1:-1] in page for name in ("a.png", *two[0]["scores"]))
    assert min(Image.open(tmp_path / "contact_sheet.png").size) > 200
    capsys.readouterr()
    tag.main([str(checkpoints[script]), str(photos / "a.png"), "--stdout", "--cpu", "--cache", str(tmp_path / "cache")])
    assert json.loads(capsys.readouterr().out)["scores"] == lines[0]["scores"]


@BOTH
def test_only_what_is_new_is_encoded(checkpoints, photos, tmp_path, monkeypatch, script):
    """Again: nothing. A photo more: one. The folder moved: nothing. Another checkpoint has its own scores."""
    encoded = []
    decode = embed._decode

    def counted(clip, augment, batch):
        encoded.extend(batch)
        return decode(clip, augment, batch)
    monkeypatch.setattr(embed, "_decode", counted)
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in range(5):
        scenes.picture("test", row)[0].save(folder / f"{row}.png")
    usual = (tmp_path / "out", "--cache", tmp_path / "cache")
    first = tagged(checkpoints[script], folder, *usual)
    assert len(encoded) == 5
    assert tagged(checkpoints[script], folder, *usual) == first and len(encoded) == 5
    scenes.picture("test", 9)[0].save(folder / "9.png")
    tagged(checkpoints[script], folder, *usual)
    assert len(encoded) == 6
    folder.rename(tmp_path / "moved")
    moved = tagged(checkpoints[script], tmp_path / "moved", *usual)
    assert len(encoded) == 6 and [line["scores"] for line in moved[:5]] == [line["scores"] for line in first]
    other = {"sspa": "adapter_rp", "adapter_rp": "sspa"}[script]
    fresh = tagged(checkpoints[other], tmp_path / "moved", tmp_path / "fresh", "--cache", "")
    assert tagged(checkpoints[other], tmp_path / "moved", *usual) == fresh
    rows = sqlite3.connect(tmp_path / "cache/features.sqlite").execute("SELECT count(*) FROM features").fetchone()
    assert rows[0] >= 12


def test_nothing_good_is_replaced_by_something_empty(checkpoints, photos, tmp_path):
    """A run in which no photo can be read, and one that fails half way, leave the tags that were there."""
    good = tagged(checkpoints["adapter_rp"], photos, tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/torn.jpg").write_bytes((photos / "torn.jpg").read_bytes())
    with pytest.raises(UsageError, match="no photo could be read"):
        tagged(checkpoints["adapter_rp"], tmp_path / "bad", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tag, "line_of", None)
        with pytest.raises(TypeError):
            tagged(checkpoints["adapter_rp"], photos, tmp_path)
    assert lines_in(tmp_path) == good


@pytest.mark.parametrize("words, answer", [
    (["{rp}", "nowhere"], "photos nowhere: no such file or folder"),
    (["nowhere", "{photos}"], "checkpoint nowhere: no"),
    (["{photos}/a.png", "{photos}"], "a.png: .*; pass a checkpoint"), (["{photos}", "{photos}"], "; pass a checkpoint"),
    (["{rp}", "{photos}", "--threshold", "50"], "--threshold 50: must be from 0 to 1"),
    (["{rp}", "{photos}", "--top-k", "0"], "--top-k 0: must"), (["{rp}", "{photos}", "--gpu", "99"], "GPU 99: this")])
def test_refused(checkpoints, photos, words, answer):
    files = {"rp": checkpoints["adapter_rp"], "photos": photos}
    with pytest.raises(UsageError, match=answer):
        tag.main([word.format(**files) for word in words])


@BOTH
def test_load(checkpoints, photos, tmp_path, monkeypatch, script):
    """A path, a PIL image and a tensor have the scores of the photo's line; nothing is written."""
    line = tagged(checkpoints[script], photos / "a.png", tmp_path)[0]
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    model = tag.load(checkpoints[script])
    image = Image.open(photos / "a.png")
    scores = model.scores([photos / "a.png", str(photos / "a.png"), image, model.clip.preprocess(image.convert("RGB"))])
    assert scores.shape == (4, 18) and scores.dtype == np.float64 and model.labels == scenes.NAMES
    for row in scores:
        assert [line["scores"][name] for name in model.labels] == pytest.approx(row.tolist(), abs=1e-4)
    assert model.scores([]).shape == (0, 18) and not any(empty.iterdir())


def test_explain(command, checkpoints, photos, tmp_path):
    """A picture a photo, its path on stdout; RP has no regions."""
    words = ("--cpu", "--quiet", "--output", tmp_path / "out")
    three = [photos / name for name in ("a.png", "ü, 1.jpg", "torn.jpg")]
    done = command("explain.py", checkpoints["sspa"], *three, *words)
    sheets = sorted((tmp_path / "out").iterdir())
    assert done.stdout.splitlines() == list(map(str, sheets)) and len(sheets) == 2
    assert all(len(np.unique(np.asarray(Image.open(sheet)))) > 50 for sheet in sheets)
    refused = command("explain.py", checkpoints["adapter_rp"], photos / "a.png", *words, expect=2)
    assert "of RP, which has no regions" in refused.stderr
