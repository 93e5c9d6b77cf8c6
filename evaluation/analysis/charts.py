"""Draws charts as SVG text: the same bytes on every machine, with colours for light and dark mode.

It does not use matplotlib, whose output depends on its version and the installed fonts and cannot follow the reader's
colour scheme.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LIGHT_COLOURS = ("#5b6470", "#0b7285", "#2f9e44", "#e8590c", "#9c36b5", "#d6336c", "#1864ab", "#b08900")
DARK_COLOURS = ("#a9b4c2", "#3bc9db", "#69db7c", "#ffa94d", "#da77f2", "#faa2c1", "#74c0fc", "#ffe066")

_VARIABLES_LIGHT = "--ink:#1c2430;--muted:#6b7480;--grid:#dfe3e8;--above:#c2410c;--below:#1864ab;--accent:#0b7285;"
_VARIABLES_DARK = "--ink:#e6e9ee;--muted:#98a2af;--grid:#343c47;--above:#ff922b;--below:#4dabf7;--accent:#3bc9db;"

CHART_STYLE = """\
.chart text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;fill:var(--muted)}
.chart text.title{font-size:12px;font-weight:600;fill:var(--ink)}
.chart .grid{stroke:var(--grid);stroke-width:1}
.chart .line{fill:none;stroke-width:1.6;stroke-linejoin:round}
.chart .band{stroke:none;opacity:.16}
.chart .rule{stroke:var(--muted);stroke-width:1;stroke-dasharray:4 3}
.chart .range{stroke:var(--ink);stroke-width:1;opacity:.55}
.chart .frame{fill:none;stroke:var(--grid)}
"""


def palette(dark: bool) -> str:
    """Return the CSS variables that define the charts' colours."""
    colours = DARK_COLOURS if dark else LIGHT_COLOURS
    return (_VARIABLES_DARK if dark else _VARIABLES_LIGHT) + "".join(
        f"--s{index}:{colour};" for index, colour in enumerate(colours)
    )


@dataclass(frozen=True)
class Series:
    """A line: its name, points and colour number. `low` and `high` draw a band behind it."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """A drawing with its size in px, to be placed in a page or a file."""

    width: float
    height: float
    body: str


def number(value: float) -> str:
    """Return a coordinate with at most two decimals and no trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def tick_label(value: float) -> str:
    text = f"{value:.6g}"
    return text.replace("-", "−")


def _text(x: float, y: float, content: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{number(x)}" y="{number(y)}" text-anchor="{anchor}"{extra}>{escape(content)}</text>'


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: float = 540,
    height: float = 280,
    y_range: tuple[float, float] | None = None,
    rule_at: float | None = None,
    rule_label: str = "",
) -> Panel:
    """Draw lines over one x axis; a dashed rule marks a value of y. A point that is not finite breaks its line."""
    left, right, top, bottom = 58.0, 14.0, 30.0, 40.0
    xs = [x for item in series for x in item.xs]
    if not xs:
        raise ValueError(f"chart {title!r}: nothing to draw")
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = y_range or _range_of(series, rule_at)

    def to_x(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def to_y(y: float) -> float:
        return height - bottom - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = [_text(left, 16, title, extra=' class="title"')]
    for tick in nice_ticks(y_low, y_high):
        y = to_y(tick)
        parts.append(f'<path class="grid" d="M{number(left)} {number(y)}H{number(width - right)}"/>')
        parts.append(_text(left - 7, y + 4, tick_label(tick), "end"))
    ticks = nice_ticks(x_low, x_high, 7)
    parts += [_text(to_x(tick), height - bottom + 16, tick_label(tick), "middle") for tick in ticks]
    parts.append(_text((left + width - right) / 2, height - 6, x_label, "middle"))
    middle = (top + height - bottom) / 2
    parts.append(_text(14, middle, y_label, "middle", f' transform="rotate(-90 14 {number(middle)})"'))
    if rule_at is not None:
        parts.append(f'<path class="rule" d="M{number(left)} {number(to_y(rule_at))}H{number(width - right)}"/>')
        parts.append(_text(width - right - 4, to_y(rule_at) - 5, rule_label, "end"))
    for item in series:
        if item.low is not None and item.high is not None:
            points = [*zip(item.xs, item.high, strict=True), *reversed(list(zip(item.xs, item.low, strict=True)))]
            outline = "L".join(f"{number(to_x(x))} {number(to_y(y))}" for x, y in points)
            parts.append(f'<path class="band" fill="var(--s{item.colour})" d="M{outline}Z"/>')
    for item in series:
        path, pen_down = [], False
        for x, y in zip(item.xs, item.ys, strict=True):
            if not math.isfinite(y):
                pen_down = False
                continue
            path.append(f"{'L' if pen_down else 'M'}{number(to_x(x))} {number(to_y(y))}")
            pen_down = True
        title_element = f"<title>{escape(item.name)}</title>"
        parts.append(f'<path class="line" stroke="var(--s{item.colour})" d="{"".join(path)}">{title_element}</path>')
    return Panel(width, height, "".join(parts))


def legend(series: Sequence[Series], *, width: float = 540, per_row: int = 5) -> Panel:
    """Draw the names of a chart's lines, each with a dot of its colour."""
    left, row_height = 58.0, 18.0
    parts = []
    for index, item in enumerate(series):
        x = left + index % per_row * (width - left) / per_row
        y = 10 + index // per_row * row_height
        parts.append(f'<circle cx="{number(x)}" cy="{number(y)}" r="4" fill="var(--s{item.colour})"/>')
        parts.append(_text(x + 8, y + 4, item.name))
    return Panel(width, row_height * (1 + (len(series) - 1) // per_row) + 6, "".join(parts))


def _range_of(series: Sequence[Series], rule_at: float | None) -> tuple[float, float]:
    values = [y for item in series for ys in (item.ys, item.low, item.high) if ys is not None for y in ys]
    values = [y for y in values if math.isfinite(y)] + ([rule_at] if rule_at is not None else [])
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
    return low - margin, high + margin


def bar_chart(
    values: Sequence[float],
    *,
    title: str,
    x_label: str,
    y_label: str,
    colour: int = 0,
    lows: Sequence[float] | None = None,
    highs: Sequence[float] | None = None,
    rule_at: float | None = None,
    rule_label: str = "",
    width: float = 540,
    height: float = 200,
) -> Panel:
    """Draw one bar per value, up or down from zero, numbered from 1.

    `lows` and `highs` add a thin range line; a dashed rule marks a value of y.
    """
    left, right, top, bottom = 58.0, 14.0, 30.0, 40.0
    y_high = 1.08 * max([0.0, *values, *(highs or ()), rule_at or 0.0])
    y_low = 1.08 * min([0.0, *values, *(lows or ()), rule_at or 0.0])
    y_high = y_high if y_high > y_low else y_low + 1.0
    slot = (width - left - right) / len(values)

    def to_y(y: float) -> float:
        return height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = [_text(left, 16, title, extra=' class="title"')]
    for tick in nice_ticks(y_low, y_high, 4):
        parts.append(f'<path class="grid" d="M{number(left)} {number(to_y(tick))}H{number(width - right)}"/>')
        parts.append(_text(left - 7, to_y(tick) + 4, tick_label(tick), "end"))
    for index, value in enumerate(values):
        x = left + index * slot
        parts.append(
            f'<rect x="{number(x + 0.14 * slot)}" y="{number(to_y(max(value, 0.0)))}" width="{number(0.72 * slot)}" '
            f'height="{number(abs(to_y(0.0) - to_y(value)))}" fill="var(--s{colour})"><title>{index + 1}: '
            f"{tick_label(value)}</title></rect>"
        )
        if lows is not None and highs is not None and highs[index] - lows[index] > 1e-9:
            middle = number(x + 0.5 * slot)
            parts.append(
                f'<path class="range" d="M{middle} {number(to_y(lows[index]))}V{number(to_y(highs[index]))}"/>'
            )
    if rule_at is not None:
        parts.append(f'<path class="rule" d="M{number(left)} {number(to_y(rule_at))}H{number(width - right)}"/>')
        parts.append(_text(width - right, height - 6, rule_label, "end"))
    parts += [
        _text(left + (index + 0.5) * slot, height - bottom + 16, str(index + 1), "middle")
        for index in _label_indices(len(values), max(1, int((width - left - right) // 30)))
    ]
    parts.append(_text((left + width - right) / 2, height - 6, x_label, "middle"))
    middle_y = number((top + height - bottom) / 2)
    parts.append(_text(14, float(middle_y), y_label, "middle", f' transform="rotate(-90 14 {middle_y})"'))
    return Panel(width, height, "".join(parts))


def heatmap(
    matrix: Sequence[Sequence[float]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    row_names: Sequence[str],
    column_names: Sequence[str],
    centre: float,
    scale: float,
    width: float = 540,
    cell_height: float = 12.0,
) -> Panel:
    """Draw one cell per value: a warm colour above `centre`, a cold one below, fully opaque `scale` away from it."""
    left, right, top, bottom = 58.0, 14.0, 30.0, 40.0
    num_columns = len(column_names)
    cell_width = (width - left - right) / num_columns
    height = top + bottom + cell_height * len(row_names)
    parts = [_text(left, 16, title, extra=' class="title"')]
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            strength = min(abs(value - centre) / scale, 1.0) if scale > 0 else 0.0
            if strength < 0.004:
                continue
            colour = "above" if value > centre else "below"
            x, y = left + column * cell_width, top + row * cell_height
            parts.append(
                f'<rect x="{number(x)}" y="{number(y)}" width="{number(cell_width)}" height="{number(cell_height)}" '
                f'fill="var(--{colour})" fill-opacity="{number(strength)}"/>'
            )
    frame_width, frame_height = cell_width * num_columns, cell_height * len(row_names)
    parts.append(
        f'<rect class="frame" x="{number(left)}" y="{number(top)}" width="{number(frame_width)}" '
        f'height="{number(frame_height)}"/>'
    )
    parts += [
        _text(left - 7, top + (row + 0.5) * cell_height + 4, row_names[row], "end")
        for row in _label_indices(len(row_names), max(1, int(frame_height // 14)))
    ]
    parts += [
        _text(left + (column + 0.5) * cell_width, height - bottom + 16, column_names[column], "middle")
        for column in _label_indices(num_columns, max(1, int(frame_width // 30)))
    ]
    parts.append(_text((left + width - right) / 2, height - 6, x_label, "middle"))
    middle = top + frame_height / 2
    parts.append(_text(14, middle, y_label, "middle", f' transform="rotate(-90 14 {number(middle)})"'))
    return Panel(width, height, "".join(parts))


@dataclass(frozen=True)
class IntervalRow:
    """A row of an interval chart: its name, (value, low, high) or None without scores, and colour number."""

    name: str
    value: tuple[float, float, float] | None
    colour: int = 0


def interval_chart(
    rows: Sequence[IntervalRow], *, title: str, width: float = 320, row_height: float = 26.0, names: bool = True
) -> Panel:
    """Draw one dot with its interval per row, and a dashed rule at the first row's value."""
    left, right, top, bottom = (112.0 if names else 12.0), 16.0, 30.0, 26.0
    height = top + bottom + row_height * len(rows)
    parts = [_text(left, 16, title, extra=' class="title"')]
    shown = [item.value for item in rows if item.value is not None]
    if names:
        parts += [
            _text(left - 10, top + (index + 0.5) * row_height + 4, item.name, "end") for index, item in enumerate(rows)
        ]
    if not shown:
        return Panel(width, height, "".join([*parts, _text(left, top + 20, "no scores")]))
    x_low, x_high = min(low for _, low, _ in shown), max(high for _, _, high in shown)
    margin = 0.05 * (x_high - x_low) or max(abs(x_high), 1.0) * 0.05
    x_low, x_high = x_low - margin, x_high + margin

    def to_x(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    for tick in nice_ticks(x_low, x_high, 4):
        x = number(to_x(tick))
        parts.append(f'<path class="grid" d="M{x} {number(top)}V{number(height - bottom)}"/>')
        parts.append(_text(to_x(tick), height - bottom + 16, tick_label(tick), "middle"))
    if rows[0].value is not None:
        x = number(to_x(rows[0].value[0]))
        parts.append(f'<path class="rule" d="M{x} {number(top)}V{number(height - bottom)}"/>')
    for index, item in enumerate(rows):
        if item.value is None:
            continue
        value, low, high = item.value
        y = number(top + (index + 0.5) * row_height)
        parts.append(
            f'<path class="line" stroke="var(--s{item.colour})" d="M{number(to_x(low))} {y}H{number(to_x(high))}"/>'
            f'<circle cx="{number(to_x(value))}" cy="{y}" r="4" fill="var(--s{item.colour})">'
            f"<title>{escape(item.name)}: {tick_label(value)} [{tick_label(low)}, {tick_label(high)}]</title></circle>"
        )
    return Panel(width, height, "".join(parts))


def _label_indices(count: int, max_labels: int) -> list[int]:
    step = next((step for step in (1, 2, 3, 4, 5, 6, 10, 12, 20, 50) if count / step <= max_labels), count)
    return list(range(0, count, step))


def inline_svg(panels: Sequence[Panel], description: str) -> str:
    """Return panels, stacked, as one SVG element for a page that includes the palette and `CHART_STYLE`."""
    width = max(panel.width for panel in panels)
    height = sum(panel.height for panel in panels)
    parts, offset = [], 0.0
    for panel in panels:
        parts.append(f'<g transform="translate(0 {number(offset)})">{panel.body}</g>')
        offset += panel.height
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(description)}" '
        f'viewBox="0 0 {number(width)} {number(height)}" width="{number(width)}" height="{number(height)}">'
        f"{''.join(parts)}</svg>"
    )


def standalone_svg(panels: Sequence[Panel], description: str) -> str:
    """Return panels, stacked, as an SVG file that includes its own colours for light and dark mode."""
    style = (
        f"<style>svg{{{palette(dark=False)}background:#fff}}\n{CHART_STYLE}"
        f"@media (prefers-color-scheme:dark){{svg{{{palette(dark=True)}background:#14181d}}}}</style>"
    )
    svg = inline_svg(panels, description)
    head, _, body = svg.partition(">")
    return f"{head}>{style}{body}\n"
