"""What an operator can choose, as one frozen value that is checked when it is made.

Strategy: :class:`ProxyConfig` is plain data. Making one checks every field and raises a single
:class:`~tornado_fal_proxy.errors.ConfigError` that names all problems, so a bad value never waits for the first call
to show itself. Each field carries its help text and unit, and the command line, the ``FAL_PROXY_*`` environment
variables and the table in README.md are all derived from (or tested against) these fields.

The key appears in no repr and no error message.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tornado_fal_proxy.errors import ConfigError, KeyMissing

__all__ = ["DEFAULT_ROUTE", "ENV_PREFIX", "ProxyConfig", "key_from", "relay_options"]

ENV_PREFIX = "FAL_PROXY_"

# The path that fal's own proxies serve and its clients' examples use.
DEFAULT_ROUTE = "/api/fal/proxy"
# Twice what a slow intercontinental TCP and TLS handshake with one lost packet takes.
DEFAULT_CONNECT_TIMEOUT_S = 10.0
# Longer than the ten minutes that a slow model may think in silence; a dead peer is found by TCP keep-alive before it.
DEFAULT_IDLE_TIMEOUT_S = 900.0
# Images in data URIs fit; larger files go through fal's storage and never pass the proxy.
DEFAULT_MAX_BODY_BYTES = 32 * 1024 * 1024
# About half a gigabyte of held long polls over HTTP/2, and one open file for each.
DEFAULT_MAX_IN_FLIGHT = 20_000
# Results of models are JSON with URLs, a few kilobytes; with images inlined as base64 a few megabytes.
DEFAULT_HOLD_BYTES = 8 * 1024 * 1024

# libcurl counts in milliseconds, and takes 0 of them for its own default.
LEAST_S, MOST_S = 0.001, 86_400
# What libcurl can count on every platform; nobody has as many calls, or bytes in one body.
MOST = 2**31 - 1

_KEY = re.compile(r"[!-~]+")
_CONNECT_TO = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


def key_from(environ: Mapping[str, str]) -> str | None:
    """The key that fal's own tools would take: ``FAL_KEY``, or ``FAL_KEY_ID`` and ``FAL_KEY_SECRET`` with a colon."""
    if key := environ.get("FAL_KEY", "").strip():
        return key
    key_id, secret = environ.get("FAL_KEY_ID", "").strip(), environ.get("FAL_KEY_SECRET", "").strip()
    return f"{key_id}:{secret}" if key_id and secret else None


def _option(default: Any, help: str, metavar: str) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """How one proxy route relays calls. Immutable; raises ConfigError, naming every problem, when it is made.

    ``key`` is sent to fal as ``authorization: Key <key>``. None (the default) reads ``FAL_KEY``, or ``FAL_KEY_ID`` and
    ``FAL_KEY_SECRET``, from the environment for each call; without either a call is answered 500.
    The other fields are described by their metadata and in README.md's table of options.
    """

    key: str | None = field(default=None, repr=False)
    connect_timeout_s: float = _option(
        DEFAULT_CONNECT_TIMEOUT_S, "time for name look-up, TCP and TLS to fal", "SECONDS"
    )
    idle_timeout_s: float = _option(
        DEFAULT_IDLE_TIMEOUT_S, "a call on which no byte moved either way for this long is ended", "SECONDS"
    )
    max_body_bytes: int = _option(DEFAULT_MAX_BODY_BYTES, "largest request body; a larger one is answered 413", "BYTES")
    max_in_flight: int = _option(
        DEFAULT_MAX_IN_FLIGHT, "calls served at once by a process; one more is answered 503", "CALLS"
    )
    hold_bytes: int = _option(
        DEFAULT_HOLD_BYTES, "a POST's plain result up to this size is relayed only when it is whole", "BYTES"
    )
    ca_certs: str | None = _option(None, "trust the certificates in this PEM file instead of the usual ones", "FILE")
    connect_to: str | None = _option(
        None, "open every connection to this address instead of fal's (names and TLS checks stay fal's)", "HOST:PORT"
    )

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigError(problems)

    def _problems(self) -> list[str]:
        problems = []
        if self.key is not None and (not isinstance(self.key, str) or not _KEY.fullmatch(self.key)):
            problems.append("key: must be printable ASCII without spaces, as shown on fal's page of keys")
        for name in ("connect_timeout_s", "idle_timeout_s"):
            value = getattr(self, name)
            if not _is_number(value) or not LEAST_S <= value <= MOST_S:
                problems.append(f"{name}: must be a number of seconds from {LEAST_S} to {MOST_S}, not {value!r}")
        for name in ("max_body_bytes", "max_in_flight", "hold_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
                problems.append(f"{name}: must be a whole number from 1 to {MOST}, not {value!r}")
        if self.ca_certs is not None:
            problems.extend(_unreadable("ca_certs", self.ca_certs))
        if self.connect_to is not None:
            match = _CONNECT_TO.fullmatch(self.connect_to) if isinstance(self.connect_to, str) else None
            if not match or not 0 < int(match[1]) < 65_536:
                problems.append(f"connect_to: must be HOST:PORT, not {self.connect_to!r}")
        return problems

    def authorization(self) -> bytes:
        """The header line that authorizes a call. Raises KeyMissing."""
        key = self.key or key_from(os.environ)
        if key is None:
            raise KeyMissing("no key: set FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or ProxyConfig(key=...)")
        if not _KEY.fullmatch(key):
            raise KeyMissing("the key in the environment has characters that no key of fal's has")
        return b"authorization: Key " + key.encode("ascii")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> ProxyConfig:
        """The configuration in ``FAL_KEY`` and the ``FAL_PROXY_<FIELD>`` variables. Raises ConfigError."""
        texts = {option.name: environ.get(ENV_PREFIX + option.name.upper()) for option in relay_options()}
        return cls.from_texts(texts, key=key_from(environ))

    @classmethod
    def from_texts(cls, texts: Mapping[str, str | None], *, key: str | None) -> ProxyConfig:
        """The configuration whose fields are given as text, as in options and variables. Raises ConfigError.

        None stands for a field's default, and so does an empty text: ``FAL_PROXY_X=`` is how a deployment unsets X.
        """
        values: dict[str, Any] = {}
        for option in relay_options():
            if text := texts.get(option.name):
                values[option.name] = _from_text(text, option.default)
        return cls(key=key, **values)


def relay_options() -> tuple[Any, ...]:
    """The dataclass fields that are options of the command: all but the key, which must never stand in argv."""
    return tuple(option for option in fields(ProxyConfig) if option.metadata)


def _from_text(text: str, default: Any) -> Any:
    """``text`` as the type of ``default``, or unchanged when it is none of these: the check then names it."""
    for kind in (int, float):
        if type(default) is kind:
            try:
                return kind(text)
            except ValueError:
                return text
    return text


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unreadable(name: str, path: object) -> list[str]:
    """What is wrong with a PEM file of CA certificates: an empty list when nothing is."""
    if not isinstance(path, str | os.PathLike):
        return [f"{name}: must be the path of a PEM file, not {path!r}"]
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(os.fspath(path))
    except ssl.SSLError:
        return [f"{name}: {os.fspath(path)!r} holds no PEM certificates"]
    except (OSError, ValueError) as exc:  # ValueError: a path with a NUL, or one that the file system cannot spell
        return [f"{name}: cannot read {os.fspath(path)!r}: {getattr(exc, 'strerror', exc)}"]
    return []
