"""A model that was read back gives the logits that it gave when it was saved, or is refused."""

from pathlib import Path

import pytest
import torch

from llm.errors import DamagedFile, UserError
from llm.evaluate.fingerprint import EXACT, FILE, Fingerprint, compared, fingerprint, fixed_ids, kept_with
from llm.evaluate.loading import open_replica
from llm.layers.attention import Attention
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.parallel.replica import Replica
from tests.distributed.evaluations import tiny, write_checkpoint

GRID = make_grid(World(0, 1, 0, torch.device("cpu")))


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A checkpoint with the fingerprint of its model."""
    write_checkpoint(tmp_path / "run", 3)
    folder = tmp_path / "run" / "checkpoints" / "step_00000003"
    found = fingerprint(opened(folder))
    assert found is not None
    (folder / FILE).write_bytes(found.to_bytes())
    return folder


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Replica:
    return open_replica(folder, GRID, dtype)


def test_the_same_weights_are_as_saved_and_the_file_says_so_again(step):
    assert compared(step, opened(step)) == "as saved, to 0.0e+00 of how logits vary"
    found = kept_with(step.parents[1])
    assert found is not None and found == fingerprint(opened(step))


def test_the_same_weights_in_bf16_are_as_saved(step):
    assert compared(step, opened(step, torch.bfloat16)).startswith("as saved")


def test_rows_of_keys_laid_out_the_other_way_are_refused(step):
    """Which no digest of the values can see."""
    replica = opened(step)
    turned = [module for module in replica.model.modules() if isinstance(module, Attention)]
    for module in turned:
        module.interleaved = not module.interleaved
    assert turned
    with pytest.raises(UserError, match="gives other logits than when it was saved"):
        compared(step, replica)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_model_is_refused(step, dtype):
    with torch.no_grad():
        replica = opened(step, dtype)
        for (_, parameter), (_, other) in zip(
            replica.model.named_parameters(), tiny(seed=8).named_parameters(), strict=True
        ):
            parameter.copy_(other)
    with pytest.raises(UserError, match="gives other logits than when it was saved"):
        compared(step, replica)


def test_a_checkpoint_of_before_has_none_and_is_unchecked(step):
    (step / FILE).unlink()
    assert compared(step, opened(step)) == "unchecked: none was kept with the model"


@pytest.mark.parametrize("content", [b"", b"{}", b'{"dtype": "float32", "logits": ["x"]}', b'{"dtype": "float32"}'])
def test_a_damaged_file_is_named(step, content):
    (step / FILE).write_bytes(content)
    with pytest.raises(DamagedFile, match=f"{FILE}: damaged"):
        kept_with(step)


def test_logits_that_are_not_finite_are_no_fingerprint(step):
    replica = opened(step)
    with torch.no_grad():
        replica.model.norm.weight.fill_(torch.inf)
    assert fingerprint(replica) is None


def test_differences_are_parts_of_how_logits_vary():
    """Of logits 1000 apart from zero as of those about it."""
    for offset in (0.0, 1000.0):
        ours = Fingerprint("float32", tuple(offset + i % 2 for i in range(64)))
        theirs = Fingerprint("float32", tuple(offset + i % 2 + EXACT / 2 for i in range(64)))
        assert ours.difference(theirs) == pytest.approx(EXACT, rel=1e-9)


def test_ids_stand_for_no_part_of_an_image():
    args = tiny(0).args
    free = fixed_ids(args)
    assert len(free) == 32 and max(free) < args.vocab_size
