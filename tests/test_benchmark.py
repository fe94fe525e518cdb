"""experiments/benchmark.py on small shapes: it leaves the rows that others read."""
import json
import sys

import pytest
import torch
from conftest import REPOSITORY

import adapter_rp as rp

sys.path.append(str(REPOSITORY / "experiments"))
import benchmark

PATHS = {"rp": {"adapter step", "asymmetric loss", "prompt tuning"},
         "sspa": {"prompt encoding", "quaternion layer 1", "gated alignment", "soft aggregator",
                  "soft aggregator + loss", "head"}}


@pytest.mark.parametrize("method", PATHS)
def test_rows_that_others_read(command, tmp_path, method):
    command("experiments/benchmark.py", method, "--quick", "--output", tmp_path)
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert result["machine"]["quick"]
    assert {row["path"] for row in result["rows"]} >= PATHS[method]
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["reference_ms"] / row["fused_ms"])
        assert row["fused_mib"] < row["reference_mib"] or row["path"] == "quaternion layer 1"
        assert 0 <= row["multiplications_fused"] <= row["multiplications_reference"]


def test_others_loss_is_ours():
    logits = benchmark.features(9, 5, scale=3.0)
    targets = torch.randint(0, 2, (9, 5))
    torch.testing.assert_close(rp.asymmetric_loss_reference(logits, targets), benchmark.others_loss(logits, targets))
