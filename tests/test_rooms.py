"""Imports run one way, scripts → commands → run → files → heart, without circles, and reach few packages.

ruff forbids imports inside functions (PLC0415), except those of optional extras (TID253).
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [  # A layer imports itself and the layers above it in this list.
    "torch numpy tokenizers huggingface_hub.utils.tqdm importlib.metadata",
    "minift",  # the heart
    "safetensors huggingface_hub pyarrow",
    "minift.files",
    "minift.run",
    "minift.commands minift.__main__ importlib",  # importlib: for the table of commands
    "data",
]  # The scripts come last. They are not in the list, because nothing imports them.
LAYER = dict.fromkeys(sys.stdlib_module_names, 0) | {name: n for n, line in enumerate(LAYERS) for name in line.split()}
PATHS = [*ROOT.glob("train_*.py"), *ROOT.glob("minift/**/*.py"), *ROOT.glob("data/**/*.py")]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text(encoding="utf-8")
    for path in PATHS
}


def imports(source: str) -> set[str]:
    """Return the dotted names that `source` imports: `from a import b` is a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            package = f"{'.' * node.level}{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names |= {package + alias.name for alias in node.names}
    return names


def layer(name: str, unlisted: int) -> int:
    """Return the layer of the longest beginning of a dotted name that has one."""
    while name and name not in LAYER:
        name = name.rpartition(".")[0]
    return LAYER.get(name, unlisted)


def check(sources: dict[str, str]) -> None:
    graph = {module: imports(source) for module, source in sources.items()}
    for module, names in graph.items():
        last = layer(module, len(LAYERS))
        assert [name for name in names if layer(name, len(LAYERS) + 1) > last] == [], module
        graph[module] = {name if name in sources else name.rpartition(".")[0] for name in names}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_imports_run_one_way() -> None:
    assert {"train_rm", "minift", "minift.model", "minift.files.hub", "data.make.pairs"} < SOURCES.keys()
    check(SOURCES)
    # A module is imported or run, never both.
    run = {module for module, source in SOURCES.items() if '__name__ == "__main__"' in source}
    assert [module for module in run if module.startswith("minift")] == ["minift.__main__"]


@pytest.mark.parametrize(
    "module, source",
    [
        ("minift.encode", "import minift.batching"),  # a circle, since batching imports encode
        ("minift.model", "def forward():\n    from minift.run import folder"),
        ("minift.model", "from .losses import bradley_terry"),
        ("minift.model", "import safetensors"),
        ("minift.model", "from huggingface_hub import hf_hub_download"),
        ("minift.model", "from importlib import import_module"),
        ("minift.files.hub", "from minift import run"),
        ("minift.run.folder", "import minift.commands.cli"),
        ("minift.commands.cli", "import train_sft"),
        ("train_rm", "from train_sft import main"),
        ("data.make.pairs", "import transformers"),
    ],
)
def test_an_import_that_breaks_the_rule_is_noticed(module: str, source: str) -> None:
    with pytest.raises((AssertionError, graphlib.CycleError)):
        check(SOURCES | {module: source})


def test_everything_is_printed_through_one_function() -> None:
    """Allow little else than `files.text.say`, which escapes control characters."""
    found = set()
    for module, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            name = getattr(node, "id", "") or getattr(node, "attr", "")
            if not module.startswith("data") and name in ("print", "write", "writelines"):
                found.add((module, ast.unparse(node)))
    assert found == {
        ("minift.files.text", "print"),
        ("minift.commands.terminal", "stream.write"),  # tokens that are escaped before they are coloured
        ("minift.run.folder", "file.write"),
        ("minift.progress", "print"),  # only numbers: the heart does not import files
        ("minift.run.interrupts", "os.write"),  # the lines of a signal handler
        ("minift.run.sandbox_child", "os.write"),  # reports, which are compared and not shown
    }


def test_modules_about_text_do_not_load_torch() -> None:
    modules = "config prompts tokenizer encode files.text files.datasets files.tokenizer run.report run.sandbox".split()
    lines = [f"import minift.{module}; assert 'torch' not in sys.modules, '{module}'" for module in modules]
    command = [sys.executable, "-c", "\n".join(["import sys", *lines])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
