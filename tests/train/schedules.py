"""What tests/train/trainer_job.py runs and tests/train/test_trainer.py expects."""

from typing import Any

EPOCHS: dict[str, Any] = {"steps": None, "epochs": 0.5}
SCHEDULED: dict[str, Any] = {
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "batch_schedule": [[16, 16], [64, 12]],
    "seq_len_schedule": [[0, 12], [32, 24], [48, 48]],
}
CUTS = (2, 5)
"""Steps at which the scheduled run is cut: at a change of the batch, and just after one of the sequences."""
PATIENCE: dict[str, Any] = {"interval": 1, "patience": 2}
