"""Tells a download that goes wrong as a whole from rows that fail, and stops it."""

from collections import Counter, deque

from pipelines.core.errors import ThroughlineError
from pipelines.download.config import ImagesConfig
from pipelines.download.outcomes import RowOutcome
from pipelines.download.status import NO_FAILURE

_SMALLEST_WINDOW = 20


class FailureWatch:
    """Stops the stage when nearly all of many neighbouring rows failed: then it isn't the rows that are wrong.

    Rows are looked at in their order, not in the order they finish in (failures are faster than pictures), so that
    the verdict depends on the outcomes alone.
    """

    def __init__(self, label: str, num_rows: int, config: ImagesConfig) -> None:
        self._label = label
        self._share = config.max_failure_share
        self._window = min(config.failure_window, num_rows) if num_rows >= _SMALLEST_WINDOW else 0
        self._recent: deque[RowOutcome] = deque(maxlen=self._window)
        self._early: dict[int, RowOutcome] = {}
        self._next = 0
        self._num_failed = 0

    def record(self, index: int, outcome: RowOutcome) -> None:
        """Take note of a row; raises ThroughlineError where failures exceed the configured share."""
        if not self._window:
            return
        self._early[index] = outcome
        while self._next in self._early:
            self._push(self._early.pop(self._next))
            self._next += 1

    def _push(self, outcome: RowOutcome) -> None:
        if len(self._recent) == self._window:
            self._num_failed -= self._recent[0].status not in NO_FAILURE
        self._recent.append(outcome)
        self._num_failed += outcome.status not in NO_FAILURE
        if len(self._recent) == self._window and self._num_failed > self._share * self._window:
            raise ThroughlineError(self._sentence())

    def _sentence(self) -> str:
        failures = [item for item in self._recent if item.status not in NO_FAILURE]
        (status, detail), count = Counter((item.status, item.detail) for item in failures).most_common(1)[0]
        return (
            f"{self._label}: {len(failures)} of {self._window} rows in a row failed, more than the allowed share "
            f"{self._share:g}; most often {status}{f' ({detail})' if detail else ''}, {count} times; check the network "
            "and that host, then run again: it goes on at the first unfinished shard"
        )
