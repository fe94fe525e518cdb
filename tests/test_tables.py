"""run_all.sh and experiments/tables.py: the list of runs, what tables say of what runs left, docs/results.md."""
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

import adapter_rp
import run
import sspa

sys.path.append(str(REPOSITORY / "experiments"))
import tables


@pytest.fixture
def run_all(tmp_path, cache):
    """run_all("--plan", SEEDS="0") -> CompletedProcess of run_all.sh, called from tmp_path, with its runs there"""
    def call(*words, expect=0, start=subprocess.run, **settings):
        own = {"RUNS": f"{tmp_path}/runs", "GPU": "cpu", "FEATURES": "none.npz", "VIRTUAL_ENV": sys.prefix,
               "OPTIONS": f"--train-count 40 --test-count 40 --epochs 1 --cache {cache}", **settings}
        done = start(["bash", REPOSITORY / "run_all.sh", *words], cwd=tmp_path, env={**os.environ, **own}, text=True,
                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        if start is subprocess.run:
            assert done.returncode == expect, done.stdout + done.stderr
        return done
    return call


@pytest.fixture
def write_run(trained, tmp_path):
    """write_run("rp-scenes", [60.0, 61.0]): a real metrics.json, of seeds whose every number is that"""
    def write(name, scores, **changed):
        script = "sspa.py" if name.startswith("sspa") else "adapter_rp.py"
        result = json.loads((trained[script].folder / "metrics.json").read_text())
        template = result["runs"][0]
        result["runs"] = []
        for score in scores:
            one = dict.fromkeys(template, score)
            for group in template:
                if isinstance(template[group], dict):
                    one[group] = dict.fromkeys(template[group], score)
            result["runs"].append({**one, "ap": [score, 10.0]})
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(result | changed))
    return write


def test_numbers(write_run, tmp_path):
    """60, 61, 65: mean 62, sample variance (4 + 1 + 9) / 2 = 7. One seed has no spread. Hits 10 and 14: 12, sqrt(8)."""
    labels = [{"zero_shot_ap": 12, "trained": True}, {"zero_shot_ap": 60, "trained": False}]
    write_run("rp-scenes", [60.0, 61.0, 65.0], per_class=labels)
    write_run("sspa-scenes-short", [70.0])
    write_run("sspa-scenes-short--no-gate", [69.0])
    write_run("rp-ucm", [None, None])
    (tmp_path / "maps-scenes-short").mkdir()
    models = [{"asked": 9, "photos": 4, "maps": {"DSF attention": {"pointing": hits}}} for hits in (10, 14)]
    facts = {"models": models, "command": "python Y", "commit": "c0ffee", "device": "CPU", "seconds": 6}
    (tmp_path / "maps-scenes-short/localize.json").write_text(json.dumps(facts))
    runs = tables.look(tmp_path)
    number = functools.partial(tables.number, runs)
    assert number("rp-scenes") == pytest.approx([62, 7 ** 0.5])
    assert number("rp-scenes/seen, zero-shot") == [12, None]
    assert number("rp-scenes/unseen") == [10, 0]
    assert number("sspa-scenes-short/F1") == [70, None]
    assert number("rp-ucm") == "undefined"
    rows = {label: cells for label, *cells in tables.sspa_ablations(runs).rows}
    assert rows["no gate"][1] == "-1.00"
    assert rows["SSPA"][2] == pytest.approx([12, 8 ** 0.5])


def test_a_missing_cell_holds_the_reason(write_run, tmp_path):
    """A run that was never finished, one that was refused (its old number is not shown), a damaged one."""
    write_run("rp-scenes-uniform", [61.0], finished=False)
    write_run("rp-scenes", [62.0])
    write_run("sspa-ucm", [70.0], config=None)
    (tmp_path / "rp-scenes.reason").write_text("adapter_rp.py: a run with other settings is there\n")
    runs = tables.look(tmp_path)
    assert tables.number(runs, "rp-scenes") == "a run with other settings is there"
    assert "not finished" in runs["rp-scenes-uniform"]["reason"]
    assert "bash run_all.sh goes on" in runs["sspa-ucm"]["reason"]


@pytest.mark.parametrize("changed", [{"source": " "}, {"value": 0.643}, {"value": True}, {"dataset": "voc"}])
def test_a_number_without_its_source_is_refused(tmp_path, changed):
    cell = dict(method="RP", backbone="RN50", dataset="voc2007", metric="mAP", value=64.3, source="S", note="")
    (tmp_path / "papers.json").write_text(json.dumps([cell, cell | changed]))
    with pytest.raises(tables.UsageError, match="entry 2 must"):
        tables.read_papers(tmp_path / "papers.json")


def test_the_list_can_be_typed_and_the_page_is_not_stale(run_all):
    """The scripts' own parsers take every line; a folder for each; the record's runs are runs of the list."""
    settings = {"SEEDS": "0 7", "CLIP": "--backbone RN50", "GPU": "1", "OPTIONS": ""}
    lines = [shlex.split(line) for line in run_all("--plan", **settings).stdout.splitlines()]
    names = [Path(line[-1]).name for line in lines]
    assert len(set(names)) == len(names) > 100
    for _, script, *words in lines:
        if script in ("adapter_rp.py", "sspa.py"):
            method = adapter_rp if script == "adapter_rp.py" else sspa
            assert run.parse(method.Config, words, "", "").seed == (0, 7)
    record = json.loads(tables.RECORD.read_text())
    assert set(record) < set(names)
    for path in tables.DOCS:
        page = path.read_text("utf-8")
        assert tables.filled_in(page, tables.tables_of(record)) == page


def test_a_failing_run_is_named_and_the_list_goes_on(run_all, tmp_path):
    runs = tmp_path / "runs"
    said = (f"{runs}/rp-scenes-uniform: done\n{runs}/rp-features-sphere: adapter_rp.py: features file .*\n"
            f"{runs}/sspa-ucm-tuned: sspa.py: GPU 0: this machine .*\n{runs}/tables.md: 1 of 3 runs are finished\n")
    assert re.fullmatch(said, run_all(ONLY="rp-scenes-uniform rp-features-sphere sspa-ucm-tuned$").stdout)
    assert "other settings (" in run_all(ONLY="rp-scenes-uniform", OPTIONS="--lr 0.1").stdout


def test_ctrl_c_ends_the_list(run_all, tmp_path):
    process = run_all(start=subprocess.Popen, ONLY="rp-scenes")
    log = tmp_path / "runs/rp-scenes.log"
    while not log.is_file() or not log.read_bytes():  # until the first run has said its first word
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(log.parent.glob("*.log")) == [log]


def test_tag(run_all, tmp_path):
    """Words and photos to tags, from another folder. A model is not asked before all else is found to be there."""
    (tmp_path / "words.txt").write_text("ball\nboat\nchess board\n")
    (tmp_path / "empty").mkdir()
    nobody = "--llm=http://127.0.0.1:9/v1"
    assert "no photo in this folder" in run_all("tag", "words.txt", "empty", nobody, expect=2).stderr
    assert "label file no.txt: no such file" in run_all("tag", "no.txt", ".", nobody, expect=2).stderr
    assert "photos nosuch/: no such file or folder" in run_all("tag", "words.txt", "nosuch/", expect=2).stderr
    assert "no command 'x'" in run_all("x", expect=2).stderr
    photos = REPOSITORY / "assets/tables"
    options = "--backbone scenes --top-k 1 --epochs 1 --count 60 --quiet --output found"
    assert "photos tagged" in run_all("tag", "words.txt", photos, *options.split()).stdout
    lines = (tmp_path / "found/tags.jsonl").read_text().splitlines()
    assert [json.loads(line)["photo"] for line in lines] == [str(photo) for photo in sorted(photos.iterdir())]


def test_the_demos_table(write_run, tmp_path, capsys):
    write_run("rp", [64.0, 65.0])
    write_run("rp-no-noise", [60.0])
    tables.main(["--demo", str(tmp_path)])
    assert "SSPA" not in capsys.readouterr().out
    write_run("sspa", [67.0])
    tables.main(["--demo", str(tmp_path)])
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {"RP, noise 0.15 300 sentences 64.50 ±0.71 64.5 64.5",
            "SSPA, image tower frozen 130 labelled pictures 67.00 67.0 67.0"} < lines
