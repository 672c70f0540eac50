"""What a step holds of each document, its loss, and its share of the step's gradient.

Shapes: B rows, T tokens of a row, N = B T.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.batch import Batch, Targets
from llm.data.mixture import Mixture
from llm.model import LLM
from llm.objectives import Objective, Objectives
from llm.tokenizer import Tokenizer

EXCERPT_CHARACTERS = 100
EXCERPT_TOKENS = 200


@dataclass(frozen=True)
class Span:
    """What one row of the step holds of one document. Losses in nats, with the weights before the step's update."""

    row: int
    """Global row."""
    source: str
    source_row: int
    document: int
    """Number of the document in its source."""
    file: str
    file_row: int | None
    """Line (JSONL) or row (Parquet) from 1; None: the file is the document."""
    first_token: int
    """Where the span begins in the document, its begin mark being token 0: a row's boundary may cut it."""
    n_tokens: int
    document_tokens: int
    n_targets: int
    weight: float
    """Of the targets together; without weights of their own their number."""
    loss_sum: float
    excerpt: str
    grad_norm: float | None = None
    """Norm of the gradient of loss_sum / (weight of the step's targets), times the weight of its task where there are
    several, which is what the span adds to the step's gradient."""

    @property
    def loss(self) -> float | None:
        """Mean over the span's targets; None without targets."""
        return self.loss_sum / self.weight if self.weight else None

    def where(self) -> str:
        """File and line, and which of its tokens where it is cut."""
        place = self.file if self.file_row is None else f"{self.file}:{self.file_row}"
        last = self.first_token + self.n_tokens
        cut = f", tokens {self.first_token}-{last - 1} of {self.document_tokens}"
        return f"{place} (document {self.document}{cut if self.n_tokens < self.document_tokens else ''})"


def by_loss(span: Span) -> tuple[float, int, int]:
    """Highest mean loss first, what is not a number before all, spans without targets last."""
    return -loss_order(span.loss), span.row, span.document


def loss_order(loss: float | None) -> float:
    """What a mean loss is sorted by."""
    return -math.inf if loss is None else math.inf if math.isnan(loss) else loss


def together(targets: Sequence[Targets]) -> Targets:
    """Those of several tasks as one, no token being a target of two."""
    if len(targets) == 1:
        return targets[0]
    labels = torch.stack([each.labels for each in targets]).amax(0)
    return Targets(labels, torch.stack([each.weight_of_each() for each in targets]).sum(0).float())


def score_spans(
    mixture: Mixture, tokenizer: Tokenizer, nll_BT: Tensor, batch: Batch, targets: Targets
) -> list[tuple[int, int, Span]]:
    """(begin, end, span) of every span of a document in a batch; begin and end count its flattened tokens. Rows that
    are not there have none, nor has what fills a row up.

    A row is `train.seq_len` tokens of its source, however the batch cuts it.
    """
    seq_len, rows = mixture.seq_len, batch.rows
    assert rows is not None and batch.inputs.cu_seqlens is not None
    tokens_N, labels_N = batch.inputs.tokens.reshape(-1), targets.labels.reshape(-1)
    weight_N = targets.weight_of_each().reshape(-1)
    nll_N = nll_BT.reshape(-1).double().cpu()
    holds_data_N = torch.ones_like(labels_N, dtype=torch.bool) if batch.valid is None else batch.valid.reshape(-1)
    found = []
    bounds = batch.inputs.cu_seqlens.tolist()
    for start, stop in zip(bounds, bounds[1:], strict=False):
        b, column = divmod(start, seq_len)
        number, source_row = int(rows.source[b]), int(rows.row[b])
        if number < 0 or not holds_data_N[start]:
            continue
        place = mixture.sources[number].origin(source_row, int(rows.epoch[b]), column)
        span = Span(
            row=int(rows.global_row[b]),
            source=mixture.names[number],
            source_row=source_row,
            document=place.document,
            file=place.origin.file,
            file_row=place.origin.row,
            first_token=place.offset,
            n_tokens=stop - start,
            document_tokens=place.length,
            n_targets=int((labels_N[start:stop] >= 0).sum()),
            weight=float(weight_N[start:stop].sum()),
            loss_sum=float(nll_N[start:stop].sum()),
            excerpt=_excerpt(tokenizer.decode(tokens_N[start : min(stop, start + EXCERPT_TOKENS)].tolist())),
        )
        found.append((start, stop, span))
    return found


def span_gradient_norm(
    model: LLM, objective: Objective, batch: Batch, start: int, stop: int, weight: float, device: torch.device
) -> float:
    """Norm, over all parameters, of the gradient of a span's summed loss / weight (divided last: fp16 has few small
    numbers).

    The span is a row of its own here: in the batch it sees no other document either, and its positions begin with 0.
    torch.autograd.grad leaves DeepSpeed's gradient buffers and hooks alone.
    """
    vision = model.args.vision
    alone = batch.span(start, stop, None if vision is None else vision.patch_token_id).to(device)
    loss = model(alone.inputs, losses=Objectives([objective]).losses_of(model, alone)).loss_sum
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None)) / weight


def _excerpt(text: str) -> str:
    """The beginning, on one line, with nothing that a terminal would take for a command."""
    short = " ".join(text.split())
    more = "..." if len(short) > EXCERPT_CHARACTERS else ""
    return "".join(c if c.isprintable() else "\ufffd" for c in short[:EXCERPT_CHARACTERS]) + more
