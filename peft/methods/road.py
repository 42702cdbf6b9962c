"""RoAd: what a matrix gives, its bias included, turned in planes and scaled (arXiv:2409.00119)."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Count
from ...model import Weight, static
from ..base import Method
from ..targets import each_matrix, replace_biases, targets, wrap_weights


def planes(F: int, group: int) -> int:
    """How many places are turned together: the largest even divisor of F that is at most `group`; 0 if none is."""
    return max((g for g in range(2, min(F, group) + 1, 2) if F % g == 0), default=0)


def rotated(y: Array, theta: Array, alpha: Array, variant: int, group: int) -> Array:
    """alpha (y cos theta + turn(y) sin theta) of y [..., F], where place i of a group's first half and place i of its
    second make a plane; the angle is a plane's own (1), or a place's own (2), or (4) each term's in each place."""
    g, angle, size = planes(y.shape[-1], group), theta.astype(jnp.float32), alpha.astype(jnp.float32)
    per = {1: (1, g // 2), 2: (2, g // 2), 4: (2, 2, g // 2)}[variant]  # of a group: [term] [half] [plane]
    cos, sin = (size * f(angle) for f in (jnp.cos, jnp.sin))
    cos, sin = (z.reshape(*z.shape[:-1], -1, *per).astype(y.dtype) for z in (cos, sin))
    if variant == 4:
        cos, sin = cos[..., 0, :, :], sin[..., 1, :, :]
    halves = y.reshape(*y.shape[:-1], -1, 2, g // 2)
    turn = jnp.stack([-halves[..., 1, :], halves[..., 0, :]], -2)
    return (cos * halves + sin * turn).reshape(y.shape)


class RoAdWeight(Weight):
    """rotated(x @ w); theta = 0 with alpha = 1 turns nothing."""

    w: Any  # [D, F] frozen
    theta: Array  # [F / 2], [F] or [2 F]
    alpha: Array  # likewise
    variant: int = static()
    group: int = static()

    def __rmatmul__(self, x: Array) -> Array:
        return rotated(x @ self.w, self.theta, self.alpha, self.variant, self.group)


class RoAd(Method):
    """R (x W + bias), R turning pairs of outputs by theta = 0 and scaling by alpha = 1 at first (arXiv:2409.00119)."""

    demo = False

    variant: int = 1  # numbers a pair of outputs: an angle and a scale (1), two of each (2), or four (4)
    group: Count = 64  # outputs i and i + group / 2 are a pair; or the largest even divisor of all outputs below it
    where: str = "linear"

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        if self.variant not in (1, 2, 4):
            raise InputError(f"road: no variant {self.variant}; there are 1, 2, 4")
        for t in targets(self.where, params, 2, "road"):
            if not planes(t.shape[1], self.group):
                wanted = f"an even divisor of at most group={self.group}"
                raise InputError(f"road: {t.path} has {t.shape[1]} outputs, wanted {wanted}; narrow where")

        def one(key: Array, D: int, F: int) -> dict[str, Array]:
            return {"theta": jnp.zeros(F * self.variant // 2), "alpha": jnp.ones(F * self.variant // 2)}

        return each_matrix(key, params, self.where, one, "road")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        kind = {"variant": self.variant, "group": self.group}
        bound = wrap_weights(params, trainable, lambda w, **t: RoAdWeight(w, **t, **kind), alpha=1.0)
        return replace_biases(bound, trainable, lambda b, **t: rotated(b, **t, **kind), alpha=1.0)
