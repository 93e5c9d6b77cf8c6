"""Circuit breaker: stops a download in which nearly everything fails."""

from collections import Counter, deque

from pipelines.core.errors import ThroughlineError
from pipelines.download.config import ImagesConfig
from pipelines.download.outcomes import RowOutcome
from pipelines.download.status import NOT_FAILURES

_SMALLEST_WINDOW = 20


class FailureWatch:
    """Stops the stage when nearly all of many consecutive rows failed, which points to the network, not to the rows.

    Rows are evaluated in their order, not in order of completion (failures finish before successes), so that the
    decision depends only on the outcomes.
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
        """Add the outcome of a row; raises ThroughlineError if failures exceed the configured share."""
        if not self._window:
            return
        self._early[index] = outcome
        while self._next in self._early:
            self._push(self._early.pop(self._next))
            self._next += 1

    def _push(self, outcome: RowOutcome) -> None:
        if len(self._recent) == self._window:
            self._num_failed -= self._recent[0].status not in NOT_FAILURES
        self._recent.append(outcome)
        self._num_failed += outcome.status not in NOT_FAILURES
        if len(self._recent) == self._window and self._num_failed > self._share * self._window:
            raise ThroughlineError(self._message())

    def _message(self) -> str:
        failures = [item for item in self._recent if item.status not in NOT_FAILURES]
        (status, detail), count = Counter((item.status, item.detail) for item in failures).most_common(1)[0]
        return (
            f"{self._label}: {len(failures)} of {self._window} consecutive rows failed, more than the allowed share "
            f"{self._share:g}; most often {status}{f' ({detail})' if detail else ''}, {count} times; check the network "
            "and that host, then run again: it resumes at the first unfinished shard"
        )
