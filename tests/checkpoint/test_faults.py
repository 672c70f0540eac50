"""Damage of every kind to every file of a run folder, on one process: it is refused with the file's name, whatever
reads it, and a pickle put in the place of a file is never executed. And how much of a checkpoint a reader reads.
"""

import ast
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm import LLM, ModelArgs
from llm.boxes import Box, box_shape, share_of, whole
from llm.checkpoint import fragments
from llm.checkpoint.fragments import OwnedValues
from llm.checkpoint.inspect import damaged_blocks, survey
from llm.checkpoint.reader import MANIFEST, Checkpoint, list_steps, newest_valid, resolve
from llm.checkpoint.run_folder import load_run_tokenizer, model_args, save_tokenizer
from llm.checkpoint.store import CheckpointStore
from llm.errors import DamagedFile, UserError
from llm.parallel.launch.world import World
from llm.tokenizer import CharacterTokenizer
from tests.checkpoint.faults import (
    FILES,
    STEPS,
    Fault,
    all_faults,
    canary_of,
    checkpoint,
    exchange,
    flip,
    pickled,
)
from tests.checkpoint.ranks import as_ranks
from tests.distributed.harness import ROOT

ARGS = ModelArgs(dim=16, n_layers=2, n_heads=2, vocab_size=12, max_seq_len=16, ffn_hidden=8)
TOKENIZER = CharacterTokenizer("abcdefghij")


def save_as_ranks(
    monkeypatch: pytest.MonkeyPatch, folder: Path, step: int, ranks: list[list[OwnedValues]], meta: dict[str, Any]
) -> Path:
    """A checkpoint with a file for each rank; a parameter's whole shape is the largest corner of its boxes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, _, box, *_ in (values for owned in ranks for values in owned):
        corner = tuple(stop for _, stop in box)
        shapes[name] = tuple(map(max, corner, shapes.get(name, corner)))

    def save(world: World) -> Path:
        columns = {name: 1 for name in shapes if name.endswith(CUT_BY_COLUMNS)}  # as tensor parallelism cuts them
        store = CheckpointStore(folder, world, keep=9, keep_best=False, cut=columns)
        return store.save(step, shapes, ranks[world.rank], meta)

    return as_ranks(monkeypatch, len(ranks), save)[0]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as two ranks of ZeRO leave it, with checkpoints at STEPS, each of another model."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    meta = {"config": {"model": ARGS.model_dump(mode="json")}, "tokenizer": TOKENIZER.fingerprint}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for step in STEPS:
            ranks: list[list[OwnedValues]] = [[], []]
            draw = torch.Generator().manual_seed(step)
            for (name, parameter), kind in product(LLM(ARGS).named_parameters(), ("master", "exp_avg")):
                flat, cut = torch.randn(parameter.numel(), generator=draw), parameter.numel() // 3
                box = whole(tuple(parameter.shape))
                ranks[0].append((name, kind, box, 0, flat[:cut]))
                ranks[1].append((name, kind, box, cut, flat[cut:]))
            save_as_ranks(monkeypatch, run_dir / "checkpoints", step, ranks, meta)
    save_tokenizer(TOKENIZER, run_dir)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(meta["config"]))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.4}\n')
    return run_dir


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


def read_all(path: Path) -> Checkpoint:
    """Open a checkpoint and read all of it."""
    found = Checkpoint.open(path)
    model_args(found)
    for name, kinds in found.kinds().items():
        for kind in kinds:
            found.read(name, kind)
    return found


def test_what_is_not_damaged_is_read(run_dir: Path) -> None:
    for step in STEPS:
        assert read_all(checkpoint(run_dir, step)).step == step
    LLM.from_pretrained(run_dir)
    assert load_run_tokenizer(run_dir).fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize("fault", all_faults(), ids=lambda fault: fault.name)
def test_each_fault_is_refused_by_the_name_of_the_file(copied: Path, fault: Fault) -> None:
    fault.apply(copied)
    for step in STEPS:
        if step in fault.damaged:
            with pytest.raises(DamagedFile, match=f"step_{step:08d}") as raised:
                read_all(checkpoint(copied, step))
            assert step != max(fault.damaged) or fault.file in str(raised.value)
            found = survey(checkpoint(copied, step))
            lines = found.faults + [damage.reason for damage in damaged_blocks(found)]
            no_config = "no config" in fault.name  # which is not what an inspection is about
            assert no_config or any(f"step_{step:08d}" in line for line in lines)
        else:
            assert read_all(checkpoint(copied, step)).step == step
    assert [step for step, _ in list_steps(copied / "checkpoints")] == sorted(STEPS, reverse=True)
    assert not canary_of(copied).exists()


def test_a_bit_turned_anywhere_is_noticed(copied: Path) -> None:
    rng = random.Random(0)
    for file, _ in product(FILES, range(150)):
        path = checkpoint(copied, 6) / file
        content = path.read_bytes()
        flip(path, rng.randrange(len(content)), rng.randrange(8))
        with pytest.raises(DamagedFile, match=file):
            read_all(path.parent)
        path.write_bytes(content)
    read_all(checkpoint(copied, 6))


def test_every_bit_of_the_first_bytes_is_noticed_before_values_are_used(copied: Path) -> None:
    """The length and the first entries of a header, which no reader of fragments needs."""
    path = checkpoint(copied, 6) / FILES[1]
    content = path.read_bytes()
    for place, bit in product(range(16), range(8)):
        flip(path, place, bit)
        found = Checkpoint.open(path.parent)
        with pytest.raises(DamagedFile, match=f"{FILES[1]}: damaged: its header"):
            for name in found.shapes:
                found.read(name)
        path.write_bytes(content)


def moments_of_zero(rank: int) -> list[OwnedValues]:
    box = ((4 * rank, 4 * rank + 4), (0, 5))
    return [("w", "master", box, 0, torch.full((20,), float(rank))), ("w", "exp_avg", box, 0, torch.zeros(20))]


def test_files_of_equal_length_that_hold_zeros_are_not_taken_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block of the moments is the same in both, so only the headers say whose they are."""
    path = save_as_ranks(monkeypatch, tmp_path, 1, [moments_of_zero(rank) for rank in range(2)], {})
    first, second = (path / file for file in FILES[:2])
    assert first.stat().st_size == second.stat().st_size
    assert torch.equal(Checkpoint.open(path).read("w", "exp_avg"), torch.zeros(40))
    exchange(first, second)
    for kind, box in product(("master", "exp_avg"), [((0, 4), (0, 5)), ((4, 8), (0, 5))]):
        with pytest.raises(DamagedFile, match="rank_0000"):
            Checkpoint.open(path).read("w", kind, box)


def test_a_folder_that_is_named_by_a_step_holds_that_step_and_any_other_name_is_free(copied: Path) -> None:
    six = checkpoint(copied, 6)
    for name in ("best", "damaged_step_00000006", "step_6", "step_00000006_kept", "step_", "step_six"):
        assert read_all(Path(shutil.copytree(six, copied / name))).step == 6
    for name in ("step_00000007", "step_60"):
        with pytest.raises(DamagedFile, match=f"{name}/{MANIFEST}: damaged: this is step 6"):
            Checkpoint.open(Path(shutil.copytree(six, copied / name)))


def test_a_named_run_whose_newest_checkpoint_is_damaged_is_not_read_from_an_older_one(copied: Path) -> None:
    (checkpoint(copied, 6) / FILES[0]).unlink()
    found, skipped = newest_valid(copied / "checkpoints")
    assert found is not None and found.step == 4 and FILES[0] in skipped[0]
    for read in (resolve, LLM.from_pretrained, load_run_tokenizer):
        with pytest.raises(DamagedFile, match=f"step_00000006/{FILES[0]}.*step_00000004"):
            read(copied)
    assert resolve(found.path).step == 4


@contextmanager
def as_nobody() -> Iterator[None]:
    """root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("what", [*FILES, ""])
def test_what_may_not_be_read_is_named(copied: Path, what: str) -> None:
    path = checkpoint(copied, 6) / what
    for folder in copied.parents:
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o011)
    path.chmod(0)
    try:
        with as_nobody(), pytest.raises(DamagedFile, match=f"{path}.*Permission denied"):
            read_all(checkpoint(copied, 6))
    finally:
        path.chmod(0o700)


TOKENIZER_FILES = ("tokenizer/config.json", "tokenizer/tokenizer.json")


@pytest.mark.parametrize("file", TOKENIZER_FILES)
def test_a_damaged_tokenizer_is_refused_and_written_anew_by_the_run(copied: Path, file: str) -> None:
    path = copied / file
    content = path.read_bytes()
    refused = 0
    for place, bit in product(range(len(content)), (0, 3, 5)):
        flip(path, place, bit)
        try:
            found = load_run_tokenizer(copied)
        except UserError as error:
            assert f"{copied}/tokenizer" in str(error)
            refused += 1
        else:  # a blank, perhaps, that is another one now
            assert found.fingerprint == TOKENIZER.fingerprint
        path.write_bytes(content)
    assert refused > len(content)
    for harm in (path.unlink, lambda: path.write_bytes(b"{}"), lambda: path.write_bytes(pickled(copied))):
        harm()
        with pytest.raises(UserError, match="tokenizer"):
            load_run_tokenizer(checkpoint(copied, 6))
        assert f"{copied}/tokenizer is written anew" in str(save_tokenizer(TOKENIZER, copied))
        assert load_run_tokenizer(copied).fingerprint == TOKENIZER.fingerprint
    assert save_tokenizer(TOKENIZER, copied) is None
    other = CharacterTokenizer("0123456789")  # as many, so that nothing else would notice
    assert "another tokenizer" in str(save_tokenizer(other, copied))
    with pytest.raises(UserError, match=f"{copied}/tokenizer: damaged.*step_00000006"):
        load_run_tokenizer(copied)


def readers() -> dict[str, Callable[[Path], object]]:
    from launch.generate import continue_prompt
    from llm.train.config import load_config
    from tools.diff import read_run
    from tools.inspection import inspect

    return {
        "from_pretrained": LLM.from_pretrained,
        "generate": lambda run: continue_prompt(str(run), "abc", max_new_tokens=2),
        "tokenizer": load_run_tokenizer,
        "inspect": lambda run: inspect(str(run), verify=True),
        "config": lambda run: load_config(run / "config.yaml"),
        "diff": lambda run: read_run(run, "--run_a"),
    }


READ_BY = {
    **{f"checkpoints/step_00000006/{file}": ("from_pretrained", "generate", "inspect") for file in FILES},
    **{file: ("tokenizer", "generate") for file in TOKENIZER_FILES},
    "config.yaml": ("config", "diff"),
    "metrics.jsonl": ("diff",),
}
PADDED = (False, True)  # as long as the file was, or as it is


@pytest.mark.parametrize(("file", "padded"), product(READ_BY, PADDED))
def test_a_pickle_in_the_place_of_a_file_is_never_executed(
    copied: Path, capsys: pytest.CaptureFixture[str], file: str, padded: bool
) -> None:
    path = copied / file
    content = pickled(copied)
    path.write_bytes(content.ljust(path.stat().st_size, b"\0") if padded else content)
    for reader in READ_BY[file]:
        with pytest.raises((UserError, SystemExit)) as raised:
            readers()[reader](copied)
        reported = capsys.readouterr().out if isinstance(raised.value, SystemExit) else str(raised.value)
        assert path.name in reported or (path.parent.name == "tokenizer" and str(path.parent) in reported)
    assert not canary_of(copied).exists()


def test_the_pickle_of_these_tests_would_be_noticed(tmp_path: Path) -> None:
    import pickle

    pickle.loads(pickled(tmp_path))
    assert canary_of(tmp_path).exists()


PICKLING = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}


def unpickling(node: ast.AST, foreign: bool) -> bool:
    """Whether this part of a program may execute what it reads. Checkpoints of other projects may be pickles, whose
    tensors torch reads without executing anything; so much may llm/foreign do.
    """
    if isinstance(node, ast.Import | ast.ImportFrom):
        from_module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        names = {name.split(".")[0] for name in (from_module, *(alias.name for alias in node.names))}
        return bool(PICKLING & names) and not (foreign and isinstance(node, ast.Import) and names <= {"", "pickle"})
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
        return node.attr != "UnpicklingError"
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
        return not foreign or "weights_only=True" not in map(ast.unparse, node.keywords)
    return isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"


def test_nothing_of_this_project_unpickles() -> None:
    for folder in ("llm", "launch", "tools", "vision"):
        for file in (ROOT / folder).rglob("*.py"):
            foreign = file.is_relative_to(ROOT / "llm" / "foreign")
            lines = [ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if unpickling(node, foreign)]
            assert not lines, file


@pytest.mark.parametrize(
    ("line", "alone", "foreign"),
    [
        ("import pickle", True, False),
        ("from pickle import loads", True, True),
        ("pickle.loads(x)", True, True),
        ("torch.load(x)", True, True),
        ("torch.load(x, weights_only=True)", True, False),
        ("numpy.load(x, allow_pickle=True)", True, True),
        ("json.loads(x)", False, False),
    ],
)
def test_what_counts_as_unpickling(line: str, alone: bool, foreign: bool) -> None:
    assert any(unpickling(node, False) for node in ast.walk(ast.parse(line))) == alone
    assert any(unpickling(node, True) for node in ast.walk(ast.parse(line))) == foreign


BLOCK = 1024  # bytes
MATRIX = (96, 64)  # 24 blocks


def rows_of(rank: int, ranks: int) -> Box:
    return (share_of(MATRIX[0], rank, ranks), (0, MATRIX[1]))


def columns_of(rank: int, ranks: int) -> Box:
    return ((0, MATRIX[0]), share_of(MATRIX[1], rank, ranks))


def written(box: Box, start: int, stop: int, name: str) -> list[OwnedValues]:
    values = torch.arange(math.prod(MATRIX), dtype=torch.float32).view(MATRIX)
    held = values[tuple(slice(*ends) for ends in box)].reshape(-1)[start:stop]
    kinds = ("master", "exp_avg", "exp_avg_sq")
    return [(f"layers.{i}.{name}", kind, box, start, held) for i in range(4) for kind in kinds]


def flat_parts(box: Box, ranks: int) -> list[tuple[Box, int, int]]:
    """A box cut by ZeRO over so many ranks."""
    return [(box, *share_of(math.prod(box_shape(box)), rank, ranks)) for rank in range(ranks)]


LAYOUTS: dict[str, list[tuple[Box, int, int]]] = {
    "one rank": flat_parts(whole(MATRIX), 1),
    "ZeRO 2": flat_parts(whole(MATRIX), 2),
    "ZeRO 3": flat_parts(whole(MATRIX), 3),
    "ZeRO 7": flat_parts(whole(MATRIX), 7),
    "rows 2": [part for rank in range(2) for part in flat_parts(rows_of(rank, 2), 1)],
    "rows 4": [part for rank in range(4) for part in flat_parts(rows_of(rank, 4), 1)],
    "rows 2, ZeRO 3": [part for rank in range(2) for part in flat_parts(rows_of(rank, 2), 3)],
    "columns 2": [part for rank in range(2) for part in flat_parts(columns_of(rank, 2), 1)],
    "columns 4, ZeRO 2": [part for rank in range(4) for part in flat_parts(columns_of(rank, 4), 2)],
}


def bytes_read() -> int:
    """By this process since it began."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


CUT_BY_ROWS, CUT_BY_COLUMNS = "feed_forward.w1.weight", "feed_forward.w2.weight"
OTHER = {CUT_BY_ROWS: "columns", CUT_BY_COLUMNS: "rows"}
CUTS = [(before, name) for name, before in product(OTHER, LAYOUTS) if OTHER[name] not in before]


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the kernel does not count")
@pytest.mark.parametrize(("before", "name"), CUTS)
def test_a_rank_reads_its_share_and_the_rest_of_the_blocks_at_its_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, name: str
) -> None:
    """Whole rows, or a flat range of them, have at most two ends inside a block, and less than a block is read in vain
    at each. A matrix that ranks cut by columns has two ends in each stripe, in smaller blocks: no more in all.
    """
    monkeypatch.setattr(fragments, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(fragments, "LEAST_STRIPED_BYTES", 0)
    monkeypatch.setattr(fragments, "LEAST_STRIPED_BLOCK_BYTES", 64)
    layouts = {key: parts for key, parts in LAYOUTS.items() if (key, name) in CUTS}
    path = save_as_ranks(monkeypatch, tmp_path, 1, [written(*part, name) for part in LAYOUTS[before]], {})
    per_file = max(record.header_bytes for record in survey(path).files.values())
    n_files = len(LAYOUTS[before])
    asking = bytes_read()
    asking = bytes_read() - asking
    for after, parts in layouts.items():
        for part in parts:
            at = bytes_read()
            found = Checkpoint.open(path)
            opened = bytes_read() - at - asking
            asked = written(*part, name)
            for key, kind, box, start, values in asked:
                assert torch.equal(found.read(key, kind, box, start, start + len(values)), values)
            read = bytes_read() - at - 2 * asking - opened
            share = sum(4 * len(values) for *_, values in asked)
            assert opened <= (path / MANIFEST).stat().st_size + 1
            box, start, stop = part
            first = box[0][0] * MATRIX[1]
            ends = (first + start > 0) + (first + stop < math.prod(MATRIX))
            if after == before:
                most = share
            elif name == CUT_BY_COLUMNS:
                most = share + len(asked) * 2 * (BLOCK - 4)
            else:
                most = share + len(asked) * ends * (BLOCK - 4)
            assert share <= read <= most + n_files * per_file + 64, (after, part)
