"""A trained model and its tokenizer, read back from a run folder or a checkpoint on one process, without DeepSpeed."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from llm.args import ModelArgs
from llm.atomic import new_directory, write_unless_same
from llm.boxes import whole
from llm.checkpoint.reader import MANIFEST, Checkpoint, resolve
from llm.errors import DamagedFile, NoTokenizer, UserError
from llm.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from llm.tokenizers.chat.find import FILE as TEMPLATE_FILE

TOKENIZER_FOLDER, CONFIG_FILE = "tokenizer", "config.json"


def model_args(checkpoint: Checkpoint) -> ModelArgs:
    """The ModelArgs that the checkpoint was trained with, adapters among them. DamagedFile naming its manifest where
    there are none."""
    try:
        model = dict(checkpoint.meta_with("config")["config"]["model"])
        model.pop("init_from", None)  # says where a run began
        if model.get("ssm") is not None:  # what the run computed with may not be where the model is read
            model["ssm"] = {key: value for key, value in model["ssm"].items() if key != "kernel"}
        if "thresholds" in checkpoint.meta:
            model["route"] = {**model["route"], "thresholds": checkpoint.meta["thresholds"]}
        return ModelArgs.model_validate(model)
    except (KeyError, TypeError, ValueError) as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else ""
        raise DamagedFile(
            f"{checkpoint.path / MANIFEST}: meta.config.model is no model that this version knows"
            f"{f': {why}' if why else ''}{_had_extensions(checkpoint)}"
        ) from None


def _had_extensions(checkpoint: Checkpoint) -> str:
    """End of a message about a model that is not known: files that its run had, for the user to name, as nothing that
    is read as data runs a file by itself."""
    config = checkpoint.meta.get("config")
    files = config.get("extensions") if isinstance(config, dict) else None
    if not isinstance(files, list) or not files:
        return ""
    return f"; its run had --extensions={','.join(map(str, files))}"


def fill_from_checkpoint(
    parameters: Mapping[str, nn.Parameter], checkpoint: Checkpoint, average: bool = False
) -> None:
    """Copy the float32 masters, or their moving average, into parameters (cast to their dtype), which go by their
    canonical names. UserError when one is missing or has another shape, or there is no average.
    """
    kind, kinds = "ema" if average else "master", checkpoint.kinds()
    places = []
    with torch.no_grad():
        for name, parameter in parameters.items():
            found, expected = checkpoint.shapes.get(name), tuple(parameter.shape)
            if found != expected:
                raise UserError(f"{checkpoint.path}: {name} has shape {found}, expected {expected}")
            if kind not in kinds[name]:
                raise UserError(f"{checkpoint.path}: holds no averaged weights; the run had no optim.ema_decay")
            places.append((name, kind, whole(expected), 0, parameter.numel(), parameter.view(-1)))
        checkpoint.fill(places)


def save_tokenizer(tokenizer: Tokenizer, run_dir: Path) -> str | None:
    """Keep the tokenizer in the run folder, whole or not at all: the folder alone is then enough to generate text.

    Returns a line that says what was there instead, where that had to be replaced.
    """
    folder = run_dir / TOKENIZER_FOLDER
    note = None
    if os.path.lexists(folder):
        try:
            if _read_tokenizer(folder).fingerprint == tokenizer.fingerprint:
                return None
            note = f"{folder}: held another tokenizer than the run's; written anew"
        except UserError as error:
            note = f"{error}; {folder} is written anew"
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink()
    with new_directory(folder) as temporary:
        config = tokenizer.save(temporary)
        (temporary / CONFIG_FILE).write_text(config.model_dump_json() + "\n")
    return note


def save_template(source: str, run_dir: Path) -> None:
    """Keep the text of a run's chat template beside its tokenizer."""
    write_unless_same(run_dir / TOKENIZER_FOLDER / TEMPLATE_FILE, source.encode())


def load_run_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run folder, or of the run that a checkpoint folder lies in. UserError naming the file when
    it is not the one that the checkpoint was trained with.
    """
    checkpoint = resolve(path)
    config, folder = run_tokenizer_config(path)
    tokenizer = load_tokenizer(config, base=folder)
    if tokenizer.fingerprint != checkpoint.meta_with("tokenizer")["tokenizer"]:
        raise UserError(
            f"{folder}: damaged: its files hold another tokenizer than the one that {checkpoint.path} was "
            f"trained with; the run's own command writes them anew"
        )
    return tokenizer


def run_tokenizer_config(path: str | Path) -> tuple[TokenizerConfig, Path]:
    """The config of the tokenizer of a run folder, or of the run that a checkpoint folder lies in, and the folder of
    its files. UserError where there is none."""
    for run_dir in (Path(path), *Path(path).resolve().parents[:2]):
        folder = run_dir / TOKENIZER_FOLDER
        if os.path.lexists(folder / CONFIG_FILE):
            return _read_config(folder), folder
    raise NoTokenizer(
        f"{path}: no {TOKENIZER_FOLDER}/{CONFIG_FILE} in the run folder, so text cannot be read or written"
    )


def _read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder; UserError names the file that is missing or makes no sense."""
    return load_tokenizer(_read_config(folder), base=folder)


def _read_config(folder: Path) -> TokenizerConfig:
    file = folder / CONFIG_FILE
    try:
        return TokenizerConfig.model_validate(json.loads(file.read_bytes()))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file}: damaged: not a tokenizer config") from None


def load_checkpoint(path: str | Path) -> tuple[Checkpoint, ModelArgs]:
    """The checkpoint meant by `path` (run folder, checkpoints folder or checkpoint) and the ModelArgs of its model, its
    adapters being added to their weights."""
    checkpoint = resolve(path)
    return checkpoint, model_args(checkpoint).merged
