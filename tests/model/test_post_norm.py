"""Stacks with norms after the sum, layer norms, biases and plain feed-forwards, against torch.nn and BertModel."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from llm import LLM, ModelArgs
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.surgery import deepen
from tests.model.models import llama4, tokens

DIM, LAYERS, HEADS, HIDDEN, ROWS, T = 32, 3, 4, 48, 2, 12
ENCODER = dict(
    dim=DIM, n_layers=LAYERS, n_heads=HEADS, ffn_hidden=HIDDEN, vocab_size=97, norm="layer", norm_place="post_add",
    act="relu", gated=False, ffn_bias=True, qkv_bias=True, o_bias=True, pos="none", causal=False, max_seq_len=16,
)  # fmt: skip


def through_layers(model: LLM, x: Tensor, **inputs: object) -> Tensor:
    """What the layers, and the norm after them, make of vectors."""
    units = [unit for unit in model.units if unit.startswith("layers.") or unit == "norm"]
    given = TransformerInput(torch.zeros(x.shape[:2], dtype=torch.int64), **inputs)  # type: ignore[arg-type]
    return model(given, x=x, units=units, return_hidden=True).hidden  # type: ignore[return-value]


def filled(model: LLM, values: Mapping[str, Tensor]) -> LLM:
    """The model with these parameters, which must be all but those of embedding and output."""
    report = model.load_state_dict(values, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= {"tok_embeddings.weight", "output.weight"}
    return model


def varied(module: nn.Module) -> None:
    """Norms and biases begin as 1 and 0, and would hide one another."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, float(parameter.ndim == 1), 0.3)


def of_torch(layer: int, theirs: Mapping[str, Tensor], norms: tuple[str, str]) -> dict[str, Tensor]:
    """The parameters of a torch.nn.TransformerEncoderLayer by our names."""
    ours = {}
    for kind in ("weight", "bias"):
        parts = theirs[f"self_attn.in_proj_{kind}"].chunk(3)
        named = dict(zip(("attention.wq", "attention.wk", "attention.wv"), parts, strict=True))
        names = {"attention.wo": "self_attn.out_proj", "feed_forward.w1": "linear1", "feed_forward.w2": "linear2"}
        names |= dict(zip(norms, ("norm1", "norm2"), strict=True))
        named |= {name: theirs[f"{their}.{kind}"] for name, their in names.items()}
        ours |= {f"layers.{layer}.{name}.{kind}": value for name, value in named.items()}
    return ours


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_stack_is_that_of_torch(norm_first: bool, activation: str, causal: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        DIM, HEADS, HIDDEN, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    last = nn.LayerNorm(DIM) if norm_first else None
    theirs = nn.TransformerEncoder(layer, LAYERS, last, enable_nested_tensor=False)
    varied(theirs)
    place = "pre" if norm_first else "post_add"
    model = LLM(ModelArgs.model_validate(ENCODER | dict(norm_place=place, act=activation, causal=causal)))
    norms = ("attention_norm", "ffn_norm") if norm_first else ("attention_post_norm", "ffn_post_norm")
    values = {}
    for i in range(LAYERS):
        values |= of_torch(i, theirs.layers[i].state_dict(), norms)
    if last is not None:
        values |= {f"norm.{name}": value for name, value in last.state_dict().items()}
    filled(model, values)
    x = torch.randn(ROWS, T, DIM, requires_grad=True)
    lengths = torch.tensor([T, 7])
    padding = torch.arange(T) >= lengths[:, None]
    ahead = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.bool) if causal else None
    expected = theirs(x, mask=ahead, src_key_padding_mask=padding)[~padding]
    positions = torch.where(padding, -1, torch.arange(T))
    found = through_layers(model, x, tokens_position=positions)[~padding]
    # three layers in float32 of values of size 1; sums of up to 48 terms
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(found)
    ours, reference = (torch.autograd.grad(out, x, upstream)[0] for out in (found, expected))
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_hidden_states_are_those_of_a_bert_from_its_embeddings_on() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=DIM, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=HIDDEN,
        max_position_embeddings=16,
    )  # fmt: skip
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    varied(bert)
    attention, output = "attention.self.{}", "attention.output.{}"
    names = {
        "attention.wq": attention.format("query"), "attention.wk": attention.format("key"),
        "attention.wv": attention.format("value"), "attention.wo": output.format("dense"),
        "attention_post_norm": output.format("LayerNorm"), "feed_forward.w1": "intermediate.dense",
        "feed_forward.w2": "output.dense", "ffn_post_norm": "output.LayerNorm",
    }  # fmt: skip
    theirs = bert.state_dict()
    values = {
        f"layers.{i}.{ours}.{kind}": theirs[f"encoder.layer.{i}.{their}.{kind}"]
        for i in range(LAYERS)
        for ours, their in names.items()
        for kind in ("weight", "bias")
    }
    model = filled(LLM(ModelArgs.model_validate(ENCODER | dict(act="gelu", norm_eps=1e-12))), values)
    valid = torch.arange(T) < torch.tensor([T, 5])[:, None]
    out = bert(tokens(ROWS, T), attention_mask=valid.long(), output_hidden_states=True)
    found = through_layers(model, out.hidden_states[0], tokens_position=torch.where(valid, torch.arange(T), -1))
    torch.testing.assert_close(found[valid], out.last_hidden_state[valid], rtol=1e-4, atol=1e-5)


def test_there_is_no_norm_after_the_last_layer_of_a_post_norm_stack() -> None:
    model = llama4(norm_place="post_add", norm="layer")
    assert "norm" in model.units and not any(name.startswith("norm.") for name in model.state_dict())
    hidden = model(tokens(2, 9), return_hidden=True).hidden
    # a layer norm with weight 1 and bias 0 was the last thing
    torch.testing.assert_close(hidden.mean(-1), torch.zeros(2, 9), rtol=0, atol=1e-6)
    torch.testing.assert_close(hidden.var(-1, correction=0), torch.ones(2, 9), rtol=1e-2, atol=0)


def test_no_layer_is_added_where_none_can_be_silent() -> None:
    model = llama4(norm_place="post_add", nope_layer_interval=None)
    with pytest.raises(UserError, match="norm_place=post_add: no layer that is added leaves"):
        deepen(model.args, model.state_dict(), 6)
