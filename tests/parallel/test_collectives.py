"""What ranks ask each other stays in step, whatever one of them has asked itself before."""

import torch
import torch.distributed as dist

from llm.parallel.collectives import main_decides
from llm.parallel.launch.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)


def test_what_a_rank_decides_alone_is_none_of_the_questions_of_all() -> None:
    """Rank 0 checks a run before the ranks meet; the others would then wait for the answer to another question."""
    store = dist.HashStore()
    together = World(0, 2, 0, CPU, store=store)
    assert [main_decides(lambda: 1, together), main_decides(lambda: 2, ALONE), main_decides(lambda: 3, together)] == [
        1, 2, 3
    ]  # fmt: skip
    first, *rest = (number for number in range(10_000) if store.check([f"main_decides/{number}"]))
    assert rest == [first + 1]
