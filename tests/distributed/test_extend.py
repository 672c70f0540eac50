"""A mixer, an objective, a kind of data and a family of foreign checkpoints from files outside the tree, the examples
of docs/extend: a config that uses them trains alike on every layout, resumes, moves, freezes, continues texts, and goes
out and comes in.
"""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM, ModelArgs, extensions
from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.generate import generate
from llm.parameters import ParameterTable
from tests.distributed.harness import ROOT, metrics, tiny_config, without_timing, write_config, write_text
from tests.distributed.pool import run_job
from tools.convert import main as convert

pytestmark = pytest.mark.distributed

NAMES = ("moving_average.py", "two_ahead.py", "intervals.py", "two_names.py")
FILES = [str(ROOT / "docs/extend" / name) for name in NAMES]
MODEL: dict[str, Any] = {
    "dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "ffn_hidden": 48,
    "layer_pattern": ["attn", "average"],
}  # fmt: skip
LAYOUTS: dict[int, dict[str, Any]] = {
    1: {"one": {}},
    2: {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}, "zero3": {"zero_stage": 3}},
}
STEPS = 4
FROZEN = "layers.1.attention.*"
"""The parameters of one of the new mixers."""
RELATIVE = 1e-5  # float32 sums in another order, as in test_equality.py


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extend")
    write_text(folder, documents=120)
    raw = tiny_config(
        folder,
        checkpoint={"interval": 2, "keep": 9},
        train={"steps": STEPS, "objectives": {"two_ahead": {"weight": 0.5}}},
    )
    raw["model"] = MODEL
    (folder / "steps.txt").write_text("".join(f"{step}\n" for step in range(1, 40)))
    raw["data"]["train"] = [raw["data"]["train"], {"path": str(folder / "steps.txt"), "kind": "intervals"}]
    raw["extensions"] = FILES
    whole = write_config(folder / "config.yaml", raw)
    raw["train"] = {**raw["train"], "freeze": [FROZEN]}
    partly = write_config(folder / "frozen.yaml", raw)

    def train(layouts: dict[str, Any], nproc: int, config: Path = whole) -> None:
        job = "tests/distributed/objectives_job.py"
        done = run_job(job, str(config), str(folder), json.dumps(layouts), nproc=nproc)
        assert done.returncode == 0, done.stderr

    train(LAYOUTS[1], 1)
    for name in ("resumed", "moved"):
        shutil.copytree(folder / "one", folder / name)
        shutil.rmtree(folder / name / "checkpoints" / f"step_{STEPS:08d}")
    train({"resumed": {}}, 1)
    train({**LAYOUTS[2], "moved": {"tensor": 2}}, 2)
    train({"frozen": {}}, 1, partly)
    train({"frozen tensor": {"tensor": 2}}, 2, partly)
    extensions.load(FILES)
    return folder


@pytest.mark.parametrize("name", [*LAYOUTS[2], "moved"])
def test_a_run_with_all_of_them_is_the_same_on_every_layout(runs: Path, name: str) -> None:
    expected, found = metrics(runs / "one"), metrics(runs / name)
    assert len(found) == len(expected) == STEPS and expected[0]["two_ahead_loss"] > 1
    for row, right in zip(found, expected, strict=True):
        for key in ("loss", "lm_loss", "two_ahead_loss", "grad_norm"):
            assert row[key] == pytest.approx(right[key], rel=RELATIVE), (name, row["step"], key)


def test_its_parameters_freeze_like_any_other(runs: Path) -> None:
    args = ModelArgs.model_validate({**MODEL, "vocab_size": 259})
    before = LLM(args, seed=0).state_dict()
    one, other = metrics(runs / "frozen"), metrics(runs / "frozen tensor")
    assert one[-1]["loss"] != metrics(runs / "one")[-1]["loss"]
    for row, right in zip(other, one, strict=True):
        assert (row["loss"], row["grad_norm"]) == pytest.approx((right["loss"], right["grad_norm"]), rel=RELATIVE)
    for name in ("frozen", "frozen tensor"):
        after = LLM.from_pretrained(runs / name).state_dict()
        unchanged = {key for key in before if torch.equal(before[key], after[key])}
        assert unchanged == {key for key in before if fnmatch(key, FROZEN)}, name


def test_it_resumes_with_the_same_bits(runs: Path) -> None:
    assert without_timing(metrics(runs / "resumed")) == without_timing(metrics(runs / "one"))
    one, resumed = (LLM.from_pretrained(runs / name).state_dict() for name in ("one", "resumed"))
    assert all(torch.equal(one[name], resumed[name]) for name in one)


def test_its_state_goes_on_where_rows_are_continued_and_begins_anew_with_a_document(runs: Path) -> None:
    model = LLM.from_pretrained(runs / "one")
    tokens = torch.arange(48).view(2, 24)
    cache = Cache(model.args)
    with torch.no_grad():
        whole = model(tokens).logits
        parts = [model(part, cache=cache).logits for part in tokens.split([5, 1, 18], dim=1)]
        packed = model(TransformerInput(tokens, cu_seqlens=torch.tensor([0, 9, 24, 48]))).logits
        alone = model(tokens[:1, 9:]).logits
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)  # float32, other shapes of products
    torch.testing.assert_close(packed[:1, 9:], alone, rtol=1e-5, atol=1e-5)


def test_prompts_of_different_lengths_are_continued_together_as_alone(runs: Path) -> None:
    model = LLM.from_pretrained(runs / "one")
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9, 8]]
    together = generate(model, prompts, max_new_tokens=6)
    assert together == [generate(model, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_it_goes_out_under_other_names_and_comes_in_again(runs: Path) -> None:
    given = f"--extensions={','.join(FILES)}"
    convert(["export", str(runs / "one"), str(runs / "theirs"), "--family=two_names", given, "--quiet"])
    assert json.loads((runs / "theirs/config.json").read_text())["pattern"] == ["attn", "average"] * 2
    convert(["import", str(runs / "theirs"), str(runs / "ours"), given, "--quiet"])
    one, ours = (LLM.from_pretrained(runs / name).state_dict() for name in ("one", "ours"))
    assert all(torch.equal(one[name], ours[name]) for name in one)


def test_what_the_mixer_declares_is_what_it_has(runs: Path) -> None:
    args = ModelArgs.model_validate({**MODEL, "vocab_size": 259})
    built = {name: tuple(parameter.shape) for name, parameter in LLM(args, device="meta").named_parameters()}
    assert list(ParameterTable.of(args).shapes.items()) == list(built.items())
