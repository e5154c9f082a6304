"""`python -m tests.crashes`: runs that are killed, or whose files fail, continue to the result of an undisturbed run.

Three kinds of short runs are tried: instruction tuning, reward modelling, and LoRA with dropout and accumulation.

Kills: a run is killed with SIGKILL at random moments, up to three times, and continued.

Faults: the file operations of a run are counted. Each of them is then the place of a fault, in up to five ways: the
process is killed before it, after it, or in the middle of a write; it ends in an I/O error; or the disk is full from
there on. An error must end in one line and status 1. The same is done with the operations of a continued run, until it
trains again.

A run is continued as its messages say: with --resume, or without it where nothing was saved. Then every file in its
folder is compared with the undisturbed run's, bit for bit, except for times and the flag --resume itself.

With OMP_NUM_THREADS=2, runs of the shipped model are killed; tests/README.md says what is then compared.

Every run is a fork of this process, which has imported torch: so it takes less than a second instead of five.
"""

import argparse
import builtins
import errno
import fcntl
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads of tokenizers, so that the process may fork

import safetensors.torch
import torch
from safetensors import SafetensorError

import train_rm
import train_sft
from data.make.pretrain import initialise
from minift.commands.cli import CommandParser, run_command, whole_number
from minift.errors import UserError
from minift.files.tokenizer import load_tokenizer, save_tokenizer
from minift.files.weights import read_config, save_model
from minift.model import OPT
from tests.runs import SHIPPED, few_rows, read_lines

SHORT = "--max-steps 3 --save-every 2 --log-every 3 --batch-size 2 --lr 0.05 --device cpu"
KINDS: dict[str, tuple[str, str]] = {  # of runs: the script and its flags
    "sft": ("sft", "--bleu-samples 2 --dropout 0.1"),
    "rewards": ("rm", "--dropout 0.1 --group-prompts"),
    "lora": ("sft", "--bleu-samples 2 --dropout 0.1 --lora-rank 2 --lora-dropout 0.1 --grad-accum 2"),
}
MAINS = {"sft": train_sft.main, "rm": train_rm.main}
CLOSE, CLOSE_TO = 1e-6, "close: "  # losses with more than one thread, relative
# In run.json and in report.html.
VARYING = re.compile(r'"resume": \w+|<th>resume</th><td>\w+|[\d.]+ \w+ of training|\b\d{4}-\d\d-\d\d\b')
LAST = "step-000003"
START_AFRESH = "leave --resume out"


class Fault(NamedTuple):
    """What happens at one file operation of a run."""

    number: int  # of the operation, counted from 0
    way: str


KILLED_BEFORE, KILLED_AFTER, HALF, IO_ERROR, DISK_FULL = (
    "killed before", "killed after", "killed in the middle", "I/O error", "disk full"
)  # fmt: skip
WAYS = {  # of a fault at each kind of operation
    "write": (KILLED_BEFORE, KILLED_AFTER, HALF, IO_ERROR, DISK_FULL),
    "read": (KILLED_BEFORE, IO_ERROR),
    "other": (KILLED_BEFORE, KILLED_AFTER, IO_ERROR, DISK_FULL),
}


ANYWHERE, BEFORE_THE_FIRST, WRITING = MOMENTS = ("anywhere", "before the first checkpoint", "while one is written")


class Case(NamedTuple):
    """A run to disturb: `faults` are those of its first start and of the next one; without faults it is killed."""

    kind: str
    faults: tuple[Fault, ...] = ()
    seed: int = 0  # of the moments at which it is killed


# ---------------------------------------------------------------------------------------------------- file operations


class Operations:
    """Patches of everything with which minift changes or opens files in one folder. Only for a process of its own.

    safetensors writes in Rust, so its whole file is one operation.
    """

    def __init__(self, folder: Path, fault: Fault | None) -> None:
        self.folder = folder
        self.fault = fault
        self.is_full = False
        self.log: list[str] = []  # of each operation: read, write or other; its name; its path

    def install(self) -> None:
        """Replace the functions of os, io, fcntl and safetensors."""
        open_descriptor, open_file = os.open, io.open
        write_tensors, rename, unlink = safetensors.torch.serialize_file, os.rename, os.unlink
        for name in ("mkdir", "rmdir", "unlink", "rename", "replace", "chmod", "fsync"):
            setattr(os, name, self._counted(getattr(os, name), "other", f"os.{name}"))
        fcntl.flock = self._counted(fcntl.flock, "other", "fcntl.flock")

        def os_open(path, flags, *arguments, **keywords):
            if "dir_fd" not in keywords and not self._is_ours(path):
                return open_descriptor(path, flags, *arguments, **keywords)
            kind = "other" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else "read"
            return self._perform(kind, "os.open", path, lambda: open_descriptor(path, flags, *arguments, **keywords))

        def io_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest):
            if isinstance(file, int) or not self._is_ours(file):
                return open_file(file, mode, buffering, encoding, errors, newline, *rest)
            if not set(mode) & set("wax+"):
                action = lambda: open_file(file, mode, buffering, encoding, errors, newline, *rest)  # noqa: E731
                return self._perform("read", f"open {mode}", file, action)
            plain = mode.replace("t", "").replace("b", "")
            raw = self._perform("other", f"open {plain}", file, lambda: _Raw(os.fspath(file), plain, self))
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        def serialize_file(tensors, filename, metadata=None):
            def half() -> None:
                write_tensors(tensors, filename, metadata)
                if self.fault.way == HALF:  # safetensors writes under a random name, which an error deletes
                    os.truncate(filename, Path(filename).stat().st_size // 2)
                    rename(filename, Path(filename).with_name(".tmpAbCdEf"))
                else:
                    unlink(filename)

            try:
                self._perform("write", "save_file", filename, lambda: write_tensors(tensors, filename, metadata), half)
            except OSError as error:
                raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None

        os.open, io.open, builtins.open = os_open, io_open, io_open
        safetensors.torch.serialize_file = serialize_file

    def _is_ours(self, path) -> bool:
        return Path.cwd().joinpath(path).is_relative_to(self.folder)

    def _counted(self, function: Callable, kind: str, name: str) -> Callable:
        def counted(path, *arguments, **keywords):
            inside = keywords.keys() & {"dir_fd"} or not isinstance(path, str | bytes | os.PathLike)
            if not inside and not self._is_ours(path):
                return function(path, *arguments, **keywords)
            return self._perform(kind, name, path, lambda: function(path, *arguments, **keywords))

        return counted

    def _perform(self, kind: str, name: str, path, action: Callable, half: Callable | None = None) -> Any:
        number = len(self.log)
        self.log.append(f"{kind} {name} {_shown(path, self.folder)}")
        fault = self.fault
        if fault is None or number < fault.number or (number > fault.number and not self.is_full):
            return action()
        if self.is_full and number > fault.number:  # what frees space, and reading, still works
            if kind == "write" or name in ("os.mkdir", "os.open", "open w", "open a"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return action()
        if fault.way == KILLED_AFTER:
            with suppress(OSError):  # to delete a file that is not there
                action()
        if half and fault.way in (HALF, DISK_FULL):
            half()
        if fault.way in (KILLED_BEFORE, KILLED_AFTER, HALF):
            os.kill(os.getpid(), signal.SIGKILL)
        self.is_full = fault.way == DISK_FULL
        code = errno.ENOSPC if self.is_full else errno.EIO
        raise OSError(code, os.strerror(code), path)


def _shown(path, folder: Path) -> str:
    return os.path.relpath(path, folder) if isinstance(path, str | os.PathLike) else ""  # "" for a descriptor


class _Raw(io.FileIO):
    """A file opened for writing, whose writes are counted."""

    def __init__(self, path: str, mode: str, operations: Operations) -> None:
        super().__init__(path, mode)
        self._path, self._operations = path, operations

    def write(self, data) -> int:
        write, data = super().write, bytes(data)
        half = lambda: write(data[: len(data) // 2])  # noqa: E731
        return self._operations._perform("write", "write", self._path, lambda: write(data), half)


# --------------------------------------------------------------------------------------------------------------- runs


class Bench:
    """The model and the rows in a scratch folder, and the undisturbed run of each kind."""

    def __init__(self, scratch: Path, kinds: list[str]) -> None:
        self.scratch = scratch
        self.is_exact = torch.get_num_threads() == 1
        with torch.device("meta"):
            torch.nn.Embedding(1, 1)  # makes torch import its compiler, which takes 3 s, before the runs are forked
        model = scratch / "model" if self.is_exact else SHIPPED
        if self.is_exact:
            _write_model(model)
        self.flags = {script: [str(flag) for flag in few_rows(script, scratch)] for script in MAINS}
        for flags in self.flags.values():
            flags += ["--model", str(model), *SHORT.split(), "--out", "run"]
        self.operations: dict[str, list[str]] = {}  # of a run of each kind
        self.continued: dict[str, list[str]] = {}  # of a run that `cut` stopped, until it trains again
        self.cut: dict[str, Fault] = {}  # a kill when the last checkpoint is begun
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, dict[str, Any]] = {}
        for kind in kinds:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            started = time.monotonic()
            self._expect(0, kind, folder)
            self.seconds[kind] = time.monotonic() - started
            self.expected[kind] = contents(folder / "run")
            folder = Path(tempfile.mkdtemp(dir=scratch))
            self._expect(0, kind, folder, log=True)
            self.operations[kind] = _log_in(folder)
            self.cut[kind] = Fault(_last_save(self.operations[kind]), KILLED_BEFORE)
            folder = Path(tempfile.mkdtemp(dir=scratch))
            self._expect(-signal.SIGKILL, kind, folder, fault=self.cut[kind])
            self._expect(0, kind, folder, "--resume", log=True)
            log = _log_in(folder)
            self.continued[kind] = log[: _last_save(log)]

    def _expect(self, status: int, kind: str, folder: Path, *flags: str, **settings: Any) -> None:
        found, line = self.end(self.start(kind, folder, *flags, **settings), folder)
        assert found == status, line

    def start(self, kind: str, folder: Path, *flags: str, fault: Fault | None = None, log: bool = False) -> int:
        """Fork a run in a folder and return its process id; what it prints goes to out.txt and err.txt there."""
        if pid := os.fork():
            return pid
        status = 1
        try:
            for descriptor, name in ((1, "out.txt"), (2, "err.txt")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            os.chdir(folder)
            script, own = KINDS[kind]
            sys.stdout, sys.stderr = io.TextIOWrapper(open(1, "wb", 0)), io.TextIOWrapper(open(2, "wb", 0))  # noqa: SIM115
            sys.argv = [f"train_{script}.py", *self.flags[script], *own.split(), *flags]
            os.fsync = lambda descriptor: None  # only a power failure, unlike a kill, loses what is not flushed
            operations = Operations(self.scratch, fault)
            if fault or log:
                operations.install()
            run_command(MAINS[script])
            status = 0
            if log:
                (folder / "log.txt").write_text("\n".join([*operations.log, ""]))
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def end(self, pid: int, folder: Path) -> tuple[int, str]:
        """Wait for a run; return its status, negative if it was killed, and the last line on its stderr."""
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        printed = (folder / "err.txt").read_text() if (folder / "err.txt").exists() else ""
        if "Traceback" in printed:
            return status, printed
        return status, (printed.splitlines() or [""])[-1]

    def check(self, case: Case) -> tuple[Case, str, list[str]]:
        """Disturb a run and continue it; return the case, what is wrong ("" if nothing), and where it was disturbed."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        places: list[str] = []
        try:
            problem = self._faults(case, folder, places) if case.faults else self._kills(case, folder, places)
            return case, problem or self._compare(case, folder), places
        except Exception:
            return case, traceback.format_exc(), places
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _faults(self, case: Case, folder: Path, places: list[str]) -> str:
        for fault, flags in zip(case.faults, ((), ("--resume",)), strict=False):
            status, line = self.end(self.start(case.kind, folder, *flags, fault=fault), folder)
            is_killed = fault.way in (KILLED_BEFORE, KILLED_AFTER, HALF)
            is_one_line = line.startswith("error: the machine failed: ") and "Traceback" not in line
            if status != -signal.SIGKILL if is_killed else status not in (0, 1) or (status and not is_one_line):
                return f"status {status}: {line}"
        places.append({0: "not stopped", 1: "ended with an error", -signal.SIGKILL: "killed"}[status])
        return self._continue(case.kind, folder)

    def _kills(self, case: Case, folder: Path, places: list[str]) -> str:
        choice = random.Random(case.seed)
        flags: tuple[str, ...] = ()
        for number in range(choice.randint(1, 3)):
            moment = MOMENTS[case.seed % 3] if number == 0 else choice.choice(MOMENTS)
            pid = self.start(case.kind, folder, *flags)
            self._wait_for_a_moment(moment, choice, pid, folder / "run", self.seconds[case.kind])
            os.kill(pid, signal.SIGKILL)
            status, line = self.end(pid, folder)
            if status == 2 and START_AFRESH in line:
                flags = ()
                continue
            if status not in (0, -9):
                return f"status {status}: {line}"
            places.append(place_of(folder / "run", status))
            flags = ("--resume",)
        return self._continue(case.kind, folder)

    def _wait_for_a_moment(self, moment: str, choice: random.Random, pid: int, run: Path, seconds: float) -> None:
        deadline = time.monotonic() + (choice.uniform(0, seconds) if moment == ANYWHERE else 20 * seconds)
        number, seen = choice.randint(1, 2), set()
        while time.monotonic() < deadline and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if moment == WRITING:
                seen |= set(run.glob("checkpoints/.step-*.unfinished"))
                if len(seen) >= number:
                    break
            elif moment == BEFORE_THE_FIRST and (run / "metrics.jsonl").exists():
                break
            time.sleep(0.0005)
        if moment != ANYWHERE:
            time.sleep(choice.choice([0, choice.uniform(0, 0.02 * seconds)]))

    def _continue(self, kind: str, folder: Path) -> str:
        """Continue a run until it ends, as a user would; return what is wrong, "" if nothing."""
        status, line = self.end(self.start(kind, folder, "--resume"), folder)
        if status == 2 and START_AFRESH in line:
            status, line = self.end(self.start(kind, folder), folder)
        return f"does not continue: status {status}: {line}" if status else ""

    def _compare(self, case: Case, folder: Path) -> str:
        found, expected = contents(folder / "run"), self.expected[case.kind]
        if found == expected:
            return ""
        names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if self.is_exact:
            return f"differs in {', '.join(names)}"
        losses = [[line["loss"] for line in side["metrics.jsonl"]] for side in (found, expected)]
        pairs = list(zip(*losses, strict=False))
        if len(losses[0]) != len(losses[1]) or any(abs(a - b) > CLOSE * abs(b) for a, b in pairs):
            return f"losses are not within {CLOSE}: {pairs}"
        return (
            f"{CLOSE_TO}losses differ by at most {max(abs(a - b) for a, b in pairs):.1e}; differs in {', '.join(names)}"
        )


def _log_in(folder: Path) -> list[str]:
    return (folder / "log.txt").read_text().splitlines()


def _last_save(operations: list[str]) -> int:
    """Return the number of the operation that begins to write the last checkpoint."""
    return next(number for number, line in enumerate(operations) if LAST in line)


def place_of(run: Path, status: int) -> str:
    """Return where in a run it was killed, by what lies in its folder."""
    if status == 0:
        return "after the end"
    if any(run.glob("checkpoints/.step-*.unfinished")):
        return "inside a checkpoint's writing"
    saved = sorted(run.glob("checkpoints/step-*"))
    if not saved:
        return "before the first checkpoint" if (run / "run.json").exists() else "before run.json"
    return "after the last checkpoint" if saved[-1].name == LAST else "between two checkpoints"


def contents(run: Path) -> dict[str, Any]:
    """Return every file and folder in a run's folder: bytes, or without times and --resume where these are in it."""
    found: dict[str, Any] = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.is_dir():
            found[name] = None
        elif path.name == "metrics.jsonl":
            found[name] = [line | {"seconds": 0} for line in read_lines(path)]
        elif path.name == "progress.json":
            found[name] = json.loads(path.read_text()) | {"seconds": 0}
        elif path.name in ("run.json", "report.html"):
            found[name] = VARYING.sub("", path.read_text())
        else:
            found[name] = path.read_bytes()
    return found


def _write_model(folder: Path) -> None:
    """Write a random model of one narrow layer with the shipped tokenizer."""
    folder.mkdir()
    config = read_config(SHIPPED)[0]
    narrow = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    model = OPT(replace(config, **narrow, word_embed_proj_dim=8))
    initialise(model, seed=0)
    save_model(model, folder)
    save_tokenizer(load_tokenizer(SHIPPED), folder)


# ------------------------------------------------------------------------------------------------------------ command


def all_faults(operations: list[str]) -> Iterator[Fault]:
    """Yield a fault at every operation in every way."""
    for number, line in enumerate(operations):
        for way in WAYS[line.split()[0]]:
            yield Fault(number, way)


def make_cases(bench: Bench, flags: argparse.Namespace) -> dict[str, list[Case]]:
    """Return the cases of each kind: kills, faults, and faults of a continued run."""
    choice = random.Random(flags.seed)
    parts: dict[str, list[Case]] = {}
    for kind, operations in bench.operations.items():
        faults = list(all_faults(operations))
        start = choice.randrange(2**31)
        parts[f"{kind}, kills"] = [Case(kind, seed=start + number) for number in range(flags.kills)]
        if bench.is_exact:
            some = faults if flags.faults is None else choice.sample(faults, flags.faults)
            parts[f"{kind}, faults"] = [Case(kind, (fault,)) for fault in some]
            faults = list(all_faults(bench.continued[kind]))
            some = faults if flags.faults is None else choice.sample(faults, flags.faults // 4)
            parts[f"{kind}, faults when continued"] = [Case(kind, (bench.cut[kind], fault)) for fault in some]
    return parts


def main() -> None:
    """Try every case; print what went wrong, and the counts. Exits with status 1 if anything went wrong."""
    flags = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=flags.scratch) as scratch:
        bench = Bench(Path(scratch).resolve(), flags.kind or [*KINDS])
        threads = torch.get_num_threads()
        print(f"seed {flags.seed}, {threads} thread{'s' * (threads > 1)}, {flags.jobs} runs at a time")
        for kind, operations in bench.operations.items():
            print(
                f"{kind}: {len(operations)} file operations; {len(bench.continued[kind])} before a continued run trains"
            )
        sys.stdout.flush()
        wrong = 0
        with multiprocessing.get_context("fork").Pool(
            flags.jobs, signal.signal, (signal.SIGTERM, signal.SIG_DFL)
        ) as pool:
            for name, cases in make_cases(bench, flags).items():
                places, problems = Counter(), []
                for case, problem, its_places in pool.imap_unordered(bench.check, cases):
                    places.update(its_places)
                    if problem:
                        problems.append(f"  {_described(case, bench)}: {problem}")
                        wrong += not problem.startswith(CLOSE_TO)
                print(f"{name}: {len(cases) - len(problems)} of {len(cases)} end as the undisturbed run, bit for bit")
                print("\n".join([f"  {', '.join(f'{count} {place}' for place, count in places.items())}", *problems]))
                sys.stdout.flush()
    if wrong:
        raise UserError(f"{wrong} cases went wrong")


def _described(case: Case, bench: Bench) -> str:
    if not case.faults:
        return f"killed by seed {case.seed}"
    *cut, fault = case.faults
    operation = (bench.continued if cut else bench.operations)[case.kind][fault.number]
    return f"{fault.way} operation {fault.number}, {operation}"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("python -m tests.crashes", description="kill runs, let their files fail, continue them")
    add = parser.add_argument
    add("--kind", action="append", choices=[*KINDS], help="only these kinds of runs (all)")
    add("--kills", type=whole_number(0), default=20, help="how many runs of each kind are killed (%(default)s)")
    add(
        "--faults",
        type=whole_number(0),
        help="how many faults of each kind are tried, and a quarter of it when continued (all)",
    )
    add("--jobs", type=whole_number(1), default=os.cpu_count(), help="runs at a time (%(default)s)")
    add("--seed", type=whole_number(0), default=0, help="of the random choices (%(default)s)")
    add("--scratch", help="where the runs are written, and then deleted (the system's temporary folder)")
    return parser


if __name__ == "__main__":
    run_command(main)
