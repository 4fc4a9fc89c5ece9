"""The way of a call: what fal gets, what the caller gets, and when. Over both protocols towards fal."""

import asyncio
import gzip
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from caller import Answer, Caller, call, request
from conftest import KEY, Logs, Setup
from upstream import Exchange

from tornado_fal_proxy import FalProxyHandler
from tornado_fal_proxy.policy import CLIENT_PROXY
from tornado_fal_proxy.transfer import HIGH_WATER_BYTES, WINDOW_BYTES, Transfer
from tornado_fal_proxy.upstream import RATE_IS_WINDOW

Handler = Callable[[Exchange], Awaitable[None]]

JSON = [("content-type", "application/json")]
EVENTS = [("content-type", "text/event-stream; charset=utf-8")]

# How long a cancel may take to be seen by fal (the bound).
CANCEL_S = 0.05


def answers(status: int = 200, body: bytes = b"{}", headers: list[tuple[str, str]] = JSON) -> Handler:
    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.respond(status, body, headers)

    return answer


async def silent(exchange: Exchange) -> None:
    """Take the request and never answer."""
    await exchange.body()


async def first_exchange(upstream: "object") -> Exchange:
    """The first request that the upstream received, as soon as it is whole."""
    while not upstream.exchanges:  # type: ignore[attr-defined]
        await asyncio.sleep(0.001)
    exchange: Exchange = upstream.exchanges[0]  # type: ignore[attr-defined]
    await exchange.body()
    return exchange


@pytest.mark.gen_test
async def test_request(setup: Setup, protocol: str) -> None:
    """Method, path, query and body go up byte for byte, with the headers of PROTOCOL section 4 and no other."""
    upstream = await setup.upstream(answers(), protocol)
    port = setup.proxy(upstream)
    path = "/a//b/../c/%2F%e6/+;=,{}?x=&y=%20+z&&u=a?b/"
    body = '{"prompt": "ü \U0001f30a"}'.encode()
    relayed = {
        "accept": "application/json, text/event-stream",
        "content-type": "application/json; charset=utf-8",
        "user-agent": "fal/1.10.1 (caller)",
        "x-fal-request-timeout": "30",
        "x-fal-queue-priority": "low",
        "x-fal-empty": "",
        "x-app-fal-disable-fallback": "true",
    }
    kept_back = [
        "Authorization: Key of-the-caller",
        "Cookie: a=b",
        "Origin: https://evil.example",
        "Referer: https://evil.example/",
        "X-Forwarded-For: 1.2.3.4",
        "X-Fal-Client-Proxy: somebody else",
        "Connection: keep-alive, x-own",
        "X-Own: 1",
        "Accept-Language: de",
        "Accept-Encoding: identity",
        "If-None-Match: *",
        "Pragma: no-cache",
    ]
    lines = [f"{name.title()}: {value}" for name, value in relayed.items() if name != "content-type"]
    caller = await Caller.open(port)
    raw = request("POST", body, target=f"https://queue.fal.run:443{path}#fragment", headers=lines + kept_back)
    caller.writer.write(raw.replace(b"application/json\r\n", b"application/json; charset=utf-8\r\n", 1))
    assert (await caller.answer()).status == 200
    await caller.close()
    [exchange] = upstream.exchanges
    assert (exchange.protocol, exchange.method, exchange.target) == (protocol, "POST", path.encode())
    assert exchange.authority == "queue.fal.run"
    assert await exchange.body() == body
    sent = {name.lower().decode(): value.decode() for name, value in exchange.headers}
    own = {"authorization": f"Key {KEY}", "x-fal-client-proxy": CLIENT_PROXY, "content-length": str(len(body))}
    framing = {"accept-encoding": "deflate, gzip, br"} | ({"host": "queue.fal.run"} if protocol != "h2" else {})
    assert sent == relayed | own | framing
    assert len(sent) == len(exchange.headers)


@pytest.mark.gen_test
async def test_request_without_optional_headers(setup: Setup, protocol: str) -> None:
    """libcurl adds no accept, content-type, user-agent or expect of its own; a GET has no body."""
    upstream = await setup.upstream(answers(), protocol)
    port = setup.proxy(upstream)
    await call(port, "GET")
    big = b'"' + b"x" * 2_000_000 + b'"'
    assert (await call(port, "POST", big)).status == 200
    get, post = upstream.exchanges
    names = {name.lower() for name, _ in get.headers} - {b"host"}
    assert names == {b"authorization", b"x-fal-client-proxy", b"accept-encoding"}
    assert await post.body() == big
    assert post.header("expect") is None


@pytest.mark.gen_test
async def test_empty_post(setup: Setup, protocol: str) -> None:
    """A POST without a body reaches fal as one with content-length: 0."""
    upstream = await setup.upstream(answers(), protocol)
    assert (await call(setup.proxy(upstream), "POST", b"")).status == 200
    assert upstream.exchanges[0].header("content-length") == b"0"


@pytest.mark.gen_test
async def test_get_with_a_body(setup: Setup, protocol: str) -> None:
    """A GET with a JSON body is relayed as that."""
    upstream = await setup.upstream(answers(), protocol)
    caller = await Caller.open(setup.proxy(upstream))
    head = request("GET", headers=["content-type: application/json", "content-length: 2"])
    caller.writer.write(head + b"[]")
    assert (await caller.answer()).status == 200
    assert upstream.exchanges[0].method == "GET"
    assert await upstream.exchanges[0].body() == b"[]"
    await caller.close()


ANSWER_HEADERS = [
    ("server", "fal"),
    ("date", "Thu, 01 Jan 1970 00:00:00 GMT"),
    ("content-type", "application/x-thing"),
    ("x-fal-request-id", "abc"),
    ("set-cookie", "a=1"),
    ("set-cookie", "b=2"),
    ("location", "https://evil.example/"),
    ("etag", '"1"'),
    ("x-empty", ""),
    ("x-latin", "caf\u00e9"),
    ("www-authenticate", "Key"),
    ("access-control-allow-origin", "*"),
]


@pytest.mark.parametrize(
    "status", [200, 201, 202, 204, 301, 302, 304, 307, 308, 400, 401, 404, 422, 429, 499, 500, 599]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_answer(setup: Setup, protocol: str, method: str, status: int) -> None:
    """Status, headers (duplicates too) and body come back as fal sent them; only the id of the call is added, and no
    redirect followed."""
    body = b"" if status in (204, 304) else b'{"detail": "as it is"}'
    upstream = await setup.upstream(answers(status, body, ANSWER_HEADERS), protocol)
    answer = await call(setup.proxy(upstream), method, headers=['If-None-Match: "1"'])
    assert (answer.status, answer.body) == (status, body)
    own = [] if status in (204, 304) else [("content-length", str(len(body)))]
    assert sorted(without_id(answer)) == sorted(ANSWER_HEADERS + own)
    assert len(upstream.exchanges) == 1


def without_id(answer: Answer) -> list[tuple[str, str]]:
    """The headers but for the one that the proxy adds."""
    assert answer.header("x-request-id")
    return [(name, value) for name, value in answer.headers if name != "x-request-id"]


@pytest.mark.gen_test
async def test_answer_without_headers(setup: Setup, protocol: str) -> None:
    """Tornado's own Server, Date and Content-Type do not stand in for those that fal did not send."""
    upstream = await setup.upstream(answers(200, b"x", []), protocol)
    assert without_id(await call(setup.proxy(upstream))) == [("content-length", "1")]


PLAIN = b'{"x":"' + b"y" * 200 + b'"}'
CODINGS = {
    "gzip": gzip.compress(PLAIN),
    "deflate": zlib.compress(PLAIN),
    "br": bytes.fromhex("1bcf00f88dd462cd19eed42278797b4ba7af24992d1038706104"),
}


@pytest.mark.parametrize("coding", list(CODINGS))
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_encoded_answer(setup: Setup, protocol: str, coding: str, method: str) -> None:
    """An encoded answer arrives decoded, without content-encoding and with its true length."""
    upstream = await setup.upstream(answers(200, CODINGS[coding], [*JSON, ("content-encoding", coding)]), protocol)
    answer = await call(setup.proxy(upstream), method)
    assert answer.body == PLAIN
    assert answer.header("content-encoding") is None
    assert answer.header("content-length") in (str(len(PLAIN)), None)


@pytest.mark.gen_test
async def test_early_answer(setup: Setup, protocol: str) -> None:
    """An answer that comes before the request's body was taken is relayed."""

    async def answer(exchange: Exchange) -> None:
        await exchange.respond(413, b'{"detail": "too large"}', JSON)

    upstream = await setup.upstream(answer, protocol)
    answer_ = await call(setup.proxy(upstream), "POST", b'"' + b"x" * 500_000 + b'"')
    assert (answer_.status, answer_.body) == (413, b'{"detail": "too large"}')


@pytest.mark.gen_test
async def test_interim_answers_and_trailers(setup: Setup, protocol: str) -> None:
    """1xx answers and trailers are not taken for the answer's head, nor passed on."""

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.informational(103, [("link", "</x>")])
        await exchange.start(200, JSON)
        await exchange.send(b"{}")
        await exchange.end([("x-checksum", "1")])

    upstream = await setup.upstream(answer, protocol)
    answer_ = await call(setup.proxy(upstream))
    assert (answer_.status, answer_.body) == (200, b"{}")
    assert sorted(name for name, _ in without_id(answer_)) == ["content-length", "content-type"]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_stream(setup: Setup, protocol: str, method: str) -> None:
    """The head arrives before the first event is sent, and each event as one chunk before the next is sent.

    An nginx in front is asked not to buffer them.
    """
    go = asyncio.Queue[bytes]()

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENTS)
        while event := await go.get():
            await exchange.send(event)
        await exchange.end()

    upstream = await setup.upstream(answer, protocol)
    caller = await Caller.open(setup.proxy(upstream))
    await caller.send(method)
    head = await caller.head()
    assert (head.status, head.header("content-type")) == (200, EVENTS[0][1])
    assert head.header("transfer-encoding") == "chunked"
    assert head.header("x-accel-buffering") == "no"
    for event in (b"data: 1\n\n", "data: ü🌊\n\n".encode(), b": comment\n\n", b"data: " + b"x" * 10_000 + b"\n\n"):
        go.put_nowait(event)
        assert await caller.chunk() == event
    go.put_nowait(b"")
    assert await caller.chunk() == b""
    await caller.close()


class NoClient:
    """What a transfer tells its client, for a transfer without libcurl."""

    def now(self) -> float:
        return 0.0

    def open_window_soon(self, transfer: Transfer) -> None:
        pass

    def resume(self, transfer: Transfer) -> None:
        pass


SMALL, BULK = b"x" * 100, b"x" * 16_000


@pytest.mark.parametrize(
    ("pieces", "joined"),
    [
        ([SMALL, SMALL], [SMALL, SMALL]),
        ([SMALL, BULK], [SMALL, BULK]),
        ([BULK, SMALL, BULK], [BULK + SMALL + BULK]),
        ([BULK] * 6, [BULK * 5, BULK]),
    ],
)
@pytest.mark.gen_test
async def test_only_pieces_of_a_large_body_are_joined(pieces: list[bytes], joined: list[bytes]) -> None:
    """Of those that are here already: what fal sends in small pieces reaches the caller in these."""
    client: Any = NoClient()
    handle: Any = object()
    transfer = Transfer(client, handle, None, host="fal.run", repeatable=True)
    transfer.high_water = 10**6
    for piece in pieces:
        transfer.on_body(piece)
    assert [transfer.read_rest(await transfer.read()) for _ in joined] == joined


@pytest.mark.gen_test
async def test_large_event(setup: Setup, protocol: str) -> None:
    """An event that libcurl hands over in pieces does not end in the middle of a character at the caller."""
    event = "data: {}\n\n".format("日本語" * 15_000).encode()

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENTS)
        await exchange.send(event)
        await received_all.wait()
        await exchange.end()

    received_all = asyncio.Event()
    upstream = await setup.upstream(answer, protocol)
    caller = await Caller.open(setup.proxy(upstream))
    await caller.send("POST")
    await caller.head()
    received = b""
    while len(received) < len(event):
        chunk = await caller.chunk()
        chunk.decode()
        received += chunk
    assert received == event
    received_all.set()
    assert await caller.chunk() == b""
    await caller.close()


@pytest.mark.gen_test
async def test_cut_character(setup: Setup, protocol: str) -> None:
    """A character that fal sends in two pieces reaches the caller whole; a broken one at the end is not lost."""
    go = asyncio.Queue[bytes]()

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENTS)
        while piece := await go.get():
            await exchange.send(piece)
        await exchange.end()

    upstream = await setup.upstream(answer, protocol)
    caller = await Caller.open(setup.proxy(upstream))
    await caller.send("POST")
    await caller.head()
    wave = "🌊".encode()
    go.put_nowait(b"data: " + wave[:1])
    assert await caller.chunk() == b"data: "
    go.put_nowait(wave[1:3])
    go.put_nowait(wave[3:] + b"\n\n")
    assert await caller.chunk() == wave + b"\n\n"
    go.put_nowait(b"\xff\xf0\x9f")
    assert await caller.chunk() == b"\xff"
    go.put_nowait(b"")
    assert await caller.chunk() == b"\xf0\x9f"
    assert await caller.chunk() == b""
    await caller.close()


@pytest.mark.gen_test
async def test_plain_answer_of_a_get_is_streamed(setup: Setup, protocol: str) -> None:
    """A GET's answer goes out as it comes, with fal's content-length."""
    go = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.start(200, JSON, length=4)
        await exchange.send(b"ab")
        await go.wait()
        await exchange.send(b"cd")
        await exchange.end()

    upstream = await setup.upstream(answer, protocol)
    caller = await Caller.open(setup.proxy(upstream))
    await caller.send("GET")
    head = await caller.head()
    assert (head.header("content-length"), head.header("x-accel-buffering")) == ("4", None)
    assert await caller.reader.readexactly(2) == b"ab"
    go.set()
    assert await caller.reader.readexactly(2) == b"cd"
    await caller.close()


@pytest.mark.gen_test
async def test_plain_answer_of_a_post_is_held(setup: Setup, protocol: str) -> None:
    """A POST's plain answer goes out when it is whole and in one piece, however fal sends it."""
    go = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, JSON)
        await exchange.send(b'{"a":')
        await go.wait()
        await exchange.send(b"1}")
        await exchange.end()

    upstream = await setup.upstream(answer, protocol)
    caller = await Caller.open(setup.proxy(upstream))
    await caller.send("POST")
    await first_exchange(upstream)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(caller.reader.read(1), 0.2)
    go.set()
    whole = await caller.answer()
    assert (whole.body, whole.header("content-length")) == (b'{"a":1}', "7")
    await caller.close()


@pytest.mark.parametrize("size", [99_999, 100_000, 3_000_000])
@pytest.mark.gen_test
async def test_answer_around_hold_bytes(setup: Setup, protocol: str, size: int) -> None:
    """A POST's result that outgrows hold_bytes is streamed and arrives whole."""
    body = bytes(range(256)) * (size // 256) + b"." * (size % 256)

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, JSON)
        await exchange.send(body)
        await exchange.end()

    upstream = await setup.upstream(answer, protocol)
    result = await call(setup.proxy(upstream, hold_bytes=100_000))
    assert result.body == body


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_backpressure(setup: Setup, protocol: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that stops reading stops fal; once it reads again everything arrives."""
    sent = 0
    full = asyncio.Event()
    piece = b"data: " + b"x" * 100_000 + b"\n\n"
    pieces = 400  # 40 MB: more than sockets and libcurl's windows hold

    async def answer(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.body()
        await exchange.start(200, EVENTS)
        for _ in range(pieces):
            await exchange.send(piece)
            sent += 1
        full.set()
        await exchange.end()

    held: list[int] = []
    on_body = Transfer.on_body

    def spy(self: Transfer, data: bytes) -> int | None:
        held.append(self._buffered)
        return on_body(self, data)

    monkeypatch.setattr(Transfer, "on_body", spy)
    upstream = await setup.upstream(answer, protocol)
    caller = await Caller.open(setup.proxy(upstream), receive_buffer=4096)
    await caller.send(method)
    await caller.head()
    before = -1
    while before != sent:  # until it stands still
        before = sent
        await asyncio.sleep(0.3)
    assert sent < pieces
    assert not full.is_set()
    assert max(held) <= HIGH_WATER_BYTES + 16_384
    received = 0
    while chunk := await caller.chunk():
        received += len(chunk)
    assert received == pieces * len(piece)
    await caller.close()


@pytest.mark.parametrize(
    ("method", "headers", "hold_bytes"),
    [("GET", EVENTS, 1), ("GET", JSON, 1), ("POST", EVENTS, 1), ("POST", JSON, 1_000_000), ("POST", JSON, 30_000_000)],
)
@pytest.mark.gen_test(timeout=30)
async def test_window_is_no_limit(
    setup: Setup, protocol: str, method: str, headers: list[tuple[str, str]], hold_bytes: int
) -> None:
    """libcurl's limit of the rate, which serves as a window, would let 20 MB take more than a minute."""
    piece = b"data: " + b"x" * 199_992 + b"\n\n"

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, headers)
        for _ in range(100):
            await exchange.send(piece)
        await exchange.end()

    upstream = await setup.upstream(answer, protocol)
    result = await call(setup.proxy(upstream, hold_bytes=hold_bytes), method)
    assert result.body == piece * 100


@pytest.mark.parametrize("size", [15_000, 60_000, 240_000])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_window_delays_no_answer_of_known_length(setup: Setup, protocol: str, method: str, size: int) -> None:
    """libcurl would spread the rate over the length that was declared: 0.2 s for each of these answers, or more."""

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, [*JSON, ("content-length", str(size))])
        for _ in range(5):
            await exchange.send(b"x" * (size // 5))
        await exchange.end()

    loop = asyncio.get_running_loop()
    port = setup.proxy(await setup.upstream(answer, protocol))

    async def seconds() -> float:
        start = loop.time()
        assert len((await call(port, method)).body) == size
        return loop.time() - start

    assert min(await asyncio.gather(*[seconds() for _ in range(8)])) < 0.1


@pytest.mark.gen_test
async def test_window_bounds_a_stalled_stream(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that does not read an event stream lets fal send hardly more than the window over HTTP/2."""
    sent = taken = 0
    on_body = Transfer.on_body

    def spy(self: Transfer, data: bytes) -> int | None:
        nonlocal taken
        result = on_body(self, data)
        taken += len(data) if result is None else 0
        return result

    monkeypatch.setattr(Transfer, "on_body", spy)

    async def answer(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.body()
        await exchange.start(200, EVENTS)
        while True:
            await exchange.send(b"data: " + b"x" * 10_000 + b"\n\n")
            sent += 10_000

    upstream = await setup.upstream(answer, "h2")
    caller = await Caller.open(setup.proxy(upstream), receive_buffer=4096)
    await caller.send("POST")
    await caller.head()
    caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
    before = -1
    while before != sent:  # until it stands still
        before = sent
        await asyncio.sleep(0.3)
    window = WINDOW_BYTES if RATE_IS_WINDOW else 10 * 1024 * 1024
    assert sent - taken <= window + 64 * 1024, "the window, and what is on its way"
    caller.leave()
    await upstream.exchanges[0].gone.wait()


async def begins_stream(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, EVENTS)
    await exchange.send(b"data: 1\n\n")


async def floods(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, EVENTS)
    while True:
        await exchange.send(b"data: " + b"x" * 50_000 + b"\n\n")


CANCELS: dict[str, tuple[Handler, bool]] = {
    "while waiting for the head": (silent, False),
    "while streaming": (begins_stream, True),
    "while paused": (floods, True),
}


@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize("when", list(CANCELS))
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_caller_goes_away(setup: Setup, protocol: str, method: str, when: str, how: str) -> None:
    """fal sees within 50 ms that the caller is gone, and the proxy keeps nothing of the call."""
    handler, streams = CANCELS[when]
    upstream = await setup.upstream(handler, protocol)
    caller = await Caller.open(setup.proxy(upstream), receive_buffer=4096)
    await caller.send(method)
    exchange = await first_exchange(upstream)
    if streams:
        await caller.head()
    if when == "while paused":
        await asyncio.sleep(0.7)  # all buffers fill up
    left_at = asyncio.get_running_loop().time()
    if how == "reset":
        caller.leave()
    else:
        caller.writer.close()
    await exchange.gone.wait()
    assert exchange.gone_at is not None
    assert exchange.gone_at - left_at < CANCEL_S


@pytest.mark.gen_test
async def test_caller_goes_away_with_others_on_the_connection(setup: Setup) -> None:
    """Over HTTP/2 only the stream of the caller that left is reset."""
    release = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await release.wait()
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(answer, "h2")
    port = setup.proxy(upstream)
    callers = [await Caller.open(port) for _ in range(3)]
    for caller in callers:
        await caller.send("POST")
    while len(upstream.exchanges) < 3:
        await asyncio.sleep(0.001)
    callers[1].leave()
    gone = [asyncio.create_task(exchange.gone.wait()) for exchange in upstream.exchanges]
    await asyncio.wait(gone, return_when=asyncio.FIRST_COMPLETED)
    assert sum(exchange.gone.is_set() for exchange in upstream.exchanges) == 1
    assert upstream.connections == 1
    release.set()
    for caller in (callers[0], callers[2]):
        assert (await caller.answer()).status == 200
        await caller.close()
    for task in gone:
        task.cancel()


@pytest.mark.gen_test
async def test_cold_crowd(setup: Setup, protocol: str) -> None:
    """A crowd that meets a cold proxy shares one connection over HTTP/2 and never waits in line over HTTP/1.1."""
    waiting = 0
    all_here = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        nonlocal waiting
        await exchange.body()
        waiting += 1
        if waiting == 50:
            all_here.set()
        await all_here.wait()  # none is answered before all have come
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(answer, protocol)
    port = setup.proxy(upstream)
    for result in await asyncio.gather(*(call(port, method) for method in ["POST", "GET"] * 25)):
        assert result.status == 200
    assert upstream.connections == (1 if protocol == "h2" else 50)
    waiting = 0
    await asyncio.gather(*(call(port, "POST") for _ in range(50)))
    assert upstream.connections <= (1 if protocol == "h2" else 50), "the pool is used again"


@pytest.mark.gen_test
async def test_too_many_calls(setup: Setup, protocol: str) -> None:
    """Call max_in_flight + 1 is answered 503 with retry-after at once; a place is free again when a call ends."""
    upstream = await setup.upstream(silent, protocol)
    port = setup.proxy(upstream, max_in_flight=2)
    callers = [await Caller.open(port) for _ in range(2)]
    for caller in callers:
        await caller.send("POST")
    while len(upstream.exchanges) < 2:
        await asyncio.sleep(0.001)
    refused = await call(port, "POST")
    assert (refused.status, refused.header("retry-after")) == (503, "1")
    assert "try again" in refused.message
    callers[0].leave()
    await asyncio.wait(
        [asyncio.create_task(exchange.gone.wait()) for exchange in upstream.exchanges],
        return_when=asyncio.FIRST_COMPLETED,
    )
    upstream.handler = answers()
    assert (await call(port, "POST")).status == 200
    callers[1].leave()
    for exchange in upstream.exchanges[:2]:
        await exchange.gone.wait()


@pytest.mark.gen_test
async def test_no_time_limit_for_a_stream(setup: Setup, protocol: str) -> None:
    """A stream lives longer than idle_timeout_s as long as bytes move."""
    idle_timeout_s = 0.3

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENTS)
        for number in range(12):
            await asyncio.sleep(idle_timeout_s / 3)
            await exchange.send(b"data: %d\n\n" % number)
        await exchange.end()

    upstream = await setup.upstream(answer, protocol)
    result = await call(setup.proxy(upstream, idle_timeout_s=idle_timeout_s))
    assert result.body.count(b"data:") == 12


@pytest.mark.gen_test
async def test_caller_that_never_reads_again(setup: Setup, protocol: str) -> None:
    """A caller that takes nothing for idle_timeout_s is cut off, and fal is told."""
    upstream = await setup.upstream(floods, protocol)
    caller = await Caller.open(setup.proxy(upstream, idle_timeout_s=0.5), receive_buffer=4096)
    await caller.send("POST")
    exchange = await first_exchange(upstream)
    await exchange.gone.wait()
    caller.leave()


@pytest.mark.gen_test
async def test_http_1_0(setup: Setup, protocol: str) -> None:
    """A caller that speaks HTTP/1.0 gets a stream that ends with the connection, keep-alive or not."""
    upstream = await setup.upstream(answers(200, b"data: 1\n\n", EVENTS), protocol)

    async def slow(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENTS)
        await exchange.send(b"data: 1\n\n")
        await asyncio.sleep(0.02)
        await exchange.end()

    upstream.handler = slow
    port = setup.proxy(upstream)
    for headers in ([], ["Connection: keep-alive"]):
        answer = await call(port, "POST", version="HTTP/1.0", headers=headers)
        assert (answer.status, answer.body) == (200, b"data: 1\n\n")
        assert answer.header("transfer-encoding") is None


def test_handler_keeps_no_state_between_calls() -> None:
    """What differs from call to call lives in the instance, of which Tornado makes one for each."""
    assert not [name for name, value in vars(FalProxyHandler).items() if isinstance(value, list | dict | set)]


def test_log_fixture_fails_on_the_unexpected(logs: Logs) -> None:
    """The guard that every test relies on can fail."""
    import logging

    logging.getLogger("tornado_fal_proxy").warning("surprise")
    with pytest.raises(AssertionError):
        logs.check()
    logs.expect("surprise")
