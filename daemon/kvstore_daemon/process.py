"""The process: its log, its signals, its limits, from the first line to the last.

::

    check ──▶ touch the arena ──▶ listen ──▶ serve ──▶ drain ──▶ end
                   │                          first signal │
                   └── a signal ends at once               └── a second one ends at once
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import sys

import uvloop

from kvstore.serving import REFUSALS_MAX, Server, ServerOptions
from kvstore.transport import listen
from kvstore.units import format_size_bytes
from kvstore.version import VERSION
from kvstore_daemon.config import Config
from kvstore_daemon.memory import TouchProgress, allocate_arena
from kvstore_daemon.source import ArenaSource

logger = logging.getLogger(__name__)

# Descriptors beside those of connections: listeners, the arena, epoll, standard streams.
DESCRIPTORS_BESIDE = 64

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(config: Config) -> None:
    """Serve until a signal comes.

    Raises:
        ConfigError: The arena does not fit, or an endpoint may not be listened on.
        TransportError: An address is taken or not ours.
        OSError: The system refuses something else.
    """
    set_up_log(config.log_level)
    # The interpreter would only look at a signal when all of the arena is touched.
    for number in _SIGNALS:
        signal.signal(number, _end_at_once)
    arena = allocate_arena(config.memory_bytes)
    source = ArenaSource(arena.view, capacities=config.pool_capacities)
    options = ServerOptions(
        node_id=config.node_id, drain_s=config.drain_s, insecure=config.insecure
    )
    server = Server(source, config.endpoints, options)
    raise_descriptor_limit(options.connections_max + REFUSALS_MAX + DESCRIPTORS_BESIDE)
    for endpoint in config.endpoints:
        # An address that is taken is told before the arena is touched, which may take minutes.
        listen(endpoint).close()
    logger.info("touching %s of memory", format_size_bytes(config.memory_bytes))
    arena.touch(TouchProgress(sys.stderr if sys.stderr.isatty() else None))
    # uvloop: a turn of its loop costs less. 64 blocks of 4 KiB take 3.1 us a block of the
    # server's time and 3.3 to 3.6 on asyncio's own loop; large blocks take the same.
    uvloop.run(_serve(server, config))


async def _serve(server: Server, config: Config) -> None:
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in _SIGNALS:
        loop.add_signal_handler(number, signals.put_nowait, number)
    await server.start()
    settle_garbage()
    size = format_size_bytes(config.memory_bytes)
    logger.info("version %s, node %s, arena of %s", VERSION, config.node_id, size)
    for endpoint in server.endpoints:
        logger.info("listening on %s", endpoint)
    name = signal.Signals(await signals.get()).name
    logger.info(
        "%s: %d requests are under way and have %g s; a second signal stops at once",
        name,
        sum(connection.protocol.request_count for connection in server.connections),
        config.drain_s,
    )
    stop = loop.create_task(server.stop())
    again = loop.create_task(signals.get())
    await asyncio.wait((stop, again), return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not stop.done():
        logger.info("second signal")
        stop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stop
        await server.stop(0)
    else:
        stop.result()
    logger.info("stopped")
    # What comes while memory is given back has nobody left to tell.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _end_at_once(number: int, frame: object) -> None:
    """End a process that serves nobody yet, in the midst of whatever it does."""
    os.write(2, f"kvstored: {signal.Signals(number).name} while starting\n".encode())
    os._exit(0)


class LogFormatter(logging.Formatter):
    """One line a message, for a terminal or the journal.

    Peers choose some of the words, such as their node id: what is not printable is escaped,
    so that nobody else writes lines into our log.

    Args:
        timed: Whether a time stands before each line; the journal has its own.
    """

    def __init__(self, timed: bool) -> None:
        super().__init__("%(asctime)s %(message)s" if timed else "%(message)s")
        self.default_msec_format = "%s.%03d"

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        record.message = f"kvstored: {level}{printable(record.message)}"
        return super().formatMessage(record)


def printable(text: str) -> str:
    """`text` on one line, with escapes for what a terminal would not print."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def set_up_log(level: str) -> None:
    """Send the log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(timed="JOURNAL_STREAM" not in os.environ))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def raise_descriptor_limit(count: int) -> None:
    """See to it that the process may have `count` descriptors, as far as it is allowed to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < count:
        logger.warning(
            "%d descriptors are allowed (ulimit -n), %d are needed for all connections",
            wanted,
            count,
        )


def settle_garbage() -> None:
    """Keep what a start has made out of every garbage collection that follows.

    The columns of the index are among it. With a million blocks of 4 KiB a full collection
    takes 40 ms where it walks through them, in which the loop serves nobody, and less than
    0.1 ms where it does not (namespaces' tables hold numbers only, and are never walked
    through). The thresholds stay as they are: 12 s at 0.5 to 1 GiB/s of small blocks
    saw ten collections of the youngest generation, 0.2 ms at most, and no other; and
    connections that are gone are cycles, which somebody has to find.
    """
    gc.collect()
    gc.freeze()
