"""Does a model look at its pictures? Captions of pictures held out by their text, and what the right picture is worth.

`python tools/captions.py prepare --data FILE.parquet --text name` splits pictures with captions into rows of kind
image_text that share no caption; configs/finetune/vision_full.yaml reads them. `score` then measures the loss of
held-out captions with their own pictures and with others: a model that does not look has the same loss with both.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from llm import LLM
from llm.atomic import new_directory
from llm.batch import IGNORE
from llm.cli import run_cli
from llm.data.split import Split, text_digest
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.paths import PathText
from llm.pretrained import tokenizer_of
from vision.opening import ImageLimits, open_image
from vision.preprocess import image_text
from vision.tiles import cut

ROWS = 32
"""Captions computed at once."""
Bytes = NDArray[np.uint8]


def prepare(
    data: PathText,
    output: PathText = "runs/data/captions",
    image: str = "image",
    text: str = "text",
    held_out: float = 0.1,
) -> None:
    """Write train.parquet and valid.parquet with `image` and `text` into a new folder. The digest of a caption decides
    on which side it lies.

    data: a Parquet file of pictures, as bytes or {bytes, path}, with captions
    output: the folder to make
    image: the column of pictures
    text: the column of captions
    held_out: share of the captions
    """
    if not 0 < held_out < 1:
        raise UserError(f"--held_out={held_out}: expected a share between 0 and 1")
    rows = _table(Path(data), "--data", image, text)
    sides = {name: Split(held_out, name) for name in ("train", "valid")}
    parts = {
        name: [row for row in rows if side.keeps(text_digest(row["text"].encode()))] for name, side in sides.items()
    }
    for name, part in parts.items():
        if not part:
            raise UserError(f"--data={data}: none of its {len(rows)} captions falls to the {name} side")
    try:
        with new_directory(Path(output)) as folder:
            for name, part in parts.items():
                pq.write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet")
    except FileExistsError:
        raise UserError(f"--output={output}: exists; remove it or name another folder") from None
    for name, part in parts.items():
        print(f"{Path(output) / name}.parquet: {len(part):,} rows")


def _table(file: Path, flag: str, image: str, text: str) -> list[dict[str, Any]]:
    """Rows with `image` (bytes) and `text`. UserError naming the file and its row."""
    if not file.is_file():
        raise UserError(f"{flag}={file}: no such file")
    try:
        table = pq.read_table(file)
    except pa.ArrowException as error:
        raise UserError(f"{flag}={file}: is no Parquet file ({error})") from None
    missing = [name for name in (image, text) if name not in table.column_names]
    if missing:
        raise UserError(f"{file}: has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    found = []
    for number, row in enumerate(table.select([image, text]).to_pylist(), 1):
        content = row[image]["bytes"] if isinstance(row[image], dict) else row[image]
        if not isinstance(content, bytes) or not isinstance(row[text], str) or not row[text].strip():
            raise UserError(f"{file}, row {number}: expected a picture as bytes and a caption")
        found.append({"image": content, "text": row[text]})
    return found


def score(model: PathText, data: PathText, among: int = 10) -> None:
    """Print the loss of captions, in nats a caption, with their own pictures and with others, the paired difference
    with its standard error, and how often the right picture is the likeliest of some.

    model: run folder, checkpoint or model folder
    data: valid.parquet of `prepare`
    among: pictures that each caption chooses from: its own and those of the rows after it
    """
    rows = _table(Path(data), "--data", "image", "text")
    if not 2 <= among <= len(rows):
        raise UserError(f"--among={among}: expected 2 to {len(rows)}, the rows of {data}")
    tokenizer, network = tokenizer_of(model), LLM.from_pretrained(model)
    if network.args.vision is None:
        raise UserError(f"--model={model}: has no vision")
    tiles, grids = zip(*pictures(Path(data), rows, network.args.vision), strict=True)
    n = len(rows)
    nll = np.empty((n, among))
    for shift in range(among):
        for first in range(0, n, ROWS):
            texts = range(first, min(first + ROWS, n))
            shown = [(i + shift) % n for i in texts]
            sequences = []
            for i, j in zip(texts, shown, strict=True):
                before = [*tokenizer.begin_ids, *image_text(grids[j], network.args.vision, tokenizer)]
                sequences.append((before, [*tokenizer.encode(rows[i]["text"]), tokenizer.eos_id]))
            nll[first : texts.stop, shift] = caption_nll(network, sequences, [tiles[j] for j in shown])
    own, other = nll[:, 0], nll[:, 1]
    gain = other - own
    error = gain.std(ddof=1) / np.sqrt(n)
    print(f"{n} captions: {own.mean():.4f} nats with their own picture, {other.mean():.4f} with the next one")
    print(f"paired difference {gain.mean():.4f}, standard error {error:.4f}: {gain.mean() / error:.1f} of them")
    print(f"own picture likeliest among {among}: {(own < nll[:, 1:].min(1)).mean():.1%} (chance {1 / among:.1%})")


def pictures(file: Path, rows: Sequence[dict[str, Any]], vision: Any) -> Iterator[tuple[Bytes, tuple[int, int]]]:
    """Tiles and grid of each row's picture. UserError naming file and row."""
    for number, row in enumerate(rows, 1):
        try:
            yield cut(open_image(row["image"], ImageLimits()), vision)
        except UserError as error:
            raise UserError(f"{file}, row {number}: the image {error}") from None


@torch.no_grad()
def caption_nll(network: LLM, sequences: Sequence[tuple[list[int], list[int]]], tiles: Sequence[Bytes]) -> Any:
    """(n,) float64: nats of each caption's tokens behind its picture's. Rows are filled up behind their end, which
    nothing before it sees."""
    length = max(len(before) + len(caption) for before, caption in sequences) - 1
    tokens = torch.zeros(len(sequences), length, dtype=torch.int64)
    labels = torch.full((len(sequences), length), IGNORE)
    for row, (before, caption) in enumerate(sequences):
        ids = torch.tensor([*before, *caption])
        tokens[row, : len(ids) - 1] = ids[:-1]
        labels[row, len(before) - 1 : len(ids) - 1] = ids[len(before) :]
    inputs = TransformerInput(tokens, images=torch.from_numpy(np.concatenate(tiles)))
    hidden = network(inputs, return_hidden=True).hidden
    return network.token_nll(hidden, labels).double().sum(1).numpy()


if __name__ == "__main__":
    run_cli(prepare, prepare=prepare, score=score)
