"""Masked language modelling: torch's cross entropy over the hidden tokens, the mask token and where it comes from."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from launch import pretrain
from llm import LLM, ModelArgs
from llm.data.batch import collate
from llm.data.masked import Masked
from llm.data.stream import Stream
from llm.errors import UserError
from llm.objectives import objectives_of
from llm.tasks import task_named
from llm.tasks.mlm import mask_token, masking_of
from llm.tokenizer import ByteTokenizer
from llm.tokenizers.extended import with_tokens
from llm.train.config import RunConfig, validate
from llm.train.notes import config_notes
from llm.train.preflight import preflight
from tests.data.helpers import make_source, random_texts
from tests.distributed.harness import tiny_config, write_config

T = 32
TOKENIZER = with_tokens(ByteTokenizer(), ["<mask>"])
ARGS = ModelArgs(dim=16, n_layers=2, n_heads=2, ffn_hidden=24, vocab_size=TOKENIZER.vocab_size, max_seq_len=T)
WITH_MASK = {"add_tokens": True}


def mlm_config(folder: Path, **sections: Any) -> dict[str, Any]:
    """A run config that masks the text of `folder`."""
    (folder / "train.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    data = {"train": str(folder / "train.txt"), "valid": None}
    raw = tiny_config(folder, data=data, chat=WITH_MASK, **sections)
    raw["model"]["vocab_size"] = -1
    return {**raw, "task": "mlm"}


def validated(folder: Path, **sections: Any) -> RunConfig:
    return validate(mlm_config(folder, **sections), "config")


def test_the_loss_is_torchs_cross_entropy_over_the_hidden_tokens(tmp_path: Path) -> None:
    """1e-5: float32 sums in another order."""
    rows = Masked(Stream(make_source(tmp_path / "s", random_texts(60), TOKENIZER), T), masking_of(TOKENIZER, {}), 0)
    batch = collate([rows.read(k, 0) for k in range(12)], T, targets=rows.targets)
    model, objectives = LLM(ARGS), objectives_of(task_named("mlm").objectives())
    labels_BT = batch.targets["mlm"].labels
    right = F.cross_entropy(model(batch.inputs).logits.flatten(0, 1), labels_BT.flatten(), reduction="sum")
    found = model(batch.inputs, losses=objectives.losses_of(model, batch)).losses["mlm"].total
    assert float(found.detach()) == pytest.approx(float(right.detach()), rel=1e-5)
    assert objectives.count([batch]).main == int((labels_BT >= 0).sum()) > 20
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(loss, parameters) for loss in (found, right)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["<mask>", "[MASK]", "<|mask|>"])
def test_the_mask_token_goes_by_its_usual_names(name: str) -> None:
    tokenizer = with_tokens(ByteTokenizer(), ["<other>", name])
    assert mask_token(tokenizer) == 259
    assert mask_token(tokenizer, "<other>") == 258 and mask_token(tokenizer, 7) == 7


def test_a_token_of_text_that_stands_for_hidden_ones_is_no_text_any_more() -> None:
    assert not masking_of(ByteTokenizer(), {"mask_token": 7}).plain_V[7]


def test_a_tokenizer_without_a_mask_token_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"task=mlm: the tokenizer has no mask token .*chat.add_tokens=true adds it"):
        mask_token(ByteTokenizer())
    with pytest.raises(UserError, match=r"mlm.mask_token=<m>: no control token of the tokenizer, which has </s>, <s>;"):
        mask_token(ByteTokenizer(), "<m>")
    with pytest.raises(UserError, match=r"mlm.mask_token=258: the tokenizer has the ids 0 to 257"):
        mask_token(ByteTokenizer(), 258)


def test_a_run_without_a_mask_token_is_refused_before_it_begins(tmp_path: Path) -> None:
    config = validate(mlm_config(tmp_path) | {"chat": {}}, "config")
    with pytest.raises(UserError, match="task=mlm: the tokenizer has no mask token"):
        preflight(config, tmp_path / "run")
    assert not (tmp_path / "cache").exists(), "before text is sharded"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"rate": 0}, "mlm.rate=0: input should be greater than 0"),
        ({"rate": 1.5}, "mlm.rate=1.5: input should be less than or equal to 1"),
        ({"mask": 0.8, "random": 0.3}, "mlm.mask=0.8 and mlm.random=0.3: above 1 together"),
        ({"rates": 0.1}, "unknown key mlm.rates; did you mean mlm.rate?"),
    ],
)
def test_options_out_of_range_are_refused_by_name(section: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        validated(tmp_path, mlm=section)


def test_options_of_masks_are_refused_where_another_task_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mlm.rate=0.3: is for task=mlm, and task=lm"):
        validate(mlm_config(tmp_path, mlm={"rate": 0.3}) | {"task": "lm"}, "config")


def test_a_config_that_does_not_mask_is_written_as_ever(tmp_path: Path) -> None:
    assert "mlm" not in validated(tmp_path).model_dump(mode="json")
    assert validated(tmp_path, mlm={"rate": 0.2}).model_dump(mode="json")["mlm"]["rate"] == 0.2


def test_hidden_tokens_are_shown_with_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "config.yaml", mlm_config(tmp_path, mlm={"rate": 0.3, "mask": 1.0, "random": 0.0}))
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--config", str(config), "--show=2"])
    pretrain.main()
    *_, text = capsys.readouterr().out.splitlines()
    shown = [part.split("\u2192") for part in text.replace("\u27e7", "\u27e6").split("\u27e6")]
    hidden = [part for part in shown if len(part) == 2]
    assert len(hidden) > 5 and all(seen == "<mask>" * len(meant) for seen, meant in hidden)
    assert "".join(part[-1] for part in shown) in "The quick brown fox jumps over the lazy dog. " * 3


def test_a_run_that_continues_no_text_says_that_it_has_no_samples(tmp_path: Path) -> None:
    eval_section = {"sample_interval": 5, "sample_tokens": 9}
    lines = config_notes(validated(tmp_path, eval=eval_section))
    right = "note: task=mlm continues no text, so there are no samples: eval.sample_interval and eval.sample_tokens"
    assert any(line.startswith(right) for line in lines)
