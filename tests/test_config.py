"""Flags, recipes and defaults: which one wins, what is refused, and with which message."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys

import pytest

from minift.commands import flags as flags_module
from minift.commands.flags import TRL_NAMES, parse
from minift.commands.recipes import RECIPES
from minift.commands.terminal import print_values
from minift.config import GROUPS, Config, defaults_of, flag_of, options_of, to_dict
from minift.errors import UserError
from tests.runs import ROOT

BOTH = """recipe model revision data eval-data out template epochs max-steps batch-size grad-accum lr schedule
    warmup-steps weight-decay max-grad-norm max-length dropout eval-fraction eval-every save-every log-every seed device
    dtype base-dtype lora-rank lora-alpha lora-dropout lora-targets resume order gradient-checkpointing fsdp compile
    encoded-cache""".split()
ONLY = {
    "sft": ["response-template", "no-input-only", "bleu-samples", "run-checks", "supervise"],
    "rm": ["margin-field", "center-rewards", "group-prompts", "lm-weight", "shuffle-labels"],
}

WHOLE = [
    f"--{name}"
    for name in "epochs max-steps warmup-steps batch-size grad-accum max-length lora-rank log-every eval-every "
    "save-every bleu-samples".split()
]

every_script = pytest.mark.parametrize("script", ["sft", "rm"])


def refusal(argv: list[str], script: str = "sft") -> str:
    with pytest.raises(UserError) as error:
        parse(script, argv)
    assert "\n" not in str(error.value)
    return str(error.value)


@every_script
def test_each_script_has_exactly_its_flags(script):
    assert sorted(flag_of(name) for name in to_dict(parse(script, []), script)) == sorted(
        f"--{name}" for name in BOTH + ONLY[script]
    )


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default():
    run = parse("sft", ["--recipe", "course", "--lr", "1e-4"])
    assert (run.lr, run.epochs, run.weight_decay) == (1e-4, 10, 0.0)
    assert [run.origins[name] for name in ("lr", "epochs", "weight_decay")] == ["flag", "recipe", "default"]
    assert parse("sft", ["--lr", "1e-4", "--lr", "2e-4"]).lr == 2e-4  # ARGS comes after the Makefile's own flags


OTHER_DEFAULTS = {
    "sft": {"data": "data/instructions.jsonl", "out": "runs/sft", "template": "course", "lr": 2e-5},
    "rm": {"data": "data/pairs.jsonl", "out": "runs/rm", "template": "dialogue", "lr": 1e-4},
}


@every_script
@pytest.mark.parametrize("flags", [["model"], ["data"], ["model", "data"], ["model", "data", "lr"]], ids=str)
def test_a_recipe_does_not_leak_into_other_models_and_data(script, flags):
    """Every value is the default, which is trl's where it has the option, or a flag."""
    given = {name: 0.5 if name == "lr" else f"my/{name}" for name in flags}
    run = parse(script, [word for name, value in given.items() for word in (flag_of(name), str(value))])
    assert to_dict(run, script) == to_dict(Config(**(defaults_of(script) | given)), script)
    assert run.origins == {name: "flag" if name in given else "default" for name in to_dict(run, script)}
    expected = {"batch_size": 8, "grad_accum": 1, "epochs": 3, "max_steps": None, "schedule": "linear", "seed": 42}
    expected |= {"warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "max_length": 1024, "dropout": None}
    expected |= {"lora_rank": 0, "eval_data": None, "eval_fraction": 0.1, "recipe": None, "model": "data/model"}
    expected |= OTHER_DEFAULTS[script] | given
    assert {name: getattr(run, name) for name in expected} == expected


@every_script
@pytest.mark.parametrize(
    "name, argv, origin",
    [("tiny", [], "recipe"), ("tiny", ["--recipe", "tiny"], "flag"), ("course", ["--recipe", "course"], "flag")],
)
def test_without_flags_tiny_holds_else_the_recipe_that_is_named(script, name, argv, origin):
    run, recipe = parse(script, argv), RECIPES[script][name]
    held_out = {"eval_fraction": 0.0} if "eval_data" in recipe else {}
    expected = Config(**(defaults_of(script) | recipe | held_out | {"recipe": name}))
    assert to_dict(run, script) == to_dict(expected, script)
    origins = {option: "recipe" if option in recipe | held_out else "default" for option in defaults_of(script)}
    assert run.origins == origins | {"recipe": origin}


def test_course_recipes_are_the_labs():
    sft = parse("sft", ["--recipe", "course"])
    assert (sft.model, sft.data, sft.no_input_only) == ("facebook/opt-350m", "sahil2801/CodeAlpaca-20k", True)
    assert (sft.lora_rank, sft.lora_alpha, sft.lora_dropout, sft.lora_targets) == (16, 32, 0.1, ("q_proj", "v_proj"))
    assert (sft.epochs, sft.batch_size, sft.lr, sft.max_length, sft.eval_fraction) == (10, 2, 5e-5, 1024, 0.2)
    rm = parse("rm", ["--recipe", "course"])
    assert (rm.lora_rank, rm.lora_alpha, rm.lora_dropout, rm.max_length) == (8, 32, 0.1, 512)
    assert (rm.batch_size, rm.grad_accum, rm.epochs, rm.lr) == (3, 8, 3, 1.41e-5)


@pytest.mark.parametrize("script, name", [(script, name) for script in RECIPES for name in RECIPES[script]])
def test_a_recipe_typed_as_flags_is_the_recipe(script, name):
    """So its values pass the same checks, and have the same types, as a user's; and it sets no more than these."""
    argv = []
    for option, value in RECIPES[script][name].items():
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        argv += [flag_of(option)] if value is True else [flag_of(option), text]
    typed, resolved = parse(script, argv), parse(script, ["--recipe", name])
    assert dataclasses.replace(typed, recipe=name) == resolved
    types = {option: type(value) for option, value in to_dict(resolved, script).items()} | {"recipe": type(None)}
    assert {option: type(value) for option, value in to_dict(typed, script).items()} == types
    assert typed.model and typed.data and typed.out


def test_a_recipe_s_values_about_its_data_do_not_hold_for_other_data():
    tiny = ["--recipe", "tiny", "--data", "mine.jsonl"]
    mine = parse("sft", tiny)
    assert (mine.eval_data, mine.eval_fraction, mine.lr) == (None, 0.1, RECIPES["sft"]["tiny"]["lr"])
    both = parse("sft", [*tiny, "--eval-data", "held.jsonl"])
    assert (both.eval_data, both.eval_fraction) == ("held.jsonl", 0.0)
    assert not parse("rm", tiny).group_prompts
    assert not parse("sft", ["--recipe", "course", "--data", "mine.jsonl"]).no_input_only
    assert parse("sft", ["--recipe", "course", "--data", "mine.jsonl", "--no-input-only"]).no_input_only


def test_a_flag_s_eval_fraction_replaces_the_recipe_s_eval_data():
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
        ("--device", "gpu", "auto, cpu, mps, cuda or cuda:N"),
        ("--lora-targets", "q_proj,,v_proj", "names with commas between them"),
        ("--out", "", "some text"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(flag, text, expected):
    message = refusal([f"{flag}={text}"])
    assert message.startswith(f"{flag}: expected ") and expected in message and message.endswith(f"got {text!r}")


@pytest.mark.parametrize(
    "flag, text, expected",
    [
        *((flag, digits, "at most 1000000000") for flag in WHOLE for digits in ("9" * 24, "9" * 400, "9" * 5000)),
        *((flag, "1e308", "below 1e30") for flag in ("--lr", "--weight-decay", "--max-grad-norm")),
        ("--lora-alpha", "1e308", "below 1e9"),
        ("--lora-alpha", "1" * 400, "below 1e9"),
        ("--device", "x" * 400, "auto, cpu, mps, cuda or cuda:N"),
    ],
)
def test_a_number_that_is_too_large_is_refused_in_a_short_line(flag, text, expected):
    message = refusal([f"{flag}={text}"])
    assert message.startswith(f"{flag}: expected ") and expected in message and len(message) < 200


def test_shipped_files_belong_to_the_project_whatever_the_current_folder(tmp_path, monkeypatch):
    at_home = parse("sft", [])
    assert (at_home.model, at_home.eval_data) == ("data/model", "data/heldout.jsonl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "model").mkdir(parents=True)  # not ours
    for script, argv in (("sft", []), ("rm", []), ("sft", ["--data", "mine.jsonl"]), ("rm", ["--model", "data/model"])):
        values = to_dict(parse(script, argv), script)
        for name in {"model", "data"} - {flag.removeprefix("--") for flag in argv}:
            assert values[name] == str(ROOT / defaults_of(script)[name])
        assert values["out"] == f"runs/{script}"
    assert parse("rm", ["--model", "data/model"]).model == "data/model"  # the user's own
    assert parse("sft", ["--recipe", "course"]).model == "facebook/opt-350m"
    # Without data/ the name must not look like that of a repository on the hub.
    monkeypatch.setattr(flags_module, "PROJECT", tmp_path / "empty")
    assert parse("sft", []).model == str(tmp_path / "empty" / "data" / "model")


def test_values_at_their_limits_are_accepted():
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
    assert set(TRL_NAMES.values()) <= every_flag
    assert not set(TRL_NAMES) & every_flag


def test_description_shows_every_value_and_its_origin(capsys):
    print_values(parse("sft", ["--lr", "0.002"]), "sft")
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == len(BOTH + ONLY["sft"])
    words = {line.split()[0]: line.split()[1:] for line in lines}
    assert words["--lr"] == ["0.002", "flag"]
    assert words["--model"] == [RECIPES["sft"]["tiny"]["model"], "recipe"]
    assert words["--revision"] == ["none", "default"]
    assert words["--lora-targets"] == ["q_proj,v_proj", "default"]
    columns = {line.index(f" {line.split()[2]}") for line in lines}
    assert len(columns) == 1  # the last one is aligned
    print_values(parse("rm", ["--model", "mine"]), "rm")
    assert capsys.readouterr().out.splitlines()[0].split() == ["--recipe", "none", "default"]


def test_the_course_evaluates_and_saves_once_an_epoch():
    # The lab's log says 7,811 training rows; of the 33,143 pairs a fifth, rounded up, is held out.
    for script, rows in (("sft", 7_811), ("rm", 33_143 - 6_629)):
        run = parse(script, ["--recipe", "course"])
        steps = -(-rows // (run.batch_size * run.grad_accum))
        assert run.eval_every == run.save_every == steps


def test_resolved_values_survive_json():
    run = parse("rm", ["--dropout", "0.25"])
    values = json.loads(json.dumps(to_dict(run, "rm")))
    assert values == to_dict(run, "rm")
    assert (values["dropout"], values["lora_targets"]) == (0.25, ["q_proj", "v_proj"])
    assert not {"no_input_only", "origins"} & set(values)


def test_the_process_s_arguments_are_read_and_an_error_is_one_line_and_status_2():
    command = "from minift.commands import cli, flags; cli.run_command(lambda: print(flags.parse('sft').lr))"
    good = subprocess.run([sys.executable, "-c", command, "--lr", "0.5"], capture_output=True, text=True)
    assert (good.returncode, good.stdout) == (0, "0.5\n")
    bad = subprocess.run([sys.executable, "-c", command, "--learning-rate", "1"], capture_output=True, text=True)
    assert (bad.returncode, bad.stderr) == (2, "error: unknown flag --learning-rate, did you mean --lr?\n")
    assert bad.stdout == ""


@every_script
def test_help_shows_groups_defaults_and_what_make_runs(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "9999")  # no line breaks within a flag's help
    with pytest.raises(SystemExit) as end:
        parse(script, ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    used = {option.metadata["group"] for option in options_of(script)}
    headings = ["options", *(group for group in GROUPS if group in used), "examples"]
    assert re.findall(r"^([a-z -]+):$", text, re.MULTILINE) == headings and len(headings) > 6
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=--)|\n\n", text)]
    for option in options_of(script):
        [entry] = [entry for entry in entries if entry.startswith(f"{flag_of(option.name)} ")]
        default = defaults_of(script)[option.name]
        value = getattr(parse(script, []), option.name)
        is_shown = default is not None and default is not False
        expected = [
            (",".join(default) if type(default) is tuple else str(default)) if is_shown else None,
            None if value == default else "on" if value is True else str(value),
        ]
        found = re.search(r"[(; ]default ([^;)]+)", entry), re.search(rf"`make {script}`: ([^;)]+)", entry)
        assert [match and match[1] for match in found] == expected, entry
    lr = {"sft": "default 2e-05; `make sft`: 0.001)", "rm": "default 0.0001; `make rm`: 0.0012)"}
    assert lr[script] in text


@every_script
def test_every_example_of_help_is_a_command_line(script, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        parse(script, ["--help"])
    examples = capsys.readouterr().out.split("\nexamples:\n")[1].splitlines()
    assert len(examples) == 3
    for line in examples:
        python, name, *words = shlex.split(line)
        assert (python, name) == ("python", f"train_{script}.py") and parse(script, words) and len(line) <= 100


def test_the_control_experiment_changes_only_the_labels():
    control = parse("rm", ["--shuffle-labels"])
    assert (control.lm_weight, control.group_prompts, control.max_steps) == (0.0, False, 800)
    assert parse("rm", ["--shuffle-labels", "--lm-weight", "0.5"]).lm_weight == 0.5
    assert "--group-prompts" in refusal(["--shuffle-labels", "--group-prompts"], "rm")
    assert parse("rm", []).lm_weight > 0 and parse("rm", []).group_prompts


def test_one_process_cannot_share_its_weights():
    assert "--fsdp: there is only one process: start two or more by torchrun" in refusal(["--fsdp"])


def test_sharded_weights_are_not_compiled(monkeypatch):
    monkeypatch.setattr("minift.commands.flags.WORLD_SIZE", 2)
    assert "--compile: does not work with the sharded weights of --fsdp" in refusal(["--compile", "--fsdp"])


def test_only_frozen_weights_may_be_in_half_precision():
    assert "--lora-rank" in refusal(["--base-dtype", "float16"])
    assert "leave --dtype out" in refusal(["--base-dtype", "float16", "--lora-rank", "4", "--dtype", "float64"])
    assert parse("rm", ["--base-dtype", "bfloat16", "--recipe", "course"]).base_dtype == "bfloat16"
