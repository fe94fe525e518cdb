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
from PIL import Image

import adapter_rp
import run
import sspa

sys.path.insert(0, str(REPOSITORY / "experiments"))

import benchmark
import tables


@pytest.fixture
def run_all(tmp_path, cache):
    """run_all("--plan", SEEDS="0") -> CompletedProcess of run_all.sh, called from tmp_path, with its runs there"""
    def call(*words, expect=0, start=subprocess.run, **settings):
        own = {"RUNS": f"{tmp_path}/runs", "GPU": "cpu", "FEATURES": "none.npz", "VIRTUAL_ENV": sys.prefix,
               "OPTIONS": f"--limit 40 --epochs 1 --cache {cache}", **settings}
        done = start(["bash", REPOSITORY / "run_all.sh", *words], cwd=tmp_path, env={**os.environ, **own}, text=True,
                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        if start is subprocess.run:
            assert done.returncode == expect and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done
    return call


def write_run(folder, name, runs, **changed):
    """A metrics.json by hand, as far as tables read it. runs: (strength of the noise or ablation, mAP) of each seed"""
    facts = {"text_count": 8000, "train_count": 5011, "photo_count": 4952, "label_count": 20, "zero_shot_mAP": 50.25,
             "linear_probe_mAP": 55.5, "per_class": [],
             "config": {"epochs": 20}, "backbone": "ViT-B-16", "policy": "difficult=ignore", "command": "python X",
             "commit": "c0ffee", "device": "CPU", "seconds": 90.0, "seeds": [0, 1, 2], "finished": True, "runs": []}
    for setting, score in runs:
        group = dict.fromkeys(("CF1", "OF1", "mA", "accuracy", "precision", "recall", "F1"), score)
        facts["runs"].append({"noise_std": setting, "ablation": setting, "mAP": score, "mAP_interpolated": score,
                              "threshold_0.5": group, "top_3": group, "attributes": group})
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.json").write_text(json.dumps({"method": name.split("-")[0], **facts, **changed}))


def test_mean_and_sample_deviation(tmp_path):
    """60, 61, 65: mean 62, sample variance (4 + 1 + 9) / 2 = 7. One seed has no spread, an ablation a difference."""
    write_run(tmp_path, "rp-scenes", [(0.15, 60.0), (0.15, 61.0), (0.15, 65.0), (0, 40.0)])
    write_run(tmp_path, "sspa-ucm-ablations", [("none", 70.0), ("none", 72.0), ("a new ablation", 69.0)])
    write_run(tmp_path, "rp-ucm", [(0.15, None), (0.15, None)])
    write_run(tmp_path, "sspa-voc2007-tuned", [("none", 70.0), ("none", 71.0)])
    assert tables.main(["--runs", str(tmp_path), "--results", str(tmp_path / "page.md")]) is None
    for line in ("| scenes (8,000 texts) | 50.25 | 55.50 | 40.00 | 62.00 ± 2.65 | 62.00 ± 2.65 |",
                 "| scenes, raw (8,000 texts) | 40.00 | 62.00 ± 2.65 |",
                 "| ucm (8,000 texts) | 50.25 | 55.50 |  | undefined |",
                 "| SSPA | 71.00 ± 1.41 |  |", "| a new ablation | 69.00 | -2.00 |",
                 "| ucm, image tower frozen (5,011 photos, 20 epochs) | 50.25 | 55.50 | 71.00 ± 1.41 | 71.00 ± 1.41 |",
                 "| voc2007 | mAP | 70.5 | SSPA, ours |  | run sspa-voc2007-tuned |  |\n| voc2007 | mAP | 75.91 | CLIP",
                 "| rp-ucm | `python X` | 4,952 photos, 20 labels, ViT-B-16; difficult=ignore | c0ffee | CPU | 1.5 |"):
        assert line in (tmp_path / "page.md").read_text(), line


def test_maps_photos_and_labels_never_seen(tmp_path):
    """Hits 10 and 14: 12, deviation sqrt(8). Labels 0 and 2 were seen: means of 20 and 40, 30 and 50 over two seeds."""
    write_run(tmp_path, "sspa-scenes-ablations", [("none", 70.0), ("none", 72.0), ("no gate", 69.0)])
    write_run(tmp_path, "sspa-scenes-100-photos", [("none", 50.0)])
    models = [{"title": title, "asked": 9, "photos": 4, "maps": {name: {"pointing": hits} for name in tables.MAPS}}
              for title, hits in (("SSPA", 10), ("SSPA", 14), ("no gate", 90))]
    (tmp_path / "maps-scenes-ablations").mkdir()
    (tmp_path / "maps-scenes-ablations/localize.json").write_text(json.dumps(
        {"models": models, "command": "python Y", "commit": "c0ffee", "device": "CPU", "seconds": 6}))
    labels = [{"zero_shot_ap": value, "trained": trained} for value, trained in ((10, True), (60, False), (12, True))]
    write_run(tmp_path, "rp-scenes-unseen-1", [(0.15, 1.0), (0.15, 1.0)], per_class=labels)
    path = tmp_path / "rp-scenes-unseen-1/metrics.json"
    result = json.loads(path.read_text())
    for run_, ap in zip(result["runs"], ([20, 70, 40], [30, 72, 50]), strict=True):
        run_["ap"] = ap
    path.write_text(json.dumps(result))
    assert tables.main(["--runs", str(tmp_path), "--results", str(tmp_path / "page.md")]) is None
    hits = " | ".join(["12.00 ± 2.83"] * 6)
    for line in ("| SSPA | 71.00 ± 1.41 |  | 12.00 ± 2.83 | 12.00 ± 2.83 |",
                 "| no gate | 69.00 | -2.00 | 90.00 | 90.00 |",
                 f"| SSPA: frozen, 4,000, 8 | 71.00 ± 1.41 | {hits} |", "| linear probe of the same features | 55.50 |",
                 "| RP, scenes, without third 2 | 35.00 ± 7.07 | 11.00 | 71.00 ± 1.41 | 60.00 |",
                 "| maps-scenes-ablations | `python Y` | 9 things in 4 photos | c0ffee | CPU | 0.1 |"):
        assert line in (tmp_path / "page.md").read_text(), line


def test_a_missing_cell_holds_the_reason(tmp_path):
    """A run that was never finished, one that was refused (its old number is not shown), a damaged one."""
    write_run(tmp_path, "rp-scenes", [(0.15, 60.0), (0, 40.0)])
    write_run(tmp_path, "rp-scenes-uniform", [(0.15, 61.0)], finished=False)
    write_run(tmp_path, "rp-scenes-sphere", [(0.15, 62.0)])
    (tmp_path / "rp-scenes-sphere.reason").write_text("adapter_rp.py: a run with other | settings is there\n")
    write_run(tmp_path, "sspa-ucm", [("none", 70.0)], config=None)
    assert tables.main(["--runs", str(tmp_path), "--results", str(tmp_path / "page.md")]) is None
    page = (tmp_path / "page.md").read_text()
    law = re.search(r"gaussian \| uniform \| sphere \| none.*\n.*\n\| scenes (.*)", page)[1].split(" | ")
    assert [law[1], law[2][:5], *law[3:]] == ["60.00", "run /", "a run with other / settings is there", "40.00 |"]
    for name, why in ("rp-scenes-uniform", "not finished"), ("sspa-ucm", "not in the form"):
        assert re.search(rf"\| {name} \| not done: run .*{name}/metrics.json: {why}.*; bash run_all.sh goes on", page)


@pytest.mark.parametrize("changed", [
    {"source": " "}, {"value": 0.643}, {"value": "64.3"}, {"value": True}, {"dataset": "voc"}, {"page": 7}])
def test_a_number_without_its_source_is_refused(tmp_path, changed):
    cell = dict(method="RP", backbone="RN50", dataset="voc2007", metric="mAP", value=64.3, source="S", note="")
    (tmp_path / "papers.json").write_text(json.dumps([cell, cell | changed]))
    with pytest.raises(tables.UsageError, match="paper numbers .*: entry 2 must .*; mend that entry"):
        tables.read_papers(tmp_path / "papers.json")


def test_every_line_of_the_list_can_be_typed(run_all):
    """The scripts' own parsers take every line; a folder for each; runs of fewer texts make as many steps."""
    settings = {"SEEDS": "0 7", "CLIP": "--backbone RN50", "GPU": "1", "DATA_ROOT": "my data", "OPTIONS": ""}
    plans = run_all("--plan", **settings), run_all("--plan", DATASETS="folder ucm", **settings)
    lines = [shlex.split(line) for plan in plans for line in plan.stdout.splitlines()]
    names, steps = {Path(line[-1]).name for line in lines}, set()
    assert len(lines) > len(names) > 70 and {"rp-ucm", "sspa-folder-tuned", "sspa-ucm-ablations", "rp-cost"} < names
    assert {line[2] for line in lines if line[1] == "experiments/benchmark.py"} <= set(benchmark.TABLES)
    scripts = {"adapter_rp.py": adapter_rp, "sspa.py": sspa, "experiments/localize.py": sspa}
    assert {line[1] for line in lines} == {*scripts, "experiments/benchmark.py", "experiments/baselines.py"}
    for _, script, *words in (line for line in lines if line[1] in scripts):
        config = run.parse(scripts[script].Config, words, "")
        if "localize" in script:
            continue
        assert (config.seed, config.gpu) == ((0, 7), 1) and (config.backbone == "RN50") == ("--dataset" in words)
        if config.output.endswith("-texts"):
            steps.add((bool(config.features), config.epochs * -(-config.text_count // config.batch_size)))
    assert steps == {(False, 480), (True, 960)}


def test_the_page_of_results_is_not_stale(run_all):
    """It and its pictures are made of assets/tables.json, whose numbers come from lines of the list."""
    record, page = json.loads(tables.RECORD.read_text()), tables.DOCS.read_text("utf-8")
    made = tables.tables_of(record, tables.read_papers(tables.ASSETS / "paper_numbers.json"))
    assert tables.filled_in(page, made) == page and set(re.findall("<!-- table (.*) -->", page)) == set(made)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        with Image.open(tables.DOCS.parent / picture) as image:
            assert image.text["Description"] == tables.markdown(made[Path(picture).stem])
    plan = run_all("--plan", RUNS="runs/tables", OPTIONS="", GPU="", FEATURES="").stdout.splitlines()
    commands = {tuple(shlex.split(entry["command"])) for name, entry in record.items() if name != "rp-cost"}
    assert commands < {tuple(shlex.split(line)) for line in plan}


def test_a_failing_run_is_named_and_the_list_goes_on(run_all, tmp_path):
    """Other settings are refused: what is finished stays, and the table says so instead of the old number."""
    runs, uniform = tmp_path / "runs", tmp_path / "runs/rp-scenes-uniform/metrics.json"
    said = (f"{uniform.parent}: done\n{runs}/rp-features-sphere: adapter_rp.py: features file .*\n"
            f"{runs}/sspa-ucm-tuned: sspa.py: GPU 0: this machine .*\n{runs}/tables.md: 1 of 3 runs are finished\n")
    assert re.fullmatch(said, run_all(ONLY="rp-scenes-uniform rp-features-sphere sspa-ucm-tuned").stdout)
    written, page = uniform.stat().st_mtime_ns, (runs / "tables.md").read_text()
    assert re.search(r"\| scenes \| \d\d\.\d\d ± .*\n\| features \|  \| features file /", page)
    assert "other settings (" in run_all(ONLY="rp-scenes-uniform", OPTIONS="--lr 0.1").stdout
    assert uniform.stat().st_mtime_ns == written and "| scenes | --output /" in (runs / "tables.md").read_text()


def test_ctrl_c_ends_the_list(run_all, tmp_path):
    start = functools.partial(subprocess.Popen, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    process, log = run_all(start=start, ONLY="rp-scenes"), tmp_path / "runs/rp-scenes.log"  # also under nohup
    while not log.is_file() or not log.stat().st_size:  # until the first run has said its first word
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and list(log.parent.glob("*.log")) == [log]


def test_tag(run_all, tmp_path):
    """Words and photos to tags, from another folder. A model is not asked before all else is found to be there."""
    (tmp_path / "words.txt").write_text("ball\nboat\nchess board\n")
    (tmp_path / "empty").mkdir()
    options = ["--backbone", "scenes", "--epochs", "1", "--top-k", "1"]
    llm = ["--llm", "http://127.0.0.1:9/v1"]  # where nobody answers
    assert "no photo in this folder" in run_all("tag", "words.txt", "empty", *llm, *options, expect=2).stderr
    photos = REPOSITORY / "assets/tables"
    lines = run_all("tag", "words.txt", photos, "--count", "60", *options).stdout.splitlines()
    tags = [(tag["photo"], len(tag["labels"]), len(tag["scores"])) for tag in map(json.loads, lines)]
    assert tags == [(str(photo), 1, 1) for photo in sorted(photos.iterdir())] != []


def test_help_mistakes_and_the_demos_table(run_all, tmp_path, capsys):
    assert re.match(r"bash run_all.sh  .*\n(.*\n)+bash run_all.sh test .*\n$", run_all("-h").stdout)
    for words, said in ("tag", "needs a label file"), ("tag no.txt .", "needs a label file"), ("x", "no command 'x'"):
        assert said in run_all(*words.split(), expect=2).stderr
    assert tables.main(["--runs", "none"]) == 2 and "no run is there" in capsys.readouterr().err
    write_run(tmp_path, "rp", [(0.15, 64.0), (0.15, 65.0), (0, 60.0), (0, 60.0)])
    write_run(tmp_path, "sspa", [("none", 67.0), ("none", 68.0)])
    tables.main(["--demo", str(tmp_path)])
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {"zero-shot CLIP (cosine) nothing 50.25", "RP, noise 0.15 8,000 sentences 64.50 ±0.71 64.5 64.5",
            "linear probe, texts 8,000 sentences 55.50", "linear probe, features 5,011 labelled pictures 55.50",
            "SSPA, image tower frozen 5,011 labelled pictures 67.50 ±0.71 67.5 67.5"} < lines
