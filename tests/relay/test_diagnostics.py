"""The responses that a proxy makes for ``tornado-fal-proxy doctor``. None of them reaches fal."""

import asyncio

import pytest

from tests.support.clock import Clock
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, Response, call
from tests.support.stub_handlers import must_not_be_called
from tests.support.waiting import eventually
from tornado_fal_proxy.errors import DiagnosticNotAllowed, TargetMissing, TooManyDiagnostics
from tornado_fal_proxy.relay import diagnostics
from tornado_fal_proxy.relay.backend import Backend
from tornado_fal_proxy.relay.diagnostics import MAX_AT_ONCE, MAX_PER_MINUTE, Diagnostics
from tornado_fal_proxy.rules.diagnostics import DIAGNOSTIC_HEADER


async def ask(port: int, value: str, method: str = "POST", body: bytes = b"") -> Response:
    return await call(port, method, body, target=None, headers=[f"{DIAGNOSTIC_HEADER}: {value}"])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make what takes its time take none."""
    monkeypatch.setattr(diagnostics, "EVENT_S", 0.001)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.usefixtures("quick")
@pytest.mark.gen_test
async def test_events(setup: Setup, method: str) -> None:
    """Five events leave in a chunk each, as an event stream of fal's does, from any proxy."""
    client = await RawClient.open(setup.proxy(await setup.upstream(must_not_be_called)))
    await client.send(method, b"", target=None, headers=[f"{DIAGNOSTIC_HEADER}: events"])
    head = await client.head()
    assert (head.status, head.header("content-type"), head.header("x-accel-buffering")) == (
        200,
        "text/event-stream",
        "no",
    )
    chunks = [await client.chunk() for _ in range(6)]
    assert chunks == [*(b'data: {"event": %d}\n\n' % number for number in range(1, 6)), b""]
    await client.close()


@pytest.mark.gen_test
async def test_failures_need_the_option(setup: Setup) -> None:
    """Something in front may count these against the proxy, so no stranger can ask for them."""
    port = setup.proxy(await setup.upstream(must_not_be_called))
    for value in ("silence=1", "error", "disconnect"):
        response = await ask(port, value)
        assert (response.status, response.message) == (403, DiagnosticNotAllowed.message)


@pytest.mark.gen_test
async def test_failures(setup: Setup) -> None:
    """With the option a response is late, an error, or none at all."""
    port = setup.proxy(await setup.upstream(must_not_be_called), allow_diagnostics=True)
    assert (await ask(port, "silence=1", "GET")).status == 200
    assert (await ask(port, "error")).status == 500
    with pytest.raises(asyncio.IncompleteReadError) as raised:
        await ask(port, "disconnect")
    assert raised.value.partial == b""


@pytest.mark.gen_test
async def test_a_body_is_no_question(setup: Setup) -> None:
    """A request with a body is answered as any without a target, because nothing limits how slowly a body comes."""
    port = setup.proxy(await setup.upstream(must_not_be_called))
    response = await ask(port, "events", body=b"{}")
    assert (response.status, response.message) == (400, TargetMissing.message)


@pytest.mark.usefixtures("quick")
@pytest.mark.gen_test
async def test_at_once(setup: Setup) -> None:
    """Four responses are made at once, by one process. A client that leaves makes room."""
    port, backend = setup.proxy_and_backend(await setup.upstream(must_not_be_called), allow_diagnostics=True)
    assert (await ask(port, "events")).status == 200
    waiting = [await RawClient.open(port) for _ in range(MAX_AT_ONCE)]
    for client in waiting:
        await client.send("GET", target=None, headers=[f"{DIAGNOSTIC_HEADER}: silence=300"])
    await eventually(lambda: in_use(backend()) == MAX_AT_ONCE)
    refused = await ask(port, "events")
    assert (refused.status, refused.message) == (429, TooManyDiagnostics.message)
    assert refused.header("retry-after") == "60"
    waiting[0].leave()
    await eventually(lambda: in_use(backend()) == MAX_AT_ONCE - 1)
    assert (await ask(port, "events")).status == 200
    for client in waiting[1:]:
        client.leave()
    await eventually(lambda: in_use(backend()) == 0)


def in_use(backend: Backend) -> int:
    """Return how many responses are being made. Each has a slot, because a stop of the service waits for it."""
    assert backend.slots.in_use == backend.diagnostics._running
    return backend.slots.in_use


@pytest.mark.gen_test(timeout=300)
async def test_in_a_minute(clock: Clock) -> None:
    """No more are begun in a minute than a doctor needs."""
    counted = Diagnostics()
    for _ in range(MAX_PER_MINUTE):
        with counted.slot():
            pass
    with pytest.raises(TooManyDiagnostics), counted.slot():
        pass
    await clock.pass_by(60)
    with counted.slot():
        pass
