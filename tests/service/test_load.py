"""Restarts under load lose no call, and a killed worker loses only its own.

Each test runs few rounds. ``TORNADO_FAL_PROXY_ROUNDS=20 pytest -s tests/service/test_load.py`` runs more.
"""

import logging
import os
import signal
import socket

import pytest

from tests.support.load import ROUNDS, Load, respond
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient
from tests.support.service_process import ServiceProcess, serving
from tests.support.waiting import eventually


@pytest.mark.gen_test(timeout=60 + 20 * ROUNDS)
async def test_load_restarts(setup: Setup) -> None:
    """With a socket that stays open no call fails, however often the service is restarted."""
    upstream = await setup.upstream(respond)
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        port = listener.getsockname()[1]
        running = await ServiceProcess.in_front_of(setup, upstream, "--processes=2", listener=listener)
        async with Load(lambda _: RawClient.open(port)) as load:
            for _ in range(ROUNDS):
                await load.more(200)
                await running.end()
                running = await ServiceProcess.in_front_of(setup, upstream, "--processes=2", listener=listener)
            await load.more(200)
        assert load.failures == []
        await running.end()
        print(f"{load.done} calls, {ROUNDS} restarts")  # noqa: T201  (shown with -s)


@pytest.mark.gen_test(timeout=60 + 20 * ROUNDS)
async def test_load_killed_worker(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a worker is killed with SIGKILL only its own calls fail, and a new worker takes its place."""
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", True)  # the upstream still writes to the dead worker
    upstream = await setup.upstream(respond)
    running = await ServiceProcess.in_front_of(setup, upstream, "--processes=2", "--log-level=error")
    lost = 0
    async with Load(lambda _: RawClient.open(running.port)) as load:
        for _ in range(ROUNDS):
            await load.more(200)
            before = set(running.workers())
            victim = min(before)
            os.kill(victim, signal.SIGSTOP)  # from here on it takes no connection
            its_clients = serving(victim, running.port)
            failed = len(load.failures)
            os.kill(victim, signal.SIGKILL)
            await eventually(
                lambda before=before: any(  # type: ignore[misc]
                    serving(pid, running.port) for pid in running.workers() if pid not in before
                )
            )
            await load.more(200)
            failures = load.failures[failed:]
            assert its_clients
            assert [failure for failure in failures if failure.port not in its_clients] == []
            lost += len(failures)
    assert load.failures[:lost] == load.failures
    await running.end()
    print(f"{load.done} calls, {lost} lost to {ROUNDS} kills")  # noqa: T201
