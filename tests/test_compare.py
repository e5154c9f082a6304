"""tests/compare at its quick size: every section agrees, and disagrees once a fault is planted in what it covers."""

import importlib
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from minift.files.adapters import save_adapters
from minift.files.pretrained import find_model, load_for_sft
from minift.lora import add_lora
from tests.compare import Check, Difference, Setting
from tests.compare import __main__ as command
from tests.compare.faults import FAULTS, Fault
from tests.compare.page import page
from tests.reference import PRE_LN, hidden_states, pack, padded, twins
from tests.runs import mistake

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Undo the environment variables that the command sets for the libraries."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(
        model=DATA / "model",
        data=DATA / "instructions.jsonl",
        pairs=DATA / "pairs.jsonl",
        quick=True,
        scratch=tmp_path,
        progress=lambda text: None,
        curves={},
    )


@pytest.mark.parametrize("section", [name for name in command.SECTIONS if name != "differences"])
def test_section_agrees(section: str, setting: Setting) -> None:
    checks = [*importlib.import_module(f"tests.compare.{section}").compare(setting)]

    assert {check.section for check in checks} == {section}
    assert [command.line_of(check) for check in checks if not check.agrees] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_noticed(fault: Fault, setting: Setting) -> None:
    compare = importlib.import_module(f"tests.compare.{fault.section}").compare

    with fault.plant():
        assert not command.first_disagreement(compare(setting)).agrees


def test_deliberate_differences_are_measured(setting: Setting) -> None:
    differences = [*importlib.import_module("tests.compare.differences").compare(setting)]

    assert len(differences) >= 5
    assert re.search(r"change by (0e|\de-0[5-9])", differences[0].minift), differences[0]
    for difference in differences:
        assert difference.minift != difference.reference
        assert any(character.isdigit() for character in difference.minift + difference.reference)


def test_norm_of_the_reference_is_that_of_the_whole_gradient_in_float64() -> None:
    model = nn.Linear(30, 20)  # no gradient in its bias
    model.weight.grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))

    norm = importlib.import_module("tests.compare.training").float64_norm(model)

    squares = [value * value for value in model.weight.grad.flatten().tolist()]
    assert norm == pytest.approx(math.sqrt(math.fsum(squares)), rel=1e-12)


def test_norm_of_the_reference_is_taken_before_clipping(setting: Setting) -> None:
    sft, training = (importlib.import_module(f"tests.compare.{name}") for name in ("sft", "training"))
    examples, texts = sft.encode_for_both(setting)
    plan = training.plans(len(examples), sft.LR, quick=True)[0]
    outcome, _ = sft.remembered(setting.model, texts, plan, training.length_limit(setting))

    assert plan.dtype == "float64"
    for step in outcome.steps:
        assert step["grad_norm"] > 1.5  # clipping would change it
        assert step["grad_norm"] == pytest.approx(step["logged_grad_norm"], rel=1e-12)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("ours, theirs, jumps", [(1e-6, -1e-6, [0]), (1e-6, 2e-6, []), (1e-6, -1e-3, [])])
def test_inputs_of_a_relu_on_different_sides_are_found(
    layer: int, ours: float, theirs: float, jumps: list[int]
) -> None:
    """Put the same input of both models near 0: that of the third token of the second row, in one unit."""
    relu = importlib.import_module("tests.compare.relu")
    reference, model = twins(PRE_LN, torch.float64)
    rows = [[2, 5, 6], [2, 5, 7, 8], [2, 9]]
    batch = pack(rows)  # two tokens are shared
    names = [f"{prefix}decoder.layers.{layer}.fc1" for prefix in ("", "model.")]
    with torch.no_grad():
        for owner, name, value in ((model, names[0], ours), (reference, names[1], theirs)):
            linear, inputs = owner.get_submodule(name), []
            hook = linear.register_forward_hook(lambda module, args, output, found=inputs: found.append(output.clone()))
            if owner is model:
                hidden_states(model, batch)
                token = int(batch.rows[1, 2])
            else:
                owner(**padded(rows[::-1]))
                token = 6  # of 3 rows of 4, in the other order
            hook.remove()
            linear.bias[3] += value - inputs[0].flatten(0, -2)[token, 3]

        with relu.watch(model, []) as own:
            model(batch.input_ids, batch.positions, batch.rows, wanted=batch.rows[1, 2:])
        with relu.watch(reference, []) as other:
            reference(**padded(rows[::-1]))

    assert relu.steps_that_jump(own, other) == jumps
    assert len(own[0]) == 1


@pytest.mark.parametrize("differs, others", [(1, "0.0e+00"), (2, "2.5e-02")])
def test_a_step_that_jumps_is_named_and_counts_in_the_norms(differs: int, others: str) -> None:
    training = importlib.import_module("tests.compare.training")
    steps = [{"grad_norm": 4.0, "logged_grad_norm": 3.0} for _ in range(3)]
    theirs = training.Outcome(steps, {}, {}, {1: {(0, "layers.0.fc1", 7): True}})
    ours = theirs._replace(steps=[*map(dict, steps)], sides={1: {(0, "layers.0.fc1", 7): False}})
    ours.steps[differs]["grad_norm"] = 4.1

    check = training.compare_norms("sft", training.ONE_EPOCH, "3 steps", ours, theirs)

    assert not check.agrees and check.difference == pytest.approx(0.025) and check.on == "3 steps"
    assert f"0 in step 2 (other steps: {others})" in check.note and "2.5e-01 from it" in check.note


def test_all_steps_may_jump() -> None:
    training = importlib.import_module("tests.compare.training")
    theirs = training.Outcome(
        [{"grad_norm": 4.0, "logged_grad_norm": 3.0}], {}, {}, {0: {(0, "layers.0.fc1", 7): True}}
    )
    ours = theirs._replace(sides={0: {(0, "layers.0.fc1", 7): False}})
    check = training.compare_norms("sft", training.ONE_EPOCH, "1 step", ours, theirs)
    assert check.agrees and check.note.endswith("different sides of 0 in step 1")


def test_ten_faults_are_planted() -> None:
    assert len({fault.name for fault in FAULTS}) == 10


def test_check_agrees_only_within_its_tolerance() -> None:
    assert not Check("sft", "loss", "", math.nan, math.inf).agrees
    assert not Check("sft", "loss", "", 2e-5, 1e-5).agrees
    assert Check("sft", "loss", "", 1e-5, 1e-5).agrees


@pytest.mark.parametrize(
    "difference, status, verdict", [(0.0, None, "all 1 comparisons agree"), (2.0, 1, "1 of 1 comparisons DISAGREE")]
)
def test_command_prints_a_table_and_writes_a_page(
    difference: float,
    status: int | None,
    verdict: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check = Check("bleu", "<corpora>", "3 corpora", difference, 1.0, "why")
    monkeypatch.setattr(command, "_section", lambda name, setting: iter([check]))
    monkeypatch.setattr(sys, "argv", ["compare", "--only", "bleu", "--out", str(tmp_path / "new" / "out")])

    monkeypatch.setattr(command, "README", tmp_path / "README.md")

    if status is None:
        command.main()
    else:
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == status

    assert verdict in capsys.readouterr().out
    assert "&lt;corpora&gt;" in (tmp_path / "new" / "out" / "report.html").read_text()
    assert not (tmp_path / "README.md").exists()  # not with --only


def test_complete_run_writes_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def section(name: str, setting: Setting) -> Iterator[Check | Difference]:
        yield Difference("ties", "0", "1", "why") if name == "differences" else Check(name, "it", "3 rows", 0.0, 1.0)

    monkeypatch.setattr(command, "_section", section)
    monkeypatch.setattr(command, "README", tmp_path / "README.md")
    monkeypatch.setattr(sys, "argv", ["compare", "--out", str(tmp_path / "out")])
    command.main()

    readme, printed = (tmp_path / "README.md").read_text(), capsys.readouterr().out.splitlines()
    start = printed.index(command.TITLES)
    lines = printed[start : start + len(command.SECTIONS)]  # the titles, then every section but the differences
    assert "\n".join(["```", *lines, "```"]) in readme
    assert "All 9 comparisons agree" in readme and "- **ties**\n  - minift: 0\n" in readme
    assert " ".join(command.SECTIONS) in readme and "data/instructions.jsonl" in readme
    assert str(tmp_path) not in readme and str(DATA) not in readme


def test_page_draws_both_curves_over_each_other() -> None:
    html = page([], [], {"SFT": {"minift": [3.0, 2.0, 1.0], "trl": [3.0, 2.0, 1.5]}}, {"model": "a & b"})

    assert 'path class="trl"' in html and 'path class="minift"' in html
    assert html.index('path class="trl"') < html.index('path class="minift"')
    assert "a &amp; b" in html


def test_adapters_are_merged_for_the_other_libraries(tmp_path: Path) -> None:
    model, _ = load_for_sft(find_model(DATA / "model"))
    add_lora(model, 2, 4.0, 0.0, ["q_proj"])
    save_adapters(model, tmp_path / "adapters", str(DATA / "model"))
    found = command._setting(tmp_path / "adapters", None, False, tmp_path, lambda text: None)
    assert found.model == tmp_path / "merged"
    assert {"config.json", "model.safetensors", "vocab.json"} <= {path.name for path in found.model.iterdir()}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only", "blue"], "--only blue: expected some of tokenizer, "),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_mistakes_give_one_line_and_status_2(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *flags])

    assert mistake(lambda flags: command.main(), flags, capsys).startswith(message)
