"""The calls of the last minutes, which workers share."""

from typing import Any

import pytest

from tornado_fal_proxy.errors import ClientDisconnected, ConnectFailed, TargetRefused
from tornado_fal_proxy.rules.headers import ResponseHead
from tornado_fal_proxy.rules.target import parse_target
from tornado_fal_proxy.service import recent
from tornado_fal_proxy.service.recent import KINDS, MAX_FAULTS, OUTCOMES, PERIOD_S, RECENT_S, RecentCalls
from tornado_fal_proxy.telemetry import Call


def made(status: int = 200, error: BaseException | None = None, target: str = "https://fal.run/a/b") -> Call:
    """Return a call that is over; without an error it has a response of fal's with that status."""
    call = Call("POST", "id-of-the-call")
    call.target, call.relayed = parse_target(target), error is None
    if error is None:
        head: dict[str, Any] = dict.fromkeys(ResponseHead._fields)
        call.head = ResponseHead(**head | {"status": status})
    call.finish(status, error)
    return call


def test_counts_of_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of all slots come together by kind and outcome, and those that are not recent are gone."""
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    calls = RecentCalls(2)
    writers = [calls.writer(0), calls.writer(1)]
    assert set(calls.counts()) == {(kind, outcome) for kind in KINDS for outcome in OUTCOMES}
    for writer in (*writers, writers[0]):
        writer.note(made())
    writers[1].note(made(502, ConnectFailed("refused"), "https://queue.fal.run/a/b/requests/1/status"))
    now += RECENT_S - 2 * PERIOD_S
    writers[0].note(made())
    counts = {pair: count for pair, count in calls.counts().items() if count}
    assert counts == {("run", "ok"): 4, ("queue_status", "upstream_error"): 1}
    now += 2 * PERIOD_S
    assert sum(calls.counts().values()) == 1
    now += RECENT_S
    assert sum(calls.counts().values()) == 0
    writers[0].note(made())
    assert sum(calls.counts().values()) == 1


def test_the_latest_of_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an error in two workers the later one is shown, though it is later by less than a millisecond."""
    calls = RecentCalls(2)
    for slot, now in ((0, 1000.0001), (1, 1000.0), (0, 1000.0003), (1, 1000.0002)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        calls.writer(slot).note(made(502, ConnectFailed(f"at {now}")))
    [fault] = calls.faults()
    assert (fault.detail, fault.count) == ("at 1000.0003", 4)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (made(200), None),
        (made(404), None),
        (made(401), "fal responded 401"),
        (made(503), "fal responded 503"),
        (made(599), "fal responded 5xx"),
        (made(499, ClientDisconnected()), None),
        (made(502, ConnectFailed("no route")), "ConnectFailed"),
    ],
)
def test_which_calls_are_faults(call: Call, name: str | None) -> None:
    """An error is one by its name, and a response of fal's that it should not have given by its status."""
    calls = RecentCalls(1)
    calls.writer(0).note(call)
    assert [fault.name for fault in calls.faults()] == ([] if name is None else [name])


def test_the_latest_of_each_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd of one error leaves the others in sight, all workers count together, and a new worker goes on."""
    now = 1_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    calls = RecentCalls(2)
    calls.writer(0).note(made(502, ConnectFailed("no route")))
    writer = calls.writer(1)
    for number in range(3 * MAX_FAULTS):
        now += 1
        writer.note(made(412, TargetRefused(f"number {number}")))
    calls.writer(0).note(made(502, ConnectFailed("refused")))
    calls.writer(1).note(made(502, ConnectFailed("\x00 日本 \ud800" * 200)))
    found = {fault.name: (fault.count, fault.at, fault.detail[:9]) for fault in calls.faults()}
    assert found == {
        "TargetRefused": (3 * MAX_FAULTS, now, "number 14"),
        "ConnectFailed": (3, now, found["ConnectFailed"][2]),
    }
    assert {fault.request_id for fault in calls.faults()} == {"id-of-the-call"}


def test_errors_are_bounded() -> None:
    """The oldest name makes room, whatever exceptions an application raises. Nothing is read that is being written."""
    calls = RecentCalls(1)
    writer = calls.writer(0)
    for number in range(2 * MAX_FAULTS):
        writer.note(made(500, type(f"Error{number}{'x' * 300}", (Exception,), {})()))
    assert len(calls.faults()) == MAX_FAULTS
    entry = writer._entries[0]
    entry._head[recent._SEQUENCE] += 1
    assert len(calls.faults()) == MAX_FAULTS - 1
    writer = calls.writer(0)
    entry.write(5, 1, b'["New", "failed", "run", 500, "", "x"]')
    assert calls.faults()[-1].name == "New"
