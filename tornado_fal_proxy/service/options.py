"""The command's options: arguments, environment and files in, one frozen and checked :class:`Settings` out.

Strategy. An option is a text, wherever it was written: as an argument, as a variable ``FAL_PROXY_<NAME>`` of the
environment or of a file, or as a key of the file of options. The first place of these in which it stands wins. A wrong
option ends the start with a line that names what to change as it was written, never with a traceback. This module does
not listen, fork or log.

The key is no option, because everyone on the machine can read an argument list.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tornado_fal_proxy.config import ENV_PREFIX, ProxyConfig, unknown_variables
from tornado_fal_proxy.credentials import KEY_VARIABLES, configured_key, looks_like_key
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.rules.trusted_proxies import TrustedProxies
from tornado_fal_proxy.service.arguments import Parser, make_parser, option_name, unknown_arguments
from tornado_fal_proxy.service.config_file import KEY_FILE, ConfigFile, read_config_file
from tornado_fal_proxy.service.env_file import Environment, environment, misspelled_key
from tornado_fal_proxy.service.settings import DEFAULT_PROCESSES, Settings, all_options, service_options
from tornado_fal_proxy.service.user_header import UserHeader

__all__ = ["config_file", "log_format_of", "parse_settings"]

# The options that limit what is spent.
LIMITS = ("jobs_per_user", "unfinished_jobs_per_user", "budget_per_user", "jobs", "budget")
# The price in dollars of a picture of the sandbox, where nobody names one: about that of a picture of fal's.
SANDBOX_PRICE = "0.025"


def parse_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Return the settings that arguments and environment ask for. Raise ConfigError, which names every problem.

    ``--help`` and ``--version`` print and raise SystemExit, as argparse does.
    """
    parser = make_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ConfigError([unknown_arguments(unknown, parser)])
    given = vars(arguments)
    variables = environment(given["env_file"], environ)
    file = config_file(given["config"], variables.variables)
    texts, places = _texts(given, variables, file)
    values, problems = _parsed(texts)
    problems.extend(unknown_variables(environ))
    problems.extend(_problems_together(values, texts))
    more, relay = _more(file, values, texts), None
    with_key = _with_key_file(variables.variables, file, places)
    try:
        relay = _relay_config(texts, more, with_key, values.get("sandbox", False), misspelled_key(variables))
    except ConfigError as exc:
        problems.extend(exc.problems)
    if problems or file.problems:
        problems = [*file.problems, *(_in_place(problem, places, file) for problem in problems)]
        raise ConfigError([_without_keys(problem, texts.values()) for problem in problems])
    read = (variables.path, file.path, with_key.get("FAL_KEY_FILE"), texts["prices"])
    return Settings(**values, relay=relay, texts=texts, more=more, files=tuple(filter(None, read)))


def _with_key_file(environ: Mapping[str, str], file: ConfigFile, places: dict[str, str]) -> Mapping[str, str]:
    """Return the variables with the file of the key that the file of options names, if no variable has a key."""
    if file.key_file is None or any(environ.get(name, "").strip() for name in KEY_VARIABLES):
        return environ
    places["FAL_KEY_FILE"] = file.place(KEY_FILE)
    return {**environ, "FAL_KEY_FILE": file.key_file}


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


def config_file(argument: str | None, environ: Mapping[str, str]) -> ConfigFile:
    """Return the options in the file that is named, if one is. Raise ConfigError, which says who has named it."""
    variable = ENV_PREFIX + "CONFIG"
    path = environ.get(variable) if argument is None else argument
    if not path:
        return ConfigFile()
    forms = {entry.name: entry.metadata["form"] for entry in all_options() if entry.name not in ("config", "env_file")}
    try:
        return read_config_file(path, forms)
    except ConfigError as exc:
        place = variable if argument is None else "--config"
        raise ConfigError([problem.replace("config", place, 1) for problem in exc.problems]) from None


def _texts(
    given: Mapping[str, str | None], environ: Environment, file: ConfigFile
) -> tuple[dict[str, str | None], dict[str, str]]:
    """Return the text of each option, and the places of those that are not in the file of options.

    An empty variable counts as none, and lifts no limit that the file has. An empty argument does.
    """
    texts: dict[str, str | None] = {}
    places = {name: environ.places.get(name, name) for name in KEY_VARIABLES}
    places["key"] = places["FAL_KEY"]
    for name, argument in given.items():
        variable = ENV_PREFIX + name.upper()
        if argument is not None:
            texts[name], places[name] = argument, option_name(name)
        elif environ.variables.get(variable):
            texts[name], places[name] = environ.variables[variable], environ.places.get(variable, variable)
        else:
            texts[name] = file.texts.get(name)
            if name not in file.texts and name not in file.tables:
                places[name] = option_name(name)
    return texts, places


def log_format_of(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return the format of the log, also where other options are wrong: an error is a line of the log too."""
    parser = Parser(add_help=False, allow_abbrev=False)
    for name in ("log_format", "config", "env_file"):
        parser.add_argument(option_name(name))
    try:
        given = parser.parse_known_args(argv)[0]
    except ConfigError:  # an option without a value
        given = argparse.Namespace(log_format=None, config=None, env_file=None)
    variables, file = Environment(environ), ConfigFile()
    with suppress(ConfigError):
        variables = environment(given.env_file, environ)
    with suppress(ConfigError):
        file = config_file(given.config, variables.variables)
    return str(_texts({"log_format": given.log_format}, variables, file)[0]["log_format"] or "").lower()


def _parsed(texts: Mapping[str, str | None]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the service's own options that are given, and the problems. An empty text is none."""
    values, problems = {}, []
    for entry in service_options():
        if text := texts[entry.name]:
            try:
                values[entry.name] = entry.metadata["parse"](text)
            except ValueError as exc:
                problems.append(f"{entry.name}: {exc}")
    return values, problems


def _relay_config(
    texts: Mapping[str, str | None], more: Mapping[str, Any], environ: Mapping[str, str], sandbox: bool, hint: str
) -> ProxyConfig | None:
    """Return the settings of the relay; None in sandbox mode, where they are only checked.

    Raise ConfigError, with ``hint`` where there is no key.
    """
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
                no_key = "no key: set FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or FAL_KEY_FILE (or try --sandbox)"
                problems = [f"{no_key}; {hint}" if hint else no_key]
        except ConfigError as exc:
            problems.extend(exc.problems)
    try:
        config = ProxyConfig.from_texts(texts, key=key, more=more)
    except ConfigError as exc:
        problems.extend(exc.problems)
    if problems:
        raise ConfigError(problems)
    return None if sandbox else config


def _without_keys(problem: str, texts: Iterable[str | None]) -> str:
    """Return a problem without the texts that may be the key, put in the place of another option by a slip."""
    for text in texts:
        if text and text.count(":") == 1 and looks_like_key(text):  # an address has more colons
            problem = problem.replace(text.strip(), "***")
    return problem


def _in_place(problem: str, places: Mapping[str, str], file: ConfigFile) -> str:
    """Return a problem that begins with a field's name with the place in its stead where that was written."""
    name, colon, rest = problem.partition(": ")
    if name in places:
        return f"{places[name]}{colon}{rest}"
    return file.in_place(problem) if name in file.texts or name in file.tables else problem
