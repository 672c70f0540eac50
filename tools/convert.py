"""Foreign checkpoints in and out.

    python tools/convert.py import SRC DST              a Hugging Face or Meta folder as a model folder of ours
    python tools/convert.py export SRC DST --format hf  a run, checkpoint or model folder of ours as a foreign one
    python tools/convert.py export SRC DST --format peft    the adapter of a run or checkpoint, for PEFT
                                                        (with --format hf SRC may be such an adapter: DST is the whole)
    python tools/convert.py inspect SRC                 what a foreign folder is; reads no weights
    python tools/convert.py inspect config.json --yaml  a model config of ours from that file alone
    python tools/convert.py verify A B --text FILE      whether two models, of ours or foreign, say the same
    python tools/convert.py verify A --with transformers    whether that library reads A, or its export, as we do

DST appears whole or not at all. One tensor is in memory at a time; Meta's files are made one at a time.
"""

import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

import torch
from torch import Tensor
from tqdm import tqdm

from llm import LLM
from llm.adapters.merge import refuse_incomplete
from llm.adapters.peft_folder import is_peft, open_peft, write_peft
from llm.args import ModelArgs
from llm.args.written import model_file
from llm.checkpoint.fragments import DTYPES
from llm.checkpoint.frozen import Taken, frozen_in
from llm.checkpoint.model_folder import write_model_folder
from llm.checkpoint.run_folder import load_checkpoint, model_args
from llm.checkpoint.weights import CheckpointWeights, Weights
from llm.cli import run_cli
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.foreign import processor
from llm.foreign.configs import open_config
from llm.foreign.export import choose_family, export_hf, export_meta, fitting_family, meaning
from llm.foreign.extra import BESIDE, Beside, kept_files
from llm.foreign.files import is_foreign, open_foreign
from llm.foreign.finite import FiniteWeights
from llm.foreign.probes import ROW, picture_rows, random_rows, without_slots
from llm.foreign.reference import compare_with, open_reference
from llm.malloc import give_back_freed
from llm.parameters import ParameterTable
from llm.paths import PathText, check_free
from llm.pretrained import (
    base_of,
    checkpoint_weights,
    read_foreign,
    tokenizer_of,
    transformers_family,
    unmerged_weights,
    weights_of,
)
from llm.tokenizer import Tokenizer
from llm.tokenizers.folder import TOKENIZER_FILES, notes_of

DEFAULT_SHARD_GB = 5.0
SHOWN = 4
"""Names that a line lists."""
LARGE_BYTES = 1 << 20
"""Memory from this size on goes back to the system when it is freed. By itself glibc learns from the first buffers to
keep them, 100 MB and more."""


def import_(
    src: PathText,
    dst: PathText,
    family: str | None = None,
    dtype: str | None = None,
    set: list[str] | None = None,
    text_only: bool = False,
    allow_nonfinite: bool = False,
    quiet: bool = False,
) -> None:
    """Read a foreign folder into a model folder of ours.

    src: folder with config.json or params.json
    dst: folder to make
    family: read it as this family, whatever its config says
    dtype: of the weights written: float32, bfloat16 or float16; default: the file's own
    set: keys of ModelArgs that hold instead of what the config says, as rope_scaling.factor=32
    text_only: leave out the vision tower of a multimodal model
    allow_nonfinite: take weights with NaN or infinite values too
    quiet: no progress bar
    """
    asked = _dtype(dtype)
    check_free(Path(dst))
    source = open_foreign(Path(src), family, _overrides(set or []), text_only)
    chosen = asked or _kept(source.files.dtype())
    for line in (*source.warnings, *_rounded(source.files.dtypes(), chosen)):
        print(f"note: {line}")
    source.weights().check_twins()
    weights = FiniteWeights(source.weights(), allow_nonfinite)
    tokenizer = _tokenizer_or_note(Path(src))
    total = _parameters(source.args) * chosen.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, disable=quiet or not sys.stderr.isatty()) as bar:
        write_model_folder(
            Path(dst),
            source.args,
            weights,
            dtype=chosen,
            source={"family": source.family.name, "path": str(Path(src).resolve())},
            tokenizer=tokenizer,
            keep={name: Path(src) / name for name in _kept_names(source.args) if (Path(src) / name).is_file()},
            notify=bar.update,
        )
    for line in weights.found.values():
        print(f"note: {line}")
    print(f"{src}: {source.family.name}, {_parameters(source.args):,} parameters, written to {dst} as {_name(chosen)}")


def _kept_names(args: ModelArgs) -> tuple[str, ...]:
    """Files beside weights that an export gives back."""
    return TOKENIZER_FILES if args.vision is None else BESIDE


def _overrides(pairs: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set={pair}: give KEY=VALUE, as rope_scaling.factor=32")
        group, dot, inner = key.partition(".")
        try:
            read = json.loads(value)
        except ValueError:
            read = value
        if dot:
            found.setdefault(group, {})[inner] = read
        else:
            found[key] = read
    return found


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise UserError(f"--dtype={name} is not one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def _kept(dtype: torch.dtype) -> torch.dtype:
    """In which weights of a dtype are kept: nothing of ours is float64."""
    return dtype if dtype in DTYPES.values() else torch.float32


def _rounded(counts: Counter[torch.dtype], chosen: torch.dtype) -> Iterator[str]:
    """A line for each dtype of a file that the chosen one cannot hold."""
    for dtype, n in counts.items():
        if torch.promote_types(dtype, chosen) != chosen:
            keep = "" if _kept(dtype) != dtype else "; --dtype=float32 keeps them"
            yield f"{n} of {counts.total()} tensors are {_name(dtype)}, rounded to {_name(chosen)}{keep}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parameters(args: ModelArgs) -> int:
    return sum(parameter.numel() for parameter in LLM(args, device="meta").parameters())


def _tokenizer_or_note(path: Path) -> Tokenizer | None:
    """The tokenizer, if there is one that this project can use: weights are worth importing without."""
    try:
        found = tokenizer_of(path, notify=None)
    except UserError as error:
        print(f"note: {error}")
        return None
    for line in notes_of(found):
        print(f"note: {line}")
    return found


def export(
    src: PathText,
    dst: PathText,
    format: str = "hf",
    family: str | None = None,
    dtype: str | None = None,
    shard_gb: float = DEFAULT_SHARD_GB,
    shards: int = 1,
    average: bool = False,
    quiet: bool = False,
) -> None:
    """Write a model of ours as a foreign folder.

    src: run folder, checkpoint, model folder, or an adapter of PEFT, which is added to its base
    dst: folder to make
    format: hf (for transformers and what reads its files), meta (consolidated.NN.pth), or peft (the adapter alone)
    family: as which family; default: the one that it came from, else the first that can say what the model is
    dtype: of the weights written: float32, bfloat16 or float16; default: as they are kept
    shard_gb: hf: largest file in GB (1e9 bytes)
    shards: meta: number of files, one a tensor-parallel rank
    average: the moving average of the weights, of a run with optim.ema_decay
    quiet: no progress bar
    """
    if format not in ("hf", "meta", "peft"):
        raise UserError(f"--format={format} is not one of hf, meta, peft")
    if not shard_gb > 0 or not math.isfinite(shard_gb):
        raise UserError(f"--shard_gb={shard_gb} must be above 0")
    if shards < 1:
        raise UserError(f"--shards={shards} must be at least 1")
    asked = _dtype(dtype)
    check_free(Path(dst))
    if format == "peft":
        _export_adapter(Path(src), Path(dst), family, asked or torch.float32, average)
        return
    model = _adapted(Path(src), average) if is_peft(Path(src)) else _trained(src, average)
    args, weights = model.args, model.weights
    target_family = choose_family(args, format, family) if family else fitting_family(args, format, model.family)
    chosen = asked or model.dtype
    as_family = target_family.name if format == "hf" else None
    extra = kept_files(model.beside, args, _tokenizer_or_note(Path(src)), as_family)
    total = _parameters(args) * chosen.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, disable=quiet or not sys.stderr.isatty()) as bar:
        if format == "hf":
            export_hf(
                Path(dst),
                args,
                weights,
                target_family,
                dtype=chosen,
                max_shard_bytes=int(shard_gb * 1e9),
                extra_files=extra.files,
                extra_config=extra.config,
                notify=bar.update,
            )
        else:
            export_meta(
                Path(dst),
                args,
                weights,
                target_family,
                dtype=chosen,
                shards=shards,
                extra_files=extra.files,
                notify=bar.update,
            )
    for line in extra.notes:
        print(f"note: {line}")
    print(f"{src}: written to {dst} as {target_family.name}, {_name(chosen)}")


class Exported(NamedTuple):
    """A model to write."""

    args: ModelArgs
    weights: Weights
    family: str | None
    """That it came from."""
    dtype: torch.dtype
    """In which its weights are kept."""
    beside: Beside


def _trained(src: str, average: bool) -> Exported:
    """The model of a run, checkpoint or model folder."""
    if is_foreign(Path(src)):
        raise UserError(
            f"{src}: is a foreign folder already; import makes one of ours of it, and every command reads it as it is"
        )
    checkpoint, args = load_checkpoint(src)
    family, dtype = checkpoint.meta.get("source", {}).get("family"), DTYPES[checkpoint.dtype()]
    return Exported(args, checkpoint_weights(checkpoint, average), family, dtype, Beside.checkpoint(checkpoint))


def _adapted(src: Path, average: bool) -> Exported:
    """The model that an adapter of PEFT and its base make together."""
    if average:
        raise UserError(f"{src}: holds no averaged weights")
    args, weights = weights_of(src)
    base = base_of(open_peft(src))
    own = Beside.foreign(src)
    if is_foreign(base):
        source = read_foreign(base, None)
        beside = own.over(Beside.foreign(base))
        return Exported(args, weights, source.family.name, _kept(source.files.dtype()), beside)
    model = _trained(str(base), average=False)
    return Exported(args, weights, model.family, model.dtype, own.over(model.beside))


def _export_adapter(src: Path, dst: Path, family: str | None, dtype: torch.dtype, average: bool) -> None:
    """Write the adapter of a run or checkpoint as PEFT reads it."""
    if is_peft(src):
        raise UserError(f"{src}: is an adapter of PEFT already; --format=hf writes it and its base as one model")
    checkpoint, _ = load_checkpoint(src)
    args, frozen = model_args(checkpoint), frozen_in(checkpoint)
    if args.lora is None or frozen is None:
        raise UserError(f"{src}: holds no adapter; write the model with --format=hf")
    refuse_incomplete(src, args, checkpoint.shapes)
    base = frozen.origin.path if isinstance(frozen.origin, Taken) else None
    if family is not None or base is None:
        target = choose_family(args.merged, "hf", family)
    else:
        target = transformers_family(base)
    extra = kept_files(Beside.checkpoint(checkpoint), args, _tokenizer_or_note(src), target.name)
    of_model = ("config.json", "generation_config.json", *processor.FILES)
    files = {name: content for name, content in extra.files.items() if name not in of_model}
    weights = CheckpointWeights(checkpoint, average)
    rows_of = unmerged_weights(checkpoint) if args.lora.token_rows is not None else None
    notes = write_peft(
        dst, args, weights, target, dtype=dtype, origin=frozen.origin, extra_files=files, base=rows_of
    )  # fmt: skip
    for line in (*notes, *extra.notes):
        print(f"note: {line}")
    print(f"{src}: its adapter written to {dst} for {target.name}, {_name(dtype)}")


def inspect(src: PathText, family: str | None = None, text_only: bool = False, yaml: bool = False) -> None:
    """Say what a foreign folder is, from its config and the headers of its files.

    src: folder with config.json or params.json; with yaml, a config.json alone will do
    family: read it as this family, whatever its config says
    text_only: without the vision tower of a multimodal model
    yaml: print the model's keys as a file for configs/model/, from its config.json alone; notes go to stderr
    """
    if yaml:
        bare = open_config(Path(src), family, text_only)
        for line in bare.notes:
            print(f"note: {line}", file=sys.stderr)
        total = sum(row.numel for row in ParameterTable.of(bare.args).values())
        print(model_file(bare.args, f"{bare.family.name}, {total:,} parameters"), end="")
        return
    source = open_foreign(Path(src), family, text_only=text_only)
    for line in source.warnings:
        print(f"note: {line}")
    print(f"family      {source.family.name} ({source.family.format})")
    print(f"parameters  {_parameters(source.args):,}, {_name(source.files.dtype())}")
    twins = sorted({pair.key for pair in source.found.pairs if pair.twin})
    print(f"tensors     {len(source.files.shapes())}, all known" + (f"; held twice: {len(twins)}" if twins else ""))
    if source.dropped:
        more = f" and {len(source.dropped) - SHOWN} more" if len(source.dropped) > SHOWN else ""
        print(f"not read    {len(source.dropped)}: {', '.join(source.dropped[:SHOWN])}{more}")
    defaults = ModelArgs(dim=source.args.dim, n_layers=1, n_heads=1, head_dim=2)
    for key, value in source.args.model_dump(mode="json").items():
        if value != getattr(defaults, key) or key == "dim":
            print(f"  {key}: {json.dumps(value)}")


@torch.no_grad()
def verify(
    a: PathText,
    b: PathText | None = None,
    text: PathText | None = None,
    tokens: int = 512,
    tolerance: float = 1e-5,
    with_: str | None = None,
) -> None:
    """Compare the logits of two models on a text, or all that a model says with what it says in transformers; exit
    status 1 where they differ, by more than the tolerance.

    a: run folder, checkpoint, model folder of ours, or foreign folder
    b: another one; with transformers, the Hugging Face folder that it reads. Default then: a itself, or its export
    text: file whose beginning is read by the tokenizer of either; default: random tokens
    tokens: how many tokens are compared, in rows of up to 256
    tolerance: largest difference of logits, relative to the largest logit
    with: transformers: ids of 1,000 prompts and the lines of the text, logits, greedy texts
    """
    if tokens < 1:
        raise UserError(f"--tokens={tokens} must be at least 1")
    if with_ is not None:
        if with_ != "transformers":
            raise UserError(f"--with={with_}: possible is transformers")
        _verify_with_transformers(a, b, text, tokens, tolerance)
        return
    if b is None:
        raise UserError("missing --b: the other model; or --with=transformers, which compares with that library")
    first, second = (LLM.from_pretrained(path) for path in (a, b))
    mine, theirs = (meaning(model.args) for model in (first, second))
    for key in sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)):
        print(f"note: {key}: {mine.get(key)} in {a}, {theirs.get(key)} in {b}")
    if first.args.vocab_size != second.args.vocab_size:
        raise UserError(f"vocabularies differ: {first.args.vocab_size} in {a}, {second.args.vocab_size} in {b}")
    largest = worst = torch.zeros((), dtype=torch.float64)
    kl, agree, seen = 0.0, 0, 0
    for row, tiles in _rows(a, b, text, tokens, first.args, second.args):
        given = TransformerInput(row[None], images=tiles)
        x, y = (model(given).logits[0].double() for model in (first, second))
        largest, worst = largest.maximum(x.abs().max()), worst.maximum((x - y).abs().max())  # NaN if any is
        p, q = x.log_softmax(-1), y.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        agree += int((x.argmax(-1) == y.argmax(-1)).sum())
        seen += len(row)
    print(f"largest logit difference  {worst:.3e} ({worst / largest.clamp(min=1e-30):.3e} of the largest logit)")
    print(f"KL divergence             {kl / seen:.3e} nats a token")
    print(f"greedy agreement          {agree} of {seen}")
    if not worst <= tolerance * largest:
        print(f"differ by more than {tolerance} of the largest logit")
        sys.exit(1)


def _verify_with_transformers(a: str, b: str | None, text: str | None, tokens: int, tolerance: float) -> None:
    if b is not None and is_foreign(Path(a)) and not is_foreign(Path(b)):
        a, b = b, a
    content = None if text is None else _content(text)
    with tempfile.TemporaryDirectory() as folder:
        if b is None and not is_foreign(Path(a)):
            b = str(Path(folder) / "export")
            export(a, b, quiet=True)
        reference = open_reference(Path(a if b is None else b))
        model = LLM.from_pretrained(a)
        verdict = compare_with(model, _tokenizer_or_note(Path(a)), reference, content, tokens, tolerance)
    for line in verdict.lines:
        print(line)
    for line in verdict.differences:
        print(f"different: {line}")
    if verdict.differences:
        sys.exit(1)
    print(f"equal in transformers, within {tolerance} of the largest logit")


def _content(text: str) -> str:
    try:
        return Path(text).read_text(errors="strict")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text={text}: {error}") from None


def _rows(
    a: str, b: str, text: str | None, tokens: int, first: ModelArgs, second: ModelArgs
) -> list[tuple[Tensor, Tensor | None]]:
    """Rows of ids, and of tiles where both models read such."""
    if text is None:
        rows = list(random_rows(first if first.vision is not None else second, tokens))
    else:
        tokenizer = _either_tokenizer(a, b)
        ids = torch.tensor(tokenizer.prompt_ids(_content(text)[: 16 * tokens])[:tokens])
        if int(ids.max()) >= first.vocab_size:
            raise UserError(f"--text={text}: its tokens go beyond the vocabulary of {first.vocab_size}")
        rows = [without_slots(first, without_slots(second, row)) for row in ids.split(ROW)]
    alike = first.vision is not None and first.vision == second.vision
    return [*((row, None) for row in rows), *(picture_rows(first) if alike else ())]


def _either_tokenizer(a: str, b: str) -> Tokenizer:
    try:
        return tokenizer_of(a)
    except UserError:
        return tokenizer_of(b)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    give_back_freed(LARGE_BYTES)
    commands: dict[str, Any] = {"import": import_, "export": export, "inspect": inspect, "verify": verify}
    run_cli(import_, argv, **commands)


if __name__ == "__main__":
    main()
