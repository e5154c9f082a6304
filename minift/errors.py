"""How a command ends when something is wrong: one line on stderr, status 2 for the user, 1 for the machine."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake the user can put right.

    The message is one line: the file, line or flag concerned, what was expected there, what to do about it.
    """


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s, on one line, and whose flags can't be abbreviated."""

    def __init__(self, prog: str, **settings) -> None:
        super().__init__(prog, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:  # argparse would print its usage and exit by itself
        raise UserError(message.removeprefix("argument ").rstrip(".") + f" (see {self.prog} --help)")


def whole_number(least: int) -> Callable[[str], int]:
    """What reads a flag's text as a whole number of at least `least`, for `CommandParser.add_argument`'s `type`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least {least}")
        return int(text)

    return read


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`, and end the process as DESIGN's error contract says.

    Status 2 for a `UserError`; 1 for a full disk, a lost file or memory that ran out; 130 for Ctrl-C. Anything else is
    a bug in minift and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        _end(2, f"error: {error}")
    except KeyboardInterrupt:
        _end(130, "interrupted")
    except BrokenPipeError:
        # Whoever read the output (`| head`) has had enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MemoryError) as error:
        _end(1, f"error: the machine failed: {error or type(error).__name__}")
    except Exception as error:
        # torch reports memory as a RuntimeError: OutOfMemoryError on a GPU, "DefaultCPUAllocator: …" on a CPU.
        # A full disk is a SafetensorError where safetensors writes.
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
            _end(1, f"error: out of memory, try a smaller --batch-size: {error}")
        if type(error).__name__ == "SafetensorError":
            _end(1, f"error: the machine failed: {error}")
        raise


def _end(status: int, line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(status)
