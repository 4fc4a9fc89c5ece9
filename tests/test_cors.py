"""CORS: which origins may read answers, what they are told, and that nobody else is told anything."""

from typing import Any

import pytest
from caller import Answer, Caller, call
from conftest import Logs, Setup
from tornado.web import Application, HTTPError
from upstream import Exchange

from tornado_fal_proxy import ConfigError, FalProxyHandler
from tornado_fal_proxy.cors import CorsRules, cors_rules, vary

APP = "https://app.example.com"
OTHER = "https://evil.example"
EXPOSED = "x-fal-request-id, x-fal-request-timeout-type"


def rules(*origins: str, **more: Any) -> CorsRules:
    made = cors_rules(origins, **more)
    assert made is not None
    return made


# What is allowed, an origin, and whether that is among it.
ORIGINS: list[tuple[tuple[str, ...], str | None, bool]] = [
    ((APP,), APP, True),
    ((APP,), None, False),
    ((APP,), "", False),
    ((APP,), "null", False),
    ((APP,), "*", False),
    ((APP,), OTHER, False),
    ((APP,), "http://app.example.com", False),
    ((APP,), "HTTPS://APP.EXAMPLE.COM", False),
    ((APP,), f"{APP}/", False),
    ((APP,), f"{APP}:443", False),
    ((APP,), f"{APP}:8443", False),
    ((APP,), f"{APP}.evil.example", False),
    ((APP,), f"{APP} ", False),
    ((APP,), f"{APP}, {OTHER}", False),
    ((APP,), "https://x.app.example.com", False),
    ((APP, "http://localhost:3000"), "http://localhost:3000", True),
    (("http://localhost:3000",), "http://localhost:3001", False),
    (("http://localhost:3000",), "http://localhost", False),
    (("http://[::1]:3000",), "http://[::1]:3000", True),
    (("https://xn--bcher-kva.example",), "https://xn--bcher-kva.example", True),
    (("https://*.example.com",), APP, True),
    (("https://*.example.com",), "https://a.b.example.com", True),
    (("https://*.example.com",), "https://example.com", False),
    (("https://*.example.com",), "https://evilexample.com", False),
    (("https://*.example.com",), "https://a.example.com.evil.example", False),
    (("https://*.example.com",), "https://evil.example?.example.com", False),
    (("https://*.example.com",), "https://evil.example/.example.com", False),
    (("https://*.example.com",), "https://evil.example#.example.com", False),
    (("https://*.example.com",), "https://a@b.example.com", False),
    (("https://*.example.com",), "https://*.example.com", False),
    (("https://*.example.com",), "https://.example.com", False),
    (("https://*.example.com",), "https://a..example.com", False),
    (("https://*.example.com",), "http://app.example.com", False),
    (("https://*.example.com",), "https://app.example.com:8443", False),
    (("https://*.example.com",), "https://app.example.com:443", False),
    (("https://*.example.com",), "https://A.example.com", False),
    (("https://*.example.com",), "https://a.example.com\n", False),
    (("https://*.example.com",), "null", False),
    (("https://*.example.com:8443",), "https://app.example.com:8443", True),
    (("https://*.example.com:8443",), APP, False),
    (("https://*.example.com", "https://b.example"), "https://b.example", True),
]


@pytest.mark.parametrize(("allowed", "origin", "passes"), ORIGINS)
def test_origins(allowed: tuple[str, ...], origin: str | None, passes: bool) -> None:
    """An exact origin is that text; a wildcard is any sub-domain, of that scheme and port. null is nobody."""
    assert rules(*allowed).allows(origin) is passes
    told = dict(rules(*allowed).answer_headers(origin))
    assert told == ({"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": EXPOSED} if passes else {})


BAD_ORIGINS = [
    *(
        "",
        "*",
        "null",
        "app.example.com",
        "//app.example.com",
        "https://",
        "ftp://a.example",
        "file://",
        "https://A.example",
    ),
    *("HTTPS://a.example", f"{APP}/", f"{APP}/x", f"{APP}?", f"{APP}#", f"{APP}:", f"{APP}:443", "http://a.example:80"),
    *(
        f"{APP}:0",
        f"{APP}:08",
        f"{APP}:65536",
        f"{APP}:99999999",
        "https://u@a.example",
        " https://a.example",
        f"{APP}\n",
    ),
    *(
        "https://*",
        "https://*.com",
        "https://*.localhost",
        "https://a.*.example",
        "https://a*.example.com",
        "https://**.a.com",
    ),
    *(
        "http://*.example.com",
        "https://*example.com",
        "https://ä.example",
        "https://a..example",
        "https://a.example.",
        "https://%61.example",
    ),
]


@pytest.mark.parametrize("origin", BAD_ORIGINS)
def test_bad_origin(origin: str) -> None:
    """What no browser sends, or what would be too many, is named; so is every other one of the list."""
    with pytest.raises(ConfigError) as caught:
        cors_rules((APP, origin, "x"))
    named, other = caught.value.problems
    assert named.startswith(f"allowed_origins: {origin!r} m")
    assert other.startswith("allowed_origins: 'x' must be an origin")


def test_off() -> None:
    """Without origins there are no rules."""
    assert cors_rules(None) is None


REQUESTED: list[tuple[str | None, str | None]] = [
    (None, None),
    ("", None),
    ("content-type", "content-type"),
    (
        "authorization,content-type,x-fal-target-url,x-app-fal-a",
        "authorization,content-type,x-fal-target-url,x-app-fal-a",
    ),
    (" accept , x-token\t", "accept , x-token"),
    ("a b", None),
    ("a,,b", None),
    ("a:b", None),
    ("a\r\nx: y", None),
    ("ä", None),
    ("a," * 3000 + "a", None),
]


@pytest.mark.parametrize(("requested", "allowed"), REQUESTED)
def test_requested_headers(requested: str | None, allowed: str | None) -> None:
    """All names that a page of an allowed origin asks for are allowed, and what is no list of names is not echoed."""
    assert dict(rules(APP).preflight_headers(requested)).get("Access-Control-Allow-Headers") == allowed


VARY: list[tuple[list[str], tuple[str, ...], list[str]]] = [
    ([], ("Origin",), ["Origin"]),
    (["Accept-Encoding"], ("Origin",), ["Accept-Encoding", "Origin"]),
    (["accept, origin"], ("Origin",), ["accept, origin"]),
    (["a", "b , ORIGIN"], ("Origin",), ["a", "b , ORIGIN"]),
    (["*"], ("Origin",), ["*"]),
    ([""], ("Origin",), ["Origin"]),
    (["original"], ("Origin",), ["original", "Origin"]),
    (["Origin"], ("Origin", "X"), ["Origin", "X"]),
]


@pytest.mark.parametrize(("lines", "names", "merged"), VARY)
def test_vary(lines: list[str], names: tuple[str, ...], merged: list[str]) -> None:
    """What the target varies by is never lost, and nothing is named twice."""
    assert vary(lines, *names) == merged


# Over the wire.

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


def cors_headers(answer: Answer) -> dict[str, str]:
    found = [(name, value) for name, value in answer.headers if name.startswith("access-control-")]
    assert len(dict(found)) == len(found)
    return dict(found)


def varied(answer: Answer) -> set[str]:
    lines = [value for name, value in answer.headers if name == "vary"]
    return {name.strip().lower() for line in lines for name in line.split(",")}


GRANTED = {"access-control-allow-origin": APP, "access-control-expose-headers": EXPOSED}
STREAM = "https://fal.run/fal-ai/flux/dev/stream"


@pytest.mark.parametrize("origin", [APP, OTHER, "null", None])
@pytest.mark.parametrize("target", ["https://fal.run/fal-ai/flux/dev", STREAM])
@pytest.mark.gen_test
async def test_relayed(setup: Setup, protocol: str, target: str, origin: str | None) -> None:
    """The proxy says who may read, whatever the target says; all else of the target's stays, each value of it."""
    port = setup.proxy(await setup.upstream(fine, protocol), allowed_origins=(APP,))
    answer = await call(port, target=target, headers=[f"origin: {origin}"] if origin else [])
    assert answer.status == 200
    assert cors_headers(answer) == (GRANTED if origin == APP else {})
    assert varied(answer) == {"accept", "accept-language", "origin"}
    assert [value for name, value in answer.headers if name == "set-cookie"] == ["a=1", "b=2"]
    assert answer.header("x-fal-request-id") == "1"


@pytest.mark.gen_test
async def test_off_nothing_is_touched(setup: Setup, protocol: str) -> None:
    """Without allowed_origins the target's own headers pass, as the formula has it."""
    port = setup.proxy(await setup.upstream(fine, protocol))
    answer = await call(port, headers=[f"origin: {APP}"])
    assert cors_headers(answer) == {
        name.lower(): value for name, value in TARGETS_OWN if name.lower().startswith("access")
    }
    assert varied(answer) == {"accept", "accept-language"}


# Calls that end with an answer of the proxy's own, and its status.
OWN_ANSWERS: list[tuple[str, dict[str, Any], int]] = [
    ("PUT", {}, 405),
    ("OPTIONS", {}, 405),
    ("BREW", {}, 405),
    ("POST", {"target": None}, 400),
    ("POST", {"target": "https://evil.com"}, 412),
    ("POST", {"target": "https://fal.run/other/x"}, 403),
    ("POST", {"headers": ["content-encoding: gzip"]}, 415),
    ("POST", {"body": b" " * 2000}, 413),
    ("POST", {"headers": ["x-answer: 401"]}, 401),
    ("POST", {"headers": ["x-answer: 418"]}, 418),
    ("POST", {"headers": ["x-answer: bug"]}, 500),
    ("POST", {}, 502),
]


def authorize(handler: FalProxyHandler, target: object) -> bool:
    answer = handler.request.headers.get("x-answer", "")
    if answer.isdigit() and answer != "401":
        raise HTTPError(int(answer))
    assert answer != "bug"
    return not answer


@pytest.mark.parametrize(("method", "arguments", "status"), OWN_ANSWERS)
@pytest.mark.gen_test
async def test_own_answers(setup: Setup, logs: Logs, method: str, arguments: dict[str, Any], status: int) -> None:
    """A page may read why its call was refused; a page of another origin is told nothing."""
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
        answer = await call(port, method, **{**arguments, "headers": headers})
        assert answer.status == status
        assert answer.message
        assert cors_headers(answer) == granted
        assert varied(answer) == {"origin"}


PREFLIGHT = ["access-control-request-method: POST", "access-control-request-headers: content-type,x-fal-target-url"]


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("credentials", [False, True])
@pytest.mark.gen_test
async def test_preflight(setup: Setup, cancel: bool, credentials: bool) -> None:
    """An allowed page is told what it may do, without a target, a key or a call; the connection stays in step."""
    fields: dict[str, Any] = {"allow_cancel": cancel, "allow_credentials": credentials, "authorize": lambda *_: False}
    port = setup.proxy("127.0.0.1:1", allowed_origins=(APP,), key=None, **fields)
    caller = await Caller.open(port)
    for _ in range(2):
        await caller.send("OPTIONS", target=None, headers=[f"origin: {APP}", *PREFLIGHT])
        answer = await caller.answer()
        assert (answer.status, answer.body, answer.header("content-type")) == (204, b"", None)
        assert cors_headers(answer) == GRANTED | {
            "access-control-allow-methods": "GET, POST, PUT" if cancel else "GET, POST",
            "access-control-allow-headers": "content-type,x-fal-target-url",
            "access-control-max-age": "7200",
            **({"access-control-allow-credentials": "true"} if credentials else {}),
        }
        assert varied(answer) == {"origin", "access-control-request-method", "access-control-request-headers"}
    await caller.close()


# Headers of an OPTIONS that is no preflight of an allowed page's, and what it is answered.
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
    """Another origin is refused and told nothing; a plain OPTIONS is a method like others."""
    port = setup.proxy("127.0.0.1:1", allowed_origins=(APP,))
    answer = await call(port, "OPTIONS", target=None, headers=headers)
    assert answer.status == status
    assert ("allowed_origins" in answer.message) is (status == 403)
    assert "access-control-allow-methods" not in cors_headers(answer)
    assert ("access-control-allow-origin" in cors_headers(answer)) is (
        headers[:1] == [f"origin: {APP}"] and status == 405
    )
    assert varied(answer) == {"origin"}


class Redirecting(FalProxyHandler):
    def set_default_headers(self) -> None:
        self.set_header("Access-Control-Allow-Origin", "*")
        self.set_header("Vary", "X-App")

    def authorize(self, target: object) -> Any:
        self.redirect("/login")


@pytest.mark.gen_test
async def test_an_answer_of_the_subclass(setup: Setup) -> None:
    """What a subclass answers by itself carries the same; the application's default headers do not speak for this."""
    config = setup.config("127.0.0.1:1", allowed_origins=(APP,))
    rule = ("/api/fal/proxy", Redirecting, {"config": config})
    port = setup.serve(Application([rule], log_function=lambda handler: None))
    for origin, granted in ((APP, GRANTED), (OTHER, {})):
        answer = await call(port, "GET", headers=[f"origin: {origin}"])
        assert (answer.status, answer.header("location")) == (302, "/login")
        assert cors_headers(answer) == granted
        assert varied(answer) == {"x-app", "origin"}
        assert cors_headers(await call(port, "PUT", headers=[f"origin: {origin}"])) == granted


# The rules alone.

TOLD: list[tuple[str | None, bool, list[tuple[str, str]]]] = [
    (None, False, []),
    (None, True, []),
    (OTHER, False, []),
    (OTHER, True, []),
    (APP, False, [("Access-Control-Allow-Origin", APP), ("Access-Control-Expose-Headers", EXPOSED)]),
    (
        APP,
        True,
        [
            ("Access-Control-Allow-Origin", APP),
            ("Access-Control-Expose-Headers", EXPOSED),
            ("Access-Control-Allow-Credentials", "true"),
        ],
    ),
]


@pytest.mark.parametrize(("origin", "credentials", "headers"), TOLD)
def test_headers_for_an_origin(origin: str | None, credentials: bool, headers: list[tuple[str, str]]) -> None:
    """A page of an allowed origin gets exactly these headers, and any other page gets none."""
    assert rules(APP, allow_credentials=credentials).answer_headers(origin) == headers


@pytest.mark.parametrize(("cancel", "methods"), [(False, "GET, POST"), (True, "GET, POST, PUT")])
def test_methods_of_a_preflight(cancel: bool, methods: str) -> None:
    """PUT is allowed to pages only where the proxy relays PUT."""
    assert dict(rules(APP, allow_cancel=cancel).preflight_headers(None))["Access-Control-Allow-Methods"] == methods


CONTRADICTIONS: list[tuple[object, bool, str]] = [
    (None, True, "allow_credentials: needs allowed_origins"),
    ((), False, "allowed_origins: must be a list of origins, or left out for no CORS at all, not ()"),
    (APP, False, f"allowed_origins: must be a list of origins, or left out for no CORS at all, not {APP!r}"),
    (
        (APP, "https://*.example.com"),
        True,
        "allow_credentials: works only where all allowed_origins are exact, without *",
    ),
]


@pytest.mark.parametrize(("origins", "credentials", "problem"), CONTRADICTIONS)
def test_origins_that_make_no_rules(origins: Any, credentials: bool, problem: str) -> None:
    """Credentials for nobody, for an empty list or for a wildcard are refused, with the option to change."""
    with pytest.raises(ConfigError) as caught:
        cors_rules(origins, allow_credentials=credentials)
    assert caught.value.problems == (problem,)
