"""SSPA, "Split-and-Synthesize Prompting with Gated Alignments for Multi-Label Image Recognition" (arXiv 2407.20920).

One sentence a label from a language model says what it looks like and what it is found with; learnable prompts are
filtered by the image; a quaternion network fuses both with the global image feature; labels and regions attend to each
other through gates; all regions count in the end. CLIP's text encoder is frozen, its image encoder tuned or frozen.
Shapes: B images, C labels, M regions (patch tokens), d joint CLIP width, L context vectors, P prompt sets.

The method, part by part, in the figure's order                         where
    image encoder: images -> x0 [B, d], X [B, M, d]                     image_features
    # SSPA: KAP   sentences -> T_ka [C, d]                              knowledge_texts
    # SSPA: CAP and global prompts   [P, L, width] -> [P, C, d]         encode_prompts_*
    # SSPA: DSF   E_ca [C, d], X -> T_ca [B, C, d]                      dynamic_semantic_filtering (plain)
    # SSPA: QSM   T_ka, T_ca, x0 -> T_uf [B, C, d]                      quaternion_linear_*, SSPA.fuse
    # SSPA: GDMA  T_uf, X -> T_fn [B, C, d], X_fn [B, M, d]             gated_alignment_*
    # SSPA: losses                                                      asymmetric_loss_*
    # SSPA: soft aggregator   T_fn, X_fn -> s_R [B, C]                  soft_aggregate_*, soft_aggregate_loss_*
    # SSPA: global branch   x0, T_g -> s_G [B, C], and all arrows       SSPA.forward
    # SSPA: prediction                                                  branch_scores

    python sspa.py --tune-image none --seed 0 1 2       12 minutes on two cores, drawn scenes: 68.90 mAP
    python sspa.py --dataset voc2007 --gpu 0            needs the photos and open_clip's weights
    python sspa.py --checkpoint runs/sspa/scenes/checkpoint.safetensors --explain PHOTO        where each label was seen

The abstract and the method figure fix which parts there are, what flows between them, that the text encoder is frozen.
The full text was not at hand. All that follows is ours or the field's; an option or a line marked "choice Dn" changes
it:

    D1  --context-length 4    context vectors a prompt set, shared by all labels (4 are drawn in the figure, their
                              number is ours); they start as "a photo of a"                                     [choice]
    D2  image_features        ViT: patch tokens through the final norm and projection [author]; ResNet: the attention
                              pool asked at every position ([field]: DenseCLIP)                                 [choice]
    D3  knowledge_texts       "{description} A photo of a {class}.": the description first                      [choice]
    D4  --attention-scale 10  DSF, GDMA: softmax(scale * q k) of unit features, learned; 0: fixed 1 / sqrt(d)   [choice]
    D5  SSPA.__init__         their projections start as the identity, single head, no bias but DSF's           [choice]
    D6  --quaternion-layers 2    Q = 0 + T_ka i + T_ca j + x0 k: three axes [figure], zero real part [field], this
                              order; a mapping and a layer of width d a component, ReLU on each component apart, the
                              last one's components of d / 4 side by side                                       [choice]
    D7  gated_attention_*     g = sigmoid(W_q q + W_a a + b) for every channel, q + g a; starts half open (matrices
                              uniform in +-1/sqrt(d), b = 0); --no-gate leaves it out                           [choice]
    D8  --temperature 0.1     of the soft aggregator, in units of the cosine, fixed; its form [field]           [choice]
    D9  SCALE, PRIOR          a branch's logit is scale * cosine + bias, learned; the scale starts at 20, the bias where
                              the sigmoid of the mean logit of the first 64 photos is 0.1                       [choice]
    D10 --gamma-neg 2 --clip 0 --regional-weight 1, GAMMA_POS    asymmetric loss of both branches, mean of their scores
                              as prediction [author]; summed over labels, averaged over the batch; sigmoid scores;
                              --focal-gradient full: through the focusing weights too, as timm and ASL's optimized
                              class; stopped there by RAM [author], ASL's default class, Query2Label            [choice]
    D11 --lr 5e-5 --image-lr-factor 0.1 --ema 0.9997, WEIGHT_DECAY    AdamW, averaged weights [author]; --prompt-lr 1e-3
                              cosine to 0 after WARM_UP of the steps, warm-up of the average min(ema, (1+t)/(10+t)), one
                              weight decay for all tensors; on scenes --lr 6e-3                                 [choice]
    D12 --epochs 20 --batch-size 64    what does not fill a batch is left out of that epoch                     [choice]
    D13 --tune-image full, CROP_SCALE    the figure shows no lock on the image encoder; BatchNorm statistics are CLIP's,
                              random crops and flips only then, frozen region features in half precision        [choice]
    D14 unit length           x0, X, T_ka, E_ca, T_ca, T_uf are normalised before DSF, QSM and GDMA             [choice]
Plain in both implementations, because nothing was gained: DSF, KAP (computed once) and the global branch (one product).
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
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import datasets
import embed
import metrics
import pictures
from data import UsageError, say
from run import option

SCALE = 20.0  # choice D9: of both branches' cosines, at the start
PRIOR = 0.1  # choice D9: sigmoid of the mean logit at the start, which sets the biases
GAMMA_POS = 0.0  # choice D10: focusing exponent of present labels
WEIGHT_DECAY = 1e-4  # choice D11
WARM_UP = 0.05  # choice D11: share of the steps in which the learning rate rises
CROP_SCALE = 0.5  # choice D13: smallest share of the area in random crops, with a tuned image tower
CACHE_LIMIT = 4.0  # GiB of frozen region features that are kept; beyond it photos are encoded anew in every epoch

# the abstract's "further analyses" as options; each changes the settings of the full method in one place
ABLATIONS = {
    "knowledge prompts only": {"fusion": "knowledge"}, "context prompts only": {"fusion": "context"},
    "prompts summed": {"fusion": "sum"}, "prompts concatenated": {"fusion": "concat"}, "no DSF": {"no_dsf": True},
    "no gate": {"no_gate": True}, "V-to-S only": {"alignment": "v-to-s"}, "S-to-V only": {"alignment": "s-to-v"},
    "no GDMA": {"alignment": "none"}, "no LLM description": {"descriptions": "none"},
    "mean aggregator": {"aggregator": "mean"}, "max aggregator": {"aggregator": "max"},
    "global branch only": {"branches": "global"}, "regional branch only": {"branches": "regional"},
    "focal gradient stopped": {"focal_gradient": "stopped"},
}


@dataclass
class Config(run.Options):
    descriptions: str = option(None, 'JSON {"descriptions": {label: sentence}}, or none: the template alone (default: '
                               "assets/descriptions/<dataset>.json)", "data", metavar="FILE")
    photo_count: int = option(None, "so many training photos, drawn by a fixed seed, fewer among more (default: all)",
                              "data", at_least=1, metavar="N")
    tune_image: str = option(None, "image tower: full, trained at --image-lr-factor; none, frozen, its features cached "
                             "(default: full [figure]; none with --ablate)", choices=("none", "full"))
    context_length: int = option(4, "learnable words before a label's name [figure: 4 drawn; choice D1]", at_least=1)
    attention_scale: float = option(10.0, "sharpness of attention at first; 0: fixed 1/sqrt(d) [choice D4]", at_least=0)
    no_dsf: bool = option(False, "ablation: the prompts are not filtered by the image")
    fusion: str = option("qsm", "how prompts and image join: the quaternion network [figure]; others are ablations",
                         choices=("qsm", "knowledge", "context", "sum", "concat"))
    quaternion_layers: int = option(2, "layers of that network, the first maps into it [choice D6]", at_least=1)
    alignment: str = option("both", "who asks in GDMA: labels, regions, both [figure]; others are ablations",
                            choices=("both", "v-to-s", "s-to-v", "none"))
    no_gate: bool = option(False, "ablation: GDMA adds its attention output ungated")
    aggregator: str = option("soft", "a label's score from all regions [paper]; ablations: mean, max",
                             choices=("soft", "mean", "max"))
    temperature: float = option(0.1, "smaller: its best regions count more [choice D8]", above=0)
    branches: str = option("both", "scores from the whole image, from its regions, or both [figure]",
                           choices=("both", "global", "regional"))
    gamma_neg: float = option(2.0, "loss: larger spares easy absent labels more [author D10]", at_least=0)
    clip: float = option(0.0, "loss: absent labels below it cost nothing [author D10]", at_least=0, below=1)
    focal_gradient: str = option("full", "loss: its weights are differentiated too [choice D10]; stopped [author]",
                                 choices=("full", "stopped"))
    regional_weight: float = option(1.0, "weight of the regional branch's loss [author D10]", at_least=0)
    lr: float = option(None, "AdamW's, falls to 0 (default: 5e-5 [author D11]; on scenes 6e-3 [choice])", above=0)
    prompt_lr: float = option(1e-3, "that of the learnable words [choice D11]", above=0)
    image_lr_factor: float = option(0.1, "times --lr: that of a tuned image tower [author D11]", at_least=0)
    ema: float = option(0.9997, "the model is a mean over steps; near 1: of more [author D11]", at_least=0, below=1)
    epochs: int = option(20, "passes over the training photos [choice D12]", at_least=1)
    batch_size: int = option(64, "photos a step, over all processes [choice D12]", at_least=1)
    ablate: tuple = option(None, "also run ablations, all or these", nargs="*", choices=ABLATIONS, metavar="NAME")
    explain: tuple = option((), "photos where --checkpoint shows its labels", "running", nargs="+", metavar="PATH")


# --- SSPA: image encoder ----------------------------------------------------------------------------------------------
def image_features(visual, images):
    """Global feature and region features of CLIP's image tower, both in the joint space.  [figure; projection: author]

    images: [B, 3, H, W], normalised as CLIP wants them -> (x0 [B, d], X [B, M, d]), M the patches (ViT) or the cells of
    the last feature map (ResNet). ViT: every patch token through the final norm and projection. ResNet: the attention
    pool, asked at every position [field: DenseCLIP; choice D2]. x0 is what open_clip's encode_image gives.
    """
    pool = getattr(visual, "attnpool", None)  # ResNet towers have one
    if pool is None:
        output = visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NLC")
        return output["image_features"], output["image_intermediates"][-1] @ visual.proj
    maps = visual.forward_intermediates(images, indices=1, intermediates_only=True)["image_intermediates"][-1]
    x = maps.flatten(2).mT                                                       # [B, M, width]
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding.to(x.dtype)
    q, k, v = (projection(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
               for projection in (pool.q_proj, pool.k_proj, pool.v_proj))
    x = pool.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))      # [B, 1 + M, d]
    return x[:, 0], x[:, 1:]


# --- SSPA: KAP --------------------------------------------------------------------------------------------------------
def knowledge_texts(clip, names, descriptions):
    """What the frozen text encoder reads of a label: "{description} A photo of a {name}."  [figure; order: choice D3]

    descriptions: {name: sentence}; a label without one gets the template alone. A text past the encoder's context
    length loses the last words of its description, never the template; said once. -> list of C str
    """
    texts, shortened, room = [], [], clip.tokenizer.context_length - 2           # start and end token
    for name in names:
        *words, template = *descriptions.get(name, "").split(), f"A photo of a {name}."
        while words and len(clip.tokenizer.encode(" ".join([*words, template]))) > room:
            shortened += [name] if name not in shortened else []
            words.pop()
        texts.append(" ".join([*words, template]))
    if shortened:
        say(f"{len(shortened)} descriptions cut to {clip.tokenizer.context_length} tokens: {', '.join(shortened[:10])}")
    return texts


# --- SSPA: CAP and the global prompts, through the frozen text encoder ------------------------------------------------
def encode_prompts_reference(model, contexts, tokens):
    """Text features of prompts whose words after the start token are learnable vectors, shared by all labels.  [figure]

    model: open_clip's CLIP, its text tower frozen; contexts: [P, L, width]; tokens: int [C, 77] of "X X X X {name}.",
    whose positions 1..L are replaced -> [P, C, d]. Every label runs through all 77 positions.
    """
    length, features = contexts.shape[1], []
    words = model.token_embedding(tokens)                                        # [C, 77, width]
    for context in contexts:
        x = torch.cat([words[:, :1], context.expand(len(tokens), -1, -1), words[:, 1 + length:]], 1)
        x = model.ln_final(model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask))
        features.append(x[torch.arange(len(tokens)), tokens.argmax(-1)] @ model.text_projection)  # at the end token
    return torch.stack(features)


def encode_prompts_fused(model, contexts, tokens):
    """Same as encode_prompts_reference. The text encoder is causal, so: positions after the longest prompt's end are
    not computed; start token and context are computed once a set and the C labels attend to their keys and values; the
    last layer is finished at the end tokens alone. Tokens a set: 1 + L + C (longest - 1 - L) instead of 77 C."""
    sets, shared, classes, end = len(contexts), 1 + contexts.shape[1], len(tokens), tokens.argmax(-1)
    longest = int(end.max()) + 1
    start = model.token_embedding(tokens[:1, :1]).expand(sets, -1, -1)
    prefix = torch.cat([start, contexts], 1) + model.positional_embedding[:shared]           # [P, 1 + L, width]
    own = model.token_embedding(tokens[:, shared:longest]) + model.positional_embedding[shared:longest]
    own = own.expand(sets, -1, -1, -1).flatten(0, 1)                             # [P C, longest - 1 - L, width]
    causal = torch.ones(longest, longest, dtype=torch.bool, device=own.device).tril()
    rows, ends = torch.arange(sets * classes, device=own.device), end.repeat(sets)

    def heads(x, block):  # -> q, k, v, each [rows, heads, positions, width / heads]
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        return qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def behind(of_prefix, of_own):  # each label's own keys or values behind those of start and context
        return torch.cat([of_prefix[:, None].expand(-1, classes, -1, -1, -1).flatten(0, 1), of_own], 2)

    def finish(x, attended, block):
        x = x + block.ls_1(block.attn.out_proj(attended.transpose(-3, -2).flatten(-2)))
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    for block in model.transformer.resblocks:
        prefix_q, prefix_k, prefix_v = heads(prefix, block)
        q, k, v = heads(own, block)
        k, v = behind(prefix_k, k), behind(prefix_v, v)
        if block is model.transformer.resblocks[-1]:
            q, own = q[rows, :, ends - shared][:, :, None], own[rows, ends - shared][:, None]
            own = finish(own, F.scaled_dot_product_attention(q, k, v, causal[ends][:, None, None]), block)
        else:
            own = finish(own, F.scaled_dot_product_attention(q, k, v, causal[shared:]), block)
            attended = F.scaled_dot_product_attention(prefix_q, prefix_k, prefix_v, is_causal=True)
            prefix = finish(prefix, attended, block)
    features = model.ln_final(own[:, 0]) @ model.text_projection                 # [P C, d]
    return features.unflatten(0, (sets, classes))


# --- SSPA: DSF --------------------------------------------------------------------------------------------------------
def dynamic_semantic_filtering(prompt_features, region_features, weight, bias, scale):
    """Prompts filtered by the image: every label gathers the regions its prompt asks for.  [figure; scale: choice D4]

    A = softmax_M(scale * Linear(E_ca) X^T), T_ca = A X; the linear layer is on the text side only, key = value = X.
    prompt_features: [C, d]; region_features: [B, M, d]; weight: [d, d]; bias: [d] -> (T_ca [B, C, d], A [B, C, M])
    """
    attention = torch.softmax(scale * (prompt_features @ weight + bias) @ region_features.mT, -1)
    return attention @ region_features, attention


# --- SSPA: QSM --------------------------------------------------------------------------------------------------------
def hamilton_strips(R, I, J, K):  # noqa: E741 (the product's own letters)
    """What x_r, x_i, x_j, x_k are multiplied by: a strip [n, 4 m] each, for y_r, y_i, y_j, y_k in turn."""
    return [torch.cat(strip, 1) for strip in ((R, I, J, K), (-I, R, K, -J), (-J, -K, R, I), (-K, J, -I, R))]


def quaternion_linear_reference(components, r_weight, i_weight, j_weight, k_weight, bias=None):
    """Quaternion linear layer: input quaternions multiplied by weight quaternions from the left (Hamilton), summed.

        y_r = x_r R - x_i I - x_j J - x_k K        y_i = x_r I + x_i R - x_j K + x_k J
        y_j = x_r J + x_i K + x_j R - x_k I        y_k = x_r K - x_i J + x_j I + x_k R       [field: pytorch-qnn]

    components: x_r, x_i, x_j, x_k, each [..., n], broadcastable, None for zero; weights R, I, J, K: [n, m]; bias: [4 m]
    -> [..., 4 m], the components of y side by side
    """
    like = next(component for component in components if component is not None)
    components = (torch.zeros_like(like) if component is None else component for component in components)
    x = torch.cat(torch.broadcast_tensors(*components), -1)
    y = x @ torch.cat(hamilton_strips(r_weight, i_weight, j_weight, k_weight))
    return y if bias is None else y + bias


def quaternion_linear_fused(components, r_weight, i_weight, j_weight, k_weight, bias=None):
    """Same as quaternion_linear_reference. The components are multiplied apart, each by its own strip, and added by
    broadcasting: one that does not vary with the image costs C rows, with the label B rows, a zero one nothing."""
    strips = hamilton_strips(r_weight, i_weight, j_weight, k_weight)
    products = [part @ strip for part, strip in zip(components, strips, strict=True) if part is not None]
    products.sort(key=torch.numel)
    if bias is not None:
        products[0] = products[0] + bias
    shape, y = torch.broadcast_shapes(*(product.shape for product in products)), products.pop()
    y = y if y.shape == shape else y.expand(shape).clone()
    for product in products:
        y += product  # in place: a matrix product does not need its result for its gradient
    return y


def quaternion_init(fan_in, fan_out, generator):
    """Weights R, I, J, K [fan_in, fan_out] of a quaternion layer, fans counted in quaternions.  [field: pytorch-qnn]

    Modulus chi(4) / sqrt(2 (fan_in + fan_out)), phase uniform in (-pi, pi), axis uniform in the cube and normalised.
    """
    shape = (fan_in, fan_out)
    modulus = torch.randn(4, *shape, generator=generator).norm(dim=0) / math.sqrt(2 * (fan_in + fan_out))
    phase = (2 * torch.rand(shape, generator=generator) - 1) * math.pi
    axis = F.normalize(2 * torch.rand(3, *shape, generator=generator) - 1, dim=0)
    return modulus * torch.cos(phase), *(modulus * torch.sin(phase) * axis)


# --- SSPA: GDMA -------------------------------------------------------------------------------------------------------
class GatedAttention(NamedTuple):  # the weights of one direction; every matrix multiplies from the right
    query: torch.Tensor          # [d, d]
    key: torch.Tensor            # [d, d]
    value: torch.Tensor          # [d, d]
    scale: torch.Tensor          # scalar
    gate_query: torch.Tensor     # [d, d]; None: no gate
    gate_attended: torch.Tensor  # [d, d]
    gate_bias: torch.Tensor      # [d]


def gated_attention_reference(x, context, w):
    """x [B, n, d] asks context [B, m, d]: a = softmax(scale * (x W_Q)(context W_K)^T) (context W_V), and for every
    channel g = sigmoid(x G_x + a G_a + b) -> (x + g a [B, n, d], g or None)  [purpose: paper; formula: choice D7]"""
    attention = torch.softmax(w.scale * (x @ w.query) @ (context @ w.key).mT, -1)            # [B, n, m]
    a = attention @ (context @ w.value)                                          # [B, n, d]
    if w.gate_query is None:
        return x + a, None
    gate = torch.sigmoid(x @ w.gate_query + a @ w.gate_attended + w.gate_bias)
    return x + gate * a, gate


def gated_attention_fused(x, context, w):
    """Same as gated_attention_reference. Projections wait for the side with fewer rows (associativity)."""
    few_ask_many, gated = x.shape[-2] <= context.shape[-2], w.gate_query is not None
    if few_ask_many:  # those who ask carry the projections
        attention = torch.softmax(w.scale * (x @ w.query @ w.key.mT) @ context.mT, -1)
        a = attention @ context @ w.value
        a_gate = a @ w.gate_attended if gated else None
    else:  # many ask few: those who are asked carry them
        attention = torch.softmax(x @ (w.scale * context @ w.key @ w.query.mT).mT, -1)
        value = context @ w.value
        a = attention @ value
        a_gate = attention @ (value @ w.gate_attended) if gated else None
    if not gated:
        return x + a, None
    gate = torch.sigmoid(torch.addmm(w.gate_bias, x.flatten(0, -2), w.gate_query).view(x.shape) + a_gate)
    return torch.addcmul(x, gate, a), gate


def gated_alignment_reference(label_features, region_features, v_to_s=None, s_to_v=None,
                              attend=gated_attention_reference):
    """Gated dual-modal alignment: labels ask regions (V-to-S) and regions ask labels (S-to-V), in parallel on the
    un-updated features; a gate lets through what is wanted of the answer.  [figure]

    label_features: [B, C, d]; region_features: [B, M, d]; v_to_s, s_to_v: GatedAttention, None leaves a side as it is
    -> (T_fn [B, C, d], X_fn [B, M, d], V-to-S gate [B, C, d] or None, S-to-V gate [B, M, d] or None)
    """
    labels, label_gate = attend(label_features, region_features, v_to_s) if v_to_s else (label_features, None)
    regions, region_gate = attend(region_features, label_features, s_to_v) if s_to_v else (region_features, None)
    return labels, regions, label_gate, region_gate


def gated_alignment_fused(label_features, region_features, v_to_s=None, s_to_v=None):
    """Same as gated_alignment_reference. With fewer labels than regions, one d x d product a region is left of five:
    the gate's own."""
    return gated_alignment_reference(label_features, region_features, v_to_s, s_to_v, gated_attention_fused)


# --- SSPA: losses -----------------------------------------------------------------------------------------------------
def _integers(targets):
    if targets.ndim < 2 or targets.is_floating_point():
        raise ValueError(f"targets must be integers or bool, [..., B, C]: not {targets.dtype}, {list(targets.shape)}")
    return targets


def asymmetric_loss_reference(logits, targets, gamma_neg=2.0, gamma_pos=0.0, clip=0.0, focal_gradient="full"):
    """Asymmetric loss. focal_gradient: "full", through its weights too, or "stopped".  [exponents: author; choice D10]

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


def asymmetric_loss_fused(logits, targets, gamma_neg=2.0, gamma_pos=0.0, clip=0.0, focal_gradient="full"):
    """Same as asymmetric_loss_reference. Loss and gradient in one pass over cache-sized blocks."""
    targets, logits = _integers(targets), logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _AsymmetricLoss.apply(logits, targets, gamma_neg, gamma_pos, clip, focal_gradient)


# --- SSPA: soft aggregator --------------------------------------------------------------------------------------------
def soft_aggregate_reference(label_features, region_features, temperature, scale):
    """A label's logit from all regions: those that resemble it more count more, and none is left out.  [idea: paper]

    S = cos(label, region), s = scale * sum over M of softmax_M(S / temperature) * S.  [form: field, DualCoOp, TaI-DPT]
    label_features: [B, C, d], or [C, d] for all; region_features: [B, M, d]; temperature: in units of S -> [B, C]
    """
    S = F.normalize(label_features, dim=-1) @ F.normalize(region_features, dim=-1).mT        # [B, C, M]
    return scale * (torch.softmax(S / temperature, -1) * S).sum(-1)


AGGREGATOR_BLOCK = 2 ** 19  # cosines alive at once, so that they stay in the processor's cache


def _norms(features):
    return features.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def soft_aggregate_fused(label_features, region_features, temperature, scale):
    """Same as soft_aggregate_reference, without normalised copies of the features, in blocks of samples."""
    if label_features.ndim == 2:  # no [B, C, d] is there to be spared
        return soft_aggregate_reference(label_features, region_features, temperature, scale)
    step, gathered = max(1, AGGREGATOR_BLOCK // (label_features.shape[1] * region_features.shape[1])), []
    for t, x in zip(label_features.split(step), region_features.split(step), strict=True):
        cosine = t @ x.mT / _norms(t) / _norms(x).mT                             # [b, C, M]
        gathered.append(torch.linalg.vecdot(torch.softmax(cosine / temperature, -1), cosine))
    return scale * torch.cat(gathered)


def soft_aggregate_loss_reference(label_features, region_features, temperature, scale, bias, targets, *exponents):
    """Asymmetric loss of the regional branch's logits soft_aggregate + bias. targets: [B, C] of 1, 0, -1 -> scalar"""
    logits = soft_aggregate_reference(label_features, region_features, temperature, scale) + bias
    return asymmetric_loss_reference(logits, targets, *exponents)


class _SoftAggregateLoss(torch.autograd.Function):
    """Loss and gradients in one pass over blocks of samples, and of labels where there are many: no C x M is kept."""
    @staticmethod
    def forward(ctx, labels, regions, temperature, scale, bias, targets, *exponents):
        (batch, classes, _), count = labels.shape, regions.shape[1]
        d_labels, d_regions = torch.empty_like(labels), torch.zeros_like(regions)
        loss, d_scale, d_bias = (labels.new_zeros(()) for _ in range(3))
        step = max(1, AGGREGATOR_BLOCK // (classes * count))
        width = classes if step > 1 else max(1, AGGREGATOR_BLOCK // count)
        blocks = [(slice(row, row + step), slice(label, label + width))
                  for row in range(0, batch, step) for label in range(0, classes, width)]
        for rows, part in blocks:
            t, x = labels[rows, part], regions[rows]                             # [b, c, d], [b, M, d]
            t_norm, x_norm = _norms(t), _norms(x)                                # [b, c, 1], [b, M, 1]
            cosine = (t @ x.mT).div_(t_norm).div_(x_norm.mT)                     # [b, c, M]
            weight = torch.softmax(cosine / temperature, -1)
            s = torch.linalg.vecdot(weight, cosine)                              # [b, c], what each label gathers
            z = scale * s + bias
            loss += _asymmetric_in_place(z, targets[rows, part], *exponents)     # z is now d loss / d z
            dz = z.div_(batch)
            d_scale += (dz * s).sum()
            d_bias += dz.sum()
            # d s / d cosine = weight * (1 + (cosine - s) / temperature), since s = sum of weight * cosine, and of the
            # softmax d weight_n / d cosine_m = weight_n ([n = m] - weight_m) / temperature; d loss / d s = scale * dz
            d_cosine = (cosine - s[..., None]).div_(temperature).add_(1).mul_(weight).mul_((scale * dz)[..., None])
            # cosine = t x / (|t| |x|), so d cosine / d t = x / (|t| |x|) - cosine t / |t|^2: the norm costs a
            # projection (what lies along t only changes its length); likewise for x
            along = d_cosine * cosine
            d_product = d_cosine.div_(t_norm).div_(x_norm.mT)                    # d loss / d (t x)
            torch.mul(t, -along.sum(2)[..., None] / t_norm ** 2, out=d_labels[rows, part]).baddbmm_(d_product, x)
            d_regions[rows].addcmul_(x, along.sum(1)[..., None] / x_norm ** 2, value=-1).baddbmm_(d_product.mT, t)
        ctx.save_for_backward(d_labels, d_regions, d_scale, d_bias)
        return loss / batch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        unit = grad.item() == 1  # the usual case: spare a pass over the largest tensors
        d_labels, d_regions, d_scale, d_bias = (slope if unit else slope * grad for slope in ctx.saved_tensors)
        return d_labels, d_regions, None, d_scale, d_bias, *[None] * 5


def soft_aggregate_loss_fused(label_features, region_features, temperature, scale, bias, targets,
                              gamma_neg=2.0, gamma_pos=0.0, clip=0.0, focal_gradient="full"):
    """Same as soft_aggregate_loss_reference. A block goes from cosines to loss to gradients while in the cache."""
    return _SoftAggregateLoss.apply(label_features, region_features, temperature, scale, bias, _integers(targets),
                                    gamma_neg, gamma_pos, clip, focal_gradient)


# --- SSPA: the whole --------------------------------------------------------------------------------------------------
class Labels(NamedTuple):  # all that is made of the label names
    names: list
    texts: list              # what KAP reads of each
    tokens: torch.Tensor     # [C, 77] of "X ... X {name}."
    knowledge: torch.Tensor  # T_ka [C, d]
    words: torch.Tensor      # embeddings of "a photo of a" [4, width]


class Prediction(NamedTuple):
    global_logits: torch.Tensor     # s_G [B, C]
    regional_logits: torch.Tensor   # s_R [B, C]
    label_features: torch.Tensor    # T_fn [B, C, d]
    region_features: torch.Tensor   # X_fn [B, M, d]
    filtering: torch.Tensor         # attention of DSF [B, C, M], None without it
    label_gate: torch.Tensor        # V-to-S [B, C, d], None without it
    region_gate: torch.Tensor       # S-to-V [B, M, d], None without it


class SSPA(nn.Module):
    """The learned parts and the frozen CLIP they stand on. Only parameters that learn have requires_grad."""

    def __init__(self, config, clip_model, labels, seed):
        """clip_model: open_clip's CLIP; its image tower learns with --tune-image full; labels: Labels"""
        super().__init__()
        clip_model.requires_grad_(False).visual.requires_grad_(config.tune_image == "full")
        self.config, self.clip, fused = config, clip_model, config.impl == "fused"
        self.encode_prompts = encode_prompts_fused if fused else encode_prompts_reference
        self.quaternion_linear = quaternion_linear_fused if fused else quaternion_linear_reference
        self.gated_alignment = gated_alignment_fused if fused else gated_alignment_reference
        self.asymmetric_loss = asymmetric_loss_fused if fused else asymmetric_loss_reference
        self.aggregate = soft_aggregate_fused if fused else soft_aggregate_reference
        self.aggregate_loss = soft_aggregate_loss_fused if fused else soft_aggregate_loss_reference
        # the aggregator's ablations are its limits: a hot softmax weighs all regions alike, a cold one only the highest
        self.temperature = {"soft": config.temperature, "mean": 1e9, "max": 1e-9}[config.aggregator]
        self.register_buffer("tokens", labels.tokens, persistent=False)
        self.register_buffer("knowledge", F.normalize(labels.knowledge, dim=-1), persistent=False)
        d, width, draw = labels.knowledge.shape[1], labels.words.shape[1], torch.Generator().manual_seed(seed)

        def uniform(rows):  # PyTorch's own start for linear layers
            return (2 * torch.rand(rows, d, generator=draw) - 1) / math.sqrt(rows)

        def log_scale():  # choice D4
            start = torch.tensor(math.log(config.attention_scale or d ** -0.5))
            return nn.Parameter(start, requires_grad=config.attention_scale > 0)

        contexts = 0.02 * torch.randn(2, config.context_length, width, generator=draw)
        contexts[:, :len(labels.words)] = labels.words[:config.context_length]   # choice D1
        self.contexts = nn.Parameter(contexts)                                   # the global branch's, CAP's
        self.dsf, self.quaternions, self.directions = None, nn.ModuleList(), nn.ModuleDict()
        if not config.no_dsf and config.fusion != "knowledge":                   # identity: choice D5
            self.dsf = nn.ParameterDict({"weight": torch.eye(d), "bias": torch.zeros(d), "log_scale": log_scale()})
        if config.fusion == "qsm":
            if d % 4:
                raise UsageError(f"QSM puts four components of d / 4 side by side: 4 must divide CLIP's width {d}")
            sizes, kinds = [d] * config.quaternion_layers + [d // 4], ("r_weight", "i_weight", "j_weight", "k_weight")
            for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):          # choice D6
                weights = dict(zip(kinds, quaternion_init(fan_in, fan_out, draw), strict=True))
                self.quaternions.append(nn.ParameterDict({**weights, "bias": torch.zeros(4 * fan_out)}))
        if config.fusion == "concat":
            self.concat_weight = nn.Parameter(uniform(2 * d))
        for name in ("v-to-s", "s-to-v"):
            if config.alignment in ("both", name):
                weights = {kind: torch.eye(d) for kind in ("query", "key", "value")} | {"log_scale": log_scale()}
                if not config.no_gate:
                    weights |= {"gate_query": uniform(d), "gate_attended": uniform(d), "gate_bias": torch.zeros(d)}
                self.directions[name] = nn.ParameterDict(weights)
        self.global_log_scale, self.regional_log_scale = (nn.Parameter(torch.tensor(math.log(SCALE))) for _ in range(2))
        self.global_bias, self.regional_bias = (nn.Parameter(torch.tensor(0.0)) for _ in range(2))
        self.eval()  # BatchNorm statistics stay CLIP's  [choice D13]

    def prompts(self):
        """-> T_g of the global branch, E_ca of CAP, each [C, d] of unit length"""
        return F.normalize(self.encode_prompts(self.clip, self.contexts, self.tokens), dim=-1)

    def filter_prompts(self, E_ca, X):
        """DSF. E_ca: [C, d]; X: [B, M, d] -> (T_ca [B, C, d], attention [B, C, M]); without it (E_ca, None)"""
        if self.dsf is None:
            return E_ca, None
        T_ca, attention = dynamic_semantic_filtering(E_ca, X, self.dsf.weight, self.dsf.bias, self.dsf.log_scale.exp())
        return F.normalize(T_ca, dim=-1), attention

    def fuse(self, T_ka, T_ca, x0):
        """QSM, or one of its ablations. T_ka: [C, d]; T_ca: [B, C, d]; x0: [B, d] -> T_uf [B, C, d]"""
        if self.config.fusion == "qsm":
            components = (None, T_ka, T_ca, x0[:, None])                         # Q = 0 + T_ka i + T_ca j + x0 k
            for layer in self.quaternions[:-1]:
                components = F.relu(self.quaternion_linear(components, **layer)).chunk(4, -1)
            T_uf = self.quaternion_linear(components, **self.quaternions[-1])
        elif self.config.fusion == "concat":
            T_uf = torch.cat(torch.broadcast_tensors(T_ka, T_ca), -1) @ self.concat_weight
        else:
            T_uf = {"knowledge": T_ka, "context": T_ca, "sum": T_ka + T_ca}[self.config.fusion]
        return F.normalize(T_uf, dim=-1).expand(len(x0), -1, -1)

    def align(self, T_uf, X):
        """GDMA -> (T_fn [B, C, d], X_fn [B, M, d], V-to-S gate, S-to-V gate)"""
        weights = {}
        for name, stored in self.directions.items():
            gate = (stored.get(key) for key in ("gate_query", "gate_attended", "gate_bias"))
            weights[name] = GatedAttention(stored.query, stored.key, stored.value, stored.log_scale.exp(), *gate)
        return self.gated_alignment(T_uf, X, weights.get("v-to-s"), weights.get("s-to-v"))

    def forward(self, x0, X, targets=None, prompts=None):
        """x0: [B, d]; X: [B, M, d]; targets: int [B, C] or None; prompts: what self.prompts() gave, to spare it
        -> Prediction, or with targets the loss, a scalar averaged over the batch."""
        x0, X = F.normalize(x0, dim=-1), F.normalize(X.to(x0.dtype), dim=-1)     # choice D14
        T_ka, (T_g, E_ca) = self.knowledge, self.prompts() if prompts is None else prompts   # KAP, global, CAP  [C, d]
        T_ca, filtering = self.filter_prompts(E_ca, X)                           # DSF   [B, C, d], [B, C, M]
        T_uf = self.fuse(T_ka, T_ca, x0)                                         # QSM   [B, C, d]
        T_fn, X_fn, label_gate, region_gate = self.align(T_uf, X)                # GDMA  [B, C, d], [B, M, d]
        with torch.autocast(x0.device.type, enabled=False):                      # logits and losses in float32
            s_G = self.global_log_scale.exp() * x0.float() @ T_g.float().T + self.global_bias               # [B, C]
            regional = T_fn.float(), X_fn.float(), self.temperature, self.regional_log_scale.exp()
            if targets is None:
                s_R = self.aggregate(*regional) + self.regional_bias             # soft aggregator  [B, C]
                return Prediction(s_G, s_R, T_fn, X_fn, filtering, label_gate, region_gate)
            exponents = self.config.gamma_neg, GAMMA_POS, self.config.clip, self.config.focal_gradient
            L_G = self.asymmetric_loss(s_G, targets, *exponents)
            L_R = self.aggregate_loss(*regional, self.regional_bias, targets, *exponents)
            return (self.config.branches != "regional") * L_G \
                + (self.config.branches != "global") * self.config.regional_weight * L_R

    def learned(self):
        """{name: parameter} of what training changes, which is what a checkpoint holds"""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def branch_scores(branches, global_logits, regional_logits):
    """Mean of the branches' sigmoid scores.  [mean: author; sigmoid: choice D10]  -> float64 [B, C] in 0..1"""
    of_global, of_regional = torch.sigmoid(global_logits.double()), torch.sigmoid(regional_logits.double())
    return {"both": (of_global + of_regional) / 2, "global": of_global, "regional": of_regional}[branches]


# --- inputs -----------------------------------------------------------------------------------------------------------
class Photos(NamedTuple):
    photos: list             # paths, or scenes' (split, index)
    labels: torch.Tensor     # int8 [N, C]
    x0: torch.Tensor         # [N, d] of CLIP's own tower, None where neither needed
    X: torch.Tensor          # float16 [N, M, d], None where photos are encoded on the fly
    policy: str


class Inputs(NamedTuple):
    labels: Labels
    train: Photos
    test: Photos
    baselines: dict          # of run.baselines


def names_of(config):
    """The label names of a run: the dataset's own, or those of them that --labels keeps."""
    own = data.label_names(config.dataset, config.data_root)
    names = data.read_labels(config.labels) if config.labels else own
    if unknown := [name for name in names if name not in own]:
        raise UsageError(f"--labels {config.labels}: '{unknown[0]}' is no label of {config.dataset}, and SSPA learns "
                         f"from labelled photos; choose among {', '.join(own[:30])}")
    return names


def labels_of(config, clip, names, texts=None):
    """-> Labels. texts: {name: what KAP reads of it}; the other names' are made, by --descriptions"""
    room, places = clip.tokenizer.context_length, " ".join(["X"] * config.context_length)
    if config.context_length + 3 > room:
        raise UsageError(f"--context-length {config.context_length}: this CLIP reads {room} tokens, the label too")
    texts = dict(texts or {})
    if new := [name for name in names if name not in texts]:
        none = config.descriptions == "none"
        descriptions = {} if none else data.descriptions_of(config.dataset, new, config.descriptions)
        texts.update(zip(new, knowledge_texts(clip, new, descriptions), strict=True))
    start = clip.tokenizer(["a photo of a"]).to(clip.model.logit_scale.device)
    words = clip.model.token_embedding(start)[0, 1:5].detach().cpu()
    tokens, texts = clip.tokenizer([f"{places} {name}." for name in names]), [texts[name] for name in names]
    return Labels(names, texts, tokens, embed.embed_texts(clip, texts, config.cache), words)


def find_photos(config, *splits):
    """-> {split: data.LabelledPhotos}"""
    found = {split: data.load_photos(config.dataset, config.data_root, split, config.limit, config.policy)
             for split in splits}
    if config.photo_count and "train" in found:
        part = found["train"]
        rows = np.sort(np.random.default_rng(0).permutation(len(part.photos))[:config.photo_count])
        found["train"] = part.at(rows)
    return found


def load_inputs(config, clip, labels, found):
    """Features of the photos found, of training photos where the tower is frozen -> Inputs"""
    own, device = data.label_names(config.dataset, config.data_root), clip.model.logit_scale.device
    columns, loaded, tuned = [own.index(name) for name in labels.names], {"train": None}, config.tune_image == "full"
    if tuned and "train" in found and device.type == "cpu":
        say("the image tower is tuned on the CPU, which takes long; --tune-image none freezes it and trains in minutes")
    with torch.no_grad():
        regions = image_features(clip.model.visual, torch.zeros(1, 3, *clip.image_size, device=device))[1]
    gib = sum(len(part.photos) for part in found.values()) * 2 * regions.numel() / 2 ** 30
    if not tuned and gib > CACHE_LIMIT:
        say(f"frozen region features would take {gib:.1f} GiB: photos are encoded anew in every epoch")
    for split, part in found.items():
        x0, X, kept = None, None, np.arange(len(part.photos))
        if not tuned and gib <= CACHE_LIMIT:
            x0, X, kept = embed.embed_regions(clip, part.photos, image_features, config.cache, workers=config.workers,
                                              quiet=config.quiet)
        elif split == "test" or not config.no_probe:  # for the baselines
            x0, kept = embed.embed_photos(clip, part.photos, config.cache, workers=config.workers, quiet=config.quiet)
        policy = f"{part.policy}; {len(part.photos) - len(kept)} unreadable {split} photos left out"
        truth = torch.from_numpy(part.labels[kept][:, columns])
        loaded[split] = Photos([part.photos[row] for row in kept], truth, x0, X, policy)
    prompts = embed.embed_texts(clip, [f"a photo of a {name}." for name in labels.names], config.cache)
    train, test = loaded["train"], loaded["test"]
    learnt_from = (train.x0, train.labels) if train else ()
    baselines = run.baselines(config, prompts, test.x0, test.labels.numpy(), *learnt_from)
    return Inputs(labels, train, test, baselines)


def seen_of(inputs, columns):
    """Inputs with these columns of the labels alone, which is what training sees"""
    names, texts = ([some[column] for column in columns] for some in (inputs.labels.names, inputs.labels.texts))
    labels = Labels(names, texts, inputs.labels.tokens[columns], inputs.labels.knowledge[columns], inputs.labels.words)
    return inputs._replace(labels=labels, train=inputs.train._replace(labels=inputs.train.labels[:, columns]))


def batches_of(config, clip, photos, batches, augment=None):
    """batches: list of row indices [b] -> iterator over (x0 [b, d], X [b, M, d], int8 labels [b, C]) on the model's
    device: frozen features as they are, images through the tower. An unreadable photo is a zero image whose labels are
    all -1. augment: (seed, epoch, CROP_SCALE) or None"""
    device = clip.model.logit_scale.device
    if photos.X is not None:
        for rows in batches:
            yield photos.x0[rows].to(device), photos.X[rows].to(device), photos.labels[rows].to(device)
        return
    decoded = embed.decoded(clip, photos.photos, [rows.tolist() for rows in batches], config.workers, augment)
    for rows, (images, readable) in zip(batches, decoded, strict=True):
        with embed.autocast(device, config.precision):
            x0, X = image_features(clip.model.visual, images.to(device, non_blocking=True))
        yield x0, X, torch.where(readable[:, None], photos.labels[rows], -1).to(device)


# --- train ------------------------------------------------------------------------------------------------------------
def set_biases(config, clip, model, photos, device):
    """Each branch's bias, so that the sigmoid of the mean logit of the first photos is PRIOR.  [choice D9]"""
    with torch.no_grad(), embed.autocast(device, config.precision):
        x0, X, _ = next(batches_of(config, clip, photos, [torch.arange(min(64, len(photos.photos)))]))
        start = model(x0, X)
        for bias, logits in ((model.global_bias, start.global_logits), (model.regional_bias, start.regional_logits)):
            bias.add_(math.log(PRIOR / (1 - PRIOR)) - logits.mean())


def optimiser_of(config, model):
    """AdamW with the peak learning rates of the three kinds of parameters.  [D11]"""
    tower, groups = set(model.clip.visual.parameters()), {}
    for name, parameter in model.learned().items():
        factor = config.image_lr_factor if parameter in tower else 1
        peak = config.prompt_lr if name == "contexts" else config.lr * factor
        groups.setdefault(peak, {"params": [], "peak": peak})["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), lr=config.lr, weight_decay=WEIGHT_DECAY, fused=config.impl == "fused")


def warm_up_then_cosine(step, total_steps):
    return min(1, (step + 1) / max(1, WARM_UP * total_steps)) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def train(config, clip, inputs, seed, device, folder, title):
    """One run -> (SSPA with the averaged weights, log). title: names the run in resume.pt and log.jsonl.

    Randomness hangs on the seed, the epoch and the photo alone, so an interrupted training goes on where it was, and
    several processes (torchrun) learn what one would: each takes its share of a batch. Raises run.Diverged.
    """
    model, count = SSPA(config, clip.model, inputs.labels, seed).to(device), len(inputs.train.photos)
    batch_size = min(config.batch_size, count)
    if batch_size < run.WORLD:
        raise UsageError(f"a batch of {batch_size} photos cannot feed {run.WORLD} processes; raise --batch-size")
    set_biases(config, clip, model, inputs.train, device)
    learned, optimiser = model.learned(), optimiser_of(config, model)
    averages = {name: parameter.detach().clone() for name, parameter in learned.items()}
    state = learned | {f"average of {name}": average for name, average in averages.items()}
    log = run.load_resume(folder / "resume.pt", title, state, optimiser)
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if run.WORLD > 1 else model
    steps = count // batch_size  # the rest of an epoch's order is left out  [D12]
    total_steps, step, save_at = config.epochs * steps, len(log) * steps, time.time()
    bar = tqdm(initial=step, total=total_steps, desc=f"training {title}", unit="step", disable=config.quiet or None)
    for epoch in range(len(log), config.epochs):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch + 1))
        shares = [batch[run.RANK::run.WORLD] for batch in order[:steps * batch_size].split(batch_size)]
        augment = (seed, epoch, CROP_SCALE) if config.tune_image == "full" else None
        epoch_loss, began = torch.zeros((), dtype=torch.float64, device=device), time.time()
        for x0, X, targets in batches_of(config, clip, inputs.train, shares, augment):
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * warm_up_then_cosine(step, total_steps)
            optimiser.zero_grad()
            with embed.autocast(device, config.precision):
                loss = parallel(x0, X, targets)
            loss = loss * (len(targets) / batch_size * run.WORLD)  # once gradients are averaged: a mean over the batch
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                decay = min(config.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(averages.values()), [p.detach() for p in learned.values()], 1 - decay)
            epoch_loss += loss.detach() / steps / run.WORLD
            step += 1
            bar.update()
        if run.WORLD > 1:
            dist.all_reduce(epoch_loss)
        if not all(bool(tensor.isfinite().all()) for tensor in (epoch_loss, *learned.values())):
            raise run.Diverged(f"training diverged in epoch {epoch + 1} (loss {float(epoch_loss)}); lower --lr (now "
                               f"{config.lr:g}) or --prompt-lr (now {config.prompt_lr:g})")
        seconds = round(time.time() - began, 3)
        log.append({"run": title, "epoch": epoch + 1, "loss": float(epoch_loss), "seconds": seconds})
        if run.RANK == 0 and time.time() >= save_at and epoch + 1 < config.epochs:
            began = time.time()
            run.save_resume(folder / "resume.pt", title, state, optimiser, log)
            save_at = time.time() + max(run.RESUME_SECONDS, 20 * (time.time() - began))
    bar.close()
    run.fill(learned, averages)
    return model, log


# --- score ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def score(config, clip, model, photos, device):
    """Photos divided among the processes -> (scores, global logits, regional logits: float64 [N, C])"""
    batches = [part for part in torch.arange(len(photos.photos))[run.RANK::run.WORLD].split(64) if len(part)]
    logits = torch.zeros(2, *photos.labels.shape, dtype=torch.float64, device=device)
    with embed.autocast(device, config.precision):
        prompts = model.prompts()
        for rows, (x0, X, _) in zip(batches, batches_of(config, clip, photos, batches), strict=True):
            logits[:, rows] = torch.stack(model(x0, X, prompts=prompts)[:2]).double()
    if run.WORLD > 1:
        dist.all_reduce(logits)  # every row is zero but in one process
    logits = logits.cpu()
    return branch_scores(config.branches, *logits).numpy(), *logits.numpy()


def evaluate(config, clip, model, inputs, device):
    """-> dict for metrics.json: what run.measure gives, and the mAP of each branch that is on"""
    scores, global_logits, regional_logits = score(config, clip, model, inputs.test, device)
    truth, logits = inputs.test.labels.numpy(), {"global": global_logits, "regional": regional_logits}
    on = [branch for branch in logits if config.branches in ("both", branch)]
    of_branches = {f"mAP_{branch}": metrics.mean_average_precision(logits[branch], truth) for branch in on}
    return run.measure(scores, scores, truth) | of_branches


# --- predict and explain ----------------------------------------------------------------------------------------------
def predict(config, clip, model, names, device, folder):
    """Tags photos, block by block."""
    def encode(images):
        prediction = model(*image_features(clip.model.visual, images), prompts=prompts)
        return {"scores": branch_scores(config.branches, *prediction[:2])}

    def scored(photos):
        for rows, tensors in embed.stream_photos(clip, photos, "", encode, None, config.workers, config.quiet):
            yield rows, tensors["scores"].numpy()
    with torch.no_grad(), embed.autocast(device, config.precision):
        prompts = model.prompts()
    run.tag(config, run.photos_of(config, config.predict), names, scored, folder)


@torch.no_grad()
def explain(config, clip, model, names, device, folder):
    """Where the strongest labels were seen: a picture a photo in folder/explain, its path on stdout. A row a label: its
    similarity to every region after GDMA, DSF's attention, boxes where known; and the S-to-V gate's mean channel."""
    paths, drawn = run.photos_of(config, config.explain), 0
    decoded = embed.decoded(clip, paths, [[row] for row in range(len(paths))], config.workers)
    for path, (images, readable) in zip(paths, decoded, strict=True):
        if not readable.all():
            continue
        with embed.autocast(device, config.precision):
            prediction = model(*image_features(clip.model.visual, images.to(device)))
        scores = branch_scores(config.branches, *prediction[:2])[0].cpu().numpy()
        T_fn, X_fn = F.normalize(prediction.label_features, dim=-1), F.normalize(prediction.region_features, dim=-1)
        maps = {"similarity after GDMA": T_fn @ X_fn.mT, "DSF attention": prediction.filtering}
        maps = [(title, values[0].float().cpu().numpy()) for title, values in maps.items() if values is not None]
        label_gate, region_gate = (None if gate is None else gate[0].float().mean(-1).cpu().numpy()
                                   for gate in (prediction.label_gate, prediction.region_gate))
        strongest = np.argsort(-scores, kind="stable")[:config.top_k or 3]
        target = folder / "explain" / f"{drawn:03d}_{path.stem[:60]}.png"
        seen = pictures.as_seen(images[0].numpy(), clip.preprocess.transforms[-1])
        places = datasets.boxes_of(path, names)
        boxes = () if places is None else datasets.in_view(*places)[0]
        pictures.explanation(target, path.name, seen, names, scores, strongest, maps, region_gate, label_gate, boxes)
        print(target)
        drawn += 1
    if not drawn:
        raise UsageError("no photo could be read; check the files named above")


# --- main -------------------------------------------------------------------------------------------------------------
def recorded(config, argv, settings, device, began, clip, inputs, trained, runs, finished):
    """metrics.json. The main setting is the full method, or what the options make of it: ablation "none"."""
    chosen, truth = [one for one in runs if one["ablation"] == "none"], inputs.test.labels.numpy()
    return run.record("sspa", config, argv, settings, device, time.time() - began, inputs.labels.names, truth, runs,
                      chosen, finished, inputs.baselines, trained, backbone=clip.name, policy=inputs.test.policy,
                      texts=inputs.labels.texts, train_count=len(inputs.train.photos) if inputs.train else 0)


def train_and_score(config, argv, device):
    """Every seed of the full method and of the ablations asked for; finished ones stand in metrics.json -> result"""
    began, settings = time.time(), run.settings_of(config)
    folder = Path(config.output or f"runs/sspa/{config.dataset}")
    result, _lock = run.open_folder(config, folder, settings)
    if result is not None and result["finished"]:
        say(f"{folder} is finished; --overwrite does it again")
        return result
    names, found = names_of(config), find_photos(config, "train", "test")  # what is missing is said at once
    seen, clip = run.known_columns(config, names), run.load_clip(config, device)
    inputs, trained = load_inputs(config, clip, labels_of(config, clip, names), found), [names[row] for row in seen]
    if result is None:
        run.begin(folder, recorded(config, argv, settings, device, began, clip, inputs, trained, [], False))
    runs, changes = result["runs"] if result else [], {"none": {}}
    if config.ablate is not None:
        changes |= {name: ABLATIONS[name] for name in config.ablate or ABLATIONS}
    wanted = [(ablation, seed) for ablation in changes for seed in config.seed]
    for ablation, seed in wanted[len(runs):]:
        changed, own, at = replace(config, **changes[ablation]), inputs, time.time()
        if config.tune_image == "full" and runs:  # every run starts from CLIP's own image tower
            clip = run.load_clip(config, device)
        if changed.descriptions != config.descriptions:
            own = inputs._replace(labels=labels_of(changed, clip, inputs.labels.names))
        title = f"{'SSPA' if ablation == 'none' else ablation}, seed {seed}"
        model, log = train(changed, clip, seen_of(own, seen), seed, device, folder, title)
        learned = model.learned()
        if config.unseen:  # nothing that is learnt belongs to a label
            model = SSPA(changed, clip.model, own.labels, seed).to(device)
            run.fill(model.learned(), learned)
        measured = evaluate(changed, clip, model, own, device)
        say(f"{title}: mAP {measured['mAP']:.2f}, {time.time() - at:.0f} s")
        runs.append({"seed": seed, "ablation": ablation, **measured, "seconds": round(time.time() - at, 2)})
        if run.RANK == 0:
            run.save_checkpoints(config, folder, len(runs) - 1, title, "sspa", learned, names=trained,
                                 texts=seen_of(own, seen).labels.texts, settings=run.settings_of(changed),
                                 encoder=clip.name, encoder_key=clip.key)
        done = recorded(config, argv, settings, device, began, clip, inputs, trained, runs, len(runs) == len(wanted))
        result = run.write_result(folder, done, log)
    return result


def use_checkpoint(config, argv, device):
    """--checkpoint: tag photos (--predict), look into it (--explain), or score it on the test photos -> result"""
    began, path = time.time(), Path(config.checkpoint)
    tensors, metadata = run.read_checkpoint(path, "sspa")
    config, trained = run.as_trained(config, path, metadata["settings"]), metadata["names"]
    on_photos, folder = bool(config.predict or config.explain), Path(config.output or path.parent)
    if config.explain and config.branches == "global":
        raise UsageError("--explain draws the regional branch, which this model was trained without")
    names = names_of(config) if not on_photos else data.read_labels(config.labels) if config.labels else trained
    settings = run.settings_of(config, checkpoint=data.digest(path))
    if config.output and not on_photos:
        result, _lock = run.open_folder(config, folder, settings)
        if result is not None:
            return result
    found = None if on_photos else find_photos(config, "test")
    if new := [name for name in names if name not in trained]:
        say(f"{path} was never trained on {', '.join(new[:10])}: label features come from words, so it tries")
    clip = run.load_clip(config, device)
    run.check_fits(path, metadata, trained, clip.name, clip.key)
    labels = labels_of(config, clip, names, dict(zip(trained, metadata["texts"], strict=True)))
    inputs = None if on_photos else load_inputs(config, clip, labels, found)
    model = SSPA(config, clip.model, labels, 0).to(device)
    run.use_weights(path, model.learned(), tensors)  # a tuned tower is CLIP's now: nothing may be cached any more
    if config.predict:
        predict(config, clip, model, names, device, folder)
    if config.explain:
        explain(config, clip, model, names, device, folder)
    if on_photos:
        return None
    measured = {"seed": config.seed[0], "ablation": "none", **evaluate(config, clip, model, inputs, device)}
    result = recorded(config, argv, settings, device, began, clip, inputs, trained, [measured], True)
    return run.write_result(folder, result) if config.output else result


def main(argv):
    config = run.parse(Config, argv, "SSPA: split-and-synthesize prompting with gated alignments (arXiv 2407.20920).",
                       "Marks: [paper] abstract; [figure] its figure; [author] its author's other code; [field] peers; "
                       f"[choice] ours, numbered in the docstring. Ablations: {', '.join(ABLATIONS)}.")
    if config.checkpoint and config.ablate is not None or config.explain and not config.checkpoint:
        raise UsageError("--explain looks into a trained model (--checkpoint FILE), and --ablate trains new ones")
    config = replace(config, lr=config.lr or (6e-3 if config.dataset == "scenes" else 5e-5),
                     tune_image=config.tune_image or ("full" if config.ablate is None else "none"))
    config, device = run.set_up(config)
    if result := (use_checkpoint if config.checkpoint else train_and_score)(config, argv, device):
        tower = "tuned" if result["config"]["tune_image"] == "full" else "frozen"
        count = f"trained on {result['train_count']:,} labelled photos" if result["train_count"] else "not trained here"
        run.report(result, f"{count}, image tower {tower}",
                   lambda one: "SSPA" if one["ablation"] == "none" else f"  {one['ablation']}")


if __name__ == "__main__":
    with run.exit_codes("sspa.py") as arguments:
        main(arguments)
