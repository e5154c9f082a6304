"""What a tuned model is asked, what it answers, and how close that is: held-out prompts and BLEU, by the rows' kind."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub.utils import tqdm

from minift.bleu import corpus_bleu
from minift.encode import is_text_row, prompt_ids_and_reference
from minift.generate import Options, generate
from minift.model import OPT
from minift.prompts import Template
from minift.tokenizer import Special, Tokenizer

MOST_KINDS = 20  # a field that tells more kinds than this is no kind


class Question(NamedTuple):
    """A held-out prompt as ids, the answer it should get, the tokens of that with its end, and the row's `kind`."""

    prompt_ids: list[int]
    reference: str
    reference_length: int
    kind: str | None


def questions(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: Template,
    response_template: str | None,
    *,
    how_many: int,
    positions: int,
    plain_text: bool,
) -> list[Question]:
    """The first `how_many` rows that can be asked: with a prompt, and room for prompt and reference in `positions`.

    `plain_text` says that `text` rows were learned whole, so that they hold no question.
    """
    asked: list[Question] = []
    for row in rows:
        if len(asked) == how_many:
            break
        if plain_text and is_text_row(row):
            continue
        prompt_ids, reference = prompt_ids_and_reference(row, tokenizer, template, response_template)
        length = len(tokenizer.encode([reference, Special(tokenizer.eos_token)]))
        if prompt_ids and len(prompt_ids) + length <= positions:
            kind = row.get("kind")
            asked.append(Question(prompt_ids, reference, length, kind if isinstance(kind, str) else None))
    return asked


def answer(model: OPT, tokenizer: Tokenizer, asked: Sequence[Question], description: str) -> list[str]:
    """The model's greedy answers, none longer than the longest reference."""
    room = model.config.max_position_embeddings - max(len(question.prompt_ids) for question in asked)
    longest = max(question.reference_length for question in asked)
    options = Options(max_new_tokens=min(room, longest), eos_token_id=tokenizer.eos_token_id)
    with tqdm(total=len(asked), desc=description, unit="answer") as bar:
        completions = generate(model, [question.prompt_ids for question in asked], options, bar.update)
    return [tokenizer.decode(ids) for (ids,) in completions]


def bleu_by_kind(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU (sacreBLEU's, 0 to 100) over all answers, under "all", and over each kind's where rows have one."""
    kinds = {question.kind for question in asked} - {None, "all"}
    scores = {}
    for kind in ["all", *(sorted(kinds) if len(kinds) <= MOST_KINDS else [])]:
        chosen = [i for i, question in enumerate(asked) if kind in ("all", question.kind)]
        references = [asked[i].reference for i in chosen]
        scores[kind] = corpus_bleu([answers[i] for i in chosen], [references]).score
    return scores
