"""Config of the decoder, the presets, and what each parameter starts as."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from .. import InputError
from ..bounds import Checked, Count, Positive, Real
from .rope import Rope

# What a layer keeps for its backward pass, from all to its input alone: everything, its products, its products in the
# hosts' memory, what attention gave, nothing. The rest is computed again.
Remat = Literal["none", "dots", "offload", "attention", "full"]


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """The architecture and its numerics. Letters are the axes of the legend in model/transformer.py."""

    FLAGS: ClassVar[str] = "--model."

    V: Count  # vocabulary
    D: Count  # model width
    L: Count  # layers
    N: Count  # query heads
    K: Count  # key/value heads, a divisor of N
    H: Count  # width of a head, even
    F: Count  # width of the MLP
    context: Count  # longest sequence, in tokens
    rope: Rope | None = dataclasses.field(default_factory=Rope)  # None: heads do not turn
    rope_local: Rope | None = None  # of the layers with a window; None: as the others
    learned_positions: bool = False  # a table [context, D] is added to the embedding
    windows: tuple[int, ...] = ()  # keys a layer sees, itself included, repeated over the layers; 0: all before it
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_at: Literal["pre", "post", "both"] = "pre"  # of a sublayer: x + f(norm(x)), x + norm(f(x)), or both
    norm_offset: Real = 0.0  # a norm multiplies by offset + scale
    qk_norm: Literal["none", "head", "full"] = "none"  # queries and keys are normed a head, or all heads at once
    query_scale: float = 0.0  # what scores are multiplied by; 0: H^-1/2
    attn_cap: float = 0.0  # scores become cap tanh(score / cap); 0: off
    logit_cap: float = 0.0  # logits likewise
    embed_scale: Positive = 1.0  # what embeddings are multiplied by
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True  # act(x @ gate) * (x @ up); plain MLP: act(x @ up)
    tied: bool = True  # logits = x @ table.T
    fused_qkv: bool = False  # one matrix makes queries, keys and values: an adapter of it has one input side
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    family: str = ""  # of Hugging Face models (model/hf_config.py); empty: the first that fits, when exported
    param_dtype: str = "float32"  # what is stored and trained
    dtype: str = "float32"  # what is multiplied
    logits_dtype: str = "float32"
    scan: bool = True  # stack the layers: compiles in constant time; unrolled runs faster on a CPU
    remat: Remat = "none"  # what the backward pass computes again
    attention: Literal["auto", "reference", "xla", "cudnn"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.N % self.K:
            raise InputError(f"config: N = {self.N} query heads do not divide into K = {self.K} key/value heads")
        for rope in (self.rope, self.rope_local):
            if rope:
                rope.check(self.H)

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """The window of each layer."""
        return tuple(self.windows[i % len(self.windows)] if self.windows else 0 for i in range(self.L))


def init_parameter(config: Config, name: str, key: Any, shape: tuple[int, ...]) -> jax.Array:
    """What the parameter `name` of one layer starts as: norms 1, biases 0, matrices normal with std fan_in^-1/2.

    Projections into the residual stream are scaled by (2L)^-1/2 besides (GPT-2); tables have std 0.02.
    """
    dtype = jnp.dtype(config.param_dtype)
    if name.endswith("norm/scale"):
        return jnp.full(shape, 1 - config.norm_offset, dtype)
    if name.endswith("bias"):
        return jnp.zeros(shape, dtype)
    std = 0.02 if name.startswith("embed/") else shape[0] ** -0.5
    if name.endswith(("attn/o", "mlp/down")):
        std *= (2 * config.L) ** -0.5
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
