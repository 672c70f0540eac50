"""The curves of a run as a table: metrics.csv, a row a step, a column a curve.

A curve that begins later (a validation's) widens the table: the file is written anew with its column, as rows of a CSV
file have the columns of its first line. That happens a few times in a run, whatever its length.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from llm.atomic import write_file
from llm.train.reporting import LineFile

STEP = "step"


class CsvTable:
    """metrics.csv of a run folder, from step `first_step` on: rows of steps that will be repeated are cut off first."""

    name = "metrics.csv"

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._path = run_dir / self.name
        self._file = LineFile(self._path)
        self._columns: list[str] | None = None
        self._first_step = first_step

    def numbers(self, step: int, values: dict[str, float]) -> None:
        if self._columns is None:
            self._columns = self._begin()
        if added := [name for name in values if name not in self._columns]:
            self._widen([*self._columns, *added])
        self._file.write(_line([step, *(values.get(name, "") for name in self._columns)]))

    def _begin(self) -> list[str]:
        """The curves that the table has; it then ends before the first step of this process."""
        rows = list(self._rows())
        if not rows:
            return []
        kept = [row for row in rows if int(row[STEP]) < self._first_step]
        columns = [name for name in rows[0] if name != STEP]
        self._write(columns, kept)
        return columns

    def _widen(self, columns: list[str]) -> None:
        self._write(columns, self._rows())
        self._columns = columns

    def _write(self, columns: Sequence[str], rows: Iterable[dict[str, str]]) -> None:
        lines = [_line([STEP, *columns])]
        lines += [_line([row[STEP], *(row.get(name) or "" for name in columns)]) for row in rows]
        self._file.close()
        write_file(self._path, "".join(f"{line}\n" for line in lines).encode())

    def _rows(self) -> Iterator[dict[str, str]]:
        """Rows of the file that are whole: a kill tears the last one."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        whole = text[: text.rfind("\n") + 1]
        for row in csv.DictReader(io.StringIO(whole)):
            if (row.get(STEP) or "").isdecimal() and None not in row:
                yield row

    def text(self, step: int, name: str, text: str) -> None:
        """A table has numbers alone."""

    def images(self, step: int, name: str, tiles: Tensor) -> None:
        """A table has numbers alone."""

    def close(self) -> None:
        self._file.close()


def _line(cells: Sequence[object]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(cells)
    return out.getvalue()
