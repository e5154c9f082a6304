"""Record in old_collator.json what trl 0.11.4's `DataCollatorForCompletionOnlyLM` makes of rows, failures included.

That trl does not work with today's packages, so this script needs another environment. From the repository's root:

    python3.11 -m venv /tmp/old
    /tmp/old/bin/python -m pip install torch==2.13.0 "numpy<2" pyarrow==17.0.0 rich==15.0.0 \\
        transformers==4.43.4 trl==0.11.4 peft==0.14.0 datasets==3.2.0 accelerate==0.34.2
    /tmp/old/bin/python -m tests.compare.record_old_collator

What fails depends on the vocabulary. Given a folder with facebook/opt-350m's vocab.json, merges.txt and
tokenizer_config.json, the script also records the cases with OPT's own vocabulary; otherwise it keeps the earlier ones.

The collator searches the ids of the whole text for those of the response template tokenised alone, and supervises what
follows the last match. minift is not imported, so that the record does not depend on it.
"""

import hashlib
import json
import sys
import warnings
from pathlib import Path

from transformers import AutoTokenizer
from trl import DataCollatorForCompletionOnlyLM

from tests.compare import digest

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).with_name("old_collator.json")
SHIPPED, OPT = "data/model", "facebook/opt-350m"
DATA = "data/instructions.jsonl"
ROWS_A_DIGEST = 100
COURSE = "### Response:\n"

ASK = "Write a function that doubles."
ANSWER = "def double(number):\n    return 2 * number"
# A row, which goes through the course's template, or a text; and an explanation if the collator fails. `minift` says
# what minift does then: "supervised" are the response and its end token, "dropped" is a row that it names.
CASES = [
    {"name": "a row without input", "row": {"instruction": ASK, "output": ANSWER}},
    {"name": "a row with input", "row": {"instruction": "Sort them.", "input": "3, 1, 2", "output": "1, 2, 3"}},
    {"name": "an empty response", "row": {"instruction": "Say nothing.", "output": ""}},
    {"name": "a response that begins with a space", "row": {"instruction": ASK, "output": " see above"}},
    {"name": "a response in other scripts", "row": {"instruction": "Größe?", "output": "大きい 😀 e\u0301"}},
    {"name": "a response cut short", "row": {"instruction": ASK, "output": ANSWER}, "max_length": 30},
    {
        "name": "two turns in one text",
        "text": f"### Instruction:\nHi.\n\n{COURSE}Hello.\n\n### Instruction:\nBye.\n\n{COURSE}See you.</s>",
        "completion": "See you.",
    },
    {
        "name": "blank lines before the response",
        "row": {"instruction": ASK, "output": f"\n\n{ANSWER}"},
        "minift": "supervised",
        "explanation": "The template's last token, a line end, becomes one token with the response's first: the "
        "template's ids are not in the text, and nothing is supervised.",
    },
    {
        "name": "an indented response",
        "only": SHIPPED,
        "row": {"instruction": "Complete the body.", "output": "    return 2 * number"},
        "minift": "supervised",
        "explanation": "The template's line end and the response's indent are one token of this vocabulary: nothing is "
        "supervised. OPT's own vocabulary does not have this token, and the collator handles the row.",
    },
    {
        "name": "a template that ends in a space",
        "text": f"### Instruction: {ASK} ### Response: {ANSWER}</s>",
        "response_template": "### Response: ",
        "completion": ANSWER,
        "minift": "supervised",
        "explanation": "Byte-level BPE puts a space into the token of the next word; alone at the template's end it is "
        "another token, which the text does not have: nothing is supervised.",
    },
    {
        "name": "a template from the middle of a line",
        "row": {"instruction": ASK, "output": ANSWER},
        "response_template": "Response:\n",
        "minift": "supervised",
        "explanation": "In the text the word's token includes the space before it; tokenised alone, the template "
        "begins with another token: nothing is supervised.",
    },
    {
        "name": "a template in another case",
        "text": f"### Instruction:\n{ASK}\n\n### response:\n{ANSWER}</s>",
        "completion": ANSWER,
        "minift": "dropped",
        "explanation": "The template is not in the text; the row stays in the batch with nothing supervised, and a "
        "batch of only such rows has the loss NaN, the mean of nothing.",
    },
    {
        "name": "a response that quotes the template",
        "row": {"instruction": "Show a prompt.", "output": f"It ends in:\n{COURSE}and then the answer."},
        "minift": "supervised",
        "explanation": "The last match is the quotation: the response before it counts as the prompt.",
    },
    {
        "name": "the end token for padding",
        "row": {"instruction": ASK, "output": ANSWER},
        "pad_token": "</s>",
        "minift": "supervised",
        "explanation": "Labels are masked where they have the padding's id, which is also that of every end token: the "
        "model never learns to stop.",
    },
    {
        "name": "no end token in the text",
        "text": f"### Instruction:\n{ASK}\n\n{COURSE}{ANSWER}",
        "completion": ANSWER,
        "minift": "supervised",
        "explanation": "The collator adds none: the model never learns to stop.",
    },
    {
        "name": "a response that spells the end token",
        "row": {"instruction": "How does a text end?", "output": "With `</s>`, like this."},
        "minift": "supervised",
        "explanation": "The four characters become the token itself: the model learns to stop in the middle, and a "
        "row's text can end its response.",
    },
    {
        "name": "a response that spells the padding token",
        "row": {"instruction": "How are texts padded?", "output": "With `<pad>`, on the right."},
        "minift": "supervised",
        "explanation": "The characters become the token itself, whose label is masked as if it were padding.",
    },
    {
        "name": "a prompt that fills the length",
        "row": {"instruction": ASK, "output": ANSWER},
        "max_length": 12,
        "minift": "dropped",
        "explanation": "The template is cut off with the response: nothing is supervised, and a warning suggests a "
        "larger length.",
    },
]


def main() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    folders = {SHIPPED: ROOT / SHIPPED} | ({OPT: Path(sys.argv[1])} if len(sys.argv) > 1 else {})
    for name, folder in folders.items():
        cases = [record(case, folder) for case in CASES if case.get("only", name) == name]
        recorded[name] = {"merges": hashlib.sha256((folder / "merges.txt").read_bytes()).hexdigest(), "cases": cases}
    recorded[SHIPPED] |= record_data(ROOT / SHIPPED)
    RECORDED.write_text(readable(recorded) + "\n", encoding="utf-8")


def record(case: dict, folder: Path) -> dict:
    """Return a case as the file has it. It is collated beside a longer row, so that there is padding."""
    response_template = case.get("response_template", COURSE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = case.get("pad_token", tokenizer.pad_token)
    text = case.get("text") or course_text(case["row"])
    (ids, labels), _ = collate([text, 9 * text], tokenizer, response_template, case.get("max_length"))
    known = {"name": case["name"], "row": case.get("row", {"text": text}), "response_template": response_template}
    known |= {"max_length": case.get("max_length"), "completion": case.get("completion") or case["row"]["output"]}
    why = {key: case[key] for key in ("minift", "explanation") if key in case}
    return known | why | {"input_ids": ids, "labels": labels}


def record_data(folder: Path) -> dict:
    """Return digests of the ids and labels of every row of the shipped data, and the rows that it cannot use."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (ROOT / DATA).read_text(encoding="utf-8").splitlines()]
    digests, not_found = [], []
    for start in range(0, len(rows), ROWS_A_DIGEST):
        texts = [course_text(row) for row in rows[start : start + ROWS_A_DIGEST]]
        collated = collate(texts, tokenizer, COURSE, None)
        not_found += [start + number for number, (_, labels) in enumerate(collated) if set(labels) == {-100}]
        digests.append(digest(collated))
    return {"rows_a_digest": ROWS_A_DIGEST, "rows": len(rows), "not_found": not_found, "digests": digests}


def course_text(row: dict) -> str:
    given = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
    return f"### Instruction:\n{row['instruction']}\n\n{given}{COURSE}{row['output']}</s>"


def collate(texts: list[str], tokenizer, response_template: str, max_length: int | None) -> list:
    """Collate texts in one batch; return input_ids and labels of each without the padding."""
    encoded = [tokenizer(text, truncation=max_length is not None, max_length=max_length) for text in texts]
    collator = DataCollatorForCompletionOnlyLM(response_template, tokenizer=tokenizer)
    with warnings.catch_warnings(action="ignore"):  # one for each row that it cannot use
        batch = collator([dict(row) for row in encoded])
    lengths = [len(row.input_ids) for row in encoded]
    columns = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), lengths, strict=True)
    return [[ids[:length], labels[:length]] for ids, labels, length in columns]


def readable(recorded: dict) -> str:
    """Return JSON with one field of a case in each line."""
    parts = []
    for name, part in recorded.items():
        cases = [",\n".join(f"   {json.dumps(key)}: {json.dumps(case[key])}" for key in case) for case in part["cases"]]
        rest = "".join(f",\n  {json.dumps(key)}: {json.dumps(part[key])}" for key in part if key != "cases")
        joined = ",\n".join(f"  {{\n{case}\n  }}" for case in cases)
        parts.append(f' {json.dumps(name)}: {{\n  "cases": [\n{joined}\n  ]{rest}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}"


if __name__ == "__main__":
    main()
