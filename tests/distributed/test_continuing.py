"""Answers to Continue requests do not depend on how the model is cut."""

import json
from pathlib import Path

import pytest

from llm import LLM, ModelArgs
from tests.distributed.continuing_job import ARGS, LAYOUTS, answers
from tests.distributed.pool import run_job
from tests.evaluate.replicas import replica_of

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[dict[str, object]]]]:
    file = tmp_path_factory.mktemp("continuing") / "report.json"
    done = run_job("tests/distributed/continuing_job.py", str(file), nproc=2)
    assert done.returncode == 0, done.stderr
    return json.loads(Path(file).read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_those_of_one_process(found, layout):
    expected = answers(replica_of(LLM(ModelArgs.model_validate(ARGS), seed=0)))
    assert found[layout] == [expected, expected]
