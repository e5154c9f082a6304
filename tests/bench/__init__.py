"""`make bench`: minift and what it replaces, timed in turn on the same work; memory; time to the first step.

`__main__` prepares the work and prints the table. A side is a module with a function `run`. `ours` is minift's; it
imports nothing of the others, so that `child` can measure each side's memory in a process of its own.
"""

import json
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Work(NamedTuple):
    """What a side does. All of it can be written as JSON, for a child process."""

    line: str  # of the table: sft, reward, greedy, beam, single, bleu or startup
    folder: str  # of the model
    data: str  # a file of rows, of pairs, or of the ids of prompts
    batch_size: int = 1  # in rows, pairs or prompts
    max_length: int = 0  # of a row
    counts: Sequence[int] = ()  # of each row or pair that is trained on: 1, or on a GPU its tokens
    limit: int | None = None  # only so many of the rows, pairs or prompts: a batch size is tried
    warm_up: int = 1  # first steps that are not timed
    is_compiled: bool = False  # minift's layers in training
    keeps_little: bool = False  # minift trains with --gradient-checkpointing
    new_tokens: int = 0  # at most, for each prompt
    num_beams: int = 1
    eos: int = 0
    device: str = "cpu"  # or cuda
    dtype: str = "float32"  # in training bfloat16 means autocast, in generation it is that of the weights
    threads: int = 1
    scratch: str = ""  # a folder for what a trainer writes
    flags: Sequence[str] = ()  # more flags of train_sft.py
    started: float = 0.0  # when its process was started


class Timing(NamedTuple):
    """One side's work in one round."""

    seconds: float
    items: int  # rows, pairs, tokens or segments
    completions: Sequence[Sequence[int]] = ()  # of generation


def read_ids(work: Work) -> list[list[int]]:
    """Return the prompts of a generation line."""
    return json.loads(Path(work.data).read_text())[: work.limit]


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held.

    On Linux `ru_maxrss` may be that of the process which started this one, so its own file is read where there is one.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
