"""data.py: stored files, labels, texts, photos, the loaders on files in the published form, `--check`, a tenth set."""
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image
from scipy.io import savemat

import data
import scenes
from data import UsageError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")
    return path


def photos(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def table(path, header, rows, separator=","):
    return write(path, "\n".join(separator.join(map(str, row)) for row in [header, *rows]))


def load(dataset, root, split, *policy):
    return data.load_photos(dataset, root, split, policy=policy)


def marks(found):
    """{photo's name: names of its labels}"""
    present = [{name for name, value in zip(found.names, row, strict=True) if value == 1} for row in found.labels]
    return {path.name: names for path, names in zip(found.photos, present, strict=True)}


@pytest.mark.parametrize("content, read, reason", [
    (None, data.read_json, "no such file"), ("folder", data.read_text, "is a directory"), (b"{", data.read_json, "Exp"),
    (b"[" * 200000, data.read_json, "recursion"), (b"\xe9", data.read_text, "utf-8"),
    (b"", lambda path, what, remedy: data.read_stored(path, what, lambda _: {}["a"], remedy), "not in the form .*'a'")])
def test_damaged_files_are_one_line(tmp_path, content, read, reason):
    """Whatever is the matter with a file: what it was to be, its path, why, and what to do; nothing else is raised."""
    path = tmp_path / "file"
    path.mkdir() if content == "folder" else content is not None and path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"^thing {path}: .*{reason}.*; mend it$") as error:
        read(path, "thing", "mend it")
    assert "\n" not in str(error.value) and isinstance(error.value, data.MissingFile) == (content is None)


def test_writing(tmp_path):
    """Strict JSON, and the old content or the new: a full disk leaves what was there."""
    data.write_json(tmp_path / "a/x", {"value": float("nan"), "more": [-np.inf, 2.5, 1e-300], "path": Path("p")})
    assert json.loads((tmp_path / "a/x").read_text()) == {"value": None, "more": [None, 2.5, 1e-300], "path": "p"}
    assert os.listdir(tmp_path / "a") == ["x"]
    os.symlink("/dev/full", tmp_path / f".full.txt.{os.getpid()}.partial")
    with pytest.raises(UsageError, match="^cannot write .*No space left"):
        data.write_atomically(write(tmp_path / "full.txt", "old"), "x" * 100)
    assert (tmp_path / "full.txt").read_text() == "old"


def test_a_held_file_is_refused_to_others(tmp_path):
    """Another process holds it, is killed, and the file is free: no lock is left behind."""
    program = "import data, sys, time; held = data.hold(sys.argv[1], 'x'); print('held', flush=True); time.sleep(60)"
    lock = tmp_path / "made" / ".lock"
    with subprocess.Popen([sys.executable, "-c", program, lock], cwd=REPOSITORY, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="^runs/a: another run is writing it"):
            data.hold(lock, "runs/a")
        other.kill()
    data.hold(lock, "runs/a").close()


READ = {"labels.txt": data.read_labels, "d.json": lambda path: data.descriptions_of("voc2007", ["dog"], path),
        **dict.fromkeys(("t.jsonl", "t.json", "t.txt"), lambda path: data.read_texts(path, ["dog", "cat"])),
        **dict.fromkeys(("labels.csv", "labels.json"), lambda path: data.load_photos("folder", path.parent, "train"))}


@pytest.mark.parametrize("name, content, reason", [
    ("labels.txt", "\n \n", "holds no label"), ("labels.txt", "dog\ncat\nDog", "'Dog' stands twice .entries 1 and 3"),
    ("labels.txt", "a b\na-b", "stands twice"), ("labels.txt", "x" * 201, "not a label"), ("labels.txt", ".", "not a "),
    ("labels.txt", "a\x07b", "not a label name: 'a.x07b'"), ("labels.txt", "a\u202eb", "not a label name"),
    ("t.jsonl", '\n{"text": "a", "labels": ["dgo"]}', "line 2: label 'dgo' is not in the label list .did you mean dog"),
    ("t.jsonl", "{", "line 1 has another form.*each line must be"), ("t.jsonl", '{"text": "a"}', "line 1 has another"),
    ("t.jsonl", '{"text": "a", "labels": "dog"}', "line 1 has"), ("t.jsonl", '{"text": "a", "labels": []}', "none of"),
    ("t.jsonl", '{"text": "a", "labels": {"dog": 0}}', "line 1 has"), ("t.json", "[1]", "CO"), ("t.txt", "cow", "none"),
    ("d.json", "[1]", "form"), ("d.json", '{"dog": 3}', "form"), ("d.json", '{"cow": "A cow moos."}', "none of dog"),
    ("labels.csv", "f,dog\na.png,2\n", r"line 2 \(a.png, 2\)"), ("labels.csv", "", "holds no label"),
    ("labels.csv", "f,dog\na.png,1\n\nc.png\n", r"line 4 \(c.png\) is not 2"), ("labels.json", "[]", "form"),
    ("labels.csv", "f,dog\n", "no photo is in the train part"), ("labels.csv", "f,dog,dog\na.png,1,0\n", "the header"),
    ("labels.csv", "f,dog,Dog\na.png,1,0\n", "stands twice"),
    ("labels.csv", "f,dog\na.png,1\nb.png,0\na.png,0\n", "a.png stands twice"),
    ("labels.csv", "a.png,1\nb.png,0\n", "first line must"),
    ("labels.csv", "f,dog,split\na.png,1,x\n", "test, not 'x'"), ("labels.json", '{"a.png": "dog"}', "form"),
    ("labels.csv", "f,dog\nz.png,1\n", "none of its 1 photos .*expected"), ("labels.json", '{"a.png": [1]}', "form")])
def test_mistakes_in_files(tmp_path, name, content, reason):
    """What people write by hand, wrong in one way each: one line that says what and where."""
    with pytest.raises(UsageError, match=reason) as error:
        READ[name](write(tmp_path / name, content))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text, expected", [
    ("Two dogs.", {"dog"}), ("A hot dog on a table", {"dining table"}), ("a hotdog", set()), ("dog show", set()),
    ("MEN and buses", {"person", "bus"}), ("a manly dogma", set()), ("puppies", {"puppy"}), ("wolves", {"wolf"}),
    ("dining-table", {"dining table"}), ("dining  tables", {"dining table"}), ("dog’s bed", {"dog's bed"})])
def test_match_nouns(text, expected):
    names = ["dog", "person", "dining table", "bus", "puppy", "wolf", "dog's bed"]
    others = {"": ["hot dog", "dog show"], "person": ["man"], "dining table": ["table"], "dog": ["puppy"]}
    row = data.match_nouns([text], names, others)[0]
    assert {name for name, value in zip(names, row, strict=True) if value} == expected


def test_labels_and_labelled_texts(tmp_path, capsys):
    path = write(tmp_path / "labels.txt", "\ufeffdog\n\n  fire truck \r\nnaïve café\n☀\n" + "x" * 200)
    assert data.read_labels(path) == ["dog", "fire truck", "naïve café", "☀", "x" * 200] and not capsys.readouterr().err
    lines = ['{"text": "a dog and a cat", "labels": ["cat", "dog"]}', "", '{"text": "nothing", "labels": []}',
             '{"text": "a cat\u2028there", "labels": ["cat"]}', '{"text": " ", "labels": ["cat"]}']
    path = write(tmp_path / "t.jsonl.gz", gzip.compress("\n".join(lines).encode()))
    texts, labels = data.read_texts(path, ["dog", "cat"])
    assert texts == ["a dog and a cat", "a cat\u2028there"] and labels.tolist() == [[1, 1], [0, 1]]
    assert "2 of 3 texts have a label" in capsys.readouterr().err


def test_captions(tmp_path, shared):
    """Real captions; how often each label is found was counted before by somebody else's matcher."""
    names = data.label_names("voc2007")
    texts, labels = data.read_texts(shared / "captions_val2017.json", names, data.synonyms_of(names, "voc2007"))
    with np.load(shared / "photo_embeddings" / "voc2007_even.npz") as stored:
        theirs = stored["text_labels"].sum(0)
    assert 14000 < len(texts) < 18500 and labels.any(1).all() and np.corrcoef(theirs, labels.sum(0))[0, 1] > 0.99
    plain = write(tmp_path / "captions.txt", "a dog\r\nnothing here\n\ntwo felines and a bike\n")
    texts, labels = data.read_texts(plain, ["dog", "cat"], {"cat": ["feline"]})
    assert texts == ["a dog", "two felines and a bike"] and labels.tolist() == [[1, 0], [0, 1]]


def test_default_texts():
    """The matcher reads back what the grammar named; of template sentences each label stands first equally often."""
    names = ["dog", "apple", "fire truck"]
    for dataset, known in (("scenes", scenes.NAMES), ("scenes", ["boat", "sun"]), ("folder", names)):
        texts, labels, _ = data.default_texts(dataset, known, 300)
        np.testing.assert_array_equal(data.match_nouns(texts, known, data.synonyms_of(known, dataset)), labels)
        assert 50 < len(texts) <= 300 and labels.any(1).all() == (known != ["boat", "sun"])  # few: also without any
    first = [min(names, key=lambda name: (text + name).index(name)) for text in texts]
    assert {first.count(name) for name in names} == {100} and labels.sum(0).min() > 130


def test_descriptions(tmp_path, capsys):
    path = write(tmp_path / "d.json", '{"descriptions": {"dog": " A dog  barks.", "cat": "", "cow": "A cow moos."}}')
    assert data.descriptions_of("voc2007", ["dog", "cat"], path) == {"dog": "A dog barks."}
    said = capsys.readouterr().err
    assert "alone for 1 of 2 labels (cat)" in said and "1 descriptions of other labels not used (cow)" in said
    assert data.descriptions_of("folder", ["dog"]) == {} and capsys.readouterr().err.count("\n") == 1
    assert data.descriptions_of("x", ["dog"], write(path, '{"dog": "It barks."}')) == {"dog": "It barks."}


def test_photos(tmp_path, capsys, monkeypatch):
    photos(tmp_path, "b.PNG", "deep/c.jpeg", ".hidden.png", ".hidden/d.png", "locked/e.png")
    (tmp_path / "phone.HEIC").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    opened = os.scandir

    def scandir(folder):  # root may look into every folder
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return opened(folder)
    monkeypatch.setattr(os, "scandir", scandir)
    notes = write(tmp_path / "notes/notes.txt", "no photo")
    assert data.list_photos(tmp_path) == [tmp_path / "b.PNG", tmp_path / "deep/c.jpeg"]
    said = capsys.readouterr().err
    assert "1 .heic photos, which Pillow cannot read, are left out" in said and said.count("\n") == 2
    assert f"2 folders, linked or locked, are left out (first: {tmp_path / 'locked'})" in said
    assert data.list_photos(notes) == [notes]  # asked for by name
    for path in (tmp_path / "nowhere", notes.parent):
        with pytest.raises(UsageError, match=f"^photos {path}: no "):
            data.list_photos(path)
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone held upright writes it
    Image.new("RGB", (40, 20)).save(tmp_path / "phone.jpg", exif=exif)
    assert data.open_photo(tmp_path / "phone.jpg").size == (20, 40)
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert data.open_photo(tmp_path / "deep.png").getpixel((0, 0)) == (156, 156, 156)  # 40000 / 256
    for kind in (np.int32, np.float32):
        Image.fromarray(np.full((4, 4), 40000, kind)).save(tmp_path / "deep.tif")
        with pytest.raises(ValueError, match="32 bits a pixel"):
            data.open_photo(tmp_path / "deep.tif")


@pytest.mark.parametrize("change, reason", [
    ({"text_labels": np.ones((4, 2), np.int8)}, r"text_labels has shape \[4, 2\], expected \[5, 2\]"),
    ({"label_embeddings": np.ones((2, 3))}, "label_embeddings has"), ({"label_names": np.array("a")}, "names has"),
    ({"image_embeddings": np.full((3, 4), np.nan)}, "image_embeddings .*not finite"), ({"image_labels": []}, "s has"),
    ({"image_embeddings": np.full((3, 4), "x")}, "embeddings .*not finite"), ({"label_names": ["a", "A"]}, "twice"),
    ({"image_labels": np.full((3, 2), 2)}, "image_labels must hold"), ({"label_names": np.array([{}])}, "allow_pickle"),
    ({"text_embeddings": np.ones((0, 4)), "text_labels": np.ones((0, 2))}, "text_embeddings has")])
def test_features(tmp_path, change, reason):
    path = tmp_path / "f.npz"
    good = {"text_embeddings": np.ones((5, 4)), "text_labels": np.ones((5, 2)), "image_embeddings": np.ones((3, 4)),
            "image_labels": np.eye(3, 2), "label_names": np.array(["a", "b"]), "label_embeddings": np.ones((2, 4))}
    np.savez(path, **good)
    kinds = {name: np.asarray(array).dtype.name for name, array in data.load_features(path).items()}
    assert kinds["image_labels"] == "int8" and kinds["text_embeddings"] == kinds["label_embeddings"] == "float32"
    np.savez(path, **{**good, **change})
    with pytest.raises(UsageError, match=f"^features file {path}: .*{reason}"):
        data.load_features(path)


@pytest.mark.parametrize("dataset, count", [
    ("scenes", 18), ("voc2007", 20), ("coco2014", 80), ("nuswide", 81), ("pa100k", 26), ("rapv1", 51), ("peta", 35),
    ("multiscene", 36), ("mlrsnet", 60), ("ucm", 17)])
def test_names_synonyms_descriptions(dataset, count, capsys):
    """As many labels as published, words for a prompt; each is described by its name in the manner of SSPA's figure."""
    names = data.check_names(data.label_names(dataset), dataset)
    assert len(names) == count and all(name == " ".join(name.replace("_", " ").split()) for name in names)
    found = data.descriptions_of(dataset, names)
    assert list(found) == names and not capsys.readouterr().err
    for name, sentence in found.items():
        assert re.search(r"often found with .*\.$", sentence) and data.match_nouns([sentence], [name])[0, 0], sentence
    words = [data.plain(word) for name, words in data.synonyms_of(names, dataset).items() for word in words if name]
    assert words and (dataset == "scenes" or len(words) == len(set(words)))


def told(dataset, root):
    """Ask for a dataset that is not there and read its message -> place(words): where, as the message says, the file
    belongs whose path holds these words; or its folder, where the message gives a pattern."""
    with pytest.raises(UsageError) as error:
        data.load_photos(dataset, root, "train")
    tree, source = re.search(rf"; expected {root}/([^;]+); (.+)", str(error.value)).groups()
    assert "\n" not in str(error.value) and "<root>" not in source

    def expand(path):
        inner = re.search(r"\{([^{}]*)\}", path)
        return [path] if not inner else [one for part in re.split(", ?", inner[1]) for one in
                                         expand(path[:inner.start()] + part + path[inner.end():])]

    def place(*words):
        path, = {path for path in expand(re.sub(r" \(.*\)", "", tree)) if all(word in path for word in words)}
        return root / re.sub(r"/[^/]*[*<].*|/[^/]* \.\.\..*", "", path)
    return place


def cells(values):
    """A column of MATLAB cells; a dict among the values is a struct."""
    return np.array(values, object)[:, None]


def test_voc2007(tmp_path, monkeypatch):
    """One object that is not difficult makes its label present, wherever it stands; only difficult ones: the policy."""
    place = told("voc2007", tmp_path)
    things = [("dog", 1), ("dog", 0), ("cat", 1), ("cat", 1), ("tvmonitor", 0), ("tvmonitor", 1)]
    box = "<bndbox><xmin>1</xmin><ymin>11</ymin><xmax>100</xmax><ymax>50</ymax></bndbox>"
    objects = (f"<object><name>{name}</name><difficult>{hard}</difficult>{box}</object>" for name, hard in things)
    size = "<size><width>200</width><height>100</height></size>"
    write(place("Annotations") / "000001.xml", "".join(["<a>", size, *objects, "</a>"]))
    write(place("trainval.txt"), "000001\n")
    photos(place("JPEGImages"), "000001.jpg")
    for policy, cat in (((), -1), (["difficult=negative"], 0), (["difficult=positive"], 1)):
        found = load("voc2007", tmp_path, "train", *policy)
        assert found.labels[0, [7, 11, 19]].tolist() == [cat, 1, 1] and np.abs(found.labels).sum() == 2 + abs(cat)
    write(place("Annotations") / "000001.xml", f"<a>{size}<object><name>unicorn</name>{box}</object></a>")
    with pytest.raises(UsageError, match="^voc2007: annotation .*000001.xml: .*unicorn"):
        load("voc2007", tmp_path, "train")
    with pytest.raises(UsageError, match="^voc2007: image list .*/test.txt: no such file.*; expected") as error:
        load("voc2007", tmp_path, "test")
    embed, fetched = pytest.importorskip("embed"), []
    monkeypatch.setattr(embed, "download_voc2007", fetched.append)
    exec(re.search(r'python -c "(.*?)"', str(error.value)).group(1))  # what the message tells a person to run
    assert fetched == [str(tmp_path)]


def test_real_voc_and_coco(shared):
    """VOC's counts by text search in the XML; COCO's labels photo by photo, by its own category table."""
    found = {kind: load("voc2007", shared, "test", f"difficult={kind}") for kind in ("ignore", "negative", "positive")}
    texts = [(path.parent.parent / f"Annotations/{path.stem}.xml").read_text() for path in found["ignore"].photos]
    for column, raw in ((14, "person"), (10, "diningtable"), (6, "car")):
        mine = ["".join(part for part in text.split("<object>")[1:] if f"<name>{raw}</name>" in part) for text in texts]
        easy, seen = sum("<difficult>0<" in part for part in mine), sum(map(bool, mine))
        assert [(found[kind].labels[:, column] == 1).sum() for kind in found] == [easy, easy, seen]
        assert (found["ignore"].labels[:, column] == -1).sum() == seen - easy
    assert len(texts) == 150 and len(data.load_photos("voc2007", shared, "train", limit=7).photos) == 7
    content = json.loads((shared / "coco_mini/annotations/instances_val2017.json").read_text())
    name = {entry["id"]: entry["name"] for entry in content["categories"]}
    named = marks(load("coco2014", shared / "coco_mini", "test"))
    for entry in content["images"]:
        expected = {name[one["category_id"]] for one in content["annotations"] if one["image_id"] == entry["id"]}
        assert named[entry["file_name"]] == expected


def test_coco(tmp_path, capsys):
    place, names = told("coco2014", tmp_path), sorted(data.LABEL_WORDS["coco2014"])
    content = {"images": [{"id": n, "file_name": f"{n}.jpg", "width": 200, "height": 100} for n in (7, 8, 9, 10)],
               "categories": [{"id": 100 + n, "name": name} for n, name in enumerate(names)],
               "annotations": [{"image_id": image, "category_id": 100 + names.index(name), "iscrowd": crowd,
                                "bbox": [60, 10, 40, 40]} for
                               image, name, crowd in ((7, "toothbrush", 0), (8, "person", 1), (10, "person", 0))]}
    path = write(place("instances_train2014"), json.dumps(content))
    photos(place("/train2014/"), "7.jpg", "8.jpg", "9.jpg")
    found = load("coco2014", tmp_path, "train")
    assert marks(found) == {"7.jpg": {"toothbrush"}, "8.jpg": {"person"}, "9.jpg": set()}
    said = f"1 of 4 photos missing, left out (first: {place('/train2014/')}/10.jpg)"
    assert said in capsys.readouterr().err and found.policy == f"train2014, crowds count, unlabelled=keep; {said}"
    assert set(marks(load("coco2014", tmp_path, "train", "unlabelled=drop"))) == {"7.jpg", "8.jpg"}
    wrong = {"image_id": 99, "category_id": 101, "bbox": [0, 0, 1, 1]}
    data.coco_things.cache_clear()
    write(path, json.dumps({**content, "annotations": [wrong]}))
    with pytest.raises(UsageError, match="^coco2014: annotations .*2014.json: .*99.*give COCO's instances"):
        load("coco2014", tmp_path, "train")


def test_nuswide(tmp_path):
    """A label value of -1130179, as the published file for "lake" has one, is ignored; photos lie as listed or flat."""
    place = told("nuswide", tmp_path)
    write(place("ImageList") / "TrainImagelist.txt", "actor\\1.jpg\r\nzoo\\2.jpg\r\nzoo\\3.jpg\r\nzoo\\4.jpg\r\n")
    values = {"lake": "0\n-1130179\n1\n1\n", "zebra": "1\n0\n0\n0\n"}
    for concept in data.LABEL_WORDS["nuswide"]:
        write(place("Labels", "_Train") / f"Labels_{concept}_Train.txt", values.get(concept, "0\n0\n0\n0\n"))
    photos(place("Flickr"), "actor/1.jpg", "zoo/2.jpg", "zoo/3.jpg")
    found = load("nuswide", tmp_path, "train")
    assert marks(found) == {"1.jpg": {"zebra"}, "2.jpg": set(), "3.jpg": {"lake"}}
    assert (found.labels == -1).sum(1).tolist() == [0, 1, 0] and "1 odd values ignored; 1 of 4 photos" in found.policy
    for path in list(place("Flickr").glob("*/*")):
        path.rename(place("Flickr") / path.name)
    assert marks(load("nuswide", tmp_path, "train", "unlabelled=drop")) == {"1.jpg": {"zebra"}, "3.jpg": {"lake"}}
    write(place("Labels", "_Train") / "Labels_zebra_Train.txt", "1\n")
    with pytest.raises(UsageError, match="zebra: 1 labels for 4 listed photos"):
        load("nuswide", tmp_path, "train")


def test_pa100k(tmp_path):
    place, names = told("pa100k", tmp_path), list(data.LABEL_WORDS["pa100k"])[::-1]  # the file's order is not ours
    labels, content = np.zeros((2, 26), np.uint8), {"attributes": cells(names)}
    labels[0, names.index("Hat")] = labels[1, names.index("boots")] = 1
    for part in ("train", "val", "test"):
        photos(place("release_data"), f"{part}1.jpg", f"{part}2.jpg")
        content |= {f"{part}_images_name": cells([f"{part}1.jpg", f"{part}2.jpg"]), f"{part}_label": labels}
    savemat(place("annotation.mat"), content)
    expected = {"train1.jpg": {"person wearing a hat"}, "train2.jpg": {"person in boots"}}
    assert marks(load("pa100k", tmp_path, "train", "validation=drop")) == expected
    assert sorted(marks(load("pa100k", tmp_path, "train"))) == ["train1.jpg", "train2.jpg", "val1.jpg", "val2.jpg"]
    assert list(marks(load("pa100k", tmp_path, "test"))) == ["test1.jpg", "test2.jpg"]


def test_peta(tmp_path):
    """Value 2 is absent; four other columns go before the labels, whose order is the file's own; rows count from 1."""
    place, names = told("peta", tmp_path), ["extra", *list(data.LABEL_WORDS["peta"])[::-1]]
    values = np.zeros((4, 4 + 36))
    values[:, 4 + names.index("personalMale")] = [1, 2, 1, 0]
    values[:, 4 + names.index("hairLong")] = [2, 1, 0, 1]
    parts = [{"train": [[1]], "val": [[2]], "test": [[3], [4]]}, {"train": [[4]], "val": [[3]], "test": [[2], [1]]}]
    photos(place("00001.png"), *(f"{n:05d}.png" for n in range(1, 5)))
    savemat(place("PETA.mat"), {"peta": {"a": values, "b": cells(names), "c": 0, "d": cells(parts)}})
    assert marks(load("peta", tmp_path, "train")) == {"00001.png": {"man"}, "00002.png": {"person with long hair"}}
    assert marks(load("peta", tmp_path, "train", "validation=drop")) == {"00001.png": {"man"}}
    assert marks(load("peta", tmp_path, "test")) == {"00003.png": {"man"}, "00004.png": {"person with long hair"}}
    assert list(marks(load("peta", tmp_path, "test", "partition=1"))) == ["00002.png", "00001.png"]


def test_rapv1(tmp_path):
    place, names = told("rapv1", tmp_path), [f"more{n}" for n in range(41)] + list(data.LABEL_WORDS["rapv1"])[::-1]
    values = np.zeros((3, 92), np.uint8)
    values[0, names.index("Female")] = values[2, names.index("Box")] = values[1, names.index("more1")] = 1
    photos(place("RAP_dataset"), *(f"CAM{n}.png" for n in range(3)))
    parts = cells([{"train": [1, 2], "test": [3]}, {"train": [3, 1], "test": [2]}])
    files = cells([f"CAM{n}.png" for n in range(3)])
    record = {"a": parts, "b": values, "c": cells(names[::-1]), "d": cells(names), "e": 0, "f": files, "g": 0}
    savemat(place("RAP_annotation.mat"), {"RAP_annotation": record})
    assert marks(load("rapv1", tmp_path, "train")) == {"CAM0.png": {"woman"}, "CAM1.png": set()}
    assert marks(load("rapv1", tmp_path, "test")) == {"CAM2.png": {"person with a box"}}
    assert list(marks(load("rapv1", tmp_path, "train", "partition=1"))) == ["CAM2.png", "CAM0.png"]


def test_mlrsnet(tmp_path, capsys):
    """In the published "harbor&port.csv" the names stand in alphabetical order, in desert.csv chaparral follows water:
    the same content there must give the same labels. 40 / 10 / 50 % of every category."""
    place, names = told("mlrsnet", tmp_path), sorted(data.LABEL_WORDS["mlrsnet"])
    moved = [name for name in names if name != "chaparral"]
    moved.insert(moved.index("water") + 1, "chaparral")
    for category, order in (("harbor&port", names), ("desert", moved)):
        rows = [[int(name in ("trees", "chaparral", "sand")[:2 + n % 2]) for name in order] for n in range(10)]
        rows = [[f"{category}{n}.jpg", *row] for n, row in enumerate(rows)]
        table(place("Labels") / f"{category}.csv", ["image", *order], rows)
        photos(place("Images") / category, *(row[0] for row in rows))
    train, test = (marks(load("mlrsnet", tmp_path, split, "validation=drop")) for split in ("train", "test"))
    assert [sum("desert" in name for name in part) for part in (train, test)] == [4, 5] and len(train) + len(test) == 18
    assert all(labels - {"sand"} == {"tree", "chaparral"} and ("sand" in labels) == (int(name[-5]) % 2 == 1)
               for name, labels in (train | test).items())
    assert not set(train) & set(test) and len(marks(load("mlrsnet", tmp_path, "train")) | test) == 20
    assert set(marks(load("mlrsnet", tmp_path, "test", "split_seed=1"))) != set(test)
    photos(place("Images") / "cloud", "cloud1.jpg")
    assert data.main(["--check", "mlrsnet", "--data-root", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "wrong? train: no CSV for the photos of cloud" in said and "wrong? test: 2 categories with 20 photos" in said
    table(place("Labels") / "beach.csv", ["image", *names[:-1], "wind mill"], [["a.jpg"] + [0] * 60])
    with pytest.raises(UsageError, match="beach.csv: the header has wind mill, lacks wind turbine"):
        load("mlrsnet", tmp_path, "train")


def test_ucm_and_multiscene(tmp_path):
    place, names = told("ucm", tmp_path), list(data.LABEL_WORDS["ucm"])[::-1]
    rows = [[f"agricultural{n:02d}", *(int(name == "field") for name in names)] for n in range(10)]
    table(place("LandUse"), ["IMAGE\\LABEL", *names], rows, "\t")
    photos(place("Images") / "agricultural", *(f"{row[0]}.tif" for row in rows))
    train, test = (marks(load("ucm", tmp_path, split)) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2) and list((train | test).values()) == [{"field"}] * 10
    place, names = told("multiscene", tmp_path), list(data.LABEL_WORDS["multiscene"])[::-1]
    table(place("train.csv"), ["id", *names], [["7", *(int(name == "Sea") for name in names)]])
    photos(place("images"), "7.jpg")
    assert marks(load("multiscene", tmp_path, "train")) == {"7.jpg": {"sea"}}


@pytest.mark.parametrize("name, content", [
    ("labels.csv", "file;dog;split;cat\na.png;1;train;0\n\nsub/b.png;0;test;1\nc.png;1;train;-1\n"),
    ("labels.json", '{"a.png": ["dog"], "sub/b.png": ["cat"], "c.png": ["dog"]}')])
def test_folder(tmp_path, capsys, name, content):
    """Either form, one folder deeper than the one given: the --data-root that the message names works."""
    photos(tmp_path / "mine", "a.png", "sub/b.png", "c.png", "spare.png")
    write(tmp_path / "mine" / name, content)
    with pytest.raises(UsageError, match=f"under {tmp_path}, but it is in .*: pass --data-root ") as error:
        load("folder", tmp_path, "train")
    root = re.search(r"pass --data-root ([^;]+);", str(error.value)).group(1)
    train, test = (load("folder", root, split) for split in ("train", "test"))
    assert marks(train) | marks(test) == {"a.png": {"dog"}, "b.png": {"cat"}, "c.png": {"dog"}}
    assert sorted(data.label_names("folder", root)) == ["cat", "dog"]
    assert name == "labels.json" or (train.labels.tolist() == [[1, 0], [1, -1]] and set(marks(test)) == {"b.png"})
    data.main(["--check", "folder", "--data-root", root])
    assert f"1 photos of the folder without labels (first: {root}/spare.png)" in capsys.readouterr().err


@pytest.mark.parametrize("dataset, word, takes", [
    ("voc2007", "difficult=maybe", "difficult=ignore, difficult=negative, difficult=positive"), ("ucm", "", "seed=N"),
    ("voc2007", "unlabelled=drop", "difficult=ignore"), ("ucm", "split_seed=-1", "seed=N"), ("scenes", "a=b", "none"),
    ("peta", "partition=5", "partition=4, valid"), ("multiscene", "root=x", "none"), ("ucm", "split_seed=N", "=")])
def test_unknown_policies(tmp_path, dataset, word, takes):
    with pytest.raises(UsageError, match=rf"^--policy {word}.*: {dataset} takes .*{takes}"):
        load(dataset, tmp_path, "train", word)


def test_check(command, tmp_path, shared):
    """On 400 of VOC's photos: the counts are those of the files, and what differs from the published ones is named."""
    done = command("data.py", "--check", "voc2007", "--data-root", shared, "--policy", "difficult=positive", expect=2)
    assert re.search(r"train +250 photos \(published: 5,011\).*difficult=positive", done.stdout)
    assert "wrong? test: 150 photos, 4,952 published" in done.stderr
    persons = (load("voc2007", shared, "train", "difficult=positive").labels[:, 14] == 1).sum()
    assert f"\nperson {persons:>44}" in done.stdout
    coco = command("data.py", "--check", "coco2014", "--data-root", shared / "coco_mini", expect=2).stdout
    assert "(published: 118,287)" in coco and "(published: 5,000)" in coco  # it has the names of 2017
    missing = command("data.py", "--check", "ucm", "--data-root", tmp_path, expect=2)
    assert missing.stderr.startswith("data.py: ucm: no LandUse_Multilabeled.txt") and not missing.stdout
    assert "difficult=negative" in command("data.py", "--help").stdout


def test_check_of_a_sound_set(tmp_path, capsys):
    """Nothing wrong is 0; a torn photo, a label without a photo and a photo in both parts are each found."""
    photos(tmp_path, *(f"{n}.png" for n in range(10)))
    header, words = ["file", "dog", "cat", "split"], ["--check", "folder", "--data-root", str(tmp_path)]
    rows = [[f"{n}.png", 1, 1, "train" if n < 8 else "test"] for n in range(10)]
    table(tmp_path / "labels.csv", header, rows)
    assert data.main(words) == 0 and "nothing wrong was found" in capsys.readouterr().out
    write(tmp_path / "3.png", b"torn")
    rows = [[name, 1, int(split == "train" and name > "1"), split] for name, _, _, split in rows]
    table(tmp_path / "labels.csv", header, [*rows, ["0.png", 1, 0, "test"]])
    assert data.main(words) == 2
    said = capsys.readouterr().err
    assert "test: no photo with cat" in said and "3.png cannot be read" in said and said.count("wrong?") == 3
    assert f"1 photos are in both parts (first: {tmp_path}/0.png)" in said


def test_tenth_set(command, tmp_path):
    """In a copy of the scripts, what docs/datasets.md tells to add, as it stands there, is all that they need."""
    copy, root, page = tmp_path / "copy", tmp_path / "drawn", data.read_text(REPOSITORY / "docs/datasets.md", "page")
    function, names = (re.search(rf"```{kind}\n(.*?)```", page, re.S).group(1) for kind in ("python", "json"))
    shutil.copytree(REPOSITORY / "assets", copy / "assets")
    for script in REPOSITORY.glob("*.py"):
        shutil.copy(script, copy)
    code, main = data.read_text(REPOSITORY / "data.py", "script"), '\n\nif __name__ == "__main__":'
    write(copy / "data.py", code.replace(main, f"\n\n{function}\n{main}"))
    write(copy / "assets/labels/names.json", json.dumps(data.LABEL_WORDS | json.loads(names)))
    for part, count in (("train", 12), ("test", 6)):
        rows = [[f"{part}{n}.png", int(n % 3 == 1), int(n % 3 == 0)] for n in range(count)]
        table(root / f"shapes/{part}.csv", ["file", "zigzag", "disc"], rows)
        photos(root / "shapes/images", *(row[0] for row in rows))
    done = command(copy / "data.py", "--check", "shapes", "--data-root", root, "--policy", "unlabelled=drop")
    assert re.search(r"train +8 photos \(published: not stated\).*unlabelled=drop", done.stdout)
    missing = command(copy / "data.py", "--check", "shapes", "--data-root", tmp_path, expect=2).stderr
    assert f"pass --data-root {root}; expected {tmp_path}/shapes/{{train.csv, " in missing
    words = ["--dataset", "shapes", "--data-root", root, "--backbone", "scenes", "--epochs", 1, "--cpu"]
    command(copy / "adapter_rp.py", *words, "--text-count", 60, "--output", tmp_path / "rp")
    done = command(copy / "sspa.py", *words, "--tune-image", "none", "--batch-size", 4, "--output", tmp_path / "sspa")
    assert done.stderr.count("the template stands alone") == 1
    for method in ("rp", "sspa"):
        result = json.loads((tmp_path / method / "metrics.json").read_text())
        assert [(entry["name"], entry["positives"]) for entry in result["per_class"]] == [("ball", 2), ("star", 2)]
        assert result["dataset"] == "shapes" and result["policy"].startswith("unlabelled=keep")
