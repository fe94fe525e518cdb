"""The built-in world: frozen, with a toy CLIP that is neither hopeless nor perfect, and has a modality gap."""
import hashlib

import pytest
import torch.nn.functional as F

import data
import embed
import metrics
import scenes


@pytest.mark.parametrize("split, expected", [
    ("clip", "06550f9f092ae535"), ("train", "cc78861c163b09e5"), ("test", "fb37ef8cc7e93434"),
    ("sentences", "ad2e7783477df9a9")])
def test_frozen(split, expected):
    """Pixels, labels and sentences, as the first version drew and wrote them: every reported number depends on them."""
    if split == "sentences":
        texts, labels = scenes.sentences(500, 0)
        content = "\n".join(texts).encode() + labels.tobytes()
    else:
        content = b"".join(part.tobytes() for index in range(20) for part in scenes.picture(split, index))
    assert hashlib.blake2b(content, digest_size=8).hexdigest() == expected


def test_the_tiny_clip_is_neither_hopeless_nor_perfect(cache):
    """Zero-shot; and the mean directions of pictures and texts lie far apart."""
    clip = embed.load_clip()
    photos = data.load_photos("scenes", None, "test", 500)
    images = F.normalize(embed.embed_photos(clip, photos.photos, cache, quiet=True)[0], dim=1)
    prompts = F.normalize(embed.embed_texts(clip, [f"a photo of a {name}." for name in photos.names]), dim=1)
    assert 55 < metrics.mean_average_precision((images @ prompts.T).numpy(), photos.labels) < 75
    assert (images.mean(0) - prompts.mean(0)).norm() > 0.3


def test_checkpoint_knows_its_words(capsys):
    """No text of the project for the toy CLIP has a word that it was not trained on."""
    descriptions = data.descriptions_of("scenes", scenes.NAMES)
    texts, _ = scenes.sentences(500, 9)
    embed.embed_texts(embed.load_clip(), texts + list(descriptions.values()))
    assert capsys.readouterr().err == ""


def test_training_again(command, tmp_path):
    target = tmp_path / "tiny.safetensors"
    command("experiments/train_scenes_clip.py", "--output", target, "--pictures", 40, "--steps", 2, "--batch-size", 8)
    assert embed.load_clip("scenes", str(target)).key != embed.load_clip().key


def test_draw_command(command, tmp_path):
    command("scenes.py", "draw", tmp_path, "--first", 1, "--count", 1)
    image = data.open_photo(tmp_path / "scene_001.png")
    assert image.tobytes() == scenes.picture("test", 1)[0].tobytes()
    (tmp_path / "file").touch()
    assert "choose another folder" in command("scenes.py", "draw", tmp_path / "file" / "under", expect=2).stderr
