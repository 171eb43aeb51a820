"""What `kvctl doctor` says: one finding a check, for people and for programs. Pure.

A check takes facts and returns findings; who wants one more writes it into the list of those
that are made of the same facts.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvstore_client.ctl.documents import FORMAT
from kvstore_client.ctl.tables import printable, width

# How the subject of findings about no peer is called on the screen.
THIS_HOST = "this host"


class Verdict(enum.StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    NOT_CHECKED = "not checked"


class Finding(NamedTuple):
    """One check and how it ended.

    Attributes:
        check: Its name, as "locked memory" or "port mlx5_0:1".
        verdict: How it ended.
        found: What is so.
        remedy: What to do or to type about it; "" where nothing is to be done.
        subject: The endpoint that it is about; "" for this host.
        values: Figures and names in it, for programs.
    """

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""
    subject: str = ""
    values: Mapping[str, Any] = {}


def exit_status(findings: Sequence[Finding]) -> int:
    """1 if a check has failed, else 0."""
    return int(any(finding.verdict is Verdict.FAILED for finding in findings))


def as_lines(findings: Sequence[Finding]) -> list[str]:
    """All findings, those about one subject together, and how many there are of each kind."""
    lines: list[str] = []
    wide = max((width(printable(finding.check)) for finding in findings), default=0)
    for subject in dict.fromkeys(finding.subject for finding in findings):
        lines += ["", printable(subject or THIS_HOST)] if lines else [subject or THIS_HOST]
        for finding in findings:
            if finding.subject == subject:
                lines += _lines(finding, wide)
    counts = Counter(finding.verdict for finding in findings)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
    return [*lines, "", f"{len(findings)} checks: {told or 'nothing to check'}"]


def _lines(finding: Finding, wide: int) -> list[str]:
    check = printable(finding.check)
    start = f"  {finding.verdict:<11}  {check}{' ' * (wide - width(check))}  "
    lines = [start + printable(finding.found)]
    if finding.remedy:
        lines.append(" " * len(start) + "-> " + printable(finding.remedy))
    return lines


def as_document(findings: Sequence[Finding]) -> dict[str, Any]:
    """All findings, for programs; the help of the command tells the names."""
    return {
        "format": FORMAT,
        "checks": [
            {
                "endpoint": finding.subject or None,
                "check": finding.check,
                "verdict": finding.verdict.value.replace(" ", "_"),
                "found": finding.found,
                "remedy": finding.remedy or None,
                "values": dict(finding.values),
            }
            for finding in findings
        ],
    }


__all__ = ["THIS_HOST", "Finding", "Verdict", "as_document", "as_lines", "exit_status"]
