"""Token tables and heads that PEFT saves whole beside an adapter, of as many tokens as the base has and of more."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm import LLM
from llm.adapters.peft_folder import WEIGHTS, open_peft
from llm.errors import UserError
from llm.pretrained import adapter_of, args_of
from llm.safetensors_file import SafetensorsFile
from tests.foreign.models import logits_of, reference
from tests.foreign.test_peft import change
from tools import convert

peft = pytest.importorskip("peft")
UNTIED, TIED = "ratio 3", "one kv head, tied"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


def made(folder: Path, name: str, more: int = 0, rows: slice = slice(None), **config: Any) -> Tensor:
    """Write base and adapter as PEFT does, with so many more tokens, of which `rows` have moved; its logits of all
    tokens."""
    base = reference("llama", name)
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    if more:
        base.resize_token_embeddings(base.config.vocab_size + more)
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | config
    theirs = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for i, (key, parameter) in enumerate(theirs.named_parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            if "lora_" in key:
                parameter.copy_(0.1 * noise)
            elif parameter.requires_grad:
                parameter[rows] += noise[rows]
    theirs.save_pretrained(folder / "adapter", save_embedding_layers=bool(more) or "auto")
    return logits_of(theirs, torch.arange(base.config.vocab_size).view(1, -1))


def held(folder: Path) -> dict[str, Tensor]:
    file = SafetensorsFile(folder / "adapter" / WEIGHTS)
    return {key: torch.empty(entry.shape) for key, entry in file.entries.items()}


BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "table and head": (UNTIED, 0, BOTH),
    "the head alone": (UNTIED, 0, {"modules_to_save": ["lm_head"]}),
    "more tokens": (UNTIED, 5, BOTH),
    "more tokens, which do not train": (UNTIED, 5, {}),
    "more tokens, with adapters of both": (UNTIED, 5, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied": (TIED, 0, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize(("name", "more", "config"), CASES.values(), ids=CASES)
def test_tables_that_peft_saves_whole_come_in(tmp_path: Path, name: str, more: int, config: dict[str, Any]) -> None:
    expected = made(tmp_path, name, more, **config)
    model = LLM.from_pretrained(tmp_path / "adapter")
    found = logits_of(model, torch.arange(expected.shape[-1]).view(1, -1))
    # float32: ours adds W and B A first, and a row to what it is less the base's
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert args_of(tmp_path / "adapter").vocab_size == model.args.vocab_size == expected.shape[-1]


def test_rows_that_did_not_move_do_not_train(tmp_path: Path) -> None:
    made(tmp_path, UNTIED, rows=slice(7, 11), **BOTH)
    source = adapter_of(tmp_path / "adapter")
    assert source.lora.token_rows == (7, 11)
    rows = source.weights.read("output.token_rows", ((0, 4), (0, 48)), torch.empty(4, 48))
    assert rows.any(1).all()


def test_an_adapter_with_more_tokens_goes_out_as_one_model_with_its_base(tmp_path: Path) -> None:
    expected = made(tmp_path, UNTIED, 5, **BOTH)
    convert.main(["export", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    found = logits_of(LLM.from_pretrained(tmp_path / "merged"), torch.arange(expected.shape[-1]).view(1, -1))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # float32, as above


def test_tables_that_do_not_fit_are_refused_by_key(tmp_path: Path) -> None:
    made(tmp_path, UNTIED, 5, **BOTH)
    folder = tmp_path / "adapter"
    table, head = (f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head"))
    rows = held(tmp_path)[head].shape[0]
    for tensors, config, line in (
        ({head: torch.zeros(rows - 1, 48)}, {}, rf"{head} has {rows - 1} rows, expected {rows}"),
        ({head: torch.zeros(9, 48), table: torch.zeros(9, 48)}, {}, rf"has 9 rows, expected {rows - 5}"),
        ({head: torch.zeros(rows, 40), table: torch.zeros(rows, 48)}, {}, rf"{head} has shape \({rows}, 40\)"),
        ({head: None}, {}, f"it misses {head}"),
        ({}, {"modules_to_save": None}, rf"has {rows} tokens, of which its base has {rows - 5}, and no rows of output"),
        ({}, {"trainable_token_indices": [3]}, "trainable_token_indices beside whole tables is not supported"),
    ):
        change(folder, tensors, **config)
        with pytest.raises(UserError, match=f"^{folder}: .*{line}"):
            LLM.from_pretrained(folder)


def test_one_of_a_tied_table_and_head_alone_is_refused(tmp_path: Path) -> None:
    made(tmp_path, TIED, modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match="are one matrix in this model, of which it has the table alone"):
        LLM.from_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter", {"base_model.model.lm_head.weight": torch.zeros(97, 48)})
    with pytest.raises(UserError, match="are one matrix in this model, and the ones that it holds differ"):
        open_peft(tmp_path / "adapter")
        LLM.from_pretrained(tmp_path / "adapter")
