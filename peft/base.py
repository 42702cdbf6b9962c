"""A method: what trains, as a pytree of its own, and how it is put together with the frozen base."""

import dataclasses
import re
import zlib
from typing import Any, ClassVar, Self, dataclass_transform

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .. import InputError
from ..bounds import check
from ..model import Config, Context, Transformer, Weight, forward, shapes_of
from ..model.tree import is_stacked, named, nested, split_layer_index
from ..model.weight import base_weight


@dataclass_transform(frozen_default=True)
class Method:
    """A pair of pure functions, as an Optax optimizer is; the fields of a subclass are its hyperparameters.

    trainable = method.init(key, params)                    # {path: arrays}, fp32
    logits = model.apply({"params": method.bind(params, trainable)}, ids)
    """

    identity: ClassVar[bool] = True  # logits right after init equal the base's
    lr_multiplier: ClassVar[float] = 5.0  # the learning rate to begin a search at, over full fine-tuning's
    demo: ClassVar[bool] = True  # whether `graftax demo` shows it
    decay_rule: ClassVar[str] = ".*"  # rule: the arrays of two or more axes that weight decay shrinks by default
    replaces_base: ClassVar[bool] = (
        False  # its arrays stand where the base's were; nothing may have wrapped those before
    )

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        """InputError for a number out of its bounds; an array (one of a sweep's lanes) is not looked at."""
        check(self, f"{type(self).__name__.lower()}: --method.")

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        """The trainable pytree, `{path: arrays}`, for a base (or its shapes, under `jax.eval_shape`)."""
        raise TypeError(f"{type(self).__name__} defines no init")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        """The base with weights where the method acts; params may be all of it or what `freeze` left."""
        return params

    def context(self, trainable: Any) -> Context:
        """What is put before the text: virtual tokens or a key/value past."""
        return Context()

    def frozen_params(self, params: Any) -> Any:
        """The base without what `trainable` now holds: one copy of each parameter.

        A method with frozen constants puts them here, in a Weight that its `bind` knows again (PiSSA's residual), or
        makes them anew in `bind` from a seed that is one of its fields (VeRA's projections).
        """
        return params

    def bind_train(self, params: Any, trainable: Any, key: Array) -> dict[str, Any]:
        """`bind` as it is in training, where it may draw (dropout)."""
        return self.bind(params, trainable)

    def decays(self, path: str) -> bool:
        """Whether weight decay shrinks an array of two or more axes in a layer, if `Optim.decay_where` does not say.

        It does where 0 leaves the base as it is (an update, as LoRA's) or is where such arrays are drawn around (a
        matrix). It does not where the size is a coordinate, of a hidden state or an angle.
        """
        return bool(re.fullmatch(self.decay_rule, path))

    def aux_loss(self, trainable: Any) -> Any:
        """What training adds to the mean loss."""
        return 0.0

    def update_transform(self, steps: int) -> optax.GradientTransformation:
        """What is done to the optimizer's updates: other rates for some leaves, ranks that end. `grads=` is given."""
        return optax.identity()

    def pad_to_rank(self, largest: Self) -> "Method | None":
        """The method that computes with arrays as large as `largest` has them, zeros where its own end, what this one
        computes with its own, also in training; `largest` but for its factors. None: there is none.

        `largest` is this method with one field larger. Runs of both are then one program of a sweep.
        """
        return None


def partition(method: Method, params: Any, key: Array) -> tuple[Any, dict[str, Any]]:
    """(frozen, trainable): each parameter is in one of the two. Differentiate the second alone."""
    trainable = method.init(key, params)  # first, as it says what is wrong
    return method.frozen_params(params), trainable


def apply(
    model: Transformer, params: Any, method: Method, trainable: Any, ids_BT: Array,
    positions_BT: Array | None = None, segments_BT: Array | None = None, **kw: Any,
) -> Array:  # fmt: skip
    """logits_BTV of the real positions, with the method's context before the text."""
    bound, context = method.bind(params, trainable), method.context(trainable)
    return forward(model, bound, ids_BT, positions_BT, segments_BT, context=context, **kw)[0]


def count(method: Method, base: Config | Any) -> int:
    """How many numbers a method trains on a config or a params tree, without memory."""
    params = shapes_of(base) if isinstance(base, Config) else base
    shapes = jax.eval_shape(method.init, jax.random.key(0), params)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def fold(bound: Any, dtype: Any = None) -> dict[str, Any]:
    """The bound tree as plain matrices, each weight replaced by `I @ w` in `dtype`, or in that of its base.

    Raises InputError for a weight that is not linear in x. A context (prompt, prefix) is not part of it: see `merge`.
    """

    def dense(path: str, w: Any) -> Any:
        """What stands at a path, as an array."""
        if not isinstance(w, Weight):
            return w
        if not w.linear:
            raise InputError(f"{path}: {type(w).__name__} is not linear in x, so it cannot be folded into a matrix")
        base = base_weight(w)
        if path == "embed/table":
            if not any(p.startswith("head/") for p in named(bound)) and not getattr(w, "tied", False):
                raise InputError(f"{path}: the output projection is tied to the base's rows, so no one table does both")
            matrix = w[jnp.arange(jax.tree.leaves(base)[0].shape[0])]
        else:
            matrix = jax.lax.map(lambda one: one.dense(), w) if is_stacked(path) else w.dense()
        kind = dtype or getattr(base, "dtype", None)
        return matrix if kind is None else matrix.astype(kind)

    with jax.default_matmul_precision("highest"):  # a TPU would multiply in bfloat16
        return nested({path: dense(path, w) for path, w in named(bound).items()})


def merge(method: Method, params: Any, trainable: Any, dtype: Any = None) -> dict[str, Any]:
    """A base that computes by itself what base + trainable compute; InputError where no such base exists."""
    if method.context(trainable).length:
        raise InputError(f"{type(method).__name__} puts positions before the text; a base alone cannot hold them")
    return fold(method.bind(params, trainable), dtype)


class Chain(Method):
    """Several methods at once, bound in order, each with its branch of the trainable tree; make it with `chain`."""

    methods: tuple[tuple[str, Method], ...]

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        return {n: m.init(jax.random.fold_in(key, zlib.crc32(n.encode())), params) for n, m in self.methods}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        before = named(params)
        for name, method in self.methods:
            self.check(method, trainable[name], before, named(params))
            params = method.bind(params, trainable[name])
        return params

    def check(self, method: Method, trainable: Any, before: dict[str, Any], now: dict[str, Any]) -> None:
        """InputError if a method would replace what an earlier one has changed, which then would train in vain."""
        for path in {split_layer_index(key)[0] for key in trainable} if method.replaces_base else ():
            if now.get(path) is not before.get(path):
                raise InputError(f"chain: {type(method).__name__} trains {path}, which an earlier method has taken; "
                                 "put it first, or let only one of them have it")  # fmt: skip

    def context(self, trainable: Any) -> Context:
        found = [c for name, m in self.methods if (c := m.context(trainable[name])).length]
        if len(found) > 1:
            raise InputError("chain: two methods put positions before the text; keep one of them")
        return found[0] if found else Context()

    def frozen_params(self, params: Any) -> Any:
        for _, method in self.methods:
            params = method.frozen_params(params)
        return params

    def bind_train(self, params: Any, trainable: Any, key: Array) -> dict[str, Any]:
        before = named(params)
        for i, (name, method) in enumerate(self.methods):
            self.check(method, trainable[name], before, named(params))
            params = method.bind_train(params, trainable[name], jax.random.fold_in(key, i))
        return params

    def decays(self, path: str) -> bool:
        branch, _, rest = path.partition("/")
        return dict(self.methods)[branch].decays(rest)

    def aux_loss(self, trainable: Any) -> Any:
        return sum(method.aux_loss(trainable[name]) for name, method in self.methods)

    def update_transform(self, steps: int) -> optax.GradientTransformation:
        parts = {n: optax.with_extra_args_support(m.update_transform(steps)) for n, m in self.methods}

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            grads = extra["grads"]
            done = {n: part.update(updates[n], state[n], params[n], grads=grads[n]) for n, part in parts.items()}
            return {n: d[0] for n, d in done.items()}, {n: d[1] for n, d in done.items()}

        init: Any = lambda trainable: {n: part.init(trainable[n]) for n, part in parts.items()}  # noqa: E731
        return optax.GradientTransformationExtraArgs(init, update)

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return all(method.identity for _, method in self.methods)


def chain(*methods: Method) -> Chain:
    """All the methods at once: `chain(LoRA(), Subset("norms"))`, one branch `lora`, `subset`, `lora_2` each."""
    names: list[str] = []
    for method in methods:
        name = type(method).__name__.lower()
        seen = sum(n.split("_")[0] == name for n in names)
        names.append(f"{name}_{seen + 1}" if seen else name)
    return Chain(tuple(zip(names, methods, strict=True)))
