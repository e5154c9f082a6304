"""What a tuned model is asked, what it answers, and how close that is: held-out prompts and BLEU, by the rows' kind."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm

from minift.bleu import corpus_bleu
from minift.datasets import Row
from minift.encode import is_text_row, prompt_ids_and_reference
from minift.errors import UserError
from minift.generate import Options, check_prompt, generate
from minift.model import OPT
from minift.prompts import Template, render_prompt, template_of
from minift.tokenizer import Special, Tokenizer, check_fits, load_tokenizer
from minift.weights import load_model, resolve

MOST_KINDS = 20  # a field that tells more kinds than this is no kind


def load_and_prompt(
    name: str,
    rows: Sequence[Row],
    template: str | None,
    *,
    source: str,
    max_new_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[OPT, Tokenizer, list[list[int]]]:
    """A language model (directory or hub id), its tokenizer, and the ids that it completes rows from.

    `template` is a name or file; if None, that of the run which left the model, or `course`. `source` is what messages
    call the rows. Raises UserError as `load_model` and `load_template` do, and for a prompt that can't be encoded or
    has no room for the new tokens.
    """
    folder = resolve(name)
    form = template_of(template, folder, "course")
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=dtype).to(device)
    check_fits(tokenizer, model.config.vocab_size, name)
    prompts = []
    for row in rows:
        try:
            prompts.append(tokenizer.encode(render_prompt(row, form, tokenizer.eos_token, tokenizer.bos_token)))
            check_prompt(prompts[-1], "the prompt", max_new_tokens, model.config.max_position_embeddings)
        except (ValueError, UserError) as error:
            raise UserError(f"{source}: {row.place}: {error}") from None
    return model, tokenizer, prompts


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
