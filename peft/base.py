"""The interface of a method: what trains, as its own pytree, and how it is combined with the frozen base."""

import dataclasses
import re
import zlib
from collections.abc import Mapping
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
from .hf_spec import HFSpec
from .targets import Target, init_matrices, wrap_weights


@dataclass_transform(frozen_default=True)
class Method:
    """Base class of methods: a pair of pure functions, as an Optax optimizer is, and optional hooks.

        trainable = method.init(key, params)                    # {path: arrays}, fp32
        logits = model.apply({"params": method.bind(params, trainable)}, ids)

    A method that adds arrays to matrices defines a field `where`, the rule that picks the matrices, `arrays`, what
    trains for one of them, and `weight`, what `x @ w` then means. Any other defines `init`, and `bind` or `context`.
    Every other hook has a neutral default. `peft.targets` has helpers.

    A subclass is a frozen dataclass. Its annotated fields are the hyperparameters and the command-line flags
    (`--method.rank`); bounds declared on them (bounds.py) are checked when an instance is made. The first line of its
    docstring, "formula (source)", is what `graftax methods` prints.
    """

    weight: ClassVar[Any] = None  # weight(w, **arrays): the Weight that replaces a matrix w, given the arrays for it

    identity: ClassVar[bool] = True  # the logits right after `init` equal those of the base
    lr_multiplier: ClassVar[float] = 5.0  # where a search starts: this times the learning rate of full fine-tuning
    demo: ClassVar[bool] = True  # `graftax demo` includes the method
    decay_rule: ClassVar[str] = ".*"  # regex over paths of the trainable tree that weight decay applies to
    replaces_base: ClassVar[bool] = False  # its arrays stand in for those of the base, which must not be wrapped before
    axes: ClassVar[Mapping[str, str]] = {}  # array name -> its axes, a letter each, for sharding: see peft/sharding.py
    axes_of: ClassVar[Mapping[str, str]] = {}  # key that is no path of the base -> the parameter whose axes are meant

    hf: ClassVar[HFSpec] = HFSpec()  # how Hugging Face PEFT stores the method; not inherited: see peft/hf_spec

    def __init_subclass__(cls) -> None:
        cls.hf = vars(cls).get("hf", HFSpec())  # a subclass may compute something else
        dataclasses.dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        """Check the fields. Raises InputError for a number out of bounds; arrays (lanes of a sweep) are not checked."""
        check(self, f"{self.name}: --method.")

    @property
    def name(self) -> str:
        """The method's name on the command line."""
        return type(self).__name__.lower()

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        """Return what trains for one matrix of `target.shape` (D, F): fp32 arrays, named as the fields of `weight`."""
        raise TypeError(f"{type(self).__name__} defines neither init nor arrays")

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        """Return the trainable pytree `{path: arrays}` for a base, or for its shapes under `jax.eval_shape`.

        A path is that of the parameter it acts on, with a layer range if it acts on some layers of a stacked one:
        `layers/mlp/up[4:8]`. Arrays of stacked layers have the layer axis first.
        """
        return init_matrices(key, params, getattr(self, "where", "linear"), self.arrays, self.name)

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        """Return the base with weights where the method acts. `params`: the whole base, or its `frozen_params`."""
        return params if self.weight is None else wrap_weights(params, trainable, self.weight)

    def context(self, trainable: Any) -> Context:
        """Return what precedes the text: virtual tokens, or past keys and values."""
        return Context()

    def frozen_params(self, params: Any) -> Any:
        """Return the base without what `trainable` now holds, so that each parameter exists once.

        Frozen constants of a method go here, in a Weight that `bind` recognises (PiSSA's residual), or are drawn again
        in `bind` from a seed that is a field (VeRA's projections).
        """
        return params

    def bind_train(self, params: Any, trainable: Any, key: Array) -> dict[str, Any]:
        """Return `bind` as training uses it, with random draws (dropout)."""
        return self.bind(params, trainable)

    def decays(self, path: str) -> bool:
        """Return whether weight decay applies by default to the array of two or more axes at a path of the tree.

        It should where 0 means no change of the base (a LoRA update), or where a matrix is drawn around 0. It should
        not where the array holds coordinates: a hidden state or an angle. `Optim.decay_where` overrides this.
        """
        return bool(re.fullmatch(self.decay_rule, path))

    def aux_loss(self, trainable: Any) -> Any:
        """Return a term that training adds to the mean loss."""
        return 0.0

    def update_transform(self, steps: int) -> optax.GradientTransformation:
        """Return a transformation of the optimizer's updates (other rates, pruned ranks); it is passed `grads=`."""
        return optax.identity()

    def pad_to_rank(self, largest: Self) -> "Method | None":
        """Return a method with the shapes of `largest`, padded with zeros, that computes and trains as this one does.

        `largest` is this method with one field larger; the result may differ from it in scalar factors only, so that a
        sweep runs both in one program. None: there is no such method.
        """
        return None


def partition(method: Method, params: Any, key: Array) -> tuple[Any, dict[str, Any]]:
    """Return (frozen, trainable); each parameter is in exactly one. Differentiate with respect to the second alone."""
    trainable = method.init(key, params)  # before frozen_params: its errors are the clearer ones
    return method.frozen_params(params), trainable


def apply(
    model: Transformer, params: Any, method: Method, trainable: Any, ids_BT: Array,
    positions_BT: Array | None = None, segments_BT: Array | None = None, **kw: Any,
) -> Array:  # fmt: skip
    """Return logits_BTV of the real positions, with the method's context before the text."""
    bound, context = method.bind(params, trainable), method.context(trainable)
    return forward(model, bound, ids_BT, positions_BT, segments_BT, context=context, **kw)[0]


def count(method: Method, base: Config | Any) -> int:
    """Return the number of trainable parameters of a method on a config or a params tree; allocates no memory."""
    params = shapes_of(base) if isinstance(base, Config) else base
    shapes = jax.eval_shape(method.init, jax.random.key(0), params)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def fold(bound: Any, dtype: Any = None) -> dict[str, Any]:
    """Return the bound tree with each weight replaced by its matrix `I @ w`, in `dtype` or in that of the base.

    Raises InputError for a weight that is not linear in x. A context (prompt, prefix) is not included: see `merge`.
    """
    untied = any(path.startswith("head/") for path in named(bound))

    def matrix(path: str, w: Any) -> Any:
        """Return the dense array of one entry of the tree."""
        if not isinstance(w, Weight):
            return w
        if not w.linear:
            raise InputError(f"{path}: {type(w).__name__} is not linear in x, so it cannot be folded into a matrix")
        base = base_weight(w)
        if path == "embed/table":
            if not untied and not getattr(w, "tied", False):
                raise InputError(f"{path}: the output projection is tied to the base's rows, so no one table does both")
            dense = w[jnp.arange(jax.tree.leaves(base)[0].shape[0])]
        else:
            dense = jax.lax.map(lambda layer: layer.dense(), w) if is_stacked(path) else w.dense()
        dense_dtype = dtype or getattr(base, "dtype", None)
        return dense if dense_dtype is None else dense.astype(dense_dtype)

    with jax.default_matmul_precision("highest"):  # a TPU would multiply in bfloat16
        return nested({path: matrix(path, w) for path, w in named(bound).items()})


def merge(method: Method, params: Any, trainable: Any, dtype: Any = None) -> dict[str, Any]:
    """Return a base that alone computes what base and trainable compute. Raises InputError if none exists."""
    if method.context(trainable).length:
        raise InputError(f"{type(method).__name__} puts positions before the text; a base alone cannot hold them")
    return fold(method.bind(params, trainable), dtype)


class Chain(Method):
    """Several methods at once, bound in order, each with its own branch of the trainable tree; made by `chain`."""

    methods: tuple[tuple[str, Method], ...]

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        keys = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name, _ in self.methods}
        return {name: method.init(keys[name], params) for name, method in self.methods}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return self.bind_train(params, trainable, None)

    def bind_train(self, params: Any, trainable: Any, key: Array | None) -> dict[str, Any]:
        """Bind each link in order; without a key none draws."""
        base = named(params)
        for i, (name, method) in enumerate(self.methods):
            branch, current = trainable[name], named(params)
            for path in {split_layer_index(k)[0] for k in branch} if method.replaces_base else ():
                if current.get(path) is not base.get(path):  # the earlier method would train in vain
                    raise InputError(f"chain: {type(method).__name__} trains {path}, which an earlier method has "
                                     "taken; put it first, or let only one of them have it")  # fmt: skip
            if key is None:
                params = method.bind(params, branch)
            else:
                params = method.bind_train(params, branch, jax.random.fold_in(key, i))
        return params

    def context(self, trainable: Any) -> Context:
        contexts = [c for name, method in self.methods if (c := method.context(trainable[name])).length]
        if len(contexts) > 1:
            raise InputError("chain: two methods put positions before the text; keep one of them")
        return contexts[0] if contexts else Context()

    def frozen_params(self, params: Any) -> Any:
        for _, method in self.methods:
            params = method.frozen_params(params)
        return params

    def decays(self, path: str) -> bool:
        name, _, rest = path.partition("/")
        return dict(self.methods)[name].decays(rest)

    def aux_loss(self, trainable: Any) -> Any:
        return sum(method.aux_loss(trainable[name]) for name, method in self.methods)

    def update_transform(self, steps: int) -> optax.GradientTransformation:
        links = {name: optax.with_extra_args_support(m.update_transform(steps)) for name, m in self.methods}

        def init(trainable: Any) -> Any:
            return {name: link.init(trainable[name]) for name, link in links.items()}

        def update(updates: Any, state: Any, params: Any = None, *, grads: Any, **_: Any) -> tuple[Any, Any]:
            pairs = {n: link.update(updates[n], state[n], params[n], grads=grads[n]) for n, link in links.items()}
            return {n: new for n, (new, _) in pairs.items()}, {n: new_state for n, (_, new_state) in pairs.items()}

        return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return all(method.identity for _, method in self.methods)


def chain(*methods: Method) -> Chain:
    """Combine methods: `chain(LoRA(), Subset("norms"), LoRA(rank=2))` has the branches `lora`, `subset`, `lora_2`."""
    names: list[str] = []
    for method in methods:
        seen = sum(name.split("_")[0] == method.name for name in names)
        names.append(f"{method.name}_{seen + 1}" if seen else method.name)
    return Chain(tuple(zip(names, methods, strict=True)))
