"""Streams of text: their pieces are the whole text, whole characters, and nothing of a stop text."""

import random
from collections.abc import Sequence

import pytest

from llm.errors import NoTokenizer
from llm.generate import generate
from llm.generation.beams import Beams, beam_search
from llm.generation.sampling import Sampling
from llm.generation.stops import StopTexts
from llm.generation.text import Continuer
from llm.tokenizer import ByteTokenizer
from tests.generation.models import CONTEXT, shared_model, with_tokenizer
from tests.model.models import llama4

END = ByteTokenizer().end_ids


def cut(text: str, stops: list[str]) -> str:
    """By looking at each beginning of a text: up to the first stop text that becomes whole in it."""
    for end in range(len(text) + 1):
        for stop in stops:
            if stop in text[:end]:
                return text[: text.index(stop)]
    return text


@pytest.mark.parametrize("stops", [["aab"], ["ab", "ba"], ["aaaa", "b"], ["aba", "abab", "bb"], []], ids=str)
def test_what_comes_before_a_stop_text_comes_whatever_the_pieces(stops: list[str]) -> None:
    draw = random.Random(0)
    for _ in range(60):
        text = "".join(draw.choice("aab") for _ in range(12))
        found, left = StopTexts(stops), text
        pieces = []
        while left:
            n = draw.randrange(1, 4)
            pieces.append(found.push(left[:n]))
            left = left[n:]
            assert not any(stop in "".join(pieces) for stop in stops)
        whole = "".join([*pieces, found.end()])
        # of stop texts that one piece makes whole, the earliest counts: what comes never has more than letter by letter
        assert cut(text, stops).startswith(whole)
        assert whole == cut(text, stops) or len(stops) > 1
        assert found.stopped == any(stop in text for stop in stops)


def test_only_what_may_begin_a_stop_text_waits() -> None:
    found = StopTexts(["END"])
    assert [found.push(part) for part in ("the E", "N", "N", " EN")] == ["the ", "", "ENN", " "]
    assert found.end() == "EN" and not found.stopped


@pytest.mark.parametrize("settings", [dict(), dict(temperature=1.0, seed=3), dict(repetition_penalty=1.4)], ids=str)
def test_pieces_of_a_stream_are_what_generate_gives(settings: dict[str, float]) -> None:
    model = shared_model()
    pieces = list(model.stream("a\u00e9 b", max_new_tokens=40, **settings))  # type: ignore[arg-type]
    whole = model.generate("a\u00e9 b", max_new_tokens=40, **settings)
    assert "".join(pieces) == whole and len(pieces) > 1 and "" not in pieces


def test_a_stream_gives_each_piece_before_the_next_token_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, computed = with_tokenizer(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: (computed.append(1), forward(*args, **kwargs))[1])
    text = model.stream("ab", max_new_tokens=20, temperature=1.0, seed=3)
    assert not computed
    next(text)
    first = len(computed)
    assert 1 <= first < 20
    list(text)
    assert len(computed) > first


def test_a_stop_text_ends_generate_and_streams_before_it_and_takes_no_token_after() -> None:
    model = with_tokenizer()
    settings = dict(max_new_tokens=40, temperature=1.0, seed=5)
    whole = model.generate("ab", **settings)
    stop = whole[7:9]
    assert model.generate("ab", stop_texts=[stop, "never"], **settings) == whole[: whole.index(stop)]
    assert "".join(model.stream("ab", stop_texts=[stop], **settings)) == whole[: whole.index(stop)]  # type: ignore[arg-type]
    continuer = Continuer(model, ByteTokenizer(), "it")
    (done,) = continuer.complete([continuer.prompt("ab")], Sampling(1.0, seed=5), 40, stop_texts=[stop])
    assert done.finish_reason == "stop" and done.n_tokens < 40


def test_rows_end_at_stop_texts_by_themselves() -> None:
    model, settings = shared_model(), dict(max_new_tokens=30, temperature=1.0, seed=2, stop=False)
    free = model.generate(["ab", "xyz", "q"], **settings)
    stop = free[1][5:7]
    cut_rows = model.generate(["ab", "xyz", "q"], stop_texts=[stop], **settings)
    assert cut_rows == [text[: text.index(stop)] if stop in text else text for text in free]


def test_a_search_gives_the_text_of_its_best_tokens() -> None:
    model, texts = shared_model(), ["ab", "", "a longer one"]
    tokenizer = ByteTokenizer()
    prompts = [tokenizer.prompt_ids(text) for text in texts]
    settings = dict(num_beams=3, length_penalty=0.7)
    ids = generate(
        model, prompts, max_new_tokens=12, n_ids=tokenizer.vocab_size, stop_ids=tokenizer.end_ids, **settings
    )  # type: ignore[arg-type]
    found = model.generate(texts, max_new_tokens=12, **settings)
    expected = [tokenizer.decode_bytes([i for i in row if i not in tokenizer.end_ids]) for row in ids]
    assert [text.encode() for text in found] == [b.decode(errors="replace").encode() for b in expected]
    assert found != model.generate(texts, max_new_tokens=12)


def test_a_search_says_why_its_text_ended() -> None:
    model = with_tokenizer()
    continuer = Continuer(model, ByteTokenizer(), "it")
    prompts = [continuer.prompt("ab"), continuer.prompt("x" * (CONTEXT - 4))]
    near, full = continuer.complete(prompts, Sampling(), 6, stop=False, beams=Beams(2))
    assert (near.finish_reason, near.n_tokens) == ("length", 6)
    assert (full.finish_reason, full.n_tokens) == ("context", CONTEXT - len(prompts[1].ids))


def test_a_search_takes_continuations_with_a_stop_text_as_finished() -> None:
    model, settings = with_tokenizer(), dict(max_new_tokens=10, num_beams=3)
    free = model.generate("ab", **settings)
    stop = free[2:4]
    found = model.generate("ab", stop_texts=[stop], **settings)
    assert stop not in found
    tokenizer = ByteTokenizer()
    prompt = tokenizer.prompt_ids("ab")

    def ended(row: int, ids: Sequence[int]) -> bool:
        return stop.encode() in tokenizer.decode_bytes(list(ids))

    (rows,) = beam_search(model, [prompt], Beams(3), max_new_tokens=10, n_ids=258, stop_ids=END, ended=ended)
    best = tokenizer.decode_bytes([i for i in rows[0].tokens if i not in END]).decode(errors="replace")
    assert found == best.partition(stop)[0]
    assert any(ended(0, one.tokens) for one in rows)


def test_what_does_not_go_together_is_said_at_once() -> None:
    model = shared_model()
    with pytest.raises(ValueError, match="a stop text is empty"):
        model.stream("ab", stop_texts=["x", ""])
    with pytest.raises(ValueError, match="temperature=-1"):
        model.stream("ab", temperature=-1)
    with pytest.raises(NoTokenizer, match="has no tokenizer"):
        llama4().stream("ab")
    with pytest.raises(ValueError, match="num_beams=2 does not go with temperature=0.5"):
        model.generate("ab", num_beams=2, temperature=0.5)
