"""An estimate as text for a terminal: stages, totals, filtering on several machines, notes and sources.

Numbers have three digits, a readable unit, and a letter for their weakest source.
"""

import textwrap
from collections.abc import Callable, Sequence

from orchestration.cost.inputs import ProfileInputs
from orchestration.cost.types import RunEstimate
from pipelines.core.quantity import Basis, Quantity

_COUNTS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))
_BYTES = ((1e18, " EB"), (1e15, " PB"), (1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))
_MINUTE, _HOUR, _DAY, _YEAR = 60, 3600, 86_400, 365.25 * 86_400
_PLAIN_COUNT = 10_000
_SMALL = 1e-9
UNKNOWN_WORD = "?"
LETTERS = {Basis.PROFILE: "p", Basis.MEASURED: "m", Basis.ASSUMED: "a"}
_WIDTH = 118
_INDENT = "  "
_WORDS = {
    Basis.PROFILE: "from the profile",
    Basis.MEASURED: "measured on this machine",
    Basis.ASSUMED: "assumed in part",
}


def estimate_lines(result: RunEstimate, inputs: ProfileInputs) -> list[str]:
    """Return the lines to print."""
    legend = ", ".join(f"{letter} {_WORDS[basis]}" for basis, letter in LETTERS.items())
    used = _sources_used(result)
    return [
        f"profile {result.profile}: {_cell(count_text, result.rows)} rows of metadata in "
        f"{_cell(count_text, result.parts)} files become {_cell(count_text, result.samples)} samples",
        legend,
        "",
        *_aligned(_stage_rows(result), num_left=1, has_sum=True),
        "",
        *_paragraph(_explanation(result)),
        "",
        "filtering all metadata, including dedup across files (throughline subset)",
        *_aligned(_filtering_rows(result), num_left=1),
        "",
        "notes",
        *(line for note in result.notes for line in _paragraph(note, mark="- ")),
        "",
        *_source_lines(used, inputs),
    ]


def _explanation(result: RunEstimate) -> str:
    legend = "time: wall-clock, stages in sequence. writes: without temporary files"
    scratch = result.totals()["scratch_bytes"]
    if not scratch.value:
        return f"{legend}."
    return f"{legend}; snapshots take another {_cell(bytes_text, scratch)} during training."


def _sources_used(result: RunEstimate) -> dict[Basis, list[str]]:
    """Return the names of the sources of the quantities shown, by basis."""
    quantities: list[Quantity] = [result.rows, result.samples, result.epochs]
    for stage in result.stages:
        quantities += [stage.rows_out, stage.bytes_in, stage.bytes_out, stage.requests, stage.seconds, stage.nodes]
    for row in result.filtering:
        quantities += [row.seconds, row.memory_bytes]
    found = frozenset().union(*(quantity.sources for quantity in quantities))
    return {basis: sorted(item.name for item in found if item.basis is basis) for basis in Basis}


def _stage_rows(result: RunEstimate) -> list[list[str]]:
    heads = ["stage", "rows in", "rows out", "reads", "writes", "requests", "time", "nodes", "GPUs", "GPU time"]
    rows = [[*heads, "limit"]]
    for stage in result.stages:
        gpus = stage.gpus.value != 0
        if stage.partition is not None and rows[-1][0] != stage.stage and not rows[-1][0].startswith(_INDENT):
            rows.append([stage.stage, *[""] * len(heads)])
        rows.append(
            [
                _INDENT + stage.partition if stage.partition else stage.stage,
                _cell(count_text, stage.rows_in),
                _cell(count_text, stage.rows_out),
                _cell(bytes_text, stage.bytes_in),
                _cell(bytes_text, stage.bytes_out),
                _cell(count_text, stage.requests) if stage.requests.value else "",
                _cell(time_text, stage.seconds),
                _cell(count_text, stage.nodes),
                _cell(count_text, stage.gpus) if gpus else "",
                _cell(gpu_time_text, stage.gpu_seconds) if gpus else "",
                stage.limit,
            ]
        )
    sums = result.totals()
    rows.append(
        [
            "total", "", "", "", _cell(bytes_text, sums["bytes_out"]), _cell(count_text, sums["requests"]),
            _cell(time_text, sums["seconds"]), "", "",
            _cell(gpu_time_text, sums["gpu_seconds"]) if sums["gpu_seconds"].value else "", "",
        ]
    )  # fmt: skip
    return rows


def _filtering_rows(result: RunEstimate) -> list[list[str]]:
    rows = [["machines", "processes each", "memory each", "time", "dedup across files"]]
    rows += [
        [
            str(row.nodes),
            _cell(count_text, row.processes),
            _cell(bytes_text, row.memory_bytes),
            _cell(time_text, row.seconds),
            _cell(time_text, row.selection_seconds),
        ]
        for row in result.filtering
    ]
    return rows


def _source_lines(used: dict[Basis, list[str]], inputs: ProfileInputs) -> list[str]:
    values = inputs.assumptions.model_dump()
    assumed = [name if values[name] is None else f"{name}={_short(values[name])}" for name in used[Basis.ASSUMED]]
    measured = [f"{name}={inputs.measured[name].value:.4g}" for name in used[Basis.MEASURED]]
    lines = _paragraph("assumed: " + ", ".join(assumed) + " (--assume NAME=VALUE; --reasons explains them)")
    if measured:
        lines += _paragraph("measured: " + ", ".join(measured))
        lines += _paragraph("from: " + "; ".join(sorted({inputs.measured[name].what for name in used[Basis.MEASURED]})))
    return lines


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _cell(text_of: Callable[[float], str], quantity: Quantity) -> str:
    return with_letter(text_of(quantity.value) if quantity.is_known else "", quantity)


def _aligned(rows: Sequence[Sequence[str]], *, num_left: int, has_sum: bool = False) -> list[str]:
    """Return an aligned table: `num_left` columns and a last column "limit" to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    last_is_words = rows[0][-1] == "limit"
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < num_left or (last_is_words and column == len(row) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    if has_sum:
        lines.insert(-1, "  " + "-" * (max(map(len, lines)) - 2))
    return lines


def _paragraph(text: str, mark: str = "") -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent="  " + mark, subsequent_indent="  " + " " * len(mark), break_on_hyphens=False
    )


def three_digits(value: float) -> str:
    """Return a number below 1,000 with three digits at most, without trailing zeros."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.2g}" if value < 1 else f"{value:.3g}"


def count_text(value: float) -> str:
    """Return a count: ``553``, ``9,600``, ``413 M``."""
    if value < _PLAIN_COUNT:
        return f"{value:,.0f}"
    return _scaled(value, _COUNTS, "")


def bytes_text(value: float) -> str:
    """Return bytes in decimal units: ``13.7 TB``."""
    return _scaled(value, _BYTES, " B")


def time_text(seconds: float) -> str:
    """Return a duration: ``41 s``, ``12 min``, ``5.2 h``, ``3.4 days``, ``2.1 years``."""
    if seconds >= _YEAR:
        return f"{_large(seconds / _YEAR)} years"
    for unit, name in ((_DAY, "days"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= 2 * unit:
            return f"{three_digits(seconds / unit)} {name}"
    return "0 s" if seconds < _SMALL else f"{three_digits(seconds)} s"


def gpu_time_text(seconds: float) -> str:
    """Return GPU time in hours."""
    hours = seconds / _HOUR
    return f"{count_text(hours) if hours >= 1000 else three_digits(hours)} h" if hours > _SMALL else "0 h"


def with_letter(text: str, quantity: Quantity) -> str:
    """Return a printed number with the letter of its basis, or a question mark where it is unknown."""
    return f"{text} {LETTERS[quantity.basis]}" if quantity.is_known else f"{UNKNOWN_WORD}  "


def _large(value: float) -> str:
    return three_digits(value) if value < 1000 else count_text(value)


def _scaled(value: float, units: tuple[tuple[float, str], ...], plain: str) -> str:
    for unit, name in units:
        if value >= unit * 0.9995:
            return three_digits(value / unit) + name
    return f"{value:.0f}{plain}"
