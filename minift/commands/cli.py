"""The command line's error contract: one line on stderr; status 2 for a user's mistake, 1 for a machine's fault."""

import errno
import os
import re
import reprlib
import signal
import sys
import time
from argparse import Action, ArgumentParser, ArgumentTypeError, HelpFormatter
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from minift.errors import UserError
from minift.files.text import say, target_of
from minift.run import ranks
from minift.run.interrupts import interrupt_with, leave, on_signals
from minift.run.ranks import RANK, lost_rank

# For Apple's GPU: an operation that it lacks runs on the CPU. torch reads this when it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

EXAMPLES = "examples:"
SECONDS_FOR_RANK_0 = {"error": 5, "signal": 1}  # to print its line before other ranks print theirs or end
LONGEST_WORD = 340  # characters of a value or path in a message; of a longer one only the beginning is printed


class Help(HelpFormatter):
    """A help text with each example on a line of its own, and short names of values: `--max-new-tokens TOKENS`."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLES) else super()._fill_text(text, width, indent)

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        return action.dest.split("_")[-1].upper()


class CommandParser(ArgumentParser):
    """An argparse parser whose errors are one-line `UserError`s and whose flags cannot be abbreviated.

    `arguments` is the usage after the command's name, and `examples` are what may follow that name, for --help.
    """

    def __init__(self, prog: str, *, arguments: str = "[flags]", examples: Sequence[str] = (), **settings: Any) -> None:
        start = f"python {prog}" if prog.endswith(".py") else prog
        epilog = "\n  ".join([EXAMPLES, *(f"{start} {example}" for example in examples)]) if examples else None
        super().__init__(
            prog, f"{prog} {arguments}", epilog=epilog, formatter_class=Help, allow_abbrev=False, **settings
        )
        # argparse takes -1e-4 and -inf for flags, so that the value of the flag before them would be missing.
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")

    def error(self, message: str) -> NoReturn:
        """Raise UserError; argparse would print its usage and exit."""
        message = message.removeprefix("argument ").replace("ignored explicit argument", "expected no value, got")
        raise UserError(message.rstrip(".") + f" (see {self.prog} --help)")


def whole_number(least: int) -> Callable[[str], int]:
    """Return a `type` for `add_argument` that accepts whole numbers of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > 9 or int(text) < least:
            raise ArgumentTypeError(
                f"{reprlib.repr(text)}: expected a whole number of at least {least}, of 9 digits at most"
            )
        return int(text)

    return read


def add_device_flags(parser: ArgumentParser, *, half: bool = True) -> None:
    """Add --device and --dtype, which choose where and in which precision a command computes; float16 if `half`."""
    dtypes = ["float32", "bfloat16", *(["float16"] if half else []), "float64"]
    add = parser.add_argument_group("where it computes").add_argument
    add("--device", default="auto", help="cpu, mps, cuda or cuda:N; auto takes a GPU if there is one")
    add("--dtype", choices=dtypes, metavar="DTYPE", default="float32",
        help=f"one of {', '.join(dtypes)} (default: %(default)s)")  # fmt: skip


def add_judging_flags(parser: ArgumentParser) -> None:
    """Add the flags of a command in which a reward model judges answers to prompts."""
    add = parser.add_argument_group("prompts, answers and their judge").add_argument
    add("--judge", required=True, help="a reward model's folder or hub id, such as runs/rm")
    add("--prompts", required=True, metavar="FILE", help='rows of {"prompt": …}, {"instruction": …, "input": …} '
        'or {"messages": […]}; all go through the templates')  # fmt: skip
    add("--limit", type=whole_number(1), help="only that many prompts, the first ones")
    add("--judge-template", help="template of the reward model (default: that of its training run, or dialogue)")
    add("--max-new-tokens", type=whole_number(1), default=128, help="of an answer, at most (default: %(default)s)")


def check_out(path: str | None, flag: str, input_path: str, *, hint: str = "", own_flag: str = "--out") -> None:
    """Raise UserError if --out (or `own_flag`) cannot be written, or is `input_path`, the file that `flag` names.

    Commands call this before any work, so that a wrong --out does not cost the results. `hint` ends the message.
    """
    if path is None:
        return
    if not path:
        raise UserError(f"{own_flag} '': expected a file's name")
    try:
        target_of(path)
    except UserError as error:
        raise UserError(f"{own_flag} {error}{hint}") from None
    if Path(path).resolve() == Path(input_path).resolve():
        raise UserError(f"{own_flag} {path}: this is the file that {flag} names, expected another file")
    if not Path(path).parent.is_dir():
        raise UserError(f"{own_flag} {path}: expected a file name in an existing directory")


def leave_on_signals() -> None:
    """Let Ctrl-C or SIGTERM end the process at once with one line: a script's first act, before it imports torch."""
    on_signals(leave)


def run_command(main: Callable[[], None]) -> None:
    """Run `main` and translate its errors into one line on stderr and an exit status.

    Characters that standard output or error cannot encode are printed as escapes; a closed stream takes everything.
    Status 2 is a `UserError`; 1 is a full disk, a lost file or exhausted memory; 130 is Ctrl-C and 143 SIGTERM. Any
    other exception is a bug in minift and keeps its traceback.
    """
    on_signals(interrupt_with())
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with the stream closed (`>&-`), as some schedulers do
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(getattr(sys, name), TextIOWrapper):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    if RANK > 0:  # rank 0 prints the same, and its progress
        sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    try:
        main()
    except UserError as error:
        _exit(2, f"error: {error}")
    except KeyboardInterrupt as error:
        number, line = error.args or (signal.SIGINT, "interrupted")
        if RANK > 0:  # a signal ends all ranks, and rank 0 says so
            _wait_for_rank_0("signal", 128 + number)
            sys.exit(128 + number)
        _exit(128 + number, line)
    except BrokenPipeError:
        # The reader of stdout (`| head`) has closed it. Without this, Python's flush at exit would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            _exit(2, f"error: {error.filename}: {error.strerror}")
        if fault := _fault(error):
            _exit(1, f"error: {fault}")
        sys.stderr = sys.__stderr__  # for the traceback, on every rank
        ranks.speak()
        raise


def _fault(error: Exception) -> str:
    """Return what has failed in the machine; "" for a bug."""
    name = type(error).__name__
    # torch raises RuntimeErrors for memory: OutOfMemoryError on a GPU, "DefaultCPUAllocator: …" on a CPU.
    if name == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
        return f"out of memory, try a smaller --batch-size: {error}"
    # safetensors raises SafetensorError when the disk is full.
    if isinstance(error, OSError | MemoryError) or name == "SafetensorError":
        return f"the machine failed: {str(error) or name}"
    # The passes of a sharded model communicate. torch raises RuntimeErrors for gloo, and this for NCCL.
    if name == "DistBackendError" or "gloo" in str(error):
        return f"the machine failed: {lost_rank(error)}"
    return ""


def _exit(status: int, line: str) -> NoReturn:
    if RANK > 0:  # most errors are rank 0's too; then this process prints nothing
        _wait_for_rank_0("error", status)
        sys.stderr, line = sys.__stderr__, f"rank {RANK}: {line}"
    line = re.sub(r"\s*[\n\r]\s*", " ", line.strip())
    # Of a word of 60 + LONGEST_WORD characters or more, print the first 60; the punctuation after it stays.
    say(re.sub(rf"(\S{{60}})\S{{{LONGEST_WORD},}}?(?=[:,;]?(\s|$))", r"\1…", line), sys.stderr)
    ranks.speak()
    sys.exit(status)


def _wait_for_rank_0(event: str, status: int) -> None:
    """Give rank 0 time to print its line, and then end with the status; return if it has printed none.

    torchrun ends all processes as soon as one has ended. Rank 0 may have been killed, so after an error this one stays.
    """
    can_ask = ranks.store is not None and event == "error"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if can_ask else signal.SIG_DFL)
    until = time.monotonic() + SECONDS_FOR_RANK_0[event]
    while time.monotonic() < until:
        if can_ask and ranks.has_spoken():
            sys.exit(status)
        time.sleep(0.1)
