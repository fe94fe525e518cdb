"""Every table of this project: what `bash run_all.sh` runs, from the plan to results/tables.md. Not a test.

    bash run_all.sh                       the plan, then every run that is not done yet, then results/tables.{md,json} and a picture a table
    bash run_all.sh --plan                only the plan
    bash run_all.sh --overwrite           finished runs are done again
    ONLY="rp-main voc2007" bash run_all.sh      only the runs of these tables, datasets or runs
    python tests/tables.py --readme       after a run: the README's block, assets/tables.json and its pictures, from results/tables.json

The environment variables stand at the top of run_all.sh. A run is one call of adapter_rp.py, sspa.py or tests/benchmark.py, with a folder under runs/tables. The scripts themselves decide whether it is finished, and go on
where they were interrupted. A number in a table is read from metrics.json, never kept beside it.
"""
import argparse
import contextlib
import difflib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import adapter_rp  # noqa: E402
import data  # noqa: E402
import sspa  # noqa: E402
import torch  # noqa: E402
from data import UsageError, say  # noqa: E402

UNREAD = "not available offline"
STRENGTHS = (0, 0.05, 0.1, 0.15, 0.2)
LAWS = ("gaussian", "uniform", "sphere", "none")
COUNTS = (250, 500, 1000, 2000, 4000, 8000)
DOMAINS = {"natural": ("voc2007", "coco2014", "nuswide"), "pedestrian": ("pa100k", "rapv1", "peta"), "remote": ("multiscene", "mlrsnet", "ucm")}
PHOTO_SETS = tuple(dataset for domain in DOMAINS.values() for dataset in domain)
RP_SETS = ("scenes", "features", *DOMAINS["natural"])
SHOWN = {"scenes": "drawn scenes", "features": "ready features of photos", "voc2007": "VOC2007", "coco2014": "COCO 2014", "nuswide": "NUS-WIDE", "pa100k": "PA100K", "rapv1": "RAPv1",
         "peta": "PETA", "multiscene": "MultiScene", "mlrsnet": "MLRSNet", "ucm": "UC Merced"}
LABEL_METRICS = {"mAP": ("mAP",), "CF1": ("threshold_0.5", "CF1"), "OF1": ("threshold_0.5", "OF1"), "CF1, top 3": ("top_3", "CF1"), "OF1, top 3": ("top_3", "OF1")}
ATTRIBUTE_METRICS = {"mA": ("attributes", "mA"), "accuracy": ("attributes", "accuracy"), "precision": ("attributes", "precision"), "recall": ("attributes", "recall"), "F1": ("attributes", "F1")}
CLIP_OPTIONS = ("--backbone", "--pretrained", "--resolution", "--precision")
OWN_OPTIONS = (*CLIP_OPTIONS[:2], "--dataset", "--data-root", "--download", "--seed", "--output", "--overwrite", "--features", "--texts", "--captions", "--text-count", "--noise-std", "--noise-law", "--normalize", "--tune-image",
               "--ablate", "--checkpoint", "--eval-only", "--predict", "--explain", "--gpu", "--cpu")
OFFLINE_MINUTES = {"rp-cost": 1.5, "sspa-scenes": 7.5, "sspa-scenes-ablations": 5, "sspa-scenes-tuned": 8, "rp-features": 1, "rp-features-unit": 1, **dict.fromkeys(("rp-features-uniform", "rp-features-sphere"), 0.3),
                   **{f"rp-features-{count}-texts": 0.4 for count in COUNTS}, **{f"rp-scenes{suffix}": 0.2 for suffix in ("", "-unit", "-uniform", "-sphere", *(f"-{count}-texts" for count in COUNTS))}}  # a run without datasets: minutes for three seeds on two CPU cores, measured
# seconds on two CPU cores, ViT-B-16 at 224 pixels: a photo through the frozen tower, one tuned step's share of a photo, one step of SSPA's head, a sentence (README, "Speed")
ENCODE, TUNE, HEAD, SENTENCE = 0.12, 0.58, 0.026, 0.03
REGION_GIB = 198 / 2 ** 20  # frozen features of a photo


class Run(NamedTuple):
    name: str        # folder under runs/tables
    script: str
    words: list      # its command line, without --output
    dataset: str
    tables: tuple    # that read it
    minutes: float   # expected on two CPU cores
    photos: int      # that it decodes, with every epoch in which it does


class Settings(NamedTuple):
    data_root: str
    features: str    # file or None
    texts: str       # folder or None
    seeds: list
    device: list     # words
    clip: list       # words
    options: list    # words
    minutes: float   # or None
    only: list


def settings_from(environment):
    """Raises UsageError for a variable that cannot be understood."""
    def words(name, default=""):
        try:
            return shlex.split(environment.get(name, default))
        except ValueError as error:
            raise UsageError(f"{name}={environment[name]}: {error}") from None
    seeds = words("SEEDS", "0 1 2")
    if not seeds or not all(seed.isdigit() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UsageError(f"SEEDS={environment.get('SEEDS')}: numbers from 0 on, none twice, such as SEEDS=\"0 1 2\"")
    clip, options = words("CLIP"), words("OPTIONS")
    for word in clip:
        if word.startswith("--") and word.split("=")[0] not in CLIP_OPTIONS:
            raise UsageError(f"CLIP={environment['CLIP']}: {word} has no place here; it may hold {' '.join(CLIP_OPTIONS)}")
    for word in options:
        if word.startswith("--") and (own := next((flag for flag in OWN_OPTIONS if flag.startswith(word.split("=")[0])), None)):
            raise UsageError(f"OPTIONS={environment['OPTIONS']}: {own} is chosen by the tables themselves (SEEDS, GPU, CLIP, DATA_ROOT, FEATURES and TEXTS are variables of their own)")
    gpu = environment.get("GPU", "").strip()
    if gpu and gpu != "cpu" and not gpu.isdigit():
        raise UsageError(f"GPU={gpu}: the number of a GPU, or cpu")
    count = torch.cuda.device_count()
    if gpu.isdigit() and int(gpu) >= count:
        raise UsageError(f"GPU={gpu}: this machine has {count} GPU{'' if count == 1 else 's'} that PyTorch can use; leave GPU out, or GPU=cpu")
    on_gpu = count > 0 and gpu != "cpu"
    try:
        limit = float(environment["MINUTES"]) if environment.get("MINUTES") else None if on_gpu else 240.0
    except ValueError:
        limit = -1.0
    if limit is not None and not limit > 0:
        raise UsageError(f"MINUTES={environment['MINUTES']}: a number above 0")
    features = environment.get("FEATURES", "../shared/data/photo_embeddings/voc2007_even.npz")
    if environment.get("FEATURES"):
        data.load_features(features)
    if environment.get("DATA_ROOT") and not Path(environment["DATA_ROOT"]).is_dir():
        raise UsageError(f"DATA_ROOT={environment['DATA_ROOT']}: no such folder")
    texts = environment.get("TEXTS") or None
    if texts and not Path(texts).is_dir():
        raise UsageError(f"TEXTS={texts}: no such folder; it holds <dataset>.jsonl, one {{\"text\": ..., \"labels\": [...]}} a line")
    return Settings(os.path.normpath(environment.get("DATA_ROOT") or "data"), features if features and (REPOSITORY / features).is_file() else None, texts, seeds, ["--gpu", gpu] if gpu.isdigit() else ["--cpu"] if gpu == "cpu" else [],
                    clip, options, limit, environment.get("ONLY", "").replace(",", " ").split())


# --- the runs ---------------------------------------------------------------------------------------------------------

def photos_here(dataset, root):
    """-> (photos for training, for test), or the line that says what is missing"""
    try:
        return tuple(len(data.load_photos(dataset, root, split).photos) for split in ("train", "test"))
    except UsageError as error:
        return str(error).replace("add --download (about 870 MB, hash-checked)", f"python data.py --check voc2007 --download --data-root {shlex.quote(root)} fetches it (about 870 MB, hash-checked)").replace("pass --data-root ", "DATA_ROOT=")


def look_for_data(settings):
    """-> (photos of each dataset: (training, test), as published where it is not here; what stands in the way: dataset -> one line)"""
    published = {dataset: data.PUBLISHED[dataset] if data.PUBLISHED[dataset][0] else (54581, 54580) for dataset in PHOTO_SETS}  # mlrsnet: 109,161 in all, one half for test
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # COCO's annotations take gigabytes while they are read: not from this process
        here = dict(zip(PHOTO_SETS, pool.map(photos_here, PHOTO_SETS, [settings.data_root] * len(PHOTO_SETS))))
    missing = {dataset: answer for dataset, answer in here.items() if isinstance(answer, str)}
    counts = {dataset: published[dataset] if dataset in missing else here[dataset] for dataset in PHOTO_SETS}
    if settings.features is None:
        missing["features"] = "no file of ready embeddings; FEATURES=FILE names one (its layout: README, 'Tables')"
    if set(PHOTO_SETS) - missing.keys():
        config = sspa.parse(["--dataset", "voc2007", *settings.clip])
        try:
            data.load_clip(config.backbone or "ViT-B-16", config.pretrained)
        except UsageError as error:
            if not str(error).startswith("weights of"):
                raise UsageError(f"CLIP={shlex.join(settings.clip)}: {error}") from None
            missing.update({dataset: f"the photos are here, but {error} (with run_all.sh: CLIP=\"--pretrained FILE\")" for dataset in PHOTO_SETS if dataset not in missing})
    return counts, missing


def texts_file(settings, dataset):
    """Sentences by a language model for a dataset -> path or None"""
    for folder, suffixes in ((settings.texts, (".jsonl", ".jsonl.gz")), (REPOSITORY / "assets" / "texts", ("-qwen2.5-coder-1.5b.jsonl.gz",))):
        for suffix in suffixes if folder else ():
            if (Path(folder) / (dataset + suffix)).is_file():
                return os.path.relpath(Path(folder) / (dataset + suffix), REPOSITORY)
    return None


def all_runs(settings, counts):
    """Every run that a table reads, whether its data are here or not -> list of Run"""
    runs, scale = [], len(settings.seeds) / 3

    def add(name, script, words, dataset, tables, seconds=0, photos=0):
        own = [] if script == "tests/benchmark.py" else [*words, "--seed", *settings.seeds, *(settings.clip if dataset in PHOTO_SETS else []), *settings.device, *settings.options]
        runs.append(Run(name, script, own or words, dataset, tables, OFFLINE_MINUTES.get(name, seconds / 60) * (scale if script == "sspa.py" else 1), photos))

    strengths = ["--noise-std", "0.15", *(str(s) for s in STRENGTHS if s != 0.15)]
    for dataset in RP_SETS:
        where = [] if dataset == "scenes" else ["--features", settings.features or "FILE"] if dataset == "features" else ["--dataset", dataset, "--data-root", settings.data_root]
        test = counts[dataset][1] if dataset in PHOTO_SETS else 0
        first = test * ENCODE + 8000 * SENTENCE  # the other runs find photos and sentences in the cache
        add(f"rp-{dataset}", "adapter_rp.py", [*where, *strengths], dataset, ("rp-main", "rp-noise", "rp-law", "rp-normalisation", "rp-texts"), first + 60, test)
        add(f"rp-{dataset}-unit", "adapter_rp.py", [*where, "--normalize", *strengths], dataset, ("rp-normalisation",), 60)
        for law in ("uniform", "sphere"):
            add(f"rp-{dataset}-{law}", "adapter_rp.py", [*where, "--noise-law", law], dataset, ("rp-law",), 30)
        steps = 960 if dataset == "features" else 480  # of the main run: every count of texts gets as many
        for count in COUNTS if dataset == "features" else COUNTS[:-1]:
            add(f"rp-{dataset}-{count}-texts", "adapter_rp.py", [*where, "--text-count", str(count), "--epochs", str(steps // -(-count // 512)), "--noise-std", "0.15", "0"], dataset, ("rp-texts",), 30 + count * SENTENCE)
        if dataset in PHOTO_SETS and texts_file(settings, dataset):
            add(f"rp-{dataset}-llm", "adapter_rp.py", [*where, "--texts", texts_file(settings, dataset), "--noise-std", "0.15", "0"], dataset, ("rp-main",), 30 + 8000 * SENTENCE)
    add("rp-cost", "tests/benchmark.py", ["cost"], "none", ("rp-cost",))
    add("sspa-scenes", "sspa.py", ["--tune-image", "none"], "scenes", ("sspa-scenes",))
    add("sspa-scenes-ablations", "sspa.py", ["--ablate", "--limit", "4000", "--epochs", "8"], "scenes", ("sspa-scenes", "sspa-ablations"))
    add("sspa-scenes-tuned", "sspa.py", ["--tune-image", "full", "--limit", "4000", "--epochs", "8"], "scenes", ("sspa-scenes",))
    for domain, datasets in DOMAINS.items():
        for dataset in datasets:
            where, (train, test), epochs = ["--dataset", dataset, "--data-root", settings.data_root], counts[dataset], 20
            times = 1 if (train + test) * REGION_GIB <= 4 else 3 * epochs  # beyond --cache-limit every epoch of every seed encodes
            add(f"sspa-{dataset}-frozen", "sspa.py", [*where, "--tune-image", "none"], dataset, (f"sspa-{domain}",), times * (train + test) * ENCODE + 3 * epochs * train * HEAD, times * (train + test))
            add(f"sspa-{dataset}-tuned", "sspa.py", [*where, "--tune-image", "full"], dataset, (f"sspa-{domain}",), 3 * (epochs * train * TUNE + test * ENCODE), 3 * (epochs * train + test))
    train, test = counts["voc2007"]
    add("sspa-voc2007-ablations", "sspa.py", ["--dataset", "voc2007", "--data-root", settings.data_root, "--ablate"], "voc2007", ("sspa-ablations",), (train + test) * ENCODE + 45 * 20 * train * HEAD, train + test)
    return runs


def chosen(run, only):
    return not only or any(word in (run.name, run.dataset, *run.tables) for word in only)


def gpu_minutes(run):
    """Never measured: a hundredth of the CPU's time, and not less than it takes to decode the photos at 200 a second."""
    return max(run.minutes / 100, run.photos / 200 / 60, 0.2)


def config_of(run, folder):
    """The script's own reading of a run's command line -> Config, None for a benchmark. Raises UsageError."""
    if run.script == "tests/benchmark.py":
        return None
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            config = (adapter_rp if run.script == "adapter_rp.py" else sspa).parse([*run.words, "--output", str(folder)])
            return config if run.script == "adapter_rp.py" else sspa.set_up(config)[0]
        except SystemExit:
            raise UsageError(f"{said.getvalue().strip().splitlines()[-1]}; mend CLIP= or OPTIONS=") from None


def result_of(run, folder):
    """What a finished run left -> dict, or None if it is still to be done. Raises UsageError where a run with other settings lies."""
    if run.script == "tests/benchmark.py":
        path = folder / "benchmark.json"
        return data.read_json(path, "benchmark") if path.is_file() else None
    module, config, path = adapter_rp if run.script == "adapter_rp.py" else sspa, config_of(run, folder), folder / "metrics.json"
    if path.is_file():
        try:
            then, now = json.loads(data.read_json(path, "result")["settings"]), json.loads(module.settings_of(config))
        except (UsageError, KeyError, TypeError, ValueError):
            say(f"{os.path.relpath(path, REPOSITORY)}: damaged; the run is to be done again")
            return None
        if then != now:
            differing = ", ".join(f"{name} was {then.get(name)}" for name in {**now, **then} if then.get(name) != now.get(name))
            raise UsageError(f"{os.path.relpath(folder, REPOSITORY)} holds a finished run with other settings ({differing}); bash run_all.sh --overwrite does it again, with ONLY={run.name} it alone")
    return module.finished(config, folder)


def state_of(run, folder, settings, missing, overwrite):
    """-> (state, why or None, result or None); state: done, to do, missing, too long, stale"""
    if run.dataset in missing:
        try:
            result = result_of(run, folder)
        except UsageError:
            result = None
        return ("done", None, result) if result and not overwrite else ("missing", missing[run.dataset], None)
    try:
        result = None if overwrite else result_of(run, folder)
    except UsageError as error:
        return "stale", str(error), None
    if result:
        return "done", None, result
    if settings.minutes is not None and run.minutes > settings.minutes:
        return "too long", f"about {f'{run.minutes / 60:,.0f} hours' if run.minutes > 120 else f'{run.minutes:.1f} minutes'} on a CPU; GPU=0 uses a GPU, MINUTES={run.minutes + 1:.0f} runs it all the same", None
    return "to do", None, None


# --- the tables -------------------------------------------------------------------------------------------------------

def paper_numbers():
    """assets/paper_numbers.json, checked -> (papers: table -> dataset -> cell -> number or UNREAD, anchors)"""
    path = REPOSITORY / "assets" / "paper_numbers.json"
    stored, natural = data.read_json(path, "paper numbers"), DOMAINS["natural"]
    cells = {"rp-main": {d: ["mAP"] for d in natural}, "rp-law": {d: LAWS for d in natural}, "rp-texts": {d: list(map(str, COUNTS)) for d in natural}, "sspa-ablations": {"voc2007": ["SSPA", *sspa.ABLATIONS]},
             **{table: {d: [f"{s:g}" for s in STRENGTHS] for d in natural} for table in ("rp-noise", "rp-normalisation")},
             **{f"sspa-{domain}": {d: list(ATTRIBUTE_METRICS if domain == "pedestrian" else LABEL_METRICS) for d in datasets} for domain, datasets in DOMAINS.items()}}
    try:
        papers, anchors = stored["papers"], stored["anchors"]
        found = {table: {dataset: list(values) for dataset, values in datasets.items()} for table, datasets in papers.items()}
        anchors = [{name: anchor[name] for name in ("method", "backbone", "dataset", "metric", "value", "source", "note")} for anchor in anchors]
    except (TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path}: not of its form any more ({error!r}); git checkout {path.relative_to(REPOSITORY)} brings it back") from None
    for table, datasets in {**cells, **found}.items():
        for dataset in {**cells.get(table, {}), **found.get(table, {})}:
            if odd := sorted(set(found.get(table, {}).get(dataset, [])) ^ set(cells.get(table, {}).get(dataset, []))):
                raise UsageError(f"{path}: {table}, {dataset}: {odd[0]} is {'no cell' if odd[0] in found.get(table, {}).get(dataset, []) else 'missing'}; its cells are {', '.join(cells.get(table, {}).get(dataset, [])) or 'none'}")
            for cell, value in papers[table][dataset].items():
                if value != UNREAD and (isinstance(value, bool) or not isinstance(value, (int, float)) or not (value == 0 or 1 <= value <= 100)):
                    raise UsageError(f"{path}: {table}, {dataset}, {cell} is {value!r}; it must be a number in percent (60.5, not 0.605), or \"{UNREAD}\"")
    return papers, anchors


def number(runs, key, name):
    """Mean and spread of one number over the runs (dicts of metrics.json) of one setting -> cell, or None"""
    values = [functools.reduce(lambda at, word: at[word], key, run) for run in runs]
    if not values or any(value is None for value in values):
        return None
    mean, std = adapter_rp.spread(values)
    return {"mean": mean, "std": std if len(values) > 1 else None, "n": len(values), "run": name}


def photos_of(dataset, names, results):
    """What a dataset's numbers rest on, for the note under a table -> list of str"""
    notes = []
    for name in names:
        if name in results and dataset in PHOTO_SETS:
            count, published = results[name]["photo_count"], data.PUBLISHED[dataset][1]
            notes.append(f"{SHOWN[dataset]}: {count:,} test photos" + (f" (**{published:,} published**)" if published not in (None, count) else "") + f", {results[name]['backbone']}; {results[name]['policy']}.")
    return list(dict.fromkeys(notes))


def make_tables(runs, results, why):
    """results: run name -> content of its metrics.json; why: run name -> short reason that it is not there -> list of dict (results/tables.json)"""
    papers, anchors = paper_numbers()

    def rp(name, std, key=("mAP",)):
        if name not in results:
            return why.get(name)
        return number([run for run in results[name]["runs"] if run["noise_std"] == std], key, name)

    def zero_shot(name):
        return why.get(name) if name not in results else {"mean": results[name]["zero_shot_mAP"], "std": None, "n": 1, "run": name} if results[name]["zero_shot_mAP"] is not None else None

    def sspa_number(name, key, ablation="none"):
        if name not in results:
            return why.get(name)
        return number([run for run in results[name]["runs"] if run["ablation"] == ablation], key, name)

    def minus(ours, paper):
        return {"mean": ours["mean"] - paper, "std": None, "n": ours["n"], "run": ours["run"], "signed": True} if isinstance(ours, dict) and isinstance(paper, (int, float)) else None

    def published(dataset, metric):
        return "; ".join(f"{a['method']} ({a['backbone']}) {a['value']} [{a['source']}{', ' + a['note'] if a.get('note') else ''}]" for a in anchors if (a["dataset"], a["metric"]) == (dataset, metric)) or None

    def with_paper(table, rows):
        """Under the rows of each dataset: the paper's, and the difference, where its cells were read. The rest is said in one line."""
        out, lacking, unread = [], {}, []
        for dataset in dict.fromkeys(row[0] for row in rows):
            own = [(label, cells) for of, label, cells in rows if of == dataset]
            here = [{"label": label, "cells": cells} for label, cells in own if any(isinstance(cell, dict) for cell in cells)]
            if not here:
                lacking.setdefault(next((cell for _, cells in own for cell in cells if cell), "nothing to show"), []).append(SHOWN[dataset])
            out += here
            paper, first = list(papers.get(table, {}).get(dataset, {}).values()), own[0][1]
            paper += [None] * (len(first) - len(paper)) if paper else []
            if any(isinstance(value, (int, float)) for value in paper):
                out.append({"label": f"{SHOWN[dataset]}, the paper", "cells": paper})
                out.append({"label": f"{SHOWN[dataset]}, ours - paper", "cells": [minus(ours, value) for ours, value in zip(first, paper)]})
            elif paper:
                unread.append(SHOWN[dataset])
        return out, [f"{', '.join(names)}: {reason}." for reason, names in lacking.items()] + [f"{', '.join(unread)}: the paper's cells are {UNREAD}."] * bool(unread)

    tables = []

    def table(name, title, columns, rows, notes=(), **drawing):
        tables.append({"name": name, "title": title, "columns": columns, "rows": rows, "notes": list(notes), **drawing})

    rows = []
    for dataset in RP_SETS:
        paper = papers["rp-main"].get(dataset, {}).get("mAP")
        for name, texts in ((f"rp-{dataset}", ""), (f"rp-{dataset}-llm", ", sentences by a language model")):
            if any(run.name == name for run in runs):
                source = f" ({results[name]['texts']}, {results[name]['text_count']:,})" if name in results else texts and f" ({texts[2:]})"
                ours = rp(name, 0.15)
                rows.append({"label": SHOWN[dataset] + source, "cells": [zero_shot(name), rp(name, 0), ours, rp(name, 0.15, ("mAP_interpolated",)), None if texts else published(dataset, "mAP"), None if texts else paper, minus(ours, paper)]})
    table("rp-main", "RP: an adapter trained on texts alone, mAP on photos", ["zero-shot, ours", "no noise", "noise 0.15", "noise 0.15, interpolated AP", "published", "RP, the paper", "ours - paper"], rows,
          ["Zero-shot is the cosine with \"a photo of a {name}.\". Anchors are other methods or other settings, not goals.", *(note for d in RP_SETS for note in photos_of(d, (f"rp-{d}", f"rp-{d}-llm"), results))],
          draw="points", drawn=[0, 1, 2])
    rows, notes = with_paper("rp-noise", [(d, SHOWN[d], [rp(f"rp-{d}", s) for s in STRENGTHS]) for d in RP_SETS])
    table("rp-noise", "RP: strength of the noise, mAP", [f"{s:g}" for s in STRENGTHS], rows, notes, draw="curves", x="noise, times the mean text norm, per coordinate",
          level={SHOWN[d]: zero_shot(f"rp-{d}") for d in RP_SETS if isinstance(zero_shot(f"rp-{d}"), dict)})
    rows, notes = with_paper("rp-law", [(d, SHOWN[d], [rp(f"rp-{d}", 0.15), rp(f"rp-{d}-uniform", 0.15), rp(f"rp-{d}-sphere", 0.15), rp(f"rp-{d}", 0)]) for d in RP_SETS])
    table("rp-law", "RP: law of the noise, strength 0.15, mAP", list(LAWS), rows, notes, draw="points")
    rows, notes = with_paper("rp-normalisation", [(d, f"{SHOWN[d]}, {kind}", [rp(f"rp-{d}{suffix}", s) for s in STRENGTHS]) for d in RP_SETS for kind, suffix in (("raw", ""), ("unit length", "-unit"))])
    table("rp-normalisation", "RP: raw embeddings against unit length, mAP by strength of the noise", [f"{s:g}" for s in STRENGTHS], rows, notes, draw="curves", x="noise, times the mean text norm, per coordinate")
    rows, notes = with_paper("rp-texts", [(d, SHOWN[d] + kind, [rp(f"rp-{d}-{c}-texts" if c < 8000 or d == "features" else f"rp-{d}", s) for c in COUNTS] + [rp(f"rp-{d}", s) if d == "features" else None])
                                          for d in RP_SETS for kind, s in (("", 0.15), (", no noise", 0))])
    table("rp-texts", "RP: number of texts, as many steps for each, mAP", [f"{c:,}" for c in COUNTS] + ["all 15,935" if "rp-features" not in results else f"all {results['rp-features']['text_count']:,}"],
          rows, notes, draw="curves", x="texts", logarithmic=True)
    cost, rows = results.get("rp-cost"), []
    if cost:
        timed = [row for row in cost["rows"] if row["path"] == "prompt tuning"]
        rows = [{"label": "prompt tuning, ms a step", "cells": [{"mean": row["reference_ms"], "std": None, "n": 1, "run": "rp-cost"} for row in timed]},
                {"label": "adapter, ms a step", "cells": [{"mean": row["fused_ms"], "std": None, "n": 1, "run": "rp-cost"} for row in timed]},
                {"label": "ratio of the times", "cells": [{"mean": row["ratio"], "std": None, "n": 1, "run": "rp-cost"} for row in timed]},
                {"label": "ratio of the multiplications", "cells": [{"mean": row["multiplications_reference"] / row["multiplications_fused"], "std": None, "n": 1, "run": "rp-cost"} for row in timed]}]
    table("rp-cost", "RP: cost of a training step against the number of labels", [row["shape"][2:] for row in timed] if cost else [], rows,
          ["Prompt tuning in TaI-DPT's form through ViT-B-32's frozen text encoder; same batch of 512, same loss, this machine's CPU."] if cost else [why.get("rp-cost", "not run")],
          draw="curves", x="labels", logarithmic=True, drawn=[0, 1], y="milliseconds a training step")
    metrics = {**LABEL_METRICS, "mAP, global branch": ("mAP_global",), "mAP, regional branch": ("mAP_regional",)}
    rows = [{"label": "zero-shot CLIP (cosine)", "cells": [zero_shot("sspa-scenes"), *[None] * (len(metrics) - 1)]}]
    for label, name in (("20,000 pictures, 20 epochs, image tower frozen", "sspa-scenes"), ("4,000 pictures, 8 epochs, image tower frozen", "sspa-scenes-ablations"), ("4,000 pictures, 8 epochs, image tower tuned", "sspa-scenes-tuned")):
        rows.append({"label": label, "cells": [sspa_number(name, key) for key in metrics.values()]})
    table("sspa-scenes", "SSPA: drawn scenes, toy CLIP", list(metrics), rows, draw="points", drawn=[0, 5, 6])
    for domain, datasets in DOMAINS.items():
        metrics, rows = ATTRIBUTE_METRICS if domain == "pedestrian" else LABEL_METRICS, []
        for dataset in datasets:
            for metric, key in metrics.items():
                paper = papers[f"sspa-{domain}"].get(dataset, {}).get(metric)
                frozen, tuned = (sspa_number(f"sspa-{dataset}-{kind}", key) for kind in ("frozen", "tuned"))
                rows.append({"label": f"{SHOWN[dataset]}, {metric}", "cells": [zero_shot(f"sspa-{dataset}-frozen") if metric == "mAP" else None, frozen, tuned, published(dataset, metric), paper, minus(tuned, paper)]})
        table(f"sspa-{domain}", f"SSPA: {dict(natural='natural photos', pedestrian='pedestrian attributes', remote='remote sensing')[domain]}",
              ["zero-shot, ours", "image tower frozen", "image tower tuned", "published", "SSPA, the paper", "tuned - paper"], rows,
              [note for d in datasets for note in photos_of(d, (f"sspa-{d}-frozen", f"sspa-{d}-tuned"), results)], draw="points", drawn=[1, 2], x="%")
    rows = []
    for ablation in ("none", *sspa.ABLATIONS):
        cells = []
        for dataset in ("scenes", "voc2007"):
            value, full = (sspa_number(f"sspa-{dataset}-ablations", ("mAP",), which) for which in (ablation, "none"))
            cells += [value, minus(value, full["mean"]) if isinstance(full, dict) and ablation != "none" else None]
        paper = papers["sspa-ablations"]["voc2007"][sspa.title(ablation)]
        rows.append({"label": sspa.title(ablation), "cells": [*cells, paper, minus(cells[2], paper)]})
    table("sspa-ablations", "SSPA: what each part is worth, image tower frozen, mAP", ["drawn scenes, 4,000 pictures, 8 epochs", "against the full method", "VOC2007", "against the full method, VOC2007", "SSPA, the paper, VOC2007", "ours - paper"],
          rows, draw="points", drawn=[0])
    if not any(isinstance(cell, (dict, int, float)) for row in rows for cell in row["cells"][2:]):
        tables[-1]["columns"] = tables[-1]["columns"][:2]
        tables[-1]["notes"].append(f"VOC2007: {rows[0]['cells'][2]}. SSPA, the paper: {UNREAD}.")
        for row in rows:
            row["cells"] = row["cells"][:2]
    return tables


def shown(cell, link=None):
    """One cell as a person reads it; link: run name -> address, or None for none."""
    if cell is None or cell == "":
        return ""
    if isinstance(cell, (int, float)):
        return f"{cell:g}"
    if isinstance(cell, str):
        return cell.replace("; ", "<br>")
    large = abs(cell["mean"]) > 100
    text = format(cell["mean"], "+.2f" if cell.get("signed") else ",.0f" if large else ".2f") + ("" if cell["std"] is None else f" ± {cell['std']:.2f}")
    return f"[{text}]({link(cell['run'])})" if link else text


def has_numbers(table):
    return any(isinstance(cell, dict) for row in table["rows"] for cell in row["cells"])


def as_markdown(table, link=None, picture=None):
    filled = [n for n in range(len(table["columns"])) if any(row["cells"][n] not in (None, "") for row in table["rows"])]
    lines = [f"### {table['title']}", ""]
    if table["rows"]:
        lines += ["| | " + " | ".join(table["columns"][n] for n in filled) + " |", "|---" * (len(filled) + 1) + "|"]
        lines += [f"| {row['label']} | " + " | ".join(shown(row["cells"][n], link) for n in filled) + " |" for row in table["rows"]]
    lines += [""] * bool(table["rows"] and table["notes"]) + [" ".join(table["notes"])] * bool(table["notes"])
    if picture:
        lines += ["", f"![{table['title']}]({picture})"]
    return "\n".join(lines).rstrip() + "\n"


def digest(table):
    return hashlib.blake2b(json.dumps(table, sort_keys=True).encode(), digest_size=8).hexdigest()


def draw(table, path):
    """One picture a table: curves with a band of one standard deviation, or points with a line of it. -> drawn or not; the table's digest stands in the file."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullFormatter
    drawn = table.get("drawn")
    if table["draw"] == "curves":
        rows = [row for n, row in enumerate(table["rows"]) if (drawn is None or n in drawn) and any(isinstance(cell, dict) for cell in row["cells"]) and "ours - paper" not in row["label"]]
        x = [float("".join(c for c in column if c.isdigit() or c == ".")) for column in table["columns"]]
        figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
        for n, row in enumerate(rows):
            points = [(at, cell["mean"], cell["std"] or 0) for at, cell in zip(x, row["cells"]) if isinstance(cell, dict)]
            at, mean, std = map(list, zip(*points))
            color, marker = f"C{n}", "os^vDP*X"[n % 8]
            axes.plot(at, mean, color=color, marker=marker, markersize=4, label=row["label"])
            axes.fill_between(at, [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)], color=color, alpha=0.25, linewidth=0)
            if row["label"] in table.get("level", {}):
                axes.axhline(table["level"][row["label"]]["mean"], color=color, linestyle=":", linewidth=1, label=f"{row['label']}, zero-shot")
        if table.get("logarithmic"):
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(FixedLocator([]))
        if table.get("y"):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(x, [column.replace("all ", "") for column in table["columns"]], fontsize=8)
        axes.set(xlabel=table["x"], ylabel=table.get("y", "mAP, %"))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    else:  # points: bars would have to start at 0
        columns = [n for n in (drawn or range(len(table["columns"]))) if any(isinstance(row["cells"][n], dict) for row in table["rows"])]
        rows = [row for row in table["rows"] if any(isinstance(row["cells"][n], dict) for n in columns) and "ours - paper" not in row["label"]]
        figure, axes = plt.subplots(figsize=(7, 1.1 + 0.22 * len(rows) * (len(columns) + 0.6)), dpi=110)
        for k, n in enumerate(columns):
            points = [(at + (k - (len(columns) - 1) / 2) * 0.5 / len(columns), row["cells"][n]) for at, row in enumerate(rows) if isinstance(row["cells"][n], dict)]
            axes.errorbar([cell["mean"] for _, cell in points], [at for at, _ in points], xerr=[cell["std"] or 0 for _, cell in points], fmt="os^vDP"[k % 6], color=f"C{k}", markersize=5, capsize=2,
                          label=table["columns"][n])
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(table.get("x", "mAP, %"))
        axes.grid(alpha=0.3)
        if len(columns) > 1:
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.6 / figure.get_figheight()), ncols=len(columns))
    axes.set_title(table["title"], fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Description": digest(table)}, bbox_inches="tight")
    plt.close(figure)
    data.write_atomically(path, stream.getvalue())
    return True


def write_results(folder, root, runs, states, settings):
    """results/tables.json and tables.md -> the tables"""
    results = {run.name: states[run.name][2] for run in runs if states[run.name][2]}
    brief = {"missing": "not run: no data", "too long": "not run: too long for this machine", "to do": "not run yet", "failed": "failed", "stale": "not run: other settings in its folder", "not asked for": "not run (ONLY)"}
    why = {run.name: brief.get(states[run.name][0], "not run") for run in runs if run.name not in results}
    tables = make_tables(runs, results, why)
    behind = {}
    for run in runs:
        state, reason, result = states[run.name]
        entry = {"state": state, "reason": reason, "dataset": run.dataset}
        if result:
            path = root / run.name / ("benchmark.json" if run.script == "tests/benchmark.py" else "metrics.json")
            entry.update(metrics=os.path.relpath(path, REPOSITORY), command=result.get("command", f"python {run.script} {shlex.join(run.words)}"), commit=result.get("commit"), seeds=result.get("seeds"),
                         device=result.get("device") or result["machine"]["processor"], seconds=result.get("seconds") or round(60 * result["machine"]["minutes"], 1), versions=result.get("versions"), policy=result.get("policy"))
        behind[run.name] = entry
    record = {"settings": {"SEEDS": settings.seeds, "CLIP": settings.clip, "OPTIONS": settings.options}, "tables": tables, "runs": behind}
    data.write_json(folder / "tables.json", record)

    def link(name):
        return os.path.relpath(REPOSITORY / behind[name]["metrics"], folder.resolve())

    lines = ["# Tables", "", f"Made by `bash run_all.sh`, seeds {' '.join(settings.seeds)}{', CLIP=' + shlex.quote(shlex.join(settings.clip)) if settings.clip else ''}"
             f"{', OPTIONS=' + shlex.quote(shlex.join(settings.options)) if settings.options else ''}, datasets under {settings.data_root}. Percent; mean ± sample standard deviation over seeds; every number of ours links to the metrics.json behind it. "
             f"\"{UNREAD}\": the paper's number was not read; assets/paper_numbers.json is where it goes.", ""]
    for table in tables:
        picture = folder / f"{table['name']}.png"
        lines.append(as_markdown(table, link, picture.name if has_numbers(table) and picture.is_file() else None))
    done = [name for name, entry in behind.items() if entry["state"] == "done"]
    if commits := {behind[name]["commit"] for name in done if behind[name]["commit"]}:
        lines += ["### Behind the numbers", ""] + (["**The runs are of different commits**: bash run_all.sh --overwrite makes them of one.", ""] if len(commits) > 1 else [])
        lines += ["| run | command | commit | seeds | on | minutes |", "|---|---|---|---|---|---|"]
        lines += [f"| [{name}]({link(name)}) | `{behind[name]['command']}` | {(behind[name]['commit'] or '')[:12]}{'+' * str(behind[name]['commit']).endswith('+')} | {' '.join(map(str, behind[name]['seeds'] or []))} | {behind[name]['device']} | "
                  f"{behind[name]['seconds'] / 60:.1f} |" for name in done] + ["", "A + marks a working tree with changes that are not committed.", ""]
    lacking = {}
    for name, entry in behind.items():
        if entry["state"] != "done" and entry["reason"]:
            lacking.setdefault(entry["reason"], []).append(name)
    if lacking:
        lines += ["### Not run", ""] + [f"- {', '.join(names)}: {reason}" for reason, names in lacking.items()] + [""]
    data.write_atomically(folder / "tables.md", "\n".join(lines))
    return tables


def draw_all(folder, tables):
    """A picture for each table with numbers, unless the one there is of these numbers."""
    from PIL import Image
    for table in tables:
        path = folder / f"{table['name']}.png"
        if not has_numbers(table):
            path.unlink(missing_ok=True)
            continue
        if path.is_file():
            with contextlib.suppress(OSError), Image.open(path) as image:
                if image.text.get("Description") == digest(table):
                    continue
            path.unlink()
        if not draw(table, path):
            say("no pictures of the tables: they need matplotlib (pip install matplotlib)")
            return


# --- run --------------------------------------------------------------------------------------------------------------

def print_plan(runs, states, settings):
    here = [run for run in runs if states[run.name][0] == "to do"]
    done = sum(states[run.name][0] == "done" for run in runs)
    left = [run for run in runs if states[run.name][0] not in ("to do", "done", "not asked for") and chosen(run, settings.only)]
    print(f"plan: {len(here)} runs to do, about {sum(run.minutes for run in here):,.0f} minutes on two CPU cores; {done} done before; {len(left)} cannot be run"
          + (f"; {len(runs) - len(here) - done - len(left)} not asked for (ONLY)" if settings.only else ""))
    if here:
        print(f"\n  {'to do':<32}{'CPU, min':>10}{'GPU, min':>10}   for")
        for run in here:
            print(f"  {run.name:<32}{run.minutes:>10,.1f}{gpu_minutes(run):>10,.1f}   {', '.join(run.tables)}")
        print("  CPU: measured for what needs no dataset, computed from measured parts for photographs. GPU: computed (a hundredth of the CPU's time, photos decoded at 200 a second; 0.2 at least), never measured." + " OPTIONS and CLIP are not counted in." * bool(settings.options or settings.clip))
    reasons = {}
    for run in left:
        reasons.setdefault((states[run.name][0], states[run.name][1]), []).append(run)
    if reasons:
        print("\n  cannot be run")
        for (state, reason), those in reasons.items():
            names = ", ".join(run.name for run in those) if len(those) < 4 else f"{len(those)} runs"
            datasets = list(dict.fromkeys(SHOWN[run.dataset] for run in those if run.dataset in SHOWN))
            print(f"  - {', '.join(datasets) if state == 'missing' else state}: {names}\n      " + reason.replace("; ", "\n      "))
    print(flush=True)


def execute(run, folder, overwrite, lock):
    """One run as a process of its own, its words in <folder>.log -> None, or the line that says why it failed"""
    log = folder.with_name(folder.name + ".log")
    again = (overwrite or (folder / "metrics.json").is_file()) and run.script != "tests/benchmark.py"  # a metrics.json that is there all the same is damaged
    words = [*run.words, "--output", os.path.relpath(folder, REPOSITORY), *["--overwrite"] * again]
    with open(log, "ab") as said:
        start = said.tell()
        # the lock goes along: where this program is killed, its successor waits for the run that was left alone
        process = subprocess.Popen([sys.executable, run.script, *words], cwd=REPOSITORY, stdout=said, stderr=said, pass_fds=[lock.fileno()] if os.name == "posix" else [])
        try:
            code = process.wait()
        except BaseException as stop:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if isinstance(stop, KeyboardInterrupt):  # it got its own, and saves what it has
                    process.wait(10)
            process.terminate()
            process.wait()
            raise
    if code:
        lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        return (lines or ["no word"])[-1][:300] + f" (exit code {code}; {os.path.relpath(log, REPOSITORY)})", code
    return None, 0


def take_lock(root):
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".lock", "ab")
    except OSError as error:
        raise UsageError(f"cannot write {root}: {error.strerror}") from None
    try:
        import fcntl
    except ImportError:  # Windows: nothing keeps two at once apart
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        say(f"another run_all.sh, or a run that one left behind, is at work in {root}: waiting for it (Ctrl-C gives up)")
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run_all.sh", description="Every table: the plan, the runs that are not done yet, results/tables.md. The environment variables: bash run_all.sh help.")
    parser.add_argument("--plan", action="store_true", help="only say what would be run, and what cannot be")
    parser.add_argument("--overwrite", action="store_true", help="do finished runs again")
    parser.add_argument("--readme", action="store_true", help="write the README's block, assets/tables.json and assets/tables/*.png from results/tables.json")
    parser.add_argument("--runs", default="runs/tables", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--results", default="results", help="folder of the tables (default: %(default)s)")
    args = parser.parse_args(argv)
    results = Path(args.results)
    if args.readme:
        return write_readme(results)
    settings = settings_from(os.environ)
    paper_numbers()
    root = REPOSITORY / args.runs
    if (settings.seeds, settings.clip, settings.options) != (["0", "1", "2"], [], []):  # another setting, other folders, so that neither loses the other's numbers
        variant = hashlib.blake2b(repr((settings.seeds, settings.clip, settings.options)).encode(), digest_size=4).hexdigest()
        root, results = root / variant, results / variant
    counts, missing = look_for_data(settings)
    runs = all_runs(settings, counts)
    known = sorted({word for run in runs for word in (run.name, run.dataset, *run.tables)} - {"none"})
    if unknown := [word for word in settings.only if word not in known]:
        near, names = difflib.get_close_matches(unknown[0], known, 3), sorted({table for run in runs for table in run.tables})
        raise UsageError(f"ONLY={unknown[0]}: no such table, dataset or run; {'did you mean ' + ', '.join(near) + '?' if near else 'the tables are ' + ', '.join(names) + '; the datasets ' + ', '.join(PHOTO_SETS)}")

    def states_now(overwrite=False):
        states = {}
        for run in runs:
            states[run.name] = state_of(run, root / run.name, settings, missing, overwrite and chosen(run, settings.only))
            if states[run.name][0] not in ("done", "missing") and not chosen(run, settings.only):
                states[run.name] = ("not asked for", None, None)
        return states

    for run in runs:
        if chosen(run, settings.only):
            config_of(run, root / run.name)
    if not args.plan:
        data.write_atomically(results / ".writable", "")  # said before hours are spent, not after
        (results / ".writable").unlink()
    lock = None if args.plan else take_lock(root)
    states = states_now(args.overwrite)
    print_plan(runs, states, settings)
    if args.plan:
        return 0
    todo = [run for run in runs if states[run.name][0] == "to do"]
    code = 0
    if args.overwrite:
        states = states_now()  # until a run is done again, its old numbers stand
    whole = {(run.script, run.dataset): sum(other.minutes for other in todo if (other.script, other.dataset) == (run.script, run.dataset)) for run in todo}
    todo.sort(key=lambda run: whole[run.script, run.dataset])  # what is quick is not kept waiting; a dataset's first run fills the cache for the others
    for position, run in enumerate(todo):
        print(f"[{position + 1}/{len(todo)}] {run.name}, about {run.minutes:,.1f} min ... ", end="", flush=True)
        began = time.time()
        reason, failed = execute(run, root / run.name, args.overwrite, lock)
        if reason:
            states[run.name], code = ("failed", reason, None), code or failed
            print(f"failed: {reason}", flush=True)
        else:
            states[run.name] = ("done", None, result_of(run, root / run.name))
            result = states[run.name][2]
            print((f"mAP {result['mAP']:.2f}" + f" ± {result['mAP_std']:.2f}" * (len(result["seeds"]) > 1) + ", " if result.get("mAP") is not None else "") + f"{(time.time() - began) / 60:.1f} min", flush=True)
        write_results(results, root, runs, states, settings)
    tables = write_results(results, root, runs, states, settings)
    draw_all(results, tables)
    tables = write_results(results, root, runs, states, settings)
    stale = [run.name for run in runs if states[run.name][0] == "stale"]
    print(f"\n{results / 'tables.md'}, {results / 'tables.json'}: {sum(state[0] == 'done' for state in states.values())} of {len(runs)} runs done"
          + (f"; not run, for a run with other settings is there (see the plan above): {', '.join(stale)}" if stale else ""))
    nothing = settings.only and not any(states[run.name][0] == "done" for run in runs if chosen(run, settings.only))
    return code or (2 if stale or nothing else 0)


# --- the README's block -----------------------------------------------------------------------------------------------

BEGIN, END = "<!-- tables: python tests/tables.py --readme -->\n", "<!-- end of tables -->\n"


def readme_block(record):
    """The README's part of what results/tables.json holds -> str"""
    runs = {name: entry for name, entry in record["runs"].items() if entry["state"] == "done"}
    commits = sorted({entry["commit"][:12] for entry in runs.values() if entry["commit"]})
    lines = [f"`bash run_all.sh`, seeds {' '.join(record['settings']['SEEDS'])}, {len(runs)} runs, {sum(entry['seconds'] for entry in runs.values()) / 60:.0f} minutes on two CPU cores; commit{'s' * (len(commits) > 1)} {', '.join(commits)}. "
             "Percent, mean ± sample standard deviation over seeds. `results/tables.md`, which the same command writes, links every number to its `metrics.json` and shows the tables below that have none here yet.", ""]
    empty = [table for table in record["tables"] if not has_numbers(table)]
    for table in record["tables"]:
        if has_numbers(table):
            lines.append(as_markdown(table, None, f"assets/tables/{table['name']}.png"))
    lines.append(f"Not one number of ours yet, for want of the datasets: {'; '.join(table['title'] for table in empty)}.\n" if empty else "")
    return BEGIN + "\n" + "\n".join(lines) + END


def write_readme(results):
    record = data.read_json(results / "tables.json", "tables")
    if record["settings"] != {"SEEDS": ["0", "1", "2"], "CLIP": [], "OPTIONS": []}:
        raise UsageError(f"{results / 'tables.json'} was made with other settings than the README's; run bash run_all.sh without SEEDS, CLIP and OPTIONS")
    if changed := [name for name, entry in record["runs"].items() if (entry.get("commit") or "").endswith("+")]:
        say(f"made with changes that are not committed: {', '.join(changed)}")
    data.write_json(REPOSITORY / "assets" / "tables.json", record)
    draw_all(REPOSITORY / "assets" / "tables", record["tables"])
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    data.write_atomically(REPOSITORY / "README.md", readme[:readme.index(BEGIN)] + readme_block(record) + readme[readme.index(END) + len(END):])
    print("README.md, assets/tables.json and assets/tables/*.png are written")
    return 0


if __name__ == "__main__":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except UsageError as error:
        say(f"run_all.sh: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("\nrun_all.sh: interrupted; the same command goes on")
        sys.exit(130)
