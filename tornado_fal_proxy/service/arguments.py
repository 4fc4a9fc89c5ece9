"""The arguments of the command: a parser for them, and the texts of ``--help``.

Strategy. Parser and help are made of the options' fields. A wrong argument raises an error that names what to change;
it never shows the text of an unknown argument, because that may be the key.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.config import ENV_PREFIX
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.rules.trusted_proxies import TrustedProxies
from tornado_fal_proxy.service.settings import PROGRAM, all_options

__all__ = ["Parser", "make_parser", "unknown_arguments"]

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


class Parser(argparse.ArgumentParser):
    """Raises an error instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def make_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="A proxy for fal.ai: adds the key in FAL_KEY (or FAL_KEY_ID and FAL_KEY_SECRET, or the file "
        "FAL_KEY_FILE) to calls of fal's SDKs and relays them.",
        epilog=f"Every option is also an environment variable: --max-in-flight is {ENV_PREFIX}MAX_IN_FLIGHT. "
        "An option wins over its variable. In the file that --config names it is the key max_in_flight.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    for title, description in GROUPS.items():
        group = parser.add_argument_group(title, description)
        for entry in all_options():
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


def unknown_arguments(texts: Sequence[str], parser: Parser) -> str:
    """Return the problem of arguments that are no options. It has only their names, because one may be the key."""
    known = {name.strip("-"): name for action in parser._actions for name in action.option_strings}
    names = []
    for text in texts:
        match = _UNKNOWN_OPTION.match(text)
        near = get_close_matches(match[0].strip("-").replace("_", "-"), known, n=1) if match else []
        hint = f" (did you mean {known[near[0]]}?)" if near else ""
        names.append(f"{match[0]}{hint}" if match else "an argument")
    return f"unknown: {', '.join(names)}; --help shows what there is (the key is read from FAL_KEY)"
