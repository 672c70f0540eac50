"""Every Python block and command of HYDRA's document (seed 002) runs, after its imports are replaced and its scripts
are called as docs/siblings/hydra.md says."""

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm.siblings import hydra
from llm.siblings.hydra import ModelType, TrainConfig, default_config, read_config
from llm.siblings.hydra_command import models
from llm.siblings.hydra_train import shown
from tests.shared import ROOT
from tests.siblings.running import run, without_imports
from tests.siblings.seeds import CodeBlock, blocks_of, blocks_of_file, needs_seeds, seed
from tests.siblings.test_hydra import TINY, command, write, write_data

PAGE = ROOT / "docs" / "siblings" / "hydra.md"
NAMES = {"torch": torch, **{name: getattr(hydra, name) for name in hydra.__all__}}
NOT_RUN = {"Installation", "Project Structure", "Creating Custom Configurations"}
"""Headings of blocks that clone, install, draw folders, or open an editor."""
COMMANDS = {
    "python train.py --list": "list",
    "python train.py": "train",
    "python resume_training.py": "resume",
    "python scripts/debug_model.py": "debug",
}


def blocks() -> list[CodeBlock]:
    return blocks_of(seed("002"))


def of(heading: str) -> list[CodeBlock]:
    return [block for block in blocks() if block.heading == heading]


def commands_of(heading: str) -> list[list[str]]:
    """The words of each command under a heading, as the mapping on the page says them here."""
    text = "\n".join(block.text for block in of(heading) if block.language == "bash").replace("\\\n", " ")
    found = []
    for line in (line for line in text.splitlines() if line.startswith("python ")):
        theirs = next(key for key in COMMANDS if line.startswith(key))
        found.append([COMMANDS[theirs], *shlex.split(line.removeprefix(theirs))])
    return found


def test_the_blocks_of_the_page_run() -> None:
    names: dict[str, Any] = {}
    for block in blocks_of_file(PAGE):
        if block.language == "python":
            run(block.text, names)
    rows = re.findall(r"^\| `(python [^`]*)` \| `python -m llm\.siblings\.hydra (\w+)", PAGE.read_text(), flags=re.M)
    assert {theirs.removesuffix(" --model v1"): ours for theirs, ours in rows} == COMMANDS


@needs_seeds
def test_the_model_block_runs() -> None:
    (block,) = of("Test Model Forward Pass")
    names: dict[str, Any] = dict(NAMES)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(without_imports(block.text, NAMES), names)
    assert re.fullmatch(r"Loss: \d+\.\d{4}\nLogits shape: torch\.Size\(\[2, 128, 50257\]\)\n", printed.getvalue())
    assert names["logits"].shape == (2, 128, 50257) and names["loss"].isfinite()


@needs_seeds
def test_the_list_is_printed_as_the_document_shows_it() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        models()
    shown_there = next(block.text for block in of("List Available Models") if "Available Models:" in block.text)
    theirs = re.sub(r"configs/(\w+)\.yaml", r"configs/siblings/hydra_\1.yaml", shown_there)
    assert printed.getvalue().split() == theirs.split()


@needs_seeds
def test_the_config_of_the_document_is_the_default(tmp_path: Path) -> None:
    (block,) = of("Config File Format")
    (tmp_path / "c.yaml").write_text(block.text)
    said, notes = read_config(str(tmp_path / "c.yaml"), ModelType.BASELINE)
    assert said == TrainConfig() == default_config(ModelType.BASELINE) and len(notes) == 1
    for heading in ("Mixed Precision Training", "Weights & Biases Integration", "Custom Datasets"):
        for block in (block for block in of(heading) if block.language == "yaml"):
            (tmp_path / "c.yaml").write_text(block.text)
            section = yaml.safe_load(block.text)
            changed, _ = read_config(str(tmp_path / "c.yaml"), ModelType.BASELINE)
            assert all(getattr(changed, key) == value for keys in section.values() for key, value in keys.items())


@needs_seeds
def test_the_summary_of_an_epoch_is_the_document_s() -> None:
    (block,) = of("Console Output")
    said = {
        "epoch": 0, "train_loss": 2.5432, "val_loss": 2.4123, "val_perplexity": 11.16, "epoch_time_seconds": 45.2,
        "learning_rate": 3e-4,
    }  # fmt: skip
    assert shown(said) == block.text.strip()


@needs_seeds
def test_blocks_that_are_not_run_are_a_closed_list() -> None:
    run_here = {
        "List Available Models", "Using Default Configuration", "Using Custom Configuration", "Resume Training",
        "Config File Format", "Logs", "Console Output", "Mixed Precision Training", "Weights & Biases Integration",
        "Custom Datasets", "Test Model Forward Pass", "Check Model Parameters",
    }  # fmt: skip
    assert {block.heading for block in blocks()} == run_here | NOT_RUN
    custom = commands_of("Creating Custom Configurations")
    assert custom == [["train", "--model", "v1", "--config", "configs/my_experiment.yaml"]]


@needs_seeds
@pytest.mark.full
def test_every_command_of_the_document_runs_as_the_mapping_says(tmp_path: Path) -> None:
    write_data(tmp_path / "wikitext")
    (tmp_path / "gpt2").symlink_to(ROOT.parent / "shared" / "data" / "tokenizers" / "gpt2")
    defaults = commands_of("Using Default Configuration")
    assert [words[2] for words in defaults] == ["v1", "v2", "v3", "baseline", "routed", "hierarchical"]
    for words in [*defaults, *commands_of("List Available Models"), *commands_of("Check Model Parameters")]:
        done = command(tmp_path, *words, *["--dry_run"] * (words[0] == "train"))
        assert done.returncode == 0, done.stderr
    assert "parameters: 130,943,856" in done.stdout
    (tmp_path / "configs").mkdir()
    changes = {"model": {"vocab_size": 50257}, "training": {"num_epochs": 6}}
    for (words,) in (commands_of("Using Custom Configuration"), commands_of("Creating Custom Configurations")):
        written = write(tmp_path / "made", **changes, logging={"output_dir": f"outputs/{words[2]}"})
        Path(written).replace(tmp_path / words[4])
        done = command(tmp_path, *words)
        assert done.returncode == 0 and "EPOCH 5 SUMMARY" in done.stdout, done.stderr
    (tmp_path / "outputs" / "v1").rename(tmp_path / "outputs" / "baseline")
    *first, elsewhere = commands_of("Resume Training")
    for words, last in zip([*first, elsewhere], (15, 20, 15), strict=True):
        done = command(tmp_path, *words)
        assert done.returncode == 0 and f"EPOCH {last} SUMMARY" in done.stdout, done.stderr
    assert TINY["training"]["num_epochs"] == 2
