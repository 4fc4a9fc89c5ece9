"""The operator's rules: what they let through beside what they refuse, and that no other spelling gets by."""

import itertools
import json
import string
import time
import urllib.parse
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tornado_fal_proxy.access import AccessRules, Pattern, access_rules, plain_segments
from tornado_fal_proxy.errors import (
    AccessRefused,
    ConfigError,
    EndpointNotAllowed,
    HostNotAllowed,
    MethodNotAllowed,
    ProxyError,
    TokenNotAllowed,
    UploadNotAllowed,
    WebhookNotAllowed,
)
from tornado_fal_proxy.policy import Target, decide, parse_target

RUN, QUEUE = "https://fal.run", "https://queue.fal.run"
JOB = "764cabcf-b745-4b3e-ae38-1200304cf45b"


def rules(**fields: Any) -> AccessRules:
    made = access_rules(**fields)
    assert made is not None
    return made


def refusal(access: AccessRules, method: str, url: str) -> type[ProxyError] | None:
    """What a call with that head is refused with."""
    headers = [("x-fal-target-url", url), ("content-type", "application/json")]
    try:
        decide(method, headers, max_body_bytes=100, access=access)
    except ProxyError as exc:
        return type(exc)
    return None


# Patterns. What each matches of ENDPOINTS is what picomatch 4 with {dot: true}, which fal's own proxy uses, matches.

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
    """* stays within a segment, ** goes over any number of them: the meaning that fal's own proxy gives them."""
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
    """It is named, with the reason, beside every other problem."""
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
    """One text alone would be a list of letters."""
    with pytest.raises(ConfigError, match=rf"\A{name}: must be a list"):
        access_rules(**{name: value})  # type: ignore[arg-type]


def test_an_empty_list() -> None:
    """Of webhooks it allows none. Of endpoints and hosts it is a mistake: to fal's own proxy it means all of them."""
    assert rules(allowed_webhooks=()).webhooks == ()
    for name in ("allowed_endpoints", "allowed_hosts"):
        with pytest.raises(ConfigError, match=rf"\A{name}: must be a list"):
            access_rules(**{name: ()})  # type: ignore[arg-type]


def test_without_rules_there_are_none() -> None:
    """So that the formula alone decides; what only bounds other rules is none by itself."""
    assert access_rules() is None
    assert access_rules(allow_uploads=True, max_token_expiration_s=1) is None


# Endpoints. Each URL with the method; all are allowed, or refused, by these patterns.

PATTERNS_SET = ("fal-ai/flux/dev", "fal-ai/fast-sdxl", "me/Mixed", "workflows/me/flow/**", "comfy/me/comfy-app")
ALLOWED = [
    *(("POST", f"{host}/{endpoint}") for host in (RUN, QUEUE) for endpoint in ("fal-ai/flux/dev", "fal-ai/fast-sdxl")),
    ("GET", f"{RUN}/fal-ai/flux/dev"),
    ("GET", f"{QUEUE}/fal-ai/flux/dev?prompt=../%2e%2e/;"),
    ("GET", f"{RUN}:443/fal-ai/flux/dev"),
    ("POST", f"{RUN}/fal-ai/flux/dev#fal-ai/flux/schnell"),
    ("POST", f"{RUN}/fal-ai/flux/dev/stream"),
    ("GET", f"{RUN}/fal-ai/flux/dev/stream"),
    ("POST", f"{RUN}/fal-ai/fast-sdxl/stream"),
    ("POST", f"{QUEUE}/fal-ai/flux/dev?fal_webhook=https%3A%2F%2Fanyone.example"),
    ("POST", f"{RUN}/me/Mixed"),
    ("GET", f"{QUEUE}/me/Mixed/requests/{JOB}"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/{JOB}/status?logs=0"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/{JOB}/status/stream?logs=1"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/{JOB}"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/019a_B"),
    ("PUT", f"{QUEUE}/fal-ai/flux/requests/{JOB}/cancel"),
    ("PUT", f"{QUEUE}/fal-ai/fast-sdxl/requests/{JOB}/cancel"),
    ("POST", f"{QUEUE}/workflows/me/flow"),
    ("POST", f"{QUEUE}/workflows/me/flow/v2/deep"),
    ("POST", f"{RUN}/workflows/me/flow/stream"),
    ("GET", f"{QUEUE}/workflows/me/flow/requests/{JOB}/status"),
    ("PUT", f"{QUEUE}/workflows/me/flow/requests/{JOB}/cancel"),
    ("GET", f"{QUEUE}/comfy/me/comfy-app/requests/{JOB}"),
]
CLOSED = [
    # Other endpoints, and what lies beside one.
    *((method, f"{host}/fal-ai/flux/schnell") for method in ("GET", "POST") for host in (RUN, QUEUE)),
    *(("POST", f"{RUN}/{path}") for path in ("", "fal-ai", "fal-ai/flux", "flux/dev", "dev", "fal-ai/flux/dev/x")),
    *(("POST", f"{RUN}/{path}") for path in ("x/fal-ai/flux/dev", "fal-ai/flux/devx", "me/mixed", "me/MIXED")),
    ("POST", f"{RUN}/fal-ai/flux/schnell/stream"),
    ("POST", f"{RUN}/fal-ai/flux/stream"),
    ("POST", f"{RUN}/fal-ai/flux/dev/stream/stream"),
    ("POST", f"{RUN}/fal-ai/stream"),
    ("POST", f"{RUN}/stream"),
    ("POST", f"{QUEUE}/fal-ai/flux/dev/stream"),
    ("POST", f"{RUN}/fal-ai/flux/dev/realtime"),
    ("POST", f"{RUN}/workflows/me"),
    ("POST", f"{RUN}/workflows/me/other"),
    ("POST", f"{RUN}/me/flow"),
    # The queue: other applications, other depths, other methods, more or less than a call.
    ("GET", f"{QUEUE}/fal-ai/other/requests/{JOB}"),
    ("GET", f"{QUEUE}/me/flow/requests/{JOB}"),
    ("GET", f"{QUEUE}/workflows/me/requests/{JOB}"),
    ("GET", f"{QUEUE}/workflows/me/other/requests/{JOB}"),
    ("GET", f"{QUEUE}/fal-ai/flux/dev/requests/{JOB}"),
    ("GET", f"{QUEUE}/workflows/me/flow/v2/requests/{JOB}"),
    ("GET", f"{RUN}/fal-ai/flux/requests/{JOB}"),
    ("POST", f"{QUEUE}/fal-ai/flux/requests/{JOB}"),
    ("POST", f"{QUEUE}/fal-ai/flux/requests/{JOB}/status"),
    ("POST", f"{QUEUE}/fal-ai/flux/requests/{JOB}/cancel"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/{JOB}/cancel"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/{JOB}/"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/{JOB}/logs"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/{JOB}/status/"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/{JOB}/status/stream/x"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/requests"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/{'a' * 65}"),
    *(
        ("GET", f"{QUEUE}/fal-ai/flux/requests/{odd}")
        for odd in ("a.b", "..", ".", "a%2Fb", "a;b", "a:b", "a,b", "a b"[:1] + "+b")
    ),
    # Spellings of what is allowed, and ways out of it.
    *(
        ("POST", f"{RUN}/{path}")
        for path in (
            *("fal-ai/flux/dev/", "/fal-ai/flux/dev", "fal-ai//flux/dev", "fal-ai/flux/./dev", "./fal-ai/flux/dev"),
            *("fal-ai/flux/dev/..", "fal-ai/flux/dev/../schnell", "fal-ai/flux/dev/%2e%2e/schnell", "fal-ai/flux/.dev"),
            *("fal-ai/flux/dev%2F..%2Fschnell", "fal-ai/flux%2Fdev", "fal-ai/flux/d%65v", "fal-ai/flux/dev%00", "%"),
            *("fal-ai/flux/dev;x", "fal-ai/flux;/dev", "fal-ai/flux/dev,", "fal-ai/flux/dev@1", "fal-ai/flux/dev:1"),
            *("FAL-AI/flux/dev", "fal-ai/flux/DEV", "fal-ai/Flux/dev", "fal-ai/flux/dev/STREAM", "fal-ai/flux/dev."),
            *("fal-ai/flux/dev~", "fal-ai/flux/dev'", "fal-ai/flux/dev+", "fal-ai/flux/dev*", "**", "fal-ai/flux/*"),
            *("https://fal.run/fal-ai/flux/dev", "fal-ai/flux/dev%3Fx", "fal-ai/flux/dev&x", "fal-ai/flux/dev=x"),
        )
    ),
    ("GET", f"{QUEUE}/fal-ai/flux/dev/../requests/{JOB}"),
    ("GET", f"{QUEUE}/fal-ai/flux/Requests/{JOB}"),
    # Hosts whose meaning is not known here.
    *(
        ("POST", f"https://{host}/fal-ai/flux/dev")
        for host in ("fal.ai", "api.fal.ai", "rest.fal.ai", "ws.fal.run", "a.queue.fal.run", "gateway.fal.run")
    ),
    ("POST", "https://110602490-lora.fal.run/"),
    ("POST", f"{RUN}/110602490-lora"),
    # fal's other services.
    ("GET", "https://rest.fal.ai/tokens/"),
    ("POST", "https://rest.fal.ai/tokens"),
    ("POST", "https://rest.fal.ai/tokens/?x"),
    ("POST", "https://rest.fal.ai/tokens/?"),
    ("POST", "https://rest.fal.ai//tokens/"),
    ("POST", "https://rest.fal.ai/tokens/x"),
    ("POST", "https://rest.fal.ai/Tokens/"),
    ("POST", "https://api.fal.ai/tokens/"),
    ("POST", "https://rest.beta.fal.ai/tokens/"),
    ("GET", "https://rest.fal.ai/billing/user_details"),
    ("GET", "https://api.fal.ai/v1/models/usage"),
    ("GET", "https://v3.fal.ai/files/x.png"),
    ("GET", "https://rest.fal.ai/storage/upload/complete-multipart?storage_type=fal-cdn-v3"),
]
RESTRICTED = rules(allowed_endpoints=PATTERNS_SET, allow_cancel=True)


@pytest.mark.parametrize(("method", "url"), ALLOWED)
def test_allowed(method: str, url: str) -> None:
    """An endpoint, its stream, and its jobs in the queue."""
    assert refusal(RESTRICTED, method, url) is None


@pytest.mark.parametrize(("method", "url"), CLOSED)
def test_closed(method: str, url: str) -> None:
    """And nothing else, in any spelling. (What the formula itself refuses is not in this table.)"""
    parse_target(url)
    assert refusal(RESTRICTED, method, url) is EndpointNotAllowed


# Patterns that end where the queue's words begin, and what each opens of the two.
COLLISIONS = [
    ("fal-ai/**", "POST", f"{QUEUE}/fal-ai/requests/requests/{JOB}", False),
    ("fal-ai/**", "POST", f"{QUEUE}/fal-ai/requests", False),
    ("fal-ai/**", "POST", f"{QUEUE}/fal-ai/flux/requests/{JOB}/cancel", False),
    ("fal-ai/**", "GET", f"{QUEUE}/fal-ai/flux/requests/{JOB}/cancel", False),
    ("fal-ai/**", "GET", f"{QUEUE}/fal-ai/a/b/requests/{JOB}", False),
    ("fal-ai/**", "POST", f"{RUN}/fal-ai/a/requests", False),
    ("fal-ai/**", "GET", f"{QUEUE}/fal-ai/flux/requests/{JOB}", True),
    ("**", "GET", f"{QUEUE}/workflows/requests/{JOB}", False),
    ("**", "GET", f"{QUEUE}/workflows/requests/x/requests/{JOB}", False),
    ("**", "GET", f"{QUEUE}/workflows/a/requests/requests/{JOB}", False),
    ("**", "GET", f"{QUEUE}/workflows/a/b/requests/{JOB}", True),
    ("**/dev", "GET", f"{QUEUE}/fal-ai/flux/requests/{JOB}", True),
    ("*/flux/dev", "GET", f"{QUEUE}/fal-ai/flux/requests/{JOB}", True),
    ("*/flux/dev", "GET", f"{QUEUE}/fal-ai/fluxx/requests/{JOB}", False),
    ("fal-ai/flux", "POST", f"{RUN}/fal-ai/flux/stream", True),
    ("fal-ai/flux/stream", "POST", f"{RUN}/fal-ai/flux/stream", True),
    ("fal-ai/flux/stream", "POST", f"{RUN}/fal-ai/flux", False),
    ("fal-ai/stream", "POST", f"{RUN}/fal-ai/stream", True),
    ("fal-ai/flux/**", "POST", f"{QUEUE}/fal-ai/flux/dev/stream", True),
    ("fal-ai/flux/**", "POST", f"{RUN}/fal-ai/flux", True),
    ("fal-ai/flux/**", "POST", f"{RUN}/fal-ai/fluxx", False),
    ("**", "POST", f"{RUN}/workflows/me", False),
    ("**", "POST", f"{RUN}/one", False),
    ("**", "POST", f"{RUN}/fal-ai/Flux", False),
    ("**/Flux", "POST", f"{RUN}/fal-ai/Flux", True),
    ("fal-ai/*", "GET", f"{QUEUE}/fal-ai/Flux/requests/{JOB}", False),
    ("**", "POST", f"{RUN}/" + "/".join("a" * 16), True),
    ("**", "POST", f"{RUN}/" + "/".join("a" * 17), False),
    ("**", "POST", f"{RUN}/a/" + "a" * 509, True),
    ("**", "POST", f"{RUN}/a/" + "a" * 510, False),
]


@pytest.mark.parametrize(("pattern", "method", "url", "allowed"), COLLISIONS)
def test_collisions(pattern: str, method: str, url: str, allowed: bool) -> None:
    """The word requests is the queue's wherever it stands, and no pattern makes an endpoint of it."""
    access = rules(allowed_endpoints=(pattern,))
    assert refusal(access, method, url) is (None if allowed else EndpointNotAllowed)


SEGMENTS = st.sampled_from(
    ["fal-ai", "flux", "dev", "schnell", "me", "workflows", "comfy", "requests", "status", "stream", "cancel", JOB]
)
ODD = st.sampled_from([*"%;.~@:!$&'()*+,=|^`\"<>[]{}A", "..", "%2e", "%2F", "%2f", "//", "/./", "/../", "%00", "/"])
PLAIN_CHARS = set(string.ascii_letters + string.digits + "-_./")


def examples(count: int) -> settings:
    return settings(max_examples=count, derandomize=True, database=None, deadline=None)


@st.composite
def odd_paths(draw: st.DrawFn) -> str:
    """A path of known segments with up to two odd pieces anywhere in it."""
    path = "/" + "/".join(draw(st.lists(SEGMENTS, max_size=7)))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(path)))
        path = path[:place] + draw(ODD) + path[place:]
    return path


@examples(3000)
@given(
    path=odd_paths(), method=st.sampled_from(["GET", "POST", "PUT"]), host=st.sampled_from(["fal.run", "queue.fal.run"])
)
@example(path="/fal-ai/flux/dev/..", method="POST", host="fal.run")
def test_no_other_spelling_passes(path: str, method: str, host: str) -> None:
    """Where ** allows every endpoint, what passes is in the plain grammar: no server decodes or resolves any of it."""
    access = rules(allowed_endpoints=("**",), allow_cancel=True)
    target = Target(host, path)
    try:
        access.check(method, target)
    except AccessRefused:
        return
    assert set(path) <= PLAIN_CHARS
    segments = path.split("/")[1:]
    assert all(segment.strip(".") == segment != "" for segment in segments)
    assert urllib.parse.unquote(path) == path
    if "requests" in segments:
        del segments[segments.index("requests") + 1]  # the job's id, which may have upper case
    assert all(segment == segment.lower() for segment in segments)


IDS = st.lists(st.sampled_from(["a", "b", "c-1", "d.2"]), min_size=2, max_size=4).map("/".join)


@examples(500)
@given(
    namespace=st.sampled_from(["", "workflows/", "comfy/"]),
    allowed=IDS,
    other=IDS,
    job=st.from_regex(r"[0-9a-f-]{1,36}", fullmatch=True),
)
def test_an_endpoint_and_its_own_queue(namespace: str, allowed: str, other: str, job: str) -> None:
    """What is allowed by name can be run, streamed, submitted, and asked for in its application's queue; no other."""
    access = rules(allowed_endpoints=(namespace + allowed,), allow_cancel=True)

    def passing(endpoint: str) -> list[bool]:
        app = namespace + "/".join(endpoint.split("/")[:2])
        calls = [("POST", f"{RUN}/{namespace}{endpoint}"), ("POST", f"{QUEUE}/{namespace}{endpoint}")]
        calls += [("GET", f"{QUEUE}/{app}/requests/{job}{tail}") for tail in ("", "/status", "/status/stream")]
        calls += [("PUT", f"{QUEUE}/{app}/requests/{job}/cancel"), ("POST", f"{RUN}/{namespace}{endpoint}/stream")]
        return [refusal(access, method, url) is None for method, url in calls]

    assert passing(allowed) == [True] * 7
    same_app = allowed.split("/")[:2] == other.split("/")[:2]
    assert passing(other) == [other == allowed] * 2 + [same_app] * 4 + [other == allowed]


# Hosts.

HOSTS: list[tuple[tuple[str, ...], str, bool]] = [
    (("fal.run",), "fal.run", True),
    (("fal.run",), "queue.fal.run", False),
    (("fal.run", "queue.fal.run"), "queue.fal.run", True),
    (("*.fal.run",), "queue.fal.run", True),
    (("*.fal.run",), "a.b.fal.run", True),
    (("*.fal.run",), "fal.run", False),
    (("*.fal.run",), "rest.fal.ai", False),
    (("*.queue.fal.run",), "queue.fal.run", False),
    (("*.e.fal.run",), "queue.fal.run", False),
    (("rest.fal.ai",), "rest.alpha.fal.ai", False),
]


@pytest.mark.parametrize(("allowed", "host", "passes"), HOSTS)
def test_hosts(allowed: tuple[str, ...], host: str, passes: bool) -> None:
    """Narrow the wildcard; without allowed_endpoints every path of such a host stays open."""
    access = rules(allowed_hosts=allowed)
    assert refusal(access, "GET", f"https://{host}/a/../b%2f") is (None if passes else HostNotAllowed)


@pytest.mark.parametrize(
    "host",
    *[
        [
            "",
            "fal.com",
            "evil.com",
            "*",
            "*.ai",
            "*fal.run",
            "queue.*.fal.run",
            "Fal.run",
            "fal.run:443",
            "https://fal.run",
        ]
    ],
)
def test_bad_host(host: str) -> None:
    """A host that is none of fal's could never be called."""
    with pytest.raises(ConfigError, match=r"allowed_hosts: .*must be a host of fal's"):
        access_rules(allowed_hosts=(host,))


# Uploads.

V3 = "?storage_type=fal-cdn-v3"
STORAGE = [
    ("POST", f"https://rest.fal.ai/storage/upload/initiate{V3}", True),
    ("POST", f"https://rest.fal.ai/storage/upload/initiate-multipart{V3}", True),
    ("POST", "https://rest.alpha.fal.ai/storage/upload/initiate", True),
    ("POST", f"https://rest.alpha.fal.ai/storage/upload/initiate{V3}", True),
    ("GET", f"https://rest.fal.ai/storage/upload/initiate{V3}", False),
    ("POST", "https://rest.fal.ai/storage/upload/initiate", False),
    ("POST", "https://rest.fal.ai/storage/upload/initiate?storage_type=gcs", False),
    ("POST", f"https://rest.fal.ai/storage/upload/initiate{V3}&x", False),
    ("POST", f"https://rest.fal.ai/storage/upload/../initiate{V3}", False),
    ("POST", f"https://rest.fal.ai/storage/upload/initiate/{V3}", False),
    ("POST", f"https://rest.fal.ai/storage/upload/complete-multipart{V3}", False),
    ("POST", f"https://fal.ai/storage/upload/initiate{V3}", False),
    ("POST", f"https://fal.run/storage/upload/initiate{V3}", False),
]


@pytest.mark.parametrize(("method", "url", "opens"), STORAGE)
def test_uploads(method: str, url: str, opens: bool) -> None:
    """Closed with endpoints restricted; allow_uploads opens the calls that fal's clients make, and no other."""
    closed = refusal(rules(allowed_endpoints=("fal-ai/flux",)), method, url)
    assert closed in (UploadNotAllowed, EndpointNotAllowed)
    opened = refusal(rules(allowed_endpoints=("fal-ai/flux",), allow_uploads=True), method, url)
    assert (opened is None) is opens
    if opens:
        assert closed is UploadNotAllowed


# Cancel.

CANCEL = f"{QUEUE}/fal-ai/flux/requests/{JOB}/cancel"
PUTS = [
    (CANCEL, True),
    (f"{QUEUE}/workflows/a/b/requests/1/cancel", True),
    (f"{QUEUE}/comfy/a/b/requests/1/cancel", True),
    (f"{CANCEL}/", False),
    (f"{CANCEL}?x=1", False),
    (f"{CANCEL}?", False),
    (CANCEL.removesuffix("/cancel"), False),
    (CANCEL.replace("/cancel", "/Cancel"), False),
    (CANCEL.replace("/cancel", "/%63ancel"), False),
    (CANCEL.replace("/requests", "/../requests"), False),
    (CANCEL.replace("queue.", ""), False),
    (CANCEL.replace("queue.fal.run", "queue.fal.ai"), False),
    (CANCEL.replace("/flux", ""), False),
    (CANCEL.replace("/flux", "/flux/dev"), False),
    (f"{QUEUE}/fal-ai/flux/dev", False),
    ("https://rest.fal.ai/tokens/", False),
    ("http://queue.fal.run/", False),
    ("", False),
]


@pytest.mark.parametrize(("url", "passes"), PUTS)
def test_put(url: str, passes: bool) -> None:
    """Passes for a job's cancel and nothing else; Allow names it just there, and without allow_cancel never."""
    assert refusal(rules(allow_cancel=True), "PUT", url) is (None if passes else MethodNotAllowed)
    for method, access in itertools.product(
        ("PUT", "DELETE"), (None, rules(allowed_hosts=("*.fal.run",)), rules(allow_cancel=True))
    ):
        if method == "PUT" and passes and access is not None and access.cancel:
            continue
        with pytest.raises(MethodNotAllowed) as caught:
            decide(method, [("x-fal-target-url", url)], max_body_bytes=1, access=access)
        put = passes and access is not None and access.cancel
        assert dict(caught.value.headers) == {"Allow": "GET, POST, PUT" if put else "GET, POST"}


def test_several_targets_are_no_cancel() -> None:
    """As for every other method, one URL decides."""
    with pytest.raises(MethodNotAllowed):
        decide("PUT", [("x-fal-target-url", CANCEL)] * 2, max_body_bytes=1, access=rules(allow_cancel=True))


# Webhooks.

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
    # Once, and spelled like this.
    "fal_webhook=https://hooks.example/&fal_webhook=https://hooks.example/",
    "fal_webhook=https://hooks.example/&fal_webhook=https://evil.example/",
    "fal_webhook=https://hooks.example/;fal_webhook=https://evil.example/",
    "a=b;fal_webhook=https://evil.example/",
    "a?fal_webhook=https://evil.example/",
    # Where a semicolon separates nothing, it is part of the value: of a user's name, a host or a path.
    "fal_webhook=https://hooks.example;@evil.example/",
    "fal_webhook=https%3A%2F%2Fhooks.example;.evil.example%2F",
    "a;fal_webhook=https://hooks.example/",
    # What is decoded before it is separated has one more parameter.
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
    """Of one of the origins, for every host and method."""
    access = rules(allowed_webhooks=HOOKS)
    for method, host in itertools.product(("GET", "POST"), (RUN, QUEUE, "https://rest.fal.ai")):
        assert refusal(access, method, f"{host}/x/y?{query}") is None
    assert (refusal(rules(allowed_webhooks=()), "POST", f"{QUEUE}/x/y?{query}") is None) is (
        "fal_webhook=" not in query
    )


@pytest.mark.parametrize("query", WEBHOOKS_REFUSED)
def test_webhook_refused(query: str) -> None:
    """Of any other, or where a server might read it in another way; without the rule it passes."""
    assert refusal(rules(allowed_webhooks=HOOKS), "POST", f"{QUEUE}/x/y?{query}") is WebhookNotAllowed
    assert refusal(rules(allowed_webhooks=()), "POST", f"{QUEUE}/x/y?{query}") is WebhookNotAllowed
    assert refusal(rules(allowed_hosts=("*.fal.run",)), "POST", f"{QUEUE}/x/y?{query}") is None


@examples(2000)
@given(
    query=st.text("fal_webhookFAL%5f5F&;=+?/:.@-[]0 ".replace(" ", "") + "s", max_size=40).map(lambda text: "a&" + text)
)
def test_what_a_server_decodes_to_it_is_seen(query: str) -> None:
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
    """Exact, https, and spelled as it is compared."""
    with pytest.raises(ConfigError, match=r"\Aallowed_webhooks: "):
        access_rules(allowed_webhooks=(origin,))


# Tokens.

TOKEN_URLS = ("https://rest.fal.ai/tokens/", "https://rest.alpha.fal.ai/tokens/")
TOKEN_PATTERNS = (
    "fal-ai/whole/**",
    "fal-ai/app",
    "fal-ai/flux/dev",
    "*/any-owner",
    "workflows/me/flow/**",
    "fal-ai/Mixed",
)
TOKENS_GIVEN = [
    b'{"allowed_apps":["whole"],"token_expiration":120}',
    b' { "token_expiration" : 300 , "allowed_apps" : [ "app" , "any-owner" , "flow" ] } \r\n',
    b'{"allowed_apps":["Mixed"],"token_expiration":1}',
]
TOKENS_REFUSED = [
    # Apps that are not allowed as such: of fal-ai/flux only a part is.
    *(
        json.dumps({"allowed_apps": apps, "token_expiration": 120}).encode()
        for apps in (
            *(
                ["flux"],
                ["other"],
                ["whole", "other"],
                ["fal-ai"],
                ["me"],
                ["dev"],
                ["mixed"],
                ["workflows"],
                ["WHOLE"],
            ),
            *(
                [],
                [""],
                ["*"],
                ["**"],
                ["fal-ai/whole"],
                ["whole/**"],
                [" whole"],
                ["whole\n"],
                ["whole\0"],
                [None],
                [1],
            ),
            *([["whole"]], "whole", {"whole": 1}, None, True, ["wh\u00f6le"], ["w\u212ahole"]),
        )
    ),
    # Its life.
    *(
        b'{"allowed_apps":["whole"],"token_expiration":%s}' % text
        for text in (
            *(
                b"301",
                b"0",
                b"-1",
                b"120.0",
                b"1e2",
                b"1E400",
                b"NaN",
                b"Infinity",
                b"-Infinity",
                b"true",
                b"null",
                b'"120"',
            ),
            *(b"9" * 30, b"9" * 3900, b"0120", b"+120", b"0x78", b"[120]", b"-0", b""),
        )
    ),
    # What two parsers could read differently, or what is no such request.
    b'{"allowed_apps":["whole"],"token_expiration":120,"token_expiration":9999}',
    b'{"allowed_apps":["other"],"allowed_apps":["whole"],"token_expiration":120}',
    b'{"allowed_apps":["whole"],"\\u0061llowed_apps":["other"],"token_expiration":120}',
    b'{"allowed_apps":["wh\\u006fle"],"token_expiration":120}',
    b'{"allowed_apps":["\\ud800"],"token_expiration":120}',
    b'{"allowed_apps":["whole"],"token_expiration":120,"x":1}',
    b'{"allowed_apps":["whole"],"token_expiration":120,"Allowed_Apps":["other"]}',
    b'{"allowed_apps":["whole"],"token_expiration":120,}',
    b'{"allowed_apps":["whole",],"token_expiration":120}',
    b'{"allowed_apps":["whole"],"token_expiration":120}{}',
    b'{"allowed_apps":["whole"],"token_expiration":120}\0',
    b'{"allowed_apps":["whole"]/**/,"token_expiration":120}',
    b'\xef\xbb\xbf{"allowed_apps":["whole"],"token_expiration":120}',
    b'{"allowed_apps":["whole\xff"],"token_expiration":120}',
    b'{"allowed_apps":["wh\xc3\xb6le"],"token_expiration":120}',
    '{"allowed_apps":["whole"],"token_expiration":120}'.encode("utf-16"),
    b"{'allowed_apps':['whole'],'token_expiration':120}",
    b'{"allowed_apps":["whole"]}',
    b'{"token_expiration":120}',
    b'[{"allowed_apps":["whole"],"token_expiration":120}]',
    b"{}",
    b"null",
    b"1",
    b'"x"',
    b"",
    b"[" * 4000,
    b'{"a":' * 800,
    b'{"allowed_apps":["whole"],"token_expiration":120}' + b" " * 4096,
]


def token_rules(**more: Any) -> AccessRules:
    return rules(allowed_endpoints=TOKEN_PATTERNS, **more)


@pytest.mark.parametrize("url", TOKEN_URLS)
def test_a_token_is_judged_by_its_body(url: str) -> None:
    """The head passes; where endpoints are restricted the body must be seen, and else it need not be."""
    access = token_rules()
    assert refusal(access, "POST", url) is None
    assert access.judges_body(parse_target(url))
    assert not access.judges_body(parse_target(f"{RUN}/fal-ai/app"))
    assert not rules(allowed_hosts=("rest.fal.ai",)).judges_body(parse_target(url))


@pytest.mark.parametrize("body", TOKENS_GIVEN)
def test_token_given(body: bytes) -> None:
    """For applications that are allowed as a whole, within their time."""
    token_rules().check_body(body)


@pytest.mark.parametrize("body", TOKENS_REFUSED)
def test_token_refused(body: bytes) -> None:
    """For all else, and the refusal shows nothing of the body."""
    with pytest.raises(TokenNotAllowed) as caught:
        token_rules().check_body(body)
    assert caught.value.status == 403
    for word in ("whole", "other", "fal-ai"):
        assert word not in f"{caught.value.message} {caught.value.detail}"


def test_the_life_of_a_token_can_be_set() -> None:
    """max_token_expiration_s, 300 by default, is the longest."""
    for longest in (1, 60, 86_400):
        access = token_rules(max_token_expiration_s=longest)
        access.check_body(b'{"allowed_apps":["app"],"token_expiration":%d}' % longest)
        with pytest.raises(TokenNotAllowed):
            access.check_body(b'{"allowed_apps":["app"],"token_expiration":%d}' % (longest + 1))


# Which aliases a pattern gives tokens for.
ALIASES: list[tuple[str, list[str]]] = [
    ("fal-ai/flux", ["flux"]),
    ("fal-ai/flux/**", ["flux"]),
    ("fal-ai/flux/*", []),
    ("fal-ai/flux/dev", []),
    ("fal-ai/f*", ["flux", "flow"]),
    ("fal-ai/**", ["flux", "flow", "me"]),
    ("**", ["flux", "flow", "me"]),
    ("workflows/me/flow", ["flow"]),
    ("workflows/me/**", ["flux", "flow", "me"]),
    ("workflows/me/flow/x", []),
    ("comfy/**", ["flux", "flow", "me"]),
]


@pytest.mark.parametrize(("pattern", "aliases"), ALIASES)
def test_aliases(pattern: str, aliases: list[str]) -> None:
    """A token opens a whole application, so a pattern for some endpoint below it gives none."""
    access = rules(allowed_endpoints=(pattern,))
    assert [alias for alias in ("flux", "flow", "me") if access._allows_whole(alias)] == aliases


# All of them.


def test_the_order_of_the_refusals() -> None:
    """405, 400, 412, then 403 (host, webhook, endpoint), then 415 and 413."""
    access = rules(allowed_endpoints=("a/b",), allowed_hosts=("fal.run",), allowed_webhooks=())
    body = [("content-type", "text/plain"), ("content-length", "1000")]
    steps: list[tuple[str, str | None, list[tuple[str, str]], int]] = [
        ("PUT", None, body, 405),
        ("POST", None, body, 400),
        ("POST", "http://fal.run/x?fal_webhook", body, 412),
        ("POST", f"{QUEUE}/x?fal_webhook", body, 403),
        ("POST", f"{RUN}/x?fal_webhook", body, 403),
        ("POST", f"{RUN}/x", body, 403),
        ("POST", f"{RUN}/a/b", body, 415),
        ("POST", f"{RUN}/a/b", [("content-type", "application/json"), ("content-length", "1000")], 413),
    ]
    kinds = []
    for method, url, headers, status in steps:
        with pytest.raises(ProxyError) as caught:
            decide(method, [*headers, *([("x-fal-target-url", url)] if url else [])], max_body_bytes=10, access=access)
        assert caught.value.status == status
        kinds.append(type(caught.value))
    assert kinds[3:6] == [HostNotAllowed, WebhookNotAllowed, EndpointNotAllowed]


def test_a_refusal_names_the_rule_and_not_what_it_says() -> None:
    """Whoever is refused learns which option it was, and no pattern."""
    named = {
        HostNotAllowed: "allowed_hosts",
        WebhookNotAllowed: "allowed_webhooks",
        EndpointNotAllowed: "allowed_endpoints",
        UploadNotAllowed: "allow_uploads",
        TokenNotAllowed: "max_token_expiration_s",
    }
    for kind, name in named.items():
        assert kind().status == 403
        assert name in kind().message


HARD = [
    ("**/a/**/a/**/a/**/b", "/" + "/".join("a" * 16)),
    ("x/" + "*a" * 100 + "b", "/x/" + "a" * 500),
    ("x/*" + "a*" * 100 + "b", "/x/" + "a" * 500),
    ("**", "/a" * 30_000),
    ("**", "/" + "a." * 30_000),
]


@pytest.mark.parametrize(("pattern", "path"), HARD)
def test_no_path_takes_long(pattern: str, path: str) -> None:
    """Matching takes time in proportion to a bounded length."""
    access = rules(allowed_endpoints=(pattern,))
    began = time.perf_counter()
    with pytest.raises(EndpointNotAllowed):
        access.check("GET", Target("fal.run", path))
    assert time.perf_counter() - began < 0.05


def test_no_query_takes_long() -> None:
    """Nor does looking for webhooks in one of the largest that a head can have."""
    access = rules(allowed_webhooks=HOOKS)
    began = time.perf_counter()
    for query in (
        "%25" * 20_000,
        "&" * 60_000,
        "%2525" * 12_000 + "=x",
        "fal_webhook=https://hooks.example/" + "%41" * 20_000,
    ):
        access.check("GET", Target("fal.run", "/x", query))
    assert time.perf_counter() - began < 0.5


def test_plain_segments() -> None:
    """What is plain comes apart, and the rest not at all."""
    assert plain_segments("/fal-ai/flux_1.1/Dev") == ["fal-ai", "flux_1.1", "Dev"]
    for path in ("", "/", "a", "//", "/a/", "/a//b", "/.", "/..", "/a/..b", "/a./b", "/a%20b", "/ä"):
        assert plain_segments(path) is None
