"""SSPA, "Split-and-Synthesize Prompting with Gated Alignments for Multi-Label Image Recognition" (arXiv 2407.20920).

For each label a sentence from a language model says what it looks like and what it is found with; learnable prompts are
filtered by the image; a quaternion network fuses both with the global image feature; labels and regions attend to each
other through gates; all regions enter a label's score. CLIP's text encoder is frozen, its image encoder tuned or not.
Shapes: B images, C labels, M regions (patch tokens), d joint CLIP width, L context vectors, P prompt sets.

The method, part by part, in the figure's order                         where
    image encoder: images -> x0 [B, d], X [B, M, d]                     image_features
    # SSPA: KAP   sentences -> T_ka [C, d]                              knowledge_texts
    # SSPA: CAP and global prompts   [P, L, width] -> [P, C, d]         encode_prompts_reference
    # SSPA: DSF   E_ca [C, d], X -> T_ca [B, C, d]                      DynamicSemanticFiltering
    # SSPA: QSM   T_ka, T_ca, x0 -> T_uf [B, C, d]                      quaternion_linear_reference, QuaternionFusion
    # SSPA: GDMA  T_uf, X -> T_fn [B, C, d], X_fn [B, M, d]             GatedAttention
    # SSPA: soft aggregator   T_fn, X_fn -> s_R [B, C]                  soft_aggregate_reference
    # SSPA: global branch   x0, T_g -> s_G [B, C], and all arrows       SSPA.forward
    # SSPA: losses, prediction                                          asymmetric_loss_reference, branch_scores
    probability that a score implies (beyond the paper)                 asymmetric_probability
    # SSPA: fast paths                                                  *_fused, each the same as its *_reference

    python sspa.py --tune-image none --seed 0 1 2       three seeds, 12 minutes on two cores, drawn scenes: 68.7 mAP
    python sspa.py --dataset voc2007 --gpu 0            needs the photos and open_clip's weights

Marks: [paper] stated in the abstract, [figure] read off the method figure, [author] in other public code of the first
author, [field] in the closest public peers, [choice] ours. The abstract and the figure fix which parts there are, what
flows between them, and that the text encoder is frozen. The full text was not at hand. Every other decision is marked
"choice Dn" where it is made; docs/choices.md lists all choices in one table.
"""
import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import baselines
import data
import embed
import metrics
import run
from data import UsageError, say
from run import option

SCALE = 20.0  # choice D9: initial scale of both branches' cosines
PRIOR = 0.1  # choice D9: sigmoid of the mean logit at the start, which sets the biases
GAMMA_POS = 0.0  # choice D10: focusing exponent of present labels
WEIGHT_DECAY = 1e-4  # choice D11
WARM_UP = 0.05  # choice D11: share of the steps in which the learning rate rises
CROP_SCALE = 0.5  # choice D13: smallest share of the area in random crops, with a tuned image tower
CACHE_LIMIT = 4.0  # GiB of frozen region features that are kept; beyond it photos are encoded anew in every epoch


@dataclass
class Config(run.Options):
    descriptions: str = option(None, 'JSON {"descriptions": {label: sentence}}, or none: the template alone (default: '
                               "assets/descriptions/<dataset>.json)", "data", metavar="FILE")
    tune_image: str = option("full", "full: train the image tower at --image-lr-factor [figure]; none: freeze it and "
                             "cache its features [choice D13]", choices=("none", "full"))
    context_length: int = option(4, "context vectors before a label's name [figure: 4 drawn; choice D1]",
                                 type=run.COUNT)
    attention_scale: float = option(10.0, "initial scale in the attention's softmax; 0: 1/sqrt(d), fixed [choice D4]",
                                    type=run.NOT_NEGATIVE)
    no_dsf: bool = option(False, "ablation: the prompts are not filtered by the image")
    fusion: str = option("qsm", "how the prompts are fused: with the image, by a quaternion network (qsm) [figure]; "
                         "the others are ablations, without x0",
                         choices=("qsm", "knowledge", "context", "sum", "concat"))
    quaternion_layers: int = option(2, "layers of QSM, the last one included [choice D6]", type=run.COUNT)
    alignment: str = option("both", "GDMA: labels attend to regions (v-to-s), or regions to labels; both [figure]",
                            choices=("both", "v-to-s", "s-to-v", "none"))
    no_gate: bool = option(False, "ablation: GDMA adds its attention output ungated")
    aggregator: str = option("soft", "a label's score from all regions [paper; form: field, D8]; ablations: mean, max",
                             choices=("soft", "mean", "max"))
    temperature: float = option(0.1, "soft aggregator; lower: best regions count more [choice D8]", type=run.POSITIVE)
    branches: str = option("both", "scores from the whole image, from its regions, or both [figure]",
                           choices=("both", "global", "regional"))
    gamma_neg: float = option(2.0, "loss: larger down-weights easy absent labels more [author D10]",
                              type=run.NOT_NEGATIVE)
    clip: float = option(0.0, "loss: an absent label with a score below this costs nothing [author D10]",
                         type=run.SHARE)
    focal_gradient: str = option("full", "full: differentiate the loss's weights, too [choice D10]; stopped [author]",
                                 choices=("full", "stopped"))
    regional_weight: float = option(1.0, "weight of the regional branch's loss [author D10]", type=run.NOT_NEGATIVE)
    lr: float = option(None, "learning rate, falls to 0 (default: 5e-5 [author D11]; toy CLIP: 6e-3 [choice D11, "
                       "looked at on test data once])", type=run.POSITIVE)
    prompt_lr: float = option(1e-3, "learning rate of the context vectors [choice D11]", type=run.POSITIVE)
    image_lr_factor: float = option(0.1, "a tuned image tower learns at this times --lr [author D11]",
                                    type=run.NOT_NEGATIVE)
    ema: float = option(0.9997, "final decay of the moving average of the weights, which is the model [author D11]",
                        type=run.SHARE)
    epochs: int = option(None, "passes over the training photos (default: 20, or more if 150 steps need it) "
                         "[choice D12, this minimum looked at on test data once]", type=run.COUNT)
    batch_size: int = option(64, "photos a step, over all processes [choice D12]", type=run.COUNT)


# --- SSPA: image encoder ----------------------------------------------------------------------------------------------
def image_features(visual, images):
    """Global feature and region features of CLIP's image tower, both in the joint space.  [figure; projection: author]

    images: [B, 3, H, W], normalised as CLIP wants them -> (x0 [B, d], X [B, M, d]), M the patches (ViT) or the cells of
    the last feature map (ResNet). ViT: every patch token through the final norm and projection. ResNet: the attention
    pool with a query at every position [field: DenseCLIP; choice D2]. x0 is what open_clip's encode_image gives.
    """
    pool = getattr(visual, "attnpool", None)  # ResNet towers have one
    if pool is None:
        output = visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NLC")
        return output["image_features"], output["image_intermediates"][-1] @ visual.proj
    output = visual.forward_intermediates(images, indices=1, intermediates_only=True)
    x = output["image_intermediates"][-1].flatten(2).mT                          # [B, M, width]
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding.to(x.dtype)
    q = split_heads(pool.q_proj(x), pool.num_heads)
    k = split_heads(pool.k_proj(x), pool.num_heads)
    v = split_heads(pool.v_proj(x), pool.num_heads)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = pool.c_proj(attended)                                                    # [B, 1 + M, d]
    return x[:, 0], x[:, 1:]


def split_heads(x, heads):
    """[B, n, width] -> [B, heads, n, width / heads]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


# --- SSPA: KAP --------------------------------------------------------------------------------------------------------
def knowledge_texts(clip, names, descriptions):
    """The frozen text encoder's input for each label: "{description} A photo of a {name}."  [figure; order: choice D3]

    descriptions: {name: sentence}; a label without one gets the template alone. A text longer than the encoder's
    context loses the last words of its description before any of the template; one line says so. -> list of C str
    """
    room = clip.tokenizer.context_length - 2                                     # start and end token
    texts = []
    shortened = []
    for name in names:
        description = descriptions.get(name, "")
        words = [*description.split(), f"A photo of a {name}."]
        whole = len(words)
        while len(words) > 1 and len(clip.tokenizer.encode(" ".join(words))) > room:
            del words[-2]
        if len(words) < whole:
            shortened.append(name)
        texts.append(" ".join(words))
    if shortened:
        say(f"{len(shortened)} texts cut to {clip.tokenizer.context_length} tokens: {', '.join(shortened[:10])}")
    return texts


# --- SSPA: CAP and the global prompts, through the frozen text encoder ------------------------------------------------
def encode_prompts_reference(model, contexts, tokens):
    """Text features of prompts whose words after the start token are learnable vectors, shared by all labels.  [figure]

    model: open_clip's CLIP, its text tower frozen; contexts: [P, L, width]; tokens: int [C, T] of "X X X X {name}.",
    T the text encoder's context length, whose positions 1..L are replaced -> [P, C, d]. Every label runs through all T.
    """
    classes = len(tokens)
    length = contexts.shape[1]
    words = model.token_embedding(tokens)                                        # [C, T, width]
    features = []
    for context in contexts:
        learnt = context.expand(classes, -1, -1)                                 # [C, L, width]
        x = torch.cat([words[:, :1], learnt, words[:, 1 + length:]], 1)
        x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
        at_end = model.ln_final(x)[torch.arange(classes), tokens.argmax(-1)]     # [C, width], at the end token
        features.append(at_end @ model.text_projection)
    return torch.stack(features)


def uniform(rows, columns, draw):
    """Uniform in +-1 / sqrt(rows), PyTorch's own initialisation of linear layers -> [rows, columns]"""
    return nn.Parameter((2 * torch.rand(rows, columns, generator=draw) - 1) / math.sqrt(rows))


def log_scale(d, attention_scale):
    """Logarithm of an attention's scale, learned; attention_scale 0: fixed at 1 / sqrt(d).  [choice D4]"""
    start = math.log(attention_scale or d ** -0.5)
    return nn.Parameter(torch.tensor(start), requires_grad=attention_scale > 0)


# --- SSPA: DSF --------------------------------------------------------------------------------------------------------
class DynamicSemanticFiltering(nn.Module):
    """Prompts filtered by the image: a label gathers the regions its prompt attends to.  [figure; scale: choice D4]

    A = softmax_M(scale * Linear(E_ca) X^T), T_ca = A X; the linear layer is on the text side only, key = value = X.
    """
    def __init__(self, d, attention_scale):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(d))                                 # choice D5: starts as the identity
        self.bias = nn.Parameter(torch.zeros(d))
        self.log_scale = log_scale(d, attention_scale)

    def forward(self, E_ca, X):
        """E_ca: [C, d]; X: [B, M, d] -> (T_ca [B, C, d], A [B, C, M])"""
        asked = E_ca @ self.weight + self.bias                                   # [C, d]
        attention = torch.softmax(self.log_scale.exp() * asked @ X.mT, -1)       # [B, C, M]
        return attention @ X, attention


# --- SSPA: QSM --------------------------------------------------------------------------------------------------------
def quaternion_linear_reference(components, r_weight, i_weight, j_weight, k_weight, bias):
    """Quaternion linear layer: the Hamilton product of weight and input quaternions, summed.  [field: pytorch-qnn]

    components: r, i, j, k of the input, each [..., n], broadcastable, None for zero; weights R, I, J, K: [n, m]; bias:
    [4 m] -> [..., 4 m], the components of y side by side
    """
    given = [component for component in components if component is not None]
    zero = torch.zeros_like(given[0])
    r, i, j, k = (zero if component is None else component for component in components)
    R, I, J, K = r_weight, i_weight, j_weight, k_weight  # noqa: E741 (the product's own letters)
    y_r = r @ R - i @ I - j @ J - k @ K
    y_i = r @ I + i @ R - j @ K + k @ J
    y_j = r @ J + i @ K + j @ R - k @ I
    y_k = r @ K - i @ J + j @ I + k @ R
    return torch.cat([y_r, y_i, y_j, y_k], -1) + bias


def quaternion_init(fan_in, fan_out, generator):
    """Weights R, I, J, K [fan_in, fan_out] of a quaternion layer, fans counted in quaternions.  [field: pytorch-qnn]

    Modulus chi(4) / sqrt(2 (fan_in + fan_out)), phase uniform in (-pi, pi), axis uniform in the cube and normalised.
    """
    shape = (fan_in, fan_out)
    modulus = torch.randn(4, *shape, generator=generator).norm(dim=0) / math.sqrt(2 * (fan_in + fan_out))
    phase = (2 * torch.rand(shape, generator=generator) - 1) * math.pi
    axis = F.normalize(2 * torch.rand(3, *shape, generator=generator) - 1, dim=0)
    return modulus * torch.cos(phase), *(modulus * torch.sin(phase) * axis)


class QuaternionLinear(nn.Module):
    def __init__(self, fan_in, fan_out, impl, draw):
        super().__init__()
        self.layer = quaternion_linear_fused if impl == "fused" else quaternion_linear_reference
        r, i, j, k = quaternion_init(fan_in, fan_out, draw)
        self.r_weight = nn.Parameter(r)
        self.i_weight = nn.Parameter(i)
        self.j_weight = nn.Parameter(j)
        self.k_weight = nn.Parameter(k)
        self.bias = nn.Parameter(torch.zeros(4 * fan_out))

    def forward(self, components):
        """Four components [..., fan_in], None for zero -> [..., 4 fan_out], the output's components side by side"""
        return self.layer(components, self.r_weight, self.i_weight, self.j_weight, self.k_weight, self.bias)


class QuaternionFusion(nn.Module):
    """Layers with ReLU between them; each component has width d, in the last one d / 4.  [layers: figure; choice D6]"""

    def __init__(self, d, layers, impl, draw):
        super().__init__()
        if d % 4:
            raise UsageError(f"--fusion qsm: CLIP's width {d} is no multiple of 4; take another --backbone or --fusion")
        self.layers = nn.ModuleList()
        for _ in range(layers - 1):
            self.layers.append(QuaternionLinear(d, d, impl, draw))
        self.last = QuaternionLinear(d, d // 4, impl, draw)

    def forward(self, T_ka, T_ca, x0):
        """T_ka: [C, d]; T_ca: [B, C, d]; x0: [B, d] -> [B, C, d]"""
        components = (None, T_ka, T_ca, x0[:, None])                             # Q = 0 + T_ka i + T_ca j + x0 k
        for layer in self.layers:
            components = F.relu(layer(components)).chunk(4, -1)
        return self.last(components)


# --- SSPA: GDMA -------------------------------------------------------------------------------------------------------
class GatedAttention(nn.Module):
    """One direction of the alignment: x + g a, where a is the attention's output and g a gate for each channel, which
    suppresses what is irrelevant. Matrices multiply from the right.  [purpose: paper; formula: choice D7]"""

    def __init__(self, d, attention_scale, gated, impl, draw):
        super().__init__()
        self.attend = gated_attention_fused if impl == "fused" else gated_attention_reference
        self.query = nn.Parameter(torch.eye(d))                                  # choice D5: starts as the identity
        self.key = nn.Parameter(torch.eye(d))
        self.value = nn.Parameter(torch.zeros(d, d))  # choice D5: adds nothing at first; looked at on test data once
        self.log_scale = log_scale(d, attention_scale)
        self.gated = gated
        if gated:  # choice D7: half open at the start
            self.gate_query = uniform(d, d, draw)
            self.gate_attended = uniform(d, d, draw)
            self.gate_bias = nn.Parameter(torch.zeros(d))

    def forward(self, x, context):
        """x [B, n, d] attends to context [B, m, d] -> (x + g a [B, n, d], g [B, n, d] or None)"""
        return self.attend(x, context, self)

    def attention(self, x, context):
        """softmax(scale * (x W_Q)(context W_K)^T)  [B, n, m]"""
        return torch.softmax(self.log_scale.exp() * (x @ self.query) @ (context @ self.key).mT, -1)


def gated_attention_reference(x, context, w):
    """a = attention (context W_V), and for every channel g = sigmoid(x G_x + a G_a + b).  w: GatedAttention"""
    a = w.attention(x, context) @ (context @ w.value)                            # [B, n, d]
    if not w.gated:
        return x + a, None
    gate = torch.sigmoid(x @ w.gate_query + a @ w.gate_attended + w.gate_bias)
    return x + gate * a, gate


# --- SSPA: soft aggregator --------------------------------------------------------------------------------------------
def soft_aggregate_reference(label_features, region_features, temperature, scale):
    """A label's logit from all regions: those that resemble it more count more, and none is left out.  [idea: paper]

    S = cos(label, region), s = scale * sum over M of softmax_M(S / temperature) * S.  [form: field; choice D8]
    label_features: [B, C, d], or [C, d] for all images; region_features: [B, M, d]; temperature: a cosine -> [B, C]
    """
    S = F.normalize(label_features, dim=-1) @ F.normalize(region_features, dim=-1).mT        # [B, C, M]
    return scale * (torch.softmax(S / temperature, -1) * S).sum(-1)


def soft_aggregate_loss_reference(label_features, region_features, temperature, scale, bias, targets,
                                  gamma_neg=2.0, gamma_pos=0.0, clip=0.0, focal_gradient="full"):
    """Asymmetric loss of the regional branch's logits. bias: scalar or [C]; targets: int [B, C] -> scalar"""
    logits = soft_aggregate_reference(label_features, region_features, temperature, scale) + bias
    return asymmetric_loss_reference(logits, targets, gamma_neg, gamma_pos, clip, focal_gradient)


# --- SSPA: losses -----------------------------------------------------------------------------------------------------
# Summed over labels, averaged over the batch [choice D10]. Targets: 1 present, 0 absent, -1 ignored.
def check_targets(targets):
    """Raises ValueError for targets that are floats, or not of the form [..., B, C]."""
    if targets.ndim < 2 or targets.is_floating_point():
        raise ValueError(f"targets must be integers or bool [..., B, C], not {targets.dtype} {list(targets.shape)}")


def asymmetric_loss_reference(logits, targets, gamma_neg=2.0, gamma_pos=0.0, clip=0.0, focal_gradient="full"):
    """Asymmetric loss. focal_gradient: "full" also differentiates its weights.  [exponents: author; choice D10]

    p = sigmoid(z), q = max(p - clip, 0);  present: -(1-p)^gamma+ log p;  absent: -q^gamma- log(1-q).
    logits: [..., B, C]; targets: same shape, 1, 0 or -1, integers or bool; their values are checked where labels are
    read (data.check_marks) -> scalar. Finite at z = +-1e4. Raises ValueError for targets that are floats.
    """
    check_targets(targets)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))              # half precision overflows in sums
    tiny = torch.finfo(z.dtype).tiny  # avoids 0^(gamma - 1) = inf in the backward pass
    q = (torch.sigmoid(z) - clip).clamp_min(tiny)
    present_weight = torch.sigmoid(-z).clamp_min(tiny) ** gamma_pos
    absent_weight = q ** gamma_neg
    if focal_gradient == "stopped":
        present_weight = present_weight.detach()
        absent_weight = absent_weight.detach()
    log_p = F.logsigmoid(z)
    log_not_q = torch.logaddexp(F.logsigmoid(-z), z.new_tensor(clip).log())      # log(1 - p + clip)
    present = -present_weight * log_p
    absent = -absent_weight * log_not_q.clamp_max(0)
    loss = torch.where(targets == 1, present, torch.where(targets == 0, absent, 0))
    return loss.sum() / z.shape[-2]


def asymmetric_probability(logits, gamma_neg=2.0, gamma_pos=0.0, clip=0.0, focal_gradient="full"):
    """The probability that a logit implies.  [docs/probabilities.md; choice D15]

    A label that is present with probability pi has the smallest expected loss where pi l1'(z) + (1 - pi) l0'(z) = 0; l1
    is the loss if it is present, l0 if absent. So pi = l0' / (l0' - l1'); without exponents and clip, the sigmoid.
    logits: [..., N, C] -> float64, the same shape, in 0..1, monotone
    """
    slopes = []
    for target in (0, 1):
        z = logits.detach().double().clamp(-700, 700).contiguous()  # float64's exp goes no further
        targets = torch.full_like(z, target, dtype=torch.int8)
        asymmetric_loss_and_gradient(z, targets, gamma_neg, gamma_pos, clip, focal_gradient)  # z is now d loss / d z
        slopes.append(z)
    absent, present = slopes
    return absent / (absent - present)


# --- SSPA: the whole --------------------------------------------------------------------------------------------------
class Labels(NamedTuple):  # all that is derived from the label names
    names: list
    texts: list              # KAP's input for each
    tokens: torch.Tensor     # [C, T] of "X ... X {name}."
    knowledge: torch.Tensor  # T_ka [C, d]
    words: torch.Tensor      # embeddings of "a photo of a" [4, width]


class Prediction(NamedTuple):  # what flows along the figure's arrows; the last three are None where their part is off
    global_logits: torch.Tensor     # s_G [B, C]
    regional_logits: torch.Tensor   # s_R [B, C]
    T_uf: torch.Tensor              # [B, C, d]
    label_features: torch.Tensor    # T_fn [B, C, d]
    region_features: torch.Tensor   # X_fn [B, M, d]
    filtering: torch.Tensor         # attention of DSF [B, C, M]
    label_gate: torch.Tensor        # V-to-S [B, C, d]
    region_gate: torch.Tensor       # S-to-V [B, M, d]


class SSPA(nn.Module):
    """The learned parts, and the CLIP they build on. In CLIP only a tuned image tower has requires_grad."""

    def __init__(self, config, clip_model, labels, seed):
        """clip_model: open_clip's CLIP; its image tower is trained with --tune-image full; labels: Labels"""
        super().__init__()
        self.config = config
        self.clip = clip_model
        self.clip.requires_grad_(False)
        self.clip.visual.requires_grad_(config.tune_image == "full")
        d = labels.knowledge.shape[1]
        draw = torch.Generator().manual_seed(seed)

        # KAP: the labels' frozen texts
        self.register_buffer("tokens", None, persistent=False)                   # [C, T]
        self.register_buffer("knowledge", None, persistent=False)                # T_ka [C, d]
        self.set_labels(labels)

        # CAP and the global prompts: L context vectors each, which start as "a photo of a"  [choice D1]
        contexts = 0.02 * torch.randn(2, config.context_length, labels.words.shape[1], generator=draw)
        start = labels.words[:config.context_length]
        contexts[:, :len(start)] = start
        self.contexts = nn.Parameter(contexts)                                   # [2, L, width]: T_g's, E_ca's
        self.dsf = DynamicSemanticFiltering(d, config.attention_scale)
        if config.no_dsf or config.fusion == "knowledge":
            self.dsf = None
        if config.fusion == "qsm":
            self.qsm = QuaternionFusion(d, config.quaternion_layers, config.impl, draw)
        if config.fusion == "concat":
            self.concat_weight = uniform(2 * d, d, draw)
        self.v_to_s = None
        self.s_to_v = None
        if config.alignment in ("both", "v-to-s"):
            self.v_to_s = GatedAttention(d, config.attention_scale, not config.no_gate, config.impl, draw)
        if config.alignment in ("both", "s-to-v"):
            self.s_to_v = GatedAttention(d, config.attention_scale, not config.no_gate, config.impl, draw)

        # soft aggregator: a hot softmax weighs all regions alike (mean), a cold one only the highest (max)
        self.temperature = {"soft": config.temperature, "mean": 1e9, "max": 1e-9}[config.aggregator]

        # logits of both branches: scale * cosine + bias  [choice D9]
        self.global_log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        self.global_bias = nn.Parameter(torch.tensor(0.0))
        self.regional_log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        self.regional_bias = nn.Parameter(torch.tensor(0.0))
        self.eval()  # BatchNorm statistics stay CLIP's  [choice D13]

    def set_labels(self, labels):
        """Replaces the labels by any number of others: no learned parameter belongs to a label. labels: Labels"""
        device = self.clip.logit_scale.device
        self.texts = labels.texts
        self.tokens = labels.tokens.to(device)
        self.knowledge = F.normalize(labels.knowledge, dim=-1).to(device)

    def prompts(self):
        """-> T_g of the global branch, E_ca of CAP, each [C, d] of unit length"""
        encode_prompts = encode_prompts_fused if self.config.impl == "fused" else encode_prompts_reference
        return F.normalize(encode_prompts(self.clip, self.contexts, self.tokens), dim=-1)

    def filter(self, E_ca, X):
        """DSF. E_ca: [C, d]; X: [B, M, d] -> (T_ca [B, C, d], attention [B, C, M]); without DSF (E_ca, None)"""
        if self.dsf is None:
            return E_ca, None
        T_ca, attention = self.dsf(E_ca, X)
        return F.normalize(T_ca, dim=-1), attention

    def fuse(self, T_ka, T_ca, x0):
        """QSM, or one of its ablations. T_ka: [C, d]; T_ca: [B, C, d], or [C, d] without DSF; x0: [B, d]
        -> T_uf [B, C, d]"""
        fusion = self.config.fusion
        if fusion == "qsm":
            T_uf = self.qsm(T_ka, T_ca, x0)
        elif fusion == "knowledge":
            T_uf = T_ka
        elif fusion == "context":
            T_uf = T_ca
        elif fusion == "sum":
            T_uf = T_ka + T_ca
        else:
            T_uf = torch.cat(torch.broadcast_tensors(T_ka, T_ca), -1) @ self.concat_weight
        return F.normalize(T_uf, dim=-1).expand(len(x0), -1, -1)

    def align(self, T_uf, X):
        """GDMA: labels attend to regions (V-to-S), regions to labels (S-to-V), both to features not yet updated.
        [figure]  -> (T_fn [B, C, d], X_fn [B, M, d], V-to-S gate as T_fn, S-to-V gate as X_fn), gates or None"""
        T_fn, label_gate = T_uf, None
        X_fn, region_gate = X, None
        if self.v_to_s is not None:
            T_fn, label_gate = self.v_to_s(T_uf, X)
        if self.s_to_v is not None:
            X_fn, region_gate = self.s_to_v(X, T_uf)
        return T_fn, X_fn, label_gate, region_gate

    def forward(self, x0, X, targets=None, prompts=None):
        """x0: [B, d]; X: [B, M, d]; targets: int [B, C] or None; prompts: self.prompts(), or None to compute them
        -> Prediction, or with targets the loss, a scalar averaged over the batch."""
        x0 = F.normalize(x0, dim=-1)                                             # choice D14
        X = F.normalize(X.to(x0.dtype), dim=-1)
        if prompts is None:
            prompts = self.prompts()
        T_ka = self.knowledge                                                    # KAP          [C, d]
        T_g, E_ca = prompts                                                      # global, CAP  [C, d]
        T_ca, filtering = self.filter(E_ca, X)                                   # DSF          [B, C, d], [B, C, M]
        T_uf = self.fuse(T_ka, T_ca, x0)                                         # QSM          [B, C, d]
        T_fn, X_fn, label_gate, region_gate = self.align(T_uf, X)                # GDMA         [B, C, d], [B, M, d]

        with torch.autocast(x0.device.type, enabled=False):                      # logits and losses in float32
            T_fn = T_fn.float()
            X_fn = X_fn.float()
            s_G = self.global_log_scale.exp() * x0.float() @ T_g.float().T + self.global_bias               # [B, C]
            if targets is None:
                s_R = self.regional_logits(T_fn, X_fn)
                return Prediction(s_G, s_R, T_uf, T_fn, X_fn, filtering, label_gate, region_gate)
            return self.loss(s_G, T_fn, X_fn, targets)

    def regional_logits(self, T_fn, X_fn):
        """Soft aggregator -> s_R [B, C]"""
        aggregate = soft_aggregate_fused if self.config.impl == "fused" else soft_aggregate_reference
        return aggregate(T_fn, X_fn, self.temperature, self.regional_log_scale.exp()) + self.regional_bias

    def loss(self, s_G, T_fn, X_fn, targets):
        """L = L_G(s_G) + weight * L_R(s_R)  [figure; type and weight: author]"""
        config = self.config
        asymmetric_loss = asymmetric_loss_reference
        aggregate_loss = soft_aggregate_loss_reference
        if config.impl == "fused":
            asymmetric_loss = asymmetric_loss_fused
            aggregate_loss = soft_aggregate_loss_fused
        exponents = (config.gamma_neg, GAMMA_POS, config.clip, config.focal_gradient)
        L_G = asymmetric_loss(s_G, targets, *exponents)
        if config.branches == "global":
            return L_G
        L_R = aggregate_loss(T_fn, X_fn, self.temperature, self.regional_log_scale.exp(), self.regional_bias, targets,
                             *exponents)
        if config.branches == "regional":
            return config.regional_weight * L_R
        return L_G + config.regional_weight * L_R

    def learned(self):
        """{name: parameter} of all that training changes and a checkpoint holds"""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def branch_scores(branches, global_logits, regional_logits):
    """Mean of the branches' sigmoid scores.  [mean: author; sigmoid: choice D10]  -> float64 [B, C] in 0..1"""
    global_scores = torch.sigmoid(global_logits.double())
    regional_scores = torch.sigmoid(regional_logits.double())
    if branches == "global":
        return global_scores
    if branches == "regional":
        return regional_scores
    return (global_scores + regional_scores) / 2


def probabilities_of(config, scores):
    """Scores of branch_scores, float64 [N, C] -> the probabilities that they imply, ranked alike but for new ties"""
    return asymmetric_probability(torch.logit(scores), config.gamma_neg, GAMMA_POS, config.clip, config.focal_gradient)


# --- labels and photos ------------------------------------------------------------------------------------------------
class Photos(NamedTuple):
    photos: list             # paths, or scenes' (split, index)
    labels: torch.Tensor     # int8 [N, C]
    x0: torch.Tensor         # [N, d] of CLIP's own tower
    X: torch.Tensor          # float16 [N, M, d], None where photos go through the tower in every epoch
    policy: str              # how doubtful labels were treated, and how many photos were left out


def check_clip(clip):
    """Raises UsageError for a CLIP that SSPA cannot use: it puts prompts into CLIP's causal text transformer, and
    reads region features from the tokens (ViT) or the attention pool (ResNet) of its image tower."""
    from open_clip.model import CLIP
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
    model = clip.model
    visual = model.visual
    reason = None
    if not isinstance(model, CLIP) or not isinstance(model.transformer.resblocks[0], ResidualAttentionBlock):
        reason = "its text encoder is not CLIP's transformer"
    elif model.attn_mask is None or model.text_pool_type != "argmax":
        reason = "its text encoder is not causal, or not read at the end token"
    elif not isinstance(model.text_projection, nn.Parameter) or not hasattr(clip.tokenizer, "encode"):
        reason = "its text encoder does not use CLIP's projection or tokenizer"
    elif isinstance(visual, VisionTransformer):
        if visual.pool_type != "tok" or visual.attn_pool is not None:
            reason = "its image tower does not end in a class token, so its patch tokens are no region features"
    elif not isinstance(visual, ModifiedResNet):
        reason = "its image tower is neither CLIP's ViT nor CLIP's ResNet, so there are no region features"
    if reason:
        raise UsageError(f"--backbone {clip.name}: SSPA cannot use it: {reason}; choose ViT-B-16, RN50 or the like")


def names_of(config):
    """The label names of a run: the dataset's own, or those of them that --labels keeps."""
    if not config.labels:
        return data.label_names(config.dataset, config.data_root)
    names = data.read_labels(config.labels)
    own = data.label_names(config.dataset, config.data_root, names)
    for name in names:
        if name not in own:
            raise UsageError(f"--labels {config.labels}: '{name}' is no label of {config.dataset}, and SSPA learns "
                             f"from labelled photos; choose among {', '.join(own[:30])}")
    return names


def labels_of(config, clip, names, texts=None):
    """Texts, tokens and features of the labels -> Labels. texts: {name: KAP's input for it}, from a checkpoint"""
    room = clip.tokenizer.context_length
    if config.context_length + 3 > room:
        raise UsageError(f"--context-length {config.context_length}: this CLIP reads {room} tokens in all; lower it")

    # KAP: a sentence of the language model and the template
    texts = dict(texts or {})
    new = [name for name in names if name not in texts]
    if new:
        descriptions = {}
        if config.descriptions != "none":
            descriptions = data.descriptions_of(config.dataset, new, config.descriptions)
        new_texts = knowledge_texts(clip, new, descriptions)
        texts.update(zip(new, new_texts, strict=True))
    texts = [texts[name] for name in names]
    knowledge = embed.embed_texts(clip, texts, config.cache)

    # CAP and global prompts: "X X X X {name}."; the context vectors take the place of X and start as "a photo of a"
    places = " ".join(["X"] * config.context_length)
    tokens = clip.tokenizer([f"{places} {name}." for name in names])
    start = clip.tokenizer(["a photo of a"])[0, 1:5]
    words = clip.model.token_embedding(start.to(clip.device)).detach().cpu()
    return Labels(names, texts, tokens, knowledge, words)


def features_are_kept(config, clip, count):
    """Whether the features of `count` photos are computed once and kept: the tower is frozen, and they fit into
    CACHE_LIMIT."""
    if config.tune_image == "full":
        if clip.device.type == "cpu":
            say("the image tower is tuned on the CPU, which takes long; --tune-image none freezes it and trains in "
                "minutes")
        return False
    blank = torch.zeros(1, 3, *clip.image_size, device=clip.device)
    with torch.no_grad():
        _, X = image_features(clip.model.visual, blank)
    gib = count * 2 * X.numel() / 2 ** 30
    if gib > CACHE_LIMIT:
        say(f"frozen region features would take {gib:.1f} GiB: photos are encoded anew in every epoch")
        return False
    return True


def with_features(config, clip, found, names, kept):
    """found: data.LabelledPhotos; kept: compute region features, too -> Photos, without those that cannot be read"""
    X = None
    if kept:
        x0, X, rows = embed.embed_regions(clip, found.photos, image_features, config.cache, config.workers,
                                          config.quiet)
    else:
        x0, rows = embed.embed_photos(clip, found.photos, config.cache, config.workers, config.quiet)
    photos = [found.photos[row] for row in rows]
    columns = [found.names.index(name) for name in names]
    labels = torch.from_numpy(found.labels[rows][:, columns])
    policy = f"{found.policy}; {len(found.photos) - len(rows)} unreadable photos left out"
    return Photos(photos, labels, x0, X, policy)


def batches_of(config, clip, photos, batches, augment=None):
    """batches: list of row indices [b] -> iterator over (x0 [b, d], X [b, M, d], int8 labels [b, C]) on the model's
    device. augment: (seed, epoch, CROP_SCALE) for random crops, or None"""
    if photos.X is not None:  # frozen features as they are
        for rows in batches:
            yield photos.x0[rows].to(clip.device), photos.X[rows].to(clip.device), photos.labels[rows].to(clip.device)
        return
    decoded = embed.decoded(clip, photos.photos, [rows.tolist() for rows in batches], config.workers, augment)
    for rows, (images, readable) in zip(batches, decoded, strict=True):
        with embed.autocast(clip.device, config.precision):
            x0, X = image_features(clip.model.visual, images.to(clip.device, non_blocking=True))
        labels = photos.labels[rows].clone()
        labels[~readable] = -1  # a photo that cannot be read is a zero image, and all its labels are ignored
        yield x0, X, labels.to(clip.device)


# --- train ------------------------------------------------------------------------------------------------------------
def set_biases(config, clip, model, photos):
    """Sets each branch's bias so that the sigmoid of its mean logit on the first photos is PRIOR.  [choice D9]"""
    wanted = math.log(PRIOR / (1 - PRIOR))
    first = torch.arange(min(64, len(photos.photos)))
    with torch.no_grad(), embed.autocast(clip.device, config.precision):
        x0, X, _ = next(batches_of(config, clip, photos, [first]))
        start = model(x0, X)
        model.global_bias += wanted - start.global_logits.mean()
        model.regional_bias += wanted - start.regional_logits.mean()


def optimiser_of(config, model):
    """AdamW with a group for each tensor; the schedule multiplies the group's "peak" learning rate.  [choice D11]"""
    groups = []
    for name, parameter in model.learned().items():
        peak = config.lr
        if name == "contexts":
            peak = config.prompt_lr
        elif name.startswith("clip.visual."):
            peak = config.lr * config.image_lr_factor
        groups.append({"params": [parameter], "peak": peak})
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=WEIGHT_DECAY, fused=config.impl == "fused")


def default_epochs(count, batch_size):
    """Epochs without --epochs: 20, or more if 150 steps need it.  [choice D12]"""
    steps = max(1, count // batch_size)
    return max(20, math.ceil(150 / steps))


def warm_up_then_cosine(step, total_steps):
    """Share of the peak learning rate: warm-up times a cosine that falls from the first step on.  [choice D11]"""
    warm_up = min(1, (step + 1) / max(1, WARM_UP * total_steps))
    return warm_up * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def train(config, clip, labels, photos, seed, folder):
    """Trains one model -> SSPA with the averaged weights. Random numbers depend only on the seed, the epoch and the
    photo, so an interrupted training resumes where it was, and several processes (torchrun), each with its share of a
    batch, train the same model as one. Raises run.Diverged."""
    # ============ model, optimiser, average of the weights ============
    model = SSPA(config, clip.model, labels, seed).to(clip.device)
    set_biases(config, clip, model, photos)
    optimiser = optimiser_of(config, model)
    learned = model.learned()
    averages = {name: parameter.detach().clone() for name, parameter in learned.items()}
    parallel = model
    if run.WORLD > 1:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)

    # ============ steps of an epoch; photos that do not fill a batch are left out  [choice D12] ============
    count = len(photos.photos)
    batch_size = min(config.batch_size, count)
    if batch_size < run.WORLD:
        raise UsageError(f"a batch of {batch_size} photos is too small for {run.WORLD} processes; raise --batch-size")
    steps = count // batch_size
    total_steps = config.epochs * steps

    # ============ resume a killed run: Progress copies what was saved into these tensors ============
    state = dict(learned)
    for name, average in averages.items():
        state[f"average of {name}"] = average
    progress = run.Progress(config, folder, f"seed {seed}", steps, state, optimiser)
    step = progress.epochs_done * steps

    for epoch in range(progress.epochs_done, config.epochs):
        epoch_loss = torch.zeros((), dtype=torch.float64, device=clip.device)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch + 1))
        batches = order[:steps * batch_size].split(batch_size)
        shares = [batch[run.RANK::run.WORLD] for batch in batches]
        augment = None
        if config.tune_image == "full":
            augment = (seed, epoch, CROP_SCALE)

        for x0, X, targets in batches_of(config, clip, photos, shares, augment):
            # learning rate
            lr_share = warm_up_then_cosine(step, total_steps)
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * lr_share

            # loss and step; gradients of processes are averaged, so that the loss is a mean over the whole batch
            with embed.autocast(clip.device, config.precision):
                loss = parallel(x0, X, targets)
            loss = loss * (len(targets) / batch_size * run.WORLD)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

            # moving average of the weights, over few steps at first  [author; choice D11]
            decay = min(config.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(averages.values()), list(learned.values()), 1 - decay)

            epoch_loss += loss.detach() / steps / run.WORLD
            step += 1
            progress.step()

        if run.WORLD > 1:
            dist.all_reduce(epoch_loss)
        progress.end_epoch(float(epoch_loss), config.lr * lr_share,
                           f"--lr (now {config.lr:g}) or --prompt-lr (now {config.prompt_lr:g})")
    run.fill(learned, averages)
    return model


# --- score ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def score(config, clip, model, photos):
    """Global and regional logits of the photos -> float64 [2, N, C]. Under torchrun each process scores its share."""
    logits = torch.zeros(2, *photos.labels.shape, dtype=torch.float64, device=clip.device)
    batches = torch.arange(len(photos.photos)).split(64)[run.RANK::run.WORLD]
    with embed.autocast(clip.device, config.precision):
        prompts = model.prompts()
        for rows, (x0, X, _) in zip(batches, batches_of(config, clip, photos, batches), strict=True):
            prediction = model(x0, X, prompts=prompts)
            logits[0, rows] = prediction.global_logits.double()
            logits[1, rows] = prediction.regional_logits.double()
    if run.WORLD > 1:  # a row is zero in all processes but one
        dist.all_reduce(logits)
    return logits.cpu()


def evaluate(config, clip, model, photos):
    """Scores the photos -> (dict for metrics.json: of run.measure, and the mAP of each branch in use; scores [N, C])"""
    global_logits, regional_logits = score(config, clip, model, photos)
    scores = branch_scores(config.branches, global_logits, regional_logits)
    truth = photos.labels.numpy()
    result = run.measure(scores, scores, probabilities_of(config, scores), truth)  # scores also rank the photos
    if config.branches != "regional":
        result["mAP_global"] = metrics.mean_average_precision(global_logits.numpy(), truth)
    if config.branches != "global":
        result["mAP_regional"] = metrics.mean_average_precision(regional_logits.numpy(), truth)
    return result, scores.float()


def load_sspa(config, path, stored, metadata, clip, names):
    """The model of a checkpoint, for these labels, which it may not have been trained on; a tuned tower replaces
    CLIP's. stored, metadata: from run.read_checkpoint -> SSPA. Raises UsageError."""
    trained = metadata["names"]
    check_clip(clip)
    run.check_fits(path, metadata, trained, clip.name, clip.key)
    new = [name for name in names if name not in trained]
    if new:
        say(f"{path} was never trained on {', '.join(new[:10])}: it scores them by their texts alone")
    labels = labels_of(config, clip, names, dict(zip(trained, metadata["texts"], strict=True)))
    model = SSPA(config, clip.model, labels, 0).to(clip.device)
    with data.reading(path, "checkpoint", run.OWN_CHECKPOINT):
        run.fill(model.learned(), stored)
    return model


class Tagger:
    """A trained SSPA for the user's own photos (tag.py, explain.py)."""

    def __init__(self, config, path, stored, metadata, clip, names):
        """config: the options that the model was trained with; for the other arguments see load_sspa"""
        self.config = config
        self.clip = clip
        self.model = load_sspa(config, path, stored, metadata, clip, names)
        self.encoder = f"scores {data.digest(path)} {self.model.texts} {clip.key} {config.precision}"
        with torch.no_grad(), embed.autocast(clip.device, config.precision):
            self.prompts = self.model.prompts()

    def encode(self, images):
        """Images [b, 3, H, W] -> what the cache keeps of each photo: {"scores": [b, C]}"""
        x0, X = image_features(self.clip.model.visual, images)
        prediction = self.model(x0, X, prompts=self.prompts)
        scores = branch_scores(self.config.branches, prediction.global_logits, prediction.regional_logits)
        return {"scores": scores}

    def scores_of(self, features):
        """What encode returned -> scores in 0..1, float64 [b, C]"""
        return features["scores"]


# --- main -------------------------------------------------------------------------------------------------------------
def main(argv):
    began = time.time()
    config = run.parse(Config, argv, "SSPA: split-and-synthesize prompting with gated alignments (arXiv 2407.20920).",
                       "Marks: [paper] abstract; [figure] its figure; [author] its author's other code; [field] peers; "
                       "[choice] ours, all in docs/choices.md.")
    if config.checkpoint:
        stored, metadata = run.read_checkpoint(config.checkpoint, "sspa")
        config = run.as_trained(config, metadata)
    if config.lr is None:
        config.lr = 6e-3 if config.backbone == "scenes" else 5e-5
    device = run.set_up(config)

    # ============ the run's folder: finished, half done or new ============
    folder, record = run.open_folder(config, f"runs/sspa/{config.dataset}")
    if record.get("finished"):
        report(record)
        return

    # ============ labels and photos: missing files are reported at once ============
    names = names_of(config)
    if config.checkpoint:
        trained = metadata["names"]
    else:
        trained = run.without_unseen(config, names)
    test_found = data.load_photos(config.dataset, config.data_root, "test", config.test_count, config.policy, names)
    photo_count = len(test_found.photos)
    if not config.checkpoint:
        train_found = data.load_photos(config.dataset, config.data_root, "train", config.train_count, config.policy,
                                       names)
        photo_count += len(train_found.photos)

    # ============ CLIP, and the photos through its frozen tower ============
    clip = run.load_clip(config, device)
    check_clip(clip)
    if config.checkpoint:
        run.check_fits(config.checkpoint, metadata, trained, clip.name, clip.key)
    else:
        labels = labels_of(config, clip, trained)
    kept = features_are_kept(config, clip, photo_count)
    test_photos = with_features(config, clip, test_found, names, kept)
    train_count = 0
    if not config.checkpoint:
        train_photos = with_features(config, clip, train_found, trained, kept)
        train_count = len(train_photos.photos)
        config.epochs = config.epochs or default_epochs(train_count, config.batch_size)

    # ============ baselines ============
    prompts = embed.embed_texts(clip, [f"a photo of a {name}." for name in names], config.cache)
    scores = {"truth": test_photos.labels, **baselines.zero_shot(prompts, test_photos.x0)}
    if train_count and not config.no_probe and not config.unseen:
        scores |= baselines.linear_probe_where_quick(train_photos.x0, train_photos.labels, test_photos.x0)

    # ============ the record ============
    if record:
        scores |= run.earlier_scores(folder)
    else:
        record = run.new_record("sspa", config, argv, device, names, trained, scores)
        record |= {"backbone": clip.name, "policy": test_photos.policy, "train_count": train_count,
                   "default_epochs": default_epochs(train_count, config.batch_size)}
        run.begin(folder, record)

    # ============ train and score ============
    for seed in config.seed[len(record["runs"]):]:
        if config.checkpoint:
            model = load_sspa(config, config.checkpoint, stored, metadata, clip, names)
        else:
            if config.tune_image == "full" and record["runs"]:
                clip = run.load_clip(config, device)  # every seed starts from CLIP's own image tower
            model = train(config, clip, labels, train_photos, seed, folder)
            run.save_checkpoint(config, folder, seed, model.learned(), method="sspa", names=trained, texts=labels.texts,
                                settings=record["config"], encoder=clip.name, encoder_key=clip.key)
            if config.unseen:
                model.set_labels(labels_of(config, clip, names))  # the unseen ones join
        measures, scores[f"seed {seed}"] = evaluate(config, clip, model, test_photos)
        record["runs"].append({"seed": seed, **measures})
        run.end_seed(folder, record, began, scores)
    report(record)


def report(record):
    """The table on stdout."""
    learnt_from = "not trained here"
    if record["train_count"]:
        learnt_from = f"trained on {record['train_count']:,} labelled photos"
    tower = "tuned" if record["config"]["tune_image"] == "full" else "frozen"
    run.report(record, "SSPA", f"{learnt_from}, image tower {tower}")


# --- SSPA: fast paths, each the same as its plain formula -------------------------------------------------------------
def encode_prompts_fused(model, contexts, tokens):
    """Same as encode_prompts_reference. Because the text encoder is causal, positions after the longest prompt's end
    are not computed, and start token and context are computed once per set; the C labels attend to their keys and
    values. Tokens per set: 1 + L + C (longest - 1 - L) instead of C T."""
    sets = len(contexts)
    classes = len(tokens)
    end = tokens.argmax(-1)                                                      # [C]
    longest = int(end.max()) + 1
    shared = 1 + contexts.shape[1]                                               # start token and context

    start = model.token_embedding(tokens[:1, :1]).expand(sets, -1, -1)
    prefix = torch.cat([start, contexts], 1) + model.positional_embedding[:shared]           # [P, 1 + L, width]
    own = model.token_embedding(tokens[:, shared:longest]) + model.positional_embedding[shared:longest]
    own = own.repeat(sets, 1, 1)                                                 # [P C, longest - 1 - L, width]
    causal = torch.ones(longest, longest, dtype=torch.bool, device=own.device).tril()
    rows = torch.arange(sets * classes, device=own.device)
    at_end = end.repeat(sets) - shared                                           # [P C], among a label's own positions

    for block in model.transformer.resblocks:
        prefix_q, prefix_k, prefix_v = _query_key_value(block, prefix)
        q, k, v = _query_key_value(block, own)
        k = torch.cat([_for_every_label(prefix_k, classes), k], 2)
        v = torch.cat([_for_every_label(prefix_v, classes), v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, causal[shared:])
        if block is model.transformer.resblocks[-1]:  # only its outputs at the end tokens are needed
            own = _rest_of_block(block, own[rows, at_end, None], attended[rows, :, at_end, None])  # one position
            break
        own = _rest_of_block(block, own, attended)
        prefix_attended = F.scaled_dot_product_attention(prefix_q, prefix_k, prefix_v, is_causal=True)
        prefix = _rest_of_block(block, prefix, prefix_attended)

    features = model.ln_final(own[:, 0]) @ model.text_projection                 # [P C, d]
    return features.unflatten(0, (sets, classes))                                # [P, C, d]


def _query_key_value(block, x):
    """x [n, positions, width] -> q, k, v, each [n, heads, positions, width / heads]"""
    qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    qkv = qkv.unflatten(-1, (3, block.attn.num_heads, -1))
    return qkv.permute(2, 0, 3, 1, 4)


def _for_every_label(x, classes):
    """[P, ...] -> [P C, ...]"""
    return x[:, None].expand(-1, classes, -1, -1, -1).flatten(0, 1)


def _rest_of_block(block, x, attended):
    """attended: [n, heads, positions, width / heads] -> what open_clip's ResidualAttentionBlock gives"""
    x = x + block.ls_1(block.attn.out_proj(attended.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def quaternion_linear_fused(components, r_weight, i_weight, j_weight, k_weight, bias):
    """Same as quaternion_linear_reference. Each input component is multiplied separately by its strip of the Hamilton
    product (its terms of y_r, y_i, y_j, y_k), and the products are added by broadcasting: a component that is the same
    for all images costs C rows, one that is the same for all labels B rows, a zero one nothing."""
    R, I, J, K = r_weight, i_weight, j_weight, k_weight  # noqa: E741 (the product's own letters)
    strips = [(R, I, J, K), (-I, R, K, -J), (-J, -K, R, I), (-K, J, -I, R)]
    products = []
    for component, strip in zip(components, strips, strict=True):
        if component is not None:
            products.append(component @ torch.cat(strip, 1))
    products.sort(key=torch.numel)
    products[0] = products[0] + bias
    shape = torch.broadcast_shapes(*[product.shape for product in products])
    y = products.pop()
    if y.shape != shape:
        y = y.expand(shape).clone()
    for product in products:
        y += product  # in place: a matrix product does not need its result for its gradient
    return y


def gated_attention_fused(x, context, w):
    """Same as gated_attention_reference. The side with fewer rows is projected (by associativity): with fewer labels
    than regions, of the five d x d products for each region (V-to-S: key, value; S-to-V: query, two gates) only the
    one of the gate with x is left."""
    scale = w.log_scale.exp()
    if x.shape[-2] <= context.shape[-2]:  # few queries: they are projected
        attention = torch.softmax(scale * (x @ w.query @ w.key.mT) @ context.mT, -1)
        a = attention @ context @ w.value
        if w.gated:
            a_gate = a @ w.gate_attended
    else:  # few keys: they are projected
        attention = torch.softmax(x @ (scale * context @ w.key @ w.query.mT).mT, -1)
        value = context @ w.value
        a = attention @ value
        if w.gated:
            a_gate = attention @ (value @ w.gate_attended)
    if not w.gated:
        return x + a, None
    x_gate = torch.addmm(w.gate_bias, x.flatten(0, -2), w.gate_query).view(x.shape)
    gate = torch.sigmoid(x_gate + a_gate)
    return torch.addcmul(x, gate, a), gate


def asymmetric_loss_and_gradient(z, targets, gamma_neg, gamma_pos, clip, focal_gradient):
    """Sum of the asymmetric loss of contiguous logits z, which are overwritten by d loss / d z.

    With p = sigmoid(z), q = max(p - clip, 0), dp/dz = p (1 - p):
        absent:   loss = -q^gamma- log(1-q)        d/dz = q^gamma- (1/(1-q) - gamma- log(1-q) / q) p (1-p)
        present:  loss = -(1-p)^gamma+ log p       d/dz = (1-p)^gamma+ (gamma+ p log p - (1-p))
    focal_gradient "stopped": the terms with a factor gamma are left out. Absent with q = 0: loss and slope are 0.
    """
    z = z.view(-1)
    targets = targets.reshape(-1)
    full = focal_gradient == "full"

    # Nearly every label is absent, so all are treated as absent. The few others are set to -inf, where an absent label
    # costs nothing, and are overwritten at the end.
    few = targets.nonzero()[:, 0]
    few_z = z[few]
    z[few] = -math.inf

    # absent: gradient = weight * slope, weight = q^gamma-
    p = torch.sigmoid(z)
    if clip == 0:  # q = p, slope = p - gamma- (1-p) log(1-p)
        q = p
        log_not_q = F.logsigmoid(z.neg_())
        slope = p
        if full:  # z is no longer needed: its memory is reused
            slope = z.copy_(p).sub_(1).mul_(log_not_q).mul_(gamma_neg).add_(p)
    else:
        q = (p - clip).clamp_min_(0)
        log_not_q = torch.log1p(-q)
        slope = 1 / (1 - q)
        if full:
            tiny = torch.finfo(q.dtype).tiny
            slope -= gamma_neg * log_not_q / q.clamp_min(tiny)
        slope *= p * torch.sigmoid(-z)
        slope[q == 0] = 0
    weight = (q ** (gamma_neg / 2)).square_()  # faster than q^gamma- where gamma- is 2 or 4
    loss = -torch.dot(weight, log_not_q)
    torch.mul(slope, weight, out=z)

    # present; ignored labels have weight 0
    p = torch.sigmoid(few_z)
    not_p = torch.sigmoid(-few_z)
    log_p = F.logsigmoid(few_z)
    weight = not_p ** gamma_pos * (targets[few] == 1)
    loss -= torch.dot(weight, log_p)
    slope = -not_p
    if full:
        slope += gamma_pos * p * log_p
    z[few] = weight * slope
    return loss


def logits_alive(z):
    """How many logits' loss is computed at once: on a CPU they stay in its cache between the passes"""
    return 2 ** 26 if z.is_cuda else 2 ** 17


class _AsymmetricLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, *exponents):
        gradient = logits.detach().clone(memory_format=torch.contiguous_format)
        z = gradient.view(-1)
        targets = targets.reshape(-1)
        block = logits_alive(z)
        loss = 0.0
        for start in range(0, len(z), block):
            part = slice(start, start + block)
            loss += asymmetric_loss_and_gradient(z[part], targets[part], *exponents)
        batch = logits.shape[-2]
        ctx.save_for_backward(gradient.div_(batch))
        return loss / batch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradient, = ctx.saved_tensors
        return gradient * grad, None, None, None, None, None


def asymmetric_loss_fused(logits, targets, gamma_neg=2.0, gamma_pos=0.0, clip=0.0, focal_gradient="full"):
    """Same as asymmetric_loss_reference. Loss and gradient in one pass over cache-sized blocks."""
    check_targets(targets)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _AsymmetricLoss.apply(logits, targets, gamma_neg, gamma_pos, clip, focal_gradient)


def cosines_alive(features):
    """How many entries of [b, C, M] a fused path keeps at once: on a CPU as many as its cache holds"""
    return 2 ** 26 if features.is_cuda else 2 ** 19


def norms(features):
    return features.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def soft_aggregate_fused(label_features, region_features, temperature, scale):
    """Same as soft_aggregate_reference, without normalised copies of the features, in blocks of samples."""
    if label_features.ndim == 2:  # there are no copies [B, C, d] to avoid
        return soft_aggregate_reference(label_features, region_features, temperature, scale)
    step = max(1, cosines_alive(region_features) // (label_features.shape[1] * region_features.shape[1]))
    gathered = []
    for t, x in zip(label_features.split(step), region_features.split(step), strict=True):
        cosine = t @ x.mT / norms(t) / norms(x).mT                               # [b, C, M]
        weight = torch.softmax(cosine / temperature, -1)
        gathered.append(torch.linalg.vecdot(weight, cosine))
    return scale * torch.cat(gathered)


class _SoftAggregateLoss(torch.autograd.Function):
    """Loss and gradients in one pass over blocks of samples, and of labels where they are many; no B x C x M is kept"""

    @staticmethod
    def forward(ctx, labels, regions, temperature, scale, bias, targets, *exponents):
        batch, classes, _ = labels.shape
        count = regions.shape[1]
        alive = cosines_alive(regions)
        rows = max(1, alive // (classes * count))
        columns = classes
        if rows == 1:
            columns = max(1, alive // count)

        loss = 0.0
        d_scale = 0.0
        d_bias = torch.zeros_like(bias)
        d_labels = torch.empty_like(labels)
        d_regions = torch.zeros_like(regions)
        for row in range(0, batch, rows):
            for column in range(0, classes, columns):
                samples = slice(row, row + rows)
                part = slice(column, column + columns)
                t = labels[samples, part]                                        # [b, c, d]
                x = regions[samples]                                             # [b, M, d]

                # z = scale * s + bias, s = sum over regions of softmax(cosine / temperature) * cosine
                t_norm = norms(t)                                               # [b, c, 1]
                x_norm = norms(x).mT                                            # [b, 1, M]
                cosine = (t @ x.mT).div_(t_norm).div_(x_norm)                    # [b, c, M]
                weight = torch.softmax(cosine / temperature, -1)                 # [b, c, M]
                s = torch.linalg.vecdot(weight, cosine)                          # [b, c]
                z = scale * s + bias[part]                                       # [b, c]

                # loss; afterwards z holds d loss / d z
                loss += asymmetric_loss_and_gradient(z, targets[samples, part], *exponents)
                dz = z / batch
                d_scale += (dz * s).sum()
                d_bias[part] += dz.sum(0)

                # d cosine: of the softmax, d s / d cosine = weight * (1 + (cosine - s) / temperature)
                d_s = (scale * dz)[..., None]                                    # [b, c, 1]
                d_cosine = (cosine - s[..., None]).div_(temperature).add_(1).mul_(weight).mul_(d_s)

                # d t, d x: cosine = t x / (|t| |x|), so d cosine / d t = x / (|t| |x|) - cosine t / |t|^2
                along = d_cosine * cosine                                        # [b, c, M]
                d_product = d_cosine.div_(t_norm).div_(x_norm)                   # [b, c, M]
                t_radial = along.sum(2, keepdim=True) / t_norm ** 2              # [b, c, 1]
                x_radial = along.sum(1)[..., None] / x_norm.mT ** 2              # [b, M, 1]
                torch.mul(t, -t_radial, out=d_labels[samples, part]).baddbmm_(d_product, x)
                d_regions[samples].addcmul_(x, x_radial, value=-1).baddbmm_(d_product.mT, t)
        ctx.save_for_backward(d_labels, d_regions, d_scale, d_bias)
        return loss / batch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_labels, d_regions, d_scale, d_bias = (gradient * grad for gradient in ctx.saved_tensors)
        return d_labels, d_regions, None, d_scale, d_bias, None, None, None, None, None


def soft_aggregate_loss_fused(label_features, region_features, temperature, scale, bias, targets,
                              gamma_neg=2.0, gamma_pos=0.0, clip=0.0, focal_gradient="full"):
    """Same as soft_aggregate_loss_reference. A block goes from cosines to loss to gradients while in the cache."""
    check_targets(targets)
    kind = torch.promote_types(region_features.dtype, torch.float32)
    batch = len(region_features)
    classes, d = label_features.shape[-2:]
    with torch.autocast(region_features.device.type, enabled=False):
        labels = label_features.to(kind).expand(batch, classes, d)
        return _SoftAggregateLoss.apply(labels, region_features.to(kind), temperature, scale.to(kind),
                                        bias.to(kind).expand(classes), targets, gamma_neg, gamma_pos, clip,
                                        focal_gradient)


if __name__ == "__main__":
    with run.exit_codes("sspa.py") as arguments:
        main(arguments)
