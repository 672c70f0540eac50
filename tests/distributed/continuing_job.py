"""Run under torchrun: the answers to Continue requests on several layouts."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from llm import ModelArgs
from llm.evaluate.continuing import continue_
from llm.evaluate.requests import Continue
from llm.generation.beams import Beams
from llm.generation.pictures import Pictures
from llm.generation.sampling import Sampling
from llm.parallel.collectives import gather_json
from llm.parallel.grid import make_grid
from llm.parallel.launch import process
from llm.parallel.layout import Layout
from llm.parallel.replica import Replica
from llm.tokenizer import ByteTokenizer
from tests.model.models import LLAMA4, MOE
from vision.opening import LIMITS

LAYOUTS = {"pipeline": {"pipeline": 2}, "tensor": {"tensor": 2}, "expert": {"expert": 2}}
ARGS = LLAMA4 | dict(vocab_size=272, max_seq_len=64, tie_embeddings=False, moe=MOE | {"top_k": 2})
REQUESTS = [
    Continue(tuple(range(40, 44 + 3 * number)), 6 + number, ("e",), Sampling(number % 2 * 0.8, seed=7))
    for number in range(10)
] + [Continue(tuple(range(60, 64 + 5 * number)), 5 + number, ("e",), beams=Beams(3, 0.7)) for number in range(3)]
BATCH_TOKENS = 200


def answers(replica: Replica) -> list[dict[str, object]]:
    """In order."""
    tokenizer, pictures = ByteTokenizer(), Pictures(None, "model", LIMITS)
    found = dict(continue_(replica, tokenizer, tokenizer.end_ids, REQUESTS, BATCH_TOKENS, pictures))
    return [asdict(found[index]) for index in range(len(REQUESTS))]


def main() -> None:
    process.quiet_libraries()
    world = process.start(60, 1)
    report = {}
    for name, axes in LAYOUTS.items():
        replica = Replica.build(ModelArgs.model_validate(ARGS), 0, make_grid(world, Layout(world.size, **axes)))
        report[name] = gather_json(answers(replica), world)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    process.run(main)
