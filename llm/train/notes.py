"""What a config asks for and its run does not give, or not in full: said when the run begins and by `--dry_run`, not
refused, as the run is a sound one without.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from llm.generation.text import context_length
from llm.layers.prediction import PREDICTION
from llm.train.config import RunConfig, Section
from llm.train.config.length import cut_short
from llm.train.config.outputs import is_of_validation
from llm.train.schedule import steps_between
from llm.train.settle import objectives_in, task_in


def config_notes(config: RunConfig, prompts: Sequence[Sequence[int]] = (), step: int = 0, rows: int = 0) -> list[str]:
    """Lines about a config whose run stands at `step`, after `rows` rows; `prompts` are those of the samples, in
    tokens.
    """
    found = [*_without_effect(config), *_unread(config), *_shortened_samples(config, prompts)]
    steps, optim = config.train.steps, config.optim
    if steps is not None:  # of train.epochs only the data says how many they are
        found += [*_never_reached(config, steps, step, rows)]
        cut = cut_short(optim.schedule, optim.warmup_steps, steps)
        found += [] if cut is None else [cut]
    return found


def _without_effect(config: RunConfig) -> Iterator[str]:
    """Keys that were given and decide nothing, as another one is not."""
    if config.data.valid is None:
        of_tasks = bool(config.eval.tasks) and config.eval.tasks_interval is None
        keys = [*_given(config.eval, "eval", *([] if of_tasks else ["interval"]), "rows", "batches")]
        best = config.checkpoint.keep_best and "keep_best" in config.checkpoint.model_fields_set
        keys += ["checkpoint.keep_best"] if best and is_of_validation(config.eval.best) else []
        if keys:
            yield f"note: without held-out text (data.valid) there is no validation: {_of(keys)} no effect"
    if not config.eval.tasks:
        keys = [*_given(config.eval, "eval", "tasks_interval", "tasks_limit", "apply_chat_template")]
        if keys:
            yield f"note: without eval.tasks the model is evaluated on none: {_of(keys)} no effect"
    if config.eval.sample_interval is None:
        keys = [*_given(config.eval, "eval", "prompts", "sample_tokens", "temperature")]
        if keys:
            yield f"note: without eval.sample_interval there are no samples: {_of(keys)} no effect"
    elif not task_in(config).continues:
        keys = ["eval.sample_interval", *_given(config.eval, "eval", "prompts", "sample_tokens", "temperature")]
        names = ",".join(config.task_names)
        yield f"note: task={names} continues no text, so there are no samples: {_of(keys)} no effect"


def _unread(config: RunConfig) -> Iterator[str]:
    """Matrices behind the final hidden states that train, and that no objective reads."""
    model, final = config.model, objectives_in(config).final
    output = not model.tie_embeddings and model.lora is None and not any(objective.head_calls for objective in final)
    head = model.n_prediction > 0 and not any(objective.predicts for objective in final)
    for module, unread in (("output", output), (PREDICTION, head)):
        frozen = any(fnmatchcase(f"{module}.weight", pattern) for pattern in config.train.freeze)
        if unread and config.optim.weight_decay and not frozen:
            yield (
                f"note: nothing that the run trains for reads {module}.weight, and optim.weight_decay shrinks it; "
                f'train.freeze: ["{module}.*"] leaves it as it is'
            )


def _given(section: Section, name: str, *keys: str) -> Iterator[str]:
    """Those that were set to something else than their default, by which a resolved config has them too."""
    for key in keys:
        if getattr(section, key) != type(section).model_fields[key].default:
            yield f"{name}.{key}"


def _of(keys: Sequence[str]) -> str:
    return f"{' and '.join(keys)} {'has' if len(keys) == 1 else 'have'}"


def _never_reached(config: RunConfig, steps: int, step: int, rows: int) -> Iterator[str]:
    train = config.train
    beyond = [number for number in train.skip_steps if number > steps]
    if beyond:
        yield f"note: train.skip_steps={beyond}: the last step is {steps}, so none of these is passed over"
    for key, schedule in (("batch_schedule", train.batch_schedule), ("seq_len_schedule", train.seq_len_schedule)):
        for i, (begin, _) in enumerate(schedule):
            if begin > rows and steps_between(train, rows, begin) >= steps - step > 0:
                yield f"note: train.{key}.{i} begins at row {begin:,}, which the run's {steps:,} steps do not reach"
                break  # those behind it begin later


def _shortened_samples(config: RunConfig, prompts: Sequence[Sequence[int]]) -> Iterator[str]:
    wanted, context = config.eval.sample_tokens, context_length(config.model)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]), default=None)
    if longest is None or config.eval.sample_interval is None:
        return
    room = context - len(prompts[longest])
    if room < wanted:
        yield (
            f"note: the context of {context:,} tokens (model.max_seq_len) ends a sample of eval.prompts.{longest} "
            f"({len(prompts[longest]):,} of them) after {room:,}, not eval.sample_tokens={wanted:,}"
        )
