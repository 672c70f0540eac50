"""An evaluation gives the same bytes on every layout that does not cut the layers' products, with any size of batches,
and through any number of kills.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from llm import LLM
from llm.tokenizer import ByteTokenizer
from tests.distributed.evaluations import content, keys, words_of, write_model, write_tasks
from tests.distributed.harness import ROOT, command, environment, write_text
from tests.distributed.pool import run_job
from tests.distributed.runs import Runs, perform

pytestmark = pytest.mark.distributed

SCRIPT = "launch/evaluate.py"
KILLS = 10
RANKS = (1, 2, 1, 3)
"""Of one start after the other, in turn."""


def evaluate(folder: Path, name: str, evaluations: list[list[str]], nproc: int) -> None:
    """Evaluations one after the other in one job."""
    plan = folder / f"{name}.json"
    plan.write_text(json.dumps(evaluations))
    done = run_job("tests/distributed/evaluate_job.py", str(plan), nproc=nproc)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and tasks, and what one process makes of them, in `one`."""
    made = tmp_path_factory.mktemp("evaluate")
    write_model(made / "model")
    tasks = sorted(write_tasks(made / "tasks").values())
    evaluate(made, "plan1", [words_of(made / "model", tasks, made / "one")], nproc=1)
    return made


def again(folder: Path, output: str, *more: str) -> list[str]:
    return words_of(folder / "model", sorted((folder / "tasks").glob("*.yaml")), folder / output, *more)


def numbers(output: Path) -> list[tuple[str, float]]:
    """Every log-likelihood of the journals, by the key of its request."""
    lines = [line for path in (output / "journal").glob("*.jsonl") for line in path.read_text().splitlines()]
    answers = [(row["key"], row["answer"]) for row in map(json.loads, lines)]
    return sorted((key, answer["logprob"]) for key, answer in answers if "logprob" in answer)


def test_the_bytes_are_those_of_one_process(folder: Path) -> None:
    layouts = {"data": [], "pipeline": ["--parallel.pipeline=2"], "batches": ["--batch_tokens=100"]}
    evaluate(folder, "plan2", [again(folder, name, *words) for name, words in layouts.items()], nproc=2)
    for name in layouts:
        assert content(folder / name) == content(folder / "one"), name
        assert len(keys(folder / name)) == len(set(keys(folder / name))) == len(keys(folder / "one")), name


def test_cut_layers_give_the_same_up_to_rounding(folder: Path) -> None:
    """Sums of half a product each, in another order: some of float32's 24 bits."""
    layouts = {"tensor": ["--parallel.tensor=2"], "expert": ["--parallel.expert=2"]}
    evaluate(folder, "plan_cut", [again(folder, name, *words) for name, words in layouts.items()], nproc=2)
    expected, before = numbers(folder / "one"), json.loads((folder / "one" / "results.json").read_text())
    for name in layouts:
        found = numbers(folder / name)
        assert [key for key, _ in found] == [key for key, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-5)
        assert json.loads((folder / name / "results.json").read_text())["model"] == before["model"]


def test_a_run_cut_by_zero3_is_the_model_that_its_export_is(folder: Path) -> None:
    write_text(folder)
    item = Runs(steps=2, half=1).item(folder, "run", parallel={"zero_stage": 3}, checkpoint={"keep_best": False})
    perform(folder, [item], nproc=2)
    LLM.from_pretrained(folder / "run").save_pretrained(folder / "whole", tokenizer=ByteTokenizer())
    tasks = [folder / "tasks" / "choices.yaml"]
    plan = [words_of(folder / model, tasks, folder / f"of_{model}", "--dtype=fp32") for model in ("run", "whole")]
    evaluate(folder, "plan_zero3", plan, nproc=2)
    assert content(folder / "of_run") == content(folder / "of_whole")
    assert json.loads((folder / "of_run" / "run.json").read_text())["fingerprint"].startswith("as saved")


def stopped_at(lines: int, words: list[str], output: Path, nproc: int) -> None:
    """Start, and kill every process once so many answers are in the journals."""
    launcher = subprocess.Popen(
        command(SCRIPT, *words, nproc=nproc if nproc > 1 else None),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while len(keys(output)) < lines:
        status = launcher.poll()
        assert status is None, (launcher.stderr.read() if launcher.stderr else b"").decode()
        assert time.monotonic() < deadline, f"{lines} answers were not reached"
        time.sleep(0.005)
    ranks = [] if nproc == 1 else workers_of(launcher.pid)
    for pid in (launcher.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    launcher.communicate(timeout=60)
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        time.sleep(0.01)


def workers_of(launcher: int) -> list[int]:
    """Process ids of the ranks below a torchrun."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


def tear(output: Path) -> None:
    """Leave half of the last line of the newest journal, as a kill within a write does."""
    newest = max((path for path in (output / "journal").glob("*.jsonl") if path.stat().st_size), key=os.path.getmtime)
    lines = newest.read_bytes().splitlines(keepends=True)
    newest.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])


def test_a_killed_evaluation_goes_on_to_the_same_bytes(folder: Path) -> None:
    words = again(folder, "killed", "--batch_tokens=100")
    stopped_at(20, words, folder / "killed", nproc=1)
    tear(folder / "killed")
    kept = keys(folder / "killed")
    evaluate(folder, "plan_killed", [words], nproc=2)
    after = keys(folder / "killed")
    assert content(folder / "killed") == content(folder / "one")
    assert 0 < len(kept) < len(after) == len(set(after)) == len(keys(folder / "one")) and set(kept) < set(after)


@pytest.mark.full
def test_ten_kills_in_a_thousand_documents_change_no_byte_and_ask_nothing_twice(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    tasks = write_tasks(tmp_path / "tasks", documents=1000)
    chosen, output = [tasks["choices"]], tmp_path / "killed"
    evaluate(tmp_path, "plan1", [words_of(tmp_path / "model", chosen, tmp_path / "whole")], nproc=1)
    every = keys(tmp_path / "whole")
    for kill in range(KILLS):
        more = f"--batch_tokens={150 + 50 * (kill % 3)}"
        words = words_of(tmp_path / "model", chosen, output, more)
        stopped_at(len(every) * (kill + 1) // (KILLS + 2), words, output, RANKS[kill % len(RANKS)])
        if kill % 2:
            tear(output)
    words = words_of(tmp_path / "model", chosen, output)
    evaluate(tmp_path, "plan2", [words], nproc=2)
    found = keys(output)
    assert content(output) == content(tmp_path / "whole")
    assert len(found) == len(set(found)) == len(every)
