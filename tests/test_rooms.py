"""One room per idea: what each module of minift may import, so that each can be read by itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent

# Room → the rooms and packages it may know. Besides, every room may know `errors`, `files` and the standard library.
ROOMS = {
    "errors": set(),
    "files": set(),
    "hub": {"huggingface_hub"},
    "model": {"torch"},
    "lora": {"torch"},
    "adapters": {"torch", "safetensors", "minift.lora"},
    "weights": {"torch", "safetensors", "minift.hub", "minift.model"},
    "tokenizer": {"tokenizers"},
    "prompts": {"minift.tokenizer"},  # for `Special`, the kind of string that is one token
    "datasets": {"numpy", "minift.hub"},  # numpy's generator is the reference's shuffle
    "encode": {"minift.tokenizer", "minift.prompts"},
    "batching": {"torch"},
    "losses": {"torch"},
    "optim": {"torch"},
    "trainer": {"torch", "huggingface_hub", "minift.batching", "minift.checkpoint", "minift.config", "minift.optim"},
    "checkpoint": {"torch", "safetensors"},
    "generate": {"torch", "numpy", "minift.model", "minift.batching"},
    "bleu": set(),
    "answers": {
        "torch",
        "huggingface_hub",
        "minift.bleu",
        "minift.datasets",
        "minift.encode",
        "minift.generate",
        "minift.model",
        "minift.prompts",
        "minift.tokenizer",
        "minift.weights",
    },  # fmt: skip
    "scoring": {"torch", "minift.model", "minift.weights", "minift.tokenizer", "minift.prompts", "minift.encode"}
    | {"minift.batching"},
    "score": set(),
    "winrate": set(),
    "report": set(),
    "config": set(),
    "cost": {"torch", "minift.losses"},  # for CHUNK, how many logits exist at a time
    "preview": {"minift.tokenizer", "minift.prompts", "minift.datasets", "minift.encode", "minift.hub"},
}
# Within `main` and `_main…`, the wiring of `python -m minift.X`, all rooms and packages may be known: it is a script.
PACKAGES = {"torch", "tokenizers", "safetensors", "numpy", "huggingface_hub"}
EXTRAS = {"pyarrow", "matplotlib"}  # of pyproject.toml's extras; never at the top of a file
SCRIPTS = {"train_sft", "train_rm"}


def imports(source: str) -> Iterator[tuple[str, str | None]]:
    """Each imported module, `minift.room` or a package's name, with the outermost function it stands in, if any."""

    def visit(node: ast.AST, function: str | None) -> Iterator[tuple[str, str | None]]:
        if isinstance(node, ast.Import):
            yield from ((short(alias.name), function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(filter(None, ["minift" if node.level else "", node.module]))
            names = [f"minift.{alias.name}" for alias in node.names] if parent == "minift" else [parent]
            yield from ((short(name), function) for name in names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            yield "an import by name at run time", function
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = function or node.name
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    def short(name: str) -> str:
        return ".".join(name.split(".")[: 2 if name.startswith("minift.") else 1])

    return visit(ast.parse(source), None)


def forbidden(room: str, source: str) -> list[str]:
    """What a room with this source imports and may not."""
    found = []
    for name, function in imports(source):
        allowed = ROOMS[room] | {"minift.errors", "minift.files"} | sys.stdlib_module_names
        if function is not None and room != "bleu":
            allowed |= EXTRAS
        if function is not None and (function == "main" or function.startswith("_main")):
            allowed |= {f"minift.{other}" for other in ROOMS} | (PACKAGES if room != "bleu" else set())
        if name not in allowed:
            found.append(name)
    return found


def test_every_module_is_a_room_of_the_table():
    assert {path.stem for path in HERE.joinpath("minift").rglob("*.py")} - {"__init__"} == set(ROOMS)
    assert list(imports((HERE / "minift" / "__init__.py").read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_what_it_may(room):
    assert forbidden(room, (HERE / "minift" / f"{room}.py").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", sorted(HERE.glob("train_*.py")), ids=lambda path: path.name)
def test_a_script_needs_only_the_runtime_packages(path):
    for name, function in imports(path.read_text(encoding="utf-8")):
        is_lazy_extra = function is not None and name in EXTRAS
        assert name.startswith("minift.") or name in PACKAGES | sys.stdlib_module_names or is_lazy_extra, name


@pytest.mark.parametrize("folder", [".", "minift", "data"])
def test_nothing_imports_a_script(folder):
    for path in HERE.joinpath(folder).glob("*.py"):
        assert not SCRIPTS & {name for name, _ in imports(path.read_text(encoding="utf-8"))}, path


def test_rooms_of_texts_and_files_do_not_load_torch():
    rooms = ["bleu", "report", "config", "datasets", "prompts", "tokenizer", "encode"]
    command = "".join(f"import minift.{room}; assert 'torch' not in sys.modules, '{room}'\n" for room in rooms)
    result = subprocess.run([sys.executable, "-c", f"import sys\n{command}"], cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "room, source, expected",
    [
        ("bleu", "import torch", ["torch"]),
        ("bleu", "def main():\n    import torch", ["torch"]),
        ("model", "from minift.losses import x", ["minift.losses"]),
        ("model", "from minift import losses", ["minift.losses"]),
        ("model", "from . import losses", ["minift.losses"]),
        ("model", "from .losses import x", ["minift.losses"]),
        ("model", "import minift.losses as x", ["minift.losses"]),
        ("model", "if True:\n    try:\n        import minift.losses\n    finally:\n        pass", ["minift.losses"]),
        ("model", "def forward():\n    from minift.losses import x", ["minift.losses"]),
        ("model", "class Main:\n    def main(self):\n        import train_sft", ["train_sft"]),
        ("preview", "def main():\n    from minift.weights import x", []),
        ("preview", "def _main_wiring():\n    from minift.weights import x", []),
        ("preview", "def mainly():\n    from minift.weights import x", ["minift.weights"]),
        ("preview", "def main():\n    import transformers", ["transformers"]),
        ("preview", "def main():\n    import minift.nowhere", ["minift.nowhere"]),
        ("datasets", "def read():\n    import pyarrow.parquet", []),
        ("datasets", "import pyarrow.parquet", ["pyarrow"]),
        ("datasets", "def read():\n    import torch", ["torch"]),
        ("datasets", "def main():\n    import torch", []),
        (
            "errors",
            "import importlib\nimportlib.import_module('x')",
            ["an import by name at run time"],
        ),
        ("optim", "import os.path, math\nfrom torch.nn import Linear\nfrom minift.errors import UserError", []),
    ],
)
def test_the_check_itself(room, source, expected):
    assert forbidden(room, source) == expected
