"""Seed 004 is the project's own model; here stand the calls that its document makes."""

import re
from pathlib import Path

import pytest
import torch

from llm import LLM, ModelArgs
from llm.datatypes import TransformerInput
from tests.siblings.seeds import blocks_of, needs_seeds, seed

ARGS = ModelArgs(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=61, ffn_hidden=48, qk_norm="l2",
                 nope_layer_interval=4, attention_chunk_size=8)  # fmt: skip
TOKENS = torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(0))
AS_COMMENTS = re.compile(r"^# (?=[a-z_]+ = |model\.|with torch|    )")
"""Lines of code that the document leaves as comments, as it does not know the paths and tokens in them."""


@needs_seeds
def test_the_documents_own_block_runs_its_lines_left_as_comments_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (block for block in blocks_of(seed("004")) if block.language == "python")
    lines = [AS_COMMENTS.sub("", line) for line in block.text.splitlines() if not line.startswith(("from ", "import "))]
    code = "\n".join(lines).replace("ModelArgs(...)", "ARGS").replace("[[...]]", "TOKENS.tolist()")
    (tmp_path / "path" / "to").mkdir(parents=True)
    torch.save(LLM(ARGS, seed=5).state_dict(), tmp_path / "path" / "to" / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "LLM": LLM, "TransformerInput": TransformerInput, "ARGS": ARGS, "TOKENS": TOKENS}
    exec(code, names)
    assert not names["model"].training and names["input_pos"].tolist() == list(range(9))
    assert torch.equal(names["logits"], LLM(ARGS, seed=5)(TOKENS, inference=True).logits)
    left = [line for line in lines if line.startswith("#")]
    assert [line[:4] for line in left] == ["# 1.", "# 2.", "# 3.", "# 4.", "# 5."], "headings alone stay comments"


@needs_seeds
def test_blocks_that_are_not_meant_to_run_are_those_of_installing() -> None:
    assert [block.language for block in blocks_of(seed("004"))] == ["bash", "bash", "python"]


def test_inference_has_no_gradients_and_the_same_logits() -> None:
    model = LLM(ARGS)
    given = TransformerInput(tokens=TOKENS, tokens_position=torch.arange(0, TOKENS.shape[1]))
    plain, inferred = model(given), model(given, inference=True)
    assert plain.logits.requires_grad and not inferred.logits.requires_grad
    assert torch.equal(plain.logits, inferred.logits)


def test_a_loss_asked_for_with_inference_has_no_gradient_either() -> None:
    assert not LLM(ARGS)(TOKENS, labels=TOKENS, inference=True).loss_sum.requires_grad


def test_positions_by_arange_are_those_of_a_call_without_any() -> None:
    model = LLM(ARGS)
    given = TransformerInput(tokens=TOKENS, tokens_position=torch.arange(0, TOKENS.shape[1]))
    assert torch.equal(model(given).logits, model(TOKENS).logits)


@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict_takes_other_names_through_the_hooks(strict: bool) -> None:
    """Meta's: queries, keys and values in one tensor, norms with their projections, a table of rotations."""
    model, other = LLM(ARGS, seed=3), LLM(ARGS, seed=4)
    renamed = {"freqs_cis": torch.ones(4), **model.state_dict()}
    for i in range(ARGS.n_layers):
        attention, ffn = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        qkv = [renamed.pop(f"{attention}.{name}.weight") for name in ("wq", "wk", "wv")]
        renamed[f"{attention}.wqkv.weight"] = torch.cat(qkv)
        renamed[f"{attention}.wqkv.layer_norm_weight"] = renamed.pop(f"layers.{i}.attention_norm.weight")
        renamed[f"{ffn}.mlp.layer_norm_weight"] = renamed.pop(f"layers.{i}.ffn_norm.weight")
        renamed[f"{ffn}.mlp.fc1_weight"] = torch.cat([renamed.pop(f"{ffn}.{name}.weight") for name in ("w1", "w3")])
        renamed[f"{ffn}.mlp.fc2_weight"] = renamed.pop(f"{ffn}.w2.weight")
    result = other.load_state_dict(renamed, strict=strict)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(model(TOKENS).logits, other(TOKENS).logits)
