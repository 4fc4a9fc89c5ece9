"""The cost of a call: the price of a unit for each endpoint, an estimate of its units, and fal's bill.

Strategy. Prices are the operator's, in a TOML file or a mapping: a pattern of endpoints, as in ``allowed_endpoints``,
and the price of a unit in dollars. The first pattern that matches decides, so exceptions stand above. A bill of fal's
counts units and names no price.

::

    "fal-ai/flux/dev" = 0.025                      # dollars for a unit; a call is estimated as one unit
    "fal-ai/kling-video/**" = {price = 0.07, units = 5}

All numbers become whole millionths, rounded up.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import lru_cache

from tornado_fal_proxy.rules.patterns import Pattern
from tornado_fal_proxy.spending.limits import MAX_AMOUNT, millionths

__all__ = ["BILL", "Price", "Prices", "billed_units", "estimated_units", "prices_of"]

# The header of fal's response that has the units of a bill.
BILL = "x-fal-billable-units"
# Limits units of one call and dollars of one unit: far more than any call has, and sums of them stay exact.
MAX_NUMBER = Decimal(1_000_000)
# Limits the digits of a price behind the point. A price above 0 that is less costs a call as much: a millionth.
_MAX_DIGITS = 40

_BILL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?")


@dataclass(frozen=True, slots=True)
class Price:
    """The price of one unit in dollars, for endpoints of a pattern; and how many millionths of a unit a call has."""

    pattern: Pattern
    per_unit: Decimal
    units: int
    _ratio: tuple[int, int] = field(init=False, compare=False, repr=False)  # the same price, for fast calculation

    def __post_init__(self) -> None:
        least = Decimal(1).scaleb(-_MAX_DIGITS)
        price = self.per_unit if self.per_unit == 0 or self.per_unit > least else least
        object.__setattr__(self, "_ratio", price.as_integer_ratio())

    def cost(self, units: int) -> int:
        """Return the price of so many millionths of a unit, in millionths of a dollar."""
        numerator, denominator = self._ratio
        cost = -(-units * numerator // denominator)
        return cost if cost < MAX_AMOUNT else MAX_AMOUNT


@dataclass(frozen=True, slots=True)
class Prices:
    """All prices of a configuration, in the operator's order."""

    prices: tuple[Price, ...]

    def find(self, endpoint: str) -> Price | None:
        """Return the price of an endpoint; None where no pattern matches."""
        segments = endpoint.split("/")
        return next((price for price in self.prices if price.pattern.matches(segments)), None)


def billed_units(headers: Sequence[tuple[str, str]]) -> int | None:
    """Return the millionths of a unit that fal's response bills; None where it has no bill that can be read."""
    bills = [value for name, value in headers if name == BILL]
    return _billed(bills[0]) if len(bills) == 1 else None


@lru_cache(256)
def _billed(bill: str) -> int | None:
    if not _BILL.fullmatch(bill):
        return None
    units = Decimal(bill)
    return millionths(units) if units <= MAX_NUMBER else None


def estimated_units(value: object) -> int:
    """Return what the operator's function made of a call's input, as millionths. Raise ValueError."""
    if (number := _number(value)) is None:
        raise ValueError(f"must be a number from 0 to {MAX_NUMBER}")
    return millionths(number)


def prices_of(value: object) -> Prices:
    """Return the prices in a TOML file or in a mapping. Raise ValueError, with what is wrong."""
    if isinstance(value, str | os.PathLike):
        try:
            with open(value, "rb") as file:
                entries: Mapping[str, object] = tomllib.load(file, parse_float=Decimal)
        except (OSError, ValueError) as exc:  # ValueError: no TOML, or a path with a NUL
            raise ValueError(f"cannot read {os.fspath(value)!r}: {getattr(exc, 'strerror', None) or exc}") from None
    elif isinstance(value, tuple) and all(isinstance(entry, tuple) and len(entry) == 2 for entry in value):
        entries = dict(value)
    else:
        raise ValueError(f"must be the path of a TOML file, or a mapping of patterns to prices, not {value!r}")
    if not entries:
        raise ValueError(f"names no endpoint: {value!r}")
    return Prices(tuple(_price(pattern, entry) for pattern, entry in entries.items()))


def _price(text: object, entry: object) -> Price:
    """Return one price. Raise ValueError."""
    try:
        pattern = Pattern.parse(text if isinstance(text, str) else "")
    except ValueError as exc:
        raise ValueError(f"{text!r} {exc}") from None
    fields = dict(entry) if isinstance(entry, Mapping | tuple) else {"price": entry}
    per_unit, units = _number(fields.get("price")), _number(fields.get("units", 1))
    if fields.keys() - {"price", "units"} or per_unit is None or units is None:
        raise ValueError(f"{text!r} must be a price in dollars, or {{price = 0.07, units = 5}}, not {entry!r}")
    return Price(pattern, per_unit, millionths(units))


def _number(value: object) -> Decimal | None:
    """Return a number from 0 to MAX_NUMBER as it is written; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return None
    return number if number.is_finite() and 0 <= number <= MAX_NUMBER else None
