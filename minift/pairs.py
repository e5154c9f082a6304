"""Preference pairs and rankings → ids, each response after its prompt, best first; then batches of them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minift.batching import pad_rows, share_prefixes, to_tensor
from minift.encode import IGNORE_INDEX
from minift.errors import UserError
from minift.prompts import Template, end_with_eos, question_of, render
from minift.remarks import Encoded, about_preferences, location_of
from minift.tokenizer import Tokenizer

MAX_MARGIN = 1_000_000  # rewards differ by a few units, so larger margins cannot be reached


class Ranking(NamedTuple):
    """Two or more responses to one prompt, best first, each as the ids of its whole row: a pair is (chosen, rejected).

    With `best_only`, only the first response is known to be better than the others.
    """

    responses: list[list[int]]
    margin: float = 0.0
    best_only: bool = False


def encode_rankings(
    rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: Template, *, max_length: int,
    margin_field: str | None = None, source: str = "rows", may_be_empty: bool = False,
) -> Encoded[Ranking]:  # fmt: skip
    """Encode pairs and rankings; drop those with equal sides, or a side over `max_length`, and say so.

    `margin_field` names the field with a row's margin; without it, margins are 0. Raises UserError if every row is
    dropped (unless `may_be_empty`), a row cannot be encoded, or a margin is not a number.
    """
    are_pairs = all(len(responses_of(row)) == 2 for row in rows)
    encoded: Encoded[Ranking] = Encoded(source, "pair" if are_pairs else "ranking", len(rows))
    for index, row in enumerate(rows):
        location = location_of(row, index)
        responses, question = responses_of(row), question_of(row)
        try:
            sequences = [encode_response(question, response, tokenizer, template) for response in responses]
        except ValueError as error:
            raise UserError(f"{source}: {location}: {error}") from None
        margin = 0.0 if margin_field is None else _margin(row, margin_field, f"{source}: {location}")
        if len({tuple(ids) for ids in sequences}) < len(sequences):  # they would give no gradient
            encoded.remark("dropped: its sides are equal", location)
        elif max(map(len, sequences)) > max_length:  # cut, a side would lose the token where its reward is read
            encoded.remark(f"dropped: a side is longer than {max_length} tokens", location)
        else:
            if "" in responses:
                encoded.remark("with an empty response: its reward is that of the end token alone", location)
            remarks = about_preferences(row, sequences, tokenizer, template)
            encoded.keep(Ranking(sequences, margin), row, index, remarks)
    encoded.tokens = sum(len(ids) for ranking in encoded.examples for ids in ranking.responses)
    if not may_be_empty:
        encoded.check_any_kept()
    return encoded


def encode_response(
    question: Mapping[str, Any] | None, response: str, tokenizer: Tokenizer, template: Template
) -> list[int]:
    r"""Return the ids of a question (`prompts.question_of`) in the template, its response and the EOS.

    Without a question the response is a whole dialogue, used as it is.

    >>> from minift.prompts import TEMPLATES  # "\n\nHuman: Hi\n\nAssistant: Yo"
    >>> encode_response({"instruction": "Hi"}, "Yo", tokenizer, TEMPLATES["dialogue"])
    [2, 202, 202, 43, 538, 293, 29, 1052, 76, 202, 202, 1754, 378, 271, 1348, 29, 2539, 82, 2]
    """
    pieces = [response]
    if question is not None:
        row = {**question, "output": response}
        prompt, completion = render(row, template, tokenizer)
        pieces = [*prompt, *completion]
    return tokenizer.encode(end_with_eos(pieces, tokenizer))


def responses_of(row: Mapping[str, Any]) -> list[str]:
    """Return the responses of a pair or a ranking, best first; those of the pair if a row has both."""
    return [row["chosen"], row["rejected"]] if "chosen" in row and "rejected" in row else row["responses"]


def _margin(row: Mapping[str, Any], name: str, where: str) -> float:
    subject = f"{where}: field '{name}', its --margin-field, is"
    if name not in row:
        raise UserError(f"{subject} missing")
    margin = row[name]
    if isinstance(margin, str):  # CSV has only text
        with suppress(ValueError):
            margin = float(margin)
    # The comparison is False for NaN, and works for integers of any size.
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= MAX_MARGIN:
        raise UserError(f"{subject} {margin!r:.40}, expected a number between -{MAX_MARGIN:,} and {MAX_MARGIN:,}")
    return float(margin)


class PairBatch(NamedTuple):
    """Packed rows and P pairs of them. All tensors are int64 but margins and weights, which are float64."""

    input_ids: Tensor  # (N,)
    positions: Tensor  # (N,) from 0 in each row
    labels: Tensor  # (N,) the tokens of each ranking's best row, IGNORE_INDEX elsewhere
    rows: Tensor  # (R, T) indices into the flat list, -1 past a row's end; rows of a ranking share their prefixes
    chosen: Tensor  # (P,) the preferred row of each pair
    rejected: Tensor  # (P,) the other one
    margins: Tensor  # (P,) by how much it is preferred
    weights: Tensor  # (P,) with sum 1 over the pairs of each ranking

    def to(self, device: torch.device) -> "PairBatch":
        """Return the batch with its pairs on the device of the rewards, in float32 on Apple's, which lacks float64."""
        pairs = (self.chosen, self.rejected, self.margins, self.weights)
        if device.type == "mps":
            pairs = (self.chosen, self.rejected, self.margins.float(), self.weights.float())
        return PairBatch(*self[:4], *(tensor.to(device, non_blocking=True) for tensor in pairs))


def collate_rankings(rankings: Sequence[Ranking]) -> PairBatch:
    """Lay rankings end to end, shared prefixes once. Raises ValueError for fewer than two responses, or an empty one.

    A ranking of K responses gives K(K - 1)/2 pairs of equal weights, with `best_only` the K - 1 of its first response.

    >>> batch = collate_rankings([Ranking([[2, 10, 11, 20, 2], [2, 10, 11, 2]], margin=0.5)])
    >>> batch.input_ids
    tensor([ 2, 10, 11, 20,  2,  2])
    >>> batch.positions
    tensor([0, 1, 2, 3, 4, 3])
    >>> batch.labels
    tensor([   2,   10,   11,   20,    2, -100])
    >>> batch.rows
    tensor([[ 0,  1,  2,  3,  4],
            [ 0,  1,  2,  5, -1]])
    >>> batch.chosen, batch.rejected
    (tensor([0]), tensor([1]))
    >>> batch.margins, batch.weights
    (tensor([0.5000], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    input_ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    rows: list[list[int]] = []
    pairs: list[tuple[int, int, float, float]] = []  # chosen row, rejected row, margin, weight
    for responses, margin, best_only in rankings:
        if len(responses) < 2 or not all(responses):
            lengths = [len(row) for row in responses]
            raise ValueError(f"a ranking whose rows have {lengths} tokens, expected two rows or more, none empty")
        limits = [len(row) - 1 for row in responses]  # the last token, where the reward is read, is not shared
        tree_ids, tree_positions, tree_rows = share_prefixes(responses, limits)
        numbers = range(len(rows), len(rows) + len(responses))  # of its rows in the batch
        its_pairs = [(numbers[0], other) for other in numbers[1:]] if best_only else [*combinations(numbers, 2)]
        pairs.extend((chosen, rejected, margin, 1 / len(its_pairs)) for chosen, rejected in its_pairs)
        rows += [[len(input_ids) + index for index in row] for row in tree_rows]
        input_ids += tree_ids
        positions += tree_positions
        best_length = len(responses[0])  # the best row's tokens are the first of the tree
        labels += tree_ids[:best_length] + [IGNORE_INDEX] * (len(tree_ids) - best_length)
    chosen, rejected, margins, weights = zip(*pairs, strict=True)
    return PairBatch(
        input_ids=to_tensor(input_ids),
        positions=to_tensor(positions),
        labels=to_tensor(labels),
        rows=pad_rows(rows),
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        margins=torch.tensor(margins, dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64),
    )
