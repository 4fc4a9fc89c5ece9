"""Limits on spending: the outcome of each call in the store, who may read a job, and what refuses a call."""

import asyncio
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tornado.web import Application, HTTPError

from tests.support.fake_store import FakeStore
from tests.support.logs import Logs
from tests.support.proxy import ROUTE, Setup
from tests.support.raw_client import RawClient, call, request
from tests.support.scripted_upstream import Exchange, Handler
from tests.support.stub_handlers import EVENT, EVENT_STREAM, JSON, Gate, fine, must_not_be_called, resets, responds
from tests.support.waiting import arrived, eventually
from tornado_fal_proxy import Call, FalProxyHandler, Target
from tornado_fal_proxy.errors import StoreUnavailable
from tornado_fal_proxy.spending.ledger import OPERATIONS, Ledger
from tornado_fal_proxy.spending.sqlite_store import SqliteStore
from tornado_fal_proxy.spending.store import END, GIVE_BACK, SETTLE, Note, StoreFailed

RUN, QUEUE, WMA = "https://fal.run/fal-ai/flux/dev", "https://queue.fal.run/fal-ai/flux/dev", "https://wma.fal.run"
TOKEN, UPLOAD = "https://rest.fal.ai/tokens/", "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3"
JOB_ID = "764cabcf-b745-4b3e-ae38-1200304cf45b"
JOB = f"https://queue.fal.run/fal-ai/flux/requests/{JOB_ID}"
SUBMITTED = json.dumps({"status": "IN_QUEUE", "request_id": JOB_ID, "queue_position": 0}).encode()
# A call of the model is estimated at two units, and so at 20,000 millionths of a dollar.
PRICES = {"fal-ai/flux/dev": {"price": "0.01", "units": 2}, "**": 1}
LIMITS = {"jobs_per_user": "10/day", "unfinished_jobs_per_user": 5, "budget_per_user": "5.00/day", "prices": PRICES}
# Jobs, cost, and unfinished jobs in the store.
GIVEN_BACK, ESTIMATE, UNFINISHED = (0, 0, 0), (1, 20_000, 0), (1, 20_000, 1)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    """Return the store of all proxies of the test."""
    store = FakeStore()
    monkeypatch.setattr("tornado_fal_proxy.relay.backend.make_store", lambda config: store)
    return store


def bills(units: str, status: int = 200, body: bytes = b"{}") -> Handler:
    return responds(status, body, [*JSON, ("x-fal-billable-units", units)])


def streams(*, breaks: bool = False, headers: list[tuple[str, str]] | None = None) -> Handler:
    async def handler(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, [*EVENT_STREAM, *(headers or [])])
        await exchange.send(EVENT)
        await asyncio.sleep(0.02)  # else the response is complete before it is relayed, and leaves as a whole
        if breaks:
            exchange.reset()
        else:
            await exchange.end()

    return handler


# What fal does with a run, and what is in the store afterwards.
RUNS: list[tuple[str, Handler, tuple[int, int, int]]] = [
    ("a bill", bills("3"), (1, 30_000, 0)),
    ("a small bill", bills("0.00001"), (1, 1, 0)),
    ("a bill of nothing", bills("0"), (1, 0, 0)),
    ("no number", bills("many"), ESTIMATE),
    ("a negative bill", bills("-1"), ESTIMATE),
    ("two bills", responds(200, b"{}", [*JSON, *[("x-fal-billable-units", "1")] * 2]), ESTIMATE),
    ("no bill", fine, ESTIMATE),
    ("an error of its input", responds(422), ESTIMATE),
    ("a bill for an error", bills("1", 422), (1, 10_000, 0)),
    ("a time-out", responds(504), ESTIMATE),
    ("a redirect", responds(307), ESTIMATE),
    ("a bad request", responds(400), ESTIMATE),
    *[(f"{status}", responds(status), GIVEN_BACK) for status in (401, 403, 404, 405, 413, 415, 429, 500, 502, 503)],
    ("a bill for a failure", bills("1", 500), (1, 10_000, 0)),
    ("a broken connection", resets, UNFINISHED),
    ("a stream", streams(), ESTIMATE),
    ("a stream with a bill", streams(headers=[("x-fal-billable-units", "4")]), (1, 40_000, 0)),
    ("a broken stream", streams(breaks=True), UNFINISHED),
    ("a broken stream with a bill", streams(breaks=True, headers=[("x-fal-billable-units", "4")]), UNFINISHED),
]


@pytest.mark.parametrize(("handler", "sums"), [row[1:] for row in RUNS], ids=[row[0] for row in RUNS])
@pytest.mark.gen_test
async def test_a_run(
    setup: Setup, store: FakeStore, logs: Logs, protocol: str, handler: Handler, sums: tuple[int, int, int]
) -> None:
    """A run is settled, given back, ended or left by what fal did, before the client has the whole response.

    The client is told what is left then, except by a stream, which may still break.
    """
    if sums == UNFINISHED:
        logs.expect("upstream error")
    port = setup.proxy(await setup.upstream(handler, protocol), **LIMITS)
    client = await RawClient.open(port)
    await client.send()
    with suppress(asyncio.IncompleteReadError):
        response = await client.response()
        jobs, cost, unfinished = UNFINISHED if response.header("content-type") == "text/event-stream" else sums
        found = re.findall(r'"([a-z-]+)";r=(\d+)', response.header("ratelimit") or "")
        assert dict(found) == {
            "jobs-per-user-day": str(10 - jobs),
            "budget-per-user-day": str((5_000_000 - cost) // 10_000),
            "unfinished-jobs-per-user": str(5 - unfinished),
        }
    assert store.sums() == sums
    assert store.done.count("reserve") == 1
    await client.close()


@pytest.mark.gen_test
async def test_a_run_that_cannot_leave(setup: Setup, store: FakeStore, logs: Logs) -> None:
    """A call that did not reach fal is given back."""
    upstream = await setup.upstream(must_not_be_called)
    await upstream.close()
    logs.expect("upstream error: 502")
    response = await call(setup.proxy(upstream.address, **LIMITS))
    assert response.status == 502
    assert '"jobs-per-user-day";r=10;' in str(response.header("ratelimit"))
    await eventually(lambda: store.sums() == GIVEN_BACK)


@pytest.mark.parametrize("target", [TOKEN, f"{WMA}/session", "https://fal.run/odd//path", "https://new.fal.run/a"])
@pytest.mark.gen_test
async def test_calls_that_are_over_at_once(setup: Setup, store: FakeStore, target: str) -> None:
    """A token, a session, and whatever nobody knows count as a job each, and keep their estimate."""
    port = setup.proxy(await setup.upstream(fine), **LIMITS | {"budget_per_user": None})
    assert (await call(port, target=target)).status == 200
    assert store.sums()[::2] == (1, 0)


FREE = [
    ("GET", f"{JOB}/status"),
    ("GET", f"{JOB}/status/stream"),
    ("POST", UPLOAD),
    ("POST", f"{WMA}/ice"),
    ("POST", f"{WMA}/session/heartbeat"),
    ("POST", f"{RUN}/ice"),
]


@pytest.mark.parametrize(("method", "target"), FREE)
@pytest.mark.gen_test
async def test_free_calls_touch_no_store(setup: Setup, store: FakeStore, method: str, target: str) -> None:
    """A store that fails at any use, and a function that cannot name a user, stop no free call."""

    def identify(handler: Any, target: Target) -> str:
        raise AssertionError(target)

    store.failing = "not to be used"
    running = responds(200, b'{"status": "IN_PROGRESS", "logs": [{"message": "\\"status\\": \\"COMPLETED\\""}]}')
    port = setup.proxy(await setup.upstream(running), identify=identify, **LIMITS)
    for _ in range(2):
        response = await call(port, method, target=target)
        assert (response.status, response.header("ratelimit")) == (200, None)
    assert store.done == []


# Queued jobs: what ends one.


async def submit(port: int, store: FakeStore, **options: Any) -> None:
    response = await call(port, target=QUEUE, **options)
    assert (response.status, response.body) == (200, SUBMITTED)
    assert list(store.jobs)[-1] == JOB_ID, "fal's id must be known before the client has it"


def queue(after: Handler) -> Handler:
    """Return a handler that takes a submit, and does ``after`` with all other calls."""

    async def handler(exchange: Exchange) -> None:
        await (responds(200, SUBMITTED)(exchange) if exchange.method == "POST" else after(exchange))

    return handler


def status_events(*statuses: str) -> Handler:
    async def handler(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENT_STREAM)
        for status in statuses:
            line = f'data: {{"status": "{status}", "logs": []}}\n\n'.encode()
            await exchange.send(line[:20])
            await asyncio.sleep(0.01)
            await exchange.send(line[20:])
        await exchange.end()

    return handler


COMPLETED = b'{"status":"COMPLETED","request_id":"x"}'
QUEUED: list[tuple[str, str, str, Handler, tuple[int, int, int]]] = [
    ("its result, with a bill", "GET", JOB, bills("3"), (1, 30_000, 0)),
    ("its result, without", "GET", JOB, fine, ESTIMATE),
    ("an error as its result", "GET", JOB, responds(422), ESTIMATE),
    ("an error with a bill", "GET", JOB, bills("1", 422), (1, 10_000, 0)),
    ("no result yet", "GET", JOB, responds(400), UNFINISHED),
    ("no result yet, accepted", "GET", JOB, bills("0", 202), UNFINISHED),
    ("no such job", "GET", JOB, responds(404), UNFINISHED),
    ("a failure", "GET", JOB, responds(500), UNFINISHED),
    ("the status of an end", "GET", f"{JOB}/status", responds(200, COMPLETED), ESTIMATE),
    ("a status", "GET", f"{JOB}/status", responds(202, b'{"status": "IN_PROGRESS"}'), UNFINISHED),
    ("a refused status", "GET", f"{JOB}/status", responds(404, COMPLETED), UNFINISHED),
    ("events", "GET", f"{JOB}/status/stream", status_events("IN_QUEUE", "IN_PROGRESS"), UNFINISHED),
    ("events up to the end", "GET", f"{JOB}/status/stream", status_events("IN_QUEUE", "COMPLETED"), ESTIMATE),
    ("a cancel", "PUT", f"{JOB}/cancel", responds(202, b'{"status": "CANCELLATION_REQUESTED"}'), ESTIMATE),
    ("a refused cancel", "PUT", f"{JOB}/cancel", responds(400), UNFINISHED),
]


@pytest.mark.parametrize(("method", "target", "after", "sums"), [row[1:] for row in QUEUED], ids=[r[0] for r in QUEUED])
@pytest.mark.gen_test
async def test_a_queued_job(
    setup: Setup,
    store: FakeStore,
    protocol: str,
    method: str,
    target: str,
    after: Handler,
    sums: tuple[int, int, int],
) -> None:
    """A queued job is unfinished until fal says so, and a second call of the same kind does not touch the store."""
    upstream = await setup.upstream(queue(after), protocol)
    port = setup.proxy(upstream, allow_cancel=True, **LIMITS)
    await submit(port, store)
    assert store.sums() == UNFINISHED
    await call(port, method, target=target)
    assert store.sums() == sums
    operations = len(store.done)
    await call(port, method, target=target)
    assert len(store.done) == operations
    # Another process knows the job from the store alone.
    elsewhere = setup.proxy(upstream, allow_cancel=True, **LIMITS)
    await call(elsewhere, method, target=target)
    assert store.sums() == sums


@pytest.mark.gen_test
async def test_the_price_of_a_job_is_known_elsewhere(setup: Setup, store: FakeStore) -> None:
    """The URL of a result lacks the endpoint's path, so the store has the endpoint whose price counts."""
    upstream = await setup.upstream(queue(bills("3")))
    await submit(setup.proxy(upstream, **LIMITS), store)
    await call(setup.proxy(upstream, **LIMITS), "GET", target=JOB)
    assert store.sums() == (1, 30_000, 0)


SUBMITS: list[tuple[str, Handler, str | None, tuple[int, int, int]]] = [
    ("an id in the body", responds(200, SUBMITTED, [*JSON, ("x-fal-request-id", "other")]), JOB_ID, UNFINISHED),
    ("an id in the head", responds(200, b"{}", [*JSON, ("x-fal-request-id", JOB_ID)]), JOB_ID, UNFINISHED),
    ("an odd id", responds(200, b'{"request_id": "../x"}'), None, UNFINISHED),
    ("an id that is no text", responds(200, b'{"request_id": 7}'), None, UNFINISHED),
    ("a list", responds(201, b"[1]"), None, UNFINISHED),
    ("a bill", bills("0", 200, SUBMITTED), JOB_ID, UNFINISHED),
    ("a refusal", responds(422), None, ESTIMATE),
    ("no model", responds(404), None, GIVEN_BACK),
]


@pytest.mark.parametrize(("handler", "job_id", "sums"), [row[1:] for row in SUBMITS], ids=[row[0] for row in SUBMITS])
@pytest.mark.gen_test
async def test_a_submit(
    setup: Setup, store: FakeStore, handler: Handler, job_id: str | None, sums: tuple[int, int, int]
) -> None:
    """A submit that fal takes is a job in the store by fal's id, whatever else its response says."""
    assert (await call(setup.proxy(await setup.upstream(handler), **LIMITS), target=QUEUE)).status < 500
    assert store.sums() == sums
    assert (job_id in store.jobs) == (job_id is not None)


# Clients that leave.


@pytest.mark.parametrize("target", [RUN, QUEUE])
@pytest.mark.gen_test
async def test_a_client_that_leaves_frees_nothing(setup: Setup, store: FakeStore, protocol: str, target: str) -> None:
    """A call that may run is unfinished and keeps its estimate when its client leaves."""
    gate = Gate()
    upstream = await setup.upstream(gate, protocol)
    port, backend = setup.proxy_and_backend(upstream, **LIMITS)
    client = await RawClient.open(port)
    await client.send(target=target)
    await arrived(upstream, 1)
    client.leave()
    await eventually(lambda: backend().slots.in_use == 0)
    assert store.sums() == UNFINISHED
    gate.open.set()


@pytest.mark.gen_test
async def test_a_client_that_leaves_while_the_store_is_asked(setup: Setup, store: FakeStore) -> None:
    """A call that has not left when its client leaves is given back, and never leaves."""
    store.gate = asyncio.Event()
    port, backend = setup.proxy_and_backend(await setup.upstream(must_not_be_called), **LIMITS)
    client = await RawClient.open(port)
    await client.send()
    await eventually(lambda: "reserve" in store.done)
    client.leave()
    await asyncio.sleep(0.05)
    store.gate.set()
    await eventually(lambda: "give_back" in store.done and backend().slots.in_use == 0)
    assert store.sums() == GIVEN_BACK


@pytest.mark.gen_test
async def test_a_client_that_leaves_before_its_body_has_come(setup: Setup, store: FakeStore) -> None:
    """A call without its whole body is not reserved."""
    port, backend = setup.proxy_and_backend(await setup.upstream(must_not_be_called), **LIMITS)
    client = await RawClient.open(port)
    client.writer.write(request(body=b"x" * 1000)[:-1])
    await eventually(lambda: _in_use(backend) == 1)
    client.leave()
    await eventually(lambda: _in_use(backend) == 0)
    assert "reserve" not in store.done


def _in_use(backend: Callable[[], Any]) -> int:
    try:
        return int(backend().slots.in_use)
    except ValueError:
        return -1


# Refusals.

REFUSALS: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    ("minute", {"jobs_per_user": "2/minute"}, 429, r"Your limit of 2 jobs a minute is used up", "1-60"),
    ("hour", {"jobs_per_user": "2/hour"}, 429, r"Your limit of 2 jobs an hour is used up", "1-3600"),
    (
        "day",
        {"jobs_per_user": "2/day"},
        402,
        "Your limit of 2 jobs a day is used up; the next job can start at 20",
        None,
    ),
    ("month", {"jobs_per_user": "2/month"}, 402, "Your limit of 2 jobs a month is used up", None),
    ("all", {"jobs": "2/day"}, 402, "The number of jobs of all users together for this day is used up", None),
    ("budget", {"budget_per_user": "0.05/day", "prices": PRICES}, 402, r"Your budget of $0.05 a day is used up", None),
    ("budget of all", {"budget": "0.04/month", "prices": PRICES}, 402, "The budget of all users together", None),
]


@pytest.mark.parametrize(("fields", "status", "message", "retry"), [row[1:] for row in REFUSALS])
@pytest.mark.gen_test
async def test_a_refusal(
    setup: Setup, store: FakeStore, fields: dict[str, Any], status: int, message: str, retry: str | None
) -> None:
    """The third call has no room, never reaches fal, and is told which limit it was and when it opens."""
    upstream = await setup.upstream(fine)
    port = setup.proxy(upstream, **fields)
    for _ in range(2):
        assert (await call(port)).status == 200
    response = await call(port)
    assert response.status == status
    assert response.message.startswith(message)
    assert len(upstream.exchanges) == 2
    after = response.header("retry-after")
    if retry is None:
        assert after is None
    else:
        least, _, most = retry.partition("-")
        assert int(least) <= int(after or 0) <= int(most)
    assert store.refused == 1


@pytest.mark.gen_test
async def test_unfinished_jobs(setup: Setup, store: FakeStore) -> None:
    """A third job at once is 429; it may start as soon as another has ended."""
    port = setup.proxy(await setup.upstream(queue(fine)), unfinished_jobs_per_user=1)
    await submit(port, store)
    refused = await call(port, target=QUEUE)
    assert (refused.status, refused.header("retry-after")) == (429, "5")
    assert refused.message == "You may have 1 unfinished job at once; wait until one has ended."
    assert refused.header("ratelimit") == '"unfinished-jobs-per-user";r=0'
    await call(port, "GET", target=JOB)
    assert (await call(port, target=QUEUE)).status == 200


@pytest.mark.gen_test
async def test_a_page_can_read_what_is_left(setup: Setup, store: FakeStore) -> None:
    """A paid call's response says how much is left of the user's own limits, and pages of other origins may read it."""
    upstream = await setup.upstream(responds(200, b"{}", [*JSON, ("ratelimit", '"fals-own";r=1')]))
    port = setup.proxy(upstream, jobs="9/day", allowed_origins=["https://a.example"], **LIMITS)
    response = await call(port, headers=["Origin: https://a.example"])
    policy, state = response.header("ratelimit-policy"), response.header("ratelimit")
    assert policy == (
        '"jobs-per-user-day";q=10;w=86400, "budget-per-user-day";q=500;qu="cents";w=86400, '
        '"unfinished-jobs-per-user";q=5;qu="concurrent-requests"'
    )
    assert state is not None
    assert state.startswith('"jobs-per-user-day";r=9;t=')
    assert '"budget-per-user-day";r=498;t=' in state
    assert '"unfinished-jobs-per-user";r=5' in state
    assert "ratelimit" in (response.header("access-control-expose-headers") or "")


@pytest.mark.parametrize("whose", ["jobs_per_user", "jobs"])
@pytest.mark.slow
@pytest.mark.gen_test
async def test_a_crowd_gets_no_job_more(setup: Setup, store: FakeStore, protocol: str, whose: str) -> None:
    """Of 200 clients at once exactly as many pass as are allowed."""
    upstream = await setup.upstream(fine, protocol)
    port = setup.proxy(upstream, **{whose: "37/day"})
    clients = [await RawClient.open(port) for _ in range(200)]
    await asyncio.gather(*(client.send() for client in clients))
    responses = await asyncio.gather(*(client.response() for client in clients))
    await asyncio.gather(*(client.close() for client in clients))
    assert sorted(response.status for response in responses) == [200] * 37 + [402] * 163
    assert len(upstream.exchanges) == 37


@pytest.mark.gen_test
async def test_two_proxies_count_in_one_file(setup: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two proxies that share a file give out no job more than one would, and the account has all of it."""
    monkeypatch.setattr("tornado_fal_proxy.relay.backend.make_store", lambda config: SqliteStore(tmp_path / "spent.db"))
    upstream = await setup.upstream(queue(bills("3")))
    options = LIMITS | {"identify": by_header, "jobs_per_user": "20/day", "unfinished_jobs_per_user": None}
    ports = [setup.proxy(upstream, **options) for _ in range(2)]
    responses = await asyncio.gather(*(call(ports[n % 2], headers=["X-User: ann"]) for n in range(60)))
    assert sorted(response.status for response in responses) == [200] * 20 + [402] * 40
    await call(ports[0], target=QUEUE, headers=["X-User: bob"])
    assert (await call(ports[1], "GET", target=JOB)).status == 200
    await setup.close()
    setup._closers.clear()
    store = SqliteStore(tmp_path / "spent.db")
    await store.open()
    rows = (await store.usage("0000-01-01", "9999-12-31")).rows
    assert [(row.user, row.endpoint, row.jobs, row.refused, row.units, row.cost) for row in rows] == [
        ("ann", "fal-ai/flux/dev", 20, 40, 40_000_000, 400_000),
        ("bob", "fal-ai/flux/dev", 1, 0, 3_000_000, 30_000),
    ]
    await store.close()


@pytest.mark.gen_test
async def test_a_budget_needs_a_price(setup: Setup, store: FakeStore) -> None:
    """An endpoint without a price is refused where a budget applies."""
    port = setup.proxy(await setup.upstream(must_not_be_called), budget="1/day", prices={"fal-ai/flux/**": 1})
    response = await call(port, target="https://fal.run/fal-ai/other")
    assert response.status == 403
    assert "prices" in response.message


# Notes that make no room wait for the next reservation.
WITHOUT_UNFINISHED = LIMITS | {"unfinished_jobs_per_user": None}
LATE: list[tuple[str, str, Handler, dict[str, Any], bool]] = [
    ("a bill as estimated", RUN, bills("2"), WITHOUT_UNFINISHED, True),
    ("a larger bill", RUN, bills("3"), WITHOUT_UNFINISHED, True),
    ("no bill", RUN, fine, WITHOUT_UNFINISHED, True),
    ("a smaller bill", RUN, bills("1"), WITHOUT_UNFINISHED, False),
    ("a smaller bill without a budget", RUN, bills("1"), WITHOUT_UNFINISHED | {"budget_per_user": None}, True),
    ("a failure", RUN, responds(500), WITHOUT_UNFINISHED, False),
    ("unfinished jobs", RUN, bills("2"), LIMITS, False),
    ("a job", QUEUE, bills("0", 200, SUBMITTED), WITHOUT_UNFINISHED, False),
]


@pytest.mark.parametrize(
    ("target", "handler", "limits", "late"), [row[1:] for row in LATE], ids=[row[0] for row in LATE]
)
@pytest.mark.gen_test
async def test_what_makes_no_room_is_written_late(
    setup: Setup,
    store: FakeStore,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    handler: Handler,
    limits: dict[str, Any],
    late: bool,
) -> None:
    """A response waits for its note only where another call may have room then, or where polls need the job.

    A crash before a late note leaves the estimate. The note goes to the store before the next reservation.
    """
    monkeypatch.setattr("tornado_fal_proxy.spending.ledger.NOTE_DELAY_S", 3600)
    port = setup.proxy(await setup.upstream(handler), **limits)
    for number in (1, 2):
        await call(port, target=target)
        written = [name for name in store.done if name not in ("open", "prune", "reserve")]
        assert len(written) == (number - 1 if late else number)
        if late:
            assert store.sums()[0] == number
            (estimate,) = [each.cost for each in store.jobs.values() if not (each.settled or each.ended)]
            assert estimate == 20_000
    names = [name for name in store.done if name not in ("open", "prune")]
    assert names == ["reserve", written[0], "reserve", *written[1:]]


@pytest.mark.gen_test
async def test_late_notes_are_written_without_a_reservation(setup: Setup, store: FakeStore) -> None:
    """A note does not wait for a call that never comes, nor for the end of the process."""
    port, backend = setup.proxy_and_backend(await setup.upstream(bills("3")), **WITHOUT_UNFINISHED)
    await call(port)
    await eventually(lambda: store.sums() == (1, 30_000, 0))
    await call(port)
    await backend().ledger.flush()
    assert store.sums() == (2, 60_000, 0)


# The store fails.


@pytest.mark.gen_test
async def test_a_store_that_fails(setup: Setup, store: FakeStore, logs: Logs) -> None:
    """Paid calls are 503 while the store fails, a line of the log says why, and then all is as before."""
    logs.expect("WARNING tornado_fal_proxy: store failed: the disk is full; paid calls are answered 503")
    port = setup.proxy(await setup.upstream(fine), **LIMITS)
    store.failing = "the disk is full"
    for _ in range(2):
        response = await call(port)
        assert (response.status, response.header("retry-after")) == (503, "2")
    assert len([line for line in logs.lines if "store failed" in line]) == 1
    store.failing = ""
    assert (await call(port)).status == 200
    assert store.sums() == ESTIMATE


@pytest.mark.gen_test
async def test_calls_may_pass_while_the_store_fails(setup: Setup, store: FakeStore, logs: Logs) -> None:
    """With on_store_failure=allow paid calls, and reads of jobs, pass uncounted."""
    logs.expect("store failed: gone; paid calls pass uncounted")
    port = setup.proxy(await setup.upstream(fine), on_store_failure="allow", own_jobs_only=True, **LIMITS)
    store.failing = "gone"
    response = await call(port)
    assert (response.status, response.header("ratelimit")) == (200, None)
    assert (await call(port, "GET", target=JOB)).status == 200


@pytest.mark.gen_test
async def test_failures_are_counted(setup: Setup, store: FakeStore, logs: Logs) -> None:
    """Each operation that fails is counted under its name, for the metrics."""
    logs.expect("store failed: gone; paid calls are answered 503")
    rules = setup.config(await setup.upstream(must_not_be_called), **LIMITS).spending
    assert rules is not None
    ledger = Ledger(rules, store)
    store.failing = "gone"
    with pytest.raises(StoreUnavailable):
        await ledger.reserve(rules.terms("ann", rules.default, "fal-ai/flux/dev", None, 0, "1"))
    with pytest.raises(StoreUnavailable):
        await ledger.may_read("2", "ann")
    with pytest.raises(StoreFailed):
        await ledger.usage("2026-11-27", "2026-11-27")
    ledger.note(Note(END, "1"))
    await ledger.flush()
    for noted in (
        *(ledger.note_now(Note(SETTLE, "1", 1, 1)), ledger.note_now(Note(GIVE_BACK, "1"))),
        *(ledger.submitted("1", "3", "ann", "a/b"), ledger.end_job("3"), ledger.settle_job("3", 1)),
    ):
        await ledger.wait(noted)
    await ledger.flush()
    assert ledger.failures == dict.fromkeys(OPERATIONS, 1) | {"end": 2, "settle": 2}
    await ledger.closed()


@pytest.mark.parametrize("why", ["open", "operation", "too much waits"])
@pytest.mark.gen_test
async def test_what_failed_can_be_done_later(
    setup: Setup, store: FakeStore, logs: Logs, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """A job whose end, or bill, the store could not take is ended, or settled, by the next call that tells of it."""
    logs.expect("store failed: ")
    rules = setup.config(await setup.upstream(must_not_be_called), **LIMITS).spending
    assert rules is not None
    ledger = Ledger(rules, store)
    if why != "open":
        await ledger.usage("2026-11-27", "2026-11-27")
    store.failing = "gone"
    with monkeypatch.context() as patch:
        if why == "too much waits":
            patch.setattr("tornado_fal_proxy.spending.ledger.MAX_PENDING", 0)
        await ledger.wait(ledger.end_job("1"))
        await ledger.wait(ledger.settle_job("2", 1))
        await ledger.wait(ledger.settle_job("1", 1))
    store.failing = ""
    store.done.clear()
    known = ledger.known("1"), ledger.known("2")
    assert [(each.ended, each.settled) for each in known] == [(False, False)] * 2
    known[1].endpoint = "a/b"
    await ledger.wait(ledger.end_job("1"))
    await ledger.wait(ledger.settle_job("2", 1))
    assert ("end" in store.done, "settle" in store.done) == (True, True)
    assert (ledger.end_job("1"), ledger.settle_job("2", 1)) == (None, None)
    await ledger.closed()


@pytest.mark.gen_test
async def test_the_last_notes_of_a_shutdown(setup: Setup, store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that take all the time of a shutdown still leave their last notes in the store."""
    monkeypatch.setattr("tornado_fal_proxy.spending.ledger.CLOSE_TIMEOUT_S", 0.03)
    rules = setup.config(await setup.upstream(must_not_be_called), **LIMITS).spending
    assert rules is not None
    ledger = Ledger(rules, store)
    await ledger.usage("2026-11-27", "2026-11-27")
    ledger.unfinished = 1
    ledger.close()
    monkeypatch.setattr("tornado_fal_proxy.spending.ledger.NOTE_DELAY_S", 10)
    ledger.note(Note(END, "1"))
    await ledger.closed()
    await eventually(lambda: "end" in store.done)


@pytest.mark.gen_test
async def test_a_store_that_hangs_holds_up_no_result(
    setup: Setup, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response waits for its note in the store for a moment only."""
    monkeypatch.setattr("tornado_fal_proxy.spending.ledger.MAX_WAIT_S", 0.01)
    upstream = await setup.upstream(fine)
    port = setup.proxy(upstream, **LIMITS)

    async def hang(exchange: Exchange) -> None:
        store.gate = asyncio.Event()
        await fine(exchange)

    upstream.handler = hang
    assert (await call(port)).status == 200
    assert store.sums() == UNFINISHED
    assert store.gate is not None
    store.gate.set()
    await eventually(lambda: store.sums() == ESTIMATE)


# Users, plans and tags.


def by_header(handler: Any, target: Target) -> Any:
    user = handler.request.headers.get("X-User")
    plan = handler.request.headers.get("X-Plan")
    return (user, plan) if plan else user


async def by_header_later(handler: Any, target: Target) -> Any:
    await asyncio.sleep(0)
    return by_header(handler, target)


@pytest.mark.parametrize("identify", [by_header, by_header_later])
@pytest.mark.gen_test
async def test_each_user_has_limits_of_their_own(setup: Setup, store: FakeStore, identify: Any) -> None:
    """Ids are kept apart, whatever their characters, from each other and from addresses."""
    port = setup.proxy(await setup.upstream(fine), identify=identify, jobs_per_user="1/day")
    users = ["ann", "Ann", "a/jobs/day/0", "a", "a b", "127.0.0.1", "x" * 128, "all", "user/a", "%2F", "' OR 1=1 --"]
    for status in (200, 402):
        for user in users:
            assert (await call(port, headers=[f"X-User: {user}"])).status == status
        assert (await call(port)).status == status
    assert {kept.job.user for kept in store.jobs.values()} == {*users, "address:127.0.0.1"}


async def unawaited() -> bool:
    return True


async def forgets_to_await(*_args: Any) -> Any:
    return unawaited()


def fails(*_args: Any) -> Any:
    raise ZeroDivisionError("secret")


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"identify": lambda handler, target: 7}, "identify returned a int"),
    ({"identify": lambda handler, target: ""}, "identify returned an id that is not"),
    ({"identify": lambda handler, target: "x" * 129}, "identify returned an id that is not"),
    ({"identify": lambda handler, target: "a\x00b"}, "identify returned an id that is not"),
    ({"identify": lambda handler, target: "address:1.2.3.4"}, "identify returned an id that begins"),
    ({"identify": lambda handler, target: ("ann", 7)}, "identify returned a int as a plan"),
    ({"identify": lambda handler, target: ("ann", "gold")}, "a plan that plans does not have: gold"),
    ({"identify": lambda handler, target: ("ann", "free", 1)}, "identify returned a tuple"),
    ({"identify": fails}, "identify raised ZeroDivisionError"),
    ({"identify": forgets_to_await}, "an await is missing"),
    ({"authorize": forgets_to_await}, "an await is missing"),
    ({"resolve_key": forgets_to_await}, "an await is missing"),
    ({"check_input": forgets_to_await}, "an await is missing"),
    ({"check_input": fails}, "check_input raised ZeroDivisionError"),
    ({"input_units": forgets_to_await}, "an await is missing"),
    ({"input_units": fails}, "fails raised ZeroDivisionError"),
    *[
        ({"input_units": lambda target, fields, value=value: value}, "input_units: its result must be a number")
        for value in (None, -1, True, float("nan"), float("inf"), 1e9, "x", [1])
    ],
]


@pytest.mark.parametrize(("fields", "line"), MISTAKES)
@pytest.mark.gen_test
async def test_a_mistake_of_the_operator_is_never_a_yes(
    setup: Setup, store: FakeStore, logs: Logs, fields: dict[str, Any], line: str
) -> None:
    """A function with an unusable result is answered 500, and nothing leaves or stays reserved."""
    logs.expect(f"ERROR tornado_fal_proxy: refused: 500 POST: .*{line}")
    port = setup.proxy(await setup.upstream(must_not_be_called), **fields, jobs_per_user="1/day")
    response = await call(port)
    assert (response.status, response.message) == (500, "The proxy is not configured correctly.")
    assert store.sums() == GIVEN_BACK


@pytest.mark.gen_test
async def test_plans(setup: Setup, store: FakeStore) -> None:
    """A plan has what it names, and the rest from the options."""
    plans = {
        "free": {"jobs_per_user": "1/day", "allowed_endpoints": ["fal-ai/flux/dev"]},
        "paid": {"jobs_per_user": "none"},
        "other": {"unfinished_jobs_per_user": 3},
    }
    port = setup.proxy(await setup.upstream(fine), identify=by_header, plans=plans, jobs_per_user="2/day")
    for plan, statuses in (("free", [200, 402, 402]), ("paid", [200, 200, 200]), ("other", [200, 200, 402])):
        headers = [f"X-User: of {plan}", f"X-Plan: {plan}"]
        assert [(await call(port, headers=headers)).status for _ in range(3)] == statuses
    headers = ["X-User: ann", "X-Plan: free"]
    assert (await call(port, headers=headers, target="https://fal.run/fal-ai/other")).status == 403
    token = b'{"allowed_apps": ["other"], "token_expiration": 60}'
    assert (await call(port, body=token, headers=headers, target=TOKEN)).status == 403
    assert (await call(port, "GET", headers=headers)).status == 200


@pytest.mark.gen_test
async def test_units_count_as_jobs(setup: Setup, store: FakeStore) -> None:
    """A call for four pictures counts as four jobs, and one for more than there are is told so."""

    def pictures(target: Target, fields: dict[str, Any]) -> Any:
        assert target.endpoint == "fal-ai/flux/dev"
        return fields.get("num_images", 1)

    port = setup.proxy(await setup.upstream(fine), jobs_per_user="5/day", count="units", input_units=pictures)
    assert (await call(port, body=b'{"num_images": 4}')).status == 200
    assert (await call(port, body=b'{"num_images": 2}')).status == 402
    assert (await call(port, body=b'{"num_images": 0}')).status == 200
    never = await call(port, body=b'{"num_images": 6}')
    assert (never.status, never.message) == (
        402,
        "Your limit of 5 jobs a day has no room for a call that counts as 6 jobs.",
    )
    assert sum(store.used.values()) == 5
    for body in (b"", b"[", b"[]", b"[" * 100_000):
        assert (await call(port, body=body)).status == 402


@pytest.mark.gen_test
async def test_the_input_of_a_get_is_its_query(setup: Setup, store: FakeStore) -> None:
    """A GET that runs a model is estimated by its query, whatever is in a body."""
    seen: list[Any] = []

    def pictures(target: Target, fields: dict[str, Any]) -> Any:
        seen.append(fields)
        return fields.get("num_images", 1)

    port = setup.proxy(await setup.upstream(fine), jobs_per_user="5/day", count="units", input_units=pictures)
    assert (await call(port, "GET", target=f"{RUN}?num_images=4&prompt=a+%C3%A4&a=1&a=2&b=")).status == 200
    headers = ["content-type: application/json", "content-length: 16"]
    client = await RawClient.open(port)
    client.writer.write(request("GET", target=f"{RUN}?num_images=2", headers=headers) + b'{"num_images":1}')
    assert (await client.response()).status == 402
    await client.close()
    assert (await call(port, "GET", target=RUN)).status == 200
    assert seen == [{"num_images": "4", "prompt": "a \u00e4", "a": ["1", "2"], "b": ""}, {"num_images": "2"}, {}]


@pytest.mark.gen_test
async def test_tags(setup: Setup) -> None:
    """Fal gets the user's tag on paid calls, and never the client's own; no store is needed."""
    upstream = await setup.upstream(fine)
    port = setup.proxy(upstream, identify=by_header, tag_users=True)
    own = ["x-fal-tags: user=boss", "Connection: keep-alive, x-fal-tags"]
    for user in ("ann", "a,fal.b=c", None):
        headers = own if user is None else [*own, f"X-User: {user}"]
        assert (await call(port, headers=headers)).status == 200
    await call(port, "GET", headers=own)
    tags = [[value for name, value in each.headers if name.lower() == b"x-fal-tags"] for each in upstream.exchanges]
    assert tags[0] == [b"user=ann"]
    assert all(len(each) == 1 and each[0].startswith(b"user=sha256-") for each in tags[1:3])
    assert tags[3] == []


@pytest.mark.gen_test
async def test_jobs_of_others(setup: Setup, store: FakeStore) -> None:
    """Status, result and cancel of a job are 404 for everyone but its user, in every spelling and every process."""
    upstream = await setup.upstream(queue(fine))
    options = {"identify": by_header, "own_jobs_only": True, "allow_cancel": True}
    ports = [setup.proxy(upstream, **options) for _ in range(2)]
    await submit(ports[0], store, headers=["X-User: ann"])
    for port in ports:
        for method, target in [("GET", JOB), ("GET", f"{JOB}/status"), ("PUT", f"{JOB}/cancel")]:
            assert (await call(port, method, target=target, headers=["X-User: ann"])).status == 200
            for other in ("X-User: bob", "X-User: Ann", "X-Other: none"):
                response = await call(port, method, target=target, headers=[other])
                assert (response.status, response.message) == (404, "No job of yours has this id.")
        for spelling in (JOB.replace("/requests", "//requests"), JOB.replace("re", "%72e"), f"{JOB}/", f"{JOB}/other"):
            assert (await call(port, "GET", target=spelling, headers=["X-User: ann"])).status == 404
        assert (await call(port, "GET", target=f"{JOB}0", headers=["X-User: ann"])).status == 404


@pytest.mark.gen_test
async def test_a_check_of_the_input(setup: Setup, store: FakeStore) -> None:
    """check_input sees the whole body of a paid call, and may refuse it before anything leaves or is reserved."""
    seen: list[bytes] = []

    class Checking(FalProxyHandler):
        async def check_input(self, target: Target, body: bytes) -> None:
            seen.append(body)
            if b"cat" in body:
                raise HTTPError(400, reason="No cats.")
            if b"own" in body:
                self.finish("{}")

    upstream = await setup.upstream(fine)
    for fields in ({}, LIMITS):
        rule = (ROUTE, Checking, {"config": setup.config(upstream, **fields)})
        port = setup.serve(Application([rule], log_function=lambda handler: None))
        refused = await call(port, body=b'"cat"')
        assert (refused.status, refused.message) == (400, "No cats.")
        assert (await call(port, body=b'"own"')).body == b"{}"
        assert (await call(port, target=UPLOAD, body=b'"cat"')).status == 200
        assert (await call(port, body=b'"dog"')).status == 200
    assert seen == [b'"cat"', b'"own"', b'"dog"'] * 2
    assert store.done.count("reserve") == 1


@pytest.mark.gen_test
async def test_facts_of_a_call(setup: Setup, store: FakeStore) -> None:
    """on_call_end gets user, plan, endpoint, units, cost and job; the fields of a log line appear with an option."""
    ended: list[Call] = []

    class Noting(FalProxyHandler):
        def on_call_end(self, call: Call) -> None:
            ended.append(call)

    upstream = await setup.upstream(queue(bills("3")))
    for fields in ({}, LIMITS | {"identify": by_header}):
        rule = (ROUTE, Noting, {"config": setup.config(upstream, **fields)})
        port = setup.serve(Application([rule], log_function=lambda handler: None))
        await call(port, target=QUEUE, headers=["X-User: ann"])
        await call(port, "GET", target=JOB)
    await eventually(lambda: len(ended) == 4)
    assert "user" not in ended[0].fields("")
    submitted, result = (call.fields("") for call in ended[2:])
    spent = ("user", "plan", "endpoint", "units", "cost", "job_id")
    assert [submitted[name] for name in spent] == ["ann", None, "fal-ai/flux/dev", 2.0, 0.02, JOB_ID]
    assert [result[name] for name in spent] == ["ann", None, "fal-ai/flux/dev", 3.0, 0.03, JOB_ID]


@pytest.mark.gen_test
async def test_facts_of_a_call_that_cannot_leave(setup: Setup, store: FakeStore, logs: Logs) -> None:
    """A call that is given back is reported as one of no units and no cost."""
    logs.expect("upstream error: 502")
    ended: list[Call] = []

    class Noting(FalProxyHandler):
        def on_call_end(self, call: Call) -> None:
            ended.append(call)

    upstream = await setup.upstream(must_not_be_called)
    await upstream.close()
    rule = (ROUTE, Noting, {"config": setup.config(upstream, **LIMITS)})
    assert (await call(setup.serve(Application([rule], log_function=lambda handler: None)))).status == 502
    fields = ended[0].fields("")
    assert [fields[name] for name in ("units", "cost", "billed")] == [0, 0, False]


@pytest.mark.gen_test
async def test_the_end_waits_for_the_store(setup: Setup, store: FakeStore) -> None:
    """What calls have spent is in the store when flush_spending returns, and then the store is closed."""
    gate = Gate()
    upstream = await setup.upstream(gate)
    port = setup.proxy(upstream, **LIMITS)
    asked = asyncio.ensure_future(call(port))
    await arrived(upstream, 1)
    gate.open.set()
    assert (await asked).status == 200
    assert store.is_open
    await setup.close()
    setup._closers.clear()
    assert not store.is_open
    assert store.sums() == ESTIMATE
