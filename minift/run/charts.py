"""Charts as SVG to put into an HTML page; the page's CSS gives colours, widths and the size of the text."""

import itertools
import math
from collections import Counter
from html import escape
from operator import itemgetter
from typing import NamedTuple

BUCKETS = 400  # a long curve is drawn as the lowest and highest point of each of this many buckets
LARGEST, SMALLEST = 1e100, 1e-100  # larger steps and values are not drawn; smaller ranges are drawn as flat
SMOOTHING = 0.02  # the smoothed curve averages over about this proportion of a run

LARGE, SMALL, SQUARE = (480, 270), (240, 150), (300, 270)  # width and height of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 24, 34  # margins around the plotting area
HISTOGRAM_BINS = 24

Point = tuple[float, float]


class Curve(NamedTuple):
    """One line of a chart, or its single points; `points` are (x, y), none beyond ±LARGEST."""

    css_class: str
    label: str
    points: list[Point]
    is_line: bool = True  # False: one evaluation says nothing about the steps before the next one


class Axis(NamedTuple):
    """One direction of a chart: a name or unit, the range from `low` to `low + span`, and round numbers in it."""

    name: str
    low: float
    span: float
    ticks: list[float]


class Plot:
    """The SVG of a chart while it is drawn: `shapes` begin with the axes; `place` turns values into SVG units."""

    def __init__(self, across: Axis, up: Axis, size: tuple[int, int] = LARGE) -> None:
        self.across, self.up, self.size = across, up, size
        self.shapes: list[str] = []
        right, floor = size[0] - RIGHT, size[1] - BOTTOM
        for tick in up.ticks:
            y = self.place((across.low, tick))[1]
            self.shapes.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.shapes.append(f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{tick:.6g}</text>')
        for tick in across.ticks:
            x = self.place((tick, up.low))[0]
            anchor = "end" if x > right - 2 * RIGHT else "middle"
            shown = f"{tick:,.0f}" if tick == int(tick) else f"{tick:.6g}"
            self.shapes.append(f'<text x="{x:.1f}" y="{floor + 14}" text-anchor="{anchor}">{shown}</text>')
        self.shapes.append(f'<text x="4" y="10">{escape(up.name)}</text>')
        self.shapes.append(f'<text x="{right}" y="{floor + 30}" text-anchor="end">{escape(across.name)}</text>')
        self.shapes.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{right}"/>')

    def place(self, point: Point) -> Point:
        """Return where (x, y) is in the SVG."""
        across = (point[0] - self.across.low) / self.across.span
        up = (point[1] - self.up.low) / self.up.span
        right, floor = self.size[0] - RIGHT, self.size[1] - BOTTOM
        return LEFT + across * (right - LEFT), floor - up * (floor - TOP)

    def line(self, css_class: str, points: list[Point]) -> None:
        """Draw a line through points."""
        corners = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(self.place, points))
        self.shapes.append(f'<path class="{css_class}" d="M{corners}"/>')

    def dot(self, css_class: str, point: Point, tooltip: str, radius: float = 3) -> None:
        """Draw a point that shows a tooltip."""
        x, y = self.place(point)
        title = f"<title>{escape(tooltip)}</title>"
        self.shapes.append(f'<circle class="{css_class}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.2g}">{title}</circle>')

    def svg(self, label: str) -> str:
        """Return the chart, with a label for those who do not see it."""
        width, height = self.size
        return (
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(self.shapes)}</svg>'
        )


def chart(
    name: str, curves: list[Curve], unit: str = "", *, size: tuple[int, int] = LARGE, best: Point | None = None
) -> str:
    """Return the SVG of curves over the optimiser steps, at least one with a point; `best` gets a ring."""
    xs, ys = zip(*(point for curve in curves for point in curve.points), strict=True)
    count = 5 if size == LARGE else 3
    x_low, x_span, y_ticks = min(xs), max(max(xs) - min(xs), 1), ticks(min(ys), max(ys), count)
    # Steps are whole numbers.
    steps = [tick for tick in ticks(x_low, max(xs), count) if tick == int(tick) and x_low <= tick <= x_low + x_span]
    y_low = min(y_ticks[0], min(ys))
    up = Axis(unit, y_low, max(y_ticks[-1], max(ys)) - y_low, y_ticks)
    plot = Plot(Axis("optimiser step", x_low, x_span, steps), up, size)
    for css_class, _, all_points, is_line in curves:
        points = thinned(all_points)
        if is_line:
            plot.line(css_class, points)
        for step, value in points if not is_line or len(points) == 1 else []:
            plot.dot(css_class, (step, value), f"step {step:g}: {value:.4g}")
    if best is not None:
        plot.dot("best", best, f"best checkpoint, step {best[0]:g}: {best[1]:.4g}", 7)
    return plot.svg(f"{name} over optimiser steps")


def histogram(name: str, unit: str, groups: dict[str, list[float]], edges: tuple[float, float]) -> str:
    """Return the SVG of overlaid histograms of values by CSS class; all values are between the edges."""
    low, span = edges[0], edges[1] - edges[0] or 1
    width = span / HISTOGRAM_BINS
    counts = {
        css_class: Counter(min(int((value - low) / width), HISTOGRAM_BINS - 1) for value in values)
        for css_class, values in groups.items()
    }
    y_ticks = [tick for tick in ticks(0, max(max(each.values()) for each in counts.values()), 4) if tick == int(tick)]
    x_ticks = [tick for tick in ticks(low, low + span) if low <= tick <= low + span]
    plot = Plot(Axis(unit, low, span, x_ticks), Axis("responses", 0, y_ticks[-1], y_ticks), SQUARE)
    for css_class, each in counts.items():
        for number, count in sorted(each.items()):
            left, top = plot.place((low + number * width, count))
            right, floor = plot.place((low + (number + 1) * width, 0))
            area = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{floor - top:.1f}"'
            plot.shapes.append(f'<rect class="{css_class}" {area}/>')
    return plot.svg(name)


def reliability(bins_by_class: dict[str, list[list[tuple[float, bool]]]]) -> str:
    """Return the SVG of a reliability diagram, of bins of pairs (confidence, is right) by CSS class."""
    tenths = [number / 10 for number in range(0, 11, 2)]
    plot = Plot(Axis("confidence", 0.5, 0.5, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]), Axis("accuracy", 0, 1, tenths), SQUARE)
    plot.line("ideal", [(0.5, 0.5), (1.0, 1.0)])  # where confidence and accuracy are equal
    for css_class, bins in bins_by_class.items():
        total = sum(map(len, bins))
        for pairs in filter(None, bins):
            confidence, accuracy = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            tooltip = f"{len(pairs)} pairs: confidence {confidence:.0%}, accuracy {accuracy:.0%}"
            plot.dot(css_class, (confidence, accuracy), tooltip, 2.5 + 9 * math.sqrt(len(pairs) / total))
    return plot.svg("reliability: accuracy over confidence")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers that enclose low … high: 1, 2 or 5 times a power of ten; for `count` 5 there are 4 to 9."""
    if not high - low > max(1e-9 * max(abs(low), abs(high)), SMALLEST):  # a flat line still needs a scale
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if abs(high) > SMALLEST else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    unit = power * next(multiple for multiple in (1, 2, 5, 10) if multiple * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [float(f"{i * unit:.12g}") for i in range(first, last + 1)]


def thinned(points: list[Point]) -> list[Point]:
    """Return at most 2·BUCKETS of the points, with every peak and dip among them."""
    if len(points) <= 2 * BUCKETS:
        return points
    edges = [len(points) * i // BUCKETS for i in range(BUCKETS + 1)]
    buckets = [points[start:end] for start, end in itertools.pairwise(edges)]
    extremes = [(min(bucket, key=itemgetter(1)), max(bucket, key=itemgetter(1))) for bucket in buckets]
    return [point for pair in extremes for point in sorted(set(pair))]


def smoothed(points: list[Point]) -> list[Point]:
    """Return an exponential moving average (Kingma & Ba 2015, section 3: without bias), [] for too few points."""
    keep = 1 - 1 / max(1.0, SMOOTHING * len(points))
    if keep == 0:
        return []
    total = weight = 0.0
    smooth = []
    for step, value in points:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append((step, total / weight))
    return smooth
