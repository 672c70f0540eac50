"""tools/convert.py on models much larger than what it may hold in memory, and inspect on what it must not read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM
from llm.pretrained import args_of
from llm.safetensors_file import header_bytes
from tests.foreign.folders import save
from tools import convert

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def sparse(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """A Hugging Face folder of zeros that take no disk; returns their bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header = header_bytes({key: (dtype, shape) for key, shape in shapes.items()})
    size = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    return size


def block(i: int, width: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a layer beside its feed-forward: four heads of 16, two of them for keys and values."""
    at = f"model.layers.{i}"
    return {
        f"{at}.self_attn.q_proj.weight": (64, width), f"{at}.self_attn.k_proj.weight": (32, width),
        f"{at}.self_attn.v_proj.weight": (32, width), f"{at}.self_attn.o_proj.weight": (width, 64),
        f"{at}.input_layernorm.weight": (width,), f"{at}.post_attention_layernorm.weight": (width,),
    }  # fmt: skip


def ends(width: int, vocab: int = 64) -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,), "lm_head.weight": (vocab, width),
    }  # fmt: skip


Made = tuple[dict[str, Any], dict[str, tuple[int, ...]]]


def big_llama(width: int, hidden: int, layers: int) -> Made:
    config = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "head_dim": width // 4,
    }  # fmt: skip
    shapes = ends(width)
    for i in range(layers):
        shapes |= block(i, width) | {
            f"model.layers.{i}.self_attn.q_proj.weight": (width, width),
            f"model.layers.{i}.self_attn.k_proj.weight": (width // 2, width),
            f"model.layers.{i}.self_attn.v_proj.weight": (width // 2, width),
            f"model.layers.{i}.self_attn.o_proj.weight": (width, width),
            f"model.layers.{i}.mlp.gate_proj.weight": (hidden, width),
            f"model.layers.{i}.mlp.up_proj.weight": (hidden, width),
            f"model.layers.{i}.mlp.down_proj.weight": (width, hidden),
        }
    return config, shapes


def big_llama4(width: int, hidden: int, experts: int, layers: int) -> Made:
    """Experts stacked, gate and up in one."""
    config = {
        "model_type": "llama4_text", "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 16,
        "num_local_experts": experts, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 64,
    }  # fmt: skip
    shapes = ends(width)
    for i in range(layers):
        ffn = f"model.layers.{i}.feed_forward"
        shapes |= block(i, width) | {
            f"{ffn}.router.weight": (experts, width), f"{ffn}.experts.gate_up_proj": (experts, width, 2 * hidden),
            f"{ffn}.experts.down_proj": (experts, hidden, width),
            f"{ffn}.shared_expert.gate_proj.weight": (hidden, width),
            f"{ffn}.shared_expert.up_proj.weight": (hidden, width),
            f"{ffn}.shared_expert.down_proj.weight": (width, hidden),
        }  # fmt: skip
    return config, shapes


def big_qwen3_moe(width: int, hidden: int, experts: int, layers: int) -> Made:
    """A matrix for each expert."""
    config = {
        "model_type": "qwen3_moe", "hidden_size": width, "moe_intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 16, "num_experts": experts,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "intermediate_size": 64,
    }  # fmt: skip
    shapes = ends(width)
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= block(i, width) | {f"{at}.mlp.gate.weight": (experts, width)}
        shapes |= {f"{at}.self_attn.{norm}.weight": (16,) for norm in ("q_norm", "k_norm")}
        for e in range(experts):
            shapes |= {f"{at}.mlp.experts.{e}.{name}.weight": (hidden, width) for name in ("gate_proj", "up_proj")}
            shapes[f"{at}.mlp.experts.{e}.down_proj.weight"] = (width, hidden)
    return config, shapes


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
@pytest.mark.parametrize("format", ["hf", "meta"])
def test_inspect_reads_no_weights(format, tmp_path, capsys):
    config, shapes = big_llama(1024, 8192, 32)
    if format == "hf":
        assert sparse(tmp_path / "a", config, shapes, torch.float32) > 3e9
    else:
        save(tmp_path / "n", dim=128, ffn_hidden=16384)
        convert.main(["export", str(tmp_path / "n"), str(tmp_path / "a"), "--format=meta"])
        assert (tmp_path / "a/consolidated.00.pth").stat().st_size > 50e6
    convert.main(["inspect", str(tmp_path / "a")])  # what is imported when it is needed
    before = bytes_read()
    convert.main(["inspect", str(tmp_path / "a")])
    assert bytes_read() - before < 1e6
    assert "tensors " in capsys.readouterr().out


JOB = """
import json, sys
from pathlib import Path
from tools import convert
def status(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024
small, large = json.loads(sys.argv[1])
for words in small:
    convert.main(words)
before = status("VmRSS")
for words in large:
    Path("/proc/self/clear_refs").write_text("5")
    convert.main(words)
    print("peak", status("VmHWM") - before)
"""
"""Prints by how much the peak of memory in each of `large` is above what a process has after the same on a small model.
"""


def peaks_above_imports(tmp_path: Path, *commands: list[str]) -> list[int]:
    small = tmp_path / "small"
    if not small.exists():
        sparse(small, *big_llama(64, 64, 1), torch.float32)
    warm = [
        ["import", str(small), str(tmp_path / "w1")], ["export", str(tmp_path / "w1"), str(tmp_path / "w2")],
        ["export", str(tmp_path / "w1"), str(tmp_path / "w3"), "--format=meta", "--shards=2"],
        ["import", str(tmp_path / "w3"), str(tmp_path / "w4")],
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", JOB, json.dumps([warm, commands])]
    ended = subprocess.run(words, capture_output=True, text=True, env=environment)
    for made in tmp_path.glob("w?"):
        shutil.rmtree(made)
    assert ended.returncode == 0, ended.stderr
    return [int(line.split()[1]) for line in ended.stdout.splitlines() if line.startswith("peak ")]


def largest(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return max(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize


no_peak = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of memory to be reset")


@no_peak
def test_memory_while_converting_is_not_that_of_the_model(tmp_path):
    """In small: the model is one and a half times what is allowed."""
    config, shapes = big_llama(1024, 2048, 14)
    size = sparse(tmp_path / "a", config, shapes, torch.bfloat16)
    allowed = 1.5 * largest(shapes, torch.bfloat16) + 64 * MIB
    assert size > 1.5 * allowed
    imported, exported = peaks_above_imports(
        tmp_path,
        ["import", str(tmp_path / "a"), str(tmp_path / "b"), "--dtype=float32"],
        ["export", str(tmp_path / "b"), str(tmp_path / "c"), "--shard_gb=0.02"],
    )
    assert imported <= allowed and exported <= allowed + 20e6


@no_peak
@pytest.mark.full
@pytest.mark.parametrize(
    ("made", "dtype"),
    [
        (lambda: big_llama(2048, 9216, 3), torch.float32),
        (lambda: big_llama(2048, 16384, 2), torch.bfloat16),
        (lambda: big_llama4(1024, 3072, 8, 2), torch.float32),
        (lambda: big_qwen3_moe(1024, 3072, 8, 2), torch.float32),
        (lambda: big_qwen3_moe(1024, 3072, 16, 2), torch.bfloat16),
    ],
    ids=["llama", "llama in bfloat16", "llama4", "qwen3_moe", "qwen3_moe in bfloat16"],
)
def test_memory_while_converting_a_model_five_times_larger(made, dtype, tmp_path):
    """1.5 of the largest tensor written, one file written, 64 MiB. Import stacks experts, export parts them."""
    config, shapes = made()
    size = sparse(tmp_path / "a", config, shapes, dtype)
    stacked = {name: tuple(p.shape) for name, p in LLM(args_of(tmp_path / "a"), device="meta").named_parameters()}
    assert size >= 5 * largest(stacked, dtype)
    native, allowed = tmp_path / "n", 1.5 * largest(stacked, dtype) + 64 * MIB
    (peak,) = peaks_above_imports(tmp_path, ["import", str(tmp_path / "a"), str(native)])
    assert peak <= allowed
    shutil.rmtree(tmp_path / "a")
    (peak,) = peaks_above_imports(tmp_path, ["export", str(native), str(tmp_path / "b"), "--shard_gb=0.05"])
    assert peak <= 1.5 * largest(shapes, dtype) + max(50e6, largest(shapes, dtype)) + 64 * MIB
    shutil.rmtree(tmp_path / "b")
    for shards in (1, 2) if config["model_type"] == "llama" else ():
        out, back = tmp_path / "m", tmp_path / "i"
        command = ["export", str(native), str(out), "--format=meta", f"--shards={shards}"]
        (peak,) = peaks_above_imports(tmp_path, command)
        assert peak <= 1.5 * largest(shapes, dtype) / shards + size / shards + 64 * MIB
        (peak,) = peaks_above_imports(tmp_path, ["import", str(out), str(back)])
        assert peak <= allowed
        shutil.rmtree(out)
        shutil.rmtree(back)
