"""The paths that every server reads alike.

Strategy. A rule about an endpoint must not be passed by because fal's server reads a path in another way than the
proxy. So a path is split only where it has one reading: no escapes, no empty segments and no dot segments.

This module never changes a path.
"""

from __future__ import annotations

import re

__all__ = ["MAX_PATH_CHARS", "MAX_SEGMENTS", "SEGMENT", "canonical_segments"]

# The length of a canonical path and its number of segments, which bound the cost of matching. Both are more than the
# longest id of an endpoint has, with the id of a job behind it.
MAX_PATH_CHARS, MAX_SEGMENTS = 512, 16

_SEGMENT = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
# One segment of a canonical path. The alias of an app is one too.
SEGMENT = re.compile(_SEGMENT)
_PATH = re.compile(rf"(?:/{_SEGMENT})+")


def canonical_segments(path: str) -> list[str] | None:
    """Return the segments of a path that every server reads alike, or None where servers may differ.

    A path of that kind has no escapes, no empty segments and no dot segments, and is not longer than MAX_PATH_CHARS and
    MAX_SEGMENTS.
    """
    if len(path) > MAX_PATH_CHARS or not _PATH.fullmatch(path):
        return None
    segments = path[1:].split("/")
    return segments if len(segments) <= MAX_SEGMENTS else None
