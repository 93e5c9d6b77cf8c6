"""Figures as people read them: three digits and the unit that fits, with a letter for where they come from."""

from orchestration.cost.quantity import Basis, Figure

_COUNTS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))
_BYTES = ((1e18, " EB"), (1e15, " PB"), (1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))
_MINUTE, _HOUR, _DAY, _YEAR = 60, 3600, 86_400, 365.25 * 86_400
_PLAIN_COUNT = 10_000
_SMALL = 1e-9
UNKNOWN_WORD = "?"
LETTERS = {Basis.PROFILE: "p", Basis.MEASURED: "m", Basis.ASSUMED: "a"}


def three_digits(value: float) -> str:
    """Return a number below 1,000 with three digits at most, and without zeros that say nothing."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.2g}" if value < 1 else f"{value:.3g}"


def count_text(value: float) -> str:
    """Return a number of things: ``553``, ``9,600``, ``413 M``."""
    if value < _PLAIN_COUNT:
        return f"{value:,.0f}"
    return _scaled(value, _COUNTS, "")


def bytes_text(value: float) -> str:
    """Return bytes in powers of ten: ``13.7 TB``."""
    return _scaled(value, _BYTES, " B")


def time_text(seconds: float) -> str:
    """Return a time: ``41 s``, ``12 min``, ``5.2 h``, ``3.4 days``, ``2.1 years``."""
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


def with_letter(text: str, figure: Figure) -> str:
    """Return a printed number with the letter of its source; one that is not known is a question mark."""
    return f"{text} {LETTERS[figure.basis]}" if figure.is_known else f"{UNKNOWN_WORD}  "


def _large(value: float) -> str:
    return three_digits(value) if value < 1000 else count_text(value)


def _scaled(value: float, units: tuple[tuple[float, str], ...], plain: str) -> str:
    for unit, name in units:
        if value >= unit * 0.9995:
            return three_digits(value / unit) + name
    return f"{value:.0f}{plain}"
