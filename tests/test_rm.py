"""`train_rm.py` as a user runs it, on the model and pairs that ship, and the road from rows to pairs of ids."""

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

from minift.datasets import PAIR_KINDS, load_rows
from minift.encode import Ranking, encode_rankings, encode_response
from minift.errors import UserError
from minift.prompts import load_template
from minift.scoring import load_judge

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "data" / "model"
SMALL = ["--max-steps", 4, "--batch-size", 4, "--center-rewards", 0, "--lm-weight", 0, "--device", "cpu"]
PAIR = {"prompt": "Add two numbers.", "chosen": "def add(a, b):\n    return a + b", "rejected": "    return a"}


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> list:
    """Flags that name a few of the shipped pairs, to learn from and held out, of every kind."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = {name: read_lines(ROOT / "data" / f"{name}.jsonl") for name in ("pairs", "heldout_pairs")}
    train = write_rows(folder / "pairs.jsonl", rows["pairs"][:40])
    kinds = {row["kind"] for row in rows["heldout_pairs"]}
    few = [row for kind in kinds for row in [row for row in rows["heldout_pairs"] if row["kind"] == kind][:3]]
    return ["--data", train, "--eval-data", write_rows(folder / "heldout_pairs.jsonl", few)]


@pytest.fixture
def run(monkeypatch):
    """Run the script in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    import train_rm

    def execute(*flags: object) -> None:
        monkeypatch.setattr(sys, "argv", ["train_rm.py", *map(str, flags)])
        train_rm.main()

    return execute


@pytest.fixture
def refused(run):
    """Run it with flags that must be refused; give the message."""

    def refuse(*flags: object) -> str:
        with pytest.raises(UserError) as caught:
            run(*flags)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


@pytest.fixture
def task_of(run, monkeypatch, tmp_path):
    """What the script would hand the loop with these flags."""
    import train_rm

    def prepare(*flags: object):
        handed = []

        class Handed(Exception):
            pass

        def train(task, config, folder):
            handed.append(task)
            raise Handed

        monkeypatch.setattr(train_rm, "train", train)
        with pytest.raises(Handed):
            run(*flags, "--out", tmp_path / f"never-trained-{len(list(tmp_path.iterdir()))}")
        return handed[0]

    return prepare


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> tuple[Path, str]:
    """A short run: its folder and what it printed."""
    out = tmp_path_factory.mktemp("rm") / "run"
    command = [sys.executable, ROOT / "train_rm.py", *SMALL, *data, "--out", out]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


# ---- a run ----


def test_a_run_leaves_what_the_design_says(finished):
    out, printed = finished
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"}
    assert names >= {"run.json", "metrics.jsonl", "samples.jsonl", "report.html", "checkpoints"}
    lines = read_lines(out / "metrics.jsonl")
    assert [(line["step"], line["split"]) for line in lines] == [
        (0, "eval"),
        *((n, "train") for n in (1, 2, 3, 4)),
        (4, "eval"),
    ]
    rewards = {"accuracy", "margin", "reward_chosen", "reward_rejected"}
    logged = {"step", "split", "loss", "tokens", "pairs", "seconds"} | rewards
    assert all(line.keys() == logged | {"lr", "grad_norm"} for line in lines if line["split"] == "train")
    assert all(line.keys() == logged for line in lines if line["split"] == "eval")
    assert lines[-1]["pairs"] == 16
    record = json.loads((out / "run.json").read_text())
    assert record["task"] == "rm" and all(len(record["fingerprints"][name]) == 64 for name in ("weights", "data"))
    results = record["results"]
    assert results["eval_loss"] == {"before": lines[0]["loss"], "after": lines[-1]["loss"]}
    kinds = {"all", "base model", "cut off", "other task", "rambling", "subtle bug"}
    assert all(results["accuracy"][when].keys() == kinds for when in ("before", "after"))
    for expected in ("saved", "── chosen", "── rejected", "accuracy, 15 pairs", "eval loss", "Brier"):
        assert expected in printed
    assert "On this CPU training will take about " in printed and "GB of memory: 4 steps of\n" in printed


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


def test_transformers_loads_the_run_and_scores_alike(finished):
    out, _ = finished
    reference, info = OPTForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference_tokenizer = AutoTokenizer.from_pretrained(out)
    judge = load_judge(out)
    for sample in read_lines(out / "samples.jsonl"):
        for response, reward in zip((sample["chosen"], sample["rejected"]), sample["rewards_after"], strict=True):
            text = f"\n\nHuman: {sample['prompt']}\n\nAssistant: {response}</s>"
            with torch.no_grad():
                expected = reference.eval()(**reference_tokenizer(text, return_tensors="pt")).logits.item()
            assert reward == pytest.approx(expected, abs=1e-4)
            assert judge.score(sample["prompt"], response) == pytest.approx(expected, abs=1e-4)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(run, finished, data, tmp_path, monkeypatch):
    whole, _ = finished
    from minift import checkpoint

    save = checkpoint.save

    def save_then_stop(folder, model, optimizer, progress, write_model, *, is_best):
        save(folder, model, optimizer, progress, write_model, is_best=is_best)
        if progress["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_then_stop)
    flags = [*SMALL, *data, "--out", tmp_path / "run", "--save-every", 1]
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    run(*flags, "--resume")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_lora_trains_its_linears_and_the_head(run, data, tmp_path):
    out = tmp_path / "run"
    run(*SMALL, *data, "--out", out, "--lora-rank", 4)
    before, after = load_file(SHIPPED / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight"))}
    run("--max-steps", 1, "--lr", 1e-12, *data, "--out", tmp_path / "untrained", "--seed", 42)
    fresh = load_file(tmp_path / "untrained" / "model.safetensors")["score.weight"]
    assert (after["score.weight"] - fresh).abs().max() > 1e-4


def test_what_adapters_freeze_may_be_in_half_precision_and_what_trains_is_not(run, data, tmp_path):
    losses = {}
    for dtype in ("float32", "float16", "bfloat16"):
        out = tmp_path / dtype
        run(*SMALL, *data, "--out", out, "--lora-rank", 4, "--base-dtype", dtype, "--lr", 1e-2, "--lm-weight", 0.1)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[dtype] = [line["loss"] for line in lines if line["split"] == "train"]
        stored, adapters = load_file(out / "model.safetensors"), load_file(out / "adapter/adapter_model.safetensors")
        assert stored["model.decoder.layers.0.self_attn.q_proj.weight"].dtype == getattr(torch, dtype)
        assert {tensor.dtype for tensor in [*adapters.values(), stored["score.weight"]]} == {torch.float32}
    for dtype, tolerance in (("float16", 2e-3), ("bfloat16", 2e-2)):
        assert losses[dtype] == pytest.approx(losses["float32"], rel=tolerance) and losses[dtype] != losses["float32"]


def test_a_run_starts_from_a_tuned_model_or_goes_on_from_a_reward_model(task_of, finished, data, tmp_path):
    out, _ = finished
    judge = load_judge(out)
    assert torch.equal(task_of(*data, "--model", out).model.score.weight, judge.model.score.weight)
    tuned = OPTForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    tuned.model.decoder.layers[0].fc1.weight.data += 1
    tuned.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path / "tuned")
    ours = task_of(*data, "--model", tmp_path / "tuned").model
    assert torch.equal(ours.decoder.layers[0].fc1.weight, tuned.model.decoder.layers[0].fc1.weight)


def test_a_length_nobody_asked_for_gives_way_to_the_model(task_of, refused, tmp_path, data):
    short = OPTForCausalLM.from_pretrained(SHIPPED)
    positions = short.model.decoder.embed_positions
    positions.weight.data = positions.weight.data[:202]  # 200 and OPT's offset
    short.config.max_position_embeddings = 200
    short.save_pretrained(tmp_path / "short")
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path / "short")
    (batch,) = list(task_of(*data, "--model", tmp_path / "short", "--batch-size", 40).micro_batches(0))
    assert batch.rows.shape[1] <= 200
    message = refused(*data, "--model", tmp_path / "short", "--max-length", 201, "--out", tmp_path / "out")
    assert message.startswith("--max-length 201: more than the model's 200 positions")


def test_margins_and_centring_reach_the_loss(task_of, tmp_path):
    rows = [PAIR | {"gap": 0.5}, PAIR | {"chosen": "    return b", "gap": -2}]
    flags = ["--data", write_rows(tmp_path / "rows.jsonl", rows), "--eval-fraction", 0, "--order", "sequential"]
    task = task_of(*flags, "--margin-field", "gap", "--center-rewards", 0.25)
    (batch,) = task.micro_batches(0)
    rewards = task.model.eval()(batch.input_ids, batch.positions, batch.rows).double()
    better, worse = rewards[batch.better], rewards[batch.worse]
    expected = (-F.logsigmoid(better - worse - torch.tensor([0.5, -2.0])) + 0.25 * (better + worse) ** 2).sum()
    loss, count, _ = task.loss(batch)
    assert count == 2 and loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_language_model_s_loss_is_added_in_training_alone(task_of, tmp_path):
    flags = ["--data", write_rows(tmp_path / "rows.jsonl", [PAIR, PAIR | {"chosen": "    return b"}]), "--dropout", 0]
    flags += ["--eval-fraction", 0, "--dtype", "float64"]
    plain, with_it = (task_of(*flags, "--lm-weight", weight) for weight in (0, 0.3))
    with_it.model.load_state_dict(plain.model.state_dict())
    reference = OPTForCausalLM.from_pretrained(SHIPPED, dtype=torch.float64).eval()
    (batch,) = plain.micro_batches(0)
    expected = 0.0
    for better in batch.better.tolist():
        ids = batch.input_ids[batch.rows[better][batch.rows[better] >= 0]]
        expected += F.cross_entropy(reference(ids[None]).logits[0, :-1], ids[1:], reduction="sum").item()
    found = {}
    for task, model in ((plain, "plain"), (with_it, "with it")):
        for mode in ("train", "eval"):
            getattr(task.model, mode)()
            loss, count, metrics = task.loss(batch)
            assert count == 2
            found[model, mode] = loss.item()
    assert found["plain", "train"] == found["plain", "eval"] == found["with it", "eval"]
    assert found["with it", "train"] - found["plain", "train"] == pytest.approx(0.3 * expected, rel=1e-9)
    assert metrics.keys() == {"accuracy", "margin", "reward_chosen", "reward_rejected"}
    with_it.model.train()
    loss, _, metrics = with_it.loss(batch)
    assert metrics["surprise"].item() == pytest.approx(expected, rel=1e-9)


def test_a_ranking_is_all_its_pairs_and_counts_once(task_of, tmp_path):
    responses = ["def add(a, b):\n    return a + b", "def add(a, b):", "    return a"]
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Add.", "responses": responses}])
    task = task_of("--data", data, "--eval-fraction", 0, "--center-rewards", 0)
    (batch,) = task.micro_batches(0)
    rewards = task.model.eval()(batch.input_ids, batch.positions, batch.rows)
    pairs = [rewards[0] - rewards[1], rewards[0] - rewards[2], rewards[1] - rewards[2]]
    loss, count, metrics = task.loss(batch)
    assert count == 1
    assert loss.item() == pytest.approx(sum(-F.logsigmoid(pair).item() for pair in pairs) / 3, abs=1e-5)
    assert metrics["accuracy"].item() == pytest.approx(sum(pair.item() > 0 for pair in pairs) / 3)
    assert metrics["margin"].item() == pytest.approx(sum(pair.item() for pair in pairs) / 3, abs=1e-5)


def test_pairs_of_one_prompt_and_chosen_response_count_once(task_of, tmp_path):
    other = {"prompt": "Subtract.", "chosen": "a - b", "rejected": "a"}
    rows = [PAIR, other, PAIR | {"rejected": "No."}, PAIR | {"chosen": "a + b"}, PAIR | {"rejected": "No."}]
    flags = ["--data", write_rows(tmp_path / "rows.jsonl", rows), "--eval-fraction", 0, "--order", "sequential"]
    flags += ["--batch-size", 8, "--dtype", "float64", "--center-rewards", 0, "--lm-weight", 0]
    plain, grouped = task_of(*flags), task_of(*flags, "--group-prompts")
    (batch,), (group,) = plain.micro_batches(0), grouped.micro_batches(0)
    assert len(batch.rows) == 10 and len(group.rows) == 7  # the same rejected answer twice is one
    assert group.weights.tolist() == [0.5, 0.5, 1, 1]
    rewards = plain.model.eval()(batch.input_ids, batch.positions, batch.rows)
    nats = -F.logsigmoid(rewards[batch.better] - rewards[batch.worse])
    loss, count, _ = grouped.loss(group)
    assert count == 3
    assert loss.item() == pytest.approx(((nats[0] + nats[2]) / 2 + nats[1] + nats[3]).item(), rel=1e-6)
    assert len(list(grouped.micro_batches(0))) == 1


def test_shuffled_labels_are_right_half_of_the_time_and_held_out_ones_always(task_of, data, tokenizer):
    def rows(batches) -> list[tuple]:
        found = []
        for batch in batches:
            texts = [tuple(batch.input_ids[row[row >= 0]].tolist()) for row in batch.rows]
            found += [(texts[i], texts[j]) for i, j in zip(batch.better, batch.worse, strict=True)]
        return found

    plain = task_of(*data, "--order", "sequential", "--batch-size", 40)
    shuffled = task_of(*data, "--order", "sequential", "--batch-size", 40, "--shuffle-labels")
    expected, found = rows(plain.micro_batches(0)), rows(shuffled.micro_batches(0))
    swapped = [ours == theirs[::-1] for ours, theirs in zip(found, expected, strict=True)]
    assert all(ours in (theirs, theirs[::-1]) for ours, theirs in zip(found, expected, strict=True))
    assert 10 <= sum(swapped) <= 30
    assert rows(shuffled.eval_batches()) == rows(plain.eval_batches())


@pytest.mark.parametrize("kinds", [["a"] * 9 + ["b"] * 6 + ["c"] * 5, [f"id {n}" for n in range(20)], [["list"]] * 20])
def test_half_of_all_pairs_are_turned_whatever_their_kinds(monkeypatch, kinds):
    monkeypatch.syspath_prepend(str(ROOT))
    from train_rm import turn_half_round

    drawn = set()
    for seed in range(20):
        rankings = [Ranking([[1], [2]], 0.0) for _ in kinds]
        turn_half_round(rankings, kinds, seed)
        turned = [ranking.responses == [[2], [1]] for ranking in rankings]
        drawn.add(tuple(turned))
        assert sum(turned) == 10
        for kind in ("a", "b", "c"):
            members = [was for was, its in zip(turned, kinds, strict=True) if its == kind]
            assert abs(sum(members) - len(members) / 2) <= 1
    assert len(drawn) > 10


def test_whole_dialogues_share_their_beginning(run, tmp_path, capsys):
    dialogue = "\n\nHuman: Add two numbers.\n\nAssistant:"
    rows = [{"chosen": f"{dialogue} {n} + {n}", "rejected": f"{dialogue} No."} for n in range(8)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run("--data", data, "--eval-fraction", 0.25, "--max-steps", 1, "--out", tmp_path / "run", "--device", "cpu")
    printed = capsys.readouterr().out
    assert "6 of 6 pairs kept" in printed
    assert "Assistant:\n\n── chosen" in printed  # where the common part ends
    assert read_lines(tmp_path / "run" / "samples.jsonl")[0].keys() == {
        "chosen", "rejected", "rewards_before", "rewards_after"
    }  # fmt: skip


def test_training_on_every_row_leaves_nothing_to_examine(run, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [PAIR])
    run("--data", data, "--eval-fraction", 0, "--max-steps", 1, "--out", tmp_path / "run", "--device", "cpu")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["results"] == {}
    assert "left in" in capsys.readouterr().out


# ---- rows to ids ----


def encode(rows: list, tokenizer, template: str = "dialogue", **options):
    values = {"max_length": 64, "positions": 64, "source": "rows.jsonl"} | options
    return encode_rankings(rows, tokenizer, load_template(template), **values)


@pytest.mark.parametrize(
    "template, prompt",
    [
        ("dialogue", "\n\nHuman: Add two numbers.\n\nAssistant: "),
        ("course", "### Instruction:\nAdd two numbers.\n\n### Response:\n"),
        ("none", "Add two numbers."),
    ],
)
def test_both_sides_are_the_rendered_prompt_the_response_and_one_end_token(tokenizer, template, prompt):
    rows = [PAIR, PAIR | {"chosen": PAIR["chosen"] + "</s>"}]
    (first, second), kept, _ = encode(rows, tokenizer, template)
    assert kept == [0, 1] and first == second and first.margin == 0
    for ids, response in zip(first.responses, (PAIR["chosen"], PAIR["rejected"]), strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"</s>{prompt}{response}</s>"
        assert ids == [*tokenizer.encode(prompt + response), tokenizer.eos_token_id]
    assert first.responses[0] == encode_response(PAIR["prompt"], PAIR["chosen"], tokenizer, load_template(template))


def test_dialogues_are_used_as_they_are(tokenizer):
    ((ranking,), _, _) = encode([{"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "C"}], tokenizer)
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in ranking.responses]
    assert texts == ["</s>\n\nHuman: A\n\nAssistant: B</s>", "</s>C</s>"]


def test_what_cannot_be_learned_from_is_dropped_and_named(tokenizer):
    rows = [
        PAIR,
        PAIR | {"rejected": PAIR["chosen"]},
        PAIR | {"rejected": "x y z " * 64},
        PAIR | {"prompt": "x y z " * 64},
        PAIR | {"rejected": ""},
        {"prompt": "A", "responses": ["B", "C", "B"]},
        {"prompt": "A", "responses": ["B", "C", "D"]},
    ]
    rankings, kept, report = encode(rows, tokenizer)
    assert kept == [0, 4, 6] and [len(ranking.responses) for ranking in rankings] == [2, 2, 3]
    first, *rest = report.lines()
    assert first == f"rows.jsonl: 3 of 7 pairs kept, {sum(len(ids) for r in rankings for ids in r.responses)} tokens"
    assert [line.strip() for line in rest] == [
        "2 pairs dropped: its sides are equal (row 2, row 6)",
        "1 pair dropped: a side is longer than 64 tokens (row 3)",
        "1 pair dropped: the prompt alone fills the 64 tokens (row 4)",
        "1 pair with an empty response: its reward is that of the end token (row 5)",
    ]


def test_a_side_of_just_the_allowed_length_stays(tokenizer):
    length = max(len(ids) for ids in encode([PAIR], tokenizer)[0][0].responses)
    assert encode([PAIR], tokenizer, max_length=length)[1] == [0]
    with pytest.raises(UserError, match="a side is longer"):
        encode([PAIR], tokenizer, max_length=length - 1)


def test_margins_are_numbers(tokenizer):
    rankings, _, _ = encode([PAIR | {"gap": 2}, PAIR | {"gap": -0.5}], tokenizer, margin_field="gap")
    assert [ranking.margin for ranking in rankings] == [2.0, -0.5]
    for wrong in ("1", None, True, [1], math.inf, math.nan, 10**400, 1e39):
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
        ({"prompt": "A", "chosen": 1, "rejected": "B"}, "field 'chosen' is a number, expected a string"),
        ({"prompt": 1, "chosen": "A", "rejected": "B"}, "field 'prompt' is a number, expected a string"),
        ({"prompt": "A", "responses": ["B"]}, "expected a list of two or more strings, best first"),
        ({"prompt": "A", "responses": "BC"}, "expected a list of two or more strings, best first"),
        ({"prompt": "A", "responses": ["B", None]}, "field 'responses' is null, expected a string"),
    ],
)
def test_a_row_that_is_no_pair_is_named(tmp_path, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "A", "chosen": "B", "rejected": "C"}, row])
    with pytest.raises(UserError) as caught:
        load_rows(path, PAIR_KINDS)
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


def test_bad_input_ends_in_one_line_and_leaves_nothing(refused, finished, tmp_path):
    out = tmp_path / "out"

    def refused_rows(rows: list, *flags: object) -> str:
        data = write_rows(tmp_path / "rows.jsonl", rows)
        return refused("--out", out, "--data", data, "--eval-fraction", 0, *flags)

    assert "'rejected' is missing" in refused_rows([{"prompt": "A", "chosen": "B"}])
    assert "sides are equal" in refused_rows([PAIR | {"rejected": PAIR["chosen"]}])
    assert "--margin-field" in refused_rows([PAIR | {"gap": "wide"}], "--margin-field", "gap")
    assert "the prompt alone fills" in refused_rows([PAIR | {"prompt": "word " * 600}])
    assert "--max-length 5000" in refused_rows([PAIR], "--max-length", 5000)
    assert "--lora-targets" in refused_rows([PAIR], "--lora-rank", 2, "--lora-targets", "c_attn")
    assert "--lora-rank is 1000, expected 1 to 256" in refused_rows([PAIR], "--lora-rank", 1000)
    assert "only train_sft.py has it" in refused("--out", out, "--bleu-samples", 3)
    assert not out.exists()

    done = subprocess.run(
        [sys.executable, "-m", "minift.score", "--model", SHIPPED, "--data", ROOT / "data" / "heldout_pairs.jsonl"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert done.stderr.startswith("error: ") and "this is a language model" in done.stderr
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "A"}])
    done = subprocess.run(
        [sys.executable, "-m", "minift.generate", "--model", finished[0], "--prompts", prompts],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert done.stderr.startswith("error: ") and "this is a reward model" in done.stderr
