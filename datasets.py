"""The nine datasets as their owners publish them, and the places of things in their photos.

    python datasets.py --check coco2014 --data-root D       counts beside the published ones, and what looks wrong

A reader(root, split, policies...) -> LabelledPhotos reads one dataset; split is "train" or "test". READERS lists the
readers with their files, sources and policies. A tenth set is one function and one entry there (docs/datasets.md).
"""
import argparse
import json
import os
import re
import sys
from functools import lru_cache
from itertools import product, zip_longest
from operator import itemgetter
from os.path import exists, isfile, normpath, splitext
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from scipy.io import loadmat

import data
import scenes
from data import (
    ASSETS,
    LABEL_WORDS,
    LabelledPhotos,
    MissingFile,
    UsageError,
    clean_name,
    drawn,
    files_under,
    fold,
    label_names,
    labels_of,
    lines_of,
    list_photos,
    open_photo,
    read_json,
    read_table,
    read_text,
    reading,
    say,
    say_once,
    table_of,
)

# --- boxes ------------------------------------------------------------------------------------------------------------

def voc_things(path):
    """An annotation of VOC's form -> ([(label, left, top, right, bottom, clear), ...], (width, height)) in pixels;
    clear: not marked difficult. Raises UsageError."""
    with reading(path, "annotation", "give VOC's XML") as path:
        root = ElementTree.parse(path)
        found = []
        for thing in root.iterfind("object"):
            name = thing.findtext("name").strip()
            name = clean_name(LABEL_WORDS["voc2007"].get(name, name), path.parent)
            sides = [float(thing.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            place = np.array(sides) - (1, 1, 0, 0)  # VOC counts pixels from 1
            found.append((name, *place, thing.findtext("difficult", "0").strip() != "1"))
        return found, (int(root.findtext("size/width")), int(root.findtext("size/height")))


def coco_things(path):
    """Instances of COCO's form -> {photo's file: what voc_things gives}; clear: no crowd. Raises UsageError."""
    with reading(path, "annotations", "give COCO's instances, with all photos and categories") as path:
        content = read_json(path, "annotations")
        names = {entry["id"]: clean_name(entry["name"], path.parent) for entry in content["categories"]}
        found = {}
        things_of = {}
        for entry in content["images"]:  # one file may have two ids
            file = normpath(entry["file_name"])
            found.setdefault(file, ([], (entry["width"], entry["height"])))
            things_of[entry["id"]], _ = found[file]
        for entry in content["annotations"]:
            left, top, width, height = entry["bbox"]
            thing = (names[entry["category_id"]], left, top, left + width, top + height, not entry.get("iscrowd"))
            things_of[entry["image_id"]].append(thing)
        return found


coco_boxes = lru_cache(1)(coco_things)


def scene_of(photo):
    """(split, index) of a picture of scenes, or of a file that `scenes.py draw` has marked; else None."""
    if isinstance(photo, tuple):
        return photo
    if photo.suffix == ".png":
        with Image.open(photo) as image:
            mark = re.fullmatch("(train|test) ([0-9]+)", image.info.get("scenes", ""))
        if mark:
            return mark[1], int(mark[2])
    return None


def boxes_of(photo, names):
    """Boxes of a photo's things, if known: of scenes, and of files in the places of VOC's or COCO's -> None, or
    (float [K, 6]: column of the name, left, top, right, bottom, clear; (width, height) of the photo), pixels. clear: 1,
    or 0 for VOC's difficult things and COCO's crowds; for scenes the visible share. Raises UsageError."""
    scene = scene_of(photo)
    if scene:
        found = scenes.boxes(*scene)
        size = (scenes.SIZE, scenes.SIZE)
    else:
        root = photo.parent.parent
        places = (root / f"Annotations/{photo.stem}.xml", photo.with_suffix(".xml"),
                  root / f"annotations/instances_{photo.parent.name}.json", photo.with_name("_annotations.coco.json"))
        path = next(filter(Path.is_file, places), None)
        if path is None:
            return None
        if path.suffix == ".xml":
            found, size = voc_things(path)
        else:
            found, size = coco_boxes(path).get(photo.name, ([], (1, 1)))
    rows = [(names.index(label), *place) for label, *place in found if label in names]
    return np.array(rows, float).reshape(-1, 6), size


def in_view(boxes, size):
    """Boxes as CLIP sees them, after the shorter side is resized and a square cut from the middle -> (float [K', 6]:
    boxes of which at least half is inside, in shares of the square and cut at its edge; bool [K]: which these are)"""
    shorter = min(size)
    margins = (np.array(size) - shorter) / 2
    corners = (boxes[:, 1:5] - np.tile(margins, 2)) / shorter
    seen = np.clip(corners, 0, 1)
    kept = area(seen) >= area(corners) / 2
    return np.column_stack([boxes[:, :1], seen, boxes[:, 5:]])[kept], kept


def area(corners):
    """float [K, 4]: left, top, right, bottom -> areas, float [K]"""
    return (corners[:, 2:] - corners[:, :2]).prod(1)


# --- helpers of the readers -------------------------------------------------------------------------------------------

def find_files(root, folders, *markers):
    """The first of root/<folder> ... and root itself that holds one of the markers, which are files or folders
    -> (that folder, path of the marker). Raises MissingFile, which names a folder one level down that holds one."""
    root = Path(root)
    missing = f"no {' or '.join(markers[:2])} under {root}"
    for place in (root, *sorted(root.glob("*"))):
        for folder, marker in product((*folders, "."), markers):
            path = place / folder / marker
            if exists(path) and place == root:
                return root / folder, path
            if exists(path):
                raise MissingFile(f"{missing}, but it is in {place}: pass --data-root {place}")
    raise MissingFile(missing)


def read_matlab(path):
    """The variables in a MATLAB file -> dict, with structs as dicts. Raises UsageError."""
    with reading(path, "labels", "fetch it again"):
        return loadmat(path, simplify_cells=True)


def shared_out(count, seed, **shares):
    """Rows 0 .. count-1, shuffled by the seed and divided by shares (train=0.8, test=0.2) -> {part: sorted rows}"""
    order = np.random.default_rng(seed).permutation(count)
    ends = np.round(np.cumsum(list(shares.values())) * count).astype(int)
    return {part: np.sort(rows) for part, rows in zip(shares, np.split(order, ends), strict=False)}


def parts_of(split, validation):
    """The published parts that make up a split. validation: "train" adds the validation photos to training."""
    if split == "train" and validation == "train":
        return ["train", "val"]
    return [split]


def treat_unlabelled(found, unlabelled):
    """Keep or drop the photos that show no label. -> LabelledPhotos"""
    if unlabelled == "keep":
        return found
    return found.at(np.flatnonzero((found.labels == 1).any(1)))


def pick_attributes(values, spelt, dataset):
    """values: [N, the owners' attributes spelt] -> int8 [N, C] in the order of our labels, 1 where the value is 1"""
    spelt = list(spelt)
    columns = [spelt.index(name) for name in LABEL_WORDS[dataset]]
    return (values[:, columns] == 1).astype(np.int8)


def class_labels(marked, dataset, root):
    """Each photo's {class: 1, 0 or -1} -> int8 [N, C]. Raises UsageError for a class that is not the dataset's."""
    names = label_names(dataset)
    odd = sorted(set().union(*marked).difference(names))
    if odd:
        raise UsageError(f"label files of {root} have '{', '.join(odd):.200}', no label of {dataset}; for labels of "
                         f"your own pass --dataset folder --data-root {root}")
    return labels_of(marked, names)


def voc_marks(path, doubtful=-1):
    """The labels in an annotation of VOC's form -> {label: 1, or doubtful where all its objects are difficult}"""
    things, _ = voc_things(path)
    clear_last = sorted(things, key=itemgetter(-1))
    return {name: 1 if clear else doubtful for name, *_, clear in clear_last}


def coco_marks(path):
    """The labels of COCO's form -> {photo's file: {label: 1}}. A crowd counts as present."""
    return {file: {name: 1 for name, *_ in things} for file, (things, _) in coco_things(path).items()}


# --- the readers ------------------------------------------------------------------------------------------------------

def voc2007(root, split, difficult="ignore"):
    """PASCAL VOC2007; trainval for training. difficult: labels seen only on objects marked difficult become -1 (ignore,
    the devkit's rule), 0 (negative: TaI-DPT, DualCoOp) or 1 (positive: TagCLIP)."""
    doubtful = {"ignore": -1, "negative": 0, "positive": 1}[difficult]
    part = "trainval" if split == "train" else "test"
    base, lists = find_files(root, ("VOCdevkit/VOC2007", "VOC2007"), "ImageSets/Main")
    ids = read_text(lists / f"{part}.txt", "image list").split()
    marked = [voc_marks(base / f"Annotations/{photo}.xml", doubtful) for photo in ids]
    labels = class_labels(marked, "voc2007", base)
    return LabelledPhotos([base / f"JPEGImages/{photo}.jpg" for photo in ids], labels, f"difficult={difficult}")


def coco2014(root, split, unlabelled="keep"):
    """MS-COCO's instances, 2014 or 2017 file names; train and val serve as train and test; a crowd counts as present.
    unlabelled: photos without any label are kept (40,504 in val2014) or dropped (40,137)."""
    part = "train" if split == "train" else "val"
    markers = [f"annotations/instances_{part}{year}.json" for year in (2014, 2017)]
    base, path = find_files(root, ("coco2014", "coco", "COCO", "coco2017"), *markers)
    part = path.stem.removeprefix("instances_")  # the photos' folder
    marks_of = coco_marks(path)
    labels = class_labels(marks_of.values(), "coco2014", base)
    policy = f"{part}, crowds count, unlabelled={unlabelled}"
    found = LabelledPhotos([base / part / file for file in marks_of], labels, policy)
    return treat_unlabelled(found, unlabelled)


def nuswide(root, split, unlabelled="keep"):
    """NUS-WIDE, the owners' split. A value other than 0 and 1 (the published Labels_lake_Train.txt has one) is ignored.
    unlabelled: photos without any label are kept (161,789 / 107,859) or dropped (125,449 / 83,898)."""
    part = split.capitalize()
    base, path = find_files(root, ("nuswide", "NUS-WIDE", "NUSWIDE", "nus_wide"), f"ImageList/{part}Imagelist.txt")
    files = [line.replace("\\", "/") for line in lines_of(path, "image list")]
    _, folder = find_files(base, ("Groundtruth", "GroundTruth"), "TrainTestLabels")
    labels = []
    for concept in LABEL_WORDS["nuswide"]:
        values = read_text(folder / f"Labels_{concept}_{part}.txt", "labels").split()
        if len(values) != len(files):
            raise UsageError(f"{concept}: {len(values):,} labels for {len(files):,} listed photos; fetch both again")
        labels.append([{"0": 0, "1": 1}.get(value, -1) for value in values])
    labels = np.array(labels, np.int8).T
    _, photos = find_files(base, (), "Flickr", "images", "Images")
    if not any(isfile(photos / file) for file in files[:100]):  # perhaps a mirror without the list's folders
        files = [Path(file).name for file in files]
    policy = f"unlabelled={unlabelled}, {(labels == -1).sum()} odd values ignored"
    found = LabelledPhotos([photos / file for file in files], labels, policy)
    return treat_unlabelled(found, unlabelled)


def pa100k(root, split, validation="train"):
    """PA-100K, 26 attributes. validation: the 10,000 validation photos are trained on or dropped."""
    base, path = find_files(root, ("pa100k", "PA100k", "PA-100K", "PA100K"), "annotation.mat")
    _, folder = find_files(base, (), "release_data/release_data", "release_data", "data")
    parts = parts_of(split, validation)
    content = read_matlab(path)
    values = np.concatenate([content[f"{part}_label"] for part in parts])
    labels = pick_attributes(values, content["attributes"], "pa100k")
    photos = [folder / file for part in parts for file in content[f"{part}_images_name"]]
    return LabelledPhotos(photos, labels, f"validation={validation}")


def rapv1(root, split, partition="0", unknown="absent"):
    """RAP 1, 51 of its 92 attributes. partition: which of the owners' five (SSPA's author tests on 4 in later code).
    unknown: value 2 (125 persons whose sex is not known) counts as absent, as in public code, or is ignored."""
    markers = ("RAP_annotation.mat", "RAP_annotation/RAP_annotation.mat")
    base, path = find_files(root, ("rapv1", "RAP", "rap", "RAPv1"), *markers)
    content = read_matlab(path)["RAP_annotation"]
    rows = content["partion"][int(partition)][f"{split}_index"] - 1
    values = content["label"][rows]
    names = content["attribute_exp"]  # of the first 51 columns; attribute_eng spells them with prefixes (hs-BaldHead)
    labels = pick_attributes(values, names, "rapv1")
    if unknown == "ignored":
        labels -= pick_attributes(values == 2, names, "rapv1")
    photos = [base / "RAP_dataset" / file for file in content["imagesname"][rows]]
    return LabelledPhotos(photos, labels, f"partition={partition}, unknown={unknown}")


def peta(root, split, partition="0", validation="train"):
    """PETA, 35 of its 105 attributes; value 2 means absent. partition: which of the owners' five. validation: the
    validation photos are trained on or dropped."""
    base, path = find_files(root, ("peta", "PETA"), "PETA.mat")
    content = read_matlab(path)["peta"]
    rows_of = content["partion_attribute"][int(partition)]
    numbers = np.concatenate([rows_of[part] for part in parts_of(split, validation)])  # from 1
    values = content["data"][numbers - 1, 4:]  # the first four columns are no attributes
    labels = pick_attributes(values, content["attribute"], "peta")
    photos = [base / f"images/{number:05d}.png" for number in numbers]
    return LabelledPhotos(photos, labels, f"partition={partition}, validation={validation}")


SLIPS = {"oilfiled": "oilfield", "solarpannel": "solarpanel", "windtrubine": "windturbine"}  # of MultiScene's owners


def multiscene_headings(headings):
    """The labels in the order of the columns -> list. Raises ValueError where a heading differs by more than blanks and
    the owners' slips."""
    names = list(LABEL_WORDS["multiscene"])
    for heading, name in zip_longest(headings, names, fillvalue=""):
        letters = re.sub(r"[\W_]", "", heading).lower()
        if SLIPS.get(letters, letters) != name.replace(" ", "").lower():
            raise ValueError(f"a column is headed '{heading}' where '{name}' must stand")
    return names


def multiscene(root, split):
    """MultiScene, the clean part. Columns are read by their place; headings that say something else are refused."""
    name = "Tra.csv" if split == "train" else "Test.csv"
    base, path = find_files(root, ("multiscene", "MultiScene"), f"MultiScene-Clean/{name}", name)
    table = read_table(path, "multiscene", multiscene_headings)
    images = path.parent / "images"
    if not exists(images):
        images = base / "images"
    return LabelledPhotos(find_photos(images, table.files), table.labels, "clean part")


def mlrsnet_headings(headings):
    """Headings -> the same, with a single blank one replaced by the single label that is missing, as in
    storage_tank.csv of June 2020."""
    lacking = set(LABEL_WORDS["mlrsnet"]).difference(headings)
    if headings.count("") == len(lacking) == 1:
        name = lacking.pop()
        say_once(f"mlrsnet: a column without a heading is read as '{name}', the one label without a column")
        headings[headings.index("")] = name
    return headings


def mlrsnet(root, split, validation="train", split_seed=0):
    """MLRSNet. Each category's CSV is read by its own header, because the order of columns differs. split_seed: draws
    40 / 10 / 50 % of every category (the owners' lists were not found). validation: the 10 % are trained on or dropped.
    """
    base, folder = find_files(root, ("mlrsnet", "MLRSNet"), "Labels", "labels")
    tables = {path.stem: read_table(path, "mlrsnet", mlrsnet_headings) for path in sorted(folder.glob("*.csv"))}
    files = []
    labels = []
    many = {}
    strange = []
    for category, table in tables.items():
        many[category] = (table.labels.sum(1) > 13).sum()
        own = [category.replace("_", " ") in words for words in LABEL_WORDS["mlrsnet"].items()]
        if any(own) and not table.labels[:, own].any():
            strange.append(category)
        rows_of = shared_out(len(table.files), split_seed, train=0.4, val=0.1, test=0.5)
        for row in np.concatenate([rows_of[part] for part in parts_of(split, validation)]):
            files.append(f"{category}/{table.files[row]}")
            labels.append(table.labels[row])
    doubts = []
    count = sum(len(table.files) for table in tables.values())
    if count != 109161:
        doubts.append(f"{len(tables)} categories with {count:,} photos, 46 with 109,161 published")
    if any(many.values()):
        doubts.append(f"{sum(many.values()):,} photos have more than 13 labels, most of them in "
                      f"{max(many, key=many.get)}; the owners' labels of May 2021 are faulty, take those of June 2020")
    if strange:
        doubts.append(f"no photo of {', '.join(strange)} has the label of that name")
    policy = f"{len(tables)} categories, 40/10/50 % of each by seed {split_seed}, validation={validation}"
    return LabelledPhotos(find_photos(base / "Images", files), np.array(labels), policy, doubts)


def ucm(root, split, split_seed=0):
    """UC Merced. split_seed: draws 80 / 20 % (no split is published)."""
    base, path = find_files(root, ("ucm", "UCMerced_LandUse", "UCM"), "LandUse_Multilabeled.txt",
                            "multilabels/LandUse_Multilabeled.txt", "LandUse_Multilabeled.csv")
    _, images = find_files(base, ("UCMerced_LandUse",), "Images")
    table = read_table(path, "ucm")
    stems = [Path(file).stem for file in table.files]
    photos = [images / stem.rstrip("0123456789") / f"{stem}.tif" for stem in stems]
    found = LabelledPhotos(photos, table.labels, f"80/20 by seed {split_seed}")
    return found.at(shared_out(len(photos), split_seed, train=0.8, test=0.2)[split])


# --- your own photos --------------------------------------------------------------------------------------------------

PART = re.compile("(train|val|test)(val|ing|id|idation)?[0-9]*", re.IGNORECASE)


def part_of(word):
    """A word such as train, training, valid or train2014 -> "train", "val" or "test"; None for another word"""
    found = PART.fullmatch(word)
    return found and found[1].lower()


def json_rows(path):
    """{file: [labels]}, in which a file may occur twice"""
    for file, labels in json.loads(read_text(path, "labels"), object_pairs_hook=list):
        yield file, dict.fromkeys(list.copy(labels), 1)


def jsonl_rows(path):
    """Hugging Face's metadata.jsonl"""
    for number, line in enumerate(lines_of(path, "labels"), 1):
        with reading(f"{path}, entry {number}", "labels", 'give {"file_name": "a.jpg", "labels": ["dog"]}, one a line'):
            entry = json.loads(line)
            labels = entry.get("labels", entry.get("label"))
            if isinstance(labels, str):
                labels = [labels]
            yield entry["file_name"], dict.fromkeys(list.copy(labels), 1)


def coco_rows(path):
    """COCO's instances, beside the photos or in annotations/instances_<their folder>.json. A category without any box
    is not a label."""
    place = "."
    if path.parent.name == "annotations":
        place = f"../{path.stem.removeprefix('instances_')}"
    return [(f"{place}/{file}", marks) for file, marks in coco_marks(path).items()]


def voc_rows(path):
    """VOC's XML; a label seen only on objects marked difficult is ignored"""
    yield path.stem, voc_marks(path)


def folder_rows(photo):
    """A folder of photos for each label"""
    yield photo.name, {photo.parent.name: 1}


FORMS = (  # what reads the rows (file, {label: 1 or -1}) of a label file, and where such files are
    (read_table, "labels.csv"),
    (json_rows, "labels.json"),
    (read_table, "metadata.csv"),
    (jsonl_rows, "metadata.jsonl", "*/metadata.jsonl"),
    (coco_rows, "annotations.json", "_annotations.coco.json", "*/annotations.json", "*/_annotations.coco.json",
     "annotations/instances_*.json"),
    (voc_rows, "**/*.xml", *[f"ImageSets/Main/{part}.txt" for part in ("train", "val", "trainval", "test")]),
)


def photos_under(base):
    """Photos under a folder, at any depth, hidden ones left out -> sorted Paths"""
    return [path for path in files_under(base) if path.suffix.lower() in data.PHOTO_SUFFIXES]


def label_files(base):
    """The user's own label files -> (function that reads them, from FORMS or folder_rows; their Paths, [] if none)"""
    for rows_of, *patterns in FORMS:
        files = sorted(path for pattern in patterns for path in base.glob(pattern))
        if files:
            return rows_of, files
    photos = photos_under(base)
    folders = {photo.parent for photo in photos}
    names = {folder.name for folder in folders}
    if len(names) == 1 or base in folders or all(map(part_of, names)) or any(base.glob("*/labels.*")):
        photos = []  # the folders are not labels
    return folder_rows, photos


def own_table(base, known):
    """The user's own labels, of all splits -> data.Table. known: see data.load_photos. Raises UsageError."""
    rows_of, files = label_files(base)
    if not files:
        find_files(base, (), "labels.csv", "labels.json")  # raises MissingFile
    if rows_of is read_table:
        return read_table(files[0], known=known)
    rows = []
    lists = {}
    for path in files:
        if path.suffix == ".txt":
            lists[path.stem] = set(read_text(path, "image list").split())
            continue
        place = path.parent.relative_to(base)
        with reading(path, "labels", "docs/datasets.md shows the form"):
            for file, marks in rows_of(path):
                marks = {clean_name(name, path): mark for name, mark in marks.items()}
                rows.append((str(place / file), marks, ""))
    if "val" in lists:
        lists.pop("trainval", None)
    if lists:
        rows = [(file, marks, name) for file, marks, _ in rows for name in lists if Path(file).name in lists[name]]
    return table_of(rows, base)


def key_of(file):
    """The form in which photos' names are compared: composed, in lower case, "_" for "&", some folders left out."""
    return re.sub("(?<![^/])(images|jpegimages|annotations)/", "", fold(file).replace("&", "_"))


def find_photos(base, files):
    """Files as people write them, perhaps without a suffix -> Paths; base / file if none is found. Raises UsageError if
    a name fits two photos."""
    photos = [base / file for file in files]
    if all(map(isfile, photos)):
        return photos
    known = {}
    for photo in photos_under(base):
        key = key_of(photo.relative_to(base).as_posix())
        for name in (key, splitext(key)[0]):
            known.setdefault(name, []).append(photo)
    for row, file in enumerate(files):
        if not isfile(base / file):
            photos[row], *others = known.get(key_of(file), [base / file])
            if others:
                raise UsageError(f"{base}: '{file}' may be {photos[row]} or {others[0]}; write the whole name")
    return photos


def folder(root, split, split_seed=0, known=()):
    """The user's own photos and labels. The split is that of the table or lists, or of folders train and test;
    validation photos are trained on, or are the test photos where there are none. split_seed: draws 80 / 20 % where
    there is no split; known: see data.load_photos."""
    base = Path(root)
    table = own_table(base, known)
    files = [normpath(file.replace("\\", "/")) for file in table.files]
    photos = find_photos(base, files)
    folders = [key_of(file).split("/")[0] for file in files]
    words = table.splits
    if not any(words) and len(set(folders)) > 1:  # a single folder is no split
        words = folders
    parts = list(map(part_of, words))
    if None in parts:
        if any(table.splits):
            raise UsageError(f"{base}: the column split must say train or test, not '{words[parts.index(None)]}'")
    elif "val" in parts:
        joined = "train" if "test" in parts else "test"
        say_once(f"{base}: validation photos join {joined}")
        parts = [joined if part == "val" else part for part in parts]
    row_of = {}
    for row, photo in enumerate(photos):
        first = row_of.setdefault(photo, row)
        if parts[row] != parts[first] or (table.labels[row] != table.labels[first]).any():
            raise UsageError(f"{base}, row of {files[row]}: stands twice with other labels or in two parts; keep one")
    rows = np.array(list(row_of.values()))
    if None in parts:
        policy = f"80/20 by seed {split_seed}"
        rows = rows[shared_out(len(rows), split_seed, train=0.8, test=0.2)[split]]
    else:
        policy = "its own split"
        rows = [row for row in rows if parts[row] == split]
    if not len(rows):
        raise UsageError(f"{base}: no photo is in the {split} part; add photos, or a column split to labels.csv")
    return LabelledPhotos(photos, table.labels, policy, names=table.names).at(rows)


VALIDATION = {"validation": ("train", "drop")}
UNLABELLED = {"unlabelled": ("keep", "drop")}
PARTITION = {"partition": ("0", "1", "2", "3", "4")}
SPLIT_SEED = {"split_seed": int}

# files: the tree that is expected under --data-root; source: where to get it, with <root> for --data-root;
# policies: {keyword argument of the reader: its values, the default first, or int for any whole number}
READERS = {
    "voc2007": {
        "reader": voc2007,
        "files": "VOCdevkit/VOC2007/{JPEGImages/*.jpg, Annotations/*.xml, ImageSets/Main/{trainval,test}.txt}",
        "source": "python -c \"import embed; embed.download_voc2007('<root>')\" fetches it (870 MB, checked); or "
                  "unpack in <root> VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar of "
                  "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
        "policies": {"difficult": ("ignore", "negative", "positive")}},
    "coco2014": {
        "reader": coco2014,
        "files": "coco2014/{annotations/instances_{train,val}2014.json, train2014/*.jpg, val2014/*.jpg} "
                 "(or the same with 2017)",
        "source": "unpack train2014, val2014, annotations_trainval2014 of https://cocodataset.org/#download in "
                  "<root>/coco2014",
        "policies": UNLABELLED},
    "nuswide": {
        "reader": nuswide,
        "files": "nuswide/{ImageList/*Imagelist.txt, TrainTestLabels/Labels_<concept>_{Train,Test}.txt, "
                 "Flickr/<folder>/*.jpg}",
        "source": "unpack ImageList.zip and Groundtruth.zip in <root>/nuswide, ask its owners for the photos, put them "
                  "into Flickr; https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html",
        "policies": UNLABELLED},
    "pa100k": {
        "reader": pa100k,
        "files": "pa100k/{annotation.mat, release_data/*.jpg}",
        "source": "fetch both from https://github.com/xh-liu/HydraPlus-Net and unpack them in <root>/pa100k",
        "policies": VALIDATION},
    "rapv1": {
        "reader": rapv1,
        "files": "rapv1/{RAP_annotation.mat, RAP_dataset/*.png}",
        "source": "ask its owners, https://www.rapdataset.com, for RAP_annotation and RAP_dataset; unpack both in "
                  "<root>/rapv1",
        "policies": PARTITION | {"unknown": ("absent", "ignored")}},
    "peta": {
        "reader": peta,
        "files": "peta/{PETA.mat, images/00001.png ... 19000.png}",
        "source": "PETA-New.zip, linked by https://github.com/dangweili/pedestrian-attribute-recognition-pytorch (the "
                  "owners' own photos, http://mmlab.ie.cuhk.edu.hk/projects/PETA.html, are not numbered like that); "
                  "unpack it in <root>/peta",
        "policies": PARTITION | VALIDATION},
    "multiscene": {
        "reader": multiscene,
        "files": "multiscene/{MultiScene-Clean/{Tra,Test}.csv, images/*.jpg}",
        "source": "unpack the photos and MultiScene-Clean of https://multiscene.github.io in <root>/multiscene",
        "policies": {}},
    "mlrsnet": {
        "reader": mlrsnet,
        "files": "mlrsnet/{Images/<category>/*.jpg, Labels/<category>.csv}",
        "source": "https://data.mendeley.com/datasets/7j9bv9vwsx/3; unpack all 46 categories, a folder and a CSV each",
        "policies": VALIDATION | SPLIT_SEED},
    "ucm": {
        "reader": ucm,
        "files": "ucm/{LandUse_Multilabeled.txt, Images/<category>/*.tif}",
        "source": "unpack UCMerced_LandUse.zip of http://weegee.vision.ucmerced.edu/datasets/landuse.html and "
                  "multilabels.zip of https://bigearth.eu/datasets.html in <root>/ucm (their own folders are "
                  "found too)",
        "policies": SPLIT_SEED},
    "folder": {
        "reader": folder,
        "files": "{labels.csv, labels.json, metadata.jsonl, COCO's annotations.json or VOC's *.xml; photos}",
        "source": "labels.csv: a column of file names, then a column of 0 and 1 for each label, or one column of "
                  "labels (dog;cat), and perhaps a column \"split\" of train and test; labels.json: {\"photo.jpg\": "
                  "[\"dog\", \"cat\"], ...}; or a folder of photos for each label; docs/datasets.md shows all forms",
        "policies": SPLIT_SEED},
}


def policies_of(dataset):
    """The values of --policy that a dataset takes, "NAME=VALUE" each; N stands for a whole number. -> list of str"""
    if dataset == "scenes":
        return []
    words = []
    for name, values in READERS[dataset]["policies"].items():
        if values is int:
            values = ["N"]
        words += [f"{name}={value}" for value in values]
    return words


def parse_policy(dataset, words):
    """Words "NAME=VALUE" -> keyword arguments of the dataset's reader. Raises UsageError for words it does not take."""
    known = policies_of(dataset)
    policies = {}
    for word in words:
        name, _, value = word.partition("=")
        is_number = f"{name}=N" in known
        if not (value.isdecimal() if is_number else word in known):
            raise UsageError(f"--policy {word}: {dataset} takes {', '.join(known) or 'none'}")
        policies[name] = int(value) if is_number else value
    return policies


def load_photos(dataset, root, split, count, policy, known=()):
    """See data.load_photos."""
    policies = parse_policy(dataset, policy)
    if dataset == "folder":
        policies["known"] = known
    if dataset == "scenes":
        total = {"train": 20000, "test": 2000}[split]
        photos = [(split, index) for index in drawn(total, count).tolist()]
        labels = np.array([scenes.labels_of(*photo) for photo in photos], np.int8)
        return LabelledPhotos(photos, labels, "all things drawn are labelled, hidden ones too", [], scenes.NAMES)
    entry = READERS[dataset]
    try:
        with reading(root, "label files under", "fetch them again"):
            found = entry["reader"](root, split, **policies)
        there = [isfile(photo) for photo in found.photos]
        if not any(there):
            raise MissingFile(f"none of its {len(there):,} photos exists (first: {[*found.photos, '-'][0]})")
    except UsageError as error:
        message = f"{dataset}: {error}"
        if isinstance(error, MissingFile):
            message += f"; expected {root}/{entry['files']}; {entry['source'].replace('<root>', str(root))}"
        raise UsageError(message) from None
    if not all(there):
        first = found.photos[there.index(False)]
        found.doubts.append(f"{there.count(False):,} of {len(there):,} photos missing, left out (first: {first})")
    for doubt in found.doubts:
        say_once(f"{dataset}: {doubt}")
    found.policy = "; ".join([found.policy, *found.doubts])
    found.names = found.names or label_names(dataset)
    rows = np.flatnonzero(there)
    return found.at(rows[drawn(len(rows), count)])


# --- python datasets.py --check ---------------------------------------------------------------------------------------

# {dataset, perhaps with a policy or its test photos' folder: [training photos, test photos], as the owners count them}
PUBLISHED = read_json(ASSETS / "labels/published.json", "published counts")


def look_over(split, found, expected):
    """Print the counts of one split beside the published ones -> list of what looks wrong, a line each."""
    count = len(found.photos)
    present = found.labels == 1
    print(f"{split:<6}{count:>9,} photos (published: {expected or 'not stated'}), {present.sum():,} positives, "
          f"{(found.labels == -1).sum():,} ignored, {(~present.any(1)).sum():,} photos without a label; {found.policy}")
    wrong = list(found.doubts)
    if expected not in (None, count):
        wrong.append(f"{count:,} photos, {expected:,} published")
    unseen = ", ".join(name for name, seen in zip(found.names, present.any(0), strict=True) if not seen)
    if unseen:
        wrong.append(f"no photo with {unseen:.200}")
    for row in drawn(count, 20):
        try:
            open_photo(found.photos[row])
        except Exception as error:  # Pillow raises many kinds
            wrong.append(f"{found.photos[row]} cannot be read ({error})")
    return [f"{split}: {line}" for line in wrong]


def check(dataset, root, policy=()):
    """Print the counts of a dataset beside the published ones -> list of what looks wrong. Raises UsageError if there
    is no data."""
    train = load_photos(dataset, root, "train", None, policy)
    test = load_photos(dataset, root, "test", None, policy)
    expected = PUBLISHED.get(dataset, (None, None))
    for word in (*policy, test.photos[0].parent.name):
        expected = PUBLISHED.get(f"{dataset} {word}", expected)
    wrong = look_over("train", train, expected[0]) + look_over("test", test, expected[1])
    both = set(train.photos) & set(test.photos)
    if both:
        wrong.append(f"{len(both):,} photos are in both parts (first: {min(both)})")
    if dataset == "folder":
        spare = set(list_photos(root)) - {*train.photos, *test.photos}
        if spare:
            wrong.append(f"{len(spare):,} photos of the folder without labels (first: {min(spare)})")
    print(f"\n{f'{len(train.names)} labels, positives':<42}{'train':>9}{'test':>9}")
    counts = [(found.labels == 1).sum(0) for found in (train, test)]
    for row in zip(train.names, *counts, strict=True):
        print("{:<42.40}{:>9,}{:>9,}".format(*row))
    return wrong


def main(words=None):
    """The command line -> exit code: 2 if something is missing or looks wrong, else 0."""
    known = "; ".join(f"{dataset}: {', '.join(policies_of(dataset)) or 'none'}" for dataset in READERS)
    parser = argparse.ArgumentParser(description="Count a dataset and look for errors.", epilog=f"policies: {known}")
    parser.add_argument("--check", required=True, choices=READERS, help="the dataset")
    parser.add_argument("--data-root", default="data", metavar="D", help="folder of datasets (default: %(default)s)")
    parser.add_argument("--policy", nargs="+", default=[], metavar="NAME=VALUE", help="how doubtful labels are treated")
    options = parser.parse_args(words)
    try:
        wrong = check(options.check, options.data_root, options.policy)
    except UsageError as error:
        say(f"datasets.py: {error}")
        return 2
    for line in wrong:
        say(f"wrong? {line}")
    if wrong:
        return 2
    print("\nnothing wrong was found", flush=True)
    return 0


if __name__ == "__main__":
    data.speak_utf8()
    try:
        sys.exit(main())
    except BrokenPipeError:  # head has seen enough
        os._exit(0)
