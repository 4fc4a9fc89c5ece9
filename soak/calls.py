"""The kinds of calls, and of clients, that a soak is made of, with the response that each of them must get.

Strategy: a kind is a coroutine that makes a call in its way, checks the response, and returns a word for how the call
ended. All that varies comes from the call's own dice, so the seed of a soak decides every call of it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from soak.processes import IDLE_TIMEOUT_S, MAX_BODY_BYTES
from soak.scenario import ROLES, Scenario
from tests.support.raw_client import RawClient, Response, request

__all__ = ["ABORTED", "KINDS", "SoakCall", "UnexpectedEnd", "WrongResponse"]

# The exceptions of a client whose connection ends before a response, or in the middle of it.
ABORTED = (asyncio.IncompleteReadError, ConnectionError)
METHODS = ("GET", "POST")
# The statuses after which fal's SDKs send a call again by themselves.
REPEATED = (429, 502, 503, 504)
# Limits what the kernel takes for a client that reads slowly: little, so the proxy notices soon.
SMALL_BUFFER_BYTES = 16 * 1024
# The share of calls that use a connection of an earlier one again, if there is one.
REUSED = 0.8


class WrongResponse(Exception):
    """Report a response that must never be: another call's, or one that looks whole and is not."""


class UnexpectedEnd(Exception):
    """Report a call that ended badly. Only trouble that was made on purpose excuses it."""


Span = tuple[int, int]
Kind = Callable[["SoakCall"], Awaitable[str]]


@dataclass
class SoakCall:
    """One call. ``idle`` are connections that wait for their next call.

    ``to_repeat`` gets the numbers of the POSTs that the proxy answered with a status that fal's SDKs repeat. These must
    not have run.
    """

    number: int
    port: int
    dice: random.Random
    idle: list[RawClient]
    to_repeat: set[int]
    _opened: list[RawClient] = field(default_factory=list)
    _parts: int = 0

    async def client(self, *, receive_buffer: int | None = None) -> RawClient:
        """Return a connection, mostly one that was used before."""
        client = None
        while self.idle and client is None and receive_buffer is None and self.dice.random() < REUSED:
            client = self.idle.pop()
            if client.reader.at_eof() or client.reader.exception():
                client = None
        client = client or await RawClient.open(self.port, receive_buffer=receive_buffer)
        self._opened.append(client)
        return client

    def keep(self, client: RawClient, response: Response) -> None:
        """Keep the connection for another call, unless the response announces its end."""
        if response.header("connection") != "close":
            self._opened.remove(client)
            self.idle.append(client)

    def close(self) -> None:
        """Close the connections that were opened and not kept."""
        for client in self._opened:
            client.leave()

    def scenario(self, how: str = "plain", size: int = 0, pause_ms: int = 0, status: int = 200) -> Scenario:
        """Return a scenario with a number of its own."""
        self._parts += 1
        return Scenario(how, self.number * 10 + self._parts, size, pause_ms, status)

    def body(self, max_bytes: int = 400) -> bytes:
        """Return the body of a POST."""
        return b'{"prompt": "%s"}' % (b"%08x" % self.dice.getrandbits(32) * self.dice.randrange(1, max_bytes // 8))

    def request(self, method: str, scenario: Scenario, body: bytes = b"", role: str = "calm") -> bytes:
        """Return the request, as bytes, to one of the hosts of a role."""
        return request(method, body, target=f"https://{self.dice.choice(ROLES[role])}{scenario.path}")

    async def receive(self, client: RawClient, method: str, scenario: Scenario, body: bytes) -> Response:
        """Return the whole response, which is the right one or the proxy's own. Raise WrongResponse."""
        response = await client.response()
        right = scenario.response_body(body if method == "POST" else b"")
        if is_own(response):
            if method == "POST" and response.status in REPEATED:
                self.to_repeat.add(scenario.number)
        elif (response.status, response.body) != (scenario.status, right):
            begin = f"{response.status}, {len(response.body)} bytes {response.body[:100]!r}"
            raise WrongResponse(f"{begin}, not {len(right)} {right[:60]!r}")
        return response

    async def expect(self, client: RawClient, method: str, scenario: Scenario, body: bytes = b"") -> str:
        """Return the status of the right response. Raise UnexpectedEnd where it is the proxy's own."""
        response = await self.receive(client, method, scenario, body)
        if is_own(response):
            raise UnexpectedEnd(f"{response.status} {response.message}")
        self.keep(client, response)
        return str(response.status)


def is_own(response: Response) -> bool:
    """Tell whether the proxy made this response by itself."""
    return response.body.startswith(b'{"message": ')


# Calls that get fal's response.


async def relay(call: SoakCall, methods: tuple[str, ...], scenario: Scenario, max_body: int = 400) -> str:
    method, body = call.dice.choice(methods), call.body(max_body)
    client = await call.client()
    client.writer.write(call.request(method, scenario, body))
    return await call.expect(client, method, scenario, body)


def plainly(
    methods: tuple[str, ...], how: str = "plain", *, size: Span = (0, 1), pause_ms: Span = (0, 1), max_body: int = 400
) -> Kind:
    """Return a kind of calls whose responses have a size and a time in these spans, and POSTs up to ``max_body``."""

    async def relayed(call: SoakCall) -> str:
        scenario = call.scenario(how, call.dice.randrange(*size), call.dice.randrange(*pause_ms))
        return await relay(call, methods, scenario, max_body)

    return relayed


async def other_status(call: SoakCall) -> str:
    """Get one of fal's own errors, which pass as they are."""
    statuses = (400, 404, 422, 429, 500, 502, 503, 504)
    return await relay(call, METHODS, call.scenario(status=call.dice.choice(statuses)))


async def pipelined(call: SoakCall) -> str:
    """Send several requests at once, and get the responses in their order."""
    client = await call.client()
    scenarios = [call.scenario(size=100, pause_ms=call.dice.choice((0, 200))) for _ in range(call.dice.randrange(2, 5))]
    bodies = [call.body() for _ in scenarios]
    client.writer.write(b"".join(call.request("POST", *pair) for pair in zip(scenarios, bodies, strict=True)))
    for scenario, body in zip(scenarios[:-1], bodies, strict=False):
        if is_own(response := await call.receive(client, "POST", scenario, body)):
            raise UnexpectedEnd(f"{response.status} {response.message}")
    return await call.expect(client, "POST", scenarios[-1], bodies[-1])


async def slow_upload(call: SoakCall) -> str:
    """Send the body in pieces."""
    client, scenario, body = await call.client(), call.scenario(), call.body(200_000)
    whole = call.request("POST", scenario, body)
    for start in range(0, len(whole), 50_000):
        client.writer.write(whole[start : start + 50_000])
        await asyncio.sleep(call.dice.uniform(0, 0.5))
    return await call.expect(client, "POST", scenario, body)


async def slow_reader(call: SoakCall) -> str:
    """Read a large response slowly, and at first nothing at all."""
    client = await call.client(receive_buffer=SMALL_BUFFER_BYTES)
    scenario, transport = call.scenario(size=call.dice.randrange(500_000, 2_000_000)), client.writer.transport
    assert isinstance(transport, asyncio.Transport)
    client.writer.write(call.request("GET", scenario))
    await asyncio.sleep(call.dice.uniform(0, IDLE_TIMEOUT_S / 2))
    reading = asyncio.ensure_future(call.expect(client, "GET", scenario))
    while not reading.done():
        transport.pause_reading()
        await asyncio.sleep(0.2)
        transport.resume_reading()
        await asyncio.wait([reading], timeout=0.001)  # long enough for a read or two
    return await reading


# Clients that leave.


async def leaves_in_request(call: SoakCall) -> str:
    """Leave before the first byte, in the head, or in the body."""
    client = await call.client()
    whole = call.request("POST", call.scenario(), call.body(call.dice.choice((400, 100_000))))
    client.writer.write(whole[: call.dice.randrange(len(whole))])
    await asyncio.sleep(call.dice.uniform(0, 0.3))
    return "left"


async def leaves_while_waiting(call: SoakCall) -> str:
    client = await call.client()
    client.writer.write(call.request(call.dice.choice(METHODS), call.scenario(pause_ms=2000), call.body()))
    await asyncio.sleep(call.dice.uniform(0, 1.5))
    return "left"


async def leaves_in_response(call: SoakCall) -> str:
    """Leave in a large response or an event stream, with or without the next request behind the first."""
    client = await call.client(receive_buffer=SMALL_BUFFER_BYTES)
    scenario, max_read = call.dice.choice(
        ((call.scenario(size=3_000_000), 500_000), (call.scenario("stream", size=100, pause_ms=20), 1000))
    )
    client.writer.write(call.request("GET", scenario))
    if call.dice.random() < 0.3:
        client.writer.write(call.request("GET", call.scenario()))
    await client.head()
    await client.reader.readexactly(call.dice.randrange(1, max_read))
    return "left"


async def half_closes(call: SoakCall) -> str:
    """Close this side when all is sent. The client has left with that, unless the response is there first."""
    client = await call.client()
    scenario, body = call.scenario(pause_ms=call.dice.choice((0, 500))), call.body()
    client.writer.write(call.request("POST", scenario, body))
    client.writer.write_eof()
    try:
        await call.receive(client, "POST", scenario, body)
    except ABORTED:
        return "closed"
    return "answered"


async def stops_reading(call: SoakCall) -> str:
    """Read nothing for longer than the proxy allows."""
    client = await call.client(receive_buffer=SMALL_BUFFER_BYTES)
    scenario, transport = call.scenario(size=16_000_000), client.writer.transport
    assert isinstance(transport, asyncio.Transport)
    client.writer.write(call.request("GET", scenario))
    await client.head()
    transport.pause_reading()
    await asyncio.sleep(2 * IDLE_TIMEOUT_S)
    transport.resume_reading()
    try:
        await client.reader.readexactly(scenario.size)
    except ABORTED:
        return "aborted"
    raise UnexpectedEnd("the proxy waited for it")


# Calls that the proxy refuses.


async def refused(call: SoakCall) -> str:
    body = call.body()
    right = call.request("POST", call.scenario(), body)
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
    client = await call.client()
    client.writer.write(data)
    response = await client.response()
    if response.status != status or not is_own(response):
        raise WrongResponse(f"{response.status} {response.body[:200]!r}, not {status}")
    return str(status)


# Faults of fal's: the ends that a call may have, and the role of the hosts that have the fault. All targets are those
# of paid calls. A response that is "aborted" has begun and is never whole.

FAULTS = {
    "reset_stream": (("500",), "calm"),
    "refuse_stream": (("500",), "calm"),
    "stall": (("500",), "calm"),
    "stall_in_body": (("500",), "calm"),
    "abort_in_body": (("500",), "calm"),
    "abort_stream": (("aborted", "500"), "calm"),
    "corrupt": (("500",), "calm"),
    "reset": (("500", "502"), "breaking"),
    "close": (("500", "502"), "breaking"),
    "go_away": (("200", "500"), "going"),
}


def fault(how: str) -> Kind:
    """Return the kind of calls that meet a fault."""
    ends, role = FAULTS[how]

    async def meets(call: SoakCall) -> str:
        method = call.dice.choice(METHODS)
        scenario, body = call.scenario(how, size=call.dice.randrange(8, 100)), call.body()
        client = await call.client()
        client.writer.write(call.request(method, scenario, body, role))
        try:
            response = await call.receive(client, method, scenario, body)
            call.keep(client, response)
            end = str(response.status)
        except ABORTED:
            end = "aborted"
        if end not in ends:
            raise UnexpectedEnd(f"{method} {end}")
        return f"{method} {end}"

    return meets


# Each kind, and its weight among all calls.
KINDS: dict[str, tuple[Kind, float]] = {
    "short POST": (plainly(("POST",), size=(0, 400)), 20),
    "short GET": (plainly(("GET",), size=(0, 400)), 14),
    "long poll": (plainly(METHODS, pause_ms=(500, 2500)), 8),
    "large POST": (plainly(("POST",), max_body=MAX_BODY_BYTES - 1000), 1.5),
    "large response": (plainly(METHODS, size=(20_000, 1_500_000)), 3),
    "zipped response": (plainly(METHODS, "zipped", size=(100, 300_000)), 4),
    "event stream": (plainly(METHODS, "stream", size=(1, 60), pause_ms=(0, 40)), 5),
    "error of fal's": (other_status, 4),
    "pipelined": (pipelined, 4),
    "slow upload": (slow_upload, 2),
    "slow reader": (slow_reader, 1),
    "refused": (refused, 4),
    "leaves in request": (leaves_in_request, 5),
    "leaves while waiting": (leaves_while_waiting, 5),
    "leaves in response": (leaves_in_response, 4),
    "half-closes": (half_closes, 2),
    "stops reading": (stops_reading, 0.3),
} | {how.replace("_", " "): (fault(how), 0.3 if how.startswith("stall") else 1.0) for how in FAULTS}
