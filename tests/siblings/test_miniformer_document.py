"""Every Python block and command of Miniformer's document (seed 003) runs, after its import lines are replaced, and the
shapes in its comments hold."""

import ast
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.siblings import miniformer
from llm.siblings.miniformer import Seq2SeqTransformer
from tests.shared import ROOT
from tests.siblings.running import run
from tests.siblings.seeds import CodeBlock, blocks_of, needs_seeds, seed
from tests.siblings.test_miniformer_command import text

pytestmark = needs_seeds
NAMES = {"torch": torch, **{name: getattr(miniformer, name) for name in miniformer.__all__}}
NOT_RUN = [
    ("Installation", "bash"),  # git clone, cd and pip
    ("Testing", "bash"),  # pytest --cov
]


def blocks() -> list[CodeBlock]:
    return blocks_of(seed("003"))


def of(heading: str, language: str = "python") -> CodeBlock:
    (found,) = (block for block in blocks() if (block.heading, block.language) == (heading, language))
    return found


def test_blocks_that_are_not_run_are_a_closed_list() -> None:
    headings = [(block.heading, block.language) for block in blocks()]
    assert headings == [
        NOT_RUN[0], ("Training via CLI", "bash"), ("Python API", "python"), ("Configuration", "python"), NOT_RUN[1],
    ]  # fmt: skip


def test_the_models_block_gives_the_shape_that_its_comment_says() -> None:
    names: dict[str, Any] = {}
    block = of("Python API").text
    run(block, names, NAMES)
    assert "# shape: [2, 128, 10000]" in block and names["logits"].shape == (2, 128, 10000)
    assert names["logits"].dtype == torch.float32


def test_the_configs_have_the_keys_of_the_document() -> None:
    names: dict[str, Any] = {}
    block = of("Configuration").text
    run(block, names, NAMES)
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    stated = [{word.arg: ast.literal_eval(word.value) for word in call.keywords} for call in calls]
    for found, keys in zip((names["model_cfg"], names["train_cfg"]), stated, strict=True):
        assert {key: getattr(found, key) for key in keys if key is not None} == keys
    args = names["model_cfg"].args()
    assert (args.rotated_width, args.ffn_width(), args.norm) == (32, 2048, "rms")


@pytest.mark.parametrize("smaller", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_command_trains_an_encoder_decoder_on_text(tmp_path: Path, smaller: bool) -> None:
    words = shlex.split(of("Training via CLI", "bash").text.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "miniformer.trainer"]
    words = [sys.executable, "-m", "llm.siblings.miniformer", *words[3:]]
    stated = json.loads(words[words.index("--model_config") + 1])
    sizes = stated | ({"vocab_size": 320, "d_model": 24, "n_layers": 1} if smaller else {})
    words[words.index("--model_config") + 1] = json.dumps(sizes)
    (tmp_path / "data").mkdir()
    for name, first, last in (("train", 0, 400), ("val", 400, 550)):  # 1,024 tokens a row; a large vocabulary makes few
        rows = "".join(json.dumps({"text": f"{text(i)} {i}"}) + "\n" for i in range(first, last))
        (tmp_path / "data" / f"{name}.jsonl").write_text(rows)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs/miniformer/metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert "valid_ppl" in metrics[-1] and math.isfinite(metrics[-1]["valid_loss"])
    if smaller:
        assert len(metrics) >= 2 and metrics[-1]["loss"] < metrics[0]["loss"]
    model = Seq2SeqTransformer.from_pretrained(tmp_path / "runs/miniformer")
    assert {key: getattr(model.config, key) for key in sizes} == sizes
    assert (tmp_path / "runs/miniformer/tb").is_dir()
