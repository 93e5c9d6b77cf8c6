"""A number with provenance: sums and products carry the sources of their terms along.

Estimates use it throughout, so that no printed number can claim a source it does not have.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Basis(StrEnum):
    """Kind of a source, the weakest last."""

    PROFILE = "profile"
    MEASURED = "measured"
    ASSUMED = "assumed"


_WEAKNESS = list(Basis)


@dataclass(frozen=True, order=True)
class Source:
    """A named input of an estimate: a field of the profile, a measurement, or an assumption."""

    basis: Basis
    name: str

    def __str__(self) -> str:
        return f"{self.basis}: {self.name}"


@dataclass(frozen=True)
class Quantity:
    """A number, NaN where it is unknown, and the sources it was computed from."""

    value: float
    sources: frozenset[Source] = frozenset()

    @property
    def basis(self) -> Basis:
        """The weakest basis among the sources: one assumption makes the whole quantity an assumed one."""
        return max((source.basis for source in self.sources), key=_WEAKNESS.index, default=Basis.PROFILE)

    @property
    def is_known(self) -> bool:
        return not math.isnan(self.value)

    def __add__(self, other: "Quantity | float") -> "Quantity":
        return _combine(lambda a, b: a + b, self, other)

    def __sub__(self, other: "Quantity | float") -> "Quantity":
        return _combine(lambda a, b: a - b, self, other)

    def __mul__(self, other: "Quantity | float") -> "Quantity":
        return _combine(lambda a, b: a * b, self, other)

    def __truediv__(self, other: "Quantity | float") -> "Quantity":
        """Divide; the result is unknown where the divisor is zero."""
        return _combine(lambda a, b: a / b if b else math.nan, self, other)

    def __radd__(self, other: float) -> "Quantity":
        return self + other

    def __rsub__(self, other: float) -> "Quantity":
        return Quantity(other) - self

    def __rmul__(self, other: float) -> "Quantity":
        return self * other

    def __rtruediv__(self, other: float) -> "Quantity":
        return Quantity(other) / self

    def rounded_up(self) -> "Quantity":
        """Return the next whole number."""
        return self if not self.is_known else Quantity(math.ceil(self.value - 1e-9), self.sources)

    def as_json(self) -> dict[str, Any]:
        value = None if not self.is_known else int(self.value) if self.value == int(self.value) else self.value
        return {"value": value, "basis": self.basis.value, "inputs": sorted(map(str, self.sources))}


UNKNOWN = Quantity(math.nan)
ZERO = Quantity(0.0)


def largest(*quantities: Quantity) -> Quantity:
    """Return the largest, with the sources of all; unknown where any of them is."""
    return _choose(max, quantities)


def smallest(*quantities: Quantity) -> Quantity:
    """Return the smallest, with the sources of all; unknown where any of them is."""
    return _choose(min, quantities)


def total(quantities: Sequence[Quantity]) -> Quantity:
    """Return the sum of the known ones."""
    return sum((quantity for quantity in quantities if quantity.is_known), ZERO)


def _choose(choose: Callable[[list[float]], float], quantities: tuple[Quantity, ...]) -> Quantity:
    values = [quantity.value for quantity in quantities]
    sources = frozenset().union(*(quantity.sources for quantity in quantities))
    return Quantity(math.nan if any(map(math.isnan, values)) else choose(values), sources)


def _combine(operation: Callable[[float, float], float], left: Quantity, right: Quantity | float) -> Quantity:
    if not isinstance(right, Quantity):
        right = Quantity(right)
    return Quantity(operation(left.value, right.value), left.sources | right.sources)
