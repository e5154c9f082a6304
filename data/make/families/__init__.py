"""The task families of data/instructions.jsonl: each function draws one task from a `random.Random`.

A family returns `Task(instruction, input, output, checks)`. The output follows from instruction and input alone. The
checks come from plain Python references beside the templates, never from running the output: they can disagree with it.
"""

from data.make.families import (
    classes,
    combinations,
    dictionaries,
    edits,
    functions,
    lists,
    numbers,
    strings,
    unseen,
    values,
)

THEMES = (numbers, strings, lists, dictionaries, classes, functions, values, edits)
KNOWN = tuple(family for theme in THEMES for family in theme.FAMILIES)  # trained on; other combinations are held out
TRAINED_ONLY = combinations.FAMILIES  # no row of them is held out
UNSEEN = unseen.FAMILIES  # held out only
