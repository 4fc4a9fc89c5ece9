"""Receive the notifications that the service sends to systemd."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.waiting import TIMEOUT_S

__all__ = ["notification", "notified", "within"]


@asynccontextmanager
async def notified(tmp_path: Path, abstract: bool = False) -> AsyncIterator[tuple[str, socket.socket]]:
    """Yield a value for $NOTIFY_SOCKET, and the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.setblocking(False)
        name = f"\0test-{os.getpid()}-{time.monotonic_ns()}" if abstract else str(tmp_path / "notify")
        manager.bind(name)
        yield name.replace("\0", "@"), manager


async def notification(manager: socket.socket) -> str:
    """Return the next notification."""
    async with asyncio.timeout(TIMEOUT_S):
        return (await asyncio.get_running_loop().sock_recv(manager, 4096)).decode()


async def within(seconds: float, manager: socket.socket) -> bytes | None:
    """Return the next notification, None if there is none in that time."""
    try:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(manager, 4096), seconds)
    except TimeoutError:
        return None
