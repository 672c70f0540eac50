"""Rows whose tokens see both ways: what they see, rows of both kinds in a batch, and what cannot be so."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llm import LLM, extensions
from llm.args.layers import MIXERS
from llm.batch import Batch
from llm.cache import Cache
from llm.data.batch import collate
from llm.data.rows import Row, RowTargets
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.train.config import validate
from tests.distributed.harness import ROOT, tiny_config
from tests.model.models import llama4, tokens

KINDS = {
    "full": dict(attention_chunk_size=None),
    "chunks": dict(),
    "windows": dict(attention_chunk_size=None, sliding_window=5),
    "caps": dict(attention_chunk_size=None, attn_softcap=3.0),
}


def hidden(model: LLM, ids: torch.Tensor, **given: object) -> torch.Tensor:
    return model(TransformerInput(ids, **given), return_hidden=True).hidden  # type: ignore[arg-type,return-value]


def row(length: int, causal: bool = True, seed: int = 0) -> Row:
    drawn = np.random.default_rng(seed).integers(0, 9, length + 1)
    return Row(drawn[:-1], {"lm": RowTargets(drawn[1:])}, np.array([0]), causal=causal)


@pytest.mark.parametrize("kind", KINDS)
def test_only_tokens_that_see_both_ways_follow_what_comes_later(kind: str) -> None:
    model, ids = llama4(**KINDS[kind]), tokens(1, 16)
    changed = ids.clone()
    changed[0, 7] += 1
    for causal in (True, False):
        before, after = (hidden(model, x, causal=causal)[0, 6] for x in (ids, changed))
        assert torch.equal(before, after) == causal


def test_a_model_says_what_a_batch_does_not() -> None:
    ids = tokens(2, 12)
    forward, both = llama4(), llama4(causal=False)
    assert torch.equal(hidden(forward, ids), hidden(both, ids, causal=True))
    assert torch.equal(hidden(both, ids), hidden(forward, ids, causal=torch.tensor([False, False])))
    assert not torch.allclose(hidden(both, ids), hidden(forward, ids))
    assert "causal" not in forward.args.model_dump() and both.args.model_dump()["causal"] is False


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_both_kinds_in_a_batch_are_as_they_are_alone(kind: str) -> None:
    model, ids = llama4(**KINDS[kind]), tokens(4, 16)
    causal = torch.tensor([False, True, True, False])
    given = dict(cu_seqlens=torch.tensor([0, 5, 16, 32, 41, 48, 64]))
    mixed = hidden(model, ids, causal=causal, **given)
    (gradient,) = torch.autograd.grad(mixed.square().sum(), [model.layers[0].attention.wq.weight])
    alone = [hidden(model, ids, causal=kind, **given) for kind in (True, False)]
    expected = torch.where(causal[:, None, None], *alone)
    # float32 sums in another order
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    (theirs,) = torch.autograd.grad(expected.square().sum(), [model.layers[0].attention.wq.weight])
    torch.testing.assert_close(gradient, theirs, rtol=1e-5, atol=1e-3)


def test_padding_on_either_side_changes_nothing_for_a_token() -> None:
    model, ids = llama4(), tokens(1, 9)
    alone = hidden(model, ids, causal=False)
    for before, behind in ((4, 0), (0, 4), (3, 5)):
        padded = torch.cat([tokens(1, before, seed=5), ids, tokens(1, behind, seed=6)], dim=1)
        positions = torch.cat([torch.full((before,), -1), torch.arange(9), torch.full((behind,), -1)])
        found = hidden(model, padded, causal=False, tokens_position=positions)[:, before : before + 9]
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(causal=torch.tensor([True])), r"causal must be None, a bool or a \(2,\) bool tensor on the CPU"),
        (dict(causal=1), "got 1"),
        (dict(causal=False, cu_seqlens=torch.tensor([0, 6, 12]), parents=torch.tensor([-1, 0])), "inputs.parents"),
    ],
)
def test_what_cannot_be_is_refused(given: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        llama4()(TransformerInput(tokens(2, 6), **given))


@pytest.mark.parametrize("causal", [False, torch.tensor([True, False])], ids=["all", "one of them"])
def test_rows_that_see_both_ways_continue_no_cache(causal: bool | torch.Tensor) -> None:
    model = llama4()
    cache = Cache(model.args)
    with pytest.raises(ValueError, match="bidirectional rows .* cannot continue a cache"):
        model(TransformerInput(tokens(2, 6), causal=causal), cache=cache)
    assert cache.length == 0
    with pytest.raises(ValueError, match="cannot continue a cache"):
        llama4(causal=False)(tokens(2, 6), cache=cache)


def test_mixers_with_a_state_see_one_way_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MIXERS, "_entries", dict(MIXERS))
    monkeypatch.setattr(extensions, "LOADED", set())
    extensions.load([ROOT / "docs/extend/moving_average.py"])
    model = llama4(layer_pattern=["attn", "average"])
    model(tokens(1, 6))
    with pytest.raises(ValueError, match="need attention in every layer; layer 1 is average"):
        model(TransformerInput(tokens(1, 6), causal=False))
    with pytest.raises(ValueError, match="model.causal=false needs attention in every layer; layer 1 is average"):
        llama4(layer_pattern=["attn", "average"], causal=False)


def test_a_run_that_learns_the_next_token_is_of_a_causal_model(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path, model={"causal": False})
    with pytest.raises(UserError, match="model.causal=false: task=lm is of models whose tokens do not see"):
        validate(raw, "c.yaml")
    assert not validate(raw | {"task": "mlm"}, "c.yaml").model.causal


def test_a_batch_says_of_each_of_its_rows_whether_it_is_causal() -> None:
    def causal_of(*rows: Row | None, **how: int) -> object:
        found = collate(rows, 8, **how).inputs.causal
        return found.tolist() if isinstance(found, torch.Tensor) else found

    assert causal_of(row(8), row(5)) is True
    assert causal_of(row(8, False), None, row(5, False)) is False
    assert causal_of(None, None) is True
    assert causal_of(None, row(8, False), row(5)) == [False, False, True]
    assert causal_of(row(8, False), row(5), sequence_len=4) == [False, False, True, True]


def test_a_document_of_a_batch_stays_as_it_was() -> None:
    batch = collate([row(8), row(5, False)], 8, sequence_len=4)
    assert [batch.span(first, first + 4).inputs.causal for first in (0, 4, 8, 12)] == [True, True, False, False]
    uniform = Batch(TransformerInput(tokens(1, 8)), {})
    assert uniform.span(0, 8).inputs.causal is None


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_states_are_those_of_a_llama_with_a_full_mask(tmp_path: Path, packed: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path)
    model, ids = LLM.from_pretrained(tmp_path), tokens(2, 12)
    bounds = torch.tensor([0, 5, 12, 24] if packed else [0, 12, 24])
    document = torch.searchsorted(bounds, torch.arange(24), right=True).view(2, 12)
    mask = (document[:, :, None] == document[:, None])[:, None]
    positions = torch.stack([torch.cat([torch.arange(n) for n in (5, 7)]) if packed else torch.arange(12),
                             torch.arange(12)])  # fmt: skip
    theirs = llama.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    ours = hidden(model, ids, cu_seqlens=bounds, causal=False)
    # three layers in float32, of values of size 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(hidden(model, ids, cu_seqlens=bounds), theirs, atol=1e-2)
