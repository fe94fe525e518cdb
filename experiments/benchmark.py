"""Side-by-side timings of the plain formula, the fused path and other people's code, interleaved in one run.

    python experiments/benchmark.py all --output D       20 minutes on two cores: all but prompt tuning and the GPU
    python experiments/benchmark.py docs --output D      what `all` wrote -> the tables' places in docs/speed.md
    python experiments/benchmark.py rp --output D        a part of it, and prompt tuning; others: sspa, tag
    python experiments/benchmark.py cost --output D      prompt tuning beside the adapter, for docs/results.md
    python experiments/benchmark.py gpu --output D       tagging and SSPA's training step on a GPU; refuses without one

Prints a line a row and writes D/benchmark.json. A row: milliseconds of each side (median over rounds), how many times
those of the fused path the others take, peak extra memory (parameters and optimiser state are not counted),
multiplications of the matrix products, counted from their shapes by PyTorch. CLIP's weights are random: times do not
depend on them.
"""
import argparse
import functools
import inspect
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler quiet; read when torch is imported
import numpy as np
import tables
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import adapter_rp as rp
import data
import embed
import metrics
import run
import scenes
import sspa
from data import UsageError

PAGE = REPOSITORY / "docs/speed.md"
WIDTH = 512    # ViT-B's joint space
BATCH = 512    # RP's batch
TEXTS = 4096   # training texts


# --- measuring --------------------------------------------------------------------------------------------------------
for packet in ("addmm", "baddbmm"):  # in place they are products too, which the counter does not know
    flop_registry[getattr(torch.ops.aten, f"{packet}_")] = flop_registry[getattr(torch.ops.aten, packet)]


def timed(function):
    """Seconds of a call"""
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def interleave(functions, quick, seconds=3):
    """A B A B ...: milliseconds of each, median over the rounds that begin within so many seconds, after one that warms
    up. quick: one round"""
    rounds = [list(map(timed, functions))]
    began = time.perf_counter()
    while not quick and time.perf_counter() - began < seconds:
        rounds.append(list(map(timed, functions)))
    return 1000 * np.median(rounds[1:] or rounds, 0)


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
    return (scale * torch.randn(shape)).requires_grad_(learn)


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

    def gradients(self, path, shape, inputs, needed, **sides):
        """Measures one row: output and the needed gradients of each function"""
        self.compare(path, shape, **{side: gradient_step(side_of, inputs, needed) for side, side_of in sides.items()})

    def compare(self, path, shape, costs=True, **sides):
        """Measures one row. sides: reference, the plain formula; fused, ours; others' code; each () -> anything. Its
        ratio is the first side's. costs: its memory and multiplications, too; PyTorch counts its own alone"""
        row = {"path": path, "shape": shape}
        times = interleave(sides.values(), self.quick)
        for side, ms in zip(sides, times, strict=True):
            row[f"{side}_ms"] = ms
        row["ratio"] = times[0] / row["fused_ms"]
        for side in sides:
            if side != "fused":
                row[f"{side} / fused"] = row[f"{side}_ms"] / row["fused_ms"]
        products = {}
        if costs:
            for side, function in sides.items():
                row[f"{side}_mib"], products[f"multiplications_{side}"] = cost(function)
        self.add(row | products)

    def add(self, row):
        path, shape, *numbers = row.values()
        print(f"{path:<24}{shape:<30}" + "".join(f"{number:>12.4g}" for number in numbers), flush=True)
        self.rows.append(row)


# --- RP ---------------------------------------------------------------------------------------------------------------
def texts_and_labels(classes):
    """Random text embeddings [TEXTS, WIDTH] and up to three labels for each, int8 [TEXTS, classes]"""
    labels = torch.zeros(TEXTS, classes, dtype=torch.int8)
    labels.scatter_(1, torch.randint(classes, (TEXTS, 3)), 1)
    return features(TEXTS, WIDTH, learn=False, scale=5), labels


def adapter_script(embeddings, labels, impl):
    """reference: the script one would write (DataLoader, plain formulas, unfused AdamW); fused: the step of
    adapter_rp.train -> a step"""
    config = rp.Config(impl=impl)
    adapter = rp.Adapter(WIDTH, labels.shape[1], 0)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-3, weight_decay=1e-4, fused=impl == "fused")
    mean_norm = embeddings.norm(dim=-1).mean().item()
    generator = torch.Generator()
    perturb = rp.perturb_fused
    order = itertools.cycle(torch.randperm(TEXTS).split(BATCH))
    batches = ((embeddings[rows], labels[rows]) for rows in order)
    if impl == "reference":
        perturb = rp.perturb_reference
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(embeddings, labels), BATCH, shuffle=True)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))  # one epoch after the other

    def step():
        texts, targets = next(batches)
        texts = perturb(texts, 0.15, "gaussian", mean_norm, generator)
        rp.text_loss(config, adapter, texts, targets, None).backward()
        optimiser.step()
        optimiser.zero_grad()
    return step


def adapter_step(bench):
    """A whole training step with 512 texts"""
    for classes in bench.some((20, 80, 1000, 10000)):
        texts = texts_and_labels(classes)
        bench.compare("adapter step", f"C={classes}", reference=adapter_script(*texts, "reference"),
                      fused=adapter_script(*texts, "fused"))


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
    """Loss and gradient, elementwise; others: AsymmetricLossOptimized's formula"""
    for classes in bench.some((20, 80, 1000, 10000)):
        logits = features(BATCH, classes, scale=3.0)
        targets = texts_and_labels(classes)[1][:BATCH]
        floats = targets.float()
        bench.gradients("asymmetric loss", f"B={BATCH} C={classes}", (logits, targets, 4.0), [logits],
                        reference=sspa.asymmetric_loss_reference, fused=sspa.asymmetric_loss_fused,
                        others=lambda z, _, gamma_neg, floats=floats: others_loss(z, floats, 0.0, gamma_neg))


def average_precision(bench):
    """metrics.average_precision beside scikit-learn's, a loop over labels, and torchmetrics' where it is installed"""
    from sklearn.metrics import average_precision_score
    for shape in bench.some(((4952, 20), (40504, 80), (107859, 81))):
        scores = torch.rand(shape)
        labels = torch.rand(shape) < 0.04
        others = {}
        if find_spec("torchmetrics"):
            embed.import_open_clip()  # torchmetrics imports torchvision
            from torchmetrics.functional.classification import multilabel_average_precision
            others["torchmetrics"] = functools.partial(multilabel_average_precision, scores, labels.long(), shape[1],
                                                       average="none")
        arrays = (scores.numpy(), labels.numpy())
        bench.compare("average precision", f"{shape[0]} x {shape[1]}", costs=False,
                      scikit_learn=functools.partial(average_precision_score, *arrays[::-1], average=None),
                      fused=functools.partial(metrics.average_precision, *arrays), **others)


def prompt_tuning(bench):
    """What an adapter spares. Reference: a step of prompt tuning in TaI-DPT's form (16 learnable context tokens, C x 77
    tokens through ViT-B-32's frozen text encoder, 20 labels at a time); fused: an adapter step. Same batch and loss."""
    for classes in (2,) if bench.quick else (20, 40, 80, 160, 320):
        texts, labels = texts_and_labels(classes)
        bench.compare("prompt tuning", f"C={classes}", reference=prompt_step(texts[:BATCH], labels[:BATCH]),
                      fused=adapter_script(texts, labels, "fused"))


def prompt_step(texts, labels):
    clip = random_clip()
    texts = 20 * F.normalize(texts, dim=-1)
    tokens = clip.tokenizer([f"{'X ' * 16}thing number {number}." for number in range(labels.shape[1])])
    context = features(1, 16, WIDTH, scale=0.02)
    optimiser = torch.optim.AdamW([context], lr=1e-3)

    def step():
        for chunk, targets in zip(tokens.split(20), labels.split(20, dim=1), strict=True):
            prompts = F.normalize(sspa.encode_prompts_reference(clip.model, context, chunk)[0], dim=-1)
            # the loss adds up over labels, so the gradient of a chunk needs no other chunk
            sspa.asymmetric_loss_fused(texts @ prompts.T, targets, 4.0).backward()
        optimiser.step()
        optimiser.zero_grad()
    return step


# --- SSPA -------------------------------------------------------------------------------------------------------------
@functools.cache
def random_clip():
    return embed.load_clip("ViT-B-32", "none")


def labels_of(clip, count):
    """COCO's names, again and again, with random features of what KAP reads -> sspa.Labels"""
    names = (data.label_names("coco2014") * 125)[:count]
    tokens = clip.tokenizer([f"X X X X {name}." for name in names])
    return sspa.Labels(names, names, tokens, torch.randn(count, clip.model.text_projection.shape[1]),
                       torch.randn(4, len(clip.model.ln_final.weight)) / 50)


def cut_prompts(model, contexts, tokens):
    """encode_prompts_reference without the positions after the longest prompt's end"""
    longest = int(tokens.argmax(-1).max()) + 1
    short = SimpleNamespace(token_embedding=model.token_embedding, transformer=model.transformer,
                            positional_embedding=model.positional_embedding[:longest], ln_final=model.ln_final,
                            attn_mask=model.attn_mask[:longest, :longest], text_projection=model.text_projection)
    return sspa.encode_prompts_reference(short, contexts, tokens[:, :longest])


def prompt_encoding(bench, clip=None):
    """Two prompt sets of COCO's names; cut: the plain formula without the padding"""
    clip = clip or random_clip()
    labels = labels_of(clip, 2 if bench.quick else 80)
    contexts = torch.stack([labels.words] * 2).to(clip.device).requires_grad_()
    bench.gradients("prompt encoding", f"C={len(labels.names)}, 2 sets",
                    (clip.model, contexts, labels.tokens.to(clip.device)), [contexts],
                    reference=sspa.encode_prompts_reference, cut=cut_prompts, fused=sspa.encode_prompts_fused)


def quaternion_layer(bench):
    """The first layer of QSM. One varies: only T_ca differs from image to image and from label to label, as in SSPA."""
    B, C = (8, 20) if bench.quick else (64, 80)
    weights = list(sspa.QuaternionLinear(WIDTH, WIDTH, "fused", torch.Generator()).parameters())
    T_ka = features(C, WIDTH, learn=False)
    x0 = features(B, 1, WIDTH, learn=False)
    vary = [features(B, C, WIDTH) for _ in range(3)]
    for which, components, learnt in (("one varies", (T_ka, vary[0], x0), vary[:1]), ("all vary", vary, vary)):
        bench.gradients("quaternion layer 1", f"B={B} C={C}, {which}", ((None, *components), *weights),
                        [*learnt, *weights], reference=sspa.quaternion_linear_reference,
                        fused=sspa.quaternion_linear_fused)


def gated_alignment(bench):
    """Both directions. Regions need no gradient here: the image tower is frozen."""
    v_to_s = sspa.GatedAttention(WIDTH, 10.0, True, "fused", torch.Generator())
    s_to_v = sspa.GatedAttention(WIDTH, 10.0, True, "fused", torch.Generator())

    def align(attend):
        def both(T, X):
            return attend(T, X, v_to_s)[0], attend(X, T, s_to_v)[0]
        return both
    for B, C, M in bench.some(((8, 20, 784), (8, 80, 784), (32, 20, 196), (32, 80, 196), (32, 80, 49), (4, 1000, 196))):
        T = features(B, C, WIDTH, scale=0.04)
        X = features(B, M, WIDTH, scale=0.04, learn=False)
        bench.gradients("gated alignment", f"B={B} C={C} M={M}", (T, X),
                        [T, *v_to_s.parameters(), *s_to_v.parameters()],
                        reference=align(sspa.gated_attention_reference), fused=align(sspa.gated_attention_fused))


def soft_aggregator(bench):
    """With all gradients; and in training: with the loss, loss and gradients in one pass."""
    scale = torch.tensor(20.0, requires_grad=True)
    bias = torch.tensor(-3.0, requires_grad=True)
    for B, C, M in bench.some(((32, 80, 196), (8, 80, 784), (32, 1000, 196), (8, 10000, 196))):
        shape = f"B={B} C={C} M={M}"
        T = features(B, C, WIDTH)
        X = features(B, M, WIDTH)
        inputs = (T, X, 0.07, scale)
        bench.gradients("soft aggregator", shape, inputs, [T, X, scale], reference=sspa.soft_aggregate_reference,
                        fused=sspa.soft_aggregate_fused)
        targets = torch.rand(B, C) < 0.03
        bench.gradients("soft aggregator + loss", shape, (*inputs, bias, targets), [T, X, scale, bias],
                        reference=sspa.soft_aggregate_loss_reference, fused=sspa.soft_aggregate_loss_fused)


def training_step(clip, count, features_of, impl, prompts=None, tune_image="none"):
    """A step of sspa.train with so many labels. features_of: () -> (x0 [B, d], X [B, M, d]); prompts: their features,
    if they are not to be computed -> () -> loss"""
    model = sspa.SSPA(sspa.Config(tune_image=tune_image, impl=impl, lr=5e-5), clip.model, labels_of(clip, count), 0)
    model = model.to(clip.device)
    optimiser = sspa.optimiser_of(model.config, model)
    learned = list(model.learned().values())
    averages = [parameter.detach().clone() for parameter in learned]
    x0, _ = features_of()
    targets = torch.rand(len(x0), count, device=clip.device) < 0.04

    def step():
        with embed.autocast(clip.device, clip.precision):
            loss = model(*features_of(), targets, prompts)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, learned, 0.01)
        return loss.detach()
    return step


def head(bench):
    """The whole training step, image tower frozen (M=196). Without: the features of prompts are given; the plain
    formula's prompts would need 37 GiB at 1,000 labels, ours nearly as much at 10,000."""
    clip = random_clip()
    for which, B, C in bench.some((("with prompts", 64, 20), ("with prompts", 64, 80), ("with prompts", 8, 1000),
                                   ("without", 64, 20), ("without", 64, 80), ("without", 8, 1000),
                                   ("without", 2, 10000))):
        if bench.quick:
            B, C = 4, 2
        given = (features(B, WIDTH, learn=False), features(B, 196, WIDTH, learn=False))
        prompts = None
        if which == "without":
            prompts = F.normalize(torch.randn(2, C, WIDTH), dim=-1)
        impls = ("reference", "fused")
        if which == "with prompts" and C == 1000:
            impls = ("fused",)
        steps = {impl: training_step(clip, C, lambda given=given: given, impl, prompts) for impl in impls}
        bench.compare("head", f"B={B} C={C}, {which}", **steps)


# --- tagging, and a GPU -----------------------------------------------------------------------------------------------
BARE = """
import sys, torch, embed
from PIL import Image
model, _, preprocess = embed.import_open_clip().create_model_and_transforms("ViT-B-32", pretrained=None)
device = "cuda" if torch.cuda.is_available() else "cpu"
class Photos(torch.utils.data.Dataset):
    def __init__(self, paths): self.paths = paths
    def __len__(self): return len(self.paths)
    def __getitem__(self, row): return preprocess(Image.open(self.paths[row]).convert("RGB"))
loader = torch.utils.data.DataLoader(Photos(sys.argv[2:]), 64, num_workers=int(sys.argv[1]))
model.eval().to(device)
with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
    for images in loader:
        model.encode_image(images.to(device)).cpu()
"""


def tagging(bench):
    """Whole commands on JPEGs of enlarged drawings, ViT-B-32, random weights, batches of 64, as many threads and
    workers on both sides. The rate is that of the photos beyond the first fifth, so that it holds no start-up. Bare:
    open_clip's model and transform in a DataLoader, nothing kept or written."""
    workers = str(min(16, os.cpu_count()))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(REPOSITORY)}
    call = functools.partial(subprocess.run, check=True, capture_output=True, env=environment)
    with tempfile.TemporaryDirectory() as folder:
        call([sys.executable, REPOSITORY / "adapter_rp.py", "--output", folder, "--backbone", "ViT-B-32",
              "--pretrained", "none", "--text-count", "50", "--test-count", "9", "--epochs", "1", "--cache="])
        bare = [sys.executable, "-c", BARE, workers]
        ours = [sys.executable, REPOSITORY / "tag.py", Path(folder) / "checkpoint.safetensors", "--stdout", "--quiet",
                "--cache="]
        for few, size in bench.some(((32, (640, 480)), (16, (4000, 3000)))):
            if bench.quick:
                few = 1
            elif torch.cuda.is_available():
                few *= 16
            photos = [Path(folder) / f"{few}-{number}.jpg" for number in range(5 * few)]
            scenes.picture("test", 0)[0].resize(size).save(photos[0], quality=90)
            for photo in photos[1:]:
                photo.hardlink_to(photos[0])
            calls = [functools.partial(call, [*words, *photos[:count]]) for words in (bare, ours)
                     for count in (few, 5 * few)]
            seconds = interleave(calls, bench.quick, 100) / 1000
            bare_rate, rate = 4 * few / (seconds[1::2] - seconds[::2])
            bench.add({"path": "tagging", "shape": f"{size[0]} x {size[1]} pixels, {workers} workers",
                       "bare, photos/s": bare_rate, "ours, photos/s": rate, "ours / bare": rate / bare_rate,
                       "bare, start, s": seconds[0] - few / bare_rate, "ours, start, s": seconds[2] - few / rate})


def synchronisations(step):
    """How often a step waits for the GPU, after the first; 0 without one"""
    step()
    if not torch.cuda.is_available():
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def gpu(bench, device="cuda"):
    """SSPA's training step in bf16 with its prompts, image tower frozen and tuned; how often the fused step waits for
    the GPU; prompts alone"""
    backbone, B, C, resolutions = "ViT-B-16", 64, 80, (224, 448)
    if bench.quick:
        backbone, B, C, resolutions = "scenes", 2, 2, (64,)
    for resolution in resolutions:
        clip = embed.load_clip(backbone, "none", device, "bf16", resolution)
        images = torch.randn(B, 3, resolution, resolution, device=device)
        encode = functools.partial(sspa.image_features, clip.model.visual, images)
        with torch.no_grad(), embed.autocast(device, "bf16"):
            given = encode()
        for tune_image, features_of in (("none", lambda given=given: given), ("full", encode)):
            shape = f"B={B} C={C} {resolution} px, --tune-image {tune_image}"
            plain = training_step(clip, C, features_of, "reference", None, tune_image)
            fused = training_step(clip, C, features_of, "fused", None, tune_image)
            bench.compare("step", shape, reference=plain, fused=fused)
            bench.add({"path": "host synchronisations", "shape": shape, "a step": synchronisations(fused)})
    with embed.autocast(device, "bf16"):
        prompt_encoding(bench, clip)


TABLES = {"rp": (adapter_step, asymmetric_loss, average_precision, prompt_tuning), "cost": (prompt_tuning,),
          "sspa": (prompt_encoding, quaternion_layer, gated_alignment, soft_aggregator, head),
          "tag": (tagging,), "gpu": (tagging, gpu)}
TABLES["all"] = (*TABLES["rp"][:3], *TABLES["sspa"], tagging)


# --- docs/speed.md ----------------------------------------------------------------------------------------------------
def check_commit(machine):
    if machine["quick"] or not re.fullmatch("[0-9a-f]+", machine["commit"]):
        raise UsageError(f"{PAGE.name} takes numbers of a commit without changes, timed without --quick, not of "
                         f"{machine['commit']}; commit the changes and run `all` again")


def tables_of(record):
    """benchmark.json -> {path with dashes: tables.Table}, and "machine": what it ran on"""
    machine = [[name, str(value)] for name, value in record["machine"].items()]
    made = {"machine": tables.Table("Measured on", [""], machine)}
    for path in {row["path"]: None for row in record["rows"]}:
        rows = [row for row in record["rows"] if row["path"] == path]
        columns = dict.fromkeys(key for row in rows for key in row if key not in ("path", "shape", "ratio"))
        cells = [[row["shape"], *(cell(row.get(column)) for column in columns)] for row in rows]
        titles = [column.replace("_", " ") for column in columns]
        made[path.replace(" ", "-")] = tables.Table(path.capitalize(), titles, cells)
    return made


def cell(value):
    """A number as tables shows it, multiplications in powers of ten; nothing for none"""
    if not value:
        return ""
    if value > 1e6:
        return f"{value:.1e}"
    return [value, None]


def write_docs(path):
    with data.reading(path, "benchmark", "make it with experiments/benchmark.py all"):
        record = json.loads(path.read_text("utf-8"))
        check_commit(record["machine"])
        text = tables.filled_in(data.read_text(PAGE, "page"), tables_of(record))
    data.write_atomically(PAGE, text)


def processor():
    """The processor's name, where Linux knows it, and its vector instructions"""
    names = [platform.processor() or platform.machine()]
    if sys.platform == "linux":
        names = re.findall("model name.*: (.*)", data.read_text("/proc/cpuinfo", "processor")) or names
    return f"{names[0]}, {torch.backends.cpu.get_cpu_capability()}"


def main(words):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=[*TABLES, "docs"])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="a small shape of each, once: shows that it runs, no more")
    args = parser.parse_args(words)
    path = args.output / "benchmark.json"
    if args.method == "docs":
        write_docs(path)
        return
    if args.method == "gpu" and not torch.cuda.is_available():
        raise UsageError("PyTorch finds no GPU on this machine")
    machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
               "torchmetrics installed": bool(find_spec("torchmetrics")), "python": platform.python_version(),
               "commit": run.commit(), "date": str(date.today()), "quick": args.quick}
    if args.method == "all" and not args.quick:
        check_commit(machine)
    began = time.time()
    bench = Bench(args.quick)
    for table in TABLES[args.method]:
        print(f"\n{inspect.getdoc(table)}")
        table(bench)
        machine["minutes"] = round((time.time() - began) / 60, 1)
        data.write_json(path, {"machine": machine, "rows": bench.rows})
    print(f"\n{path}: {len(bench.rows)} rows, {machine['minutes']} minutes")


if __name__ == "__main__":
    with run.exit_codes("benchmark.py") as arguments:
        main(arguments)
