"""tools/surgery.py: from a folder to a folder that is read back; and what it refuses before it reads weights."""

from pathlib import Path

import pytest
import torch

from llm import LLM, ModelArgs
from llm.pretrained import tokenizer_of
from llm.tokenizer import ByteTokenizer
from tests.model.models import llama4
from tools.surgery import main

VOCAB = ByteTokenizer().vocab_size


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in bfloat16 with a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "source"
    llama4(nope_layer_interval=None, vocab_size=VOCAB).bfloat16().save_pretrained(path, tokenizer=ByteTokenizer())
    return path


def operate(source: Path, target: Path, command: str, *flags: str) -> tuple[torch.Tensor, torch.Tensor, LLM]:
    """Logits of the model before and after, in float32, and the model after."""
    main([command, str(source), str(target), *flags])
    before, after = (LLM.from_pretrained(path) for path in (source, target))
    ids = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return before(ids).logits, after(ids).logits, after


@pytest.mark.parametrize(
    ("command", "flags", "reported"),
    [
        ("upcycle", ["--n_experts=4", "--interleave=2", "--dense_layers=3"], "model.moe: None -> {'n_experts': 4"),
        ("deepen", ["--n_layers=6"], "model.n_layers: 4 -> 6"),
        ("vocabulary", ["--vocab_size", str(VOCAB + 6)], f"model.vocab_size: {VOCAB} -> {VOCAB + 6}"),
    ],
)
def test_the_folder_written_holds_the_same_function(command, flags, reported, source, tmp_path, capsys):
    before, after, model = operate(source, tmp_path / "new", command, *flags)
    # copies and zeros only, but that a BLAS may add up in another order in a larger output matrix
    assert (after[..., :VOCAB] - before).abs().max() <= 1e-6 * before.abs().max()
    assert tokenizer_of(tmp_path / "new").fingerprint == ByteTokenizer().fingerprint
    out = capsys.readouterr().out
    assert reported in out and "as bfloat16" in out
    assert command == "vocabulary" or "change by at most 0.0e+00" in out
    assert model.args != LLM.from_pretrained(source).args


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        ({"vocab_size": 11, "encoder_layers": 1}, "logits of 64 random tokens"),
        ({"input_dim": 3, "output_dim": 2}, "outputs of 64 random steps"),
        (
            {
                "vocab_size": 11,  # the token of a slot is surely among 64 random ones
                "vision": {
                    "image_size": 8, "patch_size": 2, "dim": 8, "n_layers": 1, "n_heads": 2, "output_dim": 8,
                    "patch_token_id": 3,
                },
            },
            "logits of 64 random tokens",
        ),
    ],
    ids=["encoder", "values", "vision"],
)  # fmt: skip
def test_models_that_read_more_than_tokens_are_compared_too(changes, reported, tmp_path, capsys):
    LLM(ModelArgs(dim=8, n_layers=2, n_heads=2, max_seq_len=64, **changes)).save_pretrained(tmp_path / "old")
    main(["deepen", str(tmp_path / "old"), str(tmp_path / "new"), "--n_layers=4"])
    assert f"{reported} change by at most 0.0e+00" in capsys.readouterr().out


def test_flags_of_a_mixture_arrive(source, tmp_path):
    flags = ["--n_experts=6", "--top_k=4", "--hidden=32", "--score=softmax", "--apply=output", "--renorm"]
    flags += ["--shared=false", "--aux_alpha=0.01", "--z_alpha=0.001", "--dtype=float32", "--seed=5"]
    before, after, model = operate(source, tmp_path / "new", "upcycle", *flags)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()  # sums of four experts' parts, in four layers
    assert model.args.moe is not None
    assert model.args.moe.model_dump(exclude_defaults=True) == {
        "n_experts": 6, "top_k": 4, "hidden": 32, "score": "softmax", "apply": "output", "renorm": True,
        "shared": False, "aux_alpha": 0.01, "z_alpha": 0.001,
    }  # fmt: skip


def test_nope_says_that_it_is_another_function(source, tmp_path, capsys):
    before, after, model = operate(source, tmp_path / "new", "nope", "--interval=4")
    assert [spec.attention.rope for spec in model.specs] == [True, True, True, False]
    assert (after - before).abs().max() > 1e-2 * before.abs().max()
    assert "not function-preserving" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["upcycle", "SRC", "DST"], "missing --n_experts"),
        (["upcycle", "SRC", "DST", "--n_experts=4", "--topk=2"], "unknown flag --topk; did you mean --top_k?"),
        (["upcycle", "SRC", "DST", "--n_experts=4", "--top_k=5"], "model.moe.top_k=5 exceeds"),
        (["upcycle", "SRC", "DST", "--n_experts=4", "--shared=false"], "model.moe.renorm=False"),
        (["upcycle", "SRC", "DST", "--n_experts=4", "--score=tanh"], "--score=tanh: possible are sigmoid, softmax"),
        (["upcycle", "SRC", "DST", "--n_experts=4", "--dense_layers=9"], "model.moe.dense_layers=[9]"),
        (["deepen", "SRC", "DST", "--n_layers=4"], "n_layers=4 must be above the model's 4"),
        (["deepen", "SRC", "DST", "--n_layers=5", "--where=start"], "--where=start: possible are spread, end"),
        (["vocabulary", "SRC", "DST", "--vocab_size=9"], "vocab_size=9 must be above"),
        (["nope", "SRC", "DST", "--interval=0"], "--interval=0 must be at least 1"),
        (["nope", "SRC", "DST", "--interval=5"], "interval=5 makes none of the 4 layers"),
        (["nope", "SRC", "DST", "--interval=4", "--dtype=int8"], "--dtype=int8 is not one of float32"),
        (["nope", "SRC", "SRC", "--interval=4"], "source: exists already"),
        (["nope", "NOWHERE", "DST", "--interval=4"], "NOWHERE"),
        (["nop", "SRC", "DST", "--interval=4"], "unknown command 'nop'; did you mean nope?"),
        ([], "missing --command"),
    ],
)
def test_bad_lines_are_refused_before_weights_are_read(line, message, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    places = {"SRC": str(source), "DST": str(tmp_path / "new"), "NOWHERE": str(tmp_path / "NOWHERE")}
    with pytest.raises(SystemExit) as end:
        main([places.get(word, word) for word in line])
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and last.startswith("error: ") and message in last
    assert not (tmp_path / "new").exists()


def test_help_names_the_commands(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {command}: " in out for command in ("upcycle", "deepen", "vocabulary", "nope"))
