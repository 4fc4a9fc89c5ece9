"""A report over many rows of the account, and the calls meanwhile: ``python -m benchmarks.account``.

``--rows=1000000`` users have one row each, on one day. ``--store=redis://...`` chooses a Redis, which must be empty.
The rows are written directly, because a million reservations take minutes. Then the report of the admin port's page is
made by user and by endpoint, while paid calls are reserved one after the other. The figures: the time of the report;
how long a reservation took in the middle, and the longest; the CPU that the loop's thread used between two turns at
most, which other programs do not change; the growth of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable

from redis import Redis

from benchmarks import measure
from tornado_fal_proxy.service.usage_page import MAX_ROWS
from tornado_fal_proxy.spending.account import make_report
from tornado_fal_proxy.spending.store import Counter, Reservation, Store, day_of
from tornado_fal_proxy.spending.stores import parse_store

NOW = 1_795_737_599
ENDPOINT = "fal-ai/flux/dev"
ROWS_AT_ONCE = 10_000
PAUSE_S = 0.002


def _fill(name: str, rows: int) -> None:
    """Write the rows to a store that was opened before."""
    day = day_of(NOW)
    for first in range(0, rows, ROWS_AT_ONCE):
        users = [f"user-{number:08}@app.example" for number in range(first, min(first + ROWS_AT_ONCE, rows))]
        if name.startswith("sqlite:"):
            with sqlite3.connect(name.removeprefix("sqlite:")) as db:
                many = ((day, user, ENDPOINT, 1, 0, 1_000_000, 25_000 + first) for user in users)
                db.executemany("INSERT INTO account VALUES (?, ?, ?, ?, ?, ?, ?)", many)
            db.close()
        else:
            fields = {json.dumps([user, ENDPOINT]): f"1 0 1000000 {25_000 + first}" for user in users}
            with Redis.from_url(name) as redis:
                redis.hset("{fal-proxy}:account:" + day, mapping=fields)
                redis.zadd("{fal-proxy}:days", {day: 0})


async def _again_and_again(
    step: Callable[[], Awaitable[object]], seconds: list[float], clock: Callable[[], float]
) -> None:
    """Do a step after each pause, and note how long it takes."""
    while True:
        start = clock()
        await step()
        seconds.append(clock() - start)
        await asyncio.sleep(PAUSE_S)


def _reserving(store: Store) -> Callable[[], Awaitable[object]]:
    """Return what reserves one job more."""
    count = 0

    def reserve() -> Awaitable[object]:
        nonlocal count
        count += 1
        return store.reserve(
            Reservation(
                id=f"{time.time_ns()}-{count}",
                user="ann",
                endpoint=ENDPOINT,
                refused_as=ENDPOINT,
                at=NOW,
                jobs=1,
                units=1_000_000,
                cost=25_000,
                job_counters=[Counter("ann:jobs", 10**9, NOW)],
                cost_counters=[Counter("ann:cost", 10**15, NOW)],
                max_unfinished=None,
                unfinished_until=NOW,
            )
        )

    return reserve


async def _report(store: Store, by: str, rows: int) -> None:
    """Make a report, and print the figures."""
    reservations: list[float] = []
    turns: list[float] = []
    beside = [
        asyncio.create_task(_again_and_again(_reserving(store), reservations, time.perf_counter)),
        asyncio.create_task(_again_and_again(lambda: asyncio.sleep(PAUSE_S), turns, time.thread_time)),
    ]
    await asyncio.sleep(0.1)
    start = time.perf_counter()
    report = await make_report(store.usage, "1d", by, NOW, MAX_ROWS)
    seconds = time.perf_counter() - start
    assert report.account.total.jobs >= rows
    for task in beside:
        task.cancel()
    reservations.sort()
    middle, longest = reservations[len(reservations) // 2] * 1e3, reservations[-1] * 1e3
    _show(f"by {by}, s", f"{seconds:.1f}")
    _show("a reservation meanwhile, ms", f"{middle:.1f} (the longest of {len(reservations)}: {longest:.0f})")
    _show("CPU of a turn of the loop, ms at most", f"{max(turns) * 1e3:.1f}")


def _show(name: str, value: str) -> None:
    sys.stdout.write(f"{name}: {value}\n")
    sys.stdout.flush()


async def _run(name: str, rows: int) -> None:
    store = parse_store(name)
    await store.open()
    _fill(name, rows)
    for by in ("user", "endpoint"):
        peak = measure.Peak(os.getpid())
        await _report(store, by, rows)
        _show("growth of this process, MB", f"{peak.growth_mb():.0f}")
    await store.close()


def main() -> None:
    """Fill a store, make reports, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.account", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--store", default="sqlite")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark") as directory:
        name = f"sqlite:{directory}/spending.sqlite" if options.store == "sqlite" else options.store
        asyncio.run(_run(name, options.rows))


if __name__ == "__main__":
    main()
