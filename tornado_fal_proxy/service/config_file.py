"""Read the options of the command from a TOML file.

Strategy. A key is the name of an option as in the environment, without the prefix and in small letters. Its value has
the type that TOML has for it, and becomes the text that an argument would be, so one parser and one check serve
arguments, variables and files. The tables ``[plans.NAME]`` and ``[prices]`` have no text and stay as they are. The key
for fal never stands here, because such a file is for many eyes.

Every problem names the file, and the line where its key stands if the key begins a line. No problem of this module
shows a value.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, BinaryIO

from tornado_fal_proxy.credentials import looks_like_key
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.option_fields import EMPTY_LIST, LIST, NUMBER, SWITCH, TEXT
from tornado_fal_proxy.rules.excerpt import excerpt

__all__ = ["KEY_FILE", "MAX_BYTES", "ConfigFile", "read_config_file", "read_text"]

# Limits the file: thousands of prices fit.
MAX_BYTES = 1024 * 1024
TABLES = PLANS, PRICES = ("plans", "prices")
# The key that names the file with the key for fal, as FAL_KEY_FILE does.
KEY_FILE = "fal_key_file"

# Names under which people may try to write the key for fal.
_KEYS = re.compile(r"(?:fal_?)?(?:api_?)?key(?:_?id|_?secret)?|credentials|secret|token", re.IGNORECASE)

_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"\\]*"|'[^']*'""")
_PATH = rf"(?:{_PART.pattern})(?:[ \t]*\.[ \t]*(?:{_PART.pattern}))*"
_HEADER = re.compile(rf"[ \t]*\[[ \t]*({_PATH})[ \t]*\]")
_ASSIGNMENT = re.compile(rf"[ \t]*({_PATH})[ \t]*=")

# The types of TOML's values, and those that an option of each form takes, in the words of a problem.
_TYPES = {bool: "true or false", str: "a text", int: "a number", Decimal: "a number", list: "a list", dict: "a table"}
_FORMS = {
    SWITCH: "true or false",
    NUMBER: "a number",
    LIST: 'a list of texts, such as ["a", "b"]',
    TEXT: "a text in quotes",
}


@dataclass(frozen=True)
class ConfigFile:
    """Hold the options of a file: ``texts`` by name, the ``tables``, and the name of the ``key_file``.

    ``problems`` are those of keys that are no options and of values of another type. They begin with the place.
    """

    path: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    key_file: str | None = None
    problems: tuple[str, ...] = ()
    _lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    def place(self, *keys: str) -> str:
        """Return how a problem names a key, or the key of a table."""
        line = f" line {self._lines[keys]}" if keys in self._lines else ""
        return f"{self.path}{line}: {'.'.join(map(_shown, keys))}"

    def in_place(self, problem: str) -> str:
        """Return a problem that begins with an option, and the keys of a table, with their place instead."""
        name, _, rest = problem.partition(": ")
        keys, entries = [name], self.tables.get(name)
        while isinstance(entries, Mapping):
            # A pattern of prices is quoted in the problem, and stays there.
            found = [key for key in entries if rest.startswith((f"{key}: ", f"{key!r} "))]
            if not found:
                break
            key = max(found, key=len)
            keys.append(key)
            rest, entries = rest.removeprefix(f"{key}: "), entries[key]
        return f"{self.place(*keys)}: {rest}"


def read_config_file(path: str, forms: Mapping[str, str]) -> ConfigFile:
    """Return what the file sets. ``forms`` has the form of each option. Raise ConfigError, unless it is a TOML file."""
    try:
        source = read_text(path)
    except ValueError as exc:
        raise ConfigError([f"config: {exc}"]) from None
    try:
        entries = tomllib.loads(source, parse_float=Decimal)
    except (ValueError, RecursionError) as exc:
        raise ConfigError([f"config: {path!r} is no TOML: {exc}"]) from None
    found = ConfigFile(path, _lines=_lines(source))
    texts: dict[str, str] = {}
    tables: dict[str, Any] = {}
    problems = []
    for name, value in entries.items():
        try:
            if name in TABLES and isinstance(value, dict):
                tables[name] = _table(value, of_tables=name == PLANS)
            elif name == PLANS:
                raise ValueError(f"must be tables such as [plans.free], not {_TYPES.get(type(value), 'a date')}")
            elif name == KEY_FILE or name in forms:
                texts[name] = _text(value, forms.get(name, TEXT))
            else:
                raise ValueError(_unknown(name, [*forms, *TABLES, KEY_FILE]))
        except ValueError as exc:
            problems.append(f"{found.place(name)}: {exc}")
    return ConfigFile(path, texts, tables, texts.pop(KEY_FILE, None), tuple(problems), found._lines)


def read_text(path: str) -> str:
    """Return the text of a file. Nothing blocks, whatever the path names. Raise ValueError, which names the file."""
    try:
        with _open(path) as file:
            source = file.read(MAX_BYTES + 1)
        text = source.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = exc.object.count(b"\n", 0, exc.start) + 1
        raise ValueError(f"{path!r} is not UTF-8 in line {line}") from None
    except (OSError, ValueError) as exc:  # ValueError: a NUL
        if looks_like_key(path):
            raise ValueError("must be the name of a file, and no key") from None
        raise ValueError(f"cannot read {path!r}: {getattr(exc, 'strerror', None) or exc}") from None
    if len(source) > MAX_BYTES:
        raise ValueError(f"{path!r} is longer than {MAX_BYTES} bytes")
    return text


def _open(path: str) -> BinaryIO:
    """Open a regular file. Raise OSError for any other, and never wait for a pipe's other end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, os.strerror(number) if stat.S_ISDIR(mode) else "it is no regular file")
    return open(descriptor, "rb")


def _lines(source: str) -> dict[tuple[str, ...], int]:
    """Return the line of each table and key, with the tables around it, as far as it begins a line."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(source.split("\n"), 1):
        if match := _HEADER.match(line):
            keys = table = _parts(match[1])
        elif match := _ASSIGNMENT.match(line):
            keys = (*table, *_parts(match[1]))
        else:
            continue
        for depth in range(1, len(keys) + 1):
            lines.setdefault(keys[:depth], number)
    return lines


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(path))


def _shown(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", key) else f'"{excerpt(key)}"'


def _unknown(name: str, known: list[str]) -> str:
    """Return the problem of a key that is no option. It never shows a value, because that may be the key for fal."""
    if _KEYS.fullmatch(name):
        return (
            "the key for fal must not stand in this file: set FAL_KEY, or FAL_KEY_FILE, or here fal_key_file to the "
            "path of a file that only the proxy can read"
        )
    near = get_close_matches(name.lower().replace("-", "_").removeprefix("fal_proxy_"), known, n=1)
    return f"unknown, did you mean {near[0]}?" if near else "unknown; --help lists the options"


def _table(table: dict[str, Any], *, of_tables: bool) -> dict[str, Any]:
    """Return a table of the file. Raise ValueError where it must have tables and has something else."""
    for name, value in table.items():
        if of_tables and not isinstance(value, dict):
            raise ValueError(f"{_shown(name)} must be a table such as [plans.free]")
    return table


def _text(value: object, form: str) -> str:
    """Return a value as the text that an argument would be. Raise ValueError where it is not of the option's form."""
    if form == LIST and isinstance(value, list) and all(item and isinstance(item, str) for item in value):
        return ",".join(value) or EMPTY_LIST
    if form == SWITCH and isinstance(value, bool):
        return "yes" if value else "no"
    if form == NUMBER and isinstance(value, int | Decimal) and not isinstance(value, bool):
        return str(value)
    if form == TEXT and isinstance(value, str):
        if not value.strip():
            raise ValueError("must not be empty; leave it out to have none")
        return value
    given = _TYPES.get(type(value), "a date")
    if form == LIST and isinstance(value, list):
        given = "a list of others, or with an empty text"
    raise ValueError(f"must be {_FORMS[form]}, not {given}")
