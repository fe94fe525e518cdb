"""Files, label names, texts, photos, and your own folder of photos. The published datasets are in datasets.py.

N photos or texts, C labels. Labels are int8 [N, C]: 1 present, 0 absent, -1 ignored. Raises UsageError for user errors:
one line that names the file or option and says what to do. The scripts print it and exit with code 2.
"""
import csv
import difflib
import gzip
import hashlib
import json
import os
import re
import sys
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, ImageOps

import scenes

ASSETS = Path(__file__).parent / "assets"
FEW = 5  # labels; with fewer than these, texts without any label are trained on too
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


class UsageError(Exception):
    """A user error or missing data. The message is one line: what is wrong, and what to do."""


class MissingFile(UsageError):
    """A file does not exist. load_photos adds which files a dataset needs and who publishes them."""


def say(message):
    """One line for the person at the terminal. Stderr, so that stdout holds results only."""
    print(message, file=sys.stderr, flush=True)


# --- files ------------------------------------------------------------------------------------------------------------

@contextmanager
def reading(path, what, remedy):
    """`with reading(path, "label file", "give a UTF-8 text file") as path:` around code that reads a file. Every
    failure in it (missing, no permission, damaged, another form) raises UsageError: what the file is, its path, the
    reason, the remedy. A UsageError passes through unchanged."""
    try:
        yield Path(path)
        return
    except (UsageError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(f"{what} {path}: no such file; {remedy}") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # code that met a file of another form
        reason = f"not in the form expected ({error!r:.120})"
    except Exception as error:  # the libraries that read files raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise UsageError(f"{what} {path}: {reason}; {remedy}")


def read_text(path, what, remedy="give a UTF-8 text file"):
    """The text of a UTF-8 file, with or without a byte order mark, plain or gzip (.gz). Raises UsageError."""
    with reading(path, what, remedy) as path:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")


def read_json(path, what, remedy="give valid JSON"):
    """The value in a JSON file, plain or gzip. Raises UsageError."""
    with reading(path, what, remedy):
        return json.loads(read_text(path, what, remedy))


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


LOCK_SECONDS = float(os.environ.get("LOCK_SECONDS", 8))  # decoding workers of a killed run hold a lock for up to five


class HeldLock(FileLock):
    """A lock that is acquired already: `with` only releases it at the end."""
    def __enter__(self):
        return self


def hold(path, what):
    """Lock the file at path, which is made if missing -> the lock, held until `.release()`, the end of a `with`, or the
    end of the process; keep a reference to it. Raises UsageError if another process still holds it after LOCK_SECONDS.
    """
    with reading(path, what, "choose another folder") as path:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = HeldLock(path, LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            remedy = "wait for it, or choose another folder"
            raise UsageError(f"{what}: another run is writing it; {remedy}") from None
    return lock


def digest(path):
    """Identity of a file's content, 16 hexadecimal digits. Raises UsageError."""
    with reading(path, "file", "check the path") as path:
        return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


# --- label names ------------------------------------------------------------------------------------------------------

# {dataset: {a label as its files spell it: words for a prompt}}, in the order of the labels' columns
LABEL_WORDS = read_json(ASSETS / "labels" / "names.json", "label names")
DATASETS = ("scenes", *LABEL_WORDS, "folder")


def fold(text):
    """Texts and names are compared in this form: composed characters, straight apostrophes, no upper case."""
    return unicodedata.normalize("NFC", text).replace("’", "'").casefold()


def plain(phrase):
    """fold, and hyphens and runs of spaces become one space."""
    return re.sub(r"[\s-]+", " ", fold(phrase)).strip()


def check_names(names, source):
    """names: at least one, all different (case and hyphens aside), and all can be printed. Raises UsageError."""
    entry_of = {}
    for entry, name in enumerate(names, 1):
        first = entry_of.setdefault(plain(name), entry)
        if first != entry:
            raise UsageError(f"{source}: label '{name}' stands twice (entries {first} and {entry}); remove one")
        # control characters, line separators, marks that turn the direction of writing, halves of pairs
        odd = re.search("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]|.{201}", name)
        if odd or not any(letter.isalnum() or unicodedata.category(letter) == "So" for letter in name):
            raise UsageError(f"{source}: entry {entry} is not a label name: {ascii(name[:40])}; use up to 200 letters")
    if not names:
        raise UsageError(f"{source}: holds no label; write down at least one")
    return names


def read_labels(path):
    """A label file, one name a line, UTF-8, blank lines skipped -> list of str. Raises UsageError."""
    lines = read_text(path, "label file").split("\n")
    names = check_names([line.strip() for line in lines if line.strip()], f"label file {path}")
    odd = [name for name in names if name[0] in "#-*" or "," in name]
    if odd:
        say(f"{path}: '{odd[0]}' is taken as a label, word by word; one name a line, without marks and commas")
    return names


def label_names(dataset, root=None):
    """Readable label names of a dataset, in the order of its labels' columns; those of "folder" are in its own file."""
    if dataset == "scenes":
        return list(scenes.NAMES)
    if dataset == "folder":
        return load_photos("folder", root, "train").names
    return list(LABEL_WORDS[dataset].values())


def synonyms_of(names, dataset=None):
    """{name: [other words for it]}, where a dataset has some; "" holds phrases that name no label ("hot dog")."""
    path = ASSETS / "labels" / f"{dataset}.json"
    table = read_json(path, "synonyms") if path.is_file() else {}
    return {name: table.get(name, []) for name in ["", *names]}


# --- texts ------------------------------------------------------------------------------------------------------------

IRREGULAR_PLURALS = {"man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice",
                     "goose": "geese", "foot": "feet", "tooth": "teeth", "ox": "oxen"}


def plurals(words):
    """Regular plurals of a noun phrase, or the irregular one."""
    before, space, last = words.rpartition(" ")
    if last in IRREGULAR_PLURALS:
        return [before + space + IRREGULAR_PLURALS[last]]
    for ending, plural in (("([^aeiou])y$", r"\1ies"), ("fe?$", "ves"), ("(s|x|z|ch|sh|o)$", r"\1es")):
        if re.search(ending, words):
            return [words + "s", re.sub(ending, plural, words)]
    return [words + "s"]


def noun_finder(names, synonyms=None):
    """find(text) -> [(column of the label, None for a phrase that is none; start; end)], places in fold(text).
    A label is named where its name, a synonym or the plural of one stands as whole words; a name goes before a synonym,
    both before plurals. The longest phrase wins: "hot dog" is no dog where "hot dog" is known."""
    phrases = [(plain(name), column) for column, name in enumerate(names)]
    if synonyms:
        for column, name in [*enumerate(names), (None, "")]:
            phrases += [(plain(word), column) for word in synonyms.get(name, [])]
    phrases += [(plural, column) for phrase, column in phrases for plural in plurals(phrase)]
    column_of = dict(reversed(phrases))  # of equal phrases the first counts
    longest_first = sorted(column_of, key=len, reverse=True)
    spellings = [re.escape(phrase).replace(r"\ ", r"[\s-]+") for phrase in longest_first]
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(spellings)})(?!\w)")

    def find(text):
        return [(column_of[plain(found.group())], *found.span()) for found in pattern.finditer(fold(text))]
    return find


def no_labels(texts, names):
    """int8 [N, C], all absent"""
    return np.zeros((len(texts), len(names)), np.int8)


def match_nouns(texts, names, synonyms=None):
    """Labels of sentences by the words in them, as noun_finder finds them (TaI-DPT's way). -> int8 [N, C]"""
    find = noun_finder(names, synonyms)
    labels = no_labels(texts, names)
    for row, text in enumerate(texts):
        for column, _, _ in find(text):
            if column is not None:
                labels[row, column] = 1
    return labels


def read_labelled_texts(path, names):
    """Lines {"text": str, "labels": [names]} of a .jsonl file -> (list of str, int8 [N, C]). Raises UsageError."""
    texts = []
    labels = []
    for number, line in enumerate(read_text(path, "text file").split("\n"), 1):
        if not line.strip():
            continue
        remedy = 'each line must be {"text": ..., "labels": [label names]}'
        with reading(f"{path}, line {number}", "text file", remedy):
            entry = json.loads(line)
            marked = list.copy(entry["labels"])  # raises TypeError for anything but a list
            for label in marked:
                if label not in names:
                    near = difflib.get_close_matches(str(label), names, 1, 0)
                    raise ValueError(f"label '{label}' is not in the label list, where the nearest is {near}")
            if entry["text"].strip():
                texts.append(entry["text"].strip())
                labels.append([name in marked for name in names])
    return texts, np.array(labels, np.int8).reshape(-1, len(names))


def read_captions(path, form):
    """The captions of a file of COCO's form (".json"), else its lines -> list of str. Raises UsageError."""
    if form == ".json":
        with reading(path, "text file", "give COCO's captions"):
            captions = [entry["caption"] for entry in read_json(path, "text file")["annotations"]]
    else:
        captions = read_text(path, "text file").split("\n")  # splitlines cuts at U+2028 too
    return [caption.strip() for caption in captions if caption.strip()]


def read_texts(path, names, synonyms=None):
    """Training texts of a file, plain or gzip -> (list of str, int8 [N, C]); those without a label are left out.
    .jsonl: lines {"text": str, "labels": [names]}; a label not among names is refused: dropped, it would seem absent.
    .json: COCO's captions, anything else: a caption a line; both labelled by match_nouns. Raises UsageError."""
    form = Path(str(path).removesuffix(".gz")).suffix
    if form == ".jsonl":
        texts, labels = read_labelled_texts(path, names)
    else:
        texts = read_captions(path, form)
        labels = match_nouns(texts, names, synonyms)
    rows = np.flatnonzero(labels.any(1))
    if not len(rows):
        raise UsageError(f"text file {path}: none of {len(texts)} texts has one of the {len(names)} labels; check both")
    if len(rows) < len(texts):
        say(f"{path}: {len(rows)} of {len(texts)} texts have a label, the others are left out")
    return [texts[row] for row in rows], labels[rows]


def descriptions_of(dataset, names, path=None):
    """What each label looks like -> {name: sentence}; from path, else assets/descriptions/<dataset>.json, in the form
    {"descriptions": {name: sentence}} or the inner table alone. Labels without a sentence are left out and named: the
    caller's template stands alone there. Raises UsageError for another form, or if no label is described."""
    source = path or ASSETS / "descriptions" / f"{dataset}.json"
    if path is None and not source.is_file():
        say(f"{dataset}: no descriptions of its labels, the template stands alone; --descriptions FILE gives them")
        return {}
    with reading(source, "description file", 'it must be {"descriptions": {label: sentence, ...}}'):
        content = read_json(source, "description file")
        content = content.get("descriptions", content)
        table = {name: " ".join(text.split()) for name, text in content.items()}
    found = {name: table[name] for name in names if table.get(name)}
    missing = [name for name in names if name not in found]
    extra = [name for name in table if name not in names]
    if path and not found:
        raise UsageError(f"description file {path}: describes none of {', '.join(names[:5])} ...; check the names")
    if missing:
        some = ", ".join(missing[:10])
        say(f"{source}: the template stands alone for {len(missing)} of {len(names)} labels ({some})")
    if path and extra:
        say(f"{path}: {len(extra)} descriptions of other labels not used ({', '.join(extra[:5])})")
    return found


def default_texts(dataset, names, count):
    """Texts where the user gives none -> (list of str, int8 [N, C], what they are): of the scenes grammar where it
    knows every label, else sentences of a fixed pattern."""
    if dataset != "scenes" or not set(names) <= set(scenes.NAMES):
        say(f"no --texts: training on {count} template sentences (written by a fixed pattern, not by a language model)")
        return *template_texts(names, count), "template sentences"
    texts, labels = scenes.sentences(count, 0)
    labels = labels[:, [scenes.NAMES.index(name) for name in names]].astype(np.int8)
    rows = np.arange(count)
    if len(names) >= FEW:
        rows = np.flatnonzero(labels.any(1))
    return [texts[row] for row in rows], labels[rows], "sentences of the scenes grammar"


def template_texts(names, count):
    """Sentences for 1 to 5 names each; every name comes first equally often. -> (list of str, int8 [count, C])"""
    openers = ("a photo of", "a picture of", "there is", "we see", "a photo with", "here is")
    rng = np.random.default_rng(0)
    texts = []
    labels = no_labels(range(count), names)
    for row in range(count):
        if row % len(names) == 0:
            order = rng.permutation(len(names))
        others = rng.permutation(len(names))[:rng.integers(0, min(5, len(names)))]
        chosen = list(dict.fromkeys([order[row % len(names)], *others]))  # each once, in this order
        labels[row, chosen] = 1
        words = [with_article(names[label]) for label in chosen]
        listed = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
        texts.append(f"{openers[rng.integers(len(openers))]} {listed}.")
    return texts, labels


def with_article(name):
    """an apple, a dog"""
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def with_negatives(texts, labels, names):
    """Texts and their labels, followed by the sentences of assets/texts that name none of the labels. With fewer than
    FEW labels nearly every text has each of them, and nothing could be learnt from texts that lack one."""
    find = noun_finder(names)
    more = []
    for path in sorted((ASSETS / "texts").glob("*.jsonl.gz")):
        shipped = [json.loads(line)["text"] for line in read_text(path, "shipped texts").splitlines()]
        more += [text for text in shipped if not find(text)]
    return [*texts, *more], np.concatenate([labels, no_labels(more, names)])


# --- photos -----------------------------------------------------------------------------------------------------------

def list_photos(path):
    """Photos under a folder (any depth, hidden ones left out), or the one file -> sorted Paths. Folders that are linked
    or locked, and .heic photos, are left out and counted in a line. Raises UsageError."""
    path = Path(path)
    if path.is_file():
        return [path]
    photos = []
    heic = []
    closed = []
    errors = []
    for folder, inner, files in os.walk(path, onerror=errors.append):
        inner[:] = [name for name in inner if not name.startswith(".")]
        closed += filter(os.path.islink, [os.path.join(folder, name) for name in inner])
        for file in [Path(folder, name) for name in files if not name.startswith(".")]:
            if file.suffix.lower() in (".heic", ".heif"):
                heic.append(file)
            elif file.suffix.lower() in PHOTO_SUFFIXES and file.is_file():
                photos.append(file)
    closed += [error.filename for error in errors]
    if closed and path.exists():
        say(f"{path}: {len(closed)} folders, linked or locked, are left out (first: {min(closed)})")
    if heic:
        say(f"{path}: {len(heic)} .heic photos, which Pillow cannot read, are left out (first: {min(heic)})")
    if not photos:
        reason = "no photo in this folder" if path.exists() else "no such file or folder"
        raise UsageError(f"photos {path}: {reason}; photos end in {' '.join(PHOTO_SUFFIXES)}")
    return sorted(photos)


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


def drawn(total, count=None):
    """`count` of the rows 0 .. total-1, drawn by a fixed seed: fewer are among more; None: all. -> sorted int array"""
    return np.sort(np.random.default_rng(0).permutation(total)[:count])


@dataclass
class LabelledPhotos:
    """`photos, labels = load_photos(...)` works too."""
    photos: list        # N paths, or (split, index) for pictures of scenes
    labels: np.ndarray  # int8 [N, C]
    policy: str         # how doubtful labels were treated, for the record
    doubts: list = field(default_factory=list)  # what looks wrong, a line each: load_photos says it, --check counts it
    names: list = field(default_factory=list)   # C readable names ("dining table")

    def __iter__(self):
        return iter((self.photos, self.labels))

    def at(self, rows):
        """The photos and labels of some rows."""
        return replace(self, photos=[self.photos[row] for row in rows], labels=self.labels[rows])


def load_photos(dataset, root, split, count=None, policy=()):
    """Labelled photos of a dataset -> LabelledPhotos. split: "train" or "test"; count: so many of them, by `drawn`;
    policy: words "NAME=VALUE". Photos that do not exist are counted and left out before that. Raises UsageError: what
    is missing, and where to get it."""
    import datasets  # here and not above, because datasets.py imports this file
    return datasets.load_photos(dataset, root, split, count, policy)


def identity(dataset, root):
    """What decides the content of a set that nobody published: drawing code and shipped CLIP, or labels file. -> str"""
    paths = []
    if dataset == "scenes":
        paths = [Path(scenes.__file__), scenes.CHECKPOINT]
    elif dataset == "folder":
        paths = [Path(root, name) for name in FOLDER_FILES]
    return "".join(map(digest, filter(Path.is_file, paths)))


# --- tables of labels, ready-made embeddings --------------------------------------------------------------------------

FOLDER_FILES = ("labels.csv", "labels.json")  # of your own folder


@dataclass
class Table:
    files: list         # N file names
    names: list         # C label names
    labels: np.ndarray  # int8 [N, C]
    splits: list        # N words of the column "split"; empty without one


def read_table(path, dataset=None):
    """File names and labels -> Table. A table with a header, cells cut by comma, semicolon or tab, file names first,
    then a column a label of 1, 0 and -1, perhaps a column "split"; or .json, {file: [labels]}. dataset: its labels are
    wanted, in its own order, and no others. Raises UsageError."""
    remedy = "cells are a file, then each label's 1, 0 or -1; JSON is {file: [labels]}"
    with reading(path, "labels", remedy) as path:
        if path.suffix == ".json":
            marked = {file: list.copy(labels) for file, labels in read_json(path, "labels").items()}
            names = check_names(sorted(set().union(*marked.values())), path)
            labels = [[name in marks for name in names] for marks in marked.values()]
            return Table(list(marked), names, np.array(labels, np.int8), [])
        lines = read_text(path, "labels").splitlines()
        separator = max(",;\t", key=lines[0].count)
        header, *rows = filter(any, csv.reader(lines, delimiter=separator, skipinitialspace=True))
        names = check_header(header, path, dataset)
        columns = [header.index(name, 1) for name in names]
        splits = [row[header.index("split")] for row in rows] if "split" in header else []
        marks_of = {}
        labels = []
        for row in rows:
            with reading(f"{path}, row of {row[0]}", "labels", remedy):
                marks = [{1: 1, 0: 0, -1: -1}[float(row[column])] for column in columns]
                if marks_of.setdefault(row[0], marks) != marks:
                    raise ValueError("the file stands twice with other labels")
            labels.append(marks)
        labels = np.array(labels, np.int8).reshape(-1, len(names))
        return Table([row[0] for row in rows], names, labels, splits)


def check_header(header, path, dataset):
    """The label names in the first line of a table; of a dataset, its own, in its own order. Raises ValueError."""
    titles = [title for title in header[1:] if title not in ("", "split")]
    if {"0", "1", "-1"} & set(titles):
        raise ValueError("the first line must name the columns, a label each")
    check_names(titles, path)
    names = titles if dataset is None else list(LABEL_WORDS[dataset])
    odd = sorted(set(names) ^ set(titles))
    if odd:
        raise ValueError(f"the header has or lacks {', '.join(odd[:5])}")
    return names


FEATURE_AXES = {"text_embeddings": "ND", "text_labels": "NC", "image_embeddings": "MD", "image_labels": "MC",
                "label_embeddings": "CD", "label_names": "C"}


def load_features(path):
    """Ready-made embeddings of any encoder pair, one .npz (no pickles): text_embeddings [N, D], text_labels [N, C],
    image_embeddings [M, D], image_labels [M, C], label_embeddings [C, D], label_names [C]; labels are 1, 0 or -1.
    -> {name: float32 or int8 array, list of str for label_names}. Raises UsageError where one lacks or does not fit."""
    with reading(path, "features file", f"it must be an .npz without pickles of {', '.join(FEATURE_AXES)}"):
        sizes = {}
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in FEATURE_AXES}
        for name, axes in FEATURE_AXES.items():
            shape = arrays[name].shape
            expected = [sizes.setdefault(axis, size) for axis, size in zip(axes, shape, strict=False)]
            if len(shape) != len(axes) or list(shape) != expected or 0 in shape:
                raise ValueError(f"{name} has shape {list(shape)}, expected {expected}")
        names = check_names(arrays.pop("label_names").astype(str).tolist(), f"features file {path}")
        for name, array in arrays.items():
            if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
                raise ValueError(f"{name} holds values that are not finite numbers")
            is_labels = name.endswith("_labels")
            if is_labels and not np.isin(array, (-1, 0, 1)).all():
                raise ValueError(f"{name} must hold 1 (present), 0 (absent) or -1 (ignored) only")
            arrays[name] = array.astype(np.int8 if is_labels else np.float32)
        return {**arrays, "label_names": names}
