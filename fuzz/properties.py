"""Properties of the proxy's decisions, each a function that raises an exception where the property is not true.

Strategy: no property repeats the steps of the code under test. Each compares the result with another source: another
parser, another reading of the same bytes, or a model of the rules that is shorter than they are because it may be
wider. ``targets`` makes their arguments from the bytes of a fuzzer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import ada_url
import pycurl
from tornado.httputil import HTTPHeaders

from tornado_fal_proxy.errors import (
    AccessRefused,
    HeadersTooLarge,
    MalformedResponse,
    MethodNotAllowed,
    ProxyError,
    TargetRefused,
)
from tornado_fal_proxy.relay.response import split_utf8
from tornado_fal_proxy.rules.access import AccessRules, access_rules
from tornado_fal_proxy.rules.cors import cors_rules
from tornado_fal_proxy.rules.endpoints import INITIATE, INITIATE_MULTIPART, REQUESTS, REST_HOSTS, TOKENS_PATH
from tornado_fal_proxy.rules.headers import Pairs, ResponseHead, parse_response_head, request_headers
from tornado_fal_proxy.rules.policy import decide
from tornado_fal_proxy.rules.target import Target, parse_target
from tornado_fal_proxy.upstream.body import Body

__all__ = [
    "CORS",
    "RULES",
    "access",
    "chunks",
    "origin",
    "request",
    "response",
    "session",
    "target",
    "token",
]

CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2
HOP_BY_HOP = ("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade")


# The target: every parser reads the same address.

# The raw characters that a WHATWG parser encodes in paths and queries.
ENCODED_IN_PATH = set('"<>^`{}')
ENCODED_IN_QUERY = set("\"<>'")
DOT_SEGMENT = re.compile(r"/(?:\.|%2e){1,2}(?=/|\Z)", re.IGNORECASE)


def is_fals(host: str) -> bool:
    """Tell whether a host is one of fal's, without the pattern of the package."""
    return host.split(".")[-2:] in (["fal", "ai"], ["fal", "run"])


def target(url: str) -> Target | None:
    """Check that urllib and a WHATWG parser read one address in the client's string and in the rebuilt URL.

    A WHATWG parser encodes some characters and resolves dot segments. A path without dot segments must be the same in
    both, except for the characters that the parser encodes.
    """
    try:
        found = parse_target(url)
    except TargetRefused:
        return None
    assert is_fals(found.host)
    for text in (url, found.url):
        plain = urlsplit(text)
        assert (plain.scheme, plain.hostname, plain.port or 443) == ("https", found.host, 443)
        assert (plain.username, plain.password) == (None, None)
        assert (plain.path or "/", plain.query) == (found.path, found.query or "")
        whatwg = ada_url.URL(text)
        assert (whatwg.protocol, whatwg.hostname, whatwg.port) == ("https:", found.host, "")
        assert (whatwg.username, whatwg.password) == ("", "")
        assert _same_text(whatwg.search.removeprefix("?"), found.query or "", ENCODED_IN_QUERY)
        if not DOT_SEGMENT.search(found.path):
            assert _same_text(whatwg.pathname, found.path, ENCODED_IN_PATH)
    assert urlsplit(found.url).fragment == ada_url.URL(found.url).hash == ""
    assert parse_target(found.url) == found
    return found


def _same_text(parsed: str, ours: str, encoded: set[str]) -> bool:
    """Tell whether a WHATWG parser left the text as it is, except for the characters that it percent-encodes."""
    return parsed == "".join(f"%{ord(character):02X}" if character in encoded else character for character in ours)


# The access rules: in whatever way a server may read a path, the endpoint that it serves is allowed.


def _rules(**fields: Any) -> AccessRules:
    rules = access_rules(**fields)
    assert rules is not None
    return rules


ORIGIN = "https://hooks.example"
# The patterns of a configuration, and its rules.
RULES: list[tuple[tuple[str, ...], AccessRules]] = [
    (patterns, _rules(allowed_endpoints=patterns, allowed_webhooks=(ORIGIN,), **more))
    for patterns, more in (
        (("fal-ai/flux/dev", "fal-ai/fast-sdxl"), {}),
        (("fal-ai/flux/**",), {"allow_cancel": True}),
        (("*/flux-dev", "workflows/me/*", "comfy/*/x/**"), {"allow_uploads": True}),
        (("fal-ai/Flux-*-pro/**", "**/tts"), {"allow_cancel": True, "allow_uploads": True}),
    )
]
METHODS = ("GET", "POST", "PUT")

Habit = Callable[[str], str]


def _without_dots(path: str) -> str:
    """Return the path without its dot segments (RFC 3986 section 5.2.4)."""
    kept: list[str] = []
    for segment in path.split("/")[1:]:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    return "/" + "/".join(kept)


# Changes that servers, and the proxies in front of them, make to a path before they use it: any of them, in any order.
HABITS: tuple[Habit, ...] = (
    unquote,
    lambda path: unquote(path, "latin-1"),
    _without_dots,
    lambda path: re.sub(r"//+", "/", path),
    lambda path: re.sub(r";[^/]*", "", path),
    lambda path: path.replace("\\", "/"),
    lambda path: path.replace("+", " "),
    lambda path: path.rstrip("/") or "/",
    lambda path: path.strip(),
    lambda path: path.partition("\0")[0],
    lambda path: re.split("[?#]", path)[0],
    lambda path: re.sub(r"[. ]+(?=/|\Z)", "", path),
    lambda path: unicodedata.normalize("NFKC", path),
)
# Limits the readings of one path that are tried: as many as a path with one of each oddity has.
MAX_READINGS = 256


def readings(path: str) -> set[str]:
    """Return the paths that a server may read in ``path``, except for the case of their letters."""
    found, new = {path}, [path]
    while new and len(found) < MAX_READINGS:
        path = new.pop()
        for habit in HABITS:
            if (reading := habit(path)) not in found:
                found.add(reading)
                new.append(reading)
    return found


def access(number: int, method: str, url: str) -> Target | None:
    """Check that a call which passes the rules of RULES[number] is allowed by them, however a server reads it."""
    patterns, rules = RULES[number % len(RULES)]
    try:
        found = decide(method, [("x-fal-target-url", url)], max_body_bytes=1, access=rules)
    except (AccessRefused, TargetRefused, MethodNotAllowed, ProxyError):
        return None
    assert method in ("GET", "POST") or (method == "PUT" and rules.cancel)
    for path in readings(found.path):
        for folded in (False, True):
            assert _is_allowed(patterns, rules, method, found, path, folded), f"a server may read {path!r}"
    if found.query is not None:
        assert all(value == ORIGIN or value.startswith(f"{ORIGIN}/") for value in webhooks(found.query))
    return found


def _is_allowed(
    patterns: Sequence[str], rules: AccessRules, method: str, found: Target, path: str, folded: bool
) -> bool:
    """Tell whether a server that reads ``path`` serves an allowed endpoint. Unlike in the rules, * takes any letter."""
    if found.host in REST_HOSTS:
        upload = path in (INITIATE, INITIATE_MULTIPART)
        return method == "POST" and (
            (upload and rules.uploads) or (path == TOKENS_PATH and found.query is None) or (path + "/" == TOKENS_PATH)
        )
    if folded:
        path, patterns = path.lower(), [pattern.lower() for pattern in patterns]
    segments = path.split("/")[1:]
    length = 3 if segments[0] in ("workflows", "comfy") else 2
    if REQUESTS in segments:
        app, behind = segments[:length], segments[length:]
        begins = any(
            _matches(pattern.split("/")[:end], app) for pattern in patterns for end in range(1, pattern.count("/") + 2)
        )
        calls = {"GET": ([], ["status"], ["status", "stream"]), "PUT": (["cancel"],)}
        return (
            found.host == "queue.fal.run"
            and begins
            and len(behind) >= 2
            and behind[0] == REQUESTS
            and behind[2:] in calls.get(method, ())
        )
    ids = [segments, segments[:-1]] if found.host == "fal.run" and segments[-1] == "stream" else [segments]
    return (
        found.host in ("fal.run", "queue.fal.run")
        and method != "PUT"
        and any(len(one) >= length and _matches(pattern.split("/"), one) for pattern in patterns for one in ids)
    )


def _matches(pattern: Sequence[str], segments: Sequence[str]) -> bool:
    parts = ("(?:[^/]+/)*" if part == "**" else re.escape(part).replace(r"\*", "[^/]*") + "/" for part in pattern)
    return re.fullmatch("".join(parts), "".join(f"{segment}/" for segment in segments)) is not None


def webhooks(query: str) -> list[str]:
    """Return the values that some server may take for those of fal_webhook."""
    found = []
    for text in (query, unquote(query), unquote(unquote(query))):
        for separated in (text, text.replace(";", "&")):
            for name, value in parse_qsl(separated, keep_blank_values=True):
                if re.sub(r"[-_. \[\]]", "", name.lower()) == "falwebhook":
                    found.append(value)
    for value in found:
        assert ada_url.URL(value).origin == ORIGIN, f"a browser's parser reads {value!r} otherwise"
    return found


# Headers: no line breaks, and no header that only concerns one hop.

AUTHORIZATION = b"authorization: Key an-id:a-secret"


def request(pairs: Pairs) -> list[bytes]:
    """Check that the lines for fal are whole, with names from the list, and one authorization, which is the proxy's."""
    try:
        lines = request_headers(pairs, AUTHORIZATION)
    except HeadersTooLarge:
        return []
    assert sum(map(len, lines)) < 10_000
    names = []
    for line in lines:
        text = line.decode("latin-1")
        assert not CONTROLS.search(text)
        name, mark = re.match(r"([^:;]*)(.?)", text.lower()).groups()  # type: ignore[union-attr]
        assert mark in (":", ";")
        assert TOKEN.fullmatch(name)
        assert mark == ":" or text == f"{name};"
        names.append(name)
    relayed = {name for name in names if not re.fullmatch(r"x-(?:app-)?fal-.+", name)}
    assert relayed == {"authorization", "expect", "accept", "content-type", "user-agent"}
    assert "x-fal-target-url" not in names
    assert lines[0] == AUTHORIZATION
    assert names.count("authorization") == names.count("x-fal-client-proxy") == 1
    listed = {
        option.strip(" \t").lower() for name, value in pairs if name == "connection" for option in value.split(",")
    }
    for name, value in pairs:
        if name in listed and value:
            assert f"{name}: {value}".encode("latin-1", "replace") not in lines[3:]
    pycurl.Curl().setopt(pycurl.HTTPHEADER, lines)
    return lines


def response(lines: Sequence[bytes]) -> ResponseHead | None:
    """Check that Tornado takes the client's headers, without line breaks, framing or hop-by-hop ones among them."""
    try:
        head = parse_response_head(lines)
    except MalformedResponse as exc:
        assert len(exc.detail) < 500
        return None
    assert 100 <= head.status <= 999
    headers = HTTPHeaders()
    for name, value in head.headers:
        assert TOKEN.fullmatch(name)
        assert name == name.lower()
        assert not CONTROLS.search(value)
        assert value == value.strip(" \t")
        assert name not in (*HOP_BY_HOP, "content-length", "content-encoding")
        assert not name.startswith("proxy-")
        headers.add(name, value)
        value.encode("latin-1")
    assert head.length is None or 0 <= head.length < 10**18
    return head


# A token's body: however its JSON is read, it asks for allowed apps and a short life.

TOKEN_RULES = _rules(allowed_endpoints=("fal-ai/flux", "fal-ai/fast-*", "a/b/c"))
MAY_HAVE_TOKENS = re.compile("flux")
TOKENS, SESSION = parse_target("https://rest.fal.ai/tokens/"), parse_target("https://wma.fal.run/session")
# The endpoints of which TOKEN_RULES allow a session.
MAY_HAVE_SESSIONS = re.compile("fal-ai/flux|fal-ai/fast-[a-z0-9._-]*|a/b/c")


def _first_key_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(reversed(pairs))


def _any_case(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields as Go's encoding/json does, which ignores the case of names."""
    return {name.lower(): value for name, value in pairs}


READERS: tuple[Callable[[bytes], Any], ...] = (
    json.loads,
    lambda body: json.loads(body.decode("latin-1")),
    lambda body: json.loads(body, object_pairs_hook=_first_key_wins),
    lambda body: json.loads(body, object_pairs_hook=_any_case),
    lambda body: json.loads(body, parse_int=float),  # as JavaScript
    lambda body: json.loads(body, strict=False),
    lambda body: json.loads(re.sub(rb"/\*.*?\*/|//[^\n]*", b"", body)),
)


def token(body: bytes) -> bool:
    """Tell whether a token is given. If so, check that each reader finds allowed apps and a life of 1 to 300 s only."""
    try:
        TOKEN_RULES.check_body(TOKENS, body)
    except AccessRefused as exc:
        assert str(exc.detail).isprintable()
        return False
    for reader in READERS:
        fields = reader(body)
        assert set(fields) == {"allowed_apps", "token_expiration"}
        assert fields["allowed_apps"]
        assert all(MAY_HAVE_TOKENS.fullmatch(app) for app in fields["allowed_apps"])
        assert 1 <= fields["token_expiration"] <= 300
    return True


def session(body: bytes) -> bool:
    """Tell whether a session may be opened. If so, check that each reader finds an allowed endpoint in its body."""
    try:
        TOKEN_RULES.check_body(SESSION, body)
    except AccessRefused as exc:
        assert str(exc.detail).isprintable()
        return False
    for reader in READERS[:-1]:  # the last would take a URL in a string for a comment
        assert MAY_HAVE_SESSIONS.fullmatch(reader(body)["app_id"])
    return True


# CORS: an allowed text is one that a browser sends for a page of an allowed origin.

EXACT = ("https://app.example.com", "http://localhost:3000", "http://[::1]:8080")
CORS = cors_rules((*EXACT, "https://*.example.org", "https://*.example.net:8443"))


def origin(text: str) -> bool:
    """Tell whether pages of ``text`` may call. Check that no header has a control character, whatever was asked for."""
    assert CORS is not None
    allowed = CORS.allows(text)
    headers = CORS.response_headers(text)
    assert bool(headers) == allowed
    for _, value in headers + CORS.preflight_headers(text):
        assert not CONTROLS.search(value)
        value.encode("latin-1")
    if allowed:
        assert dict(headers)["Access-Control-Allow-Origin"] == text
        try:
            url = ada_url.URL(text)
        except ValueError:
            return allowed  # a host that no browser has a page of
        assert url.origin == text
        assert text in EXACT or (
            url.protocol == "https:"
            and (
                (url.hostname.endswith(".example.org") and not url.port)
                or (url.hostname.endswith(".example.net") and url.port == "8443")
            )
        )
    return allowed


# A stream: whole characters in each chunk, and not a byte lost.


class _Body(Body):
    def resume(self) -> None:
        """Do nothing, because no server waits."""


def chunks(pieces: Sequence[tuple[bytes, bool]]) -> list[bytes]:
    """Return the chunks that the client gets of an event stream, by the same steps as the handler's. Check them.

    Each piece comes with whether all that has arrived is read before the next piece.
    """
    body = _Body()
    body.high_water = sum(len(piece) for piece, _ in pieces) + 1
    written, undecoded = [], b""
    for number, (piece, read) in enumerate(pieces, 1):
        if piece:
            assert not body.is_full
            body.put(piece)
        while (read or number == len(pieces)) and (chunk := body.next_piece()):
            chunk = body.read_rest_of_line(chunk)
            chunk, undecoded = split_utf8(undecoded + chunk)
            assert len(undecoded) < 4
            if chunk:
                written.append(chunk)
    if undecoded:
        written.append(undecoded)
    whole = b"".join(piece for piece, _ in pieces)
    assert b"".join(written) == whole
    try:
        text = whole.decode()
    except UnicodeDecodeError:
        return written
    assert "".join(chunk.decode() for chunk in written) == text
    return written
