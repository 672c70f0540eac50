"""Masked language modelling: the tokens of a text that are hidden, from what stands on both sides of them.

It reads text, and rows of any kind that have targets for `lm`: what these are does not matter, any token that stands
for text may be hidden.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.args import ModelArgs
from llm.batch import Batch
from llm.data.kinds import Opened
from llm.data.masked import TARGET, Masked, Masking
from llm.errors import UserError
from llm.objectives import GuessedTokens, Objective
from llm.parallel.launch.world import World
from llm.tasks.base import OpenedRows, RowsWanted, Task
from llm.tasks.rows import opened_rows
from llm.tokenizer import Tokenizer

MASK_TOKENS = ("<mask>", "[MASK]", "<|mask|>")
"""Usual names; a token that is added is called as the first."""


class MaskedLanguageModelling(Task):
    name = TARGET
    target = "lm"
    continues = False

    def objectives(self, options: Mapping[str, Any] | None = None) -> tuple[Objective, ...]:
        return (GuessedTokens(self.name),)

    def check(self, tokenizer: Tokenizer, options: Mapping[str, Mapping[str, Any]]) -> None:
        masking_of(tokenizer, options.get(self.name, {}))

    def open_rows(self, wanted: RowsWanted, tokenizer: Tokenizer, world: World) -> OpenedRows:
        return opened_rows(wanted, tokenizer, world, self)

    def view(
        self, name: str, opened: Opened, wanted: RowsWanted, tokenizer: Tokenizer, held_out: bool
    ) -> Opened:
        checked = super().view(name, opened, wanted, tokenizer, held_out)
        masking = masking_of(tokenizer, wanted.options.get(self.name, {}))
        rows = Masked(checked.rows, masking, None if held_out else wanted.seed)
        said = f"{opened.given}: {masking.rate:.3g} of its tokens are hidden; the mask token is {masking.mask_id}"
        return replace(checked, rows=rows, notes=opened.notes if held_out else (*opened.notes, said))

    def counter(self, tokenizer: Tokenizer) -> Callable[[Batch], list[float]]:
        """Tokens to be guessed."""
        return lambda batch: [batch.targets[self.name].weight()]

    def metrics(self, loss_sum: float, counts: Sequence[float]) -> dict[str, float]:
        """Loss per hidden token (nats), and the perplexity of guessing it."""
        loss = loss_sum / counts[0]
        return {"valid_loss": loss, "valid_ppl": math.exp(min(loss, 700.0))}

    def fields(self, args: ModelArgs) -> tuple[str, ...]:
        return ("loss", "ppl", "acc")


def masking_of(tokenizer: Tokenizer, options: Mapping[str, Any]) -> Masking:
    """How texts of a tokenizer are masked, by the section `mlm` of a run config. UserError where it has no mask token,
    or not the one that is named.
    """
    shares = {key: options[key] for key in ("rate", "mask", "random") if key in options}
    mask_id = mask_token(tokenizer, options.get("mask_token"))
    plain_V = plain_ids(tokenizer)
    plain_V[mask_id] = False
    if not plain_V.any():
        raise UserError(f"mlm.mask_token={mask_id}: leaves the tokenizer no token of text")
    return Masking(mask_id, plain_V, **shares)


def mask_name(tokenizer: Tokenizer, asked: str | int | None) -> str | None:
    """The name of a tokenizer's mask token, `asked` being `mlm.mask_token`; None where it has none of that name, or an
    id is asked for.
    """
    names = MASK_TOKENS if asked is None else (asked,)
    return next((name for name in names if isinstance(name, str) and name in tokenizer.control_tokens), None)


def mask_token(tokenizer: Tokenizer, asked: str | int | None = None) -> int:
    """The id that stands for a hidden token, by name or number, or by its usual names. UserError where there is none,
    saying how to have one.
    """
    if isinstance(asked, int):
        if not 0 <= asked < tokenizer.vocab_size:
            raise UserError(f"mlm.mask_token={asked}: the tokenizer has the ids 0 to {tokenizer.vocab_size - 1}")
        return asked
    name = mask_name(tokenizer, asked)
    if name is not None:
        return tokenizer.control_tokens[name]
    ways = "chat.add_tokens=true adds it to the tokenizer, and a row for it to the model"
    if asked is not None:
        known = ", ".join(sorted(tokenizer.control_tokens))
        raise UserError(f"mlm.mask_token={asked}: no control token of the tokenizer, which has {known}; {ways}")
    raise UserError(
        f"task=mlm: the tokenizer has no mask token ({', '.join(MASK_TOKENS)}); {ways}, and mlm.mask_token takes the "
        f"name or the id of another that no text needs"
    )


def plain_ids(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """(V,) whether an id stands for text, and is no control token."""
    plain_V = tokenizer.token_bytes() > 0
    plain_V[[number for number in tokenizer.control_tokens.values() if number < len(plain_V)]] = False
    return plain_V
