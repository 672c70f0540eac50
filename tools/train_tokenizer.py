"""Train a tokenizer on text: `python tools/train_tokenizer.py --input a.jsonl,texts/ --output t.model --vocab_size
4096`.
"""

import os
import sys
from pathlib import Path
from typing import Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.atomic import write_file
from llm.cli import run_cli
from llm.data.documents import Reading, read_listings
from llm.data.found import Inventory, found_lines
from llm.data.listing import Listing, list_input
from llm.errors import UserError
from llm.paths import PathText, refuse_existing
from llm.tokenizer import CharacterTokenizer, SmilesTokenizer, alphabet, smiles_vocabulary, train_sentencepiece


def train(
    input: list[PathText],
    output: PathText,
    vocab_size: int = 4096,
    kind: Literal["sentencepiece", "characters", "smiles"] = "sentencepiece",
    model_type: Literal["bpe", "unigram"] = "bpe",
    boundaries: Literal["script", "space", "none"] = "script",
    character_coverage: float = 0.9999,
    max_bytes: int = 100_000_000,
    text_field: str = "text",
    threads: int = 1,
    separator: str | None = None,
    overwrite: bool = False,
) -> None:
    """Train a lossless tokenizer and write it to one file, whole or not at all.

    input: text files, folders, .jsonl, .ndjson, .json, .parquet, separated by commas; text and JSON also with .gz,
        .bz2, .xz or .zst behind
    output: the file to write (.model for SentencePiece, .json for characters, .txt for smiles)
    vocab_size: number of ids, marks and the 256 byte pieces included; of no meaning for characters and smiles
    kind: sentencepiece, or characters: every character of the text is one id, or smiles: every atom and bond of the
        molecules in rows (as --text_field=smiles of a CSV file)
    model_type: bpe is quick to train; unigram encodes faster but takes minutes to train when --boundaries=none
    boundaries: what a piece may not cross: script (SentencePiece's usual: words; easiest to learn), space, or none
        (shortest code: 4.1 instead of 3.5 bytes per token on Python source, but a small model reached 2.27 instead of
        2.01 bits per byte with it after a million tokens)
    character_coverage: share of the text's characters with a piece of their own; the others are written in bytes
    max_bytes: text beyond this is sampled evenly
    text_field: field of JSON and Parquet rows that holds the text
    threads: threads SentencePiece may use; the ids do not depend on it
    separator: what ends a document in text files, as <|endoftext|>, and is no part of it
    overwrite: replace a tokenizer that is there; runs and shards made with it go on with no other
    """
    if vocab_size < 1 or max_bytes < 1 or threads < 1:
        raise UserError(
            f"--vocab_size={vocab_size} --max_bytes={max_bytes} --threads={threads}: all must be at least 1"
        )
    if not 0.9 <= character_coverage <= 1:
        raise UserError(f"--character_coverage={character_coverage}: expected 0.9 to 1")
    if not (overwrite and Path(output).is_file()):
        known = "runs and shards made with it go on with no other; name another file, or give --overwrite"
        refuse_existing(output, "--output", known)
    if separator == "":
        raise UserError("--separator: is empty")
    listings = [list_input(path, "--input") for path in input]
    inputs = [file.path for listing in listings for file in listing.files]
    if Path(output).exists() and any(os.path.samefile(file, output) for file in inputs):
        raise UserError(f"--output={output}: is a file of --input; name another")
    inventory = Inventory()
    documents = read_listings(listings, Reading(text_field, separator), inventory)
    if kind == "smiles":
        molecules = SmilesTokenizer(smiles_vocabulary((document.called, document.text) for document in documents))
        _print_found(input, listings, inventory)
        write_file(Path(output), molecules.serialized())
        print(f"{output}: {molecules.vocab_size} tokens, of which {len(molecules.control_tokens)} are control tokens")
        return
    texts = (document.text for document in documents)
    if kind == "characters":
        tokenizer = CharacterTokenizer(alphabet(texts))
        _print_found(input, listings, inventory)
        write_file(Path(output), tokenizer.serialized())
        print(f"{output}: {len(tokenizer.characters)} characters")
        return
    model = train_sentencepiece(
        texts,
        vocab_size,
        model_type=model_type,
        boundaries=boundaries,
        character_coverage=character_coverage,
        max_bytes=max_bytes,
        threads=threads,
        name=f"--input={','.join(map(str, input))}",
    )
    _print_found(input, listings, inventory)
    write_file(Path(output), model)
    print(f"{output}: {vocab_size} pieces")


def _print_found(input: list[str], listings: list[Listing], inventory: Inventory) -> None:
    found = inventory.found(listings)
    for line in found_lines(f"--input={','.join(input)}", found, inventory.documents, "--separator"):
        print(line)


if __name__ == "__main__":
    run_cli(train)
