"""A client that leaves: its call is cancelled at fal, and others on the connection are not."""

import asyncio

import pytest

from tests.support.clock import Clock
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient
from tests.support.scripted_upstream import Exchange, Handler
from tests.support.stub_handlers import EVENT_STREAM, Gate, silent


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
async def test_client_leaves(setup: Setup, clock: Clock, protocol: str, method: str, when: str, how: str) -> None:
    """fal sees at once that the client has left: the call is cancelled without waiting until a time is over."""
    handler, streams = CANCELS[when]
    upstream = await setup.upstream(handler, protocol)
    port, backend = setup.proxy_and_backend(upstream)
    client = await RawClient.open(port, receive_buffer=4096)
    await client.send(method)
    await clock.until(lambda: upstream.exchanges)
    exchange = upstream.exchanges[0]
    await exchange.body()
    if streams:
        await client.head()
    if when == "while paused":
        await clock.until(lambda: any(transfer.paused for transfer in backend().client._running.values()))
        await clock.settle()
    if how == "reset":
        client.leave()
    else:
        client.writer.close()
    await exchange.gone.wait()


@pytest.mark.gen_test
async def test_client_leaves_and_others_stay(setup: Setup) -> None:
    """Over HTTP/2 only the stream of the client that left is reset."""
    gate = Gate()
    upstream = await setup.upstream(gate, "h2")
    port = setup.proxy(upstream)
    clients = [await RawClient.open(port) for _ in range(3)]
    for client in clients:
        await client.send("POST")
    while len(upstream.exchanges) < 3:
        await asyncio.sleep(0.001)
    clients[1].leave()
    gone = [asyncio.create_task(exchange.gone.wait()) for exchange in upstream.exchanges]
    await asyncio.wait(gone, return_when=asyncio.FIRST_COMPLETED)
    assert sum(exchange.gone.is_set() for exchange in upstream.exchanges) == 1
    assert upstream.connections == 1
    gate.open.set()
    for client in (clients[0], clients[2]):
        assert (await client.response()).status == 200
        await client.close()
    for task in gone:
        task.cancel()


@pytest.mark.gen_test
async def test_client_that_never_reads_again(setup: Setup, clock: Clock, protocol: str) -> None:
    """A client that reads nothing for idle_timeout_s is aborted, and its call is cancelled at fal."""
    upstream = await setup.upstream(floods, protocol)
    client = await RawClient.open(setup.proxy(upstream, idle_timeout_s=0.5), receive_buffer=4096)
    await client.send("POST")
    await clock.until(lambda: upstream.exchanges)
    while not upstream.exchanges[0].gone.is_set():
        await clock.pass_by(0.1)
    client.leave()
