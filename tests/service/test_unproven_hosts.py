"""Unproven hosts: a client may name any number of hosts below fal.run, and nobody else waits for them."""

import asyncio
import json
import subprocess
import sys

import pytest

from tests.support.tools import ROOT, isolated

MAX_DELAY_MS = 100


@pytest.mark.gen_test
async def test_unproven_hosts() -> None:
    """2,000 calls to hosts whose names do not exist or hang delay nobody else, and leave nothing behind."""
    process = await asyncio.create_subprocess_exec(
        *isolated(),
        *(sys.executable, "-m", "tests.support.programs.unproven_hosts"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    seen = json.loads(stdout)
    answered, asked = seen["answered"], seen["asked"]
    assert answered["502"] + answered["504"] == 2000
    assert asked["hang"] + asked["fail"] < 2000, "only a few are looked up at once, and the others' time is over then"
    assert seen["calls_during"] > 100
    assert seen["during_ms"]["median"] < seen["before_ms"]["median"] + 10
    assert seen["during_ms"]["max"] < seen["before_ms"]["max"] + MAX_DELAY_MS
    assert seen["cold_ms"]["max"] < MAX_DELAY_MS, "lookup, handshake and response, on hosts that fal's SDKs call"
    assert seen["after_ms"]["median"] < seen["before_ms"]["median"] + 10
    assert seen["unproven"] == 200, "a host that exists is served, though nobody called it before"
    assert seen["afterwards"]["files"] <= seen["at_rest"]["files"] + 4
    assert seen["afterwards"]["threads"] <= seen["at_rest"]["threads"] + 20, "libcurl's pool"
    assert seen["afterwards"]["kb"] < seen["at_rest"]["kb"] + 40_000
