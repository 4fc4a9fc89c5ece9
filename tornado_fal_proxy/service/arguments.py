"""The arguments of the command: a parser for them, and the texts of ``--help``.

Strategy. Parser and help are made of the options' fields. A wrong argument raises an error that names what to change;
it never shows the text of an unknown argument, because that may be the key.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from textwrap import wrap
from typing import Any, NoReturn

from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.config import ENV_PREFIX
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.rules.trusted_proxies import TrustedProxies
from tornado_fal_proxy.service.settings import PROGRAM, all_options

__all__ = ["COMMANDS", "GROUPS", "Parser", "make_parser", "option_name", "unknown_arguments"]

# The groups of ``--help`` in their order, each with its description.
GROUPS = {
    "listening": "where it listens",
    "relaying": "connections, sizes, times, and headers of calls to fal",
    "access": "who may call what; lists are separated by commas; docs/secure.md explains them",
    "spending": "limits for paid calls; docs/spending.md explains them",
    "processes": "how many serve, and how they end",
    "watching": "the log, and the port for metrics",
    "other": "files of options, and the sandbox",
}
# The commands that stand in place of the first option, each with how to call it.
COMMANDS = {
    "check": ("check [OPTION...]", "say what would be open and limited, and start nothing"),
    "usage": ("usage [--help]", "show who has spent how much"),
    "doctor": ("doctor URL [--help]", "look at a proxy from outside, and say what to change"),
    "completion": ("completion SHELL", "print the completion of options for bash, zsh or fish"),
}
# The columns of the short help.
HELP_COLUMNS = 100

_UNKNOWN_OPTION = re.compile(r"--[a-z0-9_-]+(?==|\Z)")
_WHOLE: Any = {"break_on_hyphens": False, "break_long_words": False}


class Parser(argparse.ArgumentParser):
    """Raises an error instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def _group(text: str) -> str:
    """Return the name of a group. The error has no text, because that may be the key."""
    if text not in GROUPS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(GROUPS)}")
    return text


class _Help(argparse.Action):
    """Print the help of a group, of all groups, or the short one, and end."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print it to stdout."""
        if isinstance(values, str):
            text = make_parser([values]).format_help()
        else:
            text = make_parser().format_help() if option_string == "--help-all" else _short_help()
        parser._print_message(text, sys.stdout)
        parser.exit()


def make_parser(groups: Iterable[str] = GROUPS) -> Parser:
    """Return a parser of the options in these groups, with the help for them."""
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s [OPTION...]",
        allow_abbrev=False,
        add_help=False,
        description="A proxy for fal.ai: adds the key in FAL_KEY (or FAL_KEY_ID and FAL_KEY_SECRET, or the file "
        "FAL_KEY_FILE) to calls of fal's SDKs and relays them.",
        epilog=f"Every option is also an environment variable: --max-in-flight is {ENV_PREFIX}MAX_IN_FLIGHT. "
        "An option wins over its variable. In the file that --config names it is the key max_in_flight.",
    )
    a_group: Any = {"metavar": "GROUP", "nargs": "?", "choices": list(GROUPS), "type": _group}
    parser.add_argument("-h", "--help", action=_Help, help="explain the options of a group", **a_group)
    parser.add_argument("--help-all", action=_Help, nargs=0, help="explain all options")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}", help="print the version")
    for title in groups:
        group = parser.add_argument_group(title, GROUPS[title])
        for entry in all_options():
            if entry.metadata["group"] == title:
                _add(group, entry)
    return parser


def _short_help() -> str:
    """Return the commands, and the names of all options by their groups: less than a screen."""
    usage = {"[OPTION...]": "relay calls of fal's SDKs, with the key in FAL_KEY"}
    usage |= dict(COMMANDS.values())
    lines = [f"{PROGRAM} {call:<19}  {text}" for call, text in usage.items()]
    for title, description in GROUPS.items():
        names = [option_name(entry.name) for entry in all_options() if entry.metadata["group"] == title]
        lines.append(f"\n{title}: {description}")
        lines.extend(wrap(" ".join(names), HELP_COLUMNS, initial_indent="  ", subsequent_indent="  ", **_WHOLE))
    lines.append("\n--help=GROUP explains the options of a group, such as --help=access, and --help-all all of them.")
    lines.append(f"Each is also a variable, --max-in-flight as {ENV_PREFIX}MAX_IN_FLIGHT, over which the option wins.")
    return "\n".join(lines) + "\n"


def option_name(name: str) -> str:
    """Return how an option is written as an argument."""
    return "--" + name.replace("_", "-")


def _add(group: Any, entry: Any) -> None:
    """Add an option to a group of the parser."""
    name, default, text = option_name(entry.name), entry.default, entry.metadata["help"]
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
        word = match[0].strip("-").replace("_", "-") if match else text
        near = get_close_matches(word, known if match else [*COMMANDS, *known], n=1)
        hint = f" (did you mean {known.get(near[0], near[0])}?)" if near else ""
        if text in COMMANDS:
            hint = f" ({text} must stand before all options)"
        names.append(f"{match[0] if match else 'an argument'}{hint}")
    return f"unknown: {', '.join(names)}; --help shows what there is (the key is read from FAL_KEY)"
