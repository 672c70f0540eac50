"""A folder of PEFT goes out as one model with its base, whichever kind of folder that is."""

from pathlib import Path

import pytest
import torch

from llm import LLM
from llm.pretrained import tokenizer_of
from llm.tokenizer import ByteTokenizer
from llm.tokenizers.export import export_tokenizer
from tests.foreign.folders import refused
from tests.foreign.models import logits_of, reference, tokens, transformers
from tests.foreign.test_peft import USUAL, adapted, args_of, change, in_peft, write
from tools import convert


@pytest.fixture
def base(tmp_path: Path) -> Path:
    reference("llama", "ratio 3").save_pretrained(tmp_path / "base")
    for name, content in export_tokenizer(ByteTokenizer()).files.items():
        (tmp_path / "base" / name).write_bytes(content)
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.5}')
    return tmp_path / "base"


def adapter(folder: Path, base: Path) -> Path:
    model = adapted(args_of("llama", "ratio 3", USUAL), reference("llama", "ratio 3"))
    return change(write(folder, model, "llama"), base_model_name_or_path=str(base), r=3)


@pytest.mark.parametrize("kind", ["hugging face", "ours"])
def test_an_adapter_and_its_base_are_written_as_the_model_that_they_make(kind: str, base: Path, tmp_path: Path) -> None:
    whole = base
    if kind == "ours":
        convert.main(["import", str(base), str(tmp_path / "native")])
        whole = tmp_path / "native"
    source = adapter(tmp_path / "adapter", whole)
    change(source, {})  # without what we say of its base: as PEFT writes it
    convert.main(["export", str(source), str(tmp_path / "merged"), "--format=hf"])
    expected = LLM.from_pretrained(source).state_dict()
    found = LLM.from_pretrained(tmp_path / "merged").state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    ids = tokens(2, 24)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    logits = logits_of(in_peft(reference("llama", "ratio 3"), source), ids)
    assert (logits_of(loaded, ids) - logits).abs().max() < 1e-5 * logits.abs().max()  # float32: W + s B A added first
    assert (tmp_path / "merged" / "generation_config.json").read_text() == '{"temperature": 0.5}'
    text = "one, zwei"
    assert tokenizer_of(tmp_path / "merged").encode(text) == tokenizer_of(base).encode(text)


def test_the_tokenizer_and_template_beside_an_adapter_go_before_those_of_its_base(base: Path, tmp_path: Path) -> None:
    source = change(adapter(tmp_path / "adapter", base), {})
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }} of the base")
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }} of the adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((base / name).read_bytes().replace(b"<|endoftext|>", b"<|another|>"))
    convert.main(["export", str(source), str(tmp_path / "merged")])
    merged = tmp_path / "merged"
    assert (merged / "chat_template.jinja").read_text().endswith("of the adapter")
    assert (merged / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_what_an_adapter_of_peft_cannot_go_out_as_is_refused(base: Path, tmp_path: Path, capsys) -> None:
    source = change(adapter(tmp_path / "adapter", base), {})
    for word, line in (
        ("--format=peft", "is an adapter of PEFT already; --format=hf writes it and its base as one model"),
        ("--average=true", "holds no averaged weights"),
    ):
        assert line in refused(capsys, *["export", str(source), str(tmp_path / "out"), word])
    change(source, base_model_name_or_path="somebody/model")
    assert "is no folder here" in refused(capsys, *["export", str(source), str(tmp_path / "out")])
