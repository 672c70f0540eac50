"""Which tokenizer a training of Miniformer reads its text with: one that is named, the one beside the data, or one that
is trained on the data; its command line has no flag for any."""

import re
from collections.abc import Iterator
from pathlib import Path

from llm.atomic import write_file
from llm.checkpoint.run_folder import CONFIG_FILE, TOKENIZER_FOLDER, run_tokenizer_config
from llm.data.documents import Reading, read_listings
from llm.data.listing import list_input
from llm.errors import UserError
from llm.siblings.miniformer_records import records, text_in
from llm.siblings.miniformer_train import TrainConfig
from llm.tokenizer import SentencePieceTokenizer, TokenizerConfig, train_sentencepiece

BESIDE = ("tokenizer.json", "tokenizer.model", TOKENIZER_FOLDER)
"""What is looked for beside the data, in this order."""
TRAINED = "trained_tokenizer.model"
"""The file in the run folder of one that was trained."""
DEFAULT_SIZE = 8192
"""Tokens of one that is trained, where the model says none."""


def named(path: str) -> TokenizerConfig:
    """The tokenizer of a path: a .model of SentencePiece, a tokenizer.json, a folder with one of these (of a model, or
    of a run), a .json of characters; or the word bytes. UserError naming what is not there or none."""
    if path == "bytes":
        return TokenizerConfig(kind="bytes")
    place = Path(path)
    if place.is_dir():
        return of_folder(place)
    if not place.exists():
        raise UserError(f"--tokenizer={path}: no such file or folder")
    if place.suffix == ".model":
        return TokenizerConfig(kind="sentencepiece", path=path)
    if place.name == "tokenizer.json":
        return TokenizerConfig(kind="hf", path=path, lossy=True)
    if place.suffix == ".json":
        return TokenizerConfig(kind="characters", path=path)
    raise UserError(f"--tokenizer={path}: expected a .model, a tokenizer.json, a .json of characters, or a folder")


def of_folder(place: Path) -> TokenizerConfig:
    """The tokenizer in a folder."""
    if (place / TOKENIZER_FOLDER / CONFIG_FILE).is_file():
        config, base = run_tokenizer_config(place)
        return config if config.path is None else config.model_copy(update={"path": str(base / config.path)})
    return TokenizerConfig(kind="hf", path=str(place), lossy=True)


def beside(train_path: str) -> TokenizerConfig | None:
    """The tokenizer that lies beside the data, or in its folder."""
    place = Path(train_path)
    folder = place if place.is_dir() else place.parent
    for name in BESIDE:
        if (folder / name).is_file():
            return named(str(folder / name))
        if (folder / name).is_dir():
            ours = (folder / name / CONFIG_FILE).is_file()
            return of_folder(folder if ours else folder / name)
    return None


def trained(train: TrainConfig, vocab_size: int | None) -> tuple[TokenizerConfig, list[str]]:
    """A tokenizer that is trained on the training rows and kept in the run folder, or the one that is there; and lines
    that say so. Its tokens are `vocab_size`, or fewer where the text does not have as many pieces."""
    file = Path(train.work_dir) / TRAINED
    if file.is_file():
        return TokenizerConfig(kind="sentencepiece", path=str(file)), [f"tokenizer: {file}, trained as this run began"]
    wanted = DEFAULT_SIZE if vocab_size is None else vocab_size
    model = _trained(train, wanted)
    write_file(file, model)
    config = TokenizerConfig(kind="sentencepiece", path=str(file))
    size = SentencePieceTokenizer(model).vocab_size
    few = f" of {wanted:,}, as the text has no more pieces" if size < wanted else ""
    how = f"trained on {train.train_path}: {size:,} tokens{few}: {file}"
    return config, [f"tokenizer: none is named or beside the data; {how}"]


def _trained(train: TrainConfig, wanted: int) -> bytes:
    try:
        return train_sentencepiece(_texts(train), wanted, name=train.train_path)
    except UserError as error:
        most = re.search(r"Please set it to a value <= (\d+)", str(error))
        if most is None or int(most[1]) >= wanted:
            raise
        return train_sentencepiece(_texts(train), int(most[1]), name=train.train_path)


def _texts(train: TrainConfig) -> Iterator[str]:
    """All text of the training rows."""
    if train.task == "language_modeling":
        listing = list_input(train.train_path, "--train_path")
        yield from (document.text for document in read_listings([listing], Reading(train.text_column, None)))
        return
    for place, record in records(train.train_path):
        yield from (text_in(record, column, place) for column in train.text_columns)
