"""`make bench [ONLY=NAME]`: runs the benchmarks, prints a table each, writes build/bench/NAME.json.

Exit code 1 when a row missed its bound, 2 for an unknown name.
"""

from __future__ import annotations

import importlib
import pkgutil
import platform
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tierd_tools import bench, benchmark

OUT = Path("build/bench")


def modules() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name != "__main__")


def names() -> list[str]:
    """What runs when nothing is named: all but the parts of another (NAME_part beside NAME)."""
    known = modules()
    return [name for name in known if not any(name.startswith(f"{whole}_") for whole in known)]


def hardware() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    cores = len(
        [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "processor" in line]
    )
    return f"{model}, {cores} cores, Linux {platform.release()}, Python {platform.python_version()}"


def run_one(name: str, console: Console) -> list[benchmark.Row]:
    module = importlib.import_module(f"tierd_tools.bench.{name}")
    question = (module.__doc__ or "").strip().splitlines()[0]
    rows: list[benchmark.Row] = module.run()
    table = Table(title=f"{name}: {question}")
    for heading in ("row", "ours", "theirs", "unit", "ratio", "bound", "met"):
        table.add_column(heading, justify="left" if heading in ("row", "unit") else "right")
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    benchmark.write_json(OUT / f"{name}.json", rows)
    return rows


def _cells(row: benchmark.Row) -> tuple[str, ...]:
    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:,.4g}"

    bound = "-"
    if row.at_least is not None:
        bound = f">= {row.at_least:g}"
    elif row.at_most is not None:
        bound = f"<= {row.at_most:g}"
    met = {True: "yes", False: "NO", None: row.not_applicable or "-"}[row.met]
    return (row.row, figure(row.ours), figure(row.theirs), row.unit, figure(row.ratio), bound, met)


def main(argv: list[str]) -> int:
    unknown = [name for name in argv if name not in modules()]
    if unknown:
        print(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(modules())}")
        return 2
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(f"{time.strftime('%Y-%m-%d')}, {hardware()}")
    rows = [row for name in argv or names() for row in run_one(name, console)]
    missed = [row.row for row in rows if row.met is False]
    if missed:
        console.print(f"{len(missed)} of {len(rows)} rows missed their bound: {'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
