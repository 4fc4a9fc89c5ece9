"""Bytes that the proxy buffers are counted in one budget, and slots last until responses are delivered."""

import asyncio
import gzip

import pytest

from tests.support.logs import Logs
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, call, request
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import JSON, Gate, fine, responds
from tests.support.waiting import eventually
from tornado_fal_proxy.config import MIN_BUFFERED_BYTES

LARGE = b'["' + b"x" * 3_000_000 + b'"]'


async def client_that_does_not_read(port: int, **arguments: str) -> RawClient:
    """Send a call, and read nothing of its response."""
    client = await RawClient.open(port, receive_buffer=4096)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await client.send(**arguments)
    return client


@pytest.mark.gen_test
async def test_bodies_that_arrive_fill_the_budget(setup: Setup, protocol: str) -> None:
    """A body beyond max_buffered_bytes is answered 503 with retry-after, running calls go on, and room comes back."""
    gate = Gate()
    upstream = await setup.upstream(gate, protocol)
    port, backend = setup.proxy_and_backend(upstream, max_buffered_bytes=MIN_BUFFERED_BYTES)
    running = asyncio.create_task(call(port, "POST", b'"' + b"x" * MIN_BUFFERED_BYTES + b'"'))
    await eventually(lambda: bool(upstream.exchanges))
    assert backend().client.budget.used > MIN_BUFFERED_BYTES
    refused = await call(port)
    assert (refused.status, refused.header("retry-after")) == (503, "1")
    assert "buffering" in refused.message
    gate.open.set()
    assert (await running).status == 200
    await eventually(lambda: backend().client.budget.used == 0)
    assert (await call(port)).status == 200


@pytest.mark.gen_test
async def test_a_body_is_refused_while_it_arrives(setup: Setup) -> None:
    """A body that finds the budget exhausted halfway is answered 503, and nothing of it reaches fal."""
    upstream = await setup.upstream(fine)
    port, backend = setup.proxy_and_backend(upstream, max_buffered_bytes=MIN_BUFFERED_BYTES)
    assert (await call(port)).status == 200
    slow = await RawClient.open(port)
    slow.writer.write(request(body=b"x" * 1_000_000)[:-500_000])
    await eventually(lambda: backend().client.budget.used > 400_000)
    backend().client.budget.add(MIN_BUFFERED_BYTES)
    slow.writer.write(b"x" * 500_000)
    assert (await slow.response()).status == 503
    backend().client.budget.remove(MIN_BUFFERED_BYTES)
    await eventually(lambda: backend().client.budget.used == 0)
    assert len(upstream.exchanges) == 1
    await slow.close()


@pytest.mark.parametrize("coding", ["", "gzip"])
@pytest.mark.slow
@pytest.mark.gen_test
async def test_a_slot_lasts_until_the_response_is_delivered(setup: Setup, protocol: str, coding: str) -> None:
    """Clients that read nothing of a large result keep their slots and one copy of it, decoded or not."""
    headers = [*JSON, ("content-encoding", coding)] if coding else JSON
    body = gzip.compress(LARGE) if coding else LARGE
    upstream = await setup.upstream(responds(200, body, headers), protocol)
    port, backend = setup.proxy_and_backend(upstream, max_in_flight=2)
    clients = [await client_that_does_not_read(port) for _ in range(2)]
    await eventually(lambda: all(len(one.target) for one in upstream.exchanges) and len(upstream.exchanges) == 2)
    await asyncio.sleep(0.5)
    assert (await call(port)).status == 503
    assert backend().slots.in_use == 2
    assert backend().client.budget.used <= 2 * (len(LARGE) + 200_000)
    for client in clients:
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert (await client.response()).body == LARGE
        await client.close()
    await eventually(lambda: (backend().slots.in_use, backend().client.budget.used) == (0, 0))


@pytest.mark.slow
@pytest.mark.gen_test
async def test_under_pressure_results_are_streamed(setup: Setup, protocol: str) -> None:
    """A result that no longer fits the budget is passed on piece by piece, and arrives whole."""
    go_on = asyncio.Event()

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await go_on.wait()
        await exchange.respond(200, LARGE, JSON)

    upstream = await setup.upstream(respond, protocol)
    port, backend = setup.proxy_and_backend(upstream, max_buffered_bytes=MIN_BUFFERED_BYTES)
    clients = [await client_that_does_not_read(port) for _ in range(8)]
    await eventually(lambda: len(upstream.exchanges) == 8)
    go_on.set()
    await asyncio.sleep(0.5)
    # The last piece that each call takes may exceed the limit, and so does what a paused stream keeps.
    assert backend().client.budget.used <= MIN_BUFFERED_BYTES + 8 * 200_000
    for client in clients:
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert {response.body for response in await asyncio.gather(*(client.response() for client in clients))} == {LARGE}
    for client in clients:
        await client.close()
    await eventually(lambda: backend().client.budget.used == 0)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_nothing_stays_counted(setup: Setup, logs: Logs, protocol: str, method: str) -> None:
    """Whatever ends a call, its bytes count no more: the client leaves, fal breaks, or the call is refused."""

    async def breaks(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, [*JSON, ("content-length", "1000000")])
        await exchange.send(b"x" * 300_000)
        exchange.abort_connection()

    logs.expect("upstream error")
    upstream = await setup.upstream(breaks, protocol)
    port, backend = setup.proxy_and_backend(upstream, max_body_bytes=2_000_000)
    client = await client_that_does_not_read(port, method=method)
    await eventually(lambda: bool(upstream.exchanges))
    client.leave()
    broken = await RawClient.open(port)
    await broken.send(method, headers=["connection: close"])
    assert b"\r\n\r\n" in await broken.reader.read()
    await broken.close()
    assert (await call(port, "POST", b"x" * 2_000_001)).status == 413
    await eventually(lambda: (backend().slots.in_use, backend().client.budget.used) == (0, 0))
