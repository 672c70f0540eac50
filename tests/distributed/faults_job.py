"""Run under torchrun: a run with three checkpoints, then every fault on a copy of its folder, each met by an automatic
resume and, in a fresh folder, by one that names the damaged checkpoint; last a config that differs in all that must
not. Rank 0 writes what became of each as JSON.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from llm.checkpoint.store import CheckpointStore
from llm.errors import UserError
from llm.parallel.collectives import gather_json, main_decides
from llm.parallel.launch import process
from llm.parallel.launch.world import World
from llm.tokenizer import CharacterTokenizer
from llm.train import run as run_module
from llm.train.config import validate
from llm.train.trainer import Trainer
from tests.checkpoint.faults import STEPS, Fault, all_faults, canary_of, checkpoint

TRAINED_ON = "a bit of the header, rank_00001.safetensors of step 6"
"""The fault after which the run is trained to its end."""


def state(trainer: Trainer) -> str:
    """Digest of all that the next steps depend on, of all ranks."""
    mine = hashlib.blake2b()
    for name, kind, *_, values in trainer.run.engine.state.fragments():
        mine.update(f"{name} {kind}".encode() + values.detach().numpy().tobytes())
    progress, engine = trainer.progress, trainer.run.engine
    position = [progress.step, progress.consumed_rows, progress.tokens, engine.state.scalars()]
    position.append(engine.replica.expert_counts().tolist())
    whole = gather_json([mine.hexdigest(), position], trainer.run.world)
    return hashlib.blake2b(json.dumps(whole).encode()).hexdigest()


def store_of(run_dir: Path, world: World) -> CheckpointStore:
    return CheckpointStore(run_dir / "checkpoints", world, keep=9, keep_best=False)


def copy(run_dir: Path, to: Path, world: World) -> Path:
    """A copy for all ranks."""
    main_decides(lambda: str(shutil.copytree(run_dir, to, symlinks=True)), world)
    return to


def damage(fault: Fault, run_dir: Path, world: World) -> None:
    """Make the fault, and go on when it is there."""

    def apply() -> None:
        fault.apply(run_dir)

    main_decides(apply, world)


def resumed(trainer: Trainer, run_dir: Path, resume: str = "auto") -> dict[str, Any]:
    """What the trainer makes of another run folder: its step and state with the lines said, or the error."""
    trainer.run.folder, trainer.progress.step = run_dir, 0
    trainer.run.store = store_of(run_dir, trainer.run.world)
    chosen = trainer.run.config.checkpoint.model_copy(update={"resume": resume})
    trainer.run.config = trainer.run.config.model_copy(update={"checkpoint": chosen})
    try:
        lines = trainer.resume()
    except UserError as error:
        assert error.agreed
        return {"error": str(error), "step": trainer.progress.step}
    return {"lines": lines, "step": trainer.progress.step, "state": state(trainer)}


def meet(fault: Fault, trainer: Trainer, whole: Path, folder: Path) -> dict[str, Any]:
    """What becomes of the fault."""
    world = trainer.run.world
    run_dir = copy(whole, folder / "faulty", world)
    damage(fault, run_dir, world)
    named = checkpoint(run_dir, max(fault.damaged))
    found = {
        "explicit": resumed(trainer, folder / "fresh", str(named)),
        "auto": resumed(trainer, run_dir),
        "aside": main_decides(lambda: sorted(path.name for path in (run_dir / "checkpoints").iterdir()), world),
        "executed": main_decides(lambda: canary_of(run_dir).exists(), world),
    }
    if fault.name == TRAINED_ON:
        trainer.run.folder = copy(whole, folder / "continued", world)
        trainer.run.store = store_of(trainer.run.folder, world)
        damage(fault, trainer.run.folder, world)
        main_decides(lambda: (trainer.run.folder / "tokenizer" / "config.json").unlink(), world)  # which a run mends
        trainer.fit()
    main_decides(lambda: shutil.rmtree(run_dir), world)
    return found


def differences(config_path: Path, whole: Path, folder: Path, world: World) -> list[str]:
    """What a run of another config reports in the folder of the whole run, and of a checkpoint of it by name, where
    neither data nor a model are to be had.
    """
    raw = yaml.safe_load(config_path.read_text())
    raw["model"] |= {"dim": 64, "vocab_size": 300, "n_layers": 8, "tie_embeddings": True}
    raw["tokenizer"] = {"kind": "characters", "path": str(folder / "letters.json")}
    raw["train"] |= {"seq_len": 32}
    raw["optim"] |= {"name": "sgd"}
    main_decides(lambda: (folder / "letters.json").write_bytes(CharacterTokenizer("abc").serialized()), world)
    reported = []
    for run_dir, resume in ((whole, "auto"), (folder / "fresh", str(checkpoint(whole, STEPS[-1])))):
        config = validate(raw | {"checkpoint": {"resume": resume}}, "changed")
        with (
            patch.object(run_module, "rows_wanted", side_effect=AssertionError("too late")),
            patch.object(run_module, "build_engine", side_effect=AssertionError("too late")),
        ):
            try:
                Trainer(config, run_dir, world)
            except UserError as error:
                reported.append(str(error))
    return reported


def main() -> None:
    config_path, folder, wanted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    process.quiet_libraries()
    world = process.start(60, 1)
    config = validate(yaml.safe_load(config_path.read_text()), str(config_path))
    whole = folder / "whole"
    trainer = Trainer(config, whole, world)
    trainer.fit()
    clean: dict[int, str] = {}
    for step in STEPS:
        found = resumed(trainer, folder / "fresh", str(checkpoint(whole, step)))
        clean[step] = found["state"]
    faults = [fault for fault in all_faults() if not wanted or fault.name in wanted]
    results = {
        "clean": clean,
        "faults": {fault.name: meet(fault, trainer, whole, folder) for fault in faults},
        "differences": differences(config_path, whole, folder, world),
    }
    if world.is_main:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    process.run(main)
