"""Make `peft/merge.npz`: what HF PEFT's merge_utils does with three random updates of two matrices.

    python PATH/tests/golden/make_merge.py

Run it in an environment with torch and peft (made with 2.13 and 0.21.2), from a folder that is not the root of this
repository. The same versions give the same bytes. For each matrix NAME of head/matrix, layers/0/attn/q:

    NAME/task [3, D, F]        the updates; a tenth of their numbers is 0
    NAME/kept [3, D, F]        which numbers dare keeps (a mask of the density 0.6)
    NAME/METHOD [D, F]         with WEIGHTS: task_arithmetic, magnitude_prune and ties (of the density 0.3), dare_linear
                               and dare_ties (with the masks)
"""

import sys
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent / "peft"
for place in [p for p in sys.path if Path(p or ".").resolve() == HERE.parents[2]]:
    sys.path.remove(place)  # it has a folder `peft` too

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft.utils import merge_utils  # noqa: E402

SHAPES = {"head/matrix": (6, 10), "layers/0/attn/q": (8, 8)}
WEIGHTS = (1.0, 0.5, 2.0)
DENSITY, KEPT = 0.3, 0.6


def main():
    rng, out = np.random.default_rng(0), {"weights": np.float32(WEIGHTS)}
    for name, shape in SHAPES.items():
        task = (rng.normal(size=(3, *shape)) * (rng.random((3, *shape)) > 0.1)).astype(np.float32)
        kept = rng.random((3, *shape)) < KEPT
        tensors, weights = list(torch.from_numpy(task)), torch.tensor(WEIGHTS)
        found = {
            "task_arithmetic": merge_utils.task_arithmetic(tensors, weights),
            "magnitude_prune": merge_utils.magnitude_prune(tensors, weights, DENSITY),
            "ties": merge_utils.ties(tensors, weights, DENSITY),
        }
        for method in ("dare_linear", "dare_ties"):
            masks = iter(torch.from_numpy(kept.astype(np.float32)))
            with mock.patch("torch.bernoulli", lambda _, masks=masks: next(masks)):
                found[method] = getattr(merge_utils, method)(tensors, weights, KEPT)
        out |= {f"{name}/task": task, f"{name}/kept": kept}
        out |= {f"{name}/{method}": x.numpy() for method, x in found.items()}
    np.savez_compressed(HERE / "merge.npz", **out)


if __name__ == "__main__":
    main()
