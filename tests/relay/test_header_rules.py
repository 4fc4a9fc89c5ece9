"""The operator's rules on headers over the wire: what fal gets, and what the client gets."""

import json

import pytest

from tests.support.proxy import Setup
from tests.support.raw_client import call
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import JSON

PAGE = "https://app.example.com"


async def respond(exchange: Exchange) -> None:
    await exchange.body()
    headers = [("alt-svc", 'h3=":443"'), ("strict-transport-security", "max-age=1"), ("x-fal-billable-units", "1")]
    await exchange.respond(200, b"{}", [*JSON, *headers])


@pytest.mark.gen_test
async def test_set(setup: Setup, protocol: str) -> None:
    """fal gets what the operator sets, once, even where the client's Connection lists the header."""
    upstream = await setup.upstream(respond, protocol)
    port = setup.proxy(upstream, set_fal_headers=["x-fal-store-io: 0"])
    headers = ["X-Fal-Store-IO: 1", "x-fal-queue-priority: low", "connection: x-fal-store-io"]
    assert (await call(port, headers=headers)).status == 200
    [exchange] = upstream.exchanges
    assert [value for name, value in exchange.headers if name == b"x-fal-store-io"] == [b"0"]
    assert exchange.header("x-fal-queue-priority") == b"low"


@pytest.mark.gen_test
async def test_refused(setup: Setup) -> None:
    """A header that is not allowed is 403, after the endpoint and before the body, and nothing leaves."""
    upstream = await setup.upstream(respond)
    port = setup.proxy(upstream, allowed_endpoints=["fal-ai/flux/dev"])
    response = await call(port, target="https://fal.run/fal-ai/flux/dev", headers=["x-app-fal-disable-fallbacks: 1"])
    assert (response.status, "allowed_fal_headers" in response.message) == (403, True)
    response = await call(port, target="https://fal.run/fal-ai/other", headers=["x-app-fal-disable-fallbacks: 1"])
    assert (response.status, "allowed_endpoints" in response.message) == (403, True)
    assert not upstream.exchanges


@pytest.mark.gen_test
async def test_withheld_and_exposed(setup: Setup, protocol: str) -> None:
    """Headers that speak for fal's host stay here where the operator says so, and pages may read what is exposed."""
    upstream = await setup.upstream(respond, protocol)
    plain = await call(setup.proxy(upstream), headers=[f"origin: {PAGE}"])
    assert plain.header("alt-svc") == 'h3=":443"'
    port = setup.proxy(
        upstream,
        withhold_headers=["Alt-Svc", "strict-transport-security"],
        allowed_origins=[PAGE],
        expose_headers=["x-fal-served-from"],
    )
    response = await call(port, headers=[f"origin: {PAGE}"])
    assert (response.header("alt-svc"), response.header("strict-transport-security")) == (None, None)
    assert response.header("x-fal-billable-units") == "1"
    exposed = (response.header("access-control-expose-headers") or "").split(", ")
    assert {"x-fal-billable-units", "x-fal-served-from", "x-fal-request-id"} <= set(exposed)
    assert json.loads(response.body) == {}


@pytest.mark.parametrize(("fields", "status"), [({}, 405), ({"allow_cancel": True}, 200)])
@pytest.mark.gen_test
async def test_cancel(setup: Setup, fields: dict[str, bool], status: int) -> None:
    """The refusal of a cancel names the option that would allow it."""
    upstream = await setup.upstream(respond)
    target = "https://queue.fal.run/fal-ai/flux/requests/764cabcf-b745-4b3e-ae38-1200304cf45b/cancel"
    response = await call(setup.proxy(upstream, **fields), "PUT", target=target)
    assert response.status == status
    if status == 405:
        assert "allow_cancel" in response.message
