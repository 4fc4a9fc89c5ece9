"""Unproven hosts: a client may name any number of hosts below fal.run, and no other client waits for them."""

import asyncio
import json
import subprocess
import sys

import pytest

from tests.support.programs.unproven_hosts import is_at_rest
from tests.support.tools import ROOT, isolated


@pytest.mark.gen_test
async def test_unproven_hosts() -> None:
    """2,000 calls to hosts whose names do not exist or hang make nobody else wait, and leave nothing behind."""
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
    assert seen["crowd_waits"], "100 calls to hosts that fal's SDKs call were answered meanwhile"
    assert seen["calls_during"] > 100
    assert is_at_rest(seen["afterwards"], seen["at_rest"])
