"""What a model is trained to do, a file each: which rows it reads, what it is trained for, what a validation says of it
and how a sample of it looks.
"""

from llm.tasks.base import REFERENCE, OpenedRows, RowsWanted, Task, register, task_named
from llm.tasks.dpo import Preferences
from llm.tasks.lm import LanguageModelling
from llm.tasks.mlm import MaskedLanguageModelling
from llm.tasks.prediction import PredictionTask
from llm.tasks.seq2seq import SequenceToSequence
from llm.tasks.values import AutoregressiveTask, RegressionTask

register(LanguageModelling())
register(MaskedLanguageModelling())
register(Preferences())
register(PredictionTask())
register(RegressionTask())
register(AutoregressiveTask())
register(SequenceToSequence())

__all__ = ["REFERENCE", "OpenedRows", "RowsWanted", "Task", "register", "task_named"]
