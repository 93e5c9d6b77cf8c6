"""Terminal output while stages run: lines, a progress bar, and tables."""

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any, TextIO

from pipelines.core.progress import TerminalBar, progress_text

TICK, CROSS = "✓", "✗"
_INDENT = "    "
_UNLIMITED_COLUMNS = 10_000


class Console:
    """Writes lines and at most one live progress bar to a stream that Dagster's log capture does not redirect.

    Dagster redirects file descriptors 1 and 2 to files while an asset runs; a duplicate of the descriptor, made before,
    still points to the terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1)
        self._bar = TerminalBar(self._stream, _INDENT) if self._stream.isatty() else None
        self._lock = threading.Lock()

    def line(self, text: str = "") -> None:
        """Write a line in place of a bar that is shown."""
        with self._lock:
            if self._bar is not None:
                self._bar.clear()
            self._stream.write(text + "\n")
            self._stream.flush()

    def progress(self, record: Mapping[str, Any]) -> None:
        """Show a progress record: in place on a terminal, as a line elsewhere."""
        if self._bar is None:
            self.line(_INDENT + progress_text(record))
            return
        with self._lock:
            self._bar.draw(record)

    def table(self, rows: Sequence[Sequence[str]], indent: str = "") -> None:
        """Write rows as columns that fit a terminal."""
        self.line(table(rows, indent, self._stream))


def table(rows: Sequence[Sequence[str]], indent: str = "", stream: TextIO | None = None) -> str:
    """Return rows as left-aligned columns without line wrapping, except that cells fold to fit if `stream` (default:
    standard output) is a terminal."""
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    stream = stream or sys.stdout
    columns = os.get_terminal_size(stream.fileno()).columns if stream.isatty() else _UNLIMITED_COLUMNS
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in rows[0]:
        grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    output = StringIO()
    RichConsole(file=output, width=max(columns - len(indent), 1), color_system=None).print(grid)
    return "\n".join((indent + line).rstrip() for line in output.getvalue().splitlines())
