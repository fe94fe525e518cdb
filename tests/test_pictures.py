"""pictures.py, read back from the pixels of what it writes."""
import html
import json
import re
import shutil
import subprocess

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


def test_labels_of_any_script(tmp_path, monkeypatch):
    """Letters that a font has, codes for others: no two labels look alike, as boxes for unknown letters would."""
    for spec in (pictures.find_spec("matplotlib"), None):
        monkeypatch.setattr(pictures, "find_spec", lambda name, spec=spec: spec)
        sheets = set()
        for name in ("猫", "狗", "Жук", "Лук", "café \udcff"):
            path = pictures.contact_sheet([("test", 0)], [name], np.ones((1, 1)), [[]], tmp_path / "sheet.png")
            sheets.add(path.read_bytes())
        assert len(sheets) == 5


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


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def in_browser(page, script):
    """What a script gives that runs in a page in headless Chromium"""
    driven = page.with_name("driven.html")
    driven.write_text(f"{page.read_text()}<script>document.title = JSON.stringify((() => {{{script}}})())</script>")
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", driven.as_uri()]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=300)
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))


VISIBLE = """const visible = () => photos.filter(photo => photo.figure.offsetHeight > 0);
const seen = () => visible().map(photo => photo.tags.textContent);
const buttons = () => [...document.querySelectorAll("button")];
const press = text => buttons().find(button => button.textContent.startsWith(text)).click();
const count = () => element("count").textContent, move = to => { element("threshold").value = to; show(); };"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_page_in_a_browser(tmp_path):
    """A click on a label leaves its photos, a second one brings all back; the slider chooses tags; names are text."""
    names = ["a.jpg", "<img src=x onerror=alert(1)>.jpg", "</script>&quot;.jpg", "gone.jpg"]
    for name in names[:3]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        SEEN.save(tmp_path / name)
    scores = [{"sun": 0.9, "<b>moon</b>": 0.6}, {"sun": 0.7}, {"<b>moon</b>": 0.55}, {"sun": 0.1}]
    shown = zip(names, scores, strict=True)
    lines = [json.dumps({"photo": str(tmp_path / name), "scores": of_one}) for name, of_one in shown]
    page = pictures.page(tmp_path / "page.html", lines, 9, 0.5)
    all_shown, moons, again, high, wide, loaded, markup = in_browser(page, VISIBLE + """
        const found = [seen()];
        for (const act of [() => press("<b>moon"), () => press("<b>moon"), () => move(0.65), () => move(0)]) {
          act();
          found.push(seen());
        }
        const widths = [...document.images].map(image => image.naturalWidth);
        return [...found, widths, document.querySelectorAll("main b, header b").length];
    """)
    assert all_shown == again == ["sun 90 %, <b>moon</b> 60 %", "sun 70 %", "<b>moon</b> 55 %", ""]
    assert moons == ["sun 90 %, <b>moon</b> 60 %", "<b>moon</b> 55 %"] and high == ["sun 90 %", "sun 70 %", "", ""]
    assert wide[3] == "sun 10 %" and loaded == [64, 64, 64, 0] and markup == 0
    assert in_browser(page, VISIBLE + "return count()") == "4 of 4 photos (the first 4 of 9)"
    page = pictures.page(tmp_path / "page.html", lines, 4, -1, top_k=1)
    assert in_browser(page, VISIBLE + "return seen()") == ["sun 90 %", "sun 70 %", "<b>moon</b> 55 %", "sun 10 %"]
    assert "http" not in page.read_text().replace(tmp_path.as_uri(), "")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_page_of_two_thousand_photos_stays_usable(tmp_path):
    """Twenty moves of the slider and twenty clicks, each laid out, within a second on average."""
    SEEN.resize((400, 300)).save(tmp_path / "photo.jpg")
    draw = np.random.default_rng(0)
    lines = [json.dumps({"photo": str(tmp_path / "photo.jpg"), "scores": {f"label {label}": draw.random() for label in
                         draw.permutation(80)}}) for _ in range(pictures.PAGE + 1)]
    page = pictures.page(tmp_path / "page.html", lines, len(lines), 0.5)
    text, milliseconds = in_browser(page, VISIBLE + """
        const began = performance.now();
        for (let round = 0; round < 20; round++) {
          move(0.3 + 0.02 * round);
          press("label 7 ");
          document.body.offsetHeight;
        }
        return [count(), (performance.now() - began) / 40];""")
    assert text == "2000 of 2000 photos (the first 2000 of 2001)" and milliseconds < 1000
