"""A file of prompts in, a file of completions out: in order, in batches, and from where a killed run stopped.

Beside the output lies OUTPUT.run.json, which says what the output is made of: the same command goes on with it, another
model, other prompts or other settings are refused. Every line that ends is final; a torn last one is made again.
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from tqdm import tqdm

from llm.atomic import sync, write_file
from llm.errors import UserError
from llm.generation.beams import Beams
from llm.generation.chat import Chat
from llm.generation.prompts import PromptRow, read_prompts, refuse
from llm.generation.sampling import Sampling
from llm.generation.text import NO_BEAMS, Completion, Continuer, Prompt

BATCHES_AT_ONCE = 4
"""Of which the rows are sorted by length, and written in their order once all are done."""
MOST_ROWS = 256
"""Of a batch: beyond it a step takes as much longer as it has more rows."""


@dataclass(frozen=True)
class BatchSettings:
    """What decides the completions beside model and prompts."""

    sampling: Sampling
    max_new_tokens: int
    num_samples: int
    stop: bool
    batch_tokens: int
    """tokens of a batch, prompts, padding and continuations; these decide how fast it goes, not what is written"""
    beams: Beams = NO_BEAMS

    def most_prompts(self, longest: int) -> int:
        """Of a batch whose longest prompt has so many tokens; each runs num_beams continuations."""
        rows = min(MOST_ROWS, self.batch_tokens // (longest + self.max_new_tokens))
        return max(1, rows // self.beams.num_beams)


@dataclass(frozen=True)
class Task:
    """A line of the output to make."""

    row: PromptRow
    sample: int
    prompt: Prompt


def complete_file(
    continuer: Continuer,
    prompts: Path,
    output: Path,
    settings: BatchSettings,
    chat: Chat | None = None,
    image_root: Path | None = None,
) -> None:
    """Write the completion of each prompt of a file, or the answer to each conversation. image_root: where the paths of
    images begin; None = the folder of the file. UserError, before any work, names what is wrong with the files."""
    rows, content = read_prompts(prompts, chat is not None)
    tasks = _tasks(continuer, prompts, rows, settings, chat, prompts.parent if image_root is None else image_root)
    made_of = _made_of(continuer, content, settings) | ({} if chat is None else chat.made_of()) | _images_of(tasks)
    with _own_file(output, made_of) as file:
        done = _check_done(output, file, tasks, settings.num_samples)
        _report(f"{output}: {done} of {len(tasks)} completions are there already" if done else "")
        cut = 0
        with tqdm(total=len(tasks), initial=done, unit="text", disable=not sys.stderr.isatty(), leave=True) as bar:
            for part in _parts(tasks[done:], settings):
                found = {}
                for batch in part:
                    made = continuer.complete(
                        [task.prompt for task in batch],
                        settings.sampling,
                        settings.max_new_tokens,
                        settings.stop,
                        beams=settings.beams,
                    )
                    found.update({id(task): completion for task, completion in zip(batch, made, strict=True)})
                    bar.update(len(batch))
                ordered = sorted((task for batch in part for task in batch), key=lambda t: (t.row.number, t.sample))
                cut += sum(found[id(task)].finish_reason == "context" for task in ordered)
                _append(output, file, [_line(task, found[id(task)], settings.num_samples) for task in ordered])
    _report(f"{output}: {len(tasks)} completions of {len(rows)} prompts")
    if cut:
        _report(f"{cut} of them ended where the context of {continuer.context} tokens does (finish_reason: context)")


def _report(line: str) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)


def _tasks(
    continuer: Continuer,
    path: Path,
    rows: Sequence[PromptRow],
    settings: BatchSettings,
    chat: Chat | None,
    image_root: Path,
) -> list[Task]:
    """Every line to write, in order; rows whose prompt cannot be taken are refused together."""
    tasks, faults = [], []
    for place, row in enumerate(rows):
        name = f"the prompt in {path} row {row.number}"
        try:
            if chat is None:
                pictures = continuer.pictures.under(image_root, row.images)
                prompt = continuer.prompt(row.text, name, str(place), pictures)
            else:
                said = chat.row(row)
                pictures = continuer.pictures.under(image_root, said.images)
                ids = chat.ids(said.messages, said.tools)
                ids = continuer.pictures.filled(ids, pictures, continuer.tokenizer)
                prompt = continuer.prompt_of(ids, name, str(place), pictures)
        except UserError as error:
            faults.append((row.number, str(error).removeprefix(name).lstrip(": ")))
            continue
        for sample in range(settings.num_samples):
            key = f"{place}.sample{sample}" if sample else str(place)
            tasks.append(Task(row, sample, replace(prompt, key=key)))
    refuse(path, faults)
    return tasks


def _parts(tasks: Sequence[Task], settings: BatchSettings) -> Iterator[list[list[Task]]]:
    """Batches of rows of similar length, several at a time: each time those of a stretch of the tasks."""
    part: list[Task] = []
    held = 0
    for task in tasks:
        size = task.prompt.n_tokens + settings.max_new_tokens
        if part and (held + size > BATCHES_AT_ONCE * settings.batch_tokens or len(part) >= BATCHES_AT_ONCE * MOST_ROWS):
            yield list(_batches(part, settings))
            part, held = [], 0
        part.append(task)
        held += size
    if part:
        yield list(_batches(part, settings))


def _batches(tasks: Sequence[Task], settings: BatchSettings) -> Iterator[list[Task]]:
    batch: list[Task] = []
    for task in sorted(tasks, key=lambda t: t.prompt.n_tokens, reverse=True):  # the longest of a batch comes first
        if batch and len(batch) == settings.most_prompts(batch[0].prompt.n_tokens):
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch


def _line(task: Task, completion: Completion, num_samples: int) -> dict[str, Any]:
    which = {"sample": task.sample} if num_samples > 1 else {}
    return {
        **task.row.columns,
        **which,
        "completion": completion.text,
        "tokens": completion.n_tokens,
        "finish_reason": completion.finish_reason,
    }


def _append(output: Path, file: IO[bytes], lines: Iterable[Mapping[str, Any]]) -> None:
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}); the same command goes on from the last whole line"
        ) from None


def _made_of(continuer: Continuer, content: bytes, settings: BatchSettings) -> dict[str, str]:
    """What decides the output, by the name that a message gives it."""
    sampling, beams = settings.sampling, settings.beams
    return {
        "the model": weights_digest(continuer.model),
        "its tokenizer": continuer.tokenizer.fingerprint,
        "the prompts": hashlib.blake2b(content, digest_size=16).hexdigest(),
        "--dtype": str(next(continuer.model.parameters()).dtype).removeprefix("torch."),
        "--max_new_tokens": str(settings.max_new_tokens),
        "--num_samples": str(settings.num_samples),
        "--stop": str(settings.stop).lower(),
        **{f"--{name}": str(value) for name, value in vars(sampling).items()},
        **({f"--{name}": str(value) for name, value in vars(beams).items()} if beams.num_beams > 1 else {}),
    }


def _images_of(tasks: Sequence[Task]) -> dict[str, str]:
    """What the images of the prompts show, where there are any."""
    digests = [picture.digest for task in tasks for picture in task.prompt.pictures]
    content = hashlib.blake2b("".join(digests).encode(), digest_size=16)
    return {"the images": content.hexdigest()} if digests else {}


def weights_digest(model: nn.Module) -> str:
    """Changes with any bit of the weights, at the speed of reading memory: the sums of their bits as integers, plain
    and weighted by row and column."""
    digest = hashlib.blake2b(digest_size=16)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in model.named_parameters():
        bits = parameter.detach().contiguous().view(integers[parameter.dtype.itemsize])
        digest.update(f"{name} {tuple(bits.shape)}".encode())
        table = bits.reshape(-1, bits.shape[-1] if bits.dim() else 1)
        for rows in table.split(max(1, (1 << 22) // max(1, table.shape[1]))):  # small beside the model as int64
            wide = rows.long()
            for sums in (wide.sum(0), wide.sum(1)):
                weighted = sums * torch.arange(1, len(sums) + 1, device=sums.device)
                digest.update(f" {int(sums.sum())} {int(weighted.sum())}".encode())
    return digest.hexdigest()


@contextmanager
def _own_file(output: Path, made_of: dict[str, str]) -> Iterator[IO[bytes]]:
    """The output, opened to append and locked, whose `.run.json` says that it is made of this."""
    beside = output.with_name(output.name + ".run.json")
    if output.is_dir():
        raise UserError(f"--output={output}: is a folder; give a file to write")
    if str(output) == "-" or (output.exists() and not output.is_file()):  # nothing that a later run could go on with
        raise UserError(f"--output={output}: is no regular file (a device, pipe or stdout); give a file to write")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = open(output, "a+b")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"--output={output}: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output={output}: another process writes it") from None
        except OSError:
            pass  # a file system without locks
        known = _read_beside(beside)
        if known is None and output.stat().st_size:
            raise UserError(
                f"--output={output}: exists, and no {beside.name} beside it says what it is made of; "
                f"give another file, or remove it"
            )
        named = made_of if known is None else {**made_of, **known}
        changed = [name for name in named if known is not None and known.get(name) != made_of.get(name)]
        if changed and output.stat().st_size:
            was = known or {}
            others = "; ".join(
                f"{name} is {made_of.get(name, 'left out')}, was {was.get(name, 'left out')}"
                if name.startswith("--")
                else f"{name} changed"
                for name in changed
            )
            raise UserError(f"--output={output}: holds completions of other settings ({others}); give another file")
        if known is None or changed:
            write_file(beside, (json.dumps(made_of, indent=1) + "\n").encode())
            sync(output.parent)
        yield file


def _read_beside(path: Path) -> dict[str, str] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it and its output to begin anew") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged; remove it and its output to begin anew")
    return found


def _check_done(output: Path, file: IO[bytes], tasks: Sequence[Task], num_samples: int) -> int:
    """How many completions are there; what is torn at the end is cut off. UserError where a line is none of ours."""
    file.seek(0)
    done = whole = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        try:
            found = json.loads(line)
            expected = tasks[done]
            column = expected.row.column
            ours = found[column] == expected.row.columns[column] and isinstance(found["completion"], str)
            ours &= num_samples == 1 or found["sample"] == expected.sample
        except (ValueError, KeyError, TypeError, IndexError):
            ours = False
        if not ours:
            raise UserError(
                f"{output} row {done + 1}: not the completion that belongs there; the file was changed: restore it, "
                f"or give another --output"
            )
        done, whole = done + 1, whole + len(line)
    file.truncate(whole)
    file.seek(0, os.SEEK_END)
    return done
