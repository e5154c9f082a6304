"""Run many real commands quickly: one process imports everything once, and forks a child for each command.

A child goes through the entry point itself (`train_sft.py`, `train_rm.py` or `python -m minift`), with its own standard
streams, current folder and exit status. Importing torch for each command would take seconds.
"""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 100  # after which a command is ended; none takes more than a few


class Ended(NamedTuple):
    """What a command left: its exit status, negative for a signal, and what it printed."""

    status: int
    out: str
    err: str


@contextmanager
def forks(**environment: str):
    """Yield a function (words, folder, limits) → Ended; the first word is train_sft.py, train_rm.py or minift."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"} | environment
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forks"], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def run(words: list[str], folder: Path, limits: dict[str, int] | None = None) -> Ended:
        server.stdin.write(json.dumps([words, str(folder), limits or {}]).encode() + b"\n")
        server.stdin.flush()
        return Ended(*json.loads(server.stdout.readline()))

    try:
        yield run
    finally:
        server.stdin.close()
        server.wait()


def _serve() -> None:
    import importlib

    import pyarrow.parquet  # noqa: F401
    import torch

    from minift.__main__ import COMMANDS

    for name in ("train_sft", "train_rm", *(module for module, _ in COMMANDS.values())):
        importlib.import_module(name)
    # What torch imports only when it is used first, which takes seconds too.
    with torch.device("meta"):
        torch.nn.Embedding(2, 2)
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight]).step()
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        words, folder, limits = json.loads(line)
        streams = [os.memfd_create(name) for name in ("out", "err")]
        child = os.fork()
        if child == 0:
            _become(words, folder, limits, streams)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [_content(stream) for stream in streams]
        print(json.dumps([status, *texts]), file=answers, flush=True)


def _content(stream: int) -> str:
    with os.fdopen(stream, "rb") as file:
        file.seek(0)
        return file.read().decode("utf-8", "backslashreplace")


def _become(words: list[str], folder: str, limits: dict[str, int], streams: list[int]) -> None:
    """Be a process that was started with these words in this folder, to its end."""
    status = 1
    try:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        signal.alarm(SECONDS)
        for name, limit in limits.items():
            resource.setrlimit(getattr(resource, name), (limit, limit))
        script, *_ = sys.argv = words
        sys.orig_argv = ["python", *words]
        if script == "minift":
            del sys.modules["minift.__main__"]
            runpy.run_module("minift", run_name="__main__")
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve()
