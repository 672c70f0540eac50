"""A trained model and its tokenizer, read back from a run folder or a checkpoint on one process, without DeepSpeed."""

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from llm.args import ModelArgs
from llm.atomic import new_directory
from llm.checkpoint.reader import Checkpoint, resolve
from llm.errors import UserError
from llm.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer

TOKENIZER_FOLDER = "tokenizer"


def model_args(checkpoint: Checkpoint) -> ModelArgs:
    """The ModelArgs that the checkpoint was trained with."""
    return ModelArgs.model_validate(checkpoint.meta["config"]["model"])


def fill_from_checkpoint(model: nn.Module, checkpoint: Checkpoint, average: bool = False) -> None:
    """Copy the float32 masters, or their moving average, into `model` (cast to its dtype). UserError when a parameter
    is missing or has another shape, or there is no average.
    """
    kind = "ema" if average else "master"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found, expected = checkpoint.shapes.get(name), tuple(parameter.shape)
            if found != expected:
                raise UserError(f"{checkpoint.path}: {name} has shape {found}, expected {expected}")
            if kind not in checkpoint.kinds()[name]:
                raise UserError(f"{checkpoint.path}: holds no averaged weights; the run had no optim.ema_decay")
            parameter.copy_(checkpoint.read(name, kind).view(parameter.shape))
    for buffer in model.buffers():  # counts of a training step, of no use to a finished model
        buffer.zero_()


def save_tokenizer(tokenizer: Tokenizer, run_dir: Path) -> None:
    """Keep the tokenizer in the run folder, whole or not at all: the folder alone is then enough to generate text."""
    folder = run_dir / TOKENIZER_FOLDER
    if folder.exists():
        if load_run_tokenizer(run_dir).fingerprint == tokenizer.fingerprint:
            return
        shutil.rmtree(folder)
    with new_directory(folder) as temporary:
        config = tokenizer.save(temporary)
        (temporary / "config.json").write_text(config.model_dump_json() + "\n")


def load_run_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run folder, or of the run that a checkpoint folder lies in."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or folder")
    for folder in (Path(path), *Path(path).resolve().parents[:2]):
        file = folder / TOKENIZER_FOLDER / "config.json"
        if file.exists():
            try:
                config = TokenizerConfig.model_validate(json.loads(file.read_text()))
            except ValueError:
                raise UserError(f"{file}: damaged: not a tokenizer config") from None
            return load_tokenizer(config, base=file.parent)
    raise UserError(f"{path}: no {TOKENIZER_FOLDER}/config.json in the run folder, so text cannot be read or written")


def load_checkpoint(path: str | Path) -> tuple[Checkpoint, ModelArgs]:
    """The checkpoint meant by `path` (run folder, checkpoints folder or checkpoint) and its ModelArgs."""
    checkpoint = resolve(path)
    return checkpoint, model_args(checkpoint)
