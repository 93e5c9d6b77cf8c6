"""What people see while stages run: progress bars on a terminal, plain lines elsewhere, tables and marks."""

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

_BAR_CELLS = 24
TICK, CROSS = "✓", "✗"


def duration(seconds: float) -> str:
    """Return seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress_text(record: Mapping[str, Any], *, bar: bool = False) -> str:
    """Return one line for a progress record of `pipelines.core.progress`."""
    done, total, rate = record["done"], record.get("total"), float(record.get("rate") or 0)
    parts = [str(record["label"])]
    if total:
        if bar:
            filled = int(min(done / total, 1.0) * _BAR_CELLS)
            parts.append("█" * filled + "░" * (_BAR_CELLS - filled))
        parts.append(f"{done}/{total} {record['noun']}")
    else:
        parts.append(f"{done} {record['noun']}")
    if rate > 0:
        parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
        if total and done < total:
            parts.append(f"{duration((total - done) / rate)} left")
    for name, value in (record.get("details") or {}).items():
        parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return "  ".join(parts)


class Console:
    """Writes lines and at most one live progress bar to a stream that Dagster's log capture does not touch.

    Dagster points file descriptors 1 and 2 at files while an asset runs; a copy of the descriptor, taken before, still
    leads to the person at the terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1)
        self.is_terminal = self._stream.isatty()
        self._bar_shown = False
        self._lock = threading.Lock()

    def line(self, text: str = "") -> None:
        """Write a line; a bar that is shown makes way for it."""
        with self._lock:
            self._clear()
            self._stream.write(text + "\n")
            self._stream.flush()

    def progress(self, record: Mapping[str, Any]) -> None:
        """Show a progress record: in place on a terminal, as a line elsewhere."""
        if not self.is_terminal:
            self.line("    " + progress_text(record))
            return
        with self._lock:
            width = os.get_terminal_size(self._stream.fileno()).columns or 80
            text = "    " + progress_text(record, bar=True)
            if len(text) >= width:  # figures tell more than a bar
                text = "    " + progress_text(record)
            self._stream.write("\r\x1b[2K" + text[: width - 1])
            self._stream.flush()
            self._bar_shown = True

    def _clear(self) -> None:
        if self._bar_shown:
            self._stream.write("\r\x1b[2K")
            self._bar_shown = False


def table(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Return rows as left-aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
