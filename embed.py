"""CLIP through open_clip, frozen; features of texts and photos, computed a batch at a time and cached a row each.

N texts or photos, K photos that could be read, b photos in a batch, M regions, D width of CLIP's joint space.
"""
import functools
import json
import logging
import multiprocessing
import os
import re
import sqlite3
import sys
import threading
from contextlib import suppress
from difflib import get_close_matches
from hashlib import blake2b
from math import sqrt
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import distributed
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

import data
import scenes
from data import UsageError, say, say_once

WEIGHTS = Path(__file__).parent / "weights"  # where weights fetched by hand may be put: <backbone>.<tag>.safetensors
BATCH = 64  # photos encoded at once and stored in one transaction; a killed run loses at most one batch
NO_WEIGHTS = {  # {pattern of a file's start or of the error it gives: what the file is}
    "TorchScript": "a TorchScript archive (OpenAI's own form), which holds code; save its state_dict() alone",
    "^\x80|GLOBAL": "a file of pickled objects, which may run code; save the model's state_dict() alone",
    "^version https://git-lfs": "a Git LFS pointer in place of the weights; run git lfs pull",
    r"^\W*<": "a web page",
    r"^\W*[{[]": "JSON, such as the error message of a server",
    "": "an empty, damaged or incomplete file, or not what its name says",
}
NO_PARAMETERS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # in OpenAI's and old files


# --- CLIP -------------------------------------------------------------------------------------------------------------

@functools.cache
def import_open_clip():
    """Import open_clip, even if torchvision's wheel does not fit torch's build, and add the model "scenes" -> module"""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # torchvision's PyPI wheel beside a CPU build of torch: its compiled operators are missing, and its import stops
        # where it registers a fake kernel for the first of them. It is enough to declare them: nothing here calls them.
        for name in ("torchvision::nms", "torchvision::qnms"):
            torch.library.define(name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip
    open_clip.factory._MODEL_CONFIGS["scenes"] = scenes.CLIP_CONFIG
    logging.getLogger().addFilter(lambda record: record.module != "factory")  # which warns of random weights
    return open_clip


class ImportsFirst:
    """Takes the model's place in a worker process: unpickling it imports what torchvision's transforms need."""
    def __reduce__(self):
        return import_open_clip, ()


class Clip(NamedTuple):
    model: torch.nn.Module  # any of open_clip's, frozen, in eval mode
    tokenizer: object       # list of str -> int64 [N, context length]
    preprocess: object      # PIL RGB -> float32 [3, H, W]
    name: str               # for messages and records
    key: str                # hash of what the model computes, by which a checkpoint knows its encoder
    precision: str          # "fp32" or "bf16"
    image_size: tuple       # (H, W), pixels that the image tower sees
    device: torch.device


def autocast(device, precision):
    """Context manager in which matrix products run in bfloat16 (precision "bf16") or stay as they are ("fp32")."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


def load_clip(backbone="scenes", pretrained=None, device="cpu", precision="fp32", resolution=None):
    """A frozen CLIP. backbone: "scenes" (the toy CLIP), open_clip's name, local-dir:FOLDER or hf-hub:OWNER/NAME;
    pretrained: open_clip's tag, a file, "none" for random weights (seed 0), None for the backbone's default;
    precision: "fp32" or "bf16"; resolution: image side in pixels, None for the backbone's own. -> Clip
    Raises UsageError for an unknown backbone, and for weights that cannot be fetched or belong to another model."""
    open_clip = import_open_clip()
    models = open_clip.list_models()
    name = backbone
    if backbone == "scenes":
        pretrained = pretrained or str(scenes.CHECKPOINT)
    elif ":" not in backbone:
        pretrained = pretrained or "openai"
        backbone = backbone.replace("/", "-")
        name = f"{backbone} ({pretrained})"
        if backbone not in models:
            near = ", ".join(get_close_matches(backbone, models, 3, 0))
            raise UsageError(f"--backbone {backbone}: open_clip has no model of this name; try {near}")
    tag = open_clip.get_pretrained_cfg(backbone, str(pretrained))  # {} for a file
    path = _find_weights(backbone, pretrained, tag)
    remedy = "give weights of this very model (the .safetensors that open_clip fetches), or install the package named"
    with data.reading(path or name, f"--backbone {backbone}, weights", remedy):
        config = open_clip.get_model_config(backbone)
        config.setdefault("quick_gelu", tag.get("quick_gelu", False))
        tokenizer = open_clip.get_tokenizer(backbone)
        model = _build(backbone, config, tag, resolution)
        if path:
            _load_weights(model, path)
        if resolution:
            _resize(model, resolution)
        key = _hash(model, config)
    look = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    preprocess = open_clip.transform.image_transform_v2(look, is_train=False)
    if path == str(pretrained) and backbone != "scenes":
        say(f"{path}: read with quick_gelu {config['quick_gelu']} (True under names in -quickgelu, for OpenAI's weights"
            f" and others), mean {look.mean}, std {look.std}, resize_mode {look.resize_mode}; if it was trained with "
            "others, put it beside an open_clip_config.json that holds them and pass --backbone local-dir:FOLDER")
    device = torch.device(device)
    return Clip(model.to(device), tokenizer, preprocess, name, key, precision, look.input_size[1:], device)


def _find_weights(backbone, pretrained, tag):
    """Path of a backbone's weights, fetched if need be; None for random ones. Raises UsageError, which says what to
    fetch and where to put it."""
    from huggingface_hub import constants, hf_hub_url
    from open_clip import list_pretrained_tags_by_model
    from open_clip.factory import _find_checkpoint_in_dir, parse_model_name
    from open_clip.pretrained import download_pretrained_from_hf
    if pretrained == "none":
        say(f"--backbone {backbone}: random weights, as --pretrained none asks for")
        return None
    by_hand = f"{WEIGHTS}/{backbone}.{pretrained}"
    for path in (str(pretrained), f"{by_hand}.safetensors", f"{by_hand}.pt", f"{by_hand}.bin"):
        if os.path.isfile(path):
            return path
    if pretrained and not tag:
        tags = ", ".join(list_pretrained_tags_by_model(backbone)) or "a file"
        raise UsageError(f"--pretrained {pretrained}: no file, and open_clip has no such weights of {backbone}; "
                         f"try {tags}")
    schema, source = parse_model_name(backbone)
    if schema == "local-dir":
        data.read_json(f"{source}/open_clip_config.json", "configuration")
        return _find_checkpoint_in_dir(Path(source)) or f"{source}/open_clip_model.safetensors"
    repository, filename = os.path.split(tag.get("hf_hub", f"{source}/"))  # most have no file name
    url = hf_hub_url(repository, filename or "open_clip_model.safetensors")
    try:
        # Ask the host first: without a network, hub clients retry for a minute.
        with suppress(HTTPError):  # the host answers, and open_clip may know another file name
            urlopen(url, timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True  # weights that were fetched before are still found
    try:
        return download_pretrained_from_hf(repository, filename)
    except Exception as error:  # hub clients raise many kinds
        place = f"put it at {by_hand}{Path(url).suffix}"
        if schema:
            place = "put it and open_clip_config.json into a folder and pass --backbone local-dir:FOLDER"
        raise UsageError(f"weights of {backbone} are not on this machine and cannot be fetched ({error}): get {url}, "
                         f"{place}") from None


def _build(backbone, config, tag, resolution):
    """open_clip's model, frozen, with random weights of seed 0 and the preprocessing of the tag."""
    from open_clip import create_model
    patch = config["vision_cfg"].get("patch_size", 1)  # timm's models have none, a ResNet has None
    if resolution and (resolution < 1 or resolution % (patch or 32)):
        raise UsageError(f"--resolution {resolution}: must be a positive multiple of {patch or 32} for {backbone}")
    if patch in (1, None):
        resolution = None  # open_clip resizes position embeddings for its own ViT only; _resize does the others
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(backbone, load_weights=False, pretrained_text=False, force_quick_gelu=config["quick_gelu"],
                             force_preprocess_cfg=tag, force_image_size=resolution)
    return model.requires_grad_(False).eval()


def _load_weights(model, path):
    """Fill a model from a file of any precision. A prefix of the tensors' names, such as "module.", is dropped. Raises
    many kinds of errors; ValueError if the file holds no weights, or weights in another form."""
    from unittest.mock import patch

    from open_clip import factory
    try:
        with catch_warnings():
            simplefilter("ignore")  # torch warns of a TorchScript archive
            stored = factory.load_state_dict(path)
            stored = max((value for value in [stored, *stored.values()] if isinstance(value, dict)), key=len)
    except OSError:  # such as no such file
        raise
    except Exception as error:  # torch and safetensors raise many kinds, and advise loading what must not be loaded
        with open(path, "rb") as file:
            seen = f"{file.read(40).decode('latin-1')} {error}"
        kinds = [kind for sign, kind in NO_WEIGHTS.items() if re.search(sign, seen)]
        raise ValueError(f"this is {kinds[0]}") from None
    token_ids = stored.pop("token_ids", None)
    ends = [name for name in stored if name.endswith("logit_scale")]  # every model has one, beside all its parts
    prefix = min(ends, key=len, default="").removesuffix("logit_scale")
    state = {}
    for name, tensor in stored.items():
        if "vision_model." in name:
            raise ValueError("this has the names of transformers' models; get it in open_clip's form")
        own = name.removeprefix(prefix).replace("_orig_mod.", "")
        if isinstance(tensor, torch.Tensor) and name.startswith(prefix) and own.split(".")[-1] not in NO_PARAMETERS:
            if tensor.element_size() < 2:
                raise ValueError(f"{name} is {tensor.dtype}: quantised weights cannot be read")
            state[own] = tensor.float()  # half precision cannot be resized on a CPU
    if token_ids is not None:
        # The toy CLIP's file holds only the rows that captions can reach: they go back into the full table.
        table = torch.zeros_like(model.token_embedding.weight)
        table[token_ids] = state["token_embedding.weight"]
        state["token_embedding.weight"] = table
    with patch.object(factory, "load_state_dict", return_value=state):  # else it would read the file again
        factory.load_checkpoint(model, path)


def _resize(model, resolution):
    """Change the resolution of an image tower that has its weights: one of timm's, or a ResNet."""
    from open_clip.model import resize_pos_embed
    visual = model.visual
    if hasattr(visual, "set_input_size"):  # timm's
        visual.set_input_size(resolution)
    if hasattr(visual, "attnpool"):
        # A ResNet's position embeddings are in its attention pool; open_clip interpolates them under a ViT's name.
        visual.grid_size = resolution // 32
        positions = visual.attnpool.positional_embedding
        state = {"visual.positional_embedding": positions}
        resize_pos_embed(state, model)
        positions.data = state["visual.positional_embedding"]
    visual.preprocess_cfg["size"] = (resolution, resolution)


def _hash(model, config):
    """Hash of what a model computes: its weights, its configuration with the activation, its preprocessing. Raises
    ValueError for weights that are not finite."""
    described = json.dumps([config, model.visual.preprocess_cfg], sort_keys=True)
    digest = blake2b(described.encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.isfinite().all():
            raise ValueError(f"hold values that are not finite (in {name})")
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


# --- photos -----------------------------------------------------------------------------------------------------------

def load_photo(clip, photo, generator=None, smallest=1.0):
    """A photo as CLIP sees it, float32 [3, H, W], with CLIP's mean and standard deviation: its preprocessing (shorter
    side resized, centre crop), or with numpy's generator a random resized crop of `smallest` to 1 of the area, aspect
    3/4 to 4/3, and a flip half of the time. Raises UsageError if it cannot be read."""
    try:
        image = data.open_photo(photo, int(2 * max(224, *clip.image_size) / sqrt(smallest)))
        width, height = image.size
        if generator is None:
            if max(image.size) > 100 * min(image.size):  # such a strip, resized, could take gigabytes
                image = ImageOps.fit(image, [min(image.size)] * 2)
            return clip.preprocess(image)
        area = width * height * generator.uniform(smallest, 1)
        aspect = (4 / 3) ** generator.uniform(-1, 1)
        crop_width = min(width, sqrt(area * aspect))
        crop_height = min(height, sqrt(area / aspect))
        left = generator.uniform(0, width - crop_width)
        top = generator.uniform(0, height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        image = image.resize(clip.image_size[::-1], Image.BICUBIC, box)
        if generator.random() < 0.5:
            image = ImageOps.mirror(image)
        to_tensor, normalise = clip.preprocess.transforms[-2:]
        return normalise(to_tensor(image))
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UsageError(f"photo {photo}: cannot be read ({error})") from None


def _decode(clip, augment, batch):
    """Runs in a worker. batch: [(row, photo), ...] -> (numpy images [b, 3, H, W], {place in it: why it is not read})"""
    images = np.zeros((len(batch), 3, *clip.image_size), np.float32)
    wrong = {}
    seed, epoch, smallest = augment or (None, None, 1.0)
    for place, (row, photo) in enumerate(batch):
        generator = augment and np.random.default_rng([seed, epoch, row])
        try:
            images[place] = load_photo(clip, photo, generator, smallest)
        except UsageError as error:
            wrong[place] = str(error)
    return images, wrong


def _end_with_parent(worker):
    """Let a worker process end when its parent is killed: else it would wait for ever to hand over its batch."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def decoded(clip, photos, batches, workers, augment=None):
    """Photos decoded by worker processes (None: one per core, at most 16) while the caller computes. batches: lists of
    b row indices (int) into photos; augment: None, or (seed, epoch, smallest share of the area) for random crops that
    depend on (seed, epoch, row) alone. -> iterator over (images float32 [b, 3, H, W], readable bool [b]). A photo that
    cannot be read is all zeros, and is named once on stderr."""
    if workers is None:
        workers = 16
    if len(batches) < 2:
        workers = 0
    # Workers hand over numpy arrays, which go through a pipe: tensors would go through /dev/shm, and Docker's 64 MB of
    # it do not hold a batch. Without a generator of its own a DataLoader draws from torch's global one.
    decode = functools.partial(_decode, clip._replace(model=ImportsFirst(), tokenizer=None), augment)
    loader = DataLoader(list(enumerate(photos)), batch_sampler=batches, collate_fn=decode,
                        num_workers=min(workers, os.cpu_count()), generator=torch.Generator(),
                        worker_init_fn=_end_with_parent)
    for images, wrong in loader:
        for reason in wrong.values():
            say_once(f"{reason}; left out")
        yield torch.from_numpy(images), torch.tensor([place not in wrong for place in range(len(images))])


# --- cache ------------------------------------------------------------------------------------------------------------

@functools.cache
def say_of_process(message):
    """Print a message once, even in a process of torchrun that is otherwise silent."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        say(message)
    else:
        print(f"process {rank}: {message}", file=sys.__stderr__)


class Cache:
    """Rows of tensors in SQLite, keyed by encoder and item, in one file for all processes: a row is there as a whole or
    not at all. A damaged file is set aside and made anew; if the file cannot be opened or written, the run goes on
    without a cache and says so once. folder None: keeps nothing."""

    def __init__(self, folder):
        self.path = folder and Path(folder, "features.sqlite")
        self.connection = None

    def get(self, encoder, item):
        """-> {name: tensor}, or None if there is no such row."""
        rows = self.run("SELECT tensors FROM features WHERE encoder = ? AND item = ?", [(encoder, item)])
        return next(iter(rows), None)

    def put(self, encoder, rows):
        """Store {item: {name: tensor}} in one transaction."""
        values = [(encoder, item, save(tensors)) for item, tensors in rows.items()]
        self.run("INSERT OR REPLACE INTO features VALUES (?, ?, ?)", values)

    def run(self, command, rows):
        """Execute an SQL command for each row of values. -> list of the {name: tensor} that it finds"""
        if not self.path:
            return []
        try:
            if not self.connection:
                os.makedirs(self.path.parent, exist_ok=True)
                self.connection = sqlite3.connect(self.path, timeout=60)  # seconds to wait for another process
                self.connection.execute("CREATE TABLE IF NOT EXISTS features "
                                        "(encoder TEXT, item TEXT, tensors BLOB, PRIMARY KEY (encoder, item))")
            with self.connection:
                return [load(tensors) for values in rows for (tensors,) in self.connection.execute(command, values)]
        except (OSError, sqlite3.OperationalError) as error:  # such as no permission, disk full, locked
            say_of_process(f"cache {self.path}: continuing without it ({error})")
        except (sqlite3.DatabaseError, SafetensorError) as error:
            self.connection.close()
            self.connection = None
            with suppress(OSError):
                os.replace(self.path, f"{self.path}.damaged")
            say_of_process(f"cache {self.path}: damaged ({error}); renamed to .damaged and made anew")
        return []


def _identity(photo):
    """A photo's key in the cache: its name, size, time and last 16 kB, since cameras reuse names; not its folder, which
    may be moved. For scenes: which picture, and a digest of the drawing code."""
    if isinstance(photo, tuple):
        return f"{photo} {scenes.DIGEST}"
    try:
        with open(photo, "rb") as file:
            status = os.fstat(file.fileno())
            file.seek(max(status.st_size - 16384, 0))
            end = blake2b(file.read()).hexdigest()
    except OSError:
        return ascii(photo)  # it cannot be encoded either
    return ascii((os.path.basename(photo), status.st_size, status.st_mtime_ns, end))


# --- texts ------------------------------------------------------------------------------------------------------------

def _encode_text(model, tokens):
    """model.encode_text without the positions after the longest text's end token: CLIP's text encoder is causal and is
    read at the end token, so they change nothing. tokens: [N, context length] -> [N, D], not normalised"""
    if getattr(model, "text_pool_type", None) != "argmax" or model.attn_mask is None:
        return model.encode_text(tokens, normalize=False)
    ends = tokens.argmax(-1)
    longest = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :longest]) + model.positional_embedding[:longest]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:longest, :longest]))
    return x[torch.arange(len(tokens)), ends] @ model.text_projection


def embed_texts(clip, texts, cache=None, quiet=True):
    """Text embeddings, raw (not normalised), float32 [N, D] on the CPU. quiet: no progress bar."""
    _check_texts(clip, texts)
    store = Cache(cache)
    encoder = f"text {clip.key} {clip.precision}"
    rows = {text: store.get(encoder, text) for text in texts}
    missing = sorted((text for text in rows if not rows[text]), key=len)
    for start in tqdm(range(0, len(missing), BATCH), "embedding texts", disable=quiet or None):
        batch = missing[start:start + BATCH]
        tokens = clip.tokenizer(batch).to(clip.device)
        with torch.no_grad(), autocast(clip.device, clip.precision):
            embeddings = _encode_text(clip.model, tokens).float().cpu()
        fresh = {text: {"embedding": row} for text, row in zip(batch, embeddings, strict=True)}
        store.put(encoder, fresh)
        rows |= fresh
    return torch.stack([rows[text]["embedding"] for text in texts])


def _check_texts(clip, texts):
    """Say how many texts are too long, and which words the toy CLIP was not trained on: their rows are zero."""
    limit = clip.tokenizer.context_length
    tokens = clip.tokenizer([*texts, ""], limit + 1)  # [N + 1, limit + 1]; the empty text ends in padding
    cut = int((tokens[:, -1] != tokens[-1, -1]).sum())
    if cut:
        say(f"{cut} of {len(texts)} texts are longer than {limit} tokens and were cut off there")
    if clip.name == "scenes":
        table = clip.model.token_embedding.weight
        unknown = [token for token in tokens.unique().tolist() if not table[token].any()]
        if unknown:
            say(f"the scenes CLIP was not trained on {clip.tokenizer.decode(unknown[:10])}: they mean nothing to it")


# --- photos, encoded --------------------------------------------------------------------------------------------------

def encode_photos(clip, photos, encoder, encode, cache=None, workers=None, quiet=False, share=True, also=()):
    """Photos through an encoder, a row each, in their order; what is in the cache is not computed again. encoder: the
    encoder's key in the cache, a str; encode: images [b, 3, H, W] -> dict of tensors [b, ...]. -> generator of (row in
    photos, {name: tensor on the CPU}, or None if the photo cannot be read). Such photos are counted at the end.
    share: under torchrun each process first encodes its part of the photos into the cache; also: more pairs (encoder,
    encode), which also encode each photo that is not in the cache, and whose values are cached for later."""
    if share and cache and distributed.is_initialized():
        part = photos[distributed.get_rank()::distributed.get_world_size()]
        for _ in encode_photos(clip, part, encoder, encode, cache, workers, quiet, share=False, also=also):
            pass
        distributed.barrier()
    store = Cache(cache)
    keys = [_identity(photo) for photo in photos]
    missing = [row for row, key in enumerate(keys) if not store.get(encoder, key)]
    batch_at = {missing[start]: missing[start:start + BATCH] for start in range(0, len(missing), BATCH)}
    images_of = decoded(clip, photos, list(batch_at.values()), workers)
    fresh = {}  # of the batch at hand
    bad = 0
    for row, key in enumerate(tqdm(keys, "photos", disable=quiet or None)):
        if row in batch_at:
            images, readable = next(images_of)
            for kind, encode_kind in [*also, (encoder, encode)]:
                with torch.no_grad(), autocast(clip.device, clip.precision):
                    tensors = encode_kind(images.to(clip.device))
                fresh = {}
                for place, other in enumerate(batch_at[row]):
                    if readable[place]:
                        one = {name: values[place].cpu().contiguous() for name, values in tensors.items()}
                        fresh[keys[other]] = one
                store.put(kind, fresh)
        encoded = fresh.get(key) or store.get(encoder, key)
        if not encoded:
            bad += 1
        yield row, encoded
    if bad and share:
        say(f"{bad} of {len(photos)} photos could not be read; they are named above")


def _embed(clip, photos, kind, encode, cache, workers, quiet):
    """All that encode_photos yields -> ({name: tensor [K, ...]}, rows [K]). Raises UsageError if none could be read."""
    encoder = f"{kind} {clip.key} {clip.precision}"
    encoded = dict(encode_photos(clip, photos, encoder, encode, cache, workers, quiet))
    rows = [row for row in encoded if encoded[row]]
    if not rows:
        raise UsageError("no photo could be read; check the files named above")
    return default_collate([encoded[row] for row in rows]), np.array(rows)


def embed_photos(clip, photos, cache=None, workers=None, quiet=False):
    """Global image embeddings, raw. photos: paths or scenes' (split, index). A photo that cannot be read is named and
    left out. -> (float32 [K, D] on the CPU, rows [K] of those that were read). Raises UsageError if none was."""
    def encode(images):
        return {"embedding": clip.model.encode_image(images, normalize=False).float()}
    tensors, rows = _embed(clip, photos, "image", encode, cache, workers, quiet)
    return tensors["embedding"], rows


def embed_regions(clip, photos, image_features, cache=None, workers=None, quiet=False):
    """Global and region features, raw. image_features: (image tower, images) -> (x0 [b, D], X [b, M, D]).
    -> (float32 [K, D], float16 [K, M, D], rows [K] of the photos that were read); otherwise as embed_photos."""
    def encode(images):
        x0, X = image_features(clip.model.visual, images)
        return {"x0": x0.float(), "X": X.half()}
    tensors, rows = _embed(clip, photos, "regions", encode, cache, workers, quiet)
    return tensors["x0"], tensors["X"], rows


def download_voc2007(root):
    """Fetch and unpack VOC2007 (870 MB) under root, through torchvision, which checks the archives' hashes. Raises
    UsageError. In a shell: python -c "import embed; embed.download_voc2007('data')" """
    import_open_clip()  # so that torchvision can be imported
    from torchvision.datasets import VOCDetection
    try:
        for image_set in ("trainval", "test"):
            VOCDetection(str(root), year="2007", image_set=image_set, download=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"voc2007: download failed ({error}); fetch VOCtrainval_06-Nov-2007.tar and VOCtest_06-"
                         f"Nov-2007.tar by hand and unpack both under {root}") from None
