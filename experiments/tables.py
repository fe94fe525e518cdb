"""What the runs of run_all.sh left, as tables. A number is read from a run's metrics.json, never kept beside it.

    python experiments/tables.py            runs/tables -> results/tables.md; a missing cell holds the reason
    python experiments/tables.py --docs     its finished runs -> assets/tables.json; that file -> the tables' places in
                                            docs/results.md and, where matplotlib is installed, assets/tables/*.png
    python experiments/tables.py --demo D   the table of `bash run_all.sh demo`, whose runs are D/rp and D/sspa

Percent; mean and sample standard deviation over seeds. What somebody has read elsewhere: assets/paper_numbers.json.
"""
import argparse
import json
import re
import sys
import textwrap
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import data
from data import UsageError, say

ASSETS, RECORD, DOCS = (REPOSITORY / path for path in ("assets", "assets/tables.json", "docs/results.md"))
SETS = ("scenes", "features", *data.DATASETS[1:])
STRENGTHS, TEXT_COUNTS = (0, 0.05, 0.1, 0.15, 0.2), (250, 500, 1000, 2000, 4000, 8000)
PHOTO_COUNTS = (50, 100, 250, 500, 1000, 4000, 20000)
MAPS = ("zero-shot cosine of regions", "DSF attention", "similarity after GDMA", "S-to-V attention", "V-to-S attention",
        "gradient x region")
METRICS = {  # title of a column: where a run of metrics.json keeps the number
    "mAP": ["mAP"], "mAP, interpolated": ["mAP_interpolated"],
    "mAP, global branch": ["mAP_global"], "mAP, regional branch": ["mAP_regional"],
    "CF1": ["threshold_0.5", "CF1"], "OF1": ["threshold_0.5", "OF1"],
    "CF1, top 3": ["top_3", "CF1"], "OF1, top 3": ["top_3", "OF1"],
    "mA": ["attributes", "mA"], "accuracy": ["attributes", "accuracy"], "precision": ["attributes", "precision"],
    "recall": ["attributes", "recall"], "F1": ["attributes", "F1"]}
COSTS = ("prompt tuning, ms a step", "adapter, ms a step", "ratio of the times", "ratio of the multiplications")
PUBLISHED = ("dataset", "metric", "value", "method", "backbone", "source", "note")  # of a cell of paper_numbers.json


class Number(NamedTuple):
    mean: float
    std: float | None  # None for a single value


class Missing(str):
    """Why there is no number; "" where none is expected."""


class Table(NamedTuple):
    title: str
    columns: list  # str
    rows: list     # (label, cells); a cell is a Number, Missing or words
    note: str = ""
    x: tuple = ()  # where it is drawn, a curve for each row: the places of its first columns


# --- what the runs left -----------------------------------------------------------------------------------------------

def read_run(path):
    """metrics.json of a finished run -> its facts, and "numbers": {setting: {metric: [mean, std] or None}}. A
    setting is the strength of RP's noise, or SSPA's ablation ("none": the full method). Raises ValueError."""
    result, runs_of, numbers = json.loads(path.read_text("utf-8")), {}, {}
    if not result["finished"]:
        raise ValueError("not finished")
    is_rp = result["method"] == "rp"
    for run in result["runs"]:
        runs_of.setdefault(f"{run['noise_std']:g}" if is_rp else run["ablation"], []).append(run)
    for setting, runs in runs_of.items():
        values = {title: [reduce(dict.get, keys, run) for run in runs] for title, keys in METRICS.items()}
        for title, key in (("zero-shot mAP", "zero_shot_mAP"), ("linear probe mAP", "linear_probe_mAP")):
            values[title] = [result[key]]
        for title, learnt in (("seen", True), ("unseen", False)):
            rows = [row for row, label in enumerate(result["per_class"]) if label["trained"] == learnt]
            if len(rows) not in (0, len(result["per_class"])):
                values[title] = [mean(run["ap"][row] for row in rows) for run in runs]
                values[f"{title}, zero-shot"] = [mean(result["per_class"][row]["zero_shot_ap"] for row in rows)]
        numbers[setting] = {title: None if None in several else [mean(several), stdev(several) if several[1:] else None]
                            for title, several in values.items()}
    trained = "{text_count:,} texts" if is_rp else "{train_count:,} photos, {config[epochs]} epochs"
    tested = "{photo_count:,} photos, {label_count} labels, {backbone}; {policy}"
    facts = {name: result[name] for name in ("command", "commit", "device", "seconds", "seeds")}
    return {**facts, "trained on": trained.format(**result), "tested on": tested.format(**result), "numbers": numbers}


def read_benchmark(path):
    """benchmark.json of `benchmark.py cost` -> likewise; a setting is a number of labels"""
    result, numbers = json.loads(path.read_text("utf-8")), {}
    machine = result["machine"]
    for row in result["rows"]:
        products = row["multiplications_reference"] / row["multiplications_fused"]
        values = [[value, None] for value in (row["reference_ms"], row["fused_ms"], row["ratio"], products)]
        numbers[row["shape"].removeprefix("C=")] = dict(zip(COSTS, values, strict=True))
    return {"command": f"python experiments/benchmark.py cost --output {path.parent}", "numbers": numbers,
            "commit": machine["commit"], "device": machine["processor"], "seconds": 60 * machine["minutes"]}


def read_maps(path):
    """localize.json -> likewise; a setting is the title of a model, a metric the pointing game of a map"""
    result, numbers = json.loads(path.read_text("utf-8")), {}
    for title in dict.fromkeys(model["title"] for model in result["models"]):
        models = [model for model in result["models"] if model["title"] == title]
        for name in models[0]["maps"]:
            hits = [model["maps"][name]["pointing"] for model in models]
            numbers.setdefault(title, {})[name] = [mean(hits), stdev(hits) if hits[1:] else None]
    facts = {name: result[name] for name in ("command", "commit", "device", "seconds")}
    return {**facts, "tested on": "{asked:,} things in {photos:,} photos".format(**models[0]), "numbers": numbers}


def read_baselines(path):
    """baselines.json -> likewise; a setting is the name of a baseline"""
    result, numbers = json.loads(path.read_text("utf-8")), {}
    for name in dict.fromkeys(one["name"] for one in result["runs"]):
        values = [one["mAP"] for one in result["runs"] if one["name"] == name]
        numbers[name] = {"mAP": [mean(values), stdev(values) if values[1:] else None]}
    facts = {name: result[name] for name in ("command", "commit", "device", "seconds")}
    return {**facts, "tested on": "{texts:,} texts, {photos:,} photos".format(**result), "numbers": numbers}


def look(folder):
    """All that a folder of runs holds -> {run: what a reader gives, or {"reason": one line}}"""
    runs, readers = {}, {"metrics.json": read_run, "benchmark.json": read_benchmark, "localize.json": read_maps,
                         "baselines.json": read_baselines}
    for path in (path for name in readers for path in folder.glob(f"*/{name}")):
        try:
            read = readers[path.name]
            runs[path.parent.name] = data.read_stored(path, "run", read, "bash run_all.sh goes on with it")
        except UsageError as error:
            runs[path.parent.name] = {"reason": str(error)}
    for path in folder.glob("*.reason"):
        reason = re.sub(r"^\S+\.py: ", "", data.read_text(path, "reason").strip())
        runs[path.stem] = {"reason": reason or f"failed; see {path.with_suffix('.log')}"}
    return dict(sorted(runs.items()))


def read_papers(path):
    """The flat list of numbers that somebody has read -> list of dicts. Raises UsageError for one without a source."""
    def read(path):
        cells = json.loads(path.read_text("utf-8"))
        for entry, cell in enumerate(cells, 1):
            if set(cell) != set(PUBLISHED) or not cell["source"].strip() or cell["dataset"] not in SETS:
                raise ValueError(f"entry {entry} must have {', '.join(PUBLISHED)}; no empty source, no unknown dataset")
            if type(cell["value"]) not in (int, float) or not 1 <= cell["value"] <= 100:
                raise ValueError(f"entry {entry} must be a number in percent (60.5, not 0.605)")
        return cells
    return data.read_stored(path, "paper numbers", read, "mend that entry")


# --- tables -----------------------------------------------------------------------------------------------------------

def number(runs, name, setting, metric="mAP"):
    """The cell of a run; setting, metric: keys of its numbers -> Number or Missing"""
    run = runs.get(name, {"reason": ""})
    if "reason" in run:
        return Missing(run["reason"])
    values = run["numbers"].get(setting, {})
    return Number(*values[metric]) if values.get(metric) else Missing("undefined" if metric in values else "")


def grid(runs, method, kinds, columns):
    """Every dataset with every kind of run. kinds: (label, suffix of the run's name); columns: (title, suffix, setting,
    metric) -> titles, rows; what run_all.sh does not list is left out"""
    rows = []
    for dataset in SETS:
        for label, suffix in kinds:
            name = f"{method}-{dataset}{suffix}"
            trained = runs.get(name, {}).get("trained on")
            cells = [number(runs, name + more, setting, metric) for _, more, setting, metric in columns]
            rows.append((dataset + label + (f" ({trained})" if trained else ""), cells))
    return [title for title, *_ in columns], [row for row in rows if any(row[1])]


def ablation_table(runs):
    """mAP, and hits of the two maps that --explain draws, for each list of ablations"""
    kinds = {f"{dataset}{suffix}-ablations": f"{dataset}, tower {tower}" for dataset in SETS
             for suffix, tower in (("", "frozen"), ("-tuned", "tuned"))}
    kinds = {kind: words for kind, words in kinds.items() if f"sspa-{kind}" in runs}
    rows, columns = {}, []
    for kind, words in kinds.items():
        columns += [f"{words}: mAP", "against the full method", *(f"hits of {name}" for name in MAPS[1:3])]
        full = number(runs, f"sspa-{kind}", "none")
        for ablation in runs[f"sspa-{kind}"].get("numbers", ["none"]):
            own, label = number(runs, f"sspa-{kind}", ablation), "SSPA" if ablation == "none" else ablation
            gain = f"{own.mean - full.mean:+.2f}" if isinstance(own, Number) and ablation != "none" else ""
            cells = [own, gain, *(number(runs, f"maps-{kind}", label, name) for name in MAPS[1:3])]
            rows.setdefault(label, dict.fromkeys(kinds, [""] * 4))[kind] = cells
    rows = [(label, sum(of.values(), [])) for label, of in rows.items()]
    return Table("SSPA: what each part is worth", columns, rows)


def maps_table(runs):
    """Whether longer training, a tuned tower or the gate makes maps truer"""
    rows = []
    for name, words in (("scenes", "frozen, 20,000 photos, 20 epochs"), ("scenes-ablations", "frozen, 4,000, 8"),
                        ("scenes-tuned", "tuned, 4,000, 8"), ("scenes-tuned-ablations", "tuned, 1,000, 8")):
        for title, ablation in (("SSPA", "none"), ("no gate", "no gate")):
            cells = [number(runs, f"maps-{name}", title, column) for column in MAPS]
            if any(cells):
                rows.append((f"{title}: {words}", [number(runs, f"sspa-{name}", ablation), *cells]))
    return Table("SSPA: where its maps point, scenes, hits of the pointing game", ["mAP", *MAPS], rows)


def published_table(runs, papers):
    """What somebody has read, and ours among it; by dataset and metric, the smallest number first."""
    ours = (("RP, ours", "rp-{}", "0.15"), ("SSPA, ours", "sspa-{}", "none"), ("SSPA, ours", "sspa-{}-tuned", "none"))
    lines = [[cell[key] for key in PUBLISHED] for cell in papers]
    for dataset, metric in {(cell["dataset"], cell["metric"]) for cell in papers}:
        for method, name, setting in ours:
            if isinstance(own := number(runs, name.format(dataset), setting, metric), Number):
                lines.append([dataset, metric, round(own.mean, 2), method, "", f"run {name.format(dataset)}", ""])
    lines.sort(key=lambda line: (SETS.index(line[0]), line[1], line[2]))
    unread = {"RP", "SSPA"} - {cell["method"] for cell in papers}
    note = "".join(f"The own numbers of {method}'s paper were not at hand. " for method in sorted(unread))
    rows = [(dataset, cells) for dataset, *cells in lines]
    return Table("Published numbers, for orientation", list(PUBLISHED[1:]), rows, note.strip())


def tables_of(runs, papers):
    """runs: what look gives; papers: what read_papers gives -> {name: Table}"""
    main = [("zero-shot", "", "0.15", "zero-shot mAP"), ("linear probe of the texts", "", "0.15", "linear probe mAP"),
            ("no noise", "", "0", "mAP"), ("noise 0.15", "", "0.15", "mAP"),
            ("noise 0.15, interpolated AP", "", "0.15", "mAP, interpolated")]
    laws = [("gaussian", "", "0.15"), ("uniform", "-uniform", "0.15"), ("sphere", "-sphere", "0.15"), ("none", "", "0")]
    counts = [(f"{count:,}", f"-{count}-texts") for count in TEXT_COUNTS] + [("all", "")]
    towers = ((", image tower frozen", ""), (", image tower frozen", "-ablations"), (", image tower tuned", "-tuned"))
    texts = [grid(runs, "rp", [(label, "")], [(*column, strength, metric) for column in counts])
             for label, strength, metric in (("", "0.15", "mAP"), (", no noise", "0", "mAP"),
                                             (", linear probe", "0", "linear probe mAP"))]
    photos = [(label, [number(runs, f"sspa-scenes-{count}-photos" if count < 20000 else "sspa-scenes", "none", metric)
                       for count in PHOTO_COUNTS])
              for label, metric in (("SSPA, image tower frozen", "mAP"), ("linear probe of the same features",
                                    "linear probe mAP"), ("zero-shot", "zero-shot mAP"))]
    apart = ("seen", "seen, zero-shot", "unseen", "unseen, zero-shot")
    unseen = [(f"{method}, {dataset}, without third {third + 1}", [
        number(runs, f"{key}-{dataset}-unseen-{third}", setting, metric) for metric in apart])
        for method, key, dataset, setting in (("RP", "rp", "scenes", "0.15"), ("RP", "rp", "features", "0.15"),
                                              ("SSPA", "sspa", "scenes", "none")) for third in range(3)]
    first = [(name, [number(runs, "baselines", name)]) for name in runs.get("baselines", {}).get("numbers", ())]
    first += [(f"RP, {words}", [number(runs, "rp-features", strength)])
              for words, strength in (("no noise", "0"), ("noise 0.15, drawn anew in every step", "0.15"))]
    labels = list(runs.get("rp-cost", {}).get("numbers", ["80"]))
    costs = [(title, [number(runs, "rp-cost", count, title) for count in labels]) for title in COSTS]
    behind = [(name, [f"`{run['command']}`", run.get("tested on", ""), run["commit"], run["device"],
                      f"{run['seconds'] / 60:.1f}"] if "numbers" in run else [f"not done: {run['reason']}", *[""] * 4])
              for name, run in runs.items()]
    return {
        "rp-main": Table("RP: an adapter that learnt from texts alone, mAP on photos",
                         *grid(runs, "rp", [("", ""), (", sentences of a language model", "-llm")], main),
                         'Zero-shot: the cosine with "a photo of a {name}.".'),
        "rp-baselines": Table("What one would try first, on the same texts and photos (features), mAP", ["mAP"],
                              first if len(first) > 2 else []),
        "rp-noise": Table("RP: strength of the noise, times the mean text norm, mAP", *grid(
            runs, "rp", [(", raw", ""), (", unit length", "-unit")],
            [(f"{strength:g}", "", f"{strength:g}", "mAP") for strength in STRENGTHS]), x=STRENGTHS),
        "rp-law": Table("RP: law of the noise, mAP", *grid(runs, "rp", [("", "")], [(*law, "mAP") for law in laws])),
        "rp-texts": Table("RP: number of texts, as many steps for each, mAP", texts[0][0],
                          sum((rows for _, rows in texts), []), x=TEXT_COUNTS),
        "rp-cost": Table("RP: cost of a training step against the number of labels", labels, costs,
                         "Prompt tuning in TaI-DPT's form, through ViT-B-32's text encoder, on the CPU; the same "
                         "batch of 512 and the same loss."),
        "sspa-main": Table("SSPA: the full method", *grid(runs, "sspa", towers, [
            (title, "", "none", title) for title in ("zero-shot mAP", "linear probe mAP", *METRICS)])),
        "sspa-photos": Table("SSPA: number of labelled photos, scenes, mAP", [f"{count:,}" for count in PHOTO_COUNTS],
                             photos if any(photos[0][1]) else [], x=PHOTO_COUNTS),
        "sspa-ablations": ablation_table(runs),
        "sspa-maps": maps_table(runs),
        "unseen": Table("Labels that training never saw, mAP", list(apart), [row for row in unseen if any(row[1])]),
        "published": published_table(runs, papers),
        "runs": Table("Behind the numbers", ["command", "tested on", "commit, + changes", "on", "minutes"], behind)}


# --- tables as pages and pictures -------------------------------------------------------------------------------------

def shown(cell):
    if not isinstance(cell, Number):
        return textwrap.shorten(cell, 80, placeholder=" ...") if isinstance(cell, Missing) else str(cell)
    text = format(cell.mean, ",.0f" if cell.mean > 100 else ".2f")
    return text if cell.std is None else f"{text} ± {cell.std:.2f}"


def markdown(table):
    """-> str, without columns that have nothing to say"""
    columns = [at for at in range(len(table.columns)) if any(cells[at] for _, cells in table.rows)]
    lines = [["", *(table.columns[at] for at in columns)], ["---"] * (1 + len(columns))]
    lines += [[label, *(shown(cells[at]).replace("|", "/") for at in columns)] for label, cells in table.rows]
    parts = [f"### {table.title}", "\n".join(f"| {' | '.join(line)} |" for line in lines), table.note]
    return "\n\n".join(part for part in parts if part) + "\n"


def filled_in(text, tables):
    """docs/results.md with every table at its place, from <!-- table NAME --> to <!-- end --> -> str"""
    return re.sub(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)",
                  lambda place: place[1] + markdown(tables[place[2]]) + place[3], text, flags=re.S)


def draw(table, path):
    """A curve for each row, with bars of one standard deviation. The picture holds the table as its description."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), dpi=110)
    axes = figure.subplots()
    for label, cells in table.rows:
        points = {x: cell for x, cell in zip(table.x, cells, strict=False) if isinstance(cell, Number)}
        means, stds = [cell.mean for cell in points.values()], [cell.std or 0 for cell in points.values()]
        axes.errorbar(list(points), means, stds, marker="o", markersize=4, capsize=2, label=label)
    if min(table.x) > 0:
        axes.set_xscale("log")
    axes.set(title=table.title, xticks=table.x, xticklabels=table.x)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Description": markdown(table)}, bbox_inches="tight")


def write_docs(runs, papers):
    """Finished runs join those in the record, which is shown in docs/results.md and the pictures."""
    record = data.read_json(RECORD, "record of runs") | {name: run for name, run in runs.items() if "numbers" in run}
    tables = tables_of(record, papers)
    data.write_atomically(DOCS, filled_in(data.read_text(DOCS, "page"), tables))
    data.write_json(RECORD, record)
    for name, table in tables.items():
        if table.x and find_spec("matplotlib"):
            draw(table, ASSETS / "tables" / f"{name}.png")


def demo(folder):
    """The table of `bash run_all.sh demo`, on stdout."""
    rp, sspa = (data.read_json(folder / method / "metrics.json", "result") for method in ("rp", "sspa"))
    print(f"\nscenes: {sspa['photo_count']:,} test pictures, {sspa['label_count']} labels, toy CLIP; ± over "
          f"{len(rp['seeds'])} (RP) and {len(sspa['seeds'])} (SSPA) seeds\n\n{'':<28}{'learnt from':<28}{'mAP %':>14}"
          f"{'CF1 %':>8}{'OF1 %':>8}\n{'zero-shot CLIP (cosine)':<28}{'nothing':<28}{sspa['zero_shot_mAP']:8.2f}")
    texts, photos = f"{rp['text_count']:,} sentences", f"{sspa['train_count']:,} labelled pictures"
    for words, learnt, result in (("texts", texts, rp), ("features", photos, sspa)):
        print(f"{f'linear probe, {words}':<28}{learnt:<28}{result['linear_probe_mAP']:8.2f}")
    rows = [(label, texts, [run for run in rp["runs"] if run["noise_std"] == noise])
            for label, noise in (("RP, no noise", 0), ("RP, noise 0.15", 0.15))]
    for label, learnt, runs in [*rows, ("SSPA, image tower frozen", photos, sspa["runs"])]:
        score, cf1, of1 = ([reduce(dict.get, METRICS[title], run) for run in runs] for title in ("mAP", "CF1", "OF1"))
        print(f"{label:<28}{learnt:<28}{mean(score):8.2f} ±{stdev(score):4.2f}{mean(cf1):8.1f}{mean(of1):8.1f}")
    print(f"\npictures: {folder}/rp/predictions.png, {folder}/sspa/predictions.png   (what each says of 12 pictures)\n"
          f"          {folder}/sspa/explain/*.png   (where SSPA saw it)      more: {folder}/{{rp,sspa}}/metrics.json")


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default="runs/tables", metavar="DIR")
    parser.add_argument("--results", type=Path, default="results/tables.md", metavar="FILE")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--demo", type=Path, metavar="DIR")
    options = parser.parse_args(words)
    try:
        if options.demo:
            return demo(options.demo)
        runs, papers = look(options.runs), read_papers(ASSETS / "paper_numbers.json")
        if options.docs:
            return write_docs(runs, papers)
        if not runs:
            raise UsageError(f"{options.runs}: no run is there; bash run_all.sh makes them")
        tables = [table for table in tables_of(runs, papers).values() if any(any(cells) for _, cells in table.rows)]
        page = "# Tables\n\nMade by `bash run_all.sh`. Percent; mean ± sample standard deviation over seeds.\n\n"
        data.write_atomically(options.results, page + "\n".join(map(markdown, tables)))
        print(f"{options.results}: {sum('numbers' in run for run in runs.values())} of {len(runs)} runs are finished")
    except UsageError as error:
        say(f"tables.py: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
