"""experiments/benchmark.py on small shapes: it leaves what others read, and what is fused takes less memory."""
import json

import pytest

PATHS = {"rp": {"adapter step", "asymmetric loss", "seed sweep", "prompt tuning"},
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
        assert 0 < row["fused_mib"] < row["reference_mib"] or row["path"] == "seed sweep", row
        assert 0 <= row["multiplications_fused"] <= row["multiplications_reference"], row
