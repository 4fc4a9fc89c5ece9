"""The facts of a call: the kind of its target, the client's address, and how a line of the log is written."""

import json
import logging
import select

import pytest

from tornado_fal_proxy import Target
from tornado_fal_proxy.logs import Fields, JsonFormatter, Lines, PlainFormatter
from tornado_fal_proxy.rules.endpoints import kind_of
from tornado_fal_proxy.rules.headers import ResponseHead
from tornado_fal_proxy.rules.target import parse_target
from tornado_fal_proxy.rules.trusted_proxies import UNIX, TrustedProxies
from tornado_fal_proxy.service.access_log import LINES_AT_ONCE
from tornado_fal_proxy.telemetry import Call


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
        ("POST", "https://fal.run/fal-ai/flux/dev/ice", "ice"),
        ("POST", "https://wma.fal.run/ice", "ice"),
        ("POST", "https://wma.fal.run/session", "session"),
        ("POST", "https://wma.fal.run/session/heartbeat", "heartbeat"),
        ("POST", "https://wma.fal.run/other", "other"),
        ("POST", "https://rest.fal.ai/tokens/", "token"),
        ("POST", "https://rest.fal.ai/tokens/realtime", "token"),
        ("POST", "https://rest.fal.ai/storage/auth/token", "storage"),
        ("POST", "https://rest.alpha.fal.ai/storage/upload/initiate", "storage"),
        ("GET", "https://rest.fal.ai/anything", "other"),
        ("GET", "https://v3.fal.ai/x", "other"),
    ],
)
def test_kind_of(method: str, url: str, kind: str) -> None:
    """Each kind of call that fal's SDKs make has a name, and there are no others."""
    assert kind_of(parse_target(url)) == kind


BAD_PORTS = [
    *("198.51.100.1:", "198.51.100.1:0", "198.51.100.1:65536", "198.51.100.1:x", "198.51.100.1:1:1", ":80", "1.2.3:80"),
    *("[2001:db8::1", "[2001:db8::1]x", "[2001:db8::1]:", "[]", "[]:80", "2001:db8::1]:80"),
    *("[fe80::1%eth0]:80", "a.example:80", "198.51.100.1 :80", "198.51.100.1:8080 x"),
]


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),  # an untrusted peer may send any text
        ("127.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", ["1.1.1.1, 198.51.100.1"], "198.51.100.1"),  # the client's own text comes first
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
        # With a port, as some proxies write it.
        ("127.0.0.1", ["198.51.100.1:54321"], "198.51.100.1"),
        ("127.0.0.1", ["1.1.1.1:1, 198.51.100.1:65535, 10.0.0.1:80"], "198.51.100.1"),
        ("127.0.0.1", ["[2001:db8::1]:443"], "2001:db8::1"),
        ("127.0.0.1", ["[2001:DB8::1]"], "2001:db8::1"),
        ("127.0.0.1", ["[::ffff:198.51.100.1]:443"], "198.51.100.1"),
        ("127.0.0.1", ["[198.51.100.1]:80"], "198.51.100.1"),  # nginx takes it too
        ("127.0.0.1", ["2001:db8::1:443"], "2001:db8::1:443"),  # an address as a whole
        *(("127.0.0.1", [f"1.1.1.1, {bad}"], "127.0.0.1") for bad in BAD_PORTS),
        # Empty elements name nobody.
        ("127.0.0.1", ["198.51.100.1, "], "198.51.100.1"),
        ("127.0.0.1", ["198.51.100.1", ""], "198.51.100.1"),
        ("127.0.0.1", ["1.1.1.1, 198.51.100.1, , 10.0.0.1,\t,"], "198.51.100.1"),
        ("127.0.0.1", ["198.51.100.1" + ", " * 1000], "198.51.100.1"),
        ("127.0.0.1", [", ,"], "127.0.0.1"),
        ("203.0.113.9", ["198.51.100.1, "], "203.0.113.9"),
    ],
)
def test_clients_behind_proxies(peer: str, forwarded: list[str], client: str) -> None:
    """The client is the last address that is not one of the operator's own proxies."""
    assert TrustedProxies(("127.0.0.1", "10.0.0.0/8", "unix")).client(peer, forwarded) == client
    assert TrustedProxies().client(peer, forwarded) == peer


def test_fields_are_plain() -> None:
    """A line of the log is plain as text and as JSON."""
    fields = Fields(client="a\x7f\x85\n b", error=None, status=200)
    assert str(fields) == r'client="a\u007f\u0085\n b" error=- status=200'
    record = logging.LogRecord("x", logging.INFO, "", 0, Lines([(0.25, fields), (1.5, fields)]), (), None)
    lines = JsonFormatter().format(record).split("\n")
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert [json.loads(line)["client"] for line in lines] == [fields["client"]] * 2
    assert [json.loads(line)["time"][-15:] for line in lines] == ["00:00.250+00:00", "00:01.500+00:00"]
    text = PlainFormatter("%(asctime)s %(message)s").format(record).split("\n")
    assert [line[-len(str(fields)) - 7 :] for line in text] == [f"00,250 {fields}", f"01,500 {fields}"]


def test_lines_fit_into_one_write() -> None:
    """The longest lines fit into one write as JSON, because processes that share a pipe would mix longer ones."""
    longest = Call("OPTIONS", "i" * 128)
    longest.target = Target(f"{'h' * 63}.fal.run", "/" + "p" * 1000)
    longest.head = ResponseHead(200, "1.1", [("x-fal-request-id", "f" * 128)], None, streams=False, coding="")
    longest.status, longest.sent_bytes = 200, 10**12
    longest.first_byte_s = longest.seconds = 86_399.123456
    longest.outcome, longest.error, longest.detail = "client_disconnected", "UnsupportedMediaType", "d" * 1000
    lines = Lines([(1e9, Fields(longest.fields("ffff:" * 7 + "ffff")))] * LINES_AT_ONCE)
    record = logging.LogRecord("tornado_fal_proxy.access", logging.INFO, "", 0, lines, (), None)
    assert len(JsonFormatter().format(record)) < select.PIPE_BUF


@pytest.mark.parametrize("text", ["nginx", "10.0.0.1/8", "10.0.0.0/33", "", "Unix", "*"])
def test_text_that_names_no_trusted_proxy(text: str) -> None:
    """A trusted proxy is an address, a network or a socket file, and the error quotes anything else."""
    with pytest.raises(ValueError, match="is no address, no network such as 10") as caught:
        TrustedProxies(("127.0.0.1", text))
    assert str(caught.value).startswith(repr(text))
