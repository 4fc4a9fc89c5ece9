"""Make dataclass fields that are options too, and the values of their texts.

Strategy. An option is a field whose metadata has its help, its unit and a parser. A parser returns the value of a text,
or raises ValueError with what is allowed. A parser may also return the text itself, which the check of the field then
refuses by name.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import field
from functools import partial
from operator import attrgetter
from types import ModuleType
from typing import Any

__all__ = [
    "EMPTY_LIST",
    "FALSE",
    "LIST",
    "NUMBER",
    "SWITCH",
    "TEXT",
    "TRUE",
    "as_function",
    "as_list",
    "as_number",
    "option",
]

# The texts of a switch, and of a list that is set but empty.
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
EMPTY_LIST = "none"
# The forms of an option's value in a file that has types.
FORMS = SWITCH, NUMBER, LIST, TEXT = ("switch", "number", "list", "text")


def as_list(text: str) -> tuple[str, ...]:
    """Return the texts between commas, without white space around them; an empty tuple for ``none``."""
    return () if text.strip().lower() == EMPTY_LIST else tuple(item.strip() for item in text.split(","))


def _switch(text: str) -> Any:
    return True if text.lower() in TRUE else False if text.lower() in FALSE else text


def as_function(text: str) -> Any:
    """Import what ``package.module:function`` names. Raise ValueError, with the reason."""
    module, colon, name = text.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"must be package.module:function, not {text!r}")
    found = None
    try:
        found = importlib.import_module(module)
        return attrgetter(name)(found)
    except (AttributeError, ImportError, SyntaxError) as exc:
        where = _where(found, exc, module)
        raise ValueError(f"cannot import {text!r}: {type(exc).__name__}: {exc}{where}") from exc
    except (Exception, SystemExit) as exc:  # noqa: BLE001  (the module may raise anything, with a key in its text)
        frame = traceback.extract_tb(exc.__traceback__)[-1]
        place = f"in {frame.filename!r} line {frame.lineno}"
        raise ValueError(f"cannot import {text!r}: {type(exc).__name__} {place}") from None


def _where(found: ModuleType | None, exc: Exception, module: str) -> str:
    """Return where a function was looked for: the file of its module, or the places that have no such module."""
    if found is not None:
        return f" (in {found.__file__!r})" if getattr(found, "__file__", None) else ""
    if not isinstance(exc, ModuleNotFoundError) or not f"{module}.".startswith(f"{exc.name}."):
        return ""  # the module was found, and another that it needs was not
    with suppress(OSError):  # a working directory that was removed
        if (here := os.getcwd()) in map(os.path.abspath, sys.path):  # an empty entry is the working directory too
            return f" (neither in the working directory {here!r} nor among the installed packages)"
    return " (not among the installed packages)"


def as_number(text: str, kind: Callable[[str], Any]) -> Any:
    """Return ``text`` as a number, or unchanged when it is none: the check then names it."""
    try:
        return kind(text)
    except ValueError:
        return text


_PARSERS: dict[type, Callable[[str], Any]] = {
    bool: _switch,
    int: partial(as_number, kind=int),
    float: partial(as_number, kind=float),
}


def option(
    default: Any,
    help: str,
    metavar: str = "",
    parse: Callable[[str], Any] | None = None,
    *,
    group: str = "relaying",
    secret: bool = False,
    form: str = "",
) -> Any:
    """Return a dataclass field that is also an option of the command.

    ``parse`` makes its value of a text, and is by default the parser of the default's type. ``group`` is the heading in
    ``--help``. A ``secret`` value is in no repr. ``form`` is that of the value in a file, one of FORMS, and by default
    the form of what the parser returns.
    """
    form = form or _form(default, metavar, parse)
    metadata = {"help": help, "metavar": metavar, "parse": parse or _PARSERS.get(type(default), str), "group": group}
    return field(default=default, repr=not secret, metadata=metadata | {"form": form})


def _form(default: Any, metavar: str, parse: Callable[[str], Any] | None) -> str:
    if isinstance(default, bool):
        return SWITCH
    if isinstance(default, int | float) or (isinstance(parse, partial) and parse.func is as_number):
        return NUMBER
    # A text with commas that no parser divides is one for the rules, such as 5/minute,20/day.
    return LIST if parse is not None and metavar.endswith(",...") else TEXT
