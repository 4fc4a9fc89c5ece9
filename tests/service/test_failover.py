"""--failover: calls go to fal's backup domain while the usual one cannot be reached, and never else."""

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from tests.support.programs.failover import BACKUP, CROWD, FAR, NEAR, OUTAGES
from tests.support.tools import ROOT, isolated

PROTOCOLS = ("h2", "http/1.1")
ERRORS = {"silent": "504", "no handshake": "504"}


@cache
def seen(protocol: str) -> Any:
    """Return what the program has seen. It runs once for each protocol."""
    command = [*isolated(), sys.executable, "-m", "tests.support.programs.failover", protocol]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=300)
    assert process.returncode == 0, process.stderr.decode()
    return json.loads(process.stdout)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("outage", OUTAGES)
def test_outage(protocol: str, outage: str) -> None:
    """Each call of a crowd gets its response from the backup, once, and calls go back as soon as that is possible."""
    report = seen(protocol)[outage]
    assert report["crowd"] == {f"200 {FAR}": CROWD}
    assert report["reads"] == {f"200 {FAR}": 3}
    assert report["received"] == CROWD + 3
    assert report["down"] == ["fal.run", "queue.fal.run"]
    assert report["authorities"] == sorted(BACKUP)
    assert report["keys"] == 1
    if protocol == "h2":
        assert report["connections"] <= 10, "a crowd shares connections to the backup"
    assert report["both down"] == {ERRORS.get(outage, "502"): 20}
    assert report["afterwards"] == {f"200 {NEAR}": 20}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("outage", OUTAGES)
def test_log(protocol: str, outage: str) -> None:
    """An outage is one line for each host, and so is its end."""
    lines = seen(protocol)[outage]["log"]
    begun = [line for line in lines if "cannot be reached" in line]
    assert [line.split(" cannot ")[0].split("failover: ")[1] for line in begun] == ["fal.run", "queue.fal.run"]
    assert sum("can be reached again" in line for line in lines) == 2
    assert len(lines) == 4


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_never(protocol: str) -> None:
    """Nothing goes to the backup after a TLS error, once it may have left, or for a client that has left."""
    report = seen(protocol)["never"]
    assert report["wrong certificate"] == {"502": 1}
    assert report["broken"] == {"500": 1}
    assert report["received"] == 0
    assert report["target"] == 412
