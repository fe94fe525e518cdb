"""datasets.py: the nine readers on files in the published form and on real ones, `--check`, a tenth set."""
import json
import re

import numpy as np
import pytest
from conftest import REPOSITORY
from scipy.io import savemat
from test_data import marks, photos, write

import data
import datasets
from data import UsageError


def load(dataset, root, split, *policy):
    return data.load_photos(dataset, root, split, policy=policy)


def table(path, names, marked, separator=","):
    """A table with a column a name. marked: {file: its labels}"""
    lines = [["file", *names]]
    for file, labels in marked.items():
        lines.append([file, *map(str, one_hot(names, *labels))])
    write(path, "\n".join(map(separator.join, lines)))


def one_hot(names, *present):
    return [int(name in present) for name in names]


def cells(values):
    """A column of MATLAB cells; a dict among the values is a struct."""
    return np.array(values, object)[:, None]


def backwards(dataset):
    """Labels as its files spell them, in an order that is not ours."""
    return list(data.LABEL_WORDS[dataset])[::-1]


# Each of these writes a dataset as its owners publish it -> {split and policy: {photo: labels}}

BOX = "<bndbox><xmin>1</xmin><ymin>11</ymin><xmax>100</xmax><ymax>50</ymax></bndbox>"


def voc2007(root):
    """One object that is not difficult makes its label present, wherever it stands."""
    things = [("dog", 1), ("dog", 0), ("cat", 1), ("tvmonitor", 0), ("tvmonitor", 1)]
    objects = [f"<object><name>{name}</name><difficult>{hard}</difficult>{BOX}</object>" for name, hard in things]
    size = "<size><width>200</width><height>100</height></size>"
    write(root / "VOC2007/Annotations/1.xml", f"<a>{size}{''.join(objects)}</a>")
    write(root / "VOC2007/Annotations/2.xml", f"<a>{size}{objects[1]}</a>")
    write(root / "VOC2007/ImageSets/Main/trainval.txt", "1\n2\n")
    photos(root / "VOC2007/JPEGImages", "1.jpg", "2.jpg")
    other = {"2.jpg": {"dog"}}
    return {"train": {"1.jpg": {"dog", "-cat", "tv monitor"}} | other,
            "train difficult=negative": {"1.jpg": {"dog", "tv monitor"}} | other,
            "train difficult=positive": {"1.jpg": {"dog", "cat", "tv monitor"}} | other}


def coco2014(root):
    """A crowd counts as present; a category's number is not its column."""
    names = backwards("coco2014")
    things = [(7, "toothbrush", 0), (8, "person", 1)]
    write(root / "coco2014/annotations/instances_train2014.json", json.dumps({
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 200, "height": 100} for n in (7, 8, 9)],
        "categories": [{"id": 100 + n, "name": name} for n, name in enumerate(names)],
        "annotations": [{"image_id": n, "category_id": 100 + names.index(name), "iscrowd": crowd, "bbox": [0, 0, 9, 9]}
                        for n, name, crowd in things]}))
    photos(root / "coco2014/train2014", "7.jpg", "8.jpg", "9.jpg")
    labelled = {"7.jpg": {"toothbrush"}, "8.jpg": {"person"}}
    return {"train": {**labelled, "9.jpg": set()}, "train unlabelled=drop": labelled}


def nuswide(root):
    """The published file for "lake" has a value of -1130179, which is ignored."""
    write(root / "nuswide/ImageList/TrainImagelist.txt", "actor\\1.jpg\r\nzoo\\2.jpg\r\nzoo\\3.jpg\r\n")
    values = {"lake": "0\n-1130179\n1\n", "zebra": "1\n0\n0\n"}
    for concept in data.LABEL_WORDS["nuswide"]:
        write(root / f"nuswide/TrainTestLabels/Labels_{concept}_Train.txt", values.get(concept, "0\n0\n0\n"))
    photos(root / "nuswide/Flickr", "actor/1.jpg", "zoo/2.jpg", "zoo/3.jpg")
    labelled = {"1.jpg": {"zebra"}, "3.jpg": {"lake"}}
    return {"train": {**labelled, "2.jpg": {"-lake"}}, "train unlabelled=drop": labelled}


def pa100k(root):
    names = backwards("pa100k")
    content = {"attributes": cells(names)}
    named = {}
    for part in ("train", "val", "test"):
        files = [f"{part}1.jpg", f"{part}2.jpg"]
        photos(root / "pa100k/release_data", *files)
        content[f"{part}_images_name"] = cells(files)
        content[f"{part}_label"] = [one_hot(names, "Hat"), one_hot(names, "boots")]
        named[part] = {files[0]: {"person wearing a hat"}, files[1]: {"person in boots"}}
    savemat(root / "pa100k/annotation.mat", content)
    return {"train": named["train"] | named["val"], "train validation=drop": named["train"], "test": named["test"]}


def rapv1(root):
    """Rows count from 1."""
    names = ["more", *backwards("rapv1")]
    files = ["1.png", "2.png", "3.png", "4.png"]
    photos(root / "rapv1/RAP_dataset", *files)
    parts = [{"train_index": [1, 3], "test_index": [2, 4]}, {"train_index": [2, 4], "test_index": [1, 3]}]
    savemat(root / "rapv1/RAP_annotation.mat", {"RAP_annotation": {
        "partion": cells(parts), "attribute_eng": cells(names), "imagesname": cells(files),
        "label": [one_hot(names, "Female"), one_hot(names, "Box")] * 2}})
    women = {"1.png": {"woman"}, "3.png": {"woman"}}
    boxes = {"2.png": {"person with a box"}, "4.png": {"person with a box"}}
    return {"train": women, "test": boxes, "test partition=1": women}


def peta(root):
    """Value 2 is absent; four other columns go before the labels; rows count from 1."""
    names = ["more", *backwards("peta")]
    rows = [[1] * 4 + one_hot(names, name) for name in ("personalMale", "hairLong")] * 2
    parts = [{"train": [1, 3], "val": [2, 4], "test": [2, 4]}, {"train": [2, 4], "val": [2, 4], "test": [1, 3]}]
    savemat(write(root / "peta/PETA.mat", ""), {"peta": {
        "data": 2 - np.array(rows), "attribute": cells(names), "partion_attribute": cells(parts)}})
    men = {"00001.png": {"man"}, "00003.png": {"man"}}
    long = {"00002.png": {"person with long hair"}, "00004.png": {"person with long hair"}}
    photos(root / "peta/images", *men, *long)
    return {"train": men | long, "train validation=drop": men, "test": long, "test partition=1": men}


def multiscene(root):
    table(root / "multiscene/train.csv", backwards("multiscene"), {"7": ["Sea"], "8.png": []})
    photos(root / "multiscene/images", "7.jpg", "8.png")
    return {"train": {"7.jpg": {"sea"}, "8.png": set()}}


def mlrsnet(root):
    """Every category's CSV has its own order of columns; 40 / 10 / 50 % of every category."""
    names = backwards("mlrsnet")
    marked = {}
    for category, columns in (("beach", names), ("desert", names[::-1])):
        labels = {f"{category}{n}.jpg": {"sand", category} for n in range(10)}
        table(root / f"mlrsnet/Labels/{category}.csv", columns, labels)
        photos(root / "mlrsnet/Images" / category, *labels)
        marked |= labels
    order = {seed: np.random.default_rng(seed).permutation(10) for seed in (0, 1)}
    rows = {"train": order[0][:5], "train validation=drop": order[0][:4], "test split_seed=1": order[1][5:]}
    return {words: {file: marked[file] for file in marked if int(file[-5]) in numbers}
            for words, numbers in rows.items()}


def ucm(root):
    marked = {f"river{n}": {"field"} for n in range(10)}
    table(root / "ucm/LandUse_Multilabeled.txt", backwards("ucm"), marked, "\t")
    photos(root / "ucm/Images/river", *(f"{file}.tif" for file in marked))
    return {"test split_seed=1": {f"river{n}.tif": {"field"} for n in np.random.default_rng(1).permutation(10)[8:]}}


@pytest.mark.parametrize("publish", [voc2007, coco2014, nuswide, pa100k, rapv1, peta, multiscene, mlrsnet, ucm])
def test_published_tree_to_labels(tmp_path, publish):
    """Without files the message names tree and source; with them every photo has its labels."""
    dataset = publish.__name__
    message = rf"^{dataset}: no .* under {tmp_path}; expected {tmp_path}/.*; .*http"
    with pytest.raises(UsageError, match=message) as error:
        load(dataset, tmp_path, "train")
    assert "<root>" not in str(error.value)
    for words, expected in publish(tmp_path).items():
        found = load(dataset, tmp_path, *words.split())
        assert marks(found) == expected, words
        assert re.split("[ =]", words)[-1] in f"train test {found.policy}"


@pytest.mark.parametrize("publish, path, content, reason", [
    (voc2007, "VOC2007/Annotations/1.xml", f"<a><object><name>cow</name>{BOX}</object></a>", "annotation .*1.xml"),
    (voc2007, "VOC2007/ImageSets/Main/trainval.txt", "3\n", "annotation .*3.xml: no such file.*; expected"),
    (coco2014, "coco2014/annotations/instances_train2014.json", '{"images": []}', "annotations .*give COCO's"),
    (nuswide, "nuswide/TrainTestLabels/Labels_zebra_Train.txt", "1\n", "zebra: 1 labels for 3 listed photos"),
    (peta, "peta/PETA.mat", "torn", "labels .*PETA.mat: .*fetch it again"),
    (mlrsnet, "mlrsnet/Labels/desert.csv", "image,wind\n", "labels .*the header has or lacks airplane")])
def test_damaged_files(tmp_path, publish, path, content, reason):
    publish(tmp_path)
    write(tmp_path / path, content)
    with pytest.raises(UsageError, match=f"^{publish.__name__}: {reason}"):
        load(publish.__name__, tmp_path, "train")


@pytest.mark.parametrize("dataset, root, label, counts", [
    ("voc2007", ".", "car", (400, 60, 2)),
    ("coco2014", "coco_mini", "person", (159, 75, 0)),
    ("ucm", ".", "tree", (2100, 1009, 0)),
    ("pa100k", "annotations", "woman", (100000, 45336, 0)),
    ("peta", "annotations", "man", (19000, 10421, 0))])
def test_real_files(shared, monkeypatch, dataset, root, label, counts):
    """Photos, positives and ignored ones, counted before by text search in the owners' files."""
    if root == "annotations":  # of these the photos are not there
        monkeypatch.setattr(datasets, "isfile", lambda path: True)
        monkeypatch.setattr(datasets, "exists", lambda path: path.suffix == ".mat" or path.name == "data")
    train = load(dataset, shared / root, "train")
    test = load(dataset, shared / root, "test")
    marks = np.concatenate([train.labels, test.labels])[:, train.names.index(label)]
    assert (len({*train.photos, *test.photos}), (marks == 1).sum(), (marks == -1).sum()) == counts


@pytest.mark.parametrize("dataset, word, takes", [
    ("voc2007", "difficult=maybe", "difficult=ignore, difficult=negative, difficult=positive"),
    ("voc2007", "unlabelled=drop", "difficult=ignore"),
    ("multiscene", "root=x", "none"),
    ("scenes", "a=b", "none"),
    ("ucm", "", "split_seed=N"),
    ("ucm", "split_seed=-1", "split_seed=N"),
    ("ucm", "split_seed=N", "split_seed=N")])
def test_unknown_policies(tmp_path, dataset, word, takes):
    with pytest.raises(UsageError, match=rf"^--policy {word}: {dataset} takes {takes}"):
        load(dataset, tmp_path, "train", word)


def test_check(command, tmp_path, shared):
    """The counts of 400 of VOC's photos, and what differs from the published ones; COCO's have the names of 2017."""
    words = ["datasets.py", "--data-root", shared, "--policy", "difficult=positive", "--check", "voc2007"]
    done = command(*words, expect=2)
    assert re.search(r"test +150 photos \(published: 4,952\).*difficult=positive", done.stdout)
    assert "wrong? test: 150 photos, 4,952 published" in done.stderr
    assert re.search(r"\ncar +34 +28\n", done.stdout)
    done = command("datasets.py", "--check", "coco2014", "--data-root", shared / "coco_mini", expect=2)
    assert "(published: 118,287)" in done.stdout
    done = command("datasets.py", "--check", "ucm", "--data-root", tmp_path, expect=2)
    assert done.stderr.startswith("datasets.py: ucm: no LandUse_Multilabeled.txt")
    assert "difficult=negative" in command("datasets.py", "--help").stdout


def test_check_of_your_own_folder(tmp_path, capsys):
    """Nothing wrong is 0; a missing photo, a torn one, one in both parts, and one without labels are found."""
    photos(tmp_path, "0.png", "1.png", "2.png")
    words = ["--check", "folder", "--data-root", str(tmp_path)]
    good = "file,split,dog\n0.png,train,1\n1.png,train,1\n2.png,test,1\n"
    write(tmp_path / "labels.csv", good)
    assert datasets.main(words) == 0
    assert "nothing wrong was found" in capsys.readouterr().out
    photos(tmp_path, "spare.png")
    write(tmp_path / "1.png", "torn")
    write(tmp_path / "labels.csv", good + "0.png,test,1\nx.png,test,1\n")
    assert datasets.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("wrong? ") == 4
    for line in ("test: 1 of 3 photos missing", "train: .*/1.png cannot be read", "1 photos are in both .*/0.png",
                 "1 photos of the folder without labels .*/spare.png"):
        assert re.search(f"wrong[?] {line}", said)


def test_tenth_set(tmp_path, monkeypatch, capsys):
    """What docs/datasets.md tells to add, as it stands there, is all that a set needs."""
    page = data.read_text(REPOSITORY / "docs/datasets.md", "page")
    code, = re.findall("```python\n(.*?)```", page, re.S)
    names, = re.findall("```json\n(.*?)```", page, re.S)
    monkeypatch.setitem(data.LABEL_WORDS, "shapes", json.loads(names)["shapes"])
    monkeypatch.setitem(datasets.READERS, "shapes", None)
    exec(code, vars(datasets))
    for split in ("train", "test"):
        table(tmp_path / f"shapes/{split}.csv", ["zigzag", "disc"], {"a.png": ["disc"], "b.png": []})
    photos(tmp_path / "shapes/images", "a.png", "b.png")
    assert marks(load("shapes", tmp_path, "train")) == {"a.png": {"ball"}, "b.png": set()}
    datasets.main(["--check", "shapes", "--data-root", str(tmp_path), "--policy", "unlabelled=drop"])
    assert re.search(r"train +1 photos \(published: not stated\).*unlabelled=drop", capsys.readouterr().out)
