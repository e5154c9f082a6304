"""The folder of a new run and its lock, so that two processes never train in one folder."""

import itertools
import os
from pathlib import Path
from typing import TextIO

from minift.errors import UserError
from minift.files.text import name_errors, say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # a killed process leaves this file behind, unlocked
LEFT_BY_A_START = {LOCK, ".run.json.unfinished"}  # one that was killed before run.json was complete
_held: dict[Path, TextIO] = {}  # the lock files that this process holds, by folder


def check_folder(folder: Path) -> bool:
    """Return whether a folder holds an earlier run. Nothing on disk is changed.

    Raises UserError if the folder holds something else or cannot be made, or if another process trains in it.
    """
    with name_errors(f"--out {folder}", "expected a folder that can be made"):
        is_run = (folder / "run.json").exists()
        if not is_run and folder.exists() and {path.name for path in folder.iterdir()} - LEFT_BY_A_START:
            raise UserError(f"--out {folder}: not empty and not an earlier run, expected a new folder or a run's")
        if is_run and Path.cwd().is_relative_to(folder.resolve()):
            raise UserError(f"--out {folder}: an earlier run, which can't be renamed, as the current folder is in "
                            "it; expected another folder")  # fmt: skip
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"--out {folder}: expected a folder that can be made and written")
        check_free(folder)
    return is_run


def make_folder(folder: Path) -> None:
    """Make a run's folder and lock it; keep an earlier run as `<folder>-1` or so. Raises like `check_folder`."""
    with name_errors(f"--out {folder}", "expected a folder that can be made"):
        folder.parent.mkdir(parents=True, exist_ok=True)  # so that new/../run is the earlier run too
        is_run = check_folder(folder)
        folder.mkdir(exist_ok=True)
        hold(folder)
        if is_run:
            names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
            previous = next(name for name in names if not name.exists())
            folder.rename(previous)
            say(f"the earlier run is kept in {previous}")
            folder.mkdir()
            hold(folder)
            (previous / LOCK).unlink(missing_ok=True)


def check_free(folder: Path) -> None:
    """Raise UserError if another process trains in a folder now. Only `hold` makes sure of it."""
    path = folder / LOCK
    if fcntl is None or folder.resolve() in _held or not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that only check don't refuse each other
        except BlockingIOError:
            raise _taken(folder) from None
        except OSError:  # a file system without locks: `hold` says so
            pass


def hold(folder: Path) -> None:
    """Lock a folder until `release` or the end of this process; raise UserError if another process holds it."""
    if earlier := _held.pop(folder.resolve(), None):  # of an earlier run of this process
        earlier.close()
    if fcntl is None:
        say(f"{folder} can't be locked on this system: do not start another run in it")
        return
    path = folder / LOCK
    file = path.open("a", encoding="utf-8")
    is_free = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_free = False
    except OSError as error:  # a file system without locks
        say(f"{folder} can't be locked ({error.strerror}): do not start another run in it")
    # Between opening and locking the file, the other run can have ended, or renamed the folder.
    if not is_free or not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        file.close()
        raise _taken(folder)
    _held[folder.resolve()] = file


def release(folder: Path) -> None:
    """Delete the lock file, while it is still locked, and unlock the folder."""
    if file := _held.pop(folder.resolve(), None):
        (folder / LOCK).unlink(missing_ok=True)
        file.close()


def _taken(folder: Path) -> UserError:
    return UserError(f"--out {folder}: another process is training in it: give another --out, or wait for its end")
