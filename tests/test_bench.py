"""The benchmark: contenders take turns, a table is formed, and a run replaces the last one of its kind."""

import dataclasses
import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest
from graftax import InputError, peft
from graftax.model import init, presets
from graftax.peft.methods.lora import LoRA
from graftax.train.bench import __main__ as bench
from graftax.train.bench import claims, race, table
from graftax.train.bench.cases import Case

TINY = Case("tiny", dataclasses.replace(presets["tiny"], L=1), batch=2, T=16, lean=True)


@pytest.fixture(scope="module")
def results():
    return race.race(TINY, 3, "keep", None)


@pytest.mark.full
def test_contenders_run_and_learn(results):
    assert [(r.method, r.who, len(r.seconds)) for r in results] == [("full", "graftax", 3), ("lora", "graftax", 3)]
    full, lora = results
    assert full.losses[0] == pytest.approx(lora.losses[0], rel=1e-5)  # one base, one batch, and LoRA begins as nothing
    assert all(r.losses[-1] < r.losses[0] for r in results)
    assert lora.facts["arguments"] < full.facts["arguments"]
    assert all(0 < r.facts["libraries"] < r.facts["rss"] for r in results)


@pytest.mark.full
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


def curve(best, rates=claims.FULL):
    """Two seeds' losses, a parabola over log rate; the first is least at `best`, the second at twice that."""
    losses = {r: [1 + np.log(r / b) ** 2 for b in (best, 2 * best)] for r in rates}
    return claims.Line("LoRA", 1, losses)


def test_the_best_rate_is_found_between_those_tried():
    line = curve(1.3e-3)
    assert line.vertex([seed[0] for seed in line.losses.values()]) == pytest.approx(1.3e-3)
    assert line.vertex() == pytest.approx(1.3e-3 * 2**0.5)  # the mean of two parabolas
    assert line.best == 2e-3
    assert curve(1.0).vertex() == pytest.approx(claims.FULL[-1])  # a best at an end is said as it is, not beyond it
    assert [curve(b).shown for b in (1e-9, 1.3e-3, 1.0)] == ["0.00025 ↓", "0.002", "0.016 ↑"]
    line.losses[4e-3] = [1.0, float("inf")]
    assert line.vertex() == pytest.approx(2e-3)  # beside one that diverged
    text = claims.rates_table(curve(1.3e-3), [curve(1.3e-2, [10 * r for r in claims.FULL])])
    assert "| 0.0018 | 0.0013 0.0026 | 1.0 |" in text
    assert "| 0.018 | 0.013 0.026 | 10.0 |" in text


def test_the_best_rate_is_among_those_around_it():
    assert claims.around(0.01) == pytest.approx([0.005, 0.00707, 0.01, 0.01414], rel=1e-3)


def test_places_have_equal_numbers_of_parameters():
    params = jax.eval_shape(lambda: init(TINY.config, jax.random.key(0)))
    for rank in claims.BUDGETS:
        wanted = peft.count(LoRA(rank=rank, where="attention"), params)
        for where in claims.WHERE:
            one = peft.count(LoRA(rank=1, where=where), params)
            got = peft.count(LoRA(rank=claims.matched(params, where, wanted), where=where), params)
            assert abs(got - wanted) <= one / 2
