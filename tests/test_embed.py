"""embed.py against open_clip's own loading, on small towers; its cache; and what it says of bad photos and weights."""
import glob
import json
import os
import pickle
import random
import signal
import sqlite3
import time
import urllib.error
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import embed
import scenes
from data import UsageError

TEXTS = ["a photo of a dog.", "two cats"]
PHOTOS = [("test", index) for index in range(6)]
open_clip = embed.import_open_clip()


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """{name: file of random weights} of small models, which open_clip knows from here on."""
    folder = tmp_path_factory.mktemp("towers")
    text = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vit = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64}
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "image_size": 64}
    unmasked = {**text, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    configs = {"small-ViT": {"vision_cfg": vit}, "small-ResNet": {"vision_cfg": resnet},
               "small-ViT-quickgelu": {"vision_cfg": vit, "quick_gelu": True},
               "small-Sigmoid": {"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224},
                                "text_cfg": unmasked, "custom_text": True, "init_logit_bias": -10},
               "small-CoCa": {"vision_cfg": {**vit, "attentional_pool": True, "output_tokens": True}, "custom_text": True,
                              "text_cfg": {**text, "embed_cls": True, "output_tokens": True}, "multimodal_cfg": text}}
    for name, config in configs.items():
        config = {"embed_dim": 32, "text_cfg": text, **config}
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
        save_file(open_clip.create_model(name).state_dict(), folder / f"{name}.safetensors")
    return {path.stem: path for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def clip():
    return embed.load_clip()


@pytest.fixture
def counted(clip):
    """(encode, list of its calls' numbers of images): an encoder of the mean colour"""
    sizes = []

    def encode(images):
        sizes.append(len(images))
        return {"mean": images.mean((2, 3))}
    return encode, sizes


def encode_all(clip, photos, encode, cache, **more):
    return dict(embed.encode_photos(clip, photos, "mean colour", encode, cache, 0, True, **more))


def draw(folder, count):
    """count photos of one size, time and, by twos, name"""
    for index in range(count):
        path = folder / f"{index % 2}" / f"{index // 2}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index // 256, index % 256, 9)).save(path)
        os.utime(path, (1e9, 1e9))
    return sorted(folder.glob("*/*.bmp"))


# --- CLIP -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, resolution", [("small-ViT", None), ("small-ViT", 96), ("small-ResNet", None),
                                              ("small-Sigmoid", 64), ("small-CoCa", None)])
def test_embeddings_equal_open_clips(towers, name, resolution):
    """The same file loaded, resized and preprocessed by open_clip alone; the first text is too long, one is empty."""
    path = str(towers[name])
    texts = ["boat " * 99, "a", "a red boat at sea", ""]
    model, _, preprocess = open_clip.create_model_and_transforms(name, path, force_image_size=resolution)
    model.eval()
    images = torch.stack([preprocess(scenes.picture(*photo)[0]) for photo in PHOTOS])
    clip = embed.load_clip(name, path, resolution=resolution)
    with torch.no_grad():
        torch.testing.assert_close(embed.embed_photos(clip, PHOTOS)[0], model.encode_image(images, normalize=False))
        for some in (texts, texts[1:]):
            expected = model.encode_text(open_clip.get_tokenizer(name)(some), normalize=False)
            torch.testing.assert_close(embed.embed_texts(clip, some, batch_size=3), expected, atol=1e-5, rtol=1e-5)


def test_resnet_at_another_resolution(towers, tmp_path):
    """Position embeddings that grow linearly from left to right do so on a wider grid too; the mean's own one stays."""
    weights = load_file(towers["small-ResNet"])
    weights["visual.attnpool.positional_embedding"][:, 0] = torch.tensor([7.0, 0, 1, 0, 1])
    save_file(weights, tmp_path / "ramp.safetensors")
    clip = embed.load_clip("small-ResNet", str(tmp_path / "ramp.safetensors"), resolution=128)
    mean, grid = clip.model.visual.attnpool.positional_embedding[:, 0].split([1, 4 * 4])
    assert mean == 7 and (grid.view(4, 4).diff(dim=1) > 0).all() and grid.view(4, 4).diff(dim=0).abs().max() < 1e-5
    assert embed.embed_photos(clip, PHOTOS[:1])[0].isfinite().all() and clip.image_size == (128, 128)


def test_key_follows_what_is_computed(towers, tmp_path, monkeypatch, capsys):
    """The same weights by a tag that implies QuickGELU and under the name that does: one key; with GELU another."""
    weights = load_file(towers["small-ViT"])
    tags = {"openai": {"quick_gelu": True}, "other": {"quick_gelu": True, "mean": (0.5, 0.5, 0.5)},
            "squashed": {"quick_gelu": True, "resize_mode": "squash"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-ViT", tags)
    monkeypatch.setattr(embed, "WEIGHTS", tmp_path)
    for tag in tags:
        save_file(weights, tmp_path / f"small-ViT.{tag}.safetensors")  # found there
    keys = [embed.load_clip("small-ViT", tag).key for tag in tags]
    assert "OpenAI" not in capsys.readouterr().err
    keys.append(embed.load_clip("small-ViT", str(towers["small-ViT"])).key)
    assert "if these are OpenAI's weights, use --backbone small-ViT-quickgelu" in capsys.readouterr().err
    keys.append(embed.load_clip("small-ViT", str(towers["small-ViT"]), resolution=96).key)
    weights["logit_scale"] += 1e-3
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "epoch_1.pt")
    keys.append(embed.load_clip("small-ViT", str(tmp_path / "epoch_1.pt")).key)
    assert len(set(keys)) == 6
    assert embed.load_clip("small-ViT-quickgelu", str(towers["small-ViT"])).key == keys[0]


def test_local_dir_and_random_weights(towers, tmp_path, capsys):
    config = {"model_cfg": open_clip.get_model_config("small-ViT")}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(load_file(towers["small-ViT"]), tmp_path / "open_clip_model.safetensors")
    embeddings = [embed.embed_texts(embed.load_clip(name, path), TEXTS)
                  for name, path in ((f"local-dir:{tmp_path}", None), ("small-ViT", str(towers["small-ViT"])))]
    assert torch.equal(*embeddings)
    state = torch.get_rng_state()
    keys = {(torch.manual_seed(seed), embed.load_clip("small-ViT", "none").key)[1] for seed in (1, 2)}
    torch.set_rng_state(state)
    assert len(keys) == 1 and "random weights" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["ViT-B-61"], "ViT-B-61: open_clip has no .*try ViT-B-16"), (["scene"], "try scenes"),
    (["ViT-B-32", "laion"], "--pretrained laion: no file, and open_clip has no such weights of ViT-B-32; try openai"),
    (["roberta-ViT-B-32", "none"], "transformers.*install the package"),
    (["local-dir:/nowhere"], "no such file"), (["local-dir:/nowhere", "none"], "no such file"),
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
    with pytest.raises(UsageError, match=f"^--backbone small-ViT, weights .*weights.pt: .*{message}.*; give .*$"):
        embed.load_clip("small-ViT", str(tmp_path / "weights.pt"))
    assert os.listdir() == ["weights.pt"]


def test_weights_that_are_not_on_this_machine(tmp_path, monkeypatch):
    """Says at once which file to get and where to put it."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(embed, "urlopen", Mock(side_effect=urllib.error.URLError("no network")))
    with pytest.raises(UsageError, match="https://.*_model.safetensors, put it at .*weights/ViT-B-32.openai.safetensors"):
        embed.load_clip("ViT-B-32")


# --- photos -----------------------------------------------------------------------------------------------------------

def test_a_crop_by_hand(clip, tmp_path):
    """A quarter of the area, square, from (256, 0): half green, half striped, as it is or mirrored. Stripes narrower
    than a pixel of the crop become their mean."""
    photo = Image.new("RGB", (512, 512))
    photo.paste((0, 255, 0), (256, 0, 384, 256))
    for left in range(384, 512, 2):
        photo.paste((255, 0, 0), (left, 0, left + 1, 256))
    photo.save(tmp_path / "photo.png")
    draws = [Mock(uniform=Mock(side_effect=[0.25, 0.0, 256, 0]), random=Mock(return_value=by)) for by in (0.5, 0.4)]
    crop, mirrored = (embed.load_photo(clip, tmp_path / "photo.png", generator, 0.2) for generator in draws)
    assert crop[:, 32, 30].argmax() == 1 and crop[:, 32, 34].argmax() == 0 and torch.equal(mirrored, crop.flip(2))
    assert crop[:, 4:60, 4:30].std((1, 2)).max() < 1e-5 and crop[:, 4:60, 34:60].std((1, 2)).max() < 0.1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_random_crops_hang_on_seed_epoch_and_row_alone(clip, tmp_path, capsys, method):
    """Not on the number of workers, how they start, the batches, or torch's random state, which they leave alone."""
    photos = [*PHOTOS, tmp_path / "none.jpg"]
    state = torch.get_rng_state()
    whole = [embed.load_photo(clip, photo, np.random.default_rng([1, 2, row]), 0.3) for row, photo in enumerate(PHOTOS)]
    torch.multiprocessing.set_sharing_strategy("file_system")  # with it a tensor that a worker sends becomes a file
    torch.multiprocessing.set_start_method(method, force=True)
    try:
        for workers, batches in ((0, [[2], [0], [6]]), (2, [[2], [0, 6]])):
            images, readable = zip(*embed.decoded(clip, photos, batches, workers, (1, 2, 0.3)), strict=True)
            assert torch.equal(torch.cat(images)[:2], torch.stack([whole[2], whole[0]]))
            assert torch.cat(readable).tolist() == [True, True, False]
        assert not glob.glob("/dev/shm/torch_*")  # Docker gives shared memory 64 MB: no batch must go through it
    finally:
        torch.multiprocessing.set_start_method("fork", force=True)
    assert torch.equal(torch.get_rng_state(), state) and capsys.readouterr().err.count("none.jpg: cannot be read") == 1


def test_unreadable_photos_are_named_and_left_out(clip, tmp_path, capsys):
    """Those beside them keep their own features, with and without the cache. The first is broken."""
    whole = [tmp_path / "whole0.png", tmp_path / "whole1.png"]
    for index, path in enumerate(whole):
        scenes.picture("test", index)[0].save(path)
    torn = tmp_path / "torn.png"
    torn.write_bytes(whole[0].read_bytes()[:900])
    photos = [torn, whole[0], tmp_path / "missing.jpg", whole[1], whole[0]]
    expected = torch.stack([embed.load_photo(clip, photos[row]) for row in (1, 3, 4)]).flatten(2).mT[:, :5]
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        x0, X, rows = embed.embed_regions(clip, photos, lambda _, images: (images[:, 0, 0], images.flatten(2).mT[:, :5]),
                                          cache)
        assert rows.tolist() == [1, 3, 4] and X.dtype == torch.float16
        torch.testing.assert_close(X.float(), expected, atol=2e-3, rtol=0)
        assert torch.equal(x0[1], embed.load_photo(clip, whole[1])[0, 0])
        said = capsys.readouterr().err.splitlines()
        assert "torn.png: cannot be read" in said[0] and "missing.jpg: cannot be read" in said[1]
        assert said[2].startswith("2 of 5 photos could not be read") and len(said) == 3
    with pytest.raises(UsageError, match="no photo could be read"):
        embed.embed_photos(clip, photos[:1], tmp_path / "cache")


def test_texts_too_long_and_unknown_words_are_said(clip, capsys):
    fits = "boat " * 38  # and two tokens that mark start and end: 40
    embed.embed_texts(clip, [fits, fits + "boat", "a photo of a zebra.", "another zebra"])
    said = capsys.readouterr().err
    assert said.count("zebra") == 1 and "1 of 4 texts are longer than 40 tokens and were cut" in said


# --- cache ------------------------------------------------------------------------------------------------------------

def test_one_new_photo_costs_one_encoding_and_a_moved_folder_none(clip, counted, tmp_path):
    """Photos of one name, size and time in two folders are told apart."""
    encode, sizes = counted
    photos = draw(tmp_path / "photos", 400)
    first = encode_all(clip, photos, encode, tmp_path / "cache")
    assert len({tensors["mean"].numpy().tobytes() for tensors in first.values()}) == sum(sizes) == 400
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "0" / "100b.bmp")
    photos = sorted((tmp_path / "photos").glob("*/*.bmp"))
    encode_all(clip, photos, encode, tmp_path / "cache")
    assert sizes[-1] == 1 and sum(sizes) == 401
    (tmp_path / "photos").rename(tmp_path / "moved")
    again = encode_all(clip, sorted((tmp_path / "moved").glob("*/*.bmp")), encode, tmp_path / "cache")
    assert sum(sizes) == 401 and torch.equal(again[400]["mean"], first[399]["mean"])


def test_a_killed_run_loses_at_most_one_batch(clip, tmp_path, monkeypatch):
    """Killed at ten random moments, then run to its end."""
    monkeypatch.setattr(embed, "BATCH", 4)
    photos = [("test", index) for index in range(80)]
    log = os.open(tmp_path / "encoded", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def encode(images):
        os.write(log, b"." * len(images))
        return {"mean": images.mean((2, 3))}
    for _ in range(10):
        child = os.fork()
        if child == 0:
            encode_all(clip, photos, encode, tmp_path)
            os._exit(0)
        time.sleep(random.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    rows = encode_all(clip, photos, encode, tmp_path)
    assert 80 <= (tmp_path / "encoded").stat().st_size <= 80 + 10 * 4
    assert all(torch.equal(rows[row]["mean"], embed.load_photo(clip, photos[row]).mean((1, 2))) for row in (0, 41, 79))


def test_rows_are_given_out_as_soon_as_their_batch_is_done(clip, counted, monkeypatch):
    encode, sizes = counted
    monkeypatch.setattr(embed, "BATCH", 2)
    for row, _ in embed.encode_photos(clip, PHOTOS, "mean colour", encode, quiet=True):
        assert len(sizes) == row // 2 + 1


def test_cache_follows_what_it_was_computed_from(clip, tmp_path, monkeypatch):
    """The photo, the resolution, the precision and the texts; nothing is computed twice."""
    photo = tmp_path / "photo.bmp"
    clips = [clip, embed.load_clip(resolution=128), embed.load_clip(precision="bf16")]
    made = []
    for index in (0, 1):  # files of one size
        scenes.picture("test", index)[0].save(photo)
        made += [embed.embed_photos(one, [photo], tmp_path)[0] for one in clips]
    assert len({str(embedding.tolist()) for embedding in made}) == 6
    texts = [embed.embed_texts(one, [text, "c"], tmp_path) for one in clips[::2] for text in "ab"]
    assert len({str(embeddings.tolist()) for embeddings in texts}) == 4
    monkeypatch.setattr(type(clip.model), "encode_image", None)
    monkeypatch.setattr(embed, "_encode_text", None)
    assert torch.equal(embed.embed_photos(clip, [photo], tmp_path)[0], made[3])
    assert torch.equal(embed.embed_texts(clip, ["c", "a", "b"], tmp_path)[1], texts[0][0])


def damage_row(path, content):
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE features SET tensors = ?", [content])


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b"no database" * 999),
    lambda path: path.write_bytes(path.read_bytes()[:5000]),
    lambda path: damage_row(path, pickle.dumps(Code())),
    lambda path: damage_row(path, "text")])
def test_a_damaged_cache_is_set_aside(clip, counted, tmp_path, capsys, monkeypatch, damage):
    encode, sizes = counted
    monkeypatch.chdir(tmp_path)
    first = encode_all(clip, PHOTOS, encode, tmp_path)
    damage(tmp_path / "features.sqlite")
    again = encode_all(clip, PHOTOS, encode, tmp_path)
    assert torch.equal(first[3]["mean"], again[3]["mean"]) and sizes == [6, 6]
    assert capsys.readouterr().err.count("features.sqlite: damaged") == 1
    encode_all(clip, PHOTOS, encode, tmp_path)
    assert sizes == [6, 6] and sorted(os.listdir()) == ["features.sqlite", "features.sqlite.damaged"]


def test_a_cache_that_cannot_be_written_is_done_without(clip, counted, tmp_path, capsys, monkeypatch):
    """What is in it is used."""
    encode, sizes = counted
    encode_all(clip, PHOTOS[:4], encode, tmp_path)
    (tmp_path / "file").touch()
    assert len(encode_all(clip, PHOTOS, encode, tmp_path / "file")) == 6
    assert capsys.readouterr().err.count("going on without") == 1
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(f"file:{path}?mode=ro", uri=True))
    for _ in range(2):
        assert all(encode_all(clip, PHOTOS, encode, tmp_path).values())
    assert sizes == [4, 6, 2, 2] and capsys.readouterr().err.count("going on without") == 1


def test_processes_of_torchrun_share_the_photos(clip, counted, tmp_path, monkeypatch):
    """Process 1 of 2 has encoded every second photo when it waits, and finds the others in the file of process 0."""
    encode, sizes = counted
    other = encode_all(clip, PHOTOS[::2], encode, tmp_path / "other")
    waited = []

    def barrier():
        waited.append(list(sizes))
        (tmp_path / "other" / "features.sqlite").rename(tmp_path / "features.0.sqlite")
    for name, value in {"is_initialized": lambda: True, "get_rank": lambda: 1, "get_world_size": lambda: 2,
                        "barrier": barrier}.items():
        monkeypatch.setattr(torch.distributed, name, value)
    rows = encode_all(clip, PHOTOS, encode, tmp_path)
    assert waited == [[3, 3]] and sizes == [3, 3] and torch.equal(rows[4]["mean"], other[2]["mean"])
    assert sorted(os.listdir(tmp_path)) == ["features.0.sqlite", "features.1.sqlite", "other"]
