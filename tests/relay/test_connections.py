"""Connections to fal that cannot be made, and pooled ones that died while they were idle."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.certificates import Authority
from tests.support.clock import Clock
from tests.support.logs import Logs
from tests.support.proxy import KEY, Setup
from tests.support.raw_client import RESULT, TARGET, RawClient, Response, call
from tests.support.scripted_upstream import Exchange, Upstream
from tests.support.stub_handlers import JSON, fine, resets
from tests.support.tools import unused_port
from tests.support.waiting import eventually
from tornado_fal_proxy.upstream.hosts import SUSPICION_S

# Before the request could leave.

METHODS = ["GET", "POST"]


@dataclass
class Unreachable:
    """The error in the log, and the response: the same for GET and POST, because nothing can have run."""

    error: str
    message: str
    status: int = 502


async def accepts_and_closes(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def accepts_and_waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def speaks_plain_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(100)
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    writer.close()


TLS = "The TLS connection to fal's server could not be trusted or set up."
LISTENERS = {
    "no TLS": (speaks_plain_http, Unreachable("TlsFailed", TLS)),
    "closed in the handshake": (accepts_and_closes, Unreachable("TlsFailed", TLS)),
    "hanging handshake": (accepts_and_waits, Unreachable("UpstreamTimeout", "fal's server took too long.", 504)),
}


async def assert_unreachable(port: int, logs: Logs, wanted: Unreachable) -> None:
    logs.expect(
        rf"WARNING tornado_fal_proxy: upstream error: {wanted.status} \w+ https://\S+: .*"
        rf"\({wanted.error}\)$"
    )
    for method in METHODS:
        response = await call(port, method)
        assert (response.status, response.message) == (wanted.status, wanted.message)


@pytest.mark.parametrize("name", list(LISTENERS))
@pytest.mark.gen_test
async def test_no_handshake(setup: Setup, logs: Logs, name: str) -> None:
    """A TLS handshake that fails gives a status that clients may repeat, because nothing was sent."""
    handler, wanted = LISTENERS[name]
    listener = await asyncio.start_server(handler, "127.0.0.1", 0)
    address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    await assert_unreachable(setup.proxy(address, connect_timeout_s=0.3), logs, wanted)
    listener.close()
    await listener.wait_closed()


@pytest.mark.gen_test
async def test_name_not_found(setup: Setup, logs: Logs) -> None:
    """A name that cannot be looked up is NameNotFound."""
    wanted = Unreachable("NameNotFound", "The name of fal's server could not be looked up.")
    await assert_unreachable(setup.proxy("no-such-name.invalid:443"), logs, wanted)


@pytest.mark.gen_test
async def test_connection_refused(setup: Setup, logs: Logs) -> None:
    """A port on which no server listens is ConnectFailed."""
    wanted = Unreachable("ConnectFailed", "No connection to fal's server could be made.")
    await assert_unreachable(setup.proxy(f"127.0.0.1:{unused_port()}"), logs, wanted)


@pytest.mark.parametrize("fault", ["untrusted", "wrong name", "expired"])
@pytest.mark.gen_test
async def test_certificate(
    setup: Setup, authority: Authority, logs: Logs, protocol: str, fault: str, tmp_path_factory: Any
) -> None:
    """With a wrong certificate the request, and with it the key, is never sent."""
    issuer = Authority(tmp_path_factory.mktemp("other")) if fault == "untrusted" else authority
    names = ("fal.run.example", "*.example") if fault == "wrong name" else ()
    upstream = await setup.upstream(fine, protocol, ssl_context=issuer.context(*names, expired=fault == "expired"))
    port = setup.proxy(upstream)
    await assert_unreachable(port, logs, Unreachable("TlsFailed", TLS))
    assert upstream.exchanges == []
    assert upstream.open_connections == 0


# Pooled connections that died while they were idle.


# A POST to the host of RESULT, so that both share a connection.
SUBMIT = "https://queue.fal.run/fal-ai/flux/dev"


async def pooled(setup: Setup, count: int, protocol: str = "h2") -> tuple[Upstream, int]:
    """Serve a proxy that has made ``count`` calls at once, and has one pooled connection over HTTP/2."""
    here: list[Exchange] = []
    all_here = asyncio.Event()

    async def together(exchange: Exchange) -> None:
        await exchange.body()
        here.append(exchange)
        if len(here) == count:
            all_here.set()
        await all_here.wait()
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(together, protocol)
    port = setup.proxy(upstream)
    await asyncio.gather(*(call(port, "POST", target=SUBMIT) for _ in range(count)))
    if protocol == "h2":
        assert upstream.open_connections == 1
    upstream.handler = fine
    return upstream, port


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.gen_test
async def test_restart_of_the_upstream(setup: Setup, protocol: str, method: str) -> None:
    """No call is lost because fal closed pooled connections while they were idle."""
    upstream, port = await pooled(setup, 30, protocol)
    await upstream.close()
    await upstream.start()
    responses: list[Response] = await asyncio.gather(
        *(call(port, method, target=SUBMIT if method == "POST" else RESULT) for _ in range(40))
    )
    assert [response.status for response in responses] == [200] * 40
    assert len(upstream.exchanges) == 30 + 40


@pytest.mark.gen_test
async def test_dead_connections_found_out_late(setup: Setup) -> None:
    """A GET that is sent on a dead connection is repeated on a new one."""
    upstream, port = await pooled(setup, 20)
    dead = {exchange.connection_number for exchange in upstream.exchanges}

    async def resets_old(exchange: Exchange) -> None:
        await (resets if exchange.connection_number in dead else fine)(exchange)

    upstream.handler = resets_old
    responses: list[Response] = await asyncio.gather(*(call(port, "GET") for _ in range(20)))
    assert [response.status for response in responses] == [200] * 20


@pytest.mark.gen_test
async def test_posts_avoid_a_suspect_pool(setup: Setup, logs: Logs) -> None:
    """After one connection broke, no POST is sent on another pooled one."""
    upstream, port = await pooled(setup, 10)
    dead = {exchange.connection_number for exchange in upstream.exchanges}

    async def resets_old(exchange: Exchange) -> None:
        await (resets if exchange.connection_number in dead else fine)(exchange)

    upstream.handler = resets_old
    logs.expect("the job may have run")
    assert (await call(port, "POST", target=SUBMIT)).status == 500
    for _ in range(5):
        assert (await call(port, "POST", target=SUBMIT)).status == 200


@pytest.mark.gen_test
async def test_a_connection_over_http1_serves_one_call(setup: Setup) -> None:
    """No call follows another on a connection over HTTP/1.1, where surplus bytes would pass for its response."""
    upstream = await setup.upstream(fine, "http/1.1")
    port = setup.proxy(upstream)
    for number in range(1, 4):
        assert (await call(port, "POST", target=SUBMIT)).status == 200
        assert (await call(port, "GET")).status == 200
        assert upstream.connections == 2 * number
        await eventually(lambda: upstream.open_connections == 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.gen_test
async def test_closed_long_ago(setup: Setup, clock: Clock, protocol: str, method: str) -> None:
    """A connection that fal closed while it was idle, with a TLS close_notify alone, is used by no later call."""
    upstream = await setup.upstream(fine, protocol)
    port = setup.proxy(upstream)
    for _ in range(3):
        assert (await call(port, method)).status == 200
        await upstream.close()
        await upstream.start()
        await clock.pass_by(SUSPICION_S + 0.1)  # no other rule keeps POSTs away
    assert (await call(port, method)).status == 200
    assert len(upstream.exchanges) == 4


@pytest.mark.gen_test
async def test_restart_while_a_client_does_not_read(setup: Setup, clock: Clock, logs: Logs, protocol: str) -> None:
    """No other call is lost because fal closes a connection whose only call is paused."""
    sent: list[int] = []

    async def responds_to_gets_endlessly(exchange: Exchange) -> None:
        if exchange.method == "POST":
            return await fine(exchange)
        await exchange.start(200, JSON)
        while True:
            await exchange.send(b" " * 10_000)
            sent.append(10_000)

    upstream = await setup.upstream(responds_to_gets_endlessly, protocol)
    port, backend = setup.proxy_and_backend(upstream)
    stalled = await RawClient.open(port, receive_buffer=16 * 1024)
    await stalled.send("GET")
    await stalled.head()
    await clock.until_still(lambda: len(sent))
    assert [transfer.paused for transfer in backend().client._running.values()] == [True]
    await upstream.close()
    await upstream.start()
    await clock.pass_by(SUSPICION_S + 0.1)  # no other rule keeps POSTs away
    assert (await call(port, "POST")).status == 200
    logs.expect("the response was aborted")
    await stalled.reader.read()
    assert stalled.reader.at_eof()
    await stalled.close()


@pytest.mark.gen_test
async def test_goaway_between_calls(setup: Setup) -> None:
    """After a graceful GOAWAY calls in flight get their responses, and later calls take a new connection."""

    async def responds_after_goaway(exchange: Exchange) -> None:
        await exchange.body()
        exchange.goaway()
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(responds_after_goaway, "h2")
    port = setup.proxy(upstream)
    for _ in range(5):
        assert (await call(port, "POST")).status == 200
    assert upstream.connections == 5


@pytest.mark.gen_test
async def test_one_stream_at_a_time(setup: Setup) -> None:
    """A server that allows one stream on a connection gets more connections, and every call succeeds."""
    upstream = await setup.upstream(fine, "h2", max_concurrent_streams=1)
    port = setup.proxy(upstream)
    for _ in range(3):
        responses: list[Response] = await asyncio.gather(*(call(port, method) for method in METHODS * 10))
        assert [response.status for response in responses] == [200] * 20


@pytest.mark.gen_test
async def test_change_of_protocol(setup: Setup, authority: Authority) -> None:
    """When fal's server changes between HTTP/2 and HTTP/1.1 no call is lost, and none waits for another."""
    first = await setup.upstream(fine, "h2")
    port = setup.proxy(first)
    await asyncio.gather(*(call(port, "POST") for _ in range(5)))
    for protocol in ("http/1.1", "h2"):
        await first.close()
        here: list[Exchange] = []
        all_here = asyncio.Event()

        async def together(exchange: Exchange, here: list[Exchange] = here, all_here: asyncio.Event = all_here) -> None:
            await exchange.body()
            here.append(exchange)
            if len(here) == 10:
                all_here.set()
            await all_here.wait()
            await exchange.respond(200, b"{}", JSON)

        first = Upstream(together, ssl_context=authority.context(), protocols=[protocol], port=first.port)
        await first.start()
        responses: list[Response] = await asyncio.gather(*(call(port, method) for method in METHODS * 5))
        assert [response.status for response in responses] == [200] * 10
        assert {exchange.protocol for exchange in here} == {protocol}
    await first.close()


@pytest.mark.gen_test
async def test_log_of_trouble(setup: Setup, logs: Logs) -> None:
    """The log has method, target without query, curl's reason and ours; neither log nor response has the key."""
    port = setup.proxy(f"127.0.0.1:{unused_port()}")
    logs.expect(
        r"^WARNING tornado_fal_proxy: upstream error: 502 POST https://\S+: curl error 7: .* "
        r"\(ConnectFailed\)$"
    )
    response = await call(port, "POST", target=TARGET + "?fal_webhook=https://secret.example/")
    assert KEY not in str(response)
    assert not [line for line in logs.lines if "secret.example" in line]
