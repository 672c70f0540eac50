"""Fine-tuning on chats against TRL's SFTTrainer and a plain loop over transformers: target tokens a CPU second.

    python tools/benchmarks/finetune.py --chats CHATS.json --tokenizer gpt2/tokenizer.json

Every contestant trains the same model from the same weights on the same conversations, in float32 on one thread, each
in a process of its own; TRL in each of its modes. They take turns. The chats go through one template (ChatML), and the
turns of the assistant are trained with their end mark. The peers' processes need `make test-full`'s environment.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from tqdm import tqdm

from llm.batch import IGNORE
from llm.cli import run_cli
from llm.data.batch import StepBatch, collate
from llm.data.found import Found
from llm.data.packed import Packed
from llm.data.sample import Sample
from llm.data.samples import SampleSource, StoredItem, write_samples
from llm.data.source import TokenizerEntry
from llm.environment import alone
from llm.errors import UserError
from llm.malloc import keep_freed
from llm.objectives import objectives_of
from llm.parallel.engine.build import build_replica
from llm.parallel.engine.engine import Engine
from llm.parallel.grid import make_grid
from llm.parallel.launch import process
from llm.paths import PathText
from llm.pretrained import weights_of
from llm.tasks import task_named
from llm.train.config import OptimConfig
from llm.train.optimizer import make_optimizer
from tools.benchmarks.finetune_peer import ROWS, Clock
from tools.benchmarks.harness import RESULTS, Bar, Spread, table, write_result
from tools.benchmarks.memory import ENVIRONMENT
from tools.benchmarks.own_process import OwnProcess

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
TRL = ("bfd", "wrapped", "group_by_length", "padded")
OURS, PLAIN = "ours", "plain"
ROUNDS = 5
BLOCK = 1
"""Steps of a contestant in a round."""
SPEED_BARS = ((30_000, 2.0), (0, 1.3))
"""(vocabulary from, times the target tokens of the fastest mode of TRL)."""
MEMORY_BAR = 0.5
MIB = 2**20
SHAPE: dict[str, Any] = dict(
    hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, intermediate_size=704,
    tie_word_embeddings=False, rms_norm_eps=1e-5,
)  # fmt: skip
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
CONTROL = ["<|im_start|>", "<|im_end|>"]


def benchmark(
    chats: PathText,
    tokenizer: PathText | None = None,
    vocabulary: int = 4096,
    length: int = 1024,
    rounds: int = ROUNDS,
    output: str = str(RESULTS),
) -> None:
    """Time training on chats in turn with the peers and write a dated result file.

    chats: conversations as rows of instruction, input and output (.json)
    tokenizer: a tokenizer.json; default: one of byte pairs made of the chats
    vocabulary: entries of the tokenizer that is made
    length: tokens of a row
    rounds: rounds that count
    output: folder of the result file
    """
    if not PEERS.is_file():
        raise UserError(f"{PEERS.relative_to(ROOT)} is not there; make test-full makes it")
    with tempfile.TemporaryDirectory() as folder:
        n_tokens = prepare(Path(folder), Path(chats), tokenizer, vocabulary, length)
        section = compare(Path(folder), rounds)
    name = f"finetune-{n_tokens}"
    how = "Contestants took turns, each in a process of its own with one thread; CPU time"
    path = write_result(name, "Fine-tuning on chats against TRL", [section], Path(output), how)
    print(section, f"\nwritten to {path}")


def prepare(folder: Path, chats: Path, tokenizer: str | None, vocabulary: int, length: int) -> int:
    """Write what all contestants read: tokenizer and model, samples, and the rows that ours makes of them. Returns the
    size of the vocabulary.
    """
    import transformers

    conversations = [
        [
            {"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row.get("input"))))},
            {"role": "assistant", "content": row["output"]},
        ]
        for row in json.loads(chats.read_text())
    ]
    file = Path(tokenizer) if tokenizer else _trained(folder, conversations, vocabulary)
    made = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    made.add_special_tokens({"additional_special_tokens": CONTROL, "eos_token": CONTROL[1], "pad_token": CONTROL[1]})
    made.chat_template = CHATML
    made.save_pretrained(folder / "model")
    samples = []
    for messages in conversations:
        found: Any = made.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        if len(found["input_ids"]) <= length:
            samples.append({"tokens": found["input_ids"], "trained": found["assistant_masks"]})
    (folder / "samples.json").write_text(json.dumps({"length": length, "samples": samples}))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(made), max_position_embeddings=length, **SHAPE)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    _store_rows(folder, samples, len(made), length)
    return len(made)


def _trained(folder: Path, conversations: Sequence[Sequence[dict[str, str]]], vocabulary: int) -> Path:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary - len(CONTROL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator((turn["content"] for turns in conversations for turn in turns), trainer)
    made.save(str(folder / "made.json"))
    return folder / "made.json"


def _store_rows(folder: Path, samples: Sequence[dict[str, list[int]]], n_tokens: int, length: int) -> None:
    entry = TokenizerEntry(kind="huggingface", fingerprint="", vocab_size=n_tokens, bos_id=0, eos_id=0)
    write_samples(_items(samples), "chat", 1, entry, folder / "stored", lambda: Found(endings=()))
    rows = _rows(folder, length)
    shape = (rows.n_rows, length)
    tokens, labels, positions = (np.full(shape, value, np.int64) for value in (0, IGNORE, 0))
    for k in range(rows.n_rows):
        row = rows.read(k, 0)
        n = len(row.tokens)
        tokens[k, :n], labels[k, :n] = row.tokens, row.targets["lm"].labels
        at = np.arange(length)
        positions[k] = at - np.maximum.accumulate(np.where(np.isin(at, [*row.starts, n]), at, 0))
    np.savez(folder / "rows.npz", tokens=tokens, labels=labels, positions=positions)


def _items(samples: Sequence[dict[str, list[int]]]) -> Iterator[StoredItem]:
    for i, sample in enumerate(samples):
        tokens, trained = np.array(sample["tokens"]), np.array(sample["trained"], np.float32)
        yield StoredItem((Sample(tokens, trained, np.array([len(tokens)])),), f"{i}", "", i.to_bytes(16, "little"))


def _rows(folder: Path, length: int) -> Packed:
    return Packed(SampleSource.open(folder / "stored"), length, seed=0)


def steps(contestant: str, folder: PathText, keep_memory: bool = False) -> None:
    """Make steps of ours as stdin asks for them, as finetune_peer.py does of the others.

    contestant: ours
    folder: what `prepare` wrote
    keep_memory: keep memory that is freed, as runs do
    """
    if keep_memory:
        keep_freed()
    process.quiet_libraries()
    world = process.start(timeout_s=600.0, threads=1)
    length = json.loads((Path(folder) / "samples.json").read_text())["length"]
    rows = _rows(Path(folder), length)
    args, weights = weights_of(Path(folder) / "model", None)
    clock, optim = Clock(), OptimConfig(lr=1e-4)
    replica = build_replica(args, 0, make_grid(world), zero_stage=1, precision="fp32")
    for name, parameter in replica.model.named_parameters():
        weights.read(name, tuple((0, n) for n in parameter.shape), parameter.detach())
    engine = Engine(
        replica, make_optimizer(replica.model, optim), objectives=objectives_of(task_named("lm").objectives()),
        precision="fp32", micro_batch_size=ROWS, max_accumulation=1, clip_norm=optim.clip_norm, seed=0,
    )  # fmt: skip
    at = 0
    while clock.begin():
        batch = collate([rows.read((at + i) % rows.n_rows, (at + i) // rows.n_rows) for i in range(ROWS)], length)
        at += ROWS
        counts = engine.objectives.count([batch])
        engine.step(StepBatch([batch], counts, at - ROWS, ROWS, 0.0), counts, optim.lr)
        clock.targets += counts.targets


def apart(name: str, folder: Path, measured: bool = False) -> OwnProcess:
    """A contestant. measured: it gives memory that is freed back at once, so that what is resident is in use."""
    command = [str(PEERS), str(Path(__file__).with_name("finetune_peer.py")), name, str(folder)]
    if name == OURS:
        command = [sys.executable, __file__, "steps", f"--contestant={name}", f"--folder={folder}"]
        command += [] if measured else ["--keep_memory"]
    environment = {**alone(), **(ENVIRONMENT if measured else {}), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return OwnProcess(name, command, environment)


@dataclass(frozen=True)
class Measured:
    """What came of one contestant: target tokens a CPU second in each round, and bytes above what was there before the
    model."""

    speeds: list[float]
    peak: int


def measure(folder: Path, rounds: int) -> dict[str, Measured]:
    """Every contestant, in turns."""
    names = [OURS, *TRL, PLAIN]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as ends, tqdm(total=(rounds + 1) * len(names), disable=not sys.stderr.isatty()) as bar:
        contestants = [ends.enter_context(apart(name, folder)) for name in names]
        for number in range(rounds + 1):
            for contestant in contestants if number % 2 == 0 else reversed(contestants):
                seconds, targets = contestant.ask(BLOCK if number else 1)
                if number:  # the first round warms up
                    speeds[contestant.name].append(targets / seconds)
                bar.update()
    return {name: Measured(speeds[name], peak_of(name, folder)) for name in names}


def peak_of(name: str, folder: Path) -> int:
    """Bytes resident at most in some steps after the first ones, above what was there before the model was made."""
    with apart(name, folder, measured=True) as contestant:
        for line in (2, "mark", 2):
            contestant.ask(line)
        return int(contestant.ask("peak"))


def compare(folder: Path, rounds: int) -> str:
    """The section of the result."""
    found = measure(folder, rounds)
    samples = json.loads((folder / "samples.json").read_text())
    rows = _rows(folder, samples["length"])
    n_tokens = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    fastest = max(TRL, key=lambda name: statistics.median(found[name].speeds))
    ours = found[OURS]
    ratios = {name: [a / b for a, b in zip(ours.speeds, found[name].speeds, strict=True)] for name in found}
    lines = [
        [
            {OURS: "ours", PLAIN: "a plain loop over transformers, our rows"}.get(name, f"TRL, {name}"),
            Spread.of(one.speeds).text(0),
            Spread.of(ratios[name]).text(2),
            f"{one.peak / MIB:,.0f}",
        ]
        for name, one in found.items()
    ]
    bound = next(bound for least, bound in SPEED_BARS if n_tokens >= least)
    bars = [
        Bar(f"target tokens of ours over TRL, {fastest}", statistics.median(ratios[fastest]), bound),
        Bar(f"peak of ours over that of TRL, {fastest}", ours.peak / found[fastest].peak, MEMORY_BAR, at_least=False),
    ]
    return "\n\n".join(
        [
            f"## Vocabulary of {n_tokens:,}",
            f"A Llama of width {SHAPE['hidden_size']}, {SHAPE['num_hidden_layers']} layers, in float32; "
            f"{len(samples['samples']):,} conversations, {rows.n_rows:,} rows of {samples['length']:,} tokens of ours "
            f"({rows.fill:.1%} used). A step is {ROWS} packed rows, or {2 * ROWS} samples where nothing is packed; "
            f"{rounds} rounds of {BLOCK} step. The fastest mode of TRL is *{fastest}*. Memory is what is resident at "
            f"most above what was there before the model.",
            table(["contestant", "target tokens a CPU second", "ours over it", "peak, MiB"], lines),
            "\n".join(f"* {bar.text()}" for bar in bars),
        ]
    )


if __name__ == "__main__":
    run_cli(benchmark, steps=steps)
