"""The forms of `data.train` and `data.valid`, and the flags that reach into them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llm.data.sources import SourceSpec
from llm.errors import UserError
from llm.train.config import RunConfig, load_config
from llm.train.config.flags import help_text


def loaded(tmp_path: Path, data: dict[str, Any], **overrides: Any) -> RunConfig:
    path = tmp_path / "run.yaml"
    model = dict(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=-1, max_seq_len=2048)
    path.write_text(yaml.safe_dump({"model": model, "tokenizer": {"kind": "bytes"}, "data": data}))
    return load_config(path, {f"data.{key.replace('__', '.')}": value for key, value in overrides.items()})


def test_a_list_may_hold_paths_and_sources(tmp_path: Path) -> None:
    data = loaded(tmp_path, {"train": ["a.jsonl", {"path": "b.txt", "weight": 2}], "valid": {"path": "c.txt"}}).data
    assert data.train == [SourceSpec(path="a.jsonl"), SourceSpec(path="b.txt", weight=2)]
    assert data.valid == [SourceSpec(path="c.txt")]
    assert RunConfig.model_validate(loaded(tmp_path, {"train": ["a", "b"]}).model_dump(mode="json"))


def test_flags_reach_into_a_path_a_source_and_a_list(tmp_path: Path) -> None:
    data = loaded(tmp_path, {"train": "a.jsonl"}, train__text_field="body", train__separator="</s>").data
    assert data.train == [SourceSpec(path="a.jsonl", text_field="body", separator="</s>")]
    data = loaded(tmp_path, {"train": ["a.jsonl", "b/a.jsonl"]}, train__1__name="other", train__0="c.txt").data
    assert data.train == [SourceSpec(path="c.txt"), SourceSpec(path="b/a.jsonl", name="other")]
    data = loaded(tmp_path, {"train": "a.jsonl"}, valid="b.jsonl", valid__text_field="body").data
    assert (data.train, data.valid) == ("a.jsonl", [SourceSpec(path="b.jsonl", text_field="body")])


@pytest.mark.parametrize(
    ("data", "overrides", "message"),
    [
        ({"train": ["a", "b"]}, {"train__text_field": "x"}, "--data.train.text_field: data.train is a list of 2"),
        ({"train": ["a", "b"]}, {"train__2__name": "x"}, "--data.train.2.name: no such key.*numbered 0 to 1"),
        ({"train": "a", "valid": 0.1}, {"valid__text_field": "x"}, "data.valid is a share"),
        ({"train": "a", "valid": 5}, {}, "data.valid=5: a share of the training documents lies between 0 and 1"),
        ({"train": "a", "valid": 0.0}, {}, "data.valid=0.0: a share"),
        ({"train": "a"}, {"train__text_feld": "x"}, "unknown key data.train.0.text_feld; did you mean text_field"),
        ({"train": ["web/a.jsonl", "b/a.txt"]}, {}, "different names, not a, a;.*--data.train.1.name=a_1"),
        ({"train": ["a", {"path": "b", "weight": 1e-4}]}, {}, "source b: its weight is below 1/8192.*train.1.weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_the_config_alone(
    tmp_path: Path, data: dict[str, Any], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        loaded(tmp_path, data, **overrides)


@pytest.mark.parametrize("name", ["../x", "web/en", "a b", "x" * 101, "..", "\u4e9c" * 80, "a\nb"])
def test_a_name_that_is_no_name_is_refused_with_its_key(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"data\.train\.0\.name=.*: a name has at most 100 letters, digits, \. _ and -"):
        loaded(tmp_path, {"train": [{"path": "a", "name": name}, "b"]})
    assert loaded(tmp_path, {"train": [{"path": "a", "name": "web.en_-2\u00e9"}, "b"]})


@pytest.mark.parametrize(
    ("path", "name"),
    [("texts/book.v2.txt", "book"), ("a\nb.txt", "a_b"), ("my texts/", "my texts"), (".hidden", ".hidden")],
)
def test_a_name_made_from_a_path_can_be_a_file_name(path: str, name: str) -> None:
    assert SourceSpec(path=path).resolved_name() == name
    assert len(SourceSpec(path="\u4e9c" * 80 + ".txt").cache_name().encode()) <= 200


def test_the_mixture_of_weights_near_the_largest_float_is_whole(tmp_path: Path) -> None:
    data = [{"path": "a", "weight": 1.7e308}, {"path": "b", "weight": 1.7e308}]
    assert loaded(tmp_path, {"train": data})


def test_help_lists_the_forms_and_the_keys() -> None:
    lines = help_text().splitlines()
    assert any(line.split()[0] == "--data.valid" and "share" in line for line in lines if line.split())
    assert {"--data.train", "--data.train.text_field", "--data.train.separator"} <= {
        line.split()[0] for line in lines if line.split()
    }


def test_kinds_their_columns_and_packing_are_keys(tmp_path: Path) -> None:
    train = [{"path": "a.jsonl", "kind": "chat", "columns": {"messages": "dialog"}}, "b.txt"]
    data = loaded(tmp_path, {"train": train, "packing": "none"}).data
    assert data.train[0] == SourceSpec(path="a.jsonl", kind="chat", columns={"messages": "dialog"})
    assert data.packing == "none"
    data = loaded(tmp_path, {"train": "a.jsonl"}, train__kind="chat", train__columns={"messages": "dialog"}).data
    assert data.train == [SourceSpec(path="a.jsonl", kind="chat", columns={"messages": "dialog"})]
    with pytest.raises(UserError, match=r"data\.packing"):
        loaded(tmp_path, {"train": train, "packing": "worst_fit"})


def test_rows_of_samples_are_not_cut_into_sequences(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    data = {"train": ["a.txt", {"path": "b.jsonl", "kind": "chat"}]}
    raw = {"tokenizer": {"kind": "bytes"}, "data": data, "train": {"seq_len": 64, "seq_len_schedule": [[0, 32]]}}
    raw["model"] = dict(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=-1, max_seq_len=2048)
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"train\.seq_len_schedule=.*rows of kind chat hold what is never cut"):
        load_config(path)
