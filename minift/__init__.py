"""Instruction tuning and reward modelling from scratch in plain PyTorch.

`minift.load` returns a language model to ask, `minift.load_judge` a reward model: README.md, "As a library". README.md,
"Read the code", has the reading order. minift/README.md has the folders and the glossary.
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
