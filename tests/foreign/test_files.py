"""Foreign folders that are damaged, or not what they say: one clear line each, by the command line, nothing left."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM
from llm.checkpoint.run_folder import load_checkpoint
from llm.checkpoint.weights import CheckpointWeights
from llm.errors import DamagedFile
from llm.safetensors_file import SafetensorsFile, TensorFile
from tests.foreign.folders import make_all, refused


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def foreign(made: dict[str, Path]) -> Path:
    return made["foreign"]


@pytest.fixture(scope="module")
def meta(made: dict[str, Path]) -> Path:
    return made["meta"]


def cut_off(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size - 1000)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def content(name: str, data: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def changed(name: str, **keys: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return damage


def edited_header(edit: Callable[[str], str]) -> Callable[[Path], None]:
    """The header of the part that holds the first norm, changed in its text."""

    def damage(folder: Path) -> None:
        key = "model.layers.0.input_layernorm.weight"
        name = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]
        data = (folder / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        text = edit(data[8 : 8 + length].decode().rstrip()).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def pth(value: Any, **options: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / "consolidated.01.pth", **options)


def added(key: str, value: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "consolidated.01.pth"
        torch.save(torch.load(file) | {key: value}, file)

    return damage


def replaced(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """The last norm of the second part, changed."""

    def damage(folder: Path) -> None:
        norm = torch.load(folder / "consolidated.01.pth")["norm.weight"]
        added("norm.weight", change(norm))(folder)

    return damage


def without(folder: Path) -> None:
    """An index that leaves a part out, which is not there either."""
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index["weight_map"] = {key: part for key, part in index["weight_map"].items() if part != name}
    file.write_text(json.dumps(index))
    (folder / name).unlink()


def twice(folder: Path) -> None:
    """A tensor in two parts, with other values in the one that the index does not mean."""
    parts = sorted(folder.glob("model-*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    data = bytearray(parts[0].read_bytes())
    data[-3] ^= 1
    (folder / "model-copy.safetensors").write_bytes(data)
    index["weight_map"]["extra"] = "model-copy.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


INDEX, PART = "model.safetensors.index.json", "model-00001-of-00007.safetensors"
FIRST_NORM = '"model.layers.0.input_layernorm.weight"'
HF_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "config is missing": (remove("config.json"), "holds neither config.json nor params.json"),
    "config is not JSON": (content("config.json", "{"), "config.json: damaged: not JSON"),
    "config is a list": (content("config.json", "[]"), "config.json: damaged: not a JSON object"),
    "config says a key twice": (content("config.json", '{"a": 1, "a": 2}'), "config.json: holds a twice"),
    "family is unknown": (changed("config.json", model_type="bert"), "model_type: family 'bert' is not known; known"),
    "family is missing": (changed("config.json", model_type=None), "model_type is missing; give --family"),
    "config without width": (changed("config.json", hidden_size=None), "hidden_size is missing"),
    "config makes no model": (changed("config.json", num_key_value_heads=3), "n_kv_heads=3 does not divide"),
    "config of odd types": (changed("config.json", rope_scaling="linear"), "its config makes no sense to llama"),
    "number as words": (changed("config.json", num_hidden_layers="two"), "n_layers"),
    "config against weights": (
        changed("config.json", intermediate_size=40), "gate_proj.weight of shape (48, 32), not (40, 32)"
    ),
    "fewer layers": (changed("config.json", num_hidden_layers=1), "has model.layers.1."),
    "more layers": (changed("config.json", num_hidden_layers=3), "misses model.layers.2."),
    "another family": (changed("config.json", model_type="qwen2"), "misses model.layers.0.self_attn.q_proj.bias"),
    "a part is missing": (remove(PART), f"{PART}: missing, {INDEX} lists it"),
    "a part is not listed": (without, "a: not the weights of this llama model: it misses model.layers.1."),
    "a part is cut off": (cut_off(PART), f"{PART}: damaged or cut off"),
    "a part is empty": (content(PART, b""), f"{PART}: damaged or cut off: no safetensors header"),
    "a part is something else": (content(PART, b"not tensors" * 50), f"{PART}: damaged or cut off"),
    "a tensor in two parts": (twice, "which another part holds too"),
    "index is not JSON": (content(INDEX, "weight_map"), f"{INDEX}: damaged: not JSON"),
    "index without a map": (content(INDEX, "{}"), f"{INDEX}: damaged: it has no weight_map"),
    "index leads outside": (content(INDEX, '{"weight_map": {"x": "../out.safetensors"}}'), "a file outside its folder"),
    "index leads to the root": (content(INDEX, '{"weight_map": {"x": "/etc/passwd"}}'), "a file outside its folder"),
    "index says what is not so": (
        content(INDEX, json.dumps({"weight_map": {"model.norm.weight": PART}})), f"{PART}: has no model.norm.weight"
    ),
    "dtype of 8 bits": (edited_header(lambda text: text.replace('"F32"', '"F8_E4M3"', 1)), "is F8_E4M3; known"),
    "a key twice in a header": (
        edited_header(lambda text: text[:-1] + f", {FIRST_NORM}: {text.split(f'{FIRST_NORM}: ')[1].split('}')[0]}}}}}"),
        "holds model.layers.0.input_layernorm.weight twice",
    ),
    "shapes beyond the file": (
        edited_header(lambda text: text.replace('"shape": [32]', '"shape": [33]', 1)), "do not fit its shape"
    ),
    "places that overlap": (
        edited_header(lambda text: text.replace('"data_offsets": [', '"data_offsets": [-1, 0], "was": [', 1)), "damaged"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), HF_FAULTS.values(), ids=HF_FAULTS)
def test_a_damaged_hugging_face_folder_is_one_clear_line(damage, message, foreign, tmp_path, capsys):
    shutil.copytree(foreign, tmp_path / "a")
    parts = sorted((tmp_path / "a").glob("model-*"))
    assert parts[0].name == PART
    damage(tmp_path / "a")
    line = refused(capsys, "import", tmp_path / "a", tmp_path / "b")
    assert message in line and str(tmp_path / "a") in line
    assert message in refused(capsys, "inspect", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


class Code:
    """What unpickles by writing a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


META_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "the second part is missing": (
        lambda folder: (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth"),
        "consolidated.01.pth: missing",
    ),
    "the last part is missing": (remove("consolidated.01.pth"), "of shape"),
    "no part": (
        lambda folder: [path.unlink() for path in folder.glob("*.pth")] and None, "holds no consolidated.00.pth"
    ),
    "a part is cut off": (cut_off("consolidated.01.pth"), "consolidated.01.pth: damaged or cut off"),
    "a part is empty": (content("consolidated.01.pth", b""), "consolidated.01.pth: damaged or cut off"),
    "the format of old": (
        pth({"a": torch.ones(2)}, _use_new_zipfile_serialization=False),
        "consolidated.01.pth: in the format before torch 1.6, which is not read",
    ),
    "no mapping": (pth([torch.ones(2)]), "holds no mapping of names to tensors"),
    "numbers between tensors": (pth({"a": 1}), "holds no mapping of names to tensors"),
    "whole numbers": (replaced(lambda norm: norm.to(torch.int8)), "norm.weight is int8; known are"),
    "sparse": (replaced(lambda norm: norm.to_sparse()), "norm.weight is float32, sparse; known are"),
    "whole numbers of nobody": (added("a", torch.ones(2, dtype=torch.int8)), "has a, which the family does not know"),
    "a number of nobody": (added("a", 1), "has a, which the family does not know"),
    "a part without a tensor": (pth({"norm.weight": torch.ones(32)}), "misses"),
    "params are not JSON": (content("params.json", "dim"), "params.json: damaged: not JSON"),
    "params without layers": (changed("params.json", n_layers=None), "n_layers is missing"),
    "params against weights": (changed("params.json", n_kv_heads=4), "of shape"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), META_FAULTS.values(), ids=META_FAULTS)
def test_a_damaged_meta_folder_is_one_clear_line(damage, message, meta, tmp_path, capsys):
    shutil.copytree(meta, tmp_path / "a")
    damage(tmp_path / "a")
    line = refused(capsys, "import", tmp_path / "a", tmp_path / "b")
    assert message in line and str(tmp_path / "a") in line
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["consolidated.01.pth", "pytorch_model.bin"])
def test_code_in_a_pickle_is_refused_unrun(name, old, meta, foreign, tmp_path, capsys):
    shutil.copytree(meta if name.endswith("pth") else foreign, tmp_path / "a")
    for path in (tmp_path / "a").glob("model*"):
        path.unlink()
    canary = tmp_path / "canary"
    torch.save({"x": torch.ones(2), "y": Code(canary)}, tmp_path / "a" / name, _use_new_zipfile_serialization=not old)
    said = "in the format before torch 1.6" if old else "refused: it holds more than tensors"
    assert f"{name}: {said}" in refused(capsys, "import", tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    torch.load(tmp_path / "a" / name, weights_only=False)  # the canary can sing
    assert canary.exists()


@pytest.mark.parametrize("places", [([0, 4], [0, 4]), ([0, 4], [2, 6]), ([0, 4], [8, 12]), ([4, 8], [8, 12])])
def test_tensors_that_overlap_or_leave_holes_are_refused(places, tmp_path):
    """As the safetensors package does: nobody writes such a file by mistake."""
    rows = {key: {"dtype": "F32", "shape": [1], "data_offsets": place} for key, place in zip("ab", places, strict=True)}
    header = json.dumps(rows).encode()
    size = max(stop for _, stop in places)
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(DamagedFile, match="x: damaged: [ab] does not begin where the tensor before it ends"):
        SafetensorsFile(tmp_path / "x")


def test_a_closed_file_is_closed_and_an_unused_one_closes_itself(foreign):
    (path, *_) = foreign.glob("*.safetensors")
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    files = [SafetensorsFile(path) for _ in range(20)]
    files[0].close()
    assert len(os.listdir("/proc/self/fd")) == before + 19
    del files
    assert len(os.listdir("/proc/self/fd")) == before


def test_pickles_read_the_same_where_the_system_does_not_say_what_is_mapped(meta, monkeypatch):
    """Where it does, they are read by their place in the file: of a map, what was touched counts as memory."""
    read: list[str] = []
    by_place = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda file, key, *rest: read.append(key) or by_place(file, key, *rest))
    expected = LLM.from_pretrained(meta).state_dict()
    assert set(read) >= expected.keys()
    read.clear()
    monkeypatch.setattr("llm.foreign.stored._maps_of", lambda path: [])
    found = LLM.from_pretrained(meta).state_dict()
    assert not read and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_any_box_of_a_model_folder_is_read_and_in_order_each_block_once(made, monkeypatch):
    monkeypatch.setattr("llm.checkpoint.weights.BLOCK_BYTES", 400)  # of what is asked for at a time
    checkpoint, _ = load_checkpoint(made["native"])
    weights, asked = CheckpointWeights(checkpoint), []  # (first, behind the last) of what the file is asked for
    expected = LLM.from_pretrained(made["native"]).state_dict()
    fill = checkpoint.fill
    monkeypatch.setattr(checkpoint, "fill", lambda rows: asked.extend(row[3:5] for row in rows) or fill(rows))
    name = "layers.0.feed_forward.w1.weight"
    for first in range(0, 48, 5):  # 640 bytes, so that blocks begin in the middle
        last = min(first + 5, 48)
        found = weights.read(name, ((first, last), (0, 32)), torch.empty(last - first, 32))
        assert torch.equal(found, expected[name][first:last])
    assert asked == [(first, min(first + 100, 48 * 32)) for first in range(0, 48 * 32, 100)]
    asked.clear()
    weights.read(name, ((0, 48), (0, 32)), torch.empty(48, 32))
    assert asked == [(0, 48 * 32)]
    for box in (((7, 40), (3, 30)), ((5, 6), (0, 7)), ((0, 48), (31, 32)), ((9, 9), (0, 32))):
        (a, b), (c, d) = box
        assert torch.equal(weights.read(name, box, torch.empty(b - a, d - c)), expected[name][a:b, c:d])
    turned = torch.empty(32, 48).t()
    assert torch.equal(weights.read(name, ((0, 48), (0, 32)), turned), expected[name])
