"""The store of what is spent in a file, or in memory, against a plain model; and the names of stores.

tests/external/test_redis_store.py does the same with Redis, tests/service/test_sqlite_store.py has processes and
faults.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.odd_users import keep_apart
from tests.support.spending_model import BUDGET, NOON, StoreMachine, reservation
from tests.support.strategies import examples
from tornado_fal_proxy import ConfigError, ProxyConfig
from tornado_fal_proxy.spending.sqlite_store import SqliteStore
from tornado_fal_proxy.spending.store import COUNTER_KEPT_S, JOB_KEPT_S, UNFINISHED, StoreFailed
from tornado_fal_proxy.spending.stores import default_path, parse_store

STEPS = settings(examples(20), stateful_step_count=20)


class MemoryMachine(StoreMachine):
    """The machine with a store in memory."""

    make = SqliteStore
    shared = False


@pytest.mark.slow
def test_memory_is_as_the_model() -> None:
    """Whatever is done in whatever order, a store in memory has the numbers of the model."""
    run_state_machine_as_test(MemoryMachine, settings=STEPS)


@pytest.mark.slow
def test_file_is_as_the_model(tmp_path: Path) -> None:
    """Whatever is done, through two stores that close and open, a file has the numbers of the model."""
    path = tmp_path / "spending.sqlite"

    class FileMachine(StoreMachine):
        def prepare(self) -> None:
            for each in tmp_path.iterdir():
                each.unlink()

        @staticmethod
        def make() -> SqliteStore:
            return SqliteStore(path)

    run_state_machine_as_test(FileMachine, settings=STEPS)


@asynccontextmanager
async def opened(path: Path | None = None) -> AsyncIterator[SqliteStore]:
    """Open a store for the block."""
    store = SqliteStore(path)
    await store.open()
    yield store
    await store.close()


@pytest.mark.gen_test
async def test_last_one_is_given_once() -> None:
    """Of many reservations at once only so many succeed as the limit allows, and each refusal is counted."""
    async with opened() as store:
        standings = await asyncio.gather(*(store.reserve(reservation(str(i), cost=0, limit=7)) for i in range(300)))
        assert [standing.refused_by for standing in standings] == [None] * 7 + [0] * 293
        assert [standing.used[0] for standing in standings] == [*range(1, 8), *[7] * 293]
        row = (await store.usage("2026-12-31", "2026-12-31")).total
        assert (row.jobs, row.refused) == (7, 293)


@pytest.mark.gen_test
async def test_odd_users(tmp_path: Path) -> None:
    """No user counts as another, whatever characters their ids have."""
    async with opened(tmp_path / "spending.sqlite") as store:
        await keep_apart(store)


@pytest.mark.gen_test
async def test_first_limit_is_named() -> None:
    """A refusal names the first limit that has no room: jobs before money before unfinished jobs."""
    async with opened() as store:
        await store.reserve(reservation("1", cost=BUDGET - 1))
        assert (await store.reserve(reservation("2", cost=2))).refused_by == 3
        assert (await store.reserve(reservation("3", cost=1, max_unfinished=1))).refused_by == UNFINISHED
        await store.reserve(reservation("4", cost=0))
        assert (await store.reserve(reservation("5", cost=2, max_unfinished=0))).refused_by == 0
        assert (await store.reserve(reservation("6", jobs=0, cost=0))).refused_by is None


@pytest.mark.gen_test
async def test_unfinished_jobs_end_by_themselves() -> None:
    """A job that nobody ends is unfinished up to its time, and not at its time."""
    async with opened() as store:
        await store.reserve(reservation("1"))
        late = reservation("2", at=NOON + 3599, max_unfinished=1)
        assert (await store.reserve(late)).refused_by == UNFINISHED
        in_time = reservation("3", at=NOON + 3600, max_unfinished=1)
        assert (await store.reserve(in_time)).refused_by is None


@pytest.mark.gen_test
async def test_failure_of_one_is_none_of_the_others() -> None:
    """An operation with values that the store cannot keep fails alone, though all that wait share a transaction."""
    async with opened() as store:
        results = await asyncio.gather(
            store.reserve(reservation("1", limit=9)),
            store.reserve(reservation("2", user="\ud800", limit=9)),
            store.reserve(reservation("3", cost=2**64, limit=9)),
            store.reserve(reservation("4", limit=9)),
            return_exceptions=True,
        )
        assert [isinstance(result, StoreFailed) for result in results] == [False, True, True, False]
        assert [await store.owner(each) for each in "1234"] == ["ann", None, None, "ann"]


@pytest.mark.gen_test
async def test_cancelled_caller() -> None:
    """A caller who is cancelled disturbs nobody else."""
    async with opened() as store:
        tasks = [asyncio.ensure_future(store.reserve(reservation(str(i), limit=9))) for i in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.wait(tasks)
        assert tasks[2].result().used[0] == 3


@pytest.mark.gen_test
async def test_close_finishes_what_waits(tmp_path: Path) -> None:
    """To close does all that was asked before. Afterwards every operation fails, until the store is opened again."""
    path = tmp_path / "spending.sqlite"
    store = SqliteStore(path)
    await store.open()
    waiting = [asyncio.ensure_future(store.reserve(reservation(str(i), limit=1000))) for i in range(500)]
    await asyncio.sleep(0)
    await store.close()
    await store.close()
    assert [(await each).used[0] for each in waiting] == list(range(1, 501))
    with pytest.raises(StoreFailed, match=r"spending\.sqlite: the store is not open"):
        await store.owner("1")
    await store.open()
    assert await store.owner("499") == "ann"
    await store.close()


@pytest.mark.gen_test
async def test_prune(tmp_path: Path) -> None:
    """Jobs, counters and days are forgotten after their time, and no sooner, however many there are."""
    path = tmp_path / "spending.sqlite"
    async with opened(path) as store:
        jobs = [reservation(str(i), str(i % 600), at=NOON + i // 600, cost=0, limit=9) for i in range(1200)]
        await asyncio.gather(*(store.reserve(job) for job in jobs))
        db = sqlite3.connect(path)

        def counts() -> list[int]:
            tables = ("jobs", "counters", "account")
            return [db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]

        months = 600  # the month ends with the day
        assert counts() == [1200, 600 + 600 + months + 600 + 1, 600]
        ends = NOON + 43_200
        await store.prune(NOON + 60 + COUNTER_KEPT_S, 2)
        assert counts() == [1200, 600 + 600 + months + 600 + 1, 600]
        await store.prune(NOON + 61 + COUNTER_KEPT_S, 2)
        assert counts() == [1200, 600 + months + 600 + 1, 600]
        await store.prune(ends + COUNTER_KEPT_S + 1, 2)
        assert counts() == [1200, 0, 600]
        await store.prune(ends + 2 * 86_400, 2)
        assert counts() == [1200, 0, 0]
        await store.prune(NOON + JOB_KEPT_S + 1, 400)
        assert counts() == [600, 0, 0]
        await store.give_back("1199")  # whose counters and row are forgotten
        db.close()


@pytest.mark.gen_test
async def test_forgotten_counters_stay_above_zero() -> None:
    """A counter that was forgotten, and came again after the clock was set back, does not fall below zero."""
    async with opened() as store:
        await store.reserve(reservation("1", cost=20))
        await store.prune(NOON + COUNTER_KEPT_S + 86_400, 400)
        await store.reserve(reservation("2", cost=5))
        await store.give_back("1")
        assert (await store.reserve(reservation("3", cost=6))).used == [1, 1, 1, 6, 6]


@pytest.mark.gen_test
async def test_file_is_private(tmp_path: Path) -> None:
    """Nobody but the user of the process can read the file, or those beside it."""
    path = tmp_path / "spending.sqlite"
    async with opened(path) as store:
        await store.reserve(reservation("1"))
        assert {each.name: oct(each.stat().st_mode & 0o777) for each in tmp_path.iterdir()} == {
            "spending.sqlite": "0o600",
            "spending.sqlite-shm": "0o600",
            "spending.sqlite-wal": "0o600",
        }


# The names of stores.

ALLOWED: dict[str, str] = {
    "memory": "SqliteStore(':memory:')",
    "sqlite:/var/lib/x.sqlite": "SqliteStore('/var/lib/x.sqlite')",
    "sqlite:x y:z.sqlite": "SqliteStore('x y:z.sqlite')",
    "redis://localhost": "RedisStore('redis://localhost')",
    "redis://127.0.0.1:6380/3": "RedisStore('redis://127.0.0.1:6380/3')",
    "rediss://me:s3cret@[::1]:6380/3?ssl_cert_reqs=none": "RedisStore('rediss://[::1]:6380/3')",
    "redis://:s3cret@host/1?password=s3cret": "RedisStore('redis://host/1')",
    "redis://:s3cret%40@host": "RedisStore('redis://host')",
}
REFUSED = [
    *("", "Memory", "memory:", "sqlite", "sqlite:", "sqlite::memory:", "sqlite:///x", "file:x", "/var/lib/x"),
    *("postgres://s3cret@host", "redis", "redis:", "redis:host", "redis://s3cret@host:port", "redis://h:99999999"),
    *("redis://:s3cret@[host", "redis://host?socket_timeout=s3cret", "redis://:s3cret@host/1?max_connections=x"),
    *("redis://:s3cret@host/x", "unix:///run/redis.sock"),
]


@pytest.mark.parametrize("name", ALLOWED)
def test_names(name: str) -> None:
    """A name gives a store, whose repr has no password. Nothing is opened or made yet."""
    assert repr(parse_store(name)) == ALLOWED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_names(name: str) -> None:
    """Another name raises an error that tells what is allowed, and has no password."""
    with pytest.raises(ValueError, match=r"must be sqlite:PATH, redis://") as caught:
        parse_store(name)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_redis_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages for Redis the error tells how to install them."""
    import sys

    monkeypatch.setitem(sys.modules, "tornado_fal_proxy.spending.redis_store", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[redis\]' in the folder of this project, or "):
        parse_store("redis://localhost")


class TestDefaultPath:
    """The file of an operator who names none."""

    CASES: ClassVar[list[tuple[dict[str, str], str]]] = [
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "XDG_STATE_HOME": "/x"}, "/var/lib/a/spending.sqlite"),
        ({"STATE_DIRECTORY": "", "XDG_STATE_HOME": "/x"}, "/x/tornado-fal-proxy/spending.sqlite"),
        ({"XDG_STATE_HOME": "relative"}, "/home/me/.local/state/tornado-fal-proxy/spending.sqlite"),
        ({}, "/home/me/.local/state/tornado-fal-proxy/spending.sqlite"),
    ]

    @pytest.mark.parametrize(("environment", "path"), CASES)
    def test_path(self, environment: dict[str, str], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is in the folder that systemd gives the service, else in the user's for state."""
        monkeypatch.setenv("HOME", "/home/me")
        assert default_path(environment) == Path(path)

    def test_no_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A user without a home, as in some containers, is met when the configuration is made, and not in each call."""

        def home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", home)
        monkeypatch.delenv("STATE_DIRECTORY", raising=False)
        monkeypatch.delenv("XDG_STATE_HOME", raising=False)
        with pytest.raises(ConfigError) as caught:
            ProxyConfig(jobs_per_user="1/day")
        assert caught.value.problems == (
            "store: must be set, because this user has no home directory; or set STATE_DIRECTORY",
        )
        assert ProxyConfig(jobs_per_user="1/day", store="memory").spending
        assert ProxyConfig(own_jobs_only=False).spending is None

    @pytest.mark.gen_test
    async def test_folder_is_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its folder is made, for nobody else to read."""
        monkeypatch.delenv("STATE_DIRECTORY", raising=False)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        store: Any = parse_store(None)
        await store.open()
        await store.close()
        folder = tmp_path / "state" / "tornado-fal-proxy"
        assert oct(folder.stat().st_mode & 0o777) == "0o700"
        assert (folder / "spending.sqlite").exists()
