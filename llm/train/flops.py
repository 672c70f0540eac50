"""Arithmetic of a training step and the peak of a device, for model FLOPs utilisation (mfu).

Counted as in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): per token 6 N for the matrix products, forward
and backward, and 12 L d s for attention. Work that a layout or a setting adds (recomputed activations, padding) does
not count, and every layer counts as if it attended to the whole sequence, chunked ones too.
"""

from dataclasses import dataclass

import torch

from llm.args import ModelArgs
from llm.parameters import ParameterTable

BF16_PEAKS = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A30", 165e12),
    ("L40S", 362e12),
)
"""Part of a CUDA device's name, and its dense bf16 peak in FLOP/s by the maker's data sheet; the first match holds."""


@dataclass(frozen=True)
class FlopCount:
    """What the arithmetic of one token depends on."""

    active_parameters: int
    """Parameters that a token meets in a matrix product or norm: all but the token table (which counts where it is the
    output matrix, too) and the experts that a token does not visit."""
    attention_layers: int
    width: int
    """Heads times their width."""

    @classmethod
    def of(cls, args: ModelArgs) -> "FlopCount":
        """Of a model with these args; they must have a vocabulary."""
        active = sum(row.active_numel for row in ParameterTable.of(args).values())
        layers = sum(spec.mixer == "attn" for spec in args.layer_specs())
        return cls(active, layers, args.n_heads * args.head_width)

    def per_token(self, seq_len: int) -> int:
        """FLOPs of one token's forward and backward in a sequence of `seq_len`."""
        return 6 * self.active_parameters + 12 * self.attention_layers * self.width * seq_len


def peak_flops(configured: float | None, device: torch.device) -> float | None:
    """FLOP/s of one device: what log.peak_flops says, else the table's on a GPU that it knows, else None."""
    if configured is not None or device.type != "cuda":
        return configured
    return peak_by_name(torch.cuda.get_device_name(device))


def peak_by_name(name: str) -> float | None:
    """Dense bf16 peak of a GPU by the name that CUDA gives it."""
    return next((peak for part, peak in BF16_PEAKS if part.lower() in name.lower()), None)
