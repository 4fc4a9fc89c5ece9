"""What is told of a call: one record for each, in the access log and the metrics, whatever became of it."""

import asyncio
import json
import logging
import os
import re
import select
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from caller import ROUTE, Answer, Caller, call, request
from conftest import KEY, Logs, Setup, tool
from prometheus_client.parser import text_string_to_metric_families
from running import COMMAND, TIMEOUT_S, WITH_KEY, Running, environment, eventually
from tornado.web import Application, HTTPError
from upstream import Exchange

from tornado_fal_proxy import FalProxyHandler, Target
from tornado_fal_proxy.callers import UNIX, TrustedProxies
from tornado_fal_proxy.logs import LINES_AT_ONCE, AccessLog, Fields, JsonFormatter, Lines, PlainFormatter
from tornado_fal_proxy.policy import ResponseHead, parse_target
from tornado_fal_proxy.telemetry import Call, endpoint_class

EVENT = b'data: {"n": 1}\n\n'
SSE = [("content-type", "text/event-stream")]


async def answers(exchange: Exchange) -> None:
    """What the target asks for."""
    what = exchange.target.partition(b"?")[0].rpartition(b"/")[2]
    if what == b"early":
        await exchange.respond(422, b"{}")
    await exchange.body()
    if what == b"silent":
        return
    if what == b"resets":
        exchange.reset()
    elif what in (b"stream", b"breaks", b"endless"):
        await exchange.start(200, [*SSE, ("x-fal-request-id", "fal-7")])
        await exchange.send(EVENT)
        if what == b"breaks":
            exchange.reset()
        elif what == b"stream":
            await exchange.end()
    elif what == b"large":
        await exchange.respond(200, bytes(8_000_000), [("content-type", "application/json")])
    elif what != b"early":
        await exchange.respond(200, b"[1]", [("content-type", "application/json"), ("x-fal-request-id", "fal-7")])


class Recording(FalProxyHandler):
    """Keeps what it is told."""

    def on_call_end(self, call: Call) -> None:
        self.application.settings["calls"].append(call)

    def authorize(self, target: Target) -> Any:
        match self.request.headers.get("x-user"):
            case "stranger":
                return False
            case "banned":
                raise HTTPError(429, reason="Slow down.")
            case "lost":
                self.redirect("https://app.example/login")
                return False
            case "bug":
                raise ValueError("no")
        return True


def serve(setup: Setup, upstream: Any, **fields: Any) -> tuple[int, list[Call]]:
    calls: list[Call] = []
    rule = (ROUTE, Recording, {"config": setup.config(upstream, **fields)})
    return setup.serve(Application([rule], calls=calls, log_function=lambda handler: None)), calls


@dataclass
class Case:
    """A call, what it comes to, and what is left in the log of the test."""

    outcome: str
    why: str = ""
    status: int = 200
    method: str = "POST"
    path: str = "fal-ai/flux/dev"
    headers: tuple[str, ...] = ()
    body: bytes = b"{}"
    sent: int | None = None
    logged: str = ""
    leaves: str = ""  # when: before the body, waiting, reading
    broken: bool = False


CASES = {
    "a result": Case("ok", sent=3),
    "a GET": Case("ok", method="GET", sent=3),
    "a stream": Case("ok", path="fal-ai/flux/stream", sent=len(EVENT)),
    "an error of fal's": Case("ok", status=422, path="a/b/early", sent=2),
    "no answer": Case("upstream_error", "ConnectionLost", 500, path="a/b/resets", logged="500 POST .*may have run"),
    "no answer to a GET": Case("upstream_error", "ConnectionLost", 502, "GET", "a/b/resets", logged="502 GET"),
    "too slow": Case("upstream_error", "UpstreamTimeout", 500, path="a/b/silent", logged="500 POST .*may have run"),
    "a broken stream": Case(
        *("upstream_error", "ConnectionLost", 200, "GET", "a/b/breaks"),
        sent=len(EVENT),
        logged="broken off",
        broken=True,
    ),
    "another method": Case("refused", "MethodNotAllowed", 405, "DELETE"),
    "another target": Case("refused", "TargetRefused", 412, path="a\\b"),
    "a closed endpoint": Case("refused", "EndpointNotAllowed", 403, path="closed/model"),
    "another type": Case("refused", "UnsupportedMediaType", 415, headers=("content-encoding: gzip",)),
    "a large body": Case("refused", "BodyTooLarge", 413, body=b"[%s]" % (b"1," * 5000)),
    "a stranger": Case("refused", "Unauthorized", 401, headers=("x-user: stranger",)),
    "one too many": Case("refused", "HTTPError", 429, headers=("x-user: banned",)),
    "an answer of the application's": Case("ok", "", 302, headers=("x-user: lost",), sent=0),
    "a bug of the application's": Case(
        "failed", "Misconfigured", 500, headers=("x-user: bug",), logged="500 POST: authorize raised ValueError"
    ),
    "left before the body": Case("caller_gone", "CallerGone", 499, leaves="before"),
    "left while it waited": Case("caller_gone", "CallerGone", 499, path="a/b/silent", leaves="waiting"),
    "left with half of a result": Case("caller_gone", "CallerGone", 499, path="a/b/large", leaves="reading"),
    "left while it read": Case(
        "caller_gone", "CallerGone", 499, "GET", "a/b/endless", sent=len(EVENT), leaves="reading"
    ),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.gen_test
async def test_each_call_is_told_once(setup: Setup, logs: Logs, name: str) -> None:
    """With its outcome, whatever that is, and its answer names the call's id."""
    case = CASES[name]
    upstream = await setup.upstream(answers)
    port, calls = serve(
        setup, upstream, max_body_bytes=9999, allowed_endpoints=("a/**", "fal-ai/**"), idle_timeout_s=0.5
    )
    if case.logged:
        logs.expect(case.logged)
    caller = await Caller.open(port)
    url = f"https://fal.run/{case.path}"
    data = request(case.method, case.body, target=url, headers=[*case.headers, "x-request-id: my-call.1"])
    caller.writer.write(data[:-1] if case.leaves == "before" else data)
    answer = None
    if case.leaves == "before":
        await asyncio.sleep(0.05)
        caller.leave()
    elif case.leaves == "waiting":
        await eventually(lambda: upstream.exchanges)
        caller.leave()
    elif case.leaves == "reading" or case.broken:
        answer = await caller.head()
        if case.path != "a/b/large":
            assert await caller.chunk() == EVENT
        if case.leaves:
            caller.leave()
        else:
            assert await caller.reader.read() == b""
    else:
        answer = await caller.answer()
    await eventually(lambda: calls)
    await caller.close()
    await asyncio.sleep(0.02)
    (told,) = calls
    assert (told.outcome, told.why, told.status, told.method) == (
        case.outcome,
        case.why,
        case.status,
        "other" if case.method == "DELETE" else case.method,
    )
    assert told.request_id == "my-call.1"
    if answer is not None:
        assert answer.header("x-request-id") == "my-call.1"
        assert answer.status == case.status or case.leaves
        if case.path != "a/b/large":
            assert told.sent_bytes == (len(answer.body) if case.sent is None else case.sent)
        assert told.first_byte_s is None or 0 < told.first_byte_s <= told.seconds
    assert (told.head is not None) == (
        (case.outcome == "ok" and case.status != 302) or case.broken or case.leaves == "reading"
    )
    assert KEY not in json.dumps(told.fields("127.0.0.1"))


@pytest.mark.gen_test
async def test_what_is_told_changes_no_answer(setup: Setup, logs: Logs) -> None:
    """An on_call_end that raises is logged, without the text of the exception."""

    class Raising(FalProxyHandler):
        def on_call_end(self, call: Call) -> None:
            raise ValueError(KEY)

    rule = (ROUTE, Raising, {"config": setup.config(await setup.upstream(answers))})
    port = setup.serve(Application([rule], log_function=lambda handler: None))
    logs.expect("on_call_end raised ValueError\n")
    assert [(await call(port, method)).status for method in ("POST", "GET", "DELETE")] == [200, 200, 405]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("5f1e-AB.c:d/e+f=_@", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("", False),
        ("two words", False),
        ('"quoted"', False),
        ("caf\xe9", False),
        ("\x1b[31m", False),
    ],
)
@pytest.mark.gen_test
async def test_request_id(setup: Setup, given: str, kept: bool) -> None:
    """The caller's own is kept if it is one; else it is made. It does not go to fal."""
    upstream = await setup.upstream(answers)
    port, _ = serve(setup, upstream)
    caller = await Caller.open(port)
    await caller.send(headers=[f"X-Request-ID: {given}"])
    try:
        answer = await caller.answer()
    except asyncio.IncompleteReadError:
        assert "\x1b" in given  # Tornado takes no control character
        return
    finally:
        await caller.close()
    if answer.status == 400:
        assert "\x1b" in given
        return
    got = answer.header("x-request-id")
    assert got is not None
    assert (got == given) is kept
    assert kept or re.fullmatch("[0-9a-f]{32}", got)
    (exchange,) = upstream.exchanges
    assert exchange.header("x-request-id") is None


@pytest.mark.parametrize(
    ("method", "url", "kind"),
    [
        ("POST", "https://fal.run/fal-ai/flux/dev", "run"),
        ("POST", "https://fal.run/fal-ai/flux/dev/stream", "stream"),
        ("POST", "https://queue.fal.run/fal-ai/flux/dev?fal_webhook=x", "queue_submit"),
        ("GET", "https://queue.fal.run/fal-ai/flux/requests/1/status?logs=1", "queue_status"),
        ("GET", "https://queue.fal.run/fal-ai/flux/requests/1/status/stream", "queue_stream"),
        ("GET", "https://queue.fal.run/fal-ai/flux/requests/1", "queue_result"),
        ("PUT", "https://queue.fal.run/fal-ai/flux/requests/1/cancel", "queue_cancel"),
        ("POST", "https://rest.fal.ai/tokens/", "token"),
        ("POST", "https://rest.alpha.fal.ai/storage/upload/initiate", "storage"),
        ("GET", "https://rest.fal.ai/anything", "other"),
        ("GET", "https://v3.fal.ai/x", "other"),
    ],
)
def test_endpoint_class(method: str, url: str, kind: str) -> None:
    """Each kind of call that fal's clients make has a name, and there are no others."""
    assert endpoint_class(parse_target(url)) == kind


@pytest.mark.parametrize(
    ("peer", "forwarded", "caller"),
    [
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),  # a stranger may say what it likes
        ("127.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", ["1.1.1.1, 198.51.100.1"], "198.51.100.1"),  # what the caller itself sent stands before
        ("127.0.0.1", ["1.1.1.1", "198.51.100.1 , 10.1.2.3"], "198.51.100.1"),
        ("127.0.0.1", ["10.0.0.1, 10.0.0.2"], "10.0.0.1"),  # trusted ones only: the first of them
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", [""], "127.0.0.1"),
        ("127.0.0.1", ["evil\x1b[31m"], "127.0.0.1"),
        ("127.0.0.1", ["198.51.100.1, unknown"], "127.0.0.1"),
        ("127.0.0.1", ["unix"], "127.0.0.1"),
        ("127.0.0.1", ["fe80::1%" + "x" * 60_000], "fe80::1"),  # a zone is any text
        ("127.0.0.1", ["1" * 60_000], "127.0.0.1"),
        ("::ffff:127.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        (UNIX, ["198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", [", ".join(["198.51.100.1", *["10.0.0.1"] * 40])], "10.0.0.1"),
    ],
)
def test_callers_behind_proxies(peer: str, forwarded: list[str], caller: str) -> None:
    """The address that the last proxy that is not the operator's own had before it."""
    assert TrustedProxies(("127.0.0.1", "10.0.0.0/8", "unix")).caller(peer, forwarded) == caller
    assert TrustedProxies().caller(peer, forwarded) == peer


# The service.


def scrape_text(answer: Answer) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Each sample, by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


class Scrape(dict[str, Any]):
    """What /metrics says."""

    @classmethod
    async def of(cls, port: int) -> "Scrape":
        answer = await call(port, "GET", target=None, path="/metrics")
        assert answer.status == 200
        assert KEY not in answer.body.decode()
        scrape = cls()
        scrape.samples = scrape_text(answer)
        scrape.body = answer.body
        return scrape

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]
    body: bytes

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels, and any others."""
        wanted = set(labels.items())
        return sum(value for (key, pairs), value in self.samples.items() if key == name and wanted <= pairs)


async def started(setup: Setup, upstream: Any, *argv: str, **environ: Any) -> tuple[Running, int]:
    """The service with an admin port, and that port."""
    running = await Running.before(setup, upstream, "--admin-port=0", *argv, **environ)
    assert running.process.stdout is not None
    line = (await running.process.stdout.readline()).decode()
    match = re.fullmatch(r"metrics: http://127\.0\.0\.1:([0-9]+)/metrics\n", line)
    assert match is not None, line
    return running, int(match[1])


async def until(admin: int, holds: Callable[[Scrape], bool]) -> Scrape:
    """What /metrics says as soon as that holds: a call is counted when its answer has left."""
    async with asyncio.timeout(TIMEOUT_S):
        while not holds(scrape := await Scrape.of(admin)):
            await asyncio.sleep(0.05)
        return scrape


async def ended_lines(running: Running) -> list[str]:
    _, stderr = await running.end()
    assert KEY not in stderr
    return stderr.splitlines()


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.gen_test
async def test_access_log(setup: Setup, form: str) -> None:
    """A line for each call, with all that is asked for and without the query, and none can be forged."""
    upstream = await setup.upstream(answers)
    running, _ = await started(setup, upstream, f"--log-format={form}", "--trusted-proxies=127.0.0.1")
    port = running.port
    await call(port, headers=["x-request-id: first", "x-forwarded-for: 6.6.6.6, 203.0.113.7"])
    await call(port, "GET", target="https://fal.run/fal-ai/flux/stream?secret=1", headers=["x-request-id: second"])
    await call(port, target="https://evil.example/x", headers=["x-request-id: third"])
    await call(port, "GET", target=None, path="/nowhere%0aoutcome=ok", headers=["x-forwarded-for: \x85\x9b31m"])
    await call(port, "GET", target=None, path="/healthz")
    lines = await ended_lines(running)
    if form == "json":
        told = [entry for entry in map(json.loads, lines) if entry["logger"] == "tornado_fal_proxy.access"]
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", entry["time"]) for entry in told)
        assert all(json.loads(line)["level"] for line in lines)
    else:
        told = []
        for line in lines:
            if " INFO tornado_fal_proxy.access: " in line:
                pairs = re.findall(r'([a-z0-9_]+)=("(?:[^"\\]|\\.)*"|\S+)', line.partition("access: ")[2])
                told.append({name: None if value == "-" else value for name, value in pairs})
    assert not any("secret" in line for line in lines)
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert [(str(entry["status"]), entry["outcome"], entry["why"], entry["endpoint"]) for entry in told] == [
        ("200", "ok", None, "fal.run/fal-ai/flux/dev"),
        ("200", "ok", None, "fal.run/fal-ai/flux/stream"),
        ("412", "refused", "TargetRefused", None),
        ("404", "refused", "NotFound", None),
    ]
    first, second, third, fourth = told
    assert (first["caller"], first["request_id"], first["fal_request_id"]) == ("203.0.113.7", "first", "fal-7")
    assert (str(first["upstream_protocol"]), str(first["upstream_status"]), str(first["bytes"])) == ("2", "200", "3")
    assert 0 < float(first["first_byte_s"]) <= float(first["total_s"])
    assert (second["caller"], second["method"], str(second["bytes"])) == ("127.0.0.1", "GET", str(len(EVENT)))
    assert (third["request_id"], third["upstream_status"]) == ("third", None)
    assert fourth["caller"] == "127.0.0.1"
    assert (int(fourth["bytes"]), float(fourth["total_s"]) > 0) == (len(b'{"message": "Not found."}'), True)


def test_no_room_for_metrics() -> None:
    """Where several workers cannot count together the start ends with a line, and not later with a signal."""
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


def test_fields_are_plain() -> None:
    """As text, and as JSON."""
    fields = Fields(caller="a\x7f\x85\n b", why=None, status=200)
    assert str(fields) == r'caller="a\u007f\u0085\n b" why=- status=200'
    record = logging.LogRecord("x", logging.INFO, "", 0, Lines([(0.25, fields), (1.5, fields)]), (), None)
    lines = JsonFormatter().format(record).split("\n")
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert [json.loads(line)["caller"] for line in lines] == [fields["caller"]] * 2
    assert [json.loads(line)["time"][-15:] for line in lines] == ["00:00.250+00:00", "00:01.500+00:00"]
    text = PlainFormatter("%(asctime)s %(message)s").format(record).split("\n")
    assert [line[-len(str(fields)) - 7 :] for line in text] == [f"00,250 {fields}", f"01,500 {fields}"]


@pytest.mark.gen_test
async def test_lines_are_written_together(logs: Logs) -> None:
    """Soon after the calls, in their order, a few in each record."""
    logger = logging.getLogger("tornado_fal_proxy.access")
    access_log = AccessLog(logger)
    for number in range(2 * LINES_AT_ONCE + 1):
        access_log.add(Call("POST", f"call-{number}"), "::1")
    await eventually(lambda: len(logs.records) == 3)
    messages: list[Any] = [record.msg for record in logs.records]
    written = [fields["request_id"] for lines in messages for _, fields in lines]
    assert written == [f"call-{number}" for number in range(2 * LINES_AT_ONCE + 1)]
    access_log.write()
    assert len(logs.records) == 3


@pytest.mark.gen_test
async def test_the_last_call_is_logged(setup: Setup) -> None:
    """The service ends with it, so that its line cannot wait for others."""
    release = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await release.wait()
        await exchange.respond(200, b"[1]")

    upstream = await setup.upstream(answer)
    running = await Running.before(setup, upstream)
    held = asyncio.create_task(call(running.port))
    await eventually(lambda: upstream.exchanges)
    running.process.terminate()
    await running.said("ending: 1 calls in flight")
    release.set()
    assert (await held).status == 200
    _, stderr = await running.ended()
    (line,) = (line for line in stderr.splitlines() if " tornado_fal_proxy.access: " in line)
    assert " status=200 " in line


def test_lines_fit_into_one_write() -> None:
    """Such as JSON makes of the longest that there may be: processes that share a pipe would mix longer ones."""
    longest = Call("OPTIONS", "i" * 128)
    longest.target = Target(f"{'h' * 63}.fal.run", "/" + "p" * 1000)
    longest.head = ResponseHead(200, "1.1", [("x-fal-request-id", "f" * 128)], None, event_stream=False, coding="")
    longest.status, longest.sent_bytes = 200, 10**12
    longest.first_byte_s = longest.seconds = 86_399.123456
    longest.outcome, longest.why, longest.detail = "upstream_error", "UnsupportedMediaType", "d" * 1000
    lines = Lines([(1e9, Fields(longest.fields("ffff:" * 7 + "ffff")))] * LINES_AT_ONCE)
    record = logging.LogRecord("tornado_fal_proxy.access", logging.INFO, "", 0, lines, (), None)
    assert len(JsonFormatter().format(record)) < select.PIPE_BUF


@pytest.mark.gen_test
async def test_no_access_log(setup: Setup) -> None:
    """--log-level=warning has none."""
    running = await Running.before(setup, await setup.upstream(answers), "--log-level=warning")
    assert (await call(running.port)).status == 200
    assert not [line for line in await ended_lines(running) if "access" in line]


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.gen_test
async def test_metrics(setup: Setup, processes: str) -> None:
    """All workers' together, and each call once; Prometheus's own tool finds nothing to mend."""
    upstream = await setup.upstream(answers)
    running, admin = await started(setup, upstream, f"--processes={processes}", "--log-level=error")
    for _ in range(20):
        assert (await call(running.port)).status == 200
    await call(running.port, "GET", target="https://fal.run/fal-ai/flux/stream")
    await call(running.port, "DELETE")
    await call(running.port, "GET", target="https://queue.fal.run/a/b/requests/1/resets")
    waiting = await Caller.open(running.port)
    await waiting.send(target="https://fal.run/a/b/silent")
    await eventually(lambda: len(upstream.exchanges) >= 24)
    if processes == "1":
        scrape = await Scrape.of(admin)
        assert scrape.total("fal_proxy_in_flight") == 1
        assert scrape.total("fal_proxy_upstream_connections") == upstream.open_connections
        assert scrape.total("fal_proxy_caller_connections") == 1
    waiting.leave()

    scrape = await until(
        admin,
        lambda scrape: scrape.total("fal_proxy_calls_total") == 24 and not scrape.total("fal_proxy_in_flight"),
    )
    calls = "fal_proxy_calls_total"
    assert scrape.total(calls, endpoint="run", outcome="ok", method="POST", why="") == 20
    assert scrape.total(calls, endpoint="stream", outcome="ok", method="GET") == 1
    assert scrape.total(calls, endpoint="none", outcome="refused", method="other", why="MethodNotAllowed") == 1
    assert scrape.total(calls, endpoint="queue_result", outcome="upstream_error", why="ConnectionLost") == 1
    assert scrape.total(calls, endpoint="run", outcome="caller_gone") == 1
    assert scrape.total("fal_proxy_cancellations_total") == 1
    assert scrape.total("fal_proxy_upstream_answers_total", protocol="2", status="2xx") == 21
    assert scrape.total("fal_proxy_first_byte_seconds_count", endpoint="run") == 20
    assert scrape.total("fal_proxy_call_seconds_count", endpoint="run") == 21
    assert scrape.total("fal_proxy_body_bytes_total", direction="received") == 21 * 2
    assert scrape.total("fal_proxy_workers") == scrape.total("fal_proxy_workers_wanted") == int(processes)
    assert scrape.total("fal_proxy_max_in_flight") == 20_000 * int(processes)
    assert scrape.total("fal_proxy_build_info") == 1
    assert scrape.total("fal_proxy_worker_restarts_total") == 0

    process = await asyncio.create_subprocess_exec(tool("promtool"), "check", "metrics", stdin=-1, stdout=-1, stderr=-1)
    said = await process.communicate(scrape.body)
    assert (process.returncode, *said) == (0, b"", b"")
    await ended_lines(running)


@pytest.mark.gen_test
async def test_metrics_outlive_a_worker(setup: Setup) -> None:
    """One that is killed is counted as a restart, and what it had counted stays."""
    running, admin = await started(setup, await setup.upstream(answers), "--processes=2", "--log-level=error")
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
    """However the service ends: where the parent is killed, its workers clear up."""
    running, _ = await started(setup, await setup.upstream(answers), "--processes=2", TMPDIR=str(tmp_path))
    assert list(tmp_path.iterdir())
    running.process.send_signal(number)
    await eventually(lambda: not list(tmp_path.iterdir()))
    await running.process.communicate()


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.gen_test
async def test_ready_until_it_drains(setup: Setup, processes: str) -> None:
    """/readyz is 503 while calls in flight are finished; /healthz is 200 all the time."""
    release = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await release.wait()
        await exchange.respond(200, b"[1]")

    upstream = await setup.upstream(answer)
    running, admin = await started(setup, upstream, f"--processes={processes}")

    async def status(path: str) -> int:
        return (await call(admin, "GET", target=None, path=path)).status

    assert [await status(path) for path in ("/healthz", "/readyz", "/nowhere")] == [200, 200, 404]
    caller = await Caller.open(running.port)
    await caller.send()
    await eventually(lambda: upstream.exchanges)
    running.process.send_signal(signal.SIGTERM)

    async with asyncio.timeout(TIMEOUT_S):
        while await status("/readyz") != 503:
            await asyncio.sleep(0.02)
    if processes == "1":
        assert await status("/healthz") == 200
        assert await status("/metrics") == 200
    release.set()
    assert (await caller.answer()).status == 200
    await caller.close()
    await running.ended()


@pytest.mark.gen_test
async def test_the_admin_address_is_no_callers(setup: Setup) -> None:
    """Nothing of it is on the public port, and no call passes there."""
    running, admin = await started(setup, await setup.upstream(answers))
    for path in ("/metrics", "/readyz"):
        assert (await call(running.port, "GET", target=None, path=path)).status == 404
    assert (await call(running.port, "GET", target=None, path="/healthz")).status == 200
    assert (await call(admin)).status == 404
    await running.end()


@pytest.mark.parametrize("text", ["nginx", "10.0.0.1/8", "10.0.0.0/33", "", "Unix", "*"])
def test_what_is_no_trusted_proxy(text: str) -> None:
    """A trusted proxy is an address, a network or a socket file, and the error quotes anything else."""
    with pytest.raises(ValueError, match="is no address, no network such as 10") as caught:
        TrustedProxies(("127.0.0.1", text))
    assert str(caught.value).startswith(repr(text))
