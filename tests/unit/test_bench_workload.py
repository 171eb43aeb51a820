"""Which I/Os a job does, and how a wrong byte is found."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore_bench.job import Job
from kvstore_bench.workload import Contents, Keys, Workload

MIB = 1024 * 1024


def workload(clone: int = 0, **options: object) -> Workload:
    job = Job(name="job", bs=MIB, batch=2, size=20 * MIB, **options)  # type: ignore[arg-type]
    return Workload(job, clone)


def numbers(work: Workload) -> list[int]:
    found = []
    while (operation := work.next()) is not None:
        found.append(operation.number)
    return found


def test_a_read_goes_through_size_once() -> None:
    work = workload(rw="read")
    assert numbers(work) == list(range(10))
    assert work.preload_count == 10


def test_a_random_read_meets_everything_once_in_an_order_of_its_seed() -> None:
    first, again = numbers(workload(rw="randread")), numbers(workload(rw="randread"))
    assert sorted(first) == list(range(10))
    assert first == again != list(range(10))
    assert numbers(workload(rw="randread", randseed=2)) != first
    assert numbers(workload(clone=1, rw="randread")) != first


def test_time_based_goes_on_for_ever() -> None:
    work = workload(rw="randread", time_based=True)
    rounds = [[work.next().number for _ in range(10)] for _ in range(3)]  # type: ignore[union-attr]
    assert all(sorted(one) == list(range(10)) for one in rounds)
    assert rounds[0] != rounds[1]


@pytest.mark.parametrize("rw", ["write", "randwrite"])
def test_every_write_has_a_fresh_number(rw: str) -> None:
    work = workload(rw=rw, time_based=True)
    found = [work.next().number for _ in range(35)]  # type: ignore[union-attr]
    assert sorted(found[:30]) == list(range(30))
    assert len(set(found)) == 35
    assert (work.preload_count, work.written_count, work.numbers_end) == (0, 35, 40)
    assert max(found) < work.numbers_end


def test_what_to_read_back_is_the_newest_of_size() -> None:
    work = workload(rw="randwrite", time_based=True, verify=True)
    found = [work.next().number for _ in range(35)]  # type: ignore[union-attr]
    assert list(work.last_written) == found[-10:]


def test_a_mix_reads_the_working_set_and_writes_beside_it() -> None:
    work = workload(rw="randrw", rwmixread=75, time_based=True)
    found = [work.next() for _ in range(2000)]
    reads = [one.number for one in found if one is not None and one.is_read]
    writes = [one.number for one in found if one is not None and not one.is_read]
    assert set(reads) == set(range(10))
    assert min(writes) == 10
    assert len(set(writes)) == len(writes)
    assert len(reads) == pytest.approx(1500, abs=100)


def test_ios_of_the_ramp_do_not_count_towards_size() -> None:
    work = workload(rw="read")
    for _ in range(25):
        assert work.next(counts=False) is not None
    assert len(numbers(work)) == 10


def test_contents_know_their_own_blocks_and_no_others() -> None:
    contents = Contents(bs=16384, batch=3, seed=1)
    words = contents.words(memoryview(bytearray(3 * 16384)))
    contents.fill(words)
    contents.stamp(words, 7)
    assert contents.wrong_blocks(words, 7, [True] * 3) == []
    assert contents.wrong_blocks(words, 8, [True] * 3) == [0, 1, 2]


@pytest.mark.parametrize("word", [0, 5, 511, 512, 2047])
def test_one_wrong_bit_anywhere_is_found(word: int) -> None:
    contents = Contents(bs=16384, batch=3, seed=1)
    words = contents.words(memoryview(bytearray(3 * 16384)))
    contents.fill(words)
    contents.stamp(words, 7)
    words[1, 0, word] ^= np.uint64(1)
    assert contents.wrong_blocks(words, 7, [True] * 3) == [1]
    assert contents.wrong_blocks(words, 7, [True, False, True]) == []


def test_a_page_of_an_older_block_is_found() -> None:
    contents = Contents(bs=16384, batch=1, seed=1)
    words = contents.words(memoryview(bytearray(16384)))
    contents.fill(words)
    contents.stamp(words, 3)
    page = words[0, 0, 512:1024].copy()
    contents.stamp(words, 4)
    words[0, 0, 512:1024] = page
    assert contents.wrong_blocks(words, 4, [True]) == [0]


@pytest.mark.parametrize("percent", [0, 12.5, 50, 90, 98.7, 99.999, 100])
def test_the_hit_rate_is_that_of_all_reads_together(percent: float) -> None:
    job = Job(name="job", bs=8, batch=7, size=8 * 7 * 1000, hit_rate=percent)
    blocks = [one.blocks for one in iter(Workload(job, 0).next, None)]
    assert len(blocks) == 1000
    assert abs(sum(blocks) - 7000 * percent / 100) < 1
    # Each prefix has its share, rounded up or down.
    assert max(blocks) - min(blocks) <= 1


def test_a_hit_rate_leaves_writes_alone() -> None:
    work = workload(rw="rw", rwmixread=50, hit_rate=50.0, time_based=True)
    found = [work.next() for _ in range(100)]
    assert {one.blocks for one in found if one and not one.is_read} == {2}
    assert {one.blocks for one in found if one and one.is_read} == {1}


def test_scattered_blocks_are_known_by_all_their_layers() -> None:
    contents = Contents(bs=3 * 8192, batch=2, seed=1, layers=3)
    memory = memoryview(bytearray(2 * 3 * 8192))
    words = contents.words(memory)
    contents.fill(words)
    contents.stamp(words, 7)
    assert contents.wrong_blocks(words, 7, [True] * 2) == []
    # Layer by layer: the second layer of the first block lies behind both first layers.
    second = np.frombuffer(memory[2 * 8192 : 3 * 8192], dtype=np.uint64)
    assert np.array_equal(second, words[0, 1])
    third = memory[5 * 8192 :]
    third[100] ^= 1
    assert contents.wrong_blocks(words, 7, [True] * 2) == [1]
    third[100] ^= 1
    words[0, 0], words[0, 1] = words[0, 1].copy(), words[0, 0].copy()
    assert contents.wrong_blocks(words, 7, [True] * 2) == [0]


def test_keys_differ_between_runs_jobs_clones_and_blocks() -> None:
    job, other = Job(name="a", batch=4), Job(name="b", batch=4)
    chains = [Keys("run", job, 0), Keys("next", job, 0), Keys("run", job, 1), Keys("run", other, 0)]
    keys = [key for chain in chains for key in chain.of_io(0) + chain.of_io(1)]
    assert len(set(keys)) == len(keys) == 32
    assert {len(key) for key in keys} == {32}
    assert chains[0].of_io(2) == chains[0].of_blocks(8, 12)
    assert chains[0].of_io(2, 3) == chains[0].of_blocks(8, 11)
