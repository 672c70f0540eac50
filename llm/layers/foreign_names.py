"""Where `load_state_dict` of our modules meets the names of others: llm/foreign says here how it translates them, as
layers know nothing of families.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from llm.args import ModelArgs

Translate = Callable[[nn.Module, ModelArgs, str, Mapping[str, Tensor]], dict[str, Tensor] | None]
"""(module, args, place, state dict) -> the state dict in our names; None where none of its names is foreign. The place
is what stands before the module's names in a model, with `{i}` for its layer, or `{k}` for that of the encoder."""

_translators: list[Translate] = []


def translate_with(translate: Translate) -> None:
    """From now on state dicts go through this first."""
    _translators[:] = [translate]


def accept_foreign_names(module: nn.Module, args: ModelArgs, place: str) -> None:
    """Let `module.load_state_dict` take foreign names, and refuse a foreign state dict that does not fit, strict or
    not. One in our names loads as ever."""

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        import llm.foreign.load  # noqa: F401  (it says here how to translate; it knows models, so it comes late)

        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for translate in _translators:
            translated = translate(module, args, place, own)
            if translated is not None:
                for key in own:
                    del state[prefix + key]
                state.update({prefix + key: value for key, value in translated.items()})

    module.register_load_state_dict_pre_hook(hook)
