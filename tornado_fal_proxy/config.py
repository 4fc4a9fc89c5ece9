"""Hold every choice of an operator as one frozen value that is checked when it is made.

Strategy: :class:`ProxyConfig` is plain data. Making one checks every field and raises a single
:class:`~tornado_fal_proxy.errors.ConfigError` that names all problems, so a bad value fails at the start and not at the
first call. Each field carries its help text and unit. The command line, the ``FAL_PROXY_*`` environment variables and
the table in docs/reference.md are all derived from these fields, or tested against them.

The key appears in no repr and no error message.
"""

from __future__ import annotations

import os
import re
import ssl
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

from tornado_fal_proxy.credentials import KEY_CHARACTERS, authorization_line, configured_key, key_from_env
from tornado_fal_proxy.errors import ConfigError, KeyMissing
from tornado_fal_proxy.option_fields import as_function, as_list, as_number, option
from tornado_fal_proxy.rules.access import DEFAULT_MAX_TOKEN_EXPIRATION_S, AccessRules, access_rules
from tornado_fal_proxy.rules.connect_to import connect_to_problem
from tornado_fal_proxy.rules.cors import CorsRules, cors_rules
from tornado_fal_proxy.rules.excerpt import excerpt
from tornado_fal_proxy.rules.fal_headers import HeaderRules, as_header_lines, header_names, header_rules
from tornado_fal_proxy.spending.plans import ALLOW, CALLS, NEEDS_PRICES, REFUSE, UNITS, SpendingRules, spending_rules

__all__ = [
    "DEFAULT_ROUTE",
    "ENV_PREFIX",
    "SERVICE_OPTIONS",
    "ProxyConfig",
    "relay_options",
    "unknown_variables",
]

ENV_PREFIX = "FAL_PROXY_"

# The route of the proxy: the path of fal's own proxies and of the examples of fal's SDKs.
DEFAULT_ROUTE = "/api/fal/proxy"
# Limits name lookup, TCP and TLS: twice what a slow intercontinental handshake with one lost packet takes.
DEFAULT_CONNECT_TIMEOUT_S = 10.0
# Limits silence: longer than the ten minutes that a slow model may compute. TCP keep-alive finds a dead peer earlier.
DEFAULT_IDLE_TIMEOUT_S = 900.0
# Limits a request body: images in data URIs fit, and larger files go through fal's storage, past the proxy.
DEFAULT_MAX_BODY_BYTES = 32 * 1024 * 1024
# Limits calls at once: about half a gigabyte of long polls over HTTP/2, with one open file for each.
DEFAULT_MAX_IN_FLIGHT = 20_000
# Limits what is buffered of a paid result: JSON with URLs has a few kilobytes, with images in base64 a few megabytes.
DEFAULT_RESPONSE_BUFFER_BYTES = 8 * 1024 * 1024

# Limits the limit of all buffered bytes: less would refuse calls whose bodies are ordinary.
MIN_BUFFERED_BYTES = 1024 * 1024
# Limit a time-out: libcurl counts in milliseconds and takes 0 of them for its own default; a day is the longest.
MIN_S, MAX_S = 0.001, 86_400
# Limits, in seconds, how long a job counts as unfinished whose end the proxy does not notice: longer than nearly all
# jobs take.
DEFAULT_JOB_LIFETIME_S = 3600
# Limits the account: a year, and some days to look at it.
DEFAULT_ACCOUNT_DAYS = 400
# Limits counts and sizes: the largest number that libcurl takes on every platform, and more than is ever needed.
MAX_NUMBER = 2**31 - 1

# The options of the command that are no fields here. An application may share the variables of both.
SERVICE_OPTIONS = (
    *("address", "port", "route", "processes", "drain_timeout_s", "log_level", "log_format", "trusted_proxies"),
    *("admin_port", "admin_address", "sandbox", "worker_timeout_s", "config", "env_file", "user_header"),
)
# The variables that are ours, or were meant to be. Environments ignore no case, but people do.
_OUR_VARIABLE = re.compile(r"FAL_?PROXY_(.*)", re.IGNORECASE | re.DOTALL)
# The variables that Kubernetes sets in every pod for a Service named fal-proxy. Nobody has misspelled them.
_SERVICE_LINK = re.compile(r"FAL_PROXY_(?:SERVICE_(?:HOST|PORT(?:_[A-Z0-9_]+)?)|PORT_[0-9]+_[A-Z]+(?:_[A-Z]+)?)")

_LISTS = (
    *("allowed_endpoints", "allowed_hosts", "allowed_webhooks", "allowed_origins"),
    *("allowed_fal_headers", "set_fal_headers", "withhold_headers", "expose_headers"),
)
_SWITCHES = (
    *("allow_uploads", "allow_cancel", "allow_credentials", "event_streams_over_http1", "failover"),
    *("own_jobs_only", "tag_users", "allow_diagnostics"),
)
_FUNCTIONS = ("authorize", "resolve_key", "identify", "check_input", "input_units")
_TABLES = ("prices", "plans")
_LIMITS = ("jobs_per_user", "unfinished_jobs_per_user", "budget_per_user", "jobs", "budget", "plans")

_access, _spending = partial(option, group="access"), partial(option, group="spending")


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """Configure how one proxy route relays calls. Immutable. Raise ConfigError, naming every problem, when it is made.

    ``key`` is sent to fal as ``authorization: Key <key>``. None (the default) reads ``FAL_KEY``, or ``FAL_KEY_ID`` and
    ``FAL_KEY_SECRET``, from the environment for each call; without either a call is answered 500.
    The metadata of the other fields, and the table in docs/reference.md, describe them.
    """

    key: str | None = field(default=None, repr=False)
    connect_timeout_s: float = option(DEFAULT_CONNECT_TIMEOUT_S, "time for name lookup, TCP and TLS to fal", "SECONDS")
    idle_timeout_s: float = option(
        DEFAULT_IDLE_TIMEOUT_S, "a call on which no byte moved either way for this long is ended", "SECONDS"
    )
    max_body_bytes: int = option(DEFAULT_MAX_BODY_BYTES, "largest request body; a larger one is answered 413", "BYTES")
    max_in_flight: int = option(
        DEFAULT_MAX_IN_FLIGHT, "calls served at once by a process; one more is answered 503", "CALLS"
    )
    response_buffer_bytes: int = option(
        DEFAULT_RESPONSE_BUFFER_BYTES,
        "the plain result of a paid call is buffered up to this size, and relayed only when it is whole",
        "BYTES",
    )
    max_buffered_bytes: int | None = option(
        None,
        "all bytes that a process buffers; beyond it calls are answered 503; without it a quarter of its memory",
        "BYTES",
        partial(as_number, kind=int),
    )
    event_streams_over_http1: bool = option(
        False, "ask fal for event streams over HTTP/1.1, where a truncated one is always noticed"
    )
    set_fal_headers: Sequence[str] | None = option(
        None, "headers for fal in place of the client's, such as 'x-fal-store-io: 0'", "LINE,...", as_header_lines
    )
    withhold_headers: Sequence[str] | None = option(
        None, "headers of fal's responses that clients do not get, such as alt-svc", "NAME,...", as_list
    )
    failover: bool = option(
        False, "while fal.run or queue.fal.run cannot be reached, call falrun.com instead, which then gets the key"
    )
    ca_certs: str | None = option(None, "trust the certificates in this PEM file instead of the usual ones", "FILE")
    connect_to: str | None = option(
        None,
        "connect to this address instead of fal's; a second one, for the backup domain, needs failover",
        "HOST:PORT[,HOST:PORT]",
    )
    allowed_endpoints: Sequence[str] | None = _access(
        None, "endpoints that may be called, as patterns; * is within a segment, ** any depth", "PATTERN,...", as_list
    )
    allow_uploads: bool = _access(False, "with allowed endpoints, uploads to fal's storage too", "")
    max_token_expiration_s: int = _access(
        DEFAULT_MAX_TOKEN_EXPIRATION_S,
        "with allowed endpoints, the longest life of a realtime token",
        "SECONDS",
    )
    allowed_hosts: Sequence[str] | None = _access(
        None,
        "hosts of fal's that may be called, such as queue.fal.run or *.fal.run; api.fal.ai only by its exact name",
        "HOST,...",
        as_list,
    )
    allow_cancel: bool = _access(False, "let PUT through to cancel a queued job", "")
    allowed_webhooks: Sequence[str] | None = _access(
        None, "origins that fal_webhook may name, or none; without it any", "ORIGIN,...", as_list
    )
    allowed_fal_headers: Sequence[str] | None = _access(
        None,
        "x-fal- and x-app-fal- headers that clients may send, with * for any part; "
        "without it all, and with allowed endpoints those that fal's SDKs send",
        "NAME,...",
        as_list,
    )
    authorize: Callable[[Any, Any], Any] | None = _access(  # noqa: RUF009  (it is a field)
        None,
        "function that is given handler and target, and whose false result means 401",
        "MODULE:FUNCTION",
        as_function,
    )
    resolve_key: Callable[[Any, Any], Any] | None = _access(  # noqa: RUF009  (it is a field)
        None, "function that is given handler and target, and whose result is the key", "MODULE:FUNCTION", as_function
    )
    allowed_origins: Sequence[str] | None = _access(
        None, "origins whose pages may call, exact or such as https://*.example.com (CORS)", "ORIGIN,...", as_list
    )
    expose_headers: Sequence[str] | None = _access(
        None, "response headers that those pages may read, beside fal's", "NAME,...", as_list
    )
    allow_credentials: bool = _access(False, "let those pages' browsers send cookies", "")
    allow_diagnostics: bool = _access(False, "let the command doctor make this proxy fail on purpose", "")
    identify: Callable[[Any, Any], Any] | None = _spending(  # noqa: RUF009  (it is a field)
        None,
        "function that is given handler and target, and whose result is the user's id, or (id, plan); "
        "without it the client's address counts",
        "MODULE:FUNCTION",
        as_function,
    )
    jobs_per_user: str | None = _spending(
        None, "paid calls that each user may make, such as 5/minute,20/day", "NUMBER/PERIOD,..."
    )
    unfinished_jobs_per_user: int | None = _spending(
        None, "paid calls that each user may have unfinished at once", "JOBS", partial(as_number, kind=int)
    )
    budget_per_user: str | None = _spending(
        None, f"dollars that each user may spend, such as 1.00/day; {NEEDS_PRICES}", "DOLLARS/PERIOD,..."
    )
    jobs: str | None = _spending(None, "paid calls of all users together", "NUMBER/PERIOD,...")
    budget: str | None = _spending(
        None, f"dollars that all users may spend together; {NEEDS_PRICES}", "DOLLARS/PERIOD,..."
    )
    count: str = _spending(
        CALLS,
        f"how many jobs a paid call counts as: one ({CALLS}), or its estimated units ({UNITS})",
        "WHAT",
        str.lower,
    )
    prices: str | Mapping[str, Any] | None = _spending(
        None, "TOML file with the price of a unit for patterns of endpoints; the first that matches counts", "FILE"
    )
    input_units: Callable[[Any, Any], Any] | None = _spending(  # noqa: RUF009  (it is a field)
        None,
        "function that is given target and parsed input of a paid call, and whose result is its estimated units",
        "MODULE:FUNCTION",
        as_function,
    )
    check_input: Callable[[Any, Any, bytes], Any] | None = _spending(  # noqa: RUF009  (it is a field)
        None,
        "function that is given handler, target and body of a paid call, and may refuse it with HTTPError",
        "MODULE:FUNCTION",
        as_function,
    )
    plans: Mapping[str, Mapping[str, Any]] | None = None
    store: str | None = _spending(
        None,
        "where to count: sqlite:PATH, redis://HOST, rediss://HOST, or memory for one process; "
        "by default a file in the folder for state",
        "STORE",
        secret=True,  # it may have a password
    )
    on_store_failure: str = _spending(
        REFUSE, f"what to do with paid calls while the store fails: {REFUSE} or {ALLOW}", "WHAT", str.lower
    )
    own_jobs_only: bool = _spending(False, "give status and result of a queued job only to its user", "")
    tag_users: bool = _spending(False, "send the user's id to fal as x-fal-tags, or a hash of it", "")
    job_lifetime_s: int = _spending(
        DEFAULT_JOB_LIFETIME_S, "time after which a job counts as finished that was not seen to end", "SECONDS"
    )
    account_days: int = _spending(DEFAULT_ACCOUNT_DAYS, "days for which is kept who spent what", "DAYS")

    def __post_init__(self) -> None:
        for name in _LISTS:
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | tuple):
                object.__setattr__(self, name, tuple(value))  # hashable, and not shared with the operator's code
        for name in _TABLES:
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        if problems := list(self._problems()):
            raise ConfigError(problems)

    def _problems(self) -> list[str]:
        problems = []
        if self.key is not None and (not isinstance(self.key, str) or not KEY_CHARACTERS.fullmatch(self.key)):
            problems.append("key: must be printable ASCII without spaces, as shown on fal's page of keys")
        for name in ("connect_timeout_s", "idle_timeout_s"):
            value = getattr(self, name)
            if not _is_number(value) or not MIN_S <= value <= MAX_S:
                problems.append(f"{name}: must be a number of seconds from {MIN_S} to {MAX_S}, not {value!r}")
        for name in ("max_body_bytes", "max_in_flight", "response_buffer_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_NUMBER:
                problems.append(f"{name}: must be a whole number from 1 to {MAX_NUMBER}, not {value!r}")
        value = self.max_buffered_bytes
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < MIN_BUFFERED_BYTES):
            problems.append(f"max_buffered_bytes: must be a whole number from {MIN_BUFFERED_BYTES} on, not {value!r}")
        if self.ca_certs is not None:
            problems.extend(_unreadable("ca_certs", self.ca_certs))
        if problem := connect_to_problem(self.connect_to, failover=self.failover):
            problems.append(f"connect_to: {problem}")
        order = [field.name for field in fields(self)]
        problems.extend(self._problems_of_rules())
        return sorted(problems, key=lambda problem: order.index(problem.partition(":")[0]))

    def _problems_of_rules(self) -> list[str]:
        problems = []
        if type(self.max_token_expiration_s) is not int or not 1 <= self.max_token_expiration_s <= MAX_S:
            value = self.max_token_expiration_s
            problems.append(f"max_token_expiration_s: must be a whole number from 1 to {MAX_S}, not {value!r}")
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                problems.append(f"{name}: must be True or False (as text: yes or no), not {value!r}")
        for name in _FUNCTIONS:
            value = getattr(self, name)
            if value is not None and not callable(value):
                problems.append(f"{name}: must be a function, not {value!r}")
        for rules in ("access", "headers", "withheld", "cors", "spending"):
            try:
                getattr(self, rules)
            except ConfigError as exc:
                problems.extend(exc.problems)
        return problems

    @cached_property
    def access(self) -> AccessRules | None:
        """Return the rules on who may call what; None where no rule is set."""
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
        """Return the rules on which pages of other origins may call; None where CORS is off."""
        return cors_rules(
            self.allowed_origins,
            allow_credentials=self.allow_credentials,
            allow_cancel=self.allow_cancel,
            exposes_limits=any(getattr(self, name) is not None for name in _LIMITS),
            expose_headers=self.expose_headers,
        )

    @cached_property
    def headers(self) -> HeaderRules | None:
        """Return the rules on fal's own headers in requests; None where no rule is set."""
        return header_rules(
            allowed_fal_headers=self.allowed_fal_headers,
            set_fal_headers=self.set_fal_headers,
            restricts_endpoints=self.allowed_endpoints is not None,
            restricts_webhooks=self.allowed_webhooks is not None,
            tags_users=self.tag_users is True,
        )

    @cached_property
    def withheld(self) -> frozenset[str]:
        """Return the names of fal's response headers that clients do not get."""
        return header_names("withhold_headers", self.withhold_headers)

    @cached_property
    def spending(self) -> SpendingRules | None:
        """Return the rules on who may spend how much; None where no option of spending is set."""
        return spending_rules(vars(self))

    def any_key(self) -> str | None:
        """Return the key of the configuration, else the one that the environment has now."""
        return self.key or key_from_env(os.environ)

    def authorization(self) -> bytes:
        """Return the header line that authorizes a call with :meth:`any_key`. Raise KeyMissing."""
        key = self.any_key()
        if key is None:
            raise KeyMissing("no key: set FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or ProxyConfig(key=...)")
        return authorization_line(key, "the key in the environment")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> ProxyConfig:
        """Read ``FAL_KEY``, or the file ``FAL_KEY_FILE``, and the ``FAL_PROXY_<FIELD>`` variables of the environment.

        The file is read now, and not again. Raise ConfigError, also for a ``FAL_PROXY_`` variable that is unknown: a
        rule whose name is misspelled would leave everything open.
        """
        environ = os.environ if environ is None else environ
        problems = unknown_variables(environ)
        for name in ("CONFIG", "ENV_FILE"):  # limits that nobody reads would limit nobody
            if environ.get(ENV_PREFIX + name):
                problems.append(f"{ENV_PREFIX}{name}: only the command reads it; give the options to ProxyConfig")
        texts = {known.name: environ.get(ENV_PREFIX + known.name.upper()) for known in relay_options()}
        key = None
        try:
            key = configured_key(environ)
        except ConfigError as exc:
            problems.extend(exc.problems)
        try:
            config = cls.from_texts(texts, key=key)
        except ConfigError as exc:
            raise ConfigError([*problems, *exc.problems]) from None
        if problems:
            raise ConfigError(problems)
        return config

    @classmethod
    def from_texts(
        cls, texts: Mapping[str, str | None], *, key: str | None, more: Mapping[str, Any] = MappingProxyType({})
    ) -> ProxyConfig:
        """Make the configuration whose fields are given as text, as options and variables are. Raise ConfigError.

        None stands for a field's default, and so does an empty text: a deployment unsets X by ``FAL_PROXY_X=``.
        ``more`` are values of fields that have no text.
        """
        values = dict(more)
        problems: list[str] = []
        for known in relay_options():
            if text := texts.get(known.name):
                try:
                    values[known.name] = known.metadata["parse"](text)
                except ValueError as exc:
                    problems.append(f"{known.name}: {exc}")
        try:
            config = cls(key=key, **values)
        except ConfigError as exc:
            raise ConfigError([*problems, *exc.problems]) from None
        if problems:
            raise ConfigError(problems)
        return config


def relay_options() -> tuple[Any, ...]:
    """Return the dataclass fields that are options of the command: all but the key, which must never stand in argv."""
    return tuple(known for known in fields(ProxyConfig) if known.metadata)


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a problem for each variable whose name begins as ours do and is none of ours."""
    options = [*SERVICE_OPTIONS, *(known.name for known in relay_options())]
    known = {name: ENV_PREFIX + name for name in map(str.upper, options)}
    meant = known | {name.removeprefix("FAL_"): name for name in ("FAL_KEY", "FAL_KEY_FILE", "FAL_KEY_ID")}
    problems = []
    for name in sorted(environ):
        match = _OUR_VARIABLE.fullmatch(name)
        if match is None or name in known.values() or _SERVICE_LINK.fullmatch(name):
            continue
        near = get_close_matches(match[1].upper(), meant, n=1)
        hint = f", did you mean {meant[near[0]]}?" if near else "; docs/reference.md lists the variables"
        problems.append(f"unknown variable {excerpt(name)}{hint}")
    return problems


def _frozen(value: Any) -> Any:
    """Return a mapping as a tuple of pairs, and a list as a tuple, which can be hashed and not be changed later."""
    if isinstance(value, Mapping):
        return tuple((name, _frozen(entry)) for name, entry in value.items())
    return tuple(value) if isinstance(value, list) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unreadable(name: str, path: object) -> list[str]:
    """Return the problems of a PEM file of CA certificates, as a list that is empty when there is none."""
    if not isinstance(path, str | os.PathLike):
        return [f"{name}: must be the path of a PEM file, not {path!r}"]
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # would hang here, or be empty for libcurl
            return [f"{name}: {os.fspath(path)!r} is no regular file"]
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(os.fspath(path))
    except ssl.SSLError:
        return [f"{name}: {os.fspath(path)!r} holds no PEM certificates"]
    except (OSError, ValueError) as exc:  # ValueError: a path with a NUL, or one that the file system cannot encode
        return [f"{name}: cannot read {os.fspath(path)!r}: {getattr(exc, 'strerror', exc)}"]
    return []
