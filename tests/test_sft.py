"""`train_sft.py` as users run it, on the model and the data that ship."""

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, OPTForCausalLM

import minift
import train_sft
from minift.commands import terminal
from minift.commands.flags import parse
from minift.encode import IGNORE_INDEX, Example
from minift.errors import UserError
from minift.files.templates import load_template
from minift.files.text import write_json
from minift.files.tokenizer import load_tokenizer
from minift.files.weights import load_model
from minift.prompts import TEMPLATES
from minift.run import exam, sandbox
from minift.run.lock import make_folder
from tests.reference import difference, logits_of, reference_logits
from tests.runs import (
    ROOT,
    SHIPPED,
    SMALL,
    STEPS,
    TINY,
    assert_same_run,
    command,
    execute,
    few_rows,
    kill_and_resume,
    read_lines,
    refused,
    run,
    snapshot,
    write_lines,
)

VARIANTS = {
    "all weights": ["--dropout", 0.1],
    "LoRA": ["--lora-rank", 4, "--lora-dropout", 0.1, "--dropout", 0.1],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list:
    """Return flags that name a few of the shipped rows."""
    return few_rows("sft", tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> tuple[Path, str]:
    """Return the folder of a short run on the shipped rows, a few of them held out, and what it printed."""
    out = tmp_path_factory.mktemp("sft") / "run"
    return out, execute("sft", *SMALL, *data[2:], "--run-checks", "--out", out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> dict[str, tuple[Path, str]]:
    """Return the folder of an uninterrupted run of each variant, and what it printed."""
    outs = {name: tmp_path_factory.mktemp("whole") / "run" for name in VARIANTS}
    return {name: (out, run("sft", *TINY, *data, *VARIANTS[name], "--out", out)) for name, out in outs.items()}


def test_a_run_leaves_what_the_design_says(finished):
    out, printed = finished
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"}
    assert names >= {"template.json", "run.json", "metrics.jsonl", "samples.jsonl", "report.html", "checkpoints"}
    assert names >= {"row.json", "before.json"}
    lines = read_lines(out / "metrics.jsonl")
    assert [(line["step"], line["split"]) for line in lines] == [
        (0, "eval"),
        *((step, "train") for step in (1, 2, 3, 4)),
        (4, "eval"),
    ]
    evaluated = {"step", "split", "loss", "tokens", "supervised_tokens", "seconds"}
    assert all(line.keys() == evaluated for line in lines if line["split"] == "eval")
    assert all(line.keys() == evaluated | {"lr", "grad_norm"} for line in lines if line["split"] == "train")

    record = json.loads((out / "run.json").read_text())
    assert record.keys() == {"task", "values", "template", "versions", "fingerprints", "commits", "command", "machine",
                             "date", "results"}  # fmt: skip
    assert f"train_sft.py --max-steps {STEPS}" in record["command"] and record["command"].endswith(str(out))
    assert record["machine"].endswith("thread" if torch.get_num_threads() == 1 else "threads")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    assert record["task"] == "sft"
    values = {"batch_size": 4, "recipe": "tiny", "seed": 42, "data": "data/instructions.jsonl", "lr": 1e-3}
    assert record["values"].items() >= values.items()
    assert record["versions"].keys() == {"python", "minift", "torch", "tokenizers", "safetensors", "numpy",
                                         "huggingface_hub"}  # fmt: skip
    assert record["versions"]["torch"].startswith("2.13.0")
    assert all(len(record["fingerprints"][name]) == 64 for name in ("weights", "data", "eval_data"))
    assert record["commits"] == {"weights": None, "data": None, "eval_data": None}
    assert record["results"].keys() == {"eval_loss", "bleu", "pass_rate", "pass_interval", "checked"}
    assert record["results"]["eval_loss"] == {"before": lines[0]["loss"], "after": lines[-1]["loss"]}
    for when in ("before", "after"):
        for measure in ("bleu", "pass_rate", "pass_interval", "checked"):
            assert record["results"][measure][when].keys() == {"all", "new combination", "new family"}

    samples = read_lines(out / "samples.jsonl")
    assert len(samples) == 6
    assert all(sample.keys() == {"kind", "prompt", "reference", "before", "after", "passed"} for sample in samples)
    assert all(type(sample["passed"][when]) is bool for sample in samples for when in ("before", "after"))
    assert "⟦" in printed and "eval loss" in printed and "BLEU" in printed
    assert printed.endswith(f" -m minift chat --model {out}\n")
    assert f"\n{STEPS} optimiser steps of about {lines[-1]['tokens'] / STEPS:,.0f} tokens\n" in printed
    assert load_template(str(out / "template.json")).without_input == TEMPLATES["course"].without_input


def test_row_json_has_the_losses_of_the_first_held_out_row(finished, data):
    out, _ = finished
    row = read_lines(Path(data[3]))[0]
    model = minift.load(out)
    [seen] = json.loads((out / "row.json").read_text())["rows"]
    losses = [value for value in seen["values"] if value is not None]
    assert sum(losses) / len(losses) == pytest.approx(model.loss(row).item(), abs=1e-5)
    example = model.encode(row)
    assert [value is None for value in seen["values"]] == [label == IGNORE_INDEX for label in example.labels]
    assert "".join(seen["tokens"]).startswith("⟨</s>⟩### Instruction:\n")
    assert "".join(seen["tokens"][example.labels.count(IGNORE_INDEX) :]) == f"{row['output']}⟨</s>⟩"
    page = (out / "report.html").read_text()
    assert "One row as the loss sees it" in page and page.count('class="token"') == len(losses)


def test_transformers_loads_the_run_as_it_is(finished):
    out, _ = finished
    reference, info = OPTForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = "### Instruction:\nWrite a function.\n\n### Response:\n"
    ids = AutoTokenizer.from_pretrained(out)(text)["input_ids"]
    assert ids == load_tokenizer(out).encode(text)
    with torch.no_grad():
        ours = logits_of(load_model(out).eval(), [Example(ids, ids)])
        assert difference(ours, reference_logits(reference.eval(), [ids])) <= 1e-5


def test_the_shipped_model_is_small_half_precision_and_post_ln():
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["do_layer_norm_before"] is False and config["word_embed_proj_dim"] != config["hidden_size"]
    tensors = load_file(SHIPPED / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert 2e6 < sum(tensor.numel() for tensor in tensors.values()) < 10e6
    assert (SHIPPED / "vocab.json").exists() and (SHIPPED / "merges.txt").exists()
    shipped = [path for path in (ROOT / "data").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in shipped) < 15e6


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("name", VARIANTS)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(whole, data, tmp_path, name):
    kill_and_resume("sft", tmp_path / "run", *TINY, *data, *VARIANTS[name])
    assert_same_run(tmp_path / "run", whole[name][0])


def test_resume_refuses_another_run(tmp_path):
    """Values, data, weights or template that have changed; and the run stays as it was."""
    folder, model, template = tmp_path / "run", tmp_path / "model", tmp_path / "template.txt"
    shutil.copytree(SHIPPED, model)
    template.write_text("Q: {instruction} {input} A:{response}")
    rows = [{"instruction": f"{n}", "output": "x"} for n in range(8)]
    data, held_out = (write_lines(tmp_path / name, rows) for name in ("rows.jsonl", "held_out.jsonl"))
    flags = ["--model", model, "--data", data, "--eval-data", held_out, "--template", template, "--out", folder]
    flags += ["--max-steps", 1, "--bleu-samples", 0, "--device", "cpu"]
    run("sft", *flags)
    before = snapshot(folder)
    flags.append("--resume")
    assert "--weight-decay was 0.0" in refused("sft", *flags, "--weight-decay", "0.1")
    assert "--max-steps was 1" in refused("sft", *flags, "--max-steps", 2)
    for path, name in ((data, "data"), (held_out, "eval_data")):
        write_lines(path, [*rows[1:], {"instruction": "other", "output": "x"}])
        assert f"--resume: the fingerprint of {name} was " in refused("sft", *flags)
        write_lines(path, rows)
    weights = (model / "model.safetensors").read_bytes()
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, model / "model.safetensors")
    assert "--resume: the fingerprint of weights was " in refused("sft", *flags)
    (model / "model.safetensors").write_bytes(weights)
    for file, name in (("config.json", "config"), ("merges.txt", "tokenizer"), ("tokenizer_config.json", "tokenizer")):
        text = (model / file).read_text()
        lines = text.splitlines(keepends=True)
        swapped = "".join([*lines[:-2], lines[-1].rstrip("\n") + "\n", lines[-2]])  # two merges
        changed = {"config.json": text.replace("relu", "gelu"), "merges.txt": swapped}
        (model / file).write_text(changed.get(file, text + "\n"))
        assert f"--resume: the fingerprint of {name} was " in refused("sft", *flags)
        (model / file).write_text(text)
    template.write_text("Q: {instruction} {input} Answer:{response}")
    assert "--resume: the template's with_input was Q: " in refused("sft", *flags)
    template.write_text("Q: {instruction} {input} A:{response}")
    assert snapshot(folder) == before

    for damaged in ("{", "[]", '{"values": 1}'):
        (folder / "run.json").write_text(damaged)
        assert f"--resume: {folder}/run.json is damaged" in refused("sft", *flags)
    (folder / "run.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert f"{folder}/run.json: a Git LFS pointer" in refused("sft", *flags)


def test_fingerprints_decide_and_not_the_spelling_of_a_path(tmp_path, monkeypatch):
    """The same files by other names, moved with the run; a run of an earlier version lacks some fingerprints."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copytree(SHIPPED, old / "model")
    write_lines(old / "rows.jsonl", [{"instruction": f"{n}", "output": "x"} for n in range(8)])
    (old / "template.txt").write_text("Q: {instruction} {input} A:{response}")
    flags = ["--max-steps", 1, "--bleu-samples", 0, "--device", "cpu"]

    def names(folder: Path) -> list:
        files = {"model": "model", "data": "rows.jsonl", "eval-data": "rows.jsonl", "template": "template.txt"}
        return [word for flag, file in {**files, "out": "run"}.items() for word in (f"--{flag}", folder / file)]

    run("sft", *flags, *names(old))
    run("sft", *flags, *names(Path(os.path.relpath(old, ROOT))), "--resume")
    old.rename(new)
    record = json.loads((new / "run" / "run.json").read_text())
    record["fingerprints"] = {name: record["fingerprints"][name] for name in ("data", "eval_data", "weights")}
    (new / "run" / "run.json").write_text(json.dumps(record))
    run("sft", *flags, *names(new), "--resume")
    without_eval = [word for word in names(new) if word != "--eval-data"]
    del without_eval[without_eval.index(new / "rows.jsonl") + 1]
    assert "--resume: the fingerprint of eval_data was" in refused("sft", *flags, *without_eval, "--eval-fraction", 0,
                                                                   "--resume")  # fmt: skip


def test_a_run_that_diverged_continues_at_a_lower_rate(tmp_path, data):
    """The message has the whole command, and the command works."""
    flags = [*TINY, *data, "--bleu-samples", 0, "--schedule", "constant", "--out", tmp_path / "run", "--save-every", 4]
    run("sft", *flags, "--max-steps", 4)  # a checkpoint after step 4 ...
    steps = json.loads((tmp_path / "run" / "run.json").read_text())
    steps["values"] |= {"max_steps": 8, "lr": 1e20}
    (tmp_path / "run" / "run.json").write_text(json.dumps(steps))
    done = subprocess.run(
        command("sft", *flags, "--max-steps", 8, "--lr", 1e20, "--resume"), cwd=ROOT, capture_output=True, text=True
    )  # ... from which the rate is far too high
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: --lr 1e+20: the loss or")
    before, _, hint = done.stderr.splitlines()[-1].partition(", try a lower one, from the last checkpoint on: ")
    assert hint.endswith("--resume --lr 1e+19")
    hint = hint.replace("--lr 1e+19", "--lr 1e-4")
    done = subprocess.run(shlex.split(hint), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--lr was 1e+20; from the last checkpoint on it is 0.0001" in done.stdout
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["split"] == "train"]
    assert [line["step"] for line in lines] == [*range(1, 9)] and all(0 < line["lr"] <= 1e-4 for line in lines[4:])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["values"]["lr"] == 1e-4
    assert "--lr was 0.0001" in refused("sft", *flags, "--max-steps", 8, "--resume")  # only its flag may change it


@pytest.mark.parametrize(
    ("samples", "message"),
    [(0, "is nan before training: numbers above 65,504 overflow"), (1, "the model's logits are NaN or infinite")],
)
def test_weights_that_overflow_in_float16(tmp_path, data, samples, message):
    shutil.copytree(SHIPPED, tmp_path / "model")
    tensors = load_file(SHIPPED / "model.safetensors")
    tensors = {name: tensor * 1e4 if name.endswith("fc1.weight") else tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    flags = ["--model", tmp_path / "model", *data, "--out", tmp_path / "run", *SMALL, "--bleu-samples", samples]
    assert message in refused("sft", *flags, "--base-dtype", "float16", "--lora-rank", 1)


def test_folders_that_are_not_a_run(tmp_path):
    """They are refused before the model, which does not exist here, is looked for."""
    flags = [*SMALL, "--model", tmp_path / "no model", "--out"]
    message = refused("sft", *flags, tmp_path / "a run", "--resume")
    assert "run.json does not exist" in message
    test = message.partition("or write ")[2].removesuffix(" to resume where possible")
    for is_there in (False, True):
        printed = subprocess.run(["sh", "-c", f"echo {test}"], capture_output=True, text=True).stdout.strip()
        assert printed == ("--resume" if is_there else "")
        (tmp_path / "a run" / "checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / "a run" / "checkpoints" / "steps.json").write_text("{}")
    shutil.rmtree(tmp_path / "a run")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "holiday.jpg").write_text("not ours")
    assert "not empty and not an earlier run" in refused("sft", *flags, tmp_path)
    for name in ("holiday.jpg", "holiday.jpg/run"):
        assert refused("sft", *flags, tmp_path / name).startswith(f"--out {tmp_path / name}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_second_run_keeps_the_first(tmp_path, data):
    out = tmp_path / "run"
    for _ in range(2):
        run("sft", *SMALL, "--max-steps", 1, "--bleu-samples", 0, *data, "--out", out)
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "run-1", out))
    assert first == second  # the same seed


def test_a_run_holds_its_folder(tmp_path, data):
    """A second run, a second --resume and a --resume beside a run are refused; the first one does not notice."""
    out = tmp_path / "run"
    flags = [*SMALL, *data, "--bleu-samples", 0, "--out", out]
    run("sft", *flags, "--save-every", 1)
    assert not (out / ".lock").exists()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process does
        before = snapshot(tmp_path)
        for more in ([], ["--resume"]):
            message = refused("sft", *flags, "--save-every", 1, "--model", tmp_path / "no model", *more)
            assert message.startswith(f"--out {out}: another process is training in it")
        assert snapshot(tmp_path) == before
    run("sft", *flags, "--resume")  # a killed process leaves the file, not the lock
    run("sft", *flags)
    assert {path.name for path in tmp_path.iterdir()} >= {"run", "run-1"}


def test_two_runs_started_at_once(tmp_path, data):
    flags = [*TINY, *data, "--bleu-samples", 0, "--out", tmp_path / "run"]
    started = [
        subprocess.Popen(command("sft", *flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [(process.communicate()[1].splitlines()[-1], process.returncode) for process in started]
    finished = [line for line, status in ends if status == 0]
    assert finished and all("another process is training in it" in line for line, status in ends if status)
    runs = [tmp_path / "run", tmp_path / "run-1"][: len(finished)]
    for folder in runs:  # if one came late, the other had ended
        assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4, 4]


def test_a_file_system_without_locks(tmp_path, data, monkeypatch):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", fail)
    flags = [*SMALL, *data, "--bleu-samples", 0, "--max-steps", 1, "--out", tmp_path / "run"]
    assert "can't be locked (Operation not supported): do not start another run in it" in run("sft", *flags)


def test_a_system_without_fcntl(tmp_path, data, monkeypatch):
    """As Windows: everything can be imported, and a run says that its folder is not locked."""
    modules = "import sys; sys.modules['fcntl'] = None; import train_sft, train_rm, minift.commands.winrate"
    subprocess.run([sys.executable, "-c", modules], cwd=ROOT, check=True)
    monkeypatch.setattr("minift.run.lock.fcntl", None)
    flags = [*SMALL, *data, "--bleu-samples", 0, "--max-steps", 1, "--out", tmp_path / "run"]
    for _ in range(2):  # the second one renames the first one's folder
        assert f"{tmp_path / 'run'} can't be locked on this system" in run("sft", *flags)
    assert (tmp_path / "run-1" / "model.safetensors").exists()


@pytest.mark.parametrize("left", [[], [".lock"], [".run.json.unfinished"], [".lock", ".run.json.unfinished"]])
def test_a_start_that_was_killed_does_not_block_the_next(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{")
    make_folder(tmp_path)
    write_json(tmp_path / "run.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "run.json"}


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_full_disk_is_not_the_users_mistake(finished, data, tmp_path, monkeypatch, flags):
    """It was status 2 and "expected a folder that can be made"."""
    shutil.copytree(finished[0], tmp_path / "run")

    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr("minift.run.lock.hold", full)
    with pytest.raises(OSError, match="No space left"):
        run("sft", *SMALL, *data[2:], "--out", tmp_path / "run", *flags)
    monkeypatch.setattr("minift.run.lock.hold", lambda _: None)
    monkeypatch.setattr("minift.run.checkpoint.load_file", full)
    with pytest.raises(OSError, match="No space left"):  # not "is damaged: delete it"
        run("sft", *SMALL, *data[2:], "--out", tmp_path / "run", "--resume")


def test_resume_does_not_ask_the_base_model_again(tmp_path, data, monkeypatch):
    out = tmp_path / "run"
    flags = [*SMALL, *data, "--out", out]
    asked = []
    ask = exam.complete_greedily
    monkeypatch.setattr(exam, "complete_greedily", lambda *given: asked.append(given[3].split()[0]) or ask(*given))
    run("sft", *flags, "--bleu-samples", 2)
    samples = (out / "samples.jsonl").read_bytes()
    run("sft", *flags, "--bleu-samples", 2, "--resume")
    assert asked == ["before", "after", "after"] and (out / "samples.jsonl").read_bytes() == samples
    kept = (out / "before.json").read_text()
    for damaged in (
        "{",
        "[]",
        '{"before": 1, "sha256": ""}',
        kept.replace("[", '["",', 1),
        kept.replace('": "', '": "0'),
    ):
        (out / "before.json").write_text(damaged)
        run("sft", *flags, "--bleu-samples", 2, "--resume")
        assert asked.pop(-2) == "before" and (out / "before.json").read_text() == kept
    run("sft", *flags, "--bleu-samples", 3, "--resume")
    assert asked[-2:] == ["before", "after"] and len(read_lines(out / "samples.jsonl")) == 3


# -------------------------------------------------------------------------------------------------------- pass rates


def answer_with(monkeypatch: pytest.MonkeyPatch, texts: dict[str, list[str]]) -> None:
    """Let the model's answers be `texts`, by the exam that asks for them."""
    monkeypatch.setattr(
        exam, "complete_greedily", lambda model, tokenizer, questions, description: texts[description.split()[0]]
    )


ADD = "def f(a):\n    return a + 1"
CHECKED = [
    {"instruction": "Add.", "output": ADD, "kind": "a", "checks": [{"expression": "f(1)", "expected": "2"}]},
    {"instruction": "Say x.", "output": "x", "kind": "a", "checks": [{"expression": "ANSWER", "expected": "'x'"}]},
    {"instruction": "Do.", "output": "y", "kind": "b"},
    {"instruction": "Set.", "output": "z = 1", "kind": "c", "checks": [{"expression": "z", "expected": "1"}]},
]


@pytest.fixture
def checked(tmp_path: Path, data: list) -> list:
    """Return the flags of a short run whose held-out rows have checks, except for one."""
    rows = write_lines(tmp_path / "checked.jsonl", CHECKED)
    return [*SMALL, "--max-steps", 1, *data[:2], "--eval-data", rows, "--out", tmp_path / "run", "--recipe", "tiny"]


def test_answers_that_pass_are_counted_and_marked(tmp_path, checked, monkeypatch):
    answer_with(monkeypatch, {"before": ["", "y", "y", "z = 2"], "after": [ADD, "x", "y", "import os\nz = 1"]})
    printed = run("sft", *checked, "--run-checks")
    results = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    assert results["pass_rate"] == {
        "before": {"all": 0.0, "a": 0.0, "c": 0.0}, "after": {"all": 2 / 3, "a": 1.0, "c": 0.0},
    }  # fmt: skip
    assert results["checked"]["after"] == {"all": 3, "a": 2, "c": 1}
    assert results["pass_interval"]["after"]["all"] == pytest.approx([0.2077, 0.9385], abs=1e-4)  # Wilson, 2 of 3
    passed = [sample.get("passed") for sample in read_lines(tmp_path / "run" / "samples.jsonl")]
    right, wrong = {"before": False, "after": True}, {"before": False, "after": False}
    assert passed == [right, right, None, wrong]

    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "pass rate, 3 answers 0.0% (0.0%-56.1%) 66.7% (20.8%-93.9%)" in lines
    assert "a, 2 answers 0.0% (0.0%-65.8%) 100.0% (34.2%-100.0%)" in lines
    assert lines.index("pass rate, 3 answers 0.0% (0.0%-56.1%) 66.7% (20.8%-93.9%)") > next(
        index for index, line in enumerate(lines) if line.startswith("BLEU")
    )
    assert printed.count("── after: passes its checks") == 2 and printed.count("── before: fails its checks") == 2
    assert "── after\n" in printed  # the row without checks
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("✓ passes") == 2 and page.count("✗ fails") == 4
    assert "<span>66.7% of 3</span>" in page and "<span>100.0% of 2</span>" in page and "passed" not in page


@pytest.mark.parametrize("origin", ["a recipe with the user's rows", "no recipe", "rows without checks", "no answers"])
def test_without_the_flag_or_checks_nothing_is_run_or_said(origin, tmp_path, checked, monkeypatch):
    monkeypatch.setattr(sandbox, "Sandbox", mock.Mock(side_effect=AssertionError))
    none = [*checked, "--run-checks", "--bleu-samples", 0]
    flags = {"no recipe": checked[:-2], "no answers": none}.get(origin, checked)
    if origin == "rows without checks":
        write_lines(tmp_path / "checked.jsonl", [{"instruction": "Do.", "output": "y", "kind": "b"}])
        flags = [*flags, "--run-checks"]
    printed = run("sft", *flags)
    assert ("pass rate" in printed, "checks" in printed.replace("--run-checks", "")) == (False, False)
    for name in ("samples.jsonl", "report.html"):
        path = tmp_path / "run" / name
        assert not path.exists() or "pass" not in path.read_text()
    assert "pass_rate" not in json.loads((tmp_path / "run" / "run.json").read_text())["results"]


def test_a_recipe_runs_its_own_rows_only(monkeypatch):
    assert parse("sft", []).run_checks and parse("sft", ["--recipe", "tiny"]).run_checks
    assert parse("sft", ["--recipe", "tiny", "--model", "x"]).run_checks
    assert not parse("sft", ["--model", "x"]).run_checks
    for flags in (["--data", "x"], ["--eval-data", "x"], ["--eval-fraction", "0.1"]):
        assert not parse("sft", flags).run_checks and not parse("sft", ["--recipe", "tiny", *flags]).run_checks
        assert parse("sft", [*flags, "--run-checks"]).run_checks
    monkeypatch.setattr(sandbox, "IS_AVAILABLE", False)
    assert not parse("sft", []).run_checks


def test_resume_keeps_which_answers_passed(tmp_path, checked, monkeypatch):
    answers = {"before": [ADD, "", "", ""], "after": [ADD, "x", "", ""]}
    answer_with(monkeypatch, answers)
    run("sft", *checked, "--run-checks")
    samples, kept = ((tmp_path / "run" / name).read_bytes() for name in ("samples.jsonl", "before.json"))
    answers["before"] = ["changed"] * 4
    run("sft", *checked, "--run-checks", "--resume")
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == samples
    assert (tmp_path / "run" / "before.json").read_bytes() == kept
    run("sft", *checked, "--resume")  # without the flag: another exam, so it is asked again
    assert "pass_rate" not in json.loads((tmp_path / "run" / "run.json").read_text())["results"]


@pytest.mark.parametrize("began", [{"command": "as it began", "date": "2001-02-03"}, {"command": 7}])
def test_resume_keeps_the_command_and_the_date(began, tmp_path, checked):
    run("sft", *checked)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    write_json(path, {key: value for key, value in record.items() if key not in ("command", "date")} | began)
    run("sft", *checked, "--resume")
    kept = {key: value for key, value in began.items() if isinstance(value, str)}
    resumed = json.loads(path.read_text())
    assert [(record | kept)[key] for key in ("command", "date")] == [resumed[key] for key in ("command", "date")]
    assert "--resume" not in resumed["command"]


def test_checks_that_cannot_be_run_are_refused_before_training(tmp_path, checked, monkeypatch):
    write_lines(tmp_path / "checked.jsonl", [*CHECKED, {"instruction": "A", "output": "a", "checks": [{}]}])
    message = refused("sft", *checked, "--run-checks")
    assert message.startswith(f"{tmp_path / 'checked.jsonl'}: line 5: check 1: expected an object with 'expression'")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(sandbox, "IS_AVAILABLE", False)
    assert refused("sft", *checked, "--run-checks").startswith("--run-checks: this system has no fork")
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------- Ctrl-C and SIGTERM


def signalled(process: subprocess.Popen, number: int, ready: Callable[[], bool]) -> str:
    """Send a signal when `ready`, wait for the end, and return what the process printed to stderr."""
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    return process.communicate(timeout=120)[1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_and_prints_the_command_that_resumes(whole, data, tmp_path, number, status):
    name = "all weights"
    out = tmp_path / "a run"
    start = command("sft", *TINY, *data, *VARIANTS[name], "--out", out)  # saves only at the end
    process = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    printed = signalled(process, number, lambda: metrics.exists() and '"step": 1' in metrics.read_text())
    assert process.returncode == status and "Traceback" not in printed
    assert "a second signal ends the run at once" in printed
    line, _, hint = printed.splitlines()[-1].partition("; all steps are saved, continue with: ")
    assert line == {130: "interrupted", 143: "terminated"}[status]
    assert 0 < json.loads((out / "checkpoints" / "steps.json").read_text())["last"] < STEPS
    done = subprocess.run(["sh", "-c", hint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(out, whole[name][0])


def test_a_signal_after_training_says_how_to_continue_too(data, tmp_path, monkeypatch):
    def answer(model, tokenizer, questions, when):
        if when == "after training":
            os.kill(os.getpid(), signal.SIGINT)
        return [""] * len(questions)

    monkeypatch.setattr(exam, "complete_greedily", answer)
    with pytest.raises(KeyboardInterrupt) as caught:
        run("sft", *TINY, *data, "--out", tmp_path / "run")
    number, message = caught.value.args
    assert number == signal.SIGINT and message.startswith("interrupted; all steps are saved, continue with: ")


SLOW = """
import sys, time
import train_sft
from minift.commands.cli import run_command
from minift.trainer import accumulate_gradient
from minift import trainer
def slow(task, seed, step):
    open({flag!r}, "w").close()
    time.sleep({seconds})
    return accumulate_gradient(task, seed, step)
trainer.accumulate_gradient = slow
sys.argv = {argv!r}
run_command(train_sft.main)
"""


def test_a_second_signal_ends_the_run_at_once(data, tmp_path):
    flag = tmp_path / "stepping"
    argv = [*map(str, ["train_sft.py", *TINY, *data, "--bleu-samples", 0, "--out", tmp_path / "run"])]
    code = SLOW.format(flag=str(flag), seconds=60, argv=argv)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not flag.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    sent = time.monotonic()
    printed = signalled(process, signal.SIGINT, lambda: True)
    assert time.monotonic() - sent < 10 and process.returncode == 130
    assert printed.endswith("\ninterrupted\n") and "Traceback" not in printed
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("script", ["sft", "rm"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_imports_is_one_line(script, number, status):
    process = subprocess.Popen(command(script, "--help"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    printed = signalled(process, number, lambda: "libtorch" in maps.read_text())
    assert (printed, process.returncode) == ({130: "interrupted\n", 143: "terminated\n"}[status], status)


def test_a_run_from_another_folder_without_an_installed_package(tmp_path, monkeypatch, capsys):
    """The shipped model and rows are found; the run may be in the current folder, but not twice."""
    flags = [*TINY, "--max-steps", 1, "--bleu-samples", 0, "--warmup-steps", 5, "--out", "."]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, flags)])
    monkeypatch.setattr(metadata, "distributions", lambda **_: [])
    train_sft.main()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["values"]["model"] == str(SHIPPED) and record["versions"]["minift"] is None
    assert "--warmup-steps 5: the run ends before its learning rate reaches --lr 0.001" in capsys.readouterr().out
    before = snapshot(tmp_path)
    for out in (".", tmp_path, f"../new/../{tmp_path.name}"):
        monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(out)])
        with pytest.raises(UserError, match="can't be renamed"):
            train_sft.main()
        assert snapshot(tmp_path) == before


def test_answers_too_short_for_bleu_are_marked(capsys):
    samples = [{"kind": "a", "after": "yes"}, {"kind": "b", "after": "one two three four"}]
    terminal.print_table({"bleu": {"after": {"all": 0.0, "a": 0.0, "b": 0.0}}}, samples)
    cells = [line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()]
    assert cells == ["after", "0.0", "0.0 (too few words)", "0.0"]


# -------------------------------------------------------------------------------------------------- kinds of training


def test_a_long_question_does_not_shorten_the_other_answers(tmp_path):
    """The exam's limit of new tokens was the room that the longest of all prompts leaves."""
    rows = read_lines(ROOT / "data" / "heldout.jsonl")[:3]
    long = {"instruction": "Add the numbers. " + "1 " * 470, "output": "3"}
    flags = [*TINY, "--data", ROOT / "data" / "instructions.jsonl", "--max-steps", 1, "--max-length", 512]
    for name, held_out in (("short", rows), ("long", [*rows, long])):
        run("sft", *flags, "--eval-data", write_lines(tmp_path / f"{name}.jsonl", held_out), "--out", tmp_path / name)
    short, longer = (read_lines(tmp_path / name / "samples.jsonl") for name in ("short", "long"))
    assert longer[-1]["reference"] == "3" and longer[:-1] == short


def test_epochs_replace_the_recipes_steps(tmp_path):
    rows = [{"prompt": f"{n}", "completion": "x", "kind": kind} for n, kind in enumerate(["a", "all", 3, ["b"], "b"])]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    flags = ["--recipe", "tiny", "--data", data, "--eval-data", data, "--epochs", 2, "--batch-size", 2]
    run("sft", *flags, "--out", tmp_path / "run")
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6
    results = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    # A `kind` that is not a string, or spells the name of the total, is not a category.
    assert results["bleu"]["after"].keys() == {"all", "a", "b"}


def test_text_that_is_supervised_whole_has_no_questions(tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", [{"text": f"hello {n}\x1b[2J"} for n in range(8)])
    flags = ["--data", data, "--supervise", "all", "--max-steps", 1, "--batch-size", 2, "--eval-fraction", 0.25]
    printed = run("sft", *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "samples.jsonl").exists() and "BLEU " not in printed
    assert "\x1b[2J" not in printed and "\\x1b[2J" in printed


def test_text_rows_and_their_response_template(tmp_path):
    rows = [{"text": f"Question: {n} + {n}?\nAnswer: {2 * n}</s>"} for n in range(12)]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    flags = ["--data", data, "--response-template", "Answer:", "--max-steps", 2, "--batch-size", 2]
    flags += ["--eval-fraction", 0.25, "--bleu-samples", 2, "--out", tmp_path / "run"]
    assert "9 of 9 rows kept" in run("sft", *flags)
    sample = read_lines(tmp_path / "run" / "samples.jsonl")[0]
    assert sample["prompt"].endswith("Answer:") and sample["reference"].strip().isdigit()


def test_lora_trains_a_merged_model_that_transformers_loads(whole):
    out, printed = whole["LoRA"]
    assert "LoRA: 16,384 parameters" in printed  # 4 layers x 2 linears x rank 4 x (256 in + 256 out)
    before, after = (load_file(folder / "model.safetensors") for folder in (SHIPPED, out))
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight"))}
    OPTForCausalLM.from_pretrained(out)


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_nothing_on_disk_changes_before_the_rows_are_encoded(tmp_path, data):
    """A run that fails in encoding neither makes a folder nor moves the earlier run out of its own."""
    rows = write_lines(tmp_path / "rows.jsonl", [{"text": "no response in here"}])
    failing = ["--data", rows, "--eval-fraction", 0, "--response-template", "### R:"]
    before = snapshot(tmp_path)
    assert "none of its 1 rows" in refused("sft", *failing, "--out", tmp_path / "deep" / "run")
    assert snapshot(tmp_path) == before
    run("sft", *SMALL, *data, "--max-steps", 1, "--bleu-samples", 0, "--out", tmp_path / "run")
    before = snapshot(tmp_path)
    for flags, message in (([], "none of its 1 rows"), (["--resume"], "--response-template was None")):
        assert message in refused("sft", *failing, *flags, "--out", tmp_path / "run")
        assert snapshot(tmp_path) == before


def test_bad_input_ends_in_one_line_and_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    missing = tmp_path / "missing.jsonl"
    empty, malformed, wrong = (tmp_path / name for name in ("empty.jsonl", "malformed.jsonl", "wrong.jsonl"))
    empty.write_text("")
    malformed.write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    write_lines(wrong, [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": 3}])
    masked = write_lines(tmp_path / "masked.jsonl", [{"text": "no answer here"}])
    cut_off = write_lines(tmp_path / "cut_off.jsonl", [{"instruction": "word " * 100, "output": "b"}])
    folder = tmp_path / "no-model"
    folder.mkdir()
    small_vocabulary, truncated = (tmp_path / name for name in ("small", "truncated"))
    for copy in (small_vocabulary, truncated):
        shutil.copytree(SHIPPED, copy)
    config = json.loads((SHIPPED / "config.json").read_text())
    (small_vocabulary / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    tensors = load_file(SHIPPED / "model.safetensors")
    name = "model.decoder.embed_tokens.weight"
    save_file(tensors | {name: tensors[name][:1000].clone()}, small_vocabulary / "model.safetensors")
    os.truncate(truncated / "model.safetensors", 5000)
    before = snapshot(tmp_path)

    def message(*flags: object) -> str:
        return refused("sft", "--out", out, *flags)

    assert str(missing) in message("--data", missing)
    assert str(folder) in message("--model", folder)
    assert f"{malformed}:2" in message("--data", malformed)
    assert f"{wrong}:2" in (text := message("--data", wrong)) and "output" in text
    assert str(empty) in message("--data", empty)
    text = message("--data", masked, "--eval-fraction", 0, "--response-template", "### R:")
    assert f"{masked}: none of its 1 rows" in text and "(line 1)" in text
    text = message("--data", cut_off, "--eval-fraction", 0, "--max-length", 20)
    assert "no supervised token within the first 20 tokens" in text
    assert f"--out {masked}" in refused("sft", "--out", masked)
    assert f"--out {masked}/x" in refused("sft", "--out", f"{masked}/x")
    assert "--device cuda:99" in message("--device", "cuda:99")
    assert "--max-length 5000" in message("--max-length", 5000)
    assert "--batch-size" in message("--batch-size", 0)
    assert "--learning-rate" in message("--learning-rate", 1)
    assert "1000" in message("--model", small_vocabulary)
    assert "truncated" in message("--model", truncated)
    assert "--lora-targets" in message("--lora-rank", 2, "--lora-targets", "c_attn")
    assert snapshot(tmp_path) == before

    done = subprocess.run(command("sft", "--out", out, "--data", missing), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n"), "Traceback" in done.stderr) == (2, 1, False)
    assert done.stderr.startswith("error: ")
