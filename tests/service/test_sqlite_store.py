"""The store of what is spent in a file: with several processes, and with all that can happen to a file."""

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from threading import Event

import pytest

from tests.support.service_process import environment
from tests.support.spenders import compete, spend_and_be_killed
from tests.support.spending_model import reservation
from tests.support.tools import ROOT, isolated
from tests.support.waiting import TIMEOUT_S, eventually
from tornado_fal_proxy.spending import sqlite_statements
from tornado_fal_proxy.spending.sqlite_statements import usage
from tornado_fal_proxy.spending.sqlite_store import SqliteStore
from tornado_fal_proxy.spending.store import Account, StoreFailed

NOBODY = 65_534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a path in a new folder."""
    return tmp_path / "spending.sqlite"


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SqliteStore]:
    """Open a store for the block, which waits for a lock for a moment only."""
    store = SqliteStore(path, busy_timeout_s=0.05)
    await store.open()
    yield store
    await store.close()


async def fails(store: SqliteStore, path: Path, reason: str) -> None:
    """Assert that a reservation fails with a line for the operator, which names the file."""
    with pytest.raises(StoreFailed) as caught:
        await store.reserve(reservation("failed"))
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)


@pytest.mark.gen_test
async def test_processes_compete(path: Path) -> None:
    """Four processes with many clients get as many jobs as the limit allows, together."""
    await compete(f"sqlite:{path}")


@pytest.mark.gen_test
async def test_processes_are_killed(path: Path) -> None:
    """A process that is killed in any moment has lost nothing that it has reported as reserved."""
    await spend_and_be_killed(f"sqlite:{path}")
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


# All that can happen to a file.


@pytest.mark.gen_test
async def test_locked(path: Path) -> None:
    """A file that another program keeps locked fails what writes, after a time. It can still be read."""
    async with opened(path) as store:
        await store.reserve(reservation("1"))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        await fails(store, path, "another program has kept the file locked for 0.05 s")
        assert await store.owner("1") == "ann"
        other.execute("ROLLBACK")
        assert (await store.reserve(reservation("2"))).used[0] == 2
        other.close()


@pytest.mark.gen_test
async def test_locked_for_a_moment(path: Path) -> None:
    """An operation waits for a lock as long as it may."""
    patient = SqliteStore(path)
    await patient.open()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.ensure_future(patient.reserve(reservation("1")))
    await asyncio.sleep(0.1)
    other.execute("ROLLBACK")
    other.close()
    assert (await waiting).refused_by is None
    await patient.close()


def wait(db: sqlite3.Connection, *_: object) -> Account:
    """Read the file, and go on when the test says so."""
    db.execute("BEGIN")
    db.execute("SELECT count(*) FROM account").fetchone()
    READS.set()
    assert GOES_ON.wait(TIMEOUT_S)
    return usage(db, "", "9", ("user",), None)


def never_end(db: sqlite3.Connection, *_: object) -> Account:
    READS.set()
    db.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n").fetchone()
    raise AssertionError


READS, GOES_ON = Event(), Event()


@pytest.mark.gen_test
async def test_a_long_report_holds_up_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are reserved, settled and forgotten while a report is read, which has the account as it was before."""
    monkeypatch.setattr(sqlite_statements, "usage", wait)
    async with opened(path) as store:
        READS.clear()
        GOES_ON.clear()
        await store.reserve(reservation("1"))
        report = asyncio.ensure_future(store.usage("", "9"))
        await eventually(READS.is_set)
        await store.reserve(reservation("2"))
        await store.settle("1", 1, 1)
        await store.prune(2**40, 1)
        assert await store.owner("2") is None
        GOES_ON.set()
        assert (await report).total.jobs == 1


@pytest.mark.gen_test
async def test_closing_breaks_a_report_off(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a report at the end."""
    monkeypatch.setattr(sqlite_statements, "usage", never_end)
    async with opened(path) as store:
        READS.clear()
        report = asyncio.ensure_future(store.usage("", "9"))
        await eventually(READS.is_set)
    with pytest.raises(StoreFailed, match="the report was broken off, because the proxy closes"):
        await report


@pytest.mark.gen_test
async def test_no_database(path: Path) -> None:
    """A file with something else in it is named and left as it is."""
    path.write_text("This is a letter to my aunt. " * 100)
    store = SqliteStore(path)
    with pytest.raises(StoreFailed, match="the file is not an SQLite file: name another file"):
        await store.open()
    await fails(store, path, "the file is not an SQLite file")
    assert path.read_text().startswith("This is a letter")
    path.unlink()
    assert (await store.reserve(reservation("1"))).refused_by is None
    await store.close()


@pytest.mark.gen_test
async def test_database_of_another_program(path: Path) -> None:
    """A database of another program is named and left as it is."""
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE aunts (name TEXT)")
    other.close()
    store = SqliteStore(path)
    with pytest.raises(StoreFailed, match="the file belongs to another program: name another file"):
        await store.open()
    await store.close()
    other = sqlite3.connect(path)
    assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("aunts",)]
    other.close()


@pytest.mark.gen_test
async def test_newer_schema(path: Path) -> None:
    """The file of a newer version is named and left as it is."""
    async with opened(path):
        pass
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version = 2")
    newer.close()
    store = SqliteStore(path)
    with pytest.raises(StoreFailed, match=r"a newer version of the proxy made the file \(its schema is 2\)"):
        await store.open()
    await store.close()


@pytest.mark.gen_test
async def test_damaged(path: Path) -> None:
    """A damaged file is named as such."""
    async with opened(path) as store:
        await asyncio.gather(*(store.reserve(reservation(str(i), limit=999)) for i in range(500)))
    with path.open("r+b") as file:
        file.seek(16_384)  # behind the schema
        file.write(os.urandom(path.stat().st_size - 16_384))
    async with opened(path) as store:
        await fails(store, path, "the file is damaged: stop the proxy, and restore the file or remove it")


@pytest.mark.gen_test
async def test_missing_folder(path: Path) -> None:
    """A folder that does not exist is not made. As soon as it exists, the store works."""
    path = path.parent / "missing" / path.name
    store = SqliteStore(path)
    with pytest.raises(StoreFailed, match="it must be in a folder that exists"):
        await store.open()
    path.parent.mkdir()
    assert (await store.reserve(reservation("1"))).refused_by is None
    await store.close()


@pytest.mark.gen_test
async def test_path_is_a_folder(path: Path) -> None:
    """A folder is no file."""
    path.mkdir()
    store = SqliteStore(path)
    with pytest.raises(StoreFailed, match="cannot open the file"):
        await store.open()
    await store.close()


@pytest.mark.gen_test
async def test_replaced(path: Path) -> None:
    """A file that is removed or replaced while it is used fails, because other processes may still use the old one."""
    async with opened(path) as store:
        await store.reserve(reservation("1"))
        path.rename(path.with_suffix(".moved"))
        await fails(store, path, "somebody removed or replaced the file: restart all processes that use it")
        shutil.copy(path.with_suffix(".moved"), path)
        await fails(store, path, "somebody removed or replaced the file")
        path.with_suffix(".moved").rename(path)
        assert (await store.reserve(reservation("2"))).used[0] == 2


@contextmanager
def without_rights() -> Iterator[None]:
    """Be a user without rights in the block, in all threads."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.gen_test
async def test_no_right_to_write() -> None:
    """A file or folder that the user may not write fails, until they may."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own is nobody's to enter
        folder = Path(name)
        folder.chmod(0o777)
        path = folder / "spending.sqlite"
        async with opened(path) as store:
            await store.reserve(reservation("1"))
        path.chmod(0o444)
        with without_rights():
            store = SqliteStore(path)
            with pytest.raises(StoreFailed, match="this user may not write the file, or its folder"):
                await store.open()
        path.chmod(0o666)
        folder.chmod(0o555)
        with without_rights():
            await fails(store, path, "this user may not write the file, or its folder")
        folder.chmod(0o777)
        with without_rights():
            assert (await store.reserve(reservation("2"))).used[0] == 2
            await store.close()
            path.unlink()


FULL_DISK = """
import asyncio, os, sys
from pathlib import Path
from threading import Event
from tests.support.spending_model import reservation
from tornado_fal_proxy.spending.sqlite_store import SqliteStore
from tornado_fal_proxy.spending.sqlite_statements import usage
from tornado_fal_proxy.spending.store import Account, StoreFailed

async def main(folder):
    store = SqliteStore(folder / "spending.sqlite")
    await store.open()
    (folder / "large").write_bytes(bytes(200_000))
    reserved, failures = [], []
    for number in range(2000):
        try:
            await store.reserve(reservation(str(number), f"u{number}", limit=10**6))
            reserved.append(str(number))
        except StoreFailed as failure:
            failures.append(str(failure))
    assert set(failures) == {f"{folder}/spending.sqlite: the disk is full"}, set(failures)
    assert reserved
    for id in reserved:
        assert await store.owner(id)
    (folder / "large").unlink()
    await store.reserve(reservation("last", limit=10**6))
    rows = (await store.usage("2026-12-31", "2026-12-31")).rows
    assert [row.jobs for row in rows] == [1] * (len(reserved) + 1)
    await store.close()

asyncio.run(main(Path(sys.argv[1])))
"""


def test_full_disk(tmp_path: Path) -> None:
    """A full disk fails operations as a whole, and nothing that was reported is lost. With room it works again."""
    done = subprocess.run(
        [
            *(*isolated(), "sh", "-ec", 'mount -t tmpfs -o size=600k none "$1"; exec "$2" -c "$3" "$1"', "sh"),
            *(str(tmp_path), sys.executable, FULL_DISK),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment({}),
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
