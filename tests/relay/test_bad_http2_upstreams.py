"""Upstreams that speak HTTP/2 badly: what the client gets, how often the call was made, and how the log names it."""

import gzip
import struct

import brotli
import pytest

from tests.support.bad_upstream import Do, block, data, frame, goaway, head, many, reset_stream
from tests.support.bad_upstream.rows import (
    CUT,
    KINDS,
    NOTHING,
    OK,
    OWN,
    PAID_GET_WAYS,
    STREAM_WAYS,
    WAYS,
    Row,
    Want,
    names_of,
    play,
)
from tests.support.certificates import Authority
from tests.support.logs import Logs
from tests.support.proxy import Setup

JSON, IMAGE = ("content-type", "application/json"), ("content-type", "image/png")
LENGTH = ("content-length", "2")
HALF = b'{"images": [{"url": "htt'
HEAD, ALL, PART = head(JSON), data(b"{}", end=True), data(b"{}")
FINE = (HEAD, ALL)
# How often a read is sent of which the upstream says that it did not run: five times more by libcurl, and all that once
# more by the proxy.
REFUSED = 12
LOST, MALFORMED, LATE = "ConnectionLost", "MalformedResponse", "UpstreamTimeout"
BIG = b'{"prompt": "%b"}' % (b"x" * 300_000)
GZIP = gzip.compress(b'{"a": 1}')

PRIORITY, SETTINGS, PUSH_PROMISE, PING, WINDOW_UPDATE, CONTINUATION = 2, 4, 5, 6, 8, 9
ALTSVC, ORIGIN, PRIORITY_UPDATE, UNKNOWN = 10, 12, 16, 0xBB
END_STREAM, END_HEADERS, PADDED = 1, 4, 8
CODES = [
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
]


def number(value: int) -> bytes:
    return struct.pack("!I", value)


def setting(name: int, value: int) -> bytes:
    return struct.pack("!HI", name, value)


RESETS = {
    **{f"{name} before the head": Row((reset_stream(code),), NOTHING, LOST) for code, name in enumerate(CODES)},
    **{f"{name} in a JSON": Row((HEAD, data(HALF), reset_stream(code)), CUT, LOST) for code, name in enumerate(CODES)},
    **{f"{name} at the end": Row((*FINE, reset_stream(code)), OK) for code, name in enumerate(CODES)},
    "REFUSED_STREAM before the head": Row((reset_stream(7),), NOTHING, LOST, reads=REFUSED),
    "HTTP_1_1_REQUIRED before the head": Row((reset_stream(13),), NOTHING, LOST, read=OWN, read_error=""),
    "HTTP_1_1_REQUIRED behind a whole JSON": Row((HEAD, PART, reset_stream(13)), CUT, LOST),
    "HTTP_1_1_REQUIRED behind the head": Row((HEAD, reset_stream(13)), CUT, LOST),
    "an unknown code": Row((reset_stream(0xDEAD),), NOTHING, LOST),
    "NO_ERROR behind a whole JSON": Row((HEAD, PART, reset_stream(0)), OK),
    "NO_ERROR behind a whole length": Row((head(JSON, LENGTH), PART, reset_stream(0)), OK),
    "NO_ERROR behind half a length": Row((head(JSON, ("content-length", "9")), PART, reset_stream(0)), CUT, LOST),
    "NO_ERROR in an interim": Row((head(status="103"), reset_stream(0)), NOTHING, LOST),
    "NO_ERROR in a string": Row((HEAD, data(b'"abc'), reset_stream(0)), CUT, LOST),
    "NO_ERROR in a word": Row((HEAD, data(b"tru"), reset_stream(0)), CUT, LOST),
    "NO_ERROR behind an escape": Row((HEAD, data(b'{"a": "}\\'), data(b'"}'), reset_stream(0)), CUT, LOST),
    "NO_ERROR in problem+json": Row(
        (head(("content-type", "application/problem+json; charset=utf-8")), data(HALF), reset_stream(0)), CUT, LOST
    ),
    "NO_ERROR in an error": Row((head(JSON, status="422"), data(HALF), reset_stream(0)), CUT, LOST),
    "NO_ERROR in gzip": Row(
        (head(JSON, ("content-encoding", "gzip")), data(GZIP[:-9]), reset_stream(0)), CUT, MALFORMED
    ),
    **{
        f"NO_ERROR before the first byte of {coding}": Row(
            (head(JSON, ("content-encoding", coding)), reset_stream(0)), CUT, MALFORMED
        )
        for coding in ("gzip", "deflate", "br")
    },
    "NO_ERROR between members of gzip": Row(
        (head(JSON, ("content-encoding", "gzip")), data(gzip.compress(b'{"a": ')), reset_stream(0)), CUT, LOST
    ),
    "NO_ERROR behind whole gzip": Row(
        (head(JSON, ("content-encoding", "gzip")), data(GZIP), reset_stream(0)), Want(200, b'{"a": 1}')
    ),
    "NO_ERROR behind half a text in brotli": Row(
        (head(JSON, ("content-encoding", "br")), data(brotli.compress(b'{"a": ')), reset_stream(0)), CUT, LOST
    ),
    "NO_ERROR in 40 kB": Row(
        (HEAD, data(b'{"a": "' + b"x" * 16_000), data(b"x" * 16_000), data(b"x" * 8000), reset_stream(0)), CUT, LOST
    ),
    "CANCEL behind a whole JSON": Row((HEAD, PART, reset_stream(8)), CUT, LOST),
    "twice": Row((reset_stream(2), reset_stream(2)), NOTHING, LOST),
    "of stream 0": Row((frame(3, 0, number(2), stream=0),), NOTHING, LOST),
    "of an idle stream": Row((frame(3, 0, number(2), stream=99),), NOTHING, LOST),
    "five bytes": Row((frame(3, 0, b"12345"),), NOTHING, LOST),
    "a flood": Row((many(2000, reset_stream(2)),), NOTHING, LOST),
}

ENDS = {
    "no END_STREAM, close": Row((HEAD, data(HALF), Do.CLOSE), CUT, LOST),
    "no END_STREAM, FIN": Row((HEAD, data(HALF), Do.FIN), CUT, LOST),
    "no END_STREAM, close_notify": Row((HEAD, data(HALF), Do.CLOSE_NOTIFY), CUT, LOST),
    "no END_STREAM, reset": Row((HEAD, data(HALF), Do.RESET), CUT, LOST),
    "no END_STREAM, silence": Row((HEAD, data(HALF)), CUT, LATE, stalls=True),
    "whole JSON, no END_STREAM, silence": Row((HEAD, PART), CUT, LATE, stalls=True),
    "whole JSON, no END_STREAM, close": Row((HEAD, PART, Do.CLOSE), CUT, LOST),
    "close": Row((Do.CLOSE,), NOTHING, LOST),
    "FIN": Row((Do.FIN,), NOTHING, LOST),
    "reset": Row((Do.RESET,), NOTHING, LOST),
    "close_notify": Row((Do.CLOSE_NOTIFY,), NOTHING, LOST),
    "silence": Row((Do.TURN,), NOTHING, LATE, stalls=True),
    "half a frame, close": Row((HEAD, lambda stream: data(HALF)(stream)[:15], Do.CLOSE), CUT, LOST),
    "half a frame, silence": Row(
        (HEAD, lambda stream: data(HALF)(stream)[:15], Do.RESPONDED, Do.RESET), CUT, LATE, stalls=True
    ),
    "fine, close": Row((*FINE, Do.CLOSE), OK),
    "fine, FIN": Row((*FINE, Do.FIN), OK),
    "fine, reset": Row((*FINE, Do.RESPONDED, Do.RESET), OK),
    "fine, close_notify": Row((*FINE, Do.CLOSE_NOTIFY, Do.TURN, Do.FIN), OK),
    "fine, close_notify before the next": Row((*FINE, Do.NEXT, Do.CLOSE_NOTIFY, Do.FIN), OK),
    "fine, close before the next": Row((*FINE, Do.NEXT, Do.CLOSE), OK),
}

GOAWAYS = {
    "graceful, then the response": Row((goaway(), *FINE), OK),
    "graceful, then the response, close": Row((goaway(), *FINE, Do.CLOSE), OK),
    "in two steps": Row((goaway(last=2**31 - 1), HEAD, goaway(), ALL, Do.CLOSE), OK),
    "in the response": Row((HEAD, goaway(), ALL), OK),
    "behind the response, in its record of TLS": Row((HEAD, lambda own: ALL(own) + goaway()(own)), OK),
    "behind the response, close": Row((*FINE, goaway(), Do.CLOSE), OK),
    "while idle": Row((*FINE, Do.RESPONDED, goaway()), OK),
    "while idle, close": Row((*FINE, Do.RESPONDED, goaway(), Do.CLOSE), OK),
    "before the next": Row((*FINE, Do.NEXT, goaway()), OK),
    "before the next, close": Row((*FINE, Do.NEXT, goaway(), Do.CLOSE), OK),
    "below ours": Row((goaway(below=True),), NOTHING, LOST, reads=REFUSED),
    "below ours, close": Row((goaway(below=True), Do.CLOSE), NOTHING, LOST, reads=REFUSED),
    "an error, below ours, close": Row((goaway(11, below=True), Do.CLOSE), NOTHING, LOST, reads=REFUSED),
    "at ours, close": Row((goaway(), Do.CLOSE), NOTHING, LOST),
    "an error, at ours, close": Row((goaway(2), Do.CLOSE), NOTHING, LOST),
    "an error, at ours, then the response": Row((goaway(2), *FINE), OK),
    "HTTP_1_1_REQUIRED, close": Row((goaway(13), Do.CLOSE), NOTHING, LOST, reads=REFUSED),
    "in a JSON, close": Row((HEAD, data(HALF), goaway(), Do.CLOSE), CUT, LOST),
    "in a JSON, below ours": Row((HEAD, data(HALF), goaway(2, below=True)), CUT, LOST),
    "the last stream grows": Row((goaway(below=True), goaway(), *FINE), NOTHING, LOST, reads=REFUSED),
    "on our stream": Row((frame(7, 0, number(1) + number(0)),), NOTHING, LOST),
    "seven bytes": Row((frame(7, 0, b"1234567", stream=0),), NOTHING, LOST),
    "and silence": Row((goaway(), Do.TURN), NOTHING, LATE, stalls=True),
}

INTERIM = head(status="103")
HEADS = {
    "100": Row((head(status="100"), *FINE), OK),
    "102": Row((head(status="102"), *FINE), OK),
    "103": Row((head(("link", "</a>"), status="103"), *FINE), OK),
    "16 interim responses": Row((*[INTERIM] * 16, *FINE), OK),
    "a flood": Row((many(3000, INTERIM),), NOTHING, MALFORMED),
    "101": Row((head(status="101"), *FINE), NOTHING, LOST),
    "103 that ends": Row((head(status="103", end=True),), NOTHING, LOST),
    "103 behind the head": Row((HEAD, INTERIM, ALL), CUT, LOST),
    "no status": Row((head(JSON, status=None), ALL), NOTHING, MALFORMED),
    "two statuses": Row((head((":status", "201"), JSON), ALL), NOTHING, LOST),
    "a late status": Row((head(JSON, (":status", "200"), status=None), ALL), NOTHING, MALFORMED),
    "1000": Row((head(JSON, status="1000"), ALL), NOTHING, LOST),
    "99": Row((head(JSON, status="99"), ALL), NOTHING, LOST),
    "099": Row((head(JSON, status="099"), ALL), NOTHING, LOST),
    "abc": Row((head(JSON, status="abc"), ALL), NOTHING, LOST),
    "999": Row((head(JSON, status="999"), ALL), Want(999, b"{}")),
    "a pseudo-header of requests": Row((head((":path", "/"), JSON), ALL), NOTHING, LOST),
    "an unknown pseudo-header": Row((head((":x", "y"), JSON), ALL), NOTHING, LOST),
    "upper case": Row((head(("X-A", "b"), JSON), ALL), NOTHING, LOST),
    "a NUL": Row((head(("x-a", "b\0c"), JSON), ALL), OK),
    "a line break": Row((head(("x-a", "b\r\nx-b: c"), JSON), ALL), OK),
    "connection": Row((head(("connection", "close"), JSON), ALL), NOTHING, LOST),
    "transfer-encoding": Row((head(("transfer-encoding", "chunked"), JSON), ALL), NOTHING, LOST),
    "upgrade": Row((head(("upgrade", "h2c"), JSON), ALL), NOTHING, LOST),
    "no name": Row((head(("", "b"), JSON), ALL), OK),
    "two content-types": Row((head(JSON, ("content-type", "text/html")), ALL), OK),
    "no content-type": Row((head(), ALL), OK),
    "a second head": Row((HEAD, HEAD, ALL), CUT, LOST),
    "data before the head": Row((PART, HEAD, ALL), NOTHING, LOST),
    "no data, the head ends": Row((head(JSON, end=True),), Want(200)),
    "no data, an empty frame ends": Row((HEAD, data(b"", end=True)), Want(200)),
    "a head of 60 kB": Row((head(("x-a", "b" * 16_000), JSON), ALL), OK),
    "10,000 headers of 300 kB": Row(
        (
            frame(1, 0, block((":status", "200"), *[("x-a", "b" * 20)] * 500)),
            *[frame(CONTINUATION, 0, block(*[("x-a", "b" * 20)] * 500))] * 19,
            frame(CONTINUATION, END_HEADERS),
            ALL,
        ),
        NOTHING,
        LOST,
        reads=3,
    ),
    **{str(s): Row((head(JSON, status=str(s)), ALL), Want(s, b"{}")) for s in (408, 417, 421, 425, 429, 431, 503)},
}

LENGTHS = {
    "right": Row((head(JSON, LENGTH), ALL), OK),
    "too short": Row((head(JSON, ("content-length", "9")), ALL), CUT, LOST),
    "too long": Row((head(JSON, ("content-length", "1")), ALL), CUT, LOST),
    "zero": Row((head(JSON, ("content-length", "0")), ALL), CUT, LOST, read=Want(200)),
    "no data": Row((head(JSON, LENGTH, end=True),), CUT, LOST),
    "negative": Row((head(JSON, ("content-length", "-2")), ALL), NOTHING, LOST),
    "plus": Row((head(JSON, ("content-length", "+2")), ALL), NOTHING, LOST),
    "hex": Row((head(JSON, ("content-length", "0x2")), ALL), NOTHING, LOST),
    "a word": Row((head(JSON, ("content-length", "two")), ALL), NOTHING, LOST),
    "empty": Row((head(JSON, ("content-length", "")), ALL), NOTHING, LOST),
    "two different": Row((head(JSON, LENGTH, ("content-length", "3")), ALL), NOTHING, LOST),
    "two equal": Row((head(JSON, LENGTH, LENGTH), ALL), NOTHING, LOST),
    "overflow": Row((head(JSON, ("content-length", str(2**64 + 2))), ALL), NOTHING, LOST),
    "two equal in a list": Row((head(JSON, ("content-length", "2, 2")), ALL), NOTHING, LOST),
    "space around": Row((head(JSON, ("content-length", " 2 ")), ALL), NOTHING, LOST),
    "leading zeros": Row((head(JSON, ("content-length", "0002")), ALL), OK),
    "19 digits": Row((head(IMAGE, ("content-length", str(2**63 - 1))), ALL), NOTHING, MALFORMED),
    "18 digits": Row((head(IMAGE, ("content-length", "9" * 18)), PART, reset_stream(0)), CUT, LOST),
    "204, no data": Row((head(status="204", end=True),), Want(204)),
    "204, data": Row((head(JSON, status="204"), ALL), CUT, LOST),
    "304, no data": Row((head(JSON, LENGTH, status="304", end=True),), Want(304)),
    "304 in gzip": Row((head(JSON, ("content-encoding", "gzip"), status="304", end=True),), Want(304)),
    "zero, in gzip": Row((head(JSON, ("content-length", "0"), ("content-encoding", "gzip"), end=True),), Want(200)),
    "304, data": Row((head(JSON, status="304"), ALL), CUT, LOST),
}

TRAILERS = {
    "fine": Row((HEAD, PART, head(("x-a", "b"), status=None, end=True)), OK),
    "none": Row((HEAD, PART, head(status=None, end=True)), OK),
    "do not end": Row((HEAD, PART, head(("x-a", "b"), status=None)), CUT, LOST),
    "a status": Row((HEAD, PART, head(("x-a", "b"), end=True)), CUT, LOST),
    "a length": Row((HEAD, PART, head(("content-length", "9"), status=None, end=True)), CUT, LOST),
    "cut": Row((HEAD, data(HALF), head(("x-a", "b"), status=None), reset_stream(0)), CUT, LOST),
    "no data": Row((HEAD, head(("x-a", "b"), status=None, end=True)), Want(200)),
    "upper case": Row((HEAD, PART, head(("X-A", "b"), status=None, end=True)), CUT, LOST),
}

FRAMES = {
    "one byte at a time": Row(
        (HEAD, *[data(bytes([byte])) for byte in b'{"a": 1}'], data(b"", end=True)), Want(200, b'{"a": 1}')
    ),
    "empty data frames": Row((HEAD, *[data(b"")] * 100, ALL), OK),
    "a flood of empty data frames": Row((HEAD, many(20_000, data(b"")), ALL), CUT, LOST),
    "padding": Row((HEAD, frame(0, PADDED | END_STREAM, b"\5{}" + bytes(5))), OK),
    "too much padding": Row((HEAD, frame(0, PADDED | END_STREAM, b"\xff{}")), CUT, LOST),
    "only padding": Row((HEAD, *[frame(0, PADDED, b"\xff" + bytes(255))] * 20, ALL), OK),
    "an oversized frame": Row((HEAD, data(bytes(2**24 - 1), end=True)), CUT, LOST),
    "an oversized frame's head": Row((HEAD, lambda own: b"\xff\xff\xff\0\0" + number(own)), CUT, LOST),
    "3 MB at once": Row((HEAD, *[data(b"7" * 16_384)] * 200, data(b"", end=True)), Want(200, b"7" * 16_384 * 200)),
    "an unknown frame": Row((frame(UNKNOWN, 0xFF, b"abc"), HEAD, frame(UNKNOWN, 0, b"abc", stream=0), ALL), OK),
    "a flood of unknown frames": Row((many(5000, frame(UNKNOWN, 0xFF, b"abc")), *FINE), OK),
    "ALTSVC": Row((frame(ALTSVC, 0, b'\0\0h3=":443"'), *FINE), OK),
    "ORIGIN": Row((frame(ORIGIN, 0, b"\0\x0fhttps://evil.ai", stream=0), *FINE), OK),
    "PRIORITY": Row((frame(PRIORITY, 0, number(0) + b"\1"), *FINE), OK),
    "PRIORITY of itself": Row((lambda own: frame(PRIORITY, 0, number(own) + b"\1")(own), *FINE), OK),
    "PRIORITY of four bytes": Row((frame(PRIORITY, 0, b"1234"), *FINE), NOTHING, LOST),
    "PRIORITY_UPDATE": Row((frame(PRIORITY_UPDATE, 0, number(1) + b"u=1", stream=0), *FINE), OK),
    "a pushed stream": Row(
        (frame(PUSH_PROMISE, END_HEADERS, number(2) + block((":method", "GET"))), *FINE), NOTHING, LOST
    ),
    "a head on a stream of the server's": Row(
        (frame(1, END_HEADERS, block((":status", "200")), stream=2), *FINE), NOTHING, LOST
    ),
    "a head on an idle stream": Row(
        (frame(1, END_HEADERS, block((":status", "200")), stream=99), *FINE), NOTHING, LOST
    ),
    "data on an idle stream": Row((frame(0, 0, b"{}", stream=99), *FINE), NOTHING, LOST),
    "data on stream 0": Row((HEAD, frame(0, 0, b"{}", stream=0), ALL), CUT, LOST),
    "data behind the end": Row((*FINE, data(b"{}")), OK),
    "a head behind the end": Row((*FINE, HEAD), OK),
    "a second response": Row((*FINE, *FINE), OK),
    "PING": Row((frame(PING, 0, b"12345678", stream=0), *FINE), OK),
    "PING of seven bytes": Row((frame(PING, 0, b"1234567", stream=0), *FINE), NOTHING, LOST),
    "PING on our stream": Row((frame(PING, 0, b"12345678"), *FINE), NOTHING, LOST),
    "an ACK of no PING": Row((frame(PING, 1, b"12345678", stream=0), *FINE), OK),
    "a flood of PINGs": Row((many(20_000, frame(PING, 0, b"12345678", stream=0)), *FINE), OK),
    "WINDOW_UPDATE": Row((frame(WINDOW_UPDATE, 0, number(9)), frame(WINDOW_UPDATE, 0, number(9), stream=0), *FINE), OK),
    "WINDOW_UPDATE of 0": Row((frame(WINDOW_UPDATE, 0, number(0)), *FINE), NOTHING, LOST),
    "WINDOW_UPDATE of 0 for all": Row((frame(WINDOW_UPDATE, 0, number(0), stream=0), *FINE), NOTHING, LOST),
    "WINDOW_UPDATE overflow": Row((frame(WINDOW_UPDATE, 0, number(2**31 - 1)), *FINE), NOTHING, LOST),
    "WINDOW_UPDATE overflow for all": Row((frame(WINDOW_UPDATE, 0, number(2**31 - 1), stream=0), *FINE), NOTHING, LOST),
    "WINDOW_UPDATE of three bytes": Row((frame(WINDOW_UPDATE, 0, b"123"), *FINE), NOTHING, LOST),
    "HTTP/1.1": Row((b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n",), NOTHING, LOST),
    "zeros": Row((bytes(100_000), Do.TURN), NOTHING, LOST),
    "before the request's body": Row((Do.EARLY, *FINE, reset_stream(0)), OK, body=BIG),
    "413 before the request's body": Row(
        (Do.EARLY, head(JSON, status="413"), ALL, reset_stream(0)), Want(413, b"{}"), body=BIG
    ),
    "a response before the request's body, no reset": Row((Do.EARLY, *FINE), OK, body=BIG),
    "reset before the request's body": Row((Do.EARLY, reset_stream(7)), NOTHING, LOST, body=BIG, reads=REFUSED),
}

CONTINUATIONS = {
    "fine": Row((frame(1, 0, block((":status", "200"))), frame(CONTINUATION, END_HEADERS, block(JSON)), ALL), OK),
    "empty": Row((frame(1, 0, block((":status", "200"))), frame(CONTINUATION, END_HEADERS), ALL), OK),
    "one byte at a time": Row(
        (
            frame(1, 0),
            *[frame(CONTINUATION, 0, bytes([byte])) for byte in block((":status", "200"))[:7]],
            frame(CONTINUATION, END_HEADERS, block((":status", "200"))[7:]),
            ALL,
        ),
        OK,
    ),
    "a flood": Row((frame(1, 0), many(20_000, frame(CONTINUATION, 0))), NOTHING, LOST),
    "missing": Row((frame(1, 0, block((":status", "200"))), ALL), NOTHING, LOST),
    "silence": Row((frame(1, 0, block((":status", "200"))), Do.RESPONDED, Do.RESET), NOTHING, LATE, stalls=True),
    "none was announced": Row((HEAD, frame(CONTINUATION, END_HEADERS, block(JSON)), ALL), CUT, LOST),
    "another frame between": Row(
        (frame(1, 0, block((":status", "200"))), frame(PING, 0, b"12345678", stream=0)), NOTHING, LOST
    ),
    "on another stream": Row(
        (frame(1, 0, block((":status", "200"))), frame(CONTINUATION, END_HEADERS, stream=99)), NOTHING, LOST
    ),
    "not HPACK": Row((frame(1, END_HEADERS, b"\xff" * 20), ALL), NOTHING, LOST),
    "HPACK, cut": Row((frame(1, END_HEADERS, block((":status", "200"))[:-1]), ALL), NOTHING, LOST),
    "HPACK, an index that is not there": Row((frame(1, END_HEADERS, b"\xfe"), ALL), NOTHING, LOST),
    "HPACK, a huge table": Row((frame(1, END_HEADERS, b"\x3f\xff\xff\xff\x0f\x88"), ALL), NOTHING, LOST),
}


def greeting(*settings: bytes, stream: int = 0) -> bytes:
    return frame(SETTINGS, 0, b"".join(settings), stream=stream)(0)


SETTINGS_ROWS = {
    "no streams": Row(
        (frame(SETTINGS, 0, setting(3, 0), stream=0), *FINE, frame(SETTINGS, 0, setting(3, 9), stream=0)), OK
    ),
    "a table of 0": Row((frame(SETTINGS, 0, setting(1, 0), stream=0), *FINE), OK),
    "a window of 0": Row(
        (frame(SETTINGS, 0, setting(4, 0), stream=0), *FINE, frame(SETTINGS, 0, setting(4, 65535), stream=0)), OK
    ),
    "a window that is too large": Row((frame(SETTINGS, 0, setting(4, 2**31), stream=0), *FINE), NOTHING, LOST),
    "frames of 0": Row((frame(SETTINGS, 0, setting(5, 0), stream=0), *FINE), NOTHING, LOST),
    "frames that are too large": Row((frame(SETTINGS, 0, setting(5, 2**24), stream=0), *FINE), NOTHING, LOST),
    "push": Row((frame(SETTINGS, 0, setting(2, 1), stream=0), *FINE), NOTHING, LOST),
    "unknown": Row((frame(SETTINGS, 0, setting(0xABCD, 7), stream=0), *FINE), OK),
    "on our stream": Row((frame(SETTINGS, 0, setting(3, 9)), *FINE), NOTHING, LOST),
    "five bytes": Row((frame(SETTINGS, 0, b"12345", stream=0), *FINE), NOTHING, LOST),
    "an ACK with settings": Row((frame(SETTINGS, 1, setting(3, 9), stream=0), *FINE), NOTHING, LOST),
    "an ACK of nothing": Row((frame(SETTINGS, 1, stream=0), *FINE), NOTHING, LOST),
    "a flood": Row((many(20_000, frame(SETTINGS, 0, stream=0)), Do.TURN), NOTHING, LOST),
}
# Only on a new connection.
GREETINGS = {
    "HTTP/1.1": Row(FINE, NOTHING, LOST, greeting=b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "a wrong stream": Row(FINE, NOTHING, LOST, greeting=greeting(stream=1)),
    "no settings": Row(FINE, NOTHING, LOST, greeting=b""),
}

EVENTS = ("content-type", "text/event-stream")
EVENT = b'data: {"n": 1}\n\n'
STREAMS = {
    "whole": Row((head(EVENTS), data(EVENT), data(EVENT, end=True)), Want(200, EVENT * 2)),
    "NO_ERROR behind an event": Row((head(EVENTS), data(EVENT), reset_stream(0)), Want(200, EVENT)),
    "NO_ERROR behind mixed line ends": Row(
        (head(EVENTS), data(EVENT[:-1] + b"\r\n"), reset_stream(0)), Want(200, EVENT[:-1] + b"\r\n")
    ),
    "NO_ERROR in an event": Row((head(EVENTS), data(EVENT + EVENT[:9]), reset_stream(0)), CUT, LOST),
    "NO_ERROR behind a line": Row((head(EVENTS), data(EVENT + EVENT[:-1]), reset_stream(0)), CUT, LOST),
    "NO_ERROR between members of gzip": Row(
        (head(EVENTS, ("content-encoding", "gzip")), data(gzip.compress(EVENT[:9])), reset_stream(0)), CUT, LOST
    ),
    "NO_ERROR in a character": Row((head(EVENTS), data(b"data: \xc3"), reset_stream(0)), CUT, LOST),
    "NO_ERROR behind a comment": Row(
        (head(EVENTS), data(EVENT + b": ping\n"), reset_stream(0)), Want(200, EVENT + b": ping\n")
    ),
    "CANCEL behind an event": Row((head(EVENTS), data(EVENT), reset_stream(8)), CUT, LOST),
    "INTERNAL_ERROR behind an event": Row((head(EVENTS), data(EVENT), reset_stream(2)), CUT, LOST),
    "close": Row((head(EVENTS), data(EVENT), Do.CLOSE), CUT, LOST),
    "reset": Row((head(EVENTS), data(EVENT), Do.RESET), CUT, LOST),
    "GOAWAY, close": Row((head(EVENTS), data(EVENT), goaway(), Do.CLOSE), CUT, LOST),
    "GOAWAY, then the rest": Row((head(EVENTS), data(EVENT), goaway(), data(EVENT, end=True)), Want(200, EVENT * 2)),
    "silence": Row((head(EVENTS), data(EVENT)), CUT, LATE, stalls=True),
    "trailers": Row((head(EVENTS), data(EVENT), head(("x-a", "b"), status=None, end=True)), Want(200, EVENT)),
}

TABLES = {
    "RST_STREAM": RESETS,
    "end": ENDS,
    "GOAWAY": GOAWAYS,
    "head": HEADS,
    "length": LENGTHS,
    "trailers": TRAILERS,
    "frame": FRAMES,
    "CONTINUATION": CONTINUATIONS,
    "SETTINGS": SETTINGS_ROWS,
    "greeting": GREETINGS,
}
ROWS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}

NO_RESPONSE = {
    name: row
    for name, row in ROWS.items()
    if row.want == NOTHING and name.partition(":")[0] in ("RST_STREAM", "end", "GOAWAY")
}


@pytest.mark.parametrize(("kind", "way"), WAYS)
@pytest.mark.parametrize("name", names_of(ROWS))
@pytest.mark.gen_test
async def test_call(setup: Setup, authority: Authority, logs: Logs, name: str, kind: str, way: str) -> None:
    """A paid call is sent once and answered whole. A read is whole, or broken in a way that clients repeat."""
    await play(setup, authority, logs, "h2", ROWS[name], KINDS[kind], way)


@pytest.mark.parametrize(("kind", "way"), PAID_GET_WAYS)
@pytest.mark.parametrize("name", names_of(NO_RESPONSE))
@pytest.mark.gen_test
async def test_paid_get(setup: Setup, authority: Authority, logs: Logs, name: str, kind: str, way: str) -> None:
    """A GET that runs a model is sent once and answered whole, as a POST is."""
    await play(setup, authority, logs, "h2", NO_RESPONSE[name], KINDS[kind], way)


@pytest.mark.parametrize(("kind", "way"), STREAM_WAYS)
@pytest.mark.parametrize("name", names_of(STREAMS))
@pytest.mark.gen_test
async def test_stream(setup: Setup, authority: Authority, logs: Logs, name: str, kind: str, way: str) -> None:
    """An event stream that was cut off is aborted."""
    await play(setup, authority, logs, "h2", STREAMS[name], KINDS[kind], way)
