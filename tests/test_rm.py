"""`train_rm.py` as users run it, on the model and pairs that ship; and how rows become rankings of ids."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer, OPTForCausalLM, OPTForSequenceClassification

from minift.config import Config
from minift.errors import UserError
from minift.files.datasets import PAIR_SCHEMAS, load_rows
from minift.files.pretrained import load_judge
from minift.files.templates import load_template
from minift.files.weights import load_reward_model
from minift.pairs import Ranking, encode_rankings, encode_response
from minift.prompts import TEMPLATES
from minift.remarks import Encoded
from minift.run.exam import ranking_sample
from minift.run.setup import swap_half
from minift.trainer import train
from tests.loop import MemoryRecorder
from tests.reference import reference_rewards
from tests.runs import (
    ROOT,
    SHIPPED,
    STEPS,
    TINY,
    assert_same_run,
    execute,
    few_rows,
    kill_and_resume,
    read_lines,
    refused,
    run,
    snapshot,
    task_of,
    write_lines,
)

SMALL = [*TINY, "--center-rewards", 0, "--lm-weight", 0]
PAIR = {"prompt": "Add two numbers.", "chosen": "def add(a, b):\n    return a + b", "rejected": "    return a"}
REWARDS = {"accuracy", "margin", "reward_chosen", "reward_rejected"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list:
    """Return flags that name a few of the shipped pairs."""
    return few_rows("rm", tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> tuple[Path, str]:
    """Return the folder of a short run, and what it printed."""
    out = tmp_path_factory.mktemp("rm") / "run"
    return out, execute("rm", *SMALL, *data, "--out", out)


@pytest.fixture
def given(tmp_path):
    """Return what the script would train with some flags, on rows if there are any, each time in a new folder."""

    def task(*flags: object, rows: list | None = None):
        number = len([*tmp_path.iterdir()])
        if rows:
            data = write_lines(tmp_path / f"{number}.jsonl", rows)
            flags = ("--recipe", "tiny", "--data", data, "--eval-fraction", 0, *flags)
        return task_of("rm", tmp_path / f"run-{number}", *flags)

    return task


# -------------------------------------------------------------------------------------------------------------- a run


def test_a_run_leaves_what_the_design_says(finished):
    out, printed = finished
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"}
    assert names >= {"template.json", "run.json", "metrics.jsonl", "samples.jsonl", "report.html", "checkpoints"}
    lines = read_lines(out / "metrics.jsonl")
    assert [(line["step"], line["split"]) for line in lines] == [
        (0, "eval"),
        *((n, "train") for n in (1, 2, 3, 4)),
        (4, "eval"),
    ]
    evaluated = {"step", "split", "loss", "tokens", "pairs", "seconds"} | REWARDS
    assert all(line.keys() == evaluated | {"lr", "grad_norm"} for line in lines if line["split"] == "train")
    assert all(line.keys() == evaluated for line in lines if line["split"] == "eval")
    assert lines[-1]["pairs"] == 16

    record = json.loads((out / "run.json").read_text())
    assert record.keys() == {"task", "values", "template", "versions", "fingerprints", "commits", "command", "machine",
                             "date", "results"}  # fmt: skip
    assert record["task"] == "rm" and record["values"].items() >= {"recipe": "tiny", "seed": 42, "lr": 1.2e-3}.items()
    assert all(len(record["fingerprints"][name]) == 64 for name in ("weights", "data", "eval_data"))
    results = record["results"]
    assert results.keys() == {"eval_loss", "accuracy", "interval", "pairs", "ties", "mean_probability",
                              "calibration_error", "brier"}  # fmt: skip
    assert results["eval_loss"] == {"before": lines[0]["loss"], "after": lines[-1]["loss"]}
    samples = read_lines(out / "samples.jsonl")
    categories = {"all", *(sample["kind"] for sample in samples)}
    assert all(results["accuracy"][when].keys() == categories for when in ("before", "after")) and len(categories) == 7
    fields = {"kind", "prompt", "chosen", "rejected", "rewards_before", "rewards_after"}
    assert len(samples) == 18 and all(sample.keys() == fields for sample in samples)
    answers = out.parent / "best-of.jsonl"
    flags = f"--model runs/sft --judge {out} --prompts data/heldout.jsonl --run-checks --out {answers}"
    assert printed.rstrip().endswith(f"-m minift best-of {flags}")
    for expected in ("saved", "── chosen", "── rejected", "accuracy, 18 pairs", "eval loss", "Brier"):
        assert expected in printed
    assert f"\n{STEPS} optimiser steps of about {lines[-1]['tokens'] / STEPS:,.0f} tokens\n" in printed
    template = load_template(str(out / "template.json"))
    assert template.without_input == TEMPLATES["dialogue"].without_input


def test_row_json_has_the_rewards_of_the_first_held_out_pair(finished):
    out, _ = finished
    sample = read_lines(out / "samples.jsonl")[0]
    rows = json.loads((out / "row.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["chosen", "rejected"]
    assert [row["values"][-1] for row in rows] == pytest.approx(sample["rewards_after"], abs=1e-5)
    assert all(value is None for row in rows for value in row["values"][:-1])
    texts = [f"⟨</s>⟩\n\nHuman: {sample['prompt']}\n\nAssistant: {sample[row['name']]}⟨</s>⟩" for row in rows]
    assert ["".join(row["tokens"]) for row in rows] == texts
    page = (out / "report.html").read_text()
    assert "One pair as the loss sees it" in page and page.count('class="token"') == 2


def test_metrics_are_those_of_the_scored_pairs(finished):
    out, _ = finished
    metrics, samples = read_lines(out / "metrics.jsonl"), read_lines(out / "samples.jsonl")
    results = json.loads((out / "run.json").read_text())["results"]
    for line, when in ((metrics[0], "before"), (metrics[-1], "after")):
        chosen, rejected = torch.tensor([sample[f"rewards_{when}"] for sample in samples]).double().unbind(1)
        assert line["loss"] == pytest.approx(-F.logsigmoid(chosen - rejected).mean().item(), abs=1e-5)
        assert line["accuracy"] == results["accuracy"][when]["all"] == (chosen > rejected).double().mean().item()
        assert line["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
        assert line["reward_chosen"] == pytest.approx(chosen.mean().item(), abs=1e-5)
        assert line["reward_rejected"] == pytest.approx(rejected.mean().item(), abs=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_transformers_loads_the_run_and_gives_the_same_scores(finished):
    out, _ = finished
    reference, info = OPTForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference_tokenizer = AutoTokenizer.from_pretrained(out)
    judge = load_judge(out)
    for sample in read_lines(out / "samples.jsonl"):
        for response, reward in zip((sample["chosen"], sample["rejected"]), sample["rewards_after"], strict=True):
            text = f"\n\nHuman: {sample['prompt']}\n\nAssistant: {response}</s>"
            with torch.no_grad():
                expected = reference_rewards(reference.eval(), [reference_tokenizer(text)["input_ids"]]).item()
            assert reward == pytest.approx(expected, abs=1e-4)
            assert judge.score(sample["prompt"], response) == pytest.approx(expected, abs=1e-4)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(finished, data, tmp_path):
    kill_and_resume("rm", tmp_path / "run", *SMALL, *data)
    assert_same_run(tmp_path / "run", finished[0])


def test_lora_trains_its_linears_and_the_head(data, tmp_path):
    out = tmp_path / "run"
    printed = run("rm", *SMALL, *data, "--out", out, "--lora-rank", 4, "--lm-weight", 0.1)
    assert "LoRA: 16,384 parameters to train, and the head" in printed
    before, after = load_file(SHIPPED / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight"))}
    fresh = load_reward_model(SHIPPED, seed=42).score.weight  # the default seed
    lines = read_lines(out / "metrics.jsonl")
    assert all("lm_loss" in line for line in lines)
    results = json.loads((out / "run.json").read_text())["results"]
    for name in ("loss", "lm_loss"):
        assert results[f"eval_{name}"] == {"before": lines[0][name], "after": lines[-1][name]}
    rates = [line["lr"] for line in lines if line["split"] == "train"]
    assert 1e-4 < (after["score.weight"] - fresh).abs().max() <= 1.01 * sum(rates)  # AdamW's steps are that long


def test_frozen_weights_may_be_in_half_precision_and_trained_ones_are_not(data, tmp_path):
    losses = {}
    for dtype in ("float32", "float16", "bfloat16"):
        out = tmp_path / dtype
        flags = [*data[:2], "--eval-fraction", 0, "--lora-rank", 4, "--base-dtype", dtype, "--lr", 1e-2]
        run("rm", *SMALL, *flags, "--lm-weight", 0.1, "--out", out)
        losses[dtype] = [line["loss"] for line in read_lines(out / "metrics.jsonl")]
        stored, adapters = load_file(out / "model.safetensors"), load_file(out / "adapter/adapter_model.safetensors")
        assert stored["model.decoder.layers.0.self_attn.q_proj.weight"].dtype == getattr(torch, dtype)
        assert {tensor.dtype for tensor in [*adapters.values(), stored["score.weight"]]} == {torch.float32}
    for dtype, tolerance in (("float16", 2e-3), ("bfloat16", 2e-2)):
        assert losses[dtype] == pytest.approx(losses["float32"], rel=tolerance) and losses[dtype] != losses["float32"]


def test_whole_dialogues_share_their_beginning(tmp_path):
    dialogue = "\n\nHuman: Add two numbers.\n\nAssistant:"
    rows = [{"chosen": f"{dialogue} {n} + {n}", "rejected": f"{dialogue} No."} for n in range(8)]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    flags = ["--data", data, "--eval-fraction", 0.25, "--max-steps", 1, "--device", "cpu"]
    printed = run("rm", *flags, "--out", tmp_path / "run")
    assert "6 of 6 pairs kept" in printed
    assert "Assistant:\n\n── chosen" in printed  # where the shared part ends
    fields = {"chosen", "rejected", "rewards_before", "rewards_after"}
    assert read_lines(tmp_path / "run" / "samples.jsonl")[0].keys() == fields


def test_training_on_every_row_leaves_nothing_to_examine(tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", [PAIR])
    flags = ["--data", data, "--eval-fraction", 0, "--max-steps", 1, "--device", "cpu"]
    assert "files in" in run("rm", *flags, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["results"] == {}


# ------------------------------------------------------------------------------------- the model and loss of the loop


def test_a_run_starts_from_a_tuned_model_or_continues_from_a_reward_model(given, finished, data, tmp_path):
    out, _ = finished
    judge = load_judge(out)
    assert torch.equal(given(*data, "--model", out).model.score.weight, judge.model.score.weight)
    tuned = OPTForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    tuned.model.decoder.layers[0].fc1.weight.data += 1
    tuned.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path / "tuned")
    ours = given(*data, "--model", tmp_path / "tuned").model
    assert torch.equal(ours.decoder.layers[0].fc1.weight, tuned.model.decoder.layers[0].fc1.weight)


def test_a_default_length_is_limited_to_the_models_positions(given, tmp_path, data):
    short = OPTForCausalLM.from_pretrained(SHIPPED)
    positions = short.model.decoder.embed_positions
    positions.weight.data = positions.weight.data[:202]  # 200 and OPT's offset
    short.config.max_position_embeddings = 200
    short.save_pretrained(tmp_path / "short")
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path / "short")
    task = given(*data, "--model", tmp_path / "short", "--batch-size", 40)
    (batch,) = task.train_batches.micro_batches(0)
    assert batch.rows.shape[1] <= 200
    message = refused("rm", *data, "--model", tmp_path / "short", "--max-length", 201, "--out", tmp_path / "out")
    assert message.startswith("--max-length 201: more than the model's 200 positions")


def test_margins_and_centring_reach_the_loss(given):
    rows = [PAIR | {"gap": 0.5}, PAIR | {"chosen": "    return b", "gap": -2}]
    flags = ["--order", "sequential", "--margin-field", "gap", "--center-rewards", 0.25, "--lm-weight", 0]
    task = given(*flags, rows=rows)
    (batch,) = task.train_batches.micro_batches(0)
    rewards = task.model.eval()(batch.input_ids, batch.positions, batch.rows).double()
    chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]
    bradley_terry = -F.logsigmoid(chosen - rejected - torch.tensor([0.5, -2.0]))
    expected = (bradley_terry + 0.25 * (chosen + rejected) ** 2).sum()
    minimised, count, metrics = task.loss(batch)
    assert count == 2 and minimised.item() == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["loss"].item() == pytest.approx(bradley_terry.sum().item(), abs=1e-5)


def test_what_is_minimised_has_the_language_models_loss_and_what_is_logged_has_not(given):
    rows, flags = [PAIR, PAIR | {"chosen": "    return b"}], ["--dropout", 0, "--dtype", "float64"]
    plain, with_it = (given(*flags, "--lm-weight", weight, rows=rows) for weight in (0, 0.3))
    with_it.model.load_state_dict(plain.model.state_dict())
    reference = OPTForCausalLM.from_pretrained(SHIPPED, dtype=torch.float64).eval()
    (batch,) = plain.train_batches.micro_batches(0)
    expected, num_tokens = 0.0, 0
    for chosen in batch.chosen.tolist():
        ids = batch.input_ids[batch.rows[chosen][batch.rows[chosen] >= 0]]
        expected += F.cross_entropy(reference(ids[None]).logits[0, :-1], ids[1:], reduction="sum").item()
        num_tokens += len(ids) - 1
    rewards = plain.model(batch.input_ids, batch.positions, batch.rows)
    bradley_terry = -F.logsigmoid(rewards[batch.chosen] - rewards[batch.rejected]).sum().item()
    minimised, count, metrics = plain.loss(batch)
    assert count == 2 and metrics.keys() == {"loss"} | REWARDS
    with_lm, count, metrics = with_it.loss(batch)
    assert count == 2 and with_lm.item() - minimised.item() == pytest.approx(0.3 * expected, rel=1e-9)
    assert metrics["lm_loss"].item() == pytest.approx(expected, rel=1e-9) and metrics["lm_loss_count"] == num_tokens
    # The recipe centres rewards: the sum to minimise has that term too.
    assert minimised.item() > bradley_terry + 1e-9
    assert metrics["loss"].item() == pytest.approx(bradley_terry, abs=1e-9) and not metrics["loss"].requires_grad
    # The loop divides: the same in both splits, Bradley–Terry by pairs, the other by tokens.
    expected_means = {"loss": bradley_terry / 2, "lm_loss": expected / num_tokens}
    recorder = MemoryRecorder()
    train(with_it._replace(eval_batches=with_it.train_batches), Config(max_steps=1, lr=1e-14, device="cpu"), recorder)
    assert [line["split"] for line in recorder.lines] == ["eval", "train", "eval"]
    for line in recorder.lines:
        assert {name: line[name] for name in expected_means} == pytest.approx(expected_means, rel=1e-6)
        assert not any(name.endswith("count") for name in line)


def test_a_ranking_is_all_its_pairs_and_counts_once(given):
    responses = ["def add(a, b):\n    return a + b", "def add(a, b):", "    return a"]
    task = given("--center-rewards", 0, "--lm-weight", 0, rows=[{"prompt": "Add.", "responses": responses}])
    (batch,) = task.train_batches.micro_batches(0)
    rewards = task.model.eval()(batch.input_ids, batch.positions, batch.rows)
    pairs = [rewards[0] - rewards[1], rewards[0] - rewards[2], rewards[1] - rewards[2]]
    loss, count, metrics = task.loss(batch)
    assert (count, task.unit) == (1, "rankings")
    assert loss.item() == pytest.approx(sum(-F.logsigmoid(pair).item() for pair in pairs) / 3, abs=1e-5)
    assert metrics["accuracy"].item() == pytest.approx(sum(pair.item() > 0 for pair in pairs) / 3)
    assert metrics["margin"].item() == pytest.approx(sum(pair.item() for pair in pairs) / 3, abs=1e-5)


def test_pairs_of_one_prompt_and_chosen_response_count_once(given):
    other = {"prompt": "Subtract.", "chosen": "a - b", "rejected": "a"}
    rows = [PAIR, other, PAIR | {"rejected": "No."}, PAIR | {"chosen": "a + b"}, PAIR | {"rejected": "No."}]
    flags = ["--order", "sequential", "--batch-size", 8, "--dtype", "float64", "--center-rewards", 0, "--lm-weight", 0]
    plain, grouped = given(*flags, rows=rows), given(*flags, "--group-prompts", rows=rows)
    assert (plain.unit, grouped.unit) == ("pairs", "prompts")
    (batch,), (group,) = (task.train_batches.micro_batches(0) for task in (plain, grouped))
    assert len(batch.rows) == 10 and len(group.rows) == 7  # the same rejected answer twice is one
    assert group.weights.tolist() == [0.5, 0.5, 1, 1]
    rewards = plain.model.eval()(batch.input_ids, batch.positions, batch.rows)
    losses = -F.logsigmoid(rewards[batch.chosen] - rewards[batch.rejected])
    loss, count, _ = grouped.loss(group)
    assert count == 3
    assert loss.item() == pytest.approx(((losses[0] + losses[2]) / 2 + losses[1] + losses[3]).item(), rel=1e-6)


def test_shuffled_labels_are_right_half_of_the_time_and_held_out_ones_always(given, data):
    def pairs(batches) -> list[tuple]:
        found = []
        for batch in batches:
            texts = [tuple(batch.input_ids[row[row >= 0]].tolist()) for row in batch.rows]
            found += [(texts[i], texts[j]) for i, j in zip(batch.chosen, batch.rejected, strict=True)]
        return found

    flags = [*data, "--order", "sequential", "--batch-size", 40]
    plain, shuffled = given(*flags), given(*flags, "--shuffle-labels")
    expected, found = (pairs(task.train_batches.micro_batches(0)) for task in (plain, shuffled))
    swapped = [ours == theirs[::-1] for ours, theirs in zip(found, expected, strict=True)]
    assert all(ours in (theirs, theirs[::-1]) for ours, theirs in zip(found, expected, strict=True))
    assert 10 <= sum(swapped) <= 30
    assert pairs(shuffled.eval_batches) == pairs(plain.eval_batches)


@pytest.mark.parametrize("categories", [["a"] * 9 + ["b"] * 6 + ["c"] * 5, [f"id {n}" for n in range(20)], [None] * 20])
def test_half_of_all_pairs_are_swapped_in_every_category(categories):
    drawn = set()
    for seed in range(20):
        swapped = [ranking.responses == [[2], [1]] for ranking in swap_half([PLAIN] * 20, categories, seed)]
        drawn.add(tuple(swapped))
        assert sum(swapped) == 10
        for category in ("a", "b", "c"):
            members = [was for was, its in zip(swapped, categories, strict=True) if its == category]
            assert abs(sum(members) - len(members) / 2) <= 1
    assert len(drawn) > 10
    assert PLAIN.responses == [[1], [2]]


PLAIN = Ranking([[1], [2]])

# --------------------------------------------------------------------------------------------------------- rows to ids


def encode(rows: list, tokenizer, template: str = "dialogue", **options) -> Encoded[Ranking]:
    return encode_rankings(rows, tokenizer, TEMPLATES[template], **{"max_length": 64, "source": "rows.jsonl"} | options)


@pytest.mark.parametrize(
    "template, prompt",
    [
        ("dialogue", "\n\nHuman: Add two numbers.\n\nAssistant: "),
        ("course", "### Instruction:\nAdd two numbers.\n\n### Response:\n"),
        ("none", "Add two numbers."),
    ],
)
def test_both_sides_are_the_rendered_prompt_the_response_and_one_end_token(tokenizer, template, prompt):
    encoded = encode([PAIR, PAIR | {"chosen": PAIR["chosen"] + "</s>"}], tokenizer, template)
    first, second = encoded.examples
    assert encoded.indices == [0, 1] and first == second and first.margin == 0
    for ids, response in zip(first.responses, (PAIR["chosen"], PAIR["rejected"]), strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"</s>{prompt}{response}</s>"
        assert ids == [*tokenizer.encode(prompt + response), tokenizer.eos_token_id]
    assert first.responses[0] == encode_response(
        {"instruction": PAIR["prompt"]}, PAIR["chosen"], tokenizer, TEMPLATES[template]
    )


def test_dialogues_are_used_as_they_are(tokenizer):
    rows = [{"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "C"}]
    (ranking,) = encode(rows, tokenizer).examples
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in ranking.responses]
    assert texts == ["</s>\n\nHuman: A\n\nAssistant: B</s>", "</s>C</s>"]


def test_pairs_that_cannot_be_learned_from_are_dropped_and_named(tokenizer):
    rows = [
        PAIR,
        PAIR | {"rejected": PAIR["chosen"]},
        PAIR | {"rejected": "x y z " * 64},
        PAIR | {"prompt": "x y z " * 64},
        PAIR | {"rejected": ""},
        {"prompt": "A", "responses": ["B", "C", "B"]},
        {"prompt": "A", "responses": ["B", "C", "D"]},
    ]
    encoded = encode(rows, tokenizer)
    assert encoded.indices == [0, 4, 6] and encoded.rows == [rows[0], rows[4], rows[6]]
    assert [len(ranking.responses) for ranking in encoded.examples] == [2, 2, 3]
    first, *rest = encoded.summary.split("\n")
    tokens = sum(len(ids) for ranking in encoded.examples for ids in ranking.responses)
    assert first == f"rows.jsonl: 3 of 7 rankings kept, {tokens} tokens"
    assert [line.strip() for line in rest] == [
        "2 rankings dropped: its sides are equal (row 2, row 6)",
        "2 rankings dropped: a side is longer than 64 tokens (row 3, row 4)",
        "1 ranking with an empty response: its reward is that of the end token alone (row 5)",
    ]


@pytest.mark.parametrize("template", ["dialogue", "alpaca"])
def test_an_instruction_and_its_input_are_the_question(tokenizer, template):
    """Rows of instruction, input, chosen and rejected were learned without their question."""
    question = {"instruction": "Add.", "input": "1, 2"}
    before = TEMPLATES[template].with_input.replace("{instruction}", "Add.").replace("{input}", "1, 2")
    (row, plain), sides = [question, question | {"input": ""}], {"chosen": "3", "rejected": "2"}
    encoded = encode([row | sides, plain | sides, row | {"responses": ["3", "2"]}], tokenizer, template, max_length=256)
    first, second, third = encoded.examples
    assert first == third and first.responses[0] == [*tokenizer.encode(before.replace("{response}", "3")), 2]
    assert second == encode([{"prompt": "Add."} | sides], tokenizer, template, max_length=256).examples[0]
    assert encoded.remark_lines == []
    sample = ranking_sample(row | sides, [0, 0], [0, 0])
    assert sample["prompt"] == "Add.\n\n1, 2"


def test_what_a_reward_model_does_not_see_is_counted(tokenizer):
    sides = {"chosen": "B", "rejected": "C", "kind": "k"}
    rows = [
        PAIR | {"context": "x", "history": ["z"], "instruction": "y", "input": "", "score": 3},
        sides,
        {"responses": ["B", "C"]},
        sides | {"prompt": "Human: Hi\n\nAssistant:"},
        sides | {"prompt": "Hi. Human: Hi Assistant: A Human: B"},
        sides | {"prompt": "An Assistant: what is it? A Human: what?"},
    ]
    twice = "whose question is a prompt already (Human: … Assistant:): the template wraps it a second time"
    assert [line.strip() for line in encode(rows, tokenizer).remark_lines] == [
        "1 pair whose 'context' is not read (row 1)",
        "1 pair whose 'history' is not read (row 1)",
        "1 pair whose 'instruction' is not read (row 1)",
        "2 pairs whose sides share nothing but the BOS: no question is in them (row 2, row 3)",
        f"2 pairs {twice} (row 4, row 5)",
    ]
    assert "second time" not in str(encode(rows, tokenizer, "none").remark_lines)


def test_a_side_of_exactly_the_allowed_length_stays(tokenizer):
    length = max(len(ids) for ids in encode([PAIR], tokenizer).examples[0].responses)
    assert encode([PAIR], tokenizer, max_length=length).indices == [0]
    with pytest.raises(UserError, match="a side is longer"):
        encode([PAIR], tokenizer, max_length=length - 1)


def test_margins_are_numbers(tokenizer):
    rows = [PAIR | {"gap": gap} for gap in (2, -0.5, " 1e1")]  # a CSV file has only text
    rankings = encode(rows, tokenizer, margin_field="gap").examples
    assert [ranking.margin for ranking in rankings] == [2.0, -0.5, 10.0]
    for wrong in ("", "wide", "nan", "1e39", None, True, [1], math.inf, math.nan, 10**400, 1e39):
        with pytest.raises(UserError, match=r"^rows.jsonl: row 2: field 'gap'.*expected a number"):
            encode([PAIR | {"gap": 2}, PAIR | {"gap": wrong}], tokenizer, margin_field="gap")
    with pytest.raises(UserError, match="row 1: field 'gap'.*missing"):
        encode([PAIR], tokenizer, margin_field="gap")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "A", "chosen": "B"}, "field 'rejected' is missing"),
        ({"prompt": "A", "rejected": "B"}, "field 'chosen' is missing"),
        ({"rejected": "B"}, "field 'chosen' is missing"),
        ({"prompt": "A"}, "expected 'chosen' and 'rejected', or 'responses'"),
        ({"prompt": "A", "chosen": 1, "rejected": "B"}, "field 'chosen' is 1, expected a string"),
        ({"prompt": 1, "chosen": "A", "rejected": "B"}, "field 'prompt' is 1, expected a string"),
        ({"question": "A", "chosen": "B", "rejected": "C"}, "'question' is not read: rename it to 'prompt'"),
        ({"input": "A", "responses": ["B", "C"]}, "'input' is not read: rename it to 'prompt'"),
        ({"instruction": 1, "chosen": "B", "rejected": "C"}, "field 'instruction' is 1, expected a string"),
        ({"prompt": "A", "responses": ["B"]}, "expected a list of two or more strings, best first"),
        ({"prompt": "A", "responses": "BC"}, "expected a list of two or more strings, best first"),
        ({"prompt": "A", "responses": ["B", None]}, "field 'responses' is null, expected a string"),
    ],
)
def test_a_row_that_is_not_a_pair_is_named(tmp_path, row, message):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "A", "chosen": "B", "rejected": "C"}, row])
    with pytest.raises(UserError) as caught:
        load_rows(path, PAIR_SCHEMAS)
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_bad_input_ends_in_one_line_and_leaves_nothing(finished, tmp_path):
    data = tmp_path / "rows.jsonl"

    def refused_rows(rows: list, *flags: object) -> str:
        write_lines(data, rows)
        before = snapshot(tmp_path)
        message = refused("rm", "--out", tmp_path / "out", "--data", data, "--eval-fraction", 0, *flags)
        assert snapshot(tmp_path) == before
        return message

    assert "'rejected' is missing" in refused_rows([{"prompt": "A", "chosen": "B"}])
    assert "'question' is not read" in refused_rows([{"question": "A", "chosen": "B", "rejected": "C"}])
    assert "field 'kind' has a lone surrogate" in refused_rows([PAIR | {"kind": "\ud800"}])
    assert "sides are equal" in refused_rows([PAIR | {"rejected": PAIR["chosen"]}])
    assert "--margin-field" in refused_rows([PAIR | {"gap": "wide"}], "--margin-field", "gap")
    assert "a side is longer" in refused_rows([PAIR | {"prompt": "word " * 600}])
    assert "--max-length 5000" in refused_rows([PAIR], "--max-length", 5000)
    assert "--lora-targets" in refused_rows([PAIR], "--lora-rank", 2, "--lora-targets", "c_attn")
    assert "--lora-rank is 1000, expected 1 to 256" in refused_rows([PAIR], "--lora-rank", 1000)
    assert "only train_sft.py has it" in refused_rows([PAIR], "--bleu-samples", 3)

    pairs, prompts = ROOT / "data" / "heldout_pairs.jsonl", write_lines(tmp_path / "prompts.jsonl", [{"prompt": "A"}])
    for words, message in (
        (["score", "--model", SHIPPED, "--data", pairs], "this is a language model"),
        (["generate", "--model", finished[0], "--prompts", prompts], "this is a reward model"),
    ):
        command = [sys.executable, "-m", "minift", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
        assert done.stderr.startswith("error: ") and message in done.stderr
