"""Training order and the ledger."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.data_order import DataOrder, Ledger


@settings(max_examples=50, deadline=None)
@given(num_samples=st.integers(1, 40), batch_size=st.integers(1, 60), seed=st.integers(0, 5), steps=st.integers(1, 6))
def test_every_sample_is_seen_equally_often(num_samples: int, batch_size: int, seed: int, steps: int) -> None:
    order = DataOrder("version", seed, batch_size, num_samples)
    seen = np.concatenate([order.indices(step) for step in range(steps)])
    counts = np.bincount(seen, minlength=num_samples)
    assert counts.max() - counts.min() <= 1
    assert len(seen) == steps * batch_size


@settings(max_examples=50, deadline=None)
@given(num_samples=st.integers(1, 40), batch_size=st.integers(1, 60), step=st.integers(0, 9))
def test_order_needs_no_history(num_samples: int, batch_size: int, step: int) -> None:
    walked = DataOrder("version", 1, batch_size, num_samples)
    for earlier in range(step):
        walked.indices(earlier)
    fresh = DataOrder("version", 1, batch_size, num_samples)
    np.testing.assert_array_equal(walked.indices(step), fresh.indices(step))


def test_passes_and_seeds_and_versions_differ() -> None:
    def first_pass(version: str, seed: int, step: int = 0) -> list[int]:
        return DataOrder(version, seed, 50, 50).indices(step).tolist()

    orders = [first_pass("a", 0), first_pass("a", 0, 1), first_pass("a", 1), first_pass("b", 0)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_order_is_the_same_on_every_machine() -> None:
    assert DataOrder("version", 0, 8, 8).indices(0).tolist() == [4, 7, 5, 6, 1, 2, 0, 3]


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="no training samples"):
        DataOrder("version", 0, 8, 0)


def _ledger() -> Ledger:
    return Ledger(np.arange(5 * 16, dtype=np.uint8).reshape(5, 16), "version", 0, 2)


def test_a_restored_ledger_continues() -> None:
    whole, first, second = _ledger(), _ledger(), _ledger()
    batches = [np.array([0, 3]), np.array([3, 3]), np.array([4, 0])]
    for step, batch in enumerate(batches):
        whole.record(step, batch)
    first.record(0, batches[0])
    second.load_state_dict(first.state_dict(), first.consumption_digest)
    for step in (1, 2):
        second.record(step, batches[step])
    assert second.consumption_digest == whole.consumption_digest
    assert second.first_step.tolist() == whole.first_step.tolist() == [0, -1, -1, 0, 2]
    assert second.times_seen.tolist() == whole.times_seen.tolist() == [2, 0, 0, 3, 1]


def test_digest_notices_order_within_a_batch_and_the_step() -> None:
    digests = set()
    for step, batch in ((0, [1, 2]), (0, [2, 1]), (1, [1, 2]), (0, [1, 3])):
        ledger = _ledger()
        ledger.record(step, np.array(batch))
        digests.add(ledger.consumption_digest)
    assert len(digests) == 4
