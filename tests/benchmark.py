"""Side-by-side timings: the plain formula (A) and the fused path (B), interleaved in one run, on the CPU.

    python tests/benchmark.py rp --output D      under 10 minutes on two cores; prints tables, writes D/benchmark.json

Every row: milliseconds (median over rounds), their ratio, peak extra memory (from the allocator's own events, parameters and optimiser state
not counted), and multiplications counted from the shapes. A ratio above 1 means that the fused path is faster.
"""
import argparse
import gc
import math
import os
import platform
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
    cells = [f"{path:<18}{shape:<30}{result['reference_ms']:10.2f}{result['fused_ms']:10.2f}{result['ratio']:8.2f}"]
    cells += [f"{value:9.1f}" if value is not None else f"{'-':>9}" for value in mib] + [f"{value:11.2e}" for value in multiplications]
    print("".join(cells), end="", flush=True)
    return result


def head_line():
    print(f"{'path':<18}{'shape':<30}{'A ms':>10}{'B ms':>10}{'A / B':>8}{'A MiB':>9}{'B MiB':>9}{'A mult':>11}{'B mult':>11}")


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


def draw_prompt_tuning(rows, path):
    """Seconds a step against the number of labels, both axes logarithmic."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [r for r in rows if r["path"] == "prompt tuning"]
    classes = [int(r["shape"][2:]) for r in rows]
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=120)
    axes.loglog(classes, [r["reference_ms"] / 1e3 for r in rows], "o-", label="prompt tuning (C x 77 tokens through the text encoder)")
    axes.loglog(classes, [r["fused_ms"] / 1e3 for r in rows], "s-", label="adapter (this project's RP step)")
    axes.set(xlabel="labels", ylabel="seconds a training step", xticks=classes, xticklabels=classes)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    print(f"picture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=["rp"])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: shows that it runs, not what it measures")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # as adapter_rp.py does, for both sides: without it steps at C >= 1,000 take ten times as long on either
    began = time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    rows, peak = bench_rp(args.quick)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
               "matmul_multiplications_per_second": peak, "minutes": (time.time() - began) / 60, "quick": args.quick}
    data.write_json(args.output / "benchmark.json", {"machine": machine, "rows": rows})
    draw_prompt_tuning(rows, args.output / "prompt_tuning.png")
    print(f"{args.output / 'benchmark.json'}: {len(rows)} rows, {machine['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
