"""LoRA, low-rank updates of matrices and tables (arXiv:2106.09685). Its direct variants are in lora_variants."""

import dataclasses
from typing import Annotated, Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import FINITE, Bounds, Decay, Real, Size
from ...model import Weight
from ..base import Method
from ..hf_spec import BOOL_OR_NAME, IDENTITY, TRANSPOSED, HFSpec, Key, ValueKind, is_ids
from ..targets import (
    Target,
    dropout,
    init_targets,
    rule_values,
    targets_by_rule,
    uniform_fan_in,
    with_dropout_seeds,
    wrap_weights,
)


class LoRAWeight(Weight):
    """x @ w + (x @ a) @ b, with the scale in b; w + a b is never formed. A table's transpose stays the base's."""

    w: Any  # [D, F] frozen
    a: Array  # [D, R]
    b: Array  # [R, F]
    seed: Any = None  # uint32 [2], in training with dropout
    dropout: Any = None  # a number; [L] of stacked layers

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.w + (self.dropped(x) @ self.a) @ self.b

    def dropped(self, x: Array) -> Array:
        """Return x with dropout, in training."""
        return x if self.seed is None else dropout(x, self.seed, self.dropout)

    def __getitem__(self, ids: Array) -> Array:
        return self.w[ids] + self.a[ids] @ self.b

    @property
    def T(self) -> Any:
        return self.w.T


LORA_NEUTRAL = ("lora_dropout", "megatron_core", "qalora_group_size", "eva_config", "loftq_config", "corda_config",
                "lora_ga_config", "ephemeral_gpu_offload")  # fmt: skip


def _known_start(start: bool | str) -> bool | str:
    """Return init_lora_weights; of two values HF PEFT takes any case. Raises InputError for one that is not known."""
    start = start.lower() if str(start).lower() in ("olora", "gaussian") else start  # type: ignore[union-attr]
    if not isinstance(start, bool) and start not in ("gaussian", "orthogonal", "eva", "mica", "pissa", "olora"):
        raise InputError(f"init_lora_weights {start!r} changes the base in a way that the file does not hold; save it "
                         "with path_initial_model_for_weight_conversion, which makes it a plain LoRA")  # fmt: skip
    return start


def _is_tokens(x: Any) -> bool:
    return is_ids(x) or (isinstance(x, dict) and all(map(is_ids, x.values())))


_START = BOOL_OR_NAME._replace(normalize=_known_start)
_TOKENS = ValueKind("a list of ids, or an object with one", _is_tokens)


class LoRA(Method):
    """W + (alpha / rank) A B, with A [D, R] uniform in +-D^-1/2 and B [R, F] = 0 (arXiv:2106.09685).

    A table [V, D] is adapted in its lookup only, with A [V, R] = 0 and B [R, D] ~ N(0, 1), as torch initialises an
    Embedding. HF PEFT: LORA.
    """

    weight: ClassVar[type[LoRAWeight]] = LoRAWeight
    axes: ClassVar = {"a": "DR", "b": "RF"}

    rank: Size = 8  # above min(D, F) of a matrix it costs more and expresses no more
    alpha: Real = 16.0
    where: str = "linear"
    dropout: Decay = 0.0  # of x before A, in training
    ranks: Annotated[tuple[tuple[str, int], ...], Bounds(0, 65_536)] = ()  # rules -> rank, for some matrices or layers
    alphas: Annotated[tuple[tuple[str, float], ...], FINITE] = ()  # rules -> alpha

    hf = HFSpec(
        "LORA",
        keys={
            "r": Key(8, "rank", exceptions="rank_pattern", rules="ranks"),
            "lora_alpha": Key(8.0, "alpha", exceptions="alpha_pattern", rules="alphas"),
            "lora_dropout": Key(0.0, "dropout"),
            "init_lora_weights": Key(True, kind=_START),
            "trainable_token_indices": Key(None, kind=_TOKENS),
            **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), False),
        },
        neutral=LORA_NEUTRAL,
        tensors=TRANSPOSED.tensors(a="lora_A.weight", b="lora_B.weight")
        | IDENTITY.tensors(c="lora_B.bias", m="lora_magnitude_vector"),
        table_tensors=TRANSPOSED.tensors(a="lora_embedding_A", b="lora_embedding_B")
        | IDENTITY.tensors(m="lora_magnitude_vector"),
        other_flags=("use_rslora",),
        kinds=("matrix", "table"),
        own_bias="lora_only",
        read=lambda c, x, *_: {"alpha": x["alpha"] * x["rank"] ** 0.5} if c["use_rslora"] else {},
    )

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        """Return A and B of every target; the layers of one stack are apart where their ranks differ."""

        def factors(key: Array, target: Target, rank: int) -> dict[str, Array]:
            D, F = target.shape
            if target.path == "embed/table":
                return {"a": jnp.zeros((D, rank)), "b": jax.random.normal(key, (rank, F))}
            return {"a": uniform_fan_in(key, (D, rank), D), "b": jnp.zeros((rank, F))}

        picked = targets_by_rule(self.where, params, self.name, self.ranks, self.rank, "rank rule")
        return init_targets(key, picked, factors, "a")

    def scale(self, rank: int, alpha: Any) -> Any:
        """Return the factor of A B."""
        return alpha / rank

    def factor(self, params: Any, key: str, arrays: dict[str, Array]) -> Any:
        """Return the factor of B of one key: a number, or [L, 1, 1] if its layers differ."""
        return self.scale(arrays["b"].shape[-2], rule_values(self.alphas, self.alpha, params, key, "alpha rule"))

    def scaled(self, params: Any, trainable: Any) -> dict[str, Any]:
        """Return the trainable tree with each B multiplied by its factor."""
        return {
            key: arrays | {"b": self.factor(params, key, arrays) * arrays["b"]} for key, arrays in trainable.items()
        }

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap_weights(params, self.scaled(params, trainable), self.weight, m=jnp.nan)  # NaN: DoRA's mark

    def bind_train(self, params: Any, trainable: Any, key: Array) -> dict[str, Any]:
        return with_dropout_seeds(self.bind(params, trainable), trainable, key, self.dropout)

    def pad_to_rank(self, largest: Self) -> Method | None:  # zeros of A meet zeros of B: neither has a gradient
        if self.ranks or self.alphas or largest != dataclasses.replace(self, rank=largest.rank):
            return None
        ratio = self.scale(self.rank, 1.0) / self.scale(largest.rank, 1.0)
        return dataclasses.replace(largest, alpha=self.alpha * ratio)
