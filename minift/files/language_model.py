"""A language model in use: ask it, see a row as it does, read its loss and logits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minift.batching import collate, pack
from minift.beam import beam_search
from minift.encode import Example, encode_prompt, encode_rows
from minift.files.datasets import TRAINING_SCHEMAS, read_row
from minift.files.marks import token_table
from minift.generate import Completions, Options, generate
from minift.losses import completion_cross_entropy, next_token_targets
from minift.model import OPT
from minift.prompts import Template, blanks_of
from minift.tokenizer import Tokenizer


@dataclass(frozen=True, repr=False)
class LanguageModel:
    """A language model with the tokenizer and template that belong to it."""

    model: OPT
    tokenizer: Tokenizer
    template: Template
    name: str = ""  # the folder or hub id that it was loaded from

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return f"LanguageModel({self.name}: {count:,} parameters, template {self.template.name})"

    def ask(self, text: str, input: str = "", **options: Any) -> str:
        """Return the answer to an instruction, greedily decoded unless `options`, fields of `Options`, say otherwise.

        Raises ValueError for an invalid option, and for an instruction that leaves no room for `max_new_tokens`.
        """
        row = {"instruction": text, "input": input}
        [samples] = self.complete([encode_prompt(row, self.tokenizer, self.template)], Options(**options))
        return self.text_of(row, samples[0])

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        options: Options,
        on_progress: Callable[[int], Any] = lambda _: None,
    ) -> Completions:
        """Complete prompts up to the tokenizer's EOS, by beam search if `options` say so. Raises like `generate`."""
        if options.eos_token_id is None:
            options = replace(options, eos_token_id=self.tokenizer.eos_token_id)
        search = beam_search if options.num_beams > 1 else generate
        return search(self.model, prompts, options, on_progress)

    def text_of(self, row: Mapping[str, Any], completion: Sequence[int]) -> str:
        """Return the completion of a row's prompt as text, without the template's blanks before it."""
        return self.tokenizer.decode(completion).removeprefix(blanks_of(row, self.template))

    def encode(self, row: Mapping[str, Any]) -> Example:
        """Return a training row's ids and labels, cut at the model's positions.

        Raises UserError for a row that follows none of `TRAINING_SCHEMAS`, or without a supervised token.
        """
        fields, _, _ = read_row(row, TRAINING_SCHEMAS, "the row")
        max_length = self.model.config.max_position_embeddings
        [example] = encode_rows([fields], self.tokenizer, self.template, max_length=max_length).examples
        return example

    def show(self, row: Mapping[str, Any]) -> str:
        """Return a training row's tokens, ids and labels as a table to print. Raises like `encode`."""
        return token_table(self.encode(row), self.tokenizer)

    def loss(self, row: Mapping[str, Any]) -> Tensor:
        """Return the mean of -log p over a training row's supervised tokens, a scalar to call `backward` on.

        Dropout is off until `model.train()`. Raises like `encode`.
        """
        batch = collate([self.encode(row)])
        wanted, targets = next_token_targets(batch.labels, batch.positions)  # (M,), (M,)
        hidden = self.model(batch.input_ids, batch.positions, batch.rows, wanted=wanted)  # (M, E)
        total, count = completion_cross_entropy(hidden, self.model.head, targets)
        return total / count

    @torch.no_grad()
    def logits(self, text: str) -> Tensor:
        """Return the logits `(T, V)` of the token after each of a text's T tokens; the text is used as it is."""
        return self.model.logits(self.model(*pack([self.tokenizer.encode(text)])))
