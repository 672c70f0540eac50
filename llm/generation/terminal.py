"""Continuations on the screen as they are made: of one prompt, of a terminal's lines, or of a pipe's."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from llm.errors import UserError
from llm.generation.beams import Beams
from llm.generation.pictures import Picture
from llm.generation.sampling import Sampling
from llm.generation.text import NO_BEAMS, Continuer, Prompt


def write(text: str) -> None:
    """Put text on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show(
    continuer: Continuer,
    text: str,
    sampling: Sampling,
    max_new_tokens: int,
    *,
    stop: bool,
    num_samples: int = 1,
    name: str = "--prompt",
    place: int = 0,
    pictures: Sequence[Picture] = (),
    beams: Beams = NO_BEAMS,
) -> None:
    """Write the continuation of a text, or several one after the other, each under a line that numbers it. `place`: of
    the prompt among others, which its random numbers depend on. pictures: the images that it has."""
    for sample in range(num_samples):
        if num_samples > 1:
            write(f"--- {sample + 1} of {num_samples}\n")
        prompt = continuer.prompt(text, name, f"{place}.sample{sample}" if sample else str(place), pictures)
        show_prompt(continuer, prompt, sampling, max_new_tokens, stop, beams=beams)


def show_prompt(
    continuer: Continuer,
    prompt: Prompt,
    sampling: Sampling,
    max_new_tokens: int,
    stop: bool = True,
    heard: Callable[[str], object] = lambda part: None,
    *,
    beams: Beams = NO_BEAMS,
) -> None:
    """Write the continuation of a prompt as it is made; `heard` gets its parts too."""
    for _, part, done in continuer.stream([prompt], sampling, max_new_tokens, stop, beams=beams):
        heard(part)
        write(part)
        if done:
            write("\n")
            if done.finish_reason == "context":
                print(
                    f"note: ended after {done.n_tokens} tokens, where the context of {continuer.context} tokens "
                    f"does (max_seq_len; the prompt has {len(prompt.ids)})",
                    file=sys.stderr,
                    flush=True,
                )


CONTINUES = "a prompt a line; ctrl-C ends a continuation, ctrl-D the program"


def converse(show_one: Callable[[str, str, int], None], hint: str = CONTINUES, begins: bool = True) -> None:
    """Continue each line of stdin, given to `show_one` with its name and place, until it ends.

    On a terminal, which is greeted with `hint`, ctrl-C ends a continuation, and what is wrong with a prompt is said and
    another one read; in a pipe either ends the command. An empty or closed stdin that is no terminal begins a document
    if `begins`.
    """
    with suppress(AttributeError, ValueError):  # replaced or closed
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    if sys.stdin is not None and sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 (input() then has a history)
        print(hint, file=sys.stderr, flush=True)
        for place, line in enumerate(_typed()):
            try:
                show_one(line, "the prompt", place)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                write("\n")
        return
    place = -1
    for place, line in enumerate(_piped()):
        show_one(line, f"line {place + 1} of stdin", place)
    if place < 0 and begins:
        show_one("", "the empty prompt", 0)


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdout.isatty() else "")
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:  # a line given up
            write("\n")


def _piped() -> Iterator[str]:
    if sys.stdin is None:  # closed
        return
    for line in sys.stdin:
        yield line.removesuffix("\n").removesuffix("\r")
