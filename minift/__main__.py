"""The command line: `minift COMMAND`, or `python -m minift COMMAND`."""

import difflib
import importlib
import sys

from minift.commands.cli import run_command
from minift.errors import UserError
from minift.files.text import say

# command -> (module, one line of help)
COMMANDS = {
    "tour": ("minift.commands.tour", "see a row become an answer, and a pair a reward, in ten stops"),
    "chat": ("minift.commands.chat", "ask a model; a reward model may judge or choose its answers"),
    "generate": ("minift.commands.generate", "complete prompts: greedy, sampling or beam search"),
    "preview": ("minift.commands.preview", "show the tokens of a data set and mark the supervised ones"),
    "bleu": ("minift.commands.bleu", "compute BLEU as sacreBLEU does, as JSON"),
    "score": ("minift.commands.score", "score responses or preference pairs with a reward model"),
    "winrate": ("minift.commands.winrate", "compare two models' answers with a reward model"),
    "best-of": ("minift.commands.best_of", "sample answers; a reward model chooses the best of n"),
    "report": ("minift.commands.report", "write a run's report.html again"),
}


def main() -> None:
    """Run the command that the process's arguments name; without a name, list the commands."""
    run_command(_run)


def _run() -> None:
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        say("usage: minift COMMAND ...\n")
        for command, (_, description) in COMMANDS.items():
            say(f"  {command:10}{description}")
        say("\n`minift COMMAND --help` lists a command's flags.")
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        raise UserError(f"{name}: not a command, {hint} (`minift` lists the commands)")
    module, _ = COMMANDS[name]
    importlib.import_module(module).main(rest)  # imported here: Ctrl-C during torch's import ends in one line too


if __name__ == "__main__":
    main()
