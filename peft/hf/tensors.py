"""Where each tensor of an adapter file goes: its name there, its place in a trainable tree, and its layout."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...model.tree import is_stacked, name_and_layers, split_layer_index
from ..base import Chain, Method
from ..hf_spec import AdapterFile, Entry, HFModel, HFTensor, Place, Tensors


class Link(NamedTuple):
    """A method of a chain, or the only one, with its branch of the trainable tree."""

    branch: str  # empty for the only one
    method: Method
    trainable: Any

    @property
    def is_main(self) -> bool:
        """Whether a file has the type of this method, rather than keeping it beside another."""
        return bool(self.method.hf.type) and self.method.hf.companion is None

    @property
    def places(self) -> list[Place]:
        """What the method trains, or acts on."""
        return [place for key, arrays in self.trainable.items() for _, place in iter_places(key, arrays)]


def links(method: Method, trainable: Any) -> list[Link]:
    """Return the methods of a chain, or the only one; `trainable` may be shapes."""
    if isinstance(method, Chain):
        return [Link(branch, link, trainable[branch]) for branch, link in method.methods]
    return [Link("", method, trainable)]


def iter_places(key: str, arrays: Any) -> Iterator[tuple[int | None, Place]]:
    """Yield (index into the arrays, place) of each layer that a key of a trainable tree holds."""
    path, layers = name_and_layers(key)
    if not is_stacked(split_layer_index(key)[0]):
        yield None, (path, layers[0] if layers else None)
        return
    for i, layer in enumerate(layers or range(jax.tree.leaves(arrays)[0].shape[0])):
        yield i, (path, layer)


def entries(method: Method, trainable: Any, model: HFModel) -> list[Entry]:
    """Return every tensor that trains in a method's file; `trainable` may be shapes.

    Raises InputError for a method that HF PEFT has no file for.
    """
    methods = links(method, trainable)
    mains = [link for link in methods if link.is_main]
    file = AdapterFile(model, not mains, frozenset(path for link in mains for path, _ in link.places))
    result = []
    for link in methods:
        for key, arrays in link.trainable.items():
            for layer, place in iter_places(key, arrays):
                for leaf, tensor in _located(link.method, key, arrays, place, file):
                    layout = tensor.layout
                    if layout.embed_scaled and model.config.embed_scale != 1:
                        layout = layout.scaled(model.config.embed_scale)
                    result.append(Entry(tensor.name, layout, link.branch, key, leaf, layer))
    return result


def _located(method: Method, key: str, arrays: Any, place: Place, file: AdapterFile) -> Iterator[tuple[str, HFTensor]]:
    """Yield (array, tensor with its whole name) of one layer of a key."""
    spec, name = method.hf, type(method).__name__
    if spec.locate:
        yield from spec.locate(*place, file)
        return
    module = file.model.at.get(place)
    if not spec.type or module is None:
        raise InputError(f"{name} of {key}: HF PEFT has no file for it; merge it: --format hf")
    tensors = spec.table_tensors if module.kind == "table" else spec.tensors
    for leaf in arrays:
        if leaf not in tensors:
            raise InputError(f"{name} of {key}: HF PEFT has no {leaf} there; merge it: --format hf")
        yield leaf, tensors[leaf]._replace(name=spec.owner(module.name) + tensors[leaf].name)


def to_hf(entry: Entry, trainable: Any, gradient: bool = False) -> Any:
    """Return an array as the file has it; its shape for a tree of shapes, its gradient for a tree of gradients."""
    x = trainable[entry.branch] if entry.branch else trainable
    x = x[entry.key][entry.leaf] if entry.leaf else x[entry.key]
    convert = entry.layout.grad_to_hf if gradient and entry.layout.grad_to_hf else entry.layout.to_hf

    def one_layer(x: Any) -> Any:
        return convert(x if entry.layer is None else x[entry.layer])

    return jax.eval_shape(one_layer, x) if isinstance(x, jax.ShapeDtypeStruct) else one_layer(x)


def fill(shapes: Any, found: list[Entry], tensors: Tensors) -> Any:
    """Return the trainable tree with the tensors of a file in their places; fp32."""
    tree = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    for entry in found:
        parent, key = tree[entry.branch] if entry.branch else tree, entry.key
        if entry.leaf:
            parent, key = parent[key], entry.leaf
        parent[key][... if entry.layer is None else entry.layer] = entry.layout.from_hf(tensors[entry.name])
    return jax.tree.map(jnp.asarray, tree)
