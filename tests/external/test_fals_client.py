"""fal's own JavaScript SDK, unchanged and in Node, gets the same through the proxy as from fal, and pays once.

There are two upstreams: the sandbox for all that works, and a scripted one for faults after fal took a job. The SDK
repeats a call that seems to have failed, so executions are counted where they are billed: upstream.
"""

import asyncio
import json
import re
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http.client import responses
from typing import Any

import h2.errors
import pytest

from tests.support.certificates import Authority
from tests.support.logs import Logs
from tests.support.node import RULES_ROUTE, WRONG_KEY_ROUTE, find_node, run_script, serve_sandbox
from tests.support.proxy import ROUTE, Setup
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import EVENT_STREAM, JSON

PACE = 0.5  # a run takes 0.6 s, a queued job 2 s: long enough to be polled at each of its steps

LOG = ["Loading the model", "Step 1 of 3", "Step 2 of 3", "Step 3 of 3", "Done"]
# The updates that a subscriber gets of a job: status, position in the queue, and the log so far.
LIFE: list[list[str | int | None]] = [
    ["IN_QUEUE", 2],
    ["IN_QUEUE", 1],
    ["IN_QUEUE", 0],
    ["IN_PROGRESS", None, *LOG[:1]],
    ["IN_PROGRESS", None, *LOG[:2]],
    ["IN_PROGRESS", None, *LOG[:3]],
    ["IN_PROGRESS", None, *LOG[:4]],
    ["COMPLETED", None, *LOG],
]
ASKED_FOR = "This error was asked for"
INVALID = {"detail": [{"type": "value_error", "loc": ["body", "prompt"], "msg": ASKED_FOR}]}

CLOSED = "This endpoint is not allowed by this proxy's allowed_endpoints."
CANCEL_CLOSED = "Only GET and POST are allowed; a PUT that cancels a queued job needs this proxy's allow_cancel."
UPLOADS_CLOSED = "Uploads are not allowed by this proxy's allow_uploads."

# The call, and the error that the SDK makes of its response: name, status, message and body.
REFUSED = [
    ("invalid", "ValidationError", 422, responses[422], INVALID),
    ("stream_refused", "ValidationError", 422, responses[422], INVALID),
    ("wrong_key", "ApiError", 401, "Unauthorized", {"detail": "No user found for Key ID and Secret"}),
    ("unknown_job", "ApiError", 404, "Not Found", {"detail": "Request not found", "status": "NOT_FOUND"}),
    ("run_500", "ApiError", 500, "Internal Server Error", {"detail": f"{ASKED_FOR}: Internal Server Error"}),
    ("result_refused", "ApiError", 500, "Internal Server Error", {"detail": f"{ASKED_FOR}: Internal Server Error"}),
    *(
        (name, "ApiError", 403, CLOSED, {"message": CLOSED})
        for name in ("run_closed", "submit_closed", "stream_closed")
    ),
    ("upload_closed", "ApiError", 403, UPLOADS_CLOSED, {"message": UPLOADS_CLOSED}),
    ("cancel", "ApiError", 405, CANCEL_CLOSED, {"message": CANCEL_CLOSED}),
]


@dataclass
class SdkCalls:
    """The output of ``calls.mjs``, and the sandbox's records of the same calls."""

    outcomes: dict[str, Any]
    executions: Counter[str]
    file_sizes: dict[str, int]
    public_url: str

    def value(self, name: str) -> Any:
        outcome = self.outcomes[name]
        assert "value" in outcome, outcome
        return outcome["value"]


@pytest.fixture(scope="module", autouse=True)
def node() -> None:
    """Skip a test without Node before it expects a line of the log."""
    find_node()


@pytest.fixture(scope="module")
def calls(authority: Authority) -> SdkCalls:
    """Run ``calls.mjs`` once. Each test below checks a part of the outcome."""

    async def make() -> SdkCalls:
        async with serve_sandbox(Setup(authority), PACE) as sandbox:
            url = sandbox.public_url
            outcomes = await run_script("calls.mjs", url + ROUTE, url + WRONG_KEY_ROUTE, url + RULES_ROUTE)
            sizes = {name: len(body) for name, (_, body) in sandbox.files.items()}
            return SdkCalls(outcomes, sandbox.executions, sizes, url)

    return asyncio.run(make())


def is_result(result: dict[str, Any]) -> bool:
    """Return whether it is the sandbox's picture, with fal's id of the call."""
    (image,) = result["data"]["images"]
    return (image["width"], image["url"].rpartition("/")[2]) == (512, f"{result['requestId']}.png")


@pytest.mark.parametrize("name", ["run", "run_by_get", "run_429", "run_502", "run_503", "run_504"])
def test_run_returns_the_result(calls: SdkCalls, name: str) -> None:
    """A run returns the result and its request id, also after an error for which the SDK rightly repeats the call."""
    assert is_result(calls.value(name))


def test_a_run_is_answered_at_once(calls: SdkCalls) -> None:
    """A run that takes the model no time is not delayed by one that began before it."""
    assert calls.value("first_answered") == "a run that takes no time"


@pytest.mark.parametrize("mode", ["polling", "streaming"])
def test_subscribe_follows_the_queue(calls: SdkCalls, mode: str) -> None:
    """A subscriber gets positions in the queue, the log as it grows, and then the result."""
    subscription = calls.value(f"subscribe_{mode}")
    steps = [LIFE.index(update) for update in subscription["updates"]]  # a slow machine misses some
    assert steps == sorted(steps)
    assert len(steps) > 1
    assert steps[-1] == len(LIFE) - 1
    assert is_result(subscription["result"])


def test_subscribe_survives_a_failed_status(calls: SdkCalls) -> None:
    """A status request that fails once is repeated, and the job is not."""
    assert is_result(calls.value("subscribe_despite_errors")["result"])


def test_queue_step_by_step(calls: SdkCalls) -> None:
    """Submit, a status, the stream of statuses and the result are all about one job."""
    queue = calls.value("queue")
    assert queue["early"]["error"]["body"] == {"detail": "Request is still in progress"}
    assert queue["status"]["request_id"] == queue["requestId"] == queue["result"]["requestId"]
    assert queue["steps"][0][0] in ("IN_QUEUE", "IN_PROGRESS")  # a slow machine misses some
    assert queue["steps"][-1][0] == "COMPLETED"
    assert [line for step in queue["steps"] for line in step[1:]] == LOG
    assert queue["done"]["status"] == "COMPLETED"
    assert is_result(queue["result"])


def test_stream_arrives_whole(calls: SdkCalls) -> None:
    """Events come one by one, characters of several bytes are never split, and done() has the last event."""
    stream = calls.value("stream")
    assert len(stream["lengths"]) == 12
    assert stream["grows"]
    assert stream["whole"]
    assert stream["partial"] is False


@pytest.mark.parametrize(
    ("name", "size", "kind"),
    [("upload", 700, "image/webp"), ("upload_in_parts", 200_000_012, "application/octet-stream")],
)
def test_upload(calls: SdkCalls, name: str, size: int, kind: str) -> None:
    """A file is uploaded to the address that came through the proxy, and is the same when it is read back."""
    upload = calls.value(name)
    assert (upload["same"], upload["size"], upload["type"]) == (True, size, kind)
    assert upload["url"].startswith(f"{calls.public_url}/sandbox/files/")
    assert calls.file_sizes[upload["url"].rpartition("/")[2]] == size


def test_realtime_token(calls: SdkCalls) -> None:
    """The token for a WebSocket comes through the proxy, and the SDK opens fal's own address with it."""
    assert re.fullmatch(
        r"wss://fal\.run/fal-ai/fast-lcm-diffusion/realtime\?fal_jwt_token=[\w-]+\.[\w-]+\.[\w-]+",
        calls.value("realtime"),
    )


@pytest.mark.parametrize(("name", "kind", "status", "message", "body"), REFUSED, ids=[case[0] for case in REFUSED])
def test_errors_are_readable(calls: SdkCalls, name: str, kind: str, status: int, message: str, body: object) -> None:
    """The SDK throws its own error, with status and text of fal's response or of the proxy's."""
    outcome = calls.outcomes[name]
    error = outcome.get("error") or outcome["value"]["error"]
    assert (error["name"], error["status"], error["message"], error["body"]) == (kind, status, message, body)
    if status == 422:
        assert error["fields"] == [[["body", "prompt"], ASKED_FOR]]


def test_an_allowed_endpoint_works(calls: SdkCalls) -> None:
    """If endpoints are restricted, an allowed one can be submitted, polled, read and streamed as usual."""
    assert is_result(calls.value("subscribe_allowed"))
    assert calls.value("stream_allowed")["partial"] is False


def test_cancel_where_it_is_allowed(calls: SdkCalls) -> None:
    """With allow_cancel queue.cancel reaches the job, which then has no result."""
    outcome = calls.value("cancel_allowed")
    assert "error" not in outcome["cancelled"]
    assert outcome["status"]["status"] == "COMPLETED"
    assert outcome["result"]["error"]["status"] == 499


def test_each_job_is_executed_once(calls: SdkCalls) -> None:
    """No job ran twice, however often the SDK repeated a call, and no refused job ran."""
    tags = ["run", "polling", "streaming", "status", "queue", "stream"]
    repeated = [f"{prefix}{status}" for prefix in ("", "submit ") for status in (429, 502, 503, 504)]
    untagged = Counter({"": calls.executions[""]})
    assert calls.executions - untagged == Counter(tags + repeated)


# No double billing.

MAY_HAVE_RUN = "The job may have run: check before sending it again."
HALF = b'{"images": ['  # of a result
LENGTH = 4 * len(HALF)

Fault = Callable[[Exchange], Awaitable[object]]


async def stall(exchange: Exchange) -> None:
    await exchange.gone.wait()


async def in_result(exchange: Exchange, fault: Fault) -> None:
    """Cause the fault after a head that promises more than the half that follows."""
    await exchange.start(200, JSON, LENGTH)
    await exchange.send(HALF)
    await fault(exchange)


async def in_endless_result(exchange: Exchange) -> None:
    """End the connection where only the framing shows that the result is not complete."""
    await exchange.start(200, JSON)
    await exchange.send(HALF)
    await exchange.close_connection()


async def reset(exchange: Exchange) -> None:
    exchange.abort_connection()


async def close(exchange: Exchange) -> None:
    await exchange.close_connection()


async def reset_stream(exchange: Exchange) -> None:
    exchange.reset()


async def refuse_stream(exchange: Exchange) -> None:
    exchange.reset(h2.errors.ErrorCodes.REFUSED_STREAM)


async def go_away(exchange: Exchange) -> None:
    exchange.goaway(last_stream_id=0)
    await exchange.close_connection()


async def close_after(exchange: Exchange, raw: bytes) -> None:
    await exchange.raw(raw)
    await exchange.close_connection()


# Faults of an upstream that has taken the job. Their names become parts of host names.
FAULTS: dict[str, Fault] = {
    "reset": reset,
    "close": close,
    "stall": stall,
    "result-reset": lambda exchange: in_result(exchange, reset),
    "result-close": lambda exchange: in_result(exchange, close),
    "result-stall": lambda exchange: in_result(exchange, stall),
    "result-of-unknown-length": in_endless_result,
    "result-no-gzip": lambda exchange: exchange.respond(200, HALF, [*JSON, ("content-encoding", "gzip")]),
}
FAULTS_OF: dict[str, dict[str, Fault]] = {
    "h2": FAULTS
    | {
        "stream-reset": reset_stream,
        "stream-refused": refuse_stream,  # untrue: the job was executed
        "goaway": go_away,  # untrue too
        "result-stream-reset": lambda exchange: in_result(exchange, reset_stream),
    },
    "http/1.1": FAULTS
    | {
        "garbage": lambda exchange: close_after(exchange, b"no HTTP at all\r\n\r\n"),
        "half-a-head": lambda exchange: close_after(exchange, b"HTTP/1.1 200 OK\r\ncontent-le"),
        "no-number": lambda exchange: close_after(exchange, b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n{}"),
    },
}


@pytest.mark.gen_test
async def test_a_job_that_fal_took_is_paid_once(setup: Setup, protocol: str, logs: Logs) -> None:
    """After any fault once fal took a job the SDK learns that the job may have run, and does not repeat it."""
    faults = FAULTS_OF[protocol]
    executions: Counter[str] = Counter()
    connections: dict[str, list[int]] = defaultdict(list)

    async def handler(exchange: Exchange) -> None:
        await exchange.body()
        connections[exchange.authority].append(exchange.connection_number)
        if exchange.target.startswith(b"/first"):
            await exchange.respond(200, b"{}", JSON)
            return
        executions[exchange.authority] += 1
        if executions[exchange.authority] == 1:
            await faults[exchange.authority.partition("--")[0]](exchange)
        else:
            await exchange.respond(200, b'"paid twice"', JSON)

    upstream = await setup.upstream(handler, protocol)
    urls = {
        stalls: f"http://127.0.0.1:{setup.proxy(upstream, **options)}{ROUTE}"
        for stalls, options in {False: {}, True: {"idle_timeout_s": 1.0}}.items()
    }
    cases = [
        {"url": urls["stall" in fault], "host": host, "operation": operation, "reused": reused}
        for fault in faults
        for operation in ("run", "submit")
        for reused in (False, True)
        for host in [f"{fault}--{operation}-{'reused' if reused else 'fresh'}.fal.run"]
    ]
    logs.expect(r"500 POST https://\S+/job/?: .*; the job may have run$")

    outcomes = await run_script("faults.mjs", json.dumps(cases))

    hosts = [str(case["host"]) for case in cases]
    errors = {host: outcomes[host].get("error", outcomes[host]) for host in hosts}
    assert {
        host: (error.get("name"), error.get("status"), str(error.get("message")).endswith(MAY_HAVE_RUN))
        for host, error in errors.items()
    } == dict.fromkeys(hosts, ("ApiError", 500, True))
    assert executions == Counter(hosts)
    for host in hosts:
        assert len(connections[host]) == 1 + ("-reused." in host)
        shared = protocol == "h2"  # a connection over HTTP/1 serves one call
        assert len(set(connections[host])) == (1 if shared else len(connections[host])), host


@pytest.mark.gen_test
async def test_an_aborted_call_is_cancelled_upstream(setup: Setup, protocol: str) -> None:
    """The SDK's abort of a run or a stream cancels the call at fal, while the SDK's process lives on."""
    loop = asyncio.get_running_loop()
    calls: dict[str, asyncio.Future[Exchange]] = defaultdict(loop.create_future)

    async def handler(exchange: Exchange) -> None:
        await exchange.body()
        match exchange.target.decode().split("/")[2:]:
            case ["run"]:
                calls["run"].set_result(exchange)
            case ["the", "stream"]:
                await exchange.start(200, EVENT_STREAM)
                await exchange.send(b'data: {"so": "far"}\n\n')
                calls["stream"].set_result(exchange)
            case [name, happened]:
                call = await calls[name]
                if happened == "has-gone":
                    await call.gone.wait()
                await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(handler, protocol)
    outcomes = await run_script("aborted.mjs", f"http://127.0.0.1:{setup.proxy(upstream)}{ROUTE}")

    assert outcomes["run"]["error"]["name"] == "AbortError"
    assert outcomes["stream"] == {"value": {"so": "far"}}
    gone = [exchange.target for exchange in upstream.exchanges if exchange.gone.is_set()]
    assert gone == [b"/abort/run", b"/abort/the/stream"]


@pytest.mark.gen_test
async def test_responses_that_break_off_or_come_in_pieces(setup: Setup, protocol: str, logs: Logs) -> None:
    """A result that breaks off is read again, because that costs nothing. A stream is not, and is an error.

    A stream whose characters come byte by byte arrives whole.
    """
    asked: Counter[bytes] = Counter()

    async def handler(exchange: Exchange) -> None:
        await exchange.body()
        asked[exchange.target] += 1
        match exchange.target.split(b"/")[1:]:
            case [b"broken", b"result", *_] if asked[exchange.target] == 1:
                await in_result(exchange, close)
            case [b"broken", b"result", *_]:
                await exchange.respond(200, b'"whole"', JSON)
            case [b"broken", *_]:
                await exchange.start(200, EVENT_STREAM)
                await exchange.send(b'data: "all that"\n\n')
                await exchange.close_connection()
            case [b"torn", *_]:
                await exchange.start(200, EVENT_STREAM)
                for byte in 'data: "Grüße 🌊 日本語"\n\n'.encode():
                    await exchange.send(bytes([byte]))
                    await asyncio.sleep(0.003)  # so long that the proxy reads each byte alone
                await exchange.end()

    logs.expect("200 GET https://queue.fal.run/broken/result/requests/1: .*; the response was aborted$")
    logs.expect("200 POST https://fal.run/broken/text/stream: .*; the response was aborted$")
    upstream = await setup.upstream(handler, protocol)
    outcomes = await run_script("broken.mjs", f"http://127.0.0.1:{setup.proxy(upstream)}{ROUTE}")

    assert outcomes["result"]["value"]["data"] == "whole"
    assert outcomes["broken"]["error"]["name"] == "ApiError"
    assert outcomes["torn"] == {"value": "Grüße 🌊 日本語"}
    assert asked == {b"/broken/result/requests/1": 2, b"/broken/text/stream": 1, b"/torn/text/stream": 1}
