"""What the README shows runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.processes import daemon
from tests.support.tree import ROOT


def example() -> str:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return str(program)


@pytest.mark.slow
def test_the_example_stores_what_it_missed_and_finds_it_again() -> None:
    with daemon("--listen", "tcp://127.0.0.1:0", "--memory", "256MiB") as running:
        program = example().replace("tcp://127.0.0.1:7450", running.uri)
        for expected in ("PutOutcome.STORED", "FetchOutcome.HIT"):
            result = subprocess.run(
                [sys.executable, "-c", program],
                cwd=ROOT,
                env={
                    "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}",
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert result.returncode == 0, result.stderr
            assert result.stdout.count(expected) == 32, result.stdout
