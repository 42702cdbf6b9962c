"""The notebook runs from its first cell to its last, on fewer steps, and finds what it says."""

import json
from pathlib import Path

import pytest
from graftax import peft

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "invent.ipynb"


@pytest.mark.full
def test_a_method_is_invented_checked_swept_and_plotted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peft, "methods", dict(peft.methods))
    cells = [c for c in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    space = {"__name__": "notebook"}
    for i, cell in enumerate(cells):
        source = "".join(cell["source"]).replace("STEPS, here = 120,", "STEPS, here = 24,")
        exec(compile(source, f"{NOTEBOOK.name}, code cell {i}", "exec"), space)
    assert "STEPS, here = 120," in "".join(cells[0]["source"]), "else this test takes a minute"
    assert (space["found"]["trials"], space["found"]["done"] + space["found"]["diverged"]) == (20, 20)
    assert peft.count(space["Core"](), space["base"].config) == 14 * 64
    assert (tmp_path / "invent/rates.png").stat().st_size > 5000
