"""The course's own model at its true shape, with random weights: what ten steps cost, and whose logits they are.

Skipped unless MINIFT_REAL_DATA names a folder with opt_configs.json, opt_tokenizer/ and code_alpaca_2k.json; it takes
some minutes and 4 GB. `python -m pytest -s tests/test_course.py` prints the numbers.
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
from minift.datasets import drop_rows_with_input, load_rows
from minift.encode import encode_rows
from minift.prompts import load_template
from minift.tokenizer import load_tokenizer
from minift.weights import load_model

ROOT = Path(__file__).resolve().parent.parent
STEPS = 10
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


def test_ten_steps_of_the_course(opt_350m, real_data, tmp_path_factory):
    rows = real_data / "code_alpaca_2k.json"
    tokenizer = load_tokenizer(opt_350m)
    some_rows = drop_rows_with_input(load_rows(rows))[:4]
    examples, _, _ = encode_rows(some_rows, tokenizer, load_template("course"), source=str(rows), max_length=1024)
    before, largest = logits_differ_by(opt_350m, examples)
    print(f"\nlogits differ from transformers' by {before:.1e}, the largest is {largest:.2f}")
    assert before < 1e-4

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, ROOT / "train_sft.py", "--recipe", "course", "--model", opt_350m, "--data", rows]
        command += ["--no-input-only", "--eval-fraction", 0, "--bleu-samples", 0, "--max-steps", STEPS, "--out", run]
        with open(Path(folder) / "printed", "w+") as printed:
            process = subprocess.Popen([str(word) for word in command], stdout=printed, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            printed.seek(0)
            text = printed.read()
        assert os.waitstatus_to_exitcode(status) == 0, text[-2000:]
        assert "LoRA: 1,572,864 parameters to train" in text
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
        after, _ = logits_differ_by(run, examples)
    seconds = [later["seconds"] - line["seconds"] for line, later in zip(lines, lines[1:], strict=False)]
    tokens = lines[-1]["tokens"] / STEPS
    print("losses", ", ".join(f"{line['loss']:.3f}" for line in lines))
    print(f"{statistics.median(seconds):.2f} s a step (median) of {tokens:.0f} tokens (mean), {os.cpu_count()} cores")
    print(f"peak memory of the whole run {usage.ru_maxrss / 2**20:.2f} GiB")
    print(f"trained and merged, logits differ by {after:.1e}")
    assert after < 1e-4
    assert 10 < lines[0]["loss"] < 12  # ln 50272 = 10.8: random weights know nothing
    assert usage.ru_maxrss < 6 * 2**20
