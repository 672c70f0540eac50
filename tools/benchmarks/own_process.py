"""A contestant in a process of its own, as its users run it.

What one contestant does with its memory is nothing to the others there: in one process, a block that one frees serves
the next, and a setting of malloc is everybody's.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from llm.errors import UserError
from tools.benchmarks.harness import wait_for_device


class OwnProcess:
    """A contestant whose steps are made by `command`, a process that calls `serve`. Leaving the context ends it."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        self.name = name
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed on leaving)
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words, text=True
        )

    def step(self) -> float:
        """One step's loss. UserError with the last words of a process that ended."""
        return float(self.ask(1)[2])

    def timed(self, block: int) -> tuple[float, float]:
        """Seconds of `block` steps, by the clock and of a core, as the process itself counts them."""
        seconds, cpu_seconds, _ = self.ask(block)
        return seconds, cpu_seconds

    def ask(self, line: object) -> Any:
        """The answer to a line: of `serve`, seconds by the clock and of a core, and the last loss. UserError with the
        last words of a process that ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its answer is missing, too
        answer = self.process.stdout.readline()
        if not answer:
            self.words.seek(0)
            raise UserError(f"{self.name} ended with {self.process.wait()}: {self.words.read().splitlines()[-1:]}")
        return json.loads(answer)

    def __enter__(self) -> "OwnProcess":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.communicate()
        self.words.close()


def serve(build: Callable[[], Callable[[], float]]) -> None:
    """The other side: build a step, then make as many as each line on stdin asks for, until there is no more line.

    Whatever libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = sys.stderr  # its own buffer would be written at the end, after the words of an error
    step = build()
    for line in sys.stdin:
        wait_for_device()
        started, cpu_started = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            loss = step()
        wait_for_device()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        print(json.dumps([seconds, cpu_seconds, loss]), file=answers, flush=True)
