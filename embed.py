"""CLIP through open_clip, frozen; embeddings of texts and photos, streamed in batches and cached in blocks.

N texts or photos, K photos that could be read, b photos in a batch, M regions, D width of CLIP's joint space.
"""
import contextlib
import copy
import difflib
import functools
import hashlib
import math
import os
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import scenes
from data import UsageError, say

WEIGHTS = Path(__file__).parent / "weights"  # where weights fetched by hand may be put: <backbone>.<tag>.safetensors
TEXTS, PHOTOS = 4096, 64  # in a cache file; an interrupted run loses at most one of them
say_once = functools.cache(say)


def import_open_clip():
    """open_clip, also where torchvision's wheel does not fit torch's build. -> module"""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        # torchvision's PyPI wheel beside a CPU build of torch: its compiled operators are missing, and its import stops
        # where it registers a fake kernel for the first of them. Declaring them is enough: nothing here calls them.
        if "torchvision::nms does not exist" not in str(error):
            raise
        operators = import_open_clip.operators = torch.library.Library("torchvision", "DEF")  # to live as long as we do
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip
    return open_clip


class Clip(NamedTuple):
    model: torch.nn.Module  # open_clip.model.CLIP, frozen, in eval mode
    tokenizer: object       # list of str -> int64 [N, context length]
    preprocess: object      # PIL RGB -> float32 [3, H, W]
    name: str               # for people
    key: str                # hash of architecture, weights and preprocessing: what a checkpoint was trained on
    known_tokens: set       # token ids with trained rows; None: all of them
    precision: str          # "fp32" or "bf16"
    image_size: tuple       # (H, W), pixels that the image tower sees


def autocast(device, precision):
    """Context manager in which matrix products run in bfloat16 (precision "bf16") or stay as they are ("fp32")."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


def load_clip(backbone="scenes", pretrained=None, device="cpu", precision="fp32", resolution=None):
    """A frozen CLIP. backbone: "scenes" (the shipped tiny one) or open_clip's name; pretrained: open_clip's tag, a
    file, or "none" for random weights (seed 0); precision: "fp32" or "bf16"; resolution: pixels. -> Clip
    Raises UsageError for an unsupported backbone, and for weights that cannot be had or are of another model."""
    open_clip = import_open_clip()
    backbone = backbone.replace("/", "-")
    built_in = backbone == "scenes"
    config = copy.deepcopy(scenes.CLIP_CONFIG) if built_in else _named_config(open_clip, backbone)
    pretrained = pretrained or (str(scenes.CHECKPOINT) if built_in else "openai")
    tag = open_clip.get_pretrained_cfg(backbone, pretrained)  # {} for a file, for "none" and for scenes
    vision, resnet = config["vision_cfg"], not isinstance(config["vision_cfg"]["layers"], int)
    step = 32 if resnet else vision["patch_size"]
    if resolution and (resolution < 1 or resolution % step):
        raise UsageError(f"--resolution {resolution}: must be a positive multiple of {step} for {backbone}")
    if resolution and not resnet:
        vision["image_size"] = resolution
    config["quick_gelu"] = config.get("quick_gelu", False) or tag.get("quick_gelu", False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.model.CLIP(**config).requires_grad_(False).eval()
    path = None if pretrained == "none" else _find_weights(open_clip, backbone, pretrained)
    known_tokens = path and _load_weights(open_clip, model, backbone, path)
    if path and not (built_in or tag or "quickgelu" in backbone):
        say(f"{path}: if these are OpenAI's weights, use --backbone {backbone}-quickgelu (their activation)")
    visual = model.visual
    if resolution and resnet:
        # A ResNet's position embeddings are in its attention pool; open_clip interpolates them under a ViT's name.
        visual.image_size, visual.grid_size = (resolution, resolution), (resolution // 32, resolution // 32)
        state = {"visual.positional_embedding": visual.attnpool.positional_embedding.data}
        open_clip.model.resize_pos_embed(state, model)
        visual.attnpool.positional_embedding = torch.nn.Parameter(state["visual.positional_embedding"], False)
    look = open_clip.transform.merge_preprocess_dict({"size": visual.image_size}, tag)
    look = open_clip.transform.PreprocessCfg(**look)  # size, mean, standard deviation, interpolation
    digest = hashlib.blake2b(f"{backbone} {look}".encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    name, key = backbone if built_in else f"{backbone} ({pretrained})", digest.hexdigest()
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    preprocess = open_clip.transform.image_transform_v2(look, is_train=False)
    return Clip(model.to(device), tokenizer, preprocess, name, key, known_tokens, precision, look.input_size[1:])


def _named_config(open_clip, backbone):
    """open_clip's configuration of an OpenAI-style ViT or ResNet tower with CLIP's causal text transformer, for which
    both methods are written: it has these settings and no others. Raises UsageError for another backbone."""
    settings = {"embed_dim", "quick_gelu", "vision_cfg", "image_size", "patch_size", "head_width", "mlp_ratio",
                "ls_init_value", "text_cfg", "context_length", "vocab_size", "heads", "width", "layers"}
    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    supported = [name for name, config in configs.items()
                 if {*config, *config["vision_cfg"], *config["text_cfg"]} <= settings]
    if backbone not in supported:
        near = ", ".join(difflib.get_close_matches(backbone, [*supported, "scenes"], 3, 0))
        raise UsageError(f"--backbone {backbone}: open_clip has no OpenAI-style ViT or ResNet of this name; try {near}")
    return configs[backbone]


def _find_weights(open_clip, backbone, pretrained):
    """Local file of a backbone's weights, fetched if need be. UsageError says what to get, and where to put it."""
    by_hand = [WEIGHTS / f"{backbone}.{pretrained}.{suffix}" for suffix in ("safetensors", "pt", "bin")]
    for path in (Path(pretrained), *by_hand):
        if backbone == "scenes" or os.path.isfile(path):
            return path
    config = open_clip.get_pretrained_cfg(backbone, pretrained)
    if not config:
        tags = difflib.get_close_matches(pretrained, open_clip.list_pretrained_tags_by_model(backbone), 3, 0)
        raise UsageError(f"--pretrained {pretrained}: no file, and open_clip has no such weights of {backbone}; "
                         f"try {', '.join([*tags, 'none'])}")
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    repository, filename = config["hf_hub"].rstrip("/"), "open_clip_model.safetensors"
    for name in (filename, "open_clip_pytorch_model.bin"):
        if isinstance(cached := try_to_load_from_cache(repository, name), str):
            return Path(cached)
    request = urllib.request.Request(hf_hub_url(repository, filename), method="HEAD")
    try:
        # The host is asked first: hub clients try again for a minute where there is no network.
        with contextlib.suppress(urllib.error.HTTPError):  # it answers, and open_clip may know another file name
            urllib.request.urlopen(request, timeout=10).close()
        return Path(open_clip.download_pretrained(config))
    except Exception as error:  # hub clients raise many kinds
        raise UsageError(f"weights of {backbone} ({pretrained}) are not on this machine and cannot be fetched ({error})"
                         f": get {request.full_url}, put it at {by_hand[0]} or pass --pretrained FILE") from None


def _load_weights(open_clip, model, backbone, path):
    """Fill a model from a file. -> ids of the tokens that were trained (None: all). UsageError: what the file is."""
    def read(path):
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
        if not start or start.startswith(b"<"):
            raise ValueError("a web page, not weights" if start else "an empty file")
        if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
            raise ValueError("a TorchScript archive (OpenAI's own form), which holds code and is refused")
        try:
            state = open_clip.factory.load_state_dict(str(path), weights_only=True)
            state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        except Exception:  # torch and safetensors raise many kinds, and advise to load what must not be loaded
            raise ValueError("damaged, cut short or no weights file") from None
        if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise ValueError(f"holds values that are not finite (in {broken[0]})")
        token_ids = state.pop("token_ids") if backbone == "scenes" else None
        if token_ids is not None:
            # This checkpoint holds only the rows that captions can reach: they go back into the full table.
            table = torch.zeros_like(model.token_embedding.weight)
            state["token_embedding.weight"] = table.index_copy_(0, token_ids, state["token_embedding.weight"])
        shapes = [{name: tensor.shape for name, tensor in some.items() if "positional" not in name}
                  for some in (model.state_dict(), state)]  # of positions there may be others, which are resized
        if wrong := [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]:
            raise ValueError(f"of another architecture ({len(wrong)} tensors do not fit, first {wrong[0]})")
        open_clip.model.resize_pos_embed(state, model)
        model.load_state_dict(state)
        return None if token_ids is None else set(token_ids.tolist())

    remedy = f"take the .safetensors that open_clip fetches for {backbone}"
    if backbone == "scenes":
        remedy = f"take assets/{scenes.CHECKPOINT.name} of this repository"
    return data.read_stored(path, "weights", read, remedy)


def load_photo(clip, photo, generator=None, smallest=1.0):
    """A photo as CLIP sees it, float32 [3, H, W], with CLIP's mean and standard deviation: its preprocessing (shorter
    side resized, centre crop), or with numpy's generator a random resized crop of `smallest` to 1 of the area, aspect
    3/4 to 4/3, and a flip half of the time. Raises UsageError if it cannot be read."""
    try:
        image = data.open_photo(photo)
        if generator is None:
            return clip.preprocess(image)
        width, height = image.size
        area = width * height * generator.uniform(smallest, 1)
        aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
        left, top = generator.uniform(0, width - crop_width), generator.uniform(0, height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        image = image.resize(clip.image_size[::-1], Image.Resampling.BICUBIC, box=box)
        if generator.random() < 0.5:
            image = ImageOps.mirror(image)
        to_tensor, normalise = clip.preprocess.transforms[-2:]
        return normalise(to_tensor(image))
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UsageError(f"photo {photo}: cannot be read ({error})") from None


def _decode(clip, augment, batch):
    """[(row, photo), ...] -> (numpy images [b, 3, H, W], why each cannot be read or None). In a worker process."""
    images, wrong = np.zeros((len(batch), 3, *clip.image_size), np.float32), [None] * len(batch)
    seed, epoch, smallest = augment or (None, None, 1.0)
    for place, (row, photo) in enumerate(batch):
        generator = np.random.default_rng([seed, epoch, row]) if augment else None
        try:
            images[place] = load_photo(clip, photo, generator, smallest).numpy()
        except UsageError as error:
            wrong[place] = str(error)
    return images, wrong


def decoded(clip, photos, batches, workers, augment=None, naming=True):
    """Photos decoded by worker processes (None: a core each, at most 16) while the caller computes. batches: lists of b
    row indices (int) into photos; augment: None, or (seed, epoch, smallest share of the area) for random crops that
    hang on (seed, epoch, row) alone. -> iterator over (images float32 [b, 3, H, W], readable bool [b]). A photo that
    cannot be read is all zeros, and is named once on stderr (unless naming is False)."""
    # Workers hand over numpy arrays, which go through a pipe: tensors would go through /dev/shm, and Docker's 64 MB of
    # it do not hold a batch. The generator, because a DataLoader otherwise draws from torch's global one.
    batches, decode = list(batches), functools.partial(_decode, clip._replace(model=None, tokenizer=None), augment)
    loader = DataLoader(list(enumerate(photos)), batch_sampler=batches, collate_fn=decode, generator=torch.Generator(),
                        num_workers=min(16 if workers is None else workers, os.cpu_count()) if len(batches) > 1 else 0)
    for images, wrong in loader:
        for reason in filter(None, wrong if naming else []):
            say_once(f"{reason}; left out")
        images = torch.from_numpy(images)
        yield images.pin_memory() if torch.cuda.is_available() else images, torch.tensor([not one for one in wrong])


def _cache_file(cache, kind, key_parts):
    digest = hashlib.blake2b("\0".join(key_parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return Path(cache) / f"{kind}-{digest}.safetensors" if cache else None


def _cached(path, compute):
    """compute() -> dict of tensors, kept in the file at path (None: nowhere). Written atomically: a file is whole
    whatever is killed. A damaged one is made anew, a cache that cannot be written is done without."""
    if path and path.exists():
        try:
            return data.read_stored(path, "cache file", safetensors.torch.load_file, "made anew")
        except UsageError as error:
            say(str(error))
    tensors = compute()
    try:
        if path:
            data.write_atomically(path, safetensors.torch.save(tensors))
    except UsageError as error:
        say_once(f"cache {path.parent}: not written, going on without ({error})")
    return tensors


def _encode_text(model, tokens):
    """model.encode_text without the positions behind the longest text's end, which a causal encoder does not need."""
    ends = tokens.argmax(-1)
    longest = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :longest]) + model.positional_embedding[:longest]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:longest, :longest]))
    return x[torch.arange(len(tokens), device=x.device), ends] @ model.text_projection


@torch.no_grad()
def embed_texts(clip, texts, cache=None, batch_size=256, quiet=True):
    """Text embeddings, raw (not normalised), float32 [N, D] on the CPU. Texts past the context length are cut and
    counted in one line; words that the tiny CLIP of scenes was not trained on are named. quiet: no progress bar."""
    device, limit = clip.model.logit_scale.device, clip.tokenizer.context_length
    # A token is at least a byte, and two more mark start and end: shorter texts fit.
    tokens = [clip.tokenizer.encode(text) for text in texts if clip.known_tokens or len(text.encode()) + 2 > limit]
    cut = sum(len(ids) + 2 > limit for ids in tokens)
    unknown = dict.fromkeys(token for ids in tokens for token in ids if token not in (clip.known_tokens or ids))
    if cut:
        say(f"{cut} of {len(texts)} texts are longer than {limit} tokens and were cut")
    if unknown:
        words = ", ".join(clip.tokenizer.decode([token]).strip() for token in [*unknown][:10])
        say(f"the {clip.name} CLIP has never seen: {words}; such words mean nothing to it")

    def compute(block):
        tokens, rows = clip.tokenizer(block), []
        by_length = tokens.argmax(-1).argsort(stable=True)
        with autocast(device, clip.precision):
            for batch in by_length.split(batch_size):
                rows.append(_encode_text(clip.model, tokens[batch].to(device)).float().cpu())
                bar.update(len(batch))
        return {"embeddings": torch.cat(rows)[by_length.argsort()]}

    bar = tqdm(total=len(texts), desc="embedding texts", unit="text", disable=quiet or None)
    blocks = [texts[start:start + TEXTS] for start in range(0, len(texts), TEXTS)]
    files = [_cache_file(cache, "texts", [clip.key, clip.precision, *block]) for block in blocks]
    return torch.cat([_cached(file, functools.partial(compute, block))["embeddings"]
                      for file, block in zip(files, blocks, strict=True)])


def _photo_identity(photo):
    """What a photo's embedding hangs on: the drawing code; or a file's place, size and time, if it may be read."""
    if isinstance(photo, tuple):
        return f"{photo} {scenes.DIGEST}"
    status = os.stat(photo) if os.access(photo, os.R_OK) else None
    return f"{os.path.abspath(photo)} {status and (status.st_size, status.st_mtime_ns)}"


@torch.no_grad()
def stream_photos(clip, photos, kind="photos", encode=None, cache=None, workers=None, quiet=False):
    """Photos through the image tower, block by block, in their order. encode: images [b, 3, H, W] -> dict of tensors
    [b, ...]; None: {"embeddings": of encode_image}. -> iterator over (indices of a block's readable photos, the dict of
    their tensors, on the CPU). What cannot be read is named at the end. A block is in the cache as soon as it is done.
    Under torchrun the blocks are divided among the processes of a machine, and read back from the cache."""
    device, bad = clip.model.logit_scale.device, []
    encode = encode or (lambda images: {"embeddings": clip.model.encode_image(images).float()})
    blocks = [range(start, min(start + PHOTOS, len(photos))) for start in range(0, len(photos), PHOTOS)]
    keys = ([clip.key, clip.precision, *(_photo_identity(photos[row]) for row in block)] for block in blocks)
    files = {block: _cache_file(cache, kind, key) for block, key in zip(blocks, keys, strict=True)}
    bar = tqdm(total=len(photos), desc="embedding photos", unit="photo", disable=quiet or not sys.stderr.isatty())

    def encoded(blocks):
        fresh = dict.fromkeys(block for block in blocks if not (files[block] and files[block].exists()))
        images_of = decoded(clip, photos, fresh, workers, naming=False)

        def compute(block):
            again = decoded(clip, photos, [block], 0, naming=False)  # of a damaged cache file
            images, readable = next(images_of if block in fresh else again)
            with autocast(device, clip.precision):
                tensors = encode(images.to(device, non_blocking=True))
            return {name: tensor.cpu()[readable] for name, tensor in tensors.items()} | {"readable": readable}
        for block in blocks:
            yield block, _cached(files[block], functools.partial(compute, block))
            bar.update(len(block))

    if torch.distributed.is_initialized() and cache:
        for _ in encoded(blocks[int(os.environ["LOCAL_RANK"])::int(os.environ["LOCAL_WORLD_SIZE"])]):
            pass
        torch.distributed.barrier()
    for block, tensors in encoded(blocks):
        readable = tensors.pop("readable").numpy()
        bad += [photos[row] for row in np.array(block)[~readable]]
        yield np.array(block)[readable], tensors
    bar.close()
    for photo in bad[:20]:
        try:
            load_photo(clip, photo)
        except UsageError as error:
            say(f"{error}; left out")
    if bad:
        say(f"{len(bad)} of {len(photos)} photos could not be read" + ", the first 20 named above" * (len(bad) > 20))


def _joined(blocks):
    """What stream_photos gives -> ({name: tensor of all}, indices [K]). Raises UsageError if no photo could be read."""
    kept, parts = zip(*blocks, strict=True)
    if not sum(map(len, kept)):
        raise UsageError("no photo could be read; check the files named above")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, np.concatenate(kept)


def embed_photos(clip, photos, cache=None, workers=None, quiet=False):
    """Global image embeddings, raw. photos: paths or scenes' (split, index). A photo that cannot be read is named and
    left out. -> (float32 [K, D] on the CPU, indices [K] of those that were read). Raises UsageError if none was."""
    tensors, kept = _joined(stream_photos(clip, photos, cache=cache, workers=workers, quiet=quiet))
    return tensors["embeddings"], kept


def embed_regions(clip, photos, image_features, cache=None, workers=None, quiet=False):
    """Global and region features, raw. image_features: (image tower, images) -> (x0 [b, D], X [b, M, D]).
    -> (float32 [K, D], float16 [K, M, D], indices [K] of the photos that were read); otherwise as embed_photos."""
    def encode(images):
        embeddings, regions = image_features(clip.model.visual, images)
        return {"embeddings": embeddings.float(), "regions": regions.half()}
    tensors, kept = _joined(stream_photos(clip, photos, "regions", encode, cache, workers, quiet))
    return tensors["embeddings"], tensors["regions"], kept


def download_voc2007(root):
    """Fetch and unpack VOC2007 (870 MB) under root, through torchvision, which checks the archives' hashes. Raises
    UsageError. In a shell: python -c "import embed; embed.download_voc2007('data')" """
    import_open_clip()  # torchvision imports only after its guard
    from torchvision.datasets import VOCDetection
    try:
        for image_set in ("trainval", "test"):
            VOCDetection(str(root), year="2007", image_set=image_set, download=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"voc2007: download failed ({error}); fetch VOCtrainval_06-Nov-2007.tar and VOCtest_06-"
                         f"Nov-2007.tar by hand and unpack both under {root}") from None
