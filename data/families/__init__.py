"""The task families behind data/instructions.jsonl: each draws one task from a `random.Random`.

A family returns `Task(instruction, input, output, checks)`. The output is a consequence of instruction and input alone.
The checks come from plain-Python references beside the template, never from running the output, so that they can
disagree with it.
"""

from . import classes, dictionaries, edits, functions, lists, numbers, strings, unseen, values
from .common import Check as Check
from .common import Task as Task

THEMES = (numbers, strings, lists, dictionaries, classes, functions, values, edits)
KNOWN = tuple(family for theme in THEMES for family in theme.FAMILIES)
UNSEEN = unseen.FAMILIES
