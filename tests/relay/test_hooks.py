"""Nothing of the proxy's depends on hooks that belong to the application."""

import asyncio
from typing import Any

import pytest
from tornado.web import Application

from tests.support.logs import Logs
from tests.support.proxy import ROUTE, Setup
from tests.support.raw_client import RawClient, call, request
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import fine
from tests.support.waiting import eventually
from tornado_fal_proxy import FalProxyHandler
from tornado_fal_proxy.relay.backend import backends_of
from tornado_fal_proxy.telemetry import Call


class NoSuper(FalProxyHandler):
    """Override every hook of Tornado's without super(), and count."""

    finished = 0
    closed = 0
    ended: list[Call]

    def on_finish(self) -> None:
        type(self).finished += 1

    def on_connection_close(self) -> None:
        type(self).closed += 1

    def on_call_end(self, call: Call) -> None:
        type(self).ended.append(call)


def mount(setup: Setup, config: Any) -> tuple[int, Application, type[NoSuper]]:
    """Serve a fresh subclass of NoSuper."""
    handler = type("Handler", (NoSuper,), {"ended": []})
    application = Application([(ROUTE, handler, {"config": config})], log_function=lambda handler: None)
    return setup.serve(application), application, handler


@pytest.mark.gen_test
async def test_slots_come_back(setup: Setup, protocol: str) -> None:
    """Each call gives its slot back, and each hook is called once for it."""
    port, application, handler = mount(setup, setup.config(await setup.upstream(fine, protocol), max_in_flight=1))
    for _ in range(3):
        assert (await call(port)).status == 200
    assert (await call(port, target="https://evil.example/")).status == 412
    [backend] = backends_of(application)
    await eventually(lambda: backend.slots.in_use == 0)
    assert (handler.finished, handler.closed) == (4, 0)
    assert [each.status for each in handler.ended] == [200, 200, 200, 412]


@pytest.mark.parametrize("when", ["in the body", "before the response", "in the response"])
@pytest.mark.gen_test
async def test_a_client_that_leaves(setup: Setup, protocol: str, when: str) -> None:
    """fal is told that the client left, the slot is free again, and each hook is called once."""
    begun, left = asyncio.Event(), asyncio.Event()

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        if when == "in the response":
            await exchange.start(200, [("content-type", "text/event-stream")])
            await exchange.send(b"data: 1\n\n")
        begun.set()
        await exchange.gone.wait()
        left.set()

    upstream = await setup.upstream(respond, protocol)
    port, application, handler = mount(setup, setup.config(upstream, max_in_flight=1))
    client = await RawClient.open(port)
    if when == "in the body":
        client.writer.write(request(body=b"x" * 1000)[:-1])
        await eventually(lambda: bool(backends_of(application)) and backends_of(application)[0].slots.in_use == 1)
    else:
        await client.send()
        await begun.wait()
    client.leave()
    [backend] = backends_of(application)
    await eventually(lambda: backend.slots.in_use == 0)
    if when != "in the body":
        await left.wait()
    await eventually(lambda: bool(handler.finished))
    assert (handler.finished, handler.closed) == (1, 1)
    assert [(each.outcome, each.status) for each in handler.ended] == [("client_disconnected", 499)]


@pytest.mark.gen_test
async def test_a_hook_that_raises(setup: Setup, protocol: str, logs: Logs) -> None:
    """The call of a client that left is cancelled also where the application's hook fails; the log has its place."""
    begun, left, secret = asyncio.Event(), asyncio.Event(), "very-secret"

    async def respond(exchange: Exchange) -> None:
        begun.set()
        await exchange.gone.wait()
        left.set()

    class Raising(FalProxyHandler):
        def on_connection_close(self) -> None:
            raise ValueError(secret)

    rule = (ROUTE, Raising, {"config": setup.config(await setup.upstream(respond, protocol), max_in_flight=1)})
    application = Application([rule], log_function=lambda handler: None)
    client = await RawClient.open(setup.serve(application))
    await client.send()
    await begun.wait()
    logs.expect("ERROR tornado_fal_proxy: on_connection_close: on_connection_close raised ValueError")
    client.leave()
    await left.wait()
    [backend] = backends_of(application)
    await eventually(lambda: backend.slots.in_use == 0)
    assert secret not in str(logs.lines)


class Leap(BaseException):
    """Be no Exception, as what some libraries leave a task with."""


@pytest.mark.gen_test
async def test_a_function_that_raises_no_exception(setup: Setup, logs: Logs) -> None:
    """A client never waits for a response that nobody will write."""
    ended: list[Call] = []

    class Leaping(FalProxyHandler):
        async def authorize(self, target: object) -> bool:
            raise Leap

        def on_call_end(self, call: Call) -> None:
            ended.append(call)

    rule = (ROUTE, Leaping, {"config": setup.config(await setup.upstream(fine))})
    client = await RawClient.open(setup.serve(Application([rule], log_function=lambda handler: None)))
    logs.expect("ERROR asyncio: Exception in callback")
    await client.send()
    assert await client.reader.read() == b""
    assert [(each.outcome, each.error) for each in ended] == [("failed", "Leap")]
    await client.close()


@pytest.mark.gen_test
async def test_a_client_that_has_left_before_its_head_is_read(setup: Setup, logs: Logs) -> None:
    """A client that is gone when authorize would be asked is no error, and authorize is not asked."""
    asked: list[object] = []

    ended: list[Call] = []

    class Leaving(FalProxyHandler):
        async def prepare(self) -> None:
            self._connection.stream.close()
            await super().prepare()

        async def authorize(self, target: object) -> bool:
            asked.append(target)
            return True

        def on_call_end(self, call: Call) -> None:
            ended.append(call)

    rule = (ROUTE, Leaving, {"config": setup.config(await setup.upstream(fine))})
    port = setup.serve(Application([rule], log_function=lambda handler: None))
    client = await RawClient.open(port)
    await client.send()
    assert await client.reader.read() == b""
    await eventually(lambda: bool(ended))
    assert [each.outcome for each in ended] == ["client_disconnected"]
    assert not asked
    await client.close()
