"""Configurations by name: small ones to train from scratch, and published models at their sizes."""

from typing import Any

from .config import Config
from .rope import Rope


def _published(**fields: Any) -> Config:
    """The config of a published model: bfloat16 parameters and computation, layers recomputed in the backward pass."""
    return Config(**fields, remat="full", param_dtype="bfloat16", dtype="bfloat16")


_LLAMA3: Any = {"V": 128256, "context": 131072, "family": "llama"}
_GEMMA: Any = {"norm_eps": 1e-6, "norm_offset": 1.0, "activation": "gelu_tanh"}
_GEMMA2: Any = {**_GEMMA, "norm_at": "both", "query_scale": 256**-0.5}
_GPT2: Any = {"V": 50257, "H": 64, "context": 1024, "rope": None, "learned_positions": True, "norm": "layer",
              "activation": "gelu_tanh", "gated": False, "fused_qkv": True, "qkv_bias": True, "o_bias": True,
              "mlp_bias": True, "family": "gpt2"}  # fmt: skip

presets: dict[str, Config] = {
    "tiny": Config(V=512, D=64, L=2, N=4, K=2, H=16, F=176, context=128),
    "demo": Config(V=2048, D=128, L=4, N=4, K=2, H=32, F=344, context=256, scan=False),
    "5m": Config(V=4096, D=256, L=5, N=8, K=8, H=32, F=688, context=256, scan=False),
    "s": Config(V=8192, D=256, L=4, N=8, K=8, H=32, F=688, context=256, scan=False),
    "m": Config(V=32000, D=768, L=12, N=12, K=12, H=64, F=2048, context=256, scan=False),
    "llama-2-7b": _published(V=32000, D=4096, L=32, N=32, K=32, H=128, F=11008, context=4096, tied=False,
                             family="llama"),
    "llama-3.1-8b": _published(**_LLAMA3, D=4096, L=32, N=32, K=8, H=128, F=14336, tied=False,
                               rope=Rope(5e5, kind="llama3", factor=8, original=8192)),
    "llama-3.1-70b": _published(**_LLAMA3, D=8192, L=80, N=64, K=8, H=128, F=28672, tied=False,
                                rope=Rope(5e5, kind="llama3", factor=8, original=8192)),
    "llama-3.2-1b": _published(**_LLAMA3, D=2048, L=16, N=32, K=8, H=64, F=8192,
                               rope=Rope(5e5, kind="llama3", factor=32, original=8192)),
    "llama-3.2-3b": _published(**_LLAMA3, D=3072, L=28, N=24, K=8, H=128, F=8192,
                               rope=Rope(5e5, kind="llama3", factor=32, original=8192)),
    "mistral-7b": _published(V=32000, D=4096, L=32, N=32, K=8, H=128, F=14336, context=32768, windows=(4096,),
                             tied=False, family="mistral"),
    "qwen2.5-0.5b": _published(V=151936, D=896, L=24, N=14, K=2, H=64, F=4864, context=32768, qkv_bias=True,
                               rope=Rope(1e6), norm_eps=1e-6, family="qwen2"),
    "qwen2.5-7b": _published(V=152064, D=3584, L=28, N=28, K=4, H=128, F=18944, context=131072, qkv_bias=True,
                             rope=Rope(1e6), norm_eps=1e-6, tied=False, family="qwen2"),
    "qwen3-0.6b": _published(V=151936, D=1024, L=28, N=16, K=8, H=128, F=3072, context=40960, qk_norm="head",
                             rope=Rope(1e6), norm_eps=1e-6, family="qwen3"),
    "qwen3-8b": _published(V=151936, D=4096, L=36, N=32, K=8, H=128, F=12288, context=40960, qk_norm="head",
                           rope=Rope(1e6), norm_eps=1e-6, tied=False, family="qwen3"),
    "gemma-2b": _published(**_GEMMA, V=256000, D=2048, L=18, N=8, K=1, H=256, F=16384, context=8192,
                           embed_scale=2048**0.5, family="gemma"),
    "gemma-2-2b": _published(**_GEMMA2, V=256000, D=2304, L=26, N=8, K=4, H=256, F=9216, context=8192,
                             windows=(4096, 0), attn_cap=50.0, logit_cap=30.0, embed_scale=2304**0.5, family="gemma2"),
    "gemma-3-1b": _published(**_GEMMA2, V=262144, D=1152, L=26, N=4, K=1, H=256, F=6912, context=32768,
                             rope=Rope(1e6), rope_local=Rope(), windows=(512, 512, 512, 512, 512, 0), qk_norm="head",
                             embed_scale=1152**0.5, family="gemma3_text"),
    "gpt2": Config(**_GPT2, D=768, L=12, N=12, K=12, F=3072),
    "gpt2-medium": Config(**_GPT2, D=1024, L=24, N=16, K=16, F=4096),
    "gpt2-large": Config(**_GPT2, D=1280, L=36, N=20, K=20, F=5120),
    "phi-3-mini": _published(V=32064, D=3072, L=32, N=32, K=32, H=96, F=8192, context=4096, windows=(2047,),
                             tied=False, family="phi3"),
    "olmo-2-1b": _published(V=100352, D=2048, L=16, N=16, K=16, H=128, F=8192, context=4096, rope=Rope(5e5),
                            norm_at="post", norm_eps=1e-6, qk_norm="full", tied=False, family="olmo2"),
    "smollm2-135m": _published(V=49152, D=576, L=30, N=9, K=3, H=64, F=1536, context=8192, rope=Rope(1e5),
                               family="llama"),
    "stablelm-2-1.6b": _published(V=100352, D=2048, L=24, N=32, K=32, H=64, F=5632, context=4096, norm="layer",
                                  rope=Rope(width=16), qkv_bias=True, tied=False, family="stablelm"),
}  # fmt: skip
