"""What two run configs, one of them perhaps written by an older version, do not have in common."""

from typing import Any

from pydantic import BaseModel

from llm.train.config import RunConfig
from llm.train.config.explain import section_of

# Keys whose change on resume keeps the mathematics of the run: how it is cut and computed, how long it is, what is
# watched; and model.lora, which the section lora sets.
FREE_ON_RESUME = (
    "model.init_from", "model.lora", "model.ssm.kernel", "lora.init_from",
    "parallel", "train.steps", "train.epochs", "train.global_batch_size", "train.batch_schedule",
    "train.micro_batch_size", "train.threads", "train.compile", "train.activation_checkpointing", "train.skip_steps",
    "guard", "checkpoint", "eval", "log", "data", "tokenizer", "deepspeed", "extensions",
)  # fmt: skip


def refused_changes(saved: dict[str, Any], now: dict[str, Any], allowed: tuple[str, ...] = ()) -> list[str]:
    """Lines `key: saved -> now` for every key that must not change on resume and did."""
    changed = changes(saved, now).items()
    return [f"{k}: {was!r} -> {value!r}" for k, (was, value) in changed if not is_among(k, FREE_ON_RESUME + allowed)]


def changes(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(value in `saved`, value now) of every key that differs, by name.

    A key that either does not have, because it was written before the key existed or is left out at its default, stands
    at that.
    """
    flat_saved, flat_now = (_flatten(_completed(config, RunConfig)) for config in (saved, now))
    pairs = {key: (flat_saved.get(key), flat_now.get(key)) for key in sorted(flat_saved.keys() | flat_now.keys())}
    return {key: (was, value) for key, (was, value) in pairs.items() if was != value}


def is_among(key: str, keys: tuple[str, ...]) -> bool:
    """Whether the key, or a section that it stands in, is one of `keys`."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in keys)


def _completed(saved: dict[str, Any], schema: type[BaseModel]) -> dict[str, Any]:
    """A config with the schema's default for every key that it lacks."""
    filled = dict(saved)
    for name, info in schema.model_fields.items():
        inner = section_of(info.annotation)
        if name not in filled and not info.is_required():
            default = info.get_default(call_default_factory=True)
            filled[name] = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
        elif inner is not None and isinstance(filled.get(name), dict):
            filled[name] = _completed(filled[name], inner)
    return filled


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
