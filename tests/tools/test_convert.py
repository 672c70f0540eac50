"""tools/convert.py by its command line: what it writes, what it refuses, and in how much memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm import LLM, ModelArgs
from llm.checkpoint.model_folder import KEPT
from llm.pretrained import tokenizer_of
from llm.safetensors_file import SafetensorsFile
from llm.tokenizer import ByteTokenizer, TokenizerConfig, load_tokenizer
from tests.foreign.folders import LLAMA, make_all, refused, rewrite, save, tensors_of
from tests.shared import SHARED, needs_shared
from tools import convert

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def native(made: dict[str, Path]) -> Path:
    return made["native"]


@pytest.fixture(scope="module")
def foreign(made: dict[str, Path]) -> Path:
    return made["foreign"]


@pytest.fixture(scope="module")
def meta(made: dict[str, Path]) -> Path:
    return made["meta"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ["hf", "meta"])
def test_weights_come_back_bit_for_bit_in_their_dtype(dtype, format, tmp_path):
    model = save(tmp_path / "a", dtype, rope_interleaved=format == "meta")
    convert.main(["export", str(tmp_path / "a"), str(tmp_path / "b"), f"--format={format}"])
    convert.main(["import", str(tmp_path / "b"), str(tmp_path / "c")])
    convert.main(["export", str(tmp_path / "c"), str(tmp_path / "d"), f"--format={format}"])
    again = LLM.from_pretrained(tmp_path / "c", dtype).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())
    name = "model.safetensors" if format == "hf" else "consolidated.00.pth"
    if format == "hf":
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()
        assert {tensor.dtype for tensor in tensors_of(tmp_path / "d").values()} == {dtype}
    else:
        first, second = (torch.load(tmp_path / folder / name) for folder in "bd")
        assert first.keys() == second.keys() and {tensor.dtype for tensor in second.values()} == {dtype}
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_float64_is_rounded_to_float32_and_said(foreign, tmp_path, capsys):
    shutil.copytree(foreign, tmp_path / "a")
    rewrite(tmp_path / "a", lambda _, tensor: tensor.double() * (1 + 1e-12))
    convert.main(["import", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "note: 21 of 21 tensors are float64, rounded to float32\n" in capsys.readouterr().out
    convert.main(["verify", str(foreign), str(tmp_path / "b"), "--tolerance=1e-6"])


def test_tensors_of_more_precision_than_most_are_said_to_be_rounded(foreign, tmp_path, capsys):
    shutil.copytree(foreign, tmp_path / "a")
    rewrite(tmp_path / "a", lambda key, tensor: tensor if "norm" in key else tensor.bfloat16())
    convert.main(["import", str(tmp_path / "a"), str(tmp_path / "b")])
    reported = capsys.readouterr().out
    assert "note: 5 of 21 tensors are float32, rounded to bfloat16; --dtype=float32 keeps them\n" in reported
    convert.main(["import", str(tmp_path / "a"), str(tmp_path / "c"), "--dtype=float32"])
    assert "rounded" not in capsys.readouterr().out
    convert.main(["verify", str(tmp_path / "a"), str(tmp_path / "c"), "--tolerance=0"])


def test_parts_are_no_larger_than_asked_and_are_indexed(foreign):
    index = json.loads((foreign / "model.safetensors.index.json").read_text())
    tensors = tensors_of(foreign)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for path in foreign.glob("*.safetensors"):
        held = SafetensorsFile(path).entries
        size = sum(torch.Size(entry.shape).numel() * 4 for entry in held.values())
        assert size <= 20_000 or len(held) == 1
        assert {key for key, name in index["weight_map"].items() if name == path.name} == held.keys()


def test_transformers_reads_an_export(native, foreign):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(foreign)
    tokenizer = ByteTokenizer()
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    settings = transformers.GenerationConfig.from_pretrained(foreign)
    assert (settings.bos_token_id, settings.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(foreign).eval()
    ids = torch.arange(0, 60, 3)[None]
    with torch.no_grad():
        expected, actual = LLM.from_pretrained(native)(ids).logits, theirs(ids).logits
    # the same float32 sums in another order
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


TEXT = "Once upon a time, café: 3 + 4 = 7.\n\n  Ünï 日本"


@needs_shared
@pytest.mark.parametrize(
    "config",
    [
        TokenizerConfig(kind="hf", path="gpt2/tokenizer.json"),
        TokenizerConfig(kind="sentencepiece", path="llama2/tokenizer.model", lossy=True),
    ],
    ids=lambda config: config.kind,
)
def test_transformers_reads_the_tokenizer_of_an_export(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(config, base=SHARED / "data" / "tokenizers")
    LLM(ModelArgs.model_validate(LLAMA | {"vocab_size": ours.vocab_size, "dim": 8})).save_pretrained(
        tmp_path / "a", tokenizer=ours
    )
    convert.main(["export", str(tmp_path / "a"), str(tmp_path / "b")])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    # transformers leaves out the cleaning of blanks that this SentencePiece model asks for
    text = TEXT if config.kind == "hf" else " ".join(TEXT.split())
    assert theirs.encode(text, add_special_tokens=False) == list(ours.encode(text))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "b").eos_token_id == ours.eos_id
    # and ours is the same again, from the files that transformers reads
    assert list(tokenizer_of(tmp_path / "b").encode(TEXT)) == list(ours.encode(TEXT))


def test_files_that_came_along_come_back(foreign, tmp_path, capsys):
    shutil.copytree(foreign, tmp_path / "a")
    content = {
        "generation_config.json": b'{"eos_token_id": [2, 3], "temperature": 0.6}', "chat_template.jinja": b"{{ x }}\n",
        "tokenizer_config.json": b'{"tokenizer_class": "Odd"}', "special_tokens_map.json": b"{}",
        "tokenizer.json": b'{"model": {"type": "nobody reads this"}}', "merges.txt": b"#version\n", "README.md": b"no",
    }  # fmt: skip
    for name, data in content.items():
        (tmp_path / "a" / name).write_bytes(data)
    convert.main(["import", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "note: " in capsys.readouterr().out  # the tokenizer is nothing that this project can use
    convert.main(["export", str(tmp_path / "b"), str(tmp_path / "c")])
    del content["README.md"]
    assert {path.name for path in (tmp_path / "b" / KEPT).iterdir()} == content.keys()
    assert all((tmp_path / "c" / name).read_bytes() == data for name, data in content.items())
    assert {path.name for path in (tmp_path / "c").iterdir()} == {*content, "config.json", "model.safetensors"}


def test_what_stands_in_the_config_can_be_overridden(foreign, tmp_path):
    convert.main(["import", str(foreign), str(tmp_path / "b"), "--set=norm_eps=0.01,rope_theta=5e3"])
    args = LLM.from_pretrained(tmp_path / "b").args
    assert (args.norm_eps, args.rope_theta) == (0.01, 5e3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import", "{foreign}", "{new}", "--family=bert"], "family 'bert' is not known; known are"),
        (["import", "{foreign}", "{new}", "--family=meta_llama"], "dim is missing"),
        (["import", "{foreign}", "{new}", "--dtype=int8"], "--dtype=int8 is not one of float32, bfloat16, float16"),
        (["import", "{foreign}", "{new}", "--set=norm_eps"], "--set=norm_eps: give KEY=VALUE"),
        (["import", "{foreign}", "{new}", "--set=colour=3"], "colour"),
        (["import", "{foreign}", "{foreign}"], "exists already"),
        (["import", "{nowhere}", "{new}"], "no such folder"),
        (["import", "{foreign}/config.json", "{new}"], "config.json: no such folder"),
        (["import", "{native}", "{new}"], "holds neither config.json nor params.json"),
        (["import", "{foreign}", "{foreign}/config.json/new"], "config.json"),
        (["import", "{foreign}"], "missing --dst"),
        (["export", "{native}", "{new}", "--format=gguf"], "--format=gguf is not one of hf, meta"),
        (["export", "{native}", "{new}", "--dtype=float8"], "--dtype=float8 is not one of"),
        (["export", "{native}", "{new}", "--family=bert"], "family 'bert' cannot be written as hf; known are"),
        (["export", "{native}", "{new}", "--family=gpt_neox"], "a gpt_neox config cannot say"),
        (["export", "{native}", "{new}", "--shard_gb=0"], "--shard_gb=0.0 must be above 0"),
        (["export", "{native}", "{new}", "--shards=0"], "--shards=0 must be at least 1"),
        (["export", "{native}", "{new}", "--format=meta", "--shards=3"], "--shards=3 does not divide the heads, 4"),
        (["export", "{native}", "{new}", "--average"], "holds no averaged weights"),
        (["export", "{native}", "{native}"], "exists already"),
        (["export", "{nowhere}", "{new}"], "no such file or folder"),
        (["export", "{foreign}", "{new}"], "is a foreign folder already; import makes one of ours"),
        (["inspect", "{nowhere}"], "no such folder"),
        (["verify", "{native}", "{nowhere}"], "no such file or folder"),
        (["verify", "{native}", "{native}", "--tokens=0"], "--tokens=0 must be at least 1"),
        (["verify", "{native}", "{native}", "--text={nowhere}"], "nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_leaves_nothing(words, message, native, foreign, tmp_path, capsys):
    places = {"native": native, "foreign": foreign, "new": tmp_path / "new", "nowhere": tmp_path / "nowhere"}
    assert message in refused(capsys, *(word.format(**places) for word in words))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["hf", "meta"])
def test_an_export_to_float16_refuses_what_would_become_infinite(format, tmp_path, capsys):
    model = LLM(ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=32, rope_interleaved=format == "meta"))
    weight = model.get_parameter("layers.0.feed_forward.w2.weight")
    with torch.no_grad():
        weight[1, 2], weight[3, 4] = -65504.0, float("inf")  # both are the same in float16
    model.save_pretrained(tmp_path / "a")
    convert.main(["export", str(tmp_path / "a"), str(tmp_path / "b"), f"--format={format}", "--dtype=float16"])
    with torch.no_grad():
        weight[1, 2] = -7e4
    shutil.rmtree(tmp_path / "a")
    model.save_pretrained(tmp_path / "a")
    line = refused(capsys, "export", tmp_path / "a", tmp_path / "c", f"--format={format}", "--dtype=float16")
    key = "model.layers.0.mlp.down_proj.weight" if format == "hf" else "layers.0.feed_forward.w2.weight"
    assert f"{key}: 1 values, up to 7e+04, are beyond float16 (65504)" in line
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_an_import_to_float16_refuses_what_would_become_infinite(foreign, tmp_path, capsys):
    shutil.copytree(foreign, tmp_path / "a")

    def planted(value):
        def change(key, tensor):
            if key == "model.layers.0.mlp.down_proj.weight":
                tensor[1, 2], tensor[3, 4] = value, float("inf")
            return tensor

        return change

    rewrite(tmp_path / "a", planted(-65504.0))
    convert.main(["import", str(tmp_path / "a"), str(tmp_path / "b"), "--dtype=float16", "--allow_nonfinite"])
    rewrite(tmp_path / "a", planted(-7e4))
    line = refused(capsys, "import", tmp_path / "a", tmp_path / "c", "--dtype=float16", "--allow_nonfinite")
    assert "layers.0.feed_forward.w2.weight: 1 values, up to 7e+04, are beyond float16 (65504)" in line
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_damaged_model_of_ours_leaves_no_export(native, tmp_path, capsys):
    """Found only when the weights are read, in the middle of the writing."""
    shutil.copytree(native, tmp_path / "a")
    with open(tmp_path / "a" / "weights_00000.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    for format in ("hf", "meta"):
        line = refused(capsys, "export", tmp_path / "a", tmp_path / "b", f"--format={format}")
        assert "weights_00000.safetensors: damaged" in line
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def start(words: list[str], before: str = "") -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own, after some lines."""
    code = f"import os, sys\nfrom tools import convert\n{before}\nconvert.main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)


def test_killed_in_the_middle_it_leaves_no_folder_and_the_next_one_clears_up(foreign, tmp_path):
    kill = "convert.tqdm.update = lambda bar, size: os.kill(os.getpid(), 9)"  # once a tensor was written
    ended = start(["import", str(foreign), str(tmp_path / "new")], kill)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    folder, lock = sorted(tmp_path.iterdir())
    assert folder.name.startswith(".new.") and lock.name == f"{folder.name}.lock"
    convert.main(["import", str(foreign), str(tmp_path / "new")])
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_script_itself_says_one_line_and_ends_with_2(foreign, tmp_path):
    words = [str(ROOT / "tools/convert.py"), "import", str(foreign), str(tmp_path / "new"), "--dtype=int4"]
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert ended.returncode == 2 and not list(tmp_path.iterdir())
    assert ended.stderr == "error: --dtype=int4 is not one of float32, bfloat16, float16\n"


@pytest.mark.parametrize("kind", ["foreign", "meta"])
def test_inspect_says_what_is_there(kind, request, capsys):
    convert.main(["inspect", str(request.getfixturevalue(kind))])
    said = capsys.readouterr().out
    assert f"family      {'llama (hf)' if kind == 'foreign' else 'meta_llama (meta)'}\n" in said
    parameters = sum(p.numel() for p in LLM(ModelArgs.model_validate(LLAMA), device="meta").parameters())
    assert f"parameters  {parameters:,}, float32\n" in said
    assert "  ffn_hidden: 48\n" in said or "  ffn_dim_multiplier: " in said or "  multiple_of: 16\n" in said


@pytest.mark.parametrize("turned", [False, True])
def test_verify_tells_models_that_differ(turned, native, foreign, tmp_path, capsys):
    shutil.copytree(foreign, tmp_path / "a")
    rewrite(tmp_path / "a", lambda key, tensor: tensor * 1.01 if "layers.1.mlp.up" in key else tensor)
    pair = [str(native), str(tmp_path / "a")][:: -1 if turned else 1]
    with pytest.raises(SystemExit) as ended:
        convert.main(["verify", *pair])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "differ by more than 1e-05 of the largest logit"
    assert "note:" not in said  # as models they are the same
    convert.main(["verify", *pair, "--tolerance=0.5"])


@pytest.mark.parametrize("turned", [False, True])
def test_verify_is_content_with_the_same_model_in_other_forms(turned, native, foreign, meta, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text(TEXT * 20)
    for other in (foreign, meta):
        pair = [str(native), str(other)][:: -1 if turned else 1]
        convert.main(["verify", *pair, f"--text={text}", "--tokens=300"])
        assert "greedy agreement          300 of 300" in capsys.readouterr().out


def test_verify_finds_a_model_that_is_nan_different(native, foreign, tmp_path, capsys):
    shutil.copytree(foreign, tmp_path / "a")
    rewrite(tmp_path / "a", lambda key, tensor: tensor * torch.nan if key == "model.norm.weight" else tensor)
    with pytest.raises(SystemExit) as ended:
        convert.main(["verify", str(native), str(tmp_path / "a"), "--tokens=300"])
    assert ended.value.code == 1
