"""nginx in front of the proxy, with the file of deploy/: results, streams, polls, and clients that leave."""

import asyncio
import json
import re
from contextlib import closing, suppress
from typing import Any

import pytest
from tornado.curl_httpclient import CurlError

from tests.support.nginx import (
    DEFAULT_TIMEOUT_S,
    NAME,
    RUN,
    SCALED_MS,
    calling,
    deployed,
    message,
    nginx,
    tls_client,
    two_workers,
)
from tests.support.proxy import ROUTE, Setup
from tests.support.raw_client import RESULT, call
from tests.support.scripted_upstream import Exchange, Gone
from tests.support.stub_handlers import EVENT_STREAM, JSON
from tornado_fal_proxy.errors import BodyTooLarge


@pytest.fixture(params=["HTTP/2", "HTTP/1.1"])
def version(request: pytest.FixtureRequest) -> str:
    """Run the test once for clients of each protocol."""
    return str(request.param)


@pytest.mark.gen_test
async def test_results(setup: Setup, version: str) -> None:
    """A POST's result and a body of 20 MB pass unchanged, and a body that is too large is answered 413 in JSON."""

    async def size(exchange: Exchange) -> None:
        await exchange.respond(201, b'{"size": %d}' % len(await exchange.body()), [*JSON, ("x-fal-request-id", "7")])

    upstream = await setup.upstream(size)
    running = await two_workers(setup, upstream)
    async with nginx((NAME,), deployed(running.port)) as front:
        with calling(front, version) as client:
            for length in (2, 20_000_000):
                response = await client.call(body=b'"' + b"x" * (length - 2) + b'"')
                assert (response.code, json.loads(response.body)) == (201, {"size": length})
                assert response.headers["x-fal-request-id"] == "7"
            response = await client.call(body=b"x" * (32 * 1024 * 1024 + 1))
            assert (response.code, message(response)) == (413, BodyTooLarge.message)
            assert len(upstream.exchanges) == 2
    await running.end()


@pytest.mark.gen_test
async def test_only_the_route_is_public(setup: Setup) -> None:
    """nginx relays no other path, however similar it is."""
    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    port = setup.proxy(upstream)
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, "HTTP/2") as client:
            for path in ("/", "/healthz", "/readyz", "/metrics", ROUTE + "/", ROUTE + "x", "/api/fal", "/x" + ROUTE):
                response = await client.call(path=path)
                assert response.code == 404, path
                assert b"nginx" in response.body, path
            assert not upstream.exchanges
            assert (await client.call()).code == 200


@pytest.mark.gen_test
async def test_events(setup: Setup, version: str) -> None:
    """Each event reaches the client before the next one is sent, even if the response asks for buffering."""
    arrived: asyncio.Queue[bytes] = asyncio.Queue()
    events = [b'data: {"n": %d}\n\n' % number for number in range(20)]

    async def stream(exchange: Exchange) -> None:
        await exchange.start(200, [*EVENT_STREAM, ("x-accel-buffering", "yes")])
        for event in events:
            await exchange.send(event)
            assert await arrived.get() == event
        await exchange.end()

    running = await two_workers(setup, await setup.upstream(stream))
    async with nginx((NAME,), deployed(running.port)) as front:
        with calling(front, version) as client:
            for method in ("POST", "GET"):
                response = await client.call(method, target=RUN + "/stream", streaming_callback=arrived.put_nowait)
                assert response.code == 200
                assert response.headers["content-type"] == "text/event-stream"
                assert "x-accel-buffering" not in response.headers
    await running.end()


@pytest.mark.gen_test
async def test_all_else_is_buffered(setup: Setup) -> None:
    """A result leaves the proxy at once although its client does not read. Events leave it as the client reads them."""
    size = 7_000_000  # fits into nginx's file, and not into its memory

    async def respond(exchange: Exchange) -> None:
        if exchange.target.endswith(b"/stream"):
            await exchange.start(200, EVENT_STREAM)
            with suppress(Gone):
                while True:
                    await exchange.send(b"data: " + b"x" * 60_000 + b"\n\n")
        elif exchange.target.endswith(b"/result"):
            await exchange.respond(200, b'"' + b"x" * (size - 2) + b'"', JSON)
        else:
            await exchange.respond(200, b"{}", JSON)

    port = setup.proxy(await setup.upstream(respond), max_in_flight=1)

    async def slot_is_free() -> None:
        async with asyncio.timeout(20):
            while (await call(port)).status != 200:
                await asyncio.sleep(0.01)

    async with nginx((NAME,), deployed(port)) as front:
        slow = await tls_client(front, "127.0.0.1", receive_buffer=16_384)
        await slow.send("GET", target=f"{RUN}/stream")
        await slow.head()
        await asyncio.sleep(0.2)
        assert (await call(port)).status == 503
        assert "temporary file" not in front.errors.read_text()
        slow.leave()
        await slot_is_free()

        slow = await tls_client(front, "127.0.0.1", receive_buffer=16_384)
        await slow.send("GET", target=f"{RUN}/result")
        assert (await slow.head()).header("content-length") == str(size)
        await slot_is_free()
        assert front.errors.read_text().count("an upstream response is buffered to a temporary file") == 1
        assert len(await slow.reader.readexactly(size)) == size
        slow.leave()


@pytest.mark.gen_test
async def test_long_poll(setup: Setup, version: str) -> None:
    """A call may wait for its response half as long again as nginx allows by default."""

    async def poll(exchange: Exchange) -> None:
        seconds = json.loads(await exchange.body())["s"]
        await asyncio.sleep(seconds * SCALED_MS / 1000)
        await exchange.respond(200, b"{}", JSON)

    running = await two_workers(setup, await setup.upstream(poll))
    front_of = nginx((NAME,), deployed(running.port, second_ms=SCALED_MS), second_ms=SCALED_MS)
    async with front_of as front:
        with calling(front, version) as client:
            assert (await client.call(body=b'{"s": %d}' % (1.5 * DEFAULT_TIMEOUT_S))).code == 200
    await running.end()


@pytest.mark.parametrize(("method", "headers"), [("POST", EVENT_STREAM), ("GET", EVENT_STREAM), ("GET", JSON)])
@pytest.mark.gen_test
async def test_broken_stream(
    setup: Setup, version: str, logs: Any, method: str, headers: list[tuple[str, str]]
) -> None:
    """A stream that breaks at fal breaks for the client too, buffered or not, and does not seem to be complete."""
    arrived = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start(200, headers)
        await exchange.send(b"data: {}\n\n" * 20_000)
        await arrived.wait()
        exchange.reset()

    logs.expect("upstream error: .*; the response was aborted$")
    port = setup.proxy(await setup.upstream(stream))
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, version) as client:
            target = RESULT if method == "GET" else RUN
            with pytest.raises(CurlError):
                await client.call(method, target=target, streaming_callback=lambda chunk: arrived.set())
            assert arrived.is_set()


@pytest.mark.gen_test
async def test_client_leaves(setup: Setup, version: str) -> None:
    """A client that leaves cancels its call at fal."""
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start(200, [("content-type", "text/event-stream")])
        await exchange.send(b"data: {}\n\n")
        await exchange.gone.wait()
        gone.set()

    port = setup.proxy(await setup.upstream(stream))
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, version) as client:
            call = asyncio.create_task(client.call(streaming_callback=lambda chunk: arrived.set()))
            await arrived.wait()
            client.leave()
            await gone.wait()
            with pytest.raises(CurlError):
                await call


# A call that kills the proxy which has read it: how often it is sent, and the status that the client gets.
QUEUE = "https://queue.fal.run/fal-ai/flux"
DEADLY: list[tuple[str, str, int, int]] = [
    ("POST", RUN, 1, 500),
    ("GET", RUN, 1, 500),
    ("GET", QUEUE, 1, 500),
    ("GET", f"{RUN}/requests/764cabcf", 1, 500),
    ("PUT", f"{QUEUE}/requests/764cabcf", 1, 500),
    ("GET", f"{QUEUE}/requests/764cabcf", 2, 200),
    ("GET", f"{QUEUE}/requests/764cabcf/status?logs=1", 2, 200),
    ("PUT", f"{QUEUE}/requests/764cabcf/cancel", 2, 200),
]


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(("method", "target", "times", "status"), DEADLY)
@pytest.mark.gen_test
async def test_a_paid_call_is_sent_once(method: str, target: str, times: int, status: int, used: bool) -> None:
    """If a proxy dies that has read a call, nginx repeats the call at another only if this costs nothing.

    Otherwise the response is none that fal's SDKs repeat. This holds on fresh and on used connections.
    """
    received: list[str] = []  # request lines
    targets: list[str] = []
    deadly = asyncio.Event()

    async def mortal_proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError), closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                assert "\r\nconnection:" not in head
                length = re.search(r"content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                if deadly.is_set():
                    received.append(head.partition("\r\n")[0])
                    targets.extend(re.findall(r"x-fal-target-url: (.*)\r", head))
                    if len(received) == 1:
                        return
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    servers = [await asyncio.start_server(mortal_proxy, "127.0.0.1", 0) for _ in range(2)]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    async with servers[0], servers[1], nginx((NAME,), deployed(*ports)) as front:
        with calling(front, "HTTP/2") as client:
            for _ in range(4 if used else 0):
                assert (await client.call()).code == 200
            deadly.set()
            body = None if method == "GET" else b"{}"
            response = await client.call(method, body, path=f"{ROUTE}?a=b", target=target)
            assert response.code == status
            assert status == 200 or "may have run" in message(response)
    assert received == [f"{method.lower()} {ROUTE}?a=b http/1.1"] * times
    assert targets == [target.lower()] * times
