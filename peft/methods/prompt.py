"""Prompt tuning, trained token embeddings before the text (arXiv:2104.08691), and P-tuning (arXiv:2103.10385)."""

from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Bounds, Size
from ...model import Context, Weight
from ...model.tree import named, replace
from ..base import Method
from ..hf_spec import IDENTITY, PROMPT_NEUTRAL, HFSpec, Key, ValueKind
from .encoder import encode, init_encoder


class PromptTable(Weight):
    """The token table with P more rows: ids V..V+P-1 are the prompt. The output projection keeps its V columns."""

    linear = False

    w: Any  # [V, D] frozen
    prompt: Array  # [P, D]

    def __getitem__(self, ids: Array) -> Array:
        V = jax.tree.leaves(self.w)[0].shape[0]  # of a weight too
        rows = self.prompt[jnp.maximum(ids - V, 0)]
        return jnp.where((ids < V)[..., None], self.w[jnp.minimum(ids, V - 1)], rows)

    @property
    def T(self) -> Any:
        return self.w.T


class Prompt(Method):
    """[prompt; embed(ids)] with P = tokens rows that start as rows of the vocabulary (arXiv:2104.08691).

    prompt [P, D]. No weight decay: a row is a hidden state, and a norm follows, so that 0 is no simpler a prompt (the
    paper has 1e-5). HF PEFT: PROMPT_TUNING.
    """

    identity = False
    lr_multiplier = 100.0
    decay_rule = ""
    axes: ClassVar = {"prompt": "PF"}

    tokens: Size = 20
    init_from: Literal["vocab", "random", "ids"] = "vocab"  # drawn rows of the table, N(0, 1), or those of `ids`
    ids: tuple[int, ...] = ()  # the first rows, repeated or cut to `tokens`
    text: str = ""  # a run's tokenizer turns it into `ids`

    hf = HFSpec(
        "PROMPT_TUNING",
        keys={"num_virtual_tokens": Key(20, "tokens"), "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None},
        neutral=(*PROMPT_NEUTRAL, "tokenizer_name_or_path", "tokenizer_kwargs"),
        table_tensors=IDENTITY._replace(embed_scaled=True).tensors(prompt="prompt_embeddings"),
        kinds=(),
        owner=lambda module: "",
        read=lambda c, *_: {"init_from": "vocab" if c["prompt_tuning_init"] == "SAMPLE_VOCAB" else "random"},
        write_modules=lambda method, _, model: model.prompt_sizes,
    )

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        V, D = table.shape
        if self.init_from == "ids" or self.ids or self.text:
            ids = check_ids("prompt", self.ids, V)
            picked = jnp.array([ids[i % len(ids)] for i in range(self.tokens)])
        elif self.init_from == "random":
            return {"embed/table": {"prompt": jax.random.normal(key, (self.tokens, D))}}
        else:
            picked = jax.random.choice(key, V, (self.tokens,), replace=False)
        return {"embed/table": {"prompt": jnp.array(table)[picked].astype(jnp.float32)}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return replace(params, {"embed/table": PromptTable(named(params)["embed/table"], **trainable["embed/table"])})

    def context(self, trainable: Any) -> Context:
        return Context(tokens=self.tokens)


def check_ids(owner: str, ids: tuple[int, ...], V: int) -> tuple[int, ...]:
    """Return the ids. Raises InputError if there are none, or if one is no row of embed/table."""
    if not ids:
        raise InputError(f"{owner}: no ids; give ids= (a run makes those of a text by its tokenizer)")
    if wrong := [i for i in ids if not 0 <= i < V]:
        raise InputError(f"{owner}: id {wrong[0]} is no row of embed/table; wanted ids from 0 to {V - 1}")
    return ids


_MLP = ValueKind("MLP, as the LSTM encoder is not here,", lambda x: x == "MLP")


def _with_rows(method: Any, trainable: Any, _: Any) -> tuple[Prompt, Any]:
    """Return a Prompt of the rows that the mlp computes."""
    return Prompt(method.tokens), {"embed/table": {"prompt": encode(trainable["embed/table"], jax.nn.relu)}}


class PTuning(Method):
    """[mlp(prompt); embed(ids)], prompt N(0, 1), mlp D -> hidden -> hidden -> D with ReLU (arXiv:2103.10385).

    prompt [P, D], w1 [D, h], b1 [h], w2 [h, h], b2 [h], w3 [h, D], b3 [D]. Weight decay applies to the matrices of the
    mlp, not to the prompt, which is a state. HF PEFT: P_TUNING.
    """

    identity = False
    lr_multiplier = 10.0
    decay_rule = r".*/w\d"
    demo = False
    axes: ClassVar = {"prompt": "PF", "w1": "FF", "w2": "FF", "w3": "FF"}  # for hidden = D; another h is not split

    tokens: Size = 20
    hidden: Annotated[int, Bounds(0, 65_536)] = 0  # 0: D

    hf = HFSpec(
        "P_TUNING",
        keys={
            **{
                "num_virtual_tokens": Key(20, "tokens"),
                "encoder_hidden_size": Key(0, "hidden"),
                "encoder_num_layers": 2,
            },
            "encoder_reparameterization_type": Key("MLP", kind=_MLP),
        },
        neutral=(*PROMPT_NEUTRAL, "encoder_dropout"),
        kinds=(),
        write_modules=lambda m, _, model: model.prompt_sizes | {"encoder_hidden_size": m.hidden or model.config.D},
        stored_config=lambda c, _: {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": c["num_virtual_tokens"]},
        to_exportable=_with_rows,
    )

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        D = named(params)["embed/table"].shape[1]
        h = self.hidden or D
        return {"embed/table": init_encoder(key, self.tokens, D, h, h, D)}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        rows = encode(trainable["embed/table"], jax.nn.relu)
        return replace(params, {"embed/table": PromptTable(named(params)["embed/table"], rows)})

    def context(self, trainable: Any) -> Context:
        return Context(tokens=self.tokens)
