"""A comparison: the reports say what results.jsonl says, no winner inside the noise, and a page that can be clicked."""

import dataclasses
import json
import re
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from faulty import programs, runs  # noqa: F401
from graftax.data.tasks.base import accuracy
from graftax.peft import LoRA, Subset
from graftax.train.cli import main
from graftax.train.config import Optim
from graftax.train.evaluate import generate_answers, longest_reply
from graftax.train.experiments import comparison, stats
from graftax.train.experiments.compare import Compare, parse_method
from graftax.train.experiments.report.compare import report
from graftax.train.experiments.results_log import read_results, select
from graftax.train.inputs import load_task
from graftax.train.runs.load import load_run
from test_faults_input import said

SCORES = {"full": 0.80, "lora": 0.78, "ia3": 0.4, "prompt": 0.1}
SEEDS, ROWS = 3, 300


def ledger(folder):
    """A file of results made by hand: two methods are as good as each other, two are worse."""
    draw = np.random.default_rng(1)
    prompts = [{"prompt": f"say {i} </script><b>&amp;|", "expected": f"w{i}"} for i in range(12)]
    tasks = {
        t: {"metric": "accuracy", "rows": ROWS, "part": "test", "shown": prompts} for t in ("one", "dir/two.jsonl")
    }
    lines = [
        {
            "kind": "setup",
            "command": "graftax compare",
            "date": "today",
            "base": "runs/five",
            "parameters": 1000,
            "out": "runs/out",
            "fingerprint": "f" * 64,
            "tasks": tasks,
            "methods": list(SCORES),
            "factors": [0.3, 1.0, 3.0],
            "seeds": SEEDS,
            "rows": [4, 32],
            "rate": 1e-3,
            "machine": "two cores",
            "versions": {"jax": "1"},
            "code": "",
        }
    ]
    for task in tasks:
        lines.append({"kind": "base", "task": task, "score": 0.01, "scores": {}, "samples": ["?"] * 12, "seconds": 1.0})
    for i, name in enumerate(SCORES):
        lines.append({"kind": "cost", "method": name, "trainable": 10 ** (4 - i), "share": 0.1, "artifact_bytes": 4000,
                      "peak_bytes": 1e6 * (i + 1), "flops": 1e9, "seconds": 0.1, "ratio": 1 - i / 10})  # fmt: skip
    for task in tasks:
        hard = draw.random(ROWS)  # rows are as hard for one as for another
        for name, p in SCORES.items():
            lines += [{"kind": "search", "task": task, "method": name, "factor": f, "lr": f / 100, "steps": 9,
                       "status": "done", "valid_loss": 1 + abs(f - 1), "folder": "search/trials/000"}
                      for f in (0.3, 1.0, 3.0)]  # fmt: skip
            for seed in range(SEEDS):
                marks = (hard + draw.normal(0, 0.1, ROWS) < p).astype(float).tolist()
                lines.append({"kind": "test", "task": task, "method": name, "seed": seed, "lr": 0.01, "status": "done",
                              "folder": "seeds/trials/000", "valid_loss": 1.0 + seed, "forgetting": 0.5,
                              "row_correct": marks, "score": float(np.mean(marks)), "scores": {},
                              "samples": [f"w{i}" for i in range(12)],
                              "digests": {"rows": "a" * 64, "trainable": "b" * 64}})  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return lines


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(the folder of a report, the lines it was made of)."""
    folder = tmp_path_factory.mktemp("report")
    lines = ledger(folder)
    report(folder)
    return folder, lines


def tables(text):
    """The tables of a markdown text."""
    split = lambda line: [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]  # noqa: E731
    return [[split(line) for line in part.strip().splitlines()] for part in re.findall(r"(?:^\|.*\n)+", text, re.M)]


def test_no_winner_inside_the_noise(written):
    _, lines = written
    sheets = {name: select(lines, kind="test", task="one", method=name) for name in SCORES}
    seen = stats.compare_scores(sheets)
    assert [name for name, e in seen.methods.items() if e.as_good] == ["full", "lora"]
    assert all(e.low < e.mean < e.high for e in seen.methods.values())
    # Rows are shared: a difference is known better than the scores that it is of.
    _, low, high = seen.pairs["full", "lora"]
    assert high - low < seen.methods["full"].high - seen.methods["full"].low
    alone = stats.compare_scores({k: sheets[k] for k in ("full", "ia3")})
    assert [e.as_good for e in alone.methods.values()] == [True, False]
    assert stats.compare_scores({"full": sheets["full"][:1], "lora": sheets["lora"][:1]}).seed_deviation == 0


def test_the_bootstrap_tells_equals_apart_as_rarely_as_it_says(monkeypatch):
    """Four equal methods, three seeds each, noise of rows and seeds: in at most about 5 % of all cases."""
    monkeypatch.setattr(stats, "DRAWS", 500)
    draw, wrong, covered = np.random.default_rng(0), 0, 0
    for _ in range(120):
        hard, sheets = draw.random(120), {}
        for name in "abcd":
            marks = [(hard + draw.normal(0, 0.2, 120) < 0.6 + draw.normal(0, 0.05)).astype(float) for _ in range(3)]
            sheets[name] = [{"score": float(m.mean()), "row_correct": m.tolist()} for m in marks]
        seen = stats.compare_scores(sheets)
        wrong += not all(e.as_good for e in seen.methods.values())
        _, low, high = next(iter(seen.pairs.values()))
        covered += low <= 0 <= high
    assert wrong <= 12
    assert covered >= 105


def test_edges_of_the_noise():
    sure = [{"score": 1.0, "row_correct": [1.0] * 8}]
    assert stats.compare_scores({"a": sure}).methods["a"].low == pytest.approx(0.676, abs=0.001), "Wilson's, of 8 of 8"
    assert stats.compare_scores({}).methods == {}
    same = [{"score": 0.5, "row_correct": [0.0, 1.0] * 9}]
    assert stats.compare_scores({"a": same, "b": same}).pairs["a", "b"] == (0, 0, 0), "all are drawn on the same rows"
    drawn = [{"score": 0.3, "resampled_scores": [0.3] * stats.RESCORED_DRAWS}]
    assert set(stats.compare_scores({"a": sure, "b": drawn}).methods) == {"a", "b"}, "as many draws as the fewest have"
    two = stats.compare_scores({"a": [{"score": score, "row_correct": [score] * 4} for score in (0.4, 0.6)]})
    spread = 0.1 * 2**0.5  # of a mean of two seeds: deviations of two are sqrt(2) times too small
    assert two.methods["a"][:3] == pytest.approx((0.5, 0.5 - spread, 0.5 + spread))
    few = lambda rows, answers: {"of_a": 0.5} if any(r["a"] for r in rows) else {}  # noqa: E731
    assert set(stats.resampled_scores(few, "of_a", [{"a": i == 0} for i in range(3)], "xyz")["resampled_scores"]) == {
        0.5
    }


@pytest.mark.parametrize("shift", [0.0, -5.0, -2.35])
def test_scores_of_any_sign_have_a_spread(shift):
    """The seeds of what is near the best are pooled, below 0 as above; what is far off has its own deviations."""
    scores = {"a": (2.2, 2.4), "b": (2.1, 2.3), "far": (-90.0, -50.0)}
    seen = stats.compare_scores({name: [{"score": x + shift, "row_correct": [x + shift] * 4} for x in some]
                          for name, some in scores.items()})  # fmt: skip
    assert seen.seed_deviation == pytest.approx(0.02**0.5)
    assert list(seen.methods) == ["a", "b", "far"]
    assert [e.as_good for e in seen.methods.values()] == [True, True, False]
    assert all(np.isfinite([e.low, e.high, e.gap_low, e.gap_high]).all() for e in seen.methods.values())


def test_scores_that_are_no_means_are_drawn_again():
    rows, answers = [{"completion": str(i)} for i in range(9)], ["0"] * 9
    least = lambda rows, answers: {"least": float(min(len(rows), 5))}  # noqa: E731
    assert stats.resampled_scores(least, "least", rows, answers)["resampled_scores"] == [5.0] * stats.RESCORED_DRAWS
    assert stats.resampled_scores(accuracy, "accuracy", rows, answers)["row_correct"] == [1.0] + [0.0] * 8


def test_the_reports_say_what_the_results_say(written):
    """Every number of the tables, from the lines, by other means than the report's."""
    folder, lines = written
    text = (folder / "report.md").read_text("utf-8")
    scores, pairs, answers, *_ = tables(text)
    for row in scores[2:]:
        tested = [
            line for line in lines if line["kind"] == "test" and (line["task"], line["method"]) == ("one", row[0])
        ]
        assert row[1] == f"{statistics.mean(statistics.mean(line['row_correct']) for line in tested):.3f}"
        assert row[3] == " ".join(f"{line['score']:.3f}" for line in tested)
        assert float(row[4]) == pytest.approx(float(scores[2][1]) - float(row[1]), abs=0.0011)
        assert row[7:] == ["2.000", "0.01", "+0.500"]
        low, high = map(float, row[2].split(" to "))
        assert low <= float(row[1]) <= high
    assert [row[6] for row in scores[2:]] == ["yes", "yes", "", ""]
    assert "No winner: full, lora do not differ significantly" in text
    assert "Of these lora trains the fewest parameters: 1,000." in text
    assert [row[0] for row in pairs[2:]] == ["full", "lora", "ia3"]
    assert answers[2][:3] == ["say 0 </script><b>&amp;\\|", "w0", "?"]
    costs = tables(text)[-2]
    assert costs[2] == ["full", "10,000", "10 %", "3.9 KiB", "976.6 KiB", "1.00", "100", "1.00"]
    runs_ = tables(text)[-1]
    assert len(runs_) == 2 + 2 * len(SCORES) * SEEDS
    assert runs_[2][4:] == ["graftax finetune runs/out/seeds/trials/000/config.json --out again", "a" * 12, "b" * 12]


def test_results_of_earlier_versions_are_read(written, tmp_path):
    """Under today's names; they give the same report."""
    folder, lines = written
    text = (folder / "results.jsonl").read_text("utf-8").replace('"row_correct"', '"marks"')
    (tmp_path / "results.jsonl").write_text(text.replace('"expected"', '"wanted"'), "utf-8")
    assert read_results(tmp_path / "results.jsonl") == lines
    line = {"kind": "option", "name": "8 examples by lot, the likeliest choice", "draws": [1.0], "made_flops": 2.0}
    new = {"kind": "option", "name": "8 random examples, most likely choice", "resampled_scores": [1.0]}
    (tmp_path / "results.jsonl").write_text(
        json.dumps(line) + "\n" + json.dumps({"kind": "asked", "gold": 1.0}), "utf-8"
    )
    assert read_results(tmp_path / "results.jsonl") == [
        new | {"prepare_flops": 2.0}, {"kind": "question", "reference_score": 1.0}]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("[1]", "utf-8")
    said(lambda: read_results(tmp_path / "results.jsonl"), "results.jsonl: not a results file")


def test_what_diverged_and_what_beats_nothing(tmp_path):
    lines = [
        line for line in ledger(tmp_path) if not (line["kind"] == "test" and line["method"] == "ia3" and line["seed"])
    ]
    lines = [line | ({"score": 0.9} if line["kind"] == "base" and line["task"] == "one" else {}) for line in lines]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    tasks = report(tmp_path)["tasks"]
    none, lost = tasks["one"]["sentences"]
    assert none == "No method beats the untuned base, which scores 0.900: train longer, or on more."
    assert lost.endswith(": ia3.")
    assert any("diverged" in said and said.endswith(": ia3.") for said in tasks["dir/two.jsonl"]["sentences"])


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium and chromedriver here")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--window-size=1200,1400", "--disable-background-networking", "--disable-component-update",
                 "--disable-sync"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as opened:
        yield opened


def test_the_page_is_clicked_through(written, browser):
    folder, _ = written
    browser.get((folder / "report.html").as_uri())
    css = lambda query: browser.find_elements("css selector", query)  # noqa: E731
    column = lambda table, i: [row.text for row in css(f"#{table} tbody td:nth-child({i})")]  # noqa: E731
    markdown = tables((folder / "report.md").read_text("utf-8"))
    cells = lambda table: [[cell.text for cell in row.find_elements("css selector", "td")]  # noqa: E731
                           for row in css(f"#{table} tbody tr")]  # fmt: skip
    assert cells("scores-1") == markdown[0][2:], "the page and the markdown say the same"
    assert [[c.text for c in row.find_elements("css selector", "td")] for row in css("#costs tbody tr")] == markdown[
        -2
    ][2:]
    heads = css("#scores-1 th button")
    heads[1].click()
    assert column("scores-1", 1) == ["full", "lora", "ia3", "prompt"]
    heads[1].click()
    assert column("scores-1", 1) == ["prompt", "ia3", "lora", "full"]
    assert css("#scores-1 th")[1].get_attribute("aria-sort") == "ascending"
    heads[0].click()
    assert column("scores-1", 1) == sorted(SCORES, reverse=True)
    assert len(css("section")) == 2
    dots = lambda: len(css("section:first-of-type .pareto circle"))  # noqa: E731
    front = lambda: css("section:first-of-type .front")[0].get_attribute("points")  # noqa: E731
    assert dots() == 4
    before = front()
    css("section:first-of-type .axis option[value=peak_bytes]")[0].click()
    assert front() != before, "another cost, another front"
    assert "peak memory" in css("section:first-of-type .pareto")[0].text
    css("section:first-of-type .legend button")[0].click()
    assert dots() == 3
    css("section:first-of-type .legend button")[0].click()
    assert dots() == 4
    assert len(css("section:first-of-type .rates circle")) == 12
    for details in css("details"):
        details.find_element("css selector", "summary").click()
    assert css(".samples td")[0].text == "say 0 </script><b>&amp;|", "text of a data set is text"
    assert css("td.right")
    assert css("#runs td")[4].text.startswith("graftax finetune runs/out/seeds/trials/000/config.json")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0, "self-contained"


@pytest.fixture(scope="module")
def plan(runs, tmp_path_factory):  # noqa: F811
    """Three methods on two tasks of the tiny base."""
    folder = tmp_path_factory.mktemp("compare")
    rows = [{"prompt": f"say {word} {i}", "completion": word} for i in range(30) for word in ("up", "down")]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    run = dataclasses.replace(runs["lora"], mesh=(1, -1, 1), steps=6, save_every=0, log_every=3, eval_rows=8)
    run = dataclasses.replace(run, optim=Optim(lr=4e-3), out=str(folder / "out"))
    tasks = (run.data.task, f"{folder / 'words.jsonl'}@exact_match")
    return Compare(run, tasks, ("full", "lora:rank=2", "norms"), factors=(0.5, 2.0), seeds=2, lanes=4)


@pytest.fixture(scope="module")
def done(plan):
    """The lines of its results."""
    plan.run()
    return read_results(Path(plan.config.out) / "results.jsonl")


@pytest.mark.full
def test_a_comparison_is_what_it_says(plan, done):
    out, kinds = Path(plan.config.out), [line["kind"] for line in done]
    assert {kind: kinds.count(kind) for kind in kinds} == {"setup": 1, "base": 2, "cost": 3, "search": 12, "test": 12}
    for line in select(done, kind="test"):
        key = {k: line[k] for k in ("task", "method")}
        tried = select(done, kind="search", **key)
        best = min(tried, key=lambda one: one["valid_loss"])
        assert line["lr"] == best["lr"], "the rate is that with the least validation loss"
        assert line["seed"] or line["folder"] == best["folder"]
        guess = 4e-3 * parse_method(line["method"]).lr_multiplier
        assert [one["lr"] for one in tried] == pytest.approx([guess * factor for factor in plan.factors])
    line = select(done, kind="test", method="lora:rank=2", seed=1)[0]
    got = load_run(out / line["folder"])
    assert got.run.method == LoRA(rank=2)
    task = load_task(got.run.data)
    assert task.test
    assert not {r["prompt"] for r in task.test} & {r["prompt"] for r in task.valid}
    answers = generate_answers(*got.bound, got.tokenizer, task.test, longest_reply(task.test, got.tokenizer))
    assert task.score(task.test, answers) == line["scores"]
    assert select(done, kind="cost", method="full")[0]["ratio"] == pytest.approx(1, abs=0.2)
    assert (
        select(done, kind="cost", method="full")[0]["artifact_bytes"] == 4 * select(done, kind="setup")[0]["parameters"]
    )
    assert (out / "report.html").exists()


@pytest.mark.full
def test_it_goes_on_where_it_was_ended(plan, done, tmp_path, monkeypatch):
    """By a signal before the second sweep: what was found is what an unbroken comparison finds, times aside."""
    out = tmp_path / "out"
    shutil.copytree(plan.config.out, out)
    shutil.rmtree(out / "seeds")
    ended = [line for line in done if line["kind"] != "test" and line.get("factor") != plan.factors[-1]]
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ended), "utf-8")
    other = dataclasses.replace(plan, config=dataclasses.replace(plan.config, out=str(out)))
    said(lambda: other.run(), "not an empty folder", "--resume")
    again = dataclasses.replace(other, config=dataclasses.replace(other.config, resume="auto"))
    said(lambda: dataclasses.replace(again, seeds=3).run(), "--resume: seeds is 3", "began with 2")
    again.run()
    clock = ("seconds", "compile_seconds", "ratio", "evaluate_seconds")
    order = lambda line: [str(line.get(k)) for k in ("kind", "task", "method", "factor", "seed")]  # noqa: E731
    timeless = [sorted(({k: v for k, v in line.items() if k not in clock} for line in some), key=order)
                for some in (read_results(out / "results.jsonl"), done)]  # fmt: skip
    assert timeless[0] == timeless[1]
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]
    lines[0]["fingerprint"] = "0" * 64
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    said(lambda: again.run(), "--resume: the base has changed", "restore it")


@pytest.mark.full
def test_a_budget_says_how_many_steps(plan, done, tmp_path):
    short = dataclasses.replace(plan.config, steps=0, out=str(tmp_path / "out"))
    least = dataclasses.replace(plan, config=short, budget=0.01)
    said(lambda: least.run(), "--budget 0.01: 18 trainings of 20 steps", "minutes; give more")
    shutil.copy(Path(plan.config.out) / "results.jsonl", tmp_path / "out")
    under_way = comparison.MethodComparison(
        dataclasses.replace(least, budget=50.0).trainings, dict.fromkeys(plan.methods), [], None, None
    )
    under_way.evaluators = [type("Exam", (), {"name": line["task"]}) for line in select(done, kind="base")]
    steps = under_way.decide_steps(time.monotonic())
    per_step = sum(line["seconds"] for line in select(done, kind="cost")) * 6
    assert 0.5 < steps * per_step / (50 * 60) < 0.86
    assert under_way.decide_steps(time.monotonic()) == steps, "kept, so that a resumed comparison has as many"


BAD = {
    "": ("nothing to compare: give --task",),
    "--task T": ("nothing to compare: give --methods",),
    "--task T --methods lora": ("--methods lora: only one method",),
    "--task T --methods lora,lora": ("--methods: duplicate lora",),
    "--task T --task T --methods lora,ia3": ("--task: duplicate ",),
    "--task T --methods lora,lorra": ("--methods lorra: no method or mask 'lorra'; did you mean lora?",),
    "--task T --methods lora,lora:rnak=3": ("--methods lora:rnak=3: ", "no 'rnak'", "rank"),
    "--task T --methods lora,lora:rank=x": ("--methods lora:rank=x: ", "'x', expected"),
    "--task T --methods lora,lora:rank=0": ("--methods lora:rank=0: ", "wanted"),
    "--task T --methods lora,subset:where=nope": ("subset:where=nope: ", "nope"),
    "--task T@bleu --methods lora,full": ("no score 'bleu'", "it has exact_match"),
    "--task nothing.jsonl --methods lora,full": ("nothing.jsonl",),
    "--task T --methods lora,full --budget 3": ("how long is each training?", "either --steps N or --budget"),
    "--task T --methods lora,full --steps 0": ("how long is each training?",),
    "--task T --methods lora,full --seeds 0": ("--seeds 0: wanted 1 or more",),
    "--task T --methods lora,full --seeds two": ("Error parsing --seeds", "two"),
    "--task T --methods lora,full --factors 1,-1": ("--factors -1.0: wanted a finite number above 0",),
    "--task T --methods lora,full --factors one": ("Error parsing --factors", "one"),
    "--task T --task T@exact_match --methods lora,full": ("--task: duplicate task",),
    "--task T --methods lora,full --data.T 4": ("a row holds T=4",),
    "--task T --methods lora,full --quantize int8": ("full: ", "quantised"),
    "--task T --methods lora,full --wandb x": ("--wandb: not supported by sweeps",),
    "--task T --methods lora,full --lanes -1": ("--lanes -1: wanted 0 or more",),
    "--task T --methods lora,full --what 1": ("unknown flag --what",),
}


@pytest.mark.parametrize("flags", BAD, ids=str)
def test_bad_input_is_one_line(flags, plan, tmp_path):
    task, out = plan.tasks[0], tmp_path / "out"
    steps = [] if "--steps" in flags else ["--steps", "5"]
    given = [re.sub("^T(?=@|$)", lambda _: task, word) for word in flags.split()]
    said(
        lambda: Compare.from_flags(
            ["--base", plan.config.base, "--out", str(out), "--data.T", "32", *steps, *given]
        ).run(),
        *BAD[flags],
    )
    assert not out.exists(), "nothing is written"


def test_help_and_names(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "--budget" in capsys.readouterr().out
    assert parse_method("full") == Subset("all")
    assert parse_method("last_2") == Subset("last_2")
    assert parse_method("lora:rank=3:alpha=6") == LoRA(rank=3, alpha=6)
