"""experiments/benchmark.py on small shapes: it leaves the rows that others read."""
import json
import re
import sys
import warnings

import pytest
import torch
from conftest import REPOSITORY

import adapter_rp as rp
import sspa
from data import UsageError

sys.path.append(str(REPOSITORY / "experiments"))
import benchmark

PATHS = {"rp": {"adapter step", "asymmetric loss", "average precision", "prompt tuning"},
         "sspa": {"prompt encoding", "quaternion layer 1", "gated alignment", "soft aggregator",
                  "soft aggregator + loss", "head"}}
SHOWN = PATHS["rp"] - {"prompt tuning"} | PATHS["sspa"] | {"tagging"}
RECORD = {"machine": {"processor": "abacus", "commit": "12ab", "quick": False},
          "rows": [{"path": path, "shape": "C=2", "reference_ms": 3.5, "fused_ms": 2.0, "reference / fused": 1.75,
                    "ratio": 1.75, "multiplications_fused": 2.5e9, "fused_mib": 0.0} for path in SHOWN]}


@pytest.mark.parametrize("method", PATHS)
def test_rows_that_others_read(command, tmp_path, method):
    command("experiments/benchmark.py", method, "--quick", "--output", tmp_path)
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert result["machine"]["quick"]
    assert {row["path"] for row in result["rows"]} == PATHS[method]
    for row in result["rows"]:
        if row["path"] == "average precision":
            assert row["ratio"] == row["scikit_learn / fused"]
            continue
        assert row["ratio"] == pytest.approx(row["reference_ms"] / row["fused_ms"])
        assert ("others / fused" in row) == (row["path"] == "asymmetric loss")
        assert row["fused_mib"] < 1.1 * row["reference_mib"] or row["path"] == "quaternion layer 1"
        assert 0 <= row["multiplications_fused"] <= row["multiplications_reference"]


def test_others_loss_is_ours():
    logits = benchmark.features(9, 5, scale=3.0).double()
    targets = torch.randint(0, 2, (9, 5))
    torch.testing.assert_close(rp.asymmetric_loss_reference(logits, targets), benchmark.others_loss(logits, targets))


@pytest.fixture(scope="module")
def rows_of_gpu():
    bench = benchmark.Bench(quick=True)
    benchmark.gpu(bench, "cpu")
    return bench.rows


def test_gpu_on_a_cpu(rows_of_gpu):
    """Frozen and tuned, each with its synchronisations; prompts"""
    assert [row["path"] for row in rows_of_gpu] == [*["step", "host synchronisations"] * 2, "prompt encoding"]
    frozen, tuned = rows_of_gpu[0:4:2]
    clip = benchmark.embed.load_clip()
    _, tower = benchmark.cost(lambda: sspa.image_features(clip.model.visual, torch.ones(2, 3, 64, 64)))
    assert tuned["multiplications_fused"] - frozen["multiplications_fused"] > 2 * tower  # there and back


def test_synchronisations(monkeypatch):
    """Those of one step, counted by PyTorch's own warnings"""
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
    a, b = benchmark.interleave([lambda: calls.append("a"), lambda: calls.append("b")], False, 0.01)
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert len(calls) > 4
    assert min(a, b) > 0


def test_cut_prompts_are_the_plain_ones(rows_of_gpu):
    clip = benchmark.embed.load_clip()
    labels = benchmark.labels_of(clip, 3)
    inputs = (clip.model, labels.words[None], labels.tokens)
    torch.testing.assert_close(benchmark.cut_prompts(*inputs), sspa.encode_prompts_reference(*inputs))
    row = rows_of_gpu[-1]
    assert row["multiplications_fused"] < row["multiplications_cut"] < row["multiplications_reference"]


def test_training_step_learns():
    """The steps beside each other are the same training: equal losses, which fall."""
    clip = benchmark.embed.load_clip()
    given = (benchmark.features(4, 96, learn=False), benchmark.features(4, 9, 96, learn=False))
    losses = {}
    for impl in ("reference", "fused"):
        torch.manual_seed(0)
        step = benchmark.training_step(clip, 5, lambda: given, impl)
        losses[impl] = [step().item() for _ in range(3)]
    assert losses["reference"] == pytest.approx(losses["fused"], rel=1e-3)
    assert losses["fused"][0] > losses["fused"][-1]


def test_docs(tmp_path, monkeypatch):
    page = tmp_path / "speed.md"
    page.write_text(benchmark.PAGE.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(benchmark, "PAGE", page)
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps(RECORD))
    benchmark.write_docs(path)
    text = page.read_text("utf-8")
    head = "|  | reference ms | fused ms | reference / fused | multiplications fused |\n"
    assert text.count(head) == text.count("\n| C=2 | 3.50 | 2.00 | 1.75 | 2.5e+09 |\n") == len(SHOWN)
    assert "| processor | abacus |" in text
    places = set(re.findall("<!-- table (.*) -->", text))
    assert places == {"machine"} | {path.replace(" ", "-") for path in SHOWN}


@pytest.mark.parametrize("change", [{"commit": "12ab+"}, {"commit": "unknown"}, {"quick": True}])
def test_docs_of_another_record(tmp_path, monkeypatch, change):
    monkeypatch.setattr(benchmark, "PAGE", tmp_path / "none")
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({**RECORD, "machine": {**RECORD["machine"], **change}}))
    with pytest.raises(UsageError, match="commit"):
        benchmark.write_docs(path)
