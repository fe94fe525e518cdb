"""run_all.sh and tests/tables.py: the plan, interrupted and failing runs, what the tables say of the runs, and the README's block."""
import hashlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY
from PIL import Image

import data
import sspa
from data import UsageError

import tables

SMALL = {"OPTIONS": "--limit 300 --epochs 2", "ONLY": "rp-scenes-uniform rp-scenes-sphere", "FEATURES": "", "GPU": "cpu"}


@pytest.fixture
def run_all(tmp_path, cache):
    """run_all("--plan", SEEDS="0 1") -> CompletedProcess (or Popen with wait=False), its runs and results under tmp_path."""
    (tmp_path / "nothing").mkdir()

    def run(*words, expect=0, wait=True, folder=tmp_path, **environment):
        environment = {**os.environ, "DATA_ROOT": str(tmp_path / "nothing"), **{name: value for name, value in environment.items()}}
        environment["OPTIONS"] = f"{environment.get('OPTIONS', '')} --cache {cache}"
        command = [sys.executable, "tests/tables.py", *words, "--runs", str(folder / "runs"), "--results", str(folder / "results")]
        if not wait:
            return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == expect and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done
    return run


def page_of(folder):
    return next((folder / "results").glob("*/tables.md"))  # other settings than the default: a folder of their own


def tables_in(folder):
    return json.loads(page_of(folder).with_suffix(".json").read_text())


def test_plan_without_any_dataset(run_all, tmp_path):
    """Every set is named with the tree that is expected; what needs none can be run; planning writes nothing."""
    shown = run_all("--plan", FEATURES="").stdout
    for dataset in tables.PHOTO_SETS:
        tree, _ = data.EXPECTED[dataset]
        assert f"- {tables.SHOWN[dataset]}: " in shown and f"expected {tmp_path}/nothing/{tree.split('; ')[0]}" in shown
    for name in ("rp-scenes ", "rp-cost", "sspa-scenes ", "sspa-scenes-ablations", "sspa-scenes-tuned"):
        assert re.search(rf"^  {name}.*\d\.\d .*\d\.\d", shown, re.M), name
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_run_again_overwrite_and_kill(run_all, tmp_path):
    """Twice is once; --overwrite is the same again; killed anywhere and started again gives the same tables."""
    first = run_all(**SMALL).stdout
    assert "2 runs to do" in first and ": 2 of " in first
    record, page = tables_in(tmp_path), page_of(tmp_path).read_text()
    law = next(table for table in record["tables"] if table["name"] == "rp-law")
    for column, name, std in ((1, "rp-scenes-uniform", 0.15), (2, "rp-scenes-sphere", 0.15)):  # against the records themselves
        behind = json.loads((REPOSITORY / record["runs"][name]["metrics"]).read_text())
        values = [run["mAP"] for run in behind["runs"] if run["noise_std"] == std]
        cell = law["rows"][0]["cells"][column]
        assert len(values) == 3 and cell["mean"] == pytest.approx(statistics.mean(values)) and cell["std"] == pytest.approx(statistics.stdev(values)) and cell["run"] == name
        assert f"[{cell['mean']:.2f} ± {cell['std']:.2f}]" in page and record["runs"][name]["commit"] == behind["commit"] and record["runs"][name]["seeds"] == [0, 1, 2]
    links = re.findall(r"\]\(([^)]*metrics\.json)\)", page)
    assert len(links) == 4 and all((page_of(tmp_path).parent / link).resolve().is_file() for link in links)
    assert "not available offline" in page and str(tmp_path / "nothing") in page
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.json")}
    assert len(stamps) == 2 and "0 runs to do" in run_all(**SMALL).stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps} and tables_in(tmp_path) == record
    assert "2 runs to do" in run_all("--overwrite", **SMALL).stdout
    assert all(path.stat().st_mtime_ns > stamp for path, stamp in stamps.items()) and tables_in(tmp_path)["tables"] == record["tables"]
    other = tmp_path / "killed"
    for pause, how in ((5, "all of it"), (6, "only its first process"), (7, "Ctrl-C")):
        process = run_all(wait=False, folder=other, **SMALL)
        time.sleep(pause)
        if how == "only its first process":  # its successor waits for the run that was left behind
            os.kill(process.pid, signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGKILL if how == "all of it" else signal.SIGINT)
        process.communicate()
    run_all(folder=other, **SMALL)
    assert tables_in(other)["tables"] == record["tables"]


def test_failing_runs(run_all, tmp_path, cache):
    """The others go on; plan, page and last line say what failed and why; the exit code is the run's own."""
    options = [*SMALL["OPTIONS"].split(), "--cache", cache]
    root = tmp_path / "runs" / hashlib.blake2b(repr((["0", "1", "2"], [], options)).encode(), digest_size=4).hexdigest()
    root.mkdir(parents=True)
    (root / "rp-scenes-uniform").write_text("in the way")
    done = run_all(expect=2, **SMALL)
    assert re.search(r"rp-scenes-uniform.*failed: adapter_rp.py: .*is a file, not a folder \(exit code 2; .*rp-scenes-uniform\.log\)", done.stdout)
    record = tables_in(tmp_path)
    law = next(table for table in record["tables"] if table["name"] == "rp-law")["rows"][0]["cells"]
    assert law[1] == "failed" and isinstance(law[2], dict) and record["runs"]["rp-scenes-uniform"]["state"] == "failed"
    assert "is a file, not a folder" in page_of(tmp_path).read_text()
    (root / "rp-scenes-uniform").unlink()
    assert "1 runs to do" in run_all(**SMALL).stdout  # mended: only that one is left
    path = root / "rp-scenes-uniform/metrics.json"
    result = json.loads(path.read_text())
    path.write_text("{")  # damaged: done again
    assert "1 runs to do" in run_all(**SMALL).stdout and json.loads(path.read_text())["mAP"] == pytest.approx(result["mAP"], abs=1e-3)
    path.write_text(json.dumps({**result, "settings": result["settings"].replace('"epochs": 2', '"epochs": 7')}))  # another run lies there: it is not touched
    other = run_all(expect=2, **{**SMALL, "ONLY": "rp-scenes-uniform"}).stdout
    assert "holds a finished run with other settings (epochs was 7)" in other and "--overwrite does it again" in other and "0 runs to do" in other
    diverged = run_all(expect=3, **{**SMALL, "OPTIONS": "--limit 300 --epochs 3 --lr 1e30", "ONLY": "rp-scenes-uniform"}).stdout
    assert "failed: adapter_rp.py: training diverged" in diverged


def test_photographs(run_all, tmp_path, shared):
    """With real files of VOC2007 (and the toy CLIP on them): what is short is run, what is long on a CPU is named with the way to run it."""
    words = {"DATA_ROOT": str(shared), "CLIP": "--backbone scenes", "OPTIONS": "--limit 60 --epochs 1", "SEEDS": "5", "FEATURES": "", "GPU": "cpu"}
    plan = run_all("--plan", MINUTES="0.5", **words).stdout
    assert re.search(r"too long: .*sspa-voc2007-tuned.*\n +about .* on a CPU\n +GPU=0 uses a GPU, MINUTES=\d+ runs it all the same", plan), plan
    run_all(ONLY="sspa-natural rp-voc2007-llm", **words)
    record = tables_in(tmp_path)
    rows = {row["label"]: row["cells"] for row in next(table for table in record["tables"] if table["name"] == "sspa-natural")["rows"]}
    for metric in tables.LABEL_METRICS:
        frozen, tuned, published, paper = rows[f"VOC2007, {metric}"][1:5]
        assert frozen["run"] == "sspa-voc2007-frozen" and tuned["run"] == "sspa-voc2007-tuned" and frozen["n"] == 1 and paper == "not available offline"
        assert published is None or "96.0 [its model zoo]" in published
        assert rows[f"COCO 2014, {metric}"][1] == "not run: no data"
    rp = next(table for table in record["tables"] if table["name"] == "rp-main")["rows"]
    assert any(row["label"].startswith("VOC2007 (voc2007-qwen2.5-coder-1.5b.jsonl.gz, 60") for row in rp) and "88.5 [SPARC, table 5]" in str(rp)
    assert "difficult" in record["runs"]["sspa-voc2007-tuned"]["policy"]


def test_paper_numbers(monkeypatch, tmp_path):
    """Every cell ships unread; one that is filled in appears with the difference; what is no percentage is refused."""
    papers, anchors = tables.paper_numbers()
    assert set(papers) == {"rp-main", "rp-noise", "rp-law", "rp-normalisation", "rp-texts", "sspa-natural", "sspa-pedestrian", "sspa-remote", "sspa-ablations"}
    assert {value for table in papers.values() for cells in table.values() for value in cells.values()} == {"not available offline"}
    assert all(set(papers[f"sspa-{domain}"]) == set(sets) for domain, sets in tables.DOMAINS.items()) and set(papers["sspa-ablations"]["voc2007"]) == {"SSPA", *sspa.ABLATIONS}
    assert all(set(anchor) == {"method", "backbone", "dataset", "metric", "value", "source", "note"} and anchor["source"] for anchor in anchors)
    (tmp_path / "assets").mkdir()
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)

    def with_cells(*cells):
        changed = json.loads(json.dumps(papers))
        for table, dataset, cell, value in cells:
            changed[table][dataset][cell] = value
        (tmp_path / "assets/paper_numbers.json").write_text(json.dumps({"papers": changed, "anchors": anchors}))

    runs = [tables.Run("rp-voc2007", "adapter_rp.py", [], "voc2007", (), 0, 0)]
    results = {"rp-voc2007": {"zero_shot_mAP": 50.0, "texts": "mine", "text_count": 7, "photo_count": 4951, "backbone": "B", "policy": "P", "runs": [{"seed": seed, "noise_std": std, "mAP": 60.0 + seed + 10 * std, "mAP_interpolated": 61.0}
                                                                                               for seed in (0, 1) for std in tables.STRENGTHS]}}
    with_cells(("rp-main", "voc2007", "mAP", 64.25), ("rp-noise", "voc2007", "0.1", 60))
    made = {table["name"]: table for table in tables.make_tables(runs, results, {})}
    page = tables.as_markdown(made["rp-main"])
    assert "| VOC2007 (mine, 7) | 50.00 | 60.50 ± 0.71 | 62.00 ± 0.71 | 61.00 ± 0.00 |" in page and "| 64.25 | -2.25 |" in page
    assert "VOC2007: 4,951 test photos (**4,952 published**), B; P." in page
    noise = tables.as_markdown(made["rp-noise"])
    assert "| VOC2007, the paper | not available offline | not available offline | 60 | not" in noise and "| VOC2007, ours - paper |  |  | +1.50 |  |  |" in noise
    for bad in ("64.2", 640, 0.64, True, None):
        with_cells(("rp-main", "voc2007", "mAP", bad))
        with pytest.raises(UsageError, match="rp-main, voc2007, mAP"):
            tables.paper_numbers()
    with_cells(("rp-main", "voc2007", "map", 60))
    with pytest.raises(UsageError, match="rp-main, voc2007: map is no cell; its cells are mAP"):
        tables.paper_numbers()
    for torn in ("[]", "{}", '{"papers": {}}', '{"papers": [], "anchors": []}'):
        (tmp_path / "assets/paper_numbers.json").write_text(torn)
        with pytest.raises(UsageError, match="not of its form any more"):
            tables.paper_numbers()


def test_readme_block_is_not_stale():
    """The README's block and its pictures are made of assets/tables.json, and that of today's runs and tables. (That a run still gives its numbers: tests/test_cli.py.)"""
    record = json.loads((REPOSITORY / "assets/tables.json").read_text())
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = readme[readme.index(tables.BEGIN):readme.index(tables.END) + len(tables.END)]
    advice = "stale: bash run_all.sh, then python tests/tables.py --readme"
    assert block == tables.readme_block(record), advice
    settings = tables.Settings("data", "../shared/data/photo_embeddings/voc2007_even.npz", None, ["0", "1", "2"], [], [], [], None, [])
    today = tables.all_runs(settings, {dataset: (1, 1) for dataset in tables.PHOTO_SETS})
    assert {run.name for run in today} == set(record["runs"]), advice
    for run in today:
        entry = record["runs"][run.name]
        if run.dataset in ("scenes", "features", "none"):
            assert entry["state"] == "done" and entry["command"].startswith(f"python {run.script} {shlex.join(run.words)}"), f"{run.name}: {advice}"
    made = tables.make_tables(today, {}, {})
    assert [(table["name"], table["title"]) for table in made] == [(table["name"], table["title"]) for table in record["tables"]], advice
    assert {row["label"] for row in made[-1]["rows"]} == {row["label"] for row in record["tables"][-1]["rows"]}, advice
    for table in record["tables"]:
        if tables.has_numbers(table):
            with Image.open(REPOSITORY / "assets/tables" / f"{table['name']}.png") as image:
                assert image.text["Description"] == tables.digest(table), f"{table['name']}.png: {advice}"
    here = REPOSITORY / "results/tables.json"
    if here.is_file() and (fresh := json.loads(here.read_text()))["settings"] == record["settings"]:
        for old, new in zip(record["tables"], fresh["tables"]):
            if old["name"] != "rp-cost":  # times differ from machine to machine
                pairs = [(a, b) for row, other in zip(old["rows"], new["rows"]) for a, b in zip(row["cells"], other["cells"]) if isinstance(a, dict) and isinstance(b, dict)]
                assert all(abs(a["mean"] - b["mean"]) < 1 for a, b in pairs), f"{old['name']}: {advice}"


def test_what_cannot_be_understood(run_all, tmp_path):
    for environment, said in (({"SEEDS": "0 0"}, "SEEDS=0 0"), ({"SEEDS": "one"}, "SEEDS=one"), ({"GPU": "7"}, "GPU=7: this machine has"), ({"MINUTES": "0"}, "MINUTES=0"), ({"OPTIONS": "--seed 5"}, "--seed is chosen"), ({"OPTIONS": "--data=x"}, "--dataset is chosen"), ({"CLIP": "--epochs 3"}, "CLIP=--epochs 3"),
                              ({"DATA_ROOT": str(tmp_path / "none")}, "none: no such folder"), ({"GPU": "first"}, "GPU=first"), ({"MINUTES": "long"}, "MINUTES=long"),
                              ({"OPTIONS": "'"}, "OPTIONS='"), ({"FEATURES": "nowhere.npz"}, "features file nowhere.npz: no such file"), ({"TEXTS": str(tmp_path / "none")}, "no such folder")):
        with pytest.raises(UsageError) as told:
            tables.settings_from({"GPU": "cpu", **environment})
        assert said in str(told.value) and "\n" not in str(told.value)
    for environment, said in (({"ONLY": "rp-mian"}, "ONLY=rp-mian: no such table, dataset or run; did you mean rp-main"), ({"OPTIONS": "--epoch 1 --colour"}, "unrecognized arguments: --colour; mend CLIP= or OPTIONS=")):
        told = run_all("--plan", expect=2, GPU="cpu", **environment).stderr
        assert told.startswith("run_all.sh: ") and said in told and told.count("\n") == 1, told
