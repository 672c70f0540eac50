"""A few logits on fixed ids, by which a model that was read back can be seen to be the one that was saved.

A run keeps them in a file of each checkpoint's folder, beside its manifest. Digests say whether files hold what was
written; this says whether what they hold means what it did: names, layouts and args put together in the same way.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm.adapters.peft_folder import is_peft
from llm.args import ModelArgs
from llm.cache import Cache
from llm.checkpoint.reader import resolve
from llm.datatypes import TransformerInput
from llm.errors import DamagedFile, UserError
from llm.foreign.files import is_foreign
from llm.generation.text import context_length
from llm.layers.features import in_units
from llm.parallel.replica import Replica

FILE = "fingerprint"
"""Without a suffix: it is no part of what the manifest describes."""
TOKENS, KEPT = 32, 64
STEP = 7919
"""Between two of the ids: a prime, so that they lie all over a vocabulary."""
EXACT, ROUNDED = 0.01, 0.5
"""Most that logits may differ, as a part of how they vary, in float32 and where either side computed in less: there a
router may choose another expert. Logits of another model differ by 1.4."""


@dataclass(frozen=True)
class Fingerprint:
    """`logits`: at places all over the vocabulary, after the fixed ids, or scaled values at all of these; `dtype`: in
    which they were computed."""

    dtype: str
    logits: tuple[float, ...]

    def difference(self, other: "Fingerprint") -> float:
        """Root of the mean square of the differences, over that of the logits' own about their mean."""
        ours, theirs = np.array(self.logits), np.array(other.logits)
        spread = np.sqrt(np.square(ours - ours.mean()).mean())
        return float(np.sqrt(np.square(ours - theirs).mean()) / max(spread, np.finfo(np.float32).tiny))

    def to_bytes(self) -> bytes:
        """As the file holds it."""
        return json.dumps({"dtype": self.dtype, "logits": list(self.logits)}).encode() + b"\n"


def fingerprint(replica: Replica) -> Fingerprint | None:
    """Of the present weights (collective, over all ranks that compute together). None where logits are not finite."""
    args = replica.model.args
    inputs = fixed_inputs(args, replica.world.device)
    at = None
    if args.output_dim is not None:  # a few numbers: those of all places
        columns = torch.arange(inputs.tokens.shape[1])
        at = torch.zeros_like(columns), columns
    found = replica.logits(inputs, [Cache(args) for _ in replica.stages], at).flatten()
    places = [i * len(found) // KEPT for i in range(KEPT)]
    logits = found.float().cpu()[places]
    dtype = str(next(replica.model.parameters()).dtype).removeprefix("torch.")
    return Fingerprint(dtype, tuple(logits.tolist())) if bool(logits.isfinite().all()) else None


def fixed_inputs(args: ModelArgs, device: torch.device) -> TransformerInput:
    """One row of fixed ids, or of a model of values of waves, which are about as large as what it is trained on. An
    encoder reads the same."""
    if args.input_dim is None:
        rows = TransformerInput(torch.tensor([fixed_ids(args)], device=device))
    else:
        n = min(TOKENS, context_length(args)) * args.input_dim
        waves = torch.sin(torch.arange(1, n + 1, dtype=torch.float64)).float().view(1, -1, args.input_dim)
        rows = TransformerInput.of_features(in_units(waves, args.input_mean, args.input_std).to(device))
    return replace(rows, causal=True, source=rows if args.encoder_layers else None)


def fixed_ids(args: ModelArgs) -> Sequence[int]:
    """Ids of no text, of which none stands for a part of an image."""
    slot = None if args.vision is None else args.vision.patch_token_id
    ids = [(i * STEP + 1) % args.vocab_size for i in range(min(TOKENS, context_length(args)))]
    return [(number + 1) % args.vocab_size if number == slot else number for number in ids]


def kept_with(path: Path) -> Fingerprint | None:
    """What was kept with the checkpoint that a path means; None where nothing was. DamagedFile where it makes no sense.
    """
    if is_peft(path) or is_foreign(path):
        return None
    file = resolve(path).path / FILE
    try:
        said: dict[str, Any] = json.loads(file.read_bytes())
        return Fingerprint(str(said["dtype"]), tuple(float(value) for value in said["logits"]))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise DamagedFile(f"{file}: damaged; without it the model is read unchecked") from None


def compared(path: Path, replica: Replica) -> str:
    """How the model that was read from a path compares with what was kept there, in words (collective). UserError where
    it is another."""
    found, kept = fingerprint(replica), kept_with(path)
    if kept is None or found is None:
        return "unchecked: none was kept with the model" if kept is None else "unchecked: logits are not finite"
    if len(kept.logits) != len(found.logits):
        raise DamagedFile(f"{path}: its {FILE} holds {len(kept.logits)} logits, expected {len(found.logits)}")
    difference = kept.difference(found)
    most = EXACT if {kept.dtype, found.dtype} == {"float32"} else ROUNDED
    if not difference <= most:
        raise UserError(
            f"{path}: the model gives other logits than when it was saved (they differ by {difference:.3g} of how they "
            f"vary, at most {most:g} is rounding); the checkpoint does not belong to its config, or was put together"
        )
    return f"as saved, to {difference:.1e} of how logits vary"
