"""Law 13: one step of a fixed run gives the numbers it gave before."""

import jax
import numpy as np
import pytest
from graftax import peft
from graftax.peft import Subset
from graftax.train.config import Optim
from tiny import make_batch, stepper

# loss, global gradient norm, update rms; CPU, fp32. Written by this test's failure message.
GOLDEN = {
    "full": (4.0953927, 1.7466297, 0.0100017),
    "muon": (4.0953927, 1.7466297, 0.0039533),
    "lora": (4.0953927, 0.234817, 0.006948),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_13_one_step_is_what_it_was(base, name):
    method = peft.LoRA() if name == "lora" else Subset()
    optim = Optim(name="muon" if name == "muon" else "adamw", lr=1e-2, warmup=1)
    frozen, state, step = stepper(base, method, optim)
    metrics = jax.device_get(step(state, frozen, make_batch())[1])
    got = tuple(float(metrics[k]) for k in ("loss", "grad_norm", "update_rms"))
    message = (
        f"{name}: one step now gives {tuple(round(x, 7) for x in got)}, was {GOLDEN[name]}. Updating these numbers is "
        "right only if the change was meant to alter initialisation, the model's arithmetic, the loss or the optimizer "
        "and the commit says so; a refactoring, a speed-up or a new method must not move them."
    )
    assert np.allclose(got, GOLDEN[name], rtol=2e-4), message
