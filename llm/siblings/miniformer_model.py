"""Miniformer's `Transformer` over `LLM`: one stack of layers that gives plain tensors.

Shapes: B rows, T tokens of a row, D model width, V vocabulary, n labels of a row.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.generate import generate
from llm.layers.prediction import in_units_of_labels
from llm.model import LLM
from llm.siblings.folder import open_folder, save_folder
from llm.siblings.hub import located
from llm.siblings.loading import LoadReport, compared, fill, refuse_pickle, shapes_of, unfilled, usable
from llm.siblings.miniformer_config import TransformerConfig
from llm.siblings.miniformer_layers import EncoderLayer, FeedForward, MultiHeadAttention
from llm.siblings.padding import check_rows, positions_of, valid_of
from llm.siblings.parts import Parts, installed
from llm.tokenizer import Tokenizer

BASES = {"attention": MultiHeadAttention, "feed_forward": FeedForward, "encoder_layer": EncoderLayer}
"""What classes of one's own derive from, by the places that they take."""


class Transformer(nn.Module):
    """A stack of layers over tokens. ValueError in one line where there is no such model."""

    load_report: LoadReport | None = None
    """What `from_pretrained` found; None where nothing was loaded."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: type[MultiHeadAttention] | None = None,
        feed_forward: type[FeedForward] | None = None,
        encoder_layer: type[EncoderLayer] | None = None,
    ) -> None:
        """attention, feed_forward, encoder_layer: classes of your own in the places of the model's. Initial values are
        drawn by a seed that torch's generator gives (torch.manual_seed)."""
        super().__init__()
        self.config = config
        self.parts = Parts(attention, feed_forward, encoder_layer)
        self.parts.check(BASES)
        self.llm = LLM(config.args(), seed=int(torch.randint(1 << 31, (), device="cpu")))
        installed(self.llm, self.parts)

    @property
    def layers(self) -> nn.ModuleList:
        """The layers."""
        return self.llm.layers

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        *,
        causal: bool | None = None,
        cache: Cache | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) of tokens (B, T) int64; with a head for rows (B, n), values in the units of labels; with
        head="none", or return_hidden, the states (B, T, D) after the last norm. All float32 but states.

        attention_mask: (B, T), 1 = token, 0 = padding, which no token sees. causal: whether a token sees none behind
        it; None = as the config says. cache: of `new_cache`; the tokens continue its rows, without gradients.
        ValueError in one line where arguments do not fit together.
        """
        valid = valid_of(attention_mask, inputs, 0 if cache is None else cache.length)
        n_rows, row_length = inputs.shape[:2]
        first = torch.zeros(n_rows, dtype=torch.int64).numpy() if cache is None else cache.first_positions(n_rows)
        if (longest := int(first.max(initial=0)) + row_length) > self.config.max_seq_len:
            raise ValueError(f"rows of {longest} tokens are longer than max_seq_len={self.config.max_seq_len}")
        positions = None if valid is None else positions_of(valid, first)
        reads = self.config.is_causal if causal is None else causal
        given = TransformerInput(inputs, positions, causal=reads)
        if self.config.head == "none" or return_hidden:
            return self._hidden(given, cache)
        if not self.config.of_rows:
            logits = self.llm(given, cache=cache).logits
            assert logits is not None
            return logits
        if cache is not None:
            raise ValueError(f"head={self.config.head} predicts labels of whole rows, which no cache continues")
        check_rows(valid)
        found = self.llm.predictions(self._hidden(given, None), given)
        return in_units_of_labels(self.llm.args, found) if self.config.head == "regression" else found

    def _hidden(self, given: TransformerInput, cache: Cache | None) -> Tensor:
        hidden = self.llm(given, cache=cache, return_hidden=True).hidden
        assert hidden is not None
        return hidden

    def new_cache(self) -> Cache:
        """Memory for rows that are continued call by call: keys and values of all layers."""
        return Cache(self.llm.args)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        eos_id: int | None = None,
        pad_id: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """What continues rows (B, T), through a cache: (B, n) int64 of new tokens, n at most max_new_tokens; rows that
        ended at eos_id, which is kept, are filled with pad_id (None = eos_id). Dropout is off.

        settings: temperature (0 = greedy), top_k, top_p, num_beams, ... as `llm.generate.generate` has them.
        """
        if self.config.head != "tokens" or not self.config.is_causal:
            raise ValueError("only a causal model with head=tokens continues rows")
        trained = self.training
        self.eval()
        made = generate(
            self.llm,
            input_ids.tolist(),
            max_new_tokens=max_new_tokens,
            stop_ids=() if eos_id is None else (eos_id,),
            **settings,
        )
        self.train(trained)
        return filled(made, eos_id if pad_id is None else pad_id, input_ids.device)

    def get_num_params(self, trainable_only: bool = False) -> int:
        """Numbers in the model, those that a head and the token table share counted once."""
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
        save_folder(Path(save_directory), self.llm, self.config, kept, self.parts)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device | None = None,
        strict: bool = True,
        **parts: Any,
    ) -> "Transformer":
        """The model in a folder that `save_pretrained` wrote, in a run folder of the trainer, or in whatever else
        LLM.from_pretrained reads, in evaluation mode and in the dtype of its files.

        strict=False: what the files miss keeps initial values, what they have beyond is left out; `load_report` says
        which. parts: the classes that it was saved with, as the constructor takes them. UserError in one line where it
        is not there, is damaged, does not fit, or device cannot be used.
        """
        place = usable(device)
        path = located(name)
        config, tensors = open_folder(path, TransformerConfig, Parts(**parts))
        if parts:
            model = cls(config, **parts)
            shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
            report = compared(shapes, tensors, path, strict)
        else:
            report = compared(shapes_of(config.args()), tensors, path, strict)
            model = unfilled(lambda: cls(config), drawn=bool(report.missing_keys))
        model = model.to(tensors.dtype)
        fill(model, tensors)
        model.load_report = report
        model.llm.origin = path
        return model.to(place).eval()


def filled(rows: list[list[int]], pad_id: int | None, device: torch.device) -> Tensor:
    """Rows of tokens as (B, n) int64, the shorter ones filled behind."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], dtype=torch.int64, device=device)
