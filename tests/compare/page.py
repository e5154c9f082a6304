"""The results of a comparison as files: one HTML page with both sides' loss curves, and a README in Markdown."""

from collections.abc import Sequence
from functools import partial
from html import escape

from minift.run.charts import Curve, chart
from minift.run.report import STYLE
from tests.compare import Check, Difference

# The reference's curve is broad and pale, and minift's is thin and on top, so that both show where they coincide.
OWN_STYLE = """
.wide { overflow-x: auto; }
path.trl { stroke: var(--train); stroke-width: 6; stroke-linecap: round; } span.trl::before { color: var(--train); }
path.minift { stroke: var(--smooth); } span.minift::before { color: var(--smooth); }
path.distance { stroke: var(--eval); } circle.distance { fill: var(--eval); } figcaption span { margin-left: .8rem; }
td.agree { color: var(--good); } td.disagree { color: var(--bad); font-weight: bold; }
td.long { min-width: 12rem; } td.short { white-space: nowrap; }
main { max-width: 1400px; } .pair { display: grid; gap: 0 1.5rem; }
@media (min-width: 900px) { .pair { grid-template-columns: 1fr 1fr; } }
"""
VERDICTS = ("agree", "DISAGREE")
LONG = 24  # a cell with more characters is broken into lines
README = """# minift and the packages it replaces, side by side

```sh
make compare                  # everything below; also writes runs/compare/report.html, with the loss curves
make compare ONLY=bleu,masks  # some sections: {sections}
make compare MODEL=… DATA=…   # your own model and rows (or pairs)
make compare ARGS=--faults    # plants ten faults in minift, one at a time; each must be noticed
```

`make compare` trains minift and trl from the same weights on the same rows, and compares tokenizer, masks, model,
generation, BLEU and files with the packages that minift replaces. The exit status is 1 if anything disagrees. Without
ONLY, MODEL, DATA and ARGS it writes this file.

In the table, "largest" is the largest difference: relative for losses and norms; for things that must be equal, the
number of those that are not. Where float32 runs disagree, the note gives each side's distance from float64: a ReLU's
gradient jumps at 0, so on some machines rounding alone can move the final weights by more than 1e-5.

minift's gradient norm is compared with the float64 norm of trl's own gradient, taken before trl clips it. It is not
compared with the norm that trl logs, which is torch's: in float32 that has an error of its own. The note says how large
it is, and the deliberate differences show the numbers. The gradient of a ReLU jumps at 0: the note names the steps in
which an input, less than 1e-5 from 0 in both models, is positive in one of them only. They count like all others.

{facts}

```
{table}
```

{verdict}.

## Deliberate differences

{differences}
"""


def readme(
    facts: dict[str, str],
    table: Sequence[str],
    verdict: str,
    differences: Sequence[Difference],
    sections: Sequence[str],
) -> str:
    """Return README.md; `table` has the lines that the command printed."""
    return README.format(
        sections=" ".join(sections),
        facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
        table="\n".join(table),
        verdict=verdict[:1].upper() + verdict[1:],
        differences="\n".join(
            f"- **{name}**\n  - minift: {minift}\n  - reference: {reference}\n  - reason: {reason}"
            for name, minift, reference, reason in (map(partial(escape, quote=False), each) for each in differences)
        ),
    )


def page(
    checks: Sequence[Check],
    differences: Sequence[Difference],
    curves: dict[str, dict[str, list[float]]],
    facts: dict[str, str],
) -> str:
    """Return the HTML page. `facts` says what was compared: versions, model, data."""
    agreed = sum(check.agrees for check in checks)
    parts = [
        "<h1>minift and the reference, side by side</h1>",
        f"<p>{agreed} of {len(checks)} comparisons agree.</p>",
        table(["", ""], [[name, value] for name, value in facts.items()]),
    ]
    if curves:
        parts += ["<h2>Loss curves</h2>", *(figures(title, sides) for title, sides in curves.items())]
    if checks:
        # The verdict first: on a telephone the other columns are scrolled.
        head = ["", "section", "what", "on", "largest difference", "tolerance", "note"]
        rows = [[check.cells[-1], *check.cells[:-1], check.note] for check in checks]
        parts += ["<h2>Comparisons</h2>", table(head, rows)]
    if differences:
        head = ["", "minift", "reference", "reason"]
        parts += ["<h2>Deliberate differences</h2>", table(head, differences)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>minift and the reference</title><style>{STYLE}{OWN_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def figures(title: str, sides: dict[str, list[float]]) -> str:
    """Return a chart of both loss curves, and one of their relative difference in each step."""
    ours, theirs = ([*enumerate(sides[name], start=1)] for name in ("minift", "trl"))
    both = chart("loss", [Curve("trl", "trl", theirs), Curve("minift", "minift", ours)], "mean loss of a step")
    distances = [(step, abs(a - b) / abs(b) if b else abs(a)) for (step, a), (_, b) in zip(ours, theirs, strict=False)]
    between = chart("relative difference", [Curve("distance", "relative difference", distances)])
    return (
        '<div class="pair">'
        f"<figure><figcaption><b>{escape(title)}</b><span class='trl'>trl</span><span class='minift'>minift</span>"
        f"</figcaption>{both}</figure>"
        f"<figure><figcaption><b>{escape(title)}</b>: relative difference</figcaption>{between}</figure></div>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if any(head) else ""
    lines = []
    for row in rows:
        classes = [cell.lower() if cell in VERDICTS else "long" if len(cell) > LONG else "short" for cell in row]
        cells = zip(classes, map(escape, row), strict=True)
        line = "".join(f'<td class="{css_class}">{cell}</td>' for css_class, cell in cells)
        lines.append(f"<tr>{line}</tr>")
    return f'<div class="wide"><table>{titles}{"".join(lines)}</table></div>'
