"""Texts in and out: nothing is printed that is not final, spaces stay, what a model cannot continue is refused."""

import io
import random

import numpy as np
import pytest
import sentencepiece
import torch

from llm import LLM
from llm.args import RopeScaling
from llm.checkpoint.run_folder import save_template
from llm.errors import NoTokenizer, UserError
from llm.generate import generate
from llm.generation.sampling import Sampling
from llm.generation.text import Continuer, TextStream, context_length, continuation
from llm.pretrained import template_beside
from llm.tokenizer import ByteTokenizer, CharacterTokenizer, SentencePieceTokenizer, Tokenizer
from tests.generation.models import CONTEXT, folder, shared_model, with_tokenizer
from tests.model.models import llama4
from tests.tokenizers.helpers import CODE, made_hf, opened

TEXT = "Once upon a time \u00e9\u00e8 there was \U0001f600\u4e9c a cat.\nIt sat. "


def sentencepiece_with_a_prefix() -> SentencePieceTokenizer:
    """One that puts a space before a text, as Llama 2's does."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, CODE[0][:2000]] * 3), model_writer=written, vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    return SentencePieceTokenizer(written.getvalue(), lossy=True)


class Unpromising(ByteTokenizer):
    """Does not say that an id adds the same bytes after all others."""

    def added_bytes(self, token: int) -> bytes | None:
        return None


@pytest.fixture(scope="module", params=["bytes", "characters", "sentencepiece", "hf", "unpromising"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return {
        "bytes": ByteTokenizer,
        "characters": lambda: CharacterTokenizer("".join(sorted(set(TEXT)))),
        "sentencepiece": sentencepiece_with_a_prefix,
        "hf": lambda: opened(made_hf()),
        "unpromising": Unpromising,
    }[request.param]()


def test_the_pieces_of_a_stream_are_the_text_of_all_ids(tokenizer):
    draw = random.Random(0)
    for prompt_text in ("", TEXT, "a"):
        prompt = tokenizer.prompt_ids(prompt_text)
        for ids in (tokenizer.encode(TEXT), [draw.randrange(tokenizer.vocab_size) for _ in range(200)]):
            text = TextStream(tokenizer, prompt)
            pieces = [*map(text.push, ids), text.end()]
            whole, before = (tokenizer.decode_bytes(part) for part in ([*prompt, *ids], prompt))
            assert "".join(pieces) == whole[len(before) :].decode(errors="replace")
            assert continuation(tokenizer, prompt, ids) == "".join(pieces)


def test_a_character_of_several_tokens_comes_when_it_is_whole():
    text = TextStream(ByteTokenizer(), [256])
    assert [text.push(byte) for byte in "a\u00e9\U0001f600".encode()] == ["a", "", "\u00e9", "", "", "", "\U0001f600"]
    assert [text.push(0xC3), text.end()] == ["", "\ufffd"]


def test_a_continuation_keeps_its_first_space_and_a_document_begins_without():
    tokenizer = sentencepiece_with_a_prefix()
    word = tokenizer.encode("there")
    assert continuation(tokenizer, tokenizer.prompt_ids("Once upon a time" + " there" * 30), word) == " there"
    assert continuation(tokenizer, tokenizer.prompt_ids(""), word) == "there"


def test_a_model_continues_a_text_as_its_ids():
    model = shared_model()
    prompt = ByteTokenizer().prompt_ids("ab")
    (ids,) = generate(model, [prompt], max_new_tokens=20, n_ids=258, stop_ids={257})
    assert model.generate("ab", max_new_tokens=20) == continuation(
        ByteTokenizer(), prompt, [i for i in ids if i != 257]
    )


def test_several_texts_are_continued_as_each_alone():
    model, texts = shared_model(), ["ab", "", "a longer text, this one"]
    for settings in ({}, dict(repetition_penalty=1.2)):
        together = model.generate(texts, max_new_tokens=12, **settings)
        assert together == [model.generate(text, max_new_tokens=12, **settings) for text in texts]
    assert model.generate([]) == []


def test_an_end_mark_ends_a_text_and_is_no_part_of_it():
    model = with_tokenizer()
    tokenizer = ByteTokenizer()
    free = generate(model, [tokenizer.prompt_ids("ab")], max_new_tokens=20, n_ids=256)[0]

    class Ends(ByteTokenizer):
        end_ids = (257, free[4])

    model.tokenizer = Ends()
    first = free.index(free[4])
    expected = continuation(tokenizer, tokenizer.prompt_ids("ab"), free[:first])
    assert model.generate("ab", max_new_tokens=20) == expected
    continuer = Continuer(model, Ends(), "m")
    (done,) = continuer.complete([continuer.prompt("ab")], Sampling(), 20)
    assert (done.finish_reason, done.n_tokens) == ("stop", first + 1)


def test_a_continuation_ends_where_the_context_does():
    continuer = Continuer(shared_model(), ByteTokenizer(), "m")
    prompts = [continuer.prompt("a" * n) for n in (3, CONTEXT - 2)]  # and the begin mark
    near, full = continuer.complete(prompts, Sampling(), 10, stop=False)
    assert (near.finish_reason, near.n_tokens) == ("length", 10)
    assert (full.finish_reason, full.n_tokens) == ("context", 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a" * CONTEXT, rf"the prompt has {CONTEXT + 1} tokens; the context of m is {CONTEXT} tokens"),
        ("a" * (CONTEXT - 1), rf"the prompt has {CONTEXT} tokens; the context of m is {CONTEXT} tokens"),
        ("caf\udce9", r"the prompt is not text in UTF-8: its character 4 is '\\udce9'"),
    ],
    ids=["long", "full", "surrogate"],
)
def test_a_prompt_that_cannot_be_continued_is_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        Continuer(shared_model(), ByteTokenizer(), "m").prompt(text)


def test_a_prompt_with_ids_that_the_model_lacks_names_tokenizer_and_model():
    continuer = Continuer(with_tokenizer(vocab_size=200), ByteTokenizer(), "my/model")
    with pytest.raises(
        UserError, match=r"has token id 256 by the tokenizer of my/model, but the model has rows for ids 0 to 199 only"
    ):
        continuer.prompt("abc")


def test_dynamic_scaling_makes_the_context_longer():
    args = shared_model().args
    assert context_length(args) == CONTEXT
    scaling = RopeScaling(kind="dynamic", factor=4.0, original_max_position=CONTEXT)
    assert context_length(args.model_copy(update={"rope_scaling": scaling})) == 4 * CONTEXT


def test_a_model_from_a_folder_has_the_tokenizer_beside_it(tmp_path):
    model = LLM.from_pretrained(folder(tmp_path / "model"))
    assert model.tokenizer.fingerprint == ByteTokenizer.fingerprint
    assert model.tokenizer is model.tokenizer
    assert model.generate("ab", max_new_tokens=5) == with_tokenizer().generate("ab", max_new_tokens=5)


def test_a_saved_model_keeps_its_tokenizer_and_chat_template_but_not_the_template_of_another_tokenizer(tmp_path):
    made = folder(tmp_path / "model")
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    save_template(template, made)
    LLM.from_pretrained(made).save_pretrained(tmp_path / "saved")
    saved = LLM.from_pretrained(tmp_path / "saved")
    assert saved.tokenizer.fingerprint == ByteTokenizer.fingerprint
    assert template_beside(tmp_path / "saved") == template
    saved.save_pretrained(tmp_path / "other", CharacterTokenizer("abc"))
    assert template_beside(tmp_path / "other") is None


def test_a_model_without_a_tokenizer_works_and_says_what_is_missing(tmp_path):
    model = llama4()
    model.save_pretrained(tmp_path / "bare")
    for bare, name in ((model, "this model"), (LLM.from_pretrained(tmp_path / "bare"), str(tmp_path / "bare"))):
        assert bare.tokenizer is None
        assert bare(torch.tensor([[1, 2]])).logits.shape == (1, 2, 97)
        with pytest.raises(NoTokenizer, match=f"{name} has no tokenizer"):
            bare.generate("ab")


def test_a_damaged_tokenizer_is_named_and_not_taken_for_none(tmp_path):
    made = folder(tmp_path / "model")
    (made / "tokenizer" / "config.json").write_text("{")
    model = LLM.from_pretrained(made)
    with pytest.raises(UserError, match="config.json: damaged"):
        _ = model.tokenizer


@pytest.mark.parametrize("settings", [dict(temperature=-1.0), dict(max_new_tokens=0), dict(top_k=3)], ids=str)
def test_settings_out_of_range_are_value_errors_in_python(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        shared_model().generate("ab", **settings)


def test_sampled_text_depends_on_its_own_seed_alone():
    texts = []
    for seed in (0, 1):
        np.random.seed(seed)
        torch.manual_seed(seed)
        texts.append(shared_model().generate("ab", max_new_tokens=8, temperature=1.0, seed=5))
    assert texts[0] == texts[1]
