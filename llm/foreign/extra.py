"""What goes beside weights into a foreign folder: the files that came with the model, and its tokenizer."""

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.args import ModelArgs
from llm.checkpoint.model_folder import KEPT
from llm.checkpoint.reader import Checkpoint
from llm.checkpoint.run_folder import TEMPLATE_FILE, run_tokenizer_config
from llm.errors import NoTokenizer, UserError
from llm.foreign import processor
from llm.tokenizer import Tokenizer
from llm.tokenizers.chat.find import template_in
from llm.tokenizers.export import export_tokenizer, exported_as_it_came
from llm.tokenizers.extended import ExtendedTokenizer
from llm.tokenizers.folder import TOKENIZER_FILES, FolderTokenizer

OF_MODEL = ("generation_config.json", *processor.FILES)
"""Files that a model has whatever its tokenizer is."""
BESIDE = (*TOKENIZER_FILES, *processor.FILES)


@dataclass
class Extra:
    """What goes with weights into a foreign folder."""

    files: dict[str, bytes | Path] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Beside:
    """What lies beside the weights of a model."""

    files: Mapping[str, Path]
    """Those that came with it, by name."""
    template: str | None
    """Its chat template."""

    @classmethod
    def checkpoint(cls, checkpoint: Checkpoint) -> "Beside":
        kept = checkpoint.path / KEPT
        files = {file.name: file for file in sorted(kept.iterdir()) if file.is_file()} if kept.is_dir() else {}
        return cls(files, _template_beside(checkpoint))

    @classmethod
    def foreign(cls, folder: Path) -> "Beside":
        """Of a foreign folder, or of an adapter's alone."""
        source = template_in(folder)
        files = {name: folder / name for name in BESIDE if (folder / name).is_file()}
        return cls(files, None if source is None else source.text)

    def over(self, base: "Beside") -> "Beside":
        """What lies beside an adapter, with what its base has and it has not: a tokenizer is of one of both alone."""
        own = any(name.startswith("tokenizer.") for name in self.files)
        theirs = {name: file for name, file in base.files.items() if not own or name in OF_MODEL}
        return Beside({**theirs, **self.files}, self.template or base.template)


def kept_files(beside: Beside, args: ModelArgs, tokenizer: Tokenizer | None, family: str | None) -> Extra:
    """Files that came with the model, its tokenizer in the form that others read, and how pictures become tiles.

    family: as which family of Hugging Face's format it is written, whose tokenizer files are then such that
    AutoTokenizer gives this tokenizer's ids; None for Meta's format, which gets the tokenizer's own file.
    """
    found = Extra(dict(beside.files))
    came = {name: found.files.pop(name) for name in processor.FILES if name in found.files}
    if args.vision is not None and family is not None:
        found.files |= processor.files_of(args, came)
    if tokenizer is None:
        if not any(name.startswith("tokenizer") for name in found.files):
            found.notes.append("written without a tokenizer, as there is none")
        return found
    ends = list(tokenizer.end_ids)
    found.config = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    template = beside.template
    if family is not None and not exported_as_it_came(tokenizer, found.files, family):
        try:
            export = export_tokenizer(tokenizer, finds_control=template is not None)
        except UserError as error:
            found.notes.append(f"written without a tokenizer that transformers reads: {error}")
        else:
            for name in (
                "tokenizer_config.json",
                "special_tokens_map.json",
                "added_tokens.json",
                "vocab.json",
                "merges.txt",
            ):
                found.files.pop(name, None)
            generation = found.files.get("generation_config.json")
            found.files |= export.files
            if generation is not None:
                found.files["generation_config.json"] = generation
            found.config, found.notes = export.config, [*found.notes, *export.notes]
    if family is not None and template is not None:
        found.files[TEMPLATE_FILE] = template.encode()
    found.files.setdefault("generation_config.json", _json(found.config))
    if args.vision is not None and args.vision.kind == "tiles" and family is not None:
        found.config = {**found.config, **processor.marks_of(tokenizer)}
    if not any(name.startswith("tokenizer.") for name in found.files) or tokenizer.kind == "sentencepiece":
        found.files |= {name: content for name, content in own_files(tokenizer).items() if name not in found.files}
    return found


def _template_beside(checkpoint: Checkpoint) -> str | None:
    """The chat template of the run that a checkpoint lies in."""
    with suppress(NoTokenizer):
        source = template_in(run_tokenizer_config(checkpoint.path)[1])
        return None if source is None else source.text
    return None


def own_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's own file, tokenizer.model for SentencePiece and tiktoken, for those that read no tokenizer.json;
    none for kinds that nobody else knows."""
    inner: Tokenizer = tokenizer
    while isinstance(inner, FolderTokenizer | ExtendedTokenizer):
        inner = inner.inner
    with tempfile.TemporaryDirectory() as folder:
        config = inner.save(Path(folder))
        if config.path is None:
            return {}
        return {config.path: (Path(folder) / config.path).read_bytes()}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
