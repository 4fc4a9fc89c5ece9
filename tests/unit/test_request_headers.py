"""The headers that go to fal, and those that stay here, as tables."""

import itertools

import pytest

from tornado_fal_proxy import __version__
from tornado_fal_proxy.errors import (
    HeadersTooLarge,
)
from tornado_fal_proxy.rules.headers import request_headers

# Headers that go upstream. The authorization is a constant here, because the rules never read it.

AUTHORIZATION = b"authorization: Key a:b"

# A header of the client's, and the line that it becomes.
RELAYED = [
    (("accept", "application/json, text/event-stream"), b"accept: application/json, text/event-stream"),
    (("content-type", "application/json; charset=utf-8"), b"content-type: application/json; charset=utf-8"),
    (("user-agent", "fal-client/1.10.1"), b"user-agent: fal-client/1.10.1"),
    (("x-fal-queue-priority", "normal"), b"x-fal-queue-priority: normal"),
    (("x-fal-request-timeout", "1.5"), b"x-fal-request-timeout: 1.5"),
    (("x-fal-object-lifecycle-preference", '{"a": 1}'), b'x-fal-object-lifecycle-preference: {"a": 1}'),
    (("x-fal-runner-hint", "a:b;c"), b"x-fal-runner-hint: a:b;c"),
    (("x-fal-a_b.c~d", "1"), b"x-fal-a_b.c~d: 1"),
    (("x-app-fal-disable-fallback", "true"), b"x-app-fal-disable-fallback: true"),
    (("x-fal-note", "tab\there"), b"x-fal-note: tab\there"),
    (("x-fal-note", "\xe6\x80\xff"), b"x-fal-note: \xe6\x80\xff"),
    # libcurl's notation of an empty value; with a colon it would send no such header.
    (("x-fal-empty", ""), b"x-fal-empty;"),
    (("accept", ""), b"accept;"),
]
# Headers of the client's that stay here.
WITHHELD = [
    *[(name, "Key theirs") for name in ("authorization", "proxy-authorization", "x-api-key", "cookie", "cookie2")],
    ("x-fal-target-url", "https://fal.run/"),
    ("x-fal-client-proxy", "another/1"),
    ("host", "evil.com"),
    ("origin", "https://app.example"),
    ("referer", "https://app.example/page"),
    ("x-forwarded-for", "10.0.0.1"),
    ("x-forwarded-host", "evil.com"),
    ("forwarded", "for=10.0.0.1"),
    ("x-real-ip", "10.0.0.1"),
    ("via", "1.1 a"),
    ("connection", "close"),
    ("keep-alive", "timeout=5"),
    ("proxy-connection", "keep-alive"),
    ("te", "trailers"),
    ("trailer", "x-fal-a"),
    ("transfer-encoding", "chunked"),
    ("upgrade", "h2c"),
    ("http2-settings", "AAA"),
    ("content-length", "2"),
    ("content-encoding", "identity"),
    ("accept-encoding", "gzip"),
    ("accept-language", "en"),
    ("expect", "100-continue"),
    ("range", "bytes=0-1"),
    ("if-none-match", '"a"'),
    ("sec-fetch-site", "same-origin"),
    ("x-requested-with", "fetch"),
    ("x-fal", "1"),
    ("x-fal-", "1"),
    ("x-app-fal-", "1"),
    ("x-app-fal", "1"),
    ("x-app-x-fal-a", "1"),
    ("xx-fal-a", "1"),
    ("x_fal_a", "1"),
    # Names and values that could become, or end, another line.
    ("x-fal-a\r\nauthorization", "Key theirs"),
    ("x-fal-a: b\r\nauthorization", "Key theirs"),
    ("x-fal-a:", "1"),
    ("x-fal-a;", ""),
    ("x-fal-a ", "1"),
    ("x-fal-\xe6", "1"),
    ("x-fal-a", "b\r\nauthorization: Key theirs"),
    ("x-fal-a", "b\nc"),
    ("x-fal-a", "b\r"),
    ("x-fal-a", "b\n"),
    ("x-fal-a", "\x00"),
    ("x-fal-a", "\x1b[0m"),
    ("x-fal-a", "\x7f"),
    ("x-fal-a", "\u0100"),
    ("x-fal-a", "\u560d\u560a"),  # CR LF, if truncated to a byte each
    ("user-agent", "a\r\nb: c"),
    ("accept", "a\x00"),
    ("content-type", "application/json\r\n"),
]
# An absent one of these is kept from being added by libcurl.
SILENCED = {b"accept:", b"content-type:", b"user-agent:"}


def test_a_call_without_headers_sends_the_key_and_the_proxys_name() -> None:
    """libcurl adds no accept, content-type, user-agent and Expect of its own. The version is the package's."""
    lines = request_headers([], AUTHORIZATION)
    assert (
        set(lines)
        == {AUTHORIZATION, f"x-fal-client-proxy: tornado-fal-proxy/{__version__}".encode(), b"Expect:"} | SILENCED
    )
    assert len(lines) == len(set(lines))


def relayed(*headers: tuple[str, str]) -> list[bytes]:
    """Return the lines that these headers of a client add."""
    constant = request_headers([], AUTHORIZATION)
    return [line for line in request_headers(headers, AUTHORIZATION) if line not in constant]


@pytest.mark.parametrize(("header", "line"), RELAYED)
def test_headers_that_fal_reads_are_relayed(header: tuple[str, str], line: bytes) -> None:
    """A header that fal reads is relayed as it came, in place of the line that silences libcurl's own."""
    assert relayed(header) == [line]
    assert f"{header[0]}:".encode() not in request_headers([header], AUTHORIZATION)


@pytest.mark.parametrize("header", WITHHELD)
def test_nothing_else_is_relayed(header: tuple[str, str]) -> None:
    """With any other header the lines are the same as without it."""
    assert sorted(request_headers([header], AUTHORIZATION)) == sorted(request_headers([], AUTHORIZATION))


def test_all_together_are_relayed_as_each_alone() -> None:
    """Order and duplicates stay, and the headers that are withheld change nothing about the others."""
    headers = [
        pair for pairs in itertools.zip_longest([case[0] for case in RELAYED], WITHHELD) for pair in pairs if pair
    ]
    headers = [("x-fal-twice", "1"), *(header for header in headers if header[0] != "connection"), ("x-fal-twice", "2")]
    assert relayed(*headers) == [b"x-fal-twice: 1", *[case[1] for case in RELAYED], b"x-fal-twice: 2"]


def test_headers_that_connection_lists_stay_here() -> None:
    """A header that Connection lists is for the proxy (RFC 9110 section 7.6.1). The key cannot be taken away so."""
    listed = ("connection", "close, X-Fal-A ,x-fal-client-proxy,authorization")
    lines = request_headers(
        [("x-fal-a", "1"), listed, ("x-fal-b", "2"), ("connection", "accept"), ("accept", "c")], AUTHORIZATION
    )
    assert lines == [*request_headers([], AUTHORIZATION)[:3], b"x-fal-b: 2", *lines[4:]]
    assert set(lines[4:]) == SILENCED


@pytest.mark.parametrize(
    ("headers", "fits"),
    [
        ([("x-fal-a", "b")] * 64, True),
        ([("x-fal-a", "b")] * 65, False),
        ([("x-fal-a", "b" * (8192 - 32 - len("x-fal-a: ")))], True),
        ([("x-fal-a", "b" * (8193 - 32 - len("x-fal-a: ")))], False),
        ([("x-fal-a", "b" * 91)] * 62, True),
        ([("x-fal-a", "b" * 92)] * 62, False),
        ([("cookie", "b" * 60_000)] * 100, True),
        ([("x-fal-target-url", "b" * 60_000)] * 100, True),
    ],
)
def test_relayed_headers_are_limited(headers: list[tuple[str, str]], fits: bool) -> None:
    """Relayed headers are limited in number and in size, with 32 bytes more for each. Others do not count."""
    if fits:
        request_headers(headers, AUTHORIZATION)
    else:
        with pytest.raises(HeadersTooLarge):
            request_headers(headers, AUTHORIZATION)


def test_no_line_has_more_than_one_header() -> None:
    """No header of the tables above puts a line break, or the end of a header, into the lines for libcurl."""
    for line in request_headers([*(case[0] for case in RELAYED), *WITHHELD], AUTHORIZATION):
        assert not set(line) & {0, 10, 13}
