"""experiments/benchmark.py on small sizes, one round: that it runs, and what its rows hold."""
import re
import time
import warnings

import benchmark
import pytest
import tables
import torch

import adapter_rp as rp
import data
import sspa


def measured(*functions):
    """Rows of the smallest sizes"""
    bench = benchmark.Bench()
    bench.seconds = 0
    bench.backbone = "scenes"
    for function in functions:
        function(bench)
    return bench.rows


@pytest.fixture(scope="module")
def rows():
    """All but tagging, which takes a minute"""
    return measured(*benchmark.TABLES["all"][:-1])


def test_rows(rows):
    """Ratios are the others' times over ours, and memory is measured where all of it is PyTorch's"""
    for row in rows:
        *others, ours = [title.removesuffix(", ms") for title in row if title.endswith(", ms")]
        for side in others:
            assert row[f"{side} / {ours}"] == pytest.approx(row[f"{side}, ms"] / row[f"{ours}, ms"], rel=0.01)
        assert (f"{ours}, MiB" in row) == (row["table"] != "Average precision")


def test_cost():
    """A row of prompt tuning, as tables.py reads it."""
    rows = measured(*benchmark.TABLES["cost"])
    numbers = tables.read_cost({"machine": {"commit": "", "processor": "", "minutes": 0}, "rows": rows})["numbers"]
    assert set(numbers) == {f"{title}, C=2" for title in tables.COSTS}


def test_authors_loss_is_ours():
    logits = benchmark.learnt(9, 5, scale=3.0).double()
    targets = torch.randint(0, 2, (9, 5))
    torch.testing.assert_close(rp.asymmetric_loss_reference(logits, targets), benchmark.authors_loss(logits, targets))


def test_cut_prompts_are_the_plain_ones():
    clip = benchmark.random_clip("scenes")
    labels = benchmark.labels_of(clip, 3)
    inputs = (clip.model, labels.words[None], labels.tokens)
    torch.testing.assert_close(benchmark.cut_prompts(*inputs), sspa.encode_prompts_reference(*inputs))


def test_gpu_on_a_cpu():
    """A row for the frozen and the tuned tower, each with its synchronisations, and one for the prompts"""
    found = [row["table"] for row in measured(benchmark.gpu)]
    assert found == ["SSPA step", "Synchronisations"] * 2 + ["Prompts"]


def test_synchronisations(monkeypatch):
    """The synchronisations of one step after the first are counted by PyTorch's own warnings"""
    modes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        if modes:
            for why in ["called a synchronizing CUDA operation"] * 2 + ["a prototype feature"]:
                warnings.warn(why, stacklevel=1)
    assert benchmark.synchronisations(step) == 2
    assert modes == ["warn", "default"]


def test_interleave():
    """A B A B ..., the first round warms up"""
    calls = []
    times = benchmark.interleave([lambda: calls.append("a"), lambda: calls.append(time.sleep(1e-3))], 0.01)
    assert calls[:4] == ["a", None] * 2
    assert times[0] < 1 < times[1]


def test_docs(tmp_path, monkeypatch, rows):
    """Every table has its place; places of another command stay as they are; another commit is refused"""
    page = tmp_path / "speed.md"
    page.write_text(benchmark.PAGE.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(benchmark, "PAGE", page)
    record = {"machine": {"command": "all", "commit": "12ab"},
              "rows": [*rows, {"table": "Tagging", "shape": "1 x 1 pixels", "ours / bare": 0.0}]}
    path = data.write_json(tmp_path / "benchmark.json", record)
    benchmark.write_docs(path)
    text = page.read_text("utf-8")
    assert "commit 12ab\n" in text
    assert "| 1 x 1 pixels | 0.00 |" in text
    assert "<!-- speed gpu SSPA step -->\n<!-- end -->" in text
    assert set(re.findall("<!-- speed all (.*) -->", text)) == {"machine", *(row["table"] for row in record["rows"])}
    record["machine"]["commit"] += "+"
    data.write_json(path, record)
    with pytest.raises(data.UsageError, match="12ab\\+; commit"):
        benchmark.write_docs(path)
