"""The steps of a script, which an upstream sends as raw bytes, over HTTP/1.1 and HTTP/2."""

import asyncio
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from hpack.hpack import encode_integer

__all__ = [
    "ACK",
    "DATA",
    "END_HEADERS",
    "END_STREAM",
    "GOAWAY",
    "HEADERS",
    "PING",
    "RST_STREAM",
    "SETTINGS",
    "WINDOW_UPDATE",
    "Do",
    "Request",
    "Script",
    "Step",
    "block",
    "chunked",
    "data",
    "drip",
    "fine",
    "frame",
    "goaway",
    "head",
    "many",
    "own_response",
    "reset_stream",
    "response",
]

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1


@dataclass(eq=False)
class Request:
    """A request as far as it is here. ``stream`` is 0 for HTTP/1.1."""

    method: str
    target: str
    stream: int = 0
    whole: asyncio.Event = field(default_factory=asyncio.Event)
    missing: int = 0


class Do(Enum):
    """A step that writes no bytes of HTTP."""

    EARLY = auto()  # as the first step: begin when the head of the request is here
    TURN = auto()  # let the proxy take what was written
    AGAIN = auto()  # wait for the next request on this connection
    RESPONDED = auto()  # wait until the client has its response
    NEXT = auto()  # wait until the client is about to send its next request
    CLOSE = auto()  # close_notify, and the end of TCP
    CLOSE_NOTIFY = auto()  # the end of TLS only
    FIN = auto()  # the end of TCP without close_notify
    RESET = auto()


Step = bytes | Callable[[int], bytes] | Do
Script = tuple[Step, ...]


# Steps of HTTP/1.1.


def response(*lines: str, body: bytes = b"", status: str = "HTTP/1.1 200 OK") -> bytes:
    """Return a response with these lines of its head, and no other."""
    return "\r\n".join([status, *lines, "", ""]).encode("latin-1") + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """Return a body in chunks."""
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def drip(content: bytes) -> Script:
    """Return steps that write one byte after another."""
    return tuple(step for byte in content for step in (bytes([byte]), Do.TURN))


# Steps of HTTP/2.


def frame(kind: int, flags: int, payload: bytes = b"", *, stream: int | None = None) -> Callable[[int], bytes]:
    """Return a frame, on the stream of the request unless another is named."""

    def on(own: int) -> bytes:
        number = own if stream is None else stream
        return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, number) + payload

    return on


def many(count: int, step: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """Return the same frame many times, in one write."""
    return lambda own: step(own) * count


def block(*fields: tuple[str, str]) -> bytes:
    """Return a header block of literals, which needs no state."""

    def text(content: str) -> bytes:
        return bytes(encode_integer(len(content), 7)) + content.encode("latin-1")

    return b"".join(b"\0" + text(name) + text(value) for name, value in fields)


def head(*fields: tuple[str, str], status: str | None = "200", end: bool = False) -> Callable[[int], bytes]:
    """Return a HEADERS frame, without ``:status`` where ``status`` is None."""
    pseudo = () if status is None else ((":status", status),)
    return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), block(*pseudo, *fields))


def data(content: bytes, *, end: bool = False) -> Callable[[int], bytes]:
    """Return a DATA frame."""
    return frame(DATA, END_STREAM if end else 0, content)


def reset_stream(code: int) -> Callable[[int], bytes]:
    """Return an RST_STREAM frame."""
    return frame(RST_STREAM, 0, struct.pack("!I", code))


def goaway(code: int = 0, *, below: bool = False, last: int | None = None) -> Callable[[int], bytes]:
    """Return a GOAWAY frame whose last stream is that of the request, or one below."""

    def on(own: int) -> bytes:
        number = last if last is not None else max(own - 2, 0) if below else own
        return frame(GOAWAY, 0, struct.pack("!II", number, code), stream=0)(own)

    return on


# The response to a request without a script.


def own_response(target: str) -> bytes:
    """Return the body that belongs to a request and to no other."""
    return json.dumps({"target": target}).encode()


def fine(request: Request) -> Script:
    """Return the script for a request that has none."""
    body = own_response(request.target)
    if request.stream:
        return (head(("content-type", "application/json"), ("content-length", str(len(body)))), data(body, end=True))
    return (response("content-type: application/json", f"content-length: {len(body)}", body=body),)
