"""Files that minift saves and transformers loads, and the other way round: weights, settings and logits unchanged.

A model that went through the other library's files must be the same model: the library that reads them computes, bit
for bit, what it computes from the original's files.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, OPTForCausalLM, OPTForSequenceClassification, PreTrainedModel

from minift.encode import Example
from minift.files.tokenizer import load_tokenizer, save_tokenizer
from minift.files.weights import config_values, load_model, load_reward_model, read_config, save_model
from tests.compare import Check, Setting
from tests.compare.model import FLOAT32, models_and_rows, relative
from tests.compare.tokenizer import as_pieces, hard_texts
from tests.compare.training import quiet
from tests.reference import logits_of, own_name, reference_logits, reference_rewards, rewards_of

SECTION = "files"
SEED = 0
SHARD = 0.3  # the largest fraction of the weights in one file of several
LAST = 3  # the last token of every row: transformers does not read a reward at a pad


def compare(setting: Setting) -> Iterator[Check]:
    # One architecture is enough to exercise everything: the one with projections and biases.
    chosen = [*models_and_rows(setting)][1:2] if setting.quick else models_and_rows(setting)
    for name, folder, examples in chosen:
        setting.progress(f"files: {name}")
        for section in (minift_to_transformers, transformers_to_minift, reward_models):
            with quiet(), torch.no_grad():
                yield from section(name, folder, examples, setting.scratch / "files")
            shutil.rmtree(setting.scratch / "files")
    yield from tokenizers(setting)


def minift_to_transformers(name: str, folder: Path, examples: list[Example], out: Path) -> list[Check]:
    original = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights, config = weights_of(original), config_values(read_config(folder)[0])
    rows = [ids for ids, _ in examples]
    logits = reference_logits(original, rows)  # (N, V)
    wrong = 0
    for dtype in (torch.float32, torch.float16):
        save_model(load_model(folder), out / str(dtype), dtype)
        saved, report = OPTForCausalLM.from_pretrained(out / str(dtype), output_loading_info=True)
        wrong += sum(map(len, report.values()))  # weights that are missing, unexpected or of another shape
        wrong += count_unequal(weights_of(saved), {key: tensor.to(dtype) for key, tensor in weights.items()})
        wrong += sum(getattr(saved.config, key, None) != value for key, value in config.items())
        if dtype == torch.float32:
            wrong += int((reference_logits(saved, rows) != logits).sum())
    on = f"{name}: {len(weights)} tensors in float32 and float16, {logits.numel():,} logits, {len(config)} settings"
    return [Check(SECTION, "minift saves, transformers loads", on, wrong, 0)]


def transformers_to_minift(name: str, folder: Path, examples: list[Example], out: Path) -> list[Check]:
    original = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = weights_of(original)
    logits = logits_of(load_model(folder).eval(), examples)  # (N, V)
    wrong = 0
    for layout, save in LAYOUTS.items():
        save(original, out / layout)
        loaded = load_model(out / layout).eval()
        wrong += count_unequal(loaded.state_dict(), weights)
        wrong += int((logits_of(loaded, examples) != logits).sum())
        wrong += read_config(out / layout)[0] != read_config(folder)[0]
    on = f"{name}: {len(weights)} tensors and {logits.numel():,} logits, as {', '.join(LAYOUTS)}"
    return [Check(SECTION, "transformers saves, minift loads", on, wrong, 0)]


def reward_models(name: str, folder: Path, examples: list[Example], out: Path) -> list[Check]:
    """Compare the rewards that both libraries compute from the same files, not bit for bit: the code differs."""
    rows = [[*ids[:-1], LAST] for ids, _ in examples]
    ours = load_reward_model(folder, seed=SEED)
    save_model(ours, out / "ours")
    read, report = OPTForSequenceClassification.from_pretrained(out / "ours", output_loading_info=True)
    torch.manual_seed(SEED)
    theirs = OPTForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    theirs.save_pretrained(out / "theirs")
    on = f"{name}: {len(rows)} rows"
    checks = []
    for what, minift, transformers, refused in (
        ("a reward model that minift saves, transformers loads", ours, read, sum(map(len, report.values()))),
        ("a reward model that transformers saves, minift loads", load_reward_model(out / "theirs"), theirs, 0),
    ):
        difference = relative(rewards_of(minift.eval(), rows), reference_rewards(transformers, rows))
        note = f"{refused} weights missing or unexpected" if refused else ""
        checks.append(Check(SECTION, what, on, float("inf") if refused else difference, FLOAT32, note))
    return checks


@quiet()
def tokenizers(setting: Setting) -> list[Check]:
    ours, reference = load_tokenizer(setting.model), AutoTokenizer.from_pretrained(setting.model)
    save_tokenizer(ours, setting.scratch / "our tokenizer")
    reference.save_pretrained(setting.scratch / "their tokenizer")
    read = AutoTokenizer.from_pretrained(setting.scratch / "our tokenizer")
    loaded = load_tokenizer(setting.scratch / "their tokenizer")
    texts = hard_texts(reference.all_special_tokens, 300)
    pieces = [as_pieces(text, reference.all_special_tokens) for text in texts]
    names = ("bos_token", "eos_token")
    read_wrong = sum(read(text).input_ids != reference(text).input_ids for text in texts)
    read_wrong += sum(getattr(read, name) != getattr(reference, name) for name in (*names, "pad_token"))
    loaded_wrong = sum(loaded.encode(given) != ours.encode(given) for given in pieces)
    loaded_wrong += sum(getattr(loaded, name) != getattr(ours, name) for name in (*names, "pad_token_id"))
    on = f"{len(texts)} strings"
    return [
        Check(SECTION, "a tokenizer that minift saves, transformers loads", on, read_wrong, 0),
        Check(SECTION, "a tokenizer that transformers saves, minift loads", on, loaded_wrong, 0),
    ]


def save_whole(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


def save_sharded(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size=int(SHARD * sum(4 * tensor.numel() for tensor in model.parameters())))


def save_pickled(model: PreTrainedModel, folder: Path) -> None:
    """Save as the hub has facebook/opt-350m: a pickle, names without `model.`, the tied head not stored."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    torch.save(weights_of(model), folder / "pytorch_model.bin")


LAYOUTS: dict[str, Callable[[PreTrainedModel, Path], None]] = {
    "one file": save_whole,
    "shards": save_sharded,
    "pytorch_model.bin": save_pickled,
}


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {own_name(name): tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}


def count_unequal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> int:
    """Count the tensors that only one side has, or that differ in type, shape or any number."""
    both = found.keys() & expected.keys()
    changed = sum(found[name].dtype != expected[name].dtype or not found[name].equal(expected[name]) for name in both)
    return changed + len(found.keys() ^ expected.keys())
