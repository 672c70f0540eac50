"""A run's folder as it begins and ends: what describes the run there, its log, and its report."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from llm.atomic import write_unless_same
from llm.checkpoint.run_folder import save_template, save_tokenizer
from llm.errors import UserError
from llm.report.folder import ANEW
from llm.report.write import NAME, write_report
from llm.train.csv_table import CsvTable
from llm.train.curves import CurveSink, TensorBoard, WeightsAndBiases
from llm.train.evaluation import opening_lines
from llm.train.log import RunLog
from llm.train.progress import Progress
from llm.train.reporting import reason_of
from llm.train.run import Run
from llm.train.starts import start_record


def open_log(run: Run, progress: Progress, notes: Sequence[str]) -> RunLog:
    """The run folder and its log, of a run that stands there, with the opening lines (rank 0)."""
    config, folder, step = run.config, run.folder, progress.step
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    descriptions: tuple[Callable[[], str | None], ...] = (
        lambda: write_unless_same(folder / "config.yaml", text.encode()),
        lambda: save_tokenizer(run.tokenizer, folder),
        lambda: None if run.template is None else save_template(run.template.source, folder),
    )
    lines = [*begun_before(folder, step), *notes, *(_describe(run, step, write) for write in descriptions)]
    curves: list[CurveSink] = []
    if config.log.tensorboard:
        curves.append(TensorBoard(folder, step + 1, text))
    if config.log.csv:
        curves.append(CsvTable(folder, step + 1))
    if config.log.wandb:
        curves.append(WeightsAndBiases(folder, config.model_dump(mode="json"), resumed=step > 0))
    log = RunLog(
        folder,
        first_step=step + 1,
        steps=run.steps,
        interval=config.log.interval,
        curves=curves,
        measures=run.engine.objectives.measured,
    )
    log.begin(json.dumps(start_record(run, step, progress.consumed_rows)))
    for line in filter(None, lines):
        log.say(line)
    log.say(
        f"{run.engine.state.n_parameters:,} parameters, {run.world.size} process(es) on {run.world.device.type}: "
        f"{run.grid.layout}, {config.train.precision} ({run.precision_reason}); one epoch is "
        f"{run.mixture.n_rows:,} rows of {config.train.seq_len} tokens; run folder {folder}"
    )
    if run.held_out is not None:
        log.say(f"a validation reads {run.held_out.described()} ({run.rows_reason})")
    for line in opening_lines(run.config, run.tasks):
        log.say(line)
    return log


def begun_before(folder: Path, step: int) -> list[str]:
    """A line where a run stands at its beginning though it has made steps, which are made again."""
    metrics = folder / "metrics.jsonl"
    anew = not step and metrics.is_file() and metrics.stat().st_size > 0
    return [f"{ANEW}this run was ended before its first checkpoint"] if anew else []


def close_log(run: Run, log: RunLog) -> None:
    """End the log of a run that is over, and write its report (rank 0). What keeps the report from being written is
    said in one line, and changes nothing else.
    """
    if run.config.log.report:
        path = run.folder / NAME
        try:
            write_report([run.folder], path)
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else reason_of(error)
            log.say(f"no report: {path}: {why}")
        else:
            log.say(f"report: {path}")
    log.close()


def _describe(run: Run, step: int, write: Callable[[], str | None]) -> str | None:
    """Write a description of the run into its folder. OSError where a new run has none; one that goes on says so."""
    try:
        return write()
    except OSError as error:
        if not step:
            raise
        return f"{error.filename or run.folder} cannot be written ({error.strerror}); the run goes on without"
