"""Flags, recipes and defaults: which one wins, what is refused, and in which words."""

import dataclasses
import json
import subprocess
import sys

import pytest

from minift import config
from minift.config import RECIPES, Config, describe, flag_of, parse, to_dict
from minift.errors import UserError

BOTH = """recipe model revision data eval-data out template epochs max-steps batch-size grad-accum lr schedule
    warmup-steps weight-decay max-grad-norm max-length dropout eval-fraction eval-every save-every log-every seed device
    dtype base-dtype lora-rank lora-alpha lora-dropout lora-targets resume order""".split()
ONLY = {
    "sft": ["response-template", "no-input-only", "bleu-samples", "supervise"],
    "rm": ["margin-field", "center-rewards", "group-prompts", "lm-weight", "shuffle-labels"],
}


def refusal(argv: list[str], task: str = "sft") -> str:
    with pytest.raises(UserError) as error:
        parse(task, argv)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("task", ["sft", "rm"])
def test_each_script_has_exactly_its_flags(task):
    assert sorted(flag_of(name) for name in to_dict(parse(task, []), task)) == sorted(
        f"--{name}" for name in BOTH + ONLY[task]
    )


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default():
    run = parse("sft", ["--recipe", "course", "--lr", "1e-4"])
    assert (run.lr, run.epochs, run.weight_decay) == (1e-4, 10, 0.0)
    assert [run.sources[name] for name in ("lr", "epochs", "weight_decay")] == ["flag", "recipe", "default"]
    assert parse("sft", ["--lr", "1e-4", "--lr", "2e-4"]).lr == 2e-4  # ARGS comes after the Makefile's own flags


@pytest.mark.parametrize("task, lr, template", [("sft", 2e-5, "course"), ("rm", 1e-4, "dialogue")])
def test_defaults_are_the_references(task, lr, template, monkeypatch):
    monkeypatch.setitem(RECIPES[task], "tiny", {})
    run = parse(task, [])
    assert (run.lr, run.template) == (lr, template)
    reference = {"batch_size": 8, "grad_accum": 1, "epochs": 3, "max_steps": None, "schedule": "linear", "seed": 42}
    reference |= {"warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "max_length": 1024, "lora_rank": 0}
    assert {name: getattr(run, name) for name in reference} == reference


def test_course_recipes_are_the_labs():
    sft = parse("sft", ["--recipe", "course"])
    assert (sft.model, sft.data, sft.no_input_only) == ("facebook/opt-350m", "sahil2801/CodeAlpaca-20k", True)
    assert (sft.lora_rank, sft.lora_alpha, sft.lora_dropout, sft.lora_targets) == (16, 32, 0.1, ("q_proj", "v_proj"))
    assert (sft.epochs, sft.batch_size, sft.lr, sft.max_length, sft.eval_fraction) == (10, 2, 5e-5, 1024, 0.2)
    rm = parse("rm", ["--recipe", "course"])
    assert (rm.lora_rank, rm.lora_alpha, rm.lora_dropout, rm.max_length) == (8, 32, 0.1, 512)
    assert (rm.batch_size, rm.grad_accum, rm.epochs, rm.lr) == (3, 8, 3, 1.41e-5)


@pytest.mark.parametrize("task, name", [(task, name) for task in RECIPES for name in RECIPES[task]])
def test_a_recipe_typed_as_flags_is_the_recipe(task, name):
    """So its values pass the same checks, and have the same types, as a user's."""
    argv = []
    for field_name, value in RECIPES[task][name].items():
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        argv += [flag_of(field_name)] if value is True else [flag_of(field_name), text]
    typed, resolved = parse(task, ["--recipe", name, *argv]), parse(task, ["--recipe", name])
    assert typed == resolved
    assert [type(value) for value in to_dict(typed, task).values()] == [
        type(value) for value in to_dict(resolved, task).values()
    ]
    assert typed.model and typed.data and typed.out


def test_what_a_recipe_says_of_its_data_does_not_hold_for_other_data():
    assert (parse("sft", []).eval_data, parse("sft", []).eval_fraction) == (RECIPES["sft"]["tiny"]["eval_data"], 0.0)
    mine = parse("sft", ["--data", "mine.jsonl"])
    assert (mine.eval_data, mine.eval_fraction) == (None, 0.1)
    both = parse("sft", ["--data", "mine.jsonl", "--eval-data", "held.jsonl"])
    assert (both.eval_data, both.eval_fraction) == ("held.jsonl", 0.0)
    assert not parse("sft", ["--recipe", "course", "--data", "mine.jsonl"]).no_input_only
    assert parse("sft", ["--recipe", "course", "--data", "mine.jsonl", "--no-input-only"]).no_input_only


def test_an_eval_fraction_of_ones_own_replaces_the_recipes_eval_data():
    split = parse("sft", ["--eval-fraction", "0.3"])
    assert (split.eval_data, split.eval_fraction) == (None, 0.3)
    every_row = parse("sft", ["--eval-fraction", "0"])
    assert (every_row.eval_data, every_row.eval_fraction) == (None, 0.0)
    assert "--eval-fraction" in refusal(["--eval-fraction", "0.3", "--eval-data", "held.jsonl"])


@pytest.mark.parametrize(
    "flag, text, expected",
    [
        ("--batch-size", "0", "a whole number of at least 1"),
        ("--batch-size", "2.5", "a whole number of at least 1"),
        ("--grad-accum", "-1", "a whole number of at least 1"),
        ("--epochs", "0", "a whole number of at least 1"),
        ("--max-steps", "0", "a whole number of at least 1"),
        ("--log-every", "0", "a whole number of at least 1"),
        ("--eval-every", "-1", "a whole number of at least 0"),
        ("--save-every", "often", "a whole number of at least 0"),
        ("--bleu-samples", "-1", "a whole number of at least 0"),
        ("--warmup-steps", "0.1", "a whole number of at least 0"),
        ("--lora-rank", "-1", "a whole number of at least 0"),
        ("--max-length", "1", "a whole number of at least 2"),
        ("--seed", "-1", "a whole number of at least 0"),
        ("--seed", str(2**32), "at most 4294967295"),
        ("--lr", "0", "a number above 0"),
        ("--lr", "nan", "a number above 0"),
        ("--lr", "inf", "a number above 0"),
        ("--lr", "1e-4x", "a number above 0"),
        ("--max-grad-norm", "0", "a number above 0"),
        ("--lora-alpha", "0", "a number above 0"),
        ("--weight-decay", "-0.1", "a number of at least 0"),
        ("--dropout", "1", "a number of at least 0 and below 1"),
        ("--lora-dropout", "nan", "a number of at least 0 and below 1"),
        ("--eval-fraction", "1", "a number of at least 0 and below 1"),
        ("--schedule", "Linear", "one of linear, cosine, constant"),
        ("--order", "random", "one of shuffled, sequential"),
        ("--dtype", "float16", "one of auto, float32, bfloat16, float64"),
        ("--supervise", "prompt", "one of completion, all"),
        ("--recipe", "huge", "one of tiny, course"),
        ("--device", "gpu", "auto, cpu, cuda or cuda:N"),
        ("--lora-targets", "q_proj,,v_proj", "names with commas between them"),
        ("--out", "", "some text"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(flag, text, expected):
    message = refusal([f"{flag}={text}"])
    assert message.startswith(f"{flag}: expected ") and expected in message and message.endswith(f"got {text!r}")


def test_values_at_their_limits_are_taken():
    argv = "--batch-size 1 --max-length 2 --dropout 0 --lora-dropout 0.999 --eval-every 0 --seed 0 --device cuda:1"
    run = parse("sft", [*argv.split(), "--lora-targets", "q_proj, fc1"])
    assert (run.batch_size, run.max_length, run.dropout, run.seed, run.device) == (1, 2, 0.0, 0, "cuda:1")
    assert run.lora_targets == ("q_proj", "fc1")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--learning-rate", "1e-4"], "unknown flag --learning-rate, did you mean --lr?"),
        (["--num_train_epochs=2"], "unknown flag --num_train_epochs=2, did you mean --epochs?"),
        (["--batch_size", "4"], "unknown flag --batch_size, did you mean --batch-size?"),
        (["--bath-size", "4"], "unknown flag --bath-size, did you mean --batch-size?"),
        (["--sched", "cosine"], "unknown flag --sched, did you mean --schedule?"),  # no abbreviations
        (["--qqq"], "unknown flag --qqq (see train_sft.py --help)"),
        (["--margin-field", "m"], "unknown flag --margin-field: only train_rm.py has it"),
        (["tiny"], "unexpected argument 'tiny': every value follows its flag (see train_sft.py --help)"),
        (["--lr"], "--lr: expected one argument (see train_sft.py --help)"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_likely_one(argv, message):
    assert refusal(argv) == message


def test_the_names_known_from_trl_lead_to_flags_that_exist():
    every_flag = {flag_of(item.name) for item in dataclasses.fields(Config)}
    assert set(config.TRL_NAMES.values()) <= every_flag
    assert not set(config.TRL_NAMES) & every_flag


def test_description_shows_every_value_and_where_it_came_from():
    lines = describe(parse("sft", ["--lr", "0.002"]), "sft").splitlines()
    assert len(lines) == len(BOTH + ONLY["sft"])
    words = {line.split()[0]: line.split()[1:] for line in lines}
    assert words["--lr"] == ["0.002", "flag"]
    assert words["--model"] == [RECIPES["sft"]["tiny"]["model"], "recipe"]  # nothing that trl would have taken
    assert words["--revision"] == ["none", "default"]
    assert words["--lora-targets"] == ["q_proj,v_proj", "default"]
    columns = {line.index(f" {line.split()[2]}") for line in lines}
    assert len(columns) == 1  # the last one is aligned


# Read from trl 1.16's SFTConfig and RewardConfig, peft 0.21's LoraConfig and its targets for OPT.
TRL = {"max-length": "1024", "epochs": "3", "batch-size": "8", "grad-accum": "1", "seed": "42", "max-steps": "none"}
TRL |= {"warmup-steps": "0", "center-rewards": "0.0", "eval-fraction": "no evaluation", "eval-every": "no evaluation"}
TRL |= {"save-every": "500", "dropout": "the model's"}
PEFT = {"lora-rank": "8; trl: no adapters", "lora-alpha": "8.0", "lora-dropout": "0.0", "lora-targets": "q_proj,v_proj"}
NEITHER = {
    "model",
    "data",
    "eval-data",
    "no-input-only",
    "out",
    "template",
    "group-prompts",
    "lm-weight",
    "bleu-samples",
}


@pytest.mark.parametrize("task, lr", [("sft", "2e-05"), ("rm", "0.0001")])
@pytest.mark.parametrize("recipe", ["tiny", "course"])
def test_what_a_recipe_sets_is_shown_beside_what_the_reference_takes(task, lr, recipe):
    names = {name.replace("_", "-") for name in RECIPES[task][recipe]}
    expected = {f"--{name}": f"recipe (trl: {value})" for name, value in (TRL | {"lr": lr}).items() if name in names}
    expected |= {f"--{name}": f"recipe (peft: {value})" for name, value in PEFT.items() if name in names}
    expected |= {f"--{name}": "recipe" for name in NEITHER & names}
    if "eval-data" in names:
        expected["--eval-fraction"] = "recipe (trl: no evaluation)"
    lines = describe(parse(task, ["--recipe", recipe]), task).splitlines()
    shown = {line.split()[0]: line.split(maxsplit=2)[2] for line in lines}
    assert {name: text for name, text in shown.items() if text.startswith("recipe")} == expected
    assert (
        "trl" not in describe(parse(task, ["--recipe", recipe, "--lr", "0.5"]), task).split("--lr ")[1].split("\n")[0]
    )


def test_the_course_evaluates_and_saves_once_an_epoch():
    # The lab's log tells of 7,811 training rows; of the 33,143 pairs a fifth, rounded up, is held out.
    for task, rows in (("sft", 7_811), ("rm", 33_143 - 6_629)):
        run = parse(task, ["--recipe", "course"])
        steps = -(-rows // (run.batch_size * run.grad_accum))
        assert run.eval_every == run.save_every == steps


def test_resolved_values_survive_json():
    run = parse("rm", ["--dropout", "0.25"])
    values = json.loads(json.dumps(to_dict(run, "rm")))
    assert values == to_dict(run, "rm")
    assert (values["dropout"], values["lora_targets"]) == (0.25, ["q_proj", "v_proj"])
    assert not {"no_input_only", "sources"} & set(values)


def test_a_commands_own_line_is_read_and_ends_in_one_line_and_status_2():
    command = "from minift import config, errors; errors.run_command(lambda: print(config.parse('sft').lr))"
    good = subprocess.run([sys.executable, "-c", command, "--lr", "0.5"], capture_output=True, text=True)
    assert (good.returncode, good.stdout) == (0, "0.5\n")
    bad = subprocess.run([sys.executable, "-c", command, "--learning-rate", "1"], capture_output=True, text=True)
    assert (bad.returncode, bad.stderr) == (2, "error: unknown flag --learning-rate, did you mean --lr?\n")
    assert bad.stdout == ""


@pytest.mark.parametrize("task", ["sft", "rm"])
def test_help_names_every_flag_with_its_default(task, capsys):
    with pytest.raises(SystemExit) as end:
        parse(task, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert all(f"--{name} " in text for name in BOTH + ONLY[task])
    assert f"default {0.0001 if task == 'rm' else 2e-05})" in text


def test_a_model_of_ones_own_does_not_get_the_values_found_for_the_shipped_one():
    ours = parse("sft", ["--model", "my/model"])
    assert (ours.lr, ours.max_steps, ours.epochs, ours.batch_size, ours.dropout) == (2e-5, None, 3, 8, None)
    assert ours.data == RECIPES["sft"]["tiny"]["data"]
    asked_for = parse("sft", ["--model", "my/model", "--recipe", "tiny"])
    assert asked_for.lr == RECIPES["sft"]["tiny"]["lr"]
    assert parse("sft", ["--data", "my.jsonl"]).lr == RECIPES["sft"]["tiny"]["lr"]


def test_the_control_is_about_labels_alone():
    config = parse("rm", ["--shuffle-labels"])
    assert (config.lm_weight, config.group_prompts, config.max_steps) == (0.0, False, 400)
    assert parse("rm", ["--shuffle-labels", "--lm-weight", "0.5"]).lm_weight == 0.5
    assert "--group-prompts" in refusal(["--shuffle-labels", "--group-prompts"], "rm")
    assert parse("rm", []).lm_weight > 0 and parse("rm", []).group_prompts


def test_only_what_adapters_freeze_may_be_in_half_precision():
    assert "--lora-rank" in refusal(["--base-dtype", "float16"])
    assert "leave --dtype out" in refusal(["--base-dtype", "float16", "--lora-rank", "4", "--dtype", "float64"])
    assert parse("rm", ["--base-dtype", "bfloat16", "--recipe", "course"]).base_dtype == "bfloat16"
