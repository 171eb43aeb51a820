"""The command line of `kvbench run`, as far as nothing has to be started."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.errors import KVStoreError
from kvstore_bench.__main__ import main
from kvstore_bench.command import flags_with_values
from kvstore_bench.options import OPTIONS


def test_a_flag_alone_does_not_take_the_next_word() -> None:
    words = ["run", "--time_based", "jobs.ini", "--stonewall", "--verify=0", "--bs=4k"]
    assert flags_with_values(words) == [
        "run",
        "--time_based=1",
        "jobs.ini",
        "--stonewall=1",
        "--verify=0",
        "--bs=4k",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name=a", "--bs=12q"], "kvbench run: error: --bs=12q: a size is"),
        (["--name=a", "--trials=0"], "--trials=0: must be a whole number from 1 to 1000"),
        (["--name=a", "--output-format=xml"], "--output-format=xml: must be normal or json"),
        (
            ["nowhere.ini"],
            "JOBFILE=nowhere.ini: no such file; ours are busy.ini, layers.ini, limits.ini,"
            " model.ini, poisson.ini, rdma.ini, shm.ini, small.ini",
        ),
        (["--name=a", "--output=/nowhere/a"], "--output=/nowhere/a: there is no folder /nowhere"),
        (["limits.ini", "--section=kv"], "section=kv: there are raw, kv-read, kv-write"),
        ([], "give a job file, or --name=NAME"),
    ],
)
def test_what_cannot_be_ends_with_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_errors_in_a_file_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.ini"
    path.write_text("[job]\nrw=sideways\n")
    assert main(["run", str(path)]) == 2
    assert f"{path}:2 [job]: rw=sideways: must be read" in capsys.readouterr().err


def test_a_file_that_is_no_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.ini"
    path.write_bytes(b"\xff\xfe[job]")
    assert main(["run", str(path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_help_names_every_option_and_gives_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["run", "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in OPTIONS)
    assert "examples:" in text
    assert "exit status:" in text


@pytest.mark.parametrize("words", [[], ["walk"]])
def test_unknown_words_end_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["run", "--iodept=4"],
            "kvbench run: error: --iodept=4: no such option; did you mean --io",
        ),
        (["run", "--bogus=1"], "--bogus=1: no such option; `kvbench run --help` lists all"),
        (["simulate", "a.json", "--polices", "lru"], "kvbench simulate: error: --polices: no such"),
    ],
)
def test_unknown_options_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "kvbench generate: interrupted\n"),
        (BrokenPipeError(), 141, ""),
        (OSError(28, "No space left"), 1, "kvbench generate: error: [Errno 28] No space left\n"),
        (KVStoreError("gone"), 1, "kvbench generate: error: gone\n"),
    ],
)
def test_what_ends_a_command_is_no_traceback(
    raised: BaseException,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr("kvstore_bench.generate.generate", fail)
    assert main(["generate", "--output", str(tmp_path / "a.json")]) == status
    assert capsys.readouterr().err == said
