"""Rebuild one step of a run, down to its documents: which text made the loss jump?

The step's weights come from the nearest checkpoint before it, or from the initial weights, and the steps between are
computed again; rows have one global order, so nothing else is needed. Before the step's own update every document of
its batch is scored on its own. In the run folder only `replay/` is written.
"""

from llm.train.replay.rebuild import replay
from llm.train.replay.records import check_replay

__all__ = ["check_replay", "replay"]
