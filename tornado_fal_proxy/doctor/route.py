"""Check that a proxy for fal answers at the URL at all, and as fal's proxy formula has it.

Strategy. No request of this module can cost anything, or send a key anywhere, even where the proxy is broken: the
target that must be refused is a name that nobody can own (RFC 2606).
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator
from urllib.parse import urljoin, urlsplit

from tornado_fal_proxy.doctor.findings import NOTE, OK, WRONG, Finding
from tornado_fal_proxy.doctor.visitor import Seen, Visitor
from tornado_fal_proxy.rules.target import TARGET_HEADER

__all__ = ["check_reachable", "check_route", "front_of", "message_of"]

FOREIGN_TARGET = "https://fal-proxy-doctor.invalid/"
# Limits the life of a certificate, in days, below which something is wrong: renewals come thirty days before the end.
RENEWAL_DAYS = 14

_CLOSED = ("{host} port {port} closes the connection without a response", "https or http in the URL, or the port")
# libcurl's errors (libcurl-errors(3)) with which there is no connection, each with what to change.
_UNREACHABLE = {
    6: ("{host} is no name that this machine can look up", "the DNS record of {host}, or the name in the URL"),
    7: (
        "nothing accepts connections at {host} port {port}",
        "start what listens there, or open the port in the firewall",
    ),
    28: (
        "no response from {host} port {port} within {seconds:.0f} s",
        "a firewall that drops packets, or a server that hangs",
    ),
    35: (
        "no TLS connection can be made with {host} port {port} ({reason})",
        "the port in the URL, or https and http in it",
    ),
    52: _CLOSED,
    56: _CLOSED,
    60: (
        "the certificate of {host} is not trusted ({reason})",
        "ssl_certificate in nginx's server { }: a certificate for this name, with the chain behind it",
    ),
}
_REDIRECTS = (301, 302, 303, 307, 308)


def front_of(seen: Seen) -> str:
    """Return what stands in front, by its own word."""
    return seen.header("server") or "the server"


def message_of(seen: Seen) -> str | None:
    """Return the message of a response that the proxy, or nginx with the file of deploy/, has made by itself."""
    try:
        content = json.loads(seen.body)
    except (ValueError, RecursionError):
        return None
    message = content.get("message") if isinstance(content, dict) and len(content) == 1 else None
    return message if isinstance(message, str) else None


def check_reachable(seen: Seen, url: str) -> Iterator[Finding]:
    """Yield what the first response tells about connection and TLS. ``seen`` had no target."""
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    if seen.status == 0:
        text, change = _UNREACHABLE.get(seen.error, ("no response from {host} port {port} ({reason})", ""))
        facts = {
            "host": parts.hostname,
            "port": parts.port or (443 if is_tls else 80),
            "reason": seen.reason,
            "seconds": seen.seconds,
        }
        yield Finding("reachable", WRONG, text.format(**facts), change.replace("{ }", "{{ }}").format(**facts))
        return
    if seen.error:
        text = f"{front_of(seen)} began a response ({seen.status}) that is not whole: {seen.reason}"
        yield Finding("reachable", WRONG, text, "look at the server, which may be none for HTTP")
        return
    yield Finding("reachable", OK, f"{front_of(seen)} answered over {seen.version} after {seen.seconds:.2f} s")
    if is_tls:
        yield _certificate(seen)
        yield _version(seen)
    elif not _is_local(parts.hostname or ""):
        change = "listen 443 ssl in nginx's server { }, as deploy/nginx/tornado-fal-proxy.conf has it"
        yield Finding("tls", WRONG, "the URL is http: anyone on the way can read and change calls", change)


def _is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _certificate(seen: Seen) -> Finding:
    try:
        days = int((ssl.cert_time_to_seconds(seen.expires) - time.time()) // 86_400)
    except ValueError:
        return Finding("tls", OK, "the certificate is trusted")
    text = f"the certificate is trusted, and valid for {days} more days"
    if days < RENEWAL_DAYS:
        return Finding("tls", WRONG, text, "renew the certificate, and reload what serves it")
    return Finding("tls", OK, text)


def _version(seen: Seen) -> Finding:
    if seen.version == "HTTP/2":
        return Finding("http version", OK, "HTTP/2: a page may have many calls at once")
    text = f"{seen.version}: a browser opens six connections to a host, so a seventh call waits for one of six polls"
    change = "nginx: http2 behind ssl in the line listen; from 1.25.1 on a line http2 on;"
    return Finding("http version", NOTE, text, change)


def check_route(seen: Seen, visitor: Visitor) -> Iterator[Finding]:
    """Yield whether a proxy answers as the formula has it. ``seen`` is a response to a GET without a target."""
    finding = _problem_of_route(seen, visitor.url)
    if finding is not None:
        yield finding
        return
    problems = []
    deleted = visitor.send("DELETE")
    if deleted.status != 405:
        problems.append(f"DELETE is answered {_status(deleted)} in place of 405")
    refused = visitor.send("POST", [f"{TARGET_HEADER}: {FOREIGN_TARGET}", "content-type: application/json"], body=b"{}")
    if refused.status == 400:
        text = f"the header {TARGET_HEADER} does not arrive: the proxy answers as if there were none"
        yield Finding("route", WRONG, text, f"let {TARGET_HEADER} through in what stands in front")
        return
    if refused.status != 412:
        problems.append(f"a target that is not fal's is answered {_status(refused)} in place of 412")
    if problems:
        change = "look whether something in front answers for the proxy, or the proxy is another"
        yield Finding("route", WRONG, ", and ".join(problems), change)
    else:
        yield Finding("route", OK, "a proxy answers as fal's formula has it (400, 405, 412)")


def _status(seen: Seen) -> str:
    return str(seen.status) if seen.status else f"nothing ({seen.reason})"


def _problem_of_route(seen: Seen, url: str) -> Finding | None:
    """Return why the response is none of a proxy's, or None."""
    status, message = seen.status, message_of(seen)
    if status == 400 and message is not None:
        return None
    path = urlsplit(url).path or "/"
    who = front_of(seen)
    if status in (401, 403):
        text = f"{who} answers {status} to a request without a login, so nothing more can be seen"
        return Finding("route", WRONG, text, "add --header='cookie: ...' or --header='authorization: ...' of a user")
    if status in _REDIRECTS:
        to = urljoin(url, seen.header("location") or "")
        text = f"{who} redirects to {to}, which fal's SDKs do not follow with a POST"
        return Finding("route", WRONG, text, "the URL of the client's proxyUrl, to the one behind the redirect")
    if status in (502, 503, 504):
        text = f"{who} answers {status}: it does not reach the proxy"
        change = "start tornado-fal-proxy, or correct the server line of nginx's upstream { } (or proxy_pass)"
        return Finding("route", WRONG, f"{text} ({message})" if message else text, change)
    if status == 429:
        return Finding("route", WRONG, f"{who} answers 429: it had too many calls of this address", "try again later")
    if status == 404:
        text = f"{who} knows no path {path}"
        change = f"--route={path} of tornado-fal-proxy, and location = {path} in nginx, or the path in the URL"
        return Finding("route", WRONG, text, change)
    text = f"{who} answers {status} to a GET without {TARGET_HEADER}, and no proxy for fal does that"
    if "html" in (seen.header("content-type") or ""):
        text += "; it is a page"
    change = f"location = {path} in nginx, in front of what serves the pages, with proxy_pass to tornado-fal-proxy"
    return Finding("route", WRONG, text, change)
