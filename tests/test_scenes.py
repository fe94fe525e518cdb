"""The built-in world: reproducible, disjoint, and a tiny CLIP that is honest (neither hopeless nor perfect, with a modality gap)."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import metrics
import scenes


def test_pictures_repeat_and_splits_differ():
    for split in ("clip", "train", "test"):
        one, labels = scenes.picture(split, 7)
        assert one.tobytes() == scenes.picture(split, 7)[0].tobytes() and one.size == (192, 192) and 1 <= labels.sum() <= 5
        np.testing.assert_array_equal(labels, scenes.labels_of(split, 7))
    assert len({scenes.picture(split, index)[0].tobytes() for split in ("clip", "train", "test") for index in range(20)}) == 60


def test_every_thing_occurs_and_co_occurs():
    labels = np.stack([scenes.labels_of("test", index) for index in range(2000)]).astype(int)
    share = labels.mean(0)
    assert share.min() > 0.05 and share.max() < 0.4
    together = labels.T @ labels / 2000 / np.outer(share, share)
    apple, cup, tree = (scenes.NAMES.index(name) for name in ("apple", "cup", "tree"))
    assert together[apple, cup] > 1.3 > 0.9 > together[tree, cup]  # cups and apples share a room, trees stand outside


def test_every_thing_can_be_seen():
    """Drawn alone and large, a thing changes the picture."""
    for name in scenes.NAMES:
        item = scenes.Item(name, scenes.THINGS[name].colours[0], 0.5, 0.5, 0.3, 0.0, False)
        with_it, without = (np.asarray(scenes.draw("room", items, np.random.default_rng(0)), int) for items in ([item], []))
        assert (np.abs(with_it - without).sum(2) > 60).mean() > 0.02, name


def test_captions_name_what_they_say():
    rng = np.random.default_rng(0)
    shorter = 0
    for _ in range(300):
        place, items = scenes.layout(rng)
        text = scenes.person_caption(rng, place, items)
        named = data.match_nouns([text], scenes.NAMES, data.synonyms_of(scenes.NAMES, "scenes"))[0]
        assert {scenes.NAMES[c] for c in named.nonzero()[0]} <= {item.thing for item in items}
        shorter += named.sum() < len(items)
    assert shorter > 100  # people often name only some of the things


@pytest.fixture(scope="module")
def embedded(cache):
    clip = data.load_clip()
    photos = data.load_photos("scenes", None, "test")
    images, _ = data.embed_photos(clip, photos.photos, cache, quiet=True)
    texts = data.embed_texts(clip, scenes.sentences(2000, 0)[0], cache)
    labels = data.embed_texts(clip, [f"a photo of a {name}." for name in photos.names], cache)
    return photos, F.normalize(images, dim=1), F.normalize(texts, dim=1), F.normalize(labels, dim=1)


def test_zero_shot_is_neither_hopeless_nor_perfect(embedded):
    photos, images, _, labels = embedded
    assert 55 < metrics.mean_average_precision((images @ labels.T).numpy(), photos.labels) < 75


def test_there_is_a_modality_gap(embedded):
    """Pictures and texts live apart: the distance of their mean directions is large beside what two halves of one side differ by."""
    _, images, texts, _ = embedded
    gap = (images.mean(0) - texts.mean(0)).norm()
    assert gap > 0.3 and gap > 5 * max((side[::2].mean(0) - side[1::2].mean(0)).norm() for side in (images, texts))


def test_checkpoint_is_small_and_knows_its_words(capsys):
    assert scenes.CHECKPOINT.stat().st_size < 3e6
    clip = data.load_clip()
    description_file = data.read_json(data.ASSETS / "descriptions" / "scenes.json", "descriptions")
    assert list(description_file["descriptions"]) == scenes.NAMES and "{label}" in description_file["prompt"]
    texts = scenes.sentences(500, 9)[0] + list(description_file["descriptions"].values()) + [f"a photo of a {name}." for name in scenes.NAMES]
    data.embed_texts(clip, texts + data.template_texts(scenes.NAMES, 50, 0)[0])
    assert capsys.readouterr().err == ""
    table = clip.model.token_embedding.weight
    assert table.shape[0] == 49408 and (table.abs().sum(1) > 0).sum() == len(clip.known_tokens)


def test_training_command_runs(command, tmp_path):
    done = command("scenes.py", "train", "--output", tmp_path / "c.safetensors", "--pictures", 40, "--steps", 2, "--batch-size", 8)
    assert "token rows" in done.stdout
    clip = data.load_clip("scenes", str(tmp_path / "c.safetensors"))
    assert data.embed_texts(clip, ["a sun"]).isfinite().all() and clip.key != data.load_clip().key


def test_draw_command(command, tmp_path):
    command("scenes.py", "draw", tmp_path / "p", "--count", 2)
    assert [path.name for path in sorted((tmp_path / "p").iterdir())] == ["scene_000.png", "scene_001.png"]
    assert torch.equal(torch.from_numpy(np.asarray(data.open_photo(tmp_path / "p" / "scene_001.png")).copy()), torch.from_numpy(np.asarray(scenes.picture("test", 1)[0]).copy()))
