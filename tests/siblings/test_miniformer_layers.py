"""Miniformer's layers by name: called alone they are those of the model; subclasses given to a model are used, trained,
saved, and read only with their classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm import LLM
from llm.errors import UserError
from llm.siblings.miniformer import EncoderLayer, FeedForward, MultiHeadAttention, Transformer, TransformerConfig
from tests.siblings.test_miniformer import CLOSE, config, ids, transformer


class ScaledAttention(MultiHeadAttention):
    """Multiplies what attention gives with a number that is learned."""

    def __init__(self, config: TransformerConfig, *place: Any) -> None:
        super().__init__(config, *place)
        self.scale = nn.Parameter(torch.full((config.d_model,), 0.5))

    def forward(self, x: Tensor, *call: Any) -> Tensor:
        return super().forward(x, *call) * self.scale


class WiderFeedForward(FeedForward):
    """Adds a second, linear way, and counts its calls."""

    def __init__(self, config: TransformerConfig, *place: Any) -> None:
        super().__init__(config, *place)
        self.bypass = nn.Linear(config.d_model, config.d_model)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float32))

    def forward(self, x: Tensor, *call: Any) -> Tensor:
        self.calls += 1
        return super().forward(x, *call) + self.bypass(x)


class GatedLayer(EncoderLayer):
    """Passes only a learned share of what the layer changes."""

    def __init__(self, config: TransformerConfig, *place: Any) -> None:
        super().__init__(config, *place)
        self.share = nn.Parameter(torch.tensor([0.25]))

    def forward(self, x: Tensor, *call: Any) -> Tensor:
        return x + self.share * (super().forward(x, *call) - x)


OWN = {"attention": ScaledAttention, "feed_forward": WiderFeedForward, "encoder_layer": GatedLayer}


@pytest.mark.parametrize("pre_norm", [True, False])
def test_layers_called_one_after_the_other_are_the_model(pre_norm: bool) -> None:
    model = transformer(pre_norm=pre_norm, rotary_pct=0.5)
    x = model.llm.tok_embeddings.weight[ids()]
    for block in model.layers:
        layer = EncoderLayer(model.config, block.spec).eval()
        layer.load_state_dict(block.state_dict())
        x = layer(x)
    x = model.llm.norm(x) if pre_norm else x
    torch.testing.assert_close(x @ model.llm.output.weight.T, model(ids()), **CLOSE)


def test_attention_and_feed_forward_alone_are_those_of_a_layer() -> None:
    layer = EncoderLayer(config(activation="swiglu")).eval()
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    attention, feed_forward = MultiHeadAttention(layer.config).eval(), FeedForward(layer.config).eval()
    attention.load_state_dict(layer.attention.state_dict())
    feed_forward.load_state_dict(layer.feed_forward.state_dict())
    h = x + attention(layer.attention_norm(x))
    torch.testing.assert_close(h + feed_forward(layer.ffn_norm(h)), layer(x), **CLOSE)
    changed = torch.cat([x[:, :-1], x[:, -1:] + 1], dim=1)
    torch.testing.assert_close(attention(changed)[:, :-1], attention(x)[:, :-1], **CLOSE)


def test_a_class_alone_drops_in_training_only() -> None:
    layer, x = EncoderLayer(config(dropout=0.5)), torch.randn(1, 4, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("place", OWN)
def test_a_subclass_is_used_and_what_it_shares_with_the_models_own_class_begins_alike(place: str) -> None:
    torch.manual_seed(0)
    plain = Transformer(config()).eval()
    torch.manual_seed(0)
    model = Transformer(config(), **{place: OWN[place]}).eval()
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() > theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.allclose(model(ids()), plain(ids()))
    with torch.no_grad():  # at these values each is the model's own class
        for name in ours.keys() - theirs.keys():
            ours[name].fill_(0.0 if "bypass" in name else 1.0)
    torch.testing.assert_close(model(ids()), plain(ids()), **CLOSE)


def test_subclasses_train_are_saved_and_read_with_their_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Transformer(config(), **OWN)  # type: ignore[arg-type]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(ids())
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).backward()
    optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert all("wk.bias" in name for name in still), "a constant added to all scores of a query changes nothing"
    model.eval().save_pretrained(tmp_path / "own")
    again = Transformer.from_pretrained(tmp_path / "own", **OWN)
    assert torch.equal(again(ids()), model(ids()))
    assert float(again.layers[0].feed_forward.calls) > 1, "buffers are kept, too"
    with pytest.raises(UserError, match="was saved with attention=ScaledAttention, feed_forward=WiderFeedForward, "
                                        "encoder_layer=GatedLayer; given are none"):  # fmt: skip
        Transformer.from_pretrained(tmp_path / "own")
    with pytest.raises(UserError):
        LLM.from_pretrained(tmp_path / "own")


def test_a_plain_folder_is_not_read_with_classes_of_ones_own(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="was saved with no classes of its own; given are attention=ScaledAttention"):
        Transformer.from_pretrained(tmp_path / "plain", attention=ScaledAttention)


def test_subclasses_continue_rows_through_a_cache() -> None:
    torch.manual_seed(0)
    model, tokens = Transformer(config(), **OWN).eval(), ids()  # type: ignore[arg-type]
    cache = model.new_cache()
    parts = [model(tokens[:, start:stop], cache=cache) for start, stop in ((0, 3), (3, 7))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), **CLOSE)


def test_a_class_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="attention=.*: expected a subclass of MultiHeadAttention"):
        Transformer(config(), attention=nn.Linear)  # type: ignore[arg-type]
