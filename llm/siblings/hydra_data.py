"""Where the data and the tokenizer of a HYDRA config are: a path, a folder under $LATTICE_DATA, what Hugging Face's
libraries have in their caches, or the hub.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.atomic import new_directory
from llm.errors import UserError
from llm.siblings.miniformer_tokenizer import named
from llm.tokenizer import TokenizerConfig

PLACES = "LATTICE_DATA"
"""The variable with a folder of data sets and tokenizers, by their names."""
SPLITS = ("train", "validation")
"""Of a data set: files SPLIT.jsonl of rows with a column `text`."""
WANTED = ["tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]


def data_folder(name: str, subset: str | None, given: str | None, kept: Path) -> tuple[Path, list[str]]:
    """The folder of a data set's files, and lines on where it was found. name, subset: what the config says; given:
    what --data says in their place. One of a library is written to `kept`. UserError in one line where it is nowhere,
    or has no training rows."""
    place, notes = _folder(name, given, "--data"), list[str]()
    if place is not None and subset is not None:
        notes.append(f"dataset_config={subset} is of a library's data set, and ignored with files")
    if place is None:
        place = kept / "_".join(part.replace("/", "_") for part in (name, subset) if part)
        if not (place / "train.jsonl").is_file():
            _write_library_data(name, subset, place)
            notes.append(f"dataset_name={name}: written to {place}")
    if not (place / "train.jsonl").is_file():
        raise UserError(f"{place}: has no train.jsonl, rows of JSON with a column text")
    return place, notes


def tokenizer_of(name: str, given: str | None) -> TokenizerConfig:
    """The tokenizer of a config. UserError in one line where it is nowhere."""
    if given == "bytes" or (given is None and name == "bytes"):
        return TokenizerConfig(kind="bytes")
    place = _folder(name, given, "--tokenizer")
    return named(str(_from_hub(name) if place is None else place))


def _folder(name: str, given: str | None, flag: str) -> Path | None:
    """What is there under a path, or under $LATTICE_DATA; None where nothing is."""
    if given is not None:
        if not Path(given).exists():
            raise UserError(f"{flag}={given}: no such file or folder")
        return Path(given)
    if Path(name).exists():
        return Path(name)
    places = os.environ.get(PLACES)
    if places and (Path(places) / name).exists():
        return Path(places) / name
    return None


def _nowhere(key: str, name: str, flag: str, why: str) -> UserError:
    return UserError(
        f"{key}={name}: is no path, not under ${PLACES}, and {why}; give {flag} PATH"
        f"{' --tokenizer PATH' if flag == '--data' else ''}"
    )


def _write_library_data(name: str, subset: str | None, place: Path) -> None:
    try:
        import datasets
    except ImportError:
        raise _nowhere("dataset_name", name, "--data", "without the package datasets looked for nowhere else") from None
    found = _tried(
        lambda offline: _loaded(datasets, name, subset, offline),
        lambda why: _nowhere("dataset_name", name, "--data", f"not in the cache or on the hub of datasets ({why})"),
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(place) as folder:
        for split in (split for split in SPLITS if split in found):
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": row["text"]}, ensure_ascii=False) + "\n" for row in found[split])


def _loaded(datasets: Any, name: str, subset: str | None, offline: bool) -> Any:
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or before
    try:
        return datasets.load_dataset(name, subset)
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        why = "without huggingface_hub looked for nowhere else"
        raise _nowhere("tokenizer_name", name, "--tokenizer", why) from None
    return _tried(
        lambda offline: Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=offline)),
        lambda why: _nowhere("tokenizer_name", name, "--tokenizer", f"not in the cache or on the hub ({why})"),
    )


def _tried(load: Callable[[bool], Any], refused: Callable[[str], UserError]) -> Any:
    """What is in the cache, or else comes over the network."""
    why = ""
    for offline in (True, False):
        try:
            return load(offline)
        except Exception as error:  # its own kinds, those of its transport, and of the system
            why = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    raise refused(why)
