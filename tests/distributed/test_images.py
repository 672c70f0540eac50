"""Answers about images do not depend on how a model with a vision tower is cut, nor on which ranks have images."""

import json
from typing import Any

import pytest

from llm import LLM
from tests.distributed.images_job import IN_STEP, LAYOUTS, answers, case_of
from tests.distributed.pool import run_job
from tests.distributed.vision_job import config_of
from tests.evaluate.replicas import replica_of

pytestmark = [pytest.mark.distributed, pytest.mark.full]

Answers = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def expected() -> Answers:
    config = config_of(case_of({}))
    return answers(replica_of(LLM(config.model, seed=config.train.seed)))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of layouts, the answers of each rank, and what each raises."""
    file = tmp_path_factory.mktemp("images") / "report.json"
    done = run_job("tests/distributed/images_job.py", str(file), nproc=2)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def found(reported: list[dict[str, Any]]) -> dict[str, list[Answers]]:
    """Of each layout, the answers of each rank."""
    return {
        name: [{int(place): answer for place, answer in own.items()} for own in report]
        for name, report in reported[0].items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_about_images_are_those_of_one_process(found, expected, layout):
    """Where products are cut, sums of half a product each, in another order: some of float32's 24 bits."""
    first, second = found[layout]
    together = first | second
    assert together.keys() == expected.keys()
    for place, answer in expected.items():
        of_layout = together[place]
        if layout in ("tensor", "expert") and "logprob" in answer:
            assert of_layout["greedy"] == answer["greedy"]
            assert of_layout["logprob"] == pytest.approx(answer["logprob"], rel=1e-5)
        else:
            assert of_layout == answer


@pytest.mark.parametrize("layout", ["data", "ZeRO-3"])
def test_of_two_ranks_one_had_no_image_to_score(found, layout):
    asked_of_images = range(4)  # as images_job.requests says
    having = [any(place in own for place in asked_of_images) for own in found[layout]]
    assert having in ([True, False], [False, True])


@pytest.mark.parametrize("layout", IN_STEP)
def test_numbers_of_one_rank_that_are_not_finite_end_all_ranks_with_one_line(reported, layout):
    first, second = reported[1][layout]
    assert first == second
    index, agreed, message = first
    assert 0 <= index < 22 and agreed and message.startswith("the logits of token 1 of ")
