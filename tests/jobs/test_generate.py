"""The command line: what it prints and writes, and what it refuses in one line."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from launch.generate import continue_prompt
from llm.cli import run_cli
from llm.generation import device
from llm.generation.device import dtype_for, is_fast, physical_cores, set_threads
from llm.pretrained import dtype_of
from tests.generation.models import folder, shared_model, with_nan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("generation") / "model")


def generate(model: Path, *words: str) -> None:
    run_cli(continue_prompt, [f"--model={model}", "--max_new_tokens=6", "--threads=1", *words])


def refused(capsys: pytest.CaptureFixture[str], model: Path, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        generate(model, *words)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--prompt=ab"], "ab"),
        (["--prompt", ""], ""),
        (["--prompt", "--flag"], "--flag"),
        (["--prompt", "-n 5"], "-n 5"),
        (["--prompt", "- a list"], "- a list"),
        (["--prompt", "None"], "None"),
        (["--prompt", "-5 apples"], "-5 apples"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_prompt_is_taken_as_it_stands(model, capsys, words, text):
    generate(model, *words)
    assert capsys.readouterr().out == shared_model().generate(text, max_new_tokens=6) + "\n"


def test_a_search_prints_its_best(model, capsys):
    generate(model, "--prompt=ab", "--num_beams=3", "--length_penalty=0.7", "--early_stopping=true")
    settings = dict(num_beams=3, length_penalty=0.7, early_stopping=True)
    assert capsys.readouterr().out == shared_model().generate("ab", max_new_tokens=6, **settings) + "\n"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--num_beams=0"], "--num_beams=0 must be at least 1"),
        (["--length_penalty=2"], "--length_penalty=2.0 needs num_beams above 1"),
        (["--early_stopping"], "--early_stopping=true needs num_beams above 1"),
        (["--num_beams=2", "--temperature=0.5"], "--num_beams=2 does not go with temperature=0.5"),
        (["--num_beams=2", "--num_samples=3"], "--num_samples=3 does not go with --num_beams=2"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_of_a_search_are_refused_in_one_line(model, capsys, words, reason):
    assert reason in refused(capsys, model, "--prompt=ab", *words)


def test_a_pipe_gives_a_prompt_a_line(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\nxyz\n"))
    generate(model)
    expected = [shared_model().generate(text, max_new_tokens=6) for text in ("ab", "xyz")]
    assert capsys.readouterr().out == "".join(text + "\n" for text in expected)


def test_samples_are_numbered_and_the_first_is_that_of_one(model, capsys):
    generate(model, "--prompt=ab", "--temperature=1", "--seed=4")
    one = capsys.readouterr().out
    generate(model, "--prompt=ab", "--temperature=1", "--seed=4", "--num_samples=2")
    two = capsys.readouterr().out
    assert two.startswith(f"--- 1 of 2\n{one}--- 2 of 2\n")


def test_a_file_of_prompts_becomes_a_file_of_completions(model, tmp_path):
    (tmp_path / "in.txt").write_text("ab\nxyz\n")
    generate(model, f"--prompts={tmp_path / 'in.txt'}", f"--output={tmp_path / 'made/out.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "made/out.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == shared_model().generate(["ab", "xyz"], max_new_tokens=6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt=a", "--temperature=nan"], "error: --temperature=nan"),
        (["--prompt=a", "--temperature=inf"], "error: --temperature=inf"),
        (["--prompt=a", "--temperature=-1"], "error: --temperature=-1.0 must be"),
        (["--prompt=a", "--temperature=1", "--top_p=2"], "error: --top_p=2.0 must lie"),
        (["--prompt=a", "--repetition_penalty=0"], "error: --repetition_penalty=0.0 must be"),
        (["--prompt=a", "--seed=-3"], "error: --seed=-3 must lie"),
        (["--prompt=a", "--num_samples=2"], "error: --num_samples=2 needs a temperature above 0"),
        (["--prompt=a", "--num_samples=0"], "error: --num_samples=0 must be at least 1"),
        (["--prompt=a", "--dtype=fp8"], "error: --dtype=fp8: possible are auto, fp32, bf16, fp16"),
        (["--prompt=a", "--prompts=b"], "error: --prompt and --prompts do not go together"),
        (["--prompts=b"], "error: --prompts needs --output"),
        (["--prompt=a", "--output=b"], "error: --output goes with --prompts"),
        (["--prompts=/nowhere", "--output=b"], "error: --prompts=/nowhere: no such file"),
        (["--prompt", "--temperature=1"], "error: --prompt has no value; one that looks like a flag is given as"),
        (["--prompt=caf\udce9"], "error: --prompt=caf"),
        (["--prompt=" + "a" * 99], "error: --prompt has 100 tokens; the context of"),
        (["--image=a.png"], "error: --image goes with --prompt or --chat"),
        (["--prompts=b", "--output=c", "--image=a.png"], "error: --prompts=b: no such file"),
        (["--prompt=a", "--image_root=."], "error: --image_root goes with --prompts"),
        (["--prompt=a", "--max_pixels=0"], "error: --max_pixels=0 is not from 1 to"),
        (["--prompt=a", "--image=a.png", "--image=b.png"], "error: --image=a.png is for a model with vision; "),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_flags_are_one_line(model, capsys, words, message):
    assert refused(capsys, model, *words).startswith(message)


def test_a_file_whose_rows_have_images_is_refused_by_row_for_a_model_without_vision(model, tmp_path, capsys):
    rows = [{"prompt": "a"}, {"prompt": "b", "images": ["1.png"]}, {"prompt": "c", "images": 3}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"--prompts={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    assert "in.jsonl row 3: `images` is no list of paths" in refused(capsys, model, *words)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert "in.jsonl row 2: image '1.png' is for a model with vision" in refused(capsys, model, *words)
    assert "--image does not go with --prompts" in refused(capsys, model, *words, "--image=1.png")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("words", [[], ["--temperature=0.8"]])
def test_weights_that_are_no_numbers_are_named(tmp_path, capsys, words):
    made = with_nan(tmp_path / "model")
    assert f"{made}: at new token 1 of --prompt, 258 of 258 logits are not finite" in refused(
        capsys, made, "--prompt=ab", *words
    )


def test_the_context_is_said_where_it_ends_a_text(model, capsys):
    generate(model, "--prompt=" + "a" * 60, "--stop=false")
    assert "note: ended after 3 tokens, where the context of 64 tokens does" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_the_folders_dtype_where_the_device_is_fast_at_it(tmp_path, monkeypatch, dtype, fast):
    made = shared_model().__class__(shared_model().args).to(dtype)
    made.save_pretrained(tmp_path / "model")
    assert dtype_of(tmp_path / "model") == dtype
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: fast)
    assert dtype_for(tmp_path / "model", "auto", CPU) == (dtype if fast else torch.float32)
    assert dtype_for(tmp_path / "model", "bf16", CPU) == torch.bfloat16
    assert is_fast(torch.float32, CPU)


@pytest.mark.parametrize(
    ("asked", "variable", "n_parameters", "expected"),
    [(3, "2", 10, 3), (None, "2", 10, None), (None, None, 10, 1), (None, "", 10**9, 5), (None, None, 10**9, 5)],
)
def test_threads_are_those_asked_for_then_the_environments_then_by_size(
    monkeypatch, asked, variable, n_parameters, expected
):
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(device, "physical_cores", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    set_threads(asked, n_parameters)
    assert found == ([] if expected is None else [expected])


@pytest.mark.parametrize(("quota", "expected"), [(None, 2), (8.0, 2), (1.5, 1), (0.5, 1)])
def test_physical_cores_count_each_core_once_and_heed_the_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5}, raising=False)
    monkeypatch.setattr(device, "_siblings", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")
    monkeypatch.setattr(device, "_quota", lambda: quota)
    assert physical_cores() == expected
