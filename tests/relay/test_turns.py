"""A crowd does not keep the loop: what happens to many at once is done in turns, and none of them is forgotten."""

import asyncio
import select
import socket
from typing import Any

import pycurl
import pytest
from tornado.iostream import IOStream
from tornado.web import Application

from tests.support.clock import Clock
from tests.support.command_server import serve
from tests.support.logs import Logs
from tests.support.proxy import ROUTE, Setup
from tests.support.raw_client import RawClient, call, request
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import fine, must_not_be_called
from tests.support.waiting import eventually
from tornado_fal_proxy import FalProxyHandler, _sweep
from tornado_fal_proxy.relay import backend
from tornado_fal_proxy.relay.backend import backends_of
from tornado_fal_proxy.service import chunks
from tornado_fal_proxy.upstream import client as upstream_client
from tornado_fal_proxy.upstream import curl_loop
from tornado_fal_proxy.upstream.poller import Poller

CROWD = 12


@pytest.fixture
def one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """End each turn after one of a crowd."""
    for module in (_sweep, curl_loop):
        monkeypatch.setattr(module, "MAX_TURN_S", -1.0)


@pytest.mark.usefixtures("one_each")
@pytest.mark.gen_test
async def test_the_loop_turns_between_two_of_a_crowd(logs: Logs) -> None:
    """The loop turns between two items, and one that fails does not spare those behind it."""
    done: list[int] = []
    seen: list[int] = []

    def end(number: int) -> None:
        done.append(number)
        if number == 1:
            raise ValueError

    logs.expect("ERROR asyncio: Exception in callback _turn")
    _sweep.in_turns(range(4), end)
    while len(done) < 4:
        seen.append(len(done))
        await asyncio.sleep(0)
    assert (done, seen) == ([0, 1, 2, 3], [1, 2, 3])


@pytest.mark.usefixtures("one_each")
@pytest.mark.gen_test
async def test_a_crowd_that_leaves_or_sends_no_body(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client that leaves has its call cancelled, and each whose body does not come is answered."""
    hanging = 0

    async def respond(exchange: Exchange) -> None:
        nonlocal hanging
        hanging += 1
        await exchange.gone.wait()
        hanging -= 1

    rule = (ROUTE, FalProxyHandler, {"config": setup.config(await setup.upstream(respond))})
    application = Application([rule], log_function=lambda handler: None)
    port = setup.serve(application)
    clients = [await RawClient.open(port) for _ in range(CROWD)]
    for client in clients:
        await client.send()
    await eventually(lambda: hanging == CROWD)
    for client in clients:
        client.leave()
    [shared] = backends_of(application)
    await eventually(lambda: hanging == shared.slots.in_use == 0)

    clients = [await RawClient.open(port) for _ in range(CROWD)]
    for client in clients:
        client.writer.write(request(body=b"x" * 100)[:-1])
    await eventually(lambda: len(shared._arriving) == CROWD)
    monkeypatch.setattr(backend, "BODY_WINDOW_S", 0.0)
    shared._end_slow_bodies()
    assert {(await client.response()).status for client in clients} == {408}
    assert shared.slots.in_use == 0
    for client in clients:
        await client.close()


@pytest.mark.usefixtures("one_each")
@pytest.mark.gen_test
async def test_a_crowd_of_calls(setup: Setup, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are served though libcurl acts on one socket in a turn, and makes one connection."""
    monkeypatch.setattr(upstream_client, "MAX_NEW_CONNECTIONS", 1)
    steps: list[str] = []
    for owner, name in ((upstream_client.UpstreamClient, "_add_now"), (curl_loop.CurlLoop, "_run")):
        monkeypatch.setattr(owner, name, _noted(getattr(owner, name), name, steps))
    port = setup.proxy(await setup.upstream(fine, protocol))
    for _ in range(2):
        responses = await asyncio.gather(*(call(port, "POST") for _ in range(CROWD)))
        assert [response.status for response in responses] == [200] * CROWD
    if protocol == "http/1.1":
        assert ["_add_now"] * 2 not in [steps[n : n + 2] for n in range(len(steps))]
    assert steps.count("_add_now") == 2 * CROWD


@pytest.mark.usefixtures("one_each")
@pytest.mark.gen_test
async def test_a_descriptor_that_is_reported_twice(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that leaves and is then reset costs none of the others that left that somebody notices them."""
    port, shared = setup.proxy_and_backend(await setup.upstream(fine))
    assert (await call(port)).status == 200
    pairs = [socket.socketpair() for _ in range(3)]
    streams = [IOStream(one) for one, _ in pairs]
    for stream in streams:
        shared().watch(stream)
    fds = [stream.socket.fileno() for stream in streams]
    reports = [fds[:2], fds]
    monkeypatch.setattr(shared()._hangups, "hung_up", lambda: reports.pop(0) if reports else [])
    shared()._close_left()
    shared()._close_left()
    await eventually(lambda: all(stream.closed() for stream in streams))
    for _, other in pairs:
        other.close()


@pytest.mark.gen_test
async def test_a_leader_goes_first(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call for whose handshake others wait is not behind a crowd that needs connections of its own."""
    port, shared = setup.proxy_and_backend(await setup.upstream(fine, "http/1.1"))
    assert (await call(port, "POST")).status == 200
    monkeypatch.setattr(upstream_client, "MAX_NEW_CONNECTIONS", 0)
    client = shared().client
    calling = [asyncio.ensure_future(call(port, "POST")) for _ in range(3)]
    await eventually(lambda: len(client._to_add) == 3)
    calling.append(asyncio.ensure_future(call(port, "POST", target="https://queue.fal.run/fal-ai/flux/dev")))
    await eventually(lambda: len(client._to_add) == 4)
    assert [transfer.host for transfer in client._to_add] == ["queue.fal.run", *["fal.run"] * 3]
    monkeypatch.setattr(upstream_client, "MAX_NEW_CONNECTIONS", 2)
    assert [(await each).status for each in calling] == [200] * 4


@pytest.mark.gen_test
async def test_a_host_that_becomes_suspect_meanwhile(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paid call that has waited for its turn avoids pooled connections that turned out to be dead meanwhile."""
    port, shared = setup.proxy_and_backend(await setup.upstream(fine, "http/1.1"))
    assert (await call(port, "POST")).status == 200
    monkeypatch.setattr(upstream_client, "MAX_NEW_CONNECTIONS", 0)
    client = shared().client
    calling = asyncio.ensure_future(call(port, "POST"))
    await eventually(lambda: client._to_add)
    [transfer] = client._to_add
    assert not transfer.fresh_connect
    client._hosts.suspect("fal.run", client.now())
    monkeypatch.setattr(upstream_client, "MAX_NEW_CONNECTIONS", 2)
    assert (await calling).status == 200
    assert transfer.fresh_connect


@pytest.mark.gen_test
async def test_a_turn_that_comes_late(
    setup: Setup, clock: Clock, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that waits for its turn to get a connection is given up by no time-out, because its turn comes."""
    turns = upstream_client.MAX_NEW_CONNECTIONS
    monkeypatch.setattr(upstream_client, "MAX_NEW_CONNECTIONS", 0)
    port = setup.proxy(await setup.upstream(fine, protocol), connect_timeout_s=1.0, idle_timeout_s=2.0)
    calling = asyncio.ensure_future(call(port, "POST"))
    await clock.settle()
    for _ in range(5):
        await clock.pass_by(1.0)
    assert not calling.done()
    monkeypatch.setattr(upstream_client, "MAX_NEW_CONNECTIONS", turns)
    assert (await calling).status == 200


def _noted(method: Any, name: str, steps: list[str]) -> Any:
    def noted(*args: Any) -> Any:
        steps.append(name)
        return method(*args)

    return noted


@pytest.mark.parametrize(("number", "closed"), [(100, False), (5000, True)])
@pytest.mark.gen_test
async def test_the_chunks_of_a_refused_request(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, number: int, closed: bool
) -> None:
    """A body behind a refusal is read to its end while it has few chunks; the rest of a flood is thrown away unread."""
    read: list[bytes] = []

    class Counting:
        def fullmatch(self, line: bytes) -> Any:
            read.append(line)
            return real.fullmatch(line)

    real: Any = chunks._SIZE_LINE
    monkeypatch.setattr(chunks, "_SIZE_LINE", Counting())
    client = await RawClient.open(serve(setup, await setup.upstream(must_not_be_called)))
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    client.writer.write(head + b"1\r\nx\r\n" * number + b"0\r\n\r\n")
    assert (await client.response()).status == 400
    if closed:
        client.writer.write_eof()
        assert await client.reader.read() == b""
    else:
        await client.send(target="http://fal.run/")
        assert (await client.response()).status == 412
    assert len(read) <= (chunks.MAX_NEEDLESS_TURNS + 1) * chunks._YIELD_BYTES // chunks._CHUNK_COST + 1
    await client.close()


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="needs epoll")
def test_bytes_of_an_idle_socket() -> None:
    """The poller tells once that bytes came while the socket was idle, so that libcurl is asked about them twice."""
    poller = Poller()
    one, other = socket.socketpair()
    with one, other:
        assert not poller.register(pycurl.POLL_IN, one.fileno())
        poller.register(pycurl.POLL_REMOVE, one.fileno())
        other.send(b"x")
        assert poller.ready() == ([], [], [one.fileno()])
        assert poller.register(pycurl.POLL_IN, one.fileno())
        assert poller.ready() == ([(one.fileno(), pycurl.CSELECT_IN)], [], [])
        assert not poller.register(pycurl.POLL_IN, one.fileno())
    poller.close()
