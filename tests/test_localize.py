"""Boxes, and experiments/localize.py: planted maps, the formulas of its maps, its command line."""
import re

import localize
import numpy as np
import pytest
import tables
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, table
from forked import SSPA
from PIL import Image

import data
import datasets
import embed
import scenes
import sspa
import tag


# --- boxes ------------------------------------------------------------------------------------------------------------
def test_boxes_in_the_square_that_clip_sees():
    """A photo of 200 x 100: CLIP sees columns 50 to 150. Boxes inside, cut in half, cut by more. Then 100 x 200."""
    boxes = table("3 60 10 100 50 1; 4 40 0 60 100 0; 5 30 0 55 20 1")
    expected = table("3 0.1 0.1 0.5 0.5 1; 4 0 0 0.1 1 0")
    for order, size in (([0, 1, 2, 3, 4, 5], (200, 100)), ([0, 2, 1, 4, 3, 5], (100, 200))):
        seen, kept = datasets.in_view(boxes[:, order], size)
        assert kept.tolist() == [True, True, False]
        np.testing.assert_allclose(seen, expected[:, order])


def test_boxes_of_a_scene_and_of_its_file(tmp_path, command):
    command("scenes.py", "draw", tmp_path, "--first", 7, "--count", 1)
    expected = [[scenes.NAMES.index(name), *place] for name, *place in scenes.boxes("test", 7)]
    for photo in (tmp_path / "scene_007.png", ("test", 7)):
        boxes, size = datasets.boxes_of(photo, scenes.NAMES)
        assert size == (192, 192)
        np.testing.assert_array_equal(boxes, expected)


def test_boxes_of_real_photos(shared):
    """VOC's XML by text search, counted from 1; COCO's annotations by their own table; a photo elsewhere has none."""
    voc = shared / "VOCdevkit/VOC2007"
    photo = voc / "JPEGImages/000001.jpg"
    boxes, size = datasets.boxes_of(photo, ["person", "dog"])
    assert size == Image.open(photo).size
    corners = re.findall(r"<[xy]m(?:in|ax)>(\d+)<", (voc / "Annotations/000001.xml").read_text())
    np.testing.assert_array_equal(boxes[:, 1:5], np.array(corners, int).reshape(-1, 4) - [1, 1, 0, 0])

    coco = shared / "coco_mini"
    content = data.read_json(coco / "annotations/instances_val2017.json", "boxes")
    for entry in content["images"]:
        boxes, size = datasets.boxes_of(coco / "val2017" / entry["file_name"], data.label_names("coco2014"))
        assert size == (entry["width"], entry["height"])
        own = [one for one in content["annotations"] if one["image_id"] == entry["id"]]
        for box, one in zip(boxes, own, strict=True):
            corner = np.array(one["bbox"][:2])
            assert box[1:] == pytest.approx([*corner, *corner + one["bbox"][2:], 1 - one["iscrowd"]])
    assert datasets.boxes_of(REPOSITORY / "assets/sspa_miss.png", ["person"]) is None


# --- scores -----------------------------------------------------------------------------------------------------------
def test_the_rule_by_hand():
    """A clear box [16, 32) x [16, 48) of 64 points and another that is not clear: 4 points of tolerance at 15/224."""
    marks, near = localize.targets_of(table("0 0.25 0.25 0.5 0.75 1; 0 0.4 0.25 0.6 0.3 0"))
    assert (marks == 1).sum() == 16 * 32
    assert marks[[20, 17, 40], [20, 35, 35]].tolist() == [1, -1, 0]
    assert near[[40, 12], [35, 20]].all()
    assert not near[[40, 11, 12], [36, 20, 12]].any()  # the last: round corners

    targets = (np.stack(3 * [marks]), np.stack(3 * [near]))
    heat = torch.full((3, 64, 64), 0.5)
    heat[0, 20, 20] = 1
    heat[1, 40, 35] = 1
    heat[2, [20, 60], [20, 60]] = 1
    hits, ap = localize.judged(heat.flatten(1), *targets).T
    assert hits.tolist() == [1, 1, 0.5]  # in the box; near it; one of two highest points
    share = 16 * 32 / (marks >= 0).sum()
    assert ap[0] == pytest.approx((1 + 511 * share) / 512)  # one point found first, all others at once

    regions = torch.zeros(3, 8, 8)
    regions[0, 5, 2] = 1
    regions[1, 1, 1] = 1
    hits, ap = localize.judged(regions.flatten(1), *targets).T
    assert hits == pytest.approx([1, 0, near.mean()])  # a region in the box; beyond its corner; all alike
    assert ap[2] == pytest.approx(share)


def test_summary_by_hand():
    """Two things of label 3, one of label 5: hits (1 + 0) / 2 and 0, averaged over labels 25; over things 33."""
    values = table("1 0.5 0; 0 0.5 1; 0 1 1")
    labels = np.array([3, 3, 5])
    pixels = np.array([100, 2000, 1e5])
    expected = {"pointing": 25, "pixel AP": 75, "absent": 75, "things": 100 / 3}
    expected |= {"small": 100, "medium": 0, "large": 0}
    assert localize.summary(values, labels, pixels) == pytest.approx(expected)


# --- maps -------------------------------------------------------------------------------------------------------------
def test_maps_are_the_models_own(trained):
    """Attentions sum to one; DSF's, T_fn and X_fn are forward's; the gradient is the logit's slope along a region"""
    tagger = tag.load(trained[SSPA].checkpoint).tagger
    model = tagger.model
    images = torch.stack([embed.load_photo(tagger.clip, ("test", row)) for row in range(4)])
    with torch.no_grad():
        x0, X = sspa.image_features(tagger.clip.model.visual, images)
        said = model(x0, X)
    rows, labels = torch.cartesian_prod(torch.arange(4), torch.arange(18)).T
    maps = localize.maps_of(tagger, torch.eye(96)[:18], x0, X, rows, labels)
    assert list(maps) == [localize.CHANCE, localize.CENTRE, *tables.MAPS]
    *_, zero_shot, filtering, similarity, s_to_v, v_to_s, gradient = (m.view(4, 18, -1) for m in maps.values())
    X = F.normalize(X, dim=-1)
    cosine = F.normalize(said.label_features, dim=-1) @ F.normalize(said.region_features, dim=-1).mT
    torch.testing.assert_close([zero_shot, filtering, similarity], [X[..., :18].mT, said.filtering, cosine])
    torch.testing.assert_close(s_to_v.sum(1), torch.ones(4, 64))
    torch.testing.assert_close(v_to_s.sum(2), torch.ones(4, 18))

    factor = torch.ones(4, 64, 1, requires_grad=True)  # of every region's length, which forward would take away
    T_ca, _ = model.filter(tagger.prompts[1], factor * X)
    T_uf = model.fuse(model.knowledge, T_ca, F.normalize(x0, dim=-1))
    T_fn, X_fn, _, _ = model.align(T_uf, factor * X)
    slope, = torch.autograd.grad(model.regional_logits(T_fn, X_fn)[2, 5], factor)
    torch.testing.assert_close(gradient[2, 5], slope[2, :, 0])


def test_the_command_line(trained, command, tmp_path):
    """A folder of models: seeds are averaged, photos of median score and missing files are named."""
    words = "--test-count 40 --cpu --output maps --checkpoint"
    models = trained[SSPA].folder / "checkpoints"
    stdout = command("experiments/localize.py", *words.split(), models, cwd=tmp_path).stdout
    found = data.read_json(tmp_path / "maps/localize.json", "maps")["models"]
    assert [one["seed"] for one in found] == [0, 1]
    assert localize.title_of(sspa.Config(no_gate=True, fusion="sum")) == "SSPA --fusion sum --no-gate"
    hits = [one["maps"]["similarity after GDMA"]["pointing"] for one in found]
    row = rf"similarity after GDMA +{np.mean(hits):.1f} ±{np.std(hits, ddof=1):.1f} "
    assert re.search(rf"SSPA: scenes, 40 photos, \d+ things.*\n\n.*\n(.*\n)+{row}", stdout)
    photos = data.load_photos("scenes", None, "test", 40)
    assert found[0]["asked"] == photos.labels.sum()
    assert re.fullmatch(r"\('test', \d+\)", found[0]["examples"]["median"])
    with pytest.raises(data.UsageError, match="no such file"):
        localize.main(f"{words} none".split())
