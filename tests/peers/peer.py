"""Run in the environment of the peers: what TRL makes of rows, written as JSON. Imports nothing of this project.

.venv-peers/bin/python tests/peers/peer.py sft FOLDER     labels of SFTTrainer for each conversation of rows.json
.venv-peers/bin/python tests/peers/peer.py dpo FOLDER     loss of DPOTrainer over all pairs of rows.json
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import datasets
import torch
import transformers
import trl


def sft(folder: Path, rows: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    """Ids and labels of each row, as the trainer's collator makes them."""
    config = trl.SFTConfig(assistant_only_loss=True, max_length=None, **settings)
    trainer = trl.SFTTrainer(model_in(folder / "model"), config, None, rows, processing_class=tokenizer)
    found = [trainer.data_collator([sample]) for sample in trainer.train_dataset]
    return [{"tokens": one["input_ids"][0].tolist(), "labels": one["labels"][0].tolist()} for one in found]


def dpo(folder: Path, rows: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    """The mean loss and the ids of each pair."""
    said = json.loads((folder / "dpo.json").read_text())
    config = trl.DPOConfig(max_length=None, **said, **settings)
    model, reference = (model_in(folder / name) for name in ("model", "reference"))
    trainer = trl.DPOTrainer(model, reference, args=config, train_dataset=rows, processing_class=tokenizer)
    pairs = list(trainer.train_dataset)
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(pairs))
    ids = [[pair["prompt_ids"] + pair[key] for key in ("chosen_ids", "rejected_ids")] for pair in pairs]
    return {"loss": float(loss), "ids": ids}


def model_in(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()


def main(job: str, folder: Path) -> None:
    rows = datasets.Dataset.from_list(json.loads((folder / "rows.json").read_text()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    settings = {
        "output_dir": str(folder / "out"), "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no",
        "remove_unused_columns": False,
    }  # fmt: skip
    found = {"sft": sft, "dpo": dpo}[job](folder, rows, tokenizer, settings)
    (folder / f"{job}.found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
