"""Text to token shards: `python tools/shard.py --input a.jsonl,texts/ --output DIR --tokenizer t.model`; `check DIR`
verifies them.
"""

import sys
import time
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.cli import run_cli
from llm.data.build import build_source
from llm.data.documents import Reading, read_listings
from llm.data.found import Inventory, found_lines
from llm.data.listing import list_input
from llm.data.source import TokenSource
from llm.errors import UserError
from llm.paths import PathText, refuse_unwritable
from llm.tokenizer import TokenizerConfig, TokenizerKind, load_tokenizer


def shard(
    input: list[PathText],
    output: PathText,
    tokenizer: PathText | None = None,
    kind: TokenizerKind = "sentencepiece",
    text_field: str = "text",
    shard_mb: int = 128,
    threads: int = 1,
    variant: str | None = None,
    bos: str | None = None,
    eos: str | None = None,
    separator: str | None = None,
    lossy: bool = False,
) -> None:
    """Tokenise text into a new folder of shards with a manifest, whole or not at all.

    input: text files, folders, .jsonl, .ndjson, .json, .parquet, separated by commas; text and JSON also with .gz,
        .bz2, .xz or .zst behind
    output: the folder to make; it must not exist
    tokenizer: the tokenizer's file, or with --kind=hf its folder; none for --kind=bytes
    kind: what sort of tokenizer that is; tiktoken is a file of ranks (Llama 3 and 4), hf a tokenizer.json
    text_field: field of JSON and Parquet rows that holds the text
    shard_mb: a shard is closed once its tokens take this many MiB
    threads: threads the tokenizer may use; the shards do not depend on it
    variant: llama3 or llama4, for --kind=tiktoken when the number of ranks leaves it open
    bos: name of the token that begins a document, for --kind=hf when it is none of the usual ones
    eos: name of the token that ends a document, likewise
    separator: what ends a document in text files, as <|endoftext|>, and is no part of it; without it each is one
    lossy: accept a tokenizer that normalises text, for --kind=sentencepiece and hf
    """
    if shard_mb < 1 or threads < 1:
        raise UserError(f"--shard_mb={shard_mb} --threads={threads}: both must be at least 1")
    if Path(output).exists():
        raise UserError(f"--output={output}: exists already; remove it or name another folder")
    refuse_unwritable(Path(output).absolute().parent, f"--output={output}")
    config = {"kind": kind, "path": tokenizer, "variant": variant, "bos": bos, "eos": eos, "lossy": lossy}
    encoder = load_tokenizer(TokenizerConfig.model_validate(config))
    listings = [list_input(path, "--input") for path in input]
    if separator == "":
        raise UserError("--separator: is empty")
    if separator is not None and all(file.type.has_rows for listing in listings for file in listing.files):
        raise UserError(f"--separator={separator}: is for text files, and --input has none")
    began, inventory, name = time.perf_counter(), Inventory(), f"--input={','.join(input)}"
    source = build_source(
        read_listings(listings, Reading(text_field, separator), inventory),
        encoder,
        output,
        total_bytes=sum(listing.bytes for listing in listings),
        shard_bytes=shard_mb << 20,
        threads=threads,
        name=name,
        found=lambda: inventory.found(listings),
    )
    seconds = time.perf_counter() - began
    _print_found(name, source)
    print(f"{output}: {_summary(source)}; {seconds:.1f} s, {source.n_tokens / seconds / 1e6:.2f} Mtok/s")


def check(source: PathText) -> None:
    """Verify all digests of a folder of shards and every token's range.

    source: the folder
    """
    opened = TokenSource.open(source, verify=True)
    _print_found(f"{source} was made of", opened)
    print(f"{source}: whole; {_summary(opened)}")


def _print_found(given: str, source: TokenSource) -> None:
    if source.manifest.found is not None:
        for line in found_lines(given, source.manifest.found, source.n_docs, "--separator"):
            print(line)


def _summary(source: TokenSource) -> str:
    return (
        f"{source.n_docs} documents, {source.n_bytes} bytes of text, {source.n_tokens} tokens "
        f"in {len(source.manifest.shards)} shards, fingerprint {source.fingerprint}"
    )


if __name__ == "__main__":
    run_cli(shard, check=check)
