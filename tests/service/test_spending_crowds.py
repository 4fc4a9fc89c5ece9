"""Limits on spending under a crowd: whatever processes serve it, not one job more than allowed runs, and not one less.

All clients are connected before the first of them calls, and come to all services in turn.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from itertools import cycle
from pathlib import Path

import pytest

from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, Response, call
from tests.support.redis_server import running_redis
from tests.support.scripted_upstream import Exchange, Upstream
from tests.support.service_process import ServiceProcess, alive
from tests.support.stub_handlers import JSON, Gate, silent
from tests.support.waiting import TIMEOUT_S, arrived, eventually
from tornado_fal_proxy.spending.store import Usage
from tornado_fal_proxy.spending.stores import parse_store

CLIENTS, ALLOWED, AT_ONCE = 200, 37, 7
BILL = [*JSON, ("x-fal-billable-units", "1")]
# The store, how many services share it, and how many workers each of them has.
KINDS = [("sqlite", 1, 4), ("sqlite", 2, 2), ("redis", 2, 2)]


class Stage:
    """Services that share a store, in front of one upstream."""

    def __init__(self, upstream: Upstream, store: str) -> None:
        self.upstream, self.store = upstream, store
        self.services: list[ServiceProcess] = []

    async def connect(self) -> list[RawClient]:
        """Return so many clients, connected to the services in turn."""
        ports = [service.port for service in self.services]
        return [await RawClient.open(ports[number % len(ports)]) for number in range(CLIENTS)]

    async def crowd(self) -> Counter[int]:
        """Let all clients call at once, and count the statuses."""
        clients = await self.connect()
        await asyncio.gather(*(client.send() for client in clients))
        statuses = Counter([response.status for response in await responses(clients)])
        await asyncio.gather(*(client.close() for client in clients))
        return statuses

    async def account(self) -> Usage:
        """Return the sum of the account."""
        store = parse_store(self.store)
        await store.open()
        row = (await store.usage("0000-01-01", "9999-12-31")).total
        await store.close()
        return row


async def responses(clients: Sequence[RawClient]) -> list[Response]:
    """Return the response of each client."""
    async with asyncio.timeout(TIMEOUT_S):
        return await asyncio.gather(*(client.response() for client in clients))


async def done(calls: Sequence[asyncio.Task[Response]], count: int) -> None:
    """Wait until that many of the calls have their responses."""
    await eventually(lambda: sum(call.done() for call in calls) == count)


async def bill(exchange: Exchange) -> None:
    """Respond with a bill of one unit."""
    await exchange.body()
    await exchange.respond(200, b"{}", BILL)


@pytest.fixture(params=KINDS, ids=[f"{store}, {services} x {workers}" for store, services, workers in KINDS])
def kind(request: pytest.FixtureRequest) -> tuple[str, int, int]:
    """Run the test once with each kind of store and processes."""
    found: tuple[str, int, int] = request.param
    return found


@asynccontextmanager
async def staged(setup: Setup, kind: tuple[str, int, int], folder: Path, *argv: str) -> AsyncIterator[Stage]:
    """Start the services with these limits, and end them."""
    name, services, workers = kind
    with ExitStack() as stack:
        store = f"sqlite:{folder / 'spending.sqlite'}"
        if name == "redis":
            store = stack.enter_context(running_redis()).url()
        stage = Stage(await setup.upstream(bill), store)
        for _ in range(services):
            stage.services.append(
                await ServiceProcess.in_front_of(
                    setup, stage.upstream, f"--processes={workers}", f"--store={store}", "--worker-timeout-s=0", *argv
                )
            )
        yield stage
        for service in stage.services:
            await service.end()


@pytest.mark.gen_test
async def test_a_day(setup: Setup, tmp_path: Path, kind: tuple[str, int, int]) -> None:
    """Of a crowd at once as many calls pass as are left of the day, and the account has these and the refused ones."""
    async with staged(setup, kind, tmp_path, f"--jobs-per-user={ALLOWED}/day") as stage:
        assert await stage.crowd() == {200: ALLOWED, 402: CLIENTS - ALLOWED}
        assert await stage.crowd() == {402: CLIENTS}
        assert len(stage.upstream.exchanges) == ALLOWED
        account = await stage.account()
        assert (account.jobs, account.refused, account.units) == (ALLOWED, 2 * CLIENTS - ALLOWED, ALLOWED * 10**6)


@pytest.mark.gen_test
async def test_calls_that_are_given_back(setup: Setup, tmp_path: Path, kind: tuple[str, int, int]) -> None:
    """Calls that did not run make room for others, and in the end just as many have run as are allowed."""

    statuses = cycle([200, 503, 503])

    async def fails_at_times(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.respond(next(statuses), b"{}", JSON)

    async with staged(setup, kind, tmp_path, f"--jobs={ALLOWED}/day") as stage:
        stage.upstream.handler = fails_at_times
        seen = await stage.crowd()
        assert 0 < seen[200] <= ALLOWED
        stage.upstream.handler = bill
        seen += await stage.crowd()
        assert seen[200] == ALLOWED
        account = await stage.account()
        assert (account.jobs, account.refused) == (ALLOWED, seen[402])


@pytest.mark.gen_test
async def test_unfinished_jobs(setup: Setup, tmp_path: Path, kind: tuple[str, int, int]) -> None:
    """Never more calls than allowed run at once, and their places are free as soon as their clients have responses."""
    async with staged(setup, kind, tmp_path, f"--unfinished-jobs-per-user={AT_ONCE}") as stage:
        for before in (0, AT_ONCE):
            gate = stage.upstream.handler = Gate()
            clients = await stage.connect()
            await asyncio.gather(*(client.send() for client in clients))
            calls = [asyncio.create_task(client.response()) for client in clients]
            await done(calls, CLIENTS - AT_ONCE)
            await arrived(stage.upstream, before + AT_ONCE)
            gate.open.set()
            statuses = Counter([response.status for response in await asyncio.gather(*calls)])
            assert statuses == {200: AT_ONCE, 429: CLIENTS - AT_ONCE}
            assert len(stage.upstream.exchanges) == before + AT_ONCE
            await asyncio.gather(*(client.close() for client in clients))


@pytest.mark.gen_test
async def test_workers_that_are_killed(setup: Setup, tmp_path: Path, kind: tuple[str, int, int]) -> None:
    """Calls of workers that are killed count, once, as the others do: they have left for fal, and may run."""
    async with staged(setup, kind, tmp_path, f"--jobs-per-user={ALLOWED}/day") as stage:
        stage.upstream.handler = silent
        clients = await stage.connect()
        await asyncio.gather(*(client.send() for client in clients))
        calls = [asyncio.create_task(client.response()) for client in clients]
        await arrived(stage.upstream, ALLOWED)
        await done(calls, CLIENTS - ALLOWED)
        killed = [worker for service in stage.services for worker in service.workers()]
        for worker in killed:
            os.kill(worker, signal.SIGKILL)
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(end, asyncio.IncompleteReadError | OSError) for end in ends) == ALLOWED
        await eventually(lambda: not any(map(alive, killed)))
        for service in stage.services:
            refused = await call(service.port)
            assert (refused.status, f"limit of {ALLOWED} jobs a day" in refused.message) == (402, True)
        assert len(stage.upstream.exchanges) == ALLOWED
        assert (await stage.account()).jobs == ALLOWED
        for client in clients:
            client.leave()
