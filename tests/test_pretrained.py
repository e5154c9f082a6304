"""A folder of adapters wherever a model is accepted, and how often a model's files are looked up and read."""

import builtins
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, OPTForCausalLM, OPTForSequenceClassification

from minift.commands import generate, preview, score
from minift.errors import UserError
from minift.files import hub, pretrained, weights
from minift.files.adapters import save_adapters
from minift.files.pretrained import find_model, load_for_rm, load_judge, load_language_model
from minift.files.templates import save_template
from minift.files.text import sha256
from minift.files.tokenizer import load_tokenizer, save_tokenizer
from minift.lora import add_lora, merge
from minift.model import OPT, RewardModel
from minift.prompts import TEMPLATES, Template
from minift.scoring import score_rows
from tests.runs import SHIPPED, TINY, few_rows, read_lines, refused, run, snapshot, task_of, write_lines

# Not the default of either kind of model.
TEMPLATE = TEMPLATES["alpaca"]
TARGETS = ["q_proj", "fc1"]
SEED = 5
PROMPTS = [{"instruction": "Add two numbers."}, {"instruction": "Add them.", "input": "1, 2"}]


class Tuned(NamedTuple):
    """A folder of adapters, and one of the whole model that they and their base are together."""

    adapters: Path
    merged: Path


def of_a_run(script: str, folder: Path) -> Tuned:
    flags = [
        *TINY,
        "--model",
        SHIPPED,
        "--template",
        TEMPLATE.name,
        "--lora-rank",
        4,
        "--lr",
        1e-2,
        "--warmup-steps",
        0,
    ]
    run(script, *flags, *few_rows(script, folder)[:2], "--eval-fraction", 0, "--out", folder / "run")
    return Tuned(folder / "run" / "adapter", folder / "run")


def of_save_adapters(script: str, folder: Path) -> Tuned:
    model = weights.load_model(SHIPPED) if script == "sft" else weights.load_reward_model(SHIPPED, seed=1)
    add_lora(model, 3, 7.0, 0.5, TARGETS)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)
    save_adapters(model, folder / "adapters", str(SHIPPED))
    merge(model)
    return with_the_rest(folder, model)


def of_peft(script: str, folder: Path) -> Tuned:
    if script == "sft":
        base, task_type = OPTForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32), "CAUSAL_LM"
    else:
        base = OPTForSequenceClassification.from_pretrained(SHIPPED, dtype=torch.float32, num_labels=1)
        task_type = "SEQ_CLS"
    settings = peft.LoraConfig(r=3, task_type=task_type, target_modules=TARGETS, init_lora_weights=False)
    tuned = peft.get_peft_model(base, settings)
    tuned.save_pretrained(folder / "adapters")
    tuned.merge_and_unload().save_pretrained(folder / "merged")
    return with_the_rest(folder)


def with_the_rest(folder: Path, model: OPT | RewardModel | None = None) -> Tuned:
    """Write the tokenizer and the templates of adapters and their merged model, and the latter if there is one."""
    if model is not None:
        weights.save_model(model, folder / "merged")
    save_tokenizer(load_tokenizer(SHIPPED), folder / "merged")
    for name in Tuned._fields:
        save_template(TEMPLATE, folder / name)
    return Tuned(folder / "adapters", folder / "merged")


WRITERS = {"a run": of_a_run, "save_adapters": of_save_adapters, "peft": of_peft}


@pytest.fixture(scope="module", params=WRITERS)
def language(request, tmp_path_factory) -> Tuned:
    torch.manual_seed(0)
    return WRITERS[request.param]("sft", tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module", params=WRITERS)
def reward(request, tmp_path_factory) -> Tuned:
    torch.manual_seed(0)
    return WRITERS[request.param]("rm", tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Tuned:
    """Return adapters without template.json."""
    tuned = of_save_adapters("sft", tmp_path_factory.mktemp("plain"))
    (tuned.adapters / "template.json").unlink()
    return tuned


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Return a folder with rows for every command."""
    folder = tmp_path_factory.mktemp("files")
    write_lines(folder / "prompts.jsonl", PROMPTS)
    write_lines(folder / "rows.jsonl", [row | {"output": "a + b"} for row in PROMPTS])
    write_lines(folder / "pairs.jsonl", [{"prompt": "Add.", "chosen": "a + b", "rejected": "a"}])
    return folder


def copied(tuned: Tuned, folder: Path, **changes: object) -> Path:
    """Return a copy of the adapters with other settings."""
    shutil.copytree(tuned.adapters, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    return folder


def assert_same_weights(found: nn.Module, expected: nn.Module, *, tuned: bool = True) -> None:
    """Assert equality within 1e-6; if `tuned`, also that these are not the base's."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) <= 1e-6
    base = weights.load_model(SHIPPED).state_dict()
    moved = max((ours[name] - base[name]).abs().max().item() for name in ours.keys() & base.keys())
    assert (moved > 1e-3) == tuned
    assert all(parameter.requires_grad for parameter in found.parameters())


def forms(template: Template) -> tuple[str, str]:
    return template.with_input, template.without_input


# ------------------------------------------------------------------------------------------------------------ loading


def test_a_language_model(language):
    found, expected = (load_language_model(folder) for folder in language)
    assert_same_weights(found.model, expected.model)
    assert forms(found.template) == forms(expected.template) == forms(TEMPLATE)
    assert found.tokenizer.files == expected.tokenizer.files


def test_a_judge(reward):
    found, expected = (load_judge(folder) for folder in reward)
    assert_same_weights(found.model, expected.model)
    assert forms(found.template) == forms(expected.template) == forms(TEMPLATE)
    scores = [judge.scores([("Add two numbers.", "a + b"), (None, "a")]) for judge in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def with_other_ids(folder: Path, *, pad: str | None = "<other pad>") -> Path:
    """Copy the shipped model, with an EOS and a pad that its config.json does not know."""
    shutil.copytree(SHIPPED, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    state, values = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    name = next(name for name in state if name.endswith("embed_tokens.weight"))
    state[name] = torch.cat([state[name], state[name][3:5]])
    vocab_size = values["vocab_size"]
    names = dict.fromkeys(token for token in ("<other end>", pad) if token)
    added = {vocab_size + number: {"content": token, "special": True} for number, token in enumerate(names)}
    settings |= {"eos_token": "<other end>", "pad_token": pad, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": vocab_size + 2}))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("script", ["sft", "rm"])
def test_what_a_run_saves_has_the_tokenizers_special_ids(tmp_path, script):
    """transformers' `generate` never stopped at an EOS that config.json did not name, and read rewards at pads."""
    model = with_other_ids(tmp_path / "model")
    run(script, *TINY, "--model", model, *few_rows(script, tmp_path), "--max-steps", 1, "--out", tmp_path / "run")
    tokenizer = load_tokenizer(model)
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (values["eos_token_id"], values["pad_token_id"], values["bos_token_id"]) == (4096, 4097, 2)
    if script == "sft":
        reference = OPTForCausalLM.from_pretrained(tmp_path / "run")
        generation = reference.generation_config
        assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (4096, 4097, 2)
        return
    judge, their_tokenizer = load_judge(tmp_path / "run"), AutoTokenizer.from_pretrained(tmp_path / "run")
    reference = OPTForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    rows = [judge.encode("Add.", "a + b"), judge.encode("Add the numbers.", "def add(a, b):\n    return a + b")]
    batch = their_tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    assert batch["input_ids"][0, -1] == 4097 == tokenizer.pad_token_id
    with torch.no_grad():
        scores = reference(**batch).logits.squeeze(1).tolist()
    assert scores == pytest.approx([judge.score("Add.", "a + b"), score_rows(judge.model, rows, 1)[1]], abs=1e-5)


def test_a_reward_model_whose_pad_is_its_eos_is_saved_without_a_pad(tmp_path):
    """transformers would score each row at the token before its EOS."""
    model, _ = load_for_rm(find_model(with_other_ids(tmp_path / "model", pad="<other end>")), seed=0)
    weights.save_model(model, tmp_path / "saved")
    reference = OPTForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    row = [2, 5, 6, 4096]
    with torch.no_grad():
        found = reference(input_ids=torch.tensor([row])).logits.item()
        with pytest.raises(ValueError, match="no padding token"):
            reference(input_ids=torch.tensor([row, row]))
    assert found == pytest.approx(score_rows(model, [row], 1)[0], abs=1e-5)
    assert weights.load_reward_model(tmp_path / "saved").config.eos_token_id == 4096


def test_a_pad_that_the_tokenizer_does_not_name_stays(tmp_path):
    folder = with_other_ids(tmp_path / "model", pad=None)
    loaded = load_language_model(folder)
    model, tokenizer = loaded.model, loaded.tokenizer
    assert tokenizer.pad_token_id == model.config.pad_token_id == 4096  # of a plain token: the EOS instead
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["1"] = {"content": tokenizer.decode([1], False), "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_language_model(folder).model.config.pad_token_id == 1


def test_an_eos_beyond_the_embedding_is_refused(tmp_path):
    folder = with_other_ids(tmp_path / "model")
    shutil.copy(SHIPPED / "config.json", folder)
    shutil.copy(SHIPPED / "model.safetensors", folder)
    for script in ("sft", "rm"):
        assert "its tokenizer doesn't fit: ids go up to 4097" in refused(script, *TINY, "--model", folder)


def test_a_new_reward_model_on_a_tuned_language_model(language):
    found, tokenizer = load_for_rm(find_model(language.adapters), seed=SEED)
    assert_same_weights(found, weights.load_reward_model(language.merged, seed=SEED))
    assert torch.equal(found.score.weight, weights.load_reward_model(SHIPPED, seed=SEED).score.weight)
    assert tokenizer.files == load_tokenizer(SHIPPED).files


def test_a_new_reward_model_that_continues_from_another(reward):
    found, _ = load_for_rm(find_model(reward.adapters), seed=SEED)
    assert_same_weights(found, weights.load_reward_model(reward.merged))


def test_defaults_beside_what_the_folder_holds(plain, tmp_path):
    assert load_language_model(plain.adapters).template == TEMPLATES["course"]
    assert load_language_model(plain.adapters, template="none").template == TEMPLATES["none"]
    assert load_language_model(plain.merged, template="none").template == TEMPLATES["none"]
    files = find_model(copied(plain, tmp_path / "adapters"))
    assert (files.name, files.folder, files.tokenizer_folder) == (str(files.own), SHIPPED, SHIPPED)
    save_tokenizer(load_tokenizer(SHIPPED), files.own)
    assert files.tokenizer_folder == files.own


# ------------------------------------------------------------------------------------------------ commands and scripts


def test_generate_and_preview(language, files, tmp_path, capsys):
    printed = []
    for name, folder in zip(Tuned._fields, language, strict=True):
        generate.main(["--model", str(folder), "--prompts", str(files / "prompts.jsonl"), "--max-new-tokens", "8"])
        preview.main(["--model", str(folder), "--data", str(files / "rows.jsonl"), "--out", str(tmp_path / name)])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "Below is an instruction" in printed[0]
    assert read_lines(tmp_path / "adapters") == read_lines(tmp_path / "merged")


def test_score(reward, tmp_path):
    rows = write_lines(tmp_path / "rows.jsonl", [{"prompt": "Add.", "response": text} for text in ("a + b", "a", "")])
    for name, folder in zip(Tuned._fields, reward, strict=True):
        score.main(["--model", str(folder), "--data", str(rows), "--out", str(tmp_path / name)])
    ours, theirs = ([row["score"] for row in read_lines(tmp_path / name)] for name in Tuned._fields)
    assert ours == pytest.approx(theirs, abs=1e-5) and len(set(ours)) == 3


def assert_trains_the_merged_model(script: str, tuned: Tuned, folder: Path, data: Path) -> None:
    flags = ["--data", data, "--eval-fraction", 0, "--device", "cpu", "--model"]
    ours, theirs = (task_of(script, folder / name, *flags, getattr(tuned, name)).model for name in Tuned._fields)
    assert_same_weights(ours, theirs)
    fingerprints = json.loads((folder / "adapters" / "run.json").read_text())["fingerprints"]
    own, base = tuned.adapters / "adapter_model.safetensors", SHIPPED / "model.safetensors"
    assert fingerprints["weights"] == sha256([base, own])


def test_scripts_train_a_tuned_language_model(language, files, tmp_path):
    for script, data in (("sft", files / "rows.jsonl"), ("rm", files / "pairs.jsonl")):
        assert_trains_the_merged_model(script, language, tmp_path / script, data)


def test_train_rm_continues_from_a_reward_model(reward, files, tmp_path):
    assert_trains_the_merged_model("rm", reward, tmp_path, files / "pairs.jsonl")


# ------------------------------------------------------------------------------------------- looked up and read once


@pytest.fixture
def counted(monkeypatch) -> tuple[Counter, Counter]:
    """Count how often each model name is resolved and each file opened, from now on."""
    resolved, opened = Counter(), Counter()

    def open_and_count(file, *arguments, **options):
        opened[str(file)] += 1
        return builtin_open(file, *arguments, **options)

    def resolve_and_count(name, *arguments, **options):
        resolved[str(name)] += 1
        return model_folder(name, *arguments, **options)

    builtin_open, model_folder = builtins.open, hub.model_folder
    for module in (builtins, io):  # pathlib opens files by the second
        monkeypatch.setattr(module, "open", open_and_count)
    for module in (hub, pretrained):
        monkeypatch.setattr(module, "model_folder", resolve_and_count)
    return resolved, opened


def train(script: str, model: Path, data: Path) -> None:
    flags = ["--model", model, "--data", data, "--eval-fraction", 0, "--max-steps", 1, "--lora-rank", 2]
    run(script, *flags, "--device", "cpu", "--out", data.parent / "run")


def command(module, *names: str):
    return lambda model, files: module.main(
        ["--model", str(model), *(str(files / name) if ".jsonl" in name else name for name in names)]
    )


OF_LANGUAGE_MODELS = {
    "load_language_model": lambda model, files: load_language_model(model),
    "load_for_rm": lambda model, files: load_for_rm(find_model(model), seed=SEED),
    "generate": command(generate, "--prompts", "prompts.jsonl", "--max-new-tokens", "1"),
    "preview": command(preview, "--data", "rows.jsonl"),
    "train_sft.py": lambda model, files: train("sft", model, files / "rows.jsonl"),
    "train_rm.py": lambda model, files: train("rm", model, files / "pairs.jsonl"),
}
OF_REWARD_MODELS = {
    "load_judge": lambda model, files: load_judge(model),
    "score": command(score, "--data", "pairs.jsonl"),
    "train_rm.py": OF_LANGUAGE_MODELS["train_rm.py"],
}


def assert_each_is_read_once(calls: dict, tuned: Tuned, files: Path, counted: tuple[Counter, Counter]) -> None:
    resolved, opened = counted
    for name, call in calls.items():
        times = 2 if name.startswith("train") else 1  # a run takes its fingerprint, too
        for model, base in ((tuned.adapters, SHIPPED), (tuned.merged, tuned.merged)):
            resolved.clear(), opened.clear()
            call(model, files)
            assert resolved == dict.fromkeys({str(model), str(base)}, 1)
            assert {path: opened[path] for path in opened if path.endswith("/config.json")} == {
                str(base / "config.json"): times
            }


def test_a_language_model_is_looked_up_and_read_once(plain, files, counted):
    assert_each_is_read_once(OF_LANGUAGE_MODELS, plain, files, counted)


def test_a_reward_model_is_looked_up_and_read_once(tmp_path, files, counted):
    assert_each_is_read_once(OF_REWARD_MODELS, of_save_adapters("rm", tmp_path), files, counted)


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_a_base_that_is_missing_absent_or_adapters(plain, tmp_path, files):
    """One line that names adapter_config.json, wherever the adapters are given; and nothing is written."""
    loop = tmp_path / "loop"
    mistakes = {
        copied(plain, tmp_path / "nameless", base_model_name_or_path=None): "base_model_name_or_path is None",
        copied(plain, tmp_path / "absent", base_model_name_or_path="/nowhere"): "/nowhere: no such folder",
        copied(plain, tmp_path / "remote", base_model_name_or_path="some/model"): "some/model: ",
        copied(plain, tmp_path / "branch", revision="main"): "--revision main: ",
        copied(plain, tmp_path / "chain", base_model_name_or_path=str(plain.adapters)): "is not a model but adapters",
        copied(plain, loop, base_model_name_or_path=str(loop)): "is not a model but adapters",
    }
    before, written = snapshot(tmp_path), snapshot(files)
    for folder, message in mistakes.items():
        for name, call in (OF_LANGUAGE_MODELS | OF_REWARD_MODELS).items():
            with pytest.raises(UserError) as caught:
                call(folder, files)
            assert str(caught.value).startswith(f"{folder}/adapter_config.json: "), name
            assert message in str(caught.value) and "\n" not in str(caught.value), name
    assert (snapshot(tmp_path), snapshot(files)) == (before, written)


@pytest.mark.parametrize("layout", ["bin", "config.json of the base", "both"])
def test_a_folder_of_adapters_in_other_layouts_is_a_model(plain, tmp_path, layout):
    """As .bin, the format before safetensors, and with the base model's config.json beside them."""
    folder = copied(plain, tmp_path / "adapters")
    if layout != "config.json of the base":
        safe = folder / "adapter_model.safetensors"
        torch.save(load_file(safe), folder / "adapter_model.bin")
        safe.unlink()
    if layout != "bin":
        shutil.copy(SHIPPED / "config.json", folder)
    assert find_model(folder).are_adapters and len(find_model(folder).fingerprints()["weights"]) == 64
    found, expected = (load_language_model(model).model.state_dict() for model in (folder, plain.adapters))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_adapters_that_do_not_suit_the_command_or_their_base(plain, reward, tmp_path):
    with pytest.raises(
        UserError, match="adapter_model.safetensors: no score.weight: these adapters are of a language model"
    ):
        load_judge(plain.adapters)
    with pytest.raises(
        UserError, match="has score.weight: these adapters are of a reward model, expected a language model"
    ):
        load_language_model(reward.adapters)
    folder = copied(plain, tmp_path / "adapters", target_modules=["query"])
    with pytest.raises(UserError, match="adapter_config.json: .*no linear is named query"):
        load_language_model(folder)
    state = load_file(plain.adapters / "adapter_model.safetensors")
    folder = copied(plain, tmp_path / "short")
    save_file(dict([*state.items()][1:]), folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="1 missing"):
        load_language_model(folder)
    (folder / "adapter_model.safetensors").unlink()
    for load in (load_language_model, load_judge, lambda model: load_for_rm(find_model(model), seed=SEED)):
        with pytest.raises(UserError, match="adapter_model.safetensors: no such file"):
            load(folder)
