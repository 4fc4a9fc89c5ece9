"""Request smuggling: bytes that parsers of HTTP/1.1 may frame in different ways reach fal as meant, or not at all.

Each case is sent as it stands, to the proxy alone and to nginx with the file of deploy/ in front of the proxy. A call
to ``/smuggled`` must not reach fal, unless the first parser took it for a request of its own.
"""

import asyncio
import contextlib
import re
import ssl
from dataclasses import dataclass

import pytest

from tests.support.nginx import NAME, deployed, nginx
from tests.support.proxy import ROUTE, Setup
from tests.support.scripted_upstream import Upstream
from tests.support.service_process import ServiceProcess
from tests.support.stub_handlers import fine
from tests.support.waiting import TIMEOUT_S, eventually

# Time without data after which nothing more is expected on a connection. Expected responses are waited for.
QUIET_S = 0.25
AT_ONCE = 16

INNER = (
    f"POST {ROUTE} HTTP/1.1\r\nHost: {NAME}\r\nx-fal-target-url: https://fal.run/smuggled-NNN\r\n"
    "content-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
).encode()
LENGTH = b"content-length: %d\r\n" % len(INNER)
ALL = b"%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER)
NOTHING = b"0\r\n\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"


def outer(
    lines: bytes, body: bytes = b"", *, method: str = "POST", target: bytes = b"https://fal.run/outer-NNN"
) -> bytes:
    return (
        f"{method} {ROUTE} HTTP/1.1\r\nHost: {NAME}\r\n".encode()
        + b"x-fal-target-url: %b\r\ncontent-type: application/json\r\n%b\r\n%b" % (target, lines, body)
    )


@dataclass(frozen=True)
class Case:
    """``alone`` and ``nginx`` are the calls that reach fal, as paths with the length of the body."""

    name: str
    sent: bytes
    alone: tuple[str, ...] = ()
    nginx: tuple[str, ...] | None = None

    @property
    def behind_nginx(self) -> tuple[str, ...]:
        return self.alone if self.nginx is None else self.nginx


OUTER = f"/outer {len(INNER)}"
BOTH = ("/outer 0", "/smuggled 2")
CASES = [
    # Correct requests, which show that the others are not refused for another reason.
    Case("a request as the body", outer(LENGTH, INNER), (OUTER,)),
    Case("in chunks", outer(CHUNKED, ALL), (OUTER,)),
    Case("one behind the other", outer(b"content-length: 0\r\n", INNER), BOTH),
    Case("behind the last chunk", outer(CHUNKED, NOTHING + INNER), BOTH),
    Case("a GET with a body", outer(LENGTH, INNER, method="GET"), (OUTER,)),
    Case("behind a GET", outer(b"", INNER, method="GET"), BOTH),
    Case("as the body of what is refused", outer(LENGTH, INNER, target=b"https://evil.example/")),
    Case("in chunks of what is refused", outer(CHUNKED, ALL, target=b"http://fal.run/")),
    Case("refused, and one behind it", outer(CHUNKED, NOTHING + INNER, target=b"x"), ("/smuggled 2",)),
    Case("as the body of a verb that is refused", outer(LENGTH, INNER, method="DELETE")),
    Case("behind a HEAD", outer(b"", INNER, method="HEAD"), ("/smuggled 2",)),
    Case("as a body that is waited for", outer(LENGTH + b"expect: 100-continue\r\n", INNER), (OUTER,)),
    Case("refused while it is waited for", outer(LENGTH + b"expect: 100-continue\r\n", INNER, target=b"x")),
    Case("a body that is too long", outer(b"content-length: 2\r\n", b"{}" + INNER), ("/outer 2", "/smuggled 2")),
    # Both ways to give the length of a body.
    Case("length and chunks", outer(LENGTH + CHUNKED, NOTHING + INNER)),
    Case("chunks and length", outer(CHUNKED + b"content-length: 5\r\n", NOTHING + INNER)),
    Case("chunks and no length", outer(CHUNKED + b"content-length: 0\r\n", NOTHING + INNER)),
    # Lengths.
    *(
        Case(f"length {text!r}", outer(b"content-length: %b\r\n" % text, INNER))
        for text in (
            *(b"+2", b"-2", b"0x2", b"2_0", b"2.0", b"2 0", b"2;", b"2e0", b"", b"\x002", b"2\x00", b"\xb2", b"two"),
            *(b"%d, 5" % len(INNER), b"9" * 30),
        )
    ),
    Case("two lengths", outer(LENGTH + b"content-length: 2\r\n", INNER)),
    Case("two lengths, the small one first", outer(b"content-length: 0\r\n" + LENGTH, INNER)),
    Case("one length twice", outer(LENGTH * 2, INNER), (OUTER,), ()),
    Case(
        "one length twice in one line", outer(b"content-length: %d, %d\r\n" % ((len(INNER),) * 2), INNER), (OUTER,), ()
    ),
    # Transfer-Encoding in disguise.
    *(
        Case(f"transfer-encoding {text!r}", outer(b"transfer-encoding: %b\r\n" % text, NOTHING + INNER))
        for text in (
            *(
                b"xchunked",
                b"identity",
                b"chunked, identity",
                b"identity, chunked",
                b"gzip, chunked",
                b"chunked, chunked",
            ),
            *(b"chunked;a=b", b'"chunked"', b"\x0bchunked", b"chunked\x0b", b"chunked\x00", b"chunked\xa0", b""),
        )
    ),
    *(
        Case(f"{line!r}", outer(LENGTH + line + b"\r\n", NOTHING + INNER), (), nginx_ignores)
        for line, nginx_ignores in (
            (b"transfer-encoding : chunked", ()),
            (b" transfer-encoding: chunked", ()),
            (b"\ttransfer-encoding: chunked", ()),
            (b"transfer-encoding\x00: chunked", ()),
            (b"transfer-encoding\xa0: chunked", (OUTER,)),
            (b"transfer-encoding\t: chunked", ()),
            (b"a: b\rtransfer-encoding: chunked", ()),
            (b"a: b\r\n\r transfer-encoding: chunked", ()),
            (b"transfer-encoding: chunked\r\ntransfer-encoding: identity", ()),
            (CHUNKED + b"transfer-encoding: chunked", ()),
            (b"transfer-encoding:\r\n chunked", ()),
        )
    ),
    Case("an underscore", outer(LENGTH + b"transfer_encoding: chunked\r\n", INNER), (OUTER,)),
    Case("bare line feeds", outer(LENGTH, INNER).replace(b"\r\n", b"\n", 6), (f"/outer {len(INNER)}",)),
    Case("a line feed before chunks", outer(LENGTH + b"a: b\ntransfer-encoding: chunked\r\n", NOTHING + INNER)),
    # Chunks.
    *(
        Case(f"chunk of {text!r}", outer(CHUNKED, text + b"\r\n{}\r\n" + NOTHING + INNER))
        for text in (b"0x2", b"+2", b"-2", b" 2", b"2_", b"", b"\x002", b"two", b"1" * 20, b"2\n")
    ),
    Case("a chunk's extension", outer(CHUNKED, b"2;a=b\r\n{}\r\n" + NOTHING + INNER), (), ("/outer 2", "/smuggled 2")),
    Case(
        "a space behind a chunk's size",
        outer(CHUNKED, b"2 \r\n{}\r\n" + NOTHING + INNER),
        (),
        ("/outer 2", "/smuggled 2"),
    ),
    Case("a chunk that is too long", outer(CHUNKED, b"1\r\n{}\r\n" + NOTHING + INNER)),
    Case("chunks with bare line feeds", outer(CHUNKED, b"2\n{}\n0\n\n" + INNER), (), ("/outer 2", "/smuggled 2")),
    Case("a trailer", outer(CHUNKED, b"0\r\na: b\r\n\r\n" + INNER), (), BOTH),
    # Heads.
    Case("a folded target", outer(b"a: b\r\n x-fal-target-url: https://fal.run/smuggled-NNN\r\n")),
    Case("two targets", outer(b"x-fal-target-url: https://fal.run/smuggled-NNN\r\n")),
    Case("a target with a line feed", outer(b"", target=b"https://fal.run/outer-NNN\nx-fal-a: b"), ("/outer 0",)),
    Case("a target with a return", outer(b"", target=b"https://fal.run/outer-NNN\rx-fal-a: b")),
    Case("a target with a NUL", outer(b"", target=b"https://fal.run/outer-NNN\x00")),
    Case("a name with a NUL", outer(b"a\x00b: c\r\n")),
    Case("a name with a space", outer(b"a b: c\r\n")),
    Case("no name", outer(b": c\r\n")),
    Case("no colon", outer(b"abc\r\n"), (), ("/outer 0",)),
    Case("a value with an escape", outer(b"x-fal-a: \x1b[0m\r\n")),
    # First lines.
    *(
        Case(f"first line {line!r}", outer(b"").replace(b"POST %b HTTP/1.1" % ROUTE.encode(), line, 1), *calls)
        for line, *calls in (
            (b"POST  /api/fal/proxy HTTP/1.1", (), ("/outer 0",)),
            (b"POST /api/fal/proxy  HTTP/1.1", (), ("/outer 0",)),
            (b"POST /api/fal/proxy HTTP/1.1\r", ("/outer 0",), ()),
            (b"POST /api/fal/proxy HTTP/1.10", (), ("/outer 0",)),
            (b"POST /api/fal/proxy\tHTTP/1.1",),
            (b"POST /api/fal/proxy",),
            (b"POST /api/fal/proxy HTTP/2.0",),
            (b"POST /api/fal/proxy\x00 HTTP/1.1",),
            (b"P\x00ST /api/fal/proxy HTTP/1.1",),
            (b"PRI * HTTP/2.0",),
            (b" POST /api/fal/proxy HTTP/1.1",),
        )
    ),
    Case("empty lines first", b"\r\n\r\n" + outer(b"content-length: 0\r\n"), (), ("/outer 0",)),
    Case("HTTP/1.0", outer(b"", INNER).replace(b"HTTP/1.1", b"HTTP/1.0", 1), ("/outer 0",)),
]
assert len({case.name for case in CASES}) == len(CASES)


async def statuses_of(port: int, sent: bytes, calls: int, tls: ssl.SSLContext | None) -> list[int]:
    """Send these bytes, wait until ``calls`` calls got 200, and return the statuses of all responses."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    writer.write(sent)
    received = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while data := await asyncio.wait_for(
            reader.read(65_536), QUIET_S if received.count(b" 200 OK\r\n") >= calls else TIMEOUT_S
        ):
            received += data
    writer.transport.abort()
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", received) if status != b"100"]


Results = dict[str, tuple[list[str], list[int]]]
Meant = dict[str, tuple[str, ...]]


async def run(upstream: Upstream, port: int, meant: Meant, tls: ssl.SSLContext | None = None) -> Results:
    """Return for each case the calls that fal got, and the statuses of the responses. Paths have the case's number."""
    statuses: dict[str, list[int]] = {}
    taken = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, case: Case) -> None:
        async with taken:
            sent = case.sent.replace(b"-NNN", b"-%03d" % number)
            statuses[case.name] = await statuses_of(port, sent, len(meant[case.name]), tls)

    await one(0, CASES[0])  # makes the connections that the others use too
    upstream.exchanges.clear()
    await asyncio.gather(*(one(*numbered) for numbered in enumerate(CASES)))
    calls: dict[str, list[str]] = {case.name: [] for case in CASES}
    for exchange in upstream.exchanges:
        path, _, number = exchange.target.decode().partition("-")
        calls[CASES[int(number)].name].append(f"{path} {len(await exchange.body())}")
    return {name: (calls[name], statuses[name]) for name in calls}


def different(results: Results, meant: Meant) -> Results:
    """Return the results that are not as they were meant."""
    return {name: result for name, result in results.items() if tuple(result[0]) != meant[name]}


@pytest.mark.gen_test
async def test_alone(setup: Setup) -> None:
    """Tornado frames as RFC 9112 requires or refuses. fal gets the calls that were allowed, with whole bodies."""
    upstream = await setup.upstream(fine, "http/1.1")
    meant = {case.name: case.alone for case in CASES}
    results = await run(upstream, setup.proxy(upstream), meant)
    assert different(results, meant) == {}
    for calls, statuses in results.values():
        assert statuses.count(200) == len(calls)
        assert all(status == 200 or 400 <= status < 500 for status in statuses)


@pytest.mark.gen_test
async def test_the_service(setup: Setup) -> None:
    """The command, which reads requests by itself, frames as nginx does what Tornado refuses, or refuses it too."""
    upstream = await setup.upstream(fine, "http/1.1")
    running = await ServiceProcess.in_front_of(setup, upstream)
    own = {
        "first line b'POST /api/fal/proxy HTTP/1.1\\r'": (),
        "empty lines first": ("/outer 0",),
        "a chunk's extension": ("/outer 2", "/smuggled 2"),
        "a trailer": BOTH,
    }
    meant = {case.name: own.get(case.name, case.alone) for case in CASES}
    results = await run(upstream, running.port, meant)
    assert different(results, meant) == {}
    for calls, statuses in results.values():
        assert statuses.count(200) == len(calls)
        assert all(status in (200, 501, 505) or 400 <= status < 500 for status in statuses)
    await running.end()


@pytest.mark.gen_test
async def test_behind_nginx(setup: Setup) -> None:
    """fal gets the calls that nginx meant, as its log shows, and each of them was allowed by the proxy."""
    upstream = await setup.upstream(fine, "http/1.1")
    meant = {case.name: case.behind_nginx for case in CASES}
    logged: list[str] = []
    as_deployed = deployed(setup.proxy(upstream))

    def servers(listen: str, files: dict[str, str]) -> str:
        text, limits = re.subn(" burst=100 ", " burst=1000 ", as_deployed(listen, files))  # all cases have one address
        assert limits == 1
        return text

    async with nginx((NAME,), servers) as front:

        async def note() -> None:
            while True:
                logged.append((await front.logged())[2])

        noting = asyncio.create_task(note())
        tls = ssl.create_default_context(cafile=front.ca_certs)
        tls.check_hostname = False
        results = await run(upstream, int(front.address.rpartition(":")[2]), meant, tls)
        # And the first call. nginx also logs what got no response, and the order is its own.
        most = sum(len(statuses) for _, statuses in results.values()) + 1
        await eventually(lambda: len(logged) >= most and logged.count("200") >= len(upstream.exchanges) + 1)
        noting.cancel()
    assert different(results, meant) == {}
    for calls, statuses in results.values():
        assert statuses.count(200) == len(calls)
    assert logged.count("200") == len(upstream.exchanges) + 1
