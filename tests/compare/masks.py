"""Ids and labels: against trl's `SFTTrainer` on every row of the data, against trl 0.11.4's collator as recorded.

The old collator is not run here, as its trl can't share an environment with today's: record_old_collator.py wrote down
what it made of some rows, where it fails and why, into old_collator.json.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from minift.datasets import Row, load_rows
from minift.encode import UNSUPERVISED, Example, encode_rows, is_text_row
from minift.errors import UserError
from minift.prompts import TEMPLATES, Template, render
from minift.tokenizer import Tokenizer, load_tokenizer
from minift.weights import read_config
from tests.compare import Check, Setting
from tests.compare.training import quiet

SECTION = "masks"
ROOT = Path(__file__).parents[2]
SHIPPED = "data/model"
SHIPPED_MODEL, SHIPPED_DATA = ROOT / SHIPPED, ROOT / "data" / "instructions.jsonl"
COURSE = TEMPLATES["course"]
LONGEST = 1024  # trl's default max_length
SOME_ROWS, QUICK_ROWS, QUICK_DIGESTS = 1000, 60, 2
# Beside a row that may be dropped: minift refuses rows of which none is left.
FILLER = {"prompt": "a", "completion": "b"}


def compare(setting: Setting) -> Iterator[Check]:
    yield from against_trl(setting)
    yield from against_old_collator(setting)


# ------------------------------------------------------------------------------------------------------------ trl 1.16


def against_trl(setting: Setting) -> Iterator[Check]:
    reference, ours = AutoTokenizer.from_pretrained(setting.model), load_tokenizer(setting.model)
    longest = min(LONGEST, read_config(setting.model / "config.json").max_position_embeddings)
    rows = load_rows(setting.data)[: QUICK_ROWS if setting.quick else None]
    some = rows[:SOME_ROWS]
    plan = [(COURSE, longest, rows), (COURSE, min(lowest_tenth(some, ours), longest), some)]
    if "instruction" in rows[0]:
        others = [template for template in TEMPLATES.values() if template is not COURSE]
        plan += [(template, longest, some) for template in (others[:1] if setting.quick else others)]
    for template, max_length, part in plan:
        setting.progress(f"masks: {len(part):,} rows, template {template.name}, at most {max_length} tokens")
        yield compare_rows(setting, part, template, max_length, ours, reference)


def lowest_tenth(rows: Sequence[Row], ours: Tokenizer) -> int:
    """A length in tokens that cuts nine rows of ten, many of them before the response, and leaves one whole."""
    texts = [prompt_and_completion(row, COURSE, ours) for row in rows]
    lengths = sorted(len(ours.encode("".join(text))) + 1 for text in texts if text is not None)
    return lengths[len(lengths) // 10] if lengths else 1


def compare_rows(
    setting: Setting,
    rows: Sequence[Row],
    template: Template,
    max_length: int,
    ours: Tokenizer,
    reference: PreTrainedTokenizerBase,
) -> Check:
    names = reference.all_special_tokens
    texts = [prompt_and_completion(row, template, ours) for row in rows]
    usable = [place for place, text in enumerate(texts) if text is not None]
    plain = [place for place in usable if not spells_special(*texts[place], ours.eos_token, names)]
    if not plain:
        what = f"lacks {template.response_template!r} or spells {' or '.join(names)}"
        raise UserError(f"{setting.data}: none of its {len(rows)} rows can be compared: each {what}")
    chosen = [rows[place] for place in plain]
    examples, kept, report = encode_rows(chosen, ours, template, max_length=max_length, source=str(setting.data))
    expected = trl_labels({place: texts[place] for place in plain}, max_length, reference, setting.scratch)
    found = {plain[index]: example for index, example in zip(kept, examples, strict=True)}
    wrong = [place for place in plain if found.get(place) != expected.get(place)]
    labels = sum(label != UNSUPERVISED for example in found.values() for label in example.labels)
    on = f"{len(plain):,} rows, {report.tokens:,} tokens, {labels:,} labels"
    cut = sum(len(places) for what, places in report.befell.items() if what.startswith("cut at"))
    if cut or len(kept) < len(plain):
        on += f"; {cut:,} rows cut, {len(plain) - len(kept):,} dropped"
    notes = [f"the first: {rows[wrong[0]].place}"] if wrong else []
    if len(plain) < len(usable):
        notes.append(
            f"{len(usable) - len(plain)} rows left out that spell {' or '.join(names)}: text here, a token there"
        )
    if len(usable) < len(rows):
        notes.append(f"{len(rows) - len(usable)} rows left out without the response template")
    what = f"ids, labels: SFTTrainer, template {template.name}, {max_length} tokens"
    return Check(SECTION, what, on, len(wrong), 0, "; ".join(notes))


def prompt_and_completion(row: Row, template: Template, ours: Tokenizer) -> tuple[str, str] | None:
    """A row as trl takes it; None for a text that has no response to be found."""
    if not is_text_row(row):
        prompt, completion = render(row, template, ours.eos_token, ours.bos_token)
        return "".join(prompt), "".join(completion)
    start = row["text"].rfind(template.response_template) + len(template.response_template)
    return (row["text"][:start], row["text"][start:]) if template.response_template in row["text"] else None


def spells_special(prompt: str, completion: str, eos_token: str, names: Sequence[str]) -> bool:
    return any(name in part for name in names for part in (prompt, completion.removesuffix(eos_token)))


@quiet()
def trl_labels(
    texts: dict[int, tuple[str, str]], max_length: int, reference: PreTrainedTokenizerBase, scratch: Path
) -> dict[int, Example]:
    """What trl's own preparation of a data set makes of prompts and completions, less the rows that it drops."""
    rows = [
        {"place": place, "prompt": prompt, "completion": completion} for place, (prompt, completion) in texts.items()
    ]
    # The trainer wants a model, of which the preparation makes no use.
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "ffn_dim": 8, "word_embed_proj_dim": 8}
    model = OPTForCausalLM(OPTConfig(vocab_size=len(reference), max_position_embeddings=max_length, **sizes))
    config = SFTConfig(output_dir=str(scratch / "masks"), max_length=max_length, report_to="none", use_cpu=True)
    trainer = SFTTrainer(model, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=reference)
    prepared = trainer.train_dataset
    columns = zip(prepared["place"], prepared["input_ids"], prepared["labels"], strict=True)
    # A label on the first token alone is never predicted: minift drops such a row.
    return {place: Example(ids, labels) for place, ids, labels in columns if set(labels[1:]) - {UNSUPERVISED}}


# ------------------------------------------------------------------------------------------------------------ trl 0.11


def against_old_collator(setting: Setting) -> Iterator[Check]:
    setting.progress("masks: the collator of trl 0.11.4, as recorded")
    recorded = json.loads(Path(__file__).with_name("old_collator.json").read_text(encoding="utf-8"))
    for name, part in recorded.items():
        # What it makes of a row depends on the vocabulary. The shipped one is always there, OPT's with OPT's models.
        if name == SHIPPED:
            yield from replay(name, part["cases"], load_tokenizer(SHIPPED_MODEL))
        elif fingerprint(setting.model / "merges.txt") == part["merges"]:
            yield from replay(name, part["cases"], load_tokenizer(setting.model))
    yield compare_digests(recorded[SHIPPED], load_tokenizer(SHIPPED_MODEL), setting.quick)


def replay(name: str, cases: Sequence[dict], tokenizer: Tokenizer) -> Iterator[Check]:
    works = [case for case in cases if "explanation" not in case]
    fails = [case for case in cases if "explanation" in case]
    what = f"ids, labels: trl 0.11.4's collator, vocabulary of {name}"
    wrong = [case["name"] for case in works if encode_case(case, tokenizer)[0] != (case["input_ids"], case["labels"])]
    yield Check(SECTION, what, f"{len(works)} rows it can do", len(wrong), 0, "; ".join(wrong))
    what = f"labels: where that collator fails, vocabulary of {name}"
    wrong = [case["name"] for case in fails if not does_better(case, tokenizer)]
    note = f"not here: {'; '.join(wrong)}" if wrong else "minift does not; old_collator.json explains each"
    yield Check(SECTION, what, f"{len(fails)} rows", len(wrong), 0, note)


def encode_case(case: dict, tokenizer: Tokenizer) -> tuple[Example | None, list[str]]:
    """What minift makes of a recorded row: the example, or None and the places of rows that it names as dropped."""
    rows = [case["row"], FILLER]
    options = {"max_length": case["max_length"], "response_template": case["response_template"]}
    examples, kept, report = encode_rows(rows, tokenizer, COURSE, **options)
    if kept[0] == 0:
        return examples[0], []
    return None, [place for what, places in report.befell.items() if what.startswith("dropped") for place in places]


def does_better(case: dict, tokenizer: Tokenizer) -> bool:
    """Whether minift supervises the response and its end token, whole and alone, or names the row that it drops; and
    whether what is recorded is a failure at all."""
    example, dropped = encode_case(case, tokenizer)
    if case["minift"] == "dropped":
        return dropped == ["row 1"] and set(case["labels"]) == {UNSUPERVISED}
    if example is None or example.labels == case["labels"]:
        return False
    supervised = [label for label in example.labels if label != UNSUPERVISED]
    text = tokenizer.decode(supervised[:-1], skip_special_tokens=False)
    # Of the first token, which may begin in the prompt, the response needs at least a part.
    rest = tokenizer.decode(supervised[1:-1], skip_special_tokens=False)
    is_whole = text.endswith(case["completion"]) and len(rest) < len(case["completion"])
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    ends = supervised[-1] == example.input_ids[-1] == tokenizer.eos_token_id and not special & {*supervised[:-1]}
    return is_whole and ends


def compare_digests(recorded: dict, tokenizer: Tokenizer, quick: bool) -> Check:
    """The collator's labels of all shipped rows: digests of a hundred rows each are all that is kept of them."""
    size = recorded["rows_a_digest"]
    digests = recorded["digests"][: QUICK_DIGESTS if quick else None]
    rows = load_rows(SHIPPED_DATA)[: len(digests) * size]
    examples, kept, _ = encode_rows(rows, tokenizer, COURSE, max_length=None)
    found = [digest(examples[start : start + size]) for start in range(0, len(examples), size)]
    found += [""] * (len(digests) - len(found))
    wrong = [place for place, expected in enumerate(digests) if found[place] != expected]
    what = f"ids, labels: trl 0.11.4's collator, shipped data in lots of {size}"
    on = f"{len(rows):,} rows, {len(recorded['not_found'])} of which it can't do"
    note = (
        f"from row {wrong[0] * size + 1} on; after a change of data/, run record_old_collator.py again" if wrong else ""
    )
    return Check(SECTION, what, on, len(wrong), 0, note)


def digest(rows: Sequence[Sequence]) -> str:
    """As record_old_collator.py makes them."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def fingerprint(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
