"""What a message proposes is taken when it is typed."""

import ast
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError
from llm.train.config import RunConfig, check_layout, load_config
from llm.train.config.explain import keys_of
from llm.train.config.flags import OWN_FLAGS, parse_run_flags
from tests.distributed.harness import ROOT, TINY_MODEL, tiny_config, write_config

LAUNCHERS = {"nproc_per_node", "nnodes", "rdzv_endpoint", "rdzv_backend", "rdzv_id", "max_restarts", "standalone"}


def messages() -> Iterator[tuple[str, str]]:
    """(place, text) of every string with a flag in it that a UserError or ValueError is made of."""
    for path in sorted(p for folder in ("llm", "launch", "tools") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "rror" in node.func.id):
                continue
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and "--" in part.value:
                    yield f"{path.relative_to(ROOT)}:{part.lineno}", part.value


def flags_of_commands() -> set[str]:
    """Names of all parameters of functions where commands are, which their command lines take, and of data classes that
    stand for some."""
    names: set[str] = set()
    folders = ("launch", "tools", "llm/generation", "llm/jobs", "llm/siblings")
    for path in (p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg):
                names.add(node.arg.rstrip("_"))  # `with_` is --with
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def test_every_flag_in_a_message_is_one() -> None:
    known = {*OWN_FLAGS, *keys_of(RunConfig), *flags_of_commands(), *LAUNCHERS, "section.key"}
    found = 0
    for place, text in messages():
        for name in re.findall(r"--([A-Za-z][A-Za-z_.]*\w)", text):
            assert name.replace("-", "_") in known, f"{place}: --{name}"
            found += 1
    assert found > 20


def typed(path: Path, *flags: str) -> RunConfig:
    words = parse_run_flags(["--config", str(path), *flags])
    return load_config(words.config, words.overrides)


def proposed(message: str) -> list[str]:
    """The `key=value` of a message's advice, as flags; of alternatives the first."""
    advice = message.rpartition("; ")[2]
    advice = advice.split(" or ")[0].split("): ")[-1]
    return [f"--{word}" for word in re.findall(r"[a-z]+\.[a-z_]+=[^\s,)]+", advice)]


def test_a_layout_that_a_refusal_proposes_is_accepted_when_typed(tmp_path: Path) -> None:
    """On the same number of ranks; where none works there, on the number that comes first."""
    draw, taken = random.Random(3), 0
    for _ in range(50):
        sections: dict[str, Any] = {
            "parallel": {
                "tensor": draw.choice((1, 2, 3, 4)),
                "pipeline": draw.choice((1, 1, 2)),
                "expert": draw.choice((1, 2, 3)),
                "zero_stage": draw.choice((0, 1, 2, 3)),
                "pipeline_schedule": draw.choice(("1f1b", "1f1b", "dualpipev")),
            },
            "train": {"global_batch_size": draw.choice((8, 12, 16)), "micro_batch_size": draw.choice((1, 3, 4))},
        }
        raw = {**tiny_config(tmp_path, **sections), "model": {**TINY_MODEL, "vocab_size": 64}}
        path, world = write_config(tmp_path / "c.yaml", raw), draw.randint(1, 6)
        try:
            check_layout(load_config(path), world)
        except UserError as error:
            message = str(error)
            other = re.search(r"no layout of \d+ ranks? works: use (\d+) rank", message)
            flags = proposed(message)
            assert flags or other, message
            check_layout(typed(path, *flags), int(other[1]) if other else world)
            taken += 1
    assert taken > 15


@pytest.mark.parametrize(
    ("flags", "mended"),
    [
        (["--train.lr=0.01"], ["--optim.lr=0.01", "--optim.min_lr=0.001"]),
        (["--optim.schedule=one_cycle", "--optim.warmup_steps=0"], ["--optim.schedule=one_cycle"]),
        (["--eval.patience=2", "--data.valid=null"], ["--eval.patience=2"]),
        (["--train.epochs=2"], ["--train.epochs=2", "--train.steps=null"]),
        (["--parallel.context=2"], ["--parallel.context=1"]),
    ],
)
def test_what_a_refused_key_asks_for_is_accepted(tmp_path: Path, flags: list[str], mended: list[str]) -> None:
    raw = tiny_config(tmp_path)
    del raw["optim"]["warmup_steps"]
    path = write_config(tmp_path / "c.yaml", raw)
    with pytest.raises(UserError):
        typed(path, *flags)
    typed(path, *mended)


@pytest.mark.parametrize("key", ["allow_changes=data", "allow_changes=[data]", "allow_changes=optim,train.seed"])
def test_the_changes_that_a_refusal_to_resume_proposes_are_taken(tmp_path: Path, key: str) -> None:
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    expected = tuple(key.partition("=")[2].strip("[]").split(","))
    assert typed(path, f"--checkpoint.{key}").checkpoint.allow_changes == expected
