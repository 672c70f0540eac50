"""BART: a whole encoder-decoder of transformers in our names and back, with sources of different lengths."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.checkpoint.weights import ModuleWeights
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.foreign.export import export_hf
from llm.foreign.families import bart
from llm.foreign.family import family_named

transformers = pytest.importorskip("transformers")
VOCAB, PAD = 97, 1
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, max_position_embeddings=32, d_model=32, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.2,
    pad_token_id=PAD,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "scaled, relu, more encoder": dict(scale_embedding=True, activation_function="relu", encoder_layers=3),
    "one layer, gelu_new": dict(encoder_layers=1, decoder_layers=1, activation_function="gelu_new"),
}


def theirs(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(**SIZES | changes)
    model = transformers.BartForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # norms and biases begin as 1 and 0, and would hide one another
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def loaded(model: Any) -> LLM:
    args = ModelArgs.model_validate(bart.read_config(model.config.to_dict(), print))
    ours = LLM(args)
    ours.load_state_dict(model.state_dict())
    return ours


def ragged(lengths: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, T), PAD behind each row, positions, and what transformers calls an attention mask."""
    width = max(lengths)
    ids = torch.randint(2, VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return ids.where(mask, PAD), torch.arange(width).where(mask, -1), mask.long()


def assert_alike(ours: LLM, model: Any) -> None:
    source, source_places, source_mask = ragged((7, 3, 12), seed=1)
    ids, places, mask = ragged((5, 9, 2), seed=2)
    with torch.no_grad():
        expected = model(source, source_mask, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        found = ours(TransformerInput(ids, places, source=TransformerInput(source, source_places))).logits
    there = mask.bool()
    torch.testing.assert_close(found[there], expected[there], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_with_sources_of_different_lengths_are_those_of_transformers(kind: str) -> None:
    model = theirs(**KINDS[kind])
    assert_alike(loaded(model), model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_is_read_and_one_of_ours_by_transformers(kind: str, tmp_path: Path) -> None:
    model = theirs(**KINDS[kind])
    model.save_pretrained(tmp_path / "theirs")
    ours = LLM.from_pretrained(tmp_path / "theirs")
    assert_alike(ours, model)
    convert(ours, tmp_path / "ours")
    assert_alike(ours, transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "ours").eval())


def convert(model: LLM, path: Path) -> None:
    export_hf(
        path, model.args, ModuleWeights(model), family_named("bart"), dtype=torch.float32, max_shard_bytes=1 << 30,
        extra_files={}, extra_config={},
    )  # fmt: skip


@pytest.mark.parametrize("layer", ["decoder", "encoder"])
def test_a_layer_takes_the_names_of_transformers(layer: str) -> None:
    model = theirs()
    ours, other = loaded(model), loaded(theirs(encoder_layers=2))
    block = (other if layer == "decoder" else other.encoder).layers[1]
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    block.load_state_dict(getattr(model.model, layer).layers[1].state_dict())
    expected = (ours if layer == "decoder" else ours.encoder).layers[1].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in block.state_dict().items())


def test_a_bias_of_the_logits_is_refused_where_it_is_not_0() -> None:
    state = theirs().state_dict()
    state["final_logits_bias"] = state["final_logits_bias"] + 0.5
    ours = loaded(theirs())
    with pytest.raises(UserError, match="final_logits_bias is not 0"):
        ours.load_state_dict(state)


def test_a_table_of_one_side_that_differs_is_refused() -> None:
    state = dict(theirs().state_dict())
    state["model.encoder.embed_tokens.weight"] = state["model.encoder.embed_tokens.weight"] + 1
    with pytest.raises(UserError, match="model.encoder.embed_tokens.weight holds the same weights as tok_embeddings"):
        loaded(theirs()).load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(encoder_attention_heads=2), "encoder_attention_heads=2 and decoder_attention_heads=4 must be the same"),
        (dict(encoder_ffn_dim=40), "encoder_ffn_dim=40 and decoder_ffn_dim=48 must be the same"),
        (dict(encoder_layers=0), "encoder_layers=0"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings=false"),
        (dict(activation_function="mish"), "activation_function=mish is not one of"),
    ],
)
def test_configs_that_cannot_be_honoured_are_refused(changes: dict[str, Any], message: str) -> None:
    config = theirs().config.to_dict() | changes
    with pytest.raises(UserError, match=message):
        bart.read_config(config, print)
