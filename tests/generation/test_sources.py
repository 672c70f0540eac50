"""Answers of encoder-decoders: those of transformers and of a search without a cache, each row by its own source."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm import LLM, ModelArgs
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.generate import generate
from llm.generation.beams import Beams, beam_search
from llm.generation.text import Continuer
from llm.jobs.generate import continue_prompt
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.parallel.replica import Replica
from llm.tokenizer import ByteTokenizer
from tests.evaluate.tasks import TEMPLATE
from tests.model.models import tokens
from tests.model.test_encoder import BASE, KINDS, encoder_decoder

SOURCES = [row[:n].tolist() for row, n in zip(tokens(4, 20, seed=3), (5, 1, 20, 9), strict=True)]
BEGIN, ENDS = 2, {5, 17, 40, 71}
PROMPTS = [[BEGIN]] * 4
CONTEXT = 32


@pytest.fixture(scope="module")
def texts() -> LLM:
    """One with a tokenizer, which no test may change."""
    model = encoder_decoder(vocab_size=272, max_seq_len=CONTEXT, init_std=0.3)
    model.tokenizer = ByteTokenizer()
    return model


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, LLM]:
    """A random BART of transformers, and ours with its weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.BartConfig(
        vocab_size=24, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.6,
        pad_token_id=3, bos_token_id=0, eos_token_id=1, decoder_start_token_id=BEGIN, forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    folder: Path = tmp_path_factory.mktemp("bart")
    model.save_pretrained(folder)
    return model, LLM.from_pretrained(folder)


BART_SOURCES = [[4, 5, 6, 7, 8, 9], [10], [11, 12, 13, 14, 15, 16, 17, 18, 19], [20, 21, 22]]


@pytest.mark.parametrize("early_stopping", [False, True], ids=["patient", "early"])
@pytest.mark.parametrize("length_penalty", [0.6, 1.4])
@pytest.mark.parametrize("num_beams", [1, 3, 5])
def test_answers_are_those_of_transformers(
    bart: tuple[object, LLM], num_beams: int, length_penalty: float, early_stopping: bool
) -> None:
    theirs, ours = bart
    settings = dict(length_penalty=length_penalty, early_stopping=early_stopping) if num_beams > 1 else {}
    found = generate(
        ours, PROMPTS, sources=BART_SOURCES, max_new_tokens=14, stop_ids=[1], num_beams=num_beams, **settings
    )  # type: ignore[arg-type]
    longest = max(map(len, BART_SOURCES))
    ids = torch.tensor([source + [3] * (longest - len(source)) for source in BART_SOURCES])
    mask = torch.tensor([[1] * len(source) + [0] * (longest - len(source)) for source in BART_SOURCES])
    made = theirs.generate(  # type: ignore[attr-defined]
        ids, attention_mask=mask, max_new_tokens=14, num_beams=num_beams, do_sample=False, **settings
    )
    assert found == [_up_to_end(row[1:].tolist()) for row in made]
    if early_stopping or length_penalty < 1:  # else the longest win
        assert len({len(row) for row in found}) > 1


def _up_to_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(1) + 1] if 1 in ids else ids


class Uncached:
    """A decoder that reads the sources and computes each row from its beginning at every step."""

    def __init__(self, model: LLM) -> None:
        self.model, self.rows, self.sources = model, list[list[int]](), list[Tensor]()

    def logits(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        images: Tensor | None = None,
        source: TransformerInput | None = None,
    ) -> Tensor:
        if source is not None:
            assert isinstance(source.tokens_position, Tensor)
            self.sources = [row[at >= 0] for row, at in zip(source.tokens, source.tokens_position, strict=True)]
        new = [row[at >= 0].tolist() for row, at in zip(tokens, positions, strict=True)]
        self.rows = [old + ids for old, ids in zip(self.rows or [[]] * len(new), new, strict=True)]
        found = []
        for row, read in zip(self.rows, self.sources, strict=True):
            logits = self.model(TransformerInput(torch.tensor([row]), source=TransformerInput(read[None]))).logits
            assert logits is not None
            found.append(logits[0, -1].detach())
        return torch.stack(found)

    def keep(self, rows: list[int]) -> None:
        self.rows, self.sources = [self.rows[i] for i in rows], [self.sources[i] for i in rows]


@pytest.mark.parametrize("kind", ["post_add", "local"])
def test_a_search_through_the_cache_is_that_of_full_forwards(kind: str) -> None:
    model = encoder_decoder(**KINDS[kind])
    settings = dict(max_new_tokens=[6, 1, 5], stop_ids=ENDS, sources=SOURCES[:3])
    found, slow = (
        beam_search(one, PROMPTS[:3], Beams(3, 0.8), **settings)  # type: ignore[arg-type]
        for one in (model, Uncached(model))
    )
    assert [[one.tokens for one in row] for row in found] == [[one.tokens for one in row] for row in slow]


@pytest.mark.parametrize("drawn", [dict(), dict(temperature=1.0, seed=4), dict(num_beams=3)], ids=str)
def test_rows_do_not_influence_each_other(drawn: dict[str, float]) -> None:
    model = encoder_decoder(moe=dict(n_experts=3, hidden=24))
    settings = dict(max_new_tokens=8, stop_ids=ENDS) | drawn
    together = generate(model, PROMPTS, sources=SOURCES, **settings)  # type: ignore[arg-type]
    first = generate(model, PROMPTS[:1], sources=SOURCES[:1], **settings)[0]  # type: ignore[arg-type]
    assert together[0] == first
    others = [SOURCES[0], *[source[::-1] for source in SOURCES[1:]]]
    assert generate(model, PROMPTS, sources=others, **settings)[0] == first  # type: ignore[arg-type]
    assert len({tuple(row) for row in together}) > 1


def test_a_replica_answers_as_its_model_does() -> None:
    args = ModelArgs.model_validate(BASE | dict(init_std=0.15, max_seq_len=64))
    replica = Replica.build(args, 3, make_grid(World(0, 1, 0, torch.device("cpu"))))
    for settings in (dict(), dict(num_beams=3)):
        found, expected = (
            generate(one, PROMPTS, sources=SOURCES, max_new_tokens=6, **settings)  # type: ignore[arg-type]
            for one in (replica.decoder(), replica.model)
        )
        assert found == expected


def test_a_text_is_what_the_encoder_reads_and_the_answer_begins_with_the_mark(texts: LLM) -> None:
    tokenizer = ByteTokenizer()
    sources = [[256, *text.encode(), 257] for text in ("ab", "", "a longer one")]
    for settings in (dict(), dict(num_beams=3)):
        ids = generate(
            texts, [[256]] * 3, sources=sources, max_new_tokens=9, n_ids=258, stop_ids=tokenizer.end_ids, **settings
        )  # type: ignore[arg-type]
        expected = [tokenizer.decode([i for i in row if i != 257]) for row in ids]
        assert texts.generate(["ab", "", "a longer one"], max_new_tokens=9, **settings) == expected
    assert "".join(texts.stream("ab", max_new_tokens=9)) == texts.generate("ab", max_new_tokens=9)


def test_the_command_line_writes_answers_to_prompts(
    texts: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file, output = tmp_path / "model", tmp_path / "in.txt", tmp_path / "out.jsonl"
    texts.save_pretrained(model, ByteTokenizer())
    continue_prompt(str(model), "ab", max_new_tokens=6, threads=1, dtype="fp32")
    assert capsys.readouterr().out == texts.generate("ab", max_new_tokens=6) + "\n"
    file.write_text("ab\nthe other\n")
    named = dict(prompts=str(file), output=str(output), max_new_tokens=6, num_beams=2, threads=1, dtype="fp32")
    continue_prompt(str(model), **named)  # type: ignore[arg-type]
    written = [json.loads(line)["completion"] for line in output.read_text().splitlines()]
    assert written == texts.generate(["ab", "the other"], max_new_tokens=6, num_beams=2)
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    with pytest.raises(UserError, match="is an encoder-decoder, which answers a text and keeps no conversation"):
        continue_prompt(str(model), "ab", chat=True, chat_template=str(template), threads=1)


def test_what_does_not_fit_is_said(texts: LLM) -> None:
    with pytest.raises(ValueError, match="give sources, what its encoder is to read"):
        generate(texts, [[1]], max_new_tokens=2)
    with pytest.raises(ValueError, match="2 sources for 1 prompts"):
        generate(texts, [[1]], sources=[[1], [2]], max_new_tokens=2)
    with pytest.raises(ValueError, match="every source needs at least one token"):
        generate(texts, [[1]], sources=[[]], max_new_tokens=2)
    plain = LLM(ModelArgs.model_validate(BASE | dict(encoder_layers=0)))
    with pytest.raises(ValueError, match="the model has no encoder"):
        generate(plain, [[1]], sources=[[1]], max_new_tokens=2)
    continuer = Continuer(texts, ByteTokenizer(), "it")
    assert len(continuer.prompt("x" * (CONTEXT - 2)).source) == CONTEXT
    with pytest.raises(UserError, match=f"the prompt has {CONTEXT + 1} tokens; the encoder of it reads {CONTEXT} at"):
        continuer.prompt("x" * (CONTEXT - 1))

