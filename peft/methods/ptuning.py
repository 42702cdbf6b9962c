"""P-tuning: a prompt whose rows a small MLP makes (arXiv:2103.10385)."""

from typing import Annotated, Any

import jax
from jax import Array

from ...bounds import Bounds, Size
from ...model import Context
from ...model.tree import named, replace
from ..base import Method
from .encoder import encode, encoder
from .prompt import PromptTable


class PTuning(Method):
    """[mlp(prompt); embed(ids)], prompt N(0, 1), mlp D -> hidden -> hidden -> D with ReLU (arXiv:2103.10385).

    Weight decay shrinks the matrices of the mlp, not the prompt, which is a state.
    """

    identity = False
    rate = 10.0
    decayed = r".*/w\d"
    demo = False

    tokens: Size = 20
    hidden: Annotated[int, Bounds(0, 65_536)] = 0  # 0: D

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        D = named(params)["embed/table"].shape[1]
        h = self.hidden or D
        return {"embed/table": encoder(key, self.tokens, D, h, h, D)}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        rows = encode(trainable["embed/table"], jax.nn.relu)
        return replace(params, {"embed/table": PromptTable(named(params)["embed/table"], rows)})

    def context(self, trainable: Any) -> Context:
        return Context(tokens=self.tokens)
