"""Job files and options: fio's words, and errors that say where."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore_bench.job import Assignment, Job, JobError, build_job
from kvstore_bench.jobfile import assemble, groups
from kvstore_bench.models import MODELS
from kvstore_bench.options import OPTIONS, TRANSPORTS, parse_duration_s
from kvstore_client import transports
from tests.support.tree import ROOT

JOB_FILES = sorted(path.name for path in (ROOT / "bench" / "jobs").glob("*.ini"))

FILE = """
# a comment
[global]
bs=4k
; another
time_based
runtime = 2s

[first]
rw=randread
[second]
bs=1m
"""


def job(**options: str) -> Job:
    return build_job("job", [Assignment("here", name, value) for name, value in options.items()])


def test_sections_have_the_options_of_global_and_their_own() -> None:
    first, second = assemble([("a.ini", FILE)], [])
    assert (first.name, first.rw, first.bs, first.runtime) == ("first", "randread", 4096, 2.0)
    assert (second.name, second.rw, second.bs) == ("second", "read", 1024 * 1024)
    assert first.time_based
    assert ("time_based", "1") in first.given


def test_a_later_global_holds_for_later_sections_only() -> None:
    text = "[global]\nbs=4k\n[a]\n[global]\nbs=8k\n[b]\n"
    assert [one.bs for one in assemble([("f", text)], [])] == [4096, 8192]


def test_options_before_the_first_name_replace_those_of_files() -> None:
    first, second = assemble([("a.ini", FILE)], [("bs", "64k")])
    assert first.bs == second.bs == 64 * 1024


def test_options_after_a_name_belong_to_it() -> None:
    words = [("size", "1g"), ("name", "a"), ("bs", "4k"), ("name", "b"), ("rw", "write")]
    a, b = assemble([], words)
    assert (a.name, a.bs, a.rw, a.size) == ("a", 4096, "read", 1 << 30)
    assert (b.name, b.bs, b.rw, b.size) == ("b", 1 << 20, "write", 1 << 30)


def test_only_the_named_sections_run() -> None:
    assert [one.name for one in assemble([("a.ini", FILE)], [], ["second"])] == ["second"]
    with pytest.raises(JobError, match="section=third: there are first, second"):
        assemble([("a.ini", FILE)], [], ["third"])


def test_stonewall_begins_a_group() -> None:
    text = "[a]\n[b]\n[c]\nstonewall\n[d]\n"
    found = groups(assemble([("f", text)], []))
    assert [[one.name for one in group] for group in found] == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bs": "12q"}, r"here: bs=12q: "),
        ({"bs": "0"}, r"bs=0: must be a multiple of 8"),
        ({"bs": "4097"}, r"bs=4097: must be a multiple of 8"),
        ({"bs": "1g"}, r"bs=1g: .*up to 256MiB"),
        ({"rw": "trim"}, r"rw=trim: must be read or write or"),
        ({"ioengine": "libaio"}, r"ioengine=libaio: must be kv or raw or null"),
        ({"iodepth": "0"}, r"iodepth=0: must be a whole number from 1 to 1024"),
        ({"rwmixread": "101"}, r"rwmixread=101: must be a whole number from 0 to 100"),
        ({"verify": "yes"}, r"verify=yes: must be 0 or 1"),
        ({"runtime": "soon"}, r"runtime=soon: a time is"),
        ({"time_based": "1"}, r"time_based=1: needs runtime"),
        ({"size": "1m"}, r"size=1m: must hold one I/O: bs \* batch = 16MiB"),
        ({"layers": "3"}, r"layers=3: must divide bs"),
        ({"endpoint": "localhost"}, r"endpoint=localhost: must be one of tcp"),
        ({"path": "detour"}, r"path=detour: must be direct or relay or auto or agent or views"),
        ({"transport": "udp"}, r"transport=udp: must be auto or tcp or unix or shm or rdma"),
        ({"path": "relay", "transport": "shm"}, r"transport=shm: path=relay goes by tcp or rdma"),
        ({"path": "relay", "transport": "unix"}, r"transport=unix: path=relay goes by tcp or rdma"),
        ({"path": "agent", "transport": "tcp"}, r"transport=tcp: path=agent goes by unix or shm"),
        ({"path": "agent", "transport": "rdma"}, r"transport=rdma: path=agent goes by unix or shm"),
        ({"path": "relay", "rw": "randrw"}, r"rw=randrw: path=relay carries reads only"),
        ({"path": "relay", "rw": "write"}, r"rw=write: path=relay carries reads only"),
        ({"path": "views", "rw": "randrw"}, r"rw=randrw: path=views carries reads only"),
        ({"path": "views", "transport": "unix"}, r"transport=unix: path=views goes by shm: blocks"),
        ({"path": "views", "order": "layer"}, r"order=layer: path=views has all layers"),
        ({"path": "views", "held": "1"}, r"held=1: path=views has no agent"),
        ({"held": "1"}, r"held=1: path=direct has no agent"),
        ({"spin": "9"}, r"spin=9: must be a whole number from 0 to 8"),
        ({"spin_outside": "1"}, r"spin_outside=1: needs spin=N"),
        ({"verify_checksums": "no"}, r"verify_checksums=no: must be 0 or 1"),
        ({"ack": "synced"}, r"ack=synced: must be memory"),
        ({"order": "random"}, r"order=random: must be block or layer"),
        ({"deadline": "0"}, r"deadline=0: must be above 0"),
        ({"bs": ""}, r"bs=: needs a value: SIZE"),
        ({"ioengine": "raw", "rw": "randrw"}, r"rw=randrw: must be read or write"),
        ({"ioengine": "raw", "verify": "1"}, r"verify=1: ioengine=raw stores nothing"),
        ({"model": "gpt-2"}, r"model=gpt-2: must be deepseek-v3 or"),
        ({"page_tokens": "16"}, r"page_tokens=16: needs model=NAME"),
        ({"model": "llama-3.1-8b", "bs": "1m"}, r"bs=1m: follows from model=llama-3.1-8b before"),
        ({"model": "llama-3.1-8b", "layers": "2"}, r"layers=2: follows from model=llama-3.1-8b"),
        (
            {"model": "llama-3.1-405b", "page_tokens": "1024"},
            r"model=llama-3.1-405b: blocks of 1024 tokens \(page_tokens\) have 528482304 bytes:"
            r" must be a multiple of 8, up to 256MiB",
        ),
        ({"layout": "layer"}, r"layout=layer: a block of one layer is one piece; give layers=N"),
        (
            {"layout": "layer", "layers": "64", "bs": "4k", "path": "views"},
            r"layout=layer: path=vi",
        ),
        ({"layout": "layer", "layers": "4", "bs": "24"}, r"layout=layer: layers of 6 bytes are no"),
        ({"group_layers": "2", "layers": "4"}, r"group_layers=2: needs order=layer"),
        ({"group_layers": "2", "order": "layer"}, r"group_layers=2: a block has 1 layers"),
        ({"hit_rate": "101"}, r"hit_rate=101: must be a percentage from 0 to 100"),
        ({"hit_rate": "most"}, r"hit_rate=most: must be a percentage"),
        ({"rate": "0"}, r"rate=0: must be above 0"),
        ({"rate": "1m"}, r"rate=1m: an I/O of 16MiB would be due every 16 s; at most 5 s"),
        ({"rate": "1g", "rate_iops": "5"}, r"rate_iops=5: rate says the same in bytes"),
        ({"rate_process": "poisson"}, r"rate_process=poisson: needs rate=SIZE or rate_iops=N"),
        ({"rate_iops": "5", "ioengine": "raw"}, r"rate_iops=5: ioengine=raw is the limit"),
        ({"relay": "tcp://a:1"}, r"relay=tcp://a:1: path=direct goes by no agent"),
        ({"relay": "tcp://a:1", "path": "relay"}, r"relay=tcp://a:1: needs endpoint=URI"),
        (
            {"relay": "tcp://a:1", "path": "auto", "endpoint": "tcp://b:1", "held": "1"},
            r"held=1: the agents of relay=URI have the memory",
        ),
        ({"require_transport": "shm"}, r"require_transport=shm: needs endpoint=URI"),
        (
            {"require_transport": "shm", "transport": "tcp", "endpoint": "tcp://a:1"},
            r"require_transport=shm: transport=tcp requires it already",
        ),
        (
            {"require_transport": "shm", "path": "relay", "endpoint": "tcp://a:1"},
            r"require_transport=shm: path=relay goes by tcp or rdma",
        ),
        ({"require_transport": "auto"}, r"require_transport=auto: must be tcp or unix"),
        ({"direct": "1"}, r"direct=1: no such option; there are ioengine, rw"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, str], expected: str) -> None:
    with pytest.raises(JobError, match=expected):
        job(**options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a]\nbs=4k\nrw=sideways\n", r"jobs.ini:3 \[a\]: rw=sideways: must be"),
        ("[global]\nbss=4k\n[a]\n", r"jobs.ini:2 \[global\]: bss=4k: no such option"),
        ("bs=4k\n", r"jobs.ini:1: line=bs=4k: stands before the first \[section\]"),
        ("[a\n", r"jobs.ini:1: section=\[a: must be \[NAME\]"),
        ("[global]\nbs=4k\n", r"jobs.ini: sections=: a job file needs at least one"),
        ("[a]\n[a]\n", r"jobs.ini:2: name=a: there is a job of this name already"),
    ],
)
def test_errors_in_files_say_where(text: str, expected: str) -> None:
    with pytest.raises(JobError, match=expected):
        assemble([("jobs.ini", text)], [])


def test_errors_on_the_command_line_say_so() -> None:
    with pytest.raises(JobError, match=r"^--bs=x: "):
        assemble([], [("name", "a"), ("bs", "x")])
    with pytest.raises(ConfigError, match="give a job file, or --name"):
        assemble([], [])


def test_the_last_of_two_values_counts() -> None:
    assignments = [Assignment("here", "bs", "4k"), Assignment("here", "bs", "8k")]
    assert build_job("job", assignments).bs == 8192


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5.0), ("1.5s", 1.5), ("250ms", 0.25), ("2m", 120.0), ("1h", 3600.0), ("7us", 7e-6)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_duration_s(text, "runtime") == seconds


@pytest.mark.parametrize("text", ["", "-1", "1 s", "s", "1w", "1e3"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="runtime="):
        parse_duration_s(text, "runtime")


def test_endpoints_are_a_list() -> None:
    found = job(endpoint="tcp://10.0.0.7:1, unix:///run/k.sock").endpoint
    assert found == ("tcp://10.0.0.7:1", "unix:///run/k.sock")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_says_how_large_blocks_and_layers_are(name: str) -> None:
    model = MODELS[name]
    found = job(model=name, page_tokens="16")
    assert (found.bs, found.layers) == (16 * model.token_bytes, model.layers)
    assert found.bs == 16 * model.layers * model.layer_bytes


# Computed apart: layers * 2 * KV heads * head size * 2, or layers * (512 + 64) * bytes.
TOKEN_BYTES = {
    "deepseek-v3": 70_272,
    "deepseek-v3-fp8": 35_136,
    "deepseek-v3.2": 48_068,
    "kimi-k2": 70_272,
    "gpt-oss-120b": 73_728,
    "qwen3-30b-a3b": 98_304,
    "mistral-7b": 131_072,
    "llama-3.1-8b": 131_072,
    "qwen3-8b": 147_456,
    "qwen3-235b-a22b": 192_512,
    "qwen2.5-32b": 262_144,
    "qwen3-32b": 262_144,
    "qwen2.5-72b": 327_680,
    "llama-3.1-70b": 327_680,
    "llama-3.1-405b": 516_096,
}


def test_tokens_have_the_bytes_that_are_known_of_their_models() -> None:
    assert {name: model.token_bytes for name, model in MODELS.items()} == TOKEN_BYTES


def test_pages_have_64_tokens_unless_something_else_is_said() -> None:
    assert job(model="LLAMA-3.1-8B").bs == 64 * 131_072


def test_a_model_replaces_what_was_said_before_it() -> None:
    found = job(bs="4k", layers="2", model="qwen3-8b")
    assert (found.bs, found.layers) == (64 * 147_456, 36)
    assert found.given == (("model", "qwen3-8b"),)
    assert job(page_tokens="16", model="qwen3-8b").bs == 16 * 147_456


@pytest.mark.parametrize(
    ("options", "interval_s"),
    [
        ({}, 0),
        ({"rate_iops": "50"}, 0.02),
        ({"rate": "160m"}, 0.1),
        ({"rate": "160m", "batch": "8"}, 0.05),
    ],
)
def test_a_rate_says_how_often_ios_are_due(options: dict[str, str], interval_s: float) -> None:
    assert job(**options).io_interval_s == pytest.approx(interval_s)


def test_percentages_are_written_in_either_way() -> None:
    assert job(hit_rate="98.7").hit_rate == job(hit_rate="98.7%").hit_rate == 98.7


def test_a_fallback_can_be_refused_among_several() -> None:
    found = job(endpoint="tcp://a:1", require_transport="rdma, shm")
    assert (found.require_transport, found.client_transport) == (("rdma", "shm"), "auto")


def test_every_option_is_a_field_and_every_field_an_option() -> None:
    fields = set(Job.__struct_fields__) - {"name", "given"}
    assert set(OPTIONS) == fields


def test_transports_are_those_of_the_client() -> None:
    assert transports.TRANSPORTS == TRANSPORTS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "tcp"),
        ({"path": "relay"}, "tcp"),
        ({"path": "agent"}, "auto"),
        ({"path": "views"}, "shm"),
        ({"endpoint": "tcp://10.0.0.7:1"}, "auto"),
        ({"transport": "shm"}, "shm"),
        ({"transport": "tcp", "endpoint": "tcp://10.0.0.7:1"}, "tcp"),
    ],
)
def test_without_a_word_a_daemon_of_the_job_is_reached_by_tcp(
    options: dict[str, str], expected: str
) -> None:
    assert job(**options).client_transport == expected


@pytest.mark.parametrize("engine", ["raw", "null"])
def test_a_global_transport_does_not_concern_engines_without_one(engine: str) -> None:
    assert job(ioengine=engine, rw="write", path="relay", transport="shm").transport == "shm"


def test_shm_compares_equal_streams_of_every_kind() -> None:
    path = ROOT / "bench" / "jobs" / "shm.ini"
    jobs = assemble([(str(path), path.read_text())], [])
    assert [(one.name, one.transport) for one in jobs] == [
        ("raw", "auto"),
        ("kv-tcp", "tcp"),
        ("kv-unix", "unix"),
        ("kv-shm", "shm"),
    ]
    assert len({(one.bs, one.batch, one.iodepth, one.numjobs, one.size) for one in jobs}) == 1
    assert all(one.verify_checksums and one.rw == "read" for one in jobs)
    assert len(groups(jobs)) == 4


def test_busy_compares_each_way_with_itself_undisturbed() -> None:
    path = ROOT / "bench" / "jobs" / "busy.ini"
    jobs = assemble([(str(path), path.read_text())], [])
    assert len(groups(jobs)) == len(jobs) == 9
    assert len({(one.bs, one.batch, one.iodepth, one.size) for one in jobs}) == 1
    assert all(one.io_bytes >= 64 << 20 for one in jobs)
    for at in range(0, 9, 3):
        quiet, busy, beside = jobs[at : at + 3]
        assert [(one.spin, one.spin_outside) for one in (quiet, busy, beside)] == [
            (0, False),
            (1, False),
            (1, True),
        ]
        assert len({(one.path, one.transport, one.held) for one in (quiet, busy, beside)}) == 1
    assert {(one.path, one.transport, one.held) for one in jobs} == {
        ("agent", "shm", False),
        ("agent", "shm", True),
        ("direct", "tcp", False),
    }


def test_rdma_compares_equal_streams_that_fit_a_small_machine() -> None:
    path = ROOT / "bench" / "jobs" / "rdma.ini"
    jobs = assemble([(str(path), path.read_text())], [])
    assert [(one.transport, one.path, one.verify_checksums) for one in jobs] == [
        ("tcp", "direct", True),
        ("rdma", "direct", False),
        ("rdma", "direct", True),
        ("rdma", "relay", True),
    ]
    assert len({(one.bs, one.batch, one.iodepth, one.size) for one in jobs}) == 1
    assert all(one.size <= 64 << 20 for one in jobs)
    assert len(groups(jobs)) == 4


@pytest.mark.parametrize("name", JOB_FILES)
def test_our_own_job_files_are_right(name: str) -> None:
    path = ROOT / "bench" / "jobs" / name
    assert assemble([(name, path.read_text())], [])


def test_models_are_read_by_blocks_and_by_layers() -> None:
    path = ROOT / "bench" / "jobs" / "model.ini"
    jobs = assemble([(str(path), path.read_text())], [])
    assert [(one.model, one.layout, one.order) for one in jobs] == [
        ("deepseek-v3", "block", "block"),
        ("deepseek-v3", "layer", "layer"),
        ("llama-3.1-8b", "block", "block"),
        ("llama-3.1-8b", "layer", "layer"),
    ]
    assert {one.page_tokens * one.batch for one in jobs} == {256}
    assert len(groups(jobs)) == 4


def test_layers_compares_both_orders_on_both_paths() -> None:
    path = ROOT / "bench" / "jobs" / "layers.ini"
    jobs = assemble([(str(path), path.read_text())], [])
    assert [(one.path, one.order, -(-one.layers // one.group_layers)) for one in jobs] == [
        ("direct", "block", 61),
        ("direct", "layer", 8),
        ("relay", "block", 61),
        ("relay", "layer", 8),
    ]
    assert len({(one.bs, one.batch, one.iodepth, one.size) for one in jobs}) == 1
    assert len(groups(jobs)) == 4


def test_poisson_gives_an_open_loop_more_to_do_each_time() -> None:
    path = ROOT / "bench" / "jobs" / "poisson.ini"
    jobs = assemble([(str(path), path.read_text())], [])
    assert {one.rate_process for one in jobs} == {"poisson"}
    assert [one.rate for one in jobs] == sorted({one.rate for one in jobs})
    assert len({(one.bs, one.batch, one.iodepth, one.size) for one in jobs}) == 1
    assert len(groups(jobs)) == len(jobs)


def test_limits_compares_equal_streams() -> None:
    path = ROOT / "bench" / "jobs" / "limits.ini"
    jobs = assemble([(str(path), path.read_text())], [])
    assert [one.name for one in jobs] == ["raw", "kv-read", "kv-write"]
    assert len({(one.bs, one.batch, one.iodepth, one.numjobs, one.size) for one in jobs}) == 1
    assert jobs[0].size >= 2 << 30
    assert len(groups(jobs)) == 3
