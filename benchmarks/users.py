"""The size of a store with many users, and its speed then: ``python -m benchmarks.users``.

Each user makes one paid call, in the order of a shuffled list, with limits per minute, per day and per month, a budget
per day, and unfinished jobs. So a user has four counters, a job and a row of the account: as many as anybody leaves in
the store in a day with one call. ``--users=1000000`` chooses how many, and ``--store=redis://...`` a Redis, which must
be empty. The figures: the time of all reservations, 200 at once; the memory of this process, or of Redis; the size of
the file; the time of single reservations and of the account at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import measure
from tornado_fal_proxy import ProxyConfig
from tornado_fal_proxy.spending.store import Store, day_of
from tornado_fal_proxy.spending.stores import parse_store

AT_ONCE, SINGLE = 200, 500
NOW = 1_795_737_599


def _rules() -> ProxyConfig:
    return ProxyConfig(
        jobs_per_user="5/minute,20/day,100/month",
        budget_per_user="1/day",
        unfinished_jobs_per_user=2,
        prices={"**": "0.025"},
    )


async def _fill(store: Store, users: int) -> None:
    """Let each user make one call."""
    rules = _rules().spending
    assert rules is not None

    async def one(number: int) -> None:
        user = f"user-{number:08}@app.example"
        terms = rules.terms(user, rules.default, "fal-ai/flux/dev", None, NOW, f"{random.getrandbits(128):032x}")
        standing = await store.reserve(terms.reservation)
        assert standing.refused_by is None or number < SINGLE
        await store.settle(terms.reservation.id, 1_000_000, 25_000)

    order = list(range(users))
    random.Random(1).shuffle(order)
    start = time.perf_counter()
    for first in range(0, users, AT_ONCE):
        await asyncio.gather(*map(one, order[first : first + AT_ONCE]))
    _show("reserved and settled in a second, 200 at once", f"{users / (time.perf_counter() - start):,.0f}")
    times = []
    for number in range(SINGLE):
        start = time.perf_counter()
        await one(number)
        times.append(time.perf_counter() - start)
    _show("one by one, ms for both", f"{statistics.median(times) * 1e3:.2f}")
    start = time.perf_counter()
    total = (await store.usage(day_of(NOW), day_of(NOW), ("user",), 200)).total
    _show("the account by user, s", f"{time.perf_counter() - start:.2f}")
    assert total.jobs == users + SINGLE


def _show(name: str, value: str) -> None:
    sys.stdout.write(f"{name}: {value}\n")
    sys.stdout.flush()


async def _run(name: str, users: int, folder: Path) -> None:
    store = parse_store(name)
    await store.open()
    peak = measure.Peak(os.getpid())
    await _fill(store, users)
    await store.close()
    _show("growth of this process, MB", f"{peak.growth_mb():.0f}")
    for file in folder.iterdir():
        _show(f"{file.name}, MB", f"{file.stat().st_size / 1e6:.0f}")


def main() -> None:
    """Fill a store, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.users", description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--store", default="sqlite")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark") as directory:
        name = f"sqlite:{directory}/spending.sqlite" if options.store == "sqlite" else options.store
        asyncio.run(_run(name, options.users, Path(directory)))


if __name__ == "__main__":
    main()
