"""SIGHUP reads the files of the options again: no call is lost, and a file that is wrong changes nothing."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Authority
from tests.support.fake_store import FakeStore
from tests.support.logs import Logs
from tests.support.metrics import started as started_with_admin
from tests.support.metrics import until_totals
from tests.support.proxy import KEY, ROUTE, SECRET, Setup
from tests.support.raw_client import RawClient, Response, call
from tests.support.scripted_upstream import Exchange
from tests.support.service_process import ServiceProcess
from tests.support.stub_handlers import Gate, fine
from tests.support.tools import ROOT, unused_port
from tests.support.waiting import TIMEOUT_S, arrived, eventually
from tornado_fal_proxy import ProxyConfig, close_upstreams, flush_spending
from tornado_fal_proxy.relay.backend import backends_of, shared_backend, store_failures
from tornado_fal_proxy.rules.trusted_proxies import TrustedProxies
from tornado_fal_proxy.service.application import make_application
from tornado_fal_proxy.spending.store import END, Note
from tornado_fal_proxy.upstream import failover

OPEN, CLOSED = "allowed_endpoints = ['fal-ai/flux/dev', 'fal-ai/other']\n", "allowed_endpoints = ['fal-ai/flux/dev']\n"
OTHER = "https://fal.run/fal-ai/other"


async def started(setup: Setup, upstream: object, path: Path, *argv: str) -> ServiceProcess:
    return await ServiceProcess.in_front_of(setup, upstream, f"--config={path}", *argv)


async def hangup(running: ServiceProcess, pattern: str = "INFO tornado_fal_proxy: reload: ") -> str:
    """Send SIGHUP, and return the line of the log."""
    running.process.send_signal(signal.SIGHUP)
    return await running.log_line(pattern)


async def until_status(running: ServiceProcess, status: int, times: int = 5) -> None:
    """Wait until a call of the other endpoint is answered with that status several times in a row, by all workers."""
    row = 0
    async with asyncio.timeout(TIMEOUT_S):
        while row < times:
            row = row + 1 if (await call(running.port, target=OTHER)).status == status else 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "options.toml"
    path.write_text(OPEN)
    return path


@pytest.mark.gen_test
async def test_under_load(setup: Setup, processes: str, path: Path) -> None:
    """With clients that call without a pause, three reloads lose no call, and each one's rules apply at once."""
    upstream = await setup.upstream(fine)
    running = await started(setup, upstream, path, processes, "--log-level=info")
    responses: list[Response] = []
    ends = False

    async def call_again_and_again() -> None:
        client = await RawClient.open(running.port)
        while not ends:
            await client.send()
            responses.append(await client.response())
        await client.close()

    clients = [asyncio.create_task(call_again_and_again()) for _ in range(10)]
    before = running.workers()
    for text, status in ((CLOSED, 403), (OPEN, 200), (CLOSED, 403)):
        count = len(responses)
        await eventually(lambda count=count: len(responses) > count + 20)  # type: ignore[misc]
        path.write_text(text)
        await hangup(running)
        await until_status(running, status)
    ends = True
    await asyncio.gather(*clients)
    assert {response.status for response in responses} == {200}
    assert {response.header("connection") for response in responses} == {None}
    assert running.workers() == before
    await running.end()


@pytest.mark.gen_test
async def test_a_file_that_is_wrong(setup: Setup, processes: str, path: Path) -> None:
    """One line names what is wrong, and the options stay; the next file that is right counts."""
    running = await started(setup, await setup.upstream(fine), path, processes)
    for text, problem in (
        ("allowed_endpoints = [", "is no TOML"),
        ("allowed_endpoint = ['a/b']", "line 1: allowed_endpoint: unknown, did you mean allowed_endpoints?"),
        ("max_in_flight = 0", "line 1: max_in_flight: must be"),
        (f"fal_key = '{SECRET}'", "the key for fal must not stand in this file"),
    ):
        path.write_text(text)
        line = await hangup(running, "reload")
        assert "ERROR tornado_fal_proxy: reload failed: nothing has changed: " in line
        assert problem in line
        await until_status(running, 200, 2)
    path.unlink()
    assert "cannot read" in await hangup(running, "reload failed")
    path.write_text(CLOSED)
    line = await hangup(running, "reload")
    assert f"{path} read again; open: anyone on this machine may call fal-ai/flux/dev; closed: " in line
    await until_status(running, 403)
    _, stderr = await running.end()
    assert "reload" not in stderr
    assert SECRET not in stderr


@pytest.mark.gen_test
async def test_calls_in_flight_keep_their_options(setup: Setup, processes: str, path: Path) -> None:
    """A stream goes on for as long as it likes, and the connections of its options are closed when it has ended."""
    goes_on = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        if len(upstream.exchanges) > 1:  # of a worker that has not read the file yet
            return await fine(exchange)
        await exchange.start(200, [("content-type", "text/event-stream")])
        await exchange.send(b"data: 1\n\n")
        await goes_on.wait()
        await exchange.send(b"data: 2\n\n")
        return await exchange.end()

    upstream = await setup.upstream(stream)
    running = await started(setup, upstream, path, processes, "--drain-timeout-s=0")
    client = await RawClient.open(running.port)
    await client.send(target=OTHER)
    await client.head()
    assert await client.chunk() == b"data: 1\n\n"
    path.write_text(CLOSED)
    await hangup(running)
    await until_status(running, 403)
    assert upstream.open_connections
    goes_on.set()
    assert [await client.chunk() for _ in range(2)] == [b"data: 2\n\n", b""]
    await client.close()
    await eventually(lambda: not upstream.open_connections)
    await running.end()


@pytest.mark.gen_test
async def test_the_key(setup: Setup, processes: str, tmp_path: Path) -> None:
    """A key file alone is reason enough: the next call has the new key, and calls in flight end with the old one."""
    upstream = await setup.upstream(gate := Gate())
    config = setup.config(upstream)
    (tmp_path / "key").write_text(KEY)
    running = await ServiceProcess.start(
        processes,
        FAL_KEY_FILE=str(tmp_path / "key"),
        FAL_PROXY_CA_CERTS=str(config.ca_certs),
        FAL_PROXY_CONNECT_TO=str(config.connect_to),
    )
    waiting = [asyncio.create_task(call(running.port)) for _ in range(4)]
    await arrived(upstream, 4)
    (tmp_path / "key").write_text("new:key")
    await hangup(running)
    gate.open.set()
    assert [(await task).status for task in waiting] == [200] * 4
    async with asyncio.timeout(TIMEOUT_S):
        for _ in range(4):
            while (await call(running.port)).status == 200:
                if upstream.exchanges[-1].header("authorization") == b"Key new:key":
                    break
    assert {exchange.header("authorization") for exchange in upstream.exchanges[:4]} == {f"Key {KEY}".encode()}
    await running.end()


@pytest.mark.gen_test
async def test_variables_prices_and_what_needs_a_start(setup: Setup, processes: str, tmp_path: Path) -> None:
    """A file of variables and one of prices count too, and the line names what waits for the next start."""
    (tmp_path / "prices.toml").write_text('"**" = 1\n')
    variables = f"FAL_PROXY_PRICES={tmp_path / 'prices.toml'}\nFAL_PROXY_BUDGET=4.00/day\n"
    (tmp_path / "proxy.env").write_text(variables)
    upstream = await setup.upstream(fine)
    store = f"--store=sqlite:{tmp_path / 'spent.sqlite'}"
    running = await ServiceProcess.in_front_of(
        setup, upstream, processes, store, f"--env-file={tmp_path / 'proxy.env'}", "--allowed-endpoints=**"
    )
    assert [(await call(running.port)).status for _ in range(3)] == [200] * 3
    (tmp_path / "prices.toml").write_text('"**" = 2\n')
    line = await hangup(running)
    assert f"reload: {tmp_path / 'proxy.env'}, {tmp_path / 'prices.toml'} read again; open: " in line
    assert "at the next start" not in line
    async with asyncio.timeout(TIMEOUT_S):
        while (await call(running.port)).status == 200:  # a worker that has not read them yet
            pass
    (tmp_path / "proxy.env").write_text(variables.replace("4.00", "90.00") + "FAL_PROXY_DRAIN_TIMEOUT_S=1\n")
    line = await hangup(running)
    assert "all together: $90.00 a day" in line
    assert line.endswith("; at the next start only: drain_timeout_s\n")
    async with asyncio.timeout(TIMEOUT_S):
        while (await call(running.port)).status == 402:
            pass
    await running.end()


@pytest.mark.gen_test
async def test_prices_of_queued_jobs(tmp_path: Path) -> None:
    """The bill of a job that was queued before is counted by the prices that the same file has now."""
    file = tmp_path / "prices.toml"
    fields = {"key": KEY, "prices": str(file), "budget": "9/day", "store": "memory"}
    file.write_text('"**" = 1\n')
    application = make_application(ProxyConfig(**fields), ROUTE)  # type: ignore[arg-type]
    ledger = shared_backend(application, application.config).ledger
    file.write_text('"**" = 2\n')
    application.use(ProxyConfig(**fields), TrustedProxies())  # type: ignore[arg-type]
    price = ledger.rules.price("a/b")
    assert price is not None
    assert price.cost(1_000_000) == 2_000_000
    assert shared_backend(application, application.config).ledger is ledger
    close_upstreams(application)
    await flush_spending(application)


@pytest.mark.gen_test
async def test_prices_that_come_back(tmp_path: Path) -> None:
    """Options that were used before, with other prices in the same file, count by those, also beside calls that run."""
    file = tmp_path / "prices.toml"
    fields: dict[str, Any] = {"key": KEY, "prices": str(file), "budget": "9/day", "store": f"sqlite:{tmp_path}/a.db"}
    file.write_text('"**" = 1\n')
    first = ProxyConfig(**fields)
    application = make_application(first, ROUTE)
    kept, lease = shared_backend(application, first), application._lease  # as a call in flight does
    assert kept.ledger.rules.price("a/b") is not None
    application.use(ProxyConfig(**fields, max_in_flight=5), TrustedProxies())
    file.write_text('"**" = 3\n')
    application.use(ProxyConfig(**fields), TrustedProxies())
    assert shared_backend(application, application.config) is kept
    price = kept.ledger.rules.price("a/b")
    assert price is not None
    assert price.cost(2_000_000) == 6_000_000
    del lease
    close_upstreams(application)
    await flush_spending(application)


@pytest.mark.gen_test
async def test_failures_of_a_store_before_a_reload(setup: Setup, path: Path, tmp_path: Path) -> None:
    """The metrics count what a store failed to do a moment before the reload that puts another in its place."""
    path.write_text(f"jobs = '9/day'\nstore = 'sqlite:{tmp_path}/no/spent.db'\n")
    running, admin = await started_with_admin(setup, await setup.upstream(fine), f"--config={path}")
    assert (await call(running.port)).status == 503
    path.write_text(f"jobs = '9/day'\nstore = 'sqlite:{tmp_path}/spent.db'\n")
    await hangup(running)
    assert (await call(running.port)).status == 200
    await until_totals(admin, (1, "fal_proxy_store_failures_total", {"operation": "reserve"}))
    await running.end()


@pytest.mark.gen_test
async def test_failures_of_a_store_that_closes(monkeypatch: pytest.MonkeyPatch, logs: Logs) -> None:
    """What a store fails to do while it closes behind a reload is counted too, whatever the options are now."""
    logs.expect("store failed: gone; an estimate is kept")
    store = FakeStore()
    monkeypatch.setattr("tornado_fal_proxy.relay.backend.make_store", lambda config: store)
    application = make_application(ProxyConfig(key=KEY, jobs="9/day", store="memory"), ROUTE)
    ledger = shared_backend(application, application.config).ledger
    await ledger.usage("2026-11-27", "2026-11-27")
    await ledger.flush()
    store.failing = "gone"
    application.use(ProxyConfig(key=KEY), TrustedProxies())
    ledger.note(Note(END, "1"))
    await eventually(lambda: ledger.is_closed)
    assert store_failures(application) == {"end": 1}
    close_upstreams(application)


@pytest.mark.gen_test
async def test_limits_are_those_of_one_service(setup: Setup) -> None:
    """Calls that still run with options of before count against the slots and the buffers of those of now."""
    gate = Gate()
    upstream = await setup.upstream(gate)
    application = make_application(setup.config(upstream, max_in_flight=2, max_buffered_bytes=2**21), ROUTE)
    port = setup.serve(application)
    calls = []
    for limit in (2, 3, 4):
        if limit > 2:
            config = setup.config(upstream, max_in_flight=limit, max_buffered_bytes=limit * 2**20)
            application.use(config, TrustedProxies())
        calls.append(asyncio.create_task(call(port)))
        await eventually(lambda: len(upstream.exchanges) == len(calls))
    calls.append(asyncio.create_task(call(port)))
    await eventually(lambda: len(upstream.exchanges) == 4)
    assert (await call(port)).status == 503
    backends = backends_of(application)
    assert len(backends) == 3
    assert [(slots.limit, slots.in_use) for slots in {each.slots for each in backends}] == [(4, 4)]
    assert [budget.limit for budget in {each.client.budget for each in backends}] == [4 * 2**20]
    gate.open.set()
    assert [(await each).status for each in calls] == [200] * 4
    await eventually(lambda: backends[-1].slots.in_use == 0 == backends[-1].client.budget.used)


@pytest.mark.gen_test
async def test_an_outage_outlasts_a_reload(
    setup: Setup, authority: Authority, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call after a reload goes to the backup at once, and the outage ends, each with one line of the log."""
    monkeypatch.setattr(failover, "PROBE_INTERVAL_S", 0.02)
    upstream = await setup.upstream(fine, ssl_context=authority.context("falrun.com"))
    primary = unused_port()
    addresses = f"127.0.0.1:{primary},{upstream.address}"
    application = make_application(setup.config(addresses, failover=True), ROUTE)
    port = setup.serve(application)
    assert (await call(port, target=OTHER)).status == 200
    lease = application._lease  # as a call in flight does
    application.use(setup.config(addresses, failover=True, max_in_flight=5), TrustedProxies())
    old, new = [backend.client for backend in backends_of(application)]
    assert old.down == new.down == ("fal.run",)
    assert (await call(port, target=OTHER)).status == 200
    assert len(upstream.exchanges) == 2
    await setup.upstream(fine, port=primary)
    await eventually(lambda: old.down == new.down == ())
    for event in ("cannot be reached: ", "can be reached again, "):
        logs.expect(f"failover: fal.run {event}")
        assert sum(event in line for line in logs.lines) == 1
    del lease
    application.use(setup.config(addresses.partition(",")[0]), TrustedProxies())
    await eventually(lambda: [backend.client.down for backend in backends_of(application)] == [()])


# The second worker waits at its start while there is a file "wait".
SECOND_WAITS = """
import pathlib, time
from tornado_fal_proxy.service import process
serve = process.serve
def wait(context, worker):
    while worker.slot == 1 and pathlib.Path("wait").exists():
        time.sleep(0.01)
    return serve(context, worker)
process.serve = wait
"""


@pytest.mark.gen_test
async def test_workers_that_start_meanwhile_or_later(setup: Setup, path: Path, tmp_path: Path) -> None:
    """A worker that starts during the reload reads the file too, and one that starts later has what was right last."""
    (tmp_path / "sitecustomize.py").write_text(SECOND_WAITS)
    config = setup.config(await setup.upstream(fine))
    running = await ServiceProcess.start(
        *(f"--config={path}", "--processes=2"),
        cwd=tmp_path,
        FAL_KEY=KEY,
        FAL_PROXY_CA_CERTS=str(config.ca_certs),
        FAL_PROXY_CONNECT_TO=str(config.connect_to),
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    first, second = running.workers()
    (tmp_path / "wait").touch()
    os.kill(second, signal.SIGKILL)
    await eventually(lambda: len({*running.workers()} - {first, second}) == 1)
    path.write_text(CLOSED)
    await hangup(running)
    (tmp_path / "wait").unlink()
    os.kill(first, signal.SIGSTOP)
    assert (await call(running.port, target=OTHER)).status == 403
    os.kill(first, signal.SIGCONT)
    path.write_text("broken")
    before = running.workers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: len({*running.workers()} - {*before}) == 2)
    await until_status(running, 403)
    await running.end()


@pytest.mark.gen_test
async def test_what_cannot_be_reloaded(setup: Setup, path: Path, tmp_path: Path) -> None:
    """A store in memory would forget, and a pipe has its key once: the line says so, and the options stay."""
    upstream = await setup.upstream(fine)
    running = await started(setup, upstream, path, "--jobs-per-user=99/day", "--store=memory")
    path.write_text(CLOSED)
    assert "store: memory would forget what users have spent" in await hangup(running, "reload failed")
    await until_status(running, 200, 1)
    await running.end()
    os.mkfifo(tmp_path / "pipe")
    writer = asyncio.get_running_loop().run_in_executor(None, (tmp_path / "pipe").write_text, KEY)
    running = await ServiceProcess.start(FAL_KEY_FILE=str(tmp_path / "pipe"))
    await writer
    assert "pipe' is a pipe, which cannot be read again" in await hangup(running, "reload failed")
    await running.end()


@pytest.mark.gen_test
async def test_during_a_drain(setup: Setup, processes: str, path: Path) -> None:
    """SIGHUP in a drain aborts nothing."""
    upstream = await setup.upstream(gate := Gate())
    running = await started(setup, upstream, path, processes)
    waiting = asyncio.create_task(call(running.port))
    await arrived(upstream, 1)
    running.process.terminate()
    await running.log_line("drain: ")
    running.process.send_signal(signal.SIGHUP)
    gate.open.set()
    assert (await waiting).status == 200
    await running.ended()
