"""Every Python block of Hyformer's document (seed 000) runs after its import lines are replaced, and the shapes in its
comments hold. In `make test` with smaller sizes, as the document's models have tens of millions of parameters; with its
own sizes among the long tests."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.siblings import hyformer
from llm.siblings.hyformer import Hyformer, HyformerConfig
from tests.siblings.running import run
from tests.siblings.seeds import CodeBlock, blocks_of, needs_seeds, seed

pytestmark = needs_seeds
NAMES = {"torch": torch, **{name: getattr(hyformer, name) for name in hyformer.__all__}}
SMALLER = {"32000": "61", "d_model=512": "d_model=16", "n_layers=6": "n_layers=2"}
FOLDER = "username/hyformer-model"
NOT_RUN = [
    ("Installation", "bash"),  # cd and pip
    ("Model Structure", ""),  # a drawing
    ("HyformerConfig", "python"),  # class signatures: held against ours below
    ("Hyformer", "python"),
    ("Hyformer", "python"),
    ("ModelOutput", "python"),
    ("ModelInput", "python"),
    ("Configuration Files", "json"),  # read below
    ("Citation", "bibtex"),
]


def blocks() -> list[CodeBlock]:
    return blocks_of(seed("000"))


def of(heading: str) -> list[CodeBlock]:
    return [block for block in blocks() if block.heading == heading and block.language == "python"]


def runs() -> list[CodeBlock]:
    return [block for block in blocks() if (block.heading, block.language) not in NOT_RUN]


def test_blocks_that_are_not_run_are_a_closed_list() -> None:
    left = [(block.heading, block.language) for block in blocks() if block not in runs()]
    assert left == NOT_RUN and {block.language for block in runs()} == {"python"} and len(runs()) == 9


def prepared(folder: Path, smaller: bool) -> dict[str, Any]:
    """The files that the document takes for granted: a config, and a model of the hub's name."""
    (stated,) = (block for block in blocks() if block.language == "json")
    document = json.loads(sized(stated.text, smaller))
    if smaller:
        document |= {"d_model": 16, "n_layers": 2}
    for file in ("configs/hyformer/base.json", "path/to/config.json"):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(json.dumps(document))
    Hyformer.from_config(HyformerConfig.from_json(folder / "path/to/config.json")).save_pretrained(folder / FOLDER)
    return {}


def sized(code: str, smaller: bool) -> str:
    """The block with cuda's place taken by the CPU, and smaller numbers where it is to be small."""
    code = code.replace('device="cuda"', 'device="cpu"')
    for theirs, ours in SMALLER.items() if smaller else ():
        code = code.replace(theirs, ours)
    return code


@pytest.mark.parametrize("smaller", [True, pytest.param(False, marks=pytest.mark.full)])
def test_all_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smaller: bool) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names, vocabulary, width = prepared(tmp_path, smaller), 61 if smaller else 32000, 16 if smaller else 512
    for block in runs():
        code = sized(block.text, smaller)
        if block.heading == "Custom Loss Computation":
            run_losses(code, vocabulary)
            continue
        run(code, names, NAMES)
        CHECKS[block.heading](names, vocabulary, width)


def run_losses(code: str, vocabulary: int) -> None:
    """Its logits and labels are those of a call that the document does not show: for tokens twice, then for rows."""
    of_tokens = {"logits": torch.randn(2, 10, vocabulary), "labels": torch.randint(0, vocabulary, (2, 10))}
    of_rows = {"logits": torch.randn(2, 10), "labels": torch.randint(0, 10, (2,))}
    losses = []
    for statement in ast.parse(code).body:
        line = ast.unparse(statement)
        given = of_rows if "= compute_prediction_loss" in line else of_tokens
        names: dict[str, Any] = dict(given)
        run(line, names, NAMES)
        if "loss" in names:
            losses.append(names["loss"])
    assert len(losses) == 3 and all(loss.ndim == 0 and loss > 0 for loss in losses)


def basic(names: dict[str, Any], vocabulary: int, width: int) -> None:
    assert tuple(names["input_ids"].shape) == (2, 10) and tuple(names["outputs"].logits.shape) == (2, 10, vocabulary)


def configured(names: dict[str, Any], vocabulary: int, width: int) -> None:
    assert names["config"] == HyformerConfig(vocabulary, width, 8, 2 if width == 16 else 6)
    assert names["model"].config == names["config"]


def pretrained(names: dict[str, Any], vocabulary: int, width: int) -> None:
    assert names["model"].load_report == ((), ()) and names["model"].config.d_model == width


def trained(names: dict[str, Any], vocabulary: int, width: int) -> None:
    names["loss"].backward()
    assert tuple(names["outputs"].logits.shape) == (2, 10) and names["model"].llm.prediction.weight.grad is not None


def generated(names: dict[str, Any], vocabulary: int, width: int) -> None:
    assert tuple(names["input_ids"].shape) == (1, 1) and tuple(names["logits"].shape) == (1, 1, vocabulary)
    row = torch.cat([names["input_ids"], names["next_token"]], dim=1)
    expected = names["model"](row, task="lm").logits[:, 1:]
    torch.testing.assert_close(names["outputs"].logits, expected, rtol=1e-5, atol=1e-5)


def downstream(names: dict[str, Any], vocabulary: int, width: int) -> None:
    assert tuple(names["logits"].shape) == (4, 1) and names["loss"].ndim == 0
    names["loss"].backward()


def saved(names: dict[str, Any], vocabulary: int, width: int) -> None:
    assert Path("my_model/model.safetensors").is_file() and Path("my_model/config.json").is_file()
    ours, theirs = names["model"].state_dict(), names["loaded_model"].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert Path("checkpoints/model.safetensors").is_file()


CHECKS = {
    "Basic Usage": basic,
    "Loading from Configuration File": configured,
    "Loading Pretrained Models": pretrained,
    "Training with Different Tasks": trained,
    "Autoregressive Generation with KV Caching": generated,
    "Using PredictionHead for Downstream Tasks": downstream,
    "Saving and Loading Models": saved,
    "Configuration Files": lambda names, vocabulary, width: configured_alone(names, vocabulary),
}


def configured_alone(names: dict[str, Any], vocabulary: int) -> None:
    assert names["config"].vocab_size == vocabulary


def test_the_classes_have_the_fields_and_defaults_that_the_document_lists() -> None:
    listed = {block.heading: block for block in blocks() if (block.heading, block.language) in NOT_RUN}
    for name in ("HyformerConfig", "ModelOutput", "ModelInput"):
        (theirs,) = ast.parse(listed[name].text).body
        assert isinstance(theirs, ast.ClassDef)
        ours = [field for field in dataclasses.fields(getattr(hyformer, name)) if not field.kw_only]
        stated = [(item.target.id, item.value) for item in theirs.body if isinstance(item, ast.AnnAssign)]
        assert [field.name for field in ours] == [key for key, _ in stated]
        for field, (_, default) in zip(ours, stated, strict=True):
            expected = dataclasses.MISSING if default is None else ast.literal_eval(default)
            assert field.default == expected, (name, field.name)


def test_the_constructor_and_the_call_have_the_arguments_that_the_document_lists() -> None:
    constructor, call = of("Hyformer")
    (theirs,) = ast.parse(constructor.text.rstrip() + ": ...").body
    assert isinstance(theirs, ast.ClassDef) and isinstance(theirs.body[0], ast.FunctionDef)
    (forward,) = ast.parse(call.text.rstrip() + ": ...").body
    assert isinstance(forward, ast.FunctionDef)
    for stated, ours in ((theirs.body[0], Hyformer.__init__), (forward, Hyformer.forward)):
        found = [p for p in inspect.signature(ours).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        defaults = [ast.literal_eval(default) for default in stated.args.defaults]
        assert [p.name for p in found] == [argument.arg for argument in stated.args.args]
        assert [p.default for p in found if p.default is not p.empty] == defaults
