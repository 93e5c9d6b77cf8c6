"""A number that knows where it came from: sums and products carry the sources of their terms along.

An estimate is made of nothing else, so that no printed figure can be given a source it does not have.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Basis(StrEnum):
    """Where an input of an estimate comes from, the weakest last."""

    PROFILE = "profile"
    MEASURED = "measured"
    ASSUMED = "assumed"


_WEAKNESS = list(Basis)


@dataclass(frozen=True, order=True)
class Input:
    """One input of an estimate: a field of the profile, a measurement, or an assumption, by name."""

    basis: Basis
    name: str

    def __str__(self) -> str:
        return f"{self.basis}: {self.name}"


@dataclass(frozen=True)
class Figure:
    """A number, NaN where it is not known, and the inputs it was computed from."""

    value: float
    inputs: frozenset[Input] = frozenset()

    @property
    def basis(self) -> Basis:
        """The weakest source among its inputs: one assumption makes the whole figure an assumed one."""
        return max((item.basis for item in self.inputs), key=_WEAKNESS.index, default=Basis.PROFILE)

    @property
    def is_known(self) -> bool:
        return not math.isnan(self.value)

    def __add__(self, other: "Figure | float") -> "Figure":
        return _combine(lambda a, b: a + b, self, other)

    def __sub__(self, other: "Figure | float") -> "Figure":
        return _combine(lambda a, b: a - b, self, other)

    def __mul__(self, other: "Figure | float") -> "Figure":
        return _combine(lambda a, b: a * b, self, other)

    def __truediv__(self, other: "Figure | float") -> "Figure":
        """Divide; by nothing gives a figure that is not known."""
        return _combine(lambda a, b: a / b if b else math.nan, self, other)

    def __radd__(self, other: float) -> "Figure":
        return self + other

    def __rsub__(self, other: float) -> "Figure":
        return Figure(other) - self

    def __rmul__(self, other: float) -> "Figure":
        return self * other

    def __rtruediv__(self, other: float) -> "Figure":
        return Figure(other) / self

    def rounded_up(self) -> "Figure":
        """Return the next whole number."""
        return self if not self.is_known else Figure(math.ceil(self.value - 1e-9), self.inputs)

    def as_json(self) -> dict[str, Any]:
        value = None if not self.is_known else int(self.value) if self.value == int(self.value) else self.value
        return {"value": value, "basis": self.basis.value, "inputs": sorted(map(str, self.inputs))}


UNKNOWN = Figure(math.nan)
ZERO = Figure(0.0)


def largest(*figures: Figure) -> Figure:
    """Return the largest of several, which rests on the inputs of all; not known where one of them is not."""
    return _choose(max, figures)


def smallest(*figures: Figure) -> Figure:
    """Return the smallest of several, which rests on the inputs of all; not known where one of them is not."""
    return _choose(min, figures)


def total(figures: "list[Figure]") -> Figure:
    """Return the sum of those that are known."""
    return sum((figure for figure in figures if figure.is_known), ZERO)


def _choose(choose: Callable[[list[float]], float], figures: tuple[Figure, ...]) -> Figure:
    values = [figure.value for figure in figures]
    inputs = frozenset().union(*(figure.inputs for figure in figures))
    return Figure(math.nan if any(map(math.isnan, values)) else choose(values), inputs)


def _combine(operation: Callable[[float, float], float], left: Figure, right: Figure | float) -> Figure:
    if not isinstance(right, Figure):
        right = Figure(right)
    return Figure(operation(left.value, right.value), left.inputs | right.inputs)
