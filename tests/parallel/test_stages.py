"""Pipelines before any process exists: which are accepted, how layers are cut into stages, what --dry_run says."""

from collections import Counter, defaultdict, deque
from dataclasses import replace
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

import pytest

from llm.args import ModelArgs
from llm.errors import UserError
from llm.model import unit_names
from llm.parallel.layout import Layout, PipelineSchedule
from llm.parallel.stages import balanced, bubble, split
from llm.parallel.validate import Choice, Needs, changes, nearest, problem
from llm.train.config import check_layout, validate
from llm.train.dry_run import report
from tests.distributed.harness import TINY_MODEL, tiny_config

ARGS = ModelArgs.model_validate({**TINY_MODEL, "vocab_size": 64})
SCHEDULES: tuple[PipelineSchedule, ...] = "1f1b", "dualpipev"


def test_a_pipeline_is_accepted_when_every_rule_holds() -> None:
    """Four layers, heads 4 over 2, widths 48 and 24, 4 experts, batches of 24 in micro-batches of 3, float32."""
    needs, accepted = Needs(ARGS, "fp32", False, 48, (("b", 24),)), Counter[str]()
    places: tuple[range, ...] = range(1, 9), range(1, 9)
    for world, pipeline, tensor, expert, zero in product(*places, (1, 2, 4), (1, 2, 4), range(4)):
        for schedule in SCHEDULES:
            layout = Layout(world, tensor, expert, pipeline, 1, zero, False, schedule)
            replica = tensor * pipeline
            v = schedule == "dualpipev"
            expected = (
                world % replica == 0
                and pipeline <= (2 if v else 4)
                and (world // replica) % expert == 0
                and 24 % (3 * (world // replica)) == 0
                and (pipeline == 1 or zero == 1)
                and (zero != 3 or expert == 1)
                and (zero != 0 or (tensor == 1 and expert == 1))
                and (not v or (pipeline > 1 and 8 // (world // replica) >= 2 * pipeline))
            )
            found = problem(needs, Choice(layout, 3))
            assert (found is None) == expected, (layout, found)
            accepted[schedule] += expected and pipeline > 1
    assert accepted["1f1b"] > 10 and accepted["dualpipev"] > 3


@pytest.mark.parametrize("batch", [16, 24])
def test_the_nearest_pipeline_changes_as_few_settings_as_any_that_works(batch: int) -> None:
    """Against every choice of four ranks, from every pipeline there with dualpipev that does not work."""
    needs = Needs(ARGS, "fp32", False, 48, (("b", batch),))
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    every = [
        Choice(Layout(4, tensor, expert, pipeline, 1, zero, False, schedule), micro)
        for tensor, expert, pipeline in product((1, 2, 4), repeat=3)
        for zero, schedule, micro in product(range(4), SCHEDULES, divisors)
    ]
    working = [choice for choice in every if problem(needs, choice) is None]
    refused = 0
    for wanted in every:
        if wanted.layout.pipeline == 1 or wanted.layout.pipeline_schedule == "1f1b" or wanted in working:
            continue
        near = nearest(needs, wanted, 4)
        assert near in working
        fewest = min(len(changes(wanted, choice)) for choice in working)
        assert len(changes(wanted, near)) == fewest, (wanted, near)
        refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("parallel", "ranks", "line"),
    [
        ({"pipeline": 2, "zero_stage": 2}, 2, "parallel.zero_stage=2 needs parallel.pipeline=1, not 2; nearest"),
        ({"pipeline": 8}, 8, "parallel.pipeline=8 is above model.n_layers=4; nearest"),
        ({"pipeline": 3}, 4, "parallel.pipeline=3 does not divide the number of ranks, 4; nearest"),
    ],
)
def test_a_refusal_is_one_line_with_the_nearest_layout(
    tmp_path: Path, parallel: dict[str, int], ranks: int, line: str
) -> None:
    with pytest.raises(UserError) as error:
        check_layout(validate(tiny_config(tmp_path, parallel=parallel), "config"), ranks)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_trace_which_looks_into_the_whole_model_is_refused(tmp_path: Path) -> None:
    config = validate(tiny_config(tmp_path, parallel={"pipeline": 2}, log={"trace_steps": [1, 2]}), "config")
    with pytest.raises(UserError, match="log.trace_steps"):
        check_layout(config, 2)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [5, 1, 1, 1, 9], [1, 2, 3, 4, 5, 6, 7], [9, 1, 1, 1, 1, 1, 1, 1]])
def test_the_slowest_stage_is_as_fast_as_any_cut_can_make_it(weights: list[int]) -> None:
    for parts in range(1, len(weights) + 1):
        bounds = balanced(weights, parts)
        assert bounds[0] == 0 and bounds[-1] == len(weights) and bounds == sorted(set(bounds))
        cuts = ([0, *inner, len(weights)] for inner in combinations(range(1, len(weights)), parts - 1))
        heaviest = (max(sum(weights[a:b]) for a, b in zip(cut, cut[1:], strict=False)) for cut in cuts)
        assert max(sum(weights[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)) == min(heaviest)
    with pytest.raises(ValueError, match="cannot be cut"):
        balanced(weights, len(weights) + 1)


def test_a_head_weighs_what_it_weighs() -> None:
    wide = ARGS.model_copy(update={"vocab_size": 4096})
    stages = split(wide, 2, 48)
    assert stages[0].first and stages[1].last and list(stages[1].layers) == [3], "the head outweighs all other layers"
    assert sum(stage.share for stage in stages) == pytest.approx(1)


def test_a_head_that_no_loss_reads_weighs_nothing() -> None:
    """As where labels alone are learned."""
    wide = ARGS.model_copy(update={"vocab_size": 4096})
    assert split(wide, 2, 48, logits=False) == split(wide.model_copy(update={"vocab_size": 1}), 2, 48, logits=False)
    assert list(split(wide, 2, 48, logits=False)[1].layers) == [2, 3]


BOTH = ARGS.model_copy(update={"encoder_layers": 4, "vocab_size": 2})


def test_stages_weigh_the_layers_of_an_encoder_by_the_length_of_the_source() -> None:
    """The first stage has fewer layers of the encoder where their source is longer than the target, and with a short
    one the whole encoder."""
    cuts = [split(BOTH, 2, 48, source_len=source)[0] for source in (6, 48, 480)]
    sizes = [len(stage.encoder) + len(stage.layers) for stage in cuts]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 4 > sizes[-1]
    assert list(cuts[0].encoder) == [0, 1, 2, 3] and not cuts[-1].layers


@pytest.mark.parametrize("stages", [1, 2, 3, 8])
def test_the_stages_of_an_encoder_decoder_have_each_unit_once_and_in_order(stages: int) -> None:
    units = [unit for stage in split(BOTH, stages, 48) for unit in stage.units]
    assert tuple(units) == unit_names(BOTH)


def test_a_pipeline_longer_than_both_sides_together_is_refused_by_both_keys() -> None:
    needs = Needs(BOTH, "fp32", False, 48, (("b", 24),))
    assert problem(needs, Choice(Layout(8, pipeline=8), 1)) is None
    found = problem(needs, Choice(Layout(9, pipeline=9), 1))
    assert found == "parallel.pipeline=9 is above model.encoder_layers=4 and model.n_layers=4 together"


def test_each_side_must_be_cut_evenly_by_sequence_parallelism() -> None:
    uneven = Needs(BOTH, "fp32", False, 48, (("b", 24),), source_len=7)
    choice = Choice(Layout(2, tensor=2, sequence_parallel=True), 1)
    assert problem(replace(uneven, source_len=8), choice) is None
    assert "x data.source_len=7 to be divisible by parallel.tensor=2" in (problem(uneven, choice) or "")


def test_a_dry_run_names_stages_their_work_and_the_bubble(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path, parallel={"pipeline": 2}, train={"micro_batch_size": 2})
    raw["model"] = {**raw["model"], "vocab_size": 64}
    config = validate(raw, "config")
    text = report(config, check_layout(config, 2))
    assert "stage 1 of 2" in text and "stage 2 of 2" in text and "embedding, layers 0" in text
    assert f"{bubble(2, 8, '1f1b'):.1%} of a step of m=8 micro-batches on S=2 ranks (1f1b)" in text
    assert bubble(2, 8, "1f1b") == pytest.approx(1 / 9) and bubble(1, 8, "1f1b") == 0
    raw["parallel"]["pipeline_schedule"] = "dualpipev"
    config = validate(raw, "config")
    text = report(config, check_layout(config, 2))
    places = [line[-1] for line in text.splitlines() if "stage" in line and "of the work, pipeline " in line]
    assert places == ["0", "1", "1", "0"] and "7.7% of a step" in text
    assert "all for the one with stages " in text


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_the_bubble_of_dualpipev_is_that_of_its_instructions(ranks: int) -> None:
    for micro_batches in (2 * ranks, 2 * ranks + 3, 8 * ranks):
        whole, work = played(ranks, micro_batches)
        assert bubble(ranks, micro_batches, "dualpipev") == pytest.approx(1 - work / whole)
        assert bubble(ranks, micro_batches, "dualpipev") < bubble(ranks, micro_batches, "1f1b")


def played(ranks: int, micro_batches: int) -> tuple[float, float]:
    """Time of a step by DeepSpeed's instructions, and that in which a rank works: a forward of a stage takes 1/2, a
    backward 1, and a rank goes on from a CommitP2P once all that it sends or receives there has both its ends.
    """
    from deepspeed.runtime.pipe import schedule

    down = {schedule.SendActivation: 1, schedule.RecvActivation: -1, schedule.SendGrad: -1, schedule.RecvGrad: 1}
    sends = (schedule.SendActivation, schedule.SendGrad)
    programs: list[deque[Any]] = []
    for place in range(ranks):
        program, pending, numbers = deque[Any](), [], Counter[tuple[int, int]]()
        for command in chain.from_iterable(schedule.DualPipeVSchedule(micro_batches, ranks, place).steps()):
            if type(command) in down:
                peer = place + down[type(command)] * (1 if command.phase == 0 else -1)
                pair = (place, peer) if isinstance(command, sends) else (peer, place)
                pending.append((*pair, numbers[pair]))
                numbers[pair] += 1
            elif isinstance(command, schedule.CommitP2P):
                program.append(pending)
                pending = []
            elif isinstance(command, (schedule.ForwardPass, schedule.BackwardPass)):
                program.append(0.5 if isinstance(command, schedule.ForwardPass) else 1.0)
        programs.append(program)
    now, work = [0.0] * ranks, sum(task for task in programs[0] if isinstance(task, float))
    reached: dict[tuple[int, int, int], dict[int, float]] = defaultdict(dict)
    while any(programs):
        before = sum(map(len, programs))
        for place, program in enumerate(programs):
            while program:
                if isinstance(program[0], float):
                    now[place] += program.popleft()
                    continue
                for transfer in program[0]:
                    reached[transfer].setdefault(place, now[place])
                if any(len(reached[transfer]) < 2 for transfer in program[0]):
                    break
                now[place] = max([now[place], *(max(reached[t].values()) for t in program.popleft())])
        assert sum(map(len, programs)) < before, "nobody can go on"
    return max(now), work


@pytest.mark.parametrize(
    ("sections", "ranks", "message"),
    [
        ({"pipeline_schedule": "dualpipev"}, 2, "dualpipev needs parallel.pipeline=2 or more, not 1; use .*=1f1b"),
        (
            {"pipeline": 4, "pipeline_schedule": "dualpipev"},
            4,
            "twice parallel.pipeline=4, which is above model.n_layers=4; use .*=1f1b",
        ),
    ],
)
def test_dualpipev_where_it_cannot_be_is_refused_with_what_can(
    tmp_path: Path, sections: dict[str, Any], ranks: int, message: str
) -> None:
    config = validate(tiny_config(tmp_path, parallel=sections), "config")
    with pytest.raises(UserError, match=message):
        check_layout(config, ranks)


def test_dualpipev_needs_two_micro_batches_for_each_rank(tmp_path: Path) -> None:
    parallel = {"pipeline": 2, "pipeline_schedule": "dualpipev"}
    raw = tiny_config(tmp_path, parallel=parallel, train={"global_batch_size": 16, "micro_batch_size": 8})
    message = "train.global_batch_size=16 in micro-batches of 8 .* makes 2 a step, .* use train.micro_batch_size=4"
    with pytest.raises(UserError, match=message):
        check_layout(validate(raw, "config"), 2)
    raw["train"]["micro_batch_size"] = 4
    assert check_layout(validate(raw, "config"), 2).stages == 4
