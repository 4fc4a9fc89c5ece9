"""Measured figures and what is asked of them, as plain data. No I/O, no measuring."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Figure", "Target", "Verdict", "judge"]


@dataclass(frozen=True)
class Figure:
    """One measured thing of one peer: a value for each round. ``note`` says what a reader must know of it."""

    measure: str
    peer: str
    unit: str
    values: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Target:
    """What the proxy must reach in ``measure``.

    With ``reference`` (the name of a peer) the bound holds for the ratio of both in the same round, or, with
    ``difference``, for what the proxy has more. ``reference_measure`` is the reference's measure where it is another.
    """

    measure: str
    bound: float
    reference: str = ""
    difference: bool = False
    at_least: bool = False
    reference_measure: str = ""


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured. ``values`` are what the bound is held against, one for each round."""

    target: Target
    figure: Figure
    reference: Figure | None
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        return self.median >= self.target.bound if self.target.at_least else self.median <= self.target.bound


def judge(target: Target, figures: Sequence[Figure], peer: str) -> Verdict | None:
    """How ``peer`` stands to ``target``, or None where what it takes was not measured."""
    figure = _find(figures, target.measure, peer)
    if figure is None or not target.reference:
        return figure and Verdict(target, figure, None, figure.values)
    reference = _find(figures, target.reference_measure or target.measure, target.reference)
    if reference is None:
        return None
    pairs = zip(figure.values, reference.values, strict=False)
    if target.difference:
        values = tuple(mine - other for mine, other in pairs)
    else:
        values = tuple(mine / other for mine, other in pairs)
    return Verdict(target, figure, reference, values)


def _find(figures: Sequence[Figure], measure: str, peer: str) -> Figure | None:
    return next((figure for figure in figures if (figure.measure, figure.peer) == (measure, peer)), None)
