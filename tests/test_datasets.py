"""The loaders on files in the published form, made here at small size with the odd cases, and on the real VOC and COCO files."""
import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import data
from data import UsageError


def photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def cells(values):
    """A column of MATLAB cells."""
    column = np.empty((len(values), 1), object)
    for row, value in enumerate(values):
        column[row, 0] = value
    return column


def marks(photos):
    return {path.name: {name for name, value in zip(photos.names, line) if value == 1} for path, line in zip(photos.photos, photos.labels)}


@pytest.mark.parametrize("dataset, count", [("scenes", 18), ("voc2007", 20), ("coco2014", 80), ("nuswide", 81), ("pa100k", 26), ("rapv1", 51), ("peta", 35), ("multiscene", 36), ("mlrsnet", 60), ("ucm", 17)])
def test_names(dataset, count):
    """As many as published, distinct, and words: they stand in prompts."""
    names = data.check_names(data.label_names(dataset, None), dataset)
    assert len(names) == count and all(name == " ".join(name.split()) and "_" not in name for name in names)


@pytest.mark.parametrize("dataset", [name for name in data.LOADERS])
def test_missing(dataset, tmp_path):
    """The message shows the tree under the folder given, and where to get it."""
    for split in ("train", "test"):
        with pytest.raises(UsageError) as error:
            data.load_photos(dataset, tmp_path, split)
        message = str(error.value)
        tree, get = (text.replace("<root>", str(tmp_path)) for text in data.EXPECTED[dataset])
        assert f"expected {tmp_path}/{tree}; {get}" in message and "\n" not in message


def test_half_done(tmp_path, capsys):
    """Files one folder too deep are found and named; photos, label files and archives that lack are told apart; the check does not pass over them."""
    (tmp_path / "VOCdevkit/VOC2007/VOCdevkit/VOC2007/ImageSets/Main").mkdir(parents=True)
    (tmp_path / "coco2014/annotations/annotations").mkdir(parents=True)
    (tmp_path / "coco2014/annotations/annotations/instances_val2014.json").write_text("{}")
    for dataset, deeper in (("voc2007", "VOCdevkit/VOC2007/VOCdevkit/VOC2007/ImageSets/Main"), ("coco2014", "coco2014/annotations/annotations/instances_val2014.json")):
        with pytest.raises(UsageError, match=f"where it is looked for, but there is {tmp_path}/{deeper}: (pass --data-root|move what is in) {tmp_path}/.*; expected {tmp_path}/"):
            data.load_photos(dataset, tmp_path, "test")
    (tmp_path / "other/deep/VOCdevkit/VOC2007/ImageSets/Main").mkdir(parents=True)
    with pytest.raises(UsageError, match=f"Main: pass --data-root {tmp_path}/other/deep; expected"):
        data.load_photos("voc2007", tmp_path / "other", "test")
    with pytest.raises(UsageError, match="there is no folder .*/nowhere; expected"):
        data.load_photos("ucm", tmp_path / "nowhere", "test")
    (tmp_path / "nuswide/ImageList").mkdir(parents=True)
    (tmp_path / "nuswide/ImageList/TestImagelist.txt").write_text("a\\1.jpg\n")
    with pytest.raises(UsageError, match=f"Concepts81.txt: no such file; expected .*ConceptsList.zip.* unpack them in {tmp_path}/nuswide"):
        data.load_photos("nuswide", tmp_path, "test")
    raw = list(data.RAW_NAMES["mlrsnet"])
    table(tmp_path / "mlrsnet/Labels/beach.csv", ["image", *raw], [[f"beach_{n}.jpg", 1, *[0] * 59] for n in range(10)])
    for n in range(9):
        photo(tmp_path / f"mlrsnet/Images/beach/beach_{n}.jpg")
    photo(tmp_path / "mlrsnet/Images/cloud/cloud_1.jpg")
    assert data.main(["--check", "mlrsnet", "--data-root", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    for line in ("no CSV for the photos of cloud", "1 missing photos left out", "wrong? train: 1 categories without CSV left out", "wrong? 1 categories, 46 published", "wrong? 9 photos in all, 109,161 published"):
        assert line in told


# --- natural photos -----------------------------------------------------------------------------------------------------

def test_coco(tmp_path, capsys):
    base = tmp_path / "coco2014"
    (base / "annotations").mkdir(parents=True)
    categories = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, *({"id": 100 + n, "name": name} for n, name in enumerate(data.RAW_NAMES["coco2014"]) if name not in ("person", "toothbrush"))]
    content = {"images": [{"id": n, "file_name": f"{n}.jpg"} for n in (7, 8, 9, 10)], "categories": categories,
               "annotations": [{"image_id": 7, "category_id": 90, "iscrowd": 0}, {"image_id": 8, "category_id": 1, "iscrowd": 1}, {"image_id": 10, "category_id": 1, "iscrowd": 0}]}
    for n in (7, 8, 9):
        photo(base / "val2014" / f"{n}.jpg")
    path = base / "annotations/instances_val2014.json"
    path.write_text(json.dumps(content))
    found = data.load_photos("coco2014", tmp_path, "test")
    assert marks(found) == {"7.jpg": {"toothbrush"}, "8.jpg": {"person"}, "9.jpg": set()} and len(found.names) == 80
    assert "1 of 4 photos are missing and left out (first: " in capsys.readouterr().err and "unlabelled=keep; 1 missing photos left out" in found.policy
    assert set(marks(data.load_photos("coco2014", tmp_path, "test", unlabelled="drop"))) == {"7.jpg", "8.jpg"}
    path.rename(base / "annotations/instances_val2017.json")
    (base / "val2014").rename(base / "val2017")
    assert marks(data.load_photos("coco2014", tmp_path, "test", limit=1)) == {"7.jpg": {"toothbrush"}}
    for damage, said in (({"images": []}, "instances form"), ({**content, "annotations": [{"image_id": 99, "category_id": 1}]}, "unknown photo")):
        (base / "annotations/instances_val2017.json").write_text(json.dumps(damage))
        with pytest.raises(UsageError, match=said):
            data.load_photos("coco2014", tmp_path, "test")


def test_real_coco_and_voc(shared):
    found = data.load_photos("coco2014", shared / "coco_mini", "test")
    content = json.loads((shared / "coco_mini/annotations/instances_val2017.json").read_text())
    name = {entry["id"]: entry["name"] for entry in content["categories"]}
    for entry in content["images"]:
        assert marks(found)[entry["file_name"]] == {name[a["category_id"]] for a in content["annotations"] if a["image_id"] == entry["id"]}
    assert len(found.photos) == 79 and len(data.load_photos("voc2007", shared, "train").photos) == 250


def test_nuswide(tmp_path, capsys):
    base, concepts = tmp_path / "NUS-WIDE", list(data.RAW_NAMES["nuswide"])
    for folder in ("ImageList", "Groundtruth/TrainTestLabels", "ConceptsList"):
        (base / folder).mkdir(parents=True)
    (base / "ConceptsList/Concepts81.txt").write_text("\n".join(concepts) + "\n")
    (base / "ImageList/TrainImagelist.txt").write_text("actor\\0001_1.jpg\r\nzoo\\0002_2.jpg\r\nzoo\\0003_3.jpg\r\nzoo\\0004_4.jpg\r\n")
    for concept in concepts:
        (base / f"Groundtruth/TrainTestLabels/Labels_{concept}_Train.txt").write_text({"lake": "0\n-1130179\n1\n1\n", "zebra": "1\n0\n0\n0\n"}.get(concept, "0\n0\n0\n0\n"))
    for name in ("actor/0001_1.jpg", "zoo/0002_2.jpg", "zoo/0003_3.jpg"):
        photo(base / "Flickr" / name)
    found = data.load_photos("nuswide", tmp_path, "train")
    assert marks(found) == {"0001_1.jpg": {"zebra"}, "0002_2.jpg": set(), "0003_3.jpg": {"lake"}} and found.labels[1, concepts.index("lake")] == -1
    told = capsys.readouterr().err
    assert "1 label values other than 0 and 1" in told and "1 of 4 photos are missing" in told
    assert len(data.load_photos("nuswide", tmp_path, "train", unlabelled="drop").photos) == 2
    (base / "Groundtruth/TrainTestLabels/Labels_zebra_Train.txt").write_text("1\n")
    with pytest.raises(UsageError, match="has 1 lines, the image list 4"):
        data.load_photos("nuswide", tmp_path, "train")


# --- pedestrians --------------------------------------------------------------------------------------------------------

def test_pa100k(tmp_path):
    raw = list(data.RAW_NAMES["pa100k"])
    label = np.zeros((2, 26), np.uint8)
    label[0, raw.index("Hat")] = label[1, raw.index("boots")] = 1
    savemat(tmp_path / "annotation.mat", {"attributes": cells(raw), **{f"{part}_images_name": cells([f"{part}1.jpg", f"{part}2.jpg"]) for part in ("train", "val", "test")}, **{f"{part}_label": label for part in ("train", "val", "test")}})
    for part in ("train", "val", "test"):
        for n in (1, 2):
            photo(tmp_path / "release_data" / f"{part}{n}.jpg")
    expected = {"train1.jpg": {"person wearing a hat"}, "train2.jpg": {"person in boots"}}
    assert marks(data.load_photos("pa100k", tmp_path, "train", validation="drop")) == expected
    assert len(data.load_photos("pa100k", tmp_path, "train").photos) == 4 and set(marks(data.load_photos("pa100k", tmp_path, "test"))) == {"test1.jpg", "test2.jpg"}
    (tmp_path / "annotation.mat").write_bytes(b"torn")
    with pytest.raises(UsageError, match="cannot be read as a MATLAB file"):
        data.load_photos("pa100k", tmp_path, "train")


def partition(*parts, across):
    """One partition as its owners nest it: cell -> 1 x 1 struct of index lists (from 1)."""
    record = np.empty((1, 1), [(f"part{n}", object) for n in range(len(parts))])
    for n, part in enumerate(parts):
        record[0, 0][f"part{n}"] = np.array([part]) if across else np.array([part]).T
    return record


def test_peta(tmp_path):
    """Value 2 is absent; the file's own order of 105 names is not ours; partitions count from 1."""
    raw = ["extra"] + list(data.RAW_NAMES["peta"])[::-1]
    table = np.zeros((4, 4 + 36))
    table[:, 4 + raw.index("personalMale")] = [1, 2, 1, 0]
    table[:, 4 + raw.index("hairLong")] = [2, 1, 0, 1]
    content = np.empty((1, 1), [("data", object), ("names", object), ("unused", object), ("partition", object)])
    content[0, 0] = (table, cells(raw), np.zeros(1), cells([partition([1], [2], [3, 4], across=False), partition([4], [3], [2, 1], across=False)]))
    savemat(tmp_path / "PETA.mat", {"peta": content})
    for n in range(1, 5):
        photo(tmp_path / "images" / f"{n:05d}.png")
    assert marks(data.load_photos("peta", tmp_path, "train")) == {"00001.png": {"man"}, "00002.png": {"person with long hair"}}
    assert marks(data.load_photos("peta", tmp_path, "train", validation="drop")) == {"00001.png": {"man"}}
    assert marks(data.load_photos("peta", tmp_path, "test")) == {"00003.png": {"man"}, "00004.png": {"person with long hair"}}
    assert list(marks(data.load_photos("peta", tmp_path, "test", partition=1))) == ["00002.png", "00001.png"]
    with pytest.raises(UsageError, match="has no partition 4"):
        data.load_photos("peta", tmp_path, "test", partition=4)


def test_rapv1(tmp_path):
    raw = list(data.RAW_NAMES["rapv1"]) + [f"more{n}" for n in range(41)]
    table = np.zeros((3, 92), np.uint8)
    table[0, raw.index("Female")] = table[2, raw.index("Box")] = table[1, 91] = 1
    content = np.empty((1, 1), [(name, object) for name in ("partition", "label", "chinese", "english", "position", "files", "exp")])
    content[0, 0] = (cells([partition([1, 2], [3], across=True)]), table, cells(raw), cells(raw), np.zeros((3, 4)), cells([f"CAM{n}.png" for n in range(3)]), cells(raw))
    (tmp_path / "RAP_annotation").mkdir()
    savemat(tmp_path / "RAP_annotation/RAP_annotation.mat", {"RAP_annotation": content})
    for n in range(3):
        photo(tmp_path / "RAP_dataset" / f"CAM{n}.png")
    assert marks(data.load_photos("rapv1", tmp_path, "train")) == {"CAM0.png": {"woman"}, "CAM1.png": set()}
    assert marks(data.load_photos("rapv1", tmp_path, "test")) == {"CAM2.png": {"person with a box"}}


# --- from above -----------------------------------------------------------------------------------------------------------

def table(path, header, rows, tab=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("\t" if tab else ",").join(map(str, row)) for row in [header, *rows]) + "\n")


def test_mlrsnet_columns_differ(tmp_path):
    """The same photo content in categories whose files order their columns otherwise: the labels are those of the names. In the published
    harbor&port.csv the 60 names stand in alphabetical order, in desert.csv chaparral follows water."""
    raw, base = list(data.RAW_NAMES["mlrsnet"]), tmp_path / "MLRSNet"
    moved = [name for name in raw if name != "chaparral"]
    moved.insert(moved.index("water") + 1, "chaparral")
    assert raw == sorted(raw) and moved[56:] == ["water", "chaparral", "wetland", "wind turbine"]
    for category, order in (("harbor&port", raw), ("desert", moved)):
        table(base / "Labels" / f"{category}.csv", ["image", *order], [[f"{category}_{n:05d}.jpg", *(int(name in ("sand", "trees", "chaparral")) for name in order)] for n in range(10)])
        for n in range(10):
            photo(base / "Images" / category / f"{category}_{n:05d}.jpg")
    parts = {split: data.load_photos("mlrsnet", tmp_path, split, validation=validation) for split, validation in (("train", "drop"), ("test", "drop"))}
    assert {split: len(found.photos) for split, found in parts.items()} == {"train": 8, "test": 10}
    for found in parts.values():
        assert all(names == {"sand", "tree", "chaparral"} for names in marks(found).values())
    assert not set(marks(parts["train"])) & set(marks(parts["test"])) and len(data.load_photos("mlrsnet", tmp_path, "train").photos) == 10
    assert marks(data.load_photos("mlrsnet", tmp_path, "test", split_seed=1)).keys() != marks(parts["test"]).keys()
    table(base / "Labels/beach.csv", ["image", *raw[:-1], "wind mill"], [["a.jpg"] + [0] * 60])
    with pytest.raises(UsageError, match="beach.csv: header lacks wind turbine and has unknown wind mill"):
        data.load_photos("mlrsnet", tmp_path, "train")


def test_ucm_and_multiscene(tmp_path):
    raw = list(data.RAW_NAMES["ucm"])
    table(tmp_path / "ucm/LandUse_Multilabeled.txt", ["IMAGE\\LABEL", *raw], [[f"agricultural{n:02d}", *(int(name == "field") for name in raw)] for n in range(10)], tab=True)
    for n in range(10):
        photo(tmp_path / "ucm/Images/agricultural" / f"agricultural{n:02d}.tif")
    train, test = (data.load_photos("ucm", tmp_path, split) for split in ("train", "test"))
    assert (len(train.photos), len(test.photos)) == (8, 2) and set(map(frozenset, marks(train).values())) == {frozenset({"field"})}
    raw = list(data.RAW_NAMES["multiscene"])
    table(tmp_path / "multiscene/test.csv", ["id", *raw[::-1]], [["7", *(int(name == "Sea") for name in raw[::-1])]])
    photo(tmp_path / "multiscene/images/7.jpg")
    assert marks(data.load_photos("multiscene", tmp_path, "test")) == {"7.jpg": {"sea"}}


# --- one's own --------------------------------------------------------------------------------------------------------------

def test_folder(tmp_path, capsys):
    table(tmp_path / "labels.csv", ["file", "dog", "split", "cat"], [["a.png", 1, "train", 0], ["sub/b.png", 0, "test", 1], ["c.png", 1, "train", -1]])
    for name in ("a.png", "sub/b.png", "c.png"):
        photo(tmp_path / name)
    train, test = (data.load_photos("folder", tmp_path, split) for split in ("train", "test"))
    assert marks(train) == {"a.png": {"dog"}, "c.png": {"dog"}} and train.labels.tolist() == [[1, 0], [1, -1]] and marks(test) == {"b.png": {"cat"}}
    assert data.label_names("folder", tmp_path) == ["dog", "cat"]
    photo(tmp_path / "d.png")
    assert data.main(["--check", "folder", "--data-root", str(tmp_path)]) == 2
    assert f"wrong? 1 photos of the folder without labels (first: {tmp_path}/d.png)" in capsys.readouterr().err
    (tmp_path / "d.png").unlink()
    for content, said in (("file,dog\na.png,2\n", "line 2"), ("file,dog\na.png,1\nc.png\n", r"line 3 \(c.png\): needs 2 cells"), ("file,dog\n", "holds no photo"), ("file,dog,Dog\na.png,1,0\n", "stands twice"),
                          ("file,dog,split\na.png,1,later\n", "must say train or test, not 'later'"), ("file,dog\nzz.png,1\nyy.png,1\n", "none of the 2 photos"),
                          ("a.png,1\nb.png,0\n", "first line must name the columns")):
        (tmp_path / "labels.csv").write_text(content)
        with pytest.raises(UsageError, match=said):
            data.load_photos("folder", tmp_path, "train")
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "labels.json").write_text(json.dumps({"a.png": ["dog", "cat"], "sub/b.png": [], "c.png": ["cat"]}))
    both = {**marks(data.load_photos("folder", tmp_path, "train")), **marks(data.load_photos("folder", tmp_path, "test"))}
    assert both == {"a.png": {"dog", "cat"}, "b.png": set(), "c.png": {"cat"}}


# --- python data.py --check ------------------------------------------------------------------------------------------------

def test_check(command, tmp_path, shared):
    """On 400 of VOC's photos: the counts are those of the files, and what differs from the published ones is named."""
    done = command("data.py", "--check", "voc2007", "--data-root", shared, expect=2)
    assert "train       250 photos (published: 5,011)" in done.stdout and "wrong? test: 150 photos, 4,952 published" in done.stderr
    train = data.load_photos("voc2007", shared, "train")
    counted = next(line.split() for line in done.stdout.splitlines() if line.startswith("person "))
    assert int(counted[1]) == (train.labels[:, train.names.index("person")] == 1).sum()
    coco = command("data.py", "--check", "coco2014", "--data-root", shared / "coco_mini", expect=2)
    assert "(published: 118,287)" in coco.stdout and "(published: 5,000)" in coco.stdout  # 2017 names
    with pytest.raises(UsageError, match="--download fetches voc2007 only"):
        data.load_photos("ucm", tmp_path, "test", download=True)
    missing = command("data.py", "--check", "ucm", "--data-root", tmp_path, expect=2)
    assert missing.stderr.startswith("data.py: ucm: no LandUse_Multilabeled.txt") and "bigearth.eu" in missing.stderr


def test_check_of_a_sound_set(tmp_path, capsys):
    for n in range(10):
        photo(tmp_path / f"{n}.png")
    table(tmp_path / "labels.csv", ["file", "dog", "cat"], [[f"{n}.png", 1, 1] for n in range(10)])
    assert data.main(["--check", "folder", "--data-root", str(tmp_path)]) == 0 and "nothing wrong was found" in capsys.readouterr().out
    (tmp_path / "3.png").write_bytes(b"torn")
    table(tmp_path / "labels.csv", ["file", "dog", "cat"], [[f"{n}.png", 1, 0] for n in range(10)])
    assert data.main(["--check", "folder", "--data-root", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "no photo with cat" in told and "3.png cannot be read" in told


@pytest.mark.parametrize("dataset", [name for name in data.DATASET_NAMES])
def test_descriptions_and_synonyms(dataset, capsys):
    """Every label of every set is described, in the manner of SSPA's figure, and synonyms belong to labels."""
    names = data.label_names(dataset, None)
    found = data.read_descriptions(data.ASSETS / "descriptions" / f"{dataset}.json", names)
    assert list(found) == names and not capsys.readouterr().err
    for name, sentence in found.items():
        assert "often found with" in sentence and sentence.endswith(".") and len(sentence.split()) < 40 and data.match_nouns([sentence], [name])[0, 0], (name, sentence)
    synonyms = data.synonyms_of(names, dataset)
    assert set(synonyms) == {"", *names}
    words = [data.plain(word) for name in names for word in synonyms[name]]
    assert len(words) == len(set(words)) or dataset == "scenes", sorted(word for word in words if words.count(word) > 1)


def test_folder_through_both_methods(command, tmp_path):
    """A set of one's own, from drawn pictures, to a result in metrics.json that says how it was split."""
    import scenes
    names, rows = ["boat", "car", "house", "sun"], []
    for index in range(80):
        scenes.picture("train", index)[0].save(tmp_path / f"{index}.png")
        present = scenes.labels_of("train", index)
        rows.append([f"{index}.png", *(int(present[scenes.NAMES.index(name)]) for name in names)])
    table(tmp_path / "labels.csv", ["file", *names], rows)
    words = ["--dataset", "folder", "--data-root", tmp_path, "--backbone", "scenes", "--epochs", 2]
    command("adapter_rp.py", *words, "--text-count", 300, "--output", tmp_path / "rp")
    done = command("sspa.py", *words, "--tune-image", "none", "--batch-size", 16, "--split-seed", 3, "--output", tmp_path / "sspa")
    assert "the template stands alone" in done.stderr
    for method, seed in (("rp", 0), ("sspa", 3)):
        result = json.loads((tmp_path / method / "metrics.json").read_text())
        assert result["photo_count"] == 16 and [entry["name"] for entry in result["per_class"]] == names and f"80/20 by seed {seed}" in result["policy"]


def trained_within_bounds(command, folder, names, image_labels, texts, width, rng):
    """RP and metrics on so many labels and made-up embeddings: at most 4 GB of memory, minutes."""
    text_labels, words = (rng.random((texts, len(names))) < 0.03).astype(np.int8), rng.standard_normal((len(names), width), np.float32)
    text_labels[np.arange(texts), rng.integers(len(names), size=texts)] = 1
    embeddings = [labels @ words + rng.standard_normal((len(labels), width), np.float32) for labels in (text_labels, image_labels)]
    np.savez(folder / "f.npz", label_names=np.array(names), label_embeddings=words, text_labels=text_labels, image_labels=image_labels, text_embeddings=embeddings[0], image_embeddings=embeddings[1])
    command("adapter_rp.py", "--features", folder / "f.npz", "--epochs", 1, "--output", folder / "run", timeout=600)
    result = json.loads((folder / "run/metrics.json").read_text())
    assert result["photo_count"] == len(image_labels) and result["text_count"] == texts and result["mAP"] > 50
    assert result["peak_memory_mib"] < 4096 and result["seconds"] < 600


def test_full_size_coco(command, tmp_path):
    """As many photos, labels and annotations as val2014 has: loaded in seconds, trained for and scored. (All photos are one file.)"""
    import time
    rng, base = np.random.default_rng(0), tmp_path / "coco2014"
    (base / "annotations").mkdir(parents=True)
    (base / "val2014").mkdir()
    count = 40504
    photo(base / "val2014/0.jpg")
    owners, kinds = rng.integers(count, size=291875), rng.integers(80, size=291875)
    (base / "annotations/instances_val2014.json").write_text(json.dumps({
        "images": [{"id": n, "file_name": "0.jpg"} for n in range(count)], "categories": [{"id": n, "name": name} for n, name in enumerate(data.RAW_NAMES["coco2014"])],
        "annotations": [{"image_id": int(owner), "category_id": int(kind), "iscrowd": 0} for owner, kind in zip(owners, kinds)]}))
    begun = time.monotonic()
    found = data.load_photos("coco2014", tmp_path, "test")
    assert time.monotonic() - begun < 30 and found.labels.shape == (count, 80) and found.labels.dtype == np.int8
    expected = np.zeros((count, 80), np.int8)
    expected[owners, kinds] = 1
    assert (found.labels == expected).all()
    trained_within_bounds(command, tmp_path, found.names, found.labels, 82783, 512, rng)


def test_full_size_nuswide(command, tmp_path):
    """As many photos and label files as the test part has: the same."""
    import time
    rng, base, count = np.random.default_rng(0), tmp_path / "nuswide", 107859
    for folder in ("ImageList", "TrainTestLabels", "Flickr/a"):
        (base / folder).mkdir(parents=True)
    photo(base / "Flickr/a/0.jpg")
    (base / "ImageList/TestImagelist.txt").write_text("a\\0.jpg\n" * count)
    concepts = list(data.RAW_NAMES["nuswide"])
    (base / "Concepts81.txt").write_text("\n".join(concepts) + "\n")
    expected = (rng.random((count, 81)) < 0.03).astype(np.int8)
    for column, concept in enumerate(concepts):
        (base / f"TrainTestLabels/Labels_{concept}_Test.txt").write_text("\n".join(map(str, expected[:, column])) + "\n")
    begun = time.monotonic()
    found = data.load_photos("nuswide", tmp_path, "test")
    assert time.monotonic() - begun < 60 and (found.labels == expected).all()
    trained_within_bounds(command, tmp_path, found.names, found.labels, 161789, 128, rng)


def test_a_checkpoint_brings_its_split(command, tmp_path):
    """Evaluated later, a model meets the test photos of its own split, not photos it was trained on."""
    import scenes
    for index in range(30):
        scenes.picture("train", index)[0].save(tmp_path / f"{index}.png")
    table(tmp_path / "labels.csv", ["file", "boat", "sun"], [[f"{index}.png", index % 2, 1 - index % 2] for index in range(30)])
    words = ["--dataset", "folder", "--data-root", tmp_path, "--backbone", "scenes", "--tune-image", "none"]
    command("sspa.py", *words, "--epochs", 1, "--batch-size", 8, "--split-seed", 7, "--output", tmp_path / "run")
    command("sspa.py", *words[:-2], "--eval-only", "--checkpoint", tmp_path / "run/checkpoint.safetensors", "--output", tmp_path / "again")
    first, again = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "again"))
    assert "by seed 7" in again["policy"] and again["mAP"] == pytest.approx(first["mAP"], abs=1e-3)


def test_tenth_set_of_the_readme(tmp_path, monkeypatch):
    """The README's loader, run as it stands there."""
    import re
    code = re.search(r"```python\n(def shapes.*?)```", (data.HERE / "README.md").read_text(encoding="utf-8"), re.S).group(1)
    exec(code, data.__dict__)
    monkeypatch.setitem(data.LOADERS, "shapes", data.__dict__.pop("shapes"))
    monkeypatch.setitem(data.EXPECTED, "shapes", ("shapes/{train.csv, test.csv, images/}", "draw them"))
    for table_of in (data.RAW_NAMES, data.DATASET_NAMES):
        monkeypatch.setitem(table_of, "shapes", {"disc": "circle", "box": "square"} if table_of is data.RAW_NAMES else ["circle", "square"])
    with pytest.raises(UsageError, match=f"shapes: no test.csv under {tmp_path}; expected {tmp_path}/shapes/.*; draw them"):
        data.load_photos("shapes", tmp_path, "test")
    table(tmp_path / "shapes/test.csv", ["file", "box", "disc"], [["a.png", 1, 0], ["b.png", 1, 1]])
    for name in ("a.png", "b.png"):
        photo(tmp_path / "shapes/images" / name)
    assert marks(data.load_photos("shapes", tmp_path, "test")) == {"a.png": {"square"}, "b.png": {"circle", "square"}}
