"""The operator's rules for webhooks: queries that are allowed beside those that are refused."""

import itertools
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.access_rules import QUEUE, RUN, refusal, rules
from tests.support.strategies import examples
from tornado_fal_proxy.errors import (
    ConfigError,
    WebhookNotAllowed,
)
from tornado_fal_proxy.rules.access import access_rules

HOOKS = ("https://hooks.example", "https://b.example:8443")
WEBHOOKS_ALLOWED = [
    "",
    "a=b&c",
    "webhook=https://evil.example/",
    "prompt=fal_webhook",
    "fal_webhook=https%3A%2F%2Fhooks.example%2Fa%3Fb%3Dc%26d",
    "fal_webhook=https://hooks.example/",
    "fal_webhook=https://hooks.example",
    "a=b&fal_webhook=https%3A%2F%2Fb.example%3A8443%2Fx&c=d",
    "fal_webhook=https%3A%2F%2Fhooks.example%2Fa%252Fb",
    "fal_webhook=https%3A%2F%2Fhooks.example%2F%40evil.example",
    "fal_webhook=https://hooks.example/a;b=c",
]
WEBHOOKS_REFUSED = [
    *("fal_webhook", "fal_webhook=", "fal_webhook=hooks.example", "fal_webhook=//hooks.example/"),
    *("fal_webhook=https://evil.example/", "fal_webhook=http://hooks.example/", "fal_webhook=HTTPS://hooks.example/"),
    *("fal_webhook=https://hooks.example:443/", "fal_webhook=https://b.example/", "fal_webhook=https://Hooks.example/"),
    *("fal_webhook=https://hooks.example.evil.example/", "fal_webhook=https://hooks.example:8443/"),
    *("fal_webhook=https://hooks.example@evil.example/", "fal_webhook=https://hooks.example%40evil.example/"),
    *("fal_webhook=https://x@hooks.example/", "fal_webhook=https://hooks.example?@evil.example"),
    *("fal_webhook=https://hooks.example%5C@evil.example", "fal_webhook=https://hooks.example%23@evil.example/"),
    *(
        "fal_webhook=https://hooks.example%2F%0A",
        "fal_webhook=https://hooks.example/%00",
        "fal_webhook=https://hooks.example/%ff",
    ),
    *(
        "fal_webhook=https://hooks.example/%5C",
        "fal_webhook=https://hooks.example/%c3%a9",
        "fal_webhook=+https://hooks.example/",
    ),
    *(
        "fal_webhook=https://hooks.example/a+b",
        "fal_webhook=https://hooks.example/%",
        "fal_webhook=https://hooks.example/%zz",
    ),
    *(
        "fal_webhook=https%253A%252F%252Fhooks.example%252F",
        "fal_webhook=%20https://hooks.example/",
        "fal_webhook=javascript:1",
    ),
    # The parameter may be there once, in one spelling.
    "fal_webhook=https://hooks.example/&fal_webhook=https://hooks.example/",
    "fal_webhook=https://hooks.example/&fal_webhook=https://evil.example/",
    "fal_webhook=https://hooks.example/;fal_webhook=https://evil.example/",
    "a=b;fal_webhook=https://evil.example/",
    "a?fal_webhook=https://evil.example/",
    # Where a semicolon separates nothing, it is part of the value: of a user's name, a host or a path.
    "fal_webhook=https://hooks.example;@evil.example/",
    "fal_webhook=https%3A%2F%2Fhooks.example;.evil.example%2F",
    "a;fal_webhook=https://hooks.example/",
    # A query that is decoded before it is separated has one more parameter.
    "fal_webhook=https://hooks.example/%26fal_webhook=https://evil.example/",
    "fal_webhook=https://hooks.example/%2526fal_webhook=https://evil.example/",
    "prompt=x%26fal_webhook%3Dhttps://evil.example/",
    "prompt=x%2526fal_webhook%253Dhttps://evil.example/",
    "prompt=x%3Bfal_webhook%3Dhttps://evil.example/",
    *(
        f"{name}=https://hooks.example/"
        for name in (
            *(
                "fal%5Fwebhook",
                "fal%5fwebhook",
                "%66al_webhook",
                "fal%255Fwebhook",
                "+fal_webhook",
                "fal_webhook+",
                "fal_webhook%00",
            ),
            *(
                "%20fal_webhook",
                "FAL_WEBHOOK",
                "Fal_Webhook",
                "fal-webhook",
                "fal.webhook",
                "fal+webhook",
                "fal_webhook[]",
            ),
            *("fal_webhook%5B%5D", "fal_webhook[0]", "x%26fal_webhook", "fal_webhook%3D", "fal%C2%A0_webhook"),
        )
    ),
    "fal_webhook%3Dhttps://hooks.example/",
]


@pytest.mark.parametrize("query", WEBHOOKS_ALLOWED)
def test_webhook_allowed(query: str) -> None:
    """A webhook of an allowed origin passes, for every host and method."""
    access = rules(allowed_webhooks=HOOKS)
    for method, host in itertools.product(("GET", "POST"), (RUN, QUEUE, "https://new.fal.run")):
        assert refusal(access, method, f"{host}/x/y?{query}") is None
    assert (refusal(rules(allowed_webhooks=()), "POST", f"{QUEUE}/x/y?{query}") is None) is (
        "fal_webhook=" not in query
    )


@pytest.mark.parametrize("query", WEBHOOKS_REFUSED)
def test_webhook_refused(query: str) -> None:
    """A webhook of any other origin, or one that a server may read differently, passes only without the rule."""
    assert refusal(rules(allowed_webhooks=HOOKS), "POST", f"{QUEUE}/x/y?{query}") is WebhookNotAllowed
    assert refusal(rules(allowed_webhooks=()), "POST", f"{QUEUE}/x/y?{query}") is WebhookNotAllowed
    assert refusal(rules(allowed_hosts=("*.fal.run",)), "POST", f"{QUEUE}/x/y?{query}") is None


@pytest.mark.slow
@examples(2000)
@given(
    query=st.text("fal_webhookFAL%5f5F&;=+?/:.@-[]0 ".replace(" ", "") + "s", max_size=40).map(lambda text: "a&" + text)
)
def test_a_webhook_is_found_however_a_server_decodes(query: str) -> None:
    """Where nothing is allowed, no query passes in which urllib, splitting in either way, finds the parameter."""
    with_separators = [urllib.parse.parse_qsl(query, keep_blank_values=True, separator=separator) for separator in "&;"]
    names = {name.strip().lower() for pairs in with_separators for name, _ in pairs}
    if "fal_webhook" in names:
        assert refusal(rules(allowed_webhooks=()), "POST", f"{QUEUE}/x/y?{query}") is WebhookNotAllowed


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "*",
        "hooks.example",
        "http://hooks.example",
        "https://hooks.example/",
        "https://*.example.com",
        "https://a.example:443",
        "https://A.example",
        "null",
    ],
)
def test_bad_webhook_origin(origin: str) -> None:
    """An allowed origin must be exact, https, and spelled as it is compared."""
    with pytest.raises(ConfigError, match=r"\Aallowed_webhooks: "):
        access_rules(allowed_webhooks=(origin,))
