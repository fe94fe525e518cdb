"""Side-by-side timings of the plain formula (A) and the fused path (B), interleaved in one run, on the CPU.

    python experiments/benchmark.py rp --output D        3 minutes on two cores
    python experiments/benchmark.py cost --output D      2 minutes: the last table of rp, prompt tuning and the adapter
    python experiments/benchmark.py sspa --output D      under 10 minutes
    python experiments/benchmark.py tag --output D       6 minutes: photos a second beside bare open_clip
    python experiments/benchmark.py gpu --output D       the same, and training steps, on a GPU; refuses without one

Prints a table a path and writes D/benchmark.json. A row: milliseconds (median over rounds), their ratio (above 1: the
fused path is faster), peak extra memory (parameters and optimiser state not counted), multiplications counted from the
shapes. CLIP's weights are random: times do not depend on them.
"""
import argparse
import functools
import inspect
import itertools
import os
import platform
import statistics
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
def timed(function, calls=1):
    """Seconds a call"""
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def interleave(functions, quick):
    """A B A B ...: milliseconds of each, median over rounds; quick functions are called several times a round."""
    rounds = [[timed(function) for function in functions]]
    if not quick:
        calls = max(1, round(0.05 / min(rounds[0])))
        count = 9 if calls * sum(rounds[0]) < 1 else 3
        rounds = [[timed(function, calls) for function in functions] for _ in range(count)]
    return [1000 * statistics.median(seconds) for seconds in zip(*rounds, strict=True)]


def peak_extra_mib(function):
    """Highest sum of what the allocator handed out and had not got back during a call, MiB"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = np.cumsum([event.nbytes() for event in events])
    return float(held.max(initial=0)) / 2 ** 20


def matmul_peak():
    """Multiply-adds a second of the machine's own float32 matrix product, best of several"""
    square = torch.randn(2048, 2048)
    return 2048 ** 3 / min(timed(functools.partial(torch.mm, square, square)) for _ in range(9))


def features(*shape, learn=True, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).requires_grad_(learn)


def gradient_step(function, inputs, above):
    """-> () -> the gradients of all inputs that need one, given those above"""
    needed = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor) and tensor.requires_grad]

    def step():
        return torch.autograd.grad(function(*inputs), needed, above)
    return step


class Bench:
    """Measures rows, prints them as a table a path, keeps them for benchmark.json."""

    def __init__(self, quick):
        self.quick = quick
        self.rows = []

    def some(self, shapes):
        """All shapes; the first with --quick"""
        return shapes[:1] if self.quick else shapes

    def compare(self, path, shape, reference, fused, multiplications=(0, 0)):
        """Measures one row. reference, fused: () -> anything; multiplications: of both."""
        mib = [peak_extra_mib(function) for function in (reference, fused)]  # which warms up, too
        reference_ms, fused_ms = interleave([reference, fused], self.quick)
        self.add({"path": path, "shape": shape, "reference_ms": reference_ms, "fused_ms": fused_ms,
                  "ratio": reference_ms / fused_ms, "reference_mib": mib[0], "fused_mib": mib[1],
                  "multiplications_reference": multiplications[0], "multiplications_fused": multiplications[1]})

    def add(self, row):
        path, shape, *numbers = row.values()
        if path not in [earlier["path"] for earlier in self.rows]:
            titles = [name.replace("multiplications", "x").replace("reference", "A").replace("fused", "B")
                      for name in row]
            print(" " * 54 + "".join(f"{title:>12}" for title in titles[2:]))
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


def step_multiplications(classes):
    """Forward, gradient of the weights, gradient of the hidden features; the embeddings need none."""
    return BATCH * (2 * WIDTH * HIDDEN + 3 * HIDDEN * classes)


def adapter_step(bench):
    """A: a plain script (DataLoader, readable loss, unfused AdamW); B: the step of adapter_rp.train. Both do the same
    products; with few labels these, noise and optimiser are nearly all, so little is left to gain."""
    for classes in bench.some((20, 80, 1000, 10000)):
        embeddings, labels = texts_and_labels(classes)
        count = step_multiplications(classes)
        bench.compare("adapter step", f"C={classes}", plain_script(embeddings, labels),
                      fused_script(embeddings, labels), (count, count))


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
    one = torch.tensor(1.0)
    for classes in bench.some((20, 80, 1000, 10000)):
        logits = features(BATCH, classes, scale=3.0)
        targets = texts_and_labels(classes)[1][:BATCH]
        fused = gradient_step(sspa.asymmetric_loss_fused, (logits, targets, 4.0), one)
        plain = gradient_step(sspa.asymmetric_loss_reference, (logits, targets, 4.0), one)
        bench.compare("asymmetric loss", f"B={BATCH} C={classes}", plain, fused)
        theirs = gradient_step(others_loss, (logits, targets.float()), one)
        bench.compare("asymmetric loss, others'", f"B={BATCH} C={classes}", theirs, fused)


def prompt_tuning(bench):
    """What an adapter spares. A: a step of prompt tuning in TaI-DPT's form (16 learnable context tokens, C x 77 tokens
    through ViT-B-32's frozen text encoder, 20 labels at a time); B: an adapter step. Same batch, same loss."""
    clip = random_clip()
    for classes in (2,) if bench.quick else (20, 40, 80, 160, 320):
        texts, labels = texts_and_labels(classes)
        places = " ".join(["X"] * 16)
        tokens = clip.tokenizer([f"{places} thing number {number}." for number in range(classes)])
        step = prompt_step(clip.model, tokens, F.normalize(texts[:BATCH], dim=-1), labels[:BATCH])
        count = 2 * classes * (WIDTH ** 2 + BATCH * WIDTH) + text_multiplications(classes * 77, classes * 77 ** 2)
        bench.compare("prompt tuning", f"C={classes}", step, fused_script(texts, labels),
                      (count, step_multiplications(classes)))


def prompt_step(model, tokens, texts, labels):
    context = features(1, 16, WIDTH, scale=0.02)
    optimiser = torch.optim.AdamW([context], lr=1e-3)

    def step():
        optimiser.zero_grad()
        for chunk, targets in zip(tokens.split(20), labels.split(20, dim=1), strict=True):
            prompts = F.normalize(sspa.encode_prompts_reference(model, context, chunk)[0], dim=-1)
            # the loss adds up over labels, so the gradient of a chunk needs no other chunk
            sspa.asymmetric_loss_fused(20 * texts @ prompts.T, targets, 4.0).backward()
        optimiser.step()
    return step


# --- SSPA -------------------------------------------------------------------------------------------------------------
@functools.cache
def random_clip():
    return embed.load_clip("ViT-B-32", "none")


def coco_labels(clip, count):
    """The first of COCO's names as SSPA takes them -> sspa.Labels"""
    names = data.label_names("coco2014")[:count]
    return sspa.labels_of(sspa.Config(cache=None), clip, names, dict(zip(names, names, strict=True)))


def text_multiplications(tokens, pairs):
    """ViT-B-32's text tower, twelve layers, forward and gradient of its input: twelve d^2 a token and layer, two d for
    each pair of positions that attend"""
    return 2 * 12 * (12 * WIDTH ** 2 * tokens + 2 * WIDTH * pairs)


def prompt_encoding(bench):
    """Two prompt sets of forty of COCO's names. Start and context are computed once, each label's own positions."""
    classes = 2 if bench.quick else 40
    tokens = coco_labels(random_clip(), classes).tokens
    longest = int(tokens.argmax(-1).max()) + 1
    own = classes * (longest - 5)
    counts = (2 * text_multiplications(classes * 77, classes * 77 ** 2),
              2 * text_multiplications(5 + own, 5 ** 2 + own * longest))
    inputs = (random_clip().model, features(2, 4, WIDTH, scale=0.02), tokens)
    above = torch.randn(2, classes, WIDTH)
    bench.compare("prompt encoding", f"C={classes}, 2 sets, 77 -> {longest}",
                  gradient_step(sspa.encode_prompts_reference, inputs, above),
                  gradient_step(sspa.encode_prompts_fused, inputs, above), counts)


def quaternion_layer(bench):
    """The first layer of QSM. Multiplications of A: 16 d^2 for every image and label, three times (forward, two
    gradients); of B: 4 d^2 for each component where it varies, the gradient of its input only where one is needed."""
    B, C = (8, 20) if bench.quick else (64, 80)
    weights = [features(WIDTH, WIDTH, scale=0.03) for _ in range(4)]
    weights.append(torch.zeros(4 * WIDTH, requires_grad=True))
    above = torch.randn(B, C, 4 * WIDTH)
    T_ka = features(C, WIDTH, learn=False)
    x0 = features(B, 1, WIDTH, learn=False)
    every = [features(B, C, WIDTH) for _ in range(3)]

    def layer(function):
        def with_components(i, j, k, *weights):
            return function((None, i, j, k), *weights)
        return with_components
    plain = layer(sspa.quaternion_linear_reference)
    fused = layer(sspa.quaternion_linear_fused)
    for which, components, rows in (("one varies", (T_ka, every[0], x0), 3 * B * C + 2 * C + 2 * B),
                                    ("all vary", every, 9 * B * C)):
        inputs = (*components, *weights)
        bench.compare("quaternion layer 1", f"B={B} C={C} d={WIDTH}, {which}", gradient_step(plain, inputs, above),
                      gradient_step(fused, inputs, above), (3 * 16 * WIDTH ** 2 * B * C, 4 * WIDTH ** 2 * rows))


def gated_alignment(bench):
    """Both directions. Regions need no gradient here: the image tower is frozen. Multiplications of A: in each
    direction three products for those who ask, two for those who are asked, two for their pairs; forward and two
    gradients. B: all but the gate's own wait for the side with fewer rows."""
    draw = torch.Generator().manual_seed(0)
    v_to_s = sspa.GatedAttention(WIDTH, 10.0, True, "reference", draw)
    s_to_v = sspa.GatedAttention(WIDTH, 10.0, True, "reference", draw)
    weights = [*v_to_s.parameters(), *s_to_v.parameters()]

    def align(attend):
        def both(T, X, *weights):
            return attend(T, X, v_to_s)[0], attend(X, T, s_to_v)[0]
        return both
    for B, C, M in bench.some(((8, 20, 784), (8, 80, 784), (32, 20, 196), (32, 80, 196), (32, 80, 49), (4, 1000, 196))):
        T = F.normalize(features(B, C, WIDTH, learn=False), dim=-1).requires_grad_()
        X = F.normalize(features(B, M, WIDTH, learn=False), dim=-1)
        few = min(C, M)
        counts = (3 * B * (5 * (C + M) * WIDTH ** 2 + 4 * C * M * WIDTH),
                  3 * B * ((8 * few + C + M) * WIDTH ** 2 + 5 * C * M * WIDTH))
        inputs = (T, X, *weights)
        above = (torch.randn_like(T), torch.randn_like(X))
        bench.compare("gated alignment", f"B={B} C={C} M={M} d={WIDTH}",
                      gradient_step(align(sspa.gated_attention_reference), inputs, above),
                      gradient_step(align(sspa.gated_attention_fused), inputs, above), counts)


def soft_aggregator(bench):
    """With all gradients; and in training: with the loss, loss and gradients in one pass."""
    for B, C, M in bench.some(((32, 80, 196), (8, 80, 784), (32, 1000, 196), (8, 10000, 196))):
        shape = f"B={B} C={C} M={M} d={WIDTH}"
        count = 3 * B * C * M * WIDTH
        inputs = features(B, C, WIDTH), features(B, M, WIDTH), 0.07, torch.tensor(20.0, requires_grad=True)
        above = torch.randn(B, C)
        bench.compare("soft aggregator", shape, gradient_step(sspa.soft_aggregate_reference, inputs, above),
                      gradient_step(sspa.soft_aggregate_fused, inputs, above), (count, count))
        targets = (torch.rand(B, C, generator=torch.Generator().manual_seed(0)) < 0.03).to(torch.int8)
        inputs = (*inputs, torch.tensor(-3.0, requires_grad=True), targets)
        above = torch.tensor(1.0)
        bench.compare("soft aggregator + loss", shape,
                      gradient_step(sspa.soft_aggregate_loss_reference, inputs, above),
                      gradient_step(sspa.soft_aggregate_loss_fused, inputs, above), (count, count))


def head_step(clip, labels, given, impl, prompts=None):
    """All but the image tower: prompts, DSF, QSM, GDMA, aggregator, both losses -> a step"""
    model = sspa.SSPA(sspa.Config(tune_image="none", impl=impl), clip.model, labels, 0).to(clip.device)

    def step():
        model.zero_grad()
        model(*given, prompts=prompts).backward()
        return model.contexts.grad
    return step


def head(bench):
    """All but the image tower. Without prompts: their features are given."""
    clip = random_clip()
    for classes, which in bench.some(((2 if bench.quick else 40, "with prompts"), (80, "without"))):
        B, M = (4, 49) if bench.quick else (32, 196)
        labels = coco_labels(clip, classes)
        given = (torch.randn(B, WIDTH), torch.randn(B, M, WIDTH), (torch.rand(B, classes) < 0.04).to(torch.int8))
        prompts = None
        if which == "without":
            prompts = F.normalize(torch.randn(2, classes, WIDTH), dim=-1)
        bench.compare("head", f"B={B} C={classes} M={M}, {which}", head_step(clip, labels, given, "reference", prompts),
                      head_step(clip, labels, given, "fused", prompts))


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
    few, many = (2, 4) if bench.quick else (64, 256)
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(REPOSITORY)}
    call = functools.partial(subprocess.run, env=environment, check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        photos = [Path(folder) / f"{number}.jpg" for number in range(many)]
        for number, photo in enumerate(photos):
            scenes.picture("test", number)[0].resize((500, 375)).save(photo, quality=90)
        words = Path(folder) / "words.txt"
        words.write_text("sun\nmoon\nboat\ncar\ncup")
        call([sys.executable, REPOSITORY / "adapter_rp.py", "--output", folder, "--labels", words, "--backbone",
              "ViT-B-32", "--pretrained", "none", "--text-count", "50", "--epochs", "1", "--cache="])
        workers = str(min(16, os.cpu_count()))
        bare = [sys.executable, "-c", BARE, threads, workers]
        ours = [sys.executable, REPOSITORY / "tag.py", Path(folder) / "checkpoint.safetensors", "--stdout", "--quiet",
                "--cache="]
        seconds = []
        for command, count in itertools.product((bare, ours), (few, many)):
            one = functools.partial(call, [*command, *photos[:count]])
            seconds.append(statistics.median(timed(one) for _ in range(1 if bench.quick else 3)))
    bare_rate = (many - few) / (seconds[1] - seconds[0])
    rate = (many - few) / (seconds[3] - seconds[2])
    bench.add({"path": "tagging", "shape": f"{threads} threads, {workers} workers", "bare_photos_s": bare_rate,
               "photos_s": rate, "times_bare": rate / bare_rate, "bare_start_s": seconds[0] - few / bare_rate,
               "start_s": seconds[2] - few / rate})


def gpu(bench, device="cuda"):
    """The head in bf16 on a GPU, batch 64, 80 labels, forward and gradients, with prompts"""
    clip = embed.load_clip("ViT-B-32", "none", device, "bf16")
    batch, classes = (2, 2) if bench.quick else (64, 80)
    labels = coco_labels(clip, classes)
    given = [torch.randn(batch, WIDTH), torch.randn(batch, 49, WIDTH), (torch.rand(batch, classes) < 0.04)]
    given = [tensor.to(device) for tensor in given]

    def in_bf16(step):
        with embed.autocast(torch.device(device), "bf16"):
            return step().sum().item()  # waits for the GPU
    steps = [functools.partial(in_bf16, head_step(clip, labels, given, impl)) for impl in ("reference", "fused")]
    bench.compare("step", f"B={batch} C={classes} M=49, {device}", *steps)


TABLES = {"rp": (adapter_step, asymmetric_loss, prompt_tuning), "cost": (prompt_tuning,),
          "sspa": (prompt_encoding, quaternion_layer, gated_alignment, soft_aggregator, head),
          "tag": (tagging,), "gpu": (tagging, gpu)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=TABLES)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="a small shape of each, once: shows that it runs, no more")
    args = parser.parse_args()
    if args.method == "gpu" and not torch.cuda.is_available():
        parser.exit(2, "benchmark.py: PyTorch finds no GPU on this machine\n")
    torch.set_flush_denormal(True)  # as the methods do; without it steps at C >= 1,000 take ten times as long, A and B
    began = time.time()
    peak = matmul_peak()
    bench = Bench(args.quick)
    print(f"{peak / 1e9:.0f} G multiply-adds a second in a matrix product, {torch.get_num_threads()} threads")
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
