"""What the labels of the training rows decide of a model: what its outputs stand for, and how values are scaled."""

from collections.abc import Sequence
from typing import TypeVar

from llm.args import ModelArgs
from llm.args.model import same_head
from llm.data.labelled_rows import LabelledRows
from llm.data.learned import Scaling, check_classes, class_names, classes_in, scaling

Args = TypeVar("Args", bound=ModelArgs)


def settled_labels(
    args: Args, train: Sequence[LabelledRows], valid: Sequence[LabelledRows], began_from: ModelArgs | None
) -> Args:
    """The model with names and scales of its outputs; the rows have the classes' places in it from now on.

    What `args` says stays. Else what the model `began_from` says, if its head is taken; else what the training rows do.
    UserError naming file and row of a class that the model does not know.
    """
    if not train:
        return args
    names = args.prediction_names
    if args.prediction == "classification":
        names = names or _names_there(args, train, began_from) or class_names(train, args.n_prediction)
        rows = [*train, *valid]
        check_classes(rows, names)
        for source in rows:
            source.name_classes(names)
    else:
        names = names or train[0].labels.names
    named = args.model_copy(update={"prediction_names": names})
    scales = _scales(named, train, began_from) if args.prediction == "regression" else {}
    return type(args).model_validate({**args.model_dump(), "prediction_names": names, **scales})


def _names_there(
    args: ModelArgs, train: Sequence[LabelledRows], began_from: ModelArgs | None
) -> tuple[str, ...] | None:
    """The classes of the model that is begun with, where they are all that the training rows have."""
    there = None if began_from is None or not same_head(args, began_from) else began_from.prediction_names
    return there if there is not None and set(classes_in(train)) <= set(there) else None


def _scales(
    args: ModelArgs, train: Sequence[LabelledRows], began_from: ModelArgs | None
) -> dict[str, tuple[float, ...] | None]:
    said = {"prediction_mean": args.prediction_mean, "prediction_std": args.prediction_std}
    if None not in said.values():
        return said
    if began_from is not None and same_head(args, began_from):
        found = {"prediction_mean": began_from.prediction_mean, "prediction_std": began_from.prediction_std}
    else:
        learned: Scaling = scaling(train)
        found = {"prediction_mean": learned.mean, "prediction_std": learned.std}
    return {key: found[key] if value is None else value for key, value in said.items()}
