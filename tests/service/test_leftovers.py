"""The tests' own harness: a test that fails makes no other test fail, and a leak is seen in a test that passes."""

import re
import subprocess
import sys
from pathlib import Path

from tests.support.service_process import environment
from tests.support.tools import ROOT
from tests.support.waiting import TIMEOUT_S

TESTS = """
import asyncio, gc, pytest
from tests.support.raw_client import RawClient
from tests.support.service_process import WITH_KEY, ServiceProcess
from tests.support.stub_handlers import Gate
from tests.support.waiting import arrived

@pytest.mark.gen_test
async def test_fails(setup):
    upstream = await setup.upstream(Gate())
    running = await ServiceProcess.in_front_of(setup, upstream, "--processes=2")
    clients = [await RawClient.open(running.port) for _ in range(3)]
    await clients[0].send()
    waiting = asyncio.create_task(clients[0].response())
    await arrived(upstream, 1)
    await clients[1].close()
    assert not "fails"

def test_passes():
    gc.collect()

@pytest.mark.gen_test
async def test_leaks(setup):
    client = await RawClient.open(setup.proxy("127.0.0.1:1"))

def test_sees_the_leak():
    gc.collect()
"""


def test_a_failed_test_fails_alone(tmp_path: Path) -> None:
    """Its leftovers are closed. Those of a test that passes still make that test fail, or the next one."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *")
    (tmp_path / "test_harness.py").write_text(TESTS)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-c", ROOT / "setup.cfg", "-p", "no:cacheprovider", tmp_path],
        cwd=ROOT,
        env=environment({}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    outcomes = set(re.findall(r"^(PASSED|FAILED) .*::(\w+)", ended.stdout, re.MULTILINE))
    assert {("FAILED", "test_fails"), ("PASSED", "test_passes")} < outcomes, ended.stdout + ended.stderr
    assert {("FAILED", "test_leaks"), ("FAILED", "test_sees_the_leak")} & outcomes, ended.stdout
