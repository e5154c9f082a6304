"""A progress bar on stderr (`huggingface_hub` brings tqdm), or plain lines where no terminal shows it."""

import sys
from contextlib import nullcontext
from typing import Any, TextIO

from huggingface_hub.utils import tqdm

PLAIN_SECONDS = 10  # between two lines of progress that no terminal shows


class PlainLines:
    """A stream for a progress bar that is not shown on a terminal: plain lines instead of one that is rewritten."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Write the text of one update as a line."""
        if text.strip():
            print(text.strip(), file=self.stream, flush=True)


def progress_bar(total: int, description: str, unit: str, initial: int = 0, unit_scale: bool = False) -> tqdm:
    """Return a progress bar on stderr; where that is a file or a pipe, a line every ten seconds and at the end.

    With `unit_scale`, 12,000,000 is printed as 12.0M.
    """
    options: dict[str, Any] = {"total": total, "desc": description, "unit": unit, "initial": initial}
    options["unit_scale"] = unit_scale
    if sys.stderr.isatty():
        return tqdm(**options, mininterval=0.5)
    form = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return tqdm(**options, file=PlainLines(sys.stderr), bar_format=form, mininterval=PLAIN_SECONDS, miniters=1)


def print_above(bar: tqdm | None, line: str) -> None:
    """Print a line of numbers on standard output, above the bar if there is one."""
    with bar.external_write_mode() if bar is not None else nullcontext():
        print(line, flush=True)
