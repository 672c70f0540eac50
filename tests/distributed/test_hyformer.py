"""A model of Hyformer's adapter begins a run, and what the run makes of it comes back into the adapter."""

from pathlib import Path

import pytest
import torch

from llm.siblings.hyformer import Hyformer
from tests.distributed.harness import metrics, run, tiny_config, write_config, write_text
from tests.siblings.small import SIZES, hyformer

pytestmark = [pytest.mark.distributed, pytest.mark.full]
VOCAB = 258  # bytes, and the marks of a text


@pytest.mark.parametrize("task", ["lm", "mlm"])
def test_a_saved_model_begins_a_run_on_two_ranks_and_the_run_is_read_back(tmp_path: Path, task: str) -> None:
    write_text(tmp_path, documents=80)
    begun = hyformer(vocab_size=VOCAB, num_prediction_tasks=3, resid_dropout=0.1)
    begun.save_pretrained(tmp_path / "start")
    raw = tiny_config(
        tmp_path,
        train={"steps": 2, "seq_len": SIZES["max_seq_len"]},
        optim={"weight_decay": 0.0},  # which would shrink the head that these tasks leave alone
        parallel={"tensor": 2},
    )
    raw |= {"model": {"init_from": str(tmp_path / "start")}, "task": task}
    if task == "mlm":
        raw["mlm"] = {"mask_token": 0}
    file = write_config(tmp_path / "run.yaml", raw)
    done = run("launch/pretrain.py", f"--config={file}", f"--run_dir={tmp_path / 'run'}", nproc=2)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 2
    back = Hyformer.from_pretrained(tmp_path / "run")
    assert back.config.resid_dropout == 0.1 and back.config.num_prediction_tasks == 3
    before, after = begun.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    # two steps of AdamW at a warming learning rate of at most 1e-3 move a value by no more than their sum
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert 0 < moved["llm.tok_embeddings.weight"] < 2e-3
    assert torch.equal(before["llm.prediction.weight"], after["llm.prediction.weight"])
