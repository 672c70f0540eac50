"""The benchmark of caches: bytes by the formula are bytes held, and both ways make the same tokens."""

from pathlib import Path

import pytest
import torch

from llm.cache import Cache
from llm.cli import run_cli
from llm.errors import UserError
from llm.model import LLM
from tools.benchmarks import caches


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kv_heads", caches.KINDS.values(), ids=caches.KINDS)
@pytest.mark.parametrize("longest", [None, 41], ids=["as it fills", "known length"])
def test_a_cache_takes_the_bytes_that_the_formula_says(kv_heads: int, longest: int | None) -> None:
    args = caches.args_of(kv_heads, 32, 2, 64)
    model, cache = LLM(args, seed=0), Cache(args, longest)
    ids = torch.arange(41)[None]
    if longest is None:
        model(ids, cache=cache)
    else:
        for piece in ids.split(1, dim=1):
            model(piece, cache=cache)
    assert cache.nbytes == caches.cache_bytes(args, 41) == 2 * 2 * 41 * kv_heads * 4 * 4


def test_a_table_has_every_kind_of_heads_at_every_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cli(caches.benchmark, ["--contexts=8,12", "--rounds=7", "--dim=32", "--layers=1", f"--output={tmp_path}"])
    (file,) = tmp_path.glob("*-caches.md")
    written = file.read_text()
    assert written.count("## 8 tokens") == written.count("## 12 tokens") == 1
    assert all(written.count(f"| {kind} |") == 2 for kind in caches.KINDS)
    assert "written to" in capsys.readouterr().out


def test_texts_without_a_token_before_the_last_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2 tokens"):
        caches.benchmark((1,), rounds=7)
