"""Every notebook runs from its first cell to its last, and shows what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FEWER_STEPS = {"invent": 24}  # of those that would take a minute; their text is about more


def check_invent(space):
    assert (space["sweep"]["trials"], space["sweep"]["done"] + space["sweep"]["diverged"]) == (20, 20)
    assert space["peft"].count(space["Core"](), space["base"].config) == 14 * 64


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
    assert [plan["fits"] for plan in space["tried"].values()] == [False, True, False, True], "as the text says"


@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    """In a process of its own, on one device unless it asks for more."""
    cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    source = "\n\n".join("".join(cell["source"]) for cell in cells)
    if steps := FEWER_STEPS.get(path.stem):
        source, n = re.subn(r"^STEPS = \d+$", f"STEPS = {steps}", source, flags=re.MULTILINE)
        assert n == 1
    if f"check_{path.stem}" in globals():
        source += f"\n\nimport test_notebook\n\ntest_notebook.check_{path.stem}(globals())\n"
    environment = os.environ | {
        "XLA_FLAGS": re.sub(r"\S*device_count\S*", "", os.environ["XLA_FLAGS"]),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "MPLBACKEND": "Agg",
    }
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pictures = list(tmp_path.rglob("*.png"))
    assert any(picture.stat().st_size > 5000 for picture in pictures), "a notebook ends with something to look at"
