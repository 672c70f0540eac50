"""Language modelling: the next token of a stream of text."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from llm.batch import Batch
from llm.data.contamination import contamination_notes
from llm.data.heldout import HeldOut
from llm.data.mixture import Mixture
from llm.data.source import TokenSource
from llm.data.sources import check_data, open_data, prepare_data, sides
from llm.data.stream import Stream
from llm.generate import Decoder, generate
from llm.generation.text import continuation
from llm.model import LLM
from llm.objectives import NextToken, Objective
from llm.parallel.collectives import all_or_none, main_decides
from llm.parallel.launch.world import World
from llm.tasks.base import OpenedRows, RowsWanted, Task
from llm.tokenizer import Tokenizer

VERIFY_TOKENS = 1 << 28
"""A source up to this size is verified whole before the run begins (under a second); a larger one shard by shard as
it is first read.
"""


class LanguageModelling(Task):
    name = "lm"

    def objectives(self) -> tuple[Objective, ...]:
        return (NextToken(self.name),)

    def open_rows(self, wanted: RowsWanted, tokenizer: Tokenizer, world: World) -> OpenedRows:
        sources, valid, notes = open_sources(wanted, tokenizer, world)
        seq_len, fill = wanted.seq_len, tokenizer.eos_id
        rows = [(name, Stream(source, seq_len), weight) for name, source, weight in sources]
        held = [Stream(source, seq_len, to_the_end=True) for source in valid]
        mixture = all_or_none(lambda: Mixture(rows, seq_len, wanted.seed, fill), world)
        held_out = all_or_none(lambda: HeldOut(held, seq_len, wanted.held_out_rows, fill) if held else None, world)
        return OpenedRows(mixture, held_out, notes)

    def counter(self, tokenizer: Tokenizer) -> Callable[[Batch], list[int]]:
        """Targets, and bytes of text that they stand for."""
        token_bytes = tokenizer.token_bytes()

        def count(batch: Batch) -> list[int]:
            labels = batch.targets[self.name].labels
            targets = labels[labels >= 0].numpy()
            return [targets.size, int(token_bytes[targets].sum())]

        return count

    def metrics(self, loss_sum: float, counts: Sequence[int]) -> dict[str, float]:
        """Loss per target (nats), perplexity and bits per byte of the original text."""
        n_targets, n_bytes = counts
        loss = loss_sum / n_targets
        return {
            "valid_loss": loss,
            "valid_ppl": math.exp(min(loss, 700.0)),
            "valid_bits_per_byte": loss_sum / (math.log(2) * max(n_bytes, 1)),
        }

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
    ) -> list[str]:
        try:
            found = generate(
                decoder,
                prompts,
                max_new_tokens=[min(most_tokens, context - len(ids)) for ids in prompts],
                temperature=temperature,
                stop_ids=tokenizer.end_ids,
                seed=seed,
                n_ids=tokenizer.vocab_size,
            )
        except FloatingPointError as error:  # on all ranks alike; whether such a run goes on is the guard's to say
            return [f" ({error})"] * len(prompts)
        return [continuation(tokenizer, *row) for row in zip(prompts, found, strict=True)]


def open_sources(
    wanted: RowsWanted, tokenizer: Tokenizer, world: World
) -> tuple[list[tuple[str, TokenSource, float]], list[TokenSource], list[str]]:
    """The training sources with their names and weights, the held-out sources, and lines that say what they are made
    of; raw text is sharded by rank 0."""
    cache, of_role = wanted.cache_dir, sides(wanted.train, wanted.valid)
    for side in of_role.values():  # both before the first is sharded, which may take long
        main_decides(partial(check_data, side, cache_dir=cache), world)
    opened: dict[str, list[tuple[str, TokenSource, float]]] = {"data.train": [], "data.valid": []}
    for role, side in of_role.items():
        main_decides(partial(prepare_data, side, tokenizer, cache), world)
        opened[role] = all_or_none(partial(open_data, side, tokenizer, cache), world)
        for _, source, _ in opened[role]:
            if source.n_tokens <= VERIFY_TOKENS:
                main_decides(partial(_verify, source), world)
    train, valid = ([source for _, source, _ in opened[role]] for role in ("data.train", "data.valid"))
    contamination = main_decides(partial(contamination_notes, train, valid), world)
    return opened["data.train"], valid, [note for source in train + valid for note in source.notes] + contamination


def _verify(source: TokenSource) -> None:
    TokenSource.open(source.path, verify=True)
