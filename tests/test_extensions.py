"""Files that register what a config names: run once, before anything is read, and refused by file and line."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from llm import LLM, extensions
from llm.args import ModelArgs
from llm.args.layers import ACTIVATIONS, FFNS, POSITIONS
from llm.checkpoint.run_folder import model_args
from llm.cli import run_cli
from llm.errors import UserError
from llm.layers.feed_forwards import FeedForwardKind
from llm.layers.feed_forwards import register as register_feed_forward
from llm.layers.ffn import FeedForward
from llm.layers.positions import sinusoids
from llm.parameters import ParameterTable
from llm.train.config import load_config
from llm.train.settle import objectives_in
from tests.distributed.harness import ROOT, tiny_config, write_config

TWO_AHEAD = ROOT / "docs/extend/two_ahead.py"


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "LOADED", set())
    monkeypatch.setattr("llm.objectives.FACTORIES", {})


def test_a_file_is_run_once_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import sys\nsys.mine = getattr(sys, 'mine', 0) + 1\n")
    monkeypatch.setattr(sys, "mine", 0, raising=False)
    monkeypatch.chdir(tmp_path)
    extensions.load([file, "mine.py"])
    extensions.load(["./mine.py"])
    assert sys.mine == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "mine.py: no such file"),
        ("x = 1\nimport nothing_of_that_name\n", "mine.py, line 2: ModuleNotFoundError: No module named"),
        ("def f(:\n", "mine.py, line 1: SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_run_is_named_with_its_line(tmp_path: Path, text: str | None, expected: str) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"extensions: .*{expected}"):
        extensions.load([file])


def test_a_config_runs_its_extensions_and_trains_for_what_they_register(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path, train={"objectives": {"two_ahead": {"weight": 0.5}}})
    file = write_config(tmp_path / "c.yaml", {**raw, "extensions": [str(TWO_AHEAD)]})
    objectives = objectives_in(load_config(file))
    assert objectives.weights == {"lm": 1.0, "two_ahead": 0.5, "moe_balance": 1.0, "moe_z": 1.0}
    plain = write_config(tmp_path / "d.yaml", raw)
    flag = objectives_in(load_config(plain, {"extensions": f"{TWO_AHEAD},{TWO_AHEAD}"}))
    assert flag.weights == objectives.weights


def test_an_objective_that_nothing_registers_is_refused_by_its_key(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path, train={"objectives": {"two_ahead": {}}})
    with pytest.raises(UserError, match="train.objectives.two_ahead: no such objective; known are none"):
        objectives_in(load_config(write_config(tmp_path / "c.yaml", raw)))
    unknown = write_config(tmp_path / "d.yaml", yaml.safe_load(yaml.safe_dump(raw)) | {"task": "guess"})
    with pytest.raises(UserError, match="task=guess: no such task"):
        objectives_in(load_config(unknown))


def test_every_command_runs_its_extensions_before_it_reads_its_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(n: int) -> None:
        print(n)

    file = tmp_path / "mine.py"
    file.write_text("print('mine')\n")
    run_cli(command, ["--extensions", str(file), "--n=3"])
    assert capsys.readouterr().out == "mine\n3\n"
    with pytest.raises(SystemExit):
        run_cli(command, ["--n=3", "--extensions=nowhere.py"])
    assert capsys.readouterr().err == "error: extensions: nowhere.py: no such file\n"


def test_a_model_has_the_activation_and_positions_that_a_file_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (ACTIVATIONS, POSITIONS):
        monkeypatch.setattr(table, "_entries", dict(table))
    named = dict(dim=16, n_layers=1, n_heads=2, vocab_size=9, gated=False, act="squared_relu", pos="scaled_waves")
    with pytest.raises(ValueError, match="model.act=squared_relu: unknown activation"):
        ModelArgs.model_validate(named)
    extensions.load([ROOT / "docs/extend/scaled_waves.py"])
    model, ids = LLM(ModelArgs.model_validate(named)), torch.arange(6).view(2, 3)
    made = model(ids, units=["tok_embeddings"], return_hidden=True).hidden
    assert made is not None
    torch.testing.assert_close(made - model.tok_embeddings(ids), sinusoids(torch.arange(3), 16).expand(2, 3, 16))
    loss = model(ids, labels=ids).loss_sum
    assert loss is not None
    loss.backward()
    assert model.get_parameter("pos_embeddings.weight").grad.abs() > 0  # type: ignore[union-attr]
    assert list(ParameterTable.of(model.args)) == [name for name, _ in model.named_parameters()]


def test_a_layer_has_the_feed_forward_that_a_pattern_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FFNS, "_entries", dict(FFNS))
    register_feed_forward(
        "narrow",
        FeedForwardKind(
            lambda args, _: FeedForward(args.dim, args.dim, gated=False),
            lambda args: FeedForward.declare(args, args.dim, gated=False),
        ),
    )
    pattern = ["attn+narrow", "attn+dense"]
    model = LLM(ModelArgs(dim=16, n_layers=2, n_heads=2, vocab_size=9, layer_pattern=pattern, ffn_hidden=24))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["layers.0.feed_forward.w1.weight"] == (16, 16)
    assert shapes["layers.1.feed_forward.w1.weight"] == (24, 16)
    assert ParameterTable.of(model.args).shapes == shapes
    assert model(torch.arange(6).view(2, 3)).logits.isfinite().all()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"unknown feed-forward \+wide; use dense, moe, none or narrow"):
        ModelArgs(dim=16, n_layers=2, n_heads=2, vocab_size=9, layer_pattern=["attn+wide"])


def test_a_model_of_an_unknown_layer_is_refused_with_the_extensions_of_its_run() -> None:
    model = {"dim": 64, "n_layers": 2, "n_heads": 4, "layer_pattern": ["attn", "mine"], "vocab_size": 9}
    meta = {"config": {"model": model, "extensions": ["mine.py", "b.py"]}}
    checkpoint: Any = SimpleNamespace(path=Path("runs/a"), meta=meta, meta_with=lambda *names: meta)
    with pytest.raises(UserError, match=r"this version knows: .*unknown mixer 'mine'.*; its run had --extensions=mine"):
        model_args(checkpoint)
    del meta["config"]["extensions"]
    with pytest.raises(UserError, match="unknown mixer") as refused:
        model_args(checkpoint)
    assert "--extensions" not in str(refused.value)
