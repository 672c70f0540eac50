"""Run under torchrun: for each case the bytes that a real step sends and a real engine keeps, and those predicted."""

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from llm.adapters.int8 import int8_weights
from llm.batch import IGNORE, Batch, Targets
from llm.boxes import box_shape
from llm.data.packed import PAIR
from llm.layers.parameter import VISION
from llm.parallel.collectives import gather_json
from llm.parallel.engine import deepspeed_private as private
from llm.parallel.engine.engine import Engine
from llm.parallel.engine.pipeline import Pipelined
from llm.parallel.grid import make_grid
from llm.parallel.launch import process
from llm.parallel.launch.world import World
from llm.parallel.traffic_counter import TrafficCounter
from llm.plan import memory, traffic
from llm.plan.workload import Workload
from llm.tasks.base import REFERENCE
from llm.train.config import check_layout, validate
from llm.train.dry_run import workload
from llm.train.run import build_engine
from tests.distributed import vision_job
from tests.distributed.engine_job import ROWS, SEQ_LEN, cut_batch
from tests.distributed.harness import TINY_MODEL, tiny_config
from tests.distributed.sources import SOURCE_LEN, with_sources

# of odd sizes, so that vocabulary, flat groups and shares are all padded
ODD_MODEL = {**TINY_MODEL, "dim": 30, "head_dim": 8, "vocab_size": 67, "n_layers": 3}
OF_VALUES = ("regression", "autoregressive")
SETTLING_STEPS = 2  # in which ZeRO-3 records the order of modules, and decides what to keep gathered


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    process.quiet_libraries()
    world = process.start(60, 1)
    results = [compare(case, world) for case in cases]
    if world.is_main:
        out.write_text(json.dumps(results))


def compare(case: dict[str, Any], world: World) -> dict[str, Any]:
    """Predicted and counted bytes of each dimension; expected and measured memory of each rank."""
    named = ("parallel", "optim", "train", "deepspeed", "lora")
    sections = {name: dict(case[name]) for name in named if name in case}
    sections["train"] = {"seq_len": SEQ_LEN, "global_batch_size": ROWS, "precision": "fp32", **sections["train"]}
    raw = tiny_config(Path("unused"), **sections)
    raw["model"] = {**ODD_MODEL, **case.get("model", {})}
    if case.get("task") == "dpo":
        pairs = [{"path": "unused.jsonl", "kind": "preference"}]
        raw |= {"task": "dpo", "data": {**raw["data"], "train": pairs, "valid": pairs}}
    if isinstance(case.get("task"), list):
        named = [{"path": "unused.jsonl", "name": entry["source"]} for entry in case["task"]]
        raw |= {"task": case["task"], "data": {**raw["data"], "train": named, "valid": None}}
    if case.get("task") == "prediction":
        rows = [{"path": "unused.jsonl", "kind": "labelled"}]
        raw |= {"task": "prediction", "data": {**raw["data"], "train": rows, "valid": rows}}
    if raw["model"].get("encoder_layers"):
        rows = [{"path": "unused.jsonl", "kind": "pair"}]
        raw |= {"task": "seq2seq", "data": {**raw["data"], "train": rows, "valid": rows, "source_len": SOURCE_LEN}}
    if str(case.get("task")) in OF_VALUES:
        rows = [{"path": "unused.jsonl", "kind": "values"}]
        raw |= {"task": case["task"], "data": {**raw["data"], "train": rows, "valid": rows}}
        del raw["model"]["vocab_size"], raw["tokenizer"]
    config = validate(raw, "case")
    layout = check_layout(config, world.size)
    work = workload(config, layout)
    if work.args.vision is not None:
        work = replace(work, tiles=tiles_of(SETTLING_STEPS, work))
    grid = make_grid(world, layout)
    engine = build_engine(config, grid)
    kept: list[dict[str, int]] = []
    moved = engine.replica.to_device  # called at the beginning of each micro-batch
    engine.replica.to_device = lambda batch: (kept.append(measure(engine)), moved(batch))[1]  # type: ignore[method-assign]
    for step in range(SETTLING_STEPS):
        take_step(engine, step, work)
    counter = TrafficCounter(layout)
    kept.clear()
    with counter:
        take_step(engine, SETTLING_STEPS, work)
    counted = counter.total(world)
    predicted = {along: sum(purposes.values()) for along, purposes in traffic.predict(work).items()}
    sizes = {along: [predicted.get(along, 0), counted.get(along, 0)] for along in predicted | counted}
    mine: dict[str, int | None] = {**kept[-1]}
    # before its last forward a stage may not have had a backward yet
    if work.accumulation <= layout.pipeline or work.offload_optimizer:
        mine["gradients"] = None
    kinds = [asdict(kind) for kind, _ in memory.predict(work)]
    owned = [name for name, parameter in engine.model.named_parameters() if not private.is_copy(parameter)]
    held = {name: math.prod(box_shape(engine.state.boxes[name])) for name in owned}
    copied = sum(p.numel() for p in engine.model.parameters() if private.is_copy(p))
    mine_is = next(i for i, kind in enumerate(work.kinds) if (kind.sizes, kind.copied) == (held, copied))
    return {
        "sent": sizes,
        "memory": gather_json([kinds[mine_is], mine], world),
        "calls": dict(counter.calls),
    }


def take_step(engine: Engine, step: int, work: Workload) -> None:
    cut = cut_batch if work.args.vision is None else vision_job.cut_batch
    batch = cut(step, engine.grid, work.accumulation)
    if work.args.encoder_layers:
        batch = with_sources(batch)
    main = engine.objectives.main.name
    if main != "lm":
        of_values = dict.fromkeys(OF_VALUES, as_values)
        other = {"dpo": as_pairs, "prediction": as_samples, "seq2seq": as_texts, **of_values}[main]
        micro_batches = [other(micro_batch) for micro_batch in batch.micro_batches]
        others = {name: count for name, count in batch.counts.objectives.items() if name != "lm"}
        counts = replace(batch.counts, objectives={main: ROWS, **others})
        batch = replace(batch, micro_batches=micro_batches, counts=counts)
    if len(engine.objectives.mains) > 1:
        micro_batches = [as_tasks(micro_batch) for micro_batch in batch.micro_batches]
        n, others = batch.counts.targets, {k: v for k, v in batch.counts.objectives.items() if k != "lm"}
        counts = replace(batch.counts, objectives={"lm": n, "mlm": n, **others}, sources={"plain": n, "hidden": n})
        batch = replace(batch, micro_batches=micro_batches, counts=counts)
    assert engine.step(batch, batch.counts, lr=1e-3).skipped is None


def tiles_of(step: int, work: Workload) -> float:
    """Tiles of a micro-batch in the mean, the blank ones among them that stand in for images."""
    tiles = torch.tensor(vision_job.TILES[step % 2]).view(-1, work.micro_batch_size).sum(1)
    trains = any(row.trainable for row in work.table.values() if row.unit == VISION)
    return float(tiles.clamp(min=1 if trains or work.stage == 3 else 0).float().mean())


def as_pairs(batch: Batch) -> Batch:
    """Its rows as pairs of their first half and their second one, which the reference model finds equally likely."""
    pair = torch.ones(batch.inputs.tokens.shape)
    pair[:, SEQ_LEN // 2 :] = -1
    values = {PAIR: pair, REFERENCE: torch.zeros_like(pair)}
    return replace(batch, targets={"dpo": batch.targets["lm"]}, values=values)


def as_texts(batch: Batch) -> Batch:
    """Its rows as the targets of their sources."""
    return replace(batch, targets={"seq2seq": batch.targets["lm"]})


def as_tasks(batch: Batch) -> Batch:
    """Its rows as those of two tasks in turn, the second of which sees both ways."""
    labels, hidden_B = batch.targets["lm"].labels, torch.arange(len(batch.inputs.tokens)) % 2 == 1
    others = {"lm": hidden_B, "mlm": ~hidden_B}
    targets = {name: labels.masked_fill(others_B[:, None], IGNORE) for name, others_B in others.items()}
    inputs = replace(batch.inputs, causal=~hidden_B)
    rows = None if batch.rows is None else replace(batch.rows, source=hidden_B.long().numpy())
    return replace(batch, inputs=inputs, targets={name: Targets(x) for name, x in targets.items()}, rows=rows)
def as_values(batch: Batch) -> Batch:
    """Its rows as three values at each position, and two that are predicted of each row, or three of each position."""
    shape = batch.inputs.tokens.shape
    features = torch.sin(torch.arange(3 * batch.n_tokens).float()).view(*shape, 3)
    inputs = replace(batch.inputs, tokens=torch.zeros_like(batch.inputs.tokens), features=features)
    labels, some = torch.full(shape, IGNORE), torch.zeros(shape, dtype=torch.int64)
    labels[:, 0] = 0
    targets = {"prediction": Targets(labels), "autoregressive": Targets(some)}
    values = {f"{name}.{i}": torch.ones(shape) for name, n in (("prediction", 2), ("autoregressive", 3))
              for i in range(n)}  # fmt: skip
    return replace(batch, inputs=inputs, targets=targets, values=values)


def as_samples(batch: Batch) -> Batch:
    """Its rows as samples of class 1."""
    labels, values = torch.full_like(batch.inputs.tokens, IGNORE), torch.zeros(batch.inputs.tokens.shape)
    labels[:, 0], values[:, 0] = 0, 1
    return replace(batch, targets={"prediction": Targets(labels)}, values={"prediction.0": values})


def measure(engine: Engine) -> dict[str, int]:
    """Bytes of the tensors that this rank keeps, all memory once."""
    zero, model = engine._deepspeed.optimizer, engine._deepspeed.module
    parameters = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    parameters += [p for p in model.parameters() if getattr(p, "ds_persist", False)]
    flats = private.partitions(engine._deepspeed)
    base = private.base_optimizer(engine._deepspeed)
    state = [x for flat in flats for x in base.state.get(flat, {}).values() if torch.is_tensor(x)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gradients += [p.grad_accum for p in model.parameters() if getattr(p, "grad_accum", None) is not None]
    gradients += getattr(zero, "fp32_groups_gradients_flat", [])
    if isinstance(engine.schedule, Pipelined) and engine.schedule.tied:
        gradients += engine.schedule.tied.gradient_sums.values()
    if hasattr(zero, "grad_partitions_flat_buffer"):
        gradients.append(zero.grad_partitions_flat_buffer)
    elif engine.zero_stage == 2:
        parts = [*zero.averaged_gradients.values(), *zero.all_grad_tensors.values()]
        gradients += [x for part in parts if part is not None for x in part if x is not None]
    weights = _bytes(parameters)
    return {
        "parameters": weights,
        "int8": sum(weight.nbytes for _, weight in int8_weights(model)),
        "masters": _bytes([*parameters, *flats]) - weights,
        "optimizer": _bytes(state),
        "ema": _bytes(engine.state.averages.flats),
        "gradients": _bytes(gradients),
    }


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


if __name__ == "__main__":
    process.run(main)
