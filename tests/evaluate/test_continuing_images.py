"""Prompts with images: each is answered as alone, beside others with and without images."""

import pytest

from llm import LLM
from llm.evaluate.continuing import continue_
from llm.evaluate.requests import Continue
from llm.generation.text import Continuer
from tests.evaluate.replicas import replica_of
from tests.generation.test_images import GREEDY, SEES, TOKENIZER, VISION
from tests.model.models import llama4
from tests.vision.pictures import picture


@pytest.fixture(scope="module")
def model() -> LLM:
    made = llama4(0, vocab_size=TOKENIZER.vocab_size, max_seq_len=128, tie_embeddings=False, vision=VISION)
    made.tokenizer = TOKENIZER
    return made


def test_images_fill_the_slots_of_their_own_prompt(model, tmp_path):
    for number, (name, size) in enumerate(SEES.items()):
        picture(*size, number).save(tmp_path / f"{name}.png")
    continuer = Continuer(model, TOKENIZER, "m")
    asked = [("abc<image>", ["small.png"]), ("a text alone", []), ("<image>z<image>", ["high.png", "small.png"])]
    prompts = [continuer.prompt(text, pictures=continuer.pictures.under(tmp_path, names)) for text, names in asked]
    expected = [continuer.complete([prompt], GREEDY, 6, stop=False)[0] for prompt in prompts]
    requests = [Continue(tuple(prompt.ids), 6, pictures=prompt.pictures) for prompt in prompts]
    for batch_tokens in (1, 1000):
        found = dict(continue_(replica_of(model), TOKENIZER, (), requests, batch_tokens, continuer.pictures))
        assert [found[index].text for index in range(3)] == [done.text for done in expected]
