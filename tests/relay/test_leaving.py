"""A client that leaves: its call is cancelled at fal, and others on the connection are not."""

import asyncio

import pytest

from tests.support.proxy import Setup
from tests.support.raw_client import RawClient
from tests.support.scripted_upstream import Exchange, Handler
from tests.support.stub_handlers import EVENT_STREAM, JSON, silent
from tests.support.waiting import first_exchange

# How long a cancel may take to be seen by fal (the bound).
CANCEL_S = 0.05


async def begins_stream(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, EVENT_STREAM)
    await exchange.send(b"data: 1\n\n")


async def floods(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, EVENT_STREAM)
    while True:
        await exchange.send(b"data: " + b"x" * 50_000 + b"\n\n")


CANCELS: dict[str, tuple[Handler, bool]] = {
    "while waiting for the head": (silent, False),
    "while streaming": (begins_stream, True),
    "while paused": (floods, True),
}


@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize("when", list(CANCELS))
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_caller_goes_away(setup: Setup, protocol: str, method: str, when: str, how: str) -> None:
    """fal sees within 50 ms that the caller is gone, and the proxy keeps nothing of the call."""
    handler, streams = CANCELS[when]
    upstream = await setup.upstream(handler, protocol)
    caller = await RawClient.open(setup.proxy(upstream), receive_buffer=4096)
    await caller.send(method)
    exchange = await first_exchange(upstream)
    if streams:
        await caller.head()
    if when == "while paused":
        await asyncio.sleep(0.7)  # all buffers fill up
    left_at = asyncio.get_running_loop().time()
    if how == "reset":
        caller.leave()
    else:
        caller.writer.close()
    await exchange.gone.wait()
    assert exchange.gone_at is not None
    assert exchange.gone_at - left_at < CANCEL_S


@pytest.mark.gen_test
async def test_caller_goes_away_with_others_on_the_connection(setup: Setup) -> None:
    """Over HTTP/2 only the stream of the caller that left is reset."""
    release = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await release.wait()
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(answer, "h2")
    port = setup.proxy(upstream)
    callers = [await RawClient.open(port) for _ in range(3)]
    for caller in callers:
        await caller.send("POST")
    while len(upstream.exchanges) < 3:
        await asyncio.sleep(0.001)
    callers[1].leave()
    gone = [asyncio.create_task(exchange.gone.wait()) for exchange in upstream.exchanges]
    await asyncio.wait(gone, return_when=asyncio.FIRST_COMPLETED)
    assert sum(exchange.gone.is_set() for exchange in upstream.exchanges) == 1
    assert upstream.connections == 1
    release.set()
    for caller in (callers[0], callers[2]):
        assert (await caller.response()).status == 200
        await caller.close()
    for task in gone:
        task.cancel()


@pytest.mark.gen_test
async def test_caller_that_never_reads_again(setup: Setup, protocol: str) -> None:
    """A caller that takes nothing for idle_timeout_s is cut off, and fal is told."""
    upstream = await setup.upstream(floods, protocol)
    caller = await RawClient.open(setup.proxy(upstream, idle_timeout_s=0.5), receive_buffer=4096)
    await caller.send("POST")
    exchange = await first_exchange(upstream)
    await exchange.gone.wait()
    caller.leave()
