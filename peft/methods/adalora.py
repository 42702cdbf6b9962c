"""AdaLoRA: low-rank updates that share one budget of ranks, left to the matrices that need them (arXiv:2303.10512)."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ... import InputError
from ...bounds import Count, Decay, Real, Size
from ..base import Method
from ..targets import Target, each_layer, group_by_value, layer_keys, targets
from .lora import LoRA


class AdaLoRA(LoRA):
    """W + alpha / init_rank A diag(e) B, e = 0 at first; step by step the least ranks get e = 0 (arXiv:2303.10512)."""

    demo = False
    pad_to_rank = Method.pad_to_rank  # a rank is a budget

    rank: Size = 8  # of a matrix at the end, on average
    alpha: Real = 8.0
    init_rank: Size = 12
    tinit: float = 0.0  # steps before the first rank goes; below 1: a part of all steps
    tfinal: float = 0.0  # steps at the end in which the choice stays; likewise
    every: Count = 1  # steps from one choice to the next
    b1: Decay = 0.85  # of the average of |p g|
    b2: Decay = 0.85  # of the average distance from it
    orthogonality: float = 0.5  # weight in the loss of |A^T A - I| and |B B^T - I|, on average over the matrices

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, t: Target, R: int) -> dict[str, Array]:
            (D, F), (k, m) = t.shape, jax.random.split(key)
            a, b = jax.random.normal(k, (D, R)), jax.random.normal(m, (R, F))
            return {"a": 0.02 * a, "b": 0.02 * b, "e": jnp.zeros(R)}

        found = group_by_value(
            self.ranks, self.init_rank, targets(self.where, params, 2, "adalora"), params, "rank rule"
        )
        return {t.key: each_layer(t, partial(one, t=t, R=r), layer_keys(key, t)) for t, r in found}

    def scale(self, rank: int, alpha: Any) -> Any:
        return alpha / (self.init_rank + 1e-5)  # also where ranks are gone

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        scaled = {k: {"a": t["a"] * t["e"][..., None, :], "b": t["b"]} for k, t in trainable.items()}
        return super().bind(params, scaled)

    def aux_loss(self, trainable: Any) -> Any:
        def length(a: Array) -> Array:
            square = jnp.square(a.mT @ a - jnp.eye(a.shape[-1])).sum((-2, -1)).ravel()
            return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)  # a slope at 0 too

        lengths = [length(a) for t in trainable.values() for a in (t["a"], t["b"].mT)]
        return self.orthogonality * jnp.concatenate(lengths).mean()

    def update_transform(self, steps: int) -> optax.GradientTransformation:
        """Ends ranks: see `allocate`."""
        return allocate(budget(self.rank, self.tinit, self.tfinal, steps, self.every), self.b1, self.b2)


class Scores(NamedTuple):
    """Of every number how much the loss feels it, |p g|, on a moving average, and how far from that it tends to be."""

    count: Array
    mean: Any
    spread: Any


class Budget(NamedTuple):
    """Ranks go after step `first`, at each `every`-th on a cubic to `rank` a matrix, at `end` for good."""

    rank: int
    first: int
    end: int
    steps: int
    every: int

    def gone(self, total: int, matrices: int) -> np.ndarray:
        """How many of `total` ranks are to go after each step; 0 where none is chosen."""
        target, counts = self.rank * matrices, []
        for t in range(1, self.steps + 1):
            ahead = max(1 - (t - self.first) / (self.end - self.first), 0.0)
            left = int((total - target) * ahead**3 + target)
            chosen = t >= self.end or (t > self.first and t % self.every == 0)
            counts.append(max(total - left, 0) if chosen else 0)
        return np.array(counts)


def budget(rank: int, tinit: float, tfinal: float, steps: int, every: int) -> Budget:
    """The budget of a run, where a time below 1 is a part of its steps. InputError if that leaves none between."""
    first, last = (int(t if t >= 1 else t * steps) for t in (tinit, tfinal))
    if first + last >= steps:
        raise InputError(f"adalora: tinit={tinit} and tfinal={tfinal} leave none of {steps} steps in between")
    return Budget(rank, first, steps - last, steps, every)


def _ranks(trainable: Any) -> tuple[int, int]:
    """(all ranks, matrices) of AdaLoRA's tree."""
    shapes = [t["e"].shape for t in trainable.values()]
    return sum(map(math.prod, shapes)), sum(math.prod(s[:-1]) for s in shapes)


def allocate(plan: Budget, b1: float, b2: float) -> optax.GradientTransformationExtraArgs:
    """Sets `e` of the ranks with the lowest scores to 0 in {target: {"a": [D, R], "e": [R], "b": [R, F]}}.

    The score of a number, as it is after the step, is its mean |p g| times the mean distance from it; that of a rank is
    e's, and the means of its column of a and its row of b.
    """

    def begin(trainable: Any) -> Scores:
        total, matrices = _ranks(trainable)
        if plan.rank * matrices > total:
            raise InputError(f"adalora: --method.rank {plan.rank} is above the {total / matrices:g} ranks that each "
                             "matrix has at first, so none would go; raise --method.init-rank")  # fmt: skip
        return Scores(jnp.int32(0), *(jax.tree.map(jnp.zeros_like, trainable) for _ in range(2)))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Scores]:
        """Score the ranks as they are after this step, and end those that are over the budget."""
        gone = jnp.asarray(plan.gone(*_ranks(params)))
        size = jax.tree.map(lambda p, u, g: jnp.abs((p + u) * g), params, updates, extra["grads"])

        def averaged(b: float, old: Any, new: Any) -> Any:
            on = state.count + 1 < plan.end
            return jax.tree.map(lambda x, y: jnp.where(on, b * x + (1 - b) * y, x), old, new)

        mean = averaged(b1, state.mean, size)
        spread = averaged(b2, state.spread, jax.tree.map(lambda x, y: jnp.abs(x - y), size, mean))
        each = jax.tree.map(jnp.multiply, mean, spread)
        score = {k: s["e"] + s["a"].mean(-2) + s["b"].mean(-1) for k, s in each.items()}
        ranked = jnp.sort(jnp.concatenate([jnp.full(1, -1.0), *(s.ravel() for s in score.values())]))
        most = ranked[gone[jnp.minimum(state.count, plan.steps - 1)]]  # the first is below every score
        e = {k: jnp.where(s <= most, -params[k]["e"], updates[k]["e"]) for k, s in score.items()}
        return {k: u | {"e": e[k]} for k, u in updates.items()}, Scores(state.count + 1, mean, spread)

    return optax.GradientTransformationExtraArgs(begin, update)  # type: ignore[arg-type]
