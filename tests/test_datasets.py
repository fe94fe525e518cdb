"""datasets.py: every reader on files in the published form and on real ones, `--check`, a tenth set."""
import io
import json
import re
from functools import lru_cache

import numpy as np
import pytest
from conftest import REPOSITORY
from scipy.io import savemat
from test_data import marks, photos, refused, write

import data
import datasets


def load(dataset, root, split, *policy):
    return data.load_photos(dataset, root, split, policy=policy)


def backwards(dataset):
    """Labels as the dataset's files spell them, in another order than ours."""
    return list(data.LABEL_WORDS[dataset])[::-1]


def one_hot(names, *labels):
    """Rows with one label each"""
    return [[int(name == label) for name in names] for label in labels]


def table(names, labels, file, separator=","):
    """A table with a column for each name; row n is file number n, with one label"""
    lines = [["file", *names]]
    for number, row in enumerate(one_hot(names, *labels)):
        lines.append([file.format(number), *map(str, row)])
    return "\n".join(map(separator.join, lines))


def matlab(**variables):
    """The content of a .mat file"""
    file = io.BytesIO()
    savemat(file, variables)
    return file.getvalue()


def cells(*values):
    """A column of MATLAB's cells; a dict is a struct"""
    return np.array(values, object)[:, None]


OBJECT = """<object><name>{}</name><difficult>{}</difficult>
    <bndbox><xmin>1</xmin><ymin>11</ymin><xmax>100</xmax><ymax>50</ymax></bndbox></object>"""


def voc(*things):
    """VOC's XML; things: (label, 1 if difficult else 0)"""
    objects = "".join(OBJECT.format(*thing) for thing in things)
    return f"<a><size><width>200</width><height>100</height></size>{objects}</a>"


COCO = """{"images": [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100},
                      {"id": 8, "file_name": "8.jpg", "width": 200, "height": 100},
                      {"id": 9, "file_name": "9.jpg", "width": 200, "height": 100}],
           "categories": [{"id": 1, "name": "toothbrush"}, {"id": 90, "name": "person"}],
           "annotations": [{"image_id": 7, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 9, 9]},
                           {"image_id": 8, "category_id": 90, "iscrowd": 1, "bbox": [0, 0, 9, 9]}]}"""

NUSWIDE = {f"nuswide/TrainTestLabels/Labels_{concept}_Train.txt": "0\n0\n0\n"
           for concept in data.LABEL_WORDS["nuswide"]}

PA100K = {"attributes": cells(*backwards("pa100k"))}
for part in ("train", "val", "test"):
    PA100K[f"{part}_images_name"] = cells(f"{part}1.jpg", f"{part}2.jpg")
    PA100K[f"{part}_label"] = one_hot(backwards("pa100k"), "Hat", "boots")

RAP = backwards("rapv1")
RAP_VALUES = np.pad(one_hot(RAP, "Female", "Box", "Hat", "Boots"), ((0, 0), (0, 41)), constant_values=2)
RAP_VALUES[1, RAP.index("Female")] = 2
PETA = ["more", *backwards("peta")]
MULTISCENE = [name.replace(" ", "") for name in data.LABEL_WORDS["multiscene"]]
for place, slip in ((13, "OilFiled"), (26, "SolarPannel"), (33, "WindTrubine")):
    MULTISCENE[place] = slip
MLRSNET = list(data.LABEL_WORDS["mlrsnet"])

# {dataset: ({file as its owners publish it: content}, folder of the photos,
#            {split and policy: each photo's labels, "-dog" is an ignored one})}
TREES = {
    # an object that is not difficult makes its label present, wherever it stands
    "voc2007": ({
        "VOC2007/Annotations/1.xml": voc(("dog", 1), ("dog", 0), ("cat", 1), ("tvmonitor", 0), ("tvmonitor", 1)),
        "VOC2007/Annotations/2.xml": voc(("dog", 0)),
        "VOC2007/ImageSets/Main/trainval.txt": "1\n2\n",
        "VOC2007/ImageSets/Main/test.txt": "2\n",
    }, "VOC2007/JPEGImages", {
        "train": "1.jpg: -cat, dog, tv monitor; 2.jpg: dog",
        "train difficult=negative": "1.jpg: dog, tv monitor; 2.jpg: dog",
        "train difficult=positive": "1.jpg: cat, dog, tv monitor; 2.jpg: dog",
        "test": "2.jpg: dog"}),
    # a crowd counts as present; a category's number is not its column
    "coco2014": ({"coco2014/annotations/instances_train2014.json": COCO}, "coco2014/train2014", {
        "train": "7.jpg: toothbrush; 8.jpg: person; 9.jpg: ",
        "train unlabelled=drop": "7.jpg: toothbrush; 8.jpg: person"}),
    # the published file for "lake" has a value of -1130179
    "nuswide": (NUSWIDE | {
        "nuswide/ImageList/TrainImagelist.txt": "actor\\1.jpg\r\nzoo\\2.jpg\r\nzoo\\3.jpg\r\n",
        "nuswide/TrainTestLabels/Labels_lake_Train.txt": "0\n-1130179\n1\n",
        "nuswide/TrainTestLabels/Labels_zebra_Train.txt": "1\n0\n0\n",
    }, "nuswide/Flickr", {
        "train": "actor/1.jpg: zebra; zoo/2.jpg: -lake; zoo/3.jpg: lake",
        "train unlabelled=drop": "actor/1.jpg: zebra; zoo/3.jpg: lake"}),
    "pa100k": ({"pa100k/annotation.mat": matlab(**PA100K)}, "pa100k/release_data", {
        "train": "train1.jpg: person wearing a hat; train2.jpg: person in boots; "
                 "val1.jpg: person wearing a hat; val2.jpg: person in boots",
        "train validation=drop": "train1.jpg: person wearing a hat; train2.jpg: person in boots",
        "test": "test1.jpg: person wearing a hat; test2.jpg: person in boots"}),
    # rows count from 1; attribute_exp names the first 51 columns, attribute_eng all, otherwise; 2: the sex is not known
    "rapv1": ({"rapv1/RAP_annotation.mat": matlab(RAP_annotation={
        "partion": cells({"train_index": [1, 2], "test_index": [3, 4]}, {"train_index": [1, 2], "test_index": [2, 4]}),
        "label": RAP_VALUES,
        "attribute_eng": cells(*[f"ub-{name}" for name in RAP]),
        "imagesname": cells("1.png", "2.png", "3.png", "4.png"),
        "attribute_exp": cells(*RAP),
    })}, "rapv1/RAP_dataset", {
        "train": "1.png: woman; 2.png: person with a box",
        "train unknown=ignored": "1.png: woman; 2.png: -woman, person with a box",
        "test": "3.png: person wearing a hat; 4.png: person in boots",
        "test partition=1": "2.png: person with a box; 4.png: person in boots"}),
    # value 2 is absent; four other columns go before the labels; rows count from 1
    "peta": ({"peta/PETA.mat": matlab(peta={
        "data": 2 - np.pad(one_hot(PETA, "personalMale", "hairLong", "accessoryHat"), ((0, 0), (4, 0))),
        "attribute": cells(*PETA),
        "partion_attribute": cells({"train": [1, 2], "val": [3, 1], "test": [3, 2]}, {"test": [2, 1]}),
    })}, "peta/images", {
        "train": "00001.png: man; 00002.png: person with long hair; 00003.png: person wearing a hat; 00001.png: man",
        "train validation=drop": "00001.png: man; 00002.png: person with long hair",
        "test": "00003.png: person wearing a hat; 00002.png: person with long hair",
        "test partition=1": "00002.png: person with long hair; 00001.png: man"}),
    # the owners' headings have no blanks and three slips
    "multiscene": ({
        "multiscene/MultiScene-Clean/Tra.csv": table(MULTISCENE, ["Sea", ""], "img_{}"),
        "multiscene/MultiScene-Clean/Test.csv": table(MULTISCENE, ["OilFiled", "WindTrubine"], "img_{}"),
    }, "multiscene/images", {
        "train": "img_0.jpg: sea; img_1.jpg: ", "test": "img_0.jpg: oil field; img_1.jpg: wind turbine"}),
    # every category's CSV has its own order of columns, one heading is blank; 40 / 10 / 50 % of every category
    "mlrsnet": ({
        "mlrsnet/Labels/a.csv": table(backwards("mlrsnet"), MLRSNET[:10], "a{}.jpg").replace("bare soil", ""),
        "mlrsnet/Labels/harbor&port.csv": table(MLRSNET, MLRSNET[10:20], "b&{}.jpg"),
    }, "mlrsnet/Images", {
        "train": "a/a2.jpg: bare soil; a/a4.jpg: basketball court; a/a6.jpg: bridge; a/a7.jpg: building; "
                 "a/a3.jpg: baseball diamond; harbor_port/b_2.jpg: crosswalk; harbor_port/b_4.jpg: desert; "
                 "harbor_port/b_6.jpg: factory; harbor_port/b_7.jpg: field; "
                 "harbor_port/b_3.jpg: dense residential area",
        "train validation=drop": "a/a2.jpg: bare soil; a/a4.jpg: basketball court; a/a6.jpg: bridge; "
                                 "a/a7.jpg: building; harbor_port/b_2.jpg: crosswalk; harbor_port/b_4.jpg: desert; "
                                 "harbor_port/b_6.jpg: factory; harbor_port/b_7.jpg: field",
        "test split_seed=1": "a/a2.jpg: bare soil; a/a3.jpg: baseball diamond; a/a5.jpg: beach; a/a6.jpg: bridge; "
                             "a/a9.jpg: chaparral; harbor_port/b_2.jpg: crosswalk; "
                             "harbor_port/b_3.jpg: dense residential area; harbor_port/b_5.jpg: dock; "
                             "harbor_port/b_6.jpg: factory; harbor_port/b_9.jpg: forest"}),
    "ucm": (
        {"ucm/LandUse_Multilabeled.txt": table(backwards("ucm"), backwards("ucm")[:10], "river{}", "\t")},
        "ucm/Images/river", {"test split_seed=1": "river3.tif: ship; river6.tif: pavement"}),
    "folder": ({"labels.csv": "file;dog;split;cat\na.png; 1;train;0\n\nsub/b.png;0;test;1\nc.png;1.0;train;-1\n"}, "", {
        "train": "a.png: dog; c.png: dog, -cat", "test": "sub/b.png: cat"}),
}


def plant(root, files, folder, expected):
    """Writes the files, and a file for every photo that is expected -> folder of the photos"""
    for photo in "; ".join(expected.values()).split("; "):
        write(root / folder / photo.split(":")[0], "")
    for path, content in files.items():
        write(root / path, content)
    return root / folder


@pytest.mark.parametrize("dataset", TREES)
def test_published_tree_to_labels(tmp_path, dataset):
    """Without files the message names tree and source; with them every photo has its labels. If --data-root is one
    folder too high, the message names the right one."""
    root = tmp_path / "D"
    with refused(f"^{dataset}: no .* under {root}; expected {root}/.*; .* ") as error:
        load(dataset, root, "train")
    assert "<root>" not in str(error.value)
    folder = plant(root, *TREES[dataset])
    for words, labels in TREES[dataset][-1].items():
        found = load(dataset, root, *words.split())
        assert marks(found, folder) == labels, words
        assert re.split("[ =]", words)[-1] in f"train test {found.policy}"
    with refused(f"but it is in {root}: pass --data-root {root};"):
        load(dataset, tmp_path, "train")


@pytest.mark.parametrize("path, content, reason", [
    ("VOC2007/Annotations/1.xml", OBJECT, "annotation .*1.xml"),
    ("VOC2007/ImageSets/Main/trainval.txt", "3\n", "annotation .*3.xml: no such file.*; expected"),
    ("VOC2007/Annotations/1.xml", voc(("zebra", 0)),
     "label files of .* have 'zebra', no label of voc2007; for labels of your own pass --dataset folder --data-root /"),
    ("coco2014/annotations/instances_train2014.json", COCO.replace("person", "unicorn"),
     "label files of .* have 'unicorn', no label of coco2014; "),
    ("nuswide/TrainTestLabels/Labels_zebra_Train.txt", "1\n", "zebra: 1 labels for 3 listed photos"),
    ("peta/PETA.mat", "torn", "labels .*PETA.mat: .*fetch it again"),
    ("mlrsnet/Labels/desert.csv", "image,wind\n", "labels .*the header has or lacks airplane"),
    ("multiscene/MultiScene-Clean/Tra.csv", table(["Baseball Field", "Apron", *MULTISCENE[2:]], [], ""),
     "labels .*a column is headed 'Baseball Field' where 'Apron' must stand"),
    ("multiscene/MultiScene-Clean/Tra.csv", table(MULTISCENE[:-1], [], ""), "labels .*where 'Sea' must")])
def test_damaged_files(tmp_path, path, content, reason):
    dataset = path.split("/")[0].lower()
    plant(tmp_path, *TREES[dataset])
    write(tmp_path / path, content)
    with refused(f"^{dataset}: {reason}"):
        load(dataset, tmp_path, "train")


def test_faulty_labels_of_mlrsnet(tmp_path, capsys):
    """As in the labels of May 2021: a photo with 14 labels, and no photo of stadiums labelled stadium. The column that
    the reader had to name is reported once."""
    plant(tmp_path, *TREES["mlrsnet"])
    write(tmp_path / "mlrsnet/Labels/stadium.csv", table(MLRSNET, ["airplane"], "") + "\nx.jpg" + ",1" * 14 + ",0" * 46)
    write(tmp_path / "mlrsnet/Labels/empty.csv", table(MLRSNET, [], ""))
    datasets.say_once.cache_clear()
    for split in ("train", "test"):
        doubts = load("mlrsnet", tmp_path, split).policy
        assert "; 1 photos have more than 13 labels, most of them in stadium; the owners' labels of May 2021" in doubts
        assert "; no photo of stadium has the label of that name; " in doubts
    assert capsys.readouterr().err.count("a column without a heading is read as 'bare soil'") == 1


@pytest.mark.parametrize("line", [
    "voc2007 . car 400 60 2",
    "coco2014 coco_mini person 159 75 0",
    "ucm . tree 2100 1009 0",
    "pa100k annotations woman 100000 45336 0",
    "rapv1 annotations woman 41585 12701 125 unknown=ignored",
    "rapv1 annotations all 41585 355432 0",
    "multiscene annotations all 14000 64516 0",
    "mlrsnet annotations all 109161 547891 0",
    "peta annotations man 19000 10421 0"])
def test_real_files(shared, monkeypatch, line):
    """Photos, and a label's positives and ignored ones, as counted earlier by text search in the owners' files."""
    dataset, root, label, *counts = line.split()
    if root == "annotations":  # of these the photos are not there
        monkeypatch.setattr(datasets, "isfile", lambda path: True)
        monkeypatch.setattr(datasets, "exists", lambda path: path.exists() or path.name == "data")
        monkeypatch.setattr(datasets, "read_table", lru_cache(datasets.read_table))  # seconds for MLRSNet's
    train, test = [load(dataset, shared / root, split, *counts[3:]) for split in ("train", "test")]
    asked = [label in (name, "all") for name in train.names]
    labels = np.concatenate([train.labels, test.labels])[:, asked]
    found = (len({*train.photos, *test.photos}), (labels == 1).sum(), (labels == -1).sum())
    assert list(map(str, found)) == counts[:3]


@pytest.mark.parametrize("dataset, word, takes", [
    ("voc2007", "difficult=maybe", "difficult=ignore, difficult=negative, difficult=positive"),
    ("ucm", "", "split_seed=N"),
    ("ucm", "split_seed=N", "split_seed=N")])
def test_unknown_policies(dataset, word, takes):
    with refused(f"^--policy {word}: {dataset} takes {takes}"):
        load(dataset, "", "train", word)


@pytest.mark.parametrize("words, stdout, stderr", [
    ("voc2007 --data-root . --policy difficult=positive",
     r"test +150 photos \(published: 4952\).*difficult=positive\n[^@]*\ncar +34 +28\n",
     "wrong. test: 150 photos, 4,952 published\n"),
    ("coco2014 --data-root coco_mini", r"test +79 photos \(published: 5000\)", "wrong. train: 80 photos, 118,287 "),
    ("ucm --data-root nowhere", "^$", "^datasets.py: ucm: no LandUse_Multilabeled.txt .* under nowhere; expected ")])
def test_check(command, shared, words, stdout, stderr):
    """The counts of 400 of VOC's photos, and what differs from the published ones; COCO's have the names of 2017."""
    done = command("datasets.py", "--check", *words.split(), expect=2, cwd=shared)
    assert re.search(stdout, done.stdout)
    assert re.search(stderr, done.stderr)


def test_check_of_your_own_folder(tmp_path, capsys):
    """Exit code 0 if nothing is wrong; it finds a missing photo, a torn one, a label that no photo has and a photo
    without labels."""
    photos(tmp_path, "0.png", "1.png", "2.png")
    words = ["--check", "folder", "--data-root", str(tmp_path)]
    good = "file,split,dog,cat\n0.png,train,1,1\n1.png,train,1,0\n2.png,test,1,1\n"
    write(tmp_path / "labels.csv", good)
    assert datasets.main(words) == 0
    assert "nothing wrong was found" in capsys.readouterr().out
    photos(tmp_path, "spare.png")
    write(tmp_path / "1.png", "torn")
    write(tmp_path / "labels.csv", good.replace("test,1,1", "test,1,0") + "x.png,test,1,1\n")
    assert datasets.main(words) == 2
    wrong = re.findall("wrong. (.*\n)", capsys.readouterr().err)
    assert re.fullmatch("train: .*/1.png cannot be read.*\ntest: 1 of 2 photos missing.*\ntest: no photo with cat\n"
                        "1 photos of the folder without labels .*/spare.png.*\n", "".join(wrong))


CATEGORIES = [{"id": number, "name": name} for number, name in enumerate(["things", "fire_truck", "cat"])]


def coco(*images):
    """COCO's instances; images: (file, category of its box, 0 for none)"""
    content = {"images": [], "annotations": [], "categories": CATEGORIES}
    for number, (file, category) in enumerate(images):
        content["images"].append({"id": number, "file_name": file, "width": 9, "height": 9})
        if category:
            content["annotations"].append({"image_id": number, "category_id": category, "bbox": [0, 0, 9, 9]})
    return json.dumps(content)


# {form: ({file: content}, {split: each photo's labels})}
FORMS = {
    # pandas' index, words for marks, an empty cell; a photo under images/, one without suffix, one that stands twice
    "labels.csv": (
        {"labels.csv": "\ufeff,file,dog,\"fire\r\ntruck\",Split\n0,a,TRUE,no,train\n1,Cafe\u0301.JPG,Yes,,valid\n"
                       "2,sub\\c.png,1.0,false,test\n3,./a,1,0,Train\n"},
        {"train": "images/a.png: dog; Caf\u00e9.jpg: dog", "test": "sub/c.png: dog"}),
    "sep=": (
        {"labels.csv": "sep=;\r\nfile;tags;split\r\na.png;'dog'|cat;train\r\nb.png;;train\r\n\t;;\r\n"
                       'c.png;"cat\r\nfire truck";test\r\n'},
        {"train": "a.png: cat, dog; b.png: ", "test": "c.png: cat, fire truck"}),
    "spaces": ({"labels.csv": "file,tags,split\na.png,dog  cat,training\nb.png,dog,val\n"},
               {"train": "a.png: cat, dog", "test": "b.png: dog"}),
    "json": ({"labels.json": '{"a.png": ["caf\u00e9"], "b.png": ["cafe\u0301"], "c.png": ["dog"]}'},
             {"train": "a.png: caf\u00e9; c.png: dog", "test split_seed=2": "b.png: caf\u00e9"}),
    "one folder": ({"labels.json": '{"train/a.png": ["dog"], "train/b.png": [], "train/c.png": []}'},
                   {"train": "train/a.png: dog; train/c.png: ", "test": "train/b.png: "}),
    "jsonl": (
        {"train/metadata.jsonl": '{"file_name": "a.png", "labels": ["dog", "cat\u200b"]}\n',
         "test/metadata.jsonl": '{"file_name": "b.png", "label": "cat"}\n'},
        {"train": "train/a.png: cat, dog", "test": "test/b.png: cat"}),
    # two ids for one file are joined; a category without a box is no label
    "coco": ({"annotations.json": coco(("a.png", 1), ("b.png", 0), ("./a.png", 2))},
             {"train": "a.png: cat, fire truck; images/b.png: "}),
    "roboflow, boxes": (
        {"train/_annotations.coco.json": coco(("a.jpg", 1)), "valid/_annotations.coco.json": coco(("a.jpg", 0)),
         "test/_annotations.coco.json": coco(("a.jpg", 2))},
        {"train": "train/a.jpg: fire truck; valid/a.jpg: ", "test": "test/a.jpg: cat"}),
    "coco's folders, boxes": (
        {"annotations/instances_train2014.json": coco(("a.jpg", 1)),
         "annotations/instances_val2014.json": coco(("b.jpg", 2))},
        {"train": "train2014/a.jpg: fire truck", "test": "val2014/b.jpg: cat"}),
    "xml, boxes": ({"train/a.xml": voc(("fire_truck", 0)), "test/b.c.xml": voc(("cat", 1))},
                   {"train": "train/a.jpg: fire truck", "test": "test/b.c.jpg: -cat"}),
    "voc, boxes": (
        {"Annotations/1.xml": voc(("zebra", 0)), "Annotations/2.xml": voc(("cat", 0)),
         "Annotations/3.xml": voc(("cat", 0)), "ImageSets/Main/train.txt": "1\n", "ImageSets/Main/val.txt": "2\n",
         "ImageSets/Main/trainval.txt": "1\n2\n", "JPEGImages/3.jpg": ""},
        {"train": "JPEGImages/1.jpg: zebra", "test": "JPEGImages/2.jpg: cat"}),
    "folders": ({".trash/dog/c.png": ""},
                {"train": "train/dog/a.png: dog", "test": "test/fire_truck/b.png: fire truck"}),
    "a vehicle": ({}, {"train": "bus/3.png: bus; bus/4.png: bus; train/1.png: train", "test": "train/2.png: train"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_your_own_folder(tmp_path, form):
    """Train and test have the same labels; boxes agree with the labels; settings change with each label file."""
    files, expected = FORMS[form]
    plant(tmp_path, files, "", expected)
    names = set()
    for words, labels in expected.items():
        found = load("folder", tmp_path, *words.split())
        assert marks(found, tmp_path) == labels
        names.add(tuple(found.names))
        if "boxes" in form:
            for photo, row in zip(*found, strict=True):
                boxes, _ = datasets.boxes_of(photo, found.names)
                assert boxes[:, 0].tolist() == np.flatnonzero(row).tolist()
    assert len(names) == 1
    changed = [path for path in files if not path.endswith("g")] or ["train/cow/1.png"]
    known = {data.identity("folder", tmp_path)}
    for path in changed:
        write(tmp_path / path, "other labels")
        known.add(data.identity("folder", tmp_path))
    assert len(known) == 1 + len(changed)


@pytest.mark.parametrize("content, said", [
    ("f,tags\na.png,dog cat\nb.png,dog\n", "{root}/labels.csv: labels are cut at spaces; if a name has several "),
    ("f,tags,split\na.png,dog,train\nb.png,dog,VALID\nc.png,dog,test\n", "{root}: validation photos join train\n"),
    ("f,tags,\na.png,пёс;кот;dog,\n", "{root}/labels.csv: label 'кот' (2 of 3 in another script): CLIP ")])
def test_what_is_said_once_of_your_own_folder(tmp_path, capsys, content, said):
    photos(tmp_path, "a.png", "b.png", "c.png")
    write(tmp_path / "labels.csv", content)
    for _ in range(2):
        load("folder", tmp_path, "train")
    assert capsys.readouterr().err.count(said.format(root=tmp_path)) == 1


def test_labels_of_several_words_between_spaces(tmp_path, capsys):
    photos(tmp_path, "a.png")
    write(tmp_path / "labels.csv", "f,tags,split\na.png,hot dog dog hot dogs,train\n")
    found = data.load_photos("folder", tmp_path, "train", known=["dog", "hot dog"])
    assert found.names == ["dog", "dogs", "hot", "hot dog"] and not capsys.readouterr().err


@pytest.mark.parametrize("there", ["a.png dog/b.png cat/c.png", "train/a.png test/b.png", "images/a.png images/b.png"])
def test_folders_that_are_no_labels(tmp_path, there):
    photos(tmp_path, *there.split())
    with refused("^folder: no labels.csv or labels.json under .*; expected .*metadata.jsonl"):
        load("folder", tmp_path, "train")


def test_tenth_set(tmp_path, monkeypatch, capsys):
    """What docs/datasets.md says to add is, word for word, all that a set needs."""
    page = data.read_text(REPOSITORY / "docs/datasets.md", "page")
    code, names = re.findall("```(?:python|json)\n(.*?)```", page, re.S)
    monkeypatch.setitem(data.LABEL_WORDS, "shapes", json.loads(names)["shapes"])
    monkeypatch.setitem(datasets.READERS, "shapes", None)
    exec(code, vars(datasets))
    for split in ("train", "test"):
        write(tmp_path / f"shapes/{split}.csv", "file,zigzag,disc\na.png,0,1\nb.png,0,0\n")
    photos(tmp_path, "shapes/images/a.png", "shapes/images/b.png")
    datasets.main(["--check", "shapes", "--data-root", str(tmp_path), "--policy", "unlabelled=drop"])
    printed = capsys.readouterr().out
    assert re.search(r"train +1 photos \(published: not stated\).*unlabelled=drop\n", printed)
    assert re.search(r"\nball +1 +1\nstar +0 +0\n", printed)
