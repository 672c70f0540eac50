"""Every Python block of Transformer Components' document (seed 001) runs after its import lines are replaced, and the
shapes in its comments hold. In `make test` with smaller experts, as the document's have 34 million parameters; with its
own sizes among the long tests."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.siblings import components
from tests.siblings.running import run
from tests.siblings.seeds import CodeBlock, blocks_of, needs_seeds, seed

pytestmark = needs_seeds
NAMES = {"torch": torch, "nn": nn, **{name: getattr(components, name) for name in components.__all__}}
NOT_RUN = [
    ("Regression Mode (TransformerModel)", ""),  # drawings
    ("Autoregressive Mode (AutoregressiveTransformerModel)", ""),
    ("Encoder-Decoder Mode (EncoderDecoder)", ""),
    ("Load Balancing Loss", ""),  # a formula: test_components_layers.py holds it
]
ASSIGNED = re.compile(r"^(\w+) = .*# \[([\d, ]+)\]")
"""A line that makes something, and its shape as the comment beside it says."""
GIVEN: dict[str, Any] = {
    "torch": torch,
    "query": torch.ones(2, 10, 8),
    "key": torch.ones(2, 10, 8),
    "value": torch.ones(2, 10, 8),
    "tokens": torch.ones(1, 2, 1),
    "criterion": nn.MSELoss(),
}
"""What the document takes for granted, beside a data loader."""
SMALLER = {"512": "16", "2048": "32"}


def blocks() -> list[CodeBlock]:
    return blocks_of(seed("001"))


def runs() -> list[CodeBlock]:
    return [block for block in blocks() if (block.heading, block.language) not in NOT_RUN]


def as_run(code: str, smaller: bool) -> str:
    """The block without an import that renames, and with what it prints said as everywhere else."""
    code = code.replace("import torch.nn as nn\n", "").replace("# torch.Size([4, 32, 512])", "# [4, 32, 512]")
    for theirs, ours in SMALLER.items() if smaller else ():
        code = code.replace(theirs, ours)
    return code


def test_blocks_that_are_not_run_are_a_closed_list() -> None:
    left = [(block.heading, block.language) for block in blocks() if block not in runs()]
    assert left == NOT_RUN and {block.language for block in runs()} == {"python"} and len(runs()) == 14


@pytest.mark.parametrize("smaller", [True, pytest.param(False, marks=pytest.mark.full)])
def test_all_blocks_run_one_after_the_other_and_make_the_shapes_that_they_say(smaller: bool) -> None:
    torch.manual_seed(0)
    width = 16 if smaller else 512
    names = {**GIVEN, "dataloader": [(torch.randn(2, 4, width), torch.randn(2, 4, width))]}
    shapes = 0
    for block in runs():
        code = as_run(block.text, smaller)
        run(code, names, NAMES)
        for line in code.splitlines():
            match = ASSIGNED.match(line)
            if match is None or "seq_len" in match[2]:
                continue
            said = [int(size) for size in match[2].split(",")]
            assert list(names[match[1]].shape) == said, (block.heading, line)
            shapes += 1
        CHECKS.get(block.heading, lambda _: None)(names)
    assert shapes == 6


def a_mask(names: dict[str, Any]) -> None:
    assert torch.equal(names["mask"], torch.ones(10, 10).tril()) and names["attention_output"].shape == (2, 10, 8)


def cached(names: dict[str, Any]) -> None:
    assert names["output1"].shape == (1, 10, 1) and names["output2"].shape == (1, 1, 1)
    names["model"].eval()  # the cache is of evaluation: the next block's calls continue each other


def decoded(names: dict[str, Any]) -> None:
    assert names["target"].shape == (1, 11, 1) and names["encoder_output"].shape == (1, 20, 64)


def experts(names: dict[str, Any]) -> None:
    output, aux_loss = names["output"], names["aux_loss"]
    assert isinstance(output, Tensor) and aux_loss.ndim == 0 and 0 < aux_loss.item() < 0.01


def trained(names: dict[str, Any]) -> None:
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


CHECKS = {
    "Causal Masking": a_mask,
    "Basic KV Caching": cached,
    "Encoder-Decoder KV Caching": decoded,
    "Basic MOE Layer": experts,
    "Training with Load Balancing": trained,
}


@pytest.mark.parametrize("name", ["transformer_model", "configs", "attention.mha", "moe", "encoder"])
def test_the_modules_of_its_import_lines_hold_names_of_ours(name: str) -> None:
    said = re.findall(rf"^from transformer\.{re.escape(name)} import ([\w, ]+)$", seed("001"), flags=re.M)
    assert said and all(part.strip() in components.__all__ for line in said for part in line.split(","))
