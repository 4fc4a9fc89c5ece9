"""Read variables from a file, as Docker's ``--env-file`` and systemd's ``EnvironmentFile=`` have them.

Strategy. A line is ``NAME=value``, a comment (``#`` or ``;``) or empty. Docker and systemd differ in escapes and in
lines that go on in the next, so a value is plain, or stands as a whole in quotes; anything else is a problem. Only
``FAL_KEY`` and its like and ``FAL_PROXY_...`` count. A variable of the environment wins, and a key of the environment
wins over every key of the file. No problem shows a value, because that may be the key. Where no key is set, a name that
was meant to be one of the key's is shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from tornado_fal_proxy.config import ENV_PREFIX, unknown_variables
from tornado_fal_proxy.credentials import KEY_VARIABLES
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.rules.excerpt import excerpt
from tornado_fal_proxy.service.config_file import read_text

__all__ = ["Environment", "environment", "misspelled_key"]

VARIABLE = ENV_PREFIX + "ENV_FILE"

_LINE = re.compile(r"""\s*([A-Za-z_][A-Za-z0-9_]*)=[ \t]*(?:"([^"\\]*)"|'([^'\\]*)'|((?!["'])(?:.*[^\\])?))\s*""")
# Names that people give to the variable of the key, with the prefix of a framework or without: FALKEY, FAL_API_KEY,
# FAL_KEYS, VITE_FAL_KEY.
_LIKE_KEY = re.compile(r"(?:[A-Z]+_)*FAL_?(?:AI_?)?(?:API_?)?(?:KEYS?|TOKEN|SECRET)(?:_[A-Z]+)?", re.IGNORECASE)
# Limits how unlike a misspelled name may be: two letters that have changed places, or one too many.
_LIKENESS = 0.85


@dataclass(frozen=True)
class Environment:
    """Hold the variables of the process and of a file. ``places`` is how a problem names a variable of the file.

    ``others`` has the lines of the file's variables that do not count, by their names.
    """

    variables: Mapping[str, str]
    path: str | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)


def environment(argument: str | None, environ: Mapping[str, str]) -> Environment:
    """Return the variables of the process, and behind them those of the file that is named, if one is.

    Raise ConfigError, which names the file and the line.
    """
    path = environ.get(VARIABLE) if argument is None else argument
    if not path:
        return Environment(environ)
    try:
        text = read_text(path)
    except ValueError as exc:
        raise ConfigError([f"{VARIABLE if argument is None else '--env-file'}: {exc}"]) from None
    found, places, others = _parsed(path, text)
    if any(environ.get(name, "").strip() for name in KEY_VARIABLES):
        found = {name: value for name, value in found.items() if name not in KEY_VARIABLES}
    found = {name: value for name, value in found.items() if not environ.get(name)}
    return Environment({**environ, **found}, path, {name: places[name] for name in found}, others)


def misspelled_key(environment: Environment) -> str:
    """Return a hint at a variable that was meant to be one of the key's; an empty text where there is none.

    It has the variable's name, and never the value.
    """
    for name in (*environment.others, *environment.variables):
        if name.startswith(ENV_PREFIX) or name in KEY_VARIABLES:
            continue
        near = get_close_matches(name.upper(), KEY_VARIABLES, n=1, cutoff=_LIKENESS)
        if near or _LIKE_KEY.fullmatch(name):
            place = environment.others.get(name, "the environment")
            return f"{place} has {excerpt(name)}, did you mean {near[0] if near else KEY_VARIABLES[0]}?"
    return ""


def _parsed(path: str, text: str) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Return the variables of a file that count, how a problem names each, and the lines of others by their names.

    Raise ConfigError.
    """
    found: dict[str, str] = {}
    places: dict[str, str] = {}
    others: dict[str, str] = {}
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith(("#", ";")):
            continue
        place = f"{path} line {number}"
        match = _LINE.fullmatch(line)
        if match is None:
            problems.append(f"{place}: must be NAME=value, in one line; quotes only around all of the value")
            continue
        name, value = match[1], (match[2] or match[3] or match[4] or "").rstrip()
        if name == VARIABLE:
            problems.append(f"{place}: {name} cannot stand in such a file")
        problems.extend(f"{place}: {problem}" for problem in unknown_variables({name: value}))
        if name in KEY_VARIABLES or name.startswith(ENV_PREFIX):
            found[name], places[name] = value, f"{place}: {name}"
        else:
            others[name] = place
    if problems:
        raise ConfigError(problems)
    return found, places, others
