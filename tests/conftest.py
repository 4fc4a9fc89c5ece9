"""What all tests share: a loop, a certificate authority, the proxy under test, and no unexpected log line."""

import asyncio
import logging
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tornado.httpserver import HTTPServer
from tornado.platform.asyncio import AsyncIOLoop
from tornado.testing import bind_unused_port
from tornado.web import Application
from upstream import Authority, Handler, Upstream

from tornado_fal_proxy import FalProxyHandler, ProxyConfig, close_upstreams

# Set by .ci/run: there a missing tool is a failure.
REQUIRE_TOOLS = "TORNADO_FAL_PROXY_REQUIRE_TOOLS"
KEY = "key-id-of-a-test:secret-of-a-test"
ROUTE = "/api/fal/proxy"


@pytest.fixture
def io_loop() -> Iterator[AsyncIOLoop]:
    """pytest-tornado's own makes a loop current in a way that Python 3.12 warns of."""
    asyncio_loop = asyncio.new_event_loop()
    asyncio.set_event_loop(asyncio_loop)  # pytest-tornado makes the test's task before the loop runs
    loop = AsyncIOLoop(asyncio_loop=asyncio_loop, make_current=False)
    yield loop
    for task in asyncio.all_tasks(asyncio_loop):
        task.cancel()
    asyncio_loop.run_until_complete(asyncio.sleep(0))
    asyncio_loop.run_until_complete(asyncio_loop.shutdown_asyncgens())
    loop.close(all_fds=False)
    asyncio.set_event_loop(None)


class Logs(logging.Handler):
    """All that was logged during a test. Lines of level WARNING and above must be expected, and none holds the key."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self._expected: list[re.Pattern[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def lines(self) -> list[str]:
        return [self.format(record) for record in self.records]

    def expect(self, pattern: str) -> None:
        """Lines that match are part of the test, and at least one must have come when it ends."""
        self._expected.append(re.compile(pattern))

    def check(self) -> None:
        lines = self.lines
        assert not [line for line in lines if KEY.partition(":")[2] in line]
        missing = [wanted.pattern for wanted in self._expected if not any(map(wanted.search, lines))]
        assert not missing, f"not logged: {missing} in {lines}"
        loud = [self.format(record) for record in self.records if record.levelno >= logging.WARNING]
        unexpected = [line for line in loud if not any(wanted.search(line) for wanted in self._expected)]
        assert not unexpected


@pytest.fixture(autouse=True)
def logs() -> Iterator[Logs]:
    """The log of the test; it fails at the end when something unexpected was logged."""
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


@pytest.fixture(params=["h2", "http/1.1"])
def protocol(request: pytest.FixtureRequest) -> str:
    """Runs the test once over each protocol towards fal."""
    return str(request.param)


class Setup:
    """The proxy in front of a scripted upstream, both in the loop of the test."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._closers: list[Callable[[], Awaitable[object]]] = []

    async def upstream(self, handler: Handler, protocol: str = "h2", **options: Any) -> Upstream:
        """A started upstream that speaks only ``protocol``."""
        context = options.pop("ssl_context", None) or self._authority.context()
        upstream = Upstream(handler, ssl_context=context, protocols=[protocol], **options)
        await upstream.start()
        self._closers.append(upstream.close)
        return upstream

    def config(self, upstream: Upstream | str, **fields: Any) -> ProxyConfig:
        """A configuration that directs every target at ``upstream``, or at that address."""
        fields = {"key": KEY, "ca_certs": self._authority.ca_file} | fields
        return ProxyConfig(connect_to=upstream if isinstance(upstream, str) else upstream.address, **fields)

    def serve(self, application: Application, **options: Any) -> int:
        """Serve ``application`` on a free port, and return that."""
        listener, port = bind_unused_port()
        server = HTTPServer(application, **options)
        server.add_sockets([listener])

        async def close() -> None:
            server.stop()
            close_upstreams(application)
            await server.close_all_connections()

        self._closers.append(close)
        return port

    def proxy(self, upstream: Upstream | str, **fields: Any) -> int:
        """The proxy in front of ``upstream`` in an application of its own, on the port returned."""
        rule = (ROUTE, FalProxyHandler, {"config": self.config(upstream, **fields)})
        return self.serve(Application([rule], log_function=lambda handler: None))

    async def close(self) -> None:
        for close in reversed(self._closers):
            await close()


@pytest.fixture
def setup(io_loop: AsyncIOLoop, authority: Authority) -> Iterator[Setup]:
    setup = Setup(authority)
    yield setup
    io_loop.asyncio_loop.run_until_complete(setup.close())


def tool(name: str, path: str | Path | None = None) -> str:
    """Where that program (or file, if ``path`` is given) is. Without it the test is skipped, and fails in CI."""
    found = (str(path) if Path(path).exists() else None) if path else shutil.which(name)
    if found is None:
        (pytest.fail if os.environ.get(REQUIRE_TOOLS) else pytest.skip)(f"{name} is not installed")
    return str(found)


def isolated() -> list[str]:
    """What runs a command in a network and with mounts of its own. Without it the test is skipped, and fails in CI."""
    command = [tool("unshare"), *([] if os.geteuid() == 0 else ["--map-root-user"]), "--net", "--mount"]
    tried = subprocess.run(
        [*command, tool("mount"), "--bind", "/etc", "/etc"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        (pytest.fail if os.environ.get(REQUIRE_TOOLS) else pytest.skip)(f"no namespaces: {tried.stderr.strip()}")
    return command


def unused_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
