"""The patterns of allowed_endpoints: what each matches, which are refused, and which aliases they stand for."""

import pytest

from tests.support.access_rules import rules
from tornado_fal_proxy.errors import (
    ConfigError,
)
from tornado_fal_proxy.rules.access import access_rules
from tornado_fal_proxy.rules.patterns import Pattern

# Patterns, each with the ENDPOINTS that it matches, as picomatch 4 with {dot: true} does, which fal's own proxy uses.

ENDPOINTS = [
    *("fal-ai/flux", "fal-ai/flux/dev", "fal-ai/flux/dev/x", "fal-ai/fluxx", "fal-ai/fluxx/dev", "fal-ai/fast-sdxl"),
    *("me/flux-dev", "a/b", "fal-ai/dev", "fal-ai/a/b/dev", "ab/c/d"),
]
PATTERNS: dict[str, list[str]] = {
    "fal-ai/flux/**": ["fal-ai/flux", "fal-ai/flux/dev", "fal-ai/flux/dev/x"],
    "fal-ai/fast-sdxl": ["fal-ai/fast-sdxl"],
    "*/flux-dev": ["me/flux-dev"],
    "fal-ai/**": [endpoint for endpoint in ENDPOINTS if endpoint.startswith("fal-ai/")],
    "**": ENDPOINTS,
    "**/*": ENDPOINTS,
    "*/**": ENDPOINTS,
    "fal-ai/flux*": ["fal-ai/flux", "fal-ai/fluxx"],
    "fal-ai/flux**": ["fal-ai/flux", "fal-ai/fluxx"],
    "fal-ai/*/dev": ["fal-ai/flux/dev", "fal-ai/fluxx/dev"],
    "**/dev": ["fal-ai/flux/dev", "fal-ai/fluxx/dev", "fal-ai/dev", "fal-ai/a/b/dev"],
    "fal-ai/**/dev": ["fal-ai/flux/dev", "fal-ai/fluxx/dev", "fal-ai/dev", "fal-ai/a/b/dev"],
    "*/*": ["fal-ai/flux", "fal-ai/fluxx", "fal-ai/fast-sdxl", "me/flux-dev", "a/b", "fal-ai/dev"],
    "*a*/b": ["a/b"],
    "*a*/f*s*x*": ["fal-ai/fast-sdxl"],
    "fal-ai/a/**/**/dev": ["fal-ai/a/b/dev"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(pattern: str) -> None:
    """* stays within a segment, and ** takes any number of segments, as in fal's own proxy."""
    parsed = Pattern.parse(pattern)
    assert [endpoint for endpoint in ENDPOINTS if parsed.matches(endpoint.split("/"))] == PATTERNS[pattern]


# Patterns that could not mean what they seem to, with a part of the problem.
BAD_PATTERNS = {
    "": "may have",
    " ": "may have",
    "fal-ai/flux dev": "may have",
    "fal-ai/{a,b}": "may have",
    "fal-ai/[ab]": "may have",
    "fal-ai/flu?": "may have",
    "!fal-ai/flux": "may have",
    "fal-ai/%66lux": "may have",
    "https://fal.run/fal-ai/flux": "may have",
    "fal-ai/flüx": "may have",
    "fal-ai/flux\n": "may have",
    "/fal-ai/flux": "segment",
    "fal-ai/flux/": "segment",
    "fal-ai//flux": "segment",
    "fal-ai/../x": "segment",
    "fal-ai/.": "segment",
    "fal-ai/.hidden": "segment",
    "fal-ai/***": "segment",
    "fal-ai/flux/requests/**": "requests",
    "fal-ai": "too few",
    "*": "too few",
    "workflows/me": "too few",
    "comfy/*": "too few",
}


@pytest.mark.parametrize("pattern", BAD_PATTERNS)
def test_bad_pattern(pattern: str) -> None:
    """A bad pattern is named with the reason, beside every other problem."""
    with pytest.raises(ConfigError) as caught:
        access_rules(allowed_endpoints=("fal-ai/ok", pattern, "("), allowed_hosts=("evil.com",))
    named, paren, host = caught.value.problems
    assert named.startswith(f"allowed_endpoints: {pattern!r} ")
    assert BAD_PATTERNS[pattern] in named
    assert paren.startswith("allowed_endpoints: '('")
    assert host.startswith("allowed_hosts: 'evil.com'")


LISTS = ("allowed_endpoints", "allowed_hosts", "allowed_webhooks")


@pytest.mark.parametrize("value", ["fal-ai/flux", b"x", 1, ["fal-ai/flux"], (1,), (None,), True])
@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_a_tuple_of_texts(name: str, value: object) -> None:
    """A list must be a tuple of texts, because one text alone would be a list of letters."""
    with pytest.raises(ConfigError, match=rf"\A{name}: must be a list"):
        access_rules(**{name: value})  # type: ignore[arg-type]


def test_an_empty_list() -> None:
    """An empty list of webhooks allows none. One of endpoints or hosts is refused: to fal's own proxy it means all."""
    assert rules(allowed_webhooks=()).webhooks == ()
    for name in ("allowed_endpoints", "allowed_hosts"):
        with pytest.raises(ConfigError, match=rf"\A{name}: must be a list"):
            access_rules(**{name: ()})  # type: ignore[arg-type]


def test_without_rules_there_are_none() -> None:
    """Without rules the formula alone decides. An option that only limits other rules is no rule by itself."""
    assert access_rules() is None
    assert access_rules(allow_uploads=True, max_token_expiration_s=1) is None


# Which aliases a pattern gives tokens for.
ALIASES: list[tuple[str, list[str]]] = [
    ("fal-ai/flux", ["flux"]),
    ("fal-ai/flux/**", ["flux"]),
    ("fal-ai/flux/*", []),
    ("fal-ai/flux/dev", []),
    ("fal-ai/flux/**/**", ["flux"]),
    ("*/flux", ["flux"]),
    ("f*i/flux/**", ["flux"]),
    ("workflows/me/flow", ["flow"]),
    ("workflows/*/flow/**", ["flow"]),
    ("comfy/flux/me", ["me"]),
    ("workflows/me/flow/x", []),
    ("fal-ai/flux/**/dev", []),
    # A wildcard names no app, and a token opens that of every owner.
    ("fal-ai/*", []),
    ("fal-ai/f*", []),
    ("fal-ai/flux*", []),
    ("fal-ai/*flux/**", []),
    ("fal-ai/**", []),
    ("*/*", []),
    ("*/**", []),
    ("**", []),
    ("**/flux", []),
    ("**/flux/**", []),
    ("fal-ai/**/flux", []),
    ("workflows/me/**", []),
    ("workflows/me/*", []),
    ("workflows/**/flow", []),
    ("comfy/**", []),
    # Nor does a part of an app's path that could be an app in a namespace.
    ("*/me/flow", []),
    ("work*/me/flow", []),
]


@pytest.mark.parametrize(("pattern", "aliases"), ALIASES)
def test_aliases(pattern: str, aliases: list[str]) -> None:
    """A token opens a whole app of any owner, so only a pattern that spells the app's name and ends there gives one."""
    access = rules(allowed_endpoints=(pattern,))
    assert [alias for alias in ("flux", "flow", "me") if access._allows_whole(alias)] == aliases
