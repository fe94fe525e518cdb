"""data.py: stored files, label names, texts, photos, ready-made embeddings."""
import gzip
import json
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
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
        Image.new("RGB", (8, 8)).save(write(folder / name, ""))


def refused(message):
    """`with refused("why"):` around what must raise UsageError"""
    return pytest.raises(UsageError, match=message)


def named(names, row):
    """The labels of a row, "-dog" for an ignored one"""
    return ", ".join({1: name, -1: f"-{name}"}[mark] for name, mark in zip(names, row, strict=True) if mark)


def marks(found, folder):
    """Each photo of the folder and its labels"""
    lines = [f"{photo.relative_to(folder)}: {named(found.names, row)}" for photo, row in zip(*found, strict=True)]
    return "; ".join(lines)


def test_too_little_memory_is_no_damaged_file():
    with pytest.raises(MemoryError), data.reading("a", "thing", "mend it"):
        raise MemoryError


def test_writing(tmp_path):
    """Strict JSON; on a full disk, and in a place that cannot be written, the old content stays."""
    path = tmp_path / "a/x"
    data.write_json(path, {"value": float("nan"), "more": [-np.inf, 1e-300], "path": Path("p")})
    old = path.read_text()
    assert json.loads(old) == {"value": None, "more": [None, 1e-300], "path": "p"}
    (tmp_path / f"a/.x.{os.getpid()}.partial").symlink_to("/dev/full")
    for place, reason in ((path, "No space left"), (path / "under", ".*choose another place")):
        with refused(f"^cannot write {place}: {reason}"):
            data.write_atomically(place, "x" * 100)
    assert path.read_text() == old


def test_a_held_file_is_free_after_its_with(tmp_path):
    """test_cli.py tests that others are refused, and that a killed process releases the lock."""
    with data.hold(tmp_path / "made/.lock", "runs/a") as held:
        assert held.is_locked
    assert not held.is_locked


def read(path):
    """Reads a file as what its name says"""
    names = ["dog", "cat"]
    if path.name == "labels.txt":
        data.read_labels(path)
    elif path.stem == "d":
        data.descriptions_of("voc2007", names, path)
    elif path.stem == "t":
        data.read_texts(path, names)
    else:
        data.load_photos("folder", path.parent, "train")


# {file: {content: what is said of it}}
MISTAKES = {
    "labels.txt": {
        b"\xe9": "utf-8",
        "\n \n": "holds no label",
        "a dog\ncat\nA-Dog": "'A-Dog' stands twice .entries 1 and 3",
        "sun-set\nsun_\u200bset": "stands twice",
        "x" * 201: "not a label",
        "a\x07b": "not a label name: 'a.x07b'",
        "a\u202eb": "not a label name",
    },
    "t.jsonl": {
        '\n{"text": "a", "labels": ["dgo"]}': "line 2: 'dgo' is not in list; each line must be",
        "{": "line 1: Expecting",
    },
    "t.json": {"[1]": "give COCO's captions"},
    "t.txt": {"cow": "none of 1 texts"},
    "d.json": {
        '{"dog": 3}': "form",
        '{"cow": "A cow moos."}': "none of the labels .'dog'",
    },
    "labels.csv": {
        "f,dog\na.png,2\n": "row of a.png: ",
        "f,dog\na.png,1\n\nc.png\n": "row of c.png: ",
        "f,dog,dog\na.png,1,0\n": "'dog' stands twice",
        "f,dog\n": "no photo is in the train part",
        "f,dog\na.png,1\nb.png,0\na.png,0\n": "row of a.png: .*stands twice",
        "a.png,1\nb.png,0\n": "first line must",
        "f,dog,split\na.png,1,x\n": "test, not 'x'",
        "f,dog,split\na.png,1,train\n./a.png,1,test\n": "a.png: stands twice with other labels or in two",
        "f,tags\na.png,dog\n./a.png,cat\n": "a.png: stands twice",
        "a.png,dog\nb.png,cat\n": "first line must",
        "f,dog,cat\na.png,1,0,1\n": "row of a.png: 4 cells, the first line has 3",
        'f,tags\na.png,"dog\nb.png,cat\n': "unexpected end",
        "f,dog\na.png,1\nb.png,x\n": "row of b.png: ",
        "f,dog\na,1\n": "'a' may be .*a.* or .*a.*; write the whole name",
        "f,dog\nz.png,1\n": "none of its 1 photos .*expected",
    },
    "labels.json": {
        '{"a.png": ["dog"], "a.png": ["cat"]}': "a.png: stands twice",
        '{"a.png": "dog"}': "form",
        "[" * 200000: "recursion",
    },
    "metadata.jsonl": {'{"file_name": "a.png", "label": "dog"}\n{"file_name": "b.png", "label": 3}': "entry 2: "},
    "annotations.json": {'{"images": []}': "give COCO's instances"},
}


@pytest.mark.parametrize("name, content", [(name, content) for name in MISTAKES for content in MISTAKES[name]])
def test_mistakes_in_files(tmp_path, name, content):
    """One line that says what is wrong, and where."""
    photos(tmp_path, "a.png", "images/a.jpg")
    with refused(MISTAKES[name][content]) as error:
        read(write(tmp_path / name, content))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


# text | its labels
NOUNS = """
Two dogs. | dog
A hot dog on a table | dining table
a hotdog, a dog show, a manly dogma, MEN | person
MEN and buses | person, bus
puppies and wolves | puppy, wolf
dining-table | dining table
dining  tables | dining table
dog’s bed | dog's bed
"""


@pytest.mark.parametrize("row", NOUNS.strip().splitlines())
def test_match_nouns(row):
    text, expected = row.split(" | ")
    names = ["dog", "person", "dining table", "bus", "puppy", "wolf", "dog's bed"]
    others = {"": ["hot dog", "dog show"], "person": ["man"], "dining table": ["table"], "dog": ["puppy"]}
    assert named(names, data.match_nouns([text], names, others)[0]) == expected


def test_label_file(tmp_path, capsys):
    path = write(tmp_path / "labels.txt",
                 "\ufeffdog\n\u200b\n  fire_truck \r\na_b\nna\u00adïve café\n☀\n" + "x" * 200)
    assert data.read_labels(path) == ["dog", "fire truck", "a b", "naïve café", "☀", "x" * 200]
    assert capsys.readouterr().err == f"{path}: an underscore in a label is read as a space\n"
    data.read_labels(write(path, "dog\nсобака\n猫\ncafé"))
    assert capsys.readouterr().err == (f"{path}: label 'собака' (2 of 4 in another script): CLIP was trained on "
                                       "English texts; English names work better\n")
    data.read_labels(write(path, "- dog"))
    assert "'- dog' is taken as a label" in capsys.readouterr().err


def test_format_characters_make_no_second_label():
    """Except the joiners of some scripts; marks that turn the direction of writing are refused."""
    for letter in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.category(letter) == "Cf" and letter not in "\u200c\u200d":
            with refused("stands twice|not a label name"):
                data.check_names(["sunset", f"sun{letter}set"], "list")


LABELLED = b"""{"text": " a dog and more", "labels": ["cat", "dog"]}

{"text": "nothing", "labels": []}
{"text": "a cat\\u2028there", "labels": ["cat"]}
{"text": " ", "labels": ["cat"]}
"""


@pytest.mark.parametrize("name, content, texts", [
    ("t.jsonl.gz", gzip.compress(LABELLED), {"a dog and more": "dog, cat", "a cat\u2028there": "cat"}),
    ("t.txt", "a dog\r\nnothing\n\n two felines\u2028there", {"a dog": "dog", "two felines\u2028there": "cat"}),
    ("t.json", '{"annotations": [{"caption": "nothing"}, {"caption": "dogs "}]}', {"dogs": "dog"})])
def test_texts_of_files(tmp_path, capsys, name, content, texts):
    names = ["dog", "cat"]
    found, labels = data.read_texts(write(tmp_path / name, content), names, {"cat": ["feline"]})
    assert {text: named(names, row) for text, row in zip(found, labels, strict=True)} == texts
    assert f"{len(texts)} of {len(texts) + 1} texts have a label" in capsys.readouterr().err


@pytest.mark.parametrize("dataset, names", [
    ("scenes", scenes.NAMES), ("scenes", ["boat", "sun"]), ("folder", ["dog", "apple", "fire truck"])])
def test_default_texts(dataset, names):
    """match_nouns finds the labels again; with few labels, sentences without any are kept."""
    texts, labels, _ = data.default_texts(dataset, names, 300)
    np.testing.assert_array_equal(data.match_nouns(texts, names, data.synonyms_of(names, dataset)), labels)
    assert labels.any(1).all() == (names != ["boat", "sun"])


def test_template_sentences():
    """Every label stands first equally often, and sometimes beside others."""
    texts, labels = data.template_texts(["dog", "apple"], 300)
    assert sum(text.find("dog") % 99 < text.find("apple") % 99 for text in texts) == 150
    assert labels.sum() > 350


def test_descriptions(tmp_path, capsys):
    path = write(tmp_path / "d.json", '{"descriptions": {"dog": " A dog  barks.", "cat": "", "cow": "A cow moos."}}')
    assert data.descriptions_of("voc2007", ["dog", "cat"], path) == {"dog": "A dog barks."}
    assert "1 of 2 labels; the template stands alone for cat\n" in capsys.readouterr().err
    assert data.descriptions_of("folder", ["dog"]) == {}
    assert "no descriptions" in capsys.readouterr().err


def test_shipped_names_synonyms_descriptions():
    """As many labels as published; each is described, and its description names it."""
    published = data.DATASETS[:-1]
    assert [len(data.label_names(dataset)) for dataset in published] == [18, 20, 80, 81, 26, 51, 35, 36, 60, 17]
    for dataset in published:
        names = data.check_names(data.label_names(dataset), dataset)
        found = data.descriptions_of(dataset, names)
        assert list(found) == names
        assert all(data.match_nouns([sentence], [name]).any() for name, sentence in found.items())
        assert any(data.synonyms_of(names, dataset).values())


def test_photos_of_a_folder(tmp_path, capsys, monkeypatch):
    photos(tmp_path, "b.PNG", "deep/c.jpeg", ".hidden.png", ".hidden/d.png")
    notes = write(tmp_path / "locked/notes.txt", "")
    (tmp_path / "loop").symlink_to(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, _: path.name != "locked")  # root may look into every folder
    assert data.list_photos(tmp_path) == [tmp_path / "b.PNG", tmp_path / "deep/c.jpeg"]
    assert f"2 folders, linked or locked, are left out (first: {tmp_path}/locked)" in capsys.readouterr().err
    assert data.list_photos(notes) == [notes]  # asked for by name
    with refused(f"^photos {notes.parent}: no photo in this folder; photos end in .jpg "):
        data.list_photos(notes.parent)


@pytest.mark.parametrize("value", [3000, 48000])
def test_grey_of_12_and_16_bits_turned_upright(tmp_path, value):
    """In 16 bits the value 3000 of 4095 is 187 of 255, and 48,000 of 65,535 too. Only the upper left corner is bright;
    EXIF's 6 turns it clockwise to the upper right."""
    pixels = np.zeros((16, 32), np.uint16)
    pixels[0, 0] = value
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
    assert data.open_photo(tmp_path / "phone.png").getpixel((15, 0)) == (187, 187, 187)


def test_drawn():
    """A smaller draw is part of a larger one; both cover the whole set, by a fixed seed. The labels of scenes need no
    drawing."""
    assert data.drawn(1000, 10).tolist() == sorted(np.random.default_rng(0).permutation(1000)[:10])
    assert data.drawn(9).tolist() == data.drawn(9, 20).tolist() == list(range(9))
    photos, labels = data.load_photos("scenes", None, "test", 30)
    assert [index for _, index in photos] == data.drawn(2000, 30).tolist()
    np.testing.assert_array_equal(labels, [scenes.picture(*photo)[1] for photo in photos])


def test_missing_photos_are_left_out_before_some_are_drawn(tmp_path, capsys):
    """Photos 0, 1, 2, 4, 5, 6 are for training, three of them exist; two of those are drawn, with their labels."""
    photos(tmp_path, "4.png", "5.png", "6.png")
    write(tmp_path / "labels.json", json.dumps({f"{n}.png": [f"n{n}"] for n in range(7)}))
    found = data.load_photos("folder", tmp_path, "train", 2, ["split_seed=1"])
    assert marks(found, tmp_path) == "4.png: n4; 6.png: n6"
    said = f"3 of 6 photos missing, left out (first: {tmp_path}/0.png)"
    assert said in capsys.readouterr().err
    assert said in found.policy


def test_labels_of_other_values_are_refused():
    with refused("^labels must hold 1 .present., 0 .absent. or -1 .ignored. only$"):
        data.LabelledPhotos(["a.png"], np.array([[0, 2]]), "")


def test_identity_of_scenes():
    """That of a folder is tested in test_datasets.py."""
    assert data.identity("scenes", None) == scenes.DIGEST + data.digest(scenes.CHECKPOINT)


FEATURES = {"text_embeddings": np.ones((5, 4)), "text_labels": np.ones((5, 2)), "image_embeddings": np.ones((3, 4)),
            "image_labels": -np.eye(3, 2), "label_names": ["a", "b"], "label_embeddings": np.ones((2, 4))}


def test_features(tmp_path):
    by_column = {name: np.asfortranarray(array) for name, array in FEATURES.items()}
    np.savez(tmp_path / "f.npz", **by_column)
    stored = data.load_features(tmp_path / "f.npz")
    for name, array in FEATURES.items():
        np.testing.assert_array_equal(stored[name], array)
    for name, kind in (("image_labels", np.int8), ("image_embeddings", np.float32)):
        assert stored[name].dtype == kind and stored[name].flags.c_contiguous


@pytest.mark.parametrize("name, value, reason", [
    ("text_labels", np.ones((4, 2)), r"text_labels has shape \[4, 2\], expected \[5, 2\]"),
    ("text_embeddings", np.ones((0, 4)), "text_embeddings has shape"),
    ("label_names", ["a", "A"], "stands twice"),
    ("label_names", [{}, {}], "allow_pickle"),
    ("image_embeddings", np.full((3, 4), np.nan), "image_embeddings .*not finite"),
    ("image_labels", np.full((3, 2), 2), "image_labels must hold")])
def test_damaged_features(tmp_path, name, value, reason):
    np.savez(tmp_path / "f.npz", **{**FEATURES, name: value})
    with refused(f"^features file .*/f.npz: .*{reason}"):
        data.load_features(tmp_path / "f.npz")
