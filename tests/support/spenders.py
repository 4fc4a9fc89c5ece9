"""Run processes that reserve jobs in one store, and compare the store with what they have reported."""

import asyncio
import random
import sys
from asyncio.subprocess import PIPE, Process

from tests.support.service_process import environment
from tests.support.spending_model import reservation
from tests.support.tools import ROOT
from tests.support.waiting import TIMEOUT_S
from tornado_fal_proxy.spending.store import Store
from tornado_fal_proxy.spending.stores import parse_store

__all__ = ["compete", "spend_and_be_killed"]

PROCESSES = 4
DAY = "2026-12-31"


async def start(name: str, own: str, limit: int, jobs: int) -> Process:
    """Start ``programs/spender.py``."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.programs.spender", name, own, str(limit), str(jobs)),
        stdout=PIPE,
        cwd=ROOT,
        env=environment({}),
    )


async def compete(name: str) -> None:
    """Let several processes reserve more than is allowed, and assert that they get just that."""
    limit = 300
    async with asyncio.timeout(TIMEOUT_S):
        processes = [await start(name, str(own), limit, 10) for own in range(PROCESSES)]
        outputs = [(await process.communicate())[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES
    reserved = [job for output in outputs for job in output.decode().split()]
    assert len(reserved) == len(set(reserved)) == limit
    store = parse_store(name)
    await store.open()
    row = (await store.usage(DAY, DAY)).total
    odd = sum(int(job.rpartition("-")[2]) % 2 for job in reserved)
    assert (row.jobs, row.cost) == (limit, 4 * limit - odd)
    await adds_up(store)
    await store.close()


async def spend_and_be_killed(name: str) -> None:
    """Kill processes in any moment, and assert that whatever was reported as reserved is in the store."""
    reported: set[str] = set()
    choice = random.Random(13)
    for round_ in range(4):
        async with asyncio.timeout(TIMEOUT_S):
            processes = [await start(name, f"{round_}.{own}", 10**6, 10**6) for own in range(2)]
            for process in processes:
                assert process.stdout is not None
                for _ in range(choice.randrange(1, 200)):
                    reported.add((await process.stdout.readline()).decode().strip())
            for process in processes:
                process.kill()
                rest, _ = await process.communicate()
                reported.update(rest.decode().split())
    store = parse_store(name)
    await store.open()
    for job in reported:
        assert await store.owner(job) == "ann"
    row = (await store.usage(DAY, DAY)).total
    # Each client may have reserved one that was not reported any more.
    assert len(reported) <= row.jobs <= len(reported) + 4 * 2 * 20
    await adds_up(store)
    await store.close()


async def adds_up(store: Store) -> None:
    """Assert that the counters have what the account has."""
    row = (await store.usage(DAY, DAY)).total
    assert (await store.reserve(reservation("0", jobs=0, cost=0, limit=10**9))).used == [row.jobs] * 3 + [row.cost] * 2
