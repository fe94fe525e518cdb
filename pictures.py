"""A contact sheet and a page of tagged photos; a sheet that shows where in a photo its labels were seen.

C labels, M regions of a square photo, row by row from the top left. A picture is a PNG, written whole or not at all.

>>> import numpy, pictures, scenes
>>> pictures.heat(scenes.picture("test", 0)[0], numpy.arange(64.0)).size
(224, 224)
"""
import base64
import json
import math
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import data

TILE = 224  # pixels, width and height of the photo and of each map on the explanation sheet
SQUARE = (TILE, TILE)
SIDE = 260  # pixels, the longer side of a photo on the contact sheet
BAR = 22    # pixels, from one bar to the next
LINE = 20   # pixels, from one line of text to the next
GAP = 12    # pixels between the parts of a sheet
SHEET = 48   # photos that a contact sheet shows at most
PAGE = 2000  # photos that a page shows at most
DIM = "#969aa2"  # text of secondary importance
ORANGE = np.float32([255, 150, 30])


def _new_sheet(columns, rows, width, height):
    size = (GAP + columns * width, GAP + rows * height)
    return Image.new("RGB", size, "#181a1e")


def _write(sheet, path):
    stream = BytesIO()
    sheet.save(stream, "PNG")
    return data.write_atomically(path, stream.getvalue())


def _write_text(sheet, x, y, text, fill="#e6e6e6", size=15):
    """Pillow's own font has only ASCII. Other text is in DejaVu if matplotlib is installed; letters without a glyph are
    written as codes."""
    font = ImageFont.load_default(size)
    if not text.isascii():
        if matplotlib := find_spec("matplotlib"):
            font = ImageFont.truetype(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", size - 1)
        unknown = bytes(font.getmask("\U0010fffd"))
        for letter in set(text):
            if bytes(font.getmask(letter)) == unknown:
                text = text.replace(letter, ascii(letter)[1:-1])
    ImageDraw.Draw(sheet).text((x, y), text, fill, font)


def contact_sheet(photos, names, scores, tags, path):
    """One PNG of the photos, each with its four strongest labels as bars below it, bright if they are tags, else grey.

    photos: paths, of which at most SHEET are drawn; names: C; scores: [N, C] in 0..1; tags: for each photo the indices
    of its tags. -> Path. Raises UsageError if it cannot be written.
    """
    photos = photos[:SHEET]
    width = SIDE + GAP
    height = SIDE + LINE + min(4, len(names)) * BAR + GAP
    sheet = _new_sheet(min(4, len(photos)), math.ceil(len(photos) / 4), width, height)
    for number, photo in enumerate(photos):
        x = GAP + number % 4 * width
        y = GAP + number // 4 * height
        image = data.open_photo(photo)
        image = image.resize([max(1, round(length * SIDE / max(image.size))) for length in image.size])
        sheet.paste(image, (x + (SIDE - image.width) // 2, y + (SIDE - image.height) // 2))
        _write_text(sheet, x, y + SIDE + 3, photo.name[-44:], "#787c84", 11)
        y += SIDE + LINE + 2
        for label in np.argsort(-scores[number], kind="stable")[:4]:
            ink = "#a5a8af"
            colour = "#464a52"
            if label in tags[number]:
                ink = "white"
                colour = "#26765c"
            score = float(scores[number, label])
            length = max(1, round(score * (SIDE - 1)))
            sheet.paste("#2a2d34", (x, y, x + SIDE, y + 17))
            sheet.paste(colour, (x, y, x + length + 1, y + 17))
            _write_text(sheet, x + 6, y - 1, names[label][:26], ink)
            _write_text(sheet, x + SIDE - 40, y - 1, f"{100 * score:.0f} %", ink)
            y += BAR
    return _write(sheet, path)


def for_page(probabilities):
    """Which photos a page shows: all, or, if there are more than PAGE, the likeliest of each label and those likeliest
    to show none. probabilities: [N, C] -> sorted rows"""
    rows = np.arange(len(probabilities))
    best_rank = np.full(len(rows), len(rows))
    likeliest = probabilities.max(1)
    for likelihood in [*probabilities.T, 1 - likeliest]:
        order = np.argsort(-likelihood, kind="stable")
        best_rank[order] = np.minimum(best_rank[order], rows)
    best_first = np.lexsort([-likeliest, best_rank])
    return np.sort(best_first[:PAGE])


def page(path, lines, thumbnails, total, thresholds, top_k=None):
    """One HTML file, assets/page.html filled with photos: thumbnails, tags, filters, a slider. -> Path

    lines: N of JSON {"photo": path, "probabilities": {label: 0..1, likeliest first}}; thumbnails: N JPEGs, bytes;
    total: number of tagged photos; thresholds: {label: 0..1}, where the slider starts; top_k: number of tags per
    photo, whatever the thresholds, or None. Raises UsageError if it cannot be written.
    """
    photos = []
    for line, thumbnail in zip(lines, thumbnails, strict=True):
        entry = json.loads(line)
        code = base64.b64encode(thumbnail).decode()
        photos.append({"name": entry["photo"],
                       "link": Path(entry["photo"]).absolute().as_uri(),
                       "thumbnail": f"data:image/jpeg;base64,{code}",
                       "probabilities": list(entry["probabilities"].items())[:50]})
    content = json.dumps({"photos": photos, "total": total, "thresholds": thresholds, "top_k": top_k})
    template = data.read_text(data.ASSETS / "page.html", "template")
    html = template.replace("/*DATA*/", content.replace("<", "\\u003c"))  # so that no name can end the script
    return data.write_atomically(path, html)


def as_jpeg(image):
    """PIL RGB -> bytes of a JPEG file"""
    stream = BytesIO()
    image.save(stream, "JPEG")
    return stream.getvalue()


def as_seen(image, normalise):
    """What CLIP saw as a picture: image [3, H, W], normalised by torchvision's Normalize -> PIL RGB"""
    pixels = image.transpose(1, 2, 0) * np.float32(normalise.std) + np.float32(normalise.mean)
    return _to_picture(255 * pixels)


def _to_picture(values):
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def heat(seen, values):
    """A map over the photo, PIL RGB [TILE, TILE]: grey where the map is lowest, bright orange where it is highest.

    seen: PIL RGB, the square that CLIP saw; values: float array [M], stretched from its lowest to its highest value.
    """
    stretched = (values - values.min()) / max(np.ptp(values), 1e-9)
    cells = _to_picture(255 * stretched.reshape(math.isqrt(len(values)), -1))
    strength = np.float32(cells.resize(SQUARE).convert("RGB")) / 255  # [TILE, TILE, 3]
    grey = np.float32(seen.resize(SQUARE).convert("L").convert("RGB"))
    return _to_picture(0.55 * grey * (1 - 0.65 * strength) + ORANGE * strength)


def explanation(path, title, seen, names, scores, strongest, maps, region_gate=None, label_gate=None, boxes=()):
    """Where the strongest labels were seen: a PNG with a row of maps for each of them. -> Path

    title: the photo's name; seen: PIL RGB, the square that CLIP saw; scores: [C] in 0..1; strongest: label indices, one
    per row; maps: [(title, float array [C, M]), ...], one per column; region_gate: [M] or None, drawn under the photo;
    label_gate: [C] in 0..1 or None, printed beside the scores of the ten strongest labels; boxes: rows of (label index,
    left, top, right, bottom, ...) in shares of the square, outlined on the label's maps, and all of them on the photo.
    Raises UsageError if it cannot be written.
    """
    seen = seen.resize(SQUARE)
    width = TILE + GAP
    height = TILE + 2 * LINE + GAP
    # the left column holds the photo, the regions' gate and the scores
    sheet = _new_sheet(1 + len(maps), max(3, len(strongest)), width, height)

    def draw_tile(x, y, above, values, boxes=()):
        if values is None:
            picture = seen.copy()
            below = "as CLIP saw it"
        else:
            picture = heat(seen, values)
            below = f"{values.min():.3g} to {values.max():.3g}"
        for box in boxes:
            corners = np.round(TILE * np.array(box[1:5]))
            corners[2:] = np.maximum(corners[:2], corners[2:] - 1)  # the last pixel inside, at least one pixel
            ImageDraw.Draw(picture).rectangle(list(corners), outline="white")
        _write_text(sheet, x, y, above)
        sheet.paste(picture, (x, y + LINE))
        _write_text(sheet, x, y + LINE + TILE + 2, below, DIM, 12)

    draw_tile(GAP, GAP, title[-30:], None, boxes)
    if region_gate is not None:
        draw_tile(GAP, GAP + height, "S-to-V gate", region_gate)
    for row, label in enumerate(strongest):
        boxes_of_label = [box for box in boxes if box[0] == label]
        for column, (map_title, values) in enumerate(maps, 1):
            above = f"{names[label][:14]}: {map_title}"
            draw_tile(GAP + column * width, GAP + row * height, above, values[label], boxes_of_label)

    y = GAP + 2 * height
    _write_text(sheet, GAP, y, "label")
    _write_text(sheet, GAP + 112, y, "prob." if label_gate is None else "prob.     V-to-S")
    for label in np.argsort(-scores, kind="stable")[:10]:
        y += LINE
        numbers = f"{100 * scores[label]:3.0f} %"
        if label_gate is not None:
            numbers += f"      {100 * label_gate[label]:4.1f} %"
        _write_text(sheet, GAP, y, names[label][:14])
        _write_text(sheet, GAP + 112, y, numbers, DIM)
    return _write(sheet, path)
