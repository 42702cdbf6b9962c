"""Every notebook runs from its first cell to its last, and shows what it says."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from graftax import peft

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
FEWER_STEPS = {"invent": 24}  # of those that would take a minute; their text is about more


def check_invent(space):
    assert (space["sweep"]["trials"], space["sweep"]["done"] + space["sweep"]["diverged"]) == (20, 20)
    assert peft.count(space["Core"](), space["base"].config) == 14 * 64


def check_hugging_face(space):
    scores = [space["summary"][when]["scores"]["exact_match"] for when in ("before", "after")]
    assert scores[1] > max(scores[0], 0.7), "LoRA has learned the task"


def check_merge(space):
    losses = {name: {task: float(loss) for task, loss in row.items()} for name, row in space["results"].items()}
    assert max(losses["base"]["0"], losses["adapter A"]["A"], losses["adapter B"]["B"]) < 0.5
    assert min(losses["base"]["A"], losses["adapter A"]["B"], losses["adapter B"]["A"]) > 3
    for task in "AB":
        assert losses["sum"][task] < losses["base"][task], "the sum keeps a part of both tasks"


def check_plan(space):
    plans = space["plans"]
    assert plans["full"]["bytes"]["total"] > plans["lora"]["bytes"]["total"] > plans["qlora"]["bytes"]["total"]
    assert not space["tried"]["full, 2x2"]["fits"]


@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peft, "methods", dict(peft.methods))  # a notebook may add its own
    cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    space = {"__name__": "notebook"}
    for i, cell in enumerate(cells):
        source = "".join(cell["source"])
        if steps := FEWER_STEPS.get(path.stem):
            source, n = re.subn(r"^STEPS = \d+$", f"STEPS = {steps}", source, flags=re.MULTILINE)
            assert n == (i == 0), "the steps are set once, in the first cell"
        exec(compile(source, f"{path.name}, code cell {i}", "exec"), space)
    pictures = list(tmp_path.rglob("*.png"))
    assert any(picture.stat().st_size > 5000 for picture in pictures), "a notebook ends with something to look at"
    plt.close("all")
    globals().get(f"check_{path.stem}", lambda space: None)(space)
