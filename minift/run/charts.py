"""Charts of metrics over optimiser steps, as SVG to put into an HTML page; the page's CSS gives colours and widths."""

import itertools
import math
from html import escape
from operator import itemgetter
from typing import NamedTuple

BUCKETS = 400  # a long curve is drawn as the lowest and highest point of each of this many buckets
LARGEST, SMALLEST = 1e100, 1e-100  # larger steps and values are not drawn; smaller ranges are drawn as flat
SMOOTHING = 0.02  # the smoothed curve averages over about this proportion of a run

WIDTH, HEIGHT = 640, 240  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 28  # margins around the plotting area

Point = tuple[float, float]


class Curve(NamedTuple):
    """One line of a chart; `points` are (step, value), none beyond ±LARGEST."""

    css_class: str
    label: str
    points: list[Point]


def chart(name: str, curves: list[Curve]) -> str:
    """Return the SVG of curves over the same steps; at least one of them has a point."""
    xs, ys = zip(*(point for curve in curves for point in curve.points), strict=True)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_range = min(xs), max(max(xs) - min(xs), 1)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    floor = HEIGHT - BOTTOM

    def in_svg(point: Point) -> Point:
        across = (point[0] - x_low) / x_range
        up = (point[1] - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), floor - up * (floor - TOP)

    shapes = []
    for tick in y_ticks:
        y = in_svg((x_low, tick))[1]
        shapes.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in x_ticks:
        if tick == int(tick) and x_low <= tick <= x_low + x_range:  # steps are whole numbers
            x = in_svg((tick, y_low))[0]
            anchor = "end" if x > WIDTH - 3 * RIGHT else "middle"
            shapes.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{tick:,.0f}</text>')
    shapes.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{WIDTH - RIGHT}"/>')
    for css_class, _, all_points in curves:
        points = thinned(all_points)
        corners = [in_svg(point) for point in points]
        shapes.append(f'<path class="{css_class}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in corners)}"/>')
        if css_class == "eval" or len(points) == 1:
            for (step, value), (x, y) in zip(points, corners, strict=True):
                tooltip = f"<title>step {step:g}: {value:.5g}</title>"
                shapes.append(f'<circle class="{css_class}" cx="{x:.1f}" cy="{y:.1f}" r="3">{tooltip}</circle>')
    label = f"{escape(name.replace('_', ' '))} over optimiser steps"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(shapes)}</svg>'


def ticks(low: float, high: float) -> list[float]:
    """Return four to nine round numbers that enclose low … high: multiples of 1, 2 or 5 times a power of ten."""
    if not high - low > max(1e-9 * max(abs(low), abs(high)), SMALLEST):  # a flat line still needs a scale
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if abs(high) > SMALLEST else (0.0, 1.0)
    rough = (high - low) / 5
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
