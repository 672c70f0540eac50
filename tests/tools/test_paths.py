"""The flags of the commands that take paths."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm.checkpoint.reader import resolve
from llm.cli import bind
from llm.errors import UserError
from llm.jobs.generate import continue_prompt

FLAGS = {
    "tools.convert.import_": "src dst",
    "tools.convert.export": "src dst",
    "tools.convert.inspect": "src",
    "tools.convert.verify": "a b text",
    "tools.shard.shard": "input output tokenizer",
    "tools.shard.check": "source",
    "tools.surgery.deepen": "src dst n_layers",
    "tools.surgery.nope": "src dst interval",
    "tools.inspection.inspect": "path",
    "tools.diff.diff": "run_a run_b",
    "tools.baselines.baselines": "train valid output",
    "tools.quickstart.prepare": "data",
    "tools.quickstart.report": "run_dir data",
    "tools.shakespeare_char.prepare": "text output",
    "tools.stdlib_corpus.write_corpus": "output",
    "tools.layouts_plan.Settings": "config nproc json",
    "tools.train_tokenizer.train": "input output",
    "tools.campaign_plan.Settings": "config nproc out keep_dir",
}


def function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


@pytest.mark.parametrize("name", FLAGS)
def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    numbers = ("n_layers", "interval", "nproc")
    given: dict[str, str | None] = {flag: "4" if flag in numbers else f"~/{flag}" for flag in FLAGS[name].split()}
    bound = bind(function(name), [], given)
    for flag in given.keys() - set(numbers):
        if name == "tools.campaign_plan.Settings" and flag == "config":
            continue  # it is replaced where the run's own flags are read
        wanted = f"/home/somebody/{flag}"
        assert bound[flag] == ([wanted] if flag == "input" else wanted), flag


def test_a_prompt_that_begins_with_a_tilde_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    bound = bind(continue_prompt, [], {"model": "~/m", "prompt": "~/m", "prompts": "~/p", "output": "~/o"})
    assert (bound["model"], bound["prompt"]) == ("/home/somebody/m", "~/m")
    assert (bound["prompts"], bound["output"]) == ("/home/somebody/p", "/home/somebody/o")


def test_results_that_are_there_are_not_written_over(tmp_path: Path) -> None:
    kept = tmp_path / "results.json"
    kept.write_text("kept")
    with pytest.raises(UserError, match=r"--output=.*results\.json: exists already"):
        function("tools.baselines.baselines")("no.jsonl", "no.jsonl", output=str(kept))
    assert kept.read_text() == "kept"


def test_a_folder_that_cannot_be_made_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    place = str(tmp_path / "file" / "dst")
    for call in (
        lambda: function("tools.convert.import_")("no", place),
        lambda: function("tools.surgery.nope")("no", place, 4),
        lambda: function("tools.shard.shard")(["no"], place, kind="bytes"),
    ):
        with pytest.raises(UserError, match="file: Not a directory; .*dst is to be there"):
            call()


@pytest.mark.parametrize(
    ("name", "where"),
    [("meta-llama/Llama-3.2-1B", True), ("runs/mine", False), ("there/mine", False), ("mine", False), ("/a/b", False)],
)
def test_a_missing_model_that_is_named_as_on_the_hub_is_to_be_fetched_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="no such file or folder") as refused:
        resolve(name)
    assert (f"`hf download {name} --local-dir FOLDER`" in str(refused.value)) is where
