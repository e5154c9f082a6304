"""The examination of a tuned model: held-out prompts, greedy answers, BLEU and pass rate; and the samples of a run."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from minift.batching import collate
from minift.bleu import corpus_bleu
from minift.config import Config
from minift.encode import Example, marker_of, split_row
from minift.errors import UserError
from minift.files.marks import token_texts
from minift.generate import Completions, Options, generate
from minift.losses import next_token_targets
from minift.model import OPT, RewardModel, eval_mode
from minift.pairs import Ranking, responses_of
from minift.progress import progress_bar
from minift.prompts import Template, blanks_of, is_text_row, question_of
from minift.remarks import by_category, category_of, likely_cause, location_of
from minift.run.distributed import deal, is_sharded
from minift.run.sandbox import Check, check_answers, checks_of
from minift.run.sharding import for_generation
from minift.scoring import examine, score_rankings, wilson_interval
from minift.tokenizer import Special, Tokenizer

Answer = tuple[str, bool | None]  # a text, and if it passes the checks of its question; None: not checked


class ExamQuestion(NamedTuple):
    """A held-out prompt, as ids and as text, and the answer it should get."""

    prompt_ids: list[int]
    prompt: str
    reference: str
    reference_length: int  # in tokens, with BOS and EOS
    category: str | None
    blanks: str  # the template's, before the answer
    checks: list[Check] | None  # None: the answer is not run

    def sample(self, before: Answer, after: Answer) -> dict[str, Any]:
        """Return the line of samples.jsonl: prompt and reference, the answers before and after, and if they pass."""
        (text_before, passed_before), (text_after, passed_after) = before, after
        texts = {"prompt": self.prompt, "reference": self.reference, "before": text_before, "after": text_after}
        passed = {"passed": {"before": passed_before, "after": passed_after}} if self.checks else {}
        return {"kind": self.category, **texts, **passed}


def held_out_prompts(
    rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: Template, config: Config, max_positions: int
) -> list[ExamQuestion]:
    """Return questions for the first --bleu-samples rows whose prompt and reference fit into `max_positions`.

    With --run-checks, raises UserError for malformed checks.
    """
    questions: list[ExamQuestion] = []
    for index, row in enumerate(rows):
        if len(questions) == config.bleu_samples:
            break
        if config.supervise == "all" and is_text_row(row):
            continue  # it is learned as a whole, so it has no prompt
        prompt_ids, blanks, reference = prompt_and_reference(row, tokenizer, template, config.response_template)
        length = len(tokenizer.encode([blanks + reference, Special(tokenizer.eos_token)]))
        if prompt_ids and len(prompt_ids) + length <= max_positions:
            prompt = tokenizer.decode(prompt_ids, skip_special_tokens="history" not in row)  # an EOS ends each turn
            where = f"{config.eval_data or config.data}: {location_of(row, index)}"
            checks = checks_of(row, where) if config.run_checks else None
            questions.append(ExamQuestion(prompt_ids, prompt, reference, length, category_of(row), blanks, checks))
    return questions


def prompt_and_reference(
    row: Mapping[str, Any], tokenizer: Tokenizer, template: Template, response_template: str | None = None
) -> tuple[list[int], str, str]:
    """Return a training row's prompt as ids, its `blanks_of`, and the response that a model should give.

    Raises UserError for a `text` row without the response template, and ValueError for text that cannot be encoded.
    """
    marker = marker_of(row, template, response_template)
    pieces = split_row(row, tokenizer, template, marker)
    if pieces is None:
        text = row["text"]
        raise UserError(f"--response-template {marker!r}: not in {text[:60]!r}: {likely_cause(text, marker)}")
    prompt, completion = pieces
    blanks = blanks_of(row, template, marker)
    text = "".join(piece for piece in completion if not isinstance(piece, Special))
    return tokenizer.encode(prompt), blanks, text.removeprefix(blanks)


def sit_exam(model: OPT, tokenizer: Tokenizer, questions: Sequence[ExamQuestion], description: str) -> list[Answer]:
    """Return the model's greedy answers, and which of them pass the checks. Raises like `check_answers`."""
    texts = complete_greedily(model, tokenizer, questions, description)
    checks = [question.checks for question in questions]
    if not any(checks):
        return [(text, None) for text in texts]

    def check(numbers: Sequence[int]) -> list[bool | None]:
        with progress_bar(len(numbers), f"{description}: checks", "answer") as bar:
            return check_answers([texts[n] for n in numbers], [checks[n] for n in numbers], bar.update)

    return list(zip(texts, deal(check, range(len(texts))), strict=True))


def complete_greedily(
    model: OPT, tokenizer: Tokenizer, questions: Sequence[ExamQuestion], description: str
) -> list[str]:
    """Return the model's greedy answers, cut at the longest reference's length and at the model's positions."""
    if not questions:
        return []
    prompts = [question.prompt_ids for question in questions]
    max_positions = model.config.max_position_embeddings
    longest = max(question.reference_length for question in questions)
    # A limit for each question: one long prompt must not shorten the answers to all others.
    limits = [min(longest, max_positions - len(prompt)) for prompt in prompts]
    options = Options(max_new_tokens=longest, eos_token_id=tokenizer.eos_token_id)
    model = for_generation(model) if is_sharded(model) else model

    def answer(numbers: Sequence[int]) -> Completions:
        with progress_bar(len(numbers), description, "answer") as bar:
            return generate(model, [prompts[n] for n in numbers], options, bar.update, [limits[n] for n in numbers])

    answers = [tokenizer.decode(ids) for (ids,) in deal(answer, range(len(prompts)))]
    return [answer.removeprefix(question.blanks) for answer, question in zip(answers, questions, strict=True)]


def compare_answers(
    questions: Sequence[ExamQuestion], before: Sequence[Answer], after: Sequence[Answer]
) -> dict[str, Any]:
    """Return BLEU and pass rates before and after training, as run.json has them; {} without questions."""
    return _by_measure(_measure(questions, before), _measure(questions, after)) if questions else {}


def compare_rewards(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], categories: Sequence[str | None]
) -> dict[str, Any]:
    """Return every measure of `scoring.examine` before and after training, as run.json has it; {} without rankings."""
    return _by_measure(examine(before, categories), examine(after, categories)) if before else {}


def _measure(questions: Sequence[ExamQuestion], answers: Sequence[Answer]) -> dict[str, Any]:
    """Return sacreBLEU's corpus BLEU (0 to 100), and of answers with checks the pass rate, its 95% interval, the count.

    Each is by category, with that of all answers under "all". The intervals treat answers as independent.
    """
    categories = [question.category for question in questions]
    pairs = [(text, question.reference) for (text, _), question in zip(answers, questions, strict=True)]
    bleu = {
        name: corpus_bleu([answer for answer, _ in group], [[reference for _, reference in group]]).score
        for name, group in by_category(pairs, categories).items()
    }
    checked = [index for index, (_, passed) in enumerate(answers) if passed is not None]
    if not checked:
        return {"bleu": bleu}
    groups = by_category([bool(answers[index][1]) for index in checked], [categories[index] for index in checked])
    return {
        "bleu": bleu,
        "pass_rate": {name: sum(marks) / len(marks) for name, marks in groups.items()},
        "pass_interval": {name: list(wilson_interval(sum(marks), len(marks))) for name, marks in groups.items()},
        "checked": {name: len(marks) for name, marks in groups.items()},
    }


def _by_measure(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {measure: {"before": before[measure], "after": after[measure]} for measure in after}


def name_responses(count: int, *, best_only: bool = False) -> list[str]:
    """Return names for the responses of a ranking.

    >>> name_responses(2), name_responses(3, best_only=True)
    (['chosen', 'rejected'], ['chosen', 'rejected 1', 'rejected 2'])
    """
    if count == 2:
        return ["chosen", "rejected"]
    if best_only:
        return ["chosen", *(f"rejected {number}" for number in range(1, count))]
    return [f"response {number}" for number in range(1, count + 1)]


def ranking_sample(row: Mapping[str, Any], before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Return the line of samples.jsonl for a pair or ranking: its texts, and their rewards before and after."""
    responses, question = responses_of(row), question_of(row)
    texts = {"kind": row["kind"]} if "kind" in row else {}
    if question is not None:
        earlier = chain.from_iterable(question.pop("history", []))
        texts["prompt"] = "\n\n".join(filter(None, [*earlier, *question.values()]))
    texts |= dict(zip(name_responses(len(responses)), responses, strict=True))
    return texts | {"rewards_before": list(before), "rewards_after": list(after)}


@torch.no_grad()
def row_as_seen(model: OPT, tokenizer: Tokenizer, example: Example) -> dict[str, Any]:
    """Return the object in row.json of an example: its tokens, and -log p of those that are supervised, else None."""
    batch = collate([example])
    wanted, targets = next_token_targets(batch.labels, batch.positions)  # (M,), (M,)
    with eval_mode(model):
        logits = model.logits(model(batch.input_ids, batch.positions, batch.rows, wanted=wanted))  # (M, V)
    losses = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")  # (M,)
    values: list[float | None] = [None] * len(example.input_ids)
    for index, loss in zip((wanted + 1).tolist(), losses.tolist(), strict=True):
        values[index] = loss
    return {"rows": [{"name": "row", "tokens": token_texts(example.input_ids, tokenizer), "values": values}]}


def score_held_out(model: RewardModel, rankings: Sequence[Ranking], batch_size: int) -> list[list[float]]:
    """Return the rewards of each ranking's responses, of which the ranks compute a part each."""
    return deal(partial(score_rankings, model, batch_size=batch_size), rankings)


def ranking_as_seen(model: RewardModel, tokenizer: Tokenizer, ranking: Ranking) -> dict[str, Any]:
    """Return the object in row.json of a ranking: the tokens of its responses, and their rewards at the last tokens."""
    [rewards] = score_rankings(model, [ranking], len(ranking.responses))
    names = name_responses(len(ranking.responses), best_only=ranking.best_only)
    return {
        "rows": [
            {"name": name, "tokens": token_texts(ids, tokenizer), "values": [None] * (len(ids) - 1) + [reward]}
            for name, ids, reward in zip(names, ranking.responses, rewards, strict=True)
        ]
    }
