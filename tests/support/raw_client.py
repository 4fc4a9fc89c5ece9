"""A client that shows exactly what it received: each chunk by itself, and how the connection ended."""

import asyncio
import json
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tests.support import leftovers
from tests.support.proxy import ROUTE

__all__ = ["RESULT", "TARGET", "RawClient", "Response", "call", "request"]

# A run of a model, and the result of a queued job, which is read again at no cost.
TARGET = "https://fal.run/fal-ai/flux/dev"
RESULT = "https://queue.fal.run/fal-ai/flux/requests/764cabcf-b745-4b3e-ae38-1200304cf45b"
BY_METHOD = "RESULT for a GET, else TARGET"


def request(
    method: str = "POST",
    body: bytes = b"{}",
    *,
    target: str | None = BY_METHOD,
    headers: Iterable[str] = (),
    version: str = "HTTP/1.1",
    path: str = ROUTE,
) -> bytes:
    """Return a request as fal's SDKs send one. ``headers`` are whole lines."""
    if target == BY_METHOD:
        target = RESULT if method == "GET" else TARGET
    lines = [f"{method} {path} {version}", "Host: app.example"]
    if target is not None:
        lines.append(f"x-fal-target-url: {target}")
    if method == "POST":
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    lines += headers
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body if method == "POST" else b"")


@dataclass
class Response:
    """A whole response. ``headers`` are pairs in the order received, names in lower case."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> str | None:
        """Return the value of a header that is present at most once."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, f"{name} is present {len(values)} times"
        return values[0] if values else None

    @property
    def message(self) -> str:
        """Return the message of a response that the proxy made by itself."""
        assert self.header("content-type") == "application/json"
        content = json.loads(self.body)
        assert list(content) == ["message"]
        return str(content["message"])


class RawClient:
    """One connection to the proxy."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    began = False  # whether a byte of the response to the last request has come

    def __init__(self) -> None:
        leftovers.add(self)

    @classmethod
    async def open(cls, port: int, *, receive_buffer: int | None = None) -> "RawClient":
        """Connect. With a small ``receive_buffer`` the proxy notices sooner that the client does not read."""
        client = cls()
        connected = socket.socket()
        if receive_buffer is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connected.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connected, ("127.0.0.1", port))
        except OSError:
            connected.close()
            raise
        client.reader, client.writer = await asyncio.open_connection(sock=connected, limit=2**16)
        return client

    async def send(self, *args: Any, **kwargs: Any) -> None:
        self.began = False
        self.writer.write(request(*args, **kwargs))
        await self.writer.drain()

    async def head(self) -> Response:
        """Read the head of the response, and skip interim responses (1xx)."""
        while True:
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
            self.began = True
            status = int(lines[0].split(" ")[1])
            pairs = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
            if status >= 200:
                return Response(status, pairs)

    async def chunk(self) -> bytes:
        """Read the next chunk of a chunked body as it was framed, ``b""`` for the last."""
        size = int((await self.reader.readuntil(b"\r\n"))[:-2], 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def response(self) -> Response:
        """Read the whole response."""
        response = await self.head()
        await self.rest(response)
        return response

    async def rest(self, response: Response) -> None:
        """Read the body that belongs to the head ``response``."""
        if response.header("transfer-encoding") == "chunked":
            while chunk := await self.chunk():
                response.body += chunk
        elif (length := response.header("content-length")) is not None:
            response.body = await self.reader.readexactly(int(length))
        elif response.status not in (204, 304):
            response.body = await self.reader.read(-1)

    async def response_is_over(self) -> bool:
        """Tell whether nothing has arrived after the response."""
        await asyncio.sleep(0.01)
        return not self.reader._buffer  # type: ignore[attr-defined]

    def leave(self) -> None:
        """Close the connection at once."""
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def abandon(self) -> None:
        """Close the connection if it was made."""
        if hasattr(self, "writer"):
            self.leave()
            await self.close()


async def call(port: int, *args: Any, **kwargs: Any) -> Response:
    """Send one request on a connection of its own, and return its whole response."""
    client = await RawClient.open(port)
    try:
        await client.send(*args, **kwargs)
        return await client.response()
    finally:
        await client.close()
