"""Monitoring of a download: progress by status and rate, and the circuit breaker that stops one that only fails."""

import time
from collections import Counter, deque
from collections.abc import Mapping

from pipelines.core.errors import ThroughlineError
from pipelines.core.progress import Progress
from pipelines.download.config import ImagesConfig
from pipelines.download.outcomes import RowOutcome
from pipelines.download.status import NOT_FAILURES, FetchStatus

_MIN_WINDOW_ROWS = 20
_REASONS_SHOWN = 4
_WINDOW_SECONDS = 10.0
_SAMPLE_SECONDS = 0.5


class DownloadProgress:
    """Counts statuses and bytes, and adds them to the progress of a pass.

    `counts` are the row statuses before the pass. The current rate is averaged over ten seconds, whereas that of
    `Progress` is averaged over the run.
    """

    def __init__(self, progress: Progress, counts: Counter[str]) -> None:
        self.num_requested = 0
        self._progress = progress
        self._counts = Counter(counts)
        self._num_recovered = 0
        self._num_bytes = 0
        self._has_retried = False
        self._samples: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])
        progress.describe = self._describe

    def add(self, status: FetchStatus, num_bytes: int, before: FetchStatus | None = None) -> None:
        """Count a requested row; `before` is its status after the previous pass."""
        self.num_requested += 1
        self._num_bytes += num_bytes
        self._counts[status.value] += 1
        if before is not None:
            self._counts[before.value] -= 1
            self._num_recovered += status is FetchStatus.OK
            self._has_retried = True
        self._progress.advance()

    def add_shard(self, statuses: Mapping[str, int], before: Mapping[str, int], num_requested: int) -> None:
        """Count a shard that another process downloaded; `before` counts its statuses before, empty if it is new."""
        self.num_requested += num_requested
        self._counts.update(statuses)
        self._counts.subtract(before)
        self._num_recovered += max(0, statuses.get(FetchStatus.OK, 0) - before.get(FetchStatus.OK, 0)) if before else 0
        self._has_retried |= bool(before)
        self._progress.advance(num_requested)

    def _describe(self) -> dict[str, float | int | str]:
        failed = Counter({word: count for word, count in self._counts.items() if word != FetchStatus.OK and count})
        shown = ", ".join(f"{word} {count}" for word, count in failed.most_common(_REASONS_SHOWN))
        recovered = {"recovered": self._num_recovered} if self._has_retried else {}
        return {
            "now": self._current_rate(),
            **recovered,
            "ok": self._counts[FetchStatus.OK],
            "failed": f"{failed.total()} ({shown})" if shown else 0,
        }

    def _current_rate(self) -> str:
        now = time.monotonic()
        if now - self._samples[-1][0] >= _SAMPLE_SECONDS:
            self._samples.append((now, self.num_requested, self._num_bytes))
            while len(self._samples) > 2 and now - self._samples[1][0] >= _WINDOW_SECONDS:
                self._samples.popleft()
        start, num_requested, num_bytes = self._samples[0]
        seconds = max(now - start, _SAMPLE_SECONDS)
        rows, megabytes = (self.num_requested - num_requested) / seconds, (self._num_bytes - num_bytes) / seconds / 1e6
        return f"{rows:.0f}/s {megabytes:.1f} MB/s"


class CircuitBreaker:
    """Stops the stage when nearly all of many consecutive rows failed, which points to the network, not to the rows.

    Rows are evaluated in their order, not in order of completion (failures finish before successes), so that the
    decision depends only on the outcomes.
    """

    def __init__(self, label: str, num_rows: int, config: ImagesConfig) -> None:
        self._label = label
        self._share = config.max_failure_share
        self._window = min(config.failure_window, num_rows) if num_rows >= _MIN_WINDOW_ROWS else 0
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
