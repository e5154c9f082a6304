"""Short runs of train_sft.py and train_rm.py, for the tests of both and of what they leave."""

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

import train_rm
import train_sft
from data.make.pretrain import initialise
from minift.commands.cli import run_command
from minift.config import Config, to_dict
from minift.errors import UserError
from minift.files.text import sha256, write_json
from minift.files.tokenizer import save_tokenizer
from minift.files.weights import save_model
from minift.model import OPTConfig
from minift.run.folder import Run
from minift.trainer import Task

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "data" / "model"
SCRIPTS: dict[str, ModuleType] = {"sft": train_sft, "rm": train_rm}
STEPS = 4
SMALL = ["--max-steps", STEPS, "--batch-size", 4, "--device", "cpu"]
TINY = [*SMALL, "--recipe", "tiny"]  # --data would otherwise end the recipe
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 16}
SMALL_OPT = OPTConfig(vocab_size=480, max_position_embeddings=64, do_layer_norm_before=False, **SIZES)


class Reached(Exception):
    """Training would begin here."""


def opened_run(folder: Path, config: Config) -> Run:
    """Return a run of train_sft.py in a folder, with the least that resuming it needs."""
    folder.mkdir(exist_ok=True)
    write_json(
        folder / "run.json", {"task": "sft", "values": to_dict(config, "sft"), "fingerprints": {}, "template": {}}
    )
    return Run("sft", config)


def saved(model_class: type, folder: Path, seed: int, tokenizer, **changes: int) -> Path:
    """Save a model of random weights and the tokenizer in a folder; `changes` are to `SMALL_OPT`."""
    model = model_class(replace(SMALL_OPT, **changes))
    initialise(model, seed)
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    return folder


def command(script: str, *flags: object) -> list[str]:
    return [sys.executable, f"train_{script}.py", *map(str, flags)]


def execute(script: str, *flags: object) -> str:
    """Run a script in a new process, as users do; return what it printed."""
    done = subprocess.run(command(script, *flags), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run(script: str, *flags: object) -> str:
    """Run a script in this process; return what it printed."""
    arguments = [f"train_{script}.py", *map(str, flags)]
    printed = io.StringIO()
    with contextlib.chdir(ROOT), mock.patch.object(sys, "argv", arguments), contextlib.redirect_stdout(printed):
        SCRIPTS[script].main()
    return printed.getvalue()


def user_error(call: Callable, *arguments: object, **options: object) -> str:
    """Return the message, of one line, of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(script: str, *flags: object) -> str:
    """Return the message, of one line, with which a script refuses its flags."""
    return user_error(run, script, *flags)


def mistake(main: Callable[[list[str]], None], flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command prints after "error: ", nothing but one line on stderr, and assert status 2."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: main(flags))
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ")


def task_of(script: str, folder: Path, *flags: object) -> Task:
    """Return what a script would train; its run's folder gets a run.json and nothing else."""
    with mock.patch.object(SCRIPTS[script], "train", side_effect=Reached) as train, pytest.raises(Reached):
        run(script, *flags, "--out", folder)
    return train.call_args.args[0]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def few_rows(script: str, folder: Path) -> list:
    """Return the flags that name a few shipped rows: 40 to train on, and three of each category to hold out."""
    names = ("instructions", "heldout") if script == "sft" else ("pairs", "heldout_pairs")
    train, held_out = (read_lines(ROOT / "data" / f"{name}.jsonl") for name in names)
    categories = dict.fromkeys(row["kind"] for row in held_out)
    few = [row for category in categories for row in [row for row in held_out if row["kind"] == category][:3]]
    return [
        "--data", write_lines(folder / f"{names[0]}.jsonl", train[:40]),
        "--eval-data", write_lines(folder / f"{names[1]}.jsonl", few),
    ]  # fmt: skip


def snapshot(folder: Path) -> dict[str, str]:
    """Return every path below a folder, links and empty folders included, and the SHA-256 of each file."""
    return {str(path): sha256([path]) if path.is_file() else "" for path in folder.rglob("*")}


def kill_and_resume(script: str, folder: Path, *flags: object) -> None:
    """Kill a run between its first checkpoint and its end, then resume it."""
    flags = (*flags, "--out", folder, "--save-every", 1)
    steps = folder / "checkpoints" / "steps.json"
    process = subprocess.Popen(command(script, *flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not steps.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()  # SIGKILL: no handler runs
    process.wait()
    assert 0 < json.loads(steps.read_text())["last"] < STEPS
    run(script, *flags, "--resume")


def assert_same_run(found: Path, expected: Path) -> None:
    """Assert that two runs left the same weights, adapters and samples, bit for bit, and the same metrics."""
    names = ["model.safetensors", "samples.jsonl", "adapter/adapter_model.safetensors"]
    for name in names if (expected / "adapter").exists() else names[:2]:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    ours, theirs = (read_lines(folder / "metrics.jsonl") for folder in (found, expected))
    assert [line | {"seconds": 0} for line in ours] == [line | {"seconds": 0} for line in theirs]
    ours, theirs = (json.loads((folder / "run.json").read_text())["results"] for folder in (found, expected))
    assert ours == theirs
