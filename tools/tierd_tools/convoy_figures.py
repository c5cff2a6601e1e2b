"""The cases of docs/convoys.md: `python -m tierd_tools.convoy_figures DIR` writes their PNGs there.

Needs matplotlib (the extra `plots`). Takes about two minutes; every run is deterministic.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tierd_tools.convoy_study import READ_NS, Case, Process, Study, crowd

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNTS = (1, 2, 4, 8)
OFF = {"convoy_wait_ns": 0}


def lru(count: int, layers: int = 24, cache: int = 12, times: float = 600.0) -> float:
    """Layers per read time under LRU, one read at a time, whoever asked first: the issue's
    comparison. Clients ask for the layer that they need, nothing is read ahead."""
    processes = crowd(count, (0.05, 0.4), 1)
    kept: OrderedDict[int, None] = OrderedDict()
    ready = [process.start for process in processes]  # when each asks for its next layer
    step = [0] * count
    device, done = 0.0, 0
    while True:
        who = min(range(count), key=lambda number: ready[number])
        now, layer = ready[who], step[who] % layers
        if now > times:
            return done / times
        if layer in kept:
            kept.move_to_end(layer)
            ready[who] = now + processes[who].compute
            step[who] += 1
            done += 1
            continue
        device = max(device, now) + 1.0
        if len(kept) >= cache:
            kept.popitem(last=False)
        kept[layer] = None
        waiting = [n for n in range(count) if ready[n] <= device and step[n] % layers == layer]
        for number in waiting:
            ready[number] = device


def formation(folder: Path) -> None:
    """Layers per read time against the number of processes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for label, cache, reads, config in (
        ("half of the model, 1 read", 12, 1, {}),
        ("half, 2 reads", 12, 2, {}),
        ("4 layers, 4 reads, no holds", 4, 4, OFF),
        ("4 layers, 4 reads", 4, 4, {}),
    ):
        counts = [count for count in COUNTS if count <= cache]
        rates = [
            Study(Case("", crowd(count, (0.05, 0.4), 1), cache, reads=reads, config=config))
            .run()
            .layers_per_read_time()
            for count in counts
        ]
        print(f"{label}: {[round(rate, 2) for rate in rates]}")
        axes.plot(counts, rates, "o--" if config else "o-", label=label)
    rates = [lru(count) for count in COUNTS]
    print(f"LRU, half, 1 read: {[round(rate, 2) for rate in rates]}")
    axes.plot(COUNTS, rates, "x:", label="LRU, half, 1 read")
    axes.set_xlabel("processes on one model of 24 layers")
    axes.set_ylabel("layers computed in the time of one read")
    _save(figure, folder / "convoy-processes.png")


def small_budgets(folder: Path) -> None:
    """Reads a pass of four processes against the budget, with and without holds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    caches = (4, 5, 6, 8, 10, 12, 16)
    one = [
        Study(Case("", crowd(1, (0.1, 0.2), 1), cache)).run().reads_per_pass() for cache in caches
    ]
    axes.plot(caches, one, "k:", label="one process")
    for reads in (1, 2, 4):
        for name, config, style in (("", {}, "-"), (", no holds", OFF, "--")):
            values = [
                Study(Case("", crowd(4, (0.1, 0.2), 1), cache, reads=reads, config=config))
                .run()
                .reads_per_pass()
                for cache in caches
            ]
            print(f"4 processes, {reads} reads{name}: {[round(value, 1) for value in values]}")
            axes.plot(
                caches,
                values,
                "o" + style,
                color=f"C{reads}",
                label=f"four, {reads} at a time{name}",
            )
    axes.set_xlabel("layers that the budget holds, of 24")
    axes.set_ylabel("reads in the time of a pass of all")
    _save(figure, folder / "convoy-budgets.png")


def positions(folder: Path) -> None:
    """Where four processes are on their cycle: two in phase, then a third and a fourth."""
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(2, 1, figsize=(8, 5), sharex=True)
    starts = (0.0, 7.7, 60.0, 113.0)
    for axes, name, config in zip(both, ("no holds", "holds"), (OFF, {}), strict=True):
        processes = tuple(Process(0.2, start=start) for start in starts)
        study = Study(Case("", processes, 4, reads=4, warm=0, measured=220, config=config)).run()
        for runner in study.runners:
            axes.plot(
                [at / READ_NS for at in runner.at],
                [step % 24 for step in range(len(runner.at))],
                ".", markersize=2,
            )  # fmt: skip
        axes.set_ylabel(f"layer ({name})")
    both[1].set_xlabel("read times; budget of 4 layers, 4 reads at a time")
    _save(figure, folder / "convoy-positions.png")


def speeds() -> None:
    """What each process gets where speeds, models and plans differ, with and without holds."""
    for name, speeds in (
        ("0.2 and 2", (0.2, 2.0)),
        ("three at 0.2, one at 2", (0.2, 0.2, 0.2, 2.0)),
        ("0.2 and 0.7", (0.2, 0.7)),
        ("0.2, 0.4, 0.7, 1", (0.2, 0.4, 0.7, 1.0)),
        ("four at 2, compute binds", (2.0, 2.02, 2.04, 2.06)),
    ):
        processes = tuple(Process(c, start=7 * i + 3 * c) for i, c in enumerate(speeds))
        _beside(name, Case("", processes, reads=2, measured=1500))
    for models, cache in ((2, 24), (2, 12), (3, 12)):
        processes = tuple(
            Process(0.2, model=number % models, start=11.3 * number) for number in range(2 * models)
        )
        _beside(
            f"{models} models, 2 processes each, budget {cache}",
            Case("", processes, cache, models=models, reads=2),
        )
    pair = (Process(0.2, layers=6), Process(0.2, layers=6, start=7.7))
    _beside("plans of 6 layers, budget 3", Case("", pair, 3, reads=2, layers=6))
    for held in (1, 2):
        processes = tuple(replace(p, holds=held) for p in crowd(3, (0.2, 0.2), 1))
        _beside(f"{held} leases kept behind, three processes", Case("", processes, reads=2))
    three = tuple(Process(0.2, start=1.7 * number) for number in range(3))
    for reads in (1, 2, 4):
        for name, config in (("no holds", OFF), ("holds", {})):
            lost = [_lost(three, 200 + 7.3 * number, reads, config) for number in range(4)]
            print(f"late joiner, {reads} reads, {name}: passes lost by each: {lost}")


def _lost(three: tuple[Process, ...], late: float, reads: int, config: dict[str, int]) -> float:
    before = Case("", three, reads=reads, warm=late, measured=150, config=config)
    after = replace(before, processes=(*three, Process(0.2, start=late)))
    ran, joined = Study(before).run(), Study(after).run()
    rate = ran.layers_per_read_time(0) - joined.layers_per_read_time(0)
    return round(rate * before.measured / before.layers, 2)


def _beside(name: str, case: Case) -> None:
    def rates(study: Study) -> list[float]:
        return [round(study.layers_per_read_time(n), 2) for n in range(len(case.processes))]

    off, on = Study(replace(case, config=OFF)).run(), Study(case).run()
    alone = [Study(replace(case, processes=(one,))).run() for one in case.processes]
    apart = [round(study.layers_per_read_time(), 2) for study in alone]
    print(
        f"{name}: alone {apart}, no holds {rates(off)} at {off.reads_per_pass():.1f} reads a "
        f"pass, holds {rates(on)} at {on.reads_per_pass():.1f}"
    )


def _save(figure: object, path: Path) -> None:
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tierd_tools.convoy_figures")
    parser.add_argument("folder", type=Path, help="where the PNGs go")
    folder: Path = parser.parse_args(argv).folder
    if not folder.is_dir():  # said before minutes of simulating
        parser.error(f"{folder} is no folder")
    import matplotlib

    matplotlib.use("Agg")
    formation(folder)
    small_budgets(folder)
    positions(folder)
    speeds()


if __name__ == "__main__":
    main(sys.argv[1:])
