"""Run under torchrun: answers to requests with and without images on several layouts, all in one job to save start-up
time. Of two ranks that read other rows, one has text alone.
"""

import json
import sys
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm import LLM
from llm.args.vision import VisionArgs
from llm.evaluate import scoring
from llm.evaluate.head import target_scores
from llm.evaluate.requests import Continue, NonFinite, Request, Score
from llm.evaluate.runner import Runner
from llm.generation.pictures import Pictures
from llm.parallel.collectives import gather_json
from llm.parallel.launch import process
from llm.parallel.replica import Replica
from llm.tokenizers.extended import ExtendedTokenizer
from llm.tokenizers.simple import ByteTokenizer
from tests.distributed.vision_job import VISION, build
from tests.vision.pictures import picture
from vision.opening import LIMITS
from vision.preprocess import image_text
from vision.tokens import NAMES, ImageTokens

TOKENIZER = ExtendedTokenizer(ByteTokenizer(), list(NAMES.values()))
MODEL: dict[str, Any] = {
    "vocab_size": TOKENIZER.vocab_size,
    "vision": {**VISION, "patch_token_id": ImageTokens.of(TOKENIZER).patch},
}
LAYOUTS: dict[str, dict[str, int]] = {
    "data": {},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "expert": {"expert": 2},
    "ZeRO-3": {"zero_stage": 3},
}
IN_STEP = ("expert", "ZeRO-3")
"""Whose ranks make their forwards together, though they read other rows."""
BATCH_TOKENS = 120


def case_of(layout: dict[str, int]) -> dict[str, Any]:
    """What vision_job builds of a layout."""
    return {"model": MODEL, "parallel": layout, "train": {"micro_batch_size": 2}}


def requests(pictures: Pictures, vision: VisionArgs) -> list[Request]:
    """Questions about one image, whose answers have it in common; a prompt that it stands in; text alone."""
    file = BytesIO()
    picture(8, 8).save(file, "PNG")
    seen = pictures.look(file.getvalue(), "a picture")
    begin = TOKENIZER.bos_id
    ids = (begin, *image_text(seen.grid, vision, TOKENIZER), *b"what? ")
    scores: list[Request] = [Score(ids, tuple(text), (seen,)) for text in (b"red", b"green", b"dark red", b"blue")]
    scores += [Score((begin, *b"some text"), tuple(b" and %d more" % n)) for n in range(9)]
    scores += [Score((begin, 65 + n), tuple(range(60, 80 + n))) for n in range(9)]
    prompts: list[Request] = [Continue(ids, 5, pictures=(seen,))]
    return [*scores, *prompts, *(Continue((begin, *b"text %d" % n), 6) for n in range(5))]


def answers(replica: Replica) -> dict[int, dict[str, Any]]:
    """Those of this rank's replica, by the places of their requests."""
    vision = replica.model.args.vision
    assert vision is not None
    pictures = Pictures(vision, "model", LIMITS)
    runner = Runner(replica, TOKENIZER, BATCH_TOKENS, TOKENIZER.end_ids, pictures)
    batches = runner.answers(requests(pictures, vision), frozenset())
    return {place: asdict(answer) for batch in batches for place, answer in batch}


def failure_where_rank_1_has_none_finite(replica: Replica) -> list[Any]:
    """What this rank raises where only logits of rank 1 hold NaN: the number of the request, whether all ranks raise
    it, and the message."""

    def spoiled(model: LLM, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, ...]:
        logprobs, greedy, finite = target_scores(model, hidden_ND, targets_N)
        return logprobs, greedy, torch.zeros_like(finite)

    scoring.target_scores = spoiled if replica.world.rank == 1 else target_scores  # type: ignore[assignment]
    try:
        answers(replica)
    except NonFinite as error:
        return [error.index, error.agreed, str(error)]
    finally:
        scoring.target_scores = target_scores
    return []


def main() -> None:
    process.quiet_libraries()
    world = process.start(60, 1)
    report, failures = {}, {}
    for name, layout in LAYOUTS.items():
        engine, _ = build(case_of(layout), world)
        report[name] = gather_json(answers(engine.replica), world)
        if name in IN_STEP:
            failures[name] = gather_json(failure_where_rank_1_has_none_finite(engine.replica), world)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps([report, failures]))


if __name__ == "__main__":
    process.run(main)
