"""A worker that hangs is noticed, killed and replaced. Nobody is killed who was stopped together with the parent."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.metrics import started, until
from tests.support.proxy import KEY, Setup
from tests.support.raw_client import RawClient, call
from tests.support.service_process import ServiceProcess, serving
from tests.support.stub_handlers import Gate
from tests.support.systemd import notification, notified, within
from tests.support.tools import ROOT
from tests.support.waiting import TIMEOUT_S, arrived, eventually

# The shortest that the option permits.
SOON = "--worker-timeout-s=1"
# Blocks the loop for good in a call that asks for it.
RULES = """
import time
def authorize(handler, target):
    if "x-fal-hang" in handler.request.headers:
        time.sleep(3600)
    return True
"""


async def stop(running: ServiceProcess, victim: int, client: RawClient) -> None:
    os.kill(victim, signal.SIGSTOP)


async def block(running: ServiceProcess, victim: int, client: RawClient) -> None:
    await client.send(headers=["x-fal-hang: 1"])


@pytest.mark.parametrize("hang", [stop, block], ids=["stopped", "authorize blocks"])
@pytest.mark.gen_test
async def test_a_worker_that_hangs_is_replaced(setup: Setup, tmp_path: Path, hang: Callable[..., object]) -> None:
    """It is logged, counted and killed. Only its own calls are lost, and the service takes calls all the time."""
    (tmp_path / "rules.py").write_text(RULES)
    upstream = await setup.upstream(gate := Gate())
    environ = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "FAL_PROXY_AUTHORIZE": "rules:authorize"}
    running, admin = await started(setup, upstream, "--processes=2", SOON, **environ)
    opened = await asyncio.gather(*(RawClient.open(running.port) for _ in range(16)))
    clients = {client.writer.get_extra_info("sockname")[1]: client for client in opened}
    before = set(running.workers())
    await eventually(lambda: all(len(serving(pid, running.port)) >= 2 for pid in before))
    victim, sound = before
    idle, *waiting = [clients[port] for port in serving(victim, running.port)]
    others = [clients[port] for port in serving(sound, running.port)]
    for client in waiting + others:
        await client.send()
    await arrived(upstream, len(waiting + others))
    await hang(running, victim, idle)  # type: ignore[misc]

    await running.log_line(rf"worker hung: process {victim} is killed, no heartbeat for 1 s \(--worker-timeout-s\)")
    await running.log_line(rf"worker replaced: process {victim} ended by signal 9")
    scrape = await until(
        admin, lambda scrape: scrape.total("fal_proxy_workers") == 2 and set(running.workers()) != before
    )
    assert scrape.total("fal_proxy_worker_hangs_total") == 1
    assert scrape.total("fal_proxy_worker_restarts_total") == 1
    assert scrape.total("fal_proxy_in_flight") == len(others)
    assert (await call(admin, "GET", target=None, path="/readyz")).status == 200
    gate.open.set()
    for client in waiting:
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await client.response()
    assert [(await client.response()).status for client in others] == [200] * len(others)
    for client in clients.values():
        await client.close()
    await running.end()


HANGS_ONCE = """
import pathlib, time
from tornado_fal_proxy.service import process
serve = process.serve
def hang_once(context, worker):
    mark = pathlib.Path(__file__).with_name("hung")
    if worker.slot == 1 and not mark.exists():
        mark.touch()
        time.sleep(3600)
    return serve(context, worker)
process.serve = hang_once
"""


@pytest.mark.gen_test
async def test_a_worker_that_hangs_in_its_start_is_replaced(tmp_path: Path) -> None:
    """The service is ready when another has started in its place."""
    (tmp_path / "sitecustomize.py").write_text(HANGS_ONCE)
    running = await ServiceProcess.start("--processes=2", SOON, FAL_KEY=KEY, PYTHONPATH=f"{tmp_path}:{ROOT}")
    await running.log_line("worker hung: ")
    await running.end()


@pytest.mark.gen_test
async def test_a_worker_that_hangs_in_a_drain_is_killed(setup: Setup) -> None:
    """A long drain does not wait for it: the service ends, with exit code 3."""
    running = await ServiceProcess.start("--processes=2", "--drain-timeout-s=3600", SOON, FAL_KEY=KEY)
    os.kill(min(running.workers()), signal.SIGSTOP)
    running.process.terminate()
    await running.ended(3)


@pytest.mark.gen_test
async def test_workers_that_were_stopped_with_the_parent_live(tmp_path: Path) -> None:
    """After a stop of all for longer than the limit nobody is killed, although the parent is the first to go on."""
    async with notified(tmp_path) as (name, manager):
        environ: dict[str, Any] = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "400000", "FAL_KEY": KEY}
        running = await ServiceProcess.start("--processes=2", SOON, **environ)
        while await notification(manager) != "READY=1":
            pass
        before = set(running.workers())
        os.killpg(running.pid, signal.SIGSTOP)
        await asyncio.sleep(2)
        with suppress(BlockingIOError):
            while True:
                manager.recv(4096)
        os.kill(running.pid, signal.SIGCONT)
        assert [await notification(manager) for _ in range(3)] == ["WATCHDOG=1"] * 3
        os.killpg(running.pid, signal.SIGCONT)
        # The checks of two limits.
        assert [await notification(manager) for _ in range(20)] == ["WATCHDOG=1"] * 20
        assert set(running.workers()) == before
        _, stderr = await running.end()
        assert "hung" not in stderr


@pytest.mark.gen_test
async def test_systemd_is_told_of_the_parent(tmp_path: Path) -> None:
    """WATCHDOG=1 goes on while a worker hangs and is replaced, and ends when the parent itself hangs."""
    async with notified(tmp_path) as (name, manager):
        environ: dict[str, Any] = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "400000", "FAL_KEY": KEY}
        running = await ServiceProcess.start("--processes=2", SOON, **environ)
        os.kill(min(running.workers()), signal.SIGSTOP)
        replaced = asyncio.create_task(running.log_line("worker replaced: "))
        counts: Counter[str] = Counter()
        async with asyncio.timeout(TIMEOUT_S):
            while not replaced.done():
                counts[await notification(manager)] += 1
        assert counts["WATCHDOG=1"] >= 9
        os.kill(running.pid, signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S):
            while await within(0.6, manager) is not None:
                pass
        os.kill(running.pid, signal.SIGCONT)
        await running.end()
