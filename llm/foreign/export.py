"""Our models as foreign folders, written whole or not at all, one tensor in memory at a time."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.args import LayerSpec, ModelArgs
from llm.args.layers import SumSpec, attention_specs
from llm.args.model import OF_VALUES
from llm.args.sum import SumArgs
from llm.atomic import new_directory
from llm.boxes import Box, box_shape
from llm.checkpoint.weights import Weights, boxed, check_range
from llm.errors import UserError
from llm.foreign.family import Family, export_pairs, families
from llm.foreign.transforms import BoxPair, Shape, foreign_shapes
from llm.layers.lora import LORA_A
from llm.parameters import ParameterTable
from llm.paths import check_free
from llm.safetensors_file import write_tensors

CHUNK_BYTES = 8 << 20
ENDS = ("bos_token_id", "eos_token_id")
Notify = Callable[[int], object]
UNSAID_OF_SSM = {"chunk", "kernel", "expand", "heads"}
"""What rounding alone depends on, and what is said by the widths."""
PREFERRED = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "llama4_text", "olmo2", "gemma", "gemma2")
"""Families in the order in which they are tried for a model that names none."""


def choose_family(args: ModelArgs, format: str, name: str | None = None) -> Family:
    """The family of a format that can say what the model is. UserError with the reason when the named one, or any,
    cannot."""
    for key in ("input_dim", "output_dim"):
        if getattr(args, key) is not None:
            raise UserError(f"model.{key}={getattr(args, key)}: foreign families are of models of tokens")
    known = {family.name: family for family in families().values() if family.format == format and family.write_config}
    if name is not None:
        if name not in known:
            raise UserError(f"family {name!r} cannot be written as {format}; known are {', '.join(sorted(known))}")
        written_config(known[name], args)
        return known[name]
    order = [key for key in PREFERRED if key in known] + [key for key in known if key not in PREFERRED]
    reasons = []
    for key in order:
        if known[key].needs_tower and args.vision is None:
            continue
        try:
            written_config(known[key], args)
        except UserError as error:
            reasons.append(str(error))
            continue
        return known[key]
    # what is wrong in a config that was only written to be compared is of no key that the user has given
    of_keys = [reason for reason in reasons if not reason.startswith("config.json")] or reasons
    raise UserError(f"no family of format {format} can say what this model is; the nearest: {min(of_keys, key=len)}")


def fitting_family(args: ModelArgs, format: str, came_from: str | None) -> Family:
    """The family that a model came from, if it can still say what the model is, else the first that can."""
    if came_from is not None:
        try:
            return choose_family(args, format, came_from)
        except UserError:
            pass
    return choose_family(args, format)


def written_config(family: Family, args: ModelArgs) -> dict[str, Any]:
    """The family's config of a model. UserError naming what of the model it cannot say: what it says is read back."""
    assert family.write_config is not None
    config = family.write_config(args)
    said = ModelArgs.model_validate(family.read_config(config, lambda _: None))
    ours, theirs = meaning(args, family.format == "meta"), meaning(said, family.format == "meta")
    unsaid = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if unsaid:
        own = [key for key in unsaid if ours.get(key) is not None] or unsaid  # the rest follows from these
        raise UserError(f"a {family.name} config cannot say {', '.join(_listed(own, ours, theirs))}")
    export_pairs(family, args, ParameterTable.of(args).shapes)
    return config


def _listed(keys: Sequence[str], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Keys of `meaning` with our values; of layers the parts that differ, once for all layers with the same ones."""
    layers: dict[str, list[str]] = {}
    for key in keys:
        if not isinstance(ours.get(key), LayerSpec):
            yield f"{key} ({ours.get(key)})"
            continue
        other = dict(_fields_of(theirs[key])) if key in theirs else {}
        unlike = ((name, value) for name, value in _fields_of(ours[key]) if other.get(name, other) != value)
        text = ", ".join(f"{name} ({value})" for name, value in unlike)
        layers.setdefault(text, []).append(key.removeprefix("layer "))
    for text, numbers in layers.items():
        yield f"in layer{'s' * (len(numbers) > 1)} {', '.join(sorted(numbers, key=int))}: {text}"


def _fields_of(spec: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that a layer is."""
    for part in dataclasses.fields(spec):
        value = getattr(spec, part.name)
        if dataclasses.is_dataclass(value):
            yield from _fields_of(value, f"{prefix}{part.name}.")
        else:
            yield f"{prefix}{part.name}", value


def meaning(args: ModelArgs, settled_by_weights: bool = False) -> dict[str, Any]:
    """What of the args decides the function, resolved: two models with the same meaning and weights are equal.

    settled_by_weights: leave out what Meta's params.json leaves to the tensors.
    """
    specs = args.layer_specs()
    found: dict[str, Any] = {
        key: getattr(args, key)
        for key in (
            "dim", "n_layers", "n_heads", "kv_heads", "head_width", "qkv_bias", "o_bias", "norm", "norm_eps",
            "norm_offset", "norm_place", "parallel_residual", "logit_softcap", "causal", "pos", "encoder_layers",
            "input_norm",
        )
    }  # fmt: skip
    if not settled_by_weights:
        found |= {"vocab_size": args.vocab_size, "tie_embeddings": args.tie_embeddings}
    found["norm_fp32_weight"] = args.norm_fp32_weight or args.norm_offset
    found |= {key: getattr(args, key) for key in ("final_norm_plain", "embed_norm")}
    found["logit_scale"] = args.logit_scale or 1.0
    found["post_norm_eps"] = None if args.norm_place == "pre" else args.post_norm_eps or args.norm_eps
    found["embed_scale"] = None if args.embed_scale is None else round(args.embed_scale, 4)
    scale = args.head_width**-0.5 if args.score_scale is None else args.score_scale
    found["score_scale"] = round(scale, 8)
    for i, spec in enumerate(specs):
        same = spec.attention and dataclasses.replace(spec.attention, scale=None, temperature=False)
        found[f"layer {i}"] = dataclasses.replace(spec, mixer=same or spec.mixer)
    if args.n_prediction:
        found |= {key: getattr(args, key) for key in ("n_prediction", "prediction", "pool")}
    of_values = {key: getattr(args, key) for key in ("input_dim", "output_dim", *OF_VALUES)}
    found |= {key: value for key, value in of_values.items() if value is not None}
    if args.vision is not None:
        unsaid = {"max_tiles", "patch_token_id"} if settled_by_weights else {"max_tiles"}  # of the images, not of it
        found["vision"] = args.vision.model_dump(exclude=unsaid)
    attention = attention_specs(specs)
    if any(spec.temperature for spec in attention):
        found["temperature"] = [spec.temperature for spec in attention], args.floor_scale, args.attn_scale
    if any(spec.rope for spec in attention):
        found |= {"rope_theta": args.rope_theta, "rope_scaling": _scaling(args), "rope_pct": args.rope_pct}
    if any(spec.ffn == "dense" for spec in specs):
        found |= {key: getattr(args, key) for key in ("act", "gated", "ffn_bias")} | {"ffn_hidden": args.ffn_width()}
        found["ffn_scales"] = args.ffn_scales or (1.0, 1.0)
    if args.ssm is not None and any(spec.stateful for spec in specs):
        found |= {f"ssm.{key}": value for key, value in args.ssm.model_dump(exclude=UNSAID_OF_SSM).items()}
        found |= {"ssm.widths": args.ssm.widths(args.dim), "ssm.scales": args.ssm.scales or (1.0,) * 5}
        found["ssm.norm"] = args.ssm.norm
    if any(isinstance(spec.mixer, SumSpec) for spec in specs):
        found["sum"] = args.sum or SumArgs()
    if args.moe is not None and any(spec.ffn == "moe" for spec in specs):
        moe = args.moe
        found |= {f"moe.{key}": getattr(moe, key) for key in ("n_experts", "top_k", "score", "apply", "shared")}
        found |= {"moe.hidden": args.moe_width(), "moe.renorm": moe.renorm}
        found |= {"moe.swiglu": moe.swiglu, "moe.overflow": moe.overflow}
    return found


def _scaling(args: ModelArgs) -> dict[str, Any] | None:
    """The numbers that the kind of scaling reads."""
    scaling = args.rope_scaling
    if scaling is None:
        return None
    used = {"linear": (), "dynamic": ("original_max_position",), "llama3": ("low_freq_factor", "high_freq_factor")}
    keys: tuple[str, ...] = used.get(scaling.kind, ("beta_fast", "beta_slow", "truncate", "attention_factor"))
    if scaling.kind in ("llama3", "yarn"):
        keys = (*keys, "original_max_position")
    return {"kind": scaling.kind, "factor": scaling.factor, **{key: getattr(scaling, key) for key in keys}}


@dataclass(frozen=True)
class Rotated:
    """Weights whose heads are laid out for the other kind of RoPE: the same function with rope_interleaved the other
    way. Only rows of queries and keys move, inside each head."""

    weights: Weights
    args: ModelArgs

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        if not laid_out_by_rope(self.args, name):
            return self.weights.read(name, box, out)
        width, order = self.args.head_width, self._order()
        first, last = box[0]
        low, high = first // width * width, -(-last // width) * width
        shape = (high - low, *box_shape(box)[1:])
        heads = self.weights.read(name, ((low, high), *box[1:]), torch.empty(shape, dtype=out.dtype))
        moved = heads.unflatten(0, (-1, width))[:, order].flatten(0, 1)
        return out.copy_(moved[first - low : last - low])

    def _order(self) -> Tensor:
        """Which row of a head becomes which."""
        rotated, width = self.args.rotated_width, self.args.head_width
        pairs = torch.arange(rotated)
        order = pairs.view(-1, 2) if self.args.rope_interleaved else pairs.view(2, -1)
        return torch.cat([order.t().reshape(-1), torch.arange(rotated, width)])


def laid_out_by_rope(args: ModelArgs, name: str) -> bool:
    """Whether rows of a parameter stand inside each head as rope_interleaved says: those of queries and keys that RoPE
    turns."""
    module = name.rpartition(".")[0]
    norms = ("attention.q_norm", "attention.k_norm")
    if not module.endswith(("attention.wq", "attention.wk", *norms)) or name.endswith(LORA_A):
        return False
    # a vision tower has no spec here: it rotates pairs everywhere
    spec = next((spec for spec in args.all_specs() if name.startswith(f"{spec.unit}.")), None)
    return spec is not None and spec.attention is not None and spec.attention.rope


def export_hf(
    target: Path,
    args: ModelArgs,
    weights: Weights,
    family: Family,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    extra_files: Mapping[str, bytes | Path],
    extra_config: Mapping[str, Any],
    notify: Notify = lambda _: None,
) -> None:
    """Write `target` as transformers reads it: config.json, model.safetensors (in parts with an index where it is
    larger than max_shard_bytes), and the extra files. `notify` is called with the bytes of each tensor written.

    UserError when `target` exists or the family cannot say what the model is.
    """
    said = family.read_config(written_config(family, args), lambda _: None)
    interleaved = bool(said.get("rope_interleaved", True))
    if interleaved != args.rope_interleaved:
        weights = Rotated(weights, args)
        args = args.model_copy(update={"rope_interleaved": interleaved})
    config = written_config(family, args)
    pairs = _by_key(export_pairs(family, args, ParameterTable.of(args).shapes))
    shapes = {key: shape for (_, key), shape in foreign_shapes([p for ps in pairs.values() for p in ps]).items()}
    parts = _parts(shapes, dtype, max_shard_bytes)
    # a new tensor each time would be there beside the last one
    buffer = torch.empty(max(prod(shape) for shape in shapes.values()), dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    config |= {"dtype": name, "torch_dtype": name, **extra_config}
    if isinstance(text := config.get("text_config"), dict):
        text |= {key: extra_config[key] for key in ENDS if key in extra_config}
    check_free(target)
    with new_directory(target) as folder:
        files: dict[str, str] = {}
        for i, keys in enumerate(parts):
            file = "model.safetensors" if len(parts) == 1 else f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
            described = {key: (dtype, shapes[key]) for key in keys}
            values = _tensors(keys, shapes, pairs, weights, buffer, notify)
            write_tensors(folder / file, described, values, {"format": "pt"})
            files |= {key: file for key in keys}
        if len(parts) > 1:
            total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
            _write_json(
                folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files}
            )
        _write_json(folder / "config.json", config)
        _write_extra(folder, extra_files)


def export_meta(
    target: Path,
    args: ModelArgs,
    weights: Weights,
    family: Family,
    *,
    dtype: torch.dtype,
    shards: int,
    extra_files: Mapping[str, bytes | Path],
    notify: Notify = lambda _: None,
) -> None:
    """Write `target` as Meta does: params.json and consolidated.NN.pth, one file in memory at a time."""
    if not args.rope_interleaved:
        weights = Rotated(weights, args)
        args = args.model_copy(update={"rope_interleaved": True})
    config = written_config(family, args)
    for name, number in _cut_numbers(args):
        if number % shards:
            raise UserError(f"--shards={shards} does not divide the {name}, {number}")
    if args.kv_heads % shards and shards % args.kv_heads:
        raise UserError(f"--shards={shards} and the {args.kv_heads} key and value heads do not divide each other")
    pairs = export_pairs(family, args, ParameterTable.of(args).shapes, shards)
    shapes = foreign_shapes(pairs)
    check_free(target)
    with new_directory(target) as folder:
        for shard in range(shards):
            mine = _by_key([pair for pair in pairs if pair.shard == shard])
            own = {key: shapes[shard, key] for key in mine}
            held = {key: torch.empty(shape, dtype=dtype) for key, shape in own.items()}
            for key, out in held.items():
                _fill(out, mine[key], weights)
                notify(out.nbytes)
            torch.save(held, folder / f"consolidated.{shard:02d}.pth")
            del held, out
        _write_json(folder / "params.json", config)
        _write_extra(folder, extra_files)


def _cut_numbers(args: ModelArgs) -> Iterator[tuple[str, int]]:
    """What every part of Meta's has an equal share of, for messages."""
    yield "heads", args.n_heads
    yield "feed-forward width", args.ffn_width()
    if args.vision is not None:
        yield "heads of the vision tower", args.vision.n_heads
        yield "width of the vision tower's output", args.vision.output_dim
        yield "width of the model", args.dim


def _by_key(pairs: Any) -> dict[str, list[BoxPair]]:
    found: dict[str, list[BoxPair]] = {}
    for pair in pairs:
        found.setdefault(pair.key, []).append(pair)
    return found


def _parts(shapes: Mapping[str, Shape], dtype: torch.dtype, most: int) -> list[list[str]]:
    """Tensors in their order, cut so that no part but one of a single tensor is larger than `most` bytes."""
    parts: list[list[str]] = [[]]
    filled = 0
    for key, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if parts[-1] and filled + size > most:
            parts.append([])
            filled = 0
        parts[-1].append(key)
        filled += size
    return parts


def _tensors(
    keys: list[str],
    shapes: Mapping[str, Shape],
    pairs: Mapping[str, list[BoxPair]],
    weights: Weights,
    buffer: Tensor,
    notify: Notify,
) -> Iterator[Tensor]:
    """Foreign tensors one at a time, each in the same memory."""
    for key in keys:
        out = buffer[: prod(shapes[key])].view(shapes[key])
        _fill(out, pairs[key], weights)
        notify(out.nbytes)
        yield out


def _fill(out: Tensor, pairs: list[BoxPair], weights: Weights) -> None:
    if sum(prod(box_shape(pair.theirs)) for pair in pairs) < out.numel():
        out.zero_()  # rows that nothing reads
    for pair in pairs:
        for box in _chunks(pair.mine):
            part = pair.within(box)
            assert part is not None
            target, narrow = boxed(out, part.theirs), out.dtype == torch.float16
            if target.is_contiguous() and not part.turned and not narrow:
                weights.read(part.name, box, target.view(box_shape(box)))
                continue
            values = torch.empty(box_shape(box), dtype=torch.float32 if narrow else out.dtype)
            theirs = part.to_theirs(weights.read(part.name, box, values))
            target.copy_(theirs)
            if narrow:  # bfloat16 reaches as far as float32, but for its last rounding
                check_range(part.key, theirs, target)


def _chunks(box: Box) -> Iterator[Box]:
    """The box in parts of some rows, of CHUNK_BYTES in float32."""
    dim = next((i for i, (first, last) in enumerate(box[:-1]) if last - first > 1), max(0, len(box) - 2))
    before, (first, last), after = box[:dim], box[dim], box[dim + 1 :]
    step = CHUNK_BYTES // max(1, 4 * prod(box_shape(after)))
    for at in range(first, last, max(1, step)):
        part = (*before, (at, min(at + max(1, step), last)), *after)
        if step == 0 and len(after) > 1:  # the matrix of one expert is larger
            yield from _chunks(part)
        else:
            yield part


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_extra(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(content)
