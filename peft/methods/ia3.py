"""(IA)3: trained scales of keys, values and the MLP's inner activations (arXiv:2205.05638)."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from ...model import Weight
from ...model.pattern import compile_pattern
from ..base import Method
from ..hf_spec import COLUMN, NAMES, ROW, HFSpec, Key
from ..targets import init_matrices, replace_biases, wrap_weights


class ScaledWeight(Weight):
    """(x * before) @ w * after; one of the two is given."""

    w: Any  # [D, F] frozen
    before: Any = None  # [D]
    after: Any = None  # [F]

    def __rmatmul__(self, x: Array) -> Array:
        y = (x if self.before is None else x * self.before) @ self.w
        return y if self.after is None else y * self.after


def _where(c: Any, modules: Any, model: Any) -> dict[str, str]:
    """Return the matrices whose outputs are scaled, and those whose inputs are: HF PEFT's feed-forward modules."""
    names = c["feedforward_modules"]
    if names is None:
        names = ["mlp.c_proj"] if model.family == "gpt2" else ["down_proj"]
    if isinstance(names, str):
        inner = [m for m in modules if compile_pattern(names).fullmatch(m.name)]
    else:
        inner = [m for m in modules if m.name.endswith(tuple(names))]
    outer = [m for m in modules if m not in inner]
    return {field: model.where((m.path, m.layer) for m in part) for field, part in (("where", outer), ("inner", inner))}


def _feedforward(method: Any, arrays: Any, model: Any) -> dict[str, list[str]]:
    inner = model.short_names(m for m, t in arrays.items() if "before" in t)
    outer = model.short_names(m for m, t in arrays.items() if "before" not in t)
    return {"target_modules": sorted({*inner, *outer}), "feedforward_modules": inner}


class IA3(Method):
    """l * (x W_k + b), l * (x W_v + b), and (l * h) W_down + b, with l = 1 at first (arXiv:2205.05638).

    l [F] after a matrix, or [D] before it. HF PEFT: IA3.
    """

    demo = False
    lr_multiplier = 50.0
    axes: ClassVar = {"after": "F", "before": "D"}

    where: str = "layers/attn/[kv]"  # matrices whose output is scaled
    inner: str = "layers/mlp/down"  # matrices whose input is scaled

    hf = HFSpec(
        "IA3",
        keys={"feedforward_modules": Key(None, kind=NAMES), "init_ia3_weights": True},
        tensors=COLUMN.tensors(after="ia3_l") | ROW.tensors(before="ia3_l"),
        default_targets={
            **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
            **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("q_proj", "v_proj", "down_proj")),
            "gpt2": ("c_attn", "mlp.c_proj"),
        },
        own_bias="",
        where=_where,
        write_modules=_feedforward,
    )

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        trainable = {}
        if self.where:
            trainable |= init_matrices(key, params, self.where, lambda key, t: {"after": jnp.ones(t.shape[1])}, "ia3")
        if self.inner:
            trainable |= init_matrices(key, params, self.inner, lambda key, t: {"before": jnp.ones(t.shape[0])}, "ia3")
        return trainable

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        def scaled(bias: Array, before: Any = None, after: Any = None) -> Array:
            return bias if after is None else bias * after

        bound = wrap_weights(params, trainable, ScaledWeight, before=1.0, after=1.0)
        return replace_biases(bound, trainable, scaled, after=1.0)
