"""How much work a regular expression is, counted: an engine that backtracks in the order in which Python's own does.

Time would tell the same on a machine that does nothing else. Strategy: the expression, as Python parses it, becomes a
program for a small machine that counts its steps. ``hostile_texts`` has what makes a careless expression slow: a text
that it matches, in which what one of its loops takes is repeated many times, and then something that it cannot match.
"""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["TooManySteps", "fullmatch_steps", "growth", "hostile_texts"]

# Python's parser has no public name.
_parser: Any = importlib.import_module("re._parser")
_c: Any = importlib.import_module("re._constants")

_CATEGORIES = {"CATEGORY_DIGIT": r"\d", "CATEGORY_SPACE": r"\s", "CATEGORY_WORD": r"\w"}
# Ends a text: no expression here takes it.
_FOREIGN = "\x01"

# Where counting ends: an expression that takes exponential time would have it go on for ever.
MAX_STEPS = 1_000_000

_ANYTHING = frozenset(range(256))
_ONE_CHARACTER = (_c.LITERAL, _c.NOT_LITERAL, _c.ANY, _c.IN)


class TooManySteps(Exception):
    """More than a text of a few hundred characters may take."""


@dataclass(frozen=True, slots=True)
class _Look:
    """Go on if the program matches here, or with ``negative`` if it does not. ``atomic``: go on behind the match."""

    program: "list[Any]"
    negative: bool = False
    atomic: bool = False


@dataclass(frozen=True, slots=True)
class _Split:
    """Try the first place, and the second one if that fails."""

    first: int
    second: int


def fullmatch_steps(pattern: re.Pattern[Any], text: str | bytes) -> tuple[bool, int]:
    """Return whether ``pattern.fullmatch(text)`` finds a match, and in how many steps. Raise TooManySteps."""
    program: list[Any] = []
    _compile(_parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG), pattern.flags, program)
    codes = list(text) if isinstance(text, bytes) else list(map(ord, text))
    counted = [0]
    end = _run(program, codes, 0, counted, whole=True)
    return end is not None, counted[0]


def growth(pattern: re.Pattern[Any], size: int = 64) -> float:
    """Return how many times as many steps a hostile text of twice the size takes, at the worst. Raise TooManySteps."""
    worst = 1.0
    for short, long in zip(hostile_texts(pattern, size), hostile_texts(pattern, 2 * size), strict=True):
        (_, few), (matches, many) = fullmatch_steps(pattern, short), fullmatch_steps(pattern, long)
        assert matches == bool(pattern.fullmatch(long)), f"counted in another way than {pattern!r} matches {long!r}"
        worst = max(worst, many / few)
    return worst


def _run(program: list[Any], codes: list[int], start: int, counted: list[int], *, whole: bool) -> int | None:
    """Return where the first match ends, None where there is none."""
    choices = [(0, start)]
    steps, most, last = 0, MAX_STEPS - counted[0], len(program)
    found = None
    while choices and found is None and steps <= most:
        at, position = choices.pop()
        while True:
            steps += 1
            if at == last:
                found = position if position == len(codes) or not whole else None
                break
            step = program[at]
            if type(step) is frozenset:
                if position == len(codes) or codes[position] not in step:
                    break
                at, position = at + 1, position + 1
            elif type(step) is _Split:
                choices.append((step.second, position))
                at = step.first
            elif type(step) is int:
                at = step
            elif (after := _look(step, codes, position, counted)) is not None:
                at, position = at + 1, after
            else:
                break
    counted[0] += steps
    if counted[0] > MAX_STEPS:
        raise TooManySteps
    return found


def _look(look: _Look, codes: list[int], position: int, counted: list[int]) -> int | None:
    """Return where to go on, None where that is no match."""
    end = _run(look.program, codes, position, counted, whole=False)
    if (end is None) != look.negative:
        return None
    return end if look.atomic else position


def _compile(tree: Any, flags: int, program: list[Any]) -> None:
    for kind, value in tree:
        if kind in _ONE_CHARACTER:
            program.append(_codes(kind, value, flags))
        elif kind in (_c.MAX_REPEAT, _c.MIN_REPEAT):
            _compile_repeat(value, flags, program, greedy=kind is _c.MAX_REPEAT)
        elif kind is _c.SUBPATTERN:
            _compile(value[3], flags | value[1], program)
        elif kind is _c.BRANCH:
            _compile_branches(value[1], flags, program)
        elif kind in (_c.ATOMIC_GROUP, _c.ASSERT, _c.ASSERT_NOT):
            inner: list[Any] = []
            _compile(value if kind is _c.ATOMIC_GROUP else value[1], flags, inner)
            program.append(_Look(inner, negative=kind is _c.ASSERT_NOT, atomic=kind is _c.ATOMIC_GROUP))
        elif (kind, value) == (_c.AT, _c.AT_END_STRING):
            program.append(_Look([_ANYTHING], negative=True))
        else:
            raise NotImplementedError(f"{kind} {value} in a regular expression: teach {__name__} to count it")


def _compile_repeat(repeat: Any, flags: int, program: list[Any], *, greedy: bool) -> None:
    least, most, body = repeat
    for _ in range(least):
        _compile(body, flags, program)
    if most is _c.MAXREPEAT:
        assert body.getwidth()[0], "a loop whose body may be empty"
        begin = len(program)
        program.append(None)
        _compile(body, flags, program)
        program.append(begin)
        program[begin] = _split(begin + 1, len(program), greedy)
        return
    begins = []
    for _ in range(most - least):
        begins.append(len(program))
        program.append(None)
        _compile(body, flags, program)
    for begin in begins:
        program[begin] = _split(begin + 1, len(program), greedy)


def _split(into: int, past: int, greedy: bool) -> _Split:
    return _Split(into, past) if greedy else _Split(past, into)


def _compile_branches(branches: list[Any], flags: int, program: list[Any]) -> None:
    ends = []
    for number, branch in enumerate(branches):
        begin = len(program)
        if number < len(branches) - 1:
            program.append(None)
        _compile(branch, flags, program)
        if number < len(branches) - 1:
            ends.append(len(program))
            program.append(None)
            program[begin] = _Split(begin + 1, len(program))
    for end in ends:
        program[end] = len(program)


def _codes(kind: Any, value: Any, flags: int) -> frozenset[int]:
    """Return the characters, below 256, that a part of the expression for one character takes."""
    found: set[int]
    if kind is _c.IN:
        negative = value[0][0] is _c.NEGATE
        found = set().union(*(_codes(kind, item, flags) for kind, item in value[negative:]))
        return frozenset(_ANYTHING - found if negative else found)
    if kind is _c.ANY:
        return _ANYTHING if flags & re.DOTALL else _ANYTHING - {10}
    if kind is _c.CATEGORY:
        known = re.compile(_CATEGORIES[str(value)])
        return frozenset(code for code in _ANYTHING if known.match(chr(code)))
    low, high = value if kind is _c.RANGE else (value, value)
    found = set(range(low, high + 1))
    if flags & re.IGNORECASE:
        found |= {ord(case) for code in found for case in (chr(code).lower(), chr(code).upper())}
    return frozenset(_ANYTHING - found if kind is _c.NOT_LITERAL else found)


def hostile_texts(pattern: re.Pattern[Any], size: int) -> Iterator[str | bytes]:
    """Make the texts in which something that a loop of the expression may take stands ``size`` times."""
    tree = _parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG)
    pieces = list(_pieces(tree))
    for number, (_, fill) in enumerate(pieces):
        before, after = ("".join(text for text, _ in part) for part in (pieces[:number], pieces[number + 1 :]))
        for filling in sorted(fill):
            for end in (after, after + _FOREIGN, _FOREIGN):
                text = before + filling * size + end
                yield text if isinstance(pattern.pattern, str) else text.encode("latin-1")


def _pieces(tree: Any) -> Iterator[tuple[str, set[str]]]:
    """Cut a text that matches at each loop: the text of the piece, and what the loop might take there instead."""
    for kind, value in tree:
        if kind in (_c.MAX_REPEAT, _c.MIN_REPEAT):
            least, _, body = value
            inner = list(_pieces(body))
            once = "".join(text for text, _ in inner)
            yield once * max(least, 1), {once, *_samples(body)}
            for text, fill in inner:
                if fill:
                    yield text, fill
        elif kind is _c.SUBPATTERN:
            yield from _pieces(value[3])
        elif kind is _c.ATOMIC_GROUP:
            yield from _pieces(value)
        elif kind is _c.BRANCH:
            yield from _pieces(value[1][0])
            yield "", {sample for branch in value[1] for sample in _samples(branch)}
        elif kind in (_c.LITERAL, _c.IN, _c.ANY, _c.NOT_LITERAL):
            yield _samples([(kind, value)])[0], set()


def _samples(tree: Any) -> list[str]:  # noqa: C901  (one case for each kind)
    """Return a character for each thing that may stand for one."""
    found: list[str] = []
    for kind, value in tree:
        if kind is _c.LITERAL:
            found.append(chr(value))
        elif kind is _c.IN and value[0][0] is not _c.NEGATE:
            found += [sample for item in value for sample in _samples([item])]
        elif kind is _c.RANGE:
            found.append(chr(value[0]))
        elif kind is _c.CATEGORY:
            found.append({"CATEGORY_SPACE": " ", "CATEGORY_DIGIT": "0"}.get(str(value), "a"))
        elif kind in (_c.IN, _c.ANY, _c.NOT_LITERAL):
            found.append("~")
        elif kind in (_c.MAX_REPEAT, _c.MIN_REPEAT):
            found += _samples(value[2])
        elif kind is _c.SUBPATTERN:
            found += _samples(value[3])
        elif kind is _c.ATOMIC_GROUP:
            found += _samples(value)
        elif kind is _c.BRANCH:
            found += [sample for branch in value[1] for sample in _samples(branch)]
    return found
