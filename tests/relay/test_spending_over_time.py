"""Limits on spending while time passes: a clock that is set, a day that ends, and prices that change at a restart.

The store is a file, as an operator has it, and the time of the proxy is the test's.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.proxy import Setup
from tests.support.raw_client import Response, call
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import JSON, fine, responds
from tests.support.waiting import arrived
from tornado_fal_proxy.spending.ledger import Ledger
from tornado_fal_proxy.spending.sqlite_store import SqliteStore
from tornado_fal_proxy.spending.store import Usage

NOON = 1_798_718_400  # 2026-12-31T12:00:00Z, near the end of a month and of a year
MIDNIGHT = NOON + 43_200
HOUR, DAY = 3600, 86_400
RUN, QUEUE = "https://fal.run/fal-ai/flux/dev", "https://queue.fal.run/fal-ai/flux/dev"
JOB_ID = "764cabcf-b745-4b3e-ae38-1200304cf45b"
JOB = f"https://queue.fal.run/fal-ai/flux/requests/{JOB_ID}"
BILL = [*JSON, ("x-fal-billable-units", "3")]
# A call is estimated at two units, and so at two cents.
PRICES = {"fal-ai/flux/dev": {"price": "0.01", "units": 2}}


class Time:
    """The time of all proxies of a test, in seconds since 1970."""

    now = float(NOON)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Return the time, which stands still until the test sets it."""
    time = Time()

    def ledger(rules: Any, store: Any, failures: Any) -> Ledger:
        return Ledger(rules, store, lambda: time.now, failures)

    monkeypatch.setattr("tornado_fal_proxy.relay.backend.Ledger", ledger)
    return time


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Return the name of a store in a file."""
    return f"sqlite:{tmp_path / 'spending.sqlite'}"


async def queue(exchange: Exchange) -> None:
    """Take each submit under the same id, and have a result of three units."""
    await exchange.body()
    submitted = json.dumps({"status": "IN_QUEUE", "request_id": JOB_ID}).encode()
    if exchange.method == "POST":
        await exchange.respond(200, submitted, JSON)
    else:
        await exchange.respond(200, b"{}", BILL)


async def account(setup: Setup, store: str) -> list[Usage]:
    """Close the proxies, and return the account of everything."""
    await setup.close()
    setup._closers.clear()
    file = SqliteStore(store.removeprefix("sqlite:"))
    await file.open()
    found = await file.usage("0000-01-01", "9999-12-31")
    await file.close()
    return sorted(found.rows, key=lambda row: (row.day, row.user, row.endpoint))


async def statuses(port: int, count: int, target: str = RUN) -> list[int]:
    """Make so many calls, one after the other, and return the statuses."""
    return [(await call(port, target=target)).status for _ in range(count)]


def left(response: Response, name: str) -> int:
    """Return how much a response says is left of a limit."""
    fields = response.header("ratelimit") or ""
    (found,) = [item for item in fields.split(", ") if item.startswith(f'"{name}"')]
    return int(found.partition(";r=")[2].partition(";")[0])


# The clock.


@pytest.mark.gen_test
async def test_a_clock_that_is_set_back(setup: Setup, time: Time, store: str) -> None:
    """A clock that is set back counts in the earlier day again and forgets nothing; no wait outlasts a window."""
    port = setup.proxy(await setup.upstream(fine), jobs_per_user="2/minute,2/day", store=store)
    time.now = NOON + 30
    assert await statuses(port, 3) == [200, 200, 429]
    time.now = NOON + 20
    refused = await call(port)
    assert (refused.status, refused.header("retry-after")) == (429, "40")
    time.now = NOON - HOUR
    assert await statuses(port, 2) == [402, 402]
    for expected in ([200, 200], [429, 429]):  # the second time there is nothing left
        time.now = NOON - DAY
        assert await statuses(port, 2) == expected
        time.now = NOON + HOUR
        assert await statuses(port, 1) == [402]
    time.now = MIDNIGHT
    assert await statuses(port, 3) == [200, 200, 429]
    days = [(row.day, row.jobs) for row in await account(setup, store) if row.jobs]
    assert days == [("2026-12-30", 2), ("2026-12-31", 2), ("2027-01-01", 2)]


@pytest.mark.gen_test
async def test_an_unfinished_job_while_the_clock_is_set(setup: Setup, time: Time, store: str) -> None:
    """A job is unfinished up to its time by any clock, and ends with its result whatever the clock says."""
    port = setup.proxy(await setup.upstream(queue), unfinished_jobs_per_user=1, job_lifetime_s=HOUR, store=store)
    assert await statuses(port, 1, QUEUE) == [200]
    for now in (NOON, NOON - DAY, NOON + HOUR - 1):
        time.now = now
        assert await statuses(port, 1, QUEUE) == [429]
    time.now = NOON - DAY
    assert (await call(port, "GET", target=JOB)).status == 200
    assert await statuses(port, 1) == [200]


@pytest.mark.gen_test
async def test_a_clock_that_was_wrong_by_years(setup: Setup, time: Time, store: str) -> None:
    """A service that starts before its clock is set counts from then on, and has lost nothing."""
    upstream = await setup.upstream(fine)
    port = setup.proxy(upstream, jobs_per_user="2/month", store=store)
    time.now = 5.0
    assert await statuses(port, 3) == [200, 200, 402]
    time.now = NOON
    assert await statuses(port, 3) == [200, 200, 402]
    rows = await account(setup, store)
    assert [(row.day, row.jobs) for row in rows if row.jobs] == [("1970-01-01", 2), ("2026-12-31", 2)]


# The end of a day.


@pytest.mark.gen_test
async def test_a_day_that_ends_while_a_job_runs(setup: Setup, time: Time, store: str) -> None:
    """A job and its bill belong to the day of the reservation, and it is unfinished in the next day too."""
    options = {"budget_per_user": "0.05/day", "unfinished_jobs_per_user": 1, "prices": PRICES, "store": store}
    port = setup.proxy(await setup.upstream(queue), **options)
    time.now = MIDNIGHT - 1
    assert await statuses(port, 1, QUEUE) == [200]
    time.now = MIDNIGHT
    refused = await call(port, target=QUEUE)
    assert (refused.status, left(refused, "budget-per-user-day")) == (429, 5)
    assert (await call(port, "GET", target=JOB)).status == 200
    first = await call(port, target=RUN)
    assert (first.status, left(first, "budget-per-user-day")) == (200, 3)
    time.now = MIDNIGHT - 1
    late = await call(port, target=RUN)  # three of five cents are billed, and the estimate of two has room
    assert (late.status, left(late, "budget-per-user-day")) == (200, 0)
    rows = await account(setup, store)
    assert [(row.day, row.jobs, row.cost) for row in rows] == [("2026-12-31", 2, 50_000), ("2027-01-01", 1, 20_000)]


@pytest.mark.gen_test
async def test_a_day_that_ends_before_a_call_is_given_back(setup: Setup, time: Time, store: str) -> None:
    """A call that did not run is given back to the day of its reservation, and the next day has not one job more."""
    opened = asyncio.Event()

    async def fails_late(exchange: Exchange) -> None:
        await opened.wait()
        await responds(503)(exchange)

    upstream = await setup.upstream(fails_late)
    port = setup.proxy(upstream, jobs_per_user="1/day", store=store)
    time.now = MIDNIGHT - 1
    async with asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(call(port))
        await arrived(upstream, 1)
        time.now = MIDNIGHT
        opened.set()
    assert (await asked).status == 503
    upstream.handler = fine
    assert await statuses(port, 2) == [200, 402]
    time.now = MIDNIGHT - 1
    assert await statuses(port, 2) == [200, 402]


# Prices that change.

# The prices after the restart, and the cost of three units that were estimated at two cents before it.
CHANGES: list[tuple[str, dict[str, Any] | None, int]] = [
    ("dearer", {"fal-ai/flux/dev": "0.05"}, 150_000),
    ("cheaper", {"fal-ai/**": "0.001"}, 3_000),
    ("free", {"**": 0}, 0),
    ("not named any more", {"fal-ai/other": 1}, 20_000),
    ("no prices any more", None, 20_000),
]


@pytest.mark.parametrize(("prices", "cost"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
@pytest.mark.gen_test
async def test_prices_that_change_at_a_restart(
    setup: Setup, store: str, prices: dict[str, Any] | None, cost: int
) -> None:
    """A bill costs what the price is when it comes. Where there is none any more, the estimate stays."""
    upstream = await setup.upstream(queue)
    before = setup.proxy(upstream, budget="1/day", prices=PRICES, store=store)
    assert await statuses(before, 1, QUEUE) == [200]
    after = setup.proxy(upstream, prices=prices, own_jobs_only=True, store=store)
    assert (await call(after, "GET", target=JOB)).status == 200
    again = setup.proxy(upstream, budget="1/day", prices=PRICES, store=store)
    assert (await call(again, "GET", target=JOB)).status == 200  # settled once
    assert await statuses(again, 1) == [200]
    rows = await account(setup, store)
    assert [(row.jobs, row.units, row.cost) for row in rows] == [(2, 5_000_000, cost + 20_000)]
