"""doctest runs every docstring example; in them, `tokenizer` is the shipped one. Long outputs may be wrapped."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from minift.files.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(ROOT.joinpath("minift").rglob("*.py"))
]
# The fewest `>>>` lines of modules that must have examples, so that losing them does not pass silently.
EXPECTED = {
    "minift.encode": 1,
    "minift.prompts": 1,
    "minift.remarks": 1,
    "minift.batching": 5,
    "minift.pairs": 8,
    "minift.run.exam": 1,
    "minift.generate": 1,
}


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: str) -> None:
    names = {"tokenizer": load_tokenizer(ROOT / "data" / "model")}
    flags = doctest.NORMALIZE_WHITESPACE
    failed, attempted = doctest.testmod(importlib.import_module(module), extraglobs=names, optionflags=flags)
    assert not failed
    assert attempted >= EXPECTED.get(module, 0)


def test_every_expected_module_exists() -> None:
    assert set(EXPECTED) <= set(MODULES)


def test_the_readmes_import_what_exists() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "data" / "README.md").read_text()
    imports = re.findall(r"^from (minift\S*) import (.+)$", text, re.MULTILINE)
    assert len(imports) >= 5
    for module, names in imports:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), (module, name)
