"""Models some of whose layers keep a state that rows cannot join: their answers are those of rows alone, too."""

from pathlib import Path

import pytest
import torch

from llm import LLM, extensions
from llm.args.layers import MIXERS
from llm.datatypes import TransformerInput
from llm.evaluate.continuing import continue_
from llm.evaluate.requests import Continue, Continued, Score
from llm.evaluate.running import TogetherRows, open_rows
from llm.evaluate.scoring import score
from llm.generate import generate
from llm.generation.sampling import Sampling
from llm.generation.text import continuation
from llm.tokenizer import ByteTokenizer
from tests.evaluate.replicas import pictures_of, replica_of
from tests.evaluate.test_continuing import prompts
from tests.model.models import llama4

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ByteTokenizer()
END = (TOKENIZER.eos_id,)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LLM:
    """With the moving average of docs/extend in every second layer."""
    monkeypatch.setattr(MIXERS, "_entries", dict(MIXERS))
    monkeypatch.setattr(extensions, "LOADED", set())
    extensions.load([ROOT / "docs/extend/moving_average.py"])
    return llama4(0, vocab_size=272, max_seq_len=64, tie_embeddings=False, layer_pattern=["attn", "average"])


def answers(model: LLM, requests: list[Continue], batch_tokens: int) -> list[Continued]:
    found = dict(continue_(replica_of(model), TOKENIZER, END, requests, batch_tokens, pictures_of(model)))
    return [found[index] for index in range(len(requests))]


def test_greedy_answers_are_those_of_each_prompt_alone(model: LLM) -> None:
    assert isinstance(open_rows(replica_of(model)), TogetherRows)
    asked = [*prompts(7, seed=2), prompts(1, seed=2)[0]]
    requests = [Continue(ids, 4 + place) for place, ids in enumerate(asked)]
    for batch_tokens in (1, 150, 10**6):
        for request, answer in zip(requests, answers(model, requests, batch_tokens), strict=True):
            ids = list(request.prompt)
            (new,) = generate(model, [ids], max_new_tokens=request.max_new_tokens, stop_ids=END, n_ids=258)
            text = [token for token in new if token != TOKENIZER.eos_id]
            assert answer.text == continuation(TOKENIZER, ids, text) and answer.tokens == len(new)


def test_samples_of_a_prompt_that_is_computed_once_are_those_of_each_alone(model: LLM) -> None:
    drawn = Sampling(temperature=1.0, seed=3)
    requests = [Continue(ids, 8, sampling=drawn, sample=n) for ids in prompts(3, seed=4) for n in range(3)]
    together = answers(model, requests, 10**6)
    assert together == [answers(model, [request], 10**6)[0] for request in requests]
    assert len({answer.text for answer in together}) > 3


def test_scores_are_those_of_a_forward_of_each_text(model: LLM) -> None:
    context = (256, *b"one beginning")
    requests = [Score(context, tuple(text)) for text in (b" and", b" or else", b" and more")]
    found = dict(score(replica_of(model), requests, 1000, pictures_of(model)))
    for place, request in enumerate(requests):
        ids = torch.tensor([[*context, *request.target]])
        with torch.no_grad():
            logits = model(TransformerInput(ids)).logits[0, len(context) - 1 : -1].double()
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(request.target)[:, None]).sum()
        # float32 sums in another order
        assert found[place].logprob == pytest.approx(float(expected), rel=1e-5)
