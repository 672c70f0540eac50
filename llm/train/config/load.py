"""A run config from its YAML file and the overrides of the command line."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llm.args import ModelArgs
from llm.args.lora import DEFAULT_TARGETS
from llm.args.model import OF_OUTPUTS, OUTPUTS, SETTLED, with_dropout
from llm.errors import UserError
from llm.extensions import load as load_extensions
from llm.shipped import found, run_config
from llm.train.config.explain import by_commas, explain, prepared
from llm.train.config.overrides import put
from llm.train.config.schema import RunConfig
from llm.train.config.yaml_file import read_yaml


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a YAML run config, apply `{"train.steps": 200}`-like overrides, validate. `path` may be the name of a config
    that ships with Lattice.

    Raises UserError naming the file or the key; nothing else is touched.
    """
    return config_of(read_yaml(run_config(path)), str(path), overrides)


def config_of(raw: dict[str, Any], where: str, overrides: dict[str, Any] | None = None) -> RunConfig:
    """The same of what such a file says, which is left as it is; `where` is what messages call it."""
    raw = deepcopy(raw)
    model = raw.get("model")
    for key, value in (overrides or {}).items():
        if key == "model":
            model = raw["model"] = value
    if isinstance(model, str):
        raw["model"] = read_yaml(found(model))
    for key, value in (overrides or {}).items():
        if key != "model":
            put(raw, key, value, RunConfig)
    _complete_from_adapter(raw, where)
    _complete_from_weights(raw, where)
    return validate(raw, where)


def _complete_from_adapter(raw: dict[str, Any], where: str) -> None:
    """Fill in what `lora.init_from` knows: what the adapter is, which what is given beside it must not contradict, and
    where its base lies, if the config names none. An adapter that is written out needs the folder no more.
    """
    section = raw.get("lora")
    source = section.get("init_from") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(source, str):
        return
    if "rank" in section and not Path(source).exists():
        return
    from llm.checkpoint.frozen import Taken  # these import torch
    from llm.pretrained import adapter_of

    try:
        lora, _, origin, _ = adapter_of(source, _base_given(raw))
    except UserError as error:
        raise UserError(f"{where}: lora.init_from: {error}") from None
    said = lora.model_dump(mode="json", exclude={"dropout"})
    for key, value in said.items():
        given = section.get(key, value)
        if given != value and (key != "targets" or _targets(given) != _targets(value)):
            raise UserError(f"{where}: lora.{key}={given} is not {value}, as in lora.init_from={source}; leave it out")
    raw["lora"] = section | said
    model = raw.get("model") or {}
    if isinstance(origin, Taken) and isinstance(model, dict):
        raw["model"] = {"init_from": origin.path} | model


def _base_given(raw: dict[str, Any]) -> str | None:
    """What the config itself says of where a base is."""
    model = raw.get("model")
    given = model.get("init_from") if isinstance(model, dict) else None
    return given if isinstance(given, str) and Path(given).exists() else None


def _targets(value: Any) -> set[str]:
    return set(by_commas(value) or DEFAULT_TARGETS)


def _complete_from_weights(raw: dict[str, Any], where: str) -> None:
    """Fill in what `model.init_from` knows: the model, and its tokenizer if the config names none. A model that is
    written out needs the folder no more, as when a run is continued."""
    model = raw.get("model")
    source = model.get("init_from") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(source, str) or ("dim" in model and not Path(source).exists()):
        return
    from llm.pretrained import args_of, tokenizer_config_of  # they import torch

    try:
        model = with_dropout(model)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    try:
        own = args_of(source, notify=None).model_dump(mode="json")  # the run says them when it begins
        own = _with_its_head(own, model)
        groups = {key: own[key] | value for key, value in model.items() if _is_group(value) and _is_group(own.get(key))}
        raw["model"] = own | model | groups
        if "tokenizer" not in raw:
            raw["tokenizer"] = tokenizer_config_of(source, notify=None).model_dump(mode="json")
    except UserError as error:
        raise UserError(f"{where}: model.init_from: {error}") from None


def _with_its_head(own: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The keys of the model that is begun with: of its prediction head's none where the config's model has another one
    or is written out, which leaves out a key that has its default. What it learned of its labels a run settles.
    """
    there = {key: own.get(key, ModelArgs.model_fields[key].default) for key in OUTPUTS}
    same = "dim" not in model and all(str(model.get(key, value)) == str(value) for key, value in there.items())
    left_out = SETTLED if same else (*OUTPUTS, *OF_OUTPUTS, *SETTLED)
    return {key: value for key, value in own.items() if key not in left_out}


def _is_group(value: Any) -> bool:
    return isinstance(value, dict)


def validate(raw: dict[str, Any], where: str) -> RunConfig:
    """RunConfig of a nested dict, whose extensions are run; UserError with one line that names the first wrong key."""
    asked = by_commas(raw.get("extensions"))
    if isinstance(asked, list | tuple):  # else the schema says what is wrong with it
        load_extensions(str(path) for path in asked)
    try:
        return RunConfig.model_validate(prepared(raw, RunConfig))
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, RunConfig)}") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
