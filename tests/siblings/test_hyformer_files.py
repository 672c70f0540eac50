"""Hyformer's models on disk: the same bits come back, the rest of the project reads the same folder, and what does not
fit is said."""

import json
import logging
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
import yaml

from llm import LLM, ModelArgs
from llm.cli import run_cli
from llm.errors import UserError
from llm.jobs.generate import continue_prompt
from llm.pretrained import dtype_of, tokenizer_of
from llm.siblings.hyformer import Hyformer, HyformerCheckpoint, HyformerConfig
from llm.tokenizer import TokenizerConfig, load_tokenizer
from tests.shared import ROOT
from tests.siblings.small import SIZES, config, hyformer, ids

REPOSITORY = "someone/hyformer-model"


def same_bits(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_comes_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = hyformer(num_prediction_tasks=3, pool="first", resid_dropout=0.1).to(dtype)
    model.save_pretrained(tmp_path / "m")
    loaded = Hyformer.from_pretrained(tmp_path / "m")
    assert same_bits(model, loaded) and loaded.config == model.config and not loaded.training
    assert loaded.load_report == ((), ()) and next(loaded.parameters()).dtype == dtype


def test_a_folder_holds_the_two_files_of_the_document_and_safetensors_reads_the_state_dict(tmp_path: Path) -> None:
    model = hyformer()
    model.save_pretrained(str(tmp_path / "m"))
    assert {"model.safetensors", "config.json"} <= {file.name for file in (tmp_path / "m").iterdir()}
    stored = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    expected = model.state_dict()
    assert stored.keys() == expected.keys() and all(torch.equal(stored[name], expected[name]) for name in stored)
    assert "output" not in " ".join(stored), "a tied head is stored once"


def test_the_two_files_alone_are_enough(tmp_path: Path) -> None:
    model = hyformer()
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    assert same_bits(model, Hyformer.from_pretrained(tmp_path / "m"))


def test_a_saved_model_is_a_model_folder_for_everything_else(tmp_path: Path) -> None:
    model = hyformer(num_prediction_tasks=2).to(torch.bfloat16)
    tokenizer = load_tokenizer(TokenizerConfig(kind="bytes"))
    model.save_pretrained(tmp_path / "m", tokenizer=tokenizer)
    read = LLM.from_pretrained(tmp_path / "m", torch.bfloat16)
    assert read.args == model.llm.args and same_bits(read, model.llm)
    assert dtype_of(tmp_path / "m") == torch.bfloat16
    assert tokenizer_of(tmp_path / "m").fingerprint == tokenizer.fingerprint


def test_a_damaged_weight_of_a_saved_model_is_found(tmp_path: Path) -> None:
    hyformer().save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        LLM.from_pretrained(tmp_path / "m")


def test_a_model_of_ours_becomes_a_hyformer(tmp_path: Path) -> None:
    """A model folder as any run or conversion leaves it."""
    model = hyformer(num_prediction_tasks=1)
    model.llm.save_pretrained(tmp_path / "m")
    loaded = Hyformer.from_pretrained(tmp_path / "m")
    assert same_bits(loaded, model) and loaded.config.prediction == "regression"
    assert loaded.config.args() == model.llm.args


def test_values_are_predicted_in_the_units_of_labels(tmp_path: Path) -> None:
    """A model that learned scaled values says values: mean and deviation of its training labels are in its args."""
    scaled = {"prediction_mean": (5.0, -1.0), "prediction_std": (2.0, 0.5)}
    plain = hyformer(num_prediction_tasks=2, prediction="regression")
    model = hyformer(num_prediction_tasks=2, prediction="regression",
                     model_args={**plain.config.model_args, **scaled})  # fmt: skip
    model.save_pretrained(tmp_path / "m")
    logits = Hyformer.from_pretrained(tmp_path / "m")(ids(), "prediction").logits
    expected = plain(ids(), "prediction").logits * torch.tensor([2.0, 0.5]) + torch.tensor([5.0, -1.0])
    torch.testing.assert_close(logits, expected)


def test_saving_again_takes_the_place_of_what_was_there_and_keeps_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(kind="bytes"))
    hyformer().save_pretrained(tmp_path / "m", tokenizer=tokenizer)
    other = hyformer(seed=1)
    other.save_pretrained(tmp_path / "m")
    assert same_bits(LLM.from_pretrained(tmp_path / "m"), other.llm)
    assert tokenizer_of(tmp_path / "m").fingerprint == tokenizer.fingerprint
    Hyformer.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "copy")
    assert tokenizer_of(tmp_path / "copy").fingerprint == tokenizer.fingerprint


OTHERS = [
    ("config.json", '{"model_type": "llama"}'), ("config.json", '{"model_type": "t5", "d_model": 16}'),
    ("model.safetensors", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), OTHERS)
def test_a_folder_of_another_model_is_not_written_over(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"holds another model .{name}."):
        hyformer().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_no_pickle_is_written(tmp_path: Path) -> None:
    for save in (
        lambda: hyformer().save_pretrained(tmp_path / "m", safe_serialization=False),
        lambda: HyformerCheckpoint.from_model(hyformer()).save(tmp_path / "m", safe_serialization=False),
    ):
        with pytest.raises(ValueError, match="only safetensors are written"):
            save()
    assert not list(tmp_path.iterdir())


def test_no_pickle_is_read(tmp_path: Path) -> None:
    config().to_json(tmp_path / "config.json")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no model.safetensors; pickled weights are not read"):
        Hyformer.from_pretrained(tmp_path)


def test_tensors_of_whole_numbers_are_refused_by_name(tmp_path: Path) -> None:
    safetensors.torch.save_file({"counts": torch.zeros(2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    config().to_json(tmp_path / "config.json")
    for read in (Hyformer.from_pretrained, lambda folder: HyformerCheckpoint.load(folder / "model.safetensors")):
        with pytest.raises(UserError, match="model.safetensors: counts is I64; known are F64"):
            read(tmp_path)


def test_a_model_read_without_a_tokenizer_is_saved_without_one(tmp_path: Path) -> None:
    hyformer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    Hyformer.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "copy")
    assert LLM.from_pretrained(tmp_path / "copy").tokenizer is None


class TestStrictness:
    """What files and model have apart from each other."""

    def saved(self, tmp_path: Path) -> Path:
        hyformer(num_prediction_tasks=3).save_pretrained(tmp_path / "m")
        return tmp_path / "m"

    def test_missing_and_unexpected_keys_are_in_the_return_and_in_one_line(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder, wider = self.saved(tmp_path), config(n_layers=3)
        with caplog.at_level(logging.WARNING):
            model = Hyformer.from_pretrained(folder, config=wider, strict=False)
        assert model.load_report.unexpected_keys == ("llm.prediction.bias", "llm.prediction.weight")
        assert len(model.load_report.missing_keys) == 9
        assert all(name.startswith("llm.layers.2.") for name in model.load_report.missing_keys)
        (line,) = [record.getMessage() for record in caplog.records]
        assert "misses llm.layers.2." in line and "and 5 more" in line and "\n" not in line
        assert "has, beyond the model, llm.prediction.bias, llm.prediction.weight" in line

    def test_what_is_there_is_loaded_and_what_is_missing_keeps_its_initial_values(self, tmp_path: Path) -> None:
        folder = self.saved(tmp_path)
        torch.manual_seed(5)
        model = Hyformer.from_pretrained(folder, config=config(n_layers=3), strict=False)
        fresh, stored = hyformer(seed=5, n_layers=3).state_dict(), hyformer(num_prediction_tasks=3).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, stored.get(name, fresh[name])), name

    def test_a_load_without_a_difference_says_nothing(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        model = Hyformer.from_pretrained(self.saved(tmp_path), strict=False)
        assert model.load_report == ((), ()) and not caplog.records

    def test_strict_refuses_in_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(UserError) as error:
            Hyformer.from_pretrained(self.saved(tmp_path), config=config())
        assert "llm.prediction.bias, llm.prediction.weight; strict=False" in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("strict", [True, False])
    def test_another_shape_is_refused_either_way(self, tmp_path: Path, strict: bool) -> None:
        with pytest.raises(UserError, match=r"has shape \(50, 16\), expected \(50, 32\)"):
            Hyformer.from_pretrained(self.saved(tmp_path), config=config(d_model=32), strict=strict)

    def test_a_file_of_which_nothing_is_a_parameter_is_refused_either_way(self, tmp_path: Path) -> None:
        config().to_json(tmp_path / "config.json")
        safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match="none of its 1 tensors is a parameter of the model"):
            Hyformer.from_pretrained(tmp_path, strict=False)


class TestNames:
    """A name is a folder, then a repository in the cache, then one of the hub."""

    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def test_a_local_folder_of_that_name_comes_first(self) -> None:
        model = hyformer()
        model.save_pretrained(REPOSITORY)
        assert same_bits(model, Hyformer.from_pretrained(REPOSITORY, device="cpu"))

    def test_the_cache_comes_second(self, tmp_path: Path) -> None:
        model, folder = hyformer(), tmp_path / "cache" / "models--someone--hyformer-model"
        model.save_pretrained(folder / "snapshots" / "abc")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        assert same_bits(model, Hyformer.from_pretrained(REPOSITORY))

    def test_the_hub_comes_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the place of a network: what the hub's client is asked for, and the folder that it gives."""
        model, asked = hyformer(), []
        model.save_pretrained(tmp_path / "downloaded")

        def download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
            asked.append((name, local_files_only))
            assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
            if local_files_only:
                raise FileNotFoundError("not cached")
            return str(tmp_path / "downloaded")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert same_bits(model, Hyformer.from_pretrained(REPOSITORY))
        assert asked == [(REPOSITORY, True), (REPOSITORY, False)]

    def test_a_name_that_is_nowhere_ends_in_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError) as error:
            Hyformer.from_pretrained(REPOSITORY)
        assert str(error.value).startswith(f"{REPOSITORY}: no such folder, not in the cache of huggingface_hub")
        assert "\n" not in str(error.value)

    def test_without_huggingface_hub_it_is_one_line_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(UserError, match="without huggingface_hub it is looked for nowhere else"):
            Hyformer.from_pretrained(REPOSITORY)

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match="is a file; give its folder"):
            Hyformer.from_pretrained("model.safetensors")

    @pytest.mark.parametrize("name", ["nowhere", "./some/folder", "/no/such/folder"])
    def test_a_path_that_is_no_name_of_a_repository_is_looked_for_nowhere_else(self, name: str) -> None:
        with pytest.raises(UserError, match="no such folder$"):
            Hyformer.from_pretrained(name)


def test_a_device_that_is_not_there_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device=cuda:99 cannot be used here"):
        Hyformer.from_pretrained(tmp_path, device="cuda:99")


def test_a_checkpoint_is_a_copy_that_load_state_dict_takes(tmp_path: Path) -> None:
    model = hyformer()
    checkpoint = HyformerCheckpoint.from_model(model)
    checkpoint.save(tmp_path / "new" / "model.safetensors", safe_serialization=True)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.llm.norm.weight.add_(1)
    loaded = HyformerCheckpoint.load(tmp_path / "new" / "model.safetensors")
    assert loaded.config == model.config and all(torch.equal(kept[name], t) for name, t in loaded.state_dict.items())
    model.load_state_dict(loaded.state_dict)
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


class TestConfig:
    """config.json."""

    def test_the_documents_file_is_read_and_written_as_it_is(self, tmp_path: Path) -> None:
        document = {
            "vocab_size": 32000, "d_model": 512, "n_heads": 8, "n_layers": 6, "max_seq_len": 128, "attn_dropout": 0.0,
            "resid_dropout": 0.0, "eps": 1e-6,
        }  # fmt: skip
        (tmp_path / "a.json").write_text(json.dumps(document))
        found = HyformerConfig.from_json(tmp_path / "a.json")
        assert found.to_dict() == document == HyformerConfig(32000).to_dict()
        found.to_json(tmp_path / "new" / "b.json")
        assert HyformerConfig.from_pretrained(str(tmp_path / "new" / "b.json")) == found

    def test_numbers_of_a_file_are_whole_where_they_have_to_be(self, tmp_path: Path) -> None:
        (tmp_path / "c.json").write_text('{"vocab_size": 9, "d_model": 16.0, "eps": 1}')
        found = HyformerConfig.from_json(tmp_path / "c.json")
        assert found == HyformerConfig(9, 16, eps=1.0) and isinstance(found.d_model, int)

    def test_all_keys_survive_the_file(self, tmp_path: Path) -> None:
        given = config(attn_dropout=0.1, num_prediction_tasks=4, prediction="multilabel", pool="last")
        given.to_json(tmp_path / "c.json")
        assert HyformerConfig.from_json(tmp_path / "c.json") == given

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("{", "is no JSON"),
            ("[]", "is no JSON object"),
            ('{"d_model": 16}', "vocab_size is missing"),
            ('{"vocab_size": 9, "wings": 2}', "wings is no key of a Hyformer; they are vocab_size, d_model"),
            ('{"vocab_size": 9, "model_type": "bert"}', "model_type=bert; a Hyformer's is hyformer"),
            ('{"vocab_size": 9, "n_heads": 5}', "n_heads=5 does not divide d_model=512"),
            ('{"vocab_size": "many"}', "vocab_size="),
            ('{"vocab_size": 9, "model_args": [1]}', "model_args=[1]: expected keys of ModelArgs"),
            (None, "No such file"),
        ],
    )
    def test_a_bad_file_ends_in_one_line_naming_it(self, tmp_path: Path, content: str | None, expected: str) -> None:
        file = tmp_path / "c.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError) as error:
            HyformerConfig.from_json(file)
        assert str(error.value).startswith(f"{file}: ") and expected in str(error.value)
        assert "\n" not in str(error.value)

    def test_the_projects_own_config_of_a_hyformer_is_one_without_extras_but_its_width(self) -> None:
        stated = yaml.safe_load((ROOT / "configs/siblings/hyformer_zinc.yaml").read_text())["model"]
        args = ModelArgs.model_validate({**stated, "vocab_size": 60})
        found = HyformerConfig.of(args)
        assert found.args() == args and found.model_args == {"multiple_of": 64}

    def test_the_constructor_takes_the_documents_arguments_in_their_order(self) -> None:
        model = Hyformer(*SIZES.values(), 3)
        assert model.config == HyformerConfig(**SIZES, num_prediction_tasks=3)


def test_the_command_line_continues_texts_with_a_saved_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hyformer(vocab_size=257)
    model.save_pretrained(tmp_path / "m", tokenizer=load_tokenizer(TokenizerConfig(kind="bytes")))
    run_cli(continue_prompt, [f"--model={tmp_path / 'm'}", "--prompt=ab", "--max_new_tokens=5", "--threads=1"])
    expected = Hyformer.from_pretrained(tmp_path / "m").llm.generate("ab", max_new_tokens=5)
    assert capsys.readouterr().out == expected + "\n"
