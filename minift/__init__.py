"""Instruction tuning and reward modelling from scratch in plain PyTorch.

`minift.load` returns a language model to ask, `minift.load_judge` a reward model: README.md, "As a library". README.md,
"Read the code", has the reading order and the layers.

Glossary:

    row             one entry of a data set: a dict of fields. In a batch or cache: one sequence of tokens
    schema          which fields a row has: an instruction, a prompt and its completion, a pair, …
    category        what a row's field "kind" says; results are also given by category
    question        what a row asks: its instruction and input, or its prompt
    prompt          the text a model is given; the completion is the text it should continue with
    **"prompt"**    the field of a row. Tuning and `minift generate` use it as it is. In pairs, `score` and `winrate` it
                    is an instruction, which goes through the template
    response        a completion, or an answer that a reward model scores; "sides" are the two responses of a pair
    template        the prompt format that turns an instruction, and its input, into a prompt
    marker          the text right before the response, as "### Response:\n": --response-template, or the template's own
    blanks          white space at the end of a template or marker; it begins the completion and is cut off an answer
    supervised      counted in the loss: a token whose label is its id, not IGNORE_INDEX (-100)
    example         one row as `input_ids` and `labels`
    ranking, pair   two or more responses to one prompt, best first; with two of them, `chosen` and `rejected`
    location        where a row is in its file ("line 17"); `where` has the file too
    batch           packed tokens of several examples, and the matrix `rows (R, T)`: where in them each row's tokens are
    position        a token's number in its row, from 0
    head            the output matrix `model.head`, hidden states → logits; the reward head is `RewardModel.score`;
                    attention heads are `num_heads`
    optimiser step  one update of the weights; its gradient is accumulated over `grad_accum` batches (micro-batches)
    unit            what a loss counts, and is a mean of: supervised tokens, or rankings
    prefill         the first forward pass of a prompt; each decode step after it adds one token
    slot            the part of the KV cache with the keys and values of one row
    reward          the number that a reward model gives a response
    remark          what a user should know about some rows of a data set, printed once with their locations
"""

import argparse
import importlib
import sys

EXPORTS = {  # name → its module and its name there
    "load": ("minift.files.pretrained", "load_language_model"),
    "load_judge": ("minift.files.pretrained", "load_judge"),
    "adamw": ("minift.optim", "adamw"),
}


def __getattr__(name: str) -> object:
    """Import one of `EXPORTS` when it is first used: torch takes seconds, and `import minift` must not."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'minift' has no attribute {name!r}")
    module, name = EXPORTS[name]
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    """Return the module's names with those of `EXPORTS`, which editors and notebooks then complete."""
    return [*globals(), *EXPORTS]


# `python -m minift.generate` would run a file of definitions: nothing happens, with status 0. While Python looks for
# the module that -m names, argv[0] is "-m".
if sys.argv[:1] == ["-m"]:
    _module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    if _module.startswith("minift.") and not _module.endswith("__main__"):
        argparse.ArgumentParser().exit(2, f"error: {_module} is not a command: `python -m minift` lists them\n")
