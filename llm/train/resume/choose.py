"""Which checkpoint a run continues, and whether it is of this run: known from the folder, before any work."""

from pathlib import Path

from llm.checkpoint.frozen import Origin, Seed, Taken, frozen_in
from llm.checkpoint.reader import Checkpoint, list_steps, newest_valid, resolve
from llm.errors import UserError
from llm.foreign.files import is_foreign
from llm.pretrained import check_origin, taken_from
from llm.tokenizer import Tokenizer
from llm.train.config import RunConfig
from llm.train.freezing import parameter_table
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
        refuse_newly_frozen(checkpoint, config)
        frozen = frozen_in(checkpoint)
        if frozen is not None and isinstance(frozen.origin, Taken) and not is_foreign(Path(frozen.origin.path)):
            origin_now(frozen.origin, checkpoint.meta["config"]["model"].get("init_from"), config.model.init_from)


def refused_by(checkpoint: Checkpoint, config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """Lines for all that must not differ from the checkpoint's config and tokenizer, and does."""
    meta = checkpoint.meta_with("config", "tokenizer")
    changed = refused_changes(meta["config"], config.model_dump(mode="json"), config.checkpoint.allow_changes)
    if meta["tokenizer"] != tokenizer.fingerprint and "tokenizer" not in config.checkpoint.allow_changes:
        changed.append("tokenizer: its content differs")
    return changed


def refuse_newly_frozen(checkpoint: Checkpoint, config: RunConfig) -> None:
    """UserError where the config freezes what was trained until now: checkpoints to come would not hold it, and there
    is no other place that does for good. What was frozen may be trained.
    """
    table = parameter_table(config)
    new = [name for name in checkpoint.shapes if name in table and not table[name].trainable]
    if new:
        key = "train.freeze" if config.lora is None else "lora"
        raise UserError(
            f"{key}: {new[0]} has been trained in {checkpoint.path}, and a checkpoint holds only what its run "
            f"trains; begin a new run with --model.init_from={checkpoint.path}"
        )


def origin_now(origin: Origin, source: str | None, given: str | None) -> Origin:
    """Where frozen parameters are to be read from, verified: where they came from, or the folder that this was moved
    to, if another one is given than the run's `source` was. UserError where there are none, or others.
    """
    if isinstance(origin, Seed):
        return origin
    if given is None or given == source:
        check_origin(origin)
        return origin
    found = taken_from(given)
    if found.digest != origin.digest:
        raise UserError(
            f"model.init_from={given}: holds other weights than {origin.path} did, where the parameters that the run "
            f"does not train came from"
        )
    return found


def refuse(checkpoint: Checkpoint, changed: list[str]) -> None:
    """UserError with the lines, if there are any."""
    if changed:
        raise UserError(
            f"{checkpoint.path} belongs to another configuration: {'; '.join(changed)}. "
            f"Use another --run_dir, or --checkpoint.allow_changes=KEY,KEY to accept"
        )
