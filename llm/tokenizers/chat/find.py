"""Which chat template a run or a model has: the one that came with its tokenizer, one of ours, or a file."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm import shipped
from llm.errors import UserError
from llm.tokenizers.auto import read_json
from llm.tokenizers.base import Tokenizer
from llm.tokenizers.chat.render import Renderer
from llm.tokenizers.chat.template import PROBES, ChatTemplate, names_of_marks
from llm.tokenizers.extended import with_tokens
from llm.tokenizers.folder import COPY

OWN = Path(__file__).parent / "templates"
FILE = "chat_template.jinja"
"""Where a template lies beside a tokenizer."""
CONTROLS: dict[str, tuple[str, ...]] = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama4": ("<|header_start|>", "<|header_end|>", "<|eot|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
}
"""Our own templates, and the control tokens that each writes."""
LOOKS_LIKE_CONTROL = re.compile(r"<\|[^|<>\s]{1,60}\|>|<(?:start|end)_of_turn>")


@dataclass(frozen=True)
class Source:
    """A template's text, and what messages call it."""

    text: str
    name: str


def open_template(
    choice: str, tokenizer: Tokenizer, folder: str | Path | None = None, add_tokens: bool = False
) -> ChatTemplate:
    """The template that `chat.template` means.

    choice: auto (the template that lies in `folder`, where the tokenizer came from), llama3, llama4, chatml, gemma,
    mistral, or the path of a .jinja file. add_tokens: control tokens of it that the tokenizer lacks join the template's
    `tokenizer`. UserError naming the template where there is none, or it cannot be used.
    """
    source = find_source(choice, folder)
    missing = list(_missing(choice, source, tokenizer))
    if missing and not add_tokens:
        raise UserError(
            f"{source.name} writes control tokens that the tokenizer lacks: {', '.join(missing)}; "
            f"chat.add_tokens=true adds them to it, or choose another template (chat.template)"
        )
    return ChatTemplate(source.text, source.name, with_tokens(tokenizer, missing))


def find_source(choice: str, folder: str | Path | None) -> Source:
    """The text of a template. UserError where there is none."""
    if choice in CONTROLS:
        return Source((OWN / f"{choice}.jinja").read_text(encoding="utf-8"), f"the chat template {choice}")
    if choice == "auto":
        if folder is not None and (found := template_in(Path(folder))) is not None:
            return found
        raise UserError(
            f"chat.template=auto: no chat template came with the tokenizer; give one of {', '.join(CONTROLS)}, or the "
            f"path of a .jinja file, as chat.template of a run or --chat_template of a command"
        )
    if not choice.endswith((".jinja", ".jinja2", ".j2")):
        raise UserError(f"chat.template={choice}: expected auto, {', '.join(CONTROLS)}, or the path of a .jinja file")
    return Source(_text(shipped.found(choice)), f"the chat template {choice}")


def template_in(folder: Path) -> Source | None:
    """The template that lies beside a tokenizer: a file of its own, else in tokenizer_config.json; where there are
    several, the one named default. `folder`: or a file in it, as a tokenizer's path may be."""
    folder = folder if folder.is_dir() else folder.parent
    kept = folder.parent if folder.name == COPY and (folder.parent / "config.json").is_file() else folder  # a run's
    for file in (kept / FILE, folder / FILE):
        if file.is_file():
            return Source(_text(file), f"the chat template {file}")
    if folder != kept or not (folder / COPY).is_dir():
        return _in_settings(folder)
    return template_in(folder / COPY)


def _in_settings(folder: Path) -> Source | None:
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (file := folder / name).is_file():
            found = read_json(file).get("chat_template")
            if isinstance(found, list):
                named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
                found = named.get("default")
            if isinstance(found, str):
                return Source(found, f"the chat template in {file}")
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the chat template {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"the chat template {file}: not UTF-8") from None


def _missing(choice: str, source: Source, tokenizer: Tokenizer) -> Iterator[str]:
    """Control tokens that the template writes and the tokenizer lacks. Of one that came with the tokenizer none are
    missed: what is no token there is text, as the model learned it."""
    if choice == "auto":
        return
    written = CONTROLS.get(choice) or _written(source, tokenizer)
    for name in written:
        if name not in tokenizer.control_tokens:
            yield name


def _written(source: Source, tokenizer: Tokenizer) -> list[str]:
    """What looks like control tokens in what a template renders of short conversations."""
    renderer = Renderer(source.text, source.name, names_of_marks(tokenizer))
    found: list[str] = []
    for messages in PROBES:
        try:
            found += LOOKS_LIKE_CONTROL.findall(renderer.render(list(messages), generation_prompt=True))
        except UserError:  # not every template takes every conversation
            continue
    return list(dict.fromkeys(found))
