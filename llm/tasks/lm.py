"""Language modelling: the next token of a text, or of the parts of samples that train."""

import math
from collections.abc import Callable, Sequence

from llm.batch import Batch
from llm.generate import Decoder, generate
from llm.generation.text import continuation
from llm.model import LLM
from llm.objectives import NextToken, Objective
from llm.parallel.launch.world import World
from llm.tasks.base import OpenedRows, RowsWanted, Task
from llm.tasks.rows import opened_rows
from llm.tokenizer import Tokenizer


class LanguageModelling(Task):
    name = "lm"

    def objectives(self) -> tuple[Objective, ...]:
        return (NextToken(self.name),)

    def open_rows(self, wanted: RowsWanted, tokenizer: Tokenizer, world: World) -> OpenedRows:
        return opened_rows(wanted, tokenizer, world, self.name, target=self.name)

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
