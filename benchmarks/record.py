"""Rows of results: printed as a readable table while they come, written to CSV after every row, read back."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

Row = dict[str, str]


class Csv:
    """A CSV that is complete after every `add`: what was measured survives whatever comes next.

    The rows collect beside the target and replace it at `close`, so that a run cut short never truncates a
    committed file; with `partial=True` they are written to the target itself, which is then valid at any
    moment.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, partial: bool = False) -> None:
        self.path = path
        self.columns = tuple(columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._written = path if partial else path.with_name(path.name + ".part")
        self._file = self._written.open("w", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, self.columns, lineterminator="\n")
        self._writer.writeheader()

    def add(self, row: Mapping[str, str]) -> None:
        """Append one row and flush it; a key that is no column is an error."""
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Put the finished file in its place."""
        self._file.close()
        if self._written != self.path:
            self._written.replace(self.path)


def read(path: Path) -> list[Row]:
    """The rows of a results file; FileNotFoundError where there is none."""
    with path.open(encoding="utf-8", newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def number(value: float, digits: int = 3) -> str:
    """A measurement with `digits` significant digits and no exponent: 0.0123, 12.3, 1230."""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):f}".rstrip("0").rstrip(".") if "e" in text else text


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: first column left, the others right."""
    table = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )
