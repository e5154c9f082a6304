"""Comparison of a run with the one that it resumes, and the command that resumes one.

`read_earlier` and `check_values` run before the model is loaded, `check_contents` when model and data have been read.
"""

import re
import shlex
import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from minift.config import flag_of
from minift.errors import UserError
from minift.files.text import check_not_pointer, read_json
from minift.run import checkpoint
from minift.run.ranks import IS_ONE_MACHINE, LOCAL_WORLD_SIZE, MAX_RESTARTS, NUM_MACHINES, WORLD_SIZE

A_RUN = "the folder of a run, such as runs/sft"
WITHOUT_EFFECT = {"recipe", "out", "resume", "device", "log_every", "eval_every", "save_every", "bleu_samples",
                  "run_checks", "gradient_checkpointing", "compile", "fsdp", "encoded_cache"}  # fmt: skip
COMPARED_BY_CONTENT = {"model", "revision", "data", "eval_data", "template"}  # the same files may have moved
MISSING_EARLIER = {"config", "tokenizer"}  # fingerprints that runs of earlier versions lack


def read_earlier(folder: Path) -> dict[str, Any]:
    """Return the record in run.json of the run to resume; raise UserError if it is damaged or has no checkpoint."""
    path = folder / "run.json"
    start = "leave --resume out to start afresh"
    if not path.exists() or checkpoint.find(folder / "checkpoints") is None:
        missing = f"{folder} has no checkpoint to continue from" if path.exists() else f"{path} does not exist"
        test = f"$(test -e {shlex.quote(str(folder / 'checkpoints' / checkpoint.STEPS))} && echo --resume)"
        raise UserError(f"--resume: {missing}; {start}, or write {test} to resume where possible")
    check_not_pointer(path)
    try:
        earlier = read_json(path, A_RUN)
        return earlier | {part: dict(earlier[part]) for part in ("values", "fingerprints", "template")}
    except (UserError, ValueError, KeyError, TypeError):
        raise UserError(f"--resume: {path} is damaged; {start}") from None


def is_unfinished(folder: Path) -> bool:
    """Return whether a folder holds a run that has a checkpoint and no results."""
    path = folder / "run.json"
    return checkpoint.find(folder / "checkpoints") is not None and "results" not in read_json(path, A_RUN)


def check_values(
    folder: Path, earlier: Mapping[str, Any], script: str, values: Mapping[str, Any], may_differ: Set[str]
) -> None:
    """Raise UserError if the earlier run is the other script's, or if a value differs that changes the result."""
    if earlier.get("task") != script:
        raise UserError(f"--resume: {folder} is not a run of this script: its task is {earlier.get('task')!r:.40}")
    for name, value in values.items():
        if name not in WITHOUT_EFFECT | COMPARED_BY_CONTENT | may_differ:
            times = ", times the number of ranks," if name == "grad_accum" else ""
            _check_equal(folder, flag_of(name) + times, earlier["values"].get(name), value)


def check_contents(
    folder: Path, earlier: Mapping[str, Any], fingerprints: Mapping[str, str], template: Mapping[str, Any]
) -> None:
    """Raise UserError if the data, the model or the template's text differ from the earlier run's."""
    recorded = earlier["fingerprints"]
    for name in {**recorded, **fingerprints}:
        if name in recorded or name not in MISSING_EARLIER:
            _check_equal(folder, f"the fingerprint of {name}", recorded.get(name), fingerprints.get(name))
    for name, value in template.items():
        if name != "name":
            _check_equal(folder, f"the template's {name}", earlier["template"].get(name), value)


def recorded_commits(earlier: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, str]:
    """Return the recorded commits of data and weights whose flags have not changed."""
    commits = earlier.get("commits")
    flags = {"data": "data", "eval_data": "eval_data", "weights": "model"}
    same = [name for name, flag in flags.items() if earlier["values"].get(flag) == values[flag]]
    found = {name: str(commits.get(name)) for name in same} if isinstance(commits, dict) else {}
    return {name: commit for name, commit in found.items() if re.fullmatch("[0-9a-f]{40}", commit)}


def command(*flags: str) -> str:
    """Return this process's command line with --resume and more flags. Of a flag given twice the last counts."""
    note = "" if IS_ONE_MACHINE else " (on each machine; … is what torchrun was given there)"
    return f"{command_of_run()} {shlex.join(['--resume', *flags])}{note}"


def command_of_run() -> str:
    """Return the command line of this process without --resume, or of torchrun, if that has started it.

    On several machines it has … for the arguments by which they find each other: torchrun does not pass these on.
    """
    launcher = ""
    if WORLD_SIZE > 1:
        machines = "--standalone" if IS_ONE_MACHINE else f"--nnodes={NUM_MACHINES} …"
        restarts = f" --max-restarts={MAX_RESTARTS}" if MAX_RESTARTS else ""
        launcher = f" -m torch.distributed.run {machines} --nproc-per-node={LOCAL_WORLD_SIZE}{restarts}"
    return f"{shlex.quote(sys.orig_argv[0])}{launcher} {shlex.join(word for word in sys.argv if word != '--resume')}"


def _check_equal(folder: Path, subject: str, earlier: object, now: object) -> None:
    if earlier != now:
        was, it_is = (text if len(text) <= 64 else f"{text:.60}…" for text in map(str, (earlier, now)))
        raise UserError(f"--resume: {subject} was {was} in {folder}, and is now {it_is}")
