"""Run directories: what a finished phase left, loaded as a base or as a base with its adapter."""

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax

from .. import InputError
from ..data.mixture import HeldOut
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..model import Config, Context, Transformer, shapes_of
from ..model.sharding import follow, shardings
from ..model.tree import nested
from ..peft import Method, Subset, merge
from .checkpoint import Checkpoints, fingerprint
from .config import Run, from_json
from .inputs import load_held_out


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A run as it can be used: `params` is the base it stands on, `method` and `trainable` what it added."""

    folder: Path
    run: Run
    config: Config
    params: Any
    method: Method
    trainable: Any
    tokenizer: Tokenizer
    held_out: dict[str, HeldOut]  # of the base's own domains
    manifest: dict[str, Any]

    @property
    def model(self) -> Transformer:
        return Transformer(self.config)

    @property
    def bound(self) -> tuple[Transformer, Any, Context]:
        """(model, bound parameters, context): what evaluation and generation take."""
        return self.model, self.method.bind(self.params, self.trainable), self.method.context(self.trainable)

    @cached_property
    def merged(self) -> Any:
        """One base that computes the same; InputError where there is none (prompts, adapters)."""
        return merge(self.method, self.params, self.trainable)


def sharded(shapes: Any, split: Any) -> Any:
    """Shapes with shardings, which a restore follows."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, split)


def check_run(folder: str | Path) -> Path:
    """The folder, if it is a run directory."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "is not a run directory: it has no config.json" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}; give the folder that `graftax pretrain` or `graftax finetune` printed")
    return folder


def load_run(folder: str | Path, mesh: Any = None, step: int | None = None, base: str = "") -> Loaded:
    """Load a run at its newest checkpoint, or at `step`; `base` says where its base is now, if it moved.

    Raises InputError for a directory that is no run, one without a checkpoint, and a base with another fingerprint.
    """
    folder = check_run(folder)
    run, checkpoints = from_json(folder / "config.json"), Checkpoints(folder / "checkpoints")
    steps = checkpoints.steps()
    if not steps or (step is not None and step not in steps):
        have = f"it has steps {', '.join(map(str, steps))}" if steps else "no step was saved"
        raise InputError(f"{folder}: no checkpoint {'' if step is None else step} to load; {have}")
    step = steps[-1] if step is None else step
    manifest = checkpoints.manifest(step)
    if run.phase == "pretrain":
        assert run.model is not None
        config, shapes = run.model, shapes_of(run.model)
        method: Method = Subset("all")
        below = None
    else:
        below = load_run(base or run.base, mesh)
        config, method, shapes = below.config, run.method, jax.eval_shape(lambda: below.merged)
        if fingerprint(below.merged) != manifest["base"]:
            raise InputError(
                f"{folder} was tuned on another base than {base or run.base} (fingerprint {manifest['base'][:12]}, "
                f"this one has {fingerprint(below.merged)[:12]}); give its own with --base"
            )
    make = partial(method.init, jax.random.key(0))
    like = jax.eval_shape(make, shapes)
    if mesh is not None:
        like = sharded(like, follow(mesh, make, shapes, shardings(mesh, shapes)))
    trainable = checkpoints.restore(step, "trainable", like)
    checkpoints.close()
    params = below.merged if below else nested(trainable)
    tokenizer = load_tokenizer(folder)
    held_out = below.held_out if below else load_held_out(folder / "held_out.npz")
    return Loaded(folder, run, config, params, method, trainable, tokenizer, held_out, manifest)
