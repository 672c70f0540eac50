"""The help of every subcommand is there without torch, and says what the commands themselves would say."""

import importlib
import subprocess
import sys

import pytest

from llm.cli import describe
from llm.command import help, source
from llm.command.table import BY_NAME, COMMANDS, RUN_FLAGS, RUN_KEYS
from llm.train.config.flags import OWN_FLAGS, help_text
from tests.shared import ROOT

ASKED = [(command.name, word) for command in COMMANDS for word in (command.described or {"": ""})]


def test_the_help_of_every_subcommand_comes_without_torch() -> None:
    # one process for all of them: a fresh Python that has printed every help has imported neither torch nor numpy
    words = [[name, *([word] if word else []), "--help"] for name, word in ASKED]
    program = (
        f"import sys\nfrom llm.command.main import main\nfor words in {[*words, ['--help'], ['--version']]!r}:\n"
        "    main(words)\n    assert not {'torch', 'numpy', 'deepspeed'} & sys.modules.keys(), words\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name, word in ASKED:
        assert f"usage: lattice {name}{' ' * bool(word)}{word} " in done.stdout


def test_the_usage_says_what_may_stand_by_place() -> None:
    for name, word, places in (
        ("diff", None, " RUN_A RUN_B"), ("report", None, " RUNS..."), ("convert", None, " COMMAND"),
        ("convert", "export", " export SRC DST"), ("train", None, ""),
    ):  # fmt: skip
        assert help.of(BY_NAME[name], word).startswith(f"usage: lattice {name}{places} [--flag=value ...]\n")


@pytest.mark.parametrize("place", sorted({place for command in COMMANDS for place in command.described.values()}))
def test_what_is_read_of_a_function_is_what_its_import_says(place: str) -> None:
    path, _, name = place.partition(":")
    function = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert help.described(place) == describe(function).splitlines()


def test_every_key_of_a_run_config_is_read_with_its_line_and_default() -> None:
    assert source.table(RUN_FLAGS) == OWN_FLAGS
    read = [
        f"  --{key.name:<34} {key.about}{'' if key.default is source.REQUIRED else f' [{key.default}]'}"
        for key in source.keys(RUN_KEYS)
    ]
    assert "\n".join(read) == help_text().partition("config keys:\n")[2]


def test_the_overview_has_every_subcommand_and_the_statuses() -> None:
    lines = help.overview().splitlines()
    for command in COMMANDS:
        assert any(line.split()[:1] == [command.name] for line in lines)
    text = " ".join(" ".join(lines).split())
    for status in ("0 done", "1 failed", "2 something to mend", "75 stopped on request"):
        assert status in text


@pytest.mark.parametrize("name", BY_NAME)
def test_no_line_of_a_help_is_wider_than_the_page(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert max(map(len, help.of(BY_NAME[name]).splitlines())) <= 120
