"""The memory of a crowd goes back to the system when the crowd has gone, and not before."""

import asyncio
import re
from pathlib import Path

import pytest

from tests.support.logs import Logs
from tests.support.proxy import Setup
from tests.support.raw_client import call
from tests.support.service_process import ServiceProcess
from tests.support.stub_handlers import as_asked
from tests.support.tools import ROOT
from tests.support.waiting import eventually
from tornado_fal_proxy import memory
from tornado_fal_proxy.service import trimming
from tornado_fal_proxy.service.trimming import Trimmer, resident_bytes

# Leaves a heap as a crowd does: 100 MB of free blocks, and one in use at the end, which keeps the C library from giving
# the others back by itself.
CROWD = """
def crowd():
    blocks = [bytes(1000) for _ in range(100_000)]
    return blocks[-1]
"""
RULES = """
left = []
def authorize(handler, target):
    left.append(crowd())
    return True
"""
MB = 1024 * 1024


@pytest.mark.gen_test(timeout=60)
async def test_a_crowd_leaves_no_memory(setup: Setup, tmp_path: Path) -> None:
    """It is given back once, and the log says how much."""
    (tmp_path / "rules.py").write_text(CROWD + RULES)
    running = await ServiceProcess.in_front_of(
        setup, await setup.upstream(as_asked), "--authorize=rules:authorize", PYTHONPATH=f"{tmp_path}:{ROOT}"
    )
    assert (await call(running.port)).status == 200
    line = await running.log_line("memory: ")
    match = re.search(r"memory: (\d+) MB given back after a crowd, \d+ MB left, took \d+ ms$", line)
    assert match is not None
    assert int(match[1]) > 50
    await running.end()


@pytest.mark.gen_test
async def test_memory_is_given_back_when_few_calls_are_left(
    logs: Logs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given back when a tenth of the crowd is left, and once, although the sweeps go on until all have gone."""
    caplog.set_level("INFO", "tornado_fal_proxy")
    monkeypatch.setattr(trimming, "SWEEP_INTERVAL_S", 0.001)
    in_flight, sweeps = 20, 0

    def count() -> int:
        nonlocal sweeps
        sweeps += 1
        return in_flight

    async def some_sweeps() -> None:
        until = sweeps + 10
        await eventually(lambda: sweeps >= until)

    memory.give_back()  # else the crowd takes what other tests left, and the process does not grow
    trimmer = Trimmer(count)
    before = resident_bytes()
    names: dict[str, object] = {}
    exec(CROWD + "left = crowd()", names)
    trimmer.start()
    await some_sweeps()
    assert resident_bytes() - before > 80 * MB
    assert logs.lines == []
    in_flight = 2
    await some_sweeps()
    assert resident_bytes() - before < 50 * MB
    in_flight = 0
    await asyncio.sleep(0)
    await eventually(lambda: trimmer._sweep._timer is None)
    (line,) = logs.lines
    assert line.startswith("INFO tornado_fal_proxy: memory: ")
