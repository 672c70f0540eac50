"""What is trained of conversations and pairs is what TRL trains of them. `make test-full` makes its environment."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm import LLM
from llm.data.batch import collate
from llm.data.conversation import read_conversation, read_preference
from llm.data.found import Found
from llm.data.packed import PAIR, Packed
from llm.data.sample import Sample
from llm.data.samples import SampleSource, StoredItem, write_samples
from llm.data.source import TokenizerEntry
from llm.environment import alone
from llm.objectives import Objectives
from llm.pretrained import tokenizer_of
from llm.tasks.base import REFERENCE
from llm.tasks.dpo import Preference
from llm.tokenizers.chat.find import find_source, open_template
from llm.tokenizers.chat.template import ChatTemplate

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
CONTROLS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
"""The last one ends a turn."""

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not PEERS.is_file(), reason=f"{PEERS.parents[1].name} is not there; make test-full makes it"),
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CONVERSATIONS = [
    [user("hi"), answer("Hello! How can I help?")],
    [{"role": "system", "content": "Be brief."}, user("Name a colour."), answer("Red."), user("More"), answer("Blue")],
    [user("naïve café 東京 🙂"), answer("déjà vu — 東京 🙂🙂")],
    [user("code?"), answer("def f(x):\n    return {x: 1}\n\n# {{ braces }} {% stay %}")],
    [user("a"), answer("b"), user("c"), answer("d"), user("e"), answer("f")],
    [user("nothing"), answer("")],
]  # fmt: skip
PAIRS = [
    {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [answer(text)]}
    for turns, text in zip(CONVERSATIONS[:5], ["no", "Purple? Maybe.", "x", "pass", "not f, but g and h"], strict=True)
]


def make(folder: Path, template: str) -> ChatTemplate:
    """A model folder with a tokenizer of byte pairs and the template, and that template opened as ours."""
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator((turn["content"] for turns in CONVERSATIONS for turn in turns), trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    controls = CONTROLS[template]
    fast.add_special_tokens(
        {
            "additional_special_tokens": controls,
            "bos_token": "<|bos|>",
            "eos_token": controls[-1],
            "pad_token": "<|pad|>",
        }
    )
    fast.chat_template = find_source(template, None).text
    fast.save_pretrained(folder / "model")
    for seed, name in enumerate(("model", "reference")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=256, initializer_range=0.2, bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
    return open_template("auto", tokenizer_of(folder / "model"), folder / "model")


def in_trl(job: str, folder: Path, rows: Any) -> Any:
    (folder / "rows.json").write_text(json.dumps(rows))
    command = [str(PEERS), str(Path(__file__).with_name("peer.py")), job, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**alone(), "HF_HUB_OFFLINE": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / f"{job}.found.json").read_text())


@pytest.mark.parametrize("name", list(CONTROLS))
def test_sfttrainer_has_our_tokens_and_trains_those_that_we_train(tmp_path: Path, name: str) -> None:
    template = make(tmp_path, name)
    rows = [{"messages": turns} for turns in CONVERSATIONS]
    for row, found in zip(rows, in_trl("sft", tmp_path, rows), strict=True):
        ours = template.sample(read_conversation(row))
        assert ours.tokens.tolist() == found["tokens"]
        labels = np.where(ours.weights > 0, ours.tokens, -100)
        assert labels.tolist() == found["labels"], row


def rows_of(folder: Path, pairs: Sequence[tuple[Sample, Sample]], vocab_size: int, reference: LLM) -> Packed:
    """Rows of the pairs, with the reference model's sums."""
    entry = TokenizerEntry(kind="huggingface", fingerprint="", vocab_size=vocab_size, bos_id=0, eos_id=0)
    items = (StoredItem(pair, str(i), "", i.to_bytes(16, "little")) for i, pair in enumerate(pairs))
    write_samples(items, "preference", 2, entry, folder / "stored", lambda: Found(endings=()))
    packed = Packed(SampleSource.open(folder / "stored"), 240, seed=0, target="dpo")
    sums = []
    for sample in (sample for pair in pairs for sample in pair):
        ids = torch.from_numpy(np.asarray(sample.tokens))
        logp = reference(ids[None, :-1]).logits[0].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        sums.append(float(logp[torch.from_numpy(sample.weights[1:] > 0)].sum()))
    packed.with_numbers(REFERENCE, np.array(sums, dtype=np.float32))
    return packed


@pytest.mark.parametrize("beta", [0.1, 0.5])
@torch.no_grad()
def test_the_loss_of_pairs_is_that_of_dpotrainer(tmp_path: Path, beta: float) -> None:
    """Without label smoothing, which TRL leaves out of its sigmoid loss."""
    template = make(tmp_path, "llama3")
    (tmp_path / "dpo.json").write_text(json.dumps({"beta": beta}))
    found = in_trl("dpo", tmp_path, PAIRS)
    parts = [read_preference(row) for row in PAIRS]
    pairs = [(template.sample(pair.chosen), template.sample(pair.rejected)) for pair in parts]
    assert [[sample.tokens.tolist() for sample in pair] for pair in pairs] == found["ids"]
    model, reference = (LLM.from_pretrained(tmp_path / name) for name in ("model", "reference"))
    packed = rows_of(tmp_path, pairs, model.args.vocab_size, reference)
    rows = [packed.read(k, 0) for k in range(packed.n_rows)]
    batch = collate(rows, packed.seq_len, targets=("dpo",), values=(PAIR, REFERENCE))
    objectives = Objectives([Preference(beta)])
    total = model(batch.inputs, losses=objectives.losses_of(model, batch)).losses["dpo"].total
    # float32: sums in another order; TRL pads where we pack
    assert float(total) / objectives.count([batch]).main == pytest.approx(found["loss"], rel=1e-5)
