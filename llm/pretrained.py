"""Whatever a path to a model means: a run folder, a checkpoint, a model folder of ours, a foreign one, or an adapter of
PEFT beside its base; read without DeepSpeed.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from llm.adapters.int8 import Rounded
from llm.adapters.merge import Merged, refuse_incomplete
from llm.adapters.peft_folder import HeldTensors, PeftFolder, is_peft, open_peft
from llm.adapters.vocabulary import grown
from llm.args import LoraArgs, ModelArgs
from llm.boxes import whole
from llm.checkpoint.fragments import DTYPES
from llm.checkpoint.frozen import Completed, Drawn, Frozen, Origin, Seed, Taken, frozen_in
from llm.checkpoint.reader import Checkpoint, resolve
from llm.checkpoint.run_folder import (
    fill_from_checkpoint,
    load_checkpoint,
    load_run_tokenizer,
    model_args,
    run_tokenizer_config,
)
from llm.checkpoint.weights import CheckpointWeights, Weights
from llm.errors import UserError
from llm.foreign.export import fitting_family
from llm.foreign.family import Family
from llm.foreign.files import ForeignModel, is_foreign, open_foreign
from llm.layers.prediction import PREDICTION
from llm.model import LLM
from llm.parameters import ParameterTable
from llm.tokenizer import Tokenizer, TokenizerConfig
from llm.tokenizers.chat import ChatTemplate, open_template
from llm.tokenizers.chat.find import template_in
from llm.tokenizers.folder import foreign_tokenizer

Notify = Callable[[str], object]
LOG = logging.getLogger(__name__)


def log_note(line: str) -> None:
    """Where notes about a folder go unless a caller has a place for them: the logger `llm.pretrained`, which writes to
    stderr where nobody has set up logging."""
    LOG.warning("note: %s", line)


def read_foreign(path: Path, notify: Notify | None = log_note, text_only: bool = False) -> ForeignModel:
    """The model in a foreign folder, text_only: without its vision tower; `notify` gets a line for everything that the
    folder leaves open or says twice; None where the same folder is read again by what reports it."""
    source = open_foreign(path, text_only=text_only)
    if notify is not None:
        for line in source.warnings:
            notify(f"{path}: {line}")
    return source


def load_model(path: str | Path, dtype: torch.dtype, average: bool = False, text_only: bool = False) -> LLM:
    """See LLM.from_pretrained."""
    path = Path(path)
    if text_only and not is_foreign(path):
        raise UserError(f"{path}: text_only is of foreign folders; of one of ours all is read")
    if average and (is_foreign(path) or is_peft(path)):
        raise UserError(f"{path}: holds no averaged weights")
    if is_peft(path):
        return _filled(*weights_of(path), dtype)
    if is_foreign(path):
        source = read_foreign(path, text_only=text_only)
        weights = source.weights()
        weights.check_twins()
        return _filled(source.args, weights, dtype)
    checkpoint, args = load_checkpoint(path)
    frozen = frozen_in(checkpoint)
    if frozen is not None or model_args(checkpoint).lora is not None:
        return _filled(args, checkpoint_weights(checkpoint, average), dtype)
    model = _empty(args, dtype)
    fill_from_checkpoint(dict(model.named_parameters()), checkpoint, average)
    return model.eval()


def _empty(args: ModelArgs, dtype: torch.dtype) -> LLM:
    """A model whose parameters are yet to be filled."""
    model = LLM(args, device="meta").to_empty(device="cpu").to(dtype)
    for buffer in model.buffers():  # counts of a training step, of no use to a finished model
        buffer.zero_()
    return model


@torch.no_grad()
def _filled(args: ModelArgs, weights: Weights, dtype: torch.dtype) -> LLM:
    model = _empty(args, dtype)
    for name, parameter in model.named_parameters():
        weights.read(name, whole(tuple(parameter.shape)), parameter)
    return model.eval()


def tokenizer_of(path: str | Path, notify: Notify | None = log_note) -> Tokenizer:
    """The tokenizer that belongs to a model; UserError when there is none. `notify`: see read_foreign."""
    path = tokenizer_folder(Path(path))
    if is_foreign(path) or is_peft(path):
        return _foreign_tokenizer(path, notify)[0]
    return load_run_tokenizer(path)


def tokenizer_folder(path: Path) -> Path:
    """Where the tokenizer of a model lies: of an adapter of PEFT beside it, or with its base."""
    if not is_peft(path) or any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return path
    return tokenizer_folder(base_of(open_peft(path)))


def chat_template_of(path: str | Path, tokenizer: Tokenizer, choice: str = "auto") -> ChatTemplate:
    """The chat template that belongs to a model, or another `choice` (llm.tokenizers.chat.find); UserError when there
    is none that can be used with its tokenizer."""
    return open_template(choice, tokenizer, _template_folder(path))


def template_beside(path: str | Path) -> str | None:
    """The text of the chat template that lies beside a model's tokenizer; None where there is none. UserError where
    there is no tokenizer."""
    found = template_in(_template_folder(path))
    return None if found is None else found.text


def _template_folder(path: str | Path) -> Path:
    path = tokenizer_folder(Path(path))
    return path if is_foreign(path) or is_peft(path) else run_tokenizer_config(path)[1]


def template_for(origin: Path | None, tokenizer: Tokenizer, choice: str) -> ChatTemplate:
    """The same for a model that may have been read nowhere."""
    return open_template(choice, tokenizer) if origin is None else chat_template_of(origin, tokenizer, choice)


def _foreign_tokenizer(path: Path, notify: Notify | None) -> tuple[Tokenizer, TokenizerConfig]:
    found, config = foreign_tokenizer(path)
    if notify is not None:
        for line in getattr(found, "notes", ()):
            notify(f"{path}: {line}")
    return found, config


def tokenizer_config_of(path: str | Path, notify: Notify | None = log_note) -> TokenizerConfig:
    """How a run config names the tokenizer that belongs to a model. `notify`: see read_foreign."""
    path = tokenizer_folder(Path(path))
    if is_foreign(path) or is_peft(path):
        config, folder = _foreign_tokenizer(path, notify)[1], path
    else:
        config, folder = run_tokenizer_config(path)
    return config if config.path is None else config.model_copy(update={"path": str((folder / config.path).resolve())})


def args_of(path: str | Path, notify: Notify | None = log_note) -> ModelArgs:
    """What the model is, from its config and the headers of its files. `notify`: see read_foreign."""
    path = Path(path)
    if is_peft(path):
        return _base_with(open_peft(path), notify)[0]
    return read_foreign(path, notify).args if is_foreign(path) else load_checkpoint(path)[1]


def dtype_of(path: str | Path) -> torch.dtype:
    """What the model was made for: of a run the precision that it was trained in, else the dtype of its weights."""
    path = Path(path)
    if is_peft(path):
        return dtype_of(base_of(open_peft(path)))
    if is_foreign(path):
        found = read_foreign(path, None).files.dtype()
        return found if found in (torch.bfloat16, torch.float16) else torch.float32
    checkpoint, _ = load_checkpoint(path)
    trained = checkpoint.meta_with("config")["config"].get("train", {}).get("precision")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trained, DTYPES[checkpoint.dtype()])


def weights_of(path: str | Path, notify: Notify | None = log_note) -> tuple[ModelArgs, Weights]:
    """What the model is, and its parameters in boxes, of which only what is asked for is read. `notify`: see
    read_foreign."""
    path = Path(path)
    if is_peft(path):
        return _with_base(open_peft(path), notify)
    if is_foreign(path):
        source = read_foreign(path, notify)
        return source.args, source.weights()
    checkpoint, args = load_checkpoint(path)
    return args, checkpoint_weights(checkpoint)


def base_of(folder: PeftFolder) -> Path:
    """The base of an adapter of PEFT. UserError where it is nowhere here."""
    if folder.local_base is None:
        named = f"base_model_name_or_path={folder.base}" if folder.base else "which it does not name"
        raise UserError(f"{folder.path}: its base, {named}, is no folder here; give that as model.init_from")
    if is_peft(folder.local_base):
        raise UserError(f"{folder.path}: its base, {folder.local_base}, is an adapter itself")
    return folder.local_base


def _with_base(folder: PeftFolder, notify: Notify | None) -> tuple[ModelArgs, Weights]:
    """The model that an adapter of PEFT and its base make together."""
    args, weights = _base_with(folder, notify)
    base = base_of(folder)
    adapted, tensors = folder.adapter(args, transformers_family(base), weights)
    if isinstance(folder.origin, Taken):
        check_origin(Taken(str(base), folder.origin.digest))
    return args, Merged(Completed(HeldTensors(tensors), ParameterTable.of(args).keys(), weights), adapted)


def _base_with(folder: PeftFolder, notify: Notify | None, base: str | Path | None = None) -> tuple[ModelArgs, Weights]:
    """The base of an adapter of PEFT, with its tokens. base: where it is, if not where the adapter says."""
    where = base_of(folder) if base is None else base
    return folder.grown(*weights_of(where, notify), transformers_family(where))


def transformers_family(path: str | Path) -> Family:
    """As which family transformers knows a model. UserError where it knows none."""
    path = Path(path)
    if is_foreign(path):
        source = read_foreign(path, None)
        return fitting_family(source.args, "hf", source.family.name)
    checkpoint, args = load_checkpoint(path)
    return fitting_family(args, "hf", checkpoint.meta.get("source", {}).get("family"))


def checkpoint_weights(checkpoint: Checkpoint, average: bool = False) -> Weights:
    """All parameters of a checkpoint's model, adapters added to their weights; or the moving average of those that
    train. What is frozen is read from where it came from: UserError where that is gone, or is another one.
    """
    args = model_args(checkpoint)
    weights = unmerged_weights(checkpoint, average)
    if args.lora is None:
        return weights
    refuse_incomplete(checkpoint.path, args, checkpoint.shapes)
    return Merged(weights, args)


def unmerged_weights(checkpoint: Checkpoint, average: bool = False) -> Weights:
    """The same with adapters as parameters of their own."""
    trained, frozen = CheckpointWeights(checkpoint, average), frozen_in(checkpoint)
    if frozen is None:
        return trained
    args = model_args(checkpoint)
    origin = verified_origin(frozen, args)
    if args.lora is not None and args.lora.base == "int8":
        rows = ParameterTable.of(args).adapters_alone(int8=True)
        origin = Rounded(origin.read, {name: row.shape for name, row in rows.items() if row.int8})
    return Completed(trained, frozen.shapes.keys(), origin)


class AdapterSource(NamedTuple):
    """An adapter in a folder, without its base."""

    lora: LoraArgs
    weights: Weights
    """Of its parameters."""
    origin: Origin | None
    """Of its base; None where nothing says what that was."""
    head: ModelArgs | None = None
    """Of its model, where `weights` have a prediction head too."""


def adapter_of(path: str | Path, base: str | Path | None = None) -> AdapterSource:
    """The adapter of a run, a checkpoint or a folder of PEFT. base: where the base of the last is, if not where that
    says. UserError where it has none, or only a part of one.
    """
    if is_peft(Path(path)):
        return _peft_adapter(open_peft(Path(path)), base)
    if is_foreign(Path(path)):
        raise UserError(f"{path}: holds a whole model and no adapter; begin with it as model.init_from")
    checkpoint = resolve(path)
    args, frozen = model_args(checkpoint), frozen_in(checkpoint)
    if args.lora is None or frozen is None:
        raise UserError(f"{path}: holds a whole model and no adapter; begin with it as model.init_from")
    refuse_incomplete(checkpoint.path, args, checkpoint.shapes)
    head = args if f"{PREDICTION}.weight" in checkpoint.shapes else None
    return AdapterSource(args.lora, CheckpointWeights(checkpoint), frozen.origin, head)


def _peft_adapter(folder: PeftFolder, base: str | Path | None) -> AdapterSource:
    where = base_of(folder) if base is None else base
    args, weights = _base_with(folder, None, where)
    adapted, tensors = folder.adapter(args, transformers_family(where), weights)
    assert adapted.lora is not None
    origin = folder.origin
    if origin is None and folder.local_base is not None:
        origin = taken_from(folder.local_base)
    return AdapterSource(adapted.lora, HeldTensors(tensors), origin)


def verified_origin(frozen: Frozen, args: ModelArgs) -> Weights:
    """The weights that frozen parameters came from, after a look at whether they are still the same."""
    if isinstance(frozen.origin, Taken):
        check_origin(frozen.origin)
    return open_origin(frozen.origin, args)


def open_origin(origin: Origin, args: ModelArgs) -> Weights:
    """The weights that frozen parameters came from, unverified, those of a model with these args: initial ones, or with
    more tokens than they were of."""
    if isinstance(origin, Seed):
        return Drawn(ParameterTable.of(args), origin.seed)
    return grown(*weights_of(origin.path, notify=None), args.vocab_size)[1]


def check_origin(origin: Taken) -> None:
    """UserError where the folder that frozen parameters came from is gone, or does not hold what it held."""
    if not Path(origin.path).exists():
        raise UserError(
            f"{origin.path}: is gone, and holds the parameters that the run does not train; where it was moved to, "
            f"give the run model.init_from"
        )
    if taken_from(origin.path).digest != origin.digest:
        raise UserError(
            f"{origin.path}: holds other weights than those that the parameters which the run does not train came from"
        )


def taken_from(path: str | Path) -> Taken:
    """The folder that a path means now, and the digest of its weights: a checkpoint's or model folder's manifest has
    one; of a foreign folder every file is read.
    """
    path = Path(path)
    if is_peft(path):
        folder = open_peft(path)
        content = f"{_file_digest(folder.file.path)}\n{taken_from(base_of(folder)).digest}"
        return Taken(str(path.resolve()), hashlib.sha256(content.encode()).hexdigest()[:32])
    if not is_foreign(path):
        checkpoint = resolve(path)
        return Taken(str(checkpoint.path.resolve()), checkpoint.digest)
    source = read_foreign(path, None)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing and reading leave Python's lock
        found = list(pool.map(_file_digest, source.files.paths()))
    content = "\n".join([source.family.name, *found])
    return Taken(str(path.resolve()), hashlib.sha256(content.encode()).hexdigest()[:32])


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
