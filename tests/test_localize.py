"""Boxes, and experiments/localize.py: planted maps, the formulas of its maps, its command line."""
import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from PIL import Image

import data
import datasets
import embed
import scenes
import sspa
import tag

sys.path.append(str(REPOSITORY / "experiments"))
import localize


# --- boxes ------------------------------------------------------------------------------------------------------------
def test_boxes_in_the_square_that_clip_sees():
    """A photo of 200 x 100: CLIP sees columns 50 to 150. Inside; cut in half; cut by more; as wide as the photo."""
    boxes = np.array([
        [3, 60, 10, 100, 50, 1],
        [4, 40, 0, 60, 100, 0],
        [5, 30, 0, 55, 20, 1],
        [6, 0, 0, 200, 100, 1.0],
    ])
    seen, kept = datasets.in_view(boxes, (200, 100))
    assert kept.tolist() == [True, True, False, True]
    np.testing.assert_allclose(seen[0], [3, 0.1, 0.1, 0.5, 0.5, 1])
    np.testing.assert_allclose(seen[1], [4, 0, 0, 0.1, 1, 0])
    np.testing.assert_allclose(seen[2], [6, 0, 0, 1, 1, 1])
    swapped = [0, 2, 1, 4, 3, 5]
    turned, _ = datasets.in_view(boxes[:, swapped], (100, 200))
    np.testing.assert_allclose(turned, seen[:, swapped])


def test_a_box_is_where_clips_own_preprocessing_puts_its_content(tmp_path):
    """A white rectangle on black, through open_clip's resize and crop, has the corners that in_view gives."""
    pixels = np.zeros((375, 500, 3), np.uint8)
    pixels[150:260, 175:300] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    image = embed.load_photo(embed.load_clip(), tmp_path / "photo.png")[0]
    rows, columns = np.nonzero((image > (image.max() + image.min()) / 2).numpy())
    corners = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    boxes, _ = datasets.in_view(np.array([[0, 175, 150, 300, 260, 1.0]]), (500, 375))
    np.testing.assert_allclose(corners / 64, boxes[0, 1:5], atol=1.5 / 64)


def test_boxes_of_a_scene_and_of_its_file(tmp_path, command):
    command("scenes.py", "draw", tmp_path, "--first", 7, "--count", 1)
    boxes, size = datasets.boxes_of(tmp_path / "scene_007.png", scenes.NAMES)
    expected = scenes.boxes("test", 7)
    assert size == (192, 192)
    assert [scenes.NAMES[int(box[0])] for box in boxes] == [place[0] for place in expected]
    np.testing.assert_array_equal(boxes[:, 1:], [place[1:] for place in expected])
    np.testing.assert_array_equal(boxes, datasets.boxes_of(("test", 7), scenes.NAMES)[0])


def test_boxes_of_real_photos(shared):
    """VOC's XML by text search; COCO's annotations by their own table; a photo elsewhere has none."""
    photo = shared / "VOCdevkit/VOC2007/JPEGImages/000001.jpg"
    boxes, size = datasets.boxes_of(photo, ["person", "dog"])
    xml = (shared / "VOCdevkit/VOC2007/Annotations/000001.xml").read_text()
    lefts = [int(left) - 1 for left in re.findall(r"<xmin>(\d+)<", xml)]
    bottoms = [int(bottom) for bottom in re.findall(r"<ymax>(\d+)<", xml)]
    assert size == Image.open(photo).size
    assert sorted(boxes[:, 1]) == sorted(lefts)
    assert sorted(boxes[:, 4]) == sorted(bottoms)

    content = json.loads((shared / "coco_mini/annotations/instances_val2017.json").read_text())
    for entry in content["images"]:
        path = shared / "coco_mini/val2017" / entry["file_name"]
        boxes, size = datasets.boxes_of(path, data.label_names("coco2014"))
        own = [one for one in content["annotations"] if one["image_id"] == entry["id"]]
        assert size == (entry["width"], entry["height"])
        for box, one in zip(boxes, own, strict=True):
            assert box[5] == 1 - one["iscrowd"]
            assert (box[3:5] - box[1:3]).tolist() == pytest.approx(one["bbox"][2:], abs=1e-3)
    assert datasets.boxes_of(REPOSITORY / "assets/sspa_miss.png", ["person"]) is None


# --- scores -----------------------------------------------------------------------------------------------------------
def test_planted_maps():
    """The things' own masks score 100, a constant map chance, which is their share of the area; masks mirrored twice
    are worth little more. Maps of 8 x 8 regions, which the masks' means are, still find their things."""
    marks = []
    near = []
    for index in range(60):
        for _, left, top, right, bottom, _ in scenes.boxes("test", index):
            box = np.array([0, left, top, right, bottom, 192]) / 192
            of_box = localize.targets_of(box[None])
            marks.append(of_box[0])
            near.append(of_box[1])
    marks = np.array(marks)
    near = np.array(near)
    masks = marks.reshape(len(marks), -1).astype(np.float32)
    assert (localize.judged(masks, marks, near) == 1).all()
    constant = localize.judged(np.ones_like(masks), marks, near).mean(0)
    assert constant == pytest.approx([near.mean(), marks.mean()])
    mirrored = localize.judged(masks[:, ::-1].copy(), marks, near)
    assert mirrored[:, 0].mean() < 0.4
    coarse = F.avg_pool2d(torch.from_numpy(masks).view(-1, 1, 64, 64), 8)
    assert localize.judged(coarse.flatten(1), marks, near)[:, 0].mean() > 0.97


def test_the_rule_by_hand():
    """A clear box [16, 32) x [16, 48) of 64 points and another that is not clear: 4 points of tolerance at 15/224."""
    clear = [0, 0.25, 0.25, 0.5, 0.75, 1]
    unclear = [0, 0.4, 0.25, 0.6, 0.3, 0]
    marks, near = localize.targets_of(np.array([clear, unclear]))
    assert (marks == 1).sum() == 16 * 32
    assert [marks[20, 20], marks[17, 35], marks[40, 35]] == [1, -1, 0]
    assert near[40, 35] and near[12, 20]
    assert not near[40, 36] and not near[11, 20]
    assert not near[12, 12]  # round corners
    for points, hit in (([(20, 20)], 1), ([(40, 35)], 1), ([(60, 60)], 0), ([(20, 20), (60, 60)], 0.5)):
        heat = torch.full((64, 64), 0.5)
        for point in points:
            heat[point] = 1
        found = localize.judged(heat.view(1, -1), marks[None], near[None])
        assert found[0, 0] == hit
        if points == [(20, 20)]:  # one point found first, all others at once
            first = (16 * 32 / (marks >= 0).sum() * 511 + 1) / 512
            assert found[0, 1] == pytest.approx(first)


def test_summary_by_hand():
    """Two things of label 3, one of label 5: hits (1 + 0) / 2 and 0, averaged over labels 25; over things 33."""
    values = np.array([[1, 0.5, 0], [0, 0.5, 1], [0, 1, 1.0]])
    numbers = localize.summary(values, np.array([3, 3, 5]), np.array([100, 2000, 1e5]))
    assert [numbers["pointing"], numbers["pixel AP"], numbers["absent"]] == [25, 75, 75]
    assert numbers["things"] == pytest.approx(100 / 3)
    assert [numbers["small"], numbers["medium"], numbers["large"]] == [100, 0, 0]


# --- maps -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    command("sspa.py", "--tune-image", "none", "--train-count", 60, "--test-count", 40, "--epochs", 2, "--seed", 0, 1,
            "--no-gate", "--save-all", "--output", folder)
    return folder / "checkpoints"


def test_maps_are_the_models_own(models):
    """Attentions sum to one; DSF's, T_fn and X_fn are forward's; the gradient is that of a small step along a region"""
    tagger = tag.load(models / "seed 0.safetensors").tagger
    model = tagger.model
    images = torch.stack([embed.load_photo(tagger.clip, ("test", row)) for row in range(4)])
    with torch.no_grad():
        x0, X = sspa.image_features(tagger.clip.model.visual, images)
        said = model(x0, X)
    rows, labels = torch.cartesian_prod(torch.arange(4), torch.arange(18)).T
    maps = localize.maps_of(tagger, torch.eye(96)[:18], x0, X, rows, labels)
    assert set(maps) == {localize.CHANCE, localize.CENTRE, *localize.MAPS}
    for name, values in maps.items():
        maps[name] = values.view(4, 18, -1).detach()
    X = F.normalize(X, dim=-1)
    T_fn = F.normalize(said.label_features, dim=-1)
    X_fn = F.normalize(said.region_features, dim=-1)
    torch.testing.assert_close(maps["DSF attention"], said.filtering)
    torch.testing.assert_close(maps["similarity after GDMA"], T_fn @ X_fn.mT)
    torch.testing.assert_close(maps[localize.ZERO_SHOT], X[..., :18].mT)
    torch.testing.assert_close(maps["V-to-S attention"].sum(-1), torch.ones(4, 18))
    torch.testing.assert_close(maps["S-to-V attention"].sum(1), torch.ones(4, 64))

    @torch.no_grad()
    def logit(factor):
        moved = X.double()
        moved[2, 37] *= factor
        T_ca, _ = model.filter(tagger.prompts[1].double(), moved)
        T_uf = model.fuse(model.knowledge, T_ca, F.normalize(x0, dim=-1).double())
        T_fn, X_fn, _, _ = model.align(T_uf, moved)
        return float(model.regional_logits(T_fn, X_fn)[2, 5])
    model.double()
    slope = (logit(1 + 1e-6) - logit(1 - 1e-6)) / 2e-6
    assert float(maps[localize.GRADIENT][2, 5, 37]) == pytest.approx(slope, rel=1e-2, abs=1e-5)


def test_the_command_line(models, command, tmp_path):
    """A folder of models: seeds averaged; photos of median score; what is missing is named."""
    words = ("experiments/localize.py", "--test-count", 40, "--cpu", "--output", tmp_path / "maps", "--checkpoint")
    stdout = command(*words, models).stdout
    found = json.loads((tmp_path / "maps/localize.json").read_text())["models"]
    assert [(one["title"], one["seed"]) for one in found] == [("SSPA --no-gate", 0), ("SSPA --no-gate", 1)]
    hits = [one["maps"]["similarity after GDMA"]["pointing"] for one in found]
    row = rf"similarity after GDMA +{np.mean(hits):.1f} ±{np.std(hits, ddof=1):.1f} "
    assert re.search(rf"SSPA --no-gate: scenes, 40 photos, \d+ things.*\n\n.*\n(.*\n)+{row}", stdout)
    photos = data.load_photos("scenes", None, "test", 40)
    assert found[0]["asked"] == photos.labels.sum()
    assert re.fullmatch(r"\('test', \d+\)", found[0]["examples"]["median"])
    assert "no such file" in command(*words, tmp_path / "none", expect=2).stderr
