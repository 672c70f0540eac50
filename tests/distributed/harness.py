"""Start real jobs of this project on a tiny model and read what they wrote."""

import json
import os
import random
import socket
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from llm.environment import alone
from llm.parallel.launch import local

ROOT = Path(__file__).resolve().parents[2]
TIMING_FIELDS = ("tokens_per_s", "tokens_per_s_per_device", "step_time_s", "data_wait_s", "memory_gb", "mfu")

# Everything on: NoPE and chunked layers, QK-norm, temperature, MoE with shared expert and both auxiliary losses.
TINY_MODEL: dict[str, Any] = {
    "dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "ffn_hidden": 48, "qk_norm": "l2",
    "rope_theta": 10000.0, "nope_layer_interval": 4, "attention_chunk_size": 16, "attn_temperature_tuning": True,
    "floor_scale": 8,
    "moe": {"n_experts": 4, "top_k": 2, "hidden": 24, "interleave": 2, "aux_alpha": 0.01, "z_alpha": 0.001},
}  # fmt: skip


def write_text(folder: Path, documents: int = 400) -> None:
    """Train and held-out JSONL of random word salad: documents of very different lengths."""
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(60)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", documents), ("valid", 12)):
        rows = [{"text": " ".join(draw.choices(words, k=draw.randint(1, 60)))} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_config(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run config over the text in `folder`; each section given is merged over the default one."""
    config: dict[str, Any] = {
        "model": deepcopy(TINY_MODEL),  # which a test may change
        "tokenizer": {"kind": "bytes"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "valid": str(folder / "valid.jsonl"),
            "cache_dir": str(folder / "cache"),
        },
        "parallel": {"timeout_s": 60},
        "optim": {"lr": 1.0e-3, "warmup_steps": 5, "min_lr": 1.0e-4, "clip_norm": 0.5},
        "train": {"steps": 20, "global_batch_size": 16, "micro_batch_size": 4, "seq_len": 48, "precision": "fp32"},
        "checkpoint": {"interval": 1000, "keep": 2, "keep_best": False},
        "eval": {"interval": 1000},
        "log": {"interval": 10, "tensorboard": False, "report": False},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    return config


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """The config as a YAML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def environment() -> dict[str, str]:
    """This environment without what an outer torchrun or pytest left in it; one thread, as torchrun sets it."""
    kept = {key: value for key, value in alone().items() if not key.startswith("PYTEST")}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def keep_port() -> socket.socket:
    """A socket with a TCP port of this machine that nobody else is given while it is open: whoever is given it can
    listen there all the same, as with SO_REUSEADDR two may be bound to one port of which one alone listens.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    return kept


def command(script: str, *arguments: str, nproc: int | None = None) -> list[str]:
    """The command line of a script of this project: under torchrun with `nproc` processes, or plain python."""
    if nproc is None:
        return [sys.executable, str(ROOT / script), *arguments]
    return [*local.command(nproc), str(ROOT / script), *arguments]


def run(
    script: str, *arguments: str, nproc: int | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run to the end; output captured."""
    return subprocess.run(
        command(script, *arguments, nproc=nproc),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, without a torn last line."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def without_timing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows less the fields that depend on the clock and the machine."""
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in rows]
