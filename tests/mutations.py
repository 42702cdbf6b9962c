"""One-line faults, each of which must make the fast tier fail: `make mutate`, or `make mutate ARGS="NAME ..."`.

Each mutation is applied alone to a copy of the repository, in which the tests that should notice it run until the first
failure. The tests that failed then run once more on the copy without any fault, where all of them must pass. The exit
status is 1 if a mutation survives, which means that a test is missing, or if its text is no longer in its file.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 300  # seconds of the tests of one mutation; a fault may also make a program run for ever


class Mutation(NamedTuple):
    """A fault: the text `old`, which occurs once in `file`, becomes `new`, and one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest, in the folder of tests


# fmt: off
MUTATIONS = [Mutation(*row) for row in (
    # The model
    ("scores-unscaled", "model/attention.py", "scale or H**-0.5", "scale or 1.0", "test_model.py"),
    ("segments-ignored", "model/attention.py", "(same | virtual) & (distance >= 0)", "distance >= 0", "test_model.py"),
    ("causal-mask-late", "model/attention.py", "+ S - T >= jnp.arange(S)", "+ S - T + 1 >= jnp.arange(S)",
     "test_model.py"),
    ("window-too-long", "model/attention.py", "distance < window", "distance <= window", "test_hf.py"),
    ("softcap-dropped", "model/attention.py", "soft_cap(scores, cap), -1e30", "scores, -1e30", "test_hf.py"),
    ("rope-sign", "model/rope.py", "a * cos - b * sin", "a * cos + b * sin", "test_hf.py"),
    ("norm-offset-dropped", "model/layers.py", '(c.norm_offset + self.parameter("scale"', '(self.parameter("scale"',
     "test_hf.py"),
    ("kv-offset", "model/layers.py", "kv_offset = k.shape[1] - T if", "kv_offset = 0 if", "test_laws.py -k prefix"),
    ("past-invisible", "model/transformer.py", "(P, 0)), constant_values=True", "(P, 0)), constant_values=False",
     "test_laws.py -k prefix"),
    ("prompt-positions", "model/transformer.py", "positions_BT = positions_BT + context.length",
     "positions_BT = positions_BT", "test_laws.py test_peft_hf.py -k prompt"),
    ("decode-positions", "model/generate.py", "(lengths_B + i)[:, None]", "(lengths_B + i + 1)[:, None]",
     "test_laws.py -k test_8"),
    ("prompt-padding-visible", "model/generate.py", "< lengths_B[:, None]).astype", "<= lengths_B[:, None]).astype",
     "test_laws.py -k test_8"),
    ("top-k-too-large", "model/generate.py", "[:, sampling.top_k - 1 : sampling.top_k]",
     "[:, sampling.top_k : sampling.top_k + 1]", "test_model.py"),
    ("chunks-out-of-order", "model/loss.py", "jnp.moveaxis(y, 0, 2)", "jnp.moveaxis(y, 0, 1)",
     "test_laws.py -k test_10"),
    ("init-of-outputs", "model/layers.py", "std *= (2 * config.L) ** -0.5", "std *= config.L**-0.5", "test_golden.py"),
    ("int8-overflow", "model/quantize.py", "jnp.abs(w32).max(0) / 127", "jnp.abs(w32).max(0) / 128",
     "test_quantize.py"),
    ("nf4-mean-dropped", "model/quantize.py", "groups.reshape(maxima.shape) + mean", "groups.reshape(maxima.shape)",
     "test_quantize.py"),
    # Methods
    ("lora-scale-dropped", "peft/methods/lora.py", "return alpha / rank", "return alpha", "test_peft.py"),
    ("lora-plus-of-a", "peft/methods/lora_variants.py", 'path[-1].key == "b"', 'path[-1].key == "a"', "test_peft.py"),
    ("dora-cross-term", "peft/methods/dora.py", "+ 2 * cross + update", "+ cross + update", "test_peft.py"),
    ("pissa-residual", "peft/methods/pissa.py", "(w - scale * (a @ b))", "(w - a @ b)",
     "test_peft_ortho.py -k part_of_the_base"),
    ("oft-not-skew", "peft/methods/oft.py", "upper - upper.swapaxes(1, 2)", "upper + upper.swapaxes(1, 2)",
     "test_peft_ortho.py"),
    ("ia3-bias-unscaled", "peft/methods/ia3.py", "bias if after is None else bias * after", "bias",
     "test_peft_hf.py -k ia3"),
    ("adalora-budget", "peft/methods/adalora.py", "remaining**3", "remaining**2", "test_peft_ortho.py"),
    ("adalora-penalty", "peft/methods/adalora.py", "a.mT @ a - jnp.eye(a.shape[-1])", "a.mT @ a",
     "test_peft_ortho.py"),
    ("dropout-unscaled", "peft/targets.py", "jnp.where(kept, x / (1 - rate), 0)", "jnp.where(kept, x, 0)",
     "test_peft.py"),
    ("dropout-alike-in-all-matrices", "peft/targets.py", "jax.random.fold_in(key, zlib.crc32(path.encode()))", "key",
     "test_peft.py"),
    ("dropout-in-evaluation", "train/step.py", "method.bind(frozen, trainable) if key is None",
     "method.bind_train(frozen, trainable, jax.random.key(0)) if key is None", "test_peft.py"),
    ("layers-drawn-alike", "peft/targets.py", "lambda i: jax.random.fold_in(key, i)", "lambda i: key", "test_peft.py"),
    ("layer-range-shifted", "peft/targets.py", "full.at[start:stop, ", "full.at[start - 1 : stop - 1, ",
     "test_peft.py"),
    ("links-drawn-alike", "peft/base.py", "jax.random.fold_in(key, zlib.crc32(name.encode()))", "key", "test_peft.py"),
    ("base-kept-twice", "peft/methods/subset.py", "leaf = flat.pop(path)", "leaf = flat[path]", "test_peft.py"),
    ("last-layer-missed", "model/tree.py", "[index : index + 1 or None]", "[index : index + 1]", "test_tree.py"),
    ("first-layers-for-last", "peft/masks.py", 'f"layers/[-{last[1]}:]/.*"', 'f"layers/[:{last[1]}]/.*"',
     "test_tree.py"),
    ("ties-divisor", "peft/merging.py", "sum(on.astype(jnp.float32) for on in agree)", "len(agree)",
     "test_merging.py"),
    ("dare-unscaled", "peft/merging.py", "x.shape), x / (1 - rate), 0)", "x.shape), x, 0)", "test_merging.py"),
    ("rerank-scale-dropped", "peft/merging.py", "s / new.scale(rank, new.alpha)", "s", "test_merging.py"),
    ("adapters-of-other-rows", "peft/rows.py", "jnp.stack(leaves)[which]", "jnp.stack(leaves)", "test_rows.py"),
    ("adapter-transposed", "peft/hf_spec/spec.py", "TRANSPOSED = Layout(lambda x: x.T, lambda x: x.T)",
     "TRANSPOSED = Layout(lambda x: x.T, lambda x: x)", "test_peft_hf.py"),
    # Data
    ("target-behind-document", "data/pack.py", "min(at + n, document_end - 1) - at", "min(at + n, document_end) - at",
     "test_data_pack.py"),
    ("positions-go-on", "data/pack.py", '["positions"][place] = np.arange(n)',
     '["positions"][place] = at - begin + np.arange(n)', "test_data_pack.py"),
    ("last-row-dropped", "data/pack.py", "-(-self.total // self.T)", "self.total // self.T", "test_data_pack.py"),
    ("seed-ignored", "data/mixture.py", 'f"{seed}/{name}"', 'f"{name}"', "test_data_pack.py"),
    ("held-out-copy-trained-on", "data/mixture.py", "document.text in held_out_texts", "False", "test_data_pack.py"),
    ("role-is-target", "data/sft.py", "[0] * len(marker)", "[1] * len(marker)", "test_data_sft.py"),
    ("weights-shifted", "data/sft.py", '"weights": weights[1:]', '"weights": weights[:-1]', "test_data_sft.py"),
    ("digest-without-weights", "data/sft.py", ' + b"|" + weights.tobytes()', "", "test_data_sft.py"),
    ("resume-position", "data/loader.py", "rows[start + n * batch_size + i]", "rows[n * batch_size + i]",
     "test_data_pack.py"),
    # Training
    ("normalised-by-positions", "train/step.py", "n = jnp.maximum(targets, 1.0)", 'n = 1.0 * batch["ids"].size',
     "test_golden.py"),
    ("parts-of-equal-weight", "train/step.py", "(total, targets, grads)), None",
     "(total, targets, jax.tree.map(lambda g: g / targets, grads))), None", "test_laws.py -k test_10"),
    ("parts-draw-alike", "train/step.py", "jax.random.fold_in(key, index)", "key", "test_peft.py"),
    ("steps-draw-alike", "train/step.py", "jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)",
     "jax.random.wrap_key_data(state.key)", "test_peft.py"),
    ("step-without-targets", "train/step.py", " & (targets > 0)", "", "test_faults_input.py -k targets"),
    ("wsd-a-step-late", "train/optim.py", "rest - decay_steps)(step + 1)", "rest - decay_steps)(step)",
     "test_train.py -k wsd"),
    ("warm-up-from-zero", "train/optim.py", "linear_schedule(optim.lr / max(warmup, 1)", "linear_schedule(0.0",
     "test_train.py -k 'wsd or warm'"),
    ("decay-of-prompts", "train/optim.py", "is_stacked(path) >= 2 and decays(path)", "is_stacked(path) >= 2",
     "test_peft.py"),
    ("decay-of-others", "train/optim.py", 'default=0.0, what="decay rule"', 'default=1.0, what="decay rule"',
     "test_peft.py"),
    ("groups-of-others", "train/optim.py", 'default=1.0, what="rate group"', 'default=0.0, what="rate group"',
     "test_merging.py"),
    ("bits-per-nat", "train/evaluate.py", "loss / math.log(2) /", "loss /", "test_train.py -k bits"),
    ("best-not-kept", "train/runs/checkpoint.py", "{*self.steps()[-self.keep :], self.best()}",
     "{*self.steps()[-self.keep :]}", "test_train.py -k checkpoints"),
    ("array-digest-skipped", "train/runs/arrays.py", 'if digest != leaves[path]["sha256"]', "if not digest",
     "test_train.py test_faults_saving.py -k damage"),
    ("rows-from-the-start", "train/runs/resume.py", 'return manifest["next_row"], 0 if', "return 0, 0 if",
     "test_train.py -k test_9"),
    # Experiments and plans
    ("deviation-too-small", "train/experiments/stats.py", "* (n / (n - 1)) ** 0.5", "",
     "test_compare.py -k 'noise or bootstrap'"),
    ("roofline-adds", "train/plan/roofline.py", "max(self.compute, self.memory) + self.links",
     "self.compute + self.memory + self.links", "test_plan.py"),
    ("continuation-positions", "train/choices.py", "np.arange(prefix, prefix + len(continuation))",
     "np.arange(start, end)", "test_choices.py"),
)]
# fmt: on


def stale(mutations: Iterable[Mutation] = MUTATIONS) -> list[str]:
    """Return the names of the mutations whose text no longer occurs exactly once in its file."""
    return [m.name for m in mutations if _read(ROOT / m.file).count(m.old) != 1]


def _read(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


def copy_repository(to: Path) -> Path:
    """Copy the files that git tracks or could track to `to/graftax`, so that the copy is the package; return it."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    package = to / "graftax"
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, package / name)
    (ROOT / ".cache").mkdir(exist_ok=True)
    (package / ".cache").symlink_to(ROOT / ".cache")  # most programs are the same with a fault as without
    return package


def run_tests(package: Path, arguments: list[str], limit: float = TIME_LIMIT) -> str:
    """Run tests of the fast tier in the copy; return the first that fails, or "" if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not full", *arguments]
    environment = os.environ | {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=package / "tests", env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"no end after {limit:.0f} s"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    if done.returncode in (0, 1):
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
        return failed[1] if failed else ""
    raise SystemExit(f"pytest {shlex.join(arguments)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")


def try_mutation(mutation: Mutation, package: Path) -> str:
    """Return the first test that fails with a mutation, or "" if it survives."""
    path = package / mutation.file
    source = path.read_text("utf-8")
    path.write_text(source.replace(mutation.old, mutation.new), "utf-8")
    try:
        return run_tests(package, shlex.split(mutation.tests))
    finally:
        path.write_text(source, "utf-8")


def main(names: list[str]) -> int:
    """Try the mutations of these names, or all; print a table, and return 1 if one survives or cannot be tried."""
    picked = [m for m in MUTATIONS if not names or m.name in names]
    if unknown := set(names) - {m.name for m in picked}:
        raise SystemExit(f"no mutation {', '.join(sorted(unknown))}")
    outdated, caught = stale(picked), {}
    print("| mutation | caught by | seconds |\n|---|---|--:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        package = copy_repository(Path(folder))
        for mutation in picked:
            start, test = time.perf_counter(), "its text is not once in its file"
            if mutation.name not in outdated:
                caught[mutation.name] = test = try_mutation(mutation, package)
            print(f"| {mutation.name} | {test or 'SURVIVES'} | {time.perf_counter() - start:.0f} |", flush=True)
        tests = sorted({test for test in caught.values() if "::" in test})
        broken = run_tests(package, tests, TIME_LIMIT * len(tests)) if tests else ""
    survivors = [name for name, test in caught.items() if not test]
    print(f"{len(picked)} mutations; survived: {survivors}; outdated: {outdated}; fails without a fault: {broken!r}")
    return int(bool(survivors or outdated or broken))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
