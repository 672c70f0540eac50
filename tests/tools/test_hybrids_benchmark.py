"""What the comparison of HYDRA's patterns holds equal, and what it claims."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError
from tools.benchmarks import hybrids


def write_runs(work: Path, losses: dict[str, list[float]], without: str = "") -> None:
    """Runs of one loss in all bands, seed by seed, whose routed layers let 15 % attend."""
    for name, by_seed in losses.items():
        for seed, loss in zip(hybrids.SEEDS, by_seed, strict=True):
            run = work / f"{name}-{seed}"
            run.mkdir(parents=True)
            rows: list[dict[str, Any]] = [{"step": step, "loss": 2.0, "route_rate": 0.15} for step in range(4)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"valid_loss": 2.0}]))
            if name != without:
                (run / "bands.json").write_text(json.dumps([loss] * hybrids.BANDS))


@pytest.mark.parametrize("name", hybrids.PATTERNS)
def test_all_models_have_the_parameters_of_plain_attention(name: str) -> None:
    counts = [hybrids._count(hybrids.model_of(which)) for which in (name, "plain")]
    assert abs(counts[0] / counts[1] - 1) <= hybrids.EQUAL
    shapes = [{key: hybrids.model_of(which)[key] for key in ("dim", "n_layers")} for which in (name, "plain")]
    assert shapes[0] == shapes[1]


def test_a_difference_within_two_standard_errors_is_called_equal(tmp_path: Path) -> None:
    plain = [2.00, 2.02, 2.01]
    losses = {"plain": plain, "v1": [1.90, 1.93, 1.90], "v2": [1.95, 2.09, 2.00], "v3": [2.11, 2.12, 2.11]}
    write_runs(tmp_path, losses)
    hybrids.report(str(tmp_path), str(tmp_path / "out.md"))
    lines = (tmp_path / "out.md").read_text().splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| v") and "equal" not in line}
    assert "-0.1000 ± 0.0058" in rows["v1"] and "0.1033" in rows["v3"]
    assert any(line.startswith("| v2") and line.count("equal") == hybrids.BANDS for line in lines)
    assert lines[-1].endswith("15.00%, 15.00%, 15.00%.")


def test_a_run_that_was_not_scored_is_named(tmp_path: Path) -> None:
    write_runs(tmp_path, {name: [2.0, 2.0, 2.1] for name in hybrids.PATTERNS}, without="v2")
    with pytest.raises(UserError, match="v2-0: not scored yet"):
        hybrids.report(str(tmp_path), str(tmp_path / "out.md"))
