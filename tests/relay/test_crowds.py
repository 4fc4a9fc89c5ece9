"""Many calls at once share connections to fal, and too many are refused."""

import asyncio

import pytest

from tests.support.proxy import Setup
from tests.support.raw_client import TARGET, RawClient, call
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import JSON, responds, silent


@pytest.mark.gen_test
async def test_cold_crowd(setup: Setup, protocol: str) -> None:
    """The first calls, all at once, share one connection over HTTP/2 and never wait for each other over HTTP/1.1."""
    waiting = 0
    all_here = asyncio.Event()

    async def respond(exchange: Exchange) -> None:
        nonlocal waiting
        await exchange.body()
        waiting += 1
        if waiting == 50:
            all_here.set()
        await all_here.wait()  # no response before all requests have arrived
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(respond, protocol)
    port = setup.proxy(upstream)
    for result in await asyncio.gather(*(call(port, method, target=TARGET) for method in ["POST", "GET"] * 25)):
        assert result.status == 200
    assert upstream.connections == (1 if protocol == "h2" else 50)
    waiting = 0
    await asyncio.gather(*(call(port, "POST") for _ in range(50)))
    assert upstream.connections == (1 if protocol == "h2" else 100), "over HTTP/2 the connection is used again"


@pytest.mark.gen_test
async def test_too_many_calls(setup: Setup, protocol: str) -> None:
    """Call max_in_flight + 1 is answered 503 with retry-after at once; a slot is free again when a call ends."""
    upstream = await setup.upstream(silent, protocol)
    port = setup.proxy(upstream, max_in_flight=2)
    clients = [await RawClient.open(port) for _ in range(2)]
    for client in clients:
        await client.send("POST")
    while len(upstream.exchanges) < 2:
        await asyncio.sleep(0.001)
    refused = await call(port, "POST")
    assert (refused.status, refused.header("retry-after")) == (503, "1")
    assert "try again" in refused.message
    clients[0].leave()
    await asyncio.wait(
        [asyncio.create_task(exchange.gone.wait()) for exchange in upstream.exchanges],
        return_when=asyncio.FIRST_COMPLETED,
    )
    upstream.handler = responds()
    assert (await call(port, "POST")).status == 200
    clients[1].leave()
    for exchange in upstream.exchanges[:2]:
        await exchange.gone.wait()
