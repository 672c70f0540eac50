"""Rebuild one step of a run and score its documents, before the step's own update."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.atomic import write_file
from llm.batch import Batch, Counts
from llm.checkpoint.reader import list_steps, resolve
from llm.data.batch import StepBatch
from llm.data.loader import TrainLoader
from llm.data.ranges import Range
from llm.errors import DamagedFile
from llm.objectives import TokenObjective
from llm.parallel.collectives import agreed_error, all_or_none, gather_json, main_decides, sum_over_ranks
from llm.parallel.engine.step import StepResult
from llm.train.guard import Guard, rows_and_size
from llm.train.metrics import named_losses
from llm.train.replay.records import check_replay, compare, recorded_to, strict
from llm.train.replay.report import WORST, report_lines, rows_of
from llm.train.replay.spans import Span, by_loss, score_spans, span_gradient_norm, together

if TYPE_CHECKING:
    from llm.train.trainer import Trainer


def replay(trainer: "Trainer", step: int) -> dict[str, Any]:
    """Rebuild step `step`, print what it was made of, write `replay/step_XXXXXXXX.json` (collective).

    Returns the content of that file, the same on every rank; in the file, numbers that are not finite are null.
    UserError on every rank when the step cannot be rebuilt.
    """
    world, config = trainer.run.world, trainer.run.config
    main_decides(lambda: check_replay(trainer.run.folder, step, trainer.run.steps), world)
    recorded = main_decides(lambda: recorded_to(trainer.run.folder, step), world)
    trainer.progress.guard = _lenient(trainer.progress.guard)
    started_from, skipped = _load_before(trainer, step, first_recorded=recorded[0]["step"])
    trainer.progress.guard.passed_over += _passed_over(recorded, trainer.progress.step, trainer.progress.consumed_rows)
    start = trainer.progress.step
    by_step = {row["step"]: row for row in recorded}
    _say(trainer, f"replay of step {step} of {trainer.run.folder}, from {started_from or 'the initial weights'}")
    for line in skipped:
        _say(trainer, f"passed over a damaged checkpoint: {line}")
    first_difference: int | None = None
    with trainer.loader() as loader:
        while True:
            batch, counts = _next_batch(trainer, loader)
            last = trainer.progress.step == step - 1
            spans = _spans(trainer, batch, counts) if last else []
            result, row = _advance(trainer, batch, counts, last=last)
            known = by_step.get(trainer.progress.step)
            if first_difference is None and known is not None and not all(compare(row, known)["equal"].values()):
                first_difference = trainer.progress.step
            if last:
                break
            if trainer.progress.step % config.log.interval == 0:
                _say(trainer, f"step {trainer.progress.step} computed again, loss {row['loss']:.4f}")
    report = {
        "step": step,
        "run_dir": str(trainer.run.folder),
        "started_from": started_from,
        "skipped_checkpoints": skipped,
        "first_step": start + 1,
        "recomputed_steps": step - 1 - start,
        "ranks": world.size,
        "replayed": row,
        "skipped": result.skipped,
        "culprits": result.culprits,
        "recorded": by_step.get(step),
        "comparison": compare(row, by_step[step]) if step in by_step else None,
        "first_difference": first_difference,
        "documents_loss": _documents_loss(trainer, spans, counts),
        "gradient_note": _no_gradients(trainer),
        "rows": rows_of(spans),
    }
    file = trainer.run.folder / "replay" / f"step_{step:08d}.json"
    main_decides(lambda: write_file(file, (json.dumps(strict(report), indent=1) + "\n").encode()), world)
    if world.is_main:
        print("\n".join([*report_lines(report, spans), f"written to {file}"]), flush=True)
    return report


def _load_before(trainer: "Trainer", step: int, first_recorded: int) -> tuple[str | None, list[str]]:
    """Put the state after the latest possible step before `step` in place: (checkpoint, damaged ones passed over).

    None: the initial weights, which the trainer begins with.
    """
    store, resume = trainer.run.store, trainer.run.config.checkpoint.resume
    started_from: str | None = None
    skipped: list[str] = []
    paths = main_decides(lambda: [str(path) for at, path in list_steps(store.folder) if at < step], trainer.run.world)
    if first_recorded > 1 and resume not in ("auto", "never"):  # where the run began
        paths.append(main_decides(lambda: str(resolve(resume).path.resolve()), trainer.run.world))
    untouched = trainer.run.engine.state.scalars()
    for path in paths:
        try:
            store.load_exactly(Path(path), trainer.restorer.read)
        except DamagedFile as error:
            skipped.append(str(error))
            continue
        started_from = path
        break
    if skipped and started_from is None:  # a damaged checkpoint's reading has begun with the optimizer
        trainer.run.engine.prepare_load({name: {"master"} for name in trainer.run.engine.state.shapes}, untouched)
    if not first_recorded - 1 <= trainer.progress.step < step:
        raise agreed_error(
            f"--replay_step={step}: the run begins with step {first_recorded}, but the state to start from is that of "
            f"step {trainer.progress.step}; name the checkpoint that it began from by --checkpoint.resume=PATH"
        )
    return started_from, skipped


def _next_batch(trainer: "Trainer", loader: TrainLoader) -> tuple[StepBatch, Counts]:
    """This rank's batch and the counts of the whole step (collective)."""
    batch = all_or_none(loader.next, trainer.run.world)
    mine = [count * trainer.run.grid.reports_loss for count in batch.counts.values()]
    return batch, batch.counts.with_values(sum_over_ranks(mine, trainer.run.world))


def _advance(
    trainer: "Trainer", batch: StepBatch, counts: Counts, *, last: bool
) -> tuple[StepResult, dict[str, Any]]:
    """One step as the run made it, the last one in any case; what it must have in common with its row of metrics.jsonl,
    of which the rest is time and memory.
    """
    result, lr = trainer.take_step(batch, counts, always=last)
    trainer.progress.guard.judge(trainer.progress.step, result, *rows_and_size(batch))
    return result, {
        "loss": result.loss,
        **named_losses(result),
        "grad_norm": result.grad_norm,
        "routing_checksum": result.routing_checksum,
        "lr": lr,
        "tokens": trainer.progress.tokens,
        "targets": counts.targets,
    }


def _lenient(guard: Guard) -> Guard:
    """A guard under which a replay meets the updates that the run made, and neither stops nor goes back."""
    spike = "skip" if guard.config.spike == "rewind" else guard.config.spike
    always = {"nonfinite": "skip", "spike": spike, "max_events": 2**62}
    return Guard(guard.config.model_copy(update=always))


def _passed_over(recorded: Sequence[dict[str, Any]], step: int, first_row: int) -> list[Range]:
    """The rows that the steps behind `step`, which begin with `first_row`, were recorded to have passed over."""
    ranges: list[Range] = []
    for row in recorded:
        if row["step"] > step:
            rows = (first_row, first_row + row["batch_size"])
            whole = [rows] if row.get("skipped") == "passed over" else []  # a record from before rows were kept
            ranges += [(first, end) for first, end in row.get("rows_passed_over", whole)]
            first_row = rows[1]
    return ranges


def _spans(trainer: "Trainer", batch: StepBatch, counts: Counts) -> list[Span]:
    """All spans of the step on every rank, the highest mean loss first, with the gradients of the worst."""
    world = trainer.run.world
    # all forwards first: they may need the other ranks, and what a rank cannot read must not keep it out of one
    of_sources = _objectives(trainer)
    objectives = list(dict.fromkeys(of_sources.values()))
    targets = [together([o.targets(micro_batch) for o in objectives]) for micro_batch in batch.micro_batches]
    of_each = [trainer.run.engine.replica.token_losses(objective, batch.micro_batches) for objective in objectives]
    nll = [sum(parts[1:], parts[0]) for parts in zip(*of_each, strict=True)]  # none where another rank has the output
    score = partial(score_spans, trainer.run.mixture, trainer.run.tokenizer)
    micro_batches = list(zip(nll, batch.micro_batches, targets, strict=False))
    scored = all_or_none(lambda: [score(*micro_batch) for micro_batch in micro_batches], world)
    mine = [
        (micro_batch, *found)
        for micro_batch, part in zip(batch.micro_batches, scored, strict=False)
        for found in part
    ]
    gathered = gather_json([asdict(span) for *_, span in mine] if trainer.run.grid.reports_loss else [], world)
    everything = [(rank, i, Span(**fields)) for rank, part in enumerate(gathered) for i, fields in enumerate(part)]
    everything.sort(key=lambda item: by_loss(item[2]))
    if _no_gradients(trainer) is None:
        worst = [(rank, i) for rank, i, span in everything[:WORST] if span.weight]
        norms = {
            i: _gradient_norm(trainer, of_sources[span.source], counts, micro_batch, start, stop)
            for rank, i in worst
            if rank == world.rank
            for micro_batch, start, stop, span in (mine[i],)
        }
        for rank, found in enumerate(gather_json([[i, norm] for i, norm in norms.items()], world)):
            for i, norm in found:
                place = next(k for k, item in enumerate(everything) if item[:2] == (rank, i))
                everything[place] = (rank, i, replace(everything[place][2], grad_norm=norm))
    return [span for _, _, span in everything]


def _gradient_norm(
    trainer: "Trainer", objective: TokenObjective, counts: Counts, batch: Batch, start: int, stop: int
) -> float:
    weight = _divisor(objective, counts)
    return span_gradient_norm(trainer.run.engine.model, objective, batch, start, stop, weight, trainer.run.world.device)


def _documents_loss(trainer: "Trainer", spans: Sequence[Span], counts: Counts) -> float:
    """The losses of the step's tokens by its documents."""
    of_sources = _objectives(trainer)
    sums: dict[TokenObjective, list[float]] = {objective: [] for objective in of_sources.values()}
    for span in spans:
        if span.source in of_sources:
            sums[of_sources[span.source]].append(span.loss_sum)
    return sum(math.fsum(parts) / _divisor(objective, counts) for objective, parts in sums.items())


def _divisor(objective: TokenObjective, counts: Counts) -> float:
    """What a sum of an objective's losses is divided by to be part of the step's loss."""
    return (counts.objectives[objective.name] or 1) / objective.weight


def _objectives(trainer: "Trainer") -> dict[str, TokenObjective]:
    """The main objective that reads the tokens of a source, by the source's name; none where it reads something else.
    """
    run, found = trainer.run, dict[str, TokenObjective]()
    for part, main in zip(run.task.parts, run.engine.objectives.mains, strict=True):
        if isinstance(main, TokenObjective):
            found |= {name: main for name in run.mixture.names if part.reads(name)}
    if not found:
        name = run.engine.objectives.main.name
        raise agreed_error(f"--replay_step looks at the losses of tokens; those of {name} are of something else")
    return found


def _no_gradients(trainer: "Trainer") -> str | None:
    """Why the documents' own gradients are left out; None when they are computed."""
    parallel = trainer.run.config.parallel
    split = [name for name in ("tensor", "pipeline", "expert", "context") if getattr(parallel, name) > 1]
    if parallel.zero_stage == 3:
        return "no gradients of single documents: parallel.zero_stage=3 has no rank that holds all parameters"
    if split:
        return f"no gradients of single documents: parallel.{split[0]}>1 has no rank that holds all parameters"
    return None


def _say(trainer: "Trainer", line: str) -> None:
    if trainer.run.world.is_main:
        print(line, flush=True)
