"""Miniformer's Transformer: equal to torch's own layers and to plain loops, whatever its keys; kept and read again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llm import LLM
from llm.errors import UserError
from llm.siblings.hyformer import Hyformer
from llm.siblings.miniformer import Transformer, TransformerConfig

VOCAB = 40
SIZES = {"vocab_size": VOCAB, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24, "dropout": 0.0, "max_seq_len": 32}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Between sums of float32 in another order, of numbers around 1."""


def config(**changes: object) -> TransformerConfig:
    return TransformerConfig(**SIZES | {"model_args": {"init_std": 0.2}} | changes)  # type: ignore[arg-type]


def transformer(seed: int = 0, **changes: object) -> Transformer:
    """Initial values of a size at which attention prefers something."""
    torch.manual_seed(seed)
    model = Transformer(config(**changes)).eval()
    with torch.no_grad():  # biases begin at 0, at which they could be left out
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, shape or (3, 7), generator=torch.Generator().manual_seed(seed))


def torchs_layer(block: nn.Module, activation: str, pre_norm: bool) -> nn.TransformerEncoderLayer:
    """torch's own layer with a block's weights."""
    theirs = nn.TransformerEncoderLayer(
        16, 2, 24, dropout=0.0, activation=activation, batch_first=True, norm_first=pre_norm
    )
    ours = dict(block.named_parameters())
    before = ("attention_norm", "ffn_norm") if pre_norm else ("attention_post_norm", "ffn_post_norm")
    names = {"self_attn.out_proj": "attention.wo", "linear1": "feed_forward.w1", "linear2": "feed_forward.w2"}
    names |= {"norm1": before[0], "norm2": before[1]}
    state = {f"{t}.{kind}": ours[f"{o}.{kind}"] for t, o in names.items() for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        state[f"self_attn.in_proj_{kind}"] = torch.cat([ours[f"attention.{w}.{kind}"] for w in ("wq", "wk", "wv")])
    theirs.load_state_dict(state)
    return theirs.eval()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_layers_are_torchs_encoder_layers(activation: str, pre_norm: bool, causal: bool) -> None:
    model = transformer(activation=activation, pre_norm=pre_norm, rotary_pct=0, causal=causal)
    tokens = ids()
    waves = transformer(rotary_pct=0).llm.pos_embeddings(torch.arange(7)[None])
    x = model.llm.tok_embeddings.weight[tokens] + waves
    mask = torch.full((7, 7), float("-inf")).triu(1) if causal else None
    for block in model.layers:
        x = torchs_layer(block, activation, pre_norm)(x, src_mask=mask)
    x = model.llm.norm(x) if pre_norm else x
    torch.testing.assert_close(model(tokens), x @ model.llm.output.weight.T, **CLOSE)


def test_swiglu_is_a_llama_of_the_literal_width_without_biases() -> None:
    model = transformer(activation="swiglu")
    torch.manual_seed(0)
    llama = Hyformer(VOCAB, 16, 2, 2, 32, model_args={"ffn_hidden": 24, "init_std": 0.2}).eval()
    llama.llm.load_state_dict({**model.llm.state_dict(), "tok_embeddings.weight": model.llm.output.weight})
    vectors = model.llm.state_dict()["tok_embeddings.weight"]
    tied = transformer(activation="swiglu", tie_weights=True)
    tied.llm.load_state_dict(llama.llm.state_dict())
    assert not torch.equal(vectors, model.llm.output.weight)
    torch.testing.assert_close(tied(ids()), llama(ids(), task="lm").logits, rtol=0, atol=0)
    block = model.layers[0]
    assert sum(p.numel() for p in block.feed_forward.parameters()) == 3 * 16 * 24
    assert model.llm.args.norm_eps == 1e-6 and not any(name.endswith("bias") for name, _ in model.named_parameters())


@pytest.mark.parametrize(("share", "width"), [(1.0, 10), (0.5, 4), (0.75, 6), (0.3, 2)])
def test_the_rotated_part_of_a_head_is_rounded_down_to_pairs(share: float, width: int) -> None:
    args = config(d_model=20, rotary_pct=share).args()
    assert args.rotated_width == width and args.rope_theta == 1e4 and not args.rope_interleaved


def test_no_rotated_part_is_sinusoidal_positions() -> None:
    assert config(rotary_pct=0).args().pos == config(rotary_pct=0.2).args().pos == "sinusoidal"


def test_a_token_sees_none_behind_it_unless_the_config_or_the_call_says_so() -> None:
    tokens, changed = ids(1, 6), ids(1, 6)
    changed[0, -1] = (changed[0, -1] + 1) % VOCAB
    model, both = transformer(), transformer(causal=False)
    torch.testing.assert_close(model(tokens)[:, :-1], model(changed)[:, :-1], **CLOSE)
    assert not torch.allclose(both(tokens)[:, 0], both(changed)[:, 0])
    torch.testing.assert_close(model(tokens, causal=False), both(tokens), **CLOSE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotary_pct", [0.0, 0.5])
def test_padding_on_either_side_changes_nothing(causal: bool, rotary_pct: float) -> None:
    model = transformer(causal=causal, rotary_pct=rotary_pct)
    row = ids(1, 5)
    expected = model(row)
    for before, after in ((0, 3), (3, 0), (2, 1)):
        padded = torch.cat([ids(1, before), row, ids(1, after)], dim=1)
        mask = torch.tensor([[0] * before + [1] * 5 + [0] * after])
        torch.testing.assert_close(model(padded, mask)[:, before : before + 5], expected, **CLOSE)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_rows_continued_through_a_cache_have_the_logits_of_whole_rows(pre_norm: bool) -> None:
    model, tokens = transformer(pre_norm=pre_norm, rotary_pct=0.5), ids()
    cache = model.new_cache()
    parts = [model(tokens[:, start:stop], cache=cache) for start, stop in ((0, 3), (3, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), **CLOSE)


def test_greedy_generation_chooses_the_likeliest_token_again_and_again() -> None:
    model, tokens = transformer(), ids(2, 4)
    row = tokens
    for _ in range(5):
        row = torch.cat([row, model(row)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(tokens, 5), row[:, 4:])
    end = int(row[0, 5])
    ended = model.generate(tokens, 5, eos_id=end, pad_id=VOCAB + 1)
    stop = row[0, 4:].tolist().index(end) + 1
    assert ended[0, :stop].tolist() == row[0, 4 : 4 + stop].tolist() and (ended[0, stop:] == VOCAB + 1).all()


def test_generation_leaves_training_mode_as_it_was_and_drops_nothing() -> None:
    model = transformer(dropout=0.5).train()
    first, second = model.generate(ids(1, 3), 6), model.generate(ids(1, 3), 6)
    assert torch.equal(first, second) and model.training


@pytest.mark.parametrize("head", ["classification", "regression", "multilabel"])
def test_heads_for_rows_give_a_vector_a_row_and_read_both_ways(head: str) -> None:
    model, tokens = transformer(head=head, num_labels=3, causal=None), ids()
    found = model(tokens)
    assert found.shape == (3, 3)
    padded = torch.cat([tokens, ids(3, 2)], dim=1)
    mask = torch.ones(3, 9)
    mask[:, 7:] = 0
    torch.testing.assert_close(model(padded, mask), found, **CLOSE)
    hidden = model(tokens, return_hidden=True)
    head_of = model.llm.prediction
    expected = hidden.mean(1) @ head_of.weight.T + head_of.bias
    torch.testing.assert_close(found, expected, **CLOSE)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    assert not torch.allclose(hidden[:, 0], model(changed, return_hidden=True)[:, 0])


def test_without_a_head_the_model_gives_its_states_and_has_no_matrix_for_tokens() -> None:
    model = transformer(head="none")
    assert model(ids()).shape == (3, 7, 16)
    assert not any(name.startswith("llm.output") for name, _ in model.named_parameters())


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("causal", [True, False])
def test_feature_vectors_take_the_place_of_tokens_through_a_linear_map(causal: bool) -> None:
    x = features(2, 6, 3)
    mask = torch.full((6, 6), float("-inf")).triu(1) if causal else None
    plain = transformer(input_dim=3, rotary_pct=0, causal=causal)
    states = x @ plain.llm.tok_embeddings.weight.T + plain.llm.tok_embeddings.bias
    states = states + transformer(rotary_pct=0).llm.pos_embeddings(torch.arange(6)[None])
    for block in plain.layers:
        states = torchs_layer(block, "gelu", True)(states, src_mask=mask)
    torch.testing.assert_close(plain(x), plain.llm.norm(states) @ plain.llm.output.weight.T, **CLOSE)


@pytest.mark.parametrize("head", ["classification", "regression", "values", "none"])
def test_every_head_is_there_for_feature_vectors_too_and_padding_changes_nothing(head: str) -> None:
    sizes = {"num_labels": 3} if head in ("classification", "regression") else {}
    sizes |= {"output_dim": 2} if head == "values" else {}
    model, x = transformer(input_dim=4, head=head, vocab_size=None, **sizes), features(2, 5, 4)
    shape = {"values": (2, 5, 2), "none": (2, 5, 16)}.get(head, (2, 3))
    found = model(x)
    assert found.shape == shape
    padded = model(torch.cat([x, features(2, 2, 4)], dim=1), torch.tensor([[1] * 5 + [0] * 2] * 2))
    torch.testing.assert_close(padded if len(shape) == 2 else padded[:, :5], found, **CLOSE)


def test_a_model_of_feature_vectors_is_kept_and_read_again(tmp_path: Path) -> None:
    model = transformer(input_dim=4, head="regression", num_labels=2, vocab_size=None, pool="last")
    x = features(2, 5, 4)
    model.save_pretrained(tmp_path / "model")
    again = Transformer.from_pretrained(tmp_path / "model")
    assert again.config == model.config and torch.equal(again(x), model(x))


def test_a_tied_head_is_the_token_table() -> None:
    model = transformer(tie_weights=True)
    logits = model(ids(), return_hidden=True) @ model.llm.tok_embeddings.weight.T
    torch.testing.assert_close(model(ids()), logits, **CLOSE)
    assert transformer().get_num_params() - model.get_num_params() == VOCAB * 16


def test_a_saved_model_is_read_again_and_is_a_model_folder_of_the_project(tmp_path: Path) -> None:
    model = transformer(rotary_pct=0.5, activation="swiglu", model_args={"init_std": 0.2, "n_kv_heads": 1})
    model.save_pretrained(tmp_path / "model")
    written = {file.name for file in (tmp_path / "model").iterdir()}
    assert written == {"config.json", "model.safetensors", "manifest.json"}
    again = Transformer.from_pretrained(tmp_path / "model")
    assert again.config == model.config and not again.training and not any(again.load_report or (1,))
    assert torch.equal(again(ids()), model(ids()))
    assert torch.equal(LLM.from_pretrained(tmp_path / "model")(ids()).logits, model(ids()))
    (tmp_path / "model" / "manifest.json").unlink()
    assert torch.equal(Transformer.from_pretrained(tmp_path / "model")(ids()), model(ids()))
    with pytest.raises(ValueError, match="a pickle can run code"):
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)


def test_a_folder_of_another_family_is_not_written_over_but_read(tmp_path: Path) -> None:
    other = Hyformer(VOCAB, 16, 2, 2, 32)
    other.save_pretrained(tmp_path / "hyformer")
    with pytest.raises(UserError, match="holds another model"):
        transformer().save_pretrained(tmp_path / "hyformer")
    read = Transformer.from_pretrained(tmp_path / "hyformer")
    assert read.config.activation == "swiglu" and read.config.tie_weights and read.config.model_args == {}
    torch.testing.assert_close(read(ids()), other.eval()(ids(), task="lm").logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "swiglu", "rotary_pct": 0.5},
        {"activation": "relu", "pre_norm": False, "rotary_pct": 0},
        {"head": "regression", "num_labels": 2, "pool": "last"},
        {"model_args": {"norm_place": "sandwich", "sliding_window": 4, "attn_dropout": 0.3, "pos": "none"}},
    ],
)
def test_a_config_is_found_again_in_the_model_that_it_makes(changes: dict[str, object]) -> None:
    args = config(**changes).args()
    assert TransformerConfig.of(args).args() == args


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"activation": "swish2"}, r"activation='swish2'.* not known; use swiglu, silu, gelu, gelu_tanh, relu or relu"),
        ({"rotary_pct": 1.5}, r"rotary_pct=1.5: expected a number from 0 to 1"),
        ({"rotary_pct": -0.1}, r"rotary_pct=-0.1: expected a number from 0 to 1"),
        ({"dropout": 1}, r"dropout=1: expected a number from 0 to below 1"),
        ({"n_heads": 3}, r"n_heads=3 does not divide d_model=16"),
        ({"d_ff": 0}, r"d_ff=0: expected a whole number of at least 1"),
        ({"vocab_size": -1}, r"vocab_size=-1: expected a whole number of at least 1"),
        ({"pre_norm": "yes"}, r"pre_norm='yes': expected true or false"),
        ({"model_args": {"dim": 8}}, r"model_args.dim is d_model here"),
        ({"model_args": {"kv": 8}}, r"model_args.kv=8: is no key of ModelArgs"),
        ({"head": "words"}, r"head='words' is not known"),
        ({"vocab_size": None}, r"vocab_size is missing"),
        ({"head": "values"}, r"output_dim=None with head=values: give how many numbers"),
        ({"input_dim": 2, "tie_weights": True}, r"tie_weights=true: one table is of models of tokens"),
        ({"head": "regression"}, r"num_labels=None with head=regression: give how many"),
        ({"num_labels": 2}, r"num_labels=2 with head=tokens: leave it out"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_one_line(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        config(**changes)
    assert "\n" not in str(error.value)


def test_calls_that_cannot_be_are_refused_in_one_line() -> None:
    model, tokens = transformer(), ids()
    for call, line in (
        (lambda: model(ids(1, 33)), "rows of 33 tokens are longer than max_seq_len=32"),
        (lambda: model(tokens, torch.ones(3, 5)), "must have the shape of input_ids"),
        (lambda: model(tokens, causal=False, cache=model.new_cache()), "cannot continue a cache"),
        (lambda: transformer(causal=False).generate(tokens, 2), "only a causal model"),
        (lambda: model(features(1, 2, 3)), "the model reads tokens"),
        (lambda: transformer(input_dim=4)(features(1, 2, 3)), r"the model reads feature vectors \(B, T, 4\)"),
        (lambda: model(tokens + VOCAB), "token ids go from"),
    ):
        with pytest.raises(ValueError, match=line):
            call()
