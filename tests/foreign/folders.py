"""Model folders for tests of conversion: one model of ours, as Hugging Face's files, and as Meta's; and what a refusal
looks like."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM, ModelArgs
from llm.safetensors_file import SafetensorsFile, write_tensors
from llm.tokenizer import ByteTokenizer
from tools import convert

VOCAB = ByteTokenizer().vocab_size
LLAMA: dict[str, Any] = dict(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, ffn_hidden=48, rope_theta=1e4, init_std=0.1,
    rope_interleaved=False,
)  # fmt: skip


def save(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> LLM:
    model = LLM(ModelArgs.model_validate(LLAMA | changes)).to(dtype)
    model.save_pretrained(folder, tokenizer=ByteTokenizer())
    return model


def make_all(parent: Path) -> dict[str, Path]:
    """native; foreign, the same as a Hugging Face folder of seven files; meta, the same in two files of Meta's."""
    made = {name: parent / name for name in ("native", "foreign", "meta")}
    save(made["native"])
    convert.main(["export", str(made["native"]), str(made["foreign"]), "--shard_gb=2e-5"])
    convert.main(["export", str(made["native"]), str(made["meta"]), "--format=meta", "--shards=2"])
    return made


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        file = SafetensorsFile(path)
        for key, entry in file.entries.items():
            found[key] = torch.empty(entry.shape, dtype=entry.dtype)
            file.read(key, tuple((0, n) for n in entry.shape), found[key])
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line by which a command ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        convert.main([str(word) for word in words])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """All tensors of a Hugging Face folder, changed, in one file."""
    found = {key: change(key, tensor) for key, tensor in tensors_of(folder).items()}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    described = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in found.items()}
    write_tensors(folder / "model.safetensors", described, iter(found.values()), {})
