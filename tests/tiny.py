"""The tiny base, batch and methods that the laws are held against."""

import dataclasses
import math
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from graftax import peft
from graftax.model import Config, Transformer, init, token_losses
from graftax.model.sharding import make_mesh, shardings
from graftax.peft import Method, Subset, chain
from graftax.peft.sharding import adapter_shardings, frozen_shardings
from graftax.train.config import Optim
from graftax.train.optim import make_optimizer
from graftax.train.step import init_state, make_train_step

CONFIG = Config(V=61, D=32, L=2, N=4, K=2, H=8, F=48, context=64, qkv_bias=True)

# Every method with its defaults, found as the command line finds it, and what else a user may write.
CASES: dict[str, Method] = {name: cls() for name, cls in peft.methods.items()} | {
    "norms": Subset("norms"),
    "layer_range": Subset("layers/[1:]/mlp/.*"),
    "lora_range": peft.methods["lora"](where="layers/[:1]/attn/[qkvo]"),
    "norms_and_lora": chain(Subset("norms"), peft.methods["lora"](rank=2)),
    "lora_and_prompt": chain(peft.methods["lora"](rank=2), peft.methods["prompt"](tokens=3)),
    "ia3_and_prefix": chain(peft.methods["ia3"](), peft.methods["prefix"](tokens=3)),
}


class Base(NamedTuple):
    config: Config
    model: Transformer
    params: Any

    __hash__, __eq__ = object.__hash__, object.__eq__  # what is computed of a base can be cached


@cache
def make_base(**changes: Any) -> Base:
    """The tiny base with some fields of its config changed."""
    config = dataclasses.replace(CONFIG, **changes)
    return Base(config, Transformer(config), init(config, jax.random.key(0)))


def make_batch(seed: int = 0, B: int = 4, T: int = 16) -> dict[str, jax.Array]:
    """Rows of two documents and some padding, as packing makes them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, CONFIG.V, (B, T + 1))
    segments = np.ones((B, T), np.int32)
    segments[:, T // 2 :], segments[0, -3:] = 2, 0
    positions = np.concatenate([np.arange(T // 2), np.arange(T - T // 2)])[None].repeat(B, 0)
    weights = (segments > 0).astype(np.float32)
    weights[:, T // 2 - 1] = 0
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:], "segments": segments, "positions": positions}
    return {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()} | {"weights": jnp.asarray(weights)}


def shaken(tree: Any, size: float = 0.05) -> Any:
    """The tree with noise on every leaf, so that nothing is at its special starting point."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return jax.tree.unflatten(
        structure, [x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


OPTIM = Optim(lr=3e-2, warmup=2, weight_decay=0.1, clip=1.0)


@cache
def train_step(model: Transformer, method: Method, optim: Optim, **kwargs: Any) -> Callable[..., Any]:
    """step(state, frozen, batch, lr=, eps=), compiled once for all laws: those two are arguments."""

    def step(state: Any, frozen: Any, batch: Any, lr: Any, eps: Any) -> Any:
        unchecked: Any = SimpleNamespace(**vars(optim) | {"lr": lr, "eps": eps})  # Optim refuses what is no number yet
        tx = make_optimizer(unchecked, state.trainable, 20, method)
        return make_train_step(model, method, tx, **kwargs)(state, frozen, batch)

    return jax.jit(step)


def stepper(base: Base, method: Method, optim: Optim = OPTIM, **kwargs: Any) -> tuple[Any, Any, Any]:
    """(frozen, state, jitted step) of a method on a base."""
    frozen, trainable = peft.partition(method, base.params, jax.random.key(1))
    state = init_state(trainable, make_optimizer(optim, trainable, 20, method))
    shared = train_step(base.model, method, dataclasses.replace(optim, lr=0.0, eps=1.0), **kwargs)  # for any of the two
    return frozen, state, partial(shared, lr=optim.lr, eps=optim.eps)


# At a higher rate, and with a lower eps of Adam, some methods make large differences of what is rounding at first.
STEADY = dataclasses.replace(OPTIM, lr=3e-3, eps=1e-6)


def on_mesh(base: Base, method: Method, shape: tuple[int, ...], **kwargs: Any) -> tuple[Any, Any, Any]:
    """(mesh, begin() -> (frozen, state), jitted step) of a method over a mesh of the first devices."""
    mesh = make_mesh(shape, jax.devices()[: math.prod(shape)])
    tx = make_optimizer(STEADY, jax.eval_shape(method.init, jax.random.key(1), base.params), 20, method)

    def begin(params: Any) -> Any:
        frozen, trainable = peft.partition(method, params, jax.random.key(1))
        return frozen, init_state(trainable, tx)

    split = shardings(mesh, base.params)
    frozen, state = jax.eval_shape(begin, base.params)
    where = (frozen_shardings(mesh, frozen, base.params, split),
             adapter_shardings(mesh, method, state, base.params, split))  # fmt: skip
    step = jax.jit(make_train_step(base.model, method, tx, **kwargs), out_shardings=(where[1], None))
    return mesh, lambda: jax.jit(begin, out_shardings=where)(jax.device_put(base.params, split)), step


@cache
def evaluator(model: Transformer, method: Method) -> Callable[..., Any]:
    """evaluate(params, trainable, batch) -> (logits, losses of the targets), one program for all laws."""

    def evaluate(params: Any, trainable: Any, batch: Any) -> Any:
        where = batch["ids"], batch.get("positions"), batch.get("segments")
        logits = peft.apply(model, params, method, trainable, *where)
        return logits, token_losses(model, method.bind(params, trainable), batch, method.context(trainable))

    return jax.jit(evaluate)


def close(a: Any, b: Any, tol: float = 1e-5) -> None:
    """Assert that two trees have one structure and nearly equal values."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tol, atol=tol)


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(np.array_equal(x, y) for x, y in pairs)
