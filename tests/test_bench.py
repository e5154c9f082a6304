"""The benchmark runs and prints a line for each part. Tests do not assert times."""

import re
import subprocess
import sys
from pathlib import Path


def test_every_line_is_printed() -> None:
    flags = ["--rounds", "2", "--steps", "2", "--batch-size", "2", "--prompts", "4", "--new-tokens", "2"]
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-m", "tests.bench", *flags], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    head, _, *lines = done.stdout.splitlines()
    assert head.startswith("tiny shape, batches of 2, float32")
    number = r"[\d.]+"
    for line in lines:
        found = re.fullmatch(rf"(.{{34}}) *({number}) +({number}) +({number})x   ({number}) to ({number})(; .*)?", line)
        assert found, line
        ours, theirs, ratio, smallest, largest = map(float, found.groups()[1:6])
        assert abs(ratio - ours / theirs) < 0.01 + 0.06 / theirs * (1 + ratio)  # each is printed rounded
        assert smallest <= ratio + 0.01 and ratio <= largest + 0.01
    parts = ["rows, SFT", "pairs, reward model", "tokens, greedy", "tokens, 4 beams", "segments, BLEU"]
    assert [line[:34].strip() for line in lines] == parts
