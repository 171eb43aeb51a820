"""Results in fio's shapes, and the summary of several trials."""

from __future__ import annotations

import json

import msgspec
import pytest

from kvstore_bench.fiojson import FIO_BIN_MAX_NS, as_json
from kvstore_bench.histogram import Histogram
from kvstore_bench.job import Job
from kvstore_bench.measured import measured
from kvstore_bench.meter import DirectionTotals, Totals, Usage
from kvstore_bench.report import as_text, bandwidth_text, describe
from kvstore_bench.runner import JobResult
from kvstore_bench.trials import summarize, summary_text, unstable

MIB = 1024 * 1024
GIB = 1024 * MIB
MS = 1_000_000


def direction(ios: int, io_bytes: int = 16 * MIB, short: int = 0) -> DirectionTotals:
    latency = Histogram()
    for number in range(ios):
        latency.record((5 + number % 3) * MS)
    found = latency.snapshot()
    slat = Histogram()
    if ios:
        slat.record(20_000)
    return DirectionTotals(ios * io_bytes, ios, short, slat.snapshot(), found, found)


def usage(at_ms: int, user_ms: int = 0, server_ms: int | None = 0) -> Usage:
    server_ns = None if server_ms is None else server_ms * MS
    return Usage(at_ms * MS, user_ms * MS, user_ms * MS, server_ns, 3, 0, 1)


def clone(
    reads: int = 0, writes: int = 0, ended_ms: int = 1000, server_ms: int | None = 200
) -> Totals:
    outcomes = {"hit": reads * 16} if reads else {"stored": writes * 16}
    return Totals(
        read=direction(reads),
        write=direction(writes),
        outcomes=outcomes,
        began=usage(0, 0, None if server_ms is None else 0),
        ended=usage(ended_ms, 50, server_ms),
        error="",
        wrong_blocks=0,
        checked_blocks=0,
    )


def result(
    name: str = "kv-read",
    engine: str = "kv",
    trial: int = 1,
    clones: list[Totals] | None = None,
    error: str = "",
    server_known: bool = True,
) -> JobResult:
    found = [clone(reads=64)] if clones is None else clones
    return JobResult(
        job=Job(name=name, ioengine=engine, numjobs=max(1, len(found)), given=(("bs", "1m"),)),
        trial=trial,
        group=0,
        began_at=1_800_000_000.0,
        elapsed_s=2.0,
        clones=found,
        error=error,
        server_known=server_known,
    )


def test_json_has_fios_names_and_units() -> None:
    document = as_json([result()], 1_800_000_000.5, {"cpus": 2}, bins=False)
    assert document["fio version"].startswith("kvbench-")
    assert document["timestamp_ms"] == 1_800_000_000_500
    (job,) = document["jobs"]
    assert (job["jobname"], job["groupid"], job["error"]) == ("kv-read", 0, 0)
    assert job["job options"] == {"name": "kv-read", "batch": "16", "bs": "1m"}
    read = job["read"]
    assert (read["io_bytes"], read["total_ios"], read["runtime"]) == (GIB, 64, 1000)
    assert (read["bw_bytes"], read["bw"], read["iops"]) == (GIB, MIB, 64)
    assert read["blocks_iops"] == 1024
    assert (read["clat_ns"]["min"], read["clat_ns"]["N"]) == (5 * MS, 64)
    assert read["clat_ns"]["percentile"]["50.000000"] == pytest.approx(6 * MS, rel=1 / 128)
    assert job["write"]["total_ios"] == 0
    assert job["write"]["lat_ns"] == {"min": 0, "max": 0, "mean": 0, "stddev": 0, "N": 0}
    assert (job["usr_cpu"], job["server_cpu"]) == (5.0, 20.0)
    assert job["cpu"]["s_per_gib"] == pytest.approx(0.1 + 0.2)
    assert job["cpu"]["server_us_per_block"] == pytest.approx(200_000 / 1024)
    assert json.loads(json.dumps(document)) == document


def test_json_plus_has_bins() -> None:
    document = as_json([result()], 0.0, {}, bins=True)
    assert sum(document["jobs"][0]["read"]["clat_ns"]["bins"].values()) == 64


def test_bins_are_where_fio_looks_for_them() -> None:
    slow = Histogram()
    for value in (1, 100, 129, 12_345, 10**9, 30 * 10**9, 40 * 10**9):
        slow.record(value)
    reads = DirectionTotals(1, 7, 0, Histogram().snapshot(), slow.snapshot(), slow.snapshot())
    totals = msgspec.structs.replace(clone(), read=reads)
    job = as_json([result(clones=[totals])], 0.0, {}, bins=True)["jobs"][0]
    # fio's plat_idx_to_val: the middle of a 64th of a power of two, and the last one for the rest.
    assert job["read"]["lat_ns"]["bins"] == {
        "1": 1,
        "100": 1,
        "129": 1,
        "12352": 1,
        "1002438656": 1,
        str(FIO_BIN_MAX_NS): 2,
    }
    assert job["latency_ns"]["2"] == pytest.approx(100 / 7)
    assert job["latency_ns"]["250"] == pytest.approx(200 / 7)
    assert job["latency_us"]["20"] == pytest.approx(100 / 7)
    assert job["latency_ms"]["2000"] == pytest.approx(100 / 7)  # the middle of its bucket
    assert job["latency_ms"][">=2000"] == pytest.approx(200 / 7)
    kinds = ("latency_ns", "latency_us", "latency_ms")
    assert sum(sum(job[kind].values()) for kind in kinds) == pytest.approx(100)


def test_a_direction_that_was_not_used_has_zeros() -> None:
    for one in (result(), result(clones=[], error="no daemon")):
        job = as_json([one], 0.0, {}, bins=True)["jobs"][0]
        assert job["trim"]["total_ios"] == job["trim"]["bw_bytes"] == 0
        assert job["trim"]["clat_ns"] == {"min": 0, "max": 0, "mean": 0, "stddev": 0, "N": 0}


def paced(**options: object) -> JobResult:
    wait = Histogram()
    for _ in range(64):
        wait.record(3 * MS)
    reads = msgspec.structs.replace(direction(64), wait=wait.snapshot())
    totals = msgspec.structs.replace(clone(), read=reads, behind_ns=1500 * MS)
    job = Job(name="a", **options)  # type: ignore[arg-type]
    return msgspec.structs.replace(result(clones=[totals]), job=job)


def test_a_rate_is_reported_with_its_waits() -> None:
    one = paced(rate_iops=100, rate_process="poisson")
    job = as_json([one], 0.0, {}, bins=False)["jobs"][0]
    assert job["rate"] == {"iops_asked": 100, "process": "poisson", "behind_s": 1.5}
    assert job["read"]["wait_ns"]["mean"] == 3 * MS
    text = as_text([one], 1)
    assert "    wait (usec): min=3000" in text
    assert "lat percentiles" in text
    assert "rate         : asked 100.0 IOPS, did 64.0; fell behind: 1.50 s at the end" in text
    assert "rate_iops=100 poisson" in describe(one.job, 0)


def test_without_a_rate_there_are_no_waits() -> None:
    job = as_json([result()], 0.0, {}, bins=False)["jobs"][0]
    assert "rate" not in job
    assert "wait_ns" not in job["read"]


def test_a_job_with_a_rate_is_not_compared_with_the_limit() -> None:
    raw = result("raw", "raw")
    assert summarize([raw, result()])[1]["reference"] == "raw"
    assert summarize([raw, paced(rate_iops=100)])[1]["reference"] == ""


def test_the_first_group_of_layers_is_reported_where_there_is_one() -> None:
    first = Histogram()
    first.record(2 * MS)
    reads = msgspec.structs.replace(direction(1), first=first.snapshot())
    one = result(clones=[msgspec.structs.replace(clone(), read=reads)])
    assert as_json([one], 0.0, {}, False)["jobs"][0]["read"]["first_ns"]["mean"] == 2 * MS
    assert "    first (usec): min=2000" in as_text([one], 1)
    assert "first_ns" not in as_json([result()], 0.0, {}, False)["jobs"][0]["read"]
    assert "first" not in as_text([result()], 1)


def test_a_hit_rate_is_reported_beside_what_was_asked_for() -> None:
    totals = msgspec.structs.replace(clone(reads=1), outcomes={"hit": 12, "miss": 4, "stored": 9})
    job = Job(name="a", rw="randrw", hit_rate=80.0)
    one = msgspec.structs.replace(result(clones=[totals]), job=job)
    assert as_json([one], 0.0, {}, False)["jobs"][0]["hit_rate"] == {"asked": 80, "percent": 75}
    assert "  hit rate     : 75.00% of 80%" in as_text([one], 1)
    assert "hit_rate=80" in describe(job, 0)


def test_a_model_is_named_with_the_blocks_that_follow_from_it() -> None:
    job = Job(name="a", model="qwen3-8b", bs=9 * MIB, layers=36, given=(("model", "qwen3-8b"),))
    one = msgspec.structs.replace(result(), job=job)
    options = as_json([one], 0.0, {}, False)["jobs"][0]["job options"]
    assert (options["model"], options["bs"], options["layers"]) == ("qwen3-8b", "9437184", "36")
    assert "bs=9MiB (qwen3-8b, 64 tokens)" in describe(job, 0)


def test_a_job_that_could_not_begin_says_why() -> None:
    failed = result(clones=[], error="no daemon")
    document = as_json([failed], 0.0, {}, bins=False)
    assert (document["jobs"][0]["error"], document["jobs"][0]["error_text"]) == (1, "no daemon")
    text = as_text([failed], 1)
    assert "err= 1" in text
    assert "error: no daemon" in text


def test_clones_are_one_row() -> None:
    # Both watch the same daemon, whose time must not count twice.
    found = measured(result(clones=[clone(reads=64), clone(reads=64, ended_ms=2000)]))
    assert found is not None
    assert (found.runtime_s, found.read.bytes) == (2.0, 2 * GIB)
    assert found.client_s == pytest.approx(0.2)
    assert found.server_s == pytest.approx(0.2)


def test_clones_of_raw_have_a_server_each() -> None:
    found = measured(result(engine="raw", clones=[clone(reads=64), clone(reads=64)]))
    assert found is not None
    assert found.server_s == pytest.approx(0.4)


def test_a_servers_time_that_is_not_known_is_not_made_up() -> None:
    unknown = result(clones=[clone(reads=64, server_ms=None)], server_known=False)
    job = as_json([unknown], 0.0, {}, bins=False)["jobs"][0]
    assert job["server_cpu"] is None
    assert job["cpu"]["s_per_gib"] is None
    assert "not known" in as_text([unknown], 1)


def test_text_has_fios_shape() -> None:
    text = as_text([result()], 1)
    assert "kv-read: (groupid=0, jobs=1): err= 0:" in text
    assert "  read: IOPS=64, BW=1024MiB/s (1074MB/s)(1GiB/1000msec) (16 blocks an I/O)" in text
    assert "    slat (nsec): min=20000, max=20000" in text
    assert " 50.00th=[" in text
    assert "cpu-s/GiB    : 0.300 = client 0.100 + server 0.200; server 195.31 us a block" in text
    assert "blocks       : hit=1024" in text
    assert "Run status group 0 (all jobs):\n   READ: bw=1024MiB/s (1074MB/s), io=1GiB" in text
    assert "write:" not in text


def travelled(
    found: Totals, direction: str, transports: dict[str, int], paths: dict[str, int]
) -> Totals:
    one = getattr(found, direction)
    one = msgspec.structs.replace(one, transports=transports, paths=paths)
    return msgspec.structs.replace(found, **{direction: one})


def test_what_moved_the_bytes_is_named() -> None:
    clones = [travelled(clone(reads=64), "read", {"shm": GIB}, {"direct": GIB})] * 2
    found = result(clones=clones)
    text = as_text([found], 1)
    assert "\n  transport    : shm=2GiB\n" in text
    assert "\n  path " not in text
    job = as_json([found], 0.0, {}, bins=False)["jobs"][0]
    assert job["read"]["transports"] == {"shm": 2 * GIB}
    assert job["read"]["paths"] == {"direct": 2 * GIB}
    assert job["write"]["transports"] == {}


def test_what_moved_reads_and_writes_is_told_apart() -> None:
    both = msgspec.structs.replace(clone(reads=64), write=direction(8))
    both = travelled(both, "read", {"tcp": GIB, "unix": MIB}, {"relay": GIB, "direct": MIB})
    both = travelled(both, "write", {"tcp": MIB}, {"direct": MIB})
    text = as_text([result(clones=[both])], 1)
    assert "\n  transport    : read tcp=1GiB, unix=1MiB; write tcp=1MiB\n" in text
    assert "\n  path         : read direct=1MiB, relay=1GiB; write direct=1MiB\n" in text


def test_the_summary_names_what_moved_the_bytes() -> None:
    shared = travelled(clone(reads=64), "read", {"shm": GIB}, {"direct": GIB})
    mixed = travelled(shared, "write", {"unix": 1}, {"direct": 1})
    (entry,) = summarize([result(trial=1, clones=[shared]), result(trial=2, clones=[mixed])])
    assert entry["transports"] == ["shm", "unix"]
    assert "kv-read  shm+unix  " in summary_text([entry])


def test_ios_that_lack_blocks_are_shown() -> None:
    short = msgspec.structs.replace(clone(reads=64), read=direction(64, short=3))
    assert "short: 3 of 64 I/Os lack blocks" in as_text([result(clones=[short])], 1)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (2499 * 10**6, "2383MiB/s (2499MB/s)"),
        (20 * 1024.0, "20.0KiB/s (20.5kB/s)"),
        (10 * 1024.0**2, "10.0MiB/s (10.5MB/s)"),
        (12.0, "12B/s (12B/s)"),
        (0.0, "0B/s (0B/s)"),
    ],
)
def test_bandwidth_has_both_prefixes(rate: float, text: str) -> None:
    assert bandwidth_text(rate) == text


def test_a_job_is_described_before_it_runs() -> None:
    line = describe(Job(name="a", bs=4096, numjobs=2), 3)
    assert line == "a: (g=3): rw=read, bs=4KiB, batch=16, ioengine=kv, iodepth=2, numjobs=2"


def test_the_way_of_a_job_is_described_where_it_is_not_the_usual_one() -> None:
    job = Job(name="a", path="agent", transport="shm", verify_checksums=False)
    assert "iodepth=2, path=agent, transport=shm, verify_checksums=0" in describe(job, 0)
    held = msgspec.structs.replace(job, held=True)
    assert "transport=shm, held, verify_checksums=0" in describe(held, 0)
    raw = Job(name="a", ioengine="raw", transport="shm")
    assert "transport" not in describe(raw, 0)


@pytest.mark.parametrize(
    ("outside", "named"), [(False, "threads=1, "), (True, "threads=1 (outside), ")]
)
def test_what_spins_beside_a_job_is_named(outside: bool, named: str) -> None:
    found = clone(reads=64)
    ended = msgspec.structs.replace(found.ended, spin_ns=600 * MS)
    one = result(clones=[msgspec.structs.replace(found, ended=ended)])
    job = msgspec.structs.replace(one.job, spin=1, spin_outside=outside)
    one = msgspec.structs.replace(one, job=job)
    assert f"\n  spin         : {named}cpu=60.00%\n" in as_text([one], 1)
    entry = as_json([one], 0.0, {}, bins=False)["jobs"][0]
    assert entry["spin"] == {"threads": 1, "outside": outside, "cpu_s": 0.6}
    assert describe(job, 0).endswith(", spin=1 (outside)" if outside else ", spin=1")


@pytest.mark.parametrize("verify", [False, True])
def test_what_views_take_is_told_beside_their_verification(verify: bool) -> None:
    one = result(clones=[msgspec.structs.replace(clone(reads=4), verify_us=4 * 400)])
    job = msgspec.structs.replace(one.job, path="views", verify=verify)
    one = msgspec.structs.replace(one, job=job)
    # Four I/Os of 5, 6, 7 and 5 ms.
    said = "\n  views        : 5350.0 us an I/O beside 400.0 us of verification"
    text = as_text([one], 1)
    assert said + (", copied out for verify=1\n" if verify else "\n") in text
    entry = as_json([one], 0.0, {}, bins=False)["jobs"][0]
    assert entry["views"] == {"verify_us_mean": 400.0, "other_us_mean": 5350.0}
    assert "views" not in as_json([result()], 0.0, {}, bins=False)["jobs"][0]


def test_nothing_is_said_of_what_does_not_spin() -> None:
    assert "spin" not in as_text([result()], 1)
    assert "spin" not in describe(Job(name="a"), 0)


def test_time_that_came_out_below_nothing_is_none() -> None:
    found = clone(reads=64)
    began = msgspec.structs.replace(found.began, user_ns=60 * MS)
    one = measured(result(clones=[msgspec.structs.replace(found, began=began)]))
    assert one is not None
    assert one.user_s == 0


def trials(raw: list[int], read: list[int]) -> list[JobResult]:
    found = []
    for trial, (limit, ours) in enumerate(zip(raw, read, strict=True), 1):
        found.append(result("raw", "raw", trial, [clone(reads=limit)]))
        found.append(result("kv-read", "kv", trial, [clone(reads=ours)]))
    return found


def test_ratios_are_taken_within_a_trial() -> None:
    # The machine was half as fast in the second trial; the ratio of medians would be 0.9.
    raw, ours = summarize(trials([100, 50, 100], [80, 45, 90]))
    assert raw["ratio"] == 1.0
    assert (ours["trials"], ours["reference"]) == (3, "raw")
    assert (ours["ratio"], ours["ratio_min"], ours["ratio_max"]) == (0.9, 0.8, 0.9)
    assert ours["bw_bytes"] == 80 * 16 * MIB


def test_failed_trials_are_left_out() -> None:
    results = trials([100, 100], [80, 90])
    results[1] = result("kv-read", "kv", 1, [clone(reads=1)], error="timeout")
    _, ours = summarize(results)
    assert (ours["trials"], ours["ratio"]) == (1, 0.9)
    results[3] = result("kv-read", "kv", 2, [], error="timeout")
    _, ours = summarize(results)
    assert (ours["trials"], ours["ratio"], ours["bw_bytes"]) == (0, None, None)


def test_without_a_limit_there_are_no_ratios() -> None:
    (only,) = summarize([result(trial=1), result(trial=2)])
    assert (only["reference"], only["ratio"]) == ("", None)
    assert "kv-read" in summary_text([only])


def test_the_summary_is_a_table() -> None:
    text = summary_text(summarize(trials([100, 50, 100], [80, 45, 90])))
    assert "of raw" in text
    assert "0.90    [0.80-0.90]  0.240" in text


def test_a_limit_that_differs_between_trials_is_warned_about() -> None:
    steady = summarize(trials([100, 95, 105], [80, 20, 90]))
    assert unstable(steady) == []
    shaky = summarize(trials([100, 80, 105], [80, 80, 90]))
    said = "unstable: raw differs by 25 % between trials; close other programs"
    assert unstable(shaky) == [said]
    assert said in summary_text(shaky)
    assert "unstable" not in summary_text(steady)


def test_jobs_of_other_sizes_than_the_limit_have_no_ratio() -> None:
    small = result("small", "kv", 1, [clone(reads=64)])
    small = msgspec.structs.replace(small, job=msgspec.structs.replace(small.job, bs=4096))
    *_, ours, entry = summarize([*trials([100], [80]), small])
    assert (ours["reference"], ours["ratio"]) == ("raw", 0.8)
    assert (entry["reference"], entry["ratio"]) == ("", None)


def test_a_job_beside_threads_that_spin_is_compared_with_itself_without_them() -> None:
    def as_job(of: JobResult, **options: object) -> JobResult:
        job = msgspec.structs.replace(of.job, **options)
        return msgspec.structs.replace(of, job=job)

    found = []
    for trial, (quiet, busy) in enumerate([(100, 80), (50, 45), (100, 90)], 1):
        found.append(as_job(result("quiet", "kv", trial, [clone(reads=quiet)]), path="agent"))
        ours = result("busy", "kv", trial, [clone(reads=busy)])
        found.append(as_job(ours, path="agent", spin=1, spin_outside=True, stonewall=True))
        found.append(as_job(result("other", "kv", trial, [clone(reads=9)]), spin=1))
    quiet_entry, busy_entry, other_entry = summarize(found)
    assert (busy_entry["reference"], busy_entry["ratio"]) == ("quiet", 0.9)
    assert (quiet_entry["reference"], quiet_entry["ratio"]) == ("", None)
    # It goes another way than any job that is not disturbed.
    assert (other_entry["reference"], other_entry["ratio"]) == ("", None)
    assert unstable([quiet_entry, busy_entry, other_entry]) == []
    assert "of quiet" in summary_text([quiet_entry, busy_entry, other_entry])
