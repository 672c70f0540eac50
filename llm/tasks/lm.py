"""Language modelling: the next token of a text, or of the parts of samples that train."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.batch import Batch, Targets
from llm.decoder import Decoder
from llm.generate import generate
from llm.generation.text import continuation
from llm.model import LLM
from llm.objectives import NextToken, Objective
from llm.parallel.launch.world import World
from llm.tasks.base import OpenedRows, RowsWanted, Task
from llm.tasks.rows import opened_rows
from llm.tokenizer import Tokenizer


class LanguageModelling(Task):
    name = "lm"

    def objectives(self, options: Mapping[str, Any] | None = None) -> tuple[Objective, ...]:
        return (NextToken(self.name),)

    def open_rows(self, wanted: RowsWanted, tokenizer: Tokenizer, world: World) -> OpenedRows:
        return opened_rows(wanted, tokenizer, world, self)

    def counter(self, tokenizer: Tokenizer) -> Callable[[Batch], list[float]]:
        """The targets' weight, how many they are, the bytes of text that they stand for, the tokens of all samples, and
        how many of these are chosen out: are no target though more of their sample follows, or one of another weight
        than 1.
        """
        token_bytes = tokenizer.token_bytes()

        def count(batch: Batch) -> list[float]:
            targets = batch.targets[self.name]
            labels = targets.labels[targets.labels >= 0].numpy()
            n_tokens = batch.n_tokens if batch.valid is None else int(batch.valid.sum())
            n_bytes = int(token_bytes[labels].sum())
            return [targets.weight(), labels.size, n_bytes, n_tokens, _chosen_out(batch, targets)]

        return count

    def metrics(self, loss_sum: float, counts: Sequence[float]) -> dict[str, float]:
        """Loss per target (nats) and perplexity; of whole texts also bits per byte of the original text, where only
        some of the tokens are targets their share instead, as what they stand for is no text.
        """
        weight, n_targets, n_bytes, n_tokens, n_chosen_out = counts
        loss = loss_sum / weight
        found = {"valid_loss": loss, "valid_ppl": math.exp(min(loss, 700.0))}
        if n_chosen_out:
            return found | {"valid_target_share": n_targets / n_tokens}
        return found | {"valid_bits_per_byte": loss_sum / (math.log(2) * max(n_bytes, 1))}

    def fields(self, args: ModelArgs) -> tuple[str, ...]:
        return ("loss", "ppl", "bits_per_byte", "target_share")

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
        try:
            found = generate(
                decoder,
                prompts,
                max_new_tokens=[min(most_tokens, context - len(ids)) for ids in prompts],
                temperature=temperature,
                stop_ids=tokenizer.end_ids if end_ids is None else end_ids,
                seed=seed,
                n_ids=tokenizer.vocab_size,
                images=images,
            )
        except FloatingPointError as error:  # on all ranks alike; whether such a run goes on is the guard's to say
            return [f" ({error})"] * len(prompts)
        return [continuation(tokenizer, *row) for row in zip(prompts, found, strict=True)]


def _chosen_out(batch: Batch, targets: Targets) -> int:
    """How many tokens of a batch are kept from being targets, or are some of another weight than 1. The last one of a
    document or a row, which nothing follows, is not.
    """
    labels_N = targets.labels.reshape(-1)
    last_N = torch.zeros_like(labels_N, dtype=torch.bool)
    bounds = batch.inputs.cu_seqlens
    ends = torch.arange(0, len(last_N) + 1, batch.seq_len) if bounds is None else bounds.long()
    last_N[ends[1:] - 1] = True
    left_out_N = (labels_N < 0) & ~last_N
    if batch.valid is not None:
        left_out_N &= batch.valid.reshape(-1)
    found = int(left_out_N.sum())
    return found if targets.weights is None else found + int(((targets.labels >= 0) & (targets.weights != 1)).sum())
