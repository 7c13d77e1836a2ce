"""Where everything of a scatter chart lies: size or latency across (logarithmic), a metric upwards with its interval.

Geometry alone, in the units of the SVG's viewBox; the template draws it. Labels are placed so that none covers
another or a marker, and (where there is room) no whisker or leader.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from onnxsqueeze.report.numbers import hundredths, hundredths_interval, megabytes, metric_title, milliseconds
from onnxsqueeze.report.summary import Table, primary
from onnxsqueeze.results import Results, Target

WIDTH, HEIGHT = 460.0, 310.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 32.0, 44.0
FONT = 12.0
MARKER = 5.0  # half the width of a mark
_LABEL_HEIGHT = 15.0
_LABEL_CHARACTERS = 24
_TICK_GAP = 34.0  # least distance between two ticks' texts across


Line = tuple[float, float, float, float]  # x1, y1, x2, y2


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share any area; touching edges do not count."""
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: Box) -> bool:
        """Whether all of this one lies in the other."""
        return self.left >= other.left and self.right <= other.right and self.top >= other.top and self.bottom <= other.bottom


@dataclass(frozen=True)
class Point:
    """One target's data: ``x`` in its unit, the metric and its interval in hundredths."""

    name: str
    x: float
    y: float
    low: float
    high: float
    kind: str  # "baseline", "good", "worse"
    title: str


@dataclass(frozen=True)
class Mark:
    """A point's place, its whisker's ends and its label. ``leader`` joins a label that lies apart from its mark."""

    x: float
    y: float
    low: float
    high: float
    kind: str
    title: str
    label: str
    label_y: float
    box: Box | None  # None where no free place was left for the label
    leader: Line | None


@dataclass(frozen=True)
class Chart:
    """Everything that the template draws."""

    title: str
    summary: str  # the chart in one sentence, for those who do not see it
    x_title: str
    y_title: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    marks: tuple[Mark, ...]
    baseline_y: float | None
    gate_y: float | None
    gate: str


def charts(results: Results, table: Table) -> tuple[Chart, ...]:
    """Size against metric and latency against metric; none where fewer than two targets were measured."""
    metric = metric_title(results.task.primary)
    targets = [row.target for row in table.measured]
    sizes = [
        _point(results, t, t.size_bytes / 1e6, f"{megabytes(t.size_bytes)} MB") for t in targets if t.size_bytes and primary(results, t)
    ]
    times = [
        _point(results, t, t.latency.p50_ms, f"{milliseconds(t.latency.p50_ms)} ms") for t in targets if t.latency and primary(results, t)
    ]
    limits = {gate.limit for t in targets for gate in t.gates if gate.name == "metric_drop_pp"}
    drop = limits.pop() if len(limits) == 1 else None
    word = results.task.primary.replace("_", " ")
    drawn = [
        lay_out(f"Size against {word}", "size of the .onnx, MB (log scale)", metric, sizes, drop),
        lay_out(f"Latency against {word}", "p50 latency, ms (log scale)", metric, times, drop),
    ]
    return tuple(chart for chart in drawn if len(chart.marks) > 1)


def lay_out(title: str, x_title: str, y_title: str, points: Sequence[Point], drop: float | None = None) -> Chart:
    """Scale, ticks, marks and labels of one chart. ``drop``: a gate's distance below the baseline in points."""
    base = next((p.y for p in points if p.kind == "baseline"), None)
    gate = base - drop if base is not None and drop is not None else None
    if not points:
        return Chart(title, "", x_title, y_title, (), (), (), None, None, "")
    x_low, x_high = _widened(min(p.x for p in points), max(p.x for p in points))
    lows = [p.low for p in points] + ([gate] if gate is not None else [])
    y_low, y_high = min(lows), max(p.high for p in points)
    pad = max(0.06 * (y_high - y_low), 0.05)
    y_low, y_high = y_low - pad, y_high + pad

    def across(x: float) -> float:
        return LEFT + (math.log(x) - math.log(x_low)) / (math.log(x_high) - math.log(x_low)) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    return Chart(
        title=title,
        summary="; ".join(p.title for p in points),
        x_title=x_title,
        y_title=y_title,
        x_ticks=tuple((across(x), f"{x:g}") for x in _log_ticks(x_low, x_high)),
        y_ticks=tuple((down(y), f"{y:g}".replace("-", "−")) for y in _ticks(y_low, y_high, 6)),
        marks=tuple(_marks([(across(p.x), down(p.y), down(p.low), down(p.high), p) for p in points])),
        baseline_y=down(base) if base is not None else None,
        gate_y=down(gate) if gate is not None else None,
        gate=f"gate −{drop:g}" if drop is not None else "",
    )


def text_width(text: str) -> float:
    """An upper estimate of a label's width in viewBox units, for any of the common sans-serif faces."""
    return FONT * sum(1.05 if unicodedata.east_asian_width(c) in "WF" else 0.8 if c.isupper() or c in "mw@%—" else 0.6 for c in text)


def _point(results: Results, target: Target, x: float, measured: str) -> Point:
    value = primary(results, target)
    if value is None:
        raise ValueError(f"{target.name}: has no primary metric")
    kind = "baseline" if target.baseline else "worse" if target.vs_baseline and target.vs_baseline.quality == "worse" else "good"
    title = f"{target.name}: {measured}, {results.task.primary} {hundredths(value.value)} {hundredths_interval(value.ci95)}"
    return Point(target.name, x, value.value * 100, value.ci95[0] * 100, value.ci95[1] * 100, kind, title)


def _marks(placed: Sequence[tuple[float, float, float, float, Point]]) -> Iterator[Mark]:
    """Labels are placed one after another in four orders; the cheapest outcome is drawn."""
    orders: list[Callable[[int], float]] = [
        lambda i: placed[i][0],
        lambda i: -placed[i][0],
        lambda i: placed[i][1],
        lambda i: -placed[i][1],
    ]
    outcomes = [_labels(placed, sorted(range(len(placed)), key=order)) for order in orders]
    labels = min(outcomes, key=lambda outcome: outcome[0])[1]
    for i, (x, y, low, high, point) in enumerate(placed):
        box = labels.get(i)
        leader = _leader(x, y, box) if box else None
        yield Mark(x, y, low, high, point.kind, point.title, _label(point), box.bottom - 4 if box else y, box, leader)


def _label(point: Point) -> str:
    return point.name if len(point.name) <= _LABEL_CHARACTERS else f"{point.name[: _LABEL_CHARACTERS - 1]}…"


def _labels(placed: Sequence[tuple[float, float, float, float, Point]], order: Sequence[int]) -> tuple[float, dict[int, Box]]:
    """(cost, label boxes by point): for each point in turn the cheapest place that touches no label and no marker.

    A place costs its distance from the mark; lying on a whisker or having a leader across others costs more.
    """
    plot = Box(LEFT + 2, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM - 2)
    markers = [Box(x - MARKER - 1, y - MARKER - 1, x + MARKER + 1, y + MARKER + 1) for x, y, *_ in placed]
    whiskers = [Box(x - 1, high, x + 1, low) for x, _, low, high, _ in placed]
    boxes: dict[int, Box] = {}
    leaders: list[Line] = []
    total = 0.0
    for i in order:
        x, y, _, _, point = placed[i]
        others = [marker for j, marker in enumerate(markers) if j != i]
        best, least = None, 2000.0
        for box in _places(x, y, text_width(_label(point))):
            cost = math.hypot(min(max(x, box.left), box.right) - x, (box.top + box.bottom) / 2 - y)
            if cost >= least or not box.inside(plot) or any(box.overlaps(taken) for taken in (*boxes.values(), *markers)):
                continue
            leader = _leader(x, y, box)
            cost += 25 * sum(box.overlaps(w) for w in whiskers)
            cost += (
                12
                + 150 * sum(_crosses(leader, b) for b in (*boxes.values(), *others))
                + 150 * sum(_cross(leader, line) for line in leaders)
                if leader
                else 0
            )
            cost += 150 * sum(_crosses(line, box) for line in leaders)
            if cost < least:
                best, least = box, cost
        total += least
        if best:
            boxes[i] = best
            leaders += [line] if (line := _leader(x, y, best)) else []
    return total, boxes


def _places(x: float, y: float, width: float) -> Iterator[Box]:
    """Beside the mark at three heights, then all round in widening rings."""
    gap, half = MARKER + 4, _LABEL_HEIGHT / 2
    for shift in (0, -8, 8):
        yield Box(x + gap, y - half + shift, x + gap + width, y + half + shift)
        yield Box(x - gap - width, y - half + shift, x - gap, y + half + shift)
    for ring in range(16, 240, 8):
        for step in range(24):
            angle = step * math.pi / 12
            cx, cy = x + (ring + width / 2 * abs(math.cos(angle))) * math.cos(angle), y + ring * math.sin(angle)
            yield Box(cx - width / 2, cy - half, cx + width / 2, cy + half)


def _leader(x: float, y: float, box: Box) -> Line | None:
    """From the mark's edge to the nearest point of the label; None where the label lies beside its mark."""
    to_x, to_y = min(max(x, box.left), box.right), min(max(y, box.top + 2), box.bottom - 2)
    distance = math.hypot(to_x - x, to_y - y)
    if distance <= MARKER + 8:
        return None
    return x + (to_x - x) * (MARKER + 2) / distance, y + (to_y - y) * (MARKER + 2) / distance, to_x, to_y


def _cross(a: Line, b: Line) -> bool:
    def side(line: Line, x: float, y: float) -> float:
        return (line[2] - line[0]) * (y - line[1]) - (line[3] - line[1]) * (x - line[0])

    return side(a, b[0], b[1]) * side(a, b[2], b[3]) < 0 and side(b, a[0], a[1]) * side(b, a[2], a[3]) < 0


def _crosses(line: Line, box: Box) -> bool:
    """Whether a line runs through a box: sampled, which is fine enough for text."""
    return any(
        box.left < line[0] + t * (line[2] - line[0]) < box.right and box.top < line[1] + t * (line[3] - line[1]) < box.bottom
        for t in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
    )


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = max((high / low) ** 0.08, 1.12)
    return low / margin, high * margin


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values, the roundest first kept, no two too near to read; even steps where the range is too narrow for three."""
    span = (WIDTH - LEFT - RIGHT) / math.log(high / low)
    kept: list[float] = []
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (2, 5), (3,), (1.5, 7), (4,)):
        for tick in (step * 10.0**power for power in powers for step in steps):
            if low <= tick <= high and all(abs(math.log(tick / other)) * span >= _TICK_GAP for other in kept):
                kept.append(tick)
    return sorted(kept) if len(kept) >= 3 else _ticks(low, high, 5)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round values from ``low`` to ``high``."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(s * power for s in (1, 2, 2.5, 5, 10, 20) if (high - low) / (s * power) <= most)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
