"""The operator's rules over the wire: authorize, resolve_key, tokens, uploads, cancel; behind them a real upstream."""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from tornado.web import Application, Finish, HTTPError

from tests.support.logs import Logs
from tests.support.proxy import KEY, ROUTE, Setup
from tests.support.raw_client import RawClient, Response, call
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import JSON, must_not_be_called
from tornado_fal_proxy import FalProxyHandler, Target
from tornado_fal_proxy.relay.backend import backends_of

SECRET = "tenants-key-id:tenants-secret"
CANCEL = "https://queue.fal.run/fal-ai/flux/requests/764cabcf-b745-4b3e-ae38-1200304cf45b/cancel"
TOKENS = "https://rest.fal.ai/tokens/"


async def echo(exchange: Exchange) -> None:
    """Respond with the request's own facts."""
    body = await exchange.body()
    facts = {
        "method": exchange.method,
        "body": body.decode(),
        "key": (exchange.header("authorization") or b"").decode(),
        "length": (exchange.header("content-length") or b"").decode(),
    }
    await exchange.respond(200, json.dumps(facts).encode(), JSON)


def serve(setup: Setup, handler: type[FalProxyHandler], upstream: Any, **fields: Any) -> int:
    rule = (ROUTE, handler, {"config": setup.config(upstream, **fields)})
    return setup.serve(Application([rule], log_function=lambda handler: None))


# authorize and resolve_key, in every form in which they may be given.

User = Callable[[FalProxyHandler, Target], Any]


def plain(handler: FalProxyHandler, target: Target) -> Any:
    return handler.request.headers.get("x-user") == "ann" and target.host == "fal.run"


async def coroutine(handler: FalProxyHandler, target: Target) -> Any:
    await asyncio.sleep(0.01)
    return plain(handler, target)


class WithPlainMethods(FalProxyHandler):
    def get_current_user(self) -> Any:
        return self.request.headers.get("x-user") == "ann" or None

    def authorize(self, target: Target) -> Any:
        return self.current_user and target.path == "/fal-ai/flux/dev"

    def resolve_key(self, target: Target) -> Any:
        return SECRET


class WithCoroutines(FalProxyHandler):
    async def authorize(self, target: Target) -> Any:
        await asyncio.sleep(0.01)
        return await super().authorize(target) and self.request.headers.get("x-user") == "ann"

    async def resolve_key(self, target: Target) -> Any:
        await asyncio.sleep(0.01)
        return SECRET


async def tenants_key(handler: FalProxyHandler, target: Target) -> str:
    return SECRET


FORMS: dict[str, tuple[type[FalProxyHandler], dict[str, Any]]] = {
    "plain functions": (FalProxyHandler, {"authorize": plain, "resolve_key": lambda handler, target: SECRET}),
    "coroutine functions": (FalProxyHandler, {"authorize": coroutine, "resolve_key": tenants_key}),
    "plain methods": (WithPlainMethods, {}),
    "coroutine methods": (WithCoroutines, {}),
    "a method beside a function": (WithCoroutines, {"authorize": plain, "resolve_key": lambda *_: 1 / 0}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.gen_test
async def test_authorize_and_resolve_key(setup: Setup, logs: Logs, form: str) -> None:
    """A client that is let in calls with its own key; another gets 401 before its body is read, and no call is made."""
    handler, fields = FORMS[form]
    upstream = await setup.upstream(echo)
    port = serve(setup, handler, upstream, **fields)
    response = await call(port, headers=["x-user: ann"])
    assert (response.status, json.loads(response.body)["key"]) == (200, f"Key {SECRET}")
    client = await RawClient.open(port)
    for _ in range(2):
        await client.send("POST", b"[" + b" " * 300_000 + b"]", headers=["x-user: bob"])
        response = await client.response()
        assert (response.status, response.message) == (401, "This proxy does not let you in.")
    await client.close()
    assert len(upstream.exchanges) == 1
    assert not [line for line in logs.lines if "tenants-secret" in line]


class NoCall(FalProxyHandler):
    def authorize(self, target: Target) -> Any:
        raise AssertionError("authorize was called")


@pytest.mark.gen_test
async def test_authorize_is_not_called_for_refused_calls(setup: Setup) -> None:
    """405, 400, 412, 403, 415 and 413 come first: they cost nothing, and authorize may cost a query."""
    port = serve(setup, NoCall, "127.0.0.1:1", allowed_endpoints=("a/b",), max_body_bytes=10)
    calls: list[tuple[str, dict[str, Any], int]] = [
        ("PUT", {}, 405),
        ("POST", {"target": None}, 400),
        ("POST", {"target": "http://fal.run"}, 412),
        ("POST", {}, 403),
        ("POST", {"target": "https://fal.run/a/b", "headers": ["content-encoding: br"]}, 415),
        ("POST", {"target": "https://fal.run/a/b", "body": b" " * 11}, 413),
    ]
    assert [(await call(port, method, **more)).status for method, more, _ in calls] == [case[2] for case in calls]


ACCOUNT = ("https://api.fal.ai/v1/keys", "https://rest.alpha.fal.ai/keys/", "https://rest.fal.ai/storage/../keys")


@pytest.mark.parametrize("target", ACCOUNT)
@pytest.mark.gen_test
async def test_the_account_of_the_key(setup: Setup, target: str) -> None:
    """Calls for the account are 403 by default, before authorize is asked. The host's exact name opens them."""
    upstream = await setup.upstream(echo)
    host = target.split("/")[2]
    closed = (
        setup.proxy(upstream),
        serve(setup, NoCall, upstream),
        setup.proxy(upstream, allowed_hosts=("*.fal.ai", "*.alpha.fal.ai")),
    )
    for port in closed:
        for method in ("GET", "POST"):
            response = await call(port, method, target=target)
            assert response.status == 403
            assert "allowed_hosts does not name their host" in response.message
    assert not upstream.exchanges
    opened = setup.proxy(upstream, allowed_hosts=("*.fal.ai", host))
    assert (await call(opened, "GET", target=target)).status == 200
    assert upstream.exchanges[0].header("authorization") == f"Key {KEY}".encode()


def raising(exception: BaseException) -> User:
    def function(handler: FalProxyHandler, target: Target) -> Any:
        raise exception

    return function


def finishing(handler: FalProxyHandler, target: Target) -> Any:
    handler.set_status(402)
    handler.finish({"message": "Pay first."})


def finishing_late(handler: FalProxyHandler, target: Target) -> Any:
    finishing(handler, target)
    return True


def finishing_by_exception(handler: FalProxyHandler, target: Target) -> Any:
    handler.set_status(402)
    raise Finish({"message": "Pay first."})


class Undecided:
    """Be neither true nor false, as an array is."""

    def __bool__(self) -> bool:
        raise ValueError(SECRET)


# The field, its function, and the response.
ENDS: list[tuple[str, User, int, str]] = [
    ("authorize", raising(HTTPError(403, reason="Members only")), 403, "Members only"),
    ("authorize", raising(HTTPError(402)), 402, "Payment Required"),
    ("authorize", raising(ValueError(SECRET)), 500, "The proxy is not configured correctly."),
    ("authorize", finishing, 402, "Pay first."),
    ("authorize", finishing_by_exception, 402, "Pay first."),
    ("authorize", lambda handler, target: None, 401, "This proxy does not let you in."),
    ("authorize", lambda handler, target: "", 401, "This proxy does not let you in."),
    ("authorize", lambda handler, target: Undecided(), 500, "The proxy is not configured correctly."),
    ("resolve_key", lambda handler, target: Undecided(), 500, "The proxy is not configured correctly."),
    ("authorize", lambda: True, 500, "The proxy is not configured correctly."),  # type: ignore[list-item,misc]
    ("resolve_key", raising(HTTPError(403, reason="No plan")), 403, "No plan"),
    ("resolve_key", raising(KeyError(SECRET)), 500, "The proxy is not configured correctly."),
    ("resolve_key", lambda handler, target: None, 500, "The proxy is not configured: it has no fal.ai key."),
    ("resolve_key", lambda handler, target: "", 500, "The proxy is not configured: it has no fal.ai key."),
    (
        "resolve_key",
        lambda handler, target: f"{SECRET}\r\nx: y",
        500,
        "The proxy is not configured: it has no fal.ai key.",
    ),
    ("resolve_key", lambda handler, target: f" {SECRET}", 500, "The proxy is not configured: it has no fal.ai key."),
    ("resolve_key", lambda handler, target: SECRET.encode(), 500, "The proxy is not configured: it has no fal.ai key."),
]


@pytest.mark.parametrize(("name", "function", "status", "message"), ENDS)
@pytest.mark.gen_test
async def test_other_ends(setup: Setup, logs: Logs, name: str, function: User, status: int, message: str) -> None:
    """An HTTPError is the response; any other exception is 500, and a line in the log with kind and place but no text.

    The key of the configuration does not replace one that resolve_key did not return.
    """
    logging.getLogger("tornado_fal_proxy").setLevel(logging.DEBUG)
    port = serve(setup, FalProxyHandler, await setup.upstream(must_not_be_called), **{name: function})
    if status == 500:
        logs.expect(f"ERROR tornado_fal_proxy: refused: 500 POST: .*({name}|<lambda>) (raised|returned)")
    for _ in range(2):
        response = await call(port)
        content = json.loads(response.body)
        assert (response.status, content) == (status, {"message": message})
    for text in (*logs.lines, *(str(record.exc_info) for record in logs.records)):
        assert "tenants-secret" not in text


def writing(result: Any) -> User:
    def function(handler: FalProxyHandler, *_: Any) -> Any:
        handler.write("Hello.")
        return result

    return function


@pytest.mark.parametrize(("name", "result"), [("authorize", True), ("identify", "ann"), ("check_input", None)])
@pytest.mark.gen_test
async def test_a_function_that_flushes(setup: Setup, logs: Logs, name: str, result: Any) -> None:
    """A call of which a part of a response has left already does not go to fal, and its connection is closed."""

    def function(handler: FalProxyHandler, *_: Any) -> Any:
        handler.write("Hello.")
        handler.flush()
        return result

    logs.expect("refused: 500 POST: .* has sent a part of a response, and has not finished it")
    handler = type("Flushing", (FalProxyHandler,), {name: function})
    limits = {"jobs_per_user": "9/day", "store": "memory"}
    client = await RawClient.open(serve(setup, handler, await setup.upstream(must_not_be_called), **limits))
    await client.send()
    assert not (await client.reader.read()).endswith(b"0\r\n\r\n")  # it is not complete
    await client.close()


@pytest.mark.parametrize(("name", "result"), [("authorize", True), ("identify", "ann"), ("check_input", None)])
@pytest.mark.gen_test
async def test_a_function_that_writes(setup: Setup, name: str, result: Any) -> None:
    """A response has nothing of what a function of the operator's has written, because it could break a paid one."""
    handler = type("Writing", (FalProxyHandler,), {name: writing(result)})
    limits = {"jobs_per_user": "9/day", "store": "memory"}
    port = serve(setup, handler, await setup.upstream(echo), **limits)
    for target, status in (("https://fal.run/fal-ai/flux/dev", 200), ("https://evil.example/", 412)):
        response = await call(port, target=target)
        assert response.status == status
        assert b"Hello." not in response.body


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("name", ["authorize", "resolve_key"])
@pytest.mark.parametrize("body_too", [True, False])
@pytest.mark.gen_test
async def test_leaving_meanwhile(setup: Setup, method: str, name: str, body_too: bool) -> None:
    """A client that leaves while the function is at work leaves neither a slot in use nor a call to fal."""
    called, go_on = asyncio.Event(), asyncio.Event()

    async def slow(handler: FalProxyHandler, target: Target) -> Any:
        called.set()
        await go_on.wait()
        return SECRET

    upstream = await setup.upstream(must_not_be_called)
    config = setup.config(upstream, max_in_flight=1, **{name: slow})
    application = Application([(ROUTE, FalProxyHandler, {"config": config})], log_function=lambda handler: None)
    port = setup.serve(application)
    for _ in range(3):
        called.clear()
        go_on.clear()
        client = await RawClient.open(port)
        if body_too:
            await client.send(method)
        else:
            client.writer.write(
                f"{method} {ROUTE} HTTP/1.1\r\nhost: h\r\nx-fal-target-url: https://fal.run/x\r\n"
                "content-type: application/json\r\ncontent-length: 10\r\n\r\n".encode()
            )
        await called.wait()
        client.leave()
        await asyncio.sleep(0.02)
        go_on.set()
        await asyncio.sleep(0.02)
        [backend] = backends_of(application)
        assert backend.slots.in_use == 0
    upstream.handler = echo
    assert (await call(port, method)).status == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_no_key_for_a_client_that_has_left(setup: Setup, method: str) -> None:
    """No key is resolved for a client that left while authorize was at work."""
    called, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(handler: FalProxyHandler, target: Target) -> bool:
        called.set()
        await go_on.wait()
        asyncio.get_running_loop().call_later(0.02, ended.set)
        return True

    def key(handler: FalProxyHandler, target: Target) -> str:
        raise AssertionError("resolve_key was called")

    port = serve(setup, FalProxyHandler, await setup.upstream(must_not_be_called), authorize=slow, resolve_key=key)
    client = await RawClient.open(port)
    await client.send(method)
    await called.wait()
    await client.close()
    await asyncio.sleep(0.02)
    go_on.set()
    await ended.wait()


@pytest.mark.parametrize("function", [finishing, finishing_late, finishing_by_exception])
@pytest.mark.gen_test
async def test_a_response_of_its_own_is_in_the_applications_log(setup: Setup, function: User) -> None:
    """A response that authorize has finished by itself is logged once, with its status."""
    logged: list[int] = []
    config = setup.config("127.0.0.1:1", authorize=function)
    rules = [(ROUTE, FalProxyHandler, {"config": config})]
    port = setup.serve(Application(rules, log_function=lambda handler: logged.append(handler.get_status())))
    assert (await call(port)).status == 402
    await asyncio.sleep(0.02)
    assert logged == [402]


@pytest.mark.gen_test
async def test_a_waiting_authorize_takes_no_slot(setup: Setup) -> None:
    """Clients that are not let in yet do not take the slots of others."""
    go_on = asyncio.Event()

    async def slow(handler: FalProxyHandler, target: Target) -> bool:
        if "x-slow" in handler.request.headers:
            await go_on.wait()
        return True

    port = serve(setup, FalProxyHandler, await setup.upstream(echo), max_in_flight=1, authorize=slow)
    waiting = [asyncio.create_task(call(port, headers=["x-slow: 1"])) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert (await call(port)).status == 200
    go_on.set()
    assert {(await task).status for task in waiting} <= {200, 503}


@pytest.mark.gen_test
async def test_a_large_body_waits_for_authorize(setup: Setup) -> None:
    """No byte of a body is read before authorize has returned, and all of it after."""
    seen: list[int] = []

    async def slow(handler: FalProxyHandler, target: Target) -> bool:
        await asyncio.sleep(0.05)
        seen.append(handler._body_size)
        return True

    port = serve(setup, FalProxyHandler, await setup.upstream(echo), authorize=slow)
    body = b'"' + b"x" * 3_000_000 + b'"'
    response = await call(port, "POST", body)
    assert (response.status, json.loads(response.body)["body"], seen) == (200, body.decode(), [0])


# Endpoints, tokens, uploads.


@pytest.mark.gen_test
async def test_closed_endpoints(setup: Setup, logs: Logs) -> None:
    """A closed endpoint is 403 for every method and host, in JSON and before the body, and nothing reaches fal."""
    port = setup.proxy(await setup.upstream(must_not_be_called), allowed_endpoints=("fal-ai/secret-model",))
    for method in ("GET", "POST"):
        for host in ("fal.run", "queue.fal.run"):
            response = await call(port, method, b" " * 100_000, target=f"https://{host}/fal-ai/flux")
            assert response.status == 403
            assert response.message == "This endpoint is not allowed by this proxy's allowed_endpoints."
    assert not [line for line in logs.lines if "secret-model" in line]


BODIES: list[tuple[bytes, int]] = [
    (b'{"allowed_apps": ["flux"], "token_expiration": 120}', 200),
    (b'{"allowed_apps": ["other"], "token_expiration": 120}', 403),
    (b'{"allowed_apps": ["flux"], "token_expiration": 301}', 403),
    (b'{"allowed_apps": ["other"], "allowed_apps": ["flux"], "token_expiration": 120}', 403),
    (b"", 403),
]


@pytest.mark.parametrize("target", [TOKENS, TOKENS.replace("rest.", "rest.alpha.")])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.gen_test
async def test_tokens(setup: Setup, target: str, chunked: bool) -> None:
    """A token's body goes to fal byte for byte or is refused, its slot is released and the connection stays in step."""
    upstream = await setup.upstream(echo)
    client = await RawClient.open(setup.proxy(upstream, allowed_endpoints=("fal-ai/flux/**",), max_in_flight=1))
    for body, status in BODIES * 2:
        head = f"POST {ROUTE} HTTP/1.1\r\nhost: h\r\nx-fal-target-url: {target}\r\ncontent-type: application/json\r\n"
        if chunked:
            pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
            client.writer.write(f"{head}transfer-encoding: chunked\r\n\r\n".encode() + pieces)
        else:
            client.writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        response = await client.response()
        assert response.status == status
        if status == 200:
            assert json.loads(response.body)["body"] == body.decode()
        else:
            assert "allowed_endpoints" in response.message
    await client.close()
    assert len(upstream.exchanges) == 2


@pytest.mark.gen_test
async def test_any_token_passes_without_the_rule(setup: Setup) -> None:
    """Without allowed_endpoints any JSON body goes to fal, as fal's proxy formula requires."""
    port = setup.proxy(await setup.upstream(echo), allow_cancel=True)
    assert (await call(port, "POST", b'{"allowed_apps": ["x"]}', target=TOKENS)).status == 200


@pytest.mark.gen_test
async def test_uploads(setup: Setup) -> None:
    """allow_uploads allows uploads, and nothing else of their host."""
    target = "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3"
    upstream = await setup.upstream(echo)
    closed = setup.proxy(upstream, allowed_endpoints=("a/b",))
    opened = setup.proxy(upstream, allowed_endpoints=("a/b",), allow_uploads=True)
    refused = await call(closed, target=target)
    assert (refused.status, refused.message) == (403, "Uploads are not allowed by this proxy's allow_uploads.")
    assert (await call(opened, target=target)).status == 200
    assert (await call(opened, target="https://rest.fal.ai/users/current")).status == 403


# Cancel.


@pytest.mark.parametrize(
    "headers", [[], ["content-length: 0"], ["content-length: 0", "content-type: application/json"]]
)
@pytest.mark.gen_test
async def test_cancel(setup: Setup, protocol: str, headers: list[str]) -> None:
    """A PUT with an empty body goes to fal as one, again and again on one connection, beside other methods."""
    upstream = await setup.upstream(echo, protocol)
    client = await RawClient.open(setup.proxy(upstream, allow_cancel=True))
    for method in ("PUT", "POST", "PUT", "GET", "PUT"):
        await client.send(method, target=CANCEL, headers=headers if method == "PUT" else [])
        response = await client.response()
        assert response.status == 200
        facts = json.loads(response.body)
        assert (facts["method"], facts["key"]) == (method, f"Key {KEY}")
        if method == "PUT":
            assert facts["body"] == ""
            assert facts["length"] == "0" or (protocol == "h2" and facts["length"] == "")
    await client.close()


@pytest.mark.gen_test
async def test_put_elsewhere(setup: Setup) -> None:
    """A PUT elsewhere is 405 with the Allow of other methods; for another method at a cancel, Allow names PUT."""
    port = setup.proxy(await setup.upstream(must_not_be_called), allow_cancel=True)
    for method, target, allow in (
        ("PUT", "https://queue.fal.run/fal-ai/flux/dev", "GET, POST"),
        ("PUT", CANCEL.replace("queue.", ""), "GET, POST"),
        ("PUT", None, "GET, POST"),
        ("DELETE", CANCEL, "GET, POST, PUT"),
    ):
        response = await call(port, method, target=target)
        assert (response.status, response.header("allow")) == (405, allow)
        assert response.message == f"Only {'GET, POST and PUT' if 'PUT' in allow else 'GET and POST'} are allowed."


@pytest.mark.gen_test
async def test_a_cancel_of_a_closed_endpoint(setup: Setup) -> None:
    """The rules for endpoints apply to PUT too."""
    port = setup.proxy(await setup.upstream(must_not_be_called), allow_cancel=True, allowed_endpoints=("fal-ai/other",))
    assert (await call(port, "PUT", target=CANCEL)).status == 403


@pytest.mark.gen_test
async def test_a_failed_cancel_may_be_repeated(setup: Setup, protocol: str, logs: Logs) -> None:
    """A failed cancel gets 502 and no warning that the job may have run, because a second cancel changes nothing."""

    async def lose(exchange: Exchange) -> None:
        await exchange.body()
        exchange.abort_connection()

    logs.expect("upstream error: 502 PUT https://queue.fal.run/.*/cancel: .*")
    response = await call(setup.proxy(await setup.upstream(lose, protocol), allow_cancel=True), "PUT", target=CANCEL)
    assert (response.status, "may have run" in response.message) == (502, False)


@pytest.mark.gen_test
async def test_webhooks(setup: Setup) -> None:
    """With allowed_webhooks a submit may name one of these origins and no other."""
    port = setup.proxy(await setup.upstream(echo), allowed_webhooks=("https://hooks.example",))
    submit = "https://queue.fal.run/fal-ai/flux/dev?fal_webhook=https%3A%2F%2F"
    responses: list[Response] = [
        await call(port, target=submit + host) for host in ("hooks.example%2Fx", "evil.example%2Fx")
    ]
    assert [response.status for response in responses] == [200, 403]
    assert responses[1].message == "This fal_webhook is not allowed by this proxy's allowed_webhooks."
