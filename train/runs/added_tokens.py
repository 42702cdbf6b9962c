"""Tokens added to a base: their rows start as the mean row, and only some methods train them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...model.sharding import to_host
from ...model.tree import named
from ...peft import Method
from ..progress import console


def trains_rows(method: Method, params: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return whether a method can change the embedding and the logit of each id: two bool arrays [len(ids)].

    Both are differentiated along one direction of the trainable tree, so no method has to declare which rows it trains.
    """
    ids_N = jnp.array(ids, jnp.int32)

    @jax.jit
    def derivatives(params: Any) -> Any:
        def rows(trainable: Any) -> Any:
            bound = named(method.bind(params, trainable))
            head = bound["head/matrix"] if "head/matrix" in bound else bound["embed/table"].T
            x_ND = bound["embed/table"][ids_N].astype(jnp.float32)
            return x_ND, (jnp.ones_like(x_ND[:1]) @ head)[0, ids_N]

        start = method.init(jax.random.key(0), params)
        _, (x_ND, logits_N) = jax.jvp(rows, (start,), (jax.tree.map(jnp.ones_like, start),))
        return (x_ND != 0).any(-1), logits_N != 0

    embedding_N, logit_N = map(to_host, derivatives(params))
    return np.asarray(embedding_N), np.asarray(logit_N)


def untrained_tokens(method: Method, params: Any, added: Mapping[str, int], rows: Sequence[Any]) -> dict[str, int]:
    """Return the added tokens whose rows this run leaves at the mean row, and warn if its data contain such tokens.

    added: {token: id}. rows: the packed training rows.
    """
    if not added:
        return {}
    ids = np.array(list(added.values()))
    embedding, logit = trains_rows(method, params, ids)
    inputs, targets = (
        np.isin(ids, np.concatenate([row[key][row[weight] > 0] for row in rows]))
        for key, weight in (("ids", "segments"), ("targets", "weights"))
    )
    untrained = {"embeddings": inputs & ~embedding, "logits": targets & ~logit}
    if (either := untrained["embeddings"] | untrained["logits"]).any():
        tokens = ", ".join(f"{token!r} (id {i})" for (token, i), x in zip(added.items(), either, strict=True) if x)
        parts = " and ".join(name for name, x in untrained.items() if x.any())
        remedy = f"--method tokens --method.ids {' '.join(map(str, ids[either]))}, alone or in a chain,"
        if "head/matrix" in named(params):
            remedy = "--method lora --method.where 'linear, embed/table, head/matrix'"
        console.print(
            f"the data contain tokens that were added to the base: {tokens}. {type(method).__name__} does not train "
            f"their {parts}, which keep the values of the mean row; {remedy} does",
            soft_wrap=True,
            markup=False,
        )
    return {token: i for (token, i), trains in zip(added.items(), embedding | logit, strict=True) if not trains}
