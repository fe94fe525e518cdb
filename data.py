"""Label sets, datasets, texts, CLIP and cached embeddings. Knows no method.

N photos or texts, C labels, D width of CLIP's joint space. Labels are int8 [N, C]: 1 present, 0 absent, -1 ignored.
Everything a person can get wrong raises UsageError, one line that names the thing and what to do; the scripts print it and exit with 2.

>>> import data
>>> clip = data.load_clip("scenes")
>>> data.embed_texts(clip, ["a photo of a boat.", "a red car in the snow"]).shape
torch.Size([2, 96])
"""
import argparse
import csv
import difflib
import gzip
import hashlib
import inspect
import json
import math
import os
import re
import sys
import unicodedata
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import scenes

HERE = Path(__file__).parent
ASSETS = HERE / "assets"
WEIGHTS = HERE / "weights"  # where weights fetched by hand may be put: weights/<backbone>.<tag>.safetensors (or .pt, .bin)
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class UsageError(Exception):
    """A person's mistake or missing data. The message is one line: what is wrong, and what to do."""


def say(message):
    """One line for the person at the terminal. Stderr, so that stdout holds results only."""
    print(message, file=sys.stderr, flush=True)


# --- files ------------------------------------------------------------------------------------------------------------

def write_atomically(path, content):
    """Write str or bytes so that the path holds the old content or the new, never a part. Raises UsageError if it cannot."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        if partial.is_file():
            partial.unlink()
        remedy = "a file is in the way: remove or rename it" if isinstance(error, (FileExistsError, NotADirectoryError)) else "free some space or choose another folder"
        raise UsageError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None


def write_json(path, value):
    """Strict JSON: nan becomes null."""
    def strict(v):
        if isinstance(v, dict):
            return {str(k): strict(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [strict(x) for x in v]
        return None if isinstance(v, float) and not np.isfinite(v) else str(v) if isinstance(v, Path) else v
    write_atomically(path, json.dumps(strict(value), indent=1, allow_nan=False) + "\n")


def read_text(path, what):
    """The text of a UTF-8 file, or of its gzip. Raises UsageError that names the file and what it was to be."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{what} {path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{what} {path}: cannot be read ({error})") from None


def read_json(path, what):
    try:
        return json.loads(read_text(path, what))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{what} {path}: not valid JSON ({error})") from None


# --- labels and texts -------------------------------------------------------------------------------------------------

def fold(text):
    """What texts and names are compared by: composed characters, straight apostrophes, no upper case."""
    return unicodedata.normalize("NFC", text).replace("’", "'").casefold()


def plain(phrase):
    """fold, and hyphens and runs of spaces are all one space."""
    return re.sub(r"[\s-]+", " ", fold(phrase)).strip()


def check_names(names, source):
    """Label names must be there, distinct (case and hyphens aside), at most 200 characters, and without control characters, line separators or marks
    that turn the writing direction around. Raises UsageError."""
    seen = {}
    for number, name in enumerate(names, 1):
        key = plain(name) or name
        if key in seen:
            raise UsageError(f"{source}: label '{name}' stands twice (entries {seen[key]} and {number}); remove one")
        if len(name) > 200:
            raise UsageError(f"{source}: entry {number} is not a label name, it has {len(name):,} characters: {name[:40]!r} ...")
        odd = next((c for c in name if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"), None)
        if odd or not any(c.isalnum() or unicodedata.category(c) == "So" for c in name):
            raise UsageError(f"{source}: entry {number} is not a label name, it has {f'the control character U+{ord(odd):04X}' if odd else 'no letter'}: {ascii(name[:40])}")
        seen[key] = number
    if not names:
        raise UsageError(f"{source}: holds no label; write one name a line")
    return names


def read_labels(path):
    """A label file, one name a line (UTF-8, blank lines skipped) -> list of str. Raises UsageError: missing, empty, duplicates."""
    names = check_names([line.strip() for line in read_text(path, "label file").split("\n") if line.strip()], f"label file {path}")
    odd = [name for name in names if name[0] in "#-*" or "," in name]
    if odd:
        say(f"{path}: '{odd[0]}' is taken as a label, word by word; one name a line, without marks and commas")
    return names


def synonyms_of(names, dataset=None):
    """{name: [other words for it]}, from assets/labels/<dataset>.json or the scenes grammar. The key "" holds phrases that look like a
    label but are none ("hot dog"). Names without an entry have no synonyms."""
    path = ASSETS / "labels" / f"{dataset}.json"
    table = read_json(path, "synonyms") if path.is_file() else {}
    if dataset == "scenes":
        table = {"": ["at home"], **{name: list(thing.words[1:]) for name, thing in scenes.THINGS.items()}}
    return {"": table.get("", []), **{name: table.get(name, []) for name in names}}


IRREGULAR = {"man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice", "goose": "geese", "foot": "feet", "tooth": "teeth", "ox": "oxen"}


def _plurals(words):
    """Regular plurals of a noun phrase, or the irregular one."""
    *before, last = words.split(" ")
    if last in IRREGULAR:
        return [" ".join([*before, IRREGULAR[last]])]
    if re.search("[^aeiou]y$", words):
        return [words + "s", words[:-1] + "ies"]
    if re.search("fe?$", words):
        return [words + "s", re.sub("fe?$", "ves", words)]
    return [words + "s", words + "es"] if re.search("(s|x|z|ch|sh|o)$", words) else [words + "s"]


def noun_finder(names, synonyms=None):
    """find(text) -> [(label's column, or None for a phrase that is no label; start; end)], places in fold(text).

    A label is named where its name, a synonym, or the plural of one stands as whole words; a name goes before a synonym, and both before
    plurals. The longest phrase wins, so that "hot dog" is no dog where "hot dog" is known. -> function
    """
    synonyms = synonyms or {}
    phrases = [*enumerate(map(plain, names)), *((c, plain(word)) for c, name in enumerate(names) for word in synonyms.get(name, [])), *((None, plain(word)) for word in synonyms.get("", []))]
    table = {}
    for column, phrase in [*phrases, *((column, plural) for column, phrase in phrases for plural in _plurals(phrase))]:
        table.setdefault(phrase, column)
    longest_first = sorted(table, key=len, reverse=True)
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(r"[\s-]+".join(map(re.escape, form.split(" "))) for form in longest_first) + r")(?!\w)")
    return lambda text: [(table[plain(match.group())], *match.span()) for match in pattern.finditer(fold(text))]


def match_nouns(texts, names, synonyms=None):
    """Labels of sentences by the words in them, as noun_finder finds them (field: TaI-DPT and its followers). -> int8 [N, C]"""
    find = noun_finder(names, synonyms)
    labels = np.zeros((len(texts), len(names)), np.int8)
    for row, text in enumerate(texts):
        labels[row, [column for column, _, _ in find(text) if column is not None]] = 1
    return labels


def read_texts(path, names):
    """Training texts from JSON lines {"text": str, "labels": [names]}, plain or gzip -> (list of str, int8 [N, C]).

    A text with an empty label list is skipped and counted. Raises UsageError, with the line number, for a line of another form or a
    label that is not among names (nothing is dropped silently: it would turn a present label into an absent one).
    """
    column = {name: index for index, name in enumerate(names)}
    texts, rows, unlabelled = [], [], []
    for number, line in enumerate(read_text(path, "text file").split("\n"), 1):  # splitlines would cut at U+2028 too
        if not line.strip():
            continue
        where = f"text file {path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            raise UsageError(f"{where}: not valid JSON; each line must be {{\"text\": ..., \"labels\": [...]}}") from None
        if not (isinstance(entry, dict) and isinstance(entry.get("text"), str) and isinstance(entry.get("labels"), list)):
            raise UsageError(f"{where}: must be {{\"text\": ..., \"labels\": [...]}}")
        if not entry["labels"] or not entry["text"].strip():
            unlabelled.append(number)
            continue
        for label in entry["labels"]:
            if not isinstance(label, str) or label not in column:
                near = difflib.get_close_matches(str(label), names, 1)
                raise UsageError(f"{where}: label '{label}' is not in the label list{f' (did you mean {near[0]}?)' if near else ''}; "
                                 "use the label file that the texts were made for")
        texts.append(entry["text"].strip())
        rows.append([column[label] for label in entry["labels"]])
    if unlabelled:
        say(f"{path}: {len(unlabelled)} texts without labels skipped (first: line {unlabelled[0]})")
    if not texts:
        raise UsageError(f"text file {path}: no usable text; each line must be {{\"text\": ..., \"labels\": [...]}}")
    labels = np.zeros((len(texts), len(names)), np.int8)
    for row, columns in enumerate(rows):
        labels[row, columns] = 1
    return texts, labels


def read_captions(path, names, synonyms=None):
    """Training texts from captions: COCO's captions_*.json, or one caption a line; labels by match_nouns; captions that name no label
    are left out. -> (list of str, int8 [N, C]). Raises UsageError if none is left."""
    if str(path).removesuffix(".gz").endswith(".json"):
        content = read_json(path, "caption file")
        try:
            texts = [entry["caption"].strip() for entry in content["annotations"]]
        except (TypeError, KeyError, AttributeError):
            raise UsageError(f"caption file {path}: not COCO's caption form (no annotations with a caption each)") from None
    else:
        texts = [line.strip() for line in read_text(path, "caption file").splitlines() if line.strip()]
    labels = match_nouns(texts, names, synonyms)
    named = labels.any(1)
    if not named.any():
        raise UsageError(f"caption file {path}: none of its {len(texts)} captions names one of the {len(names)} labels; check the label names")
    say(f"{path}: {int(named.sum())} of {len(texts)} captions name a label")
    return [text for text, keep in zip(texts, named) if keep], labels[named]


def read_descriptions(path, names):
    """What each label looks like, one sentence a label: {"descriptions": {name: sentence}} or the inner table alone -> {name: sentence}

    Missing and empty ones are left out and named once (the caller falls back to its template), names that are no label are named once.
    Raises UsageError for a file of another form, or one that describes none of the labels.
    """
    content = read_json(path, "description file")
    table = content.get("descriptions", content) if isinstance(content, dict) else None
    if not isinstance(table, dict) or not all(isinstance(v, str) for name, v in table.items() if name in names):
        raise UsageError(f'description file {path}: must be {{"descriptions": {{label: sentence, ...}}}}')
    found = {name: " ".join(table[name].split()) for name in names if table.get(name, "").strip()}
    if not found:
        raise UsageError(f"description file {path}: describes none of the {len(names)} labels ({', '.join(names[:5])}, ...); check the label names")
    missing, extra = [name for name in names if name not in found], [str(name) for name in table if name not in names]
    if missing:
        say(f"{path}: no description of {', '.join(missing[:10])}{' ...' if len(missing) > 10 else ''} ({len(missing)} of {len(names)} labels); the template stands alone there")
    if extra:
        say(f"{path}: {len(extra)} descriptions of other labels not used ({', '.join(extra[:5])}{' ...' if len(extra) > 5 else ''})")
    return found


def template_texts(names, count, seed):
    """Plain sentences for label sets of 1 to 5 names, every label as often as any other in first place. No language model wrote
    them: they let the tagger run when no text file is given. -> (list of str, int8 [count, C])"""
    rng = np.random.default_rng(seed)
    openers = ("a photo of", "a picture of", "there is", "we see", "a photo with", "here is")
    texts, labels = [], np.zeros((count, len(names)), np.int8)
    for row in range(count):
        if row % len(names) == 0:
            order = rng.permutation(len(names))
        first = int(order[row % len(names)])
        extra = rng.permutation(len(names))[:int(rng.integers(0, min(5, len(names))))]
        chosen = [first] + [int(label) for label in extra if label != first]
        words = [("an " if names[label][0].lower() in "aeiou" else "a ") + names[label] for label in chosen]
        joined = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
        texts.append(f"{openers[int(rng.integers(len(openers)))]} {joined}.")
        labels[row, chosen] = 1
    return texts, labels


# --- photos and datasets ----------------------------------------------------------------------------------------------

def default_texts(dataset, names, count):
    """Texts for when the person brings none -> (list of str, int8 [N, C], what they are). The scenes grammar where it knows every label,
    template sentences elsewhere."""
    if dataset == "scenes" and set(names) <= set(scenes.NAMES):
        texts, labels = scenes.sentences(count, 0)
        labels = labels[:, [scenes.NAMES.index(name) for name in names]].astype(np.int8)
        return [text for text, row in zip(texts, labels) if row.any()], labels[labels.any(1)], "sentences of the scenes grammar"
    say(f"no --texts or --captions: training on {count} template sentences (written by a fixed pattern, not by a language model)")
    return *template_texts(names, count, 0), "template sentences"


class LabelledPhotos(NamedTuple):
    photos: list        # paths, or (split, index) for pictures of scenes
    labels: np.ndarray  # int8 [N, C]
    names: list         # C label names, readable ("dining table")
    policy: str         # how doubtful labels were treated, for the record


def list_photos(path):
    """Photos under a folder (any depth, hidden ones left out), or the one file -> sorted list of Path. Raises UsageError if none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"photos {path}: no such file or folder")
    photos = sorted(p for p in path.rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES and p.is_file()
                    and not any(part.startswith(".") for part in p.relative_to(path).parts))
    if not photos:
        raise UsageError(f"photos {path}: no photo in this folder (looked for {' '.join(PHOTO_SUFFIXES)})")
    return photos


def open_photo(photo):
    """Path or scenes' (split, index) -> PIL RGB, turned upright by its EXIF mark. Raises OSError or ValueError if unreadable."""
    if isinstance(photo, tuple):
        return scenes.picture(*photo)[0]
    with Image.open(photo) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


# --- datasets: the files as their owners publish them --------------------------------------------------------------------

VOC_NAMES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog", "horse",
             "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"]
RAW_NAMES = {"voc2007": {name.replace(" ", ""): name for name in VOC_NAMES}, **json.loads((ASSETS / "labels" / "names.json").read_text(encoding="utf-8"))}  # a file's own label -> words for a prompt
DATASET_NAMES = {"scenes": scenes.NAMES, **{dataset: list(table.values()) for dataset, table in RAW_NAMES.items()}}
SCENES = {"train": 20000, "test": 2000}  # pictures a split
EXPECTED = {  # the tree that is looked for under the folder given, and who publishes it; <root> stands for that folder
    "voc2007": ("VOCdevkit/VOC2007/{JPEGImages/*.jpg, Annotations/*.xml, ImageSets/Main/{trainval,test}.txt}",
                "add --download (about 870 MB, hash-checked), or fetch VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2007/ and unpack both in <root>"),
    "coco2014": ("coco2014/{annotations/instances_{train,val}2014.json, train2014/*.jpg, val2014/*.jpg} (or the same with 2017)",
                 "fetch train2014.zip, val2014.zip and annotations_trainval2014.zip from https://cocodataset.org/#download and unpack all three in <root>/coco2014"),
    "nuswide": ("nuswide/{Concepts81.txt, ImageList/{Train,Test}Imagelist.txt, TrainTestLabels/Labels_<concept>_{Train,Test}.txt, Flickr/<folder>/*.jpg}",
                "fetch ConceptsList.zip, ImageList.zip and Groundtruth.zip from https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html and unpack them in <root>/nuswide (their own folders are found too); "
                "the photos, to be asked for there, go under <root>/nuswide/Flickr as the image list names them"),
    "pa100k": ("pa100k/{annotation.mat, release_data/*.jpg}", "fetch both from https://github.com/xh-liu/HydraPlus-Net and unpack them in <root>/pa100k"),
    "rapv1": ("rapv1/{RAP_annotation.mat, RAP_dataset/*.png}", "ask its owners for RAP_annotation and RAP_dataset, https://www.rapdataset.com, and unpack both in <root>/rapv1"),
    "peta": ("peta/{PETA.mat, images/00001.png ... 19000.png}",
             "the owners' photos (http://mmlab.ie.cuhk.edu.hk/projects/PETA.html) lie in ten folders; https://github.com/dangweili/pedestrian-attribute-recognition-pytorch links PETA.mat with the photos renumbered as it counts them (PETA-New.zip): unpack it in <root>/peta"),
    "multiscene": ("multiscene/{train.csv, test.csv, images/*} (each CSV: a column of file names, then 36 columns of 0 and 1 headed by the labels' names)",
                   "fetch MultiScene-Clean from https://multiscene.github.io, put all its photos in images and write the labels of each part into a CSV; the labels are " + ", ".join(RAW_NAMES["multiscene"])),
    "mlrsnet": ("mlrsnet/{Images/<category>/*.jpg, Labels/<category>.csv}", "fetch it from https://data.mendeley.com/datasets/7j9bv9vwsx/3 and unpack the archives of all 46 categories: a folder each in Images, a CSV each in Labels"),
    "ucm": ("ucm/{LandUse_Multilabeled.txt, Images/<category>/*.tif}",
            "fetch UCMerced_LandUse.zip from http://weegee.vision.ucmerced.edu/datasets/landuse.html and multilabels.zip from https://bigearth.eu/datasets.html and unpack both in <root>/ucm (their own folders are found too)"),
    "folder": ("{labels.csv or labels.json, photos}", 'labels.csv: a column of file names, then a column of 0 and 1 a label (first line: the names of the columns), and if wanted a column "split" of train and test; '
               'labels.json: {"photo.jpg": ["dog", "cat"], ...}; file names with their ending, and with their folder where they lie in one')}


class MissingData(UsageError):
    """Files of a dataset are not there; load_photos adds the tree expected and who publishes it."""


def _base(dataset, root, folders, marker):
    """The first of root/<folder> that holds one of the marker files. Raises MissingData, which names one that lies deeper."""
    markers = (marker,) if isinstance(marker, str) else marker
    for folder in (*folders, "."):
        if any((Path(root) / folder / name).exists() for name in markers):
            return Path(root) / folder
    if not Path(root).is_dir():
        raise MissingData(f"{dataset}: there is no folder {root}")
    wanted, hint = " or ".join(markers[:2]), ""
    for pattern, folder, name in [(f"{depth}/{folder}/{name}", folder, name) for depth in ("*", "*/*") for folder in (*folders, ".") for name in markers] + [
            (f"{folder}/{depth}/{name}", ".", name) for depth in ("*", "*/*") for folder in folders for name in markers]:
        if found := next(iter(sorted(Path(root).glob(pattern))), None):
            up = found.parents[len(Path(folder, name).parts) - 1]
            hint = f" where it is looked for, but there is {found}: " + (f"pass --data-root {up}" if folder != "." or not folders else f"move what is in {up} to {Path(root) / folders[0]}")
            break
    raise MissingData(f"{dataset}: no {wanted} under {root}{hint}")


def _labelled(dataset, photos, labels, policy, unlabelled="keep", names=None):
    """Drop photos that are not there (counted and named) and, if asked, those without any label -> LabelledPhotos"""
    there = np.array([path.is_file() for path in photos], bool)
    if not there.any():
        if not photos:
            raise UsageError(f"{dataset}: its files list no photo; fetch them again")
        other = next((path for folder in (photos[0].parent, photos[0].parent.parent) for path in folder.glob(f"*/{photos[0].name}")), None)
        raise MissingData(f"{dataset}: the labels are there, but none of the {len(photos):,} photos that they name (first: {photos[0]}" + (f"; one of that name is {other}" if other else "") + ")")
    if not there.all():
        gone = np.flatnonzero(~there)
        say(f"{dataset}: {len(gone):,} of {len(photos):,} photos are missing and left out (first: {photos[gone[0]]})")
        policy += f"; {len(gone)} missing photos left out"
    keep = there & (labels == 1).any(1) if unlabelled == "drop" else there
    if not keep.any():
        raise UsageError(f"{dataset}: no photo with a label is left")
    return LabelledPhotos([photos[row] for row in np.flatnonzero(keep)], labels[keep], list(names or DATASET_NAMES[dataset]), policy)


def voc2007(root, split, difficult="ignore"):
    """PASCAL VOC2007 in its official layout. split: "train" (trainval) or "test".

    difficult: what a label seen only on objects marked difficult becomes: "ignore" (-1; the devkit's rule), "negative" (0; TaI-DPT,
    DualCoOp) or "positive" (1; TagCLIP). Raises UsageError if files are missing, with the tree expected.
    """
    base = _base("voc2007", root, ("VOCdevkit/VOC2007", "VOC2007"), "ImageSets/Main")
    image_list = base / "ImageSets" / "Main" / f"{'trainval' if split == 'train' else split}.txt"
    ids = read_text(image_list, "voc2007: image list").split()
    if not ids:
        raise UsageError(f"voc2007: {image_list} is empty; unpack the archive again")
    column = {raw: index for index, raw in enumerate(RAW_NAMES["voc2007"])}
    labels = np.zeros((len(ids), len(column)), np.int8)
    for row, image_id in enumerate(ids):
        path = base / "Annotations" / f"{image_id}.xml"
        try:
            objects = ElementTree.parse(path).getroot().findall("object")
        except (OSError, ElementTree.ParseError) as error:
            raise UsageError(f"voc2007: annotation {path} cannot be read ({error}); unpack the archive again") from None
        for thing in objects:
            name = (thing.findtext("name") or "").strip()
            if name not in column:
                raise UsageError(f"voc2007: annotation {path} names '{name}', which is not one of the 20 classes")
            if thing.findtext("difficult", "0").strip() != "1":
                labels[row, column[name]] = 1
            elif labels[row, column[name]] != 1:
                labels[row, column[name]] = {"ignore": -1, "negative": 0, "positive": 1}[difficult]
    return _labelled("voc2007", [base / "JPEGImages" / f"{image_id}.jpg" for image_id in ids], labels, f"difficult={difficult}")


def coco2014(root, split, unlabelled="keep"):
    """MS-COCO, instances JSON; train and val serve as train and test; 2014 or 2017 file names. A crowd counts as present.
    unlabelled: photos without any label "keep" (40,504 in val2014) or "drop" (40,137)."""
    part = {"train": "train", "test": "val"}[split]
    base = _base("coco2014", root, ("coco2014", "coco", "COCO", "coco2017"), [f"annotations/instances_{part}{year}.json" for year in (2014, 2017)])
    year = 2014 if (base / f"annotations/instances_{part}2014.json").is_file() else 2017
    path = base / f"annotations/instances_{part}{year}.json"
    content, column = read_json(path, "coco2014: annotations"), {raw: index for index, raw in enumerate(RAW_NAMES["coco2014"])}
    try:
        category = {entry["id"]: column[entry["name"]] for entry in content["categories"]}
        row = {entry["id"]: number for number, entry in enumerate(content["images"])}
        labels = np.zeros((len(row), len(column)), np.int8)
        for entry in content["annotations"]:
            labels[row[entry["image_id"]], category[entry["category_id"]]] = 1
        photos = [base / f"{part}{year}" / entry["file_name"] for entry in content["images"]]
    except (KeyError, TypeError) as error:
        raise UsageError(f"coco2014: {path} is not COCO's instances form, or names an unknown photo or category ({error!r})") from None
    return _labelled("coco2014", photos, labels, f"{part}{year}, crowds count, unlabelled={unlabelled}", unlabelled)


def nuswide(root, split, unlabelled="keep"):
    """NUS-WIDE, the owners' split. unlabelled: "keep" (161,789 / 107,859) or "drop" (125,449 / 83,898). A value other than 0 and 1 (the
    published Labels_lake_Train.txt has one) is ignored."""
    part = {"train": "Train", "test": "Test"}[split]
    base = _base("nuswide", root, ("nuswide", "NUS-WIDE", "NUSWIDE", "nus_wide"), f"ImageList/{part}Imagelist.txt")
    files = [line.strip().replace("\\", "/") for line in read_text(base / f"ImageList/{part}Imagelist.txt", "nuswide: image list").splitlines() if line.strip()]
    concepts = next((path for path in (base / "Concepts81.txt", base / "ConceptsList/Concepts81.txt", base / "Concepts/Concepts81.txt") if path.is_file()), base / "Concepts81.txt")
    order, expected = read_text(concepts, "nuswide: concepts").split(), list(RAW_NAMES["nuswide"])
    if sorted(order) != sorted(expected):
        raise UsageError(f"nuswide: {concepts} does not hold the 81 concepts ({', '.join(sorted(set(order) ^ set(expected))[:5])})")
    folder = next((path for path in (base / "TrainTestLabels", base / "Groundtruth/TrainTestLabels", base / "GroundTruth/TrainTestLabels") if path.is_dir()), base / "TrainTestLabels")
    labels, odd = np.zeros((len(files), len(expected)), np.int8), 0
    for index, concept in enumerate(expected):
        path = folder / f"Labels_{concept}_{part}.txt"
        values = read_text(path, "nuswide: labels").split()
        if len(values) != len(files):
            raise UsageError(f"nuswide: {path} has {len(values):,} lines, the image list {len(files):,}; fetch both again")
        values = np.array(values)
        labels[:, index] = np.where(values == "1", 1, np.where(values == "0", 0, -1))
        odd += int((labels[:, index] == -1).sum())
    if odd:
        say(f"nuswide: {odd} label values other than 0 and 1 are ignored")
    photos = base / next((name for name in ("Flickr", "images", "Images") if (base / name).is_dir()), "Flickr")
    flat = not any((photos / file).is_file() for file in files[:100]) and any((photos / Path(file).name).is_file() for file in files[:100])  # mirrors without the folders of the list
    return _labelled("nuswide", [photos / (Path(file).name if flat else file) for file in files], labels, f"unlabelled={unlabelled}, {odd} odd values ignored", unlabelled)


def _mat(dataset, path):
    from scipy.io import loadmat
    try:
        return loadmat(str(path))
    except Exception as error:  # SciPy raises many kinds
        raise UsageError(f"{dataset}: {path} cannot be read as a MATLAB file ({str(error)[:120]}); fetch it again") from None


def _text(cell):
    """MATLAB's cell of a cell of text, however deep -> str"""
    while isinstance(cell, np.ndarray):
        cell = cell.flat[0] if cell.size else ""
    return str(cell)


def _columns(dataset, path, raw):
    """Columns of the dataset's labels in a file's own order of names."""
    where = {name: index for index, name in enumerate(raw)}
    missing = [name for name in RAW_NAMES[dataset] if name not in where]
    if missing:
        raise UsageError(f"{dataset}: {path} lacks the label{'s' if len(missing) > 1 else ''} {', '.join(missing[:5])}")
    return [where[name] for name in RAW_NAMES[dataset]]


def pa100k(root, split, validation="train"):
    """PA-100K, 26 attributes. validation: what becomes of the 10,000 validation photos, "train" or "drop"."""
    base = _base("pa100k", root, ("pa100k", "PA100k", "PA-100K", "PA100K"), "annotation.mat")
    content = _mat("pa100k", base / "annotation.mat")
    try:
        columns = _columns("pa100k", base / "annotation.mat", [_text(cell) for cell in content["attributes"].ravel()])
        parts = {"train": ("train", "val") if validation == "train" else ("train",), "test": ("test",)}[split]
        files = [_text(cell) for part in parts for cell in content[f"{part}_images_name"].ravel()]
        labels = np.concatenate([content[f"{part}_label"] for part in parts])[:, columns].astype(np.int8)
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"pa100k: {base / 'annotation.mat'} is not PA-100K's form ({error!r})") from None
    folder = next((path for path in (base / "release_data", base / "release_data/release_data", base / "data") if files and (path / files[0]).is_file()), base / "release_data")
    return _labelled("pa100k", [folder / file for file in files], labels, f"validation={validation}")


def rapv1(root, split, partition=0):
    """RAP 1, 51 of 92 attributes, one of the five partitions of the owners."""
    base = _base("rapv1", root, ("rapv1", "RAP", "rap", "RAPv1"), ("RAP_annotation.mat", "RAP_annotation/RAP_annotation.mat"))
    path = next(path for path in (base / "RAP_annotation.mat", base / "RAP_annotation/RAP_annotation.mat") if path.is_file())
    try:
        record = _mat("rapv1", path)["RAP_annotation"][0, 0]
        columns = _columns("rapv1", path, [_text(cell) for cell in record[3].ravel()])
        rows = record[0][partition, 0][0, 0][0 if split == "train" else 1].ravel().astype(int) - 1
        labels = (record[1][rows][:, columns] == 1).astype(np.int8)
        files = [_text(record[5].ravel()[row]) for row in rows]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise UsageError(f"rapv1: {path} is not RAP's form, or has no partition {partition} ({error!r})") from None
    return _labelled("rapv1", [base / "RAP_dataset" / file for file in files], labels, f"partition={partition}")


def peta(root, split, partition=0, validation="train"):
    """PETA, 35 of 105 attributes, one of five partitions (9,500 + 1,900 + 7,600). Value 2 means absent. validation: as for pa100k."""
    base = _base("peta", root, ("peta", "PETA"), "PETA.mat")
    try:
        record = _mat("peta", base / "PETA.mat")["peta"][0, 0]
        columns = _columns("peta", base / "PETA.mat", [_text(cell) for cell in record[1][:, 0]])
        parts = record[3][partition, 0][0, 0]
        chosen = {"train": (0, 1) if validation == "train" else (0,), "test": (2,)}[split]
        rows = np.concatenate([parts[part].ravel() for part in chosen]).astype(int) - 1
        labels = (record[0][:, 4:][rows][:, columns] == 1).astype(np.int8)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise UsageError(f"peta: {base / 'PETA.mat'} is not PETA's form, or has no partition {partition} ({error!r})") from None
    return _labelled("peta", [base / "images" / f"{row + 1:05d}.png" for row in rows], labels, f"partition={partition}, validation={validation}")


def _label_table(dataset, path, raw=None):
    """A table of 0 and 1 (-1: ignored), comma, semicolon or tab, read by its own header -> (files, raw label names, int8 [N, C], splits or None).

    The first column holds file names; a column "split" may say train or test. raw: names wanted, in that order (others are refused).
    """
    lines = read_text(path, f"{dataset}: labels").splitlines()
    rows = list(csv.reader(lines, delimiter=max(",;\t", key=lines[0].count) if lines else ","))
    rows = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise UsageError(f"{dataset}: {path} holds no photo")
    header, *body = rows
    while header and not header[-1]:
        header.pop()
    splits = header.index("split") if "split" in header[1:] else None
    if set(header[1:]) & {"0", "1", "-1"}:
        raise UsageError(f"{dataset}: {path}: the first line must name the columns, a label each")
    found = {name: index for index, name in enumerate(header) if index and index != splits}
    if raw is not None and set(found) != set(raw):
        missing, extra = sorted(set(raw) - set(found)), sorted(set(found) - set(raw))
        raise UsageError(f"{dataset}: {path}: header {'lacks ' + ', '.join(missing) if missing else ''}{' and ' if missing and extra else ''}{'has unknown ' + ', '.join(extra) if extra else ''}")
    if len(found) != len(header) - 1 - (splits is not None):
        raise UsageError(f"{dataset}: {path}: a label stands twice in the header")
    raw = list(found) if raw is None else list(raw)
    try:
        labels = np.array([[float(row[found[name]]) for name in raw] for row in body])
    except (ValueError, IndexError):
        bad, row = next((n, row) for n, row in enumerate(body, 2) if len(row) < len(header) or not all(re.fullmatch(r"-?[01](\.0*)?", row[found[name]]) for name in raw))
        raise UsageError(f"{dataset}: {path}, line {bad} ({', '.join(row)[:60]}): needs {len(header)} cells, each label 1 (present), 0 (absent) or -1 (ignored)") from None
    if not np.isin(labels, (-1, 0, 1)).all():
        raise UsageError(f"{dataset}: {path}, line {2 + int(np.flatnonzero(~np.isin(labels, (-1, 0, 1)).all(1))[0])}: each label must be 1 (present), 0 (absent) or -1 (ignored)")
    return [row[0] for row in body], raw, labels.astype(np.int8), None if splits is None else [row[splits] for row in body]


def _shared_out(count, shares, seed):
    """Rows 0..count-1 shuffled by the seed and cut at the shares (0.4, 0.1, ...; the last part takes the rest) -> list of sorted arrays"""
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(part) for part in np.split(order, np.round(np.cumsum(shares[:-1]) * count).astype(int))]


def multiscene(root, split):
    """MultiScene, the clean part, 7,000 / 7,000. The published label file's form could not be established: one CSV a split, read by its
    header; file names with or without .jpg."""
    names = {"train": ("train.csv", "Tra.csv"), "test": ("test.csv", "Test.csv")}[split]
    base = _base("multiscene", root, ("multiscene", "MultiScene-Clean", "MultiScene"), names)
    path = next(base / name for name in names if (base / name).is_file())
    files, _, labels, _ = _label_table("multiscene", path, RAW_NAMES["multiscene"])
    return _labelled("multiscene", [base / "images" / (file if Path(file).suffix else f"{file}.jpg") for file in files], labels, "clean part")


def mlrsnet(root, split, validation="train", split_seed=0):
    """MLRSNet, 60 labels; each category's CSV is read by its own header, for their column orders differ. 40 / 10 / 50 % of every category,
    drawn by split_seed (the owners' lists were not found). validation: as for pa100k."""
    base = _base("mlrsnet", root, ("mlrsnet", "MLRSNet"), ("Labels", "labels"))
    tables = sorted((base / ("Labels" if (base / "Labels").is_dir() else "labels")).glob("*.csv"))
    if not tables:
        raise MissingData(f"mlrsnet: no CSV in {base / ('Labels' if (base / 'Labels').is_dir() else 'labels')}")
    unlabelled = sorted({path.name for path in (base / "Images").glob("*") if path.is_dir()} - {path.stem for path in tables})
    if unlabelled:
        say(f"mlrsnet: no CSV for the photos of {', '.join(unlabelled)}: left out")
    photos, labels = [], []
    for path in tables:
        files, _, marks, _ = _label_table("mlrsnet", path, RAW_NAMES["mlrsnet"])
        train, held_out, test = _shared_out(len(files), (0.4, 0.1, 0.5), split_seed)
        rows = test if split == "test" else np.concatenate([train, held_out]) if validation == "train" else train
        photos += [base / "Images" / path.stem / files[row] for row in rows]
        labels.append(marks[rows])
    return _labelled("mlrsnet", photos, np.concatenate(labels), f"{len(tables)} categories, 40/10/50 % of each by seed {split_seed}, validation={validation}" + f"; {len(unlabelled)} categories without CSV left out" * bool(unlabelled))


def ucm(root, split, split_seed=0):
    """UC Merced, 17 labels, 80 / 20 by split_seed (no split is published)."""
    markers = ("LandUse_Multilabeled.txt", "multilabels/LandUse_Multilabeled.txt", "LandUse_Multilabeled.csv")
    base = _base("ucm", root, ("ucm", "UCMerced_LandUse", "UCM"), markers)
    files, _, labels, _ = _label_table("ucm", next(base / name for name in markers if (base / name).is_file()), RAW_NAMES["ucm"])
    rows = dict(zip(("train", "test"), _shared_out(len(files), (0.8, 0.2), split_seed)))[split]
    photos = next((folder for folder in (base / "Images", base / "UCMerced_LandUse/Images") if folder.is_dir()), base / "Images")
    return _labelled("ucm", [photos / re.sub(r"\d+$", "", Path(files[row]).stem) / f"{Path(files[row]).stem}.tif" for row in rows], labels[rows], f"80/20 by seed {split_seed}")


def folder(root, split, split_seed=0):
    """Your own photos: root/labels.csv or root/labels.json beside them (forms: EXPECTED). Without a column "split", 80 / 20 by split_seed."""
    base = _base("folder", root, (), ("labels.csv", "labels.json"))
    if (base / "labels.csv").is_file():
        files, names, labels, splits = _label_table("folder", base / "labels.csv")
        check_names(names, f"folder: {base / 'labels.csv'}")
    else:
        table = read_json(base / "labels.json", "folder: labels")
        if not isinstance(table, dict) or not table or not all(isinstance(v, list) and all(isinstance(x, str) for x in v) for v in table.values()):
            raise UsageError(f"folder: {base / 'labels.json'}: must be {EXPECTED['folder'][1].split('labels.json: ')[1]}")
        files, splits, names = list(table), None, check_names(sorted({label for labels in table.values() for label in labels}), f"folder: {base / 'labels.json'}")
        labels = np.array([[name in marked for name in names] for marked in table.values()], np.int8)
    if splits and not set(splits) <= {"train", "test"}:
        raise UsageError(f"folder: {base / 'labels.csv'}: the column split must say train or test, not '{sorted(set(splits) - {'train', 'test'})[0]}'")
    rows = np.array([n for n, part in enumerate(splits) if part == split]) if splits else dict(zip(("train", "test"), _shared_out(len(files), (0.8, 0.2), split_seed)))[split]
    if not len(rows):
        raise UsageError(f"folder: {base}: no photo is in the {split} part; add photos, or a column split to labels.csv")
    unread = "; labels.json left out, for labels.csv goes before it" if (base / "labels.csv").is_file() and (base / "labels.json").is_file() else ""
    return _labelled("folder", [base / files[row] for row in rows], labels[rows], ("split by its own column" if splits else f"80/20 by seed {split_seed}") + unread, names=names)


PUBLISHED = {  # photos for training and test with the policies' first values, as the owners count them; None: not stated apart; ucm: its 2,100 shared out by us
    "voc2007": (5011, 4952), "coco2014": (82783, 40504), "nuswide": (161789, 107859), "pa100k": (90000, 10000), "rapv1": (33268, 8317), "peta": (11400, 7600),
    "multiscene": (7000, 7000), "mlrsnet": (None, None), "ucm": (1680, 420)}
DROPPED = {"coco2014": (None, 40137), "nuswide": (125449, 83898), "pa100k": (80000, 10000), "peta": (9500, 7600)}  # with --unlabelled drop, --validation drop
LOADERS = {"voc2007": voc2007, "coco2014": coco2014, "nuswide": nuswide, "pa100k": pa100k, "rapv1": rapv1, "peta": peta, "multiscene": multiscene, "mlrsnet": mlrsnet, "ucm": ucm, "folder": folder}
DATASETS = ("scenes", *LOADERS)


def label_names(dataset, root):
    """Readable label names of a dataset, in the order of its labels; those of "folder" stand in its own file."""
    return list(DATASET_NAMES[dataset]) if dataset in DATASET_NAMES else load_photos("folder", root, "train").names


def folder_digest(root):
    """Identity of the labels of "folder": other labels are another run."""
    return next((hashlib.blake2b((Path(root) / name).read_bytes(), digest_size=8).hexdigest() for name in ("labels.csv", "labels.json") if (Path(root) / name).is_file()), "")


def download_voc2007(root):
    """Fetch and unpack VOC2007 trainval and test through torchvision, which checks the archives' hashes. Raises UsageError."""
    import_open_clip()  # torchvision imports only after its guard
    from torchvision.datasets import VOCDetection
    for image_set in ("trainval", "test"):
        try:
            VOCDetection(str(root), year="2007", image_set=image_set, download=True)
        except (OSError, RuntimeError) as error:
            raise UsageError(f"voc2007: download failed ({error}); fetch VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar by hand and "
                             f"unpack both under {root}") from None


def load_photos(dataset, root, split, limit=None, download=False, **policies):
    """Labelled photos of a dataset. split: "train" or "test"; limit: only the first ones; policies: those that the dataset's loader
    takes (others have no meaning there). -> LabelledPhotos"""
    if dataset == "scenes":
        count = min(limit or SCENES[split], SCENES[split])
        labels = np.stack([scenes.labels_of(split, index) for index in range(count)]).astype(np.int8)
        return LabelledPhotos([(split, index) for index in range(count)], labels, list(scenes.NAMES), "all things drawn are labelled, hidden ones too")
    sets = Path(root) / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    if download and dataset == "voc2007" and not ((sets / "trainval.txt").is_file() and (sets / "test.txt").is_file()):
        download_voc2007(root)
    if download and dataset != "voc2007":
        raise UsageError(f"--download fetches voc2007 only; {dataset}: {EXPECTED[dataset][1].replace('<root>', str(root))}")
    loader = LOADERS[dataset]
    known = inspect.signature(loader).parameters
    try:
        photos, labels, names, policy = loader(root, split, **{name: value for name, value in policies.items() if name in known})
    except UsageError as error:
        if not isinstance(error, MissingData) and not str(error).endswith("no such file"):
            raise
        tree, get = (text.replace("<root>", str(root)) for text in EXPECTED[dataset])
        raise UsageError(f"{error}; expected {Path(root)}/{tree}; {get}") from None
    return LabelledPhotos(photos[:limit], labels[:limit], names, policy)


def load_features(path):
    """Ready-made embeddings of any encoder pair, one .npz (no pickles). -> dict of float32 and int8 arrays and names

    text_embeddings [N, D], text_labels [N, C], image_embeddings [M, D], image_labels [M, C] (1, 0, -1), label_names [C],
    label_embeddings [C, D]; image_ids [M] may be there. Raises UsageError for missing arrays, wrong shapes, values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"features file {path}: no such file")
    if not zipfile.is_zipfile(path):
        raise UsageError(f"features file {path}: not a readable .npz")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except Exception as error:  # numpy raises half a dozen kinds for a damaged archive or a pickled member
        raise UsageError(f"features file {path}: not a readable .npz without pickled objects ({error})") from None
    wanted = ("text_embeddings", "text_labels", "image_embeddings", "image_labels", "label_names", "label_embeddings")
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise UsageError(f"features file {path}: lacks {', '.join(missing)}; it must hold {', '.join(wanted)}")
    names = check_names([str(name) for name in arrays["label_names"].ravel()], f"features file {path}")
    classes, width = len(names), (0, *arrays["text_embeddings"].shape)[-1]
    texts, images = ((*arrays[name].shape, 0)[0] for name in ("text_embeddings", "image_embeddings"))
    for name, shape in (("text_embeddings", (None, width)), ("text_labels", (texts, classes)), ("image_embeddings", (None, width)),
                        ("image_labels", (images, classes)), ("label_embeddings", (classes, width))):
        array = arrays[name]
        if array.ndim != 2 or any(want is not None and want != got for want, got in zip(shape, array.shape)) or not len(array):
            raise UsageError(f"features file {path}: {name} has shape {list(array.shape)}, expected [{shape[0] or 'N'}, {shape[1]}]")
        if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
            raise UsageError(f"features file {path}: {name} holds values that are not finite numbers")
        if name.endswith("_labels") and not np.isin(array, (-1, 0, 1)).all():
            raise UsageError(f"features file {path}: {name} must hold 1 (present), 0 (absent) or -1 (ignored) only")
        arrays[name] = array.astype(np.int8 if name.endswith("_labels") else np.float32)
    arrays["label_names"] = names
    return arrays


# --- CLIP -------------------------------------------------------------------------------------------------------------

_torchvision_schemas = []  # keeps the declarations below alive


def import_open_clip():
    """open_clip, also where torchvision's wheel does not fit torch's build. -> module"""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        # torchvision's PyPI wheel beside a CPU build of torch: its compiled operators are missing, and its import stops where it
        # registers a fake kernel for the first of them. Declaring the schemas is enough: nothing here calls them.
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _torchvision_schemas.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _torchvision_schemas[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip
    return open_clip


class Clip(NamedTuple):
    model: torch.nn.Module  # open_clip.model.CLIP, frozen, in eval mode
    tokenizer: object       # list of str -> int64 [N, context length]
    preprocess: object      # PIL RGB -> float32 [3, H, W]
    name: str               # for people
    key: str                # hash of architecture, weights and preprocessing, then the precision: names the cache
    known_tokens: set       # token ids with trained rows; None: all of them
    precision: str


def choose_device(gpu, cpu):
    """--gpu N, --cpu or neither -> torch.device. Raises UsageError for a GPU that is not there."""
    count = torch.cuda.device_count()
    if gpu is not None and cpu:
        raise UsageError("--gpu and --cpu exclude each other; give one")
    if gpu is not None and not 0 <= gpu < count:
        raise UsageError(f"--gpu {gpu}: this machine has {count} GPU{'' if count == 1 else 's'} that PyTorch can use; leave the flag out or add --cpu")
    if cpu or count == 0:
        if not cpu:
            say("no GPU found: running on the CPU")
        return torch.device("cpu")
    return torch.device("cuda", gpu or 0)


def _supported(config):
    """OpenAI-style ViT or ResNet tower with CLIP's causal text transformer: what both methods' formulas are written for."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    return not (config.get("custom_text") or "multimodal_cfg" in config or "timm_model_name" in vision or vision.get("attentional_pool")
                or vision.get("pool_type", "tok") != "tok" or "hf_model_name" in text or "hf_tokenizer_name" in text
                or text.get("no_causal_mask") or text.get("embed_cls") or text.get("pool_type", "argmax") != "argmax")


def _find_weights(open_clip, backbone, pretrained):
    """Local file of a backbone's weights: a path as given, weights/<backbone>.<tag>.*, the Hugging Face cache, or a fresh download."""
    if Path(pretrained).is_file():
        return Path(pretrained)
    tags = open_clip.list_pretrained_tags_by_model(backbone)
    if pretrained not in tags:
        near = difflib.get_close_matches(pretrained, tags, 3, 0.3)
        raise UsageError(f"--pretrained {pretrained}: neither a file nor weights that open_clip knows for {backbone} (it knows {', '.join(near or tags) or 'none'})")
    for path in sorted(WEIGHTS.glob(f"{backbone}.{pretrained}.*")):
        return path
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    config = open_clip.get_pretrained_cfg(backbone, pretrained)
    repository, filename = os.path.split(config.get("hf_hub", ""))
    filename = filename or "open_clip_model.safetensors"
    for candidate in (filename, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin") if repository else ():
        cached = try_to_load_from_cache(repository, candidate)
        if isinstance(cached, str):
            return Path(cached)
    url = hf_hub_url(repository, filename) if repository else config.get("url", "")
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # the host answers: open_clip may know another file name
    except (OSError, ValueError) as error:
        raise UsageError(f"weights of {backbone} ({pretrained}) are not on this machine and cannot be fetched ({getattr(error, 'reason', error)}): get {url} "
                         f"where there is network and put it at {WEIGHTS / f'{backbone}.{pretrained}{Path(filename).suffix}'}, or pass --pretrained FILE") from None
    try:
        return Path(open_clip.download_pretrained(config))
    except Exception as error:  # hub clients raise many kinds
        raise UsageError(f"weights of {backbone} ({pretrained}): download failed ({error}); get {url} by hand and pass --pretrained FILE") from None


def load_clip(backbone="scenes", pretrained=None, device="cpu", precision="fp32", resolution=None):
    """A frozen CLIP. backbone: "scenes" (the shipped tiny one) or open_clip's name; pretrained: open_clip's tag, a file, or "none" for
    random weights (seed 0); precision: fp32, bf16 or fp16 (the last two through autocast); resolution: pixels, position embeddings
    are interpolated. Raises UsageError for an unknown or unsupported backbone, and for weights that cannot be had. -> Clip
    """
    open_clip = import_open_clip()
    known_tokens = None
    if backbone == "scenes":
        config, state, known_tokens = _scenes_state(pretrained)
        if resolution:
            config["vision_cfg"]["image_size"] = resolution
        _check_resolution(config, resolution)
        model = open_clip.model.CLIP(**config)
        if state:
            open_clip.model.resize_pos_embed(state, model)
            model.load_state_dict(state)
        tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
        preprocessing = {"size": model.visual.image_size, "resize_mode": "shortest", "interpolation": "bicubic"}
        preprocess = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**preprocessing), is_train=False)
    else:
        backbone = backbone.replace("/", "-")
        supported = [name for name in open_clip.list_models() if _supported(open_clip.get_model_config(name))]
        if backbone not in open_clip.list_models():
            near = difflib.get_close_matches(backbone, supported + ["scenes"], 3, 0.4)
            raise UsageError(f"--backbone {backbone}: unknown; did you mean {', '.join(near) or 'ViT-B-16, ViT-B-32, RN50'}?")
        if backbone not in supported:
            raise UsageError(f"--backbone {backbone}: not supported; this needs an OpenAI-style ViT or ResNet with CLIP's causal text transformer (ViT-B-16, RN50, ...)")
        pretrained = pretrained or "openai"
        architecture = open_clip.get_model_config(backbone)
        _check_resolution(architecture, resolution)
        resnet = not isinstance(architecture["vision_cfg"]["layers"], int)
        path = None if pretrained == "none" else _find_weights(open_clip, backbone, pretrained)
        tag = {} if path is None else open_clip.get_pretrained_cfg(backbone, pretrained)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            logging_level = open_clip.factory.logging.getLogger().level
            open_clip.factory.logging.getLogger().setLevel("ERROR")  # open_clip warns of random weights, which were asked for
            model = open_clip.create_model(backbone, pretrained=None, load_weights=False, force_quick_gelu=bool(tag.get("quick_gelu")), force_image_size=None if resnet else resolution,
                                           force_preprocess_cfg={k: v for k, v in tag.items() if k in ("mean", "std", "interpolation", "resize_mode")} or None)
            open_clip.factory.logging.getLogger().setLevel(logging_level)
        if path is not None:
            try:
                open_clip.load_checkpoint(model, str(path), strict=True, weights_only=True)
            except Exception as error:  # a wrong file fails in many ways inside torch and safetensors
                reason = str(error).splitlines()[0][:160]
                raise UsageError(f"weights {path} do not load into {backbone} ({reason}); OpenAI's own .pt archives hold code and are refused: "
                                 "take the .safetensors that open_clip fetches") from None
            if not tag and "quickgelu" not in backbone:
                say(f"{path}: if these are OpenAI's weights, use --backbone {backbone}-quickgelu (open_clip's name for their activation)")
        preprocessing = dict(model.visual.preprocess_cfg)
        if resnet and resolution:
            _resize_attention_pool(open_clip, model.visual, resolution)
            preprocessing["size"] = (resolution, resolution)
        tokenizer = open_clip.get_tokenizer(backbone)
        preprocess = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**preprocessing), is_train=False)
    model.requires_grad_(False).eval()
    digest = hashlib.blake2b(f"{backbone} {sorted(preprocessing.items())}".encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    name = backbone if backbone == "scenes" else f"{backbone} ({pretrained})"
    return Clip(model.to(device), tokenizer, preprocess, name, f"{digest.hexdigest()}-{precision}", known_tokens, precision)


def _check_resolution(config, resolution):
    vision = config["vision_cfg"]
    step = vision["patch_size"] if isinstance(vision["layers"], int) else 32
    if resolution and (resolution < 1 or resolution % step):
        raise UsageError(f"--resolution {resolution}: must be a positive multiple of {step}, the {'patch size' if isinstance(vision['layers'], int) else 'stride of a ResNet tower'}")


def _resize_attention_pool(open_clip, visual, resolution):
    """A ResNet tower for another resolution: its attention pool's position embeddings interpolated as open_clip does it for a ViT."""
    grid = (resolution // 32, resolution // 32)
    state = {"visual.positional_embedding": visual.attnpool.positional_embedding.data}
    open_clip.model.resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
    visual.attnpool.positional_embedding = torch.nn.Parameter(state["visual.positional_embedding"])
    visual.image_size = (resolution, resolution)


def _scenes_state(pretrained):
    """Config, state dict (None for random weights) and trained token ids of the tiny CLIP."""
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in scenes.CLIP_CONFIG.items()}
    if pretrained == "none":
        return config, None, None
    path = Path(pretrained) if pretrained else scenes.CHECKPOINT
    try:
        with safe_open(str(path), "pt") as stored:
            state = {name: stored.get_tensor(name) for name in stored.keys()}
        token_ids = state.pop("token_ids")
        rows = state["token_embedding.weight"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise UsageError(f"scenes checkpoint {path}: cannot be read ({error}); make it again with python scenes.py train") from None
    state = {name: tensor.float() for name, tensor in state.items()}
    state["token_embedding.weight"] = torch.zeros(config["text_cfg"]["vocab_size"], rows.shape[1]).index_copy_(0, token_ids, rows)
    return config, state, set(token_ids.tolist())


def _autocast(clip, device):
    kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[clip.precision]
    return torch.autocast(device.type, dtype=kind, enabled=kind is not None)


# --- embeddings, cached -----------------------------------------------------------------------------------------------

def scenes_digest():
    """Identity of the built-in world: its drawing code and its CLIP's checkpoint."""
    return scenes.DIGEST + (hashlib.blake2b(scenes.CHECKPOINT.read_bytes(), digest_size=8).hexdigest() if scenes.CHECKPOINT.is_file() else "")


BLOCK = 4096  # rows a cache file; an interrupted run loses at most one of them


def _cached(cache, kind, key_parts, compute):
    """compute() -> dict of tensors, kept in <cache>/<kind>-<hash of key_parts>.safetensors. Written atomically, so two runs at once or
    a killed one leave only whole files; a file that cannot be read is made anew; a cache that cannot be written is done without."""
    if not cache:
        return compute()
    digest = hashlib.blake2b("\0".join(key_parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    path = Path(cache) / f"{kind}-{digest}.safetensors"
    if path.is_file():
        try:
            with safe_open(str(path), "pt") as stored:
                return {name: stored.get_tensor(name) for name in stored.keys()}
        except (OSError, SafetensorError):
            say(f"{path}: damaged cache file, made anew")
    tensors = compute()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(partial))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        if partial.is_file():
            partial.unlink()
        say(f"cache {cache}: not written ({error}); going on without")
    return tensors


@torch.no_grad()
def embed_texts(clip, texts, cache=None, batch_size=256):
    """Text embeddings, raw (not normalised), float32 [N, D] on the CPU. Texts past the context length are cut, and counted in one line."""
    device = clip.model.logit_scale.device
    blocks, cut, unknown = [], 0, []

    def compute():
        rows = []
        for start in range(0, len(block), batch_size):
            tokens = clip.tokenizer(block[start:start + batch_size]).to(device)
            with _autocast(clip, device):
                rows.append(clip.model.encode_text(tokens).float().cpu())
        return {"embeddings": torch.cat(rows)}

    for start in range(0, len(texts), BLOCK):
        block = texts[start:start + BLOCK]
        for text in block:
            if clip.known_tokens is None and len(text.encode()) + 2 <= clip.tokenizer.context_length:
                continue  # a token is at least a byte
            tokens = clip.tokenizer.encode(text)
            cut += len(tokens) + 2 > clip.tokenizer.context_length
            for token in tokens:
                word = clip.tokenizer.decode([token]).strip()
                if clip.known_tokens is not None and token not in clip.known_tokens and word not in unknown:
                    unknown.append(word)
        blocks.append(_cached(cache, "texts", [clip.key, *block], compute)["embeddings"])
    if cut:
        say(f"{cut} of {len(texts)} texts are longer than {clip.tokenizer.context_length} tokens and were cut")
    if unknown:
        say(f"the {clip.name} CLIP has never seen: {', '.join(unknown[:10])}; such words mean nothing to it")
    return torch.cat(blocks)


def load_photo(clip, photo, augment=None):
    """The tensor [3, H, W] that CLIP sees of a photo, or a str that says why it cannot be read.

    augment: None for CLIP's own preprocessing (shorter side resized, centre crop); (numpy Generator, smallest share of the area) for a
    random resized crop, aspect 3/4 to 4/3, and a flip half of the time. CLIP's own mean and standard deviation either way.
    """
    try:
        image = open_photo(photo)
        if augment is None:
            return clip.preprocess(image)
        rng, smallest = augment
        width, height = image.size
        area, aspect = width * height * rng.uniform(smallest, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        size = clip.model.visual.image_size
        image = image.resize((size, size) if isinstance(size, int) else tuple(size)[::-1], Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
        for step in clip.preprocess.transforms[-2:]:  # to tensor, normalise
            image = step(image)
        return image
    except Exception as error:  # Pillow raises many kinds for damaged files
        return f"{photo} ({error})"


def _photo_identity(photo):
    if isinstance(photo, tuple):
        return f"{photo} {scenes.DIGEST}"
    try:
        status = os.stat(photo)
        return f"{os.path.abspath(photo)} {status.st_size} {status.st_mtime_ns} {os.access(photo, os.R_OK)}"
    except OSError:
        return f"{photo} missing"


@torch.no_grad()
def _embed(clip, photos, kind, encode, cache, block_size, batch_size, workers, quiet):
    """encode: images [B, 3, H, W] -> dict of tensors [B, ...]. -> (the same dict over all readable photos, their indices)

    Under torchrun the blocks are divided among the processes of a machine and read back from the cache.
    """
    device = clip.model.logit_scale.device
    bar = tqdm(total=len(photos), desc="embedding photos", unit="photo", disable=quiet or not sys.stderr.isatty())

    def compute():
        tensors, good = {}, torch.zeros(len(block), dtype=torch.bool)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for at in range(0, len(block), batch_size):
                loaded = list(pool.map(lambda photo: load_photo(clip, photo), block[at:at + batch_size]))
                rows = [at + n for n, image in enumerate(loaded) if not isinstance(image, str)]
                if rows:
                    with _autocast(clip, device):
                        encoded = encode(torch.stack([loaded[n - at] for n in rows]).to(device))
                    for name, tensor in encoded.items():
                        tensors.setdefault(name, torch.full((len(block), *tensor.shape[1:]), float("nan"), dtype=tensor.dtype))[rows] = tensor.cpu()
                    good[rows] = True
                bar.update(len(loaded))
        return {**tensors, "good": good}

    blocks = [photos[start:start + block_size] for start in range(0, len(photos), block_size)]
    keys = [[clip.key, *map(_photo_identity, block)] for block in blocks]
    if torch.distributed.is_initialized() and cache:
        for number in range(int(os.environ["LOCAL_RANK"]), len(blocks), int(os.environ["LOCAL_WORLD_SIZE"])):
            block = blocks[number]
            _cached(cache, kind, keys[number], compute)
        torch.distributed.barrier()
    parts = []
    for block, key in zip(blocks, keys):
        parts.append(_cached(cache, kind, key, compute))
    bar.close()
    good = torch.cat([part["good"] for part in parts])
    bad = [str(photo) for photo, fine in zip(photos, good.tolist()) if not fine]
    if bad:
        say(f"{len(bad)} of {len(photos)} photos could not be read and were skipped: {', '.join(bad[:20])}{' ...' if len(bad) > 20 else ''}")
    if len(bad) == len(photos):
        raise UsageError("no photo could be read; check the files named above")
    names = [name for name in max(parts, key=len) if name != "good"]
    return {name: torch.cat([part[name][part["good"]] for part in parts if name in part]) for name in names}, good.nonzero()[:, 0].numpy()


def embed_photos(clip, photos, cache=None, batch_size=64, workers=2, quiet=False):
    """Global image embeddings, raw. photos: list of paths or scenes' (split, index). A photo that cannot be read is named, and its row
    left out. -> (float32 [K, D] on the CPU, indices [K] of the photos that were read). Raises UsageError if none was."""
    def encode(images):
        return {"embeddings": clip.model.encode_image(images).float()}
    tensors, kept = _embed(clip, photos, "photos", encode, cache, BLOCK, batch_size, workers, quiet)
    return tensors["embeddings"], kept


def embed_regions(clip, photos, image_features, cache=None, batch_size=32, workers=2, quiet=False):
    """Global and region features, raw. image_features: (image tower, images) -> (x0 [B, D], X [B, M, D]).
    -> (float32 [K, D], float16 [K, M, D], indices [K] of the photos that were read); otherwise as embed_photos."""
    def encode(images):
        embeddings, regions = image_features(clip.model.visual, images)
        return {"embeddings": embeddings.float(), "regions": regions.half()}
    tensors, kept = _embed(clip, photos, "regions", encode, cache, BLOCK // 8, batch_size, workers, quiet)
    return tensors["embeddings"], tensors["regions"], kept


# --- contact sheet ----------------------------------------------------------------------------------------------------

def contact_sheet(photos, names, scores, tags, path, per_row=4, limit=48):
    """One PNG of the photos with their strongest labels and scores drawn below each; chosen tags are bright, the rest grey.

    scores: [N, C] in 0..1; tags: list of N lists of label indices; at most `limit` photos are drawn. -> Path
    """
    photos, shown = photos[:limit], min(4, len(names))
    side, line, gap, title = 260, 22, 12, 20
    rows = -(-len(photos) // per_row)
    columns = min(per_row, len(photos))
    sheet = Image.new("RGB", (gap + columns * (side + gap), gap + rows * (side + title + shown * line + gap)), (24, 26, 30))
    canvas, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(11)
    for n, photo in enumerate(photos):
        x, y = gap + n % per_row * (side + gap), gap + n // per_row * (side + title + shown * line + gap)
        image = open_photo(photo)
        image = image.resize([max(1, round(v * side / max(image.size))) for v in image.size], Image.Resampling.BICUBIC)
        sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))
        canvas.text((x, y + side + 3), photo.name[-44:] if isinstance(photo, Path) else " ".join(map(str, photo)), font=small, fill=(120, 124, 132))
        for k, label in enumerate(np.argsort(-scores[n], kind="stable")[:shown]):
            top, bright = y + side + title + k * line, int(label) in tags[n]
            canvas.rectangle([x, top + 2, x + side - 1, top + line - 4], fill=(42, 45, 52))
            canvas.rectangle([x, top + 2, x + max(1, round(float(scores[n, label]) * (side - 1))), top + line - 4], fill=(38, 118, 92) if bright else (70, 74, 82))
            ink = (255, 255, 255) if bright else (165, 168, 175)
            canvas.text((x + 6, top + 1), names[label][:26], font=font, fill=ink)
            canvas.text((x + side - 40, top + 1), f"{100 * float(scores[n, label]):.0f} %", font=font, fill=ink)
    stream = BytesIO()
    sheet.save(stream, "PNG")
    write_atomically(path, stream.getvalue())
    return Path(path)


# --- python data.py --check ----------------------------------------------------------------------------------------------

def check(dataset, root, download=False, **policies):
    """Counts of a dataset beside the published ones -> (text for people, list of what is wrong). Raises UsageError as the loaders do."""
    wrong = []
    dropped = policies.get("unlabelled" if dataset in ("coco2014", "nuswide") else "validation") == "drop"
    parts = {split: load_photos(dataset, root, split, None, download, **policies) for split in ("train", "test")}
    lines = [f"{dataset} under {root}: {len(parts['train'].names)} labels"]
    for number, (split, found) in enumerate(parts.items()):
        published = (118287, 5000)[number] if found.policy.startswith(("train2017", "val2017")) else ((DROPPED.get(dataset) if dropped else None) or PUBLISHED.get(dataset) or (None, None))[number]
        lines.append(f"{split:<6}{len(found.photos):>9,} photos (published: {f'{published:,}' if published else 'not stated'}), {int((found.labels == 1).sum()):,} positives, "
                     f"{int((found.labels == -1).sum()):,} ignored, {int((~(found.labels == 1).any(1)).sum()):,} photos without a label; {found.policy}")
        if published and published != len(found.photos):
            wrong.append(f"{split}: {len(found.photos):,} photos, {published:,} published")
        wrong += [f"{split}: {part}" for part in found.policy.split("; ") if "left out" in part]
        if unseen := [name for name, positives in zip(found.names, (found.labels == 1).sum(0)) if not positives]:
            wrong.append(f"{split}: no photo with {', '.join(unseen[:10])}{' ...' if len(unseen) > 10 else ''}" + " (a column split in labels.csv, or another --split-seed, shares them out otherwise)" * (dataset == "folder"))
        for path in (found.photos[n] for n in np.random.default_rng(0).permutation(len(found.photos))[:20]):
            try:
                open_photo(path)
            except Exception as error:  # Pillow raises many kinds
                wrong.append(f"{split}: {path} cannot be read ({error})")
    if dataset == "mlrsnet" and policies.get("validation") != "drop" and (count := sum(len(found.photos) for found in parts.values())) != 109161:
        wrong.append(f"{count:,} photos in all, 109,161 published")
    if dataset == "mlrsnet" and (categories := int(parts["test"].policy.split()[0])) != 46:
        wrong.append(f"{categories} categories, 46 published")
    if dataset == "folder" and (spare := sorted(set(list_photos(root)) - {path for found in parts.values() for path in found.photos})):
        wrong.append(f"{len(spare):,} photos of the folder without labels (first: {spare[0]})")
    both = {str(p) for p in parts["train"].photos} & {str(p) for p in parts["test"].photos}
    if both:
        wrong.append(f"{len(both):,} photos are in both parts (first: {min(both)})")
    width = min(40, max(len(name) for name in parts["train"].names)) + 2
    lines += ["", f"{'positives':<{width}}{'train':>9}{'test':>9}"]
    lines += [f"{name[:40]:<{width}}{train:>9,}{test:>9,}" for name, train, test in zip(parts["train"].names, (parts["train"].labels == 1).sum(0), (parts["test"].labels == 1).sum(0))]
    return "\n".join(lines), wrong


def main(words=None):
    parser = argparse.ArgumentParser(description="Look at a dataset before training on it: counts beside the published ones, and what is wrong. Exit code 2 if something is.")
    parser.add_argument("--check", required=True, choices=list(LOADERS), help="the dataset")
    parser.add_argument("--data-root", default="data", help="folder that holds the datasets (default: %(default)s)")
    parser.add_argument("--download", action="store_true", help="fetch voc2007 (870 MB) into --data-root if it is not there")
    parser.add_argument("--difficult", choices=("ignore", "negative", "positive"), default="ignore", help="voc2007: labels seen only on difficult objects become (default: %(default)s)")
    parser.add_argument("--unlabelled", choices=("keep", "drop"), default="keep", help="coco2014, nuswide: photos without any label (default: %(default)s)")
    parser.add_argument("--validation", choices=("train", "drop"), default="train", help="pa100k, peta, mlrsnet: validation photos (default: %(default)s)")
    parser.add_argument("--partition", type=int, choices=range(5), default=0, help="rapv1, peta: which of the owners' five (default: %(default)s)")
    parser.add_argument("--split-seed", type=int, default=0, help="mlrsnet, ucm, folder: draws the split (default: %(default)s)")
    policies = vars(parser.parse_args(words))
    dataset, root = policies.pop("check"), policies.pop("data_root")
    try:
        text, wrong = check(dataset, root, **policies)
    except UsageError as error:
        say(f"data.py: {error}")
        return 2
    print(text)
    for line in wrong:
        say(f"wrong? {line}")
    print(f"\n{f'to look at, named above: {len(wrong)}' if wrong else 'nothing wrong was found'}", flush=True)
    return 2 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # head has seen enough
        os._exit(0)
