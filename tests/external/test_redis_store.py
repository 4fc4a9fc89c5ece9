"""The store of what is spent in a real Redis: against a plain model, and with all that can happen to a Redis."""

import asyncio
import re
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.certificates import Authority
from tests.support.odd_users import keep_apart
from tests.support.redis_server import RedisServer, running_redis
from tests.support.spenders import compete, spend_and_be_killed
from tests.support.spending_model import NOON, StoreMachine, reservation
from tests.support.strategies import examples
from tests.support.tools import unused_port
from tornado_fal_proxy.spending import redis_store
from tornado_fal_proxy.spending.redis_account import RedisAccount
from tornado_fal_proxy.spending.redis_store import RedisStore
from tornado_fal_proxy.spending.sqlite_reader import SqliteReader
from tornado_fal_proxy.spending.store import COUNTER_KEPT_S, JOB_KEPT_S, StoreFailed
from tornado_fal_proxy.spending.stores import parse_store


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    """Run a server for the tests that only use it."""
    with running_redis() as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    """Return a server that is empty."""
    shared.command("FLUSHALL")
    return shared


@pytest.fixture
def own() -> Iterator[RedisServer]:
    """Run a server for a test that does something to it."""
    with running_redis() as server:
        yield server


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisStore]:
    """Open a store for the block."""
    store = RedisStore(url)
    await store.open()
    yield store
    await store.close()


async def fails(store: RedisStore, reason: str, id: str = "f") -> None:
    """Assert that a reservation fails with a line for the operator."""
    with pytest.raises(StoreFailed, match=rf"\Aredis://127\.0\.0\.1:\d+/0: {reason}") as caught:
        await store.reserve(reservation(id))
    assert "\n" not in str(caught.value)


def test_redis_is_as_the_model(server: RedisServer) -> None:
    """Whatever is done, through two stores that close and open, Redis has the numbers of the model."""

    class RedisMachine(StoreMachine):
        def prepare(self) -> None:
            self.run(self.empty())

        @staticmethod
        async def empty() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"FLUSHALL\r\n")
            assert await reader.readline() == b"+OK\r\n"
            writer.close()
            await writer.wait_closed()

        @staticmethod
        def make() -> RedisStore:
            return RedisStore(server.url())

    machine: Any = RedisMachine
    run_state_machine_as_test(machine, settings=settings(examples(30), stateful_step_count=25))


@pytest.mark.gen_test
async def test_last_one_is_given_once(server: RedisServer) -> None:
    """Of many reservations at once, through several stores, only so many succeed as the limit allows."""
    async with opened(server.url()) as one, opened(server.url()) as two:
        calls = ((one, two)[i % 2].reserve(reservation(str(i), cost=0, limit=7)) for i in range(300))
        standings = await asyncio.gather(*calls)
        assert sum(standing.refused_by is None for standing in standings) == 7
        row = (await one.usage("2026-12-31", "2026-12-31")).total
        assert (row.jobs, row.refused) == (7, 293)


@pytest.mark.gen_test
async def test_odd_users(server: RedisServer) -> None:
    """No user counts as another, whatever characters their ids have."""
    async with opened(server.url()) as store:
        await keep_apart(store)


@pytest.mark.gen_test
async def test_everything_has_a_time_to_live(server: RedisServer) -> None:
    """Nothing stays in Redis for ever, and nothing is forgotten too soon, after any operation."""
    async with opened(server.url()) as store:
        for i in range(6):
            await store.reserve(reservation(str(i), limit=5))
        await store.rename("1", "fal-1")
        await store.settle("fal-1", 1, 1)
        await store.give_back("2")
        await store.end("3")
        await store.rename("4", "fal-4")
        await store.end("0")
        await store.rename("0", "fal-0")
        least = {
            "job": JOB_KEPT_S,
            "unfinished": JOB_KEPT_S,
            "account": 400 * 86_400,
            "days": 400 * 86_400,
            "counter": COUNTER_KEPT_S,
        }
        keys = server.command("KEYS", "*").split("\n")
        assert {key.split(":")[1] for key in keys} == set(least)
        for key in keys:
            assert key.startswith("{fal-proxy}:")
            kept = least[key.split(":")[1]]
            assert kept - 100 <= int(server.command("TTL", key)) <= kept + 86_400


@pytest.mark.gen_test
async def test_prune(server: RedisServer) -> None:
    """Days of the account are forgotten after as many days as the operator has set."""
    async with opened(server.url()) as store:
        await store.reserve(reservation("1"))
        await store.reserve(reservation("2", at=NOON + 86_400))
        await store.prune(NOON + 2 * 86_400, 2)
        assert [row.day for row in (await store.usage("2026-01-01", "2027-12-31")).rows] == ["2026-12-31", "2027-01-01"]
        await store.prune(NOON + 3 * 86_400, 2)
        assert [row.day for row in (await store.usage("2026-01-01", "2027-12-31")).rows] == ["2027-01-01"]
        await store.reserve(reservation("3", at=NOON + 86_400))
        assert int(server.command("TTL", "{fal-proxy}:account:2027-01-01")) <= 2 * 86_400


@pytest.mark.gen_test
async def test_large_account(server: RedisServer) -> None:
    """An account of a day comes in pieces, each row once; the sum of those that are left out too."""
    async with opened(server.url()) as store:
        await asyncio.gather(*(store.reserve(reservation(str(i), f"u{i:04}", cost=0)) for i in range(1500)))
        server.command("CONFIG", "RESETSTAT")
        account = await store.usage("2026-12-31", "2026-12-31", ("user",), 1400)
        assert [row.user for row in account.rows] == [f"u{i:04}" for i in range(1400)]
        assert (account.left_out, account.rest.jobs, account.total.jobs) == (100, 100, 1500)
        (pieces,) = re.findall(r"cmdstat_hscan:calls=(\d+)", server.command("INFO", "commandstats"))
        assert int(pieces) >= 1500 / 200 - 1


@pytest.mark.parametrize("file", [True, False])
@pytest.mark.gen_test
async def test_a_row_that_comes_twice(monkeypatch: pytest.MonkeyPatch, file: bool) -> None:
    """Of a row that Redis returns twice, because the day grows meanwhile, the second counts.

    Where no file can be made the rows are in memory.
    """
    if not file:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    account = RedisAccount()
    account.add("2026-12-31", '["ann","a/b"]\n1 0 1 5\n["bob","a/b"]\n1 0 1 5')
    account.add("2026-12-31", '["ann","a/b"]\n2 0 2 9')
    account.add("2026-12-30", '["ann","a/b"]\n1 0 1 1')
    account.add("2026-12-30", "")
    reader = SqliteReader()
    found = await account.sums(reader, ("user",), None)
    reader.close()
    assert [(row.user, row.jobs, row.cost) for row in found.rows] == [("ann", 3, 10), ("bob", 1, 5)]
    unused = RedisAccount()
    unused.close()


@pytest.mark.gen_test
async def test_processes_compete(server: RedisServer) -> None:
    """Four processes with many clients get as many jobs as the limit allows, together."""
    await compete(server.url())


@pytest.mark.gen_test
async def test_processes_are_killed(server: RedisServer) -> None:
    """A process that is killed in any moment has lost nothing that it has reported as reserved."""
    await spend_and_be_killed(server.url())


# All that can happen to a Redis.


@pytest.mark.gen_test
async def test_nobody_listens() -> None:
    """A Redis that is not there is named, and the store opens as soon as it is."""
    store = RedisStore(f"redis://127.0.0.1:{unused_port()}/0")
    with pytest.raises(StoreFailed, match="Connect"):
        await store.open()
    await fails(store, ".*[Cc]onnect")
    await store.close()
    with pytest.raises(StoreFailed, match="the store is not open"):
        await store.owner("1")


@pytest.mark.gen_test
async def test_killed(own: RedisServer) -> None:
    """Operations fail while Redis is dead. The first after its start succeeds, though all connections are broken."""
    async with opened(own.url()) as store:
        await store.reserve(reservation("1"))
        own.signal(signal.SIGKILL)
        await fails(store, ".*[Cc]onnect")
        own.start()
        assert (await store.reserve(reservation("2"))).used[0] == 1
        own.signal(signal.SIGKILL)
        own.start()
        assert (await store.reserve(reservation("3"))).used[0] == 1


@pytest.mark.gen_test
async def test_scripts_are_forgotten(server: RedisServer) -> None:
    """A Redis that has lost its scripts gets them again."""
    async with opened(server.url()) as store:
        await store.reserve(reservation("1", limit=9))
        server.command("SCRIPT", "FLUSH")
        standings = await asyncio.gather(*(store.reserve(reservation(each, limit=9)) for each in "2345"))
        assert [standing.used[0] for standing in standings] == [2, 3, 4, 5]


@pytest.mark.gen_test
async def test_slow(own: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that hangs fails operations after a time, and what it reserved nevertheless is given back."""
    monkeypatch.setattr(redis_store, "_RESPONSE_TIMEOUT_S", 0.2)
    async with opened(own.url()) as store:
        await store.reserve(reservation("1"))
        own.signal(signal.SIGSTOP)
        await asyncio.gather(*(fails(store, "it does not respond in time", each) for each in ("2", "3")))
        own.signal(signal.SIGCONT)

        async def reserved() -> str:
            return f"{await store.owner('1')} {await store.owner('2')} {await store.owner('3')}"

        while await reserved() != "ann None None":
            await asyncio.sleep(0.01)
        assert (await store.reserve(reservation("4"))).used == [2, 2, 2, 10, 10]


@pytest.mark.gen_test
async def test_reservation_whose_response_is_lost(own: RedisServer) -> None:
    """A reservation that Redis did before the connection broke is not done twice."""
    async with opened(own.url()) as store:
        await store.reserve(reservation("1"))
        own.signal(signal.SIGSTOP)
        waiting = asyncio.ensure_future(store.reserve(reservation("2")))
        await asyncio.sleep(0.05)
        # Redis does the command that is in its buffer, and then finds that the client is gone.
        await store._connection.disconnect()
        own.signal(signal.SIGCONT)
        assert (await waiting).used[:2] == [2, 2]
        row = (await store.usage("2026-12-31", "2026-12-31")).total
        assert row.jobs == 2


@pytest.mark.gen_test
async def test_password() -> None:
    """A wrong password, or none, fails with a line that has no password."""
    with running_redis("--requirepass", "right-s3cret") as server:
        for url in (server.url(password="wrong-s3cret"), server.url()):
            store = RedisStore(url)
            reason = "the user or the password is wrong or missing"
            with pytest.raises(StoreFailed, match=reason):
                await store.open()
            await fails(store, reason)
            await store.close()
        async with opened(server.url(password="right-s3cret")) as store:
            assert (await store.reserve(reservation("1"))).refused_by is None


@pytest.mark.gen_test
async def test_memory_is_full(own: RedisServer) -> None:
    """A Redis whose memory is full refuses a reservation as a whole, and takes the next when it has room."""
    async with opened(own.url()) as store:
        await store.reserve(reservation("1"))
        own.command("CONFIG", "SET", "maxmemory", "1")
        await fails(store, ".*maxmemory")
        with pytest.raises(StoreFailed, match="maxmemory"):
            await store.settle("1", 1, 1)
        await store.give_back("1")  # needs no memory
        own.command("CONFIG", "SET", "maxmemory", "0")
        assert (await store.reserve(reservation("2"))).used == [1, 1, 1, 5, 5]


@pytest.mark.gen_test
async def test_replica(own: RedisServer) -> None:
    """A server that became a replica only reads, which is named, until it is the master again."""
    async with opened(own.url()) as store:
        await store.reserve(reservation("1"))
        own.command("REPLICAOF", "127.0.0.1", str(unused_port()))
        await fails(store, "the server is a replica")
        own.command("REPLICAOF", "NO", "ONE")
        assert (await store.reserve(reservation("2"))).used[0] == 2


@pytest.mark.gen_test
async def test_values_that_cannot_be_kept(server: RedisServer) -> None:
    """An operation with values that cannot be sent fails alone."""
    async with opened(server.url()) as store:
        results = await asyncio.gather(
            *(store.reserve(reservation(each, user)) for each, user in (("1", "a"), ("2", "\ud800"), ("3", "a"))),
            return_exceptions=True,
        )
        assert [isinstance(result, StoreFailed) for result in results] == [False, True, False]


@pytest.mark.gen_test
async def test_close_finishes_what_waits(server: RedisServer) -> None:
    """To close does all that was asked before."""
    async with opened(server.url()) as store:
        waiting = [asyncio.ensure_future(store.reserve(reservation(str(i), limit=900))) for i in range(500)]
        await asyncio.sleep(0)
    assert [(await each).used[0] for each in waiting] == list(range(1, 501))


@pytest.mark.gen_test
async def test_tls(authority: Authority, tmp_path: Path) -> None:
    """A connection of the scheme rediss trusts only the server whose name its certificate has."""
    port, certificate = unused_port(), tmp_path / "server.pem"
    authority.write_certificate(certificate, "localhost")
    with running_redis(
        *("--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", authority.ca_file),
        *("--tls-cert-file", str(certificate), "--tls-key-file", str(certificate)),
    ):
        async with opened(f"rediss://localhost:{port}/0?ssl_ca_certs={authority.ca_file}") as store:
            assert (await store.reserve(reservation("1"))).refused_by is None
        for url in (f"rediss://localhost:{port}", f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={authority.ca_file}"):
            untrusting = parse_store(url)
            with pytest.raises(StoreFailed, match="CERTIFICATE_VERIFY_FAILED"):
                await untrusting.open()
            await untrusting.close()
