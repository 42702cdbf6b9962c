"""What an adapter file holds besides what trains: shared projections, fixed places, tables of the base."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from ... import InputError
from ...model.tree import named
from ..base import Chain, Method
from ..hf_spec import PREFIX, AdapterConfig, Entry, HFModel, Module, Tensors
from ..random_projections import widest
from ..targets import FixedArrays
from .tensors import Link, links
from .torch_random import Torch

ROOT = "base_model."
TABLE_NAMES = ("embed_tokens", "lm_head")  # of the modules whose tables HF PEFT saves beside an adapter of them
_TABLE = ".base_layer.weight"


def read_fixed(
    method: Method, trainable: Any, c: AdapterConfig, found: list[Entry], params: Any, tensors: Tensors
) -> Method:
    """Return the method with the fixed arrays of its file, which are taken out of `tensors`.

    Raises InputError if one is missing, of another shape, or not what the base has there.
    """
    methods = []
    for link in links(method, trainable):
        part, own = link.method, [entry for entry in found if entry.branch == link.branch]
        if part.hf.shared:
            part = _read_projections(link, c, params, tensors)
        if part.hf.fixed:
            part = part.hf.fixed.from_hf(part, own, link.trainable, params, tensors)
        methods.append((link.branch, part))
    residual = any(part.hf.base_tables == "residual" for _, part in methods)
    method = Chain(tuple(methods)) if isinstance(method, Chain) else methods[0][1]
    if tables := _read_tables(tensors, found, params, residual):
        # No field, so that neither a run's config nor `dataclasses.replace` copies them; `save` without the base
        # writes them again.
        object.__setattr__(method, "_base_tables", tables)
    return method


def write_fixed(
    method: Method, trainable: Any, found: list[Entry], model: HFModel, shapes: Any, params: Any
) -> Tensors:
    """Return the fixed tensors of a method's file. `shapes`: those of the base in the trainable tree's layout.

    Raises InputError for a table of the base that is neither in `params` nor was in the file the method is from.
    """
    tensors: Tensors = dict(getattr(method, "_base_tables", {}))
    methods = links(method, trainable)
    for link in methods:
        part, own = link.method, [entry for entry in found if entry.branch == link.branch]
        if part.hf.fixed:
            tensors |= part.hf.fixed.to_hf(part, own, link.trainable, shapes)
        if (shared := part.hf.shared) and shared.stored(part):
            modules = {entry.name.rpartition(".")[0] for entry in own} if shared.copied else set()
            pair = shared.projections(part, *widest(shapes, link.trainable))
            for name, x in zip(shared.names, pair, strict=True):
                x = np.asarray(x, np.float32)
                tensors |= {ROOT + name: x} | {f"{module}.{name}": x for module in modules}
    if any(link.method.hf.base_tables != "copied" for link in methods):
        return tensors
    return tensors | _copied_tables(found, model, params, tensors)


def _read_projections(link: Link, c: AdapterConfig, params: Any, tensors: Tensors) -> Method:
    """Return a method with the shared projections of its file, or with those that torch draws from its seed."""
    method: Any = link.method
    shared, D, F = method.hf.shared, *widest(params, link.trainable)
    names = [ROOT + name for name in shared.names]
    pair = [tensors.pop(name, None) for name in names]
    for copy in [name for name in tensors if shared.copied and name.endswith(shared.names)]:
        whole = pair[[copy.endswith(name) for name in shared.names].index(True)]
        if whole is None or not np.array_equal(tensors.pop(copy), whole):
            raise InputError(f"{copy} is not the projection that all targets share")
    drawn = not c["save_projection"] and all(x is None for x in pair)
    if drawn:
        pair = shared.draw(Torch(method.seed), method, D, F)
    shapes = jax.eval_shape(partial(shared.projections, method, D, F))
    for name, x, expected in zip(names, pair, shapes, strict=True):
        if x is None or x.shape != expected.shape:
            raise InputError(f"{name} {'is missing' if x is None else list(x.shape)}, wanted {list(expected.shape)}")
    arrays = {"a": np.float32(pair[0]), "b": np.float32(pair[1])} | ({"drawn": np.True_} if drawn else {})
    return dataclasses.replace(method, given=FixedArrays(**arrays))


def _read_tables(tensors: Tensors, found: list[Entry], params: Any, residual: bool) -> Tensors:
    """Take the tables that HF PEFT copies from the base out of `tensors`, and return them.

    Raises InputError if they are not those of the base. `residual`: lm_head is what a method has left of it.
    """
    flat, trained, tables = named(params), {entry.name for entry in found}, {}
    head = f"{PREFIX}lm_head{_TABLE}"
    for name in [name for name in tensors if name.endswith(_TABLE) and name not in trained]:
        tables[name] = x = tensors.pop(name)
        if residual and name == head:
            continue
        base = np.asarray(flat["head/matrix"].T if name == head and "head/matrix" in flat else flat["embed/table"],
                          np.float32)  # fmt: skip
        if x.shape != base.shape or not np.allclose(np.float32(x), base, rtol=1e-2, atol=1e-4):
            raise InputError(f"{name} {list(x.shape)} is not the base's: the adapter is of another base, or of this "
                             "one with tokens added; give it that base")  # fmt: skip
    return tables


def _copied_tables(found: list[Entry], model: HFModel, params: Any, known: Tensors) -> Tensors:
    """Return the tables below adapted modules, which HF PEFT saves as they are in the base."""
    adapted: list[Module] = []
    for module in model.modules.values():
        start = f"{PREFIX}{module.name}."
        own = {entry.name.removeprefix(start) for entry in found if entry.name.startswith(start)}
        if module.name.split(".")[-1] in TABLE_NAMES and own - {"weight", "bias"}:
            adapted.append(module)
    if params is None:
        if missing := [m for m in adapted if f"{PREFIX}{m.name}{_TABLE}" not in known]:
            path = "embed/table" if model.config.tied else missing[0].path
            raise InputError(f"the file of an adapter of {missing[0].name} has the base's {path} in it, which this "
                             "method was not loaded with; give save(..., params=) the base")  # fmt: skip
        return {}
    flat = named(params)
    tables = {m: flat["head/matrix"].T if m.kind == "matrix" else flat["embed/table"] for m in adapted}
    return {f"{PREFIX}{m.name}{_TABLE}": np.asarray(x, np.float32) for m, x in tables.items()}
