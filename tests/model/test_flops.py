"""The arithmetic of known shapes, unit by unit."""

import pytest

from llm.args import ModelArgs, MoEArgs
from llm.flops import token_flops, unit_flops

D, V, F, T = 32, 100, 48, 64
DENSE = ModelArgs(dim=D, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=V, ffn_hidden=F)
BLOCK = 2 * D + (D * D + 2 * D * D // 2 + D * D)  # norms; wq, wk and wv at half width, wo
ATTENTION = 12 * D * T


def test_a_dense_model_counts_everything_but_its_token_table() -> None:
    layer = 6 * (BLOCK + 3 * D * F) + ATTENTION
    assert unit_flops(DENSE, T) == {"layers.0": layer, "layers.1": layer, "norm": 6 * D, "output": 6 * V * D}
    assert token_flops(DENSE, T) == 2 * layer + 6 * D + 6 * V * D


@pytest.mark.parametrize("tied", [False, True])
def test_where_labels_alone_are_learned_tokens_meet_no_output_matrix_and_hardly_the_head(tied: bool) -> None:
    """One vector of a document meets the head, however many tokens it has."""
    args = DENSE.model_copy(update={"n_prediction": 5, "tie_embeddings": tied})
    assert token_flops(args, T) == token_flops(DENSE, T)
    assert token_flops(args, T, logits=False) == token_flops(DENSE, T) - 6 * V * D


def test_tied_embeddings_count_once_as_the_output_matrix() -> None:
    assert unit_flops(DENSE.model_copy(update={"tie_embeddings": True}), T) == unit_flops(DENSE, T)


def test_a_token_meets_top_k_experts_the_shared_one_and_the_router() -> None:
    moe = MoEArgs(n_experts=8, top_k=2, hidden=24, interleave=2, shared=True)
    found = unit_flops(DENSE.model_copy(update={"moe": moe}), T)
    dense, sparse = (found[f"layers.{i}"] - ATTENTION for i in range(2))
    assert (dense, sparse) == (6 * (BLOCK + 3 * D * F), 6 * (BLOCK + 3 * D * 24 * (2 + 1) + 8 * D))


def test_heads_wider_than_the_model_count_with_their_width() -> None:
    wide, usual = (unit_flops(DENSE.model_copy(update={"head_dim": n}), T)["layers.0"] for n in (16, 8))
    assert wide - usual == 6 * 3 * D * D + ATTENTION  # twice as wide: wq, wo, and half as much of wk and wv each


@pytest.mark.parametrize("seq_len", [8, 16, 64])
def test_a_layer_attends_to_no_more_than_its_span(seq_len: int) -> None:
    local = DENSE.model_copy(update={"attention_chunk_size": 16, "nope_layer_interval": 2})
    chunked, whole = (unit_flops(local, seq_len)[f"layers.{i}"] for i in range(2))
    assert [spec.mixer.span for spec in local.layer_specs()] == [16, None]
    assert whole - chunked == 12 * D * (seq_len - min(seq_len, 16))


@pytest.mark.parametrize("source_len", [None, 32, 96])
def test_an_encoder_decoder_counts_the_share_of_the_source_of_a_target_token(source_len: int | None) -> None:
    both = DENSE.model_copy(update={"encoder_layers": 3})
    found, source = unit_flops(both, T, source_len=source_len), source_len or T
    block, across = 6 * (BLOCK + 3 * D * F), 6 * (D + D * D + D * D)  # the norm, wq and wo of cross attention
    of_source = 6 * D * D  # its wk and wv, at half width
    assert found["layers.0"] == block + ATTENTION + across + of_source * source // T + 12 * D * source
    assert found["encoder.layers.2"] == (block + 12 * D * source) * source // T
    assert token_flops(both, T, source_len=source_len) == sum(found.values())
    assert found["output"] == unit_flops(DENSE, T)["output"]
