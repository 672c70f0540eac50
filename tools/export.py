"""A model as a graph that other programs run: `python tools/export.py --model PATH --output DIR [--format torch]`.

ONNX needs the extra `export` (`make export`, then .venv-export/bin/python). docs/export.md says what the graphs are.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

from collections.abc import Sequence
from contextlib import suppress

import torch

from llm.cli import run_cli
from llm.errors import NoTokenizer
from llm.export.files import Format, export_model, refuse_without_packages
from llm.export.kinds import What
from llm.export.refusals import refuse_unexportable
from llm.paths import PathText, check_free
from llm.pretrained import args_of, load_model, taken_from, tokenizer_of


def export(
    model: PathText,
    output: PathText,
    format: Format = "onnx",
    what: What = "llm",
    check: bool = False,
    average: bool = False,
    text_only: bool = False,
) -> None:
    """Write a graph of a model into a new folder, with float32 weights; adapters are merged, int8 weights made float.

    model: run, checkpoint, model folder, or foreign folder
    output: folder to make: model.onnx or model.pt2, and export.json, which says what goes in and what comes out
    format: onnx, or torch (torch.export)
    what: llm, logits of whole rows; step, the same of new tokens after keys and values that come in and go out;
        encoder, hidden states of a model that reads both ways, or what the encoder of an encoder-decoder makes of a
        source; encoder_decoder, logits of whole targets and their sources
    check: run the graph before the folder is there, and compare its numbers with the model's
    average: the moving average of the weights, of a run with optim.ema_decay
    text_only: leave out the vision tower of a foreign folder
    """
    check_free(Path(output))
    if format == "onnx":
        refuse_without_packages()
    if not text_only:
        refuse_unexportable(args_of(model, notify=None).merged)
    tokenizer = None
    with suppress(NoTokenizer):
        tokenizer = tokenizer_of(model, notify=None)
    source = taken_from(model)
    found = load_model(model, torch.float32, average, text_only)
    about = {"source": source.path, "weights_digest": source.digest}
    made = export_model(found, output, format=format, what=what, tokenizer=tokenizer, check=check, about=about)
    line = f"{output}: {what} as {format}, {made.nbytes:,} bytes"
    print(line if made.difference is None else f"{line}; differs from the model by {made.difference:.2g} at most")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_cli(export, argv)


if __name__ == "__main__":
    main()
