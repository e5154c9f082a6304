"""Imports run one way, scripts → commands → run → files → heart, without cycles, and reach few packages."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train_sft", "train_rm"}
LAYERS = {"files": 1, "run": 2, "commands": 3, "__main__": 3}  # of minift; the heart is 0, scripts and data/make are 4
HEART_PACKAGES = {"torch", "numpy", "tokenizers"}
RUNTIME_PACKAGES = HEART_PACKAGES | {"safetensors", "huggingface_hub"}


def read_sources() -> dict[str, str]:
    paths = [*ROOT.glob("train_*.py"), *ROOT.joinpath("minift").rglob("*.py"), *ROOT.joinpath("data").rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {names[path]: path.read_text(encoding="utf-8") for path in paths}


def imports(source: str) -> set[str]:
    """Return the dotted names that `source` imports: `from a import b` is a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
        elif getattr(node, "attr", getattr(node, "id", "")) in ("import_module", "__import__"):
            names.add("importlib.import_module")
    return names


def layer(module: str) -> int:
    package, _, rest = module.partition(".")
    return LAYERS.get(rest.split(".")[0], 0) if package == "minift" else 4


def may_use(module: str, name: str) -> bool:
    """Return True if `module` may import `name`, which belongs to a package."""
    package = name.split(".")[0]
    if name == "importlib.import_module":
        return module in ("minift.__main__", "data.make.instructions")  # the table of commands; the answers' sandbox
    if package == "pyarrow":
        return module == "minift.files.datasets"  # the extra `parquet`
    if layer(module) == 0 and package not in HEART_PACKAGES | sys.stdlib_module_names:
        return name == "huggingface_hub.utils.tqdm"
    return package in RUNTIME_PACKAGES | sys.stdlib_module_names


def violations(sources: dict[str, str]) -> list[str]:
    found, graph = [], {}
    for module, source in sources.items():
        graph[module] = set()
        for name in sorted(imports(source)):
            target = name if name in sources else name.rpartition(".")[0]
            if target in sources:
                graph[module].add(target)
            allowed = layer(target) <= layer(module) if target in sources else may_use(module, name)
            if not allowed or target in SCRIPTS:
                found.append(f"{module} imports {name}")
        if module.startswith("minift.") and module != "minift.__main__" and '__name__ == "__main__"' in source:
            found.append(f"{module} is run, expected a command in minift.__main__")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"a cycle: {' → '.join(error.args[1])}")
    return found


def test_imports_run_one_way() -> None:
    sources = read_sources()
    assert {"train_rm", "minift", "minift.model", "minift.files.hub", "data.make.pairs"} < set(sources)
    assert violations(sources) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("minift.model", "from minift.files.hub import fetch"),
        ("minift.model", "import minift.run.folder"),
        ("minift.model", "from minift.run import folder"),
        ("minift.model", "from .losses import x"),
        ("minift.model", "import safetensors"),
        ("minift.model", "from huggingface_hub import hf_hub_download"),
        ("minift.model", "def forward():\n    if True:\n        import transformers"),
        ("minift.model", "import importlib\nimportlib.import_module('x')"),
        ("minift.model", "from importlib import import_module"),
        ("minift.model", "__import__('x')"),
        ("minift.model", 'if __name__ == "__main__":\n    pass'),
        ("minift.losses", "from minift.model import OPT"),  # a cycle: model imports losses below
        ("minift.files.hub", "from minift import run"),
        ("minift.files.hub", "import pyarrow"),
        ("minift.run.folder", "from minift.commands import cli"),
        ("minift.commands.cli", "import train_sft"),
        ("train_rm", "from train_sft import main"),
        ("train_rm", "import transformers"),
        ("data.make.pairs", "import train_rm"),
    ],
)
def test_the_checker_notices(module: str, source: str) -> None:
    names = "minift.model minift.losses minift.files.hub minift.files.datasets minift.run minift.run.folder"
    sources = dict.fromkeys(f"{names} minift.commands minift.commands.cli minift.__main__ train_sft".split(), "")
    sources |= {
        "minift.model": "import os.path\nfrom torch.nn import Linear\nfrom minift.losses import bradley_terry",
        "minift.losses": "from huggingface_hub.utils import tqdm",
        "minift.files.datasets": "def read():\n    import pyarrow.parquet\nfrom importlib.metadata import version",
        "minift.run.folder": "from minift.files import hub\nimport safetensors.torch",
        "minift.__main__": 'import importlib\nimportlib.import_module("x")\nif __name__ == "__main__":\n    pass',
        "train_sft": "from minift.run.folder import Run",
    }
    assert violations(sources) == []
    assert len(violations(sources | {module: f"{sources.get(module, '')}\n{source}"})) == 1


def test_everything_is_printed_through_one_function() -> None:
    """`files.text.say` escapes control characters. Marked tokens are escaped before they are coloured."""
    printing = set()
    for module, source in read_sources().items():
        for node in ast.walk(ast.parse(source)):
            name = getattr(node, "id", "") or getattr(node, "attr", "")
            if not module.startswith("data") and name in ("print", "write", "writelines"):
                printing.add((module, ast.unparse(node)))
    assert printing == {
        ("minift.files.text", "print"),
        ("minift.commands.terminal", "stream.write"),
        ("minift.run.folder", "file.write"),
        ("minift.progress", "print"),  # only numbers: the heart does not import files
        ("minift.run.interrupts", "os.write"),  # the lines of a signal handler
    }


def test_modules_about_text_do_not_load_torch() -> None:
    modules = "bleu config prompts tokenizer encode files.text files.datasets files.tokenizer run.report commands.bleu"
    command = "import sys\n" + "".join(
        f"import minift.{module}; assert 'torch' not in sys.modules, '{module}'\n" for module in modules.split()
    )
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
