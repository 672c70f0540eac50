"""Converting a model: import and export by tools/convert.py, against loading and saving by transformers.

    python tools/benchmarks/convert.py                  # one result file; some minutes
    python tools/benchmarks/convert.py --dir /dev/shm   # without a disk: what the processor does

A Llama of 300 MB in one safetensors file. Ours reads it into a model folder, with a digest of each block, flushes that
to the disk, reads it back, verified, and writes it for transformers, flushed too. transformers loads the whole model
into memory and saves it, unflushed; it is timed with a flush as well, so that both leave the same on the disk.
"""

import io
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import transformers

from llm import LLM, ModelArgs
from llm.atomic import sync
from llm.checkpoint.weights import ModuleWeights
from llm.cli import run_cli
from llm.errors import UserError
from llm.foreign.export import choose_family, export_hf
from llm.safetensors_file import SafetensorsFile
from tools import convert
from tools.benchmarks.harness import MIN_ROUNDS, RESULTS, Bar, Contestant, interleave, table, write_result

MODEL = ModelArgs(
    dim=1024, n_layers=6, n_heads=16, n_kv_heads=8, ffn_hidden=2816, vocab_size=4096, rope_interleaved=False
)
FASTER = 1.0
"""Import and export together, over load, save and flush."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def benchmark(
    precision: str = "bf16", rounds: int = MIN_ROUNDS, dir: str | None = None, output: str = str(RESULTS)
) -> None:
    """Time conversions there and back and write a dated result file.

    precision: of the weights: bf16 or fp32
    rounds: conversions of each contestant that count
    dir: where the folders are written, and removed; a temporary folder if not given
    output: folder of the result file
    """
    if precision not in DTYPES:
        raise UserError(f"--precision={precision} is not one of {', '.join(DTYPES)}")
    if dir is not None and not Path(dir).is_dir():
        raise UserError(f"--dir={dir}: no such folder")
    with tempfile.TemporaryDirectory(dir=dir) as scratch:
        section = compare(Path(scratch), MODEL, DTYPES[precision], rounds)
    where = "" if dir is None else f"-{Path(dir).resolve().name}"
    path = write_result(f"convert-{precision}{where}", "Converting", [section], Path(output))
    print(section, f"\nwritten to {path}", sep="\n\n")


def compare(scratch: Path, args: ModelArgs, dtype: torch.dtype, rounds: int) -> str:
    """What came, in Markdown. UserError where a contestant does not give back the weights."""
    source = scratch / "source"
    model = LLM(args).to(dtype)
    export_hf(
        source, args, ModuleWeights(model), choose_family(args, "hf", "llama"),
        dtype=dtype, max_shard_bytes=1 << 40, extra_files={}, extra_config={},
    )  # fmt: skip
    size = sum(parameter.nbytes for parameter in model.parameters())
    del model
    made = {name: scratch / name.replace(" ", "-") for name in ("imported", "exported", "saved", "flushed")}

    def take_in() -> float:
        fresh(made["imported"])
        with redirect_stdout(io.StringIO()):
            convert.import_(str(source), str(made["imported"]), quiet=True)
        return 0.0

    def give_out() -> float:
        fresh(made["exported"])
        with redirect_stdout(io.StringIO()):
            convert.export(str(made["imported"]), str(made["exported"]), quiet=True)
        return 0.0

    def there_and_back() -> float:
        return take_in() + give_out()

    def load_and_save(name: str) -> float:
        fresh(made[name])
        loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        loaded.save_pretrained(made[name])
        return 0.0

    def load_save_and_flush() -> float:
        load_and_save("flushed")
        for file in made["flushed"].iterdir():
            sync(file)
        return 0.0

    contestants = [
        Contestant("ours, import and export", there_and_back),
        Contestant("ours, import", take_in),
        Contestant("ours, export", give_out),
        Contestant("transformers, load and save", lambda: load_and_save("saved")),
        Contestant("transformers, load, save and flush", load_save_and_flush),
    ]
    transformers.utils.logging.disable_progress_bar()
    timing = interleave(contestants, rounds=rounds, warmup=1)
    for name in ("exported", "saved", "flushed"):
        check_same_weights(source, made[name])
    both, other = contestants[0].name, contestants[-1].name
    rows = [
        [
            name,
            timing.spread(name).text(2),
            f"{size / 1e6 / timing.spread(name).median:,.0f}",
            timing.speedup(name, other).text(2),
            timing.cpu_speedup(name, other).text(2),
        ]
        for name in (contestant.name for contestant in contestants)
    ]
    bars = [
        Bar(f"{what} of *{both}* over *{other}*", speedup.median, FASTER).text()
        for what, speedup in (("speed", timing.speedup(both, other)), ("CPU speed", timing.cpu_speedup(both, other)))
    ]
    head = ["", "s", "MB/s", f"times faster than *{other}*", "the same of CPU time"]
    return "\n\n".join(
        [
            f"A Llama of {size / 1e6:,.0f} MB, {str(dtype).removeprefix('torch.')}, in one file, in the page cache; "
            f"{rounds} rounds. Import and export write the weights twice, the second time for transformers.",
            table(head, rows),
            "\n".join(f"* {bar}" for bar in bars),
        ]
    )


def fresh(folder: Path) -> None:
    """Make room for a folder."""
    shutil.rmtree(folder, ignore_errors=True)


def check_same_weights(source: Path, folder: Path) -> None:
    """UserError naming the folder where its weights are not those of the source, bit for bit."""
    for key, entry in SafetensorsFile(source / "model.safetensors").entries.items():
        values = []
        for path in (source, folder):
            file = SafetensorsFile(path / "model.safetensors")
            if key not in file.entries:
                raise UserError(f"{path}: has no {key}")
            values.append(torch.empty(entry.shape, dtype=entry.dtype))
            file.read(key, tuple((0, n) for n in entry.shape), values[-1])
        if not torch.equal(*values):
            raise UserError(f"{folder}: {key} is not what it was in {source}")


if __name__ == "__main__":
    run_cli(benchmark)
