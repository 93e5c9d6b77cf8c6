"""The funnel of a subset: the rows that each rule dropped, as lines for the terminal and as an SVG chart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_LABEL_PX = 190
_BARS_PX = 420
_ROW_PX = 22
_TOP_PX = 40
_STYLE = """\
svg{color-scheme:light dark;--ink:#1c2430;--muted:#6b7480;--rest:#0b7285;--lost:#c2410c;--back:#fff}
@media (prefers-color-scheme:dark){svg{--ink:#e6e9ee;--muted:#98a2af;--rest:#3bc9db;--lost:#ff922b;--back:#14181f}}
text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--muted)}
text.name{fill:var(--ink)}text.title{font-size:13px;font-weight:600;fill:var(--ink)}
.rest{fill:var(--rest);opacity:.75}.lost{fill:var(--lost);opacity:.85}.back{fill:var(--back)}
"""


@dataclass(frozen=True)
class RuleDrops:
    """A rule in order of application: the rows it dropped, and the rows left after it."""

    reason: str
    dropped: int
    left: int


def steps_of(rows_in: int, dropped: Mapping[str, int], order: Sequence[str]) -> list[RuleDrops]:
    """Return the rules that dropped rows, in the order in which they were applied."""
    steps, left = [], rows_in
    for reason in order:
        if num_dropped := dropped.get(reason, 0):
            left -= num_dropped
            steps.append(RuleDrops(reason, num_dropped, left))
    return steps


def funnel_lines(rows_in: int, steps: Sequence[RuleDrops]) -> list[str]:
    """Return a table: reason, rows dropped, share of all rows, rows left."""
    width = max([len(f"{rows_in:,}"), len("rows left")])
    lines = [
        f"{'':<24}{'dropped':>{width}}  {'of all':>7}  {'rows left':>{width}}",
        f"{'rows':<24}{'':>{width}}  {'':>7}  {rows_in:>{width},}",
    ]
    for step in steps:
        share = f"{step.dropped / rows_in:.2%}"
        lines.append(f"{step.reason:<24}{step.dropped:>{width},}  {share:>7}  {step.left:>{width},}")
    left = steps[-1].left if steps else rows_in
    lines.append(f"{'kept':<24}{'':>{width}}  {f'{left / rows_in:.2%}' if rows_in else '':>7}  {left:>{width},}")
    return lines


def funnel_svg(title: str, rows_in: int, steps: Sequence[RuleDrops]) -> str:
    """Return an SVG bar chart with a bar per rule: rows left in one colour, rows dropped in another."""
    bars = [("rows", 0, rows_in), *((step.reason, step.dropped, step.left) for step in steps)]
    height = _TOP_PX + _ROW_PX * len(bars) + 12
    width = _LABEL_PX + _BARS_PX + 190
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f'<rect class="back" width="{width}" height="{height}"/>'
        f'<text class="title" x="12" y="24">{escape(title)}</text>'
    ]
    for number, (name, dropped, left) in enumerate(bars):
        y = _TOP_PX + number * _ROW_PX
        rest_px, dropped_px = (_BARS_PX * count / max(rows_in, 1) for count in (left, dropped))
        end_px, bar = _LABEL_PX + rest_px, f'y="{y + 3}" height="{_ROW_PX - 6}"'
        label = f"{left:,}" if not dropped else f"{left:,}  (-{dropped:,}, {dropped / rows_in:.1%})"
        parts.append(
            f'<text class="name" x="{_LABEL_PX - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="rest" x="{_LABEL_PX}" width="{rest_px:.1f}" {bar}/>'
            f'<rect class="lost" x="{end_px:.1f}" width="{dropped_px:.1f}" {bar}/>'
            f'<text x="{end_px + dropped_px + 6:.1f}" y="{y + 14}">{label}</text>'
        )
    return "".join(parts) + "</svg>\n"
