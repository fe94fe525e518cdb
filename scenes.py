"""scenes: a small drawn world, so that every command of this project works offline, in minutes, on two CPU cores.

Eighteen everyday things are drawn with Pillow, one to five in a picture, with co-occurrence (boats at sea, cups in rooms),
look-alikes (sun, ball, apple and balloon are all round), occlusion, clutter and noise. A grammar writes captions as people do:
often naming only some of the things, in varied words. A tiny CLIP (open_clip's own classes, tokenizer and loss) is trained
on such pairs by `python scenes.py train`; its checkpoint ships in assets/. It is toy data: it shows mechanisms, it
proves nothing about photographs, and no number made with it compares with a paper's.

    python scenes.py train                      about 15 minutes on two cores, writes assets/scenes_clip.safetensors
    python scenes.py draw FOLDER --count 12     seconds, writes PNG files to try --predict on

In Python:

>>> import scenes
>>> picture, labels = scenes.picture("test", 0)
>>> picture.size, len(labels) == len(scenes.THINGS)
((192, 192), True)

Pictures are disjoint by construction: each is drawn from numpy's generator seeded with (split, index), and the splits have
different numbers. "clip" pictures train the tiny CLIP, "train" pictures are for methods that learn from pictures, "test"
pictures are only ever scored.
"""
import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 192  # pixels, width and height of a drawn picture; the tiny CLIP sees it at 64
SPLITS = {"clip": 1, "train": 2, "test": 3, "sentences": 4}
DIGEST = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()  # cached embeddings follow the drawing code
CHECKPOINT = Path(__file__).parent / "assets" / "scenes_clip.safetensors"

COLOURS = {
    "red": (214, 48, 49), "orange": (240, 140, 40), "yellow": (248, 214, 70), "green": (60, 150, 70), "blue": (52, 110, 205),
    "purple": (130, 70, 170), "pink": (240, 140, 180), "brown": (130, 85, 50), "white": (245, 245, 245), "grey": (140, 145, 150),
}
ANY = ["red", "orange", "yellow", "green", "blue", "purple", "pink"]


class Thing(NamedTuple):
    words: tuple    # what captions call it; the first is the label name
    colours: list   # colours it comes in
    where: str      # "sky" (upper half), "ground" (lower half) or "any"
    icon: list      # (shape, colour) from back to front; unit coordinates, y down; colour None = the thing's own


def disc(x, y, rx, ry=None):
    ry = rx if ry is None else ry
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 24, endpoint=False)]


def box(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def dome(x, y, rx, ry):
    return [(x + rx * math.cos(a), y - ry * math.sin(a)) for a in np.linspace(0, math.pi, 14)]


def rays(points, inner, outer):
    return [(r * math.sin(math.pi * k / points), -r * math.cos(math.pi * k / points))
            for k in range(2 * points) for r in [outer if k % 2 == 0 else inner]]


DARK, LIGHT, WOOD, LEAF = (45, 45, 50), (250, 246, 230), (120, 78, 45), (70, 155, 75)
CRESCENT = [(-x * math.sin(a), y * math.cos(a)) for x, y, angles in ((0.85, 0.95, (0, math.pi)), (0.3, 0.9, (math.pi, 0))) for a in np.linspace(*angles, 14)]
THINGS = {
    "sun": Thing(("sun", "sunshine"), ["yellow", "orange"], "sky", [(rays(9, 0.62, 1.0), None), (disc(0, 0, 0.55), None)]),
    "moon": Thing(("moon", "crescent"), ["white", "yellow"], "sky", [(CRESCENT, None)]),
    "star": Thing(("star",), ["yellow", "white", "orange"], "sky", [(rays(5, 0.42, 1.0), None)]),
    "cloud": Thing(("cloud",), ["white", "grey"], "sky",
                   [(disc(-0.5, 0.15, 0.45, 0.35), None), (disc(0.5, 0.15, 0.45, 0.33), None), (disc(0, -0.1, 0.5, 0.42), None)]),
    "bird": Thing(("bird", "seagull", "sparrow"), ["white", "brown", "blue", "grey"], "sky",
                  [([(-0.55, 0.1), (-1.0, -0.15), (-0.95, 0.25)], None), (disc(0, 0.1, 0.65, 0.3), None), (disc(0.6, -0.1, 0.25), None),
                   ([(0.8, -0.15), (1.1, -0.05), (0.8, 0.05)], (240, 150, 40)), ([(-0.3, 0.0), (0.3, 0.0), (-0.25, -0.8)], None),
                   (disc(0.66, -0.15, 0.06), DARK)]),
    "kite": Thing(("kite",), ANY, "sky", [([(0, 0.5), (0.1, 0.5), (0.35, 1.1), (0.25, 1.1)], DARK), ([(0, -1), (0.6, -0.2), (0, 0.6), (-0.6, -0.2)], None),
                                          (box(-0.04, -0.95, 0.04, 0.55), LIGHT), (box(-0.55, -0.24, 0.55, -0.16), LIGHT)]),
    "balloon": Thing(("balloon",), ANY, "sky", [(box(-0.03, 0.45, 0.03, 1.1), DARK), ([(0, 0.35), (0.14, 0.58), (-0.14, 0.58)], None),
                                                (disc(0, -0.25, 0.58, 0.7), None), (disc(-0.2, -0.5, 0.1, 0.16), LIGHT)]),
    "tree": Thing(("tree", "pine", "oak"), ["green"], "ground",
                  [(box(-0.13, 0.3, 0.13, 1.0), WOOD), ([(0, -1.0), (0.5, -0.3), (-0.5, -0.3)], None), ([(0, -0.6), (0.65, 0.4), (-0.65, 0.4)], None)]),
    "flower": Thing(("flower", "daisy", "tulip", "blossom"), ["red", "pink", "yellow", "purple", "white", "orange"], "ground",
                    [(box(-0.05, 0.0, 0.05, 1.0), LEAF), (disc(0.22, 0.6, 0.22, 0.1), LEAF)]
                    + [(disc(0.36 * math.cos(a), -0.4 + 0.36 * math.sin(a), 0.26), None) for a in np.arange(6) * math.pi / 3]
                    + [(disc(0, -0.4, 0.2), (250, 200, 60))]),
    "mushroom": Thing(("mushroom", "toadstool"), ["red", "brown", "orange"], "ground",
                      [(box(-0.2, 0.0, 0.2, 0.9), LIGHT), (dome(0, 0.1, 0.85, 0.85), None), (disc(-0.3, -0.3, 0.12), LIGHT), (disc(0.3, -0.2, 0.13), LIGHT)]),
    "umbrella": Thing(("umbrella", "parasol"), ANY, "any",
                      [(box(-0.04, -0.8, 0.04, 0.9), DARK), (box(0.0, 0.82, 0.25, 0.92), DARK), (dome(0, 0.0, 0.95, 0.8), None),
                       ([(-0.08, -0.78), (0.08, -0.78), (0.28, 0), (-0.28, 0)], LIGHT)]),
    "house": Thing(("house", "cottage", "cabin", "home"), ["red", "yellow", "white", "brown", "blue"], "ground",
                   [(box(-0.75, -0.1, 0.75, 0.95), None), ([(0, -1.0), (1.0, -0.05), (-1.0, -0.05)], (110, 60, 50)),
                    (box(-0.15, 0.35, 0.2, 0.95), WOOD), (box(0.35, 0.15, 0.6, 0.45), (180, 215, 235))]),
    "car": Thing(("car", "automobile", "taxi"), ["red", "blue", "yellow", "white", "grey", "green"], "ground",
                 [([(-0.5, -0.05), (-0.3, -0.5), (0.3, -0.5), (0.55, -0.05)], None), (box(-1.0, -0.1, 1.0, 0.38), None),
                  ([(-0.35, -0.08), (-0.22, -0.4), (0.22, -0.4), (0.4, -0.08)], (180, 215, 235)), (disc(-0.55, 0.4, 0.24), DARK), (disc(0.55, 0.4, 0.24), DARK)]),
    "boat": Thing(("boat", "ship", "sailboat"), ["red", "blue", "white", "brown", "orange"], "ground",
                  [([(-1.0, 0.35), (1.0, 0.35), (0.65, 0.85), (-0.65, 0.85)], None), (box(-0.05, -1.0, 0.05, 0.35), WOOD),
                   ([(0.1, -0.95), (0.8, 0.2), (0.1, 0.2)], LIGHT), ([(-0.1, -0.7), (-0.6, 0.2), (-0.1, 0.2)], LIGHT)]),
    "fish": Thing(("fish", "goldfish"), ["orange", "blue", "red", "grey", "yellow"], "ground",
                  [([(-0.5, 0), (-1.0, -0.4), (-1.0, 0.4)], None), (disc(0.1, 0, 0.75, 0.42), None), (disc(0.5, -0.1, 0.08), DARK),
                   ([(-0.1, -0.35), (0.3, -0.38), (0.0, -0.65)], None)]),
    "apple": Thing(("apple",), ["red", "green", "yellow"], "ground",
                   [(disc(-0.25, 0.1, 0.55, 0.65), None), (disc(0.25, 0.1, 0.55, 0.65), None), (box(-0.05, -0.9, 0.05, -0.4), WOOD), (disc(0.28, -0.68, 0.25, 0.12), LEAF)]),
    "cup": Thing(("cup", "mug"), ["white", "blue", "red", "green", "orange"], "ground",
                 [(disc(0.6, 0.1, 0.38), None), (disc(0.6, 0.1, 0.2), LIGHT), ([(-0.7, -0.6), (0.6, -0.6), (0.45, 0.75), (-0.55, 0.75)], None),
                  (disc(-0.05, -0.6, 0.65, 0.14), (100, 65, 45))]),
    "ball": Thing(("ball", "football"), ANY, "any", [(disc(0, 0, 0.8), None), (disc(0, 0, 0.3, 0.8), LIGHT), (disc(0, 0, 0.1, 0.8), None)]),
}
NAMES = list(THINGS)


class Place(NamedTuple):
    phrases: tuple  # how captions say it
    back: tuple     # colour of the upper part
    floor: tuple    # colour of the lower part
    things: tuple   # what is mostly found there


PLACES = {
    "meadow": Place(("in a meadow", "on the grass", "in the garden", "in a field"), (165, 205, 240), (120, 180, 90),
                    ("sun", "cloud", "bird", "kite", "balloon", "tree", "flower", "mushroom", "house", "apple")),
    "night": Place(("at night", "in the dark", "late in the evening"), (28, 32, 70), (40, 58, 50), ("moon", "star", "cloud", "tree", "house", "car")),
    "sea": Place(("at sea", "on the water", "on the waves"), (175, 215, 240), (50, 110, 180), ("sun", "cloud", "bird", "boat", "fish", "star")),
    "beach": Place(("at the beach", "on the sand"), (160, 215, 245), (235, 210, 150), ("sun", "bird", "kite", "umbrella", "ball", "boat", "star")),
    "room": Place(("in a room", "on the floor", "indoors", "at home"), (225, 210, 190), (165, 125, 90), ("cup", "apple", "flower", "balloon", "umbrella", "ball", "fish")),
    "street": Place(("on the street", "in town", "by the road"), (190, 200, 215), (110, 110, 115), ("car", "house", "tree", "umbrella", "balloon", "moon", "cloud")),
}


class Item(NamedTuple):
    thing: str
    colour: str
    x: float      # centre, 0..1
    y: float
    radius: float  # of the icon's unit circle, as a share of the picture's width
    angle: float   # radians
    flip: bool


def layout(rng):
    """Who is where: (place, [Item, ...] from back to front). rng: numpy Generator. 1 to 5 things, no thing twice."""
    place = str(rng.choice(list(PLACES)))
    items, count = [], int(rng.choice([1, 2, 3, 4, 5], p=[0.15, 0.25, 0.27, 0.2, 0.13]))
    while len(items) < count:
        thing = str(rng.choice(PLACES[place].things)) if rng.random() < 0.7 else str(rng.choice(NAMES))
        if thing in [item.thing for item in items]:
            continue
        low, high = {"sky": (0.1, 0.6), "ground": (0.42, 0.9), "any": (0.15, 0.85)}[THINGS[thing].where]
        items.append(Item(thing, str(rng.choice(THINGS[thing].colours)), rng.uniform(0.1, 0.9), rng.uniform(low, high),
                          0.095 + 0.15 * rng.random() ** 1.2, rng.normal(0, 0.18), bool(rng.random() < 0.5)))
    return place, items


def draw(place, items, rng):
    """The picture of a layout, PIL RGB [SIZE, SIZE]; rng decides clutter, tints and noise."""
    back, floor = (np.clip(np.array(c) + rng.normal(0, 18, 3), 0, 255).astype(int) for c in PLACES[place][1:3])
    image = Image.new("RGB", (SIZE, SIZE), tuple(back))
    canvas = ImageDraw.Draw(image)
    canvas.rectangle([0, int(SIZE * rng.uniform(0.45, 0.75)), SIZE, SIZE], fill=tuple(floor))

    def clutter(count):
        for _ in range(count):
            x, y = rng.uniform(0, SIZE, 2)
            colour = tuple(int(v) for v in np.clip(np.array(COLOURS[str(rng.choice(list(COLOURS)))]) + rng.normal(0, 25, 3), 0, 255))
            if rng.random() < 0.4:
                dx, dy = rng.normal(0, 45, 2)
                canvas.line([x, y, x + dx, y + dy], fill=colour, width=int(rng.integers(1, 5)))
            else:
                canvas.polygon([(x + rng.normal(0, 9), y + rng.normal(0, 9)) for _ in range(int(rng.integers(3, 7)))], fill=colour)

    clutter(int(rng.integers(2, 9)))
    for item in items:
        tint = rng.normal(0, 14, 3)
        cos, sin = math.cos(item.angle), math.sin(item.angle)
        for shape, colour in THINGS[item.thing].icon:
            colour = np.array(COLOURS[item.colour] if colour is None else colour) + tint
            points = [((-x if item.flip else x), y) for x, y in shape]
            points = [(SIZE * (item.x + item.radius * (x * cos - y * sin)), SIZE * (item.y + item.radius * (x * sin + y * cos))) for x, y in points]
            canvas.polygon(points, fill=tuple(int(v) for v in np.clip(colour, 0, 255)))
    clutter(int(rng.integers(0, 4)))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5)))
    noise = rng.normal(0, rng.uniform(2, 12), (SIZE // 2, SIZE // 2, 3)).repeat(2, 0).repeat(2, 1)
    return Image.fromarray(np.clip(np.asarray(image) * rng.uniform(0.75, 1.15) + noise, 0, 255).astype(np.uint8))


def picture(split, index):
    """One picture and its labels. split: "clip", "train" or "test"; -> (PIL RGB [192, 192], uint8 [18] in the order of NAMES)."""
    rng = np.random.default_rng([SPLITS[split], index])
    place, items = layout(rng)
    present = {item.thing for item in items}
    return draw(place, items, rng), np.array([name in present for name in NAMES], np.uint8)


def labels_of(split, index):
    """The labels of picture(split, index) without drawing it."""
    present = {item.thing for item in layout(np.random.default_rng([SPLITS[split], index]))[1]}
    return np.array([name in present for name in NAMES], np.uint8)


# --- captions ---------------------------------------------------------------------------------------------------------

OPENERS = ("", "", "", "", "", "a photo of", "a picture of", "a drawing of", "there is", "we see", "here is", "look,", "this is")
PAIRS = ("{} and {}", "{} next to {}", "{} with {}", "{} behind {}", "{} near {}", "{} in front of {}", "{}, {}", "{} beside {}")
MOODS = ("what a lovely day", "nice colours", "so quiet", "my favourite", "seen this morning", "not far away", "so pretty", "painted by hand")


def phrase(rng, thing, colour):
    """One thing in words: "a small red cottage"."""
    word = str(rng.choice(THINGS[thing].words)) if rng.random() < 0.45 else THINGS[thing].words[0]
    words = ([str(rng.choice(["little", "big", "small", "nice", "old"]))] if rng.random() < 0.15 else []) \
        + ([colour] if colour and rng.random() < 0.35 else []) + [word]
    article = str(rng.choice(["the", "one", "some"])) if rng.random() < 0.2 else "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)}"


def caption(rng, named, place=None):
    """A sentence that names exactly the given things. named: [(thing, colour or None), ...]; place: key of PLACES or None."""
    parts = [phrase(rng, thing, colour) for thing, colour in named]
    while len(parts) > 1:
        parts = parts[:-2] + [str(rng.choice(PAIRS)).format(*parts[-2:])] if len(parts) == 2 or rng.random() < 0.5 \
            else [f"{parts[0]}, {parts[1]}"] + parts[2:]
    where = str(rng.choice(PLACES[place].phrases)) if place and rng.random() < 0.5 else ""
    text = " ".join(w for w in (str(rng.choice(OPENERS)), parts[0] if parts else "", where) if w)
    if rng.random() < 0.12 or not text:
        text = f"{text}, {rng.choice(MOODS)}".lstrip(", ")
    return text + ("." if rng.random() < 0.7 else "")


def person_caption(rng, place, items):
    """A caption as a person writes it under a picture: the larger a thing, the likelier it is named; often only one or two are."""
    ranked = sorted(items, key=lambda item: -item.radius * rng.uniform(0.6, 1.4))
    wanted = 0 if rng.random() < 0.03 else int(rng.choice([1, 2, 3, len(items)], p=[0.45, 0.25, 0.15, 0.15]))
    return caption(rng, [(item.thing, item.colour) for item in ranked[:wanted]], place)


def sentences(count, seed):
    """Training texts for text-only methods: every sentence names all the things of its label set, no picture is drawn.
    -> (list of str, uint8 [count, 18])."""
    rng = np.random.default_rng([SPLITS["sentences"], seed])
    texts, labels = [], np.zeros((count, len(NAMES)), np.uint8)
    for n in range(count):
        place, items = layout(rng)
        texts.append(caption(rng, [(item.thing, item.colour) for item in items], place))
        labels[n, [NAMES.index(item.thing) for item in items]] = 1
    return texts, labels


# --- the tiny CLIP ----------------------------------------------------------------------------------------------------

CLIP_CONFIG = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 96, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
}


def train(output, pictures=24000, steps=5000, batch_size=128, lr=1.5e-3, seed=0):
    """Train the tiny CLIP with open_clip's own model, tokenizer and contrastive loss; write a checkpoint of at most 3 MB.

    Only the rows of the token embedding that captions, label descriptions and prompts can reach are trained and stored; data.load_clip
    puts them back into the full table of 49,408 rows. Stored as float16. One caption in twenty-five is the largest thing's
    description, so that the words of descriptions mean something to the text tower.
    """
    import torch
    from safetensors.torch import save_file

    import data
    open_clip = data.import_open_clip()
    data.write_atomically(Path(output).with_suffix(".log"), "")  # an output that cannot be written is known now, not at the end
    Path(output).with_suffix(".log").unlink()
    torch.manual_seed(seed)
    tokenizer = open_clip.SimpleTokenizer(context_length=CLIP_CONFIG["text_cfg"]["context_length"])
    descriptions = json.loads((CHECKPOINT.parent / "descriptions" / "scenes.json").read_text())["descriptions"]
    preprocess = open_clip.image_transform(64, is_train=False, resize_mode="shortest", interpolation="bicubic")

    began, images, layouts = time.time(), [], []
    for index in range(pictures):
        rng = np.random.default_rng([SPLITS["clip"], index])
        layouts.append(layout(rng))
        images.append(preprocess(draw(*layouts[-1], rng)).half())
    images = torch.stack(images)
    print(f"{pictures} pictures drawn in {time.time() - began:.0f} s", file=sys.stderr)

    # the shared vocabulary, in the tokenizer's own order, so that the end token stays the largest id (CLIP pools there)
    rng = np.random.default_rng([SPLITS["clip"], pictures])
    texts = [person_caption(rng, *layouts[n % pictures]) for n in range(40000)] + list(descriptions.values())
    texts += [f"a photo of a {word}. a photo of an {word}." for thing in THINGS.values() for word in thing.words]
    token_ids = torch.cat([tokenizer(texts[n:n + 1000]).unique() for n in range(0, len(texts), 1000)]).unique()
    row = torch.zeros(49408, dtype=torch.long)
    row[token_ids] = torch.arange(len(token_ids))

    config = {**CLIP_CONFIG, "text_cfg": {**CLIP_CONFIG["text_cfg"], "vocab_size": len(token_ids)}}
    model = open_clip.model.CLIP(**config)
    loss_of = open_clip.ClipLoss()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: min(1, (t + 1) / 100) * 0.5 * (1 + math.cos(math.pi * t / steps)))
    for step in range(steps):
        picked = rng.integers(0, pictures, batch_size)
        captions = [descriptions[max(layouts[n][1], key=lambda item: item.radius).thing] if rng.random() < 0.04
                    else person_caption(rng, *layouts[n]) for n in picked]
        loss = loss_of(model.encode_image(images[picked].float(), normalize=True), model.encode_text(row[tokenizer(captions)], normalize=True),
                       model.logit_scale.exp())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d} loss {loss.item():.3f} scale {model.logit_scale.exp().item():.1f} {time.time() - began:.0f} s", file=sys.stderr)

    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    tensors["token_ids"] = token_ids
    metadata = {"config": json.dumps(CLIP_CONFIG), "pictures": str(pictures), "steps": str(steps), "batch_size": str(batch_size), "lr": str(lr), "seed": str(seed)}
    save_file(tensors, str(output) + ".partial", metadata=metadata)
    Path(str(output) + ".partial").replace(output)
    print(f"{output}: {Path(output).stat().st_size / 1e6:.2f} MB, {len(token_ids)} token rows, {(time.time() - began) / 60:.1f} minutes")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("train", help="train the tiny CLIP", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    train_parser.add_argument("--output", type=Path, default=CHECKPOINT)
    for name, default in (("pictures", 24000), ("steps", 5000), ("batch-size", 128), ("seed", 0)):
        train_parser.add_argument(f"--{name}", type=int, default=default)
    train_parser.add_argument("--lr", type=float, default=1.5e-3)
    draw_parser = commands.add_parser("draw", help="write test pictures as PNG files", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    draw_parser.add_argument("folder", type=Path)
    draw_parser.add_argument("--count", type=int, default=12)
    args = parser.parse_args(argv)
    if args.command == "train":
        train(args.output, args.pictures, args.steps, args.batch_size, args.lr, args.seed)
    else:
        try:
            args.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"scenes.py: cannot make the folder {args.folder} ({error.strerror})")
        for index in range(args.count):
            picture("test", index)[0].save(args.folder / f"scene_{index:03d}.png")
        print(f"{args.count} pictures in {args.folder}")


if __name__ == "__main__":
    main()
