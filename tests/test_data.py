"""data.py: stored files, label names, texts, photos, ready-made embeddings, your own folder."""
import gzip
import json
import os
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
    (None, data.digest, "no such file")])
def test_a_damaged_file_is_one_line(tmp_path, content, read, reason):
    """What the file is, its path, the reason, the remedy; only a missing file is MissingFile."""
    path = tmp_path / "file"
    words = [path]
    if content:
        words = [write(path, content), "file", "check the path"]
    with pytest.raises(UsageError, match=rf"^file {path}: .*{reason}.*; check the path$") as error:
        read(*words)
    assert isinstance(error.value, data.MissingFile) == (content is None)


@pytest.mark.parametrize("raised, kind, message", [
    (KeyError("dog"), UsageError, "thing a: not in the form expected .KeyError.'dog'..; mend it"),
    (ValueError("two\nlines"), UsageError, "thing a: two lines; mend it"),
    (UsageError("as it was"), UsageError, "^as it was$"),
    (MemoryError("full"), MemoryError, "full")])
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
    ("t.jsonl", '\n{"text": "a", "labels": ["dgo"]}', "line 2: label 'dgo' is not in the label list.*nearest is ..dog"),
    ("t.jsonl", "{", "line 1: .*each line must be"),
    ("t.jsonl", '{"text": "a", "labels": "dog"}', "line 1: "),
    ("t.jsonl", '{"text": "a", "labels": []}', "none of"),
    ("t.json", "[1]", "give COCO's captions"),
    ("t.txt", "cow", "none of 1 texts"),
    ("d.json", '{"dog": 3}', "form"),
    ("d.json", '{"cow": "A cow moos."}', "none of dog"),
    ("labels.csv", "f,split\n", "holds no label"),
    ("labels.csv", "f,dog\na.png,2\n", "row of a.png: "),
    ("labels.csv", "f,dog\na.png,1\n\nc.png\n", "row of c.png: "),
    ("labels.csv", "f,dog\n", "no photo is in the train part"),
    ("labels.csv", "f,dog\na.png,1\nb.png,0\na.png,0\n", "row of a.png: .*stands twice"),
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


def test_label_file(tmp_path, capsys):
    path = write(tmp_path / "labels.txt", "\ufeffdog\n\n  fire truck \r\nnaïve café\n☀\n" + "x" * 200)
    assert data.read_labels(path) == ["dog", "fire truck", "naïve café", "☀", "x" * 200]
    assert not capsys.readouterr().err
    data.read_labels(write(path, "- dog"))
    assert "'- dog' is taken as a label" in capsys.readouterr().err


@pytest.mark.parametrize("name, lines, texts", [
    ("t.jsonl.gz", ['{"text": " a dog and more", "labels": ["cat", "dog"]}', "", '{"text": "nothing", "labels": []}',
                    '{"text": "a cat\u2028there", "labels": ["cat"]}', '{"text": " ", "labels": ["cat"]}'],
     {"a dog and more": [1, 1], "a cat\u2028there": [0, 1]}),
    ("t.txt", ["a dog\r", "nothing", "", " two felines"], {"a dog": [1, 0], "two felines": [0, 1]}),
    ("t.json", ['{"annotations": [{"caption": "nothing"}, {"caption": "dogs "}]}'], {"dogs": [1, 0]})])
def test_texts_of_files(tmp_path, capsys, name, lines, texts):
    content = "\n".join(lines).encode()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    found, labels = data.read_texts(path, ["dog", "cat"], {"cat": ["feline"]})
    assert dict(zip(found, labels.tolist(), strict=True)) == texts
    assert f"{len(texts)} of {len(texts) + 1} texts have a label" in capsys.readouterr().err


def test_real_captions(shared):
    """How often each label is found was counted before by somebody else's matcher."""
    names = data.label_names("voc2007")
    _, labels = data.read_texts(shared / "captions_val2017.json", names, data.synonyms_of(names, "voc2007"))
    theirs = data.load_features(shared / "photo_embeddings/voc2007_even.npz")["text_labels"]
    assert np.corrcoef(theirs.sum(0), labels.sum(0))[0, 1] > 0.99


@pytest.mark.parametrize("dataset, names", [
    ("scenes", scenes.NAMES), ("scenes", ["boat", "sun"]), ("folder", ["dog", "apple", "fire truck"])])
def test_default_texts(dataset, names):
    """The matcher reads back the labels; where labels are few, sentences without any stay."""
    texts, labels, _ = data.default_texts(dataset, names, 300)
    np.testing.assert_array_equal(data.match_nouns(texts, names, data.synonyms_of(names, dataset)), labels)
    assert labels.any(1).all() == (names != ["boat", "sun"])


def test_template_sentences():
    """Every label stands first equally often, and in others' company too."""
    texts, labels = data.template_texts(["dog", "apple"], 300)
    assert sum(text.find("dog") % 99 < text.find("apple") % 99 for text in texts) == 150
    assert labels.sum() > 350


def test_descriptions(tmp_path, capsys):
    path = write(tmp_path / "d.json", '{"descriptions": {"dog": " A dog  barks.", "cat": "", "cow": "A cow moos."}}')
    assert data.descriptions_of("voc2007", ["dog", "cat"], path) == {"dog": "A dog barks."}
    said = capsys.readouterr().err
    assert "alone for 1 of 2 labels (cat)" in said
    assert "1 descriptions of other labels not used (cow)" in said
    assert data.descriptions_of("folder", ["dog"]) == {}
    assert "no descriptions" in capsys.readouterr().err


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
    notes = write(tmp_path / "notes/notes.txt", "no photo")
    write(tmp_path / "phone.HEIC", "")
    (tmp_path / "loop").symlink_to(tmp_path)
    scandir = os.scandir

    def locked(folder):  # root may look into every folder
        if folder.endswith("locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)
    monkeypatch.setattr(os, "scandir", locked)
    assert data.list_photos(tmp_path) == [tmp_path / "b.PNG", tmp_path / "deep/c.jpeg"]
    said = capsys.readouterr().err
    assert "1 .heic photos, which Pillow cannot read, are left out" in said
    assert f"2 folders, linked or locked, are left out (first: {tmp_path}/locked)" in said
    assert data.list_photos(notes) == [notes]  # asked for by name
    for path in (tmp_path / "nowhere", notes.parent):
        with pytest.raises(UsageError, match=f"^photos {path}: no "):
            data.list_photos(path)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("mark, corner", [(1, (0, 0)), (3, (31, 15)), (6, (15, 0)), (8, (0, 31))])
def test_exif_marks_turn_a_photo_upright(tmp_path, mark, corner):
    """Stored with a white upper left corner; 6: to be turned clockwise, which puts that on the upper right."""
    image = Image.new("RGB", (32, 16))
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = mark
    image.save(tmp_path / "phone.png", exif=exif)
    assert data.open_photo(tmp_path / "phone.png").getpixel(corner) == (255, 255, 255)


def test_deep_pixels(tmp_path):
    """The upper 8 of 16 bits count."""
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert data.open_photo(tmp_path / "deep.png").getpixel((0, 0)) == (156, 156, 156)


def test_drawn():
    """Fewer are among more, over the whole set, by a fixed seed."""
    assert data.drawn(1000, 10).tolist() == sorted(np.random.default_rng(0).permutation(1000)[:10])
    assert set(data.drawn(1000, 10)) < set(data.drawn(1000, 100))
    assert data.drawn(9, None).tolist() == data.drawn(9, 20).tolist() == list(range(9))


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
    """Of seven listed photos the first three are missing; each of the others keeps its own label."""
    photos(tmp_path, "3.png", "4.png", "5.png", "6.png")
    write(tmp_path / "labels.json", json.dumps({f"{n}.png": [f"n{n}"] for n in range(7)}))
    found = data.load_photos("folder", tmp_path, "train", 2, ["split_seed=1"])
    listed = sorted(np.random.default_rng(1).permutation(7)[:6])
    there = [n for n in listed if n > 2]
    assert marks(found) == {f"{there[row]}.png": {f"n{there[row]}"} for row in data.drawn(len(there), 2)}
    assert f"{6 - len(there)} of 6 photos missing, left out (first: {tmp_path}/" in capsys.readouterr().err
    assert "photos missing" in found.policy


def test_identity(tmp_path):
    """Follows the labels' content, and the drawing code."""
    first = data.identity("folder", write(tmp_path / "labels.csv", "file,dog").parent)
    assert first != data.identity("folder", write(tmp_path / "labels.csv", "file,cat").parent)
    assert data.identity("scenes", None).startswith(scenes.DIGEST)


GOOD = {"text_embeddings": np.ones((5, 4)), "text_labels": np.ones((5, 2)), "image_embeddings": np.ones((3, 4)),
        "image_labels": -np.eye(3, 2), "label_names": ["a", "b"], "label_embeddings": np.ones((2, 4))}


def test_features(tmp_path):
    np.savez(tmp_path / "f.npz", **GOOD)
    stored = data.load_features(tmp_path / "f.npz")
    assert stored["image_labels"].dtype == np.int8
    assert stored["image_labels"].tolist() == [[-1, 0], [0, -1], [0, 0]]
    assert stored["text_embeddings"].dtype == np.float32


@pytest.mark.parametrize("name, value, reason", [
    ("text_labels", np.ones((4, 2)), r"text_labels has shape \[4, 2\], expected \[5, 2\]"),
    ("text_embeddings", np.ones((0, 4)), "text_embeddings has shape"),
    ("label_names", "a", "label_names has shape"),
    ("label_names", ["a", "A"], "stands twice"),
    ("label_names", [{}, {}], "allow_pickle"),
    ("image_embeddings", np.full((3, 4), np.nan), "image_embeddings .*not finite"),
    ("image_labels", np.full((3, 2), 2), "image_labels must hold")])
def test_damaged_features(tmp_path, name, value, reason):
    np.savez(tmp_path / "f.npz", **{**GOOD, name: value})
    with pytest.raises(UsageError, match=f"^features file .*/f.npz: .*{reason}"):
        data.load_features(tmp_path / "f.npz")
