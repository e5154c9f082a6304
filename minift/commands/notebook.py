"""The form of `minift tour`: stops, tables and comparisons, as text for a terminal or as an HTML page."""

import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby, zip_longest
from typing import Any, NamedTuple

from minift.files.marks import GREEN, GREY, PLAIN
from minift.files.text import say, write_text

WIDTH = 80  # columns of a terminal
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>minift tour</title><style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 46rem; padding: 1rem }
pre { border-left: 3px solid #8886; font-size: 13px; overflow-x: auto; padding: .2rem 0 }
pre b { color: light-dark(#070, #6d6); font-weight: normal }
pre i, code { color: #888; font-style: normal }
code { font-size: 13px }
</style></head><body><main><h1>minift tour</h1>
"""

# The paragraphs of a stop. One that begins with two blanks is printed as it is, any other is wrapped.
Text = Iterator[str]
Method = Callable[[Any], Text]


class Stop(NamedTuple):
    """A method that yields the paragraphs of a stop, and the functions that it shows. Its docstring is the title."""

    method: Method
    functions: tuple[Callable, ...]

    @property
    def title(self) -> str:
        """Return the method's docstring."""
        return (self.method.__doc__ or "").rstrip(".")

    @property
    def places(self) -> list[str]:
        """Return each file with the functions that are in it."""
        files: dict[str, list[str]] = {}
        for function in self.functions:
            files.setdefault(function.__module__.replace(".", "/") + ".py", []).append(function.__qualname__)
        return [f"{file}: {', '.join(names)}" for file, names in files.items()]


STOPS: list[Stop] = []


def stop(*functions: Callable) -> Callable[[Method], Method]:
    """Return a decorator that appends a method to the stops."""

    def append(method: Method) -> Method:
        STOPS.append(Stop(method, functions))
        return method

    return append


class DisagreementError(Exception):
    """A value that differs by hand and by code."""


def agree(name: str, by_hand: Any, by_code: Any) -> str:
    """Return a line that says that two values are equal, floats up to rounding. Raises DisagreementError."""
    is_number = isinstance(by_hand, float)
    if not (math.isclose(by_hand, by_code, rel_tol=2e-5, abs_tol=1e-6) if is_number else by_hand == by_code):
        raise DisagreementError(f"{name}: by hand {by_hand}, by code {by_code}")
    return f"  {name}: by hand {by_hand:.5f}, by code {by_code:.5f}" if is_number else f"  checked: {name}"


def ends(values: Sequence[int], count: int) -> str:
    """Return the first two of some values and the last `count`."""
    return " ".join(map(str, [*values[:2], "…", *values[-count:]]))


def spans(indices: Sequence[int]) -> str:
    """Return increasing indices as text: "0 … 6, 55, 94 … 132"."""
    groups = groupby(enumerate(indices), lambda place: place[1] - place[0])  # consecutive ones have one difference
    runs = [[index for _, index in group] for _, group in groups]
    return ", ".join(f"{run[0]} … {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def table(title: str, columns: Sequence[Sequence[str]]) -> Text:
    """Yield lines of cells side by side, each column under the same title."""
    for cells in zip_longest(*([title, *column] for column in columns), fillvalue=" " * len(title)):
        yield ("  " + "  ".join(cells)).rstrip()


def indented(text: str) -> str:
    """Return text that is printed as it is."""
    return textwrap.indent(text.strip("\n"), "  ")


def run(tour: object, only: int | None) -> Iterator[tuple[int, Stop, list[str]]]:
    """Run the stops up to number `only`, or all of them; yield it, or each, with its number and paragraphs.

    Where by hand and by code disagree, print it and end the process with status 1.
    """
    for number, stop in enumerate(STOPS[:only], start=1):
        try:
            paragraphs = [*stop.method(tour)]
        except DisagreementError as error:
            say(f"error: stop {number}: {error}", sys.stderr)
            sys.exit(1)
        if only in (None, number):
            yield number, stop, paragraphs


def show(tour: object, only: int | None, *, pause: bool) -> None:
    """Print the stops, or one of them; with `pause`, wait for Enter between two. The end of the input ends the tour."""
    for number, stop, paragraphs in run(tour, only):
        if pause and number > 1 and only is None:
            say("Enter: the next stop")
            if not sys.stdin.readline():
                return
        heading = f"── stop {number} of {len(STOPS)}: {stop.title} ".ljust(WIDTH, "─")
        lines = [heading, *(f"   {place}" for place in stop.places)]
        for paragraph in paragraphs:
            lines += [paragraph] if paragraph.startswith("  ") else ["", textwrap.fill(paragraph, WIDTH)]
        say("\n".join([*lines, ""]), is_escaped=True)


def _as_html(paragraph: str) -> str:
    """Return a paragraph as HTML, in which names between backticks are code. Backticks of rows stay."""
    text = escape(paragraph)
    is_row = text.startswith("  ") and not re.match("  checked: |.*: by hand ", text)
    return text if is_row else re.sub("`(.*?)`", r"<code>\1</code>", text)


def write_page(tour: object, only: int | None, path: str) -> None:
    """Write the stops, or one of them, to an HTML page."""
    parts = [PAGE]
    for number, stop, paragraphs in run(tour, only):
        places = "<br>".join(map(escape, stop.places))
        parts.append(f"<h2>{number}. {escape(stop.title)}</h2>\n<p><code>{places}</code></p>")
        for is_printed, group in groupby(paragraphs, key=lambda paragraph: paragraph.startswith("  ")):
            tag, text = "pre" if is_printed else "p", "\n".join(map(_as_html, group))
            for colour, name in ((GREEN, "b"), (GREY, "i")):
                text = re.sub(
                    f"{re.escape(colour)}(.*?){re.escape(PLAIN)}", rf"<{name}>\1</{name}>", text, flags=re.DOTALL
                )
            parts.append(f"<{tag}>{text}</{tag}>")
    write_text(path, "\n".join([*parts, "</main></body></html>", ""]))
    say(path)
