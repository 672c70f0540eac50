"""A model to evaluate is that of LLM.from_pretrained, and its digest that of what it computes with."""

from pathlib import Path

import pytest
import torch

from llm import LLM
from llm.errors import UserError
from llm.evaluate.loading import BLOCK, _mixed, files_digest, model_digest, open_replica
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.tokenizer import ByteTokenizer
from tests.foreign.folders import make_all, save

GRID = make_grid(World(0, 1, 0, torch.device("cpu")))


def digest_of(path: Path, dtype: torch.dtype = torch.float32) -> str:
    return model_digest(open_replica(path, GRID, dtype))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model, and its exports: Meta's has the rows of queries and keys in another order."""
    return make_all(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["native", "foreign"])
def test_the_parameters_are_those_of_from_pretrained(folders, name, dtype):
    found, expected = open_replica(folders[name], GRID, dtype).model, LLM.from_pretrained(folders[name], dtype)
    values = dict(expected.named_parameters())
    assert set(dict(found.named_parameters())) == set(values)
    for key, parameter in found.named_parameters():
        assert parameter.dtype == dtype and torch.equal(parameter, values[key]) and not parameter.requires_grad


def test_a_model_and_its_exports_have_one_digest_and_files_of_their_own(folders):
    assert len({digest_of(path) for path in folders.values()}) == 1
    assert len({files_digest(path, average=False) for path in folders.values()}) == 3


def test_any_other_bit_is_another_digest(tmp_path):
    model = save(tmp_path / "a")
    with torch.no_grad():
        weight = model.layers[1].attention.wo.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(1.0))
    model.save_pretrained(tmp_path / "b", tokenizer=ByteTokenizer())
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]
    model.save_pretrained(tmp_path / "c", tokenizer=ByteTokenizer())
    assert len({digest_of(tmp_path / name) for name in "abc"}) == 3


def test_equal_weights_that_mean_something_else_are_another_digest(tmp_path):
    model = save(tmp_path / "a")
    other = LLM(model.args.model_copy(update={"rope_theta": 2e4}))
    other.load_state_dict(model.state_dict())
    other.save_pretrained(tmp_path / "b", tokenizer=ByteTokenizer())
    assert digest_of(tmp_path / "a") != digest_of(tmp_path / "b")


def test_rounded_weights_are_another_digest(folders):
    assert digest_of(folders["native"], torch.bfloat16) != digest_of(folders["native"])


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 4, 5), (2 * BLOCK + 3,), (3, BLOCK - 1)])
def test_sums_of_boxes_are_the_sum_of_the_whole(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = tuple((0, n) for n in shape)
    expected = _mixed(values, whole, shape)
    for dim, n in enumerate(shape):
        parts = []
        for start, stop in ((0, n // 3), (n // 3, n)):
            box = (*whole[:dim], (start, stop), *whole[dim + 1 :])
            parts.append(_mixed(values.narrow(dim, start, stop - start), box, shape))
        assert sum(parts) % 2**64 == expected


def test_averages_are_refused_where_there_are_none(folders):
    with pytest.raises(UserError, match="holds no averaged weights"):
        open_replica(folders["foreign"], GRID, torch.float32, average=True)


def test_a_damaged_file_is_named(folders, tmp_path):
    save(tmp_path / "a")
    file = next((tmp_path / "a").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=file.name):
        open_replica(tmp_path / "a", GRID, torch.float32)
