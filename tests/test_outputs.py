"""What is left where an output's name is not a plain file: nothing but a regular file is ever replaced.

Every device, pipe, socket and link is made in the test's own folder.
"""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.make import instructions
from minift.commands import best_of, generate, preview, report, score, winrate
from minift.commands.cli import check_out
from minift.errors import UserError
from minift.files.text import atomic_write, target_of, write_text
from minift.files.tokenizer import load_tokenizer, save_tokenizer
from minift.files.weights import load_reward_model, save_model, write_tensors
from minift.run.lock import make_folder
from tests.runs import write_lines

MODEL = Path(__file__).parents[1] / "data" / "model"
NOT_FILES = ("character device", "named pipe", "socket", "link to a directory", "link to a named pipe")
OLD = "old content\n"


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward_model")
    save_model(load_reward_model(MODEL, seed=0), folder)
    save_tokenizer(load_tokenizer(MODEL), folder)
    return folder


@pytest.fixture
def commands(tmp_path: Path, reward_model: Path) -> dict[str, Callable[[Path], None]]:
    """Every command that writes a file, as a function of the file's name."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"instruction": "Add."}])
    rows = write_lines(tmp_path / "rows.jsonl", [{"instruction": "Add.", "output": "a + b"}])
    pairs = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "Add.", "chosen": "a + b", "rejected": "a"}])
    short = ["--max-new-tokens", "2"]
    sampled = ["--prompts", str(prompts), "--samples", "2", *short]
    return {
        "generate": lambda out: generate.main(
            ["--model", str(MODEL), "--prompts", str(prompts), *short, "--out", str(out)]
        ),
        "preview": lambda out: preview.main(["--model", str(MODEL), "--data", str(rows), "--out", str(out)]),
        "score": lambda out: score.main(["--model", str(reward_model), "--data", str(pairs), "--out", str(out)]),
        "winrate": lambda out: winrate.main(
            ["--model-a", str(MODEL), "--model-b", str(MODEL), "--judge", str(reward_model)]
            + ["--prompts", str(prompts), *short, "--out", str(out)]
        ),
        "best-of": lambda out: best_of.main(
            ["--model", str(MODEL), "--judge", str(reward_model), *sampled, "--out", str(out)]
        ),
    }


COMMANDS = ("generate", "preview", "score", "winrate", "best-of")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Make something that is not a regular file, named `out`."""
    sockets = []

    def make(name: str) -> Path:
        out = tmp_path / "out"
        if name == "character device":
            try:
                os.mknod(out, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            except PermissionError:
                pytest.skip("this user cannot make device nodes")
        elif name == "named pipe":
            os.mkfifo(out)
        elif name == "socket":
            sockets.append(socket.socket(socket.AF_UNIX))
            sockets[-1].bind(os.path.relpath(out))  # a socket's name must be short
        elif name == "link to a directory":
            (tmp_path / "directory").mkdir()
            out.symlink_to("directory")
        else:
            os.mkfifo(tmp_path / "pipe")
            out.symlink_to("pipe")
        return out

    yield make
    for opened in sockets:
        opened.close()


def identity(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return status.st_ino, status.st_mode, status.st_rdev


@pytest.mark.parametrize("name", NOT_FILES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_what_is_not_a_file(command: str, name: str, commands, make) -> None:
    out = make(name)
    before = identity(out), sorted(out.parent.iterdir())

    with pytest.raises(UserError, match=f"^--out {out}: a .*, expected a regular file or a new name"):
        commands[command](out)

    assert (identity(out), sorted(out.parent.iterdir())) == before


@pytest.mark.parametrize("name", NOT_FILES)
def test_every_writer_refuses_it_too(name: str, make, tmp_path: Path) -> None:
    """Not only the flag is checked: a run's own report.html, or a generator's file, may be a link or a pipe."""
    out = make(name)
    before = identity(out)
    with pytest.raises(UserError, match="expected a regular file or a new name"):
        write_text(out, "text")

    run = tmp_path / "run"
    run.mkdir()
    write_lines(run / "metrics.jsonl", [{"step": 1, "split": "train", "loss": 1.0}])
    (run / "run.json").write_text("{}")
    (run / "report.html").symlink_to(out)
    with pytest.raises(UserError, match="expected a regular file or a new name"):
        report.main([str(run)])

    assert identity(out) == before
    assert (run / "report.html").is_symlink()


@pytest.mark.parametrize("name", NOT_FILES[:3])
def test_a_run_refuses_it_as_its_folder(name: str, make) -> None:
    out = make(name)
    before = identity(out)
    with pytest.raises(UserError, match=f"--out {out}: .*expected a folder"):
        make_folder(out)
    assert identity(out) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_link_stays_and_its_target_is_replaced(command: str, commands, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, out = tmp_path / "elsewhere" / "target.jsonl", tmp_path / "out"
    target.write_text(OLD)
    out.symlink_to("elsewhere/target.jsonl")

    commands[command](out)

    assert out.is_symlink() and str(out.readlink()) == "elsewhere/target.jsonl"
    assert target.read_text().startswith("{")
    assert [path.name for path in target.parent.iterdir()] == ["target.jsonl"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dangling_link_stays_and_its_target_is_made(command: str, commands, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.symlink_to("target.jsonl")
    commands[command](out)
    assert out.is_symlink()
    assert (tmp_path / "target.jsonl").read_text().startswith("{")


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    out, loop = tmp_path / "out", tmp_path / "loop"
    out.symlink_to("missing/target")
    loop.symlink_to("loop")
    for link in (out, loop):
        with pytest.raises(UserError, match="can't be written"):
            write_text(link, "text")
        assert link.is_symlink()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_other_name_of_a_hard_link_keeps_the_old_content(command: str, commands, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.write_text(OLD)
    out.hardlink_to(other)
    commands[command](out)
    assert other.read_text() == OLD
    assert out.read_text().startswith("{")


def test_a_file_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.write_text(OLD)
    out.chmod(0o444)
    if os.access(out, os.W_OK):  # as root, whom the mode does not stop
        write_text(out, "new")
        assert out.read_text() == "new"
        assert stat.S_IMODE(out.stat().st_mode) == 0o444
        out.chmod(0o644)
        out.write_text(OLD)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission to write it, expected another name"):
        check_out(str(out), "--data", str(tmp_path / "rows"))
    assert out.read_text() == OLD


@pytest.mark.parametrize(
    "stream", ["/dev/stdout", "/dev/stderr", "/dev/fd/1", "/proc/self/fd/1", "/dev/../dev/stdout", "//dev/stdout"]
)
def test_a_stream_is_refused_before_anything_is_written(stream: str) -> None:
    """Only `check_out` and `target_of` see these names: neither writes."""
    with pytest.raises(UserError, match="expected a"):
        target_of(stream)
    with pytest.raises(UserError, match="; without --out the lines are printed"):
        check_out(stream, "--prompts", "prompts.jsonl", hint="; without --out the lines are printed")


def test_a_crash_keeps_what_the_link_leads_to(tmp_path: Path) -> None:
    target, out = tmp_path / "target", tmp_path / "out"
    target.write_text(OLD)
    out.symlink_to("target")
    with pytest.raises(RuntimeError), atomic_write(out) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target"]

    killed = "import os, sys\nfrom minift.files.text import atomic_write\n" + (
        "with atomic_write(sys.argv[1]) as path:\n    path.write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", killed, str(out)], cwd=MODEL.parents[1])
    assert ended.returncode == -signal.SIGKILL
    assert target.read_text() == OLD and out.is_symlink()

    write_text(out, "new")  # and what the killed process left does not stay
    assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target"]


def test_a_crash_while_weights_are_written_leaves_nothing_for_ever(tmp_path: Path) -> None:
    """safetensors writes under a random name first: a killed run left it, as large as the model, in its folder."""
    killed = "import os, sys, pathlib, torch\nfrom minift.files import weights\n" + (
        "def save_file(_, path, **settings):\n    path.with_name('.tmpAbCdEf').touch()\n    os.kill(os.getpid(), 9)\n"
        "weights.save_file = save_file\nweights.write_tensors(pathlib.Path(sys.argv[1]), {})\n"
    )
    out = tmp_path / "model.safetensors"
    ended = subprocess.run([sys.executable, "-c", killed, str(out)], cwd=MODEL.parents[1])
    assert ended.returncode == -signal.SIGKILL and not out.exists()
    write_tensors(out, {"weight": torch.zeros(2)})
    assert [*tmp_path.iterdir()] == [out] and load_file(out)["weight"].tolist() == [0, 0]


def test_an_io_error_at_the_end_of_writing_weights_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was ignored, and left an empty folder beside the weights."""

    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))

    out = tmp_path / "model.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rmdir", fail)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            write_tensors(out, {"weight": torch.zeros(2)})
    assert not out.exists()
    write_tensors(out, {"weight": torch.zeros(2)})
    assert [*tmp_path.iterdir()] == [out]


def test_an_unfinished_name_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text(OLD)
    (tmp_path / ".out.unfinished").symlink_to("victim")
    write_text(tmp_path / "out", "new")
    assert victim.read_text() == OLD
    assert (tmp_path / "out").read_text() == "new"


def test_the_generators_write_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heldout.jsonl").symlink_to("target")
    monkeypatch.setattr(sys, "argv", ["instructions", "--out", str(tmp_path)])
    instructions.main()
    assert (tmp_path / "heldout.jsonl").is_symlink()
    assert (tmp_path / "target").stat().st_size > 100_000
