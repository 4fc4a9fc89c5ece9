"""Fixtures of tests that start the command."""

import pytest


@pytest.fixture(params=["1", "2"])
def processes(request: pytest.FixtureRequest) -> str:
    """Run the test once with a single process, and once with two workers."""
    return f"--processes={request.param}"
