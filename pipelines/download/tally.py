"""Progress details of a download: counts by status, and the current rate."""

import time
from collections import Counter, deque
from collections.abc import Mapping

from pipelines.core.progress import Progress
from pipelines.download.status import FetchStatus

_REASONS_SHOWN = 4
_WINDOW_SECONDS = 10.0
_SAMPLE_SECONDS = 0.5


class Tally:
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
