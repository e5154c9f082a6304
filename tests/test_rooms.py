"""Imports run one way, scripts → commands → run → files → heart, without circles, and reach few packages.

ruff forbids imports inside functions (PLC0415), except those of optional extras and of slow modules (TID253).
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [  # A layer imports itself and the layers above it in this list. The scripts are the last, and import only up.
    [*sys.stdlib_module_names, "importlib.metadata", "torch", "numpy", "tokenizers", "huggingface_hub.utils.tqdm"],
    ["minift"],  # the heart
    ["safetensors", "huggingface_hub", "pyarrow", "minift.files"],
    ["minift.run"],
    ["minift.commands", "minift.__main__", "importlib"],  # importlib: for the table of commands
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_bytes())
    for path in [*ROOT.glob("train_*.py"), *ROOT.glob("minift/**/*.py")]
}


def layer(name: str) -> int | None:
    """Return the layer of the longest beginning of a dotted name that has one; None for scripts and other packages."""
    return LAYER[name] if name in LAYER else layer(name.rpartition(".")[0]) if name else None


def test_imports_run_one_way() -> None:
    graph = {}
    for module, tree in MODULES.items():
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        starts = [f"{'.' * node.level}{node.module}." if isinstance(node, ast.ImportFrom) else "" for node in nodes]
        names = {start + alias.name for start, node in zip(starts, nodes, strict=True) for alias in node.names}
        names -= {"importlib"} if module == "minift" else set()  # for what it exports, on first use
        reachable = range(len(LAYERS) if layer(module) is None else layer(module) + 1)
        assert [name for name in names if layer(name) not in reachable] == [], module
        graph[module] = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    run = {module for module, tree in MODULES.items() if "__name__ == '__main__'" in ast.unparse(tree)}
    assert run == {"train_rm", "train_sft", "minift.__main__"} and not run & set().union(*graph.values())


def test_the_readme_of_the_rooms_has_every_file_with_its_first_line() -> None:
    lines = (ROOT / "minift" / "README.md").read_text(encoding="utf-8").splitlines()
    expected = []
    for path in ROOT.glob("minift/**/*.py"):
        name = path.relative_to(ROOT / "minift").as_posix()
        if not name.endswith("__init__.py"):
            expected.append(
                f"| [`{name}`]({name}) | {ast.get_docstring(ast.parse(path.read_bytes())).splitlines()[0]} |"
            )
    assert sorted(line for line in lines if line.startswith("| [`")) == sorted(expected)


def test_everything_is_printed_through_one_function() -> None:
    """`files.text.say` escapes control characters. Progress is numbers only; `os.write` is for pipes and signals."""
    printers = set()
    for module, tree in MODULES.items():
        names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)}
        if any(name == "print" or name.endswith((".write", ".writelines")) for name in names - {"os.write"}):
            printers.add(module)
    assert printers == {"minift.files.text", "minift.progress"}


def test_modules_about_text_do_not_load_torch() -> None:
    modules = "config prompts tokenizer encode files.text files.datasets files.tokenizer run.sandbox".split()
    lines = [f"import minift.{module}; assert 'torch' not in sys.modules, '{module}'" for module in modules]
    command = [sys.executable, "-c", "\n".join(["import sys", *lines])]
    subprocess.run(command, cwd=ROOT, check=True)
