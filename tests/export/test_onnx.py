"""ONNX in onnxruntime equals the model, at three lengths and two batch sizes: in the environment of `make export`."""

import json
from pathlib import Path

import pytest

from llm.errors import UserError
from llm.export.check import TOLERANCE
from llm.export.files import export_model
from tests.export.models import DECODERS, ENCODERS, model_of

KINDS = [*((name, what) for name in DECODERS for what in ("llm", "step")), *((name, "encoder") for name in ENCODERS)]


@pytest.mark.full
@pytest.mark.parametrize(("name", "what"), KINDS)
def test_onnxruntime_computes_what_the_model_does(name: str, what: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = model_of(**{**DECODERS, **ENCODERS}[name])
    made = export_model(model, tmp_path / "out", what=what, check=True)
    assert made.difference is not None and made.difference < TOLERANCE
    said = json.loads((tmp_path / "out" / "export.json").read_text())
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    for ports, values in ((said["inputs"], graph.input), (said["outputs"], graph.output)):
        assert [port["name"] for port in ports] == [value.name for value in values]
    sizes = [[size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.input]
    assert sizes == [port["shape"] for port in said["inputs"]]


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.export.files.PACKAGES", ("onnx_that_is_nowhere",))
    with pytest.raises(UserError, match="ONNX needs onnx_that_is_nowhere, of the extra `export`"):
        export_model(model_of(), tmp_path / "out")
    assert not [*tmp_path.iterdir()]
