"""ONNX in onnxruntime equals the model, at three lengths and two batch sizes: in the environment of `make export`."""

import json
from pathlib import Path

import pytest

from llm.errors import UserError
from llm.export.check import TOLERANCE
from llm.export.files import export_model
from tests.export.models import DECODERS, ENCODERS, SIDED, model_of

KINDS = [
    *((keys, what) for keys in DECODERS.values() for what in ("llm", "step")),
    *((keys, "encoder") for keys in ENCODERS.values()),
    *((keys, what) for keys in SIDED.values() for what in ("encoder_decoder", "encoder", "step")),
]
NAMES = [*(f"{name}-{what}" for name in DECODERS for what in ("llm", "step")), *ENCODERS]
NAMES += [f"{name}-{what}" for name in SIDED for what in ("encoder_decoder", "encoder", "step")]


@pytest.mark.full
@pytest.mark.parametrize(("keys", "what"), KINDS, ids=NAMES)
def test_onnxruntime_computes_what_the_model_does(keys: dict, what: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = model_of(**keys)
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
