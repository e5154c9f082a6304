"""The HTML page of a run: results, curves, samples, values, in one file that loads nothing else."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from minift.errors import UserError
from minift.files.text import write_text
from minift.run.charts import LARGEST, Curve, chart, smoothed

NOT_CURVES = {"step", "split", "tokens", "supervised_tokens", "pairs", "prompts", "rankings", "seconds"}
FIRST_CURVES = ["loss", "lm_loss", "lr", "grad_norm"]
OPEN_SAMPLES = 8  # the others are folded away


def write_report(
    folder: Path, record: dict[str, Any], metrics: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]
) -> Path:
    """Write `report.html` into a run's folder atomically and return its path.

    `record` is the object in run.json, `metrics` and `samples` are the lines of these files. A lone surrogate is
    written as its escape. Raises UserError if the folder cannot be written, or for values nested hundreds deep.
    """
    name = folder.resolve().name
    title = escape(f"{name}: {record['task']}" if "task" in record else name)
    try:
        body = _body(record, metrics, samples)
    except RecursionError:
        raise UserError(f"{folder}: a value is nested too deeply, expected the files that a run wrote") from None
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"<head>{meta}<title>{title}</title><style>{STYLE}</style></head>"
    body = f"<body><main>\n<h1>{title}</h1>\n{body}\n</main></body>"
    page = f'<!doctype html>\n<html lang="en">{head}\n{body}</html>\n'
    path = folder / "report.html"
    write_text(path, page.encode("utf-8", "backslashreplace").decode())
    return path


def _body(record: dict[str, Any], metrics: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]) -> str:
    parts = []
    if record.get("results"):
        parts += ["<h2>Results</h2>", _results_table(record["results"])]
    if metrics:
        names = [name for line in metrics for name, value in line.items() if _is_number(value)]
        shown = dict.fromkeys([*FIRST_CURVES, *names])  # in this order, each once
        curves = [_figure(name, metrics) for name in shown if name in names and name not in NOT_CURVES]
        parts += ["<h2>Curves</h2>", *curves]
    if samples:
        cards = [_sample(sample) for sample in samples]
        parts += [f"<h2>Samples</h2><p>{len(samples)} in samples.jsonl.</p>", *cards[:OPEN_SAMPLES]]
        if cards[OPEN_SAMPLES:]:
            rest = "\n".join(cards[OPEN_SAMPLES:])
            parts.append(f"<details><summary>the other {len(samples) - OPEN_SAMPLES}</summary>\n{rest}</details>")
    for key, value in record.items():
        if isinstance(value, dict) and key != "results":
            cells = [(" · ".join(path), _show(leaf)) for path, leaf in _leaves(value, ())]
            rows = [f"<tr><th>{escape(path)}</th><td>{text}</td></tr>" for path, text in cells]
            parts += [f"<h2>{_title(key)}</h2>", f"<table>{''.join(rows)}</table>"]
    return "\n".join(parts)


def _results_table(results: object) -> str:
    """Return nested numbers as a table's rows; the keys before and after become columns."""
    cells: dict[str, dict[str, object]] = {}  # row → column → value
    for path, value in _leaves(results, ()):
        # Only the first such key is the column: a category may have the same name.
        at = next((index for index, part in enumerate(path) if part in ("before", "after")), None)
        column = "" if at is None else path[at]
        row = " · ".join(part.replace("_", " ") for index, part in enumerate(path) if index != at)
        cells.setdefault(row, {})[column] = value
    columns = [name for name in ("", "before", "after") if any(name in row for row in cells.values())]
    rows = ["".join(f"<th>{name}</th>" for name in ("", *columns))]
    for row, values in cells.items():
        shown = "".join(f"<td>{_show(values.get(name, ''))}</td>" for name in columns)
        rows.append(f"<th>{escape(row)}</th>{shown}")
    return f'<table class="numbers"><tr>{"</tr><tr>".join(rows)}</tr></table>'


def _leaves(value: object, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


def _title(key: str) -> str:
    return escape(key.replace("_", " "))


def _show(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_show(item) for item in value)
    return escape(f"{value:.5g}" if isinstance(value, float) else "none" if value is None else str(value))


def _sample(sample: dict[str, Any]) -> str:
    """Return a card: one line with the category and all values that are not text, the prompt, the texts in columns.

    A text is marked if it equals the reference, and if it passes or fails the checks.
    """
    passed = sample.get("passed")
    passed = passed if isinstance(passed, dict) else {}
    values = {key: value for key, value in sample.items() if not isinstance(value, str) and value is not passed}
    notes = [f"{_title(key)}: {_show(value)}" for key, value in values.items()]
    notes = [_show(sample["kind"]), *notes] if isinstance(sample.get("kind"), str) else notes
    texts = {key: value for key, value in sample.items() if isinstance(value, str) and key not in ("kind", "prompt")}
    prompt = f"<pre>{escape(sample['prompt'])}</pre>" if isinstance(sample.get("prompt"), str) else ""
    columns = []
    for key, value in texts.items():
        same = key != "reference" and value.strip() == texts.get("reference", "").strip() != ""
        mark = ' <span class="same">= reference</span>' if same else ""
        if isinstance(passed.get(key), bool):
            mark += ' <span class="same">✓ passes</span>' if passed[key] else ' <span class="fails">✗ fails</span>'
        columns.append(f"<div><h4>{_title(key)}{mark}</h4><pre>{escape(value)}</pre></div>")
    return f"<article><p>{' · '.join(notes)}</p>{prompt}<div class='beside'>{''.join(columns)}</div></article>"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figure(name: str, metrics: Sequence[dict[str, Any]]) -> str:
    """Return the chart of one metric over the steps: training, training smoothed, and the evaluations."""
    points = {
        split: [(line["step"], line[name]) for line in metrics if line["split"] == split and _is_number(line.get(name))]
        for split in ("train", "eval")
    }
    # NaN fails both comparisons; Python's whole numbers may be too large for a float.
    drawn = {
        split: [point for point in series if all(-LARGEST <= number <= LARGEST for number in point)]
        for split, series in points.items()
    }
    omitted = sum(map(len, points.values())) - sum(map(len, drawn.values()))
    smooth = smoothed(drawn["train"]) if name != "lr" else []  # the learning rate is a smooth curve already
    curves = [Curve("train" if smooth else "smooth", "training", drawn["train"])]
    curves += [Curve("smooth", "training, smoothed", smooth), Curve("eval", "held out", drawn["eval"])]
    curves = [curve for curve in curves if curve.points]
    labels = [f'<span class="{curve.css_class}">{curve.label}</span>' for curve in curves]
    legend = " ".join(labels) if len(labels) > 1 else ""
    note = f" (not finite or too large, so not drawn: {omitted})" if omitted else ""
    svg = chart(name, curves) if curves else ""
    return f"<figure><figcaption><b>{_title(name)}</b> {legend}{note}</figcaption>{svg}</figure>"


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
  border-top: 1px solid var(--line); } .same { color: var(--good); } .fails { color: var(--eval); }
summary { cursor: pointer; margin: 0 0 1rem; }
"""
