"""Surgery on trained models, by llm/surgery.py: what of a model stays the same is measured before it is written.

    python tools/surgery.py upcycle SRC DST --n_experts=8          dense feed-forwards become mixtures of experts
    python tools/surgery.py deepen SRC DST --n_layers=32           more layers, which add nothing at first
    python tools/surgery.py vocabulary SRC DST --vocab_size=50000  more tokens
    python tools/surgery.py nope SRC DST --interval=4              every 4th layer without RoPE: another function

SRC is a run, a checkpoint, a model folder, or a foreign folder; DST a model folder of ours, which generates, or begins
a training as model.init_from. DST appears whole or not at all. Both models are in memory, sharing what stays the same.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm import surgery as operations
from llm.args import MoEArgs
from llm.checkpoint.fragments import DTYPES
from llm.checkpoint.run_folder import load_checkpoint
from llm.checkpoint.weights import CheckpointWeights
from llm.cli import HELP, run_cli
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.foreign.files import is_foreign, open_foreign
from llm.paths import PathText, check_free
from llm.pretrained import args_of, tokenizer_of
from llm.surgery import Rows, State, Where
from llm.tokenizer import Tokenizer

Operation = Callable[[ModelArgs, State], tuple[ModelArgs, dict[str, Tensor]]]
PROBE_TOKENS = 64


def upcycle(
    src: PathText,
    dst: PathText,
    n_experts: int,
    top_k: int = 1,
    hidden: int | None = None,
    interleave: int = 1,
    dense_layers: list[int] | None = None,
    score: Literal["sigmoid", "softmax"] = "sigmoid",
    renorm: bool = False,
    apply: Literal["input", "output"] = "input",
    shared: bool = True,
    aux_alpha: float = 0.0,
    z_alpha: float = 0.0,
    seed: int = 0,
    dtype: str | None = None,
    average: bool = False,
) -> None:
    """Make dense feed-forwards mixtures of experts that compute the same, or say why these cannot.

    src: run, checkpoint, model folder, or foreign folder
    dst: model folder to make
    n_experts ... z_alpha: of model.moe; the defaults are Llama 4's. hidden: default the dense width
    seed: of the routers
    dtype: of the weights: float32, bfloat16 or float16; default: as they are kept
    average: begin from the moving average of the weights, of a run with optim.ema_decay
    """
    moe = MoEArgs(
        n_experts=n_experts,
        top_k=top_k,
        hidden=hidden,
        interleave=interleave,
        dense_layers=tuple(dense_layers or ()),
        score=score,
        renorm=renorm,
        apply=apply,
        shared=shared,
        aux_alpha=aux_alpha,
        z_alpha=z_alpha,
    )
    _operate(src, dst, dtype, average, lambda args, state: operations.upcycle(args, state, moe, seed))


def deepen(
    src: PathText,
    dst: PathText,
    n_layers: int,
    where: Where = "spread",
    seed: int = 0,
    dtype: str | None = None,
    average: bool = False,
) -> None:
    """Add layers that add nothing to the residual stream until they are trained.

    src: run, checkpoint, model folder, or foreign folder
    dst: model folder to make
    n_layers: layers of the new model
    where: spread evenly, by whole periods of the kinds of layers, or at the end
    seed: of new layers of a kind that the model does not have; all others are copies
    dtype: of the weights: float32, bfloat16 or float16; default: as they are kept
    average: begin from the moving average of the weights, of a run with optim.ema_decay
    """
    _operate(src, dst, dtype, average, lambda args, state: operations.deepen(args, state, n_layers, where, seed))


def vocabulary(
    src: PathText,
    dst: PathText,
    vocab_size: int,
    rows: Rows = "mean",
    seed: int = 0,
    dtype: str | None = None,
    average: bool = False,
) -> None:
    """Add tokens. Logits of old tokens stay; their probabilities shrink, as the softmax has more terms.

    src: run, checkpoint, model folder, or foreign folder
    dst: model folder to make; it gets the tokenizer of src, which knows the old tokens
    vocab_size: tokens of the new model
    rows: of new tokens: the mean of the old ones, or initial values
    seed: of the initial values
    dtype: of the weights: float32, bfloat16 or float16; default: as they are kept
    average: begin from the moving average of the weights, of a run with optim.ema_decay
    """
    _operate(
        src, dst, dtype, average, lambda args, state: operations.enlarge_vocabulary(args, state, vocab_size, rows, seed)
    )


def nope(src: PathText, dst: PathText, interval: int, dtype: str | None = None, average: bool = False) -> None:
    """Take RoPE, and chunks, from every interval-th layer: NOT the same function; the model must be trained on.

    src: run, checkpoint, model folder, or foreign folder
    dst: model folder to make
    interval: of the layers without RoPE
    dtype: of the weights: float32, bfloat16 or float16; default: as they are kept
    average: begin from the moving average of the weights, of a run with optim.ema_decay
    """
    if interval < 1:
        raise UserError(f"--interval={interval} must be at least 1")
    note = "not function-preserving: train it on"
    _operate(src, dst, dtype, average, lambda args, state: operations.to_nope(args, state, interval), note)


def _operate(
    src: str, dst: str, dtype: str | None, average: bool, operation: Operation, note: str | None = None
) -> None:
    """Read, operate, compare, write; all that can be refused is, before any weights are read."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(DTYPES)}")
    check_free(Path(dst))
    args = args_of(src, notify=None)  # the notes are given below, where it is read
    operation(args, dict(LLM(args, device="meta").named_parameters()))
    chosen = _kept_dtype(src, average) if dtype is None else DTYPES[dtype]

    before = LLM.from_pretrained(src, chosen, average=average)
    new_args, state = operation(before.args, before.state_dict())
    after = operations.build(new_args, state)
    change, largest = _difference(before, after)
    after.origin = before.origin  # its chat template is that of src, too
    after.save_pretrained(dst, tokenizer=_tokenizer(src))
    for key, old, new in _changes(before.args, new_args):
        print(f"{key}: {old} -> {new}")
    print(f"parameters: {_count(before):,} -> {_count(after):,}, as {str(chosen).removeprefix('torch.')}")
    what, read = ("logits", "tokens") if before.args.input_dim is None else ("outputs", "steps")
    print(
        f"{what} of {PROBE_TOKENS} random {read} change by at most {change:.1e}, the largest being {largest:.3g}"
        + ("" if note is None else f"; {note}")
    )


def _kept_dtype(src: str, average: bool) -> torch.dtype:
    if is_foreign(Path(src)):
        return open_foreign(Path(src)).files.dtype()
    return CheckpointWeights(load_checkpoint(src)[0], average).dtype()


def _tokenizer(src: str) -> Tokenizer | None:
    try:
        return tokenizer_of(src)
    except UserError as error:
        print(f"note: written without a tokenizer: {error}")
        return None


def _difference(before: LLM, after: LLM) -> tuple[float, float]:
    """Largest change of a logit of an old token, and the largest logit; of a model of values, of an output in the units
    of the data. An encoder-decoder reads the tokens on both sides."""
    args, noise = before.args, torch.Generator().manual_seed(0)
    with torch.no_grad():
        if args.input_dim is not None:
            features = torch.randn((1, PROBE_TOKENS, args.input_dim), generator=noise)
            read = TransformerInput.of_features(features)
            expected, found = (model(read).outputs for model in (before, after))
        else:
            row = torch.randint(args.vocab_size, (1, PROBE_TOKENS), generator=noise)
            if args.vision is not None:  # a slot would ask for a picture
                row[row == args.vision.patch_token_id] = (args.vision.patch_token_id + 1) % args.vocab_size
            read = TransformerInput(row, source=TransformerInput(row) if args.encoder_layers else None)
            expected, found = (model(read).logits[..., : args.vocab_size] for model in (before, after))
    return float((found - expected).abs().max()), float(expected.abs().max())


def _changes(before: ModelArgs, after: ModelArgs) -> list[tuple[str, object, object]]:
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return [(f"model.{key}", old[key], new[key]) for key in old if old[key] != new[key]]


def _count(model: LLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def surgery(command: str) -> None:
    """Make a new model from a trained one. `surgery.py COMMAND --help` lists the flags of a command."""
    raise UserError(f"{command!r} is not one of {', '.join(COMMANDS)}")


COMMANDS: dict[str, Callable[..., None]] = {
    "upcycle": upcycle,
    "deepen": deepen,
    "vocabulary": vocabulary,
    "nope": nope,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the line begins with."""
    line = list(sys.argv[1:] if argv is None else argv)
    known = bool(line) and (line[0] in COMMANDS or any(word in HELP for word in line))
    run_cli(surgery, line if known else line[:1], **COMMANDS)


if __name__ == "__main__":
    main()
