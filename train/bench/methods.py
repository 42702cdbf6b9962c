"""`python -m graftax.train.bench.methods`: methods on two tasks, each with a search for its rate (methods.md)."""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import studentized_range, t

from ... import InputError, peft
from ...model import Context, Transformer
from ...peft import Method, Subset
from ..config import MALLOC, Optim, method_class
from ..optim import make_optimizer
from ..step import init_state, make_train_step
from .peer import threads
from .table import cpu, write

TASKS, MASKS = {"clinc150": "accuracy", "snips": "intent_accuracy"}, {"full": "all", "last_2": "last_2"}
NAMES = "full,last_2,lntuning,bitfit,lora,rslora,dora,loraplus,pissa,adalora,vera,loha,lokr,hira,miss,hra,oft,ia3,"
NAMES += "houlsby,pfeiffer,prompt,prefix"
BATCH, T, NEW, EVERY = 3, 160, 12, 5  # rows in a step, tokens in a row; tokens generated; of choices each 5th is used
RATE, FACTORS = 2e-3, (1 / 3, 1.0, 3.0)  # of full; those tried are factor x Method.rate x RATE
SEEDS, HELD, TEST = 2, 6, 400  # scored; held-out rows of each of the base's domains; test rows
PARTS = {"train": None, "valid": 300, "test": TEST}  # how many rows; None: all
Lines, Tuned = list[dict[str, Any]], tuple[Transformer, Any, Context]  # of a file of results; bound


def candidates(names: str, params: Any) -> Iterator[tuple[str, Method]]:
    """(name, method with its defaults); what is not here, or finds nothing in this base, is left out, with a line."""
    for name in names.split(","):
        try:
            method = Subset(MASKS[name]) if name in MASKS else method_class(name)()
            peft.count(method, params)
            yield name, method
        except InputError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)


def optimizer(method: Method, trainable: Any, steps: int) -> optax.GradientTransformation:
    """A run's own AdamW with the learning rate in its state: one compilation serves all rates."""
    adamw = make_optimizer(Optim(lr=1.0, warmup=0.1, weight_decay=0.0), trainable, steps)
    return optax.chain(adamw, optax.inject_hyperparams(optax.scale)(step_size=1.0), method.transform(steps))


class Arena:
    """A base and the tasks. Trains and scores one cell at a time; the step of a method is compiled once."""

    def __init__(self, base: str, root: str, steps: int):
        from ...data import sft, tasks  # here, so that the tables need no more than jax
        from .. import evaluate, runs

        self.evaluate, self.base, self.pack, self.steps = evaluate, runs.load_run(base), sft.sft_rows, steps
        self.model, self.params, self.tokenizer = self.base.model, self.base.merged, self.base.tokenizer
        self.tasks = {name: self._rows(tasks.tasks[name](Path(root)), score) for name, score in TASKS.items()}
        self.held = [row for domain in self.base.held_out.values() for row in domain.rows[:HELD]]
        self.before = self.loss((self.model, self.params, Context()), self.held)
        self.step = cache(self._compiled)
        self.split = cache(lambda method, seed: peft.partition(method, self.params, jax.random.key(seed)))

    def _rows(self, task: Any, score: str) -> dict[str, Any]:
        draw, few = np.random.default_rng(0).permutation, sorted(task.choices or [])[::EVERY]
        rows = {k: [row for row in getattr(task, k) if not few or row["completion"] in few] for k in PARTS}
        parts = {k: [*draw(rows[k])[:n]] for k, n in PARTS.items()}
        packed = {k: self.pack([(k, row) for row in rows], self.tokenizer, T, 0).rows for k, rows in parts.items()}
        most = statistics.mode(row["completion"].split(" | ")[0] for row in parts["train"])
        marks = lambda answers: task.score(parts["test"], answers)[score]  # noqa: E731
        return packed | {"asked": parts["test"], "score": marks, "floor": marks([most] * len(parts["test"]))}

    def _begin(self, method: Method, seed: int) -> tuple[Any, Any]:
        frozen, trainable = self.split(method, seed)  # the state is donated, so it gets a copy
        return frozen, init_state(jax.tree.map(jnp.copy, trainable), optimizer(method, trainable, self.steps))

    def _compiled(self, method: Method) -> Any:
        frozen, state = self._begin(method, 0)
        step = make_train_step(self.model, method, optimizer(method, state.trainable, self.steps))
        return jax.jit(step, donate_argnums=0).lower(state, frozen, self._batch("clinc150", range(BATCH))).compile()

    def _batch(self, task: str, which: Iterable[int]) -> dict[str, Any]:
        rows = [self.tasks[task]["train"][i] for i in which]
        return {key: jnp.asarray(np.stack([row[key] for row in rows])) for key in rows[0]}

    def train(self, method: Method, task: str, rate: float, seed: int) -> Tuned:
        """(model, bound parameters, context) after the last step."""
        step, (frozen, state) = self.step(method), self._begin(method, seed)
        state = state._replace(opt_state=optax.tree.set(state.opt_state, step_size=jnp.float32(rate)))
        order = np.random.default_rng(seed).permutation(len(self.tasks[task]["train"]))
        for which in np.resize(order, (self.steps, BATCH)):
            state, _ = step(state, frozen, self._batch(task, which))
        return self.model, method.bind(frozen, state.trainable), method.context(state.trainable)

    def loss(self, tuned: Tuned, rows: Lines) -> float:
        """Nats a target token."""
        return float(self.evaluate.row_losses(*tuned, rows, 16).sum() / sum(row["weights"].sum() for row in rows))

    def score(self, tuned: Tuned, task: str) -> dict[str, float]:
        """What is measured once the rate is chosen."""
        rows = self.tasks[task]
        answers = self.evaluate.outputs(*tuned, self.tokenizer, rows["asked"], NEW, batch=100)
        forgot = self.loss(tuned, self.held) - self.before
        return {"score": rows["score"](answers), "loss": self.loss(tuned, rows["test"]), "forgot": forgot}

    def costs(self, methods: dict[str, Method]) -> Iterator[dict[str, Any]]:
        """What each method trains, the peak bytes of its step, and its time over full's: they take turns."""
        took, batch = {name: [] for name in methods}, self._batch("clinc150", range(BATCH))
        live = {name: (self.step(method), *self._begin(method, 0)) for name, method in methods.items()}
        for name in [name for name in methods for _ in range(4)] * 6:
            step, frozen, state = live[name]
            start = time.perf_counter()
            live[name] = step, frozen, jax.block_until_ready(step(state, frozen, batch))[0]
            took[name].append(time.perf_counter() - start)
        best = {k: np.reshape(x, (-1, 4))[:, 1:].min(1) for k, x in took.items()}  # the first of 4 finds its memory
        for name, (step, _, state) in live.items():
            m = step.memory_analysis()
            peak = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
            trains, total = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.trainable, self.params))
            yield {"kind": "cost", "method": name, "trainable": trains, "share": trains / total, "peak": peak,
                   "ms": 1e3 * min(best[name]), "ratio": float(np.median(best[name] / best["full"]))}  # fmt: skip


def find(lines: Lines, **key: Any) -> Lines:
    """The lines that have these."""
    return [line for line in lines if key.items() <= line.items()]


def chosen(lines: Lines, **key: Any) -> tuple[float, str]:
    """The rate with the least validation loss, not finite ones last, and a mark where it is on an edge of the grid."""
    grid = sorted(find(lines, kind="search", **key), key=lambda line: line["rate"])
    best = min(grid, key=lambda line: np.nan_to_num(line["valid"], nan=np.inf))["rate"]
    return best, {grid[0]["rate"]: " ↓", grid[-1]["rate"]: " ↑"}.get(best, "")


def compete(arena: Arena, lines: Lines, name: str, method: Method, task: str) -> Iterator[dict[str, Any]]:
    """What is not yet known of a method on a task: the losses of its rates on seed 0, then its scores at the best."""
    tuned, key = cache(partial(arena.train, method, task)), {"task": task, "method": name}
    for factor in FACTORS:
        at = {"kind": "search", **key, "rate": RATE * method.rate * factor}
        if not find(lines, **at):
            yield at | {"valid": arena.loss(tuned(at["rate"], 0), arena.tasks[task]["valid"])}
    for seed in range(SEEDS):
        at = {"kind": "score", **key, "rate": chosen(lines, **key)[0], "seed": seed}
        if not find(lines, **at):
            yield at | arena.score(tuned(at["rate"], seed), task)


def run(args: argparse.Namespace, lines: Lines) -> None:
    """Add what the file of results lacks, line by line."""

    def add(line: dict[str, Any]) -> None:
        lines.append(line)
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    if lines and lines[0]["steps"] != args.steps:
        raise InputError(f"--json {args.json} is of {lines[0]['steps']} steps, not {args.steps}; take another file")
    arena = Arena(args.base, args.root, args.steps)
    if not lines:
        about = f"{time.strftime('%Y-%m-%d')}, {threads()} cores, {cpu()}, {args.steps} steps a training"
        about = ", ".join([about, *(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))])
        add({"steps": args.steps, "about": about, "floors": {k: task["floor"] for k, task in arena.tasks.items()}})
    methods = dict(candidates(args.methods, arena.params))
    if missing := {k: m for k, m in methods.items() if not find(lines, kind="cost", method=k)}:
        for line in arena.costs({"full": Subset()} | missing):
            add(line)
    ms = {line["method"]: line["ms"] for line in find(lines, kind="cost")}
    left = sum(ms[k] * (3 + SEEDS - len(find(lines, method=k, task=task))) for k in methods for task in TASKS)
    began, done = time.perf_counter(), 0.0
    for name, task in itertools.product(methods, TASKS):
        for line in compete(arena, lines, name, methods[name], task):
            add(line)
            left, done = left - ms[name], done + ms[name]
            rest = (time.perf_counter() - began) * left / done
            print(f"{json.dumps(line)} ({rest / 60:.0f} minutes left)", file=sys.stderr)


def letters(means: list[float], least: float) -> list[str]:
    """Of means in falling order: a letter for each longest run that spans less than `least`."""
    spans = [(i, sum(mean > top - least for mean in means)) for i, top in enumerate(means)]
    spans = [span for i, span in enumerate(spans) if not i or span[1] > spans[i - 1][1]]
    return ["".join(chr(97 + k) for k, (a, b) in enumerate(spans) if a <= i < b) for i in range(len(means))]


def section(lines: Lines, task: str) -> str:
    """The table of a task, best first, and what the spread between seeds supports."""
    floor, n, rows = lines[0]["floors"][task], SEEDS, []
    for cost in {line["method"]: line for line in find(lines, kind="cost")}.values():
        key = {"task": task, "method": cost["method"]}
        if len(found := find(lines, kind="score", **key)) == n:
            (rate, edge), score = chosen(lines, **key), [line["score"] for line in found]
            loss, forgot = (statistics.mean(line[k] for line in found) for k in ("loss", "forgot"))
            rows.append((statistics.mean(score), statistics.variance(score), cost["method"], (
                " ".join(f"{x:.3f}" for x in score), f"{loss:.3f}", f"{rate:.1e}{edge}", f"{forgot:+.2f}",
                f"{cost['trainable']:,}", f"{cost['share']:.2%}", f"{cost['peak'] / 1e6:.0f}", f"{cost['ratio']:.2f}",
            )))  # fmt: skip
    rows.sort(key=lambda row: -row[0])
    spreads = [row[1] for row in rows if row[0] > floor + 2 * (floor * (1 - floor) / TEST) ** 0.5] or [0.0]
    df, s = len(spreads) * (n - 1), statistics.mean(spreads) ** 0.5
    two, most = t.ppf(0.975, df) * s * (2 / n) ** 0.5, studentized_range.ppf(0.95, len(rows), df) * s / n**0.5
    rows = [(mark, *row) for mark, row in zip(letters([row[0] for row in rows], most), rows, strict=True)]
    heads = f"method,group,{TASKS[task]},by seed,test loss,rate,forgetting,trainable,of the base,peak MB,step / full"
    table = [f"| {name} | {mark} | {mean:.3f} | {' | '.join(cells)} |" for mark, mean, _, name, cells in rows]
    return "\n".join([f"## {task}\n\n| {heads.replace(',', ' | ')} |\n|---|---|{'--:|' * 9}", *table]) + (
        f"\n\nThe most frequent answer: {floor:.3f}. Standard deviation between seeds, pooled over the {len(spreads)} "
        f"methods clearly above that: s = {s:.4f} ({df} degrees of freedom). Two methods named beforehand differ (5 %) "
        f"if they are t s √(2/{n}) = {two:.3f} apart, any two of {len(rows)} if q s / √{n} = {most:.3f} (Tukey). "
        f"**Not told apart as best: {', '.join(row[3] for row in rows if 'a' in row[0])}.**\n"
    )


def main(argv: list[str] | None = None) -> None:
    """Do what the file of results lacks, if there is a base; print the tables of all that it has."""
    parser = argparse.ArgumentParser("python -m graftax.train.bench.methods", description="See train/bench/methods.md.")
    parser.add_argument("--base", default="", help="a run directory; without, the tables are made of --json alone")
    parser.add_argument("--root", default="", help="the data folder")
    parser.add_argument("--json", default="methods.jsonl", help="results, a line each; what is there is not done again")
    parser.add_argument("--methods", default=NAMES, help="with commas between")
    parser.add_argument("--steps", type=int, default=120, help="of each training")
    parser.add_argument("--write", action="store_true", help="put the tables into methods.md")
    args = parser.parse_args(argv)
    path = Path(args.json)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    if args.base:
        run(args, lines)
    elif not lines:
        raise InputError(f"--json {path}: nothing there, and no --base to run")
    print(text := "\n".join([f"{lines[0]['about']}.\n", *(section(lines, task) for task in TASKS)]))
    if args.write:
        write(text, "methods", Path(__file__).with_name("methods.md"))


if __name__ == "__main__":
    if not any(key in os.environ for key in MALLOC):
        os.execve(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]], os.environ | MALLOC)
    try:
        main()
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        raise SystemExit(2) from None
