"""Ids and labels: against trl's `SFTTrainer` on every row of the data, against trl 0.11.4's collator as recorded.

The old collator does not run here, because its trl and today's need different environments. record_old_collator.py
wrote old_collator.json: what the collator makes of some rows, where it fails and why.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerBase
from trl import SFTTrainer

from minift.encode import IGNORE_INDEX, Example, encode_rows
from minift.errors import UserError
from minift.files.datasets import Row, load_rows
from minift.files.text import sha256
from minift.files.tokenizer import load_tokenizer
from minift.prompts import TEMPLATES, Template, is_text_row, render, trailing_blanks
from minift.tokenizer import Tokenizer
from tests.compare import Check, Setting, digest
from tests.compare.training import last_turns, length_limit, make_trainer, quiet

SECTION = "masks"
ROOT = Path(__file__).parents[2]
SHIPPED = "data/model"
SHIPPED_MODEL, SHIPPED_DATA = ROOT / SHIPPED, ROOT / "data" / "instructions.jsonl"
COURSE = TEMPLATES["course"]
SOME_ROWS, QUICK_ROWS, QUICK_DIGESTS = 1000, 60, 2
# Encoded beside a row that may be dropped: minift refuses data of which no row is left.
FILLER = {"prompt": "a", "completion": "b"}


def compare(setting: Setting) -> Iterator[Check]:
    yield from against_trl(setting)
    yield from against_old_collator(setting)


# ------------------------------------------------------------------------------------------------------------ trl 1.16


def against_trl(setting: Setting) -> Iterator[Check]:
    reference, ours = AutoTokenizer.from_pretrained(setting.model), load_tokenizer(setting.model)
    limit = length_limit(setting)
    rows = last_turns(setting.data)[: QUICK_ROWS if setting.quick else None]
    some = rows[:SOME_ROWS]
    plan = [(COURSE, limit, rows), (COURSE, min(short_limit(some, ours), limit), some)]
    if "instruction" in rows[0]:
        others = [template for template in TEMPLATES.values() if template is not COURSE]
        plan += [(template, limit, some) for template in (others[:1] if setting.quick else others)]
    for template, max_length, part in plan:
        setting.progress(f"masks: {len(part):,} rows, template {template.name}, at most {max_length} tokens")
        yield compare_rows(setting, part, template, max_length, ours, reference)


def short_limit(rows: Sequence[Row], ours: Tokenizer) -> int:
    """Return a length in tokens that cuts nine rows in ten, many of them before the response."""
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
    usable = [number for number, text in enumerate(texts) if text is not None]
    plain = [number for number in usable if not spells_special(*texts[number], ours.eos_token, names)]
    if not plain:
        what = f"lacks {template.marker!r} or spells {' or '.join(names)}"
        raise UserError(f"{setting.data}: none of its {len(rows)} rows can be compared: each {what}")
    chosen = [rows[number] for number in plain]
    encoded = encode_rows(chosen, ours, template, max_length=max_length, source=str(setting.data))
    expected = trl_examples({number: texts[number] for number in plain}, max_length, reference, setting.scratch)
    found = {plain[index]: example for index, example in zip(encoded.indices, encoded.examples, strict=True)}
    wrong = [number for number in plain if found.get(number) != expected.get(number)]
    on = f"{len(plain):,} rows, {encoded.tokens:,} tokens, {encoded.supervised_tokens:,} labels"
    cut = sum(len(locations) for remark, locations in encoded.remarks.items() if remark.startswith("cut at"))
    if cut or len(found) < len(plain):
        on += f"; {cut:,} rows cut, {len(plain) - len(found):,} dropped"
    notes = [f"the first: {rows[wrong[0]].location}"] if wrong else []
    if len(plain) < len(usable):
        spelled = f"spell {' or '.join(names)}: text for minift, a token for trl"
        notes.append(f"without {len(usable) - len(plain)} rows that {spelled}")
    if len(usable) < len(rows):
        notes.append(f"without {len(rows) - len(usable)} rows that lack the response template")
    what = f"ids, labels: SFTTrainer, template {template.name}, {max_length} tokens"
    return Check(SECTION, what, on, len(wrong), 0, "; ".join(notes))


def prompt_and_completion(row: Row, template: Template, ours: Tokenizer) -> tuple[str, str] | None:
    """Return a row as trl takes it; None for a text that lacks the response template."""
    if not is_text_row(row):
        prompt, completion = render(row, template, ours)
        return "".join(prompt), "".join(completion)
    marker = template.marker
    start = row["text"].rfind(marker) + len(marker) - len(trailing_blanks(marker))
    return (row["text"][:start], row["text"][start:]) if template.marker in row["text"] else None


def spells_special(prompt: str, completion: str, eos_token: str, names: Sequence[str]) -> bool:
    return any(name in part for name in names for part in (prompt, completion.removesuffix(eos_token)))


@quiet()
def trl_examples(
    texts: dict[int, tuple[str, str]], max_length: int, reference: PreTrainedTokenizerBase, scratch: Path
) -> dict[int, Example]:
    """Return the examples that trl makes of numbered prompts and completions, except those without a label to learn."""
    rows = [{"number": number, "prompt": prompt, "completion": text} for number, (prompt, text) in texts.items()]
    # The trainer needs a model, but preparing the data does not use it.
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "ffn_dim": 8, "word_embed_proj_dim": 8}
    model = OPTForCausalLM(OPTConfig(vocab_size=len(reference), max_position_embeddings=max_length, **sizes))
    prepared = make_trainer(SFTTrainer, model, reference, rows, scratch, max_length=max_length).train_dataset
    columns = zip(prepared["number"], prepared["input_ids"], prepared["labels"], strict=True)
    # The label of the first token is never predicted: minift drops a row with no other.
    return {number: Example(ids, labels) for number, ids, labels in columns if set(labels[1:]) - {IGNORE_INDEX}}


# ------------------------------------------------------------------------------------------------------------ trl 0.11


def against_old_collator(setting: Setting) -> Iterator[Check]:
    setting.progress("masks: the collator of trl 0.11.4, as recorded")
    merges = setting.model / "merges.txt"
    recorded = json.loads(Path(__file__).with_name("old_collator.json").read_text(encoding="utf-8"))
    for name, part in recorded.items():
        # The result depends on the vocabulary. The shipped one is always there, OPT's only in the setting's own model.
        if name == SHIPPED:
            yield from replay(name, part["cases"], load_tokenizer(SHIPPED_MODEL))
        elif merges.is_file() and sha256([merges]) == part["merges"]:
            yield from replay(name, part["cases"], load_tokenizer(setting.model))
    yield compare_digests(recorded[SHIPPED], load_tokenizer(SHIPPED_MODEL), setting.quick)


def replay(name: str, cases: Sequence[dict], tokenizer: Tokenizer) -> Iterator[Check]:
    works = [case for case in cases if "explanation" not in case]
    fails = [case for case in cases if "explanation" in case]
    what = f"ids, labels: trl 0.11.4's collator, vocabulary of {name}"
    wrong = [case["name"] for case in works if encode_case(case, tokenizer)[0] != (case["input_ids"], case["labels"])]
    yield Check(SECTION, what, f"{len(works)} rows that it handles", len(wrong), 0, "; ".join(wrong))
    what = f"labels: where that collator fails, vocabulary of {name}"
    wrong = [case["name"] for case in fails if not does_better(case, tokenizer)]
    note = f"not here: {'; '.join(wrong)}" if wrong else "minift does not; old_collator.json explains each"
    yield Check(SECTION, what, f"{len(fails)} rows", len(wrong), 0, note)


def encode_case(case: dict, tokenizer: Tokenizer) -> tuple[Example | None, list[str]]:
    """Encode a recorded row; return the example, or None and the locations of the rows that minift names as dropped."""
    rows = [case["row"], FILLER]
    options = {"max_length": case["max_length"], "response_template": case["response_template"]}
    encoded = encode_rows(rows, tokenizer, COURSE, **options)
    if encoded.indices[0] == 0:
        return encoded.examples[0], []
    dropped = [locations for remark, locations in encoded.remarks.items() if remark.startswith("dropped")]
    return None, [location for locations in dropped for location in locations]


def does_better(case: dict, tokenizer: Tokenizer) -> bool:
    """Return whether the recorded labels are a failure and minift's are not.

    minift must supervise the whole response, its end token, and nothing else, or name the row as dropped.
    """
    example, dropped = encode_case(case, tokenizer)
    if case["minift"] == "dropped":
        return dropped == ["row 1"] and set(case["labels"]) == {IGNORE_INDEX}
    if example is None or example.labels == case["labels"]:
        return False
    supervised = [label for label in example.labels if label != IGNORE_INDEX]
    text = tokenizer.decode(supervised[:-1], skip_special_tokens=False)
    # The first token may begin in the prompt, but must contain a part of the response.
    rest = tokenizer.decode(supervised[1:-1], skip_special_tokens=False)
    is_whole = text.endswith(case["completion"]) and len(rest) < len(case["completion"])
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    ends = supervised[-1] == example.input_ids[-1] == tokenizer.eos_token_id and not special & {*supervised[:-1]}
    return is_whole and ends


def compare_digests(recorded: dict, tokenizer: Tokenizer, quick: bool) -> Check:
    """Compare the collator's labels of all shipped rows, of which only a digest per hundred rows is recorded."""
    size = recorded["rows_a_digest"]
    digests = recorded["digests"][: QUICK_DIGESTS if quick else None]
    rows = load_rows(SHIPPED_DATA)[: len(digests) * size]
    examples = encode_rows(rows, tokenizer, COURSE, max_length=None).examples
    found = [digest(examples[start : start + size]) for start in range(0, len(examples), size)]
    found += [""] * (len(digests) - len(found))
    wrong = [number for number, expected in enumerate(digests) if found[number] != expected]
    what = f"ids, labels: trl 0.11.4's collator, shipped data, {size} rows a digest"
    on = f"{len(rows):,} rows, {len(recorded['not_found'])} of which it cannot use"
    note = f"from row {wrong[0] * size + 1} on; if data/ changed, run record_old_collator.py again" if wrong else ""
    return Check(SECTION, what, on, len(wrong), 0, note)
