"""What a Hugging Face config says by itself: its family, what cannot be read, and the model that it describes.

With weights beside it, what a config leaves out shows in them (llm/foreign/files.py). A bare config is taken at its
word, so a key that no reader of its family knows is refused: it may say of the model what nobody here would notice.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from llm.args import ModelArgs
from llm.errors import UserError
from llm.foreign import processor
from llm.foreign.asked import AskedConfig, unasked
from llm.foreign.family import Family, families, family_named
from llm.foreign.weight_files import read_json

MODALITIES = ("vision_config", "audio_config", "speech_config", "text_config", "mm_vision_tower")
"""Keys of configs of models that read more than text."""
SHOWN = 4
"""Keys that a line lists."""
SAYS_NOTHING = frozenset({
    # where it comes from, and what class reads it
    "_name_or_path", "name_or_path", "architectures", "auto_map", "model_type", "transformers_version", "torch_dtype",
    "dtype", "tokenizer_class", "is_encoder_decoder", "is_decoder", "for_llm_compressor", "pretraining_tp",
    "_attn_implementation_autoset", "attn_implementation", "torchscript", "use_bfloat16", "gradient_checkpointing",
    # tokens, which are the tokenizer's
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id", "image_start_token_id",
    "image_end_token_id",
    # what a call returns and keeps
    "use_cache", "cache_implementation", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "return_dict_in_generate", "num_logits_to_keep", "chunk_size_feed_forward", "id2label", "label2id",
    "num_labels", "problem_type", "task_specific_params", "classifier_dropout", "classifier_activation",
    # training, and initial values
    "initializer_range", "router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef", "z_loss_coefficient",
    "init_std",
})  # fmt: skip
"""Keys that change nothing of what a model computes."""
DROPOUTS = frozenset({
    "attention_dropout", "hidden_dropout", "projector_dropout", "dropout", "activation_dropout",
    "encoder_layerdrop", "decoder_layerdrop", "resid_pdrop", "embd_pdrop", "attn_pdrop",
})  # fmt: skip
"""Rates that are not taken over: training asks for its own."""
OF_ROPE = frozenset({
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale",
    "mscale_all_dim",
})  # fmt: skip
"""Keys of rope_parameters and rope_scaling."""


class BareConfig(NamedTuple):
    """A model of which there is a config alone."""

    family: Family
    args: ModelArgs
    notes: tuple[str, ...]
    """Lines about what the config leaves open or says twice, and what of it was taken."""


def open_config(path: Path, family: str | None = None, text_only: bool = False) -> BareConfig:
    """The model that a config.json describes, or that of a folder. No weights are looked for.

    text_only: leave out the tower of a multimodal model. UserError naming file and key where it is of no known family,
    or says what is not supported or not known.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: {'holds no config.json' if path.is_dir() else 'no such file'}")
    config, folder = AskedConfig(read_json(file)), file.parent
    if "model_type" not in config and "dim" in config:
        raise UserError(f"{file}: is Meta's params.json, which leaves sizes to the weights: inspect the whole folder")
    refuse_quantised(config, file)
    chosen = family_named(family) if family else family_of(config, file)
    if chosen.format != "hf":
        raise UserError(f"--family={chosen.name} is not of Hugging Face's configs")
    refuse_other_inputs(chosen, config, file)
    notes = list(about_config(chosen, config))
    if text_only and chosen.tower:
        config.pop("vision_config", None)
    config.asked.clear()
    with explained(chosen, file):
        read = chosen.read_config(config, notes.append)
    known = SAYS_NOTHING | DROPOUTS | set(chosen.silent)
    unknown = [key for key in unasked(config) if key.rpartition(".")[2] not in known]
    unknown += _unknown_of_rope(config)
    if text_only and "text_config" in config:  # what stands beside it is of the tower
        unknown = [key for key in unknown if key.startswith("text_config.")]
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise UserError(f"{file}: not known of {chosen.name}: {', '.join(unknown[:SHOWN])}{more}")
    if read.get("vision") is not None:
        notes += processor.settle(read["vision"], folder, read["vocab_size"], {})
    for key, rate in _rates(config):
        notes.append(f"config.json: {key}={rate} is not taken: set model.dropout to train with it")
    return BareConfig(chosen, model_args(file, read), tuple(notes))


def _unknown_of_rope(config: Mapping[str, Any], above: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        if isinstance(value, AskedConfig):
            found += _unknown_of_rope(value, f"{above}{key}.")
        elif key in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
            found += [f"{above}{key}.{inner}" for inner in value if inner not in OF_ROPE]
    return found


def _rates(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, AskedConfig):
            yield from _rates(value, f"{above}{key}.")
        elif key in DROPOUTS and value and not above.startswith("vision_config"):  # of which its reader reports
            yield above + key, value


@contextmanager
def explained(family: Family, file: Path) -> Iterator[None]:
    """Where a config is read: what goes wrong becomes a UserError naming the file."""
    try:
        yield
    except UserError as error:  # it says in which file, not where that is
        raise UserError(str(error).replace("config.json", str(file), 1)) from None
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(
            f"{file.parent}: its config makes no sense to {family.name}: {type(error).__name__} {error}"
        ) from None


def refuse_quantised(config: Mapping[str, Any], file: Path) -> None:
    """UserError where weights are packed by another library, whose numbers are not the model's."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if settings := holder.get(key):
                method = settings.get("quant_method") or settings.get("format") if isinstance(settings, dict) else None
                raise UserError(
                    f"{file}: {key}{f' ({method})' if method else ''}: quantised weights are not read; "
                    f"take the model from before, or, where its files hold plain weights, remove {key} from config.json"
                )


def refuse_other_inputs(family: Family, config: Mapping[str, Any], file: Path) -> None:
    """UserError where a text family's config mentions images or sound."""
    named = [key for key in MODALITIES if config.get(key)]
    if named and not family.tower:
        raise UserError(
            f"{file}: {named[0]} makes it a multimodal model, which {family.name} is not; of those only llama4 is read"
        )


def about_config(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """Lines about keys that say nothing of numbers."""
    if config.get("auto_map"):
        yield f"config.json: auto_map names code that came with the model; it is not run, and read as {family.name}"
    architectures = config.get("architectures")
    known = {named.architecture: named.name for named in families().values() if named.architecture}
    for name in architectures if isinstance(architectures, list) else []:
        if known.get(name, family.name) != family.name:
            yield (
                f"config.json: model_type={config.get('model_type')} and architectures={name} contradict each other; "
                f"read as {family.name}"
            )


def family_of(config: Mapping[str, Any], file: Path) -> Family:
    """The family that a config names. UserError where it is not known."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{file}: model_type is missing; give --family")
    try:
        return family_named(kind)
    except UserError as error:
        more = next((f"; it is a multimodal model ({key})" for key in MODALITIES if config.get(key)), "")
        raise UserError(f"{file}: model_type: {error}{more}") from None


def model_args(path: Path, raw: dict[str, Any]) -> ModelArgs:
    """ModelArgs of these keys. UserError naming the path."""
    try:
        return ModelArgs.model_validate(raw)
    except ValueError as error:
        problems = error.errors() if isinstance(error, ValidationError) else []
        said = "; ".join(f"{'.'.join(map(str, p['loc']))} {p['msg']}".strip() for p in problems) or str(error)
        raise UserError(f"{path}: its config makes no model: {said}") from None
