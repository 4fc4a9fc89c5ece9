"""Excerpts of refused texts for the log: of targets, methods, origins and types that a client has sent.

Strategy. The operator needs to see what was refused, and must not be handed a secret or an order to a terminal. So an
excerpt ends before a query or a fragment, which may hold a token, shows no user name or password of a URL, has no
character but printable ASCII, and is short.
"""

from __future__ import annotations

import re

__all__ = ["MAX_EXCERPT_CHARS", "excerpt"]

# Limits what is shown of a text: longer than any endpoint of fal's, and with some words around it short enough for a
# line of the log.
MAX_EXCERPT_CHARS = 140
_MORE = "..."
# Used once now, because Python loads the codec from a file, and a process that is out of files has to log too.
_ESCAPE = "unicode_escape"
"".encode(_ESCAPE)
# The beginning of a query or a fragment, also where it is escaped and a server may decode it.
_QUERY = re.compile(r"[?#]|%(?:3[Ff]|23)")
# The scheme of a URL, then the user name and the password in front of its host.
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:(?=[/\\]))?([/\\]*)[^/\\]*@")


def excerpt(text: str) -> str:
    """Return what to log of ``text``: without query and user, printable, at most MAX_EXCERPT_CHARS characters.

    It ends with ``...`` where something at its end was left out.
    """
    kept = _QUERY.split(text, maxsplit=1)[0]
    user = _USER.match(kept)
    anonymous = kept if user is None else f"{user[1] or ''}{user[2]}***@{kept[user.end() :]}"
    shown = anonymous[: MAX_EXCERPT_CHARS + 1].encode(_ESCAPE).decode("ascii")
    if len(kept) == len(text) and len(shown) <= MAX_EXCERPT_CHARS:
        return shown
    return shown[: MAX_EXCERPT_CHARS - len(_MORE)] + _MORE
