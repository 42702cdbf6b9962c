"""What an adapter file holds besides what trains: shared projections, places, tables of the base, one joined past."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ... import InputError
from ...model import Config
from ...model.tree import named
from ..base import Chain, Method
from ..methods import randlora, shira, vera
from ..random_projections import matrix_shape, widest
from ..targets import FixedArrays
from . import torch_random
from .entries import Entry, parts, shapes_like
from .names import PREFIX, Module, modules
from .types import kinds

Tensors = dict[str, np.ndarray]
ROOT = "base_model."
_PAIRS = {"VERA": ("vera_A", "vera_B"), "RANDLORA": ("randlora_A", "randlora_B")}
PAST = "prompt_embeddings"


def ask(c: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The config as its file was made: an encoder is not in it, and BOFT's file knows how many factors there are."""
    if c["peft_type"] == "P_TUNING":
        kind = "PROMPT_TUNING"
        return {**kinds[kind].defaults, "peft_type": kind, "num_virtual_tokens": c["num_virtual_tokens"]}
    if c["peft_type"] == "PREFIX_TUNING":
        return c | {"prefix_projection": False}
    if c["peft_type"] == "HIRA":  # whatever its patterns say, peft makes ranks that only the file tells
        start, end = PREFIX, ".hira_A"
        ranks = {n.removeprefix(start).removesuffix(end): x.shape[0] for n, x in tensors.items() if n.endswith(end)}
        return c | {"rank_pattern": ranks}
    factors = {x.shape[0] for name, x in tensors.items() if name.endswith(".boft_R") and x.ndim == 4}
    return c | {"boft_n_butterfly_factor": factors.pop()} if len(factors) == 1 else c


def parted(c: Mapping[str, Any], tensors: Tensors, structure: Any, folder: Path) -> Tensors:
    """The tensors with a joined past [P, L 2 K H] as keys and values of each layer [P, K H]."""
    if c["peft_type"] != "PREFIX_TUNING" or PAST not in tensors:
        return tensors
    joint, leaves = tensors[PAST], jax.tree.leaves(structure)
    P, width = leaves[0].shape[-2:]
    wanted = (P, sum(x.size for x in leaves) // P)
    if joint.shape != wanted:
        raise InputError(f"{folder}: {PAST} {list(joint.shape)}, wanted {list(wanted)}; is it of another base?")
    cut = joint.reshape(P, -1, 2, width)
    rest = {name: x for name, x in tensors.items() if name != PAST}
    return rest | {f"{PAST}.{i}.{kv}": cut[:, i, j] for i in range(cut.shape[1]) for j, kv in enumerate("kv")}


def joined(tensors: Tensors) -> Tensors:
    """The inverse of `parted`."""
    past = {name: x for name, x in tensors.items() if name.startswith(f"{PAST}.")}
    if not past:
        return tensors
    L, P = len(past) // 2, next(iter(past.values())).shape[0]
    rows = np.stack([[past[f"{PAST}.{i}.{kv}"] for kv in "kv"] for i in range(L)])  # [L, 2, P, K H]
    return {n: x for n, x in tensors.items() if n not in past} | {PAST: rows.transpose(2, 0, 1, 3).reshape(P, -1)}


def constants(
    method: Method, c: Mapping[str, Any], tensors: Tensors, found: list[Entry], structure: Any, params: Any,
    where: Path,
) -> tuple[Method, Tensors, Tensors]:  # fmt: skip
    """(the method with the file's constants, the tensors that are left, tables of the base). InputError where one is
    not as it must be."""
    tensors, made = dict(tensors), []
    for branch, part in parts(method):
        tree = structure[branch] if branch else structure
        if type(part).__name__.upper() in _PAIRS:
            part = _projections(part, c, tensors, tree, params, where)
        elif isinstance(part, shira.SHiRA):
            part = _places(part, tensors, [e for e in found if e.branch == branch], tree, params, where)
        made.append((branch, part))
    tables, head = {}, f"{PREFIX}lm_head.base_layer.weight"
    if c.get("init_lora_weights") in ("pissa", "olora") and head in tensors:  # what is left of it; it is computed here
        tables[head] = tensors.pop(head)
    tables |= _tables(tensors, found, params, where)
    return (Chain(tuple(made)) if isinstance(method, Chain) else made[0][1]), tensors, tables


def remember(method: Method, tables: Tensors) -> None:
    """Keep a file's copies of the base's tables with the method made of it: they are none of its fields, and a run
    does not store them, nor does `dataclasses.replace` copy them, but `save` without the base writes them again."""
    if tables:
        object.__setattr__(method, "_tables", tables)


def remembered(method: Method) -> Tensors:
    """What `remember` has kept."""
    return dict(getattr(method, "_tables", {}))


def _projections(part: Any, c: Mapping[str, Any], tensors: Tensors, tree: Any, params: Any, where: Path) -> Any:
    """VeRA or RandLoRA with the projections of its file, or those that torch draws from the seed."""
    kind, (D, F) = c["peft_type"], widest(params, tree)
    names = [ROOT + n for n in _PAIRS[kind]]
    low, high, R = min(D, F), max(D, F), part.rank
    shapes = [(R, D), (F, R)] if kind == "VERA" else [(R, 1, low), (high, -(-low // R), R)]
    pair = [tensors.pop(n, None) for n in names]
    for copy in [n for n in tensors if kind == "RANDLORA" and n.endswith((".randlora_A", ".randlora_B"))]:
        whole = pair["AB".index(copy[-1])]
        if whole is None or not np.array_equal(tensors.pop(copy), whole):
            raise InputError(f"{where}: {copy} is not the projection that all targets share")
    drawn = all(x is None for x in pair) and not c["save_projection"]
    if drawn:
        draw: Any = torch_random.vera if kind == "VERA" else torch_random.randlora
        pair = draw(part.seed, R, D, F, *([part.sparse] if kind == "RANDLORA" else []))
    for name, x, shape in zip(names, pair, shapes, strict=True):
        if x is None or x.shape != shape:
            raise InputError(f"{where}: {name} {'is missing' if x is None else list(x.shape)}, wanted {list(shape)}")
    pair = {"a": np.float32(pair[0]), "b": np.float32(pair[1])}
    return dataclasses.replace(part, given=FixedArrays(**pair, **({"drawn": np.True_} if drawn else {})))


def _places(part: Any, tensors: Tensors, found: list[Entry], tree: Any, params: Any, where: Path) -> Any:
    """SHiRA with the places of its file."""
    rows: dict[str, list[np.ndarray]] = {}
    for e in found:
        name = e.name.replace("shira_weight", "shira_indices")
        wanted = (2, tree[e.key]["values"].shape[-1])
        at = tensors.pop(name, None)
        if at is None or at.shape != wanted:
            raise InputError(f"{where}: {name} {'is missing' if at is None else list(at.shape)}, wanted {list(wanted)}")
        D, F = matrix_shape(params, e.key)
        if not np.issubdtype(at.dtype, np.integer) or (at < 0).any() or (at >= np.array([[F], [D]])).any():
            raise InputError(f"{where}: {name}: places in a matrix [{F}, {D}] are wanted; is it of another base?")
        rows.setdefault(e.key, []).append(at.T)
    stacked = {e.key for e in found if e.layer is not None}
    found_at = {key: np.stack(x) if key in stacked else x[0] for key, x in rows.items()}
    return dataclasses.replace(part, given=FixedArrays(**found_at))


def _tables(tensors: Tensors, found: list[Entry], params: Any, where: Path) -> Tensors:
    """Take out the frozen tables that HF PEFT writes beside an adapted one; InputError if they are not the base's."""
    flat, taken, tables = named(params), {e.name for e in found}, {}
    for name in [n for n in tensors if n.endswith(".base_layer.weight") and n not in taken]:
        path = "head/matrix" if name == f"{PREFIX}lm_head.base_layer.weight" else "embed/table"
        base = flat.get(path, flat["embed/table"])
        x, base = tensors.pop(name), np.asarray(base, np.float32)
        tables[name] = x
        base = base.T if path == "head/matrix" and path in flat else base
        if x.shape != base.shape or not np.allclose(np.float32(x), base, rtol=1e-2, atol=1e-4):
            raise InputError(f"{where}: {name} {list(x.shape)} is not the base's: the adapter is of another base, "
                             "or of this one with tokens added; give it that base")  # fmt: skip
    return tables


def left_out(part: Any) -> bool:
    """Whether a file has no projections because HF PEFT draws them again."""
    return part.given is not None and "drawn" in part.given


def held(method: Method, trainable: Any, config: Config, found: list[Entry], params: Any) -> Tensors:
    """The constants that a file has besides what trains, to be written. InputError if a table is neither in `params`
    nor remembered."""
    tensors = remembered(method)
    for branch, part in parts(method):
        tree = trainable[branch] if branch else trainable
        shapes = shapes_like(config, tree)
        own = [e for e in found if e.branch == branch]
        if isinstance(part, shira.SHiRA):
            at = shira.places(part, shapes, tree)
            for e in own:
                x = at[e.key] if e.layer is None else at[e.key][e.layer]
                tensors[e.name.replace("shira_weight", "shira_indices")] = np.asarray(x, np.int32)
        elif isinstance(part, vera.VeRA | randlora.RandLoRA) and not left_out(part):
            module: Any = vera if isinstance(part, vera.VeRA) else randlora
            pair = module.projections(part, *widest(shapes, tree))
            for name, x in zip(_PAIRS[type(part).__name__.upper()], pair, strict=True):
                tensors[ROOT + name] = np.asarray(x, np.float32)
                copies = {e.name.rsplit(".", 1)[0] for e in own} if module is randlora else ()
                tensors |= {f"{copy}.{name}": tensors[ROOT + name] for copy in copies}
    lessened = any(type(part).__name__ in ("PiSSA", "OLoRA") for _, part in parts(method))  # HF has the residual there
    return tensors if lessened else tensors | _untouched(found, config, params, tensors)


def _untouched(found: list[Entry], config: Config, params: Any, known: Tensors) -> Tensors:
    """The tables below an adapted `embed_tokens` or `lm_head`, and beside it, which HF PEFT saves as they are."""
    mods: dict[str, Module] = modules(config)
    named_so = {m: at for m, at in mods.items() if m.split(".")[-1] in ("embed_tokens", "lm_head")}
    own = {
        m: [e.name.removeprefix(f"{PREFIX}{m}.") for e in found if e.name.startswith(f"{PREFIX}{m}.")] for m in named_so
    }
    touched = [m for m, names in own.items() if set(names) - {"weight", "bias"}]
    if any(e.name.endswith("trainable_tokens_delta") for e in found):
        return {}
    if params is None:
        if lost := [m for m in touched if f"{PREFIX}{m}.base_layer.weight" not in known]:
            path = "embed/table" if config.tied else named_so[lost[0]].path
            raise InputError(f"the file of an adapter of {lost[0]} has the base's {path} in it, which this method was "
                             "not loaded with; give save(..., params=) the base")  # fmt: skip
        return {}
    flat = named(params)
    tables = {m: flat.get(named_so[m].path, flat["embed/table"]) for m in touched}
    turned = {m: x.T if m == "lm_head" and "head/matrix" in flat else x for m, x in tables.items()}
    return {f"{PREFIX}{m}.base_layer.weight": np.asarray(x, np.float32) for m, x in turned.items()}
