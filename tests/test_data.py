"""data.py: stored files, label names, texts, photos, ready-made embeddings, your own folder."""
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

import data
import scenes
from data import UsageError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def photos(folder, *names):
    for name in names:
        write(folder / name, b"")
        Image.new("RGB", (8, 8)).save(folder / name)


def marks(found):
    """{photo's name: its labels}, "-dog" for an ignored one"""
    sign = {1: "", -1: "-"}
    return {photo.name: {sign[mark] + name for name, mark in zip(found.names, row, strict=True) if mark}
            for photo, row in zip(*found, strict=True)}


@pytest.mark.parametrize("content, read, reason", [
    (b"{", data.read_json, "Expecting"),
    (b"[" * 200000, data.read_json, "recursion"),
    (b"\xe9", data.read_text, "utf-8"),
    (b"", lambda path, *words: data.read_text(path.parent, *words), "is a directory"),
    (b"", lambda path, *words: data.read_text(path / "under", *words), "no such file")])
def test_a_damaged_file_is_one_line(tmp_path, content, read, reason):
    """What the file is, its path, the reason, the remedy; only a missing file is MissingFile."""
    with pytest.raises(UsageError, match=rf"^thing {tmp_path}.*{reason}.*; mend it$") as error:
        read(write(tmp_path / "file", content), "thing", "mend it")
    assert "\n" not in str(error.value)
    assert isinstance(error.value, data.MissingFile) == (reason == "no such file")


@pytest.mark.parametrize("raised, kind, message", [
    (KeyError("dog"), UsageError, "thing a: not in the form expected .KeyError.'dog'..; mend it"),
    (ValueError("two\nlines"), UsageError, "thing a: two lines; mend it"),
    (UsageError("as it was"), UsageError, "^as it was$"),
    (MemoryError(), MemoryError, "")])
def test_reading_translates_what_its_block_raises(raised, kind, message):
    with pytest.raises(kind, match=message), data.reading("a", "thing", "mend it"):
        raise raised


def test_writing(tmp_path):
    """Strict JSON; on a full disk and in a place that takes no file the old content stays."""
    path = tmp_path / "a/x"
    data.write_json(path, {"value": float("nan"), "more": [-np.inf, 1e-300], "path": Path("p")})
    old = path.read_text()
    assert json.loads(old) == {"value": None, "more": [None, 1e-300], "path": "p"}
    (tmp_path / f"a/.x.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(UsageError, match="^cannot write .*/x: No space left"):
        data.write_atomically(path, "x" * 100)
    with pytest.raises(UsageError, match="^cannot write .*/x/under: .*choose another place"):
        data.write_atomically(path / "under", b"x")
    assert path.read_text() == old


def test_a_held_file_is_refused_to_others(tmp_path, monkeypatch):
    """Refused while another process holds it; free as soon as that process is killed, or leaves its `with`."""
    monkeypatch.setattr(data, "LOCK_SECONDS", 0.2)
    program = "import data, sys; held = data.hold(sys.argv[1], 'x'); print('held', flush=True); input()"
    words = [sys.executable, "-c", program, tmp_path / "made/.lock"]
    with subprocess.Popen(words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="^runs/a: another run is writing it"):
            data.hold(words[-1], "runs/a")
        other.kill()
    with data.hold(words[-1], "runs/a") as held:
        assert held.is_locked
    data.hold(words[-1], "runs/a").release()


READ = {"labels.txt": data.read_labels, "d.json": lambda path: data.descriptions_of("voc2007", ["dog"], path),
        **dict.fromkeys(("t.jsonl", "t.json", "t.txt"), lambda path: data.read_texts(path, ["dog", "cat"])),
        **dict.fromkeys(("labels.csv", "labels.json"), lambda path: data.load_photos("folder", path.parent, "train"))}


@pytest.mark.parametrize("name, content, reason", [
    ("labels.txt", "\n \n", "holds no label"),
    ("labels.txt", "dog\ncat\nDog", "'Dog' stands twice .entries 1 and 3"),
    ("labels.txt", "a b\na-b", "stands twice"),
    ("labels.txt", "x" * 201, "not a label"),
    ("labels.txt", "a\x07b", "not a label name: 'a.x07b'"),
    ("labels.txt", "a\u202eb", "not a label name"),
    ("t.jsonl", '\n{"text": "a", "labels": ["dgo"]}', "line 2: label 'dgo' is not in the label list.*did you.*dog"),
    ("t.jsonl", "{", "line 1: .*each line must be"),
    ("t.jsonl", '{"text": "a"}', "line 1: "),
    ("t.jsonl", '{"text": "a", "labels": "dog"}', "line 1: "),
    ("t.jsonl", '{"text": "a", "labels": []}', "none of"),
    ("t.json", "[1]", "give COCO's captions"),
    ("t.txt", "cow", "none of 1 texts"),
    ("d.json", "[1]", "form"),
    ("d.json", '{"dog": 3}', "form"),
    ("d.json", '{"cow": "A cow moos."}', "none of dog"),
    ("labels.csv", "", "holds no label"),
    ("labels.csv", "f,dog\na.png,2\n", "line 2: "),
    ("labels.csv", "f,dog\na.png,1\n\nc.png\n", "line 4: "),
    ("labels.csv", "f,dog\n", "no photo is in the train part"),
    ("labels.csv", "f,dog,Dog\na.png,1,0\n", "stands twice"),
    ("labels.csv", "f,dog\na.png,1\nb.png,0\na.png,0\n", "line 4: a.png stands twice"),
    ("labels.csv", "a.png,1\nb.png,0\n", "first line must"),
    ("labels.csv", "f,dog,split\na.png,1,x\n", "test, not 'x'"),
    ("labels.csv", "f,dog\nz.png,1\n", "none of its 1 photos .*expected"),
    ("labels.json", '{"a.png": "dog"}', "form"),
    ("labels.json", '{"a.png": [1]}', "form")])
def test_mistakes_in_files(tmp_path, name, content, reason):
    """One line that says what is wrong, and where."""
    with pytest.raises(UsageError, match=reason) as error:
        READ[name](write(tmp_path / name, content))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text, expected", [
    ("Two dogs.", {"dog"}),
    ("A hot dog on a table", {"dining table"}),
    ("a hotdog, a dog show, a manly dogma", set()),
    ("MEN and buses", {"person", "bus"}),
    ("puppies and wolves", {"puppy", "wolf"}),
    ("dining-table", {"dining table"}),
    ("dining  tables", {"dining table"}),
    ("dog’s bed", {"dog's bed"})])
def test_match_nouns(text, expected):
    names = ["dog", "person", "dining table", "bus", "puppy", "wolf", "dog's bed"]
    others = {"": ["hot dog", "dog show"], "person": ["man"], "dining table": ["table"], "dog": ["puppy"]}
    row = data.match_nouns([text], names, others)[0]
    assert {name for name, mark in zip(names, row, strict=True) if mark} == expected


def test_labels_and_texts_of_files(tmp_path, capsys):
    path = write(tmp_path / "labels.txt", "\ufeffdog\n\n  fire truck \r\nnaïve café\n☀\n" + "x" * 200)
    assert data.read_labels(path) == ["dog", "fire truck", "naïve café", "☀", "x" * 200]
    assert not capsys.readouterr().err
    lines = ['{"text": "a dog and a cat", "labels": ["cat", "dog"]}', "", '{"text": "nothing", "labels": []}',
             '{"text": "a cat\u2028there", "labels": ["cat"]}', '{"text": " ", "labels": ["cat"]}']
    path = write(tmp_path / "t.jsonl.gz", gzip.compress("\n".join(lines).encode()))
    texts, labels = data.read_texts(path, ["dog", "cat"])
    assert texts == ["a dog and a cat", "a cat\u2028there"]
    assert labels.tolist() == [[1, 1], [0, 1]]
    assert "2 of 3 texts have a label" in capsys.readouterr().err
    path = write(tmp_path / "captions.txt", "a dog\r\nnothing here\n\ntwo felines and a bike\n")
    texts, labels = data.read_texts(path, ["dog", "cat"], {"cat": ["feline"]})
    assert texts == ["a dog", "two felines and a bike"]
    assert labels.tolist() == [[1, 0], [0, 1]]


def test_real_captions(shared):
    """How often each label is found was counted before by somebody else's matcher."""
    names = data.label_names("voc2007")
    texts, labels = data.read_texts(shared / "captions_val2017.json", names, data.synonyms_of(names, "voc2007"))
    theirs = data.load_features(shared / "photo_embeddings/voc2007_even.npz")["text_labels"]
    assert len(texts) == pytest.approx(len(theirs), rel=0.1)
    assert np.corrcoef(theirs.sum(0), labels.sum(0))[0, 1] > 0.99


@pytest.mark.parametrize("dataset, names", [
    ("scenes", scenes.NAMES), ("scenes", ["boat", "sun"]), ("folder", ["dog", "apple", "fire truck"])])
def test_default_texts(dataset, names):
    """The matcher reads back the labels; where labels are few, sentences without any stay."""
    texts, labels, _ = data.default_texts(dataset, names, 300)
    np.testing.assert_array_equal(data.match_nouns(texts, names, data.synonyms_of(names, dataset)), labels)
    assert labels.any(1).all() == (names != ["boat", "sun"])


def test_in_template_sentences_every_label_stands_first_equally_often():
    names = ["dog", "apple", "fire truck"]
    texts, labels = data.template_texts(names, 300)
    first = [min(names, key=lambda name: (text + name).index(name)) for text in texts]
    assert {first.count(name) for name in names} == {100}
    assert labels.sum(0).min() > 130


def test_descriptions(tmp_path, capsys):
    path = write(tmp_path / "d.json", '{"descriptions": {"dog": " A dog  barks.", "cat": "", "cow": "A cow moos."}}')
    assert data.descriptions_of("voc2007", ["dog", "cat"], path) == {"dog": "A dog barks."}
    said = capsys.readouterr().err
    assert "alone for 1 of 2 labels (cat)" in said
    assert "1 descriptions of other labels not used (cow)" in said
    assert data.descriptions_of("x", ["dog"], write(path, '{"dog": "It barks."}')) == {"dog": "It barks."}
    assert data.descriptions_of("folder", ["dog"]) == {}


@pytest.mark.parametrize("dataset, count", [
    ("scenes", 18), ("voc2007", 20), ("coco2014", 80), ("nuswide", 81), ("pa100k", 26), ("rapv1", 51), ("peta", 35),
    ("multiscene", 36), ("mlrsnet", 60), ("ucm", 17)])
def test_shipped_names_synonyms_descriptions(dataset, count):
    """As many labels as published; each is described, and its description names it."""
    names = data.check_names(data.label_names(dataset), dataset)
    assert len(names) == count
    found = data.descriptions_of(dataset, names)
    assert list(found) == names
    assert all(data.match_nouns([sentence], [name]).any() for name, sentence in found.items())
    assert any(data.synonyms_of(names, dataset).values())


def test_photos_of_a_folder(tmp_path, capsys, monkeypatch):
    photos(tmp_path, "b.PNG", "deep/c.jpeg", ".hidden.png", ".hidden/d.png", "locked/e.png")
    write(tmp_path / "phone.HEIC", "")
    (tmp_path / "loop").symlink_to(tmp_path)
    scandir = os.scandir

    def locked(folder):  # root may look into every folder
        if folder.endswith("locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)
    monkeypatch.setattr(os, "scandir", locked)
    notes = write(tmp_path / "notes/notes.txt", "no photo")
    assert data.list_photos(tmp_path) == [tmp_path / "b.PNG", tmp_path / "deep/c.jpeg"]
    said = capsys.readouterr().err
    assert "1 .heic photos, which Pillow cannot read, are left out" in said
    assert f"2 folders, linked or locked, are left out (first: {tmp_path / 'locked'})" in said
    assert data.list_photos(notes) == [notes]  # asked for by name
    for path in (tmp_path / "nowhere", notes.parent):
        with pytest.raises(UsageError, match=f"^photos {path}: no "):
            data.list_photos(path)


@pytest.mark.parametrize("mark, black", [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")])
def test_exif_marks_turn_a_photo_upright(tmp_path, mark, black):
    """Stored with its left half black; 6: to be turned clockwise, so that what was left is on top."""
    stored = np.zeros((16, 32), np.uint8)
    stored[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = mark
    Image.fromarray(stored).save(tmp_path / "phone.png", exif=exif)
    upright = np.asarray(data.open_photo(tmp_path / "phone.png"))[:, :, 0]
    half = {"left": upright[:, :16], "right": upright[:, -16:], "top": upright[:16], "bottom": upright[-16:]}[black]
    assert half.shape != upright.shape
    assert not half.any()


def test_deep_pixels(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert data.open_photo(tmp_path / "deep.png").getpixel((0, 0)) == (156, 156, 156)  # 40000 / 256
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="32 bits a pixel"):
        data.open_photo(tmp_path / "deep.tif")


def test_drawn():
    """Fewer are among more, over the whole set, by a fixed seed."""
    assert data.drawn(1000, 10).tolist() == sorted(np.random.default_rng(0).permutation(1000)[:10])
    assert set(data.drawn(1000, 10)) < set(data.drawn(1000, 100))
    assert data.drawn(1000, None).tolist() == data.drawn(1000, 2000).tolist() == list(range(1000))


def test_scenes_are_drawn_over_the_whole_set():
    photos, labels = data.load_photos("scenes", None, "test", 30)
    assert [index for _, index in photos] == data.drawn(2000, 30).tolist()
    np.testing.assert_array_equal(labels, [scenes.labels_of(*photo) for photo in photos])


@pytest.mark.parametrize("name, content", [
    ("labels.csv", "file;dog;split;cat\na.png; 1;train;0\n\nsub/b.png;0;test;1\nc.png;1.0;train;-1\n"),
    ("labels.json", '{"a.png": ["dog"], "sub/b.png": ["cat"], "c.png": ["dog"]}')])
def test_folder(tmp_path, name, content):
    """Either form, one folder deeper than the one given: the --data-root that the message names works."""
    mine = tmp_path / "mine"
    photos(mine, "a.png", "sub/b.png", "c.png")
    write(mine / name, content)
    with pytest.raises(UsageError, match=f"but it is in {mine}: pass --data-root {mine};"):
        data.load_photos("folder", tmp_path, "train")
    train = data.load_photos("folder", mine, "train")
    test = data.load_photos("folder", mine, "test")
    assert sorted(train.names) == ["cat", "dog"]
    if name == "labels.csv":
        assert (marks(train), marks(test)) == ({"a.png": {"dog"}, "c.png": {"dog", "-cat"}}, {"b.png": {"cat"}})
    else:
        assert marks(train) | marks(test) == {"a.png": {"dog"}, "b.png": {"cat"}, "c.png": {"dog"}}


def test_missing_photos_are_left_out_before_some_are_drawn(tmp_path, capsys):
    """Of ten listed photos the first four are missing; each of the others keeps its own label."""
    photos(tmp_path, *(f"{n}.png" for n in range(4, 10)))
    rows = [f"{n}.png,train," + ",".join("01"[n == column] for column in range(10)) for n in range(10)]
    write(tmp_path / "labels.csv", "\n".join(["file,split,n0,n1,n2,n3,n4,n5,n6,n7,n8,n9", *rows]))
    found = data.load_photos("folder", tmp_path, "train", 3)
    assert marks(found) == {f"{4 + row}.png": {f"n{4 + row}"} for row in data.drawn(6, 3)}
    assert f"4 of 10 photos missing, left out (first: {tmp_path}/0.png)" in capsys.readouterr().err
    assert "4 of 10 photos missing" in found.policy


def test_identity(tmp_path):
    """Follows the labels' content, and the drawing code."""
    first = data.identity("folder", write(tmp_path / "labels.csv", "file,dog").parent)
    assert first != data.identity("folder", write(tmp_path / "labels.csv", "file,cat").parent) != ""
    assert data.identity("voc2007", None) == ""
    assert data.identity("scenes", None).startswith(scenes.DIGEST)


@pytest.mark.parametrize("change, reason", [
    ({"text_labels": np.ones((4, 2), np.int8)}, r"text_labels has shape \[4, 2\], expected \[5, 2\]"),
    ({"label_embeddings": np.ones((2, 3))}, "label_embeddings has"),
    ({"label_names": np.array("a")}, "names has"),
    ({"image_embeddings": np.full((3, 4), np.nan)}, "image_embeddings .*not finite"),
    ({"image_labels": np.full((3, 2), 2)}, "image_labels must hold"),
    ({"label_names": ["a", "A"]}, "twice"),
    ({"label_names": np.array([{}])}, "allow_pickle"),
    ({"text_embeddings": np.ones((0, 4)), "text_labels": np.ones((0, 2))}, "text_embeddings has")])
def test_features(tmp_path, change, reason):
    path = tmp_path / "f.npz"
    good = {"text_embeddings": np.ones((5, 4)), "text_labels": np.ones((5, 2)), "image_embeddings": np.ones((3, 4)),
            "image_labels": -np.eye(3, 2), "label_names": np.array(["a", "b"]), "label_embeddings": np.ones((2, 4))}
    np.savez(path, **good)
    stored = data.load_features(path)
    assert stored["image_labels"].dtype == np.int8
    assert stored["image_labels"].tolist() == [[-1, 0], [0, -1], [0, 0]]
    assert stored["text_embeddings"].dtype == np.float32
    np.savez(path, **{**good, **change})
    with pytest.raises(UsageError, match=f"^features file {path}: .*{reason}"):
        data.load_features(path)
