"""Which parameters of a run train: all, or with `lora` its adapters alone, but those that `train.freeze` names."""

from difflib import get_close_matches
from fnmatch import fnmatchcase

from llm.args import LoraArgs, ModelArgs
from llm.args.lora import target_of
from llm.checkpoint.frozen import Origin, Taken
from llm.errors import UserError
from llm.layers.lora import adapters_in
from llm.parameters import ParameterTable
from llm.train.config import RunConfig

NEAREST = 3
"""Names that a line proposes."""
ELSEWHERE = {
    "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "up_proj": "w3",
    "down_proj": "w2", "embed_tokens": "tok_embeddings", "lm_head": "output",
}  # fmt: skip
"""What transformers and PEFT call a weight -> its name here."""


def parameter_table(config: RunConfig) -> ParameterTable:
    """The rows of the run's model, which needs a vocabulary. UserError where one of `lora.targets` or a pattern of
    `train.freeze` names nothing, or nothing is left to train.
    """
    patterns = config.train.freeze
    table = ParameterTable.of(config.model)
    if config.model.lora is not None:
        check_targets(config.model, config.model.lora)
        table = table.adapters_alone(config.model.lora.base == "int8")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in table):
            near = get_close_matches(pattern, table, n=NEAREST, cutoff=0.0)
            raise UserError(f"train.freeze: no parameter is named {pattern!r}; the nearest are {', '.join(near)}")
    if not patterns:
        return table
    frozen = table.frozen(patterns)
    if not any(row.trainable for row in frozen.values()):
        raise UserError(f"train.freeze={list(patterns)} names every parameter, so nothing is left to train")
    return frozen


def check_targets(args: ModelArgs, lora: LoraArgs) -> None:
    """UserError naming a target that is the name of no weight that could have an adapter."""
    named = dict.fromkeys(target_of(name) for name in ParameterTable.of(args.merged) if "." in name)
    everything = args.model_copy(update={"lora": lora.model_copy(update={"targets": tuple(named)})})
    possible = dict.fromkeys(target_of(name) for name in adapters_in(ParameterTable.of(everything)))
    for target in lora.targets or ():
        if target not in possible:
            ours = f", which is {ELSEWHERE[target]} here" if target in ELSEWHERE else ""
            raise UserError(
                f"lora.targets: no weight of this model is named {target!r}{ours}; it has {', '.join(possible)}"
            )
    if lora.token_rows is not None and lora.token_rows[1] > args.vocab_size:
        raise UserError(f"lora.token_rows={list(lora.token_rows)}: the vocabulary has {args.vocab_size:,} tokens")
    if not adapters_in(ParameterTable.of(args)):
        raise UserError(f"lora.targets: this model has none of the usual ones; it has {', '.join(possible) or 'none'}")


def frozen_notes(table: ParameterTable, origin: Origin | None) -> list[str]:
    """A line about what a run does not train, if there is anything, and where that came from."""
    total = sum(row.numel for row in table.values())
    frozen = sum(row.numel for row in table.values() if not row.trainable)
    if not frozen:
        return []
    place = f"read from {origin.path}" if isinstance(origin, Taken) else "as drawn"
    if any(row.kind == "adapter" for row in table.values()):
        head = any(row.beside_adapters and row.trainable for row in table.values())
        where = "adapters and the prediction head" if head else "adapters"
        return [f"lora: {total - frozen:,} of {total:,} parameters train, in {where}; the rest is {place}"]
    return [f"train.freeze leaves out {frozen:,} of {total:,} parameters, {place}"]
