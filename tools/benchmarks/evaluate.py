"""Log-likelihoods and generation against lm-eval's HFLM: CPU time of the same requests to the same model, and memory.

    python tools/benchmarks/evaluate.py --data EVAL --text wikitext-2/valid.txt --tokenizer gpt2/tokenizer.json

Both get tokens to score and texts to continue, in float32 on one thread, each in a process of its own, and take turns:
HFLM with whichever size of batch is the fastest. The peer's process needs `make test-full`'s environment. EVAL holds
arc_easy.jsonl and hellaswag.sample.jsonl: rows of query, choices and gold.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from tqdm import tqdm

from llm.cli import run_cli
from llm.environment import alone
from llm.errors import UserError
from llm.evaluate.encode import Encoder
from llm.evaluate.loading import open_replica
from llm.evaluate.requests import Score
from llm.evaluate.scoring import score
from llm.generation.pictures import Pictures
from llm.malloc import keep_freed
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.parallel.replica import Replica
from llm.paths import PathText
from llm.tokenizer import TokenizerConfig, load_tokenizer
from tools.benchmarks.evaluate_generation import EQUAL, SAMPLED, STOPS, Writer, generations
from tools.benchmarks.evaluate_peer import Answers, serve
from tools.benchmarks.harness import RESULTS, Bar, Spread, check_same_work, table, write_result
from tools.benchmarks.memory import ENVIRONMENT
from tools.benchmarks.own_process import OwnProcess
from vision.opening import LIMITS

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".venv-eval" / "bin" / "python"
OURS, HFLM = "ours", "HFLM"
SIZES = (1, 8, 32, 64)
"""Of HFLM's batches."""
MOST_LOGITS = 1 << 29
"""Of a batch of HFLM, which holds them twice: a larger one is not tried, as it does not fit many machines."""
ROUNDS = 5
MIB = 2**20
LENGTH = 1024
"""The model's context."""
SHAPE: dict[str, Any] = dict(
    hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, intermediate_size=704,
    tie_word_embeddings=True, rms_norm_eps=1e-5,
)  # fmt: skip
SPEED_BARS = {"arc_easy, 0-shot": (1.5, 2.5), "hellaswag, 0-shot": (1.5, 2.5), "hellaswag, 5-shot": (3.0, 3.0),
              "rolling": (1.1, 1.3), EQUAL: (1.3, 1.3), STOPS: (1.8, 1.8), SAMPLED: (1.3, 1.3)}  # fmt: skip
"""Times HFLM's speed, with a small and a large vocabulary."""
LARGE = 30_000
"""Entries of a large one."""
SPREADS = {"model": 0.02, "writer": 0.1}
"""Of the random weights, of what scores and of what continues: with tied tables of usual ones a model repeats its last
token for ever."""
MEMORY_BAR = 1 / 3
"""Of HFLM's peak, of rolling windows."""
WRITTEN_TOKENS = 16384
"""Of texts that are continued together, as evaluations do by default."""
SAME_TEXTS = 0.9
"""Of greedy answers, at least: where the two likeliest tokens are nearly as likely, the last bits decide."""


def benchmark(
    data: PathText,
    text: PathText,
    tokenizer: PathText | None = None,
    vocabulary: int = 4096,
    documents: int = 16,
    rounds: int = ROUNDS,
    batch_tokens: int = 1024,
    output: str = str(RESULTS),
) -> None:
    """Time log-likelihoods and generation in turn with HFLM and write a dated result file.

    data: folder of arc_easy.jsonl and hellaswag.sample.jsonl
    text: a text for rolling windows
    tokenizer: a tokenizer.json; default: one of byte pairs made of the text
    vocabulary: entries of the tokenizer that is made
    documents: questions of 0-shot tasks, an eighth of them with examples, and an eighth as many windows; twice as many
        texts to continue
    rounds: rounds that count
    batch_tokens: of ours, of what is scored
    output: folder of the result file
    """
    if not PEER.is_file():
        raise UserError(f"{PEER.relative_to(ROOT)} is not there; make test-full makes it")
    with tempfile.TemporaryDirectory() as folder:
        n_tokens = prepare(Path(folder), Path(data), Path(text), tokenizer, vocabulary, documents)
        section = compare(Path(folder), n_tokens, rounds, batch_tokens)
    how = "Contestants took turns, each in a process of its own with one thread; CPU time"
    title = "Log-likelihoods and generation against HFLM"
    path = write_result(f"evaluate-{n_tokens}", title, [section], Path(output), how)
    print(section, f"\nwritten to {path}")


def prepare(
    folder: Path, data: Path, text: Path, tokenizer: str | None, vocabulary: int, documents: int
) -> int:
    """Write what both read: model, tokenizer, requests. Returns the size of the vocabulary."""
    import transformers

    made = transformers.PreTrainedTokenizerFast(
        tokenizer_file=tokenizer or str(_trained(folder, text, vocabulary)), eos_token="<|endoftext|>"
    )
    for name, spread in SPREADS.items():
        made.save_pretrained(folder / name)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(made), max_position_embeddings=LENGTH, initializer_range=spread, **SHAPE
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
    encoder = Encoder(load_tokenizer(TokenizerConfig(kind="hf", path=str(folder / "model"))), LENGTH)
    arc, hellaswag = (_rows(data / name) for name in ("arc_easy.jsonl", "hellaswag.sample.jsonl"))
    requests = {
        "arc_easy, 0-shot": list(_choices(encoder, arc[:documents], [])),
        "hellaswag, 0-shot": list(_choices(encoder, hellaswag[: documents // 2], [])),
        "hellaswag, 5-shot": list(_choices(encoder, hellaswag[: documents // 8], hellaswag[-5 * documents // 8 :])),
        "rolling": list(islice(encoder.windows(text.read_text()), documents // 8)),
    }
    (folder / "requests.json").write_text(json.dumps(requests))
    texts = generations(_writer(folder), text.read_text(), 2 * documents)
    (folder / "generations.json").write_text(json.dumps(texts))
    return len(made)


def _replica(path: Path) -> Replica:
    return open_replica(path, make_grid(World(0, 1, 0, torch.device("cpu"))), torch.float32)


def _writer(folder: Path) -> Writer:
    tokenizer = load_tokenizer(TokenizerConfig(kind="hf", path=str(folder / "writer")))
    return Writer(_replica(folder / "writer"), tokenizer, WRITTEN_TOKENS)


def _trained(folder: Path, text: Path, vocabulary: int) -> Path:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"], show_progress=False,
    )  # fmt: skip
    made.train([str(text)], trainer)
    made.save(str(folder / "made.json"))
    return folder / "made.json"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _choices(
    encoder: Encoder, rows: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Context and target of each choice; each row after five examples of its own, where there are any."""
    for number, row in enumerate(rows):
        before = "".join(
            f"{one['query']} {one['choices'][int(one['gold'])]}\n\n" for one in examples[5 * number : 5 * number + 5]
        )
        for choice in row["choices"]:
            pair = encoder.pair(before + row["query"], f" {choice}")
            yield pair.context, pair.target


def ours(folder: PathText, batch_tokens: int, keep_memory: bool = False) -> None:
    """Answer as stdin asks, as evaluate_peer.py does.

    folder: what `prepare` wrote
    batch_tokens: of a batch
    keep_memory: keep memory that is freed, as evaluations do
    """
    if keep_memory:
        keep_freed()
    serve(lambda: _answers(Path(folder), batch_tokens))


def _answers(folder: Path, batch_tokens: int) -> Answers:
    replica = _replica(folder / "model")
    writer = cache(lambda: _writer(folder))  # when it is first asked: what scores is not to be measured with it
    pictures = Pictures(None, "model", LIMITS)
    requests, texts = (json.loads((folder / f"{name}.json").read_text()) for name in ("requests", "generations"))

    def answer(name: str, _: int) -> float | list[str]:
        if name in texts:
            return writer().answers(texts[name])
        asked = [Score(tuple(context), tuple(target)) for context, target in requests[name]]
        return sum(found.logprob for _, found in score(replica, asked, batch_tokens, pictures))

    return answer


def apart(name: str, folder: Path, batch_tokens: int, measured: bool = False) -> OwnProcess:
    """A contestant. measured: it gives memory that is freed back at once, so that what is resident is in use."""
    command = [str(PEER), str(Path(__file__).with_name("evaluate_peer.py")), str(folder)]
    if name == OURS:
        command = [sys.executable, __file__, "ours", f"--folder={folder}", f"--batch_tokens={batch_tokens}"]
        command += [] if measured else ["--keep_memory"]
    environment = {**alone(), **(ENVIRONMENT if measured else {}), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return OwnProcess(name, command, environment)


@dataclass(frozen=True)
class Measured:
    """What came of one kind of requests: CPU seconds of ours and of HFLM in each round, HFLM's fastest size of batch
    and seconds with each, and bytes at most above what was there before the model."""

    ours: list[float]
    hflm: list[float]
    size: int
    sizes: dict[int, float]
    peaks: tuple[int, int]


def measure(
    contestants: Sequence[OwnProcess], small: Sequence[OwnProcess], name: str, sizes: Sequence[int], rounds: int
) -> Measured:
    """One kind of requests, in turns."""

    def ask(contestant: OwnProcess, size: int) -> tuple[float, Any, int]:
        seconds, made, peak = contestant.ask(json.dumps({"requests": name, "size": size}))
        return seconds, made, peak

    own, peer = contestants
    found = {size: ask(peer, size) for size in sizes}
    size = min(found, key=lambda size: found[size][0])
    check_same_answers(name, ask(own, size)[1], found[size][1])
    spent: dict[str, list[float]] = {OURS: [], HFLM: []}
    for number in range(rounds):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            spent[contestant.name].append(ask(contestant, size)[0])
    peaks = [ask(contestant, size)[2] for contestant in small]
    seconds = {of: one[0] for of, one in found.items()}
    return Measured(spent[OURS], spent[HFLM], size, seconds, (peaks[0], peaks[1]))


def check_same_answers(name: str, ours: Any, theirs: Any) -> None:
    """UserError where they are of other work: other sums of log-likelihoods, or too many other texts. Draws of two
    generators of random numbers are not the same texts."""
    if isinstance(ours, float):  # float32 logits of different orders of the same sums
        check_same_work({OURS: ours, HFLM: theirs}, rtol=5e-6)
        return
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    if name != SAMPLED and same < SAME_TEXTS * len(ours):
        raise UserError(f"{name}: only {same} of {len(ours)} answers of {OURS} and {HFLM} are the same")


def _sizes(requests: dict[str, Any], texts: dict[str, Any], n_tokens: int) -> dict[str, tuple[int, int, list[int]]]:
    """Of each kind: number of requests, their tokens (0 = not known before), and the sizes of HFLM's batches."""
    found = {}
    for name, pairs in requests.items():
        lengths = [len(context) + len(target) for context, target in pairs]
        sizes = [size for size in SIZES if size == 1 or size * max(lengths) * n_tokens <= MOST_LOGITS]
        found[name] = len(pairs), sum(lengths) - len(pairs), sizes
    return found | {name: (len(asked), 0, list(SIZES[1:])) for name, asked in texts.items()}


def compare(folder: Path, n_tokens: int, rounds: int, batch_tokens: int) -> str:
    """The section of the result."""
    requests, texts = (json.loads((folder / f"{name}.json").read_text()) for name in ("requests", "generations"))
    kinds = _sizes(requests, texts, n_tokens)
    lines, bars = [], []
    with ExitStack() as ends, tqdm(kinds, disable=not sys.stderr.isatty()) as names:
        both, small = (
            [ends.enter_context(apart(name, folder, batch_tokens, measured)) for name in (OURS, HFLM)]
            for measured in (False, True)
        )
        for name in names:
            number, tokens, sizes = kinds[name]
            found = measure(both, small, name, sizes, rounds)
            ratio = Spread.of([b / a for a, b in zip(found.ours, found.hflm, strict=True)])
            lines.append(
                [
                    name, f"{number:,}", f"{tokens:,}" if tokens else "",
                    Spread.of(found.ours).text(2), Spread.of(found.hflm).text(2),
                    ", ".join(f"{size}: {seconds:.2f}" for size, seconds in found.sizes.items()),
                    ratio.text(2), *(f"{peak / MIB:,.0f}" for peak in found.peaks),
                ]  # fmt: skip
            )
            bars.append(Bar(f"{name}: speed over HFLM", ratio.median, SPEED_BARS[name][n_tokens >= LARGE]))
            if name == "rolling":
                part = found.peaks[0] / found.peaks[1]
                bars.append(Bar(f"{name}: peak over HFLM's", part, MEMORY_BAR, at_least=False))
    head = ["requests", "number", "tokens", "ours, s", "HFLM, s", "HFLM by size", "times", "peak, MiB", "HFLM, MiB"]
    return "\n\n".join(
        [
            f"## Vocabulary of {n_tokens:,}",
            f"A random Llama of width {SHAPE['hidden_size']}, {SHAPE['num_hidden_layers']} layers, in float32. Batches "
            f"of {batch_tokens:,} tokens of ours; of HFLM, of the size that was the fastest in one round. Memory is "
            f"what is resident at most above what was there before the model, in processes that keep none of what is "
            f"freed. {rounds} rounds.",
            table(head, lines),
            "\n".join(f"* {bar.text()}" for bar in bars),
        ]
    )


if __name__ == "__main__":
    run_cli(benchmark, ours=ours)
