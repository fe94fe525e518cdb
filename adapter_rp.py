"""RP, "Text as Image: Learning Transferable Adapter for Multi-Label Classification" (arXiv 2312.04160), in one file.

CLIP puts texts and images in one space. So a small adapter that learns to read labels off TEXT embeddings can label IMAGES: no photo
and no manual label is used in training. Random perturbation (fresh noise on the text embeddings in every step) makes it carry
over the gap between the two. Shapes: N texts or images, B batch, C labels, D CLIP width, H hidden width, R runs side by side
(one for each seed and noise strength).

The method, part by part, in the paper's order        where
    frozen CLIP embeddings of texts         [N, D]    load_inputs; data.embed_texts
    # RP: random perturbation  t + eps      [B, D]    perturb_reference, perturb_fused
    # RP: adapter                     [B, D]->[B, H]  Adapter.features
    # RP: label classifiers           [B, H]->[B, C]  Adapter.classifier
    # RP: loss                                        asymmetric_loss_*, bce_loss_*, ranking_loss_*, classifier_loss_*
    # RP: inference on images, no noise               score

    python adapter_rp.py --noise-std 0.15 0 --seed 0 1 2 3 4         under a minute: the built-in scenes, with and without noise
    python adapter_rp.py --labels words.txt --predict photos/        tags photos with your own words (CLIP "scenes" is a toy:
        --backbone ViT-B-16                                           add this for real photographs; needs open_clip's weights)
    python adapter_rp.py --features FILE.npz --noise-std 0 0.15      embeddings of any other encoder pair, 1 to 2 minutes

What the paper's abstracts fix: both CLIP encoders frozen, only the adapter learns; noise on the text embeddings in training only; the
embeddings' magnitude matters; texts from a language model told to write sentences for label sets; no manual data. The full text was
not at hand. Everything below is ours or taken from the field, and a flag changes it:

    D1  --noise-law gaussian     gaussian noise; standard deviation relative to the mean text norm, so that one number means the
                                 same on raw and unit embeddings ([field]: CoMC, LaFTer use 0.1 on unit embeddings)         [choice]
    D2  --noise-std 0.15         its strength; never chosen by held-out text, which always prefers none                     [choice]
    D3  --normalize              off: raw embeddings; on: normalise, add noise, do not normalise again   direction [paper], [choice]
    D4  --adapter mlp            D -> H -> C with ReLU; linear: one bias-free layer ([field]: CoMC)                         [choice]
    D5  --hidden 2               H = 2 D                                                                                    [choice]
    D6  --head per-label         a classifier a label; label-embedding: cosine of the adapted embedding (with a residual
                                 connection) with the label's text embedding, learned scale and bias, open to new labels    [choice]
    D7  --loss asymmetric        gamma- 4, gamma+ 0, clip 0 [author]; bce, ranking with margin 1 [field]
    D8  --lr 1e-3 --epochs 30    AdamW, weight decay 1e-4, cosine to 0, batch 512; starting values, no search                 [choice]
    D9  --zero-shot-weight 0     share of zero-shot CLIP in the score: sigmoid of the cosines standardised over labels      [choice]
    D10 "a photo of a {name}."   the prompt of the zero-shot baseline and of label embeddings                               [field]

In Python, three lines (noise of strength 0.1 on unit embeddings, seeded):

>>> import torch, adapter_rp
>>> text_embeddings = torch.eye(4)
>>> adapter_rp.perturb(text_embeddings, 0.1, "gaussian", 1.0, torch.Generator().manual_seed(0)).shape
torch.Size([4, 4])
"""
import argparse
import dataclasses
import hashlib
import json
import math
import platform
import os
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
    dataset: str = option("scenes", "labelled test photos", choices=data.DATASETS)
    data_root: str = option("data", "folder that holds the datasets")
    download: bool = option(False, "fetch voc2007 (870 MB) into --data-root if it is not there")
    difficult: str = option("ignore", "voc2007: labels seen only on difficult objects become", choices=("ignore", "negative", "positive"))
    unlabelled: str = option("keep", "coco2014, nuswide: photos without any label", choices=("keep", "drop"))
    validation: str = option("train", "pa100k, peta, mlrsnet: validation photos join training, or are dropped", choices=("train", "drop"))
    partition: int = option(0, "rapv1, peta: which of the owners' five partitions", choices=(0, 1, 2, 3, 4))
    split_seed: int = option(0, "mlrsnet, ucm, folder: draws the split where none is published")
    features: str = option(None, "ready-made embeddings, one .npz (layout: data.load_features); replaces --dataset and CLIP", metavar="FILE")
    texts: str = option(None, 'training texts, JSON lines {"text": ..., "labels": [...]}, plain or .gz', metavar="FILE")
    captions: str = option(None, "training texts, COCO captions JSON or one caption a line; labels by noun matching", metavar="FILE")
    text_count: int = option(None, "so many training texts: made here (default: 8000), or drawn from a file's by a fixed seed, fewer among more (default: all)", metavar="N")
    labels: str = option(None, "label file, one name a line (default: the dataset's own labels)", metavar="FILE")
    limit: int = option(None, "only the first N texts and test photos", metavar="N")
    held_out_text: float = option(0.0, "share of the texts kept out of training and scored, for choosing lr and epochs")
    # CLIP
    backbone: str = option(None, "open_clip name, or scenes (default: scenes for scenes, else ViT-B-16)")
    pretrained: str = option(None, "open_clip tag, a file, or none for random weights (default: openai)")
    resolution: int = option(None, "pixels (default: the backbone's own)")
    precision: str = option("fp32", "of the CLIP towers", choices=("fp32", "bf16", "fp16"))
    # the method
    noise_law: str = option("gaussian", "[choice D1]", choices=("gaussian", "uniform", "sphere", "none"))
    noise_std: tuple = option((0.15,), "[choice D2] one or more; per coordinate, times the mean text norm; order: normalise (if asked), add noise, do not "
                              "renormalise; the first is the main one", nargs="+", type=float)
    normalize: bool = option(False, "[choice D3] unit embeddings instead of raw ones")
    adapter: str = option("mlp", "[choice D4]", choices=("mlp", "linear"))
    hidden: float = option(2.0, "[choice D5] hidden width in units of D")
    head: str = option("per-label", "[choice D6]", choices=("per-label", "label-embedding"))
    loss: str = option("asymmetric", "[author D7]", choices=("asymmetric", "bce", "ranking"))
    gamma_neg: float = option(4.0, "[author D7] focusing exponent of absent labels")
    gamma_pos: float = option(0.0, "[author D7] focusing exponent of present labels")
    clip: float = option(0.0, "[author D7] probability subtracted from absent labels")
    margin: float = option(1.0, "[field D7] of the ranking loss, in logits")
    lr: float = option(1e-3, "[choice D8] AdamW, cosine to 0")
    weight_decay: float = option(1e-4, "[choice D8]")
    epochs: int = option(30, "[choice D8]")
    batch_size: int = option(512, "[choice D8] texts a step")
    zero_shot_weight: float = option(0.0, "[choice D9] share of zero-shot CLIP in the score, 0 to 1")
    seed: tuple = option((0,), "one or more; all train at once", nargs="+", type=int)
    impl: str = option("fused", "fast path, or the plain formulas", choices=("fused", "reference"))
    # running
    gpu: int = option(None, "GPU number (default: 0 if there is one)", metavar="N")
    cpu: bool = option(False, "run on the CPU")
    workers: int = option(2, "threads that decode photos")
    cache: str = option("runs/cache", "folder of cached embeddings")
    output: str = option(None, "folder of results (default: runs/rp/<dataset>)", metavar="DIR")
    overwrite: bool = option(False, "redo a finished run")
    eval_only: bool = option(False, "score --checkpoint on the test photos, train nothing")
    checkpoint: str = option(None, "adapter to use instead of training", metavar="FILE")
    predict: tuple = option(None, "photos or folders to tag: one JSON line a photo on stdout, and a contact sheet", nargs="+", metavar="PATH")
    threshold: float = option(0.5, "a label becomes a tag from this score on")
    top_k: int = option(None, "the K strongest labels become tags, instead of --threshold", metavar="K")
    quiet: bool = option(False, "no progress bar")


# which settings change what is learnt or scored; the others may differ when a finished run is asked for again
RESULT_SETTINGS = [f.name for f in dataclasses.fields(Config) if f.name not in (
    "download", "gpu", "cpu", "workers", "cache", "output", "overwrite", "eval_only", "checkpoint", "predict", "threshold", "top_k", "quiet")]


RESUME_SECONDS = float(os.environ.get("RESUME_SECONDS", 5))  # an interrupted training loses at most this much, and the epoch it was in


TRAINING_SETTINGS = ("noise_law", "normalize", "adapter", "hidden", "head", "loss", "gamma_neg", "gamma_pos", "clip", "margin", "lr", "weight_decay", "epochs", "batch_size",
                     "impl", "precision")


class Diverged(Exception):
    """The loss is no longer a number."""


# --- RP: random perturbation ------------------------------------------------------------------------------------------

def perturb_reference(embeddings, noise_std, law, mean_norm, generator):
    """Text embeddings with fresh noise: t + sigma n, sigma = noise_std * mean_norm.  [paper: the idea; choice D1: the law]

    embeddings: [..., D]; noise_std: float, or a tensor that broadcasts against embeddings (several strengths of the same draw);
    law: "gaussian" (unit variance per coordinate), "uniform" (the same variance), "sphere" (random direction, length sqrt(D)), "none";
    mean_norm: float, mean embedding norm over the whole training set; generator: torch.Generator on the embeddings' device.
    Returns a new tensor of the broadcast shape. Raises ValueError for another law.
    """
    if law == "none":
        noise = torch.zeros_like(embeddings)
    elif law == "gaussian":
        noise = torch.randn(embeddings.shape, generator=generator, dtype=embeddings.dtype, device=embeddings.device)
    elif law == "uniform":
        noise = (2 * torch.rand(embeddings.shape, generator=generator, dtype=embeddings.dtype, device=embeddings.device) - 1) * math.sqrt(3)
    elif law == "sphere":
        noise = torch.randn(embeddings.shape, generator=generator, dtype=embeddings.dtype, device=embeddings.device)
        noise = noise / noise.norm(dim=-1, keepdim=True) * math.sqrt(embeddings.shape[-1])
    else:
        raise ValueError(f"unknown noise law {law!r}: gaussian, uniform, sphere or none")
    return embeddings + noise_std * mean_norm * noise


def perturb_fused(embeddings, noise_std, law, mean_norm, generator):
    """Same as perturb_reference, same draws. Noise is drawn into one buffer; with one strength it is scaled and added to in place, with several the
    one draw is broadcast."""
    if law not in ("gaussian", "uniform", "sphere", "none"):
        raise ValueError(f"unknown noise law {law!r}: gaussian, uniform, sphere or none")
    if law == "none":
        return embeddings + torch.zeros_like(torch.as_tensor(noise_std, dtype=embeddings.dtype, device=embeddings.device))
    noise = torch.empty_like(embeddings, requires_grad=False, memory_format=torch.contiguous_format)
    if law == "uniform":
        noise.uniform_(0, 1, generator=generator).mul_(2).sub_(1).mul_(math.sqrt(3))
    else:
        noise.normal_(generator=generator)
    if law == "sphere":
        noise.mul_(math.sqrt(embeddings.shape[-1]) / noise.norm(dim=-1, keepdim=True))
    if isinstance(noise_std, torch.Tensor):
        return torch.addcmul(embeddings, noise, noise_std * mean_norm)
    if embeddings.requires_grad:
        return torch.add(embeddings, noise, alpha=noise_std * mean_norm)
    return noise.mul_(noise_std * mean_norm).add_(embeddings)


perturb = perturb_fused


# --- RP: adapter and label classifiers --------------------------------------------------------------------------------

class Adapter(nn.Module):
    """R adapters side by side, one a run. Every parameter has the run as its first axis; run r starts from its own seed, so it learns
    the same whether it trains alone or beside others.

    per-label head:        logits = relu(x W1 + b1) W2 + b2            (linear: x W)                      [choice D4]
    label-embedding head:  logits = scale * cos(x + f(x), label) + bias, f the MLP or linear layer D -> D  [choice D6]
    """

    def __init__(self, width, classes, seeds, kind="mlp", head="per-label", hidden=2.0):
        super().__init__()
        self.kind, self.head = kind, head
        inner, out = max(1, round(hidden * width)), classes if head == "per-label" else width
        shapes = {"w1": (inner, width), "b1": (inner, width), "w2": (out, inner), "b2": (out, inner)} if kind == "mlp" else {"w2": (out, width)}
        drawn = {name: [] for name in shapes}
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed * 100_003)
            for name, (rows, fan_in) in shapes.items():
                size = (rows, fan_in) if name[0] == "w" else (rows,)
                drawn[name].append((2 * torch.rand(size, generator=generator) - 1) / math.sqrt(fan_in))  # PyTorch's own default for linear layers
        for name, tensors in drawn.items():
            self.register_parameter(name, nn.Parameter(torch.stack(tensors)))  # [R, ...]
        if head == "label-embedding":
            self.log_scale = nn.Parameter(torch.full((len(seeds),), math.log(20.0)))
            self.bias = nn.Parameter(torch.zeros(len(seeds)))

    def features(self, x):
        """[R, N, D] -> what the classifiers multiply: [R, N, H] (linear: x itself), or the scaled unit embedding [R, N, D]."""
        hidden = x
        if self.kind == "mlp":
            hidden = torch.relu(torch.baddbmm(self.b1[:, None], x, self.w1.mT))
        if self.head == "per-label":
            return hidden
        change = torch.baddbmm(self.b2[:, None], hidden, self.w2.mT) if self.kind == "mlp" else hidden @ self.w2.mT
        return self.log_scale.exp()[:, None, None] * F.normalize(x + change, dim=-1)

    def classifier(self, label_embeddings):
        """(weight [R, C, H or D], bias [R, C]). label_embeddings: [C, D], used by the label-embedding head only."""
        if self.head == "label-embedding":
            labels = F.normalize(label_embeddings, dim=-1)
            return labels.expand(len(self.bias), -1, -1), self.bias[:, None].expand(-1, len(labels))
        return self.w2, self.b2 if self.kind == "mlp" else self.w2.new_zeros(self.w2.shape[:2])

    def forward(self, x, label_embeddings=None):
        """Logits [R, N, C] of embeddings [R, N, D]."""
        weight, bias = self.classifier(label_embeddings)
        return self.features(x) @ weight.mT + bias[:, None]


# --- RP: losses -------------------------------------------------------------------------------------------------------
# Summed over labels, averaged over the batch (the last axis but one); over a leading run axis they add up, so that each run's
# gradient is its own. Targets: 1 present, 0 absent, -1 ignored.

def asymmetric_loss_reference(logits, targets, gamma_neg=4.0, gamma_pos=0.0, clip=0.0):
    """Asymmetric loss, differentiated through its weights too.  [author D7]

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


def asymmetric_loss_fused(logits, targets, gamma_neg=4.0, gamma_pos=0.0, clip=0.0):
    """Same as asymmetric_loss_reference. Loss and gradient in one pass over cache-sized blocks; saved for backward: one tensor like logits."""
    return _AsymmetricLoss.apply(logits, targets, gamma_neg, gamma_pos, clip)


def bce_loss_reference(logits, targets):
    """Binary cross-entropy.  [field D7]  logits, targets: [..., B, C] -> scalar"""
    loss = F.binary_cross_entropy_with_logits(logits, (targets == 1).to(logits.dtype), reduction="none")
    return torch.where(targets >= 0, loss, 0).sum() / logits.shape[-2]


def bce_loss_fused(logits, targets):
    """Same as bce_loss_reference: the asymmetric loss with both exponents 0."""
    return _AsymmetricLoss.apply(logits, targets, 0.0, 0.0, 0.0)


def ranking_loss_reference(logits, targets, margin=1.0):
    """Every present label should lead every absent one by the margin: sum over pairs of relu(margin - z+ + z-).  [field D7]
    logits, targets: [..., B, C] -> scalar. Memory B x C x C."""
    pairs = (targets == 1)[..., :, None] & (targets == 0)[..., None, :]
    return (torch.relu(margin - logits[..., :, None] + logits[..., None, :]) * pairs).sum() / logits.shape[-2]


def ranking_loss_fused(logits, targets, margin=1.0):
    """Same as ranking_loss_reference. Only the rows of present labels are formed: B x P x C, P the most labels a text has."""
    most = max(1, int((targets == 1).sum(-1).max()))
    present, column = (targets == 1).to(torch.int8).topk(most, dim=-1)                       # [..., B, P]
    pairs = (present == 1)[..., :, None] & (targets == 0)[..., None, :]                      # [..., B, P, C]
    return (torch.relu(margin - logits.gather(-1, column)[..., :, None] + logits[..., None, :]) * pairs).sum() / logits.shape[-2]


# --- RP: classifiers and loss together, the hot path ------------------------------------------------------------------

def classifier_loss_reference(hidden, weight, bias, targets, gamma_neg=4.0, gamma_pos=0.0, clip=0.0):
    """Asymmetric loss of hidden W^T + b. hidden: [R, B, H]; weight: [R, C, H]; bias: [R, C]; targets: [R, B, C] -> scalar (runs add up)"""
    return asymmetric_loss_reference(hidden @ weight.mT + bias[:, None], targets, gamma_neg, gamma_pos, clip)


class _ClassifierLoss(torch.autograd.Function):
    BLOCK = 2 ** 18  # logits alive at once

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, gamma_neg, gamma_pos, clip, with_gradient):
        runs, batch, _ = hidden.shape
        classes, total = weight.shape[1], 0.0
        needed = [with_gradient and need for need in ctx.needs_input_grad[:3]]
        d_hidden = torch.zeros_like(hidden) if needed[0] else None
        d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if needed[1] else None
        d_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if needed[2] else None
        chunk = max(1, _ClassifierLoss.BLOCK // (runs * batch))
        for start in range(0, classes, chunk):
            part = slice(start, start + chunk)
            z = torch.baddbmm(bias[:, None, part], hidden, weight[:, part].mT)               # [R, B, chunk]
            total = total + _asymmetric_in_place(z, targets[:, :, part], gamma_neg, gamma_pos, clip)
            if needed[0]:
                d_hidden.baddbmm_(z, weight[:, part], alpha=1 / batch)
            if needed[1]:
                torch.mul(torch.bmm(z.mT, hidden), 1 / batch, out=d_weight[:, part])
            if needed[2]:
                d_bias[:, part] = z.sum(1) / batch
        ctx.save_for_backward(d_hidden, d_weight, d_bias)  # released before they are accumulated, so autograd takes them without a copy
        return total / batch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        unit = grad.item() == 1  # the usual case: spare a pass over the largest tensor
        return *(g if g is None or unit else g * grad for g in ctx.saved_tensors), None, None, None, None, None


def classifier_loss_fused(hidden, weight, bias, targets, gamma_neg=4.0, gamma_pos=0.0, clip=0.0):
    """Same as classifier_loss_reference. Not materialised: the B x C logits, their probabilities and their gradient. A chunk of labels at a
    time is multiplied out, turned in place into its own gradient, and multiplied into the gradients of hidden, weight and bias."""
    return _ClassifierLoss.apply(hidden, weight, bias, targets, gamma_neg, gamma_pos, clip, torch.is_grad_enabled())


def text_loss(config, adapter, x, targets, label_embeddings):
    """Loss of perturbed embeddings x [R, B, D] with targets [R, B, C], by --loss and --impl -> scalar"""
    fused = config.impl == "fused"
    weight, bias = adapter.classifier(label_embeddings)
    hidden = adapter.features(x)
    if config.loss == "ranking":
        return (ranking_loss_fused if fused else ranking_loss_reference)(hidden @ weight.mT + bias[:, None], targets, config.margin)
    exponents = (0.0, 0.0, 0.0) if config.loss == "bce" else (config.gamma_neg, config.gamma_pos, config.clip)
    if fused:
        return classifier_loss_fused(hidden, weight, bias, targets, *exponents)
    if config.loss == "bce":
        return bce_loss_reference(hidden @ weight.mT + bias[:, None], targets)
    return classifier_loss_reference(hidden, weight, bias, targets, *exponents)


# --- train ------------------------------------------------------------------------------------------------------------

class Inputs(NamedTuple):
    names: list                      # C label names
    label_embeddings: torch.Tensor   # [C, D]
    text_embeddings: torch.Tensor    # [N, D], None when nothing is trained
    text_labels: torch.Tensor        # int8 [N, C]
    image_embeddings: torch.Tensor   # [M, D], None without test photos
    image_labels: np.ndarray         # int8 [M, C]
    encoder: str                     # which encoder made the embeddings
    key: str                         # its identity, kept in the checkpoint
    texts_from: str                  # for the record
    policy: str                      # treatment of doubtful labels and unreadable photos


def prepared(config, embeddings):
    """--normalize; the same for texts in training and images at inference."""
    return F.normalize(embeddings, dim=-1) if config.normalize else embeddings


def train(config, inputs, device, output):
    """All seeds and noise strengths at once, each run as if alone. -> (Adapter with R = seeds x strengths runs, held-out text mAP by run or None)

    Randomness of a run hangs on its seed and the epoch alone (shuffling, noise), so an interrupted training goes on exactly. Runs of one
    seed share their draws: strengths differ in nothing else. Raises Diverged when a loss is no longer finite.
    """
    seeds, strengths = config.seed, config.noise_std
    perturb = perturb_fused if config.impl == "fused" else perturb_reference
    x_all, y_all = prepared(config, inputs.text_embeddings).to(device), inputs.text_labels.to(device)
    held = torch.zeros(len(x_all), dtype=torch.bool)
    if config.held_out_text:
        if len(x_all) < 2:
            raise UsageError("--held-out-text needs at least two texts")
        held[torch.randperm(len(x_all), generator=torch.Generator().manual_seed(0))[:min(len(x_all) - 1, max(1, round(config.held_out_text * len(x_all))))]] = True
    x_held, y_held = x_all[held.to(device)], y_all[held.to(device)]
    x_all, y_all = x_all[~held.to(device)], y_all[~held.to(device)]
    count, width = x_all.shape
    mean_norm = x_all.norm(dim=-1).mean().item()
    labels = inputs.label_embeddings.to(device)
    adapter = Adapter(width, len(inputs.names), [seed for seed in seeds for _ in strengths], config.adapter, config.head, config.hidden).to(device)
    if config.head == "label-embedding":
        cosine = (F.normalize(x_all[:1000], dim=-1) @ F.normalize(labels, dim=-1).T).mean()
        adapter.bias.data.fill_(math.log(0.1 / 0.9) - 20 * cosine)  # mean probability 0.1 at the start
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=config.impl == "fused")
    sigma = strengths[0] if len(strengths) == 1 else torch.tensor(strengths, dtype=x_all.dtype, device=device)[:, None, None]  # [K, 1, 1]
    steps = -(-count // config.batch_size)

    def draw(seed, epoch, on):
        return torch.Generator(on).manual_seed(seed * 100_003 + epoch + 1)

    resume, first, log, settings = output / "resume.pt", 0, [], settings_of(config)
    if resume.is_file():
        first, log = load_resume(resume, settings, adapter, optimiser)
    save_at = time.time() + RESUME_SECONDS
    bar = tqdm(range(first, config.epochs), initial=first, total=config.epochs, desc="training", unit="epoch", disable=config.quiet or not sys.stderr.isatty())
    for epoch in bar:
        orders = [torch.randperm(count, generator=draw(seed, epoch, "cpu")).to(device) for seed in seeds]
        generators = [draw(seed, epoch, device) for seed in seeds]
        total, began = 0.0, time.time()
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (config.epochs * steps)))
            rows = [order[step * config.batch_size:(step + 1) * config.batch_size] for order in orders]
            x = torch.cat([perturb(x_all[row][None], sigma, config.noise_law, mean_norm, generator)           # [K, B, D] a seed
                           for row, generator in zip(rows, generators)])                                      # [R, B, D]
            targets = y_all[torch.stack(rows)][:, None].expand(-1, len(strengths), -1, -1).flatten(0, 1)      # [R, B, C]
            optimiser.zero_grad()
            loss = text_loss(config, adapter, x, targets, labels)
            loss.backward()
            optimiser.step()
            total += loss.detach()
        total = float(total) / steps / len(adapter.w2)
        log.append({"epoch": epoch + 1, "loss": total, "seconds": round(time.time() - began, 3)})
        if not math.isfinite(total):
            raise Diverged(f"training diverged in epoch {epoch + 1} (loss {total}); lower --lr (now {config.lr:g})")
        bar.set_postfix(loss=f"{total:.3f}")
        if time.time() > save_at and epoch + 1 < config.epochs:
            began = time.time()
            save_resume(resume, settings, adapter, optimiser, log)
            save_at = time.time() + max(RESUME_SECONDS, 20 * (time.time() - began))
    finite = all(bool(logits.isfinite().all()) for logits in all_logits(adapter, x_all[:512], labels))
    if not finite or not all(bool(p.isfinite().all()) for p in adapter.parameters()):
        raise Diverged(f"training diverged in the last epoch; lower --lr (now {config.lr:g})")
    data.write_atomically(output / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    held_out = None
    if len(x_held):
        held_out = [metrics.mean_average_precision(logits.cpu().numpy(), y_held.cpu().numpy()) for logits in all_logits(adapter, x_held, labels)]
    return adapter, held_out


def settings_of(config):
    """What decides the result: the settings, and the content of the files they name. JSON text."""
    values = {name: getattr(config, name) for name in RESULT_SETTINGS}
    for name in ("features", "texts", "captions", "labels", "pretrained"):
        if values[name] and Path(values[name]).is_file():
            values[name + "_hash"] = hashlib.blake2b(Path(values[name]).read_bytes(), digest_size=8).hexdigest()
    if config.dataset == "scenes" and not config.features:
        values["scenes_hash"] = data.scenes_digest()
    if config.dataset == "folder":
        values["folder_hash"] = data.folder_digest(config.data_root)
    return json.dumps(values, sort_keys=True)


def save_resume(path, settings, adapter, optimiser, log):
    stream = BytesIO()
    torch.save({"settings": settings, "adapter": adapter.state_dict(), "optimiser": optimiser.state_dict(), "log": log}, stream)
    data.write_atomically(path, stream.getvalue())


def load_resume(path, settings, adapter, optimiser):
    """-> (epochs done, log). A file of other settings, or one that cannot be read, is renamed to *.old with one line."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["settings"] != settings:
            raise ValueError("it belongs to other settings")
        adapter.load_state_dict(state["adapter"])
        optimiser.load_state_dict(state["optimiser"])
    except Exception as error:  # a damaged archive fails in many ways inside torch
        os.replace(path, f"{path}.old")
        say(f"{path}: not resumed ({str(error).splitlines()[0][:120]}), kept as {path.name}.old; training starts anew")
        return 0, []
    say(f"going on after epoch {len(state['log'])}")
    return len(state["log"]), state["log"]


# --- evaluate ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def all_logits(adapter, x, label_embeddings, rows=8192):
    """Logits of the same embeddings [N, D] for every run, one run at a time -> iterator over [N, C]"""
    for run in range(len(adapter.w2)):
        parameters = {name: parameter[run:run + 1] for name, parameter in adapter.named_parameters()}
        yield torch.cat([torch.func.functional_call(adapter, parameters, (part[None], label_embeddings))[0] for part in x.split(rows)])


def zero_shot(image_embeddings, label_embeddings):
    """Cosine with "a photo of a {name}."  [field D10]  -> [N, C]"""
    return F.normalize(image_embeddings, dim=-1) @ F.normalize(label_embeddings, dim=-1).T


def mixed_scores(config, logits, image_embeddings, label_embeddings):
    """Scores in 0..1 from logits [N, C]; --zero-shot-weight w adds w * sigmoid of the cosines, standardised over a photo's labels.  [choice D9]"""
    scores = torch.sigmoid(logits)
    if config.zero_shot_weight:
        cosine = zero_shot(image_embeddings, label_embeddings)
        spread = cosine.std(-1, keepdim=True, correction=0).clamp_min(1e-6)
        scores = torch.lerp(scores, torch.sigmoid((cosine - cosine.mean(-1, keepdim=True)) / spread), config.zero_shot_weight)
    return scores


def evaluate(config, adapter, inputs, device):
    """Scores every run on the test photos -> (list of dicts by run, zero-shot mAP, per-class AP [R, C])"""
    images, labels = inputs.image_embeddings.to(device), inputs.label_embeddings.to(device)
    truth, results, per_class = inputs.image_labels, [], []
    for logits in all_logits(adapter, prepared(config, images), labels):
        if not logits.isfinite().all():
            raise Diverged("the adapter's logits on the test photos are not finite; lower --lr")
        scores = mixed_scores(config, logits.double(), images.double(), labels.double()).cpu().numpy()
        # a sigmoid rounds large logits to ties: rank by the logits themselves where nothing is mixed in
        ranks = scores if config.zero_shot_weight else logits.cpu().numpy()
        ap = metrics.average_precision(ranks, truth)
        per_class.append(ap)
        results.append({"mAP": metrics.mean_average_precision(ranks, truth), "mAP_interpolated": metrics.mean_average_precision(ranks, truth, interpolated=True),
                        "threshold_0.5": metrics.multilabel_f1(scores, truth), "top_3": metrics.multilabel_f1(scores, truth, top_k=min(3, truth.shape[1]))})
    return results, metrics.mean_average_precision(zero_shot(images, labels).cpu().numpy(), truth), np.array(per_class)


# --- predict ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def predict(config, adapter, names, clip, label_embeddings, device, output):
    """Tags photos: one JSON line a photo on stdout, strongest label first, and predictions.png in the output folder."""
    photos = [photo for path in config.predict for photo in data.list_photos(path)]
    embeddings, kept = data.embed_photos(clip, photos, config.cache, workers=config.workers, quiet=config.quiet)
    photos, images, labels = [photos[n] for n in kept], embeddings.to(device), label_embeddings.to(device)
    logits = adapter(prepared(config, images)[None], labels)[0]
    scores = mixed_scores(config, logits, images, labels).cpu().numpy()
    orders = [np.argsort(-row, kind="stable") for row in scores]
    tags = [[int(k) for k in (order[:config.top_k] if config.top_k else [k for k in order if row[k] >= config.threshold])] for order, row in zip(orders, scores)]
    sheet = data.contact_sheet(photos, names, scores, tags, output / "predictions.png")  # before the first line: a reader like head may leave early
    for photo, row, order, chosen in zip(photos, scores, orders, tags):
        print(json.dumps({"photo": str(photo), "labels": [names[k] for k in chosen], "scores": {names[k]: round(float(row[k]), 4) for k in order}}, ensure_ascii=False))
    say(f"contact sheet: {sheet}" + (f" (the first 48 of {len(photos)} photos)" if len(photos) > 48 else ""))


# --- inputs -----------------------------------------------------------------------------------------------------------

def names_of(config):
    """The label names of a run: --labels, or the dataset's own."""
    if config.labels:
        return data.read_labels(config.labels)
    if config.features:
        return data.load_features(config.features)["label_names"]
    return data.label_names(config.dataset, config.data_root)


def policies_of(config):
    """What a dataset's loader may be told about doubtful labels and splits."""
    return {name: getattr(config, name) for name in ("difficult", "unlabelled", "validation", "partition", "split_seed")}


def open_clip_of(config, device):
    backbone = config.backbone or ("scenes" if config.dataset == "scenes" else "ViT-B-16")
    return data.load_clip(backbone, config.pretrained, device, config.precision, config.resolution)


def load_inputs(config, clip, names, with_texts=True):
    """Embeddings and labels of texts and test photos -> Inputs. clip: data.Clip, or None with --features."""

    def drawn(count):  # rows of the texts that are used
        rows = np.random.default_rng(0).permutation(count)[:config.text_count] if config.text_count else np.arange(count)
        return np.sort(rows)[:config.limit]

    if config.features:
        arrays = data.load_features(config.features)
        unknown = [name for name in names if name not in arrays["label_names"]]
        if unknown:
            raise UsageError(f"--labels names '{unknown[0]}', which {config.features} has no embedding for (it has {', '.join(arrays['label_names'][:30])})")
        columns = [arrays["label_names"].index(name) for name in names]
        rows = drawn(len(arrays["text_labels"]))
        text_labels = arrays["text_labels"][rows][:, columns]
        usable = (text_labels == 1).any(1)
        if with_texts and not usable.any():
            raise UsageError(f"features file {config.features}: no text is labelled with any of the {len(names)} labels")
        return Inputs(names, torch.from_numpy(arrays["label_embeddings"][columns]), torch.from_numpy(arrays["text_embeddings"][rows][usable]),
                      torch.from_numpy(text_labels[usable]), torch.from_numpy(arrays["image_embeddings"][:config.limit]),
                      arrays["image_labels"][:config.limit, columns], "embeddings in " + Path(config.features).name, "features", "embeddings file", "labels of -1 ignored")
    own = data.label_names(config.dataset, config.data_root)
    photos = None  # looked for first: missing data is said before minutes are spent on texts
    if set(names) <= set(own):
        photos = data.load_photos(config.dataset, config.data_root, "test", config.limit, config.download, **policies_of(config))
    label_embeddings = data.embed_texts(clip, [f"a photo of a {name}." for name in names], config.cache)
    text_embeddings = text_labels = None
    texts_from = "none"
    if with_texts:
        if config.texts:
            texts, labels = data.read_texts(config.texts, names)
            texts_from = Path(config.texts).name
        elif config.captions:
            texts, labels = data.read_captions(config.captions, names, data.synonyms_of(names, config.dataset))
            texts_from = Path(config.captions).name
        else:
            texts, labels, texts_from = data.default_texts(config.dataset, names, config.text_count or 8000)
        rows = drawn(len(texts))
        texts, labels = [texts[row] for row in rows], labels[rows]
        never = [name for name, seen in zip(names, (labels == 1).any(0)) if not seen]
        if never:
            say(f"no training text has the label{'s' if len(never) > 1 else ''} {', '.join(never[:10])}: nothing can be learnt about {'them' if len(never) > 1 else 'it'}")
        text_embeddings, text_labels = data.embed_texts(clip, texts, config.cache), torch.from_numpy(labels)
    image_embeddings = image_labels = None
    policy = "no test photos: the dataset does not know these labels"
    if photos is not None:
        image_embeddings, kept = data.embed_photos(clip, photos.photos, config.cache, workers=config.workers, quiet=config.quiet)
        image_labels = photos.labels[kept][:, [own.index(name) for name in names]]
        policy = f"{photos.policy}; {len(photos.photos) - len(kept)} unreadable photos left out"
    return Inputs(names, label_embeddings, text_embeddings, text_labels, image_embeddings, image_labels, clip.name, clip.key, texts_from, policy)


# --- record -----------------------------------------------------------------------------------------------------------

def save_checkpoint(config, adapter, inputs, path):
    """The learned tensors of the first run; settings, class order and the encoder's identity in the metadata."""
    tensors = {name: parameter.detach()[0].cpu().contiguous() for name, parameter in adapter.named_parameters()}
    metadata = {"method": "rp", "names": json.dumps(inputs.names), "encoder": inputs.encoder, "encoder_key": inputs.key, "settings": settings_of(config)}
    data.write_atomically(path, to_safetensors(tensors, metadata))


def load_checkpoint(config, path):
    """-> (Adapter of one run, config with the checkpoint's own architecture, metadata). Raises UsageError for anything else."""
    try:
        with safe_open(str(path), "pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"checkpoint {path}: cannot be read ({error})") from None
    if metadata.get("method") != "rp":
        raise UsageError(f"checkpoint {path}: not written by adapter_rp.py")
    settings, names = json.loads(metadata["settings"]), json.loads(metadata["names"])
    # how it was trained is the checkpoint's to say; the flags say what it is used on
    config = dataclasses.replace(config, **{name: settings[name] for name in TRAINING_SETTINGS}, seed=(settings["seed"][0],), noise_std=(settings["noise_std"][0],),
                                 zero_shot_weight=config.zero_shot_weight or settings["zero_shot_weight"])
    for name in ("backbone", "pretrained", "resolution"):
        if getattr(config, name) is None:
            config = dataclasses.replace(config, **{name: settings[name]})
    if config.dataset == "scenes" and config.backbone is None and settings["dataset"] != "scenes":
        config = dataclasses.replace(config, backbone="ViT-B-16")
    width = tensors["w1" if config.adapter == "mlp" else "w2"].shape[1]
    adapter = Adapter(width, len(names), [0], config.adapter, config.head, config.hidden)
    adapter.load_state_dict({name: tensor[None] for name, tensor in tensors.items()})
    metadata.update(names=names, width=width)
    return adapter, config, metadata


def check_fits(path, metadata, names, head, key, encoder):
    """A checkpoint must be used with its own encoder and, with the per-label head, its own labels in their order. Raises UsageError."""
    if head == "per-label" and names != metadata["names"]:
        first = next((f"label {n + 1} is '{a}' there and '{b}' here" for n, (a, b) in enumerate(zip(metadata["names"], names)) if a != b),
                     f"it has {len(metadata['names'])} labels, not {len(names)}")
        raise UsageError(f"checkpoint {path}: trained for other labels or another order of them ({first}); pass the label file it was trained with, or train with --head label-embedding")
    if key != metadata["encoder_key"]:
        raise UsageError(f"checkpoint {path}: trained on embeddings of {metadata['encoder']}, not of {encoder}; pass the same --backbone, --pretrained and --resolution (or --features)")


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


def record(config, argv, inputs, results, zero_shot_map, per_class, held_out, seconds, device, settings):
    """The content of metrics.json: everything a reader needs to trace the number."""
    runs = [{"seed": seed, "noise_std": std} for seed in config.seed for std in config.noise_std]
    for n, run in enumerate(runs):
        run.update(results[n] if results else {"mAP": None})
        if held_out:
            run["held_out_text_mAP"] = held_out[n]
    main_setting = list(range(0, len(runs), len(config.noise_std)))  # every seed at the first strength
    mean, std = spread([runs[n]["mAP"] for n in main_setting]) if results else (None, None)
    classes = [{"name": name, "positives": int((inputs.image_labels[:, c] == 1).sum()), "ap": float(100 * per_class[main_setting, c].mean())}
               for c, name in enumerate(inputs.names)] if results else []
    return {
        "method": "rp", "dataset": Path(config.features).stem if config.features else config.dataset, "backbone": inputs.encoder, "impl": config.impl,
        "command": shlex.join(["python", "adapter_rp.py", *argv]), "commit": commit(), "seconds": round(seconds, 2), "mAP": mean, "mAP_std": std,
        "zero_shot_mAP": zero_shot_map, "seeds": list(config.seed), "runs": runs, "per_class": classes, "policy": inputs.policy, "texts": inputs.texts_from,
        "text_count": 0 if inputs.text_embeddings is None else len(inputs.text_embeddings),
        "photo_count": 0 if inputs.image_embeddings is None else len(inputs.image_embeddings), "label_count": len(inputs.names),
        "config": dataclasses.asdict(config), "settings": settings, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def table(result):
    """The result as a person reads it -> str"""
    strengths = list(dict.fromkeys(run["noise_std"] for run in result["runs"]))
    trained = f"trained on {result['text_count']:,} texts ({result['texts']}), no photo" if result["text_count"] else "not trained here"
    lines = [f"{result['dataset']}: {result['photo_count']:,} test photos, {result['label_count']} labels; {result['backbone']}; {trained}; {len(result['seeds'])} seed{'s' if len(result['seeds']) > 1 else ''}",
             "", f"{'':<34}{'mAP %':>14}{'CF1 %':>8}{'OF1 %':>8}" + (f"{'text mAP %':>12}" if "held_out_text_mAP" in result["runs"][0] else "")]
    if result["zero_shot_mAP"] is None:
        held_out = [run["held_out_text_mAP"] for run in result["runs"] if "held_out_text_mAP" in run]
        return lines[0] + "\n(no test photos for these labels: nothing to score)" + (f"\nmAP on held-out text: {np.mean(held_out):.2f}" if held_out else "")
    lines.append(f"{'zero-shot CLIP (cosine)' if result['config']['features'] is None else 'zero-shot (cosine)':<34}{result['zero_shot_mAP']:8.2f}")
    for strength in strengths:
        chosen = [run for run in result["runs"] if run["noise_std"] == strength]
        mean, std = spread([run["mAP"] for run in chosen])
        quiet = strength == 0 or result["config"]["noise_law"] == "none"
        lines.append(f"{'adapter, no noise' if quiet else f'adapter, noise {strength:g}':<34}{mean:8.2f} ±{std:4.2f}"
                     + "".join(f"{np.mean([run['threshold_0.5'][name] for run in chosen]):8.1f}" for name in ("CF1", "OF1"))
                     + (f"{np.mean([run['held_out_text_mAP'] for run in chosen]):12.2f}" if "held_out_text_mAP" in chosen[0] else ""))
    return "\n".join(lines)


# --- main -------------------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(prog="adapter_rp.py", description="RP: train an adapter on texts, label images with it (arXiv 2312.04160).",
                                     epilog="Read the file's docstring for the map from the paper to the code.")
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
    for bad, message in (
            (any(not 0 <= std < math.inf for std in config.noise_std), "--noise-std must be 0 or more"),
            (any(not 0 <= seed < 2 ** 40 for seed in config.seed), "--seed must be 0 or more"),
            (len(set(config.seed)) < len(config.seed) or len(set(config.noise_std)) < len(config.noise_std), "--seed and --noise-std must not repeat a value"),
            (config.epochs < 1 or config.batch_size < 1 or config.text_count is not None and config.text_count < 1, "--epochs, --batch-size and --text-count must be 1 or more"),
            (config.limit is not None and config.limit < 1, "--limit must be 1 or more"),
            (config.top_k is not None and config.top_k < 1, "--top-k must be 1 or more"),
            (not 0 <= config.zero_shot_weight <= 1 or not 0 <= config.held_out_text < 1 or not 0 <= config.clip < 1, "--zero-shot-weight, --held-out-text and --clip must lie in 0..1"),
            (not all(0 <= value < math.inf for value in (config.gamma_neg, config.gamma_pos, config.weight_decay, config.margin)) or not 0 < config.hidden < math.inf or not 0 < config.lr < math.inf,
             "--gamma-neg, --gamma-pos, --margin and --weight-decay must be 0 or more, --hidden and --lr above 0"),
            (config.eval_only and not config.checkpoint, "--eval-only needs --checkpoint FILE"),
            (bool(config.features) and bool(config.predict), "--features holds embeddings, not an encoder: photos cannot be tagged with it; leave --predict or --features out"),
            (bool(config.texts) and bool(config.captions), "--texts and --captions exclude each other; give one"),
            (bool(config.features) and bool(config.texts or config.captions), "--features brings its own texts; leave --texts and --captions out")):
        if bad:
            raise UsageError(message)
    return config


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
        for name in ("metrics.json", "resume.pt"):
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
    probe.unlink()


def main(argv):
    began = time.time()
    config = parse(argv)
    device = data.choose_device(config.gpu, config.cpu)
    output = Path(config.output or f"runs/rp/{Path(config.features).stem if config.features else config.dataset}")
    if config.predict:
        for path in config.predict:
            data.list_photos(path)
    if config.checkpoint:
        use_checkpoint(config, argv, device, output, began)
        return
    result = finished(config, output)
    if result is None or config.predict:
        check_writable(output)
    names = names_of(config)
    clip = None
    if result is None:
        clip = None if config.features else open_clip_of(config, device)
        inputs = load_inputs(config, clip, names)
        make_room(config, output)
        adapter, held_out = train(config, inputs, device, output)
        results, zero_shot_map, per_class = evaluate(config, adapter, inputs, device) if inputs.image_embeddings is not None else (None, None, None)
        result = record(config, argv, inputs, results, zero_shot_map, per_class, held_out, time.time() - began, device, settings_of(config))
        save_checkpoint(config, adapter, inputs, output / "checkpoint.safetensors")
        data.write_json(output / "metrics.json", result)
        (output / "resume.pt").unlink(missing_ok=True)
        result = data.read_json(output / "metrics.json", "result")
    else:
        say(f"{output} is finished; --overwrite redoes it")
    print(table(result), file=sys.stderr if config.predict else sys.stdout)
    if config.predict:
        adapter, config, _ = load_checkpoint(config, output / "checkpoint.safetensors")
        clip = clip or open_clip_of(config, device)
        predict(config, adapter.to(device), names, clip, data.embed_texts(clip, [f"a photo of a {name}." for name in names], config.cache), device, output)


def use_checkpoint(config, argv, device, output, began):
    """--checkpoint: score it (--eval-only), tag photos with it (--predict), or both. Trains nothing."""
    if not (config.eval_only or config.predict):
        raise UsageError("--checkpoint needs --eval-only or --predict PATH")
    given, path = config.output, config.checkpoint
    adapter, config, metadata = load_checkpoint(config, path)
    names = names_of(config) if config.labels or config.eval_only else metadata["names"]
    clip = None if config.features else open_clip_of(config, device)
    check_fits(path, metadata, names, config.head, "features" if config.features else clip.key, config.features or clip.name)
    adapter = adapter.to(device)
    if config.eval_only:
        inputs = load_inputs(config, clip, names, with_texts=False)._replace(text_embeddings=None)
        if inputs.image_embeddings is None:
            raise UsageError(f"--eval-only: {config.dataset} has no ground truth for all of these labels; --predict tags photos with them")
        if given and (output / "metrics.json").is_file() and not config.overwrite:
            raise UsageError(f"{output} holds a finished run; choose another --output, or add --overwrite")
        if inputs.image_embeddings.shape[1] != metadata["width"]:
            raise UsageError(f"checkpoint {path}: made for embeddings of width {metadata['width']}, not {inputs.image_embeddings.shape[1]}")
        results, zero_shot_map, per_class = evaluate(config, adapter, inputs, device)
        result = record(config, argv, inputs, results, zero_shot_map, per_class, None, time.time() - began, device, f"evaluation of {path}: {metadata['settings']}")
        if given:
            check_writable(output)
            data.write_json(output / "metrics.json", result)
        print(table(result), file=sys.stderr if config.predict else sys.stdout)
    if config.predict:
        predict(config, adapter, names, clip, data.embed_texts(clip, [f"a photo of a {name}." for name in names], config.cache), device, output)


if __name__ == "__main__":
    # the focused loss makes gradients whose squares are below 1e-38; on a CPU such numbers make every step many times slower
    torch.set_flush_denormal(True)
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # photo names of any bytes, labels of any script
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UsageError as error:
        say(f"adapter_rp.py: {error}")
        sys.exit(2)
    except Diverged as error:
        say(f"adapter_rp.py: {error}")
        sys.exit(3)
    except KeyboardInterrupt:
        say("adapter_rp.py: interrupted; the same command goes on from the last saved epoch")
        sys.exit(130)
    except BrokenPipeError:  # | head: nothing more is wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
