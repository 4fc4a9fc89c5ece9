"""An egress proxy (https_proxy) between this proxy and fal: its own responses are never taken for fal's."""

import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tornado.web import Application

from tests.support.bad_upstream import BadUpstream, Do, EgressProxy, Script, data, head, response
from tests.support.certificates import Authority
from tests.support.logs import Logs
from tests.support.proxy import KEY, ROUTE, Setup
from tests.support.raw_client import RESULT, TARGET, Response, call
from tornado_fal_proxy import FalProxyHandler, ProxyConfig

DETAIL = b'{"detail": "a prompt is missing"}'
ENCODED = gzip.compress(DETAIL)
FIELDS = [("content-type", "application/json"), ("content-encoding", "gzip"), ("x-fal-request-id", "fal-7")]
REFUSED: dict[str, Script] = {
    "h2": (head(*FIELDS, status="422"), data(ENCODED, end=True)),
    "http/1.1": (
        response(
            *(f"{name}: {value}" for name, value in FIELDS),
            f"content-length: {len(ENCODED)}",
            status="HTTP/1.1 422 No",
            body=ENCODED,
        ),
    ),
}
# Ends the connection that was used before, and responds to the repetition on a new one.
DIES: dict[str, tuple[Do, ...]] = {
    "reset": (Do.RESET,),
    "FIN": (Do.FIN,),
    "close": (Do.CLOSE,),
}
BAD = {
    "407": b"HTTP/1.1 407 No\r\nproxy-authenticate: Basic realm=x\r\ncontent-length: 2\r\n\r\n{}",
    "403": b"HTTP/1.1 403 No\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>",
    "502": b"HTTP/1.1 502 No\r\n\r\n",
    "422": b"HTTP/1.1 422 No\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
    "204": b"HTTP/1.1 204 No\r\n\r\n",
    "302": b"HTTP/1.1 302 No\r\nlocation: https://fal.run/\r\n\r\n",
    "101": b"HTTP/1.1 101 No\r\n\r\n",
    "100": b"HTTP/1.1 100 Go on\r\n\r\n",
    "103 first": b"HTTP/1.1 103 Hints\r\nx-egress: 1\r\n\r\nHTTP/1.1 200 OK\r\nx-egress: 1\r\n\r\n",
    "half a head": b"HTTP/1.1 200",
    "nothing": b"",
    "no HTTP": b"\x15\x03\x01\0\2\2\x16",
    "endless": b"HTTP/1.1 403 No\r\n" + b"x-a: b\r\n" * 100_000,
}
TUNNELS = {
    "a length": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nx-egress: 1\r\n\r\n",
    "chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nx-egress: 1\r\n\r\n",
    "cookies": b"HTTP/1.1 200 OK\r\nset-cookie: a=b\r\nx-egress: 1\r\n\r\n",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nx-egress: 1\r\n\r\n",
}


@pytest.fixture(autouse=True)
def _no_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@asynccontextmanager
async def behind(
    setup: Setup, authority: Authority, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> AsyncIterator[tuple[int, EgressProxy, BadUpstream]]:
    """Serve the proxy, which reaches its upstream through an egress proxy only."""
    async with BadUpstream(authority.context(), protocol) as upstream, EgressProxy(upstream.address) as egress:
        monkeypatch.setenv("https_proxy", egress.url)
        config = ProxyConfig(key=KEY, ca_certs=authority.ca_file)
        rule = (ROUTE, FalProxyHandler, {"config": config})
        yield setup.serve(Application([rule], log_function=lambda handler: None)), egress, upstream


def check(response: Response) -> None:
    """Fail unless the response is fal's 422."""
    assert (response.status, response.body) == (422, DETAIL)
    assert response.header("content-type") == "application/json"
    assert response.header("x-fal-request-id") == "fal-7"
    assert response.header("content-encoding") is None
    assert not [name for name, _ in response.headers if name in ("x-egress", "set-cookie")]


@pytest.mark.parametrize("how", DIES)
@pytest.mark.gen_test
async def test_repetition_through_a_new_tunnel(
    setup: Setup, authority: Authority, monkeypatch: pytest.MonkeyPatch, protocol: str, how: str
) -> None:
    """A read whose kept connection dies is repeated through a new CONNECT, and the response is fal's."""
    async with behind(setup, authority, monkeypatch, protocol) as (port, egress, upstream):
        assert (await call(port, "GET")).status == 200
        upstream.script, upstream.next_script = DIES[how], REFUSED[protocol]
        check(await call(port, "GET"))
        # Over HTTP/1.1 no connection takes a second request, so the first attempt of the second call had a new one too.
        assert egress.connects == ["queue.fal.run:443"] * (2 if protocol == "h2" else 3)
        assert len(upstream.requests) == 3


@pytest.mark.parametrize("name", TUNNELS)
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_head_of_connect(
    setup: Setup, authority: Authority, monkeypatch: pytest.MonkeyPatch, protocol: str, method: str, name: str
) -> None:
    """Nothing of the head with which an egress proxy opens a tunnel is taken for fal's."""
    async with behind(setup, authority, monkeypatch, protocol) as (port, egress, upstream):
        egress.response, upstream.script = TUNNELS[name], REFUSED[protocol]
        check(await call(port, method))
        check(await call(port, method))


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_no_tunnel(
    setup: Setup, authority: Authority, logs: Logs, monkeypatch: pytest.MonkeyPatch, method: str, name: str
) -> None:
    """Where there is no tunnel nothing was sent to fal: 502, which says so, and no word of the egress proxy's."""
    async with behind(setup, authority, monkeypatch, "h2") as (port, egress, upstream):
        egress.response = BAD[name]
        logs.expect(r"upstream error: 502")
        refused = await call(port, method)
        assert (refused.status, list(json.loads(refused.body))) == (502, ["message"])
        assert "may have run" not in refused.message
        assert not upstream.requests
        target = RESULT if method == "GET" else TARGET
        assert set(egress.connects) == {f"{target.split('/')[2]}:443"}
