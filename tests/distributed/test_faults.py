"""No damaged checkpoint is loaded silently: after any single fault, an automatic resume goes back to the newest whole
one and says so, and a resume that names the damaged one fails and names the file. One message has all differences of
configs, before anything is built.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.faults import STEPS, all_faults
from tests.distributed.faults_job import TRAINED_ON
from tests.distributed.harness import metrics, tiny_config, without_timing, write_config, write_text
from tests.distributed.pool import run_job

pytestmark = pytest.mark.distributed

SOME = (
    TRAINED_ON,
    "first bit, rank_00000.safetensors of step 6",
    "a bit in the middle, rank_00001.safetensors of step 6",
    "a bit in the middle, manifest.json of step 6",
    "cut in half, rank_00000.safetensors of step 6",
    "deleted, rank_00001.safetensors of step 4",
    "a pickle instead, rank_00000.safetensors of step 6",
    "a pickle instead, manifest.json of step 6",
    "rank_00000.safetensors of step 4 in 6",
    "ranks of step 6",
    "folders 6 and 4",
    "sealed manifest with no config",
    "all steps damaged",
)
DIFFERENCES = (
    "model.dim: 32 -> 64; ",
    "model.n_layers: 4 -> 8; ",
    "model.tie_embeddings: False -> True; ",
    "model.vocab_size: 258 -> 300; ",
    "optim.name: 'adamw' -> 'sgd'; ",
    "train.seq_len: 48 -> 32; ",
    "tokenizer: its content differs",
    f"step_{STEPS[-1]:08d} belongs to another configuration",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_text(folder, documents=80)
    sections = {"train": {"steps": STEPS[-1]}, "checkpoint": {"interval": 2, "keep": 9}}
    write_config(folder / "c.yaml", tiny_config(folder, **sections))
    return folder


@pytest.mark.parametrize(
    "names", [SOME, pytest.param((), marks=pytest.mark.full)], ids=["some faults", "every fault"]
)
def test_no_fault_is_loaded_silently_and_no_other_config_goes_on(
    folder: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    done = run_job("tests/distributed/faults_job.py", str(folder / "c.yaml"), str(tmp_path), *names, nproc=2)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    faults = {fault.name: fault for fault in all_faults()}
    assert results["faults"].keys() == set(names or faults) and len(faults) >= 60
    wrong = {}
    for name, found in results["faults"].items():
        fault = faults[name]
        if reasons := [*_explicit(found, fault.file), *_automatic(found, fault.damaged, fault.file, results["clean"])]:
            wrong[name] = (reasons, found)
    assert not wrong, json.dumps(wrong, indent=1)
    continued, whole = (without_timing(metrics(tmp_path / name)) for name in ("continued", "whole"))
    assert continued == whole and [row["step"] for row in whole] == list(range(1, STEPS[-1] + 1))
    log = (tmp_path / "continued" / "log.txt").read_text()
    for error in results["differences"]:
        assert all(difference in error for difference in DIFFERENCES), error
    assert len(results["differences"]) == 2
    assert f"skipped a checkpoint, now set aside: {tmp_path / 'continued'}" in log and faults[TRAINED_ON].file in log
    assert f"{tmp_path / 'continued' / 'tokenizer'} is written anew" in log


def _explicit(found: dict[str, Any], file: str) -> list[str]:
    """What is wrong with the answer to a resume that names the damaged checkpoint."""
    answer = found["explicit"]
    checks = {
        "it was loaded": "error" not in answer or answer["step"] != 0,
        "the error does not name the file": file not in answer.get("error", ""),
        "a pickle was executed": found["executed"],
    }
    return [reason for reason, wrong in checks.items() if wrong]


def _automatic(found: dict[str, Any], damaged: tuple[int, ...], file: str, clean: dict[str, str]) -> list[str]:
    """What is wrong with the answer to an automatic resume."""
    answer, whole = found["auto"], [step for step in STEPS if step not in damaged]
    if not whole:
        reported = file in answer.get("error", "") and answer["step"] == 0
        return [] if reported else ["without a whole checkpoint it did not stop and name a file"]
    skipped = [step for step in sorted(damaged, reverse=True) if step > max(whole)]
    *lines, last = answer.get("lines", [""])
    checks = {
        "it did not take the newest whole one": answer["step"] != max(whole),
        "it is in another state than from there": answer.get("state") != clean[str(max(whole))],
        "it does not say what it took": f"step_{max(whole):08d} (step {max(whole)}" not in last,
        "it does not say what it skipped": [n for n, line in zip(skipped, lines, strict=False) if f"_{n:08d}" in line]
        != skipped,
        "it says too much": len(lines) != len(skipped),
        "it does not name the file": bool(lines) and file not in lines[0],
        "it set aside what is whole, or not what is damaged": [f"damaged_step_{step:08d}" for step in sorted(skipped)]
        != [name for name in found["aside"] if name.startswith("damaged")],
    }
    return [reason for reason, wrong in checks.items() if wrong]
