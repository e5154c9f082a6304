"""A seeded sample of `python -m tests.crashes`: kills and faults of files, after which a run must continue exactly."""

import re
import subprocess
import sys
from pathlib import Path


def test_killed_and_failing_runs_continue_to_the_same_result(tmp_path: Path) -> None:
    flags = ["--kills", "3", "--faults", "12", "--seed", "1", "--scratch", str(tmp_path)]
    command = [sys.executable, "-m", "tests.crashes", *flags]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r": (\d+) of (\d+) end as the undisturbed run, bit for bit", done.stdout)
    assert counts == [("3", "3"), ("12", "12"), ("3", "3")] * 3  # for each kind: kills, faults, faults when continued
    assert "before the first checkpoint" in done.stdout and "inside a checkpoint's writing" in done.stdout
    assert not [*tmp_path.iterdir()]
