"""What is exported computes what the model does: each graph in Python, and a small one as torch.export has it."""

import json
from pathlib import Path

import pytest
import torch

from llm import LLM
from llm.errors import UserError
from llm.export.check import TOLERANCE, largest_difference
from llm.export.files import export_model, program_of
from llm.export.kinds import graph_of
from llm.tokenizer import ByteTokenizer
from tests.export.models import DECODERS, ENCODERS, MOE, SIDED, eager, model_of
from tools.export import main

# other sums than those of the model: masked attention for attention by segments, all experts for those chosen
ROUNDING = 1e-5


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("what", ["llm", "step"])
def test_a_graph_equals_the_model(name: str, what: str) -> None:
    model = model_of(**DECODERS[name])
    graph = graph_of(model, what)
    assert largest_difference(model, graph, eager(graph)) < ROUNDING


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_equals_the_model_beside_padding(name: str) -> None:
    model = model_of(**ENCODERS[name])
    graph = graph_of(model, "encoder")
    assert largest_difference(model, graph, eager(graph)) < ROUNDING


@pytest.mark.parametrize("name", SIDED)
@pytest.mark.parametrize("what", ["encoder_decoder", "encoder", "step"])
def test_the_graphs_of_an_encoder_decoder_equal_it_beside_padding(name: str, what: str) -> None:
    model = model_of(**SIDED[name])
    graph = graph_of(model, what)
    assert largest_difference(model, graph, eager(graph)) < ROUNDING


def test_a_graph_has_the_parameters_of_the_model_and_leaves_its_layers_as_they_were() -> None:
    model = model_of(moe=MOE)
    layers = [type(module) for module in model.modules()]
    graph = graph_of(model, "llm")
    assert {id(p) for p in graph.parameters()} == {id(p) for p in model.parameters()}
    assert [type(module) for module in model.modules()] == layers


def test_a_program_of_torch_export_takes_any_batch_length_and_past() -> None:
    model = model_of(**DECODERS["llama4"])
    graph = graph_of(model, "step")
    module = program_of(graph).module()

    def run(given):
        return dict(zip(graph.outputs, module(*(given[name] for name in graph.inputs)), strict=True))

    assert largest_difference(model, graph, run) < ROUNDING


def test_a_graph_that_computes_something_else_is_refused() -> None:
    model = model_of()
    graph = graph_of(model, "llm")
    with torch.no_grad():
        other = eager(graph_of(model_of(rope_theta=1e4), "llm"))
    with pytest.raises(UserError, match="the graph's logits differs from the model's by .* in 1 rows of 2"):
        largest_difference(model, graph, other)


@pytest.mark.parametrize(
    ("keys", "what", "named"),
    [
        ({"rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_max_position": 16}}, "llm", "rope_scaling.kind"),
        ({"layer_pattern": ["attn", "attn@2"]}, "llm", "layer 1 is strided_attn; only layers with attention"),
        ({"lora": {"rank": 2}}, "llm", "model.lora: adapters are exported merged"),
        ({"causal": False}, "llm", "export it as `encoder`"),
        ({"causal": False}, "step", "there are no steps"),
        ({"encoder_layers": 1}, "llm", "llm: model.encoder_layers=1; possible are encoder_decoder, encoder, step"),
        ({}, "encoder_decoder", "encoder_decoder: model.encoder_layers=0; possible are llm, step, encoder"),
        ({}, "encoder", "export it as `llm` or `step`"),
    ],
)
def test_what_cannot_be_exported_is_named(keys: dict, what: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        graph_of(model_of(**keys), what)


def test_the_command_writes_a_folder_that_torch_reads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = model_of(vocab_size=ByteTokenizer().vocab_size)
    model.save_pretrained(tmp_path / "model", tokenizer=ByteTokenizer())
    main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--format=torch", "--check"])
    assert "differs from the model by" in capsys.readouterr().out
    said = json.loads((tmp_path / "out" / "export.json").read_text())
    assert said["files"] == ["model.pt2"] and said["largest_difference"] < TOLERANCE
    assert said["inputs"] == [{"name": "tokens", "dtype": "int64", "shape": ["batch", "length"]}]
    assert said["tokenizer"]["fingerprint"] == ByteTokenizer().fingerprint
    read = torch.export.load(tmp_path / "out" / "model.pt2").module()
    tokens = torch.tensor([ByteTokenizer().encode("To be, or not")])
    with torch.no_grad():
        expected = LLM.from_pretrained(tmp_path / "model")(tokens).logits
    assert torch.allclose(read(tokens), expected, atol=ROUNDING)


def test_nothing_is_left_where_an_export_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> float:
        raise UserError("differs")

    monkeypatch.setattr("llm.export.files.largest_difference", fails)
    with pytest.raises(UserError, match="differs"):
        export_model(model_of(n_layers=1), tmp_path / "out", format="torch", check=True)
    assert not [*tmp_path.iterdir()]


def test_a_command_says_in_one_line_what_is_there_already(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model_of().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tmp_path / "model"), "--output", str(tmp_path), "--format=torch"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: exists already; give another folder, or remove it\n"
