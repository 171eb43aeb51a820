"""Processes that must be gone, though it is another that waits for them."""

from __future__ import annotations

import os
import time
from pathlib import Path

# For processes that a broken test would wait for; nothing depends on how long one takes.
TIMEOUT_S = 120


def has_ended(pid: int) -> bool:
    """Wait for the end of a process (we adopt orphans, but only when their parent is gone)."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            pass  # it has, or had, another parent that is to see its end
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.01)
    return False
