"""What a notebook wants of a model that predicts values: its answers for some of them, and what comes after a series.

Shapes: B rows, T positions, F values of one (model.input_dim), O outputs (model.output_dim).
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llm.cache import Cache
from llm.datatypes import TransformerInput

if TYPE_CHECKING:
    from llm.args import ModelArgs
    from llm.model import LLM

Values = Any
"""A tensor, an array or a list of numbers."""


class ValueMethods(nn.Module):
    """Methods of LLM that take and give values, in the units of the data."""

    args: "ModelArgs"

    @torch.no_grad()
    def predict_values(self, features: Values, *, pooled: bool = False) -> Tensor:
        """What the model says of one row of values (T, F), (T, O), or of several (B, T, F), (B, T, O); pooled, as a
        regression is trained: of each row together, (O,) or (B, O). float32 on the CPU. Dropout is off.

        Raises ValueError where the model reads or predicts tokens, or the values have another shape or are not finite.
        """
        model, given = cast("LLM", self), self._given(features)
        inputs = TransformerInput.of_features(given if given.ndim == 3 else given[None])
        trained = self.training
        self.eval()
        hidden = model(inputs, return_hidden=True).hidden
        found = model.pooled_values(hidden, inputs) if pooled else model.values(hidden)
        self.train(trained)
        found = model.in_units(found).cpu()
        return found if given.ndim == 3 else found[0]

    @torch.no_grad()
    def generate_values(self, features: Values, n: int) -> Tensor:
        """The n values that the model expects after one series (T, F), (n, F), or after each of several (B, T, F),
        (B, n, F): what it predicts of the last step is read as the next one, and so on, through the cache. float32 on
        the CPU. Dropout is off.

        Raises ValueError where the model's outputs are not what it reads, where it is not causal, where the values have
        another shape or are not finite, and where there are more steps than its context (args.max_seq_len).
        """
        args, model, given = self.args, cast("LLM", self), self._given(features)
        if args.output_dim != args.input_dim:
            raise ValueError(
                f"model.output_dim={args.output_dim}: outputs can be read as the next values only where there are as "
                f"many, and model.input_dim={args.input_dim}"
            )
        if not args.causal:
            raise ValueError("model.causal=false: a model whose steps see what comes says nothing of what comes next")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n={n!r}: must be a whole number of steps, 1 or more")
        rows_BTF = given if given.ndim == 3 else given[None]
        steps = rows_BTF.shape[1] + n - 1  # the last one is not read
        if steps > args.max_seq_len:
            fewer = args.max_seq_len - rows_BTF.shape[1] + 1
            raise ValueError(
                f"{rows_BTF.shape[1]} steps and {n} more are too many for the context of {args.max_seq_len} "
                f"(model.max_seq_len); "
                + (f"after so many it gives {fewer} at most" if fewer > 0 else "give fewer steps")
            )
        cache, made, trained = Cache(args, steps), [], self.training
        self.eval()
        for _ in range(n):
            hidden = model(rows_BTF, cache=cache, return_hidden=True).hidden
            rows_BTF = model.in_units(model.values(hidden[:, -1:]))
            made.append(rows_BTF)
        self.train(trained)
        found = torch.cat(made, 1).cpu()
        return found if given.ndim == 3 else found[0]

    def _given(self, features: Values) -> Tensor:
        """On the model's device, float32, (T, F) or (B, T, F)."""
        width, first = self.args.input_dim, next(self.parameters())
        if width is None or self.args.output_dim is None:
            missing = "input_dim" if width is None else "output_dim"
            raise ValueError(f"model.{missing} is not set: the model is one of tokens")
        try:
            given = torch.as_tensor(features, dtype=torch.float32, device=first.device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"values are no rows of as many numbers each: {error}") from None
        if given.ndim not in (2, 3) or given.shape[-1] != width or 0 in given.shape:
            raise ValueError(
                f"values must have the shape (T, {width}) or (B, T, {width}), as model.input_dim={width}; got "
                f"{tuple(given.shape)}"
            )
        if not given.isfinite().all():
            raise ValueError("values must be finite numbers; some are not")
        return given
