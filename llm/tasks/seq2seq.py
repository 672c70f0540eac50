"""Sequence to sequence: the next token of a target, of what came before it and a source that the encoder reads.

It reads pairs, and texts, of each of which the first half is the source and the rest the target (llm/data/halved.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from llm.args import ModelArgs
from llm.batch import Batch
from llm.data.halved import Halved
from llm.data.kinds import Opened
from llm.data.pair_rows import SEQ2SEQ
from llm.decoder import Decoder
from llm.errors import UserError
from llm.generate import generate
from llm.generation.text import continuation
from llm.model import LLM
from llm.objectives import GuessedTokens, Objective
from llm.parallel.launch.world import World
from llm.tasks.base import OpenedRows, RowsWanted, Task
from llm.tasks.rows import opened_rows
from llm.tokenizer import Tokenizer


class SequenceToSequence(Task):
    name = SEQ2SEQ
    def objectives(self, options: Mapping[str, Any] | None = None) -> tuple[Objective, ...]:
        return (GuessedTokens(self.name),)

    def open_rows(self, wanted: RowsWanted, tokenizer: Tokenizer, world: World) -> OpenedRows:
        return opened_rows(wanted, tokenizer, world, self)

    def view(
        self, name: str, opened: Opened, wanted: RowsWanted, tokenizer: Tokenizer, held_out: bool
    ) -> Opened:
        if "lm" not in opened.rows.targets:
            return super().view(name, opened, wanted, tokenizer, held_out)
        if wanted.source_len is None or wanted.source_len < wanted.seq_len:
            raise UserError(
                f"data.source_len={wanted.source_len}: {opened.given} is text, and the first halves of documents of a "
                f"row of train.seq_len={wanted.seq_len} take up to as many positions"
            )
        rows = Halved(opened.rows, tokenizer.bos_id, tokenizer.eos_id)
        said = f"{opened.given}: the first half of each document, or part of one in a row, is the source of the rest"
        return replace(opened, rows=rows, notes=opened.notes if held_out else (*opened.notes, said))

    def counter(self, tokenizer: Tokenizer) -> Callable[[Batch], list[float]]:
        """Tokens of targets."""
        return lambda batch: [batch.targets[self.name].weight()]

    def metrics(self, loss_sum: float, counts: Sequence[float]) -> dict[str, float]:
        """Loss per token of a target (nats), and perplexity."""
        loss = loss_sum / counts[0]
        return {"valid_loss": loss, "valid_ppl": math.exp(min(loss, 700.0))}

    def sample(
        self,
        decoder: LLM | Decoder,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        *,
        most_tokens: int,
        context: int,
        temperature: float,
        seed: int,
        end_ids: Sequence[int] | None = None,
        images: Sequence[Tensor | None] | None = None,
    ) -> list[str]:
        """The prompts are sources."""
        begin = [tokenizer.bos_id]
        try:
            found = generate(
                decoder,
                [begin] * len(prompts),
                max_new_tokens=min(most_tokens, context - 1),
                temperature=temperature,
                stop_ids=tokenizer.end_ids if end_ids is None else end_ids,
                seed=seed,
                n_ids=tokenizer.vocab_size,
                sources=prompts,
            )
        except FloatingPointError as error:  # on all ranks alike; whether such a run goes on is the guard's to say
            return [f" ({error})"] * len(prompts)
        return [continuation(tokenizer, begin, ids) for ids in found]

    def fields(self, args: ModelArgs) -> tuple[str, ...]:
        return ("loss", "ppl", "acc")
