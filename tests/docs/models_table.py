"""The table of docs/models.md, made from configs/model and configs/pretrain: `python -m tests.docs.models_table`."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from llm import LLM  # noqa: F401  (knows the kinds of layers)
from llm.args import ModelArgs
from llm.layers.parameter import VISION
from llm.parallel.layout import Layout
from llm.parameters import ParameterTable
from llm.plan import memory
from llm.plan.workload import Workload
from llm.train.config import RunConfig, check_layout, load_config
from llm.train.dry_run import workload
from tests.shared import ROOT

GPUS = 8
"""Of a node."""
HEAD = "| config | parameters | active | nodes | layout | a rank keeps, GB | of these in host memory |"


class Row(NamedTuple):
    """A model with its run config."""

    name: str
    config: RunConfig
    layout: Layout
    work: Workload

    @property
    def kept(self) -> memory.Memory:
        """Of the rank that keeps most."""
        return max((kept for kept, _ in memory.predict(self.work)), key=lambda kept: kept.total)


def rows() -> Iterator[Row]:
    """Of every run config that is named after its model and says on how many nodes it is to run."""
    for path in sorted((ROOT / "configs/pretrain").glob("*.yaml")):
        said = re.search(r"on (?:one node|(\d+) nodes) of 8 GPUs", path.read_text())
        if said is not None:
            config = load_config(path)
            layout = check_layout(config, GPUS * int(said[1] or 1))
            yield Row(path.stem, config, layout, workload(config, layout))


def active(args: ModelArgs) -> int:
    """Parameters of the text model, experts that a token does not visit left out."""
    rows = ParameterTable.of(args)
    return sum(row.numel if name.startswith("tok_embeddings.") else row.active_numel for name, row in rows.items()
               if row.unit != VISION)  # fmt: skip


def lines() -> Iterator[str]:
    yield HEAD
    yield re.sub(r"[^|]+", "---", HEAD)
    for row in rows():
        parallel, kept = row.config.parallel, row.kept
        cut = [f"{key} {size}" for key in ("tensor", "expert") if (size := getattr(parallel, key)) > 1]
        cut += [f"ZeRO {parallel.zero_stage}", *["offload"] * parallel.offload_optimizer]
        host = f"{memory.in_host_memory(row.work, kept) / 1e9:.1f}" if parallel.offload_optimizer else ""
        numbers = f"{row.work.n_parameters:,} | {active(row.config.model) / 1e9:.1f}B | {row.layout.world // GPUS}"
        yield f"| `{row.name}` | {numbers} | {', '.join(cut)} | {kept.total / 1e9:.1f} | {host} |"


if __name__ == "__main__":
    print("\n".join(lines()))
