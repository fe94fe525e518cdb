"""embed.py against open_clip's own loading, on small towers; its cache; and what it says of bad photos and weights."""
import glob
import importlib.util
import json
import os
import pickle
import re
import runpy
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Bomb
from PIL import Image
from safetensors.torch import load_file, save_file
from test_data import refused

import data
import embed
import scenes

pytestmark = pytest.mark.usefixtures("own_folder")
PHOTOS = [("test", index) for index in range(6)]
PICTURE = scenes.picture(*PHOTOS[0])[0]
CLIP = embed.load_clip()
open_clip = embed.import_open_clip()


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Small models, which open_clip knows from here on -> {name: file of random weights, exact in half precision}"""
    folder = tmp_path_factory.mktemp("towers")
    unmasked = {**scenes.CLIP_CONFIG["text_cfg"], "no_causal_mask": True, "pool_type": "last"}
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "image_size": 64}
    timm = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224}
    configs = {"ViT": {},
               "ViT-quickgelu": {"quick_gelu": True},
               "ResNet": {"vision_cfg": resnet},
               "Sigmoid": {"vision_cfg": timm, "text_cfg": unmasked, "custom_text": True}}
    for name, config in configs.items():
        path = folder / f"small-{name}.json"
        path.write_text(json.dumps({**scenes.CLIP_CONFIG, **config}))
        open_clip.add_model_config(path)
        state = open_clip.create_model(path.stem).half().float().state_dict()
        save_file(state, path.with_suffix(".safetensors"))
    return {path.stem: str(path) for path in folder.glob("*.safetensors")}


def small_vit(weights):
    return embed.load_clip("small-ViT", weights)


class MeanColour:
    """An encoder that notes how many images it was given, call by call."""
    def __init__(self):
        self.sizes = []

    def __call__(self, images):
        self.sizes.append(len(images))
        return {"mean": images.mean((2, 3))}

    def rows(self, photos, cache=".", **options):
        return dict(embed.encode_photos(CLIP, photos, "mean colour", self, cache, 0, True, **options))


# --- CLIP -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, resolution", [
    ("small-ViT", None), ("small-ViT", 96), ("small-ResNet", None), ("small-Sigmoid", 64)])
def test_embeddings_equal_open_clips(towers, name, resolution):
    """Against the same weights loaded, resized and preprocessed by open_clip alone. Ours are stored in half precision,
    as many are published; the first text is too long, one is empty."""
    texts = ["boat " * 99, "a red boat at sea", ""]
    model, _, preprocess = open_clip.create_model_and_transforms(name, towers[name], force_image_size=resolution)
    images = torch.stack([preprocess(scenes.picture(*photo)[0]) for photo in PHOTOS])
    half = {key: tensor.half() for key, tensor in load_file(towers[name]).items()}
    save_file(half, "half.safetensors")
    clip = embed.load_clip(name, "half.safetensors", resolution=resolution)
    found = (embed.embed_photos(clip, PHOTOS)[0], embed.embed_texts(clip, texts))
    with torch.no_grad():
        tokens = open_clip.get_tokenizer(name)(texts)
        expected = (model.eval().encode_image(images), model.encode_text(tokens))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_resnet_at_another_resolution(towers):
    """Its position embeddings are interpolated, so a column's mean stays; the first, the mean token's, is kept."""
    clips = [embed.load_clip("small-ResNet", towers["small-ResNet"], resolution=side) for side in (64, 128)]
    before, after = [clip.model.visual.attnpool.positional_embedding for clip in clips]
    assert len(after) == 1 + 4 * 4 and torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1:].mean(0), before[1:].mean(0))
    with refused("--resolution -32: must be a positive multiple of 32"):
        embed.load_clip("small-ResNet", "none", resolution=-32)


def test_key_follows_what_is_computed(towers, monkeypatch, capsys):
    """The same weights have one key by a tag and by a name that imply QuickGELU; with GELU they have another."""
    weights = load_file(towers["small-ViT"])
    tags = {"openai": {"quick_gelu": True}, "mean": {"quick_gelu": True, "mean": (0.5, 0.5, 0.5)},
            "squashed": {"quick_gelu": True, "resize_mode": "squash"}}
    monkeypatch.setattr(embed, "WEIGHTS", ".")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-ViT", tags)
    save_file(weights, "small-ViT.openai.safetensors")  # found there
    torch.save(weights, "small-ViT.mean.pt")
    torch.save(weights, "small-ViT.squashed.bin")
    keys = [small_vit(tag).key for tag in tags]
    assert not capsys.readouterr().err
    assert keys[0] == embed.load_clip("small-ViT-quickgelu", towers["small-ViT"]).key
    assert "read with quick_gelu True " in capsys.readouterr().err
    keys.append(small_vit(towers["small-ViT"]).key)
    assert re.search("read with quick_gelu False .*-quickgelu.* mean .0.48.* std .0.26.* resize_mode shortest",
                     capsys.readouterr().err)
    assert len(set(keys)) == 4


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_state_dicts_as_people_have_them(towers, prefix):
    """With OpenAI's three numbers, which are not parameters, and the mask that old files hold"""
    more = {"input_resolution": torch.tensor(64), "context_length": 40, "vocab_size": 9, "attn_mask": torch.zeros(2, 2)}
    state = {prefix + name: tensor for name, tensor in {**more, **load_file(towers["small-ViT"])}.items()}
    for stored in (state, {"epoch": 1, "model_state_dict": state}):
        torch.save(stored, "weights.pt")
        assert small_vit("weights.pt").key == small_vit(towers["small-ViT"]).key


def test_local_dir_and_random_weights(towers, capsys):
    with refused("transformers.*install the package"):
        embed.load_clip("roberta-ViT-B-32", "none")
    with refused("open_clip_config.json: no such file"):
        embed.load_clip("local-dir:.")
    config = {"model_cfg": open_clip.get_model_config("small-ViT")}
    Path("open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    with refused("open_clip_model.safetensors: no such file"):
        embed.load_clip("local-dir:.")
    first = small_vit("none").key
    assert embed.load_clip("local-dir:.", "none").key == first
    save_file(load_file(towers["small-ViT"]), "open_clip_model.safetensors")
    stored = embed.load_clip("local-dir:.").key
    assert stored == small_vit(towers["small-ViT"]).key != first
    assert torch.initial_seed() == 1 and capsys.readouterr().err.count("random weights") == 3


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_what_is_no_weights_file(towers):
    """The message says what the file is; nothing in it is run."""
    script = torch.jit.script(torch.nn.Linear(2, 2)).save_to_buffer()
    for content, what in ((b"", "empty"), (script[:500], "damaged"), (script, "TorchScript"), (b" <html>", "web page"),
                          (b"version https://git-lfs", "Git LFS pointer"), (b'{"error": "not found"}', "JSON"),
                          (pickle.dumps(Bomb()), "pickled objects"), (pickle.dumps(Bomb(), 0), "pickled objects")):
        Path("weights.pt").write_bytes(content)
        with refused(f"^--backbone small-ViT, weights weights.pt: this is .*{what}.*; give we"):
            small_vit("weights.pt")
    assert os.listdir() == ["weights.pt"]


@pytest.mark.parametrize("name, value, message", [
    ("vision_model.post_layernorm.weight", 1.0, "names of transformers' models"),
    ("visual.proj", np.int8(1), "visual.proj is torch.int8: quantised"),
    ("logit_scale", np.nan, "weights .*: hold values that are not finite .in logit_scale"),
    ("ln_final.bias", 0, "weights .*: .* size mismatch for ln_final.bias.*; give weights of this very model")])
def test_wrong_weights(towers, name, value, message):
    save_file({**load_file(towers["small-ViT"]), name: torch.tensor(value)}, "weights.safetensors")
    with refused(message):
        small_vit("weights.safetensors")


def test_weights_that_are_not_on_this_machine(monkeypatch):
    """Says at once which file to get and where to put it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", ".")
    monkeypatch.setattr(embed, "urlopen", Mock(side_effect=OSError("no network")))
    with refused("_model.safetensors, put it at .*weights/ViT-B-32.openai.safetensors$"):
        embed.load_clip("ViT-B-32")
    with refused("weights of hf-hub:a/b .*_model.safetensors, put it and .*local-dir:FOLDER$"):
        embed.load_clip("hf-hub:a/b")


def test_texts_too_long_and_unknown_words_are_said(capsys):
    fits = "boat " * 38  # and two tokens that mark start and end: 40
    embed.embed_texts(CLIP, [fits, fits + "boat", "a photo of a zebra.", "another zebra"])
    said = capsys.readouterr().err
    assert said.count("zebra") == 1 and "photo" not in said
    assert "1 of 4 texts are longer than 40 tokens and were cut" in said


# --- photos -----------------------------------------------------------------------------------------------------------

def test_raw_files_and_videos_are_counted_and_heic_is_read_where_it_can_be(capsys, monkeypatch):
    for name in ("a.jpg", "b.CR2", "c.cr2", "d.mov", "e.heic", "labels.csv"):
        Path(name).touch()
    heif = Mock(__spec__=Mock())
    for library, count in ((heif, 2), (None, 1)):
        monkeypatch.setitem(sys.modules, "pillow_heif", library)
        fresh = runpy.run_path(data.__file__)
        assert len(fresh["list_photos"](".")) == count
        with pytest.raises(OSError):
            fresh["open_photo"]("e.heic")  # empty
    assert heif.register_heif_opener.call_count == 1  # not by an import
    said = capsys.readouterr().err
    assert re.search("2 .cr2 photos, which .*b.CR2.*\n.*1 .mov videos are .*\n.*1 .heic .*get pillow-heif.*\n$", said)


@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF", b"Exif\0\0II*\0\b\0\0\0\5\0"])
def test_exif_that_cannot_be_parsed(exif, recwarn):
    """No turning, no warning"""
    PICTURE.save("photo.png", exif=exif)
    np.testing.assert_array_equal(data.open_photo("photo.png"), PICTURE)
    assert not recwarn


def test_a_strip_is_cut_to_its_middle():
    """20,001 x 1 pixels would be resized to 1,280,064 x 64. Only the one in the middle is white."""
    strip = Image.new("L", (20001, 1))
    strip.putpixel((10000, 0), 255)
    strip.save("strip.png")
    seen = embed.load_photo(CLIP._replace(preprocess=np.array), "strip.png")
    assert seen.tolist() == [[[255] * 3]]


def test_large_jpegs_are_decoded_smaller():
    """4000 x 3000 pixels are decoded at a quarter, since 3000 / 8 is less than 448."""
    photo = PICTURE.resize((4000, 3000), Image.BICUBIC)
    photo.save("large.jpg")
    assert data.open_photo("large.jpg", 448).size == (1000, 750)
    found = embed.load_photo(CLIP, "large.jpg")
    torch.testing.assert_close(found, CLIP.preprocess(photo), atol=0.1, rtol=0)


def test_a_crop_by_hand():
    """A quarter of 512 x 384 pixels, 4/3 as wide as high, at the upper right: 256 x 192. Mirrored or not."""
    photo = PICTURE.resize((512, 384))
    photo.save("photo.png")
    expected = CLIP.preprocess(photo.crop((256, 0, 512, 192)).resize((64, 64), Image.BICUBIC))
    for coin, crop in ((0.5, expected), (0.4, expected.flip(2))):
        generator = Mock(uniform=Mock(side_effect=[0.25, 1, 256, 0]), random=Mock(return_value=coin))
        found = embed.load_photo(CLIP, "photo.png", generator, 0.2)
        assert torch.equal(found[:, 2:-2, 2:-2], crop[:, 2:-2, 2:-2])  # at its edges it blends with what is beside it
        assert generator.uniform.mock_calls == [call(0.2, 1), call(-1, 1), call(0, 256), call(0, 192)]


@pytest.fixture
def misfit(tmp_path, monkeypatch):
    """A torchvision without its operators, which fits no torch, for every process except forks, which have imported the
    real one. -> a file that its import writes"""
    folder = tmp_path / "torchvision"
    folder.mkdir()
    real = importlib.util.find_spec("torchvision").submodule_search_locations
    (folder / "__init__.py").write_text("import torch\n"
                                        f"open({str(tmp_path / 'imported')!r}, 'w').close()\n"
                                        "torch.library.register_fake('torchvision::nms')(print)\n"
                                        f"__path__ += {list(real)}")
    (folder / "extension.py").write_text("_has_ops = _assert_has_ops = _load_library = lambda *_: False")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "imported"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_random_crops_hang_on_seed_epoch_and_row_alone(misfit, capsys, method):
    """Not on the number of workers, how they start, the batches, or torch's random state, which they do not change."""
    state = torch.get_rng_state()
    crops = [embed.load_photo(CLIP, PHOTOS[row], np.random.default_rng([1, 2, row]), 0.3) for row in (2, 0)]
    expected = torch.stack([*crops, torch.zeros(3, 64, 64)])
    torch.multiprocessing.set_sharing_strategy("file_system")  # with it a tensor that a worker sends becomes a file
    torch.multiprocessing.set_start_method(method, force=True)
    batches = embed.decoded(CLIP, [*PHOTOS, method], [[2], [0, 6]], 2, (1, 2, 0.3))
    images, readable = map(torch.cat, zip(*batches, strict=True))
    torch.multiprocessing.set_start_method("fork", force=True)
    assert torch.equal(images, expected) and readable.tolist() == [True, True, False]
    assert misfit.exists() == (method != "fork")
    assert not glob.glob("/dev/shm/torch_*")  # Docker gives shared memory 64 MB: no batch must go through it
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().err.count(f"{method}: cannot be read") == 1


def test_unreadable_photos_are_named_and_left_out(capsys):
    """The other photos keep their own features, with and without the cache. The first photo is broken."""
    Path("torn.png").touch()
    photos = ["torn.png", PHOTOS[0], "missing.png", PHOTOS[1], PHOTOS[0]]
    expected = torch.stack([embed.load_photo(CLIP, photos[row]) for row in (1, 3, 4)])
    for cache in (None, ".", "."):
        x0, X, rows = embed.embed_regions(CLIP, photos, lambda _, images: (images[:, 0, 0], images[:, 1].mT), cache)
        assert rows.tolist() == [1, 3, 4]
        assert torch.equal(x0, expected[:, 0, 0]) and torch.equal(X, expected[:, 1].mT.half())
    said = capsys.readouterr().err
    assert said.count("torn.png: cannot") == 1 and said.count("2 of 5 photos could") == 3
    with refused("no photo could be read"):
        embed.embed_photos(CLIP, photos[:1])


# --- cache ------------------------------------------------------------------------------------------------------------

def test_one_new_photo_costs_one_encoding_and_a_moved_folder_none():
    """Photos of the same size and time, two with each name"""
    photos = [Path(f"photos/{index % 2}/{index // 2}.bmp") for index in range(101)]
    for folder in "01":
        Path("photos", folder).mkdir(parents=True)
    for index, photo in enumerate(photos):
        Image.new("RGB", (8, 8), (index, index, 9)).save(photo)
        os.utime(photo, (1e9, 1e9))
    colour = MeanColour()
    colour.rows(photos[:99] + photos[100:])
    colour.rows(photos)
    Path("photos").rename("moved")
    rows = colour.rows(sorted(Path("moved").glob("*/*")))
    assert colour.sizes == [64, 36, 1]
    assert len({tensors["mean"][0].item() for tensors in rows.values()}) == 101


def test_rows_are_stored_and_given_out_batch_by_batch(monkeypatch, capsys):
    """A run killed after its first batch loses nothing of it: the next one, here beside it, encodes the others, once a
    third one has written."""
    monkeypatch.setattr(embed, "BATCH", 2)
    colour = MeanColour()
    killed = embed.encode_photos(CLIP, PHOTOS, "mean colour", colour, ".", 0, True)
    next(killed)
    assert colour.sizes == [2]
    other = sqlite3.connect("features.sqlite", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.5, other.rollback).start()
    colour.rows(PHOTOS)
    assert colour.sizes == [2, 2, 2] and not capsys.readouterr().err


def test_cache_follows_what_it_was_computed_from():
    """The key has the photo, the model with its resolution, the precision and the texts; nothing is computed twice."""
    clips = [CLIP, embed.load_clip(resolution=128), embed.load_clip(precision="bf16")]
    photos = [embed.embed_photos(clip, PHOTOS[:2], ".")[0] for clip in clips]
    texts = [embed.embed_texts(clip, ["a", "b"], ".") for clip in clips]
    assert {found.dtype for found in photos + texts} == {torch.float32}
    assert len(torch.cat(photos).unique(dim=0)) == 6
    assert len(torch.cat(texts).unique(dim=0)) == 4  # the resolution does not change texts
    stored = CLIP._replace(model=None, name="stored")
    assert torch.equal(embed.embed_photos(stored, PHOTOS[1:2], ".")[0], photos[0][1:])
    assert torch.equal(embed.embed_texts(stored, ["b", "a"], "."), texts[0][[1, 0]])


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:5000]),
    lambda path: sqlite3.connect(path, isolation_level=None).execute("UPDATE features SET tensors = ?",
                                                                     [pickle.dumps(Bomb())])])
def test_a_damaged_cache_is_set_aside(capsys, damage):
    colour = MeanColour()
    colour.rows(PHOTOS)
    damage(Path("features.sqlite"))
    for _ in range(2):
        assert all(colour.rows(PHOTOS).values())
    assert colour.sizes == [6, 6] and capsys.readouterr().err.count("features.sqlite: damaged") == 1
    assert sorted(os.listdir()) == ["features.sqlite", "features.sqlite.damaged"]


def test_a_cache_that_cannot_be_written_is_done_without(capsys, monkeypatch):
    """What it holds is used."""
    colour = MeanColour()
    colour.rows(PHOTOS[:4])
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(f"file:{path}?mode=ro", uri=True))
    for _ in range(2):
        assert all(colour.rows(PHOTOS).values())
    assert colour.sizes == [4, 2, 2]
    assert capsys.readouterr().err.count("continuing without it") == 1


def test_processes_of_torchrun_share_the_photos(monkeypatch):
    """Process 1 of 2 has encoded every second photo when it waits, and then finds those of process 0 in the cache."""
    colour = MeanColour()
    other = MeanColour()
    come = Mock(side_effect=lambda: other.rows(PHOTOS[::2], share=False))
    monkeypatch.setattr(embed, "distributed", Mock(barrier=come, **{"get_rank.return_value": 1,
                                                                    "get_world_size.return_value": 2}))
    colour.rows(PHOTOS)
    assert colour.sizes == other.sizes == [3]


def test_a_worker_ends_with_its_parent():
    """The parent is killed while its worker waits to hand over a batch too large for a pipe; the pipe that both write
    to is closed once both have ended."""
    code = ("import embed, time\n"
            "for batch in embed.decoded(embed.load_clip(), [('test', 0)] * 32, [range(32)] * 9, 1):\n"
            "    print('at work', flush=True)\n"
            "    time.sleep(100)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=20)
