"""Variants of LoRA: another scale or learning rate, a bias, a frozen A, and LoRA of a tied output projection."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ... import InputError
from ...bounds import Decay, Drawn, Positive, Real, Size
from ...model import Weight
from ...model.tree import named, replace, split_layer_index
from ..base import Method
from ..hf_spec import no_fields
from ..random_projections import draw_layers
from ..targets import replace_biases, uniform_fan_in, with_dropout_seeds, wrap_weights
from .lora import LoRA, LoRAWeight


class RsLoRA(LoRA):
    """W + (alpha / sqrt(rank)) A B: the size of the update does not shrink as the rank grows (arXiv:2312.03732).

    Shapes and init as LoRA. HF PEFT: LORA with use_rslora.
    """

    demo = False

    hf = LoRA.hf.variant(flags={"use_rslora": True}, read=no_fields)

    def scale(self, rank: int, alpha: Any) -> Any:
        return alpha / rank**0.5


class LoRAPlus(LoRA):
    """LoRA whose B has `ratio` times the learning rate of its A (arXiv:2402.12354).

    HF PEFT: LORA; the ratio is not part of its config.
    """

    demo = False

    ratio: Positive = 16.0

    hf = LoRA.hf

    def update_transform(self, steps: int) -> optax.GradientTransformation:
        def faster(path: Any, update: Any) -> Any:
            return self.ratio * update if path[-1].key == "b" else update

        return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(faster, updates))


class BiasedWeight(LoRAWeight):
    """x @ w + (x @ a) @ b + c. `c` is given only if the base has no bias to add it to; no matrix does the same."""

    c: Any = None  # [F], scaled

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.c is None

    def __rmatmul__(self, x: Array) -> Array:
        y = super().__rmatmul__(x)
        return y if self.c is None else y + self.c


class LoRABias(LoRA):
    """x (W + s A B) + b + s c with s = alpha / rank, B = 0 and c [F] = 0 (HF PEFT's lora_bias; arXiv:2106.09685).

    A as in LoRA. HF PEFT: LORA with lora_bias.
    """

    weight: ClassVar[type[LoRAWeight]] = BiasedWeight
    demo = False

    hf = LoRA.hf.variant(flags={"lora_bias": True})

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        return {
            k: arrays | {"c": jnp.zeros_like(arrays["b"][..., 0, :])} for k, arrays in super().init(key, params).items()
        }

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        scaled, biases, flat = self.scaled(params, trainable), {}, named(params)
        for key, arrays in scaled.items():
            c = self.factor(params, key, arrays) * arrays.pop("c")[..., None, :]
            biases[key] = {"c": c[..., 0, :]}
            if f"{split_layer_index(key)[0]}_bias" not in flat:
                arrays |= biases[key]
        return wrap_weights(replace_biases(params, biases, lambda bias, c: bias + c), scaled, self.weight)


def _with_drawn(method: Any, trainable: Any, shapes: Any) -> tuple[LoRA, Any]:
    """Return a LoRA with the A of LoRA-FA in its tree."""
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(LoRA)}  # type: ignore[arg-type]
    return LoRA(**fields), method.drawn(shapes, trainable)


class LoRAFA(LoRA):
    """W + (alpha / rank) A B: B = 0 at first and trains, A [D, R] in +-D^-1/2 does not (arXiv:2308.03303).

    A is drawn from the seed in every `bind`, and not stored. HF PEFT: LORA, exported with its A.
    """

    demo = False
    pad_to_rank = Method.pad_to_rank  # another rank draws another A

    seed: Drawn = None  # of A; None: the run's seed, or 0 outside a run

    hf = LoRA.hf.variant(to_exportable=_with_drawn)

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        return {k: {"b": jnp.zeros_like(arrays["b"])} for k, arrays in super().init(key, params).items()}

    def drawn(self, params: Any, trainable: Any) -> dict[str, Any]:
        """Return the trainable tree of a LoRA, with the A of every target."""
        seed, tree = jax.random.key(self.seed or 0), {}
        for key, arrays in trainable.items():
            b, R = arrays["b"], arrays["b"].shape[-2]
            a = draw_layers(seed, params, key, b, "a", lambda k, D, F, R=R: uniform_fan_in(k, (D, R), D))
            tree[key] = arrays | {"a": a}
        return tree

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

    A [D, R] is uniform in +-D^-1/2 and B [R, V] = 0, as in LoRA (arXiv:2106.09685). `init` raises InputError for a base
    with a head of its own, whose matrix `lora` adapts. HF PEFT: LORA with target module lm_head.
    """

    demo = False
    axes: ClassVar = {"a": "FR", "b": "RD"}
    axes_of: ClassVar = {"head/matrix": "embed/table"}

    rank: Size = 8
    alpha: Real = 16.0
    dropout: Decay = 0.0  # of x before A, in training
    rslora: bool = False  # alpha / rank^1/2 in place of alpha / rank

    hf = LoRA.hf.variant(
        table_tensors={},
        kinds=("tied head",),
        read=lambda c, *_: {"rslora": c["use_rslora"]},
        write=lambda m: {"use_rslora": m.rslora},
        where=no_fields,
    )

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
