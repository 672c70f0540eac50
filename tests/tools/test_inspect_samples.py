"""tools/inspect.py --show: samples of a folder, and the tiles of their images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llm.cli import run_cli
from tests.data.image_helpers import SIDE, SLOTS, THREE_TILES, VISION, asked_with_vision, picture, put
from tests.data.sample_helpers import asked_for, opened, random_rows, write_rows
from tools.inspection import inspect
from vision.opening import open_image
from vision.tiles import cut


def asks(text: str, *images: str) -> dict:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    return {"messages": messages, "images": list(images)}


def test_the_tiles_of_samples_are_written_as_the_model_sees_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content = picture(THREE_TILES)
    put(tmp_path / "data" / "a.png", content)
    path = write_rows(tmp_path / "data" / "rows.jsonl", [asks("what?"), asks("<image>this?", "a.png"), asks("and?")])
    folder = opened(path, asked_with_vision(tmp_path), "chat")["data.train"].rows.source.path
    run_cli(inspect, [str(folder), "--show=2", f"--images={tmp_path / 'seen'}"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert f"3 samples of kind chat, {first.split(', ')[1]}, 3 tiles of {SIDE} x {SIDE}" in first
    assert len(lines) == 2 and "rows.jsonl:1; " in lines[0] and lines[0].endswith(", 0 tiles, 0 slots")
    assert "rows.jsonl:2; " in lines[1] and lines[1].endswith(f", 3 tiles, {3 * SLOTS} slots")
    tiles, _ = cut(open_image(content), VISION)
    names = [f"sample_2_tile_{place}.png" for place in (1, 2, 3)]
    assert sorted(file.name for file in (tmp_path / "seen").iterdir()) == names
    for tile, name in zip(tiles, names, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "seen" / name)), tile.transpose(1, 2, 0))


def test_what_holds_no_samples_or_no_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_rows(tmp_path / "rows.jsonl", random_rows(3))
    folder = opened(path, asked_for(tmp_path))["data.train"].rows.source.path
    for words, line in (
        ([str(tmp_path), "--show=3"], "--show is for a folder of samples"),
        ([str(folder), "--show=3", f"--images={tmp_path / 'seen'}"], "its samples have no images"),
        ([str(folder), "--show=0"], "--show=0 must be at least 1"),
        ([str(folder), f"--images={tmp_path / 'seen'}"], "--images goes with --show"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_cli(inspect, words)
        assert stopped.value.code == 2 and line in capsys.readouterr().err
    assert not (tmp_path / "seen").exists()
