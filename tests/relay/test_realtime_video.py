"""Realtime video: the signals to wma.fal.run, whose responses go out as they come and may stay open."""

import json

import pytest

from tests.support.clock import Clock
from tests.support.logs import Logs
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, call
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import JSON, as_asked, silent

WMA = "https://wma.fal.run"
OFFER = b'{"app_id":"me/app","sdp":"v=0","type":"offer"}'
ANSWER = b'{"session_id":"s1","sdp":"v=0","type":"answer"}'


@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream", "application/octet-stream"])
@pytest.mark.gen_test
async def test_session(setup: Setup, clock: Clock, protocol: str, content_type: str) -> None:
    """Head and pieces arrive at once, any silence passes, and fal sees at once that the client has left."""
    upstream = await setup.upstream(silent, protocol)
    client = await RawClient.open(setup.proxy(upstream, idle_timeout_s=0.5))
    await client.send("POST", target=f"{WMA}/session", body=OFFER)
    await clock.until(lambda: upstream.exchanges)
    exchange = upstream.exchanges[0]
    assert await exchange.body() == OFFER
    await exchange.start(200, [("content-type", content_type)])
    head = await client.head()
    assert (head.status, head.header("x-accel-buffering")) == (200, "no")
    for piece in (ANSWER[:20], ANSWER[20:], b"\n"):
        await exchange.send(piece)
        assert await client.chunk() == piece
    for _ in range(10):
        await clock.pass_by(2)
    await exchange.send(b'{"alive":true}')
    assert await client.chunk() == b'{"alive":true}'
    client.leave()
    await exchange.gone.wait()


@pytest.mark.gen_test
async def test_no_response(setup: Setup, logs: Logs, clock: Clock, protocol: str) -> None:
    """The wait for a head has its usual end."""
    logs.expect("no byte moved .*; the job may have run")
    upstream = await setup.upstream(silent, protocol)
    client = await RawClient.open(setup.proxy(upstream, idle_timeout_s=0.5))
    await client.send("POST", target=f"{WMA}/session", body=OFFER)
    await clock.until(lambda: upstream.exchanges)
    await clock.pass_by(2)
    assert (await client.response()).status == 500
    await client.close()


@pytest.mark.gen_test
async def test_never_sent_twice(setup: Setup, logs: Logs, protocol: str) -> None:
    """A session whose connection breaks is not opened once more, and the client learns that it may have been."""
    logs.expect("upstream error: 500 POST https://wma.fal.run/session: .*; the job may have run")

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        exchange.abort_connection()

    upstream = await setup.upstream(respond, protocol)
    assert (await call(setup.proxy(upstream), "POST", target=f"{WMA}/session", body=OFFER)).status == 500
    assert len(upstream.exchanges) == 1


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/ice", b'{"app_id":"me/app"}', 200),
        ("/session", OFFER, 200),
        ("/session/heartbeat", b'{"session_id":"s1"}', 200),
        ("/ice", b'{"app_id":"other/app"}', 403),
        ("/session", OFFER.replace(b"me/app", b"other/app"), 403),
        ("/session", OFFER[:-1] + b',"app_id":"other/app"}', 403),
        ("/session/other", OFFER, 403),
    ],
)
@pytest.mark.gen_test
async def test_allowed_endpoints(setup: Setup, path: str, body: bytes, status: int) -> None:
    """Under allowed_endpoints the body decides, before anything leaves."""
    upstream = await setup.upstream(as_asked)
    port = setup.proxy(upstream, allowed_endpoints=["me/app"])
    response = await call(port, "POST", target=f"{WMA}{path}", body=body)
    assert response.status == status
    assert len(upstream.exchanges) == (status == 200)
    if status == 403:
        assert "allowed_endpoints" in json.loads(response.body)["message"]


@pytest.mark.gen_test
async def test_plain_signals(setup: Setup, protocol: str) -> None:
    """A response that ends at once arrives whole, with its length."""

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.respond(200, b'{"ice_servers":[]}', JSON)

    upstream = await setup.upstream(respond, protocol)
    response = await call(setup.proxy(upstream), "POST", target=f"{WMA}/ice", body=b'{"app_id":"me/app"}')
    assert (response.status, response.body) == (200, b'{"ice_servers":[]}')
    assert response.header("content-length") == "18"
