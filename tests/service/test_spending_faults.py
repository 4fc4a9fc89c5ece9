"""Limits on spending of the service while its store suffers: one line says why, and only paid calls notice.

Each fault is caused in a real file or a real Redis while the service runs. The stores themselves are tested in
test_sqlite_store.py and in external/test_redis_store.py.
"""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from tests.support.proxy import Setup
from tests.support.redis_server import running_redis
from tests.support.service_process import environment
from tests.support.suffering import suffer
from tests.support.tools import ROOT, isolated, unused_port
from tests.support.waiting import TIMEOUT_S


class Stage:
    """A store and what happens to it: a test calls ``break_it`` and ``mend``."""

    def __init__(self, store: str, break_it: Callable[[], object], mend: Callable[[], object]) -> None:
        self.store, self.break_it, self.mend = store, break_it, mend


@asynccontextmanager
async def locked(folder: Path) -> AsyncIterator[Stage]:
    """Let another program lock the file."""
    path = folder / "spending.sqlite"
    other: list[sqlite3.Connection] = []

    def lock() -> None:
        other.append(sqlite3.connect(path, isolation_level=None))
        other[0].execute("BEGIN IMMEDIATE")

    yield Stage(f"sqlite:{path}", lock, lambda: other[0].rollback())
    other[0].close()


@asynccontextmanager
async def replaced(folder: Path) -> AsyncIterator[Stage]:
    """Take the file away, and put it back."""
    path, away = folder / "spending.sqlite", folder / "away"
    yield Stage(f"sqlite:{path}", lambda: path.rename(away), lambda: away.rename(path))


@asynccontextmanager
async def killed(_folder: Path) -> AsyncIterator[Stage]:
    """Kill Redis."""
    with running_redis() as server:
        yield Stage(server.url(), lambda: server.signal(signal.SIGKILL), server.start)


@asynccontextmanager
async def hanging(_folder: Path) -> AsyncIterator[Stage]:
    """Stop Redis, which keeps its connections."""
    with running_redis() as server:
        yield Stage(server.url(), lambda: server.signal(signal.SIGSTOP), lambda: server.signal(signal.SIGCONT))


@asynccontextmanager
async def other_password(_folder: Path) -> AsyncIterator[Stage]:
    """Change the password, and let Redis end the connections that had the old one."""
    with running_redis("--requirepass", "right-s3cret") as server:

        def change(old: str, new: str) -> None:
            server.command("-a", old, "--no-auth-warning", "CONFIG", "SET", "requirepass", new)
            server.command("-a", new, "--no-auth-warning", "CLIENT", "KILL", "TYPE", "normal")

        yield Stage(
            server.url(password="right-s3cret"),
            lambda: change("right-s3cret", "other-s3cret"),
            lambda: change("other-s3cret", "right-s3cret"),
        )


@asynccontextmanager
async def full_redis(_folder: Path) -> AsyncIterator[Stage]:
    """Fill the memory that Redis may use."""
    with running_redis() as server:
        yield Stage(
            server.url(),
            lambda: server.command("CONFIG", "SET", "maxmemory", "1"),
            lambda: server.command("CONFIG", "SET", "maxmemory", "0"),
        )


@asynccontextmanager
async def failing_over(_folder: Path) -> AsyncIterator[Stage]:
    """Make Redis a replica of nobody, as while another server is made the master, and then the master again."""
    with running_redis() as server:
        yield Stage(
            server.url(),
            lambda: server.command("REPLICAOF", "127.0.0.1", str(unused_port())),
            lambda: server.command("REPLICAOF", "NO", "ONE"),
        )


# What happens to the store, and the line of the log.
FAULTS: list[tuple[Callable[[Path], AbstractAsyncContextManager[Stage]], str]] = [
    (locked, r"\.sqlite: another program has kept the file locked for 5 s"),
    (replaced, r"\.sqlite: somebody removed or replaced the file: restart all processes that use it"),
    (killed, r"redis://127\.0\.0\.1:\d+/0: .*[Cc]onnect"),
    (hanging, r"redis://127\.0\.0\.1:\d+/0: it does not respond in time"),
    (other_password, r"redis://127\.0\.0\.1:\d+/0: the user or the password is wrong or missing"),
    (full_redis, r"redis://127\.0\.0\.1:\d+/0: .*maxmemory"),
    (failing_over, r"redis://127\.0\.0\.1:\d+/0: the server is a replica, which only reads: name the master"),
]


@pytest.mark.parametrize(("fault", "line"), FAULTS, ids=[row[0].__name__ for row in FAULTS])
@pytest.mark.gen_test
async def test_fault(
    setup: Setup, tmp_path: Path, fault: Callable[[Path], AbstractAsyncContextManager[Stage]], line: str
) -> None:
    """Paid calls are 503 until the store works again, polls and results pass, and one line says why, once."""
    async with fault(tmp_path) as stage:
        await suffer(setup, stage.store, stage.break_it, stage.mend, line)


@pytest.mark.gen_test
async def test_wrong_password(setup: Setup) -> None:
    """A service whose password is wrong starts all the same, and counts as soon as the password is that of Redis."""
    with running_redis("--requirepass", "right-s3cret") as server:
        right = ("-a", "right-s3cret", "--no-auth-warning", "CONFIG", "SET", "requirepass", "wrong-s3cret")
        await suffer(
            setup,
            server.url(password="wrong-s3cret"),
            None,
            lambda: server.command(*right),
            r"redis://127\.0\.0\.1:\d+/0: the user or the password is wrong or missing",
        )


def test_full_disk(tmp_path: Path) -> None:
    """A full disk is a fault like the others: the same happens, on a disk of its own."""
    done = subprocess.run(
        [
            *(*isolated(), "sh", "-ec", 'mount -t tmpfs -o size=600k none "$1"; exec "$2" -m "$3" "$1"', "sh"),
            *(str(tmp_path), sys.executable, "tests.support.programs.full_disk"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment({}),
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
