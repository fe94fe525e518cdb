"""The results of run_all.sh's runs, as tables. A number is read from a run's metrics.json, never kept beside it.

    python experiments/tables.py            runs/tables -> its tables.md; a missing cell holds the reason
    python experiments/tables.py --docs     its finished runs, all of one clean commit -> assets/tables.json, the places
                                            of tables and numbers in README.md and docs/*.md and, where matplotlib is
                                            installed, the pictures of assets/tables
    python experiments/tables.py --check    exits with code 2 if these pages differ from that file
    python experiments/tables.py --demo D   the table of `bash run_all.sh demo`, from those of its runs that are there

Percent; mean and sample standard deviation over seeds, 95 % intervals over test photos (experiments/intervals.py).
Published numbers: assets/paper_numbers.json.
"""
import argparse
import json
import re
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import intervals

import data
from data import ASSETS, UsageError
from run import FIRST_TRIES, commit, exit_codes

RECORD = ASSETS / "tables.json"
PAPERS = ASSETS / "paper_numbers.json"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "docs/results.md", REPOSITORY / "docs/probabilities.md"]
SETS = {"scenes": "drawn scenes", "features": "features of photos", "ucm-toy": "UCM, toy CLIP",
        **{name: name for name in data.DATASETS[1:]}}
NOISES = {  # runs of RP; a run's name ends in the options that set it apart from the run before it
    0: "rp-{}--noise-std-0", 0.05: "rp-{}--noise-std-0.05", 0.1: "rp-{}--noise-std-0.1", 0.15: "rp-{}",
    0.2: "rp-{}--noise-std-0.2"}
BEST_PROBE = "baselines-{}/logistic regression, C by the test photos, 0 noisy copies"
BASELINES = {  # rows: words and place, {} for a set
    "zero-shot": "rp-{}/zero_shot_mAP",
    "zero-shot, both sides centred": "rp-{}/zero_shot_centred_mAP",
    "linear probe of the texts, C = 100": "rp-{}/linear_probe_mAP",
    "linear probe of the texts, the best of five C on these test photos": BEST_PROBE}
HEADLINE = {
    **BASELINES, "RP, no noise": NOISES[0], "RP": "rp-{}",
    "linear probe of labelled photos, C = 100": "sspa-{}/linear_probe_mAP", "SSPA, image tower frozen": "sspa-{}"}
LEARNT_FROM_TEXTS = {
    **BASELINES,
    "linear probe of the texts, C by a fifth of them": "baselines-{}/logistic regression, C by a fifth, 0 noisy copies",
    "the same, C = 100, four noisy copies": "baselines-{}/logistic regression, C=100, 4 noisy copies",
    "MLPClassifier": "baselines-{}/MLPClassifier, 10 epochs, 0 noisy copies",
    "MLPClassifier, four noisy copies": "baselines-{}/MLPClassifier, 10 epochs, 4 noisy copies",
    **{f"RP, noise {strength}": place for strength, place in NOISES.items()},
    "gain over 0.15 of the noise that a third of the test photos chooses, on the others":
        "rp-{}/gain of the chosen noise",
    "RP, sentences of a language model": "rp-{}-llm"}
ABLATIONS = {
    "--fusion-knowledge": "knowledge prompts only", "--fusion-context": "context prompts only",
    "--fusion-concat": "prompts concatenated", "--no-dsf": "no DSF", "--no-gate": "no gate",
    "--alignment-none": "no GDMA", "--descriptions-none": "no LLM description", "--aggregator-mean": "mean aggregator",
    "--branches-global": "global branch only"}
MAPS = ("zero-shot cosine of regions", "DSF attention", "similarity after GDMA", "S-to-V attention", "V-to-S attention",
        "gradient x region")
METRICS = {  # title of a column: where a run of metrics.json keeps the number, a/b: b in a
    "mAP": "mAP", "mAP, global branch": "mAP_global", "mAP, regional branch": "mAP_regional",
    "CF1": "threshold_0.5/CF1", "OF1": "threshold_0.5/OF1", "CF1, top 3": "top_3/CF1", "OF1, top 3": "top_3/OF1",
    "mA": "attributes/mA", "F1": "attributes/F1"}
CHANCES = {  # likewise, of docs/probabilities.md
    "calibration error, score": "score/calibration error", "probability": "probability/calibration error",
    "macro F1, score > 0.5": "threshold_0.5/macro F1", "macro F1, label-free": "label_free/macro F1",
    "micro F1, score > 0.5": "threshold_0.5/OF1", "micro F1, label-free": "label_free/OF1"}
TOWERS = {  # kinds of runs and words
    "sspa-{}": ", SSPA frozen", "sspa-{}-short": ", SSPA frozen", "sspa-{}-tuned": ", SSPA tuned"}
STATED = {  # those whose probabilities are looked at
    "rp-{}": ", RP", "rp-{}--gamma-neg-0": ", RP, gamma- 0 (bce)", "rp-{}-250-texts": ", RP",
    "rp-{}-templates": ", RP, template sentences", "rp-{}-descriptions": ", RP, descriptions as texts",
    "rp-{}-first-1": ", RP, one label", "rp-{}-first-4": ", RP, four labels", **TOWERS}
CURVES = {"rp-features": "RP, photo features", "rp-scenes": "RP, scenes", "sspa-scenes": "SSPA, scenes"}
CLAIMS = {  # words: place of a difference, {} for a set
    "RP: noise 0.15 against none": "rp-{} - rp-{}--noise-std-0",
    "RP against zero-shot": "rp-{} - rp-{}/zero_shot_mAP",
    "RP against zero-shot, both sides centred": "rp-{} - rp-{}/zero_shot_centred_mAP",
    "RP against the linear probe of the texts, C = 100": "rp-{} - rp-{}/linear_probe_mAP",
    "RP against the linear probe of the texts, the best C on these test photos": f"rp-{{}} - {BEST_PROBE}",
    "RP without noise against zero-shot": "rp-{}--noise-std-0 - rp-{}/zero_shot_mAP",
    "RP: raw against unit length": "rp-{} - rp-{}-unit",
    "RP without noise: raw against unit length": "rp-{}--noise-std-0 - rp-{}-unit--noise-std-0",
    "RP: gaussian against uniform noise": "rp-{} - rp-{}-uniform",
    "RP: gaussian noise against noise on a sphere": "rp-{} - rp-{}-sphere",
    "RP: all texts against 4,000": "rp-{} - rp-{}-4000-texts",
    "RP: all texts against 250": "rp-{} - rp-{}-250-texts",
    "RP: its sentences against template sentences": "rp-{} - rp-{}-templates",
    "RP: template sentences against descriptions": "rp-{} - rp-{}-descriptions",
    "RP, linear adapter: noise 0.15 against none": "rp-{}-linear - rp-{}-linear--noise-std-0",
    "RP: gamma- 4 against 0": "rp-{} - rp-{}--gamma-neg-0",
    "RP: thresholds without labels against a score above 0.5, macro F1":
        "rp-{}/macro F1, label-free - rp-{}/macro F1, score > 0.5",
    "SSPA against zero-shot": "sspa-{} - sspa-{}/zero_shot_mAP",
    "SSPA against the linear probe of the photos": "sspa-{} - sspa-{}/linear_probe_mAP",
    "SSPA: image tower tuned against frozen": "sspa-{}-tuned - sspa-{}",
    "SSPA: thresholds without labels against a score above 0.5, macro F1":
        "sspa-{}/macro F1, label-free - sspa-{}/macro F1, score > 0.5"}
PARTS = {f"SSPA, {title}: {words}": f"sspa-{{}}{setting}{end} - sspa-{{}}{setting}"
         for setting, title in {"-short": "2,000 photos", "-tuned": "image tower tuned"}.items()
         for end, words in ABLATIONS.items()}
COSTS = {"prompt tuning, ms a step": "reference_ms", "adapter, ms a step": "fused_ms", "ratio": "ratio"}  # columns
PUBLISHED = ("dataset", "metric", "value", "method", "backbone", "source", "note")  # of a cell of paper_numbers.json


class Table(NamedTuple):
    title: str
    columns: list  # words or numbers
    rows: list     # [label, cell, cell, ...]; a cell is [mean, std] or [mean, std, low, high], words, a number, or ""
    note: str = ""  # where none is expected
    intervals: bool = False  # shown


# --- what the runs left: facts, and "numbers": {metric: a cell or None} -----------------------------------------------
def summary(values):
    """[mean, sample standard deviation, None for a single value], or "undefined" where a value is"""
    if None in values:
        return "undefined"
    if len(values) == 1:
        return [values[0], None]
    return [mean(values), stdev(values)]


def facts_of(result, numbers):
    return {name: result[name] for name in ("command", "commit", "device", "seconds")} | {"numbers": numbers}


def read_run(result):
    """metrics.json of a finished run. Raises ValueError for another."""
    if not result["finished"]:
        raise ValueError("not finished")
    runs = result["runs"]
    numbers = {}
    for title, place in [*METRICS.items(), *CHANCES.items()]:
        group, _, key = place.rpartition("/")
        numbers[title] = summary([run.get(group, run).get(key) for run in runs])
    for name in FIRST_TRIES:
        numbers[f"{name}_mAP"] = summary([result.get(f"{name}_mAP")])
    labels = result["per_class"]
    for title, learnt in (("seen", True), ("unseen", False)):
        rows = [row for row, label in enumerate(labels) if label["trained"] == learnt]
        if 0 < len(rows) < len(labels):
            numbers[title] = summary([mean(run["ap"][row] for row in rows) for run in runs])
            numbers[f"{title}, zero-shot"] = [mean(labels[row]["zero_shot_ap"] for row in rows), None]
    trained = "{train_count:,} photos, {config[epochs]} epochs"
    if result["method"] == "rp":
        trained = "{text_count:,} texts"
    curves = {name: runs[0][name] for name in ("score", "probability") if name in runs[0]}
    return {**facts_of(result, numbers), "trained on": trained.format(**result), "curves": curves}


def read_cost(result):
    """benchmark.json of `benchmark.py cost`"""
    machine = result["machine"]
    numbers = {}
    for row in result["rows"]:
        for title, column in COSTS.items():
            numbers[f"{title}, {row['shape']}"] = [row[column], None]
    return {"command": "python experiments/benchmark.py cost", "commit": machine["commit"],
            "device": machine["processor"], "seconds": 60 * machine["minutes"], "numbers": numbers}


def read_maps(result):
    """localize.json: hits of the pointing game of each map"""
    models = result["models"]
    numbers = {}
    for name in models[0]["maps"]:
        numbers[name] = summary([model["maps"][name]["pointing"] for model in models])
    return facts_of(result, numbers)


def read_values(result):
    """baselines.json, curve.json: {name: mAPs}; thresholds.json: {name: [macro F1, micro F1] of each seed}"""
    numbers = {}
    for name, values in result["values"].items():
        numbers[name] = summary([np.ravel(value)[0].item() for value in values])
    return facts_of(result, numbers)


def write_values(path, argv, device, began, **results):
    """Writes what read_values reads, and more results, into baselines.json, curve.json or thresholds.json."""
    data.write_json(path, {
        "command": " ".join([f"python experiments/{path.stem}.py", *argv]), "commit": commit(), "device": str(device),
        "seconds": time.time() - began, **results})


READERS = {"metrics.json": read_run, "benchmark.json": read_cost, "localize.json": read_maps,
           "baselines.json": read_values, "thresholds.json": read_values, "curve.json": read_values}


def look(folder):
    """All that a folder of runs holds -> {run: what its reader returns, or {"reason": one line}}"""
    runs = {}
    for name, read in READERS.items():
        for path in folder.glob(f"*/{name}"):
            try:
                with data.reading(path, "run", "bash run_all.sh goes on with it"):
                    result = json.loads(path.read_text("utf-8"))
                    run = read(result)
                    scores = path.parent / "scores.safetensors"
                    if scores.is_file():
                        run["sampled"] = intervals.sampled(scores, result.get("config"))
            except UsageError as error:
                run = {"reason": str(error)}
            runs[path.parent.name] = run
    for path in folder.glob("*.reason"):
        reason = re.sub(r"^\S+\.py: ", "", data.read_text(path, "reason").strip())
        runs[path.stem] = {"reason": reason or f"failed; see {path.with_suffix('.log')}"}
    add_intervals(runs)
    return dict(sorted(runs.items()))


def add_intervals(runs):
    """Turns samples into numbers: intervals, differences, the noise that a third of the photos would choose."""
    places = {}
    for name, run in runs.items():
        for metric, values in run.pop("sampled", {}).items():
            cell = run["numbers"].get(metric)
            if isinstance(cell, list):
                cell += intervals.bounds(values.mean(0))
                places[f"{name}/{metric}"] = values
                if metric == "mAP":
                    places[name] = values
    for _, place in compared(CLAIMS | PARTS):
        one, other = place.split(" - ")
        if one in places and other in places:
            numbers = runs[one.partition("/")[0]]["numbers"]
            numbers[place] = intervals.difference(places[one], places[other])
    for dataset in SETS:
        values = {strength: places.get(place.format(dataset)) for strength, place in NOISES.items()}
        if all(rows is not None for rows in values.values()):
            gain = intervals.gain_of_chosen(values, 0.15)
            runs[f"rp-{dataset}"]["numbers"]["gain of the chosen noise"] = gain


def compared(claims):
    """The claims on each set -> [[words, place of the difference], ...]"""
    found = []
    for words, place in claims.items():
        for dataset, title in SETS.items():
            found.append([f"{words} ({title})", place.replace("{}", dataset)])
    return found


def read_papers(path):
    """The flat list of published numbers -> rows. Raises UsageError for one without a source."""
    rows = []
    with data.reading(path, "paper numbers", f"an entry has {', '.join(PUBLISHED)}; mend it"):
        for entry, cell in enumerate(json.loads(path.read_text("utf-8")), 1):
            if not cell["source"].strip() or cell["dataset"] not in SETS:
                raise ValueError(f"entry {entry} must have a source and a known dataset")
            if type(cell["value"]) not in (int, float) or not 1 <= cell["value"] <= 100:
                raise ValueError(f"entry {entry} must be a number in percent (60.5, not 0.605)")
            rows.append([cell[key] for key in PUBLISHED])
    return rows


# --- tables; tables_of leaves out empty rows --------------------------------------------------------------------------
def numbers_of(runs, name):
    """{metric: cell} of a run, {} if it left none"""
    return runs.get(name, {}).get("numbers", {})


def number(runs, place):
    """place: "RUN/METRIC", "RUN" for its mAP, or "PLACE - PLACE" for the difference -> cell, or why there is none; ""
    if none is expected"""
    one, minus, _ = place.partition(" - ")
    name, _, metric = one.partition("/")
    if minus:
        metric = place
    if "reason" in runs.get(name, ()):
        return textwrap.shorten(runs[name]["reason"], 80, placeholder=" ...")
    return numbers_of(runs, name).get(metric or "mAP", "")


def grid(runs, title, kinds, metrics):
    """A row for every set and kind of run, a column for every metric -> Table. kinds: {run, {} for the set: words}"""
    rows = []
    for dataset in SETS:
        for kind, words in kinds.items():
            name = kind.format(dataset)
            label = dataset + words
            if "trained on" in runs.get(name, ()):
                label += f" ({runs[name]['trained on']})"
            rows.append([label, *(number(runs, f"{name}/{metric}") for metric in metrics)])
    return Table(title, metrics, rows)


def by_set(runs, title, rows):
    """rows: {words: place, {} for a set}, a column for every set -> Table with intervals"""
    cells = [[words, *(number(runs, place.format(dataset)) for dataset in SETS)] for words, place in rows.items()]
    return Table(title, SETS.values(), cells, intervals=True)


def headline(runs):
    return by_set(runs, "mAP, percent", HEADLINE)


def rp_main(runs):
    return by_set(runs, "RP and what one would try first: learnt from texts alone, mAP on photos", LEARNT_FROM_TEXTS)


def differences(runs, claims=CLAIMS, title="What is claimed, on the same test photos"):
    rows = []
    for words, place in compared(claims):
        cell = number(runs, place)
        if isinstance(cell, list):
            one, other = place.split(" - ")
            gain, error, low, high = cell
            verdict = "not resolved"
            if low * high > 0 and abs(gain) > 2 * error:
                verdict = "yes"
            rows.append([words, number(runs, one), number(runs, other), f"{gain:+.2f} ± {error:.2f}",
                         f"{low:+.2f} to {high:+.2f}", verdict])
    return Table(title, ["this", "against", "difference", "95 % interval over photos", "resolved"], rows)


def sspa_ablations(runs):
    return differences(runs, PARTS, "SSPA: what each part is worth, mAP without it against the full method")


def crossed(runs, title, name, note=""):
    """The numbers of one run, by their names "ROW, COLUMN" -> Table"""
    places = [metric.rpartition(", ") for metric in numbers_of(runs, name)]
    columns = dict.fromkeys(column for _, _, column in places)
    rows = [[row, *(number(runs, f"{name}/{row}, {column}") for column in columns)]
            for row in dict.fromkeys(row for row, _, _ in places)]
    return Table(title, columns, rows, note)


def rp_cost(runs):
    return crossed(runs, "RP: cost of a training step against the number of labels C", "rp-cost",
                   "Prompt tuning in TaI-DPT's form, through ViT-B-32's text encoder, on the CPU; the same batch of "
                   "512 and the same loss.")


def curve(runs):
    return crossed(runs, "Number of labelled photos, scenes, mAP", "curve")


def sspa_main(runs):
    kinds = {**TOWERS, "sspa-{}--lr-5e-5": ", SSPA frozen, the author's learning rate"}
    table = grid(runs, "SSPA: the full method", kinds, ["zero_shot_mAP", "linear_probe_mAP", *METRICS])
    return table._replace(columns=["zero-shot mAP", "linear probe mAP", *METRICS], intervals=True)


def sspa_maps(runs):
    """Whether longer training or GDMA makes maps truer"""
    kinds = {"maps-{}": ", 20,000 photos", "maps-{}-short": ", 2,000 photos",
             "maps-{}-short--alignment-none": ", 2,000 photos, no GDMA"}
    return grid(runs, "SSPA: where its maps point, hits of the pointing game", kinds, MAPS)


def probabilities(runs):
    return grid(runs, "What scores and probabilities are worth, percent", STATED, CHANCES)


def thresholds(runs):
    ways = [*numbers_of(runs, "thresholds-features"), *numbers_of(runs, "thresholds-scenes")]
    return by_set(runs, "RP: ways to choose thresholds, macro F1", {way: f"thresholds-{{}}/{way}" for way in ways})


def unseen(runs):
    titles = ("seen", "seen, zero-shot", "unseen", "unseen, zero-shot")
    rows = []
    for name in ("rp-scenes", "rp-features", "sspa-scenes"):
        row = [name]
        for title in titles:
            thirds = [numbers_of(runs, f"{name}-unseen-{third}").get(title) for third in range(3)]
            if None in thirds:
                row.append("")
            else:
                row.append(summary([cell[0] for cell in thirds]))
        rows.append(row)
    return Table("Labels that training never saw, mAP, mean over the thirds", titles, rows)


def published(runs):
    """Published numbers by dataset and metric, the smallest first."""
    rows = sorted(read_papers(PAPERS), key=lambda row: (list(SETS).index(row[0]), *row[1:3]))
    return Table("Published numbers, for orientation", PUBLISHED[1:], rows)


def behind(runs):
    """The command behind every number"""
    rows = []
    commits = set()
    seconds = 0
    for name, run in runs.items():
        if "reason" in run:
            rows.append([name, f"not done: {run['reason']}", "", ""])
        else:
            rows.append([name, f"`{run['command']}`", run["device"], f"{run['seconds'] / 60:.1f}"])
            commits.add(run["commit"])
            seconds += run["seconds"]
    note = f"Commit {', '.join(sorted(commits))} (+: with changes); {seconds / 60:.0f} minutes in all."
    return Table("Behind the numbers", ["command", "on", "minutes"], rows, note)


def tables_of(runs):
    """runs: what look returns -> {name: Table}, without empty rows"""
    tables = {}
    for make in (headline, differences, rp_main, rp_cost, sspa_main, curve, sspa_ablations, sspa_maps, probabilities,
                 thresholds, unseen, published):
        table = make(runs)
        rows = [row for row in table.rows if any(row[1:])]
        tables[make.__name__.replace("_", "-")] = table._replace(rows=rows)
    tables["runs"] = behind(runs)
    return tables


# --- tables as pages and pictures -------------------------------------------------------------------------------------
def shown(cell, with_interval=False):
    if isinstance(cell, str):
        return cell.replace("|", "/")
    if not isinstance(cell, list):
        return f"{cell:,}"
    average, std, *interval = cell
    text = f"{average:.2f}"
    if average > 100:
        text = f"{average:,.0f}"
    if std is not None:
        text += f" ± {std:.2f}"
    if interval and with_interval:
        low, high = interval
        text += f" [{low:.1f}, {high:.1f}]"
    return text


def markdown(table):
    """The table without empty columns -> str"""
    columns = []
    for title, *cells in zip(["", *table.columns], *table.rows, strict=True):
        if any(cells):
            columns.append([shown(title), "---", *(shown(cell, table.intervals) for cell in cells)])
    lines = [f"| {' | '.join(line)} |" for line in zip(*columns, strict=True)]
    text = f"### {table.title}\n\n" + "\n".join(lines) + "\n"
    if table.note:
        text += f"\n{table.note}\n"
    return text


def filled_in(text, tables, runs=()):
    """A page with every place filled: <!-- table NAME -->, <!-- number RUN/METRIC -->, <!-- minutes RUN -->, each up to
    <!-- end --> -> str"""
    def fill(place):
        kind, name = place.groups()
        if kind == "table":
            content = "\n" + markdown(tables[name])
        elif kind == "number":
            content = shown(number(runs, name), with_interval=True)
            if not content:
                raise UsageError(f"a page asks for {name}, which no run has; mend the page")
        else:
            content = f"{runs[name]['seconds'] / 60:.1f}"
        return f"<!-- {kind} {name} -->{content}<!-- end -->"
    return re.sub(r"<!-- (table|number|minutes) (.+?) -->.*?<!-- end -->", fill, text, flags=re.S)


def draw_reliability(record, path):
    """For each model of CURVES, in bins of the score and of the probability: how often the label is present."""
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


def check_record(runs):
    """Raises UsageError if runs are of several commits, or of a tree with changes, or if a number is not within its own
    interval, whose scores are then of something else."""
    commits = ", ".join(sorted({run["commit"] for run in runs.values()}))
    if not re.fullmatch("[0-9a-f]{40}", commits):  # several do not match either
        raise UsageError(f"the runs are of '{commits}' (+: with changes): make all anew on one commit without changes")
    for name, run in runs.items():
        for metric, cell in run["numbers"].items():
            if isinstance(cell, list) and len(cell) == 4 and not cell[2] <= cell[0] <= cell[3]:
                raise UsageError(f"{name}: {metric} has an interval that leaves it out: {cell}; make the run anew")


def check():
    """Checks README.md and docs/*.md against the record, and the record. Raises UsageError for the first difference."""
    record = data.read_json(RECORD, "record of runs")
    tables = tables_of(record)
    for path in PAGES:
        text = data.read_text(path, "page")
        filled = filled_in(text, tables, record)
        for line, wanted in zip(text.split("\n"), filled.split("\n"), strict=False):
            if line != wanted:
                raise UsageError(f"{path.name} says '{line}', {RECORD.name} '{wanted}'; --docs writes it anew")
    check_record(record)
    print(f"{len(record)} runs; {len(PAGES)} pages say the same")


def write_docs(folder):
    """Writes the finished runs into the record, and the record into the pages and the pictures."""
    record = {name: run for name, run in look(folder).items() if "numbers" in run}
    check_record(record)
    for name, run in record.items():
        if name not in CURVES:
            run.pop("curves", None)
    tables = tables_of(record)
    pages = {path: filled_in(data.read_text(path, "page"), tables, record) for path in PAGES}
    data.write_json(RECORD, record)
    for path, text in pages.items():
        data.write_atomically(path, text)
    if find_spec("matplotlib"):
        draw_reliability(record, ASSETS / "tables/reliability.png")


def write_results(folder):
    runs = look(folder)
    parts = ["# Tables\n\nMade by `bash run_all.sh`. Percent; mean ± sample standard deviation over seeds.\n"]
    parts += [markdown(table) for table in tables_of(runs).values() if table.rows]
    path = data.write_atomically(folder / "tables.md", "\n".join(parts))
    finished = sum("numbers" in run for run in runs.values())
    print(f"{path}: {finished} of {len(runs)} runs are finished")


# --- the demo's table -------------------------------------------------------------------------------------------------
def demo_row(label, learnt_from, result, metric="mAP"):
    """Prints a row for a run: one of its baselines, or the method with its F1s"""
    numbers = read_run(result)["numbers"]
    average, std = numbers[metric]
    line = f"{label:<28}{learnt_from:<28}{average:8.2f}"
    if metric == "mAP":
        deviation = ""
        if std is not None:
            deviation = f" ±{std:4.2f}"
        line += f"{deviation:6}{numbers['CF1'][0]:8.1f}{numbers['OF1'][0]:8.1f}"
    print(line)


def demo(folder):
    """The table of `bash run_all.sh demo`, on stdout: RP's rows, and SSPA's where its run is there."""
    rp = data.read_json(folder / "rp/metrics.json", "result")
    sentences = f"{rp['text_count']:,} sentences"
    print(f"\nscenes: {rp['photo_count']:,} test pictures, {rp['label_count']} labels, toy CLIP; ± over "
          f"{len(rp['seeds'])} seeds\n\n{'':<28}{'learnt from':<28}{'mAP %':>14}{'CF1 %':>8}{'OF1 %':>8}")
    demo_row("zero-shot CLIP (cosine)", "nothing", rp, "zero_shot_mAP")
    demo_row("linear probe, texts", sentences, rp, "linear_probe_mAP")
    demo_row("RP, no noise", sentences, data.read_json(folder / "rp-no-noise/metrics.json", "result"))
    demo_row("RP, noise 0.15", sentences, rp)
    if not (folder / "sspa/metrics.json").is_file():
        return
    sspa = data.read_json(folder / "sspa/metrics.json", "result")
    pictures = f"{sspa['train_count']:,} labelled pictures"
    demo_row("linear probe, features", pictures, sspa, "linear_probe_mAP")
    demo_row("SSPA, image tower frozen", pictures, sspa)
    print(f"\npictures: {folder}/rp/tags, {folder}/sspa/tags   (what each says of 12 pictures)\n"
          f"          {folder}/sspa/explain   (where SSPA saw it)      more: {folder}/{{rp,sspa}}/metrics.json")


def main(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default="runs/tables")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--demo", type=Path)
    options = parser.parse_args(words)
    if options.demo:
        demo(options.demo)
    elif options.check:
        check()
    elif options.docs:
        write_docs(options.runs)
    else:
        write_results(options.runs)


if __name__ == "__main__":
    with exit_codes("tables.py") as arguments:
        main(arguments)
