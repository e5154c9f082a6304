"""`python -m tests.bench.child SIDE FILE`: do one side's work in this process alone; print its time and peak memory."""

import importlib
import json
import sys
from pathlib import Path

from tests.bench import Work, peak_memory

side, file = sys.argv[1:]
timing = importlib.import_module(f"tests.bench.{side}").run(Work(**json.loads(Path(file).read_text())))
print(json.dumps({"seconds": timing.seconds, "items": timing.items, "peak": peak_memory()}))
