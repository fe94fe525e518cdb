"""Side-by-side timings of the plain formula (A) and the fused path (B), interleaved in one run, on the CPU.

    python experiments/benchmark.py rp --output D        3 minutes on two cores
    python experiments/benchmark.py cost --output D      2 minutes: the last table of rp, prompt tuning and the adapter
    python experiments/benchmark.py sspa --output D      under 10 minutes
    python experiments/benchmark.py tag --output D       6 minutes: photos a second beside bare open_clip
    python experiments/benchmark.py gpu --output D       the same, and training steps, on a GPU; refuses without one

Prints a table a path and writes D/benchmark.json. A row: milliseconds (median over rounds), their ratio (above 1: the
fused path is faster), peak extra memory (parameters and optimiser state not counted), multiplications of the matrix
products, counted from their shapes by PyTorch. CLIP's weights are random: times do not depend on them.
"""
import argparse
import functools
import inspect
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler quiet; read when torch is imported
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import adapter_rp as rp
import data
import embed
import run
import scenes
import sspa

WIDTH = 512    # ViT-B's joint space
HIDDEN = 1024  # RP's hidden width
BATCH = 512    # RP's batch
TEXTS = 4096   # training texts


# --- measuring --------------------------------------------------------------------------------------------------------
for packet in ("addmm", "baddbmm"):  # in place they are products too, which the counter does not know
    flop_registry[getattr(torch.ops.aten, f"{packet}_")] = flop_registry[getattr(torch.ops.aten, packet)]


def timed(function, calls=1):
    """Seconds a call"""
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def interleave(functions, quick):
    """A B A B ...: milliseconds of each, median over rounds; quick functions are called several times a round."""
    rounds = [[timed(function) for function in functions]]
    if not quick and sum(rounds[0]) < 10:  # seconds; slower ones are timed once
        calls = max(1, round(0.05 / min(rounds[0])))
        count = 9 if calls * sum(rounds[0]) < 1 else 2
        rounds = [[timed(function, calls) for function in functions] for _ in range(count)]
    return 1000 * np.median(rounds, 0)


def cost(function):
    """-> highest sum of what the allocator handed out and had not got back during a call, MiB; multiplications of the
    call's matrix products, by their shapes (attention in one operation is not counted)"""
    counter = FlopCounterMode(display=False)
    with counter, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                         profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = np.cumsum([event.nbytes() for event in events])
    return float(held.max(initial=0)) / 2 ** 20, counter.get_total_flops() / 2


def features(*shape, learn=True, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).requires_grad_(learn)


def gradient_step(function, inputs, needed):
    """-> () -> the gradients of the needed tensors; the one above is the output itself, a number like any other"""
    def step():
        output = function(*inputs)
        return torch.autograd.grad(output, needed, output)
    return step


class Bench:
    """Measures rows, prints them, keeps them for benchmark.json."""

    def __init__(self, quick):
        self.quick = quick
        self.rows = []

    def some(self, shapes):
        """All shapes; the first with --quick"""
        return shapes[:1] if self.quick else shapes

    def gradients(self, path, shape, reference, fused, inputs, needed):
        """Measures one row: output and the needed gradients of both functions"""
        self.compare(path, shape, gradient_step(reference, inputs, needed), gradient_step(fused, inputs, needed))

    def compare(self, path, shape, reference, fused):
        """Measures one row. reference, fused: () -> anything"""
        reference_mib, reference_products = cost(reference)  # which warms up, too
        fused_mib, fused_products = cost(fused)
        reference_ms, fused_ms = interleave([reference, fused], self.quick)
        self.add({"path": path, "shape": shape, "reference_ms": reference_ms, "fused_ms": fused_ms,
                  "ratio": reference_ms / fused_ms, "reference_mib": reference_mib, "fused_mib": fused_mib,
                  "multiplications_reference": reference_products, "multiplications_fused": fused_products})

    def add(self, row):
        path, shape, *numbers = row.values()
        print(f"{path:<24}{shape:<30}" + "".join(f"{number:>12.4g}" for number in numbers), flush=True)
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
    mean_norm = embeddings.norm(dim=-1).mean().item()
    generator = torch.Generator().manual_seed(0)

    def step():
        texts, targets = next(batches)
        optimiser.zero_grad()
        logits = model(rp.perturb_reference(texts, 0.15, "gaussian", mean_norm, generator))
        rp.asymmetric_loss_reference(logits, targets).backward()
        optimiser.step()
    return step


def fused_script(embeddings, labels):
    """The step of adapter_rp.train"""
    config = rp.Config()
    adapter = rp.Adapter(WIDTH, labels.shape[1], 0)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    mean_norm = embeddings.norm(dim=-1).mean().item()
    generator = torch.Generator().manual_seed(0)
    batches = itertools.cycle(torch.randperm(TEXTS, generator=generator).split(BATCH))

    def step():
        rows = next(batches)
        optimiser.zero_grad()
        x = rp.perturb_fused(embeddings[rows], 0.15, "gaussian", mean_norm, generator)
        rp.text_loss(config, adapter, x, labels[rows], None).backward()
        optimiser.step()
    return step


def adapter_step(bench):
    """A: a plain script (DataLoader, readable loss, unfused AdamW); B: the step of adapter_rp.train. Both do the same
    products; with few labels these, noise and optimiser are nearly all, so little is left to gain."""
    for classes in bench.some((20, 80, 1000, 10000)):
        texts = texts_and_labels(classes)
        bench.compare("adapter step", f"C={classes}", plain_script(*texts), fused_script(*texts))


def others_loss(logits, targets, gamma_pos=0.0, gamma_neg=4.0):
    """The asymmetric loss by the formula of its authors' optimized class, in place where autograd allows. targets:
    floats, as that class takes them."""
    absent = 1 - targets
    p = torch.sigmoid(logits)
    q = 1 - p
    loss = targets * p.clamp(min=1e-8).log()
    loss += absent * q.clamp(min=1e-8).log()
    loss *= (1 - p * targets - q * absent) ** (gamma_pos * targets + gamma_neg * absent)
    return -loss.sum() / len(logits)


def asymmetric_loss(bench):
    """Forward and gradient, elementwise: sspa's twin; then A is AsymmetricLossOptimized's formula. With 20 labels a
    call of PyTorch costs more than what it does."""
    for classes in bench.some((20, 80, 1000, 10000)):
        shape = f"B={BATCH} C={classes}"
        logits = features(BATCH, classes, scale=3.0)
        _, labels = texts_and_labels(classes)
        targets = labels[:BATCH]
        inputs = (logits, targets, 4.0)
        bench.gradients("asymmetric loss", shape, sspa.asymmetric_loss_reference, sspa.asymmetric_loss_fused, inputs,
                        [logits])
        theirs = gradient_step(others_loss, (logits, targets.float()), [logits])
        ours = gradient_step(sspa.asymmetric_loss_fused, inputs, [logits])
        bench.compare("asymmetric loss, others'", shape, theirs, ours)


def prompt_tuning(bench):
    """What an adapter spares. A: a step of prompt tuning in TaI-DPT's form (16 learnable context tokens, C x 77 tokens
    through ViT-B-32's frozen text encoder, 20 labels at a time); B: an adapter step. Same batch, same loss."""
    clip = random_clip()
    for classes in (2,) if bench.quick else (20, 40, 80, 160, 320):
        texts, labels = texts_and_labels(classes)
        places = " ".join(["X"] * 16)
        tokens = clip.tokenizer([f"{places} thing number {number}." for number in range(classes)])
        step = prompt_step(clip.model, tokens, texts[:BATCH], labels[:BATCH])
        bench.compare("prompt tuning", f"C={classes}", step, fused_script(texts, labels))


def prompt_step(model, tokens, texts, labels):
    texts = 20 * F.normalize(texts, dim=-1)
    context = features(1, 16, WIDTH, scale=0.02)
    optimiser = torch.optim.AdamW([context], lr=1e-3)

    def step():
        optimiser.zero_grad()
        for chunk, targets in zip(tokens.split(20), labels.split(20, dim=1), strict=True):
            prompts = F.normalize(sspa.encode_prompts_reference(model, context, chunk)[0], dim=-1)
            # the loss adds up over labels, so the gradient of a chunk needs no other chunk
            sspa.asymmetric_loss_fused(texts @ prompts.T, targets, 4.0).backward()
        optimiser.step()
    return step


# --- SSPA -------------------------------------------------------------------------------------------------------------
@functools.cache
def random_clip():
    return embed.load_clip("ViT-B-32", "none")


def coco_labels(clip, count):
    """The first of COCO's names as SSPA takes them -> sspa.Labels"""
    config = sspa.Config(cache=None, descriptions="none")
    return sspa.labels_of(config, clip, data.label_names("coco2014")[:count])


def prompt_encoding(bench):
    """Two prompt sets of forty of COCO's names. Start and context are computed once, each label's own positions."""
    classes = 2 if bench.quick else 40
    clip = random_clip()
    contexts = features(2, 4, WIDTH, scale=0.02)
    bench.gradients("prompt encoding", f"C={classes}, 2 sets", sspa.encode_prompts_reference, sspa.encode_prompts_fused,
                    (clip.model, contexts, coco_labels(clip, classes).tokens), [contexts])


def quaternion_layer(bench):
    """The first layer of QSM. One varies: only T_ca differs from image to image and from label to label, as in SSPA. B
    multiplies each component by the four weights at once, where it varies."""
    B, C = (8, 20) if bench.quick else (64, 80)
    weights = [features(WIDTH, WIDTH, scale=0.03) for _ in range(4)]
    weights.append(torch.zeros(4 * WIDTH, requires_grad=True))
    T_ka = features(C, WIDTH, learn=False)
    x0 = features(B, 1, WIDTH, learn=False)
    vary = [features(B, C, WIDTH) for _ in range(3)]
    for which, components, learnt in (("one varies", (T_ka, vary[0], x0), vary[:1]), ("all vary", vary, vary)):
        bench.gradients("quaternion layer 1", f"B={B} C={C}, {which}", sspa.quaternion_linear_reference,
                        sspa.quaternion_linear_fused, ((None, *components), *weights), [*learnt, *weights])


def gated_alignment(bench):
    """Both directions. Regions need no gradient here: the image tower is frozen. In B all products but the gate's own
    wait for the side with fewer rows."""
    draw = torch.Generator().manual_seed(0)
    v_to_s = sspa.GatedAttention(WIDTH, 10.0, True, "reference", draw)
    s_to_v = sspa.GatedAttention(WIDTH, 10.0, True, "reference", draw)

    def align(attend):
        def both(T, X):
            return attend(T, X, v_to_s)[0], attend(X, T, s_to_v)[0]
        return both
    for B, C, M in bench.some(((8, 20, 784), (8, 80, 784), (32, 20, 196), (32, 80, 196), (32, 80, 49), (4, 1000, 196))):
        T = features(B, C, WIDTH, scale=WIDTH ** -0.5)
        X = features(B, M, WIDTH, scale=WIDTH ** -0.5, learn=False)
        bench.gradients("gated alignment", f"B={B} C={C} M={M}", align(sspa.gated_attention_reference),
                        align(sspa.gated_attention_fused), (T, X), [T, *v_to_s.parameters(), *s_to_v.parameters()])


def soft_aggregator(bench):
    """With all gradients; and in training: with the loss, loss and gradients in one pass."""
    scale = torch.tensor(20.0, requires_grad=True)
    bias = torch.tensor(-3.0, requires_grad=True)
    for B, C, M in bench.some(((32, 80, 196), (8, 80, 784), (32, 1000, 196), (8, 10000, 196))):
        shape = f"B={B} C={C} M={M}"
        T = features(B, C, WIDTH)
        X = features(B, M, WIDTH)
        inputs = (T, X, 0.07, scale)
        bench.gradients("soft aggregator", shape, sspa.soft_aggregate_reference, sspa.soft_aggregate_fused, inputs,
                        [T, X, scale])
        targets = (torch.rand(B, C, generator=torch.Generator().manual_seed(0)) < 0.03).to(torch.int8)
        bench.gradients("soft aggregator + loss", shape, sspa.soft_aggregate_loss_reference,
                        sspa.soft_aggregate_loss_fused, (*inputs, bias, targets), [T, X, scale, bias])


def head_step(clip, B, C, M, impl, prompts=None):
    """All but the image tower: prompts, DSF, QSM, GDMA, aggregator, both losses -> a step"""
    config = sspa.Config(tune_image="none", impl=impl)
    model = sspa.SSPA(config, clip.model, coco_labels(clip, C), 0).to(clip.device)
    x0 = features(B, WIDTH, learn=False).to(clip.device)
    X = features(B, M, WIDTH, learn=False).to(clip.device)
    targets = torch.rand(B, C, device=clip.device) < 0.04

    def step():
        model.zero_grad()
        model(x0, X, targets, prompts).backward()
        return model.regional_bias.grad
    return step


def head(bench):
    """All but the image tower. Without prompts: their features are given."""
    clip = random_clip()
    given = F.normalize(torch.randn(2, 80, WIDTH), dim=-1)
    shapes = [("with prompts", 32, 40, 196, None), ("without", 32, 80, 196, given)]
    if bench.quick:
        shapes = [("with prompts", 4, 2, 49, None)]
    for which, B, C, M, prompts in shapes:
        bench.compare("head", f"B={B} C={C} M={M}, {which}", head_step(clip, B, C, M, "reference", prompts),
                      head_step(clip, B, C, M, "fused", prompts))


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
    on both sides. A second of start-up is not a matter of photos: the rate is that of the photos beyond the first part.
    Bare: open_clip's model and transform in a DataLoader, nothing kept or written."""
    few, many, rounds = (2, 4, 1) if bench.quick else (64, 256, 3)
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(REPOSITORY)}
    call = functools.partial(subprocess.run, env=environment, check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        photos = [Path(folder) / f"{number}.jpg" for number in range(many)]
        for number, photo in enumerate(photos):
            scenes.picture("test", number)[0].resize((500, 375)).save(photo, quality=90)
        call([sys.executable, REPOSITORY / "adapter_rp.py", "--output", folder, "--backbone", "ViT-B-32",
              "--pretrained", "none", "--text-count", "50", "--test-count", "9", "--epochs", "1", "--cache="])
        workers = str(min(16, os.cpu_count()))
        bare = [sys.executable, "-c", BARE, threads, workers]
        ours = [sys.executable, REPOSITORY / "tag.py", Path(folder) / "checkpoint.safetensors", "--stdout", "--quiet",
                "--cache="]
        def measured(command):
            """-> photos a second beyond the first, seconds of start-up"""
            seconds = [timed(functools.partial(call, [*command, *photos[:count]]), rounds) for count in (few, many)]
            rate = (many - few) / (seconds[1] - seconds[0])
            return rate, seconds[0] - few / rate
        bare_rate, bare_start = measured(bare)
        rate, start = measured(ours)
    bench.add({"path": "tagging", "shape": f"{threads} threads, {workers} workers", "bare_photos_s": bare_rate,
               "photos_s": rate, "times_bare": rate / bare_rate, "bare_start_s": bare_start, "start_s": start})


def gpu(bench, device="cuda"):
    """The head in bf16 on a GPU, batch 64, 80 labels, forward and gradients, with prompts"""
    clip = embed.load_clip("ViT-B-32", "none", device, "bf16")
    B, C = (2, 2) if bench.quick else (64, 80)

    def in_bf16(step):
        with embed.autocast(clip.device, "bf16"):
            return step().item()  # waits for the GPU
    steps = [functools.partial(in_bf16, head_step(clip, B, C, 49, impl)) for impl in ("reference", "fused")]
    bench.compare("step", f"B={B} C={C} M=49, {device}", *steps)


TABLES = {"rp": (adapter_step, asymmetric_loss, prompt_tuning), "cost": (prompt_tuning,),
          "sspa": (prompt_encoding, quaternion_layer, gated_alignment, soft_aggregator, head),
          "tag": (tagging,), "gpu": (tagging, gpu)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=TABLES)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="a small shape of each, once: shows that it runs, no more")
    args = parser.parse_args()
    if args.method == "gpu" and not torch.cuda.is_available():
        parser.exit(2, "benchmark.py: PyTorch finds no GPU on this machine\n")
    torch.set_flush_denormal(True)  # as the methods do; without it steps at C >= 1,000 take ten times as long, A and B
    began = time.time()
    square = torch.randn(2048, 2048)
    peak = 2048 ** 3 / min(timed(lambda: square @ square) for _ in range(9))
    print(f"{peak / 1e9:.0f} G multiply-adds a second in a matrix product, {torch.get_num_threads()} threads\n"
          "columns: path, shape; ms of A and B, A / B; MiB of A and B; multiplications of A and B")
    bench = Bench(args.quick)
    for table in TABLES[args.method]:
        print(f"\n{inspect.getdoc(table)}")
        table(bench)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "python": platform.python_version(), "commit": run.commit(),
               "matmul_multiplications_per_second": peak, "minutes": (time.time() - began) / 60, "quick": args.quick}
    data.write_json(args.output / "benchmark.json", {"machine": machine, "rows": bench.rows})
    print(f"\n{args.output / 'benchmark.json'}: {len(bench.rows)} rows, {machine['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
