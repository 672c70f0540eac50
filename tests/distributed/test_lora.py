"""Runs that train adapters: alike on every layout, continued bitwise, with a base that stays what it was."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM, ModelArgs
from llm.boxes import whole
from llm.checkpoint.frozen import frozen_in
from llm.checkpoint.inspect import survey
from llm.checkpoint.reader import resolve
from llm.errors import UserError
from llm.parallel.layout import Layout
from llm.parameters import ParameterTable
from llm.plan.memory import checkpoint_bytes
from llm.pretrained import AdapterSource, adapter_of, taken_from, unmerged_weights
from llm.train.config import load_config, validate
from llm.train.dry_run import workload
from tests.distributed.harness import metrics, tiny_config, without_timing, write_config, write_text
from tests.distributed.runs import LAYOUTS, Runs, perform
from tests.machine import has
from tools import convert

pytestmark = pytest.mark.distributed

STEPS, HALF = 6, 3
LOW_RANK = {"dropout": 0.0, "token_rows": None}
"""Adapters alone."""
EVERYWHERE = ["wq", "wk", "wv", "wo", "w1", "w2", "w3", "experts", "tok_embeddings", "output"]


RUNS = Runs(STEPS, HALF, {"optim": {"lr": 1e-2}})
"""The learning rate is high, so that B, which begins at 0, soon lets A learn too."""
item, half_of, assert_alike = RUNS.item, RUNS.half_of, RUNS.assert_alike


def adapted(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    """The same with adapters and their dropout, on the weights of the run "base"."""
    lora = {"rank": 4, "alpha": 16.0, "targets": EVERYWHERE, "dropout": 0.1, "token_rows": [100, 140]}
    lora |= sections.pop("lora", {})
    model = {"init_from": str(folder / "base"), **sections.pop("model", {})}
    return item(folder, name, model=model, lora=lora, **sections)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run of adapters on it on one process, and on two ranks by data and by tensor; from the half of the
    latter one that goes on alike, and one on the two ranks' data."""
    folder = tmp_path_factory.mktemp("lora")
    write_text(folder, documents=80)
    base = item(folder, "base", train={"steps": 1})
    plain = [adapted(folder, "plain", lora={"dropout": 0.0}), adapted(folder, "low rank", lora=LOW_RANK)]
    perform(folder, [base, adapted(folder, "one"), *plain], nproc=1)
    cut = {"parallel": {"tensor": 2}, "micro": 8}
    resumed = {"checkpoint": half_of(folder, "tensor")}
    items = [adapted(folder, "data"), adapted(folder, "tensor", **cut), adapted(folder, "again", **cut, **resumed)]
    perform(folder, [*items, adapted(folder, "moved", **resumed)], nproc=2)
    return folder


@pytest.mark.parametrize("name", ["data", "tensor"])
def test_two_ranks_train_the_adapters_as_one_does(runs: Path, name: str) -> None:
    assert_alike(runs, name, "one", 1e-5)  # float32: sums in another order


def test_dropout_changes_the_steps_from_the_first_in_which_adapters_are_not_nothing(runs: Path) -> None:
    dropped, plain = ([row["loss"] for row in metrics(runs / name)] for name in ("one", "plain"))
    assert dropped[0] == plain[0] and all(a != b for a, b in zip(dropped[1:], plain[1:], strict=True))


def test_a_run_of_adapters_learns(runs: Path) -> None:
    losses = [row["loss"] for row in metrics(runs / "one")]
    assert losses[-1] < losses[0] - 0.05


def test_a_resume_goes_on_bitwise_and_another_layout_goes_on_alike(runs: Path) -> None:
    assert without_timing(metrics(runs / "again")) == without_timing(metrics(runs / "tensor"))[HALF:]
    first, second = (dict(LLM.from_pretrained(runs / name).named_parameters()) for name in ("tensor", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_alike(runs, "moved", "tensor", 1e-5, first=HALF)


@pytest.mark.parametrize("name", ["one", "tensor"])
def test_a_checkpoint_holds_adapters_alone_as_many_bytes_as_said_ahead_and_names_the_base(
    runs: Path, name: str
) -> None:
    checkpoint, base = resolve(runs / name), resolve(runs / "base")
    assert checkpoint.shapes and not checkpoint.shapes.keys() & base.shapes.keys()
    frozen = frozen_in(checkpoint)
    assert frozen is not None and dict(frozen.shapes) == base.shapes
    assert frozen.origin == taken_from(runs / "base") and frozen.origin.to_json()["digest"] == base.digest
    work = workload(validate(checkpoint.meta["config"], name), Layout(**checkpoint.meta["layout"]))
    assert sum(survey(checkpoint.path).bytes_by_kind().values()) == checkpoint_bytes(work)


def test_a_run_is_a_model_path_base_and_adapter_in_one(runs: Path) -> None:
    model, base = LLM.from_pretrained(runs / "one"), LLM.from_pretrained(runs / "base")
    assert model.args == base.args and model.args.lora is None
    weights, scale = unmerged_weights(resolve(runs / "one")), 16.0 / 4
    for name, parameter in model.named_parameters():
        before = base.get_parameter(name)
        if name == "layers.1.feed_forward.experts.w1":
            a, b = (
                weights.read(f"{name}_lora_{x}", whole(shape), torch.empty(shape))
                for x, shape in (("a", (4, 32, 4)), ("b", (4, 4, 24)))
            )
            # the same products in a batch may be added up in another order
            torch.testing.assert_close(parameter, before + scale * (a @ b), rtol=1e-6, atol=1e-7)
        elif name == "layers.0.attention.wq.weight":
            a, b = (
                weights.read(name.replace("weight", f"lora_{x}"), whole(shape), torch.empty(shape))
                for x, shape in (("a", (4, 32)), ("b", (32, 4)))
            )
            assert torch.equal(parameter, before + scale * (b @ a))
        else:
            assert torch.equal(parameter, before) == ("norm" in name or "router" in name), name


def test_what_an_adapter_is_and_its_base_come_from_its_folder(runs: Path) -> None:
    raw = tiny_config(runs)
    del raw["model"]
    file = write_config(runs / "from.yaml", {**raw, "lora": {"init_from": str(runs / "one"), "dropout": 0.5}})
    found = load_config(file)
    assert found.lora is not None and found.lora.args == adapter_of(runs / "one").lora.model_copy(
        update={"dropout": 0.5}
    )
    assert found.model.init_from == str(resolve(runs / "base").path) and found.model.dim == 32
    with pytest.raises(UserError, match=r"lora\.rank=8 is not 4, as in lora\.init_from=.*/one; leave it out"):
        load_config(file, {"lora.rank": 8})
    with pytest.raises(UserError, match=r"lora\.init_from: .*/base: holds a whole model and no adapter"):
        load_config(file, {"lora.init_from": str(runs / "base")})


@pytest.mark.full
def test_an_adapter_is_trained_on_from_its_folder_on_its_base_alone(tmp_path: Path) -> None:
    write_text(tmp_path, documents=80)
    base, other = (item(tmp_path, name, train={"steps": 1, "seed": seed}) for name, seed in (("base", 0), ("other", 1)))
    perform(tmp_path, [base, other, adapted(tmp_path, "one")], nproc=1)
    further = adapted(tmp_path, "further", lora={"init_from": str(tmp_path / "one"), "dropout": 0.0})
    evaluated = adapted(tmp_path, "merged", model={"init_from": str(tmp_path / "one")}, lora={"targets": ["wq"]})
    perform(tmp_path, [further, evaluated], nproc=2)
    losses = {name: metrics(tmp_path / name) for name in ("one", "further", "merged")}
    assert losses["further"][0]["loss"] < losses["one"][0]["loss"] - 0.05
    # a base that is itself base and adapter: the same model, computed as one product
    assert losses["merged"][0]["loss"] == pytest.approx(losses["further"][0]["loss"], rel=1e-5)
    begun = {"init_from": str(tmp_path / "other")}
    wrong = adapted(tmp_path, "wrong", model=begun, lora={"init_from": str(tmp_path / "one")})
    with pytest.raises(AssertionError, match=r"its adapter belongs to the weights of .*base.*, and not to .*other"):
        perform(tmp_path, [wrong], nproc=1)


@pytest.mark.full
def test_a_model_with_new_tokens_goes_on_with_the_rows_that_it_began_with(tmp_path: Path) -> None:
    write_text(tmp_path, documents=80)
    perform(tmp_path, [item(tmp_path, "base", train={"steps": 1})], nproc=1)
    grown = {"model": {"vocab_size": 270}, "lora": {"token_rows": [255, 270]}, "chat": {"add_tokens": True}}
    half = {"checkpoint": half_of(tmp_path, "new")}
    cut = {"parallel": {"tensor": 2}, "micro": 8}
    perform(tmp_path, [adapted(tmp_path, "one", **grown)], nproc=1)
    items = [adapted(tmp_path, "new", **grown, **cut), adapted(tmp_path, "again", **grown, **cut, **half)]
    perform(tmp_path, items, nproc=2)
    assert_alike(tmp_path, "new", "one", 1e-5)
    assert without_timing(metrics(tmp_path / "again")) == without_timing(metrics(tmp_path / "new"))[HALF:]
    table, before = (LLM.from_pretrained(tmp_path / name).tok_embeddings.weight for name in ("one", "base"))
    assert table.shape == (270, 32) and len(before) < 260


FOUR_TENSOR = {"four tensor": {"parallel": {"tensor": 4}, "micro": 16}}
MIXTRAL = {
    "n_experts": 4, "top_k": 2, "hidden": 24, "interleave": 2, "score": "softmax", "apply": "output", "renorm": True,
    "shared": False,
}  # fmt: skip
TIED = {"model": {"tie_embeddings": True}, "lora": {"targets": EVERYWHERE[:-1]}}
SETTINGS: dict[str, dict[str, Any]] = {
    "everywhere": {},
    "usual": {"lora": {"targets": None, "rslora": True}},
    "tied": TIED,
    "output-weighted": {"model": {"moe": MIXTRAL}},
    "int8": {"lora": {"base": "int8"}},
    "sgd": {"optim": {"name": "sgd", "lr": 0.5, "min_lr": 0.1}},
    "muon": {"optim": {"name": "muon"}},
    "bf16": {"train": {"precision": "bf16"}, **TIED},
    "bf16 int8": {"train": {"precision": "bf16"}, "lora": {"base": "int8"}},
    "bf16 selective": {"train": {"precision": "bf16", "activation_checkpointing": "selective"}},
}


@pytest.mark.full
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_layout_trains_adapters_alike(tmp_path: Path, setting: str) -> None:
    chosen = SETTINGS[setting]
    half_precision = chosen.get("train", {}).get("precision") == "bf16"
    if half_precision and not has("bf16"):
        pytest.skip("this device has no bf16 arithmetic")
    write_text(tmp_path, documents=80)
    for ranks, layouts in (LAYOUTS | {4: LAYOUTS[4] | FOUR_TENSOR}).items():
        model = chosen.get("model", {})
        items = [item(tmp_path, "base", train={"steps": 1}, model=model)] if ranks == 1 else []
        for name, layout in layouts.items():
            train = {**chosen.get("train", {}), **layout.get("train", {})}
            items.append(adapted(tmp_path, name, **{**chosen, **layout, "train": train}))
        perform(tmp_path, items, ranks, timeout=1500)
        for name in layouts:  # bf16: a token or two of the router's choices may fall otherwise
            assert_alike(tmp_path, name, "one process", 5e-3 if half_precision else 1e-5)


def read_all(source: AdapterSource, args: ModelArgs) -> dict[str, torch.Tensor]:
    """An adapter's parameters."""
    rows = ParameterTable.of(args.model_copy(update={"lora": source.lora})).items()
    shapes = {name: row.shape for name, row in rows if row.kind == "adapter"}
    return {name: source.weights.read(name, whole(shape), torch.empty(shape)) for name, shape in shapes.items()}


def test_an_adapter_goes_out_to_peft_and_comes_in_again_with_its_base(runs: Path, tmp_path: Path) -> None:
    convert.main(["export", str(runs / "low rank"), str(tmp_path / "peft"), "--format=peft", "--quiet"])
    ours, theirs = adapter_of(runs / "low rank"), adapter_of(tmp_path / "peft")
    assert (theirs.lora, theirs.origin) == (ours.lora, ours.origin)
    model, again = LLM.from_pretrained(runs / "low rank"), LLM.from_pretrained(tmp_path / "peft")
    held, found = (read_all(source, model.args) for source in (ours, theirs))
    assert held.keys() == found.keys() and all(torch.equal(held[name], found[name]) for name in held)
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.full
def test_a_run_begins_with_an_adapter_of_peft_as_with_our_own_on_two_ranks(runs: Path, tmp_path: Path) -> None:
    convert.main(["export", str(runs / "low rank"), str(tmp_path / "peft"), "--format=peft", "--quiet"])
    sections: dict[str, Any] = {"parallel": {"tensor": 2}, "micro": 8}
    sources = {"own": runs / "low rank", "foreign": tmp_path / "peft"}
    items = [
        adapted(runs, name, lora={**LOW_RANK, "init_from": str(source)}, **sections)
        for name, source in sources.items()
    ]
    perform(runs, items, nproc=2)
    assert without_timing(metrics(runs / "own")) == without_timing(metrics(runs / "foreign"))
    assert metrics(runs / "own")[0]["loss"] < metrics(runs / "low rank")[0]["loss"]
