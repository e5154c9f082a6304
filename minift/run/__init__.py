"""One training run: its folder, checkpoints, set-up, exam and report."""
