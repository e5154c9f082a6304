"""The course's own model at its true shape, with random weights: what ten steps cost, and whose logits they are.

Skipped unless MINIFT_REAL_DATA names a folder with opt_configs.json, opt_tokenizer/, code_alpaca_2k.json and
davinci_pairs.jsonl (rows of synthetic-instruct-gptj-pairwise); it takes some minutes and 7 GB. `python -m pytest -s
tests/test_course.py` prints the numbers.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from minift.batching import collate
from minift.datasets import PAIR_KINDS, drop_rows_with_input, load_rows
from minift.encode import encode_rankings, encode_rows
from minift.prompts import load_template
from minift.scoring import score_rows
from minift.tokenizer import load_tokenizer
from minift.weights import load_model, load_reward_model

ROOT = Path(__file__).resolve().parent.parent
STEPS, REWARD_STEPS = 10, 3
# In a process of its own, whose memory is not counted with that of training.
BUILD = """
import json, sys, torch, transformers
config = transformers.OPTConfig(**json.load(open(sys.argv[1]))["configs"]["facebook/opt-350m"])
torch.manual_seed(0)
transformers.OPTForCausalLM(config).half().save_pretrained(sys.argv[2])
"""


@pytest.fixture(scope="module")
def opt_350m(real_data: Path) -> Iterator[Path]:
    """A folder of 0.7 GB that is gone afterwards: opt-350m's config, its tokenizer, and random weights in fp16."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", BUILD, real_data / "opt_configs.json", folder], check=True)
        for file in (real_data / "opt_tokenizer").iterdir():
            shutil.copy(file, folder)
        yield Path(folder)


def logits_differ_by(folder: Path, examples) -> tuple[float, float]:
    """max|a − b| over all real tokens, with the reference padded on the right, and the largest logit."""
    ours, batch = load_model(folder).eval(), collate(examples)
    with torch.no_grad():
        found = ours.logits(ours(batch.input_ids, batch.positions, batch.rows))  # (N, V)
        del ours
        reference = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        length = max(len(ids) for ids, _ in examples)
        padded = torch.tensor([ids + [1] * (length - len(ids)) for ids, _ in examples])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in examples])
        expected = reference(input_ids=padded, attention_mask=mask).logits[mask.bool()]  # (N, V)
    return (found - expected).abs().max().item(), expected.abs().max().item()


def reward_differs_by(folder: Path, rows: list[list[int]]) -> float:
    """max|a − b| over the scores of rows of ids; the reference reads one row at a time."""
    found = score_rows(load_reward_model(folder), rows, len(rows))
    reference = transformers.OPTForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [reference(input_ids=torch.tensor([row])).logits.item() for row in rows]
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def train(script: str, run: Path, *flags: object) -> tuple[list[dict], str]:
    """The run's metrics, a line for each step, and what it printed; what its steps cost is printed here."""
    command = [sys.executable, ROOT / script, "--recipe", "course", "--eval-fraction", 0, "--out", run, *flags]
    with open(run.parent / "printed", "w+") as printed:
        process = subprocess.Popen([str(word) for word in command], stdout=printed, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        printed.seek(0)
        text = printed.read()
    assert os.waitstatus_to_exitcode(status) == 0, text[-2000:]
    print("\n".join(line for line in text.splitlines() if line.startswith(("LoRA:", "On this CPU", "about"))))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [later["seconds"] - line["seconds"] for line, later in zip(lines, lines[1:], strict=False)]
    print("losses", ", ".join(f"{line['loss']:.3f}" for line in lines))
    tokens = lines[-1]["tokens"] / len(lines)
    print(f"{statistics.median(seconds):.2f} s a step (median) of {tokens:.0f} tokens (mean), {os.cpu_count()} cores")
    print(f"peak memory of the whole run {usage.ru_maxrss / 2**20:.2f} GiB")
    assert usage.ru_maxrss < 8 * 2**20
    return lines, text


def test_ten_steps_of_the_course(opt_350m, real_data):
    rows = real_data / "code_alpaca_2k.json"
    tokenizer = load_tokenizer(opt_350m)
    some_rows = drop_rows_with_input(load_rows(rows))[:4]
    examples, _, _ = encode_rows(some_rows, tokenizer, load_template("course"), source=str(rows), max_length=1024)
    before, largest = logits_differ_by(opt_350m, examples)
    print(f"\nlogits differ from transformers' by {before:.1e}, the largest is {largest:.2f}")
    assert before < 1e-4

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = ["--no-input-only", "--bleu-samples", 0, "--max-steps", STEPS]
        lines, text = train("train_sft.py", run, "--model", opt_350m, "--data", rows, *flags)
        after, _ = logits_differ_by(run, examples)
    print(f"trained and merged, logits differ by {after:.1e}")
    assert after < 1e-4
    assert "LoRA: 1,572,864 parameters to train" in text
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert 10 < lines[0]["loss"] < 12  # ln 50272 = 10.8: random weights know nothing


def test_steps_of_the_reward_models_course(opt_350m, real_data):
    pairs = real_data / "davinci_pairs.jsonl"
    tokenizer = load_tokenizer(opt_350m)
    options = {"max_length": 512, "positions": 2048, "source": str(pairs)}
    rankings, _, _ = encode_rankings(load_rows(pairs, PAIR_KINDS)[:4], tokenizer, load_template("dialogue"), **options)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        lines, text = train("train_rm.py", run, "--model", opt_350m, "--data", pairs, "--max-steps", REWARD_STEPS)
        after = reward_differs_by(run, [row for ranking in rankings for row in ranking.responses])
    print(f"trained and merged, rewards differ from transformers' by {after:.1e}")
    assert after < 1e-4
    assert "LoRA: 786,432 parameters to train, and the head" in text
    assert [line["step"] for line in lines] == [*range(1, REWARD_STEPS + 1)]
    assert 0.3 < lines[0]["loss"] < 1.5  # ln 2 = 0.693: a fresh head has hardly an opinion
