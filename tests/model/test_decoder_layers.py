"""Encoder-decoders against torch.nn.TransformerEncoder and TransformerDecoder, norms before and after the sum."""

import pytest
import torch
from torch import Tensor, nn

from llm import LLM, ModelArgs
from llm.datatypes import TransformerInput
from tests.model.test_post_norm import DIM, ENCODER, HEADS, HIDDEN, ROWS, T, filled, of_torch, varied

S, LAYERS, ENCODER_LAYERS = 9, 2, 3


def of_torch_cross(layer: int, theirs: dict[str, Tensor], norms: tuple[str, str]) -> dict[str, Tensor]:
    """What a torch.nn.TransformerDecoderLayer has beside the parameters of an encoder's layer, by our names."""
    ours = {}
    for kind in ("weight", "bias"):
        parts = theirs[f"multihead_attn.in_proj_{kind}"].chunk(3)
        named = dict(zip(("cross.wq", "cross.wk", "cross.wv"), parts, strict=True))
        named |= {"cross.wo": theirs[f"multihead_attn.out_proj.{kind}"], norms[0]: theirs[f"norm2.{kind}"]}
        named[norms[1]] = theirs[f"norm3.{kind}"]  # after `of_torch`, which takes the second norm for the last
        ours |= {f"layers.{layer}.{name}.{kind}": value for name, value in named.items()}
    return ours


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_both_sides_are_those_of_torch(norm_first: bool, activation: str) -> None:
    how = dict(dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first)
    lasts = [nn.LayerNorm(DIM) if norm_first else None for _ in range(2)]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, **how), ENCODER_LAYERS, lasts[0], enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS, HIDDEN, **how), LAYERS, lasts[1])
    varied(encoder)
    varied(decoder)
    place = "pre" if norm_first else "post_add"
    changes = dict(n_layers=LAYERS, encoder_layers=ENCODER_LAYERS, norm_place=place, act=activation, causal=True)
    model = LLM(ModelArgs.model_validate(ENCODER | changes))
    kind = "norm" if norm_first else "post_norm"
    own, across, last = (f"{part}_{kind}" for part in ("attention", "cross", "ffn"))
    values = {}
    for i in range(ENCODER_LAYERS):
        of_layer = of_torch(i, encoder.layers[i].state_dict(), (own, last))
        values |= {f"encoder.{name}": value for name, value in of_layer.items()}
    for i in range(LAYERS):
        theirs = decoder.layers[i].state_dict()
        values |= of_torch(i, theirs, (own, last)) | of_torch_cross(i, theirs, (across, last))
    if norm_first:
        for name, module in (("encoder.norm", lasts[0]), ("norm", lasts[1])):
            assert module is not None
            values |= {f"{name}.{kind}": value for kind, value in module.state_dict().items()}
    filled(model, values)
    x, source = torch.randn(ROWS, T, DIM), torch.randn(ROWS, S, DIM)
    padding, source_padding = (
        torch.arange(width) >= torch.tensor(lengths)[:, None] for width, lengths in ((T, (T, 7)), (S, (4, S)))
    )
    ahead = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.bool)
    memory = encoder(source, src_key_padding_mask=source_padding)
    expected = decoder(
        x, memory, tgt_mask=ahead, tgt_key_padding_mask=padding, memory_key_padding_mask=source_padding
    )
    places = [
        torch.where(hidden, -1, torch.arange(hidden.shape[1]).expand(ROWS, -1)) for hidden in (padding, source_padding)
    ]
    ids = [torch.zeros(ROWS, width, dtype=torch.int64) for width in (T, S)]
    inputs = TransformerInput(ids[0], places[0], source=TransformerInput(ids[1], places[1]))
    units = [unit for unit in model.units if unit not in ("tok_embeddings", "output")]
    both = torch.cat([x.flatten(0, 1), source.flatten(0, 1)])
    found = model(inputs, x=both, units=units, return_hidden=True).hidden
    assert found is not None
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-5, atol=1e-5)
