"""graftax as a contender: the jitted train step, with the state donated."""

import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ... import __version__
from ...model import Transformer, init
from ...peft import Subset, partition
from ...peft.methods.lora import LoRA
from ..config import Optim, config_from_dict
from ..optim import make_optimizer
from ..step import init_state, make_train_step
from .peer import peak_rss, serve


def build(spec: dict[str, Any]) -> tuple[Callable[[], float], dict[str, Any], Callable[[], Any]]:
    """Return (step, facts, function of the peak device memory) for a spec of `cases.py`."""
    libraries, config = peak_rss(), config_from_dict(spec["config"], "spec")
    method = Subset() if spec["method"] == "full" else LoRA(rank=spec["rank"], alpha=spec["alpha"])
    ids = np.random.default_rng(0).integers(0, config.V, (spec["batch"], spec["T"] + 1))
    batch = {"ids": jnp.asarray(ids[:, :-1], jnp.int32), "targets": jnp.asarray(ids[:, 1:], jnp.int32),
             "weights": jnp.ones((spec["batch"], spec["T"]))}  # fmt: skip

    frozen, trainable = partition(method, init(config, jax.random.key(0)), jax.random.key(1))
    tx = make_optimizer(Optim(schedule="constant", warmup=0), trainable, spec["steps"])
    state = init_state(trainable, tx)
    del trainable  # the state is donated; do not keep its buffers twice
    start = time.perf_counter()
    jitted = jax.jit(make_train_step(Transformer(config), method, tx, chunk=spec["chunk"]), donate_argnums=0)
    run = jitted.lower(state, frozen, batch).compile()
    seconds = time.perf_counter() - start

    def step() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(run(state, frozen, batch))
        return float(metrics["loss"])

    versions = {"graftax": __version__, "jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__}
    return step, {"libraries": libraries, "compile": seconds, "versions": versions, **_compiled(run)}, _device_peak


def _compiled(run: Any) -> dict[str, float]:
    """Return the memory of the compiled step in MB: arguments, temporaries, and the peak with outputs."""
    m = run.memory_analysis()
    if m is None:  # some backends do not report it
        return {}
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    return {"arguments": m.argument_size_in_bytes / 1e6, "temporaries": m.temp_size_in_bytes / 1e6, "peak": peak / 1e6}


def _device_peak() -> float | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 1e6 if stats else None


if __name__ == "__main__":
    serve(build)
