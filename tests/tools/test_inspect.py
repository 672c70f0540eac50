"""tools/inspect.py on small checkpoints: what it reports, each kind of damage, and what it says of other paths."""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm.boxes import whole
from llm.checkpoint import fragments
from llm.checkpoint.fragments import OwnedValues
from llm.checkpoint.inspect import damaged_blocks, survey
from llm.checkpoint.reader import Checkpoint, newest_valid, seal
from llm.checkpoint.store import HIDDEN, CheckpointStore
from llm.cli import run_cli
from llm.data.mixture import Mixture
from llm.data.sources import SourceSpec
from llm.data.text import open_data, prepare_data
from llm.errors import DamagedFile, UserError
from llm.parallel.launch.world import World
from llm.parallel.layout import Layout
from llm.tokenizer import ByteTokenizer
from llm.train.config import validate
from tests.checkpoint.ranks import as_ranks
from tests.data.helpers import mixture_of, token_source
from tests.distributed.harness import ROOT, run, tiny_config
from tools.inspection import inspect

SHAPES = {"layers.2.wq.weight": (8, 10), "layers.10.norm.weight": (11,)}
LEFT, RIGHT = ((0, 8), (0, 5)), ((0, 8), (5, 10))  # as two tensor-parallel ranks hold it
BLOCK = 32
CONSUMED = 50
KINDS = ("master", "exp_avg")
FIRST, SECOND = "rank_00000.safetensors", "rank_00001.safetensors"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments, "BLOCK_BYTES", BLOCK)


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Saves a checkpoint of two ranks into the run folder `run`, a file each."""

    def owned_by(rank: int) -> list[OwnedValues]:
        draw = torch.Generator().manual_seed(rank)
        box = (LEFT, RIGHT)[rank]
        found = [("layers.2.wq.weight", kind, box, 0, torch.randn(40, generator=draw)) for kind in KINDS]
        norm = ("layers.10.norm.weight", "master", whole((11,)), 0, torch.randn(11, generator=draw))
        return found if rank else [*found, norm]

    def save_as_two_ranks(step: int, **meta: Any) -> Path:
        def save_one(world: World) -> Path:
            folder = CheckpointStore(tmp_path / "run" / "checkpoints", world, keep=9, keep_best=True)
            return folder.save(step, SHAPES, owned_by(world.rank), meta)

        path = as_ranks(monkeypatch, 2, save_one)[0]
        return path

    return save_as_two_ranks


def write_texts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, n in (("web", 9), ("books", 4)):
        lines = [json.dumps({"text": f"{name} {i} " * (20 + 7 * i)}) for i in range(n)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def trained(folder: Path, step: int = 12, best: int = 10, **sections: Any) -> tuple[dict[str, Any], Mixture]:
    """What the trainer would keep of a run on two text files, which are made, and its mixture."""
    write_texts(folder)
    train = [
        {"path": str(folder / "web.jsonl"), "weight": 3.0},
        {"path": str(folder / "books.jsonl"), "name": "a_book"},
    ]
    sections = {"data": {"train": train}, "optim": {"lr": 0.5}, "train": {"seed": 4, "seq_len": 48}, **sections}
    config = validate(tiny_config(folder, **sections), "test")
    specs = [SourceSpec.model_validate(spec) for spec in train]
    prepare_data(specs, ByteTokenizer(), config.data.cache_dir)
    mixture = mixture_of(open_data(specs, ByteTokenizer(), config.data.cache_dir), 48, seed=4)
    meta = {
        "config": config.model_dump(mode="json"),
        "data": mixture.state(CONSUMED),
        "tokens": CONSUMED * 48,
        "layout": asdict(Layout(world=2, tensor=2)),
        "best": {"valid_loss": 4.25, "step": best, "since": 0},
        "guard": {"passed_over": [7], "events": 1, "losses": []},
        "versions": {"torch": "9.9"},
    }
    return meta, mixture


def reported(capsys: pytest.CaptureFixture[str], path: Path, **flags: bool) -> tuple[int, str]:
    """Exit status and output."""
    status = 0
    try:
        inspect(str(path), **flags)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    return status, capsys.readouterr().out


def told_json(capsys: pytest.CaptureFixture[str], path: Path, **flags: bool) -> tuple[int, dict[str, Any]]:
    status, out = reported(capsys, path, json=True, **flags)
    return status, json.loads(out)


def test_a_checkpoint_tells_what_it_holds(
    save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(12, **trained(tmp_path / "text")[0])
    status, out = reported(capsys, path)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"{path}: whole (by manifest and lengths; --verify reads it)"
    layout = Layout(world=2, tensor=2)
    assert lines[1] == f"step 12, 2,400 tokens and 50 rows seen; written by 2 rank(s): {layout}"
    size = sum(file.stat().st_size for file in path.glob("rank_*"))
    assert lines[2] == (
        f"91 parameters in 2 tensors; 5 fragments in 2 files, {size / 1000:.4g} kB: master 364 bytes, exp_avg 320 bytes"
    )
    assert "best validation loss so far: 4.2500 at step 10" in lines
    assert "steps whose rows were passed over: 7" in lines
    assert "versions: format 3, torch 9.9" in lines
    assert any(line.startswith("model: 4 layers, dim 32, 4 heads of 8 (2 for keys and values)") for line in lines)
    assert "  optim.lr: 0.5  (default 0.0003)" in lines and "  tokenizer.kind: bytes" in lines
    assert not any("optim.eps" in line for line in lines)
    assert not any(line.startswith("layers.2.wq.weight") for line in lines)
    assert reported(capsys, path / "manifest.json")[1].splitlines()[1:] == lines[1:]


def test_every_tensor_and_the_whole_config_are_there_when_asked_for(
    save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta, _ = trained(tmp_path / "text")
    path = save(12, **meta)
    assert reported(capsys, path, tensors=True)[1].splitlines()[-2:] == [
        "layers.2.wq.weight (8, 10): master float32 in 2 fragments, exp_avg float32 in 2 fragments",
        "layers.10.norm.weight (11,): master float32 in 1 fragment",
    ]
    _, report = told_json(capsys, path, tensors=True)
    assert report["config"] == meta["config"] and report["layout"] == meta["layout"]
    assert report["every_tensor"]["layers.10.norm.weight"] == {
        "shape": [11],
        "master": {"dtype": "float32", "fragments": 1, "bytes": 44},
    }


def resealed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A damage to what the manifest says, with a digest that fits."""

    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["digest"]
        change(manifest)
        (path / "manifest.json").write_bytes(seal(manifest))

    return damage


def manifest_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return found


def shortened(path: Path) -> None:
    (path / SECOND).write_bytes((path / SECOND).read_bytes()[:-1])


def lengthened(path: Path) -> None:
    with open(path / SECOND, "ab") as file:
        file.write(b"\0")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (lambda path: (path / SECOND).unlink(), f"{SECOND}: damaged: is missing"),
    "a file is too short": (shortened, f"{SECOND}: damaged: has "),
    "a file is too long": (lengthened, f"{SECOND}: damaged: has "),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json: No such file"),
    "a manifest that is no JSON": (lambda path: (path / "manifest.json").write_text("{"), "not a checkpoint manifest"),
    "an edited manifest": (
        lambda path: (path / "manifest.json").write_text(
            (path / "manifest.json").read_text().replace('"step": 12', '"step": 13')
        ),
        "does not match its digest",
    ),
    "a manifest of another version": (resealed(lambda m: m.update(version=4)), "format lattice-checkpoint 4, expected"),
    "a manifest without a field": (resealed(lambda m: m.pop("files")), "not the fields of lattice-checkpoint 3"),
    "a fragment is missing": (
        resealed(lambda m: m["fragments"].remove(next(row for row in m["fragments"] if row["file"] == SECOND))),
        "manifest.json: layers.2.wq.weight (",
    ),
    "the master of a parameter is missing": (
        resealed(lambda m: m.update(fragments=[f for f in m["fragments"] if f["name"] != "layers.10.norm.weight"])),
        "manifest.json: layers.10.norm.weight (master)",
    ),
    "a fragment of no parameter": (
        resealed(lambda m: m["parameters"].pop("layers.10.norm.weight")),
        "belongs to no parameter",
    ),
    "a fragment in a file that is not listed": (
        resealed(lambda m: m["files"].pop(SECOND)),
        f"lies in {SECOND}, which is no file of the checkpoint",
    ),
    "a digest is missing": (resealed(lambda m: m["fragments"][0]["blocks"].pop()), "digests for"),
    "an unknown dtype": (resealed(lambda m: m["fragments"][0].update(dtype="int4")), "is int4; known are float32"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_every_damage_that_needs_no_reading_is_named(
    save: Callable[..., Path], capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, message = DAMAGES[case]
    path = save(12)
    damage(path)
    status, out = reported(capsys, path)
    assert status == 1
    assert out.startswith(f"{path}: damaged\n") and message in out
    assert told_json(capsys, path, verify=True)[0] == 1


def test_each_flipped_bit_is_found_in_the_block_that_holds_it(
    save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(12)
    held = [row for row in json.loads((path / "manifest.json").read_text())["fragments"] if row["numel"]]
    assert told_json(capsys, path, verify=True)[1]["damaged_blocks"] == []
    rng = random.Random(0)
    for row in held:
        file = path / row["file"]
        content = file.read_bytes()
        place = row["offset"] + rng.randrange(4 * row["numel"])
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        assert reported(capsys, path)[0] == 0  # lengths and manifest are right
        status, report = told_json(capsys, path, verify=True)
        (block,) = report["damaged_blocks"]
        assert status == 1 and not report["faults"]
        assert (block["file"], block["name"], block["kind"]) == (row["file"], row["name"], row["kind"])
        assert block["offset"] <= place < block["offset"] + block["bytes"] <= block["offset"] + BLOCK
        assert (block["offset"] - row["offset"]) % BLOCK == 0
        out = reported(capsys, path, verify=True)[1]
        assert f"{file}: damaged: {row['name']} ({row['kind']})" in out
        assert f"bytes {block['offset']} to {block['offset'] + block['bytes']}" in out
        with pytest.raises(DamagedFile, match=row["file"]):  # what a resume meets
            Checkpoint.open(path).read(row["name"], row["kind"])
        file.write_bytes(content)
    assert reported(capsys, path, verify=True)[0] == 0


@pytest.mark.parametrize("place", [0, 8, 40])
def test_a_flipped_bit_of_a_header_is_found(
    save: Callable[..., Path], capsys: pytest.CaptureFixture[str], place: int
) -> None:
    path = save(12)
    file = path / SECOND
    content = bytearray(file.read_bytes())
    content[place] ^= 2
    file.write_bytes(content)
    assert reported(capsys, path)[0] == 0
    status, report = told_json(capsys, path, verify=True)
    (block,) = report["damaged_blocks"]
    assert status == 1 and (block["file"], block["name"], block["kind"], block["offset"]) == (SECOND, "", "header", 0)
    first_value = min(row["offset"] for row in manifest_of(path)["fragments"] if row["file"] == SECOND)
    assert block["bytes"] == first_value
    assert f"{file}: damaged: its header does not match its digest at bytes 0 to {first_value}" in (
        reported(capsys, path, verify=True)[1]
    )


def test_a_checkpoint_under_the_name_of_another_step_and_a_file_under_one_are_damaged(
    save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(12)
    save(8).rename(path.parent / "step_00000014")
    (path.parent / "step_00000016").write_text("")
    status, report = told_json(capsys, tmp_path / "run")
    assert status == 1 and report["resume"]["step"] == 12
    file, renamed, _ = report["checkpoints"]
    assert "step_00000016/manifest.json: Not a directory" in file["faults"][0]
    assert "this is step 8, but the folder is named step_00000014" in renamed["faults"][0]


def test_verify_names_all_damaged_blocks_and_reads_what_a_damaged_checkpoint_still_has(
    save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(12)
    (path / FIRST).unlink()
    file = path / SECOND
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    content[-1 - BLOCK] ^= 1
    file.write_bytes(content[:-8])
    _, report = told_json(capsys, path, verify=True)
    assert len(report["faults"]) == 2  # one file missing, one too short
    assert [block["file"] for block in report["damaged_blocks"]] == [file.name, file.name]
    assert report["parameters"] == 91


def test_verify_reads_every_byte_of_every_value_once(save: Callable[..., Path]) -> None:
    found = survey(save(12))
    read: list[int] = []
    assert damaged_blocks(found, read.append) == []
    assert max(read) == BLOCK and sum(read) == sum(found.bytes_by_kind().values()) == 4 * (2 * 80 + 11)


def test_a_run_says_which_checkpoint_a_resume_would_take(
    save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta, _ = trained(tmp_path / "text")
    for step in (8, 10, 12):
        newest = save(step, **meta)
    run_dir = tmp_path / "run"
    rows = [{"step": step, "tokens": step * 192, "epoch": 0.1} for step in range(1, 14)]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 14, "tok')
    status, out = reported(capsys, run_dir)
    assert status == 0
    assert f"run {run_dir}: 3 checkpoints, recorded to step 13, 2,496 tokens" in out
    assert "step 12: whole (by manifest and lengths; --verify reads it); a resume takes this one" in out
    assert "step 10: whole (by manifest and lengths; --verify reads it); the best, validation loss 4.2500" in out
    assert out.index("step 12:") < out.index("step 10:") < out.index("step 8:")

    (newest / FIRST).unlink()
    (newest.parent / f"{HIDDEN}step_00000014").mkdir()
    (newest.parent / "damaged_step_00000004").mkdir()
    for path in (run_dir, run_dir / "checkpoints"):
        status, out = reported(capsys, path)
        assert status == 1
        assert "step 12: damaged\n" in out and "rank_00000.safetensors: damaged: is missing" in out
        resumed, _ = newest_valid(run_dir / "checkpoints")
        assert resumed is not None and f"step {resumed.step}: whole" in out
        assert "validation loss 4.2500; a resume takes this one" in out
        assert f"{HIDDEN}step_00000014: left by a save" in out and "damaged_step_00000004: set aside" in out
    _, report = told_json(capsys, run_dir)
    assert report["resume"]["step"] == 10 and [entry["whole"] for entry in report["checkpoints"]] == [False, True, True]
    for path in (newest.parent / "step_00000010", newest.parent / "step_00000008"):
        (path / "manifest.json").write_text("")
    assert "no valid checkpoint: a resume would stop" in reported(capsys, run_dir)[1]


def test_verify_of_a_run_moves_the_resume_to_a_checkpoint_that_can_be_read(
    save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (8, 12):
        path = save(step)
    content = bytearray((path / FIRST).read_bytes())
    content[-1] ^= 1
    (path / FIRST).write_bytes(content)
    assert told_json(capsys, tmp_path / "run")[1]["resume"]["step"] == 12
    status, report = told_json(capsys, tmp_path / "run", verify=True)
    assert status == 1 and report["resume"]["step"] == 8


def test_a_run_without_checkpoints_yet_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "tokens": 99}\n')
    assert reported(capsys, tmp_path) == (0, f"run {tmp_path}: 0 checkpoints, recorded to step 3, 99 tokens\n")


def test_the_rows_of_each_file_are_counted(
    save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta, mixture = trained(tmp_path / "text")
    path = save(12, **meta)
    _, report = told_json(capsys, path, data=True)
    source, row, _ = mixture.locate(np.arange(CONSUMED))
    assert report["data"]["epochs"] == mixture.epoch(CONSUMED)
    assert [entry["name"] for entry in report["data"]["sources"]] == ["web", "a_book"]
    for number, entry in enumerate(report["data"]["sources"]):
        rows = row[source == number]
        times = np.bincount(rows, minlength=mixture.rows_of[number])
        assert entry["rows"] == len(rows) > 0 and entry["of"] == mixture.rows_of[number]
        assert {int(n): k for n, k in entry["times"].items()} == Counter(times.tolist())
        (stretch,) = entry["stretches"]
        assert stretch["file"].endswith(("web.jsonl", "books.jsonl")[number])
        assert stretch["rows"] == [0, mixture.rows_of[number] - 1]
    out = reported(capsys, path.parent, data=True)[1]  # of a run: for the checkpoint that a resume takes
    assert f"{tmp_path / 'text' / 'web.jsonl'} lines 1 to 9: rows 0 to {mixture.rows_of[0] - 1}: " in out
    assert "    00000.arrow" in out


def test_sources_that_are_gone_changed_or_damaged_say_so_and_rows_are_still_counted(
    save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta, mixture = trained(tmp_path / "text")
    path = save(12, **meta)
    (tmp_path / "text" / "web.jsonl").unlink()  # its shards are known without the text
    assert told_json(capsys, path)[1]["data"]["sources"][0]["of"] == mixture.rows_of[0]
    (token_source(mixture, 0).path / "shards" / "00000.arrow").unlink()
    token_source(mixture, 1).path.rename(tmp_path / "elsewhere")
    status, report = told_json(capsys, path, data=True)
    web, book = report["data"]["sources"]
    assert status == 0 and report["data"]["epochs"] is None
    assert "00000.arrow" in web["problem"] and web["rows"] > 0
    assert "books.jsonl is no folder of shards" in book["problem"] and book["rows"] == CONSUMED - web["rows"]
    assert "more is not known" in reported(capsys, path)[1] and "epochs not known" in reported(capsys, path)[1]

    native = json.loads(json.dumps(meta))
    native["config"]["data"]["train"][1]["path"] = str(tmp_path / "elsewhere")
    assert told_json(capsys, save(13, **native))[1]["data"]["sources"][1]["of"] == mixture.rows_of[1]
    native["data"]["data"]["sources"]["a_book"]["fingerprint"] = "0" * 32
    problem = told_json(capsys, save(14, **native))[1]["data"]["sources"][1]["problem"]
    assert "elsewhere: holds other shards than the run read" in problem


def test_a_checkpoint_of_an_older_version_of_the_config_is_read_as_it_is(
    save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta, _ = trained(tmp_path / "text")
    meta["layout"] = {"ranks": 2, "zero_stage": 1}
    del meta["config"]["guard"], meta["guard"], meta["config"]["data"]["cache_dir"]
    meta["config"]["model"] |= {"no_such_key": 1, "rope_scaling": {"kind": "llama3", "factor": 8.0}}
    status, out = reported(capsys, save(12, **meta))
    assert status == 0
    assert "written by ranks 2, zero_stage 1" in out and "model: not one that this version knows" in out
    assert "  model.no_such_key: 1\n" in out and "  model.rope_scaling: {" in out


def bad_paths(folder: Path) -> dict[str, tuple[Path, str]]:
    write_texts(folder)
    (folder / "hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "hf" / name).write_text("{}")
    (folder / "ours.yaml").write_text("model: a.yaml\ndata: {train: b}\n")
    (folder / "other.yaml").write_text("name: c\n")
    prepare_data(str(folder / "web.jsonl"), ByteTokenizer(), folder / "cache")
    (source,) = (folder / "cache").iterdir()
    return {
        "nothing": (folder / "none", "no such file or folder"),
        "text": (folder / "web.jsonl", "bytes that is no checkpoint"),
        "an empty folder": (folder, "is a folder without checkpoints"),
        "a model of another format": (folder / "hf", "is a model of another format"),
        "a run config": (folder / "ours.yaml", "is a run config, which lattice train --dry_run checks"),
        "another YAML file": (folder / "other.yaml", "is a YAML file"),
        "token shards": (source, r"is a source of token shards; lattice shard check"),
        "their manifest": (source / "manifest.json", "is a source of token shards"),
    }


def test_what_is_no_checkpoint_is_called_by_its_name(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save(12)
    cases = bad_paths(tmp_path / "bad")
    cases["a rank's file"] = (path / FIRST, f"is one file of the checkpoint {path}")
    cases["a run's file"] = (tmp_path / "run" / "log.txt", f"is one file of the run {tmp_path / 'run'}")
    cases["a folder of runs"] = (tmp_path, r"is a folder of runs \(run\)")
    (tmp_path / "run" / "log.txt").write_text("")
    for place, message in cases.values():
        with pytest.raises(UserError, match=message) as caught:
            inspect(str(place))
        assert str(caught.value).startswith(f"{place}: ")


def test_nothing_in_a_manifest_steers_the_terminal(
    save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(12, versions={"torch": "\x1b[2J"})
    assert "\x1b" not in reported(capsys, path)[1]


def test_bad_flags_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        run_cli(inspect, ["x", "--verfy"])
    assert leaving.value.code == 2 and "did you mean --verify" in capsys.readouterr().err


def test_the_script_gives_its_status_and_leaves_the_module_of_its_name_to_the_others(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fragments, "BLOCK_BYTES", 16 << 20)  # what another process takes for a block
    path = save(12)
    (path / FIRST).unlink()
    done = run("tools/inspect.py", str(path))
    assert done.returncode == 1 and done.stdout.startswith(f"{path}: damaged"), done.stderr
    # the folder of a script is the first place where Python looks for a module
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); from inspect import signature; print(sys.path[0])"
    other = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(ROOT)
