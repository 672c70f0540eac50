"""lm-eval's own tasks as an evaluation of ours: launch/evaluate.py --lm_eval. The same journal, the same files; scores
and samples by lm-eval. lm-eval is imported when this is called.
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm.checkpoint.lock import run_lock
from llm.errors import UserError
from llm.evaluate.evaluation import Settings, described, write_reports
from llm.evaluate.results import write_results, write_run, write_samples
from llm.generation.text import context_length
from llm.parallel.collectives import all_or_none, gather_json
from llm.parallel.grid import Grid
from llm.pretrained import args_of

if TYPE_CHECKING:
    from llm.evaluate.lm_eval import LatticeLM

BOOTSTRAPS = 1000
"""Drawings for standard errors of metrics that have no formula."""
OF_ONE = ("mean", "nanmean", "median", "perplexity", "weighted_perplexity", "bits_per_byte")
"""lm-eval's ways to make a score of documents' values that mean something for a document alone, too."""


def check_harness(tasks: Sequence[str], include_path: Path | None) -> None:
    """UserError where lm-eval is not installed, does not know a task, or the folder of more tasks is not there."""
    manager = _manager(include_path)
    for name in tasks:
        if not manager.match_tasks([name]):
            raise UserError(f"--lm_eval={name}: lm-eval has no task, group or tag of that name{_where(include_path)}")


def evaluate_harness(settings: Settings, grid: Grid, tasks: Sequence[str], include_path: Path | None) -> None:
    """Do tasks of lm-eval, or go on with them, and write the results (collective)."""
    started = time.monotonic()
    world = grid.world
    with run_lock(settings.output, world), _quiet_but(world.is_main):
        manager = all_or_none(lambda: _manager(include_path), world)
        built = all_or_none(lambda: [one for name in tasks for one in _built(manager, name, include_path)], world)
        loaded = manager.load(built)
        model = _model(settings, grid, loaded["tasks"])
        import lm_eval

        found = lm_eval.simple_evaluate(
            model=model,
            tasks=built,
            task_manager=manager,
            num_fewshot=settings.options.num_fewshot,
            limit=settings.options.limit,
            bootstrap_iters=BOOTSTRAPS,
            apply_chat_template=settings.chat_template is not None,
            fewshot_as_multiturn=settings.chat_template is not None,
        )
        digest = model.digest
        if world.is_main:
            _write(settings, model, digest, found, loaded)
            write_run(
                settings.output,
                {
                    "model": str(settings.model),
                    "lm_eval": list(tasks),
                    "lm_eval_version": lm_eval.__version__,
                    "layout": described(grid.layout),
                    "ranks": world.size,
                    "threads": torch.get_num_threads(),
                    "device": world.device.type,
                    "batch_tokens": settings.batch_tokens,
                    "seconds": {"all": round(time.monotonic() - started, 3)},
                    "requests": dict(model.statistics),
                },
            )
            write_reports(settings, [settings.output])
        gather_json(None, world)


@contextlib.contextmanager
def _quiet_but(main: bool) -> Iterator[None]:
    """lm-eval shows its progress on each rank that says it is the first, as all of ours do."""
    if main:
        yield
    else:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield


def _manager(include_path: Path | None) -> Any:
    """lm-eval's list of tasks."""
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include_path={include_path}: no such folder")
    try:
        from lm_eval.tasks import TaskManager

        import llm.evaluate.lm_eval  # noqa: F401  (whether it can be imported)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != "lm_eval":
            raise
        raise UserError("--lm_eval needs lm-eval, which is not installed: pip install .[eval]") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _where(include_path: Path | None) -> str:
    return f", and neither has {include_path}" if include_path else "; --include_path=DIR adds a folder of tasks"


def _built(manager: Any, name: str, include_path: Path | None) -> list[Any]:
    """The group or the tasks that a name means, their data read. UserError naming it where that cannot be."""
    if not manager.match_tasks([name]):
        raise UserError(f"--lm_eval={name}: lm-eval has no task, group or tag of that name{_where(include_path)}")
    try:
        found = manager.load([name])
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AssertionError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--lm_eval={name}: lm-eval cannot open it ({said[0]})") from None
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


def _model(settings: Settings, grid: Grid, tasks: Mapping[str, Any]) -> "LatticeLM":
    from llm.evaluate.lm_eval import LatticeLM

    shots = settings.options.num_fewshot
    identity = {
        f"the task {name} of lm-eval": f"version {task.VERSION} with num_fewshot={shots}"
        for name, task in tasks.items()
    }
    return LatticeLM(
        settings.model,
        dtype=settings.dtype,
        batch_tokens=settings.batch_tokens,
        average=settings.average,
        chat_template=settings.chat_template or "auto",
        output=settings.output,
        grid=grid,
        identity=identity,
    )


def _write(settings: Settings, model: "LatticeLM", digest: str, found: Any, loaded: Mapping[str, Any]) -> None:
    """results.json and samples/, of what lm-eval has found."""
    results = {}
    for name, scores in {**found["results"], **found.get("groups", {})}.items():
        results[name] = _scores(scores) | {
            "n": found.get("n-samples", {}).get(name, {}).get("effective"),
            "version": found["versions"].get(name),
            "num_fewshot": found["n-shot"].get(name),
        }
        if settings.options.limit is not None:
            results[name]["partial"] = True
    for name, samples in found["samples"].items():
        write_samples(settings.output, name, _samples(samples, model.tokens, name, loaded["tasks"][name]))
    said = {
        "digest": digest,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": model.tokenizer.fingerprint,
        "parameters": model.n_parameters,
        "context": context_length(args_of(settings.model, None)),
        **{f"requests_{key}": number for key, number in sorted(model.counts.items()) if number},
    }
    if settings.chat_template is not None:
        said["chat_template"] = model.template().fingerprint
    write_results(settings.output, said, results)


def _scores(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """lm-eval's scores: `acc,none` and `acc_stderr,none` as acc and acc_stderr, those of a filter with its name."""
    found: dict[str, float | None] = {}
    for key, value in scores.items():
        metric, comma, filtered = key.partition(",")
        if comma:
            number = float(value) if isinstance(value, int | float) else None
            stderr = metric.endswith("_stderr")
            base = metric.removesuffix("_stderr") + ("" if filtered == "none" else f"_{filtered}")
            found[base + "_stderr" * stderr] = number
    return found


def _samples(
    samples: Sequence[Mapping[str, Any]], tokens: Mapping[tuple[str, int, int], int], name: str, task: Any
) -> list[dict[str, Any]]:
    """A line a document, in the order of documents; the metrics of all filters together."""
    lines: dict[int, dict[str, Any]] = {}
    together = task.aggregation()
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        number = sample["doc_id"]
        asked = sample["arguments"]
        line = lines.setdefault(
            number,
            {
                "doc": sample["doc"],
                "prompt": asked[0][0],
                "gold": sample["target"],
                "responses": [
                    _response(arguments, answers[0], tokens.get((name, number, i)))
                    for i, (arguments, answers) in enumerate(zip(asked, sample["resps"], strict=True))
                ],
                "metrics": {},
            },
        )
        for metric in sample["metrics"]:
            key = metric if sample["filter"] == "none" else f"{metric}_{sample['filter']}"
            line["metrics"][key] = _of_one(sample[metric], together.get(metric))
    return list(lines.values())


def _response(arguments: Sequence[Any], answer: Any, tokens: int | None) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"text": answer, "logprob": None, "greedy": None, "tokens": tokens}
    if isinstance(answer, float):
        return {"text": arguments[0], "logprob": answer, "greedy": None, "tokens": tokens}
    return {"text": arguments[1], "logprob": answer[0], "greedy": answer[1], "tokens": tokens}


def _of_one(value: Any, together: Any) -> float | None:
    """A document's own score of what it adds to that of all; None where it has none alone."""
    if getattr(together, "__name__", "") not in OF_ONE:
        return None
    try:
        number = float(together([value]))
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
