"""A step rebuilt on two ranks is the step that was, and the document that was wrong in it is named."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.data.text import open_data, prepare_data
from llm.tokenizer import ByteTokenizer
from tests.data.helpers import mixture_of
from tests.distributed.harness import metrics, run, tiny_config, write_config, write_text
from tests.distributed.pool import run_job
from tests.distributed.replay_job import staged, stopped

pytestmark = pytest.mark.distributed

STEPS = 24
INTERVAL = 6
POISONED_STEP = 21
EARLY_STEP = 4
BATCH = 16
SEQ_LEN = 48
EXACT = ("loss", "lm_loss", "moe_balance_loss", "moe_z_loss", "grad_norm", "routing_checksum", "lr", "tokens",
         "targets")  # fmt: skip


def poison(folder: Path) -> tuple[str, int]:
    """Split train.jsonl into four files and replace one document, in the middle of a row of the poisoned step, by
    random bytes of the same length, so that nothing else moves; (its file, its line).
    """
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    texts = folder / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"part{number}.jsonl").write_text("".join(lines[number * 100 : (number + 1) * 100]))
    prepare_data(str(texts), ByteTokenizer(), folder / "cache")
    ((name, source, weight),) = open_data(str(texts), ByteTokenizer(), folder / "cache")
    mixture = mixture_of([(name, source, weight)], SEQ_LEN, seed=0)
    _, rows, _ = mixture.locate(np.arange((POISONED_STEP - 1) * BATCH, POISONED_STEP * BATCH))
    origin = source.origin(source.document_at(int(rows[9]) * SEQ_LEN + SEQ_LEN // 2)[0])
    assert origin.row is not None
    file = Path(origin.file)
    content = file.read_text().splitlines()
    length = len(json.loads(content[origin.row - 1])["text"])
    random_bytes = bytes(random.Random(1).choices(range(128), k=length)).decode("ascii")
    content[origin.row - 1] = json.dumps({"text": random_bytes})
    file.write_text("".join(line + "\n" for line in content))
    return origin.file, origin.row


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, int], dict[str, bytes], str]:
    """(run folder, where the poison is, the folder's files after the replays, what was printed)."""
    folder = tmp_path_factory.mktemp("replay")
    write_text(folder)
    place = poison(folder)
    config = write_config(
        folder / "config.yaml",
        tiny_config(
            folder,
            data={"train": str(folder / "texts")},
            optim={"lr": 2.0e-2, "warmup_steps": 2},
            train={"steps": STEPS},
            checkpoint={"interval": INTERVAL, "keep": 100},
            log={"tensorboard": True},
        ),
    )
    run_dir = folder / "run"
    steps = json.dumps([POISONED_STEP, EARLY_STEP, INTERVAL + 1])
    done = run_job("tests/distributed/replay_job.py", str(config), str(run_dir), steps, nproc=2)
    assert done.returncode == 0, done.stderr
    return run_dir, place, contents(run_dir), done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run folder but the replays."""
    files = [file for file in folder.rglob("*") if file.is_file() and "replay" not in file.relative_to(folder).parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def report(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / "replay" / f"step_{step:08d}.json").read_text())


@pytest.mark.parametrize(
    ("step", "started_from", "between"), [(POISONED_STEP, 18, 2), (EARLY_STEP, 0, 3), (INTERVAL + 1, INTERVAL, 0)]
)
def test_a_replayed_step_is_bitwise_the_recorded_one(poisoned: Any, step: int, started_from: int, between: int) -> None:
    run_dir = poisoned[0]
    found = report(run_dir, step)
    recorded = next(row for row in metrics(run_dir) if row["step"] == step)
    assert {key: found["replayed"][key] for key in EXACT} == {key: recorded[key] for key in EXACT}
    assert all(found["comparison"]["equal"].values()) and found["first_difference"] is None
    path = str(run_dir / "checkpoints" / f"step_{started_from:08d}") if started_from else None
    assert (found["started_from"], found["recomputed_steps"]) == (path, between)
    assert found["documents_loss"] == pytest.approx(recorded["lm_loss"], rel=1e-6)  # float32 sums in another order


def test_the_poisoned_document_is_named_first(poisoned: Any) -> None:
    run_dir, (file, line), _, printed = poisoned
    documents = [document for row in report(run_dir, POISONED_STEP)["rows"] for document in row["documents"]]
    first, *others = sorted(documents, key=lambda document: -(document["loss"] or 0))
    assert (first["file"], first["file_row"]) == (file, line)
    assert first["loss"] > 1.5 * max(document["loss"] or 0 for document in others if document["file_row"] != line)
    named = printed.split("documents with the highest mean loss", 1)[1].splitlines()[1]
    assert f"{file}:{line} " in named


def test_all_rows_of_both_ranks_are_listed_with_the_gradients_of_the_worst(poisoned: Any) -> None:
    found = report(poisoned[0], POISONED_STEP)
    rows = found["rows"]
    assert sorted(row["row"] for row in rows) == list(range((POISONED_STEP - 1) * BATCH, POISONED_STEP * BATCH))
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert sum(row["n_targets"] for row in rows) == found["replayed"]["targets"]
    assert all(sum(document["n_tokens"] for document in row["documents"]) == SEQ_LEN for row in rows)
    documents = [document for row in rows for document in row["documents"]]
    worst = sorted(documents, key=lambda document: -(document["loss"] or 0))[:5]
    shares = [document["grad_norm"] for document in documents if document["grad_norm"] is not None]
    assert len(shares) == 5 and all(document["grad_norm"] > 0 for document in worst)
    assert worst[0]["grad_norm"] == max(shares)


def test_the_step_in_which_a_run_stopped_is_rebuilt_without_a_record(poisoned: Any) -> None:
    run_dir = poisoned[0]
    found = report(stopped(run_dir), STEPS)
    assert found["comparison"] is None and found["recorded"] is None
    recorded = metrics(run_dir)[-1]
    assert {key: found["replayed"][key] for key in EXACT} == {key: recorded[key] for key in EXACT}


def test_the_stages_of_a_pipeline_name_the_document_too(poisoned: Any) -> None:
    run_dir, (file, line), _, _ = poisoned
    found = report(staged(run_dir), POISONED_STEP)
    documents = [document for row in found["rows"] for document in row["documents"]]
    first = max(documents, key=lambda document: document["loss"] or 0)
    assert (first["file"], first["file_row"]) == (file, line)
    # two stages for two data-parallel ranks: the bar between layouts
    assert all(difference < 1e-5 for difference in found["comparison"]["relative_difference"].values())
    assert found["gradient_note"].startswith("no gradients of single documents: parallel.pipeline>1")


def test_another_layout_passes_over_a_damaged_checkpoint_and_changes_nothing_in_the_folder(poisoned: Any) -> None:
    run_dir, (file, line), _, _ = poisoned
    nearest = run_dir / "checkpoints" / "step_00000018" / "manifest.json"
    nearest.write_bytes(nearest.read_bytes()[:-9])
    before = contents(run_dir)
    done = run("launch/pretrain.py", "--run_dir", str(run_dir), f"--replay_step={POISONED_STEP}")
    assert done.returncode == 0, done.stderr
    assert contents(run_dir) == before
    found = report(run_dir, POISONED_STEP)
    assert found["started_from"].endswith("step_00000012") and found["recomputed_steps"] == 8
    assert "step_00000018" in found["skipped_checkpoints"][0]
    # one rank for two: the bar between layouts
    assert all(difference < 1e-5 for difference in found["comparison"]["relative_difference"].values())
    assert f"{file}:{line} " in done.stdout.split("documents with the highest mean loss", 1)[1].splitlines()[1]


def test_the_replays_wrote_nothing_but_their_files(poisoned: Any) -> None:
    run_dir, _, after, _ = poisoned
    assert [json.loads(line)["step"] for line in after["metrics.jsonl"].splitlines()] == list(range(1, STEPS + 1))
    assert len([name for name in after if "tfevents" in name]) == 1
    names = {name.split("/")[1] for name in after if name.startswith("checkpoints/")}
    assert names == {f"step_{step:08d}" for step in range(INTERVAL, STEPS + 1, INTERVAL)}
    assert b"replay of step" not in after["log.txt"]


@pytest.mark.parametrize(
    ("step", "missing", "expected"),
    [
        (STEPS + 1, None, f"--replay_step={STEPS + 1}: "),
        (3, "metrics.jsonl", "metrics.jsonl: No such file or directory; only a run"),
        (3, "config.yaml", "config.yaml: No such file or directory"),
    ],
)
def test_a_replay_that_cannot_be_is_one_line(
    poisoned: Any, tmp_path: Path, step: int, missing: str | None, expected: str
) -> None:
    for name in {"metrics.jsonl", "config.yaml"} - {missing}:
        (tmp_path / name).write_bytes((poisoned[0] / name).read_bytes())
    done = run("launch/pretrain.py", "--run_dir", str(tmp_path), f"--replay_step={step}")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert expected in line and (missing is not None or f"can replay steps 1 to {STEPS}" in line)
    assert not (tmp_path / "replay").exists()
