"""The operator's rules: the calls that they allow beside those that they refuse. No other spelling passes."""

import itertools
import string
import urllib.parse

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.access_rules import JOB, QUEUE, RUN, refusal, rules
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
from tornado_fal_proxy.rules.access import access_rules
from tornado_fal_proxy.rules.paths import canonical_segments
from tornado_fal_proxy.rules.policy import decide
from tornado_fal_proxy.rules.target import Target, parse_target

# Endpoints. Each method and URL of one list is allowed, and each of the other refused, by these patterns.

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
    # Other endpoints, and paths close to an allowed one.
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
    # Hosts that the rules do not list.
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
]
RESTRICTED = rules(allowed_endpoints=PATTERNS_SET, allow_cancel=True)


@pytest.mark.parametrize(("method", "url"), ALLOWED)
def test_allowed(method: str, url: str) -> None:
    """An allowed endpoint can be called, and so can its stream and its jobs in the queue."""
    assert refusal(RESTRICTED, method, url) is None


@pytest.mark.parametrize(("method", "url"), CLOSED)
def test_closed(method: str, url: str) -> None:
    """Nothing else can be called, in any spelling. The table has only URLs that the formula itself accepts."""
    parse_target(url)
    assert refusal(RESTRICTED, method, url) is EndpointNotAllowed


# Patterns that could take the queue's own words for an endpoint's, and whether they allow a call.
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
CANONICAL_CHARS = set(string.ascii_letters + string.digits + "-_./")


def examples(count: int) -> settings:
    return settings(max_examples=count, derandomize=True, database=None, deadline=None)


@st.composite
def odd_paths(draw: st.DrawFn) -> str:
    """Draw a path of known segments with up to two odd pieces anywhere in it."""
    path = "/" + "/".join(draw(st.lists(SEGMENTS, max_size=7)))
    for _ in range(draw(st.integers(0, 2))):
        position = draw(st.integers(0, len(path)))
        path = path[:position] + draw(ODD) + path[position:]
    return path


@pytest.mark.slow
@examples(3000)
@given(
    path=odd_paths(), method=st.sampled_from(["GET", "POST", "PUT"]), host=st.sampled_from(["fal.run", "queue.fal.run"])
)
@example(path="/fal-ai/flux/dev/..", method="POST", host="fal.run")
def test_no_other_spelling_passes(path: str, method: str, host: str) -> None:
    """Where ** allows every endpoint, a path that passes is canonical: no server decodes or resolves any of it."""
    access = rules(allowed_endpoints=("**",), allow_cancel=True)
    target = Target(host, path)
    try:
        access.check(method, target)
    except AccessRefused:
        return
    assert set(path) <= CANONICAL_CHARS
    segments = path.split("/")[1:]
    assert all(segment.strip(".") == segment != "" for segment in segments)
    assert urllib.parse.unquote(path) == path
    if "requests" in segments:
        del segments[segments.index("requests") + 1]  # the job's id, which may have upper case
    assert all(segment == segment.lower() for segment in segments)


IDS = st.lists(st.sampled_from(["a", "b", "c-1", "d.2"]), min_size=2, max_size=4).map("/".join)


@pytest.mark.slow
@examples(500)
@given(
    namespace=st.sampled_from(["", "workflows/", "comfy/"]),
    allowed=IDS,
    other=IDS,
    job=st.from_regex(r"[0-9a-f-]{1,36}", fullmatch=True),
)
def test_an_endpoint_and_its_own_queue(namespace: str, allowed: str, other: str, job: str) -> None:
    """An endpoint allowed by name can be run, streamed, submitted, and queried in its app's queue, and no other can."""
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
    """allowed_hosts narrows the wildcard. Without allowed_endpoints every path of an allowed host stays open."""
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
    """A host that is none of fal's is refused, because it could never be called."""
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
    ("POST", "https://rest.fal.ai/storage/upload/initiate?storage_type=gcs", True),
    ("POST", "https://rest.alpha.fal.ai/storage/upload/initiate?storage_type=gcs", False),
    ("POST", f"https://rest.fal.ai/storage/upload/initiate{V3}&x", False),
    ("POST", f"https://rest.fal.ai/storage/upload/../initiate{V3}", False),
    ("POST", f"https://rest.fal.ai/storage/upload/initiate/{V3}", False),
    ("POST", f"https://rest.fal.ai/storage/upload/complete-multipart{V3}", True),
    ("POST", f"https://rest.alpha.fal.ai/storage/upload/complete-multipart{V3}", True),
    ("GET", f"https://rest.fal.ai/storage/upload/complete-multipart{V3}", False),
    ("POST", "https://rest.fal.ai/storage/upload/complete-multipart", False),
    ("POST", f"https://rest.fal.ai/storage/auth/token{V3}", True),
    ("POST", f"https://rest.alpha.fal.ai/storage/auth/token{V3}", True),
    ("GET", f"https://rest.fal.ai/storage/auth/token{V3}", False),
    ("POST", "https://rest.fal.ai/storage/auth/token", False),
    ("POST", "https://rest.fal.ai/storage/auth/token?storage_type=gcs", False),
    ("POST", f"https://fal.ai/storage/upload/initiate{V3}", False),
    ("POST", f"https://fal.run/storage/upload/initiate{V3}", False),
]


@pytest.mark.parametrize(("method", "url", "opens"), STORAGE)
def test_uploads(method: str, url: str, opens: bool) -> None:
    """With restricted endpoints uploads are refused. allow_uploads allows those that fal's SDKs make, and no other."""
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
    """PUT passes to cancel a job, and for nothing else. Allow names it just there, and without allow_cancel never."""
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
    """A PUT with several targets is refused, as with every other method."""
    with pytest.raises(MethodNotAllowed):
        decide("PUT", [("x-fal-target-url", CANCEL)] * 2, max_body_bytes=1, access=rules(allow_cancel=True))


# All of them.


def test_the_order_of_the_refusals() -> None:
    """Refusals come in the order 405, 400, 412, 403 (host, webhook, endpoint), 415, 413."""
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


def test_a_refusal_names_the_rule_and_not_its_contents() -> None:
    """A refused client learns which option it was, and no pattern."""
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


def test_canonical_segments() -> None:
    """A canonical path is split into its segments, and any other path is not."""
    assert canonical_segments("/fal-ai/flux_1.1/Dev") == ["fal-ai", "flux_1.1", "Dev"]
    for path in ("", "/", "a", "//", "/a/", "/a//b", "/.", "/..", "/a/..b", "/a./b", "/a%20b", "/ä"):
        assert canonical_segments(path) is None
