"""Which checkpoint a run continues, and whether it is of this run: known from the folder, before any work."""

from pathlib import Path

from llm.checkpoint.reader import Checkpoint, list_steps, newest_valid, resolve
from llm.errors import UserError
from llm.tokenizer import Tokenizer
from llm.train.config import RunConfig
from llm.train.resume.differences import refused_changes


def checkpoint_to_continue(config: RunConfig, folder: Path) -> Checkpoint | None:
    """The checkpoint that a run with its checkpoints in `folder` goes on from; None where it begins anew."""
    mode = config.checkpoint.resume
    checkpoint, _ = newest_valid(folder)
    if checkpoint is None and not list_steps(folder) and mode not in ("auto", "never"):
        return resolve(mode)
    return None if mode == "never" else checkpoint


def refuse_another_run(config: RunConfig, folder: Path, tokenizer: Tokenizer) -> None:
    """UserError where the checkpoint to continue is of another config: before text is sharded and a model is built,
    which may take hours and more memory than there is. The config's vocabulary and precision must be settled.
    """
    checkpoint = checkpoint_to_continue(config, folder)
    if checkpoint is not None:
        refuse(checkpoint, refused_by(checkpoint, config, tokenizer))


def refused_by(checkpoint: Checkpoint, config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """Lines for all that must not differ from the checkpoint's config and tokenizer, and does."""
    meta = checkpoint.meta_with("config", "tokenizer")
    changed = refused_changes(meta["config"], config.model_dump(mode="json"), config.checkpoint.allow_changes)
    if meta["tokenizer"] != tokenizer.fingerprint and "tokenizer" not in config.checkpoint.allow_changes:
        changed.append("tokenizer: its content differs")
    return changed


def refuse(checkpoint: Checkpoint, changed: list[str]) -> None:
    """UserError with the lines, if there are any."""
    if changed:
        raise UserError(
            f"{checkpoint.path} belongs to another configuration: {'; '.join(changed)}. "
            f"Use another --run_dir, or --checkpoint.allow_changes=KEY,KEY to accept"
        )
