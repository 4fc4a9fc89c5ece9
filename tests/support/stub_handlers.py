"""Handlers for the scripted upstream where a test needs nothing special of it."""

import asyncio

from tests.support.scripted_upstream import Exchange, Handler

__all__ = [
    "EVENT",
    "EVENT_STREAM",
    "JSON",
    "Gate",
    "as_asked",
    "fine",
    "must_not_be_called",
    "resets",
    "responds",
    "silent",
]

JSON = [("content-type", "application/json")]
EVENT_STREAM = [("content-type", "text/event-stream")]
EVENT = b'data: {"n": 1}\n\n'


def responds(status: int = 200, body: bytes = b"{}", headers: list[tuple[str, str]] = JSON) -> Handler:
    """Return a handler that takes the whole request and sends that response."""

    async def handler(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.respond(status, body, headers)

    return handler


#: Takes the whole request and responds with an empty JSON object.
fine = responds()


async def silent(exchange: Exchange) -> None:
    """Take the whole request and never respond."""
    await exchange.body()


async def resets(exchange: Exchange) -> None:
    """Take the whole request and break the connection."""
    await exchange.body()
    exchange.abort_connection()


async def must_not_be_called(exchange: Exchange) -> None:
    """Fail the test: the request must not leave the proxy."""
    raise AssertionError(f"{exchange} reached fal")


async def as_asked(exchange: Exchange) -> None:
    """Act as the last segment of the target names: ``early``, ``silent``, ``resets``, ``stream``, ``breaks``, ..."""
    action = exchange.target.partition(b"?")[0].rpartition(b"/")[2]
    if action == b"early":
        await exchange.respond(422, b"{}")
    await exchange.body()
    if action == b"silent":
        return
    if action == b"resets":
        exchange.reset()
    elif action in (b"stream", b"breaks", b"endless"):
        await exchange.start(200, [*EVENT_STREAM, ("x-fal-request-id", "fal-7")])
        await exchange.send(EVENT)
        if action == b"breaks":
            exchange.reset()
        elif action == b"stream":
            await exchange.end()
    elif action == b"large":
        await exchange.respond(200, bytes(8_000_000), JSON)
    elif action != b"early":
        await exchange.respond(200, b"[1]", [*JSON, ("x-fal-request-id", "fal-7")])


class Gate:
    """A handler that responds to all requests when the gate is opened, and not before."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.body()
        await self.open.wait()
        await exchange.respond(200, b"{}", JSON)
