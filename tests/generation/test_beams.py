"""Beam search: the sequences of transformers, of a search without a cache, and of looking at every way there is."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm import LLM
from llm.args import ModelArgs
from llm.decoder import Cached
from llm.generate import generate
from llm.generation.beams import Beams, beam_search
from llm.generation.sampling import NonFiniteLogits
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.parallel.replica import Replica
from tests.model.models import LLAMA4, MOE, llama4, tokens

PROMPTS = [row[:n].tolist() for row, n in zip(tokens(4, 20), (5, 1, 20, 9), strict=True)]
KINDS = {
    "chunks": dict(),
    "full": dict(layer_pattern="attn:full"),
    "windows": dict(attention_chunk_size=None, sliding_window=6, layer_pattern=["attn:window", "attn:full"]),
    "states": dict(layer_pattern=["ssm", "attn:full"], ssm=dict(head_width=16, d_state=8)),
    "experts": dict(moe=MOE | dict(top_k=2)),
}


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, LLM]:
    """A random Llama of transformers, and ours with its weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.25, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    folder: Path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, LLM.from_pretrained(folder)


@pytest.mark.parametrize("ends", [[1], [1, 7, 12]], ids=["one end mark", "three"])
@pytest.mark.parametrize("early_stopping", [False, True], ids=["patient", "early"])
@pytest.mark.parametrize("length_penalty", [0.6, 1.4])
@pytest.mark.parametrize("num_beams", [3, 5])
def test_all_kept_sequences_and_their_scores_are_those_of_transformers(
    peer: tuple[object, LLM], num_beams: int, length_penalty: float, early_stopping: bool, ends: list[int]
) -> None:
    theirs, ours = peer
    prompts = [[3, 4, 5, 6, 8], [9], [10, 11, 13, 14, 15, 16, 17], [20, 21]]
    beams = Beams(num_beams, length_penalty, early_stopping)
    found = beam_search(ours, prompts, beams, max_new_tokens=12, stop_ids=ends)
    longest = max(map(len, prompts))
    padded = torch.tensor([[2] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    made = theirs.generate(  # type: ignore[attr-defined]
        padded, attention_mask=mask, max_new_tokens=12, num_beams=num_beams, num_return_sequences=num_beams,
        do_sample=False, length_penalty=length_penalty, early_stopping=early_stopping, eos_token_id=ends,
        pad_token_id=2, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    flat = [hypothesis for row in found for hypothesis in row]
    assert len(flat) == len(made.sequences) == num_beams * len(prompts)
    assert [one.tokens for one in flat] == [_up_to_end(row[longest:].tolist(), ends) for row in made.sequences]
    assert len({len(one.tokens) for one in flat}) > 2
    # sums of 12 float32 log-probabilities of size 3
    torch.testing.assert_close(torch.tensor([one.score for one in flat]), made.sequences_scores, rtol=1e-5, atol=1e-5)


def _up_to_end(ids: list[int], ends: list[int]) -> list[int]:
    first = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: first + 1]


def test_the_penalty_of_repetitions_is_that_of_transformers(peer: tuple[object, LLM]) -> None:
    theirs, ours = peer
    prompt = [3, 4, 5, 4]
    found = generate(ours, [prompt], max_new_tokens=14, num_beams=3, repetition_penalty=1.7, stop_ids=[22])
    made = theirs.generate(  # type: ignore[attr-defined]
        torch.tensor([prompt]), max_new_tokens=14, num_beams=3, repetition_penalty=1.7, do_sample=False,
        eos_token_id=22, pad_token_id=2,
    )  # fmt: skip
    assert found[0] == _up_to_end(made[0, len(prompt) :].tolist(), [22])
    assert found != generate(ours, [prompt], max_new_tokens=14, num_beams=3, stop_ids=[22])


class Uncached:
    """A decoder that computes each row from its beginning at every step."""

    def __init__(self, model: LLM) -> None:
        self.model, self.rows = model, list[list[int]]()

    def logits(
        self, tokens: NDArray[np.int64], positions: NDArray[np.int64], images: Tensor | None = None
    ) -> Tensor:
        new = [row[at >= 0].tolist() for row, at in zip(tokens, positions, strict=True)]
        self.rows = [old + ids for old, ids in zip(self.rows or [[]] * len(new), new, strict=True)]
        return torch.stack([self.model(torch.tensor([row])).logits[0, -1] for row in self.rows]).detach()

    def keep(self, rows: list[int]) -> None:
        self.rows = [self.rows[i] for i in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_through_any_cache_is_that_of_full_forwards(kind: str) -> None:
    model, beams = llama4(**KINDS[kind]), Beams(4, 0.8)
    stop_ids = {5, 17, 40, 71}
    found = beam_search(model, PROMPTS, beams, max_new_tokens=[14, 9, 12, 1], stop_ids=stop_ids)
    slow = beam_search(Uncached(model), PROMPTS, beams, max_new_tokens=[14, 9, 12, 1], stop_ids=stop_ids)
    assert [[one.tokens for one in row] for row in found] == [[one.tokens for one in row] for row in slow]
    assert len(found[3][0].tokens) == 1 and {len(row) for row in found} == {4}


def test_a_search_moves_rows_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would be of rows that stay where they are."""
    kept: list[list[int]] = []
    monkeypatch.setattr(Cached, "keep", lambda self, rows: (kept.append(rows), self._cache.reorder(rows))[1])
    beam_search(llama4(), PROMPTS[:1], Beams(4), max_new_tokens=12)
    assert any(rows != sorted(rows) for rows in kept) and any(len(set(rows)) < len(rows) for rows in kept)


@pytest.mark.parametrize("kind", KINDS)
def test_one_beam_is_greedy(kind: str) -> None:
    model, stop_ids = llama4(**KINDS[kind]), {5, 17}
    greedy = generate(model, PROMPTS, max_new_tokens=12, stop_ids=stop_ids)
    found = beam_search(model, PROMPTS, Beams(1), max_new_tokens=12, stop_ids=stop_ids)
    assert [[one.tokens for one in row] for row in found] == [[row] for row in greedy]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_as_many_beams_as_tokens_find_the_best_of_all_ways_of_two_steps(length_penalty: float) -> None:
    model, n_ids, prompt, end = llama4(), 12, [3, 1, 4], 7
    ways = []
    for first, second in itertools.product(range(n_ids), repeat=2):
        ids = [first] if first == end else [first, second]
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1, :n_ids].detach()
        total = logits.log_softmax(-1)[range(len(ids)), ids].sum().item()
        ways.append((total / len(ids) ** length_penalty, ids))
    best = sorted({tuple(ids): score for score, ids in ways}.items(), key=lambda way: -way[1])[:n_ids]
    beams = Beams(n_ids, length_penalty)
    (found,) = beam_search(model, [prompt], beams, max_new_tokens=2, stop_ids=[end], n_ids=n_ids)
    assert [tuple(one.tokens) for one in found] == [ids for ids, _ in best]
    np.testing.assert_allclose([one.score for one in found], [score for _, score in best], rtol=1e-5)


def test_more_beams_than_ways_give_each_way_once() -> None:
    (found,) = beam_search(llama4(), [[1, 2]], Beams(9), max_new_tokens=2, n_ids=2, stop_ids=[1])
    assert sorted(one.tokens for one in found) == [[0, 0], [0, 1], [1]]


def test_rows_do_not_influence_each_other() -> None:
    model = llama4(moe=MOE)
    settings = dict(max_new_tokens=12, num_beams=3, stop_ids={5, 17, 40})
    together = generate(model, PROMPTS, **settings)  # type: ignore[arg-type]
    assert together == [generate(model, [prompt], **settings)[0] for prompt in PROMPTS]  # type: ignore[arg-type]


def test_a_replica_searches_as_its_model_does() -> None:
    args = ModelArgs.model_validate(LLAMA4 | {"moe": MOE})
    replica = Replica.build(args, 3, make_grid(World(0, 1, 0, torch.device("cpu"))))
    settings = dict(max_new_tokens=[6, 3, 9, 4], num_beams=3, length_penalty=0.7)
    of_replica = generate(replica.decoder(), PROMPTS, **settings)  # type: ignore[arg-type]
    assert of_replica == generate(replica.model, PROMPTS, **settings)  # type: ignore[arg-type]


def test_logits_that_are_not_finite_are_refused_by_prompt_and_step() -> None:
    class Broken(Uncached):
        def logits(self, *given: object) -> Tensor:
            logits = super().logits(*given)  # type: ignore[arg-type]
            if max(map(len, self.rows)) > 21:
                logits[4, 3] = torch.nan  # rows 3 to 5 are of the second prompt
            return logits

    with pytest.raises(NonFiniteLogits, match="prompt row 1, new token 3: 1 of 97 logits"):
        beam_search(Broken(llama4()), [[1, 2], PROMPTS[2]], Beams(3), max_new_tokens=5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(num_beams=0), "num_beams=0 must be at least 1"),
        (dict(num_beams=3, length_penalty=float("nan")), "length_penalty=nan must be finite"),
        (dict(length_penalty=0.6), "length_penalty=0.6 needs num_beams above 1"),
        (dict(early_stopping=True), "early_stopping=true needs num_beams above 1"),
        (dict(num_beams=3, temperature=0.7), "num_beams=3 does not go with temperature=0.7"),
        (dict(num_beams=3, prompts=[[1], []]), "at least one token"),
        (dict(num_beams=3, max_new_tokens=[1, 2]), "2 numbers for 1 prompts"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        generate(llama4(), **(dict(prompts=[[1]], max_new_tokens=1) | settings))  # type: ignore[arg-type]
