"""The command's options: arguments and environment in, one frozen and checked :class:`Settings` out.

Strategy. Every option is a field, here or of :class:`~tornado_fal_proxy.config.ProxyConfig`, whose metadata has its
help text, its group in ``--help`` and a function that parses and checks its text. The command line, the
``FAL_PROXY_<NAME>`` variables and the error lines are derived from these fields. A wrong option ends the start with a
line that names what to change, never with a traceback. This module does not listen, fork or log.

The key is no option, because everyone on the machine can read an argument list.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, NoReturn

from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.config import (
    DEFAULT_ROUTE,
    ENV_PREFIX,
    ProxyConfig,
    relay_options,
    unknown_variables,
)
from tornado_fal_proxy.credentials import KEY_VARIABLES, configured_key
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.option_fields import NUMBER, option
from tornado_fal_proxy.rules.trusted_proxies import TrustedProxies
from tornado_fal_proxy.service import option_texts
from tornado_fal_proxy.service.config_file import KEY_FILE, ConfigFile, read_config_file
from tornado_fal_proxy.service.user_header import UserHeader, as_user_header

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_DRAIN_TIMEOUT_S",
    "DEFAULT_PORT",
    "PROGRAM",
    "Settings",
    "config_file",
    "log_format_of",
    "parse_settings",
]

PROGRAM = "tornado-fal-proxy"

# The address to listen on: of this machine only, because a paid key is exposed to the world only if somebody asks.
DEFAULT_ADDRESS = "127.0.0.1"
# The port to listen on: the usual one of a service that no user types, and open to programs without privileges.
DEFAULT_PORT = 8080
# The texts that --log-level and --log-format accept, in any case of letters.
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
# The processes that serve: the sandbox, or a first try, needs no more than one.
DEFAULT_PROCESSES = 1
# Limits a drain: the time that Kubernetes gives a pod, and longer than most models run. Endless streams reach it.
DEFAULT_DRAIN_TIMEOUT_S = 30.0
# Limits the time without a heartbeat after which a worker is replaced. Its clients wait for so long, and no sound
# worker takes so long for one turn of its loop, even on a machine that swaps.
DEFAULT_WORKER_TIMEOUT_S = 15.0

# The options that limit what is spent.
LIMITS = ("jobs_per_user", "unfinished_jobs_per_user", "budget_per_user", "jobs", "budget")
# The price in dollars of a picture of the sandbox, where nobody names one: about that of a picture of fal's.
SANDBOX_PRICE = "0.025"

# The groups of ``--help`` in their order, each with its description.
GROUPS = {
    "listening": None,
    "relaying": None,
    "access": "lists are separated by commas; README.md, 'Secure it', explains them",
    "spending": "for paid calls; docs/spending.md explains them",
    "processes": None,
    "watching": None,
    "other": None,
}

_UNKNOWN_OPTION = re.compile(r"--[a-z0-9_-]+(?==|\Z)")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of the service, checked. The fields with metadata are its own options.

    ``processes`` is how many serve, at least one. ``admin_port`` is None if there is none. ``relay`` is None in sandbox
    mode, where the sandbox decides it. ``texts`` has the text of every option, None where none was given, and ``more``
    what else :meth:`ProxyConfig.from_texts` gets.
    """

    address: str = option(DEFAULT_ADDRESS, "address or host name to listen on", "ADDRESS", group="listening")
    port: int = option(
        DEFAULT_PORT, "port to listen on; 0 takes a free one", "PORT", option_texts.port, group="listening"
    )
    route: str = option(
        DEFAULT_ROUTE, "path that fal's SDKs get as proxyUrl", "PATH", option_texts.route, group="listening"
    )
    processes: int = option(
        DEFAULT_PROCESSES,
        "processes that serve; 0 starts one for each core",
        "NUMBER",
        option_texts.processes,
        group="processes",
    )
    drain_timeout_s: float = option(
        DEFAULT_DRAIN_TIMEOUT_S,
        "time that calls in flight get when the service ends, before they are aborted",
        "SECONDS",
        option_texts.seconds,
        group="processes",
    )
    worker_timeout_s: float = option(
        DEFAULT_WORKER_TIMEOUT_S,
        "with several processes: time without a sign of life after which one is killed and replaced; 0: never",
        "SECONDS",
        option_texts.worker_timeout_s,
        group="processes",
    )
    log_level: str = option(
        "info",
        f"lowest level to log: {', '.join(LOG_LEVELS)}",
        "LEVEL",
        option_texts.one_of(*LOG_LEVELS),
        group="watching",
    )
    log_format: str = option(
        "text", f"how to log: {', '.join(LOG_FORMATS)}", "FORMAT", option_texts.one_of(*LOG_FORMATS), group="watching"
    )
    trusted_proxies: TrustedProxies = option(  # noqa: RUF009  (it is a field)
        TrustedProxies(),
        "proxies in front whose X-Forwarded-For is believed: addresses, networks, unix for a socket file",
        "ADDRESS,...",
        option_texts.trusted_proxies,
        group="watching",
    )
    admin_port: int | None = option(
        None,
        f"port for /metrics, /readyz and /healthz; 0 takes a free one (default: {option_texts.NO_PORT})",
        "PORT",
        option_texts.admin_port,
        group="watching",
        form=NUMBER,
    )
    admin_address: str = option(DEFAULT_ADDRESS, "address for these", "ADDRESS", group="watching")
    sandbox: bool = option(
        False,
        "relay to a stand-in for fal on this machine: needs neither key nor network; / shows a page to try it",
        parse=option_texts.switch,
        group="other",
    )
    config: str | None = option(
        None, "TOML file with options, [plans.NAME] and [prices]; arguments and variables win", "FILE", group="other"
    )
    user_header: str | None = option(
        None,
        "header in which a trusted proxy names the user, such as X-Forwarded-User",
        "NAME",
        as_user_header,
        group="spending",
    )
    relay: ProxyConfig | None = None
    texts: Mapping[str, str | None] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


class _Parser(argparse.ArgumentParser):
    """Raises an error instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def _service_options() -> Iterator[Any]:
    return (entry for entry in fields(Settings) if entry.metadata)


def _parser() -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="A proxy for fal.ai: adds the key in FAL_KEY (or FAL_KEY_ID and FAL_KEY_SECRET, or the file "
        "FAL_KEY_FILE) to calls of fal's SDKs and relays them.",
        epilog=f"Every option is also an environment variable: --max-in-flight is {ENV_PREFIX}MAX_IN_FLIGHT. "
        "An option wins over its variable. In the file that --config names it is the key max_in_flight.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    options = [*_service_options(), *relay_options()]
    for title, description in GROUPS.items():
        group = parser.add_argument_group(title, description)
        for entry in options:
            if entry.metadata["group"] == title:
                _add(group, entry)
    return parser


def _add(group: Any, entry: Any) -> None:
    """Add an option to a group of the parser."""
    name, default, text = "--" + entry.name.replace("_", "-"), entry.default, entry.metadata["help"]
    if default is False:
        group.add_argument(name, action="store_const", const="1", help=f"{text} (default: no)")
    else:
        shown = "" if default in (None, TrustedProxies()) else f" (default: {default})"
        group.add_argument(name, metavar=entry.metadata["metavar"], help=text + shown)


def parse_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Return the settings that arguments and environment ask for. Raise ConfigError, which names every problem.

    ``--help`` and ``--version`` print and raise SystemExit, as argparse does.
    """
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ConfigError([_unknown_options(unknown, parser)])
    given = vars(arguments)
    file = config_file(given["config"], environ)
    texts, places = _texts(given, environ, file)
    values, problems = _parsed(texts)
    problems.extend(unknown_variables(environ))
    problems.extend(_problems_together(values, texts))
    more, relay = _more(file, values, texts), None
    if file.key_file is not None and not any(environ.get(name, "").strip() for name in KEY_VARIABLES):
        environ = {**environ, "FAL_KEY_FILE": file.key_file}
        places["FAL_KEY_FILE"] = file.place(KEY_FILE)
    try:
        relay = _relay_config(texts, more, environ, values.get("sandbox", False))
    except ConfigError as exc:
        problems.extend(exc.problems)
    if problems or file.problems:
        raise ConfigError([*file.problems, *(_in_place(problem, places, file) for problem in problems)])
    return Settings(**values, relay=relay, texts=texts, more=more)


def _more(file: ConfigFile, values: Mapping[str, Any], texts: dict[str, str | None]) -> dict[str, Any]:
    """Return values of the relay's fields that have no text, and set the defaults of a sandbox with limits."""
    more: dict[str, Any] = dict(file.tables)
    if texts["prices"] is not None:
        more.pop("prices", None)
    if "user_header" in values:
        more["identify"] = UserHeader(values["user_header"], values.get("trusted_proxies", TrustedProxies()))
    if values.get("sandbox") and ("plans" in more or any(texts[name] for name in LIMITS)):
        # A trial leaves no file behind, and any model has a price.
        texts["store"] = texts["store"] or "memory"
        if texts["prices"] is None:
            more.setdefault("prices", {"**": SANDBOX_PRICE})
    return more


def _problems_together(values: Mapping[str, Any], texts: Mapping[str, str | None]) -> Iterator[str]:
    """Yield the problems of options that cannot stand together."""
    if values.get("processes", DEFAULT_PROCESSES) > 1:
        if values.get("sandbox"):
            yield "processes: the sandbox runs in one"
        if texts["store"] == "memory":
            yield "store: memory counts in one process alone: name a file (sqlite:PATH), or redis://HOST"
    if "user_header" in values:
        trusted = values.get("trusted_proxies")  # None also where it has a problem of its own
        if not texts["trusted_proxies"] or (trusted is not None and not trusted.texts):
            yield "user_header: needs --trusted-proxies, because any client can send a header"
        if texts["identify"]:
            yield "user_header: cannot stand beside --identify, which finds the user too"


def _unknown_options(texts: Sequence[str], parser: _Parser) -> str:
    """Return the problem of arguments that are no options. It has only their names, because one may be the key."""
    known = {name.strip("-"): name for action in parser._actions for name in action.option_strings}
    names = []
    for text in texts:
        match = _UNKNOWN_OPTION.match(text)
        near = get_close_matches(match[0].strip("-").replace("_", "-"), known, n=1) if match else []
        hint = f" (did you mean {known[near[0]]}?)" if near else ""
        names.append(f"{match[0]}{hint}" if match else "an argument")
    return f"unknown: {', '.join(names)}; --help shows what there is (the key is read from FAL_KEY)"


def config_file(argument: str | None, environ: Mapping[str, str]) -> ConfigFile:
    """Return the options in the file that is named, if one is. Raise ConfigError, which says who has named it."""
    variable = ENV_PREFIX + "CONFIG"
    path = environ.get(variable) if argument is None else argument
    if not path:
        return ConfigFile()
    options = [*_service_options(), *relay_options()]
    forms = {entry.name: entry.metadata["form"] for entry in options if entry.name != "config"}
    try:
        return read_config_file(path, forms)
    except ConfigError as exc:
        place = variable if argument is None else "--config"
        raise ConfigError([problem.replace("config", place, 1) for problem in exc.problems]) from None


def _texts(
    given: Mapping[str, str | None], environ: Mapping[str, str], file: ConfigFile
) -> tuple[dict[str, str | None], dict[str, str]]:
    """Return the text of each option, and the places of those that are not in the file.

    An empty variable counts as none, and lifts no limit that the file has. An empty argument does.
    """
    texts: dict[str, str | None] = {}
    places = {"key": "FAL_KEY"}
    for name, argument in given.items():
        variable = ENV_PREFIX + name.upper()
        if argument is not None:
            texts[name], places[name] = argument, _option_of(name)
        elif environ.get(variable):
            texts[name], places[name] = environ[variable], variable
        else:
            texts[name] = file.texts.get(name)
            if name not in file.texts and name not in file.tables:
                places[name] = _option_of(name)
    return texts, places


def _option_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def log_format_of(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return the format of the log, also where other options are wrong: an error is a line of the log too."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--log-format")
    parser.add_argument("--config")
    try:
        given = parser.parse_known_args(argv)[0]
    except ConfigError:  # an option without a value
        given = argparse.Namespace(log_format=None, config=None)
    try:
        file = config_file(given.config, environ)
    except ConfigError:
        file = ConfigFile()
    return str(_texts({"log_format": given.log_format}, environ, file)[0]["log_format"] or "").lower()


def _parsed(texts: Mapping[str, str | None]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the service's own options that are given, and the problems. An empty text is none."""
    values, problems = {}, []
    for entry in _service_options():
        if text := texts[entry.name]:
            try:
                values[entry.name] = entry.metadata["parse"](text)
            except ValueError as exc:
                problems.append(f"{entry.name}: {exc}")
    return values, problems


def _relay_config(
    texts: Mapping[str, str | None], more: Mapping[str, Any], environ: Mapping[str, str], sandbox: bool
) -> ProxyConfig | None:
    """Return the settings of the relay; None in sandbox mode, where they are only checked. Raise ConfigError."""
    problems: list[str] = []
    key = None
    if sandbox:
        set_by_it = [name for name in ("ca_certs", "connect_to") if texts[name]]
        problems = [f"{name}: the sandbox sets it" for name in set_by_it]
        texts = {**texts, **dict.fromkeys(set_by_it)}
    else:
        try:
            key = configured_key(environ)
            if key is None and not texts["resolve_key"]:
                problems = ["no key: set FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or FAL_KEY_FILE (or try --sandbox)"]
        except ConfigError as exc:
            problems.extend(exc.problems)
    try:
        config = ProxyConfig.from_texts(texts, key=key, more=more)
    except ConfigError as exc:
        problems.extend(exc.problems)
    if problems:
        raise ConfigError(problems)
    return None if sandbox else config


def _in_place(problem: str, places: Mapping[str, str], file: ConfigFile) -> str:
    """Return a problem that begins with a field's name with the place in its stead where that was written."""
    name, colon, rest = problem.partition(": ")
    if name in places:
        return f"{places[name]}{colon}{rest}"
    return file.in_place(problem) if name in file.texts or name in file.tables else problem
