"""CORS rules: which origins may read responses, and which headers they get."""

from typing import Any

import pytest

from tornado_fal_proxy import ConfigError
from tornado_fal_proxy.rules.cors import CorsRules, cors_rules, vary

APP = "https://app.example.com"
OTHER = "https://evil.example"
EXPOSED = "x-fal-request-id, x-fal-request-timeout-type, x-fal-billable-units"


def rules(*origins: str, **more: Any) -> CorsRules:
    made = cors_rules(origins, **more)
    assert made is not None
    return made


# The allowed origins, an origin, and whether it is one of them.
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
    """An exact origin is that text, a wildcard is any sub-domain of that scheme and port, and null is never allowed."""
    assert rules(*allowed).allows(origin) is passes
    headers = dict(rules(*allowed).response_headers(origin))
    allowing = {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": EXPOSED}
    assert headers == (allowing if passes else {})


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
    """An origin that no browser sends, or that would allow too many, is named beside every other problem."""
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
    """All names that a page of an allowed origin asks for are allowed, and other values are not echoed."""
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
    """The names that the target varies by are never lost, and no name is repeated."""
    assert vary(lines, *names) == merged


RESPONSE_HEADERS: list[tuple[str | None, bool, list[tuple[str, str]]]] = [
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


@pytest.mark.parametrize(("origin", "credentials", "headers"), RESPONSE_HEADERS)
def test_headers_for_an_origin(origin: str | None, credentials: bool, headers: list[tuple[str, str]]) -> None:
    """A page of an allowed origin gets exactly these headers, and any other page gets none."""
    assert rules(APP, allow_credentials=credentials).response_headers(origin) == headers


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
