"""How a number looks in every form of a report: one function per unit.

A missing number is `MISSING`. Minus is the real minus sign, so that it does not break away from its digits.
"""

from __future__ import annotations

MISSING = "–"
_CORRELATIONS = ("matthews", "mcc", "spearman", "pearson", "correlation")


def megabytes(size: int | None) -> str:
    """``91_012_345`` → ``91.0``; 1 MB is 10^6 bytes."""
    return MISSING if size is None else _significant(size / 1e6)


def milliseconds(time: float | None) -> str:
    """``17.91`` → ``17.9``, ``4.604`` → ``4.60``, ``148.2`` → ``148``."""
    return MISSING if time is None else _significant(time)


def ratio(value: float | None) -> str:
    """``3.941`` → ``3.94×``, ``12.13`` → ``12.1×``."""
    return MISSING if value is None else f"{_significant(value)}×"


def ratio_interval(ends: tuple[float, float] | None) -> str:
    """``(2.9, 3.12)`` → ``[2.90, 3.12]``."""
    return "" if ends is None else f"[{_significant(ends[0])}, {_significant(ends[1])}]"


def hundredths(fraction: float) -> str:
    """A metric: ``0.8994`` → ``89.9``, for fractions (percent) and correlations (× 100) alike."""
    return _minus(f"{fraction * 100:.1f}")


def hundredths_interval(ends: tuple[float, float]) -> str:
    """``(0.87, 0.917)`` → ``[87.0, 91.7]``."""
    return f"[{hundredths(ends[0])}, {hundredths(ends[1])}]"


def points(difference: float) -> str:
    """A difference of two metrics in points: ``-0.0121`` → ``−1.2``, ``0.004`` → ``+0.4``, ``0`` → ``0.0``."""
    text = f"{difference * 100:+.1f}"
    return "0.0" if float(text) == 0 else _minus(text)


def points_interval(ends: tuple[float, float]) -> str:
    """``(-0.021, 0.004)`` → ``[−2.1, +0.4]``."""
    return f"[{points(ends[0])}, {points(ends[1])}]"


def p_value(value: float) -> str:
    """``p = 0.042``, or ``p < 0.001``."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def percent(part: int, whole: int) -> str:
    """``percent(61, 100)`` → ``61.0 %``."""
    return f"{100 * part / whole:.1f} %" if whole else MISSING


def seconds(time: float) -> str:
    """``754.2`` → ``12 min 34 s``, ``3.14`` → ``3.1 s``."""
    if time < 60:
        return f"{time:.1f} s"
    minutes, rest = divmod(round(time), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def whole(count: int) -> str:
    """``22713216`` → ``22,713,216``."""
    return f"{count:,}"


def plain(value: float) -> str:
    """A limit or a gate's value: at most two decimals, more only where these would show nothing."""
    value = value or 0.0  # a drop of −0.0 is none
    text = f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"
    return _minus(text)


def metric_title(name: str) -> str:
    """``accuracy`` → ``accuracy, %``; ``matthews`` → ``matthews, ×100``: both columns then count in points."""
    words = name.replace("_", " ")
    return f"{words}, ×100" if any(word in name.lower() for word in _CORRELATIONS) else f"{words}, %"


def _significant(value: float) -> str:
    """Three figures: what a measurement of this kind can bear."""
    magnitude = abs(value)
    for digits, floor in ((0, 99.95), (1, 9.995), (2, 0.9995)):
        if magnitude >= floor:
            return _minus(f"{value:.{digits}f}")
    return _minus(f"{value:.3f}")


def _minus(text: str) -> str:
    return text.replace("-", "−")
