"""Miniformer's flags as a run of the one trainer: which config they make, which tokenizer, what is refused, and that it
trains."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError
from llm.siblings.miniformer import TrainConfig, Transformer, TransformerConfig, run_config
from llm.siblings.miniformer_command import Flags, documented, help_text, parse, resolve
from llm.tokenizer import TokenizerConfig
from llm.train.config import RunConfig
from tests.shared import ROOT

WORDS = (
    "the", "cat", "dog", "sat", "on", "mat", "house", "runs", "sees", "tree", "bird", "and", "it", "was", "big", "red",
    "small",
)  # fmt: skip
MODEL: dict[str, Any] = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 32}
BYTES = TokenizerConfig(kind="bytes")


def text(n: int) -> str:
    return " ".join(WORDS[(n * k + k * k) % len(WORDS)] for k in range(1, 6 + n % 7))


def write(path: Path, n: int = 40, **columns: Any) -> str:
    """JSON Lines of n records; of each column a function of the number."""
    rows = [{name: make(i) for name, make in columns.items()} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def of(folder: Path, *words: str, **columns: Any) -> RunConfig:
    """The run that flags ask for, whose training rows have these columns."""
    path = write(folder / "train.jsonl", **(columns or {"text": text}))
    asked, overrides = parse(["--train_path", path, "--work_dir", str(folder / "run"), *words])
    return resolve(asked, overrides)[0]


def test_language_modelling_is_a_run_of_task_lm_over_the_text(tmp_path: Path) -> None:
    flags = ["--tokenizer=bytes", f"--model_config={json.dumps(MODEL)}", "--batch_size=6", "--max_epochs=2"]
    run = of(tmp_path, *flags, "--lr=1e-3")
    assert run.task == "lm" and run.model.dim == 16 and run.model.vocab_size == 258 and run.model.rope_theta == 1e4
    assert (run.train.epochs, run.train.global_batch_size, run.train.micro_batch_size) == (2, 6, 6)
    assert (run.optim.lr, run.optim.min_lr, run.train.seq_len) == (1e-3, 0.0, 32)
    assert run.data.valid is None and run.log.tensorboard


@pytest.mark.parametrize(
    ("scheduler", "schedule"),
    [("cosine", "cosine"), ("linear", "linear"), ("onecycle", "one_cycle"), ("constant", "constant"), ("wsd", "wsd")],
)
def test_schedulers_are_those_of_the_trainer(scheduler: Any, schedule: str) -> None:
    train = TrainConfig("a.jsonl", scheduler=scheduler)
    assert run_config(train, TransformerConfig(300, **MODEL), BYTES).optim.schedule == schedule


@pytest.mark.parametrize("logger", ["tensorboard", "csv", "none"])
def test_loggers_are_those_of_the_trainer(logger: Any) -> None:
    log = run_config(TrainConfig("a.jsonl", logger=logger), TransformerConfig(300, **MODEL), BYTES).log
    assert (log.tensorboard, log.csv, log.wandb) == (logger == "tensorboard", logger == "csv", False)


def test_held_out_rows_are_read_whole_once_a_pass_and_end_a_run_early() -> None:
    train = TrainConfig("a.jsonl", "b.jsonl", patience=2)
    run = run_config(train, TransformerConfig(300, **MODEL), BYTES)
    assert (run.eval.interval_epochs, run.eval.rows, run.eval.patience) == (1, None, 2)
    assert [source.path for source in run.data.valid] == ["b.jsonl"]  # type: ignore[union-attr]


def test_classes_are_counted_and_rows_are_as_long_as_the_longest_record(tmp_path: Path) -> None:
    words = ["--task=classification", "--tokenizer=bytes", "--model_config", json.dumps(MODEL | {"max_seq_len": 500})]
    run = of(tmp_path, *words, text=text, label=lambda i: ("red", "green", "blue")[i % 3])
    assert (run.task, run.model.n_prediction, run.model.prediction) == ("prediction", 3, "classification")
    assert run.train.seq_len == max(len(text(i)) for i in range(40)) + 2 and run.data.packing == "none"
    run = of(tmp_path, *words, text=text, label=lambda i: i % 2 * 3)
    assert run.model.n_prediction == 4, "integers are classes from 0 on"


def test_values_of_a_regression_are_one_or_as_many_as_a_list_has(tmp_path: Path) -> None:
    words = ["--task=regression", "--label_column=y", "--tokenizer=bytes", f"--model_config={json.dumps(MODEL)}"]
    run = of(tmp_path, *words, text=text, y=lambda i: 0.5 * i)
    assert (run.model.n_prediction, run.model.prediction, run.prediction.max_length) == (1, "regression", "cut")
    assert of(tmp_path, *words, text=text, y=lambda i: [i, -i]).model.n_prediction == 2


def test_an_encoder_decoder_learns_pairs_or_the_halves_of_texts(tmp_path: Path) -> None:
    words = ["--model=seq2seq", "--tokenizer=bytes", f"--model_config={json.dumps(MODEL | {'n_layers': 2})}"]
    run = of(tmp_path, *words)
    assert (run.task, run.model.encoder_layers, run.model.n_layers, run.train.seq_len) == ("seq2seq", 2, 2, 32)
    columns = {"question": text, "answer": lambda i: text(i)[::-1]}
    names = ["--task=seq2seq", "--source_column=question", "--target_column=answer"]
    run = of(tmp_path, *words, *names, **columns)
    assert run.pair.max_length == "cut" and run.data.packing == "none"
    (source,) = run.data.train  # type: ignore[misc]
    assert source.kind == "pair" and source.columns == {"source": "question", "target": "answer"}  # type: ignore[union-attr]
    with pytest.raises(UserError, match="--model_config: head=none, causal=None: an encoder-decoder writes tokens"):
        of(tmp_path, "--model=seq2seq", "--tokenizer=bytes", '--model_config={"head": "none"}')


def test_the_tokenizer_is_the_one_named_else_beside_the_data_else_trained_on_it(tmp_path: Path) -> None:
    model = f"--model_config={json.dumps(MODEL)}"
    trained = of(tmp_path, model).tokenizer
    assert trained.path == str(tmp_path / "run" / "trained_tokenizer.model") and trained.kind == "sentencepiece"
    again = of(tmp_path, model).tokenizer
    assert again == trained, "a run that goes on has the tokenizer that it began with"
    (tmp_path / "tokenizer.model").write_bytes(Path(str(trained.path)).read_bytes())
    assert of(tmp_path, model).tokenizer.path == str(tmp_path / "tokenizer.model")
    assert of(tmp_path, model, "--tokenizer=bytes").tokenizer.kind == "bytes"


def test_a_tokenizer_has_no_more_tokens_than_its_text_has_pieces_and_the_model_all_that_it_says(tmp_path: Path) -> None:
    asked, _ = parse(["--train_path", write(tmp_path / "train.jsonl", text=text), "--work_dir", str(tmp_path / "run"),
                      f"--model_config={json.dumps(MODEL | {'vocab_size': 50257})}"])  # fmt: skip
    run, notes = resolve(asked, {})
    assert run.model.vocab_size == 50257
    assert "tokens of 50,257, as the text has no more pieces" in notes[0]


def test_keys_of_a_run_stand_beside_the_flags(tmp_path: Path) -> None:
    run = of(tmp_path, "--tokenizer=bytes", f"--model_config={json.dumps(MODEL)}", "--eval.rows=7", "--lora.rank=2")
    assert run.eval.rows == 7 and run.lora is not None and run.lora.rank == 2


def test_the_models_keys_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(MODEL | {"activation": "swiglu"}))
    run = of(tmp_path, "--tokenizer=bytes", "--model_config", str(tmp_path / "model.json"))
    assert run.model.gated and run.model.norm_eps == 1e-6


def test_every_flag_is_explained() -> None:
    said = {**documented(TrainConfig), **documented(Flags)}
    columns = {"text_column", "label_column", "source_column"}  # with target_column
    assert said.keys() | columns == set(Flags.__dataclass_fields__)
    shown = " ".join(help_text().split())
    assert all(" ".join(line.split()) in shown for line in said.values())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model_config={bad"], "--model_config: is no JSON: Expecting property name .* at character 2"),
        (["--model_config", "none.json"], "--model_config=none.json: is no JSON object, and no file"),
        (['--model_config={"activation": "swish2"}'], "--model_config: activation='swish2' is not known; use swiglu"),
        (['--model_config={"rotary_pct": 2}'], "--model_config: rotary_pct=2: expected a number from 0 to 1"),
        (['--model_config={"width": 2}'], "--model_config: width is no key of a model"),
        (['--model_config={"vocab_size": 100}', "--tokenizer=bytes"],
         "--model_config: vocab_size=100 is below the tokenizer's 258 tokens"),
        (["--tokenizer=none.model"], "--tokenizer=none.model: no such file or folder"),
        (["--scheduler=up"], "--scheduler=up: possible are cosine, linear, onecycle"),
        (["--task=classification", "--label_column=kind"],
         r"train.jsonl, line 1: has no column 'kind'; it has 'text'"),
        (["--task=classification", "--label_column=text", "--text_column=body"], "line 1: has no column 'body'"),
        (["--task=seq2seq"], "--task=seq2seq writes a target from a source"),
        (["--task=regression", "--model=seq2seq"], "--task=regression predicts labels of whole rows"),
        (["--batch_size=0"], "--batch_size=0: expected a whole number of at least 1"),
        (["--learning_rate=1"], "unknown flag --learning_rate"),
        (["--train.stops=1"], "unknown key train.stops"),
        (["--logger=wandb"], "log.wandb=true: the package wandb is not installed"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_the_flag_or_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], line: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")
    with pytest.raises(UserError, match=line) as error:
        of(tmp_path, *words)
    assert "\n" not in str(error.value)


def test_a_label_that_is_none_is_named_by_its_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.jsonl, line 4: its label is .*where a class must be"):
        of(tmp_path, "--task=classification", text=text, label=lambda i: [1] if i == 3 else i % 2)


def module(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llm.siblings.miniformer", "--work_dir", str(folder / "run"), *words]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.full
def test_the_module_trains_stops_early_and_its_run_is_read_by_the_transformer(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 60, text=text, label=lambda i: int("cat" in text(i)))
    write(tmp_path / "valid.jsonl", 12, text=text, label=lambda i: i % 2)
    words = ["--train_path=train.jsonl", "--val_path=valid.jsonl", "--task=classification", "--tokenizer=bytes",
             f"--model_config={json.dumps(MODEL | {'max_seq_len': 64})}", "--batch_size=8", "--max_epochs=40",
             "--lr=0.05", "--scheduler=onecycle", "--logger=csv", "--patience=2", "--precision=fp32"]  # fmt: skip
    done = module(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "train.jsonl: 2 classes" in done.stdout and "stopped early" in done.stdout
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    validated = [int(row["step"]) for row in rows if row["val/loss"]]
    assert validated[:2] == [8, 16], "once a pass over 60 rows"
    model = Transformer.from_pretrained(tmp_path / "run")
    assert model.config.head == "classification" and model.config.num_labels == 2 and model.config.d_model == 16
    assert "\nnothing to do" in module(tmp_path, *words).stdout


def test_a_wrong_command_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    done = module(tmp_path, "--train_path=none.jsonl", "--tokenizer=bytes")
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: data.train=none.jsonl")
    assert len(done.stderr.strip().splitlines()) == 1
