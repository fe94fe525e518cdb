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
        values["zero-shot mAP"] = [result["zero_shot_mAP"]]
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


def look(folder):
    """All that a folder of runs holds -> {run: what read_run gives, or {"reason": one line}}"""
    runs = {}
    for path in (*folder.glob("*/metrics.json"), *folder.glob("*/benchmark.json")):
        read = read_run if path.name == "metrics.json" else read_benchmark
        try:
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
    names = {dataset: f"sspa-{dataset}-ablations" for dataset in SETS if f"sspa-{dataset}-ablations" in runs}
    rows = []
    for ablation in dict.fromkeys(key for name in names.values() for key in runs[name].get("numbers", ["none"])):
        cells = []
        for name in names.values():
            own, full = number(runs, name, ablation), number(runs, name, "none")
            cells += [own, f"{own.mean - full.mean:+.2f}" if isinstance(own, Number) and ablation != "none" else ""]
        rows.append(("SSPA" if ablation == "none" else ablation, cells))
    columns = [title for dataset in names for title in (dataset, f"{dataset}, against the full method")]
    return Table("SSPA: what each part is worth, image tower frozen, mAP", columns, rows)


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
    main = [("zero-shot", "", "0.15", "zero-shot mAP"), ("no noise", "", "0", "mAP"), ("noise 0.15", "", "0.15", "mAP"),
            ("noise 0.15, interpolated AP", "", "0.15", "mAP, interpolated")]
    laws = [("gaussian", "", "0.15"), ("uniform", "-uniform", "0.15"), ("sphere", "-sphere", "0.15"), ("none", "", "0")]
    counts = [(f"{count:,}", f"-{count}-texts") for count in TEXT_COUNTS] + [("all", "")]
    towers = ((", image tower frozen", ""), (", image tower frozen", "-ablations"), (", image tower tuned", "-tuned"))
    (titles, noisy), (_, plain) = (grid(runs, "rp", [(label, "")], [(*column, strength, "mAP") for column in counts])
                                   for label, strength in (("", "0.15"), (", no noise", "0")))
    labels = list(runs.get("rp-cost", {}).get("numbers", ["80"]))
    costs = [(title, [number(runs, "rp-cost", count, title) for count in labels]) for title in COSTS]
    behind = [(name, [f"`{run['command']}`", run.get("tested on", ""), run["commit"], run["device"],
                      f"{run['seconds'] / 60:.1f}"] if "numbers" in run else [f"not done: {run['reason']}", *[""] * 4])
              for name, run in runs.items()]
    return {
        "rp-main": Table("RP: an adapter that learnt from texts alone, mAP on photos",
                         *grid(runs, "rp", [("", ""), (", sentences of a language model", "-llm")], main),
                         'Zero-shot: the cosine with "a photo of a {name}.".'),
        "rp-noise": Table("RP: strength of the noise, times the mean text norm, mAP", *grid(
            runs, "rp", [(", raw", ""), (", unit length", "-unit")],
            [(f"{strength:g}", "", f"{strength:g}", "mAP") for strength in STRENGTHS]), x=STRENGTHS),
        "rp-law": Table("RP: law of the noise, mAP", *grid(runs, "rp", [("", "")], [(*law, "mAP") for law in laws])),
        "rp-texts": Table("RP: number of texts, as many steps for each, mAP", titles, noisy + plain, x=TEXT_COUNTS),
        "rp-cost": Table("RP: cost of a training step against the number of labels", labels, costs,
                         "Prompt tuning in TaI-DPT's form, through ViT-B-32's text encoder, on the CPU; the same "
                         "batch of 512 and the same loss."),
        "sspa-main": Table("SSPA: the full method", *grid(runs, "sspa", towers, [
            (title, "", "none", title) for title in ("zero-shot mAP", *METRICS)])),
        "sspa-ablations": ablation_table(runs),
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
