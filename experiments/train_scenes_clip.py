"""Train the toy CLIP of scenes, with open_clip's own model, tokenizer and contrastive loss.

    python experiments/train_scenes_clip.py     about 15 minutes on two cores, writes assets/scenes_clip.safetensors

The shipped weights were made like this (seed 0), and everything measured on scenes depends on them: write others
elsewhere (--output) and try them with --pretrained FILE. They are float16 and few, because only those rows of the token
embedding are trained and stored that captions, label descriptions and prompts can reach; embed.load_clip puts them back
into the full table of 49,408 rows. One caption in twenty-five is the description of the largest thing, so that the
words of descriptions mean something to the text tower.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import embed
import scenes
from data import say

DESCRIPTION_SHARE = 0.04


def draw_all(count, preprocess):
    """The "clip" pictures 0..count-1. -> (float16 [count, 3, 64, 64] as CLIP sees them, their layouts)"""
    images = []
    layouts = []
    for index in range(count):
        rng = np.random.default_rng([scenes.SPLITS["clip"], index])
        layouts.append(scenes.layout(rng))
        images.append(preprocess(scenes.draw(*layouts[-1], rng)).half())
    return torch.stack(images), layouts


def reachable_tokens(tokenizer, captions, descriptions):
    """Ids of the tokens in captions, descriptions and prompts, in the tokenizer's own order, so that the end token, at
    which CLIP reads a text's features, keeps the largest id. No token spans two words. -> int64 [K]"""
    words = {word for text in [*captions, *descriptions.values(), "a photo of an"] for word in text.split()}
    for thing in scenes.THINGS.values():
        for name in thing.words:
            words |= set(f"{name}.".split())
    return tokenizer(sorted(words)).unique()


def caption_of(rng, layout, descriptions):
    """A caption of a picture, now and then the description of its largest thing"""
    if rng.random() >= DESCRIPTION_SHARE:
        return scenes.person_caption(rng, *layout)
    _, items = layout
    largest = max(items, key=lambda item: item.radius)
    return descriptions[largest.thing]


def train(options):
    """Train and write the checkpoint. Its arithmetic and its random streams are frozen."""
    began = time.time()
    open_clip = embed.import_open_clip()
    pictures = options.pictures
    probe = options.output.with_name(f"{options.output.name}.partial")
    data.write_atomically(probe, "")  # an output that cannot be written is known now, not at the end
    probe.unlink()
    torch.manual_seed(options.seed)
    text_config = scenes.CLIP_CONFIG["text_cfg"]
    tokenizer = open_clip.SimpleTokenizer(context_length=text_config["context_length"])
    descriptions = data.descriptions_of("scenes", scenes.NAMES)
    preprocess = open_clip.image_transform(64, is_train=False, resize_mode="shortest", interpolation="bicubic")
    images, layouts = draw_all(pictures, preprocess)
    say(f"{pictures} pictures drawn in {time.time() - began:.0f} s")

    rng = np.random.default_rng([scenes.SPLITS["clip"], pictures])
    captions = [scenes.person_caption(rng, *layouts[number % pictures]) for number in range(40000)]
    token_ids = reachable_tokens(tokenizer, captions, descriptions)
    row_of_token = torch.zeros(text_config["vocab_size"], dtype=torch.long)
    row_of_token[token_ids] = torch.arange(len(token_ids))

    smaller = {**text_config, "vocab_size": len(token_ids)}
    model = open_clip.model.CLIP(**{**scenes.CLIP_CONFIG, "text_cfg": smaller})
    loss_of = open_clip.ClipLoss()
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)

    def share(step):
        """Share of the peak learning rate: warm-up, then cosine"""
        return min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
    for step in range(options.steps):
        picked = rng.integers(0, pictures, options.batch_size)
        texts = [caption_of(rng, layouts[number], descriptions) for number in picked]
        image_features = model.encode_image(images[picked].float(), normalize=True)
        text_features = model.encode_text(row_of_token[tokenizer(texts)], normalize=True)
        loss = loss_of(image_features, text_features, model.logit_scale.exp())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 50 == 0:
            say(f"step {step:5d} loss {loss.item():.3f} scale {model.logit_scale.exp().item():.1f} "
                f"{time.time() - began:.0f} s")

    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {name: str(value) for name, value in vars(options).items() if name != "output"}
    metadata["config"] = json.dumps(scenes.CLIP_CONFIG)
    content = safetensors.torch.save({**tensors, "token_ids": token_ids}, metadata)
    data.write_atomically(options.output, content)
    print(f"{options.output}: {len(content) / 1e6:.2f} MB, {len(token_ids)} token rows, "
          f"{(time.time() - began) / 60:.1f} minutes")


def main():
    parser = argparse.ArgumentParser(description="Train the toy CLIP of scenes; the defaults made the shipped one.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=scenes.CHECKPOINT, help="file to write")
    for name, default in (("pictures", 24000), ("steps", 5000), ("batch-size", 128), ("seed", 0), ("lr", 1.5e-3)):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=" ")
    try:
        train(parser.parse_args())
    except data.UsageError as error:
        say(f"train_scenes_clip.py: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
