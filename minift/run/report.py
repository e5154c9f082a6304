"""The HTML page of a run: verdict, results, curves, one row, rewards, samples and settings, in one file."""

import math
import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from html import escape
from itertools import combinations, groupby
from os.path import commonprefix
from pathlib import Path
from typing import Any

from minift.bleu import sentence_bleu
from minift.errors import UserError
from minift.files.text import write_text
from minift.run.charts import LARGE, LARGEST, SMALL, Curve, chart, histogram, reliability, smoothed
from minift.scoring import confidence_bins, sigmoid

EXAMS = ("before", "after")
TITLES = {"sft": "Instruction tuning", "rm": "Reward model"}
VERDICTS = {"pass_rate": "pass rate", "bleu": "BLEU", "accuracy": "held-out accuracy", "eval_loss": "held-out loss"}
NAMES = {"bleu": "BLEU", "eval_loss": "held-out loss", "eval_lm_loss": "held-out language model loss",
         "mean_probability": "mean probability of chosen", "brier": "Brier score", "lr": "learning rate",
         "grad_norm": "gradient norm", "lm_loss": "language model loss"}  # fmt: skip
RATES = {"pass_rate": ("pass_interval", "checked"), "accuracy": ("interval", "pairs")}  # with intervals and counts
COUNTERS = ("supervised_tokens", "pairs", "prompts", "rankings")  # one of them counts what the loss is the mean of
NOT_CURVES = {"step", "split", "tokens", "seconds", *COUNTERS}
FIRST_CURVES = ["loss", "lr", "grad_norm"]
AXES = {"lr": "step size of AdamW", "grad_norm": "norm before clipping", "lm_loss": "nats per token",
        "accuracy": "proportion of pairs", "margin": "chosen − rejected",
        "reward_chosen": "mean reward", "reward_rejected": "mean reward"}  # fmt: skip
PASSED = {True: ' <span class="good">✓ passes</span>', False: ' <span class="bad">✗ fails</span>'}
OPEN_SAMPLES, MOST_SAMPLES = 8, 500  # the others are folded away, or only in samples.jsonl
MOST_LINES, MOST_CHARACTERS = 12, 900  # of an answer before training
REPEATED = 4  # this number of equal lines in a row, or more, is shown as one
MOST_WORDS = 2000  # of texts to compare: the time grows with their square


def write_report(
    folder: Path,
    record: dict[str, Any],
    metrics: Sequence[dict[str, Any]],
    samples: Sequence[dict[str, Any]],
    seen: dict[str, Any],
) -> Path:
    """Write `report.html` into a run's folder atomically and return its path.

    The arguments are what run.json, metrics.jsonl, samples.jsonl and row.json hold, the last two may be empty. A lone
    surrogate is written as its escape. Raises UserError if the folder cannot be written, and for values that a run
    does not write.
    """
    expected = "expected the files that a run wrote"
    try:
        title = escape(_verdict(record))
        sections = (_head(folder, record, metrics), _results(record.get("results", {})), _curves(metrics), _row(seen),
                    _rewards(samples), _samples(samples), _settings(record))  # fmt: skip
    except RecursionError:
        raise UserError(f"{folder}: a value is nested too deeply, {expected}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: a value of the wrong type ({error}), {expected}") from None
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"<head>{meta}<title>{title}</title><style>{STYLE}</style></head>"
    body = "\n".join(["<body><main>", f"<h1>{title}</h1>", *filter(None, sections), "</main></body>"])
    page = f'<!doctype html>\n<html lang="en">{head}\n{body}</html>\n'
    path = folder / "report.html"
    write_text(path, page.encode("utf-8", "backslashreplace").decode())
    return path


# -------------------------------------------------------------------------------------------------- verdict and results


def _verdict(record: dict[str, Any]) -> str:
    """Return what the run was, and its first two measures from → to."""
    results, changes = record.get("results", {}), []
    for measure, name in VERDICTS.items():
        if exams := results.get(measure):
            ends = [exams[exam]["all"] if isinstance(exams[exam], dict) else exams[exam] for exam in EXAMS]
            changes.append(f"{name} " + "\u00a0→\u00a0".join(_text(value, measure) for value in ends))
    title, nothing = record.get("task", "run"), "nothing held out" if "results" in record else "not finished"
    return f"{TITLES.get(title, title)}: {', '.join(changes[:2]) or nothing}"


def _head(folder: Path, record: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> str:
    """Return the lines under the verdict: model and data, steps, tokens, time, machine, date, command."""
    values, last = record.get("values", {}), metrics[-1] if metrics else {}
    about = " trained on ".join(values[name] for name in ("model", "data") if name in values)
    facts = [f"{last[name]:,} {unit}" for name, unit in (("step", "steps"), ("tokens", "tokens")) if name in last]
    facts += [_duration(last["seconds"])] if "seconds" in last else []
    facts += [record[name] for name in ("machine", "date") if name in record]
    items = " ".join(f"<span>{escape(fact)}</span>" for fact in facts)
    # Each word in a box, so that --max-steps is not broken after a hyphen.
    words = " ".join(f"<span>{_breakable(word)}</span>" for word in record.get("command", "").split())
    command = f'<pre class="command">{words}</pre>' if words else ""
    return f'<p>{_breakable(f"{folder.resolve().name}: {about}")}</p><p class="facts">{items}</p>{command}'


def _duration(seconds: float) -> str:
    size, unit = (3600, "h") if seconds >= 7200 else (60, "min") if seconds >= 120 else (1, "s")
    return f"{seconds / size:.{size > 1:d}f} {unit} of training"


def _results(results: dict[str, Any]) -> str:
    """Return a table of the measures, with before and after as columns, and bars of the rates by category."""
    bars = {rate: _bars(rate, results) for rate, others in RATES.items() if {rate, *others} <= results.keys()}
    in_bars = {name for rate in bars for name in RATES[rate]}
    cells: dict[str, dict[str, str]] = {}  # row → column → value
    for path, value in _leaves(results, ()):
        measure, inner = path[0], [*path[1:]]
        # Only the first such key is the column: a category may have the same name.
        column = next((part for part in inner if part in EXAMS), "")
        if column:
            inner.remove(column)
        if measure not in in_bars and not (measure in bars and inner != ["all"]):
            row = " · ".join([_name(measure), *(inner if inner != ["all"] else [])])
            cells.setdefault(row, {})[column] = _text(value, measure)
    columns = [name for name in ("", *EXAMS) if any(name in row for row in cells.values())]
    rows = ["".join(f"<th>{name}</th>" for name in ("", *columns))]
    for row, values in cells.items():
        rows.append(f"<th>{escape(row)}</th>" + "".join(f"<td>{escape(values.get(name, ''))}</td>" for name in columns))
    table = f'<table class="numbers"><tr>{"</tr><tr>".join(rows)}</tr></table>'
    return f'<h2>Results</h2><div class="beside">{table}{"".join(bars.values())}</div>' if cells else ""


def _bars(rate: str, results: dict[str, Any]) -> str:
    """Return bars of a rate by category after training, with its intervals and a mark for before."""
    intervals, counts = (results[name]["after"] for name in RATES[rate])
    rows = []
    for category, value in results[rate]["after"].items():
        low, high = intervals[category]
        marks = "".join(
            f'<i class="{css_class}" style="left:{left:.1%};width:{width:.1%}"></i>'
            for css_class, left, width in (
                ("bar", 0, value), ("interval", low, high - low), ("was", results[rate]["before"][category], 0)
            )
        )  # fmt: skip
        count = f"<span>{value:.1%} of {counts[category]:,}</span>"
        rows.append(f'<span>{escape(category)}</span><span class="track">{marks}</span>{count}')
    note = "after training, with 95% intervals; the thin mark is before"
    head = f"<figcaption><b>{_name(rate)}</b> {note}</figcaption>"
    return f'<figure>{head}<div class="bars">{"".join(rows)}</div></figure>'


def _leaves(value: object, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


def _text(value: object, measure: str | None = None) -> str:
    """Return a value as text; one of a measure is rounded: rates in percent, BLEU to a decimal, others to 3 digits."""
    if isinstance(value, list):
        return ", ".join(_text(item, measure) for item in value)
    if measure is None or not _is_number(value):
        return "none" if value is None else str(value)
    form = ".1%" if measure in RATES else ".1f" if measure == "bleu" else ".3g" if isinstance(value, float) else ","
    return format(value, form)


def _breakable(text: str) -> str:
    """Return text as HTML in which a path may be broken after each slash, and not inside its names."""
    return escape(text).replace("/", "/<wbr>")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(key: str) -> str:
    return NAMES.get(key, key.replace("_", " "))


# --------------------------------------------------------------------------------------------------------------- curves


def _curves(metrics: Sequence[dict[str, Any]]) -> str:
    """Return the chart of the loss, small ones of learning rate and gradient norm beside it, all others below."""
    names = [name for line in metrics for name, value in line.items() if _is_number(value)]
    figures = {
        name: _figure(name, metrics, LARGE if name == "loss" else SMALL)
        for name in dict.fromkeys([*FIRST_CURVES, *names])  # in this order, each once
        if name in names and name not in NOT_CURVES
    }
    loss, *beside = (figures.pop(name, "") for name in FIRST_CURVES)
    top = f'<div class="curves">{loss}<div class="small">{"".join(beside)}</div></div>'
    return f'<h2>Curves</h2>{top}<div class="small">{"".join(figures.values())}</div>' if names else ""


def _figure(name: str, metrics: Sequence[dict[str, Any]], size: tuple[int, int]) -> str:
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
    curves += [Curve("smooth", "training, smoothed", smooth), Curve("eval", "held out", drawn["eval"], is_line=False)]
    curves = [curve for curve in curves if curve.points]
    legend, unit, best = "", AXES.get(name, ""), None
    if name == "loss":
        counter = next((each for each in COUNTERS if each in metrics[-1]), "items")
        unit = f"nats per {_name(counter).removesuffix('s')}"
        best = min((point for point in drawn["eval"] if point[0] > 0), key=lambda point: point[1], default=None)
        legend = "".join(f'<span class="{curve.css_class}">{curve.label}</span> ' for curve in curves)
        if best:
            legend += f'<span class="best">best checkpoint: {best[1]:.3g} at step {best[0]:,}</span>'
    note = f" (not finite or too large, so not drawn: {omitted})" if omitted else ""
    svg = chart(_name(name), curves, unit, size=size, best=best) if curves else ""
    return f"<figure><figcaption><b>{escape(_name(name))}</b> {legend}{note}</figcaption>{svg}</figure>"


# --------------------------------------------------------------------------------------------- one row, and the rewards


def _row(seen: dict[str, Any]) -> str:
    """Return one row as the loss sees it: a value under each supervised token, or at the end of each response."""
    rows = seen.get("rows", [])
    if not rows:
        return ""
    is_ranking = len(rows) > 1
    shared = len(commonprefix([row["tokens"] for row in rows])) if is_ranking else len(rows[0]["tokens"])
    values = [[value for value in row["values"] if value is not None] for row in rows]
    if is_ranking:
        margin = values[0][0] - values[1][0]
        loss = math.log1p(math.exp(-abs(margin))) + max(-margin, 0)  # -log σ(margin)
        note = (
            "Grey tokens are shared by all responses. The reward is read at a response's last token. After training, "
            f"that of the first is {margin:.3g} higher than that of the second: it is better with probability "
            f"σ({margin:.3g}) = {sigmoid(margin):.3g}, and the loss is −log of this, {loss:.3g}."
        )
    else:
        note = (
            "Grey tokens, such as those of the prompt, have the label −100 and do not count. Under each supervised "
            "token is its −log p after training: the redder, the less it was expected. The row's loss is the mean, "
            f"{sum(values[0]):.3g} / {len(values[0])} = {sum(values[0]) / len(values[0]):.3g}."
        )
    blocks = []
    for row in rows:
        name = f"<h3>{escape(row['name'])}</h3>" if is_ranking else ""
        heats = [None if is_ranking or value is None else 1 - math.exp(-value) for value in row["values"]]
        each = enumerate(zip(row["tokens"], row["values"], heats, strict=True))
        tokens = "".join(_token(*token, is_grey=index < shared) for index, token in each)
        blocks.append(f'{name}<pre class="tokens">{tokens}</pre>')
    noun = {1: "row", 2: "pair"}.get(len(rows), "ranking")
    return f"<h2>One {noun} as the loss sees it</h2><p>{note}</p>{''.join(blocks)}"


def _token(text: str, value: float | None, heat: float | None, *, is_grey: bool) -> str:
    """Return a token; one with a value is a box, with the value under it and the heat, from 0 to 1, as its colour."""
    shown = escape(text).replace("\n", "↵\n")
    if value is None:
        return f'<span class="grey">{shown}</span>' if is_grey else shown
    shown, line_end, indent = shown.rpartition("\n") if "\n" in shown else (shown, "", "")
    style = f' style="--heat:{70 * heat:.0f}%"' if heat is not None else ""
    return f'<span class="token"{style}>{shown}<small>{value:.2f}</small></span>{line_end}{indent}'


def _rewards(samples: Sequence[dict[str, Any]]) -> str:
    """Return histograms of the rewards before and after, and a reliability diagram; "" without rewards."""
    if not samples or "rewards_after" not in samples[0]:
        return ""
    ranked = {exam: [sample[f"rewards_{exam}"] for sample in samples] for exam in EXAMS}
    every = [reward for rankings in ranked.values() for rewards in rankings for reward in rewards]
    figures, bins = [], {}
    for exam, rankings in ranked.items():
        sides = {"chosen": [each[0] for each in rankings], "rejected": [one for each in rankings for one in each[1:]]}
        legend = " ".join(f'<span class="{name}">{name}</span>' for name in sides)
        svg = histogram(f"rewards {exam} training", "reward", sides, (min(every), max(every)))
        figures.append(f"<figure><figcaption><b>{exam}</b> {legend}</figcaption>{svg}</figure>")
        bins[exam] = confidence_bins([a - b for each in rankings for a, b in combinations(each, 2)])
    legend = " ".join(f'<span class="{exam}">{exam}</span>' for exam in EXAMS)
    note = "<br>confidence: σ of the difference of rewards; on the diagonal it equals the accuracy; larger: more pairs"
    figures.append(f"<figure><figcaption><b>reliability</b> {legend}{note}</figcaption>{reliability(bins)}</figure>")
    return f'<h2>Rewards</h2><div class="three">{"".join(figures)}</div>'


# -------------------------------------------------------------------------------------------------------------- samples


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    """Return the samples as cards, worst first: those that fail their checks, the lowest BLEU, the wrongly ranked."""
    if not samples:
        return ""
    bad = sum(not is_good for is_good, _ in map(_quality, samples))
    are_pairs = "rewards_after" in samples[0]
    problem, old, new = (
        ("ranked wrongly", "chosen", "rejected") if are_pairs else ("fail their checks", "reference", "after")
    )
    count = f"{len(samples):,} in samples.jsonl, worst first" + (f": {bad:,} {problem}" if bad else "")
    legend = f"words only in <del>{old}</del>, and only in <ins>{new}</ins>"
    cards = [_card(sample) for sample in sorted(samples, key=_quality)[:MOST_SAMPLES]]
    parts = [f"<h2>Samples</h2><p>{count}; {legend}.</p>", *cards[:OPEN_SAMPLES]]
    if rest := cards[OPEN_SAMPLES:]:
        parts += [f"<details><summary>the next {len(rest)}</summary>", *rest, "</details>"]
    return "\n".join(parts)


def _quality(sample: dict[str, Any]) -> tuple[bool, float]:
    """Return whether a sample is good, and its BLEU, or for rewards the smallest difference of better and worse."""
    if rewards := sample.get("rewards_after"):
        smallest = min(better - worse for better, worse in combinations(rewards, 2))
        return smallest > 0, smallest
    return sample.get("passed", {}).get("after") is not False, _bleu(sample, "after")


def _bleu(sample: dict[str, Any], exam: str) -> float:
    return sentence_bleu(sample.get(exam, ""), [sample.get("reference", "")]).score


def _card(sample: dict[str, Any]) -> str:
    """Return a card: category and values, the prompt, then the other texts side by side with their marks."""
    rewards = sample.get("rewards_after", [])
    values = {key: value for key, value in sample.items() if isinstance(value, int | float | list)}
    notes = [sample["kind"]] if isinstance(sample.get("kind"), str) else []
    notes = [
        escape(note) for note in (*notes, *(f"{_name(key)}: {_text(value, key)}" for key, value in values.items()))
    ]
    if len(rewards) == 2:
        wrong = ' <span class="bad">✗ ranked wrongly</span>' if rewards[0] <= rewards[1] else ""
        notes.insert(0, f"probability of chosen {sigmoid(rewards[0] - rewards[1]):.1%}{wrong}")
    texts = {key: _unrepeated(value) for key, value in sample.items() if isinstance(value, str) and key != "kind"}
    prompt = f"<pre>{escape(texts.pop('prompt'))}</pre>" if "prompt" in texts else ""
    texts |= {"before": _capped(texts.pop("before"))} if "before" in texts else {}  # the last column
    shown = {key: escape(text) for key, text in texts.items()}
    for old, new in (("reference", "after"), ("chosen", "rejected")):
        if old in texts and new in texts:
            shown[old], shown[new] = _diff(texts[old], texts[new])
    columns = [f"<div><h4>{escape(_name(key))}{_marks(sample, key)}</h4><pre>{shown[key]}</pre></div>" for key in shown]
    return f"<article><p>{' · '.join(notes)}</p>{prompt}<div class='beside'>{''.join(columns)}</div></article>"


def _marks(sample: dict[str, Any], key: str) -> str:
    """Return the BLEU of an answer, and whether it is the reference and passes its checks."""
    if key not in EXAMS or "reference" not in sample:
        return ""
    marks = f" · BLEU {_bleu(sample, key):.0f}"
    if sample[key].strip() == sample["reference"].strip() != "":
        marks += ' <span class="good">= reference</span>'
    return marks + PASSED.get(sample.get("passed", {}).get(key), "")


def _unrepeated(text: str) -> str:
    """Return a text in which many equal lines in a row are one line and their number."""
    lines: list[str] = []
    for line, group in groupby(text.split("\n")):
        count = len([*group])
        lines += [line] * count if count < REPEATED else [line, f"… {count} such lines"]
    return "\n".join(lines)


def _capped(text: str) -> str:
    """Return the first lines of a text."""
    short = "\n".join(text[:MOST_CHARACTERS].split("\n")[:MOST_LINES])
    return short if short == text else f"{short} …"


def _diff(old: str, new: str) -> tuple[str, str]:
    """Return two texts as HTML, with the words that only the first has deleted, and those of the second inserted."""
    a, b = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (old, new))
    if max(len(a), len(b)) > MOST_WORDS:
        return escape(old), escape(new)
    left, right = "", ""
    for tag, a_start, a_end, b_start, b_end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        gone, come = escape("".join(a[a_start:a_end])), escape("".join(b[b_start:b_end]))
        left += gone if tag == "equal" or not gone else f"<del>{gone}</del>"
        right += come if tag == "equal" or not come else f"<ins>{come}</ins>"
    return left, right


# ------------------------------------------------------------------------------------------------------------- settings


def _settings(record: dict[str, Any]) -> str:
    """Return the tables of everything else in run.json, folded away."""
    tables = []
    for key, value in record.items():
        if isinstance(value, dict) and key != "results":
            cells = [(" · ".join(path), _text(leaf)) for path, leaf in _leaves(value, ())]
            rows = "".join(f"<tr><th>{escape(path)}</th><td>{_breakable(text)}</td></tr>" for path, text in cells)
            tables.append(f'<h3>{escape(_name(key))}</h3><table class="settings">{rows}</table>')
    summary = "<summary>values, template, versions and fingerprints</summary>"
    return f"<details>{summary}{''.join(tables)}</details>" if tables else ""


STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2430; --dim: #5d6675; --line: #d8dce3; --card: #f5f6f8;
  --train: #9db8e8; --smooth: #1f5fc4; --eval: #c2510c; --good: #1c7c3c; --bad: #c22525; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --text: #e4e7ec; --dim: #98a0ad; --line: #343a45;
  --card: #1d2128; --train: #3d5a8f; --smooth: #7fb0ff; --eval: #ff9d5c; --good: #6fd08c; --bad: #ff7b72; } }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .3rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3, h4 { font-size: 1em; margin: .6rem 0 0; color: var(--dim); font-weight: normal; } p { margin: .2rem 0; }
h3::first-letter, h4::first-letter, summary::first-letter, figcaption b::first-letter { text-transform: uppercase; }
.facts span { display: inline-block; margin-right: 1.2em; } .command span { display: inline-block; max-width: 100%; }
p { color: var(--dim); }
table { border-collapse: collapse; }
th, td { padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; font-weight: normal; } th { color: var(--dim); }
.numbers td, .numbers tr:first-child th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
  padding-left: 1rem; }
.settings th { white-space: nowrap; } .settings td { white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 0 0 1rem; min-width: 0; } figcaption { color: var(--dim); margin-bottom: .4rem; }
figcaption b { color: var(--text); display: inline-block; }
figcaption span { display: inline-block; margin-left: .8rem; fill: none; }
figcaption span::before { content: "— "; font-weight: bold; } figcaption .eval::before { content: "● "; }
figcaption .best::before { content: "◯ "; } span.train::before { color: var(--train); }
span.smooth::before, span.chosen::before, span.after::before { color: var(--smooth); }
span.eval::before, span.best::before, span.rejected::before, span.before::before { color: var(--eval); }
svg { width: 100%; height: auto; display: block; overflow: visible; } svg text { fill: var(--dim); font-size: 9px; }
@media (max-width: 640px) { svg text { font-size: 11px; } } @media (max-width: 480px) { svg text { font-size: 14px; } }
.three svg text { font-size: 10.5px; }
@media (min-width: 901px) { .curves + .small svg text { font-size: 10.5px; } }
svg path { fill: none; stroke-width: 1.2; stroke-linejoin: round; } svg .grid { stroke: var(--line); }
svg .axis, svg .ideal { stroke: var(--dim); stroke-width: 1; } svg .ideal { stroke-dasharray: 4 3; }
path.train { stroke: var(--train); } path.smooth { stroke: var(--smooth); stroke-width: 1.8; }
circle.eval, circle.before { fill: var(--eval); }
circle.train, circle.smooth { fill: var(--smooth); } circle.after { fill: var(--smooth); fill-opacity: .7; }
circle.before { fill-opacity: .4; } circle.best { fill: none; stroke: var(--eval); stroke-width: 1.5; }
rect.chosen { fill: var(--smooth); fill-opacity: .6; } rect.rejected { fill: var(--eval); fill-opacity: .5; }
.curves { display: grid; gap: 0 1.5rem; grid-template-columns: 2fr 1fr; }
.small { display: grid; gap: 0 1rem; align-content: start; }
.curves .small { grid-template-columns: 1fr; } .curves + .small { grid-template-columns: repeat(4, 1fr); }
@media (max-width: 900px) { .curves { display: block; } 
  .curves .small, .curves + .small { grid-template-columns: 1fr 1fr; } }
.three { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); }
.bars { display: grid; grid-template-columns: auto minmax(80px, 1fr) auto; gap: .3rem .8rem; align-items: center; }
.bars span:nth-child(3n) { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.track { position: relative; height: 14px; background: var(--card); }
.track i { position: absolute; top: 0; bottom: 0; }
.track .bar { background: var(--train); } .track .was { border-left: 2px solid var(--dim); }
.track .interval { top: 6px; bottom: 6px; background: var(--text); }
article { background: var(--card); border-radius: 8px; padding: .6rem 1rem; margin: 0 0 1rem; }
pre { margin: .2rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.4 ui-monospace, monospace; }
del { background: color-mix(in srgb, var(--bad) 22%, transparent); text-decoration: underline dotted; }
ins { background: color-mix(in srgb, var(--good) 25%, transparent); text-decoration: none; }
.tokens { line-height: 1.6; background: var(--card); border-radius: 8px; padding: .6rem 1rem; }
.grey { color: var(--dim); opacity: .75; } .token { display: inline-block; vertical-align: top; line-height: 1.3;
  margin: 1px; padding: 0 2px; white-space: pre; border-bottom: 2px solid var(--good); border-radius: 3px;
  background: color-mix(in srgb, var(--bad) var(--heat), transparent); }
.token small { display: block; font: 10px/1.2 system-ui, sans-serif; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); gap: 0 1.5rem; }
article .beside { border-top: 1px solid var(--line); } .good { color: var(--good); } .bad { color: var(--bad); }
summary { cursor: pointer; margin: 1rem 0; }
"""
