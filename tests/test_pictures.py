"""pictures.py, read back from the pixels of what it writes."""
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import pictures

CORNERS = {"top left": (0, 0), "top right": (0, -1), "bottom left": (-1, 0), "bottom right": (-1, -1)}
SEEN = Image.new("RGB", (64, 64), "white")


def map_of(corner):
    """A map [M] of 7 x 7 regions that is high in one corner."""
    values = np.zeros((7, 7), np.float32)
    values[CORNERS[corner]] = 1
    return values.ravel()


def hottest(tile):
    """The corner in whose quarter of a picture the most orange pixels lie."""
    tile = np.asarray(tile, int)
    orange = tile[..., 0] - tile[..., 2] > 100  # red far above blue
    rows, columns = (axis.mean() for axis in orange.nonzero())
    assert 0 < orange.mean() < 1 / 16
    return f"{'top' if rows < len(tile) / 2 else 'bottom'} {'left' if columns < len(tile) / 2 else 'right'}"


@pytest.mark.parametrize("corner", CORNERS)
def test_heat_is_where_the_map_is_high(corner):
    assert hottest(pictures.heat(SEEN, map_of(corner))) == corner
    assert hottest(pictures.heat(SEEN, 1e-3 * map_of(corner) - 5)) == corner  # from its own lowest to its highest


def test_explanation_shows_each_map_in_its_row_and_column(tmp_path):
    """Three labels, two kinds of maps and the regions' gate: every tile of the PNG shows its own corner."""
    corners = [["top left", "bottom left"], ["top right", "top left"], ["bottom right", "top right"]]  # [label][kind]
    maps = [(title, np.stack([map_of(row[kind]) for row in corners])) for kind, title in enumerate(("first", "second"))]
    strongest, scores = [2, 0, 1], np.array([0.5, 0.2, 0.9])
    path = pictures.explanation(tmp_path / "new" / "sheet.png", "photo.jpg", SEEN, ["sun", "moon", "star"], scores,
                                strongest, maps, map_of("bottom left"), np.array([0.1, 0.2, 0.3]))
    sheet = np.asarray(Image.open(path))
    parts = ndimage.find_objects(ndimage.label((sheet != sheet[0, 0]).any(2))[0])  # what stands apart on the sheet
    tiles = {(columns.start, rows.start): sheet[rows, columns] for rows, columns in parts}
    tiles = [tiles[place] for place in sorted(tiles) if tiles[place].shape[:2] == (pictures.TILE, pictures.TILE)]
    expected = ["bottom left", *(corners[label][kind] for kind in (0, 1) for label in strongest)]
    assert [hottest(tile) for tile in tiles[1:]] == expected  # the first is the photo itself


def test_contact_sheet_draws_scores_as_bars_and_tags_bright(tmp_path):
    """The bar of a chosen tag is green and as long as its score; one that was not chosen is grey."""
    def green(scores, tags):
        path = pictures.contact_sheet([("test", 0)], ["sun", "moon"], np.array([scores]), [tags], tmp_path / "s.png")
        sheet = np.asarray(Image.open(path), int)[-60:]  # below the photo
        return ((sheet[..., 1] - sheet[..., 0] > 60) & (sheet[..., 1] - sheet[..., 2] > 20)).any(0).sum()
    assert green([0.9, 0.3], []) == 0
    assert green([0.9, 0.3], [0]) == pytest.approx(3 * green([0.9, 0.3], [1]), abs=12)  # letters on the bar are white


def test_boxes_are_outlined_on_the_photo_and_on_their_labels_maps(tmp_path):
    """A box of the label in the second row, x 1/4 to 3/4, y 1/2 to 1: what changes is its outline on three tiles."""
    maps = [(title, np.stack([map_of("top left")] * 3)) for title in ("first", "second")]
    sheets = [np.asarray(Image.open(pictures.explanation(
        tmp_path / "sheet.png", "photo.jpg", Image.new("RGB", (64, 64)), ["sun", "moon", "star"], np.arange(3.0),
        [2, 1, 0], maps, boxes=boxes))) for boxes in ((), [(1, 0.25, 0.5, 0.75, 1, 1)])]
    parts = ndimage.find_objects(ndimage.label((sheets[0] != sheets[1]).any(2))[0])
    pitch, height, left, top = pictures.TILE + pictures.GAP, pictures.TILE + 40 + pictures.GAP, 12 + 56, 32 + 112
    expected = [(left + column * pitch, top + row * height) for column, row in ((0, 0), (1, 1), (2, 1))]
    assert sorted((columns.start, rows.start) for rows, columns in parts) == expected
    assert {(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in parts} == {(112, 112)}
