"""Tensors filled from the files of a checkpoint: every block that holds any of what is asked for is read once,
verified, and put in its place.

Where a block belongs into one run of a tensor it is read straight into it, and is verified there. Several threads do
this: reading, digests and copies leave Python's lock.
"""

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llm.boxes import box_shape
from llm.checkpoint.fragments import DTYPES, FileRecord, Fragment, bytes_of, check_header, opened, read_block
from llm.checkpoint.intersect import Part, common, rectangles, view
from llm.environment import ranks_here

MOST_THREADS = 8
BYTES_OF_A_THREAD = 4 << 20
"""A thread is not worth its start for less."""


class Wanted(NamedTuple):
    """Elements `asked` of a parameter, to be put into `out`, which is flat; `fragments` are those of the parameter."""

    fragments: Sequence[Fragment]
    asked: Part
    out: Tensor


class _Run(NamedTuple):
    """`n` elements that lie together in a block and in what is asked for."""

    of_block: int
    of_out: int
    n: int


class _Cell(NamedTuple):
    """A rectangle of the parameter; the block holds `part` from element `of_block` on."""

    of_block: int
    part: Part
    rectangle: tuple[tuple[int, int], ...]


class _Job(NamedTuple):
    """A block, and what of it goes where."""

    fragment: Fragment
    block: int
    wanted: Wanted
    moves: list[_Run | _Cell]


def fill(
    folder: Path, files: Mapping[str, FileRecord], known: set[str], version: int, all_wanted: list[Wanted]
) -> list[int]:
    """Fill what is wanted; how many elements of each were found.

    known: files whose header has been verified, to which this adds. DamagedFile naming the file where what is needed of
    it does not match its digest: what has been filled is of no use then.
    """
    found = []
    by_file: dict[str, list[_Job]] = {}
    for wanted in all_wanted:
        jobs = [job for fragment in wanted.fragments for job in _jobs(fragment, wanted)]
        found.append(sum(_size(move) for job in jobs for move in job.moves))
        for job in jobs:
            by_file.setdefault(job.fragment.file, []).append(job)
    for name, jobs in sorted(by_file.items()):
        with opened(folder / name) as descriptor:
            if name not in known:
                check_header(folder / name, descriptor, files[name], version)
                known.add(name)
            jobs.sort(key=lambda job: (job.fragment.offset, job.block))  # as a disk likes it
            _work_through(folder / name, descriptor, jobs, version)
    return found


def _size(move: _Run | _Cell) -> int:
    return move.n if isinstance(move, _Run) else math.prod(box_shape(move.rectangle))


def _jobs(fragment: Fragment, wanted: Wanted) -> Iterator[_Job]:
    """The blocks of a fragment that hold anything wanted."""
    asked = wanted.asked
    if not fragment.numel or asked.start == asked.stop:
        return
    alike = fragment.stripe is None and fragment.box[1:] == asked.box[1:]
    areas = [] if alike else common(rectangles(asked), rectangles(fragment.part))
    if alike:
        yield from _runs(fragment, wanted)
    elif areas:
        for i, parts in enumerate(fragment.block_parts(fragment.ordered())):
            moves: list[_Run | _Cell] = []
            at = 0
            for part in parts:
                moves += [_Cell(at, part, rectangle) for rectangle in common(areas, rectangles(part))]
                at += part.stop - part.start
            if moves:
                yield _Job(fragment, i, wanted, moves)


def _runs(fragment: Fragment, wanted: Wanted) -> Iterator[_Job]:
    """The same where both boxes are whole rows, so that either is one run of the other."""
    asked, step = wanted.asked, fragment.block_bytes // DTYPES[fragment.dtype].itemsize
    row = math.prod(box_shape(fragment.box[1:]))
    shift = (fragment.box[0][0] - asked.box[0][0]) * row if fragment.box else 0
    shift += fragment.start  # from places in the fragment to places in the box that is asked for
    low, high = max(asked.start - shift, 0), min(asked.stop - shift, fragment.numel)
    for i in range(low // step, -(-high // step) if low < high else 0):
        first, last = max(low, i * step), min(high, (i + 1) * step)
        yield _Job(fragment, i, wanted, [_Run(first - i * step, first + shift - asked.start, last - first)])


def _work_through(path: Path, descriptor: int, jobs: list[_Job], version: int) -> None:
    """Do the jobs, on as many threads as are worth it; the error of the first job that has one is raised."""
    errors: dict[int, Exception] = {}
    waiting = iter(enumerate(jobs))
    lock = threading.Lock()
    largest = max(job.fragment.block_bytes for job in jobs)

    def work() -> None:
        scratch = bytearray()
        while not errors:
            with lock:
                number, job = next(waiting, (-1, None))
            if job is None:
                return
            try:
                if not scratch and not _is_direct(job):
                    scratch = bytearray(largest)
                _do(path, descriptor, job, version, scratch)
            except Exception as error:
                errors[number] = error

    total = sum(job.fragment.block_bytes for job in jobs)
    others = [threading.Thread(target=work) for _ in range(min(_threads(), total // BYTES_OF_A_THREAD) - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
    if errors:
        raise errors[min(errors)]


def _threads() -> int:
    """This rank's share of the cores."""
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks_here()))


def _block_size(job: _Job) -> int:
    fragment = job.fragment
    return min(fragment.block_bytes, fragment.bytes - job.block * fragment.block_bytes)


def _is_direct(job: _Job) -> bool:
    """Whether the block can be read to where it belongs."""
    out, dtype = job.wanted.out, DTYPES[job.fragment.dtype]
    (move, *more) = job.moves
    whole = not more and isinstance(move, _Run) and move.n * dtype.itemsize == _block_size(job)
    return whole and out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous()


def _do(path: Path, descriptor: int, job: _Job, version: int, scratch: bytearray) -> None:
    out, fragment = job.wanted.out.detach(), job.fragment
    if _is_direct(job):
        (move,) = job.moves
        assert isinstance(move, _Run)
        place = bytes_of(out[move.of_out : move.of_out + move.n])
        read_block(path, descriptor, fragment, job.block, place, version)
        return
    block = memoryview(scratch)[: _block_size(job)]
    read_block(path, descriptor, fragment, job.block, block, version)
    values = torch.frombuffer(block, dtype=DTYPES[fragment.dtype])
    for move in job.moves:
        if isinstance(move, _Run):
            out[move.of_out : move.of_out + move.n].copy_(values[move.of_block : move.of_block + move.n])
        else:
            held = values[move.of_block : move.of_block + move.part.stop - move.part.start]
            view(out, job.wanted.asked, move.rectangle).copy_(view(held, move.part, move.rectangle))
