"""An evaluation from flags to files, in one process: what is refused, what is not done again, what is written."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm.errors import UserError
from llm.evaluate import evaluation
from llm.jobs.evaluate import Evaluate
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from tests.distributed.evaluations import content, keys, words_of, write_checkpoint, write_model, write_tasks

ROOT = Path(__file__).resolve().parents[2]
ALONE = World(0, 1, 0, torch.device("cpu"))


def evaluate(words: list[str]) -> None:
    job = Evaluate.parse(words)
    evaluation.evaluate(job.flags.settings, make_grid(ALONE, job.layout))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, tasks, and what came out, in `one`."""
    made = tmp_path_factory.mktemp("evaluation")
    write_model(made / "model")
    evaluate(words_of(made / "model", [*write_tasks(made / "tasks", documents=8).values()], made / "one"))
    return made


def test_results_and_samples_say_what_was_asked_and_answered(folder):
    found = json.loads((folder / "one" / "results.json").read_text())
    assert set(found["results"]) == {"choices", "texts", "questions"}
    assert found["model"]["dtype"] == "float32" and found["model"]["context"] == 64
    rows = [json.loads(line) for line in (folder / "one" / "samples" / "choices.jsonl").read_text().splitlines()]
    reported = [json.loads(line) for line in (folder / "tasks" / "choices.jsonl").read_text().splitlines()]
    assert [row["doc"] for row in rows] == reported
    assert [len(row["responses"]) for row in rows] == [len(row["choices"]) for row in reported]
    assert sum(row["metrics"]["acc"] for row in rows) / len(rows) == found["results"]["choices"]["acc"]


def test_a_run_says_how_it_was_made_and_the_results_do_not(folder):
    said = json.loads((folder / "one" / "run.json").read_text())
    assert said["ranks"] == 1 and said["layout"] == "data 1" and said["model"] == str(folder / "model")
    assert said["requests"]["answered"] == len(keys(folder / "one")) == said["requests"]["different"]
    assert str(folder) not in (folder / "one" / "results.json").read_text()


def test_nothing_left_to_do_reads_no_weights_and_writes_the_same(folder, monkeypatch):
    before = content(folder / "one")
    (folder / "one" / "results.json").unlink()
    monkeypatch.setattr(evaluation, "open_replica", None)
    evaluate(words_of(folder / "model", sorted((folder / "tasks").glob("*.yaml"), key=order), folder / "one"))
    assert content(folder / "one") == before
    assert json.loads((folder / "one" / "run.json").read_text())["requests"]["answered"] == 0


def order(task: Path) -> int:
    return ["choices", "texts", "questions"].index(task.stem)


def test_a_limit_is_a_part_and_the_rest_goes_on_from_it(folder, tmp_path):
    words = words_of(folder / "model", [folder / "tasks" / "choices.yaml"], tmp_path / "output")
    evaluate([*words, "--limit=3"])
    result = json.loads((tmp_path / "output" / "results.json").read_text())["results"]["choices"]
    assert result["n"] == 3 and result["partial"] is True
    some = keys(tmp_path / "output")
    evaluate(words)
    every = keys(tmp_path / "output")
    assert every[: len(some)] == some and len(every) == len(set(every))
    result = json.loads((tmp_path / "output" / "results.json").read_text())["results"]["choices"]
    assert result["n"] == 8 and not result.get("partial")


def other_model(folder: Path, words: list[str]) -> list[str]:
    return ["--model", str(write_model(folder / "third", seed=1)), *words[2:]]


def other_dtype(folder: Path, words: list[str]) -> list[str]:
    return [*words[:-1], "--dtype=bf16"]


def other_task(folder: Path, words: list[str]) -> list[str]:
    with (folder / "tasks" / "choices.yaml").open("a") as file:
        file.write("fewshot: {k: 1, path: choices.jsonl}\n")
    return words


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_model, "the model changed"),
        (other_dtype, "--dtype is bfloat16, was float32"),
        (other_task, "the task choices changed"),
    ],
)
def test_answers_of_another_evaluation_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[Path, list[str]], list[str]], said: str
) -> None:
    output = tmp_path / "output"
    tasks = write_tasks(tmp_path / "tasks", documents=4)
    words = words_of(folder / "model", [tasks["choices"]], output, "--dtype=fp32")
    evaluate(words)
    before = content(output)
    with pytest.raises(UserError, match=rf"holds answers of another evaluation \({said}\)"):
        evaluate(change(tmp_path, words))
    assert content(output) == before


def test_logits_that_are_no_numbers_are_refused_by_document_and_nothing_is_written(folder, tmp_path):
    bad = write_model(tmp_path / "bad", seed=2, change=lambda model: model.norm.weight.data.fill_(torch.nan))
    words = words_of(bad, [folder / "tasks" / "choices.yaml"], tmp_path / "output")
    with pytest.raises(UserError, match=r"task choices: .*choices.jsonl row \d+: .*finite"):
        evaluate(words)
    assert keys(tmp_path / "output") == [] and not (tmp_path / "output" / "results.json").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--taks=a"], "unknown flag --taks; did you mean --tasks"),
        (["--parallel.tensr=2"], "unknown flag --parallel.tensr; did you mean --parallel.tensor"),
        (["--limit=0"], "--limit=0 must be at least 1"),
        (["--num_fewshot=-1"], "--num_fewshot=-1 must be at least 0"),
        (["--batch_tokens=x"], "--batch_tokens=x: expected a whole number"),
        (["--chat_template=chatml"], "--chat_template goes with --apply_chat_template"),
        (["--nproc=3", "--parallel.tensor=3"], "parallel.tensor=3 does not divide model.n_heads=4; nearest that works"),
        (["--parallel.pipeline=2"], "parallel.pipeline=2 does not divide the number of ranks, 1"),
        (["--nproc=4", "--parallel.expert=3"], "parallel.expert=3 does not divide model.moe.n_experts=4"),
        (["--image_root=nowhere"], "--image_root=nowhere: no such folder"),
    ],
)
def test_flags_that_make_no_sense_are_refused_in_one_line(folder, tmp_path, more, said):
    with pytest.raises(UserError) as refused:
        Evaluate.parse(words_of(folder / "model", [folder / "tasks" / "choices.yaml"], tmp_path / "output", *more))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_number_of_examples_is_refused_where_a_kind_has_none(folder, tmp_path):
    tasks = [folder / "tasks" / f"{name}.yaml" for name in ("choices", "texts")]
    said = "texts.yaml: --num_fewshot=2: kind perplexity has no examples before its documents; evaluate texts"
    with pytest.raises(UserError, match=re.escape(said)):
        Evaluate.parse(words_of(folder / "model", tasks, tmp_path / "output", "--num_fewshot=2")).check(0)
    Evaluate.parse(words_of(folder / "model", tasks, tmp_path / "output", "--num_fewshot=0")).check(0)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_evaluate_writes_beside_the_results_of_older_checkpoints(tmp_path):
    def output() -> str:
        command = ["make", "-n", "evaluate", f"RUN={tmp_path}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert f" --output {tmp_path}/evaluation " in output()
    for name in ("step_00000005", "step_00000040", "step_00000100", "step_00000200.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert f" --output {tmp_path}/evaluation/step_00000100 " in output()


def test_tasks_are_looked_at_before_any_rank_starts(folder, tmp_path):
    words = words_of(folder / "model", [Path("no_such_task")], tmp_path / "output", "--nproc=2")
    with pytest.raises(UserError, match="no_such_task"):
        Evaluate.parse(words).check(0)


def test_a_dry_run_counts_what_would_be_asked_and_makes_nothing(folder, tmp_path):
    words = words_of(folder / "model", [folder / "tasks" / "choices.yaml"], tmp_path / "output")
    reported = Evaluate.parse([*words, "--nproc=2", "--parallel.pipeline=2", "--dry_run"]).report()
    rows = (folder / "tasks" / "choices.jsonl").read_text().splitlines()
    asked = sum(len(json.loads(row)["choices"]) for row in rows)
    assert f"choices: 8 documents, {asked} requests" in reported and "pipeline 2" in reported and "weights" in reported
    assert not (tmp_path / "output").exists()


def test_ranks_get_the_words_without_their_number(folder, tmp_path):
    words = words_of(folder / "model", [folder / "tasks" / "choices.yaml"], tmp_path / "output")
    for said in (["--nproc=2"], ["--nproc", "2"]):
        assert Evaluate.parse([*words, *said]).words_of_a_rank() == words


def test_every_checkpoint_of_a_run_is_evaluated_for_itself_and_all_in_one_table(folder, tmp_path):
    run = tmp_path / "run"
    for step in (2, 10):
        write_checkpoint(run, step)
    tasks = [folder / "tasks" / "choices.yaml"]
    evaluate(words_of(run, tasks, tmp_path / "output", "--every_checkpoint", "--dtype=fp32"))
    outputs = [tmp_path / "output" / f"step_{step:08d}" for step in (2, 10)]
    digests = {json.loads((path / "results.json").read_text())["model"]["digest"] for path in outputs}
    assert len(digests) == 2 and all(keys(path) for path in outputs)
    reported = (tmp_path / "output" / "results.md").read_text()
    assert "step 2" in reported and "step 10" in reported and (tmp_path / "output" / "report.html").exists()
    newest = run / "checkpoints" / "step_00000010"
    evaluate(words_of(newest, tasks, tmp_path / "alone", "--dtype=fp32"))
    assert content(tmp_path / "alone") == content(outputs[1])


def test_every_checkpoint_is_for_runs(folder, tmp_path):
    words = words_of(folder / "model", [folder / "tasks" / "choices.yaml"], tmp_path / "output", "--every_checkpoint")
    with pytest.raises(UserError, match="holds no checkpoints; --every_checkpoint is for a run"):
        Evaluate.parse(words).check(0)
