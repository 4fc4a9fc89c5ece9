"""The time at which a client gets each piece of a response. Over both protocols towards fal."""

import asyncio
from typing import Any

import pytest

from tests.support.clock import Clock
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, call
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import JSON
from tests.support.waiting import first_exchange
from tornado_fal_proxy.upstream.budget import BufferBudget
from tornado_fal_proxy.upstream.transfer import Transfer

EVENTS = [("content-type", "text/event-stream; charset=utf-8")]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_stream(setup: Setup, protocol: str, method: str) -> None:
    """The head arrives before the first event is sent, and each event as one chunk before the next is sent.

    The head has the header that keeps an nginx in front from buffering.
    """
    go = asyncio.Queue[bytes]()

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENTS)
        while event := await go.get():
            await exchange.send(event)
        await exchange.end()

    upstream = await setup.upstream(respond, protocol)
    client = await RawClient.open(setup.proxy(upstream))
    await client.send(method)
    head = await client.head()
    assert (head.status, head.header("content-type")) == (200, EVENTS[0][1])
    assert head.header("transfer-encoding") == "chunked"
    assert head.header("x-accel-buffering") == "no"
    for event in (b"data: 1\n\n", "data: ü🌊\n\n".encode(), b": comment\n\n", b"data: " + b"x" * 10_000 + b"\n\n"):
        go.put_nowait(event)
        assert await client.chunk() == event
    go.put_nowait(b"")
    assert await client.chunk() == b""
    await client.close()


class NoClient:
    """The methods that a transfer calls of its client, for a transfer without libcurl."""

    budget = BufferBudget()

    def now(self) -> float:
        return 0.0

    def open_window_soon(self, transfer: Transfer) -> None:
        pass

    def protocol_known(self, host: str, http2: bool) -> None:
        pass

    def resume(self, transfer: Transfer) -> None:
        pass


SMALL, BULK = b"x" * 100, b"x" * 16_000


@pytest.mark.parametrize(
    ("pieces", "joined"),
    [
        ([SMALL, SMALL], [SMALL + SMALL]),
        ([SMALL] * 11, [SMALL * 10, SMALL]),
        ([b"7"] * 10_000, [b"7" * 1024] * 9 + [b"7" * 784]),
        ([SMALL, BULK], [SMALL, BULK]),
        ([BULK, SMALL, BULK], [BULK + SMALL + BULK]),
        ([BULK] * 6, [BULK * 5, BULK]),
    ],
)
@pytest.mark.gen_test
async def test_pieces_that_wait_are_joined(pieces: list[bytes], joined: list[bytes]) -> None:
    """Pieces of a large body that are here are joined, and so are small pieces, up to 1 kB, however many came."""
    client: Any = NoClient()
    handle: Any = object()
    transfer = Transfer(client, handle, None, host="fal.run", repeatable=True)
    transfer.high_water = 10**6
    transfer.on_header(b"HTTP/2 200\r\n")
    transfer.on_header(b"\r\n")
    for piece in pieces:
        transfer.on_body(piece)
    assert [transfer.read_rest(await transfer.read()) for _ in joined] == joined


@pytest.mark.gen_test
async def test_large_event(setup: Setup, protocol: str) -> None:
    """An event that libcurl delivers in pieces reaches the client in chunks that end between two characters."""
    event = "data: {}\n\n".format("日本語" * 15_000).encode()

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENTS)
        await exchange.send(event)
        await received_all.wait()
        await exchange.end()

    received_all = asyncio.Event()
    upstream = await setup.upstream(respond, protocol)
    client = await RawClient.open(setup.proxy(upstream))
    await client.send("POST")
    await client.head()
    received = b""
    while len(received) < len(event):
        chunk = await client.chunk()
        chunk.decode()
        received += chunk
    assert received == event
    received_all.set()
    assert await client.chunk() == b""
    await client.close()


@pytest.mark.gen_test
async def test_split_character(setup: Setup, protocol: str) -> None:
    """A character that fal sends in two pieces reaches the client whole; a broken one at the end is not lost."""
    go = asyncio.Queue[bytes]()

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENTS)
        while piece := await go.get():
            await exchange.send(piece)
        await exchange.end()

    upstream = await setup.upstream(respond, protocol)
    client = await RawClient.open(setup.proxy(upstream))
    await client.send("POST")
    await client.head()
    wave = "🌊".encode()
    go.put_nowait(b"data: " + wave[:1])
    assert await client.chunk() == b"data: "
    go.put_nowait(wave[1:3])
    go.put_nowait(wave[3:] + b"\n\n")
    assert await client.chunk() == wave + b"\n\n"
    go.put_nowait(b": \xff\xf0\x9f")
    assert await client.chunk() == b": \xff"
    go.put_nowait(b"")
    assert await client.chunk() == b"\xf0\x9f"
    assert await client.chunk() == b""
    await client.close()


@pytest.mark.gen_test
async def test_plain_response_of_a_get_is_streamed(setup: Setup, protocol: str) -> None:
    """A GET's response is sent piece by piece as it arrives, with fal's content-length."""
    go = asyncio.Event()

    async def respond(exchange: Exchange) -> None:
        await exchange.start(200, JSON, length=4)
        await exchange.send(b"ab")
        await go.wait()
        await exchange.send(b"cd")
        await exchange.end()

    upstream = await setup.upstream(respond, protocol)
    client = await RawClient.open(setup.proxy(upstream))
    await client.send("GET")
    head = await client.head()
    assert (head.header("content-length"), head.header("x-accel-buffering")) == ("4", None)
    assert await client.reader.readexactly(2) == b"ab"
    go.set()
    assert await client.reader.readexactly(2) == b"cd"
    await client.close()


@pytest.mark.gen_test
async def test_plain_response_of_a_post_is_buffered(setup: Setup, protocol: str) -> None:
    """A POST's plain response is sent when it is whole and in one piece, even if fal sends it in several."""
    go = asyncio.Event()

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, JSON)
        await exchange.send(b'{"a":')
        await go.wait()
        await exchange.send(b"1}")
        await exchange.end()

    upstream = await setup.upstream(respond, protocol)
    client = await RawClient.open(setup.proxy(upstream))
    await client.send("POST")
    await first_exchange(upstream)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.reader.read(1), 0.2)
    go.set()
    whole = await client.response()
    assert (whole.body, whole.header("content-length")) == (b'{"a":1}', "7")
    await client.close()


@pytest.mark.parametrize("size", [99_999, 100_000, 3_000_000])
@pytest.mark.gen_test
async def test_response_around_response_buffer_bytes(setup: Setup, protocol: str, size: int) -> None:
    """A POST's result that exceeds response_buffer_bytes is streamed and arrives whole."""
    body = bytes(range(256)) * (size // 256) + b"." * (size % 256)

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, JSON)
        await exchange.send(body)
        await exchange.end()

    upstream = await setup.upstream(respond, protocol)
    result = await call(setup.proxy(upstream, response_buffer_bytes=100_000))
    assert result.body == body


@pytest.mark.gen_test
async def test_no_time_limit_for_a_stream(setup: Setup, clock: Clock, protocol: str) -> None:
    """A stream may take longer than idle_timeout_s as long as bytes move."""
    idle_timeout_s = 0.3

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENTS)
        for number in range(12):
            await asyncio.sleep(idle_timeout_s / 3)
            await exchange.send(b"data: %d\n\n" % number)
        await exchange.end()

    upstream = await setup.upstream(respond, protocol)
    calling = asyncio.create_task(call(setup.proxy(upstream, idle_timeout_s=idle_timeout_s)))
    while not calling.done():
        await clock.pass_by(idle_timeout_s / 3)
    assert calling.result().body.count(b"data:") == 12
