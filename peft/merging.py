"""Merging of adapters: sums of updates, TIES, DARE; LoRA from any update, of another rank, or from several.

- Trees of one structure: `scale`, `add`, `average`.
- Updates W' - W of the base: `delta`, `task_vector`, `apply_delta`; merged by `task_arithmetic`, `ties`, `dare`.
- LoRA: `extract_lora` and `to_lora` of a delta, `rerank`, `concatenate`.

A delta is {path: W' - W}, fp32, in the layout of the base ([L, D, F] where layers are stacked). Everything is pure and
jits with ranks, densities and rates static; of a function that returns a method too, jit its arrays alone.
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
from .targets import Target, layer_keys, targets, uniform_fan_in, vmap_layers

Delta = dict[str, Array]


def scale(trainable: Any, factor: Any) -> Any:
    """Return every leaf times `factor`; that scales the update if it is linear in the leaves (a delta, a prefix).

    A LoRA's is not, since (c A)(c B) = c^2 A B: change its alpha. A Subset's arrays are values: see `task_vector`.
    """
    return jax.tree.map(lambda x: factor * x, trainable)


def add(*trees: Any) -> Any:
    """Return the sum, leaf by leaf, of trees of one structure; meaningful where `scale` is."""
    shapes = [jax.tree.map(jnp.shape, tree) for tree in trees]
    if other := next((i for i, shape in enumerate(shapes) if shape != shapes[0]), 0):
        raise InputError(f"tree {other} has other paths or shapes than tree 0; leaves add up one to one")
    return jax.tree.map(lambda *x: sum(x), *trees)


def average(trees: Sequence[Any], weights: Sequence[Any] | None = None) -> Any:
    """Return sum_i w_i t_i / sum_i w_i of each leaf: soups of Subset trees (arXiv:2203.05482), means of deltas.

    The mean of LoRA factors is not the mean of updates: `concatenate` and divide alpha by their number.
    """
    weights = [1.0] * len(trees) if weights is None else weights
    return scale(add(*(scale(t, w) for t, w in zip(trees, weights, strict=True))), 1 / sum(weights))


def delta(method: Method, params: Any, trainable: Any) -> Delta:
    """Return W' - W of every array that the method replaces; a weight counts as the matrix that it folds to.

    `params` is the whole base. Raises InputError for a weight that is not linear in x, and for an array that the base
    does not have.
    """
    base, bound = named(params), named(method.bind(params, trainable))
    if new := next((path for path in bound if path not in base), ""):
        raise InputError(f"{new}: {type(method).__name__} adds an array that the base does not have")
    changed = [path for path in bound if bound[path] is not base[path]]
    folded = changed + [path for path in bound if path.startswith("head/")]  # tells `fold` that a table is not tied
    after, before = (named(fold(nested({p: flat[p] for p in folded}), jnp.float32)) for flat in (bound, base))
    return {path: after[path].astype(jnp.float32) - before[path].astype(jnp.float32) for path in changed}


def task_vector(tuned: Any, base: Any) -> Delta:
    """Return tuned - base of every array of two trees of plain arrays (arXiv:2212.04089)."""
    a, b = named(tuned), named(base)
    if unshared := sorted(set(a) ^ set(b)):
        raise InputError(f"{unshared[0]} is in one of the two bases alone; a task vector wants one architecture")
    return {path: a[path].astype(jnp.float32) - b[path].astype(jnp.float32) for path in a}


def apply_delta(params: Any, delta: Delta, factor: Any = 1.0) -> dict[str, Any]:
    """Return W + factor * delta, rounded to W's dtype; -1 removes what was learned (arXiv:2212.04089)."""
    flat = named(params)
    if other := next((path for path in delta if not hasattr(flat.get(path), "dtype")), ""):
        raise InputError(f"{other}: wanted a plain array in the base; give the delta's own base, folded")

    def added(w: Array, d: Array) -> Array:
        return (w.astype(jnp.float32) + factor * d).astype(w.dtype)

    return replace(params, {path: added(flat[path], d) for path, d in delta.items()})


def task_arithmetic(deltas: Sequence[Delta], weights: Sequence[Any] | None = None) -> Delta:
    """Return sum_i w_i delta_i, with 0 for a path that a delta lacks (arXiv:2212.04089). After `dare`: DARE linear."""
    return {path: jnp.asarray(sum(w * x for w, x in pairs)) for path, pairs in _by_path(deltas, weights)}


def trim(delta: Delta, density: float) -> Delta:
    """Keep the int(density * D F) numbers of largest magnitude of each matrix of each layer; set the others to 0."""
    if not 0 <= density <= 1:
        raise InputError(f"density {density}: wanted the part of the numbers that stays, from 0 to 1")

    def trimmed(x: Array) -> Array:
        largest = jax.lax.top_k(jnp.abs(x).ravel(), int(density * x.size))[1]
        return jnp.where(jnp.zeros(x.size, bool).at[largest].set(True).reshape(x.shape), x, 0)

    return {path: vmap_layers(_target(path, x), trimmed, x) for path, x in delta.items()}


def ties(deltas: Sequence[Delta], density: float = 0.2, weights: Sequence[Any] | None = None) -> Delta:
    """Return sum_i w_i t_i [sgn t_i = s] / sum_i [sgn t_i = s], t = trim(delta), s = sgn sum_i t_i (arXiv:2306.01708).

    As in HF PEFT each matrix is trimmed by itself (in the paper all at once), weights act after the election of s, and
    the divisor is a count. With density = 1 after `dare`: DARE TIES.
    """
    merged = {}
    for path, pairs in _by_path([trim(d, density) for d in deltas], weights):
        elected = jnp.where(sum(x for _, x in pairs) >= 0, 1, -1)
        agree = [jnp.sign(x) == elected for _, x in pairs]
        total = sum(jnp.where(on, w * x, 0) for (w, x), on in zip(pairs, agree, strict=True))
        merged[path] = total / jnp.maximum(sum(on.astype(jnp.float32) for on in agree), 1)
    return merged


def dare(key: Array, deltas: Sequence[Delta], rate: float = 0.5) -> list[Delta]:
    """Set each number to 0 with probability `rate`, and divide the others by 1 - rate (arXiv:2311.03099)."""
    if not 0 <= rate < 1:
        raise InputError(f"rate {rate}: wanted the part of the numbers that goes, from 0 to below 1")

    def dropped(key: Array, x: Array) -> Array:
        return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)

    def dropped_delta(key: Array, delta: Delta) -> Delta:
        return {p: vmap_layers(t := _target(p, x), dropped, layer_keys(key, t, "dare"), x) for p, x in delta.items()}

    return [dropped_delta(jax.random.fold_in(key, i), delta) for i, delta in enumerate(deltas)]


def extract_lora(delta: Delta, rank: int, where: Where = "linear") -> tuple[dict[str, Any], dict[str, Array]]:
    """Return ({key: {"a" [D, R], "b" [R, F]}}, {key: share of |delta|^2 kept, of each layer}) of what `where` picks.

    A = U_r S_r^1/2, B = S_r^1/2 V_r: the nearest matrix of rank r (Eckart and Young, 1936), for LoRA(rank, alpha=rank).
    A column whose singular value is 0 begins as in LoRA, A random and B = 0, so that it can train.
    """

    def extract(key: Array, x: Array) -> tuple[dict[str, Array], Array]:
        u, s, v = jnp.linalg.svd(x.astype(jnp.float32), full_matrices=False)
        lost = jnp.square(s[rank:]).sum() / jnp.maximum(jnp.square(s).sum(), 1e-30)
        return _factors(key, u, s, v, rank), 1 - lost

    pairs = {}
    for target in targets(where, delta, 2, "extract_lora"):
        layers = split_layer_index(target.key)[1]
        pairs[target.key] = _map_layers(target, extract, delta[target.path][slice(*layers) if layers else ...])
    return {key: lora for key, (lora, _) in pairs.items()}, {key: share for key, (_, share) in pairs.items()}


def to_lora(delta: Delta, rank: int, where: Where = "linear") -> tuple[LoRA, dict[str, Any]]:
    """Return (LoRA of just these matrices, trainable) of `extract_lora`."""
    trainable = extract_lora(delta, rank, where)[0]
    return LoRA(rank=rank, alpha=float(rank), where=",".join(map(_rule, trainable))), trainable


def rerank(method: LoRA, trainable: Any, rank: int, params: Any = None) -> tuple[LoRA, dict[str, Any]]:
    """Return (method, trainable) of another rank: the same update if the rank suffices, else the nearest.

    s A B = Q_A (R_A R_B^T) Q_B^T by two QR decompositions and the SVD of the [R, R] core; A B is never formed. alpha
    stays; rules of alphas (which need `params`, or its shapes) and of ranks are dropped. New columns are as in
    `extract_lora`.
    """
    scaled = _scaled_factors(method, trainable, params)
    new = dataclasses.replace(method, rank=rank, ranks=(), alphas=())

    def factors(key: Array, a: Array, b: Array) -> dict[str, Array]:
        (qa, ra), (qb, rb) = jnp.linalg.qr(a), jnp.linalg.qr(b.T)
        u, s, v = jnp.linalg.svd(ra @ rb.T, full_matrices=False)
        return _factors(key, qa @ u, s / new.scale(rank, new.alpha), v @ qb.T, rank)

    return new, {key: _map_layers(_target(key, a), factors, a, b) for key, (a, b) in scaled.items()}


def concatenate(*adapters: tuple[LoRA, Any], params: Any = None) -> tuple[LoRA, dict[str, Any]]:
    """Return (LoRA, trainable) whose update is the sum of those of (method, trainable) pairs.

    `[A_1 A_2] [s_1 B_1; s_2 B_2]`: its rank is the sum of the ranks, less where fewer of them act. `params`: for
    rules of alphas, as in `rerank`.
    """
    parts: dict[str, tuple[list[Array], list[Array]]] = {}
    owner: dict[Any, str] = {}  # (name, layer) -> the key that holds it
    for method, trainable in adapters:
        for key, (a, b) in _scaled_factors(method, trainable, params).items():
            columns, rows = parts.setdefault(key, ([], []))
            columns.append(a)
            rows.append(b)
            target = _target(key, a)
            for layer in target.layers or [0]:
                if (other := owner.setdefault((target.name, layer), key)) != key:
                    raise InputError(f"{other} and {key} share layers but are cut in other places; add up their deltas")
    ranks = {key: sum(a.shape[-1] for a in columns) for key, (columns, _) in parts.items()}
    top = max(ranks.values())
    rules = tuple((_rule(key), rank) for key, rank in ranks.items() if rank != top)
    joined = {key: {"a": jnp.concatenate(columns, -1), "b": ranks[key] / top * jnp.concatenate(rows, -2)}
              for key, (columns, rows) in parts.items()}  # fmt: skip  # LoRA multiplies by top / rank
    return LoRA(rank=top, alpha=float(top), where=",".join(map(_rule, ranks)), ranks=rules), joined


def _by_path(deltas: Sequence[Delta], weights: Sequence[Any] | None) -> Iterator[tuple[str, list[tuple[Any, Array]]]]:
    """Yield (path, [(weight, array)]) over the deltas that have the path."""
    weights = [1.0] * len(deltas) if weights is None else weights
    for path in dict.fromkeys(path for d in deltas for path in d):
        yield path, [(w, d[path]) for w, d in zip(weights, deltas, strict=True) if path in d]


def _target(key: str, array: Array) -> Target:
    """Return the Target of a key whose array this is."""
    return Target.from_key(key, array, array.shape[is_stacked(key) :])


def _map_layers(target: Target, fn: Callable[..., Any], *arrays: Array) -> Any:
    """Return fn(key, *arrays) of each layer, one at a time: a decomposition takes several copies of its matrix."""
    args = (layer_keys(jax.random.key(0), target, "a"), *arrays)
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(lambda layer: fn(*layer), args) if target.stacked else fn(*args)


def _factors(key: Array, u: Array, s: Array, v: Array, rank: int) -> dict[str, Array]:
    """Return A = U S^1/2 and B = S^1/2 V of the first `rank`; where S is 0, A as LoRA begins and B = 0."""
    (D, k), missing = u.shape, max(rank - len(s), 0)
    root = jnp.pad(jnp.where(s > k * jnp.finfo(s.dtype).eps * s[0], jnp.sqrt(s), 0), (0, missing))[:rank]
    u, v = jnp.pad(u, ((0, 0), (0, missing)))[:, :rank], jnp.pad(v, ((0, missing), (0, 0)))[:rank]
    return {"a": jnp.where(root > 0, u * root, uniform_fan_in(key, (D, rank), D)), "b": root[:, None] * v}


def _scaled_factors(method: LoRA, trainable: Any, params: Any) -> dict[str, tuple[Array, Array]]:
    """Return {key: (A, s B)}, fp32, of a LoRA whose update is just s A B; raises InputError for any other method."""
    cls, plain = type(method), (LoRA.bind, LoRA.frozen_params, LoRAWeight)
    if not issubclass(cls, LoRA) or (cls.bind, cls.frozen_params, cls.weight) != plain:
        raise InputError(f"{cls.__name__}: its update is not s A B alone; use to_lora of its delta")
    if method.alphas and params is None:
        raise InputError("alphas are rules over the base: give params= (the base or its shapes)")
    scaled = {key: (arrays["a"], arrays["b"]) for key, arrays in method.scaled(params, trainable).items()}
    return jax.tree.map(lambda x: x.astype(jnp.float32), scaled)


def _rule(key: str) -> str:
    """Return the rule that picks a key: `layers/[0:2]/attn/q` of `layers/attn/q[0:2]` or of `layers/0/attn/q`."""
    name, layers = name_and_layers(key)
    return name.replace("layers/", f"layers/[{layers.start}:{layers.stop}]/", 1) if layers else name
