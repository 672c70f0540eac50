"""What Miniformer's two models have in common: a config, an LLM with the classes that a user gave, a folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from llm.model import LLM
from llm.siblings.folder import open_folder, save_folder
from llm.siblings.hub import located
from llm.siblings.loading import LoadReport, compared, fill, refuse_pickle, shapes_of, unfilled, usable
from llm.siblings.miniformer_config import TransformerConfig
from llm.siblings.parts import Parts, installed
from llm.tokenizer import Tokenizer


class Kept(nn.Module):
    """An LLM as a config says it, that is written to a folder and read again."""

    config_class: ClassVar[type[TransformerConfig]]
    bases: ClassVar[Mapping[str, type]]
    """What classes of one's own derive from, by the places that they take."""
    load_report: LoadReport | None = None
    """What `from_pretrained` found; None where nothing was loaded."""

    def __init__(self, config: TransformerConfig, parts: Parts) -> None:
        """Initial values are drawn by a seed that torch's generator gives (torch.manual_seed)."""
        super().__init__()
        parts.check(self.bases)
        self.config, self.parts = config, parts
        self.llm = installed(LLM(config.args(), seed=int(torch.randint(1 << 31, (), device="cpu"))), parts)

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
    ) -> Self:
        """The model in a folder that `save_pretrained` wrote, in a run folder of the trainer, or in whatever else
        LLM.from_pretrained reads, in evaluation mode and in the dtype of its files.

        strict=False: what the files miss keeps initial values, what they have beyond is left out; `load_report` says
        which. parts: the classes that it was saved with, as the constructor takes them. UserError in one line where it
        is not there, is damaged, does not fit, or device cannot be used.
        """
        place = usable(device)
        path = located(name)
        config, tensors = open_folder(path, cls.config_class, Parts(**parts))
        made: Callable[..., Self] = cls
        if parts:
            model = made(config, **parts)
            shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
            report = compared(shapes, tensors, path, strict)
        else:
            report = compared(shapes_of(config.args()), tensors, path, strict)
            model = unfilled(lambda: made(config), drawn=bool(report.missing_keys))
        model = model.to(tensors.dtype)
        fill(model, tensors)
        model.load_report = report
        model.llm.origin = path
        return model.to(place).eval()


def filled(rows: list[list[int]], pad_id: int | None, device: torch.device) -> Tensor:
    """Rows of tokens as (B, n) int64, the shorter ones filled behind."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], dtype=torch.int64, device=device)
