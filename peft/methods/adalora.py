"""AdaLoRA: low-rank updates that share one budget of ranks, left to the matrices that need them (arXiv:2303.10512)."""

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ... import InputError
from ...bounds import Count, Decay, Real, Size
from ..base import Method
from ..hf_spec import BOOL_OR_NAME, COLUMN, TRANSPOSED, WHOLE, HFSpec, Key
from ..targets import Target, init_targets, targets_by_rule
from .lora import LORA_NEUTRAL, LoRA


def _kept_ranks(patterns: Any, module: str, init_rank: int) -> int:
    """Return how many of its first ranks a module has kept."""
    return sum((patterns or {}).get(f"{module}.lora_E", [True] * init_rank))


def _rank_pattern(method: Any, arrays: Any, *_: Any) -> dict[str, Any]:
    """Return which of the first ranks each module has kept, if any has lost one, and the least total_step."""
    first, kept = method.init_rank, {module.name: t["a"].shape[-1] for module, t in arrays.items()}
    pattern = {f"{name}.lora_E": [i < n for i in range(first)] for name, n in kept.items()}
    return {"total_step": int(method.tinit + method.tfinal) + 1,
            "rank_pattern": None if set(kept.values()) == {first} else pattern}  # fmt: skip


class AdaLoRA(LoRA):
    """W + alpha / init_rank A diag(e) B, e = 0 at first; step by step the least ranks get e = 0 (arXiv:2303.10512).

    A [D, R] and B [R, F] are normal with std 0.02; R = init_rank. HF PEFT: ADALORA.
    """

    demo = False
    pad_to_rank = Method.pad_to_rank  # a rank is a budget
    axes: ClassVar = {"a": "DR", "b": "RF", "e": "R"}

    rank: Size = 8  # of a matrix at the end, on average
    alpha: Real = 8.0
    init_rank: Size = 12
    tinit: float = 0.0  # steps before the first rank is pruned; below 1: a fraction of all steps
    tfinal: float = 0.0  # steps at the end in which no more ranks are pruned; likewise
    every: Count = 1  # steps between prunings
    b1: Decay = 0.85  # of the moving average of |p g|
    b2: Decay = 0.85  # of the moving average of its deviation
    orthogonality: float = 0.5  # weight in the loss of |A^T A - I| and |B B^T - I|, on average over the matrices

    hf = HFSpec(
        "ADALORA",
        keys={
            "init_r": Key(12, "init_rank", exceptions="rank_pattern", rules="ranks", find=_kept_ranks,
                          fixed_default=True),
            "target_r": Key(8, "rank"), "lora_alpha": Key(8.0, "alpha"), "tinit": Key(0, "tinit"),
            "tfinal": Key(0, "tfinal"), "deltaT": Key(1, "every"), "beta1": Key(0.85, "b1"), "beta2": Key(0.85, "b2"),
            "orth_reg_weight": Key(0.5, "orthogonality"), "r": 8, "total_step": Key(None, kind=WHOLE),
            "init_lora_weights": Key(True, kind=BOOL_OR_NAME),
        },
        neutral=LORA_NEUTRAL,
        tensors=TRANSPOSED.tensors(a="lora_A", b="lora_B") | COLUMN.tensors(e="lora_E"),
        own_bias="lora_only",
        read=lambda c, *_: {"alpha": c["lora_alpha"] if c["lora_alpha"] > 0 else c["init_r"]},
        write_modules=_rank_pattern,
    )  # fmt: skip

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def factors(key: Array, target: Target, R: int) -> dict[str, Array]:
            (D, F), (key_a, key_b) = target.shape, jax.random.split(key)
            a, b = jax.random.normal(key_a, (D, R)), jax.random.normal(key_b, (R, F))
            return {"a": 0.02 * a, "b": 0.02 * b, "e": jnp.zeros(R)}

        picked = targets_by_rule(self.where, params, self.name, self.ranks, self.init_rank, "rank rule")
        return init_targets(key, picked, factors)

    def scale(self, rank: int, alpha: Any) -> Any:
        return alpha / (self.init_rank + 1e-5)  # also after ranks are pruned

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        scaled = {k: {"a": t["a"] * t["e"][..., None, :], "b": t["b"]} for k, t in trainable.items()}
        return super().bind(params, scaled)

    def aux_loss(self, trainable: Any) -> Any:
        """Return the mean over matrices of |A^T A - I| and |B B^T - I|, times `orthogonality`."""

        def distance(a: Array) -> Array:
            square = jnp.square(a.mT @ a - jnp.eye(a.shape[-1])).sum((-2, -1)).ravel()
            return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)  # has a gradient at 0 too

        distances = [distance(a) for t in trainable.values() for a in (t["a"], t["b"].mT)]
        return self.orthogonality * jnp.concatenate(distances).mean()

    def update_transform(self, steps: int) -> optax.GradientTransformation:
        """Return `prune_ranks` with the budget of a run of so many steps."""
        return prune_ranks(make_budget(self.rank, self.tinit, self.tfinal, steps, self.every), self.b1, self.b2)


class Scores(NamedTuple):
    """Moving averages of the sensitivity |p g| of each number p, and of its deviation from that average."""

    count: Array
    mean: Any
    spread: Any


class Budget(NamedTuple):
    """Pruning schedule: after step `first`, at each `every`-th, along a cubic, to `rank` a matrix at step `end`."""

    rank: int
    first: int
    end: int
    steps: int
    every: int

    def pruned(self, total: int, matrices: int) -> np.ndarray:
        """Return how many of `total` ranks are to be 0 after each step; 0 for a step that prunes none."""
        target, counts = self.rank * matrices, []
        for step in range(1, self.steps + 1):
            remaining = max(1 - (step - self.first) / (self.end - self.first), 0.0)
            kept = int((total - target) * remaining**3 + target)
            prunes = step >= self.end or (step > self.first and step % self.every == 0)
            counts.append(max(total - kept, 0) if prunes else 0)
        return np.array(counts)


def make_budget(rank: int, tinit: float, tfinal: float, steps: int, every: int) -> Budget:
    """Return the budget of a run, where a time below 1 is a fraction of its steps.

    Raises InputError if no step is left between the two times.
    """
    first, last = (int(t if t >= 1 else t * steps) for t in (tinit, tfinal))
    if first + last >= steps:
        raise InputError(f"adalora: tinit={tinit} and tfinal={tfinal} leave none of {steps} steps in between")
    return Budget(rank, first, steps - last, steps, every)


def prune_ranks(budget: Budget, b1: float, b2: float) -> optax.GradientTransformationExtraArgs:
    """Set `e` of the ranks with the lowest scores to 0, in {target: {"a": [D, R], "e": [R], "b": [R, F]}}.

    The score of a number after the step is the product of its two moving averages; that of a rank is the score of its
    e, plus the mean over its column of a, plus the mean over its row of b.
    """

    def sizes(trainable: Any) -> tuple[int, int]:
        """Return (number of ranks, number of matrices)."""
        shapes = [t["e"].shape for t in trainable.values()]
        return sum(map(math.prod, shapes)), sum(math.prod(s[:-1]) for s in shapes)

    def init(trainable: Any) -> Scores:
        total, matrices = sizes(trainable)
        if budget.rank * matrices > total:
            raise InputError(f"adalora: --method.rank {budget.rank} is above the {total / matrices:g} ranks that each "
                             "matrix has at first, so none would go; raise --method.init-rank")  # fmt: skip
        return Scores(jnp.int32(0), *(jax.tree.map(jnp.zeros_like, trainable) for _ in range(2)))

    def update(updates: Any, state: Any, params: Any = None, *, grads: Any, **_: Any) -> tuple[Any, Scores]:
        """Update the importance scores, and set the singular values of pruned ranks to 0."""
        pruned = jnp.asarray(budget.pruned(*sizes(params)))
        sensitivity = jax.tree.map(lambda p, u, g: jnp.abs((p + u) * g), params, updates, grads)

        def averaged(b: float, old: Any, new: Any) -> Any:
            active = state.count + 1 < budget.end
            return jax.tree.map(lambda x, y: jnp.where(active, b * x + (1 - b) * y, x), old, new)

        mean = averaged(b1, state.mean, sensitivity)
        spread = averaged(b2, state.spread, jax.tree.map(lambda x, y: jnp.abs(x - y), sensitivity, mean))
        each = jax.tree.map(jnp.multiply, mean, spread)
        score = {k: s["e"] + s["a"].mean(-2) + s["b"].mean(-1) for k, s in each.items()}
        ascending = jnp.sort(jnp.concatenate([jnp.full(1, -1.0), *(s.ravel() for s in score.values())]))
        threshold = ascending[pruned[jnp.minimum(state.count, budget.steps - 1)]]  # -1, below all scores, prunes none
        e = {k: jnp.where(s <= threshold, -params[k]["e"], updates[k]["e"]) for k, s in score.items()}
        return {k: u | {"e": e[k]} for k, u in updates.items()}, Scores(state.count + 1, mean, spread)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]
