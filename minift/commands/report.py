"""`minift report`: write a run's HTML page again, from the files in its folder."""

from pathlib import Path

from minift.commands.cli import CommandParser
from minift.files.text import say
from minift.run.folder import read_run
from minift.run.report import write_report


def main(arguments: list[str] | None = None) -> None:
    """Write `report.html` into the folder of a run and print its path."""
    parser = CommandParser("minift report", arguments="RUN", description="Write a run's HTML page, from its folder.")
    parser.add_argument("run", type=Path, help="the run's folder, such as runs/sft; report.html is written into it")
    folder = parser.parse_args(arguments).run
    say(str(write_report(folder, *read_run(folder))))
