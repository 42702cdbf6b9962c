"""Configuration of the decoder: its architecture, its numerics and its layout."""

import dataclasses
from typing import ClassVar, Literal

from .. import InputError
from ..bounds import Checked, Count, Positive, Real
from .rope import Rope

# What is saved for the backward pass; everything else is recomputed. none: all. dots: results of matrix products.
# offload: results of matrix products, in host memory. attention: attention outputs. full: only the layer's input.
Remat = Literal["none", "dots", "offload", "attention", "full"]


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """Architecture and numerics of the decoder. The one-letter sizes are the axes of model/transformer.py."""

    FLAGS: ClassVar[str] = "--model."

    V: Count  # vocabulary
    D: Count  # model width
    L: Count  # layers
    N: Count  # query heads
    K: Count  # key/value heads, a divisor of N
    H: Count  # head width, even
    F: Count  # MLP width
    context: Count  # longest sequence, in tokens
    rope: Rope | None = dataclasses.field(default_factory=Rope)  # rotary positions; None: no rotation
    rope_local: Rope | None = None  # rotary positions of the layers with a window; None: the same as `rope`
    learned_positions: bool = False  # a table [context, D] is added to the embeddings
    windows: tuple[int, ...] = ()  # attention window in tokens, the query included; repeats over the layers; 0: none
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_at: Literal["pre", "post", "both"] = "pre"  # pre: x + f(norm(x)); post: x + norm(f(x)); both
    norm_offset: Real = 0.0  # a norm multiplies by offset + scale
    qk_norm: Literal["none", "head", "full"] = "none"  # norm queries and keys, each head or all heads together
    query_scale: float = 0.0  # factor of the attention scores; 0: H^-1/2
    attn_cap: float = 0.0  # soft cap of attention scores, cap tanh(score / cap); 0: off
    logit_cap: float = 0.0  # soft cap of the logits; 0: off
    embed_scale: Positive = 1.0  # factor of the embeddings
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True  # MLP act(x @ gate) * (x @ up); otherwise act(x @ up)
    tied: bool = True  # tied embeddings: logits = x @ table.T
    fused_qkv: bool = False  # one matrix for queries, keys and values, which an adapter then treats as one
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    family: str = ""  # Hugging Face family (model/hf/families.py); empty: the first one that fits, on export
    param_dtype: str = "float32"  # parameters
    dtype: str = "float32"  # computation
    logits_dtype: str = "float32"
    scan: bool = True  # stack the layers, for constant compile time; unrolled layers run faster on a CPU
    remat: Remat = "none"  # what the backward pass recomputes
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
        """The attention window of each layer; 0: none."""
        return tuple(self.windows[i % len(self.windows)] if self.windows else 0 for i in range(self.L))
