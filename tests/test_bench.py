"""The benchmark: contenders take turns, a table is formed, and a run replaces the last one of its kind."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import optax
import pytest
from graftax import InputError
from graftax.model import presets
from graftax.peft import LoRAPlus
from graftax.train.bench import __main__ as bench
from graftax.train.bench import methods, race, table
from graftax.train.bench.cases import Case
from graftax.train.config import Optim
from graftax.train.optim import make_optimizer

TINY = Case("tiny", dataclasses.replace(presets["tiny"], L=1), batch=2, T=16, lean=True)


@pytest.fixture(scope="module")
def results():
    return race.race(TINY, 3, "keep", None)


def test_contenders_run_and_learn(results):
    assert [(r.method, r.who, len(r.seconds)) for r in results] == [("full", "graftax", 3), ("lora", "graftax", 3)]
    full, lora = results
    assert full.losses[0] == pytest.approx(lora.losses[0], rel=1e-5)  # one base, one batch, and LoRA begins as nothing
    assert all(r.losses[-1] < r.losses[0] for r in results)
    assert lora.facts["arguments"] < full.facts["arguments"]
    assert all(0 < r.facts["libraries"] < r.facts["rss"] for r in results)


def test_the_table(results):
    other = [dataclasses.replace(r, who="HF", seconds=tuple(2 * s for s in r.seconds)) for r in results]
    text = table.section([*results, *other], "keep")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4
    assert len({row.count("|") for row in rows}) == 1
    assert "tiny lora: graftax is 2.00 times as fast as HF, in 1.00 of its peak RSS" in text
    assert "graftax lora takes" in text
    assert "NOT FINITE" in table.table([dataclasses.replace(results[0], losses=(1.0, float("nan")))])


def test_a_run_replaces_the_last_one_of_its_kind(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("intro\n")
    for text, key in (("one\n", "cpu keep"), ("two\n", "cpu plain"), ("three\n", "cpu keep")):
        table.write(text, key, path)
    assert [line for line in path.read_text().splitlines() if line and "<!--" not in line] == ["intro", "three", "two"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cases", "XL"], "the cases on cpu are S, M, M lean"),
        (["--steps", "0"], "wanted 1 or more"),
        (["--torch-python", "/no/python"], "not a Python that runs"),
    ],
)
def test_bad_flags_are_named(flags, said):
    with pytest.raises(InputError, match=said):
        bench.bench(flags)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="this Python has torch")
def test_a_python_without_torch_is_named():
    with pytest.raises(InputError, match=r"has no torch.*; pip install"):
        race.check_torch(sys.executable)


def test_a_contender_that_dies_says_why():
    with pytest.raises(InputError, match=r"bench: x stopped with exit status 1: .*no luck"):
        race.Contender([sys.executable, "-c", "raise SystemExit('no luck')"], {}, {}, "x")


def test_needs_jax_flax_optax_and_numpy_alone():
    look = "import sys, graftax.train.bench.__main__, graftax.train.bench.jax_peer; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout.split()
    assert not {"grain", "tyro", "orbax", "datasets", "sentencepiece", "tokenizers", "torch"} & set(loaded)


def result_lines(scores, edge="b"):
    """A file of results: of each method two scores, and a search whose best rate is 0.1, of `edge` the lowest tried."""
    floors = dict.fromkeys(methods.TASKS, 0.1)
    lines = [{"steps": 1, "about": "today", "floors": floors}]
    for name, pair in scores.items():
        cost = {"trainable": 5, "share": 0.5, "peak": 2e6, "ms": 1.0, "ratio": 0.5}
        lines.append({"kind": "cost", "method": name, **cost})
        for task in methods.TASKS:
            key, rates = {"task": task, "method": name}, (0.1, 0.3, 0.9) if name == edge else (0.01, 0.1, 0.3)
            lines += [
                {"kind": "search", **key, "rate": r, "valid": abs(r - 0.1) if r < 0.2 else float("nan")} for r in rates
            ]
            lines += [{"kind": "score", **key, "rate": 0.1, "seed": i, "score": x, "loss": 1.0, "forgot": 0.5}
                      for i, x in enumerate(pair)]  # fmt: skip
    return lines


def test_methods_are_ranked_as_far_as_the_seeds_allow():
    text = methods.section(
        result_lines({"c": (0.30, 0.32), "a": (0.90, 0.92), "b": (0.88, 0.90), "d": (0.0, 0.0)}), "snips"
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert [row[:2] for row in rows[2:]] == [["a", "a"], ["b", "a"], ["c", "b"], ["d", "c"]]
    assert [row[5] for row in rows[2:]] == ["1.0e-01", "1.0e-01 ↓", "1.0e-01", "1.0e-01"]
    assert "the 3 methods clearly above that: s = 0.0141 (3 degrees of freedom)" in text  # d is at the floor: no spread
    assert "= 0.045 apart, any two of 4 if" in text  # t 0.975 of 3 degrees: 3.182
    assert "Not told apart as best: a, b." in text


def test_groups_overlap():
    assert methods.letters([0.9, 0.8, 0.7, 0.2], 0.15) == ["a", "ab", "b", "c"]


def test_the_tables_are_made_again_of_a_file(tmp_path, capsys):
    path = tmp_path / "methods.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in result_lines({"a": (0.9, 0.8), "b": (0.3, 0.2)})))
    methods.main(["--json", str(path)])
    assert capsys.readouterr().out.count("\n## ") == len(methods.TASKS)
    with pytest.raises(InputError, match="no --base to run"):
        methods.main(["--json", str(tmp_path / "none")])


def test_a_rate_in_the_state_is_the_rate_of_the_schedule(base):
    method = LoRAPlus(rank=2, where="layers/attn/q")
    trainable = method.init(jax.random.key(0), base.params)
    grads = jax.tree.map(lambda x: x + 0.1, trainable)
    one, other = methods.optimizer(method, trainable, 10), make_optimizer(
        Optim(lr=3e-2, warmup=0.1, weight_decay=0.0), trainable, 10, method
    )  # fmt: skip
    state = optax.tree.set(one.init(trainable), step_size=3e-2)
    found, wanted = one.update(grads, state, trainable), other.update(grads, other.init(trainable), trainable)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((abs(a - b) <= 1e-6).all()), found[0], wanted[0])))
