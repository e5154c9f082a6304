"""The course's model at its true shape, with random weights: what a few steps cost, and whose logits these are.

Skipped unless MINIFT_REAL_DATA names a folder with opt_configs.json, opt_tokenizer/, code_alpaca_2k.json and
davinci_pairs.jsonl (rows of synthetic-instruct-gptj-pairwise). It takes some minutes and 7 GB. `python -m pytest -s
tests/test_course.py` prints the numbers.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import transformers

from minift.encode import Example, encode_rows
from minift.files.datasets import PAIR_SCHEMAS, drop_rows_with_input, load_rows
from minift.files.tokenizer import load_tokenizer
from minift.files.weights import load_model, load_reward_model
from minift.pairs import encode_rankings
from minift.prompts import TEMPLATES
from minift.scoring import score_rows
from tests.reference import logits_of, reference_logits, reference_rewards
from tests.runs import ROOT, command, read_lines

STEPS, REWARD_STEPS = 10, 3
# In a new process, whose memory is not counted with that of training.
BUILD = """
import json, sys, torch, transformers
config = transformers.OPTConfig(**json.load(open(sys.argv[1]))["configs"]["facebook/opt-350m"])
torch.manual_seed(0)
transformers.OPTForCausalLM(config).half().save_pretrained(sys.argv[2])
"""


@pytest.fixture(scope="module")
def opt_350m(real_data: Path) -> Iterator[Path]:
    """Yield a folder of 0.7 GB with opt-350m's config and tokenizer and random fp16 weights; delete it afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", BUILD, real_data / "opt_configs.json", folder], check=True)
        for file in (real_data / "opt_tokenizer").iterdir():
            shutil.copy(file, folder)
        yield Path(folder)


@torch.no_grad()
def logits_differ_by(folder: Path, examples: Sequence[Example]) -> tuple[float, float]:
    """Return max|a − b| over all tokens, and the largest logit of the reference (transformers' OPT)."""
    found = logits_of(load_model(folder).eval(), examples)  # (N, V)
    reference = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = reference_logits(reference, [ids for ids, _ in examples])  # (N, V)
    return (found - expected).abs().max().item(), expected.abs().max().item()


@torch.no_grad()
def rewards_differ_by(folder: Path, rows: list[list[int]]) -> float:
    """Return max|a − b| over the rewards of rows of ids; the reference reads one row at a time."""
    found = torch.tensor(score_rows(load_reward_model(folder), rows, len(rows)))  # (R,)
    reference = transformers.OPTForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return (found - torch.cat([reference_rewards(reference, [row]) for row in rows])).abs().max().item()


def train(script: str, out: Path, *flags: object) -> tuple[list[dict], str]:
    """Return a run's lines of metrics and what it printed; print here what its steps cost."""
    words = command(script, "--recipe", "course", "--eval-fraction", 0, "--out", out, *flags)
    with (out.parent / "printed").open("w+") as printed:
        process = subprocess.Popen(words, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        printed.seek(0)
        text = printed.read()
    assert os.waitstatus_to_exitcode(status) == 0, text[-2000:]
    print("\n".join(line for line in text.splitlines() if "LoRA:" in line or "optimiser steps" in line))
    lines = read_lines(out / "metrics.jsonl")
    seconds = [later["seconds"] - line["seconds"] for line, later in zip(lines, lines[1:], strict=False)]
    print("losses", ", ".join(f"{line['loss']:.3f}" for line in lines))
    tokens = lines[-1]["tokens"] / len(lines)
    print(f"{statistics.median(seconds):.2f} s a step (median) of {tokens:.0f} tokens (mean), {os.cpu_count()} cores")
    print(f"peak memory of the whole run {usage.ru_maxrss / 2**20:.2f} GiB")
    assert usage.ru_maxrss < 8 * 2**20
    return lines, text


def test_ten_steps_of_the_course(opt_350m, real_data):
    data = real_data / "code_alpaca_2k.json"
    rows = drop_rows_with_input(load_rows(data))[:4]
    examples = encode_rows(rows, load_tokenizer(opt_350m), TEMPLATES["course"], max_length=1024).examples
    before, largest = logits_differ_by(opt_350m, examples)
    print(f"\nlogits differ from transformers' by {before:.1e}, the largest is {largest:.2f}")
    assert before < 1e-4

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = ["--no-input-only", "--bleu-samples", 0, "--max-steps", STEPS]
        lines, text = train("sft", out, "--model", opt_350m, "--data", data, *flags)
        after, _ = logits_differ_by(out, examples)
    print(f"trained and merged, logits differ by {after:.1e}")
    assert after < 1e-4
    assert "LoRA: 1,572,864 parameters to train" in text
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert 10 < lines[0]["loss"] < 12  # ln 50272 = 10.8: random weights know nothing


def test_steps_of_the_reward_models_course(opt_350m, real_data):
    data = real_data / "davinci_pairs.jsonl"
    rows = load_rows(data, PAIR_SCHEMAS)[:4]
    rankings = encode_rankings(rows, load_tokenizer(opt_350m), TEMPLATES["dialogue"], max_length=512).examples
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        lines, text = train("rm", out, "--model", opt_350m, "--data", data, "--max-steps", REWARD_STEPS)
        after = rewards_differ_by(out, [row for ranking in rankings for row in ranking.responses])
    print(f"trained and merged, rewards differ from transformers' by {after:.1e}")
    assert after < 1e-4
    assert "LoRA: 786,432 parameters to train, and the head" in text
    assert [line["step"] for line in lines] == [*range(1, REWARD_STEPS + 1)]
    assert 0.3 < lines[0]["loss"] < 1.5  # ln 2 = 0.693: a fresh head has hardly any preference
