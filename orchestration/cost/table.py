"""An estimate for a terminal: the stages, the sums, filtering on several machines, and the sentences."""

import textwrap
from collections.abc import Callable, Sequence

from orchestration.cost.inputs import Inputs
from orchestration.cost.quantity import Basis, Figure
from orchestration.cost.stages import Estimate
from orchestration.cost.units import LETTERS, bytes_text, count_text, gpu_time_text, time_text, with_letter

_WIDTH = 118
_INDENT = "  "
_WORDS = {
    Basis.PROFILE: "from the profile alone",
    Basis.MEASURED: "measured on this machine",
    Basis.ASSUMED: "rests on an assumption",
}


def estimate_lines(result: Estimate, inputs: Inputs) -> list[str]:
    """Return the lines to print."""
    legend = ", ".join(f"{letter} {_WORDS[basis]}" for basis, letter in LETTERS.items())
    used = inputs_used(result)
    return [
        f"profile {result.profile}: {_cell(count_text, result.rows)} rows of metadata in "
        f"{_cell(count_text, result.parts)} files become {_cell(count_text, result.samples)} samples",
        legend,
        "",
        *_aligned(_stage_rows(result), num_left=1, has_sum=True),
        "",
        *_paragraph(_explanation(result)),
        "",
        "filtering all metadata, duplicates between files included (throughline subset)",
        *_aligned(_filtering_rows(result), num_left=1),
        "",
        "worth knowing",
        *(line for note in result.notes for line in _paragraph(note, mark="- ")),
        "",
        *_basis_lines(used, inputs),
    ]


def _explanation(result: Estimate) -> str:
    said = "time: on the wall, stages one after the other. writes: what stays"
    scratch = result.totals()["scratch_bytes"]
    if not scratch.value:
        return f"{said}."
    return f"{said}; snapshots take another {_cell(bytes_text, scratch)} while a strategy is trained."


def inputs_used(result: Estimate) -> dict[Basis, list[str]]:
    """Return the names of the inputs that the figures shown rest on, by source."""
    figures: list[Figure] = [result.rows, result.samples, result.epochs]
    for stage in result.stages:
        figures += [stage.rows_out, stage.bytes_in, stage.bytes_out, stage.requests, stage.seconds, stage.nodes]
    for row in result.filtering:
        figures += [row.seconds, row.memory_bytes]
    found = frozenset().union(*(figure.inputs for figure in figures))
    return {basis: sorted(item.name for item in found if item.basis is basis) for basis in Basis}


def _stage_rows(result: Estimate) -> list[list[str]]:
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
            "together", "", "", "", _cell(bytes_text, sums["bytes_out"]), _cell(count_text, sums["requests"]),
            _cell(time_text, sums["seconds"]), "", "",
            _cell(gpu_time_text, sums["gpu_seconds"]) if sums["gpu_seconds"].value else "", "",
        ]
    )  # fmt: skip
    return rows


def _filtering_rows(result: Estimate) -> list[list[str]]:
    rows = [["machines", "processes on each", "memory of each", "time", "of it between files"]]
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


def _basis_lines(used: dict[Basis, list[str]], inputs: Inputs) -> list[str]:
    values = inputs.assumptions.model_dump()
    assumed = [name if values[name] is None else f"{name}={_short(values[name])}" for name in used[Basis.ASSUMED]]
    measured = [f"{name}={inputs.measured[name].value:.4g}" for name in used[Basis.MEASURED]]
    lines = _paragraph("assumed: " + ", ".join(assumed) + " (--assume NAME=VALUE; --reasons tells why)")
    if measured:
        lines += _paragraph("measured: " + ", ".join(measured))
        lines += _paragraph("from: " + "; ".join(sorted({inputs.measured[name].what for name in used[Basis.MEASURED]})))
    return lines


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _cell(text_of: Callable[[float], str], figure: Figure) -> str:
    return with_letter(text_of(figure.value) if figure.is_known else "", figure)


def _aligned(rows: Sequence[Sequence[str]], *, num_left: int, has_sum: bool = False) -> list[str]:
    """Return a table with `num_left` columns of words, then numbers to the right; a last column of words has no end."""
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
