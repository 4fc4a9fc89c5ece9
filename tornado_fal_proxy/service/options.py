"""The command's options: arguments and environment in, one frozen and checked :class:`Settings` out.

Strategy. Every option is a text from the command line or from ``FAL_PROXY_<NAME>``, checked in one place, so that a
wrong one ends the start with a line that says what to change and never with a traceback. Nothing here listens, forks or
logs.

The key is no option: an argument list is for everyone on the machine to read.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.callers import TrustedProxies
from tornado_fal_proxy.config import (
    DEFAULT_ROUTE,
    EMPTY_LIST,
    ENV_PREFIX,
    FALSE,
    MOST_S,
    TRUE,
    ProxyConfig,
    as_list,
    key_from,
    key_from_file,
    relay_options,
)
from tornado_fal_proxy.errors import ConfigError

__all__ = ["PROGRAM", "Settings", "parse_settings"]

PROGRAM = "tornado-fal-proxy"

# Only this machine: who exposes a paid key to the world should say so.
DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORT = 8080
NO_PORT = "none"
DEFAULT_LOG_LEVEL = "info"
DEFAULT_LOG_FORMAT = "text"
TAKEN_ROUTES = ("/", "/healthz")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
# The options that say who may call what; the others say how a call is relayed.
ACCESS_OPTIONS = (
    *("allowed_endpoints", "allow_uploads", "max_token_expiration_s", "allowed_hosts", "allow_cancel"),
    *("allowed_webhooks", "authorize", "resolve_key", "allowed_origins", "allow_credentials"),
)
# The sandbox, and whoever embeds nothing else in the process, needs no more; a worker for each core is --processes=0.
DEFAULT_PROCESSES = 1
MOST_PROCESSES = 256
# What Kubernetes gives a pod, and longer than most models run. Endless streams are cut after it.
DEFAULT_DRAIN_TIMEOUT_S = 30.0

_OPTION = re.compile(r"--[a-z-]+(?==|\Z)")
_PORT = re.compile(r"[0-9]{1,5}")
_ROUTE = re.compile(r"/[A-Za-z0-9._~/-]*")
_PROCESSES = re.compile(r"[0-9]{1,3}")
_SECONDS = re.compile(r"[0-9]{1,5}(\.[0-9]{1,9})?")

# The options that are no field of ProxyConfig, with what an empty or missing text stands for.
_DEFAULTS = {
    "address": DEFAULT_ADDRESS,
    "port": str(DEFAULT_PORT),
    "route": DEFAULT_ROUTE,
    "processes": str(DEFAULT_PROCESSES),
    "drain_timeout_s": str(DEFAULT_DRAIN_TIMEOUT_S),
    "log_level": DEFAULT_LOG_LEVEL,
    "log_format": DEFAULT_LOG_FORMAT,
    "trusted_proxies": EMPTY_LIST,
    "admin_address": DEFAULT_ADDRESS,
    "admin_port": NO_PORT,
    "sandbox": "no",
}
# Which texts they may have, and how to say so. The address is for the operating system to judge.
_RULES: dict[str, tuple[Callable[[str], bool], str]] = {
    "port": (lambda text: _is_port(text), "a number from 0 to 65535"),
    "admin_port": (lambda text: text == NO_PORT or _is_port(text), f"a number from 0 to 65535, or {NO_PORT}"),
    "route": (
        lambda text: bool(_ROUTE.fullmatch(text)) and text not in TAKEN_ROUTES,
        f"a path such as {DEFAULT_ROUTE}, and none of {', '.join(TAKEN_ROUTES)}",
    ),
    "processes": (
        lambda text: bool(_PROCESSES.fullmatch(text)) and int(text) <= MOST_PROCESSES,
        f"a number from 0 to {MOST_PROCESSES}",
    ),
    "drain_timeout_s": (
        lambda text: bool(_SECONDS.fullmatch(text)) and float(text) <= MOST_S,
        f"a number of seconds from 0 to {MOST_S}",
    ),
    "log_level": (lambda text: text.lower() in LOG_LEVELS, f"one of {', '.join(LOG_LEVELS)}"),
    "log_format": (lambda text: text.lower() in LOG_FORMATS, f"one of {', '.join(LOG_FORMATS)}"),
    "sandbox": (lambda text: text.lower() in TRUE + FALSE, f"one of {', '.join(TRUE + FALSE)}"),
}


def _is_port(text: str) -> bool:
    return bool(_PORT.fullmatch(text)) and int(text) < 65_536


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the service does, checked. ``config`` is None in sandbox mode, where the sandbox decides it.

    ``processes`` is how many serve, at least one. ``admin_port`` is None where there is none.
    """

    address: str
    port: int
    route: str
    processes: int
    drain_timeout_s: float
    log_level: str
    log_format: str
    trusted_proxies: TrustedProxies
    admin_address: str
    admin_port: int | None
    sandbox: bool
    config: ProxyConfig | None
    texts: Mapping[str, str | None]


def _cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Parser(argparse.ArgumentParser):
    """One line on stderr and exit code 2, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def _parser() -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="A proxy for fal.ai: adds the key in FAL_KEY (or FAL_KEY_ID and FAL_KEY_SECRET, or the file "
        "FAL_KEY_FILE) to calls of fal's clients and relays them.",
        epilog=f"Every option is also an environment variable: --max-in-flight is {ENV_PREFIX}MAX_IN_FLIGHT. "
        "An option wins over its variable.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")

    def add(group: Any, name: str, help: str, metavar: str, default: object) -> None:
        text = help if default is None else f"{help} (default: {default})"
        group.add_argument("--" + name.replace("_", "-"), metavar=metavar, help=text)

    def add_switch(group: Any, name: str, help: str) -> None:
        group.add_argument("--" + name.replace("_", "-"), action="store_const", const="1", help=f"{help} (default: no)")

    listen = parser.add_argument_group("listening")
    add(listen, "address", "address or host name to listen on", "ADDRESS", DEFAULT_ADDRESS)
    add(listen, "port", "port to listen on; 0 takes a free one", "PORT", DEFAULT_PORT)
    add(listen, "route", "path that the clients' proxyUrl names", "PATH", DEFAULT_ROUTE)
    relay = parser.add_argument_group("relaying")
    access = parser.add_argument_group("access", "lists are separated by commas; README.md, 'Secure it', explains them")
    for option in relay_options():
        group = access if option.name in ACCESS_OPTIONS else relay
        if option.default is False:
            add_switch(group, option.name, option.metadata["help"])
        else:
            add(group, option.name, option.metadata["help"], option.metadata["metavar"], option.default)
    processes = parser.add_argument_group("processes")
    add(processes, "processes", "processes that serve; 0 starts one for each core", "NUMBER", DEFAULT_PROCESSES)
    add(
        processes,
        "drain_timeout_s",
        "time that calls in flight get when the service ends, before they are cut",
        "SECONDS",
        DEFAULT_DRAIN_TIMEOUT_S,
    )
    watch = parser.add_argument_group("watching")
    add(watch, "log_level", "least level to log: " + ", ".join(LOG_LEVELS), "LEVEL", DEFAULT_LOG_LEVEL)
    add(watch, "log_format", "how to log: " + ", ".join(LOG_FORMATS), "FORMAT", DEFAULT_LOG_FORMAT)
    add(
        watch,
        "trusted_proxies",
        "proxies in front whose X-Forwarded-For is believed: addresses, networks, unix for a socket file",
        "ADDRESS,...",
        None,
    )
    add(watch, "admin_port", "port for /metrics, /readyz and /healthz; 0 takes a free one", "PORT", NO_PORT)
    add(watch, "admin_address", "address for these", "ADDRESS", DEFAULT_ADDRESS)
    other = parser.add_argument_group("other")
    other.add_argument(
        "--sandbox",
        action="store_const",
        const="1",
        help="relay to a stand-in for fal on this machine: needs neither key nor network; / shows a page to try it",
    )
    return parser


def parse_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """The settings that options and environment ask for. Raises ConfigError, naming every problem.

    ``--help`` and ``--version`` print and raise SystemExit, as argparse does.
    """
    options, unknown = _parser().parse_known_args(argv)
    if unknown:
        # Only their names: somebody may have tried to pass the key.
        names = [match[0] if (match := _OPTION.match(text)) else "an argument" for text in unknown]
        raise ConfigError([f"unknown: {', '.join(names)}; --help shows what there is (the key is read from FAL_KEY)"])
    texts: dict[str, str | None] = {
        name: environ.get(ENV_PREFIX + name.upper()) if value is None else value
        for name, value in vars(options).items()
    }
    own = {name: texts[name] or default for name, default in _DEFAULTS.items()}
    problems = [
        f"{name}: must be {form}, not {own[name]!r}" for name, (holds, form) in _RULES.items() if not holds(own[name])
    ]
    sandbox = own["sandbox"].lower() in TRUE
    processes = (int(own["processes"]) or _cores()) if _RULES["processes"][0](own["processes"]) else 1
    if sandbox and processes > 1:
        problems.append("processes: the sandbox runs in one")
    trusted, config = TrustedProxies(), None
    try:
        trusted = TrustedProxies(as_list(own["trusted_proxies"]))
    except ValueError as exc:
        problems.append(f"trusted_proxies: {exc}")
    try:
        config = _relay_config(texts, environ, sandbox)
    except ConfigError as exc:
        problems.extend(exc.problems)
    if problems:
        raise ConfigError([_in_options(problem) for problem in problems])
    return Settings(
        address=own["address"],
        port=int(own["port"]),
        route=own["route"],
        processes=processes,
        drain_timeout_s=float(own["drain_timeout_s"]),
        log_level=own["log_level"].lower(),
        log_format=own["log_format"].lower(),
        trusted_proxies=trusted,
        admin_address=own["admin_address"],
        admin_port=None if own["admin_port"] == NO_PORT else int(own["admin_port"]),
        sandbox=sandbox,
        config=config,
        texts=texts,
    )


def _relay_config(texts: Mapping[str, str | None], environ: Mapping[str, str], sandbox: bool) -> ProxyConfig | None:
    """The part of the settings that is the proxy's; in sandbox mode it is checked only. Raises ConfigError."""
    problems: list[str] = []
    key = None
    if sandbox:
        set_by_it = [name for name in ("ca_certs", "connect_to") if texts[name]]
        problems = [f"{name}: the sandbox sets it" for name in set_by_it]
        texts = {**texts, **dict.fromkeys(set_by_it)}
    else:
        try:
            key = key_from(environ) or key_from_file(environ)
            if key is None and not texts["resolve_key"]:
                problems = ["no key: set FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or FAL_KEY_FILE (or try --sandbox)"]
        except ConfigError as exc:
            problems.extend(exc.problems)
    try:
        config = ProxyConfig.from_texts(texts, key=key)
    except ConfigError as exc:
        problems.extend(exc.problems)
    if problems:
        raise ConfigError(problems)
    return None if sandbox else config


def _in_options(problem: str) -> str:
    """A problem that begins with a field's name, with the option's name instead."""
    return re.sub(r"\A[a-z_]+(?=: )", lambda name: "--" + name[0].replace("_", "-"), problem).replace(
        "--key:", "FAL_KEY:"
    )
