"""Where a model's name leads: a folder here, the cache of huggingface_hub, or the hub."""

from pathlib import Path

from llm.errors import UserError

WANTED = ["config.json", "*.safetensors", "model.safetensors.index.json", "manifest.json", "tokenizer/*", "tokenizer*"]
"""Files of a repository: what a model consists of, no pickles."""


def located(name: str | Path) -> Path:
    """The folder of a model: the folder of that name; where there is none, what the local cache has of the repository
    of that name, or the hub, where huggingface_hub and a network are. UserError in one line where it is nowhere."""
    path = Path(name)
    if path.exists() or not _names_repository(str(name)):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name}: no such folder, and without huggingface_hub it is looked for nowhere else") from None
    reason = ""
    for local_only in (True, False):
        try:
            return Path(snapshot_download(str(name), allow_patterns=WANTED, local_files_only=local_only))
        except Exception as error:  # its own kinds, those of its transport, and of the system
            reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    raise UserError(f"{name}: no such folder, not in the cache of huggingface_hub, and not from the hub: {reason}")


def _names_repository(name: str) -> bool:
    """Whether a name can be that of a repository: owner/name."""
    parts = name.split("/")
    return len(parts) == 2 and all(part and not part.startswith(".") for part in parts)
