"""The recurrence of llm/kernels/ssd.py by the Triton kernels of the package mamba_ssm (model.ssm.kernel).

It is the same function with coarser arithmetic: products of float32 are TF32 on GPUs that have it, decays are summed in
float32, and the backward adds in any order unless torch is asked for deterministic algorithms.

The kernels count in int32, and past its end read and write other places without a word (state-spaces/mamba #1015). So
what has no room in it is refused here: of what is given, and of what the source of version 2.3.2 makes of that.

Shapes: as in llm/kernels/ssd.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm.errors import UserError
from llm.kernels.ssd import Scanned

KEY, OTHERWISE = "model.ssm.kernel=mamba_ssm", "use model.ssm.kernel=torch"
DEVICE = "cuda"
MOST_NUMBERS = 2**31 - 1
"""Of a tensor."""
MOST_PROCESSORS = 1024
"""More than a GPU has. Where all rows' chunks have fewer groups than there are processors, the backward cuts these in
parts, at most into heads, whose gradients of B and C it keeps until they are added."""
LEAST_TILE = 16
"""The fewest numbers, of a head's width, its state or a chunk, that are one sum among those that the backward keeps."""


def fused_ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    documents_BT: Tensor | None = None,
    state_BHPN: Tensor | None = None,
    chunk: int = 64,
) -> Scanned:
    """What `ssd` says, of float32 on a CUDA device; chunk: a power of 2 from 16.

    UserError on other devices, for other dtypes, without the package, and where a tensor is longer than its indices.
    """
    check_device(x_BTHP.device.type)
    if x_BTHP.dtype != torch.float32:
        raise UserError(f"{KEY} takes float32, and this model computes states in {x_BTHP.dtype}; {OTHERWISE}")
    _check_indices(x_BTHP, b_BTGN, chunk)
    scan, numbers_BT = find_kernel(), None
    if documents_BT is not None:
        # the kernels let the state before the first token go on into documents of number 0 alone
        numbers_BT = (documents_BT - documents_BT[:, :1]).to(torch.int32).contiguous()
    # all contiguous, the gradient too, so that shapes alone say how far indices go
    y_BTHP, last_BHPN = scan(
        *(z.contiguous() for z in (x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN)),
        chunk,
        initial_states=None if state_BHPN is None else state_BHPN.contiguous(),
        seq_idx=numbers_BT,
        return_final_states=True,
    )
    if y_BTHP.requires_grad:
        y_BTHP.register_hook(lambda grad: grad.contiguous())
    return Scanned(y_BTHP, last_BHPN)


def check_device(device_type: str) -> None:
    """UserError where the kernels do not run."""
    if device_type != DEVICE:
        raise UserError(f"{KEY} needs a CUDA device, and this one is {device_type}; {OTHERWISE}")


def find_kernel() -> Callable[..., Any]:
    """The package's function. UserError where it cannot be imported."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        raise UserError(
            f"{KEY}: the package mamba_ssm cannot be imported ({error}); docs/layouts.md says how to install it, or "
            f"{OTHERWISE}"
        ) from None
    found: Callable[..., Any] = mamba_chunk_scan_combined
    return found


def _check_indices(x_BTHP: Tensor, b_BTGN: Tensor, chunk: int) -> None:
    n_rows, length, heads, width = x_BTHP.shape
    groups, state = b_BTGN.shape[2:]
    chunks = n_rows * -(-length // chunk)
    tokens = chunks * chunk
    parts = groups if chunks * groups >= MOST_PROCESSORS else heads
    made = {
        "channels": tokens * heads * width,
        "states between chunks": chunks * heads * width * state,
        "scores within chunks": tokens * chunk * parts,
        "gradients of what is written to the state": tokens * parts * state,
        "sums of decays": tokens * heads * -(-max(width, state, chunk) // LEAST_TILE),
    }
    for what, count in made.items():
        if count > MOST_NUMBERS:
            raise UserError(
                f"{KEY}: {n_rows} x {length:,} tokens make {count:,} numbers of {what}, and its kernels count to "
                f"{MOST_NUMBERS:,}; give it fewer tokens at once (train.micro_batch_size, train.seq_len), or "
                f"{OTHERWISE}"
            )
