"""Keep what is spent in an SQLite file that all worker processes of a host share, or in the memory of one process.

Strategy. The loop's thread never waits for the file: one thread of the store's own does every operation. All operations
that wait for it share one transaction, so under load a commit, and the file's lock, cost little for each. Their results
go back to the loop at once. This is why the store uses :mod:`sqlite3` and not aiosqlite, which changes threads for
each statement and cannot commit the operations of several calls together. Only the account is read elsewhere
(:mod:`~tornado_fal_proxy.spending.sqlite_reader`), because a report may take seconds.

After kill -9 of a process, everything is there that an operation has reported. After a loss of power, the operations
of the last moments may be missing, because the file is synchronized at checkpoints only (``synchronous=NORMAL``). The
file is never damaged by either.

A process that forks opens its store afterwards. Nobody may remove or replace the file while a process uses it.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from tornado_fal_proxy.spending import sqlite_statements as statements
from tornado_fal_proxy.spending.sqlite_batch import Work, do_all
from tornado_fal_proxy.spending.sqlite_reader import SqliteReader
from tornado_fal_proxy.spending.store import (
    DIMENSIONS,
    END,
    GIVE_BACK,
    RENAME,
    SETTLE,
    Account,
    Note,
    Reservation,
    Standing,
    StoreFailed,
    day_of,
)

__all__ = ["MEMORY", "SqliteStore"]

# The path of a store in memory.
MEMORY = ":memory:"
# Limits the wait for a file that others have locked: as long as a client may wait for a response that says so. Each
# holds it for milliseconds, except a program that the operator runs on the file.
_BUSY_TIMEOUT_S = 5.0
# The time between two attempts to get the file's lock: at first what a transaction takes, and then longer.
_FIRST_PAUSE_S = 0.0005
_MAX_PAUSE_S = 0.02
# Limits the operations of one transaction, about: others wait for the file meanwhile, about 10 ms with so many.
_MAX_BATCH = 200
# The bytes of a page in a new file. A commit writes each page that it changes as a whole, about six of them.
_PAGE_BYTES = 1024
# Limits the pages that wait for a checkpoint: 4 MB, as many bytes as SQLite itself allows with its own pages.
_CHECKPOINT_PAGES = 4000
# The meaning of SQLite's errors to an operator.
_MEANINGS = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "this user may not write the file, or its folder",
    sqlite3.SQLITE_PERM: "this user may not write the file, or its folder",
    sqlite3.SQLITE_CANTOPEN: "cannot open the file: it must be in a folder that exists, and that this user may write",
    sqlite3.SQLITE_IOERR: "reading or writing the file failed: see the system's log",
    sqlite3.SQLITE_NOTADB: "the file is not an SQLite file: name another file",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: stop the proxy, and restore the file or remove it",
    sqlite3.SQLITE_INTERRUPT: "the report was broken off, because the proxy closes",
}
_NOT_OPEN = "{}: the store is not open"

# After these the connection can be used again. The first is that of errors which are not SQLite's.
_KEEPING = (-1, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_FULL)

_Result = TypeVar("_Result")


class _Operation:
    """A piece of work for the store's thread, and what became of it.

    It is a function of the connection with arguments, or, where that is None, reservations and notes. Either a future
    gets the result, or ``done`` is called, with None or the failure.
    """

    __slots__ = ("arguments", "done", "failure", "future", "result", "work", "writes")

    def __init__(
        self,
        work: Callable[..., Any] | None,
        arguments: Sequence[Any],
        writes: bool,
        future: asyncio.Future[Any] | None,
        done: Callable[[StoreFailed | None], None] | None = None,
    ) -> None:
        self.work, self.arguments, self.writes, self.future, self.done = work, arguments, writes, future, done
        self.result: Any = None
        self.failure: tuple[str, Exception] | None = None

    def failed(self) -> StoreFailed | None:
        """Return the failure as an exception; None where there is none."""
        if self.failure is None:
            return None
        text, cause = self.failure
        failed = StoreFailed(text)
        failed.__cause__ = cause
        return failed


class SqliteStore:
    """A :class:`~tornado_fal_proxy.spending.store.Store` in the file ``path``, which it makes, or in memory if None.

    It makes the file's folder only if ``make_folder`` is True, because a folder that somebody named should be there: a
    disk may not be mounted yet.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        busy_timeout_s: float = _BUSY_TIMEOUT_S,
        make_folder: bool = False,
    ) -> None:
        self._path = MEMORY if path is None else os.fspath(path)
        self._busy_timeout_s = busy_timeout_s
        self._make_folder = make_folder
        self._reader = SqliteReader()
        self._asked: list[_Operation] = []  # in this turn of the loop
        self._queue: SimpleQueue[list[_Operation] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        # Only the thread uses these.
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._path!r})"

    async def open(self) -> None:
        """Start the thread and open the file."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._ended = self._loop.create_future()
            self._thread = Thread(target=self._run, name="spending", daemon=True)
            self._thread.start()
        await self._do(_nothing, writes=False)

    async def close(self) -> None:
        """Do what waits, close the file and end the thread."""
        thread, self._thread = self._thread, None
        self._reader.close()
        if thread is not None:
            self._hand_over()
            self._queue.put(None)
        if self._ended is not None:
            await asyncio.shield(self._ended)
        if thread is not None:
            thread.join()

    def reserve(self, job: Reservation) -> asyncio.Future[Standing]:
        """Do Store.reserve."""
        return self._do(None, job)

    async def rename(self, job_id: str, new_id: str) -> None:
        """Do Store.rename."""
        await self._do(None, Note(RENAME, job_id, new_id=new_id))

    async def settle(self, job_id: str, units: int, cost: int | None) -> None:
        """Do Store.settle."""
        await self._do(None, Note(SETTLE, job_id, units, cost))

    async def end(self, job_id: str) -> None:
        """Do Store.end."""
        await self._do(None, Note(END, job_id))

    async def give_back(self, job_id: str) -> None:
        """Do Store.give_back."""
        await self._do(None, Note(GIVE_BACK, job_id))

    def note(self, notes: Sequence[Note], done: Callable[[StoreFailed | None], None]) -> None:
        """Do Store.note."""
        try:
            self._ask(_Operation(None, notes, True, None, done))
        except StoreFailed as exc:
            done(exc)

    async def owner(self, job_id: str) -> str | None:
        """Do Store.owner."""
        return await self._do(statements.owner, job_id, writes=False)

    async def endpoint(self, job_id: str) -> str | None:
        """Do Store.endpoint."""
        return await self._do(statements.endpoint, job_id, writes=False)

    async def usage(self, since: str, until: str, by: Collection[str] = DIMENSIONS, most: int | None = None) -> Account:
        """Do Store.usage."""
        if self._path == MEMORY:
            return await self._do(statements.usage, since, until, by, most, writes=False)
        await self._do(_nothing, writes=False)  # opens the file if it is not open, and checks it
        if self._thread is None:  # closed meanwhile
            raise StoreFailed(_NOT_OPEN.format(self._path))
        try:
            return await self._reader.read(self._connection, statements.usage, since, until, by, most)
        except sqlite3.Error as error:
            raise StoreFailed(f"{self._path}: {self._explain(error)}") from error

    async def prune(self, now: int, account_days: int) -> None:
        """Do Store.prune, in many short transactions."""
        while await self._do(statements.forget_jobs, now):
            pass
        while await self._do(statements.forget_counters, now):
            pass
        while await self._do(statements.forget_days, day_of(now - account_days * 86_400)):
            pass

    def _do(self, work: Callable[..., _Result] | None, *arguments: Any, writes: bool = True) -> asyncio.Future[_Result]:
        """Let the thread call ``work`` with the connection and these arguments."""
        future: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        self._ask(_Operation(work, arguments, writes, future))
        return future

    def _ask(self, operation: _Operation) -> None:
        """Let the thread do an operation, with all that are asked in this turn of the loop."""
        if self._thread is None or self._loop is None:
            raise StoreFailed(_NOT_OPEN.format(self._path))
        if not self._asked:
            self._loop.call_soon(self._hand_over)
        self._asked.append(operation)

    def _hand_over(self) -> None:
        if self._asked:
            self._queue.put(self._asked)
            self._asked = []

    def _connection(self) -> sqlite3.Connection:
        """Return a connection of its own for the reader. With WAL it holds up no operation."""
        uri = Path(self._path).absolute().as_uri() + "?mode=ro"
        return sqlite3.connect(uri, timeout=self._busy_timeout_s, isolation_level=None, uri=True)

    # From here on, everything runs in the store's thread, except _deliver.

    def _run(self) -> None:
        """Do what comes, until the store is closed or the loop is."""
        assert self._loop is not None
        assert self._ended is not None
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            while batch := self._next_batch():
                self._perform(batch)
                self._loop.call_soon_threadsafe(_deliver, batch)
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_set, self._ended)

    def _next_batch(self) -> list[_Operation]:
        """Wait for operations, and return them with all that wait behind. Return none when the store is closed."""
        batch: list[_Operation] = []
        operations = self._queue.get()
        with suppress(Empty):
            while operations is not None:
                batch += operations
                if len(batch) >= _MAX_BATCH:
                    return batch
                operations = self._queue.get_nowait()
            if batch:
                self._queue.put(None)  # ends the thread after this batch
        return batch

    def _perform(self, batch: list[_Operation]) -> None:
        """Do operations in one transaction: all, or those that can be done, or none."""
        deadline = time.monotonic() + self._busy_timeout_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                self._transact(batch)
            except Exception as error:  # noqa: BLE001 an operation that fails must not end the thread
                code = _code(error)
                self._leave(keep=code in _KEEPING)
                if code == sqlite3.SQLITE_BUSY and time.monotonic() < deadline:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, _MAX_PAUSE_S)
                    continue
                if len(batch) > 1 and not _concerns_the_file(error):
                    for operation in batch:
                        self._perform([operation])
                    return
                text = f"{self._path}: {self._explain(error)}"
                for operation in batch:
                    operation.failure = text, error
            return

    def _transact(self, batch: list[_Operation]) -> None:
        db = self._connected()
        db.execute("BEGIN IMMEDIATE" if any(operation.writes for operation in batch) else "BEGIN")
        waiting: list[_Operation] = []
        for operation in batch:
            if operation.work is None:
                waiting.append(operation)
                continue
            _do_together(db, waiting)
            waiting = []
            operation.result = operation.work(db, *operation.arguments)
        _do_together(db, waiting)
        db.execute("COMMIT")

    def _leave(self, keep: bool) -> None:
        """Roll back after a failure. Close the file unless it is to be kept: the next operation opens it."""
        if self._db is None:
            return
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.rollback()
            if keep or self._path == MEMORY:
                return
        with suppress(sqlite3.Error):
            self._db.close()
        self._db = None

    def _connected(self) -> sqlite3.Connection:
        """Return the connection. Open it first if there is none, and make what the file lacks."""
        if self._db is None:
            if self._path != MEMORY:
                if self._make_folder:
                    os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
                # sqlite3 would make it with the rights that the process' umask leaves to others.
                with suppress(FileExistsError):
                    os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
                if not os.access(self._path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                    # SQLite would make files beside it that cannot be written either, and would leave them.
                    raise StoreFailed(_MEANINGS[sqlite3.SQLITE_READONLY])
            # The wait for a lock is _perform's: SQLite's own is for up to 100 ms in one piece.
            db = sqlite3.connect(self._path, timeout=0, isolation_level=None)
            try:
                db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
                db.execute("PRAGMA journal_mode = WAL").fetchone()
                db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
                db.execute("PRAGMA synchronous = NORMAL")
                self._prepare(db)
            except Exception:
                db.close()  # also where it is busy: the next attempt begins again
                raise
            self._db, self._file = db, self._identity()
        elif self._file != self._identity():
            # Opened again it could lose what the others, who have not noticed yet, still write to it.
            raise StoreFailed("somebody removed or replaced the file: restart all processes that use it")
        return self._db

    def _identity(self) -> tuple[int, int] | None:
        if self._path == MEMORY:
            return None
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Make the tables in a new file. Refuse a file that is not the store's, or a newer version's."""
        db.execute("BEGIN IMMEDIATE")
        version, application = _pragma(db, "user_version"), _pragma(db, "application_id")
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and application != statements.APPLICATION_ID:
            raise StoreFailed("the file belongs to another program: name another file")
        if version > statements.SCHEMA_VERSION:
            raise StoreFailed(f"a newer version of the proxy made the file (its schema is {version}): use that version")
        if not tables:
            for statement in statements.SCHEMA.split(";")[:-1]:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {statements.APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {statements.SCHEMA_VERSION}")
        db.execute("COMMIT")

    def _explain(self, error: Exception) -> str:
        """Return a line for the operator."""
        code = _code(error)
        if code == sqlite3.SQLITE_BUSY:
            return f"another program has kept the file locked for {self._busy_timeout_s:g} s"
        if isinstance(error, FileNotFoundError):
            return _MEANINGS[sqlite3.SQLITE_CANTOPEN]
        if isinstance(error, OSError):
            return f"cannot make the file: {error.strerror}"
        return _MEANINGS.get(code, str(error) if isinstance(error, StoreFailed) else f"{type(error).__name__}: {error}")


def _do_together(db: sqlite3.Connection, operations: Sequence[_Operation]) -> None:
    """Do reservations and notes. The result of an operation is that of its last one."""
    work: list[Work] = [each for operation in operations for each in operation.arguments]
    if work:
        results = iter(do_all(db, work))
        for operation in operations:
            for _ in operation.arguments:
                operation.result = next(results)


def _deliver(batch: list[_Operation]) -> None:
    """Tell those who wait."""
    for operation in batch:
        future = operation.future
        failed = None if operation.failure is None else operation.failed()
        if future is None:
            if operation.done is not None:
                operation.done(failed)
        elif future.done():  # its caller was cancelled
            continue
        elif failed is None:
            future.set_result(operation.result)
        else:
            future.set_exception(failed)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _nothing(_db: sqlite3.Connection) -> None:
    """Do nothing: to open the file is all."""


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def _code(error: Exception) -> int:
    """Return SQLite's code of an error, without what makes it an extended one; -1 for other errors."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return -1 if code is None else code & 0xFF


def _concerns_the_file(error: Exception) -> bool:
    """Tell whether an error is that of every operation: it comes from the file, not from one operation's values."""
    if isinstance(error, sqlite3.DatabaseError):
        return not isinstance(error, sqlite3.IntegrityError | sqlite3.DataError | sqlite3.ProgrammingError)
    return isinstance(error, OSError | StoreFailed)
