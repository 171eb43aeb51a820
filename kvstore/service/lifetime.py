"""The life of a process that serves: its signals, from the first line of its log to the last.

::

    check ──▶ touch memory ──▶ listen ──▶ serve ──▶ drain ──▶ end
                   │                         first signal │
                   └── a signal ends at once              └── a second one ends at once
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvstore.endpoint import Endpoint
from kvstore.service.garbage import settle_garbage
from kvstore.transport import listen
from kvstore.version import VERSION

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Service(Protocol):
    """What a process serves."""

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """Where it listens, once it has started."""

    @property
    def busy_count(self) -> int:
        """Requests that are under way."""

    async def start(self) -> None:
        """Bind, and begin to serve. When it fails, nothing stays bound."""

    async def stop(self, drain_s: float) -> None:
        """Take no more requests and wait so long for those under way.

        Cancelled, it may leave anything undone: `stop(0)` follows.
        """


def end_at_once_on_signals(program: str) -> None:
    """From now on a signal ends the process in the midst of whatever it does; it serves nobody.

    The interpreter would only look at a signal when all memory is touched.
    """

    def end(number: int, frame: object) -> None:
        os.write(2, f"{program}: {signal.Signals(number).name} while starting\n".encode())
        os._exit(0)

    for number in SIGNALS:
        signal.signal(number, end)


def try_addresses(endpoints: Iterable[Endpoint]) -> None:
    """Bind each address and let go of it.

    One that is taken is told before memory is touched, which may take minutes.

    Raises:
        TransportError: An address is taken or not ours.
    """
    for endpoint in endpoints:
        listen(endpoint).close()


async def serve(service: Service, what: str, drain_s: float) -> None:
    """Serve until a signal comes, then let requests under way finish; a second one ends them.

    Args:
        what: What it is, for the log, as in "node kv-1, arena of 1GiB".
        drain_s: How long requests under way have.

    Raises:
        KVStoreError: It cannot start.
    """
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in SIGNALS:
        loop.add_signal_handler(number, signals.put_nowait, number)
    await service.start()
    settle_garbage()
    logger.info("version %s, %s", VERSION, what)
    for endpoint in service.endpoints:
        logger.info("listening on %s", endpoint)
    name = signal.Signals(await signals.get()).name
    logger.info(
        "%s: %d requests are under way and have %g s; a second signal stops at once",
        name,
        service.busy_count,
        drain_s,
    )
    stop = loop.create_task(service.stop(drain_s))
    again = loop.create_task(signals.get())
    await asyncio.wait((stop, again), return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not stop.done():
        logger.info("second signal")
        stop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stop
        await service.stop(0)
    else:
        stop.result()
    logger.info("stopped")
    # What comes while memory is given back has nobody left to tell.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
