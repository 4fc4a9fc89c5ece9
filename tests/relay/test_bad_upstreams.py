"""Upstreams that speak HTTP/1.1 badly: what the client gets, how often the call was made, and how the log names it."""

import gzip
import zlib

import brotli
import pytest

from tests.support.bad_upstream import Do, chunked, drip, response
from tests.support.bad_upstream.rows import (
    CUT,
    KINDS,
    NOTHING,
    OK,
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

JSON, IMAGE = "content-type: application/json", "content-type: image/png"
LENGTH = "content-length: 2"
CHUNKED = "transfer-encoding: chunked"
CLOSES = "connection: close"
HALF = b'{"images": [{"url": "htt'
PIXELS = b"\x89PNG"
FINE = response(JSON, LENGTH, body=b"{}")
SURPLUS = response(JSON, "content-length: 16", body=b'{"another": "x"}')
LOST, MALFORMED, LATE = "ConnectionLost", "MalformedResponse", "UpstreamTimeout"
BIG = b'{"prompt": "%b"}' % (b"x" * 300_000)


def encoded(coding: str, body: bytes, *more: str) -> bytes:
    return response(JSON, f"content-encoding: {coding}", f"content-length: {len(body)}", *more, body=body)


def by_the_end(coding: str, body: bytes, content_type: str = JSON) -> bytes:
    return response(content_type, f"content-encoding: {coding}", CLOSES, body=body)


def raw_deflate(content: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(content) + compressor.flush()


TEXT = b'{"text": "%b"}' % bytes(range(97, 123))
GZIP, DEFLATE, BROTLI = gzip.compress(TEXT), zlib.compress(TEXT), brotli.compress(TEXT)
DECODED = Want(200, TEXT)

NO_RESPONSE = {
    "reset": Row((Do.RESET,), NOTHING, LOST),
    "FIN": Row((Do.FIN,), NOTHING, LOST),
    "close": Row((Do.CLOSE,), NOTHING, LOST),
    "close_notify without FIN": Row((Do.CLOSE_NOTIFY,), NOTHING, LOST),
    "silence": Row((Do.TURN,), NOTHING, LATE, stalls=True),
    "reset in the status line": Row((b"HTTP/1.", Do.RESET), NOTHING, LOST),
    "reset in the head": Row((b"HTTP/1.1 200 OK\r\ncontent-le", Do.RESET), NOTHING, LOST),
    "silence in the head": Row((b"HTTP/1.1 200 OK\r\ncontent-le", Do.TURN), NOTHING, LATE, stalls=True),
    "reset when the head is here": Row((Do.EARLY, Do.RESET), NOTHING, LOST, body=BIG),
}

STATUS_LINES = {
    "HTTP/0.9": Row((b"{}", Do.CLOSE), NOTHING, MALFORMED),
    "HTTP/0.9 of HTML": Row((b"<html>" * 10_000, Do.CLOSE), NOTHING, MALFORMED),
    "HTTP/1.2": Row((response(JSON, LENGTH, status="HTTP/1.2 200 OK", body=b"{}"),), NOTHING, MALFORMED),
    "HTTP/2.0": Row((response(JSON, LENGTH, status="HTTP/2.0 200 OK", body=b"{}"),), NOTHING, MALFORMED),
    "HTTP/3.0": Row((response(JSON, LENGTH, status="HTTP/3.0 200 OK", body=b"{}"),), NOTHING, MALFORMED),
    "HTTP/3": Row((response(JSON, LENGTH, status="HTTP/3 200", body=b"{}"),), NOTHING, MALFORMED),
    "http/1.1": Row((response(JSON, LENGTH, status="http/1.1 200 OK", body=b"{}"),), NOTHING, MALFORMED),
    "ICY": Row((response(JSON, LENGTH, status="ICY 200 OK", body=b"{}"),), NOTHING, MALFORMED),
    "RTSP": Row((response(JSON, LENGTH, status="RTSP/1.0 200 OK", body=b"{}"),), NOTHING, MALFORMED),
    "099": Row((response(JSON, LENGTH, status="HTTP/1.1 099 No", body=b"{}"),), NOTHING, MALFORMED),
    "000": Row((response(JSON, LENGTH, status="HTTP/1.1 000 No", body=b"{}"),), NOTHING, MALFORMED),
    "1000": Row((response(JSON, LENGTH, status="HTTP/1.1 1000 No", body=b"{}"),), NOTHING, MALFORMED),
    "20": Row((response(JSON, LENGTH, status="HTTP/1.1 20 No", body=b"{}"),), NOTHING, MALFORMED),
    "-20": Row((response(JSON, LENGTH, status="HTTP/1.1 -20 No", body=b"{}"),), NOTHING, MALFORMED),
    "2x0": Row((response(JSON, LENGTH, status="HTTP/1.1 2x0 No", body=b"{}"),), NOTHING, MALFORMED),
    "no status": Row((response(JSON, LENGTH, status="HTTP/1.1", body=b"{}"),), NOTHING, MALFORMED),
    "no space": Row((response(JSON, LENGTH, status="HTTP/1.1200 OK", body=b"{}"),), NOTHING, MALFORMED),
    "NUL in the reason": Row((response(JSON, LENGTH, status="HTTP/1.1 200 O\0K", body=b"{}"),), NOTHING, MALFORMED),
    "a line break first": Row((b"\r\n" + FINE,), NOTHING, MALFORMED),
    "a header first": Row((b"x-a: b\r\n" + FINE,), NOTHING, MALFORMED),
    "no reason": Row((response(JSON, LENGTH, status="HTTP/1.1 200", body=b"{}"),), OK),
    "empty reason": Row((response(JSON, LENGTH, status="HTTP/1.1 200 ", body=b"{}"),), OK),
    "latin-1 in the reason": Row((response(JSON, LENGTH, status="HTTP/1.1 200 \xe9", body=b"{}"),), OK),
    "999": Row((response(JSON, LENGTH, status="HTTP/1.1 999 No", body=b"{}"),), Want(999, b"{}")),
    "HTTP/1.0": Row((response(JSON, LENGTH, status="HTTP/1.0 200 OK", body=b"{}"), Do.CLOSE), OK),
    "HTTP/1.0 kept": Row((response(JSON, LENGTH, "connection: keep-alive", status="HTTP/1.0 200 OK", body=b"{}"),), OK),
    "HTTP/1.0 cut": Row((response(JSON, status="HTTP/1.0 200 OK", body=HALF), Do.CLOSE), CUT, LOST),
}

INTERIM = response(status="HTTP/1.1 103 Early Hints")
INTERIMS = {
    "100": Row((response(status="HTTP/1.1 100 Continue"), FINE), OK),
    "102": Row((response(status="HTTP/1.1 102 Processing"), FINE), OK),
    "103": Row((response("link: </a>", status="HTTP/1.1 103 Early Hints"), FINE), OK),
    "199": Row((response(status="HTTP/1.1 199 Some"), FINE), OK),
    "103 with a length": Row((response("content-length: 5", status="HTTP/1.1 103 Early Hints"), FINE), OK),
    "103 in chunks": Row((response(CHUNKED, status="HTTP/1.1 103 Early Hints"), FINE), OK),
    "103 that closes": Row((response(CLOSES, status="HTTP/1.1 103 Early Hints"), FINE), OK),
    "103 as the first half": Row((INTERIM, Do.RESET), NOTHING, LOST),
    "103 and silence": Row((INTERIM, Do.TURN), NOTHING, LATE, stalls=True),
    "16 interim responses": Row((INTERIM * 16, FINE), OK),
    "a flood": Row((INTERIM * 10_000, Do.TURN), NOTHING, MALFORMED),
    "a slow flood": Row((INTERIM,) * 40, NOTHING, MALFORMED),
    "101": Row((response("upgrade: x", "connection: upgrade", status="HTTP/1.1 101 S"),), NOTHING, MALFORMED),
    "101 and a response": Row((response(status="HTTP/1.1 101 S"), FINE), NOTHING, MALFORMED),
    "101 to h2": Row((response("upgrade: h2c", "connection: upgrade", status="HTTP/1.1 101 S"),), NOTHING, MALFORMED),
    "101 and 1 MB": Row((response(status="HTTP/1.1 101 S"), bytes(1_000_000), Do.TURN), NOTHING, MALFORMED),
    "103 and 101": Row((INTERIM, response(status="HTTP/1.1 101 S"), bytes(100_000)), NOTHING, MALFORMED),
}

# The client decides whether to repeat these calls; libcurl and the proxy do not.
STATUSES = {
    str(status): Row((response(JSON, LENGTH, *more, status=f"HTTP/1.1 {status} S", body=b"{}"),), Want(status, b"{}"))
    for status, more in {
        201: [],
        206: ["content-range: bytes 0-1/10"],
        300: [],
        301: ["location: https://fal.run/x"],
        307: ["location: https://fal.run/x"],
        308: ["location: http://169.254.169.254/"],
        400: [],
        401: ["www-authenticate: Basic realm=x"],
        402: [],
        403: [],
        407: ["proxy-authenticate: Basic realm=x"],
        408: [CLOSES],
        413: [],
        416: [],
        417: [],
        421: [],
        422: [],
        425: [],
        426: ["upgrade: h2"],
        429: ["retry-after: 0"],
        431: [],
        500: [],
        502: [],
        503: ["retry-after: 0"],
        504: [],
        511: [],
    }.items()
}

LENGTHS = {
    "too short, close": Row((response(JSON, "content-length: 100", body=HALF), Do.CLOSE), CUT, LOST),
    "too short, FIN": Row((response(JSON, "content-length: 100", body=HALF), Do.FIN), CUT, LOST),
    "too short, close_notify": Row((response(JSON, "content-length: 100", body=HALF), Do.CLOSE_NOTIFY), CUT, LOST),
    "too short, reset": Row((response(JSON, "content-length: 100", body=HALF), Do.RESET), CUT, LOST),
    "too short, silence": Row((response(JSON, "content-length: 100", body=HALF),), CUT, LATE, stalls=True),
    "no body, close": Row((response(JSON, LENGTH), Do.CLOSE), CUT, LOST),
    "too long": Row((response(JSON, LENGTH, body=b"{}xyz"),), OK),
    "far too long": Row((response(JSON, LENGTH, body=b"{}" + bytes(1_000_000)),), OK),
    "zero, with a body": Row((response(JSON, "content-length: 0", body=b"{}"),), Want(200)),
    "negative": Row((response(JSON, "content-length: -2", body=b"{}"),), NOTHING, MALFORMED),
    "with a plus": Row((response(JSON, "content-length: +2", body=b"{}"),), NOTHING, MALFORMED),
    "hex": Row((response(JSON, "content-length: 0x2", body=b"{}"),), NOTHING, MALFORMED),
    "word": Row((response(JSON, "content-length: two", body=b"{}"),), NOTHING, MALFORMED),
    "empty": Row((response(JSON, "content-length: ", body=b"{}"),), NOTHING, MALFORMED),
    "fraction": Row((response(JSON, "content-length: 2.0", body=b"{}"),), NOTHING, MALFORMED),
    "two different": Row((response(JSON, LENGTH, "content-length: 3", body=b"{}x"),), NOTHING, MALFORMED),
    "two different in a list": Row((response(JSON, "content-length: 2, 3", body=b"{}x"),), NOTHING, MALFORMED),
    "two equal": Row((response(JSON, LENGTH, LENGTH, body=b"{}"),), OK),
    "leading zeros": Row((response(JSON, "content-length: 0002", body=b"{}"),), OK),
    "two equal in a list": Row((response(JSON, "content-length: 2, 2", body=b"{}"),), OK),
    "two equal in a list, cut": Row((response(IMAGE, "content-length: 9, 9", body=PIXELS), Do.CLOSE), CUT, LOST),
    "two in one": Row((response(JSON, "content-length: 2 2", body=b"{}"),), NOTHING, MALFORMED),
    "space around": Row((response(JSON, "content-length: \t 2\t ", body=b"{}"),), OK),
    "space around, cut": Row((response(IMAGE, "content-length: \t 9\t ", body=PIXELS), Do.CLOSE), CUT, LOST),
    "overflow": Row((response(IMAGE, f"content-length: {2**64 + 2}", body=PIXELS), Do.CLOSE), NOTHING, MALFORMED),
    "19 digits": Row((response(IMAGE, f"content-length: {2**63 - 1}", body=PIXELS), Do.CLOSE), NOTHING, MALFORMED),
    "18 digits": Row((response(IMAGE, f"content-length: {'9' * 18}", body=PIXELS), Do.CLOSE), CUT, LOST),
    "overflow, then another": Row(
        (response(IMAGE, f"content-length: {2**64 + 2}", LENGTH, body=PIXELS), Do.CLOSE), NOTHING, MALFORMED
    ),
    "overflow behind another": Row(
        (response(IMAGE, LENGTH, f"content-length: {2**64 + 2}", body=PIXELS), Do.CLOSE), NOTHING, MALFORMED
    ),
    "void by a transfer-encoding, cut": Row(
        (response(IMAGE, "content-length: 9", "transfer-encoding: identity", body=PIXELS), Do.CLOSE), CUT, LOST
    ),
    "void by an empty transfer-encoding, cut": Row(
        (response(IMAGE, "content-length: 9", "transfer-encoding:", body=PIXELS), Do.CLOSE), CUT, LOST
    ),
    "zstd, overflow": Row(
        (response(IMAGE, f"content-length: {2**64 + 2}", "content-encoding: zstd", body=PIXELS), Do.CLOSE),
        NOTHING,
        MALFORMED,
    ),
    "by the end, whole": Row((response(JSON, CLOSES, body=b"{}"), Do.CLOSE), OK),
    "by the end, FIN": Row((response(JSON, CLOSES, body=b"{}"), Do.FIN), CUT, LOST),
    "by the end, cut": Row((response(JSON, CLOSES, body=HALF), Do.CLOSE), CUT, LOST),
    "by the end, reset": Row((response(JSON, CLOSES, body=b"{}"), Do.RESET), CUT, LOST),
    "by the end, empty": Row((response(JSON, CLOSES), Do.CLOSE), Want(200)),
    "by the end, text": Row((response("content-type: text/plain", CLOSES, body=b"abc"), Do.CLOSE), Want(200, b"abc")),
}

CHUNKS = {
    "whole": Row((response(JSON, CHUNKED, body=chunked(b"{", b"}")),), OK),
    "no end": Row((response(JSON, CHUNKED, body=chunked(b"{}", end=b"")), Do.CLOSE), CUT, LOST),
    "no end, silence": Row((response(JSON, CHUNKED, body=chunked(b"{}", end=b"")),), CUT, LATE, stalls=True),
    "half an end": Row((response(JSON, CHUNKED, body=chunked(b"{}", end=b"0\r\n")), Do.CLOSE), CUT, LOST),
    "cut in a chunk": Row((response(JSON, CHUNKED, body=b"ff\r\n" + HALF), Do.CLOSE), CUT, LOST),
    "cut in a size": Row((response(JSON, CHUNKED, body=chunked(b"{}", end=b"f")), Do.CLOSE), CUT, LOST),
    "bad size": Row((response(JSON, CHUNKED, body=b"zz\r\n{}\r\n0\r\n\r\n"),), CUT, LOST),
    "negative size": Row((response(JSON, CHUNKED, body=b"-2\r\n{}\r\n0\r\n\r\n"),), CUT, LOST),
    "empty size": Row((response(JSON, CHUNKED, body=b"\r\n{}\r\n0\r\n\r\n"),), CUT, LOST),
    "0x size": Row((response(JSON, CHUNKED, body=b"0x2\r\n{}\r\n0\r\n\r\n"),), CUT, MALFORMED),
    "huge size": Row((response(JSON, CHUNKED, body=b"f" * 17 + b"\r\n{}\r\n0\r\n\r\n"),), CUT, LOST),
    "size too small": Row((response(JSON, CHUNKED, body=b"1\r\n{}\r\n0\r\n\r\n"),), CUT, LOST),
    "no line break behind a chunk": Row((response(JSON, CHUNKED, body=b"2\r\n{}0\r\n\r\n"),), CUT, LOST),
    "extensions": Row((response(JSON, CHUNKED, body=b'2;a=b;c="d"\r\n{}\r\n0;e\r\n\r\n'),), OK),
    "zeros before the size": Row((response(JSON, CHUNKED, body=b"00002\r\n{}\r\n0\r\n\r\n"),), OK),
    "trailers": Row((response(JSON, CHUNKED, body=chunked(b"{}", end=b"0\r\nx-a: b\r\n\r\n")),), OK),
    "trailers with a length": Row(
        (response(JSON, CHUNKED, body=chunked(b"{}", end=b"0\r\ncontent-length: 9\r\n\r\n")),), OK
    ),
    "cut in the trailers": Row(
        (response(JSON, CHUNKED, body=chunked(b"{}", end=b"0\r\nx-a: b\r\n")), Do.CLOSE), CUT, LOST
    ),
    "endless trailers": Row(
        (response(JSON, CHUNKED, body=chunked(b"{}", end=b"0\r\n" + b"x-a: b\r\n" * 200_000)), Do.TURN), CUT, MALFORMED
    ),
    "and a length": Row((response(JSON, CHUNKED, "content-length: 1", body=chunked(b"{}")),), OK),
    "a length and": Row((response(JSON, "content-length: 1", CHUNKED, body=chunked(b"{}")),), OK),
    "twice": Row((response(JSON, CHUNKED, CHUNKED, body=chunked(b"{}")),), OK),
    "upper case": Row((response(JSON, "Transfer-Encoding: CHUNKED", body=chunked(b"{}")),), OK),
    "HTTP/1.0": Row((response(JSON, CHUNKED, status="HTTP/1.0 200 OK", body=chunked(b"{}")), Do.CLOSE), OK),
    "unknown coding": Row((response(JSON, "transfer-encoding: x", body=b"{}"), Do.CLOSE), NOTHING, LOST),
    "gzip, chunked": Row((response(JSON, "transfer-encoding: gzip, chunked", body=chunked(GZIP)),), NOTHING, LOST),
    "surplus": Row((response(JSON, CHUNKED, body=chunked(b"{}") + b"5\r\nhello\r\n"),), OK),
    "10,000 of one byte": Row((response(JSON, CHUNKED, body=chunked(*[b"7"] * 10_000)),), Want(200, b"7" * 10_000)),
}

CODINGS = {
    "gzip": Row((encoded("gzip", GZIP),), DECODED),
    "x-gzip": Row((encoded("x-gzip", GZIP),), DECODED),
    "GZIP": Row((encoded("GZIP", GZIP),), DECODED),
    "identity": Row((encoded("identity", TEXT),), DECODED),
    "deflate": Row((encoded("deflate", DEFLATE),), DECODED),
    "raw deflate": Row((encoded("deflate", raw_deflate(TEXT)),), DECODED),
    "brotli": Row((encoded("br", BROTLI),), DECODED),
    "cut gzip": Row((encoded("gzip", GZIP[:-10]),), CUT, MALFORMED),
    "cut gzip trailer": Row((encoded("gzip", GZIP[:-1]),), CUT, MALFORMED),
    "cut gzip header": Row((encoded("gzip", GZIP[:5]),), CUT, MALFORMED),
    "cut deflate": Row((encoded("deflate", DEFLATE[:-6]),), CUT, MALFORMED),
    "one byte of deflate": Row((encoded("deflate", DEFLATE[:1]),), CUT, MALFORMED),
    "cut brotli": Row((encoded("br", BROTLI[:-4]),), CUT, MALFORMED),
    "wrong CRC": Row((encoded("gzip", GZIP[:-8] + bytes(4) + GZIP[-4:]),), CUT, MALFORMED),
    "not gzip": Row((encoded("gzip", TEXT),), CUT, MALFORMED),
    "not brotli": Row((encoded("br", TEXT),), CUT, MALFORMED),
    "two members": Row((encoded("gzip", GZIP + GZIP),), Want(200, TEXT + TEXT)),
    "half a second member": Row((encoded("gzip", GZIP + GZIP[:20]),), CUT, MALFORMED),
    "zeros behind": Row((encoded("gzip", GZIP + bytes(20)),), DECODED),
    "empty gzip": Row((encoded("gzip", b""),), Want(200)),
    "empty deflate": Row((encoded("deflate", b""),), Want(200)),
    "empty brotli": Row((encoded("br", b""),), Want(200)),
    "gzip of nothing": Row((encoded("gzip", gzip.compress(b"")),), Want(200)),
    "unknown": Row((encoded("zstd", b"whatever"),), Want(200, b"whatever")),
    "twice": Row((encoded("gzip, gzip", gzip.compress(GZIP)),), Want(200, gzip.compress(GZIP))),
    "by the end, cut": Row(
        (response(JSON, "content-encoding: gzip", CLOSES, body=GZIP[:-10]), Do.CLOSE), CUT, MALFORMED
    ),
    "by the end": Row((response(JSON, "content-encoding: gzip", CLOSES, body=GZIP), Do.CLOSE), DECODED),
    "in chunks": Row((response(JSON, "content-encoding: gzip", CHUNKED, body=chunked(GZIP[:7], GZIP[7:])),), DECODED),
    "by the end, two members": Row(
        (by_the_end("gzip", gzip.compress(TEXT[:9]) + gzip.compress(TEXT[9:])), Do.CLOSE), DECODED
    ),
    "by the end, cut between members": Row((by_the_end("gzip", gzip.compress(TEXT[:9])), Do.CLOSE), CUT, LOST),
    "by the end, half a text in deflate": Row((by_the_end("deflate", zlib.compress(TEXT[:9])), Do.CLOSE), CUT, LOST),
    "by the end, half a text in brotli": Row((by_the_end("br", brotli.compress(TEXT[:9])), Do.CLOSE), CUT, LOST),
    "by the end, nothing in gzip": Row((by_the_end("gzip", b""), Do.CLOSE), CUT, MALFORMED),
    "in chunks, nothing in gzip": Row(
        (response(JSON, "content-encoding: gzip", CHUNKED, body=chunked()),), CUT, MALFORMED
    ),
    "by the end, nothing in deflate": Row((by_the_end("deflate", b""), Do.CLOSE), CUT, MALFORMED),
    "in chunks, nothing in deflate": Row(
        (response(JSON, "content-encoding: deflate", CHUNKED, body=chunked()),), CUT, MALFORMED
    ),
    "by the end, nothing in brotli": Row((by_the_end("br", b""), Do.CLOSE), CUT, MALFORMED),
    "in chunks, nothing in brotli": Row(
        (response(JSON, "content-encoding: br", CHUNKED, body=chunked()),), CUT, MALFORMED
    ),
    "by the end, nothing in zstd": Row((by_the_end("zstd", b""), Do.CLOSE), Want(200)),
    "by the end, half a text in zstd": Row((by_the_end("zstd", b"{"), Do.CLOSE), Want(200, b"{")),
}

NO_BODY = {
    f"{status}, {name}": Row((response(*lines, status=f"HTTP/1.1 {status} S", body=body),), Want(status))
    for status in (204, 304)
    for name, lines, body in (
        ("nothing", [], b""),
        ("a length", [JSON, LENGTH], b""),
        ("a body", [JSON, LENGTH], b"{}"),
        ("chunks", [JSON, CHUNKED], chunked(b"{}")),
        ("a coding", [JSON, "content-encoding: gzip"], b""),
        ("a surplus response", [JSON], SURPLUS),
    )
}

HEADERS = {
    "a NUL": Row((response(JSON, LENGTH, "x-a: b\0c", body=b"{}"),), NOTHING, MALFORMED),
    "no colon": Row((response(JSON, LENGTH, "x-a", body=b"{}"),), NOTHING, MALFORMED),
    "a CR": Row((response(JSON, LENGTH, "x-a: b\rx-b: c", body=b"{}"),), NOTHING, MALFORMED),
    "a space before the colon": Row((response(JSON, LENGTH, "x-a : b", body=b"{}"),), OK),
    "a space before the length's colon": Row(
        (response(JSON, "content-length : 2", body=b"{}"), Do.CLOSE), NOTHING, MALFORMED
    ),
    "a space before the length's colon, cut": Row(
        (response(IMAGE, "content-length : 99", body=PIXELS), Do.CLOSE), NOTHING, MALFORMED
    ),
    "a space before the transfer-encoding's colon": Row(
        (response(JSON, "transfer-encoding : chunked", body=chunked(b"{}")), Do.CLOSE), NOTHING, MALFORMED
    ),
    "a space before the coding's colon": Row(
        (response(JSON, f"content-length: {len(GZIP)}", "content-encoding : gzip", body=GZIP),), DECODED
    ),
    "no name": Row((response(JSON, LENGTH, ": b", body=b"{}"),), OK),
    "folded": Row((response(JSON, LENGTH, "x-a: b", "\tc", body=b"{}"),), OK),
    "a folded length": Row((response(JSON, "content-length:", " 2", body=b"{}"),), OK),
    "a folded length, cut": Row((response(IMAGE, "content-length:", " 9", body=PIXELS), Do.CLOSE), CUT, LOST),
    "folded first": Row((response(" x-a: b", JSON, LENGTH, body=b"{}"),), OK),
    "two content-types": Row((response(JSON, "content-type: text/html", LENGTH, body=b"{}"),), OK),
    "no content-type": Row((response(LENGTH, body=b"{}"),), OK),
    "line feeds only": Row((FINE.replace(b"\r\n", b"\n"),), OK),
    "300 kB": Row((response(JSON, LENGTH, f"x-a: {'b' * 300_000}", body=b"{}"),), NOTHING, MALFORMED),
    "endless": Row((b"HTTP/1.1 200 OK\r\n" + b"x-a: b\r\n" * 200_000, Do.TURN), NOTHING, MALFORMED),
    "endless line": Row((b"HTTP/1.1 200 OK\r\nx-a: " + b"b" * 2_000_000, Do.TURN), NOTHING, MALFORMED),
    "no headers": Row((response(body=b"{}"), Do.CLOSE), OK),
    "cookies": Row((response(JSON, LENGTH, "set-cookie: a=b", "set-cookie: c=d", body=b"{}"),), OK),
    "alt-svc": Row((response(JSON, LENGTH, 'alt-svc: h3=":443"; ma=86400', body=b"{}"),), OK),
    "upgrade": Row((response(JSON, LENGTH, "upgrade: h2c", "connection: upgrade", body=b"{}"),), OK),
    "UTF-8": Row((response(JSON, LENGTH, "x-a: \xc3\xa9", body=b"{}"),), OK),
    "strict transport": Row((response(JSON, LENGTH, "strict-transport-security: max-age=9", body=b"{}"),), OK),
}

PACE = {
    "one byte at a time": Row(drip(FINE), OK),
    "one byte at a time, in chunks": Row(drip(response(JSON, CHUNKED, body=chunked(b"{", b"}"))), OK),
    "one byte at a time, gzip": Row(drip(encoded("gzip", GZIP)), DECODED),
    "one byte at a time, by the end": Row((*drip(response(JSON, CLOSES, body=b"{}")), Do.CLOSE), OK),
    "before the request's body": Row((Do.EARLY, FINE), OK, body=BIG),
    "before the request's body, and closes": Row(
        (Do.EARLY, response(JSON, LENGTH, CLOSES, status="HTTP/1.1 413 No", body=b"{}"), Do.CLOSE),
        Want(413, b"{}"),
        body=BIG,
    ),
}

# A response that no request asked for is nobody's.
SURPLUSES = {
    "in the same write": Row((FINE + SURPLUS,), OK),
    "in a later write": Row((FINE, SURPLUS), OK),
    "while idle": Row((FINE, Do.RESPONDED, SURPLUS), OK),
    "while idle, one byte": Row((FINE, Do.RESPONDED, SURPLUS[:1]), OK),
    "while idle, and closes": Row((FINE, Do.RESPONDED, SURPLUS, Do.CLOSE), OK),
    "while idle, 1 MB": Row((FINE, Do.RESPONDED, response("content-length: 1000000", body=bytes(1_000_000))), OK),
    "just before the next request": Row((FINE, Do.NEXT, SURPLUS), OK),
    "half of it while idle": Row((FINE, Do.RESPONDED, SURPLUS[:20], Do.NEXT, SURPLUS[20:]), OK),
    "an interim one while idle": Row((FINE, Do.RESPONDED, INTERIM), OK),
    "line breaks while idle": Row((FINE, Do.RESPONDED, b"\r\n\r\n"), OK),
    "close_notify while idle": Row((FINE, Do.RESPONDED, Do.CLOSE_NOTIFY), OK),
    "FIN while idle": Row((FINE, Do.RESPONDED, Do.FIN), OK),
    "reset while idle": Row((FINE, Do.RESPONDED, Do.RESET), OK),
    "HTTP/2 in the status line": Row((FINE.replace(b"HTTP/1.1", b"HTTP/2"), Do.RESPONDED, SURPLUS), NOTHING, MALFORMED),
}

EVENTS = "content-type: text/event-stream"
EVENT = b'data: {"n": 1}\n\n'
STREAMS = {
    "whole": Row((response(EVENTS, CHUNKED, body=chunked(EVENT, EVENT)),), Want(200, EVENT * 2)),
    "by the end": Row((response(EVENTS, CLOSES, body=EVENT), Do.CLOSE), Want(200, EVENT)),
    "by the end, cut": Row((response(EVENTS, CLOSES, body=EVENT + EVENT[:9]), Do.CLOSE), CUT, LOST),
    "by the end, gzip": Row((by_the_end("gzip", gzip.compress(EVENT), EVENTS), Do.CLOSE), Want(200, EVENT)),
    "by the end, cut between members": Row((by_the_end("gzip", gzip.compress(EVENT[:9]), EVENTS), Do.CLOSE), CUT, LOST),
    "in chunks, cut": Row((response(EVENTS, CHUNKED, body=chunked(EVENT, end=b"")), Do.CLOSE), CUT, LOST),
    "in chunks, cut in an event": Row(
        (response(EVENTS, CHUNKED, body=chunked(EVENT + EVENT[:5], end=b"")), Do.CLOSE), CUT, LOST
    ),
    "reset": Row((response(EVENTS, CHUNKED, body=chunked(EVENT, end=b"")), Do.RESET), CUT, LOST),
    "silence": Row((response(EVENTS, CHUNKED, body=chunked(EVENT, end=b"")),), CUT, LATE, stalls=True),
    "cut gzip": Row(
        (response(EVENTS, "content-encoding: gzip", CHUNKED, body=chunked(gzip.compress(EVENT)[:-9])),), CUT, MALFORMED
    ),
    "one byte at a time": Row(drip(response(EVENTS, CHUNKED, body=chunked(EVENT))), Want(200, EVENT)),
}

TABLES = {
    "no response": NO_RESPONSE,
    "status line": STATUS_LINES,
    "interim": INTERIMS,
    "status": STATUSES,
    "length": LENGTHS,
    "chunks": CHUNKS,
    "coding": CODINGS,
    "no body": NO_BODY,
    "header": HEADERS,
    "pace": PACE,
    "surplus": SURPLUSES,
}
ROWS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}


@pytest.mark.parametrize(("kind", "way"), WAYS)
@pytest.mark.parametrize("name", names_of(ROWS))
@pytest.mark.gen_test
async def test_call(setup: Setup, authority: Authority, logs: Logs, name: str, kind: str, way: str) -> None:
    """A paid call is sent once and answered whole. A read is whole, or broken in a way that clients repeat."""
    await play(setup, authority, logs, "http/1.1", ROWS[name], KINDS[kind], way)


@pytest.mark.parametrize(("kind", "way"), PAID_GET_WAYS)
@pytest.mark.parametrize("name", names_of(NO_RESPONSE))
@pytest.mark.gen_test
async def test_paid_get(setup: Setup, authority: Authority, logs: Logs, name: str, kind: str, way: str) -> None:
    """A GET that runs a model is sent once and answered whole, as a POST is."""
    await play(setup, authority, logs, "http/1.1", NO_RESPONSE[name], KINDS[kind], way)


@pytest.mark.parametrize(("kind", "way"), STREAM_WAYS)
@pytest.mark.parametrize("name", names_of(STREAMS))
@pytest.mark.gen_test
async def test_stream(setup: Setup, authority: Authority, logs: Logs, name: str, kind: str, way: str) -> None:
    """An event stream that was cut off is aborted."""
    await play(setup, authority, logs, "http/1.1", STREAMS[name], KINDS[kind], way)
