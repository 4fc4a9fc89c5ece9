"""A short soak: calls of all kinds, aborts and faults, and nothing of them is left."""

import subprocess
import sys

import pytest

from tests.support.tools import ROOT

SECONDS, RATE, SEED = 12, 40, 7


@pytest.mark.parametrize("processes", [1])
def test_soak(processes: int) -> None:
    """No response is wrong, no job runs twice, and nothing is left after the last call. The report shows that."""
    command = [f"--seconds={SECONDS}", f"--rate={RATE}", f"--seed={SEED}", f"--processes={processes}"]
    done = subprocess.run(
        [sys.executable, "-m", "soak", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("All is well.\n")
    assert "transfers            0, 0" in done.stdout
