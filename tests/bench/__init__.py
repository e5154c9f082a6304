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
    batch_size: int = 1  # of transformers and CTranslate2 too; minift generates in batches of its own choice
    max_length: int = 0  # of a row
    new_tokens: int = 0  # at most, for each prompt
    num_beams: int = 1
    eos: int = 0
    dtype: str = "float32"  # of minift's weights in generation
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
    return json.loads(Path(work.data).read_text())


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held.

    On Linux `ru_maxrss` may be that of the process which started this one, so its own file is read where there is one.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
