"""RP, "Text as Image: Learning Transferable Adapter for Multi-Label Classification" (arXiv 2312.04160), in one file.

CLIP puts texts and images in one space. So a small adapter that learns to read labels off TEXT embeddings can label
IMAGES: no photo and no manual label is used in training. Random perturbation (fresh noise on the text embeddings in
every step) makes it carry over the gap between the two. Shapes: N texts or images, B batch, C labels, D CLIP width,
H hidden width, R runs side by side (one for each seed and noise strength), K noise strengths.

The method, part by part, in the paper's order            where
    frozen CLIP embeddings of texts         [N, D]        load_inputs; embed.embed_texts
    # RP: random perturbation  t + eps      [B, D]        perturb_reference, perturb_fused
    # RP: adapter                     [B, D] -> [B, H]    Adapter.hidden_features
    # RP: label classifiers           [B, H] -> [B, C]    Adapter.classifiers
    # RP: loss                                            asymmetric_loss_*, bce_loss_*, ranking_loss_*
    # RP: classifiers and loss together                   classifier_loss_*
    # RP: inference on images, no noise                   evaluate, predict

    python adapter_rp.py --noise-std 0.15 0 --seed 0 1 2        half a minute on two cores, drawn scenes: mAP 64.78 with
                                                                noise, 60.37 without, zero-shot 60.90
    python adapter_rp.py --features FILE.npz --noise-std 0 0.15                     embeddings of another encoder pair
    python adapter_rp.py --backbone ViT-B-16 --labels words.txt --output runs/mine          your own words; then tags:
    python adapter_rp.py --checkpoint runs/mine/checkpoint.safetensors --predict photos/
The paper's abstracts fix: both CLIP encoders frozen, only the adapter learns; noise on the text embeddings in training
only; the embeddings' magnitude matters; texts from a language model told to write sentences for label sets; no manual
data. The full text was not at hand. All that follows is ours or the field's; an option or a line marked "choice Dn"
changes it:

    D1  --noise-law gaussian  standard deviation relative to the mean text norm: one number means the same on raw and on
                              unit embeddings ([field]: CoMC, LaFTer use 0.1 on unit embeddings)                [choice]
    D2  --noise-std 0.15      its strength; never chosen by held-out text, which always prefers none            [choice]
    D3  --normalize           raw embeddings; with it: normalise, add noise, do not normalise again  [paper: direction]
    D4  --adapter mlp         D -> H -> C with ReLU; linear: one bias-free layer ([field]: CoMC)                [choice]
    D5  HIDDEN                H = 2 D                                                                           [choice]
    D6  --head per-label      a classifier a label; label-embedding: cosine of the adapted embedding (with a residual
                              connection) with the label's text embedding, learned scale, bias; open to labels  [choice]
    D7  --loss asymmetric --gamma-neg 4 --clip 0, GAMMA_POS, MARGIN    exponents [author]; bce, ranking [field];
                              summed over labels, averaged over the batch; --focal-gradient full: through the focusing
                              weights too, as timm and ASL's optimized class; stopped there by ASL's default class,
                              TaI-DPT, CoMC, Query2Label and RAM [author]                                       [choice]
    D8  --lr 1e-3 --epochs 30 --batch-size 512, WEIGHT_DECAY    AdamW, cosine to 0; starting values, no search  [choice]
    D9  PROMPT                "a photo of a {name}.", for the zero-shot baseline and label embeddings            [field]

>>> import torch, adapter_rp
>>> adapter_rp.perturb_fused(torch.eye(4), 0.1, "gaussian", 1.0, torch.Generator().manual_seed(0)).shape
torch.Size([4, 4])
"""
import run  # first, so that Ctrl-C while torch is imported ends in one line

# isort: split
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import embed
from data import UsageError, say
from run import option

HIDDEN = 2.0  # choice D5: hidden width in units of D
GAMMA_POS = 0.0  # choice D7: focusing exponent of present labels
MARGIN = 1.0  # choice D7: of the ranking loss, in logits
WEIGHT_DECAY = 1e-4  # choice D8
PROMPT = "a photo of a {}."  # choice D9


@dataclass
class Config(run.Options):
    features: str = option(None, "ready-made embeddings, one .npz (layout: data.load_features), for --dataset and CLIP",
                           "data", metavar="FILE")
    texts: str = option(None, 'training texts: .jsonl of {"text": ..., "labels": [...]}, COCO\'s captions .json, or a '
                        "caption a line; labels of captions by noun matching", "data", metavar="FILE")
    text_count: int = option(None, "so many training texts: made here (default: 8000, or as many as labels), or drawn "
                             "from a file (default: all)", "data", at_least=1, metavar="N")
    precision: str = option("fp32", "CLIP's numbers", "CLIP", choices=("fp32", "bf16"))
    noise_law: str = option("gaussian", "what the noise on text embeddings is drawn from [choice D1]",
                            choices=("gaussian", "uniform", "sphere", "none"))
    noise_std: tuple = option((0.15,), "its strength, times the mean text norm [choice D2]; of several the first is "
                              "the checkpoint's", nargs="+", type=float, at_least=0)
    normalize: bool = option(False, "embeddings of length 1 instead of raw ones, before the noise [choice D3]")
    adapter: str = option("mlp", "mlp: a hidden layer; linear: none [choice D4]", choices=("mlp", "linear"))
    head: str = option("per-label", "how labels are read off: a classifier for each, or by likeness to their names' "
                       "embeddings, new ones too [choice D6]", choices=("per-label", "label-embedding"))
    loss: str = option("asymmetric", "what training lowers: asymmetric [author D7] spares easy absent labels, bce is "
                       "plain, ranking compares labels", choices=("asymmetric", "bce", "ranking"))
    gamma_neg: float = option(4.0, "asymmetric loss: larger spares easy absent labels more [author D7]", at_least=0)
    clip: float = option(0.0, "that loss: an absent label below this probability costs nothing [author D7]",
                         at_least=0, below=1)
    focal_gradient: str = option("full", "that loss: its weights are differentiated too [choice D7]; stopped [author]",
                                 choices=("full", "stopped"))
    lr: float = option(1e-3, "learning rate at the start; it falls to 0 [choice D8]", above=0)
    epochs: int = option(30, "passes over the texts [choice D8]", at_least=1)
    batch_size: int = option(512, "texts a step [choice D8]", at_least=1)


# --- RP: random perturbation ------------------------------------------------------------------------------------------
def perturb_reference(embeddings, noise_std, law, mean_norm, generator):
    """Text embeddings with fresh noise: t + sigma n, sigma = noise_std * mean_norm.  [idea: paper; law: choice D1]

    embeddings: [..., D]; noise_std: float, or a tensor that broadcasts against embeddings (several strengths of one
    draw); law: "gaussian" (unit variance per coordinate), "uniform" (the same variance), "sphere" (random direction,
    length sqrt(D)), "none"; mean_norm: float, mean embedding norm over the whole training set; generator: on the
    embeddings' device. Returns a new tensor of the broadcast shape. Raises ValueError for another law.
    """
    like = {"generator": generator, "dtype": embeddings.dtype, "device": embeddings.device}
    if law == "none":
        noise = torch.zeros_like(embeddings)
    elif law == "gaussian":
        noise = torch.randn(embeddings.shape, **like)
    elif law == "uniform":
        noise = (2 * torch.rand(embeddings.shape, **like) - 1) * math.sqrt(3)
    elif law == "sphere":
        noise = torch.randn(embeddings.shape, **like)
        noise = noise / noise.norm(dim=-1, keepdim=True) * math.sqrt(embeddings.shape[-1])
    else:
        raise ValueError(f"unknown noise law {law!r}: gaussian, uniform, sphere or none")
    return embeddings + noise_std * mean_norm * noise


def perturb_fused(embeddings, noise_std, law, mean_norm, generator):
    """Same as perturb_reference, same draws: into one buffer, which is scaled; several strengths broadcast it."""
    noise = torch.empty_like(embeddings, requires_grad=False, memory_format=torch.contiguous_format)
    if law == "none":
        noise.zero_()
    elif law == "uniform":
        noise.uniform_(0, 1, generator=generator).mul_(2).sub_(1).mul_(math.sqrt(3))
    elif law in ("gaussian", "sphere"):
        noise.normal_(generator=generator)
    else:
        raise ValueError(f"unknown noise law {law!r}: gaussian, uniform, sphere or none")
    if law == "sphere":
        noise.mul_(math.sqrt(embeddings.shape[-1]) / noise.norm(dim=-1, keepdim=True))
    if isinstance(noise_std, torch.Tensor):
        return torch.addcmul(embeddings, noise, noise_std * mean_norm)
    if embeddings.requires_grad:
        return torch.add(embeddings, noise, alpha=noise_std * mean_norm)
    return noise.mul_(noise_std * mean_norm).add_(embeddings)


# --- RP: adapter and label classifiers --------------------------------------------------------------------------------
class Adapter(nn.Module):
    """R adapters side by side, one a run. Every parameter has the run as its first axis; a run starts from its own seed
    and learns the same whether it trains alone or beside others.

    per-label head:        logits = relu(x W1 + b1) W2 + b2            (linear: x W)                       [choice D4]
    label-embedding head:  logits = scale * cos(x + f(x), label) + bias, f the MLP or linear layer D -> D  [choice D6]
    """
    def __init__(self, width, classes, seeds, kind="mlp", head="per-label", hidden=HIDDEN):
        super().__init__()
        self.kind, self.head, mlp = kind, head, kind == "mlp"
        inner, out = max(1, round(hidden * width)), classes if head == "per-label" else width
        both = {"w1": (inner, width), "b1": (inner,), "w2": (out, inner), "b2": (out,)}
        shapes = both if mlp else {"w2": (out, width)}
        fan_in = {"w1": width, "b1": width, "w2": inner if mlp else width, "b2": inner}
        drawn = {name: [] for name in shapes}
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed * 100_003)
            for name, shape in shapes.items():  # uniform in +-1 / sqrt(fan in), PyTorch's own default for linear layers
                drawn[name].append((2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in[name]))
        for name, tensors in drawn.items():
            self.register_parameter(name, nn.Parameter(torch.stack(tensors)))                 # [R, ...]
        if head == "label-embedding":
            self.log_scale = nn.Parameter(torch.full((len(seeds),), math.log(20.0)))
            self.bias = nn.Parameter(torch.zeros(len(seeds)))

    def hidden_features(self, x):
        """[R, N, D] -> what the classifiers multiply: [R, N, H] (linear: x), or scaled unit embeddings [R, N, D]"""
        hidden = torch.relu(torch.baddbmm(self.b1[:, None], x, self.w1.mT)) if self.kind == "mlp" else x
        if self.head == "per-label":
            return hidden
        change = torch.baddbmm(self.b2[:, None], hidden, self.w2.mT) if self.kind == "mlp" else hidden @ self.w2.mT
        return self.log_scale.exp()[:, None, None] * F.normalize(x + change, dim=-1)

    def classifiers(self, label_embeddings):
        """(weight [R, C, H or D], bias [R, C]). label_embeddings: [C, D], used by the label-embedding head only."""
        if self.head == "label-embedding":
            labels = F.normalize(label_embeddings, dim=-1)
            return labels.expand(len(self.bias), -1, -1), self.bias[:, None].expand(-1, len(labels))
        return self.w2, self.b2 if self.kind == "mlp" else self.w2.new_zeros(self.w2.shape[:2])

    def of_run(self, number):
        """{name: tensor} of one run, without the first axis; views"""
        return {name: parameter[number] for name, parameter in self.named_parameters()}

    def forward(self, x, label_embeddings=None):
        """Logits [R, N, C] of embeddings [R, N, D]."""
        weight, bias = self.classifiers(label_embeddings)
        return self.hidden_features(x) @ weight.mT + bias[:, None]


# --- RP: losses -------------------------------------------------------------------------------------------------------
# Summed over labels, averaged over the batch (the last axis but one); over a leading run axis they add up, so that each
# run's gradient is its own. Targets: 1 present, 0 absent, -1 ignored.
def _integers(targets):
    if targets.ndim < 2 or targets.is_floating_point():
        raise ValueError(f"targets must be integers or bool, [..., B, C]: not {targets.dtype}, {list(targets.shape)}")
    return targets


def asymmetric_loss_reference(logits, targets, gamma_neg=4.0, gamma_pos=0.0, clip=0.0, focal_gradient="full"):
    """Asymmetric loss. focal_gradient: "full", through its weights too, or "stopped".  [author D7]

    p = sigmoid(z), q = max(p - clip, 0);  present: -(1-p)^gamma+ log p;  absent: -q^gamma- log(1-q).
    logits: [..., B, C]; targets: same shape, 1, 0 or -1 -> scalar. Finite at z = +-1e4. ValueError for other targets.
    """
    targets, logits = _integers(targets), logits.to(torch.promote_types(logits.dtype, torch.float32))  # sums overflow
    tiny = torch.finfo(logits.dtype).tiny  # keeps 0^(gamma-1) out of the backward pass; the log beside it is 0 there
    q = (torch.sigmoid(logits) - clip).clamp_min(tiny)
    weights = torch.sigmoid(-logits).clamp_min(tiny) ** gamma_pos, q ** gamma_neg
    of_present, of_absent = (weight.detach() if focal_gradient == "stopped" else weight for weight in weights)
    log_clip = logits.new_tensor(clip).log()
    log_one_minus_q = torch.logaddexp(F.logsigmoid(-logits), log_clip).clamp_max(0)         # log min(1 - p + clip, 1)
    present, absent = -of_present * F.logsigmoid(logits), -of_absent * log_one_minus_q
    return torch.where(targets == 1, present, torch.where(targets == 0, absent, 0)).sum() / logits.shape[-2]


def _asymmetric_in_place(z, targets, gamma_neg, gamma_pos, clip, focal_gradient):
    """Sum of the asymmetric loss of contiguous logits z, which are overwritten by d loss / d z.

    Every entry is first taken for absent; the few others are moved to -inf, where an absent label costs nothing, and
    written over at the end. With q = max(p - clip, 0) and dp/dz = p (1-p):
        absent:   d/dz = q^gamma- (1/(1-q) - gamma- log(1-q)/q) p (1-p);  clip 0:  p^gamma- (p - gamma- (1-p) log(1-p))
        present:  d/dz = (1-p)^gamma+ (gamma+ p log p - (1-p))
    Stopped, the terms with a gamma before a logarithm are left out.
    """
    full = focal_gradient == "full"
    others = targets.reshape(-1).nonzero()[:, 0]                                 # present or ignored
    is_present, z_others = targets.reshape(-1)[others] == 1, z.view(-1)[others]
    z.view(-1)[others] = -math.inf
    p = torch.sigmoid(z)
    if clip == 0:
        q, log_one_minus_q = p, F.logsigmoid(z.neg_())
        slope = torch.addcmul(p, torch.sub(p, 1, out=z), log_one_minus_q, value=gamma_neg, out=z) if full else p
    else:
        q = (p - clip).clamp_min_(0)
        log_one_minus_q = torch.log1p(-q)                                        # 1 - q >= clip: no overflow
        slope = 1 / (1 - q)
        if full:
            slope -= gamma_neg * log_one_minus_q / q.clamp_min(torch.finfo(q.dtype).tiny)
        slope.mul_(p).mul_(torch.sigmoid(-z)).masked_fill_(q == 0, 0)
    weight = (q ** (gamma_neg / 2)).square_()  # products at the usual exponents 0, 2 and 4, where pow would be slow
    loss = -torch.dot(weight.view(-1), log_one_minus_q.view(-1))
    torch.mul(slope, weight, out=z)
    log_p, one_minus_p = F.logsigmoid(z_others), torch.sigmoid(-z_others)
    weight = (one_minus_p ** (gamma_pos / 2)).square_() * is_present             # ignored entries: 0
    z.view(-1)[others] = weight * (full * gamma_pos * torch.sigmoid(z_others) * log_p - one_minus_p)
    return loss - (weight * log_p).sum()


class _AsymmetricLoss(torch.autograd.Function):
    BLOCK = 2 ** 17  # entries that stay in the processor's cache between the passes over them

    @staticmethod
    def forward(ctx, logits, targets, *exponents):
        slope = logits.detach().clone(memory_format=torch.contiguous_format)
        blocks = (tensor.view(-1).split(_AsymmetricLoss.BLOCK) for tensor in (slope, targets.contiguous()))
        total = sum(_asymmetric_in_place(z, part, *exponents) for z, part in zip(*blocks, strict=True))
        ctx.save_for_backward(slope.div_(logits.shape[-2]))
        return total / logits.shape[-2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, *[None] * 5


def asymmetric_loss_fused(logits, targets, gamma_neg=4.0, gamma_pos=0.0, clip=0.0, focal_gradient="full"):
    """Same as asymmetric_loss_reference. Loss and gradient in one pass over cache-sized blocks."""
    targets, logits = _integers(targets), logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _AsymmetricLoss.apply(logits, targets, gamma_neg, gamma_pos, clip, focal_gradient)


def bce_loss_reference(logits, targets):
    """Binary cross-entropy.  [field D7]  logits, targets: [..., B, C] -> scalar"""
    loss = F.binary_cross_entropy_with_logits(logits, (targets == 1).to(logits.dtype), reduction="none")
    return torch.where(targets >= 0, loss, 0).sum() / logits.shape[-2]


def bce_loss_fused(logits, targets):
    """Same as bce_loss_reference: the asymmetric loss with both exponents 0."""
    return asymmetric_loss_fused(logits, targets, 0.0, 0.0, 0.0)


def ranking_loss_reference(logits, targets, margin=MARGIN):
    """Every present label should lead every absent one by the margin: sum over pairs of relu(margin - z+ + z-).
    [field D7]  logits, targets: [..., B, C] -> scalar. Memory B x C x C."""
    pairs = (targets == 1)[..., :, None] & (targets == 0)[..., None, :]
    return (torch.relu(margin - logits[..., :, None] + logits[..., None, :]) * pairs).sum() / logits.shape[-2]


def ranking_loss_fused(logits, targets, margin=MARGIN):
    """Same as ranking_loss_reference. Only rows of present labels are formed: B x P x C, P most labels of a text."""
    most = max(1, int((targets == 1).sum(-1).max()))
    present, column = (targets == 1).to(torch.int8).topk(most, dim=-1)           # [..., B, P]
    pairs = (present == 1)[..., :, None] & (targets == 0)[..., None, :]          # [..., B, P, C]
    lead = logits.gather(-1, column)[..., :, None] - logits[..., None, :]
    return (torch.relu(margin - lead) * pairs).sum() / logits.shape[-2]


# --- RP: classifiers and loss together, the hot path ------------------------------------------------------------------
def classifier_loss_reference(hidden, weight, bias, targets, gamma_neg=4.0, gamma_pos=0.0, clip=0.0,
                              focal_gradient="full"):
    """Asymmetric loss of hidden W^T + b, runs added up.
    hidden: [R, B, H]; weight: [R, C, H]; bias: [R, C]; targets: [R, B, C] -> scalar"""
    logits = hidden @ weight.mT + bias[:, None]
    return asymmetric_loss_reference(logits, targets, gamma_neg, gamma_pos, clip, focal_gradient)


class _ClassifierLoss(torch.autograd.Function):
    BLOCK = 2 ** 18  # logits alive at once

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, *exponents):
        runs, batch, _ = hidden.shape
        total, (hidden_needed, weight_needed, bias_needed) = 0.0, ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if hidden_needed else None
        d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if weight_needed else None
        d_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if bias_needed else None
        chunk = max(1, _ClassifierLoss.BLOCK // (runs * batch))
        for start in range(0, weight.shape[1], chunk):
            part = slice(start, start + chunk)
            z = torch.baddbmm(bias[:, None, part], hidden, weight[:, part].mT)               # [R, B, chunk]
            total = total + _asymmetric_in_place(z, targets[:, :, part], *exponents)         # z is now d loss / d z
            if hidden_needed:
                d_hidden.baddbmm_(z, weight[:, part], alpha=1 / batch)
            if weight_needed:
                torch.mul(torch.bmm(z.mT, hidden), 1 / batch, out=d_weight[:, part])
            if bias_needed:
                d_bias[:, part] = z.sum(1) / batch
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total / batch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        unit = grad.item() == 1  # the usual case: spare a pass over the largest tensor
        return *(slope if slope is None or unit else slope * grad for slope in ctx.saved_tensors), *[None] * 5


def classifier_loss_fused(hidden, weight, bias, targets, gamma_neg=4.0, gamma_pos=0.0, clip=0.0,
                          focal_gradient="full"):
    """Same as classifier_loss_reference. B x C logits, probabilities and gradients never exist: a chunk of labels is
    multiplied out, turned in place into its own gradient, and multiplied into those of hidden, weight and bias."""
    return _ClassifierLoss.apply(hidden, weight, bias, _integers(targets), gamma_neg, gamma_pos, clip, focal_gradient)


def text_loss(config, adapter, x, targets, label_embeddings):
    """Loss of perturbed embeddings x [R, B, D] with targets [R, B, C], by --loss and --impl -> scalar"""
    fused = config.impl == "fused"
    weight, bias = adapter.classifiers(label_embeddings)
    hidden = adapter.hidden_features(x)
    if config.loss == "ranking":
        ranking_loss = ranking_loss_fused if fused else ranking_loss_reference
        return ranking_loss(hidden @ weight.mT + bias[:, None], targets, MARGIN)
    exponents = (config.gamma_neg, GAMMA_POS, config.clip, config.focal_gradient) if config.loss != "bce" else (0, 0, 0)
    classifier_loss = classifier_loss_fused if fused else classifier_loss_reference
    return classifier_loss(hidden, weight, bias, targets, *exponents)


# --- inputs -----------------------------------------------------------------------------------------------------------
class Inputs(NamedTuple):
    names: list                      # C label names
    label_embeddings: torch.Tensor   # [C, D]
    text_embeddings: torch.Tensor    # [N, D], N = 0 when nothing is trained
    text_labels: torch.Tensor        # int8 [N, C]
    image_embeddings: torch.Tensor   # [M, D], None without test photos
    image_labels: np.ndarray         # int8 [M, C]
    encoder: str                     # which encoder made the embeddings
    encoder_key: str                 # its identity, kept in the checkpoint
    texts_from: str                  # for the record
    policy: str                      # treatment of doubtful labels and unreadable photos


def names_of(config):
    """The label names of a run: --labels, or the dataset's own."""
    if config.labels:
        return data.read_labels(config.labels)
    if config.features:
        return data.load_features(config.features)["label_names"]
    return data.label_names(config.dataset, config.data_root)


def chosen_rows(config, count):
    """Rows of the texts that are used, by --text-count (a fixed seed: fewer are among more) and --limit."""
    rows = np.random.default_rng(0).permutation(count)[:config.text_count] if config.text_count else np.arange(count)
    return np.sort(rows)[:config.limit]


def load_features(config, names, with_texts):
    """Inputs from one .npz of ready-made embeddings."""
    arrays, source = data.load_features(config.features), Path(config.features).name
    if unknown := [name for name in names if name not in arrays["label_names"]]:
        raise UsageError(f"--labels names '{unknown[0]}', which {config.features} has no embedding for (it has "
                         f"{', '.join(arrays['label_names'][:30])})")
    columns = [arrays["label_names"].index(name) for name in names]
    text_labels, rows = arrays["text_labels"][:, columns], np.arange(0)
    if with_texts:
        rows = chosen_rows(config, len(text_labels))
        if len(names) >= data.FEW:
            rows = rows[(text_labels[rows] == 1).any(1)]
        if not (text_labels[rows] == 1).any():
            raise UsageError(f"features file {config.features}: no text has any of the {len(names)} labels")
    images, image_labels = (arrays[name][:config.limit] for name in ("image_embeddings", "image_labels"))
    label_embeddings, texts, text_labels, images = map(torch.from_numpy, (
        arrays["label_embeddings"][columns], arrays["text_embeddings"][rows], text_labels[rows], images))
    return Inputs(names, label_embeddings, texts, text_labels, images, image_labels[:, columns],
                  f"embeddings in {source}", "features", "embeddings file", "labels of -1 ignored")


def load_inputs(config, clip, names, with_texts=True):
    """Embeddings and labels of texts and test photos -> Inputs. clip: embed.Clip, or None with --features."""
    if config.features:
        return load_features(config, names, with_texts)
    own, photos = data.label_names(config.dataset, config.data_root), None
    if set(names) <= set(own) and ("dataset" in config.given or not config.labels):  # missing photos are said at once
        photos = data.load_photos(config.dataset, config.data_root, "test", config.limit, config.policy)
    texts, text_labels, texts_from = [], np.zeros((0, len(names)), np.int8), "none"
    if with_texts and config.texts:
        texts, text_labels = data.read_texts(config.texts, names, data.synonyms_of(names, config.dataset))
        texts_from = Path(config.texts).name
    elif with_texts:
        count = config.text_count or max(8000, len(names))  # each label is the first of one at least
        texts, text_labels, texts_from = data.default_texts(config.dataset, names, count)
    rows = chosen_rows(config, len(texts))
    texts, text_labels = [texts[row] for row in rows], text_labels[rows]
    if with_texts and (never := [name for name, named in zip(names, text_labels.any(0), strict=True) if not named]):
        say(f"no training text has the labels {', '.join(never[:10])}: nothing can be learnt about them")
    if with_texts and len(names) < data.FEW and config.backbone != "scenes":
        count, (texts, text_labels) = len(texts), data.with_negatives(texts, text_labels, names)
        texts_from += f" and {len(texts) - count:,} that name no label"
    label_embeddings = prompt_embeddings(config, clip, names)
    text_embeddings = label_embeddings[:0]
    if texts:
        text_embeddings = embed.embed_texts(clip, texts, config.cache, quiet=config.quiet)
    images, image_labels, policy = None, None, "no test photos: --labels without a --dataset that knows them"
    if photos is not None:
        images, kept = embed.embed_photos(clip, photos.photos, config.cache, workers=config.workers, quiet=config.quiet)
        image_labels = photos.labels[kept][:, [own.index(name) for name in names]]
        policy = f"{photos.policy}; {len(photos.photos) - len(kept)} unreadable photos left out"
    return Inputs(names, label_embeddings, text_embeddings, torch.from_numpy(text_labels), images, image_labels,
                  clip.name, clip.key, texts_from, policy)


def prompt_embeddings(config, clip, names):
    """[C, D] of the zero-shot prompts.  [field D9]"""
    return embed.embed_texts(clip, [PROMPT.format(name) for name in names], config.cache)


def prepared(config, embeddings):
    """--normalize; the same for texts in training and images at inference."""
    return F.normalize(embeddings, dim=-1) if config.normalize else embeddings


# --- train ------------------------------------------------------------------------------------------------------------
def train(config, inputs, device, folder):
    """All seeds and noise strengths at once, each run as if alone -> (Adapter with R = seeds x strengths runs, log)

    Randomness of a run hangs on its seed and the epoch alone (order, noise): an interrupted training goes on exactly.
    Runs of one seed share their draws: strengths differ in nothing else. Raises run.Diverged.
    """
    seeds, strengths, fused = config.seed, config.noise_std, config.impl == "fused"
    perturb = perturb_fused if fused else perturb_reference
    texts, text_labels = prepared(config, inputs.text_embeddings).to(device), inputs.text_labels.to(device)
    (count, width), mean_norm = texts.shape, texts.norm(dim=-1).mean().item()
    labels, starts = inputs.label_embeddings.to(device), [seed for seed in seeds for _ in strengths]
    adapter = Adapter(width, len(inputs.names), starts, config.adapter, config.head, HIDDEN).to(device)
    if config.head == "label-embedding":
        cosine = (F.normalize(texts[:1000], dim=-1) @ F.normalize(labels, dim=-1).T).mean()
        adapter.bias.data.fill_(math.log(0.1 / 0.9) - 20 * cosine)  # mean probability 0.1 at the start
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=config.lr, weight_decay=WEIGHT_DECAY, fused=fused)
    sigma = strengths[0] if len(strengths) == 1 else torch.tensor(strengths, device=device)[:, None, None]   # [K, 1, 1]
    steps, noise_law = -(-count // config.batch_size), config.noise_law if any(strengths) else "none"  # 0 draws nothing
    log = run.load_resume(folder / "resume.pt", "adapter", adapter.state_dict(), optimiser)
    bar = tqdm(range(len(log), config.epochs), initial=len(log), total=config.epochs, desc="training", unit="epoch",
               disable=config.quiet or None)
    save_at = time.time() + run.RESUME_SECONDS
    for epoch in bar:
        orders = [torch.randperm(count, generator=seeded(seed, epoch, "cpu")).to(device) for seed in seeds]
        generators = [seeded(seed, epoch, device) for seed in seeds]
        total, began = 0.0, time.time()
        for step in range(steps):
            progress = (epoch * steps + step) / (config.epochs * steps)
            for group in optimiser.param_groups:
                group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * progress))
            rows = [order[step * config.batch_size:(step + 1) * config.batch_size] for order in orders]
            x = torch.cat([perturb(texts[row][None], sigma, noise_law, mean_norm, generator)                 # [K, B, D]
                           for row, generator in zip(rows, generators, strict=True)])                        # [R, B, D]
            targets = text_labels[torch.stack(rows)].repeat_interleave(len(strengths), 0)                    # [R, B, C]
            optimiser.zero_grad()
            loss = text_loss(config, adapter, x, targets, labels)
            loss.backward()
            optimiser.step()
            total += loss.detach()
        total = float(total) / steps / len(adapter.w2)
        if not math.isfinite(total) or not all(parameter.isfinite().all() for parameter in adapter.parameters()):
            raise run.Diverged(f"training diverged in epoch {epoch + 1} (loss {total}); lower --lr (now {config.lr:g}) "
                               f"or --noise-std (now {max(strengths):g})")
        log.append({"epoch": epoch + 1, "loss": total, "seconds": round(time.time() - began, 3)})
        bar.set_postfix(loss=f"{total:.3f}")
        if time.time() > save_at and epoch + 1 < config.epochs:
            began = time.time()
            run.save_resume(folder / "resume.pt", "adapter", adapter.state_dict(), optimiser, log)
            save_at = time.time() + max(run.RESUME_SECONDS, 20 * (time.time() - began))
    return adapter, log


def seeded(seed, epoch, device):
    return torch.Generator(device).manual_seed(seed * 100_003 + epoch + 1)


# --- evaluate and predict ---------------------------------------------------------------------------------------------
@torch.no_grad()
def all_logits(adapter, x, label_embeddings, rows=8192):
    """Logits of the same embeddings [N, D] for every run, one run at a time -> iterator over [N, C]"""
    for number in range(len(adapter.w2)):
        one = {name: parameter[None] for name, parameter in adapter.of_run(number).items()}
        yield torch.cat([torch.func.functional_call(adapter, one, (part[None], label_embeddings))[0]
                         for part in x.split(rows)])


def evaluate(config, adapter, inputs, device):
    """Scores every run on the test photos, no noise -> list of dicts by run"""
    images, labels, results = inputs.image_embeddings.to(device), inputs.label_embeddings.to(device), []
    for logits in all_logits(adapter, prepared(config, images), labels):
        scores = torch.sigmoid(logits.double()).cpu().numpy()  # the logits rank: a sigmoid rounds large ones to ties
        results.append(run.measure(logits.cpu().numpy(), scores, inputs.image_labels))
    return results


def predict(config, adapter, names, clip, device, folder):
    """Tags photos, block by block."""
    labels = prompt_embeddings(config, clip, names).to(device)

    def scored(photos):
        for rows, tensors in embed.stream_photos(clip, photos, cache=config.cache, workers=config.workers,
                                                 quiet=config.quiet):
            x = prepared(config, tensors["embeddings"].to(device))
            yield rows, torch.sigmoid(next(all_logits(adapter, x, labels))).cpu().numpy()
    run.tag(config, run.photos_of(config, config.predict), names, scored, folder)


# --- main -------------------------------------------------------------------------------------------------------------
def recorded(config, argv, settings, device, began, inputs, trained, runs, baselines, finished):
    """metrics.json: every seed at the first strength is the main setting."""
    chosen = [one for one in runs if one["noise_std"] == config.noise_std[0]]
    if config.features:
        config = replace(config, dataset=Path(config.features).stem)
    return run.record("rp", config, argv, settings, device, time.time() - began, inputs.names, inputs.image_labels,
                      runs, chosen, finished, baselines, trained, backbone=inputs.encoder, policy=inputs.policy,
                      texts=inputs.texts_from, text_count=len(inputs.text_labels))


def train_and_score(config, argv, device):
    """The run that the options describe, done or gone on with -> the result, None in a process that only helped"""
    began, settings = time.time(), run.settings_of(config)
    folder = Path(config.output or f"runs/rp/{Path(config.features).stem if config.features else config.dataset}")
    result, _lock = run.open_folder(config, folder, settings)
    if result is not None and result["finished"]:
        say(f"{folder} is finished; --overwrite does it again")
        return result
    names = names_of(config)
    columns = run.known_columns(config, names)
    inputs = load_inputs(config, None if config.features else run.load_clip(config, device), names)
    if run.part():  # under torchrun embedding is shared out; the adapter learns in the first process
        return None
    runs = [{"seed": seed, "noise_std": std} for seed in config.seed for std in config.noise_std]
    if result is None:
        run.begin(folder, recorded(config, argv, settings, device, began, inputs, inputs.names, runs, None, False))
    trained, text_labels = [names[column] for column in columns], inputs.text_labels[:, columns]
    rows = (text_labels != 0).any(1) if config.unseen else slice(None)
    adapter, log = train(config, inputs._replace(
        names=trained, label_embeddings=inputs.label_embeddings[columns], text_labels=text_labels[rows],
        text_embeddings=inputs.text_embeddings[rows]), device, folder)
    baselines = None
    if inputs.image_labels is not None:
        runs = [one | found for one, found in zip(runs, evaluate(config, adapter, inputs, device), strict=True)]
        baselines = run.baselines(config, inputs.label_embeddings, inputs.image_embeddings, inputs.image_labels,
                                  inputs.text_embeddings, inputs.text_labels)
    for number, one in enumerate(runs):
        title = f"seed {one['seed']}, noise {one['noise_std']:g}"
        run.save_checkpoints(config, folder, number, title, "rp", adapter.of_run(number), names=trained,
                             settings=settings, encoder=inputs.encoder, encoder_key=inputs.encoder_key)
    done = recorded(config, argv, settings, device, began, inputs, trained, runs, baselines, True)
    return run.write_result(folder, done, log)


def use_checkpoint(config, argv, device):
    """--checkpoint: tag photos with it (--predict), or score it on the dataset's test photos -> the result"""
    began, path = time.time(), Path(config.checkpoint)
    tensors, metadata = run.read_checkpoint(path, "rp")
    config = run.as_trained(config, path, metadata["settings"])
    names = names_of(config) if config.labels or not config.predict else metadata["names"]
    folder, settings = Path(config.output or path.parent), run.settings_of(config, checkpoint=data.digest(path))
    if config.output and not config.predict:
        result, _lock = run.open_folder(config, folder, settings)
        if result is not None:
            return result
    clip = None if config.features else run.load_clip(config, device)
    own_names = names if config.head == "per-label" else metadata["names"]  # the other head is open to any
    encoder, encoder_key = (config.features, "features") if config.features else (clip.name, clip.key)
    run.check_fits(path, metadata, own_names, encoder, encoder_key)
    width = tensors["w1" if config.adapter == "mlp" else "w2"].shape[1]
    adapter = Adapter(width, len(names), [0], config.adapter, config.head)
    run.use_weights(path, adapter.of_run(0), tensors)
    adapter = adapter.to(device)
    if config.predict:
        predict(config, adapter, names, clip, device, folder)
        return None
    inputs = load_inputs(config, clip, names, with_texts=False)
    if inputs.image_labels is None:
        raise UsageError(f"{config.dataset} has no ground truth for all of these labels; --predict PATH tags photos")
    if inputs.image_embeddings.shape[1] != width:
        raise UsageError(f"checkpoint {path}: made for embeddings of another width ({width}); pass their file")
    measured, = evaluate(config, adapter, inputs, device)
    measured = {"seed": config.seed[0], "noise_std": config.noise_std[0], **measured}
    baselines = run.baselines(config, inputs.label_embeddings, inputs.image_embeddings, inputs.image_labels)
    result = recorded(config, argv, settings, device, began, inputs, metadata["names"], [measured], baselines, True)
    return run.write_result(folder, result) if config.output else result


def main(argv):
    config = run.parse(Config, argv, "RP: train an adapter on texts, label images with it (arXiv 2312.04160).",
                       "Marks: [author] other public code of the paper's author; [field] the closest public peers; "
                       "[choice] ours, by the numbers of the docstring, which maps the paper to the code.")
    if config.features and (config.predict or config.texts):
        raise UsageError("--features brings its own texts, and no encoder for photos: leave --texts and --predict out")
    if config.unseen and config.head == "per-label":
        raise UsageError("--unseen: a classifier a label knows no others; add --head label-embedding")
    config, device = run.set_up(config)
    if result := (use_checkpoint if config.checkpoint else train_and_score)(config, argv, device):
        trained = f"trained on {result['text_count']:,} texts ({result['texts']}), no photo"
        quiet = result["config"]["noise_law"] == "none"
        run.report(result, trained if result["text_count"] else "not trained here", lambda one: "adapter, no noise"
                   if quiet or one["noise_std"] == 0 else f"adapter, noise {one['noise_std']:g}")


if __name__ == "__main__":
    with run.exit_codes("adapter_rp.py") as arguments:
        main(arguments)
