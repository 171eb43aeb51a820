"""Settings for every test run: repeatable randomness, and asyncio's own checks."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Set here and not only in the Makefile, so that a single test run by hand checks the same;
# processes that tests start inherit it.
os.environ.setdefault("PYTHONASYNCIODEBUG", "1")

# The default run gives the same verdict on the same code each time; the search is for
# whoever wants to find more: pytest --hypothesis-profile=search tests/property
settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("search", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=1, help="seed of the tests that draw numbers")


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('seed')} (repeat a run with --seed)"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seed for everything random in a test; shown with a failure."""
    value = int(request.config.getoption("seed"))
    print(f"seed: {value}")
    return value
