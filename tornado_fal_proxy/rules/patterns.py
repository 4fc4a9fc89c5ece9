"""The patterns of ``allowed_endpoints``, compiled once and matched by segments.

Strategy. A pattern means what it means to fal's own proxy (picomatch): ``*`` is any part of one segment, ``**`` as a
whole segment is any number of segments, none included. Each segment is compiled to a regular expression without
backtracking, and :class:`Pattern` keeps the set of positions that the segments so far can reach. The cost stays in
proportion to the length of the path times the length of the pattern.

This module never splits or decodes a path: it takes canonical segments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tornado_fal_proxy.rules.endpoints import REQUESTS, id_length
from tornado_fal_proxy.rules.paths import SEGMENT

__all__ = ["Pattern"]

# The characters that * takes. Upper case is not among them, because * must open nothing new if fal's server ignores
# case.
_WILD = "[a-z0-9._-]*"
_PATTERN_CHARS = re.compile(r"[A-Za-z0-9._*/-]+")


@dataclass(frozen=True, slots=True)
class Pattern:
    """One of ``allowed_endpoints``: its ``text``, and its segments, among which None stands for ``**``.

    ``alias`` is the name of the one app that the pattern allows as a whole. It is None where a wildcard stands at its
    place or before it as ``**``, or where the pattern allows no more than a part of the app.
    """

    text: str
    segments: tuple[re.Pattern[str] | None, ...]
    alias: str | None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Return the pattern that ``text`` stands for.

        Raises ValueError, whose message continues a sentence that names the pattern.
        """
        if not _PATTERN_CHARS.fullmatch(text):
            raise ValueError("may have letters, digits, '.', '_', '-', '/', * and ** only")
        parts = text.split("/")
        if "***" in text or not all(part == "**" or SEGMENT.fullmatch(re.sub(r"\*+", "a", part)) for part in parts):
            raise ValueError("has a segment that no endpoint has")
        if REQUESTS in parts:
            raise ValueError("has the segment requests: the queue's calls are allowed together with their endpoint")
        if "**" not in parts and len(parts) < id_length(parts):
            raise ValueError("has too few segments to be an endpoint's; for all below it add /**")
        return cls(text, tuple(None if part == "**" else _segment_pattern(part) for part in parts), _alias(parts))

    def matches(self, segments: Sequence[str]) -> bool:
        """Return whether the pattern allows this endpoint."""
        return len(self.segments) in self._positions(segments)

    def may_begin(self, segments: Sequence[str]) -> bool:
        """Return whether the pattern allows this endpoint, or may allow one below it."""
        return bool(self._positions(segments))

    def _positions(self, segments: Iterable[str]) -> set[int]:
        """Return how many of the pattern's segments ``segments`` can use up exactly: no, one or several numbers."""
        positions = self._skipping({0})
        for segment in segments:
            taken = set()
            for position in positions:
                if position < len(self.segments):
                    pattern = self.segments[position]
                    if pattern is None:
                        if segment == segment.lower():
                            taken.add(position)
                    elif pattern.fullmatch(segment):
                        taken.add(position + 1)
            positions = self._skipping(taken)
        return positions

    def _skipping(self, positions: set[int]) -> set[int]:
        """Return ``positions``, with those added that lie behind a ``**`` that takes no segment."""
        for position, pattern in enumerate(self.segments):
            if pattern is None and position in positions:
                positions.add(position + 1)
        return positions


def _alias(parts: Sequence[str]) -> str | None:
    """Return the name of the app in a pattern of these segments, if the pattern spells it and allows all of the app."""
    length = id_length(parts)
    *before, alias = parts[:length]
    spelled = len(before) == length - 1 and "**" not in before and "*" not in alias
    return alias if spelled and all(part == "**" for part in parts[length:]) else None


def _segment_pattern(text: str) -> re.Pattern[str]:
    """Return the regular expression of one segment, which may have ``*``.

    An atomic group finds the text between two ``*`` at its first place and stays there. This loses no match, and keeps
    the time in proportion to the segment's length.
    """
    first, *rest = [re.escape(part) for part in re.split(r"\*+", text)]
    if not rest:
        return re.compile(first)
    return re.compile(first + "".join(f"(?>{_WILD}?{part})" for part in rest[:-1]) + _WILD + rest[-1])
