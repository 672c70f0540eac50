"""Tasks as YAML over local files: what is asked of a model for each row, and what its answers are worth."""

from llm.evaluate.tasks.base import Document, EvalTask, Measures
from llm.evaluate.tasks.config import TaskOptions
from llm.evaluate.tasks.opening import KINDS, Group, open_task, open_tasks

__all__ = ["KINDS", "Document", "EvalTask", "Group", "Measures", "TaskOptions", "open_task", "open_tasks"]
