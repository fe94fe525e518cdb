"""Boxes, and experiments/localize.py: planted maps, the formulas of its maps, its command line."""
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from PIL import Image

import data
import datasets
import embed
import run
import scenes
import sspa

sys.path.insert(0, str(REPOSITORY / "experiments"))

import localize

# --- boxes ------------------------------------------------------------------------------------------------------------

def test_boxes_in_the_square_that_clip_sees():
    """A photo of 200 x 100: CLIP sees columns 50 to 150. Inside; cut in half; cut by more; as wide as the photo."""
    boxes = np.array([[3, 60, 10, 100, 50, 1], [4, 40, 0, 60, 100, 0], [5, 30, 0, 55, 20, 1], [6, 0, 0, 200, 100, 1.0]])
    seen, kept = datasets.in_view(boxes, (200, 100))
    assert kept.tolist() == [True, True, False, True]
    np.testing.assert_allclose(seen, [[3, 0.1, 0.1, 0.5, 0.5, 1], [4, 0, 0, 0.1, 1, 0], [6, 0, 0, 1, 1, 1]])
    turned, _ = datasets.in_view(boxes[:, [0, 2, 1, 4, 3, 5]], (100, 200))
    np.testing.assert_allclose(turned, seen[:, [0, 2, 1, 4, 3, 5]])


@pytest.mark.parametrize("backbone, size", [("scenes", (500, 375)), ("scenes", (333, 500)), ("RN50", (640, 427))])
def test_a_box_is_where_clips_own_preprocessing_puts_its_content(tmp_path, backbone, size):
    """A white rectangle on black, through open_clip's resize and crop, has the corners that in_view gives."""
    left, top, right, bottom = (round(share * length) for share, length in zip((0.35, 0.4, 0.6, 0.7), size * 2,
                                                                               strict=True))
    pixels = np.zeros((*size[::-1], 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    clip = embed.load_clip(backbone, None if backbone == "scenes" else "none")
    image = embed.load_photo(clip, tmp_path / "photo.png")
    rows, columns = np.nonzero((image[0] > (image[0].max() + image[0].min()) / 2).numpy())
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / len(image[0])
    (box,), _ = datasets.in_view(np.array([[0, left, top, right, bottom, 1.0]]), size)
    np.testing.assert_allclose(found, box[1:5], atol=1.5 / len(image[0]))


def test_boxes_of_scenes_hold_the_things(tmp_path, command):
    """Drawn alone, in purple and without any chance, a thing's pixels fill its box. What is covered, and by how much,
    by the order of drawing. A picture written to a file knows which it is."""
    still = SimpleNamespace(uniform=lambda low, high, size=None: low, integers=lambda low, high: 0,
                            normal=lambda mean, spread, size: np.zeros(size))
    for index in range(30):
        place, items = scenes.layout(np.random.default_rng([scenes.SPLITS["test"], index]))
        places = scenes.boxes("test", index)
        assert [name for name, *_ in places] == [item.thing for item in items] and places[-1][5] == 1
        for item, (_, *corners, visible) in zip(items, places, strict=True):
            alone, bare = (np.asarray(scenes.draw(place, some, still), int) for some in (
                [item._replace(colour="purple")], []))
            rows, columns = np.nonzero((alone != bare).any(-1))
            assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == corners and 0 <= visible <= 1
    hidden = [scenes.Item("sun", "red", 0.5, 0.5, radius, 0, False) for radius in (0.05, 0.2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "layout", lambda rng: ("sea", hidden))
        assert [place[5] for place in scenes.boxes("test", 0)] == [0, 1]
    command("scenes.py", "draw", tmp_path, "--first", 7, "--count", 1)
    boxes, size = datasets.boxes_of(tmp_path / "scene_007.png", scenes.NAMES)
    assert size == (192, 192) and len(boxes) == len(scenes.boxes("test", 7))
    np.testing.assert_array_equal(boxes, datasets.boxes_of(("test", 7), scenes.NAMES)[0])


def test_boxes_of_real_photos(shared):
    """VOC's XML by text search; COCO's annotations by their own table; a photo elsewhere has none."""
    photo = shared / "VOCdevkit/VOC2007/JPEGImages/000001.jpg"
    boxes, size = datasets.boxes_of(photo, ["person", "dog"])
    xml = (shared / "VOCdevkit/VOC2007/Annotations/000001.xml").read_text()
    corners = [[int(re.search(f"<{side}>(\\d+)<", part)[1]) for side in ("xmin", "ymin", "xmax", "ymax")]
               for part in xml.split("<object>")[1:]]
    assert size == Image.open(photo).size and sorted((boxes[:, 1:5] + [1, 1, 0, 0]).tolist()) == sorted(corners)
    content = json.loads((shared / "coco_mini/annotations/instances_val2017.json").read_text())
    names, count = data.label_names("coco2014"), 0
    for entry in content["images"]:
        boxes, size = datasets.boxes_of(shared / "coco_mini/val2017" / entry["file_name"], names)
        own = [one for one in content["annotations"] if one["image_id"] == entry["id"]]
        assert size == (entry["width"], entry["height"]) and (1 - boxes[:, 5]).sum() == sum(x["iscrowd"] for x in own)
        widths = (boxes[:, 3:5] - boxes[:, 1:3]).round(3).tolist()
        assert widths == [[round(length, 3) for length in one["bbox"][2:]] for one in own]
        count += len(boxes)
    assert count > 500 and datasets.boxes_of(REPOSITORY / "assets/sspa_miss.png", names) is None


# --- scores -----------------------------------------------------------------------------------------------------------

def test_planted_maps():
    """The things' own masks score 100, a constant map chance, which is their share of the area; masks mirrored twice
    are worth little more. Maps of 8 x 8 regions, which the masks' means are, still find their things."""
    targets = [localize.targets_of(np.array([[0, *np.array(corners) / 192, 1]]))
               for index in range(150) for _, *corners, _ in scenes.boxes("test", index)]
    marks, near = map(np.array, zip(*targets, strict=True))
    masks = marks.reshape(len(marks), -1).astype(np.float32)
    hits, ap = localize.judged(masks, marks, near).mean(0)
    assert hits == ap == 1
    hits, ap = localize.judged(np.ones_like(masks), marks, near).mean(0)
    assert hits == pytest.approx(near.mean()) and ap == pytest.approx(marks.mean()) and 0.05 < ap < hits < 0.2
    mirrored, _ = localize.judged(masks[:, ::-1].copy(), marks, near).mean(0)
    assert mirrored < 0.4
    coarse = F.avg_pool2d(torch.from_numpy(masks).view(-1, 1, 64, 64), 8).flatten(1)
    assert localize.judged(coarse, marks, near)[:, 0].mean() > 0.97


def test_the_rule_by_hand():
    """A clear box [16, 32) x [16, 48) of 64 points and another that is not clear: 4 points of tolerance at 15/224."""
    marks, near = localize.targets_of(np.array([[0, 0.25, 0.25, 0.5, 0.75, 1], [0, 0.4, 0.25, 0.6, 0.3, 0]]))
    assert (marks == 1).sum() == 16 * 32 and marks[20, 20] == 1 and marks[17, 35] == -1 and marks[40, 35] == 0
    assert near[40, 35] and not near[40, 36] and near[12, 20] and not near[11, 20] and not near[12, 12]  # round corners
    maps = torch.full((4, 64, 64), 0.5)
    for one, points in zip(maps, ([(20, 20)], [(40, 35)], [(60, 60)], [(20, 20), (60, 60)]), strict=True):
        for row, column in points:
            one[row, column] = 1
    same = np.repeat(marks[None], 4, 0), np.repeat(near[None], 4, 0)
    assert localize.judged(maps.flatten(1), *same)[:, 0].tolist() == [1, 1, 0, 0.5]
    first = (16 * 32 / (marks >= 0).sum() * 511 + 1) / 512  # one point found first, all others at once
    assert localize.judged(maps.flatten(1)[:1], marks[None], near[None])[0, 1] == pytest.approx(first)
    values = np.array([[1, 0.5, 0], [0, 0.5, 1], [0, 1, 1.0]])
    numbers = localize.summary(values, np.array([3, 3, 5]), np.array([100, 2000, 1e5]))
    expected = {"pointing": 25, "pixel AP": 75, "absent": 75, "things": 100 / 3, "small": 100, "medium": 0, "large": 0}
    assert numbers == pytest.approx(expected)


# --- maps -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def models(command, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    command("sspa.py", "--tune-image", "none", "--limit", 60, "--epochs", 2, "--seed", 0, 1, "--ablate", "no DSF",
            "--save-all", "--output", folder)
    return folder / "checkpoints"


def test_maps_are_the_models_own(models, cache):
    """Attentions sum to one; DSF's, T_fn and X_fn are forward's; the gradient is that of a small step along a region"""
    words = ["--checkpoint", str(models / "SSPA, seed 0.safetensors"), "--limit", "4", "--cache", cache, "--cpu"]
    config, device = run.set_up(run.parse(sspa.Config, words, ""))
    tensors, metadata = run.read_checkpoint(config.checkpoint, "sspa")
    config, clip = run.as_trained(config, config.checkpoint, metadata["settings"]), run.load_clip(config, device)
    labels = sspa.labels_of(config, clip, metadata["names"])
    inputs = sspa.load_inputs(config, clip, labels, sspa.find_photos(config, "test"))
    model = sspa.SSPA(config, clip.model, labels, 0)
    run.use_weights(config.checkpoint, model.learned(), tensors)
    x0, X, prompts = F.normalize(inputs.test.x0, dim=-1), F.normalize(inputs.test.X.float(), dim=-1), model.prompts()
    every = torch.cartesian_prod(torch.arange(4), torch.arange(18)).T
    words = torch.eye(96)[:18]
    maps = localize.maps_of(model, prompts, words, inputs.test.x0, inputs.test.X, *every)
    assert list(maps) == [name for name in (*localize.MAPS[:3], *localize.MAPS[4:2:-1], localize.MAPS[5])]
    maps = {name: values.view(4, 18, 64).detach() for name, values in maps.items()}
    with torch.no_grad():
        said = model(inputs.test.x0, inputs.test.X)
        T_fn, X_fn = F.normalize(said.label_features, dim=-1), F.normalize(said.region_features, dim=-1)
    torch.testing.assert_close(maps["DSF attention"], said.filtering)
    torch.testing.assert_close(maps["similarity after GDMA"], T_fn @ X_fn.mT)
    torch.testing.assert_close(maps["zero-shot cosine of regions"], X[..., :18].mT)
    torch.testing.assert_close(maps["V-to-S attention"].sum(-1), torch.ones(4, 18))
    torch.testing.assert_close(maps["S-to-V attention"].sum(1), torch.ones(4, 64))

    def logit(X):
        _, _, T_fn, X_fn = localize.flow(model.double(), prompts.double(), x0.double(), X)
        return model.aggregate(T_fn, X_fn, model.temperature, model.regional_log_scale.exp())[2, 5]
    step = torch.zeros_like(X).double()
    step[2, 37] = 1e-6 * X[2, 37]
    with torch.no_grad():
        slope = (logit(X.double() + step) - logit(X.double() - step)) / 2e-6
    assert float(maps["gradient x region"][2, 5, 37]) == pytest.approx(float(slope), rel=1e-2, abs=1e-5)


def test_the_command_line(models, command, tmp_path):
    """A folder of models: seeds averaged, a block for each title; photos of median score; what is missing is named."""
    words = ("experiments/localize.py", "--limit", 40, "--cpu", "--output", tmp_path / "maps", "--checkpoint")
    stdout = command(*words, models).stdout
    found = json.loads((tmp_path / "maps/localize.json").read_text())["models"]
    assert [(one["title"], one["seed"]) for one in found] == [
        ("SSPA", 0), ("SSPA", 1), ("no DSF", 0), ("no DSF", 1)]
    hits = [one["maps"]["similarity after GDMA"]["pointing"] for one in found[:2]]
    row = rf"similarity after GDMA +{np.mean(hits):.1f} ±{np.std(hits, ddof=1):.1f} "
    assert re.search(rf"SSPA: scenes, 40 photos, \d+ things.*\n\n.*\n(.*\n)+{row}", stdout)
    assert stdout.count("DSF attention") == 1 and stdout.count("\nchance") == 2
    assert found[0]["asked"] == sum(scenes.labels_of("test", index).sum() for index in data.drawn(2000, 40).tolist())
    assert re.fullmatch(r"\('test', \d+\)", found[0]["examples"]["median"])
    (tmp_path / "photos").mkdir()
    for name in "abcde":
        Image.new("RGB", (70, 50)).save(tmp_path / f"photos/{name}.jpg")
    (tmp_path / "photos/labels.json").write_text(json.dumps({f"{name}.jpg": ["sun"] for name in "abcde"}))
    where = ("--dataset", "folder", "--data-root", tmp_path / "photos", "--descriptions", "none")
    assert "no such file" in command(*words, tmp_path / "none", expect=2).stderr
    assert "no boxes are known" in command(*words, models / "SSPA, seed 0.safetensors", *where, expect=2).stderr


def test_real_boxes_end_to_end(shared, tmp_path, capsys):
    """Mechanics only: 150 photos of VOC2007 through a tower with random weights. Difficult ones are not asked for."""
    data_words = ["--dataset", "voc2007", "--data-root", str(shared), "--cpu", "--quiet", "--workers", "0"]
    sspa.main([*data_words, "--backbone", "RN50", "--pretrained", "none", "--resolution", "64", "--tune-image", "none",
               "--limit", "30", "--epochs", "1", "--output", str(tmp_path), "--cache", str(tmp_path / "cache")])
    localize.main([*data_words, "--checkpoint", str(tmp_path / "checkpoint.safetensors"), "--limit", "30",
                   "--output", str(tmp_path / "maps"), "--cache", str(tmp_path / "cache")])
    found, = json.loads((tmp_path / "maps/localize.json").read_text())["models"]
    photos = data.load_photos("voc2007", shared, "test", 30)
    clear = [datasets.boxes_of(photo, photos.names) for photo in photos.photos]
    asked = sum(len({box[0] for box in datasets.in_view(*places)[0] if box[5]}) for places in clear)
    assert found["asked"] == asked > 30 and found["cut off"] > 0 and "VOC" not in capsys.readouterr().err
    assert found["maps"][localize.CHANCE]["pointing"] < found["maps"][localize.CENTRE]["pointing"]
