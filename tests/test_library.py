"""`minift.load` and `minift.load_judge`: README's ten lines, answers, tables, losses, logits."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import minift
from minift.encode import IGNORE_INDEX
from minift.errors import UserError
from minift.files.language_model import LanguageModel
from minift.files.pretrained import find_model, load_for_rm
from minift.files.tokenizer import save_tokenizer
from minift.files.weights import save_model
from minift.generate import Options, generate
from minift.prompts import TEMPLATES
from tests.runs import ROOT, SHIPPED

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROW = {"instruction": "Reverse the list `a`.", "output": "a[::-1]"}


def readme_lines() -> str:
    return re.search(r"## As a library\n+```python\n(.+?)```", README, re.DOTALL)[1]


def code_lines(readme: str) -> list[str]:
    return [line for line in readme.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return minift.load(SHIPPED)


def test_the_ten_lines_of_the_readme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    lines = readme_lines()
    assert len(code_lines(lines)) <= 10
    names: dict = {}
    exec(lines, names)
    *table, answer = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["id", "label", "token"]
    assert [line.split() for line in table[-2:]] == [["64", "64", "⟦]⟧"], ["2", "2", "⟦⟨</s>⟩⟧"]]
    assert "   567   -100  Re" in table
    assert lines.rstrip().endswith(f"  # {answer}") and answer == names["row"]["output"]
    assert repr(names["lm"]) == "LanguageModel(data/model: 3,880,448 parameters, template course)"


@pytest.mark.parametrize("name", minift.EXPORTS)
def test_what_is_imported_on_first_use(name: str) -> None:
    module, its_name = minift.EXPORTS[name]
    assert getattr(minift, name) is getattr(importlib.import_module(module), its_name)
    assert name in dir(minift)


def test_another_name_is_not_an_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'minift' has no attribute 'lod'"):
        _ = minift.lod


def test_an_optimizer_needs_a_learning_rate(lm: LanguageModel) -> None:
    """It was made with rate 0, which the training loop replaced: any other loop trained nothing."""
    with pytest.raises(TypeError, match="lr"):
        minift.adamw(lm.model)
    assert [group["lr"] for group in minift.adamw(lm.model, 1e-3).param_groups] == [1e-3, 1e-3]


def test_an_answer_ends_at_the_end_token(lm: LanguageModel) -> None:
    tokenizer, prompt = lm.tokenizer, [lm.tokenizer.encode("### Instruction:\nAdd.\n\n### Response:\n")]
    [[ids]] = generate(lm.model, prompt, Options(max_new_tokens=8))
    assert len(ids) == 8 and tokenizer.eos_token_id not in ids
    assert lm.ask("Add.", max_new_tokens=8) == tokenizer.decode(ids)
    with torch.no_grad():  # so that the model's first choice is the end token, whatever the prompt
        taught = minift.load(SHIPPED)
        head = taught.model.head
        hidden = taught.model(*(tensor for tensor in _packed(prompt[0])))[-1]
        head[tokenizer.eos_token_id] = 100 * hidden
    assert taught.complete(prompt, Options()) == [[[tokenizer.eos_token_id]]] and taught.ask("Add.") == ""
    [[other]] = taught.complete(prompt, Options(eos_token_id=ids[0], max_new_tokens=3))
    assert len(other) == 3  # the caller's own end token counts


def _packed(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(ids), torch.arange(len(ids)), torch.arange(len(ids))[None]


def test_an_input_and_options_reach_the_model(lm: LanguageModel) -> None:
    prompt = "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    [[ids]] = lm.complete([lm.tokenizer.encode(prompt)], Options(max_new_tokens=6, temperature=1.0, seed=3))
    assert lm.ask("Add.", "1, 2", max_new_tokens=6, temperature=1.0, seed=3) == lm.tokenizer.decode(ids)
    assert lm.ask("Add.", max_new_tokens=4, num_beams=2)
    with pytest.raises(ValueError, match="top_p is 2"):
        lm.ask("Add.", top_p=2)


def test_the_blanks_of_the_template_do_not_belong_to_an_answer() -> None:
    lm = minift.load(SHIPPED, template="dialogue")
    row = {"instruction": "Add."}
    assert lm.text_of(row, lm.tokenizer.encode(" a b")[1:]) == "a b"
    assert lm.template == TEMPLATES["dialogue"]


def test_the_loss_is_the_mean_of_minus_log_p(lm: LanguageModel) -> None:
    example = lm.encode(ROW)
    text = lm.tokenizer.decode(example.input_ids[1:-1], skip_special_tokens=False)
    log_p = lm.logits(text).double().log_softmax(1)  # (T, V)
    assert log_p.shape == (len(example.input_ids) - 1, lm.model.config.vocab_size)
    supervised = [place for place, label in enumerate(example.labels) if label != IGNORE_INDEX]
    by_hand = -sum(log_p[place - 1, example.labels[place]].item() for place in supervised) / len(supervised)
    assert lm.loss(ROW).item() == pytest.approx(by_hand, rel=1e-5)
    assert lm.loss(ROW).item() == lm.loss(ROW).item()  # no dropout until model.train()
    assert lm.tokenizer.decode([example.labels[place] for place in supervised]) == ROW["output"]


def test_a_long_row_is_cut_as_in_training(lm: LanguageModel) -> None:
    assert len(lm.encode(ROW | {"output": "a, " * 600}).input_ids) == lm.model.config.max_position_embeddings


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Add."}, "the row: field 'output' is missing, or null"),
        ({"instruction": "Add.", "output": 3}, "the row: field 'output' is 3, expected a string"),
        ({"instruction": "Add. " * 600, "output": "a"}, "no supervised token within the first 512 tokens"),
        ("Add.", 'the row: "Add.", expected an object'),
    ],
)
def test_a_wrong_row_is_named(lm: LanguageModel, row: object, message: str) -> None:
    for method in (lm.encode, lm.show, lm.loss):
        with pytest.raises(UserError, match=re.escape(message)):
            method(row)


def test_a_table_has_no_control_characters(lm: LanguageModel) -> None:
    table = lm.show({"prompt": "a\x1b[2J\n\n", "completion": " é\n😀"})
    assert table.isprintable() is False and set(filter(lambda c: not c.isprintable(), table)) == {"\n"}
    assert len(table.splitlines()) == 1 + len(lm.encode({"prompt": "a\x1b[2J\n\n", "completion": " é\n😀"}).input_ids)


def test_a_judge(tmp_path: Path) -> None:
    model, tokenizer = load_for_rm(find_model(SHIPPED), seed=1)
    save_model(model, tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    judge = minift.load_judge(tmp_path)
    assert repr(judge) == f"Judge({tmp_path}: 3,880,576 parameters, template dialogue)"
    assert judge.best_of("Add.", ["a", "b"]) == int(judge.score("Add.", "b") > judge.score("Add.", "a"))
