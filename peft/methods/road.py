"""RoAd: the output of a matrix, its bias included, rotated in planes and scaled (arXiv:2409.00119)."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Count
from ...model import Weight, static
from ..base import Method
from ..hf_spec import IDENTITY, HFSpec, Key, ValueKind
from ..targets import Target, replace_biases, wrap_weights


def group_size(F: int, group: int) -> int:
    """Return the number of outputs that form planes together: the largest even divisor of F up to `group`, or 0."""
    return max((g for g in range(2, min(F, group) + 1, 2) if F % g == 0), default=0)


def rotated(y: Array, theta: Array, alpha: Array, variant: int, group: int) -> Array:
    """Return alpha (y cos theta + turn(y) sin theta) of y [..., F].

    Output i of a group's first half and output i of its second half form a plane, in which turn is a quarter turn. Each
    plane has one angle and scale (variant 1), each output its own (2), or each of the two terms of each output (4).
    """
    g, angle, size = group_size(y.shape[-1], group), theta.astype(jnp.float32), alpha.astype(jnp.float32)
    per_group = {1: (1, g // 2), 2: (2, g // 2), 4: (2, 2, g // 2)}[variant]  # [term] [half] [plane]
    cos, sin = (size * f(angle) for f in (jnp.cos, jnp.sin))
    cos, sin = (z.reshape(*z.shape[:-1], -1, *per_group).astype(y.dtype) for z in (cos, sin))
    if variant == 4:
        cos, sin = cos[..., 0, :, :], sin[..., 1, :, :]
    halves = y.reshape(*y.shape[:-1], -1, 2, g // 2)
    turn = jnp.stack([-halves[..., 1, :], halves[..., 0, :]], -2)
    return (cos * halves + sin * turn).reshape(y.shape)


class RoAdWeight(Weight):
    """rotated(x @ w); theta = 0 with alpha = 1 changes nothing."""

    w: Any  # [D, F] frozen
    theta: Array  # [F / 2], [F] or [2 F]
    alpha: Array  # likewise
    variant: int = static()
    group: int = static()

    def __rmatmul__(self, x: Array) -> Array:
        return rotated(x @ self.w, self.theta, self.alpha, self.variant, self.group)


_VARIANT = ValueKind("road_1, road_2 or road_4", ("road_1", "road_2", "road_4").__contains__)


class RoAd(Method):
    """R (x W + bias), R turning pairs of outputs by theta = 0 and scaling by alpha = 1 at first (arXiv:2409.00119).

    theta and alpha [F variant / 2]. HF PEFT: ROAD.
    """

    demo = False

    variant: int = 1  # numbers a pair of outputs: an angle and a scale (1), two of each (2), or four (4)
    group: Count = 64  # outputs i and i + group / 2 are a pair; or the largest even divisor of all outputs below it
    where: str = "linear"

    hf = HFSpec(
        "ROAD",
        keys={"group_size": Key(64, "group"), "variant": Key("road_1", kind=_VARIANT)},
        tensors=IDENTITY.tensors(theta="road_theta", alpha="road_alpha"),
        conv1d=False,
        read=lambda c, *_: {"variant": int(c["variant"][-1])},
        write=lambda m: {"variant": f"road_{m.variant}"},
    )

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        F = target.shape[1]
        if self.variant not in (1, 2, 4):
            raise InputError(f"road: no variant {self.variant}; there are 1, 2, 4")
        if not group_size(F, self.group):
            raise InputError(f"road: {target.path} has {F} outputs, wanted an even divisor of at most "
                             f"group={self.group}; narrow where")  # fmt: skip
        return {"theta": jnp.zeros(F * self.variant // 2), "alpha": jnp.ones(F * self.variant // 2)}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        settings = {"variant": self.variant, "group": self.group}
        bound = wrap_weights(params, trainable, lambda w, **t: RoAdWeight(w, **t, **settings), alpha=1.0)
        return replace_biases(bound, trainable, lambda b, **t: rotated(b, **t, **settings), alpha=1.0)
