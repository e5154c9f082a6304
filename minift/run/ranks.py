"""The rank of this process and the number of ranks, as torchrun sets them; without torchrun, rank 0 of 1."""

import os
import re
from contextlib import suppress
from typing import Any

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))  # the number among the ranks of this machine, and of its GPU
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the number of ranks of this machine
NUM_MACHINES = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
IS_ONE_MACHINE = LOCAL_WORLD_SIZE == WORLD_SIZE
NUM_RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # so far
MAX_RESTARTS = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))  # of torchrun --max-restarts
store: Any = None  # torchrun's, by which ranks can still speak when another has ended; `distributed.join` sets it
SPOKEN = f"rank 0 has printed why it ends, restart {NUM_RESTARTS}"  # a key of the store


def speak() -> None:
    """Tell the other ranks, if this one is rank 0, that it has printed why it ends."""
    with suppress(RuntimeError):
        if RANK == 0 and store is not None:
            store.set(SPOKEN, "")


def has_spoken() -> bool:
    """Return whether rank 0 has printed why it ends; False if the store has ended too."""
    with suppress(RuntimeError):
        return bool(store.check([SPOKEN]))
    return False


def lost_rank(error: Exception) -> str:
    """Return the message for an error in the communication with other ranks."""
    sentence = re.split(r"\n|\. ", str(error))[0]
    cause = re.sub(r"^\[\S+\] ", "", sentence)  # gloo's begins with a file of its own source
    return f"another rank has ended, see its own message or torchrun's ({cause:.100})"
