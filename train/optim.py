"""Optimizers and schedules over a trainable tree; masks and rates by the rule language."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from .. import InputError
from ..model.tree import Rules, is_stacked, match_rules, one_value_per_array, paths
from ..peft import Method
from ..peft.targets import is_on
from .config import Optim


def schedule(optim: Optim, steps: int) -> Callable[[Any], Any]:
    """The learning rate at a step: linear warm-up to `lr`, then constant, linear, cosine or WSD down to `lr * end`.

    WSD (warm-up, stable, decay; arXiv:2404.06395) falls linearly over the last `decay` part of the steps.
    Raises InputError if the warm-up leaves no step for the schedule.
    """
    warmup = int(optim.warmup if optim.warmup >= 1 else optim.warmup * steps)
    if warmup >= max(steps, 1):
        raise InputError(f"--optim.warmup {optim.warmup:g}: wanted fewer than the {steps} steps, or a part below 1")
    rest, low = max(steps - warmup, 1), optim.lr * optim.end
    fall = int(optim.decay * rest)
    shapes = {
        "constant": optax.constant_schedule(optim.lr),
        "linear": optax.linear_schedule(optim.lr, low, rest),
        "cosine": optax.cosine_decay_schedule(optim.lr, rest, optim.end),
        # The first step of the last `fall` is lower already, and the last step of all has the last rate.
        "wsd": lambda step: optax.linear_schedule(optim.lr, low, max(fall, 1), rest - fall)(step + 1),
    }
    # The first step already moves: step 0 of a warm-up over n steps has lr / n.
    rise = optax.linear_schedule(optim.lr / max(warmup, 1), optim.lr, max(warmup - 1, 1))
    return optax.join_schedules([rise, shapes[optim.schedule]], [warmup])


def make_optimizer(
    optim: Optim, trainable: Any, steps: int, method: Method | None = None
) -> optax.GradientTransformation:
    """clip -> AdamW (arXiv:1711.05101) or Muon (arXiv:2502.16982) -> decay -> rate of each group -> schedule -> the
    method's own transform.

    Muon orthogonalises the update of every matrix inside a layer; tables, the head and vectors get Adam. With its
    updates scaled to Adam's size (rms 0.2), one learning rate serves both. `trainable` may be shapes.
    """
    adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps)
    if optim.name == "muon":
        muon = optax.chain(
            optax.contrib.scale_by_muon(weight_dimension_numbers=_dimensions), optax.stateless(_like_adam)
        )
        rule = _by_path(trainable, lambda path, leaf: "muon" if _is_matrix(path, leaf) else "adam")
        scaled = optax.partition({"muon": muon, "adam": adam}, rule)
    else:
        scaled = adam
    decay = decay_mask(optim, trainable, method)
    return optax.chain(
        optax.clip_by_global_norm(optim.clip) if is_on(optim.clip) else optax.identity(),
        scaled,
        _add_decay(optim.weight_decay, decay) if is_on(optim.weight_decay) else optax.identity(),
        _times(_groups(optim, trainable)) if optim.groups else optax.identity(),
        optax.scale_by_learning_rate(schedule(optim, steps)),
        method.update_transform(steps) if method else optax.identity(),
    )


def decay_mask(optim: Optim, trainable: Any, method: Method | None = None) -> Any:
    """1.0 for each array that weight decay shrinks, else 0.0; an array [L, 1, ...] where its layers differ.

    By `optim.decay_where`, or else for those of two or more axes in a layer of which the method says so.
    """
    if optim.decay_where:
        return _per_layer(match_rules([(optim.decay_where, 1.0)], trainable, default=0.0, what="decay rule"), trainable)
    decays = method.decays if method else lambda path: True
    return _by_path(trainable, lambda path, leaf: float(_layer_ndim(path, leaf) >= 2 and decays(path)))


def labels(rules: Rules, trainable: Any) -> Any:
    """The label that rules give each leaf of a trainable tree: `optax.partition({label: tx}, labels(rules, trainable))`
    gives groups an optimizer each, where `Optim.groups` gives them a rate each."""
    found = one_value_per_array(match_rules(rules, trainable, what="label"), "label")
    return _by_path(trainable, lambda path, leaf: found[path])


def rms(tree: Any) -> Array:
    """Root mean square over all numbers of a tree, fp32."""
    leaves = jax.tree.leaves(tree)
    total = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)
    return jnp.sqrt(total / float(sum(x.size for x in leaves)))  # a count above 2^31 is no int32


def _layer_ndim(path: str, leaf: Any) -> int:
    return leaf.ndim - is_stacked(path)


def _is_matrix(path: str, leaf: Any) -> bool:
    return "layers/" in path and _layer_ndim(path, leaf) == 2


def _by_path(tree: Any, fn: Callable[[str, Any], Any]) -> Any:
    values = [fn(path, leaf) for path, leaf in paths(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), values)


def _per_layer(values: dict[str, list[float]], tree: Any) -> Any:
    """A number for each leaf, or an array [L, 1, ...] where its layers differ."""

    def one(path: str, leaf: Any) -> Any:
        row = values[path]
        return row[0] if len(set(row)) == 1 else np.array(row, np.float32).reshape(-1, *[1] * (leaf.ndim - 1))

    return _by_path(tree, one)


def _groups(optim: Optim, trainable: Any) -> Any:
    return _per_layer(match_rules(optim.groups, trainable, default=1.0, what="rate group"), trainable)


def _times(factors: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))


def _add_decay(rate: float, where: Any) -> optax.GradientTransformation:
    def add(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p, on: u + (rate * on) * p, updates, params, where)

    return optax.stateless(add)


def _dimensions(tree: Any) -> Any:
    """Of each matrix the axes that Muon orthogonalises: the last two, whatever stands before them."""
    axes = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(lambda x: axes(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1), tree)


def _like_adam(updates: Any, _: Any) -> Any:
    """An orthogonalised [D, F] update has rms max(D, F)^-1/2; make it 0.2."""
    return jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)
