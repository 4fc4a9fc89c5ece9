"""The record of a call: each call has exactly one, however it ended."""

import asyncio
import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
from tornado.web import Application, HTTPError

from tests.support.logs import Logs
from tests.support.proxy import KEY, ROUTE, Setup
from tests.support.raw_client import RawClient, call, request
from tests.support.stub_handlers import EVENT, as_asked
from tests.support.waiting import eventually
from tornado_fal_proxy import FalProxyHandler, Target
from tornado_fal_proxy.telemetry import Call


class Recording(FalProxyHandler):
    """A handler that keeps the record of each call."""

    def on_call_end(self, call: Call) -> None:
        self.application.settings["calls"].append(call)

    def authorize(self, target: Target) -> Any:
        match self.request.headers.get("x-user"):
            case "unknown":
                return False
            case "banned":
                raise HTTPError(429, reason="Slow down.")
            case "lost":
                self.redirect("https://app.example/login")
                return False
            case "bug":
                raise ValueError("no")
        return True


def serve(setup: Setup, upstream: Any, **fields: Any) -> tuple[int, list[Call]]:
    calls: list[Call] = []
    rule = (ROUTE, Recording, {"config": setup.config(upstream, **fields)})
    return setup.serve(Application([rule], calls=calls, log_function=lambda handler: None)), calls


@dataclass
class Case:
    """A call, its record, and the line that it leaves in the log."""

    outcome: str
    error: str = ""
    status: int = 200
    method: str = "POST"
    path: str = "fal-ai/flux/dev"
    headers: tuple[str, ...] = ()
    body: bytes = b"{}"
    sent: int | None = None
    logged: str = ""
    leaves: str = ""  # when: before the body, waiting, reading
    broken: bool = False


CASES = {
    "a result": Case("ok", sent=3),
    "a GET": Case("ok", method="GET", sent=3),
    "a stream": Case("ok", path="fal-ai/flux/stream", sent=len(EVENT)),
    "an error of fal's": Case("ok", status=422, path="a/b/early", sent=2),
    "no response": Case(
        "upstream_error", "ConnectionLost", 500, path="a/b/resets", logged="upstream error: 500 POST .*may have run"
    ),
    "no response to a GET": Case(
        "upstream_error", "ConnectionLost", 500, "GET", "a/b/resets", logged="upstream error: 500 GET .*may have run"
    ),
    "too slow": Case(
        "upstream_error", "UpstreamTimeout", 500, path="a/b/silent", logged="upstream error: 500 POST .*may have run"
    ),
    "a broken stream": Case(
        *("upstream_error", "ConnectionLost", 200, "GET", "a/b/breaks"),
        sent=len(EVENT),
        logged="the response was aborted",
        broken=True,
    ),
    "another method": Case("refused", "MethodNotAllowed", 405, "DELETE"),
    "another target": Case("refused", "TargetRefused", 412, path="a\\b"),
    "a closed endpoint": Case("refused", "EndpointNotAllowed", 403, path="closed/model"),
    "another type": Case("refused", "UnsupportedMediaType", 415, headers=("content-encoding: gzip",)),
    "a large body": Case("refused", "BodyTooLarge", 413, body=b"[%s]" % (b"1," * 5000)),
    "an unknown user": Case("refused", "Unauthorized", 401, headers=("x-user: unknown",)),
    "one too many": Case("refused", "HTTPError", 429, headers=("x-user: banned",)),
    "a response of the application's": Case("ok", "", 302, headers=("x-user: lost",), sent=0),
    "a bug of the application's": Case(
        "failed",
        "Misconfigured",
        500,
        headers=("x-user: bug",),
        logged="refused: 500 POST: authorize raised ValueError",
    ),
    "left before the body": Case("client_disconnected", "ClientDisconnected", 499, leaves="before"),
    "left while it waited": Case("client_disconnected", "ClientDisconnected", 499, path="a/b/silent", leaves="waiting"),
    "left with half of a result": Case(
        "client_disconnected", "ClientDisconnected", 499, path="a/b/large", leaves="reading"
    ),
    "left while it read": Case(
        "client_disconnected", "ClientDisconnected", 499, "GET", "a/b/endless", sent=len(EVENT), leaves="reading"
    ),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.gen_test
async def test_each_call_is_recorded_once(setup: Setup, logs: Logs, name: str) -> None:
    """Each call has one record, with its outcome, and its response has the call's id."""
    case = CASES[name]
    upstream = await setup.upstream(as_asked)
    port, calls = serve(
        setup, upstream, max_body_bytes=9999, allowed_endpoints=("a/**", "fal-ai/**"), idle_timeout_s=1.5
    )
    if case.logged:
        logs.expect(case.logged)
    client = await RawClient.open(port)
    url = f"https://fal.run/{case.path}"
    data = request(case.method, case.body, target=url, headers=[*case.headers, "x-request-id: my-call.1"])
    client.writer.write(data[:-1] if case.leaves == "before" else data)
    response = None
    if case.leaves == "before":
        await asyncio.sleep(0.05)
        client.leave()
    elif case.leaves == "waiting":
        await eventually(lambda: upstream.exchanges)
        client.leave()
    elif case.leaves == "reading" or case.broken:
        response = await client.head()
        if case.path != "a/b/large":
            assert await client.chunk() == EVENT
        if case.leaves:
            client.leave()
        else:
            assert await client.reader.read() == b""
    else:
        response = await client.response()
    await eventually(lambda: calls)
    await client.close()
    await asyncio.sleep(0.02)
    (record,) = calls
    assert (record.outcome, record.error, record.status, record.method) == (
        case.outcome,
        case.error,
        case.status,
        "other" if case.method == "DELETE" else case.method,
    )
    assert record.request_id == "my-call.1"
    if response is not None:
        assert response.header("x-request-id") == "my-call.1"
        assert response.status == case.status or case.leaves
        if case.path != "a/b/large":
            assert record.sent_bytes == (len(response.body) if case.sent is None else case.sent)
        assert record.first_byte_s is None or 0 < record.first_byte_s <= record.seconds
    assert (record.head is not None) == (
        (case.outcome == "ok" and case.status != 302) or case.broken or case.leaves == "reading"
    )
    assert KEY not in json.dumps(record.fields("127.0.0.1"))


@pytest.mark.gen_test
async def test_a_failing_on_call_end_changes_no_response(setup: Setup, logs: Logs) -> None:
    """An on_call_end that raises is logged without the text of the exception, and the client gets its response."""

    class Raising(FalProxyHandler):
        def on_call_end(self, call: Call) -> None:
            raise ValueError(KEY)

    rule = (ROUTE, Raising, {"config": setup.config(await setup.upstream(as_asked))})
    port = setup.serve(Application([rule], log_function=lambda handler: None))
    logs.expect("on_call_end raised ValueError\n")
    assert [(await call(port, method)).status for method in ("POST", "GET", "DELETE")] == [200, 200, 405]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("5f1e-AB.c:d/e+f=_@", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("", False),
        ("two words", False),
        ('"quoted"', False),
        ("caf\xe9", False),
        ("\x1b[31m", False),
    ],
)
@pytest.mark.gen_test
async def test_request_id(setup: Setup, given: str, kept: bool) -> None:
    """The client's own id is kept if its characters allow that; otherwise a new one is made. It does not go to fal."""
    upstream = await setup.upstream(as_asked)
    port, _ = serve(setup, upstream)
    client = await RawClient.open(port)
    await client.send(headers=[f"X-Request-ID: {given}"])
    try:
        response = await client.response()
    except asyncio.IncompleteReadError:
        assert "\x1b" in given  # Tornado refuses control characters
        return
    finally:
        await client.close()
    if response.status == 400:
        assert "\x1b" in given
        return
    got = response.header("x-request-id")
    assert got is not None
    assert (got == given) is kept
    assert kept or re.fullmatch("[0-9a-f]{32}", got)
    (exchange,) = upstream.exchanges
    assert exchange.header("x-request-id") is None
