"""One row of metrics.jsonl: what a step was made of.

| field | what |
|---|---|
| step, tokens, epoch | steps, tokens and passes over the training rows so far, this step included |
| loss | nats: the sum of the following |
| lm_loss, moe_balance_loss, moe_z_loss, ... | of each objective: its weight times the mean over the global batch |
| dpo_margin, dpo_accuracy, ... | what an objective says besides, as a mean over its own count; null without any |
| loss/SOURCE | of each source, where there are several: the first objective's mean over its targets; null without any |
| grad_norm | global norm before clipping; null, like a loss, where it is no finite number |
| skipped | why there was no update: loss, gradient, limit (guard.spike), overflow (fp16), passed over; else null |
| loss_scale | of fp16; else null |
| lr | learning rate of the step, before optim.lr_factors |
| batch_size, seq_len, targets | rows of the step, tokens of a sequence, labels that counted |
| tiles | of images in the step; this and the next two only where there are any |
| tile_imbalance, tile_imbalance_in_order | most tiles of a data-parallel rank over their mean; were rows not moved |
| routing_checksum | of how many tokens each expert got; equal on every layout |
| expert_load, expert_rank_load | most tokens that chose an expert, a rank's experts, over an even share |
| moe_overflow | share of assignments that found their expert full; only with model.moe.capacity |
| route_rate, route_overflow | shares of tokens that attended in routed layers, that would have with a larger budget |
| route_gate | mean gate of those that attended; these are means over the layers, and only where there are any |
| tokens_per_s, tokens_per_s_per_device | of the whole job, of one of its ranks; `tokens` are of source and target |
| mfu | share of the device's peak that the model's own arithmetic took (llm/flops.py); null where none is known |
| step_time_s, data_wait_s | seconds of the step, and of them waiting for data |
| rows_passed_over | ranges [first row, end row) of the step that were not trained on; only where there are any |
| valid_loss, valid_ppl, ... | what a validation says of the held-out rows, at the steps that have one |
| eval/TASK/METRIC, ..._stderr | what eval.tasks say, and the standard errors; null where a metric has no value |
| memory_gb | peak of rank 0 since it began, GiB: allocated on its GPU, or of the whole process on a CPU |
"""

import math
import resource
from fractions import Fraction
from typing import Any

import torch

from llm.args import ModelArgs
from llm.data.balance import Tiles
from llm.data.batch import StepBatch
from llm.flops import tile_flops, token_flops
from llm.parallel.engine.step import StepResult
from llm.parallel.launch.world import World
from llm.train.peaks import peak_flops


class StepMetrics:
    """Makes the rows of a run; `configured_peak` is log.peak_flops, `logits` whether any loss reads them."""

    def __init__(self, args: ModelArgs, world: World, configured_peak: float | None, logits: bool = True) -> None:
        self.world = world
        self._args, self._logits = args, logits
        self._flops: dict[tuple[int, int | None], int] = {}  # of a token, by the lengths of its sequence and source
        self._tile_flops = tile_flops(args)
        self.peak = peak_flops(configured_peak, world.device)

    def flops(self, seq_len: int, source_len: int | None = None) -> int:
        """Of a token in a sequence of `seq_len`, with its share of a source, forward and backward, images aside."""
        if (seq_len, source_len) not in self._flops:
            found = token_flops(self._args, seq_len, Fraction(0), self._logits, source_len)
            self._flops[seq_len, source_len] = found
        return self._flops[seq_len, source_len]

    def _flops_of(self, result: StepResult, batch: StepBatch) -> int:
        """Of a step, with the tiles that were read in it."""
        tiles, first = 0 if batch.tiles is None else batch.tiles.total, batch.micro_batches[0]
        source_len = None if first.inputs.source is None else first.inputs.source.tokens.shape[1]
        of_target = result.counts.tokens * first.n_tokens // first.n_tokens_of_both
        return of_target * self.flops(first.seq_len, source_len) + tiles * self._tile_flops

    def row(
        self, result: StepResult, batch: StepBatch, *, step: int, tokens: int, epoch: float, lr: float, seconds: float
    ) -> dict[str, Any]:
        """The row of a step; `seconds` is its wall time, data included."""
        seq_len = batch.micro_batches[0].seq_len
        n_tokens = result.counts.tokens
        per_device = n_tokens / seconds / self.world.size
        return {
            "step": step,
            "loss": _finite(result.loss),
            **{key: _finite(value) for key, value in named_losses(result).items()},
            "grad_norm": _finite(result.grad_norm),
            "skipped": result.skipped,
            "loss_scale": result.loss_scale,
            "routing_checksum": result.routing_checksum,
            "expert_load": result.expert_load,
            "expert_rank_load": result.expert_rank_load,
            **({} if result.moe_overflow is None else {"moe_overflow": result.moe_overflow}),
            **route_means(result),
            "lr": lr,
            "tokens": tokens,
            "epoch": epoch,
            "batch_size": batch.n_rows,
            "seq_len": seq_len,
            "targets": result.counts.targets,
            "tokens_per_s": n_tokens / seconds,
            "tokens_per_s_per_device": per_device,
            "mfu": None if self.peak is None else self._flops_of(result, batch) / seconds / self.world.size / self.peak,
            "step_time_s": seconds,
            "data_wait_s": batch.wait_s,
            "memory_gb": peak_memory_gb(self.world.device),
            **{key: _finite(value) for key, value in result.measures.items()},
            **{f"loss/{source}": _finite(value) for source, value in result.source_losses.items()},
            **_of_tiles(batch.tiles),
            **({"rows_passed_over": [list(rows) for rows in batch.passed_over]} if batch.passed_over else {}),
        }


def _of_tiles(tiles: Tiles | None) -> dict[str, float]:
    if tiles is None:
        return {}
    return {
        "tiles": tiles.total,
        "tile_imbalance": Tiles.imbalance(tiles.dealt),
        "tile_imbalance_in_order": Tiles.imbalance(tiles.in_order),
    }


def named_losses(result: StepResult) -> dict[str, float]:
    """The losses of the objectives, by the names of their fields."""
    return {f"{name}_loss": loss for name, loss in result.losses.items()}


def peak_memory_gb(device: torch.device) -> float:
    """Most memory (GiB) that this process has had: allocated by PyTorch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _finite(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None


def route_means(result: StepResult) -> dict[str, float | None]:
    """What routed layers report, as means over the layers; nothing without such layers."""
    if not result.routes:
        return {}
    of_layers = [(counts.rate(), counts.overflow(), counts.gate()) for counts in result.routes.values()]
    means = (sum(values) / len(values) for values in zip(*of_layers, strict=True))
    return dict(zip(("route_rate", "route_overflow", "route_gate"), map(_finite, means), strict=True))
