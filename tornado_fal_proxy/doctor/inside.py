"""Check from this machine, with its key, whether fal takes the key and how far fal is.

Strategy. The key is read as the service reads it, and goes to fal alone. It is in no finding.
"""

from __future__ import annotations

from collections.abc import Iterator

from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.doctor.checks import NO_JOB
from tornado_fal_proxy.doctor.findings import OK, WRONG, Finding
from tornado_fal_proxy.doctor.visitor import Seen, Visitor
from tornado_fal_proxy.errors import ConfigError, KeyMissing

__all__ = ["check_key"]


def check_key(config: ProxyConfig, endpoint: str) -> Iterator[Finding]:
    """Yield what fal answers to the key of ``config``. Raise ConfigError where it has none."""
    try:
        line = config.authorization().decode("ascii")
    except KeyMissing as exc:
        raise ConfigError([f"--key: {exc.detail}"]) from None
    visitor = Visitor(
        f"https://queue.fal.run/{endpoint}/requests/{NO_JOB}/status",
        headers=[line],
        ca_certs=config.ca_certs,
        connect_to=None if config.connect_to is None else config.connect_to.partition(",")[0],
    )
    try:
        seen = visitor.send()
    finally:
        visitor.close()
    yield _finding(seen)


def _finding(seen: Seen) -> Finding:
    if seen.status == 0:
        change = "DNS, routes and firewall of this machine: it must reach queue.fal.run port 443"
        return Finding("key", WRONG, f"this machine does not reach fal ({seen.reason})", change)
    if seen.status in (401, 403):
        change = "FAL_KEY, to a key of https://fal.ai/dashboard/keys"
        return Finding("key", WRONG, f"fal refuses the key of this machine ({seen.status})", change)
    if seen.status >= 500:
        return Finding("key", WRONG, f"fal answers {seen.status}", "wait, or ask fal: https://status.fal.ai")
    connected, secured, ended = (f"{time_s * 1000:.0f} ms" for time_s in (seen.connect_s, seen.tls_s, seen.seconds))
    times = f"connection after {connected}, TLS after {secured}, response after {ended}"
    return Finding("key", OK, f"fal takes the key of this machine ({times})")
