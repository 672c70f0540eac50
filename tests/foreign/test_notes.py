"""What a foreign folder leaves open is said once wherever it is read."""

import json
from pathlib import Path

import pytest
import yaml

from llm import LLM
from llm.foreign.export import meaning
from llm.parallel.layout import Layout
from llm.pretrained import args_of, weights_of
from llm.train.config import load_config
from llm.train.dry_run import report
from tests.distributed.harness import tiny_config, write_text
from tests.foreign.folders import save
from tools import convert, surgery

SAID = "params.json: use_scaled_rope without rope_scaling_factor, taken as 8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Meta's folder of a model whose params.json does not say by how much RoPE is scaled."""
    parent = tmp_path_factory.mktemp("models")
    scaling = {"kind": "llama3", "factor": 32.0}
    save(parent / "native", rope_interleaved=True, rope_scaling=scaling)
    convert.main(["export", str(parent / "native"), str(parent / "meta"), "--format=meta"])
    file = parent / "meta" / "params.json"
    params = json.loads(file.read_text())
    del params["rope_scaling_factor"]
    file.write_text(json.dumps(params))
    return parent / "meta"


def test_reading_a_folder_in_python_logs_its_notes_once(folder, caplog):
    model = LLM.from_pretrained(folder)
    assert [record.name for record in caplog.records] == ["llm.pretrained"]
    assert caplog.text.count(f"note: {folder}: {SAID}") == 1
    assert model.args.rope_scaling is not None and model.args.rope_scaling.factor == 8


def test_commands_say_the_notes_of_a_folder_once(folder, tmp_path, caplog, capsys):
    for words in (["inspect", folder], ["import", folder, tmp_path / "a"]):
        convert.main([str(word) for word in words])
        assert capsys.readouterr().out.count(f"note: {SAID}") == 1
    convert.main(["verify", str(folder), str(tmp_path / "a"), "--tokens=8"])
    assert caplog.text.count(f"note: {folder}: {SAID}") == 1
    caplog.clear()
    surgery.main(["deepen", str(folder), str(tmp_path / "b"), "--n_layers=3"])
    assert caplog.text.count(f"note: {folder}: {SAID}") == 1


def test_the_advice_of_the_note_works_as_it_stands(folder, tmp_path):
    convert.main(["import", str(folder), str(tmp_path / "a"), "--set=rope_scaling.factor=32"])
    assert meaning(args_of(tmp_path / "a")) == meaning(args_of(folder.parent / "native"))


def test_a_run_that_begins_with_a_folder_says_its_notes_in_its_lines_and_the_dry_run_too(folder, tmp_path, caplog):
    write_text(tmp_path, documents=8)
    raw = tiny_config(tmp_path) | {"model": {"init_from": str(folder)}}
    raw["tokenizer"] = {"kind": "bytes"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    config = load_config(tmp_path / "c.yaml")
    assert report(config, Layout(world=1)).count(f"# note: {folder}: {SAID}") == 1
    reported: list[str] = []
    weights_of(folder, reported.append)  # which llm/train/init_from.py makes lines of the run's log
    assert len(reported) == 1 and SAID in reported[0]
    assert not caplog.records
