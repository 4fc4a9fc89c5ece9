"""The properties that a fuzzer tries, by name, each with a function that makes its arguments from bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fuzz.properties import METHODS, access, chunks, origin, request, response, session, target, token

__all__ = ["TARGETS", "FuzzTarget"]


class FuzzTarget(NamedTuple):
    """A target: ``run`` takes a fuzzer's bytes, and ``words`` are pieces that the fuzzer may put together."""

    run: Callable[[bytes], object]
    words: tuple[bytes, ...]


def _lines(data: bytes) -> list[bytes]:
    """Return the parts between record separators. They are not split at line breaks, and may have some."""
    return data.split(b"\x1e")


def _pairs(data: bytes) -> list[tuple[str, str]]:
    fields = (line.decode("latin-1").partition(":") for line in _lines(data))
    return [(name.lower(), value.strip(" ")) for name, _, value in fields]


def _access(data: bytes) -> object:
    number, method = divmod(data[0] if data else 0, len(METHODS))
    return access(number, METHODS[method], data[1:].decode("latin-1"))


def _chunks(data: bytes) -> object:
    """Try a stream. The first byte is the number of bytes that follow, each with a piece's length and a bit to read."""
    count, data = (data[0] % 16, data[1:]) if data else (0, data)
    lengths, data = data[:count], data[count:]
    pieces = []
    for length in lengths:
        pieces.append((data[: length % 128], length >= 128))
        data = data[length % 128 :]
    return chunks([*pieces, (data, True)])


_URLS = (
    *(b"https://", b"fal.run", b"queue.fal.run", b"rest.fal.ai", b"rest.alpha.fal.ai", b":443", b"@", b"%2e", b"%2f"),
    *(b"\\", b"\t", b"\r", b"\n", b" ", b"[", b"]", b"#", b"?", b"xn--", b"\xa0", b"\xad"),
)
_PATHS = (
    *(b"/fal-ai", b"/flux", b"/dev", b"/stream", b"/requests/", b"/status", b"/cancel", b"workflows/", b"comfy/"),
    *(b"/tokens/", b"/../", b"/./", b"//", b"%2e%2e", b"%252e", b";", b"?fal_webhook=", b"https%3A%2F%2Fhooks.example"),
    *(
        b"flux-dev",
        b"Flux-",
        b"-pro",
        b"/tts",
        b"/storage/upload/initiate",
        b"?storage_type=fal-cdn-v3",
        b"fal%5Fwebhook",
    ),
)
TARGETS: dict[str, FuzzTarget] = {
    "target": FuzzTarget(lambda data: target(data.decode("latin-1")), _URLS),
    "access": FuzzTarget(_access, _URLS + _PATHS),
    "request": FuzzTarget(
        lambda data: request(_pairs(data)),
        (
            b"\x1e",
            b"x-fal-",
            b"x-app-fal-",
            b"accept:",
            b"connection:",
            b"authorization:",
            b"content-type:",
            b"\r\n",
            b";",
        ),
    ),
    "response": FuzzTarget(
        lambda data: response(_lines(data)),
        (
            b"HTTP/1.1 200 OK\r\n\x1e",
            b"HTTP/2 200 \r\n\x1e",
            b"connection:",
            b"proxy-authenticate:",
            b"content-length:",
            b"\r",
            b"\n",
            b"\x1e",
            b" ",
        ),
    ),
    "session": FuzzTarget(
        session,
        (
            b'"app_id"',
            b'"APP_ID"',
            b'"fal-ai/flux"',
            b'"a/b/c"',
            b'"sdp"',
            b"\\u0061",
            b":",
            b",",
            b"{",
            b"}",
            b"[",
            b"]",
        ),
    ),
    "token": FuzzTarget(
        token,
        (
            b'"allowed_apps"',
            b'"token_expiration"',
            b"[",
            b"]",
            b'"flux"',
            b'"fast-',
            b":",
            b",",
            b"{",
            b"}",
            b"120",
            b"1e2",
        ),
    ),
    "origin": FuzzTarget(
        lambda data: origin(data.decode("latin-1")),
        (
            b"https://",
            b"http://",
            b".example.org",
            b".example.net:8443",
            b"app.example.com",
            b"localhost",
            b"xn--",
            b":",
        ),
    ),
    "chunks": FuzzTarget(
        _chunks, ("é".encode(), "日".encode(), "🌊".encode(), b"data: ", b"\n\n", b"\xf0", b"\x9f", b"\x80")
    ),
}
