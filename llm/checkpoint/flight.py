"""What an asynchronous save is made of: a copy of this rank's state in host memory, and work on a thread of its own.

The thread only reads the copy and writes files. It never speaks with other ranks: a collective of a second thread could
meet one of the training thread's in another order on another rank.
"""

import _thread
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from llm.checkpoint.fragments import Piece
from llm.errors import UserError


class HostCopy:
    """Host memory for the values of one save, float32; pinned where values come from a GPU, and used again each time.
    """

    def __init__(self) -> None:
        self._flat: Future[Tensor] = Future()
        self._flat.set_result(torch.empty(0))

    def prepare(self, pieces: Sequence[Piece], in_background: bool = True) -> None:
        """Get the memory that these pieces need, unless it is there; the first save then need not wait for it.

        New memory costs more time than the copy into it: the system clears each page when it is first touched. Where
        there is not enough, `take` raises the UserError.
        """
        size = sum(values.numel() for *_, values in pieces)
        device = next((values.device for *_, values in pieces if values.is_cuda), None)

        def allocate() -> Tensor:
            if device is not None:
                torch.cuda.set_device(device)  # of this thread: else pages are pinned through the first GPU
            try:
                return torch.empty(size, dtype=torch.float32, pin_memory=device is not None).zero_()
            except RuntimeError as error:
                raise UserError(
                    f"checkpoint.asynchronous=true needs {4 * size:,} bytes of host memory on each rank like this one, "
                    f"which are not to be had ({error}); use checkpoint.asynchronous=false"
                ) from None

        if self._flat.result().numel() < size:
            self._flat = start_work(allocate, in_background)

    def take(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Copies of the pieces' values, complete on return; they stand until the next call."""
        self.prepare(pieces, in_background=False)
        sizes = [values.numel() for *_, values in pieces]
        on_gpu = any(values.is_cuda for *_, values in pieces)
        copies = list(self._flat.result()[: sum(sizes)].split(sizes))
        for copy, (*_, values) in zip(copies, pieces, strict=True):
            copy.copy_(values.detach(), non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies


def start_work(action: Callable[[], Any], in_background: bool) -> Future[Any]:
    """Call `action`, on a thread of its own or here; its result or error, once it has one.

    The thread is no reason for the process to stay: what it leaves half-written is no checkpoint.
    """
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    if in_background:
        _thread.start_new_thread(work, ())  # Thread.start would wait until the new thread has had Python's lock
    else:
        work()
    return future
