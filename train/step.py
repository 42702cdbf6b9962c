"""The one train step: differentiate the trainable tree, whatever the method and the phase."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..model import Transformer, token_losses
from ..model.backend import backend
from ..peft import Method
from .optim import rms

Batch = dict[str, Array]


class State(NamedTuple):
    """All that a step changes; the frozen base and the data are arguments of the step."""

    step: Array
    trainable: Any
    opt_state: Any
    skipped: Array  # updates left out: a loss or gradient that is not finite, a spike of the loss, no targets
    key: Array  # uint32 [2]: key data of the run's random draws (dropout); each step folds its number in
    recent: Any = None  # to detect spikes: the losses of the last updates, the newest last; NaN where there is none yet


SPIKE_WINDOW = 128  # updates whose losses a spike is measured against


def init_state(trainable: Any, tx: optax.GradientTransformation, spikes: bool = False, *, seed: Any = 0) -> State:
    """Return the state before the first step.

    spikes: remember the last losses. seed: of the random draws of training, an int or an int32 array (under `vmap`, one
    for each adapter).
    """
    recent = jnp.full(SPIKE_WINDOW, jnp.nan, jnp.float32) if spikes else None
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"train/step"))  # no other draw of the run has this key
    return State(jnp.int32(0), trainable, tx.init(trainable), jnp.int32(0), jax.random.key_data(key), recent)


def make_loss(
    model: Transformer, method: Method, chunk: int = 8192
) -> Callable[[Any, Any, Batch], tuple[Array, Array]]:
    """Return loss(trainable, frozen, batch, key=None) -> (sum of target losses in nats, number of targets).

    With a key it is the training loss: with the method's random draws (dropout), and plus its auxiliary loss, which is
    added to the mean loss.
    """

    def loss(trainable: Any, frozen: Any, batch: Batch, key: Array | None = None) -> tuple[Array, Array]:
        bound = method.bind(frozen, trainable) if key is None else method.bind_train(frozen, trainable, key)
        nll_BT = token_losses(model, bound, batch, method.context(trainable), chunk)
        # where, not times: the loss of a position without weight must not count, even if it is NaN.
        total = jnp.sum(jnp.where(batch["weights"] > 0, nll_BT * batch["weights"], 0.0))
        targets = jnp.sum(batch["weights"])
        return total if key is None else total + targets * method.aux_loss(trainable), targets

    return loss


def make_train_step(
    model: Transformer,
    method: Method,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    chunk: int = 8192,
    spike: float = 0.0,
) -> Callable[[State, Any, Batch], tuple[State, dict[str, Array]]]:
    """Return step(state, frozen, batch) -> (state, metrics), a pure function: jit it and donate the state.

    The gradient is of the mean loss over the batch's targets, also when it is accumulated over `accumulate` parts, and
    of `state.trainable` alone: frozen leaves have no gradient, no optimizer state, no update. A step whose loss or
    gradient is not finite, or whose loss is more than `spike` standard deviations above the mean of the last
    SPIKE_WINDOW ones (0: never; else the state remembers them), changes nothing but the counts.
    """
    loss, tx = make_loss(model, method, chunk), optax.with_extra_args_support(tx)
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, Array]]:
        """Map (state, frozen, batch [B, T]) to (state, metrics)."""
        batch = {k: v for k, v in batch.items() if v.ndim == 2}
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        if accumulate == 1:
            (total, targets), grads = gradient(state.trainable, frozen, batch, key)
        else:
            total, targets, grads = _accumulate(gradient, state.trainable, frozen, batch, key, accumulate)
        n = jnp.maximum(targets, 1.0)
        grads = jax.tree.map(lambda g: g / n, grads)
        norm = optax.tree.norm(grads)
        old_opt_state = jax.tree.map(_to_device, state.opt_state)
        ok, recent = jnp.isfinite(total) & jnp.isfinite(norm) & (targets > 0), state.recent
        if recent is not None:  # a comparison with NaN is false: no loss is a spike before there are enough
            ok &= ~(total / n > recent.mean() + spike * recent.std())
            recent = jnp.where(ok, jnp.append(recent[1:], total / n), recent)

        def update() -> Any:
            updates, opt_state = tx.update(grads, old_opt_state, state.trainable, grads=grads)
            return optax.apply_updates(state.trainable, updates), opt_state, rms(updates)

        trainable, opt_state, update_rms = _update_if(ok, update, (state.trainable, old_opt_state, jnp.float32(0)))
        metrics = {"loss": total / n, "targets": targets, "grad_norm": norm, "update_rms": update_rms, "ok": ok}
        return State(state.step + 1, trainable, opt_state, state.skipped + ~ok, state.key, recent), metrics

    return step


def _to_device(x: Array) -> Array:
    """Move an array of the optimizer state from host memory (--offload) to the device.

    A device_put of arrays that are there already would commit what the step returns, so that a plain jit of the step
    would compile twice.
    """
    device = jax.memory.Space.Device
    return x if jax.typeof(x).memory_space == device else jax.device_put(x, device)


def _update_if(ok: Array, update: Callable[[], Any], old: Any) -> Any:
    """Return update() if ok, else the old values.

    On a CPU a branch saves 2-4 % of a step of 5 M parameters. An accelerator's host may have to wait for a branch, so
    there the update is always computed.
    """
    if backend() == "cpu":
        return jax.lax.cond(ok, update, lambda: old)
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), update(), old)


def _accumulate(
    gradient: Any, trainable: Any, frozen: Any, batch: Batch, key: Array, parts: int
) -> tuple[Array, Array, Any]:
    """Return the sums of loss, targets and gradients over `parts` of the batch, one in memory at a time."""

    def split(x: Array) -> Array:
        # Part p has rows p, p + parts, ..., so each device keeps its own rows of a batch that is split over devices.
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(sums: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
        index, rows = part
        (total, targets), grads = gradient(trainable, frozen, rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, sums, (total, targets, grads)), None

    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(add, zero, (jnp.arange(parts), {k: split(v) for k, v in batch.items()}))[0]
