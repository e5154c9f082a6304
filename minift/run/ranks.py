"""What torchrun tells each process in its environment; without torchrun, a process is rank 0 of 1."""

import os

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))  # the number among the ranks of this machine, and of its GPU
IS_ONE_MACHINE = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == WORLD_SIZE
NUM_RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # by torchrun --max-restarts, so far
LOST_RANK = "another rank has ended, see its own message or torchrun's"
