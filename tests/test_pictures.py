"""pictures.py, read back from the pixels of what it writes."""
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import table
from PIL import Image, ImageDraw

import pictures

NAMES = ["sun", "moon", "star"]
BLACK = Image.new("RGB", (64, 64))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_heat_is_where_the_map_is_high():
    """Of 7 x 7 regions of 32 pixels each, the one in row 1, column 5 is bright; colours span the map's own range."""
    values = np.full(49, -5.0)
    values[7 + 5] += 0.001
    red = np.asarray(pictures.heat(BLACK, values))[..., 0]
    assert np.argwhere(red > 200).mean(0) == pytest.approx([47.5, 175.5], abs=1)


def test_explanation(tmp_path):
    """Each map in its row and column, the regions' gate below the photo; a box of label 0, x 1/4 to 3/4, y 1/2 to 1, on
    the photo and its maps."""
    maps = np.random.default_rng(0).random((2, 3, 49))
    gate = np.arange(49.0)
    rows = [2, 0, 1]
    path = pictures.explanation(tmp_path / "new/sheet.png", "photo.jpg", BLACK, NAMES, np.ones(3), rows,
                                list(zip("ab", maps, strict=True)), gate, np.ones(3), [(0, 0.25, 0.5, 0.75, 1)])
    sheet = Image.open(path).copy()
    expected = sheet.copy()
    left = [np.zeros(49), gate]  # the photo is black, as a map of nothing
    for column, tiles in enumerate([left, *maps[:, rows]]):
        for row, values in enumerate(tiles):
            tile = pictures.heat(BLACK, values)
            if (column, row) in [(0, 0), (1, 1), (2, 1)]:
                ImageDraw.Draw(tile).rectangle((56, 112, 167, 223), outline="white")
            expected.paste(tile, (12 + 236 * column, 32 + 276 * row))
    assert expected == sheet


def contact_sheet(folder, names, tags):
    BLACK.save(folder / "photo.png")
    scores = table("0.3 0.9 0.1")
    return pictures.contact_sheet([folder / "photo.png"], names, scores, [tags], folder / "sheet.png")


@pytest.mark.parametrize("tags, y, length", [([], 310, 0), ([1], 310, 234), ([0], 332, 78)])
def test_contact_sheet_draws_scores_as_bars_and_tags_bright(tags, y, length, tmp_path):
    """Strongest first. The bar of a chosen tag is green and as long as its score, 260 for 1; another one is grey. y: a
    row of pixels in the bar, below its letters."""
    sheet = np.asarray(Image.open(contact_sheet(tmp_path, NAMES, tags)))
    green = (sheet[y] == [38, 118, 92]).all(1)
    assert green.sum() == pytest.approx(length, abs=3)


def test_labels_of_any_script(tmp_path):
    """Letters that a font has, codes for others: no two labels look alike, as boxes for unknown letters would."""
    names = ("猫", "狗", "Жук", "Лук", "café \udcff")
    assert len({contact_sheet(tmp_path, 3 * [name], []).read_bytes() for name in names}) == 5


@pytest.fixture
def page(tmp_path):
    """Of three photos of nine; the name of the first is markup, the last has no thumbnail and no tag."""
    lines = [json.dumps({"photo": str(tmp_path / "<b>/a.jpg"), "probabilities": {"sun": 0.7, "</script>": 0.6}}),
             '{"photo": "b.jpg", "probabilities": {"sun": 0.9, "</script>": 0.1}}',
             '{"photo": "gone.jpg", "probabilities": {"</script>": 0.3, "sun": 0.2}}']
    thumbnail = pictures.as_jpeg(BLACK)
    return pictures.page(tmp_path / "page.html", lines, [thumbnail, thumbnail, b""], 9, {"sun": 0.5, "</script>": 0.55})


def test_page_holds_names_that_cannot_be_markup(page):
    text = page.read_text()
    assert "http" not in text and "<b>" not in text
    assert text.count("</script>") == 1
    assert '[["sun", 0.7], ["\\u003c/script>", 0.6]]' in text
    assert text.count('base64,"') == 1  # the photo without a thumbnail


def test_a_page_holds_the_likeliest_photos_of_each_label(monkeypatch):
    """Of many photos: the likeliest of each label, 4 and 2, and of no label, 0; then, of equal rank, the likelier 3."""
    probabilities = table("0.1 0.1; 0.5 0.3; 0.4 0.9; 0.8 0.4; 0.9 0.2")
    assert pictures.for_page(probabilities).tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr(pictures, "PAGE", 4)
    assert pictures.for_page(probabilities).tolist() == [0, 2, 3, 4]


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_page_in_a_browser(page):
    """The photos of a chosen label, the likeliest first; of two labels those that have both; of none. The threshold of
    a label can be set, the slider moves all; names are text; a button keeps the focus. A phone has two columns."""
    page.write_text(page.read_text() + """<script>
        const all = what => [...document.querySelectorAll(what)];
        const seen = () => all("figure").map(figure => figure.innerText.replace(/\\s+/g, " "));
        const put = (id, value) => { element(id).value = value; element(id).oninput(); };
        const button = text => all("button").find(one => one.textContent.startsWith(text));
        const found = [seen(), element("count").textContent];
        button("sun").click();
        found.push(seen());
        const other = button("<");
        other.focus();
        other.click();
        found.push(seen(), document.activeElement === other);
        button("sun").click();
        put("threshold", 0.65);
        found.push(seen(), document.querySelectorAll("main b").length);
        put("shift", -1);
        found.push(seen(), element("threshold").value);
        button("no tag").click();
        found.push(seen());
        document.body.style.width = "360px";
        found.push(getComputedStyle(element("photos")).gridTemplateColumns.split(" ").length);
        document.title = JSON.stringify(found)</script>""")
    words = f"{CHROMIUM} --headless --no-sandbox --disable-gpu --window-size=500,800 --dump-dom {page.as_uri()}"
    dom = subprocess.run(words.split(), capture_output=True, encoding="utf-8", timeout=300).stdout
    a = "sun 70 %, </script> 60 % a.jpg"
    b = "sun 90 % b.jpg"
    none = "no tag gone.jpg"
    found = json.loads(html.unescape(re.search("<title>(.*)</title>", dom)[1]))
    assert found == [[a, b, none], "3 of 3 photos (the likeliest of each label, of 9 photos)", [b, a], [a], True, [], 0,
                     [a], "0.48", [none], 2]
