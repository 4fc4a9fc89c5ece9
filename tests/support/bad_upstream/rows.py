"""One row of a table of bad upstreams: what the upstream does, and what must come of it for each kind of call."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from _pytest.mark import ParameterSet
from tornado.web import Application

from tests.support.bad_upstream.script import Script, own_response
from tests.support.bad_upstream.server import BadUpstream
from tests.support.certificates import Authority
from tests.support.logs import Logs
from tests.support.proxy import ROUTE, Setup
from tests.support.raw_client import RESULT, TARGET, Response, call
from tests.support.waiting import TIMEOUT_S, eventually
from tornado_fal_proxy import Call, FalProxyHandler

__all__ = [
    "CUT",
    "KINDS",
    "NOTHING",
    "OK",
    "OWN",
    "PAID_GET_WAYS",
    "STREAM_WAYS",
    "WAYS",
    "Row",
    "Want",
    "names_of",
    "play",
]

# Which call is made, and whether a second one would be paid again.
KINDS = {
    "run": ("POST", TARGET, True),
    "run by GET": ("GET", TARGET, True),
    "submit by GET": ("GET", "https://queue.fal.run/fal-ai/flux/dev", True),
    "read": ("GET", RESULT, False),
    "stream": ("POST", f"{TARGET}/stream", True),
    "status": ("GET", f"{RESULT}/status/stream", False),
}
# Each kind of call, on a new connection with all that is written at once, and on a used one, step by step. The first is
# fast and stands for the others, because all together take some minutes.


def _ways(*kinds: str) -> list[ParameterSet]:
    first, *others = ((kind, way) for kind in kinds for way in ("new", "used"))
    slow = [pytest.param(*other, id=", ".join(other), marks=pytest.mark.slow) for other in others]
    return [pytest.param(*first, id=", ".join(first)), *slow]


WAYS, PAID_GET_WAYS, STREAM_WAYS = _ways("run", "read"), _ways("run by GET", "submit by GET"), _ways("stream", "status")


def names_of(rows: Mapping[str, "Row"]) -> list[ParameterSet]:
    """Return the names as parameters. A row that stalls is slow, because the proxy must wait."""
    return [pytest.param(name, marks=[pytest.mark.slow] if row.stalls else []) for name, row in rows.items()]


@dataclass(frozen=True)
class Want:
    """The right response: a status and a body, or else the proxy's own error, or perhaps an aborted response."""

    status: int = 0
    body: bytes | None = b""
    may_abort: bool = False


#: The response of an upstream that has no script.
OWN = Want(200, None)
OK = Want(200, b"{}")
#: No response that could be passed on: a status of the proxy's own.
NOTHING = Want()
#: A response that ended too early: as NOTHING where the response was buffered, else it is aborted.
CUT = Want(may_abort=True)


@dataclass(frozen=True)
class Row:
    """``error`` is the name in the log. ``reads`` limits how often a call is sent of which a second is not paid.

    By default it is sent once more by libcurl, on a connection that was used before, and once more by the proxy, if no
    byte of a response has come. ``read`` and ``read_error`` are what such a call gets where that differs.
    """

    script: Script
    want: Want
    error: str = ""
    reads: int = 0
    read: Want | None = None
    read_error: str | None = None
    stalls: bool = False
    body: bytes = b"{}"
    greeting: bytes | None = None


async def play(
    setup: Setup, authority: Authority, logs: Logs, protocol: str, row: Row, kind: tuple[str, str, bool], way: str
) -> None:
    """Make the call on a proxy of its own, and then one of each method, which must get their own responses."""
    if row.greeting is not None and way == "used":
        return
    method, target, paid = kind
    calls: list[Call] = []

    class Handler(FalProxyHandler):
        def on_call_end(self, call: Call) -> None:
            calls.append(call)

    want, error, most = row.want, row.error, 1
    if not paid:
        want = row.read or want
        error = error if row.read_error is None else row.read_error
        most = row.reads or (3 if row.want == NOTHING else 1)
    async with BadUpstream(authority.context(), protocol, row.greeting) as upstream, asyncio.timeout(TIMEOUT_S):
        config = setup.config(upstream.address, idle_timeout_s=1 if row.stalls else 60)
        rule = (ROUTE, Handler, {"config": config})
        port = setup.serve(Application([rule], log_function=lambda handler: None))
        if way == "used":
            await _own(port, method, f"{target}?before")
            upstream.apart = True
        upstream.script, upstream.requests[:], calls[:] = row.script, [], []
        response = await _call(port, method, target, row.body)
        upstream.script, upstream.greeting = None, None
        upstream.responded.set()
        [ended] = await eventually(lambda: calls)
        if ended.error:
            logs.expect(rf"upstream error: \d+ {method} \S+ .* \({ended.error}\)")
        sent = len(upstream.requests)
        facts = (response and (response.status, response.body[:80]), ended.outcome, ended.error, ended.detail, sent)
        assert (ended.outcome, ended.error) == (("upstream_error", error) if error else ("ok", "")), facts
        assert sent <= most, facts
        if want.body is None:
            want = Want(want.status, own_response(f"/{target.removeprefix('https://').partition('/')[2]}"))
        _check(want, response, paid=paid, stalls=row.stalls, streams=target.endswith("/stream"))
        await upstream.scripts_are_over()
        upstream.next.set()
        for number, next_method in enumerate(("GET", "POST", "GET")):
            await _own(port, next_method, f"{RESULT if next_method == 'GET' else TARGET}?after={number}")


def _check(want: Want, response: Response | None, *, paid: bool, stalls: bool, streams: bool) -> None:
    if response is None:
        assert want.may_abort, "aborted"
        assert not paid or streams, "aborted, and so perhaps paid again"
    elif want.status:
        assert (response.status, response.body) == (want.status, want.body)
    else:
        status = 500 if paid else 504 if stalls else 502
        assert (response.status, list(json.loads(response.body))) == (status, ["message"])
        assert ("may have run" in response.message) == paid


async def _call(port: int, method: str, target: str, body: bytes) -> Response | None:
    """Return the whole response, or None where it was aborted."""
    try:
        return await call(port, method, body, target=target)
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return None


async def _own(port: int, method: str, target: str) -> None:
    response = await call(port, method, target=target)
    path = target.removeprefix("https://").partition("/")[2]
    assert (response.status, response.body) == (200, own_response(f"/{path}")), "not its own"
