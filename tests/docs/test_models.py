"""docs/models.md: its table is what the configs say, and every layout in it is one that a dry run accepts."""

from pathlib import Path

import pytest

from llm.jobs.pretrain import Pretrain
from tests.docs.models_table import GPUS, lines, rows
from tests.docs.pages import text_of
from tests.foreign.released import RELEASED

DEVICE = 80e9


def test_the_table_is_that_of_the_configs() -> None:
    assert "\n".join(lines()) in text_of("docs/models.md"), "python -m tests.docs.models_table prints it anew"


def test_every_released_model_has_a_layout_in_which_a_rank_has_room() -> None:
    """For what it keeps, the inputs of all layers, and a twentieth more for one layer's work and its gathered weights.
    """
    found = list(rows())
    assert [row.name for row in found] == sorted(RELEASED)
    for row in found:
        kept, train, args = row.kept, row.config.train, row.config.model
        assert train.activation_checkpointing == "full" and train.precision == "bf16"
        host = kept.masters + kept.optimizer if row.config.parallel.offload_optimizer else 0
        inputs = 2 * args.dim * args.n_layers * train.micro_batch_size * train.seq_len // row.layout.tensor
        assert kept.total - host + inputs < 0.95 * DEVICE, row.name


@pytest.mark.parametrize(("name", "nodes"), [("llama3_1_405b", 16), ("llama4_maverick", 16), ("mixtral_8x7b", 1)])
def test_a_dry_run_prints_what_the_table_says(name: str, nodes: int) -> None:
    config = Path("configs/pretrain") / f"{name}.yaml"
    words = ["--config", str(config), "--nproc", str(GPUS * nodes), "--dry_run=config"]
    printed = Pretrain.parse(words).report()
    (row,) = (row for row in rows() if row.name == name)
    assert f"parameters: {row.work.n_parameters:,};" in printed and f"{row.kept.total:,}" in printed
    assert ("in host memory  " in printed) == row.config.parallel.offload_optimizer
