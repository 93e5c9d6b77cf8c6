"""What people see while pictures are downloaded: statuses by count, and what comes in at this moment."""

import time
from collections import Counter, deque
from collections.abc import Mapping

from pipelines.core.progress import Progress
from pipelines.download.status import FetchStatus

_REASONS_SHOWN = 4
_WINDOW_SECONDS = 10.0
_SAMPLE_SECONDS = 0.5


class Tally:
    """Counts statuses and bytes, and shows them beside the progress of a pass.

    `counts` are the statuses that rows have at its start. The present rate is that of the last ten seconds; the one
    that `Progress` shows is of the whole run.
    """

    def __init__(self, progress: Progress, counts: Counter[str]) -> None:
        self.num_asked = 0
        self._progress = progress
        self._counts = Counter(counts)
        self._num_healed = 0
        self._num_bytes = 0
        self._has_asked_again = False
        self._samples: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])
        progress.describe = self._describe

    def add(self, status: FetchStatus, num_bytes: int, before: FetchStatus | None = None) -> None:
        """Count a row that was asked for; `before` is the status that an earlier pass left it with."""
        self.num_asked += 1
        self._num_bytes += num_bytes
        self._counts[status.value] += 1
        if before is not None:
            self._counts[before.value] -= 1
            self._num_healed += status is FetchStatus.OK
            self._has_asked_again = True
        self._progress.advance()

    def add_shard(self, statuses: Mapping[str, int], before: Mapping[str, int], num_asked: int) -> None:
        """Count a shard that was downloaded elsewhere: what its rows came to, and what they were before, if known."""
        self.num_asked += num_asked
        self._counts.update(statuses)
        self._counts.subtract(before)
        self._num_healed += max(0, statuses.get(FetchStatus.OK, 0) - before.get(FetchStatus.OK, 0)) if before else 0
        self._has_asked_again |= bool(before)
        self._progress.advance(num_asked)

    def _describe(self) -> dict[str, float | int | str]:
        failed = Counter({word: count for word, count in self._counts.items() if word != FetchStatus.OK and count})
        shown = ", ".join(f"{word} {count}" for word, count in failed.most_common(_REASONS_SHOWN))
        healed = {"healed": self._num_healed} if self._has_asked_again else {}
        return {
            "now": self._present_rate(),
            **healed,
            "ok": self._counts[FetchStatus.OK],
            "failed": f"{failed.total()} ({shown})" if shown else 0,
        }

    def _present_rate(self) -> str:
        now = time.monotonic()
        if now - self._samples[-1][0] >= _SAMPLE_SECONDS:
            self._samples.append((now, self.num_asked, self._num_bytes))
            while len(self._samples) > 2 and now - self._samples[1][0] >= _WINDOW_SECONDS:
                self._samples.popleft()
        at, num_asked, num_bytes = self._samples[0]
        seconds = max(now - at, _SAMPLE_SECONDS)
        rows, megabytes = (self.num_asked - num_asked) / seconds, (self._num_bytes - num_bytes) / seconds / 1e6
        return f"{rows:.0f}/s {megabytes:.1f} MB/s"
