"""Every tensor of a few chosen steps, as numbers that do not depend on the layout: `trace.jsonl` in the run folder.

`tools/diff.py` compares two of them and names the first weight, output or gradient in which two runs part. A tensor is
represented by sums over all micro-batches and ranks:

- `linear`: its inner products with four fixed pseudo-random tensors drawn from its name, so that a permutation, a sign
  or a single element shows, and a change that leaves one product as it is does not leave all four. Those of outputs
  differ over the features only: a token counts the same wherever it is computed.
- `norm`: the root of the sum of its squares; null for gradients, whose squares do not add up over micro-batches, and
  for what is a sum itself (losses, counts).
- `scale`: what an error of `linear` is relative to. For an output norm * sqrt(tokens), as the error may be the same in
  every token; for a weight its norm; for a gradient the sum of the norms of its parts; 0 for integers, which are equal
  or not.

Weights are those that the step's first forward used, a mean over the ranks; gradients are those of the global loss
before clipping and before the optimizer. Under torch.compile a compiled module shows its own output, not what is
inside.
"""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from llm.datatypes import RouterStats, TransformerOutput
from llm.init import uniform
from llm.layers.moe import Experts
from llm.model import LLM, Block
from llm.parallel.collectives import gather_json
from llm.parallel.launch.world import World
from llm.train.log import cut_from
from llm.train.reporting import Channel, LineFile

CHUNK = 1 << 20
"""Elements that are widened to float64 at a time."""
PROBES = 4
"""Inner products of a tensor."""
# what is kept of a tensor: these sums, then its inner products
MAGNITUDE, SQUARES, ROWS, COUNT, PARTS, LINEAR = range(6)


class Trace:
    """The trace of a run that stands before `first_step`; steps outside of `steps` (first and last) cost nothing.

    Rows of `first_step` and later are cut off `path`, as they will be repeated.
    """

    def __init__(self, model: LLM, world: World, path: Path, steps: tuple[int, int] | None, first_step: int) -> None:
        self.model = model
        self.world = world
        self.path = path
        self._file, self._channel = LineFile(path), Channel(str(path), "records")
        self._notes: list[str] = []
        self.steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._written = first_step - 1
        if world.is_main:
            self._note(cut_from(path, first_step))

    @contextmanager
    def step(self, step: int, gradient_scale: float) -> Iterator[None]:
        """Record what is computed inside as step number `step` (collective where it is traced).

        gradient_scale: how many times the gradient of a rank's micro-batch is larger than its part of the global one.
        """
        if step not in self.steps:
            yield
            return
        recorder = Recorder(self.model, gradient_scale)
        with recorder.listening():
            yield
        records = merge(gather_json(recorder.sums(), self.world))
        if self.world.is_main:
            if step <= self._written:  # the run was taken back to an earlier step
                self._note(cut_from(self.path, step))
            text = "\n".join(json.dumps({"step": step, **record}) for record in records)
            self._note(self._channel.send(lambda: self._file.write(text), len(records)))
            if step == self.steps[-1]:
                self._note(self._channel.end(self._file.close))
        self._written = step

    def _note(self, note: str | None) -> None:
        self._notes += [note] if note else []

    def notes(self) -> list[str]:
        """Lines about what could not be written, since the last call: a trace never ends a run."""
        notes, self._notes = self._notes, []
        return notes


class Recorder:
    """Sums of one rank over the micro-batches of one step, by (canonical name, tensor), in the order of computation."""

    def __init__(self, model: LLM, gradient_scale: float) -> None:
        self.model = model
        self.gradient_scale = gradient_scale
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._weights: dict[tuple[str, int, int], Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on the modules and parameters of the model."""
        with ExitStack() as stack:
            for name, module in _visible(self.model):
                if name in self.model.compiled:
                    stack.enter_context(self._around_compiled(name, module))
                    continue
                hooks = (
                    module.register_forward_pre_hook(lambda module, _, name=name: self._on_weights(name, module)),
                    module.register_forward_hook(lambda module, _, out, name=name: self._on_output(name, module, out)),
                )
                for hook in hooks:
                    stack.callback(hook.remove)
            for name, parameter in self.model.named_parameters():
                if not parameter.requires_grad:
                    continue
                hook = parameter.register_hook(lambda grad, name=name: self._on_gradient(name, grad))
                stack.callback(hook.remove)
            yield

    @contextmanager
    def _around_compiled(self, name: str, module: nn.Module) -> Iterator[None]:
        """A hook would be compiled with the module, or passed over where the module is compiled already."""
        compiled = self.model.compiled[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            for inner, part in module.named_modules(prefix=name):
                self._on_weights(inner, part)
            output = compiled(*args, **kwargs)
            self._on_output(name, module, output)
            return output

        self.model.compiled[name] = call
        try:
            yield
        finally:
            self.model.compiled[name] = compiled

    def sums(self) -> list[tuple[str, str, list[float]]]:
        """(name, tensor, columns) of everything recorded, in the order of computation."""
        if not self._sums:
            return []
        values = iter(torch.cat(list(self._sums.values())).tolist())  # one wait for the device
        return [(*key, [next(values) for _ in range(len(sums))]) for key, sums in self._sums.items()]

    def _on_weights(self, name: str, module: nn.Module) -> None:
        if _in_backward():
            return
        with _unseen():
            self._record_weights(name, module)

    def _on_output(self, name: str, module: nn.Module, output: Any) -> None:
        # a backward runs forwards again where activations were not kept; an expert's rows contain padding
        if _in_backward() or isinstance(module, Experts):
            return
        with _unseen():
            for tensor_name, tensor in _tensors(module, output):
                self._record_output(name, tensor_name, tensor.detach())

    def _on_gradient(self, name: str, gradient: Tensor) -> None:
        with _unseen():
            linear = self._linear(name, gradient) / self.gradient_scale
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64) / self.gradient_scale
            self._add(name, "gradient", linear, magnitude=norm)

    def _record_weights(self, name: str, module: nn.Module) -> None:
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{own}"
            if (full, "weight") not in self._sums:
                weight = parameter.detach()
                self._add(full, "weight", self._linear(full, weight), weight, rows=1)

    def _record_output(self, name: str, tensor_name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and tensor.ndim:
            linear = self._features(name, tensor).sum(0)
            self._add(name, tensor_name, linear, tensor, rows=tensor.numel() // tensor.shape[-1])
        else:
            linear = self._linear(name, tensor)
            self._add(name, tensor_name, linear, magnitude=linear.abs().max() * tensor.is_floating_point())

    def _add(
        self,
        name: str,
        tensor_name: str,
        linear: Tensor,
        whole: Tensor | None = None,
        *,
        magnitude: Tensor | None = None,
        rows: int = 0,
    ) -> None:
        """Add to the sums; `whole` is the tensor itself, where the sum of its squares means something."""
        new = torch.zeros(LINEAR + len(linear), dtype=torch.float64, device=linear.device)
        new[LINEAR:] = linear
        if magnitude is not None:
            new[MAGNITUDE] = magnitude
        if whole is not None:
            new[SQUARES] = torch.linalg.vector_norm(whole, dtype=torch.float64).square()
            new[COUNT] = whole.numel()
        new[ROWS], new[PARTS] = rows, 1
        key = (name, tensor_name)
        self._sums[key] = self._sums[key] + new if key in self._sums else new

    def _linear(self, name: str, tensor: Tensor) -> Tensor:
        """Inner products with products of one vector for each dimension; float64 (PROBES,), a scalar itself as (1,)."""
        if tensor.ndim == 0:
            return tensor.double().view(1)
        sums_RP = self._features(name, tensor)
        for axis in reversed(range(tensor.ndim - 1)):
            weights_NP = self._weights_of(name, axis, tensor.shape[axis], tensor.device)
            sums_RP = torch.einsum("rnp,np->rp", sums_RP.view(-1, *weights_NP.shape), weights_NP)
        return sums_RP[0]

    def _features(self, name: str, tensor: Tensor) -> Tensor:
        """Inner products over the last dimension; float64 (rows, PROBES), flat over the other dimensions."""
        width = tensor.shape[-1]
        weights_DP = self._weights_of(name, tensor.ndim - 1, width, tensor.device)
        chunks = tensor.reshape(-1, width).split(max(CHUNK // width, 1))
        return torch.cat([chunk.double() @ weights_DP for chunk in chunks])

    def _weights_of(self, name: str, axis: int, length: int, device: torch.device) -> Tensor:
        key = (name, axis, length)
        if key not in self._weights:
            self._weights[key] = fixed_weights(f"{name}:{axis}", length).to(device)
        return self._weights[key]


def fixed_weights(name: str, length: int) -> Tensor:
    """Weights of either sign and of size 1/2 to 3/2, so that no element is passed over and hardly two count alike.

    float64 (length, PROBES), in multiples of 2^-20: inner products with integers are exact.
    """
    draw = torch.from_numpy(uniform(0, f"trace:{name}", 0, length * PROBES)).view(length, PROBES) * 2 - 1
    return ((draw + draw.sign() / 2) * 2**20).round() / 2**20


def merge(ranks: list[list[Any]]) -> list[dict[str, Any]]:
    """Records of a step from every rank's sums, in the order of rank 0."""
    total: dict[tuple[str, str], list[float]] = {}
    for rows in ranks:
        for name, tensor, row in rows:
            before = total.get((name, tensor))
            total[name, tensor] = row if before is None else [a + b for a, b in zip(before, row, strict=True)]
    return [_record(name, tensor, row) for (name, tensor), row in total.items()]


def _record(name: str, tensor: str, row: list[float]) -> dict[str, Any]:
    if tensor == "weight":
        row = [value / row[PARTS] for value in row]
    norm = math.sqrt(row[SQUARES]) if row[COUNT] else None
    scale = row[MAGNITUDE] if norm is None else norm * math.sqrt(row[ROWS])
    count = int(row[COUNT]) or None
    return {"name": name, "tensor": tensor, "linear": row[LINEAR:], "scale": scale, "norm": norm, "count": count}


def _visible(model: LLM) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a hook can see, by canonical name; the model itself is `model`."""
    hidden: tuple[nn.Module, ...] = ()
    for name, module in model.named_modules():
        if module in hidden or isinstance(module, nn.ModuleList):
            continue
        if name in model.compiled:
            hidden += tuple(module.modules())
        yield name or "model", module


def _tensors(module: nn.Module, output: Any) -> Iterator[tuple[str, Tensor]]:
    """What to record of a module's output, by name."""
    if isinstance(output, Tensor):
        yield "output", output
    elif isinstance(output, RouterStats):
        yield from ((name, value) for name, value in output._asdict().items() if value is not None)
    elif isinstance(output, TransformerOutput):
        yield from ((name, value) for name, value in vars(output).items() if isinstance(value, Tensor))
        further = list((output.losses or {}).items())[1:]  # the first is loss_sum
        yield from ((f"{name}_loss_sum", loss.total) for name, loss in further)
    elif isinstance(output, tuple):
        for item in output[:1] if isinstance(module, Block) else output:  # its router's numbers have been recorded
            yield from _tensors(module, item)


@contextmanager
def _unseen() -> Iterator[None]:
    """Hides our arithmetic from autograd, and from activation checkpointing, which keeps results of the products it
    sees."""
    with torch.no_grad(), _disable_current_modes():
        yield


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
