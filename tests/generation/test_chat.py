"""A model that talks: what was said becomes the prompt, by the run's template, and an answer ends with its mark."""

import io
import json
import sys
from pathlib import Path

import pytest
import transformers

from launch.generate import continue_prompt
from llm.checkpoint.run_folder import save_template
from llm.cli import run_cli
from llm.pretrained import chat_template_of, tokenizer_of
from llm.tokenizer import ByteTokenizer
from llm.tokenizers.chat import open_template
from tests.generation.models import folder
from tools.convert import export

TEMPLATE = open_template("chatml", ByteTokenizer(), add_tokens=True)
QUESTION = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = folder(tmp_path_factory.mktemp("chat") / "model", TEMPLATE.tokenizer, vocab_size=260, max_seq_len=256)
    save_template(TEMPLATE.source, path)
    return path


def talk(model: Path, *words: str) -> None:
    run_cli(continue_prompt, [f"--model={model}", "--chat", "--max_new_tokens=4", "--threads=1", *words])


def test_a_run_keeps_its_template_and_the_tokens_that_it_added(model: Path) -> None:
    tokenizer = tokenizer_of(model)
    assert tokenizer.fingerprint == TEMPLATE.tokenizer.fingerprint
    found = chat_template_of(model, tokenizer)
    assert (found.fingerprint, found.end_ids) == (TEMPLATE.fingerprint, (257, 259))


def test_a_conversation_is_kept_from_line_to_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nagain\n"))
    talk(model, "--system=be")
    both = capsys.readouterr().out
    system = {"role": "system", "content": "be"}
    rows, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"messages": [system, QUESTION]}) + "\n")
    talk(model, f"--prompts={rows}", f"--output={output}")
    first = json.loads(output.read_text())["completion"]
    assert both.startswith(f"{first}\n")
    said = [system, QUESTION, {"role": "assistant", "content": first}, {"role": "user", "content": "again"}]
    rows.write_text(json.dumps({"messages": said}) + "\n")
    talk(model, f"--prompts={rows}", f"--output={tmp_path / 'second.jsonl'}")
    second = json.loads((tmp_path / "second.jsonl").read_text())["completion"]
    assert both == f"{first}\n{second}\n"


def test_a_file_of_conversations_goes_on_where_it_stopped(model: Path, tmp_path: Path) -> None:
    rows, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"messages": [QUESTION], "id": 1}) + '\n{"prompt": "hi"}\n')
    talk(model, f"--prompts={rows}", f"--output={output}")
    whole = output.read_text()
    one, other = map(json.loads, whole.splitlines())
    assert one["id"] == 1 and one["completion"] == other["completion"]  # a prompt is what the user says
    output.write_text(whole[: len(whole) // 2 + 5])
    talk(model, f"--prompts={rows}", f"--output={output}")
    assert output.read_text() == whole


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--chat_template=llama3"], "writes control tokens that the tokenizer lacks"),
        (["--prompt=" + "x" * 500], "the context of"),
        (["--stop=false"], "does not go with --chat"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        talk(model, *words)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and reason in line


def test_a_bad_row_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"messages": [QUESTION]}) + '\n{"messages": [{"role": "robot", "content": ""}]}\n')
    with pytest.raises(SystemExit):
        talk(model, f"--prompts={rows}", f"--output={tmp_path / 'out.jsonl'}")
    assert "in.jsonl row 2: message 1 of its messages: unknown role 'robot'" in capsys.readouterr().err


def test_an_exported_model_has_the_template_and_transformers_makes_the_same_ids(model: Path, tmp_path: Path) -> None:
    export(str(model), str(tmp_path / "hf"), format="hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    made = theirs.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=True)["input_ids"]
    again = chat_template_of(tmp_path / "hf", tokenizer_of(tmp_path / "hf"))
    assert made == TEMPLATE.prompt_ids([QUESTION]) == again.prompt_ids([QUESTION])
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == [257, 259]
