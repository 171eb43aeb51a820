"""A terminal that is taken over and given back: redrawn in place, keys without Enter.

Control sequences: ECMA-48, and xterm's alternate screen, which leaves what was on the screen
before as it was.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import termios
import tty
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TextIO

_ENTER = "\x1b[?1049h\x1b[?25l"  # alternate screen, no cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME = "\x1b[H"
_CLEAR_LINE = "\x1b[K"
_CLEAR_BELOW = "\x1b[J"
_REVERSE, _NORMAL = "\x1b[7m", "\x1b[m"

# Keys that one read takes; an operator types fewer, and pasted text is not meant for us.
KEYS_MAX = 64


class Screen:
    """The terminal of a running command, as a context manager on the loop's thread.

    Args:
        output: The terminal.
        keyboard: Descriptor of the terminal's keys; None if there is none.
        on_key: Called with each key; with "" when the terminal has gone.
        on_resize: Called when the screen has to be drawn again.
    """

    def __init__(
        self,
        output: TextIO,
        keyboard: int | None,
        on_key: Callable[[str], None],
        on_resize: Callable[[], None],
    ) -> None:
        self._output = output
        self._keyboard = keyboard
        self._on_key = on_key
        self._on_resize = on_resize
        self._saved: list[Any] | None = None
        self._loop: asyncio.AbstractEventLoop

    def __enter__(self) -> Screen:
        self._loop = asyncio.get_running_loop()
        self._take()
        for number, handler in (
            (signal.SIGWINCH, self._on_resize),
            (signal.SIGTSTP, self._suspend),
            (signal.SIGCONT, self._resume),
        ):
            self._loop.add_signal_handler(number, handler)
        if self._keyboard is not None:
            self._loop.add_reader(self._keyboard, self._readable)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number in (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT):
            self._loop.remove_signal_handler(number)
        if self._keyboard is not None:
            self._loop.remove_reader(self._keyboard)
        self._give_back()

    def size(self) -> tuple[int, int]:
        """Columns and rows at this moment."""
        try:
            columns, rows = os.get_terminal_size(self._output.fileno())
        except OSError:
            columns, rows = 0, 0
        # A terminal that has never been told its size says 0.
        return (columns, rows) if columns and rows else shutil.get_terminal_size()

    def draw(self, lines: Sequence[str]) -> None:
        """Replace what is shown. The first line is the title.

        Args:
            lines: At most as many and as wide as `size` says.
        """
        shown = [f"{_REVERSE}{line}{_NORMAL}" if not n else line for n, line in enumerate(lines)]
        # In one write, and nothing is cleared that is written anew: it does not flicker.
        text = _HOME + "\n".join(line + _CLEAR_LINE for line in shown)
        self._output.write(text + _CLEAR_BELOW)
        self._output.flush()

    def _take(self) -> None:
        if self._keyboard is not None:
            if self._saved is None:
                self._saved = termios.tcgetattr(self._keyboard)
            tty.setcbreak(self._keyboard)
        self._output.write(_ENTER)
        self._output.flush()

    def _give_back(self) -> None:
        try:
            self._output.write(_LEAVE)
            self._output.flush()
        finally:
            if self._keyboard is not None and self._saved is not None:
                try:
                    termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._saved)
                except termios.error:
                    pass  # the terminal has gone

    def _suspend(self) -> None:
        self._give_back()
        signal.raise_signal(signal.SIGSTOP)

    def _resume(self) -> None:
        self._take()
        self._on_resize()

    def _readable(self) -> None:
        assert self._keyboard is not None
        try:
            keys = os.read(self._keyboard, KEYS_MAX)
        except OSError:
            keys = b""
        if not keys:
            self._loop.remove_reader(self._keyboard)
            self._on_key("")
        for key in keys.decode("ascii", "replace"):
            self._on_key(key)
