"""A step's documents: each traced to its file and line, scored as if it stood alone, the worst first."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm.args import ModelArgs
from llm.batch import Batch, Rows
from llm.data.batch import collate
from llm.data.mixture import Mixture
from llm.data.sources import SourceSpec
from llm.data.text import open_data, prepare_data
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.model import LLM
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.parallel.replica import Replica
from llm.parallel.stages import split
from llm.tokenizer import ByteTokenizer
from llm.train.config.flags import parse_run_flags
from llm.train.replay import check_replay
from llm.train.replay.records import compare, read_metrics, strict
from llm.train.replay.spans import Span, by_loss, score_spans, span_gradient_norm
from tests.data.helpers import LM, labels_of, mixture_of
from tests.data.sample_helpers import asked_for, packed, random_rows, write_rows

SEQ_LEN = 40
CPU = torch.device("cpu")
POISONED = ("part2.jsonl", 17)  # file and line


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four JSONL files of letters and spaces; one line among them is random bytes."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(5)
    for number in range(4):
        rows = [{"text": "".join(draw.choices("abcd ", k=draw.randint(0, 90)))} for _ in range(25)]
        if f"part{number}.jsonl" == POISONED[0]:
            rows[POISONED[1] - 1] = {"text": draw.randbytes(30).decode("latin-1")}
        (folder / f"part{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def mixture(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """The folder, and one of its files again as a second source."""
    data = [SourceSpec(path=str(texts)), SourceSpec(path=str(texts / "part0.jsonl"), name="again")]
    cache = tmp_path_factory.mktemp("cache")
    prepare_data(data, ByteTokenizer(), cache)
    return mixture_of(open_data(data, ByteTokenizer(), cache), SEQ_LEN, seed=1)


@pytest.fixture(scope="module")
def model(mixture: Mixture) -> LLM:
    """Sixty quick steps: it has learnt which letters there are."""
    args = ModelArgs(
        vocab_size=ByteTokenizer().vocab_size, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_hidden=32,
        max_seq_len=SEQ_LEN, attention_chunk_size=16, nope_layer_interval=2,
    )  # fmt: skip
    model = LLM(args, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for step in range(60):
        batch = batch_of(mixture, np.arange(8 * step, 8 * step + 8))
        loss = model(batch.inputs, labels=labels_of(batch)).loss_sum / LM.count([batch]).targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def batch_of(mixture: Mixture, rows: np.ndarray, sequence_len: int | None = None) -> Batch:
    sources, numbers, epochs = mixture.locate(rows)
    read = [mixture.read(*map(int, place)) for place in zip(sources, numbers, epochs, strict=True)]
    return replace(collate(read, SEQ_LEN, sequence_len=sequence_len), rows=Rows(sources, numbers, rows, epochs))


def scored(model: LLM, mixture: Mixture, batch: Batch) -> list[tuple[int, int, Span]]:
    replica = Replica(model, make_grid(World(0, 1, 0, CPU)), split(model.args, 1))
    (nll_BT,) = replica.token_losses(LM.main, [batch])
    return score_spans(mixture, ByteTokenizer(), nll_BT, batch, batch.targets["lm"])


def origins(mixture: Mixture, row: int) -> set[tuple[str, int | None]]:
    """(file name, line) of the documents in a global row."""
    number, k, epoch = (int(part[0]) for part in mixture.locate(row))
    found = [mixture.sources[number].origin(k, epoch, position).origin for position in range(SEQ_LEN)]
    return {(Path(origin.file).name, origin.row) for origin in found}


def test_the_poisoned_document_is_named_first_with_its_file_and_line(
    model: LLM, mixture: Mixture, texts: Path
) -> None:
    poisoned = [row for row in range(4 * mixture.n_rows) if POISONED in origins(mixture, row)]
    assert poisoned
    for row in poisoned:
        rows = np.arange(row - row % 8, row - row % 8 + 8)
        ordered = sorted((span for *_, span in scored(model, mixture, batch_of(mixture, rows))), key=by_loss)
        assert (ordered[0].file, ordered[0].file_row) == (str(texts / POISONED[0]), POISONED[1])
        innocent = next(span for span in ordered if span.document != ordered[0].document)
        assert ordered[0].loss is not None and innocent.loss is not None and ordered[0].loss > 1.5 * innocent.loss


@pytest.mark.parametrize("sequence_len", [None, 10])
def test_every_span_is_the_text_at_its_file_line_and_place(
    model: LLM, mixture: Mixture, sequence_len: int | None
) -> None:
    rows = np.arange(16, 48)
    batch = batch_of(mixture, rows, sequence_len)
    tokens_N = batch.inputs.tokens.reshape(-1)
    tokenizer = ByteTokenizer()
    found = scored(model, mixture, batch)
    assert {span.source for *_, span in found} == {mixture.names[0], "again"}
    for start, stop, span in found:
        assert span.file_row is not None
        text = json.loads(Path(span.file).read_text().splitlines()[span.file_row - 1])["text"]
        document = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert len(document) == span.document_tokens and stop - start == span.n_tokens
        assert tokens_N[start:stop].tolist() == document[span.first_token : span.first_token + span.n_tokens]
        assert span.row == rows[start // SEQ_LEN]
    assert sum(span.n_tokens for *_, span in found) == len(rows) * SEQ_LEN


def test_a_span_is_scored_as_if_it_stood_alone_and_all_add_up_to_the_batch(model: LLM, mixture: Mixture) -> None:
    rows = np.arange(8)
    batch = batch_of(mixture, rows)
    found = scored(model, mixture, batch)
    with torch.no_grad():
        together = float(model(batch.inputs, labels=labels_of(batch)).loss_sum)
        for start, stop, span in found:
            tokens, labels = (part.reshape(1, -1)[:, start:stop] for part in (batch.inputs.tokens, labels_of(batch)))
            alone = model(TransformerInput(tokens), labels=labels)
            # float32 sums of other lengths
            assert span.loss_sum == pytest.approx(float(alone.loss_sum), rel=1e-5, abs=1e-6)
            assert span.n_targets == int(alone.n_targets)
    assert math.fsum(span.loss_sum for *_, span in found) == pytest.approx(together, rel=1e-6)


def test_samples_that_share_a_row_are_spans_with_their_file_and_row(model: LLM, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", random_rows(30, longest=SEQ_LEN))
    rows = packed(path, asked_for(tmp_path, SEQ_LEN))
    mixture = Mixture([("samples", rows, 1.0)], SEQ_LEN, seed=1)
    asked = np.arange(rows.n_rows, rows.n_rows + 6)  # of the second epoch
    found = [span for _, _, span in scored(model, mixture, batch_of(mixture, asked))]
    _, numbers, epochs = mixture.locate(asked)
    held = [item for k, epoch in zip(numbers, epochs, strict=True) for item in rows.items(int(k), int(epoch)).tolist()]
    assert sorted(span.document for span in found) == sorted(held) and len(held) > 6
    for span in found:
        assert (span.file, span.file_row) == (path, span.document + 1)
        assert span.n_tokens == span.document_tokens - 1 and span.first_token == 0


def test_the_gradient_of_a_span_is_its_part_of_the_batchs_and_leaves_no_trace(model: LLM, mixture: Mixture) -> None:
    """Its part is what the batch's loss gives when no other span has targets."""
    batch = batch_of(mixture, np.arange(8))
    bounds = batch.inputs.cu_seqlens.tolist()
    for start, stop in list(zip(bounds, bounds[1:], strict=False))[:6]:
        only = torch.full_like(labels_of(batch).reshape(-1), -100)
        only[start:stop] = labels_of(batch).reshape(-1)[start:stop]
        loss = model(batch.inputs, labels=only.view_as(labels_of(batch))).loss_sum / 100
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        found = span_gradient_norm(model, LM.main, batch, start, stop, weight=100, device=CPU)
        assert found == pytest.approx(expected, rel=1e-5)  # float32 sums of other lengths
    assert all(parameter.grad is None for parameter in model.parameters())


def span(loss_sum: float, n_targets: int) -> Span:
    return Span(0, "s", 0, 0, "f", None, 0, n_targets, n_targets, n_targets, n_targets, loss_sum, "")


def test_what_is_not_a_number_comes_first_and_what_has_no_targets_last() -> None:
    spans = [span(0.0, 0), span(2.0, 4), span(9.0, 3), span(math.nan, 2), span(1.0, 1)]
    ordered = sorted(spans, key=by_loss)
    assert [p.n_targets for p in ordered] == [2, 3, 1, 4, 0]


def test_a_step_that_was_not_applied_compares_with_its_record_of_nulls() -> None:
    row = {"loss": math.nan, "lm_loss": 1.0, "grad_norm": math.inf, "lr": 1.0, "tokens": 1.0, "targets": 1.0}
    recorded = json.loads(json.dumps(strict(row), allow_nan=False))
    assert all(compare(row, recorded)["equal"].values())
    found = compare(row | {"lm_loss": 1.5, "loss": 2.0}, recorded)
    assert [key for key, equal in found["equal"].items() if not equal] == ["loss", "lm_loss"]
    assert found["relative_difference"] == {"lm_loss": pytest.approx(1 / 3)}


def write_metrics(run_dir: Path, first: int, last: int, tail: str = "") -> Path:
    run_dir.mkdir(exist_ok=True)
    rows = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(first, last + 1))
    (run_dir / "metrics.jsonl").write_text(rows + tail)
    return run_dir


@pytest.mark.parametrize("step", [4, 6, 9, 10])
def test_recorded_steps_and_the_one_that_a_run_stopped_in_can_be_replayed(tmp_path: Path, step: int) -> None:
    check_replay(write_metrics(tmp_path, 4, 9), step, steps=20)
    check_replay(tmp_path, step, steps=None)


@pytest.mark.parametrize(
    ("step", "steps", "expected"),
    [(3, 20, "steps 4 to 10 .recorded: to 9."), (11, 20, "steps 4 to 10"), (10, 9, r"steps 4 to 9$")],
)
def test_a_step_out_of_range_is_refused_with_the_range(tmp_path: Path, step: int, steps: int, expected: str) -> None:
    with pytest.raises(UserError, match=f"--replay_step={step}.*{expected}"):
        check_replay(write_metrics(tmp_path, 4, 9), step, steps)


def test_a_torn_last_row_does_not_count(tmp_path: Path) -> None:
    assert sorted(read_metrics(write_metrics(tmp_path, 1, 3, tail='{"step": 4, "lo'))) == [1, 2, 3]


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_run_without_recorded_steps_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl: .*only a run with recorded steps can be replayed"):
        check_replay(tmp_path, 1, 10)


def test_a_replay_takes_the_config_of_the_run_folder_or_the_one_given() -> None:
    flags = parse_run_flags(["--run_dir", "runs/7", "--replay_step=12", "--train.micro_batch_size=2"])
    assert (flags.config, flags.replay_step) == ("runs/7/config.yaml", 12)
    assert flags.overrides == {"train.micro_batch_size": 2} and flags.folder() == Path("runs/7")
    flags = parse_run_flags(["--config", "c.yaml", "--replay_step", "12"])
    assert (flags.config, flags.folder()) == ("c.yaml", Path("runs/c"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--replay_step=3"], "--replay_step=3: --run_dir is missing"),
        (["--run_dir=r", "--replay_step=0"], "--replay_step=0: expected a step of the run, 1 or more"),
        (["--run_dir=r", "--replay_step=two"], "--replay_step=two: expected a step"),
        (["--run_dir=r", "--replay_step"], "--replay_step=True: expected a step"),
        (["--run_dir=r", "--replay_stp=2"], "did you mean --replay_step"),
        (["--run_dir=r"], "--config FILE is missing"),
    ],
)
def test_a_wrong_replay_flag_is_refused(words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse_run_flags(words)
