"""Tokens that were added to a base: their rows start as the mean row, and only some methods train them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...model.sharding import to_host
from ...model.tree import named
from ...peft import Method
from ..progress import console


def trained(method: Method, params: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """Whether a method can change the embedding of each id, and its logit: two arrays [len(ids)] of bool.

    Both are differentiated along one direction of the trainable tree, so no method has to say which rows it trains.
    """
    at = jnp.array(ids, jnp.int32)

    @jax.jit
    def moved(params: Any) -> Any:
        def rows(trainable: Any) -> Any:
            bound = named(method.bind(params, trainable))
            head = bound["head/matrix"] if "head/matrix" in bound else bound["embed/table"].T
            x_ND = bound["embed/table"][at].astype(jnp.float32)
            return x_ND, (jnp.ones_like(x_ND[:1]) @ head)[0, at]

        start = method.init(jax.random.key(0), params)
        _, (x_ND, logits_N) = jax.jvp(rows, (start,), (jax.tree.map(jnp.ones_like, start),))
        return (x_ND != 0).any(-1), logits_N != 0

    embedding, logit = map(to_host, moved(params))
    return np.asarray(embedding), np.asarray(logit)


def untrained(method: Method, params: Any, added: Mapping[str, int], rows: Sequence[Any]) -> dict[str, int]:
    """The added tokens whose rows this run will leave at the mean row; says which of them the rows of its data hold."""
    if not added:
        return {}
    ids = np.array(list(added.values()))
    moves = trained(method, params, ids)
    held = [np.isin(ids, np.concatenate([row[key][row[weight] > 0] for row in rows]))
            for key, weight in (("ids", "segments"), ("targets", "weights"))]  # fmt: skip
    lost = [there & ~ok for there, ok in zip(held, moves, strict=True)]
    if (either := lost[0] | lost[1]).any():
        tokens = ", ".join(f"{token!r} (id {i})" for (token, i), x in zip(added.items(), either, strict=True) if x)
        what = " and ".join(name for name, x in zip(("embeddings", "logits"), lost, strict=True) if x.any())
        how = f"--method tokens --method.ids {' '.join(map(str, ids[either]))}, alone or in a chain,"
        if "head/matrix" in named(params):
            how = "--method lora --method.where 'linear, embed/table, head/matrix'"
        console.print(f"the data hold tokens that were added to the base: {tokens}. {type(method).__name__} does not "
                      f"train their {what}, which stay those of the mean row; {how} does",
                      soft_wrap=True, markup=False)  # fmt: skip
    return {token: i for (token, i), ok in zip(added.items(), moves[0] | moves[1], strict=True) if not ok}
