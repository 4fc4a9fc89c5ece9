"""CORS over the wire: pages of allowed origins may read responses, and pages of other origins may not."""

from typing import Any

import pytest
from tornado.web import Application, HTTPError

from tests.support.logs import Logs
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, Response, call
from tests.support.scripted_upstream import Exchange
from tornado_fal_proxy import FalProxyHandler

APP = "https://app.example.com"
OTHER = "https://evil.example"
EXPOSED = "x-fal-request-id, x-fal-request-timeout-type, x-fal-billable-units"
TARGETS_OWN = [
    *[
        ("access-control-allow-origin", "*"),
        ("access-control-allow-credentials", "true"),
        ("access-control-max-age", "9"),
    ],
    *[
        ("access-control-expose-headers", "x-secret"),
        ("vary", "Accept"),
        ("vary", "Accept-Language"),
        ("set-cookie", "a=1"),
    ],
    *[("set-cookie", "b=2"), ("x-fal-request-id", "1"), ("content-type", "application/json")],
]


async def fine(exchange: Exchange) -> None:
    await exchange.body()
    if exchange.target.endswith(b"/stream"):
        own = [pair for pair in TARGETS_OWN if pair[0] != "content-type"]
        await exchange.start(200, [*own, ("content-type", "text/event-stream")])
        await exchange.send(b"data: 1\n\n")
        await exchange.end()
    else:
        await exchange.respond(200, b"{}", TARGETS_OWN)


def cors_headers(response: Response) -> dict[str, str]:
    found = [(name, value) for name, value in response.headers if name.startswith("access-control-")]
    assert len(dict(found)) == len(found)
    return dict(found)


def varied(response: Response) -> set[str]:
    """Return the names in ``vary``, without the target's header, which is always among them."""
    lines = [value for name, value in response.headers if name == "vary"]
    names = {name.strip().lower() for line in lines for name in line.split(",")}
    assert "x-fal-target-url" in names
    return names - {"x-fal-target-url"}


GRANTED = {"access-control-allow-origin": APP, "access-control-expose-headers": EXPOSED}
STREAM = "https://fal.run/fal-ai/flux/dev/stream"


@pytest.mark.parametrize("origin", [APP, OTHER, "null", None])
@pytest.mark.parametrize("target", ["https://fal.run/fal-ai/flux/dev", STREAM])
@pytest.mark.gen_test
async def test_relayed(setup: Setup, protocol: str, target: str, origin: str | None) -> None:
    """The proxy alone decides which pages may read; all other headers of the target stay, each value of them."""
    port = setup.proxy(await setup.upstream(fine, protocol), allowed_origins=(APP,))
    response = await call(port, target=target, headers=[f"origin: {origin}"] if origin else [])
    assert response.status == 200
    assert cors_headers(response) == (GRANTED if origin == APP else {})
    assert varied(response) == {"accept", "accept-language", "origin"}
    assert [value for name, value in response.headers if name == "set-cookie"] == ["a=1", "b=2"]
    assert response.header("x-fal-request-id") == "1"


@pytest.mark.gen_test
async def test_off_nothing_is_touched(setup: Setup, protocol: str) -> None:
    """Without allowed_origins the target's own headers pass, as fal's proxy formula requires."""
    port = setup.proxy(await setup.upstream(fine, protocol))
    response = await call(port, headers=[f"origin: {APP}"])
    assert cors_headers(response) == {
        name.lower(): value for name, value in TARGETS_OWN if name.lower().startswith("access")
    }
    assert varied(response) == {"accept", "accept-language"}


# Calls that end with a response of the proxy's own, and its status.
OWN_RESPONSES: list[tuple[str, dict[str, Any], int]] = [
    ("PUT", {}, 405),
    ("OPTIONS", {}, 405),
    ("BREW", {}, 405),
    ("POST", {"target": None}, 400),
    ("POST", {"target": "https://evil.com"}, 412),
    ("POST", {"target": "https://fal.run/other/x"}, 403),
    ("POST", {"headers": ["content-encoding: gzip"]}, 415),
    ("POST", {"body": b" " * 2000}, 413),
    ("POST", {"headers": ["x-result: 401"]}, 401),
    ("POST", {"headers": ["x-result: 418"]}, 418),
    ("POST", {"headers": ["x-result: bug"]}, 500),
    ("POST", {}, 502),
]


def authorize(handler: FalProxyHandler, target: object) -> bool:
    result = handler.request.headers.get("x-result", "")
    if result.isdigit() and result != "401":
        raise HTTPError(int(result))
    assert result != "bug"
    return not result


@pytest.mark.parametrize(("method", "arguments", "status"), OWN_RESPONSES)
@pytest.mark.gen_test
async def test_own_responses(setup: Setup, logs: Logs, method: str, arguments: dict[str, Any], status: int) -> None:
    """A page may read why its call was refused; a page of another origin may not."""
    port = setup.proxy(
        "127.0.0.1:1",
        allowed_origins=(APP,),
        allowed_endpoints=("fal-ai/**",),
        max_body_bytes=1000,
        authorize=authorize,
    )
    if status in (500, 502):
        logs.expect("AssertionError" if status == 500 else "502 POST")
    for origin, granted in ((APP, GRANTED), (OTHER, {}), (None, {})):
        headers = [*arguments.get("headers", ()), *([f"origin: {origin}"] if origin else [])]
        response = await call(port, method, **{**arguments, "headers": headers})
        assert response.status == status
        assert response.message
        assert cors_headers(response) == granted
        assert varied(response) == {"origin"}


PREFLIGHT = ["access-control-request-method: POST", "access-control-request-headers: content-type,x-fal-target-url"]


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("credentials", [False, True])
@pytest.mark.gen_test
async def test_preflight(setup: Setup, cancel: bool, credentials: bool) -> None:
    """An allowed page gets its permissions without a target, a key or a call, and the connection stays in step."""
    fields: dict[str, Any] = {"allow_cancel": cancel, "allow_credentials": credentials, "authorize": lambda *_: False}
    port = setup.proxy("127.0.0.1:1", allowed_origins=(APP,), key=None, **fields)
    client = await RawClient.open(port)
    for _ in range(2):
        await client.send("OPTIONS", target=None, headers=[f"origin: {APP}", *PREFLIGHT])
        response = await client.response()
        assert (response.status, response.body, response.header("content-type")) == (204, b"", None)
        assert cors_headers(response) == GRANTED | {
            "access-control-allow-methods": "GET, POST, PUT" if cancel else "GET, POST",
            "access-control-allow-headers": "content-type,x-fal-target-url",
            "access-control-max-age": "7200",
            **({"access-control-allow-credentials": "true"} if credentials else {}),
        }
        assert varied(response) == {"origin", "access-control-request-method", "access-control-request-headers"}
    await client.close()


# Headers of an OPTIONS that is no preflight of an allowed page's, and the status of its response.
NO_PREFLIGHT: list[tuple[list[str], int]] = [
    ([f"origin: {OTHER}", *PREFLIGHT], 403),
    (["origin: null", *PREFLIGHT], 403),
    ([f"origin: {APP}", f"origin: {APP}", *PREFLIGHT], 403),
    ([f"origin: {APP}", f"origin: {OTHER}", *PREFLIGHT], 403),
    ([f"origin: {APP}, {OTHER}", *PREFLIGHT], 403),
    (PREFLIGHT, 405),
    ([f"origin: {APP}", PREFLIGHT[1]], 405),
    ([], 405),
]


@pytest.mark.parametrize(("headers", "status"), NO_PREFLIGHT)
@pytest.mark.gen_test
async def test_no_preflight(setup: Setup, headers: list[str], status: int) -> None:
    """Another origin gets 403 and no permission; a plain OPTIONS is refused like any other method."""
    port = setup.proxy("127.0.0.1:1", allowed_origins=(APP,))
    response = await call(port, "OPTIONS", target=None, headers=headers)
    assert response.status == status
    assert ("allowed_origins" in response.message) is (status == 403)
    assert "access-control-allow-methods" not in cors_headers(response)
    assert ("access-control-allow-origin" in cors_headers(response)) is (
        headers[:1] == [f"origin: {APP}"] and status == 405
    )
    assert varied(response) == {"origin"}


class Redirecting(FalProxyHandler):
    def set_default_headers(self) -> None:
        self.set_header("Access-Control-Allow-Origin", "*")
        self.set_header("Vary", "X-App")

    def authorize(self, target: object) -> Any:
        self.redirect("/login")


@pytest.mark.gen_test
async def test_a_response_of_the_subclass(setup: Setup) -> None:
    """A subclass's own response has the proxy's CORS headers, and not those of the application's default headers."""
    config = setup.config("127.0.0.1:1", allowed_origins=(APP,))
    rule = ("/api/fal/proxy", Redirecting, {"config": config})
    port = setup.serve(Application([rule], log_function=lambda handler: None))
    for origin, granted in ((APP, GRANTED), (OTHER, {})):
        response = await call(port, "GET", headers=[f"origin: {origin}"])
        assert (response.status, response.header("location")) == (302, "/login")
        assert cors_headers(response) == granted
        assert varied(response) == {"x-app", "origin"}
        assert cors_headers(await call(port, "PUT", headers=[f"origin: {origin}"])) == granted
