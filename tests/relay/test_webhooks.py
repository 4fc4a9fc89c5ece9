"""fal's webhooks: which deliveries are believed, when keys are fetched, and what a delivery ends."""

import base64
import hashlib
import json
import re
import time
from typing import Any, ClassVar
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from tornado.httputil import HTTPHeaders
from tornado.web import Application, RequestHandler

from tests.support.fake_store import FakeStore
from tests.support.logs import Logs
from tests.support.proxy import ROUTE, Setup
from tests.support.raw_client import Response, call
from tests.support.stub_handlers import JSON, responds
from tests.support.tools import ROOT
from tests.support.waiting import eventually
from tornado_fal_proxy import FalProxyHandler, ProxyConfig, webhooks
from tornado_fal_proxy.relay.backend import backends_of
from tornado_fal_proxy.sandbox import Sandbox
from tornado_fal_proxy.webhooks import FalWebhookHandler, WebhookKeys, WebhookRefused, end_job, parse_keys, verify

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
NOW = 1_800_000_000
JOB_ID = "764cabcf-b745-4b3e-ae38-1200304cf45b"
BODY = json.dumps({"request_id": JOB_ID, "status": "OK", "payload": {"seed": 1}}).encode()


def signed(key: Ed25519PrivateKey = KEY, body: bytes = BODY, at: int = NOW, job_id: str = JOB_ID) -> dict[str, str]:
    """Return the headers of a delivery."""
    message = "\n".join([job_id, "user", str(at), hashlib.sha256(body).hexdigest()])
    return {
        "X-Fal-Webhook-Request-Id": job_id,
        "X-Fal-Webhook-User-Id": "user",
        "X-Fal-Webhook-Timestamp": str(at),
        "X-Fal-Webhook-Signature": key.sign(message.encode()).hex(),
    }


def jwk(key: Ed25519PublicKey, **more: Any) -> dict[str, Any]:
    text = base64.urlsafe_b64encode(key.public_bytes_raw()).rstrip(b"=").decode()
    return {"kty": "OKP", "crv": "Ed25519", "x": text} | more


def key_set(*keys: Ed25519PrivateKey) -> bytes:
    return json.dumps({"keys": [jwk(key.public_key()) for key in keys]}).encode()


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in signed().items() if not key.endswith(name)}


@pytest.mark.parametrize(
    ("headers", "body", "reason"),
    [
        (signed(), BODY, None),
        (signed(at=NOW - 300), BODY, None),
        (signed(at=NOW + 300), BODY, None),
        (signed() | {"X-Fal-Webhook-Signature": signed()["X-Fal-Webhook-Signature"].upper()}, BODY, None),
        (signed(body=b"{}"), b"{}", None),
        (signed(at=NOW - 301), BODY, "the timestamp is more than 300 s away"),
        (signed(at=NOW + 301), BODY, "the timestamp is more than 300 s away"),
        (signed(), BODY.replace(b"1", b"2", 1), "by none of fal's keys"),
        (signed(), BODY + b" ", "by none of fal's keys"),
        (signed(), b"", "by none of fal's keys"),
        (signed(OTHER), BODY, "by none of fal's keys"),
        (signed() | {"X-Fal-Webhook-User-Id": "other"}, BODY, "by none of fal's keys"),
        (signed() | {"X-Fal-Webhook-Request-Id": "other"}, BODY, "by none of fal's keys"),
        (signed() | {"X-Fal-Webhook-Timestamp": str(NOW + 1)}, BODY, "by none of fal's keys"),
        *((without(name), BODY, "once") for name in ("Request-Id", "User-Id", "Timestamp", "Signature")),
        (signed() | {"X-Fal-Webhook-Timestamp": "now"}, BODY, "the timestamp is no number"),
        (signed() | {"X-Fal-Webhook-Timestamp": "9" * 5000}, BODY, "once"),
        (signed() | {"X-Fal-Webhook-Signature": "ab"}, BODY, "not 64 bytes"),
        (signed() | {"X-Fal-Webhook-Signature": "g" * 128}, BODY, "not 64 bytes"),
        (signed() | {"X-Fal-Webhook-Signature": "00" * 64}, BODY, "by none of fal's keys"),
        (signed() | {"X-Fal-Webhook-User-Id": "a b"}, BODY, "once"),
        (signed(body=b"[]"), b"[]", "no JSON object"),
        (signed(body=b"x"), b"x", "no JSON object"),
    ],
)
def test_verify(headers: dict[str, str], body: bytes, reason: str | None) -> None:
    """Signature, time and body must agree; the reason has nothing of the delivery."""
    keys = [OTHER.public_key(), KEY.public_key()] if reason is None else [KEY.public_key()]
    if reason is None:
        assert verify(HTTPHeaders(headers), body, keys, NOW) == json.loads(body)
        return
    with pytest.raises(WebhookRefused, match=reason) as caught:
        verify(HTTPHeaders(headers), body, keys, NOW)
    assert JOB_ID not in str(caught.value)


def test_a_header_twice() -> None:
    """Two values could be read in two ways."""
    headers = HTTPHeaders(signed())
    headers.add("X-Fal-Webhook-User-Id", "user")
    with pytest.raises(WebhookRefused, match="X-Fal-Webhook-User-Id once"):
        verify(headers, BODY, [KEY.public_key()], NOW)


def test_keys_in_a_set() -> None:
    """Keys of other kinds, and broken ones, are left out."""
    good = KEY.public_key()
    entries: list[Any] = [
        jwk(good, crv="X25519"),
        jwk(good, kty="RSA"),
        jwk(good, x="AA"),
        jwk(good, x=None),
        "key",
        {},
        jwk(good),
    ]
    [found] = parse_keys(json.dumps({"keys": entries}).encode())
    assert found.public_bytes_raw() == good.public_bytes_raw()
    for document in (b"", b"{}", b"[]", b'{"keys": 1}'):
        with pytest.raises((ValueError, KeyError, TypeError)):
            parse_keys(document)


class Jwks(RequestHandler):
    """Stands for fal's server of keys."""

    keys: bytes = b""
    asked = 0

    def get(self) -> None:
        type(self).asked += 1
        if not self.keys:
            self.set_status(500)
        self.finish(self.keys)


class Receiver(FalWebhookHandler):
    events: ClassVar[list[dict[str, Any]]] = []
    fails = 0

    async def on_webhook(self, event: dict[str, Any]) -> None:
        if type(self).fails:
            type(self).fails -= 1
            raise RuntimeError("not now")
        self.events.append(event)


@pytest.fixture(autouse=True)
def fresh() -> None:
    Jwks.keys, Jwks.asked = key_set(KEY), 0
    Receiver.events, Receiver.fails = [], 0


def serve(setup: Setup, **arguments: Any) -> int:
    jwks = setup.serve(Application([("/jwks", Jwks)], log_function=lambda handler: None))
    arguments["keys"] = WebhookKeys(f"http://127.0.0.1:{jwks}/jwks")
    return setup.serve(Application([("/hook", Receiver, arguments)], log_function=lambda handler: None))


async def deliver(port: int, headers: dict[str, str] | None = None, body: bytes = BODY) -> Response:
    lines = [f"{name}: {value}" for name, value in (headers or signed(body=body, at=int(time.time()))).items()]
    return await call(port, "POST", body, target=None, path="/hook", headers=lines)


@pytest.mark.gen_test
async def test_delivery(setup: Setup) -> None:
    """A delivery is handled once, however often it comes; keys are fetched once."""
    port = serve(setup)
    for _ in range(3):
        assert (await deliver(port)).status == 200
    assert [event["request_id"] for event in Receiver.events] == [JOB_ID]
    assert Jwks.asked == 1


@pytest.mark.gen_test
async def test_a_handler_that_fails(setup: Setup, logs: Logs) -> None:
    """fal delivers again what failed, and then it is handled."""
    logs.expect("Uncaught exception POST /hook")
    Receiver.fails = 1
    port = serve(setup)
    failed = await deliver(port)
    assert (failed.status, failed.message) == (500, "The webhook was not handled.")
    assert (await deliver(port)).status == 200
    assert len(Receiver.events) == 1


@pytest.mark.gen_test
async def test_forged(setup: Setup, logs: Logs) -> None:
    """A forged delivery is 401; any number of them fetch the keys once more only."""
    logs.expect("webhooks: refused: the signature is by none of fal's keys")
    port = serve(setup)
    for _ in range(5):
        forged = await deliver(port, signed(OTHER, at=int(time.time())))
        assert (forged.status, "signature" in forged.message) == (401, True)
    assert Receiver.events == []
    assert Jwks.asked == 1


@pytest.mark.gen_test
async def test_rotated(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A delivery that a new key has signed makes the keys be fetched again, and is handled."""
    monkeypatch.setattr(webhooks, "REFRESH_INTERVAL_S", 0.0)
    port = serve(setup)
    assert (await deliver(port)).status == 200
    Jwks.keys = key_set(OTHER)
    rotated = signed(OTHER, at=int(time.time()), job_id="another")
    assert (await deliver(port, rotated)).status == 200
    assert Jwks.asked == 2


@pytest.mark.gen_test
async def test_no_keys(setup: Setup, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without keys the response is 503, so fal delivers again; keys that cannot be fetched again stay."""
    monkeypatch.setattr(webhooks, "REFRESH_INTERVAL_S", 0.0)
    logs.expect("webhooks: cannot get fal's keys from http://127.0.0.1:")
    Jwks.keys = b""
    port = serve(setup)
    assert (await deliver(port)).status == 503
    Jwks.keys = key_set(KEY)
    assert (await deliver(port)).status == 200
    Jwks.keys = b"nonsense"
    monkeypatch.setattr(webhooks, "KEPT_S", -1.0)
    assert (await deliver(port, signed(at=int(time.time()), job_id="another"))).status == 200


@pytest.mark.gen_test
async def test_too_large(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that is too large is thrown away."""
    monkeypatch.setattr(webhooks, "MAX_BODY_BYTES", 100)
    port = serve(setup)
    assert (await deliver(port, body=b'{"a": "%b"}' % (b"x" * 200))).status == 413


class OwnHandler(RequestHandler):
    """A handler of an embedder's own, as docs/webhooks.md has it."""

    def initialize(self, config: ProxyConfig) -> None:
        self.config = config

    async def post(self) -> None:
        event = verify(self.request.headers, self.request.body, [KEY.public_key()])
        await end_job(self.application, self.config, event["request_id"])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.gen_test
async def test_a_job_ends(setup: Setup, monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    """A queued job ends with its webhook in any process, and nobody who repeats the webhook changes its price.

    Its result, which comes later, still settles it.
    """
    store = FakeStore()
    monkeypatch.setattr("tornado_fal_proxy.relay.backend.make_store", lambda config: store)
    submitted = json.dumps({"status": "IN_QUEUE", "request_id": JOB_ID}).encode()
    upstream = await setup.upstream(responds(200, submitted, JSON))
    prices = {"**": {"price": "0.01", "units": 2}}
    config = setup.config(upstream, unfinished_jobs_per_user=1, prices=prices)
    jwks = setup.serve(Application([("/jwks", Jwks)], log_function=lambda handler: None))
    keys = WebhookKeys(f"http://127.0.0.1:{jwks}/jwks")
    hook: Any = ("/hook", OwnHandler, {"config": config})
    if not own:
        hook = ("/hook", Receiver, {"config": config, "keys": keys})
    rules: list[Any] = [(ROUTE, FalProxyHandler, {"config": config}), hook]
    # Each has a ledger of its own, as another process has.
    ports = [setup.serve(Application(rules, log_function=lambda handler: None)) for _ in range(2)]
    target = "https://queue.fal.run/fal-ai/flux/dev"
    assert [(await call(ports[0], target=target)).status for _ in range(2)] == [200, 429]
    forged = signed(at=int(time.time())) | {"x-fal-billable-units": "0"}
    for port in (*ports, *ports):
        assert (await deliver(port, forged)).status == 200
        assert store.sums() == (1, 20_000, 0)
    upstream.handler = responds(200, b"{}", [*JSON, ("x-fal-billable-units", "3")])
    result = f"https://queue.fal.run/fal-ai/flux/requests/{JOB_ID}"
    assert (await call(ports[0], "GET", target=result)).status == 200
    assert store.sums() == (1, 30_000, 0)
    for port in ports:
        assert (await deliver(port, forged)).status == 200
    assert store.sums() == (1, 30_000, 0)


@pytest.mark.gen_test
async def test_a_job_ends_where_nothing_is_counted() -> None:
    """Without limits on spending to end a job makes nothing."""
    application = Application()
    await end_job(application, ProxyConfig(key="id:secret"), JOB_ID)
    for odd in ("", "a b", "x" * 65):
        await end_job(application, ProxyConfig(key="id:secret", jobs_per_user="9/day", store="memory"), odd)
    assert backends_of(application) == []


@pytest.mark.gen_test
async def test_sandbox(setup: Setup) -> None:
    """The sandbox delivers what it has signed, to this machine alone."""
    sandbox = Sandbox(pace=0.01)
    sandbox.start()
    try:
        config = setup.config(sandbox.address, key=sandbox.key, ca_certs=sandbox.ca_certs)
        rules: list[Any] = [(ROUTE, FalProxyHandler, {"config": config}), *sandbox.page_rules(ROUTE)]
        port = setup.serve(Application(rules, log_function=lambda handler: None))
        keys = WebhookKeys(f"http://127.0.0.1:{port}/sandbox/jwks.json")
        hooks = setup.serve(Application([("/hook", Receiver, {"keys": keys})], log_function=lambda handler: None))
        for hook in ("https://a.example/hook", f"http://127.0.0.1:{hooks}/hook"):
            target = f"https://queue.fal.run/fal-ai/flux/dev?fal_webhook={quote(hook, safe='')}"
            job = json.loads((await call(port, target=target)).body)
        await eventually(lambda: Receiver.events)
        assert [event["request_id"] for event in Receiver.events] == [job["request_id"]]
        assert Receiver.events[0]["payload"]["images"]
    finally:
        await sandbox.close()


@pytest.mark.parametrize("number", [0, 1])
def test_docs(number: int) -> None:
    """The applications that are shown can be made."""
    text = (ROOT / "docs/webhooks.md").read_text("utf-8")
    codes = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(codes) == 2
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile(codes[number], "webhooks.md", "exec"), names)
    assert names["application"].wildcard_router is not None
