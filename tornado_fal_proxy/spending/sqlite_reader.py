"""Read an SQLite database in a thread of its own, because a report over many rows takes seconds.

Strategy. There is one thread, so reports wait for each other: somebody who asks for many of them at once takes no more
than one core. SQLite works without Python's lock, so the thread of the loop goes on meanwhile.

Nothing is written here.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from sqlite3 import Connection
from typing import Any, TypeVar

__all__ = ["SqliteReader", "has_temporary_files"]

# The instructions of SQLite's machine between two questions whether the reader is closed: some 10 ms.
_INSTRUCTIONS = 1_000_000

_Result = TypeVar("_Result")


class SqliteReader:
    """Read databases one by one."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._closed = False

    async def read(self, connect: Callable[[], Connection], work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Return what ``work`` returns, which the thread calls with the connection and these arguments.

        The thread calls ``connect`` for the connection, and closes it afterwards. Raise sqlite3.Error, also where the
        reader is closed meanwhile.
        """
        self._closed = False
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "account")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, connect, work, arguments)

    def close(self) -> None:
        """Break off what is read, and end the thread. The reader can be used again."""
        self._closed = True
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=False)

    def _read(
        self, connect: Callable[[], Connection], work: Callable[..., _Result], arguments: tuple[Any, ...]
    ) -> _Result:
        with closing(connect()) as db:
            if not has_temporary_files():
                db.execute("PRAGMA temp_store = MEMORY")  # to sort
            db.set_progress_handler(lambda: self._closed, _INSTRUCTIONS)
            return work(db, *arguments)


def has_temporary_files() -> bool:
    """Return whether SQLite can make them: a container may have no folder that can be written."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return False
    return True
