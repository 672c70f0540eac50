"""What an asynchronous save is made of: a copy of this rank's state in host memory, and work on a thread of its own.

Masters and optimizer state change only when the optimizer steps, so the thread may copy them while the next forward and
backward run; the training waits for the copy before it steps. The thread then writes files from the copy. It calls no
collective: one of a second thread could meet one of the training thread's in another order on another rank.
"""

import _thread
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from llm.checkpoint.fragments import OwnedValues
from llm.errors import UserError


class HostCopy:
    """Host memory for the values of one save, float32; pinned where values come from a GPU, and used again each time.
    """

    def __init__(self) -> None:
        self._flat: Future[Tensor] = Future()
        self._flat.set_result(torch.empty(0))

    def prepare(self, owned: Sequence[OwnedValues], in_background: bool = True) -> None:
        """Get the memory that these values need, unless it is there; the first save then need not wait for it.

        New memory costs more time than the copy into it: the system clears each page when it is first touched. Where
        there is not enough, `take` raises the UserError.
        """
        size = sum(values.numel() for *_, values in owned)
        device = next((values.device for *_, values in owned if values.is_cuda), None)

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

    def take(self, owned: Sequence[OwnedValues]) -> tuple[list[Tensor], Callable[[], None]]:
        """Where the copies of the values will be, and a function that copies them there, on any thread; they
        stand until the next call.

        What this thread has asked a GPU for until now comes before the copy, and what it asks for later beside it.
        """
        self.prepare(owned, in_background=False)
        sizes = [values.numel() for *_, values in owned]
        copies = list(self._flat.result()[: sum(sizes)].split(sizes))
        device = next((values.device for *_, values in owned if values.is_cuda), None)
        ready = None if device is None else torch.cuda.current_stream(device).record_event()

        def copy() -> None:
            if device is None:
                for place, (*_, values) in zip(copies, owned, strict=True):
                    place.copy_(values.detach())
                return
            assert ready is not None
            stream = torch.cuda.Stream(device)  # of its own: not behind the kernels of the forward
            with torch.cuda.device(device), torch.cuda.stream(stream):
                stream.wait_event(ready)
                for place, (*_, values) in zip(copies, owned, strict=True):
                    place.copy_(values.detach(), non_blocking=True)
                stream.synchronize()

        return copies, copy


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
