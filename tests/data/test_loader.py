"""Steps: labels and boundaries, the same rows on any number of ranks, resuming, the thread's manners."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from llm.batch import IGNORE
from llm.data.batch import StepBatch, collate
from llm.data.loader import TrainLoader, in_force
from llm.data.mixture import Mixture
from llm.data.source import TokenSource
from llm.data.stream import Stream
from llm.errors import UserError
from llm.tokenizer import ByteTokenizer
from tests.data.helpers import LM, flip_byte, labels_of, loader_of, make_source, mixture_of, random_texts, stream_of

T = 32
G = 24
TEXTS = random_texts(150)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TokenSource:
    return make_source(tmp_path_factory.mktemp("loader") / "source", TEXTS, shard_bytes=4000)


@pytest.fixture(scope="module")
def mixture(source: TokenSource, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    other = make_source(tmp_path_factory.mktemp("loader") / "other", random_texts(50, seed=1))
    return mixture_of([("a", source, 2.0), ("b", other, 1.0)], T, seed=3)


def global_steps(mixture: Mixture, dp_size: int, micro: int, n_steps: int, start_row: int = 0) -> list[torch.Tensor]:
    """Tokens and labels (G, 2 T) of each step, put together from all ranks in the order of global rows."""
    steps: list[list[torch.Tensor]] = [[] for _ in range(n_steps)]
    for rank in range(dp_size):
        with TrainLoader(
            mixture,
            seq_len=T,
            global_batch_size=G,
            micro_batch_size=micro,
            dp_rank=rank,
            dp_size=dp_size,
            count=LM.count,
            start_row=start_row,
        ) as loader:
            for s in range(n_steps):
                batch = loader.next()
                assert (batch.first_row, batch.n_rows) == (start_row + s * G, G)
                both = [torch.cat([m.inputs.tokens, labels_of(m)], 1) for m in batch.micro_batches]
                steps[s].append(torch.stack(both))
    # (micro-batch m, rank d, row b) is global row m D b + d b + row
    return [torch.stack(ranks, dim=1).reshape(G, 2 * T) for ranks in steps]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_any_number_of_ranks_gets_the_same_global_batches(mixture: Mixture, dp_size: int) -> None:
    reference = global_steps(mixture, dp_size=1, micro=G, n_steps=8)
    for micro in {1, G // dp_size}:
        steps = global_steps(mixture, dp_size, micro, n_steps=8)
        assert all(torch.equal(one, other) for one, other in zip(steps, reference, strict=True))


def test_resuming_on_other_ranks_goes_on_bit_by_bit(mixture: Mixture) -> None:
    reference = global_steps(mixture, dp_size=1, micro=4, n_steps=9)
    resumed = [
        *global_steps(mixture, dp_size=8, micro=3, n_steps=3),
        *global_steps(mixture, dp_size=3, micro=2, n_steps=3, start_row=3 * G),
        *global_steps(mixture, dp_size=24, micro=1, n_steps=3, start_row=6 * G),
    ]
    assert all(torch.equal(one, other) for one, other in zip(resumed, reference, strict=True))


def test_one_epoch_reads_every_row_once(source: TokenSource) -> None:
    mixture = mixture_of([("a", source, 1.0)], T, seed=0)
    with loader_of(mixture, 1, 1, 0, 1) as loader:
        rows = [loader.next().micro_batches[0].inputs.tokens[0].numpy() for _ in range(mixture.n_rows)]
    expected = [source.row(k, T).tokens[:-1] for k in range(mixture.n_rows)]
    assert sorted(row.tobytes() for row in rows) == sorted(row.tobytes() for row in expected)


def test_labels_are_the_next_tokens_of_the_same_document(source: TokenSource) -> None:
    batch = collate([Stream(source, T).read(k, 0) for k in range(20)], T)
    stream = stream_of(TEXTS)
    for k in range(20):
        tokens, labels = batch.inputs.tokens[k].numpy(), labels_of(batch)[k].numpy()
        following = stream[k * T + 1 : (k + 1) * T + 1]
        assert np.array_equal(tokens, stream[k * T : (k + 1) * T])
        assert np.array_equal(labels, np.where(tokens == ByteTokenizer.eos_id, IGNORE, following))


def test_boundaries_are_row_starts_and_document_starts(source: TokenSource) -> None:
    batch = collate([Stream(source, T).read(k, 0) for k in (5, 0, 9)], T)
    flat = batch.inputs.tokens.reshape(-1).numpy()
    at = np.arange(len(flat))
    expected = np.flatnonzero((at % T == 0) | (flat == ByteTokenizer.bos_id))
    assert batch.inputs.cu_seqlens.dtype == torch.int32
    assert batch.inputs.cu_seqlens.tolist() == [*expected, 3 * T]


def test_a_steps_counts_are_those_of_its_labels(mixture: Mixture) -> None:
    with loader_of(mixture, G, 2, 1, 3) as loader:
        step = loader.next()
    labels = torch.cat([labels_of(micro_batch) for micro_batch in step.micro_batches])
    assert step.counts.targets == int((labels != IGNORE).sum())
    assert step.counts.tokens == labels.numel() > step.counts.targets
    assert labels.shape == (G // 3, T)


def test_a_batch_that_cannot_be_cut_names_the_ranks_that_can(mixture: Mixture) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch_size=24 .*cut for 1, 2, 3, 4, 6, 12 ranks"):
        loader_of(mixture, G, 2, 0, 5)


def loader_threads() -> int:
    return sum(thread.name == "TrainLoader" for thread in threading.enumerate())


def test_closing_ends_the_thread_and_may_be_repeated(mixture: Mixture) -> None:
    loader = loader_of(mixture, G, G, 0, 1)
    loader.next()
    loader.close()
    loader.close()
    assert loader_threads() == 0
    with pytest.raises(RuntimeError, match="closed"):
        loader.next()


def test_an_error_in_the_thread_reaches_the_trainer_with_the_shards_name(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", TEXTS)
    path = source.shard_path(source.manifest.shards[0])
    flip_byte(path, path.read_bytes().index(stream_of(TEXTS)[100:130].astype(np.uint16).tobytes()))
    mixture = mixture_of([("a", TokenSource.open(source.path), 1.0)], T, seed=0)
    loader = loader_of(mixture, G, G, 0, 1)
    with pytest.raises(UserError, match=r"00000\.arrow"):
        loader.next()
    assert loader_threads() == 0


def test_steps_follow_one_another_however_far_is_read_ahead(mixture: Mixture) -> None:
    for prefetch in (1, 5):
        with TrainLoader(
            mixture, seq_len=T, global_batch_size=G, micro_batch_size=G, dp_rank=0, dp_size=1, count=LM.count,
            prefetch=prefetch,
        ) as loader:
            assert [loader.next().first_row for _ in range(4)] == [0, G, 2 * G, 3 * G]


BATCHES = ((30, 12), (60, 48), (61, 6))
LENGTHS = ((0, 8), (31, 16), (60, 32))


def planned(mixture: Mixture, start_row: int = 0, dp_rank: int = 0, dp_size: int = 1, micro: int = 6) -> TrainLoader:
    """A loader whose batches have 24, 24 (at row 24 not yet 30 have been seen), 12, 48, 6, 6, ... rows."""
    return TrainLoader(
        mixture,
        seq_len=T,
        global_batch_size=G,
        micro_batch_size=micro,
        dp_rank=dp_rank,
        dp_size=dp_size,
            count=LM.count,
        start_row=start_row,
        batch_schedule=BATCHES,
        seq_len_schedule=LENGTHS,
    )


def tensors_of(batch: StepBatch) -> list[list[torch.Tensor]]:
    return [[m.inputs.tokens, labels_of(m), m.inputs.cu_seqlens] for m in batch.micro_batches]


def test_a_value_is_in_force_from_its_row_on() -> None:
    assert [in_force(24, BATCHES, rows) for rows in (0, 29, 30, 59, 60, 61, 10**9)] == [24, 24, 12, 12, 48, 6, 6]
    assert in_force(24, (), 5) == 24


def test_across_changes_every_row_comes_once_and_in_order(mixture: Mixture) -> None:
    with planned(mixture) as loader:
        steps = [loader.next() for _ in range(7)]
    assert [(step.first_row, step.n_rows) for step in steps] == [
        (0, 24), (24, 24), (48, 12), (60, 48), (108, 6), (114, 6), (120, 6),
    ]  # fmt: skip
    tokens = torch.cat([m.inputs.tokens.reshape(-1, T) for step in steps for m in step.micro_batches])
    labels = torch.cat([labels_of(m).reshape(-1, T) for step in steps for m in step.micro_batches])
    for i, place in enumerate(zip(*(numbers.tolist() for numbers in mixture.locate(np.arange(126))), strict=True)):
        expected = collate([mixture.read(*place)], T)
        assert torch.equal(tokens[i], expected.inputs.tokens[0]) and torch.equal(labels[i], labels_of(expected)[0])


def test_resuming_at_every_step_boundary_goes_on_as_uninterrupted(mixture: Mixture) -> None:
    with planned(mixture) as loader:
        whole = [loader.next() for _ in range(7)]
    for s, first in enumerate(whole):
        with planned(mixture, start_row=first.first_row) as loader:
            for expected in whole[s:]:
                found = loader.next()
                assert (found.first_row, found.n_rows) == (expected.first_row, expected.n_rows)
                for one, other in zip(tensors_of(found), tensors_of(expected), strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_ranks_share_planned_steps_as_they_share_others(mixture: Mixture) -> None:
    with planned(mixture, micro=3) as one, planned(mixture, 0, 0, 2, 3) as left, planned(mixture, 0, 1, 2, 3) as right:
        for _ in range(6):
            whole, halves = one.next(), (left.next(), right.next())
            assert whole.counts.targets == sum(half.counts.targets for half in halves)
            # micro-batch m of one rank is micro-batch m // 2 of rank m % 2
            for m, micro_batch in enumerate(whole.micro_batches):
                assert torch.equal(micro_batch.inputs.tokens, halves[m % 2].micro_batches[m // 2].inputs.tokens)


def test_a_shorter_sequence_is_a_segment_of_its_own_with_the_labels_of_its_row(mixture: Mixture) -> None:
    with planned(mixture) as loader:
        steps = [loader.next() for _ in range(4)]
    for step, width in zip(steps, (8, 8, 16, 32), strict=True):
        assert step.counts.tokens == step.n_rows * T
        for m, batch in enumerate(step.micro_batches):
            assert batch.inputs.tokens.shape == labels_of(batch).shape == (6 * T // width, width)
            starts = set(batch.inputs.cu_seqlens.tolist())
            assert set(range(0, 6 * T + 1, width)) <= starts
            places = mixture.locate(np.arange(step.first_row + 6 * m, step.first_row + 6 * m + 6))
            rows = [mixture.read(*place) for place in zip(*(numbers.tolist() for numbers in places), strict=True)]
            whole = collate(rows, T)
            assert starts == set(whole.inputs.cu_seqlens.tolist()) | set(range(0, 6 * T, width))
            # the last token of a sequence still predicts the first of the next
            assert torch.equal(labels_of(batch).reshape(-1), labels_of(whole).reshape(-1))


def test_a_size_of_the_schedule_that_cannot_be_cut_is_named(mixture: Mixture) -> None:
    with pytest.raises(UserError, match=r"train\.batch_schedule\.2\.1=6 is not a multiple of .*micro_batch_size=12"):
        planned(mixture, micro=12)
