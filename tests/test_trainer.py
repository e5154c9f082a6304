"""The loop against independent loops: transformers' model stepped by hand, other ways to accumulate, a killed run."""

import json
import math
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import OPTForCausalLM, get_linear_schedule_with_warmup

from minift import trainer
from minift.batching import Loader, collate
from minift.config import Config
from minift.encode import IGNORE_INDEX
from minift.errors import UserError
from minift.files.weights import load_model, save_model
from minift.model import OPT
from minift.progress import progress_bar
from minift.run import checkpoint
from minift.run.device import check_compiler, machine, pick_device, pick_dtype, placement, set_allocator, weights_dtype
from minift.run.setup import set_dropout
from minift.trainer import Ranks, Task, micro_batch_seed, train
from tests.loop import MemoryRecorder, sft_loss
from tests.reference import POST_LN, mean_loss, random_examples, reference_loss, twins
from tests.runs import opened_run

# Rows of 2 to 64 tokens: the mean of micro-batch means would be far off. No batch size below divides 19. Every other
# row begins as in a template; a batch has this start once.
LENGTHS = [2, 60, 5, 33, 3, 48, 9, 17]
EXAMPLES = random_examples((LENGTHS * 3)[:19], seed=1)
for example in EXAMPLES[::2]:
    example.input_ids[:0], example.labels[:0] = [2, 5, 9, 7], [IGNORE_INDEX] * 4
ALONE = Ranks()
HELD_OUT = random_examples(LENGTHS[:7], seed=2)


class KilledLoader(Loader):
    """The loader of a run that is killed when it has done five steps."""

    def micro_batches(self, step, *ranks):
        if step == 5:
            raise KeyboardInterrupt
        return super().micro_batches(step, *ranks)


def small_models(dtype: torch.dtype) -> tuple[OPTForCausalLM, OPT]:
    return twins(POST_LN, dtype, max_position_embeddings=64)


def run(
    folder: Path | None = None,
    *,
    dtype=torch.float32,
    arithmetic="auto",
    dropout=0.0,
    steps=6,
    loader=Loader,
    ranks=ALONE,
    **values,
) -> tuple[OPT, list[dict]]:
    """Train a small model from fixed weights, in a run's folder if given; return it and the lines of metrics."""
    values = {"lr": 1e-3, "batch_size": 8, "device": "cpu", "dtype": arithmetic, "max_steps": steps, **values}
    config = Config(**values, out=str(folder))
    device = pick_device(config.device)
    model = small_models(dtype)[1].to(device)
    set_dropout(model, dropout)
    recorder = MemoryRecorder() if folder is None else opened_run(folder, config)
    task = Task(
        model=model,
        loss=sft_loss(model),
        train_batches=loader(EXAMPLES, collate, config.batch_size, config.grad_accum, config.seed, config.order),
        eval_batches=Loader(HELD_OUT, collate, 5),
        write_model=partial(save_model, model),
        unit="supervised_tokens",
        dtype=pick_dtype(config, device),
        ranks=ranks,
    )
    train(task, config, recorder)
    return model, recorder.lines if folder is None else read_metrics(folder)


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(a: torch.nn.Module, b: torch.nn.Module, but_not: str = " ") -> float:
    theirs = b.state_dict()
    return max(
        (x - theirs[name]).abs().max().item() for name, x in a.state_dict().items() if not name.endswith(but_not)
    )


def without_seconds(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_accumulation_equals_the_big_batch(dtype, tolerance):
    models, logs = zip(
        *(
            run(dtype=dtype, batch_size=batch, grad_accum=accumulate, lr=1e-4)
            for batch, accumulate in [(1, 8), (2, 4), (8, 1)]
        ),
        strict=True,
    )
    for model, log in zip(models[1:], logs[1:], strict=True):
        # Softmax ignores a shift of its row, so the exact gradient of k_proj.bias is 0. Adam divides a gradient by its
        # own size, so in float32 it makes steps of the rounding there. In float64 this stays below its eps.
        noise = "k_proj.bias" if dtype == torch.float32 else " "
        assert largest_difference(models[0], model, but_not=noise) <= tolerance
        for ours, theirs in zip(logs[0], log, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
            assert (ours["step"], ours["tokens"]) == (theirs["step"], theirs["tokens"])


@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0])
def test_follows_a_loop_written_by_hand_around_the_reference_model(max_grad_norm):
    """Compare loss, gradient norm and rate of each step, and the last weights, in float64."""
    values = {"max_grad_norm": max_grad_norm, "weight_decay": 0.1, "warmup_steps": 2, "batch_size": 3, "grad_accum": 2}
    steps = 9  # more than two epochs of four, the last of each smaller
    ours, log = run(dtype=torch.float64, steps=steps, **values)

    reference, _ = small_models(torch.float64)
    decayed = [p for name, p in reference.named_parameters() if "bias" not in name and "layer_norm" not in name]
    exempt = [p for name, p in reference.named_parameters() if "bias" in name or "layer_norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": exempt, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, foreach=False)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, steps)
    order = []
    for epoch in range(3):
        rows = torch.randperm(len(EXAMPLES), generator=torch.Generator().manual_seed(42 + epoch)).tolist()
        order += [rows[start : start + 6] for start in range(0, len(rows), 6)]
    trained = [line for line in log if line["split"] == "train"]
    for numbers, line in zip(order[:steps], trained, strict=True):
        loss = reference_loss(reference, [EXAMPLES[number] for number in numbers])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-10)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
        assert line["lr"] == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert largest_difference(ours, reference.model) < 1e-9


@pytest.mark.parametrize("log_every", [1, 3])  # a line after the last checkpoint, and steps waiting for their line
def test_a_killed_and_resumed_run_is_the_run_that_was_not(tmp_path, log_every):
    values = {"dropout": 0.1, "save_every": 2, "eval_every": 3, "log_every": log_every, "steps": 8}
    whole, whole_log = run(tmp_path / "whole", **values)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", loader=KilledLoader, **values)
    resumed, log = run(tmp_path / "killed", resume=True, **values)
    assert largest_difference(whole, resumed) == 0.0
    assert without_seconds(log) == without_seconds(whole_log)


def test_evaluating_more_often_changes_nothing():
    often, log = run(dropout=0.1, eval_every=1)
    seldom, _ = run(dropout=0.1)
    assert largest_difference(often, seldom) == 0.0
    assert [line["step"] for line in log if line["split"] == "eval"] == [0, 1, 2, 3, 4, 5, 6]


def test_frozen_weights_in_half_precision_decide_the_forward_pass_too():
    cpu = torch.device("cpu")
    assert pick_dtype(Config(base_dtype="float16"), cpu) == weights_dtype(Config(base_dtype="float16")) == torch.float16
    assert pick_dtype(Config(), cpu) == weights_dtype(Config()) == torch.float32
    assert pick_dtype(Config(dtype="bfloat16"), cpu) == torch.bfloat16 != weights_dtype(Config(dtype="bfloat16"))
    assert pick_dtype(Config(dtype="float64"), cpu) == weights_dtype(Config(dtype="float64")) == torch.float64


def test_bfloat16_is_the_dtype_of_the_forward_pass_and_not_of_the_weights():
    _, expected = run()
    model, log = run(arithmetic="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert log[-1]["loss"] != expected[-1]["loss"]
    for ours, theirs in zip(log, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


def test_dropout_depends_on_seed_and_step_alone():
    first, _ = run(dropout=0.1, order="sequential")  # so that the seed chooses nothing but dropout
    torch.manual_seed(999)
    again, _ = run(dropout=0.1, order="sequential")
    other, _ = run(dropout=0.1, order="sequential", seed=43)
    assert largest_difference(first, again) == 0.0
    assert largest_difference(first, other) > 1e-5


def test_each_micro_batch_of_each_run_has_a_seed_of_its_own():
    """On a CPU torch reads 32 bits of a seed."""
    seeds = {micro_batch_seed(seed, number) % 2**32 for seed in (0, 1, 42, 2**32 - 1) for number in range(100)}
    assert len(seeds) == 400


def test_evaluation_is_a_mean_over_tokens():
    model, log = run(dtype=torch.float64, steps=1, dropout=0.1)
    assert log[-1]["split"] == "eval"
    assert log[-1]["loss"] == pytest.approx(mean_loss(sft_loss(model.eval()), collate(HELD_OUT)).item(), rel=1e-12)


def test_logged_loss_and_counters_cover_every_step():
    _, each = run()
    _, some = run(log_every=4)
    each = [line for line in each if line["split"] == "train"]
    some = [line for line in some if line["split"] == "train"]
    assert [line["step"] for line in some] == [4, 6]
    counts = [each[0]["supervised_tokens"]]
    counts += [b["supervised_tokens"] - a["supervised_tokens"] for a, b in zip(each, each[1:], strict=False)]
    expected = sum(line["loss"] * count for line, count in zip(each[:4], counts, strict=False)) / sum(counts[:4])
    assert some[0]["loss"] == pytest.approx(expected, rel=1e-6)
    epoch = sum(len(ids) for ids, _ in EXAMPLES)
    assert each[2]["tokens"] == epoch  # three steps of up to eight rows are an epoch of nineteen
    supervised = sum(label != IGNORE_INDEX for _, labels in EXAMPLES for label in labels[1:])
    assert each[2]["supervised_tokens"] == supervised


def test_last_and_best_are_whole_checkpoints(tmp_path):
    run(tmp_path / "run", lr=0.05, steps=40, eval_every=4, save_every=1)
    log = [line for line in read_metrics(tmp_path / "run") if line["split"] == "eval" and line["step"]]
    best = min(log, key=lambda line: line["loss"])
    checkpoints = tmp_path / "run" / "checkpoints"
    assert best["step"] < 40, "this run should overfit, or the test shows nothing"
    assert json.loads((checkpoints / "steps.json").read_text()) == {"last": 40, "best": best["step"]}
    folders = [f"step-{best['step']:06d}", "step-000040"]
    assert sorted(path.name for path in checkpoints.iterdir()) == [*folders, "steps.json"]
    loaded = OPTForCausalLM.from_pretrained(checkpoints / folders[0])
    assert reference_loss(loaded, HELD_OUT).item() == pytest.approx(best["loss"], rel=1e-5)


@pytest.mark.parametrize(("fails_at", "error"), [("save_file", SafetensorError), ("rename", OSError)])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, fails_at, error):
    run(tmp_path / "run", steps=2)
    target = checkpoint if fails_at == "save_file" else checkpoint.Path

    def full(*_):
        raise error("No space left on device")

    monkeypatch.setattr(target, fails_at, full)
    with pytest.raises(error, match="No space"):
        run(tmp_path / "run", steps=4, resume=True)
    monkeypatch.undo()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert checkpoint.find(checkpoints) == checkpoints / "step-000002"
    assert not [path for path in checkpoints.iterdir() if "unfinished" in path.name]
    whole, _ = run(steps=4, schedule="constant")
    run(tmp_path / "cut", steps=2, schedule="constant")
    resumed, _ = run(tmp_path / "cut", steps=4, schedule="constant", resume=True)
    assert largest_difference(whole, resumed) == 0.0


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    with pytest.raises(UserError, match="--lr 1e\\+20: the loss or its gradient is nan after step 1"):
        run(tmp_path / "run", lr=1e20, steps=20, log_every=20, schedule="constant")
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(UserError, match="--lr 1e\\+30"):
        run(tmp_path / "short", lr=1e30, steps=1)
    assert not (tmp_path / "short" / "checkpoints").exists()
    lines = read_metrics(tmp_path / "run") + read_metrics(tmp_path / "short")
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("fault", ["parameter", "moment", "overflow", "other rank"])
def test_a_diverged_state_is_never_saved(tmp_path, monkeypatch, fault):
    """Parameters or moments that are not finite, or so large that every loss overflows, without an evaluation.

    Those of a sharded model can be finite on this rank only.
    """
    step = torch.optim.AdamW.step
    checks = []  # losses before a checkpoint, which are summed over the ranks

    def sum_values(values):
        checks.append(values.keys() == {"loss"})
        return {"loss": math.nan} if fault == "other rank" and checks[-1] and sum(checks) == 3 else values

    def fail_in_step_3(optimizer, *arguments):
        step(optimizer, *arguments)
        parameter = optimizer.param_groups[0]["params"][0]
        state = optimizer.state[parameter]
        if state["step"] == 3 and fault != "other rank":
            broken = state["exp_avg"] if fault == "moment" else parameter.data
            broken.view(-1)[0] = math.inf if fault == "moment" else math.nan
            if fault == "overflow":
                broken.fill_(3e38)

    monkeypatch.setattr(torch.optim.AdamW, "step", fail_in_step_3)
    with pytest.raises(
        UserError, match=r"^--lr 0.001: the loss or its gradient is (nan|inf) after step 3, try a lower"
    ):
        run(tmp_path / "run", save_every=1, ranks=Ranks(sum_values=sum_values))
    monkeypatch.undo()
    assert checkpoint.find(tmp_path / "run" / "checkpoints").name == "step-000002"
    run(tmp_path / "run", resume=True)


def test_a_diverged_run_that_was_saved_at_each_step_continues_at_a_lower_rate(tmp_path):
    run(tmp_path / "run", steps=2, save_every=1)
    values = {"save_every": 1, "steps": 4, "schedule": "constant", "resume": True}
    with pytest.raises(UserError, match="--lr 1e.20: .* after step 3, try a lower one, from the last checkpoint on"):
        run(tmp_path / "run", lr=1e20, **values)
    _, lines = run(tmp_path / "run", lr=1e-4, **values)
    assert lines[-1]["step"] == 4 and math.isfinite(lines[-1]["loss"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "--model data/model: the loss or its gradient is nan before training: its weights are damaged"),
        ({"base_dtype": "float16"}, "before training: .* overflow in --base-dtype float16, expected float32 or bf"),
        ({"resume": True}, "--resume: .* is nan at the checkpoint: start afresh, at a lower --lr"),
    ],
)
def test_a_first_loss_that_is_not_finite_is_not_blamed_on_the_rate(tmp_path, monkeypatch, values, message):
    if "resume" in values:
        run(tmp_path / "run", steps=1)
    accumulate = trainer.accumulate_gradient
    monkeypatch.setattr(trainer, "accumulate_gradient", lambda *given: accumulate(*given) | {"loss": math.nan})
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / "run", steps=2, **values)
    assert "--lr 0.001" not in str(caught.value) and "\n" not in str(caught.value)


def test_resume_says_what_is_wrong_with_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint"):
        run(tmp_path / "none", resume=True)
    run(tmp_path / "run", steps=1)
    file = tmp_path / "run" / "checkpoints" / "step-000001" / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{file} is damaged .*; start afresh without --resume"):
        run(tmp_path / "run", steps=2, resume=True)


def without(name: str, tensors: dict) -> dict:
    return {other: tensor for other, tensor in tensors.items() if other != name}


MOMENT = "exp_avg.decoder.embed_tokens.weight"
DAMAGES = {
    "progress.json": [b"[]", b"{}", b"null", b"", b"\xff", b"\0" * 40, b"[" * 100_000]
    + [lambda values, step=step: values | {"step": step} for step in ("a", True, 0, -1, 2.5, None, 3, 10**40)]
    + [lambda values: values | {"sums": [1]}, lambda values: values | {"sums": {"loss": "x"}}]
    + [lambda values: values | {"best_loss": []}, lambda values: values | {"seconds": "x"}]
    + [lambda values: values | {"extra": 1}, lambda values: without("items", values)],
    "training.safetensors": [b"", b"{}", b"\0" * 40]
    + [lambda tensors: without(MOMENT, tensors)]
    + [lambda tensors: without(MOMENT.replace("exp_avg", "step"), tensors)]
    + [lambda tensors: tensors | {MOMENT: tensors[MOMENT].long()}]
    + [lambda tensors: tensors | {MOMENT: tensors[MOMENT].half()}]
    + [lambda tensors: tensors | {MOMENT: tensors[MOMENT][:2].clone()}]
    + [lambda tensors: {name: tensor.long() for name, tensor in tensors.items()}],
}  # fmt: skip


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory) -> Path:
    """Return a run of four steps; its last checkpoint is not its best, so there are two."""
    folder = tmp_path_factory.mktemp("steps") / "run"
    run(folder, lr=0.5, steps=4, eval_every=1, save_every=1)
    assert checkpoint.find(folder / "checkpoints").name == "step-000004"
    return folder


@pytest.mark.parametrize(("name", "number"), [(name, n) for name in DAMAGES for n in range(len(DAMAGES[name]))])
def test_a_damaged_checkpoint_is_named_with_the_one_before_it(four_steps, tmp_path, name, number):
    damage = DAMAGES[name][number]
    shutil.copytree(four_steps, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-000004"
    if isinstance(damage, bytes):
        (folder / name).write_bytes(damage)
    elif name == "progress.json":
        (folder / name).write_text(json.dumps(damage(json.loads((folder / name).read_text()))))
    else:
        save_file(damage(load_file(folder / name)), folder / name)
    values = {"lr": 0.5, "steps": 4, "resume": True}
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", **values)
    way = f"delete {folder} to continue from step-00000"
    assert f"--resume: {folder / name} is damaged" in str(caught.value) and way in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder)
    _, lines = run(tmp_path / "run", **values)
    assert without_seconds(lines)[-1] == without_seconds(read_metrics(four_steps))[-1]


def cut_into_parts(folder: Path) -> list[Path]:
    """Turn a checkpoint into that of a sharded run of two ranks; return the two files."""
    tensors = load_file(folder / "training.safetensors")
    (folder / "training.safetensors").unlink()
    (folder / "training").mkdir()
    paths = [folder / "training" / f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]
    for rank, path in enumerate(paths):
        cuts = {name: -(-len(tensor) // 2) for name, tensor in tensors.items() if tensor.dim()}
        parts = {name: (tensors[name][cut:] if rank else tensors[name][:cut]).clone() for name, cut in cuts.items()}
        if rank == 0:
            parts |= {name: tensor for name, tensor in tensors.items() if not tensor.dim()}
        starts = {
            name: [rank * cuts[name], *[0] * (part.dim() - 1)] if part.dim() else [] for name, part in parts.items()
        }
        about = {name: {"saved_offsets": start} for name, start in starts.items()}
        save_file(parts, path, {"DCP_SHARDING_INFO": json.dumps(about)})
    return paths


def test_a_sharded_checkpoint_is_resumed_by_one_process_unless_a_part_is_missing(four_steps, tmp_path):
    values = {"lr": 0.5, "steps": 4, "resume": True}
    for damage in ("", "first", "second", "cut"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(four_steps, tmp_path / "run")
        folder = tmp_path / "run" / "checkpoints" / "step-000004"
        paths = cut_into_parts(folder)
        if not damage:
            model, lines = run(tmp_path / "run", **values)
            assert without_seconds(lines) == without_seconds(read_metrics(four_steps))
            assert largest_difference(model, load_model(four_steps / "checkpoints" / "step-000004")) == 0.0
            continue
        if damage == "cut":
            paths[1].write_bytes(paths[1].read_bytes()[:-999])
        else:
            paths[damage == "second"].unlink()
        problem = "MetadataIncompleteBuffer|incomplete" if damage == "cut" else r"a part of \S+ is missing"
        with pytest.raises(
            UserError, match=rf"--resume: {folder}/training is damaged \(.*({problem}).*delete {folder}"
        ):
            run(tmp_path / "run", **values)


@pytest.mark.parametrize("line", ["garbage", "3", "\0\0", "[]", '{"step": 1}', '{"step": "a", "split": "eval"}',
                                  '{"step": 1, "split": "eval", "loss": "x"}', "[" * 100_000, "\udcff"])  # fmt: skip
def test_a_damaged_line_of_metrics_is_named(four_steps, tmp_path, line):
    shutil.copytree(four_steps, tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_bytes("\n".join([lines[0], line, *lines[1:], ""]).encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=rf"{file}:2:.*(correct|remove|convert|expected)"):
        run(tmp_path / "run", lr=0.5, steps=4, resume=True)


# ------------------------------------------------------------------------------------------ folders instead of links


def link_names(checkpoints: Path) -> None:
    """Name the last and the best checkpoint as earlier versions did."""
    steps = json.loads((checkpoints / "steps.json").read_text())
    (checkpoints / "steps.json").unlink()
    for name, step in steps.items():
        (checkpoints / name).symlink_to(f"step-{step:06d}")


@pytest.mark.parametrize("layout", ["links", "links resolved", "last alone", "links as text", "neither", "damaged"])
def test_every_layout_of_checkpoints_resumes(tmp_path, layout):
    knows_best = layout in ("links", "links resolved")  # then it is not the last: this rate is too high
    values = {
        "dropout": 0.1,
        "eval_every": 1,
        "save_every": 2,
        "schedule": "constant",
        "lr": 0.5 if knows_best else 1e-3,
    }
    whole, whole_log = run(tmp_path / "whole", steps=6, **values)
    run(tmp_path / "cut", steps=4, **values)
    steps = json.loads((tmp_path / "whole" / "checkpoints" / "steps.json").read_text())
    assert (steps["best"] < 4) == knows_best
    link_names(tmp_path / "cut" / "checkpoints")
    shutil.copytree(tmp_path / "cut", tmp_path / "run", symlinks=layout != "links resolved")
    checkpoints = tmp_path / "run" / "checkpoints"
    names = [checkpoints / name for name in ("last", "best") if (checkpoints / name).is_symlink()]
    if layout == "last alone":
        shutil.copytree(checkpoints / "last", tmp_path / "copy")
        shutil.rmtree(checkpoints)
        shutil.copytree(tmp_path / "copy", checkpoints / "last")
    elif layout in ("links as text", "neither", "damaged"):
        for name in names:
            name.unlink()
            if layout == "links as text":
                name.write_text("step-000004")
        if layout == "damaged":
            (checkpoints / "steps.json").write_text("[")

    resumed, log = run(tmp_path / "run", steps=6, resume=True, **values)
    assert largest_difference(whole, resumed) == 0.0
    assert without_seconds(log) == without_seconds(whole_log)
    expected = tmp_path / "whole" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {path.name for path in expected.iterdir()}
    assert (checkpoints / "steps.json").read_text() == (expected / "steps.json").read_text()


def test_a_file_system_without_links(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "symlink_to", lambda *_, **__: pytest.fail("no links here"))
    monkeypatch.setattr(os, "symlink", lambda *_, **__: pytest.fail("no links here"))
    run(tmp_path / "run", steps=2)
    run(tmp_path / "run", steps=4, resume=True)


@pytest.mark.parametrize("left", ["half removed", "removed", "unfinished"])
def test_what_a_killed_process_left_is_cleaned_up(four_steps, tmp_path, left):
    shutil.copytree(four_steps, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    before = sorted(path.name for path in checkpoints.iterdir())
    name = {"half removed": "step-000000", "removed": ".step-000000.removed", "unfinished": ".step-000005.unfinished"}
    (checkpoints / name[left]).mkdir()
    (checkpoints / name[left] / "config.json").write_text("{}")
    run(tmp_path / "run", lr=0.5, steps=4, resume=True)
    assert sorted(path.name for path in checkpoints.iterdir()) == before


def test_an_error_while_an_old_checkpoint_is_removed_costs_nothing(tmp_path, monkeypatch):
    def fail(path, ignore_errors=False, **_):
        if not ignore_errors:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "rmtree", fail)
    run(tmp_path / "run", steps=3, save_every=1)
    monkeypatch.undo()
    run(tmp_path / "run", steps=3, resume=True)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-000003", "steps.json"}


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="--device cuda"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"


def test_the_allocator_is_set_again_by_each_run_in_a_process(monkeypatch):
    """A run that saves memory used to leave memory mapping off if an earlier one had turned it off."""

    class C:
        def __init__(self):
            self.options = {}

        def mallopt(self, option, value):
            self.options[option] = value

    library = C()
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    set_allocator(save_memory=True)
    given_back = {**library.options}
    placement("cpu", "float32")  # as each command that loads a model does
    assert library.options == given_back | {-1: -1, -4: 0}  # never trim the heap, never map memory
    set_allocator(save_memory=True)
    assert library.options == given_back
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # another C library
    set_allocator(save_memory=True)
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr("ctypes.CDLL", None)  # not to be called
    set_allocator(save_memory=True)


def test_the_name_of_the_machine(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert machine(torch.device("cpu")).endswith(", 1 thread") and not machine(torch.device("cpu")).startswith(",")
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.setattr("minift.run.device.Path.exists", lambda path: False)  # not Linux
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "abacus")
    assert machine(torch.device("cpu")) == "abacus, 8 threads"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device.index}")
    assert machine(torch.device("cuda:1")) == "GPU 1" and machine(torch.device("mps")) == "Apple's GPU"


@pytest.mark.parametrize(
    ("cuda", "mps", "auto"), [(0, False, "cpu"), (0, True, "mps"), (2, False, "cuda"), (1, True, "cuda")]
)
def test_the_device_that_is_chosen(cuda, mps, auto, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert pick_device("auto") == torch.device(auto) and pick_device("cpu").type == "cpu"
    for name, is_here in (("cuda", cuda > 0), ("cuda:1", cuda > 1), ("mps", mps)):
        if is_here:
            assert pick_device(name) == torch.device(name)
        else:
            expected = "cpu, mps or" if mps else "cpu or"
            with pytest.raises(UserError, match=f"--device {name}: expected auto, {expected} one of the {cuda} GPUs"):
                pick_device(name)


def test_cuda_is_set_up_for_changing_shapes(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    uses_cudnn: list[bool] = []
    monkeypatch.setattr("torch.backends.cuda.enable_cudnn_sdp", uses_cudnn.append)
    for earlier, expected in (
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ):
        monkeypatch.setattr("os.environ", earlier)
        pick_device("cpu")
        assert earlier.get("PYTORCH_ALLOC_CONF") != "expandable_segments:True"
        pick_device("cuda")
        assert earlier.get("PYTORCH_ALLOC_CONF") == expected
    assert uses_cudnn == [False] * 3


def test_what_compile_needs(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    for found, is_enough in (({"gcc"}, True), ({"clang"}, True), (set(), False)):
        monkeypatch.setattr("shutil.which", lambda name, found=found: name if name in found else None)
        if is_enough:
            check_compiler(torch.device("cuda"))
        else:
            with pytest.raises(UserError, match="--compile: needs a C compiler"):
                check_compiler(torch.device("cuda"))
    with pytest.raises(UserError, match="--compile: it is for NVIDIA GPUs only, and this run is on cpu"):
        check_compiler(torch.device("cpu"))
    monkeypatch.setenv("CC", "cc")
    check_compiler(torch.device("cuda:1"))


def test_apple_s_gpu_has_no_float64(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    message = r"--dtype float64: Apple's GPU \(mps\) does not have it: add --device cpu"
    with pytest.raises(UserError, match=message):
        pick_dtype(Config(dtype="float64"), pick_device("auto"))
    with pytest.raises(UserError, match=message):
        placement("mps", "float64")
    assert placement("cpu", "float64")["dtype"] == torch.float64
    assert placement("mps", "float32") == {"device": torch.device("mps"), "dtype": torch.float32}
    assert pick_dtype(Config(), torch.device("mps")) == torch.float32


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU here")
def test_apple_s_gpu_trains_as_the_cpu_does():
    _, expected = run()
    model, log = run(device="mps", arithmetic="float32")
    assert next(model.parameters()).dtype == torch.float32
    for ours, theirs in zip(log, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_progress_that_no_terminal_shows_is_plain_lines(capsys, monkeypatch):
    """Piped output was one long line of carriage returns, and held-out losses were never printed."""
    monkeypatch.setattr("minift.progress.PLAIN_SECONDS", 0)
    _, lines = run(steps=4, eval_every=2, log_every=1)
    printed = capsys.readouterr()
    assert "\r" not in printed.err and not any(line.strip() == "" for line in printed.err.splitlines())
    found = [line.split(" ")[:2] for line in printed.err.splitlines()]
    assert found[:5] == [["training:", f"{step}/4"] for step in range(5)] and "loss" in printed.err.splitlines()[-1]
    losses = [(line["step"], line["loss"]) for line in lines if line["split"] == "eval"]
    assert printed.out.splitlines() == [f"step {step}: held-out loss {loss:.3f}" for step, loss in losses]


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_bar(3, "before", "answer") as bar:
        bar.update(3)
    printed = capsys.readouterr().err
    assert "\rbefore: 100%|" in printed and printed.endswith("\n")
