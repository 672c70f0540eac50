"""Task seq2seq: the loss of packed pairs is that of each alone, what a validation says, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM, ModelArgs
from llm.batch import IGNORE, Batch, Targets
from llm.data.batch import collate
from llm.data.kinds import Opened
from llm.data.mixture import Mixture
from llm.data.stream import Stream
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.objectives import Objectives
from llm.tasks import RowsWanted, task_named
from llm.tokenizer import ByteTokenizer
from llm.train.config import validate
from llm.train.show import CLOSE, OPEN, show_row
from tests.data.helpers import make_source
from tests.data.test_pairs import BOS, EOS, ROWS, S, T, pairs
from tests.distributed.harness import tiny_config

TASK = task_named("seq2seq")
ARGS = ModelArgs(dim=16, n_layers=1, encoder_layers=1, n_heads=2, vocab_size=258, max_seq_len=32)


def model_of() -> LLM:
    torch.manual_seed(0)
    return LLM(ARGS).eval()


def losses(model: LLM, batch: Batch) -> Any:
    objectives = Objectives(TASK.objectives())
    with torch.no_grad():
        found = model(batch.inputs, losses=objectives.losses_of(model, batch)).losses
    assert found is not None
    return found["seq2seq"]


def test_the_loss_of_packed_pairs_is_that_of_each_pair_alone(tmp_path: Path) -> None:
    model, rows = model_of(), pairs(tmp_path, ROWS[:12])
    batch = collate([*(rows.read(k, 0) for k in range(rows.n_rows)), None], T, EOS, targets=("seq2seq",), source_len=S)
    expected = 0.0
    for row in ROWS[:12]:
        target = torch.tensor([[BOS, *row["target"].encode(), EOS]])
        source = torch.tensor([[BOS, *row["source"].encode(), EOS]])
        alone = Batch(
            TransformerInput(target[:, :-1], source=TransformerInput(source)), {"seq2seq": Targets(target[:, 1:])}
        )
        expected += float(losses(model, alone).total)
    n_targets = sum(len(row["target"]) + 1 for row in ROWS[:12])
    assert batch.targets["seq2seq"].count() == n_targets
    # float32 sums of about a hundred losses in another order
    assert float(losses(model, batch).total) == pytest.approx(expected, rel=1e-5)


def test_each_span_of_a_packed_batch_has_its_loss_with_its_own_source(tmp_path: Path) -> None:
    model, rows = model_of(), pairs(tmp_path, ROWS[:12])
    batch = collate([rows.read(k, 0) for k in range(rows.n_rows)], T, EOS, targets=("seq2seq",), source_len=S)
    nll_N = losses(model, batch).per_token.view(-1)
    bounds = batch.inputs.cu_seqlens
    assert bounds is not None
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        if batch.targets["seq2seq"].labels.view(-1)[start] != IGNORE:
            alone = losses(model, batch.span(start, end)).total
            assert float(alone) == pytest.approx(float(nll_N[start:end].sum()), rel=1e-5)


def test_a_validation_says_loss_perplexity_and_the_share_of_likeliest_tokens(tmp_path: Path) -> None:
    rows = pairs(tmp_path, ROWS[:4])
    model = model_of()
    batch = collate([rows.read(k, 0) for k in range(rows.n_rows)], T, EOS, targets=("seq2seq",), source_len=S)
    counts = TASK.counter(ByteTokenizer())(batch)
    found = losses(model, batch)
    labels = batch.targets["seq2seq"].labels
    with torch.no_grad():
        likeliest = model(batch.inputs).logits.argmax(-1)
    assert float(found.measures["acc"]) == int((likeliest == labels).sum())
    metrics = TASK.metrics(float(found.total), counts)
    assert metrics["valid_loss"] == float(found.total) / int((labels >= 0).sum())
    assert metrics["valid_ppl"] == math.exp(metrics["valid_loss"])
    assert TASK.fields(ARGS) == ("loss", "ppl", "acc")


def test_rows_are_shown_with_what_the_encoder_reads(tmp_path: Path) -> None:
    mixture = Mixture([("p", pairs(tmp_path, [{"source": "ab", "target": "xyz"}]), 1.0)], T, 0, EOS, S)
    lines = list(show_row(mixture, 0, ByteTokenizer()))
    assert lines[0].startswith("=== row 1: row 1 of p in pass 1; 4 of 24 positions used")
    assert "4 of 16 positions of sources" in lines[0]
    assert lines[1].endswith("p.jsonl:1: 4 targets, 4 positions")
    assert lines[2:] == ["source: <s>ab</s>", f"<s>{OPEN}xyz</s>{CLOSE}"]


def of_text(folder: Path, source_len: int) -> Opened:
    source = make_source(folder / "text", ["abcdefgh", "xy"] * 9, ByteTokenizer())
    opened = Opened(Stream(source, T), given="data.train=text")
    wanted = RowsWanted("text", None, str(folder), T, 0, None, source_len=source_len)
    return TASK.view("text", opened, wanted, ByteTokenizer(), held_out=False)


def test_a_text_is_read_in_halves_and_a_side_too_short_for_them_is_refused(tmp_path: Path) -> None:
    rows = of_text(tmp_path, T).rows
    row = rows.read(0, 0)
    assert rows.targets == ("seq2seq",) and row.source is not None
    assert row.source.tokens.tolist()[:6] == [BOS, *b"abcd", EOS], "half of ten tokens, and the end"
    assert row.tokens.tolist()[:5] == [BOS, *b"efgh"]
    assert row.targets["seq2seq"].labels.tolist()[:5] == [*b"efgh", EOS]
    with pytest.raises(UserError, match=r"data.source_len=8: data.train=text is text, and the first halves"):
        of_text(tmp_path / "other", 8)


def test_a_sample_answers_a_source(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    texts = TASK.sample(
        model_of(), tokenizer, [tokenizer.source_ids("ab"), tokenizer.source_ids("c")], most_tokens=5, context=32,
        temperature=0.0, seed=0,
    )  # fmt: skip
    assert len(texts) == 2 and all(len(text) <= 5 for text in texts)


ENCODER = {"encoder_layers": 1}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"task": "seq2seq"}, "task=seq2seq: the model has no encoder to read sources with; set model.encoder_layers"),
        ({"model": ENCODER}, "model.encoder_layers=1: task=lm has no source for the encoder to read"),
        ({"model": ENCODER, "task": "mlm"}, "model.encoder_layers=1: task=mlm has no source"),
        ({"data": {"source_len": 8}}, "data.source_len=8: is for the encoder of a model"),
        (
            {"model": ENCODER, "task": "seq2seq", "data": {"source_len": 4096}},
            "data.source_len=4096 is above model.max_seq_len",
        ),
        (
            {"model": ENCODER, "task": "seq2seq", "data": {"train": [{"path": "x", "kind": "chat"}]}},
            "data.train.0.kind=chat: task=seq2seq trains on kind pair",
        ),
        ({"data": {"train": [{"path": "x", "kind": "pair"}]}}, "data.train.0.kind=pair: has sources, which task=lm"),
        ({"pair": {"max_length": "cut"}}, "pair.max_length=cut: is for task=seq2seq, and task=lm"),
        (
            {"model": ENCODER, "task": [{"task": "seq2seq", "source": "a"}, {"task": "lm", "source": "b"}],
             "data": {"train": [{"path": "a", "kind": "pair"}, {"path": "b"}], "valid": None}},
            "model.encoder_layers=1: task=lm has no source",
        ),
    ],
)  # fmt: skip
def test_models_tasks_and_data_that_do_not_go_together_are_refused_by_key(
    tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    raw = tiny_config(tmp_path)
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section if isinstance(section, dict) else section
    with pytest.raises(UserError) as refused:
        validate(raw, "test.yaml")
    assert said in str(refused.value)
