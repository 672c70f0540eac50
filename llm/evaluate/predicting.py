"""Answers to Predict requests: texts side by side in one row, each a document of it.

An answer is a function of its request alone: documents see only themselves, tokens and documents of a batch are filled
up as in llm/evaluate/scoring.py, and each document is pooled for itself, in float64.

Shapes: S documents, N tokens of a batch, D model width, n outputs.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from llm.datatypes import TransformerInput
from llm.evaluate.head import ALIGNED_ROWS
from llm.evaluate.requests import NonFinite, Predict, Predicted
from llm.evaluate.scoring import ALIGNED, FILLED
from llm.generation.text import context_length
from llm.layers.prediction import answers_of
from llm.model import LLM
from llm.parallel.replica import EVALUATED_AT_ONCE, Replica

Batch = tuple[int, ...]
"""Numbers of requests that go through the model together."""


class Predictor:
    """Predict requests, of which this replica answers some."""

    def __init__(self, replica: Replica, requests: dict[int, Predict]) -> None:
        """requests: by their numbers among all requests. ValueError for one that no answer can be made to."""
        self._replica, self._requests = replica, requests
        args = replica.model.args
        if not args.n_prediction:
            raise ValueError("model.n_prediction=0: the model has no prediction head")
        for index, request in requests.items():
            _check(request, index, context_length(args), args.vocab_size)
        slots = () if args.vision is None else (args.vision.patch_token_id, args.vision.video_token_id)
        self._filler = next(token for token in range(3) if token not in slots)

    def cost(self, indices: Sequence[int]) -> int:
        """Tokens of these requests."""
        return sum(len(self._requests[index].tokens) for index in indices)

    def batches(self, batch_tokens: int) -> list[Batch]:
        """All requests in batches of no more tokens, but for single requests; the longest first."""
        found: list[Batch] = []
        taken: list[int] = []
        tokens = 0
        for index in sorted(self._requests, key=lambda index: (-len(self._requests[index].tokens), index)):
            length = len(self._requests[index].tokens)
            if taken and tokens + length > batch_tokens:
                found.append(tuple(taken))
                taken, tokens = [], 0
            taken.append(index)
            tokens += length
        return [*found, tuple(taken)] if taken else found

    def filled(self, batch: Batch) -> int:
        """Tokens of a batch that are nobody's."""
        return FILLED + -(self.cost(batch) + FILLED) % ALIGNED

    def answers(self, batches: Sequence[Batch], forwards: int = 0) -> Iterator[list[tuple[int, Predicted]]]:
        """Those of one batch after the other (collective). forwards: so many at least, where other ranks make so many
        with this one. NonFinite where what the model makes of a text is not finite.
        """
        ranks = self._replica.grid.pipeline.size
        every: list[Batch] = [*batches, *[()] * (forwards - len(batches))]
        at_once = EVALUATED_AT_ONCE * ranks if ranks > 1 else 1
        for first in range(0, len(every), at_once):
            chunk = every[first : first + at_once]
            inputs = [self._inputs(batch) for batch in chunk]
            hidden = self._replica.hidden(inputs)
            for number, batch in enumerate(chunk):
                found = self._predicted(batch, inputs[number], hidden[number] if hidden else None)
                if found:
                    yield found

    def _inputs(self, batch: Batch) -> TransformerInput:
        filler = self._filler
        documents = [(filler,), (filler,) * 2, *(self._requests[index].tokens for index in batch)]
        documents.append((filler,) * (self.filled(batch) - 3))
        return TransformerInput(
            torch.tensor([token for of in documents for token in of], device=self._replica.world.device)[None],
            cu_seqlens=torch.tensor([0, *accumulate(map(len, documents))]),
            causal=self._replica.model.args.prediction_causal,
        )

    def _predicted(
        self, batch: Batch, inputs: TransformerInput, hidden_1ND: Tensor | None
    ) -> list[tuple[int, Predicted]]:
        model = self._replica.model
        made = None
        if hidden_1ND is not None:
            assert inputs.cu_seqlens is not None
            bounds = inputs.cu_seqlens.tolist()[2:-1]  # without the fillers
            parts = [hidden_1ND[0, start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
            made = head_outputs(model, parts)[: len(batch)]
        shape = len(batch), model.args.n_prediction
        outputs = self._replica.from_last_stage(made, shape, torch.float64).cpu()
        found = []
        for index, row in zip(batch, answers_of(model.args, outputs), strict=True):
            if not row.isfinite().all():
                raise NonFinite(index, "what the prediction head makes of it is not finite")
            found.append((index, Predicted(tuple(row.tolist()))))
        return found


@torch.no_grad()
def head_outputs(model: LLM, documents: Sequence[Tensor]) -> Tensor:
    """(S', n) float64: what the prediction head makes of the final hidden states (N, D) of documents, and of zeros that
    fill them up, one call whatever they are, as gathered weights are gathered on all ranks together.
    """
    head, pool = model.prediction, model.args.pool
    assert head is not None
    pooled_SD = head.weight.new_zeros(max(1, -(-len(documents) // ALIGNED_ROWS)) * ALIGNED_ROWS, model.args.dim)
    for number, hidden_ND in enumerate(documents):
        of_tokens = hidden_ND if pool == "mean" else hidden_ND[:1] if pool == "first" else hidden_ND[-1:]
        pooled_SD[number] = of_tokens.double().mean(0)
    found: Tensor = head(pooled_SD)
    return found.double()


def _check(request: Predict, index: int, context: int, vocab_size: int) -> None:
    ids = request.tokens
    if not ids or len(ids) > context:
        raise ValueError(f"request {index}: a text has 1 to {context} tokens; this one {len(ids)}")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"request {index}: token ids must lie between 0 and {vocab_size - 1}")
