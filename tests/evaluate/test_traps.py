"""Fifteen ways in which evaluations have gone wrong: one golden value each, through the tasks and a real model.

References are plain: the model's own logits for one sequence, softmax and sums in float64, and arithmetic by hand.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm import LLM
from llm.evaluate.answer import Asked
from llm.evaluate.encode import Encoder
from llm.evaluate.paired import paired
from llm.evaluate.requests import Answer, Continue, Continued, Request, Score, Scored
from llm.evaluate.runner import Runner
from llm.evaluate.tasks import Document, EvalTask
from llm.tokenizers.base import Tokenizer
from llm.tokenizers.chat import ChatTemplate
from llm.tokenizers.simple import ByteTokenizer
from tests.evaluate.replicas import pictures_of, replica_of
from tests.evaluate.tasks import BOS, TEMPLATE, TOKENIZER, ids, made, scored
from tests.evaluate.test_encode import numbers, small
from tests.model.models import llama4

CONTEXT = 64
TOLERANCE = 5e-6
"""Relative: float32 logits of two orders of the same sums."""
TARGET: dict[str, Any] = {"kind": "loglikelihood", "prompt": "{{ p }}", "target": "{{ t }}"}
TEXT: dict[str, Any] = {"kind": "perplexity", "prompt": "{{ text }}"}


@cache
def model(dtype: torch.dtype = torch.float32, context: int = CONTEXT) -> LLM:
    """Rows for the bytes and for the pieces of `small`."""
    return llama4(vocab_size=280, max_seq_len=context, tie_embeddings=False).to(dtype)


def asked(
    requests: list[Request], tokenizer: Tokenizer = TOKENIZER, batch_tokens: int = 500, **of: Any
) -> list[Answer]:
    found = model(**of)
    runner = Runner(replica_of(found), tokenizer, batch_tokens, tokenizer.end_ids, pictures_of(found))
    answers = dict(one for batch in runner.answers(requests, frozenset()) for one in batch)
    return [answers[i] for i in range(len(requests))]


def done(task: EvalTask, tokenizer: Tokenizer = TOKENIZER, **of: Any) -> tuple[list[Document], dict[str, Any]]:
    """A task from rows to results, each request that differs asked once."""
    documents = task.documents(Encoder(tokenizer, of.get("context", CONTEXT)))
    requests = Asked.of([request for document in documents for request in document.requests])
    answers = asked(requests.requests, tokenizer, **of)
    rest = iter(answers[place] for place in requests.places)
    measures = [task.measure(document, [next(rest) for _ in document.requests]) for document in documents]
    return documents, task.result(documents, measures)


@torch.no_grad()
def plain(context: tuple[int, ...], target: tuple[int, ...], **of: Any) -> float:
    logits = model(**of)(torch.tensor([[*context, *target][:-1]])).logits[0, -len(target) :].double()
    return float(logits.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)].sum())


def near(value: float) -> Any:
    return pytest.approx(value, rel=TOLERANCE)


def test_1_a_continuation_that_the_tokenizer_merges_with_its_context_is_scored_with_it(tmp_path: Path) -> None:
    tokenizer = small(tmp_path)  # "wor" + "ld" is one piece
    pair = Encoder(tokenizer, CONTEXT).pair("a wor", "ld")
    (found,) = asked([Score(pair.context, pair.target)], tokenizer)
    assert pair.joint and isinstance(found, Scored)
    assert found.logprob == near(plain(numbers("<s>", "▁a"), numbers("▁world")))


def test_2_a_continuation_gets_no_space_of_its_own(tmp_path: Path) -> None:
    documents, found = done(made(tmp_path, [{"p": "world", "t": "al"}], **TARGET), small(tmp_path))
    assert documents[0].requests == (Score(numbers("<s>", "▁world"), numbers("▁al")),)
    assert found["perplexity"] == near(math.exp(-plain(numbers("<s>", "▁world"), numbers("▁al"))))


def test_3_bos_stands_once_before_a_text_and_is_scored_nowhere(tmp_path: Path) -> None:
    text = "abcdefghij" * 15  # three windows
    (document,), found = done(made(tmp_path, [{"text": text}], metrics=["ppl"], **TEXT))
    windows = [request for request in document.requests if isinstance(request, Score)]
    assert [window.context.count(BOS) for window in windows] == [1, 0, 0]
    assert all(BOS not in window.target for window in windows)
    whole = sum(plain(window.context, window.target) for window in windows)
    assert found["ppl"] == near(math.exp(-whole / 150)) and found["n_tokens"] == 150


def test_4_an_empty_context_is_bos_alone(tmp_path: Path) -> None:
    _, found = done(made(tmp_path, [{"p": "", "t": "cd"}], **TARGET))
    assert found["perplexity"] == near(math.exp(-plain((BOS,), ids(" cd"))))


def test_5_acc_norm_is_by_characters_and_acc_bytes_by_bytes(tmp_path: Path) -> None:
    keys = {"kind": "multiple_choice", "prompt": "q", "choices": "{{ c }}", "gold": "{{ g }}"}
    choices = ["aaaaaaaaaa", "ééééé", "abc"]  # 10, 5, 3 characters and 10, 10, 3 bytes
    for gold, right in ((0, "acc_norm"), (1, "acc_bytes"), (2, "acc")):
        task = made(tmp_path, [{"c": choices, "g": gold}], metrics=["acc", "acc_norm", "acc_bytes"], **keys)
        (document,) = task.documents(Encoder(TOKENIZER, CONTEXT))
        # by characters -0.5, -0.8, -1; by bytes -0.5, -0.4, -1
        measured = task.measure(document, scored(-5.0, -4.0, -3.0))
        assert [name for name in ("acc", "acc_norm", "acc_bytes") if measured[name]] == [right]


class OneBlank(ByteTokenizer):
    """Reads runs of blanks as one, as SentencePiece models do."""

    def encode(self, text: str) -> list[int]:
        return super().encode(" ".join(text.split()))


def test_6_bits_per_byte_are_of_the_bytes_of_the_text_as_it_stands_summed_before_they_are_divided(
    tmp_path: Path,
) -> None:
    texts = ["  hello   world ", "é" * 20]  # 16 bytes of which 11 are seen, and 40
    _, found = done(made(tmp_path, [{"text": text} for text in texts], **TEXT), OneBlank())
    whole = plain((BOS,), ids("hello world")) + plain((BOS,), ids(texts[1]))
    assert found["bits_per_byte"] == near(-whole / math.log(2) / 56)
    assert (found["n_bytes"], found["n_tokens"]) == (56, 51)


def test_7_perplexity_by_token_word_and_byte_and_of_documents_and_streams_are_different_numbers(tmp_path: Path) -> None:
    rows = [{"text": "ab cd é"}, {"text": "fgh"}]
    apart = sum(plain((BOS,), ids(row["text"])) for row in rows)
    _, found = done(made(tmp_path, rows, metrics=["ppl", "word_ppl", "byte_ppl"], **TEXT))
    assert found["ppl"] == found["byte_ppl"] == near(math.exp(-apart / 11))  # each token of this tokenizer is a byte
    assert found["word_ppl"] == near(math.exp(-apart / 4))
    _, stream = done(made(tmp_path, rows, metrics=["ppl"], stream=True, separator="\n", **TEXT))
    assert stream["ppl"] == near(math.exp(-plain((BOS,), ids("ab cd é\nfgh")) / 12)) != found["ppl"]
    _, pieces = done(made(tmp_path, [{"text": "a world"}], metrics=["ppl", "byte_ppl"], **TEXT), small(tmp_path))
    assert pieces["ppl"] == near(math.exp(-plain(numbers("<s>"), numbers("▁a", "▁world")) / 2))
    assert pieces["byte_ppl"] == near(pieces["ppl"] ** (2 / 7))


def test_8_a_long_context_is_cut_on_the_left_and_counted_and_the_continuation_never(tmp_path: Path) -> None:
    prompt, target = "0123456789" * 8, "abcdefgh"
    documents, found = done(made(tmp_path, [{"p": prompt, "t": target}], **TARGET))
    kept = (BOS, *ids(prompt[-55:]))  # 65 ids, the last of which is only scored: 1 + 55 + 9
    assert documents[0].requests == (Score(kept, ids(f" {target}")),) and found["truncated"] == 1
    assert found["perplexity"] == near(math.exp(-plain(kept, ids(f" {target}"))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_9_no_score_depends_on_what_is_computed_beside_it(dtype: torch.dtype) -> None:
    # contexts that begin alike would be computed once, which the requests decide and no batch does
    requests: list[Request] = [Score((BOS, *range(n, 2 * n)), tuple(range(1 + n % 5))) for n in range(1, 50, 8)]
    alone = [asked([request], dtype=dtype)[0] for request in requests]
    for batch_tokens in (64, 4096):
        assert asked(requests, batch_tokens=batch_tokens, dtype=dtype) == alone


def test_10_each_document_counts_once_whoever_answered_it_and_however_often_it_was_asked(tmp_path: Path) -> None:
    rows = [{"p": "ab", "t": "cd"}, {"p": "ab", "t": "x"}, {"p": "ab", "t": "cd"}, {"p": "y", "t": "z"}]
    task = made(tmp_path, rows, metrics=["perplexity"], **TARGET)
    documents, found = done(task)
    assert len(Asked.of([document.requests[0] for document in documents]).requests) == 3
    each = [plain((BOS, *ids(row["p"])), ids(f" {row['t']}")) for row in rows]
    assert found["n"] == 4 and found["perplexity"] == near(math.exp(-sum(each) / 4))


def test_11_an_answer_ends_before_a_stop_text_of_several_tokens_and_keeps_its_spaces(tmp_path: Path) -> None:
    prompt = (BOS, *ids("ab"))
    (whole,) = asked([Continue(prompt, 24)])
    assert isinstance(whole, Continued) and len(whole.text) > 6
    stop = whole.text[3:6]
    (found,) = asked([Continue(prompt, 24, (stop,))])
    assert isinstance(found, Continued) and found.text == whole.text[: whole.text.index(stop)]
    tokenizer = small(tmp_path)  # its pieces, decoded one by one, lose the space that each begins with
    (written,) = asked([Continue(numbers("<s>", "▁world"), 12)], tokenizer)
    assert isinstance(written, Continued)
    tokens = list(numbers("<s>", "▁world"))
    with torch.no_grad():
        while len(tokens) < 14 and tokens[-1] not in tokenizer.end_ids:
            logits = model()(torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits[: tokenizer.vocab_size].argmax()))
    assert written.text == tokenizer.decode(tokens).removeprefix("world")


def test_12_with_a_chat_template_examples_are_turns_and_nothing_stands_before_an_answer(tmp_path: Path) -> None:
    rows = [{"p": f"q{i}", "t": f"a{i}"} for i in range(2)]
    task = made(tmp_path, rows, fewshot={"k": 1}, **TARGET)
    document = task.documents(Encoder(TOKENIZER, 256), ChatTemplate(TEMPLATE, "t.jinja", TOKENIZER))[0]
    assert document.prompt == "user: q1</s>assistant: a1</s>user: q0</s>assistant:"
    end = TOKENIZER.eos_id
    context = (*ids("user: q1"), end, *ids("assistant: a1"), end, *ids("user: q0"), end, *ids("assistant:"))
    assert document.requests == (Score(context, ids("a0")),)


def test_13_a_score_names_what_it_depends_on(tmp_path: Path) -> None:
    rows = [{"p": f"q{i}", "t": f"a{i}"} for i in range(4)]
    found = done(made(tmp_path, rows, version=3, fewshot={"k": 2, "seed": 7}, **TARGET))[1]
    assert [found[key] for key in ("version", "prompt", "num_fewshot", "fewshot_seed")] == [3, "{{ p }}", 2, 7]
    other = made(tmp_path, rows, version=3, fewshot={"k": 2, "seed": 8}, **TARGET)
    assert found["task_digest"] != other.digest


def test_14_an_answer_is_found_by_rules_whose_use_is_counted_and_never_guessed(tmp_path: Path) -> None:
    texts = ["The answer is (B). Not (A).", "(A) or (B)? I say B", "Both are possible", "A cat"]
    rules = [r"answer is \(([AB])\)", r"\b([AB])$"]
    rows = [{"q": "x", "g": gold} for gold in "BABA"]
    task = made(tmp_path, rows, kind="generate", prompt="{{ q }}", gold="{{ g }}", extract=rules)
    documents = task.documents(Encoder(TOKENIZER, 256))
    measures = [task.measure(one, [Continued(text, 9, "stop")]) for one, text in zip(documents, texts, strict=True)]
    found = task.result(documents, measures)
    assert [measured["exact_match"] for measured in measures] == [1.0, 0.0, 0.0, 0.0]
    assert (found["exact_match"], found["by_fallback"], found["not_extracted"]) == (0.25, 1, 2)


def test_15_a_score_has_its_standard_error_and_two_models_are_compared_by_document(tmp_path: Path) -> None:
    keys = {"kind": "multiple_choice", "prompt": "q", "choices": ["a", "b"], "gold": "0", "metrics": ["acc"]}
    task = made(tmp_path, [{"i": i} for i in range(8)], **keys)
    documents = task.documents(Encoder(TOKENIZER, CONTEXT))
    first, second = (
        [task.measure(one, scored(-1.0, -2.0 if right else 0.0)) for one, right in zip(documents, rights, strict=True)]
        for rights in ([1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0])
    )
    found = task.result(documents, first)
    assert (found["acc"], found["n"]) == (0.75, 8)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 7))
    compared = paired(*(np.array([measured["acc"] for measured in one], dtype=float) for one in (first, second)))
    assert (compared.difference, compared.better, compared.worse) == (-0.125, 0, 1)
    # the differences are seven 0 and one -1: their deviation is sqrt(1/8), far below that of two scores apart
    assert compared.stderr == pytest.approx(math.sqrt(1 / 8) / math.sqrt(8))
    assert compared.p == 1.0
