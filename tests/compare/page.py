"""One HTML page of a comparison: both sides' loss curves drawn over each other, the table, the differences."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from minift.report import STYLE, Curve, _chart
from tests.compare import Check

if TYPE_CHECKING:
    from tests.compare.differences import Difference

# The reference's curve is broad and pale and minift's thin on top of it, so that both are seen where they coincide.
OWN_STYLE = """
path.trl { stroke: var(--train); stroke-width: 6; stroke-linecap: round; } span.trl::before { color: var(--train); }
path.minift { stroke: var(--smooth); } span.minift::before { color: var(--smooth); }
path.apart { stroke: var(--eval); } circle.apart { fill: var(--eval); } figcaption span { margin-left: .8rem; }
td.agree { color: var(--good); } td.disagree { color: var(--eval); font-weight: bold; } td.note { color: var(--dim); }
main { max-width: 1400px; } .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); }
"""


def page(
    checks: Sequence[Check],
    differences: Sequence["Difference"],
    curves: dict[str, dict[str, list[float]]],
    facts: dict[str, str],
) -> str:
    """The whole page. `facts` says what was compared: versions, model, data."""
    agreed = sum(check.agrees for check in checks)
    parts = [
        "<h1>minift and the reference, side by side</h1>",
        f"<p>{agreed} of {len(checks)} comparisons agree.</p>",
        table(["", ""], [[name, value] for name, value in facts.items()]),
    ]
    if curves:
        parts += ["<h2>Loss curves</h2>", *(figures(title, sides) for title, sides in curves.items())]
    if checks:
        rows = [
            [
                check.section,
                check.what,
                check.on,
                f"{check.difference:.1e}" if check.difference else "0",
                f"{check.tolerance:.2g}",
                "agree" if check.agrees else "DISAGREE",
                check.note,
            ]
            for check in checks
        ]
        head = ["section", "what", "on", "largest difference", "tolerance", "", "note"]
        parts += ["<h2>Comparisons</h2>", table(head, rows)]
    if differences:
        rows = [[each.name, each.minift, each.reference, each.reason] for each in differences]
        head = ["", "minift", "reference", "reason"]
        parts += ["<h2>Deliberate differences</h2>", table(head, rows)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>minift and the reference</title><style>{STYLE}{OWN_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def figures(title: str, sides: dict[str, list[float]]) -> str:
    """Both loss curves in one chart, and beside it how far they are apart at each step."""
    ours, theirs = ([*enumerate(sides[name], start=1)] for name in ("minift", "trl"))
    both = _chart("loss", [Curve("trl", "trl", theirs), Curve("minift", "minift", ours)])
    apart = [(step, abs(a - b) / abs(b) if b else abs(a)) for (step, a), (_, b) in zip(ours, theirs, strict=False)]
    between = _chart("relative difference", [Curve("apart", "relative difference", apart)])
    return (
        '<div class="pair">'
        f"<figure><figcaption><b>{escape(title)}</b><span class='trl'>trl</span><span class='minift'>minift</span>"
        f"</figcaption>{both}</figure>"
        f"<figure><figcaption><b>{escape(title)}</b>: relative difference</figcaption>{between}</figure></div>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if any(head) else ""
    kinds = {"agree": ' class="agree"', "DISAGREE": ' class="disagree"'}
    lines = "".join(
        f"<tr>{''.join(f'<td{kinds.get(cell, str())}>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table>{titles}{lines}</table>"
