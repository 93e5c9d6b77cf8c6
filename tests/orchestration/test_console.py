"""Progress and tables on a real pseudo-terminal, and as plain lines elsewhere."""

import fcntl
import io
import json
import os
import pty
import re
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

from orchestration.console import Console, table
from pipelines.core.environment import PROGRESS_JSON
from pipelines.core.progress import Progress, progress_text

RECORD = {"label": "images 00000", "done": 30, "total": 90, "noun": "images", "rate": 2.0, "details": {"failed": 3}}
_END = b"\x00"
PLAIN = "images 00000  30/90 images  2.0/s  0:30 left  failed 3"


@contextmanager
def terminal(columns: int) -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """Yield a terminal's stream, and a function that returns the text written to it, without colours."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(writer, "w", buffering=1) as stream:

        def written() -> str:
            stream.flush()
            os.write(writer, _END)  # the kernel hands text over in pieces: read up to a mark of our own
            text = b""
            while not text.endswith(_END):
                text += os.read(reader, 1 << 16)
            return re.sub(r"\x1b\[[0-9;]*m", "", text.removesuffix(_END).decode())

        yield stream, written
    os.close(reader)


def drawings(text: str) -> list[str]:
    """Return each state of the line that is redrawn in place."""
    return re.split(r"\r\x1b\[2K|\r\n", text)


def test_progress_is_one_line_with_rate_time_left_and_details() -> None:
    assert progress_text(RECORD) == PLAIN
    assert progress_text(RECORD | {"total": None, "rate": 0.5}) == "images 00000  30 images  2.0 s each  failed 3"


def test_without_a_terminal_the_console_writes_plain_lines() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.progress(RECORD)
    console.line("done")
    console.table([("arm", "score"), ("uniform", "0.5 " * 100)], indent="  ")
    lines = stream.getvalue().splitlines()
    assert lines[:3] == [f"    {PLAIN}", "done", "  arm      score"]
    assert lines[3:] == ["  uniform  " + ("0.5 " * 100).rstrip()]


def test_on_a_terminal_a_bar_is_redrawn_and_gives_way_to_lines() -> None:
    with terminal(100) as (stream, written):
        console = Console(stream)
        console.progress(RECORD)
        console.progress(RECORD | {"done": 90})
        console.line("done")
        first, second, line = drawings(written())[1:4]
    assert first.startswith("    images 00000  ━━━━━━━━╺━━━") and first.endswith(PLAIN.removeprefix("images 00000"))
    assert second.count("━") == 24 and "90/90 images" in second
    assert line == "done"


@pytest.mark.parametrize("columns", [20, 45, 70])
def test_a_narrow_terminal_takes_the_bar_first_and_never_wraps(columns: int) -> None:
    with terminal(columns) as (stream, written):
        Console(stream).progress(RECORD)
        drawn = drawings(written())[1]
    assert len(drawn) < columns
    assert ("━" in drawn) == (columns == 70)
    assert "30/90" in drawn


def test_cells_fold_to_fit_a_terminal() -> None:
    with terminal(30) as (stream, written):
        Console(stream).table([("1", "x" * 40, "end")], indent="  ")
        assert written().splitlines() == [f"  1  {'x' * 20}  end", f"     {'x' * 20}"]


def test_table_columns_count_wide_characters_and_take_no_markup() -> None:
    assert table([("日本", "a"), ("[red]", "b")], stream=io.StringIO()).splitlines() == ["日本   a", "[red]  b"]


def test_progress_ends_its_bar_with_a_line_break() -> None:
    with terminal(80) as (stream, written):
        with Progress("lint", 4, "shards", stream=stream) as progress:
            progress.advance(4, findings=2)
        states = drawings(written())
    assert states[-1] == "" and states[-2].startswith("lint  ") and "4/4 shards" in states[-2]
    assert states[-2].endswith("findings 2")


def test_a_parent_process_gets_json_lines_even_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS_JSON, "1")
    with terminal(80) as (stream, written):
        with Progress("lint", 4, "shards", stream=stream) as progress:
            progress.advance(4, findings=2)
        last = json.loads(written().splitlines()[-1])["progress"]
    assert (last["label"], last["done"], last["total"], last["noun"]) == ("lint", 4, 4, "shards")
    assert last["details"] == {"findings": 2}
