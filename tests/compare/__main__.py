"""`python -m tests.compare`, or `make compare`: minift beside trl, transformers, peft and sacreBLEU, as one table.

A line says what was compared, on how much, the largest difference, the tolerance, and whether the two sides agree. The
exit status is 1 if any line disagrees. `--faults` plants one fault after the other in minift; then the section that
covers it must disagree. A complete run on the shipped model and data also writes tests/compare/README.md.
"""

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from minift.commands.cli import CommandParser, run_command
from minift.errors import UserError
from tests.compare import Check, Setting

SECTIONS = ("tokenizer", "masks", "model", "files", "sft", "reward", "lora", "generation", "bleu", "differences")
PACKAGES = ("minift", "trl", "transformers", "peft", "sacrebleu", "torch")
ROOT = Path(__file__).parents[2]
DATA = ROOT / "data"
README = ROOT / "tests" / "compare" / "README.md"
# The libraries read these when they are imported, so nothing that imports them is imported before.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
COLUMNS = "{:<10}  {:<52}  {:<50}  {:>9}  {:>9}  {}"
TITLES = COLUMNS.format("section", "what", "on", "largest", "tolerance", "").rstrip()
SECONDS_BETWEEN_LINES = 10  # of progress, where a line cannot overwrite the one before


def main() -> None:
    """Compare, or plant faults; exit with status 1 if anything disagrees."""
    parser = CommandParser("python -m tests.compare", description="compare minift with the packages it replaces")
    parser.add_argument("--only", metavar="SECTIONS", help=f"some of {','.join(SECTIONS)}, with commas between them")
    parser.add_argument(
        "--model", type=Path, help="folder of an OPT language model, or of adapters (default: the one in data/)"
    )
    parser.add_argument("--data", type=Path, help="JSON or JSONL rows, or pairs (default: those in data/)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for report.html")
    parser.add_argument("--quick", action="store_true", help="use as few rows as still exercise everything")
    parser.add_argument("--faults", action="store_true", help="plant ten faults, each of which must be noticed")
    options = parser.parse_args()
    sections = _sections(options.only)
    is_complete = not (options.only or options.model or options.data or options.quick)
    progress = _progress_line()
    with tempfile.TemporaryDirectory(prefix="minift-compare-") as scratch:
        # Otherwise copies of data sets would stay in the user's home.
        os.environ.update(OFFLINE | {"HF_DATASETS_CACHE": scratch})
        setting = _setting(options.model, options.data, options.quick or options.faults, Path(scratch), progress)
        try:
            if options.faults:
                agreed = _faults(setting, sections)
            else:
                agreed = _compare(setting, sections, options.out, README if is_complete else None)
        finally:
            progress("")
    if not agreed:
        sys.exit(1)


def _sections(only: str | None) -> tuple[str, ...]:
    names = SECTIONS if only is None else tuple(name.strip() for name in only.split(","))
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise UserError(f"--only {unknown[0]}: expected some of {', '.join(SECTIONS)}")
    return names


def _setting(
    model: Path | None, data: Path | None, quick: bool, scratch: Path, progress: Callable[[str], None]
) -> Setting:
    """Return the shipped model and data, or the user's own, whose fields show whether they are pairs."""
    from minift.files.datasets import PAIR_SCHEMAS, TRAINING_SCHEMAS, load_rows
    from minift.files.pretrained import find_model, load_for_sft
    from minift.files.tokenizer import check_fits, load_tokenizer, save_tokenizer
    from minift.files.weights import read_config, save_model, weight_files

    if model is not None and not model.is_dir():
        raise UserError(f"--model {model}: no such folder, expected one with config.json and weights")
    model = model or DATA / "model"
    files = find_model(model)
    if files.are_adapters:  # the other libraries get the model that they make
        merged, tokenizer = load_for_sft(files)
        model = scratch / "merged"
        save_model(merged, model)
        save_tokenizer(tokenizer, model)
    config, _ = read_config(model)
    weight_files(model)
    check_fits(load_tokenizer(model), config.vocab_size, str(model))
    setting = Setting(
        model=model,
        data=DATA / "instructions.jsonl",
        pairs=DATA / "pairs.jsonl",
        quick=quick,
        scratch=scratch,
        progress=progress,
        curves={},
    )
    if data is None:
        return setting
    row = load_rows(data, {**TRAINING_SCHEMAS, **PAIR_SCHEMAS})[0]
    is_pairs = any(all(field in row for field in fields) for fields in PAIR_SCHEMAS.values())
    return setting._replace(**{"pairs" if is_pairs else "data": data})


def _compare(setting: Setting, sections: tuple[str, ...], out: Path, readme_file: Path | None) -> bool:
    """Print the table line by line, write the page and perhaps the README, and return whether all agreed."""
    from minift.files.text import write_text
    from tests.compare.page import page, readme

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}, expected a folder that can be made") from None
    facts = {"versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES)}
    facts |= {"model": shown(setting.model), "rows": shown(setting.data), "pairs": shown(setting.pairs)}
    for name, value in facts.items():
        print(f"{name:<9} {value}")
    print()
    started = time.perf_counter()
    checks, differences = [], []
    for name in sections:
        for result in _section(name, setting):
            setting.progress("")
            if name == "differences":
                if not differences:
                    print("\nDeliberate differences\n")
                differences.append(result)
                print(f"{result.name}\n    minift     {result.minift}\n    reference  {result.reference}")
                print(f"    reason     {result.reason}", flush=True)
            else:
                if not checks:
                    print(TITLES)
                checks.append(result)
                print(line_of(result), flush=True)
    disagree = sum(not check.agrees for check in checks)
    count = f"{disagree} of {len(checks)}" if disagree else f"all {len(checks)}"
    verdict = f"{count} comparisons {'DISAGREE' if disagree else 'agree'}" if checks else "measured"
    verdict += f", in {time.perf_counter() - started:.0f} s"
    write_text(out / "report.html", page(checks, differences, setting.curves, facts))
    if readme_file is not None:
        table = [TITLES, *map(line_of, checks)]
        write_text(readme_file, readme(facts, table, verdict, differences, sections))
    setting.progress("")
    print(f"\n{verdict}; {out / 'report.html'}")
    return not disagree


def shown(path: Path) -> str:
    """Return a path as messages show it: relative to the repository if it is inside."""
    path = path.absolute()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def line_of(check: Check) -> str:
    """Return a check's line of the table."""
    line = COLUMNS.format(*check.cells)
    return f"{line}  ({check.note})" if check.note else line


def _faults(setting: Setting, sections: tuple[str, ...]) -> bool:
    """Plant each fault in turn; return whether its section noticed each."""
    from tests.compare.faults import FAULTS

    layout = "{:<44}  {:<10}  {:>9}  {}"
    print(layout.format("planted fault", "section", "largest", ""))
    noticed = True
    for fault in FAULTS:
        if fault.section not in sections:
            continue
        setting.progress(f"planting: {fault.name}")
        checks = _section(fault.section, setting)  # imports the section now; it runs with the fault
        with fault.plant():
            largest = first_disagreement(checks)
        setting.progress("")
        noticed = noticed and not largest.agrees
        verdict = "NOT NOTICED" if largest.agrees else f"disagree  ({largest.what})"
        print(layout.format(fault.name, fault.section, f"{largest.difference:.1e}", verdict), flush=True)
    return noticed


def first_disagreement(checks: Iterator[Check]) -> Check:
    """Return the first check that disagrees, without running the others; the last one if none does."""
    check = None
    for check in checks:
        if not check.agrees:
            break
    assert check is not None
    return check


def _section(name: str, setting: Setting) -> Iterator:
    setting.progress(f"{name}: starting")
    return importlib.import_module(f"tests.compare.{name}").compare(setting)


def _progress_line() -> Callable[[str], None]:
    """Return a function that shows one line on stderr; a terminal shows it over the line before."""
    if sys.stderr.isatty():

        def overwrite(text: str) -> None:
            sys.stderr.write("\r\x1b[2K" + text[:120])
            sys.stderr.flush()

        return overwrite
    last = -SECONDS_BETWEEN_LINES

    def print_sometimes(text: str) -> None:
        nonlocal last
        if text and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    return print_sometimes


if __name__ == "__main__":
    run_command(main)
