"""HYDRA's models, its YAML as a run of the one trainer, where data is looked for, and what comes of an epoch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml

from llm import LLM
from llm.errors import UserError
from llm.siblings.hydra import ModelType, TrainConfig, create_model, default_config, read_config
from llm.siblings.hydra_data import data_folder, tokenizer_of
from llm.siblings.hydra_train import EpochTrainer, epochs_done, raw_config, shown, summary
from llm.tokenizer import TokenizerConfig
from llm.train.config.load import validate
from tests.distributed.harness import metrics, without_timing
from tests.shared import ROOT

TINY: dict[str, dict[str, Any]] = {
    "model": {"d_model": 16, "n_layers": 4, "n_heads": 2, "d_state": 8, "vocab_size": 300, "dropout": 0.1},
    "data": {"max_length": 32, "batch_size": 4, "num_workers": 2},
    "training": {"num_epochs": 2, "learning_rate": 0.003, "use_mixed_precision": False},
    "logging": {"use_wandb": False},
}


def write(folder: Path, **changes: dict[str, Any]) -> str:
    """A config of a tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({key: {**section, **changes.get(key, {})} for key, section in TINY.items()}))
    return str(path)


def write_data(folder: Path) -> Path:
    """A folder of train.jsonl and validation.jsonl."""
    folder.mkdir(parents=True)
    for name, count in (("train", 24), ("validation", 8)):
        rows = [json.dumps({"text": f"the cat {i * i} saw the dog {i} on the mat " * 2}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("kind", ModelType)
def test_a_model_gives_a_loss_of_the_next_tokens_and_logits(kind: ModelType) -> None:
    torch.manual_seed(0)
    model = create_model(kind, TrainConfig(d_model=16, n_layers=4, n_heads=2, d_state=8, vocab_size=50, dropout=0.0))
    ids = torch.randint(0, 50, (2, 20))
    loss, logits = model(ids, labels=ids)
    assert logits.shape == (2, 20, 50) and torch.equal(logits, model(ids))
    expected = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(loss, expected)
    masked = ids.clone()
    masked[:, 5:] = -100
    early = -logits.log_softmax(-1)[:, :4].gather(-1, ids[:, 1:5, None]).mean()
    torch.testing.assert_close(model(ids, labels=masked)[0], early)
    with pytest.raises(ValueError, match=r"labels \(2, 19\) must have the shape of input_ids"):
        model(ids, labels=ids[:, 1:])


def test_the_default_config_is_v1_and_its_models_are_the_documents() -> None:
    assert TrainConfig() == default_config(ModelType.BASELINE)
    patterns = [{spec.mixer.name for spec in TrainConfig().model_args(kind).layer_specs()} for kind in ModelType]
    assert patterns == [{"ssm", "attn"}, {"ssm", "routed"}, {"ssm", "strided_attn"}]
    for kind in ModelType:
        said, notes = read_config(str(ROOT / kind.config_file), kind)
        assert said == default_config(kind) and [note.split(": ")[1][:11] for note in notes] == ["num_workers"]


def test_names_of_models_are_both_the_numbers_and_the_words() -> None:
    assert [ModelType.named(name) for name in ("baseline", "v2", "Hierarchical")] == list(ModelType)
    with pytest.raises(UserError, match="--model=v4: no such model; use v1, v2, v3, baseline, routed, hierarchical"):
        ModelType.named("v4")


def test_a_config_is_a_run_of_the_one_trainer(tmp_path: Path) -> None:
    said, _ = read_config(write(tmp_path, training={"grad_clip": 0.5, "weight_decay": 0.02}), ModelType.ROUTED)
    data = write_data(tmp_path / "data")
    run = validate(raw_config(said, ModelType.ROUTED, data, TokenizerConfig(kind="bytes")), "hydra")
    assert run.model.layer_pattern == ["ssm", "routed"] and run.model.tie_embeddings and run.model.attn_dropout == 0.1
    assert (run.train.epochs, run.train.global_batch_size, run.train.seq_len) == (2, 4, 32)
    assert (run.optim.lr, run.optim.weight_decay, run.optim.clip_norm) == (0.003, 0.02, 0.5)
    assert run.train.precision == "fp32" and run.eval.interval_epochs == 1 and run.data.valid is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"d_modell": 8}}, "model.d_modell is not known; known are d_model"),
        ({"training": {"num_epochs": 0}}, "num_epochs=0: must be above 0"),
        ({"data": {"batch_size": "8"}}, "batch_size='8': expected a whole number"),
        ({"logging": {"use_wandb": "yes"}}, "use_wandb='yes': expected true or false"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        read_config(write(tmp_path, **changes), ModelType.BASELINE)
    assert "\n" not in str(refused.value)


def test_a_model_that_cannot_be_is_refused_in_the_words_of_its_config() -> None:
    with pytest.raises(ValueError, match="n_heads=5 does not divide d_model=16"):
        TrainConfig(d_model=16, n_heads=5).model_args()
    with pytest.raises(ValueError, match="layer_pattern item 'mamba': unknown mixer"):
        TrainConfig(layer_pattern="mamba,attn").model_args()


def test_data_is_a_path_or_a_folder_of_lattice_data_or_a_library_s(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("LATTICE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    data = write_data(tmp_path / "corpora" / "wikitext")
    assert data_folder(str(data), None, None, tmp_path) == (data, [])
    with pytest.raises(UserError, match=r"dataset_name=wikitext: is no path, not under \$LATTICE_DATA.*--data PATH"):
        data_folder("wikitext", None, None, tmp_path)
    monkeypatch.setenv("LATTICE_DATA", str(tmp_path / "corpora"))
    found, notes = data_folder("wikitext", "wikitext-103-v1", None, tmp_path)
    assert found == data and "dataset_config=wikitext-103-v1" in notes[0]
    assert data_folder("other", None, str(data), tmp_path)[0] == data
    with pytest.raises(UserError, match="has no train.jsonl"):
        data_folder(str(tmp_path), None, None, tmp_path)


def test_a_data_set_of_the_library_becomes_files_the_cache_first(tmp_path: Path, monkeypatch: Any) -> None:
    import types

    asked = []

    def load(name: str, subset: str | None) -> dict[str, list[dict[str, str]]]:
        asked.append((name, subset, library.config.HF_HUB_OFFLINE))
        if library.config.HF_HUB_OFFLINE:
            raise ConnectionError("not cached")
        return {"train": [{"text": "ein Käse"}], "validation": [{"text": "b"}], "test": [{"text": "c"}]}

    library = types.SimpleNamespace(config=types.SimpleNamespace(HF_HUB_OFFLINE=False), load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.delenv("LATTICE_DATA", raising=False)
    found, _ = data_folder("owner/corpus", "small", None, tmp_path / "kept")
    assert asked == [("owner/corpus", "small", True), ("owner/corpus", "small", False)]
    assert found == tmp_path / "kept" / "owner_corpus_small"
    assert json.loads((found / "train.jsonl").read_text()) == {"text": "ein Käse"}
    assert sorted(path.name for path in found.iterdir()) == ["train.jsonl", "validation.jsonl"]
    assert data_folder("owner/corpus", "small", None, tmp_path / "kept")[0] == found and len(asked) == 2


def test_a_tokenizer_that_is_nowhere_is_refused_with_the_key(monkeypatch: Any) -> None:
    monkeypatch.delenv("LATTICE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="tokenizer_name=gpt2: is no path.*give --tokenizer PATH"):
        tokenizer_of("gpt2", None)
    assert tokenizer_of("gpt2", "bytes").kind == "bytes"


def test_an_epoch_is_the_mean_of_its_steps_by_their_targets(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": float(i), "targets": i, "step_time_s": 0.5, "lr": 0.1} for i in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = summary(tmp_path, 1, 2, rows[-1] | {"valid_loss": 2.0})
    assert said["train_loss"] == pytest.approx((3 * 3 + 4 * 4) / 7) and said["epoch_time_seconds"] == 1.0
    assert said["val_perplexity"] == pytest.approx(7.389, abs=1e-3) and said["epoch"] == 1
    assert "EPOCH 1 SUMMARY" in shown(said) and "Val Perplexity:   7.39" in shown(said)


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LATTICE_DATA": str(folder), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "llm.siblings.hydra", *words]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.distributed
def test_a_run_is_resumed_bit_for_bit_by_the_names_of_its_epochs(tmp_path: Path) -> None:
    write_data(tmp_path / "wikitext")
    config = write(tmp_path, logging={"output_dir": "outputs/baseline"})
    words = ["train", "--model", "baseline", "--config", config, "--tokenizer", "bytes"]
    done = command(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "EPOCH 1 SUMMARY" in done.stdout and "num_workers has no meaning here" in done.stdout
    run = tmp_path / "outputs" / "baseline"
    lines = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[0].keys() == {
        "timestamp", "epoch", "train_loss", "val_loss", "val_perplexity", "epoch_time_seconds", "learning_rate",
    }  # fmt: skip
    first = "outputs/baseline/checkpoint_epoch_0.pt"
    assert json.loads((tmp_path / first / "epoch.json").read_text()) == lines[0]
    again = command(tmp_path, "resume", "--checkpoint", first, "--num_epochs", "1", "--output_dir", "outputs/again")
    assert again.returncode == 0, again.stderr
    weights, other = (
        dict(LLM.from_pretrained(tmp_path / f"outputs/{name}/checkpoint_epoch_1.pt").named_parameters())
        for name in ("baseline", "again")
    )
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    whole, half = (without_timing(metrics(tmp_path / "outputs" / name)) for name in ("baseline", "again"))
    assert half == whole[len(whole) // 2 :]


@pytest.mark.full
def test_the_newest_whole_checkpoint_goes_on_and_a_damaged_one_is_skipped_by_name(tmp_path: Path) -> None:
    write_data(tmp_path / "wikitext")
    config = write(tmp_path, logging={"output_dir": "out"})
    done = command(tmp_path, "train", "--config", config, "--tokenizer", "bytes")
    assert done.returncode == 0, done.stderr
    old = command(tmp_path, "resume", "--checkpoint", "out/checkpoint_epoch_0.pt", "--num_epochs", "1")
    assert old.returncode == 2 and "give --output_dir to go on from here elsewhere" in old.stderr
    (tmp_path / "out/checkpoint_epoch_1.pt/manifest.json").write_text("{")
    more = command(tmp_path, "resume", "--checkpoint_dir", "out", "--num_epochs", "2")
    assert more.returncode == 0, more.stderr
    assert "skipped" in more.stdout and "1 epochs; 2 more" in more.stdout and "EPOCH 2 SUMMARY" in more.stdout


def at_step(step: int, n_rows: int, batch: int, epochs: int) -> EpochTrainer:
    """A trainer that stands after so many steps of a run, with nothing else of one."""
    trainer = object.__new__(EpochTrainer)
    train = SimpleNamespace(global_batch_size=batch)
    trainer.run = cast(Any, SimpleNamespace(
        config=SimpleNamespace(train=train), epochs=epochs, steps=-(-epochs * n_rows // batch),
        mixture=SimpleNamespace(n_rows=n_rows),
    ))  # fmt: skip
    trainer.progress = cast(Any, SimpleNamespace(step=step, consumed_rows=step * batch))
    return trainer


@pytest.mark.parametrize(("n_rows", "batch", "epochs"), [(92, 8, 30), (24, 4, 3), (5, 8, 4), (9, 8, 20)])
def test_an_epoch_ends_where_the_step_is_that_ends_its_pass(n_rows: int, batch: int, epochs: int) -> None:
    """Also where the batch does not divide the rows: 12 steps for each would end the 24th of 30 epochs in the 25th."""
    last = -(-epochs * n_rows // batch)
    ends = [step for step in range(1, last + 1) if at_step(step, n_rows, batch, epochs)._is_due(0)]
    assert ends == sorted({-(-epoch * n_rows // batch) for epoch in range(1, epochs + 1)})
    assert at_step(last, n_rows, batch, epochs)._passes() == epochs


def test_a_resume_counts_the_epochs_that_were_closed(tmp_path: Path) -> None:
    """In a run, of a checkpoint in the middle of one, and of a run that goes on from another one elsewhere."""

    def checkpoint(run: str, step: int, epoch: int | None, resume: str = "auto") -> Any:
        path = tmp_path / run / "checkpoints" / f"step_{step:08}"
        path.mkdir(parents=True)
        if epoch is not None:
            (path / "epoch.json").write_text(json.dumps({"epoch": epoch}))
        config = {"config": {"checkpoint": {"resume": resume}}}
        return SimpleNamespace(path=path, step=step, meta_with=lambda key: config)

    first, middle, second = checkpoint("a", 12, 0), checkpoint("a", 20, None), checkpoint("a", 23, 1)
    assert [epochs_done(one) for one in (first, middle, second)] == [1, 1, 2]
    assert epochs_done(checkpoint("b", 3, None)) == 0


def test_numbers_and_patterns_of_a_yaml_are_read_or_refused_by_key() -> None:
    assert TrainConfig(**{"learning_rate": "3e-4"}).learning_rate == 3e-4  # what YAML makes of it, for want of a point
    for key, value in (("layer_pattern", 5), ("layer_pattern", None), ("layer_pattern", ["ssm", 5])):
        with pytest.raises(ValueError, match=r"layer_pattern=.*: expected text, or a list of texts"):
            TrainConfig(**{key: value})
    with pytest.raises(ValueError, match="dataset_config=2024: expected text"):
        TrainConfig(**{"dataset_config": 2024})
