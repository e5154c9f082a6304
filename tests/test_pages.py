"""The HTML pages in headless Chromium, 390 to 1280 pixels wide, light and dark: nothing overflows, breaks or fails.

`make test-pages` runs these tests and leaves the screenshots in runs/pages/pictures/: look at them. The tests are
skipped where there is no Chromium that starts.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from minift.commands import tour
from tests.compare import Check, Difference
from tests.compare.page import page
from tests.runs import TINY, few_rows, run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAGES = ("sft", "rm", "compare", "tour")
WIDTHS, HEIGHT = (390, 800, 1280), 5000
DARK, LIGHT = 0, 1  # Chromium's numbers
LONGEST = 24  # a longer one, such as a fingerprint, may be broken
SMALLEST, LARGEST = 9, 24  # height of a line in pixels; LARGEST: in a chart

# Measures a page and sends the findings to the page around it, with its <details> open.
MEASURE = (
    """<script>
addEventListener("load", () => {
  const closed = [...document.querySelectorAll("details:not([open])")], broken = [], outside = [], unreadable = [];
  closed.forEach(details => details.open = true);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), range = document.createRange();
  while (texts.nextNode()) {
    const node = texts.currentNode;
    if (["SCRIPT", "STYLE"].includes(node.parentElement.tagName)) continue;
    for (const word of node.data.matchAll(/((?<![\\p{L}\\p{N}])[-−+])?[\\p{L}\\p{N}_.,%]+/gu)) {
      range.setStart(node, word.index), range.setEnd(node, word.index + word[0].length);
      const boxes = [...range.getClientRects()].filter(box => box.width > 0);
      if (new Set(boxes.map(box => Math.round(box.top))).size > 1 && word[0].length <= LONGEST) broken.push(word[0]);
      const inSvg = node.parentElement.closest("svg");
      if (inSvg && boxes.some(box => box.left < 0 || box.right > innerWidth)) outside.push(word[0]);
      if (boxes.some(box => box.height < SMALLEST || inSvg && box.height > LARGEST)) unreadable.push(word[0]);
    }
  }
  const findings = {width: innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches,
                    overflow: document.scrollingElement.scrollWidth - innerWidth, broken, outside, unreadable};
  closed.forEach(details => details.open = false);
  parent.postMessage(findings, "*");
});
</script>""".replace("LONGEST", str(LONGEST))
    .replace("SMALLEST", str(SMALLEST))
    .replace("LARGEST", str(LARGEST))
)
# A window of Chromium is at least 500 pixels wide, a frame in it is not.
AROUND = """<!doctype html><html style="color-scheme: light dark"><body style="margin: 0">
<script>addEventListener("message", event => document.body.dataset.findings = JSON.stringify(event.data))</script>
<iframe src="measured.html" style="border: 0; width: {}px; height: {}px"></iframe></body></html>"""
GOOD = {"broken": [], "outside": [], "unreadable": [], "console": []}


def measure(content: str, folder: Path, width: int = 390, scheme: int = LIGHT, picture: str = "picture.png") -> dict:
    """Return what Chromium finds in a page, {} if it does not start; write a screenshot into the folder."""
    (folder / "measured.html").write_text(content + MEASURE, encoding="utf-8")
    (folder / "around.html").write_text(AROUND.format(width, HEIGHT), encoding="utf-8")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        return {}
    command = [
        *(program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"),
        *(f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"),
        *(
            f"--window-size={max(width, 500)},{HEIGHT}",
            f"--screenshot={folder / picture}",
            "--virtual-time-budget=5000",
        ),
        *("--dump-dom", (folder / "around.html").as_uri()),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return {}
    found = re.search(r'data-findings="(.*?)"', done.stdout)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]
    return json.loads(html.unescape(found[1])) | {"console": console} if found else {}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder for screenshots; skip the tests without a Chromium that starts."""
    folder = tmp_path_factory.mktemp("pictures", numbered=False)
    if not measure("<!doctype html><p>It starts.", folder):
        pytest.skip("no Chromium that starts: install it (the package chromium on Debian)")
    return folder


@pytest.fixture(scope="module")
def pages(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the pages: the reports of two short runs, of a comparison, and the tour."""
    folder = tmp_path_factory.mktemp("pages")
    for script in ("sft", "rm"):
        flags = [*TINY, *few_rows(script, folder), "--eval-every", 2]
        run(script, *flags, *(["--run-checks"] if script == "sft" else []), "--out", folder / script)
    tour.main(["--html", str(folder / "tour.html")])
    checks = [
        Check("tokenizer", "ids of difficult strings", "2,000 rows, 131,072 tokens", 0, 0),
        Check("generation", "greedy, 32 prompts of ragged lengths, token ids", "1,024 tokens", 3, 0, "why " * 30),
    ]
    differences = [Difference("ties", "counted as wrong", "counted as 1/2 each", "an equal reward is no choice " * 5)]
    curves = {"SFT": {"minift": [3.0, 2.0, 1.0], "trl": [3.0, 2.0, 1.5]}}
    compared = page(checks, differences, curves, {"versions": "minift 0.1.0, transformers 5.23.0, torch 2.13.0+cpu"})
    files = {script: folder / script / "report.html" for script in ("sft", "rm")} | {"tour": folder / "tour.html"}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items()} | {"compare": compared}


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_and_breaks_no_word(
    name: str, width: int, scheme: int, pages: dict[str, str], pictures: Path
) -> None:
    picture = f"{name}-{width}-{'dark' if scheme == DARK else 'light'}.png"
    findings = measure(pages[name], pictures, width, scheme, picture)
    assert findings == GOOD | {"width": width, "dark": scheme == DARK, "overflow": 0}
    assert (pictures / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "fault, finding",
    [
        ('<p style="width: 2em; overflow-wrap: anywhere">agree', {"broken": ["agree"]}),
        ('<p style="width: 2em; overflow-wrap: anywhere">-0.0123', {"broken": ["-0.0123"]}),
        ('<details><p style="width: 2em; overflow-wrap: anywhere">12,345', {"broken": ["12,345"]}),
        ('<p style="width: 2em">two words, max-steps, data/rows', {}),
        (f'<p style="width: 2em; overflow-wrap: anywhere">{"0123456789abcdef" * 4}', {}),
        ('<p style="width: 600px">wide', {"overflow": 210}),
        ('<svg viewBox="0 0 390 20" overflow="visible"><text x="-9" y="15">label</text></svg>', {"outside": ["label"]}),
        ('<svg viewBox="0 0 900 9"><text y="9" font-size="16">label</text></svg>', {"unreadable": ["label"]}),
        ('<svg viewBox="0 0 90 40"><text y="30" font-size="16">label</text></svg>', {"unreadable": ["label"]}),
    ],
)
def test_faults_are_found(fault: str, finding: dict, pictures: Path) -> None:
    content = f'<!doctype html><meta charset="utf-8"><body style="margin: 0">{fault}</body>'
    assert measure(content, pictures) == GOOD | {"width": 390, "dark": False, "overflow": 0} | finding


def test_console_errors_are_found(pictures: Path) -> None:
    [line] = measure("<script>console.error('a fault')</script>", pictures)["console"]
    assert "a fault" in line
