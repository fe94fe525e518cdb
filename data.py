"""Files, label names, texts, photos, and tables of labels. The published datasets are in datasets.py.

N photos or texts, C labels. Labels are int8 [N, C]: 1 present, 0 absent, -1 ignored. Raises UsageError for user errors:
one line that names the file or option and says what to do. The scripts print it and exit with code 2.
"""
import csv
import gzip
import hashlib
import io
import json
import os
import re
import sys
import unicodedata
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from os.path import isdir, isfile
from pathlib import Path
from textwrap import shorten
from warnings import catch_warnings, simplefilter

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from tqdm import tqdm

import scenes

ASSETS = Path(__file__).parent / "assets"
FEW = 5  # labels; with fewer than these, texts without any label are trained on too
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
HEIC = (".heic", ".heif", ".hif")
if find_spec("pillow_heif"):
    PHOTO_SUFFIXES += HEIC
RAW = ".3fr .arw .cr2 .cr3 .crw .dng .erf .iiq .kdc .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srf .srw .x3f"
VIDEO = ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .webm .wmv"
UNREAD = (dict.fromkeys(HEIC, "photos, which Pillow cannot read, are left out; get pillow-heif")
          | dict.fromkeys(RAW.split(), "photos, which Pillow cannot read, are left out; convert them")
          | dict.fromkeys(VIDEO.split(), "videos are left out"))


class UsageError(Exception):
    """A user error or missing data. The message is one line: what is wrong, and what to do."""


class MissingFile(UsageError):
    """A file does not exist. load_photos adds to it which files a dataset needs and who publishes them."""


def say(message):
    """Print one line to the user, on stderr, so that stdout holds results only."""
    tqdm.write(message, sys.stderr)  # on a line of its own, even beside a progress bar


say_once = lru_cache(say)  # the same line is not said again


def speak_utf8():
    """From here on, labels of any script and file names of any bytes can be printed, whatever the locale."""
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    if sys.stderr.encoding != "utf-8":
        sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")


# --- files ------------------------------------------------------------------------------------------------------------

@contextmanager
def reading(path, what, remedy):
    """`with reading(path, "label file", "give a UTF-8 text file") as path:` around code that reads a file. Every
    failure in it (missing, no permission, damaged, another form) raises UsageError, with what the file is, its path,
    the reason and the remedy. A UsageError passes through unchanged."""
    try:
        yield Path(path)
        return
    except (UsageError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(f"{what} {path}: no such file; {remedy}") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except (ValueError, RuntimeError) as error:
        reason = shorten(str(error), 200)
    except Exception as error:  # a file of another form may raise any kind, here or in a library
        reason = f"not in the form expected ({error!r:.200})"
    raise UsageError(f"{what} {path}: {reason}; {remedy}")


def read_text(path, what):
    """The text of a UTF-8 file, with or without a byte order mark, plain or gzip (.gz). Raises UsageError."""
    with reading(path, what, "give a UTF-8 text file") as path:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")


def lines_of(path, what):
    """The lines of a text file that are not blank, stripped. Raises UsageError."""
    lines = read_text(path, what).split("\n")  # splitlines would also cut at U+2028
    return [line.strip() for line in lines if line.strip()]


def read_json(path, what):
    """The value in a JSON file, plain or gzip. Raises UsageError."""
    with reading(path, what, "give valid JSON"):
        return json.loads(read_text(path, what))


def write_atomically(path, content):
    """Write str or bytes so that the path holds either the old content or the new, never a part. A str may hold file
    names that are not UTF-8. -> Path. Raises UsageError."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode("utf-8", "surrogateescape")
        partial.write_bytes(content)
        os.replace(partial, path)
        return path
    except OSError as error:
        if partial.is_file():
            partial.unlink()
        raise UsageError(f"cannot write {path}: {error.strerror or error}; mend that or choose another place") from None


def write_json(path, value):
    """Write strict JSON: nan and infinity become null, a Path its text. -> Path. Raises UsageError."""
    strict = json.loads(json.dumps(value, default=os.fspath), parse_constant=lambda _: None)
    return write_atomically(path, json.dumps(strict, indent=1) + "\n")


LOCK_SECONDS = float(os.environ.get("LOCK_SECONDS", 8))  # a killed run's decoding workers hold its lock for up to five


class HeldLock(FileLock):
    """A lock that is already acquired: `with` only releases it at the end."""
    def __enter__(self):
        return self


def hold(path, what):
    """Lock the file at path, which is created if missing -> the lock, held until `.release()`, the end of a `with`, or
    the end of the process; keep a reference to it. Raises UsageError if another process still holds it after
    LOCK_SECONDS."""
    with reading(path, what, "choose another folder") as path:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = HeldLock(path, LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(f"{what}: another run is writing it; wait for it, or choose another folder") from None
    return lock


def digest(path):
    """Identity of a file's content, 16 hexadecimal digits. Raises UsageError."""
    with reading(path, "file", "check the path") as path:
        return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


# --- label names ------------------------------------------------------------------------------------------------------

# {dataset: {a label as its files spell it: words for a prompt}}, in the order of the labels' columns
LABEL_WORDS = read_json(ASSETS / "labels/names.json", "label names")
DATASETS = ("scenes", *LABEL_WORDS, "folder")


# format characters that visible keeps: two joiners that some scripts need, and marks that turn the direction of
# writing, which check_names refuses
FORMAT_KEPT = "\u200c\u200d\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
OTHER_SCRIPT = re.compile(r"[^\W\d_\0-\u02ff\u1d00-\u1eff]")  # letters that are not Latin


def visible(text):
    """The text in composed characters, without Unicode's format characters, which cannot be seen."""
    if text.isascii():
        return text
    letters = [letter for letter in text if letter in FORMAT_KEPT or unicodedata.category(letter) != "Cf"]
    return unicodedata.normalize("NFC", "".join(letters))


def fold(text):
    """The form in which texts and names are compared: visible, with straight apostrophes, in lower case."""
    return visible(text).replace("’", "'").casefold()


def plain(phrase):
    """fold, with hyphens and runs of spaces replaced by one space."""
    return re.sub(r"[\s-]+", " ", fold(phrase)).strip()


@lru_cache(None)
def clean_name(name, source):
    """A label as it stands in prompts: visible, with "dining_table" as dining table."""
    if "_" in name:
        say_once(f"{source}: an underscore in a label is read as a space")
    return re.sub(r"[_\r\n]+", " ", visible(name)).strip()


def check_names(names, source):
    """Names in the form of clean_name -> list of str. Raises UsageError if there is none, if two are equal (case and
    hyphens aside), or if one cannot be printed."""
    names = [clean_name(name, source) for name in names]
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
        raise UsageError(f"{source}: holds no label; write at least one")
    return names


def own_names(names, source):
    """check_names for the user's own labels, and one line about those in another script than CLIP was trained on"""
    names = check_names(names, source)
    foreign = [name for name in names if OTHER_SCRIPT.search(name)]
    if foreign:
        say_once(f"{source}: label '{foreign[0]}' ({len(foreign)} of {len(names)} in another script): CLIP was trained "
                 "on English texts; English names work better")
    return names


def read_labels(path):
    """The names in a label file, UTF-8, one a line, blank lines skipped. -> list of str. Raises UsageError."""
    names = own_names([line for line in lines_of(path, "label file") if clean_name(line, path)], path)
    odd = [name for name in names if re.match("[#*-]|.*,", name)]
    if odd:
        say(f"{path}: '{odd[0]}' is taken as a label, word for word; write one name a line, without bullets, commas")
    return names


def label_names(dataset, root=None, known=()):
    """Readable names of a dataset's labels, in the order of their columns -> list of str. root: needed for "folder";
    known: see load_photos."""
    if dataset == "scenes":
        return scenes.NAMES
    if dataset == "folder":
        return load_photos("folder", root, "train", known=known).names
    return list(LABEL_WORDS[dataset].values())


def synonyms_of(names, dataset=None):
    """{name: [other words for it]}, of a dataset that has some; under "" phrases that name no label ("hot dog")"""
    path = ASSETS / f"labels/{dataset}.json"
    table = read_json(path, "synonyms") if path.is_file() else {}
    return {name: table.get(name, []) for name in ["", *names]}


# --- texts ------------------------------------------------------------------------------------------------------------

IRREGULAR_PLURALS = {"man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice",
                     "goose": "geese", "foot": "feet", "tooth": "teeth", "ox": "oxen"}


def plurals(words):
    """Regular plurals of a noun phrase, or the irregular one. -> set of str"""
    last = words.split(" ")[-1]
    if last in IRREGULAR_PLURALS:
        return {words.removesuffix(last) + IRREGULAR_PLURALS[last]}
    endings = (("([^aeiou])y$", r"\1ies"), ("fe?$", "ves"), ("(s|x|z|ch|sh|o)$", r"\1es"))
    changed = [re.sub(ending, plural, words) for ending, plural in endings]
    return {words + "s", *changed} - {words}


def noun_finder(names, synonyms=None):
    """-> find(text) -> [(column of the label, None for a phrase that names none; start; end)], places in fold(text).
    A label is found where its name, a synonym or a plural of them stands as whole words; names take precedence over
    synonyms, and both over plurals. The longest phrase wins: "hot dog" is no dog where "hot dog" is known."""
    phrases = [(plain(name), column) for column, name in enumerate(names)]
    if synonyms:
        for column, name in [*enumerate(names), (None, "")]:
            phrases += [(plain(word), column) for word in synonyms.get(name, [])]
    phrases += [(plural, column) for phrase, column in phrases for plural in plurals(phrase)]
    column_of = dict(reversed(phrases))  # the first of equal phrases counts
    longest_first = "|".join(map(re.escape, sorted(column_of, key=len, reverse=True)))
    pattern = re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)".replace(r"\ ", r"[\s-]+"))

    def find(text):
        return [(column_of[plain(found.group())], *found.span()) for found in pattern.finditer(fold(text))]
    return find


def labels_of(marked, names):
    """marked: N dicts {name: 1 or -1}, or {column: 1 or -1} where names is a range; others are 0 -> int8 [N, C]"""
    return np.array([[marks.get(name, 0) for name in names] for marks in marked], np.int8).reshape(-1, len(names))


def match_nouns(texts, names, synonyms=None):
    """The labels that noun_finder finds in the words of each sentence (as in TaI-DPT) -> int8 [N, C]"""
    find = noun_finder(names, synonyms)
    marked = [{column: 1 for column, _, _ in find(text)} for text in texts]
    return labels_of(marked, range(len(names)))


def read_labelled_texts(path, names):
    """Lines {"text": str, "labels": [names]} of a .jsonl file -> (list of str, int8 [N, C]). Raises UsageError."""
    texts = []
    marked = []
    for number, line in enumerate(read_text(path, "text file").split("\n"), 1):
        remedy = 'each line must be {"text": ..., "labels": [names in the list of labels]}'
        with reading(f"{path}, line {number}", "text file", remedy):
            if not line.strip():
                continue
            entry = json.loads(line)
            marks = {names.index(label): 1 for label in entry["labels"]}
            text = entry["text"].strip()
        if text:
            texts.append(text)
            marked.append(marks)
    return texts, labels_of(marked, range(len(names)))


def read_captions(path):
    """The captions in a file of COCO's form (".json"), or the lines of another -> list of str. Raises UsageError."""
    if ".json" not in Path(path).suffixes:
        return lines_of(path, "text file")
    with reading(path, "text file", "give COCO's captions"):
        return [entry["caption"].strip() for entry in read_json(path, "text file")["annotations"]]


def labelled(texts, labels):
    """The texts that have a label, and their labels -> (list of str, int8 [N, C])"""
    rows = np.flatnonzero(labels.any(1))
    return [texts[row] for row in rows], labels[rows]


def read_texts(path, names, synonyms=None):
    """Training texts of a file, plain or gzip -> (list of str, int8 [N, C]); those without a label are left out.
    .jsonl: lines {"text": str, "labels": [names]}; a label not among names is refused, since without it the text would
    count as lacking it. .json: COCO's captions; anything else: a caption a line; both labelled by match_nouns. Raises
    UsageError."""
    if ".jsonl" in Path(path).suffixes:
        texts, labels = read_labelled_texts(path, names)
    else:
        texts = read_captions(path)
        labels = match_nouns(texts, names, synonyms)
    found, labels = labelled(texts, labels)
    if not found:
        raise UsageError(f"text file {path}: none of {len(texts)} texts has one of the {len(names)} labels; check both")
    if len(found) < len(texts):
        say(f"{path}: {len(found)} of {len(texts)} texts have a label, the others are left out")
    return found, labels


def descriptions_of(dataset, names, path=None):
    """What each label looks like -> {name: sentence}, from path or assets/descriptions/<dataset>.json, of the form
    {"descriptions": {name: sentence}} or the inner table alone. Labels without a sentence are left out and named: for
    them the caller's template stands alone. Raises UsageError for another form, or if no label is described."""
    source = path or ASSETS / f"descriptions/{dataset}.json"
    if path is None and not source.is_file():
        say(f"{dataset}: no descriptions of its labels, the template stands alone; --descriptions FILE gives them")
        return {}
    with reading(source, "description file", 'it must be {"descriptions": {label: sentence, ...}}'):
        table = read_json(source, "description file")
        table = {name: " ".join(text.split()) for name, text in table.get("descriptions", table).items()}
    found = {name: table[name] for name in names if table.get(name)}
    if path and not found:
        raise UsageError(f"description file {path}: describes none of the labels ('{names[0]}' ...); check the names")
    missing = ", ".join(name for name in names if name not in found)
    if missing:
        say(f"{source}: describes {len(found)} of {len(names)} labels; the template stands alone for {missing:.200}")
    return found


def default_texts(dataset, names, count):
    """Generated texts, where the user gives none -> (list of str, int8 [N, C], their source in words): of the scenes
    grammar if it knows every label, else template sentences."""
    if dataset != "scenes" or not set(names).issubset(scenes.NAMES):
        say(f"no --texts: training on {count} template sentences (written by a fixed pattern, not by a language model)")
        return *template_texts(names, count), "template sentences"
    texts, labels = scenes.sentences(count, 0)
    labels = labels[:, [scenes.NAMES.index(name) for name in names]].astype(np.int8)
    if len(names) >= FEW:
        texts, labels = labelled(texts, labels)
    return texts, labels, "sentences of the scenes grammar"


def template_texts(names, count):
    """Sentences with 1 to 5 names each; every name comes first equally often. -> (list of str, int8 [count, C])"""
    openers = ("a photo of", "a picture of", "there is", "we see", "a photo with", "here is")
    rng = np.random.default_rng(0)
    texts = []
    marked = []
    order = []
    for _ in range(count):
        if not order:
            order = rng.permutation(len(names)).tolist()
        first = order.pop(0)
        others = rng.permutation(len(names))[:rng.integers(min(5, len(names)))]
        chosen = [first, *others[others != first]]
        words = [with_article(names[column]) for column in chosen]
        listed = f"{', '.join(words[:-1])} and {words[-1]}".removeprefix(" and ")
        texts.append(f"{openers[rng.integers(len(openers))]} {listed}.")
        marked.append(dict.fromkeys(chosen, 1))
    return texts, labels_of(marked, range(len(names)))


def with_article(name):
    """an apple, a dog"""
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def with_negatives(texts, labels, names):
    """Texts and their labels, followed by the sentences of assets/texts that name none of the labels. With fewer than
    FEW labels nearly every text has each of them, so there would be too few texts that lack one to learn from."""
    find = noun_finder(names)
    more = []
    for path in sorted((ASSETS / "texts").glob("*.jsonl.gz")):
        for line in lines_of(path, "shipped texts"):
            text = json.loads(line)["text"]
            if not find(text):
                more.append(text)
    return [*texts, *more], np.pad(labels, ((0, len(more)), (0, 0)))  # rows of 0


# --- photos -----------------------------------------------------------------------------------------------------------

def files_under(folder):
    """Files and folders under a folder, at any depth, hidden ones left out -> sorted Paths"""
    paths = sorted(folder.rglob("*"))  # rglob does not enter linked folders
    return [path for path in paths if "/." not in f"/{path.relative_to(folder).as_posix()}"]


def list_photos(path):
    """Photos under a folder (any depth, hidden ones left out), or the one file -> sorted Paths. Linked and locked
    folders, videos, and photos that Pillow cannot read are left out; one line for each kind counts them. Raises
    UsageError."""
    path = Path(path)
    if path.is_file():
        return [path]
    photos = []
    left_out = {}
    for file in files_under(path):
        suffix = file.suffix.lower()
        if isdir(file):
            if file.is_symlink() or not os.access(file, os.R_OK | os.X_OK):
                left_out.setdefault("folders, linked or locked, are left out", []).append(file)
        elif suffix in PHOTO_SUFFIXES and isfile(file):
            photos.append(file)
        elif suffix in UNREAD:
            left_out.setdefault(f"{suffix} {UNREAD[suffix]}", []).append(file)
    for what, files in left_out.items():
        say(f"{path}: {len(files)} {what} (first: {files[0]})")
    if not photos:
        reason = "no photo in this folder" if path.exists() else "no such file or folder"
        raise UsageError(f"photos {path}: {reason}; photos end in {' '.join(PHOTO_SUFFIXES)}")
    return photos


@contextmanager
def without_warnings():
    with catch_warnings():
        simplefilter("ignore")
        yield


def open_photo(photo, side=1 << 30):
    """Path or scenes' (split, index) -> PIL RGB, turned upright by its EXIF mark if that can be read. side: a large
    JPEG is decoded at a half, a quarter or an eighth of its size if both sides keep at least that many pixels, which
    takes a fifth of the time. Raises OSError or ValueError."""
    if isinstance(photo, tuple):
        return scenes.picture(*photo)[0]
    if Path(photo).suffix.lower() in HEIC and find_spec("pillow_heif"):
        from pillow_heif import register_heif_opener
        register_heif_opener()
    with without_warnings(), Image.open(photo) as image:  # Pillow warns of odd EXIF, palettes, sizes
        image.draft("RGB", (side, side))
        image.load()  # raises if the file is torn
        with suppress(Exception):  # EXIF may hold anything
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
            pixels = np.asarray(image)
            unused = 8
            if pixels.max() < 1 << 12:  # a camera's 12 bits
                unused = 4
            image = Image.fromarray(np.uint8(pixels >> unused))
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a pixel; convert it to 8 or 16")
        return image.convert("RGB")


def drawn(total, count=None):
    """`count` of the rows 0 .. total-1, drawn by a fixed seed, a larger count adding to a smaller; None: all. -> sorted
    int array"""
    return np.sort(np.random.default_rng(0).permutation(total)[:count])


def check_marks(labels, source):
    """Raises UsageError for labels other than 1, 0 and -1: once, so that the loss need not check them in every step."""
    if not np.isin(labels, (-1, 0, 1)).all():
        raise UsageError(f"{source} must hold 1 (present), 0 (absent) or -1 (ignored) only")


@dataclass
class LabelledPhotos:
    """`photos, labels = load_photos(...)` works too."""
    photos: list        # N paths, or (split, index) for pictures of scenes
    labels: np.ndarray  # int8 [N, C]
    policy: str         # how doubtful labels were treated, for the record
    doubts: list = field(default_factory=list)  # what looks wrong, a line each: load_photos says it, --check counts it
    names: list = field(default_factory=list)   # C readable names ("dining table")

    def __post_init__(self):
        check_marks(self.labels, "labels")

    def __iter__(self):
        return iter((self.photos, self.labels))

    def at(self, rows):
        """The photos and labels of some rows."""
        return replace(self, photos=[self.photos[row] for row in rows], labels=self.labels[rows])


def load_photos(dataset, root, split, count=None, policy=(), known=()):
    """Labelled photos of a dataset -> LabelledPhotos. split: "train" or "test"; policy: words "NAME=VALUE"; known:
    labels of several words, for a file of the user's that puts only spaces between labels. Photos that do not exist are
    counted and left out; `count` of the rest are taken, by `drawn`. Raises UsageError, with what is missing and where
    to get it."""
    import datasets  # here and not above, because datasets.py imports this file
    return datasets.load_photos(dataset, root, split, count, policy, known)


def identity(dataset, root):
    """Digest of what decides the content of a set that is not published: of scenes the drawing code and the toy CLIP,
    of a folder its label files. -> str, empty for a published set"""
    if dataset == "scenes":
        return digest(scenes.__file__) + digest(scenes.CHECKPOINT)
    if dataset != "folder":
        return ""
    import datasets
    root = Path(root)
    content = []
    for path in datasets.label_files(root)[1]:
        content.append(str(path.relative_to(root)))
        if path.suffix.lower() not in PHOTO_SUFFIXES:  # a photo counts by its path alone
            content.append(digest(path))
    return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()


# --- tables of labels, ready-made embeddings --------------------------------------------------------------------------

@dataclass
class Table:
    files: list         # N file names
    names: list         # C label names
    labels: np.ndarray  # int8 [N, C]
    splits: list        # N words of the column "split", "" without one


def table_of(rows, source, names=()):
    """rows: (file, {clean name: 1 or -1}, its split or "") each; other labels are 0 -> Table with the labels in the
    order of names, or in that of the alphabet. Raises UsageError."""
    files = [file for file, _, _ in rows]
    marked = [marks for _, marks, _ in rows]
    splits = [word for _, _, word in rows]
    names = own_names(names or sorted(set().union(*marked)), source)
    return Table(files, names, labels_of(marked, names), splits)


def read_rows(path):
    """The cells of a table, separated by comma, semicolon or tab, or as Excel's first line "sep=;" says -> its rows
    that are not blank, lists of str, at least as long as the first. Raises UsageError, ValueError or csv.Error."""
    lines = io.StringIO(read_text(path, "labels").lstrip("\r\n"), newline="")  # a quoted cell may hold a line break
    line = lines.readline()
    if re.match("(?i)sep=.", line):
        separator = line[4]
    else:
        separator = max(",;\t", key=line.count)
        lines.seek(0)
    cells = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    stripped = [[cell.strip() for cell in row] for row in cells]
    rows = [row for row in stripped if any(row)]
    width = len(rows[0])
    for row in rows:
        if len(row) < width or any(row[width:]):
            raise ValueError(f"row of {row[0]}: {len(row)} cells, the first line has {width}")
    return rows


MARK = re.compile(r"[-+.\d]+|yes|no|true|false", re.IGNORECASE)  # a cell that is a mark, and no label


def mark_of(cell):
    """A cell -> 1, 0 or -1. Raises ValueError or KeyError for another cell."""
    words = {"": 0, "no": 0, "false": 0, "yes": 1, "true": 1}
    return {1: 1, 0: 0, -1: -1}[float(words.get(cell.lower(), cell))]


def labels_in(cells, source, known):
    """Cells of labels, cut at ; | , and line breaks, or at spaces if no cell has one of these -> list of {label: 1}.
    known: labels that are not cut at spaces"""
    text = "".join(cells)
    label = "[^;|,\n]+"
    if not re.search("[;|,\n]", text):
        longest_first = sorted(known, key=len, reverse=True)
        label = "|".join([re.escape(name) + r"(?!\S)" for name in longest_first] + [r"\S+"])
        if " " in text and not known:
            say_once(f"{source}: labels are cut at spaces; if a name has several words, write ';' between labels, or "
                     "name them all by --labels")
    lists = [[word.strip("[]'\" \r") for word in re.findall(label, cell)] for cell in cells]  # perhaps Python's lists
    return [{clean_name(word, source): 1 for word in words if word} for words in lists]


def read_table(path, dataset=None, spelt=list, known=()):
    """A table with a header: file names, then a column of 1, 0 and -1 for each label, or one column of labels, perhaps
    a column "split" -> Table. dataset: the table must have exactly its labels, which are put into its order; spelt:
    function of the headings that spells them as the dataset does; known: see load_photos. Raises UsageError."""
    remedy = "cells are a file, then each label's 1, 0 or -1, or one cell of labels"
    with reading(path, "labels", remedy) as path:
        table = read_rows(path)
        if not table[0][0] and all(row[0].isdecimal() for row in table[1:]):
            table = [row[1:] for row in table]  # without pandas' count of the rows
        (first, *titles), *rows = table
        titles = spelt([re.sub("(?i)^split$", "split", title) for title in titles])
        files = [row[0] for row in rows]
        rows = [dict(zip(titles, row[1:], strict=False)) for row in rows]
        titles = [title for title in titles if title not in ("", "split")]
        if {"0", "1", "-1"} & set(titles) or first.lower().endswith(PHOTO_SUFFIXES):
            raise ValueError("the first line must name the columns, a label each")
        own_names(titles, path)  # none stands twice
        names = LABEL_WORDS.get(dataset, titles)
        odd = sorted(set(names) ^ set(titles))
        if odd:
            raise ValueError(f"the header has or lacks {', '.join(odd[:5])}")
        cells = [row[titles[0]] for row in rows]
        marked = []
        if len(titles) == 1 and any(cells) and not any(map(MARK.fullmatch, cells)):
            names = []  # they are in the cells
            marked = labels_in(cells, path, known)
        else:
            for file, row in zip(files, rows, strict=True):
                with reading(f"{path}, row of {file}", "labels", remedy):
                    marked.append({clean_name(name, path): mark_of(row[name]) for name in names})
        splits = [row.get("split", "") for row in rows]
        return table_of(list(zip(files, marked, splits, strict=True)), path, names)


FEATURE_AXES = {"text_embeddings": "ND", "text_labels": "NC", "image_embeddings": "MD", "image_labels": "MC",
                "label_embeddings": "CD", "label_names": "C"}


def load_features(path):
    """Ready-made embeddings of any encoder pair, one .npz (no pickles): text_embeddings [N, D], text_labels [N, C],
    image_embeddings [M, D], image_labels [M, C], label_embeddings [C, D], label_names [C]; labels are 1, 0 or -1.
    -> {name: float32 or int8 array, list of str for label_names}. Raises UsageError if one is missing or misfits."""
    arrays = {}
    sizes = {}
    remedy = f"it must be an .npz without pickles of {', '.join(FEATURE_AXES)}"
    with reading(path, "features file", remedy), np.load(path, allow_pickle=False) as stored:
        for name, axes in FEATURE_AXES.items():
            array = stored[name]
            shape = list(array.shape)
            expected = [sizes.setdefault(axis, size) for axis, size in zip(axes, shape, strict=False)]
            if array.ndim != len(axes) or shape != expected or 0 in shape:
                raise ValueError(f"{name} has shape {shape}, expected {expected}")
            if name == "label_names":
                arrays[name] = check_names(array.astype(str).tolist(), f"features file {path}")
            elif name.endswith("_labels"):
                check_marks(array, f"features file {path}: {name}")
                arrays[name] = array.astype(np.int8, order="C")
            elif np.isfinite(array).all():
                arrays[name] = array.astype(np.float32, order="C")
            else:
                raise ValueError(f"{name} holds values that are not finite numbers")
    return arrays
