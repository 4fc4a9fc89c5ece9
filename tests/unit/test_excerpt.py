"""The log's excerpt of a refused text shows its cause, and has no secret and no order to a terminal."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.access_rules import JOB, QUEUE, RUN
from tests.support.tools import ROOT
from tornado_fal_proxy.errors import MethodNotAllowed, ProxyError
from tornado_fal_proxy.rules.access import access_rules
from tornado_fal_proxy.rules.excerpt import MAX_EXCERPT_CHARS, excerpt
from tornado_fal_proxy.rules.policy import decide

EXCERPTS = {
    "": "",
    "https://fal.run/fal-ai/flux": "https://fal.run/fal-ai/flux",
    "a" * MAX_EXCERPT_CHARS: "a" * MAX_EXCERPT_CHARS,
    "a" * (MAX_EXCERPT_CHARS + 1): "a" * (MAX_EXCERPT_CHARS - 3) + "...",
    "\x1b" * 8000: ("\\x1b" * MAX_EXCERPT_CHARS)[: MAX_EXCERPT_CHARS - 3] + "...",
    # Queries and fragments.
    "https://fal.run/x?key=secret": "https://fal.run/x...",
    "https://fal.run/x#secret": "https://fal.run/x...",
    "https://fal.run/x%3Fkey=secret": "https://fal.run/x...",
    "https%3A%2F%2Ffal.run%2Fx%3fkey=secret": "https%3A%2F%2Ffal.run%2Fx...",
    "?secret": "...",
    # Users and passwords.
    "https://me:secret@fal.run/x@y": "https://***@fal.run/x@y",
    "https:/\\me:secret@fal.run/x": "https:/\\\\***@fal.run/x",
    "https:\\\\me:secret@fal.run": "https:\\\\\\\\***@fal.run",
    "https://" + "secret" * 1000 + "@fal.run/x": "https://***@fal.run/x",
    "secret:secret@fal.run": "***@fal.run",
    "//secret@secret@fal.run": "//***@fal.run",
    # Control characters, and what looks like something else.
    "https://fal.run/\r\n2026 INFO": "https://fal.run/\\r\\n2026 INFO",
    "a\x00\x1b[31m\x7f\x85\x9b": "a\\x00\\x1b[31m\\x7f\\x85\\x9b",
    "\u202e\u2028\ud800é😀": "\\u202e\\u2028\\ud800\\xe9\\U0001f600",
}


@pytest.mark.parametrize(("text", "shown"), EXCERPTS.items())
def test_excerpt(text: str, shown: str) -> None:
    """A text is shown up to its query, without user and password, escaped and short."""
    assert excerpt(text) == shown
    assert "secret" not in shown


@given(st.text(st.characters(), max_size=400))
def test_any_excerpt(text: str) -> None:
    """Whatever the text is, the excerpt is printable ASCII and bounded."""
    shown = excerpt(text)
    assert shown.isascii()
    assert shown.isprintable() or not shown
    assert len(shown) <= MAX_EXCERPT_CHARS


JSON = [("content-type", "application/json"), ("content-length", "2")]
PREFLIGHT = [("origin", "https://a.example\x1b"), ("access-control-request-method", "POST")]
PREFLIGHT_DETAIL = "preflight of https://a.example\\x1b: no origin is allowed without --allowed-origins"
CANCEL = f"{QUEUE}/fal-ai/flux/requests/{JOB}/cancel"
# A method, a target, other headers, and what the log shows.
REFUSED = [
    ("DELETE", f"{RUN}/a/b?secret", [], "DELETE fal.run/a/b"),
    ("X\x1b" * 100, f"{RUN}/a/b", [], "X\\x1b" * 10 + " fal.run/a/b"),
    ("OPTIONS", None, [], "method OPTIONS"),
    ("OPTIONS", None, PREFLIGHT, PREFLIGHT_DETAIL),
    ("OPTIONS", f"{RUN}/a/b", PREFLIGHT, PREFLIGHT_DETAIL),
    ("PUT", CANCEL, [], f"PUT {CANCEL[8:]}, which needs --allow-cancel"),
    ("POST", None, [], "no x-fal-target-url header"),
    ("POST", f"{RUN}/a", [("x-fal-target-url", "https://b")], "2 x-fal-target-url headers"),
    ("POST", "http://fal.run/a?secret", [], "x-fal-target-url: http://fal.run/a..."),
    ("POST", "https://fal.run.evil.example/\n", [], "x-fal-target-url: https://fal.run.evil.example/\\n"),
    ("POST", "https://fal.run/" + "a" * 8000, [], "a URL of 8016 characters: https://fal.run/" + "a" * 121 + "..."),
    ("POST", "https://ws.fal.run/a/b", [], "allowed_hosts: ws.fal.run/a/b"),
    ("POST", f"{RUN}/a/c?secret", [], "allowed_endpoints: fal.run/a/c"),
    ("POST", f"{RUN}/a/b;x%3Fsecret", [], "allowed_endpoints: fal.run/a/b;x..."),
    ("GET", "https://rest.fal.ai/keys/", [], "allowed_endpoints: rest.fal.ai/keys/"),
    (
        "POST",
        "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3",
        [],
        "allow_uploads: rest.fal.ai/storage/upload/initiate",
    ),
    ("POST", f"{RUN}/a/b?fal_webhook=https://u:secret@c.example/secret", [], "allowed_webhooks: ***@c.example"),
    ("POST", f"{RUN}/a/b?fal_webhook=https%3A%2F%2Fc.example%0a%2Fsecret", [], "allowed_webhooks: c.example\\n"),
    ("POST", f"{RUN}/a/b?fal_webhook", [], "allowed_webhooks: an odd spelling"),
    ("POST", f"{RUN}/a/b", [("content-type", "text/plain\x85"), *JSON[1:]], "content-type text/plain\\x85"),
    ("POST", f"{RUN}/a/b", JSON[1:], "content-type none"),
    ("POST", f"{RUN}/a/b", [*JSON, ("content-encoding", "gzip")], "content-encoding gzip"),
    ("POST", f"{RUN}/a/b", [JSON[0], ("content-length", "101")], "declared longer than 100 bytes"),
]


@pytest.mark.parametrize(("method", "url", "more", "detail"), REFUSED)
def test_the_log_shows_what_was_refused(method: str, url: str | None, more: list[tuple[str, str]], detail: str) -> None:
    """Each refusal names its rule or option, and what it refused. The client is told only the rule."""
    access = access_rules(
        allowed_endpoints=("a/b",), allowed_hosts=("fal.run", "rest.fal.ai"), allowed_webhooks=("https://h.example",)
    )
    headers = [*([("x-fal-target-url", url)] if url else []), *more]
    with pytest.raises(ProxyError) as caught:
        decide(method, headers, max_body_bytes=100, access=access)
    assert caught.value.detail == detail
    assert len(detail) <= 200
    assert "secret" not in detail
    others = MethodNotAllowed(needs_cancel=True).message, MethodNotAllowed(may_put=True).message
    messages = (type(caught.value).message, *others)
    assert caught.value.message in messages


def test_the_log_shows_a_refused_account() -> None:
    """The rule that nobody has set is named too."""
    with pytest.raises(ProxyError) as caught:
        decide("GET", [("x-fal-target-url", "https://api.fal.ai/v1/keys?secret")], max_body_bytes=1)
    assert caught.value.detail == "the key's account: api.fal.ai/v1/keys"


def test_an_excerpt_needs_no_file() -> None:
    """Python loads nothing for an excerpt, because a process that is out of files must still log what it refuses."""
    program = (
        "import sys; from tornado_fal_proxy.rules.excerpt import excerpt; known = set(sys.modules); "
        "excerpt('\\xe9\\x1b'); print(sorted(set(sys.modules) - known))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
