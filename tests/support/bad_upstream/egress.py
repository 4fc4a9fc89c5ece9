"""A proxy on the way out of the network."""

import asyncio
from contextlib import suppress
from typing import Self

__all__ = ["EgressProxy"]


class EgressProxy:
    """A proxy on the way out: it responds to CONNECT with a head of its own, and leads every host to one address."""

    def __init__(self, address: str) -> None:
        #: The response to CONNECT. Where that is no success, the connection is closed behind it.
        self.response = b"HTTP/1.1 200 Connection established\r\ncontent-type: text/egress\r\nx-egress: 1\r\n\r\n"
        self._host, _, self._port = address.rpartition(":")
        #: The target of each CONNECT.
        self.connects: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self._server.sockets[0].getsockname())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        # asyncio's streams log a cancelled task as an error until Python 3.12.
        with suppress(asyncio.CancelledError):
            await self._lead(reader, writer)

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head_bytes = await reader.readuntil(b"\r\n\r\n")
        self.connects.append(head_bytes.split(b" ")[1].decode())
        writer.write(self.response)
        if b" 200 " not in self.response:
            writer.close()
            return
        their_reader, their_writer = await asyncio.open_connection(self._host, self._port)
        try:
            await asyncio.wait(
                [asyncio.create_task(_copy(reader, their_writer)), asyncio.create_task(_copy(their_reader, writer))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for each in (writer, their_writer):
                each.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while content := await reader.read(65536):
            writer.write(content)
            await writer.drain()
