"""Write README.md's pictures, data/pictures/mask.svg and loss.svg, from data/ and a run of `make sft`.

    python -m data.make.pictures [--run runs/sft] [--out data/pictures]

A picture has the colours of light and dark pages and loads nothing.
"""

from html import escape
from pathlib import Path

from minift.commands.cli import CommandParser, run_command
from minift.encode import IGNORE_INDEX, Example, encode_rows
from minift.files.datasets import TRAINING_SCHEMAS, load_rows
from minift.files.marks import token_texts
from minift.files.text import write_text
from minift.files.tokenizer import load_tokenizer
from minift.prompts import TEMPLATES
from minift.run.charts import Curve, chart, smoothed
from minift.run.folder import read_run
from minift.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[1]
ROW = 2  # of instructions.jsonl: a short one with an input
WIDTH, HEIGHT, MARGIN = 7.2, 18, 10  # of a character and a line of the mask, in SVG units
POINTS = 200  # of the smoothed curve
STYLE = """
svg { --text: #1c2430; --dim: #5d6675; --line: #d8dce3; --good: #c9ecd2; --smooth: #1f5fc4; --eval: #c2510c; }
@media (prefers-color-scheme: dark) { svg { --text: #e4e7ec; --dim: #98a0ad; --line: #343a45; --good: #23512f;
  --smooth: #7fb0ff; --eval: #ff9d5c; } }
text { fill: var(--dim); font: 9px sans-serif; } .mask text { font: 12px monospace; white-space: pre; }
.mask .on { fill: var(--text); } rect { fill: var(--good); } path { fill: none; stroke: var(--line); }
.smooth { stroke: var(--smooth); stroke-width: 1.8; } .eval { fill: var(--eval); }
.best { fill: none; stroke: var(--eval); stroke-width: 1.5; } .grid { stroke: var(--line); }
"""


def main(arguments: list[str] | None = None) -> None:
    """Write both pictures."""
    parser = CommandParser("python -m data.make.pictures", description="Draw the pictures of README.md.")
    parser.add_argument("--run", default="runs/sft", help="the folder of a run of `make sft` (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DATA / "pictures", help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    metrics = read_run(args.run)[1]
    tokenizer = load_tokenizer(DATA / "model")
    rows = load_rows(DATA / "instructions.jsonl", TRAINING_SCHEMAS)[ROW - 1 : ROW]
    [example] = encode_rows(rows, tokenizer, TEMPLATES["course"], max_length=None).examples
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "mask.svg", mask_picture(example, tokenizer))
    write_text(args.out / "loss.svg", loss_picture([line for line in metrics if "loss" in line]))


def mask_picture(example: Example, tokenizer: Tokenizer) -> str:
    """Return the SVG of an example's tokens; supervised ones have a background."""
    boxes, texts, column, line, widest = [], [], 0, 0, 0
    runs: dict[tuple[int, bool], tuple[int, str]] = {}  # (line, supervised) → its first column, its text
    for token, label in zip(token_texts(example.input_ids, tokenizer), example.labels, strict=True):
        for part in token.replace("\n", "↵\n").splitlines(keepends=True):
            shown = part.rstrip("\n")
            start, text = runs.get((line, label != IGNORE_INDEX), (column, ""))
            runs[line, label != IGNORE_INDEX] = start, text + shown
            if label != IGNORE_INDEX:
                x, y, width = MARGIN + column * WIDTH, MARGIN + line * HEIGHT, len(shown) * WIDTH - 1
                boxes.append(f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{HEIGHT - 2}" rx="3"/>')
            column += len(shown)
            widest = max(widest, column)
            if part.endswith("\n"):
                column, line = 0, line + 1
    for (number, is_on), (start, text) in runs.items():
        place = (
            f'x="{MARGIN + start * WIDTH:.0f}" y="{MARGIN + number * HEIGHT + 12}" textLength="{len(text) * WIDTH:.0f}"'
        )
        texts.append(f'<text class="{"on" if is_on else "off"}" {place} xml:space="preserve">{escape(text)}</text>')
    size = f"{2 * MARGIN + widest * WIDTH:.0f} {2 * MARGIN + (line + 1) * HEIGHT}"
    name = "A training row. Its answer and end token are supervised, its prompt is not."
    return _page(
        f'<svg class="mask" viewBox="0 0 {size}" role="img" aria-label="{name}">{"".join(boxes + texts)}</svg>'
    )


def loss_picture(metrics: list[dict]) -> str:
    """Return the SVG of a run's loss: training, smoothed, and held out."""
    train, held_out = ([(m["step"], m["loss"]) for m in metrics if m["split"] == split] for split in ("train", "eval"))
    smooth = smoothed(train)
    curves = [
        Curve("smooth", "training, smoothed", smooth[:: max(1, len(smooth) // POINTS)]),
        Curve("eval", "held out", held_out, is_line=False),
    ]
    best = min(held_out[1:], key=lambda point: point[1])
    return _page(chart("loss", curves, "nats per supervised token: training (line), held out (points)", best=best))


def _page(svg: str) -> str:
    """Return an SVG of a page as a file of its own."""
    start, _, rest = svg.partition(">")
    return f'{start} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{rest}\n'


if __name__ == "__main__":
    run_command(main)
