"""Fuzz targets over everything that reads a file which somebody else wrote.

    make fuzz SECONDS=60                                   guided by coverage, then sanitized
    python tests/fuzz/fuzz_pack.py --replay FILE|FOLDER..  inputs again, findings of the first too
    python tests/fuzz/fuzz_pack.py --random 5 1000         the inputs of 1000 seeds from 5 on
    python tests/fuzz/fuzz_pack.py FOLDER -runs=1000 ...   libFuzzer's options; needs atheris

The first byte of an input names its target; `Choices` turns the others into decisions.
"""

import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import FunctionType
from typing import Any, Final

import numpy as np

_here = Path(__file__).parent
runpy.run_path(str(_here.parent / "native_modules.py"))


def _part(name: str) -> dict[str, Any]:
    return runpy.run_path(str(_here / f"{name}.py"))


def targets() -> dict[str, Callable[[bytes], object]]:
    """Return the targets by name. Each takes an input, and returns, or raises what is a finding."""
    choices = _part("choices")["Choices"]
    matrices = _part("hostile_matrices")
    check_matrix = _part("check_matrix")["check_matrix"]
    packs = _part("hostile_packs")
    others = _part("hostile_inputs")

    def matrix(data: bytes) -> bool:
        chosen = choices(data)
        mutated = matrices["mutate"](chosen, matrices["any_matrix"](chosen))
        accepted: bool = check_matrix(matrices["own_memory"](mutated))
        return accepted

    def pack(data: bytes) -> bool:
        chosen = choices(data)
        folder = packs["any_pack"](chosen, matrices)
        accepted: bool = packs["check_pack"](folder, check_matrix, matrices["own_memory"])
        return accepted

    found: dict[str, Callable[[bytes], object]] = {"matrix": matrix, "pack": pack}
    for name, target in others["TARGETS"].items():
        found[name] = partial(target, choices)
    return found


TURNS: Final = ("matrix", "matrix", "matrix", "pack", "pack", "index", "header", "bitmask", "wire")
"""Which target an input is for: its first byte, modulo the length."""


def random_input(seed: int) -> bytes:
    """Return the input of a seed; a third of them end early, so that the last decisions are 0."""
    rng = np.random.default_rng(seed)
    return rng.bytes(int(rng.choice([16, 64, 512])))


def run_one(known: dict[str, Callable[[bytes], object]], data: bytes) -> str:
    """Run an input; return the name of its target, with ` ok` when it was a right file."""
    name = TURNS[data[0] % len(TURNS)] if data else TURNS[0]
    return f"{name} ok" if known[name](data[1:]) is True else name


def run_random(first: int, count: int) -> dict[str, int]:
    """Run the inputs of `count` seeds; returns runs by target.

    Raises what a target raises, with the seed that replays it.
    """
    known, runs = targets(), dict[str, int]()
    for seed in range(first, first + count):
        try:
            name = run_one(known, random_input(seed))
        except BaseException as error:
            error.add_note(f"replay: python tests/fuzz/fuzz_pack.py --random {seed} 1")
            raise
        runs[name] = runs.get(name, 0) + 1
    return runs


def replay(paths: list[Path]) -> dict[str, int]:
    """Run the inputs in these files and in the files of these folders; returns runs by target."""
    known, runs = targets(), dict[str, int]()
    folders = [sorted(path.iterdir()) if path.is_dir() else [path] for path in paths]
    for file in chain.from_iterable(folders):
        print(file, file=sys.stderr, end="\r", flush=True)  # the last one, should this process die
        name = run_one(known, file.read_bytes())
        runs[name] = runs.get(name, 0) + 1
    return runs


def _functions(packages: tuple[str, ...]) -> Iterator[FunctionType]:
    """Yield what the imported modules define.

    An import hook would be simpler; it does not see the modules of an editable install.
    """
    for name in [name for name in sys.modules if name.startswith(packages)]:
        defined = [
            v for v in vars(sys.modules[name]).values() if getattr(v, "__module__", "") == name
        ]
        for value in defined:
            members = vars(value).values() if isinstance(value, type) else (value,)
            for member in members:
                plain = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if isinstance(plain, FunctionType) and plain.__code__.co_filename != "<string>":
                    yield plain


def main(arguments: list[str]) -> None:
    if arguments[1:2] == ["--random"]:
        print(run_random(int(arguments[2]), int(arguments[3])))
        return
    if arguments[1:2] == ["--replay"]:
        print(replay([Path(argument) for argument in arguments[2:]]))
        return
    atheris: Any = import_module("atheris")  # optional: the extra `fuzz`

    known = targets()
    for function in _functions(("tierd_layouts", "tierd_kernels", "tierd_tools")):
        atheris.instrument_func(function)
    corpus = [Path(a) for a in arguments[1:] if not a.startswith("-") and Path(a).is_dir()]
    for folder in corpus:
        for seed in range(200):
            (folder / f"seed-{seed}").write_bytes(random_input(seed))

    def test_one_input(data: bytes) -> None:
        run_one(known, data)

    atheris.Setup(arguments, test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
