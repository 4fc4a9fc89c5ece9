"""Memory stays bounded when a client reads slowly, and no response is delayed by the bound."""

import asyncio

import pytest

from tests.support.clock import Clock
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, call
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import EVENT_STREAM, JSON
from tornado_fal_proxy.upstream.body import HIGH_WATER_BYTES, WINDOW_BYTES
from tornado_fal_proxy.upstream.handles import RATE_IS_WINDOW
from tornado_fal_proxy.upstream.transfer import Transfer


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_backpressure(
    setup: Setup, clock: Clock, protocol: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a client stops reading fal must stop sending; when it reads again everything arrives."""
    sent = 0
    full = asyncio.Event()
    piece = b"data: " + b"x" * 100_000 + b"\n\n"
    pieces = 400  # 40 MB: more than fits into sockets and libcurl's windows

    async def respond(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.body()
        await exchange.start(200, EVENT_STREAM)
        for _ in range(pieces):
            await exchange.send(piece)
            sent += 1
        full.set()
        await exchange.end()

    buffered: list[int] = []
    on_body = Transfer.on_body

    def spy(self: Transfer, data: bytes) -> int | None:
        buffered.append(self._buffered)
        return on_body(self, data)

    monkeypatch.setattr(Transfer, "on_body", spy)
    upstream = await setup.upstream(respond, protocol)
    client = await RawClient.open(setup.proxy(upstream), receive_buffer=4096)
    await client.send(method)
    await client.head()
    await clock.until_still(lambda: sent)
    assert sent < pieces
    assert not full.is_set()
    assert max(buffered) <= HIGH_WATER_BYTES + 16_384
    received = 0
    while chunk := await client.chunk():
        received += len(chunk)
    assert received == pieces * len(piece)
    await client.close()


@pytest.mark.parametrize(
    ("method", "headers", "response_buffer_bytes"),
    [
        ("GET", EVENT_STREAM, 1),
        ("GET", JSON, 1),
        ("POST", EVENT_STREAM, 1),
        ("POST", JSON, 1_000_000),
        ("POST", JSON, 30_000_000),
    ],
)
@pytest.mark.gen_test
async def test_window_is_no_limit(
    setup: Setup, clock: Clock, protocol: str, method: str, headers: list[tuple[str, str]], response_buffer_bytes: int
) -> None:
    """The window does not slow a response: as a limit of the rate it would spread 5 MB over 20 s, and wait."""
    piece = b"data: " + b"x" * 199_992 + b"\n\n"

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, headers)
        for _ in range(25):
            await exchange.send(piece)
        await exchange.end()

    upstream = await setup.upstream(respond, protocol)
    result = await call(setup.proxy(upstream, response_buffer_bytes=response_buffer_bytes), method)
    assert result.body == piece * 25


@pytest.mark.parametrize("size", [15_000, 60_000, 240_000])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_window_delays_no_response_of_known_length(
    setup: Setup, clock: Clock, protocol: str, method: str, size: int
) -> None:
    """A declared length delays no response: to keep the rate over that length libcurl would set its timer."""

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, [*JSON, ("content-length", str(size))])
        for _ in range(5):
            await exchange.send(b"x" * (size // 5))
        await exchange.end()

    port = setup.proxy(await setup.upstream(respond, protocol))
    for response in await asyncio.gather(*[call(port, method) for _ in range(8)]):
        assert len(response.body) == size


@pytest.mark.gen_test
async def test_window_bounds_a_stalled_stream(setup: Setup, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a client does not read an event stream fal can send hardly more than the window over HTTP/2."""
    sent = taken = 0
    on_body = Transfer.on_body

    def spy(self: Transfer, data: bytes) -> int | None:
        nonlocal taken
        result = on_body(self, data)
        taken += len(data) if result is None else 0
        return result

    monkeypatch.setattr(Transfer, "on_body", spy)

    async def respond(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.body()
        await exchange.start(200, EVENT_STREAM)
        while True:
            await exchange.send(b"data: " + b"x" * 10_000 + b"\n\n")
            sent += 10_000

    upstream = await setup.upstream(respond, "h2")
    client = await RawClient.open(setup.proxy(upstream), receive_buffer=4096)
    await client.send("POST")
    await client.head()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await clock.until_still(lambda: sent)
    window = WINDOW_BYTES if RATE_IS_WINDOW else 10 * 1024 * 1024
    assert sent - taken <= window + 64 * 1024, "the window, and what is on its way"
    client.leave()
    await upstream.exchanges[0].gone.wait()
