"""Job files and the command line: which jobs there are, and which options each has. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvstore.errors import ConfigError
from kvstore_bench.job import COMMAND_LINE, Assignment, Job, JobError, build_job, known

#: The section whose options hold for the sections that follow.
GLOBAL = "global"


class Section(NamedTuple):
    """A named list of options, as written."""

    name: str
    where: str
    assignments: list[Assignment]


def parse_job_file(text: str, file: str) -> list[Section]:
    """The sections of a job file, each with the options of the [global] ones before it.

    Args:
        file: Its name, for errors.

    Raises:
        JobError: Names file, line and section.
    """
    sections: list[Section] = []
    shared: list[Assignment] = []
    current: list[Assignment] | None = None
    name = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        where = f"{file}:{number}"
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            name = line[1:-1].strip()
            if line[-1] != "]" or not name:
                raise JobError(where, "section", line, "must be [NAME]")
            if name == GLOBAL:
                current = shared
            else:
                current = list(shared)
                sections.append(Section(name, where, current))
            continue
        if current is None:
            raise JobError(where, "line", line, "stands before the first [section]")
        option, _, value = (part.strip() for part in line.partition("="))
        current.append(known(Assignment(f"{where} [{name}]", option, value)))
    if not sections:
        raise JobError(file, "sections", "", "a job file needs at least one [job]")
    return sections


def assemble(
    files: Sequence[tuple[str, str]], words: Sequence[tuple[str, str]], only: Sequence[str] = ()
) -> list[Job]:
    """All jobs of a call, in order: those of the files, then those of the command line.

    Args:
        files: (name, text) of each job file.
        words: (option, value) of the command line in their order; ("name", NAME) begins a
            job. What stands before the first name holds for all jobs, also those of files,
            and counts for more than what a file says.
        only: Names of the sections to run; empty for all.

    Raises:
        JobError: Something cannot be, and where.
        ConfigError: There is no job.
    """
    shared: list[Assignment] = []
    sections: list[Section] = []
    current = shared
    for option, value in words:
        if option == "name":
            current = []
            sections.append(Section(value, COMMAND_LINE, current))
        else:
            current.append(known(Assignment(COMMAND_LINE, option, value)))
    named = [Section(name, where, [*shared, *own]) for name, where, own in sections]
    filed = [
        Section(name, where, [*own, *shared])
        for file, text in files
        for name, where, own in parse_job_file(text, file)
    ]
    jobs: dict[str, Job] = {}
    for name, where, assignments in [*filed, *named]:
        if name in jobs:
            raise JobError(where, "name", name, "there is a job of this name already")
        jobs[name] = build_job(name, assignments)
    for name in only:
        if name not in jobs:
            raise JobError(COMMAND_LINE, "section", name, f"there are {', '.join(jobs)}")
    chosen = [job for job in jobs.values() if not only or job.name in only]
    if not chosen:
        raise ConfigError("JOBFILE", "none", "give a job file, or --name=NAME and more")
    return chosen


def groups(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that run at the same time; a job with `stonewall` begins the next group."""
    found: list[list[Job]] = []
    for job in jobs:
        if job.stonewall or not found:
            found.append([])
        found[-1].append(job)
    return found
