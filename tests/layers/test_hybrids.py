"""Models with state-space layers, and with strides: against transformers' Mamba-2, and against themselves however their
tokens come.
"""

import pytest
import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.cache import Cache
from llm.contexts import make_context
from llm.datatypes import TransformerInput
from llm.layers.ssm import SSM
from llm.parameters import ParameterTable

VOCABULARY, LENGTH = 50, 37
PATTERNS = {
    "alternating": "alternating", "strides": "ssm,ssm@4,ssm@3", "hierarchy": "ssm@2,attn@5,attn,attn@3",
    "parts and sums": "sum,none+dense,ssm+none,attn+none",
}  # fmt: skip


def hybrid(groups: int = 1, pattern: str = "alternating", **ssm: object) -> LLM:
    """A float64 model with weights away from where they begin."""
    group = {"d_state": 8, "head_width": 8, "groups": groups, "chunk": 8, **ssm}
    args = ModelArgs(
        dim=32, n_layers=4, n_heads=4, vocab_size=VOCABULARY, layer_pattern=pattern, ffn_hidden=48, ssm=group
    )
    model, generator = LLM(args).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def hidden(model: LLM, inputs: TransformerInput | Tensor, cache: Cache | None = None) -> Tensor:
    """Final hidden states, float64, as logits are rounded."""
    found = model(inputs, cache=cache, return_hidden=True).hidden
    assert found is not None
    return found.detach()


def tokens() -> Tensor:
    """Three rows."""
    return torch.randint(0, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def apart(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


@patterns
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("splits", [[1] * LENGTH, [5, 1, 1, 12, 18], [LENGTH - 1, 1]])
def test_tokens_that_come_in_parts_are_tokens_that_come_at_once(splits, groups, pattern):
    model = hybrid(groups, pattern)
    cache = Cache(model.args)
    parts = [hidden(model, part, cache) for part in tokens().split(splits, dim=1)]
    assert apart(torch.cat(parts, 1), hidden(model, tokens())) < 1e-12


@patterns
def test_packed_documents_are_separate_documents_even_of_one_token(pattern):
    model, flat = hybrid(2, pattern), tokens().flatten()
    bounds = [0, 5, 6, 20, 37, 74, 77, 111]
    found = hidden(model, TransformerInput(tokens(), cu_seqlens=torch.tensor(bounds))).flatten(0, 1)
    for first, end in zip(bounds, bounds[1:], strict=False):
        assert apart(found[first:end], hidden(model, flat[None, first:end])[0]) < 1e-12


@patterns
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_nor_what_is_remembered(side, pattern):
    model, more = hybrid(pattern=pattern), tokens()[:, :4]
    own = slice(8, 45) if side == "left" else slice(0, LENGTH)
    positions, padded = torch.full((3, 45), -1), torch.zeros(3, 45, dtype=torch.int64)
    positions[:, own], padded[:, own] = torch.arange(LENGTH), tokens()
    inputs, cache = TransformerInput(padded, tokens_position=positions), Cache(model.args)
    expected = hidden(model, torch.cat([tokens(), more], 1))
    assert apart(hidden(model, inputs)[:, own], expected[:, :LENGTH]) < 1e-12
    assert apart(hidden(model, inputs, cache)[:, own], expected[:, :LENGTH]) < 1e-12
    assert apart(hidden(model, more, cache), expected[:, LENGTH:]) < 1e-12


def test_padding_among_the_tokens_of_a_document_is_refused():
    positions = torch.arange(LENGTH).expand(3, -1).clone()
    positions[1, 5] = -1
    with pytest.raises(ValueError, match="row 1 has padding among the tokens of a document, before token 6"):
        hybrid()(TransformerInput(tokens(), tokens_position=positions))


@patterns
def test_prompts_of_different_lengths_go_on_as_if_each_were_alone(pattern):
    model, more, lengths = hybrid(pattern=pattern), tokens()[:, :6], (LENGTH, 30, 2)
    positions, padded = torch.full((3, LENGTH), -1), torch.zeros(3, LENGTH, dtype=torch.int64)
    for row, n in enumerate(lengths):
        positions[row, LENGTH - n :], padded[row, LENGTH - n :] = torch.arange(n), tokens()[row, :n]
    cache = Cache(model.args)
    hidden(model, TransformerInput(padded, tokens_position=positions), cache)
    found = torch.cat([hidden(model, token, cache) for token in more.split(1, dim=1)], 1)
    for row, n in enumerate(lengths):
        alone = hidden(model, torch.cat([tokens()[row : row + 1, :n], more[row : row + 1]], 1))
        assert apart(found[row], alone[0, n:]) < 1e-12


@patterns
def test_no_token_sees_one_behind_it(pattern):
    model, other = hybrid(pattern=pattern), tokens()
    other[:, 20] = (other[:, 20] + 1) % VOCABULARY
    before, after = hidden(model, tokens()), hidden(model, other)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] != after[:, 20:]).any(-1).all()


def test_factors_and_places_of_the_norm_are_what_weights_of_such_sizes_make():
    """Every factor but that before the feed-forward's activation can be in weights as well."""
    factors = {"attn": [0.5, 2.0], "ssm": [1.5, 0.25]}
    args = ModelArgs(
        dim=32, n_layers=2, n_heads=4, vocab_size=VOCABULARY, layer_pattern="sum", ffn_hidden=48, sum=factors,
        ffn_scales=(1.0, 3.0),
        ssm={
            "d_state": 8, "head_width": 8, "heads": 6, "groups": 2, "norm": "none",
            "scales": [0.5, 2.0, 3.0, 4.0, 0.25],
        },
    )  # fmt: skip
    model = LLM(args).double()
    ssm = args.ssm.model_copy(update={"scales": None})
    plain = LLM(args.model_copy(update={"sum": None, "ffn_scales": None, "ssm": ssm})).double()
    state, half = {name: tensor.clone() for name, tensor in model.state_dict().items()}, 2 * 8
    for name, tensor in state.items():
        if name.endswith(("attn.wq.weight", "attn.wk.weight", "attn.wv.weight")):
            tensor *= 0.5
        for part, factor in (("wz", 0.5), ("wx", 2.0), ("wdt", 0.25)):
            if name.endswith(f"ssm.{part}.weight"):
                tensor *= 1.5 * factor
        if name.endswith("ssm.wbc.weight"):
            tensor[:half] *= 1.5 * 3.0
            tensor[half:] *= 1.5 * 4.0
        for part, factor in (("attn.wo", 2.0), ("ssm.wo", 0.25), ("w2", 3.0)):
            if name.endswith(f"{part}.weight"):
                tensor *= factor
    plain.load_state_dict(state)
    assert apart(hidden(model, tokens()), hidden(plain, tokens())) < 1e-12
    assert not any(name.endswith("ssm.norm.weight") for name in state)


def test_a_stride_of_one_is_none_and_one_of_s_says_nothing_before_its_first_chunk_is_complete():
    plain, strided = hybrid(pattern="ssm"), hybrid(pattern="ssm@1")
    assert plain.state_dict().keys() == strided.state_dict().keys()
    assert torch.equal(hidden(plain, tokens()), hidden(strided, tokens()))
    model = hybrid(pattern="ssm@4")
    layer = model.layers[0].attention
    torch.manual_seed(0)
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    ctx = model.context(TransformerInput(torch.zeros(1, 6, dtype=torch.int64)))
    said = layer(x, ctx)
    assert not said[:, :3].any() and said[:, 3:].all()


def test_attention_with_a_stride_is_that_to_the_means_of_chunks_and_to_nothing():
    model = hybrid(pattern="attn@4:nope")
    layer = model.layers[0].attention
    with torch.no_grad():
        layer.pool.weight.fill_(1 / 4)
    torch.manual_seed(0)
    x = torch.randn(1, 10, 32, dtype=torch.float64)
    found = layer(x, model.context(TransformerInput(torch.zeros(1, 10, dtype=torch.int64))))
    means = x[0, :8].view(2, 4, 32).mean(1)
    q, k, v = (y.unflatten(-1, (4, 8)) for y in (layer.wq(x[0]), layer.wk(means), layer.wv(means)))
    for t in range(10):
        n = (t + 1) // 4
        weights = (torch.einsum("hd,khd->hk", q[t], k[:n]) / 8**0.5).exp()
        made = torch.einsum("hk,khd->hd", weights, v[:n]) / (1 + weights.sum(1))[:, None]
        torch.testing.assert_close(found[0, t], layer.wo(made.flatten()))


def test_of_layers_with_a_stride_no_more_is_remembered_than_there_are_chunks():
    model = hybrid(pattern="attn@5")
    cache = Cache(model.args)
    for token in tokens().split(1, dim=1):
        hidden(model, token, cache)
    keys = 2 * 3 * (LENGTH // 5) * 32
    assert cache.nbytes == 8 * 4 * (keys + 3 * 4 * 32)


@pytest.mark.parametrize(("state", "expected"), [(16, 134_723_112), (128, 136_281_480)])
def test_the_hierarchical_model_of_768_by_12_has_so_many_parameters(state, expected):
    args = ModelArgs(
        dim=768, n_layers=12, n_heads=12, vocab_size=50257, layer_pattern="ssm,ssm@4,ssm@16,attn@16",
        tie_embeddings=True, ssm={"d_state": state},
    )  # fmt: skip
    assert sum(row.numel for row in ParameterTable.of(args).values()) == expected


def test_layers_with_a_stride_refuse_positions_that_do_not_count_from_the_first_token():
    with pytest.raises(ValueError, match="row 0: layers with a stride count the tokens of a document from 0, one by"):
        hybrid(pattern="ssm@4")(TransformerInput(tokens(), tokens_position=5))


def test_what_is_remembered_of_a_state_space_layer_does_not_grow():
    model, cache = hybrid(pattern="ssm"), Cache(hybrid(pattern="ssm").args)
    hidden(model, tokens()[:, :3], cache)
    held = cache.nbytes
    hidden(model, tokens(), cache)
    channels, shared, heads, state = 64, 16, 8, 8
    assert cache.nbytes == held == 4 * 3 * 8 * (3 * (channels + shared) + heads * 8 * state)


@pytest.mark.parametrize(("state", "expected"), [(16, 130_943_856), (128, 131_982_768)])
def test_the_alternating_model_of_768_by_12_has_so_many_parameters(state, expected):
    args = ModelArgs(
        dim=768, n_layers=12, n_heads=12, vocab_size=50257, layer_pattern="alternating", tie_embeddings=True,
        ssm={"d_state": state},
    )  # fmt: skip
    assert sum(row.numel for row in ParameterTable.of(args).values()) == expected


@pytest.mark.parametrize("limits", [(0.0, None), (0.02, 0.3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_is_transformers_mamba_2_with_limits_of_the_time_step_too(groups, limits):
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    ours = hybrid(groups, "ssm", dt_limit=limits, d_state=16).float()
    block = ours.layers[0].attention
    assert isinstance(block, SSM)
    config = transformers.Mamba2Config(
        hidden_size=32, state_size=16, head_dim=8, num_heads=8, n_groups=groups, chunk_size=8, expand=2,
        conv_kernel=4, use_bias=False, use_conv_bias=True, layer_norm_epsilon=ours.args.norm_eps,
        time_step_limit=(limits[0], limits[1] or float("inf")),
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0)
    with torch.no_grad():
        fused = torch.cat([block.wz.weight, block.wx.weight, block.wbc.weight, block.wdt.weight])
        theirs.in_proj.weight.copy_(fused)
        theirs.conv1d.weight.copy_(torch.cat([block.conv_x.weight, block.conv_bc.weight]))
        theirs.conv1d.bias.copy_(torch.cat([block.conv_x.bias, block.conv_bc.bias]))
        theirs.A_log.copy_(block.A_log), theirs.D.copy_(block.D), theirs.dt_bias.copy_(block.dt_bias)
        theirs.norm.weight.copy_(block.norm.weight), theirs.out_proj.weight.copy_(block.wo.weight)
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, 32)
    ctx = make_context(
        ours.args, ours.specs, TransformerInput(torch.zeros(2, LENGTH, dtype=torch.int64)), None, None, None, False,
        False,
    )  # fmt: skip
    found, expected = block(x, ctx), theirs(x)
    # float32 sums of other orders
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
