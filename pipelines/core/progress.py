"""Progress output: a bar on a terminal, plain lines elsewhere, JSON lines for a parent process."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from pipelines.core.environment import PROGRESS_JSON

_LINE_SECONDS = 5.0
_BAR_SECONDS = 0.1
_BAR_CELLS = 24


def _duration(seconds: float) -> str:
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Progress:
    """Counts finished items out of `total`, and shows rate and time left.

    `noun` is a plural, such as "images". `initial` items were finished by an earlier run: they count as done but not
    towards the rate. Use as a context manager, so that the final state is always shown.
    """

    def __init__(
        self, label: str, total: int | None, noun: str, *, initial: int = 0, stream: TextIO | None = None
    ) -> None:
        self.label, self.total, self.noun = label, total, noun
        self.done = self._initial = initial
        self._stream = stream or sys.stderr
        self._json = os.environ.get(PROGRESS_JSON) == "1"
        self._bar = not self._json and self._stream.isatty()
        self._start = time.monotonic()
        self._shown = 0.0
        self._details: dict[str, float | int | str] = {}
        self.describe: Callable[[], Mapping[str, float | int | str]] | None = None
        """Returns details; called only when a line is shown, for details too costly to compute for every item."""

    def __enter__(self) -> "Progress":
        self._show(force=self._json)
        return self

    def __exit__(self, *_: object) -> None:
        self._show(force=True)
        if self._bar:
            self._stream.write("\n")
            self._stream.flush()

    def advance(self, count: int = 1, **details: float | int | str) -> None:
        """Count `count` more items; `details` (loss, failures by reason, ...) are appended to the line."""
        self.done += count
        self._details.update(details)
        self._show()

    @property
    def rate(self) -> float:
        """Items per second of this run."""
        elapsed = time.monotonic() - self._start
        return (self.done - self._initial) / elapsed if elapsed > 0 else 0.0

    def _show(self, *, force: bool = False) -> None:
        now = time.monotonic()
        interval = _BAR_SECONDS if self._bar else _LINE_SECONDS
        if not force and now - self._shown < interval:
            return
        self._shown = now
        if self.describe is not None:
            self._details.update(self.describe())
        if self._json:
            record = {"label": self.label, "done": self.done, "total": self.total, "noun": self.noun}
            line = json.dumps({"progress": record | {"rate": round(self.rate, 3), "details": self._details}}) + "\n"
        elif self._bar:
            line = "\r\x1b[2K" + self._fitted_text()
        else:
            line = self._text() + "\n"
        self._stream.write(line)
        self._stream.flush()

    def _fitted_text(self) -> str:
        """Return the text cut to the terminal width, without the bar if needed: a wrapped line is not overwritten."""
        columns = os.get_terminal_size(self._stream.fileno()).columns or 80
        text = self._text(bar=True)
        return (text if len(text) < columns else self._text())[: columns - 1]

    def _text(self, *, bar: bool = False) -> str:
        rate = self.rate
        parts = [self.label]
        if self.total:
            share = min(self.done / self.total, 1.0)
            if bar:
                filled = int(share * _BAR_CELLS)
                parts.append("█" * filled + "░" * (_BAR_CELLS - filled))
            parts.append(f"{self.done}/{self.total} {self.noun}")
        else:
            parts.append(f"{self.done} {self.noun}")
        if rate > 0:
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
            if self.total and self.done < self.total:
                parts.append(f"{_duration((self.total - self.done) / rate)} left")
        parts += [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self._details.items()
        ]
        return "  ".join(parts)
