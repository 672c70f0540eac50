"""Hyformer's public names over `LLM`: one model that reads a row causally (task "lm") or both ways ("mlm",
"prediction"), as each call says.

`model.llm` is the model; all that this module does is to rename arguments and to re-shape results. docs/siblings/
hyformer.md goes through the calls one by one.

Shapes: B rows, T tokens of a row, D model width, V vocabulary, n outputs of a prediction head.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.layers.pooling import pooled
from llm.layers.prediction import PredictionHead as Head
from llm.layers.prediction import in_units_of_labels
from llm.model import LLM
from llm.siblings.folder import load_tensors, open_folder, save_folder, save_tensors
from llm.siblings.hub import located
from llm.siblings.hyformer_config import HyformerConfig, Pool, Prediction
from llm.siblings.kv_caches import KVCache, listed, shared
from llm.siblings.loading import LoadReport, compared, fill, refuse_pickle, shapes_of, unfilled, usable
from llm.siblings.losses import check_tokens, compute_lm_loss, compute_mlm_loss, compute_prediction_loss
from llm.siblings.padding import check_rows, positions_of, valid_of, without_padding
from llm.tokenizer import Tokenizer

__all__ = [
    "Hyformer", "HyformerCheckpoint", "HyformerConfig", "KVCache", "LoadReport", "ModelInput", "ModelOutput",
    "PredictionHead", "compute_lm_loss", "compute_mlm_loss", "compute_prediction_loss",
]  # fmt: skip

TASKS = ("lm", "mlm", "prediction")


@dataclass
class ModelOutput:
    """What a call gives."""

    logits: Tensor | None
    """(B, T, V) float32; of predictions (B, n), in the units of labels; None for predictions without a head."""
    loss: Tensor | None = None
    """float32 scalar, with labels."""
    extras: dict[str, Any] | None = None
    """hidden_states: (B, T, D), after the last norm. kv_caches: a KVCache for each block, or None."""


@dataclass
class ModelInput:
    """Arguments of a call, which `model(**inputs)` unpacks; what is None is left to the call."""

    input_ids: Tensor
    task: str
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    """Of tokens."""
    targets: Tensor | None = None
    """Of rows: what "prediction" is for, where a batch has both; else labels may be these."""

    def keys(self) -> Iterator[str]:
        """Names of the arguments that are there."""
        return (entry.name for entry in fields(self) if getattr(self, entry.name) is not None)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


class Hyformer(nn.Module):
    """Hyformer over an LLM. ValueError in one line where there is no such model."""

    load_report: LoadReport | None = None
    """What `from_pretrained` found; None where nothing was loaded."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_heads: int,
        n_layers: int,
        max_seq_len: int,
        num_prediction_tasks: int | None = None,
        *,
        attn_dropout: float = 0.0,
        resid_dropout: float = 0.0,
        eps: float = 1e-6,
        prediction: Prediction | None = None,
        pool: Pool = "mean",
        model_args: dict[str, Any] | None = None,
    ) -> None:
        """See HyformerConfig. Initial values are drawn by a seed that torch's generator gives (torch.manual_seed)."""
        super().__init__()
        self.config = HyformerConfig(
            vocab_size,
            d_model,
            n_heads,
            n_layers,
            max_seq_len,
            attn_dropout,
            resid_dropout,
            eps,
            num_prediction_tasks=num_prediction_tasks,
            prediction=prediction,
            pool=pool,
            model_args=dict(model_args or {}),
        )
        self.llm = LLM(self.config.args(), seed=int(torch.randint(1 << 31, (), device="cpu")))

    @classmethod
    def from_config(cls, config: HyformerConfig) -> "Hyformer":
        """A model with initial values."""
        return cls(**asdict(config))

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device | None = None,
        config: HyformerConfig | None = None,
        strict: bool = True,
    ) -> "Hyformer":
        """The model in a folder that `save_pretrained` wrote, in a repository of the hub (owner/name) or its local
        copy, or in whatever else LLM.from_pretrained reads, in evaluation mode and in the dtype of its files.

        config: what the model is, instead of what the folder says. strict=False: the model's `load_report` says which
        parameters the files miss, which keep their initial values, and which they have beyond; a line says so, too.
        UserError in one line where it is not there, is damaged, does not fit, or device cannot be used.
        """
        place = usable(device)
        path = located(name)
        said, tensors = open_folder(path, HyformerConfig)
        chosen = said if config is None else config
        report = compared(shapes_of(chosen.args()), tensors, path, strict)
        model = unfilled(lambda: cls.from_config(chosen), drawn=bool(report.missing_keys)).to(tensors.dtype)
        fill(model, tensors)
        model.load_report = report
        model.llm.origin = path
        return model.to(place).eval()

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers."""
        return self.llm.layers

    def get_num_params(self, trainable_only: bool = False) -> int:
        """Numbers in the model, those that heads and token table share counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, *, tokenizer: Tokenizer | None = None
    ) -> None:
        """Write config.json and model.safetensors, and a manifest that makes the folder one of ours; over an earlier
        model of this kind, too. tokenizer: the one to keep beside it; by default the one that was read with it.

        ValueError for safe_serialization=False, UserError where the folder holds something else.
        """
        refuse_pickle(safe_serialization)
        kept = self.llm.tokenizer if tokenizer is None else tokenizer
        save_folder(Path(save_directory), self.llm, self.config, kept)

    def forward(
        self,
        input_ids: Tensor,
        task: str,
        attention_mask: Tensor | None = None,
        kv_caches: list[KVCache | None] | list[KVCache] | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        *,
        targets: Tensor | None = None,
    ) -> ModelOutput:
        """input_ids: (B, T) int64. task: "lm" reads causally, "mlm" and "prediction" both ways (with
        model.prediction_causal a head predicts causally). attention_mask: (B, T), 1 = token, 0 = padding: no token sees
        it, none of its labels counts. kv_caches: of the call before, or None for each block; with use_cache the
        tokens continue its rows, and there are no gradients.

        labels: for lm the tokens themselves (B, T), shifted here; for mlm the original tokens at masked positions,
        negative elsewhere; for prediction see `compute_prediction_loss`. targets: the latter, where labels are of
        tokens. ValueError in one line where arguments do not fit together.
        """
        cache = self._checked(input_ids, task, kv_caches, use_cache, labels)
        valid = valid_of(attention_mask, input_ids, 0 if cache is None else cache.length)
        n_rows, row_length = input_ids.shape
        first = torch.zeros(n_rows, dtype=torch.int64).numpy() if cache is None else cache.first_positions(n_rows)
        if int(first.max()) + row_length > self.config.max_seq_len:
            raise ValueError(
                f"rows of {int(first.max()) + row_length} tokens are longer than max_seq_len={self.config.max_seq_len}"
            )
        positions = None if valid is None else positions_of(valid, first)
        causal = task == "lm" or task == "prediction" and self.llm.args.prediction_causal
        inputs = TransformerInput(input_ids, positions, causal=causal)
        if task == "prediction":
            check_rows(valid)
        out = self.llm(inputs, cache=cache, return_hidden=True)
        hidden = out.hidden
        assert hidden is not None
        extras = {"hidden_states": hidden, "kv_caches": None if cache is None else listed(cache, len(self.blocks))}
        if task == "prediction":
            logits, loss = self._predicted(hidden, inputs, labels if targets is None else targets)
        else:
            logits, loss = self.llm.logits(hidden), None
            if labels is not None:
                check_tokens(logits, labels)
                counted = without_padding(labels, valid, shifted=task == "lm")
                loss = compute_lm_loss(logits, counted) if task == "lm" else compute_mlm_loss(logits, counted)
        if loss is not None and out.router is not None:
            n_tokens = input_ids.numel() if valid is None else int(valid.sum())
            loss = loss + (out.router.balance_sum + out.router.z_sum) / n_tokens
        return ModelOutput(logits, loss, extras)

    def _checked(
        self, input_ids: Tensor, task: str, kv_caches: Any, use_cache: bool, labels: Tensor | None
    ) -> Cache | None:
        """The cache to continue; ValueError where the arguments contradict each other."""
        if task not in TASKS:
            raise ValueError(f"task={task!r} is not known; use {', '.join(TASKS)}")
        TransformerInput(input_ids).check_tokens()
        held = kv_caches is not None and any(cache is not None for cache in kv_caches)
        if task != "lm" and (use_cache or held):
            raise ValueError(f"task={task!r} reads rows both ways, so it has no cache; leave out kv_caches, use_cache")
        if held and not use_cache:
            raise ValueError("kv_caches are given, but use_cache is False; give use_cache=True to continue them")
        if use_cache and labels is not None:
            raise ValueError("labels with use_cache: a cache leaves no gradients; give labels without use_cache")
        return shared(kv_caches, self.llm.args) if use_cache else None

    def _predicted(
        self, hidden: Tensor, inputs: TransformerInput, labels: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predictions (B, n) and their loss, each where there is one."""
        kind, n = self.config.prediction, self.config.num_prediction_tasks
        if n is None:
            if labels is not None:
                raise ValueError(
                    "labels for task='prediction', but the model has no prediction head; give num_prediction_tasks, or "
                    "wrap it by PredictionHead"
                )
            return None, None
        logits = self.llm.predictions(hidden, inputs)
        if self.llm.args.prediction == "regression":
            logits = in_units_of_labels(self.llm.args, logits)
        if labels is None:
            return logits, None
        if kind == "regression" and labels.ndim == 1 and n > 1 or kind == "classification" and labels.ndim != 1:
            shape = "(B,)" if kind == "classification" else f"(B, {n})"
            raise ValueError(f"prediction={kind} has labels {shape}; got {tuple(labels.shape)}")
        return logits, compute_prediction_loss(logits, labels, n, multilabel=kind == "multilabel")


class PredictionHead(nn.Module):
    """A prediction head beside a model, whose own head it does not use. ValueError where they do not fit together."""

    def __init__(
        self,
        base_model: Hyformer,
        num_labels: int,
        d_model: int,
        dropout: float = 0.0,
        *,
        pool: Pool = "mean",
        multilabel: bool = False,
    ) -> None:
        """num_labels: classes, values or labels. dropout: the share of pooled vectors' numbers dropped in training."""
        super().__init__()
        width = base_model.config.d_model
        if d_model != width:
            raise ValueError(f"d_model={d_model}, but base_model has d_model={width}")
        if num_labels < 1 or not 0 <= dropout < 1:
            raise ValueError(f"num_labels={num_labels} must be at least 1, dropout={dropout} from 0 to below 1")
        self.base_model, self.pool, self.multilabel, self.dropout = base_model, pool, multilabel, dropout
        self.head = Head(width, num_labels)
        nn.init.normal_(self.head.weight, std=base_model.llm.args.init_std)
        nn.init.zeros_(self.head.bias)
        self.to(next(base_model.parameters()).device)

    def forward(
        self,
        input_ids: Tensor,
        task: str = "prediction",
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, num_labels), and the loss where there are labels (see `compute_prediction_loss`)."""
        if task != "prediction":
            raise ValueError(f"task={task!r}: a head for predictions; give task='prediction', or call base_model")
        out = self.base_model(input_ids, "prediction", attention_mask)
        valid = valid_of(attention_mask, input_ids)
        n_rows = len(input_ids)
        positions = None if valid is None else positions_of(valid, torch.zeros(n_rows, dtype=torch.int64).numpy())
        vectors = pooled(out.extras["hidden_states"], *TransformerInput(input_ids, positions).resolve(), self.pool)
        logits: Tensor = self.head(F.dropout(vectors, self.dropout, self.training))
        if labels is None:
            return logits, None
        return logits, compute_prediction_loss(logits, labels, multilabel=self.multilabel)


@dataclass
class HyformerCheckpoint:
    """The tensors of a model, apart from it."""

    state_dict: dict[str, Tensor]
    """On the CPU, by the names that `model.load_state_dict` takes."""
    config: HyformerConfig | None = None
    """What the model is, where that is known."""

    @classmethod
    def from_model(cls, model: Hyformer) -> "HyformerCheckpoint":
        """A copy of what the model holds now."""
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        return cls(copied, model.config)

    def save(self, path: str | Path, safe_serialization: bool = True) -> None:
        """Write one safetensors file, whole or not at all, in the place of one that is there. ValueError for
        safe_serialization=False."""
        refuse_pickle(safe_serialization)
        config = {} if self.config is None else {"hyformer": json.dumps(self.config.to_dict())}
        save_tensors(Path(path), self.state_dict, {"format": "pt", **config})

    @classmethod
    def load(cls, path: str | Path) -> "HyformerCheckpoint":
        """Read one. UserError naming the file where it is no such file."""
        tensors, metadata = load_tensors(Path(path))
        said = metadata.get("hyformer")
        return cls(tensors, None if said is None else HyformerConfig.from_text(said, str(path)))
