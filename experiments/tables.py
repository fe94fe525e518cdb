"""What the runs of run_all.sh left, as tables. A number is read from a run's metrics.json, never kept beside it.

    python experiments/tables.py            runs/tables -> results/tables.md; a missing cell holds the reason
    python experiments/tables.py --docs     its finished runs -> assets/tables.json; that file -> the tables' places in
                                            docs/{results,probabilities}.md and, where matplotlib is installed, the
                                            pictures of assets/tables
    python experiments/tables.py --demo D   the table of `bash run_all.sh demo`, of what is there of its runs

Percent; mean and sample standard deviation over seeds. What somebody has read elsewhere: assets/paper_numbers.json.
"""
import argparse
import json
import re
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import data
from data import UsageError
from run import exit_codes

ASSETS = REPOSITORY / "assets"
RECORD = ASSETS / "tables.json"
PAPERS = ASSETS / "paper_numbers.json"
DOCS = [REPOSITORY / "docs" / name for name in ("results.md", "probabilities.md")]
SETS = ("scenes", "features", *data.DATASETS[1:])
NO_NOISE = "--noise-std-0"  # a run's name ends in the options that set it apart from the run before it
STRENGTHS = {0: NO_NOISE, 0.05: "--noise-std-0.05", 0.1: "--noise-std-0.1", 0.15: "", 0.2: "--noise-std-0.2"}
TEXT_COUNTS = (250, 500, 1000, 2000, 4000, 8000)
PHOTO_COUNTS = (50, 100, 250, 500, 1000, 4000, 20000)
LABEL_COUNTS = (20, 40, 80, 160, 320)  # of the costs
ABLATIONS = {
    "": "SSPA", "--fusion-knowledge": "knowledge prompts only", "--fusion-context": "context prompts only",
    "--fusion-sum": "prompts summed", "--fusion-concat": "prompts concatenated", "--no-dsf": "no DSF",
    "--no-gate": "no gate", "--alignment-v-to-s": "V-to-S only", "--alignment-s-to-v": "S-to-V only",
    "--alignment-none": "no GDMA", "--descriptions-none": "no LLM description", "--aggregator-mean": "mean aggregator",
    "--aggregator-max": "max aggregator", "--branches-global": "global branch only",
    "--branches-regional": "regional branch only"}
MAPS = ("zero-shot cosine of regions", "DSF attention", "similarity after GDMA", "S-to-V attention", "V-to-S attention",
        "gradient x region")
METRICS = {  # title of a column: where a run of metrics.json keeps the number, a/b: b in a
    "mAP": "mAP", "mAP, interpolated": "mAP_interpolated", "mAP, global branch": "mAP_global",
    "mAP, regional branch": "mAP_regional", "CF1": "threshold_0.5/CF1", "OF1": "threshold_0.5/OF1",
    "CF1, top 3": "top_3/CF1", "OF1, top 3": "top_3/OF1", "mA": "attributes/mA", "accuracy": "attributes/accuracy",
    "precision": "attributes/precision", "recall": "attributes/recall", "F1": "attributes/F1"}
CHANCES = {  # likewise, of docs/probabilities.md
    "calibration error, score": "score/calibration error", "probability": "probability/calibration error",
    "Brier x 100, score": "score/Brier", "Brier x 100, probability": "probability/Brier",
    "macro F1, score > 0.5": "threshold_0.5/macro F1", "macro F1, label-free": "label_free/macro F1",
    "micro F1, score > 0.5": "threshold_0.5/OF1", "micro F1, label-free": "label_free/OF1"}
OTHERS = {  # runs of RP whose probabilities are looked at: end of the name, words
    "": "", "--gamma-neg-0": ", gamma- 0", "--gamma-neg-1": ", gamma- 1", "--gamma-neg-2": ", gamma- 2",
    "--clip-0.05": ", clip 0.05", "--focal-gradient-stopped": ", focal gradient stopped", "--loss-bce": ", bce",
    "-250-texts": "", "-templates": ", template sentences", "-first-1": ", one label", "-first-2": ", two labels",
    "-first-4": ", four labels", "-toy": ", toy CLIP"}
TOWERS = {"": "", "-short": "", "-tuned-short": ", tuned", "-toy": ", toy CLIP", "-toy-tuned": ", toy CLIP, tuned"}
CURVES = {"rp-features": "RP, photo features", "rp-scenes": "RP, scenes", "sspa-scenes-short": "SSPA, scenes"}
COSTS = ("prompt tuning, ms a step", "adapter, ms a step", "ratio of the times", "ratio of the multiplications")
PUBLISHED = ("dataset", "metric", "value", "method", "backbone", "source", "note")  # of a cell of paper_numbers.json


class Table(NamedTuple):
    title: str
    columns: list  # words or numbers
    rows: list     # [label, cell, cell, ...]; a cell is [mean, std], words, a number, or "" where none is expected
    note: str = ""


# --- what the runs left: facts, and "numbers": {metric: [mean, std] or None} ------------------------------------------
def summary(values):
    """[mean, sample standard deviation, None for a single value], or None where one is undefined"""
    if None in values:
        return None
    if len(values) == 1:
        return [values[0], None]
    return [mean(values), stdev(values)]


def facts_of(result, tested_on, numbers):
    facts = {name: result[name] for name in ("command", "commit", "device", "seconds")}
    return {**facts, "tested on": tested_on, "numbers": numbers}


def read_run(result):
    """metrics.json of a finished run. Raises ValueError for another."""
    if not result["finished"]:
        raise ValueError("not finished")
    runs = result["runs"]
    numbers = {}
    for title, place in [*METRICS.items(), *CHANCES.items()]:
        group, _, key = place.rpartition("/")
        numbers[title] = summary([run.get(group, run).get(key) for run in runs])
    numbers["zero-shot mAP"] = summary([result["zero_shot_mAP"]])
    numbers["linear probe mAP"] = summary([result["linear_probe_mAP"]])
    labels = result["per_class"]
    for title, learnt in (("seen", True), ("unseen", False)):
        rows = [row for row, label in enumerate(labels) if label["trained"] == learnt]
        if 0 < len(rows) < len(labels):
            numbers[title] = summary([mean(run["ap"][row] for row in rows) for run in runs])
            numbers[f"{title}, zero-shot"] = [mean(labels[row]["zero_shot_ap"] for row in rows), None]
    trained = "{train_count:,} photos, {config[epochs]} epochs"
    if result["method"] == "rp":
        trained = "{text_count:,} texts"
    tested = "{photo_count:,} photos, {label_count} labels, {backbone}; {policy}"
    facts = facts_of(result, tested.format(**result), numbers)
    curves = {name: runs[0][name] for name in ("score", "probability") if name in runs[0]}
    return {**facts, "seeds": result["seeds"], "trained on": trained.format(**result), "curves": curves}


def read_benchmark(result):
    """benchmark.json of `benchmark.py cost`"""
    machine = result["machine"]
    numbers = {}
    for row in result["rows"]:
        products = row["multiplications_reference"] / row["multiplications_fused"]
        values = (row["reference_ms"], row["fused_ms"], row["ratio"], products)
        for title, value in zip(COSTS, values, strict=True):
            numbers[f"{title}, {row['shape']}"] = [value, None]
    return {"command": "python experiments/benchmark.py cost", "commit": machine["commit"],
            "device": machine["processor"], "seconds": 60 * machine["minutes"], "numbers": numbers}


def read_maps(result):
    """localize.json: hits of the pointing game of each map"""
    models = result["models"]
    numbers = {}
    for name in models[0]["maps"]:
        numbers[name] = summary([model["maps"][name]["pointing"] for model in models])
    return facts_of(result, "{asked:,} things in {photos:,} photos".format(**models[0]), numbers)


def read_thresholds(result):
    """thresholds.json: macro and micro F1 of each way to choose them"""
    numbers = {}
    for way, pairs in result["values"].items():
        for kind, values in zip(("macro", "micro"), zip(*pairs, strict=True), strict=True):
            numbers[f"{kind} F1, {way}"] = summary(values)
    return facts_of(result, result["dataset"], numbers)


def read_baselines(result):
    """baselines.json: mAP of each baseline"""
    numbers = {}
    for one in result["runs"]:
        numbers.setdefault(one["name"], []).append(one["mAP"])
    numbers = {name: summary(values) for name, values in numbers.items()}
    return facts_of(result, "{texts:,} texts, {photos:,} photos".format(**result), numbers)


READERS = {"metrics.json": read_run, "benchmark.json": read_benchmark, "localize.json": read_maps,
           "baselines.json": read_baselines, "thresholds.json": read_thresholds}


def look(folder):
    """All that a folder of runs holds -> {run: what a reader gives, or {"reason": one line}}"""
    runs = {}
    for name, read in READERS.items():
        for path in folder.glob(f"*/{name}"):
            try:
                with data.reading(path, "run", "bash run_all.sh goes on with it"):
                    runs[path.parent.name] = read(json.loads(path.read_text("utf-8")))
            except UsageError as error:
                runs[path.parent.name] = {"reason": str(error)}
    for path in folder.glob("*.reason"):
        reason = re.sub(r"^\S+\.py: ", "", data.read_text(path, "reason").strip())
        runs[path.stem] = {"reason": reason or f"failed; see {path.with_suffix('.log')}"}
    return dict(sorted(runs.items()))


def read_papers(path):
    """The flat list of numbers that somebody has read -> rows. Raises UsageError for one without a source."""
    rows = []
    with data.reading(path, "paper numbers", f"an entry has {', '.join(PUBLISHED)}; mend it"):
        for entry, cell in enumerate(json.loads(path.read_text("utf-8")), 1):
            if not cell["source"].strip() or cell["dataset"] not in SETS:
                raise ValueError(f"entry {entry} must have a source and a known dataset")
            if type(cell["value"]) not in (int, float) or not 1 <= cell["value"] <= 100:
                raise ValueError(f"entry {entry} must be a number in percent (60.5, not 0.605)")
            rows.append([cell[key] for key in PUBLISHED])
    return rows


# --- tables; rows without anything are left out of them in the end ----------------------------------------------------
def number(runs, place):
    """place: "RUN/METRIC", or "RUN": its mAP -> cell: [mean, std], or why there is none; "" where none is expected"""
    name, _, metric = place.partition("/")
    run = runs.get(name, {"numbers": {}})
    if "reason" in run:
        return textwrap.shorten(run["reason"], 80, placeholder=" ...")
    cell = run["numbers"].get(metric or "mAP", "")
    if cell is None:
        return "undefined"
    return cell


def grid(runs, method, kinds, columns):
    """A row for every dataset and kind of run -> rows. kinds: {end of a run's name: words}; columns: ends of places"""
    rows = []
    for dataset in SETS:
        for suffix, words in kinds.items():
            name = f"{method}-{dataset}{suffix}"
            label = dataset + words
            if "trained on" in runs.get(name, ()):
                label += f" ({runs[name]['trained on']})"
            rows.append([label, *(number(runs, name + end) for end in columns)])
    return rows


def rp_main(runs):
    columns = {"zero-shot": "/zero-shot mAP", "linear probe of the texts": "/linear probe mAP", "no noise": NO_NOISE,
               "noise 0.15": "", "noise 0.15, interpolated AP": "/mAP, interpolated"}
    rows = grid(runs, "rp", {"": "", "-llm": ", sentences of a language model"}, columns.values())
    return Table("RP: an adapter that learnt from texts alone, mAP on photos", columns, rows,
                 'Zero-shot: the cosine with "a photo of a {name}.".')


def rp_baselines(runs):
    rows = [[name, number(runs, f"baselines/{name}")] for name in runs.get("baselines", {}).get("numbers", ())]
    if rows:
        rows += [["RP, no noise", number(runs, "rp-features" + NO_NOISE)],
                 ["RP, noise 0.15, drawn anew in every step", number(runs, "rp-features")]]
    return Table("What one would try first, on the same texts and photos (features), mAP", ["mAP"], rows)


def rp_noise(runs):
    rows = grid(runs, "rp", {"": ", raw", "-unit": ", unit length"}, STRENGTHS.values())
    return Table("RP: strength of the noise, times the mean text norm, mAP", STRENGTHS, rows)


def rp_law(runs):
    columns = {"gaussian": "", "uniform": "-uniform", "sphere": "-sphere", "none": NO_NOISE}
    return Table("RP: law of the noise, mAP", columns, grid(runs, "rp", {"": ""}, columns.values()))


def rp_texts(runs):
    suffixes = [f"-{count}-texts" for count in TEXT_COUNTS]
    suffixes.append("")
    rows = []
    for words, end in (("", ""), (", no noise", NO_NOISE), (", linear probe", "/linear probe mAP")):
        rows += grid(runs, "rp", {"": words}, [suffix + end for suffix in suffixes])
    return Table("RP: number of texts, as many steps for each, mAP", [*TEXT_COUNTS, "all"], rows)


def rp_cost(runs):
    rows = [[title, *(number(runs, f"rp-cost/{title}, C={count}") for count in LABEL_COUNTS)] for title in COSTS]
    return Table("RP: cost of a training step against the number of labels", LABEL_COUNTS, rows,
                 "Prompt tuning in TaI-DPT's form, through ViT-B-32's text encoder, on the CPU; the same batch of 512 "
                 "and the same loss.")


def sspa_main(runs):
    titles = ["zero-shot mAP", "linear probe mAP", *METRICS]
    kinds = {"": ", image tower frozen", "-short": ", image tower frozen", "-tuned": ", image tower tuned"}
    return Table("SSPA: the full method", titles, grid(runs, "sspa", kinds, [f"/{title}" for title in titles]))


def sspa_photos(runs):
    names = [f"sspa-scenes-{count}-photos" for count in PHOTO_COUNTS[:-1]]
    names.append("sspa-scenes")
    rows = []
    for label, metric in (("SSPA, image tower frozen", "mAP"),
                          ("linear probe of the same features", "linear probe mAP"), ("zero-shot", "zero-shot mAP")):
        rows.append([label, *(number(runs, f"{name}/{metric}") for name in names)])
    return Table("SSPA: number of labelled photos, scenes, mAP", PHOTO_COUNTS, rows)


def sspa_ablations(runs):
    """mAP, and hits of the two maps that explain.py draws, for each setting that has ablations"""
    settings = {"scenes-short": "scenes, tower frozen", "scenes-tuned-short": "scenes, tower tuned"}
    for dataset in SETS[2:]:
        settings[f"{dataset}-tuned"] = f"{dataset}, tower tuned"
    rows = [[words] for words in ABLATIONS.values()]
    columns = []
    for name, words in settings.items():
        if not any(run.startswith(f"sspa-{name}--") for run in runs):
            continue
        columns += [f"{words}: mAP", "against the full method", f"hits of {MAPS[1]}", f"hits of {MAPS[2]}"]
        full = number(runs, f"sspa-{name}")
        for row, ablation in zip(rows, ABLATIONS, strict=True):
            own = number(runs, f"sspa-{name}{ablation}")
            gain = ""
            if ablation and isinstance(own, list) and isinstance(full, list):
                gain = f"{own[0] - full[0]:+.2f}"
            row += [own, gain, *(number(runs, f"maps-{name}{ablation}/{map_}") for map_ in MAPS[1:3])]
    return Table("SSPA: what each part is worth", columns, rows)


def sspa_maps(runs):
    """Whether longer training, a tuned tower or the gate makes maps truer"""
    kinds = {"scenes": "SSPA: frozen, 20,000 photos, 20 epochs", "scenes-short": "SSPA: frozen, 4,000, 8",
             "scenes-short--no-gate": "no gate: frozen, 4,000, 8", "scenes-tuned": "SSPA: tuned, 4,000, 8",
             "scenes-tuned-short": "SSPA: tuned, 1,000, 8", "scenes-tuned-short--no-gate": "no gate: tuned, 1,000, 8"}
    rows = []
    for name, words in kinds.items():
        rows.append([words, number(runs, f"sspa-{name}"), *(number(runs, f"maps-{name}/{map_}") for map_ in MAPS)])
    return Table("SSPA: where its maps point, scenes, hits of the pointing game", ["mAP", *MAPS], rows)


def probabilities(runs):
    ends = [f"/{title}" for title in CHANCES]
    rows = []
    for method, kinds in (("rp", OTHERS), ("sspa", TOWERS)):
        for label, *cells in grid(runs, method, kinds, ends):
            rows.append([f"{method.upper()}, {label}", *cells])
    return Table("What scores and probabilities are worth, percent", CHANCES, rows)


def thresholds(runs):
    """Macro and micro F1 of ways to choose thresholds"""
    places = [f"thresholds-{dataset}/{kind} F1" for dataset in ("features", "scenes") for kind in ("macro", "micro")]
    ways = dict.fromkeys(name.partition(", ")[2] for run in ("thresholds-features", "thresholds-scenes")
                         for name in runs.get(run, {"numbers": ()}).get("numbers", ()))
    rows = [[way, *(number(runs, f"{place}, {way}") for place in places)] for way in ways]
    columns = ["features, macro F1", "features, micro F1", "scenes, macro F1", "scenes, micro F1"]
    return Table("RP: ways to choose thresholds", columns, rows)


def unseen(runs):
    titles = ["seen", "seen, zero-shot", "unseen", "unseen, zero-shot"]
    rows = []
    for name, words in (("rp-scenes", "RP, scenes"), ("rp-features", "RP, features"), ("sspa-scenes", "SSPA, scenes")):
        for third in range(3):
            cells = [number(runs, f"{name}-unseen-{third}/{title}") for title in titles]
            rows.append([f"{words}, without third {third + 1}", *cells])
    return Table("Labels that training never saw, mAP", titles, rows)


def published(runs):
    """What somebody has read, ours among it; by dataset and metric, the smallest number first."""
    rows = read_papers(PAPERS)
    unread = {"RP", "SSPA"} - {row[3] for row in rows}
    note = " ".join(f"The own numbers of {method}'s paper were not at hand." for method in sorted(unread))
    for dataset, metric in {tuple(row[:2]) for row in rows}:
        for name in (f"rp-{dataset}", f"sspa-{dataset}", f"sspa-{dataset}-tuned"):
            own = number(runs, f"{name}/{metric}")
            if isinstance(own, list):
                method = name.split("-")[0].upper()
                rows.append([dataset, metric, round(own[0], 2), f"{method}, ours", "", f"run {name}", ""])
    rows.sort(key=lambda row: (SETS.index(row[0]), *row[1:3]))
    return Table("Published numbers, for orientation", PUBLISHED[1:], rows, note)


def behind(runs):
    """The command behind every number; several runs of one command have one row"""
    rows = {}
    for name, run in runs.items():
        if "reason" in run:
            rows[name] = [name, f"not done: {run['reason']}", "", "", "", ""]
        else:
            minutes = f"{run['seconds'] / 60:.1f}"
            cells = [f"`{run['command']}`", run.get("tested on", ""), run["commit"], run["device"], minutes]
            rows.setdefault(run["command"], [name, *cells])
    return Table("Behind the numbers", ["command", "tested on", "commit, + changes", "on", "minutes"], rows.values())


def tables_of(runs):
    """runs: what look gives -> {name: Table}, without rows that have nothing to say"""
    tables = {}
    for make in (rp_main, rp_baselines, rp_noise, rp_law, rp_texts, rp_cost, sspa_main, sspa_photos, sspa_ablations,
                 sspa_maps, probabilities, thresholds, unseen, published):
        table = make(runs)
        rows = [row for row in table.rows if any(row[1:])]
        tables[make.__name__.replace("_", "-")] = table._replace(rows=rows)
    tables["runs"] = behind(runs)
    return tables


# --- tables as pages and pictures -------------------------------------------------------------------------------------
def shown(cell):
    if isinstance(cell, str):
        return cell.replace("|", "/")
    if not isinstance(cell, list):
        return f"{cell:,}"
    average, std = cell
    text = f"{average:.2f}"
    if average > 100:
        text = f"{average:,.0f}"
    if std is not None:
        text += f" ± {std:.2f}"
    return text


def markdown(table):
    """-> str, without columns that have nothing to say"""
    columns = []
    for title, *cells in zip(["", *table.columns], *table.rows, strict=True):
        if any(cells):
            columns.append([shown(title), "---", *map(shown, cells)])
    lines = [f"| {' | '.join(line)} |" for line in zip(*columns, strict=True)]
    parts = [f"### {table.title}", "\n".join(lines)]
    if table.note:
        parts.append(table.note)
    return "\n\n".join(parts) + "\n"


def filled_in(text, tables):
    """docs/results.md with every table at its place, from <!-- table NAME --> to <!-- end --> -> str"""
    return re.sub(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)",
                  lambda place: place[1] + markdown(tables[place[2]]) + place[3], text, flags=re.S)


def draw(table, path):
    """A curve for each row over the columns that are numbers, with bars of one standard deviation."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), dpi=110)
    axes = figure.subplots()
    places = [column for column in table.columns if column != "all"]
    for label, *cells in table.rows:
        points = [(x, *cell) for x, cell in zip(places, cells, strict=False) if isinstance(cell, list)]
        axes.errorbar(*np.array(points, float).T, marker="o", markersize=4, capsize=2, label=label)
    if 0 not in places:
        axes.set_xscale("log")
    axes.set(title=table.title, xticks=places, xticklabels=places)
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight")


def draw_reliability(record, path):
    """For each model of CURVES, in bins of what is said: how often it is so, by score and by probability."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 3.6), dpi=110)
    for axes, (name, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for offset, (kind, curve) in enumerate(record[name]["curves"].items()):
            entries, said, present = np.array(curve["bins"]) + 1e-9
            axes.bar(said / entries + 0.02 * offset, present / entries, 0.02, label=kind)
        axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
        axes.set(title=title, xlabel="said", xlim=(0, 1.03), ylim=(0, 1))
    figure.axes[0].set_ylabel("share that is so")
    figure.axes[0].legend()
    figure.savefig(path, bbox_inches="tight")


def write_docs(folder):
    """Finished runs join those in the record, which is shown in docs/results.md and the pictures."""
    record = data.read_json(RECORD, "record of runs")
    record |= {name: run for name, run in look(folder).items() if "numbers" in run}
    for name, run in record.items():
        if name not in CURVES:
            run.pop("curves", None)
    tables = tables_of(record)
    for page in DOCS:
        data.write_atomically(page, filled_in(data.read_text(page, "page"), tables))
    data.write_json(RECORD, record)
    if find_spec("matplotlib"):
        for name in ("rp-noise", "rp-texts", "sspa-photos"):
            draw(tables[name], ASSETS / f"tables/{name}.png")
        draw_reliability(record, ASSETS / "tables/reliability.png")


def write_results(folder, path):
    runs = look(folder)
    if not runs:
        raise UsageError(f"{folder}: no run is there; bash run_all.sh makes them")
    parts = ["# Tables\n\nMade by `bash run_all.sh`. Percent; mean ± sample standard deviation over seeds.\n"]
    parts += [markdown(table) for table in tables_of(runs).values() if table.rows]
    data.write_atomically(path, "\n".join(parts))
    finished = sum("numbers" in run for run in runs.values())
    print(f"{path}: {finished} of {len(runs)} runs are finished")


# --- the demo's table -------------------------------------------------------------------------------------------------
def demo_row(label, learnt_from, result, metric="mAP"):
    """A line about a run: a baseline of it, or what it learnt, with F1s"""
    numbers = read_run(result)["numbers"]
    line = f"{label:<28}{learnt_from:<28}{numbers[metric][0]:8.2f}"
    if metric == "mAP":
        _, std = numbers["mAP"]
        deviation = " " * 6
        if std is not None:
            deviation = f" ±{std:4.2f}"
        line += f"{deviation}{numbers['CF1'][0]:8.1f}{numbers['OF1'][0]:8.1f}"
    print(line)


def demo(folder):
    """The table of `bash run_all.sh demo`, on stdout: RP's rows, and SSPA's where its run is there."""
    rp = data.read_json(folder / "rp/metrics.json", "result")
    sentences = f"{rp['text_count']:,} sentences"
    print(f"\nscenes: {rp['photo_count']:,} test pictures, {rp['label_count']} labels, toy CLIP; ± over "
          f"{len(rp['seeds'])} seeds\n\n{'':<28}{'learnt from':<28}{'mAP %':>14}{'CF1 %':>8}{'OF1 %':>8}")
    demo_row("zero-shot CLIP (cosine)", "nothing", rp, "zero-shot mAP")
    demo_row("linear probe, texts", sentences, rp, "linear probe mAP")
    demo_row("RP, no noise", sentences, data.read_json(folder / "rp-no-noise/metrics.json", "result"))
    demo_row("RP, noise 0.15", sentences, rp)
    if not (folder / "sspa/metrics.json").is_file():
        return
    sspa = data.read_json(folder / "sspa/metrics.json", "result")
    pictures = f"{sspa['train_count']:,} labelled pictures"
    demo_row("linear probe, features", pictures, sspa, "linear probe mAP")
    demo_row("SSPA, image tower frozen", pictures, sspa)
    print(f"\npictures: {folder}/rp/tags, {folder}/sspa/tags   (what each says of 12 pictures)\n"
          f"          {folder}/sspa/explain   (where SSPA saw it)      more: {folder}/{{rp,sspa}}/metrics.json")


def main(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default="runs/tables")
    parser.add_argument("--results", type=Path, default="results/tables.md")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--demo", type=Path)
    options = parser.parse_args(words)
    if options.demo:
        demo(options.demo)
    elif options.docs:
        write_docs(options.runs)
    else:
        write_results(options.runs, options.results)


if __name__ == "__main__":
    with exit_codes("tables.py") as arguments:
        main(arguments)
