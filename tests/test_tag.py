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

import embed
import metrics
import run
import scenes
import tag

EXIFTOOL = shutil.which("exiftool")
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


def tagged(checkpoint, photos, *words):
    """tag.py in this process, with the cache of the current folder -> lines"""
    tag.main([str(word) for word in (checkpoint, photos, "--cpu", "--quiet", "--cache", "cache", *words)])
    return read_lines(Path("tags/tags.jsonl"))


def check(lines, probabilities):
    """Line by line these probabilities [N, C]"""
    found = [[line["probabilities"][name] for name in scenes.NAMES] for line in lines]
    np.testing.assert_allclose(found, probabilities, atol=1e-4)


@BOTH
def test_lines(start, trained, place, tmp_path, script):
    """A JSON line a photo, whatever bytes its name has; what cannot be read is named. The tags are the labels above the
    threshold, or the K strongest. Files hold what --stdout streams, and two processes write what one writes."""
    words = ("tag.py", trained[script].checkpoint, place / "photos")
    stdout, stderr = start(*words, "--stdout --threshold 0.4").end()
    assert stderr.count("torn.jpg: cannot be read (") == 1 and "the scenes toy here" in stderr
    start_two(start, *words, "--threshold 0.4 --html --cache", tmp_path / "cache", "--output", tmp_path)
    of_two = read_lines(tmp_path / "tags.jsonl")
    assert min(Image.open(tmp_path / "contact_sheet.png").size) > 200
    summary, _ = start(*words, "--top-k 2 --html --output", tmp_path).end()
    assert summary.startswith("3 photos tagged; 0 carry none of these labels")
    page = (tmp_path / "tags.html").read_text()
    strongest = read_lines(tmp_path / "tags.jsonl")
    photos = sorted(map(str, (place / "photos").glob("[!t]*.*g")))
    for photo, line, other, top in zip(photos, stdout.splitlines(), of_two, strongest, strict=True):
        line = json.loads(line)
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
def test_only_what_is_new_is_encoded(trained, tmp_path, monkeypatch, script):
    """Again, with another threshold or the folder moved: nothing. A photo more: one. Another model: own scores."""
    monkeypatch.setattr(embed, "_decode", mock.Mock(wraps=embed._decode))
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for row in range(3):
        scenes.picture("test", row)[0].save(f"photos/{row}.png")
    tagged(trained[script].checkpoint, "photos")
    Path("photos").rename("moved")
    tagged(trained[script].checkpoint, "moved", "--threshold", 0)
    scenes.picture("test", 3)[0].save("moved/3.png")
    for seed in (0, 1):
        checkpoint = trained[script].folder / f"checkpoints/seed {seed}.safetensors"
        check(tagged(checkpoint, "moved"), tag.load(checkpoint).probabilities(sorted(Path("moved").iterdir())))
    encoded = [len(call.args[2]) for call in embed._decode.call_args_list]
    assert encoded[:2] == [3, 1]  # then perhaps all of them for the other model


def test_good_tags_are_replaced_at_the_end_only(start, trained, place, tmp_path):
    """A full disk, and photos of which none can be read, leave what was there."""
    words = ("tag.py", trained[RP].checkpoint, "--html --cache '' --output", tmp_path)
    start(*words, place / "photos").end()
    before = content_of(tmp_path)
    start(*words, place / "photos", full_at=1000).end(2)
    assert "no photo could be read" in start(*words, place / "photos/torn.jpg").end(2)[1]
    assert before.items() <= content_of(tmp_path).items()


def test_table_and_sidecars(start, trained, place, tmp_path):
    """tags.csv as a spreadsheet reads it; sidecars hold a photo's tags as exiftool, or any reader of XML, reads them,
    and change with them. Those of other programs, under both usual names, are left as they are and named."""
    photos = tmp_path / "photos"
    shutil.copytree(place / "photos", photos, ignore=shutil.ignore_patterns("torn*"))
    of_others = photos / "a.xmp"
    of_others.write_text("<x:xmpmeta/>")
    words = ("tag.py", trained[RP].checkpoint, photos, "--xmp --csv --output", tmp_path)
    for more in ("--top-k 1", "--top-k 2"):
        stdout, stderr = start(*words, more).end()
    assert f"1 sidecars of other programs are left as they are (first: {of_others})" in stderr
    assert "2 sidecars beside the photos" in stdout and of_others.read_text() == "<x:xmpmeta/>"
    lines = read_lines(tmp_path / "tags.jsonl")
    with (tmp_path / "tags.csv").open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        table = list(csv.DictReader(file))
    for line, row in zip(lines, table, strict=True):
        photo = Path(line["photo"])
        assert row["photo"] == str(photo) and row["tags"] == "; ".join(line["labels"])
        assert list(row) == ["photo", "tags", *scenes.NAMES]
        assert [float(row[name]) for name in line["labels"]] == list(line["probabilities"].values())
        sidecar = photo.with_name(photo.name + ".xmp")
        if photo.name == "a.png":
            assert not sidecar.exists()
            continue
        bags = ElementTree.parse(sidecar).getroot()[0][0]
        assert [[item.text for item in bag.iter(f"{RDF}li")] for bag in bags] == 3 * [line["labels"]]
        if EXIFTOOL:
            read = subprocess.run([EXIFTOOL, "-j", "-XMP:all", sidecar], stdout=subprocess.PIPE, check=True).stdout
            found = json.loads(read.decode(errors="replace"))[0]
            assert found["Subject"] == found["TagsList"] == found["HierarchicalSubject"] == line["labels"]


def test_ctrl_c_leaves_what_was_there(trained, place, tmp_path, monkeypatch, capsys):
    """And says what is true."""
    words = [str(trained[RP].checkpoint), str(place / "photos"), "--cpu", "--cache=", "--html", "--output",
             str(tmp_path)]
    tag.main(words)
    before = content_of(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tag.py", *words, "--top-k", "1"])
    monkeypatch.setattr(tag, "write_page", mock.Mock(side_effect=KeyboardInterrupt))  # while thumbnails are made
    monkeypatch.setattr(sys, "stdout", mock.Mock())
    with pytest.raises(SystemExit) as ended, run.exit_codes("tag.py") as arguments:
        tag.main(arguments)
    assert ended.value.code == 130
    assert "tag.py: interrupted; the same command goes on from what is saved" in capsys.readouterr().err
    assert content_of(tmp_path) == before


@BOTH
def test_thumbnails_are_of_the_decoding_done(trained, place, tmp_path, monkeypatch, script):
    """No photo is decoded twice, and none a second time; scored without a page before, it is decoded for that."""
    monkeypatch.setattr(embed, "_decode", mock.Mock(wraps=embed._decode))
    monkeypatch.chdir(tmp_path)
    photos = place / "photos/a.png"
    tagged(trained[script].checkpoint, photos, "--html")
    tagged(trained[script].checkpoint, photos, "--html", "--threshold", 0.1)
    assert embed._decode.call_count == 1
    thumbnail = re.search("base64,(.*?)\"", Path("tags/tags.html").read_text())[1]
    assert Image.open(BytesIO(base64.b64decode(thumbnail))).size == tag.load(trained[script].checkpoint).clip.image_size
    tagged(trained[script].checkpoint, place / "photos/ü, 1.jpg")
    tagged(trained[script].checkpoint, place / "photos/ü, 1.jpg", "--html")
    assert embed._decode.call_count == 3


@BOTH
def test_load(trained, place, tmp_path, monkeypatch, script):
    """A path, a picture and a tensor have the probabilities of the photo's line; nothing is written."""
    monkeypatch.chdir(tmp_path)
    path = place / "photos/a.png"
    model = tag.load(trained[script].checkpoint)
    image = Image.open(path)
    photos = [path, str(path), image, model.clip.preprocess(image.convert("RGB"))]
    probabilities = model.probabilities(photos)
    assert probabilities.dtype == np.float64 and model.labels == scenes.NAMES
    assert model.scores([]).shape == (0, 18) and not any(tmp_path.iterdir())
    assert (model.scores(photos) > probabilities).all()  # the asymmetric loss makes them generous
    check(4 * tagged(trained[script].checkpoint, path, "--threshold", 0.3), probabilities)


def test_thresholds(start, trained, tmp_path, monkeypatch, capsys):
    """One a label from 100 photos on, written beside the tags; the file, edited, is taken; below 100 one for all."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for row in range(100):
        scenes.picture("test", row)[0].save(f"photos/{row:03d}.png")
    checkpoint = trained[RP].checkpoint
    lines = tagged(checkpoint, "photos")
    probabilities = tag.load(checkpoint).probabilities(sorted(Path("photos").iterdir()))
    expected = metrics.expected_f1_thresholds(probabilities)
    written = json.loads(Path("tags/thresholds.json").read_text())
    assert list(written.values()) == pytest.approx(expected, rel=1e-3) and list(written) == scenes.NAMES
    tags = np.array([[name in line["labels"] for name in scenes.NAMES] for line in lines])
    assert (tags == (probabilities > expected)).all() and "0.3" not in capsys.readouterr().err

    Path("own.json").write_text(json.dumps(written | {"sun": 1, "moon": 0}))
    for line in tagged(checkpoint, "photos", "--threshold", "own.json"):
        assert "sun" not in line["labels"] and "moon" in line["labels"]
    Path("photos/000.png").unlink()
    assert tagged(checkpoint, "photos") != lines[1:] and "above a probability of 0.3" in capsys.readouterr().err
    assert tagged(checkpoint, "photos", "--threshold", "auto") != tagged(checkpoint, "photos")


def test_summary(capsys):
    """Two photos, a tag on the first: likely right in 0.8; F1 2 * 0.8 / (1 + 0.8 + 0.2). The second has no tag."""
    probabilities = np.array([[0.8, 0.1], [0.2, 0.0]])
    tag.report(["dog", "cat"], probabilities, [np.array([0]), np.array([], int)], np.array([0.4, 0.05]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 photos tagged; 1 carry none of these labels"
    assert lines[3].split() == ["dog", "1", "0.40", "80", "80"] and lines[4].split() == ["cat", "0", "0.05"]


def test_explain(start, trained, place, tmp_path):
    """A picture a photo that can be read, its path on stdout"""
    words = (place / "photos", "--output", tmp_path)
    stdout, stderr = start("explain.py", trained[SSPA].checkpoint, *words).end()
    sheets = sorted(tmp_path.iterdir())
    assert stdout.splitlines() == list(map(str, sheets)) and len(sheets) == 3 and "torn.jpg: cannot be" in stderr
    assert min(Image.open(sheets[0]).size) > 600
    assert "of RP, which has no regions" in start("explain.py", trained[RP].checkpoint, *words).end(2)[1]


def test_ucm_whole(start, shared, tmp_path):
    """The one published set that is here whole, 2,100 photos: both methods learn on it, score it and tag it, by the toy
    CLIP, which knows nothing of the ground from above."""
    for script, words in ((RP, "--train-count 300"), (SSPA, "--tune-image none --train-count 64")):
        words += f" --epochs 1 --dataset ucm --data-root '{shared}' --backbone scenes"
        start(script, words, "--output", tmp_path / script).end()
        record = result_of(tmp_path / script)
        assert record["photo_count"] == 420 and 15 < record["mAP"] < 40
        assert sum(label["positives"] for label in record["per_class"]) == 1419
        photos = shared / "ucm/Images/airplane"
        stdout, _ = start("tag.py", tmp_path / script / "checkpoint.safetensors", photos, "--output", tmp_path).end()
        assert stdout.startswith("100 photos tagged")
