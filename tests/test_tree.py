"""The rule language: paths, layer ranges, first match, errors that name the nearest."""

import re
import time

import jax
import pytest
from graftax import InputError
from graftax.model import pattern
from graftax.model.tree import did_you_mean, match_rules, name_and_layers, named, nested, split_layer_index, true_ranges
from graftax.peft import masks
from tiny import make_base, same


def picked(where, base):
    return masks.select(where, base.params)


def test_named_and_nested_are_inverse(base):
    assert same(nested(named(base.params)), base.params)


def test_canonical_names():
    assert name_and_layers("layers/3/mlp/up") == ("layers/mlp/up", range(3, 4))
    assert name_and_layers("layers/mlp/up[4:8]") == ("layers/mlp/up", range(4, 8))
    assert name_and_layers("lora/layers/attn/q[1:2]/a") == ("lora/layers/attn/q/a", range(1, 2))
    assert name_and_layers("embed/table") == ("embed/table", None)
    assert split_layer_index("layers/mlp/up[4:8]") == ("layers/mlp/up", (4, 8))


def test_rules_pick_layers_alike_stacked_and_unrolled():
    stacked, unrolled = make_base(L=4), make_base(L=4, scan=False)
    for where, layers in (
        ("layers/[1:3]/mlp/.*", [1, 2]),
        ("layers/[-1]/mlp/.*", [3]),
        ("layers/[:]/mlp/.*", [0, 1, 2, 3]),
    ):
        ranges = picked(where, stacked)
        assert set(ranges) == {f"layers/mlp/{n}" for n in ("gate", "up", "down")}
        assert all(r == [(layers[0], layers[-1] + 1)] for r in ranges.values())
        assert set(picked(where, unrolled)) == {f"layers/{i}/mlp/{n}" for n in ("gate", "up", "down") for i in layers}


def test_a_rule_that_would_take_for_ever(base, tmp_path, monkeypatch):
    """Somebody else's config.json, or rule: one line that names it, as those of a rule that is no pattern."""
    monkeypatch.setattr(pattern, "TIME_LIMIT", 0.05)
    began = time.process_time()
    for file in ("runs/x/config.json", tmp_path / "other.json"):  # a second look at it takes no more time
        with pytest.raises(InputError) as caught, pattern.pattern_source(file):
            picked("(.|..|...|....)+[!?]", base)
        assert str(caught.value).startswith(f"{file}: rule '(.|..|...|....)+[!?]' takes more than 0.05 s")
    assert time.process_time() - began < 10
    for rule, words in {
        "layers/((a{1000}){1000}){1000}": "counts of more than 1,000 repeats",
        "layers/attn/q{e}": "a brace without a count",  # an approximate match of `regex`
        "layers/attn/[[:alpha:]]": "Possible nested set",
        "layers/[-]/mlp/.*": "matches no parameter",
        "layers/[]/mlp/.*": "is not a regular expression",
        f"layers/[{'9' * 5000}]/mlp/.*": "matches no parameter",
    }.items():
        with pytest.raises(InputError, match=re.escape(words)):
            picked(rule, base)


def test_first_match_wins_and_layers_may_differ(base):
    values = match_rules([("layers/[0]/mlp/.*", 1), (".*/mlp/.*", 2), (".*", 3)], base.params)
    assert values["layers/mlp/up"] == [1, 2]
    assert values["layers/attn/q"] == [3, 3]
    assert values["embed/table"] == [3]


def test_an_uncovered_leaf_and_a_rule_without_match_are_errors(base):
    with pytest.raises(InputError, match="no rule covers final_norm/scale"):
        match_rules([("embed/.*|layers/.*", 1)], base.params)
    with pytest.raises(InputError, match=r"'layers/mpl/up' matches no parameter; did you mean layers/mlp/up"):
        match_rules([("layers/mpl/up", 1), (".*", 2)], base.params)
    with pytest.raises(InputError, match="is not a regular expression"):
        match_rules([("layers/(", 1)], base.params)
    with pytest.raises(InputError, match=r"layers/\[7:\]/mlp/.*matches no parameter"):
        match_rules([("layers/[7:]/mlp/.*", 1)], base.params, default=0)


@pytest.mark.parametrize("name", masks.named)
def test_every_named_mask_picks_something(name):
    base = make_base(tied=False)
    values = jax.tree.leaves(masks.mask(name, base.params))
    assert 0 < sum(bool(v) if isinstance(v, bool) else v.any() for v in values) <= len(values)
    if name not in ("all",):
        assert not all(v is True for v in values)


def test_mask_of_a_layer_range_is_an_array(base):
    mask = masks.mask("last_1", base.params)
    assert mask["layers"]["mlp"]["up"].tolist() == [[[False]], [[True]]]
    assert mask["embed"]["table"] is False


def test_unknown_mask_names_the_known(base):
    with pytest.raises(InputError, match="did you mean norms"):
        picked("nroms", base)
    with pytest.raises(InputError, match="masks by name: all, norms"):
        picked("zzz", base)


def test_runs_and_nearest():
    assert true_ranges([True, True, False, True]) == [(0, 2), (3, 4)]
    assert true_ranges([]) == []
    assert "layers/attn/q" in did_you_mean("layers/att/q", ["layers/attn/q", "embed/table"])
