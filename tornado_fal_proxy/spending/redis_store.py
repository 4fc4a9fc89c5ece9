"""Keep what is spent in a Redis, or a Valkey, that the services of several hosts share.

Strategy. All operations on jobs that wait are sent at once on the one connection, in order, and one script does them
(``redis_scripts``), because a command costs much more in the library than an operation does. The script does nothing
where an operation comes a second time. After a connection broke they are sent once more, because the proxy cannot
know whether Redis did them. Nothing is sent again when Redis is slow, because clients wait. A reservation that failed
is given back when Redis responds again. Everything in Redis has a time to live.

Redis must be set to keep what it has (``maxmemory-policy noeviction``, which is its default). A job that it
forgets, by eviction or by the loss of a server that has not replicated yet, is free for its user.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from hashlib import sha1
from typing import Any, cast
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import ConnectionError as ConnectionBroken
from redis.exceptions import TimeoutError as RedisTimeout

from tornado_fal_proxy.spending import redis_scripts
from tornado_fal_proxy.spending.redis_account import RedisAccount
from tornado_fal_proxy.spending.sqlite_reader import SqliteReader
from tornado_fal_proxy.spending.store import (
    COUNTER_KEPT_S,
    DIMENSIONS,
    END,
    GIVE_BACK,
    JOB_KEPT_S,
    RENAME,
    SETTLE,
    Account,
    Counter,
    Note,
    Reservation,
    Standing,
    StoreFailed,
    day_of,
)

__all__ = ["RedisStore"]

# Limits the wait for a connection, and for a response. A Redis nearby needs a millisecond for both. One that needs a
# second is in trouble, and a client of the proxy waits for it.
_CONNECT_TIMEOUT_S = 1.0
_RESPONSE_TIMEOUT_S = 1.0
# Limits an attempt as a whole, of which the library makes several waits.
_TIMEOUT_S = 2.0
# Limits the operations that are sent at once: Redis needs about 5 ms for so many, and others wait meanwhile.
_MAX_BATCH = 200
# Limits the reservations to give back when Redis responds again: far more than clients make while they wait for it.
_MAX_DOUBTFUL = 10_000
# The prefix of all keys. The braces are the hash tag.
_PREFIX = "{fal-proxy}:"
_DAY_S = 86_400
# Limits the life of the account's days until prune() tells another limit. It is the default of the option account_days.
_ACCOUNT_DAYS = 400
# The rows of the account that Redis returns at once: others wait for half a millisecond, and the loop works for two.
_ROWS_AT_ONCE = 200
_NOT_REFUSED = -2
_json = json.JSONEncoder(ensure_ascii=False).encode
_SHA1 = {script: sha1(script.encode(), usedforsecurity=False).hexdigest() for script in redis_scripts.ALL}
_DAYS = f"{_PREFIX}days"


class _Operation:
    """A command for Redis, or operations on jobs in JSON, and what is called with the result, or with an error.

    ``undo`` is the job to give back where its outcome is not known.
    """

    __slots__ = ("command", "done", "undo", "work")

    def __init__(
        self,
        done: Callable[[Any], None],
        *,
        command: Sequence[Any] = (),
        work: Sequence[bytes] = (),
        undo: str | None = None,
    ) -> None:
        self.done, self.command, self.work, self.undo = done, command, work, undo


class RedisStore:
    """A :class:`~tornado_fal_proxy.spending.store.Store` at a URL such as ``redis://:PASSWORD@HOST:6379/0``.

    With the scheme ``rediss`` over TLS. An impossible URL raises ValueError.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if not parts.hostname or (not parts.path.removeprefix("/").isdecimal() and parts.path not in ("", "/")):
            raise ValueError("a URL for Redis has a host, and a number as its path")
        # Without user, password and query, in which a password may be too.
        self._name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        # Before version 6 the library does not compare names with certificates by itself.
        verify: dict[str, Any] = {}
        if parts.scheme == "rediss" and "ssl_cert_reqs" not in parts.query:
            verify = {"ssl_check_hostname": True}
        try:
            self._redis = Redis.from_url(
                url,
                decode_responses=True,
                socket_connect_timeout=_CONNECT_TIMEOUT_S,
                socket_timeout=_RESPONSE_TIMEOUT_S,
                # Versions of the library differ in what they try again by themselves.
                retry=Retry(NoBackoff(), 0),
                **verify,
            )
            pool = self._redis.connection_pool
            # The library's pool, and its pipeline, cost more than all of a batch's operations.
            self._connection: Any = pool.make_connection()  # type: ignore[no-untyped-call]
        except (TypeError, RedisError):
            raise ValueError("an option in the URL for Redis is unknown, or has an impossible value") from None
        self._password = str(pool.connection_kwargs.get("password") or "")
        self._account_ttl_s = _ACCOUNT_DAYS * _DAY_S
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[_Operation] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._doubtful: deque[str] = deque(maxlen=_MAX_DOUBTFUL)
        self._reading, self._reader = asyncio.Lock(), SqliteReader()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r})"

    async def open(self) -> None:
        """Connect."""
        self._loop = asyncio.get_running_loop()
        await self._do("PING")

    async def close(self) -> None:
        """Do what waits, and disconnect."""
        self._loop = None
        self._reader.close()
        if self._sender is not None:
            await asyncio.shield(self._sender)
        with suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(_TIMEOUT_S):
                await self._connection.disconnect()

    async def reserve(self, job: Reservation) -> Standing:
        """Do Store.reserve."""
        day = day_of(job.at)
        job_counters, cost_counters = _keys(job.job_counters), _keys(job.cost_counters)
        counters = (*job.job_counters, *job.cost_counters)
        work = {
            "kind": "reserve",
            "key": f"{_PREFIX}job:{job.id}",
            "unfinished": f"{_PREFIX}unfinished:{job.user}",
            "day_key": f"{_PREFIX}account:{day}",
            "id": job.id,
            "user": job.user,
            "endpoint": job.endpoint,
            "refused_as": job.refused_as,
            "at": job.at,
            "day": day,
            "jobs": job.jobs,
            "units": job.units,
            "cost": job.cost,
            "max_unfinished": job.max_unfinished,
            "unfinished_until": job.unfinished_until,
            "job_counters": job_counters,
            "cost_counters": cost_counters,
            "counters": [*job_counters, *cost_counters],
            "limits": [counter.limit for counter in counters],
            "ttls": [max(counter.ends - job.at, 0) + COUNTER_KEPT_S for counter in counters],
            "ttl": JOB_KEPT_S,
            "day_ttl": self._account_ttl_s,
        }
        (answer,) = await self._do(work=(self._bytes(_json(work)),), undo=job.id)
        refused_by, unfinished, *used = map(int, answer.split())
        return Standing(used, unfinished, None if refused_by == _NOT_REFUSED else refused_by)

    async def rename(self, job_id: str, new_id: str) -> None:
        """Do Store.rename."""
        await self._do(work=(self._encoded(Note(RENAME, job_id, new_id=new_id)),))

    async def settle(self, job_id: str, units: int, cost: int | None) -> None:
        """Do Store.settle."""
        await self._do(work=(self._encoded(Note(SETTLE, job_id, units, cost)),))

    async def end(self, job_id: str) -> None:
        """Do Store.end."""
        await self._do(work=(self._encoded(Note(END, job_id)),))

    async def give_back(self, job_id: str) -> None:
        """Do Store.give_back."""
        await self._do(work=(self._encoded(Note(GIVE_BACK, job_id)),))

    def note(self, notes: Sequence[Note], done: Callable[[StoreFailed | None], None]) -> None:
        """Do Store.note."""

        def noted(result: Any) -> None:
            done(self._failed(result) if isinstance(result, Exception) else None)

        try:
            self._ask(_Operation(noted, work=[self._encoded(note) for note in notes]))
        except StoreFailed as exc:
            done(exc)

    def _encoded(self, note: Note) -> bytes:
        """Return the operation of a note in JSON."""
        fields = {"kind": note.kind, "key": _job(note.job_id), "id": note.job_id, "day_ttl": self._account_ttl_s}
        if note.kind == SETTLE:
            fields["units"], fields["cost"] = note.units, note.cost
        elif note.kind == RENAME:
            fields["new_id"], fields["new_key"] = note.new_id, _job(note.new_id)
        return self._bytes(_json(fields))

    def _bytes(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeError as error:  # here, because it would fail others too in the library
            raise StoreFailed(f"{self._name}: {error}") from error

    async def owner(self, job_id: str) -> str | None:
        """Do Store.owner."""
        return cast("str | None", await self._do("HGET", _job(job_id), "user"))

    async def endpoint(self, job_id: str) -> str | None:
        """Do Store.endpoint."""
        return cast("str | None", await self._do("HGET", _job(job_id), "endpoint"))

    async def usage(self, since: str, until: str, by: Collection[str] = DIMENSIONS, most: int | None = None) -> Account:
        """Do Store.usage. The changes that calls make meanwhile may be in it or not."""
        async with self._reading:
            try:
                with closing(RedisAccount()) as account:
                    for day in await self._do("ZRANGEBYLEX", f"{_PREFIX}days", f"[{since}", f"[{until}"):
                        cursor = ""
                        while cursor != "0":
                            command = _script(
                                redis_scripts.ROWS, [f"{_PREFIX}account:{day}"], [cursor or "0", _ROWS_AT_ONCE]
                            )
                            cursor, rows = await self._do(*command)
                            account.add(day, rows)
                    return await account.sums(self._reader, by, most)
            except sqlite3.Error as error:
                raise StoreFailed(f"{self._name}: the temporary file for the sums: {error}") from error

    async def prune(self, now: int, account_days: int) -> None:
        """Forget days of the account. All else has a time to live."""
        self._account_ttl_s = account_days * _DAY_S
        bound = f"({day_of(now - self._account_ttl_s)}"
        for day in await self._do("ZRANGEBYLEX", f"{_PREFIX}days", "-", bound):
            await self._do("UNLINK", f"{_PREFIX}account:{day}")
            await self._do("ZREM", f"{_PREFIX}days", day)

    async def _do(self, *command: str | int, work: Sequence[bytes] = (), undo: str | None = None) -> Any:
        """Return what Redis responds to a command, or to operations on jobs."""
        encoded = [*command[:1], *(self._bytes(part) if isinstance(part, str) else part for part in command[1:])]
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def deliver(result: Any) -> None:
            if future.done():  # its caller was cancelled
                return
            if isinstance(result, Exception):
                future.set_exception(self._failed(result))
            else:
                future.set_result(result)

        self._ask(_Operation(deliver, command=encoded, work=work, undo=undo))
        return await future

    def _ask(self, operation: _Operation) -> None:
        if self._loop is None:
            raise StoreFailed(f"{self._name}: the store is not open")
        self._waiting.append(operation)
        if self._sender is None:
            self._sender = self._loop.create_task(self._send())

    async def _send(self) -> None:
        """Send what waits until nothing does."""
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MAX_BATCH))]
            results = await self._respond(batch)
            for operation, result in zip(batch, results, strict=True):
                if operation.undo is not None and isinstance(result, Exception):
                    self._doubtful.append(operation.undo)
                operation.done(result)
            if self._doubtful and not _has(Exception, results):
                undos = [self._doubtful.popleft() for _ in range(min(len(self._doubtful), _MAX_BATCH))]
                self._waiting.extend(
                    _Operation(_ignore, work=(self._encoded(Note(GIVE_BACK, undo)),), undo=undo) for undo in undos
                )
        self._sender = None

    async def _respond(self, batch: Sequence[_Operation]) -> Sequence[Any]:
        """Return the results of all operations, which may be errors. Try twice where that can help."""
        connection = self._connection
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                try:
                    results = await self._responses(batch)
                except ConnectionBroken:
                    results = None
                if results is None or _has(ReadOnlyError, results):
                    # A new connection may lead to a Redis that is up again, or to the new master of the same name.
                    await connection.disconnect()
                    results = await self._responses(batch)
                if _has(NoScriptError, results):
                    for script in redis_scripts.ALL:
                        await connection.send_command(b"SCRIPT", b"LOAD", script.encode())
                        await connection.read_response()
                    results = await self._responses(batch)
        except Exception as error:  # noqa: BLE001 whatever it is, nobody may wait for ever
            with suppress(RedisError, OSError, TimeoutError):
                await connection.disconnect(nowait=True)  # a late response would be taken for that of another command
            return [error] * len(batch)
        return results

    async def _responses(self, batch: Sequence[_Operation]) -> list[Any]:
        """Send a batch, and return the result of each operation: of those on jobs, a list."""
        commands: list[Sequence[Any]] = []
        work: list[bytes] = []
        for operation in batch:
            if operation.command:
                _add_script(commands, work)
                commands.append(operation.command)
            else:
                work += operation.work
        _add_script(commands, work)
        connection = self._connection
        if not connection.is_connected:
            await connection.connect()
        await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        responses = []
        for _ in commands:
            try:
                responses.append(await connection.read_response())
            except ResponseError as error:
                responses.append(error)
        return _divided(batch, responses, self._redis.response_callbacks)

    def _failed(self, error: Exception) -> StoreFailed:
        failed = StoreFailed(f"{self._name}: {self._explain(error)}")
        failed.__cause__ = error
        return failed

    def _explain(self, error: Exception) -> str:
        """Return a line for the operator, without the password."""
        if isinstance(error, RedisTimeout | TimeoutError):
            return "it does not respond in time"
        if isinstance(error, ReadOnlyError):
            return "the server is a replica, which only reads: name the master"
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, AuthenticationError) or "authenticat" in text:
            return "the user or the password is wrong or missing"
        return text.replace(self._password, "***") if self._password else text


def _has(kind: type[Exception], results: Iterable[Any]) -> bool:
    return any(isinstance(result, kind) for result in results)


def _ignore(_result: Any) -> None:
    """Do nothing: nobody waits for the result."""


def _add_script(commands: list[Sequence[Any]], work: list[bytes]) -> None:
    """Make one command of operations on jobs, and remove them from the list."""
    if work:
        commands.append((b"EVALSHA", _SHA1[redis_scripts.DO_ALL], 1, _DAYS, b"[" + b",".join(work) + b"]"))
        work.clear()


def _divided(batch: Sequence[_Operation], responses: Sequence[Any], parsers: Mapping[Any, Any]) -> list[Any]:
    """Return the result of each operation, from the responses to their commands."""
    results: list[Any] = []
    rest = iter(responses)
    parts: Iterator[Any] | Exception | None = None
    for operation in batch:
        if operation.command:
            response, parse = next(rest), parsers.get(operation.command[0])
            results.append(response if parse is None or isinstance(response, Exception) else parse(response))
            parts = None
            continue
        if parts is None and operation.work:
            response = next(rest)
            parts = response if isinstance(response, Exception) else iter(response.split("\n"))
        if isinstance(parts, Exception):
            results.append(parts)
            continue
        of_work = [] if parts is None else [next(parts) for _ in operation.work]
        error = next((each for each in of_work if each[:1] == "!"), None)
        results.append(of_work if error is None else _error(error[1:]))
    return results


def _error(text: str) -> ResponseError:
    """Return the error of one operation."""
    return ReadOnlyError(text) if text.startswith("READONLY") else ResponseError(text)


def _script(script: str, keys: Sequence[str], arguments: Sequence[str | int]) -> list[str | int]:
    return ["EVALSHA", _SHA1[script], len(keys), *keys, *arguments]


def _job(job_id: str) -> str:
    return f"{_PREFIX}job:{job_id}"


def _keys(counters: Sequence[Counter]) -> list[str]:
    return [f"{_PREFIX}counter:{counter.key}" for counter in counters]
