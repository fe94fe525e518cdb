"""experiments/benchmark.py on small shapes: it leaves what others read, and what is fused takes less memory."""
import json
import sys

import pytest
import torch
from conftest import REPOSITORY

import adapter_rp as rp
import sspa

sys.path.insert(0, str(REPOSITORY / "experiments"))
import benchmark

PATHS = {"rp": {"adapter step", "asymmetric loss", "ten epochs", "seed sweep", "prompt tuning"},
         "sspa": {"prompt encoding", "quaternion layer 1", "gated alignment", "soft aggregator",
                  "soft aggregator + loss", "head"}}


@pytest.mark.parametrize("method", PATHS)
def test_rows_that_others_read(command, tmp_path, monkeypatch, method):
    """Memory is counted by PyTorch's allocator, so unlike milliseconds it is the same on every machine. Only eight
    seeds at once take more of it than one after the other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command("experiments/benchmark.py", method, "--quick", "--output", tmp_path)
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert result["machine"]["quick"] and result["machine"]["matmul_multiplications_per_second"] > 1e8
    assert {row["path"] for row in result["rows"]} >= PATHS[method]
    for row in result["rows"]:
        assert row["shape"] and row["ratio"] == pytest.approx(row["reference_ms"] / row["fused_ms"]), row
        aside = row["path"] in ("seed sweep", "ten epochs", "soft aggregator, shared")  # numpy's memory; one form
        assert 0 < row["fused_mib"] < row["reference_mib"] or aside, row
        best = min(row["reference_ms"], row.get("other_ms", 1e9))
        assert row.get("ratio_to_best", row["ratio"]) == pytest.approx(best / row["fused_ms"]), row
        assert 0 <= row["multiplications_fused"] <= row["multiplications_reference"], row


def test_what_else_is_timed(command, tmp_path):
    """The other way of each row computes the same; average precision, and a GPU's steps, here on the CPU."""
    logits, targets = benchmark.features(9, 5, scale=3.0), torch.randint(0, 2, (9, 5))
    ours, other = rp.asymmetric_loss_reference(logits, targets), benchmark.others_loss(logits, targets, targets)
    torch.testing.assert_close(ours, other)
    shared = benchmark.features(5, 8), benchmark.features(3, 4, 8), 0.1, 20.0
    torch.testing.assert_close(sspa.soft_aggregate_reference(*shared), benchmark.others_aggregator(*shared))
    bench = benchmark.Bench(quick=True, compiled=False)
    benchmark.average_precision(bench)
    benchmark.gpu(bench, "cpu")
    assert [row["path"] for row in bench.rows] == ["average precision", "step", "step", "prompt encoding"]
    if not torch.cuda.is_available():
        done = command("experiments/benchmark.py", "gpu", "--output", tmp_path / "none", expect=2)
        assert "no GPU" in done.stderr and not (tmp_path / "none").exists()
