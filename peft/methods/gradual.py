"""Gradual unfreezing: the head and the top layers train first, the embeddings last (ULMFiT, arXiv:1801.06146)."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from ...bounds import Count, Share
from ...model.tree import spread
from .subset import Subset


class Gradual(Subset):
    """W += [step >= start] update, start later from the head by layers down to the embeddings (arXiv:1801.06146).

    The parts (what stands after the layers, each layer, the embeddings; only those that `where` picks) fall into
    `stages` groups of about equal size, which begin evenly from step 0 to `until` of all steps; then all train. Nothing
    is compiled again. It saves no memory and no time: all parts have gradients and optimizer state from the start, so
    that a part begins with warm moments, at the size of step that Adam gives the others, and clipping by the global
    norm counts gradients that do not move anything yet. Tied embeddings begin with the embeddings, head or not.
    """

    demo = False

    stages: Count = 4
    until: Share = 0.15  # part of the steps after which all train

    def starts(self, trainable: Any, steps: int) -> dict[str, list[int]]:
        """{key of the trainable tree: the first step of each of its layers} (one number outside of layers)."""
        places = {}  # from the top down: infinity, the layer, -1
        for key, name, layers in spread(trainable):
            places[key] = list(layers) if layers else [-1 if name.startswith("embed/") else float("inf")]
        order = sorted({place for row in places.values() for place in row}, reverse=True)
        stages = min(self.stages, len(order))
        stage = {place: i * stages // len(order) for i, place in enumerate(order)}
        first = [int(self.until * steps * s / max(stages - 1, 1) + 1e-6) for s in range(stages)]
        return {key: [first[stage[place]] for place in row] for key, row in places.items()}

    def transform(self, steps: int) -> optax.GradientTransformation:
        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            starts = {key: np.array(row) for key, row in self.starts(updates, steps).items()}

            def one(key: str, u: Any) -> Any:
                start = starts[key].reshape(-1, *[1] * (u.ndim - 1)) if len(starts[key]) > 1 else starts[key][0]
                return jnp.where(state >= start, u, -0.0)  # x + -0.0 is x bit for bit, also where x is -0.0

            return {key: one(key, u) for key, u in updates.items()}, state + 1

        init: Any = lambda trainable: jnp.int32(0)  # noqa: E731  # steps done
        return optax.GradientTransformation(init, update)
