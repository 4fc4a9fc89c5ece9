"""Measured figures and their targets, as plain data. No I/O, no measuring."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Figure", "Target", "Verdict", "judge"]


@dataclass(frozen=True)
class Figure:
    """One measure of one peer: a value for each round, and a note for the reader of the table."""

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
    """The bound that the proxy must reach in ``measure``.

    With ``reference`` (the name of a peer) the bound applies to the ratio of both in the same round, or, with
    ``difference``, to the proxy's value less the peer's. ``reference_measure`` is the measure of the reference if it is
    another one.
    """

    measure: str
    bound: float
    reference: str = ""
    difference: bool = False
    at_least: bool = False
    reference_measure: str = ""


@dataclass(frozen=True)
class Verdict:
    """A target beside the measured figure. The bound is compared with ``values``, one for each round."""

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
    """Return the verdict on ``peer``, or None if a figure that the target needs was not measured."""
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
