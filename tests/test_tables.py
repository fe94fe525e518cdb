"""run_all.sh and experiments/tables.py: the list of runs, the tables of their results, README.md and docs."""
import functools
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import intervals
import numpy as np
import pytest
import tables
from conftest import REPOSITORY
from forked import read_lines, result_of
from safetensors.numpy import save_file

import adapter_rp
import data
import metrics
import run
import sspa


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
    """write_run("rp-scenes", [60.0, 61.0]): a real metrics.json, of one or two seeds with such mAPs and F1s"""
    def write(name, scores, kept=None, **changed):
        script = "sspa.py" if name.startswith("sspa") else "adapter_rp.py"
        result = result_of(trained[script].folder) | changed
        for one, score in zip(result["runs"], scores, strict=False):
            one |= {"mAP": score, "ap": [score, 10.0], "threshold_0.5": dict.fromkeys(one["threshold_0.5"], score)}
        result["runs"] = result["runs"][:len(scores)]
        data.write_json(tmp_path / name / "metrics.json", result)
        if kept:
            save_file(kept, tmp_path / name / "scores.safetensors")
    return write


def test_numbers(write_run, tmp_path):
    """60, 61: mean 60.5, sample variance 2 * 0.5^2 = 0.5. Of the two labels the first was trained on."""
    labels = [{"zero_shot_ap": 12, "trained": True}, {"zero_shot_ap": 60, "trained": False}]
    write_run("rp-scenes", [60.0, 61.0], per_class=labels)
    write_run("rp-ucm", [None])
    number = functools.partial(tables.number, tables.look(tmp_path))
    assert number("rp-scenes") == number("rp-scenes/CF1") == number("rp-scenes/seen") == [60.5, 0.5 ** 0.5]
    assert number("rp-scenes/seen, zero-shot") == [12, None]
    assert number("rp-ucm") == "undefined"


def test_other_records():
    """10 and 14: mean 12, standard deviation sqrt(8). Of macro and micro F1 the first. Thirds of 10, 12, 14."""
    facts = dict.fromkeys(("command", "commit", "device", "seconds"))
    models = [{"maps": {"DSF": {"pointing": hits}}} for hits in (10, 14)]
    assert tables.read_maps({**facts, "models": models})["numbers"] == {"DSF": [12, 8 ** 0.5]}
    values = {"A, 50": [[10, 1], [14, 1]], "A, 100": [3], "B, 50": [5]}
    runs = {"curve": tables.read_values({**facts, "values": values})}
    for third in range(3):
        runs[f"rp-scenes-unseen-{third}"] = {"numbers": {"seen": [10 + 2 * third, 0]}}
    assert tables.curve(runs).rows == [["A", [12, 8 ** 0.5], [3, None]], ["B", [5, None], ""]]
    assert tables.unseen(runs).rows[0][1:3] == [[12, 2], ""]


def test_weighted_photos_are_repeated_photos():
    """The metrics of weighted photos are those of repeated rows, with ties and ignored labels."""
    draw = np.random.default_rng(0)
    truth = draw.integers(-1, 2, (60, 4))
    truth[:, 3] = np.arange(60) == 0  # in some draws without a positive
    scores = draw.normal(size=(60, 4)).round(1)
    found = scores > 0.5
    weights = intervals.photo_weights(60)
    mAP = intervals.weighted_mAP(scores, truth, weights)
    F1 = intervals.weighted_macro_f1(found, truth, weights)
    for column in (intervals.WHOLE, 1, 2, 3, intervals.THIRD.start, intervals.REST.start):
        rows = np.repeat(np.arange(60), weights[:, column].astype(int))
        assert mAP[column] == pytest.approx(metrics.mean_average_precision(scores[rows], truth[rows]), abs=1e-4)
        assert F1[column] == pytest.approx(metrics.macro_f1(1.0 * found[rows], truth[rows]))


def test_noise_chosen_on_a_third():
    """0.1 is the best on every third, and 2 above 0.15 on the rest."""
    best = np.full((2, intervals.REST.start + intervals.SPLITS), 62, np.float32)
    assert json.dumps(intervals.gain_of_chosen({0.1: best, 0.15: best - 2}, 0.15)) == "[2.0, 0.0]"


def test_difference():
    """Equally many seeds are pairs; others, here one, are not: the error of 60, 62, 64 is 2 / sqrt 3."""
    seeds = np.tile([[60.0], [62], [64]], 1001)
    assert intervals.difference(seeds, seeds - 1) == [1, 0, 1, 1]
    assert intervals.difference(seeds, seeds[:1]) == [2, pytest.approx(2 / 3 ** 0.5), 2, 2]


def test_intervals_and_claims(write_run, tmp_path):
    """One label; some runs rank well, others in reverse, in every draw. Equal runs are not resolved."""
    truth = (np.arange(40) % 2)[:, None].astype(np.int8)
    good = (truth + np.linspace(-0.6, 0.6, 40)[:, None]).astype(np.float32)
    for name, scores in (("rp-scenes", good), ("rp-scenes--noise-std-0", -good)):
        write_run(name, [60.0, 61.0], {"linear_probe": good, "seed 0": scores, "seed 1": scores, "truth": truth})
    runs = tables.look(tmp_path)
    low, high = tables.number(runs, "rp-scenes")[2:]
    assert low < 100 * metrics.average_precision(good, truth)[0] < high <= 100
    assert f"60.50 ± 0.71 [{low:.1f}, {high:.1f}]" in tables.markdown(tables.headline(runs))
    rows = {words: cells[2:] for words, *cells in tables.differences(runs).rows}
    assert rows["RP: noise 0.15 against none (drawn scenes)"][2] == "yes"
    same = rows["RP against the linear probe of the texts, C = 100 (drawn scenes)"]
    assert same == ["+0.00 ± 0.00", "+0.00 to +0.00", "not resolved"]


@pytest.mark.parametrize("error, low, verdict", [(0.4, 0.5, "yes"), (0.6, 0.5, "not resolved"),
                                                 (0.1, -0.5, "not resolved")])
def test_resolved(error, low, verdict):
    numbers = {"rp-ucm - rp-ucm-unit": [1.0, error, low, 1.5]}
    assert tables.differences({"rp-ucm": {"numbers": numbers}}).rows[0][-1] == verdict


def test_baselines(place, tmp_path):
    """No C is better on the test photos than the one chosen there; the saved scores give an interval."""
    main = runpy.run_path(REPOSITORY / "experiments/baselines.py")["main"]
    main(f"--cpu --quiet --features {place}/features.npz --seed 0 --output {tmp_path}/baselines-ucm".split())
    runs = tables.look(tmp_path)
    tables.check_record({"baselines-ucm": runs["baselines-ucm"] | {"commit": "a" * 40}})
    best, _, low, high = tables.number(runs, tables.BEST_PROBE.format("ucm"))
    assert tables.number(runs, "baselines-ucm/logistic regression, C by a fifth, 0 noisy copies")[0] < best
    assert low < best < high


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
    cell = dict.fromkeys(tables.PUBLISHED, "RP") | {"dataset": "voc2007", "value": 64.3}
    papers = data.write_json(tmp_path / "papers.json", [cell, cell | changed])
    with pytest.raises(tables.UsageError, match="entry 2 must"):
        tables.read_papers(papers)


def test_the_list_can_be_typed_and_the_record_is_of_it(run_all):
    """The scripts' own parsers take every line; a folder for each. Every recorded run is one of the list; its command
    names a script and options that are there; the pages say what the record says."""
    settings = {"SEEDS": "0 7", "CLIP": "--backbone RN50", "GPU": "1", "OPTIONS": ""}
    commands = [shlex.split(line)[1:] for line in run_all("--plan", **settings).stdout.splitlines()]
    folders = {Path(words[-1]).name for words in commands}
    assert len(folders) == len(commands) > 100
    for script, *words in commands:
        if script in ("adapter_rp.py", "sspa.py"):
            method = adapter_rp if script == "adapter_rp.py" else sspa
            assert run.parse(method.Config, words, "", "").seed == (0, 7)

    record = json.loads(tables.RECORD.read_text())
    assert set(record) < folders
    tables.main(["--check"])
    commands = [shlex.split(one["command"])[1:] for one in record.values()]
    known = {script: options_of(script) for script in {words[0] for words in commands}}
    for script, *words in commands:
        assert {word for word in words if word.startswith("--")} <= known[script]


def options_of(script):
    """What --help prints, with that of the scripts whose options it takes"""
    words = [sys.executable, REPOSITORY / script, "--help"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    others = [options_of(other) for other in re.findall(r"options of (\w+\.py)", text)]
    return set(re.findall(r"--[\w-]+", text)).union(*others)


@pytest.mark.parametrize("commits", ["a" * 40 + "+", "unknown", "a" * 40 + " " + "b" * 40])
def test_only_one_clean_commit_is_recorded(write_run, tmp_path, commits):
    for number, commit in enumerate(commits.split()):
        write_run(f"rp-scenes-{number}", [60.0], commit=commit)
    with pytest.raises(tables.UsageError, match="on one commit without changes"):
        tables.main(["--docs", "--runs", str(tmp_path)])


def test_docs_and_check(write_run, tmp_path, monkeypatch):
    """What --docs wrote --check accepts, until somebody changes a digit."""
    page = tmp_path / "page.md"
    monkeypatch.setattr(tables, "RECORD", tmp_path / "tables.json")
    monkeypatch.setattr(tables, "PAGES", [page])
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    page.write_text("<!-- number rp-ucm/mAP -->?<!-- end --> in <!-- minutes rp-ucm -->?<!-- end -->\n"
                    "<!-- table rp-main -->\n<!-- end -->\n")
    write_run("rp-ucm", [60.0, 61.0], commit="a" * 40, seconds=119)
    tables.main(["--docs", "--runs", str(tmp_path)])
    text = page.read_text()
    assert "<!-- number rp-ucm/mAP -->60.50 ± 0.71<!-- end --> in <!-- minutes rp-ucm -->2.0<!-- end -->" in text
    assert "| RP, noise 0.15 | 60.50 ± 0.71 |" in text
    tables.main(["--check"])
    page.write_text(text.replace("60.50", "60.51", 1))
    with pytest.raises(tables.UsageError, match="page.md says '.*60.51"):
        tables.main(["--check"])
    page.write_text("<!-- number rp-ucm/map -->?<!-- end -->")
    with pytest.raises(tables.UsageError, match="asks for rp-ucm/map, which no run has"):
        tables.main(["--check"])


def test_a_failing_run_is_named_and_the_list_goes_on(run_all, tmp_path):
    """Two run at a time, each with a line of its own"""
    runs = tmp_path / "runs"
    *lines, last = run_all(ONLY="rp-scenes-uniform rp-features-linear$ sspa-ucm-tuned$").stdout.splitlines()
    said = (f"{runs}/rp-features-linear: adapter_rp.py: features file .*\n{runs}/rp-scenes-uniform: done\n"
            f"{runs}/sspa-ucm-tuned: sspa.py: GPU 0: this machine .*")
    assert re.fullmatch(said, "\n".join(sorted(lines)))
    assert last == f"{runs}/tables.md: 1 of 3 runs are finished"
    assert "other settings (" in run_all(ONLY="rp-scenes-uniform", OPTIONS="--lr 0.1").stdout


def test_ctrl_c_ends_the_list(run_all, tmp_path):
    """Both runs that are under way end, and no other begins."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background
    process = run_all(start=subprocess.Popen, ONLY="rp-scenes", OPTIONS="--epochs 9999")
    names = {"rp-scenes", "rp-scenes--noise-std-0"}
    while not all((tmp_path / f"runs/{name}/resume.pt").is_file() for name in names):  # until both are training
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)  # until nobody holds its stdout
    assert process.returncode == 130 and "done" not in said
    assert {log.stem for log in (tmp_path / "runs").glob("*.log")} == names


def test_tag(run_all, tmp_path):
    """From words and photos to tags, from another folder. The model is not asked before all else is known to exist."""
    (tmp_path / "words.txt").write_text("ball\nboat\nchess board\n")
    (tmp_path / "empty").mkdir()
    for words, wrong in (("tag words.txt empty --llm=http://127.0.0.1:9/v1", "no photo in this folder"),
                         ("tag no.txt .", "label file no.txt: no such file"),
                         ("tag words.txt nosuch/", "photos nosuch/: no such file or folder"), ("x", "no command 'x'")):
        assert wrong in run_all(*words.split(), expect=2).stderr
    photos = REPOSITORY / "assets/tables"
    options = "--backbone scenes --top-k 1 --epochs 1 --count 60 --quiet --output found"
    assert "carry none of these labels" in run_all("tag", "words.txt", photos, *options.split()).stdout
    tagged = [line["photo"] for line in read_lines(tmp_path / "found/tags.jsonl")]
    assert tagged == [*map(str, sorted(photos.iterdir()))]


def test_the_demos_table(write_run, tmp_path, capsys):
    write_run("rp", [64.0, 65.0])
    write_run("rp-no-noise", [60.0])
    tables.demo(tmp_path)
    assert "SSPA" not in capsys.readouterr().out
    write_run("sspa", [67.0])
    tables.main(["--demo", str(tmp_path)])
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {"RP, noise 0.15 300 sentences 64.50 ±0.71 64.5 64.5",
            "SSPA, image tower frozen 130 labelled pictures 67.00 67.0 67.0"} < lines
