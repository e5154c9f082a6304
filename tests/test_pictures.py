"""README's pictures: the mask is that of the row, and both are files that a browser reads."""

import re
from pathlib import Path
from xml.etree import ElementTree

from data.make import pictures
from tests.runs import ROOT, write_lines

SHIPPED = ROOT / "data" / "pictures"


def test_the_pictures_are_those_of_the_script(tmp_path: Path) -> None:
    losses = [3.3, 1.1, 0.6, 0.4, 0.5]
    lines = [{"step": step, "split": "train", "loss": loss} for step, loss in enumerate(losses[1:] * 30, start=1)]
    lines += [{"step": step, "split": "eval", "loss": loss} for step, loss in zip((0, 60, 120), losses, strict=False)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    (tmp_path / "run.json").write_text("{}")
    pictures.main(["--run", str(tmp_path), "--out", str(tmp_path / "made")])
    mask = (tmp_path / "made" / "mask.svg").read_text()
    assert mask == (SHIPPED / "mask.svg").read_text()
    texts = re.findall(r'<text class="(\w+)"[^>]*>([^<]*)</text>', mask)
    on = [text for css_class, text in texts if css_class == "on"]
    assert on == ["gains = [payment * 2 for payment in payments if payment % 2 == 0]⟨&lt;/s&gt;⟩"]
    assert texts[1] == ("off", "Rewrite this loop as a list comprehension.↵")
    made = (tmp_path / "made" / "loss.svg").read_text()
    assert made.count("<circle") == 3 + 1 and "step 120: 0.6" in made and "best checkpoint, step 120: 0.6" in made
    for path in [*SHIPPED.glob("*.svg"), tmp_path / "made" / "loss.svg"]:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("viewBox")
