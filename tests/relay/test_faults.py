"""Faults on fal's side: the response, how often the job ran, and the line in the log. Over both protocols."""

import asyncio
from dataclasses import dataclass

import h2.errors
import pytest

from tests.support.clock import Clock
from tests.support.logs import Logs
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, call
from tests.support.scripted_upstream import Exchange, Handler
from tests.support.stub_handlers import EVENT_STREAM, JSON, fine, resets

MAY_HAVE_RUN = "The job may have run: check before sending it again."

METHODS = ["GET", "POST"]


# Before the response: the request was sent, and nothing useful came back.


async def closes(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.close_connection()


async def resets_stream(exchange: Exchange) -> None:
    await exchange.body()
    exchange.reset(h2.errors.ErrorCodes.INTERNAL_ERROR)


async def refuses_stream(exchange: Exchange) -> None:
    await exchange.body()
    exchange.reset(h2.errors.ErrorCodes.REFUSED_STREAM)


async def sends_goaway(exchange: Exchange) -> None:
    await exchange.body()
    exchange.goaway(code=h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
    await exchange.close_connection()


async def stalls(exchange: Exchange) -> None:
    await exchange.body()


def sends(data: bytes) -> Handler:
    async def garbage(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.raw(data)
        await exchange.close_connection()

    return garbage


async def has_a_bad_status(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(999_999, b"{}", JSON)


async def has_endless_headers(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200, b"{}", [(f"x-{number}", "y" * 4000) for number in range(200)])


# Once the response has begun.


async def aborts_in_the_result(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, JSON, length=100)
    await exchange.send(b'{"images": [')
    await asyncio.sleep(0.05)  # the proxy receives the head by itself
    exchange.reset()


async def closes_in_the_result(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, JSON, length=100)
    await exchange.send(b'{"images": [')
    await exchange.close_connection()


async def stalls_in_the_result(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, JSON, length=100)
    await exchange.send(b'{"images": [')


async def sends_a_corrupt_coding(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200, b"this is not gzip", [*JSON, ("content-encoding", "gzip")])


async def aborts_in_the_chunks(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nzz"
    )
    await exchange.close_connection()


@dataclass
class Fault:
    """``error`` is the name in the log; ``get`` and ``post`` are the statuses, None for an aborted connection."""

    handler: Handler
    error: str
    get: int | None = 502
    post: int = 500
    protocols: tuple[str, ...] = ("h2", "http/1.1")


FAULTS = {
    "reset": Fault(resets, "ConnectionLost"),
    "close": Fault(closes, "ConnectionLost"),
    "stream reset": Fault(resets_stream, "ConnectionLost", protocols=("h2",)),
    "stream refused": Fault(refuses_stream, "ConnectionLost", protocols=("h2",)),
    "goaway": Fault(sends_goaway, "ConnectionLost", protocols=("h2",)),
    "stall": Fault(stalls, "UpstreamTimeout", get=504),
    "garbage": Fault(sends(b"\x00\x01\x02\r\n\r\n"), "MalformedResponse", protocols=("http/1.1",)),
    "HTTP/0.9": Fault(sends(b"<html>"), "MalformedResponse", protocols=("http/1.1",)),
    "two digits of status": Fault(sends(b"HTTP/1.1 20 OK\r\n\r\n"), "MalformedResponse", protocols=("http/1.1",)),
    "unknown version": Fault(sends(b"HTTP/9.9 200 OK\r\n\r\n"), "MalformedResponse", protocols=("http/1.1",)),
    "incomplete head": Fault(sends(b"HTTP/1.1 200 OK\r\ncontent-le"), "MalformedResponse", protocols=("http/1.1",)),
    "only an interim response": Fault(sends(b"HTTP/1.1 103 Hint\r\n\r\n"), "ConnectionLost", protocols=("http/1.1",)),
    "endless headers": Fault(has_endless_headers, "", protocols=("http/1.1",)),
    "aborted result": Fault(aborts_in_the_result, "ConnectionLost", get=None),
    "close in the result": Fault(closes_in_the_result, "ConnectionLost", get=None),
    "stall in the result": Fault(stalls_in_the_result, "UpstreamTimeout", get=None),
    "corrupt coding": Fault(sends_a_corrupt_coding, "MalformedResponse"),
    "aborted chunks": Fault(aborts_in_the_chunks, "", get=None, protocols=("http/1.1",)),
}


SLOW = [pytest.mark.slow]


@pytest.mark.parametrize("connection", ["fresh", pytest.param("reused", marks=SLOW)])
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW * ("stall" in name)) for name in FAULTS])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.gen_test
async def test_fault(setup: Setup, logs: Logs, protocol: str, method: str, name: str, connection: str) -> None:
    """A POST runs once and gets a whole 500; a GET gets a status that may be repeated, or its response is aborted."""
    fault = FAULTS[name]
    if protocol not in fault.protocols:
        return
    upstream = await setup.upstream(fine, protocol)
    port = setup.proxy(upstream, idle_timeout_s=1.5 if fault.error == "UpstreamTimeout" else 60)
    if connection == "reused":
        assert (await call(port, method)).status == 200
    upstream.handler = fault.handler
    upstream.exchanges.clear()
    error = fault.error or "MalformedResponse|ConnectionLost"
    logs.expect(rf"upstream error: \d+ {method} https://\S+: .* \({error}")
    if method == "GET" and fault.get is None:
        client = await RawClient.open(port)
        await client.send("GET")
        await client.head()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await client.reader.readexactly(100)
        await client.close()
        logs.expect("the response was aborted")
        return
    response = await call(port, method)
    assert response.status == (fault.get if method == "GET" else fault.post)
    assert response.message.endswith(MAY_HAVE_RUN) == (method == "POST")
    if method == "POST":
        assert len(upstream.exchanges) == 1, "executed more than once"
        logs.expect("the job may have run")
    upstream.handler = fine
    assert (await call(port, method)).status == 200, "the next call is not harmed"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.gen_test
async def test_silence_counts_from_the_request(
    setup: Setup, clock: Clock, logs: Logs, protocol: str, method: str
) -> None:
    """A call to which fal never responds ends after idle_timeout_s, and a POST not later than a GET."""
    upstream = await setup.upstream(stalls, protocol)
    calling = asyncio.create_task(call(setup.proxy(upstream, idle_timeout_s=8), method))
    await clock.until(lambda: upstream.exchanges)
    for _ in range(8):
        await clock.pass_by(1)
        assert not calling.done()
    logs.expect("UpstreamTimeout")
    await clock.pass_by(1)
    await clock.until(calling.done)
    assert calling.result().status == (504 if method == "GET" else 500)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["reset", "close", pytest.param("stall", marks=SLOW)])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.gen_test
async def test_broken_event_stream(
    setup: Setup, logs: Logs, protocol: str, method: str, how: str, version: str
) -> None:
    """An event stream that fal does not finish is aborted at the client, and never ended cleanly."""

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENT_STREAM, length=1000 if protocol == "http/1.1" else None)
        await exchange.send(b"data: 1\n\n")
        await go_on.wait()
        if how == "reset":
            exchange.reset()
        elif how == "close":
            await exchange.close_connection()

    go_on = asyncio.Event()
    upstream = await setup.upstream(respond, protocol)
    client = await RawClient.open(setup.proxy(upstream, idle_timeout_s=1.5 if how == "stall" else 60))
    await client.send(method, version=version)
    head = await client.head()
    first = b"9\r\ndata: 1\n\n\r\n" if head.header("transfer-encoding") else b"data: 1\n\n"
    assert await client.reader.readexactly(len(first)) == first
    logs.expect("the response was aborted")
    go_on.set()
    if version == "HTTP/1.0":
        # In HTTP/1.0 the end of the connection can be the end of the response, except when it is a reset.
        with pytest.raises(ConnectionResetError):
            await client.reader.read()
    else:
        assert await client.reader.read() == b"", "no last chunk"
    await client.close()
