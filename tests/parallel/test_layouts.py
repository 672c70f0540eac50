"""Which layouts are accepted, and what is said of the others: held against a plain statement of the rules over the
cross product of small jobs.
"""

import random
import re
from functools import cache, reduce
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llm.args import ModelArgs
from llm.errors import UserError
from llm.parallel.layout import Layout
from llm.parallel.validate import Choice, Needs, problem
from llm.train.config import accumulation_steps, check_layout, validate
from tests.distributed.harness import tiny_config

SEQ_LEN = 45  # odd: some micro-batches cannot be cut along the sequence


class Shape(NamedTuple):
    """The numbers of a model that a layout depends on; a width of None = no such layers."""

    heads: int
    kv_heads: int
    dense: int | None
    expert: int | None = None
    n_experts: int = 0

    def args(self) -> dict[str, Any]:
        """ModelArgs as in a config."""
        moe = {"n_experts": self.n_experts, "hidden": self.expert, "interleave": 2 if self.dense else 1}
        return {
            "dim": 8 * self.heads,
            "n_layers": 2,
            "n_heads": self.heads,
            "n_kv_heads": self.kv_heads,
            "ffn_hidden": self.dense,
            "moe": None if self.expert is None else moe,
        }


SHAPES = (
    Shape(heads=8, kv_heads=2, dense=48),
    Shape(heads=8, kv_heads=8, dense=24, expert=40, n_experts=8),
    Shape(heads=12, kv_heads=6, dense=None, expert=24, n_experts=6),
    Shape(heads=7, kv_heads=7, dense=35, expert=70, n_experts=5),
    Shape(heads=6, kv_heads=1, dense=50, expert=36, n_experts=4),
    Shape(heads=1, kv_heads=1, dense=33),
)
BATCHES = ((24, 4), (28, 4), (15, 5))  # global, micro


class Numbers(NamedTuple):
    """What a refusal may change, in the order of the key names below."""

    tensor: int
    expert: int
    zero: int
    micro: int
    sequence: bool


KEYS = (
    "parallel.tensor", "parallel.expert", "parallel.zero_stage", "train.micro_batch_size", "parallel.sequence_parallel"
)  # fmt: skip


def works(shape: Shape, world: int, batch: int, precision: str, offload: bool, trace: bool, n: Numbers) -> bool:
    """The rules, stated once more and plainly."""
    if world % n.tensor:
        return False
    data = world // n.tensor
    widths = [width for width in (shape.dense, shape.expert) if width is not None]
    heads_fit = shape.heads % n.tensor == 0 and (shape.kv_heads % n.tensor == 0 or n.tensor % shape.kv_heads == 0)
    experts_fit = n.expert == 1 or (shape.n_experts > 0 and shape.n_experts % n.expert == 0 and data % n.expert == 0)
    stage_fits = {
        0: precision == "fp32" and n.tensor == 1 and n.expert == 1 and not offload,
        1: True,
        2: True,
        3: n.expert == 1,
    }[n.zero]
    return (
        heads_fit
        and all(width % n.tensor == 0 for width in widths)
        and experts_fit
        and stage_fits
        and not (trace and (n.tensor > 1 or n.expert > 1))
        and batch % (n.micro * data) == 0
        and (not n.sequence or n.micro * SEQ_LEN % n.tensor == 0)
    )


@cache
def all_that_work(shape: Shape, world: int, batch: int, precision: str, offload: bool, trace: bool) -> list[Numbers]:
    divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in (world, batch)]
    every = (divisors[0], divisors[0], range(4), divisors[1], (False, True))
    return [n for n in map(Numbers._make, product(*every)) if works(shape, world, batch, precision, offload, trace, n)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_layout_is_accepted_when_every_rule_holds(shape: Shape) -> None:
    args = ModelArgs.model_validate(shape.args())
    accepted = 0
    features = ((False, False), (True, False), (False, True))
    for (batch, micro), precision, (offload, trace) in product(BATCHES, ("fp32", "bf16"), features):
        needs = Needs(args, precision, offload, SEQ_LEN, (("b", batch),), ("log.trace_steps=[1, 2]",) if trace else ())
        for world, tensor, expert, zero in product(range(1, 9), range(1, 9), range(1, 9), range(4)):
            for sequence in (False, True) if tensor > 1 else (True,):
                layout = Layout(world, tensor, expert, zero_stage=zero, sequence_parallel=sequence)
                numbers = Numbers(tensor, expert, zero, micro, sequence)
                found = problem(needs, Choice(layout, micro))
                expected = works(shape, world, batch, precision, offload, trace, numbers)
                assert (found is None) == expected, (layout, found)
                accepted += found is None
    assert accepted > 100


def config_of(
    tmp_path: Path, shape: Shape, batch: int, precision: str, offload: bool, trace: bool, numbers: Numbers
) -> Any:
    raw = tiny_config(
        tmp_path,
        parallel={
            "tensor": numbers.tensor,
            "expert": numbers.expert,
            "zero_stage": numbers.zero,
            "offload_optimizer": offload,
            "sequence_parallel": numbers.sequence,
        },
        train={
            "global_batch_size": batch,
            "micro_batch_size": numbers.micro,
            "seq_len": SEQ_LEN,
            "precision": precision,
        },
        log={"trace_steps": [1, 2] if trace else None},
    )
    return validate(raw | {"model": {**shape.args(), "max_seq_len": 64}}, "test.yaml")


def test_a_refusal_names_the_key_and_the_layout_that_changes_the_fewest_numbers(tmp_path: Path) -> None:
    draw = random.Random(5)
    reported: set[str] = set()
    for _ in range(800):
        shape, (batch, micro), world = draw.choice(SHAPES), draw.choice(BATCHES), draw.randint(1, 8)
        precision, offload, trace = draw.choice(("fp32", "bf16")), draw.random() < 0.2, draw.random() < 0.2
        tensor, expert = (draw.choice((1, draw.randint(1, 8))) for _ in range(2))
        wanted = Numbers(tensor, expert, draw.randint(0, 3), micro, draw.random() < 0.7)
        config = config_of(tmp_path, shape, batch, precision, offload, trace, wanted)
        run = (batch, precision, offload, trace)
        if works(shape, world, *run, wanted):
            layout = check_layout(config, world)
            assert (layout.tensor, layout.expert, layout.zero_stage) == wanted[:3]
            assert layout.sequence_parallel == wanted.sequence and layout.data * layout.tensor == world
            assert accumulation_steps(config, layout.data) * micro * layout.data == batch
            continue
        with pytest.raises(UserError) as error:
            check_layout(config, world)
        text = str(error.value)
        assert "\n" not in text
        wrong, advice = text.split("; ")
        key = wrong.partition("=")[0]
        assert wrong.startswith(f"{key}={as_typed(config, key)} "), text
        possible = all_that_work(shape, world, *run)
        if possible:
            near = parsed(advice, wanted)
            assert near in possible, text
            least = min(n_changes(wanted, other) for other in possible)
            assert n_changes(wanted, near) == least, (text, wanted)
            assert advice.startswith("use " if near[:3] == wanted[:3] else f"nearest that works on {world} rank"), text
        else:
            assert advice.startswith(f"no layout of {world} ranks works: use "), text
            for size, numbers in re.findall(r"(\d+) ranks?(?: \(([^)]*)\))?", advice.partition("use ")[2]):
                assert parsed(numbers, wanted) in all_that_work(shape, int(size), *run), text
                between = range(min(world, int(size)) + 1, max(world, int(size)))
                assert not any(all_that_work(shape, other, *run) for other in between), text
        reported.add(key)
    rules = {key for key in KEYS if key != "train.micro_batch_size"}
    rules |= {"train.global_batch_size", "log.trace_steps", "parallel.offload_optimizer"}
    assert reported == rules, "the sample must reach every rule"


def as_typed(config: Any, key: str) -> str:
    value = reduce(getattr, key.split("."), config)
    return str(list(value) if isinstance(value, tuple) else value).lower()


def n_changes(wanted: Numbers, other: Numbers) -> int:
    return sum(a != b for a, b in zip(wanted, other, strict=True))


def parsed(advice: str, wanted: Numbers) -> Numbers:
    """`wanted` with the `key=value`s of a piece of advice, each of which must change something."""
    values = list(wanted)
    for key, value in re.findall(r"([a-z_.]+)=(\w+)", advice):
        index = KEYS.index(key)
        new = value == "true" if value in ("true", "false") else int(value)
        assert new != values[index], f"{advice} repeats {key}"
        values[index] = new
    return Numbers._make(values)


@pytest.mark.parametrize(
    ("world", "sections", "expected"),
    [
        (
            6,
            {"model": {"n_heads": 8}, "parallel": {"tensor": 3}, "train": {"global_batch_size": 48}},
            "parallel.tensor=3 does not divide model.n_heads=8; nearest that works on 6 ranks: parallel.tensor=2",
        ),
        (
            1,
            {"parallel": {"tensor": 2}},
            "parallel.tensor=2 does not divide the number of ranks, 1; nearest that works on 1 rank: parallel.tensor=1",
        ),
        (
            4,
            {"parallel": {"zero_stage": 3, "expert": 2}},
            "parallel.zero_stage=3 needs parallel.expert=1, not 2; "
            "nearest that works on 4 ranks: parallel.zero_stage=2",
        ),
        (
            2,
            {"parallel": {"expert": 2}, "model": {"moe": None}},
            "parallel.expert=2 needs mixture-of-experts layers, and the model has none; "
            "nearest that works on 2 ranks: parallel.expert=1",
        ),
        (
            2,
            {"parallel": {"tensor": 2}, "train": {"micro_batch_size": 1, "seq_len": 47}},
            "parallel.sequence_parallel=true needs train.micro_batch_size=1 x train.seq_len=47 to be divisible by "
            "parallel.tensor=2; use parallel.sequence_parallel=false",
        ),
        (
            2,
            {"parallel": {"tensor": 2}, "log": {"trace_steps": [1, 2]}},
            "log.trace_steps=[1, 2] is not available with parallel.tensor=2 yet; "
            "nearest that works on 2 ranks: parallel.tensor=1",
        ),
        (
            3,
            {},
            "train.global_batch_size=16 is not divisible by 3 data-parallel ranks; "
            "no layout of 3 ranks works: use 2 ranks or 4 ranks",
        ),
        (
            2,
            {"parallel": {"zero_stage": 0}, "train": {"precision": "auto"}},
            "parallel.zero_stage=0 needs train.precision=fp32, not auto; "
            "nearest that works on 2 ranks: parallel.zero_stage=1",
        ),
    ],
)
def test_what_a_refusal_says(tmp_path: Path, world: int, sections: dict[str, Any], expected: str) -> None:
    model = {**tiny_config(tmp_path)["model"], **sections.get("model", {})}
    config = validate(tiny_config(tmp_path, **{**sections, "model": model}), "test.yaml")
    with pytest.raises(UserError) as error:
        check_layout(config, world)
    assert str(error.value) == expected


def test_a_width_binds_only_where_a_layer_has_it(tmp_path: Path) -> None:
    odd = {"model": {"ffn_hidden": 49}, "parallel": {"tensor": 2}}
    with pytest.raises(UserError, match=r"parallel\.tensor=2 does not divide model\.ffn_hidden=49; "):
        check_layout(validate(tiny_config(tmp_path, **odd), "test.yaml"), 2)
    odd["model"]["layer_pattern"] = ["attn+moe"]
    assert check_layout(validate(tiny_config(tmp_path, **odd), "test.yaml"), 2).tensor == 2
