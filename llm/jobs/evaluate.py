"""The job of launch/evaluate.py: tasks on a model, on any layout."""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llm.checkpoint.lock import refuse_if_held
from llm.cli import bind, convert, describe, split, with_values
from llm.errors import UserError
from llm.evaluate.evaluation import Model, Settings, checkpoints_of, evaluate, questions
from llm.evaluate.footprint import report
from llm.evaluate.harness import check_harness, evaluate_harness
from llm.evaluate.tasks import TaskOptions, open_tasks
from llm.extensions import load as load_extensions
from llm.generation.device import Dtype
from llm.generation.text import context_length
from llm.jobs.runner import number_of_ranks
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.parallel.layout import Layout
from llm.parallel.validate import Choice, Needs, check
from llm.paths import PathText, refuse_unwritable
from llm.pretrained import args_of
from llm.signals import leave_when_asked

LAYOUT_FLAGS = {
    "parallel.tensor": "ranks that share each layer's weights",
    "parallel.pipeline": "ranks that have the layers one after the other",
    "parallel.expert": "ranks that share the experts of mixture-of-experts layers",
}
TIMEOUT_S = 3600.0
"""After which a rank gives up waiting for another, which may have longer generations; one that died is seen at once."""


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-eval, in place of our own."""

    tasks: tuple[str, ...]
    include_path: Path | None


@dataclass(frozen=True)
class Flags:
    """The command line, taken apart."""

    settings: Settings
    harness: Harness | None
    threads: int
    nproc: int | None
    dry_run: bool


def read_flags(
    model: PathText,
    output: PathText,
    tasks: tuple[str, ...] = (),
    lm_eval: tuple[str, ...] = (),
    include_path: PathText | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_tokens: int = 16384,
    dtype: Dtype = "auto",
    average: bool = False,
    apply_chat_template: bool = False,
    chat_template: PathText = "auto",
    data_dir: tuple[str, ...] = (),
    image_root: PathText | None = None,
    every_checkpoint: bool = False,
    threads: int | None = None,
    nproc: int | None = None,
    dry_run: bool = False,
) -> Flags:
    """Evaluate a model on tasks: `torchrun launch/evaluate.py --model PATH --tasks A,B --output DIR`, or plain python.

    model: run folder, checkpoint, model folder, or a Hugging Face or Meta folder
    tasks: paths of YAML files, or names of those in configs/evaluate, separated by commas
    lm_eval: tasks of lm-eval instead, by its names, on the same runner; it comes with `pip install .[eval]`
    include_path: folder of more YAML files of lm-eval's
    output: folder for results.json and samples/TASK.jsonl; the same command goes on where a killed one stopped
    limit: only the first documents of each task; the results say so
    num_fewshot: examples before each document, in place of the task's own number; refused where a kind has none
    batch_tokens: tokens computed at once; it decides the speed and not the results
    dtype: auto = what the run was trained in, or the folder's weights are in, where the device is fast at it: a GPU
        with such units, a CPU with AMX; else fp32
    average: use the moving average of the weights, of a run with optim.ema_decay
    apply_chat_template: prompts are what a user says to the model, examples earlier turns
    chat_template: with it: auto = the one that came with the model, or llama3, llama4, chatml, gemma, mistral, or the
        path of a .jinja file
    data_dir: folders, separated by commas, of the data of tasks that lies neither beside their files nor in the
        working directory
    image_root: folder in which the images of tasks lie; default: that of the task's data
    every_checkpoint: each checkpoint of a run for itself, in OUTPUT/step_N, and one table and picture of all
    threads: of a CPU, for each rank; default: OMP_NUM_THREADS, else 1, as other numbers give other last bits
    nproc: start this many processes on this machine (instead of calling torchrun yourself)
    dry_run: check all that can be checked, print tasks, layout, memory and bytes, stop
    """
    for name, value in (("limit", limit), ("batch_tokens", batch_tokens), ("threads", threads), ("nproc", nproc)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"--num_fewshot={num_fewshot} must be at least 0")
    if not tasks and not lm_eval:
        raise UserError("--tasks names no task; give paths or names, separated by commas")
    _check_harness(tasks, lm_eval, include_path, {"every_checkpoint": every_checkpoint, "dry_run": dry_run})
    if chat_template != "auto" and not apply_chat_template:
        raise UserError("--chat_template goes with --apply_chat_template")
    named = [("image_root", image_root), ("include_path", include_path)]
    for name, folder in (*(("data_dir", folder) for folder in data_dir), *named):
        if folder is not None and not Path(folder).expanduser().is_dir():
            raise UserError(f"--{name}={folder}: no such folder")
    options = TaskOptions(
        num_fewshot=num_fewshot,
        limit=limit,
        image_root=None if image_root is None else Path(image_root),
        data_dirs=tuple(Path(folder).expanduser() for folder in data_dir),
    )
    settings = Settings(
        model=Path(model),
        tasks=tasks,
        output=Path(output),
        options=options,
        batch_tokens=batch_tokens,
        dtype=dtype,
        average=average,
        chat_template=chat_template if apply_chat_template else None,
        every_checkpoint=every_checkpoint,
    )
    harness = Harness(lm_eval, None if include_path is None else Path(include_path)) if lm_eval else None
    return Flags(settings, harness, threads or default_threads(), nproc, dry_run)


def _check_harness(
    tasks: Sequence[str], lm_eval: Sequence[str], include_path: str | None, others: Mapping[str, bool]
) -> None:
    """UserError where flags do not go with tasks of lm-eval, or without."""
    if include_path is not None and not lm_eval:
        raise UserError("--include_path goes with --lm_eval")
    if tasks and lm_eval:
        raise UserError("--tasks and --lm_eval do not go together: one command for each, with an output of its own")
    for name, given in others.items():
        if given and lm_eval:
            raise UserError(f"--{name} goes with --tasks, not with --lm_eval")


def default_threads() -> int:
    """As OMP_NUM_THREADS says, else one."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else 1


@dataclass(frozen=True)
class Evaluate:
    """An evaluation whose layout has been checked."""

    words: list[str]
    flags: Flags
    layout: Layout

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self:
        """The evaluation that these words ask for. UserError naming the flag."""
        values, flags = split(with_values(list(words), read_flags))
        tensor, pipeline, expert = (_size(name, flags.pop(name, "1")) for name in LAYOUT_FLAGS)
        for name in flags:
            near = difflib.get_close_matches(name, LAYOUT_FLAGS, n=1, cutoff=0.7)
            if name.startswith("parallel.") and near:
                raise UserError(f"unknown flag --{name}; did you mean --{near[0]}?")
        load_extensions(convert("--extensions", flags.pop("extensions", None) or "", list[str]))
        found: Flags = read_flags(**bind(read_flags, values, flags))
        layout = Layout(number_of_ranks(found.nproc), tensor, expert, pipeline, sequence_parallel=False)
        check_layout(found.settings.model, layout)
        return cls(list(words), found, layout)

    @classmethod
    def help(cls) -> str:
        layout = [f"  --{name}: int (default 1) {text}" for name, text in LAYOUT_FLAGS.items()]
        return "\n".join([describe(read_flags), *layout])

    @property
    def nproc(self) -> int | None:
        return self.flags.nproc

    @property
    def dry_run(self) -> bool:
        return self.flags.dry_run

    @property
    def timeout_s(self) -> float:
        return TIMEOUT_S

    @property
    def threads(self) -> int:
        return self.flags.threads

    def report(self) -> str:
        settings = self.flags.settings
        refuse_unwritable(settings.output, f"--output={settings.output}")
        return report(settings, self.layout, questions(settings, quiet=False))

    def check(self, rank: int) -> None:
        if rank == 0:
            settings = self.flags.settings
            refuse_unwritable(settings.output, f"--output={settings.output}")
            refuse_if_held(settings.output)
            Model(settings, quiet=True)
            if self.flags.harness is not None:
                check_harness(self.flags.harness.tasks, self.flags.harness.include_path)
            open_tasks(settings.tasks, settings.options)
            if settings.every_checkpoint:
                checkpoints_of(settings.model)

    def words_of_a_rank(self) -> list[str]:
        nproc = str(self.flags.nproc)
        joined = [word for word in self.words if word != f"--nproc={nproc}"]
        for i in range(len(joined) - 1):
            if joined[i] == "--nproc" and joined[i + 1] == nproc:
                return joined[:i] + joined[i + 2 :]
        return joined

    def work(self, world: World) -> None:
        leave_when_asked("; the same command goes on with what has no answer yet")
        harness, grid = self.flags.harness, make_grid(world, self.layout)
        if harness is None:
            evaluate(self.flags.settings, grid)
        else:
            evaluate_harness(self.flags.settings, grid, harness.tasks, harness.include_path)


def check_layout(model: Path, layout: Layout) -> None:
    """UserError where the model cannot be cut so, with the nearest layout that works."""
    args = args_of(model, None)
    needs = Needs(args, "fp32", False, context_length(args), batches=(("the number of ranks", layout.world),))
    check(needs, Choice(layout, 1))


def _size(name: str, text: str | None) -> int:
    size: Any = convert(f"--{name}", text or "", int)
    if size < 1:
        raise UserError(f"--{name}={text} must be at least 1")
    return int(size)
