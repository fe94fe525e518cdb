"""Side-by-side timings: the plain formula (A) and the fused path (B), interleaved in one run, on the CPU.

    python tests/benchmark.py rp --output D      2 minutes on two cores; prints tables, writes D/benchmark.json
    python tests/benchmark.py cost --output D    a minute: only the last of these tables, prompt tuning against the adapter
    python tests/benchmark.py sspa --output D    under 10 minutes; likewise
    python tests/benchmark.py towers --output D  minutes: time and memory of CLIP's image towers in SSPA, frozen and tuned

Every row: milliseconds (median over rounds), their ratio, peak extra memory (from the allocator's own events, parameters and optimiser state
not counted), and multiplications counted from the shapes. A ratio above 1 means that the fused path is faster.
"""
import argparse
import gc
import json
import math
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from sklearn.metrics import average_precision_score  # noqa: E402
from torch import nn  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adapter_rp as rp  # noqa: E402
import data  # noqa: E402
import metrics  # noqa: E402
import sspa  # noqa: E402

WIDTH, HIDDEN, BATCH, TEXTS = 512, 1024, 512, 4096  # ViT-B's joint space, H = 2 D, the default batch


def interleave(reference, fused, rounds):
    """A B A B ...: seconds of each, median over rounds, after one warm-up each."""
    times = ([], [])
    for round_number in range(rounds + 1):
        for function, kept in zip((reference, fused), times):
            began = time.perf_counter()
            function()
            if round_number:
                kept.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def peak_extra_mib(function):
    """Highest sum of what the allocator handed out and had not got back during the call, MiB."""
    function()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2 ** 20


def matmul_peak():
    """Multiply-adds a second of the machine's own float32 matrix product, best of several."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = math.inf
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2048 ** 3 / best


def step_multiplications(classes, batch=BATCH, runs=1):
    """Forward, gradient of the weights, gradient of the hidden features; the embeddings need none."""
    return runs * batch * (2 * WIDTH * HIDDEN + 3 * HIDDEN * classes)


def texts_and_labels(classes):
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(TEXTS, classes, dtype=torch.int8)
    labels.scatter_(1, torch.randint(classes, (TEXTS, 3), generator=generator), 1)
    return 5 * torch.randn(TEXTS, WIDTH, generator=generator), labels


def plain_script(embeddings, labels, batch=BATCH, seed=0):
    """The readable script that the fused step is measured against: DataLoader, nn.Sequential, readable loss, plain AdamW."""
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(embeddings, labels), batch, shuffle=True, drop_last=True)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, labels.shape[1]))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    mean_norm, generator, batches = embeddings.norm(dim=-1).mean().item(), torch.Generator().manual_seed(0), iter(())

    def step():
        nonlocal batches
        pair = next(batches, None)
        if pair is None:
            batches = iter(loader)
            pair = next(batches)
        optimiser.zero_grad()
        loss = rp.asymmetric_loss_reference(model(rp.perturb_reference(pair[0], 0.15, "gaussian", mean_norm, generator)), pair[1])
        loss.backward()
        optimiser.step()
    return step


def fused_script(embeddings, labels, batch=BATCH, seeds=(0,)):
    """The step of adapter_rp.train, for one seed or several."""
    adapter = rp.Adapter(WIDTH, labels.shape[1], list(seeds))
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    mean_norm, generators = embeddings.norm(dim=-1).mean().item(), [torch.Generator().manual_seed(seed) for seed in seeds]
    orders, position = [torch.randperm(TEXTS, generator=generator) for generator in generators], 0

    def step():
        nonlocal position
        rows = [order[position:position + batch] for order in orders]
        position = (position + batch) % (TEXTS - TEXTS % batch)
        optimiser.zero_grad()
        x = torch.cat([rp.perturb_fused(embeddings[row][None], 0.15, "gaussian", mean_norm, g) for row, g in zip(rows, generators)])
        loss = rp.classifier_loss_fused(adapter.features(x), *adapter.classifier(None), labels[torch.stack(rows)])
        loss.backward()
        optimiser.step()
    return step


def row(path, shape, reference, fused, rounds, multiplications, memory=True, steps=8):
    """One line of the table. reference and fused are called `steps` times a measurement."""
    a, b = (lambda f=f: [f() for _ in range(steps)] for f in (reference, fused))
    seconds = [value / steps for value in interleave(a, b, rounds)]
    mib = [peak_extra_mib(function) for function in (reference, fused)] if memory else [None, None]
    result = {"path": path, "shape": shape, "reference_ms": 1e3 * seconds[0], "fused_ms": 1e3 * seconds[1], "ratio": seconds[0] / seconds[1], "reference_mib": mib[0], "fused_mib": mib[1],
              "multiplications_reference": multiplications[0], "multiplications_fused": multiplications[1]}
    cells = [f"{path:<24}{shape:<30}{result['reference_ms']:10.2f}{result['fused_ms']:10.2f}{result['ratio']:8.2f}"]
    cells += [f"{value:9.1f}" if value is not None else f"{'-':>9}" for value in mib] + [f"{value:11.2e}" for value in multiplications]
    print("".join(cells), end="", flush=True)
    return result


def head_line():
    print(f"{'path':<24}{'shape':<30}{'A ms':>10}{'B ms':>10}{'A / B':>8}{'A MiB':>9}{'B MiB':>9}{'A mult':>11}{'B mult':>11}")


def bench_rp(quick):
    peak, rows = matmul_peak(), []
    print(f"\nmatrix product peak: {peak / 1e9:.0f} G multiply-adds a second, {torch.get_num_threads()} threads. A: plain, B: fused.")
    print(f"adapter step: D {WIDTH}, H {HIDDEN}, batch {BATCH}; samples a second and share of that peak for A and B at the end of the line")
    head_line()
    for classes in (20, 80, 1000, 10000)[:2 if quick else 4]:
        embeddings, labels = texts_and_labels(classes)
        count = step_multiplications(classes)
        rows.append(row("adapter step", f"C={classes}", plain_script(embeddings, labels), fused_script(embeddings, labels), 2 if quick else {10000: 4}.get(classes, 9), (count, count), steps=8 if classes < 10000 else 4))
        for name in ("reference", "fused"):
            seconds = rows[-1][f"{name}_ms"] / 1e3
            rows[-1][f"samples_per_second_{name}"], rows[-1][f"share_of_peak_{name}"] = BATCH / seconds, count / seconds / peak
        print("".join(f"  {rows[-1][f'samples_per_second_{n}']:8,.0f}/s {rows[-1][f'share_of_peak_{n}']:4.0%}" for n in ("reference", "fused")))
    print("At C = 20 and 80 the step is dominated by work that both sides share (matrix products, noise, optimiser): little is left to gain.\n")

    head_line()
    for classes in (20, 80, 1000, 10000)[:2 if quick else 4]:
        logits = (3 * torch.randn(BATCH, classes) - 2).requires_grad_()
        targets = texts_and_labels(classes)[1][:BATCH]

        def run(function):
            logits.grad = None
            function(logits, targets).backward()
        rows.append(row("asymmetric loss", f"B={BATCH} C={classes}", lambda: run(rp.asymmetric_loss_reference), lambda: run(rp.asymmetric_loss_fused), 3 if quick else 9, (0, 0), steps=10 if classes < 10000 else 3))
        print()
    print("Elementwise work, no matrix product: 0 multiplications in them on both sides.\n")

    head_line()
    embeddings, labels = texts_and_labels(80)
    for batch in (64, 256, 512):
        singles = [fused_script(embeddings, labels, batch, (seed,)) for seed in range(8)]
        together = fused_script(embeddings, labels, batch, tuple(range(8)))
        count = step_multiplications(80, batch, 8)
        rows.append(row("seed sweep", f"8 seeds, batch {batch}, C=80", lambda: [single() for single in singles], together, 2 if quick else 7, (count, count), steps=4))
        print()
    print("A: eight fused steps one after the other; B: one batched step. The gain is fewer, larger operations.\n")
    return rows + bench_average_precision(quick) + bench_prompt_tuning(quick), peak


def bench_average_precision(quick):
    """metrics.average_precision against a loop over scikit-learn, COCO's size."""
    generator = np.random.default_rng(0)
    scores, labels = generator.random((40504, 8 if quick else 80), dtype=np.float32), generator.random((40504, 8 if quick else 80)) < 0.036
    loop = lambda: [average_precision_score(labels[:, c], scores[:, c]) for c in range(labels.shape[1])]
    head_line()
    result = row("average precision", f"N=40504 C={labels.shape[1]}", loop, lambda: metrics.average_precision(scores, labels.astype(np.int8)), 3, (0, 0), memory=False, steps=1)
    print("\nA: scikit-learn, class by class; B: metrics.average_precision.\n")
    return [result]


def bench_prompt_tuning(quick):
    """The paper's headline: an adapter step against a prompt-tuning step (TaI-DPT's form), same CLIP (ViT-B-32's text tower, random
    weights: the time does not depend on them), same batch of text embeddings, same loss."""
    clip, rows, context_length = data.load_clip("ViT-B-32", "none"), [], 16
    model, layers = clip.model, 12
    print(f"prompt tuning (A: {context_length} learnable context tokens, C x 77 tokens through the frozen text encoder, label chunks of 20) against the adapter (B), batch {BATCH}")
    head_line()
    for classes in (20, 40) if quick else (20, 40, 80, 160, 320):
        embeddings, labels = texts_and_labels(classes)
        tokens = clip.tokenizer([" ".join(["X"] * context_length) + f" thing number {n}." for n in range(classes)])
        context = (0.02 * torch.randn(context_length, WIDTH)).requires_grad_()
        optimiser = torch.optim.AdamW([context], lr=1e-3)

        def prompt_step():
            optimiser.zero_grad()
            texts = F.normalize(embeddings[:BATCH], dim=-1)
            for start in range(0, classes, 20):  # the loss adds up over labels, so a chunk's backward needs no other chunk
                chunk = tokens[start:start + 20]
                frozen = model.token_embedding(chunk)
                x = torch.cat([frozen[:, :1], context.expand(len(chunk), -1, -1), frozen[:, 1 + context_length:]], 1) + model.positional_embedding
                x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
                prompts = F.normalize(x[torch.arange(len(chunk)), chunk.argmax(-1)] @ model.text_projection, dim=-1)
                rp.asymmetric_loss_fused(20 * texts @ prompts.T, labels[:BATCH, start:start + 20]).backward()
            optimiser.step()
        # forward and input gradients through frozen weights: two products each
        prompt_count = 2 * classes * 77 * layers * (12 * 512 ** 2 + 2 * 77 * 512) + 2 * classes * 512 * WIDTH + 2 * BATCH * classes * WIDTH
        rows.append(row("prompt tuning", f"C={classes}", prompt_step, fused_script(embeddings, labels), 1 if classes > 80 else 2, (prompt_count, step_multiplications(classes)), memory=classes <= 40, steps=1))
        print()
    return rows


def bench_cost(quick):
    """Prompt tuning against the adapter alone: what bash run_all.sh tabulates."""
    return bench_prompt_tuning(quick), matmul_peak()


def compiled_ms(function, rounds, steps):
    """torch.compile on the reference, where there is a C++ compiler: an upper anchor. -> milliseconds, or None"""
    if not any(map(shutil.which, ("g++", "clang++"))):
        return None
    torch._dynamo.reset()
    try:
        compiled = torch.compile(function)
        for _ in range(2):
            compiled()
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            for _ in range(steps):
                compiled()
            times.append((time.perf_counter() - began) / steps)
        return 1e3 * statistics.median(times)
    except Exception as error:  # a compiler that cannot is not a failure of the benchmark
        print(f"  (torch.compile: {type(error).__name__})", end="")
        return None


def gradient_step(function, inputs, above):
    """() -> outputs and the gradients of all inputs that need one, nothing accumulated."""
    needed = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]

    def step():
        outputs = function(*inputs)
        outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t is not None and t.requires_grad][:len(above)]
        return torch.autograd.grad(outputs, needed, above)
    return step


def features(*shape, learn=True, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).requires_grad_(learn)


def text_multiplications(tokens, pairs, d=512, layers=12):
    """Twelve d^2 products a token and layer, two d a pair of positions that attend; forward and input gradients."""
    return 2 * layers * (12 * d * d * tokens + 2 * d * pairs)


def bench_sspa(quick):
    peak, rows, d = matmul_peak(), [], 512
    print(f"\nmatrix product peak: {peak / 1e9:.0f} G multiply-adds a second, {torch.get_num_threads()} threads. A: plain, B: fused, forward and all gradients; at the end of a line: torch.compile on A, ms")
    head_line()

    def add(path, shape, reference, fused, rounds, multiplications, steps=1):
        rows.append(row(path, shape, reference, fused, 1 if quick else rounds, multiplications, steps=steps))
        rows[-1]["compiled_ms"] = compiled_ms(reference, 1 if quick else 3, steps) if not quick else None
        print(f"{rows[-1]['compiled_ms']:10.2f}" if rows[-1]["compiled_ms"] else f"{'-':>10}", flush=True)

    # prompt encoding: ViT-B-32's text tower, random weights (the time does not depend on them), COCO's names, the two prompt sets of the method
    clip = data.load_clip("ViT-B-32", "none")
    names = list(json.loads((data.ASSETS / "descriptions/coco2014.json").read_text())["descriptions"])[:20 if quick else 80]
    tokens = clip.tokenizer([f"X X X X {name}." for name in names])
    contexts, above, C = features(2, 4, d, scale=0.02), [torch.randn(2, len(names), d)], len(names)
    longest = int(tokens.argmax(-1).max()) + 1
    own = longest - 5
    counts = text_multiplications(2 * C * 77, 2 * C * 77 * 77), text_multiplications(2 * (5 + C * own), 2 * (25 + C * own * longest))

    def cut(model, contexts, tokens):
        """The reference on prompts cut to the longest, and nothing else."""
        short, mask, positions = tokens[:, :longest], model.attn_mask, model.positional_embedding
        model.attn_mask, model.positional_embedding = mask[:longest, :longest], torch.nn.Parameter(positions[:longest], requires_grad=False)
        try:
            return sspa.encode_prompts_reference(model, contexts, short)
        finally:
            model.attn_mask, model.positional_embedding = mask, positions
    steps = [gradient_step(function, (clip.model, contexts, tokens), above) for function in (sspa.encode_prompts_reference, sspa.encode_prompts_fused, cut)]
    add("prompt encoding", f"C={C}, 2 sets, 77 -> {longest}", steps[0], steps[1], 3, counts)
    plain, only_cut = interleave(steps[1], steps[2], 1 if quick else 3)
    rows[-1]["cut_ms"] = 1e3 * only_cut
    print(f"  tokens: {2 * C * 77:,} plain, {2 * C * longest:,} cut to the longest ({rows[-1]['reference_ms'] / rows[-1]['cut_ms']:.1f} times faster than plain: {1e3 * only_cut:.0f} ms), "
          f"{2 * (5 + C * own):,} with start and context shared ({2 * C * 77 / (2 * (5 + C * own)):.1f} times fewer), the last layer finished at {2 * C} of them\n")
    del clip, steps

    # quaternion layer 1: T_ka a label, T_ca both, x0 an image, zero real part
    B, C = (8, 20) if quick else (64, 80)
    weights = [features(d, d, scale=0.03) for _ in range(4)] + [torch.zeros(4 * d, requires_grad=True)]
    parts = features(C, d, learn=False), features(B, C, d), features(B, 1, d, learn=False)
    for shape, inputs, counted in ((f"B={B} C={C} d={d}, one varies", parts, (B * C * 3, (B * C * 3 + C * 2 + B * 2) / 4)),
                                   (f"B={B} C={C} d={d}, all vary", tuple(features(B, C, d) for _ in parts), (B * C * 3, B * C * 3 * 3 / 4))):
        run = [gradient_step(lambda a, b, c, *w, f=f: f((None, a, b, c), *w), (*inputs, *weights), [torch.randn(B, C, 4 * d)]) for f in (sspa.quaternion_linear_reference, sspa.quaternion_linear_fused)]
        add("quaternion layer 1", shape, *run, 7, tuple(16 * d * d * n for n in counted))
    print("  multiplications of A: 16 d^2 for every image and label, three times (forward, two gradients); of B: 4 d^2 for each component where it varies\n")

    # gated alignment
    def weights_of(seed):
        return [features(d, d + 0, scale=d ** -0.5) for _ in range(3)] + [torch.tensor(10.0, requires_grad=True)] + [features(d, d, scale=d ** -0.5) for _ in range(2)] + [torch.zeros(d, requires_grad=True)]

    def alignment_counts(B, C, M):
        plain = fused = 0
        for n, m in ((C, M), (M, C)):
            plain += (n + m) * d * d + m * d * d + 2 * n * d * d + 2 * n * m * d
            value = n * d * d if n <= m else m * d * d
            gate = n * d * d if n <= m or n * d <= m * (d + n) else m * d * d + n * m * d
            fused += 2 * min(n, m) * d * d + value + gate + n * d * d + 2 * n * m * d
        return 3 * B * plain, 3 * B * fused
    for B, C, M in ((8, 20, 784),) if quick else ((8, 20, 784), (8, 80, 784), (32, 20, 196), (32, 80, 196), (32, 20, 49), (32, 80, 49), (4, 1000, 196)):
        inputs = F.normalize(features(B, C, d, learn=False), dim=-1).requires_grad_(), F.normalize(features(B, M, d, learn=False), dim=-1), *weights_of(0), *weights_of(1)
        run = [gradient_step(lambda T, X, *w, f=f: f(T, X, sspa.GatedAttention(*w[:7]), sspa.GatedAttention(*w[7:]))[:2], inputs, [torch.randn(B, C, d), torch.randn(B, M, d)])
               for f in (sspa.gated_alignment_reference, sspa.gated_alignment_fused)]
        add("gated alignment", f"B={B} C={C} M={M} d={d}", *run, 7, alignment_counts(B, C, M))
    print("  regions need no gradient here (frozen tower)\n")

    # soft aggregator, alone and with its loss
    for B, C, M in ((8, 80, 49),) if quick else ((32, 80, 196), (8, 80, 784), (32, 1000, 196), (8, 10000, 196)):
        T, X, scalars = features(B, C, d), features(B, M, d), (0.07, torch.tensor(20.0, requires_grad=True))
        targets = (torch.rand(B, C, generator=torch.Generator().manual_seed(0)) < 0.03).to(torch.int8)
        count = 3 * B * C * M * d
        run = [gradient_step(f, (T, X, *scalars), [torch.randn(B, C)]) for f in (sspa.soft_aggregate_reference, sspa.soft_aggregate_fused)]
        add("soft aggregator", f"B={B} C={C} M={M} d={d}", *run, 5, (count, count * 4 / 3))
        run = [gradient_step(lambda *t, f=f: f(*t, targets), (T, X, *scalars, torch.tensor(-3.0, requires_grad=True)), [torch.tensor(1.0)]) for f in (sspa.soft_aggregate_loss_reference, sspa.soft_aggregate_loss_fused)]
        add("soft aggregator + loss", f"B={B} C={C} M={M} d={d}", *run, 5, (count, count))
    print("  B makes S again for the gradient (a third more multiplications, nothing of size C x M kept); with the loss everything is one pass\n")

    # the head: all but the image tower
    B, C, M = (4, 20, 49) if quick else (32, 80, 196)
    clip = data.load_clip("ViT-B-32", "none")
    tokens, knowledge = clip.tokenizer([f"X X X X {name}." for name in names[:C]]), torch.randn(C, d)
    models = [sspa.SSPA(sspa.parse(["--cpu", "--tune-image", "none", "--impl", impl]), clip.model, tokens, knowledge, None, 0) for impl in ("reference", "fused")]
    inputs, targets = (torch.randn(B, d), torch.randn(B, M, d)), (torch.rand(B, C) < 0.04).to(torch.int8)
    alignment = alignment_counts(B, C, M)
    quaternion = [3 * 16 * d * d * B * C, 3 * 4 * d * d * (B * C) + 2 * 4 * d * d * (B + C)]
    shared = 3 * (4 * d * d * B * C + 2 * B * C * M * d + B * C * M * d)  # quaternion layer 2, DSF, aggregator
    head_counts = [shared + alignment[n] + quaternion[n] for n in range(2)]
    with torch.no_grad():
        prompts = [model.prompts() for model in models]
    for shape, given in ((f"B={B} C={C} M={M}, with prompts", (None, None)), (f"B={B} C={C} M={M}, without", prompts)):
        def step(model, prompts):
            model.zero_grad()
            model(inputs, targets, prompts=prompts).backward()
        add("head", shape, lambda: step(models[0], given[0]), lambda: step(models[1], given[1]), 3, tuple(h + (c if given[0] is None else 0) for h, c in zip(head_counts, counts)))
    print("  head: prompts, DSF, QSM, GDMA, aggregator, both losses; without: the prompts' text features given")
    return rows, peak


def kept_mib(function, model):
    """What autograd keeps for the backward pass, parameters and buffers aside."""
    own, kept = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()), t)[1], lambda t: t):
        loss = function()
    del loss
    return sum(size for pointer, size in kept.items() if pointer not in own) / 2 ** 20


def bench_towers(quick):
    """Seconds and peak memory of the image towers on this machine, random weights: encoding photos, and a training step of the whole model."""
    rows = []
    print(f"{'backbone':<12}{'pixels':>7}{'regions':>9}{'parameters':>12}{'encode s/photo':>16}{'tuned step s/photo':>20}{'tuned step MiB/photo':>22}{'features KiB/photo':>20}")
    for backbone, resolution in (("ViT-B-32", 224),) if quick else (("ViT-B-32", 224), ("ViT-B-32", 448), ("ViT-B-16", 224), ("ViT-B-16", 448), ("RN50", 224), ("RN50", 448), ("RN101", 448)):
        clip = data.load_clip(backbone, "none", resolution=resolution)
        d, batch = clip.model.text_projection.shape[1], 2
        tokens = clip.tokenizer([f"X X X X thing {n}." for n in range(20)])
        model = sspa.SSPA(sspa.parse(["--cpu"]), clip.model, tokens, torch.randn(20, d), None, 0).eval()
        images, targets = torch.randn(batch, 3, resolution, resolution), (torch.rand(batch, 20) < 0.1).to(torch.int8)
        with torch.no_grad():
            encode = lambda: sspa.image_features(clip.model.visual, images)
            regions = encode()[1].shape[1]
            encoding = min(interleave(encode, encode, 2)) / batch
        clip.model.visual.requires_grad_(True)

        def step():
            model.zero_grad(set_to_none=True)
            model(images, targets).backward()
        seconds = min(interleave(step, step, 2)) / batch
        mib = (kept_mib(lambda: model(images.repeat(2, 1, 1, 1), targets.repeat(2, 1)), model) - kept_mib(lambda: model(images, targets), model)) / batch
        rows.append({"path": "tower", "shape": f"{backbone} {resolution}", "regions": regions, "parameters": sum(p.numel() for p in clip.model.visual.parameters()), "encode_seconds_per_photo": encoding,
                     "tuned_step_seconds_per_photo": seconds, "tuned_step_mib_per_photo": mib, "feature_kib_per_photo": (2 * regions * d + 4 * d) / 1024})
        print(f"{backbone:<12}{resolution:>7}{regions:>9}{rows[-1]['parameters'] / 1e6:>11.1f}M{encoding:>16.3f}{seconds:>20.3f}{mib:>22.0f}{rows[-1]['feature_kib_per_photo']:>20.0f}", flush=True)
    print("Frozen: encode once. Tuned: a step's time, and what it keeps a photo for the gradient, beside 20 bytes a parameter (weight, gradient, AdamW's two moments, average).")
    return rows, matmul_peak()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=["rp", "sspa", "towers", "cost"])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: shows that it runs, not what it measures")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # as adapter_rp.py does, for both sides: without it steps at C >= 1,000 take ten times as long on either
    began = time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    rows, peak = {"rp": bench_rp, "sspa": bench_sspa, "towers": bench_towers, "cost": bench_cost}[args.method](args.quick)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
               "matmul_multiplications_per_second": peak, "minutes": (time.time() - began) / 60, "quick": args.quick}
    data.write_json(args.output / "benchmark.json", {"machine": machine, "rows": rows})
    print(f"{args.output / 'benchmark.json'}: {len(rows)} rows, {machine['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
