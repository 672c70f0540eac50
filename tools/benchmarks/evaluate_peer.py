"""The peer of tools/benchmarks/evaluate.py, in the environment of `make test-full`'s comparisons: lm-eval's HFLM, given
tokens to score and texts to continue. Imports nothing of this project.

    .venv-eval/bin/python tools/benchmarks/evaluate_peer.py FOLDER

It answers lines on stdin, JSON objects {"requests": NAME, "size": of a batch}, with JSON lines [CPU seconds, sum of the
log-likelihoods or the texts, bytes resident at most meanwhile above what was there before the model].
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import torch

Answers = Callable[[str, int], float | list[str]]


def resident(field: str) -> int:
    """VmRSS or VmHWM in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def serve(build: Callable[[], Answers]) -> None:
    """Answer as many lines as come. Whatever libraries print goes to stderr."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    before = resident("VmRSS")
    answer = build()
    for line in sys.stdin:
        asked = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")
        started = time.process_time()
        total = answer(asked["requests"], asked["size"])
        spent = time.process_time() - started
        print(json.dumps([spent, total, resident("VmHWM") - before]), file=answers, flush=True)


def hflm(folder: Path) -> Answers:
    """HFLM's answers; of log-likelihoods, after what its own loglikelihood and loglikelihood_rolling do with texts."""
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    transformers.utils.logging.disable_progress_bar()

    @cache
    def opened(name: str) -> HFLM:
        return HFLM(pretrained=str(folder / name), device="cpu", dtype="float32", batch_size=1)

    model = opened("model")
    requests = json.loads((folder / "requests.json").read_text())
    generations = json.loads((folder / "generations.json").read_text())

    def answer(name: str, size: int) -> float | list[str]:
        if name in generations:
            texts = [Instance("generate_until", {}, tuple(pair), i) for i, pair in enumerate(generations[name])]
            writer = opened("writer")
            writer.batch_size_per_gpu = size
            return list(writer.generate_until(texts, disable_tqdm=True))
        model.batch_size_per_gpu = size
        asked = [((str(number), ""), *pair) for number, pair in enumerate(requests[name])]
        found = model._loglikelihood_tokens(asked, disable_tqdm=True)
        return float(sum(logprob for logprob, _ in found))

    return answer


if __name__ == "__main__":
    serve(lambda: hflm(Path(sys.argv[1])))
