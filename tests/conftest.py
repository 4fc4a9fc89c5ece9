"""Fixtures of all tests: a loop, a certificate authority, the proxy under test, and no unexpected log line."""

import asyncio
import logging
from collections.abc import Generator, Iterator

import pytest
from tornado.platform.asyncio import AsyncIOLoop

from tests.support import leftovers
from tests.support.certificates import Authority
from tests.support.clock import Clock
from tests.support.logs import Logs
from tests.support.proxy import Setup

HAS_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note for the fixtures that a test has failed."""
    report = yield
    item.stash[HAS_FAILED] = item.stash.get(HAS_FAILED, False) or report.failed
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what starts processes: all tests of the command, and all that need another program."""
    for item in items:
        if item.path.parent.name in ("service", "external"):
            item.add_marker("slow")


@pytest.fixture
def io_loop(request: pytest.FixtureRequest) -> Iterator[AsyncIOLoop]:
    """Return a loop. pytest-tornado's own fixture makes a loop current in a way that Python 3.12 warns of."""
    asyncio_loop = asyncio.new_event_loop()
    asyncio.set_event_loop(asyncio_loop)  # pytest-tornado makes the test's task before the loop runs
    loop = AsyncIOLoop(asyncio_loop=asyncio_loop, make_current=False)
    yield loop
    for task in asyncio.all_tasks(asyncio_loop):
        task.cancel()
    asyncio_loop.run_until_complete(asyncio.sleep(0))
    asyncio_loop.run_until_complete(asyncio_loop.shutdown_asyncgens())
    if request.node.stash.get(HAS_FAILED, False):
        asyncio_loop.run_until_complete(leftovers.abandon_all())
    leftovers.forget_all()
    loop.close(all_fds=False)
    asyncio.set_event_loop(None)


@pytest.fixture(autouse=True)
def logs() -> Iterator[Logs]:
    """Return the log of the test, and fail the test at its end if something unexpected was logged."""
    logs = Logs()
    root = logging.getLogger()
    root.addHandler(logs)
    yield logs
    root.removeHandler(logs)
    logs.check()


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FAL_KEY", "FAL_KEY_ID", "FAL_KEY_SECRET", "FAL_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(params=["h2", pytest.param("http/1.1", marks=pytest.mark.slow)])
def protocol(request: pytest.FixtureRequest) -> str:
    """Run the test once over each protocol towards fal: fast over the one that fal speaks."""
    return str(request.param)


@pytest.fixture
def setup(io_loop: AsyncIOLoop, authority: Authority) -> Iterator[Setup]:
    setup = Setup(authority)
    yield setup
    io_loop.asyncio_loop.run_until_complete(setup.close())


@pytest.fixture
def clock(io_loop: AsyncIOLoop, setup: Setup) -> Iterator[Clock]:
    """Return the loop's clock, which stands still until the test lets time pass."""
    clock = Clock(io_loop.asyncio_loop)
    yield clock
    clock.restore()
