"""What counts, and when a job is over."""

from __future__ import annotations

import os

from kvstore_bench.children import cpu_ns
from kvstore_bench.job import Job
from kvstore_bench.meter import Meter, clock_ns, usage

SECOND = 1_000_000_000


def meter(
    seen: list[tuple[int, int]] | None = None, pids: tuple[int, ...] = (), **options: object
) -> Meter:
    job = Job(name="job", **options)  # type: ignore[arg-type]
    heard = [] if seen is None else seen
    made = Meter(job, pids, lambda read, written: heard.append((read, written)))
    made.start()
    return made


def test_what_begins_in_the_ramp_does_not_count() -> None:
    one = meter(ramp_time=5.0)
    now = clock_ns()
    assert not one.counts(now)
    assert one.counts(now + 6 * SECOND)


def test_it_is_over_when_ramp_and_runtime_are() -> None:
    one = meter(ramp_time=5.0, runtime=10.0)
    now = clock_ns()
    assert not one.over(now + 14 * SECOND)
    assert one.over(now + 16 * SECOND)


def test_without_runtime_only_an_error_ends_it() -> None:
    one = meter()
    assert not one.over(clock_ns() + 10**6 * SECOND)
    one.error = "something"
    assert one.over(clock_ns())


def test_latencies_are_split_where_submission_returns() -> None:
    one = meter()
    assert one.counts(clock_ns())
    one.completed(True, (100, 130, 1130), 4096, False)
    one.completed(False, (0, 10, 20), 0, True)
    one.finish()
    totals = one.totals()
    assert (totals.read.slat.total, totals.read.clat.total, totals.read.lat.total) == (
        30,
        1000,
        1030,
    )
    assert (totals.read.bytes, totals.read.ios, totals.read.short_ios) == (4096, 1, 0)
    assert (totals.write.bytes, totals.write.ios, totals.write.short_ios) == (0, 1, 1)


def test_what_was_due_before_it_began_took_longer() -> None:
    one = meter(rate_iops=5)
    assert one.counts(clock_ns())
    one.completed(True, (100, 130, 1130), 4096, False, 7000)
    one.finish()
    read = one.totals().read
    assert read.wait is not None
    assert (read.wait.total, read.clat.total, read.lat.total) == (7000, 1000, 8030)


def test_progress_adds_up_and_is_not_said_every_time() -> None:
    seen: list[tuple[int, int]] = []
    one = meter(seen)
    now = clock_ns()
    for step in range(10):
        one.seen(step % 2 == 0, 100, now + step)
    assert len(seen) == 1
    one.seen(True, 0, now + SECOND)
    assert seen[-1] == (500, 500)


def test_a_job_that_counted_nothing_has_totals() -> None:
    one = meter()
    one.finish()
    assert one.totals().began == one.totals().ended


def test_the_processor_time_of_servers_is_theirs() -> None:
    one = meter(pids=(os.getpid(),))
    assert one.counts(clock_ns())
    one.finish()
    began, ended = one.totals().began.server_ns, one.totals().ended.server_ns
    assert began is not None
    assert ended is not None
    assert ended >= began > 0


def test_a_process_that_is_gone_has_no_processor_time() -> None:
    # Process ids are at most 2^22 on Linux.
    assert cpu_ns((1 << 22) + 1) is None


def test_what_spins_in_this_process_is_not_the_clients() -> None:
    used = iter([1 * SECOND, 3 * SECOND])
    one = Meter(Job(name="job", spin=1), (), lambda read, written: None, lambda: next(used))
    one.start()
    before = usage(())
    assert one.counts(clock_ns())
    one.finish()
    began, ended = one.totals().began, one.totals().ended
    assert (began.spin_ns, ended.spin_ns) == (1 * SECOND, 3 * SECOND)
    # Whatever this process has used meanwhile, it was not two seconds less than nothing.
    assert began.user_ns >= before.user_ns - 1 * SECOND
    assert ended.user_ns <= usage(()).user_ns - 3 * SECOND


def test_what_spins_beside_takes_nothing_from_the_clients_time() -> None:
    job = Job(name="job", spin=1, spin_outside=True)
    one = Meter(job, (), lambda read, written: None, lambda: 3 * SECOND)
    one.start()
    before = usage(())
    one.finish()
    ended = one.totals().ended
    assert ended.spin_ns == 3 * SECOND
    assert ended.user_ns >= before.user_ns
