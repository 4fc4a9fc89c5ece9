"""Keep what is spent in a Redis, or a Valkey, that the services of several hosts share.

Strategy. Each operation on a job is one script (``redis_scripts``), which Redis runs as a whole, and which does nothing
the second time. So an operation is tried a second time when its connection broke, because the proxy cannot know whether
Redis did it. It is not tried again when Redis is slow, because its caller waits. A reservation that failed so is given
back when Redis responds again. Everything in Redis has a time to live.

Redis must be set to keep what it has (``maxmemory-policy noeviction``, which is its default). What it forgets, by
eviction or by the loss of a server that has not replicated yet, is free for the users.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionBroken
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from tornado_fal_proxy.spending import redis_scripts
from tornado_fal_proxy.spending.store import (
    COUNTER_KEPT_S,
    JOB_KEPT_S,
    Counter,
    Reservation,
    Standing,
    StoreFailed,
    Usage,
    day_of,
)

__all__ = ["RedisStore"]

# Limits the wait for a connection, and for a response. A Redis nearby needs a millisecond for both. One that needs a
# second is in trouble, and a client of the proxy waits for it.
_CONNECT_TIMEOUT_S = 1.0
_RESPONSE_TIMEOUT_S = 1.0
# Limits an operation as a whole: both waits, and the wait for a free connection.
_TIMEOUT_S = 2.0
# Limits the connections of one process. Redis does one operation after the other, so more would not be faster.
_MAX_CONNECTIONS = 16
# Limits the reservations to give back when Redis responds again: those of the seconds before calls are refused.
_MAX_DOUBTFUL = 10_000
# The prefix of all keys. The braces are the hash tag.
_PREFIX = "{fal-proxy}:"
_DAY_S = 86_400
# How long days of the account live in Redis until prune() tells. It is the default of the option account_days.
_ACCOUNT_DAYS = 400
# The rows of the account that Redis returns at once: others wait for less than a millisecond.
_ROWS_AT_ONCE = 500
_NOT_REFUSED = -2


class RedisStore:
    """A :class:`~tornado_fal_proxy.spending.store.Store` at a URL such as ``redis://:PASSWORD@HOST:6379/0``.

    With the scheme ``rediss`` over TLS. An impossible URL raises ValueError.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        # Without user, password and query, in which a password may be too.
        self._name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        pool = BlockingConnectionPool.from_url(
            url,
            decode_responses=True,
            max_connections=_MAX_CONNECTIONS,
            timeout=_CONNECT_TIMEOUT_S,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
            socket_timeout=_RESPONSE_TIMEOUT_S,
            # Versions of the library differ in what they try again by themselves.
            retry=Retry(NoBackoff(), 0),
        )
        self._password = str(pool.connection_kwargs.get("password") or "")
        self._redis = Redis(connection_pool=pool)
        self._reserve = self._redis.register_script(redis_scripts.RESERVE)
        self._rename = self._redis.register_script(redis_scripts.RENAME)
        self._settle = self._redis.register_script(redis_scripts.SETTLE)
        self._end = self._redis.register_script(redis_scripts.END)
        self._give_back = self._redis.register_script(redis_scripts.GIVE_BACK)
        self._account_ttl_s = _ACCOUNT_DAYS * _DAY_S
        self._doubtful: deque[str] = deque(maxlen=_MAX_DOUBTFUL)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r})"

    async def open(self) -> None:
        """Connect."""
        await self._do(self._redis.ping)

    async def close(self) -> None:
        """Disconnect."""
        with suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(_TIMEOUT_S):
                await self._redis.connection_pool.disconnect()

    async def reserve(self, job: Reservation) -> Standing:
        """Do Store.reserve."""
        day = day_of(job.at)
        job_counters, cost_counters = _keys(job.job_counters), _keys(job.cost_counters)
        keys = [
            *(_job(job.id), f"{_PREFIX}unfinished:{job.user}", f"{_PREFIX}account:{day}", f"{_PREFIX}days"),
            *job_counters,
            *cost_counters,
        ]
        arguments: list[str | int] = [
            *(job.id, job.user, job.endpoint, _json([job.user, job.endpoint]), job.at, job.unfinished_until),
            *("" if job.max_unfinished is None else job.max_unfinished, job.jobs, job.units, job.cost),
            *(_json(job_counters), _json(cost_counters), day, len(job_counters), JOB_KEPT_S, self._account_ttl_s),
        ]
        for counter in (*job.job_counters, *job.cost_counters):
            arguments += counter.limit, max(counter.ends - job.at, 0) + COUNTER_KEPT_S
        try:
            refused_by, unfinished, *used = await self._do(self._reserve, keys, arguments)
        except StoreFailed as failure:
            if not isinstance(failure.__cause__, ResponseError):
                self._doubtful.append(job.id)
            raise
        return Standing(used, unfinished, None if refused_by == _NOT_REFUSED else refused_by)

    async def rename(self, job_id: str, new_id: str) -> None:
        """Do Store.rename."""
        await self._do(self._rename, [_job(job_id), _job(new_id)], [job_id, new_id])

    async def settle(self, job_id: str, units: int, cost: int) -> None:
        """Do Store.settle."""
        await self._do(self._settle, [_job(job_id)], [job_id, units, cost, self._account_ttl_s])

    async def end(self, job_id: str) -> None:
        """Do Store.end."""
        await self._do(self._end, [_job(job_id)], [job_id])

    async def give_back(self, job_id: str) -> None:
        """Do Store.give_back."""
        await self._do(self._give_back, [_job(job_id)], [job_id, self._account_ttl_s])

    async def owner(self, job_id: str) -> str | None:
        """Do Store.owner."""
        return cast("str | None", await self._do(self._redis.hget, _job(job_id), "user"))

    async def endpoint(self, job_id: str) -> str | None:
        """Do Store.endpoint."""
        return cast("str | None", await self._do(self._redis.hget, _job(job_id), "endpoint"))

    async def usage(self, since: str, until: str) -> Sequence[Usage]:
        """Do Store.usage."""
        rows: list[Usage] = []
        for day in await self._do(self._redis.zrangebylex, f"{_PREFIX}days", f"[{since}", f"[{until}"):
            found: dict[str, str] = {}  # a row may come twice
            cursor = -1
            while cursor != 0:
                cursor, some = await self._do(
                    self._redis.hscan, f"{_PREFIX}account:{day}", max(cursor, 0), count=_ROWS_AT_ONCE
                )
                found |= some
            rows += (Usage(day, *json.loads(key), *map(int, row.split())) for key, row in found.items())
        return sorted(rows, key=lambda row: (row.day, row.user, row.endpoint))

    async def prune(self, now: int, account_days: int) -> None:
        """Forget days of the account. All else has a time to live."""
        self._account_ttl_s = account_days * _DAY_S
        bound = f"({day_of(now - self._account_ttl_s)}"
        for day in await self._do(self._redis.zrangebylex, f"{_PREFIX}days", "-", bound):
            await self._do(self._redis.unlink, f"{_PREFIX}account:{day}")
            await self._do(self._redis.zrem, f"{_PREFIX}days", day)

    async def _do(self, operation: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any) -> Any:
        """Return what an operation returns. Then give back what may have been reserved while Redis failed."""
        result = await self._try(operation, *arguments, **options)
        with suppress(StoreFailed):
            while self._doubtful:
                job_id = self._doubtful[0]
                await self._try(self._give_back, [_job(job_id)], [job_id, self._account_ttl_s])
                with suppress(ValueError):  # another call may have given it back
                    self._doubtful.remove(job_id)
        return result

    async def _try(self, operation: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any) -> Any:
        """Try an operation, and once more on other connections if its own broke, or if its server only reads."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                try:
                    return await operation(*arguments, **options)
                except (ConnectionBroken, ReadOnlyError):
                    # The others are broken too, or lead to what was the master before.
                    await self._redis.connection_pool.disconnect(inuse_connections=False)
                    return await operation(*arguments, **options)
        except (RedisError, OSError, UnicodeError, TimeoutError) as error:
            raise StoreFailed(f"{self._name}: {self._explain(error)}") from error

    def _explain(self, error: Exception) -> str:
        """Return a line for the operator, without the password."""
        if isinstance(error, RedisTimeout | TimeoutError):
            return "it does not respond in time"
        if isinstance(error, ReadOnlyError):
            return "the server is a replica, which only reads: name the master"
        text = " ".join(str(error).split()) or type(error).__name__
        return text.replace(self._password, "***") if self._password else text


def _job(job_id: str) -> str:
    return f"{_PREFIX}job:{job_id}"


def _keys(counters: Sequence[Counter]) -> list[str]:
    return [f"{_PREFIX}counter:{counter.key}" for counter in counters]


def _json(values: list[str]) -> str:
    return json.dumps(values, ensure_ascii=False)
