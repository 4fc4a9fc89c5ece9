"""The kinds of calls, and of callers, that a soak is made of; what each of them must get.

Strategy: a kind is a coroutine that makes a call in its way, looks at the answer, and returns a word for how it ended.
All that varies comes from the call's own dice, so the seed of a soak decides every call of it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from soak.processes import IDLE_TIMEOUT_S, MAX_BODY_BYTES
from soak.wish import ROLES, Wish
from tests.support.raw_client import RawClient, Response, request

__all__ = ["BROKEN", "KINDS", "Call", "Unwanted", "Wrong"]

# How the end of a connection in the middle of an answer, or before it, shows.
BROKEN = (asyncio.IncompleteReadError, ConnectionError)
METHODS = ("GET", "POST")
# What fal's clients send again by themselves.
REPEATED = (429, 502, 503, 504)
# Of a caller that is not to take more than it reads.
SMALL_BUFFER_BYTES = 16 * 1024
REUSED = 0.8


class Wrong(Exception):
    """An answer that must never be: another's, or one that looks whole and is not."""


class Unwanted(Exception):
    """A call that ended badly, which trouble that was made on purpose explains, or nothing."""


Span = tuple[int, int]
Kind = Callable[["Call"], Awaitable[str]]


@dataclass
class Call:
    """One call. ``idle`` are connections that wait for their next one; ``to_repeat`` gets the numbers of the POSTs that
    the proxy answered with a status that clients repeat: these must not have run."""

    number: int
    port: int
    dice: random.Random
    idle: list[RawClient]
    to_repeat: set[int]
    _opened: list[RawClient] = field(default_factory=list)
    _parts: int = 0

    async def caller(self, *, receive_buffer: int | None = None) -> RawClient:
        """A connection, mostly one that was used before."""
        caller = None
        while self.idle and caller is None and receive_buffer is None and self.dice.random() < REUSED:
            caller = self.idle.pop()
            if caller.reader.at_eof() or caller.reader.exception():
                caller = None
        caller = caller or await RawClient.open(self.port, receive_buffer=receive_buffer)
        self._opened.append(caller)
        return caller

    def keep(self, caller: RawClient, answer: Response) -> None:
        """The connection may serve another call, if the answer says nothing else."""
        if answer.header("connection") != "close":
            self._opened.remove(caller)
            self.idle.append(caller)

    def leave(self) -> None:
        """Close what was opened and not kept."""
        for caller in self._opened:
            caller.leave()

    def wish(self, how: str = "plain", size: int = 0, pause_ms: int = 0, status: int = 200) -> Wish:
        self._parts += 1
        return Wish(how, self.number * 10 + self._parts, size, pause_ms, status)

    def body(self, most: int = 400) -> bytes:
        return b'{"prompt": "%s"}' % (b"%08x" % self.dice.getrandbits(32) * self.dice.randrange(1, most // 8))

    def request(self, method: str, wish: Wish, body: bytes = b"", role: str = "calm") -> bytes:
        return request(method, body, target=f"https://{self.dice.choice(ROLES[role])}{wish.path}")

    async def receive(self, caller: RawClient, method: str, wish: Wish, body: bytes) -> Response:
        """The whole answer, which is the right one or the proxy's own."""
        answer = await caller.response()
        right = wish.answer(body if method == "POST" else b"")
        if is_own(answer):
            if method == "POST" and answer.status in REPEATED:
                self.to_repeat.add(wish.number)
        elif (answer.status, answer.body) != (wish.status, right):
            raise Wrong(
                f"{answer.status}, {len(answer.body)} bytes {answer.body[:100]!r}, not {len(right)} {right[:60]!r}"
            )
        return answer

    async def expect(self, caller: RawClient, method: str, wish: Wish, body: bytes = b"") -> str:
        """The right answer."""
        answer = await self.receive(caller, method, wish, body)
        if is_own(answer):
            raise Unwanted(f"{answer.status} {answer.message}")
        self.keep(caller, answer)
        return str(answer.status)


def is_own(answer: Response) -> bool:
    """Whether the proxy says this by itself."""
    return answer.body.startswith(b'{"message": ')


# Calls that are answered.


async def relay(call: Call, methods: tuple[str, ...], wish: Wish, most_body: int = 400) -> str:
    method, body = call.dice.choice(methods), call.body(most_body)
    caller = await call.caller()
    caller.writer.write(call.request(method, wish, body))
    return await call.expect(caller, method, wish, body)


def plainly(
    methods: tuple[str, ...], how: str = "plain", *, size: Span = (0, 1), pause_ms: Span = (0, 1), body: int = 400
) -> Kind:
    """Calls whose answers have a size and a time in these spans; ``body`` is the most bytes that a POST has."""

    async def relayed(call: Call) -> str:
        return await relay(
            call, methods, call.wish(how, call.dice.randrange(*size), call.dice.randrange(*pause_ms)), body
        )

    return relayed


async def other_status(call: Call) -> str:
    """fal's own errors pass as they are."""
    return await relay(call, METHODS, call.wish(status=call.dice.choice((400, 404, 422, 429, 500, 502, 503, 504))))


async def pipelined(call: Call) -> str:
    """Several requests at once are answered in their order."""
    caller = await call.caller()
    wishes = [call.wish(size=100, pause_ms=call.dice.choice((0, 200))) for _ in range(call.dice.randrange(2, 5))]
    bodies = [call.body() for _ in wishes]
    caller.writer.write(b"".join(call.request("POST", *pair) for pair in zip(wishes, bodies, strict=True)))
    for wish, body in zip(wishes[:-1], bodies, strict=False):
        if is_own(answer := await call.receive(caller, "POST", wish, body)):
            raise Unwanted(f"{answer.status} {answer.message}")
    return await call.expect(caller, "POST", wishes[-1], bodies[-1])


async def slow_upload(call: Call) -> str:
    """The body comes in pieces."""
    caller, wish, body = await call.caller(), call.wish(), call.body(200_000)
    whole = call.request("POST", wish, body)
    for start in range(0, len(whole), 50_000):
        caller.writer.write(whole[start : start + 50_000])
        await asyncio.sleep(call.dice.uniform(0, 0.5))
    return await call.expect(caller, "POST", wish, body)


async def slow_reader(call: Call) -> str:
    """It takes a large answer slowly, and at first nothing at all."""
    caller = await call.caller(receive_buffer=SMALL_BUFFER_BYTES)
    wish, transport = call.wish(size=call.dice.randrange(500_000, 2_000_000)), caller.writer.transport
    assert isinstance(transport, asyncio.Transport)
    caller.writer.write(call.request("GET", wish))
    await asyncio.sleep(call.dice.uniform(0, IDLE_TIMEOUT_S / 2))
    reading = asyncio.ensure_future(call.expect(caller, "GET", wish))
    while not reading.done():
        transport.pause_reading()
        await asyncio.sleep(0.2)
        transport.resume_reading()
        await asyncio.wait([reading], timeout=0.001)  # for a read or two
    return await reading


# Callers that leave.


async def leaves_in_request(call: Call) -> str:
    """Before a word, in the head, or in the body."""
    caller = await call.caller()
    whole = call.request("POST", call.wish(), call.body(call.dice.choice((400, 100_000))))
    caller.writer.write(whole[: call.dice.randrange(len(whole))])
    await asyncio.sleep(call.dice.uniform(0, 0.3))
    return "left"


async def leaves_while_waiting(call: Call) -> str:
    caller = await call.caller()
    caller.writer.write(call.request(call.dice.choice(METHODS), call.wish(pause_ms=2000), call.body()))
    await asyncio.sleep(call.dice.uniform(0, 1.5))
    return "left"


async def leaves_in_answer(call: Call) -> str:
    """In that of a large answer or an event stream, with or without the next request behind it."""
    caller = await call.caller(receive_buffer=SMALL_BUFFER_BYTES)
    wish, most = call.dice.choice(
        ((call.wish(size=3_000_000), 500_000), (call.wish("stream", size=100, pause_ms=20), 1000))
    )
    caller.writer.write(call.request("GET", wish))
    if call.dice.random() < 0.3:
        caller.writer.write(call.request("GET", call.wish()))
    await caller.head()
    await caller.reader.readexactly(call.dice.randrange(1, most))
    return "left"


async def half_closes(call: Call) -> str:
    """It closes its side when it has sent all. That is to leave, unless the answer is there first."""
    caller = await call.caller()
    wish, body = call.wish(pause_ms=call.dice.choice((0, 500))), call.body()
    caller.writer.write(call.request("POST", wish, body))
    caller.writer.write_eof()
    try:
        await call.receive(caller, "POST", wish, body)
    except BROKEN:
        return "closed"
    return "answered"


async def deaf(call: Call) -> str:
    """It reads nothing for longer than it may."""
    caller = await call.caller(receive_buffer=SMALL_BUFFER_BYTES)
    wish, transport = call.wish(size=16_000_000), caller.writer.transport
    assert isinstance(transport, asyncio.Transport)
    caller.writer.write(call.request("GET", wish))
    await caller.head()
    transport.pause_reading()
    await asyncio.sleep(2 * IDLE_TIMEOUT_S)
    transport.resume_reading()
    try:
        await caller.reader.readexactly(wish.size)
    except BROKEN:
        return "broken off"
    raise Unwanted("it was waited for")


# Calls that the proxy refuses.


async def refused(call: Call) -> str:
    body = call.body()
    right = call.request("POST", call.wish(), body)
    status, data = call.dice.choice(
        (
            (400, request("POST", body, target=None)),
            (404, request("POST", body, path="/elsewhere")),
            (405, request("DELETE")),
            (405, request("PUT", headers=["content-length: 0"])),
            (412, request("GET", target="https://fal.run.example/")),
            (412, request("POST", body, target="http://fal.run/")),
            (413, right.replace(b"content-length: ", b"content-length: 99999")),
            (415, right.replace(b"application/json", b"text/plain")),
            (431, request("POST", body, headers=[f"x-fal-{n}: {'x' * 1000}" for n in range(20)])),
        )
    )
    caller = await call.caller()
    caller.writer.write(data)
    answer = await caller.response()
    if answer.status != status or not is_own(answer):
        raise Wrong(f"{answer.status} {answer.body[:200]!r}, not {status}")
    return str(status)


# Faults of fal's: the ends that a GET and a POST may have, and whom it is asked of. "broken" is an answer cut short.

FAULTS = {
    "reset_stream": (("502",), ("500",), "calm"),
    "refuse_stream": (("502",), ("500",), "calm"),
    "stall": (("504",), ("500",), "calm"),
    "stall_in_body": (("broken",), ("500",), "calm"),
    "cut": (("broken", "502"), ("500",), "calm"),
    "cut_stream": (("broken", "502"), ("broken", "500"), "calm"),
    "corrupt": (("broken", "502"), ("500",), "calm"),
    "reset": (("502",), ("500", "502"), "breaking"),
    "close": (("502",), ("500", "502"), "breaking"),
    "go_away": (("200", "502"), ("200", "500"), "going"),
}


def fault(how: str) -> Kind:
    *ends, role = FAULTS[how]

    async def meets(call: Call) -> str:
        method = call.dice.choice(METHODS)
        wish, body = call.wish(how, size=call.dice.randrange(8, 100)), call.body()
        caller = await call.caller()
        caller.writer.write(call.request(method, wish, body, role))
        try:
            answer = await call.receive(caller, method, wish, body)
            call.keep(caller, answer)
            end = str(answer.status)
        except BROKEN:
            end = "broken"
        if end not in ends[METHODS.index(method)]:
            raise Unwanted(f"{method} {end}")
        return f"{method} {end}"

    return meets


# Each kind, and how often it is called.
KINDS: dict[str, tuple[Kind, float]] = {
    "short POST": (plainly(("POST",), size=(0, 400)), 20),
    "short GET": (plainly(("GET",), size=(0, 400)), 14),
    "long poll": (plainly(METHODS, pause_ms=(500, 2500)), 8),
    "large POST": (plainly(("POST",), body=MAX_BODY_BYTES - 1000), 1.5),
    "large answer": (plainly(METHODS, size=(20_000, 1_500_000)), 3),
    "zipped answer": (plainly(METHODS, "zipped", size=(100, 300_000)), 4),
    "event stream": (plainly(METHODS, "stream", size=(1, 60), pause_ms=(0, 40)), 5),
    "error of fal's": (other_status, 4),
    "pipelined": (pipelined, 4),
    "slow upload": (slow_upload, 2),
    "slow reader": (slow_reader, 1),
    "refused": (refused, 4),
    "leaves in request": (leaves_in_request, 5),
    "leaves while waiting": (leaves_while_waiting, 5),
    "leaves in answer": (leaves_in_answer, 4),
    "half-closes": (half_closes, 2),
    "deaf": (deaf, 0.3),
} | {how.replace("_", " "): (fault(how), 0.3 if how.startswith("stall") else 1.0) for how in FAULTS}
