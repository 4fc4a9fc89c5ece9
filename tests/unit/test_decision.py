"""May this request pass: the order of refusals, methods, the target header, and what a body must be."""

import itertools

import pytest

from tornado_fal_proxy.errors import (
    BodyTooLarge,
    MethodNotAllowed,
    ProxyError,
    TargetMissing,
    TargetRefused,
    UnsupportedMediaType,
)
from tornado_fal_proxy.rules.policy import decide
from tornado_fal_proxy.rules.target import Target

# The order of refusals: a fault, as a change of a request that may pass, and its error and status.

Request = dict[str, str]
GOOD: Request = {"method": "POST", "url": "https://fal.run/a", "type": "application/json", "length": "10"}
FAULTS: list[tuple[Request, type[ProxyError], int]] = [
    ({"method": "PUT"}, MethodNotAllowed, 405),
    ({"url": ""}, TargetMissing, 400),
    ({"url": "https://evil.com/"}, TargetRefused, 412),
    ({"type": "text/plain"}, UnsupportedMediaType, 415),
    ({"length": "11"}, BodyTooLarge, 413),
]


def decided(request: Request) -> Target:
    headers = [("host", "app.example"), ("x-fal-target-url", request["url"])]
    headers += [("content-type", request["type"]), ("content-length", request["length"])]
    return decide(request["method"], headers, max_body_bytes=10)


@pytest.mark.parametrize("faults", [set_ for n in range(6) for set_ in itertools.combinations(FAULTS, n)])
def test_the_first_fault_in_the_formulas_order_is_answered(
    faults: tuple[tuple[Request, type[ProxyError], int], ...],
) -> None:
    """Every set of faults is answered with the first of 405, 400, 412, 415 and 413 that is among them."""
    request = dict(GOOD)
    for change, _, _ in reversed(faults):
        request.update(change)
    if not faults:
        assert decided(request) == Target("fal.run", "/a")
    else:
        _, error, status = faults[0]
        with pytest.raises(error) as caught:
            decided(request)
        assert type(caught.value) is error
        assert caught.value.status == status


METHODS = {
    "GET": True,
    "POST": True,
} | dict.fromkeys(
    ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "CONNECT", "TRACE", "PROPFIND", "get", "Post", ""], False
)


@pytest.mark.parametrize(("method", "allowed"), METHODS.items())
def test_only_get_and_post_are_allowed(method: str, allowed: bool) -> None:
    """Any other method is answered 405 with the allowed ones, also one that differs in case only."""
    headers = [("x-fal-target-url", "https://fal.run/")]
    if allowed:
        assert decide(method, headers, max_body_bytes=1).host == "fal.run"
    else:
        with pytest.raises(MethodNotAllowed) as caught:
            decide(method, headers, max_body_bytes=1)
        assert caught.value.headers == (("Allow", "GET, POST"),)


@pytest.mark.parametrize(
    "urls",
    [
        [],
        [""],
        ["", ""],
        ["https://fal.run/", "https://fal.run/"],
        ["https://fal.run/", "https://evil.com/"],
        ["https://evil.com/", "https://fal.run/"],
        ["", "https://fal.run/"],
        ["https://fal.run/", ""],
    ],
)
def test_exactly_one_target_header_is_needed(urls: list[str]) -> None:
    """A missing, an empty and a repeated target header are answered 400, whatever their values are."""
    with pytest.raises(TargetMissing):
        decide("GET", [("x-fal-target-url", url) for url in urls], max_body_bytes=1)


# Headers about the body, and their error: None for a call that passes. At most 100 bytes are allowed.
JSON = ("content-type", "application/json")
BODIES: list[tuple[list[tuple[str, str]], type[ProxyError] | None]] = [
    # No body, no check.
    ([], None),
    ([("content-length", "0")], None),
    ([("content-length", "00")], None),
    ([("content-length", "0"), ("content-type", "text/plain")], None),
    ([("content-type", "text/plain")], None),
    ([JSON], None),
    ([("content-encoding", "gzip")], None),
    # JSON, however it is spelled.
    ([JSON, ("content-length", "2")], None),
    ([("content-type", "application/json; charset=utf-8"), ("content-length", "2")], None),
    ([("content-type", "application/json;charset=UTF-8"), ("content-length", "2")], None),
    ([("content-type", "application/json ; a=b; c"), ("content-length", "2")], None),
    ([("content-type", "application/json\t;"), ("content-length", "2")], None),
    ([("content-type", "Application/JSON"), ("content-length", "2")], None),
    ([JSON, JSON, ("content-length", "2")], None),
    ([JSON, ("transfer-encoding", "chunked")], None),
    ([JSON, ("content-length", "2"), ("content-encoding", "identity")], None),
    ([JSON, ("content-length", "2"), ("content-encoding", "Identity")], None),
    # Anything else.
    ([("content-length", "2")], UnsupportedMediaType),
    ([("transfer-encoding", "chunked")], UnsupportedMediaType),
    ([("transfer-encoding", "chunked"), ("content-length", "0")], UnsupportedMediaType),
    ([("content-type", ""), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "text/plain"), ("transfer-encoding", "chunked")], UnsupportedMediaType),
    ([("content-type", "text/json"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/jsonp"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/json5"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/json-seq"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/problem+json"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "xapplication/json"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/json, text/plain"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "text/plain; application/json"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/json charset=utf-8"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/json\n"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/json;\n"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "multipart/form-data; boundary=a"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/x-www-form-urlencoded"), ("content-length", "2")], UnsupportedMediaType),
    ([JSON, ("content-type", "text/plain"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "text/plain"), JSON, ("content-length", "2")], UnsupportedMediaType),
    # It would reach fal as JSON that is none, because content-encoding is not relayed.
    ([JSON, ("content-length", "2"), ("content-encoding", "gzip")], UnsupportedMediaType),
    ([JSON, ("transfer-encoding", "chunked"), ("content-encoding", "br")], UnsupportedMediaType),
    ([JSON, ("content-length", "2"), ("content-encoding", "identity, gzip")], UnsupportedMediaType),
    # Sizes.
    ([JSON, ("content-length", "100")], None),
    ([JSON, ("content-length", "101")], BodyTooLarge),
    ([JSON, ("content-length", "999999999999999999")], BodyTooLarge),
    ([JSON, ("content-length", "2"), ("content-length", "101")], BodyTooLarge),
    ([JSON, ("content-length", "0"), ("content-length", "101")], BodyTooLarge),
    # A value that is no length is Tornado's to refuse, and a body is counted while it is read.
    ([JSON, ("content-length", "-1")], None),
    ([JSON, ("content-length", "1e9")], None),
    ([JSON, ("content-length", "1_000")], None),
    ([JSON, ("content-length", "\u0661")], None),
]


@pytest.mark.parametrize(("headers", "error"), BODIES)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_body_must_be_json_and_not_too_large(
    method: str, headers: list[tuple[str, str]], error: type[ProxyError] | None
) -> None:
    """A body must be JSON and not too large, also with GET, because both methods can have a body or none."""
    headers = [("x-fal-target-url", "https://fal.run/"), *headers]
    if error is None:
        assert decide(method, headers, max_body_bytes=100).host == "fal.run"
    else:
        with pytest.raises(error):
            decide(method, headers, max_body_bytes=100)
