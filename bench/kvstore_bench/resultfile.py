"""Results that `kvbench run` has written as JSON, and fio's own, read again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError

DIRECTIONS = ("read", "write")


@dataclass(frozen=True, slots=True)
class DirectionResult:
    """Reads, or writes, of a job in one trial.

    Attributes:
        ios: How many.
        latency: What the percentiles are of: "lat", or "clat" where fio has no others.
        percentiles_ns: Latency by percentage.
        first_ns: Median time until the first group of layers was there, where there are groups.
    """

    bw_bytes: float
    ios: int
    iops: float
    latency: str
    mean_ns: float
    percentiles_ns: dict[float, float]
    first_ns: float | None = None


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A job in one trial.

    Attributes:
        error: Why it failed; empty if it did not.
        directions: Those in which something was done.
        cpu_s_per_gib: Processor time of both sides; None if it is not known.
    """

    trial: int
    error: str
    options: dict[str, str]
    directions: dict[str, DirectionResult]
    cpu_s_per_gib: float | None

    @property
    def bw_bytes(self) -> float:
        """Bytes a second, both directions."""
        return sum(direction.bw_bytes for direction in self.directions.values())


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A file of results.

    Attributes:
        jobs: Trials of each job, in the order of the file.
        references: The job that each is compared with, where there is one.
        machine: What it ran on, as far as it says so.
        warnings: What the run itself has warned of.
    """

    name: str
    jobs: dict[str, list[TrialResult]]
    references: dict[str, str]
    machine: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def good(self, job: str) -> list[TrialResult]:
        """The trials of a job that did not fail."""
        return [trial for trial in self.jobs.get(job, []) if not trial.error]


def read_results(path: Path) -> ResultFile:
    """Read a file of results.

    Raises:
        ConfigError: It cannot be read, or holds none.
    """
    try:
        document = json.loads(path.read_text())
        return _results(str(path), document)
    except OSError as error:
        raise ConfigError("FILE", path, f"cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "holds no results: kvbench run --output-format=json --output=FILE writes some"
        raise ConfigError("FILE", path, remedy) from error


def _results(name: str, document: dict[str, Any]) -> ResultFile:
    jobs: dict[str, list[TrialResult]] = {}
    for entry in document["jobs"]:
        trials = jobs.setdefault(str(entry["jobname"]), [])
        trials.append(_trial(entry, len(trials) + 1))
    if not jobs:
        raise ValueError("no jobs")
    references = {
        entry["jobname"]: entry["reference"]
        for entry in document.get("summary", [])
        if entry.get("reference")
    }
    return ResultFile(
        name, jobs, references, document.get("machine", {}), document.get("warnings", [])
    )


def _trial(entry: dict[str, Any], number: int) -> TrialResult:
    failed = entry.get("error_text") or (f"error {entry['error']}" if entry["error"] else "")
    cost = entry.get("cpu", {}).get("s_per_gib")
    return TrialResult(
        trial=int(entry.get("trial", number)),
        error=str(failed),
        options={str(key): str(value) for key, value in entry.get("job options", {}).items()},
        directions={
            name: _direction(entry[name])
            for name in DIRECTIONS
            if name in entry and entry[name]["total_ios"]
        },
        cpu_s_per_gib=None if cost is None else float(cost),
    )


def _direction(entry: dict[str, Any]) -> DirectionResult:
    # fio has percentiles of the one or the other.
    label = "lat" if "percentile" in entry["lat_ns"] else "clat"
    found = entry[f"{label}_ns"]
    return DirectionResult(
        bw_bytes=float(entry["bw_bytes"]),
        ios=int(entry["total_ios"]),
        iops=float(entry["iops"]),
        latency=label,
        mean_ns=float(found["mean"]),
        percentiles_ns={
            float(percent): float(value) for percent, value in found.get("percentile", {}).items()
        },
        first_ns=entry.get("first_ns", {}).get("percentile", {}).get("50.000000"),
    )


__all__ = ["DIRECTIONS", "DirectionResult", "ResultFile", "TrialResult", "read_results"]
