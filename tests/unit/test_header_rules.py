"""The operator's rules on fal's own headers: which a client may send, which are set, and which stay here."""

from typing import Any

import pytest

from tornado_fal_proxy import ConfigError, ProxyConfig
from tornado_fal_proxy.errors import EndpointNotAllowed, HeaderNotAllowed, ProxyError, WebhookNotAllowed
from tornado_fal_proxy.rules.fal_headers import SDK_HEADERS, HeaderRules, as_header_lines
from tornado_fal_proxy.rules.policy import decide
from tornado_fal_proxy.sandbox import Sandbox

POLICY = "x-app-fal-upload-policy"
RESTRICTED = {"allowed_endpoints": ["fal-ai/flux"]}


def header_rules(**fields: Any) -> HeaderRules | None:
    return ProxyConfig(key="key", **fields).headers


@pytest.mark.parametrize(
    ("fields", "name", "refused"),
    [
        *((RESTRICTED, name, None) for name in SDK_HEADERS),
        (RESTRICTED, "x-fal-store-io", HeaderNotAllowed),
        (RESTRICTED, "x-app-fal-can-disable-filter", HeaderNotAllowed),
        (RESTRICTED, POLICY, HeaderNotAllowed),
        # Headers that are not relayed are nobody's concern.
        (RESTRICTED, "x-fal-target-url", None),
        (RESTRICTED, "x-fal-client-proxy", None),
        (RESTRICTED, "x-falsify", None),
        (RESTRICTED, Sandbox.host_header.lower(), None),
        (RESTRICTED, "cookie", None),
        (RESTRICTED | {"allowed_fal_headers": ["*"]}, "x-fal-store-io", None),
        (RESTRICTED | {"allowed_fal_headers": []}, "x-fal-queue-priority", HeaderNotAllowed),
        ({"allowed_fal_headers": ["x-fal-store-*"]}, "x-fal-store-io", None),
        ({"allowed_fal_headers": ["x-fal-store-*"]}, "x-fal-storeio", HeaderNotAllowed),
        ({"allowed_fal_headers": ["x-fal-store-*"]}, "x-fal-queue-priority", HeaderNotAllowed),
        ({"allowed_fal_headers": ["x-fal-*"]}, "x-app-fal-x", HeaderNotAllowed),
        ({"allowed_fal_headers": ["x-fal-*-a*z"]}, "x-fal-1-abz", None),
        ({"allowed_fal_headers": ["x-fal-*"]}, "x-fal-" + "a" * 123, HeaderNotAllowed),
        # What is set replaces the client's own.
        (RESTRICTED | {"set_fal_headers": ["x-fal-store-io: 0"]}, "x-fal-store-io", None),
        ({"set_fal_headers": ["x-fal-store-io: 0"]}, "x-fal-other", None),
        ({"allowed_webhooks": []}, POLICY, WebhookNotAllowed),
        ({"allowed_webhooks": ["https://a.example"]}, POLICY, WebhookNotAllowed),
        ({"allowed_webhooks": [], "allowed_fal_headers": ["*"]}, POLICY, WebhookNotAllowed),
        ({"allowed_webhooks": [], "set_fal_headers": [f"{POLICY}: mine"]}, POLICY, None),
        ({"allowed_webhooks": []}, "x-fal-store-io", None),
    ],
)
def test_check(fields: dict[str, Any], name: str, refused: type[ProxyError] | None) -> None:
    """A header that a rule does not allow is refused, and the message names the rule."""
    rules = header_rules(**fields)
    assert rules is not None
    headers = [("accept", "*/*"), (name, "value")]
    if refused is None:
        rules.check(headers)
        return
    with pytest.raises(refused) as caught:
        rules.check(headers)
    assert caught.value.status == 403
    assert "allowed_webhooks" in caught.value.message or "allowed_fal_headers" in caught.value.message


def test_order() -> None:
    """Headers are looked at after the endpoint, and before the body."""
    config = ProxyConfig(key="key", **RESTRICTED)  # type: ignore[arg-type]

    def decided(path: str) -> None:
        url = ("x-fal-target-url", f"https://fal.run{path}")
        headers = [url, ("x-fal-store-io", "0"), ("content-type", "text/plain"), ("content-length", "1")]
        decide("POST", headers, max_body_bytes=10, access=config.access, header_rules=config.headers)

    with pytest.raises(EndpointNotAllowed):
        decided("/fal-ai/other")
    with pytest.raises(HeaderNotAllowed):
        decided("/fal-ai/flux")


@pytest.mark.parametrize("fields", [{}, {"allowed_hosts": ["fal.run"]}, {"allow_cancel": True}])
def test_without_rules(fields: dict[str, Any]) -> None:
    """Without a rule nothing is checked, as fal's formula has it."""
    assert header_rules(**fields) is None


def test_set() -> None:
    """What the operator sets goes to fal in place of the client's, and nothing else changes."""
    rules = header_rules(set_fal_headers=["X-Fal-Store-IO:  0 ", "x-fal-tags: a=b,c=d"])
    assert rules is not None
    assert rules.lines == (b"x-fal-store-io: 0", b"x-fal-tags: a=b,c=d")
    pairs = [("x-fal-store-io", "1"), ("accept", "*/*"), ("x-fal-tags", ""), ("x-fal-store-io", "2")]
    assert rules.without_own(pairs) == [("accept", "*/*")]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("x-fal-store-io: 0", ("x-fal-store-io: 0",)),
        ("x-fal-tags: a=b,c=d, x-fal-store-io:0", ("x-fal-tags: a=b,c=d", "x-fal-store-io:0")),
        ("x-fal-a: 1,X-App-Fal-B : 2", ("x-fal-a: 1", "X-App-Fal-B : 2")),
        ("nonsense", ("nonsense",)),
    ],
)
def test_text(text: str, lines: tuple[str, ...]) -> None:
    """A text is split between lines, and not in their values."""
    assert as_header_lines(text) == lines


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("allowed_fal_headers", "x-fal-a"),
        ("allowed_fal_headers", [1]),
        ("allowed_fal_headers", ["cookie"]),
        ("allowed_fal_headers", ["x-*"]),
        ("allowed_fal_headers", ["X-Fal-A"]),
        ("allowed_fal_headers", ["x-fal-"]),
        ("set_fal_headers", "x-fal-a: 1"),
        ("set_fal_headers", ["x-fal-a"]),
        ("set_fal_headers", ["x-fal-a:"]),
        ("set_fal_headers", ["authorization: Key x"]),
        ("set_fal_headers", ["x-fal-target-url: https://fal.run/"]),
        ("set_fal_headers", ["x-fal-client-proxy: me"]),
        ("set_fal_headers", ["x-fal-a: 1\r\nauthorization: x"]),
        ("set_fal_headers", ["x-fal-a: é"]),
        ("set_fal_headers", ["x-fal-a: 1", "X-FAL-A: 2"]),
        ("withhold_headers", "alt-svc"),
        ("withhold_headers", ["content-type"]),
        ("withhold_headers", ["Content-Length"]),
        ("withhold_headers", ["alt svc"]),
        ("expose_headers", "x-fal-a"),
        ("expose_headers", ["x,y"]),
        ("expose_headers", ["*\n"]),
    ],
)
def test_refused(field: str, value: object) -> None:
    """A wrong value is named together with its field."""
    with pytest.raises(ConfigError, match=f"^{field}: "):
        ProxyConfig(key="key", allowed_origins=["https://a.example"], **{field: value})  # type: ignore[arg-type]


def test_tags_have_one_source() -> None:
    """Who sets tags for users cannot set others."""
    with pytest.raises(ConfigError, match="set_fal_headers: x-fal-tags is set by tag_users"):
        ProxyConfig(key="key", tag_users=True, set_fal_headers=["x-fal-tags: a=b"])
