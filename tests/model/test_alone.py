"""Args and configs are checked by whoever imports nothing else."""

import subprocess
import sys

import pytest

from tests.shared import ROOT


@pytest.mark.parametrize(
    "lines",
    [
        "from llm import ModelArgs; ModelArgs(dim=8, n_layers=1, n_heads=1, vocab_size=8)",
        "from llm.args.layers import FFNS, MIXERS, POSITIONS; assert 'ssm' in MIXERS and FFNS['moe'] and POSITIONS",
        "from llm.train.config import load_config; load_config('configs/pretrain/reverse.yaml')",
    ],
    ids=["args", "tables", "config"],
)
def test_a_single_import_is_enough(lines: str) -> None:
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
