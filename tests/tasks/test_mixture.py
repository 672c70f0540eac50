"""Several tasks in one run: whose rows are whose, denominators of their own, weights on losses, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm import LLM, ModelArgs
from llm.batch import Batch
from llm.data.rows import Row
from llm.errors import UserError
from llm.parallel.launch.world import World
from llm.tasks import OpenedRows
from llm.tasks.mixture import own_rows
from llm.train.chat import run_tokenizer
from llm.train.config import RunConfig, validate
from llm.train.config.overrides import put
from llm.train.resume.differences import refused_changes
from llm.train.settle import objectives_in, rows_wanted, task_in
from tests.data.helpers import loader_of
from tests.distributed.harness import tiny_config

ALONE = World(0, 1, 0, torch.device("cpu"))
T = 48
BOTH = [{"task": "lm", "source": "plain"}, {"task": "mlm", "source": "hidden", "weight": 0.5}]
TEXT = "The quick brown fox jumps over the lazy dog, and runs on into the wood. "


def mixed(folder: Path, task: Any = BOTH, names: tuple[str, ...] = ("plain", "hidden"), **sections: Any) -> RunConfig:
    """A config whose sources, of these names, are texts of their own."""
    sources = []
    for i, name in enumerate(names):
        path = folder / f"{name}.txt"
        path.write_text("".join(f"{i} {k} {TEXT}" for k in range(40)))
        sources.append({"path": str(path), "name": name, "weight": i + 1})
    raw = tiny_config(folder, data={"train": sources, "valid": None}, chat={"add_tokens": True})
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    raw["model"]["vocab_size"] = -1
    return validate({**raw, "task": task}, "config")


def opened(config: RunConfig) -> OpenedRows:
    tokenizer, _ = run_tokenizer(config)
    return task_in(config).open_rows(rows_wanted(config), tokenizer, ALONE)


def first_rows(config: RunConfig, n: int) -> list[tuple[str, Row]]:
    """The first rows of the order of the data, with the names of their sources."""
    mixture = opened(config).train
    places = zip(*(found.tolist() for found in mixture.locate(np.arange(n))), strict=True)
    rows = [(mixture.names[source], mixture.read(source, row, epoch)) for source, row, epoch in places]
    return [(name, row) for name, row in rows if row is not None]


def test_each_row_has_the_targets_of_the_task_that_reads_its_source(tmp_path: Path) -> None:
    rows = first_rows(mixed(tmp_path), 40)
    assert {name for name, _ in rows} == {"plain", "hidden"}
    assert all((list(row.targets), row.causal) == (["lm"], True) for name, row in rows if name == "plain")
    assert all((list(row.targets), row.causal) == (["mlm"], False) for name, row in rows if name == "hidden")


def test_a_task_may_read_several_sources(tmp_path: Path) -> None:
    entries = [*BOTH, {"task": "mlm", "source": "more", "weight": 0.5}]
    config = mixed(tmp_path, entries, ("plain", "hidden", "more"))
    rows = first_rows(config, 40)
    assert {name for name, row in rows if "mlm" in row.targets} == {"hidden", "more"}
    assert [o.name for o in objectives_in(config).mains] == ["lm", "mlm"] and config.task_names == ("lm", "mlm")


def batch_of(config: RunConfig, n: int) -> Batch:
    """The first rows as one micro-batch."""
    rows = opened(config)
    with loader_of(rows.train, n, n, 0, 1, count=objectives_in(config).count) as loader:
        (batch,) = loader.next().micro_batches
    return batch


def test_each_loss_has_a_weight_and_a_denominator_of_its_own(tmp_path: Path) -> None:
    """By hand: the mean of each task over its own labels, one task's weight halving its loss; 1e-5: float32 sums."""
    config, n = mixed(tmp_path), 12
    objectives, batch = objectives_in(config), batch_of(config, n)
    args = ModelArgs(dim=16, n_layers=2, n_heads=2, ffn_hidden=24, vocab_size=259, max_seq_len=T)
    model = LLM(args)
    logits = model(batch.inputs).logits.flatten(0, 1).detach()
    labels = {name: batch.targets[name].labels.flatten() for name in ("lm", "mlm")}
    means = {name: float(F.cross_entropy(logits, label)) for name, label in labels.items()}
    found = model(batch.inputs, losses=objectives.losses_of(model, batch)).losses
    counts = objectives.count([batch], ("plain", "hidden"))
    got = {name: float(loss.total.detach()) / counts.objectives[name] for name, loss in found.items()}
    assert got == pytest.approx(means, rel=1e-5)
    assert {name: objectives.weights[name] for name in got} == {"lm": 1.0, "mlm": 0.5}
    right = {name: float((label >= 0).sum()) for name, label in labels.items()}
    assert {name: counts.objectives[name] for name in right} == right
    assert counts.sources == {"plain": right["lm"], "hidden": right["mlm"]}, "each source by its own task"
    assert counts.targets == sum(right.values())


def test_a_part_counts_its_own_rows_alone(tmp_path: Path) -> None:
    """A text has bits per byte only where no row of another task is taken for one without targets."""
    config = mixed(tmp_path)
    batch, (tokenizer, _) = batch_of(config, 12), run_tokenizer(config)
    part = task_in(config).parts[0]
    assert batch.rows is not None
    weight, n_targets, _, n_tokens, n_chosen_out = part.task.counter(tokenizer)(own_rows(batch, [0]))
    n_rows = int((batch.rows.source == 0).sum())
    assert 0 < n_rows < 12 and n_tokens == n_rows * T and n_chosen_out == 0
    assert weight == n_targets == batch.targets["lm"].count()


def test_the_sample_is_that_of_the_part_that_continues_texts(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    tokenizer, _ = run_tokenizer(config)
    model = LLM(ModelArgs(dim=16, n_layers=1, n_heads=2, ffn_hidden=24, vocab_size=259, max_seq_len=T))
    asked: Any = {"most_tokens": 3, "context": T, "temperature": 0.0, "seed": 0}
    (text,) = task_in(config).sample(model, tokenizer, [tokenizer.prompt_ids("The")], **asked)
    assert isinstance(text, str)
    other = mixed(tmp_path, [{"task": "mlm", "source": "hidden"}], ("hidden",))
    assert task_in(other).sample(model, tokenizer, [tokenizer.prompt_ids("The")], **asked) == []


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ([BOTH[0]], "data.train.1: no task reads the source hidden; the entries of task name plain"),
        ([*BOTH, {"task": "lm", "source": "third"}], "task.2.source=third: no such source; data.train has plain, hi"),
        ([*BOTH, {"task": "lm", "source": "plain"}], "task.2.source=plain: task.0 reads it already"),
        ([BOTH[0], {"task": "mlm"}], "missing key task.1.source"),
        ([BOTH[0], {**BOTH[1], "weight": 0}], "task.1.weight=0: input should be greater than 0"),
        ([BOTH[0], {**BOTH[1], "wait": 2}], "unknown key task.1.wait; did you mean weight?"),
        ([], r"task=\[\]: a list of tasks has an entry"),
    ],
)
def test_what_is_wrong_with_a_list_of_tasks_is_said_in_a_line(task: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        mixed(tmp_path, task)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ([BOTH[0], {"task": "mml", "source": "hidden"}], "task.1.task=mml: no such task; known are "),
        ([BOTH[0], {"task": "lm", "source": "hidden", "weight": 2}], "task.1.weight=2.0: task.0 gives lm the weight 1"),
    ],
)
def test_tasks_that_cannot_be_mixed_are_refused_by_entry(task: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        objectives_in(mixed(tmp_path, task))


def test_preferences_are_trained_alone(tmp_path: Path) -> None:
    data = {"train": [{"path": "a", "name": "plain"}, {"path": "b", "name": "hidden", "kind": "preference"}]}
    config = mixed(tmp_path, [BOTH[0], {"task": "dpo", "source": "hidden"}], data=data)
    with pytest.raises(UserError, match="task.1.task=dpo: is trained alone; set task=dpo"):
        objectives_in(config)


def test_held_out_sources_go_by_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(TEXT * 9)
    other = [{"path": str(tmp_path / "other.txt"), "name": "hidden"}]
    found = opened(mixed(tmp_path, data={"valid": other})).valid
    assert found is not None and (found.names, found.targets) == (["hidden"], ("mlm",))
    with pytest.raises(UserError, match="data.valid.0: no task reads the source other; the entries of task name plain"):
        mixed(tmp_path, data={"valid": str(tmp_path / "other.txt")})


def test_entries_are_changed_on_the_command_line(tmp_path: Path) -> None:
    raw = mixed(tmp_path).model_dump(mode="json")
    put(raw, "task.1.weight", 0.25, RunConfig)
    assert raw["task"][1] == {"task": "mlm", "weight": 0.25, "source": "hidden"}
    with pytest.raises(UserError, match="--task.weight: task is a list; --task.0.weight is of the first of its 2"):
        put(raw, "task.weight", 0.25, RunConfig)


@pytest.mark.parametrize(
    ("task", "changed"),
    [
        ("lm", True),
        (BOTH, False),
        ([BOTH[0], {**BOTH[1], "weight": 0.25}], True),
        ([{"task": "mlm", "source": "plain", "weight": 0.5}, {"task": "lm", "source": "hidden"}], True),
    ],
)
def test_a_resumed_run_whose_tasks_changed_is_refused_unless_that_is_allowed(
    task: Any, changed: bool, tmp_path: Path
) -> None:
    saved, now = (mixed(tmp_path, given).model_dump(mode="json") for given in (BOTH, task))
    found = refused_changes(saved, now)
    assert [line.split(":")[0] for line in found] == ["task"] * changed
    assert refused_changes(saved, now, allowed=("task",)) == []
