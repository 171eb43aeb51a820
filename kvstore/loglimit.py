"""What others can put into our log as often as they like, kept to a few lines."""

from __future__ import annotations

import logging

from kvstore.allowance import Allowance

# Lines of each kind: a burst tells what goes on, and a line a second at 200 bytes is 17 MB a
# day.
LOG_LINES_BURST = 20
LOG_LINES_PER_S = 1.0


class _Lines:
    """What of one kind of line may go into the log, and how many have not since the last."""

    __slots__ = ("allowance", "left_out")

    def __init__(self) -> None:
        self.allowance = Allowance(LOG_LINES_PER_S, LOG_LINES_BURST)
        self.left_out = 0


class LogLimit:
    """Logs a few lines of each kind, that is, of each `text`; of the rest only their number.

    Args:
        logger: Where the lines go.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lines: dict[str, _Lines] = {}

    def log(self, now: float, level: int, text: str, *args: object) -> None:
        """Log a line if there is room for one of its kind.

        Args:
            now: Seconds of a monotonic clock.
            text: A constant of the code, with places for `args`.
        """
        lines = self._lines.get(text)
        if lines is None:
            lines = self._lines[text] = _Lines()
        if not lines.allowance.take(now, 1):
            lines.left_out += 1
            return
        if lines.left_out:
            self._logger.log(level, "%d lines like the next one were left out", lines.left_out)
            lines.left_out = 0
        self._logger.log(level, text, *args)
