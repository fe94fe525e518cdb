"""tag.py and explain.py: what they write, what is cached, what is never replaced; tag.load."""
import base64
import csv
import json
import re
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
from forked import BOTH, RP, SSPA, content_of, read_lines, result_of, start_two
from PIL import Image
from test_data import refused

import embed
import metrics
import run
import scenes
import tag

pytestmark = pytest.mark.usefixtures("own_folder")


def tagged(*words):
    """tag.py in this process, with the cache of the current folder -> lines"""
    tag.main([*map(str, words), "--cpu", "--quiet", "--cache", "cache"])
    return read_lines(Path("tags/tags.jsonl"))


def drawn(rows):
    """Pictures of scenes in the folder photos"""
    Path("photos").mkdir(exist_ok=True)
    for row in rows:
        scenes.picture("test", row)[0].save(f"photos/{row:03d}.png")


def check(lines, probabilities):
    """Line by line these probabilities [N, C]"""
    found = [[line["probabilities"][name] for name in scenes.NAMES] for line in lines]
    np.testing.assert_allclose(found, probabilities, atol=1e-4)


@BOTH
def test_lines(start, trained, place, tmp_path, script):
    """A JSON line per photo, whatever bytes its name has; what cannot be read is named. The tags are the labels above
    the threshold, or the K likeliest. Files hold what --stdout streams, and two processes write what one writes."""
    words = ("tag.py", trained[script].checkpoint, place / "photos")
    stdout, stderr = start(*words, "--stdout --threshold 0.4").end()
    assert stderr.count("torn.jpg: cannot be read (") == 1 and "the scenes toy here" in stderr
    start_two(start, *words, "--threshold 0.4 --html --cache", tmp_path / "cache", "--output", tmp_path)
    of_two = read_lines(Path("tags.jsonl"))
    assert min(Image.open("contact_sheet.png").size) > 200
    strongest = tagged(*words[1:], "--top-k", 2, "--html")
    page = Path("tags/tags.html").read_text()
    photos = sorted(map(str, (place / "photos").glob("[!t]*.*g")))
    for photo, line, other, top in zip(photos, map(json.loads, stdout.splitlines()), of_two, strongest, strict=True):
        likely = line["probabilities"]
        assert line["photo"] == other["photo"] == top["photo"] == photo
        assert list(likely) == sorted(likely, key=likely.get, reverse=True)
        assert line["labels"] == other["labels"] == [name for name in likely if likely[name] > 0.4]
        assert other["probabilities"] == pytest.approx(likely, abs=1e-4)
        assert top["labels"] == list(top["probabilities"]) == list(likely)[:2]
        assert f'"probabilities": {json.dumps(list(map(list, top["probabilities"].items())))}' in page


def test_a_line_is_there_before_the_next_photo(trained, place, monkeypatch):
    monkeypatch.setattr(sys, "stdout", mock.Mock())
    tag.main([str(trained[RP].checkpoint), str(place / "photos"), "--cpu", "--cache=", "--stdout"])
    assert sys.stdout.flush.call_count == 3


@BOTH
def test_only_what_is_new_is_encoded(trained, monkeypatch, script):
    """Run again with one more photo, it encodes one; another model has its own scores."""
    monkeypatch.setattr(embed, "_decode", mock.Mock(wraps=embed._decode))
    drawn(range(3))
    tagged(trained[script].checkpoint, "photos")
    drawn([3])
    for seed in (0, 1):
        checkpoint = trained[script].folder / f"checkpoints/seed {seed}.safetensors"
        check(tagged(checkpoint, "photos"), tag.load(checkpoint).probabilities(sorted(Path("photos").iterdir())))
    encoded = [len(call.args[2]) for call in embed._decode.call_args_list]
    assert encoded[:2] == [3, 1]  # then perhaps all of them for the other model


def test_good_tags_are_replaced_at_the_end_only(trained, place, tmp_path, monkeypatch):
    """Ctrl-C while thumbnails are made, and photos of which none can be read, leave what was there."""
    checkpoint = trained[RP].checkpoint
    tagged(checkpoint, place / "photos", "--html")
    before = content_of(tmp_path)
    monkeypatch.setattr(tag, "write_page", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tagged(checkpoint, place / "photos", "--html", "--top-k", 1)
    with refused("no photo could be read"):
        tagged(checkpoint, place / "photos/torn.jpg")
    assert content_of(tmp_path) == before


def test_table_and_sidecars(trained, place, capsys):
    """tags.csv as a spreadsheet reads it; sidecars hold a photo's tags as exiftool, or any reader of XML, reads them,
    and change with them. Those of other programs, under both usual names, are left as they are and named."""
    shutil.copytree(place / "photos", "photos")
    of_others = Path("photos/a.xmp")
    of_others.write_text("<x:xmpmeta/>")
    for k in (1, 2):
        lines = tagged(trained[RP].checkpoint, "photos", "--xmp", "--csv", "--top-k", k)
    said = capsys.readouterr()
    assert f"1 sidecars of other programs are left as they are (first: {of_others})" in said.err
    assert "2 sidecars beside the photos" in said.out and of_others.read_text() == "<x:xmpmeta/>"
    table = Path("tags/tags.csv").read_text("utf-8-sig", "surrogateescape").splitlines()
    for line, row in zip(lines, csv.DictReader(table), strict=True):
        assert list(row) == ["photo", "tags", *scenes.NAMES]
        assert row["photo"] == line["photo"] and row["tags"] == "; ".join(line["labels"])
        assert [float(row[name]) for name in line["labels"]] == list(line["probabilities"].values())
        sidecar = Path(row["photo"] + ".xmp")
        if sidecar.name == "a.png.xmp":
            assert not sidecar.exists()
            continue
        items = ElementTree.parse(sidecar).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li")
        assert [item.text for item in items] == 3 * line["labels"]
        if shutil.which("exiftool"):
            read = subprocess.check_output(["exiftool", "-XMP:Subject", "-XMP:TagsList", "-XMP:HierarchicalSubject",
                                            "-T", sidecar], encoding="utf-8")
            assert read.strip().split("\t") == 3 * [", ".join(line["labels"])]


@BOTH
def test_thumbnails_are_of_the_decoding_done(trained, place, monkeypatch, script):
    """No photo is decoded twice, also not in a second run; photos scored without a page are decoded for the page."""
    monkeypatch.setattr(embed, "_decode", mock.Mock(wraps=embed._decode))
    for photo, words, decoded in (("a.png", ["--html"], 1), ("a.png", ["--html", "--threshold", 0.1], 1),
                                  ("ü, 1.jpg", [], 2), ("ü, 1.jpg", ["--html"], 3)):
        tagged(trained[script].checkpoint, place / "photos" / photo, *words)
        assert embed._decode.call_count == decoded
    thumbnail = re.search("base64,(.*?)\"", Path("tags/tags.html").read_text())[1]
    assert Image.open(BytesIO(base64.b64decode(thumbnail))).size == (64, 64)


@BOTH
def test_load(trained, place, tmp_path, script):
    """A path, a picture and a tensor have the probabilities of the photo's line; nothing is written."""
    path = place / "photos/a.png"
    model = tag.load(trained[script].checkpoint)
    photos = [path, str(path), Image.open(path), embed.load_photo(model.clip, path)]
    probabilities = model.probabilities(photos)
    assert probabilities.dtype == np.float64 and model.labels == scenes.NAMES
    assert model.scores([]).shape == (0, 18) and not any(tmp_path.iterdir())
    assert (model.scores(photos) > probabilities).all()  # the asymmetric loss makes them generous
    check(4 * tagged(trained[script].checkpoint, path, "--threshold", 0.3), probabilities)


def test_thresholds(trained, monkeypatch, capsys):
    """From 100 photos on, here 20, a threshold per label is written beside the tags; the edited file is accepted; with
    fewer photos one serves all labels."""
    monkeypatch.setattr(tag, "ENOUGH", 20)
    drawn(range(20))
    checkpoint = trained[RP].checkpoint
    lines = tagged(checkpoint, "photos")
    probabilities = tag.load(checkpoint).probabilities(sorted(Path("photos").iterdir()))
    expected = metrics.expected_f1_thresholds(probabilities)
    written = json.loads(Path("tags/thresholds.json").read_text())
    assert written == pytest.approx(dict(zip(scenes.NAMES, expected, strict=True)), rel=1e-3)
    tags = [[name in line["labels"] for name in scenes.NAMES] for line in lines]
    assert (tags == (probabilities > expected)).all() and "0.3" not in capsys.readouterr().err

    Path("own.json").write_text(json.dumps(written | {"sun": 1, "moon": 0}))
    for line in tagged(checkpoint, "photos", "--threshold", "own.json"):
        assert "sun" not in line["labels"] and "moon" in line["labels"]
    Path("photos/000.png").unlink()
    found = tagged(checkpoint, "photos")
    assert "above a probability of 0.3" in capsys.readouterr().err
    assert tagged(checkpoint, "photos", "--threshold", "auto") != found


def test_summary(capsys):
    """Two photos, a tag on the first: expected precision 0.8, F1 2 * 0.8 / (1 + 0.8 + 0.2). The second has no tag."""
    tag.report(["dog", "cat"], np.array([[0.8, 0.1], [0.2, 0]]), [[0], []], [0.4, 0.05])
    told = capsys.readouterr().out
    assert told.startswith("2 photos; 1 carry none of these labels\n")
    assert re.search(r"\ndog +1 +0.40 +80 +80\ncat +0 +0.05\n", told)


def test_a_label_that_no_test_photo_shows(trained, capsys):
    """test_metrics.py tests that mAP leaves it out and that it counts 0 in CF1; macro F1 is 1 for the other label."""
    record = result_of(trained[RP].folder)
    record["per_class"][0]["positives"] = 0
    run.report(record, "RP", "texts")
    assert "no test photo shows: sun (left out of mAP, 0 in CF1 and macro F1)\n" in capsys.readouterr().out
    truth = np.array([[1, 0]])
    assert metrics.macro_f1(truth, truth, 0.5) == 50


def test_explain(start, trained, place, tmp_path):
    """A picture a photo that can be read, its path on stdout"""
    words = (place / "photos", "--output", tmp_path)
    stdout, stderr = start("explain.py", trained[SSPA].checkpoint, *words).end()
    sheets = sorted(tmp_path.iterdir())
    assert stdout.splitlines() == list(map(str, sheets)) and len(sheets) == 3 and "torn.jpg: cannot be" in stderr
    assert min(Image.open(sheets[0]).size) > 600
    assert "an RP model, which has no regions" in start("explain.py", trained[RP].checkpoint, *words).end(2)[1]


def test_ucm_whole(start, shared, tmp_path):
    """The one published set that is here in full: both methods are trained and scored on it, with the toy CLIP, which
    knows nothing about aerial photos."""
    words = f"--train-count 64 --epochs 1 --no-probe --dataset ucm --data-root '{shared}' --backbone scenes --output"
    for script, more in ((RP, ""), (SSPA, "--tune-image none")):
        start(script, more, words, tmp_path / script).end()
        record = result_of(tmp_path / script)
        assert 15 < record["mAP"] < 40
        assert sum(label["positives"] for label in record["per_class"]) == 1419
