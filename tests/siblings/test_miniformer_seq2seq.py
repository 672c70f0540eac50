"""Miniformer's encoder-decoder: equal to torch's own layers, blind to padding, kept and read again; decoder layers and
classes of one's own in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm import LLM
from llm.errors import UserError
from llm.siblings.miniformer import DecoderLayer, MultiHeadAttention, Seq2SeqTransformer, Transformer, TransformerConfig
from tests.siblings.test_miniformer import CLOSE, VOCAB, config, ids, torchs_layer, transformer
from tests.siblings.test_miniformer_layers import OWN, ScaledAttention


def seq2seq(seed: int = 0, **changes: object) -> Seq2SeqTransformer:
    """Initial values of a size at which attention prefers something."""
    torch.manual_seed(seed)
    model = Seq2SeqTransformer(config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def torchs_decoder_layer(block: nn.Module, activation: str, pre_norm: bool) -> nn.TransformerDecoderLayer:
    """torch's own layer with a block's weights."""
    theirs = nn.TransformerDecoderLayer(
        16, 2, 24, dropout=0.0, activation=activation, batch_first=True, norm_first=pre_norm
    )
    ours, post = dict(block.named_parameters()), "" if pre_norm else "post_"
    names = {"linear1": "feed_forward.w1", "linear2": "feed_forward.w2", "norm1": f"attention_{post}norm",
             "norm2": f"cross_{post}norm", "norm3": f"ffn_{post}norm", "self_attn.out_proj": "attention.wo",
             "multihead_attn.out_proj": "cross.wo"}  # fmt: skip
    state = {f"{t}.{kind}": ours[f"{o}.{kind}"] for t, o in names.items() for kind in ("weight", "bias")}
    for t, o in (("self_attn", "attention"), ("multihead_attn", "cross")):
        for kind in ("weight", "bias"):
            state[f"{t}.in_proj_{kind}"] = torch.cat([ours[f"{o}.{w}.{kind}"] for w in ("wq", "wk", "wv")])
    theirs.load_state_dict(state)
    return theirs.eval()


def waves(n: int) -> Tensor:
    found: Tensor = transformer(rotary_pct=0).llm.pos_embeddings(torch.arange(n)[None])
    return found


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_both_sides_are_torchs_layers(activation: str, pre_norm: bool) -> None:
    model = seq2seq(activation=activation, pre_norm=pre_norm, rotary_pct=0)
    src, tgt = ids(2, 6), ids(2, 5, seed=3)
    table = model.llm.tok_embeddings.weight
    memory = table[src] + waves(6)
    for block in model.encoder_layers:
        memory = torchs_layer(block, activation, pre_norm)(memory)
    memory = model.llm.encoder.norm(memory) if pre_norm else memory
    torch.testing.assert_close(model.encode(src), memory, **CLOSE)
    x, mask = table[tgt] + waves(5), torch.full((5, 5), float("-inf")).triu(1)
    for block in model.decoder_layers:
        x = torchs_decoder_layer(block, activation, pre_norm)(x, memory, tgt_mask=mask)
    x = model.llm.norm(x) if pre_norm else x
    torch.testing.assert_close(model(src, tgt), x @ model.llm.output.weight.T, **CLOSE)


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("rotary_pct", [0, 0.5])
def test_a_decoder_layer_alone_is_that_of_the_model(pre_norm: bool, rotary_pct: float) -> None:
    model = seq2seq(pre_norm=pre_norm, rotary_pct=rotary_pct, activation="swiglu")
    src, tgt = ids(2, 6), ids(2, 5, seed=3)
    memory = model.encode(src)
    x = model.llm.tok_embeddings.weight[tgt] + (0 if rotary_pct else waves(5))
    for block in model.decoder_layers:
        layer = DecoderLayer(model.config).eval()
        layer.load_state_dict(block.state_dict())
        x = layer(x, memory)
    x = model.llm.norm(x) if pre_norm else x
    torch.testing.assert_close(x @ model.llm.output.weight.T, model(src, tgt), **CLOSE)


def test_attention_to_a_memory_alone_is_that_of_a_layer_and_sees_all_of_it() -> None:
    model = seq2seq()
    cross = MultiHeadAttention(model.config, cross=True).eval()
    cross.load_state_dict(model.decoder_layers[0].cross.state_dict())
    x, memory = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    changed = torch.cat([memory[:, :-1], memory[:, -1:] + 1], dim=1)
    assert cross(x, memory_BSD=memory).shape == (2, 3, 16)
    assert not torch.allclose(cross(x, memory_BSD=memory)[:, 0], cross(x, memory_BSD=changed)[:, 0])


def test_a_target_sees_what_came_before_and_all_of_its_source() -> None:
    model, src, tgt = seq2seq(), ids(1, 6), ids(1, 5, seed=3)
    later, other = tgt.clone(), src.clone()
    later[0, -1], other[0, -1] = (later[0, -1] + 1) % VOCAB, (other[0, -1] + 1) % VOCAB
    torch.testing.assert_close(model(src, tgt)[:, :-1], model(src, later)[:, :-1], **CLOSE)
    assert not torch.allclose(model(src, tgt)[:, 0], model(other, tgt)[:, 0])


def test_padding_of_either_side_changes_nothing() -> None:
    model, src, tgt = seq2seq(rotary_pct=0.5), ids(1, 6), ids(1, 5, seed=3)
    expected = model(src, tgt)
    padded_src = torch.cat([ids(1, 2), src, ids(1, 1)], dim=1)
    padded_tgt = torch.cat([tgt, ids(1, 3)], dim=1)
    masks = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    torch.testing.assert_close(model(padded_src, padded_tgt, *masks)[:, :5], expected, **CLOSE)


def test_a_memory_that_is_given_is_the_encoders() -> None:
    model, src, tgt = seq2seq(), ids(2, 6), ids(2, 5, seed=3)
    torch.testing.assert_close(model(src, tgt, memory=model.encode(src)), model(src, tgt), **CLOSE)


def test_a_saved_encoder_decoder_is_read_again_by_its_own_class_and_by_the_project(tmp_path: Path) -> None:
    model = seq2seq(activation="swiglu", tie_weights=True)
    model.save_pretrained(tmp_path / "model")
    again = Seq2SeqTransformer.from_pretrained(tmp_path / "model")
    src, tgt = ids(2, 6), ids(2, 5, seed=3)
    assert again.config == model.config and torch.equal(again(src, tgt), model(src, tgt))
    assert LLM.from_pretrained(tmp_path / "model").args == model.llm.args
    with pytest.raises(UserError, match="has an encoder and a decoder; Seq2SeqTransformer reads it"):
        Transformer.from_pretrained(tmp_path / "model")
    transformer().save_pretrained(tmp_path / "stack")
    with pytest.raises(UserError, match="one stack of layers; Transformer reads it"):
        Seq2SeqTransformer.from_pretrained(tmp_path / "stack")


def test_greedy_generation_writes_the_likeliest_token_again_and_again() -> None:
    model, src = seq2seq(rotary_pct=0.5), ids(2, 6)
    row = torch.full((2, 1), 1)
    for _ in range(5):
        row = torch.cat([row, model(src, row)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(src, 5, eos_id=None), row[:, 1:]), "what follows the begin id"
    end = int(row[0, 2])
    ended = model.generate(src, 5, eos_id=end, pad_id=VOCAB + 1)[0].tolist()
    stop = row[0, 1:].tolist().index(end) + 1
    assert ended[:stop] == row[0, 1 : 1 + stop].tolist() and set(ended[stop:]) <= {VOCAB + 1}


@torch.no_grad()
def log_probability(model: Seq2SeqTransformer, src: Tensor, made: Tensor) -> float:
    tgt = torch.cat([torch.ones(1, 1, dtype=torch.int64), made], dim=1)
    logs = model(src, tgt)[:, :-1].log_softmax(-1)
    return float(logs.gather(-1, made[..., None]).sum())


def test_as_many_beams_as_tokens_find_the_likeliest_of_all_targets_of_two() -> None:
    model, src = seq2seq(vocab_size=8), ids(1, 5) % 8
    found = model.generate(src, 2, num_beams=8, eos_id=None)
    pairs = [torch.tensor([[first, second]]) for first in range(8) for second in range(8)]
    best = max(log_probability(model, src, pair) for pair in pairs)
    assert log_probability(model, src, found) == pytest.approx(best, abs=1e-4)
    assert torch.equal(model.generate(src, 4, num_beams=1), model.generate(src, 4))


def test_sources_of_other_lengths_and_padding_do_not_change_what_is_written() -> None:
    model, short, long = seq2seq(), ids(1, 4), ids(1, 7, seed=5)
    rows = torch.cat([torch.cat([short, ids(1, 3, seed=9)], dim=1), long])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    for beams in (1, 3):
        both = model.generate(rows, 4, num_beams=beams, eos_id=None, src_mask=mask)
        alone = [model.generate(src, 4, num_beams=beams, eos_id=None) for src in (short, long)]
        assert torch.equal(both, torch.cat(alone))
    with pytest.raises(ValueError, match="src_mask: row 2 is padding alone"):
        model.generate(rows, 4, src_mask=torch.tensor([[1] * 7, [0] * 7]))


class GatedDecoderLayer(DecoderLayer):
    """Passes only a learned share of what the layer changes."""

    def __init__(self, config: TransformerConfig, *place: Any) -> None:
        super().__init__(config, *place)
        self.share = nn.Parameter(torch.tensor([0.25]))

    def forward(self, x: Tensor, *call: Any) -> Tensor:
        return x + self.share * (super().forward(x, *call) - x)


def test_subclasses_take_their_places_on_both_sides_train_and_are_saved(tmp_path: Path) -> None:
    own = {**OWN, "decoder_layer": GatedDecoderLayer}
    torch.manual_seed(0)
    model = Seq2SeqTransformer(config(), **own)  # type: ignore[arg-type]
    scaled = [module for module in model.modules() if isinstance(module, ScaledAttention)]
    assert len(scaled) == 2 + 2 * 2, "the encoder's, the decoder's, and those to the memory"
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    src, tgt = ids(2, 6), ids(2, 5, seed=3)
    nn.functional.cross_entropy(model(src, tgt)[:, :-1].flatten(0, 1), tgt[:, 1:].flatten()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert all("wk.bias" in name for name in still)
    model.eval().save_pretrained(tmp_path / "own")
    again = Seq2SeqTransformer.from_pretrained(tmp_path / "own", **own)
    assert torch.equal(again(src, tgt), model(src, tgt))
    with pytest.raises(UserError, match="decoder_layer=GatedDecoderLayer; given are none"):
        Seq2SeqTransformer.from_pretrained(tmp_path / "own")


@pytest.mark.parametrize(
    ("changes", "line"),
    [({"causal": False}, "an encoder-decoder writes tokens"), ({"head": "none"}, "an encoder-decoder writes tokens")],
)
def test_an_encoder_decoder_that_cannot_be_is_refused(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Seq2SeqTransformer(config(**changes))


def test_calls_that_cannot_be_are_refused() -> None:
    model = seq2seq()
    for src, tgt, line in (
        (ids(2, 6), ids(3, 5), "src has 2 rows and tgt 3"),
        (ids(2, 33), ids(2, 5), "src has rows of 33 tokens, longer than max_seq_len=32"),
        (ids(2, 5), ids(2, 33), "tgt has rows of 33 tokens, longer than max_seq_len=32"),
    ):
        with pytest.raises(ValueError, match=line):
            model(src, tgt)
