"""Quantities: arithmetic that carries sources along."""

from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.quantity import Basis, Quantity, Source, largest, smallest, total

numbers = st.floats(min_value=1e-3, max_value=1e6)


@given(numbers, numbers)
def test_results_carry_the_sources_of_both_operands(a: float, b: float) -> None:
    left = Quantity(a, frozenset({Source(Basis.PROFILE, "a")}))
    right = Quantity(b, frozenset({Source(Basis.MEASURED, "b")}))
    for result, value in ((left + right, a + b), (left * right, a * b), (left / right, a / b), (left - right, a - b)):
        assert (result.value, result.sources, result.basis) == (value, left.sources | right.sources, Basis.MEASURED)
    assert largest(left, right).value == max(a, b)
    assert smallest(left, right).value == min(a, b)


@given(numbers)
def test_division_by_zero_is_unknown_and_excluded_from_totals(a: float) -> None:
    known = Quantity(a)
    unknown = known / Quantity(0.0)
    assert not unknown.is_known
    assert not largest(known, unknown).is_known
    assert total([known, unknown]).value == a
