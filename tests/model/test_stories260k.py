"""A real pretrained model (stories260K) through our modules: golden logits and the golden story."""

import json

import numpy as np
import pytest
import torch

from llm import LLM, ModelArgs
from llm.generate import generate
from tests.model.test_llama4 import common_name
from tests.shared import SHARED, needs_shared

FOLDER = SHARED / "data/weights/stories260K-hf"
pytestmark = needs_shared


@pytest.fixture(scope="module")
def stories() -> LLM:
    from safetensors.torch import load_file

    config = json.loads((FOLDER / "config.json").read_text())
    model = LLM(
        ModelArgs(
            dim=config["hidden_size"], n_layers=config["num_hidden_layers"], n_heads=config["num_attention_heads"],
            n_kv_heads=config["num_key_value_heads"], vocab_size=config["vocab_size"],
            ffn_hidden=config["intermediate_size"], rope_theta=config["rope_parameters"]["rope_theta"],
            norm_eps=config["rms_norm_eps"], rope_interleaved=False, tie_embeddings=True,
        )
    )  # fmt: skip
    weights = {common_name(name): weight for name, weight in load_file(FOLDER / "model.safetensors").items()}
    weights.pop("output.weight", None)
    model.load_state_dict(weights)
    return model


def test_logits_are_the_golden_ones(stories):
    prompt = torch.from_numpy(np.load(FOLDER / "golden_prompt_ids.npy").astype(np.int64)).view(1, -1)
    golden = torch.from_numpy(np.load(FOLDER / "golden_logits.npy")).float().view(1, prompt.shape[1], -1)
    with torch.no_grad():
        logits = stories(prompt).logits
    # 1e-5 of the largest logit (about 10): float32 sums in another order
    torch.testing.assert_close(logits, golden, rtol=0, atol=1e-5 * golden.abs().max().item())


def test_greedy_sampling_tells_the_golden_story(stories):
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
    (new,) = generate(stories, [[1]], max_new_tokens=200)
    assert tokenizer.decode(new).strip() == (FOLDER / "expected_greedy_200.txt").read_text().strip()
