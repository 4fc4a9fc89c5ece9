"""/metrics, /healthz and /readyz on the operator's port."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.metrics import Scrape, ended_lines, started, until, until_totals
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, call
from tests.support.service_process import COMMAND, WITH_KEY, connects, environment
from tests.support.stub_handlers import Gate, as_asked
from tests.support.tools import tool
from tests.support.waiting import TIMEOUT_S, eventually


def test_no_room_for_metrics() -> None:
    """If several workers cannot count together, the start ends with a line, and not later with a signal."""
    ended = subprocess.run(
        ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *COMMAND, "--port=0", "--admin-port=0", "--processes=2"],
        env=environment(WITH_KEY),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 2
    assert "--admin-port: no room for metrics in the temporary directory" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("variable", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.gen_test
async def test_another_programs_directory(
    setup: Setup, tmp_path: Path, processes: str, variable: str, there: bool
) -> None:
    """The variable of prometheus_client, set for another program, stops no start, and its directory stays as it is."""
    directory = tmp_path / "metrics"
    if there:
        directory.mkdir()
    environ = {variable: str(directory)}
    running, admin = await started(setup, await setup.upstream(as_asked), processes, **environ)
    assert (await call(running.port)).status == 200
    await until(admin, lambda scrape: scrape.total("fal_proxy_calls_total") == 1)
    assert not list(tmp_path.glob("metrics/*"))
    await running.end()


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.gen_test
async def test_metrics(setup: Setup, processes: str) -> None:
    """The counts of all workers come together, each call is counted once, and Prometheus's own tool accepts them."""
    upstream = await setup.upstream(as_asked)
    running, admin = await started(setup, upstream, f"--processes={processes}", "--log-level=error")
    for _ in range(20):
        assert (await call(running.port)).status == 200
    await call(running.port, "GET", target="https://fal.run/fal-ai/flux/stream")
    await call(running.port, "DELETE")
    await call(running.port, "GET", target="https://queue.fal.run/a/b/requests/resets")
    waiting = await RawClient.open(running.port)
    await waiting.send(target="https://fal.run/a/b/silent")
    await eventually(lambda: len(upstream.exchanges) >= 24)
    if processes == "1":
        scrape = await Scrape.of(admin)
        assert scrape.total("fal_proxy_in_flight") == 1
        assert scrape.total("fal_proxy_upstream_connections") == upstream.open_connections
        assert scrape.total("fal_proxy_client_connections") == 1
    waiting.leave()

    calls, workers = "fal_proxy_calls_total", int(processes)
    scrape = await until_totals(
        admin,
        (24, calls, {}),
        (20, calls, {"kind": "run", "outcome": "ok", "method": "POST", "error": ""}),
        (1, calls, {"kind": "stream", "outcome": "ok", "method": "GET"}),
        (1, calls, {"kind": "none", "outcome": "refused", "method": "other", "error": "MethodNotAllowed"}),
        (1, calls, {"kind": "queue_result", "outcome": "upstream_error", "error": "ConnectionLost"}),
        (1, calls, {"kind": "run", "outcome": "client_disconnected"}),
        (0, "fal_proxy_in_flight", {}),
        (1, "fal_proxy_cancellations_total", {}),
        (21, "fal_proxy_upstream_responses_total", {"protocol": "2", "status": "2xx"}),
        (20, "fal_proxy_first_byte_seconds_count", {"kind": "run"}),
        (21, "fal_proxy_call_seconds_count", {"kind": "run"}),
        (21 * 2, "fal_proxy_body_bytes_total", {"direction": "received"}),
        (workers, "fal_proxy_workers", {}),
        (workers, "fal_proxy_workers_expected", {}),
        (20_000 * workers, "fal_proxy_max_in_flight", {}),
        (1, "fal_proxy_build_info", {}),
        (0, "fal_proxy_worker_restarts_total", {}),
    )

    process = await asyncio.create_subprocess_exec(tool("promtool"), "check", "metrics", stdin=-1, stdout=-1, stderr=-1)
    output = await process.communicate(scrape.body)
    assert (process.returncode, *output) == (0, b"", b"")
    await ended_lines(running)


@pytest.mark.gen_test
async def test_metrics_outlive_a_worker(setup: Setup) -> None:
    """A worker that is killed is counted as a restart, and its counts stay."""
    running, admin = await started(setup, await setup.upstream(as_asked), "--processes=2", "--log-level=error")
    for _ in range(10):
        assert (await call(running.port)).status == 200
    await until(admin, lambda scrape: scrape.total("fal_proxy_calls_total") == 10)
    before = running.workers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: len(workers := running.workers()) == 2 and not set(workers) & set(before))

    await until(admin, lambda scrape: scrape.total("fal_proxy_workers") == 2)
    for _ in range(5):
        assert (await call(running.port)).status == 200
    scrape = await until(admin, lambda scrape: scrape.total("fal_proxy_calls_total", outcome="ok") == 15)
    assert scrape.total("fal_proxy_worker_restarts_total") == 2
    await running.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.gen_test
async def test_no_metrics_are_left_behind(setup: Setup, tmp_path: Path, number: signal.Signals) -> None:
    """No file of metrics is left, however the service ends. If the parent is killed, its workers remove the files."""
    running, _ = await started(setup, await setup.upstream(as_asked), "--processes=2", TMPDIR=str(tmp_path))
    assert list(tmp_path.iterdir())
    running.process.send_signal(number)
    await eventually(lambda: not list(tmp_path.iterdir()))
    await running.process.communicate()


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.gen_test
async def test_ready_until_it_drains(setup: Setup, processes: str) -> None:
    """/readyz is 503 while calls in flight are finished; /healthz is 200 all the time."""
    gate = Gate()
    upstream = await setup.upstream(gate)
    running, admin = await started(setup, upstream, f"--processes={processes}")

    async def status(path: str) -> int:
        return (await call(admin, "GET", target=None, path=path)).status

    assert [await status(path) for path in ("/healthz", "/readyz", "/nowhere")] == [200, 200, 404]
    client = await RawClient.open(running.port)
    await client.send()
    await eventually(lambda: upstream.exchanges)
    running.process.send_signal(signal.SIGTERM)

    async with asyncio.timeout(TIMEOUT_S):
        while await status("/readyz") != 503:
            await asyncio.sleep(0.02)
    assert await status("/healthz") == 200
    assert await status("/metrics") == 200
    gate.open.set()
    assert (await client.response()).status == 200
    await client.close()
    await running.ended()


@pytest.mark.gen_test
async def test_a_request_that_comes_at_the_end(setup: Setup, processes: str) -> None:
    """A connection to the admin port that is open when its process ends still gets a response."""
    running, admin = await started(setup, await setup.upstream(as_asked), processes)
    fresh, used = [await RawClient.open(admin) for _ in range(2)]
    await used.send("GET", target=None, path="/readyz")
    assert (await used.response()).status == 200
    running.process.terminate()
    await eventually(lambda: not connects(admin))
    for client in (fresh, used):
        await client.send("GET", target=None, path="/readyz")
        response = await client.response()
        assert (response.status, response.header("connection")) == (503, "close")
        await client.close()
    await running.ended()


@pytest.mark.gen_test
async def test_the_admin_port_is_not_for_clients(setup: Setup) -> None:
    """The public port serves no path of the admin port, and the admin port relays no call."""
    running, admin = await started(setup, await setup.upstream(as_asked))
    for path in ("/metrics", "/readyz"):
        assert (await call(running.port, "GET", target=None, path=path)).status == 404
    assert (await call(running.port, "GET", target=None, path="/healthz")).status == 200
    assert (await call(admin)).status == 404
    assert (await call(admin, body=b"x" * 5000, path="/healthz")).status == 413  # no body is kept there either
    await running.end()
