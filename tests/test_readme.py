"""The READMEs: every command's flags exist, and every link leads to a file and a heading."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from minift.__main__ import COMMANDS
from minift.commands.flags import parse
from tests.runs import ROOT

READMES = [ROOT / name / "README.md" for name in ("", "minift", "data", "tests", "tests/compare")]


def commands() -> list[str]:
    """Return the command lines of the READMEs' shell blocks that run minift or make, without values to fill in."""
    blocks = [block for path in READMES for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL)]
    lines = re.sub(r" \\\n\s*", " ", "\n".join(blocks)).splitlines()
    return [line for line in lines if line.startswith(("minift ", "make ")) and not re.search(r"…|\$", line)]


def test_there_are_commands() -> None:
    assert len(commands()) > 25 and {line.split()[0] for line in commands()} == {"minift", "make"}


@pytest.mark.parametrize("line", dict.fromkeys(commands()))
def test_every_flag_of_a_command_exists(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, name, *words = shlex.split(line, comments=True)
    if program == "minift":
        importlib.import_module(COMMANDS[name][0])._parser().parse_args(words)
        return
    dry = subprocess.run(["make", "-n", name, *words], capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    if name in ("sft", "rm"):
        given = dict(word.split("=", 1) for word in words)
        flags = shlex.split(given.pop("ARGS", ""))
        for variable, value in given.items():
            flags += [f"--{variable.lower()}", value]
        if "--help" not in flags:
            parse(name, flags)


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of a file's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(readme: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]+)?\)", readme.read_text())
    for path, anchor in links:
        target = (readme.parent / path).resolve() if path else readme
        assert target.exists(), path
        assert not anchor or anchor[1:] in anchors(target), path + anchor
    assert len(links) >= 4 or readme.parent.name == "compare"
