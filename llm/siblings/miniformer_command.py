"""Miniformer's command line: its flags are the fields of TrainConfig, and a run of the one trainer is what they say.

    python -m llm.siblings.miniformer --train_path train.jsonl --val_path valid.jsonl --model_config '{"d_model": 384}'

`torchrun --nproc_per_node N -m llm.siblings.miniformer ...` trains on N processes. Keys of a run's config may stand
beside the flags: `--parallel.tensor=2`.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llm import environment
from llm.cli import HELP, bind, describe, split, with_values
from llm.errors import UserError
from llm.malloc import keep_freed
from llm.parallel.collectives import main_decides
from llm.parallel.launch import process
from llm.parallel.launch.world import World
from llm.siblings.miniformer_config import EncoderDecoderConfig, TransformerConfig, json_object
from llm.siblings.miniformer_found import longest_record, n_labels
from llm.siblings.miniformer_tokenizer import beside, named, trained
from llm.siblings.miniformer_train import TrainConfig, run_config
from llm.tokenizer import TokenizerConfig, load_tokenizer
from llm.train.config import RunConfig, check_layout
from llm.train.config.load import validate
from llm.train.config.yaml_file import scalar
from llm.train.preflight import preflight
from llm.train.stop import leave_before_first_step

GIVEN = "--model_config"
WAIT_S = 600.0
"""Seconds that processes wait for each other before the run's config says how many."""


@dataclass
class Flags(TrainConfig):
    """Train a Miniformer on JSON Lines; the same command again goes on with a run that was stopped.

    python -m llm.siblings.miniformer --train_path train.jsonl [--val_path valid.jsonl] [--flag value ...]
    """

    model_config: str = field(default="{}", kw_only=True)
    """Keys of TransformerConfig as JSON, or a JSON file of them; vocab_size left out is the tokenizer's."""
    tokenizer: str | None = field(default=None, kw_only=True)
    """A .model of SentencePiece, a tokenizer.json, a folder with one, or bytes; None = the one beside the data, else
    one is trained on train_path and kept in work_dir."""
    threads: int = field(default=1, kw_only=True)
    """CPU threads of a process."""
    dry_run: bool = field(default=False, kw_only=True)
    """Print the run's config, and train nothing."""


def parse(words: Sequence[str]) -> tuple[Flags, dict[str, Any]]:
    """What the words after the module's name ask for, and keys of a run's config. UserError naming the flag."""
    values, given = split(with_values([word for word in words if not _is_key(word)], Flags))
    overrides = {}
    for word in filter(_is_key, words):
        key, equals, text = word.lstrip("-").partition("=")
        if not equals:
            raise UserError(f"--{key} has no value; give --{key}=VALUE")
        overrides[key] = scalar(text)
    try:
        return Flags(**bind(Flags, values, given)), overrides
    except ValueError as error:
        raise UserError(f"--{error}") from None


def _is_key(word: str) -> bool:
    """Whether a word is a key of a run's config: --section.key=value."""
    return word.startswith("--") and "." in word.partition("=")[0]


def help_text() -> str:
    """What --help prints: the flags, what each is, and its default."""
    said = {**documented(TrainConfig), **documented(Flags)}
    lines = []
    for line in describe(Flags).splitlines():
        lines.append(line)
        name = line.strip().removeprefix("--").partition(":")[0]
        if line.startswith("  --") and name in said:
            lines.append(textwrap.fill(said[name], 116, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def documented(cls: type) -> dict[str, str]:
    """What is said of each field of a class, in the text below it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found, name = dict[str, str](), None
    for node in tree.body:
        text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
        if name is not None and isinstance(text, str):
            found[name] = " ".join(text.split())
        name = node.target.id if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else None
    return found


def resolve(asked: Flags, overrides: dict[str, Any], ranks: int = 1) -> tuple[RunConfig, list[str]]:
    """The run that is asked for, on so many processes, and lines on what was found out. A tokenizer may be trained, and
    written. UserError in one line where there is no such run."""
    said, notes = _model_keys(asked.model_config), list[str]()
    size = said.get("vocab_size")
    if asked.task in ("classification", "regression"):
        said.setdefault("head", asked.task)
        if "num_labels" not in said:
            said["num_labels"] = n_labels(asked)
            what = "classes" if asked.task == "classification" else "values a row"
            notes.append(f"{asked.train_path}: {said['num_labels']} {what}")
    model = TransformerConfig.from_dict({"vocab_size": 1} | said, GIVEN)
    if asked.model == "seq2seq":
        _check_sides(model)  # before a tokenizer is trained
    tokenizer, about = _tokenizer(asked, size)
    opened = load_tokenizer(tokenizer)
    if size is not None and size < opened.vocab_size:
        raise UserError(
            f"{GIVEN}: vocab_size={size} is below the tokenizer's {opened.vocab_size} tokens; left out, it is theirs"
        )
    if size is None:
        model = TransformerConfig.from_dict(said | {"vocab_size": opened.vocab_size}, GIVEN)
    if not asked.packed and asked.seq_len is None:
        asked.seq_len = min(longest_record(asked, opened), model.max_seq_len)
        notes.append(f"rows of {asked.seq_len} tokens, which the longest record needs, or max_seq_len allows")
    config = run_config(asked, model, tokenizer, {"train.threads": asked.threads} | overrides, ranks=ranks)
    return config, [*about, *notes]


def _check_sides(model: TransformerConfig) -> None:
    try:
        EncoderDecoderConfig.like(model)
    except ValueError as error:
        raise UserError(f"{GIVEN}: {error}") from None


def _model_keys(text: str) -> dict[str, Any]:
    """What --model_config says. UserError where it is no JSON object."""
    if text.lstrip().startswith("{"):
        return json_object(text, GIVEN)
    try:
        return json_object(Path(text).read_bytes(), f"{GIVEN}={text}")
    except OSError as error:
        raise UserError(f"{GIVEN}={text}: is no JSON object, and no file: {error.strerror or error}") from None


def _tokenizer(asked: Flags, size: int | None) -> tuple[TokenizerConfig, list[str]]:
    if asked.tokenizer is not None:
        return named(asked.tokenizer), []
    found = beside(asked.train_path)
    if found is not None:
        return found, [f"tokenizer: {found.path}, beside the data"]
    return trained(asked, size)


def main() -> None:
    """Train what the command line asks for."""
    words, place = sys.argv[1:], environment.place()
    if any(word in HELP for word in words):
        print(help_text())
        return
    asked, overrides = parse(words)
    if asked.dry_run:
        if place.rank == 0:
            config, notes = resolve(asked, overrides, place.size)
            check_layout(config, place.size)
            print("".join(f"# {line}\n" for line in notes), end="")
            print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
        return
    process.quiet_libraries()
    leave_before_first_step()
    if process.read_world().device.type == "cpu":
        keep_freed()
    world = process.start(WAIT_S, asked.threads)
    config = validate(main_decides(lambda: _checked(asked, overrides, world), world), "miniformer")
    from llm.train.trainer import Trainer  # its imports take seconds, so a wrong config is reported first

    Trainer(config, Path(asked.work_dir), world).fit()


def _checked(asked: Flags, overrides: dict[str, Any], world: World) -> dict[str, Any]:
    """The run's config, written out; what can be refused is refused here."""
    config, notes = resolve(asked, overrides, world.size)
    for line in notes:
        print(line, flush=True)
    check_layout(config, world.size)
    preflight(config, Path(asked.work_dir))
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    return dumped
