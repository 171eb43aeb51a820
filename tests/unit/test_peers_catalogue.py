"""The peers there are: each can be made, says what it needs, and is in the document."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from peers import catalogue
from peers.base import Peer
from peers.catalogue import ENTRIES, LIMIT, READY, Entry
from peers.work import Work
from peers.worker import made
from tests.support.tree import ROOT

FOLDER = ROOT / "bench" / "peers"
README = (FOLDER / "README.md").read_text()
WORK = Work(block_bytes=64, batch=4, lanes=1, read_batches=1, write_batches=1)

named = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


def test_names_are_unique_and_the_limit_is_first() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert names[0] == LIMIT


@named
def test_each_can_be_made_without_its_library(entry: Entry) -> None:
    peer = made(entry.spot, WORK, entry.variant)
    assert isinstance(peer, Peer)
    assert not inspect.isabstract(type(peer))
    assert peer.variant == entry.variant


@named
def test_each_is_in_the_document(entry: Entry) -> None:
    assert f"`{entry.name}`" in README
    assert entry.how


def test_only_ours_verifies_what_it_received() -> None:
    assert {entry.name for entry in ENTRIES if entry.verified} == {"kv-tcp", "kv-unix", "kv-shm"}


@named
def test_what_is_missing_is_said_with_what_to_type(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "program_path", lambda name: "")
    missing = entry.missing(tmp_path)
    assert bool(missing) == bool(entry.program or entry.venv)
    assert not entry.program or f"apt-get install {entry.package}" in missing
    assert not entry.venv or f"prepare --venvs {tmp_path} {entry.venv}" in missing


@named
def test_nothing_is_missing_when_all_is_there(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "program_path", lambda name: f"/usr/bin/{name}")
    place = tmp_path / entry.venv
    place.mkdir(exist_ok=True)
    (place / READY).touch()
    assert entry.missing(tmp_path) == ""


@named
def test_every_environment_can_be_prepared(entry: Entry) -> None:
    assert not entry.venv or (FOLDER / "requirements" / f"{entry.venv}.txt").exists()


@pytest.mark.parametrize("name", ["clients", "mooncake", "lmcache"])
def test_versions_in_the_document_are_those_that_are_installed(name: str) -> None:
    text = (FOLDER / "requirements" / f"{name}.txt").read_text()
    versions = re.findall(r"^\S+==(\S+)$", text, re.MULTILINE)
    assert versions
    assert all(version in README for version in versions)
