"""Progress output: a bar on a terminal, plain lines elsewhere, JSON lines for a parent process."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

from pipelines.core.environment import PROGRESS_JSON

if TYPE_CHECKING:
    from rich.console import Console

_LINE_SECONDS = 5.0
_BAR_SECONDS = 0.1
_BAR_CELLS = 24
_CLEAR_LINE = "\r\x1b[2K"


def duration(seconds: float) -> str:
    """Return seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def progress_text(record: Mapping[str, Any]) -> str:
    """Return a progress record as one plain line."""
    return f"{record['label']}  {_figures(record)}"


def _figures(record: Mapping[str, Any]) -> str:
    """Return counts, rate, time left and details of a record."""
    done, total, rate = record["done"], record.get("total"), float(record.get("rate") or 0)
    parts = [f"{done}/{total} {record['noun']}" if total else f"{done} {record['noun']}"]
    if rate > 0:
        parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
        if total and done < total:
            parts.append(f"{duration((total - done) / rate)} left")
    for name, value in (record.get("details") or {}).items():
        parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return "  ".join(parts)


class TerminalBar:
    """One progress line that is redrawn in place on a terminal.

    rich lays the line out, but does not own the terminal as its Live display would: Live hides the cursor until it is
    stopped, which a killed run never does.
    """

    def __init__(self, stream: TextIO, indent: str = "") -> None:
        self._stream, self._indent = stream, indent
        self._is_shown = False

    def draw(self, record: Mapping[str, Any]) -> None:
        """Replace the line with a new record, cut to the terminal's width; the bar is the first to shrink."""
        self._stream.write(_CLEAR_LINE + self._render(record, os.get_terminal_size(self._stream.fileno()).columns))
        self._stream.flush()
        self._is_shown = True

    def clear(self) -> None:
        """Erase the line if it is shown."""
        if self._is_shown:
            self._stream.write(_CLEAR_LINE)
            self._is_shown = False

    def finish(self) -> None:
        """Keep the line and start a new one."""
        if self._is_shown:
            self._stream.write("\n")
            self._stream.flush()
            self._is_shown = False

    @cached_property
    def _console(self) -> "Console":
        from rich.console import Console

        return Console(file=self._stream, force_terminal=True)

    def _render(self, record: Mapping[str, Any], columns: int) -> str:
        from rich.progress_bar import ProgressBar
        from rich.segment import Segments
        from rich.table import Column, Table
        from rich.text import Text

        def text() -> Column:
            return Column(no_wrap=True, overflow="ellipsis")

        label, figures = Text(self._indent + str(record["label"])), Text(_figures(record))
        if record.get("total"):
            grid = Table.grid(text(), Column(max_width=_BAR_CELLS), text(), padding=(0, 2, 0, 0))
            grid.add_row(label, ProgressBar(record["total"], record["done"]), figures)
        else:
            grid = Table.grid(text(), text(), padding=(0, 2, 0, 0))
            grid.add_row(label, figures)
        width = max((columns or 80) - 1, 1)  # a line of the full width would wrap
        (line, *_) = self._console.render_lines(grid, self._console.options.update_width(width), pad=False)
        with self._console.capture() as capture:
            self._console.print(Segments(line), end="", soft_wrap=True)
        return capture.get()


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
        self._bar = TerminalBar(self._stream) if not self._json and self._stream.isatty() else None
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
        if self._bar is not None:
            self._bar.finish()

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
        interval = _LINE_SECONDS if self._bar is None else _BAR_SECONDS
        if not force and now - self._shown < interval:
            return
        self._shown = now
        if self.describe is not None:
            self._details.update(self.describe())
        record = {
            "label": self.label, "done": self.done, "total": self.total, "noun": self.noun,
            "rate": round(self.rate, 3), "details": self._details,
        }  # fmt: skip
        if self._bar is not None:
            self._bar.draw(record)
            return
        self._stream.write((json.dumps({"progress": record}) if self._json else progress_text(record)) + "\n")
        self._stream.flush()
