"""Steps of both scripts around the training loop: load and split rows, prepare the model, export it."""

import random
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any

import numpy
import torch
from torch import nn

from minift.config import Config
from minift.errors import UserError
from minift.files.adapters import save_adapters
from minift.files.datasets import drop_rows_with_input, load_rows, split
from minift.files.encoded import Encode, encoded_file
from minift.files.hub import commit_of
from minift.files.pretrained import ModelFiles
from minift.files.templates import save_template
from minift.files.text import say
from minift.files.tokenizer import save_tokenizer
from minift.files.weights import save_model
from minift.lora import adapters_of, add_lora, merge, unmerge
from minift.model import OPT, Layer, Model, RewardModel
from minift.pairs import Ranking
from minift.prompts import Template
from minift.remarks import Encoded, Mapped
from minift.run.device import check_compiler, set_allocator
from minift.run.distributed import is_sharded, join
from minift.run.folder import Run
from minift.run.ranks import LOCAL_RANK, RANK
from minift.run.sharding import shard, whole
from minift.tokenizer import Tokenizer


def load_splits(run: Run, schemas: dict[str, tuple[str, ...]], encode: Encode) -> tuple[Encoded[Any], Encoded[Any]]:
    """Return the rows to train on and the held-out rows, encoded: those of --eval-data, or --eval-fraction of --data.

    With --encoded-cache the rows stay on disk.
    """
    config = run.config

    def read(name: str) -> tuple[int, Callable[[numpy.ndarray, str], Encoded[Any]]]:
        """Return how many rows a file has, and a function that encodes those with some indices."""
        if config.encoded_cache is not None:
            file = encoded_file(
                Path(config.encoded_cache), run.data[name], schemas, encode, fingerprint=run.fingerprints[name],
                without_input=config.no_input_only, waits=LOCAL_RANK > 0,
            )  # fmt: skip
            return len(file), file.part
        rows = load_rows(run.data[name], schemas)
        rows = drop_rows_with_input(rows) if config.no_input_only else rows
        return len(rows), lambda indices, source: encode([rows[index] for index in indices], source=source)

    count, part = read("data")
    train, held_out = split(count, config.eval_fraction, config.seed)
    if config.eval_data:
        count, eval_part = read("eval_data")
        return part(train, config.data), eval_part(numpy.arange(count), config.eval_data)
    return part(train, config.data), part(held_out, f"held out of {config.data}")


def max_length_for(config: Config, model: OPT | RewardModel) -> int:
    """Return --max-length, limited to the model's positions; UserError if a flag asks for more than these."""
    max_positions = model.config.max_position_embeddings
    if config.origins["max_length"] == "flag":
        check_max_length(config.max_length, max_positions)
    return min(config.max_length, max_positions)


def check_max_length(max_length: int, max_positions: int) -> None:
    """Raise UserError if rows of `max_length` tokens do not fit into the model's positions."""
    if max_length > max_positions:
        raise UserError(f"--max-length {max_length}: more than the model's {max_positions} positions")


def swap_half(rankings: Sequence[Ranking], categories: Sequence[str | None], seed: int) -> Sequence[Ranking]:
    """Flip the labels of half the pairs, about half in each category (seeded): nothing is left to learn."""
    generator = random.Random(seed)
    order = generator.sample(range(len(rankings)), len(rankings))
    order.sort(key=lambda index: str(categories[index]))  # random within a category
    is_flipped = numpy.zeros(len(rankings), bool)
    for two in zip(order[::2], order[1::2], strict=False):
        is_flipped[generator.choice(two)] = True

    def swap(number: int) -> Ranking:
        ranking = rankings[number]
        return ranking._replace(responses=ranking.responses[::-1]) if is_flipped[number] else ranking

    return Mapped(swap, range(len(rankings)))


def group_by_chosen(rankings: Sequence[Ranking]) -> Sequence[Ranking]:
    """Merge pairs with the same prompt, chosen response and margin into one ranking of that response over the others.

    The rows of a ranking share prefixes, so a batch of as many tokens compares more of them. Each prompt is used once
    per epoch, which reduces overfitting (Ouyang et al. 2022, arXiv 2203.02155, section 3.5). The groups are in the
    order of their first pairs, and `Mapped`: `rankings` may be on disk, and larger than memory.
    """
    hashes = numpy.fromiter(map(_hash_of_group, rankings, range(len(rankings))), "S16", len(rankings))
    _, first, group_of = numpy.unique(hashes, return_index=True, return_inverse=True)
    first_of = first[group_of]  # for each ranking, the first one of its group
    order = first_of.argsort(kind="stable")  # one group after the other
    starts = numpy.append(numpy.flatnonzero(first_of[order] == order), len(order))

    def group(number: int) -> Ranking:
        members = [rankings[int(index)] for index in order[starts[number] : starts[number + 1]]]
        (chosen, *others), margin, _ = members[0]
        responses = [chosen]
        for other in chain(others, *(member.responses[1:] for member in members[1:])):
            if other not in responses:  # a repeated one would be two rows of the same text
                responses.append(other)
        return Ranking(responses, margin, best_only=len(others) == 1)

    return Mapped(group, range(len(starts) - 1))


def _hash_of_group(ranking: Ranking, index: int) -> bytes:
    """Return 16 bytes that are equal for the pairs of a group. A ranking of three or more is a group of its own."""
    chosen, *others = ranking.responses
    key = (0.0 + ranking.margin, chosen) if len(others) == 1 else index  # 0.0 + -0.0 is 0.0
    return blake2b(repr(key).encode(), digest_size=16).digest()


def prepare(model: Model, run: Run) -> Model:
    """Move a model to the run's device, set its dropout, add adapters, shard it; UserError if these do not suit it."""
    config = run.config
    set_allocator(save_memory=config.gradient_checkpointing or config.fsdp)
    if not config.fsdp:
        model = model.to(run.device)
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    model.decoder.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        check_compiler(run.device)
        compile_layers(model)
    if config.lora_rank:
        torch.manual_seed(config.seed)
        try:
            lora = config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets
            add_lora(model, *lora, run.weights_dtype)
        except ValueError as error:
            raise UserError(f"--lora-{error}") from None
        head = ", and the head" if isinstance(model, RewardModel) else ""
        note = " (--model is adapters: the run will have no adapter/)" if run.model_files.are_adapters else ""
        count = sum(weight.numel() for weight in model.decoder.parameters() if weight.requires_grad)
        say(f"LoRA: {count:,} parameters to train{head}{note}")
    if config.fsdp:
        join(run.device)
        shard(model, run.device, run.weights_dtype)
    return model


def compile_layers(model: OPT | RewardModel, backend: str = "inductor") -> None:
    """Let torch.compile fuse what each layer does before and after attention.

    Attention is left out: it is one kernel, with lists of another length in each batch. So are evaluation and
    generation, for which the compiler would start again.
    """
    for name in ("before_attention", "after_attention"):
        method = _compiled_in_training(getattr(Layer, name), backend)
        for layer in model.modules():
            if isinstance(layer, Layer):
                setattr(layer, name, MethodType(method, layer))


def _compiled_in_training(method: Callable[..., Any], backend: str) -> Callable[..., Any]:
    compiled = torch.compile(method, dynamic=True, backend=backend)
    return lambda layer, *tensors: (compiled if layer.training else method)(layer, *tensors)


def set_dropout(model: nn.Module, dropout: float) -> None:
    """Set the dropout after attention and feed-forward, and lower the one inside attention to at most this.

    0 turns every dropout off. (trl's `disable_dropout` does not: it sets Dropout modules, and OPT calls F.dropout.)
    """
    for module in model.modules():
        if isinstance(module, Layer):
            module.dropout = dropout
            module.self_attn.dropout = min(dropout, module.self_attn.dropout)


def export(model: Model, tokenizer: Tokenizer, template: Template, base: ModelFiles, folder: Path) -> None:
    """Write a model into a folder as transformers reads it, with its tokenizer and template; only rank 0 does.

    Adapters are merged into the model. They are also written to `adapter/`, as peft reads them, with the name of
    `base`. This is not possible if `base` is itself a folder of adapters: no single folder holds their sum.
    """
    if is_sharded(model):
        model = whole(model)
    if RANK > 0:
        return
    if adapters_of(model) and not base.are_adapters:
        commit = commit_of(base.own)
        # A local base by its whole path: the adapters can then be used from any folder.
        save_adapters(model, folder / "adapter", base.name if commit else str(base.own.resolve()), commit)
        save_template(template, folder / "adapter")
    adapters = merge(model)
    save_model(model, folder)
    unmerge(model, adapters)
    save_tokenizer(tokenizer, folder)
    save_template(template, folder)
