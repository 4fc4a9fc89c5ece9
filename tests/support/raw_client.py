"""A caller that shows what was really sent to it: each chunk by itself, and how the connection ended."""

import asyncio
import json
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tests.support.proxy import ROUTE

__all__ = ["TARGET", "RawClient", "Response", "call", "request"]

TARGET = "https://fal.run/fal-ai/flux/dev"


def request(
    method: str = "POST",
    body: bytes = b"{}",
    *,
    target: str | None = TARGET,
    headers: Iterable[str] = (),
    version: str = "HTTP/1.1",
    path: str = ROUTE,
) -> bytes:
    """A request as fal's clients send one. ``headers`` are whole lines."""
    lines = [f"{method} {path} {version}", "Host: app.example"]
    if target is not None:
        lines.append(f"x-fal-target-url: {target}")
    if method == "POST":
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    lines += headers
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body if method == "POST" else b"")


@dataclass
class Response:
    """A whole answer. ``headers`` are pairs in the order received, names in lower case."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, f"{name} is there {len(values)} times"
        return values[0] if values else None

    @property
    def message(self) -> str:
        assert self.header("content-type") == "application/json"
        content = json.loads(self.body)
        assert list(content) == ["message"]
        return str(content["message"])


class RawClient:
    """One connection to the proxy."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, port: int, *, receive_buffer: int | None = None) -> "RawClient":
        """Connect. A small ``receive_buffer`` makes a caller that does not read felt soon."""
        caller = cls()
        connected = socket.socket()
        if receive_buffer is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connected.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connected, ("127.0.0.1", port))
        except OSError:
            connected.close()
            raise
        caller.reader, caller.writer = await asyncio.open_connection(sock=connected, limit=2**16)
        return caller

    async def send(self, *args: Any, **kwargs: Any) -> None:
        self.writer.write(request(*args, **kwargs))
        await self.writer.drain()

    async def head(self) -> Response:
        """The head of the answer, interim answers (1xx) skipped."""
        while True:
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
            status = int(lines[0].split(" ")[1])
            pairs = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
            if status >= 200:
                return Response(status, pairs)

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body as it was framed, ``b""`` for the last."""
        size = int((await self.reader.readuntil(b"\r\n"))[:-2], 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def response(self) -> Response:
        """The whole answer."""
        answer = await self.head()
        await self.rest(answer)
        return answer

    async def rest(self, answer: Response) -> None:
        """Read the body behind that head."""
        if answer.header("transfer-encoding") == "chunked":
            while chunk := await self.chunk():
                answer.body += chunk
        elif (length := answer.header("content-length")) is not None:
            answer.body = await self.reader.readexactly(int(length))
        elif answer.status not in (204, 304):
            answer.body = await self.reader.read(-1)

    async def response_is_over(self) -> bool:
        """Whether nothing came behind the answer."""
        await asyncio.sleep(0.01)
        return not self.reader._buffer  # type: ignore[attr-defined]

    def leave(self) -> None:
        """Close at once."""
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


async def call(port: int, *args: Any, **kwargs: Any) -> Response:
    """One request on a connection of its own, and its whole answer."""
    caller = await RawClient.open(port)
    try:
        await caller.send(*args, **kwargs)
        return await caller.response()
    finally:
        await caller.close()
