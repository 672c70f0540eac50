"""Models that read and predict values: names and shapes, scales, poolings, the cache, and what does not fit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.flops import unit_flops
from llm.foreign.export import choose_family
from llm.parameters import ParameterTable

SMALL = dict(dim=32, n_layers=2, n_heads=4, ffn_hidden=48, input_dim=3, output_dim=2)


def model_of(seed: int = 0, **changes: object) -> LLM:
    return LLM(ModelArgs.model_validate(SMALL | changes), seed=seed).eval()


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_linear_maps_have_the_names_of_table_and_output_matrix_and_biases() -> None:
    model = model_of()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ends = {name: shape for name, shape in shapes.items() if not name.startswith(("layers", "norm"))}
    assert ends == {
        "tok_embeddings.weight": (32, 3), "tok_embeddings.bias": (32,), "output.weight": (2, 32), "output.bias": (2,)
    }  # fmt: skip
    assert ParameterTable.of(model.args).shapes == shapes


def test_outputs_are_linear_maps_around_the_layers() -> None:
    model, x = model_of(), values(2, 5, 3)
    out = model(x)
    hidden = model(TransformerInput.of_features(x), return_hidden=True).hidden
    expected = hidden @ model.output.weight.T + model.output.bias
    assert out.logits is None and out.outputs.shape == (2, 5, 2)
    torch.testing.assert_close(out.outputs, expected)
    first = model.run(["tok_embeddings"], None, TransformerInput.of_features(x),
                      model.context(TransformerInput.of_features(x)))[0]  # fmt: skip
    torch.testing.assert_close(first, x @ model.tok_embeddings.weight.T + model.tok_embeddings.bias)


def test_a_model_with_scales_reads_and_says_values_in_the_units_of_its_data() -> None:
    plain = model_of()
    scales = dict(
        input_mean=(1.0, -2.0, 0.5), input_std=(2.0, 3.0, 0.25), output_mean=(7.0, 1.0), output_std=(4.0, 9.0)
    )
    scaled = model_of(**scales)
    x = values(2, 4, 3)
    in_units = x * torch.tensor(scales["input_std"]) + torch.tensor(scales["input_mean"])
    expected = plain(x).outputs * torch.tensor(scales["output_std"]) + torch.tensor(scales["output_mean"])
    # the scales are undone in float32: relative errors of a few 2^-24 in what goes in
    torch.testing.assert_close(scaled(in_units).outputs, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_outputs_of_a_pooled_document_are_the_pooled_outputs_of_its_positions(pool: str) -> None:
    model, x = model_of(pool=pool, causal=False), values(1, 7, 3)
    inputs = TransformerInput.of_features(x, cu_seqlens=torch.tensor([0, 4, 7]))
    hidden = model(inputs, return_hidden=True).hidden
    of_each, found = model.values(hidden)[0], model.pooled_values(hidden, inputs)
    take = {"mean": lambda y: y.mean(0), "first": lambda y: y[0], "last": lambda y: y[-1]}[pool]
    torch.testing.assert_close(found, torch.stack([take(of_each[:4]), take(of_each[4:])]))


@pytest.mark.parametrize("pos", ["rope", "sinusoidal", "learned"])
def test_values_through_the_cache_give_the_outputs_of_the_whole(pos: str) -> None:
    model, x = model_of(pos=pos), values(2, 9, 3)
    whole, cache = model(x).outputs, Cache(model.args)
    parts = [model(part, cache=cache).outputs for part in x.split([4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)  # other sizes of products


def test_documents_side_by_side_do_not_see_each_other() -> None:
    model, x = model_of(causal=False), values(1, 8, 3)
    inputs = TransformerInput.of_features(x, cu_seqlens=torch.tensor([0, 5, 8]))
    alone = torch.cat([model(x[:, :5]).outputs, model(x[:, 5:]).outputs], 1)
    torch.testing.assert_close(model(inputs).outputs, alone, rtol=1e-4, atol=1e-5)


def test_values_may_go_in_and_tokens_come_out_and_the_reverse() -> None:
    assert model_of(output_dim=None, vocab_size=11)(values(1, 4, 3)).logits.shape == (1, 4, 11)
    assert model_of(input_dim=None, vocab_size=11)(torch.ones(1, 4, dtype=torch.int64)).outputs.shape == (1, 4, 2)
    with pytest.raises(ValueError, match="model.vocab_size is not set"):
        model_of(output_dim=None)


def test_a_folder_keeps_weights_scales_and_dimensions(tmp_path: Path) -> None:
    model, x = model_of(input_mean=(1.0, 2.0, 3.0), output_std=(2.0, 5.0)), values(1, 4, 3)
    model.save_pretrained(tmp_path / "model")
    again = LLM.from_pretrained(tmp_path / "model")
    assert again.args == model.args and torch.equal(again(x).outputs, model(x).outputs)


def test_keys_of_values_stay_out_of_what_other_models_write() -> None:
    written = ModelArgs(dim=32, n_layers=1, n_heads=2).model_dump()
    assert not [key for key in written if key.startswith(("input_", "output_"))]


def test_both_linear_maps_count_as_products() -> None:
    found = unit_flops(ModelArgs.model_validate(SMALL), 16)
    assert (found["tok_embeddings"], found["output"]) == (6 * (32 * 3 + 32), 6 * (2 * 32 + 2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(tie_embeddings=True), "model.tie_embeddings=true: one table is of models of tokens on both sides"),
        (dict(input_mean=(1.0,)), r"model.input_mean=\[1.0\]: there must be one number for each of model.input_dim=3"),
        (dict(output_std=(1.0, 0.0)), r"model.output_std=\[1.0, 0.0\]: numbers must be finite, and above 0"),
        (dict(output_dim=None, output_mean=(0.0,)), "there must be one number for each of model.output_dim=None"),
        (dict(lora=dict(targets="output")), "lora.targets=output: adapters are of tables of tokens"),
        (dict(input_dim=0), "input_dim"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_by_name(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelArgs.model_validate(SMALL | changes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(1, 4, dtype=torch.int64), "model.input_dim=3: the model reads values"),
        (torch.zeros(1, 4, 2), r"values must be floats of shape \(B, T, model.input_dim\), here \(1, 4, 3\)"),
        (torch.zeros(4, 3), "one row is values"),
    ],
)
def test_inputs_of_another_shape_are_refused(given: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model_of()(given)


def test_values_for_a_model_of_tokens_and_labels_for_one_of_values_are_refused() -> None:
    with pytest.raises(ValueError, match="has no model.input_dim"):
        model_of(input_dim=None, vocab_size=5)(torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="labels are of tokens; model.output_dim=2 predicts values"):
        model_of()(torch.zeros(1, 4, 3), labels=torch.zeros(1, 4, dtype=torch.int64))


def test_generated_values_are_those_of_reading_the_whole_again_each_step() -> None:
    model = model_of(output_dim=3, input_mean=(1.0, 2.0, 3.0), output_mean=(1.0, 2.0, 3.0), max_seq_len=16)
    series = values(2, 5, 3)
    found, rows = model.generate_values(series, 4), series
    for _ in range(4):
        rows = torch.cat([rows, model(rows).outputs[:, -1:].detach()], 1)
    torch.testing.assert_close(found, rows[:, 5:], rtol=1e-4, atol=1e-5)  # sizes of products differ
    torch.testing.assert_close(model.generate_values(series[1].tolist(), 4), found[1], rtol=1e-4, atol=1e-5)


def test_predictions_of_rows_are_outputs_and_pooled_outputs_in_the_units_of_the_data() -> None:
    scales = dict(output_mean=(5.0, -5.0), output_std=(2.0, 3.0))
    model, x = model_of(**scales, causal=False, dropout=0.5).train(), values(2, 4, 3)
    outputs = model.predict_values(x)
    assert model.training, "what it was before"
    torch.testing.assert_close(outputs, model.eval()(x).outputs.detach())
    torch.testing.assert_close(model.predict_values(x, pooled=True), outputs.mean(1), rtol=1e-5, atol=1e-5)
    assert model.predict_values(x[0].numpy(), pooled=True).shape == (2,)


@pytest.mark.parametrize(
    ("changes", "series", "n", "said"),
    [
        ({}, values(4, 3), 2, "model.output_dim=2: outputs can be read as the next values only where there"),
        (dict(output_dim=3, causal=False), values(4, 3), 2, "model.causal=false"),
        (dict(output_dim=3), values(4, 2), 2, r"values must have the shape \(T, 3\) or \(B, T, 3\)"),
        (dict(output_dim=3), [[1.0, 2.0, float("nan")]], 2, "values must be finite"),
        (dict(output_dim=3), [[1.0, 2.0, 3.0], [1.0]], 2, "values are no rows of as many numbers each"),
        (dict(output_dim=3), values(4, 3), 0, "n=0: must be a whole number of steps"),
        (dict(output_dim=3, max_seq_len=8), values(4, 3), 6, "too many for the context of 8 .* it gives 5 at most"),
        (dict(output_dim=None, vocab_size=5), values(4, 3), 2, "model.output_dim is not set"),
        (dict(input_dim=None, output_dim=None, vocab_size=5), values(4, 3), 2, "model.input_dim is not set"),
    ],
)
def test_what_cannot_be_continued_is_refused(changes: dict[str, object], series: object, n: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model_of(**changes).generate_values(series, n)


def test_a_model_of_values_is_refused_by_name_where_it_is_to_be_written_for_others() -> None:
    with pytest.raises(UserError, match="model.input_dim=3: foreign families are of models of tokens"):
        choose_family(model_of().args, "hf")
