"""Evaluations of encoder-decoders: what is asked is what the encoder reads, and the answer is that of generate."""

from pathlib import Path

import pytest
import torch

from llm import LLM
from llm.errors import UserError
from llm.evaluate.continuing import continue_
from llm.evaluate.encode import Encoder
from llm.evaluate.fingerprint import fingerprint
from llm.evaluate.requests import Continue, Continued, digest
from llm.generate import generate
from llm.generation.beams import Beams
from llm.tokenizer import ByteTokenizer
from tests.evaluate.replicas import pictures_of, replica_of
from tests.evaluate.tasks import made
from tests.model.test_encoder import encoder_decoder

TOKENIZER = ByteTokenizer()
CONTEXT = 24
GENERATE = {"kind": "generate", "prompt": "{{ q }}", "gold": "{{ a }}", "max_new_tokens": 4}
CHOICE = {"kind": "multiple_choice", "prompt": "{{ q }}", "choices": "{{ c }}", "gold": "{{ g }}"}
TEXTS = ("ab", "", "a longer one", "ab", "xyz")


@pytest.fixture(scope="module")
def model() -> LLM:
    return encoder_decoder(vocab_size=272, max_seq_len=CONTEXT, init_std=0.3)


def answers(model: LLM, requests: list[Continue], batch_tokens: int) -> list[Continued]:
    found = dict(
        continue_(replica_of(model), TOKENIZER, TOKENIZER.end_ids, requests, batch_tokens, pictures_of(model))
    )
    return [found[index] for index in range(len(requests))]


@pytest.mark.parametrize("beams", [Beams(), Beams(3, 0.7)], ids=["greedy", "beams"])
@pytest.mark.parametrize("batch_tokens", [1, 10**6])
def test_answers_are_those_of_generate(model: LLM, beams: Beams, batch_tokens: int) -> None:
    sources = [tuple(TOKENIZER.source_ids(text)) for text in TEXTS]
    requests = [Continue((256,), 7, beams=beams, source=source) for source in sources]
    found = answers(model, requests, batch_tokens)
    expected = generate(
        model, [[256]] * 5, sources=sources, max_new_tokens=7, n_ids=258, stop_ids=TOKENIZER.end_ids, **vars(beams)
    )
    assert [answer.text for answer in found] == [TOKENIZER.decode([i for i in row if i != 257]) for row in expected]
    assert [answer.tokens for answer in found] == [len(row) for row in expected]
    assert len({digest(request) for request in requests}) == 4


def test_a_prompt_with_its_examples_is_what_the_encoder_reads_cut_on_the_left(tmp_path: Path) -> None:
    task = made(tmp_path, [{"q": "x" * 40, "a": "1"}, {"q": "y", "a": "2"}], **GENERATE)
    long, short = task.documents(Encoder(TOKENIZER, CONTEXT, reads_sources=True))
    (request,) = long.requests
    assert isinstance(request, Continue) and request.prompt == (256,)
    whole = tuple(TOKENIZER.source_ids(long.prompt))
    assert request.source == whole[:1] + whole[1 - CONTEXT :] and long.counts["truncated"] == 1
    (request,) = short.requests
    assert isinstance(request, Continue) and request.source == tuple(TOKENIZER.source_ids(short.prompt))


def test_likelihoods_of_what_follows_a_text_are_refused(tmp_path: Path) -> None:
    task = made(tmp_path, [{"q": "x", "c": ["a", "b"], "g": 0}], **CHOICE)
    with pytest.raises(UserError, match="encoder-decoder, which answers texts: kind generate alone"):
        task.documents(Encoder(TOKENIZER, CONTEXT, reads_sources=True))


def test_requests_have_a_source_where_the_model_reads_one(model: LLM) -> None:
    with pytest.raises(ValueError, match="request 1: a source is of an encoder-decoder"):
        answers(model, [Continue((256,), 2, source=(1,)), Continue((256,), 2)], 100)
    with pytest.raises(ValueError, match="request 0: its source is longer than the context of 24"):
        answers(model, [Continue((256,), 2, source=(1,) * 25)], 100)


def test_a_fingerprint_follows_the_encoder(model: LLM) -> None:
    before = fingerprint(replica_of(model))
    other = encoder_decoder(vocab_size=272, max_seq_len=CONTEXT, init_std=0.3)
    with torch.no_grad():
        other.encoder.layers[1].feed_forward.w2.weight[0, 0] += 1
    changed = fingerprint(replica_of(other))
    assert before is not None and changed is not None
    assert before.difference(changed) > 1e-3
