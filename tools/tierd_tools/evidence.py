"""What pruning and quantising cost on trained weights: size and perplexity of every combination.

python -m tierd_tools.evidence ../shared/models > docs/evidence/DATE-trained-models.md

For each model of a folder: unpruned, magnitude and Wanda at four sparsities, each in every codec,
packed and evaluated as users do it. The folder has `dev.txt`, of the kind of text that the models
were trained on: its first half is what is scored (the first windows of it), its second half what
Wanda is calibrated on, so neither has a line of the other.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tierd_tools.bench.__main__ import hardware
from tierd_tools.calibrate import WINDOW_TOKENS as CALIBRATION_TOKENS
from tierd_tools.errors import CheckpointMissing, EvaluationError, ToolError
from tierd_tools.evaluate import WINDOW_TOKENS, WINDOWS, EvalReport, evaluate
from tierd_tools.pack import pack
from tierd_tools.pack_settings import DEFAULT_WINDOWS as CALIBRATION_WINDOWS
from tierd_tools.quantities import size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

TEXT = "dev.txt"
CODECS = ("lossless", "raw", "int8", "int4")
SPARSITIES = (0.3, 0.5, 0.6, 0.7)
#: small: the models are, and nothing of them has to be read twice
_DRAM = "256MiB"


@dataclass(frozen=True, slots=True)
class Pruning:
    """How a model was pruned before it was packed."""

    method: str = "none"
    sparsity: float | None = None

    def __str__(self) -> str:
        return "unpruned" if self.sparsity is None else f"{self.method} {self.sparsity:.0%}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One pack, evaluated."""

    model: str
    pruning: Pruning
    codec: str
    report: EvalReport


PRUNINGS = (
    Pruning(),
    *(Pruning(*both) for both in itertools.product(("magnitude", "wanda"), SPARSITIES)),
)


def collect(
    models: Sequence[Path],
    text: Path,
    *,
    windows: int = WINDOWS,
    prunings: Sequence[Pruning] = PRUNINGS,
    codecs: Sequence[str] = CODECS,
) -> Iterator[Finding]:
    """Packs and evaluates every combination, in a temporary folder, one at a time.

    Raises EvaluationError when two codecs that lose nothing differ in perplexity.
    """
    with tempfile.TemporaryDirectory(prefix="tierd-evidence-") as folder:
        scored, calibration = halves(text, Path(folder))
        for model, pruning in itertools.product(models, prunings):
            exact: dict[str, float] = {}
            for codec in codecs:
                target = Path(folder) / "pack"
                pack(
                    model,
                    target,
                    codec=codec,
                    prune=pruning.method,
                    sparsity=pruning.sparsity,
                    calibration=calibration if pruning.method == "wanda" else None,
                )
                report = evaluate(target, scored, windows=windows, dram=_DRAM)
                if codec in ("lossless", "raw"):
                    exact[codec] = report.perplexity
                if len(set(exact.values())) > 1:
                    raise EvaluationError(f"{model.name}, {pruning}: not the same model: {exact}")
                yield Finding(model.name, pruning, codec, report)


def halves(text: Path, folder: Path) -> tuple[Path, Path]:
    """Files with the first and the second half of the lines of `text`."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = (folder / "scored.txt", folder / "calibration.txt")
    middle = len(lines) // 2
    for part, content in zip(parts, (lines[:middle], lines[middle:]), strict=True):
        part.write_text("".join(content), encoding="utf-8")
    return parts


def tables(findings: Iterable[Finding]) -> str:
    """Markdown: one table a model, a row a pruning; size and ratio of the linear layers."""
    parts = []
    for model, group in itertools.groupby(findings, lambda finding: finding.model):
        rows: dict[str, dict[str, EvalReport]] = {}
        for finding in group:
            rows.setdefault(str(finding.pruning), {})[finding.codec] = finding.report
        parts.append(_table(model, rows))
    return "\n".join(parts)


def _table(model: str, rows: dict[str, dict[str, EvalReport]]) -> str:
    codecs = list(dict.fromkeys(codec for row in rows.values() for codec in row))
    dense = next(iter(next(iter(rows.values())).values())).linear_dense_bytes
    headings = ["pruning"]
    for codec in codecs:
        headings += [codec, "ratio", "perplexity"]
    lines = [
        f"## {model}\n",
        f"Linear layers: {size(dense)} in bf16.\n",
        f"| {' | '.join(headings)} |",
        f"|---|{'---:|' * (len(headings) - 1)}",
    ]
    for pruning, reports in rows.items():
        cells = [pruning]
        for codec in codecs:
            report = reports[codec]
            cells += [
                size(report.linear_bytes),
                f"{report.linear_ratio:.2f}x",
                f"{report.perplexity:.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def models_in(folder: Path) -> list[Path]:
    """The model folders in it. Raises CheckpointMissing when there are none, or no text."""
    models = sorted(path.parent for path in folder.glob("*/config.json"))
    if not models or not (folder / TEXT).is_file():
        raise CheckpointMissing(f"{folder} has no model folders, or no {TEXT}")
    return models


def head(argv: Sequence[str], windows: int) -> str:
    """What the tables were made with and of."""
    command = shlex.join(["python", "-m", "tierd_tools.evidence", *argv])
    return (
        "# Trained weights: size and perplexity\n\n"
        f"`{command}`, {time.strftime('%Y-%m-%d')}, {hardware()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads.\n\n"
        f"Perplexity over {windows} consecutive windows of {WINDOW_TOKENS} tokens of the first "
        f"half of `{TEXT}`, computed in bf16 by `tierd_client.load_model`; quantised weights are "
        "rounded to bf16 as they are expanded. Magnitude pruning is per matrix, Wanda per output "
        f"row, calibrated on {CALIBRATION_WINDOWS} windows of {CALIBRATION_TOKENS} tokens spread "
        f"over the second half of `{TEXT}`. int8 and int4: groups of 128 along a row. Sizes are of "
        "the linear layers in the pack, with bitmaps, offsets, scales and padding. `lossless` and "
        "`raw` were checked to give the same perplexity to the last bit.\n"
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tierd_tools.evidence", description=__doc__)
    parser.add_argument("models", type=Path, help="a folder of model folders, with dev.txt")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    findings = []
    try:
        models = models_in(arguments.models)
        for finding in collect(models, arguments.models / TEXT, windows=arguments.windows):
            findings.append(finding)
            print(
                f"{finding.model}, {finding.pruning}, {finding.codec}: "
                f"{finding.report.linear_ratio:.2f}x, perplexity {finding.report.perplexity:.3f}",
                file=sys.stderr,
                flush=True,
            )
    except ToolError as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 1
    print(head(argv, arguments.windows))
    print(tables(findings), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
