"""A run's folder as one HTML page that needs nothing but itself: results, curves, samples, values.

`python -m minift.report RUN` reads `run.json`, `metrics.jsonl` and, if there, `samples.jsonl`, and writes
`report.html` beside them. It knows no task: whatever numbers and texts the files hold are shown.
"""

import json
import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from minift.errors import CommandParser, UserError, run_command
from minift.files import read_text, write_text

A_RUN = "the folder of a run, such as runs/sft"
NOT_CURVES = {"step", "split", "tokens", "supervised_tokens", "pairs", "prompts", "seconds"}
FIRST_CURVES = ["loss", "lr", "grad_norm"]
OPEN_SAMPLES = 8  # the others are folded away
BUCKETS = 400  # a longer curve is drawn as the lowest and highest point of each of so many stretches
SMOOTHING = 0.02  # share of the run that the smoothed curve looks back on

WIDTH, HEIGHT = 640, 240  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 28  # around the plotting area

Point = tuple[float, float]


class Curve(NamedTuple):
    """What one chart draws: `kind` is a CSS class, `points` are (step, value)."""

    kind: str
    label: str
    points: list[Point]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's folder, whole or not at all, and give its path.

    Raises UserError when `run.json` or `metrics.jsonl` is missing, or when a file cannot be read as what it should be.
    """
    run_dir = Path(run_dir)
    record = _object(read_text(run_dir / "run.json", A_RUN), str(run_dir / "run.json"))
    metrics = _objects(run_dir / "metrics.jsonl")
    for number, line in enumerate(metrics, start=1):
        if not _is_number(line.get("step")) or line.get("split") not in ("train", "eval"):
            where = f"{run_dir / 'metrics.jsonl'}:{number}"
            raise UserError(f"{where}: expected a number as `step` and train or eval as `split`; mend or remove it")
    samples = _objects(run_dir / "samples.jsonl") if (run_dir / "samples.jsonl").exists() else []

    write_text(run_dir / "report.html", _page(run_dir.resolve().name, record, metrics, samples))
    return run_dir / "report.html"


# ---- reading ----


def _objects(path: Path) -> list[dict[str, Any]]:
    text = read_text(path, A_RUN)
    # splitlines would also split at U+2028, which JSON allows within a string.
    lines = text.removesuffix("\n").split("\n") if text else []
    return [_object(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, as a run writes it; mend or remove it") from None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- the page ----


def _page(name: str, record: dict[str, Any], metrics: list[dict[str, Any]], samples: list[dict[str, Any]]) -> str:
    title = escape(f"{name}: {record['task']}" if "task" in record else name)
    parts = [f"<h1>{title}</h1>"]
    if record.get("results"):
        parts += ["<h2>Results</h2>", _results_table(record["results"])]
    if metrics:
        parts += ["<h2>Curves</h2>", *(_figure(curve_name, metrics) for curve_name in _curve_names(metrics))]
    if samples:
        cards = [_sample(sample) for sample in samples]
        parts += [f"<h2>Samples</h2><p>{len(samples)} in samples.jsonl.</p>", *cards[:OPEN_SAMPLES]]
        if cards[OPEN_SAMPLES:]:
            rest = "\n".join(cards[OPEN_SAMPLES:])
            parts.append(f"<details><summary>the other {len(samples) - OPEN_SAMPLES}</summary>\n{rest}</details>")
    for key, value in record.items():
        if isinstance(value, dict) and key != "results":
            parts += [f"<h2>{_title(key)}</h2>", _values_table(value)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _results_table(results: Any) -> str:
    """Nested numbers as rows; a level of the nesting that is called before or after becomes a column."""
    cells: dict[str, dict[str, Any]] = {}  # row → column → value
    for path, value in _leaves(results, ()):
        column = next((part for part in path if part in ("before", "after")), "")
        row = " · ".join(part.replace("_", " ") for part in path if part != column)
        cells.setdefault(row, {})[column] = value
    columns = [name for name in ("", "before", "after") if any(name in row for row in cells.values())]
    head = "".join(f"<th>{name}</th>" for name in columns)
    rows = "".join(
        f"<tr><th>{escape(row)}</th>" + "".join(f"<td>{_show(values.get(name, ''))}</td>" for name in columns) + "</tr>"
        for row, values in cells.items()
    )
    return f'<table class="numbers"><tr><th></th>{head}</tr>{rows}</table>'


def _leaves(value: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


def _values_table(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(' · '.join(path))}</th><td>{_show(value)}</td></tr>" for path, value in _leaves(values, ())
    )
    return f"<table>{rows}</table>"


def _sample(sample: dict[str, Any]) -> str:
    """A card: the prompt, the other texts side by side, and in one line what is no text."""
    notes = [f"{_title(key)}: {_show(value)}" for key, value in sample.items() if not isinstance(value, str)]
    notes = [_show(sample["kind"]), *notes] if isinstance(sample.get("kind"), str) else notes
    texts = {key: value for key, value in sample.items() if isinstance(value, str) and key not in ("kind", "prompt")}
    prompt = f"<pre>{escape(sample['prompt'])}</pre>" if isinstance(sample.get("prompt"), str) else ""
    columns = []
    for key, value in texts.items():
        same = key != "reference" and value.strip() == texts.get("reference", "").strip() != ""
        mark = ' <span class="same">= reference</span>' if same else ""
        columns.append(f"<div><h4>{_title(key)}{mark}</h4><pre>{escape(value)}</pre></div>")
    return f"<article><p>{' · '.join(notes)}</p>{prompt}<div class='beside'>{''.join(columns)}</div></article>"


def _title(key: str) -> str:
    return escape(key.replace("_", " "))


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_show(item) for item in value)
    return escape(f"{value:.5g}" if isinstance(value, float) else "none" if value is None else str(value))


# ---- the curves ----


def _curve_names(metrics: list[dict[str, Any]]) -> list[str]:
    names = {name: None for line in metrics for name, value in line.items() if _is_number(value)}  # in order
    rest = [name for name in names if name not in NOT_CURVES and name not in FIRST_CURVES]
    return [name for name in FIRST_CURVES if name in names] + rest


def _figure(name: str, metrics: list[dict[str, Any]]) -> str:
    """One metric over the steps: what training logged, the same smoothed, and the evaluations."""
    points = {
        split: [(line["step"], line[name]) for line in metrics if line["split"] == split and _is_number(line.get(name))]
        for split in ("train", "eval")
    }
    drawn = {split: [point for point in series if all(map(math.isfinite, point))] for split, series in points.items()}
    left_out = sum(map(len, points.values())) - sum(map(len, drawn.values()))
    smooth = _smoothed(drawn["train"]) if name != "lr" else []  # which is smooth by itself
    curves = [Curve("train" if smooth else "smooth", "training", drawn["train"])]
    curves += [Curve("smooth", "training, smoothed", smooth), Curve("eval", "held out", drawn["eval"])]
    curves = [curve for curve in curves if curve.points]
    legend = " ".join(f'<span class="{curve.kind}">{curve.label}</span>' for curve in curves) if len(curves) > 1 else ""
    note = f" (not finite, so not drawn: {left_out})" if left_out else ""
    chart = _chart(name, curves) if curves else ""
    return f"<figure><figcaption><b>{_title(name)}</b> {legend}{note}</figcaption>{chart}</figure>"


def _smoothed(points: list[Point]) -> list[Point]:
    """An exponential moving average without the pull towards its start value (Kingma & Ba 2015, section 3)."""
    keep = 1 - 1 / max(1.0, SMOOTHING * len(points))
    if keep == 0:
        return []  # too few points to smooth
    total = weight = 0.0
    smooth = []
    for step, value in points:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append((step, total / weight))
    return smooth


def _thinned(points: list[Point]) -> list[Point]:
    """At most 2·BUCKETS of the points, with every peak and dip among them."""
    if len(points) <= 2 * BUCKETS:
        return points
    edges = [len(points) * i // BUCKETS for i in range(BUCKETS + 1)]
    stretches = [points[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    by_value = [(min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])) for stretch in stretches]
    return [point for pair in by_value for point in sorted(set(pair))]


def _chart(name: str, curves: list[Curve]) -> str:
    xs, ys = zip(*(point for curve in curves for point in curve.points), strict=True)
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(point: Point) -> Point:
        across = (point[0] - x_low) / (x_high - x_low)
        up = (point[1] - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    shapes = []
    for tick in y_ticks:
        y = place((x_low, tick))[1]
        shapes.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in x_ticks:
        if tick == int(tick) and x_low <= tick <= x_high:  # there is no half a step
            x = place((tick, y_low))[0]
            anchor = "end" if x > WIDTH - 3 * RIGHT else "middle"
            shapes.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{tick:,.0f}</text>')
    floor = HEIGHT - BOTTOM
    shapes.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{WIDTH - RIGHT}"/>')
    for kind, _, points in curves:
        places = [place(point) for point in _thinned(points)]
        shapes.append(f'<path class="{kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
        if kind == "eval" or len(points) == 1:
            for point, (x, y) in zip(_thinned(points), places, strict=True):
                value = f"<title>step {point[0]:g}: {point[1]:.5g}</title>"
                shapes.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3">{value}</circle>')
    label = f"{_title(name)} over optimiser steps"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(shapes)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that enclose low … high: multiples of 1, 2 or 5 times a power of ten."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # a flat line still needs a scale
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    unit = power * next(multiple for multiple in (1, 2, 5, 10) if multiple * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [float(f"{i * unit:.12g}") for i in range(first, last + 1)]


STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2430; --dim: #667; --line: #d8dce3; --card: #f5f6f8;
  --train: #9db8e8; --smooth: #1f5fc4; --eval: #c2510c; --good: #1c7c3c; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --text: #e4e7ec; --dim: #98a0ad; --line: #343a45;
  --card: #1d2128; --train: #3d5a8f; --smooth: #7fb0ff; --eval: #ff9d5c; --good: #6fd08c; } }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 1rem; }
h2 { margin: 2rem 0 .5rem; } h2::first-letter, h4::first-letter { text-transform: uppercase; }
table { border-collapse: collapse; } th, td { padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; font-weight: normal; overflow-wrap: anywhere; }
th { color: var(--dim); white-space: nowrap; }
.numbers td, .numbers tr:first-child th { text-align: right; font-variant-numeric: tabular-nums; padding-left: 1rem; }
figure { margin: 0 0 1rem; max-width: 800px; } figcaption span::before { content: "— "; font-weight: bold; }
figcaption b::first-letter { text-transform: uppercase; }
figcaption .train, figcaption .smooth, figcaption .eval { margin-left: .8rem; fill: none; }
span.train::before { color: var(--train); } span.smooth::before { color: var(--smooth); }
span.eval::before { color: var(--eval); }
svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 12px; }
svg path { fill: none; stroke-width: 1.5; stroke-linejoin: round; } svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--dim); stroke-width: 1; } path.train { stroke: var(--train); } path.smooth {
  stroke: var(--smooth); stroke-width: 2; } path.eval { stroke: var(--eval); }
circle.eval { fill: var(--eval); } circle.train, circle.smooth { fill: var(--smooth); }
article { background: var(--card); border-radius: 8px; padding: .6rem 1rem; margin: 0 0 1rem; }
article p { margin: 0; color: var(--dim); } h4 { margin: .4rem 0 0; color: var(--dim); font-weight: normal; }
pre { margin: .2rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.4 ui-monospace, monospace; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 0 1.2rem;
  border-top: 1px solid var(--line); } .same { color: var(--good); } summary { cursor: pointer; margin: 0 0 1rem; }
"""


def main() -> None:
    parser = CommandParser("python -m minift.report", description="a run's folder → one HTML page")
    parser.add_argument("run", type=Path, help="the run's folder, such as runs/sft; report.html is written into it")
    print(write_report(parser.parse_args().run))


if __name__ == "__main__":
    run_command(main)
