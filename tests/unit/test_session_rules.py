"""The operator's rules for realtime video: signals to wma.fal.run, allowed beside refused."""

import json

import pytest

from tests.support.access_rules import RUN, refusal, rules
from tornado_fal_proxy.errors import EndpointNotAllowed, ProxyError
from tornado_fal_proxy.rules.bodies import MAX_SESSION_BODY_BYTES
from tornado_fal_proxy.rules.target import parse_target

WMA = "https://wma.fal.run"
ACCESS = rules(allowed_endpoints=("fal-ai/video/**", "me/app", "workflows/me/flow"))
SESSION = parse_target(f"{WMA}/session")


@pytest.mark.parametrize(
    ("method", "url", "expected"),
    [
        ("POST", f"{WMA}/ice", None),
        ("POST", f"{WMA}/session", None),
        ("POST", f"{WMA}/session/heartbeat", None),
        *(("GET", f"{WMA}{path}", EndpointNotAllowed) for path in ("/ice", "/session", "/session/heartbeat")),
        *(
            ("POST", f"{WMA}{path}", EndpointNotAllowed)
            for path in (
                *("", "/", "/ice/", "/session/", "/session?x=1", "/session?", "//session", "/Session", "/session/1"),
                *("/session/heartbeat/", "/fal-ai/video", "/me/app", "/me/app/ice"),
            )
        ),
        ("POST", "https://wma.fal.ai/session", EndpointNotAllowed),
        ("POST", "https://x.wma.fal.run/session", EndpointNotAllowed),
        # The list of servers that clients ask fal.run for, where wma.fal.run does not answer.
        ("POST", f"{RUN}/me/app/ice", None),
        ("POST", f"{RUN}/fal-ai/video/live/ice", None),
        ("POST", f"{RUN}/workflows/me/flow/ice", None),
        ("GET", f"{RUN}/me/app/ice", EndpointNotAllowed),
        ("POST", f"{RUN}/me/ice", EndpointNotAllowed),
        ("POST", f"{RUN}/other/app/ice", EndpointNotAllowed),
        ("POST", "https://queue.fal.run/me/app/ice", EndpointNotAllowed),
    ],
)
def test_call(method: str, url: str, expected: type[ProxyError] | None) -> None:
    """Three paths of this host pass, by POST and in one spelling."""
    assert refusal(ACCESS, method, url) is expected


@pytest.mark.parametrize("path", ["/ice", "/session"])
def test_the_body_decides(path: str) -> None:
    """The body is read where endpoints are restricted, except a heartbeat's, which names none."""
    assert ACCESS.needs_body(parse_target(WMA + path))
    assert not ACCESS.needs_body(parse_target(f"{WMA}/session/heartbeat"))
    assert not ACCESS.needs_body(parse_target(RUN + path))
    assert not rules(allowed_hosts=("wma.fal.run",)).needs_body(parse_target(WMA + path))


def signal(app: object) -> bytes:
    return json.dumps({"app_id": app, "sdp": "v=0\r\no=- 1 2 IN IP4 0.0.0.0", "type": "offer"}).encode()


@pytest.mark.parametrize(
    "body",
    [
        *(signal(app) for app in ("fal-ai/video", "fal-ai/video/live", "me/app", "workflows/me/flow")),
        b' {"type" : "offer", "app_id" : "me/app"} ',
        '{"app_id":"me/app","note":"\u00e9 \U0001f600"}'.encode(),
        b'{"app_id":"me/app","sdp":"\\u0061"}',
    ],
)
def test_signal_allowed(body: bytes) -> None:
    """A signal for an allowed endpoint passes, whatever else is in it."""
    ACCESS.check_body(SESSION, body)


@pytest.mark.parametrize(
    "body",
    [
        *(
            signal(app)
            for app in (
                *("other/app", "fal-ai", "app", "me/app/path", "ME/APP", "me/app/", "/me/app", "me//app", "me/app "),
                *("me/../other/app", "me%2fapp", "workflows/me", "me/app?x", "", None, 1, ["me/app"], {"id": "me/app"}),
            )
        ),
        b'{"app_id":"me/app","app_id":"other/app"}',
        b'{"app_id":"me/app","\\u0061pp_id":"other/app"}',
        b'{"app_id":"me/app","APP_ID":"other/app"}',
        b'{"app_id":"me/app","appId":"other/app"}',
        b'{"app_id":"me/app","app-id":"other/app"}',
        b'{"app_id":"me\\u002fapp"}',
        b'{"app_id":"me\\/app"}',
        b'{"\\u0061pp_id":"me/app"}',
        b'{"App_Id":"me/app"}',
        b'{"app_id":"me/app","x":{"a":1,"a":2}}',
        b'{"app_id":"me/app","x":NaN}',
        b'{"app_id":"me/app"}{"app_id":"other/app"}',
        b'[{"app_id":"me/app"}]',
        b'\xef\xbb\xbf{"app_id":"me/app"}',
        '{"app_id":"me/app"}'.encode("utf-16"),
        b'{"app_id":"me/app","sdp":"\xff"}',
        b'{"sdp":"v=0"}',
        b"",
        b"null",
        b"[" * 5000,
        signal("me/app") + b" " * MAX_SESSION_BODY_BYTES,
    ],
)
def test_signal_refused(body: bytes) -> None:
    """Any other signal is refused, and the refusal shows nothing of the body."""
    with pytest.raises(EndpointNotAllowed) as caught:
        ACCESS.check_body(SESSION, body)
    for word in ("me/app", "other"):
        assert word not in f"{caught.value.message} {caught.value.detail}"
