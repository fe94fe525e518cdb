"""embed.py against open_clip's own loading, on small towers; and what it says of bad photos, weights and caches."""
import glob
import json
import os
import re
import urllib.request
import weakref
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import embed
import scenes
from data import UsageError

TEXTS = ["a photo of a dog.", "two cats"]
PHOTOS = [("test", index) for index in range(6)]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """{name: file of random weights} of small towers, which open_clip knows from here on."""
    folder, open_clip = tmp_path_factory.mktemp("towers"), embed.import_open_clip()
    text = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    for name, vision in (("small-ViT", {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16}),
                         ("small-ResNet", {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None})):
        config = {"embed_dim": 32, "vision_cfg": {"image_size": 64, **vision}, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
        save_file(open_clip.create_model(name).state_dict(), folder / f"{name}.safetensors")
    return {path.stem: path for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def clip():
    return embed.load_clip()


@pytest.mark.parametrize("name, resolution", [("small-ViT", None), ("small-ViT", 96), ("small-ResNet", None)])
def test_embeddings_equal_open_clips(towers, name, resolution):
    """The same file loaded, resized and preprocessed by open_clip alone. (It has no other resolution for a ResNet.)"""
    open_clip, path = embed.import_open_clip(), str(towers[name])
    model, _, preprocess = open_clip.create_model_and_transforms(name, path, force_image_size=resolution)
    with torch.no_grad():
        texts = model.encode_text(open_clip.get_tokenizer(name)(TEXTS))
        images = model.eval().encode_image(torch.stack([preprocess(data.open_photo(photo)) for photo in PHOTOS]))
    clip = embed.load_clip(name, path, resolution=resolution)
    torch.testing.assert_close(embed.embed_texts(clip, TEXTS, batch_size=1), texts)
    torch.testing.assert_close(embed.embed_photos(clip, PHOTOS)[0], images)


def test_resnet_at_another_resolution(towers):
    """Position embeddings that grow linearly from left to right do so on a wider grid too; the mean's own one stays."""
    weights, path = load_file(towers["small-ResNet"]), towers["small-ResNet"].with_name("ramp.safetensors")
    weights["visual.attnpool.positional_embedding"][:, 0] = torch.tensor([7.0, 0, 1, 0, 1])
    save_file(weights, path)
    clip = embed.load_clip("small-ResNet", str(path), resolution=128)
    mean, grid = clip.model.visual.attnpool.positional_embedding[:, 0].split([1, 4 * 4])
    assert mean == 7 and (grid.view(4, 4).diff(dim=1) > 0).all() and grid.view(4, 4).diff(dim=0).abs().max() < 1e-5
    assert embed.embed_photos(clip, PHOTOS[:1])[0].isfinite().all() and clip.image_size == (128, 128)
    assert len({(torch.manual_seed(seed), embed.load_clip("small-ViT", "none"))[1].key for seed in (1, 2)}) == 1


def test_regions_keep_the_order_of_the_photos(clip, tmp_path):
    def quarters(_, images):  # image_features here: the mean colour, and the colours of four quarters
        return images.mean((2, 3)), torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(2).mT
    x0, X, kept = embed.embed_regions(clip, [*PHOTOS, tmp_path / "none.jpg", *PHOTOS[:2]], quarters)
    expected = quarters(None, torch.stack([embed.load_photo(clip, photo) for photo in [*PHOTOS, *PHOTOS[:2]]]))
    assert kept.tolist() == [0, 1, 2, 3, 4, 5, 7, 8] and X.dtype == torch.float16
    torch.testing.assert_close((x0, X.float()), expected, atol=2e-3, rtol=0)


def test_a_crop_by_hand(clip, tmp_path):
    """A quarter of the area, square, from (64, 0): half green, half red, as it is or mirrored."""
    photo = Image.new("RGB", (128, 128))
    photo.paste((0, 255, 0), (64, 0, 96, 64))
    photo.paste((255, 0, 0), (96, 0, 128, 64))
    photo.save(tmp_path / "photo.png")
    draws = [Mock(uniform=Mock(side_effect=[0.25, 0.0, 64, 0]), random=lambda by=by: by) for by in (0.5, 0.4)]
    crop, mirrored = (embed.load_photo(clip, tmp_path / "photo.png", generator, 0.2) for generator in draws)
    assert crop[:, 32, 8].argmax() == 1 and crop[:, 32, -8].argmax() == 0 and torch.equal(mirrored, crop.flip(2))
    assert (crop[:, :, :24].std((1, 2)) < 1e-5).all()  # nothing black came in


def test_random_crops_hang_on_seed_epoch_and_row_alone(clip, tmp_path, capsys):
    """Not on the number of workers, the batches, or torch's random state, which they leave alone."""
    photos, state = [*PHOTOS, tmp_path / "none.jpg"], torch.get_rng_state()
    torch.multiprocessing.set_sharing_strategy("file_system")  # with it a tensor that a worker sends becomes a file
    whole = list(embed.decoded(clip, photos, [[0, 1, 2, 3], [4, 5, 6]], 2, (1, 2, 0.3)))
    assert not glob.glob("/dev/shm/torch_*")  # Docker gives shared memory 64 MB: no batch must go through it
    whole = torch.cat([images for images, _ in whole])
    for workers, batches in ((0, [[2], [0], [6]]), (1, [[2, 0], [6]]), (2, [[2], [0, 6]])):
        images, readable = zip(*embed.decoded(clip, photos, batches, workers, (1, 2, 0.3)), strict=True)
        assert torch.equal(torch.cat(images), whole[[2, 0, 6]]) and torch.cat(readable).tolist() == [True, True, False]
    (other, _), = embed.decoded(clip, photos, [range(6)], 0, (1, 3, 0.3))
    assert not (other == whole[:6]).flatten(1).all(1).any() and not whole[6].any()
    assert torch.equal(torch.get_rng_state(), state) and capsys.readouterr().err.count("none.jpg: cannot be read") == 1


def test_unreadable_photos_are_named_and_left_out(clip, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(embed, "PHOTOS", 1)  # so that a block has no readable photo
    scenes.picture("test", 0)[0].save(tmp_path / "whole.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    photos = [tmp_path / name for name in ("torn.jpg", "whole.jpg", "missing.jpg", "whole.jpg")]
    for _ in range(2):  # computed, then from the cache
        embeddings, kept = embed.embed_photos(clip, photos, tmp_path / "cache")
        assert embeddings.shape == (2, 96) and embeddings.isfinite().all() and kept.tolist() == [1, 3]
        said = capsys.readouterr().err
        torn, missing = "torn.jpg: cannot be read .image file is tr.*; left out", "missing.jpg: .*No such.*; left out"
        assert re.fullmatch(f"photo .*{torn}\nphoto .*{missing}\n2 of 4 photos could not be read\n", said)
    with pytest.raises(UsageError, match="no photo could be read"):
        embed.embed_photos(clip, photos[:1], tmp_path / "cache")


@pytest.mark.parametrize("name", ["scenes", "small-ViT", "small-ResNet"])
def test_texts_are_encoded_as_open_clip_does(towers, clip, name):
    """Though the positions behind the longest text's end are left out; the first is cut, the second one token long."""
    model = clip if name == "scenes" else embed.load_clip(name, str(towers[name]))
    texts = ["boat " * 99, "a", "a red boat at sea", ""]
    for some in (texts, texts[1:]):
        expected = model.model.encode_text(model.tokenizer(some))
        torch.testing.assert_close(embed.embed_texts(model, some), expected, atol=1e-5, rtol=1e-5)


def test_streaming_holds_one_block_at_a_time(clip, tmp_path, monkeypatch):
    """Memory does not grow with the photos: what was given out before is gone when the next block but one comes."""
    monkeypatch.setattr(embed, "PHOTOS", 2)
    blocks = []
    for _, tensors in embed.stream_photos(clip, PHOTOS, cache=tmp_path):
        assert not any(block() is not None for block in blocks[:-1])
        blocks.append(weakref.ref(tensors["embeddings"]))
    assert len(blocks) == 3


def test_texts_too_long_and_unknown_words_are_said(clip, capsys):
    fits = "boat " * 38  # and two tokens that mark start and end: 40
    embed.embed_texts(clip, [fits, fits + "boat", "a photo of a zebra.", "another zebra"])
    said = capsys.readouterr().err
    assert said.count("zebra") == 1 and "1 of 4 texts are longer than 40 tokens and were cut" in said


def test_cache_follows_what_it_was_computed_from(clip, tmp_path, monkeypatch):
    """The photo, the resolution, the precision and the texts; nothing is computed twice."""
    photo, folder, made = tmp_path / "photo.bmp", tmp_path / "cache", []
    clips = [clip, embed.load_clip(resolution=128), embed.load_clip(precision="bf16")]
    for index in (0, 1):  # files of one size
        scenes.picture("test", index)[0].save(photo)
        made += [embed.embed_photos(one, [photo], folder)[0] for one in clips]
    assert len({str(embedding.tolist()) for embedding in made}) == 6
    assert len({str(embed.embed_texts(one, [text], folder).tolist()) for one in clips[::2] for text in "ab"}) == 4
    monkeypatch.setattr(type(clip.model), "encode_image", None)
    assert torch.equal(embed.embed_photos(clip, [photo], folder)[0], made[3])


def test_damaged_and_unwritable_caches(clip, tmp_path, capsys):
    first = embed.embed_texts(clip, TEXTS, tmp_path / "cache")
    file, = (tmp_path / "cache").iterdir()
    for content in (file.read_bytes()[:50], b""):
        file.write_bytes(content)
        assert torch.equal(embed.embed_texts(clip, TEXTS, tmp_path / "cache"), first)
        assert "made anew" in capsys.readouterr().err and torch.equal(load_file(file)["embeddings"], first)
    assert torch.equal(first, embed.embed_texts(clip, TEXTS, file / "x")) and "not written" in capsys.readouterr().err


def test_several_processes_share_the_blocks(clip, tmp_path, monkeypatch):
    """Process 1 of 2 has made the second of three blocks when it comes to where they wait for each other."""
    made = []
    monkeypatch.setattr(embed, "PHOTOS", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "barrier", lambda: made.extend(map(load_file, tmp_path.iterdir())))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    embeddings, _ = embed.embed_photos(clip, PHOTOS, tmp_path)
    torch.distributed.destroy_process_group()
    assert len(made) == 1 and torch.equal(made[0]["embeddings"], embeddings[2:4])


@pytest.mark.parametrize("words, message", [
    (["ViT-B-61"], "ViT-B-61: open_clip has no .*try ViT-B-16"), (["scene"], "try scenes"),
    *(([name], "no OpenAI-style") for name in ("ViT-B-16-SigLIP", "roberta-ViT-B-32", "convnext_base", "coca_base")),
    (["small-ViT", "laion"], "--pretrained laion: no file, and open_clip has no such weights of small-ViT"),
    (["small-ViT", "none", "cpu", "fp32", 100], "--resolution 100: must be a positive multiple of 16"),
    (["small-ResNet", "none", "cpu", "fp32", -32], "--resolution -32: must be a positive multiple of 32")])
def test_refuses(towers, words, message):
    with pytest.raises(UsageError, match=message):
        embed.load_clip(*words)


Code = type("Code", (), {"__reduce__": lambda self: (os.mkdir, ("ran",))})  # a pickle that runs code when it is read
WRONG_FILES = {
    "an empty file": lambda path, state: path.write_bytes(b""),
    "a web page, not weights": lambda path, state: path.write_text("\n<!DOCTYPE html><html>not found</html>"),
    "damaged, cut short": lambda path, state: (torch.save(state, path), path.write_bytes(path.read_bytes()[:50000])),
    "or no weights file": lambda path, state: torch.save(Code(), path),
    "a TorchScript archive": lambda path, state: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path),
    "not finite .in logit_scale": lambda path, state: torch.save({**state, "logit_scale": torch.tensor(np.nan)}, path),
    "of another architecture .1 tensors do not fit, first ln_final.bias":
        lambda path, state: torch.save({**state, "ln_final.bias": torch.zeros(3)}, path)}


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("message", WRONG_FILES)
def test_wrong_weights_are_one_line_that_says_what_they_are(towers, tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    WRONG_FILES[message](tmp_path / "weights.pt", load_file(towers["small-ViT"]))
    with pytest.raises(UsageError, match=f"^weights .*weights.pt: .*{message}.*; take the .safetensors.*$"):
        embed.load_clip("small-ViT", str(tmp_path / "weights.pt"))
    assert os.listdir() == ["weights.pt"]


def test_weights_that_are_not_on_this_machine(tmp_path, monkeypatch):
    """Says at once which file to get and where to put it; a file put there is found."""
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=OSError("Name or service not known")))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(embed, "WEIGHTS", tmp_path)
    wanted = [embed.import_open_clip(), "ViT-B-32", "openai"]
    with pytest.raises(UsageError, match="Name or service.*https://.*_model.safetensors, put it at .*ViT-B-32.openai"):
        embed._find_weights(*wanted)
    (tmp_path / "ViT-B-32.openai.safetensors").touch()
    assert embed._find_weights(*wanted) == tmp_path / "ViT-B-32.openai.safetensors"
