"""README's tables, generated: from the committed CSVs, from METRICS and from OPS.

    python -m benchmarks.tables [--check] [--readme README.md]

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`; what is between the markers is
replaced. With --check nothing is written and the exit code says whether the file is up to date (CI). A marker
with an unknown name, or without its end, is an error: exit code 2.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import record, stamp

_MARKED = re.compile(r"<!-- table:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /table:(?P=name) -->", re.DOTALL)
_MEASURE = {
    "bars_cpu.csv": "python -m benchmarks.run --bars --keep",
    "ops_cpu.csv": "python -m benchmarks.run --ops --keep",
    "overhead.csv": "python -m benchmarks.overhead --keep",
}
_OPENING = re.compile(r"<!-- (/?)table:([\w-]+) -->")


class TableError(ValueError):
    """A README or a results file that the tables cannot be made from, said in one sentence."""


def ops_table() -> str:
    """Every registered contract, what it computes, and its implementations, best first."""
    from fastmon import ops

    rows = []
    for name, op in sorted(ops.OPS.items()):
        public = getattr(ops, name, None) or getattr(ops, f"{name}_norm", None)
        said = inspect.getdoc(public or op.reference) or ""
        rows.append((f"`{name}`", _cell(_first_sentence(said)), ", ".join(impl.name for impl in op.impls)))
    return record.markdown(("op", "result", "implementations, best first"), rows)


def metrics_table() -> str:
    """Every logged name by group, with unit, meaning and the first preset that has it."""
    from fastmon.metrics import GROUPS, METRICS

    rows = []
    for group in GROUPS:
        for name, metric in METRICS.items():
            if name.startswith(f"{group}/"):
                preset = metric.preset or "on request"
                rows.append((f"`{_cell(name)}`", _cell(metric.unit), _cell(metric.meaning), preset))
    return record.markdown(("name", "unit", "meaning", "from preset"), rows)


def bars_table() -> str:
    """The promises with their measured values."""
    rows = _results("bars_cpu.csv")
    cells = []
    for row in rows:
        interval = f" ({row['low']} to {row['high']})" if row["low"] else ""
        cells.append((row["bar"], f"{row['value']} {row['unit']}{interval}", row["limit"], row["met"]))
    return record.markdown(("what", "measured (95% interval)", "bar", "met"), cells) + _source(
        rows, "bars_cpu.csv"
    )


def overhead_table() -> str:
    """What each preset costs, in percent of the unmonitored step."""
    rows = _results("overhead.csv")
    names = {"off2": "a second unmonitored copy (noise floor)"}
    cells = []
    for row in rows:
        typical = _percent(row["ratio"], row["low"], row["high"])
        total = _percent(row["total_ratio"], row["total_low"], row["total_high"])
        cells.append((names.get(row["variant"], f"`{row['variant']}`"), typical, total, row["steps"]))
    columns = ("monitor", "median step (95% interval)", "all steps together", "steps")
    where = f"mode {rows[0]['mode']}, unmonitored step {rows[0]['off_ms']} ms; " if rows else ""
    return record.markdown(columns, cells) + _source(rows, "overhead.csv", where)


def speed_table() -> str:
    """For each measured case the row that `choose` would take, the torch yardstick and the share of the
    roofline."""
    rows = _results("ops_cpu.csv")
    cells = []
    for case in dict.fromkeys((row["op"], row["shape"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["op"], row["shape"], row["dtype"]) == case]
        ours = min((r for r in mine if r["kind"] == "row"), key=lambda r: float(r["ms"]), default=None)
        peer = min((r for r in mine if r["kind"] == "peer"), key=lambda r: float(r["ms"]), default=None)
        if ours is None:
            continue
        best = f"{peer['variant']} {peer['ms']} ms" if peer else ""
        share = f"{100 * float(ours['roofline']):.0f} %"
        cells.append((f"`{case[0]}`", case[1], case[2], ours["variant"], f"{ours['ms']} ms", share, best))
    columns = ("op", "shapes", "dtype", "row", "time", "of roofline", "fastest peer")
    return record.markdown(columns, cells) + _source(rows, "ops_cpu.csv")


TABLES: dict[str, Callable[[], str]] = {
    "ops": ops_table,
    "metrics": metrics_table,
    "bars": bars_table,
    "overhead": overhead_table,
    "speed": speed_table,
}


def render(text: str) -> str:
    """The document with every marked table made anew; TableError for a marker that names none or does not
    close."""
    for end, name in _OPENING.findall(text):
        if name not in TABLES:
            raise TableError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
        if text.count(f"<!-- table:{name} -->") != text.count(f"<!-- /table:{name} -->"):
            raise TableError(f"the marker {'/' if end else ''}table:{name} has no counterpart")
    return _MARKED.sub(
        lambda m: f"<!-- table:{m['name']} -->\n{TABLES[m['name']]()}\n<!-- /table:{m['name']} -->", text
    )


def _results(name: str) -> list[record.Row]:
    path = record.RESULTS / name
    try:
        rows = record.read(path)
    except FileNotFoundError:
        raise TableError(f"benchmarks/results/{name} is missing: `{_MEASURE[name]}` measures it") from None
    if not rows:
        raise TableError(f"benchmarks/results/{name} has no rows: `{_MEASURE[name]}` measures it")
    return rows


def _source(rows: Sequence[record.Row], name: str, where: str = "") -> str:
    """The line under a table: which machine, versions, commit, date and file."""
    row = rows[-1]
    machine = f"{row['device']}, {row['threads']} threads"
    measured = f"torch {row['torch']}, {row['date']}, commit {row['commit']}"
    return f"\n\n{where}{machine}, {measured}; `benchmarks/results/{name}`"


def _percent(ratio: str, low: str, high: str) -> str:
    value, lowest, highest = (100 * (float(x) - 1) for x in (ratio, low, high))
    return f"{value:+.2f} % ({lowest:+.2f} to {highest:+.2f})"


def _first_sentence(said: str) -> str:
    text = " ".join(said.split("\n\n")[0].split())
    return re.split(r"(?<=[.;])\s", text, maxsplit=1)[0].rstrip(".;")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables (0), or check them: 0 up to date, 1 out of date, 2 the file cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where the file is out of date"
    )
    parser.add_argument("--readme", type=Path, default=stamp.ROOT / "README.md", help="file with the markers")
    args = parser.parse_args(argv)
    try:
        text = args.readme.read_text(encoding="utf-8")
        made = render(text)
    except (OSError, TableError) as error:
        print(f"benchmarks.tables: {error}", file=sys.stderr)
        return 2
    if made == text:
        return 0
    if args.check:
        print(f"{args.readme.name} is out of date: run `make tables`", file=sys.stderr)
        return 1
    args.readme.write_text(made, encoding="utf-8")
    print(f"{args.readme.name}: tables written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
