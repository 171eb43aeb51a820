"""Which peers there are, and what each needs. Pure but for looking for programs and folders."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from peers.servers import program_path

#: What the ratios are taken to.
LIMIT = "raw"
READY = "ready"


@dataclass(frozen=True)
class Entry:
    """One row of the results.

    Attributes:
        spot: Module and class, `module:Class`.
        venv: The environment that `prepare` makes for it; empty for the one that we run in.
        program: Of the distribution, which must be there; its package has a name of its own.
        how: By what it was driven, for people.
        verified: Whether the reader verifies what it received, in the time.
    """

    name: str
    spot: str
    variant: str = ""
    venv: str = ""
    program: str = ""
    package: str = ""
    how: str = ""
    verified: bool = False

    def python(self, venvs: Path) -> Path:
        """The interpreter of its process."""
        return Path(venvs, self.venv, "bin", "python") if self.venv else Path(sys.executable)

    def missing(self, venvs: Path) -> str:
        """What to do before it can be measured; empty if it can be."""
        lacks = []
        if self.program and not program_path(self.program):
            lacks.append(f"the program {self.program} (Debian: apt-get install {self.package})")
        # What `prepare` leaves when an environment has all that it should have.
        if self.venv and not Path(venvs, self.venv, READY).exists():
            lacks.append(f"its environment (bench/peers/prepare --venvs {venvs} {self.venv})")
        return " and ".join(lacks)


def _redis(name: str, spot: str, variant: str, venv: str, how: str) -> Entry:
    return Entry(name, f"redis:{spot}", variant, venv, "redis-server", "redis-server", how)


def _memcached(name: str, spot: str, variant: str, venv: str, how: str) -> Entry:
    return Entry(name, f"memcached:{spot}", variant, venv, "memcached", "memcached", how)


ENTRIES = (
    Entry(LIMIT, "raw:RawPeer", how="bare socket pair, TCP; no requests"),
    Entry("kv-tcp", "kv:KvPeer", "tcp", how="kvstored, our client", verified=True),
    Entry("kv-unix", "kv:KvPeer", "unix", how="kvstored, our client", verified=True),
    Entry("kv-shm", "kv:KvPeer", "shm", how="kvstored, our client", verified=True),
    _redis("redis", "RedisLibrary", "library", "clients", "redis-py: MGET of 8, SETs"),
    _redis("redis-bare", "RedisBare", "bare", "", "bare client: MGET of 8, SETs"),
    _redis("redis-bare-unix", "RedisBare", "bare-unix", "", "the same, unix socket"),
    _memcached("memcached", "MemcachedLibrary", "library", "clients", "pymemcache: get_many"),
    _memcached("memcached-bare", "MemcachedBare", "bare", "", "bare client: get of 16"),
    Entry("mooncake", "mooncake:MooncakePeer", venv="mooncake", how="batch_get_into, TCP"),
    Entry("lmcache", "lmcache:LMCachePeer", venv="lmcache", how="its server and connector"),
)

BY_NAME = {entry.name: entry for entry in ENTRIES}
