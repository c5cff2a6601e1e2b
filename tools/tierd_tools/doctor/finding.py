"""What the doctor found about one thing, and all of it together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from tierd_tools.terminal import printable

if TYPE_CHECKING:
    from tierd_tools.terminal import Reply

Verdict = Literal["works", "does not work", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`needed`: tierd cannot do what is asked of it here without this. The rest is a choice (a
    GPU that is not there), or costs speed only."""

    name: str
    verdict: Verdict
    text: str  #: what was tried, and what came of it
    advice: str = ""  #: what to do; empty where nothing is to be done
    needed: bool = False

    @property
    def failed(self) -> bool:
        return self.needed and self.verdict == "does not work"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> list[str]:
        """What is needed and does not work: exit status 1."""
        return [finding.name for finding in self.findings if finding.failed]

    def as_reply(self) -> Reply:
        return {
            "failed": self.failed,
            "findings": [asdict(finding) for finding in self.findings],
        }


def show(reply: Reply) -> None:
    """Print an `as_reply`."""
    findings = [Finding(**fields) for fields in reply["findings"]]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        verdict = finding.verdict + (", and is NEEDED" if finding.failed else "")
        print(printable(f"{finding.name:<{width}}  {verdict}: {finding.text}"))
        if finding.advice:
            print(printable(f"{'':<{width}}  -> {finding.advice}"))
    counts = {verdict: 0 for verdict in get_args(Verdict)}
    for finding in findings:
        counts[finding.verdict] += 1
    failed = reply["failed"]
    outcome = "everything that tierd needs here works"
    if failed:
        outcome = f"tierd needs what does not work: {', '.join(failed)}"
    print(
        f"{counts['works']} work, {counts['does not work']} do not, {counts['unknown']} are "
        f"unknown; {outcome}"
    )
