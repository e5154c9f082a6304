"""torchrun on CPU: K ranks are one process with K times the accumulation, and a rank that dies ends the run."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from minift.errors import UserError
from minift.files.pretrained import find_model, load_for_sft
from minift.files.weights import save_model
from minift.prepacked import prepacked
from minift.run import distributed, sharding
from tests.reference import difference
from tests.runs import ROOT, SHIPPED, few_rows, read_lines, refused, run

torchrun = pytest.mark.skipif(os.name != "posix", reason="torchrun needs signals")
SEPARATE_BUCKETS = """
import sys
import train_sft
from minift.commands.cli import run_command
from minift.run import distributed
distributed.BUCKET = 100_000  # bytes: dozens of buckets instead of one
sys.argv[0] = "train_sft.py"
run_command(train_sft.main)
"""

KILLED = """
import os, signal, sys
import train_sft
from minift import trainer
from minift.commands.cli import run_command
from minift.run import sharding
sharding.FILE_SIZE = 10**7  # bytes: several files of each rank
sharding.ROOM = float("inf")  # no memory for plain copies
accumulate_gradient = trainer.accumulate_gradient
def killed(task, seed, step):
    if step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return accumulate_gradient(task, seed, step)
trainer.accumulate_gradient = killed
sys.argv[0] = "train_sft.py"
run_command(train_sft.main)
"""

LATE = """
import os, sys
import train_sft
from minift.commands.cli import run_command
from minift.errors import UserError
from minift.run import exam
generate = exam.generate
def fails(*given):
    if os.environ["RANK"] == "1":
        raise UserError("only here")
    return generate(*given)
exam.generate = fails
sys.argv[0] = "train_sft.py"
run_command(train_sft.main)
"""
ONE_SIGNAL = """
import os, signal, sys, time
import train_sft
from minift import trainer
from minift.commands.cli import run_command
from minift.run import checkpoint
save_file = checkpoint.save_file
def slowly(*given):  # rank 1 waits 1 s before it ends
    time.sleep(2)
    save_file(*given)
checkpoint.save_file = slowly
accumulate_gradient = trainer.accumulate_gradient
def signalled(task, seed, step):
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return accumulate_gradient(task, seed, step)
trainer.accumulate_gradient = signalled
sys.argv[0] = "train_sft.py"
run_command(train_sft.main)
"""


def start(ranks: int, script: object, *flags: object, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={restarts}", str(script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    try:
        printed, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return printed, errors


def flags_for(script: str, folder: Path) -> list:
    """Return the flags of a short run on rows of different lengths, of 40: its last step has fewer micro-batches."""
    return [*few_rows(script, folder), "--recipe", "tiny", "--epochs", 1, "--batch-size", 2, "--eval-every", 2,
            "--lr", 1e-3, "--device", "cpu"]  # fmt: skip


@torchrun
@pytest.mark.parametrize(
    ("script", "ranks", "accumulation", "flags"),
    [
        ("sft", 2, 2, []),
        ("sft", 3, 1, ["--run-checks", "--dropout", 0.1, "--bleu-samples", 2]),
        ("sft", 2, 1, ["--lora-rank", 2, "--lora-dropout", 0.2, "--dropout", 0.1]),
        ("rm", 2, 2, ["--lm-weight", 0.03]),
        ("sft", 2, 2, ["--fsdp", "--dropout", 0.1, "--bleu-samples", 3, "--max-steps", 3]),
        ("rm", 3, 1, ["--fsdp", "--gradient-checkpointing", "--lora-rank", 3, "--lora-dropout", 0.2]),
    ],
    ids=["two, buckets", "three, dropout", "LoRA", "rewards", "two, sharded", "three, rewards, LoRA, sharded"],
)
def test_ranks_are_accumulation(script: str, ranks: int, accumulation: int, flags: list, tmp_path: Path) -> None:
    """In float64: the gradient of a key's bias is 0 but for rounding, and AdamW would divide that by itself."""
    name: object = f"train_{script}.py"
    if not flags:
        name = tmp_path / "buckets.py"
        name.write_text(SEPARATE_BUCKETS)
    flags = [*flags_for(script, tmp_path), "--dtype", "float64", *flags]
    cache = ["--encoded-cache", tmp_path / "cache"] if ranks == 3 else []
    process = start(ranks, name, *flags, *cache, "--grad-accum", accumulation, "--out", tmp_path / "ranks")
    printed, errors = finish(process)
    assert process.returncode == 0, errors[-3000:]
    flags = [flag for flag in flags if flag != "--fsdp"]
    expected = run(script, *flags, "--grad-accum", accumulation * ranks, "--out", tmp_path / "one")
    # Once, not once a rank; the values of --out and --grad-accum, and commands, differ.
    ours, theirs = (
        [line[:9] for line in text.splitlines() if " -m minift " not in line and "--fsdp" not in line]
        for text in (printed, expected)
    )
    assert ours == theirs

    ours, theirs = (read_lines(tmp_path / folder / "metrics.jsonl") for folder in ("ranks", "one"))
    assert len(ours) == len(theirs) > 4
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() and (one["step"], one["tokens"]) == (other["step"], other["tokens"])
        for measure in one.keys() - {"seconds", "split"}:
            assert abs(one[measure] - other[measure]) < 1e-10, measure
    found, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ranks", "one"))
    assert max(difference(tensor, expected[name]) for name, tensor in found.items()) < 1e-9
    if script == "sft":
        assert (tmp_path / "ranks" / "samples.jsonl").read_bytes() == (tmp_path / "one" / "samples.jsonl").read_bytes()
    records = [json.loads((tmp_path / folder / "run.json").read_text()) for folder in ("ranks", "one")]
    assert records[0]["values"]["grad_accum"] == records[1]["values"]["grad_accum"] == accumulation * ranks
    assert [path.name for path in tmp_path.glob("ranks*")] == ["ranks"]


@torchrun
def test_a_rank_that_is_killed_ends_the_run_and_restarts_go_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    flags = [*flags_for("sft", tmp_path), "--save-every", 1, "--bleu-samples", 2]
    process = start(2, tmp_path / "killed.py", *flags, "--out", tmp_path / "ended")
    _, errors = finish(process)
    assert process.returncode == 1
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: the machine failed: another rank has ended, see its own")
    assert ".cc:" not in lines[0]  # gloo's own source
    assert json.loads((tmp_path / "ended" / "checkpoints" / "steps.json").read_text())["last"] == 3

    (tmp_path / "killed.py").write_text(KILLED.replace('"RANK"] == "1"', '"RANK"] == "0"'))
    process = start(2, tmp_path / "killed.py", *flags, "--out", tmp_path / "ended-0")
    _, errors = finish(process)
    assert process.returncode == 1
    lines = [line for line in errors.splitlines() if "error: the machine failed" in line]
    assert len(lines) == 1 and lines[0].startswith("rank 1: error: the machine failed: another rank has ended"), errors
    process = start(2, tmp_path / "killed.py", *flags, "--out", tmp_path / "restarted", restarts=1)
    _, errors = finish(process)
    assert process.returncode == 0, errors[-3000:]
    assert [path.name for path in tmp_path.glob("restarted*")] == ["restarted"]
    process = start(2, "train_sft.py", *flags, "--out", tmp_path / "ended", "--resume")
    finish(process)
    assert process.returncode == 0
    run("sft", *flags, "--grad-accum", 2, "--out", tmp_path / "one")
    for name in ("restarted", "ended"):
        ours, theirs = (read_lines(tmp_path / folder / "metrics.jsonl") for folder in (name, "one"))
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert abs(one["loss"] - other["loss"]) < 1e-6


@pytest.fixture
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this process rank 0 of 4 for sharding; nothing is sent."""
    for name, value in {"WORLD_SIZE": 4, "InStep": Mock(), "before_gather": []}.items():
        monkeypatch.setattr(sharding, name, value)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def bytes_of(model: torch.nn.Module) -> int:
    """Return the memory of a model's weights without those that are still views of the file, which has float16."""
    parts = [distributed.own_part(parameter.detach()) for parameter in model.parameters()]
    return sum(part.untyped_storage().nbytes() for part in parts if part.dtype != torch.float16)


def test_no_rank_ever_has_all_weights(four_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its parts, and the layer that it is taking its part of."""
    held = []

    def counting(module: torch.nn.Module, **given: object) -> torch.nn.Module:
        held.append(bytes_of(model))
        return fully_shard(module, **given)

    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", counting)
    plain, _ = load_for_sft(find_model(SHIPPED))
    model, _ = load_for_sft(find_model(SHIPPED), mapped=True)
    assert bytes_of(model) == 0
    sharding.shard(model, torch.device("cpu"), torch.float32)
    layer = bytes_of(plain.decoder.layers[0])
    rest = bytes_of(plain) - len(plain.decoder.layers) * layer
    assert len(held) == 5 and max(held) <= bytes_of(plain) / 4 + max(layer, rest)
    assert bytes_of(model) < bytes_of(plain) / 3.9
    for name, part in model.named_parameters():
        assert torch.equal(part.to_local(), plain.get_parameter(name).chunk(4)[0]), name
    with prepacked(model, 64):
        assert "logits" not in vars(model)


def test_answers_come_from_a_plain_copy_if_all_ranks_have_memory_for_it(
    four_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode step of a sharded model gathers all weights: three times as slow, for the shipped model on two ranks."""
    plain, _ = load_for_sft(find_model(SHIPPED))
    model, _ = load_for_sft(find_model(SHIPPED), mapped=True)
    sharding.shard(model, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(sharding, "whole", lambda model, device: plain)
    size = bytes_of(plain)
    for free, others, expected in ((2.6, True, plain), (2.4, True, model), (2.6, False, model)):
        monkeypatch.setattr(sharding, "_free_memory", lambda device, free=free: free * size)
        monkeypatch.setattr(sharding, "gather", lambda part, others=others: [*part, others])
        assert sharding.for_generation(model) is expected


def test_a_rank_s_memory_is_its_share_and_at_most_the_container_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "LOCAL_WORLD_SIZE", 2)
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(sharding, "CONTAINER_MEMORY", [(limit, used)])
    used.write_text("1000\n")
    for text, is_limited in (("max\n", False), ("3000\n", True)):
        limit.write_text(text)
        assert (sharding._free_memory(torch.device("cpu")) == 1000) == is_limited or sys.platform != "linux"


def test_a_sharded_model_takes_its_parts_of_a_whole_checkpoint(four_ranks: None, tmp_path: Path) -> None:
    """And nothing of the model beside it, which each rank read too."""
    plain, _ = load_for_sft(find_model(SHIPPED))
    model, _ = load_for_sft(find_model(SHIPPED), mapped=True)
    sharding.shard(model, torch.device("cpu"), torch.float32)
    parameters = dict(model.named_parameters())
    tensors = {f"exp_avg.{name}": torch.randn(parameter.shape) for name, parameter in parameters.items()}
    tensors |= {f"step.{name}": torch.tensor(3.0) for name in parameters}
    save_file(tensors, tmp_path / "training.safetensors")
    save_model(plain, tmp_path)
    found = sharding.read_parts(tmp_path, parameters)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(distributed.own_part(found[name]), tensor.chunk(4)[0] if tensor.dim() else tensor), name


def test_weights_that_are_not_finite_are_found_while_they_are_cast(four_ranks: None) -> None:
    model, _ = load_for_sft(find_model(SHIPPED), mapped=True)
    bias = model.decoder.layers[2].fc1.bias
    bias.data = bias.data.clone().index_fill_(0, torch.tensor([1000]), torch.nan)
    with pytest.raises(UserError, match="--model: decoder.layers.2.fc1.bias holds NaN"):
        sharding.shard(model, torch.device("cpu"), torch.float32)


@torchrun
def test_a_sharded_run_is_resumed_by_another_number_of_ranks(tmp_path: Path) -> None:
    """Of two ranks one is killed, three go on; so does one process, which has all weights."""
    (tmp_path / "killed.py").write_text(KILLED)
    flags = [*flags_for("sft", tmp_path), "--max-steps", 4, "--batch-size", 1, "--save-every", 1, "--bleu-samples", 2]
    flags += ["--dtype", "float64", "--out"]
    process = start(2, tmp_path / "killed.py", *flags, tmp_path / "three", "--fsdp", "--grad-accum", 3)
    _, errors = finish(process)
    assert process.returncode == 1
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: the machine failed: another rank has ended"), errors[-3000:]
    assert json.loads((tmp_path / "three" / "checkpoints" / "steps.json").read_text())["last"] == 3
    assert len([*(tmp_path / "three" / "checkpoints" / "step-000003" / "training").iterdir()]) > 10
    for name in ("one", "damaged"):
        shutil.copytree(tmp_path / "three", tmp_path / name)
    max((tmp_path / "damaged" / "checkpoints" / "step-000003" / "training").iterdir()).unlink()
    message = refused("sft", *flags, tmp_path / "damaged", "--grad-accum", 6, "--resume")
    assert "/step-000003/training is damaged (a part of " in message and message.endswith("continue from step-000002")
    process = start(3, "train_sft.py", *flags, tmp_path / "three", "--fsdp", "--grad-accum", 2, "--resume")
    _, errors = finish(process)
    assert process.returncode == 0, errors[-3000:]
    run("sft", *flags, tmp_path / "one", "--grad-accum", 6, "--resume")
    run("sft", *flags, tmp_path / "undisturbed", "--grad-accum", 6)
    losses, weights = [], []
    for name in ("three", "one", "undisturbed"):
        losses.append([line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")])
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    for name in range(2):
        assert losses[name] == pytest.approx(losses[2], abs=1e-10) and len(losses[2]) > 6
        assert max(difference(tensor, weights[2][key]) for key, tensor in weights[name].items()) < 1e-9
    # The answers before training are the killed run's, without a plain copy; those after it are of a copy.
    ours, theirs = (tmp_path / name / "samples.jsonl" for name in ("three", "undisturbed"))
    assert ours.read_bytes() == theirs.read_bytes()


def join(rank: int) -> None:
    """Be a rank that finds the other one, and is killed."""
    signal.alarm(20)
    os.environ["RANK"] = str(rank)
    distributed.join(torch.device("cpu"))
    distributed.gather([rank])
    os.kill(os.getpid(), signal.SIGKILL)


@torchrun
def test_restarted_ranks_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's store keeps the addresses of killed ranks. Taking them is a race, lost about every other time."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun does
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    for name, value in (told | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    for name, number in {"WORLD_SIZE": 2, "IS_ONE_MACHINE": True}.items():
        monkeypatch.setattr(distributed, name, number)
    for restarts in range(8):
        monkeypatch.setattr(distributed, "NUM_RESTARTS", restarts)
        ranks = [multiprocessing.get_context("fork").Process(target=join, args=[rank]) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [-signal.SIGKILL] * 2, f"restart {restarts}"


@torchrun
def test_a_mistake_is_one_line_and_a_run_is_resumed_by_as_many_micro_batches(tmp_path: Path) -> None:
    process = start(2, "train_sft.py", "--lr", "fast")
    printed, errors = finish(process)
    assert process.returncode == 1 and printed == ""
    assert len([line for line in errors.splitlines() if line.startswith("error: ")]) == 1
    flags = [*flags_for("sft", tmp_path), "--bleu-samples", 2, "--out", tmp_path / "run"]
    run("sft", *flags, "--grad-accum", 2)
    for ranks, is_same in ((3, False), (2, True)):
        process = start(ranks, "train_sft.py", *flags, "--resume")
        _, errors = finish(process)
        assert (process.returncode == 0) == is_same
        assert ("error: --resume: --grad-accum, times the number of ranks, was 2 in" in errors) == (not is_same)


@pytest.mark.parametrize(
    ("ranks", "launcher", "note"),
    [
        ({}, "", ""),
        (
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_MAX_RESTARTS": "3"},
            " -m torch.distributed.run --standalone --nproc-per-node=4 --max-restarts=3",
            "",
        ),
        (
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"},
            " -m torch.distributed.run --nnodes=2 … --nproc-per-node=2",
            " (on each machine; … is what torchrun was given there)",
        ),
    ],
    ids=["one process", "one machine", "two machines"],
)
def test_the_command_that_resumes_a_run_starts_as_many_ranks(ranks: dict, launcher: str, note: str) -> None:
    """Of two machines with two ranks each, it started four on one."""
    code = "from minift.run import resume; print(resume.command('--lr', '1e-4'))"
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name} | ranks
    done = subprocess.run(
        [sys.executable, "-c", code, "--out", "a b", "--resume"], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{sys.executable}{launcher} -c --out 'a b' --resume --lr 1e-4{note}\n"


@torchrun
@pytest.mark.parametrize(
    ("script", "expected"), [(LATE, "rank 1: error: only here"), (ONE_SIGNAL, "terminated; all steps are saved")]
)
def test_what_happens_on_one_rank_only(script: str, expected: str, tmp_path: Path) -> None:
    """A mistake is printed, and a signal stops all ranks: rank 0 took a run that it had left for a finished one.

    A rank that had stopped did not wait for rank 0, which was still saving: torchrun ended it, and nothing was saved.
    """
    (tmp_path / "script.py").write_text(script)
    flags = [*flags_for("sft", tmp_path), "--bleu-samples", 2, "--out", tmp_path / "run"]
    process = start(2, tmp_path / "script.py", *flags)
    _, errors = finish(process)
    assert process.returncode == 1
    assert len([line for line in errors.splitlines() if expected in line]) == 1, errors[-3000:]
    if script == ONE_SIGNAL:
        assert json.loads((tmp_path / "run" / "checkpoints" / "steps.json").read_text())["last"] == 3
    assert not (tmp_path / "run" / "model.safetensors").exists()
