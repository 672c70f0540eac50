"""Every Python block and command of Miniformer's document (seed 003) runs, after its import lines are replaced, and the
shapes in its comments hold."""

import ast
from typing import Any

import torch

from llm.siblings import miniformer
from tests.siblings.running import run
from tests.siblings.seeds import CodeBlock, blocks_of, needs_seeds, seed

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
