"""Ten mistakes to plant in minift, one at a time: each must make the section that covers it disagree."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from minift import encode, losses, optim, trainer
from minift.beam import Candidate, Search
from minift.generate import Options
from minift.model import Decoder, OPTConfig
from minift.tokenizer import Tokenizer


class Fault(NamedTuple):
    name: str
    section: str  # the one that must disagree
    plant: Callable[[], AbstractContextManager]  # minift has the fault inside the block only


@contextmanager
def instead_of(function: Callable, faulty: Callable) -> Iterator[None]:
    """Replace a function in every module that imported it, except here, where the faulty versions call it."""
    names = [
        (module, name)
        for path, module in list(sys.modules.items())
        if path.partition(".")[0] in ("minift", "tests") and path != __name__
        for name, value in vars(module).items()
        if value is function
    ]
    for module, name in names:
        setattr(module, name, faulty)
    try:
        yield
    finally:
        for module, name in names:
            setattr(module, name, function)


cross_entropy, next_token_targets = losses.completion_cross_entropy, losses.next_token_targets
bradley_terry = losses.bradley_terry
encode_completion, learning_rate = encode.encode_completion, optim.learning_rate
accumulate_gradient = trainer.accumulate_gradient
encode_text = Tokenizer.encode
advance = Search.advance
make_decoder, decode = Decoder.__init__, Decoder.forward


def labels_one_further(labels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Let each position predict the token after the next."""
    return next_token_targets(labels.roll(-1), positions)


def mean_of_each_batch(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Count each micro-batch as one, not by its tokens."""
    total, count = cross_entropy(hidden, head, targets)
    return total / count, torch.ones_like(count)


def without_bos(tokenizer: Tokenizer, *text: Any) -> list[int]:
    ids = encode_text(tokenizer, *text)
    return ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids


def end_unsupervised(*arguments: Any) -> tuple[encode.Example, bool]:
    example, is_joined = encode_completion(*arguments)
    return encode.Example(example.input_ids, [*example.labels[:-1], encode.IGNORE_INDEX]), is_joined


def positions_from_zero(decoder: Decoder, input_ids: Tensor, positions: Tensor, *rest: Any, **options: Any) -> Tensor:
    return decode(decoder, input_ids, positions - 2, *rest, **options)


def final_norm_always(decoder: Decoder, config: OPTConfig) -> None:
    """Add the final LayerNorm of pre-LN models, without its weight and bias, which no file has."""
    make_decoder(decoder, config)
    if not config.do_layer_norm_before:
        decoder.final_layer_norm = nn.LayerNorm(config.hidden_size, elementwise_affine=False)


def end_not_counted(search: Search, candidates: list[Candidate], options: Options) -> list[int]:
    """Leave the EOS out of the length of a finished completion."""
    length = search.num_new + 1
    longer = (length / max(length - 1, 1)) ** options.length_penalty
    ends = [token == options.eos_token_id for _, _, token in candidates]
    rescored = [(score * longer if end else score, *rest) for end, (score, *rest) in zip(ends, candidates, strict=True)]
    return advance(search, rescored, options)


def clipped_sums(task: trainer.Task, *arguments: Any) -> dict[str, float]:
    """Clip the gradient of the sum, which is divided by the count afterwards."""
    sums = accumulate_gradient(task, *arguments)
    torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
    return sums


def late_schedule(step: int, *values: Any) -> float:
    return learning_rate(max(step - 1, 0), *values)


def negative_margins(chosen: Tensor, rejected: Tensor, margins: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return bradley_terry(chosen, rejected, -margins, *rest)


FAULTS = [
    Fault("labels shifted by one more", "sft", partial(instead_of, next_token_targets, labels_one_further)),
    Fault("a mean of means", "sft", partial(instead_of, cross_entropy, mean_of_each_batch)),
    Fault("BOS missing", "masks", partial(mock.patch.object, Tokenizer, "encode", without_bos)),
    Fault("EOS unsupervised", "masks", partial(instead_of, encode_completion, end_unsupervised)),
    Fault("position offset 0", "model", partial(mock.patch.object, Decoder, "forward", positions_from_zero)),
    Fault("a final LayerNorm on post-LN", "model", partial(mock.patch.object, Decoder, "__init__", final_norm_always)),
    Fault("beam score without the end", "generation", partial(mock.patch.object, Search, "advance", end_not_counted)),
    Fault("clip before averaging", "sft", partial(instead_of, accumulate_gradient, clipped_sums)),
    Fault("schedule late by one step", "sft", partial(instead_of, learning_rate, late_schedule)),
    Fault("margin sign", "reward", partial(instead_of, bradley_terry, negative_margins)),
]
