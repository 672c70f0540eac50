"""lm-eval on LatticeLM gives what it gives on its own HFLM, and what a plain loop gives.

`make test-full` makes the environment that has lm-eval.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.suites import MODELS, SUITES, random_gpt2, write
from tests.shared import ROOT, needs_shared

HARNESS = ROOT / ".venv-eval" / "bin" / "python"
LIMIT = 16
TOLERANCE = 5e-6
"""Relative, of a log-likelihood: two implementations in float32 whose sums have other orders; the plain loop's softmax
and sum are in float64."""

pytestmark = [
    pytest.mark.full,
    needs_shared,
    pytest.mark.skipif(not HARNESS.is_file(), reason=".venv-eval is not there; make test-full makes it"),
]


def run(words: list[str]) -> str:
    """What a command prints on stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, the tasks, and what lm-eval finds with each way to ask the model."""
    path = tmp_path_factory.mktemp(request.param)
    write(path)
    MODELS[request.param](path / "model")
    scored = [name for name in SUITES if name != "wikitext"]
    asked = {
        "model": str(path / "model"),
        "include_path": str(path / "theirs"),
        "limit": LIMIT,
        "runs": [
            {"name": "hflm", "as": "hflm", "tasks": scored},
            # where the tokenizer puts BOS, HFLM would put a second one before a text and score it
            {"name": "hflm_rolling", "as": "hflm", "tasks": ["wikitext"], "options": {"add_bos_token": False}},
            {"name": "plain", "as": "plain", "tasks": list(SUITES)},
            {"name": "lattice", "as": "lattice", "tasks": list(SUITES)},
        ],
    }
    (path / "asked.json").write_text(json.dumps(asked))
    run([str(HARNESS), "-m", "tests.evaluate.harness", str(path)])
    yield path


def found(folder: Path, name: str, task: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{name}.json").read_text())["samples"][task]


def logprobs(sample: dict[str, Any]) -> list[float]:
    return [answer[0] if isinstance(answer, list) else answer for answer in sample["resps"]]


def close(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * max(abs(one), abs(other))


SCORED = [name for name in SUITES if name != "gsm8k"]


@pytest.mark.parametrize("task", SCORED)
def test_log_likelihoods_are_those_of_a_plain_loop_and_of_hflm_but_for_what_is_named(folder: Path, task: str) -> None:
    """HFLM cuts BOS off a context that is too long (`cut`), and scores a continuation that shares a token with its
    context after other tokens than those of their text (`joint`)."""
    ours, plain = found(folder, "lattice", task), found(folder, "plain", task)
    theirs = found(folder, "hflm_rolling" if task == "wikitext" else "hflm", task)
    begins = "gpt2" not in folder.name  # where it puts no BOS, HFLM's cut drops none
    for mine, reference, other in zip(ours, plain, theirs, strict=True):
        assert mine["args"] == reference["args"] == other["args"]
        for a, b, c, note in zip(*map(logprobs, (mine, reference, other)), reference["notes"], strict=True):
            assert close(a, b), (a, b, note)
            assert note == "joint" or (note == "cut" and begins) or close(a, c), (a, c, note)


@pytest.mark.parametrize("task", [name for name in SCORED if name != "wikitext"])
def test_which_targets_are_greedy_is_what_a_plain_loop_says(folder: Path, task: str) -> None:
    ours, plain = found(folder, "lattice", task), found(folder, "plain", task)
    for mine, reference in zip(ours, plain, strict=True):
        assert [a[1] for a in mine["resps"]] == [a[1] for a in reference["resps"]]


@pytest.mark.parametrize("task", SUITES)
def test_scores_are_those_of_a_plain_loop(folder: Path, task: str) -> None:
    results = [json.loads((folder / f"{name}.json").read_text())["results"][task] for name in ("lattice", "plain")]
    scores = [{key: value for key, value in one.items() if key.endswith(",none") and "stderr" not in key}
              for one in results]  # fmt: skip
    assert scores[0] == pytest.approx(scores[1], rel=1e-5) and scores[0]  # exp of sums that differ by TOLERANCE


def test_what_is_generated_is_what_a_plain_loop_and_hflm_generate(folder: Path) -> None:
    for mine, reference, other in zip(*(found(folder, name, "gsm8k") for name in ("lattice", "plain", "hflm")),
                                      strict=True):  # fmt: skip
        assert mine["resps"] == reference["resps"]
        # HFLM decodes an answer without its prompt, so that SentencePiece drops its first space
        assert "cut" in reference["notes"] or mine["resps"][0].lstrip() == other["resps"][0].lstrip()


def test_what_was_cut_is_counted(folder: Path) -> None:
    counts = json.loads((folder / "lattice.json").read_text())["counts"]
    notes = [note for task in SUITES for sample in found(folder, "plain", task) for note in sample["notes"]]
    assert counts == {"truncated": notes.count("cut"), "joint": notes.count("joint")}


@pytest.mark.distributed
def test_torchrun_gives_the_same_answers_on_two_ranks_and_tensor_parallel_ones_that_are_near(
    folder: Path, tmp_path: Path
) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    tasks = ["arc_easy", "wikitext", "gsm8k"]
    asked["runs"] = [
        {"name": "data", "as": "lattice", "tasks": tasks},
        {"name": "tensor", "as": "lattice", "tasks": tasks[:2], "options": {"tensor": 2}},
    ]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([str(HARNESS), *ranks, "-m", "tests.evaluate.harness", str(tmp_path)])
    for task in tasks:
        alone = found(folder, "lattice", task)
        assert found(tmp_path, "data", task) == alone
        if task != "gsm8k":
            cut = found(tmp_path, "tensor", task)
            for one, other in zip(alone, cut, strict=True):
                assert logprobs(one) == pytest.approx(logprobs(other), rel=1e-5)  # sums over ranks in another order


CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_chat_template_gives_what_it_gives_on_hflm(tmp_path: Path) -> None:
    write(tmp_path)
    model = random_gpt2(tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    tasks = ["arc_easy", "gsm8k"]
    asked = {
        "model": str(model),
        "include_path": str(tmp_path / "theirs"),
        "limit": 8,
        "chat": True,
        "runs": [{"name": name, "as": name, "tasks": tasks} for name in ("hflm", "lattice")],
    }
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    run([str(HARNESS), "-m", "tests.evaluate.harness", str(tmp_path)])
    for mine, other in zip(*(found(tmp_path, name, "arc_easy") for name in ("lattice", "hflm")), strict=True):
        assert mine["args"] == other["args"] and mine["args"][0][0].endswith("<|endoftext|>[assistant]")
        assert all(map(close, logprobs(mine), logprobs(other)))
    for mine, other in zip(*(found(tmp_path, name, "gsm8k") for name in ("lattice", "hflm")), strict=True):
        assert mine["resps"] == other["resps"]


def test_our_own_tasks_give_the_same_scores(folder: Path, tmp_path: Path) -> None:
    tasks = ",".join(str(folder / "ours" / f"{name}.yaml") for name in SUITES)
    words = [sys.executable, "launch/evaluate.py", "--model", str(folder / "model"), "--tasks", tasks]
    run([*words, "--output", str(tmp_path / "out"), "--limit", str(LIMIT), "--dtype", "fp32", "--threads", "1"])
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    theirs = json.loads((folder / "lattice.json").read_text())["results"]
    for task, suite in SUITES.items():
        for name, own in suite.metrics.items():
            assert results[task][own] == pytest.approx(theirs[task][f"{name},none"], rel=1e-5), (task, name)
        lines = (tmp_path / f"out/samples/{task}.jsonl").read_text().splitlines()
        for line, sample in zip(map(json.loads, lines), found(folder, "lattice", task), strict=True):
            answers = line["responses"]
            if task == "gsm8k":
                assert [answer["text"] for answer in answers] == sample["resps"]
            else:
                assert sum(answer["logprob"] for answer in answers) == pytest.approx(sum(logprobs(sample)), rel=1e-6)


def test_lm_eval_of_the_command_gives_the_same_bytes_on_two_ranks_and_goes_on_from_its_journal(
    folder: Path, tmp_path: Path
) -> None:
    tasks = ["--lm_eval", "arc_easy,winogrande,gsm8k,wikitext", "--include_path", str(folder / "theirs")]
    words = [str(HARNESS), "launch/evaluate.py", "--model", str(folder / "model"), *tasks, "--limit", "5"]
    words += ["--dtype", "fp32", "--threads", "1"]
    for nproc in ("1", "2"):
        run([*words, "--output", str(tmp_path / nproc), "--nproc", nproc])
    one, two = ((tmp_path / nproc / "results.json").read_bytes() for nproc in ("1", "2"))
    assert one == two
    scores = json.loads(one)["results"]
    theirs = found(folder, "lattice", "arc_easy")[:5]
    lines = (tmp_path / "1/samples/arc_easy.jsonl").read_text().splitlines()
    for line, sample in zip(map(json.loads, lines), theirs, strict=True):
        assert [answer["logprob"] for answer in line["responses"]] == pytest.approx(logprobs(sample), rel=1e-6)
    assert scores["arc_easy"]["n"] == 5 and scores["arc_easy"]["partial"]
    (tmp_path / "1/results.json").unlink()
    run([*words, "--output", str(tmp_path / "1")])
    assert (tmp_path / "1/results.json").read_bytes() == one
    requests = json.loads((tmp_path / "1/run.json").read_text())["requests"]
    assert requests["in_the_journal"] == requests["different"]
