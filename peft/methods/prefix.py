"""Trained keys and values in every layer: prefix tuning (arXiv:2101.00190) and LLaMA-Adapter (arXiv:2303.16199)."""

from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ... import InputError
from ...bounds import Bounds, Count, Size
from ...model import Context, Weight, static
from ...model.tree import named, nested
from ..base import Method
from ..hf_spec import IDENTITY, NAMES, PREFIX, PROMPT_NEUTRAL, ROW, HFSpec, HFTensor, Key
from ..targets import Target, init_matrices, init_targets, iter_full_arrays, targets
from .encoder import encode, init_encoder


def past_targets(params: Any) -> list[Target]:
    """Return where keys and values are computed: their matrices, or their columns [D, K H] of a fused qkv matrix."""
    flat, result = named(params), []
    for target in targets("layers/attn/([kv]|qkv)", params, ndim=2):
        if not target.path.endswith("qkv"):
            result.append(target)
            continue
        queries = flat[target.path.replace("qkv", "o")].shape[-2]
        shape = (target.shape[0], max(target.shape[1] - queries, 0) // 2)
        for name in "kv":
            key, path, base_name = (text.replace("qkv", name) for text in target[:3])
            result.append(target._replace(key=key, path=path, name=base_name, shape=shape))
    return result


_PAST = "prompt_embeddings"  # of a file: the past [P, L 2 K H] of all layers


def _split_past(tensors: dict[str, Any], trainable: Any) -> dict[str, Any]:
    """Return the tensors with the keys and values [P, K H] of each layer in place of the joint past."""
    if _PAST not in tensors:
        return tensors
    joint, leaves = tensors[_PAST], jax.tree.leaves(trainable)
    P, width = leaves[0].shape[-2:]
    wanted = (P, sum(x.size for x in leaves) // P)
    if joint.shape != wanted:
        raise InputError(f"{_PAST} {list(joint.shape)}, wanted {list(wanted)}; is it of another base?")
    past = joint.reshape(P, -1, 2, width)
    rest = {name: x for name, x in tensors.items() if name != _PAST}
    return rest | {f"{_PAST}.{i}.{kv}": past[:, i, j] for i in range(past.shape[1]) for j, kv in enumerate("kv")}


def _join_past(tensors: dict[str, Any]) -> dict[str, Any]:
    layers = range(len(tensors) // 2)
    return {_PAST: np.concatenate([tensors[f"{_PAST}.{i}.{kv}"] for i in layers for kv in "kv"], axis=1)}


def _sizes(model: Any) -> dict[str, Any]:
    config = model.config
    return model.prompt_sizes | {"num_attention_heads": config.K, "token_dim": config.K * config.H}


class Prefix(Method):
    """attention over [past_k; k], [past_v; v], with P = tokens learned positions a layer (arXiv:2101.00190).

    past_k and past_v [P, K H] ~ N(0, std^2). No weight decay: keys and values are states, and a key of 0 still takes
    part in the softmax, with exp(0). HF PEFT: PREFIX_TUNING.
    """

    identity = False
    lr_multiplier = 100.0
    decay_rule = ""
    axes: ClassVar = {"": "PF"}

    tokens: Size = 20
    std: float = 0.02

    hf = HFSpec(
        "PREFIX_TUNING",
        keys={"num_virtual_tokens": Key(20, "tokens"), "prefix_projection": False, "encoder_hidden_size": 0},
        neutral=PROMPT_NEUTRAL,
        kinds=(),
        locate=lambda path, layer, _: [("", HFTensor(f"{_PAST}.{layer}.{path[-1]}", IDENTITY))],
        split=_split_past,
        join=_join_past,
        write_modules=lambda method, _, model: _sizes(model) | {"encoder_hidden_size": None},
    )

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def states(key: Array, target: Target, _: None) -> Array:
            return self.std * jax.random.normal(key, (self.tokens, target.shape[1]))

        return init_targets(key, ((target, None) for target in past_targets(params)), states)

    def context(self, trainable: Any) -> Context:
        return Context(past=nested(trainable))


def _with_past(method: Any, trainable: Any, _: Any) -> tuple[Prefix, Any]:
    """Return a Prefix of the keys and values that the mlp computes."""
    past = method.context(trainable).past["layers"]["attn"]
    return Prefix(method.tokens), {f"layers/attn/{name}": past[name] for name in "kv"}


class PrefixMLP(Method):
    """attention over [past_k; k], [past_v; v], past = tanh(prompt W1 + b1) W2 + b2 of all layers (arXiv:2101.00190).

    prompt [P, K H] ~ N(0, 1), W1 [K H, h], W2 [h, L 2 K H]. Weight decay applies to W1 and W2, not to the prompt, which
    is a state. HF PEFT: PREFIX_TUNING with prefix_projection.
    """

    identity = False
    lr_multiplier = 10.0
    decay_rule = r".*/w\d"
    demo = False
    axes: ClassVar = {"prompt": "PF", "w1": "FF", "w2": "FA"}  # for hidden = K H; another h is not split
    axes_of: ClassVar = {"prefix/mlp": "layers/attn/k"}

    tokens: Size = 20
    hidden: Annotated[int, Bounds(0, 65_536)] = 0  # 0: the width of the keys, K H

    hf = Prefix.hf.variant(
        flags={"prefix_projection": True},
        read=lambda c, *_: {"hidden": c["encoder_hidden_size"]},
        write_modules=lambda m, _, model: (
            _sizes(model) | {"encoder_hidden_size": m.hidden or model.config.K * model.config.H}
        ),
        stored_config=lambda c, _: c | {"prefix_projection": False},
        to_exportable=_with_past,
    )

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        layers = past_targets(params)
        width, depth = layers[0].shape[1], max(target.layers.stop for target in layers if target.layers)
        return {"prefix/mlp": init_encoder(key, self.tokens, width, self.hidden or width, depth * 2 * width)}

    def context(self, trainable: Any) -> Context:
        arrays = trainable["prefix/mlp"]
        P, width = arrays["prompt"].shape
        k, v = encode(arrays, jnp.tanh).reshape(P, -1, 2, width).transpose(2, 1, 0, 3)  # [L, P, K*H] each
        return Context(past={"layers": {"attn": {"k": k, "v": v}}})


class GatedPrompt(Weight):
    """States that a layer's queries attend to apart from the text; added before the output projection, or after it."""

    linear = False

    prompt: Array  # [P, D]
    gate: Array  # [1]
    after_output_proj: bool = static(default=False)  # after the output projection


def _read_adapter(c: Any, values: Any, module: Any, model: Any) -> dict[str, bool]:
    after_output_proj = model.family == "gpt2"
    if model.config.o_bias and not after_output_proj:
        raise InputError("the output of attention has a bias in this base, which HF PEFT adds a second time after an "
                         "adaption prompt; that is not here")  # fmt: skip
    return {"after_output_proj": after_output_proj}


class LLaMAAdapter(Method):
    """o(attn(x) + gate softmax(q k(prompt)^T) v(prompt)), prompt N(0, 1), gate 0 at init (arXiv:2303.16199).

    prompt [P, D], gate [1]. No weight decay: the prompt holds states, and the gate scales what they add. HF PEFT:
    ADAPTION_PROMPT.
    """

    lr_multiplier = 100.0
    decay_rule = ""
    demo = False
    axes: ClassVar = {"prompt": "PF", "gate": "1"}

    tokens: Size = 10
    layers: Count = 30  # the topmost ones, all if there are fewer
    after_output_proj: bool = False  # added after o, as HF PEFT does in GPT-2

    hf = HFSpec(
        "ADAPTION_PROMPT",
        keys={"target_modules": Key(None, kind=NAMES), "adapter_len": Key(10, "tokens"),
              "adapter_layers": Key(30, "layers")},
        tensors=ROW.tensors(prompt="adaption_prompt") | IDENTITY.tensors(gate="adaption_gate"),
        kinds=(),
        owner=lambda module: f"{PREFIX}{module.rpartition('.')[0]}.",
        read=_read_adapter,
        write_modules=lambda method, _, model: {
            "target_modules": "attn" if model.family == "gpt2" else "self_attn",
            "adapter_layers": min(method.layers, model.config.L),
        },
    )  # fmt: skip

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        width, D = target.shape
        if self.after_output_proj and width != D:
            raise InputError(
                f"llamaadapter: after_output_proj=True wants heads of {D} together, this base's have {width}"
            )
        return {"prompt": jax.random.normal(key, (self.tokens, D)), "gate": jnp.zeros(1)}

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        where = f"layers/[-{self.layers}:]/attn/o"
        return init_matrices(key, params, where, self.arrays, self.name, "prompt")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        flat = named(params)
        new = {path[:-1] + "prompt": GatedPrompt(**arrays, after_output_proj=self.after_output_proj)
               for path, _, arrays in iter_full_arrays(params, trainable)}  # fmt: skip
        if taken := next((path for path in new if path in flat), ""):
            raise InputError(f"chain: {taken} has a prompt of an earlier method; keep one of them")
        return nested(flat | new)
