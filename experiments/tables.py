"""What the runs of run_all.sh left, as tables. A number is read from a run's metrics.json, never kept beside it.

    python experiments/tables.py            runs/tables -> results/tables.md; a missing cell holds the reason
    python experiments/tables.py --docs     its finished runs, all of one clean commit -> assets/tables.json, the places
                                            of tables and numbers in README.md and docs/*.md and, where matplotlib is
                                            installed, the pictures of assets/tables
    python experiments/tables.py --check    exits 2 where these pages say something else than that file
    python experiments/tables.py --demo D   the table of `bash run_all.sh demo`, of what is there of its runs

Percent; mean and sample standard deviation over seeds, 95 % intervals over test photos (experiments/intervals.py). What
somebody has read elsewhere: assets/paper_numbers.json.
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

import intervals

import data
from data import UsageError
from run import exit_codes

ASSETS = REPOSITORY / "assets"
RECORD = ASSETS / "tables.json"
PAPERS = ASSETS / "paper_numbers.json"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SETS = ("scenes", "features", *data.DATASETS[1:])
NO_NOISE = "--noise-std-0"  # a run's name ends in the options that set it apart from the run before it
STRENGTHS = {0: NO_NOISE, 0.05: "--noise-std-0.05", 0.1: "--noise-std-0.1", 0.15: "", 0.2: "--noise-std-0.2"}
TEXT_COUNTS = (250, 1000, 4000)
PHOTO_COUNTS = (50, 100, 250, 500, 1000)
LABEL_COUNTS = (20, 40, 80, 160, 320)  # of the costs
ABLATIONS = {
    "": "SSPA", "--fusion-knowledge": "knowledge prompts only", "--fusion-context": "context prompts only",
    "--fusion-sum": "prompts summed", "--fusion-concat": "prompts concatenated", "--no-dsf": "no DSF",
    "--no-gate": "no gate", "--alignment-none": "no GDMA", "--descriptions-none": "no LLM description",
    "--aggregator-mean": "mean aggregator", "--branches-global": "global branch only"}
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
    "": "", "--gamma-neg-0": ", gamma- 0 (bce)", "--clip-0.05": ", clip 0.05",
    "--focal-gradient-stopped": ", focal gradient stopped", "-250-texts": "", "-templates": ", template sentences",
    "-first-1": ", one label", "-first-2": ", two labels", "-first-4": ", four labels", "-toy": ", toy CLIP",
    "-toy-descriptions": ", toy CLIP, descriptions as texts"}
TOWERS = {"": "", "-short": "", "-tuned": ", tuned", "-toy": ", toy CLIP", "-toy-tuned": ", toy CLIP, tuned"}
CURVES = {"rp-features": "RP, photo features", "rp-scenes": "RP, scenes", "sspa-scenes": "SSPA, scenes"}
ZERO_SHOT = "/zero_shot_mAP"
CENTRED = "/zero_shot_centred_mAP"
PROBE = "/linear_probe_mAP"
LABEL_FREE = ("/macro F1, label-free", "/macro F1, score > 0.5")
CLAIMS = {  # method and claim: what is compared, and with what: ends of places
    "RP: noise 0.15 against none": ("", NO_NOISE),
    "RP against zero-shot": ("", ZERO_SHOT),
    "RP against zero-shot, both sides centred": ("", CENTRED),
    "RP against the linear probe of the texts": ("", PROBE),
    "RP without noise against zero-shot": (NO_NOISE, ZERO_SHOT),
    "RP: raw against unit length": ("", "-unit"),
    "RP without noise: raw against unit length": (NO_NOISE, "-unit" + NO_NOISE),
    "RP: gaussian against uniform noise": ("", "-uniform"),
    "RP: gaussian noise against noise on a sphere": ("", "-sphere"),
    "RP: all texts against 4,000": ("", "-4000-texts"),
    "RP: all texts against 250": ("", "-250-texts"),
    "RP: its sentences against template sentences": ("", "-templates"),
    "RP: template sentences against descriptions": ("", "-descriptions"),
    "RP, linear adapter: noise 0.15 against none": ("-linear", "-linear" + NO_NOISE),
    "RP: gamma- 4 against 0": ("", "--gamma-neg-0"),
    "RP: clip 0 against 0.05": ("", "--clip-0.05"),
    "RP: focal gradient full against stopped": ("", "--focal-gradient-stopped"),
    "RP: thresholds without labels against a score above 0.5, macro F1": LABEL_FREE,
    "SSPA against zero-shot": ("", ZERO_SHOT),
    "SSPA against the linear probe of the photos": ("", PROBE),
    "SSPA: image tower tuned against frozen": ("-tuned", ""),
    "SSPA: thresholds without labels against a score above 0.5, macro F1": LABEL_FREE}
PARTS = {f"SSPA, {title}: {words}": (setting + end, setting)
         for setting, title in {"-short": "2,000 photos", "-tuned": "image tower tuned"}.items()
         for end, words in ABLATIONS.items() if end}
HEADLINE = {  # of README.md: a row's places, of each set
    "zero-shot": "rp-{}" + ZERO_SHOT, "zero-shot, both sides centred": "rp-{}" + CENTRED,
    "linear probe of the texts": "rp-{}" + PROBE, "RP, no noise": "rp-{}" + NO_NOISE, "RP": "rp-{}",
    "linear probe of labelled photos": "sspa-{}" + PROBE, "SSPA, image tower frozen": "sspa-{}",
    "SSPA, image tower tuned": "sspa-{}-tuned"}
COSTS = ("prompt tuning, ms a step", "adapter, ms a step", "ratio of the times", "ratio of the multiplications")
PUBLISHED = ("dataset", "metric", "value", "method", "backbone", "source", "note")  # of a cell of paper_numbers.json


class Table(NamedTuple):
    title: str
    columns: list  # words or numbers
    rows: list     # [label, cell, cell, ...]; a cell is [mean, std] or [mean, std, low, high], words, a number, or ""
    note: str = ""  # where none is expected
    intervals: bool = False  # shown


# --- what the runs left: facts, and "numbers": {metric: a cell or None} -----------------------------------------------
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
    for place in (ZERO_SHOT, CENTRED, PROBE):
        numbers[place[1:]] = summary([result.get(place[1:])])
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


def read_curve(result):
    """curve.json: mAP of each way to learn with each number of photos"""
    numbers = {}
    for row in result["rows"]:
        numbers[f"{row['name']}, {row['photos']}"] = summary(row["mAP"])
    return facts_of(result, result["dataset"], numbers)


def read_baselines(result):
    """baselines.json: mAP of each baseline"""
    numbers = {}
    for one in result["runs"]:
        numbers.setdefault(one["name"], []).append(one["mAP"])
    numbers = {name: summary(values) for name, values in numbers.items()}
    return facts_of(result, "{texts:,} texts, {photos:,} photos".format(**result), numbers)


READERS = {"metrics.json": read_run, "benchmark.json": read_benchmark, "localize.json": read_maps,
           "baselines.json": read_baselines, "thresholds.json": read_thresholds, "curve.json": read_curve}


def look(folder):
    """All that a folder of runs holds -> {run: what a reader gives, or {"reason": one line}}"""
    runs = {}
    for name, read in READERS.items():
        for path in folder.glob(f"*/{name}"):
            try:
                with data.reading(path, "run", "bash run_all.sh goes on with it"):
                    result = json.loads(path.read_text("utf-8"))
                    runs[path.parent.name] = read(result)
                    scores = path.parent / "scores.safetensors"
                    if scores.is_file():
                        runs[path.parent.name]["sampled"] = intervals.sampled(scores, result["config"])
            except UsageError as error:
                runs[path.parent.name] = {"reason": str(error)}
    for path in folder.glob("*.reason"):
        reason = re.sub(r"^\S+\.py: ", "", data.read_text(path, "reason").strip())
        runs[path.stem] = {"reason": reason or f"failed; see {path.with_suffix('.log')}"}
    add_intervals(runs)
    return dict(sorted(runs.items()))


def add_intervals(runs):
    """What was sampled becomes numbers: intervals, differences, the noise that a third of the photos would choose."""
    places = {}
    for name, run in runs.items():
        for metric, values in run.pop("sampled", {}).items():
            if run["numbers"].get(metric):
                run["numbers"][metric] += intervals.bounds(values.mean(0))
                places[f"{name}/{metric}"] = values
                if metric == "mAP":
                    places[name] = values
    for _, one, other in compared(CLAIMS | PARTS):
        if one in places and other in places:
            numbers = runs[one.partition("/")[0]]["numbers"]
            numbers[f"{one} - {other}"] = intervals.difference(places[one], places[other])
    for dataset in SETS:
        values = {strength: places.get(f"rp-{dataset}{end}") for strength, end in STRENGTHS.items()}
        if all(rows is not None for rows in values.values()):
            numbers = runs[f"rp-{dataset}"]["numbers"]
            numbers["gain of the chosen noise"], shares = intervals.noise_without_labels(values, 0.15)
            for strength, share in zip(values, shares, strict=True):
                numbers[f"noise {strength} chosen"] = [share, None]


def compared(claims):
    """Claims on each set -> [words, place of the one, place of the other]"""
    found = []
    for words, ends in claims.items():
        method = re.match("RP|SSPA", words)[0].lower()
        for dataset in (*SETS, "ucm-toy"):
            one, other = (f"{method}-{dataset}{end}" for end in ends)
            found.append([f"{words} ({dataset})", one, other])
    return found


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
    """place: "RUN/METRIC", "RUN": its mAP, or "PLACE - PLACE": the difference -> cell, or why there is none; "" where
    none is expected"""
    one, minus, _ = place.partition(" - ")
    name, _, metric = one.partition("/")
    if minus:
        metric = place
    run = runs.get(name, {"numbers": {}})
    if "reason" in run:
        return textwrap.shorten(run["reason"], 80, placeholder=" ...")
    cell = run["numbers"].get(metric or "mAP", "")
    if cell is None:
        return "undefined"
    return cell


def grid(runs, method, kinds, columns, sets=SETS):
    """A row for every dataset and kind of run -> rows. kinds: {end of a run's name: words}; columns: ends of places"""
    rows = []
    for dataset in sets:
        for suffix, words in kinds.items():
            name = f"{method}-{dataset}{suffix}"
            label = dataset + words
            if "trained on" in runs.get(name, ()):
                label += f" ({runs[name]['trained on']})"
            rows.append([label, *(number(runs, name + end) for end in columns)])
    return rows


def headline(runs):
    sets = {"scenes": "drawn scenes", "features": "features of photos", "ucm-toy": "UCM, toy CLIP"}
    rows = [[words, *(number(runs, place.format(name)) for name in sets)] for words, place in HEADLINE.items()]
    return Table("mAP, percent", sets.values(), rows, intervals=True)


def differences(runs, claims=CLAIMS, title="What is claimed, on the same test photos"):
    rows = []
    for words, one, other in compared(claims):
        cell = number(runs, f"{one} - {other}")
        if isinstance(cell, list):
            gain, error, low, high = cell
            verdict = "not resolved"
            if low * high > 0 and abs(gain) > 2 * error:
                verdict = "yes"
            rows.append([words, number(runs, one), number(runs, other), f"{gain:+.2f}",
                         f"{low:+.2f} to {high:+.2f}", f"{error:.2f}", verdict])
    columns = ["this", "against", "difference", "95 % interval over photos", "standard error over seeds", "resolved"]
    return Table(title, columns, rows)


def rp_main(runs):
    columns = {"zero-shot": ZERO_SHOT, "zero-shot, both sides centred": CENTRED, "linear probe of the texts": PROBE,
               "no noise": NO_NOISE, "noise 0.15": "", "noise 0.15, interpolated AP": "/mAP, interpolated"}
    kinds = {"": "", "-llm": ", sentences of a language model", "-toy": ", toy CLIP, template sentences",
             "-toy-descriptions": ", toy CLIP, descriptions as texts"}
    return Table("RP: an adapter that learnt from texts alone, mAP on photos", columns,
                 grid(runs, "rp", kinds, columns.values()), 'Zero-shot: the cosine with "a photo of a {name}.".', True)


def rp_baselines(runs):
    sets = SETS[:2]
    names = runs.get("baselines-features", {"numbers": ()}).get("numbers", ())
    rows = [[name, *(number(runs, f"baselines-{dataset}/{name}") for dataset in sets)] for name in names]
    if rows:
        rows += [["RP, no noise", *(number(runs, f"rp-{dataset}{NO_NOISE}") for dataset in sets)],
                 ["RP, noise 0.15, drawn anew in every step", *(number(runs, f"rp-{dataset}") for dataset in sets)]]
    return Table("What one would try first, on the same texts and photos, mAP", sets, rows)


def rp_noise(runs):
    rows = grid(runs, "rp", {"": ", raw", "-unit": ", unit length"}, STRENGTHS.values())
    return Table("RP: strength of the noise, times the mean text norm, mAP", STRENGTHS, rows)


def rp_chosen_noise(runs):
    columns = {"gain over 0.15": "/gain of the chosen noise"}
    columns |= {f"{strength}, % of draws": f"/noise {strength} chosen" for strength in STRENGTHS}
    return Table("RP: the noise that a third of the test photos chooses, mAP on the other two thirds", columns,
                 grid(runs, "rp", {"": ""}, columns.values()))


def rp_texts(runs):
    suffixes = [f"-{count}-texts" for count in TEXT_COUNTS]
    suffixes.append("")
    rows = []
    for words, end, sets in (("", "", SETS), (", no noise", NO_NOISE, SETS[:1]), (", linear probe", PROBE, SETS)):
        rows += grid(runs, "rp", {"": words}, [suffix + end for suffix in suffixes], sets)
    return Table("RP: number of texts, as many steps for each, mAP", [*TEXT_COUNTS, "all"], rows)


def rp_cost(runs):
    rows = [[title, *(number(runs, f"rp-cost/{title}, C={count}") for count in LABEL_COUNTS)] for title in COSTS]
    return Table("RP: cost of a training step against the number of labels", LABEL_COUNTS, rows,
                 "Prompt tuning in TaI-DPT's form, through ViT-B-32's text encoder, on the CPU; the same batch of 512 "
                 "and the same loss.")


def sspa_main(runs):
    columns = {"zero-shot mAP": ZERO_SHOT, "linear probe mAP": PROBE, **{title: f"/{title}" for title in METRICS}}
    kinds = {"": ", image tower frozen", "-short": ", image tower frozen", "-tuned": ", image tower tuned",
             "-toy": ", toy CLIP, image tower frozen", "-toy-tuned": ", toy CLIP, image tower tuned"}
    return Table("SSPA: the full method", columns, grid(runs, "sspa", kinds, columns.values()), intervals=True)


def curve(runs):
    methods = dict.fromkeys(name.rpartition(", ")[0] for name in runs.get("curve", {"numbers": ()}).get("numbers", ()))
    rows = [[method, *(number(runs, f"curve/{method}, {count}") for count in PHOTO_COUNTS)] for method in methods]
    return Table("Number of labelled photos, scenes, mAP", PHOTO_COUNTS, rows)


def sspa_ablations(runs):
    return differences(runs, PARTS, "SSPA: what each part is worth, mAP without it against the full method")


def sspa_maps(runs):
    """Whether longer training, the gate or GDMA makes maps truer"""
    kinds = {"": ", 20,000 photos", "-short": ", 2,000 photos", "-short--no-gate": ", 2,000 photos, no gate",
             "-short--alignment-none": ", 2,000 photos, no GDMA"}
    rows = grid(runs, "maps", kinds, [f"/{map_}" for map_ in MAPS])
    return Table("SSPA: where its maps point, hits of the pointing game", MAPS, rows)


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
    """What somebody has read, by dataset and metric, the smallest number first."""
    rows = read_papers(PAPERS)
    unread = {"RP", "SSPA"} - {row[3] for row in rows}
    note = " ".join(f"The own numbers of {method}'s paper were not at hand." for method in sorted(unread))
    rows.sort(key=lambda row: (SETS.index(row[0]), *row[1:3]))
    return Table("Published numbers, for orientation", PUBLISHED[1:], rows, note)


def behind(runs):
    """The command behind every number"""
    rows = []
    for name, run in runs.items():
        if "reason" in run:
            rows.append([name, f"not done: {run['reason']}", "", "", ""])
        else:
            minutes = f"{run['seconds'] / 60:.1f}"
            rows.append([name, f"`{run['command']}`", run.get("tested on", ""), run["device"], minutes])
    commits = {run["commit"] for run in runs.values() if "commit" in run}
    minutes = sum(run.get("seconds", 0) for run in runs.values()) / 60
    note = f"Commit {', '.join(sorted(commits))} (+: with changes); {minutes:.0f} minutes in all."
    return Table("Behind the numbers", ["command", "tested on", "on", "minutes"], rows, note)


def tables_of(runs):
    """runs: what look gives -> {name: Table}, without rows that have nothing to say"""
    tables = {}
    for make in (headline, differences, rp_main, rp_baselines, rp_noise, rp_chosen_noise, rp_texts, rp_cost, sspa_main,
                 curve, sspa_ablations, sspa_maps, probabilities, thresholds, unseen, published):
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
    """-> str, without columns that have nothing to say"""
    columns = []
    for title, *cells in zip(["", *table.columns], *table.rows, strict=True):
        if any(cells):
            columns.append([shown(title), "---", *(shown(cell, table.intervals) for cell in cells)])
    lines = [f"| {' | '.join(line)} |" for line in zip(*columns, strict=True)]
    parts = [f"### {table.title}", "\n".join(lines)]
    if table.note:
        parts.append(table.note)
    return "\n\n".join(parts) + "\n"


def filled_in(text, runs):
    """A page with every place filled: <!-- table NAME -->, <!-- number RUN/METRIC -->, <!-- minutes RUN -->, each up to
    <!-- end --> -> str"""
    tables = tables_of(runs)

    def fill(place):
        kind, name = place[1], place[2]
        if kind == "table":
            content = "\n" + markdown(tables[name])
        elif kind == "number":
            content = shown(number(runs, name), with_interval=True)
        else:
            content = f"{runs[name]['seconds'] / 60:.0f}"
        return f"<!-- {kind} {name} -->{content}<!-- end -->"
    return re.sub(r"<!-- (table|number|minutes) (.+?) -->.*?<!-- end -->", fill, text, flags=re.S)


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


def check_commits(runs):
    """Raises UsageError where runs are of several commits, or of a tree that had changes."""
    commits = {run["commit"]: name for name, run in runs.items()}
    for commit, name in commits.items():
        if len(commits) > 1 or not re.fullmatch("[0-9a-f]{40}", commit):
            raise UsageError(f"run {name} is of commit '{commit}', of {len(commits)} (+: with changes): make all runs "
                             "anew on one commit without changes")


def check():
    """README.md and docs/*.md against the record, and the record itself. Raises UsageError for the first difference."""
    record = data.read_json(RECORD, "record of runs")
    for path in PAGES:
        text = data.read_text(path, "page")
        for line, wanted in zip(text.split("\n"), filled_in(text, record).split("\n"), strict=False):
            if line != wanted:
                raise UsageError(f"{path.name} says '{line}', {RECORD.name} '{wanted}'; --docs writes it anew")
    check_commits(record)
    print(f"{len(record)} runs; {len(PAGES)} pages say the same")


def write_docs(folder):
    """Finished runs become the record, which is shown in the pages and the pictures."""
    record = {name: run for name, run in look(folder).items() if "numbers" in run}
    if not record:
        raise UsageError(f"{folder}: no finished run is there; bash run_all.sh makes them")
    check_commits(record)
    for name, run in record.items():
        if name not in CURVES:
            run.pop("curves", None)
    pages = {path: filled_in(data.read_text(path, "page"), record) for path in PAGES}
    data.write_json(RECORD, record)
    for path, text in pages.items():
        data.write_atomically(path, text)
    if find_spec("matplotlib"):
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
    demo_row("zero-shot CLIP (cosine)", "nothing", rp, ZERO_SHOT[1:])
    demo_row("linear probe, texts", sentences, rp, PROBE[1:])
    demo_row("RP, no noise", sentences, data.read_json(folder / "rp-no-noise/metrics.json", "result"))
    demo_row("RP, noise 0.15", sentences, rp)
    if not (folder / "sspa/metrics.json").is_file():
        return
    sspa = data.read_json(folder / "sspa/metrics.json", "result")
    pictures = f"{sspa['train_count']:,} labelled pictures"
    demo_row("linear probe, features", pictures, sspa, PROBE[1:])
    demo_row("SSPA, image tower frozen", pictures, sspa)
    print(f"\npictures: {folder}/rp/tags, {folder}/sspa/tags   (what each says of 12 pictures)\n"
          f"          {folder}/sspa/explain   (where SSPA saw it)      more: {folder}/{{rp,sspa}}/metrics.json")


def main(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default="runs/tables")
    parser.add_argument("--results", type=Path, default="results/tables.md")
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
        write_results(options.runs, options.results)


if __name__ == "__main__":
    with exit_codes("tables.py") as arguments:
        main(arguments)
