"""Whether a folder says in `transformers` what a model says here: ids of prompts, logits, greedy text.

transformers is no dependency: it is imported here, when it is asked for. Both models compute in float32, and attention
there is the plain one, which has all that a config can ask for (soft caps).

Shapes: T tokens, V vocabulary.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.foreign.probes import ROW, picture_rows, random_rows, without_slots
from llm.generate import generate
from llm.model import LLM
from llm.tokenizer import Tokenizer
from llm.tokenizers.check import check_texts, compare

TEXTS = 1000
Row = tuple[Tensor, Tensor | None]
"""Ids, and the tiles for their slots."""
PROMPTS = ("", "Once upon a time", "def f(x):\n", " 1 + 1 =")
NEW_TOKENS = 24
SAMPLING: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p")) | {"do_sample": False}
STEERING: dict[str, Any] = {
    "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "forced_eos_token_id": None, "min_new_tokens": None,
}  # fmt: skip
"""Settings of transformers that change greedy text, off."""
BROKEN = "\ufffd"
SHOWN = 3


@dataclass
class Verdict:
    """What was compared, a line each, and where the two differ."""

    lines: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """A folder as transformers reads it."""

    folder: Path
    model: Any
    tokenizer: Any
    """None without one."""
    problems: tuple[str, ...]
    """What it could not read."""


def open_reference(folder: Path) -> Reference:
    """UserError on one line when transformers is not installed, or cannot load the model."""
    try:
        import transformers
    except ImportError:
        raise UserError("--with=transformers needs the package transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json, so transformers cannot read it")
    loaded: Any
    try:
        loaded = _class_of(transformers, folder).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # the library raises what it likes
        raise UserError(f"{folder}: transformers cannot load it: {_first_line(error)}") from None
    model, report = loaded
    problems = [
        f"transformers finds {len(names)} {kind.replace('_', ' ')}: {', '.join(sorted(map(str, names))[:SHOWN])}"
        for kind, names in report.items()
        if names and kind in ("missing_keys", "mismatched_keys", "conversion_errors")
    ]
    tokenizer = None
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            problems.append(f"AutoTokenizer cannot read the tokenizer: {_first_line(error)}")
    return Reference(folder, model.eval(), tokenizer, tuple(problems))


def _class_of(transformers: Any, folder: Path) -> Any:
    """Which class of the library reads a model: one with a vision tower is another than one of text alone."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    both = hasattr(config, "vision_config")
    return transformers.AutoModelForImageTextToText if both else transformers.AutoModelForCausalLM


@torch.no_grad()
def compare_with(
    model: LLM, tokenizer: Tokenizer | None, theirs: Reference, text: str | None, tokens: int, tolerance: float
) -> Verdict:
    """All differences between a model with its tokenizer and what transformers reads.

    text: compared beside texts of our own, whole and by lines. tokens: how many are compared by their logits.
    tolerance: largest difference of logits, relative to the largest one.
    """
    found = Verdict(differences=list(theirs.problems))
    vocabulary = int(theirs.model.get_input_embeddings().weight.shape[0])
    if vocabulary != model.args.vocab_size:
        found.differences.append(f"vocabularies: {model.args.vocab_size} tokens here, {vocabulary} there")
        return found
    _compare_ids(found, tokenizer, theirs, text)
    rows: list[Row] = [(ids, None) for ids in _rows(model, tokenizer, text, tokens)]
    rows += picture_rows(model.args)
    if tokenizer is not None and max(tokenizer.end_ids, default=0) >= vocabulary:
        found.differences.append(f"the tokenizer has ids beyond the vocabulary of {vocabulary}")
    largest = _compare_logits(found, model, theirs, rows, tolerance)
    if tokenizer is not None and theirs.tokenizer is not None:
        _compare_texts(found, model, tokenizer, theirs, tolerance * largest)
    return found


def _compare_ids(found: Verdict, tokenizer: Tokenizer | None, theirs: Reference, text: str | None) -> None:
    if tokenizer is None or theirs.tokenizer is None:
        if tokenizer is not None or theirs.tokenizer is not None:
            where = "there" if tokenizer is not None else "here"
            found.differences.append(f"the tokenizer: there is none {where}")
        else:
            found.lines.append("ids of prompts            no tokenizer on either side: only logits are compared")
        return
    spelled = sorted({str(token) for token in theirs.tokenizer.get_added_vocab()})
    texts = [*check_texts(TEXTS, spelled), *([text, *text.splitlines()] if text is not None else [])]
    differences = compare(tokenizer, theirs.tokenizer, texts)
    found.lines.append(f"ids of prompts            {len(texts) - len(differences)} of {len(texts)} texts equal")
    found.differences += [str(difference) for difference in differences[:SHOWN]]
    if len(differences) > SHOWN:
        found.differences.append(f"and so on: {len(differences)} texts in all")
    ends = theirs.model.generation_config.eos_token_id
    ends = tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (int(ends),)
    if set(ends) != set(tokenizer.end_ids):
        found.differences.append(f"what ends a generation: ids {tokenizer.end_ids} here, {ends} there")


def _rows(model: LLM, tokenizer: Tokenizer | None, text: str | None, tokens: int) -> Iterator[Tensor]:
    """Rows of ids: of the text, or of texts of our own, and as many at random, which visit all of the table."""
    vocabulary = model.args.vocab_size
    yield from random_rows(model.args, tokens)
    if tokenizer is None:
        return
    left = tokens
    for each in [text] if text is not None else check_texts(64):
        try:
            ids = [i for i in tokenizer.prompt_ids(each[: 16 * left]) if i < vocabulary][:left]
        except UserError:  # a text that this tokenizer cannot write
            continue
        left -= len(ids)
        rows = without_slots(model.args, torch.tensor(ids, dtype=torch.long)).split(ROW)
        yield from (row for row in rows if len(row))
        if left <= 0:
            return


def _compare_logits(
    found: Verdict, model: LLM, theirs: Reference, rows: Sequence[Row], tolerance: float
) -> float:
    """The largest logit."""
    largest = worst = torch.zeros((), dtype=torch.float64)
    kl, agree, seen = 0.0, 0, 0
    for row, tiles in rows:
        x = model(TransformerInput(row[None], images=tiles)).logits[0].double()
        extra = {} if tiles is None else {"pixel_values": tiles}
        y = theirs.model(row[None], **extra).logits[0].double()
        largest, worst = largest.maximum(x.abs().max()), worst.maximum((x - y).abs().max())  # NaN if any is
        p, q = x.log_softmax(-1), y.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        agree += int((x.argmax(-1) == y.argmax(-1)).sum())
        seen += len(row)
    relative = worst / largest.clamp(min=1e-30)
    if model.args.vision is not None and model.args.vision.kind == "native":
        found.lines.append("rows with images          none: pictures of native sizes are not compared")
    if any(tiles is not None for _, tiles in rows):
        found.lines.append(f"rows with images          {sum(tiles is not None for _, tiles in rows)} of {len(rows)}")
    found.lines.append(f"largest logit difference  {worst:.3e} ({relative:.3e} of the largest logit)")
    found.lines.append(f"KL divergence             {kl / seen:.3e} nats a token")
    found.lines.append(f"greedy agreement          {agree} of {seen}")
    if not worst <= tolerance * largest:
        found.differences.append(f"logits: by {relative:.3e} of the largest one, more than {tolerance}")
    return float(largest)


def _compare_texts(found: Verdict, model: LLM, tokenizer: Tokenizer, theirs: Reference, margin: float) -> None:
    """Greedy continuations, as a user of either would get them; ties, within `margin` of a logit, end a text."""
    settings = theirs.model.generation_config
    odd = sorted(key for key, value in STEERING.items() if getattr(settings, key, None) not in (None, value))
    if odd:
        found.lines.append(f"note: generation_config.json sets {', '.join(odd)}, which greedy text here leaves out")
    equal = 0
    for prompt in PROMPTS:
        try:
            ids = tokenizer.prompt_ids(prompt)
        except UserError:  # a prompt that this tokenizer cannot write
            equal += 1
            continue
        (ours,) = generate(model, [ids], max_new_tokens=NEW_TOKENS, stop_ids=tokenizer.end_ids)
        inputs = torch.tensor([ids])
        out = theirs.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            **SAMPLING,
            **STEERING,
        )
        yours = out[0, len(ids) :].tolist()
        while yours and yours[-1] in tokenizer.end_ids and len(yours) > len(ours):
            yours.pop()
        at = next((i for i, pair in enumerate(zip(ours, yours, strict=False)) if pair[0] != pair[1]), None)
        if at is not None:
            logits = model(torch.tensor([ids + ours[:at]])).logits[0, -1]
            if abs(float(logits[ours[at]] - logits[yours[at]])) <= margin:
                ours, yours = ours[:at], yours[:at]
        here, there = tokenizer.decode(ours), theirs.tokenizer.decode(yours, skip_special_tokens=True)
        whole = BROKEN not in here + there  # bytes that are no text are shown in ways of each library's own
        if ours != yours or (whole and here != there):
            found.differences.append(f"greedy text after {prompt!r}: {here[:60]!r} here, {there[:60]!r} there")
        else:
            equal += 1
    found.lines.append(f"greedy texts              {equal} of {len(PROMPTS)} equal")


def _first_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error).strip() or type(error).__name__)[:300]
