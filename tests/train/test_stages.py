"""Pipelines before any process exists: which are accepted, how layers are cut into stages, what --dry_run says."""

from itertools import combinations, product
from pathlib import Path

import pytest

from llm.args import ModelArgs
from llm.errors import UserError
from llm.parallel.layout import Layout
from llm.parallel.stages import balanced, bubble, costs, split
from llm.parallel.validate import Choice, Needs, problem
from llm.train.config import check_layout, validate
from llm.train.dry_run import report
from llm.train.replay import check_replay
from tests.distributed.harness import TINY_MODEL, tiny_config

ARGS = ModelArgs.model_validate({**TINY_MODEL, "vocab_size": 64})


def test_a_pipeline_is_accepted_when_every_rule_holds() -> None:
    """Four layers, heads 4 over 2, widths 48 and 24, 4 experts, batches of 24 in micro-batches of 1, float32."""
    needs, accepted = Needs(ARGS, "fp32", False, 48, (("b", 24),)), 0
    for world, tensor, stages, expert, zero in product(range(1, 9), (1, 2, 4), range(1, 9), (1, 2, 4), range(4)):
        layout = Layout(world, tensor, expert, stages, zero_stage=zero, sequence_parallel=False)
        replica = tensor * stages
        expected = (
            world % replica == 0
            and stages <= 4
            and (world // replica) % expert == 0
            and 24 % (world // replica) == 0
            and (stages == 1 or zero == 1)
            and (zero != 3 or expert == 1)
            and (zero != 0 or (tensor == 1 and expert == 1))
        )
        found = problem(needs, Choice(layout, 1))
        assert (found is None) == expected, (layout, found)
        accepted += expected and stages > 1
    assert accepted > 10


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


def test_what_looks_into_the_whole_model_is_refused(tmp_path: Path) -> None:
    config = validate(tiny_config(tmp_path, parallel={"pipeline": 2}, log={"trace_steps": [1, 2]}), "config")
    with pytest.raises(UserError, match="log.trace_steps"):
        check_layout(config, 2)
    with pytest.raises(UserError, match="parallel.pipeline=2: --replay_step .* --parallel.pipeline=1"):
        check_replay(tmp_path, 1, None, stages=2)


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


def test_a_head_and_experts_weigh_what_they_weigh() -> None:
    wide = ARGS.model_copy(update={"vocab_size": 4096})
    assert costs(wide, 48).head == 6 * wide.dim * 4096
    stages = split(wide, 2, 48)
    assert stages[0].first and stages[1].last and list(stages[1].layers) == [3], "the head outweighs all other layers"
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    dense, moe = (costs(ARGS, 48).layers[i] for i in range(2))
    # top 2 of 4 experts of width 24, a shared one of the same width and a router, against a dense width of 48
    assert moe - dense == 6 * (3 * 32 * 24 * (2 + 1) + 32 * 4 - 3 * 32 * 48)


def test_a_dry_run_names_stages_their_work_and_the_bubble(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path, parallel={"pipeline": 2}, train={"micro_batch_size": 2})
    raw["model"] = {**raw["model"], "vocab_size": 64}
    config = validate(raw, "config")
    text = report(config, check_layout(config, 2))
    assert "stage 1 of 2" in text and "stage 2 of 2" in text and "embedding, layers 0" in text
    assert f"{bubble(2, 8):.1%} of a step of m=8 micro-batches for S=2 stages" in text
    assert bubble(2, 8) == pytest.approx(1 / 9) and bubble(1, 8) == 0
