"""`make gpu-acceptance [WHEELS=folder] [MODELS=folder] [ONLY="part ..."]`: everything that needs a
GPU, in 8 minutes.

Builds the native modules, runs the tests marked `gpu` (the probes of tests/gpu among them), the
doctor and the benchmarks of tierd_tools.bench.gpu_*; prints a Markdown table and writes one JSON.
Offline, with the packages of the Python that runs it; wheels that are missing come from WHEELS.
Whatever cannot run says why. Exit status 1: something that ran failed or missed its bound.

Imports only the standard library and what does too: it begins before anything is built.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tierd_tools.gpu_acceptance import machine, report
from tierd_tools.gpu_acceptance.budgets import BUDGETS, PATIENCE, SECONDS, WITH_MODELS
from tierd_tools.gpu_acceptance.environment import Environment, prepare
from tierd_tools.gpu_acceptance.parts import Outcome, Parts, Running
from tierd_tools.gpu_acceptance.promises import PROMISES

if TYPE_CHECKING:
    from collections.abc import Sequence

KERNEL_TESTS: Final = "kernels"  #: in the folder of the tests
PLUGINS: Final = ("-p", "pytest_asyncio.plugin", "-p", "pytest_timeout")
WORKERS: Final = 8  #: each with a CUDA context of its own
BENCH_OUT: Final = Path("build/bench")
_LOOK = "from tierd_tools.doctor import nvidia; print(nvidia.look().problem or '')"


class Acceptance:
    """One run. `out`: where logs, models and results go."""

    def __init__(
        self,
        out: Path,
        environment: Environment,
        seconds: float,
        tests: str,
        only: Sequence[str] = (),
    ) -> None:
        """only: the parts that are chosen, besides those that all need; none: all of them."""
        self.out = out
        self._tests_in = tests
        self._environment = environment
        self._only = only
        variables = {
            **environment.variables,
            "TIERD_GPU_ANSWERS": str(out / "answers.jsonl"),
            "TIERD_GPU_MODELS": str(out / "models"),
            "TIERD_KERNELS_DEVICE": "cuda",  # the kernels' tests, compiled
            # Of the many plugins that a node has, one might warn, and warnings are errors.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            # Of the run: what it measures and compiles is not what another one left.
            "XDG_CACHE_HOME": str((out / "cache").absolute()),
            "TRITON_CACHE_DIR": str((out / "triton").absolute()),
        }
        self._parts = Parts(seconds, out, variables)

    def run(self, models: Path | None) -> dict[str, Any]:
        built = self._build()
        no_gpu = self._look() if not built else None
        (self.out / "answers.jsonl").unlink(missing_ok=True)
        why = built or (no_gpu and f"no GPU: {no_gpu}")
        making = self._models(models, why)  # beside what measures nothing
        tests = self._tests(built)
        doctor = self._doctor(built or self._not_chosen("doctor"))
        missing = self._parts.finish(making) if isinstance(making, Running) else making
        no_models = f"no model: {missing.reason}" if missing.reason else None
        rows = [
            row
            for name in PROMISES
            for row in self._bench(
                name,
                why or self._not_chosen(name) or (no_models if name in WITH_MODELS else None),
            )
        ]
        return {
            "machine": machine.describe(),
            "seconds": round(self._parts.seconds, 1),
            "no_gpu": no_gpu or built,
            "rows": rows,
            "tables": report.read_tables(BENCH_OUT, PROMISES),
            "parts": [outcome.as_json() for outcome in self._parts.outcomes],
            "tests": tests,
            "answers": report.read_answers(self.out / "answers.jsonl"),
            "doctor": doctor,
        }

    def _build(self) -> str | None:
        """Why nothing that needs tierd can run, None when it was built."""
        if problem := self._environment.problem:
            return self._parts.skip("build", BUDGETS["build"], problem).reason
        if self._environment.wheels:
            command = self._environment.take_wheels()
            outcome = self._parts.run("wheels", BUDGETS["wheels"], command)
            if outcome.reason:
                return f"not built: {outcome.reason}"
        command = self._environment.install((self.out / "cmake").absolute())
        outcome = self._parts.run("build", BUDGETS["build"], command)
        return f"not built: {outcome.reason}" if outcome.reason else None

    def _look(self) -> str | None:
        """Why there is no GPU, None when there is one."""
        said = self.out / "look.txt"
        outcome = self._parts.run(
            "look", BUDGETS["look"], [sys.executable, "-c", _LOOK], output=said
        )
        return outcome.reason or said.read_text().strip() or None

    def _tests(self, why: str | None) -> dict[str, Any] | None:
        """Those of the kernels in several processes, where pytest-xdist is here: most of their time
        goes into compiling. The others one by one: they look at all of the GPU's memory."""
        if why:
            for name in ("kernels", "tests"):
                self._parts.skip(name, BUDGETS[name], why)
            return None
        tests = Path(self._tests_in)
        kernels = tests / KERNEL_TESTS
        found = []
        if kernels.is_dir():
            found.append(self._pytest("kernels", [str(kernels), *_in_parallel()]))
        found.append(self._pytest("tests", [str(tests), f"--ignore={kernels}"]))
        return report.tests_json([one for one in found if one is not None])

    def _pytest(self, name: str, arguments: Sequence[str]) -> report.Tests | None:
        if why := self._not_chosen(name):
            self._parts.skip(name, BUDGETS[name], why)
            return None
        junit = self.out / f"{name}.xml"
        junit.unlink(missing_ok=True)
        self._parts.run(
            name, BUDGETS[name],
            [
                sys.executable, "-m", "pytest", "-m", "gpu", *arguments, "-q", "-rs",
                "-p", "no:cacheprovider", "--continue-on-collection-errors",
                *PLUGINS, f"--junitxml={junit}",
            ],
            good=(0, 5),  # 5: none of them is marked
        )  # fmt: skip
        return report.read_tests(junit)

    def _doctor(self, why: str | None) -> dict[str, Any] | None:
        if why:
            self._parts.skip("doctor", BUDGETS["doctor"], why)
            return None
        said = self.out / "doctor.json"
        command = [sys.executable, "-m", "tierd_tools.tierctl", "doctor", "--json"]
        outcome = self._parts.run("doctor", BUDGETS["doctor"], command, good=(0, 1), output=said)
        if outcome.reason:
            return None
        found: dict[str, Any] = json.loads(said.read_text())
        return found

    def _models(self, models: Path | None, why: str | None) -> Running | Outcome:
        """The models being made; or why they are not."""
        if not why and self._only and not set(self._only) & set(WITH_MODELS):
            why = self._not_chosen("models")
        if why:
            return self._parts.skip("models", BUDGETS["models"], why)
        command = [sys.executable, "-m", "tierd_tools.gpu_acceptance.models"]
        command += [str(self.out / "models")] + ([str(models)] if models else [])
        return self._parts.start("models", BUDGETS["models"], command)

    def _not_chosen(self, name: str) -> str | None:
        if not self._only or name in self._only:
            return None
        return f"not chosen: ONLY={' '.join(self._only)}"

    def _bench(self, name: str, why: str | None) -> list[dict[str, Any]]:
        written = BENCH_OUT / f"{name}.json"
        written.unlink(missing_ok=True)
        written.with_suffix(".md").unlink(missing_ok=True)
        if why:
            reason = self._parts.skip(name, BUDGETS[name], why).reason
        else:
            command = [sys.executable, "-m", "tierd_tools.bench", name]
            most = None if self._only else PATIENCE * BUDGETS[name]
            outcome = self._parts.run(name, BUDGETS[name], command, good=(0, 1), most=most)
            if written.is_file():
                rows: list[dict[str, Any]] = json.loads(written.read_text())
                return rows
            reason = outcome.reason or f"it wrote no rows: {outcome.log}"
        return [promise.not_run(reason).as_json() for promise in PROMISES[name]]


def _in_parallel() -> list[str]:
    """Options of pytest, empty where it can run tests one after the other only."""
    workers = min(os.cpu_count() or 1, WORKERS)
    if workers < 4 or importlib.util.find_spec("xdist") is None:
        return []
    return ["-p", "xdist.plugin", "-n", str(workers)]


def failures(result: dict[str, Any]) -> list[str]:
    """What ran and was not as promised; what could not run because there is no GPU is none."""
    found = [f"{row['row']}: {row['ratio']:.3g}" for row in result["rows"] if row["met"] is False]
    found += (result["tests"] or {}).get("failed", [])
    if not result["no_gpu"] or result["no_gpu"].startswith(("not built", "missing")):
        found += [
            f"{part['name']}: {part['reason']}"
            for part in result["parts"]
            if part["reason"] and not part["reason"].startswith("not chosen")
        ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-acceptance", description=__doc__)
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that the node lacks")
    parser.add_argument("--models", type=Path, help="a folder of Hugging Face checkpoints")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument(
        "--only", default="", metavar="PARTS", help=f"of {', '.join(BUDGETS)}; all by default"
    )
    parser.add_argument("--tests", default="tests", help="where the tests marked gpu are")
    arguments = parser.parse_args(argv)
    if arguments.models is not None and not arguments.models.is_dir():
        print(f"gpu-acceptance: MODELS={arguments.models} is no folder", file=sys.stderr)
        return 2
    only = arguments.only.split()
    if unknown := sorted(set(only) - set(BUDGETS)):
        print(
            f"gpu-acceptance: no part {', '.join(unknown)}; there are: {', '.join(BUDGETS)}",
            file=sys.stderr,
        )
        return 2
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    try:
        environment = prepare((out / "site").absolute(), arguments.wheels)
    except OSError as error:
        print(f"gpu-acceptance: {error}", file=sys.stderr)
        return 2
    run = Acceptance(out, environment, arguments.seconds, arguments.tests, only)
    result = run.run(arguments.models)
    failed = failures(result)
    result["failed"] = failed
    text = report.markdown(result)
    (out / "acceptance.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "acceptance.md").write_text(text)
    print(f"\n{text}")
    not_run = sum(row["met"] is None and bool(row.get("reason")) for row in result["rows"])
    print(f"{not_run} of {len(result['rows'])} rows were not run; {len(failed)} failures")
    print(f"written: {out / 'acceptance.md'}, {out / 'acceptance.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
