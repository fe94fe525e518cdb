"""pictures.py, read back from the pixels of what it writes."""
import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image, ImageDraw

import pictures

NAMES = ["sun", "moon", "star"]
BLACK = Image.new("RGB", (64, 64))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_heat_is_where_the_map_is_high():
    """Of 7 x 7 regions, of 32 pixels each, the one in row 1, column 5; from the map's own lowest to its highest."""
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
    scores = np.array([[0.3, 0.9, 0.1]])
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
    """Of two photos of nine; one is gone, the name of the other is markup."""
    photo = tmp_path / "<b>" / "a.jpg"
    photo.parent.mkdir()
    BLACK.save(photo)
    lines = [json.dumps({"photo": str(photo), "probabilities": {"sun": 0.9, "</script>": 0.6}}),
             '{"photo": "gone.jpg", "probabilities": {"sun": 0.7}}']
    return pictures.page(tmp_path / "page.html", lines, 9, {"sun": 0.5, "</script>": 0.55})


def test_page_holds_names_that_cannot_be_markup(page):
    text = page.read_text()
    assert "http" not in text and "<b>" not in text
    assert text.count("</script>") == 1
    assert '[["sun", 0.9], ["\\u003c/script>", 0.6]]' in text
    assert text.count('base64,"') == 1  # the photo that is gone


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_page_in_a_browser(page):
    """A click on a label leaves its photos, and its threshold can be set; the slider moves all; names are text."""
    page.write_text(page.read_text() + """<script>
        const seen = () => photos.filter(photo => photo.figure.offsetHeight > 0).map(photo => photo.tags.textContent);
        const put = (id, value) => { element(id).value = value; element(id).oninput(); };
        const found = [seen(), element("count").textContent];
        [...document.querySelectorAll("button")].find(button => button.textContent.startsWith("<")).click();
        found.push(seen(), element("threshold").value);
        put("threshold", 0.65);
        found.push(seen(), document.querySelectorAll("main b").length);
        put("shift", -1);
        found.push(seen(), element("threshold").value);
        document.title = JSON.stringify(found)</script>""")
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    dom = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=300).stdout
    both = "sun 90 %, &lt;/script&gt; 60 %"
    assert f'<title>[["{both}","sun 70 %"],"2 of 2 photos (the first 2 of 9)",["{both}"],"0.55",[],0,' \
        f'["{both}"],"0.48"]</title>' in dom
