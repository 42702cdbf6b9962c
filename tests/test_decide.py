"""A decision: every option is scored and costed on one base; the cheapest that reaches the target is named."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from faulty import programs, runs  # noqa: F401
from graftax.peft import LoRA, Subset
from graftax.train.cli import main
from graftax.train.cluster.signals import Stop, Stopped
from graftax.train.config import Optim, Run
from graftax.train.experiments import learning_curve, step_costs
from graftax.train.experiments.base_cache import BaseCache
from graftax.train.experiments.decide import Decide
from graftax.train.experiments.example_selection import BM25Examples, EmbeddingExamples, RandomExamples
from graftax.train.experiments.prompts import PromptFormat
from graftax.train.experiments.report import decide, options
from graftax.train.experiments.results_log import read_results, select
from graftax.train.inputs import tuning_rows
from graftax.train.runs.load import load_run
from test_faults_input import said

WORDS = [f"{a}{b}" for a in "bdk" for b in ("an", "om", "it")]


@pytest.fixture(scope="module")
def plan(runs, tmp_path_factory):  # noqa: F811
    """On the tiny base, whose answers are the words that stand in the question."""
    folder = tmp_path_factory.mktemp("decide")
    rows = [{"prompt": f"{word} {word} {i}", "completion": word} for i in range(20) for word in WORDS]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    run = dataclasses.replace(runs["lora"], mesh=(1, -1, 1), steps=6, save_every=0, log_every=3, eval_rows=8)
    run = dataclasses.replace(run, optim=Optim(lr=4e-3), out=str(folder / "out"))
    few = {"factors": (1.0,), "seeds": 1, "lanes": 4}
    return Decide(run, str(folder / "words.jsonl"), "exact_match>=0.5", "norms", (20, 40), 2, **few)


@pytest.fixture(scope="module")
def done(plan):
    """(what it returned, the lines of its results)."""
    return plan.run(), read_results(Path(plan.config.out) / "results.jsonl")


@pytest.mark.full
def test_every_option_is_there(plan, done):
    told, lines = done
    names = [row["option"] for row in told["options"]]
    ways = ("zero-shot", "2 random examples", "2 nearest examples by BM25", "2 nearest examples by embedding")
    assert names == [
        "the nearest example's answer (BM25), no model",
        *(name for way in ways for name in (way, f"{way}, most likely choice", f"{way}, choice with the largest gain")),
        "lora on 20 examples", "lora on 40 examples", "lora on all examples", "mask norms", "full fine-tuning",
    ]  # fmt: skip
    by_name = {row["option"]: row for row in told["options"]}
    assert by_name["zero-shot"]["prompt tokens"] < by_name["2 random examples"]["prompt tokens"]
    assert by_name["zero-shot"]["total FLOPs"] == 100_000 * by_name["zero-shot"]["FLOPs per request"]
    trained = by_name["lora on 20 examples"]
    assert trained["training FLOPs"] == pytest.approx(
        6 * select(lines, kind="cost", method="mask norms")[0]["flops"], rel=0.3
    )
    assert trained["total FLOPs"] == trained["training FLOPs"] + 100_000 * trained["FLOPs per request"]
    text = (Path(plan.config.out) / "decision.md").read_text("utf-8")
    assert all(f"| {name} |" in text for name in names)
    assert told["decision"] in text
    copied = select(lines, name="the nearest example's answer (BM25), no model")[0]
    assert copied["score"] >= 0.9, "the word stands in the question, and in the nearest example"
    assert told["decision"].startswith(
        "The cheapest option that reliably reaches exact_match >= 0.5 is the nearest example's"
    )


@pytest.mark.full
def test_the_trained_ones_are_runs_on_so_many_examples(plan, done):
    _, lines = done
    line = select(lines, kind="test", method="lora on 40 examples")[0]
    got = load_run(Path(plan.config.out) / line["folder"])
    assert got.run.data.examples == 40
    assert got.run.method == LoRA(rank=2)
    assert got.manifest["rows"]["examples"] == 40
    few, more = (select(lines, kind="test", method=f"lora on {n} examples")[0]["digests"]["data"] for n in (20, 40))
    assert few != more


def test_fewer_examples_are_part_of_more(plan):
    base = BaseCache().base(plan.config)
    kept = []
    for n in (5, 20, 0):
        data = dataclasses.replace(plan.config.data, task=plan.task, examples=n)
        task, sft = tuning_rows(data, 0, base.tokenizer, base.config.V)
        rows = {tuple(row["ids"][row["segments"] == s]) for row in sft.rows for s in set(row["segments"]) - {0}}
        kept.append(rows)
        assert sft.examples == (n or len(task.train))
    assert kept[0] < kept[1] < kept[2]
    many = dataclasses.replace(plan.config.data, task=plan.task, examples=1000)
    said(lambda: tuning_rows(many, 0, base.tokenizer, base.config.V), "--data.examples 1,000: words has 1")


@pytest.mark.full
def test_it_goes_on(plan, done):
    """What is in results.jsonl is not done again, and says the same."""
    again = dataclasses.replace(plan, config=dataclasses.replace(plan.config, resume="auto"))
    told, lines = done
    assert again.run() == told
    assert read_results(Path(plan.config.out) / "results.jsonl") == lines
    said(lambda: dataclasses.replace(again, target="exact_match>=0.6").run(), "--resume: target", "take another --out")
    said(lambda: plan.run(), "is not an empty folder")


@pytest.mark.parametrize("when", [1, 4])
def test_a_signal_while_costs_are_measured(when, monkeypatch):
    """Is honoured before the next method compiles, and before the next turn, though nothing raised where it came."""
    stop, steps = Stop(), []

    def step(state, frozen, batch):
        steps.append(state)
        stop.asked = len(steps) >= 6
        return state, {}

    def compiled(phase):
        steps.append("compiled")
        stop.asked = len(steps) >= when
        return step, {"step_peak_bytes": 0, "compile_seconds": 0.0}

    monkeypatch.setattr(step_costs, "compile_step", compiled)
    monkeypatch.setattr(step_costs, "step_flops", lambda run, cache: 1.0)
    cache = SimpleNamespace(replicated=None)
    cache.setup = lambda run: SimpleNamespace(
        state=NamedTuple("State", [("trainable", dict)])({}), frozen={}, totals={"trainable": 1, "base": 2}
    )
    both = {name: Run(method=method) for name, method in (("lora", LoRA()), ("full", Subset("all")))}
    with pytest.raises(Stopped):
        list(step_costs.measure_costs(both, cache, stop))
    assert len(steps) == (1 if when == 1 else 6), "one compiled; or two, and the first method's turn"


def test_what_stands_before_a_row_is_near(plan):
    cache = BaseCache()
    (model, params), tokenizer = cache.model(plan.config), cache.base(plan.config).tokenizer
    train = [{"prompt": f"say {word} {i}", "completion": word} for i in range(4) for word in WORDS]
    rows = [{"prompt": f"say {word} 9", "completion": word} for word in WORDS]
    states = EmbeddingExamples(train, model, params, tokenizer)
    for shelf in (BM25Examples(train), states):
        near = shelf.nearest(rows, 3)
        assert near.shape == (len(rows), 3)
        right = [train[some[-1]]["completion"] == row["completion"] for some, row in zip(near, rows, strict=True)]
        assert np.mean(right) > 0.7
    lot = RandomExamples(train).nearest(rows, 3)
    assert (lot == lot[0]).all()
    assert (states.nearest(rows[:1], 3) == states.nearest(rows, 3)[:1]).all(), "padding changes nothing"
    assert states.bytes == BM25Examples(train).bytes + 4 * len(train) * model.config.D
    assert states.prepare_flops == pytest.approx(len(train) * states.query_flops)
    short = [{"prompt": f"{i} + {i}", "completion": str(2 * i)} for i in range(9)]
    assert BM25Examples(short).nearest([{"prompt": "7 + 7"}], 1)[0, 0] == 7, "words of one character are words"
    assert BM25Examples([{"prompt": "?!", "completion": ""}] * 4).nearest([{"prompt": "..."}], 2).shape == (1, 2)
    assert BM25Examples(short).nearest([{"prompt": "unheard"}], 2).shape == (1, 2)


def test_forms(plan):
    tokenizer = BaseCache().base(plan.config).tokenizer
    row, shots = {"prompt": "say it", "completion": "it"}, [{"prompt": "say om", "completion": "om"}] * 3
    lines, pairs, chat = (PromptFormat(name, tokenizer, 40) for name in ("lines", "pairs", "chat"))
    assert lines.text(row, shots[:1]) == "say om\nom\n\nsay it\n"
    assert pairs.text(row, shots[:1]) == "say om: om\nsay it:"
    assert tokenizer.decode(lines.prompts([row], [shots[:1]])[0]) == "say om\nom\n\nsay it\n"
    assert lines.extract_answer("\nan it\nsay") == pairs.extract_answer(" an it\nsay") == "an it"
    for form in (lines, pairs, chat):
        (tail,) = form.continuations(row, ["it"])
        assert tokenizer.decode(tail).strip() == "it"
        lengths = [len(PromptFormat(form.name, tokenizer, n).prompts([row], [shots])[0]) for n in (40, 25, 12)]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[-1] <= 12, "examples make way"
    said(lambda: PromptFormat("lines", tokenizer, 2).prompts([row], [shots]), "do not fit into the base's 2", "say it")


def test_a_curve_is_found_again():
    sizes, true = [100, 300, 1000, 10000], learning_curve.Curve(3.0, 0.4)
    errors = [true.error(n) for n in sizes]
    draws = np.array(errors)[:, None] * np.exp(np.random.default_rng(0).normal(0, 0.02, (4, 200)))
    look = learning_curve.forecast(sizes, draws, errors, true.error(50_000))
    assert look.curve == pytest.approx(true)
    assert look.needed == pytest.approx(50_000, rel=1e-6)
    assert look.needed_low < 50_000 < look.needed_high
    assert look.residual == pytest.approx(0, abs=1e-9)
    assert learning_curve.forecast(sizes, draws, errors, 0.0).needed == math.inf, "no error at all is out of reach"
    assert learning_curve.fit(sizes, [0.3] * 4).examples(0.1) == math.inf
    assert math.isnan(learning_curve.forecast(sizes[:2], draws[:2], errors[:2], 0.1).residual)


def results(target, scores, gold=1.0):
    """Lines of results by hand: {name: (share of right answers, FLOPs to train, FLOPs of a request)}."""
    n, lines = 200, []
    lines.append({"kind": "setup", "command": "c", "date": "d", "base": "b", "fingerprint": "f", "parameters": 9,
                  "seeds": 1, "tasks": {"t": {"metric": "accuracy", "rows": n, "shown": []}}, "factors": [1.0],
                  "rows": [1, 1], "methods": [k for k, v in scores.items() if v[1]], "rate": 1.0, "machine": "m",
                  "versions": {}, "code": ""})  # fmt: skip
    sizes = {k: 10 ** (i + 2) for i, k in enumerate(k for k in scores if k.startswith("lora"))}
    lines.append({"kind": "question", "target": target, "requests": 1000, "shots": 2, "examples": 10_000,
                  "sizes": sizes, "peft": {"name": "lora"}, "reference_score": gold, "prompt_tokens": 9.0,
                  "request_tokens": 10.0, "request_flops": 10.0})  # fmt: skip
    for name, (right, train, request) in scores.items():
        marks = [1.0] * round(right * n) + [0.0] * (n - round(right * n))
        sheet = {"score": sum(marks) / n, "row_correct": marks, "samples": []}
        if train:
            lines.append(
                {
                    "kind": "cost",
                    "method": name,
                    "flops": train,
                    "seconds": 1.0,
                    "virtual_tokens": 0,
                    "artifact_bytes": 8,
                }
            )
            lines.append({"kind": "search", "task": "t", "method": name, "steps": 1})
            lines.append({"kind": "test", "task": "t", "method": name, "seed": 0, "steps": 1, "seconds": 1.0,
                          "examples": sizes.get(name, 0), **sheet})  # fmt: skip
        else:
            lines.append({"kind": "option", "name": name, "examples": 0, "request_flops": request,
                          "prepare_flops": 0.0, "prepare_seconds": 0.0, "request_seconds": 0.1, "prompt_tokens": 9.0,
                          "bytes": 0, **sheet})  # fmt: skip
    lines.append({"kind": "base", "task": "t", "score": 0.0, "samples": []})
    return lines


def test_the_cheapest_that_surely_reaches_the_target():
    few = {
        "zero-shot": (0.2, 0, 10.0),
        "retrieved": (0.7, 0, 100.0),
        "lora on 100": (0.6, 5e3, 0),
        "lora on all": (0.9, 1e4, 0),
    }
    made = {option.name: option for option in options.read_options(results(0.5, few))}
    assert made["retrieved"].flops(1000) == 1e5
    assert made["lora on all"].flops(1000) == 2e4
    text = decide.decision(results(0.5, few))
    assert text.startswith("The cheapest option that reliably reaches accuracy >= 0.5 is lora on 100: 0.600")
    assert "for 1.5e+04 FLOPs over 1,000 requests (5e+03 to train)" in text
    assert "The next is lora on all with 0.900" in text
    assert "With fewer than about 56 requests retrieved would be cheaper." in text
    assert "zero-shot would be enough" in text
    low = made["lora on 100"].estimate.low
    assert f"A target above {low:.3f} would take lora on all, 0.900" in text
    assert "With the number of steps fixed, the error of lora falls as n^-" in text
    assert "100 examples were enough for the target." in text
    close = decide.decision(results(0.59, few))
    assert close.startswith("The cheapest option that reliably reaches accuracy >= 0.59 is lora on all")
    unsure = decide.decision(results(0.88, few))
    assert unsure.startswith("The cheapest option that reaches accuracy >= 0.88 is lora on all")
    assert "it may miss it" in unsure
    untrained = decide.decision(results(0.5, few | {"nearest": (0.8, 0, 0.0)}))
    assert untrained.startswith("The cheapest option that reliably reaches accuracy >= 0.5 is nearest: 0.800")
    assert "the error of lora falls as n^-" in untrained
    assert "No option reaches more than 0.900." in unsure
    assert "The highest score" not in text + unsure, "it is said already"
    third = decide.decision(results(0.5, few | {"retrieved": (0.95, 0, 1e6)}))
    assert "would take lora on all, 0.900" in third
    assert "The highest score is that of retrieved, 0.950" in third


def test_a_target_out_of_reach():
    few = {"zero-shot": (0.2, 0, 10.0), "lora on 100": (0.4, 5e3, 0), "lora on all": (0.6, 1e4, 0)}
    text = decide.decision(results(0.8, few))
    assert text.startswith("No option reaches accuracy >= 0.8: the best is lora on all with 0.600")
    assert "the target would take about" in text
    assert "a better base" in text
    assert "the target is unreachable" in decide.decision(results(1.0, few))
    assert "does not fall with more examples" in decide.decision(results(0.8, few | {"lora on all": (0.4, 1e4, 0)}))
    assert "the target is unreachable" in decide.decision(results(0.8, few | {"lora on all": (0.4, 1e4, 0)}))
    assert "falls as" not in decide.decision(results(0.9, {"zero-shot": (0.2, 0, 1.0)}))


BAD = {
    "": ("--target is missing",),
    "--target accuracy": ("--target accuracy: expected METRIC>=X",),
    "--target accuracy>=lots": ("--target accuracy>=lots: expected METRIC>=X",),
    "--target accuracy>=1e999": ("--target accuracy>=1e999: expected METRIC>=X",),
    "--target bleu>=0.5": ("words has no score 'bleu'", "it has exact_match"),
    "--target exact_match>=0.5 --sizes 0": ("--sizes 0: ",),
    "--target exact_match>=0.5 --sizes many": ("Error parsing --sizes", "many"),
    "--target exact_match>=0.5 --shots 0": ("--shots 0: wanted 1 or more",),
    "--target exact_match>=0.5 --requests -1": ("--requests -1: wanted 0 to 1000000000000000",),
    "--target exact_match>=0.5 --mask nowhere": ("no method or mask 'nowhere'",),
    "--target exact_match>=0.5 --method nothing": ("unknown method 'nothing'",),
    "--target exact_match>=0.5 --data.examples 9": ("--data.examples: give --sizes",),
    "--target exact_match>=0.5 --quantize int8": ("--quantize: ", "graftax compare"),
    "--target exact_match>=0.5 --mask layers": ("no method or mask 'layers'",),
    "--target exact_match>=0.5 --method.where nope": ("lora on 100 examples: ", "nope"),
    "--target exact_match>=0.5 --method.rank x": ("--method.rank", "x"),
    "--target exact_match>=0.5 --data.T 4": ("a row holds T=4",),
    "--target exact_match>=0.5 --budget 3": ("how long is each training?",),
}


@pytest.mark.parametrize("flags", BAD, ids=str)
def test_bad_input_is_one_line(flags, plan, tmp_path):
    out = tmp_path / "out"
    args = ["--task", plan.task, "--base", plan.config.base, "--out", str(out), "--data.T", "32", "--steps", "5"]
    said(lambda: Decide.from_flags([*args, *flags.split()]).run(), *BAD[flags])
    said(lambda: Decide.from_flags(["--target", "x>=1", "--steps", "5"]).run(), "give --task")
    assert not out.exists(), "nothing is written"


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["decide", "--help"])
    assert "--target" in capsys.readouterr().out
