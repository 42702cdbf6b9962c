"""Arithmetic of what was learned: sums of updates, TIES, DARE; LoRA out of any update, of another rank, of several.

A delta is {path: W' - W}, fp32, in the layout of the base ([L, D, F] where layers are stacked). All is pure and jits
with ranks, densities and rates static; where a function returns a method too, jit a function of its arrays.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .. import InputError
from ..model.tree import is_stacked, name_and_layers, named, nested, replace, split_layer_index
from .base import Method, fold
from .masks import Where
from .methods.lora import LoRA, LoRAWeight
from .targets import Target, each_layer, layer_keys, targets, uniform_fan_in

Delta = dict[str, Array]


def scale(trainable: Any, by: Any) -> Any:
    """by * t of each leaf: `by` times the update where that is linear in the leaves (a delta, a prefix of zeros).

    Not of a product (LoRA's (t A)(t B) = t^2 A B: change its alpha), nor of absolute values (Subset: `task_vector`).
    """
    return jax.tree.map(lambda x: by * x, trainable)


def add(*trees: Any) -> Any:
    """The sum of each leaf over trees of one structure; it means something where `scale` does."""
    shapes = [jax.tree.map(jnp.shape, tree) for tree in trees]
    if other := next((i for i, shape in enumerate(shapes) if shape != shapes[0]), 0):
        raise InputError(f"tree {other} has other paths or shapes than tree 0; leaves add up one to one")
    return jax.tree.map(lambda *x: sum(x), *trees)


def average(trees: Sequence[Any], weights: Sequence[Any] | None = None) -> Any:
    """sum_i w_i t_i / sum_i w_i of each leaf: soups of Subset trees (arXiv:2203.05482), means of deltas or prompts.

    The mean of LoRA factors is no mean of updates: `concatenate` and divide alpha by their number, or average deltas.
    """
    weights = [1.0] * len(trees) if weights is None else weights
    return scale(add(*(scale(t, w) for t, w in zip(trees, weights, strict=True))), 1 / sum(weights))


def delta(method: Method, params: Any, trainable: Any) -> Delta:
    """W' - W of every array that the method binds something in the place of; a weight counts as the matrix it folds to.

    `params` is the whole base. InputError for a weight that is not linear in x, and for an array the base has not.
    """
    base, bound = named(params), named(method.bind(params, trainable))
    if new := next((path for path in bound if path not in base), ""):
        raise InputError(f"{new}: {type(method).__name__} adds an array that the base does not have")
    moved = [path for path in bound if bound[path] is not base[path]]
    parts = moved + [path for path in bound if path.startswith("head/")]  # tells `fold` that a table is not tied
    after, before = (named(fold(nested({p: flat[p] for p in parts}), jnp.float32)) for flat in (bound, base))
    return {path: after[path].astype(jnp.float32) - before[path].astype(jnp.float32) for path in moved}


def task_vector(tuned: Any, base: Any) -> Delta:
    """tuned - base of every array of two trees of plain arrays (arXiv:2212.04089)."""
    a, b = named(tuned), named(base)
    if alone := sorted(set(a) ^ set(b)):
        raise InputError(f"{alone[0]} is in one of the two bases alone; a task vector wants one architecture")
    return {path: a[path].astype(jnp.float32) - b[path].astype(jnp.float32) for path in a}


def apply_delta(params: Any, delta: Delta, by: Any = 1.0) -> dict[str, Any]:
    """W + by * delta, rounded to W's type; by = -1 takes what was learned away again (arXiv:2212.04089)."""
    flat = named(params)
    if other := next((path for path in delta if not hasattr(flat.get(path), "dtype")), ""):
        raise InputError(f"{other}: wanted a plain array in the base; give the delta's own base, folded")
    return replace(params, {p: (flat[p].astype(jnp.float32) + by * d).astype(flat[p].dtype) for p, d in delta.items()})


def task_arithmetic(deltas: Sequence[Delta], weights: Sequence[Any] | None = None) -> Delta:
    """sum_i w_i delta_i, 0 where a delta has no such path (arXiv:2212.04089). Of what `dare` left: DARE linear."""
    return {path: jnp.asarray(sum(w * x for w, x in rows)) for path, rows in _by_path(deltas, weights)}


def trim(delta: Delta, density: float) -> Delta:
    """The int(density * D F) numbers of largest magnitude of each matrix, each layer by itself; 0 elsewhere."""
    if not 0 <= density <= 1:
        raise InputError(f"density {density}: wanted the part of the numbers that stays, from 0 to 1")

    def one(x: Array) -> Array:
        kept = jax.lax.top_k(jnp.abs(x).ravel(), int(density * x.size))[1]
        return jnp.where(jnp.zeros(x.size, bool).at[kept].set(True).reshape(x.shape), x, 0)

    return {path: each_layer(_target(path, x), one, x) for path, x in delta.items()}


def ties(deltas: Sequence[Delta], density: float = 0.2, weights: Sequence[Any] | None = None) -> Delta:
    """sum_i w_i t_i [sgn t_i = s] / sum_i [sgn t_i = s], t = trim(delta), s = sgn sum_i t_i (arXiv:2306.01708).

    As HF PEFT has it: each matrix is trimmed by itself (in the paper all at once), weights act after the election, the
    divisor counts. With density = 1 of what `dare` left: DARE TIES.
    """
    merged = {}
    for path, rows in _by_path([trim(d, density) for d in deltas], weights):
        elected = jnp.where(sum(x for _, x in rows) >= 0, 1, -1)
        agree = [jnp.sign(x) == elected for _, x in rows]
        total = sum(jnp.where(on, w * x, 0) for (w, x), on in zip(rows, agree, strict=True))
        merged[path] = total / jnp.maximum(sum(on.astype(jnp.float32) for on in agree), 1)
    return merged


def dare(key: Array, deltas: Sequence[Delta], rate: float = 0.5) -> list[Delta]:
    """Each number dropped with probability `rate`, those that stay divided by 1 - rate (arXiv:2311.03099)."""
    if not 0 <= rate < 1:
        raise InputError(f"rate {rate}: wanted the part of the numbers that goes, from 0 to below 1")

    def one(key: Array, x: Array) -> Array:
        return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)

    def all_of(key: Array, delta: Delta) -> Delta:
        return {p: each_layer(t := _target(p, x), one, layer_keys(key, t, "dare"), x) for p, x in delta.items()}

    return [all_of(jax.random.fold_in(key, i), delta) for i, delta in enumerate(deltas)]


def extract_lora(delta: Delta, rank: int, where: Where = "linear") -> tuple[dict[str, Any], dict[str, Array]]:
    """({key: {"a" [D, R], "b" [R, F]}}, {key: share of |delta|^2 that it keeps, of each layer}) of what `where` picks.

    A = U_r S_r^1/2, B = S_r^1/2 V_r: the nearest matrix of rank r (Eckart and Young, 1936), for LoRA(rank, alpha=rank).
    A column whose singular value is 0 begins as LoRA's do, A random and B = 0, so that it can learn.
    """

    def one(key: Array, x: Array) -> tuple[dict[str, Array], Array]:
        u, s, v = jnp.linalg.svd(x.astype(jnp.float32), full_matrices=False)
        lost = jnp.square(s[rank:]).sum() / jnp.maximum(jnp.square(s).sum(), 1e-30)
        return _columns(key, u, s, v, rank), 1 - lost

    found = targets(where, delta, 2, "extract_lora")
    done = {t.key: _each(t, one, delta[t.path][slice(*split_layer_index(t.key)[1] or (None,))]) for t in found}
    return {key: lora for key, (lora, _) in done.items()}, {key: share for key, (_, share) in done.items()}


def to_lora(delta: Delta, rank: int, where: Where = "linear") -> tuple[LoRA, dict[str, Any]]:
    """(LoRA of just these matrices, trainable) of `extract_lora`."""
    trainable = extract_lora(delta, rank, where)[0]
    return LoRA(rank=rank, alpha=float(rank), where=",".join(map(_rule, trainable))), trainable


def rerank(method: LoRA, trainable: Any, rank: int, params: Any = None) -> tuple[LoRA, dict[str, Any]]:
    """(method, trainable) of another rank: exact where it suffices, else the nearest; A B is never made.

    s A B = Q_A (R_A R_B^T) Q_B^T by two QR, SVD of the [R, R] core. alpha stays; rules of alphas (which need `params`,
    or its shapes) and of ranks end. Columns that are new are those of `extract_lora`: random A, B = 0.
    """
    found = _scaled(method, trainable, params)
    new = dataclasses.replace(method, rank=rank, ranks=(), alphas=())

    def one(key: Array, a: Array, b: Array) -> dict[str, Array]:
        (qa, ra), (qb, rb) = jnp.linalg.qr(a), jnp.linalg.qr(b.T)
        u, s, v = jnp.linalg.svd(ra @ rb.T, full_matrices=False)
        return _columns(key, qa @ u, s / new.scale(rank, new.alpha), v @ qb.T, rank)

    return new, {key: _each(_target(key, a), one, a, b) for key, (a, b) in found.items()}


def concatenate(*adapters: tuple[LoRA, Any], params: Any = None) -> tuple[LoRA, dict[str, Any]]:
    """(LoRA, trainable) whose update is the sum of those of (method, trainable) pairs: [A_1 A_2] [s_1 B_1; s_2 B_2].

    Its rank is the sum of the ranks, less where fewer of them act. `params`: for rules of alphas, as in `rerank`.
    """
    parts: dict[str, tuple[list[Array], list[Array]]] = {}
    taken: dict[Any, str] = {}
    for method, trainable in adapters:
        for key, (a, b) in _scaled(method, trainable, params).items():
            t, held = _target(key, a), parts.setdefault(key, ([], []))
            held[0].append(a), held[1].append(b)
            if other := next((o for i in t.layers or [0] if (o := taken.setdefault((t.name, i), key)) != key), ""):
                raise InputError(f"{other} and {key} share layers but are cut in other places; add up their deltas")
    ranks = {key: sum(x.shape[-1] for x in a) for key, (a, _) in parts.items()}
    top = max(ranks.values())
    rules = tuple((_rule(key), rank) for key, rank in ranks.items() if rank != top)
    joined = {key: {"a": jnp.concatenate(a, -1), "b": ranks[key] / top * jnp.concatenate(b, -2)}  # LoRA's: top / rank
              for key, (a, b) in parts.items()}  # fmt: skip
    return LoRA(rank=top, alpha=float(top), where=",".join(map(_rule, ranks)), ranks=rules), joined


def _by_path(deltas: Sequence[Delta], weights: Sequence[Any] | None) -> Iterator[tuple[str, list[tuple[Any, Array]]]]:
    """(path, [(weight, array)]) over the deltas that have the path."""
    weights = [1.0] * len(deltas) if weights is None else weights
    for path in dict.fromkeys(path for d in deltas for path in d):
        yield path, [(w, d[path]) for w, d in zip(weights, deltas, strict=True) if path in d]


def _target(key: str, array: Array) -> Target:
    """The Target of a key of a delta, or of a method's tree, whose array this is."""
    (name, layers), stacked = name_and_layers(key), is_stacked(key)
    layers = range(len(array)) if stacked and layers is None else layers
    return Target(key, split_layer_index(key)[0], name, layers, stacked, array.shape[stacked:])


def _each(t: Target, fn: Callable[..., Any], *arrays: Array) -> Any:
    """fn(key, *arrays) of each layer, one after the other: a decomposition holds several copies of its matrix."""
    at = (layer_keys(jax.random.key(0), t, "a"), *arrays)
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(lambda at: fn(*at), at) if t.stacked else fn(*at)


def _columns(key: Array, u: Array, s: Array, v: Array, rank: int) -> dict[str, Array]:
    """A = U S^1/2 and B = S^1/2 V of the first `rank`; without a singular value, A as LoRA begins and B = 0."""
    (D, k), wide = u.shape, max(rank - len(s), 0)
    root = jnp.pad(jnp.where(s > k * jnp.finfo(s.dtype).eps * s[0], jnp.sqrt(s), 0), (0, wide))[:rank]
    u, v = jnp.pad(u, ((0, 0), (0, wide)))[:, :rank], jnp.pad(v, ((0, wide), (0, 0)))[:rank]
    return {"a": jnp.where(root > 0, u * root, uniform_fan_in(key, (D, rank), D)), "b": root[:, None] * v}


def _scaled(method: LoRA, trainable: Any, params: Any) -> dict[str, tuple[Array, Array]]:
    """{key: (A, s B)}, fp32, of a LoRA whose update is just s A B."""
    kind = type(method)
    if not (
        issubclass(kind, LoRA)
        and (kind.bind, kind.frozen_params, kind.weight) == (LoRA.bind, LoRA.frozen_params, LoRAWeight)
    ):
        raise InputError(f"{kind.__name__}: its update is not s A B alone; use to_lora of its delta")
    if method.alphas and params is None:
        raise InputError("alphas are rules over the base: give params= (the base or its shapes)")
    scaled = {key: (t["a"], method.factor(params, key, t) * t["b"]) for key, t in trainable.items()}
    return jax.tree.map(lambda x: x.astype(jnp.float32), scaled)


def _rule(key: str) -> str:
    """The rule that picks what a key names: `layers/[0:2]/attn/q` of `layers/attn/q[0:2]` or of `layers/0/attn/q`."""
    name, layers = name_and_layers(key)
    return name.replace("layers/", f"layers/[{layers.start}:{layers.stop}]/", 1) if layers else name
