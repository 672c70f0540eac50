"""The whole run config, and what its sections must have in common."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from llm.args import ModelArgs
from llm.data.kinds import ChatOptions
from llm.data.sources import source_specs
from llm.parallel.layout import PipelineSchedule
from llm.paths import PathText
from llm.tokenizer import TokenizerConfig
from llm.train.config.data import DataConfig
from llm.train.config.deepspeed_options import checked_options
from llm.train.config.explain import keys_of
from llm.train.config.length import misfit, unwatched
from llm.train.config.lora import LoraConfig
from llm.train.config.optim import OptimConfig
from llm.train.config.outputs import CheckpointConfig, EvalConfig, LogConfig, is_of_validation
from llm.train.config.pairs import PairConfig, check_tasks_of_sources, pair_problem
from llm.train.config.prediction import PredictionConfig
from llm.train.config.section import BY_COMMAS, Section
from llm.train.config.synonyms import meant
from llm.train.config.tasks import DpoConfig, MlmConfig, TaskEntry, source_problems
from llm.train.config.train import GuardConfig, TrainConfig
from llm.train.config.values import (
    AutoregressiveConfig,
    RegressionConfig,
    check_tasks_of_values,
    kind_problem,
    reads_and_predicts_values,
)


class ModelSection(ModelArgs):
    init_from: PathText | None = None
    """Begin with the weights of this run, checkpoint, model folder or foreign folder; keys left out here are its own.
    """


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    """Ranks that share every matrix; must divide model.n_heads and the feed-forward widths."""
    pipeline: int = Field(1, ge=1)
    """Ranks that hold the layers one after the other; needs zero_stage=1 and works best with many more micro-batches
    than ranks."""
    pipeline_schedule: PipelineSchedule = "1f1b"
    """1f1b: a stage a rank, one forward and one backward in turn. dualpipev: two stages a rank, half as large, the
    layers going from the first rank to the last and back: ranks wait less, keep more activations, send twice as much.
    """
    expert: int = Field(1, ge=1)
    """Data-parallel ranks that share the experts of a layer; must divide model.moe.n_experts."""
    context: int = Field(1, ge=1)
    """Context-parallel ranks."""
    zero_stage: int = Field(1, ge=0, le=3)
    """DeepSpeed ZeRO stage over the data-parallel ranks; 0 (nothing sharded) for plain data parallel in fp32 only."""
    offload_optimizer: bool = False
    """Keep the optimizer state and make the update in CPU memory; needs zero_stage 1 or more."""
    sequence_parallel: bool = True
    """Cut activations between tensor-parallel regions along the sequence; no effect at tensor=1."""
    timeout_s: float = Field(600.0, gt=0, le=1e9)
    """Seconds after which a collective that a peer never joined ends the job."""

    @model_validator(mode="after")
    def _only_what_runs(self) -> "ParallelConfig":
        if self.context != 1:
            raise ValueError(f"parallel.context={self.context} is not available yet; use parallel.context=1")
        return self


class RunConfig(Section):
    """Everything that a run is made of."""

    model: ModelSection
    """ModelArgs, or the path of a YAML file with them."""
    tokenizer: TokenizerConfig
    """kind: sentencepiece | bytes | characters, and the path of its file; left out where the model reads and predicts
    values."""
    data: DataConfig
    """Training and held-out text."""
    chat: ChatOptions = ChatOptions()
    """How conversations are written and trained on."""
    task: str | list[TaskEntry] = "lm"
    """What the model is trained to do; lm: the next token of texts, conversations and completions; mlm: hidden tokens
    of these, from both sides; prediction: labels of data of kind labelled; seq2seq: targets of data of kind pair, from
    their sources; dpo: to prefer the chosen answers of data of kind preference; regression: labels of data of kind
    values; autoregressive: the next values of these; or a list of {task, weight, source} for several in one run, source
    being the name of one under data.train."""
    extensions: Annotated[tuple[PathText, ...], BY_COMMAS] = ()
    """Python files, separated by commas, that are run first and register objectives, tasks and the like."""
    parallel: ParallelConfig = ParallelConfig()
    """How the ranks share the work."""
    dpo: DpoConfig = DpoConfig()
    """How a run with task: dpo prefers answers."""
    prediction: PredictionConfig = Field(PredictionConfig(), exclude_if=lambda section: section == PredictionConfig())
    """How a run with task: prediction learns labels."""
    mlm: MlmConfig = Field(MlmConfig(), exclude_if=lambda section: section == MlmConfig())
    """What is hidden in a run with task: mlm."""
    regression: RegressionConfig = Field(RegressionConfig(), exclude_if=lambda section: section == RegressionConfig())
    """How a run with task: regression learns labels of values."""
    autoregressive: AutoregressiveConfig = Field(
        AutoregressiveConfig(), exclude_if=lambda section: section == AutoregressiveConfig()
    )
    """How a run with task: autoregressive reads series."""
    pair: PairConfig = Field(PairConfig(), exclude_if=lambda section: section == PairConfig())
    """How a run with task: seq2seq reads pairs."""
    lora: LoraConfig | None = None
    """Train low-rank adapters alone; unset = all weights train."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning-rate schedule."""
    train: TrainConfig = TrainConfig()
    """Steps, batch, precision."""
    guard: GuardConfig = GuardConfig()
    """What happens when the loss is not finite or jumps."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    eval: EvalConfig = EvalConfig()
    """Validation and samples during training."""
    log: LogConfig = LogConfig()
    """What is written where."""
    deepspeed: dict[str, Any] = {}
    """Expert options passed through to DeepSpeed's JSON, but for those that the other sections decide."""

    @model_validator(mode="before")
    @classmethod
    def _values_need_no_tokenizer(cls, given: Any) -> Any:
        if isinstance(given, dict) and "tokenizer" not in given and reads_and_predicts_values(given.get("model")):
            return given | {"tokenizer": {"kind": "none"}}
        return given

    @field_validator("deepspeed")
    @classmethod
    def _known_to_deepspeed(cls, options: dict[str, Any]) -> dict[str, Any]:
        return checked_options(options) if options else {}

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.train.seq_len > self.model.max_seq_len:
            raise ValueError(f"train.seq_len={self.train.seq_len} is above model.max_seq_len={self.model.max_seq_len}")
        self._experts_count_what_no_layout_cuts()
        if self.data.valid is None and is_of_validation(self.eval.best):
            for key in ("best", "patience"):
                value = getattr(self.eval, key)
                if value != EvalConfig.model_fields[key].default:
                    raise ValueError(f"eval.{key}={value} needs held-out text: set data.valid")
        self._keys_are_known()
        self._rows_can_be_cut()
        self._sources_go_with_tasks()
        self._kinds_suit_the_task()
        self._options_go_with_their_task()
        check_tasks_of_values(self.model, self.task_names, self.tokenizer.kind != "none")
        check_tasks_of_sources(self.model, self.task_names, self.data.source_len)
        forward = [name for name in self.task_names if name in ("lm", "dpo", "seq2seq")]
        if forward and not self.model.causal:
            raise ValueError(
                f"model.causal=false: task={forward[0]} is of models whose tokens do not see what comes; leave it out"
                " (rows of mlm and prediction are read both ways by themselves)"
            )
        if "prediction" in self.task_names and not self.model.n_prediction:
            raise ValueError("task=prediction: the model has no head to predict with; set model.n_prediction")
        if self.prediction.label_smoothing and self.model.prediction != "classification":
            raise ValueError(
                f"prediction.label_smoothing={self.prediction.label_smoothing}: is for classes, and "
                f"model.prediction={self.model.prediction}; leave it out"
            )
        optim, steps = self.optim, self.train.steps
        if steps is not None:  # of train.epochs only the data says how many they are
            length = f"train.steps={steps}"
            wrong = misfit(optim.warmup_steps, optim.decay_steps, steps, length)
            wrong = wrong or unwatched(self.log.watched, steps, length)
            if wrong:
                raise ValueError(wrong)
        return self._with_adapters()._with_prediction_mode()._with_held_out_rows()

    def _with_prediction_mode(self) -> "RunConfig":
        """The config whose model knows that its head's samples are read from left to right."""
        if self.prediction.causal and not self.model.prediction_causal:
            model = self.model.model_copy(update={"prediction_causal": True})
            object.__setattr__(self, "model", model)  # frozen for all others
        return self

    def _with_adapters(self) -> "RunConfig":
        """The config whose model has the adapters that the section `lora` asks for."""
        asked = None if self.lora is None else self.lora.args
        said = self.model.lora
        if said is not None and said != asked:
            given = ", ".join(f"model.lora.{key}={getattr(said, key)}" for key in sorted(said.model_fields_set))
            raise ValueError(f"{given or 'model.lora'}: the section lora says this of the model; give it there alone")
        if self.model.lora != asked:
            model = self.model.model_copy(update={"lora": asked})
            object.__setattr__(self, "model", model)  # frozen for all others
        return self

    def _options_go_with_their_task(self) -> None:
        names = ",".join(self.task_names)
        for task in ("dpo", "mlm", "prediction", "regression", "autoregressive", "seq2seq"):
            name = "pair" if task == "seq2seq" else task
            section = getattr(self, name)
            for key, value in section.model_dump().items():
                if task not in self.task_names and value != type(section).model_fields[key].default:
                    given = f"{name}.{key}={value}: is for task={task}, and task={names}"
                    raise ValueError(f"{given}; set that, or leave it out")

    @property
    def source_len(self) -> int | None:
        """Positions of a row for the encoder; None: the model has none."""
        return (self.data.source_len or self.train.seq_len) if self.model.encoder_layers else None

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks that the model is trained to do, each once, in the order of the config."""
        if isinstance(self.task, str):
            return (self.task,)
        return tuple(dict.fromkeys(entry.task for entry in self.task))

    def _task_of(self, source: str) -> str:
        """The task that reads a data source of this name."""
        if isinstance(self.task, str):
            return self.task
        return next(entry.task for entry in self.task if entry.source == source)

    def _sources_go_with_tasks(self) -> None:
        if isinstance(self.task, str):
            return
        given = self.data.train, [] if isinstance(self.data.valid, float | None) else self.data.valid
        train, valid = ([spec.resolved_name() for spec in source_specs(data)] for data in given)
        problem = next(source_problems(self.task, train, valid), None)
        if problem is not None:
            raise ValueError(problem)

    def _kinds_suit_the_task(self) -> None:
        valid = self.data.valid
        for key, data in (("train", self.data.train), ("valid", None if isinstance(valid, float) else valid)):
            for i, spec in enumerate([] if data is None else source_specs(data)):
                given = f"data.{key}.{i}.kind={spec.kind}"
                task = self._task_of(spec.resolved_name())
                problem = kind_problem(task, spec.kind) or pair_problem(task, spec.kind)
                if problem is not None:
                    raise ValueError(f"{given}: {problem}")
                if task in ("lm", "mlm") and spec.kind == "preference":
                    raise ValueError(f"{given}: preferences are compared, not learned by heart; set task=dpo")
                if task == "dpo" and spec.kind in ("text", "chat", "completion"):
                    raise ValueError(f"{given}: task=dpo trains on kind preference (prompt, chosen, rejected)")
                if task in ("lm", "mlm", "dpo") and spec.kind == "labelled":
                    raise ValueError(f"{given}: has labels of whole texts, which task={task} does not learn; set "
                                     f"task=prediction")  # fmt: skip
                if task == "prediction" and spec.kind in ("text", "chat", "completion", "preference", "image_text"):
                    raise ValueError(f"{given}: task=prediction trains on kind labelled (text, label)")

    def _rows_can_be_cut(self) -> None:
        specs = source_specs(self.data.train)
        kinds = [spec.kind for spec in specs if spec.kind != "text" or self.model.encoder_layers]
        if kinds and self.train.seq_len_schedule:
            raise ValueError(
                f"train.seq_len_schedule={self.train.seq_len_schedule}: cuts rows into sequences, and rows of kind "
                f"{kinds[0]} hold what is never cut; leave it out"
            )

    def _with_held_out_rows(self) -> "RunConfig":
        """The config with `eval.rows` where the older `eval.batches` says how many."""
        given, batches = self.eval.model_fields_set, self.eval.batches
        if "batches" not in given:
            return self
        rows = None if batches is None else batches * self.train.global_batch_size
        if "rows" not in given:
            object.__setattr__(self, "eval", self.eval.model_copy(update={"rows": rows}))  # frozen for all others
        elif batches is not None and self.eval.rows != rows:
            held_out = "null" if self.eval.rows is None else self.eval.rows
            raise ValueError(
                f"eval.rows={held_out} and eval.batches={batches} (x train.global_batch_size="
                f"{self.train.global_batch_size} = {rows} rows) both say how much is read; set eval.batches to null"
            )
        return self

    def _experts_count_what_no_layout_cuts(self) -> None:
        moe = self.model.moe
        if moe is not None and moe.capacity_scope == "call":
            raise ValueError(
                "model.moe.capacity_scope=call counts over a whole forward, which micro-batches and ranks cut; a run "
                "needs model.moe.capacity_scope=row"
            )
        if moe is not None and moe.balance == "call":
            raise ValueError(
                "model.moe.balance=call is of the counts of a whole forward, which micro-batches and ranks cut; a run "
                "needs model.moe.balance=lag"
            )

    def _keys_are_known(self) -> None:
        known = keys_of(RunConfig)
        sections = {key[:i] for key in known for i, letter in enumerate(key) if letter == "."}
        for key in self.checkpoint.allow_changes:
            if key not in known and key not in sections and not key.startswith("deepspeed."):
                near = meant(key, known)
                hint = f"did you mean {' or '.join(near)}?" if near else "see --help for all keys"
                raise ValueError(f"checkpoint.allow_changes={key}: no such key; {hint}")
