"""Side-by-side timings of the plain formula (A) and the fused path (B), interleaved in one run, on the CPU.

    python experiments/benchmark.py rp --output D        4 minutes on two cores
    python experiments/benchmark.py cost --output D      3 minutes: the last table of rp, prompt tuning and the adapter
    python experiments/benchmark.py sspa --output D      under 10 minutes
    python experiments/benchmark.py towers --output D    2 minutes: CLIP's image towers in SSPA, frozen and tuned
    python experiments/benchmark.py metrics --output D   1 minute: average precision beside scikit-learn's
    python experiments/benchmark.py tag --output D       6 minutes: photos a second beside bare open_clip
    python experiments/benchmark.py gpu --output D       the same, and training steps, on a GPU; refuses without one

Prints a table a path and writes D/benchmark.json. A row: milliseconds (median over rounds), their ratio (above 1: the
fused path is faster), in some the best other way that one would pick and the ratio to the best of the two, peak extra
memory (parameters and optimiser state not counted), multiplications counted from the shapes, and their rate as a share
of what the machine's own matrix product reaches in the same process. CLIP's weights are random: times do not depend on
them.
"""
import argparse
import functools
import inspect
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler quiet; read when torch is imported
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from sklearn.neural_network import MLPClassifier
from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import adapter_rp as rp
import data
import embed
import metrics
import run
import scenes
import sspa

WIDTH, HIDDEN, BATCH, TEXTS = 512, 1024, 512, 4096  # ViT-B's joint space; RP's hidden width and batch; training texts
TITLES = {"reference_ms": "A ms", "fused_ms": "B ms", "ratio": "A / B", "other_ms": "other ms",
          "ratio_to_best": "best / B", "reference_mib": "A MiB", "fused_mib": "B MiB",
          "multiplications_reference": "A mult.", "multiplications_fused": "B mult.", "compiled_ms": "A compiled",
          "share_of_peak_reference": "A of peak", "share_of_peak_fused": "B of peak"}


# --- measuring --------------------------------------------------------------------------------------------------------
def timed(function, calls=1):
    """Seconds a call"""
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def interleave(functions, quick=False):
    """A B A B ...: seconds a call of each, median over rounds. Quick functions are called several times a round."""
    first = [timed(function) for function in functions]  # warms up, and says how often to call
    if quick:
        return first
    calls = max(1, round(0.05 / min(first)))
    rounds = 9 if calls * sum(first) < 1 else 3
    times = [[timed(function, calls) for function in functions] for _ in range(rounds)]
    return [statistics.median(seconds) for seconds in zip(*times, strict=True)]


def peak_extra_mib(function):
    """Highest sum of what the allocator handed out and had not got back during a call, MiB; after a call to warm up"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return float(held.max(initial=0)) / 2 ** 20


def matmul_peak():
    """Multiply-adds a second of the machine's own float32 matrix product, best of several"""
    square = torch.randn(2048, 2048)
    return 2048 ** 3 / min(timed(functools.partial(torch.mm, square, square)) for _ in range(9))


def compiled_ms(function):
    """torch.compile on the plain formula, an upper anchor; None where there is no C++ compiler, or it cannot"""
    if not (shutil.which("g++") or shutil.which("clang++")):
        return None
    torch._dynamo.reset()
    try:
        return 1e3 * interleave([torch.compile(function)])[0]
    except Exception as error:  # whatever it fails at: the other columns stand
        print(f"torch.compile: {type(error).__name__}")
        return None


def features(*shape, learn=True, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).requires_grad_(learn)


def gradient_steps(functions, inputs, above):
    """A step for each function: its outputs, and the gradients of all inputs that need one, given those above"""
    needed = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor) and tensor.requires_grad]

    def step(function):
        return torch.autograd.grad(function(*inputs), needed, above)
    return [functools.partial(step, function) for function in functions]


class Bench:
    """Measures rows, prints them as a table a path, keeps them for benchmark.json."""

    def __init__(self, quick, compiled):
        self.quick, self.compiled, self.rows, self.peak = quick, compiled and not quick, [], matmul_peak()

    def some(self, shapes):
        """All shapes; the first with --quick"""
        return shapes[:1] if self.quick else shapes

    def compare(self, path, shape, reference, fused, multiplications=(0, 0), other=None):
        """Measures one row. reference, fused, other: () -> anything; multiplications: of the first two."""
        seconds = interleave([reference, fused] + [other] * (other is not None), self.quick)
        rest = {}
        if other:
            rest = {"other_ms": 1e3 * seconds[2], "ratio_to_best": min(seconds[0], seconds[2]) / seconds[1]}
        mib = [peak_extra_mib(function) for function in (reference, fused)]
        pairs = zip(multiplications, seconds[:2], strict=True)
        shares = [count / needed / self.peak or None for count, needed in pairs]
        self.add({"path": path, "shape": shape, "reference_ms": 1e3 * seconds[0], "fused_ms": 1e3 * seconds[1],
                  "ratio": seconds[0] / seconds[1], **rest, "reference_mib": mib[0], "fused_mib": mib[1],
                  "multiplications_reference": multiplications[0], "multiplications_fused": multiplications[1],
                  "share_of_peak_reference": shares[0], "share_of_peak_fused": shares[1],
                  "compiled_ms": compiled_ms(reference) if self.compiled else None})

    def add(self, row):
        names, (path, shape, *numbers) = list(row)[2:], row.values()
        if path not in [earlier["path"] for earlier in self.rows]:
            print(" " * 54 + "".join(f"{TITLES.get(name, name):>12}" for name in names))
        cells = ["-" if number is None else f"{number:.3g}" if number < 1000 else f"{number:.4g}" for number in numbers]
        print(f"{path:<24}{shape:<30}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
        self.rows.append(row)


# --- RP ---------------------------------------------------------------------------------------------------------------
def texts_and_labels(classes):
    """Random text embeddings [TEXTS, WIDTH] and up to three labels for each, int8 [TEXTS, classes]"""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(TEXTS, classes, dtype=torch.int8)
    labels.scatter_(1, torch.randint(classes, (TEXTS, 3), generator=generator), 1)
    return 5 * torch.randn(TEXTS, WIDTH, generator=generator), labels


def plain_script(embeddings, labels):
    """The script one would write: DataLoader, nn.Sequential, the readable loss, unfused AdamW -> a step"""
    pairs = torch.utils.data.TensorDataset(embeddings, labels)
    loader = torch.utils.data.DataLoader(pairs, BATCH, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # one epoch after the other
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, labels.shape[1]))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    mean_norm, generator = embeddings.norm(dim=-1).mean().item(), torch.Generator().manual_seed(0)

    def step():
        texts, targets = next(batches)
        optimiser.zero_grad()
        logits = model(rp.perturb_reference(texts, 0.15, "gaussian", mean_norm, generator))
        rp.asymmetric_loss_reference(logits, targets).backward()
        optimiser.step()
    return step


def fused_script(embeddings, labels, batch=BATCH, seeds=(0,)):
    """The step of adapter_rp.train, for one seed or several"""
    config, adapter = rp.Config(), rp.Adapter(WIDTH, labels.shape[1], seeds)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    mean_norm = embeddings.norm(dim=-1).mean().item()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    orders = [torch.randperm(TEXTS, generator=generator) for generator in generators]
    starts = itertools.cycle(range(0, TEXTS - batch + 1, batch))

    def step():
        start = next(starts)
        rows = [order[start:start + batch] for order in orders]
        optimiser.zero_grad()
        x = torch.cat([rp.perturb_fused(embeddings[row][None], 0.15, "gaussian", mean_norm, generator)
                       for row, generator in zip(rows, generators, strict=True)])
        rp.text_loss(config, adapter, x, labels[torch.stack(rows)], None).backward()
        optimiser.step()
    return step


def step_multiplications(classes, batch=BATCH, runs=1):
    """Forward, gradient of the weights, gradient of the hidden features; the embeddings need none."""
    return runs * batch * (2 * WIDTH * HIDDEN + 3 * HIDDEN * classes)


def adapter_step(bench):
    """A: a plain script (DataLoader, readable loss, unfused AdamW); B: the step of adapter_rp.train. Both do the same
    products; with few labels these, noise and optimiser are nearly all, so little is left to gain."""
    for classes in bench.some((20, 80, 1000, 10000)):
        given, count = texts_and_labels(classes), step_multiplications(classes)
        bench.compare("adapter step", f"C={classes}", plain_script(*given), fused_script(*given), (count, count))


def others_loss(logits, targets, present, gamma_pos=0.0, gamma_neg=4.0):
    """The asymmetric loss by the formula of its authors' optimized class, in place where autograd allows. present:
    targets as floats, as that class takes them."""
    absent, p = 1 - present, torch.sigmoid(logits)
    q = 1 - p
    loss = present * p.clamp(min=1e-8).log()
    loss += absent * q.clamp(min=1e-8).log()
    loss *= (1 - p * present - q * absent) ** (gamma_pos * present + gamma_neg * absent)
    return -loss.sum() / len(logits)


def asymmetric_loss(bench):
    """Forward and gradient. Elementwise: no matrix product, 0 multiplications in one. Other: AsymmetricLossOptimized's
    formula. With 20 labels a call of PyTorch costs more than what it does."""
    def ours(function, logits, targets, _):
        return function(logits, targets)
    functions = [functools.partial(ours, function)
                 for function in (rp.asymmetric_loss_reference, rp.asymmetric_loss_fused)]
    for classes in bench.some((20, 80, 1000, 10000)):
        logits, targets = features(BATCH, classes, scale=3.0), texts_and_labels(classes)[1][:BATCH]
        *steps, other = gradient_steps([*functions, others_loss], (logits, targets, targets.float()), torch.tensor(1.0))
        bench.compare("asymmetric loss", f"B={BATCH} C={classes}", *steps, other=other)


def library_epochs(bench):
    """Ten epochs of 4,096 texts. A: scikit-learn's MLPClassifier (same layers, batch and decay; Adam, binary
    cross-entropy, no noise); B: ours, with noise and the asymmetric loss."""
    for classes in bench.some((20, 80, 1000)):
        texts, labels = texts_and_labels(classes)
        library = MLPClassifier(HIDDEN, batch_size=BATCH, max_iter=10, tol=0, n_iter_no_change=11, random_state=0)
        step = fused_script(texts, labels)
        fit = functools.partial(library.fit, texts.numpy(), labels.numpy())
        bench.compare("ten epochs", f"C={classes}", fit, lambda step=step: [step() for _ in range(10 * TEXTS // BATCH)])


def seed_sweep(bench):
    """A: eight seeds, a fused step of each after the other; B: one step of all eight. Fewer, larger operations."""
    given = texts_and_labels(80)
    for batch in bench.some((64, 256, 512)):
        singles, count = [fused_script(*given, batch, (seed,)) for seed in range(8)], step_multiplications(80, batch, 8)
        bench.compare("seed sweep", f"8 seeds, batch {batch}, C=80", lambda steps=singles: [step() for step in steps],
                      fused_script(*given, batch, range(8)), (count, count))


def prompt_tuning(bench):
    """What an adapter spares. A: a step of prompt tuning in TaI-DPT's form (16 learnable context tokens, C x 77 tokens
    through ViT-B-32's frozen text encoder, 20 labels at a time); B: an adapter step. Same batch, same loss."""
    clip, length = random_clip(), 16
    for classes in (2,) if bench.quick else (20, 40, 80, 160, 320):
        texts, labels = texts_and_labels(classes)
        places, context = " ".join(["X"] * length), features(1, length, WIDTH, scale=0.02)
        tokens = clip.tokenizer([f"{places} thing number {number}." for number in range(classes)])
        step = prompt_step(clip.model, context, tokens, F.normalize(texts[:BATCH], dim=-1), labels[:BATCH])
        count = 2 * classes * (WIDTH ** 2 + BATCH * WIDTH) + text_multiplications(classes * 77, classes * 77 ** 2)
        bench.compare("prompt tuning", f"C={classes}", step, fused_script(texts, labels),
                      (count, step_multiplications(classes)))


def prompt_step(model, context, tokens, texts, labels):
    optimiser = torch.optim.AdamW([context], lr=1e-3)

    def step():
        optimiser.zero_grad()
        for chunk, targets in zip(tokens.split(20), labels.split(20, dim=1), strict=True):
            prompts = F.normalize(sspa.encode_prompts_reference(model, context, chunk)[0], dim=-1)
            # the loss adds up over labels, so the gradient of a chunk needs no other chunk
            rp.asymmetric_loss_fused(20 * texts @ prompts.T, targets).backward()
        optimiser.step()
    return step


def average_precision(bench):
    """Of every label, random scores, 3 % positives. A: scikit-learn's loop over labels; B: metrics.average_precision.
    Both sort; A sorts indices, gathers and interpolates curves besides."""
    draw = np.random.default_rng(0)
    for count, classes in bench.some(((4952, 20), (40504, 80), (107859, 81))):
        scores, labels = draw.random((count, classes), np.float32), draw.random((count, classes)) < 0.03
        both = [functools.partial(function, *given) for function, given in (
            (functools.partial(average_precision_score, average=None), (labels, scores)),
            (metrics.average_precision, (scores, labels)))]
        assert np.allclose(both[0](), both[1]())
        bench.compare("average precision", f"{count} x {classes}", *both)


# --- SSPA -------------------------------------------------------------------------------------------------------------
@functools.cache
def random_clip():
    return embed.load_clip("ViT-B-32", "none")


def coco_labels(bench):
    """COCO's names as SSPA takes them -> sspa.Labels"""
    names = data.label_names("coco2014")[:2 if bench.quick else 80]
    return sspa.labels_of(sspa.Config(cache=None), random_clip(), names, dict(zip(names, names, strict=True)))


def text_multiplications(tokens, pairs, layers=12):
    """ViT-B-32's text tower, forward and gradient of its input: twelve d^2 a token and layer, two d for each pair of
    positions that attend"""
    return 2 * layers * (12 * WIDTH ** 2 * tokens + 2 * WIDTH * pairs)


def prompt_multiplications(classes, longest, sets=2, shared=5):
    """-> plain; plain, but cut to the longest prompt; fused: start and context once, each label's own positions"""
    own = classes * (longest - shared)
    return [sets * text_multiplications(tokens, pairs) for tokens, pairs in (
        (classes * 77, classes * 77 ** 2), (classes * longest, classes * longest ** 2),
        (shared + own, shared ** 2 + own * longest))]


def prompt_encoding(bench):
    """Two prompt sets of COCO's names. Then the same with A on prompts cut to the longest, and nothing else."""
    model, tokens, contexts = random_clip().model, coco_labels(bench).tokens, features(2, 4, WIDTH, scale=0.02)
    classes, longest = len(tokens), int(tokens.argmax(-1).max()) + 1
    counts = prompt_multiplications(classes, longest)
    short = SimpleNamespace(
        token_embedding=model.token_embedding, positional_embedding=model.positional_embedding[:longest],
        transformer=model.transformer, attn_mask=model.attn_mask[:longest, :longest], ln_final=model.ln_final,
        text_projection=model.text_projection)

    def cut(_, contexts, tokens):
        return sspa.encode_prompts_reference(short, contexts, tokens[:, :longest])
    functions = sspa.encode_prompts_reference, cut, sspa.encode_prompts_fused
    plain, cut, fused = gradient_steps(functions, (model, contexts, tokens), torch.randn(2, classes, WIDTH))
    bench.compare("prompt encoding", f"C={classes}, 2 sets, 77 -> {longest}", plain, fused, counts[::2])
    bench.compare("prompt encoding, A cut", f"C={classes}, 2 sets, {longest}", cut, fused, counts[1:])


def quaternion_layer(bench):
    """The first layer of QSM. Multiplications of A: 16 d^2 for every image and label, three times (forward, two
    gradients); of B: 4 d^2 for each component where it varies, the gradient of its input only where one is needed."""
    B, C = (8, 20) if bench.quick else (64, 80)
    weights = [features(WIDTH, WIDTH, scale=0.03) for _ in range(4)] + [torch.zeros(4 * WIDTH, requires_grad=True)]
    T_ka, T_ca, x0 = features(C, WIDTH, learn=False), features(B, C, WIDTH), features(B, 1, WIDTH, learn=False)

    def layer(function, i, j, k, *weights):
        return function((None, i, j, k), *weights)
    layers = [functools.partial(layer, function)
              for function in (sspa.quaternion_linear_reference, sspa.quaternion_linear_fused)]
    for which, components, rows in (("one varies", (T_ka, T_ca, x0), 3 * B * C + 2 * C + 2 * B),
                                    ("all vary", [features(B, C, WIDTH) for _ in range(3)], 9 * B * C)):
        steps = gradient_steps(layers, (*components, *weights), torch.randn(B, C, 4 * WIDTH))
        counts = 3 * 16 * WIDTH ** 2 * B * C, 4 * WIDTH ** 2 * rows
        bench.compare("quaternion layer 1", f"B={B} C={C} d={WIDTH}, {which}", *steps, counts)


def alignment_multiplications(B, C, M):
    """-> plain, fused; in each direction n rows ask m rows: forward and two gradients"""
    plain = fused = 0
    for n, m in ((C, M), (M, C)):
        plain += (3 * n + 2 * m) * WIDTH ** 2 + 2 * n * m * WIDTH
        # query, key, value and the answer's gate on the side with fewer rows, the asking side's gate on its own; an
        # answer gated there is spread over those who ask by a third product
        fused += (4 * min(n, m) + n) * WIDTH ** 2 + (2 if n <= m else 3) * n * m * WIDTH
    return 3 * B * plain, 3 * B * fused


def gated_alignment(bench):
    """Both directions. Regions need no gradient here: the image tower is frozen."""
    def align(function, T, X, *weights):
        return function(T, X, sspa.GatedAttention(*weights[:7]), sspa.GatedAttention(*weights[7:]))[:2]
    functions = [functools.partial(align, function)
                 for function in (sspa.gated_alignment_reference, sspa.gated_alignment_fused)]
    square, scale = features(WIDTH, WIDTH, scale=WIDTH ** -0.5), torch.tensor(10.0)
    for B, C, M in bench.some(((8, 20, 784), (8, 80, 784), (32, 20, 196), (32, 80, 196), (32, 20, 49), (32, 80, 49),
                               (4, 1000, 196))):
        weights = [tensor.detach().clone().requires_grad_() for tensor in
                   2 * [square, square, square, scale, square, square, torch.zeros(WIDTH)]]
        T, X = (F.normalize(features(B, rows, WIDTH, learn=False), dim=-1) for rows in (C, M))
        steps = gradient_steps(functions, (T.requires_grad_(), X, *weights), (torch.randn_like(T), torch.randn_like(X)))
        bench.compare("gated alignment", f"B={B} C={C} M={M} d={WIDTH}", *steps, alignment_multiplications(B, C, M))


def others_aggregator(labels, regions, temperature, scale):
    """The soft aggregator as TaI-DPT computes it for labels [C, d] that all images share: regions times labels"""
    S = F.normalize(regions, dim=-1) @ F.normalize(labels, dim=-1).T             # [B, M, C]
    return scale * (torch.softmax(S / temperature, 1) * S).sum(1)


def soft_aggregator(bench):
    """Logits as in prediction; with all gradients; and in training: with the loss, loss and gradients in one pass.
    Shared: labels that do not vary with the image, where A and B are one and nothing here trains; other: TaI-DPT's."""
    plain, fused = sspa.soft_aggregate_reference, sspa.soft_aggregate_fused
    plain_loss, fused_loss = sspa.soft_aggregate_loss_reference, sspa.soft_aggregate_loss_fused
    for B, C, M in bench.some(((32, 80, 196), (8, 80, 784), (8, 1000, 196), (32, 1000, 196), (8, 10000, 196))):
        shape, product = f"B={B} C={C} M={M} d={WIDTH}", B * C * M * WIDTH
        inputs = features(B, C, WIDTH), features(B, M, WIDTH), 0.07, torch.tensor(20.0, requires_grad=True)
        targets = (torch.rand(B, C, generator=torch.Generator().manual_seed(0)) < 0.03).to(torch.int8)
        steps = [functools.partial(torch.no_grad()(function), *inputs) for function in (plain, fused)]
        bench.compare("soft aggregator, logits", shape, *steps, (product, product))
        steps = gradient_steps((plain, fused), inputs, torch.randn(B, C))
        bench.compare("soft aggregator", shape, *steps, (3 * product, 3 * product))
        shared = features(C, WIDTH), *inputs[1:]
        steps = gradient_steps((plain, fused, others_aggregator), shared, torch.randn(B, C))
        bench.compare("soft aggregator, shared", shape, *steps[:2], (3 * product, 3 * product), other=steps[2])
        inputs += torch.tensor(-3.0, requires_grad=True), targets
        steps = gradient_steps((plain_loss, fused_loss), inputs, torch.tensor(1.0))
        bench.compare("soft aggregator + loss", shape, *steps, (3 * product, 3 * product))


def head(bench):
    """All but the image tower: prompts, DSF, QSM, GDMA, aggregator, both losses. Without: prompts' features given."""
    labels, clip = coco_labels(bench), random_clip()
    B, C, M = (4, len(labels.names), 49) if bench.quick else (32, len(labels.names), 196)
    given = torch.randn(B, WIDTH), torch.randn(B, M, WIDTH), (torch.rand(B, C) < 0.04).to(torch.int8)
    models = [sspa.SSPA(sspa.Config(tune_image="none", impl=impl), clip.model, labels, 0)
              for impl in ("reference", "fused")]
    shared = 3 * (4 * WIDTH ** 2 * B * C + 3 * B * C * M * WIDTH)  # quaternion layer 2, DSF, aggregator
    first_layer = 3 * 16 * WIDTH ** 2 * B * C, 4 * WIDTH ** 2 * (3 * B * C + 2 * B + 2 * C)
    counts = [shared + sum(parts) for parts in zip(alignment_multiplications(B, C, M), first_layer, strict=True)]
    of_prompts = prompt_multiplications(C, int(labels.tokens.argmax(-1).max()) + 1)[::2]
    in_all = [sum(parts) for parts in zip(counts, of_prompts, strict=True)]

    def step(model, prompts):
        model.zero_grad()
        model(*given, prompts).backward()
    prompts = torch.no_grad()(models[0].prompts)()
    for which, prompts_given, counted in (("with prompts", None, in_all), ("without", prompts, counts)):
        steps = [functools.partial(step, model, prompts_given) for model in models]
        bench.compare("head", f"B={B} C={C} M={M}, {which}", *steps, counted)


# --- CLIP's image towers ----------------------------------------------------------------------------------------------
def towers(bench):
    """What a photo costs. Frozen: it is encoded once, its features are kept. Tuned: time and memory of a training step,
    beside 20 bytes a parameter (weight, gradient, AdamW's two moments, average)."""
    config, names, batch = sspa.Config(tune_image="full", cache=None), [f"thing {number}" for number in range(20)], 2

    def step(model, images, targets, copies=1):
        model.zero_grad()
        encoded = sspa.image_features(model.clip.visual, images.repeat(copies, 1, 1, 1))
        model(*encoded, targets.repeat(copies, 1)).backward()
    for backbone, pixels in bench.some((("ViT-B-32", 224), ("ViT-B-32", 448), ("ViT-B-16", 224), ("ViT-B-16", 448),
                                        ("RN50", 224), ("RN50", 448), ("RN101", 448))):
        clip = embed.load_clip(backbone, "none", resolution=pixels)
        labels = sspa.labels_of(config, clip, names, dict(zip(names, names, strict=True)))
        model = sspa.SSPA(config, clip.model, labels, 0)
        images, targets = torch.randn(batch, 3, pixels, pixels), (torch.rand(batch, 20) < 0.1).to(torch.int8)
        encode = functools.partial(torch.no_grad()(sspa.image_features), clip.model.visual, images)
        one, two = (functools.partial(step, model, images, targets, copies) for copies in (1, 2))
        x0, X = encode()
        encoding, tuning = (interleave([function], bench.quick)[0] / batch for function in (encode, one))
        bench.add({"path": "tower", "shape": f"{backbone} {pixels}", "regions": X.shape[1],
                   "parameters": sum(parameter.numel() for parameter in clip.model.visual.parameters()),
                   "encode_s": encoding, "kept_kib": (2 * X[0].numel() + 4 * x0[0].numel()) / 1024,
                   "step_s": tuning, "step_mib": (peak_extra_mib(two) - peak_extra_mib(one)) / batch})


# --- tagging, and a GPU -----------------------------------------------------------------------------------------------
BARE = """
import sys, torch, embed
from PIL import Image
torch.set_num_threads(int(sys.argv[1]))
model, _, preprocess = embed.import_open_clip().create_model_and_transforms("ViT-B-32", pretrained=None)
device = "cuda" if torch.cuda.is_available() else "cpu"
class Photos(torch.utils.data.Dataset):
    def __init__(self, paths): self.paths = paths
    def __len__(self): return len(self.paths)
    def __getitem__(self, row): return preprocess(Image.open(self.paths[row]).convert("RGB"))
loader = torch.utils.data.DataLoader(Photos(sys.argv[3:]), 64, num_workers=int(sys.argv[2]))
model.eval().to(device)
with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
    for images in loader:
        model.encode_image(images.to(device)).cpu()
"""


def tagging(bench):
    """Whole commands on JPEGs of 500 x 375 pixels, ViT-B-32, random weights, batches of 64, as many threads and workers
    on both sides. A second of start-up is not a matter of photos: the rate is that of the photos beyond the first part,
    the rest is start-up. Bare: open_clip's model and transform in a DataLoader, nothing kept or written."""
    few, many, threads = (2, 4, 1) if bench.quick else (64, 256, torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        photos = [Path(folder) / f"{number}.jpg" for number in range(many)]
        for number, photo in enumerate(photos):
            scenes.picture("test", number)[0].resize((500, 375)).save(photo, quality=90)
        (Path(folder) / "words.txt").write_text("sun\nmoon\nboat\ncar\ncup")
        of_clip = ["--backbone", "ViT-B-32", "--pretrained", "none", "--quiet"]
        device = ["--precision", "bf16"] if torch.cuda.is_available() else ["--cpu"]
        command = [sys.executable, REPOSITORY / "adapter_rp.py", "--output", folder, *device]
        words = ["--labels", Path(folder) / "words.txt", "--text-count", "50", "--epochs", "1", "--cache="]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
        call = functools.partial(subprocess.run, env=environment, check=True, capture_output=True)
        call([*command, *of_clip, *words])
        command += ["--checkpoint", Path(folder) / "checkpoint.safetensors", "--cache=", "--quiet", "--predict"]
        workers = min(16, os.cpu_count())
        bare = [sys.executable, "-c", BARE, str(threads), str(workers)]
        starts = [[*start, *photos[:count]] for start in (bare, command) for count in (few, many)]
        rounds = [[timed(functools.partial(call, one)) for one in starts] for _ in range(1 if bench.quick else 3)]
    few_bare, many_bare, few_ours, many_ours = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    rates = [(many - few) / (of_many - of_few) for of_few, of_many in ((few_bare, many_bare), (few_ours, many_ours))]
    bench.add({"path": "tagging", "shape": f"{threads} threads, {workers} workers", "bare_photos_s": rates[0],
               "photos_s": rates[1], "times_bare": rates[1] / rates[0], "bare_start_s": few_bare - few / rates[0],
               "start_s": few_ours - few / rates[1]})


def gpu(bench, device="cuda"):
    """Steps of SSPA in bf16, 80 labels, forward and gradients no optimiser, and its prompts; A and B as above"""
    backbone, batch = ("ViT-B-32", 2) if bench.quick else ("ViT-B-16", 64)
    clip = embed.load_clip(backbone, "none", device, "bf16")
    names = data.label_names("coco2014")[:2 if bench.quick else 80]
    images, targets = torch.randn(batch, 3, 224, 224).to(device), (torch.rand(batch, len(names)) < 0.04).to(device)

    def step(model, encoded=None):
        model.zero_grad()
        with embed.autocast(device, "bf16"):
            loss = model(*(encoded or sspa.image_features(clip.model.visual, images)), targets)
        loss.backward()
        return loss.item()  # waits for the GPU
    for tune in ("none", "full"):
        labels = sspa.labels_of(sspa.Config(cache=None), clip, names, dict(zip(names, names, strict=True)))
        with torch.no_grad(), embed.autocast(device, "bf16"):
            encoded = sspa.image_features(clip.model.visual, images) if tune == "none" else None
        models = [sspa.SSPA(sspa.Config(tune_image=tune, impl=impl), clip.model, labels, 0).to(device)
                  for impl in ("reference", "fused")]
        steps = [functools.partial(step, model, encoded) for model in models]
        bench.compare("step", f"{backbone}, tower {'frozen' if encoded else 'tuned'}, batch {batch}", *steps)

    def prompts(model):
        with embed.autocast(device, "bf16"):
            total = model.prompts()[0].sum()
        return torch.autograd.grad(total, model.contexts)[0].sum().item()
    steps = [functools.partial(prompts, model) for model in models]
    bench.compare("prompt encoding", f"{backbone}, C={len(names)}", *steps)


TABLES = {"rp": (adapter_step, asymmetric_loss, library_epochs, seed_sweep, prompt_tuning), "cost": (prompt_tuning,),
          "sspa": (prompt_encoding, quaternion_layer, gated_alignment, soft_aggregator, head), "towers": (towers,),
          "metrics": (average_precision,), "tag": (tagging,), "gpu": (tagging, gpu)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=TABLES)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="a small shape of each, once: shows that it runs, no more")
    args = parser.parse_args()
    if args.method == "gpu" and not torch.cuda.is_available():
        parser.exit(2, "benchmark.py: PyTorch finds no GPU on this machine\n")
    warnings.filterwarnings("ignore", "Stochastic Optimizer")  # scikit-learn's, of ten epochs
    torch.set_flush_denormal(True)  # as the methods do; without it steps at C >= 1,000 take ten times as long, A and B
    args.output.mkdir(parents=True, exist_ok=True)
    began, bench = time.time(), Bench(args.quick, compiled=args.method == "sspa")
    print(f"{bench.peak / 1e9:.0f} G multiply-adds a second in a matrix product, {torch.get_num_threads()} threads")
    for table in TABLES[args.method]:
        print(f"\n{inspect.getdoc(table)}")
        table(bench)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "python": platform.python_version(), "commit": run.commit(),
               "matmul_multiplications_per_second": bench.peak, "minutes": (time.time() - began) / 60,
               "quick": args.quick}
    data.write_json(args.output / "benchmark.json", {"machine": machine, "rows": bench.rows})
    print(f"\n{args.output / 'benchmark.json'}: {len(bench.rows)} rows, {machine['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
