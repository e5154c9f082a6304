"""`train_sft.py` as a user runs it, on the model and the data that ship."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, OPTForCausalLM

from minift.batching import collate
from minift.errors import UserError
from minift.tokenizer import load_tokenizer
from minift.weights import load_model

ROOT = Path(__file__).parent.parent
SMALL = ["--max-steps", "4", "--batch-size", "4", "--bleu-samples", "6", "--device", "cpu"]


def command(*flags: object) -> list[str]:
    return [sys.executable, str(ROOT / "train_sft.py"), *map(str, flags)]


def execute(*flags: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*flags), cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run the script in this process with flags that must be refused; give the message."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    import train_sft

    def refuse(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, flags)])
        with pytest.raises(UserError) as caught:
            train_sft.main()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A short run with the shipped model and data: its folder and what it printed."""
    out = tmp_path_factory.mktemp("sft") / "run"
    done = execute(*SMALL, "--out", out, "--save-every", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_a_run_leaves_what_the_design_says(finished):
    out, printed = finished
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"}
    assert names >= {"run.json", "metrics.jsonl", "samples.jsonl", "report.html", "checkpoints"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [
        (0, "eval"),
        *((step, "train") for step in (1, 2, 3, 4)),
        (4, "eval"),
    ]
    trained = {"step", "split", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "seconds"}
    assert all(line.keys() == trained for line in lines if line["split"] == "train")
    record = json.loads((out / "run.json").read_text())
    assert record["values"]["batch_size"] == 4 and record["values"]["recipe"] == "tiny"
    assert record["versions"]["torch"].startswith("2.13.0")
    assert all(len(record["fingerprints"][name]) == 64 for name in ("weights", "data", "eval_data"))
    assert record["results"]["eval_loss"]["before"] == lines[0]["loss"]
    assert record["results"]["bleu"]["before"].keys() == {"all", "new combination", "new family"}
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 and samples[0].keys() == {"kind", "prompt", "reference", "before", "after"}
    assert "⟦" in printed and "eval loss" in printed and "BLEU" in printed
    assert "On this CPU training will take about " in printed and "GB of memory: 4 steps of\n" in printed


def test_transformers_loads_the_run_as_it_is(finished):
    out, _ = finished
    reference, info = OPTForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = "### Instruction:\nWrite a function.\n\n### Response:\n"
    ids = AutoTokenizer.from_pretrained(out)(text)["input_ids"]
    assert ids == load_tokenizer(out).encode(text)
    model = load_model(out).eval()
    batch = collate([(ids, ids)])
    with torch.no_grad():
        ours = model.logits(model(batch.input_ids, batch.positions, batch.rows))
        theirs = reference.eval()(input_ids=torch.tensor([ids])).logits[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_shipped_files_are_what_they_are_said_to_be():
    shipped = ROOT / "data" / "model"
    config = json.loads((shipped / "config.json").read_text())
    assert config["do_layer_norm_before"] is False and config["word_embed_proj_dim"] != config["hidden_size"]
    tensors = load_file(shipped / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert 2e6 < sum(tensor.numel() for tensor in tensors.values()) < 10e6
    assert (shipped / "vocab.json").exists() and (shipped / "merges.txt").exists()
    assert sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file()) < 15e6


def test_a_run_killed_outright_and_resumed_is_the_run_that_was_not(finished, tmp_path):
    whole, _ = finished
    flags = [*SMALL, "--out", tmp_path / "run", "--save-every", 1]
    running = subprocess.Popen(command(*flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert (tmp_path / "run" / "checkpoints" / "last" / "progress.json").exists()
    resumed = execute(*flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_resume_refuses_other_values_and_other_folders(finished, refused, tmp_path):
    out, _ = finished
    assert "--lr was 0.001" in refused(*SMALL, "--out", out, "--resume", "--lr", "0.1")
    assert "run.json does not exist" in refused(*SMALL, "--out", tmp_path, "--resume")
    (tmp_path / "holiday.jpg").write_text("not ours")
    assert "not empty and no earlier run" in refused(*SMALL, "--out", tmp_path)
    assert (tmp_path / "holiday.jpg").exists()


def test_a_second_run_keeps_the_first(tmp_path):
    out = tmp_path / "run"
    flags = ["--max-steps", 1, "--bleu-samples", 0, "--batch-size", 2, "--eval-fraction", 0, "--out", out]
    for _ in range(2):
        done = execute(*flags)
        assert done.returncode == 0, done.stderr[-2000:]
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "run-1", out))
    assert first == second  # the same seed


def test_epochs_win_over_the_recipes_steps(tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n}", "completion": "x", "kind": kind} for n, kind in enumerate(["a", "all", 3, ["b"], "b"])]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", data, "--eval-data", data, "--epochs", 2, "--batch-size", 2, "--out", tmp_path / "run"]
    done = execute(*flags)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6
    # A `kind` that is no text, or spells the total's name, is none.
    assert json.loads((tmp_path / "run" / "run.json").read_text())["results"]["bleu"]["after"].keys() == {
        "all",
        "a",
        "b",
    }


def test_text_learned_whole_asks_no_questions(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"hello {n}\x1b[2J"}) + "\n" for n in range(8)))
    flags = ["--data", data, "--supervise", "all", "--max-steps", 1, "--batch-size", 2, "--out", tmp_path / "run"]
    done = execute(*flags, "--eval-fraction", 0.25)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "run" / "samples.jsonl").exists() and "BLEU " not in done.stdout
    assert "\x1b[2J" not in done.stdout and "\\x1b[2J" in done.stdout


def test_text_rows_and_their_response_template(tmp_path):
    rows = [{"text": f"Question: {n} + {n}?\nAnswer: {2 * n}</s>"} for n in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", data, "--response-template", "Answer:", "--max-steps", 2, "--batch-size", 2]
    done = execute(*flags, "--eval-fraction", 0.25, "--bleu-samples", 2, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "9 of 9 rows kept" in done.stdout
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].endswith("Answer:") and sample["reference"].strip().isdigit()


def test_lora_trains_a_merged_model_that_transformers_loads(tmp_path):
    flags = [*SMALL, "--out", tmp_path / "run", "--lora-rank", 4, "--lora-dropout", 0.1, "--bleu-samples", 0]
    done = execute(*flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "LoRA: 16,384 parameters" in done.stdout  # 4 layers x 2 linears x rank 4 x (256 in + 256 out)
    before, after = (
        load_file(ROOT / "data" / "model" / "model.safetensors"),
        load_file(tmp_path / "run/model.safetensors"),
    )
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight"))}
    OPTForCausalLM.from_pretrained(tmp_path / "run")


def test_bad_input_ends_in_one_line_and_leaves_nothing(refused, tmp_path):
    out = tmp_path / "out"
    missing = tmp_path / "missing.jsonl"
    empty, malformed, wrong = (tmp_path / name for name in ("empty.jsonl", "malformed.jsonl", "wrong.jsonl"))
    empty.write_text("")
    malformed.write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    wrong.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": 3}\n')
    masked = tmp_path / "masked.jsonl"
    masked.write_text(json.dumps({"text": "no answer here"}) + "\n")
    cut_off = tmp_path / "cut_off.jsonl"
    cut_off.write_text(json.dumps({"instruction": "word " * 100, "output": "b"}) + "\n")
    folder = tmp_path / "no-model"
    folder.mkdir()
    model = tmp_path / "model"
    shutil.copytree(ROOT / "data" / "model", model)
    small_vocabulary = tmp_path / "small"
    shutil.copytree(model, small_vocabulary)
    config = json.loads((model / "config.json").read_text())
    (small_vocabulary / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    tensors = load_file(small_vocabulary / "model.safetensors")
    name = "model.decoder.embed_tokens.weight"
    save_file(tensors | {name: tensors[name][:1000].clone()}, small_vocabulary / "model.safetensors")
    truncated = tmp_path / "truncated"
    shutil.copytree(model, truncated)
    os.truncate(truncated / "model.safetensors", 5000)

    assert str(missing) in refused("--out", out, "--data", missing)
    assert str(folder) in refused("--out", out, "--model", folder)
    assert f"{malformed}:2" in refused("--out", out, "--data", malformed)
    assert f"{wrong}:2" in (message := refused("--out", out, "--data", wrong)) and "output" in message
    assert str(empty) in refused("--out", out, "--data", empty)
    message = refused("--out", out, "--data", masked, "--eval-fraction", 0, "--response-template", "### R:")
    assert f"{masked}: none of its 1 rows" in message and "(line 1)" in message
    message = refused("--out", out, "--data", cut_off, "--eval-fraction", 0, "--max-length", 20)
    assert "no supervised token within the first 20 tokens" in message
    assert f"--out {masked}" in refused("--out", masked) and f"--out {masked}/x" in refused("--out", f"{masked}/x")
    assert "--device cuda:99" in refused("--out", out, "--device", "cuda:99")
    assert "--max-length 5000" in refused("--out", out, "--max-length", 5000)
    assert "--batch-size" in refused("--out", out, "--batch-size", 0)
    assert "--learning-rate" in refused("--out", out, "--learning-rate", 1)
    assert "1000" in refused("--out", out, "--model", small_vocabulary)
    assert "truncated" in refused("--out", out, "--model", truncated)
    assert "--lora-targets" in refused("--out", out, "--lora-rank", 2, "--lora-targets", "c_attn")
    assert not out.exists()

    done = execute("--out", out, "--data", missing)
    assert (done.returncode, done.stderr.count("\n"), "Traceback" in done.stderr) == (2, 1, False)
    assert done.stderr.startswith("error: ")
