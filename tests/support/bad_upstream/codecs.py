"""Read requests, as far as a script needs them."""

import struct
from collections.abc import Callable

import hpack
from hyperframe import frame as frames

from tests.support.bad_upstream.script import ACK, PING, SETTINGS, WINDOW_UPDATE, Request, frame

__all__ = ["Http1", "Http2"]

PREFACE_BYTES, FRAME_HEAD_BYTES = 24, 9
_LENGTH = "content-length"


class Http1:
    """Read requests of HTTP/1.1 one after another."""

    def __init__(self, received: Callable[[Request], None]) -> None:
        self._received = received
        self._bytes = b""
        self._request: Request | None = None

    def receive(self, content: bytes) -> None:
        self._bytes += content
        while self._bytes:
            if self._request is None:
                head_bytes, end, rest = self._bytes.partition(b"\r\n\r\n")
                if not end:
                    return
                self._bytes = rest
                self._request = self._begin(head_bytes.decode("latin-1"))
            request = self._request
            taken = min(len(self._bytes), request.missing)
            self._bytes, request.missing = self._bytes[taken:], request.missing - taken
            if request.missing:
                return
            request.whole.set()
            self._request = None

    def _begin(self, text: str) -> Request:
        line, *fields = text.split("\r\n")
        method, target, _ = line.split(" ")
        lengths = [value for name, _, value in (each.partition(": ") for each in fields) if name.lower() == _LENGTH]
        request = Request(method, target, missing=sum(map(int, lengths)))
        self._received(request)
        return request


class Http2:
    """Read requests of HTTP/2, acknowledge what must be, and let the peer send all it has."""

    def __init__(self, received: Callable[[Request], None], write: Callable[[bytes], None]) -> None:
        self._received, self._write = received, write
        self._bytes = b""
        self._skip = PREFACE_BYTES
        self._decoder = hpack.Decoder()
        self._requests: dict[int, Request] = {}

    def receive(self, content: bytes) -> None:
        self._bytes += content[self._skip :]
        self._skip = max(self._skip - len(content), 0)
        while len(self._bytes) >= FRAME_HEAD_BYTES:
            received, length = frames.Frame.parse_frame_header(memoryview(self._bytes[:FRAME_HEAD_BYTES]))
            end = FRAME_HEAD_BYTES + length
            if len(self._bytes) < end:
                return
            received.parse_body(memoryview(self._bytes[FRAME_HEAD_BYTES:end]))
            self._bytes = self._bytes[end:]
            self._frame(received)

    def _frame(self, received: frames.Frame) -> None:
        number = received.stream_id
        match received:
            case frames.HeadersFrame():
                fields = {bytes(name): bytes(value) for name, value in self._decoder.decode(received.data, raw=True)}
                request = Request(fields[b":method"].decode(), fields[b":path"].decode(), number)
                self._requests[number] = request
                self._received(request)
            case frames.DataFrame() if received.data:
                for stream in (0, number):
                    window = struct.pack("!I", len(received.data))
                    self._write(frame(WINDOW_UPDATE, 0, window, stream=stream)(0))
            case frames.SettingsFrame() | frames.PingFrame() if "ACK" not in received.flags:
                kind = PING if isinstance(received, frames.PingFrame) else SETTINGS
                payload = received.opaque_data if isinstance(received, frames.PingFrame) else b""
                self._write(frame(kind, ACK, payload, stream=0)(0))
        if "END_STREAM" in received.flags:
            self._requests[number].whole.set()
