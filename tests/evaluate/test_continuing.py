"""Answers to Continue requests: each is a function of its request alone, and ends where it should."""

import random

import pytest
import torch

from llm import LLM
from llm.evaluate.continuing import continue_
from llm.evaluate.requests import Continue, Continued, NonFinite
from llm.generate import generate
from llm.generation.beams import Beams
from llm.generation.sampling import Sampling
from llm.generation.text import continuation
from llm.tokenizer import ByteTokenizer
from tests.evaluate.replicas import pictures_of, replica_of
from tests.generation.models import CONTEXT, shared_model, with_tokenizer
from tests.model.models import MOE

TOKENIZER = ByteTokenizer()
END = (TOKENIZER.eos_id,)
DRAWN = Sampling(temperature=1.0, top_k=50, seed=3)


def answers(
    requests: list[Continue], batch_tokens: int = 400, model: torch.nn.Module | None = None, end_ids: tuple = END
) -> list[Continued]:
    model = model or shared_model()
    made = continue_(replica_of(model), TOKENIZER, end_ids, requests, batch_tokens, pictures_of(model))
    found = dict(made)
    return [found[index] for index in range(len(requests))]


def prompts(n: int, seed: int = 0, longest: int = 40) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [(256, *(draw.randrange(256) for _ in range(draw.randrange(longest)))) for _ in range(n)]


def test_greedy_answers_are_those_of_generate():
    asked = prompts(9)
    expected = [generate(shared_model(), [ids], max_new_tokens=12, stop_ids=END, n_ids=258)[0] for ids in asked]
    found = answers([Continue(ids, 12) for ids in asked])
    for ids, new, answer in zip(asked, expected, found, strict=True):
        text = [token for token in new if token != TOKENIZER.eos_id]
        assert answer.text == continuation(TOKENIZER, ids, text) and answer.tokens == len(new)


KINDS = {"dense": dict(), "moe": dict(moe=MOE | {"top_k": 2})}  # test_running.py has logits of more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_depends_on_the_size_of_a_batch_or_its_neighbours(kind, dtype):
    model = with_tokenizer(**KINDS[kind]).to(dtype)
    requests = [
        Continue(ids, 6 + number % 7, ("e", "\0\1"), DRAWN if number % 2 else Sampling())
        for number, ids in enumerate(prompts(10))
    ]
    expected = answers(requests, model=model)
    order = random.Random(5).sample(range(10), 10)
    for batch_tokens in (1, 10**6):
        found = answers([requests[index] for index in order], batch_tokens, model)
        assert [found[order.index(index)] for index in range(10)] == expected


def test_samples_of_a_prompt_differ_and_each_is_the_same_again():
    requests = [Continue((256, 65), 10, sampling=DRAWN, sample=sample) for sample in range(4)]
    first = answers(requests)
    assert len({answer.text for answer in first}) == 4
    assert answers(requests[2:]) == first[2:]
    other = answers([Continue((256, 65), 10, sampling=Sampling(temperature=1.0, top_k=50, seed=4))])
    assert other[0].text != first[0].text


def test_an_answer_ends_before_a_stop_text_that_several_tokens_write():
    ids = (256, *b"A prompt")
    (whole,) = answers([Continue(ids, 20)])
    stop = whole.text[5:8]
    (cut,) = answers([Continue(ids, 20, ("never this one", stop))])
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens < whole.tokens


def test_what_ends_an_answer_is_said():
    ids = (256, *b"ab")
    (new,) = generate(shared_model(), [ids], max_new_tokens=CONTEXT, n_ids=258)
    by_length, to_the_end = answers([Continue(ids, 5), Continue(ids, 1000)], end_ids=())
    assert (by_length.finish_reason, by_length.tokens) == ("length", 5)
    assert (to_the_end.finish_reason, to_the_end.tokens) == ("context", CONTEXT - len(ids))
    (marked,) = answers([Continue(ids, 1000)], end_ids=(new[4],))
    first = new.index(new[4])
    assert (marked.finish_reason, marked.tokens) == ("stop", first + 1)
    assert marked.text == continuation(TOKENIZER, ids, new[:first])


def test_a_repetition_penalty_is_each_rows_own():
    ids = (256, *b"hello")
    found = answers([Continue(ids, 12), Continue(ids, 12, sampling=Sampling(repetition_penalty=1e6))], end_ids=())
    plain, punished = (generate(shared_model(), [ids], max_new_tokens=12, n_ids=258, repetition_penalty=penalty)[0]
                       for penalty in (1.0, 1e6))  # fmt: skip
    assert [answer.text for answer in found] == [continuation(TOKENIZER, ids, new) for new in (plain, punished)]
    assert len(set(punished)) == 12 and plain != punished


def test_logits_that_are_not_finite_are_refused_with_the_number_of_the_request():
    model = with_tokenizer()
    with torch.no_grad():
        model.tok_embeddings.weight[7] = torch.inf
    with pytest.raises(NonFinite, match="at new token 1, .* logits are not finite") as refused:
        answers([Continue((256, 1, 2, 3), 4), Continue((256, 7), 4), Continue((256, 2), 4)], model=model)
    assert refused.value.index == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Continue((), 4), "request 1: a prompt needs at least one token"),
        (Continue((1,) * CONTEXT, 4), "request 1: its prompt of 64 tokens leaves no room in the context of 64"),
        (Continue((1, 999), 4), "request 1: token ids must lie between 0 and 271"),
        (Continue((1,), 0), "request 1: max_new_tokens=0 must be at least 1"),
        (Continue((1,), 4, ("",)), "request 1: a stop text is empty"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_any_work(request_, message):
    with pytest.raises(ValueError, match=message):
        answers([Continue((1,), 4), request_])


def test_searched_answers_are_those_of_generate_beside_others():
    beams, asked = Beams(3, 0.7), prompts(6, seed=8)
    settings = dict(num_beams=3, length_penalty=0.7, max_new_tokens=9, stop_ids=END, n_ids=258)
    expected = [generate(shared_model(), [ids], **settings)[0] for ids in asked]
    requests = [Continue(ids, 9, beams=beams) for ids in asked] + [Continue(ids, 9) for ids in asked]
    for batch_tokens in (1, 300, 10**6):
        found = answers(requests, batch_tokens)
        for ids, new, answer in zip(asked, expected, found, strict=False):
            text = [token for token in new if token != TOKENIZER.eos_id]
            assert answer == Continued(continuation(TOKENIZER, ids, text), len(new), answer.finish_reason)
            assert answer.finish_reason == ("stop" if new[-1] in END else "length")
        assert found[6:] == answers(requests[6:])


def test_a_search_that_is_drawn_from_is_refused_by_its_request():
    asked = [Continue((1,), 4), Continue((1,), 4, sampling=DRAWN, beams=Beams(2))]
    with pytest.raises(ValueError, match="request 1: num_beams=2 does not go with temperature=1.0"):
        answers(asked)


def test_greedy_answers_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    peer = transformers.LlamaForCausalLM(config).eval()
    peer.save_pretrained(tmp_path)
    asked = prompts(8, seed=4, longest=60)
    found = answers([Continue(ids, 20) for ids in asked], model=LLM.from_pretrained(tmp_path))
    for ids, answer in zip(asked, found, strict=True):
        made = peer.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=257)
        new = made[0, len(ids) :].tolist()
        assert answer.text == continuation(TOKENIZER, ids, [token for token in new if token != 257])
        assert answer.tokens == len(new)
