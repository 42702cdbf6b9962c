"""LoRA: low-rank updates of matrices and tables (arXiv:2106.09685)."""

import dataclasses
from functools import partial
from typing import Annotated, Any, ClassVar, Self

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ... import InputError
from ...bounds import FINITE, Bounds, Decay, Drawn, Positive, Real, Size
from ...model import Weight
from ...model.tree import name_and_layers, named, replace, split_layer_index
from ..base import Method
from ..random_projections import sides
from ..targets import (
    Target,
    dropout,
    each_layer,
    group_by_value,
    layer_keys,
    layer_values,
    replace_biases,
    targets,
    uniform_fan_in,
    with_dropout_seeds,
    wrap_weights,
)


class LoRAWeight(Weight):
    """x @ w + (x @ a) @ b: b has the scale in it, and w + a b never exists. A table's projection keeps its own rows."""

    w: Any  # [D, F] frozen
    a: Array  # [D, R]
    b: Array  # [R, F]
    seed: Any = None  # uint32 [2], in training with dropout
    dropout: Any = None  # a number; [L] of stacked layers

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.w + (self.dropped(x) @ self.a) @ self.b

    def dropped(self, x: Array) -> Array:
        return x if self.seed is None else dropout(x, self.seed, self.dropout)

    def __getitem__(self, ids: Array) -> Array:
        return self.w[ids] + self.a[ids] @ self.b

    @property
    def T(self) -> Any:
        return self.w.T


class LoRA(Method):
    """W + (alpha / rank) A B, with A [D, R] uniform in +-D^-1/2 and B [R, F] = 0 (arXiv:2106.09685)."""

    weight: ClassVar[type[LoRAWeight]] = LoRAWeight

    rank: Size = 8  # above min(D, F) of a matrix it costs more and expresses no more
    alpha: Real = 16.0
    where: str = "linear"
    dropout: Decay = 0.0  # of x before A, in training
    ranks: Annotated[tuple[tuple[str, int], ...], Bounds(0, 65_536)] = ()  # rules -> rank, for some matrices or layers
    alphas: Annotated[tuple[tuple[str, float], ...], FINITE] = ()  # rules -> alpha

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        """A and B of every target; layers of one stack are apart where their ranks differ."""

        def one(key: Array, t: Target, rank: int) -> dict[str, Array]:
            D, F = t.shape
            if t.path == "embed/table":  # as torch's Embedding: the update begins at 0 by A
                return {"a": jnp.zeros((D, rank)), "b": jax.random.normal(key, (rank, F))}
            return {"a": uniform_fan_in(key, (D, rank), D), "b": jnp.zeros((rank, F))}

        found = group_by_value(self.ranks, self.rank, targets(self.where, params, 2, "lora"), params, "rank rule")
        return {t.key: each_layer(t, partial(one, t=t, rank=r), layer_keys(key, t, "a")) for t, r in found}

    def scale(self, rank: int, alpha: Any) -> Any:
        return alpha / rank

    def factor(self, params: Any, key: str, arrays: dict[str, Array]) -> Any:
        """What B of one key is multiplied by: a number, or [L, 1, 1] where its layers differ."""
        return self.scale(arrays["b"].shape[-2], layer_values(self.alphas, self.alpha, params, key, "alpha rule"))

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        scaled = {key: t | {"b": self.factor(params, key, t) * t["b"]} for key, t in trainable.items()}
        return wrap_weights(params, scaled, self.weight, m=jnp.nan)

    def bind_train(self, params: Any, trainable: Any, key: Array) -> dict[str, Any]:
        return with_dropout_seeds(self.bind(params, trainable), trainable, key, self.dropout)

    def pad_to_rank(self, largest: Self) -> Method | None:  # zeros of A against zeros of B: neither has a gradient
        if self.ranks or self.alphas or largest != dataclasses.replace(self, rank=largest.rank):
            return None
        return dataclasses.replace(
            largest, alpha=self.alpha * self.scale(self.rank, 1.0) / self.scale(largest.rank, 1.0)
        )


class RsLoRA(LoRA):
    """W + (alpha / sqrt(rank)) A B: the size of the update does not shrink as the rank grows (arXiv:2312.03732)."""

    demo = False

    def scale(self, rank: int, alpha: Any) -> Any:
        return alpha / rank**0.5


class LoRAPlus(LoRA):
    """LoRA whose B learns `ratio` times as fast as its A (arXiv:2402.12354)."""

    demo = False

    ratio: Positive = 16.0

    def update_transform(self, steps: int) -> optax.GradientTransformation:
        def faster(path: Any, update: Any) -> Any:
            return self.ratio * update if path[-1].key == "b" else update

        return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(faster, updates))


class BiasedWeight(LoRAWeight):
    """x @ w + (x @ a) @ b + c, where the base has no bias that c could be added to; then no matrix does the same."""

    c: Any = None  # [F], scaled

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.c is None

    def __rmatmul__(self, x: Array) -> Array:
        y = super().__rmatmul__(x)
        return y if self.c is None else y + self.c


class LoRABias(LoRA):
    """x (W + s A B) + b + s c with s = alpha / rank, B = 0 and c [F] = 0 (HF PEFT's lora_bias; arXiv:2106.09685)."""

    weight: ClassVar[type[LoRAWeight]] = BiasedWeight
    demo = False

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        found = super().init(key, params)
        return {key: t | {"c": jnp.zeros_like(t["b"][..., 0, :])} for key, t in found.items()}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        s, flat = {key: self.factor(params, key, t) for key, t in trainable.items()}, named(params)
        c = {key: {"c": (s[key] * t["c"][..., None, :])[..., 0, :]} for key, t in trainable.items()}
        scaled = {key: {"a": t["a"], "b": s[key] * t["b"]} for key, t in trainable.items()}
        alone = {key: t | c[key] for key, t in scaled.items() if f"{split_layer_index(key)[0]}_bias" not in flat}
        return wrap_weights(replace_biases(params, c, lambda bias, c: bias + c), scaled | alone, self.weight)


class LoRAFA(LoRA):
    """W + (alpha / rank) A B: B = 0 at first and trains, A [D, R] in +-D^-1/2 does not (arXiv:2308.03303)."""

    demo = False
    pad_to_rank = Method.pad_to_rank  # another rank draws another A

    seed: Drawn = None  # of A, which is drawn where it is needed; None: the run's seed, or 0 outside a run

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        return {name: {"b": jnp.zeros_like(t["b"])} for name, t in super().init(key, params).items()}

    def drawn(self, params: Any, trainable: Any) -> dict[str, Any]:
        """The tree of a LoRA, with the A of every target in it."""

        def one(key: str, b: Array) -> Array:
            (path, cut), (name, layers), stacked = split_layer_index(key), name_and_layers(key), b.ndim == 3
            (R, F), (D, _) = b.shape[-2:], sides(params, key)
            t = Target(key, path, name, range(len(b)) if stacked and not cut else layers, stacked, (D, F))
            return each_layer(
                t, lambda k: uniform_fan_in(k, (D, R), D), layer_keys(jax.random.key(self.seed or 0), t, "a")
            )

        return {key: t | {"a": one(key, t["b"])} for key, t in trainable.items()}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return super().bind(params, self.drawn(params, trainable))


class LoRAHeadTable(Weight):
    """The token table for lookups; its transpose, the output projection, has a low-rank update: w.T + a b."""

    linear = False
    projects = True

    w: Any  # [V, D] frozen
    a: Array  # [D, R]
    b: Array  # [R, V], the scale in it
    seed: Any = None  # uint32 [2], in training with dropout
    dropout: Any = None

    def __getitem__(self, ids: Array) -> Array:
        return self.w[ids]

    @property
    def T(self) -> LoRAWeight:
        return LoRAWeight(self.w.T, self.a, self.b, self.seed, self.dropout)


class LoRAHead(Method):
    """logits = x (table.T + (alpha / rank) A B), lookups unchanged: of a tied base (HF PEFT's LoRA of lm_head).

    A [D, R] is uniform in +-D^-1/2 and B [R, V] = 0 at first, as LoRA's (arXiv:2106.09685). Raises InputError for a
    base with a head of its own, whose matrix `lora` adapts.
    """

    demo = False

    rank: Size = 8
    alpha: Real = 16.0
    dropout: Decay = 0.0  # of x before A, in training
    rslora: bool = False  # alpha / rank^1/2 in place of alpha / rank

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        flat = named(params)
        if "head/matrix" in flat:
            raise InputError("lorahead: this base has a head of its own; take --method lora --method.where head/matrix")
        V, D = flat["embed/table"].shape
        return {"head/matrix": {"a": uniform_fan_in(key, (D, self.rank), D), "b": jnp.zeros((self.rank, V))}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        a, b = trainable["head/matrix"]["a"], trainable["head/matrix"]["b"]
        scale = self.alpha / b.shape[0] ** (0.5 if self.rslora else 1)
        return replace(params, {"embed/table": LoRAHeadTable(named(params)["embed/table"], a, scale * b)})

    def bind_train(self, params: Any, trainable: Any, key: Array) -> dict[str, Any]:
        return with_dropout_seeds(self.bind(params, trainable), {"embed/table": None}, key, self.dropout)
