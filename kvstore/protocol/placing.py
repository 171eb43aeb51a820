"""The seam for payload that does not travel in the stream: into, and out of, an asker's memory.

The protocol pulls chunks of a fetch and gives them to a `FetchSink`, which brings them into the
asker's memory (a copy into shared memory, RDMA WRITE) and tells the news of it; blocks of a put
come by a `PutPuller`. Pure; shared memory and RDMA are behind it.

Rule: DONE and PUT_DONE follow when nothing is under way any more, also after a CANCEL, so that
whoever has read them knows that nobody touches the memory on behalf of the request.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

from kvstore.blocksource import Chunk
from kvstore.messages import Data, Done, ViewReply


class Placed(NamedTuple):
    """News of consecutive bytes of a fetch, for a DATA frame with the flag PLACED.

    Attributes:
        piece, piece_offset: Where the first byte belongs.
        length: How many bytes.
        data: Metadata of the frame.
        verified: Whether they were compared with their checksums where they lie.
    """

    piece: int
    piece_offset: int
    length: int
    data: Data
    verified: bool


def _no_news(news: Placed) -> None:
    raise AssertionError("nobody takes the news")


def _nobody(index: int = 0) -> None:
    pass


class FetchSink(abc.ABC):
    """Brings the payload of one fetch into its asker's memory.

    Attributes:
        transport: Name for counters: "shm", "rdma".
        chunk_bytes: What one `take` may bring at most.
        failure: Why nothing can be brought any more; None while something can.
        on_news: Set by the protocol: a DATA frame is to be sent.
        on_ready: Set by the protocol: it takes a chunk again, has failed, or has become idle.
    """

    transport: str
    chunk_bytes: int
    failure: Exception | None = None

    def __init__(self) -> None:
        self.on_news: Callable[[Placed], None] = _no_news
        self.on_ready: Callable[[], None] = _nobody

    @property
    @abc.abstractmethod
    def accepts(self) -> bool:
        """Whether `take` may be called now. If not, `on_ready` will be called."""

    @property
    @abc.abstractmethod
    def idle(self) -> bool:
        """Whether nothing is under way: the asker's memory is not touched."""

    @abc.abstractmethod
    def take(self, chunk: Chunk) -> None:
        """Bring a chunk; its `release` is called when its buffers are free."""

    def flush(self) -> None:  # noqa: B027 - most keep nothing back
        """Tell all news that were kept back: nothing more is given for now."""

    def amend(self, done: Done) -> Done | ViewReply:
        """The DONE of the fetch, with what only the sink knows; or what is said in its place."""
        return done

    def close(self) -> None:
        """The connection is gone: nobody hears news any more, and chunks are released as soon
        as nothing reads them."""
        self.on_news = _drop
        self.on_ready = _nobody


def _drop(news: Placed) -> None:
    pass


class PutPuller(abc.ABC):
    """Takes blocks of one put out of its asker's memory.

    Attributes:
        transport: As of `FetchSink`.
        failure: Why no more can be taken; None while they can.
        on_pulled: Set by the protocol: a block is in its target, (index).
        on_ready: Set by the protocol: it has failed, or has become idle after `stop`.
    """

    transport: str
    failure: Exception | None = None

    def __init__(self) -> None:
        self.on_pulled: Callable[[int], None] = _nobody
        self.on_ready: Callable[[], None] = _nobody

    @property
    @abc.abstractmethod
    def idle(self) -> bool:
        """Whether nothing is under way."""

    @abc.abstractmethod
    def pull(self, index: int, target: memoryview) -> None:
        """Bring a block into its target, later: nothing is called in here."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Bring no more blocks. `idle` follows, at once or with `on_ready`."""


__all__ = ["FetchSink", "Placed", "PutPuller"]
