"""A real pretrained model (stories260K, a Hugging Face folder) in, used, and out again: golden numbers and text."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from launch.generate import continue_prompt
from llm import LLM
from llm.cli import run_cli
from tests.foreign.models import logits_of, transformers
from tests.shared import SHARED, needs_shared
from tools.convert import export, import_

FOLDER = SHARED / "data/weights/stories260K-hf"
TEXT = SHARED / "data/text/tinystories_sample.txt"
ROW = 512
pytestmark = needs_shared


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The model as it came, imported, and exported again."""
    pytest.importorskip("sentencepiece")
    made = tmp_path_factory.mktemp("stories")
    import_(str(FOLDER), str(made / "ours"), quiet=True)
    export(str(made / "ours"), str(made / "theirs"), quiet=True)
    return {"as it came": FOLDER, "imported": made / "ours", "exported": made / "theirs"}


def rows(n_rows: int | None = None) -> Tensor:
    """Stories, each after BOS, one after the other, in rows of ROW inputs and the last target; the rest is dropped."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
    ids: list[int] = []
    for story in TEXT.read_text(encoding="utf-8", errors="ignore").split("<|endoftext|>"):
        if story.strip():
            ids += [1, *tokenizer.encode(story.strip())]
        if n_rows is not None and len(ids) > n_rows * ROW:
            break
    whole = (len(ids) - 1) // ROW if n_rows is None else n_rows
    inputs, targets = (torch.tensor(ids[at : at + whole * ROW]).view(whole, ROW) for at in (0, 1))
    return torch.stack([inputs, targets])


@torch.no_grad()
def mean_loss(model: LLM, text: Tensor) -> float:
    total = 0.0
    for inputs, targets in zip(text[0].split(8), text[1].split(8), strict=True):
        total += model(inputs, labels=targets).loss_sum.item()
    return total / text[0].numel()


@pytest.mark.parametrize("which", ["as it came", "imported", "exported"])
def test_logits_are_the_golden_ones(which, folders):
    prompt = torch.from_numpy(np.load(FOLDER / "golden_prompt_ids.npy").astype(np.int64)).view(1, -1)
    golden = torch.from_numpy(np.load(FOLDER / "golden_logits.npy")).float().view(1, prompt.shape[1], -1)
    logits = logits_of(LLM.from_pretrained(folders[which]), prompt)
    torch.testing.assert_close(logits, golden, rtol=0, atol=1e-5 * golden.abs().max().item())


def test_import_and_export_keep_every_bit(folders):
    models = [LLM.from_pretrained(folder).state_dict() for folder in folders.values()]
    for other in models[1:]:
        assert other.keys() == models[0].keys()
        assert all(torch.equal(other[name], models[0][name]) for name in other)


def test_the_loss_on_the_first_stories_is_that_of_transformers():
    text = rows(8)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    expected = torch.nn.functional.cross_entropy(logits_of(theirs, text[0]).flatten(0, 1), text[1].flatten()).item()
    assert mean_loss(LLM.from_pretrained(FOLDER), text) == pytest.approx(expected, rel=1e-6)


@pytest.mark.full
def test_the_loss_on_all_stories_is_the_golden_one():
    golden = json.loads((FOLDER / "golden_loss.json").read_text())
    text = rows()
    assert text.shape[1] == golden["rows"]
    loss = mean_loss(LLM.from_pretrained(FOLDER), text)
    # float32 sums in another order over a million tokens
    assert loss == pytest.approx(golden["tinystories_sample_rows512_mean_nll"], abs=1e-5)


@pytest.mark.parametrize("which", ["as it came", "imported", "exported"])
def test_two_hundred_greedy_steps_tell_the_golden_story_byte_for_byte(which, folders, capsys):
    expected = (FOLDER / "expected_greedy_200.txt").read_text()
    run_cli(continue_prompt, [f"--model={folders[which]}", "--prompt=", "--max_new_tokens=200", "--stop=false"])
    assert capsys.readouterr().out == expected.rstrip("\n") + "\n"


def test_transformers_tells_the_same_story_from_what_was_exported(folders):
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folders["exported"] / "tokenizer.model"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders["exported"]).eval()
    (ids,) = theirs.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False, eos_token_id=None)
    assert tokenizer.decode(ids[1:].tolist()) == (FOLDER / "expected_greedy_200.txt").read_text().rstrip("\n")


def test_no_greedy_step_is_a_close_call(folders):
    """So that the same text is no accident: sums in another order move logits by about 1e-6 of the largest."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    ids = theirs.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False, eos_token_id=None)
    logits = logits_of(LLM.from_pretrained(FOLDER), ids[:, :-1])[0]
    assert (logits.argmax(-1) == ids[0, 1:]).all()
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    gap = (first - second).min().item()
    assert math.isfinite(gap) and gap > 100 * 1e-6 * logits.abs().max().item()
