"""The built-in world: frozen, and a tiny CLIP that is honest (neither hopeless nor perfect, with a modality gap)."""
import hashlib

import numpy as np
import pytest
import torch.nn.functional as F

import data
import embed
import metrics
import scenes


def pictures(split):
    drawn = [scenes.picture(split, index) for index in range(20)]
    np.testing.assert_array_equal([one[1] for one in drawn], [scenes.labels_of(split, index) for index in range(20)])
    return [part.tobytes() for one in drawn for part in one]


def sentences(seed):
    texts, labels = scenes.sentences(500, seed)
    return ["\n".join(texts).encode(), labels.tobytes()]


def captions(seed):
    rng = np.random.default_rng(seed)
    return [scenes.person_caption(rng, *scenes.layout(rng)).encode() for _ in range(500)]


@pytest.mark.parametrize("make, what, expected", [
    (pictures, "clip", "e81d38875943c010"), (pictures, "train", "ae54ea0c12b14fed"),
    (pictures, "test", "14772ef6a02154e8"), (sentences, 0, "d9e3931e0dff730d"), (sentences, 1, "aff047de92f67eb9"),
    (captions, 5, "94e41e38530693e5")])
def test_frozen(make, what, expected):
    """Pixels, labels and sentences, as the first version drew and wrote them: every published number hangs on them."""
    assert hashlib.blake2b(b"\0".join(make(what)), digest_size=8).hexdigest() == expected


def test_the_tiny_clip_is_neither_hopeless_nor_perfect(cache):
    """Zero-shot; and the mean directions of pictures and texts lie far apart beside those of two halves of one side."""
    clip, photos = embed.load_clip(), data.load_photos("scenes", None, "test", 500)
    images = F.normalize(embed.embed_photos(clip, photos.photos, cache, quiet=True)[0], dim=1)
    prompts = F.normalize(embed.embed_texts(clip, [f"a photo of a {name}." for name in photos.names]), dim=1)
    assert 55 < metrics.mean_average_precision((images @ prompts.T).numpy(), photos.labels) < 75
    texts = F.normalize(embed.embed_texts(clip, scenes.sentences(500, 0)[0], cache), dim=1)
    halves = max((side[::2].mean(0) - side[1::2].mean(0)).norm() for side in (images, texts))
    assert (images.mean(0) - texts.mean(0)).norm() > max(0.3, 4 * halves)


def test_checkpoint_knows_its_words(capsys):
    """Nothing that the project itself says to the tiny CLIP has a word in it that it was not trained on."""
    descriptions = data.descriptions_of("scenes", scenes.NAMES)
    texts = [f"a photo of a {name}." for name in scenes.NAMES] + [*descriptions.values(), *scenes.sentences(500, 9)[0]]
    clip = embed.load_clip()
    embed.embed_texts(clip, texts)
    assert capsys.readouterr().err == "" and list(descriptions) == scenes.NAMES
    assert (clip.model.token_embedding.weight.abs().sum(1) > 0).sum() == len(clip.known_tokens) < 49408


def test_training_again(command, tmp_path):
    words = ("--output", tmp_path / "tiny.safetensors", "--pictures", 40, "--steps", 2, "--batch-size", 8)
    assert "199 token rows" in command("experiments/train_scenes_clip.py", *words).stdout
    clip = embed.load_clip("scenes", str(tmp_path / "tiny.safetensors"))
    assert embed.embed_texts(clip, ["a sun"]).isfinite().all() and clip.key != embed.load_clip().key
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_draw_command(command, tmp_path):
    command("scenes.py", "draw", tmp_path / "pictures", "--count", 2)
    drawn = {path.name: data.open_photo(path).tobytes() for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {f"scene_00{index}.png": scenes.picture("test", index)[0].tobytes() for index in (0, 1)}
    (tmp_path / "file").touch()
    assert "choose another folder" in command("scenes.py", "draw", tmp_path / "file" / "under", expect=2).stderr
