"""Pictures for people: a contact sheet and a page of tagged photos; a sheet that shows where labels were seen in one.

C labels, M regions of a square photo, row by row from the top left. A picture is a PNG, written whole or not at all.

>>> import numpy, pictures, scenes
>>> pictures.heat(scenes.picture("test", 0)[0], numpy.arange(64.0)).size
(224, 224)
"""
import base64
import contextlib
import json
import math
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import data

TILE = 224  # pixels, width and height of the photo and of each map on the sheet of explanation
GAP = 12    # pixels between the parts of a sheet
PAGE = 2000  # photos that a page shows at most
BACKGROUND, WHITE, BRIGHT, DIM = (24, 26, 30), (255, 255, 255), (230, 230, 230), (150, 154, 162)
HEAT = np.array([255, 150, 30], np.float32)


def _write(sheet, path):
    stream = BytesIO()
    sheet.save(stream, "PNG")
    data.write_atomically(path, stream.getvalue())
    return Path(path)


def _text(canvas, x, y, text, size, fill):
    """Pillow's own font knows ASCII alone. The rest is written in DejaVu, where matplotlib brings it, or as codes."""
    font = ImageFont.load_default(size)
    if not text.isascii():
        if found := find_spec("matplotlib"):
            font = ImageFont.truetype(Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", size - 1)
        lacking = bytes(font.getmask("\U0010fffd"))
        text = "".join(ascii(letter)[1:-1] if bytes(font.getmask(letter)) == lacking else letter for letter in text)
    canvas.text((x, y), text, font=font, fill=fill)


def contact_sheet(photos, names, scores, tags, path, per_row=4, limit=48):
    """One PNG of the photos with their four strongest labels as bars below each; chosen tags are bright, the rest grey.

    photos: paths or scenes' (split, index), of which at most `limit` are drawn; names: C; scores: [N, C] in 0..1;
    tags: for each photo the label indices chosen. -> Path. Raises UsageError if it cannot be written.
    """
    photos, bars = photos[:limit], min(4, len(names))
    side, title_height, bar_height = 260, 20, 22  # pixels
    columns, rows = min(per_row, len(photos)), math.ceil(len(photos) / per_row)
    width, height = side + GAP, side + title_height + bars * bar_height + GAP
    sheet = Image.new("RGB", (GAP + columns * width, GAP + rows * height), BACKGROUND)
    canvas = ImageDraw.Draw(sheet)
    for number, photo in enumerate(photos):
        x, y = GAP + number % per_row * width, GAP + number // per_row * height
        image = data.open_photo(photo)
        shrunk = [max(1, round(length * side / max(image.size))) for length in image.size]
        image = image.resize(shrunk, Image.Resampling.BICUBIC)
        sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))
        title = photo.name[-44:] if isinstance(photo, Path) else " ".join(map(str, photo))
        _text(canvas, x, y + side + 3, title, 11, (120, 124, 132))
        y += side + title_height
        for label in np.argsort(-scores[number], kind="stable")[:bars]:
            score, chosen = float(scores[number, label]), int(label) in tags[number]
            ink, bar_colour = (WHITE, (38, 118, 92)) if chosen else ((165, 168, 175), (70, 74, 82))
            top, bottom = y + 2, y + bar_height - 4
            canvas.rectangle([x, top, x + side - 1, bottom], fill=(42, 45, 52))
            canvas.rectangle([x, top, x + max(1, round(score * (side - 1))), bottom], fill=bar_colour)
            _text(canvas, x + 6, y + 1, names[label][:26], 15, ink)
            _text(canvas, x + side - 40, y + 1, f"{100 * score:.0f} %", 15, ink)
            y += bar_height
    return _write(sheet, path)


def page(path, lines, total, threshold, top_k=None):
    """One HTML file, assets/page.html with the first PAGE photos in it: thumbnails, tags, a filter, a slider. -> Path

    lines: JSON {"photo": path, "scores": {label: 0..1, strongest first}} each; total: photos in all; threshold: where
    the slider starts; top_k: at most so many tags a photo, or None. Raises UsageError if it cannot be written.
    """
    photos = []
    for line in map(json.loads, lines[:PAGE]):
        photo, stream = Path(line["photo"]), BytesIO()
        with contextlib.suppress(Exception):  # damaged or gone since; Pillow raises many kinds
            image = data.open_photo(photo)
            image.thumbnail((240, 240), reducing_gap=2)
            image.save(stream, "JPEG", quality=75)
        thumbnail = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
        photos.append({"name": str(photo), "link": photo.absolute().as_uri(), "thumbnail": thumbnail,
                       "scores": list(line["scores"].items())[:50]})
    content = json.dumps({"photos": photos, "total": total, "threshold": threshold, "top_k": top_k})
    template = (data.ASSETS / "page.html").read_text("utf-8")
    data.write_atomically(path, template.replace("/*DATA*/", content.replace("<", "\\u003c")))
    return Path(path)


def as_seen(image, normalise):
    """What CLIP saw as a picture: image [3, H, W], normalised by torchvision's Normalize -> PIL RGB"""
    pixels = image.transpose(1, 2, 0) * np.float32(normalise.std) + np.float32(normalise.mean)
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def heat(seen, values):
    """A map over the photo, PIL RGB [TILE, TILE]: grey where the map is lowest, bright orange where it is highest.

    seen: PIL RGB, the square that CLIP saw; values: float array [M], stretched from its lowest to its highest value.
    """
    side = math.isqrt(len(values))
    stretched = (values - values.min()) / max(float(values.max() - values.min()), 1e-9)
    cells = Image.fromarray((255 * stretched).astype(np.uint8).reshape(side, side))
    strength = np.asarray(cells.resize((TILE, TILE), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    grey = seen.resize((TILE, TILE), Image.Resampling.BICUBIC).convert("L").convert("RGB")
    mixed = 0.55 * np.asarray(grey, np.float32) * (1 - 0.65 * strength) + HEAT * strength
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


def explanation(path, title, seen, names, scores, strongest, maps, region_gate=None, label_gate=None, boxes=()):
    """Where the strongest labels were seen: a PNG with a row of maps for each of them. -> Path

    title: the photo's name; seen: PIL RGB, the square that CLIP saw; scores: [C] in 0..1; strongest: label indices, a
    row each; maps: [(title, float array [C, M]), ...], a column each; region_gate: [M] or None, drawn under the photo;
    label_gate: [C] in 0..1 or None, printed beside the scores of the ten strongest labels; boxes: rows of (label index,
    left, top, right, bottom, ...) in shares of the square, outlined on the label's maps, and all of them on the photo.
    Raises UsageError if it cannot be written.
    """
    line = 20  # pixels
    width, height = TILE + GAP, TILE + 2 * line + GAP
    rows = max(3, len(strongest))  # the left column holds the photo, the regions' gate and the scores
    sheet = Image.new("RGB", (GAP + (1 + len(maps)) * width, GAP + rows * height), BACKGROUND)
    canvas = ImageDraw.Draw(sheet)

    def draw_tile(picture, column, row, above, below):
        x, y = GAP + column * width, GAP + row * height
        _text(canvas, x, y, above, 15, BRIGHT)
        sheet.paste(picture, (x, y + line))
        _text(canvas, x, y + line + TILE + 2, below, 12, DIM)

    def outlined(picture, labels):
        for label, *corners in boxes:
            if label in labels:
                left, top, right, bottom = (round(TILE * share) for share in corners[:4])
                ImageDraw.Draw(picture).rectangle([left, top, max(left, right - 1), max(top, bottom - 1)], None, WHITE)
        return picture

    def draw_map(values, column, row, above, labels=()):
        span = f"{values.min():.3g} to {values.max():.3g}"
        draw_tile(outlined(heat(seen, values), labels), column, row, above, span)

    seen = seen.resize((TILE, TILE), Image.Resampling.BICUBIC)
    draw_tile(outlined(seen.copy(), range(len(names))), 0, 0, title[-30:], "as CLIP saw it")
    if region_gate is not None:
        draw_map(region_gate, 0, 1, "S-to-V gate")
    for row, label in enumerate(strongest):
        for column, (map_title, values) in enumerate(maps, 1):
            draw_map(values[label], column, row, f"{names[label][:14]}: {map_title}", [label])

    x, y = GAP, GAP + 2 * height
    _text(canvas, x, y, "label", 15, BRIGHT)
    _text(canvas, x + 112, y, "score" if label_gate is None else "score    V-to-S", 15, BRIGHT)
    for label in np.argsort(-scores, kind="stable")[:10]:
        y += line
        gate = "" if label_gate is None else f"      {100 * label_gate[label]:4.1f} %"
        _text(canvas, x, y, names[label][:14], 15, BRIGHT)
        _text(canvas, x + 112, y, f"{100 * scores[label]:3.0f} %{gate}", 15, DIM)
    return _write(sheet, path)
