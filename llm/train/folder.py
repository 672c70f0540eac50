"""A run's folder as it begins: what describes the run there, and its log."""

from collections.abc import Callable, Sequence

import yaml

from llm.atomic import write_unless_same
from llm.checkpoint.run_folder import save_template, save_tokenizer
from llm.train.csv_table import CsvTable
from llm.train.curves import CurveSink, TensorBoard, WeightsAndBiases
from llm.train.evaluation import opening_lines
from llm.train.log import RunLog
from llm.train.run import Run


def open_log(run: Run, step: int, notes: Sequence[str]) -> RunLog:
    """The run folder and its log, after `step` steps, with the opening lines (rank 0)."""
    config, folder = run.config, run.folder
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    descriptions: tuple[Callable[[], str | None], ...] = (
        lambda: write_unless_same(folder / "config.yaml", text.encode()),
        lambda: save_tokenizer(run.tokenizer, folder),
        lambda: None if run.template is None else save_template(run.template.source, folder),
    )
    lines = [*notes, *(_describe(run, step, write) for write in descriptions)]
    curves: list[CurveSink] = []
    if config.log.tensorboard:
        curves.append(TensorBoard(folder, step + 1))
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


def _describe(run: Run, step: int, write: Callable[[], str | None]) -> str | None:
    """Write a description of the run into its folder. OSError where a new run has none; one that goes on says so."""
    try:
        return write()
    except OSError as error:
        if not step:
            raise
        return f"{error.filename or run.folder} cannot be written ({error.strerror}); the run goes on without"
