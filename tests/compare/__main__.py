"""`python -m tests.compare`, or `make compare`: minift beside trl, transformers, peft and sacreBLEU, as one table.

Every line says what was compared, on how much, the largest difference found, how much is tolerated, and whether that
makes the two agree. The exit status is 1 if any line disagrees. `--faults` turns it round: one fault after the other is
planted in minift, and the section concerned must disagree.
"""

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from minift.errors import CommandParser, UserError, run_command
from tests.compare import Check, Setting

SECTIONS = ("tokenizer", "masks", "model", "files", "sft", "reward", "lora", "generation", "bleu", "differences")
PACKAGES = ("minift", "trl", "transformers", "peft", "sacrebleu", "torch")
DATA = Path(__file__).parents[2] / "data"
# Read by the libraries when they are imported, which is why sections are imported only after this is set.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
COLUMNS = "{:<10}  {:<52}  {:<50}  {:>9}  {:>9}  {}"
SECONDS_BETWEEN_LINES = 10  # of progress, where they can't overwrite each other


def main() -> None:
    parser = CommandParser("python -m tests.compare", description="what agrees between minift and the reference")
    parser.add_argument("--only", metavar="SECTIONS", help=f"some of {','.join(SECTIONS)}, with commas between them")
    parser.add_argument("--model", type=Path, help="folder of an OPT language model; the one in data/ if left out")
    parser.add_argument("--data", type=Path, help="JSON or JSONL rows, or pairs; those in data/ if left out")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for report.html")
    parser.add_argument("--quick", action="store_true", help="on as few rows as still exercise everything")
    parser.add_argument("--faults", action="store_true", help="plant ten faults, each of which must be noticed")
    options = parser.parse_args()
    sections = _sections(options.only)
    progress = _progress_line()
    with tempfile.TemporaryDirectory(prefix="minift-compare-") as scratch:
        # Copies of data sets would otherwise be kept in the user's home.
        os.environ.update(OFFLINE | {"HF_DATASETS_CACHE": scratch})
        setting = _setting(options.model, options.data, options.quick or options.faults, Path(scratch), progress)
        try:
            agreed = _faults(setting, sections) if options.faults else _compare(setting, sections, options.out)
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
    """The shipped model and rows, or a user's own; whether these are pairs is seen by their fields."""
    from minift.datasets import PAIR_KINDS, TRAINING_KINDS, load_rows
    from minift.tokenizer import check_fits, load_tokenizer
    from minift.weights import read_config, resolve

    if model is not None and not model.is_dir():
        raise UserError(f"--model {model}: no such folder, expected one with config.json and weights")
    model = resolve(model or DATA / "model")
    check_fits(load_tokenizer(model), read_config(model / "config.json").vocab_size, str(model))
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
    row = load_rows(data, {**TRAINING_KINDS, **PAIR_KINDS})[0]
    is_pairs = any(all(field in row for field in fields) for fields in PAIR_KINDS.values())
    return setting._replace(**{"pairs" if is_pairs else "data": data})


def _compare(setting: Setting, sections: tuple[str, ...], out: Path) -> bool:
    """Print the table as it is made, leave the page, and say whether all agreed."""
    from minift.files import write_text
    from tests.compare.page import page

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
    titles = COLUMNS.format("section", "what", "on", "largest", "tolerance", "")
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
                    print(titles)
                checks.append(result)
                print(line_of(result), flush=True)
    write_text(out / "report.html", page(checks, differences, setting.curves, facts))
    setting.progress("")
    disagree = sum(not check.agrees for check in checks)
    count = f"{disagree} of {len(checks)}" if disagree else f"all {len(checks)}"
    verdict = f"{count} comparisons {'DISAGREE' if disagree else 'agree'}" if checks else "measured"
    print(f"\n{verdict}, in {time.perf_counter() - started:.0f} s; {out / 'report.html'}")
    return not disagree


def shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def line_of(check: Check) -> str:
    difference = f"{check.difference:.1e}" if check.difference else "0"
    tolerance = f"{check.tolerance:.2g}"
    verdict = "agree" if check.agrees else "DISAGREE"
    line = COLUMNS.format(check.section, check.what, check.on, difference, tolerance, verdict)
    return f"{line}  ({check.note})" if check.note else line


def _faults(setting: Setting, sections: tuple[str, ...]) -> bool:
    """Plant each fault in turn; True if the section concerned noticed every one."""
    from tests.compare.faults import FAULTS

    layout = "{:<44}  {:<10}  {:>9}  {}"
    print(layout.format("planted fault", "section", "largest", ""))
    noticed = True
    for fault in FAULTS:
        if fault.section not in sections:
            continue
        setting.progress(f"planting: {fault.name}")
        checks = _section(fault.section, setting)  # imported before anything is planted, and run after it
        with fault.plant():
            largest = first_disagreement(checks)
        setting.progress("")
        noticed = noticed and not largest.agrees
        verdict = "NOT NOTICED" if largest.agrees else f"disagree  ({largest.what})"
        print(layout.format(fault.name, fault.section, f"{largest.difference:.1e}", verdict), flush=True)
    return noticed


def first_disagreement(checks: Iterator[Check]) -> Check:
    """The first check that disagrees, without going on from there; the last one if none does."""
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
    """What shows one line on stderr, in place of the one before it where that can be done."""
    if sys.stderr.isatty():

        def overwrite(text: str) -> None:
            sys.stderr.write("\r\x1b[2K" + text[:120])
            sys.stderr.flush()

        return overwrite
    last = -SECONDS_BETWEEN_LINES

    def now_and_then(text: str) -> None:
        nonlocal last
        if text and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    return now_and_then


if __name__ == "__main__":
    run_command(main)
