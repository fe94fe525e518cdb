"""embed.py against open_clip's own loading, on small towers; its cache; and what it says of bad photos and weights."""
import glob
import json
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from safetensors.torch import load_file, save_file

import embed
import scenes
from data import UsageError

PHOTOS = [("test", index) for index in range(6)]
open_clip = embed.import_open_clip()


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """{name: file of random weights} of small models, which open_clip knows from here on."""
    folder = tmp_path_factory.mktemp("towers")
    text = {"context_length": 40, "width": 32, "heads": 2, "layers": 2}
    unmasked = {**text, "no_causal_mask": True, "pool_type": "last"}
    with_class = {**text, "embed_cls": True, "output_tokens": True}
    vit = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64}
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "image_size": 64}
    timm = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224}
    pooled = {**vit, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    configs = {"ViT": {"vision_cfg": vit},
               "ViT-quickgelu": {"vision_cfg": vit, "quick_gelu": True},
               "ResNet": {"vision_cfg": resnet},
               "Sigmoid": {"vision_cfg": timm, "text_cfg": unmasked, "custom_text": True},
               "CoCa": {"vision_cfg": pooled, "text_cfg": with_class, "custom_text": True, "multimodal_cfg": text}}
    for name, config in configs.items():
        path = folder / f"small-{name}.json"
        path.write_text(json.dumps({"embed_dim": 32, "text_cfg": text, **config}))
        open_clip.add_model_config(path)
        save_file(open_clip.create_model(path.stem).state_dict(), path.with_suffix(".safetensors"))
    return {path.stem: str(path) for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def clip():
    return embed.load_clip()


class MeanColour:
    """An encoder that notes how many images it was given, call by call."""
    def __init__(self):
        self.sizes = []

    def __call__(self, images):
        self.sizes.append(len(images))
        return {"mean": images.mean((2, 3))}

    def rows(self, clip, photos, cache):
        return dict(embed.encode_photos(clip, photos, "mean colour", self, cache, 0, True))


# --- CLIP -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, resolution", [
    ("small-ViT", None), ("small-ViT", 96), ("small-ResNet", None), ("small-Sigmoid", 64), ("small-CoCa", None)])
def test_embeddings_equal_open_clips(towers, name, resolution):
    """The same file loaded, resized and preprocessed by open_clip alone; the first text is too long, one is empty."""
    texts = ["boat " * 99, "a", "a red boat at sea", ""]
    model, _, preprocess = open_clip.create_model_and_transforms(name, towers[name], force_image_size=resolution)
    images = torch.stack([preprocess(scenes.picture(*photo)[0]) for photo in PHOTOS])
    clip = embed.load_clip(name, towers[name], resolution=resolution)
    with torch.no_grad():
        expected = model.eval().encode_image(images, normalize=False)
        torch.testing.assert_close(embed.embed_photos(clip, PHOTOS)[0], expected)
        expected = model.encode_text(open_clip.get_tokenizer(name)(texts), normalize=False)
    for first in (0, 1):  # without the long one the positions behind the end are cut
        embeddings = embed.embed_texts(clip, texts[first:], batch_size=3)
        torch.testing.assert_close(embeddings, expected[first:], atol=1e-5, rtol=1e-5)


def test_resnet_at_another_resolution(towers, tmp_path):
    """Position embeddings that grow linearly from left to right do so on a wider grid too; the mean's own one stays."""
    weights = load_file(towers["small-ResNet"])
    weights["visual.attnpool.positional_embedding"][:, 0] = torch.tensor([7.0, 0, 1, 0, 1])
    save_file(weights, tmp_path / "ramp.safetensors")
    clip = embed.load_clip("small-ResNet", str(tmp_path / "ramp.safetensors"), resolution=128)
    mean, grid = clip.model.visual.attnpool.positional_embedding[:, 0].split([1, 4 * 4])
    grid = grid.view(4, 4)
    assert mean == 7
    assert (grid.diff(dim=1) > 0).all() and grid.diff(dim=0).abs().max() < 1e-5
    assert len(embed.embed_photos(clip, PHOTOS)[0]) == 6 and clip.image_size == (128, 128)


def test_key_follows_what_is_computed(towers, tmp_path, monkeypatch, capsys):
    """The same weights by a tag that implies QuickGELU and under the name that does: one key; with GELU another."""
    weights = load_file(towers["small-ViT"])
    tags = {"openai": {}, "mean": {"mean": (0.5, 0.5, 0.5)}, "squashed": {"resize_mode": "squash"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-ViT", tags)
    monkeypatch.setattr(embed, "WEIGHTS", tmp_path)
    for tag in tags.values():
        tag["quick_gelu"] = True
    for tag in tags:
        save_file(weights, tmp_path / f"small-ViT.{tag}.safetensors")  # found there
    keys = [embed.load_clip("small-ViT", tag).key for tag in tags]
    assert keys[0] == embed.load_clip("small-ViT-quickgelu", towers["small-ViT"]).key
    assert not capsys.readouterr().err
    keys.append(embed.load_clip("small-ViT", towers["small-ViT"]).key)
    assert "if these are OpenAI's weights, use --backbone small-ViT-quickgelu" in capsys.readouterr().err
    weights["logit_scale"] += 1e-3
    state = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"state_dict": state}, tmp_path / "epoch_1.pt")
    keys.append(embed.load_clip("small-ViT", str(tmp_path / "epoch_1.pt")).key)
    assert len(set(keys)) == 5


def test_local_dir_and_random_weights(towers, tmp_path, capsys):
    config = {"model_cfg": open_clip.get_model_config("small-ViT")}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(load_file(towers["small-ViT"]), tmp_path / "open_clip_model.safetensors")
    expected = embed.load_clip("small-ViT", towers["small-ViT"]).key
    assert embed.load_clip(f"local-dir:{tmp_path}").key == expected
    torch.manual_seed(1)
    first = embed.load_clip("small-ViT", "none").key
    assert embed.load_clip(f"local-dir:{tmp_path}", "none").key == first != expected
    assert capsys.readouterr().err.count("random weights") == 2
    assert torch.initial_seed() == 1


@pytest.mark.parametrize("words, message", [
    (["ViT-B-61"], "ViT-B-61: open_clip has no .*try ViT-B-16"),
    (["scene"], "try scenes"),
    (["ViT-B-32", "laion"], "--pretrained laion: no file, and open_clip has no such weights of ViT-B-32; try openai"),
    (["roberta-ViT-B-32", "none"], "transformers.*install the package"),
    (["local-dir:/nowhere"], "no such file"),
    (["small-ViT", "none", "cpu", "fp32", 100], "--resolution 100: must be a positive multiple of 16"),
    (["small-ResNet", "none", "cpu", "fp32", -32], "--resolution -32: must be a positive multiple of 32")])
def test_refuses(towers, words, message):
    with pytest.raises(UsageError, match=message):
        embed.load_clip(*words)


Code = type("Code", (), {"__reduce__": lambda self: (os.mkdir, ("ran",))})  # a pickle that runs code when it is read
WRONG_FILES = {
    "empty": lambda path, state: path.write_bytes(b""),
    "a web page, not weights": lambda path, state: path.write_text("\n<!DOCTYPE html><html>not found</html>"),
    "damaged, cut short": lambda path, state: (torch.save(state, path), path.write_bytes(path.read_bytes()[:50000])),
    "or no weights file": lambda path, state: torch.save(Code(), path),
    "a TorchScript archive": lambda path, state: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path),
    "not finite .in logit_scale": lambda path, state: torch.save({**state, "logit_scale": torch.tensor(np.nan)}, path),
    "of another architecture .*ln_final.bias":
        lambda path, state: torch.save({**state, "ln_final.bias": torch.zeros(3)}, path)}


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("message", WRONG_FILES)
def test_wrong_weights_are_one_line_that_says_what_they_are(towers, tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    WRONG_FILES[message](tmp_path / "weights.pt", load_file(towers["small-ViT"]))
    with pytest.raises(UsageError, match=f"^--backbone small-ViT, weights weights.pt: .*{message}.*; give .*$"):
        embed.load_clip("small-ViT", "weights.pt")
    assert os.listdir() == ["weights.pt"]


def test_weights_that_are_not_on_this_machine(tmp_path, monkeypatch):
    """Says at once which file to get and where to put it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", tmp_path)
    monkeypatch.setattr(embed, "urlopen", Mock(side_effect=OSError("no network")))
    with pytest.raises(UsageError, match="https://.*_model.safetensors, put it at .*weights/ViT-B-32.openai.safeten"):
        embed.load_clip("ViT-B-32")


def test_texts_too_long_and_unknown_words_are_said(clip, capsys):
    fits = "boat " * 38  # and two tokens that mark start and end: 40
    embed.embed_texts(clip, [fits, fits + "boat", "a photo of a zebra.", "another zebra"])
    said = capsys.readouterr().err
    assert said.count("zebra") == 1
    assert "1 of 4 texts are longer than 40 tokens and were cut" in said


# --- photos -----------------------------------------------------------------------------------------------------------

def test_a_crop_by_hand(clip, tmp_path):
    """A quarter of the area, square, from (256, 0): half green, half striped, as it is or mirrored. Red stripes, a
    quarter of a pixel of the crop wide, become a quarter of red there: (0.25 - 0.481) / 0.269."""
    photo = np.zeros((512, 512, 3), np.uint8)
    photo[:256, 256:384, 1] = 255
    photo[:256, 384::4, 0] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    crops = []
    for draw in (0.5, 0.4):
        generator = Mock(uniform=Mock(side_effect=[0.25, 0.0, 256, 0]), random=Mock(return_value=draw))
        crops.append(embed.load_photo(clip, tmp_path / "photo.png", generator, 0.2))
    green, striped = crops[0][:, 4:60].split(32, 2)
    assert green[:, :, 4:30].std((1, 2)).max() < 1e-5 and green.mean((1, 2)).argmax() == 1
    assert (striped[0, :, 2:30] - (0.25 - 0.481) / 0.269).abs().max() < 0.05
    assert torch.equal(crops[1], crops[0].flip(2))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_random_crops_hang_on_seed_epoch_and_row_alone(clip, tmp_path, capsys, method):
    """Not on the number of workers, how they start, the batches, or torch's random state, which they leave alone."""
    state = torch.get_rng_state()
    crops = [embed.load_photo(clip, PHOTOS[row], np.random.default_rng([1, 2, row]), 0.3) for row in (2, 0)]
    expected = torch.stack([*crops, torch.zeros(3, 64, 64)])
    torch.multiprocessing.set_sharing_strategy("file_system")  # with it a tensor that a worker sends becomes a file
    torch.multiprocessing.set_start_method(method, force=True)
    for workers, batches in ((0, [[2], [0], [6]]), (2, [[2], [0, 6]])):
        batches = embed.decoded(clip, [*PHOTOS, tmp_path / "none.jpg"], batches, workers, (1, 2, 0.3))
        images, readable = map(torch.cat, zip(*batches, strict=True))
        assert torch.equal(images, expected) and readable.tolist() == [True, True, False]
    torch.multiprocessing.set_start_method("fork", force=True)
    assert not glob.glob("/dev/shm/torch_*")  # Docker gives shared memory 64 MB: no batch must go through it
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().err.count("none.jpg: cannot be read") == 1


def test_unreadable_photos_are_named_and_left_out(clip, tmp_path, capsys):
    """Those beside them keep their own features, with and without the cache. The first is broken."""
    photos = [tmp_path / name for name in ("torn.png", "0.png", "missing.png", "1.png", "0.png")]
    for index in (0, 1):
        scenes.picture("test", index)[0].save(tmp_path / f"{index}.png")
    photos[0].write_bytes(photos[1].read_bytes()[:900])
    expected = torch.stack([embed.load_photo(clip, photos[row]) for row in (1, 3, 4)])
    for cache in (None, tmp_path, tmp_path):
        x0, X, rows = embed.embed_regions(clip, photos, lambda _, images: (images[:, 0, 0], images[:, 1].mT), cache)
        assert rows.tolist() == [1, 3, 4] and torch.equal(x0, expected[:, 0, 0])
        assert torch.equal(X, expected[:, 1].mT.half())
        said = capsys.readouterr().err.splitlines()
        for line, part in zip(said, ("torn.png: cannot", "missing.png: cannot", "2 of 5 photos could"), strict=True):
            assert part in line
    with pytest.raises(UsageError, match="no photo could be read"):
        embed.embed_photos(clip, photos[:1])


# --- cache ------------------------------------------------------------------------------------------------------------

def draw(folder, count):
    """Photos of one size and time, and two of each name."""
    for index in range(count):
        path = folder / str(index % 2) / f"{index // 2}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index // 256, index % 256, 9)).save(path)
        os.utime(path, (1e9, 1e9))
    return sorted(folder.glob("*/*.bmp"))


def test_one_new_photo_costs_one_encoding_and_a_moved_folder_none(clip, tmp_path):
    colour = MeanColour()
    colour.rows(clip, draw(tmp_path / "photos", 400), tmp_path)
    assert sum(colour.sizes) == 400 and len(colour.sizes) == 7
    colour.rows(clip, draw(tmp_path / "photos", 401), tmp_path)
    assert colour.sizes[7:] == [1]
    (tmp_path / "photos").rename(tmp_path / "moved")
    again = colour.rows(clip, sorted((tmp_path / "moved").glob("*/*.bmp")), tmp_path)
    assert colour.sizes[7:] == [1] and len({str(tensors["mean"].tolist()) for tensors in again.values()}) == 401


def test_a_killed_run_loses_at_most_one_batch(clip, tmp_path, monkeypatch):
    """Killed at ten random moments, then run to its end."""
    monkeypatch.setattr(embed, "BATCH", 4)
    photos = [("test", index) for index in range(80)]
    log = os.open(tmp_path / "encoded", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    colour = MeanColour()
    colour.sizes = Mock(append=lambda size: os.write(log, b"." * size))
    for _ in range(10):
        child = os.fork()
        if child == 0:
            colour.rows(clip, photos, tmp_path)
            os._exit(0)
        time.sleep(random.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    rows = colour.rows(clip, photos, tmp_path)
    assert 80 <= os.stat(tmp_path / "encoded").st_size <= 80 + 10 * 4
    assert torch.equal(rows[79]["mean"], embed.load_photo(clip, photos[79]).mean((1, 2)))


def test_rows_are_given_out_as_soon_as_their_batch_is_done(clip, monkeypatch):
    colour = MeanColour()
    monkeypatch.setattr(embed, "BATCH", 2)
    for row, _ in embed.encode_photos(clip, PHOTOS, "mean colour", colour, quiet=True):
        assert len(colour.sizes) == row // 2 + 1


def test_cache_follows_what_it_was_computed_from(clip, towers, tmp_path, monkeypatch):
    """The photo, the model, the resolution, the precision and the texts; nothing is computed twice."""
    clips = [clip, embed.load_clip(resolution=128), embed.load_clip(precision="bf16")]
    made = [embed.embed_photos(one, [photo], tmp_path)[0] for photo in PHOTOS[:2] for one in clips]
    clips[1] = embed.load_clip("small-ViT", "none")
    texts = [embed.embed_texts(one, [text], tmp_path) for one in clips for text in "ab"]
    assert {embeddings.dtype for embeddings in made + texts} == {torch.float32}
    assert len({str(embedding.tolist()) for embedding in made + texts}) == 6 + 6
    monkeypatch.setattr(type(clip.model), "encode_image", None)
    monkeypatch.setattr(embed, "_encode_text", None)
    assert torch.equal(embed.embed_photos(clip, PHOTOS[1:2], tmp_path)[0], made[3])
    assert torch.equal(embed.embed_texts(clip, ["b", "a"], tmp_path)[1:], texts[0])


def damage_row(path, content):
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE features SET tensors = ?", [content])


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b"no database" * 999),
    lambda path: path.write_bytes(path.read_bytes()[:5000]),
    lambda path: damage_row(path, pickle.dumps(Code())),
    lambda path: damage_row(path, "text")])
def test_a_damaged_cache_is_set_aside(clip, tmp_path, capsys, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    colour = MeanColour()
    first = colour.rows(clip, PHOTOS, tmp_path)
    damage(tmp_path / "features.sqlite")
    for _ in range(2):
        assert torch.equal(colour.rows(clip, PHOTOS, tmp_path)[3]["mean"], first[3]["mean"])
    assert colour.sizes == [6, 6] and capsys.readouterr().err.count("features.sqlite: damaged") == 1
    assert sorted(os.listdir()) == ["features.sqlite", "features.sqlite.damaged"]


def test_a_cache_that_cannot_be_written_is_done_without(clip, tmp_path, capsys, monkeypatch):
    """What is in it is used."""
    colour = MeanColour()
    colour.rows(clip, PHOTOS[:4], tmp_path)
    assert len(colour.rows(clip, PHOTOS, tmp_path / "features.sqlite")) == 6  # no folder
    assert capsys.readouterr().err.count("going on without") == 1
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(f"file:{path}?mode=ro", uri=True))
    for _ in range(2):
        assert all(colour.rows(clip, PHOTOS, tmp_path).values())
    assert colour.sizes == [4, 6, 2, 2]
    assert capsys.readouterr().err.count("going on without") == 1


def test_processes_of_torchrun_share_the_photos(clip, tmp_path, monkeypatch):
    """Process 1 of 2 has encoded every second photo when it waits, and finds the others in the file of process 0."""
    colour = MeanColour()
    other = colour.rows(clip, PHOTOS[::2], tmp_path)
    (tmp_path / "features.sqlite").rename(tmp_path / "later")
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, Mock(return_value=value))
    come = Mock(side_effect=lambda: (tmp_path / "later").rename(tmp_path / "features.0.sqlite"))
    monkeypatch.setattr(torch.distributed, "barrier", come)
    rows = colour.rows(clip, PHOTOS, tmp_path)
    assert colour.sizes == [3, 3] and come.called
    assert torch.equal(rows[4]["mean"], other[2]["mean"])
    assert sorted(os.listdir(tmp_path)) == ["features.0.sqlite", "features.1.sqlite"]


def test_a_worker_ends_with_its_parent():
    """The parent is killed while its worker waits for ever; what both would write to is closed when both have ended."""
    code = ("import os, time, embed; parent = os.getpid(); child = os.fork()\n"
            "if not child: embed._end_with(parent, 0)\n"
            "print(child, flush=True); time.sleep(100)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=20)
