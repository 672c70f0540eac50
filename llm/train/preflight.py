"""All that a run refuses and that can be known before its ranks meet: one list of checks, for the run's own start and
for `--dry_run`, so that the two cannot differ.

Nothing is written and no process group exists. Files are looked at where they stand, so the checks belong on the
machine, or the file system, that the run will use; `--dry_run=config` leaves them out.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from llm.checkpoint.lock import refuse_if_held
from llm.checkpoint.store import CheckpointStore
from llm.compile import check_compiler
from llm.data.opening import check_rows, look_at_rows
from llm.data.sources import Side, sides
from llm.kernels.fused_ssd import check_device, find_kernel
from llm.parallel.launch.world import World
from llm.parallel.precision import check_precision
from llm.paths import refuse_unwritable
from llm.tasks.rows import asked_of
from llm.tokenizer import Tokenizer
from llm.tokenizers.chat import ChatTemplate
from llm.train.best import VALID_LOSS
from llm.train.chat import run_tokenizer
from llm.train.config import RunConfig
from llm.train.prompts import encode_prompts
from llm.train.resume.choose import checkpoint_to_continue, refuse_another_run
from llm.train.settle import (
    objectives_in,
    options_in,
    rows_wanted,
    settle_outputs,
    settle_precision,
    settle_warmup,
    task_in,
    with_vocabulary,
)

ALONE = World(0, 1, 0, torch.device("cpu"))


@dataclass(frozen=True)
class UnstartedRun:
    """A run that has not begun."""

    config: RunConfig
    run_dir: Path

    @cached_property
    def _tokenizer(self) -> tuple[Tokenizer, ChatTemplate | None]:
        return run_tokenizer(self.config)

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer; UserError where its file is missing or no such file."""
        return self._tokenizer[0]

    @property
    def template(self) -> ChatTemplate | None:
        """Of a run on conversations."""
        return self._tokenizer[1]

    @cached_property
    def settled(self) -> RunConfig:
        """The config with the tokenizer's vocabulary, and what the checkpoint that it continues has settled."""
        config = with_vocabulary(self.config, self.tokenizer)
        if checkpoint_to_continue(config, self.checkpoints) is None:
            return config
        store = CheckpointStore(self.checkpoints, ALONE, keep=1, keep_best=False)
        config, _ = settle_precision(config, store, ALONE)
        return settle_outputs(settle_warmup(config, store, ALONE), store, ALONE)

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.run_dir / "checkpoints"

    @cached_property
    def sides(self) -> dict[str, Side]:
        """What to train on, and what is held out if there is any."""
        return sides(self.config.data.train, self.config.data.valid)


def _run_folder(run: UnstartedRun) -> None:
    refuse_if_held(run.run_dir)
    refuse_unwritable(run.run_dir, "the run folder")


def _data_is_there(run: UnstartedRun) -> None:
    for side in run.sides.values():
        check_rows(side, run.config.data.cache_dir)


def _objectives(run: UnstartedRun) -> None:
    objectives_in(run.config)


def _tokenizer(run: UnstartedRun) -> None:
    encode_prompts(run.config, run.tokenizer, ALONE, run.template)
    with_vocabulary(run.config, run.tokenizer)


def _task(run: UnstartedRun) -> None:
    task_in(run.config).check(run.tokenizer, options_in(run.config))


def _frozen(run: UnstartedRun) -> None:
    from llm.train.freezing import parameter_table  # it takes long to import

    parameter_table(run.settled)


def _checkpoint(run: UnstartedRun) -> None:
    refuse_another_run(run.settled, run.checkpoints, run.tokenizer)


def _weights(run: UnstartedRun) -> None:
    """Of a run that begins with others' weights."""
    source = run.config.model.init_from
    if source is not None and checkpoint_to_continue(run.settled, run.checkpoints) is None:
        from llm.pretrained import args_of  # these take long to import
        from llm.train.freezing import parameter_table
        from llm.train.init_from import shapes_taken

        model, there = run.settled.model.merged, args_of(source)
        if run.config.chat.add_tokens and model.vocab_size > there.vocab_size:
            there = there.model_copy(update={"vocab_size": model.vocab_size})
        shapes_taken(Path(source), there, model, parameter_table(run.settled))


def _data_is_readable(run: UnstartedRun) -> None:
    """The first text or row of every source, and the folder for what is made of them."""
    for role, side in run.sides.items():
        look_at_rows(side, asked_of(rows_wanted(run.config), run.tokenizer, role, side))


def _tasks(run: UnstartedRun) -> None:
    if run.config.eval.tasks or run.config.eval.best != VALID_LOSS:
        from llm.train.evaluation import check_best_of_validation, open_run_tasks  # imports what computes answers

        check_best_of_validation(run.settled, task_in(run.config))
        open_run_tasks(run.settled, run.tokenizer, run.template, names_known=False)


def _machine(run: UnstartedRun) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if run.config.train.compile:
        check_compiler(device)
    if run.config.model.ssm is not None and run.config.model.ssm.kernel == "mamba_ssm":
        check_device(device)
        find_kernel()
    if run.config.train.precision in ("bf16", "fp16"):
        logging.disable(logging.WARNING)  # DeepSpeed announces the accelerator that it found
        try:
            check_precision(run.config.train.precision)
        finally:
            logging.disable(logging.NOTSET)


CHECKS: tuple[Callable[[UnstartedRun], None], ...] = (
    _objectives,
    _run_folder,
    _data_is_there,
    _tokenizer,
    _task,
    _frozen,
    _checkpoint,
    _weights,
    _data_is_readable,
    _tasks,
    _machine,
)
"""In the order in which a run meets them; what costs least first. (The config itself and its layout come before.)"""


def preflight(config: RunConfig, run_dir: Path) -> None:
    """UserError with the line of the first check that fails. `config` must have passed check_layout."""
    run = UnstartedRun(config, run_dir)
    for check in CHECKS:
        check(run)
