"""`generation_kwargs` of lm-eval's tasks as settings of ours.

Source: lm-eval 0.4.13, models/utils.py (normalize_gen_kwargs).
"""

from collections.abc import Mapping
from typing import Any

from llm.errors import UserError
from llm.generation.beams import Beams
from llm.generation.sampling import Sampling

NEW_TOKENS = 256
"""Of an answer where the task does not say: as HFLM."""
LIMITS_OF_ANSWERS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one setting, the first that is given counts."""
PLAIN_VALUES = {"num_return_sequences": 1, "use_cache": True}
"""Settings of generation that are known here with the one value that changes nothing."""


def read_settings(given: Mapping[str, Any]) -> tuple[int, tuple[str, ...], Sampling, Beams]:
    """Most new tokens, stop texts, sampling and beam search of a task's `generation_kwargs`. UserError naming the one
    that is of no use here."""
    settings = dict(given)
    until = settings.pop("until", None) or []
    stop = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(text, str) for text in stop):
        raise UserError(f"generation_kwargs.until={until!r}: expected texts")
    most = [settings.pop(name, None) for name in LIMITS_OF_ANSWERS]
    new_tokens = int(next((n for n in most if n is not None), NEW_TOKENS))
    if new_tokens < 1:
        raise UserError(f"generation_kwargs.max_gen_toks={new_tokens} must be at least 1")
    draws, temperature = settings.pop("do_sample", None), float(settings.pop("temperature", None) or 0.0)
    if draws and temperature == 0:
        raise UserError("generation_kwargs.do_sample=true needs a temperature above 0")
    k, p = settings.pop("top_k", None), settings.pop("top_p", None)
    greedy = draws is False or temperature == 0
    penalty, seed = settings.pop("repetition_penalty", 1.0), settings.pop("seed", 0)
    num_beams, early = int(settings.pop("num_beams", None) or 1), settings.pop("early_stopping", None) or False
    length_penalty = float(settings.pop("length_penalty", 1.0))
    if not isinstance(early, bool):
        raise UserError(f"generation_kwargs.early_stopping={early!r}: not known here; true or false")
    for name, value in settings.items():
        if name not in PLAIN_VALUES or value != PLAIN_VALUES[name]:
            raise UserError(f"generation_kwargs.{name}={value!r}: not known here; leave it out")
    try:
        sampling = Sampling(
            0.0 if greedy else temperature,
            None if greedy or not k or k < 0 else int(k),
            None if greedy or p in (None, 1) else float(p),
            float(penalty),
            int(seed),
        )
        # of one beam these settings mean nothing, as there
        beams = Beams(num_beams, length_penalty, early) if num_beams > 1 else Beams(num_beams)
        beams.check(sampling)
    except ValueError as error:
        raise UserError(f"generation_kwargs.{error}") from None
    return new_tokens, tuple(text for text in stop if text), sampling, beams
