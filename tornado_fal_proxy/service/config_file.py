"""Read the options of the command from a TOML file.

Strategy. A key is the name of an option as in the environment, without the prefix and in small letters. Its value
becomes the text that an argument would be, so one parser and one check serve arguments, variables and files. The tables
``[plans.NAME]`` and ``[prices]`` have no text and stay what they are. Every problem names the file, and the line where
its key stands.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, BinaryIO

from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.option_fields import EMPTY_LIST

__all__ = ["ConfigFile", "read_config_file"]

# Limits the file: thousands of prices fit.
MAX_BYTES = 1024 * 1024
TABLES = ("plans", "prices")
# Names under which people may try to write the key, which stands in no file that is read by all.
_KEYS = re.compile(r"(?:fal_?)?key(?:_?id|_?secret)?|credentials|secret|token", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"""\s*(?:\[\s*)?["']?([A-Za-z0-9_-]+)["']?\s*(?:=|\.|\])""")


@dataclass(frozen=True)
class ConfigFile:
    """The options of a file: ``texts`` by name, and the ``tables``. ``lines`` has the line of each name."""

    path: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)

    def place(self, name: str) -> str:
        """Return how a problem names this key."""
        line = f" line {self.lines[name]}" if name in self.lines else ""
        return f"{self.path}{line}: {name}"


def read_config_file(path: str, options: Collection[str]) -> ConfigFile:
    """Return what the file sets. Raise ConfigError, which names every problem, with those of unknown keys."""
    source = _read(path)
    try:
        entries = tomllib.loads(source, parse_float=Decimal)
    except (ValueError, RecursionError) as exc:
        raise ConfigError([f"--config: {path} is no TOML: {exc}"]) from None
    found = ConfigFile(path, lines=_lines(source))
    texts: dict[str, str] = {}
    tables: dict[str, Any] = {}
    problems = []
    for name, value in entries.items():
        try:
            if name in TABLES and isinstance(value, dict):
                tables[name] = value
            elif name not in options:
                raise ValueError(_unknown(name, options))
            else:
                texts[name] = _text(value)
        except ValueError as exc:
            problems.append(f"{found.place(name)}: {exc}")
    if problems:
        raise ConfigError(problems)
    return ConfigFile(path, texts, tables, found.lines)


def _read(path: str) -> str:
    """Return the text of a file. Nothing blocks, whatever the path names."""
    try:
        with _open(path) as file:
            source = file.read(MAX_BYTES + 1)
        text = source.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError([f"--config: {path} is not UTF-8, at byte {exc.start}"]) from None
    except (OSError, ValueError) as exc:  # ValueError: a NUL
        raise ConfigError([f"--config: cannot read {path}: {getattr(exc, 'strerror', None) or exc}"]) from None
    if len(source) > MAX_BYTES:
        raise ConfigError([f"--config: {path} is longer than {MAX_BYTES} bytes"])
    return text


def _open(path: str) -> BinaryIO:
    """Open a regular file. Raise OSError for any other, and never wait for a pipe's other end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file")
    return open(descriptor, "rb")


def _lines(source: str) -> dict[str, int]:
    """Return the line of each key and table, as far as it stands at the beginning of a line."""
    lines: dict[str, int] = {}
    for number, line in enumerate(source.splitlines(), 1):
        if match := _ASSIGNMENT.match(line):
            lines.setdefault(match[1], number)
    return lines


def _unknown(name: str, options: Collection[str]) -> str:
    """Return the problem of a key that is no option. It never shows a value, because that may be the key."""
    if _KEYS.fullmatch(name):
        return "the key belongs into FAL_KEY, or into the file that FAL_KEY_FILE names, and not into this file"
    near = get_close_matches(name.lower().replace("-", "_").removeprefix("fal_proxy_"), [*options, *TABLES], n=1)
    return "is no option" + (f"; did you mean {near[0]}?" if near else "; --help lists them")


def _text(value: object) -> str:
    """Return a value as the text that an argument would be. Raise ValueError."""
    if isinstance(value, list):
        texts = [_text(item) for item in value if not isinstance(item, list)]
        if len(texts) < len(value):
            raise ValueError("must be a list of texts")
        return ",".join(texts) or EMPTY_LIST
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str | int | Decimal):
        return str(value)
    raise ValueError("must be a text, a number, true, false, or a list of texts")
