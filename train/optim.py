"""Optimizers and learning rate schedules over a trainable tree; decay and rates of its parts by the rule language."""

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


def lr_schedule(optim: Optim, steps: int) -> Callable[[Any], Any]:
    """Return the learning rate as a function of the step: linear warm-up to `lr`, then constant, linear, cosine or WSD
    down to `lr * end`.

    WSD (warm-up, stable, decay; arXiv:2404.06395) falls linearly over the last `decay` fraction of the steps.
    Raises InputError if the warm-up leaves no step for the schedule.
    """
    warmup = int(optim.warmup if optim.warmup >= 1 else optim.warmup * steps)
    if warmup >= max(steps, 1):
        raise InputError(f"--optim.warmup {optim.warmup:g}: wanted fewer than the {steps} steps, or a fraction below 1")
    rest, end_lr = max(steps - warmup, 1), optim.lr * optim.end
    decay_steps = int(optim.decay * rest)
    schedules = {
        "constant": optax.constant_schedule(optim.lr),
        "linear": optax.linear_schedule(optim.lr, end_lr, rest),
        "cosine": optax.cosine_decay_schedule(optim.lr, rest, optim.end),
        # The first of the decay steps has a lower rate already, and the last step has the final one.
        "wsd": lambda step: optax.linear_schedule(optim.lr, end_lr, max(decay_steps, 1), rest - decay_steps)(step + 1),
    }
    # The first step already moves: step 0 of a warm-up over n steps has lr / n.
    rise = optax.linear_schedule(optim.lr / max(warmup, 1), optim.lr, max(warmup - 1, 1))
    return optax.join_schedules([rise, schedules[optim.schedule]], [warmup])


def make_optimizer(
    optim: Optim, trainable: Any, steps: int, method: Method | None = None
) -> optax.GradientTransformation:
    """Return clip -> AdamW (arXiv:1711.05101) or Muon (arXiv:2502.16982) -> decay -> rate of each group -> schedule ->
    the method's own transform. `trainable` may be shapes.

    Muon orthogonalises the update of every matrix inside a layer; tables, the head and vectors get Adam. Its updates
    are scaled to Adam's size (rms 0.2), so one learning rate serves both. (`optax.contrib.muon` has one `nesterov` for
    both and decays by leaves, not by layers.)
    """
    adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps)
    if optim.name == "muon":
        muon = optax.chain(
            optax.contrib.scale_by_muon(weight_dimension_numbers=_last_two_axes), optax.stateless(_scale_to_adam)
        )
        kinds = _map_paths(trainable, lambda path, leaf: "muon" if _is_layer_matrix(path, leaf) else "adam")
        scaled = optax.partition({"muon": muon, "adam": adam}, kinds)
    else:
        scaled = adam
    decayed = decay_mask(optim, trainable, method)
    return optax.chain(
        optax.clip_by_global_norm(optim.clip) if is_on(optim.clip) else optax.identity(),
        scaled,
        _decay_weights(optim.weight_decay, decayed) if is_on(optim.weight_decay) else optax.identity(),
        _scale_groups(optim.groups, trainable) if optim.groups else optax.identity(),
        optax.scale_by_learning_rate(lr_schedule(optim, steps)),
        method.update_transform(steps) if method else optax.identity(),
    )


def decay_mask(optim: Optim, trainable: Any, method: Method | None = None) -> Any:
    """Return 1.0 for each array that weight decay shrinks, else 0.0; an array [L, 1, ...] where its layers differ.

    The arrays are those of `optim.decay_where`; without it, those of two or more axes per layer that the method decays.
    """
    if optim.decay_where:
        return _by_layer(match_rules([(optim.decay_where, 1.0)], trainable, default=0.0, what="decay rule"), trainable)
    decays = method.decays if method else lambda path: True
    return _map_paths(trainable, lambda path, leaf: float(leaf.ndim - is_stacked(path) >= 2 and decays(path)))


def labels(rules: Rules, trainable: Any) -> Any:
    """Return the label that rules give each leaf of a trainable tree.

    `optax.partition({label: tx}, labels(rules, trainable))` gives each group an optimizer, where `Optim.groups` gives
    each group a learning rate.
    """
    by_path = one_value_per_array(match_rules(rules, trainable, what="label"), "label")
    return _map_paths(trainable, lambda path, leaf: by_path[path])


def rms(tree: Any) -> Array:
    """Return the root mean square over all numbers of a tree, in fp32."""
    leaves = jax.tree.leaves(tree)
    total = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)
    return jnp.sqrt(total / float(sum(x.size for x in leaves)))  # a count above 2^31 is no int32


def _is_layer_matrix(path: str, leaf: Any) -> bool:
    return "layers/" in path and leaf.ndim - is_stacked(path) == 2


def _map_paths(tree: Any, fn: Callable[[str, Any], Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [fn(path, leaf) for path, leaf in paths(tree)])


def _by_layer(values: dict[str, list[float]], tree: Any) -> Any:
    """Return a number for each leaf, or an array [L, 1, ...] where the numbers of its layers differ."""

    def value(path: str, leaf: Any) -> Any:
        row = values[path]
        return row[0] if len(set(row)) == 1 else np.array(row, np.float32).reshape(-1, *[1] * (leaf.ndim - 1))

    return _map_paths(tree, value)


def _decay_weights(rate: float, mask: Any) -> optax.GradientTransformation:
    """optax.add_decayed_weights with a number per layer where its mask has one bool per leaf; `rate` may be traced."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, p, on: u + (rate * on) * p, updates, params, mask)
    )


def _scale_groups(groups: Rules, trainable: Any) -> optax.GradientTransformation:
    factors = _by_layer(match_rules(groups, trainable, default=1.0, what="rate group"), trainable)
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))


def _last_two_axes(tree: Any) -> Any:
    """Return the axes of each matrix that Muon orthogonalises: the last two, whatever comes before them."""
    axes = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(lambda x: axes(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1), tree)


def _scale_to_adam(updates: Any, _: Any) -> Any:
    """Scale orthogonalised updates [D, F], of rms max(D, F)^-1/2, to rms 0.2."""
    return jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)
