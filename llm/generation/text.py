"""Texts for ids as they are made, and what a model and its tokenizer make of a text."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llm.args import ModelArgs
from llm.errors import UserError
from llm.generate import stream
from llm.generation.beams import Beams, beam_stream
from llm.generation.pictures import Picture, Pictures
from llm.generation.sampling import NonFiniteLogits, Sampling
from llm.generation.stops import StopTexts
from llm.model import LLM
from llm.tokenizer import Tokenizer
from vision.opening import LIMITS, ImageLimits

FinishReason = Literal["stop", "length", "context"]
"""Why a text ended: an end mark, max_new_tokens, or the model's context."""
NO_BEAMS = Beams()
CONTEXT_IDS = 16
"""Ids of a prompt that what comes after it is decoded with."""


class TextStream:
    """The text that growing ids add to a prompt: only what is final, so that all parts together are the text of all
    ids. Characters of several tokens wait until they are whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = _end_of(tokenizer, prompt_ids)
        self._sent = tokenizer.decode_bytes(self._ids)
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """What is certain of the text once this id has come."""
        added = self._tokenizer.added_bytes(token) if self._sent else None
        if added is None:
            self._ids.append(token)
            added = self._fresh()
        return self._characters.decode(added)

    def end(self) -> str:
        """What is left when no more comes; a character cut in the middle is U+FFFD."""
        left = self._fresh() if self._tokenizer.added_bytes(0) is None else b""
        return self._characters.decode(left, final=True)

    def _fresh(self) -> bytes:
        """By all ids so far, which takes the longer the more there are."""
        found = self._tokenizer.decode_bytes(self._ids)
        if not found.startswith(self._sent):  # a tokenizer that takes back what it wrote: it may come round to it
            return b""
        fresh, self._sent = found[len(self._sent) :], found
        return fresh


def _end_of(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[int]:
    """The last ids of a prompt, some text among them if it has any: what follows text keeps its first space."""
    n = CONTEXT_IDS
    while n < len(prompt_ids) and not tokenizer.decode_bytes(prompt_ids[-n:]):
        n *= 2
    return list(prompt_ids[-n:])


def continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text that these ids add to the prompt, with its first space."""
    text = TextStream(tokenizer, prompt_ids)
    return "".join([*map(text.push, ids), text.end()])


def searched_text(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    end_ids: frozenset[int],
    stop_texts: Sequence[str],
) -> tuple[str, bool]:
    """What whole new tokens add to a prompt up to an end mark, their last, or a stop text; and whether one is there."""
    *before, last = ids
    text, cut = continuation(tokenizer, prompt_ids, before if last in end_ids else ids), StopTexts(stop_texts)
    kept = cut.push(text) + cut.end()
    return kept, cut.stopped or last in end_ids


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    ids: list[int]
    name: str
    """for errors"""
    key: str
    """what its random numbers depend on beside the seed"""
    pictures: tuple[Picture, ...] = ()
    """whose tiles fill the slots among the ids"""
    source: tuple[int, ...] = ()
    """of an encoder-decoder: what its encoder reads; the ids begin the answer"""

    @property
    def n_tokens(self) -> int:
        """That are computed before the first new one."""
        return len(self.ids) + len(self.source)


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt."""

    text: str
    n_tokens: int
    """the end mark included"""
    finish_reason: FinishReason


class Continuer:
    """A model with its tokenizer. `name` is the model's in errors."""

    def __init__(
        self,
        model: LLM,
        tokenizer: Tokenizer,
        name: str,
        end_ids: Sequence[int] | None = None,
        limits: ImageLimits = LIMITS,
    ) -> None:
        """end_ids: what ends a text; None = what the tokenizer says. limits: of the images of prompts. UserError where
        the model is none that continues texts."""
        if not model.args.causal:
            raise UserError(f"{name} continues no text: its tokens see what follows them (model.causal=false)")
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.pictures = Pictures(model.args.vision, name, limits)
        self.end_ids = tokenizer.end_ids if end_ids is None else tuple(end_ids)
        self.context = context_length(model.args)
        self.reads_sources = model.args.encoder_layers > 0
        """whether a text is what an encoder reads, and not what is continued"""

    def prompt(
        self, text: str, name: str = "the prompt", key: str = "0", pictures: Sequence[Picture] = ()
    ) -> Prompt:
        """The ids of a text, and of the images that stand in it where it says `<image>`, or before it. UserError where
        it cannot be encoded, has ids that the model lacks, or fills the context. Of an encoder-decoder the text is what
        its encoder reads."""
        try:
            text.encode()  # not every library says what is wrong with half a character
            if self.reads_sources:
                ids = self.tokenizer.source_ids(text)
            else:
                ids = self.pictures.prompt_ids(text, pictures, self.tokenizer)
        except UnicodeEncodeError as error:
            broken = error.object[error.start]
            raise UserError(
                f"{name} is not text in UTF-8: its character {error.start + 1} is {broken!r}; "
                f"convert it, for example with `iconv -t utf-8`"
            ) from None
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        return self.source_of(ids, name, key) if self.reads_sources else self.prompt_of(ids, name, key, pictures)

    def prompt_of(self, ids: list[int], name: str, key: str = "0", pictures: Sequence[Picture] = ()) -> Prompt:
        """A prompt in tokens, with the slots of its images. UserError where it has ids that the model lacks, other
        slots, or fills the context."""
        try:
            self.pictures.check_slots(ids, pictures)
        except UserError as error:
            raise UserError(f"{name} {error}") from None
        self._check_rows(ids, name)
        if len(ids) >= self.context:
            raise UserError(
                f"{name} has {len(ids)} tokens; the context of {self.name} is {self.context} tokens (max_seq_len), "
                f"prompt and continuation together: shorten it to {self.context - 1} or fewer"
            )
        return Prompt(ids, name, key, tuple(pictures))

    def source_of(self, source: list[int], name: str, key: str = "0") -> Prompt:
        """A source in tokens, and what begins the answer to it. UserError where it has ids that the model lacks, or is
        longer than the context."""
        self._check_rows(source, name)
        if len(source) > self.context:
            raise UserError(
                f"{name} has {len(source)} tokens; the encoder of {self.name} reads {self.context} at most "
                f"(max_seq_len): shorten it"
            )
        return Prompt([self.tokenizer.bos_id], name, key, source=tuple(source))

    def _check_rows(self, ids: Sequence[int], name: str) -> None:
        rows = self.model.args.vocab_size
        if max(ids) >= rows:
            raise UserError(
                f"{name} has token id {max(ids)} by the tokenizer of {self.name}, but the model has rows for ids 0 to "
                f"{rows - 1} only (vocab_size={rows}): the tokenizer belongs to another model"
            )

    def limits(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[int]:
        """Most new tokens of each prompt: max_new_tokens, or fewer where the context ends before."""
        return [min(max_new_tokens, self.context - len(prompt.ids)) for prompt in prompts]

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        max_new_tokens: int,
        stop: bool = True,
        *,
        stop_texts: Sequence[str] = (),
        beams: Beams = NO_BEAMS,
    ) -> Iterator[tuple[int, str, Completion | None]]:
        """(row, text, None) for each part of text that is certain, and (row, last text, completion) once a row has
        ended. With num_beams above 1 there is one part, the whole.

        stop: end at an end mark. stop_texts: end before the first of these that the text comes to.
        Raises UserError where the model's logits are not finite, ValueError where settings do not go together.
        """
        beams.check(sampling)
        end_ids = frozenset(self.end_ids) if stop else frozenset()
        try:
            if beams.num_beams > 1:
                yield from self._searched(prompts, sampling, beams, max_new_tokens, end_ids, stop_texts)
            else:
                yield from self._one_by_one(prompts, sampling, max_new_tokens, end_ids, stop_texts)
        except NonFiniteLogits as error:
            raise UserError(
                f"{self.name}: at new token {error.step} of {prompts[error.row].name}, {error.count} of {error.of} "
                f"logits are not finite (NaN or infinite): the weights hold such values, or the model's values are "
                f"beyond the range of {str(next(self.model.parameters()).dtype).removeprefix('torch.')}"
            ) from None

    def _one_by_one(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        max_new_tokens: int,
        end_ids: frozenset[int],
        stop_texts: Sequence[str],
    ) -> Iterator[tuple[int, str, Completion | None]]:
        limits = self.limits(prompts, max_new_tokens)
        texts = [TextStream(self.tokenizer, prompt.ids) for prompt in prompts]
        stops = [StopTexts(stop_texts) for _ in prompts]
        parts: list[list[str]] = [[] for _ in prompts]
        counts = [0] * len(prompts)
        made = stream(
            self.model,
            [prompt.ids for prompt in prompts],
            sampling,
            max_new_tokens=limits,
            stop_ids=end_ids,
            n_ids=self.tokenizer.vocab_size,
            keys=[prompt.key for prompt in prompts],
            images=[self._tiles(prompt) for prompt in prompts],
            sources=self._sources(prompts),
            ended=lambda row: stops[row].stopped,
        )
        for row, token in made:
            counts[row] += 1
            text, cut = texts[row], stops[row]
            reason = self._finish(token in end_ids, counts[row], limits[row], max_new_tokens)
            part = "" if reason == "stop" else cut.push(text.push(token))
            if reason is not None:
                part += cut.push(text.end()) + cut.end()
            if cut.stopped:
                reason = "stop"
            parts[row].append(part)
            done = None if reason is None else Completion("".join(parts[row]), counts[row], reason)
            if part or done:
                yield row, part, done

    def _searched(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        beams: Beams,
        max_new_tokens: int,
        end_ids: frozenset[int],
        stop_texts: Sequence[str],
    ) -> Iterator[tuple[int, str, Completion | None]]:
        limits = self.limits(prompts, max_new_tokens)

        def text(row: int, ids: Sequence[int]) -> tuple[str, bool]:
            return searched_text(self.tokenizer, prompts[row].ids, ids, end_ids, stop_texts)

        made = beam_stream(
            self.model,
            [prompt.ids for prompt in prompts],
            beams,
            max_new_tokens=limits,
            stop_ids=end_ids,
            n_ids=self.tokenizer.vocab_size,
            images=[self._tiles(prompt) for prompt in prompts],
            sources=self._sources(prompts),
            repetition_penalty=sampling.repetition_penalty,
            ended=(lambda row, ids: text(row, ids)[1]) if stop_texts else None,
        )
        for row, (best, *_) in made:
            found, stopped = text(row, best.tokens)
            reason = self._finish(stopped, len(best.tokens), limits[row], max_new_tokens)
            assert reason is not None  # nothing else is finished
            yield row, found, Completion(found, len(best.tokens), reason)

    def _sources(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]] | None:
        return [prompt.source for prompt in prompts] if self.reads_sources else None

    def _tiles(self, prompt: Prompt) -> Tensor | None:
        try:
            return self.pictures.tiles(prompt.pictures)
        except UserError as error:  # of a file that was there when the prompt was read
            raise UserError(f"{prompt.name}: {error}") from None

    @staticmethod
    def _finish(ended: bool, count: int, limit: int, max_new_tokens: int) -> FinishReason | None:
        if ended:
            return "stop"
        if count == limit:
            return "length" if limit == max_new_tokens else "context"
        return None

    def complete(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        max_new_tokens: int,
        stop: bool = True,
        *,
        stop_texts: Sequence[str] = (),
        beams: Beams = NO_BEAMS,
    ) -> list[Completion]:
        """The completion of each prompt, all in one batch; arguments and errors are as of `stream`."""
        made = self.stream(prompts, sampling, max_new_tokens, stop, stop_texts=stop_texts, beams=beams)
        done = {row: found for row, _, found in made if found}
        return [done[row] for row in range(len(prompts))]


def context_length(args: ModelArgs) -> int:
    """Most tokens of a text: max_seq_len, or what dynamic scaling of RoPE stretches it to."""
    scaling = args.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        return max(args.max_seq_len, int(scaling.original_max_position * scaling.factor))
    return args.max_seq_len
