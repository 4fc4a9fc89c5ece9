"""What an operator can choose, as one frozen value that is checked when it is made.

Strategy: :class:`ProxyConfig` is plain data. Making one checks every field and raises a single
:class:`~tornado_fal_proxy.errors.ConfigError` that names all problems, so a bad value never waits for the first call
to show itself. Each field carries its help text and unit, and the command line, the ``FAL_PROXY_*`` environment
variables and the table in README.md are all derived from (or tested against) these fields.

The key appears in no repr and no error message.
"""

from __future__ import annotations

import importlib
import os
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

from tornado_fal_proxy.access import DEFAULT_MAX_TOKEN_EXPIRATION_S, AccessRules, access_rules
from tornado_fal_proxy.cors import CorsRules, cors_rules
from tornado_fal_proxy.errors import ConfigError, KeyMissing

__all__ = [
    "DEFAULT_ROUTE",
    "EMPTY_LIST",
    "ENV_PREFIX",
    "FALSE",
    "TRUE",
    "ProxyConfig",
    "as_list",
    "authorization_line",
    "key_from",
    "key_from_file",
    "relay_options",
]

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
# How a switch is written as text, and a list that is there but empty.
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
EMPTY_LIST = "none"
# What libcurl can count on every platform; nobody has as many calls, or bytes in one body.
MOST = 2**31 - 1

# More than any key has, and nothing to keep in memory when the variable names the wrong file.
_MOST_KEY_FILE_CHARS = 10_000

_KEY = re.compile(r"[!-~]+")
_LISTS = ("allowed_endpoints", "allowed_hosts", "allowed_webhooks", "allowed_origins")
_SWITCHES = ("allow_uploads", "allow_cancel", "allow_credentials")
_FUNCTIONS = ("authorize", "resolve_key")
_CONNECT_TO = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


def key_from(environ: Mapping[str, str]) -> str | None:
    """The key that fal's own tools would take: ``FAL_KEY``, or ``FAL_KEY_ID`` and ``FAL_KEY_SECRET`` with a colon."""
    if key := environ.get("FAL_KEY", "").strip():
        return key
    key_id, secret = environ.get("FAL_KEY_ID", "").strip(), environ.get("FAL_KEY_SECRET", "").strip()
    return f"{key_id}:{secret}" if key_id and secret else None


def key_from_file(environ: Mapping[str, str]) -> str | None:
    """The key in the file that ``FAL_KEY_FILE`` names, as systemd and containers hand over secrets; None without it.

    Raises ConfigError. Who else may read the file is not looked at: where secrets are mounted its mode says nothing.
    """
    path = environ.get("FAL_KEY_FILE", "")
    if not path:
        return None
    try:
        with open(path, encoding="ascii") as file:
            key = file.read(_MOST_KEY_FILE_CHARS).strip()
    except OSError as exc:
        raise ConfigError([f"FAL_KEY_FILE: cannot read {path!r}: {exc.strerror}"]) from exc
    except ValueError:  # a path with a NUL, or what is no text: from None, for the exception may quote what was read
        raise ConfigError([f"FAL_KEY_FILE: {path!r} holds no key"]) from None
    if not _KEY.fullmatch(key):
        raise ConfigError([f"FAL_KEY_FILE: {path!r} holds no key"])
    return key


def as_list(text: str) -> tuple[str, ...]:
    """The texts between commas, without white space around them."""
    return () if text.strip().lower() == EMPTY_LIST else tuple(item.strip() for item in text.split(","))


def _switch(text: str) -> Any:
    return True if text.lower() in TRUE else False if text.lower() in FALSE else text


def _function(text: str) -> Any:
    """What ``package.module:function`` names. Raises ValueError, with the reason."""
    module, colon, name = text.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"must be package.module:function, not {text!r}")
    try:
        return attrgetter(name)(importlib.import_module(module))
    except Exception as exc:
        raise ValueError(f"cannot import {text!r}: {type(exc).__name__}: {exc}") from exc


def _number(text: str, kind: Callable[[str], Any]) -> Any:
    """``text`` as a number, or unchanged when it is none: the check then names it."""
    try:
        return kind(text)
    except ValueError:
        return text


_PARSERS: dict[type, Callable[[str], Any]] = {
    bool: _switch,
    int: partial(_number, kind=int),
    float: partial(_number, kind=float),
}


def _option(default: Any, help: str, metavar: str, parse: Callable[[str], Any] | None = None) -> Any:
    """A field that is also an option of the command. ``parse`` makes its value of a text, else the default's type."""
    metadata = {"help": help, "metavar": metavar, "parse": parse or _PARSERS.get(type(default), str)}
    return field(default=default, metadata=metadata)


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
    allowed_endpoints: Sequence[str] | None = _option(
        None, "endpoints that may be called, as patterns; * is within a segment, ** any depth", "PATTERN,...", as_list
    )
    allow_uploads: bool = _option(False, "with allowed endpoints, uploads to fal's storage too", "")
    max_token_expiration_s: int = _option(
        DEFAULT_MAX_TOKEN_EXPIRATION_S,
        "with allowed endpoints, the longest life of a realtime token",
        "SECONDS",
    )
    allowed_hosts: Sequence[str] | None = _option(
        None, "hosts of fal's that may be called, such as queue.fal.run or *.fal.run", "HOST,...", as_list
    )
    allow_cancel: bool = _option(False, "let PUT through to cancel a queued job", "")
    allowed_webhooks: Sequence[str] | None = _option(
        None, "origins that fal_webhook may name, or none; without it any", "ORIGIN,...", as_list
    )
    authorize: Callable[[Any, Any], Any] | None = _option(  # noqa: RUF009  (it is a field)
        None,
        "function that is given handler and target, and whose false result means 401",
        "MODULE:FUNCTION",
        _function,
    )
    resolve_key: Callable[[Any, Any], Any] | None = _option(  # noqa: RUF009  (it is a field)
        None, "function that is given handler and target, and whose result is the key", "MODULE:FUNCTION", _function
    )
    allowed_origins: Sequence[str] | None = _option(
        None, "origins whose pages may call, exact or such as https://*.example.com (CORS)", "ORIGIN,...", as_list
    )
    allow_credentials: bool = _option(False, "let those pages' browsers send cookies", "")

    def __post_init__(self) -> None:
        for name in _LISTS:
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | tuple):
                object.__setattr__(self, name, tuple(value))  # hashable, and nobody else's
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
        order = [field.name for field in fields(self)]
        problems.extend(self._problems_of_rules())
        return sorted(problems, key=lambda problem: order.index(problem.partition(":")[0]))

    def _problems_of_rules(self) -> list[str]:
        problems = []
        if type(self.max_token_expiration_s) is not int or not 1 <= self.max_token_expiration_s <= MOST_S:
            value = self.max_token_expiration_s
            problems.append(f"max_token_expiration_s: must be a whole number from 1 to {MOST_S}, not {value!r}")
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                problems.append(f"{name}: must be True or False (as text: yes or no), not {value!r}")
        for name in _FUNCTIONS:
            value = getattr(self, name)
            if value is not None and not callable(value):
                problems.append(f"{name}: must be a function, not {value!r}")
        for rules in ("access", "cors"):
            try:
                getattr(self, rules)
            except ConfigError as exc:
                problems.extend(exc.problems)
        return problems

    @cached_property
    def access(self) -> AccessRules | None:
        """Who may call what; None where no rule is set."""
        return access_rules(
            allowed_endpoints=self.allowed_endpoints,
            allowed_hosts=self.allowed_hosts,
            allowed_webhooks=self.allowed_webhooks,
            allow_uploads=self.allow_uploads,
            allow_cancel=self.allow_cancel,
            max_token_expiration_s=self.max_token_expiration_s,
        )

    @cached_property
    def cors(self) -> CorsRules | None:
        """Which pages of other origins may call; None where CORS is off."""
        return cors_rules(
            self.allowed_origins, allow_credentials=self.allow_credentials, allow_cancel=self.allow_cancel
        )

    def any_key(self) -> str | None:
        """The key of the configuration, else that of the environment as it is now."""
        return self.key or key_from(os.environ)

    def authorization(self) -> bytes:
        """The header line that authorizes a call with the key of the configuration. Raises KeyMissing."""
        key = self.any_key()
        if key is None:
            raise KeyMissing("no key: set FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or ProxyConfig(key=...)")
        return authorization_line(key, "the key in the environment")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> ProxyConfig:
        """The configuration in ``FAL_KEY``, or the file ``FAL_KEY_FILE``, and the ``FAL_PROXY_<FIELD>`` variables.

        The file is read now, and not again. Raises ConfigError.
        """
        texts = {option.name: environ.get(ENV_PREFIX + option.name.upper()) for option in relay_options()}
        return cls.from_texts(texts, key=key_from(environ) or key_from_file(environ))

    @classmethod
    def from_texts(cls, texts: Mapping[str, str | None], *, key: str | None) -> ProxyConfig:
        """The configuration whose fields are given as text, as in options and variables. Raises ConfigError.

        None stands for a field's default, and so does an empty text: ``FAL_PROXY_X=`` is how a deployment unsets X.
        """
        values: dict[str, Any] = {}
        problems: list[str] = []
        for option in relay_options():
            if text := texts.get(option.name):
                try:
                    values[option.name] = option.metadata["parse"](text)
                except ValueError as exc:
                    problems.append(f"{option.name}: {exc}")
        try:
            config = cls(key=key, **values)
        except ConfigError as exc:
            raise ConfigError([*problems, *exc.problems]) from None
        if problems:
            raise ConfigError(problems)
        return config


def authorization_line(key: str, whose: str) -> bytes:
    """The header line that authorizes a call with ``key``. Raises KeyMissing, which names it as ``whose``."""
    if not _KEY.fullmatch(key):
        raise KeyMissing(f"{whose} has characters that no key of fal's has")
    return b"authorization: Key " + key.encode("ascii")


def relay_options() -> tuple[Any, ...]:
    """The dataclass fields that are options of the command: all but the key, which must never stand in argv."""
    return tuple(option for option in fields(ProxyConfig) if option.metadata)


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
