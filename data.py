"""Labels, texts, photos, the nine datasets as their owners publish them, and your own folder. Knows no method.

N photos or texts, C labels. Labels are int8 [N, C]: 1 present, 0 absent, -1 ignored. What a person can get wrong raises
UsageError, one line that names the thing and what to do; the scripts print it and exit with 2.

    python data.py --check coco2014 --data-root D       counts beside the published ones, and what is wrong
"""
import argparse
import contextlib
import csv
import difflib
import functools
import gzip
import hashlib
import json
import os
import re
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageOps
from scipy.io import loadmat

import scenes

ASSETS = Path(__file__).parent / "assets"
FEW = 5  # labels; shorter lists learn from sentences without any of them, too
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


class UsageError(Exception):
    """A person's mistake or missing data. The message is one line: what is wrong, and what to do."""


class MissingFile(UsageError):
    """A file is not there; load_photos adds the tree that was expected, and who publishes it."""


def say(message):
    """One line for the person at the terminal. Stderr, so that stdout holds results only."""
    print(message, file=sys.stderr, flush=True)


# --- files ------------------------------------------------------------------------------------------------------------

def read_stored(path, what, read, remedy):
    """read(Path(path)) -> what it returns; the one way in which any stored file is read. Whatever fails (missing, no
    permission, damaged, another form) raises UsageError: what the file was to be, its path, the reason, the remedy."""
    try:
        return read(Path(path))
    except (UsageError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(f"{what} {path}: no such file; {remedy}") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # met by readers of a file of another form
        reason = f"not in the form expected ({error!r:.120})"
    except Exception as error:  # the libraries that read files raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise UsageError(f"{what} {path}: {reason}; {remedy}")


@contextlib.contextmanager
def reading(path, what, remedy):
    """`with reading(path, "weights", "get it again") as path:` reads a stored file. Whatever fails inside (missing, no
    permission, damaged, another form) raises UsageError: what the file was to be, its path, the reason, the remedy."""
    try:
        yield Path(path)
        return
    except (UsageError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(f"{what} {path}: no such file; {remedy}") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # met by readers of a file of another form
        reason = f"not in the form expected ({error!r:.120})"
    except Exception as error:  # the libraries that read files raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise UsageError(f"{what} {path}: {reason}; {remedy}")


def read_text(path, what, remedy="give a UTF-8 text file"):
    """The text of a UTF-8 file, with or without a byte order mark, or of its gzip (.gz). Raises UsageError."""
    def read(path):
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    return read_stored(path, what, read, remedy)


def read_json(path, what, remedy="give valid JSON"):
    """The value in a JSON file, plain or gzip. Raises UsageError."""
    return read_stored(path, what, lambda path: json.loads(read_text(path, what, remedy)), remedy)


def write_atomically(path, content):
    """Write str or bytes so that the path holds the old content or the new, never a part. Raises UsageError."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        if partial.is_file():
            partial.unlink()
        raise UsageError(f"cannot write {path}: {error.strerror or error}; mend that or choose another place") from None


def write_json(path, value):
    """Strict JSON: nan and infinity become null, a Path its text. Raises UsageError if it cannot be written."""
    strict = json.loads(json.dumps(value, default=os.fspath), parse_constant=lambda _: None)
    write_atomically(path, json.dumps(strict, indent=1) + "\n")


def hold(path, what):
    """Take the file at path, made if missing, until the file returned is closed or the process ends. Raises UsageError
    where another process holds it. Windows and some network folders know no such lock: there nobody is kept out."""
    def open_to_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "ab")
    held = read_stored(path, what, open_to_write, "choose another folder")
    try:
        import fcntl
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which forked workers do not inherit
    except BlockingIOError:
        held.close()
        raise UsageError(f"{what}: another run is writing it; wait for it, or choose another folder") from None
    except (ImportError, OSError):
        pass
    return held


def digest(path):
    """Identity of a file's content, 16 hexadecimal digits. Raises UsageError."""
    content = read_stored(path, "file", Path.read_bytes, "check the path")
    return hashlib.blake2b(content, digest_size=8).hexdigest()


# --- labels, texts, photos --------------------------------------------------------------------------------------------

# {dataset: {a label as its files spell it: words for a prompt}}, in the order of the labels' columns
LABEL_WORDS = read_json(ASSETS / "labels" / "names.json", "label names")
DATASETS = ("scenes", *LABEL_WORDS, "folder")


def fold(text):
    """What texts and names are compared by: composed characters, straight apostrophes, no upper case."""
    return unicodedata.normalize("NFC", text).replace("’", "'").casefold()


def plain(phrase):
    """fold, and hyphens and runs of spaces are all one space."""
    return re.sub(r"[\s-]+", " ", fold(phrase)).strip()


def check_names(names, source):
    """names, if there is one, and all are distinct (case and hyphens aside) and can be printed. Raises UsageError."""
    entry_of = {}
    for entry, name in enumerate(names, 1):
        first = entry_of.setdefault(plain(name) or name, entry)
        if first != entry:
            raise UsageError(f"{source}: label '{name}' stands twice (entries {first} and {entry}); remove one")
        # control characters, line separators, marks that turn the direction of writing, halves of pairs
        odd = re.search("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", name)
        if odd or len(name) > 200 or not any(c.isalnum() or unicodedata.category(c) == "So" for c in name):
            raise UsageError(f"{source}: entry {entry} is not a label name: {ascii(name[:40])}; use up to 200 letters")
    if not names:
        raise UsageError(f"{source}: holds no label; write down at least one")
    return names


def read_labels(path):
    """A label file, one name a line, UTF-8, blank lines skipped -> list of str. Raises UsageError."""
    lines = [line.strip() for line in read_text(path, "label file").split("\n")]
    names = check_names([line for line in lines if line], f"label file {path}")
    if odd := [name for name in names if name[0] in "#-*" or "," in name]:
        say(f"{path}: '{odd[0]}' is taken as a label, word by word; one name a line, without marks and commas")
    return names


def synonyms_of(names, dataset=None):
    """{name: [other words for it]}, where a dataset has some; "" holds phrases that name no label ("hot dog")."""
    path = ASSETS / "labels" / f"{dataset}.json"
    table = read_json(path, "synonyms") if path.is_file() else {}
    if dataset == "scenes":
        table = {"": ["at home"], **{name: list(thing.words[1:]) for name, thing in scenes.THINGS.items()}}
    return {"": table.get("", []), **{name: table.get(name, []) for name in names}}


def plurals(words):
    """Regular plurals of a noun phrase, or the irregular one."""
    irregular = {"man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice",
                 "goose": "geese", "foot": "feet", "tooth": "teeth", "ox": "oxen"}
    *before, last = words.split(" ")
    if last in irregular:
        return [" ".join([*before, irregular[last]])]
    if re.search("[^aeiou]y$", words):
        return [words + "s", words[:-1] + "ies"]
    if re.search("fe?$", words):
        return [words + "s", re.sub("fe?$", "ves", words)]
    return [words + "s", words + "es"] if re.search("(s|x|z|ch|sh|o)$", words) else [words + "s"]


def noun_finder(names, synonyms=None):
    """find(text) -> [(column of the label, None for a phrase that is none; start; end)], places in fold(text).
    A label is named where its name, a synonym or the plural of one stands as whole words; a name goes before a synonym,
    both before plurals. The longest phrase wins: "hot dog" is no dog where "hot dog" is known."""
    synonyms = synonyms or {}
    phrases = [(column, plain(name)) for column, name in enumerate(names)]
    phrases += [(column, plain(word)) for column, name in enumerate(names) for word in synonyms.get(name, [])]
    phrases += [(None, plain(word)) for word in synonyms.get("", [])]
    phrases += [(column, plural) for column, phrase in phrases for plural in plurals(phrase)]
    column_of = {phrase: column for column, phrase in reversed(phrases)}
    longest_first = sorted(column_of, key=len, reverse=True)
    spellings = [r"[\s-]+".join(map(re.escape, phrase.split(" "))) for phrase in longest_first]
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(spellings)})(?!\w)")
    return lambda text: [(column_of[plain(found.group())], *found.span()) for found in pattern.finditer(fold(text))]


def match_nouns(texts, names, synonyms=None):
    """Labels of sentences by the words in them, as noun_finder finds them (TaI-DPT's way). -> int8 [N, C]"""
    find = noun_finder(names, synonyms)
    labels = np.zeros((len(texts), len(names)), np.int8)
    for row, text in enumerate(texts):
        labels[row, [column for column, _, _ in find(text) if column is not None]] = 1
    return labels


def read_texts(path, names, synonyms=None):
    """Training texts of a file, plain or gzip -> (list of str, int8 [N, C]); those without a label are left out.
    .jsonl: lines {"text": str, "labels": [names]}; a label not among names is refused: dropped, it would seem absent.
    .json: COCO's captions, anything else: a caption a line; both labelled by match_nouns. Raises UsageError."""
    def read(path):
        if form == ".json":
            texts = [entry["caption"].strip() for entry in read_json(path, "text file")["annotations"]]
        else:
            texts = [line.strip() for line in read_text(path, "text file").split("\n")]  # splitlines cuts at U+2028 too
        if form != ".jsonl":
            return texts, match_nouns(texts, names, synonyms)
        labels = np.zeros((len(texts), len(names)), np.int8)
        for row, line in enumerate(texts):
            try:
                entry = json.loads(line or '{"text": "", "labels": []}')
                texts[row], marked = entry["text"].strip(), list.copy(entry["labels"])  # refuses what is no list
            except (AttributeError, KeyError, TypeError, ValueError):
                raise ValueError(f"line {row + 1} has another form") from None
            if unknown := [str(label) for label in marked if label not in names]:
                near = "".join(f" (did you mean {name}?)" for name in difflib.get_close_matches(unknown[0], names, 1))
                raise ValueError(f"line {row + 1}: label '{unknown[0]}' is not in the label list{near}")
            labels[row] = [name in marked and texts[row] != "" for name in names]
        return texts, labels
    form = Path(str(path).removesuffix(".gz")).suffix
    remedy = {".jsonl": 'each line must be {"text": ..., "labels": [label names]}', ".json": "give COCO's captions"}
    texts, labels = read_stored(path, "text file", read, remedy.get(form, "give a caption a line"))
    rows, count = np.flatnonzero(labels.any(1)), sum(map(bool, texts))
    if not len(rows):
        raise UsageError(f"text file {path}: none of {count} texts has one of the {len(names)} labels; check both")
    if len(rows) < count:
        say(f"{path}: {len(rows)} of {count} texts have a label, the others are left out")
    return [texts[row] for row in rows], labels[rows]


def descriptions_of(dataset, names, path=None):
    """What each label looks like -> {name: sentence}; from path, else assets/descriptions/<dataset>.json, in the form
    {"descriptions": {name: sentence}} or the inner table alone. Labels without a sentence are left out and named: the
    caller's template stands alone there. Raises UsageError for another form, or if no label is described."""
    def read(path):
        content = read_json(path, "description file")
        return {name: " ".join(text.split()) for name, text in content.get("descriptions", content).items()}
    own = ASSETS / "descriptions" / f"{dataset}.json"
    if path is None and not own.is_file():
        say(f"{dataset}: no descriptions of its labels, the template stands alone; --descriptions FILE gives them")
        return {}
    path = path or own
    table = read_stored(path, "description file", read, 'it must be {"descriptions": {label: sentence, ...}}')
    found = {name: table[name] for name in names if table.get(name)}
    if not found and path != own:
        raise UsageError(f"description file {path}: describes none of {', '.join(names[:5])} ...; check the names")
    if missing := [name for name in names if name not in found]:
        say(f"{path}: the template stands alone for {len(missing)} of {len(names)} labels ({', '.join(missing[:10])})")
    if (extra := [name for name in table if name not in names]) and path != own:
        say(f"{path}: {len(extra)} descriptions of other labels not used ({', '.join(extra[:5])})")
    return found


def default_texts(dataset, names, count):
    """Texts for when the person brings none -> (list of str, int8 [N, C], what they are). The scenes grammar where it
    knows every label, else sentences of a fixed pattern for 1 to 5 names, each as often as any other in first place."""
    if dataset == "scenes" and set(names) <= set(scenes.NAMES):
        texts, labels = scenes.sentences(count, 0)
        labels = labels[:, [scenes.NAMES.index(name) for name in names]].astype(np.int8)
        rows = np.flatnonzero(labels.any(1) | (len(names) < FEW))
        return [texts[row] for row in rows], labels[rows], "sentences of the scenes grammar"
    say(f"no --texts: training on {count} template sentences (written by a fixed pattern, not by a language model)")
    rng = np.random.default_rng(0)
    openers = ("a photo of", "a picture of", "there is", "we see", "a photo with", "here is")
    texts, labels = [], np.zeros((count, len(names)), np.int8)
    for row in range(count):
        if row % len(names) == 0:
            order = rng.permutation(len(names))
        first = int(order[row % len(names)])
        others = rng.permutation(len(names))[:int(rng.integers(0, min(5, len(names))))]
        chosen = [first] + [int(label) for label in others if label != first]
        words = [("an " if names[label][0].lower() in "aeiou" else "a ") + names[label] for label in chosen]
        joined = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
        texts.append(f"{openers[int(rng.integers(len(openers)))]} {joined}.")
        labels[row, chosen] = 1
    return texts, labels, "template sentences"


def with_negatives(texts, labels, names):
    """Texts and their labels, and behind them the sentences of assets/texts that name none of the labels: where there
    are fewer than FEW, nearly every text would have each of them, and what lacks one could not be learnt."""
    shipped, find = sorted((ASSETS / "texts").glob("*.jsonl.gz")), noun_finder(names)
    lines = (json.loads(line)["text"] for path in shipped for line in read_text(path, "shipped texts").splitlines())
    more = [text for text in lines if not find(text)]
    return [*texts, *more], np.concatenate([labels, np.zeros((len(more), len(names)), np.int8)])


class LabelledPhotos(NamedTuple):
    photos: list        # N paths, or (split, index) for pictures of scenes
    labels: np.ndarray  # int8 [N, C]
    policy: str         # how doubtful labels were treated, for the record
    doubts: list = ()   # what is not as it should be, a line each: load_photos says it, --check counts it
    names: list = ()    # C readable names ("dining table"); load_photos fills in those of the dataset


def list_photos(path):
    """Photos under a folder (any depth, hidden ones left out), or the one file -> sorted Paths. Folders that are linked
    or locked, and .heic photos, are left out and counted in a line. Raises UsageError."""
    path, photos, heic, closed = Path(path), [], [], []
    walk = os.walk(path, onerror=lambda error: closed.append(error.filename)) if path.is_dir() else ()
    for folder, inner, files in walk:
        inner[:] = [name for name in inner if not name.startswith(".")]
        closed += [link for name in inner if os.path.islink(link := os.path.join(folder, name))]
        files = [Path(folder, name) for name in files if not name.startswith(".")]
        photos += [file for file in files if file.suffix.lower() in PHOTO_SUFFIXES and file.is_file()]
        heic += [file for file in files if file.suffix.lower() in (".heic", ".heif")]
    for what, some in (("folders, linked or locked,", closed), (".heic photos, which Pillow cannot read,", heic)):
        if some:
            say(f"{path}: {len(some)} {what} are left out (first: {min(some)})")
    photos = [path] if path.is_file() else sorted(photos)
    if not photos:
        reason = "no photo in this folder" if path.is_dir() else "no such file or folder"
        raise UsageError(f"photos {path}: {reason}; photos end in {' '.join(PHOTO_SUFFIXES)}")
    return photos


def open_photo(photo):
    """Path or scenes' (split, index) -> PIL RGB, turned upright by its EXIF mark. Raises OSError or ValueError."""
    if isinstance(photo, tuple):
        return scenes.picture(*photo)[0]
    with Image.open(photo) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a pixel; convert it to 8 or 16")
        return image.convert("RGB")


# --- boxes ------------------------------------------------------------------------------------------------------------

def voc_things(path):
    """An annotation of VOC's form -> ([(label, left, top, right, bottom, clear), ...], (width, height)), pixels; clear:
    not difficult. Raises UsageError."""
    def read(path):
        root, found, sides = ElementTree.parse(path), [], ("xmin", "ymin", "xmax", "ymax")
        for thing in root.iterfind("object"):
            left, top, right, bottom = (float(thing.findtext(f"bndbox/{side}")) for side in sides)
            name, hard = thing.findtext("name").strip(), thing.findtext("difficult", "0").strip() == "1"
            found.append((LABEL_WORDS["voc2007"].get(name, name), left - 1, top - 1, right, bottom, not hard))
        return found, tuple(int(root.findtext(f"size/{side}")) for side in ("width", "height"))
    return read_stored(path, "annotation", read, "unpack it again")


@functools.lru_cache(1)
def coco_things(path):
    """Instances of COCO's form -> {photo's file: as voc_things}; clear: no crowd. Raises UsageError."""
    def read(path):
        content, words = read_json(path, "annotations"), LABEL_WORDS["coco2014"]
        names = {entry["id"]: words.get(entry["name"], entry["name"]) for entry in content["categories"]}
        found = {entry["id"]: ([], (entry["width"], entry["height"])) for entry in content["images"]}
        for entry in content["annotations"]:
            (left, top, width, height), name = entry["bbox"], names[entry["category_id"]]
            place = (name, left, top, left + width, top + height, not entry.get("iscrowd"))
            found[entry["image_id"]][0].append(place)
        return {entry["file_name"]: found[entry["id"]] for entry in content["images"]}
    return read_stored(path, "annotations", read, "give COCO's instances, with all photos and categories")


def boxes_of(photo, names):
    """Where a photo's things are, if that is known: of scenes, and of files that lie as VOC's or COCO's do -> None, or
    (float [K, 6]: column of the name, left, top, right, bottom, clear; (width, height) of the photo), pixels. clear: 1,
    or 0 for VOC's difficult ones and COCO's crowds; for scenes the share that nothing covers. Raises UsageError."""
    if isinstance(photo, Path) and photo.suffix == ".png":
        with Image.open(photo) as image:  # as scenes.py draw marks its own
            split, _, index = image.info.get("scenes", "").partition(" ")
        photo = (split, int(index)) if split in scenes.SPLITS and index.isdecimal() else photo
    if isinstance(photo, tuple):
        found, size = scenes.boxes(*photo), (scenes.SIZE, scenes.SIZE)
    elif (beside := photo.parent.parent / f"Annotations/{photo.stem}.xml").is_file():
        found, size = voc_things(beside)
    elif (beside := photo.parent.parent / f"annotations/instances_{photo.parent.name}.json").is_file():
        found, size = coco_things(beside).get(photo.name, ([], (1, 1)))
    else:
        return None
    rows = [(names.index(label), *place) for label, *place in found if label in names]
    return np.array(rows, float).reshape(-1, 6), size


def in_view(boxes, size):
    """Boxes as CLIP sees them, the shorter side resized and a square cut from the middle -> (float [K', 6], those of
    which at least half is seen, in shares of the square and cut at its edge; which these are: bool [K])"""
    offset = [(length - min(size)) / 2 for length in size] * 2
    corners = (boxes[:, 1:5] - offset) / min(size)
    seen = np.clip(corners, 0, 1)
    whole, left = ((part[:, 2:] - part[:, :2]).prod(1) for part in (corners, seen))
    return np.column_stack([boxes[:, :1], seen, boxes[:, 5:]])[left >= whole / 2], left >= whole / 2


# --- the datasets -----------------------------------------------------------------------------------------------------

def find_files(root, folders, *markers):
    """The first of root/<folder>, and root itself, that holds one of the markers, files or folders
    -> (that folder, path of the marker). Raises MissingFile, which names a place one level down that does."""
    def look(root):
        places = [(root / folder, root / folder / marker) for folder in (*folders, ".") for marker in markers]
        return [place for place in places if os.path.exists(place[1])]
    if found := look(Path(root)):
        return found[0]
    deeper = [child for child in sorted(Path(root).glob("*")) if look(child)]
    hint = f", but it is in {deeper[0]}: pass --data-root {deeper[0]}" if deeper else ""
    raise MissingFile(f"no {' or '.join(markers[:2])} under {root}{hint}")


def shared_out(count, shares, seed):
    """Rows 0..count-1, shuffled by the seed and cut at the shares (0.4, 0.1, ...) -> list of sorted arrays"""
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(part) for part in np.split(order, np.round(np.cumsum(shares[:-1]) * count).astype(int))]


def read_table(path, dataset=None):
    """File names and labels: a table with a header, cells cut by comma, semicolon or tab, file names first, then a
    column a label of 1, 0 and -1, perhaps a column "split"; or .json, {file: [labels]}. dataset: its labels are wanted,
    in its own order, and no others. -> (file names, label names, int8 [N, C], words of "split" or None)"""
    def read(path):
        if path.suffix == ".json":
            marked = {file: list.copy(labels) for file, labels in read_json(path, "labels").items()}
            names = check_names(sorted(set().union(*marked.values())), path)
            return list(marked), names, np.int8([[name in marks for name in names] for marks in marked.values()]), None
        lines = read_text(path, "labels").splitlines() or [""]
        rows = csv.reader(lines, delimiter=max(",;\t", key=lines[0].count))
        header, *rows = [[cell.strip() for cell in row] for row in rows]
        column = {name: number for number, name in enumerate(header) if number and name}
        if len(column) < len(header[1:]) - header[1:].count(""):
            raise ValueError("a label stands twice in the header")
        split = column.pop("split", None)
        names = check_names(list(column), path) if dataset is None else list(LABEL_WORDS[dataset])
        if set(column) & {"0", "1", "-1"}:
            raise ValueError("the first line must name the columns, a label each")
        if odd := sorted(set(names) ^ set(column)):
            raise ValueError("the header " + ", ".join(f"{'has' if n in column else 'lacks'} {n}" for n in odd[:5]))
        files, labels, splits = [], [], []
        for number, row in enumerate(rows, 2):
            try:
                if any(row):
                    labels.append([{1: 1, 0: 0, -1: -1}[float(row[column[name]])] for name in names])
                    splits.append(split and row[split])
                    files.append(row[0])
            except (IndexError, KeyError, ValueError):
                raise ValueError(f"line {number} ({', '.join(row)[:50]}) is not {len(header)} such cells") from None
        last = dict(zip(files, labels, strict=True))
        if odd := [file for file, marks in zip(files, labels, strict=True) if marks != last[file]]:
            raise ValueError(f"{odd[0]} stands twice with other labels")
        return files, names, np.array(labels, np.int8).reshape(-1, len(names)), splits if split else None
    return read_stored(path, "labels", read, "cells are a file, then each label's 1, 0 or -1; JSON is {file: [labels]}")


# A loader(root, split, policies...) -> LabelledPhotos has its dataset's name; split is "train" or "test". The annotated
# arguments are what --policy NAME=VALUE takes: a value of a Literal, or a whole number. "Files:" and "From:" end the
# docstring: a person whose files are missing is told both, with the folder given for <root>.

def voc2007(root, split, difficult: Literal["ignore", "negative", "positive"] = "ignore"):
    """PASCAL VOC2007; trainval for training. difficult: labels seen only on objects marked difficult become -1 (ignore,
    the devkit's rule), 0 (negative: TaI-DPT, DualCoOp) or 1 (positive: TagCLIP).
    Files: VOCdevkit/VOC2007/{JPEGImages/*.jpg, Annotations/*.xml, ImageSets/Main/{trainval,test}.txt}
    From: python -c "import embed; embed.download_voc2007('<root>')" fetches it (870 MB, checked); or unpack in <root>
    VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar of http://host.robots.ox.ac.uk/pascal/VOC/voc2007/"""
    def read(path):
        marks = np.zeros(len(names), np.int8)
        for name, *_, clear in voc_things(path)[0]:
            column = names.index(name)
            marks[column] = 1 if clear or marks[column] == 1 else doubtful
        return marks
    base, lists = find_files(root, ("VOCdevkit/VOC2007", "VOC2007"), "ImageSets/Main")
    ids = read_text(lists / f"{'trainval' if split == 'train' else 'test'}.txt", "image list").split()
    names, doubtful = label_names("voc2007"), {"ignore": -1, "negative": 0, "positive": 1}[difficult]
    labels = [read_stored(base / f"Annotations/{file}.xml", "annotation", read, "unpack it again") for file in ids]
    return LabelledPhotos([base / f"JPEGImages/{file}.jpg" for file in ids], np.array(labels), f"difficult={difficult}")


def coco2014(root, split, unlabelled: Literal["keep", "drop"] = "keep"):
    """MS-COCO's instances, 2014 or 2017 file names; train and val serve as train and test; a crowd counts as present.
    unlabelled: photos without any label are kept (40,504 in val2014) or dropped (40,137).
    Files: coco2014/{annotations/instances_{train,val}2014.json, train2014/*.jpg, val2014/*.jpg} (or the same with 2017)
    From: unpack train2014, val2014, annotations_trainval2014 of https://cocodataset.org/#download in <root>/coco2014"""
    def read(path):
        found, names = coco_things(path), label_names("coco2014")
        labels = np.zeros((len(found), len(names)), np.int8)
        for row, (things, _) in enumerate(found.values()):
            labels[row, [names.index(name) for name, *_ in things]] = 1
        return [base / part / file for file in found], labels
    markers = [f"annotations/instances_{'train' if split == 'train' else 'val'}{year}.json" for year in (2014, 2017)]
    base, path = find_files(root, ("coco2014", "coco", "COCO", "coco2017"), *markers)
    part = path.stem.removeprefix("instances_")  # the photos' folder
    photos, labels = read_stored(path, "annotations", read, "give COCO's instances, with all photos and categories")
    rows = np.flatnonzero((labels == 1).any(1) | (unlabelled == "keep"))
    policy = f"{part}, crowds count, unlabelled={unlabelled}"
    return LabelledPhotos([photos[row] for row in rows], labels[rows], policy)


def nuswide(root, split, unlabelled: Literal["keep", "drop"] = "keep"):
    """NUS-WIDE, the owners' split. A value other than 0 and 1 (the published Labels_lake_Train.txt has one) is ignored.
    unlabelled: photos without any label are kept (161,789 / 107,859) or dropped (125,449 / 83,898).
    Files: nuswide/{ImageList/*Imagelist.txt, TrainTestLabels/Labels_<concept>_{Train,Test}.txt, Flickr/<folder>/*.jpg}
    From: unpack ImageList.zip and Groundtruth.zip in <root>/nuswide and put the photos, to be asked for, into Flickr;
    https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html"""
    part, concepts = {"train": "Train", "test": "Test"}[split], list(LABEL_WORDS["nuswide"])
    base, path = find_files(root, ("nuswide", "NUS-WIDE", "NUSWIDE", "nus_wide"), f"ImageList/{part}Imagelist.txt")
    files = [line.strip().replace("\\", "/") for line in read_text(path, "image list").splitlines() if line.strip()]
    folder = find_files(base, ("Groundtruth", "GroundTruth"), "TrainTestLabels")[1]
    labels = np.zeros((len(files), len(concepts)), np.int8)
    for column, concept in enumerate(concepts):
        values = np.array(read_text(folder / f"Labels_{concept}_{part}.txt", "labels").split())
        if len(values) != len(files):
            raise UsageError(f"{concept}: {len(values):,} labels for {len(files):,} listed photos; fetch both again")
        labels[:, column] = np.select([values == "1", values == "0"], [1, 0], -1)
    photos = find_files(base, (), "Flickr", "images", "Images")[1]
    if not any(os.path.isfile(photos / file) for file in files[:100]):  # a mirror without the folders of the list?
        files = [Path(file).name for file in files]
    rows = np.flatnonzero((labels == 1).any(1) | (unlabelled == "keep"))
    policy = f"unlabelled={unlabelled}, {(labels == -1).sum()} odd values ignored"
    return LabelledPhotos([photos / files[row] for row in rows], labels[rows], policy)


def pa100k(root, split, validation: Literal["train", "drop"] = "train"):
    """PA-100K, 26 attributes. validation: the 10,000 validation photos are trained on or dropped.
    Files: pa100k/{annotation.mat, release_data/*.jpg}
    From: fetch both from https://github.com/xh-liu/HydraPlus-Net and unpack them in <root>/pa100k"""
    def read(path):
        content = loadmat(path, simplify_cells=True)
        columns = [list(content["attributes"]).index(name) for name in LABEL_WORDS["pa100k"]]
        labels = np.concatenate([content[f"{part}_label"] for part in parts])[:, columns]
        return [folder / file for part in parts for file in content[f"{part}_images_name"]], labels.astype(np.int8)
    base, path = find_files(root, ("pa100k", "PA100k", "PA-100K", "PA100K"), "annotation.mat")
    folder = find_files(base, (), "release_data/release_data", "release_data", "data")[1]
    parts = ["test"] if split == "test" else ["train", "val"] if validation == "train" else ["train"]
    return LabelledPhotos(*read_stored(path, "labels", read, "fetch it again"), f"validation={validation}")


def rapv1(root, split, partition: Literal["0", "1", "2", "3", "4"] = "0"):
    """RAP 1, 51 of its 92 attributes. partition: which of the owners' five.
    Files: rapv1/{RAP_annotation.mat, RAP_dataset/*.png}
    From: ask its owners, https://www.rapdataset.com, for RAP_annotation and RAP_dataset; unpack both in <root>/rapv1"""
    def read(path):
        partitions, labels, _, names, _, files, *_ = loadmat(path, simplify_cells=True)["RAP_annotation"].values()
        numbers = list(np.ravel(partitions)[int(partition)].values())[0 if split == "train" else 1]
        rows, columns = np.ravel(numbers).astype(int) - 1, [list(names).index(name) for name in LABEL_WORDS["rapv1"]]
        return [base / "RAP_dataset" / files[row] for row in rows], (labels[rows][:, columns] == 1).astype(np.int8)
    markers = ("RAP_annotation.mat", "RAP_annotation/RAP_annotation.mat")
    base, path = find_files(root, ("rapv1", "RAP", "rap", "RAPv1"), *markers)
    return LabelledPhotos(*read_stored(path, "labels", read, "fetch it again"), f"partition={partition}")


def peta(root, split, partition: Literal["0", "1", "2", "3", "4"] = "0",
         validation: Literal["train", "drop"] = "train"):
    """PETA, 35 of its 105 attributes; value 2 means absent. partition: which of the owners' five. validation: as above.
    Files: peta/{PETA.mat, images/00001.png ... 19000.png}
    From: PETA-New.zip, linked by https://github.com/dangweili/pedestrian-attribute-recognition-pytorch (the owners' own
    photos, http://mmlab.ie.cuhk.edu.hk/projects/PETA.html, are not numbered like that); unpack it in <root>/peta"""
    def read(path):
        labels, names, _, partitions, *_ = loadmat(path, simplify_cells=True)["peta"].values()
        numbers = list(np.ravel(partitions)[int(partition)].values())
        rows = np.concatenate([np.ravel(numbers[part]) for part in parts]).astype(int) - 1
        names = list(np.reshape(names, (len(names), -1))[:, 0])
        columns = [4 + names.index(name) for name in LABEL_WORDS["peta"]]  # four other columns go before
        return [base / f"images/{row + 1:05d}.png" for row in rows], (labels[rows][:, columns] == 1).astype(np.int8)
    base, path = find_files(root, ("peta", "PETA"), "PETA.mat")
    parts = [2] if split == "test" else [0, 1] if validation == "train" else [0]
    policy = f"partition={partition}, validation={validation}"
    return LabelledPhotos(*read_stored(path, "labels", read, "fetch it again"), policy)


def multiscene(root, split):
    """MultiScene, the clean part. The form of its label file could not be established: one CSV a split, by its header.
    Files: multiscene/{train.csv, test.csv, images/*} (each CSV: a column of file names, then 36 of 0 and 1 a label)
    From: MultiScene-Clean, https://multiscene.github.io; put its photos in images and write both CSV, headed by the
    labels as assets/labels/names.json spells them"""
    base, path = find_files(root, ("multiscene", "MultiScene-Clean", "MultiScene"), f"{split}.csv")
    files, _, labels, _ = read_table(path, "multiscene")
    photos = [base / "images" / (file if Path(file).suffix else f"{file}.jpg") for file in files]
    return LabelledPhotos(photos, labels, "clean part")


def mlrsnet(root, split, validation: Literal["train", "drop"] = "train", split_seed: int = 0):
    """MLRSNet. Each category's CSV is read by its own header, for the order of their columns differs. split_seed: draws
    40 / 10 / 50 % of every category (the owners' lists were not found). validation: as above.
    Files: mlrsnet/{Images/<category>/*.jpg, Labels/<category>.csv}
    From: https://data.mendeley.com/datasets/7j9bv9vwsx/3; unpack all 46 categories, a folder and a CSV each"""
    base, folder = find_files(root, ("mlrsnet", "MLRSNet"), "Labels", "labels")
    tables = {path.stem: read_table(path, "mlrsnet") for path in sorted(folder.glob("*.csv"))}
    photos, labels = [], []
    for category, (files, _, marks, _) in tables.items():
        train, held_out, test = shared_out(len(files), (0.4, 0.1, 0.5), split_seed)
        rows = test if split == "test" else np.concatenate([train, held_out]) if validation == "train" else train
        photos += [base / "Images" / category / files[row] for row in rows]
        labels += list(marks[rows])
    without = sorted({path.name for path in (base / "Images").glob("*") if path.is_dir()} - set(tables))
    doubts = [f"no CSV for the photos of {category}: left out" for category in without]
    if (count := sum(len(files) for files, *_ in tables.values())) != 109161:
        doubts.append(f"{len(tables)} categories with {count:,} photos, 46 with 109,161 published")
    policy = f"{len(tables)} categories, 40/10/50 % of each by seed {split_seed}, validation={validation}"
    return LabelledPhotos(photos, np.array(labels), policy, doubts)


def ucm(root, split, split_seed: int = 0):
    """UC Merced. split_seed: draws 80 / 20 % (no split is published).
    Files: ucm/{LandUse_Multilabeled.txt, Images/<category>/*.tif}
    From: unpack UCMerced_LandUse.zip of http://weegee.vision.ucmerced.edu/datasets/landuse.html and multilabels.zip of
    https://bigearth.eu/datasets.html in <root>/ucm (their own folders are found too)"""
    markers = ("LandUse_Multilabeled.txt", "multilabels/LandUse_Multilabeled.txt", "LandUse_Multilabeled.csv")
    base, path = find_files(root, ("ucm", "UCMerced_LandUse", "UCM"), *markers)
    images, (files, _, labels, _) = find_files(base, ("UCMerced_LandUse",), "Images")[1], read_table(path, "ucm")
    rows = shared_out(len(files), (0.8, 0.2), split_seed)[split == "test"]
    stems = [Path(files[row]).stem for row in rows]
    photos = [images / stem.rstrip("0123456789") / f"{stem}.tif" for stem in stems]
    return LabelledPhotos(photos, labels[rows], f"80/20 by seed {split_seed}")


def folder(root, split, split_seed: int = 0):
    """Your own photos and labels. split_seed: draws 80 / 20 % where labels.csv has no column "split".
    Files: {labels.csv or labels.json, photos}
    From: labels.csv: a column of file names, then one of 0 and 1 a label, headed by the label, and perhaps a column
    "split" of train and test; labels.json: {"photo.jpg": ["dog", "cat"], ...}; "folder/photo.jpg" in a folder"""
    base, path = find_files(root, (), "labels.csv", "labels.json")
    files, names, labels, splits = read_table(path)
    rows, policy = shared_out(len(files), (0.8, 0.2), split_seed)[split == "test"], f"80/20 by seed {split_seed}"
    if splits:
        rows, policy = [row for row, part in enumerate(splits) if part == split], "split by its own column"
    if odd := set(splits or ()) - {"train", "test"}:
        raise UsageError(f"{path}: the column split must say train or test, not '{min(odd)}'")
    if not len(rows):
        raise UsageError(f"{base}: no photo is in the {split} part; add photos, or a column split to labels.csv")
    return LabelledPhotos([base / files[row] for row in rows], labels[rows], policy, names=names)


def label_names(dataset, root=None):
    """Readable label names of a dataset, in the order of its labels; those of "folder" stand in its own file."""
    if dataset == "folder":
        return load_photos("folder", root, "train").names
    return list(scenes.NAMES if dataset == "scenes" else LABEL_WORDS[dataset].values())


def policies_of(dataset):
    """What --policy takes for a dataset, "NAME=VALUE" each; N stands for a whole number. -> list of str"""
    annotations = {} if dataset == "scenes" else globals()[dataset].__annotations__
    return [f"{name}={value}" for name, kind in annotations.items() for value in get_args(kind) or ["N"]]


def load_photos(dataset, root, split, limit=None, policy=()):
    """Labelled photos of a dataset -> LabelledPhotos. split: "train" or "test"; limit: the first so many; policy: words
    "NAME=VALUE". Photos that are not there are counted and left out. Raises UsageError: what is missing, from where."""
    policies, known = {}, policies_of(dataset)
    for name, _, value in (word.partition("=") for word in policy):
        number = f"{name}=N" in known
        if not (value.isdecimal() if number else f"{name}={value}" in known):
            raise UsageError(f"--policy {name}={value}: {dataset} takes {', '.join(known) or 'none'}")
        policies[name] = int(value) if number else value
    if dataset == "scenes":
        photos = [(split, index) for index in range({"train": 20000, "test": 2000}[split])[:limit]]
        labels = np.array([scenes.labels_of(*photo) for photo in photos], np.int8)
        return LabelledPhotos(photos, labels, "all things drawn are labelled, hidden ones too", names=scenes.NAMES)
    loader = globals()[dataset]
    try:
        photos, labels, record, doubts, names = loader(root, split, **policies)
        there = np.array([os.path.isfile(photo) for photo in photos], bool)
        if not there.any():
            raise MissingFile(f"none of its {len(photos):,} photos is there (first: {photos[0] if photos else '-'})")
    except UsageError as error:
        tree, _, source = " ".join(loader.__doc__.split()).partition("Files: ")[2].partition(" From: ")
        expected = f"; expected {Path(root)}/{tree}; {source.replace('<root>', str(root))}"
        raise UsageError(f"{dataset}: {error}{expected if isinstance(error, MissingFile) else ''}") from None
    rows, gone = np.flatnonzero(there)[:limit], np.flatnonzero(~there)
    if len(gone):
        doubts = [*doubts, f"{len(gone):,} of {len(photos):,} photos missing, left out (first: {photos[gone[0]]})"]
    for doubt in doubts:
        say(f"{dataset}: {doubt}")
    photos, record = [photos[row] for row in rows], "; ".join([record, *doubts])
    return LabelledPhotos(photos, labels[rows], record, doubts, names or label_names(dataset))


def identity(dataset, root):
    """What decides the content of a set that nobody published: drawing code and shipped CLIP, or labels file. -> str"""
    if dataset == "scenes":
        return scenes.DIGEST + (digest(scenes.CHECKPOINT) if scenes.CHECKPOINT.is_file() else "")
    labels = [Path(root) / name for name in ("labels.csv", "labels.json") if dataset == "folder"]
    return next((digest(path) for path in labels if path.is_file()), "")


def load_features(path):
    """Ready-made embeddings of any encoder pair, one .npz (no pickles): text_embeddings [N, D], text_labels [N, C],
    image_embeddings [M, D], image_labels [M, C], label_embeddings [C, D], label_names [C]; labels are 1, 0 or -1.
    -> {name: float32 or int8 array, list of str for label_names}. Raises UsageError where one lacks or does not fit."""
    def read(path):
        with np.load(path, allow_pickle=False) as stored:
            arrays, sizes = {name: stored[name] for name in shapes}, {}
        for name, axes in shapes.items():
            array, marks = arrays[name], name.endswith("_labels")
            expected = [sizes.setdefault(axis, size) for axis, size in zip(axes, array.shape, strict=False)]
            if len(expected) != len(axes) or list(array.shape) != expected or not array.size:
                raise ValueError(f"{name} has shape {list(array.shape)}, expected {expected}")
            if name == "label_names":
                arrays[name] = check_names([str(label) for label in array], f"features file {path}")
            elif array.dtype.kind not in "fiub" or not np.isfinite(array).all():
                raise ValueError(f"{name} holds values that are not finite numbers")
            elif marks and not np.isin(array, (-1, 0, 1)).all():
                raise ValueError(f"{name} must hold 1 (present), 0 (absent) or -1 (ignored) only")
            else:
                arrays[name] = array.astype(np.int8 if marks else np.float32)
        return arrays
    shapes = {"text_embeddings": "ND", "text_labels": "NC", "image_embeddings": "MD", "image_labels": "MC",
              "label_embeddings": "CD", "label_names": "C"}
    return read_stored(path, "features file", read, f"it must be an .npz without pickles of {', '.join(shapes)}")


# --- python data.py --check -------------------------------------------------------------------------------------------

# {dataset, perhaps with a policy or its test photos' folder: [photos for training, for test], as the owners count them}
PUBLISHED = read_json(ASSETS / "labels" / "published.json", "published counts")


def check(dataset, root, policy=()):
    """Print counts of a dataset beside the published ones -> list of what is wrong. Raises UsageError: no data."""
    parts = {split: load_photos(dataset, root, split, policy=policy) for split in ("train", "test")}
    names, wrong = parts["train"].names, []
    positives = [(found.labels == 1).sum(0) for found in parts.values()]
    variants = [f"{dataset} {word}" for word in (parts["test"].photos[0].parent.name, *policy)]
    published = next((PUBLISHED[variant] for variant in (*variants, dataset) if variant in PUBLISHED), (None, None))
    for (split, found), expected, seen in zip(parts.items(), published, positives, strict=True):
        count, bare, ignored = len(found.photos), (found.labels != 1).all(1).sum(), (found.labels == -1).sum()
        print(f"{split:<6}{count:>9,} photos (published: {f'{expected:,}' if expected else 'not stated'}), "
              f"{seen.sum():,} positives, {ignored:,} ignored, {bare:,} photos without a label; {found.policy}")
        if expected not in (None, count):
            wrong.append(f"{split}: {count:,} photos, {expected:,} published")
        wrong += [f"{split}: {doubt}" for doubt in found.doubts]
        if unseen := [name for name, times in zip(names, seen, strict=True) if not times]:
            wrong.append(f"{split}: no photo with {', '.join(unseen[:10])}")
        for row in np.random.default_rng(0).permutation(count)[:20]:
            try:
                open_photo(found.photos[row])
            except Exception as error:  # Pillow raises many kinds
                wrong.append(f"{split}: {found.photos[row]} cannot be read ({error})")
    train, test = (set(found.photos) for found in parts.values())
    if both := train & test:
        wrong.append(f"{len(both):,} photos are in both parts (first: {min(both)})")
    if dataset == "folder" and (spare := sorted(set(list_photos(root)) - train - test)):
        wrong.append(f"{len(spare):,} photos of the folder without labels (first: {spare[0]})")
    print(f"\n{f'{len(names)} labels, positives':<42}{'train':>9}{'test':>9}")
    for name, *counts in zip(names, *positives, strict=True):
        print(f"{name[:40]:<42}{counts[0]:>9,}{counts[1]:>9,}")
    return wrong


def main(words=None):
    """The command line -> exit code, 2 if something is missing or looks wrong."""
    known = "; ".join(f"{dataset}: {', '.join(policies_of(dataset)) or 'none'}" for dataset in DATASETS[1:])
    parser = argparse.ArgumentParser(description="Counts of a dataset, and what is wrong.", epilog=f"policies: {known}")
    parser.add_argument("--check", required=True, choices=DATASETS[1:], help="the dataset")
    parser.add_argument("--data-root", default="data", metavar="D", help="folder of datasets (default: %(default)s)")
    parser.add_argument("--policy", nargs="+", default=[], metavar="NAME=VALUE", help="how doubtful labels are treated")
    options = parser.parse_args(words)
    try:
        wrong = check(options.check, options.data_root, options.policy)
    except UsageError as error:
        say(f"data.py: {error}")
        return 2
    for line in wrong:
        say(f"wrong? {line}")
    print(f"\nto look at, named above: {len(wrong)}" if wrong else "\nnothing wrong was found", flush=True)
    return 2 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # head has seen enough
        os._exit(0)
