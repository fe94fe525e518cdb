"""embed.py against open_clip's own loading, on small towers; its cache; and what it says of bad photos and weights."""
import glob
import importlib.util
import json
import multiprocessing.forkserver
import os
import pickle
import re
import runpy
import sqlite3
import subprocess
import sys
import threading
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import embed
import scenes
from data import UsageError

PHOTOS = [("test", index) for index in range(6)]
CLIP = embed.load_clip()
open_clip = embed.import_open_clip()


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """{name: file of random weights, which half precision holds, too} of small models, which open_clip knows from here
    on."""
    folder = tmp_path_factory.mktemp("towers")
    text = {"context_length": 40, "width": 32, "heads": 2, "layers": 2}
    unmasked = {**text, "no_causal_mask": True, "pool_type": "last"}
    vit = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64}
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "image_size": 64}
    timm = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224}
    configs = {"ViT": {"vision_cfg": vit},
               "ViT-quickgelu": {"vision_cfg": vit, "quick_gelu": True},
               "ResNet": {"vision_cfg": resnet},
               "Sigmoid": {"vision_cfg": timm, "text_cfg": unmasked, "custom_text": True}}
    for name, config in configs.items():
        path = folder / f"small-{name}.json"
        path.write_text(json.dumps({"embed_dim": 32, "text_cfg": text, **config}))
        open_clip.add_model_config(path)
        state = open_clip.create_model(path.stem).half().float().state_dict()
        save_file(state, path.with_suffix(".safetensors"))
    return {path.stem: str(path) for path in folder.glob("*.safetensors")}


class MeanColour:
    """An encoder that notes how many images it was given, call by call."""
    def __init__(self):
        self.sizes = []

    def __call__(self, images):
        self.sizes.append(len(images))
        return {"mean": images.mean((2, 3))}

    def rows(self, photos, cache, **options):
        return dict(embed.encode_photos(CLIP, photos, "mean colour", self, cache, 0, True, **options))


# --- CLIP -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, resolution", [
    ("small-ViT", None), ("small-ViT", 96), ("small-ResNet", None), ("small-Sigmoid", 64)])
def test_embeddings_equal_open_clips(towers, tmp_path, name, resolution):
    """The same weights loaded, resized and preprocessed by open_clip alone. We get them in half precision, as many
    publish them; the first text is too long, one is empty."""
    texts = ["boat " * 99, "a red boat at sea", ""]
    model, _, preprocess = open_clip.create_model_and_transforms(name, towers[name], force_image_size=resolution)
    images = torch.stack([preprocess(scenes.picture(*photo)[0]) for photo in PHOTOS])
    half = {key: tensor.half() for key, tensor in load_file(towers[name]).items()}
    save_file(half, tmp_path / "half.safetensors")
    clip = embed.load_clip(name, str(tmp_path / "half.safetensors"), resolution=resolution)
    with torch.no_grad():
        expected = model.eval().encode_image(images, normalize=False)
        torch.testing.assert_close(embed.embed_photos(clip, PHOTOS)[0], expected)
        expected = model.encode_text(open_clip.get_tokenizer(name)(texts), normalize=False)
    torch.testing.assert_close(embed.embed_texts(clip, texts), expected, atol=1e-5, rtol=1e-5)


def test_resnet_at_another_resolution(towers):
    """Its positions are interpolated, so a column's mean stays; the first, of the mean over the grid, stays itself."""
    clips = [embed.load_clip("small-ResNet", towers["small-ResNet"], resolution=side) for side in (64, 128)]
    before, after = [clip.model.visual.attnpool.positional_embedding for clip in clips]
    assert len(after) == 1 + 4 * 4 and torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1:].mean(0), before[1:].mean(0))


def test_key_follows_what_is_computed(towers, tmp_path, monkeypatch, capsys):
    """The same weights by a tag that implies QuickGELU and under the name that does: one key; with GELU another."""
    weights = load_file(towers["small-ViT"])
    tags = {"openai": {}, "mean": {"mean": (0.5, 0.5, 0.5)}, "squashed": {"resize_mode": "squash"}}
    monkeypatch.setattr(embed, "WEIGHTS", tmp_path)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-ViT", tags)
    for tag in tags.values():
        tag["quick_gelu"] = True
    save_file(weights, tmp_path / "small-ViT.openai.safetensors")  # found there
    torch.save(weights, tmp_path / "small-ViT.mean.pt")
    torch.save(weights, tmp_path / "small-ViT.squashed.bin")
    keys = [embed.load_clip("small-ViT", tag).key for tag in tags]
    assert not capsys.readouterr().err
    assert keys[0] == embed.load_clip("small-ViT-quickgelu", towers["small-ViT"]).key
    assert "read with quick_gelu True " in capsys.readouterr().err
    keys.append(embed.load_clip("small-ViT", towers["small-ViT"]).key)
    said = capsys.readouterr().err
    assert re.search("read with quick_gelu False .*-quickgelu.* mean .0.48.* std .0.26.* resize_mode shortest", said)
    weights["logit_scale"] += 1e-3
    torch.save(weights, tmp_path / "epoch_1.pt")
    keys.append(embed.load_clip("small-ViT", tmp_path / "epoch_1.pt").key)
    assert len(set(keys)) == 5


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_state_dicts_as_people_have_them(towers, tmp_path, prefix):
    """With OpenAI's three numbers, which are no parameters, and the mask that old files hold"""
    more = {"input_resolution": torch.tensor(64), "context_length": 40, "vocab_size": 9, "attn_mask": torch.zeros(2, 2)}
    state = {prefix + name: tensor for name, tensor in {**more, **load_file(towers["small-ViT"])}.items()}
    for stored in (state, {"epoch": 1, "model_state_dict": state}):
        torch.save(stored, tmp_path / "weights.pt")
        found = embed.load_clip("small-ViT", tmp_path / "weights.pt").key
        assert found == embed.load_clip("small-ViT", towers["small-ViT"]).key


def test_local_dir_and_random_weights(towers, tmp_path, capsys):
    with pytest.raises(UsageError, match="open_clip_config.json: no such file"):
        embed.load_clip(f"local-dir:{tmp_path}")
    config = {"model_cfg": open_clip.get_model_config("small-ViT")}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    with pytest.raises(UsageError, match="open_clip_model.safetensors: no such file"):
        embed.load_clip(f"local-dir:{tmp_path}")
    first = embed.load_clip("small-ViT", "none").key
    assert embed.load_clip(f"local-dir:{tmp_path}", "none").key == first
    save_file(load_file(towers["small-ViT"]), tmp_path / "open_clip_model.safetensors")
    stored = embed.load_clip(f"local-dir:{tmp_path}").key
    assert stored == embed.load_clip("small-ViT", towers["small-ViT"]).key != first
    assert torch.initial_seed() == 1 and capsys.readouterr().err.count("random weights") == 2


@pytest.mark.parametrize("words, message", [
    (["ViT-B-61"], "ViT-B-61: open_clip has no .*try ViT-B-16"),
    (["scene"], "try scenes"),
    (["ViT-B-32", "laion"], "--pretrained laion: no file, and open_clip has no such weights of ViT-B-32; try openai"),
    (["roberta-ViT-B-32", "none"], "transformers.*install the package"),
    (["small-ViT", "none", "cpu", "fp32", 100], "--resolution 100: must be a positive multiple of 16"),
    (["small-ResNet", "none", "cpu", "fp32", -32], "--resolution -32: must be a positive multiple of 32")])
def test_refuses(towers, words, message):
    with pytest.raises(UsageError, match=message):
        embed.load_clip(*words)


class Code:
    """A pickle that runs code when it is read."""
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_what_is_no_weights_file(towers, tmp_path, monkeypatch):
    """It is named as what it is; nothing in it is run."""
    monkeypatch.chdir(tmp_path)
    script = torch.jit.script(torch.nn.Linear(2, 2)).save_to_buffer()
    for content, what in ((b"", "empty"), (script[:500], "damaged"), (script, "TorchScript"), (b" <html>", "web page"),
                          (b"version https://git-lfs", "Git LFS pointer"), (b'{"error": "not found"}', "JSON"),
                          (pickle.dumps(Code()), "pickled objects"), (pickle.dumps(Code(), 0), "pickled objects")):
        (tmp_path / "weights.pt").write_bytes(content)
        with pytest.raises(UsageError, match=f"^--backbone small-ViT, weights weights.pt: this is .*{what}.*; give we"):
            embed.load_clip("small-ViT", "weights.pt")
    assert os.listdir() == ["weights.pt"]


@pytest.mark.parametrize("name, value, message", [
    ("vision_model.post_layernorm.weight", 1.0, "names of transformers' models"),
    ("visual.proj", np.int8(1), "visual.proj is torch.int8: quantised"),
    ("logit_scale", np.nan, "weights .*: hold values that are not finite .in logit_scale"),
    ("ln_final.bias", 0, "weights .*: .* size mismatch for ln_final.bias.*; give weights of this very model")])
def test_wrong_weights(towers, tmp_path, name, value, message):
    save_file({**load_file(towers["small-ViT"]), name: torch.tensor(value)}, tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match=message):
        embed.load_clip("small-ViT", tmp_path / "weights.safetensors")


def test_weights_that_are_not_on_this_machine(tmp_path, monkeypatch):
    """Says at once which file to get and where to put it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", tmp_path)
    monkeypatch.setattr(embed, "urlopen", Mock(side_effect=OSError("no network")))
    with pytest.raises(UsageError, match="_model.safetensors, put it at .*weights/ViT-B-32.openai.safetensors$"):
        embed.load_clip("ViT-B-32")
    with pytest.raises(UsageError, match="weights of hf-hub:a/b .*_model.safetensors, put it and .*local-dir:FOLDER$"):
        embed.load_clip("hf-hub:a/b")


def test_texts_too_long_and_unknown_words_are_said(capsys):
    fits = "boat " * 38  # and two tokens that mark start and end: 40
    embed.embed_texts(CLIP, [fits, fits + "boat", "a photo of a zebra.", "another zebra"])
    said = capsys.readouterr().err
    assert said.count("zebra") == 1 and "photo" not in said
    assert "1 of 4 texts are longer than 40 tokens and were cut" in said


# --- photos -----------------------------------------------------------------------------------------------------------

def test_raw_files_and_videos_are_counted_and_heic_is_read_where_it_can_be(tmp_path, capsys, monkeypatch):
    for name in ("a.jpg", "b.CR2", "c.cr2", "d.mov", "e.heic", "labels.csv"):
        (tmp_path / name).touch()
    heif = Mock(__spec__=Mock())
    for library, count in ((heif, 2), (None, 1)):
        monkeypatch.setitem(sys.modules, "pillow_heif", library)
        fresh = runpy.run_path(data.__file__)
        assert len(fresh["list_photos"](tmp_path)) == count
        with pytest.raises(OSError):
            fresh["open_photo"](tmp_path / "e.heic")  # empty
    assert heif.register_heif_opener.call_count == 1  # not by an import
    said = capsys.readouterr().err
    assert re.search("2 .cr2 photos, which .*b.CR2.*\n.*1 .mov videos are .*\n.*1 .heic .*get pillow-heif.*\n$", said)


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.webp"])
def test_exif_that_cannot_be_parsed(tmp_path, name):
    """No turning; a torn photo stays an error."""
    expected = scenes.picture("test", 0)[0]
    expected.save(tmp_path / name, exif=b"Exif\0\0no TIFF", lossless=True, quality=100)
    np.testing.assert_allclose(data.open_photo(tmp_path / name), expected, atol=60)  # JPEG
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-500])
    with pytest.raises(OSError):
        data.open_photo(tmp_path / name)


def test_grey_of_12_bits(tmp_path):
    """In 16 bits the value 3000 of 4095 is 187 of 255, and 48,000 of 65,535 too."""
    for value in (3000, 48000):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "grey.tif")
        assert data.open_photo(tmp_path / "grey.tif").getpixel((0, 0)) == (187, 187, 187)


def test_a_strip_is_cut_to_its_middle(tmp_path):
    """20,001 x 1 pixels would be resized to 1,280,064 x 64. Only the one in the middle is white."""
    strip = Image.new("L", (20001, 1))
    strip.putpixel((10000, 0), 255)
    strip.save(tmp_path / "strip.png")
    watched = CLIP._replace(preprocess=Mock())
    embed.load_photo(watched, tmp_path / "strip.png")
    assert np.array_equal(watched.preprocess.call_args.args[0], np.full((1, 1, 3), 255))


def test_large_jpegs_are_decoded_smaller(tmp_path):
    """4000 x 3000 pixels, turned by EXIF, at a quarter: 3000 / 8 is less than 448."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = scenes.picture("test", 0)[0].resize((4000, 3000), Image.BICUBIC)
    photo.save(tmp_path / "large.jpg", exif=exif)
    assert data.open_photo(tmp_path / "large.jpg", 448).size == (750, 1000)
    found = embed.load_photo(CLIP, tmp_path / "large.jpg")
    torch.testing.assert_close(found, CLIP.preprocess(photo.rotate(270, expand=True)), atol=0.1, rtol=0)


def test_a_crop_by_hand(tmp_path):
    """Of 512 x 384 pixels a quarter, 4/3 as wide as high, at the upper right: 256 x 192. As it is or mirrored."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (384, 512, 3), np.uint8))
    photo.save(tmp_path / "photo.png")
    expected = CLIP.preprocess(photo.crop((256, 0, 512, 192)).resize((64, 64), Image.BICUBIC))
    for coin, crop in ((0.5, expected), (0.4, expected.flip(2))):
        generator = Mock(uniform=Mock(side_effect=[0.25, 1, 256, 0]), random=Mock(return_value=coin))
        found = embed.load_photo(CLIP, tmp_path / "photo.png", generator, 0.2)
        assert torch.equal(found[:, 2:-2, 2:-2], crop[:, 2:-2, 2:-2])  # at its edges it blends with what is beside it
        assert generator.uniform.mock_calls == [call(0.2, 1), call(-1, 1), call(0, 256), call(0, 192)]


@pytest.fixture
def misfit(tmp_path, monkeypatch):
    """A torchvision without its operators, which fits no torch, for every new process: a fork has imported another, and
    so has the forkserver of other tests. -> a file that its import writes"""
    folder = tmp_path / "torchvision"
    folder.mkdir()
    real = importlib.util.find_spec("torchvision").submodule_search_locations
    (folder / "__init__.py").write_text("import torch\n"
                                        f"open({str(tmp_path / 'imported')!r}, 'w').close()\n"
                                        "torch.library.register_fake('torchvision::nms')(print)\n"
                                        f"__path__ += {list(real)}")
    (folder / "extension.py").write_text("_has_ops = _assert_has_ops = _load_library = lambda *_: False")
    monkeypatch.syspath_prepend(tmp_path)
    forkserver = multiprocessing.forkserver
    monkeypatch.setattr(forkserver, "connect_to_new_process", forkserver.ForkServer().connect_to_new_process)
    return tmp_path / "imported"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_random_crops_hang_on_seed_epoch_and_row_alone(misfit, tmp_path, capsys, method):
    """Not on the number of workers, how they start, the batches, or torch's random state, which they leave alone."""
    state = torch.get_rng_state()
    crops = [embed.load_photo(CLIP, PHOTOS[row], np.random.default_rng([1, 2, row]), 0.3) for row in (2, 0)]
    expected = torch.stack([*crops, torch.zeros(3, 64, 64)])
    torch.multiprocessing.set_sharing_strategy("file_system")  # with it a tensor that a worker sends becomes a file
    torch.multiprocessing.set_start_method(method, force=True)
    batches = embed.decoded(CLIP, [*PHOTOS, tmp_path / "none.jpg"], [[2], [0, 6]], 2, (1, 2, 0.3))
    images, readable = map(torch.cat, zip(*batches, strict=True))
    torch.multiprocessing.set_start_method("fork", force=True)
    assert torch.equal(images, expected) and readable.tolist() == [True, True, False]
    assert misfit.exists() == (method != "fork")
    assert not glob.glob("/dev/shm/torch_*")  # Docker gives shared memory 64 MB: no batch must go through it
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().err.count("none.jpg: cannot be read") == 1


def test_unreadable_photos_are_named_and_left_out(tmp_path, capsys):
    """Those beside them keep their own features, with and without the cache. The first is broken."""
    torn = tmp_path / "torn.png"
    scenes.picture("test", 0)[0].save(torn)
    torn.write_bytes(torn.read_bytes()[:900])
    photos = [torn, PHOTOS[0], tmp_path / "missing.png", PHOTOS[1], PHOTOS[0]]
    expected = torch.stack([embed.load_photo(CLIP, photos[row]) for row in (1, 3, 4)])
    for cache in (None, tmp_path, tmp_path):
        x0, X, rows = embed.embed_regions(CLIP, photos, lambda _, images: (images[:, 0, 0], images[:, 1].mT), cache)
        assert rows.tolist() == [1, 3, 4]
        assert torch.equal(x0, expected[:, 0, 0]) and torch.equal(X, expected[:, 1].mT.half())
    said = capsys.readouterr().err
    counts = [said.count(part) for part in ("torn.png: cannot", "missing.png: cannot", "2 of 5 photos could")]
    assert counts == [1, 1, 3]
    with pytest.raises(UsageError, match="no photo could be read"):
        embed.embed_photos(CLIP, photos[:1])


# --- cache ------------------------------------------------------------------------------------------------------------

def test_one_new_photo_costs_one_encoding_and_a_moved_folder_none(tmp_path):
    """Photos of one size and time, and two of each name"""
    photos = [tmp_path / "photos" / str(index % 2) / f"{index // 2}.bmp" for index in range(101)]
    for index, photo in enumerate(photos):
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, index, 9)).save(photo)
        os.utime(photo, (1e9, 1e9))
    colour = MeanColour()
    colour.rows(photos[:99] + photos[100:], tmp_path)
    colour.rows(photos, tmp_path)
    (tmp_path / "photos").rename(tmp_path / "moved")
    rows = colour.rows(sorted(tmp_path.glob("moved/*/*.bmp")), tmp_path)
    assert colour.sizes == [64, 36, 1]
    assert len({tensors["mean"][0].item() for tensors in rows.values()}) == 101


def test_rows_are_stored_and_given_out_batch_by_batch(tmp_path, monkeypatch):
    """A run that is killed after its first batch has lost nothing: the next one, here beside it, encodes the others."""
    monkeypatch.setattr(embed, "BATCH", 2)
    colour = MeanColour()
    killed = embed.encode_photos(CLIP, PHOTOS, "mean colour", colour, tmp_path, 0, True)
    next(killed)
    assert colour.sizes == [2]
    colour.rows(PHOTOS, tmp_path)
    assert colour.sizes == [2, 2, 2]


def test_a_run_waits_while_another_one_writes(tmp_path, capsys):
    colour = MeanColour()
    colour.rows(PHOTOS[:1], tmp_path)
    other = sqlite3.connect(tmp_path / "features.sqlite", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.5, other.rollback).start()
    colour.rows(PHOTOS, tmp_path)
    assert colour.sizes == [1, 5] and not capsys.readouterr().err


def test_cache_follows_what_it_was_computed_from(tmp_path):
    """The photo, the model with its resolution, the precision and the texts; nothing is computed twice."""
    clips = [CLIP, embed.load_clip(resolution=128), embed.load_clip(precision="bf16")]
    photos = [embed.embed_photos(clip, [photo], tmp_path)[0] for photo in PHOTOS[:2] for clip in clips]
    texts = [embed.embed_texts(clip, [text], tmp_path) for text in "ab" for clip in clips]
    assert {embeddings.dtype for embeddings in photos + texts} == {torch.float32}
    assert len(torch.cat(photos).unique(dim=0)) == 6
    assert len(torch.cat(texts).unique(dim=0)) == 4  # the resolution is nothing to texts
    stored = CLIP._replace(model=None, name="stored")
    assert torch.equal(embed.embed_photos(stored, PHOTOS[1:2], tmp_path)[0], photos[3])
    assert torch.equal(embed.embed_texts(stored, ["b", "a"], tmp_path), torch.cat([texts[3], texts[0]]))


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b"no database" * 999),
    lambda path: path.write_bytes(path.read_bytes()[:5000]),
    lambda path: sqlite3.connect(path, isolation_level=None).execute("UPDATE features SET tensors = ?",
                                                                     [pickle.dumps(Code())])])
def test_a_damaged_cache_is_set_aside(tmp_path, capsys, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    colour = MeanColour()
    colour.rows(PHOTOS, tmp_path)
    damage(tmp_path / "features.sqlite")
    for _ in range(2):
        assert all(colour.rows(PHOTOS, tmp_path).values())
    assert colour.sizes == [6, 6] and capsys.readouterr().err.count("features.sqlite: damaged") == 1
    assert sorted(os.listdir()) == ["features.sqlite", "features.sqlite.damaged"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, capsys, monkeypatch):
    """What is in it is used."""
    colour = MeanColour()
    colour.rows(PHOTOS[:4], tmp_path)
    assert all(colour.rows(PHOTOS, tmp_path / "features.sqlite").values())  # no folder
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(f"file:{path}?mode=ro", uri=True))
    for _ in range(2):
        assert all(colour.rows(PHOTOS, tmp_path).values())
    assert colour.sizes == [4, 6, 2, 2]
    assert capsys.readouterr().err.count("going on without") == 2


def test_processes_of_torchrun_share_the_photos(tmp_path, monkeypatch):
    """Process 1 of 2 has encoded every second photo when it waits, and then finds the others, those of process 0."""
    colour = MeanColour()
    other = MeanColour()
    come = Mock(side_effect=lambda: other.rows(PHOTOS[::2], tmp_path, share=False))
    for name, value in (("is_initialized", lambda: True), ("get_rank", lambda: 1), ("get_world_size", lambda: 2),
                        ("barrier", come)):
        monkeypatch.setattr(torch.distributed, name, value)
    rows = colour.rows(PHOTOS, tmp_path)
    assert colour.sizes == other.sizes == [3]
    assert torch.equal(rows[4]["mean"], embed.load_photo(CLIP, PHOTOS[4]).mean((1, 2)))


def test_a_worker_ends_with_its_parent():
    """The parent is killed while its worker waits for ever; what both would write to is closed when both have ended."""
    code = ("import embed, multiprocessing, time\n"
            "def work(): embed._end_with_parent(0); print('at work', flush=True); time.sleep(100)\n"
            "multiprocessing.Process(target=work).start()")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=20)
