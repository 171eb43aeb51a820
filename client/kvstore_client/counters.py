"""What a client counts, by the names in `AsyncClient.counters`."""

from __future__ import annotations

from collections import Counter

from kvstore.messages import FetchOutcome, PutOutcome
from kvstore_client.jobs import FetchJob, Job


def count_job(counters: Counter[str], job: Job) -> None:
    """A fetch or a put has ended: count its blocks by outcome, its bytes by path and transport."""
    fetching = isinstance(job, FetchJob)
    kind = "fetch" if fetching else "put"
    counters[f"{kind}_requests"] += 1
    for outcome in FetchOutcome if fetching else PutOutcome:
        count = job.outcomes.count(outcome)
        if count:
            counters[f"{kind}_blocks_{outcome.name.lower()}"] += count
    if isinstance(job, FetchJob) and job.moved_count:
        counters["blocks_moved"] += job.moved_count
    for run in job.runs:
        counters[f"{kind}_bytes_{run.path}"] += run.bytes
        counters[f"{kind}_bytes_by_{run.transport}"] += run.bytes
