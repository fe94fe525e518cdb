"""SSPA, "Split-and-Synthesize Prompting with Gated Alignments for Multi-Label Image Recognition" (arXiv 2407.20920), in one file.

One sentence a label from a language model says what it looks like and what it is found with; learnable prompts are filtered by the image; a
quaternion network fuses both with the global image feature; labels and regions attend to each other through gates; all regions count in
the end. CLIP's text encoder is frozen, its image encoder tuned or frozen. Shapes: B images, C labels, M regions (patch tokens), d joint CLIP
width, L context vectors, P prompt sets.

The method, part by part, in the paper's order                          where
    images -> x0 [B, d], X [B, M, d]                                    image_features
    # SSPA: CAP and global prompts   [P, L, width] -> [P, C, d]         encode_prompts_reference, encode_prompts_fused
    # SSPA: KAP   sentences -> T_ka [C, d]                              knowledge_texts; data.embed_texts
    # SSPA: DSF   E_ca [C, d], X -> T_ca [B, C, d]                      dynamic_semantic_filtering (plain)
    # SSPA: QSM   T_ka, T_ca, x0 -> T_uf [B, C, d]                      quaternion_linear_*, quaternion_init; SSPA.split_and_synthesize
    # SSPA: GDMA  T_uf, X -> T_fn [B, C, d], X_fn [B, M, d]             gated_alignment_*
    # SSPA: soft aggregator   T_fn, X_fn -> s_R [B, C]                  soft_aggregate_*; with its loss: soft_aggregate_loss_*
    # SSPA: losses                                                      asymmetric_loss_*; SSPA.forward
    # SSPA: prediction                                                  branch_scores

    python sspa.py --tune-image none --seed 0 1 2                       7 minutes on two cores: mAP 69.06 ± 0.06 on the scenes, zero-shot 60.90
    python sspa.py --dataset voc2007 --gpu 0                            needs the photos and open_clip's weights
    python sspa.py --checkpoint runs/sspa/scenes/checkpoint.safetensors --explain PHOTO     seconds: where each label was seen

What the abstract and the method figure fix: which parts there are, what flows between them, that the text encoder is frozen. The full text was
not at hand. Everything below is ours or taken from the field; a flag changes it, save where it says that none does:

    D1  --context-length 4 --context-init words    context vectors a prompt set, shared by all labels (drawn as 4 in the figure; their number
                                   [choice]); they start as "a photo of a"                                                          [choice]
    D2  image_features             ViT: patch tokens through the final norm and projection [author]; ResNet: the attention pool asked at every
                                   position ([field]: DenseCLIP); no flag                                                           [choice]
    D3  --knowledge-order          "{description} A photo of a {class}.": the description first                                     [choice]
    D4  --attention-scale 10       DSF and GDMA take softmax(scale * q k) of unit features, scale learned; 0: 1 / sqrt(d), nearly flat [choice]
    D5  --projection-init identity their projections start as the identity, single head (no flag for more), no bias but DSF's       [choice]
    D6  --quaternion-layers 2 --quaternion-hidden 1 --quaternion-activation relu --quaternion-axes kcg --quaternion-readout concat
                                   Q = 0 + T_ka i + T_ca j + x0 k: three axes [figure], zero real part [field], this order; a mapping and
                                   a layer, ReLU on each component apart, width d a component, the last layer's components of d / 4
                                   concatenated                                                                                     [choice]
    D7  gated_alignment_*          g = sigmoid(W_q q + W_a a + b) for every channel, q + g a; the gate starts half open (matrices uniform
                                   in +-1/sqrt(d), b = 0); --no-gate leaves it out                                                  [choice]
    D8  --temperature 0.1          of the soft aggregator, in units of the cosine, fixed; its form [field]                          [choice]
    D9  --scale 20 --prior 0.1     each branch's logit is scale * cosine + bias, learned; the bias starts where the sigmoid of the
                                   mean logit of the first 64 photos is 0.1                                                         [choice]
    D10 --gamma-neg 2 --gamma-pos 0 --clip 0 --regional-weight 1    asymmetric loss with these exponents on both branches, their mean as the
                                   prediction [author]; differentiated through its weights, summed over labels, averaged over the batch;
                                   sigmoid scores [choice]
    D11 --lr 5e-5 --image-lr-factor 0.1 --weight-decay 1e-4 --ema 0.9997    AdamW, averaged weights [author]; --prompt-lr 1e-3, cosine to 0 after
                                   --warm-up 0.05 of the steps, warm-up of the average min(0.9997, (1 + t) / (10 + t)), one weight decay for
                                   all tensors, learned scales and biases at --lr; on scenes --lr 6e-3                              [choice]
    D12 --epochs 20 --batch-size 64    what does not fill a batch waits for the next epoch's order                                  [choice]
    D13 --tune-image full --crop-scale 0.5    the figure shows no lock on the image encoder; BatchNorm statistics stay CLIP's; random resized
                                   crops (aspect 3/4 to 4/3) and flips of every second photo only then; frozen region features are kept in
                                   half precision                                                                                   [choice]
    D14 unit length                x0, X, T_ka, E_ca, T_ca and T_uf are normalised before DSF, QSM and GDMA; no flag                [choice]

Plain in both implementations, because nothing was gained: DSF (its prompts are projected once a batch as it is), the quaternion layers after the
first (all four components vary with image and label), KAP (computed once), the global branch (one product).

>>> import torch, sspa
>>> label_features, region_features = torch.eye(3)[None], torch.eye(3)[None]
>>> sspa.soft_aggregate_fused(label_features, region_features, temperature=0.1, scale=20.0).shape
torch.Size([1, 3])
"""
import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn
from tqdm import tqdm

import data
import metrics
from data import UsageError, say


def option(default, text, **extra):
    return dataclasses.field(default=default, metadata={"help": text, **extra})


@dataclass
class Config:
    # data
    dataset: str = option("scenes", "labelled photos, training and test", choices=data.DATASETS)
    data_root: str = option("data", "folder that holds the datasets")
    download: bool = option(False, "fetch voc2007 (870 MB) into --data-root if it is not there")
    difficult: str = option("ignore", "voc2007: labels seen only on difficult objects become", choices=("ignore", "negative", "positive"))
    unlabelled: str = option("keep", "coco2014, nuswide: photos without any label", choices=("keep", "drop"))
    validation: str = option("train", "pa100k, peta, mlrsnet: validation photos join training, or are dropped", choices=("train", "drop"))
    partition: int = option(0, "rapv1, peta: which of the owners' five partitions", choices=(0, 1, 2, 3, 4))
    split_seed: int = option(0, "mlrsnet, ucm, folder: draws the split where none is published")
    labels: str = option(None, "label file, one name a line: only these of the dataset's labels (default: all)", metavar="FILE")
    descriptions: str = option(None, 'JSON {"descriptions": {label: sentence}} (default: assets/descriptions/<dataset>.json)', metavar="FILE")
    limit: int = option(None, "only the first N training and test photos", metavar="N")
    # CLIP
    backbone: str = option(None, "open_clip name, or scenes (default: scenes for scenes, else ViT-B-16)")
    pretrained: str = option(None, "open_clip tag, a file, or none for random weights (default: openai)")
    resolution: int = option(None, "pixels (default: the backbone's own); position embeddings are interpolated")
    precision: str = option(None, "of the CLIP towers and the head; losses are always fp32 (default: bf16 on a GPU, fp32 on the CPU)", choices=("fp32", "bf16", "fp16"))
    tune_image: str = option(None, "image tower: full, trained at --image-lr-factor; none, frozen and its features cached (default: full [figure]; none with --ablate)", choices=("none", "full"))
    # the method
    context_length: int = option(4, "[figure: 4 drawn; choice D1] learnable context vectors a prompt set")
    context_init: str = option("words", '[choice D1] "a photo of a", or drawn from N(0, 0.02^2)', choices=("words", "random"))
    no_descriptions: bool = option(False, "ablation: KAP reads the template alone")
    knowledge_order: str = option("description-first", "[choice D3] where the template stands in KAP's text", choices=("description-first", "template-first"))
    attention_scale: float = option(10.0, "[choice D4] softmax(scale * q k) of DSF and GDMA, learned, this at the start; 0: fixed 1 / sqrt(d)")
    projection_init: str = option("identity", "[choice D5] of the q, k, v projections of DSF and GDMA", choices=("identity", "uniform"))
    no_dsf: bool = option(False, "ablation: the prompts are not filtered by the image")
    fusion: str = option("qsm", "[figure] qsm; ablations: one prompt alone, sum, concat", choices=("qsm", "knowledge", "context", "sum", "concat"))
    quaternion_layers: int = option(2, "[choice D6] of QSM, the mapping among them")
    quaternion_hidden: float = option(1.0, "[choice D6] width of a component in units of d")
    quaternion_activation: str = option("relu", "[choice D6] on every component apart", choices=("relu", "gelu", "tanh"))
    quaternion_axes: str = option("kcg", "[choice D6] which of knowledge, context, global image feature lies on i, j, k", choices=("kcg", "kgc", "ckg", "cgk", "gkc", "gck"))
    quaternion_readout: str = option("concat", "[choice D6] the last layer emits four components of d / 4, concatenated, or of d, averaged", choices=("concat", "mean"))
    alignment: str = option("both", "[figure] directions of GDMA; the others are ablations", choices=("both", "v-to-s", "s-to-v", "none"))
    no_gate: bool = option(False, "ablation: GDMA adds its attention output ungated")
    aggregator: str = option("soft", "[paper] soft; ablations: mean, max over the regions", choices=("soft", "mean", "max"))
    temperature: float = option(0.1, "[choice D8] of the soft aggregator, in units of the cosine")
    branches: str = option("both", "[figure] both; one alone is an ablation", choices=("both", "global", "regional"))
    scale: float = option(20.0, "[choice D9] both branches' logits are scale * cosine + bias, learned; this at the start")
    prior: float = option(0.1, "[choice D9] sigmoid of the mean logit at the start, which sets the biases")
    gamma_neg: float = option(2.0, "[author D10] focusing exponent of absent labels")
    gamma_pos: float = option(0.0, "[author D10] focusing exponent of present labels")
    clip: float = option(0.0, "[author D10] probability subtracted from absent labels")
    regional_weight: float = option(1.0, "[author D10] lambda of L = L_G + lambda L_R")
    lr: float = option(None, "AdamW, cosine to 0 (default: 5e-5 [author D11]; on scenes 6e-3, for a short training [choice])")
    prompt_lr: float = option(1e-3, "[choice D11] of the context vectors")
    image_lr_factor: float = option(0.1, "[author D11] times --lr, for a tuned image tower")
    weight_decay: float = option(1e-4, "[author D11] of AdamW")
    warm_up: float = option(0.05, "[choice D11] share of the steps in which the learning rate rises")
    ema: float = option(0.9997, "[author D11] largest decay of the averaged weights, which are the ones evaluated; 0: none")
    epochs: int = option(20, "[choice D12] passes over the training photos")
    batch_size: int = option(64, "[choice D12] photos an optimiser step, over all processes")
    accumulate: int = option(1, "parts that a batch is worked off in: less memory, the same result")
    crop_scale: float = option(0.5, "[choice D13] smallest share of the area in random crops, with a tuned image tower")
    seed: tuple = option((0,), "one or more, one after the other", nargs="+", type=int)
    ablate: tuple = option(None, "also run the ablations (all, or those named) for every seed", nargs="*", metavar="NAME")
    impl: str = option("fused", "fast paths, or the plain formulas", choices=("fused", "reference"))
    # running
    gpu: int = option(None, "GPU number (default: 0 if there is one)", metavar="N")
    cpu: bool = option(False, "run on the CPU")
    workers: int = option(2, "threads that decode photos")
    cache: str = option("runs/cache", "folder of cached features")
    cache_limit: float = option(4.0, "GiB of frozen region features kept in memory and in --cache; beyond it photos are encoded anew in every epoch")
    output: str = option(None, "folder of results (default: runs/sspa/<dataset>)", metavar="DIR")
    overwrite: bool = option(False, "redo a finished run")
    eval_only: bool = option(False, "score --checkpoint on the test photos, train nothing")
    checkpoint: str = option(None, "weights to use instead of training", metavar="FILE")
    predict: tuple = option(None, "photos or folders to tag: one JSON line a photo on stdout, and a contact sheet", nargs="+", metavar="PATH")
    explain: tuple = option(None, "photos or folders: where the strongest labels were seen, one picture a photo", nargs="+", metavar="PATH")
    threshold: float = option(0.5, "a label becomes a tag from this score on")
    top_k: int = option(None, "the K strongest labels become tags, instead of --threshold", metavar="K")
    quiet: bool = option(False, "no progress bar")


# the abstract's "further analyses" as flags; every one changes the settings of the full method in one place
ABLATIONS = {
    "knowledge prompts only": {"fusion": "knowledge"}, "context prompts only": {"fusion": "context"}, "prompts summed": {"fusion": "sum"},
    "prompts concatenated": {"fusion": "concat"}, "no DSF": {"no_dsf": True}, "no gate": {"no_gate": True}, "V-to-S only": {"alignment": "v-to-s"},
    "S-to-V only": {"alignment": "s-to-v"}, "no GDMA": {"alignment": "none"}, "mean aggregator": {"aggregator": "mean"}, "max aggregator": {"aggregator": "max"},
    "global branch only": {"branches": "global"}, "regional branch only": {"branches": "regional"}, "no LLM description": {"no_descriptions": True},
}
# which settings may differ when a finished run is asked for again: they change what is learnt and scored by rounding at most
RUNNING_SETTINGS = ("download", "gpu", "cpu", "workers", "cache", "cache_limit", "output", "overwrite", "eval_only", "checkpoint", "predict", "explain", "threshold", "top_k", "quiet")
RESUME_SECONDS = float(os.environ.get("RESUME_SECONDS", 5))  # between saves (longer where saving is slow): what an interrupted training loses, beside the epoch it was in


def title(ablation):
    return "SSPA" if ablation == "none" else ablation


class Diverged(Exception):
    """The loss is no longer a number."""


# --- SSPA: image encoder ----------------------------------------------------------------------------------------------

def image_features(visual, images):
    """Global feature and region features of CLIP's image tower, both in the joint space.  [figure; projection of patches: author]

    images: [B, 3, H, W], normalised as CLIP wants them -> (x0 [B, d], X [B, M, d]), M the patches (ViT) or the cells of the last feature map (ResNet).
    ViT: every patch token through the final norm and projection. ResNet: the attention pool, asked at every position and not only at
    the mean [field: DenseCLIP]. x0 is what open_clip's encode_image gives.
    """
    if hasattr(visual, "attnpool"):
        pool = visual.attnpool
        maps = visual.forward_intermediates(images, indices=1, intermediates_only=True)["image_intermediates"][-1]
        x = maps.flatten(2).mT                                                                    # [B, M, width]
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding.to(x.dtype)
        q, k, v = (p(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2) for p in (pool.q_proj, pool.k_proj, pool.v_proj))
        x = pool.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))       # [B, 1 + M, d]
        return x[:, 0], x[:, 1:]
    output = visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NLC")
    return output["image_features"], output["image_intermediates"][-1] @ visual.proj


# --- SSPA: prompts through the frozen text encoder (CAP and the global branch) ----------------------------------------

def encode_prompts_reference(model, contexts, tokens):
    """Text features of prompts whose words after the start token are learnable vectors, shared by all labels.  [figure]

    model: open_clip's CLIP, its text tower frozen; contexts: [..., L, width], any number of prompt sets; tokens: int [C, 77] of
    "X X X X {name}.", whose positions 1..L are replaced -> [..., C, d]. Every label runs through all 77 positions.
    """
    sets, length = contexts.reshape(-1, *contexts.shape[-2:]), contexts.shape[-2]                 # [P, L, width]
    words = model.token_embedding(tokens)                                                         # [C, 77, width]
    features = []
    for context in sets:
        x = torch.cat([words[:, :1], context.expand(len(tokens), -1, -1), words[:, 1 + length:]], 1) + model.positional_embedding
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        features.append(x[torch.arange(len(tokens)), tokens.argmax(-1)] @ model.text_projection)  # CLIP pools at the end token
    return torch.stack(features).reshape(*contexts.shape[:-2], len(tokens), -1)


def encode_prompts_fused(model, contexts, tokens):
    """Same as encode_prompts_reference. The text encoder is causal, so: positions after the longest prompt's end are not computed; start token
    and context are computed once a prompt set and the C labels attend to their keys and values; all prompt sets go in one pass; the
    last layer is finished at the end tokens alone. Tokens a set: 1 + L + C (longest - 1 - L) instead of 77 C."""
    sets, shared = contexts.reshape(-1, *contexts.shape[-2:]), 1 + contexts.shape[-2]
    count, classes, end = len(sets), len(tokens), tokens.argmax(-1)
    longest = int(end.max()) + 1
    start = model.token_embedding(tokens[:1, :1]).expand(count, -1, -1)
    prefix = torch.cat([start, sets], 1) + model.positional_embedding[:shared]                    # [P, 1 + L, width]
    own = model.token_embedding(tokens[:, shared:longest]) + model.positional_embedding[shared:longest]
    own = own.expand(count, -1, -1, -1).flatten(0, 1)                                             # [P C, own, width]
    mask = torch.ones(longest, longest, dtype=torch.bool, device=own.device).tril()
    rows = torch.arange(count * classes, device=own.device), (end - shared).repeat(count)
    blocks = list(model.transformer.resblocks)

    def heads(x, block):
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        return qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)            # q, k, v: [rows, heads, positions, width / heads]

    def finish(x, attended, block):
        x = x + block.ls_1(block.attn.out_proj(attended.transpose(-3, -2).flatten(-2)))
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    for number, block in enumerate(blocks):
        pq, pk, pv = heads(prefix, block)
        q, k, v = heads(own, block)
        k, v = (torch.cat([p[:, None].expand(-1, classes, -1, -1, -1).flatten(0, 1), o], 2) for p, o in ((pk, k), (pv, v)))
        if number == len(blocks) - 1:
            seen = mask[end.repeat(count)][:, None, None]                                         # [P C, 1, 1, longest]
            own = own[rows][:, None]
            own = finish(own, F.scaled_dot_product_attention(q[rows[0], :, rows[1]][:, :, None], k, v, seen), block)
        else:
            own = finish(own, F.scaled_dot_product_attention(q, k, v, mask[shared:]), block)
            prefix = finish(prefix, F.scaled_dot_product_attention(pq, pk, pv, is_causal=True), block)
    features = model.ln_final(own[:, 0]) @ model.text_projection                                  # [P C, d]
    return features.reshape(*contexts.shape[:-2], classes, -1)


# --- SSPA: KAP, DSF ---------------------------------------------------------------------------------------------------

def knowledge_texts(clip, names, descriptions, order):
    """What the frozen text encoder reads of each label: "{description} A photo of a {name}."  [figure; order: choice D3]

    descriptions: {name: sentence}; a label without one gets the template alone. A text past the encoder's context length loses the last
    words of its description, never the template; said once. -> list of C str
    """
    texts, shortened = [], []
    for name in names:
        template, words = f"A photo of a {name}.", descriptions.get(name, "").split()
        while True:
            parts = [" ".join(words), template] if order == "description-first" else [template, " ".join(words)]
            text = " ".join(part for part in parts if part)
            if not words or len(clip.tokenizer.encode(text)) + 2 <= clip.tokenizer.context_length:
                break
            words.pop()
        if words != descriptions.get(name, "").split():
            shortened.append(name)
        texts.append(text)
    if shortened:
        say(f"{len(shortened)} label descriptions shortened to {clip.tokenizer.context_length} tokens: {', '.join(shortened[:10])}")
    return texts


def dynamic_semantic_filtering(prompt_features, region_features, weight, bias, scale):
    """Prompts filtered by the image: every label gathers the regions that its prompt asks for.  [figure; scale: choice D4]

    A = softmax over M of scale * Linear(E_ca) X^T, T_ca = A X; the linear layer is on the text side only, key = value = X.
    prompt_features: [C, d]; region_features: [B, M, d]; weight: [d, d]; bias: [d]; scale: scalar -> (T_ca [B, C, d], A [B, C, M]).
    Plain in both implementations: the C projected prompts do not vary with the image, and nothing else is left to save.
    """
    attention = torch.softmax(scale * (prompt_features @ weight + bias) @ region_features.mT, -1)
    return attention @ region_features, attention


# --- SSPA: QSM --------------------------------------------------------------------------------------------------------

def quaternion_linear_reference(x, r_weight, i_weight, j_weight, k_weight, bias=None):
    """Quaternion linear layer: every input quaternion multiplied by a weight quaternion from the left (Hamilton product), summed.  [field: pytorch-qnn]

        y_r = x_r R - x_i I - x_j J - x_k K        y_i = x_r I + x_i R - x_j K + x_k J
        y_j = x_r J + x_i K + x_j R - x_k I        y_k = x_r K - x_i J + x_j I + x_k R

    x: [..., 4 n], blocks r, i, j, k; or its four components apart, each [..., n], broadcastable, None for zero; weights R, I, J, K: [n, m];
    bias: [4 m] -> [..., 4 m]
    """
    if not isinstance(x, torch.Tensor):
        like = next(part for part in x if part is not None)
        x = torch.cat(torch.broadcast_tensors(*(torch.zeros_like(like) if part is None else part for part in x)), -1)
    R, I, J, K = r_weight, i_weight, j_weight, k_weight
    hamilton = torch.cat([torch.cat(strip, 1) for strip in ((R, I, J, K), (-I, R, K, -J), (-J, -K, R, I), (-K, J, -I, R))])  # [4 n, 4 m]
    return x @ hamilton if bias is None else x @ hamilton + bias


def quaternion_linear_fused(x, r_weight, i_weight, j_weight, k_weight, bias=None):
    """Same as quaternion_linear_reference. Components given apart are multiplied apart, each by its own strip of the Hamilton block, and
    added by broadcasting: one that does not vary with the image costs C rows, one that does not vary with the label B rows, a zero one nothing."""
    if isinstance(x, torch.Tensor):
        return quaternion_linear_reference(x, r_weight, i_weight, j_weight, k_weight, bias)
    R, I, J, K, minus_I, minus_J, minus_K = r_weight, i_weight, j_weight, k_weight, -i_weight, -j_weight, -k_weight
    strips = ((R, I, J, K), (minus_I, R, K, minus_J), (minus_J, minus_K, R, I), (minus_K, J, minus_I, R))
    parts = sorted(((part, torch.cat(strip, 1)) for part, strip in zip(x, strips) if part is not None), key=lambda pair: pair[0].numel())
    products = [part @ strip for part, strip in parts]
    if bias is not None:
        products[0] = products[0] + bias
    shape = torch.broadcast_shapes(*(product.shape for product in products))
    y = products.pop()
    y = y if y.shape == shape else y.expand(shape).clone()
    for product in products:
        y += product  # in place: a matrix product does not need its result for its gradient
    return y


def quaternion_init(fan_in, fan_out, generator):
    """Weights R, I, J, K [fan_in, fan_out] of a quaternion layer, fans counted in quaternions.  [field: pytorch-qnn]

    Modulus s * chi(4), phase uniform in (-pi, pi), imaginary axis uniform in the cube and normalised, s = 1 / sqrt(2 (fan_in + fan_out)).
    """
    shape = (fan_in, fan_out)
    modulus = torch.randn(4, *shape, generator=generator).norm(dim=0) / math.sqrt(2 * (fan_in + fan_out))
    phase = (2 * torch.rand(shape, generator=generator) - 1) * math.pi
    axis = F.normalize(2 * torch.rand(3, *shape, generator=generator) - 1, dim=0)
    return modulus * torch.cos(phase), *(modulus * torch.sin(phase) * axis)


# --- SSPA: GDMA -------------------------------------------------------------------------------------------------------

class GatedAttention(NamedTuple):
    """The weights of one direction; every matrix multiplies from the right."""
    query: torch.Tensor          # [d, d]
    key: torch.Tensor            # [d, d]
    value: torch.Tensor          # [d, d]
    scale: torch.Tensor          # scalar
    gate_query: torch.Tensor     # [d, d]; None: no gate
    gate_attended: torch.Tensor  # [d, d]
    gate_bias: torch.Tensor      # [d]


def _gated_attention_reference(x, context, w):
    attention = torch.softmax(w.scale * (x @ w.query) @ (context @ w.key).mT, -1)                 # [B, rows, context rows]
    a = attention @ (context @ w.value)
    if w.gate_query is None:
        return x + a, None
    gate = torch.sigmoid(x @ w.gate_query + a @ w.gate_attended + w.gate_bias)
    return x + gate * a, gate


def gated_alignment_reference(label_features, region_features, v_to_s=None, s_to_v=None):
    """Gated dual-modal alignment: labels attend to regions (V-to-S) and regions to labels (S-to-V), in parallel on the un-updated features;
    a gate lets through what is wanted of it.  [figure; formula of the gate: choice D7]

    One direction, query q, the other side k: a = softmax(scale * (q W_Q)(k W_K)^T) (k W_V), g = sigmoid(q G_q + a G_a + b) per channel, q + g a.
    label_features: [B, C, d]; region_features: [B, M, d]; v_to_s, s_to_v: GatedAttention, None leaves that side as it is
    -> (T_fn [B, C, d], X_fn [B, M, d], V-to-S gate [B, C, d] or None, S-to-V gate [B, M, d] or None)
    """
    labels, label_gate = _gated_attention_reference(label_features, region_features, v_to_s) if v_to_s else (label_features, None)
    regions, region_gate = _gated_attention_reference(region_features, label_features, s_to_v) if s_to_v else (region_features, None)
    return labels, regions, label_gate, region_gate


def _gated_attention_fused(x, context, w):
    n, m, d = x.shape[-2], context.shape[-2], x.shape[-1]
    # each product is done on the side with fewer rows: n d^2 or m d^2 multiplications
    scores = (x @ w.query @ w.key.mT) @ context.mT if n <= m else x @ (context @ w.key @ w.query.mT).mT
    attention = torch.softmax(w.scale * scores, -1)
    value = context @ w.value if n > m else None
    a = attention @ context @ w.value if n <= m else attention @ value
    if w.gate_query is None:
        return x + a, None
    attended = attention @ (value @ w.gate_attended) if n * d > m * (d + n) else a @ w.gate_attended  # the former only where n > m
    gate = torch.sigmoid(torch.addmm(w.gate_bias, x.flatten(0, -2), w.gate_query).view(x.shape) + attended)
    return torch.addcmul(x, gate, a), gate


def gated_alignment_fused(label_features, region_features, v_to_s=None, s_to_v=None):
    """Same as gated_alignment_reference. Projections wait for the side with fewer rows (associativity), so with fewer labels than regions only one
    d x d product a region is left of five: the gate's own."""
    labels, label_gate = _gated_attention_fused(label_features, region_features, v_to_s) if v_to_s else (label_features, None)
    regions, region_gate = _gated_attention_fused(region_features, label_features, s_to_v) if s_to_v else (region_features, None)
    return labels, regions, label_gate, region_gate


# --- SSPA: losses -----------------------------------------------------------------------------------------------------

def asymmetric_loss_reference(logits, targets, gamma_neg=2.0, gamma_pos=0.0, clip=0.0):
    """Asymmetric loss, differentiated through its weights too.  [exponents: author; the rest: choice D10]

    p = sigmoid(z), q = max(p - clip, 0);  present: -(1-p)^gamma+ log p;  absent: -q^gamma- log(1-q).
    logits: [..., B, C]; targets: same shape, 1, 0 or -1 -> scalar. Finite at z = +-1e4.
    """
    tiny = torch.finfo(logits.dtype).tiny  # keeps 0^(gamma-1) out of the backward pass; the log beside it is 0 there
    present = -torch.sigmoid(-logits).clamp_min(tiny) ** gamma_pos * F.logsigmoid(logits)
    q = (torch.sigmoid(logits) - clip).clamp_min(tiny)
    log_one_minus_q = torch.logaddexp(F.logsigmoid(-logits), logits.new_tensor(clip).log()).clamp_max(0)  # log(min(1-p+clip, 1))
    absent = -q ** gamma_neg * log_one_minus_q
    return torch.where(targets == 1, present, torch.where(targets == 0, absent, 0)).sum() / logits.shape[-2]


def _power(x, exponent):
    """x^exponent without pow where a product does it."""
    if exponent == 4:
        return torch.square(x).square_()
    return torch.ones_like(x) if exponent == 0 else x.clone() if exponent == 1 else torch.square(x) if exponent == 2 else torch.pow(x, exponent)


def _asymmetric_in_place(z, targets, gamma_neg, gamma_pos, clip):
    """Sum of the asymmetric loss; the contiguous z is overwritten by d loss / d z.

    Every entry is treated as absent, then the few present ones are written over: they are moved to -inf first, where an absent label
    costs nothing. One sigmoid, one log, no pow at the defaults.
    """
    index = targets.reshape(-1).nonzero()[:, 0]
    marks, moved = targets.reshape(-1)[index] == 1, z.view(-1)[index]
    z.view(-1)[index] = -math.inf
    p = torch.sigmoid(z)
    if clip == 0:
        log_one_minus_p = F.logsigmoid(z.neg_())
        weight = _power(p, gamma_neg)
        loss = -torch.dot(weight.view(-1), log_one_minus_p.view(-1))
        torch.sub(p, 1, out=z)                                         # d/dz = q^g (p - g (1-p) log(1-p))
        torch.addcmul(p, z, log_one_minus_p, value=gamma_neg, out=z).mul_(weight)
    else:
        q = (p - clip).clamp_min_(0)
        log_one_minus_q = torch.log1p(-q)                              # 1 - q >= clip: no overflow
        weight = _power(q, gamma_neg)
        loss = -torch.dot(weight.view(-1), log_one_minus_q.view(-1))
        slope = 1 / (1 - q) - gamma_neg * log_one_minus_q / q.clamp_min(torch.finfo(q.dtype).tiny)
        torch.mul(p, torch.sigmoid(z.neg_()), out=z).mul_(weight).mul_(slope).masked_fill_(q == 0, 0)
    log_p, one_minus_p = F.logsigmoid(moved), torch.sigmoid(-moved)
    weight = _power(one_minus_p, gamma_pos) * marks                    # ignored entries: 0
    z.view(-1)[index] = weight * (gamma_pos * torch.sigmoid(moved) * log_p - one_minus_p)
    return loss - (weight * log_p).sum()


class _AsymmetricLoss(torch.autograd.Function):
    BLOCK = 2 ** 17  # entries that stay in the processor's cache between the passes over them

    @staticmethod
    def forward(ctx, logits, targets, gamma_neg, gamma_pos, clip):
        slope = logits.detach().clone(memory_format=torch.contiguous_format)
        total = sum(_asymmetric_in_place(z, t, gamma_neg, gamma_pos, clip) for z, t in zip(
            slope.view(-1).split(_AsymmetricLoss.BLOCK), targets.reshape(-1).split(_AsymmetricLoss.BLOCK)))
        ctx.save_for_backward(slope.div_(logits.shape[-2]))
        return total / logits.shape[-2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None, None, None, None


def asymmetric_loss_fused(logits, targets, gamma_neg=2.0, gamma_pos=0.0, clip=0.0):
    """Same as asymmetric_loss_reference. Loss and gradient in one pass over cache-sized blocks; saved for backward: one tensor like logits."""
    return _AsymmetricLoss.apply(logits, targets, gamma_neg, gamma_pos, clip)


# --- SSPA: soft aggregator --------------------------------------------------------------------------------------------

def soft_aggregate_reference(label_features, region_features, temperature, scale):
    """A label's logit from all regions: those that resemble it more count more, and none is left out.  [idea: paper; form: field, DualCoOp, TaI-DPT]

    S = cos(label, region), s = scale * sum over M of softmax_M(S / temperature) * S.
    label_features: [B, C, d]; region_features: [B, M, d]; temperature: in units of the cosine, number or scalar tensor; scale: likewise -> [B, C]
    """
    S = F.normalize(label_features, dim=-1) @ F.normalize(region_features, dim=-1).mT              # [B, C, M]
    return scale * (torch.softmax(S / temperature, -1) * S).sum(-1)


def _inverse_norm(features):
    return 1 / features.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _aggregate_in_blocks(labels, regions, temperature, scale, needed, slope):
    """Blocks of samples, and of labels where there are many, so that what has the size of C x M stays in the processor's cache.

    With the weighted mean s' = sum_m p S:  d s / d S = scale * p * (1 + (S - s') / temperature),  d s / d temperature = -scale * var_p(S) / temperature^2.
    labels: [B, C, d]; regions: [B, M, d]; needed: whether labels, regions need a gradient; slope(rows, part, s' of that block [b, c]) -> d loss / d logits
    of the block, or None where no gradient is wanted -> gradients of labels, regions, temperature, scale, bias
    """
    (batch, classes, _), count = labels.shape, regions.shape[1]
    d_labels, d_regions = torch.empty_like(labels) if needed[0] else None, torch.empty_like(regions) if needed[1] else None
    d_temperature, d_scale, d_bias = (labels.new_zeros(()) for _ in range(3))
    step = max(1, _SoftAggregate.BLOCK // (classes * count))
    width = classes if step > 1 else max(1, _SoftAggregate.BLOCK // count)
    for at in range(0, batch, step):
        rows = slice(at, at + step)
        x, inverse_x = regions[rows], _inverse_norm(regions[rows]).mT                                       # [b, M, d], [b, 1, M]
        along_x = torch.zeros_like(inverse_x)
        if needed[1]:
            d_regions[rows] = 0
        for start in range(0, classes, width):
            part = slice(start, start + width)
            t, inverse_t = labels[rows, part], _inverse_norm(labels[rows, part])                            # [b, c, d], [b, c, 1]
            S = (t @ x.mT).mul_(inverse_t / temperature).mul_(inverse_x)                                    # cosines in units of the temperature
            p = torch.softmax(S, -1)
            weighted = p * S
            mean = weighted.sum(-1, keepdim=True)
            dz = slope(rows, part, mean[..., 0] * temperature)
            if dz is None:
                continue
            dz = dz[..., None]
            variance = torch.linalg.vecdot(weighted, S)[..., None] - mean ** 2
            d_bias += dz.sum()
            d_scale += (dz * mean).sum() * temperature
            dz = dz * scale                                                                                 # d loss / d s'
            d_temperature -= (dz * variance).sum()
            if not any(needed[:2]):
                continue
            dS = p.mul_(dz * (1 - mean)).addcmul_(weighted, dz)                                             # dz p (1 + S - mean)
            along_x += torch.linalg.vecdot(dS, S, dim=1)[:, None]                                           # sum over C of dS S
            dS.mul_(inverse_t).mul_(inverse_x)
            if needed[0]:  # through the norm: minus the part along the feature itself, whose length is the sum over M of dS S
                out = torch.mul(t, dz * (mean + variance) * -temperature * inverse_t ** 2, out=d_labels[rows, part])
                out.baddbmm_(dS, x)
            if needed[1]:
                d_regions[rows].baddbmm_(dS.mT, t)
        if needed[1]:
            d_regions[rows].addcmul_(x, (along_x * inverse_x ** 2).mT * temperature, value=-1)
    return d_labels, d_regions, d_temperature, d_scale, d_bias


class _SoftAggregate(torch.autograd.Function):
    """Without targets the logits [B, C]; with targets their asymmetric loss, whose gradients are made in the same pass."""
    BLOCK = 2 ** 19  # entries of S alive at once

    @staticmethod
    def forward(ctx, labels, regions, temperature, scale, bias, targets, exponents, with_gradient):
        batch, classes, _ = labels.shape
        temperature, scale, bias = (torch.as_tensor(v, dtype=labels.dtype, device=labels.device) for v in (temperature, scale, bias))
        ctx.needed = [with_gradient and need for need in ctx.needs_input_grad[:5]]
        if targets is None:
            z = torch.empty(batch, classes, dtype=labels.dtype, device=labels.device)

            def logits(rows, part, mean):
                z[rows, part] = mean * scale + bias
            _aggregate_in_blocks(labels, regions, temperature, scale, (False, False), logits)
            ctx.save_for_backward(labels, regions, temperature, scale)
            return z
        total = labels.new_zeros(())

        def loss(rows, part, mean):
            z = (mean * scale + bias).contiguous()
            total.add_(_asymmetric_in_place(z, targets[rows, part], *exponents))
            return z.div_(batch) if any(ctx.needed) else None
        gradients = _aggregate_in_blocks(labels, regions, temperature, scale, ctx.needed, loss)
        ctx.save_for_backward(*gradients)  # released before they are accumulated, so autograd takes them without a copy
        return total / batch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if grad.ndim == 0:  # of the loss: made already
            unit = grad.item() == 1
            return *(None if not need else g if unit else g * grad for g, need in zip(ctx.saved_tensors, ctx.needed)), None, None, None
        gradients = _aggregate_in_blocks(*ctx.saved_tensors, ctx.needed, lambda rows, part, _: grad[rows, part])
        return *(g if need else None for g, need in zip(gradients, ctx.needed)), None, None, None


def soft_aggregate_fused(label_features, region_features, temperature, scale):
    """Same as soft_aggregate_reference. Not materialised: normalised copies of the features, the softmax, its product with S and their gradients.
    Nothing of size C x M is kept: S is made again for the gradient, block by block."""
    return _SoftAggregate.apply(label_features, region_features, temperature, scale, 0.0, None, None, torch.is_grad_enabled())


def soft_aggregate_loss_reference(label_features, region_features, temperature, scale, bias, targets, gamma_neg=2.0, gamma_pos=0.0, clip=0.0):
    """Asymmetric loss of the regional branch's logits soft_aggregate + bias. targets: [B, C] of 1, 0, -1 -> scalar"""
    return asymmetric_loss_reference(soft_aggregate_reference(label_features, region_features, temperature, scale) + bias, targets, gamma_neg, gamma_pos, clip)


def soft_aggregate_loss_fused(label_features, region_features, temperature, scale, bias, targets, gamma_neg=2.0, gamma_pos=0.0, clip=0.0):
    """Same as soft_aggregate_loss_reference. A block at a time is multiplied out, turned into its loss and into its gradient, all in one pass."""
    return _SoftAggregate.apply(label_features, region_features, temperature, scale, bias, targets, (gamma_neg, gamma_pos, clip), torch.is_grad_enabled())


# --- SSPA: the whole --------------------------------------------------------------------------------------------------

class Prediction(NamedTuple):
    global_logits: torch.Tensor     # [B, C] or None
    regional_logits: torch.Tensor   # [B, C] or None
    similarity: torch.Tensor        # [B, C, M] cosine of labels and regions after GDMA, for --explain
    filtering: torch.Tensor         # [B, C, M] attention of DSF, None without it
    label_gate: torch.Tensor        # [B, C, d] V-to-S, None without it
    region_gate: torch.Tensor       # [B, M, d] S-to-V, None without it


class SSPA(nn.Module):
    """The learned parts and the frozen CLIP they stand on. Only parameters that learn have requires_grad."""

    def __init__(self, config, model, tokens, knowledge, words, seed):
        """model: open_clip's CLIP; tokens: [C, 77] of "X ... X {name}."; knowledge: T_ka [C, d]; words: [L, width] embeddings of "a photo of a", or None."""
        super().__init__()
        self.config, self.clip, self.fused = config, model, config.impl == "fused"
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("knowledge", F.normalize(knowledge, dim=-1), persistent=False)
        d, width, draw = knowledge.shape[1], model.token_embedding.weight.shape[1], torch.Generator().manual_seed(seed)
        regional = config.branches != "global"
        context_prompts = regional and config.fusion != "knowledge"

        def uniform(rows, columns=d):
            return nn.Parameter((2 * torch.rand(rows, columns, generator=draw) - 1) / math.sqrt(rows))  # PyTorch's own for linear layers

        def projection():
            return nn.Parameter(torch.eye(d)) if config.projection_init == "identity" else uniform(d)

        def attention_scale():
            return nn.Parameter(torch.tensor(math.log(config.attention_scale or d ** -0.5)), requires_grad=config.attention_scale > 0)

        sets = (config.branches != "regional") + context_prompts  # the global branch's prompts, CAP's
        drawn = 0.02 * torch.randn(sets, config.context_length, width, generator=draw)
        if words is not None:
            drawn[:, :len(words)] = words[:config.context_length]
        self.contexts = nn.Parameter(drawn, requires_grad=sets > 0)
        if context_prompts and not config.no_dsf:
            self.dsf_weight, self.dsf_bias, self.dsf_log_scale = projection(), nn.Parameter(torch.zeros(d)), attention_scale()
        if regional and config.fusion == "qsm":
            last = d // 4 if config.quaternion_readout == "concat" else d
            if config.quaternion_readout == "concat" and d % 4:
                raise UsageError(f"--quaternion-readout concat needs a width that 4 divides, not {d}; pass --quaternion-readout mean")
            hidden = max(1, round(config.quaternion_hidden * d))
            sizes = [d] + [hidden] * (config.quaternion_layers - 1) + [last]
            self.quaternions = nn.ModuleList(nn.ParameterDict({**dict(zip(("r_weight", "i_weight", "j_weight", "k_weight"), map(nn.Parameter, quaternion_init(n, m, draw)))),
                                                               "bias": nn.Parameter(torch.zeros(4 * m))}) for n, m in zip(sizes, sizes[1:]))
        if regional and config.fusion == "concat":
            self.concat_weight = uniform(2 * d)
        for name, wanted in (("v_to_s", ("both", "v-to-s")), ("s_to_v", ("both", "s-to-v"))):
            if regional and config.alignment in wanted:
                weights = {"query": projection(), "key": projection(), "value": projection(), "log_scale": attention_scale()}
                if not config.no_gate:
                    weights.update(gate_query=uniform(d), gate_attended=uniform(d), gate_bias=nn.Parameter(torch.zeros(d)))
                setattr(self, name, nn.ParameterDict(weights))
        for branch in ("global", "regional"):
            if config.branches in ("both", branch):
                self.register_parameter(f"{branch}_log_scale", nn.Parameter(torch.tensor(math.log(config.scale))))
                self.register_parameter(f"{branch}_bias", nn.Parameter(torch.tensor(0.0)))

    def prompts(self):
        """-> (T_g [C, d] of the global branch or None, E_ca [C, d] of CAP or None), both of unit length"""
        if not len(self.contexts):
            return None, None
        features = F.normalize((encode_prompts_fused if self.fused else encode_prompts_reference)(self.clip, self.contexts, self.tokens), dim=-1)
        if self.config.branches == "regional":
            return None, features[0]
        return features[0], features[1] if len(features) > 1 else None

    def split_and_synthesize(self, x0, X, E_ca):
        """KAP, CAP, DSF, QSM. x0: [B, d]; X: [B, M, d]; E_ca: [C, d] -> (T_uf [B, C, d], DSF's attention [B, C, M] or None)"""
        T_ka, T_ca, attention, fusion = self.knowledge, E_ca, None, self.config.fusion
        if hasattr(self, "dsf_weight"):
            T_ca, attention = dynamic_semantic_filtering(E_ca, X, self.dsf_weight, self.dsf_bias, self.dsf_log_scale.exp())
            T_ca = F.normalize(T_ca, dim=-1)                                                               # [B, C, d]
        if fusion == "qsm":
            on_axis = {"k": T_ka, "c": T_ca, "g": x0[:, None]}                                             # [C, d], [B, C, d], [B, 1, d]
            x = (None, *(on_axis[letter] for letter in self.config.quaternion_axes))                       # Q = 0 + T_ka i + T_ca j + x0 k
            linear = quaternion_linear_fused if self.fused else quaternion_linear_reference
            for number, layer in enumerate(self.quaternions):
                x = linear(x, **layer)
                if number + 1 < len(self.quaternions):
                    x = getattr(F, self.config.quaternion_activation)(x)
            T_uf = x if self.config.quaternion_readout == "concat" else x.unflatten(-1, (4, -1)).mean(-2)
        elif fusion == "concat":
            T_uf = torch.cat(torch.broadcast_tensors(T_ka, T_ca), -1) @ self.concat_weight
        else:
            T_uf = T_ka if fusion == "knowledge" else T_ca if fusion == "context" else T_ka + T_ca
        return F.normalize(T_uf, dim=-1).expand(len(x0), -1, -1), attention

    def align(self, T_uf, X):
        """GDMA -> (T_fn [B, C, d], X_fn [B, M, d], V-to-S gate, S-to-V gate)"""
        def weights(name):
            if not hasattr(self, name):
                return None
            stored = getattr(self, name)
            return GatedAttention(stored["query"], stored["key"], stored["value"], stored["log_scale"].exp(), *(stored.get(key) for key in ("gate_query", "gate_attended", "gate_bias")))
        return (gated_alignment_fused if self.fused else gated_alignment_reference)(T_uf, X, weights("v_to_s"), weights("s_to_v"))

    def forward(self, features, targets=None, prompts=None, explain=False):
        """features: (x0 [B, d], X [B, M, d]), or images [B, 3, H, W] for the image tower here; targets: int [B, C] or None; prompts: what
        self.prompts() gave, to spare it -> Prediction, or with targets the loss, a scalar averaged over the batch."""
        x0, X = image_features(self.clip.visual, features) if isinstance(features, torch.Tensor) else features
        T_g, E_ca = self.prompts() if prompts is None else prompts
        x0, X = F.normalize(x0, dim=-1), F.normalize(X.to(x0.dtype), dim=-1)
        losses, logits, maps = [], {"global": None, "regional": None}, (None, None, None, None)
        exponents = self.config.gamma_neg, self.config.gamma_pos, self.config.clip
        asymmetric_loss = asymmetric_loss_fused if self.fused else asymmetric_loss_reference
        if T_g is not None:
            with torch.autocast(x0.device.type, enabled=False):
                logits["global"] = self.global_log_scale.exp() * x0.float() @ T_g.float().T + self.global_bias  # s_G
                if targets is not None:
                    losses.append(asymmetric_loss(logits["global"], targets, *exponents))
        if self.config.branches != "global":
            T_uf, filtering = self.split_and_synthesize(x0, X, E_ca)
            T_fn, X_fn, label_gate, region_gate = self.align(T_uf, X)
            with torch.autocast(x0.device.type, enabled=False):
                T_fn, X_fn, scale, bias = T_fn.float(), X_fn.float(), self.regional_log_scale.exp(), self.regional_bias
                if targets is not None and self.config.aggregator == "soft":
                    aggregate_loss = soft_aggregate_loss_fused if self.fused else soft_aggregate_loss_reference
                    losses.append(self.config.regional_weight * aggregate_loss(T_fn, X_fn, self.config.temperature, scale, bias, targets, *exponents))
                else:
                    logits["regional"] = self.aggregate(T_fn, X_fn, scale) + bias                           # s_R
                    if targets is not None:
                        losses.append(self.config.regional_weight * asymmetric_loss(logits["regional"], targets, *exponents))
            if explain:
                maps = F.normalize(T_fn, dim=-1) @ F.normalize(X_fn, dim=-1).mT, filtering, label_gate, region_gate
        return sum(losses) if targets is not None else Prediction(logits["global"], logits["regional"], *maps)

    def aggregate(self, T_fn, X_fn, scale):
        """The soft aggregator, or its ablations: the mean over regions, or the sharp maximum -> [B, C]"""
        if self.config.aggregator == "soft":
            return (soft_aggregate_fused if self.fused else soft_aggregate_reference)(T_fn, X_fn, self.config.temperature, scale)
        S = F.normalize(T_fn, dim=-1) @ F.normalize(X_fn, dim=-1).mT
        return scale * (S.mean(-1) if self.config.aggregator == "mean" else S.amax(-1))

    def learned(self):
        """{name: parameter} of what training changes, which is what a checkpoint holds"""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def branch_scores(prediction):
    """Mean of the branches' sigmoid scores.  [mean: author; sigmoid: choice D10]  -> [B, C] in 0..1"""
    return torch.stack([torch.sigmoid(z.double()) for z in prediction[:2] if z is not None]).mean(0)


# --- inputs -----------------------------------------------------------------------------------------------------------

class Photos(NamedTuple):
    photos: list             # paths, or scenes' (split, index)
    labels: torch.Tensor     # int8 [N, C]
    x0: torch.Tensor         # [N, d], None where photos are encoded on the fly
    X: torch.Tensor          # float16 [N, M, d], likewise
    policy: str


class Inputs(NamedTuple):
    names: list
    tokens: torch.Tensor     # [C, 77]
    texts: list              # what KAP reads of each label
    knowledge: torch.Tensor  # T_ka [C, d]
    words: torch.Tensor      # embeddings of "a photo of a" [4, width], or None
    tower: dict              # the image tower before tuning, so that every run starts from it; None for a frozen one
    train: Photos
    test: Photos
    zero_shot: np.ndarray    # [N, C] cosine of test photos with "a photo of a {name}.", rows of unreadable photos are nan


def names_of(config):
    """The label names of a run: the dataset's own, or those of them that --labels keeps."""
    own = data.label_names(config.dataset, config.data_root)
    if not config.labels:
        return own
    names = data.read_labels(config.labels)
    unknown = [name for name in names if name not in own]
    if unknown:
        raise UsageError(f"--labels {config.labels}: '{unknown[0]}' is no label of {config.dataset}, and SSPA learns from labelled photos; choose among {', '.join(own[:30])}")
    return names


def policies_of(config):
    """What a dataset's loader may be told about doubtful labels and splits."""
    return {name: getattr(config, name) for name in ("difficult", "unlabelled", "validation", "partition", "split_seed")}


def open_clip_of(config, device):
    backbone = config.backbone or ("scenes" if config.dataset == "scenes" else "ViT-B-16")
    return data.load_clip(backbone, config.pretrained, device, config.precision, config.resolution)


def encoder_of(clip):
    """The identity of a CLIP whatever its precision: a checkpoint trained on a GPU in bf16 may be used on a CPU in fp32."""
    return clip.key.split("-")[0]


def prompt_inputs(config, clip, names, texts):
    """Tokens of the learnable prompts, T_ka, and the words that contexts start from -> (tokens, knowledge, words)"""
    places, room = " ".join(["X"] * config.context_length), clip.tokenizer.context_length
    prompts = [f"{places} {name}." for name in names]
    if config.context_length + 3 > room:
        raise UsageError(f"--context-length {config.context_length}: this CLIP reads {room} tokens; leave room for the label")
    cut = [name for name, prompt in zip(names, prompts) if len(clip.tokenizer.encode(prompt)) + 2 > room]
    if cut:
        say(f"prompts cut to {room} tokens: {', '.join(cut[:5])}")
    device, words = clip.model.logit_scale.device, None
    if config.context_init == "words":
        words = clip.model.token_embedding(clip.tokenizer(["a photo of a"]).to(device))[0, 1:5].detach().cpu()
    return clip.tokenizer(prompts), data.embed_texts(clip, texts, config.cache), words


def description_file(config):
    return config.descriptions or str(data.ASSETS / "descriptions" / f"{config.dataset}.json")


def load_inputs(config, clip, names, with_training=True):
    """Photos, their features where the tower is frozen, and everything made of the label names -> Inputs"""
    own = data.label_names(config.dataset, config.data_root)
    columns = [own.index(name) for name in names]
    if config.download and dist.is_initialized():  # one process of a machine fetches, the others find
        if os.environ["LOCAL_RANK"] == "0":
            data.load_photos(config.dataset, config.data_root, "test", config.limit, True, **policies_of(config))
        dist.barrier()
    found = {split: data.load_photos(config.dataset, config.data_root, split, config.limit, config.download, **policies_of(config)) for split in (("train", "test") if with_training else ("test",))}
    descriptions = {}
    if not config.no_descriptions and config.dataset == "folder" and not config.descriptions:
        say("folder: the template stands alone; --descriptions FILE says what each label looks like (llm_text.py descriptions writes one)")
    elif not config.no_descriptions:
        descriptions = data.read_descriptions(description_file(config), names)
    texts = knowledge_texts(clip, names, descriptions, config.knowledge_order)
    tokens, knowledge, words = prompt_inputs(config, clip, names, texts)
    size, tuned = clip.model.visual.image_size, config.tune_image == "full"
    count = sum(len(photos.photos) for photos in found.values())
    with torch.no_grad():
        height, width = (size, size) if isinstance(size, int) else size
        regions = image_features(clip.model.visual, torch.zeros(1, 3, height, width, device=clip.model.logit_scale.device))[1].shape[1:]
    gib = 2 * count * regions.numel() / 2 ** 30
    if tuned and with_training and clip.model.logit_scale.device.type == "cpu":
        say("the image tower is tuned on the CPU, which takes long; --tune-image none freezes it and trains in minutes")
    if not tuned:
        where = "kept in memory and in " + config.cache if gib <= config.cache_limit else f"more than --cache-limit {config.cache_limit:g}: photos are encoded anew in every epoch"
        say(f"frozen region features: {count:,} photos x {regions[0]} regions x {regions[1]}, {gib:.2f} GiB, {where}")
    loaded = {}
    for split, photos in found.items():
        labels = torch.from_numpy(photos.labels[:, columns])
        if tuned or gib > config.cache_limit:
            loaded[split] = Photos(photos.photos, labels, None, None, photos.policy)
        else:
            x0, X, kept = data.embed_regions(clip, photos.photos, image_features, config.cache, workers=config.workers, quiet=config.quiet)
            loaded[split] = Photos([photos.photos[n] for n in kept], labels[kept], x0, X, f"{photos.policy}; {len(photos.photos) - len(kept)} unreadable {split} photos left out")
    test = loaded["test"]
    label_embeddings, zero_shot = F.normalize(data.embed_texts(clip, [f"a photo of a {name}." for name in names], config.cache), dim=-1), np.full(test.labels.shape, np.nan, np.float32)
    x0, kept = (test.x0, np.arange(len(test.photos))) if test.x0 is not None else data.embed_photos(clip, test.photos, config.cache, workers=config.workers, quiet=config.quiet)
    zero_shot[kept] = (F.normalize(x0, dim=-1) @ label_embeddings.T).numpy()
    tower = {name: tensor.cpu().clone() for name, tensor in clip.model.visual.state_dict().items()} if tuned else None
    return Inputs(names, tokens, texts, knowledge, words, tower, loaded.get("train"), test, zero_shot)


def batches_of(config, clip, photos, batches, augment=None):
    """batches: list of row indices [b] -> iterator over (features for SSPA.forward, int8 labels [b, C]) on the model's device.

    Features from memory, or photos decoded one batch ahead. An unreadable photo is named once and becomes a grey image whose labels are all -1.
    augment: row -> numpy Generator, for random crops and flips.
    """
    device = clip.model.logit_scale.device
    if photos.X is not None:
        for rows in batches:
            yield (photos.x0[rows].to(device), photos.X[rows].to(device)), photos.labels[rows].to(device)
        return
    size = clip.model.visual.image_size
    grey = torch.zeros(3, *((size, size) if isinstance(size, int) else size))
    with ThreadPoolExecutor(max(1, config.workers)) as pool:
        def decode(rows):
            return [pool.submit(data.load_photo, clip, photos.photos[row], augment and (augment(row), config.crop_scale)) for row in rows.tolist()]
        ahead = decode(batches[0])
        for number, rows in enumerate(batches):
            images, labels = [task.result() for task in ahead], photos.labels[rows].clone()
            ahead = decode(batches[number + 1]) if number + 1 < len(batches) else []
            for n, image in enumerate(images):
                if isinstance(image, str):
                    if image not in _named_unreadable:
                        say(f"cannot be read, left out: {image}")
                        _named_unreadable.add(image)
                    images[n], labels[n] = grey, -1
            yield torch.stack(images).to(device), labels.to(device)


_named_unreadable = set()


# --- train ------------------------------------------------------------------------------------------------------------

def build(config, clip, inputs, seed, device):
    """A fresh SSPA, its image tower as CLIP has it; requires_grad on what learns."""
    clip.model.requires_grad_(False)
    model = SSPA(config, clip.model, inputs.tokens, inputs.knowledge, inputs.words, seed).to(device).eval()  # eval: BatchNorm statistics stay CLIP's [choice D13]
    if config.tune_image == "full":
        if inputs.tower is not None:
            clip.model.visual.load_state_dict(inputs.tower)
        clip.model.visual.requires_grad_(True)
    return model


def autocast(config, device):
    kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    return torch.autocast(device.type, dtype=kind, enabled=kind is not None)


def train(config, clip, inputs, seed, device, output, key):
    """One run -> SSPA with the averaged weights. key: names the run in resume.pt.

    Randomness hangs on the seed, the epoch and the photo alone, so an interrupted training goes on where it was, and several processes (torchrun, PyTorch's
    DistributedDataParallel) learn what one would: a batch is the same photos, each process takes its share. Raises Diverged.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, count = build(config, clip, inputs, seed, device), len(inputs.train.photos)
    batch_size = min(config.batch_size, count)
    if batch_size < world:
        raise UsageError(f"a batch of {batch_size} photos cannot be shared by {world} processes; raise --batch-size or lower --nproc_per_node")
    steps = count // batch_size  # the rest of an epoch's order waits for another epoch
    with torch.no_grad(), autocast(config, device):
        start = model(next(batches_of(config, clip, inputs.train, [torch.arange(min(64, count))]))[0])
        for branch, logits in (("global", start.global_logits), ("regional", start.regional_logits)):
            if logits is not None:  # [choice D9]
                getattr(model, f"{branch}_bias").add_(math.log(config.prior / (1 - config.prior)) - logits.mean())
    learned, tower = model.learned(), {id(p) for p in clip.model.visual.parameters()}
    groups = [{"params": [p for name, p in learned.items() if name != "contexts" and id(p) not in tower], "peak": config.lr},
              {"params": [p for name, p in learned.items() if name == "contexts"], "peak": config.prompt_lr},
              {"params": [p for p in learned.values() if id(p) in tower], "peak": config.lr * config.image_lr_factor}]
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, weight_decay=config.weight_decay, fused=config.impl == "fused")
    averages = {name: parameter.detach().clone() for name, parameter in learned.items()}
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    resume, done, log = output / "resume.pt", 0, []
    if resume.is_file():
        done, log = load_resume(resume, key, learned, averages, optimiser, scaler)
    parallel = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None) if world > 1 else model
    save_at, total_steps = time.time(), config.epochs * steps
    bar = tqdm(initial=done * steps, total=total_steps, desc=f"training {title(key[1])}, seed {seed}", unit="step", disable=config.quiet or not sys.stderr.isatty())
    for epoch in range(done, config.epochs):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch + 1))
        shares = [order[step * batch_size:(step + 1) * batch_size][rank::world] for step in range(steps)]
        parts = [part for share in shares for part in share.tensor_split(min(config.accumulate, len(share)))]
        augment = (lambda row: np.random.default_rng([seed, epoch, row])) if config.tune_image == "full" else None
        stream, total, began = batches_of(config, clip, inputs.train, parts, augment), 0.0, time.time()
        for step, share in enumerate(shares):
            now = epoch * steps + step
            rate = min(1, (now + 1) / max(1, config.warm_up * total_steps)) * 0.5 * (1 + math.cos(math.pi * now / total_steps))
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate
            optimiser.zero_grad()
            pieces = min(config.accumulate, len(share))
            for piece in range(pieces):
                features, targets = next(stream)
                waiting = parallel.no_sync() if world > 1 and piece + 1 < pieces else contextlib.nullcontext()
                with waiting, autocast(config, device):
                    loss = parallel(features, targets) * (len(targets) / batch_size * world)  # a mean over the whole batch, once the processes' gradients are averaged
                    scaler.scale(loss).backward()
                total += loss.detach()
            scaler.step(optimiser)
            scaler.update()
            bar.update()
            decay = min(config.ema, (1 + now) / (10 + now))
            with torch.no_grad():
                torch._foreach_lerp_(list(averages.values()), [p.detach() for p in learned.values()], 1 - decay)
            if world == 1 and step % 100 == 99 and not math.isfinite(float(total)):
                break  # several processes find out together, at the end of the epoch
        total = torch.as_tensor(total, dtype=torch.float64, device=device) / steps / world
        if world > 1:
            dist.all_reduce(total)
        total, finite = float(total), all(bool(p.isfinite().all()) for p in learned.values())
        if not (math.isfinite(total) and finite):
            kept = keep_last_good(config, inputs, clip, model, resume, output) if rank == 0 else ""
            raise Diverged(f"training diverged in epoch {epoch + 1} (loss {total}); lower --lr (now {config.lr:g}) or --prompt-lr (now {config.prompt_lr:g}){kept}")
        log.append({"run": key[1], "seed": seed, "epoch": epoch + 1, "loss": total, "seconds": round(time.time() - began, 3)})
        bar.set_postfix(loss=f"{total:.3f}")
        if rank == 0 and time.time() >= save_at and epoch + 1 < config.epochs:
            began = time.time()
            save_resume(resume, key, learned, averages, optimiser, scaler, log)
            save_at = time.time() + max(RESUME_SECONDS, 20 * (time.time() - began))
    bar.close()
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(averages[name])
    return model, log


def save_resume(path, key, learned, averages, optimiser, scaler, log):
    stream = BytesIO()
    torch.save({"key": list(key), "learned": {name: p.detach() for name, p in learned.items()}, "averages": averages, "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict(), "log": log}, stream)
    data.write_atomically(path, stream.getbuffer())


def load_resume(path, key, learned, averages, optimiser, scaler):
    """-> (epochs done, log). A file of another run, or one that cannot be read, is renamed to *.old with one line."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["key"] != list(key):
            raise ValueError("it belongs to other settings")
        for stored in (state["learned"], state["averages"]):
            if {name: tensor.shape for name, tensor in stored.items()} != {name: tensor.shape for name, tensor in learned.items()}:
                raise ValueError("its tensors do not fit")
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        with torch.no_grad():
            for stored, tensors in ((state["learned"], learned), (state["averages"], averages)):
                for name, tensor in tensors.items():
                    tensor.copy_(stored[name])
    except Exception as error:  # a damaged archive fails in many ways inside torch
        if not dist.is_initialized() or dist.get_rank() == 0:
            os.replace(path, f"{path}.old")
            say(f"{path}: not resumed ({str(error).splitlines()[0][:120]}), kept as {path.name}.old; training starts anew")
        return 0, []
    say(f"going on after epoch {len(state['log'])} of {title(key[1])}, seed {key[2]}")
    return len(state["log"]), state["log"]


def keep_last_good(config, inputs, clip, model, resume, output):
    """After divergence: the averaged weights of the last saved epoch as a checkpoint -> how to say it"""
    if not resume.is_file():
        return ""
    state = torch.load(resume, weights_only=True, map_location="cpu")
    with torch.no_grad():
        for name, parameter in model.learned().items():
            parameter.copy_(state["averages"][name])
    path = output / "last_good.safetensors"
    save_checkpoint(config, model, inputs, clip, path)
    return f"; the weights after epoch {len(state['log'])} are kept in {path}"


# --- evaluate ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def score(config, clip, model, photos, device):
    """Photos divided among the processes -> (scores float64 [N, C], global logits, regional logits (None for a branch that is off), readable [N])"""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = [part for part in torch.arange(len(photos.photos))[rank::world].split(64) if len(part)]
    table = torch.zeros(len(photos.photos), 3 * photos.labels.shape[1] + 1, dtype=torch.float64, device=device)
    with autocast(config, device):
        prompts = model.prompts()
        for part, (features, labels) in zip(rows, batches_of(config, clip, photos, rows) if rows else ()):
            prediction = model(features, prompts=prompts)
            mean = branch_scores(prediction)
            both = [torch.zeros_like(mean) if z is None else z.double() for z in prediction[:2]]
            table[part] = torch.cat([mean, *both, ~(labels == -1).all(1, keepdim=True)], 1)  # an unreadable photo has no label
    if world > 1:
        dist.all_reduce(table)  # every row is zero but in one process
    table = table.cpu().numpy()
    scores = np.split(table[:, :-1], 3, 1)
    return scores[0], scores[1] if config.branches != "regional" else None, scores[2] if config.branches != "global" else None, table[:, -1] > 0


def evaluate(config, clip, model, inputs, device):
    """-> (dict for metrics.json, per-class AP [C])"""
    scores, global_logits, regional_logits, readable = score(config, clip, model, inputs.test, device)
    truth = inputs.test.labels.numpy()[readable]
    if not np.isfinite(scores).all():
        raise Diverged("the scores of the test photos are not finite; lower --lr")
    scores = scores[readable]
    result = {"mAP": metrics.mean_average_precision(scores, truth), "mAP_interpolated": metrics.mean_average_precision(scores, truth, interpolated=True)}
    for name, logits in (("mAP_global", global_logits), ("mAP_regional", regional_logits)):
        result[name] = None if logits is None else metrics.mean_average_precision(logits[readable], truth)
    result.update({"attributes": metrics.attribute_metrics(scores, truth), "threshold_0.5": metrics.multilabel_f1(scores, truth), "top_3": metrics.multilabel_f1(scores, truth, top_k=min(3, truth.shape[1]))})
    return result, metrics.average_precision(scores, truth)


# --- predict and explain ----------------------------------------------------------------------------------------------

def tags_of(config, row):
    order = np.argsort(-row, kind="stable")
    return [int(k) for k in (order[:config.top_k] if config.top_k else [k for k in order if row[k] >= config.threshold])]


def predict(config, clip, model, names, device, output):
    """Tags photos: one JSON line a photo on stdout, strongest label first, and predictions.png in the output folder."""
    paths = [photo for path in config.predict for photo in data.list_photos(path)]
    scores, _, _, readable = score(config, clip, model, Photos(paths, torch.zeros(len(paths), len(names), dtype=torch.int8), None, None, ""), device)
    if not readable.any():
        raise UsageError("no photo could be read; check the files named above")
    paths, scores = [path for path, fine in zip(paths, readable) if fine], scores[readable]
    tags = [tags_of(config, row) for row in scores]
    sheet = data.contact_sheet(paths, names, scores, tags, output / "predictions.png")  # before the first line: a reader like head may leave early
    for path, row, chosen in zip(paths, scores, tags):
        print(json.dumps({"photo": str(path), "labels": [names[k] for k in chosen], "scores": {names[k]: round(float(row[k]), 4) for k in np.argsort(-row, kind="stable")}}, ensure_ascii=False))
    say(f"contact sheet: {sheet}" + (f" (the first 48 of {len(paths)} photos)" if len(paths) > 48 else ""))


TILE = 224  # pixels of a map in the pictures of --explain


def heat(seen, values):
    """A map [M] over the square that CLIP saw: PIL, grey where the map is lowest, bright orange where it is highest."""
    side = math.isqrt(len(values))
    values = values.reshape(side, side)
    span = (values - values.min()) / max(float(values.max() - values.min()), 1e-9)
    strength = np.asarray(Image.fromarray((255 * span).astype(np.uint8)).resize((TILE, TILE), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    grey = np.asarray(seen.convert("L").convert("RGB"), np.float32) * 0.55
    return Image.fromarray(np.clip(grey * (1 - 0.65 * strength) + strength * np.array([255, 150, 30], np.float32), 0, 255).astype(np.uint8))


@torch.no_grad()
def explain(config, clip, model, names, device, output):
    """Where the strongest labels were seen: one picture a photo in output/explain, and a table of V-to-S gates on stdout.

    A row a label: its similarity to every region after GDMA, and the attention by which DSF filtered its prompt. On the left the photo as CLIP saw
    it (centre crop), the S-to-V gate averaged over channels, and the V-to-S gates. Each map is stretched between its own lowest and highest value, printed with it.
    """
    paths, font, small = [photo for path in config.explain for photo in data.list_photos(path)], ImageFont.load_default(15), ImageFont.load_default(12)
    drawn = 0
    with autocast(config, device):
        prompts = model.prompts()
    mean, std = (torch.tensor(v)[:, None, None] for v in (clip.preprocess.transforms[-1].mean, clip.preprocess.transforms[-1].std))
    for number, path in enumerate(paths):
        image = data.load_photo(clip, path)
        if isinstance(image, str):
            say(f"cannot be read, left out: {image}")
            continue
        with autocast(config, device):
            prediction = model(image[None].to(device), prompts=prompts, explain=True)
        scores = branch_scores(prediction)[0].cpu().numpy()
        openness = None if prediction.label_gate is None else prediction.label_gate[0].float().mean(-1).cpu().numpy()                  # [C]
        seen = Image.fromarray(((image * std + mean).clamp(0, 1).permute(1, 2, 0) * 255).byte().numpy()).resize((TILE, TILE), Image.Resampling.BICUBIC)
        strongest = np.argsort(-scores, kind="stable")[:min(config.top_k or 3, len(names))]
        maps = [("similarity after GDMA", prediction.similarity)] + ([("DSF attention", prediction.filtering)] if prediction.filtering is not None else [])
        gap, line = 12, 20
        high = TILE + 2 * line + gap
        sheet = Image.new("RGB", (gap + (1 + len(maps)) * (TILE + gap), gap + max(3, len(strongest)) * high), (24, 26, 30))
        canvas = ImageDraw.Draw(sheet)

        def tile(picture, column, row, title, below):
            x, y = gap + column * (TILE + gap), gap + row * high
            canvas.text((x, y), title, font=font, fill=(230, 230, 230))
            sheet.paste(picture, (x, y + line))
            canvas.text((x, y + line + TILE + 2), below, font=small, fill=(150, 154, 162))

        def values(tensor):
            tensor = tensor.float().cpu().numpy()
            return heat(seen, tensor), f"{tensor.min():.3g} to {tensor.max():.3g}"

        tile(seen, 0, 0, path.name[-30:], "as CLIP saw it")
        if prediction.region_gate is not None:
            picture, span = values(prediction.region_gate[0].mean(-1))
            tile(picture, 0, 1, "S-to-V gate", span)
        x, y = gap, gap + 2 * high
        canvas.text((x, y), "label", font=font, fill=(230, 230, 230))
        canvas.text((x + 112, y), "score" + ("    V-to-S" if openness is not None else ""), font=font, fill=(230, 230, 230))
        print(f"{path}\n{'label':<24}{'score %':>8}" + (f"{'V-to-S gate %':>15}" if openness is not None else ""))
        for k in np.argsort(-scores, kind="stable")[:10]:
            y += line
            print(f"{names[k]:<24}{100 * scores[k]:8.1f}" + (f"{100 * openness[k]:15.1f}" if openness is not None else ""))
            canvas.text((x, y), names[k][:14], font=font, fill=(230, 230, 230))
            canvas.text((x + 112, y), f"{100 * scores[k]:3.0f} %" + (f"      {100 * openness[k]:4.1f} %" if openness is not None else ""), font=font, fill=(150, 154, 162))
        for row, k in enumerate(strongest):
            for column, (title, tensor) in enumerate(maps, 1):
                picture, span = values(tensor[0, k])
                tile(picture, column, row, f"{names[k][:14]}: {title}", span)
        stream, target = BytesIO(), output / "explain" / f"{number:03d}_{path.stem}.png"
        sheet.save(stream, "PNG")
        data.write_atomically(target, stream.getvalue())
        say(f"picture: {target}")
        drawn += 1
    if not drawn:
        raise UsageError("no photo could be read; check the files named above")


# --- record -----------------------------------------------------------------------------------------------------------

def settings_of(config):
    """What decides the result: the settings, and the content of the files they name. JSON text."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in RUNNING_SETTINGS}
    for name, path in (("labels", config.labels), ("pretrained", config.pretrained), ("descriptions", None if config.no_descriptions else description_file(config))):
        if path and Path(path).is_file():
            values[name + "_hash"] = hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
    if config.dataset == "scenes":
        values["scenes_hash"] = data.scenes_digest()
    if config.dataset == "folder":
        values["folder_hash"] = data.folder_digest(config.data_root)
    return json.dumps(values, sort_keys=True)


def save_checkpoint(config, model, inputs, clip, path):
    """The learned tensors; settings, class order, what KAP read of the labels and the encoder's identity in the metadata."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in model.learned().items()}
    metadata = {"method": "sspa", "names": json.dumps(inputs.names), "texts": json.dumps(inputs.texts), "encoder": clip.name, "encoder_key": encoder_of(clip), "settings": settings_of(config)}
    data.write_atomically(path, to_safetensors(tensors, metadata))


class Checkpoint(NamedTuple):
    path: str
    tensors: dict      # the learned tensors
    names: list        # labels, in their order
    texts: list        # what KAP read of each
    settings: dict     # of the run that made it


def open_checkpoint(config, path, device, names=None):
    """-> (config as the checkpoint was trained, clip, Checkpoint). Refused: other labels or another order of them, another encoder. Raises UsageError."""
    try:
        with safe_open(str(path), "pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"checkpoint {path}: cannot be read ({error})") from None
    if metadata.get("method") != "sspa":
        raise UsageError(f"checkpoint {path}: not written by sspa.py")
    checkpoint = Checkpoint(path, tensors, json.loads(metadata["names"]), json.loads(metadata["texts"]), json.loads(metadata["settings"]))
    settings = checkpoint.settings
    if names is not None and names != checkpoint.names:
        first = next((f"label {n + 1} is '{a}' there and '{b}' here" for n, (a, b) in enumerate(zip(checkpoint.names, names)) if a != b), f"it has {len(checkpoint.names)} labels, not {len(names)}")
        raise UsageError(f"checkpoint {path}: trained for other labels or another order of them ({first}); pass --dataset {settings['dataset']} and the label file it was trained with, if any")
    # how it was made is the checkpoint's to say; the flags say what it is used on
    kept = {field.name: settings[field.name] for field in dataclasses.fields(Config) if field.name in settings and field.name not in
            ("dataset", "data_root", "difficult", "unlabelled", "limit", "labels", "descriptions", "seed", "ablate", "impl", "precision", "backbone", "pretrained", "resolution")}
    if config.backbone is None:
        kept["backbone"] = settings["backbone"] or ("scenes" if settings["dataset"] == "scenes" else "ViT-B-16")
    for name in ("pretrained", "resolution"):
        if getattr(config, name) is None:
            kept[name] = settings[name]
    ignored = [name for name, value in kept.items() if name not in ("lr", "tune_image", *RUNNING_SETTINGS) and getattr(config, name) not in (value, Config.__dataclass_fields__[name].default)]
    if ignored:
        say(f"{path} was made with its own {', '.join('--' + name.replace('_', '-') for name in ignored)}; what the command line says of it is not used")
    config = dataclasses.replace(config, **kept)
    clip = open_clip_of(config, device)
    if encoder_of(clip) != metadata["encoder_key"]:
        raise UsageError(f"checkpoint {path}: trained on {metadata['encoder']}, not on {clip.name} as it is here; pass the same --backbone, --pretrained and --resolution")
    return config, clip, checkpoint


def restore(config, clip, checkpoint, device):
    """-> SSPA with the checkpoint's weights. A tuned tower changes clip.model: nothing may be embedded and cached with it afterwards."""
    tokens, knowledge, _ = prompt_inputs(config, clip, checkpoint.names, checkpoint.texts)
    model = build(config, clip, Inputs(checkpoint.names, tokens, checkpoint.texts, knowledge, None, None, None, None, None), 0, device)
    learned = model.learned()
    if set(learned) != set(checkpoint.tensors) or any(learned[name].shape != tensor.shape for name, tensor in checkpoint.tensors.items()):
        raise UsageError(f"checkpoint {checkpoint.path}: its tensors do not fit its settings; it was written by another version of sspa.py")
    with torch.no_grad():
        for name, tensor in checkpoint.tensors.items():
            learned[name].copy_(tensor)
    return model


def commit():
    """The git commit this file is at, "+" when the tree has changes, "unknown" outside a repository."""
    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def spread(values):
    """(mean, sample standard deviation; 0 for one value)"""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def record(config, argv, clip, inputs, runs, seconds, device, settings):
    """The content of metrics.json. runs: list of dicts, the full method (or what the flags make of it) under ablation "none"."""
    chosen = [run for run in runs if run["ablation"] == "none"]
    mean, std = spread([run["mAP"] for run in chosen])
    truth, readable = inputs.test.labels.numpy(), np.isfinite(inputs.zero_shot).all(1)
    per_class = np.array([run.pop("per_class") for run in chosen], dtype=float).mean(0)
    peak = torch.cuda.max_memory_allocated(device) / 2 ** 20 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
    return {
        "method": "sspa", "dataset": config.dataset, "backbone": clip.name, "impl": config.impl, "command": shlex.join(["python", "sspa.py", *argv]), "commit": commit(),
        "seconds": round(seconds, 2), "mAP": mean, "mAP_std": std, "zero_shot_mAP": metrics.mean_average_precision(inputs.zero_shot[readable], truth[readable]),
        "seeds": [run["seed"] for run in chosen], "runs": [{name: value for name, value in run.items() if name != "per_class"} for run in runs],
        "per_class": [{"name": name, "positives": int((truth[readable, c] == 1).sum()), "ap": float(100 * per_class[c])} for c, name in enumerate(inputs.names)],
        "policy": inputs.test.policy, "train_count": len(inputs.train.photos) if inputs.train else 0, "photo_count": int(readable.sum()), "label_count": len(inputs.names), "texts": inputs.texts,
        "config": dataclasses.asdict(config), "settings": settings, "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(), "peak_memory_mib": round(peak),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def table(result):
    """The result as a person reads it -> str"""
    def percent(value):
        return f"{'-' if value is None or math.isnan(value) else format(value, '.2f'):>8}"

    config, seeds = result["config"], len(result["seeds"])
    tower = "image tower tuned" if config["tune_image"] == "full" else "image tower frozen"
    trained = f"trained on {result['train_count']:,} labelled photos, {tower}" if result["train_count"] else f"not trained here, {tower}"
    lines = [f"{result['dataset']}: {result['photo_count']:,} test photos, {result['label_count']} labels; {result['backbone']}; {trained}; {seeds} seed{'s' if seeds > 1 else ''}", "",
             f"{'':<34}{'mAP %':>14}{'CF1 %':>8}{'OF1 %':>8}", f"{'zero-shot CLIP (cosine)':<34}{percent(result['zero_shot_mAP'])}"]
    for ablation in dict.fromkeys(run["ablation"] for run in result["runs"]):
        chosen = [run for run in result["runs"] if run["ablation"] == ablation]
        mean, std = spread([math.nan if run["mAP"] is None else run["mAP"] for run in chosen])
        lines.append(f"{title(ablation) if ablation == 'none' else '  ' + ablation:<34}{percent(mean)}" + (f" ±{std:4.2f}" if len(chosen) > 1 else " " * 6) + "".join(f"{np.mean([run['threshold_0.5'][name] for run in chosen]):8.1f}" for name in ("CF1", "OF1")))
    return "\n".join(lines)


# --- main -------------------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(prog="sspa.py", description="SSPA: split-and-synthesize prompting with gated alignments (arXiv 2407.20920).",
                                     epilog="Tags: [paper] its abstract; [figure] its method figure; [author] other public code of its first author; [field] the closest public peers; [choice] ours, by the numbers "
                                     f"of the file's docstring, which maps the paper to the code. Ablations: {shlex.join(ABLATIONS)}.")
    for field in dataclasses.fields(Config):
        extra = dict(field.metadata)
        text = extra.pop("help").replace("%", "%%")
        if field.type is bool:
            parser.add_argument("--" + field.name.replace("_", "-"), action="store_true", help=text)
        else:
            shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            extra.setdefault("type", field.type if field.type in (int, float) else str)
            parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, help=text + ("" if field.default is None else f" (default: {shown})"), **extra)
    values = vars(parser.parse_args(argv))
    config = Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    positive = ("temperature", "scale", "quaternion_hidden")
    for bad, message in (
            (any(not 0 <= seed < 2 ** 40 for seed in config.seed) or len(set(config.seed)) < len(config.seed), "--seed must be 0 or more, and not repeat a value"),
            (config.ablate is not None and not set(config.ablate) <= set(ABLATIONS), f"--ablate: unknown name; choose among {', '.join(repr(name) for name in ABLATIONS)}"),
            (config.ablate is not None and any(getattr(config, name) != Config.__dataclass_fields__[name].default for change in ABLATIONS.values() for name in change),
             "--ablate starts from the full method; leave the flags of single ablations out"),
            (min(config.epochs, config.batch_size, config.accumulate, config.context_length, config.quaternion_layers) < 1, "--epochs, --batch-size, --accumulate, --context-length and --quaternion-layers must be 1 or more"),
            (config.limit is not None and config.limit < 1, "--limit must be 1 or more"),
            (config.top_k is not None and config.top_k < 1, "--top-k must be 1 or more"),
            (any(not 0 < getattr(config, name) < math.inf for name in positive) or not 0 < config.prior < 1, "--temperature, --scale and --quaternion-hidden must be above 0, --prior between 0 and 1"),
            (not all(0 <= value < math.inf for value in (config.gamma_neg, config.gamma_pos, config.weight_decay, config.regional_weight, config.attention_scale, config.image_lr_factor, config.cache_limit)),
             "--gamma-neg, --gamma-pos, --weight-decay, --regional-weight, --attention-scale, --image-lr-factor and --cache-limit must be 0 or more"),
            (not 0 <= config.clip < 1 or not 0 <= config.ema < 1 or not 0 <= config.warm_up <= 1 or not 0 < config.crop_scale <= 1, "--clip and --ema must lie in 0..1 (1 left out), --warm-up in 0..1, --crop-scale above 0 up to 1"),
            (not 0 < config.prompt_lr < math.inf or config.lr is not None and not 0 < config.lr < math.inf, "--lr and --prompt-lr must be above 0"),
            (config.eval_only and not config.checkpoint, "--eval-only needs --checkpoint FILE"),
            (bool(config.explain) and config.branches == "global", "--explain draws the regional branch, which --branches global leaves out"),
            (bool(config.checkpoint) and config.ablate is not None, "--checkpoint trains nothing: leave --ablate out")):
        if bad:
            raise UsageError(message)
    return dataclasses.replace(config, lr=config.lr or (6e-3 if config.dataset == "scenes" else 5e-5), tune_image=config.tune_image or ("full" if config.ablate is None else "none"))


def set_up(config):
    """The device, and PyTorch's process group under torchrun -> (config with its precision, device)"""
    if "LOCAL_RANK" not in os.environ:
        device = data.choose_device(config.gpu, config.cpu)
    else:
        if config.gpu is not None:
            raise UsageError("--gpu and torchrun exclude each other: torchrun gives every process its own GPU")
        if not config.cpu and torch.cuda.is_available() and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise UsageError(f"{os.environ['LOCAL_WORLD_SIZE']} processes but {torch.cuda.device_count()} GPUs; lower --nproc_per_node or add --cpu")
        device = data.choose_device(None if config.cpu or not torch.cuda.is_available() else int(os.environ["LOCAL_RANK"]), config.cpu)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
        if dist.get_rank() > 0:  # one voice; what was not foreseen is still heard
            sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
            sys.stdout = sys.stderr = open(os.devnull, "w")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    automatic = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and config.precision == "fp16":
        raise UsageError("--precision fp16 needs a GPU; leave it out or pass bf16")
    return dataclasses.replace(config, precision=config.precision or automatic), device


def finished(config, output):
    """The result of the same run, done before, or None. A finished run with other settings is never overwritten: UsageError, or make_room."""
    path = output / "metrics.json"
    if not path.is_file() or config.overwrite:
        return None
    result = data.read_json(path, "result")
    if result.get("settings") == settings_of(config):
        return result
    if config.output:
        raise UsageError(f"{output} holds a finished run with other settings; choose another --output, or add --overwrite")
    return None


def make_room(config, output):
    """Just before training: --overwrite drops the finished result; in the default folder a run with other settings moves aside."""
    if not (output / "metrics.json").is_file():
        return
    if config.overwrite:
        for name in ("metrics.json", "resume.pt", "runs.json"):
            (output / name).unlink(missing_ok=True)
        return
    number = next(n for n in range(1, 10 ** 6) if not output.with_name(f"{output.name}-{n}").exists())
    output.rename(output.with_name(f"{output.name}-{number}"))
    output.mkdir()
    say(f"{output} held a run with other settings: it is now {output}-{number}")


def check_writable(output):
    """Raises UsageError before hours are spent, not after."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output}: is a file, not a folder")
    probe = output / ".writable"
    data.write_atomically(probe, "")
    probe.unlink(missing_ok=True)  # several processes may look at once


def train_and_record(config, argv, device, output, began):
    """Every seed of the full method and of the ablations asked for, one after the other; finished ones are kept in runs.json -> content of metrics.json"""
    first, settings, names = not dist.is_initialized() or dist.get_rank() == 0, settings_of(config), names_of(config)
    clip = open_clip_of(config, device)
    inputs = load_inputs(config, clip, names)
    if first:
        make_room(config, output)
    if dist.is_initialized():
        dist.barrier()
    progress, done, log = output / "runs.json", [], []
    if progress.is_file():
        stored = data.read_json(progress, "finished runs")
        if stored.get("settings") == settings:
            done, log = [{**run, **{name: math.nan for name in ("mAP", "mAP_interpolated") if run[name] is None}} for run in stored["runs"]], stored["log"]
        else:
            say(f"{progress} holds runs of other settings: they are done anew")
    ablations = {"none": {}, **({name: ABLATIONS[name] for name in (config.ablate or ABLATIONS)} if config.ablate is not None else {})}
    for ablation, changes in ablations.items():
        for seed in config.seed:
            if any(run["ablation"] == ablation and run["seed"] == seed for run in done):
                continue
            changed, at = dataclasses.replace(config, **changes), time.time()
            now = inputs
            if changed.no_descriptions and not config.no_descriptions:
                texts = knowledge_texts(clip, names, {}, config.knowledge_order)
                now = inputs._replace(texts=texts, knowledge=data.embed_texts(clip, texts, config.cache))
            model, entries = train(changed, clip, now, seed, device, output, (settings, ablation, seed))
            result, per_class = evaluate(changed, clip, model, now, device)
            done.append({"seed": seed, "ablation": ablation, **result, "parameters": sum(p.numel() for p in model.learned().values()), "seconds": round(time.time() - at, 2), "per_class": per_class.tolist()})
            log += entries
            if first:
                if len(done) == 1:
                    save_checkpoint(changed, model, now, clip, output / "checkpoint.safetensors")
                data.write_json(progress, {"settings": settings, "runs": done, "log": log})
                (output / "resume.pt").unlink(missing_ok=True)
            if dist.is_initialized():
                dist.barrier()
            say(f"{title(ablation)}, seed {seed}: mAP {result['mAP']:.2f}, {done[-1]['seconds']:.0f} s")
    result = record(config, argv, clip, inputs, done, time.time() - began, device, settings)
    if first:
        data.write_atomically(output / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
        data.write_json(output / "metrics.json", result)
        progress.unlink(missing_ok=True)
    return result


def readable(photo):
    try:
        return bool(data.open_photo(photo))
    except Exception:  # Pillow raises many kinds for damaged files
        return False


def main(argv):
    began = time.time()
    config, device = set_up(parse(argv))
    output = Path(config.output or f"runs/sspa/{config.dataset}")
    for flag, paths in (("--predict", config.predict), ("--explain", config.explain)):
        photos = [photo for path in paths or () for photo in data.list_photos(path)]
        if photos and not any(readable(photo) for photo in photos):  # said before training, not after
            raise UsageError(f"{flag}: no photo could be read ({photos[0]}{' and others' if len(photos) > 1 else ''})")
    if config.checkpoint:
        use_checkpoint(config, argv, device, output, began)
        return
    result = finished(config, output)
    if result is None or config.predict or config.explain:
        check_writable(output)
    if result is None:
        result = train_and_record(config, argv, device, output, began)
    else:
        say(f"{output} is finished; --overwrite redoes it")
    print(table(result), file=sys.stderr if config.predict or config.explain else sys.stdout)
    if config.predict or config.explain:
        show(config, device, output, output / "checkpoint.safetensors")


def show(config, device, output, checkpoint, names=None):
    """--predict and --explain with a checkpoint"""
    config, clip, stored = open_checkpoint(config, checkpoint, device, names)
    if config.explain and config.branches == "global":
        raise UsageError("--explain draws the regional branch, which --branches global leaves out")
    model = restore(config, clip, stored, device)
    if clip.name == "scenes":
        say("CLIP is the scenes toy here, trained on drawn pictures: what it says of photographs means nothing")
    if config.predict:
        predict(config, clip, model, stored.names, device, output)
    if config.explain:
        explain(config, clip, model, stored.names, device, output)


def use_checkpoint(config, argv, device, output, began):
    """--checkpoint: score it (--eval-only), tag photos with it (--predict), look into it (--explain). Trains nothing."""
    if not (config.eval_only or config.predict or config.explain):
        raise UsageError("--checkpoint needs --eval-only, --predict PATH or --explain PATH")
    if config.eval_only and config.output and (output / "metrics.json").is_file() and not config.overwrite:
        raise UsageError(f"{output} holds a finished run; choose another --output, or add --overwrite")
    names = names_of(config) if config.labels or config.eval_only else None
    if config.eval_only:
        trained, clip, stored = open_checkpoint(config, config.checkpoint, device, names)
        inputs = load_inputs(trained, clip, names, with_training=False)._replace(texts=stored.texts)  # before the tuned tower takes the place of CLIP's
        result, per_class = evaluate(trained, clip, restore(trained, clip, stored, device), inputs, device)
        result = record(trained, argv, clip, inputs, [{"seed": stored.settings["seed"][0], "ablation": "none", **result, "per_class": per_class.tolist()}], time.time() - began, device, f"evaluation of {config.checkpoint}")
        if config.output:
            check_writable(output)
            data.write_json(output / "metrics.json", result)
        print(table(result), file=sys.stderr if config.predict or config.explain else sys.stdout)
    if config.predict or config.explain:
        show(config, device, output, config.checkpoint, names)


if __name__ == "__main__":
    # the focused loss makes gradients whose squares are below 1e-38; on a CPU such numbers make every step many times slower
    torch.set_flush_denormal(True)
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # photo names of any bytes, labels of any script
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UsageError as error:
        say(f"sspa.py: {error}")
        sys.exit(2)
    except Diverged as error:
        say(f"sspa.py: {error}")
        sys.exit(3)
    except KeyboardInterrupt:
        say("sspa.py: interrupted; the same command goes on from the last saved epoch")
        sys.exit(130)
    except BrokenPipeError:  # | head: nothing more is wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
