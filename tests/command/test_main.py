"""`lattice COMMAND ...` runs the script it names, unchanged; what is wrong is one line."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llm import shipped
from llm.command import completion, main
from llm.command.table import BY_NAME, COMMANDS, Command
from llm.errors import UserError
from llm.train.config import load_config
from tests.docs.commands import check
from tests.shared import ROOT


def lattice(*words: str, **options: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "llm", *words], capture_output=True, text=True, env=environment, cwd=options.get("cwd")
    )


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("pretrain", "train"), ("report_", "report")])
def test_an_unknown_command_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"^unknown command '{typed}'; did you mean `lattice {meant}`\?$"):
        main.find(typed)
    with pytest.raises(UserError, match="`lattice --help` lists them"):
        main.find("xyzzy")


def test_what_is_wrong_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["tarin"], ["replay", "runs/a"], ["replay", "runs/a", "last"], ["configs", "quickstrt"]):
        with pytest.raises(SystemExit) as left:
            main.main(words)
        printed = capsys.readouterr()
        assert left.value.code == 2 and printed.out == ""
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_the_exit_status_of_a_script_is_the_commands(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(path: str, run_name: str) -> None:
        assert (Path(path), run_name) == (ROOT / "launch/pretrain.py", "__main__")
        assert sys.argv == [path, "--config", "a.yaml", "--nproc=2"]
        raise SystemExit(status)

    monkeypatch.setattr(sys, "argv", ["lattice"])
    monkeypatch.setattr(main.runpy, "run_path", leave)
    with pytest.raises(SystemExit) as left:
        main.main(["train", "--config", "a.yaml", "--nproc=2"])
    assert left.value.code == status


def test_a_script_is_run_as_it_is_from_any_folder(tmp_path: Path) -> None:
    done = lattice("train", "--config", "nothing.yaml", cwd=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nothing.yaml: No such file or directory\n"


def test_every_script_is_there() -> None:
    for command in COMMANDS:
        if command.script.endswith(".py"):
            assert (ROOT / command.script).is_file()


def test_replay_and_chat_are_flags_of_the_scripts() -> None:
    assert BY_NAME["replay"].words(["runs/a", "12", "--nproc", "2"]) == [
        "--run_dir", "runs/a", "--replay_step", "12", "--nproc", "2",
    ]  # fmt: skip
    assert BY_NAME["chat"].words(["runs/a"]) == ["runs/a", "--chat"]


def test_auto_is_a_process_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "processes", lambda: 4)
    assert main.with_processes(["--nproc", "auto", "--a=auto"]) == ["--nproc", "4", "--a=auto"]
    assert main.with_processes(["--nproc=auto", "auto"]) == ["--nproc=4", "auto"]


@pytest.mark.parametrize("shell", [completion.bash, completion.zsh, completion.fish])
def test_completion_has_every_command_and_flag(shell: "object") -> None:
    text = shell()  # type: ignore[operator]
    for name, (first, flags) in completion.words_of().items():
        assert name in text and all(word in text for word in first)
        assert all(flag.removeprefix("--") in text for flag in flags)


def test_bash_completes_commands_flags_configs_and_keys(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(completion.bash())
    program = (
        f"source {script}; COMP_WORDS=(lattice surg); COMP_CWORD=1; _lattice; echo ${{COMPREPLY[@]}}; "
        "COMP_WORDS=(lattice train --replay); COMP_CWORD=2; _lattice; echo ${COMPREPLY[@]}; "
        "COMP_WORDS=(lattice quickstart pre); COMP_CWORD=2; _lattice; echo ${COMPREPLY[@]}; "
        "COMP_WORDS=(lattice train --config quickstart_); COMP_CWORD=3; _lattice; echo ${COMPREPLY[@]}; "
        "COMP_WORDS=(lattice finetune --optim.weight_); COMP_CWORD=2; _lattice; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [
        "surgery", "--replay_step", "prepare", "quickstart_long", "--optim.weight_decay",
    ], done.stderr  # fmt: skip


def test_a_config_is_found_by_name_and_the_users_own_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no configs/ here: those that ship are meant
    for name in ("quickstart", "pretrain/quickstart", "configs/pretrain/quickstart.yaml"):
        assert shipped.run_config(name) == ROOT / "configs/pretrain/quickstart.yaml"
    full = load_config("quickstart")
    assert full == load_config(ROOT / "configs/pretrain/quickstart.yaml")
    with pytest.raises(UserError, match="quickstrt: neither a file nor a config that ships .* did you mean quickstart"):
        load_config("quickstrt")
    own = tmp_path / "configs/pretrain/quickstart.yaml"
    own.parent.mkdir(parents=True)
    own.write_text((ROOT / "configs/pretrain/quickstart.yaml").read_text().replace("steps: 280", "steps: 281"))
    assert load_config("configs/pretrain/quickstart.yaml").train.steps == 281
    assert load_config("quickstart").train.steps == full.train.steps


def test_a_misspelt_word_of_a_command_is_neither_a_path_nor_the_name_of_a_folder_to_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (["convert"], "convert needs one of import, export, inspect, verify: lattice convert import"),
        (["quickstart", "prepear"], "unknown command 'prepear'; did you mean prepare?"),
        (["quickstart", "somewhere"], "'somewhere' is one value too many; the flags are --data, --vocab_size"),
    ):
        with pytest.raises(SystemExit):
            main.main(words)
        assert said in capsys.readouterr().err, words
    assert not list(tmp_path.iterdir())


def test_every_command_has_an_example_of_itself() -> None:
    for command in COMMANDS:
        assert isinstance(command, Command) and command.example.split()[0] == command.name


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("runs/data/stdlib/train", "; `lattice quickstart prepare` makes it"),
        ("./runs/data/stdlib/tokenizer.model", "; `lattice quickstart prepare` makes it"),
        ("runs/data/values/friedman/split-0/train.csv", "tools/values.py --data friedman` makes it"),
        ("runs/data/stdlib_of_mine", ""),
        ("runs/data", ""),
        ("runs/quickstart", "; `lattice train --config quickstart` makes it"),
        ("runs/quickstart_long", ""),
        ("elsewhere/runs/data/stdlib/train", ""),
    ],
)
def test_missing_data_of_a_shipped_config_is_named_with_what_makes_it(path: str, command: str) -> None:
    assert shipped.made_by(path).endswith(command) and bool(shipped.made_by(path)) == bool(command)


def test_what_makes_data_is_a_command_that_exists_and_a_config_reads_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = "".join(file.read_text() for _, file in shipped.run_configs())
    for folder, command in shipped.MADE_BY.items():
        assert re.search(rf"{shipped.RUNS}/{folder}\b", configs)
        check(command.split() if command.startswith("lattice") else ["python", *command.split()])
    monkeypatch.chdir(tmp_path)  # where the scripts do not lie
    (script,) = shlex.split(shipped.made_by("runs/data/molecules/vocab.txt").split("`")[1])[1:2]
    assert Path(script).is_file()


def test_a_shipped_config_without_its_data_names_the_command(tmp_path: Path) -> None:
    done = lattice("train", "--config", "quickstart", cwd=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    expected = "data.train=runs/data/stdlib/train: no such file or directory; `lattice quickstart prepare` makes it"
    assert done.stderr == f"error: {expected}\n"
