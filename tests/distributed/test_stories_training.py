"""A real pretrained model (stories260K, a Hugging Face folder) trains on, and goes out again."""

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers

from tests.distributed.harness import metrics, run, tiny_config, write_config
from tests.shared import SHARED, needs_shared

pytestmark = [pytest.mark.distributed, pytest.mark.full, needs_shared]

FOLDER = SHARED / "data/weights/stories260K-hf"
TEXT = SHARED / "data/text/tinystories_sample.txt"
HELD_OUT = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step that moves no weight, a whole run on two ranks, and its export."""
    folder = tmp_path_factory.mktemp("stories")
    text = TEXT.read_text(encoding="utf-8", errors="ignore")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    for name, part in (("valid", stories[:HELD_OUT]), ("train", stories[HELD_OUT:-1])):  # the last one is cut off
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in part))
    sections = {
        "parallel": {"tensor": 2},
        "optim": {"lr": 5e-4, "min_lr": 5e-5, "clip_norm": 1.0},
        "train": {"steps": 60, "global_batch_size": 16, "micro_batch_size": 16, "seq_len": 256},
        "eval": {"interval": 20},
    }
    config = tiny_config(folder, **sections)
    config["model"] = {"init_from": str(FOLDER)}
    del config["tokenizer"]  # the model's own
    write_config(folder / "config.yaml", config)
    words = ("--config", str(folder / "config.yaml"), "--run_dir")
    still = ("--train.steps=1", "--optim.warmup_steps=0", "--eval.interval=1", "--optim.lr=1e-12", "--optim.min_lr=0")
    for command in (
        ("launch/pretrain.py", *words, str(folder / "still"), *still),
        ("launch/pretrain.py", *words, str(folder / "run")),
    ):
        done = run(*command, nproc=2)
        assert done.returncode == 0, done.stderr
    done = run("tools/convert.py", "export", str(folder / "run"), str(folder / "exported"), "--format", "hf")
    assert done.returncode == 0, done.stderr
    return folder


def valid_losses(run_dir: Path) -> list[float]:
    return [row["valid_loss"] for row in metrics(run_dir) if "valid_loss" in row]


def test_its_validation_loss_falls(folder: Path) -> None:
    (before,), after = valid_losses(folder / "still"), valid_losses(folder / "run")
    golden = json.loads((FOLDER / "golden_loss.json").read_text())["tinystories_sample_rows512_mean_nll"]
    # other stories, and rows of half the length, whose tokens see less of theirs
    assert before == pytest.approx(golden, rel=0.05)
    assert before - 0.01 > after[0] > after[1] > after[2]


def test_transformers_tells_the_same_story_from_its_export(folder: Path) -> None:
    words = ("--prompt=", "--max_new_tokens=200", "--stop=false")
    reported = run("launch/generate.py", "--model", str(folder / "run"), *words)
    assert reported.returncode == 0, reported.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported").eval()
    (ids,) = theirs.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False, eos_token_id=None)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "exported" / "tokenizer.model"))
    assert reported.stdout == tokenizer.decode(ids[1:].tolist()).rstrip("\n") + "\n"
    assert reported.stdout != (FOLDER / "expected_greedy_200.txt").read_text().rstrip("\n") + "\n"  # it has learned
