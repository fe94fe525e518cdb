"""scenes: a small drawn world, so that every command of this project works offline, in minutes, on two CPU cores.

Eighteen everyday things are drawn with Pillow, one to five in a picture, with co-occurrence (boats at sea, cups in
rooms), look-alikes (sun, ball, apple and balloon are round), occlusion, clutter and noise. A grammar writes captions as
people do, often naming only some of the things. experiments/train_scenes_clip.py trains a tiny CLIP on such pairs; its
checkpoint ships in assets/. It shows mechanisms, proves nothing about photographs, and compares with no paper's number.

    python scenes.py draw FOLDER --count 12     seconds, writes PNG files to try --predict on

Each picture is drawn from numpy's generator seeded with (split, index), so the splits are disjoint: "clip" trains the
tiny CLIP, "train" is for methods that learn from pictures, "test" is only ever scored. All of it is frozen.
"""
import argparse
import hashlib
import math
from collections import namedtuple
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngInfo

SIZE = 192  # pixels, width and height of a drawn picture; the tiny CLIP sees it at 64
SPLITS = {"clip": 1, "train": 2, "test": 3, "sentences": 4}
DIGEST = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()  # cached embeddings follow this file
CHECKPOINT = Path(__file__).parent / "assets" / "scenes_clip.safetensors"
CLIP_CONFIG = {"embed_dim": 96,  # of the tiny CLIP, as open_clip has them
               "vision_cfg": {"image_size": 64, "layers": 3, "width": 96, "patch_size": 8, "head_width": 32},
               "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2}}
COLOURS = {"red": (214, 48, 49), "orange": (240, 140, 40), "yellow": (248, 214, 70), "green": (60, 150, 70),
           "blue": (52, 110, 205), "purple": (130, 70, 170), "pink": (240, 140, 180), "brown": (130, 85, 50),
           "white": (245, 245, 245), "grey": (140, 145, 150)}
ANY = ["red", "orange", "yellow", "green", "blue", "purple", "pink"]
DARK, LIGHT, WOOD, LEAF, GLASS = (45, 45, 50), (250, 246, 230), (120, 78, 45), (70, 155, 75), (180, 215, 235)
AROUND, UPPER_HALF = np.linspace(0, 2 * math.pi, 24, endpoint=False), np.linspace(0, math.pi, 14)  # angles


def disc(x, y, across, down=None, angles=AROUND):
    down = across if down is None else down
    return [(x + across * math.cos(angle), y + down * math.sin(angle)) for angle in angles]


def box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def rays(points, inner, outer):
    angles = [math.pi * number / points for number in range(2 * points)]
    radii = [outer, inner] * points
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in zip(radii, angles, strict=True)]


MOON = [(-across * math.sin(angle), down * math.cos(angle)) for across, down, start, end in
        [(0.85, 0.95, 0, math.pi), (0.3, 0.9, math.pi, 0)] for angle in np.linspace(start, end, 14)]
PETALS = [disc(0.36 * math.cos(turn), -0.4 + 0.36 * math.sin(turn), 0.26) for turn in np.arange(6) * math.pi / 3]

# words: what captions call it, the label name first; where: in the upper half, the lower half, or anywhere;
# icon: polygons from back to front, in unit coordinates, y down; (polygon, colour) where the colour is not the thing's
Thing = namedtuple("Thing", ["words", "colours", "where", "icon"])
THINGS = {thing.words[0]: thing for thing in [
    Thing(["sun", "sunshine"], ["yellow", "orange"], "sky", [rays(9, 0.62, 1.0), disc(0, 0, 0.55)]),
    Thing(["moon", "crescent"], ["white", "yellow"], "sky", [MOON]),
    Thing(["star"], ["yellow", "white", "orange"], "sky", [rays(5, 0.42, 1.0)]),
    Thing(["cloud"], ["white", "grey"], "sky", [
        disc(-0.5, 0.15, 0.45, 0.35), disc(0.5, 0.15, 0.45, 0.33), disc(0, -0.1, 0.5, 0.42)]),
    Thing(["bird", "seagull", "sparrow"], ["white", "brown", "blue", "grey"], "sky", [
        [(-0.55, 0.1), (-1.0, -0.15), (-0.95, 0.25)], disc(0, 0.1, 0.65, 0.3), disc(0.6, -0.1, 0.25),
        ([(0.8, -0.15), (1.1, -0.05), (0.8, 0.05)], (240, 150, 40)), [(-0.3, 0.0), (0.3, 0.0), (-0.25, -0.8)],
        (disc(0.66, -0.15, 0.06), DARK)]),
    Thing(["kite"], ANY, "sky", [
        ([(0, 0.5), (0.1, 0.5), (0.35, 1.1), (0.25, 1.1)], DARK), [(0, -1), (0.6, -0.2), (0, 0.6), (-0.6, -0.2)],
        (box(-0.04, -0.95, 0.04, 0.55), LIGHT), (box(-0.55, -0.24, 0.55, -0.16), LIGHT)]),
    Thing(["balloon"], ANY, "sky", [(box(-0.03, 0.45, 0.03, 1.1), DARK), [(0, 0.35), (0.14, 0.58), (-0.14, 0.58)],
        disc(0, -0.25, 0.58, 0.7), (disc(-0.2, -0.5, 0.1, 0.16), LIGHT)]),
    Thing(["tree", "pine", "oak"], ["green"], "ground", [(box(-0.13, 0.3, 0.13, 1.0), WOOD),
        [(0, -1.0), (0.5, -0.3), (-0.5, -0.3)], [(0, -0.6), (0.65, 0.4), (-0.65, 0.4)]]),
    Thing(["flower", "daisy", "tulip", "blossom"], ["red", "pink", "yellow", "purple", "white", "orange"], "ground", [
        (box(-0.05, 0.0, 0.05, 1.0), LEAF), (disc(0.22, 0.6, 0.22, 0.1), LEAF), *PETALS,
        (disc(0, -0.4, 0.2), (250, 200, 60))]),
    Thing(["mushroom", "toadstool"], ["red", "brown", "orange"], "ground", [(box(-0.2, 0.0, 0.2, 0.9), LIGHT),
        disc(0, 0.1, 0.85, -0.85, UPPER_HALF), (disc(-0.3, -0.3, 0.12), LIGHT), (disc(0.3, -0.2, 0.13), LIGHT)]),
    Thing(["umbrella", "parasol"], ANY, "any", [
        (box(-0.04, -0.8, 0.04, 0.9), DARK), (box(0.0, 0.82, 0.25, 0.92), DARK), disc(0, 0.0, 0.95, -0.8, UPPER_HALF),
        ([(-0.08, -0.78), (0.08, -0.78), (0.28, 0), (-0.28, 0)], LIGHT)]),
    Thing(["house", "cottage", "cabin", "home"], ["red", "yellow", "white", "brown", "blue"], "ground", [
        box(-0.75, -0.1, 0.75, 0.95), ([(0, -1.0), (1.0, -0.05), (-1.0, -0.05)], (110, 60, 50)),
        (box(-0.15, 0.35, 0.2, 0.95), WOOD), (box(0.35, 0.15, 0.6, 0.45), GLASS)]),
    Thing(["car", "automobile", "taxi"], ["red", "blue", "yellow", "white", "grey", "green"], "ground", [
        [(-0.5, -0.05), (-0.3, -0.5), (0.3, -0.5), (0.55, -0.05)], box(-1.0, -0.1, 1.0, 0.38),
        ([(-0.35, -0.08), (-0.22, -0.4), (0.22, -0.4), (0.4, -0.08)], GLASS),
        (disc(-0.55, 0.4, 0.24), DARK), (disc(0.55, 0.4, 0.24), DARK)]),
    Thing(["boat", "ship", "sailboat"], ["red", "blue", "white", "brown", "orange"], "ground", [
        [(-1.0, 0.35), (1.0, 0.35), (0.65, 0.85), (-0.65, 0.85)], (box(-0.05, -1.0, 0.05, 0.35), WOOD),
        ([(0.1, -0.95), (0.8, 0.2), (0.1, 0.2)], LIGHT), ([(-0.1, -0.7), (-0.6, 0.2), (-0.1, 0.2)], LIGHT)]),
    Thing(["fish", "goldfish"], ["orange", "blue", "red", "grey", "yellow"], "ground", [
        [(-0.5, 0), (-1.0, -0.4), (-1.0, 0.4)], disc(0.1, 0, 0.75, 0.42), (disc(0.5, -0.1, 0.08), DARK),
        [(-0.1, -0.35), (0.3, -0.38), (0.0, -0.65)]]),
    Thing(["apple"], ["red", "green", "yellow"], "ground", [disc(-0.25, 0.1, 0.55, 0.65), disc(0.25, 0.1, 0.55, 0.65),
        (box(-0.05, -0.9, 0.05, -0.4), WOOD), (disc(0.28, -0.68, 0.25, 0.12), LEAF)]),
    Thing(["cup", "mug"], ["white", "blue", "red", "green", "orange"], "ground", [disc(0.6, 0.1, 0.38),
        (disc(0.6, 0.1, 0.2), LIGHT), [(-0.7, -0.6), (0.6, -0.6), (0.45, 0.75), (-0.55, 0.75)],
        (disc(-0.05, -0.6, 0.65, 0.14), (100, 65, 45))]),
    Thing(["ball", "football"], ANY, "any", [disc(0, 0, 0.8), (disc(0, 0, 0.3, 0.8), LIGHT), disc(0, 0, 0.1, 0.8)]),
]}
NAMES = list(THINGS)

# phrases: how captions say it; back and floor: colours of the upper and the lower part; things: mostly found there
Place = namedtuple("Place", ["phrases", "back", "floor", "things"])
PLACES = {
    "meadow": Place(["in a meadow", "on the grass", "in the garden", "in a field"], (165, 205, 240), (120, 180, 90),
                    ["sun", "cloud", "bird", "kite", "balloon", "tree", "flower", "mushroom", "house", "apple"]),
    "night": Place(["at night", "in the dark", "late in the evening"], (28, 32, 70), (40, 58, 50),
                   ["moon", "star", "cloud", "tree", "house", "car"]),
    "sea": Place(["at sea", "on the water", "on the waves"], (175, 215, 240), (50, 110, 180),
                 ["sun", "cloud", "bird", "boat", "fish", "star"]),
    "beach": Place(["at the beach", "on the sand"], (160, 215, 245), (235, 210, 150),
                   ["sun", "bird", "kite", "umbrella", "ball", "boat", "star"]),
    "room": Place(["in a room", "on the floor", "indoors", "at home"], (225, 210, 190), (165, 125, 90),
                  ["cup", "apple", "flower", "balloon", "umbrella", "ball", "fish"]),
    "street": Place(["on the street", "in town", "by the road"], (190, 200, 215), (110, 110, 115),
                    ["car", "house", "tree", "umbrella", "balloon", "moon", "cloud"]),
}

# x, y: centre, 0..1; radius of the icon's unit circle, as a share of the picture's width; angle in radians
Item = namedtuple("Item", ["thing", "colour", "x", "y", "radius", "angle", "flip"])


def layout(rng):
    """Who is where: (place, [Item, ...] from back to front). rng: numpy Generator. 1 to 5 things, no thing twice."""
    place = str(rng.choice(list(PLACES)))
    items, count = [], int(rng.choice([1, 2, 3, 4, 5], p=[0.15, 0.25, 0.27, 0.2, 0.13]))
    while len(items) < count:
        name = str(rng.choice(PLACES[place].things)) if rng.random() < 0.7 else str(rng.choice(NAMES))
        if name in [item.thing for item in items]:
            continue
        low, high = {"sky": (0.1, 0.6), "ground": (0.42, 0.9), "any": (0.15, 0.85)}[THINGS[name].where]
        items.append(Item(name, str(rng.choice(THINGS[name].colours)), rng.uniform(0.1, 0.9), rng.uniform(low, high),
                          0.095 + 0.15 * rng.random() ** 1.2, rng.normal(0, 0.18), bool(rng.random() < 0.5)))
    return place, items


def polygons(item):
    """A thing's polygons from back to front: [(points in pixels, colour), ...]"""
    cos, sin, turned = math.cos(item.angle), math.sin(item.angle), []
    for part in THINGS[item.thing].icon:
        polygon, colour = part if isinstance(part, tuple) else (part, COLOURS[item.colour])
        polygon = [((-x if item.flip else x), y) for x, y in polygon]
        turned.append(([(SIZE * (item.x + item.radius * (x * cos - y * sin)),
                         SIZE * (item.y + item.radius * (x * sin + y * cos))) for x, y in polygon], colour))
    return turned


def draw(place, items, rng):
    """The picture of a layout, PIL RGB [SIZE, SIZE]; rng decides clutter, tints and noise."""
    def whole(colour):
        return tuple(int(value) for value in np.clip(colour, 0, 255))

    def scatter_clutter(count):
        for _ in range(count):
            x, y = rng.uniform(0, SIZE, 2)
            colour = whole(np.array(COLOURS[str(rng.choice(list(COLOURS)))]) + rng.normal(0, 25, 3))
            if rng.random() < 0.4:
                along, down = rng.normal(0, 45, 2)
                canvas.line([x, y, x + along, y + down], fill=colour, width=int(rng.integers(1, 5)))
            else:
                corners = range(int(rng.integers(3, 7)))
                canvas.polygon([(x + rng.normal(0, 9), y + rng.normal(0, 9)) for _ in corners], fill=colour)

    back, floor = (whole(np.array(colour) + rng.normal(0, 18, 3)) for colour in PLACES[place][1:3])
    image = Image.new("RGB", (SIZE, SIZE), back)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle([0, int(SIZE * rng.uniform(0.45, 0.75)), SIZE, SIZE], fill=floor)
    scatter_clutter(int(rng.integers(2, 9)))
    for item in items:
        tint = rng.normal(0, 14, 3)
        for points, colour in polygons(item):
            canvas.polygon(points, fill=whole(np.array(colour) + tint))
    scatter_clutter(int(rng.integers(0, 4)))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5)))
    noise = rng.normal(0, rng.uniform(2, 12), (SIZE // 2, SIZE // 2, 3)).repeat(2, 0).repeat(2, 1)
    return Image.fromarray(np.clip(np.asarray(image) * rng.uniform(0.75, 1.15) + noise, 0, 255).astype(np.uint8))


def present(items):
    """uint8 [18], in the order of NAMES: 1 for the things of a layout."""
    return np.isin(NAMES, [item.thing for item in items]).astype(np.uint8)


def picture(split, index):
    """One picture and its labels. split: "clip", "train" or "test". -> (PIL RGB [192, 192], uint8 [18])"""
    rng = np.random.default_rng([SPLITS[split], index])
    place, items = layout(rng)
    return draw(place, items, rng), present(items)


def labels_of(split, index):
    """The labels of picture(split, index) without drawing it."""
    return present(layout(np.random.default_rng([SPLITS[split], index]))[1])


def boxes(split, index):
    """Where the things of picture(split, index) are -> [(name, left, top, right, bottom, visible), ...], pixels, cut at
    the picture's edge; visible: share of the thing's pixels that no later thing covers (clutter aside)."""
    items, masks, seen = layout(np.random.default_rng([SPLITS[split], index]))[1], [], np.zeros((SIZE, SIZE), int)
    for number, item in enumerate(items):
        image = Image.new("L", (SIZE, SIZE))
        for points, _ in polygons(item):
            ImageDraw.Draw(image).polygon(points, fill=1)
        masks.append(np.asarray(image) > 0)
        seen[masks[-1]] = number
    return [(item.thing, *Image.fromarray(mask).getbbox(), float((seen[mask] == number).mean()))
            for number, (item, mask) in enumerate(zip(items, masks, strict=True))]


# --- captions ---------------------------------------------------------------------------------------------------------

OPENERS = [*[""] * 5, "a photo of", "a picture of", "a drawing of", "there is", "we see", "here is", "look,", "this is"]
JOINTS = [" and ", " next to ", " with ", " behind ", " near ", " in front of ", ", ", " beside "]
MOODS = ["what a lovely day", "nice colours", "so quiet", "my favourite", "seen this morning", "not far away",
         "so pretty", "painted by hand"]


def phrase(rng, name, colour):
    """One thing in words: "a small red cottage"."""
    word = str(rng.choice(THINGS[name].words)) if rng.random() < 0.45 else name
    size = [str(rng.choice(["little", "big", "small", "nice", "old"]))] if rng.random() < 0.15 else []
    words = [*size, *([colour] if colour and rng.random() < 0.35 else []), word]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([str(rng.choice(["the", "one", "some"])) if rng.random() < 0.2 else article, *words])


def caption(rng, named, place=None):
    """A sentence that names exactly the given things. named: [(thing, colour or None), ...]; place: a name, or None."""
    parts = [phrase(rng, name, colour) for name, colour in named]
    while len(parts) > 1:
        if len(parts) == 2 or rng.random() < 0.5:
            parts[-2:] = [str(rng.choice(JOINTS)).join(parts[-2:])]
        else:
            parts[:2] = [", ".join(parts[:2])]
    where = str(rng.choice(PLACES[place].phrases)) if place and rng.random() < 0.5 else ""
    text = " ".join(words for words in (str(rng.choice(OPENERS)), *parts, where) if words)
    if rng.random() < 0.12 or not text:
        text = f"{text}, {rng.choice(MOODS)}".lstrip(", ")
    return text + ("." if rng.random() < 0.7 else "")


def person_caption(rng, place, items):
    """What a person writes under a picture: the larger a thing, the likelier it is named; often only one or two are."""
    ranked = sorted(items, key=lambda item: -item.radius * rng.uniform(0.6, 1.4))
    wanted = 0 if rng.random() < 0.03 else int(rng.choice([1, 2, 3, len(items)], p=[0.45, 0.25, 0.15, 0.15]))
    return caption(rng, [(item.thing, item.colour) for item in ranked[:wanted]], place)


def sentences(count, seed):
    """Training texts for text-only methods: every sentence names all the things of its label set, no picture is drawn.
    -> (list of str, uint8 [count, 18])."""
    rng = np.random.default_rng([SPLITS["sentences"], seed])
    texts, labels = [], np.zeros((count, len(NAMES)), np.uint8)
    for row in range(count):
        place, items = layout(rng)
        texts.append(caption(rng, [(item.thing, item.colour) for item in items], place))
        labels[row] = present(items)
    return texts, labels


def main():
    parser = argparse.ArgumentParser(description="Write test pictures of the built-in world as PNG files.")
    parser.add_argument("command", choices=["draw"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=0, help="number of the first (default: %(default)s)")
    parser.add_argument("--count", type=int, default=12, help="how many (default: %(default)s)")
    args = parser.parse_args()
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        for index in range(args.first, args.first + args.count):
            origin = PngInfo()  # which picture it is, so that the things' places are known
            origin.add_text("scenes", f"test {index}")
            picture("test", index)[0].save(args.folder / f"scene_{index:03d}.png", pnginfo=origin)
    except OSError as error:
        parser.error(f"cannot write into {args.folder} ({error.strerror}); choose another folder")
    print(f"{args.count} pictures in {args.folder}")


if __name__ == "__main__":
    main()
