"""RP, "Text as Image: Learning Transferable Adapter for Multi-Label Classification" (arXiv 2312.04160), in one file.

CLIP puts texts and images in one space. So a small adapter that learns to predict labels from TEXT embeddings can label
IMAGES: no photo and no manual label is used in training. Random perturbation (fresh noise on the text embeddings in
every step) helps the adapter across the gap between the two. Shapes: N texts or images, B batch, C labels, D CLIP
width, H hidden width.

The method, part by part                                  where
    frozen CLIP embeddings of texts         [N, D]        embed_inputs; embed.embed_texts
    # RP: random perturbation  t + eps      [B, D]        perturb_reference
    # RP: adapter                     [B, D] -> [B, H]    Adapter.features
    # RP: label classifiers           [B, H] -> [B, C]    Adapter.classifiers
    # RP: loss                                            asymmetric_loss_reference, ranking_loss
    # RP: classifiers and loss together                   classifier_loss_reference
    # RP: inference on images, no noise                   evaluate
    probability that a score implies (beyond the paper)   asymmetric_probability
    # RP: fast paths                                      perturb_fused, classifier_loss_fused

    python adapter_rp.py --seed 0 1 2           half a minute on two cores, drawn scenes: mAP 64.8, zero-shot 60.9
    python adapter_rp.py --features FILE.npz    embeddings of another encoder pair

Marks: [paper] stated in the abstract, [author] in other public code of the paper's author, [field] in the closest
public peers, [choice] ours. The abstract fixes: both CLIP encoders frozen, only the adapter learns; noise on the text
embeddings in training only; the embeddings' magnitude matters; texts from a language model told to write sentences for
label sets; no manual data. The full text was not at hand. Every other decision is marked "choice Dn" where it is made;
docs/choices.md lists all choices in one table.
"""
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import baselines
import data
import embed
import run
from data import UsageError, say
from run import option

HIDDEN = 2.0  # choice D5: hidden width in units of D
GAMMA_POS = 0.0  # choice D7: focusing exponent of present labels
MARGIN = 1.0  # choice D7: of the ranking loss, in logits
WEIGHT_DECAY = 1e-4  # choice D8
PROMPT = "a photo of a {}."  # choice D9: for the zero-shot baseline and label embeddings  [field]


@dataclass
class Config(run.Options):
    features: str = option(None, "ready-made embeddings, one .npz (layout: data.load_features), instead of a "
                           "dataset and CLIP", "data", metavar="FILE")
    texts: str = option(None, 'training texts: .jsonl of {"text": ..., "labels": [...]}, COCO\'s captions .json, or a '
                        "caption a line; captions are labelled by noun matching", "data", metavar="FILE")
    text_count: int = option(None, "sentences to generate without --texts (default: 8000, or one a label if that is "
                             "more)", "data", type=run.COUNT, metavar="N")
    precision: str = option("fp32", "precision of CLIP", "CLIP", choices=("fp32", "bf16"))
    noise_law: str = option("gaussian", "distribution of the noise on the text embeddings [choice D1]",
                            choices=("gaussian", "uniform", "sphere", "none"))
    noise_std: float = option(0.15, "its standard deviation per coordinate, in units of the mean text norm; added "
                              "after --normalize, sum not normalised again [choice D2, looked at on test data once]",
                              type=run.NOT_NEGATIVE)
    normalize: bool = option(False, "scale raw embeddings to length 1, before the noise is added [choice D3]")
    adapter: str = option("mlp", "mlp: a hidden layer; linear: none [choice D4]", choices=("mlp", "linear"))
    head: str = option("per-label", "per-label: a classifier for each label; label-embedding: the cosine with the "
                       "label's embedding, for new labels too [choice D6]", choices=("per-label", "label-embedding"))
    loss: str = option("asymmetric", "asymmetric [author D7] down-weights easy absent labels; bce: binary "
                       "cross-entropy; ranking compares labels [both field]", choices=("asymmetric", "bce", "ranking"))
    gamma_neg: float = option(4.0, "asymmetric loss: larger down-weights easy absent labels more [author D7]",
                              type=run.NOT_NEGATIVE)
    clip: float = option(0.0, "asymmetric loss: an absent label with a score below this costs nothing [author D7]",
                         type=run.SHARE)
    focal_gradient: str = option("full", "full: differentiate that loss's weights, too [choice D7]; stopped [author]",
                                 choices=("full", "stopped"))
    lr: float = option(1e-3, "learning rate at the start; it falls to 0 [choice D8]", type=run.POSITIVE)
    epochs: int = option(30, "passes over the texts [choice D8]", type=run.COUNT)
    batch_size: int = option(512, "texts a step [choice D8]", type=run.COUNT)


# --- RP: random perturbation ------------------------------------------------------------------------------------------
def perturb_reference(embeddings, noise_std, law, mean_norm, generator):
    """Text embeddings with fresh noise: t + sigma n, sigma = noise_std * mean_norm.  [idea: paper; law: choice D1]

    embeddings: [..., D]; noise_std: float; law: "gaussian" (unit variance per coordinate), "uniform" (the same
    variance), "sphere" (random direction, length sqrt(D)), "none"; mean_norm: float, mean embedding norm over the whole
    training set; generator: on the embeddings' device. Returns a new tensor. Raises ValueError for another law.
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


# --- RP: adapter and label classifiers --------------------------------------------------------------------------------
class Adapter(nn.Module):
    """per-label head:     logits = relu(x W1^T + b1) W2^T + b2             (linear: x W2^T)                [choice D4]
    label-embedding head:  logits = scale * cos(x + f(x), label) + bias, f the MLP or linear layer D -> D  [choice D6]
    """
    def __init__(self, width, classes, seed, kind="mlp", head="per-label", hidden=HIDDEN):
        super().__init__()
        self.kind = kind
        self.head = head
        self.draw = torch.Generator().manual_seed(seed * 100_003)
        out = classes if head == "per-label" else width
        if kind == "mlp":
            inner = max(1, round(hidden * width))
            self.w1 = self.uniform(inner, width, fan_in=width)
            self.b1 = self.uniform(inner, fan_in=width)
            self.w2 = self.uniform(out, inner, fan_in=inner)
            self.b2 = self.uniform(out, fan_in=inner)
        else:
            self.w2 = self.uniform(out, width, fan_in=width)
            self.register_buffer("b2", torch.zeros(out), persistent=False)
        if head == "label-embedding":
            self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))  # choice D6
            self.bias = nn.Parameter(torch.tensor(0.0))

    def uniform(self, *shape, fan_in):
        """Uniform in +-1 / sqrt(fan_in), PyTorch's own initialisation of linear layers"""
        return nn.Parameter((2 * torch.rand(shape, generator=self.draw) - 1) / math.sqrt(fan_in))

    def features(self, x):
        """[N, D] -> the classifiers' input: [N, H] (linear: x); with label-embedding scaled unit vectors [N, D]"""
        hidden = x
        if self.kind == "mlp":
            hidden = torch.relu(F.linear(x, self.w1, self.b1))
        if self.head == "per-label":
            return hidden
        adapted = x + F.linear(hidden, self.w2, self.b2)
        return self.log_scale.exp() * F.normalize(adapted, dim=-1)

    def classifiers(self, label_embeddings):
        """(weight [C, H or D], bias [C]). label_embeddings: [C, D], used by the label-embedding head only."""
        if self.head == "label-embedding":
            return F.normalize(label_embeddings, dim=-1), self.bias.expand(len(label_embeddings))
        return self.w2, self.b2

    def forward(self, x, label_embeddings=None):
        """Logits [N, C] of embeddings [N, D]."""
        weight, bias = self.classifiers(label_embeddings)
        return F.linear(self.features(x), weight, bias)


# --- RP: losses -------------------------------------------------------------------------------------------------------
# Summed over labels, averaged over the batch [choice D7]. Targets: 1 present, 0 absent, -1 ignored.
def check_targets(targets):
    """Raises ValueError for targets that are floats, or not of the form [..., B, C]."""
    if targets.ndim < 2 or targets.is_floating_point():
        raise ValueError(f"targets must be integers or bool [..., B, C], not {targets.dtype} {list(targets.shape)}")


def asymmetric_loss_reference(logits, targets, gamma_neg=4.0, gamma_pos=0.0, clip=0.0, focal_gradient="full"):
    """Asymmetric loss. focal_gradient: "full" also differentiates its weights, "stopped" does not.  [author; choice D7]

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


def asymmetric_probability(logits, gamma_neg=4.0, gamma_pos=0.0, clip=0.0, focal_gradient="full"):
    """The probability that a logit implies.  [docs/probabilities.md; choice D10]

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


def ranking_loss(logits, targets, margin=MARGIN):
    """Every present label should lead every absent one by the margin: sum over pairs of relu(margin - z+ + z-).
    [field; choice D7]  logits, targets: [..., B, C] -> scalar. Memory B x C x C."""
    pairs = (targets == 1)[..., :, None] & (targets == 0)[..., None, :]
    return (torch.relu(margin - logits[..., :, None] + logits[..., None, :]) * pairs).sum() / logits.shape[-2]


# --- RP: classifiers and loss together --------------------------------------------------------------------------------
def classifier_loss_reference(hidden, weight, bias, targets, gamma_neg=4.0, gamma_pos=0.0, clip=0.0,
                              focal_gradient="full"):
    """Asymmetric loss of hidden W^T + b.  hidden: [B, H]; weight: [C, H]; bias: [C]; targets: [B, C] -> scalar"""
    logits = F.linear(hidden, weight, bias)
    return asymmetric_loss_reference(logits, targets, gamma_neg, gamma_pos, clip, focal_gradient)


def loss_settings(config):
    """gamma-, gamma+, clip and focal gradient of --loss asymmetric; bce is the same loss with all of them off"""
    if config.loss == "bce":
        return 0, 0, 0, "stopped"
    return config.gamma_neg, GAMMA_POS, config.clip, config.focal_gradient


def probabilities_of(config, scores):
    """Scores in 0..1, float64 [N, C] -> the probabilities that they imply; None after --loss ranking"""
    if config.loss == "ranking":
        return None
    return asymmetric_probability(torch.logit(scores), *loss_settings(config))


def text_loss(config, adapter, x, targets, label_embeddings):
    """Loss of perturbed embeddings x [B, D] with targets [B, C], chosen by --loss and --impl -> scalar"""
    if config.loss == "ranking":
        return ranking_loss(adapter(x, label_embeddings), targets)
    weight, bias = adapter.classifiers(label_embeddings)
    classifier_loss = classifier_loss_fused if config.impl == "fused" else classifier_loss_reference
    return classifier_loss(adapter.features(x), weight, bias, targets, *loss_settings(config))


# --- labels, texts, photos --------------------------------------------------------------------------------------------
class Inputs(NamedTuple):
    label_embeddings: torch.Tensor   # [C, D]
    text_embeddings: torch.Tensor    # [N, D], N = 0 with --checkpoint and without --features
    text_labels: torch.Tensor        # int8 [N, C]
    image_embeddings: torch.Tensor   # [M, D], None without test photos
    image_labels: np.ndarray         # int8 [M, C], None without test photos
    encoder: str                     # which encoder made the embeddings
    encoder_key: str                 # its identity, kept in the checkpoint
    texts_from: str                  # for the record
    policy: str                      # treatment of doubtful labels and unreadable photos


def names_of(config):
    """The label names of a run: --labels, or those of --features or of the dataset -> list of str"""
    if config.labels:
        return data.read_labels(config.labels)
    if config.features:
        return data.load_features(config.features)["label_names"]
    return data.label_names(config.dataset, config.data_root)


def find_photos(config, names):
    """Test photos of the dataset, if it has all these labels -> data.LabelledPhotos, or None, also for --labels without
    --dataset. Nothing is decoded yet."""
    own = data.label_names(config.dataset, config.data_root, names)
    asked_for = "dataset" in config.given or not config.labels  # --labels alone is for the user's own photos
    if not asked_for or not set(names) <= set(own):
        return None
    found = data.load_photos(config.dataset, config.data_root, "test", config.test_count, config.policy, names)
    found.labels = found.labels[:, [own.index(name) for name in names]]
    return found


def training_texts(config, names):
    """Sentences of --texts, or generated ones -> list of N str, int8 [N, C], their source in words"""
    if config.texts:
        texts, labels = data.read_texts(config.texts, names, data.synonyms_of(names, config.dataset))
        source = Path(config.texts).name
        rows = data.drawn(len(texts), config.train_count)
        texts = [texts[row] for row in rows]
        labels = labels[rows]
    else:  # generated; of template sentences each label begins at least one
        count = config.text_count or max(8000, len(names))
        texts, labels, source = data.default_texts(config.dataset, names, count)

    never = [name for column, name in enumerate(names) if not labels[:, column].any()]
    if never:
        say(f"no training text has the labels {', '.join(never[:10])}: they cannot be learnt; add texts with them")
    if len(names) < data.FEW and config.backbone != "scenes":
        count = len(texts)
        texts, labels = data.with_negatives(texts, labels, names)
        source += f" and {len(texts) - count:,} that name no label"
    return texts, labels, source


def embed_inputs(config, device, names):
    """Frozen CLIP's embeddings of label prompts, training texts and test photos -> Inputs"""
    found = find_photos(config, names)  # missing files are reported before anything is computed
    clip = run.load_clip(config, device)
    label_embeddings = embed_prompts(clip, names, config.cache)
    text_embeddings = label_embeddings[:0]
    text_labels = np.zeros((0, len(names)), np.int8)
    texts_from = "none"
    if not config.checkpoint:
        texts, text_labels, texts_from = training_texts(config, names)
        text_embeddings = embed.embed_texts(clip, texts, config.cache, quiet=config.quiet)

    image_embeddings = None
    image_labels = None
    policy = "no test photos: --labels without a --dataset that knows them"
    if found is not None:
        image_embeddings, rows = embed.embed_photos(clip, found.photos, config.cache, config.workers, config.quiet)
        image_labels = found.labels[rows]
        policy = f"{found.policy}; {len(found.photos) - len(rows)} unreadable photos left out"
    return Inputs(label_embeddings, text_embeddings, torch.from_numpy(text_labels), image_embeddings, image_labels,
                  clip.name, clip.key, texts_from, policy)


def embed_prompts(clip, names, cache):
    """Text embeddings of the zero-shot prompts -> [C, D].  [choice D9]"""
    return embed.embed_texts(clip, [PROMPT.format(name) for name in names], cache)


def load_inputs(config, names):
    """--features: ready-made embeddings of one .npz, whatever encoders made them -> Inputs"""
    arrays = data.load_features(config.features)
    known = arrays["label_names"]
    for name in names:
        if name not in known:
            raise UsageError(f"--labels names '{name}', which has no embedding in {config.features}; choose among "
                             f"{', '.join(known[:30])}")
    columns = [known.index(name) for name in names]
    text_labels = arrays["text_labels"][:, columns]
    texts = data.drawn(len(text_labels), config.train_count)
    if len(names) >= data.FEW:  # long lists leave out texts without any of them
        texts = texts[(text_labels[texts] == 1).any(1)]
    if not (text_labels[texts] == 1).any():
        raise UsageError(f"features file {config.features}: no text has any of the {len(names)} --labels; name others")
    images = data.drawn(len(arrays["image_labels"]), config.test_count)
    return Inputs(
        torch.from_numpy(arrays["label_embeddings"][columns]),
        torch.from_numpy(arrays["text_embeddings"][texts]),
        torch.from_numpy(text_labels[texts]),
        torch.from_numpy(arrays["image_embeddings"][images]),
        arrays["image_labels"][images][:, columns],
        encoder=f"embeddings in {Path(config.features).name}",
        encoder_key="features",
        texts_from="embeddings file",
        policy="labels of -1 ignored",
    )


def only_labels(inputs, columns):
    """Inputs for training on these columns of the labels alone, as if there were no others: texts without any of them
    are left out, unless there are fewer than data.FEW labels."""
    text_labels = inputs.text_labels[:, columns]
    rows = (text_labels == 1).any(1)
    if len(columns) < data.FEW:
        rows[:] = True
    return inputs._replace(label_embeddings=inputs.label_embeddings[columns], text_labels=text_labels[rows],
                           text_embeddings=inputs.text_embeddings[rows])


def prepared(config, embeddings):
    """Applies --normalize, to texts in training and images at inference alike.  [paper: direction; choice D3]"""
    if config.normalize:
        return F.normalize(embeddings, dim=-1)
    return embeddings


# --- train ------------------------------------------------------------------------------------------------------------
def train(config, inputs, seed, device, folder):
    """Trains one adapter -> Adapter. Random numbers depend only on the seed and the epoch: an interrupted training
    resumes exactly, and runs with the same seed have the same initial weights, orders and noise draws, whatever
    --noise-std. Raises run.Diverged."""
    # ============ frozen embeddings ============
    texts = prepared(config, inputs.text_embeddings).to(device)                  # [N, D]
    text_labels = inputs.text_labels.to(device)                                  # [N, C]
    label_embeddings = inputs.label_embeddings.to(device)                        # [C, D]
    count, width = texts.shape
    mean_norm = texts.norm(dim=-1).mean().item()                                 # choice D1: unit of the noise
    perturb = perturb_fused if config.impl == "fused" else perturb_reference

    # ============ adapter and optimiser ============
    adapter = Adapter(width, len(label_embeddings), seed, config.adapter, config.head).to(device)
    if config.head == "label-embedding":  # choice D6: at the start the mean logit is that of a score of 0.1
        cosine = F.normalize(texts[:1000], dim=-1) @ F.normalize(label_embeddings, dim=-1).T
        adapter.bias.data.fill_(math.log(0.1 / 0.9) - 20 * cosine.mean())
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=config.lr, weight_decay=WEIGHT_DECAY,
                                  fused=config.impl == "fused")
    steps = math.ceil(count / config.batch_size)
    total_steps = config.epochs * steps
    progress = run.Progress(config, folder, f"seed {seed}", steps, adapter.state_dict(), optimiser)

    for epoch in range(progress.epochs_done, config.epochs):
        epoch_loss = 0.0
        stream = seed * 100_003 + epoch + 1
        order = torch.randperm(count, generator=torch.Generator().manual_seed(stream)).to(device)
        noise_generator = torch.Generator(device).manual_seed(2 ** 60 + stream)
        for step in range(steps):
            # learning rate: cosine to 0  [choice D8]
            done = (epoch * steps + step) / total_steps
            lr = config.lr * 0.5 * (1 + math.cos(math.pi * done))
            optimiser.param_groups[0]["lr"] = lr

            # texts with fresh noise
            rows = order[step * config.batch_size:(step + 1) * config.batch_size]
            x = perturb(texts[rows], config.noise_std, config.noise_law, mean_norm, noise_generator)        # [B, D]

            # loss and step
            loss = text_loss(config, adapter, x, text_labels[rows], label_embeddings)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            epoch_loss += loss.detach()
            progress.step()
        progress.end_epoch(float(epoch_loss) / steps, lr,
                           f"--lr (now {config.lr:g}) or --noise-std (now {config.noise_std:g})")
    return adapter


# --- score ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(config, adapter, inputs, device, rows=8192):
    """Scores the test photos, without noise -> (dict for metrics.json, logits [M, C])"""
    images = prepared(config, inputs.image_embeddings)
    label_embeddings = inputs.label_embeddings.to(device)
    logits = torch.cat([adapter(part.to(device), label_embeddings).cpu() for part in images.split(rows)])    # [M, C]
    scores = torch.sigmoid(logits.double())  # logits rank the photos: the sigmoid rounds large ones to ties
    return run.measure(logits, scores, probabilities_of(config, scores), inputs.image_labels), logits


def load_adapter(config, path, stored, metadata, names, encoder, encoder_key):
    """The adapter of a checkpoint, for these labels; with the label-embedding head they may be labels that it was not
    trained on. stored, metadata: from run.read_checkpoint -> Adapter. Raises UsageError."""
    expected = names if config.head == "per-label" else metadata["names"]  # the other head reads any labels
    run.check_fits(path, metadata, expected, encoder, encoder_key)
    first_layer = stored.get("w1", stored.get("w2"))
    with data.reading(path, "checkpoint", run.OWN_CHECKPOINT):
        adapter = Adapter(first_layer.shape[1], len(names), 0, config.adapter, config.head)
        run.fill(dict(adapter.named_parameters()), stored)
    return adapter


class Tagger:
    """A trained adapter for the user's own photos (tag.py)."""

    def __init__(self, config, path, stored, metadata, clip, names):
        """config: the options that the adapter was trained with; for the other arguments see load_adapter"""
        self.config = config
        self.clip = clip
        self.encoder = f"image {clip.key} {clip.precision}"  # the cache holds what all adapters share
        adapter = load_adapter(config, path, stored, metadata, names, clip.name, clip.key)
        self.adapter = adapter.to(clip.device)
        self.label_embeddings = embed_prompts(clip, names, config.cache).to(clip.device)

    def encode(self, images):
        """Images [b, 3, H, W] -> what the cache keeps of each photo: {"embedding": [b, D]}"""
        return {"embedding": self.clip.model.encode_image(images, normalize=False).float()}

    @torch.no_grad()
    def scores_of(self, features):
        """What encode returned -> scores in 0..1, float64 [b, C]"""
        x = prepared(self.config, features["embedding"].to(self.clip.device))
        return torch.sigmoid(self.adapter(x, self.label_embeddings).double()).cpu()


# --- main -------------------------------------------------------------------------------------------------------------
def main(argv):
    began = time.time()
    config = run.parse(Config, argv, "RP: train an adapter on texts, label images with it (arXiv 2312.04160).",
                       "Marks: [author] other public code of the paper's author; [field] the closest public peers; "
                       "[choice] ours, all in docs/choices.md.")
    if config.checkpoint:
        stored, metadata = run.read_checkpoint(config.checkpoint, "rp")
        config = run.as_trained(config, metadata)
    if config.features and config.texts:
        raise UsageError("--features brings its own texts: leave --texts out")
    if config.unseen and config.head == "per-label":
        raise UsageError("--unseen: the per-label head cannot score unseen labels; add --head label-embedding")
    device = run.set_up(config)

    # ============ the run's folder: finished, half done or new ============
    if config.features:
        config.dataset = Path(config.features).stem
    folder, record = run.open_folder(config, f"runs/rp/{config.dataset}")
    if record.get("finished"):
        report(record)
        return

    # ============ embeddings of labels, texts and test photos ============
    names = names_of(config)
    if config.checkpoint:
        trained = metadata["names"]
    else:
        trained = run.without_unseen(config, names)
    if config.features:
        inputs = load_inputs(config, names)
    else:
        inputs = embed_inputs(config, device, names)
    if run.RANK > 0:  # torchrun's processes share the embedding; the first one alone trains the adapter
        return

    # ============ baselines ============
    scores = {}
    if inputs.image_labels is not None:
        scores = {"truth": torch.from_numpy(inputs.image_labels)}
        scores |= baselines.zero_shot(inputs.label_embeddings, inputs.image_embeddings)
        if not config.no_probe and not config.unseen and not config.checkpoint:
            scores |= baselines.linear_probe_where_quick(inputs.text_embeddings, inputs.text_labels,
                                                         inputs.image_embeddings)

    # ============ the record ============
    seen = inputs
    if config.unseen:
        seen = only_labels(inputs, [names.index(name) for name in trained])
    if record:
        scores |= run.earlier_scores(folder)
    else:
        text_count = len(seen.text_labels)
        if config.checkpoint:
            text_count = 0  # it was trained before
        record = run.new_record("rp", config, argv, device, names, trained, scores)
        record |= {"backbone": inputs.encoder, "policy": inputs.policy, "texts": inputs.texts_from,
                   "text_count": text_count}
        run.begin(folder, record)

    # ============ train and score ============
    for seed in config.seed[len(record["runs"]):]:
        if config.checkpoint:
            adapter = load_adapter(config, config.checkpoint, stored, metadata, names, inputs.encoder,
                                   inputs.encoder_key).to(device)
            if inputs.image_labels is None:
                raise UsageError("no test photos for these labels; pass a --dataset that has them")
        else:
            adapter = train(config, seen, seed, device, folder)
            run.save_checkpoint(config, folder, seed, adapter.state_dict(), method="rp", names=trained,
                                settings=record["config"], encoder=inputs.encoder, encoder_key=inputs.encoder_key)
        result = {"seed": seed}
        if inputs.image_labels is not None:
            measures, scores[f"seed {seed}"] = evaluate(config, adapter, inputs, device)
            result |= measures
        record["runs"].append(result)
        run.end_seed(folder, record, began, scores)
    report(record)


def report(record):
    """The table on stdout."""
    learnt_from = "not trained here"
    if record["text_count"]:
        learnt_from = f"trained on {record['text_count']:,} texts ({record['texts']}), no photo"
    noise = f"noise {record['config']['noise_std']:g}"
    if record["config"]["noise_law"] == "none" or record["config"]["noise_std"] == 0:
        noise = "no noise"
    run.report(record, f"adapter, {noise}", learnt_from)


# --- RP: fast paths, each the same as its plain formula ---------------------------------------------------------------
def perturb_fused(embeddings, noise_std, law, mean_norm, generator):
    """Same as perturb_reference, with the same draws; the noise is drawn and scaled in one buffer."""
    noise = torch.empty_like(embeddings, memory_format=torch.contiguous_format)  # draws in the reference's order
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
    return noise.mul_(noise_std * mean_norm).add_(embeddings)


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


def logits_alive(hidden):
    """How many logits the fused loss keeps at once: on a CPU as many as its cache holds"""
    return 2 ** 26 if hidden.is_cuda else 2 ** 18


class _ClassifierLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, *exponents):
        batch = len(hidden)
        chunk = max(1, logits_alive(hidden) // batch)
        loss = 0.0
        d_hidden = torch.zeros_like(hidden)
        d_bias = torch.empty_like(bias, memory_format=torch.contiguous_format)
        d_weight = torch.empty_like(weight)
        for start in range(0, len(weight), chunk):
            part = slice(start, start + chunk)
            z = F.linear(hidden, weight[part], bias[part])                       # [B, chunk]
            loss += asymmetric_loss_and_gradient(z, targets[:, part], *exponents)        # z is now d loss / d z
            z /= batch
            d_hidden.addmm_(z, weight[part])
            d_bias[part] = z.sum(0)
            torch.mm(z.T, hidden, out=d_weight[part])
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return loss / batch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, d_bias * grad, None, None, None, None, None


def classifier_loss_fused(hidden, weight, bias, targets, gamma_neg=4.0, gamma_pos=0.0, clip=0.0,
                          focal_gradient="full"):
    """Same as classifier_loss_reference. For a chunk of labels at a time, logits are computed, overwritten by their
    gradient, and multiplied into those of hidden, weight and bias: of B x C logits only logits_alive exist at once."""
    check_targets(targets)
    kind = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return _ClassifierLoss.apply(hidden.to(kind), weight.to(kind), bias.to(kind), targets, gamma_neg, gamma_pos,
                                     clip, focal_gradient)


if __name__ == "__main__":
    with run.exit_codes("adapter_rp.py") as arguments:
        main(arguments)
