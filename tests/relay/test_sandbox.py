"""The sandbox refuses wrong calls as fal does, keeps within its limits, and ends without a trace.

Its responses to right calls of fal's own client are in external/test_fals_client.py.
"""

import asyncio
import gc
import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import HTTPRequest, HTTPResponse
from tornado.platform.asyncio import AsyncIOLoop
from tornado.simple_httpclient import HTTPStreamClosedError, SimpleAsyncHTTPClient
from tornado.web import Application

from tests.support import raw_client
from tests.support.command_server import serve_and_log
from tests.support.logs import Logs
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, Response
from tests.support.waiting import eventually
from tornado_fal_proxy.sandbox import Sandbox, state
from tornado_fal_proxy.service import server
from tornado_fal_proxy.upstream import failover

HOSTS = ("fal.run", "queue.fal.run", "wma.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "api.fal.ai")
RUN = "https://fal.run/fal-ai/flux/dev"
SUBMIT = "https://queue.fal.run/fal-ai/flux/dev"
INITIATE = "https://rest.fal.ai/storage/upload/initiate"
NO_USER = "No user found for Key ID and Secret"


@pytest.fixture
def sandbox(io_loop: AsyncIOLoop) -> Iterator[Sandbox]:
    """Start a sandbox whose models take no time."""
    sandbox = Sandbox(pace=0.0)

    async def start() -> None:
        sandbox.start()

    io_loop.asyncio_loop.run_until_complete(start())
    yield sandbox
    io_loop.asyncio_loop.run_until_complete(sandbox.close())


@pytest.mark.gen_test
async def test_primary(sandbox: Sandbox, setup: Setup, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the usual hosts are off calls go to the backup, and go back when a probe finds them on again."""
    monkeypatch.setattr(failover, "PROBE_INTERVAL_S", 0.02)
    fields = {"ca_certs": sandbox.ca_certs, "key": sandbox.key, "failover": True}
    port, backend = setup.proxy_and_backend(f"{sandbox.address},{sandbox.backup_address}", **fields)
    for on in (True, False, True):
        sandbox.switch_primary(on)
        assert (await raw_client.call(port)).status == 200
        assert on or backend().client.down == ("fal.run",)
    await eventually(lambda: backend().client.down == ())
    logs.expect("failover: fal.run cannot be reached: .* its calls go to falrun.com")
    logs.expect("failover: fal.run can be reached again")


@pytest.mark.gen_test
async def test_switch(sandbox: Sandbox, setup: Setup) -> None:
    """A port that another program has taken leaves the usual hosts off, and servers that stopped are not kept."""
    port, entries = serve_and_log(setup, more=sandbox.page_rules("/proxy"))
    client = SimpleAsyncHTTPClient(force_instance=True)

    async def switch(body: str) -> tuple[int, bool]:
        url = f"http://127.0.0.1:{port}/sandbox/primary"
        return (await client.fetch(url, method="POST", body=body, raise_error=False)).code, sandbox.primary

    for _ in range(3):
        assert [await switch("off"), await switch("on")] == [(200, False), (200, True)]
    gc.collect()
    assert len(sandbox._servers) == 2
    await switch("off")
    with socket.create_server(("127.0.0.1", int(sandbox.address.rpartition(":")[2]))):
        assert await switch("on") == (503, False)
    assert await switch("on") == (200, True)
    client.close()
    assert [entry["status"] for entry in entries] == [200] * 7 + [503, 200]


async def fetch(
    sandbox: Sandbox, method: str, url: str, body: object = None, authorization: str | None = None
) -> HTTPResponse:
    """Call the sandbox with the right key, or with that ``authorization``."""
    port = int(sandbox.address.rpartition(":")[2])
    mapping = {(host, 443): ("127.0.0.1", port) for host in HOSTS}
    client = SimpleAsyncHTTPClient(force_instance=True, hostname_mapping=mapping)
    request = HTTPRequest(
        url,
        method,
        {"Authorization": f"Key {sandbox.key}" if authorization is None else authorization},
        body if isinstance(body, bytes) else None if body is None else json.dumps(body),
        ca_certs=sandbox.ca_certs,
        allow_nonstandard_methods=True,
    )
    try:
        return await client.fetch(request, raise_error=False)
    finally:
        client.close()


async def call(
    sandbox: Sandbox, method: str, url: str, body: object = None, authorization: str | None = None
) -> tuple[int, Any]:
    """Call the sandbox likewise, and return the status and the JSON of the response."""
    response = await fetch(sandbox, method, url, body, authorization)
    return response.code, json.loads(response.body)


async def until_called(sandbox: Sandbox) -> None:
    """Wait until a call is under way."""
    while not sandbox.calls:
        await asyncio.sleep(0.01)


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("authorization", "status", "detail"),
    [
        ("", 401, "Authentication is required to access this application."),
        ("Key wrong:key", 401, NO_USER),
        ("Key ÿ", 401, NO_USER),
        ("Bearer {key}", 401, NO_USER),
        ("{key}", 401, NO_USER),
        ("Key {key}", 200, None),
    ],
)
async def test_only_its_own_key_is_accepted(
    sandbox: Sandbox, authorization: str, status: int, detail: str | None
) -> None:
    """Any other key, or none, is 401, and nothing is executed."""
    code, content = await call(sandbox, "POST", RUN, {}, authorization.format(key=sandbox.key))
    assert (code, content.get("detail")) == (status, detail)
    assert sandbox.executions.total() == (status == 200)


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("method", "url", "status", "detail"),
    [
        ("POST", "https://api.fal.ai/fal-ai/flux/dev", 404, "Path /fal-ai/flux/dev not found"),
        ("POST", "https://fal.run/", 404, "Path / not found"),
        ("POST", "https://fal.run/alone", 404, "Path /alone not found"),
        ("POST", "https://queue.fal.run/alone", 404, "Path /alone not found"),
        ("POST", "https://rest.fal.ai/elsewhere", 404, "Path /elsewhere not found"),
        ("PUT", RUN, 405, "Method Not Allowed"),
        ("GET", SUBMIT, 405, "Method Not Allowed"),
        ("GET", "https://queue.fal.run/fal-ai/flux/requests/none", 404, "Request not found"),
        ("GET", "https://queue.fal.run/fal-ai/flux/requests/none/status", 404, "Request not found"),
        ("GET", "https://queue.fal.run/fal-ai/flux/requests/none/status/stream", 404, "Request not found"),
        ("PUT", "https://queue.fal.run/fal-ai/flux/requests/none/cancel", 404, "Request not found"),
        ("POST", INITIATE, 503, "Uploads need the address of the proxy: set Sandbox.public_url"),
    ],
)
async def test_unknown_urls(sandbox: Sandbox, method: str, url: str, status: int, detail: str) -> None:
    """A URL that fal does not have is refused with fal's status and detail, and nothing is executed."""
    code, content = await call(sandbox, method, url, {} if method == "POST" else None)
    assert (code, content["detail"]) == (status, detail)
    assert not sandbox.executions


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("url", "body", "names"),
    [
        ("https://rest.fal.ai/tokens/realtime", {"allowed_apps": ["a/b/c"], "duration": 9}, {"token"}),
        (
            "https://rest.fal.ai/storage/auth/token?storage_type=fal-cdn-v3",
            {},
            {"token", "token_type", "base_url", "expires_at"},
        ),
        ("https://wma.fal.run/ice", {"app_id": "a/b"}, {"ice_servers"}),
        ("https://fal.run/a/b/ice", {}, {"ice_servers"}),
        ("https://wma.fal.run/session/heartbeat", {"session_id": "unknown"}, {"alive"}),
    ],
)
async def test_newer_calls(sandbox: Sandbox, url: str, body: object, names: set[str]) -> None:
    """The calls that fal's newer SDKs make are answered in their form, and are no jobs."""
    code, content = await call(sandbox, "POST", url, body)
    assert (code, set(content)) == (200, names)
    assert not sandbox.executions


@pytest.mark.gen_test
async def test_session(sandbox: Sandbox, setup: Setup) -> None:
    """A session is open until the client of the proxy leaves."""
    client = await RawClient.open(setup.proxy(sandbox.address, key=sandbox.key, ca_certs=sandbox.ca_certs))
    await client.send("POST", b'{"app_id":"a/b"}', target="https://wma.fal.run/session")
    assert (await client.head()).status == 200
    session = json.loads(await client.chunk())["session_id"]
    assert sandbox.sessions == {session}
    heartbeat = "https://wma.fal.run/session/heartbeat"
    assert await call(sandbox, "POST", heartbeat, {"session_id": session}) == (200, {"alive": True})
    client.leave()
    while sandbox.sessions:
        await asyncio.sleep(0.01)
    assert await call(sandbox, "POST", heartbeat, {"session_id": session}) == (200, {"alive": False})


VALID: list[Any] = [
    {},
    {"tag": "a", "error": None, "times": 0, "at": "result", "think_s": 0, "text": "b"},
    {"error": 400, "times": 0},
    {"error": 599, "at": "status"},
    {"think_s": 0.001},
]
INVALID: list[Any] = [
    [],
    "503",
    None,
    {"error": 399},
    {"error": 600},
    {"error": "503"},
    {"at": "once"},
    {"tag": 1},
    {"times": 1.5},
    {"think_s": "1"},
    {"think_s": -1},
    {"think_s": float("nan")},
    {"think_s": float("inf")},
    {"text": []},
    {"unknown": 1},
]


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("scenario", "status"),
    [*((scenario, 200) for scenario in VALID), *((scenario, 422) for scenario in INVALID)],
    ids=json.dumps,
)
async def test_scenarios(sandbox: Sandbox, scenario: object, status: int) -> None:
    """A scenario that is not valid is answered 422, and nothing is executed."""
    code, content = await call(sandbox, "POST", SUBMIT, {"sandbox": scenario})
    assert code == status
    assert sandbox.executions.total() == (status == 200)
    if status == 422:
        assert content["detail"][0]["loc"] == ["body", "sandbox"]


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"{", "json_invalid"), (b"\xff", "json_invalid"), (b"[" * 10**5, "json_invalid"), (b"[]", "dict_type")],
    ids=["broken", "no-utf-8", "deep", "list"],
)
async def test_bodies(sandbox: Sandbox, body: bytes, kind: str) -> None:
    """A body that is no JSON object is answered 422."""
    code, content = await call(sandbox, "POST", RUN, body)
    assert (code, content["detail"][0]["type"]) == (422, kind)


@pytest.mark.gen_test
async def test_get_takes_its_scenario_from_the_query(sandbox: Sandbox) -> None:
    """The input of a GET is its query, and ``sandbox`` in the query is JSON text."""
    code, content = await call(sandbox, "GET", f"{RUN}?prompt=a+cat&sandbox=%7B%22tag%22%3A%22a%22%7D")
    assert (code, content["prompt"], sandbox.executions["a"]) == (200, "a cat", 1)
    assert (await call(sandbox, "GET", f"{RUN}?sandbox=tag"))[0] == 422


@pytest.mark.gen_test
async def test_any_prompt_is_drawn(sandbox: Sandbox) -> None:
    """Without ``public_url`` the picture is a data URL, also for a prompt that is no printable text."""
    for prompt in ("", None, 7, ["a"], "\ud800 \x00 \n\n 🐱", "x" * 20_000):
        code, content = await call(sandbox, "POST", RUN, {"prompt": prompt, "seed": -1})
        assert (code, content["seed"]) == (200, -1)
        assert content["images"][0]["url"].startswith("data:image/png;base64,iVBOR")


@pytest.mark.gen_test
async def test_a_job_belongs_to_its_application(sandbox: Sandbox) -> None:
    """A job is found by its application's id without a sub-path, and by no other application's."""
    _, job = await call(sandbox, "POST", SUBMIT, {})
    assert job["response_url"] == f"https://queue.fal.run/fal-ai/flux/requests/{job['request_id']}"
    assert (await call(sandbox, "GET", job["response_url"]))[0] == 200
    for other in ("fal-ai/flux-pro", "workflows/fal-ai/flux", "someone/flux"):
        assert (await call(sandbox, "GET", job["response_url"].replace("fal-ai/flux", other)))[0] == 404


@pytest.mark.gen_test
async def test_cancel(sandbox: Sandbox) -> None:
    """A job that is cancelled ends at once and without a result; a second cancel is too late."""
    _, job = await call(sandbox, "POST", SUBMIT, {"sandbox": {"think_s": 1000}})
    assert job["status"] == "IN_QUEUE"
    assert await call(sandbox, "GET", job["response_url"]) == (400, {"detail": "Request is still in progress"})
    following = asyncio.create_task(fetch(sandbox, "GET", f"{job['status_url']}/stream"))
    await until_called(sandbox)
    assert await call(sandbox, "PUT", job["cancel_url"]) == (202, {"status": "CANCELLATION_REQUESTED"})
    _, status = await call(sandbox, "GET", f"{job['status_url']}?logs=1")
    assert (status["status"], status["logs"]) == ("COMPLETED", [])
    assert await call(sandbox, "GET", job["response_url"]) == (499, {"detail": "Request was cancelled"})
    assert await call(sandbox, "PUT", job["cancel_url"]) == (400, {"status": "ALREADY_COMPLETED"})
    *_, last = (await following).body.decode().strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["status"] == "COMPLETED"


@pytest.mark.gen_test
async def test_it_keeps_a_bounded_number_of_things(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest job, tag or file is dropped when there are too many, and a dropped picture is drawn again."""
    monkeypatch.setattr(state, "MAX_JOBS", 2)
    monkeypatch.setattr(state, "MAX_TAGS", 2)
    monkeypatch.setattr(state, "MAX_FILES", 2)
    urls = []
    for tag in ("a", "b", "c"):
        _, job = await call(sandbox, "POST", SUBMIT, {"sandbox": {"tag": tag}})
        urls.append(job["response_url"])
    assert [(await call(sandbox, "GET", url))[0] for url in urls] == [404, 200, 200]
    assert list(sandbox.executions) == ["b", "c"]
    sandbox.keep("new", "text/plain", b"1234")
    assert list(sandbox.files) == [urls[2].rpartition("/")[2] + ".png", "new"]
    first = await call(sandbox, "GET", urls[1])
    assert first == await call(sandbox, "GET", urls[1])
    monkeypatch.setattr(state, "MAX_STORE_BYTES", 6)
    sandbox.keep("newer", "text/plain", b"123")
    assert list(sandbox.files) == ["newer"]
    sandbox.keep("too large", "text/plain", b"1234567")
    assert not sandbox.files


# Files, which the client sends to the URL in Initiate's response.


@pytest.mark.gen_test
async def test_uploads(sandbox: Sandbox, setup: Setup) -> None:
    """A file is uploaded whole or in parts, only to a URL that was given out, and only with the parts' digests."""
    port = setup.serve(Application([*sandbox.page_rules("/proxy")], log_function=lambda handler: None))
    sandbox.public_url = f"http://127.0.0.1:{port}"
    client = SimpleAsyncHTTPClient(force_instance=True)

    async def send(method: str, url: str, body: bytes | None = None, kind: str = "text/html") -> HTTPResponse:
        headers = {"Content-Type": kind} if body is not None else {}
        request = HTTPRequest(url, method, headers, body, allow_nonstandard_methods=True)
        return await client.fetch(request, raise_error=False)

    async def complete(url: str, parts: object) -> int:
        return (await send("POST", f"{url}/complete", json.dumps({"parts": parts}).encode())).code

    code, given = await call(sandbox, "POST", INITIATE, {"file_name": "../ä\r\n.html", "content_type": "text/\nhtml"})
    url = given["upload_url"]
    assert (code, given["file_url"]) == (200, url)
    assert url.startswith(f"{sandbox.public_url}/sandbox/files/")

    assert (await send("PUT", f"{sandbox.public_url}/sandbox/files/not-given-out", b"a")).code == 404
    assert (await send("PUT", url, b"<script>")).code == 200
    read = await send("GET", url)
    assert (read.code, read.body, read.headers["Content-Type"]) == (200, b"<script>", "text/html")
    # An upload may be a page; it must not run in the proxy's origin.
    assert read.headers["Content-Security-Policy"] == "sandbox"
    assert read.headers["X-Content-Type-Options"] == "nosniff"

    preflight = await send("OPTIONS", url)
    assert (preflight.code, preflight.headers["Access-Control-Allow-Origin"]) == (204, "*")
    assert "PUT" in preflight.headers["Access-Control-Allow-Methods"]

    _, given = await call(sandbox, "POST", f"{INITIATE}-multipart", {"content_type": "video/mp4"})
    url = given["upload_url"]
    parts = [
        json.loads((await send("PUT", f"{url}/{number}", body)).body) for number, body in enumerate((b"a", b"b"), 1)
    ]
    assert parts == [
        {"partNumber": number, "etag": hashlib.sha256(body).hexdigest()} for number, body in enumerate((b"a", b"b"), 1)
    ]
    wrong: Any
    for wrong in ([{**parts[0], "etag": "0"}], [{}], ["a"], 7, None):
        assert await complete(url, wrong) == 400
    assert await complete(url, [{"partNumber": 3, "etag": "0"}]) == 404
    assert await complete(url, parts) == 200
    read = await send("GET", url)
    assert (read.body, read.headers["Content-Type"]) == (b"ab", "video/mp4")
    assert (await send("GET", f"{url}/1")).code == 404
    client.close()


@pytest.mark.gen_test
async def test_under_the_commands_server(sandbox: Sandbox, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads are no larger or slower there than the sandbox and the server allow, and a 405 names what is allowed."""
    monkeypatch.setattr(server, "SWEEP_INTERVAL_S", 0.01)
    port, entries = serve_and_log(setup, more=sandbox.page_rules("/proxy"))
    sandbox.public_url = f"http://127.0.0.1:{port}"
    _, given = await call(sandbox, "POST", INITIATE, {"file_name": "a", "content_type": "a/b"})
    path = given["upload_url"].removeprefix(sandbox.public_url)

    async def status(method: str, path: str, body: bytes = b"", length: int | None = None) -> Response:
        client = await RawClient.open(port)
        lines = [f"{method} {path} HTTP/1.1", "Host: a", f"Content-Length: {len(body) if length is None else length}"]
        client.writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        response = await client.response()
        await client.close()
        return response

    assert (await status("PUT", path, bytes(300_000))).status == 200
    assert (await status("PUT", path, length=101 * 1024 * 1024)).status == 413
    for page, allowed in (("/", "GET"), (path, "GET, PUT, POST, OPTIONS")):
        refused = await status("DELETE", page)
        assert (refused.status, refused.header("allow")) == (405, allowed)
    monkeypatch.setattr(server, "BODY_WINDOW_S", 0.05)
    assert (await status("PUT", path, b"a", length=2)).status == 408
    assert [entry["status"] for entry in entries] == [200, 413, 405, 405, 408]


# The end.


@pytest.mark.gen_test
@pytest.mark.parametrize("way", ["run", "stream", "follow"])
async def test_close_ends_every_call(way: str) -> None:
    """Calls that would take long end with the sandbox, and its temporary directory is removed."""
    sandbox = Sandbox()
    sandbox.start()
    directory = Path(sandbox.ca_certs).parent
    assert directory.is_dir()
    patient = {"sandbox": {"think_s": 1000}}
    _, job = await call(sandbox, "POST", SUBMIT, patient)
    match way:
        case "run":
            pending = asyncio.create_task(fetch(sandbox, "POST", RUN, patient))
        case "stream":
            pending = asyncio.create_task(fetch(sandbox, "POST", f"{RUN}/stream", patient))
        case _:
            pending = asyncio.create_task(fetch(sandbox, "GET", f"{job['status_url']}/stream"))
    await until_called(sandbox)
    async with asyncio.timeout(10):
        await sandbox.close()
    assert not sandbox.calls
    assert not directory.exists()
    with pytest.raises(HTTPStreamClosedError):
        await pending
