"""Times and memory of plain formulas, fused paths and other people's code, side by side in one run.

    python experiments/benchmark.py all --output D       12 minutes on two cores: all but prompt tuning and the GPU
    python experiments/benchmark.py cost --output D      prompt tuning beside the adapter, for docs/results.md
    python experiments/benchmark.py gpu --output D       tagging, SSPA's training step, prompts; refuses without a GPU
    python experiments/benchmark.py docs --output D      puts what `all` or `gpu` wrote into the tables of docs/speed.md

Prints a line for each row and writes D/benchmark.json. A row has the milliseconds of each side (median over rounds),
the ratio of the others' times to ours, and the peak memory of a call (parameters and optimiser state are not counted).
CLIP's weights are random: times do not depend on them.
"""
import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler quiet; read when torch is imported
import numpy as np
import tables  # puts the repository on the path
import torch
import torch.nn.functional as F
from tables import REPOSITORY

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
LABELS = (20, 80, 1000, 10000)
IMPLS = {"plain": "reference", "fused": "fused"}  # name of a side: --impl


# --- measuring --------------------------------------------------------------------------------------------------------
def timed(function):
    """Seconds of a call"""
    began = perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - began


def interleave(functions, seconds):
    """Calls in the order A B A B ... -> milliseconds of each, median over the rounds that begin within so many seconds,
    after a first round that warms up; with 0 seconds those of the first"""
    rounds = [list(map(timed, functions))]
    began = perf_counter()
    while perf_counter() - began < seconds:
        rounds.append(list(map(timed, functions)))
    return 1000 * np.median(rounds[1:] or rounds, 0)


def peak_mib(function):
    """Peak of the memory that PyTorch allocates during a call and has not yet freed, MiB"""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = np.cumsum([event.nbytes() for event in events])
    return held.max(initial=0) / 2 ** 20


@dataclass
class Bench:
    """Measures rows, prints them, keeps them for benchmark.json."""

    device: str = "cpu"
    backbone: str = "ViT-B-32"
    seconds: float = 3
    rows: list = field(default_factory=list)

    def sizes(self, sizes, small):
        """The sizes to measure; in a test, which sets seconds to 0, only the small one"""
        if self.seconds:
            return sizes
        return [small]

    def compare(self, table, shape, sides, memory=True):
        """Measures a row. sides: {name: () -> anything}, ours last; memory: also its peak, if all of it is PyTorch's"""
        times = dict(zip(sides, interleave(sides.values(), self.seconds), strict=True))
        *others, ours = sides
        columns = {f"{side}, ms": ms for side, ms in times.items()}
        for side in others:
            columns[f"{side} / {ours}"] = times[side] / times[ours]
        if memory and self.device == "cpu":
            for side, function in sides.items():
                columns[f"{side}, MiB"] = peak_mib(function)
        self.add(table, shape, columns)

    def gradients(self, table, shape, inputs, needed, formulas):
        """Measures a row: each formula on the inputs, with the gradients of the needed tensors"""
        def step(formula):
            output = formula(*inputs)
            torch.autograd.grad(output, needed, output)  # any gradient of the output will do: here the output itself
        self.compare(table, shape, {side: partial(step, formula) for side, formula in formulas.items()})

    def add(self, table, shape, columns):
        columns = {title: round(float(value), 4) for title, value in columns.items()}
        print(table, shape, columns, sep=", ", flush=True)
        self.rows.append({"table": table, "shape": shape, **columns})


def learnt(*shape, scale=1.0):
    return (scale * torch.randn(shape)).requires_grad_()


def both(step, *inputs, **more):
    """A step with the plain formulas and one with the fused paths -> {side: step}"""
    return {side: step(*inputs, impl=impl, **more) for side, impl in IMPLS.items()}


def update(loss, optimiser):
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()


# --- RP ---------------------------------------------------------------------------------------------------------------
def texts_and_labels(classes):
    """Up to three random labels for each of TEXTS random texts -> embeddings [TEXTS, WIDTH], int8 [TEXTS, classes]"""
    labels = torch.zeros(TEXTS, classes, dtype=torch.int8)
    labels.scatter_(1, torch.randint(classes, (TEXTS, 3)), 1)
    return 5 * torch.randn(TEXTS, WIDTH), labels


def adapter_step(embeddings, labels, impl):
    """A step of adapter_rp.train -> () -> None"""
    config = rp.Config(impl=impl)
    adapter = rp.Adapter(WIDTH, labels.shape[1], 0)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-3, fused=impl == "fused")
    perturb = rp.perturb_fused
    if impl == "reference":
        perturb = rp.perturb_reference
    generator = torch.Generator()
    batches = itertools.cycle(torch.randperm(TEXTS).split(BATCH))

    def step():
        rows = next(batches)
        texts = perturb(embeddings[rows], 0.15, "gaussian", 10.0, generator)
        update(rp.text_loss(config, adapter, texts, labels[rows], None), optimiser)
    return step


def rp_step(bench):
    """RP's training step, 512 texts"""
    for classes in bench.sizes(LABELS, 20):
        bench.compare("RP step", f"{classes:,} labels", both(adapter_step, *texts_and_labels(classes)))


def authors_loss(logits, targets):
    """The asymmetric loss by the formula of its authors' class AsymmetricLossOptimized, in place where autograd allows
    it. targets: floats, as that class takes them"""
    absent = 1 - targets
    p = torch.sigmoid(logits)
    q = 1 - p
    loss = targets * p.clamp(min=1e-8).log()
    loss += absent * q.clamp(min=1e-8).log()
    loss *= (1 - p * targets - q * absent) ** (0.0 * targets + 4.0 * absent)  # gamma+ 0, gamma- 4
    return -loss.sum() / len(logits)


def asymmetric_loss(bench):
    """The loss and its gradient, 512 texts"""
    formulas = {"plain": lambda logits, targets, _: sspa.asymmetric_loss_reference(logits, targets, 4.0),
                "AsymmetricLossOptimized": lambda logits, _, targets: authors_loss(logits, targets),
                "fused": lambda logits, targets, _: sspa.asymmetric_loss_fused(logits, targets, 4.0)}
    for classes in bench.sizes(LABELS, 20):
        logits = learnt(BATCH, classes, scale=3.0)
        targets = texts_and_labels(classes)[1][:BATCH]
        bench.gradients("Asymmetric loss", f"{classes:,} labels", (logits, targets, targets.float()), [logits],
                        formulas)


def average_precision(bench):
    """metrics.average_precision beside scikit-learn's and, where it is installed, torchmetrics'"""
    embed.import_open_clip()  # makes torchvision importable, which torchmetrics imports
    from sklearn.metrics import average_precision_score
    for photos, classes in bench.sizes([(4952, 20), (40504, 80)], (99, 3)):
        scores = torch.rand(photos, classes)
        labels = torch.rand(photos, classes) < 0.04
        sides = {"scikit-learn": partial(average_precision_score, labels.numpy(), scores.numpy())}
        if find_spec("torchmetrics"):
            from torchmetrics.functional.classification import multilabel_average_precision
            sides["torchmetrics"] = partial(multilabel_average_precision, scores, labels.long(), classes)
        sides["ours"] = partial(metrics.average_precision, scores.numpy(), labels.numpy())
        bench.compare("Average precision", f"{photos:,} photos, {classes} labels", sides, memory=False)


def prompt_tuning(bench):
    """What an adapter saves. Reference: a step of prompt tuning in TaI-DPT's form (16 learnable context tokens, C x 77
    tokens through ViT-B-32's frozen text encoder, 20 labels at a time); fused: an adapter step. Same batch and loss."""
    for classes in bench.sizes((20, 40, 80, 160, 320), 2):
        texts, labels = texts_and_labels(classes)
        prompts = prompt_step(random_clip(bench.backbone), labels[:BATCH])
        adapter = adapter_step(texts, labels, "fused")
        prompts_ms, adapter_ms = interleave([prompts, adapter], bench.seconds)
        bench.add("Prompt tuning", f"C={classes}", {
            "reference_ms": prompts_ms, "fused_ms": adapter_ms, "ratio": prompts_ms / adapter_ms})


def prompt_step(clip, labels):
    width, d = clip.model.text_projection.shape
    tokens = clip.tokenizer([f"{'X ' * 16}thing number {number}." for number in range(labels.shape[1])])
    context = learnt(1, 16, width, scale=0.02)
    texts = 20 * F.normalize(torch.randn(len(labels), d), dim=-1)
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
@cache
def random_clip(backbone):
    return embed.load_clip(backbone, "none")


def labels_of(clip, count):
    """`count` of COCO's names, repeated if need be, with random features of KAP's texts -> sspa.Labels"""
    width, d = clip.model.text_projection.shape
    names = (data.label_names("coco2014") * 125)[:count]
    tokens = clip.tokenizer([f"X X X X {name}." for name in names])
    return sspa.Labels(names, names, tokens, torch.randn(count, d), torch.randn(4, width) / 50)


def cut_prompts(model, contexts, tokens):
    """encode_prompts_reference without the positions after the longest prompt's end"""
    longest = int(tokens.argmax(-1).max()) + 1
    short = SimpleNamespace(token_embedding=model.token_embedding, transformer=model.transformer,
                            positional_embedding=model.positional_embedding[:longest], ln_final=model.ln_final,
                            attn_mask=model.attn_mask[:longest, :longest], text_projection=model.text_projection)
    return sspa.encode_prompts_reference(short, contexts, tokens[:, :longest])


def prompts(bench, clip=None):
    """Two prompt sets of COCO's names; cut: the plain formula without the positions after the longest prompt"""
    clip = clip or random_clip(bench.backbone)
    formulas = {"plain": sspa.encode_prompts_reference, "cut": cut_prompts, "fused": sspa.encode_prompts_fused}
    labels = labels_of(clip, *bench.sizes([80], 2))
    contexts = torch.stack([labels.words] * 2).to(clip.device).requires_grad_()
    bench.gradients("Prompts", f"2 sets of {len(labels.names)} labels",
                    (clip.model, contexts, labels.tokens.to(clip.device)), [contexts], formulas)


def parts(bench):
    """Parts of SSPA with all gradients, except those of regions in the alignment, since the image tower is frozen"""
    draw = torch.Generator()
    weights = list(sspa.QuaternionLinear(WIDTH, WIDTH, "fused", draw).parameters())
    quaternion = {"plain": sspa.quaternion_linear_reference, "fused": sspa.quaternion_linear_fused}
    v_to_s = sspa.GatedAttention(WIDTH, 10.0, True, "fused", draw)
    s_to_v = sspa.GatedAttention(WIDTH, 10.0, True, "fused", draw)

    def align(attend):
        return lambda T, X: (attend(T, X, v_to_s)[0], attend(X, T, s_to_v)[0])
    alignment = {"plain": align(sspa.gated_attention_reference), "fused": align(sspa.gated_attention_fused)}
    aggregator = {"plain": sspa.soft_aggregate_reference, "fused": sspa.soft_aggregate_fused}
    aggregator_loss = {"plain": sspa.soft_aggregate_loss_reference, "fused": sspa.soft_aggregate_loss_fused}
    scale = torch.tensor(20.0, requires_grad=True)
    bias = torch.tensor(-3.0, requires_grad=True)

    for B, C, M in bench.sizes([(32, 80, 196), (8, 20, 784), (2, 10000, 196)], (2, 3, 4)):
        shape = f"{B} photos, {C:,} labels, {M} regions"
        T = learnt(B, C, WIDTH, scale=0.04)
        X = learnt(B, M, WIDTH, scale=0.04)
        first = (None, torch.randn(C, WIDTH), T, torch.randn(B, 1, WIDTH))  # only T_ca varies with photo and label
        later = [learnt(B, C, WIDTH) for _ in range(4)]
        bench.gradients("First quaternion layer", shape, (first, *weights), [T, *weights], quaternion)
        bench.gradients("Later quaternion layer", shape, (later, *weights), [*later, *weights], quaternion)
        needed = [T, *v_to_s.parameters(), *s_to_v.parameters()]
        bench.gradients("Gated alignment", shape, (T, X.detach()), needed, alignment)
        needed = [T, X, scale]
        bench.gradients("Soft aggregator", shape, (T, X, 0.1, scale), needed, aggregator)
        inputs = (T, X, 0.1, scale, bias, torch.rand(B, C) < 0.03)
        bench.gradients("Soft aggregator with loss", shape, inputs, [*needed, bias], aggregator_loss)


def training_step(clip, count, features_of, impl, prompts=None, tune_image="none"):
    """A step of sspa.train with `count` labels. features_of: () -> (x0 [B, d], X [B, M, d]); prompts: their features,
    or None if the step computes them -> () -> loss"""
    config = sspa.Config(tune_image=tune_image, impl=impl, lr=5e-5)
    model = sspa.SSPA(config, clip.model, labels_of(clip, count), 0).to(clip.device)
    optimiser = sspa.optimiser_of(config, model)
    learned = list(model.learned().values())
    averages = [parameter.detach().clone() for parameter in learned]
    x0, _ = features_of()
    targets = torch.rand(len(x0), count, device=clip.device) < 0.04

    def step():
        with embed.autocast(clip.device, clip.precision):
            loss = model(*features_of(), targets, prompts)
        update(loss, optimiser)
        with torch.no_grad():
            torch._foreach_lerp_(averages, learned, 0.01)
        return loss.detach()
    return step


def sspa_step(bench):
    """SSPA's training step, image tower frozen: 8 photos of 196 regions"""
    clip = random_clip(bench.backbone)
    d = clip.model.text_projection.shape[1]
    given = (torch.randn(8, d), torch.randn(8, 196, d))
    for classes in bench.sizes(LABELS[:3], 20):
        sides = both(training_step, clip, classes, lambda: given)
        if classes == 1000:  # the plain formula's prompts would need 37 GiB; at 10,000 ours would need nearly as much
            del sides["plain"]
        bench.compare("SSPA step", f"{classes:,} labels", sides)
    for classes in bench.sizes(LABELS, 20):
        prompts = F.normalize(torch.randn(2, classes, d), dim=-1)
        sides = both(training_step, clip, classes, lambda: given, prompts=prompts)
        bench.compare("SSPA step, prompts given", f"{classes:,} labels", sides)


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
    """Whole commands on JPEGs, ViT-B-32, batches of 64. Bare: open_clip's model and transform in a DataLoader, nothing
    kept or written. Measured are a command with one photo, which is mostly start-up, and the rate of all others."""
    call = partial(subprocess.run, check=True, capture_output=True, cwd=REPOSITORY)
    with tempfile.TemporaryDirectory() as folder:
        call([sys.executable, "adapter_rp.py", "--output", folder, "--backbone", "ViT-B-32", "--pretrained", "none",
              "--text-count", "50", "--test-count", "9", "--epochs", "1", "--cache="])
        bare = [sys.executable, "-c", BARE, str(min(16, os.cpu_count()))]  # as many workers as tag.py has
        ours = [sys.executable, "tag.py", f"{folder}/checkpoint.safetensors", "--stdout", "--quiet", "--cache="]
        for count, width, height in bench.sizes([(160, 640, 480), (80, 4000, 3000)], (2, 64, 48)):
            if bench.device == "cuda":
                count *= 16
            photo = f"{folder}/photo.jpg"
            scenes.picture("test", 0)[0].resize((width, height)).save(photo, quality=90)
            counts = (1, count)
            calls = [partial(call, command + [photo] * photos) for command in (bare, ours) for photos in counts]
            seconds = interleave(calls, 30 * bench.seconds) / 1000
            rate = (count - 1) / (seconds[1::2] - seconds[::2])  # [bare, ours]
            bench.add("Tagging", f"{width:,} x {height:,} pixels", {
                "bare, photos a second": rate[0], "ours, photos a second": rate[1], "ours / bare": rate[1] / rate[0],
                "bare, seconds of one photo": seconds[0], "ours, seconds of one photo": seconds[2]})


def synchronisations(step):
    """How often a step other than the first waits for the GPU; 0 without one"""
    step()
    if not torch.cuda.is_available():
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def gpu(bench):
    """SSPA's training step in bf16, prompts included, with the image tower frozen and tuned; how often the fused step
    waits for the GPU; prompts alone"""
    for backbone, resolution, B, C in bench.sizes([("ViT-B-16", 224, 64, 80), ("ViT-B-16", 448, 64, 80)],
                                                  ("scenes", 64, 2, 2)):
        clip = embed.load_clip(backbone, "none", bench.device, "bf16", resolution)
        images = torch.randn(B, 3, resolution, resolution, device=bench.device)
        encode = partial(sspa.image_features, clip.model.visual, images)
        with torch.no_grad(), embed.autocast(bench.device, "bf16"):
            given = encode()
        for tower, features_of in {"none": lambda given=given: given, "full": encode}.items():
            shape = f"{B} photos of {resolution} pixels, {C} labels, --tune-image {tower}"
            sides = both(training_step, clip, C, features_of, tune_image=tower)
            bench.compare("SSPA step", shape, sides)
            bench.add("Synchronisations", shape, {"a fused step": synchronisations(sides["fused"])})
    with embed.autocast(bench.device, "bf16"):
        prompts(bench, clip)


TABLES = {"all": (rp_step, asymmetric_loss, average_precision, prompts, parts, sspa_step, tagging),
          "cost": (prompt_tuning,), "gpu": (tagging, gpu)}


# --- docs/speed.md ----------------------------------------------------------------------------------------------------
def check_commit(commit):
    if not re.fullmatch("[0-9a-f]+", commit):
        raise UsageError(f"{PAGE.name} takes numbers of a clean commit only, not of {commit}; commit the changes and "
                         "measure again")


def table_of(record, name):
    """benchmark.json -> a table in Markdown; name "machine": one line about what it ran on"""
    if name == "machine":
        return ", ".join(f"{title} {fact}" for title, fact in record["machine"].items()) + "\n"
    rows = [row for row in record["rows"] if row["table"] == name]
    columns = dict.fromkeys(title for row in rows for title in list(row)[2:])
    cells = []
    for row in rows:
        cells.append([row["shape"], *([row[title], None] if title in row else "" for title in columns)])
    return tables.markdown(tables.Table(name, columns, cells))


def write_docs(path):
    """Fills the places for the record's command in docs/speed.md, <!-- speed COMMAND TABLE --> up to <!-- end -->."""
    with data.reading(path, "benchmark", "make it with experiments/benchmark.py all"):
        record = json.loads(path.read_text("utf-8"))
        check_commit(record["machine"]["commit"])
        place = f"(<!-- speed {record['machine']['command']} (.+?) -->).*?<!-- end -->"
        text = re.sub(place, lambda found: f"{found[1]}\n{table_of(record, found[2])}<!-- end -->",
                      data.read_text(PAGE, "page"), flags=re.S)
    data.write_atomically(PAGE, text)


def processor(device):
    """The processor's name, if Linux tells it, and its vector instructions; or the GPU's name"""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        name = re.findall("model name.*: (.*)|$", data.read_text("/proc/cpuinfo", "processor"))[0] or name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def main(words):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=[*TABLES, "docs"])
    parser.add_argument("--output", type=Path, default="runs/benchmark")
    args = parser.parse_args(words)
    path = args.output / "benchmark.json"
    if args.command == "docs":
        write_docs(path)
        return
    device = "cpu"
    if args.command == "gpu":
        device = "cuda"
        if not torch.cuda.is_available():
            raise UsageError("gpu: PyTorch finds no GPU on this machine; run all or cost")
    machine = {"command": args.command, "processor": processor(device), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "commit": run.commit()}
    if args.command == "all":
        check_commit(machine["commit"])
    began = perf_counter()
    bench = Bench(device)
    for table in TABLES[args.command]:
        table(bench)
        machine["minutes"] = round((perf_counter() - began) / 60, 1)
        data.write_json(path, {"machine": machine, "rows": bench.rows})
    print(f"{path}: {len(bench.rows)} rows, {machine['minutes']} minutes")


if __name__ == "__main__":
    with run.exit_codes("benchmark.py") as arguments:
        main(arguments)
