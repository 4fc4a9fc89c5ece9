"""The operator's rules on headers: which of fal's own a client may send, which are set, and which stay here.

Strategy. fal's formula relays every ``x-fal-*`` and ``x-app-fal-*`` header, and some of them move results or change
what is checked and kept. Where endpoints are restricted, only those pass that fal's SDKs send by themselves, unless the
operator names others. A header that the operator sets replaces the client's, so the client's is not refused.

Sources: fal's "server-side integration" page, the source of fal's SDKs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tornado_fal_proxy.errors import ConfigError, HeaderNotAllowed, WebhookNotAllowed
from tornado_fal_proxy.rules.excerpt import excerpt
from tornado_fal_proxy.rules.headers import FIELD_NAME, Pairs, is_fals_own

__all__ = ["SDK_HEADERS", "HeaderRules", "as_header_lines", "header_names", "header_rules"]

# The headers that fal's SDKs send by themselves, for options that an app gives them.
SDK_HEADERS = (
    "x-fal-object-lifecycle-preference",
    "x-fal-queue-priority",
    "x-fal-request-timeout",
    "x-fal-runner-hint",
)
# Limits the names that a pattern is held against, and so the time that it takes: no header of fal's is as long.
MAX_NAME_CHARS = 128
# The header that sends a job's results to a bucket of the client's, as fal_webhook sends them to a host.
UPLOAD_POLICY = "x-app-fal-upload-policy"
TAGS = "x-fal-tags"
# The header that the service adds in front of the sandbox. fal does not know it.
SANDBOX_HOST = "x-fal-sandbox-host"
# The headers of a response without which it cannot be read.
_NEEDED = frozenset({"content-type", "content-length", "content-encoding", "transfer-encoding", "connection"})

_PATTERN = re.compile(r"x-(?:app-)?fal-[a-z0-9*-]+|\*")
_NAME = re.compile(FIELD_NAME)
_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
# The comma between two lines. A value may have commas too.
_NEXT_LINE = re.compile(r",(?=\s*x-(?:app-)?fal-[a-z0-9-]+\s*:)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HeaderRules:
    """The rules of one configuration. Only :func:`header_rules` makes one.

    ``lines`` are header lines for fal, and ``names`` their names. None for ``allowed`` restricts nothing.
    """

    allowed: tuple[re.Pattern[str], ...] | None
    names: frozenset[str]
    lines: tuple[bytes, ...]
    upload_policy: bool

    def check(self, headers: Pairs) -> None:
        """Raise HeaderNotAllowed or WebhookNotAllowed unless all of these headers may go to fal."""
        for name, _ in headers:
            if name in self.names or name == SANDBOX_HOST or not is_fals_own(name):
                continue
            if name == UPLOAD_POLICY and not self.upload_policy:
                raise WebhookNotAllowed(f"allowed_webhooks: {UPLOAD_POLICY}")
            if self.allowed is not None and not self._allows(name):
                raise HeaderNotAllowed(f"allowed_fal_headers: {excerpt(name)}")

    def _allows(self, name: str) -> bool:
        assert self.allowed is not None
        return len(name) <= MAX_NAME_CHARS and any(pattern.fullmatch(name) for pattern in self.allowed)

    def without_own(self, headers: Pairs) -> Pairs:
        """Return the client's headers without those that are set."""
        return [pair for pair in headers if pair[0] not in self.names] if self.names else headers


def header_rules(
    *,
    allowed_fal_headers: object,
    set_fal_headers: object,
    restricts_endpoints: bool,
    restricts_webhooks: bool,
    tags_users: bool,
) -> HeaderRules | None:
    """Return the rules for these fields of the configuration, or None where none is set.

    Raise ConfigError, which names every problem.
    """
    problems: list[str] = []
    patterns = _patterns(allowed_fal_headers, problems)
    if patterns is None and restricts_endpoints:
        patterns = SDK_HEADERS
    lines = _lines(set_fal_headers, problems)
    if tags_users and any(name == TAGS for name, _ in lines):
        problems.append(f"set_fal_headers: {TAGS} is set by tag_users")
    if problems:
        raise ConfigError(problems)
    if patterns is None and not lines and not restricts_webhooks:
        return None
    return HeaderRules(
        allowed=None if patterns is None else tuple(re.compile(_expression(text)) for text in patterns),
        names=frozenset(name for name, _ in lines),
        lines=tuple(f"{name}: {value}".encode("ascii") for name, value in lines),
        upload_policy=not restricts_webhooks,
    )


def header_names(field: str, value: object) -> frozenset[str]:
    """Return the names of response headers that this field lists, in lower case. Raise ConfigError."""
    if value is None:
        return frozenset()
    names = _texts(value)
    if names is None:
        raise ConfigError([f"{field}: must be a list of names of headers, not {value!r}"])
    problems = [f"{field}: {name!r} is no name of a header" for name in names if not _NAME.fullmatch(name)]
    if field == "withhold_headers":
        problems += [f"{field}: {name!r} is needed to read a response" for name in names if name.lower() in _NEEDED]
    if problems:
        raise ConfigError(problems)
    return frozenset(map(str.lower, names))


def as_header_lines(text: str) -> tuple[str, ...]:
    """Return the header lines of a text such as ``x-fal-store-io: 0, x-fal-queue-priority: low``."""
    return tuple(line.strip() for line in _NEXT_LINE.split(text))


def _patterns(value: object, problems: list[str]) -> tuple[str, ...] | None:
    if value is None:
        return None
    texts = _texts(value)
    if texts is None:
        problems.append(f"allowed_fal_headers: must be a list of names such as x-fal-queue-priority, not {value!r}")
        return None
    problems.extend(
        f"allowed_fal_headers: {text!r} must be a name such as x-fal-queue-priority, in which * stands for any part"
        for text in texts
        if not _PATTERN.fullmatch(text)
    )
    return texts


def _lines(value: object, problems: list[str]) -> list[tuple[str, str]]:
    """Return names and values of the headers that are set, and add a problem for each that is wrong."""
    texts = () if value is None else _texts(value)
    if texts is None:
        problems.append(f"set_fal_headers: must be a list of lines such as 'x-fal-store-io: 0', not {value!r}")
        return []
    lines: list[tuple[str, str]] = []
    for text in texts:
        name, colon, content = (part.strip() for part in text.partition(":"))
        if not colon or not is_fals_own(name.lower()) or not _VALUE.fullmatch(content):
            problems.append(f"set_fal_headers: must have lines such as 'x-fal-store-io: 0', not {text!r}")
        elif name.lower() in (known for known, _ in lines):
            problems.append(f"set_fal_headers: {text!r} sets {name} once more")
        else:
            lines.append((name.lower(), content))
    return lines


def _texts(value: object) -> tuple[str, ...] | None:
    return value if isinstance(value, tuple) and all(isinstance(text, str) for text in value) else None


def _expression(pattern: str) -> str:
    """Return the regular expression of a pattern."""
    return "".join(".*" if part == "*" else re.escape(part) for part in re.split(r"(\*)", re.sub(r"\*+", "*", pattern)))
