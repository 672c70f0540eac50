"""Which files and tensors of a foreign folder are a model's weights: transformers's choice, and said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm import LLM
from llm.foreign.files import open_foreign
from tests.foreign.folders import refused, tensors_of
from tests.foreign.models import logits_of, reference, tokens, transformers
from tools import convert

safetensors_torch = pytest.importorskip("safetensors.torch")
save_file = safetensors_torch.save_file
INDEX, FIRST = "model.safetensors.index.json", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "a"
    reference("llama", "ratio 3").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "a"))


def put(path: Path, tensors: dict[str, Tensor], first: float | None = None) -> None:
    """Write tensors; with `first` as the first value of the table, by which sets differ."""
    held = dict(tensors)
    if first is not None:
        held[FIRST] = held[FIRST].clone()
        held[FIRST][0, 0] = first
    if path.suffix == ".safetensors":
        save_file(held, path, metadata={"format": "pt"})
    else:
        torch.save(held, path)


def index(folder: Path, names: dict[str, str], name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def theirs(folder: Path) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return float(model.get_input_embeddings().weight[0, 0].detach())


def ours(folder: Path) -> float:
    return float(LLM.from_pretrained(folder).get_parameter("tok_embeddings.weight")[0, 0].detach())


def single_beside_index(folder: Path, tensors: dict[str, Tensor]) -> str:
    put(folder / "part.safetensors", tensors, 2.0)
    index(folder, dict.fromkeys(tensors, "part.safetensors"))
    return f"{INDEX}, part.safetensors beside model.safetensors,"


def pickle_beside_safetensors(folder: Path, tensors: dict[str, Tensor]) -> str:
    put(folder / "pytorch_model.bin", tensors, 2.0)
    return "pytorch_model.bin beside model.safetensors,"


def parts_beside_pickle(folder: Path, tensors: dict[str, Tensor]) -> str:
    put(folder / "pytorch_model.bin", tensors, 2.0)
    put(folder / "part.safetensors", tensors, 3.0)
    index(folder, dict.fromkeys(tensors, "part.safetensors"))
    (folder / "model.safetensors").unlink()
    return f"pytorch_model.bin beside {INDEX},"


def pickle_beside_pickle_parts(folder: Path, tensors: dict[str, Tensor]) -> str:
    put(folder / "pytorch_model.bin", tensors, 2.0)
    put(folder / "pytorch_model-1.bin", tensors, 3.0)
    index(folder, dict.fromkeys(tensors, "pytorch_model-1.bin"), "pytorch_model.bin.index.json")
    (folder / "model.safetensors").unlink()
    return "pytorch_model-1.bin, pytorch_model.bin.index.json beside pytorch_model.bin,"


def parts_of_an_older_save(folder: Path, tensors: dict[str, Tensor]) -> str:
    put(folder / "model-00001-of-00001.safetensors", tensors, 3.0)
    put(folder / "model-00001-of-00002.safetensors", tensors, 2.0)
    index(folder, dict.fromkeys(tensors, "model-00001-of-00001.safetensors"))
    (folder / "model.safetensors").unlink()
    return f"model-00001-of-00002.safetensors beside {INDEX},"


def variant(folder: Path, tensors: dict[str, Tensor]) -> str:
    put(folder / "model.fp16.safetensors", tensors, 2.0)
    return "model.fp16.safetensors beside model.safetensors,"


def meta_beside(folder: Path, tensors: dict[str, Tensor]) -> str:
    put(folder / "consolidated.00.pth", tensors, 2.0)
    (folder / "params.json").write_text("{}")
    return "consolidated.00.pth beside model.safetensors,"


def meta_in_a_folder(folder: Path, tensors: dict[str, Tensor]) -> str:
    (folder / "original").mkdir()
    put(folder / "original" / "consolidated.00.pth", tensors, 2.0)
    return "original/consolidated.* beside model.safetensors,"


def named_by_the_config(folder: Path, tensors: dict[str, Tensor]) -> str:
    put(folder / "best.safetensors", tensors, 2.0)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_weights": "best.safetensors"}))
    return "model.safetensors beside best.safetensors,"


SETS = (
    single_beside_index, pickle_beside_safetensors, parts_beside_pickle, pickle_beside_pickle_parts,
    parts_of_an_older_save, variant, meta_beside, meta_in_a_folder, named_by_the_config,
)  # fmt: skip


@pytest.mark.parametrize("add", SETS, ids=lambda add: add.__name__)
def test_of_several_sets_of_weights_that_of_transformers_is_read_and_said(add, folder, caplog):
    said = add(folder, tensors_of(folder))
    assert ours(folder) == theirs(folder)
    lines = [record.message for record in caplog.records]
    assert lines == [f"note: {folder}: holds {said} which is read, as by transformers"]


def test_one_set_of_weights_and_its_index_say_nothing(folder, caplog):
    index(folder, dict.fromkeys(tensors_of(folder), "model.safetensors"))
    (folder / "original").mkdir()
    (folder / "training_args.bin").write_bytes(b"")
    ours(folder)
    assert not caplog.records


INSTEAD: dict[str, tuple[list[str], str]] = {
    "an adapter": (["adapter_config.json", "adapter_model.safetensors"], "but an adapter: merge it into its base"),
    "a variant": (["model.fp16.safetensors"], "but model.fp16.safetensors, which is not read; rename or convert it"),
    "parts alone": (["model-00001-of-00002.safetensors"], "without an index that lists them"),
    "Meta's files": (["consolidated.00.pth", "params.json"], "as Meta writes them: move config.json out"),
    "another program's": (["model-q4.gguf"], "but model-q4.gguf, which is not read"),
}


@pytest.mark.parametrize(("names", "said"), INSTEAD.values(), ids=INSTEAD)
def test_a_folder_without_weights_says_what_is_there_instead(names, said, folder, capsys):
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"")
    line = refused(capsys, "inspect", folder)
    assert "holds no model.safetensors, " in line and said in line


def test_an_adapter_beside_whole_weights_is_refused(folder, capsys):
    (folder / "adapter_config.json").write_text("{}")
    assert "holds adapter_config.json beside model.safetensors" in refused(capsys, "inspect", folder)


def test_an_index_may_name_a_tied_head_that_no_part_holds(tmp_path, caplog):
    model = reference("llama", "one kv head, tied")
    model.save_pretrained(tmp_path / "a")
    index(tmp_path / "a", dict.fromkeys([*tensors_of(tmp_path / "a"), "lm_head.weight"], "part.safetensors"))
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "part.safetensors")
    check_equal(tmp_path / "a", model)
    assert "the index names lm_head.weight, which no part holds and the model does not need" in caplog.text


def test_parts_may_hold_more_and_less_than_the_index_names(folder, caplog):
    """What the model needs is read, wherever it lies; what is nobody's is passed over, and both are said."""
    tensors = tensors_of(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    put(folder / "a.safetensors", tensors | {"mtp.fc.weight": torch.zeros(4, 4, dtype=torch.int8)})
    index(folder, {key: "a.safetensors" for key in tensors if key != "model.norm.weight"})
    check_equal(folder, model)
    assert "mtp.fc.weight is in a part but not in the index, and nothing needs it: not read" in caplog.text
    assert "model.norm.weight is in a part but not in the index, and read, as by transformers" in caplog.text


@pytest.mark.parametrize("meant", ["a.safetensors", "b.safetensors"])
def test_of_a_tensor_in_two_parts_the_last_is_read_unless_the_index_means_another(meant, folder, caplog, capsys):
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    put(folder / "a.safetensors", tensors, 2.0)
    put(folder / "b.safetensors", {FIRST: tensors[FIRST]}, 3.0)
    index(folder, dict.fromkeys(tensors, "a.safetensors") | {FIRST: meant, "other": "b.safetensors"})
    if meant == "a.safetensors":
        assert f"means the one in {meant}, transformers reads the one in b." in refused(capsys, "inspect", folder)
        put(folder / "b.safetensors", {FIRST: tensors[FIRST]}, 2.0)  # the same in both: no question
    assert ours(folder) == theirs(folder)
    assert f"{FIRST} is in a.safetensors and b.safetensors; the last is read" in caplog.text


def check_equal(folder: Path, model: torch.nn.Module) -> None:
    ids = tokens(1, 20)
    expected = logits_of(model, ids)
    # the same float32 sums in another order
    torch.testing.assert_close(
        logits_of(LLM.from_pretrained(folder), ids), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


BUFFERS: dict[str, dict[str, Tensor]] = {
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
    },
    "llama": {
        "model.position_ids": torch.arange(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6, dtype=torch.int32),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 4, 8).to(torch.float8_e4m3fn),
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.1.self_attn.bias": torch.ones(8, dtype=torch.bool),
        "model.layers.1.mlp._extra_state": torch.zeros(3, dtype=torch.uint8),
    },
}  # fmt: skip


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("family", BUFFERS)
def test_buffers_are_passed_over_by_name_whatever_their_dtype(family, file, tmp_path, capsys):
    model = reference(family, next(iter({"gpt_neox": ["a quarter rotated"], "llama": ["ratio 3"]}[family])))
    model.save_pretrained(tmp_path / "a")
    tensors = tensors_of(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    put(tmp_path / "a" / file, tensors | BUFFERS[family])
    check_equal(tmp_path / "a", model)
    convert.main(["inspect", str(tmp_path / "a")])
    said = capsys.readouterr().out
    assert f"tensors     {len(tensors)}, all known\n" in said and f"not read    {len(BUFFERS[family])}: " in said
    convert.main(["import", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "rounded" not in capsys.readouterr().out  # buffers have no part in the dtype of the weights


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e5m2, torch.float32])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_unknown_tensors_are_named_and_weights_of_other_dtypes_too(file, dtype, folder, capsys):
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    put(folder / file, tensors | {"model.odd": torch.zeros(2, 2).to(dtype)})
    assert "has model.odd, which the family does not know" in refused(capsys, "inspect", folder)
    put(folder / file, tensors | {"model.norm.weight": tensors["model.norm.weight"].to(dtype)})
    if dtype is not torch.float32:
        assert f"{file}: model.norm.weight is " in refused(capsys, "inspect", folder)


def test_a_model_saved_without_its_head_is_read_where_the_head_is_tied(tmp_path, caplog):
    model = reference("llama", "one kv head, tied")
    model.model.save_pretrained(tmp_path / "a")
    assert "embed_tokens.weight" in tensors_of(tmp_path / "a")
    check_equal(tmp_path / "a", model)
    assert "names of tensors lack 'model.', as of a model saved without its head" in caplog.text


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "quantised": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config (gptq): quantised weights"
    ),
    "quantised in 8 bits": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config (fp8)"),
    "compressed": ({"compression_config": {"format": "pack-quantized"}}, "compression_config (pack-quantized)"),
    "images": ({"vision_config": {"hidden_size": 8}}, "vision_config makes it a multimodal model"),
    "images of an unknown family": (
        {"model_type": "gemma3", "vision_config": {"hidden_size": 8}}, "it is a multimodal model (vision_config)"
    ),
    "weights outside": ({"transformers_weights": "../model.safetensors"}, "names no safetensors file of it"),
    "weights that are not there": ({"transformers_weights": "x.safetensors"}, "x.safetensors: missing"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "said"), CONFIGS.values(), ids=CONFIGS)
def test_what_a_config_says_of_other_weights_is_refused_by_name(keys, said, folder, capsys):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    assert said in refused(capsys, "inspect", folder)


NOTED: dict[str, tuple[dict[str, Any], str]] = {
    "code of its own": ({"auto_map": {"AutoModel": "modeling_odd.Odd"}}, "auto_map names code"),
    "another class": ({"architectures": ["MistralForCausalLM"]}, "architectures=MistralForCausalLM contradict"),
    "another dtype": ({"dtype": "bfloat16"}, "dtype bfloat16, but the files hold float32"),
    "another dtype, as it was called": ({"dtype": None, "torch_dtype": "float16"}, "dtype float16, but the files"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "said"), NOTED.values(), ids=NOTED)
def test_what_a_config_says_beside_the_numbers_is_noted(keys, said, folder, caplog):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    LLM.from_pretrained(folder)
    assert said in caplog.text and len(caplog.records) == 1


def planted(key: str, *values: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = tensors_of(folder)
        tensors[key].view(-1)[: len(values)] = torch.tensor(values)
        put(folder / "model.safetensors", tensors)

    return change


def test_weights_that_are_not_finite_are_refused_by_name_unless_they_are_allowed(folder, tmp_path, capsys):
    nan, inf = float("nan"), float("inf")
    planted("model.layers.1.mlp.down_proj.weight", nan, inf, -inf)(folder)
    planted("model.layers.2.self_attn.k_proj.weight", nan)(folder)
    line = refused(capsys, "import", folder, tmp_path / "b")
    assert "model.layers.1.mlp.down_proj.weight holds 1 NaN and 2 infinite of 3,840 values" in line
    assert "model.layers.2.self_attn.k_proj.weight holds 1 NaN and 0 infinite" in line and "--allow_nonfinite" in line
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    convert.main(["import", str(folder), str(tmp_path / "b"), "--allow_nonfinite"])
    assert "note: model.layers.1.mlp.down_proj.weight holds 1 NaN" in capsys.readouterr().out
    weight = LLM.from_pretrained(tmp_path / "b").get_parameter("layers.1.feed_forward.w2.weight")
    assert int(weight.isnan().sum()) == 1 and int(weight.isinf().sum()) == 2


def test_one_expert_of_many_is_named_where_its_weights_are_not_finite(tmp_path, capsys):
    reference("qwen3_moe", "top 1, every layer").save_pretrained(tmp_path / "a")
    planted("model.layers.1.mlp.experts.5.up_proj.weight", float("nan"))(tmp_path / "a")
    line = refused(capsys, "import", tmp_path / "a", tmp_path / "b")
    assert "model.layers.1.mlp.experts.5.up_proj.weight holds 1 NaN" in line and "experts.4" not in line


def test_a_folder_of_weights_alone_has_nothing_to_be_noted(folder):
    source = open_foreign(folder)
    assert source.warnings == () and source.dropped == ()
